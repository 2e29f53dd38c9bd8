"""YAML files as strict pydantic models, with errors that name file, line, key and the nearest right key."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from cvae.config import yaml_reader
from cvae.config.yaml_reader import Key, YamlError
from cvae.errors import UserError, cut, did_you_mean, shown

_MOST_BYTES = 1_000_000
_MOST_PARTS = 8
M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """Base of everything read from a file: no unknown keys, no implicit conversions, immutable."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True
    )


def _whole_number(value: Any) -> Any:
    if type(value) is not int:
        raise ValueError("should be a whole number")
    return value


FromList = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""For a tuple: YAML only has lists. The items stay strict."""
Number = BeforeValidator(_whole_number)
"""For a Literal of numbers, which would also accept true and 1.0 for 1."""


def load(path: Path, model: type[M], overrides: Iterable[str] = ()) -> M:
    """Reads a YAML file into a model, after replacing values by `overrides`.

    overrides: ``block.key=value`` strings, whose values are read as YAML. Raises UserError with one
    line: file and line (or "command line"), key, value, and what would be right.
    """
    tree, lines = _read(path)
    origin: dict[Key, str] = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        origin[_apply(tree, override)] = "command line"
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        # A misspelt key is also a missing one: report the misspelling.
        problems = sorted(error.errors(), key=lambda problem: problem["type"] == "missing")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(_describe(problems[0], model, origin, str(path)) + more) from None


def dump(model: BaseModel, comment: str) -> str:
    """Returns the model as YAML, which `load` reads back to an equal model, below a comment line."""
    return f"# {comment}\n{yaml_reader.dump(model.model_dump(mode='json'))}"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"model.latent_dim": 20} for {"model": {"latent_dim": 20}}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yields every dotted key that a file of this model may contain, blocks included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from known_keys(part, f"{prefix}{name}.")


def leaf_keys(model: type[BaseModel]) -> list[str]:
    """Returns the dotted keys that hold values, not blocks."""
    known = list(known_keys(model))
    return [key for key in known if not any(other.startswith(f"{key}.") for other in known)]


def line_of(path: Path, key: Key) -> int:
    """Returns the line of a key in a file that `load` has read."""
    return _read(path)[1][key]


def replaced(model: M, values: Mapping[str, Any]) -> M:
    """Returns the model with other values at dotted keys. Raises UserError if it is not valid."""
    try:
        return type(model).model_validate(_tree_with(model, values))
    except ValidationError as error:
        given = ", ".join(f"{key} = {shown(value)}" for key, value in values.items())
        raise UserError(_describe(error.errors()[0], type(model), {}, cut(given, 200))) from None


def wrong_value(model: BaseModel, key: str, value: Any) -> str | None:
    """Returns why a key can never have a value, whatever the other keys are; None if it can."""
    try:
        type(model).model_validate(_tree_with(model, {key: value}))
    except ValidationError as error:
        for problem in error.errors():
            # An error of parts that do not fit together has no place, or only that of their block.
            if ".".join(str(part) for part in problem["loc"]).startswith(key):
                return _describe(problem, type(model), {}, "").removeprefix(": ")
    return None


def _tree_with(model: BaseModel, values: Mapping[str, Any]) -> dict[str, Any]:
    tree = model.model_dump(mode="json")
    for key, value in values.items():
        *blocks, name = key.split(".")
        parent = tree
        for block in blocks:
            parent = parent[block]
        parent[name] = value
    return tree


def _read(path: Path) -> tuple[dict[str, Any], dict[Key, int]]:
    try:
        tree, lines = yaml_reader.parse(_text(path))
    except YamlError as error:
        raise UserError(f"{path}:{error.line}: {error}") from None
    if not isinstance(tree, dict):
        kind = "nothing" if tree is None else type(tree).__name__
        raise UserError(f"{path}: must hold `key: value` lines; it holds {kind}")
    return tree, lines


def _text(path: Path) -> str:
    try:
        # Opening a pipe without a writer would block.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            os.set_blocking(file.fileno(), True)
            content = file.read(_MOST_BYTES + 1)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file{_siblings(path)}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None
    if len(content) > _MOST_BYTES:
        raise UserError(f"{path}: is larger than 1 MB, which no such file needs")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: is not text in UTF-8; save it in that encoding") from None


def _siblings(path: Path) -> str:
    try:
        names = sorted(file.name for file in path.parent.glob("*.yaml"))
    except OSError:
        names = []
    more = ", …" if len(names) > 12 else ""
    return f"; there are {', '.join(names[:12])}{more}" if names else ""


def _apply(tree: dict[str, Any], override: str) -> Key:
    """Puts the value of a key=value into the tree and returns the key."""
    name, equals, text = override.partition("=")
    key = tuple(name.strip().split("."))
    place = f"command line: {shown(override)}"
    if not equals or not all(key) or len(key) > _MOST_PARTS:
        raise UserError(f"{place}: an override is key=value, as optimizer.lr=3e-4")
    try:
        value, _ = yaml_reader.parse(text)
    except YamlError as error:
        raise UserError(f"{place}: the value is {error}") from None
    for depth, part in enumerate(key[:-1], 1):
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            raise UserError(f"{place}: {'.'.join(key[:depth])} is a value, not a block of keys")
    tree[key[-1]] = value
    return key


def _describe(
    problem: ErrorDetails, model: type[BaseModel], origin: dict[Key, str], path: str
) -> str:
    """Returns pydantic's error as one line. origin: where keys were read; path: where other keys were."""
    key = tuple(str(part) for part in problem["loc"])
    name = cut(".".join(key), 100)
    place = next((origin[key[:n]] for n in range(len(key), 0, -1) if key[:n] in origin), path)
    kind, value = problem["type"], problem["input"]
    if kind == "missing":
        return f"{place}: {name}: missing"
    if kind == "value_error":
        given = "" if isinstance(value, dict | BaseModel) else f" = {shown(value)}"
        return f"{place}: {name}{given}: {problem['ctx']['error']}".replace(": : ", ": ")
    message = re.sub("^(Input|String|Value) ", "", problem["msg"])
    if kind == "extra_forbidden":
        message = f"unknown key{did_you_mean(name, known_keys(model))}"
    elif kind == "string_pattern_mismatch":
        message = "should be letters, digits, '_', '.' and '-', the first a letter or a digit"
    elif kind == "literal_error" and isinstance(value, str):
        message += did_you_mean(value, re.findall(r"'([^']*)'", problem["msg"]))
    elif kind == "bool_type" and str(value).lower() in ("yes", "no", "on", "off"):
        message += "; write true or false"
    elif kind in ("int_type", "float_type") and re.fullmatch("[-+]?[0-9][0-9_]{,30}", str(value)):
        message += f"; write {int(str(value).replace('_', ''))}"
    return f"{place}: {name} = {shown(value)}: {message}"
