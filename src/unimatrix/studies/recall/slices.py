"""The training and test slices of a recall recipe: which shapes of a task, under which names."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from unimatrix.data import load_corpus
from unimatrix.errors import InputError
from unimatrix.studies.recall.recipe import RecallRecipe
from unimatrix.tasks import (
    AssociativeRecall,
    BindingsQuestion,
    BindingsText,
    ChainedRecall,
    CompositionalRecall,
    MultiQueryRecall,
    Needle,
    NoisyKeys,
    SeededTask,
    TripleInteraction,
    choose_names,
)
from unimatrix.tasks.bindings import count_longest_bytes
from unimatrix.tasks.wordings import FEW, MANY, UNSEEN

_Shapes = tuple[tuple[int, int], ...]
# (window tokens, pairs). Grid A is one model a shape in zoology; here one model learns all four.
_GRID_A = ((64, 4), (128, 8), (256, 16), (512, 64))
_GRID_B_TRAIN = ((64, 4), (128, 8), (256, 16), (256, 32), (256, 64))
_GRID_B_TEST = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
# Two-token keys need 5 P tokens.
_TWO_TOKEN_TRAIN = ((64, 4), (128, 8), (256, 16), (256, 32), (512, 64))
_TWO_TOKEN_TEST = ((64, 4), (64, 8), (128, 16), (256, 32), (512, 64), (1024, 128))
_CHAINED = ((64, 4), (128, 8), (256, 16), (256, 32))
# How each task of multi-query recall is made from a shape, then its shapes of training and tests.
_GRIDS: Mapping[str, tuple[Callable[[int, int], SeededTask], _Shapes, _Shapes]] = {
    "mqar-a": (partial(MultiQueryRecall, random_filler=False), _GRID_A, _GRID_A),
    "mqar-b": (MultiQueryRecall, _GRID_B_TRAIN, _GRID_B_TEST),
    "mqar-forgetting": (partial(MultiQueryRecall, num_rebound=4), _GRID_B_TRAIN, _GRID_B_TEST),
    "mqar-compositional": (CompositionalRecall, _TWO_TOKEN_TRAIN, _TWO_TOKEN_TEST),
    "mqar-chained": (ChainedRecall, _CHAINED, _CHAINED),
}
_NEEDLE_TRAIN_BYTES = 1024
_BINDINGS_TRAIN_BYTES = 512
# A megabyte of a book has hundreds of digits, a training window less than one in the mean.
_NEEDLE_TRAIN_DECOYS = 8


@dataclass(frozen=True, kw_only=True)
class RecallSlices:
    """What is trained on in turn, and what is tested."""

    train: tuple[SeededTask, ...]
    """Tasks that the optimiser steps take in turn."""
    test: Mapping[str, SeededTask]
    """Tests by name."""
    first: SeededTask | None = None
    """Task of the first steps, if they have one of their own."""
    first_fraction: float = 0.0
    """How many of all steps those are."""
    whole_answer: bool = False
    """An example counts when all its labels are right; otherwise by the share that is."""


def build_slices(recipe: RecallRecipe) -> RecallSlices:
    """Return the slices of a recipe of any task.

    Raises:
        InputError: for shapes that the task cannot have, or text that cannot be found.
    """
    task = recipe.task
    if task == "associative":
        length = {} if recipe.test_tokens is None else {"window_tokens": recipe.test_tokens}
        tests = {str(pairs): AssociativeRecall(pairs, **length) for pairs in recipe.test_pairs}
        return RecallSlices(train=(AssociativeRecall(recipe.num_pairs),), test=tests)
    if task in _GRIDS:
        make, train_shapes, test_shapes = _GRIDS[task]
        return RecallSlices(
            train=tuple(make(*shape) for shape in train_shapes),
            test={f"{tokens}x{pairs}": make(tokens, pairs) for tokens, pairs in test_shapes},
        )
    if task == "noisy-keys":
        return RecallSlices(train=(NoisyKeys(),), test={"512x16": NoisyKeys()})
    if task in ("bindings", "reading"):
        return _build_bindings(recipe)
    if task == "needle":
        return _build_needle(recipe)
    return RecallSlices(
        train=(TripleInteraction(),),
        test={rule: TripleInteraction(rule) for rule in TripleInteraction.RULES},
        # What the simplest rule teaches to retrieve, the others have to combine.
        first=TripleInteraction("copy"),
        first_fraction=0.05,
    )


def count_pairs(task: SeededTask) -> int:
    """Return how many bindings an example of a task has."""
    if isinstance(task, ChainedRecall):
        return 2 * task.num_pairs
    if isinstance(task, (AssociativeRecall, MultiQueryRecall, CompositionalRecall, NoisyKeys)):
        return task.num_pairs
    raise InputError("test_slots 0 is as many slots as pairs; this task has none, so give a number")


def _read_texts(recipe: RecallRecipe) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return the text of a recipe for training and for tests, [bytes] uint8 each."""
    corpus = load_corpus(recipe.data, recipe.test_data or None)
    test = corpus.valid if recipe.test_data or corpus.test is None else corpus.test
    return corpus.train.read(0, len(corpus.train)), test.read(0, len(test))


def _build_bindings(recipe: RecallRecipe) -> RecallSlices:
    """Return bindings in the corpus's training text, and questions with names of their own.

    Of the grammar there are tests with sentences that it does not make as well.
    """
    train_text, test_text = _read_texts(recipe)
    names, others = (choose_names(train_text, tests=tests) for tests in (False, True))
    is_few = recipe.task == "bindings"
    wordings = FEW if is_few else MANY
    tests = {"": wordings} if is_few else {"": wordings, " unseen": UNSEEN}
    shapes = [(size, keys) for size in recipe.test_windows for keys in recipe.test_pairs]
    if all(count_longest_bytes(wordings, keys) > size for size, keys in shapes):
        raise InputError(
            f"test_pairs is {list(recipe.test_pairs)} and test_windows is "
            f"{list(recipe.test_windows)}; choose windows of at least "
            f"{count_longest_bytes(wordings, min(recipe.test_pairs))} bytes"
        )
    return RecallSlices(
        train=(BindingsText(_BINDINGS_TRAIN_BYTES, train_text, names, wordings),),
        test={
            f"{size}x{keys}{label}": BindingsQuestion(size, test_text, others, asked, keys)
            for label, asked in tests.items()
            for size, keys in shapes
            if count_longest_bytes(asked, keys) <= size
        },
        whole_answer=True,
    )


def _build_needle(recipe: RecallRecipe) -> RecallSlices:
    """Return needles in the corpus's training text, and of several lengths in its test text."""
    train_text, test_text = _read_texts(recipe)
    return RecallSlices(
        train=(Needle(_NEEDLE_TRAIN_BYTES, train_text, _NEEDLE_TRAIN_DECOYS),),
        test={f"{size}": Needle(size, test_text) for size in recipe.test_windows},
        whole_answer=True,
    )
