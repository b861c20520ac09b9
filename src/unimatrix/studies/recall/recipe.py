"""The recipes of the recall lab, one a task; loads neither torch nor transformers."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from unimatrix.errors import InputError, require_choice
from unimatrix.train.recipe import TrainSection

DEFAULT_PRESET = "unimatrix"
SLOTS_PRESET = "selective"


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallRecipe:
    """What is trained on a recall task, how, and on what it is tested."""

    task: str = "associative"
    """Task of the lab."""
    preset: str = "sparsepointer"
    """Preset to train with fresh weights."""
    dropout: float = 0.1
    """Dropout probability in training."""
    num_slots: int | None = None
    """Slots of a preset that has them; none is the recipe's own number."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Configuration fields that differ from the preset."""
    num_pairs: int = 4
    """Bindings in a training example of associative recall, 1 to 8."""
    steps: int = 200
    """Optimiser steps."""
    batch_size: int = 32
    """Examples in an optimiser step."""
    learning_rate: float = 3e-4
    """Learning rate."""
    schedule: str = "constant"
    """Shape of the learning rate after warm-up: constant, linear or cosine."""
    warmup_fraction: float = 0.0
    """Share of the steps over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, on every parameter."""
    test_pairs: tuple[int, ...] = (4, 6, 8)
    """Bindings in a test example of associative recall or of bindings in text, one test each."""
    test_tokens: int | None = None
    """Length of the tests of associative recall; none is that of the training."""
    test_slots: tuple[int, ...] = ()
    """Slots that the trained model is tested with, one test each; none is what it was built with,
    and 0 is as many as the test has pairs."""
    test_kept: tuple[int, ...] = ()
    """Tokens that the trained model remembers in further tests, all of them once more for each
    number; the first tests are with what it was built with."""
    test_examples: int = 64 * 32
    """Examples of each test; none is seen in training."""
    data: tuple[str, ...] = ("pystdlib",)
    """Text that needle and bindings are hidden in, as in `train`."""
    test_data: tuple[str, ...] = ()
    """Text of the tests of needle and bindings; none is the corpus's test split."""
    test_windows: tuple[int, ...] = (1024, 16_384, 131_072)
    """Lengths of the tests of needle and bindings in bytes."""
    seed: int = 19
    """Seed of weights, examples and dropout."""

    def to_train_section(self) -> TrainSection:
        """Return the settings of the optimiser: AdamW, weight decay on everything."""
        return TrainSection(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            warmup_fraction=self.warmup_fraction,
            optimizer="adamw_torch",
            beta1=0.9,
            beta2=0.999,
            weight_decay=self.weight_decay,
            decay_all=True,
            max_grad_norm=1.0,
            seed=self.seed,
        )


_COSINE: dict[str, Any] = {
    "dropout": 0.0,
    "steps": 600,
    "learning_rate": 3e-3,
    "schedule": "cosine",
    "warmup_fraction": 0.03,
}
# The preset with every part on. A lab model changes its vocabulary, its sizes and how many tokens
# it remembers; the longest match is looked for in all but the oldest 64 of these.
_MQAR: dict[str, Any] = _COSINE | {
    "weight_decay": 0.1,
    "test_examples": 1000,
    "overrides": {"num_hidden_layers": 2, "num_attention_heads": 1, "automaton_window": 1152},
    # The first is what 16 KiB of state hold, the last an eighth of the longest test.
    "test_kept": (470, 256, 128),
}
_BINDINGS: dict[str, Any] = _COSINE | {
    "steps": 1500,
    "batch_size": 8,
    "learning_rate": 4e-3,
    "warmup_fraction": 0.05,
    "weight_decay": 0.05,
    "test_pairs": (1, 3, 8),
    "test_windows": (400, 4096),
    "test_examples": 100,
    "overrides": {
        "hidden_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "intermediate_size": 256,
        "automaton_window": 4096,
    },
}
_FIELDS: dict[str, dict[str, Any]] = {
    "associative": _COSINE | {"steps": 200, "overrides": {"automaton_window": 256}},
    "mqar-a": _MQAR,
    "mqar-b": _MQAR,
    "mqar-forgetting": _MQAR,
    "mqar-compositional": _MQAR,
    "mqar-chained": _MQAR | {"test_kept": ()},
    "noisy-keys": _COSINE
    | {
        "steps": 300,
        "overrides": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "automaton_window": 640,
        },
    },
    "bindings": _BINDINGS,
    # The grammar's sentences, and values of five kinds.
    "reading": _BINDINGS | {"steps": 3000},
    "needle": _COSINE
    | {
        "steps": 250,
        "batch_size": 16,
        "test_examples": 100,
        "overrides": {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "automaton_window": 2**17 + 2**10,
        },
    },
    "triple": _COSINE
    | {
        "steps": 6000,
        "batch_size": 128,
        "learning_rate": 4e-3,
        "overrides": {
            "num_hidden_layers": 2,
            "num_attention_heads": 8,
            "automaton_window": 128,
        },
    },
}

