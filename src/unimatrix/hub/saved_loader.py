"""The file beside saved models by which transformers finds this package where nobody imports it.

A saved configuration or tokenizer names it in its ``auto_map``; ``trust_remote_code=True`` runs it.
"""

import os
from pathlib import Path

_NAME = "load_unimatrix"
AUTO_MAP = {
    "AutoConfig": f"{_NAME}.UniMatrixConfig",
    "AutoModel": f"{_NAME}.UniMatrixModel",
    "AutoModelForCausalLM": f"{_NAME}.UniMatrixForCausalLM",
}
"""``auto_map`` of a saved configuration: the class behind each Auto class."""
TOKENIZER_AUTO_MAP = {"AutoTokenizer": [None, f"{_NAME}.UniMatrixTokenizer"]}
"""``auto_map`` of a saved tokenizer: a slow class, which there is not, and a fast one."""
# The import stands inside `try`, where transformers does not look for packages that are missing: it
# would take the name of the module for that of the package.
_TEXT = '''"""Takes the classes of this model from the installed package unimatrix-lm."""

try:
    from unimatrix import (
        UniMatrixConfig,
        UniMatrixForCausalLM,
        UniMatrixModel,
        UniMatrixTokenizer,
    )
except ModuleNotFoundError as error:
    if error.name != "unimatrix":
        raise
    raise ImportError(
        "this model needs the package unimatrix-lm; install it with: pip install unimatrix-lm"
    ) from error

__all__ = ["UniMatrixConfig", "UniMatrixForCausalLM", "UniMatrixModel", "UniMatrixTokenizer"]
'''


def save_loader(folder: str | os.PathLike[str]) -> str:
    """Write the file that an ``auto_map`` names, and return its path."""
    path = Path(folder) / f"{_NAME}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_TEXT, encoding="utf-8")
    return str(path)
