"""What a line of the journal may contain: the decoder that every reader uses."""

import json
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from cvae.metrics import OBJECTIVE

Line = dict[str, Any]
# Whether a value is valid, and how a message describes valid values.
_Field = tuple[Callable[[Any], bool], str]


class BadLine(ValueError):
    """A line lacks a field that its kind requires, or the field's value is not valid."""


def decode(line: bytes) -> Line:
    """Returns the record in a line. Raises BadLine, and nothing else, if it is not valid.

    Fields and kinds that are not listed below are accepted: later versions may write them.
    """
    try:
        record = json.loads(line.decode("utf-8"))
        if b"\\ud" in line:
            # Half of a surrogate pair could not be printed.
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise BadLine(f"it is not JSON in UTF-8 ({error})") from None
    if not isinstance(record, dict):
        raise BadLine("it is not a JSON object")
    _check(record, _EVERY_KIND)
    fields = _FIELDS.get(record["kind"], {})
    _check(record, fields)
    record["time"] = float(record["time"])
    if record["kind"] == "epoch":
        record["epoch"] = float(record["epoch"])
    if "metrics" in fields:
        record["metrics"] = {name: float(value) for name, value in record["metrics"].items()}
    return record


def _check(record: Line, fields: Mapping[str, _Field]) -> None:
    for name, (is_valid, description) in fields.items():
        if not is_valid(record.get(name)):
            fault = f"is {str(record[name])[:60]!r}" if name in record else "is missing"
            raise BadLine(f"{name} {fault}; it has to be {description}")


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_path(value: Any) -> bool:
    if not isinstance(value, str) or "\0" in value:
        return False
    return not PurePosixPath(value).is_absolute() and ".." not in PurePosixPath(value).parts


def _are_metrics(value: Any) -> bool:
    return isinstance(value, dict) and all(
        type(number) is float or _is_number(number) or number in ("nan", "inf", "-inf")
        for number in value.values()
    )


def _are_hosts(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(host, dict)
        and _is_number(host.get("free_memory"))
        and _is_number(host.get("clock_offset_s"))
        and (host.get("free_disk") is None or _is_number(host["free_disk"]))
        for host in value.values()
    )


def _is_network(value: Any) -> bool:
    names = ("latency_s", "bytes", "seconds")
    return isinstance(value, dict) and all(_is_positive(value.get(n)) and value[n] for n in names)


def _or_none(is_valid: Callable[[Any], bool], description: str) -> _Field:
    return lambda value: value is None or is_valid(value), description


_TEXT: _Field = (_is_text, "a text")
# MLflow's and pandas' integers end at 2**63.
_STEP: _Field = (lambda x: type(x) is int and 0 <= x < 2**63, "a whole number from 0 on")
_SECONDS: _Field = (_is_positive, "a number of seconds")
_METRICS: _Field = (_are_metrics, "numbers by name")
_PATH: _Field = (_is_path, "the name of a file in the run's folder")
_EVERY_KIND: dict[str, _Field] = {
    "kind": _TEXT,
    "time": (lambda x: _is_positive(x) and x < 1e11, "a number of seconds"),  # until the year 5138
}
_START_TEXTS = "device precision engine job_id code commit data_name data_digest data_manifest"
_FIELDS: dict[str, dict[str, _Field]] = {
    "start": {
        "step": _STEP,
        "world_size": _or_none(
            lambda x: type(x) is int and 0 < x < 2**31, "a whole number above 0"
        ),
        "hosts": _or_none(
            lambda x: isinstance(x, list) and all(map(_is_text, x)), "a list of names"
        ),
        "packages": _or_none(
            lambda x: isinstance(x, dict) and all(v is None or _is_text(v) for v in x.values()),
            "versions by package",
        ),
        **dict.fromkeys(_START_TEXTS.split(), _or_none(*_TEXT)),
    },
    "preflight": {
        "hosts": (_are_hosts, "measurements by host"),
        "seconds": _SECONDS,
        "all_reduce": _or_none(_is_network, "latency_s, bytes and seconds"),
    },
    "step": {"step": _STEP, "metrics": _METRICS},
    "system": {"step": _STEP, "metrics": _METRICS},
    "epoch": {
        "step": _STEP,
        "epoch": (_is_positive, "a number from 0 on"),
        "metrics": (
            lambda x: _are_metrics(x) and OBJECTIVE in x,
            f"numbers by name, {OBJECTIVE} among them",
        ),
    },
    "evaluation": {"step": _STEP, "key": _TEXT, "metrics": _METRICS},
    "picture": {"step": _STEP, "key": _TEXT, "path": _PATH},
    "checkpoint": {
        "step": _STEP,
        "path": _PATH,
        "stall_s": _or_none(*_SECONDS),
        "write_s": _or_none(*_SECONDS),
    },
    "artifact": {"path": _PATH, "artifact_path": _or_none(*_TEXT)},
    "notice": {"message": _TEXT},
    "end": {
        "step": _STEP,
        "status": (lambda x: x in ("finished", "failed", "stopped"), "finished, failed or stopped"),
        "reason": _TEXT,
    },
}
