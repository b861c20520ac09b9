"""Training: recipes, the trainer, runs and what they leave on disk."""
