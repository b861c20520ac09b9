"""The command line: one small file a verb; each exposes ``run``, whose docstring is its help."""
