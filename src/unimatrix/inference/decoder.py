"""A model that reads one token of every row at a time, compiled."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unimatrix.cache import UniMatrixCache, start_cache
from unimatrix.errors import InputError
from unimatrix.kernels.step.explain import explain_step
from unimatrix.kernels.step.native import advance
from unimatrix.kernels.step.state import read_cache, write_cache
from unimatrix.kernels.step.weights import pack_step


class Decoder:
    """Streams of tokens through a model, in constant time and bytes a token.

    The same logits as the model's ``forward`` with T = 1, in one compiled call. Not in constant
    bytes are the suffix automaton without a window, and in constant time only on average its
    work: see ``predict_from_suffix``.

    Args:
        model: a ``UniMatrixForCausalLM`` on the CPU, in evaluation mode; its weights are copied.
        cache: where the streams stand, from the model's ``forward``; not altered. ``None`` starts
            new ones.
        batch_size: B of new streams.

    Raises:
        InputError: if there is no compiled step for the model, or the cache is another's.
    """

    def __init__(
        self, model: Any, cache: UniMatrixCache | None = None, *, batch_size: int = 1
    ) -> None:
        reason = explain_step(model)
        if reason is not None:
            raise InputError(f"there is no compiled step: {reason}; call the model instead")
        if batch_size < 1:
            raise InputError(f"batch_size is {batch_size}; pass at least 1")
        if cache is None:
            cache = start_cache(model.config, torch.empty(batch_size, 0, dtype=torch.int64))
        cache.check(model.model, cache.batch_size)
        self._origin = model.model.origin
        self._weights = pack_step(model)
        mixer = model.model.block.selective_mixer
        num_recent = 0 if mixer is None else mixer.num_recent
        self._state = read_cache(cache, model.config, num_recent, self._weights.dtype)
        self._most_tokens = int(cache.num_tokens.max())
        self._carried, self._match = self._state.carried, self._state.match
        self._indexed = self._state.indexed
        # A configuration looks every attribute up among others, a microsecond each.
        config = self._weights.config
        self._vocab_size, self._limit = config.vocab_size, config.max_position_embeddings
        self._form = (self.batch_size, config.vocab_size), self._weights.arrays[0].dtype

    @property
    def batch_size(self) -> int:
        """Number of rows, B."""
        return int(self._state.counters.shape[0])

    def step(self, token_ids: Tensor) -> Tensor:
        """Read one token of every row.

        Args:
            token_ids: [B] int64 or int32.

        Returns:
            [B, V], the logits of the next, in the model's type.

        Raises:
            InputError: if there is not one token a row, one is not of the vocabulary, or the
                position table has no row left.
        """
        try:
            ids = np.ascontiguousarray(token_ids.detach().numpy())
        except TypeError as error:  # of torch, which names neither the argument nor its device
            raise InputError(
                f"token_ids is {token_ids.dtype} on {token_ids.device}; pass torch.int64 on the CPU"
            ) from error
        if ids.dtype == np.int32:
            ids = ids.astype(np.int64)
        if ids.shape != self._form[0][:1] or ids.dtype != np.int64:
            raise InputError(
                f"token_ids has shape {list(token_ids.shape)} and type {token_ids.dtype}; pass "
                f"[{self.batch_size}] of torch.int64"
            )
        listed = ids.tolist()  # of few rows, quicker than two reductions
        if min(listed) < 0 or max(listed) >= self._vocab_size:
            raise InputError(f"token_ids holds {listed}; pass ids in 0..{self._vocab_size - 1}")
        self._require_room()
        logits = self._allocate_logits()
        self._read(ids, logits)
        return torch.from_numpy(logits)

    def write(
        self,
        token_ids: Tensor,
        num_tokens: int,
        *,
        end_ids: Sequence[int] = (),
        pad_id: int = 0,
        ended: np.ndarray[Any, Any] | None = None,
    ) -> Tensor:
        """Read one token of every row, and go on greedily without a tensor operation a token.

        Args:
            token_ids: [B] int64.
            num_tokens: most tokens to write, at least 1; all but the last are read as well.
            end_ids: a row ends with one of these.
            pad_id: what ended rows go on with, until all have ended.
            ended: [B] bool, rows that ended before; ``None`` is none.

        Returns:
            [B, n] int64, n the tokens written.

        Raises:
            InputError: as ``step``, or for a ``num_tokens``, ``pad_id`` or ``ended`` that is not as
                above.
        """
        vocab_size = self._vocab_size
        if num_tokens < 1 or not 0 <= pad_id < vocab_size:
            raise InputError(
                f"num_tokens is {num_tokens} and pad_id {pad_id}; pass at least 1, and an id in "
                f"0..{vocab_size - 1}"
            )
        if ended is not None and ended.shape != (self.batch_size,):
            raise InputError(f"ended has shape {list(ended.shape)}; pass [{self.batch_size}]")
        ended = np.zeros(self.batch_size, dtype=bool) if ended is None else ended.copy()
        written = np.empty((self.batch_size, num_tokens), dtype=np.int64)
        logits = self.step(token_ids).numpy()
        for n in range(num_tokens):
            if n > 0:
                self._require_room()
                self._read(written[:, n - 1].copy(), logits)
            written[:, n] = logits.argmax(axis=1)
            if len(end_ids):
                written[ended, n] = pad_id
                ended |= np.isin(written[:, n], end_ids)
                if ended.all():
                    return torch.from_numpy(written[:, : n + 1])
        return torch.from_numpy(written)

    def _allocate_logits(self) -> np.ndarray[Any, Any]:
        shape, dtype = self._form
        return np.empty(shape, dtype=dtype)

    def _read(self, ids: np.ndarray[Any, Any], logits: np.ndarray[Any, Any]) -> None:
        """Read valid ids [B] and write the logits [B, V] of the next."""
        stream = self._state.stream
        if stream is not None:
            stream.push(ids)
        advance(ids, self._weights.arrays, *self._carried, self._match, self._indexed, logits)
        self._most_tokens += 1
        self._state.num_columns += 1

    def _require_room(self) -> None:
        """Raise ``InputError`` if the position table has no row left."""
        limit = self._limit
        if limit is not None and self._most_tokens >= limit:
            raise InputError(
                f"the input reaches {self._most_tokens + 1} tokens and the position table has "
                f"{limit}; pass fewer, or train a model with max_position_embeddings=None, which "
                "has no table"
            )

    def cache(self) -> UniMatrixCache:
        """Return where the streams stand, to save it or go on with the model; shares nothing."""
        return write_cache(self._state, self._weights.config, self._origin)

    def num_bytes(self) -> int:
        """Return the bytes that the streams carry, as allocated, without ``scratch_bytes``."""
        return self._state.num_bytes()

    def scratch_bytes(self) -> int:
        """Return the bytes of the indexed attention's keys, one of each token of the window.

        They are made of the text when they are read, so a cache does not hold them.
        """
        return self._state.scratch_bytes()
