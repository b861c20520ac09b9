"""Timing, side by side in one process."""
