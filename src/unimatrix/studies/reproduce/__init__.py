"""The paper's claims: published value, recipe, our value, verdict."""
