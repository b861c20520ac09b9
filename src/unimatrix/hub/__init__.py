"""Meeting the rest of Hugging Face: Auto classes, saved folders, published checkpoints, clients."""
