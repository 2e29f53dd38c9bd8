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
    """Base of everything read from a file: no unknown key, no silent conversion, no change after."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True
    )


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _number(value: Any) -> Any:
    if type(value) is not int:
        raise ValueError("should be a whole number")
    return value


# For a tuple: YAML knows lists only, while the items stay strict.
FromList = BeforeValidator(_as_tuple)
# For a Literal of numbers: 1 equals true and 1.0.
Number = BeforeValidator(_number)


def load(path: Path, model: type[M], overrides: Iterable[str] = ()) -> M:
    """Reads a YAML file into a model, after replacing the values named by `overrides`.

    overrides: ``block.key=value`` strings; the value is read as YAML.
    Raises UserError with one line: file and line (or "command line"), key, value, what would be right.
    """
    tree, lines = _read(path)
    origin: dict[Key, str] = {key: f"{path}:{line}" for key, line in lines.items()}
    for override in overrides:
        key = _apply(tree, override)
        origin[key] = "command line"
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        # A misspelt key is also a missing one: tell of the misspelling.
        problems = sorted(error.errors(), key=lambda problem: problem["type"] == "missing")
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(_describe(problems[0], model, origin, str(path)) + more) from None


def dump(model: BaseModel, comment: str) -> str:
    """The model as YAML text that `load` reads back to an equal model."""
    return f"# {comment}\n{yaml_reader.dump(model.model_dump(mode='json'))}"


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"latent_dim": 20}} → {"model.latent_dim": 20}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def known_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every dotted key that a file of this model may hold, blocks included."""
    for name, field in model.model_fields.items():
        yield prefix + name
        for part in (field.annotation, *get_args(field.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from known_keys(part, f"{prefix}{name}.")


def leaf_keys(model: type[BaseModel]) -> list[str]:
    """The dotted keys that hold values and not blocks."""
    known = list(known_keys(model))
    return [key for key in known if not any(other.startswith(f"{key}.") for other in known)]


def line_of(path: Path, key: Key) -> int:
    """Where a key stands in a file that `load` has read."""
    return _read(path)[1][key]


def replaced(model: M, values: Mapping[str, Any]) -> M:
    """The model with other values at dotted keys, checked as a whole. Raises UserError with one line."""
    try:
        return type(model).model_validate(_tree_with(model, values))
    except ValidationError as error:
        problem = error.errors()[0]
        given = ", ".join(f"{key} = {shown(value)}" for key, value in values.items())
        raise UserError(_describe(problem, type(model), {}, cut(given, 200))) from None


def wrong_value(model: BaseModel, key: str, value: Any) -> str | None:
    """Why the key can never hold the value, whatever the other keys hold; None where it can."""
    try:
        type(model).model_validate(_tree_with(model, {key: value}))
    except ValidationError as error:
        for problem in error.errors():
            # Parts that do not fit together have no place of their own, or only that of their block.
            if ".".join(str(part) for part in problem["loc"]).startswith(key):
                return _describe(problem, type(model), {}, "").removeprefix(": ")
    return None


def _tree_with(model: BaseModel, values: Mapping[str, Any]) -> dict[str, Any]:
    tree = model.model_dump(mode="json")
    for key, value in values.items():
        *blocks, name = key.split(".")
        below = tree
        for block in blocks:
            below = below[block]
        below[name] = value
    return tree


def _read(path: Path) -> tuple[dict[str, Any], dict[Key, int]]:
    text = _text(path)
    try:
        tree, lines = yaml_reader.parse(text)
    except YamlError as error:
        raise UserError(f"{path}:{error.line}: {error}") from None
    if not isinstance(tree, dict):
        found = "nothing" if tree is None else type(tree).__name__
        raise UserError(f"{path}: must hold `key: value` lines; it holds {found}")
    return tree, lines


def _text(path: Path) -> str:
    try:
        # A pipe without a writer would be waited for without end.
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
        there = sorted(file.name for file in path.parent.glob("*.yaml"))
    except OSError:
        there = []
    more = ", …" if len(there) > 12 else ""
    return f"; there are {', '.join(there[:12])}{more}" if there else ""


def _apply(tree: dict[str, Any], override: str) -> Key:
    name, equals, text = override.partition("=")
    key = tuple(name.strip().split("."))
    where = f"command line: {shown(override)}"
    if not equals or not all(key) or len(key) > _MOST_PARTS:
        raise UserError(f"{where}: an override is key=value, as optimizer.lr=3e-4")
    try:
        value, _ = yaml_reader.parse(text)
    except YamlError as error:
        raise UserError(f"{where}: the value is {error}") from None
    for depth, part in enumerate(key[:-1]):
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            block = ".".join(key[: depth + 1])
            raise UserError(f"{where}: {block} is a value, not a block of keys")
    tree[key[-1]] = value
    return key


def _describe(
    problem: ErrorDetails, model: type[BaseModel], origin: dict[Key, str], path: str
) -> str:
    key = tuple(str(part) for part in problem["loc"])
    name = cut(".".join(key), 100)
    place = next((origin[key[:n]] for n in range(len(key), 0, -1) if key[:n] in origin), path)
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        near = did_you_mean(name, known_keys(model))
        return f"{place}: {name} = {shown(value)}: unknown key{near}"
    if kind == "missing":
        return f"{place}: {name}: missing"
    if kind == "value_error":
        given = "" if isinstance(value, dict | BaseModel) else f" = {shown(value)}"
        return f"{place}: {name}{given}: {problem['ctx']['error']}".replace(": : ", ": ")
    message = re.sub("^(Input|String|Value) ", "", problem["msg"])
    if kind == "string_pattern_mismatch":
        message = "should be letters, digits, '_', '.' and '-', the first a letter or a digit"
    near = ""
    if kind == "literal_error" and isinstance(value, str):
        near = did_you_mean(value, re.findall(r"'([^']*)'", problem["msg"]))
    if kind in ("bool_type", "int_type", "float_type") and isinstance(value, str):
        near = _spelling(value, kind)
    return f"{place}: {name} = {shown(value)}: {message}{near}"


def _spelling(text: str, kind: str) -> str:
    """ "; write …" for a number or a boolean in a spelling that other readers of YAML accept."""
    if kind == "bool_type":
        return "; write true or false" if text.lower() in ("yes", "no", "on", "off") else ""
    if re.fullmatch(r"[-+]?[0-9][0-9_]{,30}", text):
        return f"; write {int(text.replace('_', ''))}"
    return ""
