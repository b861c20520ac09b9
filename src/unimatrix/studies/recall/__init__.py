"""The recall study: how many bindings each model of a list recalls."""
