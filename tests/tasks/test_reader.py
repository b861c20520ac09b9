"""A reader's documents: the answer is what was told last, or first, or that nothing was told."""

import re

import numpy as np
import pytest

from tests.tasks.test_bindings import NAMES, TEXT
from unimatrix import tokenization
from unimatrix.data import ByteStream, StreamMatches, WindowDataset
from unimatrix.errors import InputError
from unimatrix.tasks import NOT_IN_TEXT, MixedWindows, ReaderText, frame_question
from unimatrix.tasks.reader import QUESTION_KINDS, cut_question
from unimatrix.tasks.reader_wordings import READER, ReaderWordings
from unimatrix.tasks.wordings import FEW, MANY, UNSEEN, Wordings

MARKED = ReaderWordings(
    bindings=Wordings(
        needles=("TOLD {key} AS {value};",),
        questions=("ASK {key}? {value}.",),
        kinds=MANY.kinds,
    ),
    updates=("CHANGED {key} AS {value};",),
    first_questions=("FIRST {key}? {value}.",),
    mentions=("SEEN {key};",),
    denials=("LACKS {key};",),
    distractions=("{number} FOR {name};",),
)
EVENT = re.compile(
    r"(?P<kind>TOLD|CHANGED|ASK|ask|FIRST|first|SEEN|LACKS) (?P<key>[\w ]+?)"
    r"(?: AS (?P<value>[^;]+);|(?P<frame>\??\nAnswer: [^\n]+\n)|\? (?P<answer>[^.]+)\.|;)"
)


def write(task: ReaderText, seed: int, num_windows: int) -> list[str]:
    """Return windows as text."""
    return [bytes(row).decode() for row in task.build(seed, num_windows)["shift_labels"].tolist()]


def test_every_answer_is_right() -> None:
    """Of all that a window has told so far: the last value, the first, or the refusal."""
    task = ReaderText(2000, TEXT, NAMES, MARKED.bindings, MARKED)
    seen = {"latest of several": 0, "first": 0, "refused": 0, "refused a mention": 0, "frames": 0}
    kinds = set()
    for window in write(task, 3, 60):
        told: dict[str, list[str]] = {}
        mentioned = set()
        for event in EVENT.finditer(window):
            kind, key = event["kind"].upper(), event["key"].lower()
            if kind in ("TOLD", "CHANGED"):
                assert kind == "TOLD" or key in told, window
                assert event["value"] not in told.get(key, []), window
                told.setdefault(key, []).append(event["value"])
                kinds.add(re.sub(r"\d", "0", re.sub(r"[a-z]+", "a", event["value"])))
            elif kind in ("SEEN", "LACKS"):
                assert kind == "SEEN" or key not in told, window
                mentioned.add(key)
            else:
                answer = event["answer"] or event["frame"].partition("Answer: ")[2].strip()
                values = told.get(key, [NOT_IN_TEXT])
                assert answer == values[0 if kind == "FIRST" else -1], window
                seen["frames"] += event["frame"] is not None
                seen["first"] += kind == "FIRST"
                seen["latest of several"] += kind == "ASK" and len(values) > 1
                seen["refused"] += key not in told
                seen["refused a mention"] += key in mentioned - set(told)
    assert min(seen.values()) > 20, seen
    assert {"0" * digits for digits in range(1, 13)} <= kinds
    assert {"a", "a a", "a a a"} <= kinds
    assert any(re.fullmatch(r"[A-Z]{2}-0000", kind) for kind in kinds)


def test_keys_have_all_forms_and_may_look_alike() -> None:
    task = ReaderText(2000, TEXT, NAMES, MARKED.bindings, MARKED)
    windows = write(task, 1, 60)
    keys = [{e["key"] for e in EVENT.finditer(window) if e["value"]} for window in windows]
    everything = set().union(*keys)
    assert any(key[0].isupper() for key in everything)
    assert any(re.fullmatch(r"[a-z]+ \d+", key) for key in everything)
    assert any(re.fullmatch(r"[a-z]+ [a-z]+", key) for key in everything)
    numbers = [{key.rpartition(" ")[0] for key in found if key[-1].isdigit()} for found in keys]
    several = [len([key for key in found if key[-1].isdigit()]) for found in keys]
    assert any(len(heads) < count for heads, count in zip(numbers, several, strict=True))


def test_shares_of_a_training_window() -> None:
    windows = "".join(write(ReaderText(512, TEXT, NAMES), 0, 400))
    answers = re.findall(r"\nQuestion: [^\n]+\nAnswer: ([^\n]+)\n", windows)
    assert 250 < len(answers) < 600
    assert 0.15 < answers.count(NOT_IN_TEXT) / len(answers) < 0.5
    assert "{" not in windows


