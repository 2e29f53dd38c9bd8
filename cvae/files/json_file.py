"""JSON files that the commands write for each other."""

import json
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from cvae.errors import UserError
from cvae.files.paths import write_atomically

T = TypeVar("T")


def save(path: Path, value: Any) -> None:
    """Writes a value as indented JSON, the whole file or nothing. Raises as write_atomically."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def load(path: Path, kind: TypeAdapter[T]) -> T | None:
    """Returns the content of the file, or None if there is no such file.

    Raises UserError, with the place in the file and what is wrong there, if it cannot be read or is
    not of the given kind.
    """
    try:
        return kind.validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValidationError as error:
        raise UserError(f"{path}: damaged: {first_fault(error)}") from None


def first_fault(error: ValidationError) -> str:
    """Returns the place of the first value that does not validate, and what is wrong with it."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    place = "".join(f"{key}: " for key in first["loc"])
    return f"{place[:100]}{first['msg'][:200]}"
