"""How good and how large: bits per byte, recall, what xz reaches, parameters, state bytes."""
