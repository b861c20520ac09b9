"""Continuing a prompt byte by byte: any bytes in, any bytes out."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from unimatrix.cache import UniMatrixCache
from unimatrix.data import ByteStream
from unimatrix.errors import InputError
from unimatrix.inference.sampling import DEFAULT_NEW_BYTES, DEFAULT_SAMPLING, Sampling
from unimatrix.inference.streams import read_first, require_state
from unimatrix.inference.suspend_training import suspend_training
from unimatrix.modeling import UniMatrixForCausalLM
from unimatrix.tokenization import BOS_ID, EOS_ID, NUM_BYTES, PAD_ID, decode_bytes, encode_bytes

PREFILL_TOKENS = 2048
"""Prompt tokens read in one forward pass."""
_SMALL_PARAMETERS = 5_000_000
_LOCK = threading.Lock()
# The number of threads before any limit, once for each call that has limited it.
_limited: list[int] = []


@dataclass(frozen=True, kw_only=True, slots=True)
class Continuation:
    """What a model wrote."""

    data: bytes
    """The new bytes, without the prompt."""
    stopped: str
    """``eos`` where the model ended the text, ``length`` where the limit did."""
    seconds: float
    """Wall seconds, the reading of the prompt included, not of what is read before it."""


@dataclass
class ByteStreamer(BaseStreamer):
    """Passes every new byte on as ``generate`` makes it, but neither prompt nor special ids."""

    on_bytes: Callable[[bytes], None] | None
    new_ids: list[int] = field(default_factory=list)
    saw_prompt: bool = False

    def put(self, value: Tensor) -> None:
        """Take the prompt [1, T] first, then one id [1] after the other."""
        if not self.saw_prompt:
            self.saw_prompt = True
            return
        for token_id in value.flatten().tolist():
            self.new_ids.append(token_id)
            if token_id < NUM_BYTES and self.on_bytes is not None:
                self.on_bytes(bytes([token_id]))

    def end(self) -> None:
        """Do nothing: no byte is ever held back."""

    @property
    def stopped(self) -> str:
        """Why the ids end, in the words of ``Continuation``."""
        return "eos" if self.new_ids[-1:] == [EOS_ID] else "length"


def generate_bytes(
    model: UniMatrixForCausalLM,
    prompt: bytes,
    *,
    max_new_bytes: int | None = None,
    prime: ByteStream | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    on_bytes: Callable[[bytes], None] | None = None,
    ends_at: Callable[[bytes], bool] | None = None,
) -> Continuation:
    """Continue a prompt, with BOS in front, until the model ends the text or reaches the limit.

    Args:
        model: a byte-level model; its mode (dropout) is restored afterwards.
        prompt: any bytes, or none.
        max_new_bytes: the most to write; ``None`` is 256, or what fits a position table.
        prime: a text that is read first (``read_first``), and that the prompt continues without
            BOS.
        sampling: how bytes are chosen; PAD and BOS never are.
        on_bytes: called with every new byte.
        ends_at: called with all new bytes after each of them; ends the text where it returns true.

    Raises:
        InputError: if prompt and new bytes do not fit the model's position table, or ``prime`` is
            given to a model that has one.
    """
    if prime is not None:
        require_state(model)
    num_new = resolve_new_bytes(model, len(prompt), max_new_bytes)
    streamer = ByteStreamer(on_bytes)
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    with suspend_training(model):
        cache, first_id = (None, BOS_ID) if prime is None else read_first(model, prime)
        start = time.perf_counter()
        ids = np.concatenate([[first_id], encode_bytes(prompt)])
        input_ids = torch.from_numpy(ids)[None].to(model.device)  # [1, T]
        # `generate` reads the last id, since it needs the logits.
        cache = read_prompt(model, input_ids[:, :-1], cache, gives_up_cache=True)
        with limit_threads(model):
            model.generate(
                input_ids[:, -1:],
                past_key_values=cache,
                continues=True,
                use_cache=True,
                max_new_tokens=num_new,
                streamer=streamer,
                stopping_criteria=_list_criteria(ends_at),
                generator=generator,
                **_choose_options(sampling, model.config.vocab_size),
            )
        seconds = time.perf_counter() - start
    data = decode_bytes(streamer.new_ids)
    return Continuation(data=data, stopped=streamer.stopped, seconds=seconds)


def resolve_new_bytes(
    model: UniMatrixForCausalLM, prompt_bytes: int, max_new_bytes: int | None
) -> int:
    """Return how many bytes may follow a prompt.

    Without ``max_new_bytes`` it is the default, or less if a position table ends before.

    Raises:
        InputError: if the number is below 1, or does not fit the position table.
    """
    if max_new_bytes is not None and max_new_bytes < 1:
        raise InputError(f"max-new-bytes is {max_new_bytes}; it must be at least 1")
    num_positions = model.config.max_position_embeddings
    if num_positions is None:
        return DEFAULT_NEW_BYTES if max_new_bytes is None else max_new_bytes
    # BOS takes a position that the last new byte, which is never read, does not need.
    room = num_positions - prompt_bytes
    if room < 1:
        raise InputError(
            f"the prompt has {prompt_bytes:,} bytes and the model's position table holds a prompt "
            f"of at most {num_positions - 1:,}; shorten it, or use a model trained with "
            "max_position_embeddings none"
        )
    if max_new_bytes is not None and max_new_bytes > room:
        raise InputError(
            f"max-new-bytes is {max_new_bytes:,}; after a prompt of {prompt_bytes:,} bytes the "
            f"model's position table of {num_positions:,} leaves room for at most {room:,}"
        )
    return min(DEFAULT_NEW_BYTES, room) if max_new_bytes is None else max_new_bytes


def read_prompt(
    model: UniMatrixForCausalLM,
    input_ids: Tensor,
    cache: UniMatrixCache | None = None,
    *,
    gives_up_cache: bool = False,
) -> UniMatrixCache | None:
    """Read tokens in parts of ``PREFILL_TOKENS``, so that peak bytes do not grow with them.

    Args:
        model: computes without gradients; the caller sets its mode (``suspend_training``).
        input_ids: [B, T] int64, without padding.
        cache: to continue from; ``None`` is an empty stream.
        gives_up_cache: allow ``cache`` to be altered, which saves a copy.

    Returns:
        the cache after all tokens; ``cache`` where T is 0.

    Cost:
        O(T) time. Beside the ids and the cache, the bytes of one part's activations.
    """
    for start in range(0, input_ids.shape[1], PREFILL_TOKENS):
        chunk = input_ids[:, start : start + PREFILL_TOKENS]
        with torch.no_grad():
            output = model.model(
                chunk, past_key_values=cache, use_cache=True, gives_up_cache=gives_up_cache
            )
        cache, gives_up_cache = output.past_key_values, True
    return cache


def _choose_options(sampling: Sampling, vocab_size: int) -> dict[str, Any]:
    """Return the options of ``generate``; 0 and 1 are its values for off."""
    options: dict[str, Any] = {
        "pad_token_id": PAD_ID,
        "eos_token_id": EOS_ID,
        "suppress_tokens": [PAD_ID, BOS_ID, *range(EOS_ID + 1, vocab_size)],
    }
    if sampling.temperature == 0:
        return options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return options | {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or 0,
    }


def _list_criteria(ends_at: Callable[[bytes], bool] | None) -> StoppingCriteriaList:
    """Return criteria that stop ``generate`` where ``ends_at`` is true of the new bytes."""
    if ends_at is None:
        return StoppingCriteriaList()

    def stop(input_ids: Tensor, scores: Any, **_unused: Any) -> Tensor:
        is_over = ends_at(decode_bytes(input_ids[0, 1:].cpu()))
        return torch.tensor([is_over], device=input_ids.device)

    return StoppingCriteriaList([stop])


@contextmanager
def limit_threads(model: UniMatrixForCausalLM) -> Iterator[None]:
    """Give small models one thread: waking a second one takes longer than it saves.

    A call may start while another has limited the number of threads; all of them restore the number
    that the first found.
    """
    if model.num_parameters() >= _SMALL_PARAMETERS:
        yield
        return
    with _LOCK:
        _limited.append(_limited[0] if _limited else torch.get_num_threads())
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _LOCK:
            torch.set_num_threads(_limited.pop())
