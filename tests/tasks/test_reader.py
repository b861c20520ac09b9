"""A reader's documents: the answer is what was told last, or first, or that nothing was told."""

import re

import numpy as np
import pytest

from tests.tasks.test_bindings import NAMES, TEXT
from unimatrix import tokenization
from unimatrix.data import ByteStream, StreamMatches, WindowDataset
from unimatrix.errors import InputError
from unimatrix.tasks import NOT_IN_TEXT, MixedWindows, ReaderText, frame_question, reader
from unimatrix.tasks.reader import QUESTION_KINDS, cut_question
from unimatrix.tasks.reader_wordings import READER, ReaderWordings
from unimatrix.tasks.wordings import FEW, UNSEEN, Wordings

MARKED = ReaderWordings(
    bindings=Wordings(
        needles=("TOLD {key} AS {value};",),
        questions=("ASK {key}? {value}.",),
        kinds=READER.bindings.kinds,
    ),
    openings=("SO ",),
    closings=(",",),
    requests=("NOW ",),
    updates=("CHANGED {key} AS {value};",),
    first_questions=("FIRST {key}? {value}.",),
    all_questions=("EVERY {key}? {value}.",),
    leads=("IT IS ",),
    mentions=("SEEN {key};",),
    denials=("LACKS {key};",),
    distractions=("{number} FOR {name};",),
)
EVENT = re.compile(
    r"(?P<kind>[Tt]OLD|CHANGED|[Aa]SK|[Ff]IRST|[Ee]VERY|SEEN|LACKS) (?P<key>[\w -]+?)"
    r"(?: AS (?P<value>[^;]+);|(?P<frame>\??\n>> [^\n]+\n)"
    r"|(?:\? |\??\n(?:Answer: |A: |- |)(?P<lead>IT IS )?)(?P<answer>(?:\d+\.\d\d|[^.])+)\.|;)"
)


def write(task: ReaderText, seed: int, num_windows: int) -> list[str]:
    """Return windows as text."""
    return [bytes(row).decode() for row in task.build(seed, num_windows)["shift_labels"].tolist()]


def test_every_answer_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that a window has told so far: the last value, the first, all, or the refusal."""
    monkeypatch.setattr(reader, "_FREE_SHARE", 0)  # no pieces of text in place of the marks
    task = ReaderText(2000, TEXT, NAMES, MARKED.bindings, MARKED)
    names = ("latest of several", "first", "all", "refused", "refused a mention", "frames", "leads")
    seen = dict.fromkeys(names, 0)
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
                answer = event["answer"] or event["frame"].partition(">> ")[2].strip()
                values = told.get(key, [NOT_IN_TEXT])
                right = {"FIRST": values[0], "EVERY": ", ".join(values)}.get(kind, values[-1])
                assert answer == right, window
                seen["frames"] += event["frame"] is not None
                seen["leads"] += event["lead"] is not None
                seen["first"] += kind == "FIRST"
                seen["all"] += kind == "EVERY"
                seen["latest of several"] += kind == "ASK" and len(values) > 1
                seen["refused"] += key not in told
                seen["refused a mention"] += key in mentioned - set(told)
    assert min(seen.values()) > 20, seen
    assert {"0" * digits for digits in range(1, 13)} <= kinds
    assert {"a", "a a", "a a a"} <= kinds
    assert any(re.fullmatch(r"0+\.00", kind) for kind in kinds)
    assert any(len(kind.split("-")) == 5 for kind in kinds)
    assert any(re.fullmatch(r"[A-Z]{2}-0000", kind) for kind in kinds)


def test_keys_have_all_forms_and_may_look_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_FREE_SHARE", 0)
    task = ReaderText(2000, TEXT, NAMES, MARKED.bindings, MARKED)
    windows = write(task, 1, 60)
    keys = [{e["key"] for e in EVENT.finditer(window) if e["value"]} for window in windows]
    everything = set().union(*keys)
    assert any(key[0].isupper() for key in everything)
    assert any(re.fullmatch(r"[a-z]+ \d+", key) for key in everything)
    assert any(re.fullmatch(r"[a-z]+ [a-z]+", key) for key in everything)
    assert any(re.fullmatch(r"[a-z]+-[a-z]+", key) for key in everything)
    assert any(re.fullmatch(r"[a-z]+_[a-z]+_[a-z]+", key) for key in everything)
    numbers = [{key.rpartition(" ")[0] for key in found if key[-1].isdigit()} for found in keys]
    several = [len([key for key in found if key[-1].isdigit()]) for found in keys]
    assert any(len(heads) < count for heads, count in zip(numbers, several, strict=True))


def test_shares_of_a_training_window() -> None:
    windows = "".join(write(ReaderText(512, TEXT, NAMES), 0, 400))
    answers = re.findall(r"\n\?\? [^\n]+\n>> ([^\n]+)\n", windows)
    assert len(answers) > 200
    assert 0.15 < answers.count(NOT_IN_TEXT) / len(answers) < 0.5
    assert "{" not in windows


def test_held_out_sentences_never_appear() -> None:
    sentences = [
        *READER.bindings.needles,
        *READER.bindings.questions,
        *READER.updates,
        *READER.first_questions,
        *READER.all_questions,
        *READER.leads,
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
    several = (READER.first_questions, READER.all_questions)
    for wordings in (FEW.questions, READER.bindings.questions, *several):
        for wording in wordings:
            assert wording.endswith("{value}.")
            assert "{key}" in cut_question(wording)
            assert "{value}" not in cut_question(wording)
    for sentence in READER.mentions + READER.denials:
        assert "{key}" in sentence
        assert "{value}" not in sentence
    for sentence in READER.updates:
        assert {"{key}", "{value}"} <= set(re.findall(r"\{\w+\}", sentence))


def test_pieces_of_the_text_may_be_all_that_is_around(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tells a value that has a digit, and what asks for one, in no sentence of the grammar."""
    monkeypatch.setattr(reader, "_FREE_SHARE", 1)
    numbers = MARKED._replace(bindings=MARKED.bindings._replace(kinds=("number",)))
    windows = "".join(write(ReaderText(600, TEXT, NAMES, numbers.bindings, numbers), 0, 40))
    assert "TOLD" not in windows
    assert not re.search(r"\?\? ASK", windows)
    answers = re.findall(r"\n\?\? ([^\n]*)\n>> (\d+)\n", windows)
    assert len(answers) > 20
    for _, answer in answers:
        assert re.search(rf"(^|\s){answer}(\s|;|$)", windows)


