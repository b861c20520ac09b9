"""What ``generate`` reads of its ids, beside a cache and with padding anywhere."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.models import build_model, draw_ids
from unimatrix import Decoder
from unimatrix.cache import UniMatrixCache
from unimatrix.errors import InputError

NUM_NEW = 4
GREEDY: dict[str, Any] = {"do_sample": False, "max_new_tokens": NUM_NEW, "eos_token_id": None}
# The compiled step, and transformers' own loop.
VARIANTS = ["selective+small", "assoc"]
variants = pytest.mark.parametrize("variant", VARIANTS)


def write(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Return the new tokens alone."""
    written: torch.Tensor = model.generate(ids, **(GREEDY | kwargs))
    return written[:, ids.shape[1] :]


def read(model: Any, ids: torch.Tensor, **kwargs: Any) -> UniMatrixCache:
    with torch.no_grad():
        cache = model(ids, use_cache=True, **kwargs).past_key_values
    assert isinstance(cache, UniMatrixCache)
    return cache


@variants
@pytest.mark.parametrize("num_read", [1, 9])
def test_a_cache_goes_on_with_new_tokens_alone_and_with_the_whole_text(variant, num_read) -> None:
    model, ids = build_model(variant), draw_ids(2, 10)
    expected = write(model, ids)
    cache = read(model, ids[:, :num_read])
    new = ids[:, num_read:]
    for options in (
        {},
        {"attention_mask": torch.ones_like(new)},
        {"attention_mask": torch.ones_like(ids)},
        {"continues": True},
        {"use_cache": False},
    ):
        assert torch.equal(write(model, new, past_key_values=cache, **options), expected), options
    for options in ({}, {"attention_mask": torch.ones_like(ids)}, {"continues": False}):
        assert torch.equal(write(model, ids, past_key_values=cache, **options), expected), options


def test_a_longer_new_text_is_no_whole_text() -> None:
    model, first, second = build_model("core"), draw_ids(2, 5), draw_ids(2, 9, seed=1)
    cache = read(model, first)
    expected = write(model, torch.cat([first, second], dim=1))
    assert torch.equal(write(model, second, past_key_values=cache), expected)
    # The same text once more, which begins as what was read.
    again = torch.cat([first, second], dim=1)
    expected = write(model, torch.cat([first, again], dim=1))
    assert torch.equal(write(model, again, past_key_values=cache, continues=True), expected)


@variants
def test_the_whole_text_of_a_left_padded_batch(variant) -> None:
    model, ids = build_model(variant), draw_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    expected = write(model, ids, attention_mask=mask)
    cache = read(model, ids[:, :9], attention_mask=mask[:, :9])
    arguments = {"attention_mask": mask, "past_key_values": cache}
    assert torch.equal(write(model, ids, **arguments), expected)
    # The same rows, padded otherwise.
    wide = torch.cat([ids.new_zeros(2, 3), ids], dim=1)
    wide_mask = torch.cat([mask.new_zeros(2, 3), mask], dim=1)
    arguments = {"attention_mask": wide_mask, "past_key_values": cache}
    assert torch.equal(write(model, wide, **arguments), expected)
    # New tokens, one fewer in a row.
    new, new_mask = ids[:, 9:].clone(), mask[:, 9:].clone()
    new_mask[1, 0] = 0
    arguments = {"attention_mask": new_mask, "past_key_values": cache}
    alone = write(model, torch.cat([ids[1:, :9], ids[1:, 10:]], dim=1))
    assert torch.equal(write(model, new, **arguments)[1:], alone)


def test_what_one_generate_returns_goes_into_the_next() -> None:
    model, ids = build_model("selective+small"), draw_ids(1, 7)
    first = model.generate(ids, return_dict_in_generate=True, **GREEDY)
    whole = torch.cat([first.sequences, draw_ids(1, 3, seed=4)], dim=1)
    expected = write(model, whole)
    assert torch.equal(write(model, whole, past_key_values=first.past_key_values), expected)
    # All but the last token were read.
    new = whole[:, first.sequences.shape[1] - 1 :]
    assert torch.equal(write(model, new, past_key_values=first.past_key_values), expected)


def test_a_stream_of_single_tokens_knows_its_text(tmp_path) -> None:
    model, ids = build_model("selective+small"), draw_ids(2, 12)
    decoder = Decoder(model, read(model, ids[:, :3]))
    for column in ids[:, 3:8].unbind(1):
        decoder.step(column)
    decoder.cache().save(tmp_path / "stream")
    cache = UniMatrixCache.load(tmp_path / "stream").select_rows(torch.tensor([1, 0]))
    assert torch.equal(write(model, ids.flip(0), past_key_values=cache), write(model, ids).flip(0))


def test_what_fits_neither_is_refused() -> None:
    model, ids = build_model("core"), draw_ids(2, 10)
    cache = read(model, ids[:, :6])
    with pytest.raises(InputError, match="at least one new token"):
        write(model, ids[:, :6], past_key_values=cache)
    mixed = ids.clone()
    mixed[1, 2] = 20
    with pytest.raises(InputError, match=r"rows \[0\] of input_ids begin .* rows \[1\] do not"):
        write(model, mixed, past_key_values=cache)
    with pytest.raises(InputError, match="row 1 of input_ids does not begin with the 6 tokens"):
        write(model, mixed, past_key_values=cache, continues=False)
    with pytest.raises(InputError, match="does not begin"):
        write(model, ids[:, :3], past_key_values=cache, continues=False)
    arguments = {"attention_mask": torch.ones_like(ids), "past_key_values": cache}
    with pytest.raises(InputError, match="by continues=False"):
        write(model, ids[:, 6:], continues=False, **arguments)
    with pytest.raises(InputError, match="2 rows"):
        write(model, draw_ids(3, 4), past_key_values=cache)
    with pytest.raises(InputError, match="does not say which text"):
        write(model, ids, past_key_values=replace(cache, text_hash=None))
    silent = replace(cache, text_hash=None)
    expected = write(model, ids)
    assert torch.equal(write(model, ids, past_key_values=silent, continues=False), expected)
    new = ids[:, 6:]
    assert torch.equal(write(model, new, past_key_values=silent, continues=True), expected)