# The lab's models with selective slots: the plainest matrix state and no suffix automaton, so that
# what is recalled is recalled by the slots; keys of one token are the ids themselves, bindings do
# not fade, and in training every write has a place.
_BY_TOKEN = {
    "update_rules": "outer",
    "conv_kernel": 0,
    "slot_key_patterns": [[0]],
    "slot_read_offsets": [0, 1],
    "slot_fade_tokens": None,
    "bounded_training": False,
    "residual_path": "none",
    "automaton_pointer": False,
}
# Slots and pointer alone, asked with the token at hand.
_SLOTS_ALONE = _BY_TOKEN | {
    "slot_read_offsets": [0],
    "update_rules": "none",
    "num_hidden_layers": 1,
}
_SLOTS = _COSINE | {"num_slots": 256}
_SLOTS_MQAR: dict[str, Any] = _SLOTS | {
    "weight_decay": 0.1,
    "test_examples": 1000,
    "overrides": _SLOTS_ALONE,
}
# A letter of the key may be wrong, so no context relies on all of them: three of four behind the
# equals sign, then the equals sign and what of the value is known with one letter of the key.
_NOISY_PATTERNS = [[0, 1, 2, 3], [0, 1, 2, 4], [0, 1, 3, 4], [0, 2, 3, 4], [0, 1, 2], [0, 1, 3]]
_SLOTS_FIELDS: dict[str, dict[str, Any]] = {
    "associative": {
        "num_slots": 8,
        "steps": 400,
        "learning_rate": 1e-3,
        "overrides": _BY_TOKEN,
    },
    "mqar-a": _SLOTS_MQAR,
    "mqar-b": _SLOTS_MQAR,
    "mqar-forgetting": _SLOTS_MQAR,
    "mqar-compositional": _SLOTS_MQAR
    | {"overrides": _SLOTS_ALONE | {"slot_key_patterns": [[0, 1]]}},
    "mqar-chained": _SLOTS_MQAR | {"overrides": _SLOTS_ALONE | {"slot_hops": 2}},
    "noisy-keys": _SLOTS
    | {
        "steps": 300,
        "overrides": _BY_TOKEN
        | {
            "slot_key_patterns": _NOISY_PATTERNS,
            "slot_read_offsets": [0],
            "slot_source": "hidden",
            # The gate asks for the place inside a key and its value, a few letters each.
            "longest_retention": 8,
        },
    },
    "needle": _SLOTS
    | {
        "steps": 250,
        "batch_size": 16,
        "test_examples": 100,
        # Slots do the work; a small stream is enough to tell the gate where a number stands.
        "overrides": _BY_TOKEN
        | {
            "hidden_size": 32,
            "head_dim": 8,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "slot_key_patterns": [[0, 1, 2, 3, 4, 5, 6, 7]],
            "slot_read_offsets": [0],
            "slot_source": "hidden",
        },
    },
    "triple": _SLOTS
    | {
        "num_slots": None,
        "steps": 6000,
        "batch_size": 128,
        "learning_rate": 4e-3,
        # A record reaches over seven tokens, and so does the convolution that ties its values to
        # their tag, which slots of one key cannot. One depth step reads all three, and the
        # feed-forward has to hold the rules.
        "overrides": _BY_TOKEN
        | {
            "associative_memory": "none",
            "pointer": False,
            "num_hidden_layers": 1,
            "num_attention_heads": 8,
            "conv_kernel": 7,
            "intermediate_size": 256,
        },
    },
}


def _make_recipes(
    preset: str, fields: Mapping[str, Mapping[str, Any]]
) -> Mapping[str, RecallRecipe]:
    return {task: RecallRecipe(task=task, preset=preset, **own) for task, own in fields.items()}


ONE_RECIPES: Mapping[str, RecallRecipe] = _make_recipes(DEFAULT_PRESET, _FIELDS)
"""The recipe of every task for the preset with every part on."""
SLOTS_RECIPES: Mapping[str, RecallRecipe] = _make_recipes(SLOTS_PRESET, _SLOTS_FIELDS)
"""Those of selective slots, wired for each task."""
# What the preset with every part on has been seen to learn; the others keep their slots.
_LEARNED = ("associative", "mqar-b", "mqar-compositional", "bindings", "reading")
RECIPES: Mapping[str, RecallRecipe] = {
    task: recipe if task in _LEARNED else SLOTS_RECIPES[task]
    for task, recipe in ONE_RECIPES.items()
}
"""The recipe of every task if no preset is named."""
TASKS = tuple(RECIPES)

_QUICK_STEPS = {
    "associative": 100,
    "bindings": 200,
    "noisy-keys": 120,
    "needle": 120,
    "triple": 400,
}
_QUICK_EXAMPLES = {"associative": 512, "bindings": 20, "reading": 20, "needle": 20, "triple": 512}


def find_recall_recipe(
    task: str, preset: str | None = None, *, quick: bool = False
) -> RecallRecipe:
    """Return the recipe of a task.

    Args:
        task: one of ``TASKS``.
        preset: the preset to train instead of that of ``RECIPES``; ``unimatrix`` and ``selective``
            have recipes of their own, a published one is trained on associative recall as the paper
            does (200 steps at 3e-4, its own slots).
        quick: fewer steps and test examples, to finish in two minutes on two cores.

    Raises:
        InputError: for an unknown task, or a preset that has no recipe for it.
    """
    require_choice("unknown task", task, TASKS)
    by_preset = {DEFAULT_PRESET: ONE_RECIPES, SLOTS_PRESET: SLOTS_RECIPES}
    own = {name: recipes[task] for name, recipes in by_preset.items() if task in recipes}
    if preset is None:
        recipe = RECIPES[task]
    elif preset in own:
        recipe = own[preset]
    elif task == "associative":
        recipe = RecallRecipe(preset=preset)
    else:
        raise InputError(
            f"preset is {preset!r} and {task} has recipes for {' and '.join(own)}; "
            "leave --preset out"
        )
    if quick:
        recipe = replace(
            recipe,
            steps=min(recipe.steps, _QUICK_STEPS.get(task, 250)),
            test_examples=min(recipe.test_examples, _QUICK_EXAMPLES.get(task, 100)),
            test_windows=recipe.test_windows[:-1],
        )
    return recipe
