"""Synthetic tasks: one frozen object each, seeded, knowing no model."""

from unimatrix.tasks.associative import AssociativeRecall
from unimatrix.tasks.bindings import BindingsQuestion, BindingsText, choose_names
from unimatrix.tasks.chained import ChainedRecall
from unimatrix.tasks.compositional import CompositionalRecall
from unimatrix.tasks.mixed_windows import MixedWindows
from unimatrix.tasks.mqar import MultiQueryRecall
from unimatrix.tasks.needle import Needle
from unimatrix.tasks.noisy_keys import NoisyKeys
from unimatrix.tasks.reader import NOT_IN_TEXT, ReaderText, frame_question
from unimatrix.tasks.seeded import RotatingDataset, SeededTask
from unimatrix.tasks.triple import TripleInteraction

__all__ = [
    "NOT_IN_TEXT",
    "AssociativeRecall",
    "BindingsQuestion",
    "BindingsText",
    "ChainedRecall",
    "CompositionalRecall",
    "MixedWindows",
    "MultiQueryRecall",
    "Needle",
    "NoisyKeys",
    "ReaderText",
    "RotatingDataset",
    "SeededTask",
    "TripleInteraction",
    "choose_names",
    "frame_question",
]
