"""Which weights made a cache: a model while it lives, digests of its weights afterwards."""

import hashlib
import sys
import weakref
from typing import Any

import torch
from torch import Tensor, nn

# Wide types first: a copy of a model in a narrower type may go on with the caches of the model.
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}


class WeightsOrigin:
    """The weights that made a cache; all caches of one model share one object.

    Two caches of one model are told by the identity of this object. Digests are computed only to
    compare the weights of two models, or for a cache that is saved or outlives its model.

    Args:
        model: held weakly; ``None`` if only digests are left.
        digests: of the weights in their own type and every narrower one, by name of the type.
    """

    def __init__(self, model: nn.Module | None, digests: dict[str, str] | None = None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._digests = digests or {}

    def list_digests(self) -> dict[str, str]:
        """Return the digests, of the weights as they are now; empty if there are none."""
        model = None if self._model is None else self._model()
        return self._digests if model is None else _list_digests(model)

    def keep_digests(self, model: nn.Module) -> None:
        """Replace a model that is about to end by the digests of its weights."""
        self._model, self._digests = None, _list_digests(model)

    def is_of(self, model: nn.Module) -> bool | None:
        """Return whether the weights are those of a model; ``None`` if they cannot be compared.

        Weights of different types are compared in the narrower one.
        """
        ours = None if self._model is None else self._model()
        held = list(self._digests) if ours is None else [_name_dtype(ours)]
        if not held:
            return None
        name = _name_narrower(held[0], _name_dtype(model))
        if name is None:
            return None
        expected = self._digests.get(name) if ours is None else digest_weights(ours, _DTYPES[name])
        found = digest_weights(model, _DTYPES[name])
        return None if expected is None or found is None else expected == found

    def __deepcopy__(self, memo: Any) -> "WeightsOrigin":
        return self

    def __reduce__(self) -> Any:
        return WeightsOrigin, (None, self.list_digests())


class HasOrigin:
    """Base of a model whose caches know which weights made them.

    The model refers to its ``WeightsOrigin`` weakly, so that caches alone keep the object alive. At
    its end the model therefore knows whether any cache needs digests of its weights.
    """

    _origin: "weakref.ref[WeightsOrigin] | None" = None

    @property
    def origin(self: Any) -> WeightsOrigin:
        """The object that all caches of this model share, made for the first of them."""
        origin: WeightsOrigin | None = self._find_origin()
        if origin is None:
            origin = WeightsOrigin(self)
            self._origin = weakref.ref(origin)
        return origin

    def _find_origin(self) -> WeightsOrigin | None:
        return None if self._origin is None else self._origin()

    def __getstate__(self) -> dict[str, Any]:
        """Leave the origin out: a copy is another model."""
        return {name: value for name, value in vars(self).items() if name != "_origin"}

    def __del__(self: Any) -> None:
        origin = self._find_origin()
        if origin is not None and not sys.is_finalizing():
            origin.keep_digests(self)


def digest_weights(model: nn.Module, dtype: torch.dtype) -> str | None:
    """Return a hash of all parameters by name; ``None`` unless all of them are in this process.

    Floating parameters are rounded to ``dtype``.

    Cost:
        Reads every parameter, about a second for a gigabyte.
    """
    total = hashlib.blake2b(digest_size=16)
    for name, parameter in sorted(model.named_parameters()):
        tensor: Tensor = parameter.data
        # Sharded, quantised or offloaded.
        if tensor.is_meta or type(tensor) is not Tensor or "_fsdp_wrapped_module" in name:
            return None
        if tensor.is_floating_point() and tensor.dtype != dtype:
            tensor = tensor.to(torch.float32).to(dtype)
        # torch.compile wraps modules, which changes their names.
        total.update(f"{name.replace('_orig_mod.', '')} {list(tensor.shape)}".encode())
        total.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _list_digests(model: nn.Module) -> dict[str, str]:
    own = _name_dtype(model)
    narrower = [name for name in _DTYPES if _name_narrower(own, name) == name]
    found = {name: digest_weights(model, _DTYPES[name]) for name in dict.fromkeys([own, *narrower])}
    return {name: digest for name, digest in found.items() if digest is not None}


def _name_dtype(model: nn.Module) -> str:
    """Return the type of a model's weights, that of its first floating parameter."""
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    return str(next(dtypes, torch.float32)).removeprefix("torch.")


def _name_narrower(left: str, right: str) -> str | None:
    """Return the type that both can be rounded to, ``None`` if there is none."""
    if left not in _DTYPES or right not in _DTYPES:
        return None
    left_size, right_size = _DTYPES[left].itemsize, _DTYPES[right].itemsize
    if left_size == right_size:
        return left if left == right else None
    return left if left_size < right_size else right
