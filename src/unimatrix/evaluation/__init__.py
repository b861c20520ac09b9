"""How good and how large: bits per byte, recall, copying, what xz reaches, parameters, bytes."""
