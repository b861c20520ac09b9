"""A comparison small enough for tests: two models, a folder of text with three splits."""

from pathlib import Path
from typing import Any

from unimatrix.studies.compare.recipe import Comparison, build_comparison

MODELS = {
    "ours": {
        "preset": "unimatrix",
        "overrides": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24},
        "recall_overrides": {"automaton_window": 128},
    },
    "theirs": {"peer": "llama"},
}


def write_corpus(folder: Path) -> Path:
    """Write a folder with train, valid and test; return it."""
    for index, split in enumerate(("train", "valid", "test")):
        (folder / split).mkdir(parents=True)
        text = "".join(f"{split} line {(index + i) * i % 89} of many\n" for i in range(300))
        (folder / split / "text.txt").write_text(text, encoding="utf-8")
    return folder


def describe_comparison(corpus: Path, **changes: Any) -> dict[str, Any]:
    """Return the sections of a comparison as TOML gives them."""
    budget = {"steps": 3, "minutes": 0.02}
    values: dict[str, Any] = {
        "models": MODELS,
        "num_layers": 1,
        "num_heads": 2,
        "text": {
            "corpora": [str(corpus)],
            "window_tokens": 16,
            "eval_bytes": 300,
            **budget,
        },
        "sweep": {
            "corpus": str(corpus),
            "learning_rates": [1e-3, 3e-3],
            "eval_bytes": 100,
            **budget,
        },
        "recall": {
            "test_pairs": [4, 8],
            "test_tokens": [128, 256],
            "test_examples": 8,
            "length_examples": 4,
            "batch_size": 4,
            **budget,
        },
        "train": {"batch_size": 4, "log_every_steps": 1, "num_threads": 1},
    }
    return values | changes


def make_comparison(corpus: Path, **changes: Any) -> Comparison:
    """Return the comparison."""
    return build_comparison("tiny", describe_comparison(corpus, **changes))
