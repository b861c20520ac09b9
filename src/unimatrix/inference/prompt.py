"""The prompt of ``generate``: which tokens a cache has not read, and how they are read."""

from typing import Any

import torch
from torch import Tensor

from unimatrix.cache import UniMatrixCache
from unimatrix.errors import InputError
from unimatrix.nn.padding import Padding, cut_mask, find_padding
from unimatrix.ops.text_hash import START, hash_text


def choose_new_tokens(
    input_ids: Tensor, attention_mask: Tensor | None, cache: UniMatrixCache, continues: bool | None
) -> tuple[Tensor, Tensor | None]:
    """Return the columns of ``input_ids`` that the cache has not read, and their mask.

    Args:
        input_ids: [B, T] int64: new tokens alone, or the whole text.
        attention_mask: [B, T], or [B, past + T] with new tokens alone; ``None`` is no padding.
        cache: of B rows.
        continues: ``True`` if they are new tokens alone, ``False`` if they are the whole text;
            ``None`` lets the hash of what the cache has read decide.

    Returns:
        [B, T'] ids and [B, T'] mask; ``None`` where all are real.

    Raises:
        InputError: if mask, ids and cache do not fit each other, ``continues`` is wrong or missing
            where the cache has no hash, or the whole text holds nothing new.
    """
    padding = find_padding(attention_mask, input_ids, cache.num_columns)
    if attention_mask is not None and attention_mask.shape[1] != input_ids.shape[1]:
        if continues is False:
            raise InputError(
                f"attention_mask covers {attention_mask.shape[1]} columns and input_ids, the whole "
                f"text by continues=False, has {input_ids.shape[1]}; pass one value per token"
            )
        continues = True
    if continues is None:
        continues = not _is_whole_text(input_ids, padding, cache)
    elif not continues and cache.text_hash is not None:
        begins = _begins_with_read(input_ids, padding, cache)
        if not bool(begins.all()):
            row = int((~begins).nonzero()[0])
            raise InputError(
                f"continues=False, and row {row} of input_ids does not begin with the "
                f"{int(cache.num_tokens[row])} tokens that the cache has read; pass the whole "
                "text, or continues=True if these are new tokens"
            )
    mask = None if padding is None else padding.mask
    return (input_ids, mask) if continues else _cut_read(input_ids, mask, cache)


def _is_whole_text(input_ids: Tensor, padding: Padding | None, cache: UniMatrixCache) -> bool:
    """Return whether every row begins with what the cache has read; raise if only some do."""
    if cache.text_hash is None:
        raise InputError(
            "this cache does not say which text it has read; pass continues=True to generate if "
            "input_ids are new tokens alone, continues=False if they are the whole text"
        )
    has_read = cache.num_tokens > 0
    begins = _begins_with_read(input_ids, padding, cache)
    if not bool((begins & has_read).any()):
        return False
    if not bool((begins | ~has_read).all()):
        raise InputError(
            f"rows {begins.nonzero().flatten().tolist()} of input_ids begin with what the cache "
            f"has read and rows {(~begins).nonzero().flatten().tolist()} do not; pass whole texts, "
            "or continues=True to generate if all are new tokens"
        )
    return True


def _begins_with_read(input_ids: Tensor, padding: Padding | None, cache: UniMatrixCache) -> Tensor:
    """Return for each row [B] whether its first real tokens are those that the cache has read."""
    assert cache.text_hash is not None
    packed = input_ids if padding is None else padding.pack(input_ids)
    num_real: Tensor | int = input_ids.shape[1] if padding is None else padding.lengths
    fits = cache.num_tokens <= num_real
    lengths = torch.where(fits, cache.num_tokens, 0)
    start = torch.full_like(lengths, START)
    return fits & (hash_text(packed.long(), lengths, start) == cache.text_hash)


def _cut_read(
    input_ids: Tensor, mask: Tensor | None, cache: UniMatrixCache
) -> tuple[Tensor, Tensor | None]:
    """Return the columns of a whole text from the first that holds a new token."""
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask
    is_new = real & (real.cumsum(dim=1) > cache.num_tokens.unsqueeze(1))
    if not bool(is_new.any(dim=1).all()):
        row = int((~is_new.any(dim=1)).nonzero()[0])
        raise InputError(
            f"the cache has read all {int(real[row].sum())} tokens of row {row} of input_ids; pass "
            "the whole text with at least one new token, or new tokens alone with continues=True"
        )
    first = int(is_new.any(dim=0).nonzero()[0])
    is_new = is_new[:, first:]
    return input_ids[:, first:], None if bool(is_new.all()) else is_new


def prepare_prompt(
    model: Any, input_ids: Tensor, generation_config: Any, model_kwargs: dict[str, Any]
) -> dict[str, Any]:
    """Return the arguments of the forward pass that reads the prompt.

    ``model`` is a ``UniMatrixForCausalLM``; the other arguments are as ``generate`` has prepared
    them.

    Raises:
        InputError: as ``prepare_inputs_for_generation``, or for options that exclude each other.
    """
    if generation_config.output_attentions and generation_config.return_dict_in_generate:
        raise InputError("output_attentions is True and nothing here is attention; leave it out")
    beams = (generation_config.num_beams or 1) > 1
    if beams and generation_config.do_sample and model_kwargs.get("generator") is not None:
        raise InputError(
            f"num_beams is {generation_config.num_beams}, and beams are sampled from the global "
            "generator alone; leave out generator, or beams"
        )
    # `generate` drops a mask of ones and keeps its length.
    length = vars(generation_config).get("_mask_length", input_ids.shape[1])
    if model_kwargs.get("attention_mask") is None and length != input_ids.shape[1]:
        mask = input_ids.new_ones(input_ids.shape[0], length)
        model_kwargs = model_kwargs | {"attention_mask": mask}
    prepared: dict[str, Any] = model.prepare_inputs_for_generation(input_ids, **model_kwargs)
    return prepared


def read_prompt(model: Any, inputs: dict[str, Any], chunk_tokens: int | None) -> Any:
    """Return what ``forward`` returns after the prompt.

    Args:
        model: a ``UniMatrixForCausalLM``.
        inputs: as ``prepare_prompt`` returns them.
        chunk_tokens: columns of one forward pass; ``None`` is all.

    Raises:
        InputError: if ``chunk_tokens`` is below 1, or is set without a cache.
    """
    if chunk_tokens is None:
        return model(**inputs, return_dict=True)
    if chunk_tokens < 1 or not inputs["use_cache"]:
        raise InputError(
            f"prefill_chunk_size is {chunk_tokens} and use_cache {inputs['use_cache']}; pass at "
            "least 1, with use_cache=True"
        )
    ids, mask, cache = (inputs[n] for n in ("input_ids", "attention_mask", "past_key_values"))
    output = None
    for first in range(0, ids.shape[1], chunk_tokens):
        columns = slice(first, first + chunk_tokens)
        part = {
            "input_ids": ids[:, columns].contiguous(),
            "attention_mask": None if mask is None else cut_mask(mask, ids, 0)[:, columns],
            "past_key_values": cache,
        }
        output = model(**(inputs | part), gives_up_cache=first > 0, return_dict=True)
        cache = output.past_key_values
    return output
