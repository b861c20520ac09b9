import math

import numpy as np
import pytest
import torch

from tests.byte_models import build_byte_model
from unimatrix.baselines.peers import PEERS
from unimatrix.configuration import UniMatrixConfig
from unimatrix.data import ByteStream
from unimatrix.errors import InputError
from unimatrix.evaluation import footprint
from unimatrix.evaluation.bits_per_byte import measure_bits_per_byte
from unimatrix.evaluation.byte_costs import measure_byte_costs
from unimatrix.evaluation.footprint import measure_carried_bytes
from unimatrix.inference import streams
from unimatrix.tokenization import BOS_ID

DATA = bytes(np.random.default_rng(0).integers(97, 123, 150, dtype=np.uint8)) + b"abc" * 16
STREAM = ByteStream.from_bytes(DATA, name="text")
SIZE = {"hidden_size": 32, "num_attention_heads": 2, "num_hidden_layers": 3, "dropout": 0.0}
WITH_STATE = ("mamba2", "rwkv", "gated-linear-attention", "gated-deltanet")
WINDOWED = ("llama", "gelu-transformer", "universal-transformer")


def build_peer(name: str):
    torch.manual_seed(0)
    return PEERS[name].build(UniMatrixConfig(**SIZE), max_tokens=20).eval()


def cost(model, context: bytes, data: bytes) -> list[float]:
    """Return the nats of ``data`` after BOS and ``context``, straight from the definition."""
    text = context + data
    ids = torch.tensor([[BOS_ID, *text[:-1]]])
    with torch.no_grad():
        log_probabilities = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)[0]
    return [-float(log_probabilities[t, text[t]]) for t in range(len(context), len(text))]


@pytest.mark.parametrize("name", WITH_STATE)
@pytest.mark.parametrize("chunk_tokens", [7, 64, 2048])
def test_models_with_state_read_on(name, chunk_tokens, monkeypatch) -> None:
    monkeypatch.setattr(streams, "CHUNK_TOKENS", chunk_tokens)
    model = build_peer(name)
    found = measure_byte_costs(model, STREAM, window_tokens=20)
    assert found.context == "carried"
    assert found.nats == pytest.approx(cost(model, b"", DATA), abs=2e-5)


@pytest.mark.parametrize("name", [*WITH_STATE, "unimatrix"])
@pytest.mark.parametrize("prime_bytes", [1, 7, 60])
def test_what_is_read_first_is_context(name, prime_bytes, monkeypatch) -> None:
    monkeypatch.setattr(streams, "CHUNK_TOKENS", 7)
    model = build_byte_model("unimatrix") if name == "unimatrix" else build_peer(name)
    first = DATA[60 : 60 + prime_bytes]
    prime = ByteStream.from_bytes(first, name="first")
    found = measure_byte_costs(model, STREAM, window_tokens=20, limit_bytes=30, prime=prime)
    assert found.context == f"carried, after {prime_bytes} bytes"
    assert found.nats == pytest.approx(cost(model, first, DATA[:30]), abs=2e-5)


@pytest.mark.parametrize("name", WINDOWED)
def test_windows_have_nothing_before_them(name) -> None:
    with pytest.raises(InputError, match="reads windows and nothing before them"):
        measure_byte_costs(build_peer(name), STREAM, window_tokens=20, prime=STREAM)
    with pytest.raises(InputError, match="reads windows and nothing before them"):
        measure_carried_bytes(build_peer(name), STREAM, 20, STREAM)


@pytest.mark.parametrize("name", WINDOWED)
@pytest.mark.parametrize("num_bytes", [1, 10, 20, 21, 30, 31, 45, len(DATA)])
def test_transformers_read_half_overlapping_windows(name, num_bytes) -> None:
    model, data = build_peer(name), DATA[:num_bytes]
    expected = cost(model, b"", data[:20])
    for start in range(10, num_bytes - 10, 10):
        expected += cost(model, data[start : start + 10], data[start + 10 : start + 20])
    found = measure_byte_costs(model, STREAM, window_tokens=20, limit_bytes=num_bytes)
    assert found.context == "windows of 20, half overlapping"
    assert found.nats == pytest.approx(expected, abs=2e-5)
    assert found.bits_per_byte == pytest.approx(np.mean(expected) / math.log(2), rel=1e-5)


