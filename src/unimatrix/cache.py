"""The decode cache: everything a model needs to continue a sequence, of constant size."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers.utils import logging

from unimatrix.configuration import UniMatrixConfig
from unimatrix.configuration_checks import FORMAT_VERSION
from unimatrix.errors import InputError
from unimatrix.hub.cache_checks import read_anew, require_sound
from unimatrix.hub.weights_origin import WeightsOrigin
from unimatrix.nn.block import States
from unimatrix.nn.mixer import Mixer
from unimatrix.nn.previous_token import take_last
from unimatrix.nn.residual_context import ResidualContext
from unimatrix.ops.suffix_automaton import SuffixState
from unimatrix.ops.text_hash import START, hash_text

_logger = logging.get_logger(__name__)
FORMAT = "unimatrix-cache"
# Fields of a mixer's state that hold the last tokens or their features, whatever the mixer.
_LAST_TOKENS = ("previous", "recent", "recent_token_ids")
# In what order parts are listed; those of other mixers come after.
_FIRST_PARTS = ("matrix_state", "slots", "dense_memory", "automaton")


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def digest_config(config: UniMatrixConfig) -> str:
    """Return a short hash of the fields that decide what a cache holds."""
    names = ["vocab_size", "hidden_size", "num_hidden_layers"]
    for kind in Mixer.kinds.values():
        names += kind.list_state_fields(config)
    values = vars(config)  # once: the attributes of a configuration are slow to read
    fields = {name: values[name] for name in names}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:16]


# Not frozen: `generate` marks the cache that a caller passes with an attribute of its own.
@dataclass(eq=False)
class UniMatrixCache:
    """Everything carried from call to call; ``forward`` returns a new one and alters none.

    Constant in the length of the stream, except for the dense associative memory, which grows by
    nature, and the suffix automaton without ``automaton_window``.

    Attributes:
        config_digest: hash of the configuration it belongs to.
        num_columns: columns consumed so far, padding included.
        num_tokens: [B] int64, real tokens consumed by each row.
        last_token_ids: [B] int64, the last real token, -1 where there is none.
        depth: what mixers carry that read at every depth step: for each step, by mixer's name.
        shared: what mixers carry that read once, by the mixer's name.
        text_hash: [B] int64, of the real tokens consumed by each row (``ops.text_hash``), by which
            ``generate`` knows them again; ``None`` where nobody counted.
        origin: the weights that made it; ``None`` is unknown, and fits any.
        is_sound: compiled code may rely on it: a model has made it, or ``check`` has looked.
    """

    config_digest: str
    num_columns: int
    num_tokens: Tensor
    last_token_ids: Tensor
    depth: tuple[States, ...]
    shared: States = field(default_factory=dict)
    text_hash: Tensor | None = None
    origin: WeightsOrigin | None = None
    is_sound: bool = False

    # Read by transformers' `generate`.
    is_compileable = False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the columns consumed so far, as ``generate`` counts them."""
        return self.num_columns

    @property
    def batch_size(self) -> int:
        """Number of rows, B."""
        return int(self.num_tokens.shape[0])

    @property
    def automaton(self) -> SuffixState | None:
        """The suffix automaton or the index of its window, on the CPU; ``None`` without one."""
        automaton: SuffixState | None = self.shared.get(ResidualContext.name)
        return automaton

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name; batch is the first dimension of each."""
        tensors = {"num_tokens": self.num_tokens, "last_token_ids": self.last_token_ids}
        if self.text_hash is not None:
            tensors["text_hash"] = self.text_hash
        for prefix, states in self._list_states():
            for name, state in states.items():
                tensors |= _flatten(state, f"{prefix}{Mixer.kinds[name].state_prefix}")
        return tensors

    def _list_states(self) -> list[tuple[str, States]]:
        """Return the states of each depth step and the shared ones, with the prefix of names."""
        return [
            *((f"depth.{i}.", states) for i, states in enumerate(self.depth)),
            ("", self.shared),
        ]

    def select_rows(self, rows: Tensor) -> "UniMatrixCache":
        """Return a cache of the given rows, in that order; rows may repeat (beams).

        Args:
            rows: [B'] int64.
        """
        return self._map(lambda tensor: tensor.index_select(0, rows.to(tensor.device)))

    def detach(self) -> "UniMatrixCache":
        """Return a cache without history of gradients."""
        return self._map(lambda tensor: tensor.detach())

    def to(self, device: torch.device | str) -> "UniMatrixCache":
        """Return a cache on the device; indexes of text stay on the CPU, where they are read."""
        moved = self._map(lambda tensor: tensor.to(device))
        stay = {n: s for n, s in self.shared.items() if Mixer.kinds[n].state_device is not None}
        return replace(moved, shared={**moved.shared, **stay})

    def advance(
        self,
        ids: Tensor,
        lengths: Tensor | None,
        depth: list[States],
        shared: States,
        origin: WeightsOrigin,
        is_text: bool,
    ) -> "UniMatrixCache":
        """Return the cache after more tokens; this one stays as it is.

        Args:
            ids: [B, T] int64, real tokens first in each row.
            lengths: [B] int64, real tokens of each row; ``None`` is T for all.
            depth: what each depth step carries on.
            shared: what mixers carry on that read once.
            origin: the weights that read them.
            is_text: whether the ids were read, and not embeddings in their place.
        """
        text_hash = self.text_hash if is_text else None
        if text_hash is not None:
            text_hash = hash_text(ids, lengths, text_hash)
        return UniMatrixCache(
            config_digest=self.config_digest,
            num_columns=self.num_columns + ids.shape[1],
            num_tokens=self.num_tokens + (ids.shape[1] if lengths is None else lengths),
            last_token_ids=take_last(ids, lengths, self.last_token_ids),
            depth=tuple(depth),
            shared={name: state for name, state in shared.items() if state is not None},
            text_hash=text_hash,
            origin=origin,
            is_sound=True,
        )

    def forget_weights(self) -> "UniMatrixCache":
        """Return a cache that any model of the same configuration takes."""
        return replace(self, origin=None)

    def num_bytes(self) -> int:
        """Return the bytes of every tensor, as allocated."""
        return sum(self.bytes_by_part().values())

    def bytes_by_part(self) -> dict[str, int]:
        """Return the bytes of each part, as ``unimatrix info`` names them.

        ``previous_token`` is what the last tokens leave for the next, ``counters`` what is counted.
        """
        names = [*_FIRST_PARTS, *(kind.part for kind in Mixer.kinds.values())]
        parts = dict.fromkeys([*names, "previous_token", "counters"], 0)
        counters = [self.num_tokens, self.last_token_ids, self.text_hash]
        parts["counters"] = sum(_count_bytes(_flatten(tensor)) for tensor in counters)
        for _, states in self._list_states():
            for name, state in states.items():
                for field_name, value in zip(type(state)._fields, state, strict=True):
                    is_last = field_name in _LAST_TOKENS
                    part = "previous_token" if is_last else Mixer.kinds[name].part
                    parts[part] += _count_bytes(_flatten(value))
        return parts

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to one safetensors file.

        Args:
            path: the file; replaced only when everything is written.

        Raises:
            InputError: if it cannot be written there.

        Cost:
            Reads the weights of the model that made it, for a digest of them.
        """
        digests = {} if self.origin is None else self.origin.list_digests()
        metadata = {
            "format": FORMAT,
            "format_version": str(FORMAT_VERSION),
            "config_digest": self.config_digest,
            "num_columns": str(self.num_columns),
            "num_depth_steps": str(len(self.depth)),
            "weights_digests": json.dumps(digests),
        }
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.tensors().items()}
        partial = f"{os.fspath(path)}.partial"
        try:
            save_file(tensors, partial, metadata=metadata)
            os.replace(partial, path)
        except (OSError, SafetensorError) as error:
            with suppress(FileNotFoundError):
                os.unlink(partial)
            raise InputError(
                f"the cache cannot be written to {os.fspath(path)!r}: {error}"
            ) from error

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: torch.device | str = "cpu"
    ) -> "UniMatrixCache":
        """Read a cache that ``save`` wrote; warn if it does not say what it was made from.

        Raises:
            InputError: if the file is missing, is no cache, or is of a later format.
        """
        name = os.fspath(path)
        metadata, tensors = _read_file(name)
        digests = json.loads(metadata.get("weights_digests", "{}"))
        _warn_of_missing(name, digests, tensors.get("text_hash"))
        cache = cls(
            config_digest=metadata["config_digest"],
            num_columns=int(metadata["num_columns"]),
            num_tokens=tensors["num_tokens"],
            last_token_ids=tensors["last_token_ids"],
            depth=tuple(
                _gather_states(tensors, f"depth.{i}.")
                for i in range(int(metadata["num_depth_steps"]))
            ),
            shared=_gather_states(tensors, ""),
            text_hash=tensors.get("text_hash"),
            origin=WeightsOrigin(None, digests) if digests else None,
        )
        if unknown := sorted(set(tensors) - set(cache.tensors())):
            raise InputError(
                f"{name!r} holds {unknown[0]!r}, which no mixer here carries, or not alone; import "
                "the class of the mixer that wrote it, or save the cache again"
            )
        return cache.to(device)

    def check(self, model: Any, batch: int) -> None:
        """Raise ``InputError`` unless the cache belongs to this model and batch.

        Weights are compared only where another model object made the cache, and then once: a
        training may carry it on through its updates. A cache from a file is looked at once, and its
        automaton and its index are built anew from their texts.

        Args:
            model: a ``UniMatrixModel``.
            batch: B.
        """
        if self.config_digest != digest_config(model.config):
            raise InputError(
                "this cache was made by a model of another configuration; pass one made by this "
                "model, or none"
            )
        if self.batch_size != batch:
            raise InputError(
                f"this cache has {self.batch_size} rows and input_ids has {batch}; select rows "
                "with cache.select_rows"
            )
        if not self.is_sound:
            require_sound(self.tensors(), self._list_states(), model.config)
            self.shared = read_anew(self.shared, self.num_tokens, model.config)
            self.is_sound = True
        if self.origin is not None and self.origin is not model.origin:
            self._compare_weights(model)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _compare_weights(self, model: Any) -> None:
        """Raise ``InputError`` if the weights differ; from now on the cache is this model's."""
        assert self.origin is not None
        is_same = self.origin.is_of(model)
        if is_same is False:
            raise InputError(
                "this cache was made by a model with other weights; pass one made by this model, "
                "or cache.forget_weights() to go on with it all the same"
            )
        if is_same is None:
            warnings.warn(
                "this cache was made by another model, whose weights cannot be compared with those "
                "of the model that reads it now",
                stacklevel=2,
            )
        self.origin = model.origin

    def _map(self, function: Callable[[Tensor], Tensor]) -> "UniMatrixCache":
        """Return a cache with ``function`` applied to every tensor."""
        fields = ("num_tokens", "last_token_ids", "depth", "shared", "text_hash")
        return replace(
            self, **{n: tree_map_only(Tensor, function, getattr(self, n)) for n in fields}
        )


