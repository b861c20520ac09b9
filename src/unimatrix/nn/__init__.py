"""Modules around one operator each: projections, gates, and no loop over tokens."""
