"""A reader: constant state, questions that do not disturb each other, passages of the text."""

import pytest
import torch

from tests.byte_models import build_byte_model, prefer
from unimatrix.errors import InputError
from unimatrix.inference import text_reader
from unimatrix.inference.generation import generate_bytes
from unimatrix.inference.sampling import Sampling
from unimatrix.inference.text_reader import ANSWER_BYTES, TextReader, watch_place
from unimatrix.tasks import NOT_IN_TEXT, frame_question
from unimatrix.tokenization import encode_bytes

INDEXED = {"associative_memory": "indexed", "automaton_window": 256}
TEXT = b"The number of harkov is 4711. They went on. The code of mill is QX-2041, he said. " * 2


def build_reader(**overrides: object) -> TextReader:
    return TextReader(build_byte_model("unimatrix", seed=1, **(INDEXED | overrides)))


def test_an_answer_continues_the_text_in_the_frame() -> None:
    reader = build_reader()
    reader.read(TEXT)
    question = "Which number belongs to harkov?"
    answer = reader.ask(question)
    prompt = TEXT + frame_question(question).encode()
    written = generate_bytes(
        reader.model, prompt, max_new_bytes=ANSWER_BYTES, sampling=Sampling(temperature=0)
    ).data
    assert answer.data == written.partition(b"\n")[0].strip()
    assert answer.question == question
    assert answer.seconds > 0


def test_parts_questions_and_training_mode_leave_no_trace() -> None:
    whole, parts = build_reader(), build_reader()
    whole.read(TEXT)
    parts.model.train()
    for start in range(0, len(TEXT), 37):
        parts.read(TEXT[start : start + 37])
        parts.ask("where?")
    assert parts.model.training
    assert parts.bytes_read == whole.bytes_read == len(TEXT)
    for question in ("the number of harkov", "mill?"):
        one, other = whole.ask(question), parts.ask(question)
        assert one.data == other.data
        assert one.bytes_back == other.bytes_back


def test_the_state_does_not_grow() -> None:
    reader = build_reader()
    before = reader.state_bytes
    reader.read(TEXT * 200)
    assert reader.state_bytes == before
    assert reader.window == 256


@pytest.mark.parametrize("automaton", ["suffix_automaton", "none"])
def test_the_index_alone_reads_what_lies_far_back(
    monkeypatch: pytest.MonkeyPatch, automaton: str
) -> None:
    options = {} if automaton != "none" else {"residual_path": "none", "automaton_pointer": False}
    whole, skimming = build_reader(**options), build_reader(**options)
    text = TEXT * 8 + bytes(range(256)) + TEXT * 4
    whole.read(text)
    monkeypatch.setattr(text_reader, "TAIL_BYTES", 300)
    monkeypatch.setattr(text_reader, "_SKIMMED_BYTES", 100)
    for start in range(0, len(text), 77):
        skimming.read(text[start : start + 77])
    assert len(skimming._waiting) < len(text)
    one, other = whole.catch_up(), skimming.catch_up()
    assert one.num_columns == other.num_columns == len(text) + 1
    carried = [name for name in one.tensors() if name.startswith(("index.", "automaton."))]
    assert any(name.startswith("index.") for name in carried)
    assert not any(name.startswith("automaton.") for name in carried)
    for name in ("num_tokens", "last_token_ids", *carried):
        assert torch.equal(one.tensors()[name], other.tensors()[name]), name
    assert whole.ask("mill?").bytes_back == skimming.ask("mill?").bytes_back


def test_the_passage_is_where_attention_is() -> None:
    """Of a text with one place that the question leads to, the passage holds that place."""
    reader = build_reader(automaton_window=4096)
    # Words that stand once lead nowhere.
    words = [f"{a}{b}{c}nd" for a in "bcdfg" for b in "aeiou" for c in "lmnrs"]
    first, last = " ".join(words[:60]), " ".join(words[60:])
    text = f"{first} The number of harkov is 4711. {last}".encode()
    reader.read(text)
    answer = reader.ask("harkov")
    assert answer.passage is not None
    assert b"harkov" in answer.passage or b"4711" in answer.passage
    assert len(answer.passage) <= 96
    assert answer.bytes_back is not None
    assert abs(len(text) - answer.bytes_back - text.index(b"harkov")) < 80
    # Whole words, since the text goes on at both ends.
    assert b" " + answer.passage + b" " in text


def test_a_short_text_is_shown_whole() -> None:
    reader = build_reader()
    reader.read(b"harkov has 4711")
    answer = reader.ask("harkov?")
    assert answer.passage == b"harkov has 4711"
    assert 1 <= answer.bytes_back <= 15


def test_nothing_to_read_from() -> None:
    reader = build_reader()
    assert reader.ask("harkov?").passage is None


def test_a_refusal_has_no_passage(monkeypatch: pytest.MonkeyPatch) -> None:
    reader = build_reader()
    reader.read(b"harkov has 4711")
    monkeypatch.setattr(reader, "_write", lambda _output: NOT_IN_TEXT.encode())
    answer = reader.ask("harkov?")
    assert answer.is_refusal
    assert answer.text == "not in the text"
    assert answer.passage is None
    assert answer.bytes_back is None


def test_an_answer_ends_with_the_line_or_at_the_limit() -> None:
    plain = {"norm_type": "layer_norm", "pointer": False, "automaton_pointer": False}
    for token_id, expected in ((ord("\n"), b""), (ord("a"), b"a" * ANSWER_BYTES)):
        model = prefer(build_byte_model("unimatrix", **(INDEXED | plain)), token_id)
        reader = TextReader(model)
        reader.read(b"some text")
        assert reader.ask("what?").data == expected


def test_any_bytes_and_any_question() -> None:
    reader = build_reader()
    reader.read(bytes(range(256)))
    answer = reader.ask("wh\udcffat\n is  \u65e5?")
    assert isinstance(answer.text, str)


def test_the_hook_leaves_the_model_as_it_was() -> None:
    model = build_byte_model("unimatrix", seed=1, **INDEXED)
    ids = torch.from_numpy(encode_bytes(TEXT))[None]
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        expected = model(ids, past_key_values=cache, use_cache=True).logits
        with watch_place(model) as places:
            watched = model(ids, past_key_values=cache, use_cache=True).logits
        model(ids, past_key_values=cache, use_cache=True)
    assert torch.equal(watched, expected)
    assert len(places) == 1


def test_models_and_questions_that_cannot_be_used() -> None:
    with pytest.raises(InputError, match=r"associative_memory 'selective' and keeps no index"):
        TextReader(build_byte_model("selective"))
    with pytest.raises(InputError, match="reads windows and nothing before them"):
        build_reader(max_position_embeddings=80)
    with pytest.raises(InputError, match=r"the question is ' '; ask in words"):
        build_reader().ask(" ")


def test_the_window_is_chosen_for_a_text() -> None:
    model = build_byte_model("unimatrix", seed=1, **INDEXED)
    small, large = TextReader(model), None
    before = small.state_bytes
    assert small.window == 256
    large = TextReader(model, window=8192)
    assert large.window == model.config.automaton_window == 8192
    assert large.state_bytes > before + 11 * (8192 - 256)
    for window, message in ((1001, "window is 1001; pass an even number"), (64, "window is 64")):
        with pytest.raises(InputError, match=message):
            TextReader(model, window=window)
    with pytest.raises(InputError, match="neither an index of the text nor a suffix automaton"):
        build_byte_model("core").set_window(128)
