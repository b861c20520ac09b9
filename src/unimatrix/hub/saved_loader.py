"""The file beside a saved model that loads this package in a program that does not import it.

A saved configuration or tokenizer names the file in its ``auto_map``, and transformers runs it with
``trust_remote_code=True``.
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
# transformers checks for missing packages before it runs the file, and would ask for a package
# called `unimatrix`. It does not look inside `try`.
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