@pytest.mark.parametrize("length", [3, 5, 9, 11, 13])
@pytest.mark.parametrize("fill", [0, 1])
def test_a_mask_that_fits_neither_ids_nor_cache_is_refused(length: int, fill: int) -> None:
    model, ids = build_model("core"), draw_ids(2, 10)
    mask = torch.ones(2, length, dtype=torch.int64)
    mask[0, 0] = fill
    cache = read(model, ids[:, :6])
    for past in (None, cache):
        with pytest.raises(InputError, match="attention_mask has shape"):
            model(ids[:, 6:], attention_mask=mask, past_key_values=past)
        with pytest.raises(InputError, match="attention_mask has shape"):
            write(model, ids[:, 6:], attention_mask=mask, past_key_values=past)


@pytest.mark.parametrize("name", ["labels", "shift_labels", "logits_at"])
@pytest.mark.parametrize("shape", [(2, 5), (2, 7), (1, 6), (12,)], ids=str)
def test_what_has_no_value_for_each_id_is_refused(name: str, shape: tuple[int, ...]) -> None:
    dtype = torch.bool if name == "logits_at" else torch.int64
    with pytest.raises(InputError, match=rf"{name} has shape .*; pass \[2, 6\]"):
        build_model("core")(draw_ids(2, 6), **{name: torch.ones(shape, dtype=dtype)})


@variants
@pytest.mark.parametrize(
    "options", [{}, {"use_cache": False}, {"num_beams": 2}, {"prefill_chunk_size": 3}], ids=str
)
def test_right_padded_rows_go_on_from_their_last_token(variant, options) -> None:
    model, ids = build_model(variant), draw_ids(3, 9)
    mask = torch.ones_like(ids)
    mask[0, 6:], mask[2, 1:] = 0, 0
    padded = ids.masked_fill(mask == 0, 0)
    together = write(model, padded, attention_mask=mask, **options)
    inferred = write(model, padded, **options)
    for row, length in enumerate((6, 9, 1)):
        alone = write(model, ids[row : row + 1, :length], **options)
        assert torch.equal(together[row], alone[0])
        assert torch.equal(inferred[row], alone[0])


def test_a_row_without_a_token_is_refused() -> None:
    model, ids = build_model("core"), draw_ids(2, 4)
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    with pytest.raises(InputError, match=r"rows \[1\] of input_ids hold no token"):
        write(model, ids, attention_mask=mask)


@variants
@pytest.mark.parametrize("size", [4, 100])
def test_a_prompt_read_in_parts(variant, size) -> None:
    model, ids = build_model(variant), draw_ids(2, 10)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    for options in ({}, {"num_beams": 2}, {"past_key_values": read(model, ids[:, :2])}):
        expected = write(model, ids, attention_mask=mask, continues=True, **options)
        options |= {"prefill_chunk_size": size, "continues": True}
        assert torch.equal(write(model, ids, attention_mask=mask, **options), expected)
    with pytest.raises(InputError, match=f"prefill_chunk_size is {size} and use_cache False"):
        write(model, ids, prefill_chunk_size=size, use_cache=False)


@variants
@pytest.mark.parametrize(
    "options", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 2}], ids=str
)
def test_rows_of_a_cache_are_repeated_with_those_of_the_ids(variant, options) -> None:
    model, ids = build_model(variant), draw_ids(2, 9)
    cache = read(model, ids[:, :5])
    found = []
    for arguments in ({"inputs": ids}, {"inputs": ids[:, 5:], "past_key_values": cache}):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            found.append(model.generate(**(GREEDY | options | arguments))[:, -NUM_NEW:])
    assert torch.equal(*found)
    assert cache.batch_size == 2


@variants
def test_a_generator_of_the_callers_own(variant) -> None:
    model, ids = build_model(variant), draw_ids(2, 6)
    wanted = {"return_dict_in_generate": True, "output_scores": True}
    arguments = GREEDY | wanted | {"do_sample": True, "top_k": 5}

    def sample(seed: int) -> Any:
        return model.generate(ids, generator=torch.Generator().manual_seed(seed), **arguments)

    before = torch.get_rng_state()
    first, again, other = sample(1), sample(1), sample(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.sequences, again.sequences)
    assert not torch.equal(first.sequences, other.sequences)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        expected = model.generate(ids, **arguments)
    assert torch.equal(first.sequences, expected.sequences)
    assert all(torch.equal(*both) for both in zip(first.scores, expected.scores, strict=True))
    with pytest.raises(InputError, match="num_beams is 2"):
        model.generate(ids, generator=torch.Generator(), num_beams=2, **arguments)


@variants
def test_ids_of_32_bits(variant) -> None:
    model, ids = build_model(variant), draw_ids(2, 7)
    assert torch.equal(model(ids.int()).logits, model(ids).logits)
    assert torch.equal(write(model, ids.int()), write(model, ids))
    cache = read(model, ids[:, :4].int())
    assert torch.equal(write(model, ids.int(), past_key_values=cache), write(model, ids))


def test_attentions_are_refused() -> None:
    model, ids = build_model("core"), draw_ids(1, 4)
    for options in ({}, {"num_beams": 2}):
        with pytest.raises(InputError, match="output_attentions is True and nothing here"):
            write(model, ids, output_attentions=True, return_dict_in_generate=True, **options)
