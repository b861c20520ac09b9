"""Synthetic tasks: one frozen object each, seeded, knowing no model."""

from unimatrix.tasks.associative import AssociativeRecall
from unimatrix.tasks.chained import ChainedRecall
from unimatrix.tasks.compositional import CompositionalRecall
from unimatrix.tasks.mqar import MultiQueryRecall
from unimatrix.tasks.needle import Needle
from unimatrix.tasks.noisy_keys import NoisyKeys
from unimatrix.tasks.seeded import RotatingDataset, SeededTask
from unimatrix.tasks.triple import TripleInteraction

__all__ = [
    "AssociativeRecall",
    "ChainedRecall",
    "CompositionalRecall",
    "MultiQueryRecall",
    "Needle",
    "NoisyKeys",
    "RotatingDataset",
    "SeededTask",
    "TripleInteraction",
]
