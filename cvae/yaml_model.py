"""YAML files as strict pydantic models, with errors that name file, line, key and the nearest right key."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import ErrorDetails

from cvae.errors import UserError

Key = tuple[str, ...]
M = TypeVar("M", bound=BaseModel)


class Strict(BaseModel):
    """Base of everything read from a file: no unknown key, no silent conversion, no change after."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, validate_default=True
    )


class _Loader(yaml.SafeLoader):
    pass


# PyYAML follows YAML 1.1, where 3e-4 is a string; everybody who types a learning rate means YAML 1.2.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


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
    body = yaml.safe_dump(model.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return f"# {comment}\n{body}"


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
    lines = _read(path)[1]
    # What is merged in from elsewhere in the file has only its block's line.
    return next(lines[key[:n]] for n in range(len(key), 0, -1) if key[:n] in lines)


def replaced(model: M, values: Mapping[str, Any]) -> M:
    """The model with other values at dotted keys, checked as a whole. Raises UserError with one line."""
    try:
        return type(model).model_validate(_tree_with(model, values))
    except ValidationError as error:
        problem = error.errors()[0]
        shown = ", ".join(f"{key} = {value!r}" for key, value in values.items())
        raise UserError(_describe(problem, type(model), {}, shown)) from None


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
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = path.parent.glob("*.yaml") if path.parent.is_dir() else ()
        there = ", ".join(sorted(p.name for p in siblings))
        raise UserError(
            f"{path}: no such file" + (f"; there are {there}" if there else "")
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        node = yaml.compose(text, Loader=_Loader)
        tree = yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{path}:{line}: not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}: must hold `key: value` lines, not {type(tree).__name__}")
    return tree, dict(_lines(node, path))


def _lines(node: yaml.MappingNode, path: Path, prefix: Key = ()) -> Iterator[tuple[Key, int]]:
    seen: set[Key] = set()
    for name, value in node.value:
        key = (*prefix, str(name.value))
        line = name.start_mark.line + 1
        if key in seen:
            raise UserError(f"{path}:{line}: {'.'.join(key)}: given twice")
        seen.add(key)
        yield key, line
        if isinstance(value, yaml.MappingNode):
            yield from _lines(value, path, key)


def _apply(tree: dict[str, Any], override: str) -> Key:
    name, equals, text = override.partition("=")
    key = tuple(name.strip().split("."))
    if not equals or not all(key):
        raise UserError(
            f"command line: {override!r}: an override is key=value, as optimizer.lr=3e-4"
        )
    try:
        value = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"command line: {override}: the value is not valid YAML") from None
    for depth, part in enumerate(key[:-1]):
        tree = tree.setdefault(part, {})
        if not isinstance(tree, dict):
            block = ".".join(key[: depth + 1])
            raise UserError(f"command line: {override}: {block} is a value, not a block of keys")
    tree[key[-1]] = value
    return key


def _describe(
    problem: ErrorDetails, model: type[BaseModel], origin: dict[Key, str], path: str
) -> str:
    key = tuple(str(part) for part in problem["loc"])
    name = ".".join(key)
    place = next((origin[key[:n]] for n in range(len(key), 0, -1) if key[:n] in origin), path)
    kind, value = problem["type"], problem["input"]
    if kind == "extra_forbidden":
        return f"{place}: {name} = {value!r}: unknown key{nearest(name, list(known_keys(model)))}"
    if kind == "missing":
        return f"{place}: {name}: missing"
    if kind == "value_error":
        shown = "" if isinstance(value, dict | BaseModel) else f" = {value!r}"
        return f"{place}: {name}{shown}: {problem['ctx']['error']}".replace(": : ", ": ")
    message = problem["msg"].removeprefix("Input ")
    near = ""
    if kind == "literal_error" and isinstance(value, str):
        near = nearest(value, re.findall(r"'([^']*)'", problem["msg"]))
    return f"{place}: {name} = {value!r}: {message}{near}"


def nearest(name: str, candidates: list[str]) -> str:
    """ "; did you mean …?" for a misspelt or misplaced name: by its last part first, then as a whole."""
    leaf = name.rpartition(".")[2]
    leaves = {c.rpartition(".")[2]: c for c in reversed(candidates)}
    whole = difflib.get_close_matches(name, candidates, n=1, cutoff=0.75)
    by_leaf = difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6)
    if leaf in leaves:
        return f"; did you mean {leaves[leaf]}?"
    if whole:
        return f"; did you mean {whole[0]}?"
    return f"; did you mean {leaves[by_leaf[0]]}?" if by_leaf else ""
