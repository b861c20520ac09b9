"""Two gated linear attentions: the equation as a loop, a chunked form, and a language model."""
