"""Running a trained model: token by token, in ``generate``, over bytes and over whole streams."""
