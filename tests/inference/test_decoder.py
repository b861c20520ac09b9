"""The compiled step against the model's forward pass."""

from typing import Any

import pytest
import torch

from tests.models import VARIANTS, build_model, draw_ids
from tests.tolerances import error, limit
from unimatrix import Decoder
from unimatrix.cache import UniMatrixCache
from unimatrix.errors import InputError
from unimatrix.kernels.step.explain import explain_config

SUPPORTED = [name for name in VARIANTS if explain_config(build_model(name).config) is None]
TYPES = [torch.float64, torch.float32]

variants = pytest.mark.parametrize("variant", SUPPORTED)
types = pytest.mark.parametrize("dtype", TYPES, ids=["float64", "float32"])


def read(model: Any, ids: torch.Tensor, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(ids, use_cache=True, **kwargs)


def step_through(decoder: Decoder, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits [B, T, V] of token after token."""
    return torch.stack([decoder.step(column) for column in ids.unbind(1)], dim=1)


def assert_same_streams(
    actual: UniMatrixCache, expected: UniMatrixCache, dtype: torch.dtype
) -> None:
    ours, theirs = actual.tensors(), expected.tensors()
    assert (actual.num_columns, ours.keys()) == (expected.num_columns, theirs.keys())
    for name, tensor in theirs.items():
        if name.startswith("automaton") and "counters" not in name:
            continue  # capacities may differ; what they answer is compared
        assert ours[name].dtype == tensor.dtype, name
        if tensor.is_floating_point():
            assert error(ours[name], tensor) <= limit("model", dtype, "value"), name
        else:
            assert torch.equal(ours[name], tensor), name


def test_what_has_no_compiled_step() -> None:
    """The memory that grows, and the options that no preset uses."""
    without = ("assoc", "two-hops")
    assert [name for name in VARIANTS if name not in SUPPORTED] == [
        name for name in VARIANTS if any(part in name for part in without)
    ]


@types
@variants
@pytest.mark.parametrize("batch", [1, 3])
def test_steps_after_a_padded_prompt(variant: str, dtype: torch.dtype, batch: int) -> None:
    """Token by token the same logits, and in the end the same cache."""
    model = build_model(variant, dtype=dtype)
    ids = draw_ids(batch, 44, seed=1)
    mask = torch.ones(batch, 20, dtype=torch.int64)
    for row, padding in enumerate([7, 19, 0][:batch]):
        mask[row, :padding] = 0
    prompt = read(model, ids[:, :20], attention_mask=mask)
    decoder = Decoder(model, prompt.past_key_values)
    cache, expected = prompt.past_key_values, []
    for column in ids[:, 20:].split(1, dim=1):
        output = read(model, column, past_key_values=cache)
        cache = output.past_key_values
        expected.append(output.logits)
    found = step_through(decoder, ids[:, 20:])
    assert found.dtype == dtype
    assert error(found, torch.cat(expected, dim=1)) <= limit("model", dtype, "value")
    assert_same_streams(decoder.cache(), cache, dtype)
    following = draw_ids(batch, 9, seed=2)
    after = read(model, following, past_key_values=decoder.cache()).logits
    assert error(after, read(model, following, past_key_values=cache).logits) <= limit(
        "model", dtype, "value"
    )


@types
@variants
def test_long_streams(variant: str, dtype: torch.dtype) -> None:
    """Hundreds of tokens: slots are displaced, windows pass, the automaton outgrows its room."""
    model = build_model(variant, dtype=dtype)
    num_tokens = model.config.max_position_embeddings or 330
    ids = draw_ids(1, num_tokens, seed=4)
    found = step_through(Decoder(model), ids)
    assert error(found, read(model, ids).logits) <= limit("model", dtype, "value")


@pytest.mark.parametrize(
    "fields",
    [
        {"tie_word_embeddings": False},
        {"update_rules": "none"},
        {"num_hidden_layers": 1, "norm_guard": True},
        {"residual_path": "previous_token", "depth_step_embedding": True, "modulation_size": 5},
        {"feed_forward_type": "swiglu", "norm_type": "rms_norm", "hidden_size": 21},
        {"normalized_keys": True, "update_rules": "mixed", "head_dim": 9},
    ],
)
def test_options_of_any_preset(fields: dict[str, Any]) -> None:
    sizes = {"slot_key_size": fields.get("hidden_size", 12)}
    for preset in ("core", "sparsepointer"):
        model = build_model(preset, **(sizes | fields))
        ids = draw_ids(2, 40, seed=5)
        found = step_through(Decoder(model, batch_size=2), ids)
        assert error(found, read(model, ids).logits) <= limit("model", torch.float64, "value")


@pytest.mark.parametrize("num_slots", [2, 64])
@pytest.mark.parametrize("gate", [True, False])
def test_slots_that_are_few_or_never_full(num_slots: int, gate: bool) -> None:
    model = build_model("sparsepointer", num_slots=num_slots, write_gate=gate, slots_per_read=3)
    ids = draw_ids(2, 60, seed=6)
    found = step_through(Decoder(model, batch_size=2), ids)
    assert error(found, read(model, ids).logits) <= limit("model", torch.float64, "value")


@types
@variants
def test_a_cache_goes_through_bit_for_bit(variant: str, dtype: torch.dtype) -> None:
    model = build_model(variant, dtype=dtype)
    ids = draw_ids(3, 30, seed=3)
    mask = torch.ones_like(ids)
    mask[1, :11] = 0
    cache = read(model, ids, attention_mask=mask).past_key_values
    decoder = Decoder(model, cache)
    returned = decoder.cache()
    assert (returned.num_columns, returned.config_digest) == (30, cache.config_digest)
    before = {name: tensor.clone() for name, tensor in cache.tensors().items()}
    for ours in (returned.tensors(), cache.tensors()):
        assert ours.keys() == before.keys()
        for name, tensor in before.items():
            assert ours[name].dtype == tensor.dtype, name
            assert torch.equal(ours[name], tensor), name
        # What was handed in and out stays as it is while the streams go on.
        decoder.step(ids[:, 0])


@variants
def test_a_new_stream_is_resumed_from_a_file(variant: str, tmp_path) -> None:
    model = build_model(variant)
    ids = draw_ids(2, 30, seed=7)
    decoder = Decoder(model, batch_size=2)
    step_through(decoder, ids[:, :18])
    decoder.cache().save(tmp_path / "stream")
    resumed = Decoder(model, UniMatrixCache.load(tmp_path / "stream"))
    found = step_through(resumed, ids[:, 18:])
    assert torch.equal(found, step_through(decoder, ids[:, 18:]))
    assert error(found, read(model, ids).logits[:, 18:]) <= limit("model", torch.float64, "value")


@variants
def test_streams_carry_constant_bytes(variant: str) -> None:
    model = build_model(variant)
    decoder = Decoder(model, batch_size=2)
    ids = draw_ids(2, 70, seed=8)
    sizes = []
    for column in ids.unbind(1):
        decoder.step(column)
        sizes.append(decoder.num_bytes())
    config = model.config
    grows = config.residual_path == "suffix_automaton" and config.automaton_window is None
    assert (len(set(sizes)) > 1) == grows
    assert decoder.batch_size == 2


def test_a_decoder_keeps_the_weights_it_was_made_with() -> None:
    model, ids = build_model("core"), draw_ids(1, 6)
    decoder, expected = Decoder(model), read(model, ids).logits
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    assert error(step_through(decoder, ids), expected) <= limit("model", torch.float64, "value")


def test_unusable_tokens_change_nothing() -> None:
    model = build_model("selective+small")
    decoder = Decoder(model, batch_size=2)
    ids = draw_ids(2, 9)
    for column in ids[:, :8].unbind(1):
        decoder.step(column)
        for wrong, sentence in (
            (torch.tensor([1]), r"shape \[1\]"),
            (torch.tensor([1, 2], dtype=torch.int16), "type torch.int16"),
            (torch.tensor([1, 23]), r"ids in 0..22"),
            (torch.tensor([-1, 2]), r"holds \[-1, 2\]"),
        ):
            with pytest.raises(InputError, match=sentence):
                decoder.step(wrong)
    found = decoder.step(ids[:, 8].int())
    assert error(found, read(model, ids).logits[:, -1]) <= limit("model", torch.float64, "value")


def test_the_position_table_bounds_a_stream() -> None:
    model = build_model("core", max_position_embeddings=6)
    decoder = Decoder(model, read(model, draw_ids(2, 4)).past_key_values)
    decoder.step(torch.tensor([3, 4]))
    decoder.step(torch.tensor([3, 4]))
    with pytest.raises(InputError, match="reaches 7 tokens and the position table has 6"):
        decoder.step(torch.tensor([3, 4]))


def test_unusable_models_and_caches() -> None:
    with pytest.raises(InputError, match="no compiled step: associative_memory is 'dense'"):
        Decoder(build_model("assoc"))
    cache = read(build_model("core"), draw_ids(1, 4)).past_key_values
    with pytest.raises(InputError, match="another configuration"):
        Decoder(build_model("rosa"), cache)


@pytest.mark.parametrize("end_ids", [(), (5,), (3, 4, 5, 6, 7)])
@pytest.mark.parametrize("variant", ["core", "selective", "sparsepointer+hidden"])
def test_written_tokens_are_those_of_single_steps(variant: str, end_ids: tuple[int, ...]) -> None:
    model = build_model(variant)
    prompt = draw_ids(3, 20, seed=2)
    cache = read(model, prompt).past_key_values
    stepping, writing = Decoder(model, cache), Decoder(model, cache)
    last, expected = prompt[:, -1], []
    ended = torch.tensor([False, True, False])
    for _ in range(30):
        last = stepping.step(last).argmax(dim=-1)
        if end_ids:
            last = torch.where(ended, 9, last)
            ended = ended | torch.isin(last, torch.tensor(end_ids))
        expected.append(last)
        if end_ids and ended.all():
            break
    first_ended = torch.tensor([False, True, False]).numpy() if end_ids else None
    written = writing.write(prompt[:, -1], 30, end_ids=end_ids, pad_id=9, ended=first_ended)
    assert torch.equal(written, torch.stack(expected, dim=1))
    assert_same_streams(writing.cache(), stepping.cache(), torch.float64)


def test_writing_stops_at_the_position_table() -> None:
    decoder = Decoder(build_model("core", max_position_embeddings=6))
    with pytest.raises(InputError, match="reaches 7 tokens"):
        decoder.write(torch.tensor([3]), 20)
