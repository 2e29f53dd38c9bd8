"""JSON files that the commands write for each other; a damaged one is an error of one line."""

from pathlib import Path
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from cvae.errors import UserError

T = TypeVar("T")


def load(path: Path, kind: TypeAdapter[T]) -> T | None:
    """Returns what the file holds, or None if there is no such file.

    Raises UserError, with the file, the place in it and what is wrong there, if it cannot be read or holds
    something else.
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
    """Returns the place of the first thing that does not fit, and what is wrong there."""
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    place = "".join(f"{key}: " for key in first["loc"])
    return f"{place[:100]}{first['msg'][:200]}"
