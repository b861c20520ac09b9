"""Speed and bytes of models, side by side in one process and one run."""