def test_answers_count_as_they_are_told_to() -> None:
    batch = ReaderText(600, TEXT, NAMES, answer_weight=5).build(0, 20)
    plain = ReaderText(600, TEXT, NAMES).build(0, 20)
    assert set(plain) == {"input_ids", "shift_labels"}
    assert (batch["shift_labels"] == plain["shift_labels"]).all()
    weights, labels = batch["loss_weights"], batch["shift_labels"]
    assert set(weights.unique().tolist()) == {1.0, 5.0}
    for row, weight in zip(labels.tolist(), weights, strict=True):
        counted = "".join(chr(byte) for byte, w in zip(row, weight, strict=True) if w == 5)
        window = bytes(row).decode()
        assert counted == "".join(re.findall(r"\n>> ([^\n]*\n?)", window))
    mixture = mix(0.5, answer_weight=5).build_batch(np.arange(100))
    is_text = (mixture["loss_weights"] == 1).all(dim=1)
    assert 0 < is_text.sum() < 100


def test_the_frame() -> None:
    assert frame_question(" Who\n is  it? ") == "\n?? Who is it?\n>> "


def test_examples_depend_on_seed_and_index_alone() -> None:
    task = ReaderText(300, TEXT, NAMES)
    batch = task.build(5, 8)
    inputs, labels = batch["input_ids"], batch["shift_labels"]
    assert (inputs[:, 0] == tokenization.BOS_ID).all()
    assert (inputs[:, 1:] == labels[:, :-1]).all()
    assert (task.build_batch(5, np.array([6, 2]))["input_ids"] == inputs[[6, 2]]).all()
    assert (task.build(6, 8)["input_ids"] != inputs).any(dim=1).all()


def mix(
    share: float, num_windows: int = 300, answer_weight: float = 1.0, **options: object
) -> MixedWindows:
    stream = ByteStream.from_bytes(TEXT.tobytes(), name="words")
    windows = WindowDataset(stream, 300, num_windows, 4, **options)
    return MixedWindows(windows, ReaderText(300, TEXT, NAMES, answer_weight=answer_weight), share)


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


def test_one_question_about_a_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_FREE_SHARE", 0)
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
