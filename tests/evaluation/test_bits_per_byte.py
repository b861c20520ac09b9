import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.byte_models import build_byte_model
from unimatrix.cache import start_cache
from unimatrix.data import ByteStream
from unimatrix.errors import InputError
from unimatrix.evaluation.bits_per_byte import measure_bits_per_byte
from unimatrix.inference import streams
from unimatrix.tokenization import BOS_ID, VOCAB_SIZE

DATA = bytes(np.random.default_rng(0).integers(0, 256, 150, dtype=np.uint8)) + b"abcabcabcabc" * 4
STREAM = ByteStream.from_bytes(DATA, name="text", ends_with_eos=True)
CARRIED = {
    "core": {},
    "sparsepointer": {},
    "assoc": {"slots_per_read": 2},
    "rosa": {"residual_path": "suffix_automaton"},
}


def count_bits(model, data: bytes) -> float:
    """Sum the bits of ``data`` after BOS in one forward pass, straight from the definition."""
    ids = torch.tensor([[BOS_ID, *data[:-1]]])
    with torch.no_grad():
        probabilities = model(ids).logits.double().softmax(-1)[0]
    return sum(-math.log2(probabilities[t, byte]) for t, byte in enumerate(data))


@pytest.mark.parametrize("preset", CARRIED)
@pytest.mark.parametrize("chunk_tokens", [9, 64, 2048])
def test_context_is_carried(preset, chunk_tokens) -> None:
    model = build_byte_model(preset, **CARRIED[preset]).double()
    result = measure_bits_per_byte(model, STREAM, chunk_tokens=chunk_tokens)
    assert result.bits_per_byte == pytest.approx(count_bits(model, DATA) / len(DATA), abs=1e-9)
    assert (result.bytes, result.context) == (len(DATA), "carried")
    with torch.no_grad():
        cache = model(torch.tensor([[BOS_ID, *DATA[:-1]]]), use_cache=True).past_key_values
    if chunk_tokens > len(DATA):  # What an automaton allocates depends on the chunks.
        assert result.state_bytes == cache.num_bytes()


@pytest.mark.parametrize("preset", CARRIED)
def test_what_is_read_first_is_remembered_and_not_counted(preset) -> None:
    model = build_byte_model(preset, **CARRIED[preset]).double()
    first = ByteStream.from_bytes(DATA[50:120], name="first")
    result = measure_bits_per_byte(model, STREAM, prime=first, chunk_tokens=64)
    joined = count_bits(model, DATA[50:120] + DATA) - count_bits(model, DATA[50:120])
    assert result.bits_per_byte == pytest.approx(joined / len(DATA), abs=1e-9)
    assert (result.bytes, result.context) == (len(DATA), "carried, after 70 bytes")


def test_of_a_long_text_the_automaton_reads_the_start_alone(monkeypatch) -> None:
    """As if nothing but the automaton, and the last token, were left of it."""
    monkeypatch.setattr(streams, "PRIME_TOKENS", 30)
    model = build_byte_model("rosa", **CARRIED["rosa"]).double()
    first = ByteStream.from_bytes(DATA[50:120], name="first")
    with torch.no_grad():
        cache = model(torch.tensor([[BOS_ID, *DATA[50:89]]]), use_cache=True).past_key_values
        ids = torch.tensor([[*DATA[89:120], *DATA[:-1]]])
        start = replace(start_cache(model.config, ids), shared=cache.shared)
        for name in ("num_columns", "num_tokens", "last_token_ids"):
            setattr(start, name, getattr(cache, name))
        logits = model(ids, past_key_values=start).logits[0, 30:]
    nats = torch.nn.functional.cross_entropy(logits, torch.tensor([*DATA]))
    result = measure_bits_per_byte(model, STREAM, prime=first, chunk_tokens=64)
    assert result.bits_per_byte == pytest.approx(nats.item() / math.log(2), abs=1e-9)
    assert result.context == "carried, after 70 bytes"


@pytest.mark.parametrize("preset", [name for name in CARRIED if name != "rosa"])
def test_what_else_remembers_reads_all_of_a_long_text(preset, monkeypatch) -> None:
    model = build_byte_model(preset, **CARRIED[preset]).double()
    first = ByteStream.from_bytes(DATA[50:120], name="first")
    expected = measure_bits_per_byte(model, STREAM, prime=first)
    monkeypatch.setattr(streams, "PRIME_TOKENS", 30)
    assert measure_bits_per_byte(model, STREAM, prime=first) == expected


