"""Compiled paths for the model's parts, and the plan that says which of them run."""
