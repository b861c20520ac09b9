import copy
import pickle
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerFast, TextStreamer

from unimatrix.errors import InputError
from unimatrix.tokenization import (
    BOS_ID,
    EOS_ID,
    PAD_ID,
    VOCAB_SIZE,
    UniMatrixTokenizer,
    build_tokenizer,
    decode_bytes,
    encode_bytes,
)

SPECIALS = ["<|pad|>", "<|bos|>", "<|eos|>"]
TOKENIZER = build_tokenizer()
# Every width of UTF-8, white space that streamers look for, combining marks, and the specials.
PIECES = st.one_of(st.text(max_size=5), st.sampled_from([*SPECIALS, "é", "日本", "🙂", " ", "\n"]))
TEXTS = st.lists(PIECES, max_size=12).map("".join)
no_deadline = settings(deadline=None)


class Listener(TextStreamer):
    """Keep what a streamer would print."""

    def __init__(self, **decode_options):
        super().__init__(TOKENIZER, **decode_options)
        self.printed = []

    def on_finalized_text(self, text, stream_end=False):
        self.printed.append(text)


# Texts may end with what a program could have appended.
pytestmark = pytest.mark.filterwarnings("ignore:a text ends with:UserWarning")


def list_bytes(text):
    return list(text.encode())


@given(st.binary())
@no_deadline
def test_bytes_survive_both_ways(data):
    ids = encode_bytes(data)
    assert ids.dtype == np.int64
    assert ids.tolist() == list(data)
    assert decode_bytes(ids) == data


def test_encoded_bytes_are_a_copy_and_take_any_buffer():
    data = bytearray(b"abc")
    ids = encode_bytes(data)
    data[0] = 0
    assert ids.tolist() == [97, 98, 99]
    assert encode_bytes(memoryview(b"\x00\xff")).tolist() == [0, 255]


@pytest.mark.parametrize("make", [list, np.array, torch.tensor])
def test_decoded_bytes_leave_out_special_tokens(make):
    assert decode_bytes(make([BOS_ID, 255, PAD_ID, 0, EOS_ID])) == b"\xff\x00"
    assert decode_bytes(make([])) == b""


@pytest.mark.parametrize(
    ("ids", "named"),
    [
        ([1, VOCAB_SIZE], "259"),
        ([-1], "-1"),
        ([[1, 2]], r"\(1, 2\)"),
        ([1.5], "float64"),
        ([True], "bool"),
    ],
)
def test_ids_that_are_no_tokens_are_refused(ids, named):
    with pytest.raises(InputError, match=named):
        decode_bytes(ids)


@given(TEXTS)
@no_deadline
def test_text_becomes_bos_and_its_bytes_and_comes_back(text):
    assert TOKENIZER(text).input_ids == [BOS_ID, *list_bytes(text)]
    plain = TOKENIZER(text, add_special_tokens=False).input_ids
    assert plain == list_bytes(text) == encode_bytes(text.encode()).tolist()
    assert TOKENIZER.decode(plain) == text
    ended = [PAD_ID, BOS_ID, *plain, EOS_ID]
    assert TOKENIZER.decode(ended, skip_special_tokens=True) == text
    assert TOKENIZER.decode(ended) == f"<|pad|><|bos|>{text}<|eos|>"


@given(TEXTS)
@no_deadline
def test_offsets_point_at_the_character_of_each_byte(text):
    encoding = TOKENIZER(text, add_special_tokens=False, return_offsets_mapping=True)
    expected = [(i, i + 1) for i, letter in enumerate(text) for _ in letter.encode()]
    assert encoding["offset_mapping"] == expected


