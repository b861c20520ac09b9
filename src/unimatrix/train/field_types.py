"""Values from TOML, JSON and the command line, converted to the types of dataclass fields."""

import ast
import inspect
import json
import textwrap
import tomllib
import types
from collections.abc import Mapping
from functools import cache
from typing import Any, get_args, get_origin

from unimatrix.errors import InputError

NOTHING = ("none", "null")
"""What stands for "no value" in text, since TOML has no word for it."""


def parse_value(text: str) -> Any:
    """Return what a command-line value means: a number, a TOML value, or else the text itself."""
    text = text.strip()
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse_toml(text: str, name: str) -> dict[str, Any]:
    """Return the sections of a TOML text; ``name`` is what an ``InputError`` calls it."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{name} is no TOML: {error}; correct it there") from error


def parse_json(text: str, name: str) -> dict[str, Any]:
    """Return the sections of a JSON text; ``name`` is what an ``InputError`` calls it."""
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{name} is no JSON: {error}; correct it there") from error
    if not isinstance(values, dict):
        raise InputError(f"{name} holds no sections; a recipe is an object of sections")
    return values


def convert_value(name: str, value: Any, annotation: Any) -> Any:
    """Return ``value`` as a field's type, or raise ``InputError`` naming the field.

    A whole number is accepted for a float, one string for a list of strings, and a string of
    ``NOTHING`` for ``None`` in a field that may be ``None``.
    """
    if isinstance(annotation, types.UnionType):
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        if len(kinds) < len(get_args(annotation)) and (value is None or value in NOTHING):
            return None
        assert len(kinds) == 1, annotation
        return convert_value(name, value, kinds[0])
    if get_origin(annotation) is tuple:
        return _convert_strings(name, value)
    if get_origin(annotation) is list:
        if not isinstance(value, list | tuple):
            raise InputError(f"{name} is {value!r}; it must be a list")
        (item,) = get_args(annotation)
        return [convert_value(name, element, item) for element in value]
    if get_origin(annotation) is dict:
        if not isinstance(value, Mapping):
            raise InputError(f"{name} is {value!r}; it must be a table of fields")
        return dict(value)
    if annotation is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if annotation is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not annotation:
        kind = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise InputError(f"{name} is {value!r}; it must be {kind[annotation]}")
    return value


def _convert_strings(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise InputError(f"{name} is {value!r}; it must be text or a list of texts")
    return tuple(value)


@cache
def read_field_docs(cls: type) -> Mapping[str, str]:
    """Return the docstring under each field of a dataclass, on one line."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(definition, ast.ClassDef)
    docs = {}
    for line, following in zip(definition.body, [*definition.body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            assert isinstance(following, ast.Expr), f"{line.target.id} has no docstring"
            assert isinstance(following.value, ast.Constant), f"{line.target.id} has no docstring"
            docs[line.target.id] = " ".join(str(following.value.value).split())
    return docs