def test_held_out_sentences_never_appear() -> None:
    sentences = [
        *READER.bindings.needles,
        *READER.bindings.questions,
        *READER.updates,
        *READER.first_questions,
        *READER.mentions,
        *READER.denials,
        *READER.distractions,
    ]
    held_out = UNSEEN.needles + UNSEEN.questions
    assert not set(sentences) & set(held_out)
    assert not any("special magic" in sentence for sentence in sentences)  # RULER
    patterns = []
    for sentence in [*held_out, *(map(cut_question, UNSEEN.questions))]:
        pattern = re.escape(sentence).replace(r"\{key\}", r"[\w ]+").replace(r"\{value\}", r".+")
        patterns.append(re.compile(pattern))
    text = "".join(write(ReaderText(512, TEXT, NAMES), 0, 400))
    for pattern in patterns:
        if pattern.pattern != r"[\w ]+":
            assert not pattern.search(text), pattern.pattern


@pytest.mark.parametrize(
    ("wording", "question"),
    [
        ("What is the {noun} of {key}? It is {value}.", "What is the {noun} of {key}?"),
        ("Question: which {noun} is {key}'s? Answer: {value}.", "which {noun} is {key}'s?"),
        ("Q: {key}? A: {value}.", "{key}?"),
        ("Recall the {noun} of {key}. It is {value}.", "Recall the {noun} of {key}."),
        ("Tell me the {noun} of {key}: {value}.", "Tell me the {noun} of {key}"),
        ("{key}: {value}.", "{key}"),
    ],
)
def test_the_question_of_a_wording(wording: str, question: str) -> None:
    assert cut_question(wording) == question


def test_every_question_ends_with_its_answer() -> None:
    for wordings in (FEW.questions, READER.bindings.questions, READER.first_questions):
        for wording in wordings:
            assert wording.endswith("{value}.")
            assert "{key}" in cut_question(wording)
            assert "{value}" not in cut_question(wording)
    for sentence in READER.mentions + READER.denials:
        assert "{key}" in sentence
        assert "{value}" not in sentence
    for sentence in READER.updates:
        assert {"{key}", "{value}"} <= set(re.findall(r"\{\w+\}", sentence))


def test_the_frame() -> None:
    assert frame_question(" Who\n is  it? ") == "\nQuestion: Who is it?\nAnswer: "


def test_examples_depend_on_seed_and_index_alone() -> None:
    task = ReaderText(300, TEXT, NAMES)
    batch = task.build(5, 8)
    inputs, labels = batch["input_ids"], batch["shift_labels"]
    assert (inputs[:, 0] == tokenization.BOS_ID).all()
    assert (inputs[:, 1:] == labels[:, :-1]).all()
    assert (task.build_batch(5, np.array([6, 2]))["input_ids"] == inputs[[6, 2]]).all()
    assert (task.build(6, 8)["input_ids"] != inputs).any(dim=1).all()


def mix(share: float, num_windows: int = 300, **options: object) -> MixedWindows:
    stream = ByteStream.from_bytes(TEXT.tobytes(), name="words")
    windows = WindowDataset(stream, 300, num_windows, 4, **options)
    return MixedWindows(windows, ReaderText(300, TEXT, NAMES), share)


def test_a_share_of_the_windows_are_documents() -> None:
    mixture = mix(0.75)
    assert len(mixture) == 300
    whole = mixture.build_batch(np.arange(300))
    text = mixture.windows.build_batch(np.arange(300))
    documents = mixture.task.build(4, 300)
    is_text = (whole["input_ids"] == text["input_ids"]).all(dim=1)
    is_document = (whole["input_ids"] == documents["input_ids"]).all(dim=1)
    assert (is_text ^ is_document).all()
    assert 0.68 < is_document.float().mean() < 0.82
    assert (whole["shift_labels"][is_text] == text["shift_labels"][is_text]).all()
    part = mixture.build_batch(np.array([41, 7, 200]))
    assert all((part[name] == whole[name][[41, 7, 200]]).all() for name in whole)
    for share, same in ((0.0, text), (1.0, documents)):
        assert (mix(share).build_batch(np.arange(300))["input_ids"] == same["input_ids"]).all()


def test_documents_have_no_automaton_from_before() -> None:
    matches = StreamMatches(np.zeros(9, np.int16), np.zeros(9, np.int32))
    with pytest.raises(InputError, match=r"leave data.carried_automaton or data.document_share"):
        mix(0.5, matches=matches)


def test_one_question_about_a_document() -> None:
    task = ReaderText(600, TEXT, NAMES, MARKED.bindings, MARKED)
    for index in range(40):
        example = task.draw_question(2, index)
        assert example == task.draw_question(2, index)
        assert example.kind == QUESTION_KINDS[index % 4]
        told: dict[str, list[str]] = {}
        for event in EVENT.finditer(example.text.decode()):
            if event["value"]:
                told.setdefault(event["key"], []).append(event["value"])
        opening = "FIRST " if example.kind == "first" else "ASK "
        key = example.question.removeprefix(opening).removesuffix("?")
        assert example.question == f"{opening}{key}?"
        values = told.get(key, [])
        assert (len(values) > 1) == (example.kind in ("latest", "first"))
        if example.kind == "not told":
            assert (values, example.answer) == ([], NOT_IN_TEXT)
        else:
            assert example.answer == values[0 if example.kind == "first" else -1]
        assert 590 < len(example.text) < 900