def test_the_vocabulary_is_259_entries_in_byte_order():
    assert (TOKENIZER.vocab_size, len(TOKENIZER)) == (VOCAB_SIZE, VOCAB_SIZE)
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(VOCAB_SIZE))
    assert TOKENIZER.convert_tokens_to_ids(SPECIALS) == [PAD_ID, BOS_ID, EOS_ID]
    for value in range(256):
        decoded = TOKENIZER.backend_tokenizer.decode([value])
        assert decoded == bytes([value]).decode(errors="replace")


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("split", [None, True])
def test_special_tokens_are_not_parsed_out_of_text(special, split):
    text = f"a{special}b {special}."
    plain = list_bytes(text)
    assert TOKENIZER(text, split_special_tokens=split).input_ids == [BOS_ID, *plain]
    assert TOKENIZER.encode(text, split_special_tokens=split) == [BOS_ID, *plain]
    assert TOKENIZER([text], split_special_tokens=split).input_ids == [[BOS_ID, *plain]]
    assert len(TOKENIZER.tokenize(text)) == len(plain)
    assert TOKENIZER.backend_tokenizer.encode(text, add_special_tokens=False).ids == plain


@pytest.mark.parametrize("special", [PAD_ID, BOS_ID, EOS_ID])
def test_special_tokens_are_parsed_where_the_caller_says_so(special):
    text = "abc" + SPECIALS[special - PAD_ID]
    ids = [BOS_ID, 97, 98, 99, special]
    assert TOKENIZER(text, split_special_tokens=False).input_ids == ids
    assert TOKENIZER([text], split_special_tokens=False).input_ids == [ids]
    parsing = pickle.loads(pickle.dumps(build_tokenizer(split_special_tokens=False)))
    assert parsing(text).input_ids == ids
    assert parsing(text, split_special_tokens=True).input_ids == [BOS_ID, *list_bytes(text)]
    # Neither call turned the switch of the other, nor of what other threads share.
    assert TOKENIZER.backend_tokenizer.encode(text).ids == [BOS_ID, *list_bytes(text)]
    assert parsing.backend_tokenizer.encode(text).ids == ids


@pytest.mark.parametrize("text", ["abc<|eos|>", ["abc", "abc<|eos|>"]])
def test_an_eos_that_was_appended_as_text_is_warned_of(text):
    with pytest.warns(UserWarning, match=r"ends with '<\|eos\|>', which stays 7 bytes"):
        TOKENIZER(text)
    with warnings.catch_warnings(action="error"):
        TOKENIZER(text, split_special_tokens=False)
        TOKENIZER("<|eos|>")  # as lm-eval encodes what it stops at


CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role[0] }}:"
    "{% generation %}{{ m.content }}{% endgeneration %}{{ eos_token }}{% endfor %}"
)


@pytest.mark.parametrize("split", [True, False])
def test_a_chat_template_writes_ids_and_messages_stay_text(split):
    tokenizer = build_tokenizer(split_special_tokens=split)
    messages = [{"role": "user", "content": "a<|eos|>"}, {"role": "assistant", "content": "b"}]
    ids = tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATE)["input_ids"]
    assert ids == [BOS_ID, *list_bytes("u:a<|eos|>"), EOS_ID, *list_bytes("a:b"), EOS_ID]
    text = tokenizer.apply_chat_template(messages, chat_template=CHAT_TEMPLATE, tokenize=False)
    assert text == "<|bos|>u:a<|eos|><|eos|>a:b<|eos|>"
    masked = {"chat_template": CHAT_TEMPLATE, "return_assistant_tokens_mask": True}
    with pytest.raises(InputError, match=r"a message holds '<\|eos\|>'"):
        tokenizer.apply_chat_template(messages, **masked)
    found = tokenizer.apply_chat_template(messages[1:], **masked)
    assert found["input_ids"] == [BOS_ID, *list_bytes("a:b"), EOS_ID]
    assert found["assistant_masks"] == [0, 0, 0, 1, 0]
    assert tokenizer.split_special_tokens is split


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("make", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_parse_special_tokens_as_the_first_did(make, split):
    made = make(build_tokenizer(split_special_tokens=split))
    ids = list_bytes("<|eos|>") if split else [EOS_ID]
    assert made.backend_tokenizer.encode("<|eos|>").ids == [BOS_ID, *ids]


def test_batches_are_padded_on_the_left():
    batch = TOKENIZER(["a", "日b"], padding="longest", return_tensors="pt")
    assert batch["input_ids"].tolist() == [
        [PAD_ID, PAD_ID, PAD_ID, BOS_ID, 97],
        [BOS_ID, *list_bytes("日"), 98],
    ]
    assert batch["attention_mask"].tolist() == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]
    assert set(batch) == {"input_ids", "attention_mask"}


