"""Running a trained model: token by token, in ``generate``, and over bytes."""
