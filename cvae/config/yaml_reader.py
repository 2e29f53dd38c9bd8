"""YAML text as plain data: no alias, no tag, no guessed type."""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

Key = tuple[str, ...]

_DEEPEST = 20
# Python refuses to print integers of more than 4,300 digits.
_LONGEST_NUMBER = 100
# Control characters, surrogates, and line ends that only YAML knows.
_REFUSED = re.compile(
    r"[^\t\n\r\x20-\x7e\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]|[\u2028\u2029]"
)
# What YAML 1.1 and 1.2 read alike, and 3e-4, which is a number only in 1.2. All else is text, such as
# 12:30:45, 1_000, 010, yes, off and 2026-11-25.
_WORDS = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL"), None),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
    **dict.fromkeys((".nan", ".NaN", ".NAN"), math.nan),
    **{sign + word: math.inf for sign in ("", "+") for word in (".inf", ".Inf", ".INF")},
    **{f"-{word}": -math.inf for word in (".inf", ".Inf", ".INF")},
}
_WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)|0x[0-9a-fA-F]+")
_REAL = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_Parser = getattr(yaml, "CLoader", yaml.Loader)


class YamlError(ValueError):
    """The text is not YAML, or is more than plain data; the message does not include the line."""

    def __init__(self, reason: str, line: int):
        super().__init__(reason)
        self.line = line


def parse(text: str) -> tuple[Any, dict[Key, int]]:
    """Returns the data of a YAML text, and the line of every key and list item by its path of keys.

    Keys are always text. Raises YamlError.
    """
    _check_characters(text, 1)
    reader = _Reader(text)
    try:
        return reader.document(), reader.lines
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        indent = re.match(r"\s*", "".join(text.splitlines()[line - 1 : line]))
        tab = "; indent by spaces, not by tabs" if indent and "\t" in indent[0] else ""
        raise YamlError(f"not valid YAML: {error.problem or error.context}{tab}", line) from None
    except YamlError:
        raise
    except (yaml.YAMLError, ValueError) as error:
        raise YamlError(f"not valid YAML: {error}", 1) from None


def dump(tree: Any) -> str:
    """Returns plain data as text that `parse` reads back to equal data."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


class _Dumper(yaml.SafeDumper):
    """Quotes every text that YAML 1.1 or `parse` would take for something else."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", _REAL, list("-+.0123456789"))


class _Reader:
    """Builds data from the parser's events, so that nothing is expanded and no object is constructed."""

    def __init__(self, text: str):
        self.events: Iterator[yaml.Event] = yaml.parse(text, Loader=_Parser)
        self.lines: dict[Key, int] = {}

    def document(self) -> Any:
        next(self.events)
        event = next(self.events)
        if isinstance(event, yaml.StreamEndEvent):
            return None
        tree = self._value(next(self.events), ())
        next(self.events)
        event = next(self.events)
        if not isinstance(event, yaml.StreamEndEvent):
            raise YamlError("a second document begins (---); one file holds one", _line(event))
        return tree

    def _value(self, event: yaml.Event, key: Key) -> Any:
        _check_plain(event)
        if isinstance(event, yaml.ScalarEvent):
            return _scalar(event)
        if len(key) >= _DEEPEST:
            raise YamlError(f"nested deeper than {_DEEPEST} levels", _line(event))
        return self._list(key) if isinstance(event, yaml.SequenceStartEvent) else self._block(key)

    def _list(self, key: Key) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            item_key = (*key, str(len(items)))
            self.lines[item_key] = _line(event)
            items.append(self._value(event, item_key))
        return items

    def _block(self, key: Key) -> dict[str, Any]:
        block: dict[str, Any] = {}
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            _check_plain(event)
            line = _line(event)
            if not isinstance(event, yaml.ScalarEvent):
                raise YamlError("a key must be a word, not a list or a block", line)
            name: str = event.value
            _check_characters(name, line)
            item_key = (*key, name)
            if name == "<<":
                raise YamlError("merge keys (<<) are not read; write the keys out", line)
            if name in block:
                raise YamlError(f"{'.'.join(item_key)[:200]}: given twice", line)
            self.lines[item_key] = line
            block[name] = self._value(next(self.events), item_key)
        return block


def _check_plain(event: yaml.Event) -> None:
    if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
        raise YamlError(
            "anchors (&) and aliases (*) are not read; write the value out, or quote it",
            _line(event),
        )
    tag = getattr(event, "tag", None)
    if tag is not None:
        raise YamlError(f"tags are not read, as {tag[:50]!r}; write a plain value", _line(event))


def _scalar(event: yaml.ScalarEvent) -> Any:
    text: str = event.value
    _check_characters(text, _line(event))
    if not event.implicit[0]:  # quoted, or a block of text
        return text
    if text in _WORDS:
        return _WORDS[text]
    whole = _WHOLE.fullmatch(text)
    if not whole and not _REAL.fullmatch(text):
        return text
    if len(text) > _LONGEST_NUMBER:
        raise YamlError(f"a number of {len(text):,} digits; quote what is text", _line(event))
    if whole:
        return int(text, 16 if text.startswith("0x") else 10)
    return float(text)


def _check_characters(text: str, line: int) -> None:
    if match := _REFUSED.search(text):
        line += text.count("\n", 0, match.start())
        raise YamlError(f"the character U+{ord(match[0]):04X} is not allowed", line)


def _line(event: yaml.Event) -> int:
    mark = event.start_mark
    return mark.line + 1 if mark else 1
