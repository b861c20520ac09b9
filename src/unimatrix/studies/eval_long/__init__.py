"""The long-context study: loss and recall by position, far beyond the training length."""
