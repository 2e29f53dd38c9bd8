"""A stand-in for pydantic on machines that lack it, so that the product's modules can be imported there.

It fills in defaults, builds nested models and reads and writes JSON. It checks next to nothing: the experiments of
these checks are right by construction, and the tests run with the real package.
"""

import copy
import importlib.machinery
import importlib.util
import inspect
import json
import sys
import types
import typing
from collections.abc import Callable
from typing import Any

VERSION = "stand-in"
_MISSING: Any = object()


def install_if_needed() -> bool:
    """Puts the stand-in in pydantic's place if pydantic is not installed; returns whether it did."""
    if importlib.util.find_spec("pydantic") is not None:
        return False
    for name in ("pydantic", "pydantic_core"):
        module = types.ModuleType(name)
        module.__dict__.update(_NAMES)
        module.__dict__["__getattr__"] = _anything_named
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)  # find_spec asks for it
        sys.modules[name] = module
    return True


def _anything_named(attribute: str) -> "_Anything":
    if attribute.startswith("__"):
        raise AttributeError(attribute)
    return _Anything()


class _Anything:
    """Takes the place of what the checks do without: types, markers, decorators."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        pass

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        whole = len(arguments) == 1 and not options and callable(arguments[0])
        return arguments[0] if whole else _Anything()

    def __getitem__(self, item: Any) -> Any:
        return item


class ValidationError(ValueError):
    """Raised for a missing or an unknown key."""

    def __init__(self, kind: str, key: str, value: Any) -> None:
        super().__init__(f"{key}: {kind}")
        self._error = {"type": kind, "loc": (key,), "msg": kind, "input": value, "ctx": {}}

    def errors(self, **options: Any) -> list[dict[str, Any]]:
        return [self._error]


class FieldInfo:
    def __init__(self, annotation: Any, default: Any, factory: Callable[[], Any] | None):
        self.annotation, self.default, self.factory = annotation, default, factory


class BaseModel:
    model_config: typing.ClassVar[dict[str, Any]] = {}
    model_fields: typing.ClassVar[dict[str, FieldInfo]] = {}

    def __init_subclass__(cls) -> None:
        fields = dict(cls.model_fields)
        for name, annotation in inspect.get_annotations(cls).items():
            given = cls.__dict__.get(name, _MISSING)
            if name.startswith("_") or name == "model_config" or "ClassVar" in str(annotation):
                continue
            info = given if isinstance(given, FieldInfo) else FieldInfo(None, given, None)
            info.annotation = annotation
            fields[name] = info
        cls.model_fields = fields

    def __init__(self, **values: Any) -> None:
        if self.model_config.get("extra") == "forbid":
            for key in values.keys() - self.model_fields.keys():
                raise ValidationError("extra_forbidden", key, values[key])
        hints = typing.get_type_hints(type(self))
        for name, info in self.model_fields.items():
            if name in values:
                value = _converted(hints[name], values[name])
            elif info.factory is not None:
                value = info.factory()
            elif info.default is not _MISSING:
                value = copy.deepcopy(info.default)
            else:
                raise ValidationError("missing", name, values)
            self.__dict__[name] = value
        for part in reversed(type(self).__mro__):
            for member in part.__dict__.values():
                if getattr(member, "_checks_after", False):
                    member(self)

    @classmethod
    def model_validate(cls, tree: Any, **options: Any) -> Any:
        return tree if isinstance(tree, cls) else cls(**tree)

    @classmethod
    def model_validate_json(cls, text: str | bytes, **options: Any) -> Any:
        return cls(**json.loads(text))

    def model_dump(
        self, mode: str = "python", include: set[str] | None = None, **options: Any
    ) -> dict[str, Any]:
        names = [name for name in self.model_fields if include is None or name in include]
        return {name: _dumped(self.__dict__[name], mode) for name in names}

    def model_dump_json(self, indent: int | None = None, **options: Any) -> str:
        return json.dumps(self.model_dump(mode="json"), indent=indent)

    def model_copy(self, update: dict[str, Any] | None = None, deep: bool = False) -> Any:
        other = copy.copy(self)
        other.__dict__.update(update or {})
        return other

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.__dict__})"


class TypeAdapter:
    def __init__(self, kind: Any, **options: Any) -> None:
        self.kind = kind

    def __class_getitem__(cls, item: Any) -> Any:
        return cls

    def validate_python(self, value: Any, **options: Any) -> Any:
        return _converted(self.kind, value)

    def validate_json(self, text: str | bytes, **options: Any) -> Any:
        return _converted(self.kind, json.loads(text))

    def dump_python(self, value: Any, mode: str = "python", **options: Any) -> Any:
        return _dumped(value, mode)

    def dump_json(self, value: Any, indent: int | None = None, **options: Any) -> bytes:
        return json.dumps(_dumped(value, "json"), indent=indent).encode()


def _converted(kind: Any, value: Any) -> Any:
    """The value as its annotation wants it: models from dictionaries, tuples from lists, floats from integers."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        known = [part for part in parts if part is not type(None)]
        return None if value is None else _converted(known[0], value)
    if origin is typing.Annotated:
        return _converted(parts[0], value)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return kind.model_validate(value)
    if kind is float and isinstance(value, int):
        return float(value)
    if origin is dict:
        return {key: _converted(parts[1], item) for key, item in value.items()}
    if origin is list:
        return [_converted(parts[0], item) for item in value]
    if origin is tuple:
        kinds = [parts[0]] * len(value) if parts[-1] is Ellipsis else parts
        return tuple(_converted(k, item) for k, item in zip(kinds, value, strict=True))
    return value


def _dumped(value: Any, mode: str) -> Any:
    if isinstance(value, BaseModel):
        return value.model_dump(mode)
    if isinstance(value, dict):
        return {key: _dumped(item, mode) for key, item in value.items()}
    if isinstance(value, list) or (isinstance(value, tuple) and mode == "json"):
        return [_dumped(item, mode) for item in value]
    return value


def field(
    default: Any = _MISSING, default_factory: Callable[[], Any] | None = None, **rules: Any
) -> Any:
    """pydantic.Field."""
    return FieldInfo(None, _MISSING if default is ... else default, default_factory)


def model_validator(mode: str) -> Callable[[Any], Any]:
    def mark(function: Any) -> Any:
        if mode == "after":
            function._checks_after = True
        return function

    return mark


_NAMES = {
    "BaseModel": BaseModel,
    "TypeAdapter": TypeAdapter,
    "ConfigDict": dict,
    "Field": field,
    "ValidationError": ValidationError,
    "model_validator": model_validator,
    "__version__": VERSION,
}
