"""The compiled step of the indexed attention: scratch keys against those that the modules make."""

from typing import Any

import pytest
import torch

from tests.byte_models import build_byte_model
from tests.models import build_model, draw_ids
from tests.tolerances import error, limit
from unimatrix import Decoder, UniMatrixForCausalLM
from unimatrix.kernels.plan import explain_plan
from unimatrix.kernels.step.explain import explain_step
from unimatrix.ops.indexed_attention import REACH

WINDOW = 130  # no whole number of the blocks that keys lie in
TEXT = (
    b"The code of harkov is 5202798. Nothing else was said that day, and the rain went on; the "
    b"number of selim is 1148. He walked down to the harbour and saw no ship.\n"
    b"Question: which number belongs to harkov? Answer: 5202798. And to selim? Answer: 1148. "
)

units = pytest.mark.parametrize("units", ["words", "tokens"])
types = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def build(dtype: torch.dtype = torch.float64, **changes: Any) -> UniMatrixForCausalLM:
    """Return a small model of bytes, its weights far from their start."""
    options = {"associative_memory": "indexed", "automaton_window": WINDOW, "index_head_dim": 4}
    model = build_byte_model("unimatrix", **(options | {"num_hidden_layers": 3} | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
        boundary = model.model.block.indexed_attention.boundary
        if boundary is not None:  # else next to nothing is one
            boundary[:, -1] += 3
    return model.to(dtype)


def encode(text: bytes) -> torch.Tensor:
    return torch.tensor([list(text)])


def step_through(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, T, V] of token after token."""
    return torch.stack([decoder.step(column) for column in ids.unbind(1)], dim=1)


@torch.no_grad()
def assert_steps(model: UniMatrixForCausalLM, ids: torch.Tensor) -> None:
    """Step through new streams, and expect the logits of one pass."""
    found = step_through(Decoder(model, batch_size=len(ids)), ids)
    assert error(found, model(ids).logits) <= limit("model", model.dtype, "value")


@types
@units
def test_streams_of_several_windows(units: str, dtype: torch.dtype) -> None:
    """Keys near the old end of the window never see whether older tokens are still there."""
    model, ids = build(dtype, index_units=units), encode(TEXT * 3)
    assert ids.shape[1] > 5 * WINDOW
    assert_steps(model, torch.cat([ids, ids.roll(40, dims=1)]))


@pytest.mark.parametrize(
    "fields",
    [
        {"index_heads": 3, "index_head_dim": 5},
        {"index_reads_at": 0, "index_heads": 1},
        {"index_reads_at": 2, "depth_step_embedding": True, "automaton_window": 128},
        {"index_boundaries": False},
        {"pointer": False},
        {"pointer": False, "automaton_pointer": False, "residual_path": "none"},
        {"residual_path": "previous_token", "automaton_pointer": False, "modulation_size": 3},
        {"update_rules": "none", "hidden_size": 21, "automaton_window": 4096},
        {"norm_type": "layer_norm", "feed_forward_type": "gelu", "tie_word_embeddings": False},
    ],
)
def test_options(fields: dict[str, Any]) -> None:
    assert_steps(build(**fields), encode(TEXT + TEXT[30:]))


@types
@units
@torch.no_grad()
def test_rows_of_other_lengths_go_on_from_a_cache_and_back(units: str, dtype: torch.dtype) -> None:
    model = build(dtype, index_units=units)
    texts = [TEXT * 2, TEXT[40:] + TEXT, TEXT[:100], b""]
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + list(text) for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
    following = encode(TEXT[48:248]).expand(len(texts), -1)
    expected = model(following, past_key_values=cache, use_cache=True)
    decoder = Decoder(model, cache)
    found = step_through(decoder, following)
    assert error(found, expected.logits) <= limit("model", dtype, "value")
    after = encode(b" harkov is").expand(len(texts), -1)
    caches = (decoder.cache(), expected.past_key_values)
    ours, theirs = (model(after, past_key_values=cache).logits for cache in caches)
    assert error(ours, theirs) <= limit("model", dtype, "value")


@types
def test_keys_made_anew_are_the_same_bits(dtype: torch.dtype) -> None:
    """Wherever the streams stop: with keys that wait for tokens, before and after the ring ends."""
    model, ids = build(dtype), torch.cat([encode(TEXT[:200]), encode(TEXT[48:248])])
    stops = {1, REACH - 1, REACH, 2 * REACH, WINDOW - 1, WINDOW, WINDOW + REACH, 190}
    decoder, resumed = Decoder(model, batch_size=2), []
    for t, column in enumerate(ids.unbind(1)):
        if t in stops:
            resumed.append(Decoder(model, decoder.cache()))
        logits = decoder.step(column)
        for other in resumed:
            assert torch.equal(other.step(column), logits), t


@torch.no_grad()
def test_scratch_is_not_carried() -> None:
    model, ids = build(torch.float32), encode(TEXT)
    decoder, carried = Decoder(model), model(ids, use_cache=True).past_key_values.num_bytes()
    step_through(decoder, ids)
    assert decoder.num_bytes() == decoder.cache().num_bytes() == carried
    columns = WINDOW + -WINDOW % 16
    of_units = 8 * (2 * 4 * 4 + 8)
    assert decoder.scratch_bytes() == columns * 2 * 4 * 4 + WINDOW + of_units
    assert Decoder(build_model("core")).scratch_bytes() == 0


def test_what_stands_against_the_compiled_step() -> None:
    model = build()
    assert explain_plan(model, 1) == {}
    mixer = model.model.block.indexed_attention
    handle = mixer.register_forward_hook(lambda *_: None)
    assert explain_step(model) == "model.block.indexed_attention has a hook"
    handle.remove()
    model.set_backend({"indexed_attention": "reference"})
    reason = "the back end of model.block.indexed_attention is 'reference'"
    assert explain_step(model) == reason
    model.set_backend("auto")
    mixer.key_conv.data = mixer.key_conv.data[..., 1:]
    reason = "model.block.indexed_attention.key_conv is not as the model was built"
    assert explain_step(model) == reason


@torch.no_grad()
def test_generate_decodes_with_the_compiled_step() -> None:
    model, ids = build(), encode(TEXT)
    arguments = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 30, "do_sample": False}
    expected = ids
    for _ in range(30):
        expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(model.generate(ids, eos_token_id=None, **arguments), expected)


def test_a_resized_vocabulary() -> None:
    model = build_model("unimatrix")
    model.resize_token_embeddings(40_000)
    assert_steps(model, draw_ids(2, 60, seed=3) * 3000)
