import collections
import re

import numpy as np
import pytest
import torch

from unimatrix.errors import InputError
from unimatrix.tasks.ruler import RULER_TASKS, build_task, score_references
from unimatrix.tasks.ruler.needles import NeedleSearch

# Words of one letter and a number that tells their place; no needle is among them.
TEXT = np.frombuffer(b"".join(b"w%d x\n" % n for n in range(20_000)), np.uint8)
LENGTHS = (2500, 4096, 16_384, 20_011)
tasks = pytest.mark.parametrize("name", RULER_TASKS)
NIAH = [name for name in RULER_TASKS if name.startswith("niah")]
NEEDLE = re.compile(rb"One of the secret (?:numbers|codes) of (\S+) is: (\S+)\.\n")


def build(name: str, total_bytes: int, index: int = 0, seed: int = 0):
    return build_task(name, total_bytes, TEXT).build(seed, index)


@tasks
@pytest.mark.parametrize("total_bytes", LENGTHS)
def test_prompt_and_answer_have_exactly_the_length(name, total_bytes):
    for index in range(5):
        example = build(name, total_bytes, index)
        assert len(example.prompt) + example.max_new_bytes == total_bytes
        assert len(b" ".join(example.references)) < example.max_new_bytes
        assert example.prompt.decode().endswith((":", "is", "are"))


@tasks
def test_examples_are_a_function_of_seed_and_index(name):
    torch.manual_seed(1)
    np.random.seed(1)
    first = build(name, 4096, 3)
    torch.manual_seed(2)
    np.random.seed(2)
    build(name, 4096, 4)
    assert build(name, 4096, 3) == first
    assert build(name, 4096, 4) != first
    assert build(name, 4096, 3, seed=1) != first
    with pytest.raises(InputError, match="seed -1 is negative"):
        build(name, 4096, seed=-1)


@tasks
def test_a_length_too_short_is_refused_with_one_that_fits(name):
    with pytest.raises(InputError, match="100 bytes are too few for the task") as caught:
        build_task(name, 100, TEXT)
    needed = int(str(caught.value).rpartition(" ")[2].replace(",", ""))
    for index in range(20):
        build(name, needed, index)
    with pytest.raises(InputError, match=f"needs {needed:,}"):
        build_task(name, needed - 1, TEXT)


@pytest.mark.parametrize(
    ("name", "keys", "values", "asked"),
    [
        ("niah_single_1", 1, 1, 1),
        ("niah_single_2", 1, 1, 1),
        ("niah_single_3", 1, 1, 1),
        ("niah_multikey_1", 4, 1, 1),
        ("niah_multivalue", 1, 4, 1),
        ("niah_multiquery", 4, 1, 4),
    ],
)
@pytest.mark.parametrize("total_bytes", LENGTHS)
def test_needles_and_references(name, keys, values, asked, total_bytes):
    for index in range(5):
        example = build(name, total_bytes, index)
        found = NEEDLE.findall(example.prompt)
        assert len(found) == keys * values
        assert len({key for key, _ in found}) == keys
        assert len({value for _, value in found}) == keys * values
        assert len(example.references) == asked * values
        question = example.prompt.rpartition(b"Question:")[2]
        in_question = {key for key, _ in found if key in question}
        assert len(in_question) == asked
        assert {value for key, value in found if key in in_question} == {*example.references}
        assert all(question.count(key) == 2 for key in in_question)
        assert all(example.prompt.count(reference) == 1 for reference in example.references)


@pytest.mark.parametrize("name", ["niah_multikey_2", "niah_multikey_3"])
@pytest.mark.parametrize("total_bytes", LENGTHS)
def test_a_haystack_of_needles(name, total_bytes):
    for index in range(5):
        example = build(name, total_bytes, index)
        body = example.prompt.partition(b"\n")[2].rpartition(b"\nQuestion:")[0]
        found = NEEDLE.findall(body)
        (reference,) = example.references
        # Nothing else but the end of a line, cut so that the length is exact.
        rest = NEEDLE.sub(b"", body)
        assert re.fullmatch(rb"[^\n]{0,110}\n", rest) or rest == b""
        asked = [key for key, value in found if value == reference]
        assert len(asked) == 1
        assert [key for key, _ in found].count(asked[0]) == 1
        assert example.prompt.count(asked[0]) == 3
        assert example.prompt.count(reference) == 1


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("niah_single_1", r"[1-9][0-9]{6}"),
        ("niah_single_3", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"),
        ("niah_multikey_3", r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"),
    ],
)
def test_values_are_numbers_or_uuids(name, form):
    found = {build(name, 4096, index).references[0].decode() for index in range(20)}
    assert len(found) == 20
    assert all(re.fullmatch(form, value) for value in found)


@pytest.mark.parametrize("name", NIAH)
def test_forty_examples_have_every_depth_once(name):
    found = [build(name, 30_000, index).depths for index in range(40)]
    assert sorted(depths[0] for depths in found) == pytest.approx(np.linspace(0, 1, 40))
    assert all(len(set(depths)) == len(depths) for depths in found)


