"""Synthetic tasks: one frozen object each, seeded, knowing no model."""

from unimatrix.tasks.associative import AssociativeRecall

__all__ = ["AssociativeRecall"]