def start_cache(
    config: UniMatrixConfig, input_ids: Tensor, *, is_kept: bool = True
) -> UniMatrixCache:
    """Return the cache of an empty sequence, for as many rows as ``input_ids`` has.

    Args:
        config: of the model.
        input_ids: [B, T].
        is_kept: whether it, or one after it, leaves the model; if not, it gets no digest, which
            takes longer than everything else here, and counts no text.
    """
    batch, device = input_ids.shape[0], input_ids.device
    text_hash = None
    if is_kept:
        text_hash = torch.full((batch,), START, dtype=torch.int64, device=device)
    return UniMatrixCache(
        config_digest=digest_config(config) if is_kept else "",
        num_columns=0,
        num_tokens=torch.zeros(batch, dtype=torch.int64, device=device),
        last_token_ids=torch.full((batch,), -1, dtype=torch.int64, device=device),
        depth=({},) * config.num_hidden_layers,
        text_hash=text_hash,
        is_sound=True,
    )


def require_own_cache(past_key_values: Any) -> UniMatrixCache | None:
    """Return the cache that a caller passed; an empty one of any other kind is none.

    Raises:
        InputError: if it is of another kind and holds something.
    """
    if past_key_values is None or isinstance(past_key_values, UniMatrixCache):
        return past_key_values
    count = getattr(past_key_values, "get_seq_length", None)
    if count is not None and int(count()) == 0:
        _logger.warning_once(
            f"a {type(past_key_values).__name__} is not filled here; read on with the "
            "past_key_values that the call returns"
        )
        return None
    raise InputError(
        f"past_key_values is a {type(past_key_values).__name__}, which is no cache of this model; "
        "pass the UniMatrixCache that an earlier call returned, or none"
    )


