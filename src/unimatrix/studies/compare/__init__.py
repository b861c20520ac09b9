"""A comparison: every model in the same harness, at equal parameters and at equal time."""