def test_no_length_limit_truncates_or_pads():
    text = "x" * 100_000
    assert len(TOKENIZER(text, truncation=True).input_ids) == 100_001
    rows = TOKENIZER(["abc", "de"], truncation=True, padding="max_length")
    assert rows.input_ids == [[BOS_ID, 97, 98, 99], [BOS_ID, 100, 101]]
    assert TOKENIZER.pad({"input_ids": [[1, 2]]}, padding="max_length").input_ids == [[1, 2]]
    assert TOKENIZER("abc", padding="max_length", max_length=5).input_ids[0] == PAD_ID
    # lm-eval reads this very value as "no limit known" and cuts to 2,048 tokens.
    assert TOKENIZER.model_max_length != int(1e30)
    ids = torch.arange(4)[None]
    assert ids[:, -TOKENIZER.model_max_length :].tolist() == ids.tolist()


def test_evaluation_harnesses_find_what_they_ask_for():
    assert isinstance(TOKENIZER, PreTrainedTokenizerFast)
    ids = (TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id)
    assert ids == (PAD_ID, BOS_ID, EOS_ID)
    assert TOKENIZER.unk_token is None
    assert TOKENIZER.padding_side == "left"


@given(TEXTS.filter(lambda text: "\ufffd" not in text))
@no_deadline
def test_text_streamer_prints_whole_characters_only(text):
    listener = Listener(skip_special_tokens=True)
    for token in [BOS_ID, *list_bytes(text), EOS_ID]:
        listener.put(torch.tensor([token]))
    listener.end()
    assert "".join(listener.printed) == text
    assert not any("\ufffd" in piece for piece in listener.printed)


@given(TEXTS.filter(lambda text: "\ufffd" not in text))
@no_deadline
def test_decode_stream_yields_whole_characters_only(text):
    stream = DecodeStream([], skip_special_tokens=True)
    tokens = [BOS_ID, *list_bytes(text), EOS_ID]
    pieces = [stream.step(TOKENIZER._tokenizer, token) or "" for token in tokens]
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_broken_utf8_becomes_replacement_characters_and_stops_nothing():
    assert TOKENIZER.decode([0xFF, 97, 0xE6, 0x97]) == "\ufffda\ufffd"
    stream = DecodeStream([])
    pieces = [stream.step(TOKENIZER._tokenizer, token) for token in [0xFF, 97, 98]]
    assert pieces == [None, "\ufffda", "b"]


def test_save_and_load_give_the_same_tokenizer(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = UniMatrixTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    for name in ("padding_side", "model_max_length", "special_tokens_map"):
        assert getattr(loaded, name) == getattr(TOKENIZER, name)
    text = "a<|bos|>é 日\n"
    assert loaded(text).input_ids == TOKENIZER(text).input_ids
    assert loaded.backend_tokenizer.encode(text).ids == TOKENIZER(text).input_ids
    assert loaded.decode(loaded(text).input_ids) == f"<|bos|>{text}"
    assert loaded.save_pretrained(tmp_path / "again")
    parsing = UniMatrixTokenizer.from_pretrained(tmp_path, split_special_tokens=False)
    assert parsing("a<|eos|>").input_ids == [BOS_ID, 97, EOS_ID]
    parsing.save_pretrained(tmp_path / "parsing")
    again = UniMatrixTokenizer.from_pretrained(tmp_path / "parsing")
    assert again("a<|eos|>").input_ids == [BOS_ID, 97, EOS_ID]


def test_building_twice_gives_the_same_tokenizer():
    assert build_tokenizer().backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
