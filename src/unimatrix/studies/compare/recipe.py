"""A comparison as data, read from TOML; loads neither torch nor transformers."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

from unimatrix.errors import InputError, require_choice, suggest
from unimatrix.studies.sections import build_section, require_at_least
from unimatrix.train.field_types import parse_toml
from unimatrix.train.recipe import TrainSection

DEFAULT_COMPARISON = "small"
TABLES = ("parameters", "time", "recall")
PEER_NAMES = (
    "llama",
    "gelu-transformer",
    "universal-transformer",
    "mamba2",
    "rwkv",
    "gated-linear-attention",
    "gated-deltanet",
)
MOST_MINUTES = 120.0
"""A cell trains for so long at most."""
PER_CELL = ("minutes", "steps", "learning_rate", "seed")
"""Settings of training that each kind of cell decides for itself."""
_SHIPPED = resources.files("unimatrix") / "studies" / "compare"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelEntry:
    """One model of a comparison."""

    preset: str | None = None
    """Preset of ours; none where `peer` names the model."""
    peer: str | None = None
    """A model from elsewhere; none where `preset` names the model."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Configuration fields of ours that differ from the preset."""
    recall_overrides: dict[str, Any] = field(default_factory=dict)
    """Fields that differ once more where the model learns recall: ids there are no bytes."""
    carried_automaton: bool = False
    """Windows of text see the suffix automaton as it is after all training text before them, and
    the model reads the training text before what it is judged on; ours only."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSection:
    """How language modelling is compared."""

    corpora: tuple[str, ...] = ("pystdlib",)
    """Corpora: `pystdlib`, `wikitext2`, files, or a folder with `train`, `valid` and `test`."""
    window_tokens: int = 512
    """Tokens of a training window; also the window that Transformers are judged with."""
    steps: int = 2000
    """Optimiser steps of a cell at equal parameters, or as many as `minutes` allow."""
    minutes: float = 5.0
    """Minutes of training of a cell at equal time, and the most for one at equal parameters."""
    eval_bytes: int = 131_072
    """Validation and test bytes that count, from the start of each split."""
    prime_bytes: int | None = None
    """Training bytes, from the end, that compressors, and models with `carried_automaton`, read
    first; none is all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSection:
    """How each model's learning rate is chosen."""

    corpus: str = "pystdlib"
    """The one corpus that it is chosen on."""
    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 2e-3, 4e-3, 8e-3])
    """Peak learning rates that every model tries."""
    steps: int = 200
    """Optimiser steps of a trial, or as many as `minutes` allow."""
    minutes: float = 1.0
    """The most minutes of a trial."""
    eval_bytes: int = 65_536
    """Validation bytes of a trial."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallSection:
    """How associative recall is compared."""

    steps: int = 400
    """Optimiser steps, or as many as `minutes` allow."""
    minutes: float = 5.0
    """The most minutes of training."""
    batch_size: int = 32
    """Examples in an optimiser step; each has 4 bindings in 128 tokens."""
    test_pairs: list[int] = field(default_factory=lambda: [4, 6, 8])
    """Bindings in a test example of 128 tokens, one test each."""
    test_tokens: list[int] = field(default_factory=lambda: [128, 512, 2048, 8192])
    """Lengths of test examples of 4 bindings, one test each."""
    test_examples: int = 1024
    """Examples of each test by bindings."""
    length_examples: int = 128
    """Examples of each test by length."""


_SECTIONS = {"text": TextSection, "sweep": SweepSection, "recall": RecallSection}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Everything that decides a comparison, apart from the machine it runs on."""

    name: str
    """What it is called; its results go to `runs/compare-NAME`."""
    models: dict[str, ModelEntry]
    """Models by the name in the tables; the first sets the number of parameters."""
    only: tuple[str, ...] = ()
    """Models that are run; none is all."""
    num_layers: int = 3
    """Layers of every peer; depth steps of the Universal Transformer."""
    num_heads: int = 4
    """Heads of every peer that has heads."""
    tables: tuple[str, ...] = TABLES
    """Tables to make: `parameters` (equal steps), `time`, `recall`."""
    seed: int = 0
    """Seed of weights and of the order of the data, the same for every model."""
    text: TextSection = field(default_factory=TextSection)
    """How language modelling is compared."""
    sweep: SweepSection = field(default_factory=SweepSection)
    """How learning rates are chosen."""
    recall: RecallSection = field(default_factory=RecallSection)
    """How associative recall is compared."""
    train: TrainSection = field(default_factory=TrainSection)
    """How every model is optimised; learning rate, steps and minutes are each cell's own."""

    def __post_init__(self) -> None:
        if not self.models:
            raise InputError(f"comparison {self.name!r} names no model; add a [models.NAME]")
        for name, entry in self.models.items():
            _check_entry(name, entry)
        for table in self.tables:
            require_choice("unknown table", table, TABLES)
        require_at_least(1, self, "", "num_layers", "num_heads")
        require_at_least(1, self.text, "text.", "window_tokens", "steps", "eval_bytes")
        require_at_least(1, self.sweep, "sweep.", "steps", "eval_bytes")
        counts = ("steps", "batch_size", "test_examples", "length_examples")
        require_at_least(1, self.recall, "recall.", *counts)
        if self.text.window_tokens % 2:
            raise InputError(f"text.window_tokens is {self.text.window_tokens}; it must be even")
        for name in _SECTIONS:
            minutes = getattr(self, name).minutes
            if not 0 < minutes <= MOST_MINUTES:
                raise InputError(
                    f"{name}.minutes is {minutes}; it must be above 0 and at most {MOST_MINUTES:g}"
                )
        rates = self.sweep.learning_rates
        if not rates or min(rates) <= 0:
            raise InputError(f"sweep.learning_rates is {rates}; give at least one, above 0")

    @property
    def chosen(self) -> dict[str, ModelEntry]:
        """Models that are run, by name."""
        return {name: self.models[name] for name in dict.fromkeys(self.only or self.models)}

    @property
    def corpora(self) -> tuple[str, ...]:
        """Corpora of the tables, each once."""
        return tuple(dict.fromkeys(self.text.corpora))


