"""Synthetic tasks: one frozen object each, seeded, knowing no model."""

from unimatrix.tasks.associative import AssociativeRecall
from unimatrix.tasks.bindings import BindingsQuestion, BindingsText, choose_names
from unimatrix.tasks.chained import ChainedRecall
from unimatrix.tasks.compositional import CompositionalRecall
from unimatrix.tasks.mqar import MultiQueryRecall
from unimatrix.tasks.needle import Needle
from unimatrix.tasks.noisy_keys import NoisyKeys
from unimatrix.tasks.seeded import RotatingDataset, SeededTask
from unimatrix.tasks.triple import TripleInteraction

__all__ = [
    "AssociativeRecall",
    "BindingsQuestion",
    "BindingsText",
    "ChainedRecall",
    "CompositionalRecall",
    "MultiQueryRecall",
    "Needle",
    "NoisyKeys",
    "RotatingDataset",
    "SeededTask",
    "TripleInteraction",
    "choose_names",
]
