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
    """Return a dataclass from its fields in TOML; fields left out keep their defaults.

    Args:
        section: the dataclass; names that end with ``overrides`` hold configuration fields.
        content: as TOML has it.
        prefix: of the names in a message, such as ``text.``.
        decided: fields that TOML must not name, with their values.

    Raises:
        InputError: for an unknown key (with the nearest valid name), or an unusable value.
    """
    if not isinstance(content, Mapping):
        raise InputError(f"{prefix[:-1]} is {content!r}; it must be a section, [{prefix[:-1]}]")
    every: Any = section
    types = {f.name: f.type for f in dataclasses.fields(every) if f.name not in decided}
    fields = dict(decided)
    for key, value in content.items():
        if key not in types:
            raise InputError(f"unknown key {prefix + key!r}.{suggest(key, types)}")
        fields[key] = convert_value(prefix + key, value, types[key])
        if key.endswith("overrides"):
            # A recipe knows the types of configuration fields.
            fields[key] = Recipe.from_dict({"model": {"overrides": fields[key]}}).model.overrides
    return section(**fields)


def require_at_least(least: int, section: object, prefix: str, *names: str) -> None:
    """Raise ``InputError`` unless each of the named fields is ``least`` or more."""
    for name in names:
        value = getattr(section, name)
        if value < least:
            raise InputError(f"{prefix}{name} is {value}; it must be at least {least}")
