"""Constant-memory sequence models with exact recall.

Names load on first use, so that ``import unimatrix`` is instant. transformers knows the models from
then on, whether it was loaded before or is loaded later.
"""

import importlib
from typing import TYPE_CHECKING, Any

from unimatrix.hub.auto import REGISTERED, register, register_when_loaded

if TYPE_CHECKING:
    from unimatrix.cache import UniMatrixCache
    from unimatrix.configuration import UniMatrixConfig
    from unimatrix.errors import InputError
    from unimatrix.hub.packaged import find_packaged
    from unimatrix.hub.published import from_published
    from unimatrix.inference.decoder import Decoder
    from unimatrix.modeling import UniMatrixForCausalLM, UniMatrixModel
    from unimatrix.presets import PRESETS
    from unimatrix.tokenization import (
        UniMatrixTokenizer,
        build_tokenizer,
        decode_bytes,
        encode_bytes,
    )

__version__ = "0.1.0"

_HOMES = {
    "Decoder": "inference.decoder",
    "InputError": "errors",
    "PRESETS": "presets",
    "UniMatrixCache": "cache",
    "UniMatrixConfig": "configuration",
    "UniMatrixForCausalLM": "modeling",
    "UniMatrixModel": "modeling",
    "UniMatrixTokenizer": "tokenization",
    "build_tokenizer": "tokenization",
    "decode_bytes": "tokenization",
    "encode_bytes": "tokenization",
    "find_packaged": "hub.packaged",
    "from_published": "hub.published",
}

__all__ = [
    "PRESETS",
    "Decoder",
    "InputError",
    "UniMatrixCache",
    "UniMatrixConfig",
    "UniMatrixForCausalLM",
    "UniMatrixModel",
    "UniMatrixTokenizer",
    "build_tokenizer",
    "decode_bytes",
    "encode_bytes",
    "find_packaged",
    "from_published",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'unimatrix' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"unimatrix.{_HOMES[name]}"), name)
    globals()[name] = value
    if name in REGISTERED:
        register()
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_when_loaded()
