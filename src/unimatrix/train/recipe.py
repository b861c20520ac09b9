"""One training run as data: the model, its text, how it is trained and how it is judged.

A recipe is read from TOML (or from the JSON of a run folder), changed by ``--set key=value``, and
written to the run folder as JSON. The docstring under a field is also its help on the command line.
"""

import dataclasses
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Self

from unimatrix.errors import InputError, require_choice, suggest
from unimatrix.hub.packaged import find_packaged
from unimatrix.train.field_types import (
    NOTHING,
    convert_value,
    parse_json,
    parse_toml,
    parse_value,
    read_field_docs,
)

SCHEDULES = ("constant", "linear", "cosine", "warmup_stable_decay")
OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "muon")
PRECISIONS = ("float32", "bfloat16")
PROTOCOLS = ("carried", "windows")
DOCUMENTS = ("joined", "packed")
DEFAULT_RECIPE = "default"


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSection:
    """Which model is trained, and from where it starts."""

    preset: str | None = "core"
    """Preset to build with fresh weights; none where `init` says what to start from."""
    init: str | None = None
    """Run folder or saved model whose weights and configuration training starts from."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Configuration fields that differ from the preset; `--set model.FIELD=VALUE` sets one."""

    def __post_init__(self) -> None:
        if (self.preset is None) == (self.init is None):
            raise InputError(
                f"model.preset is {self.preset!r} and model.init is {self.init!r}; give exactly one"
            )
        if self.init is not None and self.overrides:
            raise InputError(
                f"model.{next(iter(self.overrides))} cannot be set beside model.init: the "
                "configuration comes with the weights; leave it out"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSection:
    """What text is trained on and how it is cut."""

    data: tuple[str, ...] = ("pystdlib",)
    """Corpus: `pystdlib`, `wikitext2`, `wikitext2:FILE`, `enwik8`, `text8`, or files, folders and
    globs; a run stores where they lie."""
    valid_data: tuple[str, ...] = ()
    """What validates instead of the corpus's own split (of files: the last 5 % of the bytes)."""
    window_tokens: int = 128
    """Tokens of a training window, T."""
    leading_bos: bool = True
    """Start every window with BOS; otherwise a window is T + 1 tokens from anywhere in the text."""
    carried_automaton: bool = False
    """Let the suffix automaton of a window remember all of the training text before it, as far as
    model.automaton_window reaches, instead of the window alone."""
    documents: str = "joined"
    """joined: the files are one text, and a window reads on from one to the next. packed: each file
    is a document of its own, which begins with BOS and nothing carried wherever it stands in a
    window, and predicts nothing of the next."""
    document_share: float = 0.0
    """Share of the windows that are generated documents with bindings and questions, for a reader
    (`unimatrix ask`); the others are cut from the text, which gives names and filler to all."""
    answer_weight: float = 1.0
    """How much the bytes of a framed answer count in the loss; all others count 1."""

    def __post_init__(self) -> None:
        if not self.data:
            raise InputError("data.data is empty; name a corpus, files or folders")
        _require(
            self, "data", window_tokens=(1, None), document_share=(0, 1), answer_weight=(0, None)
        )
        require_choice("data.documents is", self.documents, DOCUMENTS)
        if self.documents == "packed":
            self._require_apart()
        if self.answer_weight != 1 and not self.document_share:
            raise InputError(
                f"data.answer_weight is {self.answer_weight} and data.document_share is 0; plain "
                "text has no answers, so leave one of them out"
            )
        if self.document_share and self.carried_automaton:
            raise InputError(
                f"data.document_share is {self.document_share} and data.carried_automaton is true; "
                "documents do not continue the text, so leave one of them out"
            )

    def _require_apart(self) -> None:
        """Raise ``InputError`` for what does not go together with documents of their own."""
        if not self.leading_bos:
            raise InputError(
                "data.leading_bos is false and data.documents is 'packed'; documents begin with "
                "BOS, so leave one of them out"
            )
        for name in ("carried_automaton", "document_share"):
            if getattr(self, name):
                raise InputError(
                    f"data.{name} is {getattr(self, name)} and data.documents is 'packed'; a "
                    "window is cut from files that read nothing before them, so leave one of them "
                    "out"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainSection:
    """How a model is optimised."""

    minutes: float | None = None
    """Training budget in minutes of wall-clock. A timed warm-up turns it into a number of steps,
    which is stored; set-up and validation come on top. Excludes `steps`."""
    steps: int | None = None
    """Exact number of optimiser steps. Excludes `minutes`."""
    batch_size: int = 32
    """Windows per optimiser step, over all processes together."""
    accumulation_steps: int = 1
    """Parts that a process cuts its share of a batch into, to save working storage."""
    learning_rate: float = 3e-3
    """Peak learning rate."""
    schedule: str = "cosine"
    """Shape of the learning rate after warm-up: constant, linear, cosine or warmup_stable_decay."""
    warmup_fraction: float = 0.05
    """Share of the steps over which the learning rate rises linearly from 0."""
    cooldown_fraction: float = 0.2
    """Share of the steps, at the end, over which warmup_stable_decay falls to 0."""
    optimizer: str = "adamw_torch_fused"
    """adamw_torch_fused or adamw_torch: the same AdamW, in one kernel or in many; muon: Muon for
    the matrices of linear layers and AdamW for the rest (torch 2.9 or later)."""
    beta1: float = 0.9
    """Decay of AdamW's running mean of gradients."""
    beta2: float = 0.99
    """Decay of AdamW's running mean of squared gradients."""
    weight_decay: float = 0.05
    """Weight decay of AdamW, on matrices; biases, norms and embeddings have none."""
    decay_embeddings: bool = False
    """Apply weight decay to embeddings too."""
    decay_all: bool = False
    """Apply weight decay to every parameter, as the paper does."""
    max_grad_norm: float = 1.0
    """Gradients of a larger norm are scaled down to this one; 0 is off."""
    precision: str = "float32"
    """float32, or bfloat16: autocast of matrix products, float32 weights."""
    compile: bool = False
    """Train through torch.compile, which takes minutes at the start and, on a CPU, a C++ compiler.
    Excludes `minutes`, which would time the compiler."""
    num_threads: int | None = None
    """CPU threads. With none, a budget in minutes takes the faster of one and all of them, and a
    number of steps takes what PyTorch does."""
    seed: int = 0
    """Seed of the initial weights, of the windows drawn and of dropout."""
    log_every_steps: int = 10
    """Steps between two entries of metrics.jsonl and TensorBoard."""
    save_every_steps: int | None = None
    """Steps between two checkpoints; none is a tenth of the run."""
    keep_checkpoints: int = 2
    """Latest checkpoints that are kept."""

    def __post_init__(self) -> None:
        if self.minutes is not None and self.steps is not None:
            raise InputError(
                f"train.minutes is {self.minutes} and train.steps is {self.steps}; give one of them"
            )
        if self.minutes is not None and not 0 < self.minutes < math.inf:
            raise InputError(f"train.minutes is {self.minutes}; it must be greater than 0")
        if self.minutes is not None and self.compile:
            raise InputError(
                f"train.minutes is {self.minutes} and train.compile is true; give --steps, since a "
                "few timed steps would time the compiler"
            )
        _require(
            self,
            "train",
            steps=(1, None),
            batch_size=(1, None),
            accumulation_steps=(1, None),
            learning_rate=(0, None),
            warmup_fraction=(0, 1),
            cooldown_fraction=(0, 1),
            beta1=(0, 1),
            beta2=(0, 1),
            weight_decay=(0, None),
            max_grad_norm=(0, None),
            num_threads=(1, None),
            seed=(0, 2**32 - 1),
            log_every_steps=(1, None),
            save_every_steps=(1, None),
            keep_checkpoints=(1, None),
        )
        require_choice("train.schedule is", self.schedule, SCHEDULES)
        require_choice("train.optimizer is", self.optimizer, OPTIMIZERS)
        require_choice("train.precision is", self.precision, PRECISIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvalSection:
    """How the trained model is judged."""

    protocol: str = "carried"
    """carried: one stream, context kept throughout (models with a position table: windows of its
    length). windows: consecutive windows of the training length, as the paper does."""
    prefix_bytes: int = 131_072
    """Validation bytes that count, from the start of the split; also what xz compresses."""
    prime_bytes: int = 0
    """Training bytes, the last of the split, that are read before the validation bytes and do not
    count (see --prime of eval); carried protocol only."""
    batch_size: int = 16
    """Windows per forward pass with the windows protocol; it does not move the result."""
    sample_bytes: int = 240
    """Length of the text that the trained model writes at the end; 0 is none."""
    questions: int = 0
    """Questions about documents with unseen names and text that the trained model is asked, half of
    them in unseen wordings; 0 is none. At least 8, of a model with an index of the text."""

    def __post_init__(self) -> None:
        require_choice("eval.protocol is", self.protocol, PROTOCOLS)
        _require(
            self,
            "eval",
            prefix_bytes=(1, None),
            prime_bytes=(0, None),
            batch_size=(1, None),
            sample_bytes=(0, None),
            questions=(0, None),
        )
        if 0 < self.questions < 8:
            raise InputError(f"eval.questions is {self.questions}; it must be 0, or at least 8")
        if self.prime_bytes and self.protocol != "carried":
            raise InputError(
                f"eval.prime_bytes is {self.prime_bytes} and eval.protocol is {self.protocol!r}; "
                "only with 'carried' does anything read before still count"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """Everything that decides a training run, apart from the machine it runs on."""

    model: ModelSection = field(default_factory=ModelSection)
    """Which model is trained, and from where it starts."""
    data: DataSection = field(default_factory=DataSection)
    """What text is trained on and how it is cut."""
    train: TrainSection = field(default_factory=TrainSection)
    """How it is optimised."""
    eval: EvalSection = field(default_factory=EvalSection)
    """How it is judged."""

    def to_dict(self) -> dict[str, Any]:
        """Return sections of plain JSON values; ``from_dict`` takes them back unchanged."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Build a recipe from sections; fields left out keep their defaults.

        Raises:
            InputError: for an unknown section or field (with the nearest valid name), or a value of
                the wrong type or range.
        """
        for name, content in values.items():
            if name not in _SECTIONS:
                raise InputError(
                    f"unknown section {name!r} in the recipe; the sections are "
                    f"{', '.join(_SECTIONS)}.{suggest(name, _SECTIONS)}"
                )
            if not isinstance(content, Mapping):
                raise InputError(f"{name} is {content!r}; it must be a section, [{name}]")
        return cls(**{name: _build_section(name, content) for name, content in values.items()})


_SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Recipe)}


def list_recipes() -> list[str]:
    """Return the names of the shipped recipes."""
    folder = resources.files("unimatrix") / "recipes"
    names = [path.name for path in folder.iterdir()]
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Read a shipped recipe by name, or any ``.toml`` or ``.json`` file.

    Raises:
        InputError: if there is no such recipe, or it is ill-formed.
    """
    name = str(name_or_path)
    if name in list_recipes():
        shipped = resources.files("unimatrix") / "recipes" / f"{name}.toml"
        return Recipe.from_dict(parse_toml(shipped.read_text(encoding="utf-8"), name))
    path = Path(name_or_path)
    if not path.is_file():
        raise InputError(
            f"there is no recipe {name!r}; give a .toml file or one of {', '.join(list_recipes())}."
            f"{suggest(name, list_recipes())}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is no UTF-8 text ({error.reason}); is it a recipe?") from error
    parse = parse_json if path.suffix == ".json" else parse_toml
    return Recipe.from_dict(parse(text, name))


def override(recipe: Recipe, assignments: Iterable[str]) -> Recipe:
    """Return a recipe with single fields changed.

    ``train.minutes`` and ``train.steps`` replace each other, and so do ``model.preset`` and
    ``model.init``. A new preset drops all overrides but ``max_position_embeddings``, and new
    ``data.data`` drops ``data.valid_data``.

    An assignment is ``key=value`` of a dotted field (``train.learning_rate=3e-4``) or of a
    configuration field of the model (``model.hidden_size=128``), with ``none`` for no value and a
    list as ``["a", "b"]``.

    Raises:
        InputError: for an assignment without ``=``, an unknown key (with the nearest valid name) or
            an unusable value.
    """
    pairs: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise InputError(f"{assignment!r} sets nothing; write key=value")
        pairs[key.strip()] = parse_value(text)
    return replace_fields(recipe, pairs)


def replace_fields(recipe: Recipe, pairs: Mapping[str, Any]) -> Recipe:
    """Return a recipe with dotted fields replaced, by the rules of ``override``."""
    values = recipe.to_dict()
    _clear_replaced(values, pairs)
    known = list_keys()
    for key, value in pairs.items():
        section, _, name = key.partition(".")
        if key in known:
            values[section][name] = value
        elif section == "model" and name and "." not in name:
            values["model"]["overrides"][name] = value
        else:
            raise InputError(f"unknown recipe key {key!r}.{_suggest_key(key, known)}")
    return Recipe.from_dict(values)


def list_keys() -> list[str]:
    """Return the dotted names of all recipe fields."""
    return [f"{name}.{f.name}" for name, cls in _SECTIONS.items() for f in dataclasses.fields(cls)]


def find_difference(one: Recipe, other: Recipe) -> str | None:
    """Return the dotted name of the first field that differs; ``None`` for equal recipes."""
    for section in dataclasses.fields(Recipe):
        left, right = getattr(one, section.name), getattr(other, section.name)
        for item in dataclasses.fields(left):
            if getattr(left, item.name) != getattr(right, item.name):
                return f"{section.name}.{item.name}"
    return None


def make_paths_absolute(recipe: Recipe) -> Recipe:
    """Return a recipe whose paths hold in every working folder."""
    from unimatrix.data.corpora import make_absolute  # Loads torch, which --help does not need.

    section, init = recipe.data, recipe.model.init
    data = dataclasses.replace(
        section, data=make_absolute(section.data), valid_data=make_absolute(section.valid_data)
    )
    if init is not None and find_packaged(init) is None:
        init = str(Path.cwd() / Path(init).expanduser())
    return dataclasses.replace(
        recipe, model=dataclasses.replace(recipe.model, init=init), data=data
    )


def describe_key(key: str) -> str:
    """Return the help of a dotted field: the docstring under it."""
    section, _, name = key.partition(".")
    return read_field_docs(_SECTIONS[section])[name]


def _clear_replaced(values: dict[str, Any], pairs: Mapping[str, Any]) -> None:
    """Clear the fields of ``values`` that the new ``pairs`` exclude without naming them."""
    for one, other in (("train.minutes", "train.steps"), ("model.preset", "model.init")):
        for new, old in ((one, other), (other, one)):
            if _has_value(pairs, new) and old not in pairs:
                section, _, name = old.partition(".")
                values[section][name] = None
    overrides = values["model"]["overrides"]
    if _has_value(pairs, "model.init"):
        overrides.clear()
    elif _has_value(pairs, "model.preset"):
        lasting = {n: v for n, v in overrides.items() if n == "max_position_embeddings"}
        values["model"]["overrides"] = lasting
    if "data.data" in pairs:
        values["data"]["valid_data"] = []


def _has_value(pairs: Mapping[str, Any], key: str) -> bool:
    return key in pairs and pairs[key] is not None and pairs[key] not in NOTHING


def _build_section(name: str, content: Mapping[str, Any]) -> Any:
    hints = {f.name: f.type for f in dataclasses.fields(_SECTIONS[name])}
    for key in content:
        if key not in hints:
            raise InputError(
                f"unknown key {key!r} in section [{name}]."
                f"{_suggest_key(f'{name}.{key}', list_keys())}"
            )
    fields = {key: convert_value(f"{name}.{key}", v, hints[key]) for key, v in content.items()}
    if fields.get("overrides"):
        fields["overrides"] = _convert_overrides(fields["overrides"])
    return _SECTIONS[name](**fields)


def _convert_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return configuration fields with the types that ``UniMatrixConfig`` declares for them."""
    from unimatrix.configuration import UniMatrixConfig, list_config_fields

    known = list_config_fields()
    annotations = UniMatrixConfig.__init__.__annotations__
    for key in overrides:
        if key not in known:
            raise InputError(
                f"the model has no field {key!r}.{suggest(key, [*known, 'preset', 'init'])}"
            )
    return {k: convert_value(f"model.{k}", v, annotations[k]) for k, v in overrides.items()}


def _suggest_key(key: str, known: list[str]) -> str:
    """Suggest the key nearest to ``key``: by its last name, by initials (``lr``), by spelling."""
    section, _, leaf = key.rpartition(".")
    siblings = [name for name in known if name.startswith(f"{section}.")] or known
    leaves = {name.rpartition(".")[2]: name for name in [*known, *siblings]}
    initials = {"".join(word[0] for word in leaf.split("_")): leaf for leaf in leaves}
    if leaf in leaves or leaf in initials:
        return f" Did you mean {leaves[leaf if leaf in leaves else initials[leaf]]!r}?"
    nearest = difflib.get_close_matches(leaf, [name.rpartition(".")[2] for name in siblings], n=1)
    return f" Did you mean {leaves[nearest[0]]!r}?" if nearest else suggest(key, known)


def _require(section: object, prefix: str, **ranges: tuple[float, float | None]) -> None:
    """Raise ``InputError`` unless each field that is set lies in [low, high], or above low."""
    for name, (low, high) in ranges.items():
        value = getattr(section, name)
        if value is None:
            continue
        if not low <= value <= (math.inf if high is None else high) or value == math.inf:
            wanted = f"at least {low}" if high is None else f"from {low} to {high}"
            raise InputError(f"{prefix}.{name} is {value}; it must be {wanted}")