def _read_file(path: str) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return the metadata and the tensors of a cache's file; raise as ``UniMatrixCache.load``."""
    if os.path.isdir(path):
        raise InputError(f"{path!r} is a folder; name the file that UniMatrixCache.save wrote")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise InputError(f"no cache file at {path!r}") from error
    except OSError as error:
        raise InputError(f"{path!r} cannot be read: {error}") from error
    except SafetensorError as error:
        raise InputError(f"{path!r} is not a safetensors file: {error}") from error
    if metadata.get("format") != FORMAT:
        raise InputError(f"{path!r} is not a cache written by UniMatrixCache.save")
    if int(metadata["format_version"]) > FORMAT_VERSION:
        raise InputError(
            f"{path!r} has format version {metadata['format_version']} and this release reads up "
            f"to {FORMAT_VERSION}; upgrade unimatrix-lm"
        )
    return metadata, tensors


def _warn_of_missing(path: str, digests: dict[str, str], text_hash: Tensor | None) -> None:
    """Warn of what an earlier release did not write."""
    missing = [] if digests else ["which weights made it, so that any are taken"]
    if text_hash is None:
        missing.append("which text it has read, so that `generate` must be told with `continues`")
    if missing:
        warnings.warn(f"{path!r} does not say {', nor '.join(missing)}", stacklevel=3)