@pytest.mark.parametrize("name", ["niah_single_1", "niah_single_2", "niah_multikey_2"])
def test_needles_stand_where_the_depth_says(name):
    for index in range(40):
        example = build(name, 30_000, index)
        body = example.prompt.partition(b"\n")[2].rpartition(b"\nQuestion:")[0]
        (reference,) = example.references
        needle = next(match for match in NEEDLE.finditer(body) if match[2] == reference)
        room = len(body) - len(needle[0])
        assert -0.5 <= example.depths[0] * room - needle.start() <= 201
        assert needle.start() == 0 or body[needle.start() - 1] == ord("\n")


def test_essays_are_windows_of_the_text_or_all_of_it_again():
    text = np.frombuffer(b"abcdefghij", np.uint8)
    example = NeedleSearch(total_bytes=2000, haystack="essay", text=text).build(0, 0)
    body = example.prompt.partition(b"\n")[2].rpartition(b"\nQuestion:")[0]
    hay = NEEDLE.sub(b"", body)
    start = hay[:1]
    assert hay in text.tobytes() * 200
    assert start in text.tobytes()
    starts = {
        NEEDLE.sub(b"", build("niah_single_2", 3000, index).prompt)[100:140] for index in range(20)
    }
    assert len(starts) == 20


@pytest.mark.parametrize("total_bytes", LENGTHS)
def test_variables(total_bytes):
    for index in range(5):
        example = build("vt", total_bytes, index)
        text = example.prompt.split(b"\n\n")[-2] + b"\n" + example.prompt.split(b"\n\n")[-1]
        value = re.search(rb"hold the value (\d+):$", text)[1]
        held = {}
        for name, what in re.findall(rb"VAR ([A-Z]{5}) = (?:VAR )?([A-Z]{5}|\d{5})\n", text):
            assert name not in held
            held[name] = held.get(what, what)  # A name before its own assignment stays a name.
        assert {name for name, what in held.items() if what == value} == {*example.references}
        assert len(held) == len(example.references) == 5
        assert example.depths == tuple(sorted(example.depths))
        worked = example.prompt.partition(b"Answer:")[2].partition(b"\n\n")[0]
        assert not any(name in worked for name in example.references)


@pytest.mark.parametrize(
    ("total_bytes", "often", "seldom"), [(2500, 6, 1), (16_383, 6, 1), (16_384, 30, 3)]
)
def test_common_words(total_bytes, often, seldom):
    for index in range(3):
        example = build("cwe", total_bytes, index)
        worked, listed = example.prompt.decode().split("\n\n")
        items = re.findall(r"(\d+)\. ([a-z]+)", listed)
        assert [int(number) for number, _ in items] == list(range(1, len(items) + 1))
        counts = collections.Counter(word for _, word in items)
        common = {word for word, count in counts.items() if count == often}
        assert common == {reference.decode() for reference in example.references}
        assert len(common) == 10
        others = [word for word in counts if word not in common]
        assert {counts[word] for word in others if len(word) == 7} <= {seldom, 1}
        assert sum(counts[word] == 1 for word in others) <= (4 if seldom > 1 else len(others))
        assert not any(word in worked for word in common)
        shown = re.findall(r"(\d+)\. ([a-z]+)", worked.partition("Question")[0])
        tally = collections.Counter(word for _, word in shown)
        answer = re.findall(r"\d+\. ([a-z]+)", worked.rpartition("list are:")[2])
        assert {*answer} == {word for word, count in tally.items() if count == 3}


@pytest.mark.parametrize("total_bytes", [1024, *LENGTHS])
def test_frequent_words(total_bytes):
    for index in range(3):
        example = build("fwe", total_bytes, index)
        coded = example.prompt.decode().split("\n")[1].split(" ")
        counts = collections.Counter(word for word in coded if not word.startswith("..."))
        assert all(re.fullmatch(r"[a-z]{6}", word) for word in counts)
        ranked = counts.most_common()
        assert [word.encode() for word, _ in ranked[:3]] == [*example.references]
        assert ranked[2][1] > ranked[3][1]
        dots = len(coded) - sum(counts.values())
        # n k^-2 / zeta(2): rank 1, the dots, four times as often as rank 2.
        assert dots >= 4 * ranked[0][1]
        assert abs(ranked[1][1] - ranked[0][1] * 4 / 9) <= 1
        assert abs(ranked[2][1] - ranked[0][1] * 4 / 16) <= 1


@pytest.mark.parametrize("name", NIAH)
def test_the_answer_does_not_continue_the_sentence_of_a_needle(name):
    prompt = build(name, 4096).prompt
    assert all(
        not match[0].partition(b": ")[0].endswith(prompt[-6:]) for match in NEEDLE.finditer(prompt)
    )


@pytest.mark.parametrize(
    ("answer", "references", "score"),
    [
        (b" are 12, 34.", (b"12", b"34"), 1.0),
        (b" are 12", (b"12", b"34"), 0.5),
        (b"ABCDE fghij", (b"abcde", b"FGHIJ", b"x", b"y"), 0.5),
        (b"", (b"1",), 0.0),
    ],
)
def test_score(answer, references, score):
    assert score_references(answer, references) == score


def test_unknown_names_are_refused():
    with pytest.raises(InputError, match=r"no task 'niah_single_9'.*Did you mean 'niah_single_"):
        build_task("niah_single_9", 4096, TEXT)
    with pytest.raises(InputError, match=r"no haystack 'esay'.*Did you mean 'essay'"):
        NeedleSearch(total_bytes=4096, haystack="esay")
    with pytest.raises(InputError, match="essay needs a text"):
        NeedleSearch(total_bytes=4096, haystack="essay")
