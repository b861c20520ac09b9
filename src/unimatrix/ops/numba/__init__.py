"""What compiled loops share: how they are compiled and kept, vector lanes, products, threads."""

NUM_LANES = 16
"""Columns that products inside kernels handle together."""
