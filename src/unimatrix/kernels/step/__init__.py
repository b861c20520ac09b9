"""One token of a model, from ids to logits, in one compiled call."""