def list_comparisons() -> list[str]:
    """Return the names of the shipped comparisons."""
    return sorted(p.name.removesuffix(".toml") for p in _SHIPPED.iterdir() if ".toml" in p.name)


def load_comparison(name_or_path: str | Path) -> Comparison:
    """Read a shipped comparison by name, or any by the path of its ``.toml`` file.

    Raises:
        InputError: if there is no such comparison, or it is ill-formed.
    """
    name, path = str(name_or_path), Path(name_or_path)
    shipped = list_comparisons()
    if name not in shipped and not path.is_file():
        raise InputError(
            f"there is no comparison {name!r}; give a .toml file or one of {', '.join(shipped)}."
            f"{suggest(name, shipped)}"
        )
    source = _SHIPPED / f"{name}.toml" if name in shipped else path
    values = parse_toml(source.read_text(encoding="utf-8"), name)
    return build_comparison(name if name in shipped else path.stem, values)


def build_comparison(name: str, values: Mapping[str, Any]) -> Comparison:
    """Build a comparison from the sections of its TOML; fields left out keep their defaults.

    Raises:
        InputError: for an unknown key (with the nearest valid name), or an unusable value.
    """
    fields = {"models": {}, **values}
    for key, section in _SECTIONS.items():
        if key in fields:
            fields[key] = build_section(section, fields[key], f"{key}.")
    if not isinstance(fields["models"], Mapping):
        raise InputError(f"models is {fields['models']!r}; it must be sections, [models.NAME]")
    fields["models"] = {
        model: build_section(ModelEntry, content, f"models.{model}.")
        for model, content in fields["models"].items()
    }
    if "train" in fields:
        for key in PER_CELL:
            if isinstance(fields["train"], Mapping) and key in fields["train"]:
                raise InputError(f"train.{key} is each cell's own; leave it out of the comparison")
        fields["train"] = build_section(TrainSection, fields["train"], "train.")
    return build_section(Comparison, fields, name=name, only=())


def shorten(comparison: Comparison) -> Comparison:
    """Return a comparison that takes a few minutes: it shows that everything runs, no more."""
    text, sweep, recall = comparison.text, comparison.sweep, comparison.recall
    rates = sweep.learning_rates[1:3] or sweep.learning_rates
    tokens = recall.test_tokens[:2]
    return replace(
        comparison,
        name=f"{comparison.name}-quick",
        text=replace(text, steps=20, minutes=0.05, eval_bytes=8192, prime_bytes=2**18),
        sweep=replace(sweep, learning_rates=rates, steps=15, minutes=0.05, eval_bytes=4096),
        recall=replace(
            recall, steps=20, minutes=0.05, test_examples=64, test_tokens=tokens, length_examples=32
        ),
    )


def choose_corpora(comparison: Comparison, specs: list[str]) -> Comparison:
    """Return a comparison on other corpora; the first is what learning rates are chosen on."""
    return replace(
        comparison,
        text=replace(comparison.text, corpora=tuple(specs)),
        sweep=replace(comparison.sweep, corpus=specs[0]),
    )


def choose_models(comparison: Comparison, names: list[str]) -> Comparison:
    """Return a comparison of some of its models; the number of parameters stays the first's.

    Raises:
        InputError: for a model that it does not have.
    """
    for name in names:
        require_choice("the comparison has no model", name, comparison.models)
    return replace(comparison, only=tuple(names))


def _check_entry(name: str, entry: ModelEntry) -> None:
    if (entry.preset is None) == (entry.peer is None):
        raise InputError(f"model {name!r} needs either a preset or a peer; give exactly one")
    if entry.peer is None:
        return
    require_choice(f"model {name!r} has unknown peer", entry.peer, PEER_NAMES)
    if entry.overrides or entry.recall_overrides:
        raise InputError(f"model {name!r} is a peer and takes no overrides; leave them out")
    if entry.carried_automaton:
        raise InputError(
            f"model {name!r} is a peer and has no automaton; leave carried_automaton out"
        )
