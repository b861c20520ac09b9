"""Decoding token by token: the compiled step, and the loop of ``generate`` around it."""

from unimatrix.decoding.support import explain_unsupported, explain_unusable

__all__ = ["explain_unsupported", "explain_unusable"]
