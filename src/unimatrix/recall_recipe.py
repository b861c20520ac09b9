"""The paper's associative-recall recipe; loads neither torch nor transformers."""

from dataclasses import dataclass, field
from typing import Any

from unimatrix.recipe import TrainSection


@dataclass(frozen=True, kw_only=True, slots=True)
class RecallRecipe:
    """What is trained on associative recall, how, and on what it is tested.

    Source: paper, associative recall; vocabulary of 64 ids, 128 tokens, one label an example.
    """

    preset: str = "sparsepointer"
    """Preset to train with fresh weights."""
    dropout: float = 0.1
    """Dropout probability in training."""
    num_slots: int | None = None
    """Slots of a preset that has them; none is the preset's own number."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Configuration fields that differ from the preset."""
    num_pairs: int = 4
    """Bindings in a training example, 1 to 8."""
    steps: int = 200
    """Optimiser steps."""
    batch_size: int = 32
    """Examples in an optimiser step."""
    learning_rate: float = 3e-4
    """Learning rate, constant."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, on every parameter."""
    test_pairs: tuple[int, ...] = (4, 6, 8)
    """Bindings in a test example, one test each."""
    test_examples: int = 64 * 32
    """Examples of each test; none is seen in training."""
    seed: int = 19
    """Seed of weights, examples and dropout."""

    def to_train_section(self) -> TrainSection:
        """Return the settings of the optimiser: plain AdamW, as in the paper."""
        return TrainSection(
            steps=self.steps,
            batch_size=self.batch_size,
            learning_rate=self.learning_rate,
            schedule="constant",
            warmup_fraction=0.0,
            optimizer="adamw_torch",
            beta1=0.9,
            beta2=0.999,
            weight_decay=self.weight_decay,
            decay_all=True,
            max_grad_norm=1.0,
            seed=self.seed,
        )