def _flatten(parts: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of a named tuple, and of those in it, by dotted name."""
    if parts is None:
        return {}
    if isinstance(parts, Tensor):
        return {prefix.removesuffix("."): parts}
    tensors: dict[str, Tensor] = {}
    for name, part in zip(parts._fields, parts, strict=True):
        tensors |= _flatten(part, f"{prefix}{name}.")
    return tensors


def _count_bytes(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _gather_states(tensors: Mapping[str, Tensor], prefix: str) -> States:
    """Return the states of all mixers whose tensors are stored under ``prefix``."""
    states: States = {}
    for name, kind in Mixer.kinds.items():
        for form in (kind.State, *kind.other_states):
            state = _gather(form, tensors, prefix + kind.state_prefix)
            if state is not None:
                states[name] = state
    return states


def _gather(kind: Any, tensors: Mapping[str, Tensor], prefix: str) -> Any:
    """Return the named tuple stored under ``prefix``; ``None`` if a field without default lacks."""
    values: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        is_nested = hasattr(hint, "_fields")
        nested = _gather(hint, tensors, f"{prefix}{name}.") if is_nested else None
        values[name] = nested if is_nested else tensors.get(prefix + name)
    required = set(kind._fields) - set(kind._field_defaults)
    is_there = any(value is not None for value in values.values())
    is_whole = is_there and all(values[name] is not None for name in required)
    return kind(**values) if is_whole else None