def test_ours_is_what_eval_measures() -> None:
    model = build_byte_model("unimatrix")
    model.train()
    found = measure_byte_costs(model, STREAM, window_tokens=20)
    expected = measure_bits_per_byte(model, STREAM)
    assert found.bits_per_byte == pytest.approx(expected.bits_per_byte, rel=1e-6)
    assert found.context == expected.context
    assert model.training


def test_ours_with_a_table_reads_windows() -> None:
    model = build_byte_model(max_position_embeddings=20)
    found = measure_byte_costs(model, STREAM, window_tokens=20, limit_bytes=30)
    assert found.nats[20:] == pytest.approx(cost(model, DATA[10:20], DATA[20:30]), abs=2e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_tokens": 21}, "window_tokens is 21; it must be even"),
        ({"window_tokens": 20, "limit_bytes": 0}, "limit_bytes is 0"),
    ],
)
def test_unusable_numbers(options, message) -> None:
    with pytest.raises(InputError, match=message):
        measure_byte_costs(build_byte_model(), STREAM, **options)


def test_an_empty_stream() -> None:
    empty = ByteStream.from_bytes(b"", name="blank")
    with pytest.raises(InputError, match="blank has no bytes"):
        measure_byte_costs(build_byte_model(), empty, window_tokens=20)


@pytest.mark.parametrize("name", ["llama", "gelu-transformer"])
@pytest.mark.parametrize("num_tokens", [5, 20])
def test_keys_and_values_are_those_of_the_cache(name, num_tokens) -> None:
    model = build_peer(name)
    cache = model(input_ids=torch.zeros(1, num_tokens, dtype=torch.int64), use_cache=True)
    layers = cache.past_key_values.layers
    tensors = [x for layer in layers for x in (layer.keys, layer.values)]
    expected = sum(x.numel() * x.element_size() for x in tensors)
    assert measure_carried_bytes(model, STREAM, num_tokens) == expected


def test_a_universal_transformer_keeps_keys_for_every_depth_step() -> None:
    deep, wide = build_peer("universal-transformer"), build_peer("llama")
    sizes = [measure_carried_bytes(model, STREAM, 1024) for model in (deep, wide)]
    assert sizes[0] == sizes[1]
    # A position table ends the growth.
    table = build_peer("gelu-transformer")
    assert measure_carried_bytes(table, STREAM, 1024) == measure_carried_bytes(table, STREAM, 20)


@pytest.mark.parametrize("name", WITH_STATE)
def test_states_are_constant_and_counted(name) -> None:
    model, floats = build_peer(name), 4
    expected = {
        # A convolution of 4 over 64 + 2 x 16 channels, and 4 heads of 16 x 16.
        "mamba2": 3 * floats * (4 * (64 + 2 * 16) + 4 * 16 * 16),
        "rwkv": 5 * floats * 32 * 3,
        "gated-linear-attention": 3 * floats * 2 * 8 * 16,
        "gated-deltanet": 3 * floats * (2 * 12 * 24 + 3 * 2 * (12 + 12 + 24)),
    }[name]
    assert measure_carried_bytes(model, STREAM, 2) == expected
    assert measure_carried_bytes(model, STREAM, 65_536) == expected


def test_an_automaton_grows_with_the_text(monkeypatch) -> None:
    monkeypatch.setattr(footprint, "CHUNK_TOKENS", 64)
    model = build_byte_model("selective", automaton_window=None)
    ids, cache = torch.tensor([[BOS_ID, *DATA[:149]]]), None
    with torch.no_grad():
        for piece in ids.split(64, dim=1):
            cache = model(input_ids=piece, past_key_values=cache, use_cache=True).past_key_values
    found = measure_carried_bytes(model, STREAM, 150)
    assert found == cache.num_bytes()
    assert measure_carried_bytes(model, STREAM, 1000) > found
    first = ByteStream.from_bytes(DATA[:100], name="first")
    with torch.no_grad():
        ids = torch.tensor([[BOS_ID, *DATA[:100], *DATA[:49]]])
        cache = model(input_ids=ids, use_cache=True).past_key_values
    # Token 0 of the 50 is the last of those read first. What is allocated depends on the chunks.
    primed = measure_carried_bytes(model, STREAM, 50, first)
    assert cache.num_bytes() / 2 < primed < 2 * cache.num_bytes()
    assert primed > measure_carried_bytes(model, STREAM, 50)
    bounded = build_byte_model("selective", automaton_window=64)
    sizes = {measure_carried_bytes(bounded, STREAM, n) for n in (150, 1000)}
    assert max(sizes) <= 2 * min(sizes)
