"""Studies: many trained cells, each recorded, that answer one question."""
