"""The decode cache: everything a model needs to continue a sequence, of constant size."""

import hashlib
import json
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.utils import logging

from unimatrix.configuration import FORMAT_VERSION, UniMatrixConfig
from unimatrix.errors import InputError
from unimatrix.hub.cache_checks import read_anew, require_sound
from unimatrix.hub.weights_origin import WeightsOrigin
from unimatrix.nn.block import Associations, DepthCarry
from unimatrix.nn.selective_mixer import SelectiveState
from unimatrix.ops.dense_memory import DenseMemory
from unimatrix.ops.selective_slots import SelectiveSlots
from unimatrix.ops.slots import SlotState
from unimatrix.ops.suffix_automaton import AutomatonState
from unimatrix.ops.text_hash import START

_logger = logging.get_logger(__name__)
FORMAT = "unimatrix-cache"
PARTS = ("matrix_state", "slots", "dense_memory", "automaton", "previous_token", "counters")

# Configuration fields that decide the cache's contents and shapes.
_CARRIED_BY = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "residual_path",
    "update_rules",
    "conv_kernel",
    "norm_guard",
    "associative_memory",
    "slot_source",
    "slot_key_size",
    "num_slots",
    "identity_lookup",
    "identity_values",
    "match_threshold",
    "strength_floor",
    "slot_key_patterns",
    "slot_read_offsets",
    "slot_margin",
    "slot_fade_tokens",
    "repeated_key",
    "automaton_window",
)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def digest_config(config: UniMatrixConfig) -> str:
    """Return a short hash of the fields that decide what a cache holds."""
    fields = {name: getattr(config, name) for name in _CARRIED_BY}
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
        depth: what each depth step carries.
        associations: bindings of the token source, shared by the depth steps.
        automaton: the suffix automaton; lives on the CPU.
        text_hash: [B] int64, of the real tokens consumed by each row (``ops.text_hash``), by which
            ``generate`` knows them again; ``None`` where nobody counted.
        origin: the weights that made it; ``None`` is unknown, and fits any.
        is_sound: compiled code may rely on it: a model has made it, or ``check`` has looked.
    """

    config_digest: str
    num_columns: int
    num_tokens: Tensor
    last_token_ids: Tensor
    depth: tuple[DepthCarry, ...]
    associations: Associations = field(default_factory=Associations)
    automaton: AutomatonState | None = None
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

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by name; batch is the first dimension of each."""
        return _flatten(
            {
                "num_tokens": self.num_tokens,
                "last_token_ids": self.last_token_ids,
                "depth": self.depth,
                "associations": self.associations,
                "automaton": self.automaton,
                "text_hash": self.text_hash,
            }
        )

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
        """Return a cache on the device; the automaton stays on the CPU, where it is read."""
        moved = self._map(lambda tensor: tensor.to(device))
        return replace(moved, automaton=self.automaton)

    def forget_weights(self) -> "UniMatrixCache":
        """Return a cache that any model of the same configuration takes."""
        return replace(self, origin=None)

    def num_bytes(self) -> int:
        """Return the bytes of every tensor, as allocated."""
        return sum(self.bytes_by_part().values())

    def bytes_by_part(self) -> dict[str, int]:
        """Return the bytes of each of ``PARTS``; previous_token is what the last tokens leave."""
        parts = dict.fromkeys(PARTS, 0)
        for name, tensor in self.tensors().items():
            parts[_name_part(name)] += tensor.numel() * tensor.element_size()
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
        if os.path.isdir(path):
            raise InputError(
                f"{os.fspath(path)!r} is a folder; name the file that UniMatrixCache.save wrote"
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError as error:
            raise InputError(f"no cache file at {os.fspath(path)!r}") from error
        except OSError as error:
            raise InputError(f"{os.fspath(path)!r} cannot be read: {error}") from error
        except SafetensorError as error:
            raise InputError(f"{os.fspath(path)!r} is not a safetensors file: {error}") from error
        if metadata.get("format") != FORMAT:
            raise InputError(f"{os.fspath(path)!r} is not a cache written by UniMatrixCache.save")
        if int(metadata["format_version"]) > FORMAT_VERSION:
            raise InputError(
                f"{os.fspath(path)!r} has format version {metadata['format_version']} and this "
                f"release reads up to {FORMAT_VERSION}; upgrade unimatrix-lm"
            )
        digests = json.loads(metadata.get("weights_digests", "{}"))
        _warn_of_missing(os.fspath(path), digests, tensors.get("text_hash"))
        return cls(
            config_digest=metadata["config_digest"],
            num_columns=int(metadata["num_columns"]),
            num_tokens=tensors["num_tokens"],
            last_token_ids=tensors["last_token_ids"],
            depth=tuple(
                DepthCarry(
                    tensors.get(f"depth.{i}.matrix_state"),
                    tensors.get(f"depth.{i}.recent"),
                    _gather_associations(tensors, f"depth.{i}.associations."),
                )
                for i in range(int(metadata["num_depth_steps"]))
            ),
            associations=_gather_associations(tensors, "associations."),
            automaton=_gather(AutomatonState, tensors, "automaton."),
            text_hash=tensors.get("text_hash"),
            origin=WeightsOrigin(None, digests) if digests else None,
        ).to(device)

    def check(self, model: Any, batch: int) -> None:
        """Raise ``InputError`` unless the cache belongs to this model and batch.

        Weights are compared only where another model object made the cache, and then once: a
        training may carry it on through its updates. A cache from a file is looked at once, and its
        automaton is built anew from its text.

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
            require_sound(self.tensors(), len(self.depth), model.config)
            self.automaton = read_anew(self.automaton, model.config)
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
        return replace(
            self,
            num_tokens=function(self.num_tokens),
            last_token_ids=function(self.last_token_ids),
            depth=_map(self.depth, function),
            associations=_map(self.associations, function),
            automaton=_map(self.automaton, function),
            text_hash=_map(self.text_hash, function),
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
        depth=(DepthCarry(),) * config.num_hidden_layers,
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


def _warn_of_missing(path: str, digests: dict[str, str], text_hash: Tensor | None) -> None:
    """Warn of what an earlier release did not write."""
    missing = [] if digests else ["which weights made it, so that any are taken"]
    if text_hash is None:
        missing.append("which text it has read, so that `generate` must be told with `continues`")
    if missing:
        warnings.warn(f"{path!r} does not say {', nor '.join(missing)}", stacklevel=3)


def _flatten(parts: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested named tuples, tuples and dicts by dotted name."""
    if parts is None:
        return {}
    if isinstance(parts, Tensor):
        return {prefix.removesuffix("."): parts}
    if hasattr(parts, "_asdict"):
        parts = parts._asdict()
    items = parts.items() if isinstance(parts, dict) else enumerate(parts)
    tensors: dict[str, Tensor] = {}
    for name, part in items:
        tensors |= _flatten(part, f"{prefix}{name}.")
    return tensors


def _map(parts: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Apply ``function`` to every tensor of nested named tuples and tuples."""
    if parts is None:
        return None
    if isinstance(parts, Tensor):
        return function(parts)
    mapped = [_map(part, function) for part in parts]
    return type(parts)(*mapped) if hasattr(parts, "_asdict") else tuple(mapped)


def _gather(kind: Any, tensors: dict[str, Tensor], prefix: str) -> Any:
    """Return the named tuple stored under ``prefix``, ``None`` if there is none."""
    fields = {name: tensors.get(prefix + name) for name in kind._fields}
    return None if all(value is None for value in fields.values()) else kind(**fields)


def _gather_associations(tensors: dict[str, Tensor], prefix: str) -> Associations:
    """Return the associations stored under ``prefix``."""
    slots = _gather(SelectiveSlots, tensors, f"{prefix}selective.slots.")
    selective = None
    if slots is not None:
        selective = SelectiveState(
            slots,
            tensors[f"{prefix}selective.recent_token_ids"],
            tensors.get(f"{prefix}selective.logits"),
        )
    return Associations(
        tensors.get(f"{prefix}previous"),
        _gather(SlotState, tensors, f"{prefix}slots."),
        _gather(DenseMemory, tensors, f"{prefix}dense."),
        selective,
    )


def _name_part(name: str) -> str:
    """Return the part of the cache that the tensor belongs to."""
    for key, part in (
        ("matrix_state", "matrix_state"),
        (".previous", "previous_token"),
        (".recent", "previous_token"),
        ("dense.", "dense_memory"),
        ("associations.", "slots"),
        ("automaton.", "automaton"),
    ):
        if key in name:
            return part
    return "counters"