def test_nothing_is_read_before_windows() -> None:
    model = build_byte_model("sparsepointer", max_position_embeddings=20)
    with pytest.raises(InputError, match="reads windows and nothing before them"):
        measure_bits_per_byte(model, STREAM, prime=STREAM)


@pytest.mark.parametrize("chunk_tokens", [1, 30, 64, 2048])
def test_a_position_table_means_windows(chunk_tokens) -> None:
    model = build_byte_model("sparsepointer", max_position_embeddings=20).double()
    windows = [DATA[start : start + 20] for start in range(0, len(DATA), 20)]
    assert len(windows[-1]) < 20
    expected = sum(count_bits(model, window) for window in windows) / len(DATA)
    result = measure_bits_per_byte(model, STREAM, chunk_tokens=chunk_tokens)
    assert result.bits_per_byte == pytest.approx(expected, abs=1e-9)
    assert (result.bytes, result.context) == (len(DATA), "windows of 20")
    assert result.state_bytes == 0


@pytest.mark.parametrize("table", [None, 20])
@pytest.mark.parametrize("limit_bytes", [1, 20, 45, 10**6])
def test_a_limit_is_a_shorter_stream(table, limit_bytes) -> None:
    model = build_byte_model(max_position_embeddings=table)
    part = ByteStream.from_bytes(DATA[:limit_bytes], name="part")
    expected = measure_bits_per_byte(model, part)
    result = measure_bits_per_byte(model, STREAM, limit_bytes=limit_bytes)
    assert result == expected
    assert result.bytes == min(limit_bytes, len(DATA))


def test_a_transformer_is_measured_in_windows_too() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=50,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
    )
    model = LlamaForCausalLM(config).eval()
    windows = [DATA[start : start + 50] for start in range(0, len(DATA), 50)]
    expected = sum(count_bits(model, window) for window in windows) / len(DATA)
    result = measure_bits_per_byte(model, STREAM)
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-5)
    assert result.context == "windows of 50"


def test_half_precision_is_summed_in_float32() -> None:
    model = build_byte_model()
    full = measure_bits_per_byte(model, STREAM).bits_per_byte
    half = measure_bits_per_byte(model.bfloat16(), STREAM).bits_per_byte
    assert half == pytest.approx(full, rel=0.02)


def test_dropout_is_off_and_comes_back() -> None:
    model = build_byte_model(dropout=0.5)
    expected = measure_bits_per_byte(model, STREAM)
    model.train()
    model.model.norm.eval()
    assert measure_bits_per_byte(model, STREAM) == expected
    assert model.training
    assert model.model.block.training
    assert not model.model.norm.training


def test_progress_counts_bytes() -> None:
    for table, seen in ((None, [64, 128, 192, 198]), (20, [60, 120, 180, 198])):
        done: list[int] = []
        model = build_byte_model(max_position_embeddings=table)
        measure_bits_per_byte(model, STREAM, chunk_tokens=64, on_progress=done.append)
        assert done[-1] == len(DATA)
        assert sorted(done) == done
        assert set(seen) <= set(done)


@pytest.mark.parametrize("name", ["limit_bytes", "chunk_tokens"])
def test_numbers_below_1(name) -> None:
    with pytest.raises(InputError, match=f"{name} is 0"):
        measure_bits_per_byte(build_byte_model(), STREAM, **{name: 0})


def test_an_empty_stream() -> None:
    with pytest.raises(InputError, match="blank has no bytes"):
        measure_bits_per_byte(build_byte_model(), ByteStream.from_bytes(b"", name="blank"))


def test_token_by_token_is_one_pass() -> None:
    model = build_byte_model("sparsepointer").double()
    one_pass = measure_bits_per_byte(model, STREAM, limit_bytes=30)
    steps = measure_bits_per_byte(model, STREAM, limit_bytes=30, chunk_tokens=1)
    assert steps.bits_per_byte == pytest.approx(one_pass.bits_per_byte, abs=1e-9)
