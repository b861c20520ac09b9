"""Sections of a study's TOML, built as dataclasses; loads neither torch nor transformers."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from unimatrix.errors import InputError, suggest
from unimatrix.train.field_types import convert_value
from unimatrix.train.recipe import Recipe

Section = TypeVar("Section")


def build_section(
    section: type[Section], content: Any, prefix: str = "", **decided: Any
) -> Section:
    """Return a section from its fields in TOML; fields left out keep their defaults.

    Args:
        section: a dataclass; fields whose names end with ``overrides`` are configuration fields.
        content: as TOML has it.
        prefix: of the names of the fields in a message, such as ``text.``.
        decided: fields that TOML must not name, with their values.

    Raises:
        InputError: for an unknown key (with the nearest valid name), or an unusable value.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"{prefix[:-1]} is {content!r}; it must be a section, [{prefix[:-1]}]")
    types = {
        field.name: field.type
        for field in dataclasses.fields(section)  # type: ignore[arg-type]
        if field.name not in decided
    }
    fields = dict(decided)
    for key, value in content.items():
        if key not in types:
            raise InputError(f"unknown key {prefix + key!r}.{suggest(key, types)}")
        fields[key] = convert_value(prefix + key, value, types[key])
        if key.endswith("overrides"):
            # A recipe knows the types of configuration fields.
            fields[key] = Recipe.from_dict({"model": {"overrides": fields[key]}}).model.overrides
    return section(**fields)
