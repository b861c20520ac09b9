"""Registration with transformers: the Auto classes, and the tables of names behind them.

``import unimatrix`` loads neither torch nor transformers. ``register_when_loaded`` therefore writes
only names, into each table as soon as transformers has made the table. transformers then looks for
a name in ``transformers.models.unimatrix``, which is this package; loading one class from it
registers all of them.
"""

import importlib
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

MODEL_TYPE = "unimatrix"
_AUTO = "transformers.models.auto"
_TABLES = {
    f"{_AUTO}.configuration_auto": {"CONFIG_MAPPING_NAMES": "UniMatrixConfig"},
    f"{_AUTO}.modeling_auto": {
        "MODEL_MAPPING_NAMES": "UniMatrixModel",
        # Trainer shifts labels, and pipelines, lm-eval and model cards accept a language model, if
        # its class or type is in this table.
        "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "UniMatrixForCausalLM",
    },
    f"{_AUTO}.tokenization_auto": {"TOKENIZER_MAPPING_NAMES": "UniMatrixTokenizer"},
}
REGISTERED = frozenset(name for names in _TABLES.values() for name in names.values())


def register() -> None:
    """Make transformers know UniMatrix; calling it again changes nothing."""
    import transformers

    from unimatrix.configuration import UniMatrixConfig
    from unimatrix.modeling import UniMatrixForCausalLM, UniMatrixModel
    from unimatrix.tokenization import UniMatrixTokenizer

    for name in _TABLES:
        _write_names(importlib.import_module(name))
    transformers.AutoConfig.register(MODEL_TYPE, UniMatrixConfig, exist_ok=True)
    transformers.AutoModel.register(UniMatrixConfig, UniMatrixModel, exist_ok=True)
    transformers.AutoModelForCausalLM.register(UniMatrixConfig, UniMatrixForCausalLM, exist_ok=True)
    transformers.AutoTokenizer.register(
        UniMatrixConfig, fast_tokenizer_class=UniMatrixTokenizer, exist_ok=True
    )
    # `transformers serve` and TRL look for the "architectures" of config.json in the module
    # `transformers`. They are set on its class, since transformers replaces the module object while
    # the first one stays in use.
    for model_class in (UniMatrixModel, UniMatrixForCausalLM):
        setattr(type(transformers), model_class.__name__, model_class)


def register_when_loaded() -> None:
    """Make transformers know UniMatrix now if it has its tables, else as soon as it has them."""
    sys.modules["transformers.models.unimatrix"] = sys.modules["unimatrix"]
    if not any(isinstance(finder, _TableFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TableFinder())
    if any(name in sys.modules for name in _TABLES):
        register()


def _write_names(module: ModuleType) -> None:
    """Write our names into the tables of one module of transformers."""
    for table, name in _TABLES[module.__name__].items():
        getattr(module, table)[MODEL_TYPE] = name


class _TableFinder(MetaPathFinder):
    """Finds the modules with tables as Python does, and adds our names once they are loaded."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> ModuleSpec | None:
        if fullname not in _TABLES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_write(module: ModuleType) -> None:
            execute(module)
            _write_names(module)

        spec.loader.exec_module = execute_and_write  # type: ignore[method-assign]
        return spec
