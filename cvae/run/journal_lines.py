"""What a line of the journal may say: the one decoder, which every reader uses."""

import json
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

from cvae.metrics import OBJECTIVE

Line = dict[str, Any]


class BadLine(ValueError):
    """A line does not say what its kind has to say; str() names the field."""


def decode(line: bytes) -> Line:
    """Returns what a line says. Raises BadLine, and nothing else, if it is not JSON or lacks what its kind needs.

    Fields and kinds that are not listed are taken as they are: later versions may write them.
    """
    try:
        record = json.loads(line.decode("utf-8"))
        if b"\\ud" in line:
            # Half a pair of surrogates could be printed nowhere.
            json.dumps(record, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise BadLine(f"it is not JSON in UTF-8 ({error})") from None
    if not isinstance(record, dict):
        raise BadLine("it is not a JSON object")
    _check(record, _EVERY_KIND)
    _check(record, _FIELDS.get(record["kind"], {}))
    record["time"] = float(record["time"])
    if record["kind"] == "epoch":
        record["epoch"] = float(record["epoch"])
    if "metrics" in _FIELDS.get(record["kind"], {}):
        record["metrics"] = {name: float(value) for name, value in record["metrics"].items()}
    return record


def _check(record: Line, fields: Mapping[str, "_Field"]) -> None:
    for name, (fits, wanted) in fields.items():
        if not fits(record.get(name)):
            found = f"is {str(record[name])[:60]!r}" if name in record else "is missing"
            raise BadLine(f"{name} {found}; it has to be {wanted}")


_Field = tuple[Callable[[Any], bool], str]


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300


def _is_metric(value: Any) -> bool:
    return type(value) is float or _is_number(value) or value in ("nan", "inf", "-inf")


def _is_path(value: Any) -> bool:
    """Inside the run's folder."""
    if not isinstance(value, str) or "\0" in value:
        return False
    return not PurePosixPath(value).is_absolute() and ".." not in PurePosixPath(value).parts


def _is_hosts(value: Any) -> bool:
    """As a preflight line has them: what was measured, by host."""
    return isinstance(value, dict) and all(
        isinstance(host, dict)
        and _is_number(host.get("free_memory"))
        and _is_number(host.get("clock_offset_s"))
        and (host.get("free_disk") is None or _is_number(host["free_disk"]))
        for host in value.values()
    )


def _is_network(value: Any) -> bool:
    return isinstance(value, dict) and all(
        _is_number(value.get(name)) and value[name] > 0
        for name in ("latency_s", "bytes", "seconds")
    )


def _or_none(field: _Field) -> _Field:
    fits, wanted = field
    return lambda value: value is None or fits(value), wanted


_TEXT: _Field = (lambda value: isinstance(value, str), "a text")
# 2**63 is the end of MLflow's and pandas' integers.
_STEP: _Field = (lambda x: type(x) is int and 0 <= x < 2**63, "a whole number from 0 on")
_RANKS: _Field = (lambda x: type(x) is int and 0 < x < 2**31, "a whole number above 0")
# The year 5138: what lies beyond is no date.
_TIME: _Field = (lambda x: _is_number(x) and 0 <= x < 1e11, "a number of seconds")
_SECONDS: _Field = (lambda x: _is_number(x) and x >= 0, "a number of seconds")
_NUMBER: _Field = (lambda x: _is_number(x) and x >= 0, "a number from 0 on")
_METRICS: _Field = (
    lambda value: isinstance(value, dict) and all(map(_is_metric, value.values())),
    "numbers by name",
)
_VALIDATION: _Field = (
    lambda value: _METRICS[0](value) and OBJECTIVE in value,
    f"numbers by name, {OBJECTIVE} among them",
)
_PATH: _Field = (_is_path, "the name of a file in the run's folder")
_HOST_NAMES: _Field = (
    lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "a list of names",
)
_VERSIONS: _Field = (
    lambda value: (
        isinstance(value, dict)
        and all(version is None or isinstance(version, str) for version in value.values())
    ),
    "versions by package",
)
_STATUS: _Field = (
    lambda value: value in ("finished", "failed", "stopped"),
    "finished, failed or stopped",
)
_EVERY_KIND: dict[str, _Field] = {"kind": _TEXT, "time": _TIME}
_FIELDS: dict[str, dict[str, _Field]] = {
    "start": {
        "step": _STEP,
        "world_size": _or_none(_RANKS),
        "hosts": _or_none(_HOST_NAMES),
        "packages": _or_none(_VERSIONS),
        **{
            name: _or_none(_TEXT)
            for name in (
                *("device", "precision", "engine", "job_id", "code", "commit"),
                *("data_name", "data_digest", "data_manifest"),
            )
        },
    },
    "preflight": {
        "hosts": (_is_hosts, "measurements by host"),
        "seconds": _SECONDS,
        "all_reduce": _or_none((_is_network, "latency_s, bytes and seconds")),
    },
    "step": {"step": _STEP, "metrics": _METRICS},
    "system": {"step": _STEP, "metrics": _METRICS},
    "epoch": {"step": _STEP, "epoch": _NUMBER, "metrics": _VALIDATION},
    "evaluation": {"step": _STEP, "key": _TEXT, "metrics": _METRICS},
    "picture": {"step": _STEP, "key": _TEXT, "path": _PATH},
    "checkpoint": {
        "step": _STEP,
        "path": _PATH,
        "stall_s": _or_none(_SECONDS),
        "write_s": _or_none(_SECONDS),
    },
    "artifact": {"path": _PATH, "artifact_path": _or_none(_TEXT)},
    "notice": {"message": _TEXT},
    "end": {"step": _STEP, "status": _STATUS, "reason": _TEXT},
}
