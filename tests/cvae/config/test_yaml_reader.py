"""YAML: values are read as they are written, and anything but plain data is refused in one short line."""

import math
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest

from cvae.config import yaml_model
from cvae.config.yaml_model import Strict
from cvae.errors import UserError


class Holder(Strict):
    value: Any = None
    whole: int = 0
    real: float = 0.0
    flag: bool = False


def _load(folder: Path, content: str | bytes, overrides: tuple[str, ...] = ()) -> Holder:
    file = folder / "holder.yaml"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return yaml_model.load(file, Holder, overrides)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("12:30:45", "12:30:45"),
        ("1_000", "1_000"),
        ("010", "010"),
        ("0o17", "0o17"),
        ("0b11", "0b11"),
        ("0x1F", 31),
        ("2026-11-25", "2026-11-25"),
        ("2026-11-25 10:00:00", "2026-11-25 10:00:00"),
        ("yes", "yes"),
        ("Off", "Off"),
        ("TRUE", True),
        ("~", None),
        ("", None),
        ("=", "="),
        ("3e-4", 3e-4),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("1.5.2", "1.5.2"),
        ("+7", 7),
        (".inf", math.inf),
        ("'5'", "5"),
        ('"\\u00e9"', "é"),
        ("[1, [2, {a: b}]]", [1, [2, {"a": "b"}]]),
        ("{1: a, on: b, null: c}", {"1": "a", "on": "b", "null": "c"}),
        ("|\n  a\n  b\n", "a\nb\n"),
    ],
)
def test_a_value_is_read_as_it_is_written(tmp_path: Path, text: str, value: object) -> None:
    assert _load(tmp_path, f"value: {text}").value == value
    assert _load(tmp_path, "{}", (f"value={text}",)).value == value


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("&a [*a]", "anchors (&) and aliases (*) are not read"),
        ("*a", "anchors (&) and aliases (*) are not read"),
        ("{<<: {a: 1}}", "merge keys (<<) are not read"),
        ("!!int ''", "tags are not read"),
        ("!!bool maybe", "tags are not read"),
        ("!!timestamp abc", "tags are not read"),
        ("! x", "tags are not read"),
        ("[" * 1000, "nested deeper than 20 levels"),
        ("[" * 100_000, "nested deeper than 20 levels"),
        ("{a: " * 1000, "nested deeper than 20 levels"),
        ("{[a]: b}", "a key must be a word"),
        ("{a: 1, a: 2}", "value.a: given twice"),
        ("[x, {a: 1, 'a': 2}]", "value.1.a: given twice"),
        ('"\\UFFFFFFFF"', "not valid YAML"),
        ('"\\uD800"', ""),
        ('"\\0"', "U+0000 is not allowed"),
        ('"\\e[31m"', "U+001B is not allowed"),
        ("a\0b", "U+0000 is not allowed"),
        ("9" * 5000, "a number of 5,000 digits"),
        ("0x" + "f" * 5000, "a number of 5,002 digits"),
        ("1\n---\nvalue: 2", "a second document"),
        ("\n\tb: c", "indent by spaces"),
        ("[", "not valid YAML"),
        ("'", "not valid YAML"),
        ("a\u2028b", "U+2028 is not allowed"),
    ],
)
def test_anything_but_plain_data_is_refused_in_one_short_line(
    tmp_path: Path, value: str, expected: str
) -> None:
    began = time.monotonic()
    with pytest.raises(UserError) as caught:
        _load(tmp_path, f"value: {value}\n")
    message = str(caught.value).removeprefix(str(tmp_path))
    assert expected in message
    assert message.startswith(("/holder.yaml:1: ", "/holder.yaml:2: ", "/holder.yaml:3: "))
    assert len(message) <= 300
    with pytest.raises(UserError) as caught:
        _load(tmp_path, "{}", (f"value={value}",))
    assert len(str(caught.value)) <= 300
    assert time.monotonic() - began < 2


def test_nested_aliases_are_refused_before_they_grow(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x]"] + [
        f"a{n}: &a{n} [{', '.join(9 * [f'*a{n - 1}'])}]" for n in range(1, 11)
    ]
    with pytest.raises(UserError, match=r":1: anchors"):
        _load(tmp_path, "\n".join(levels))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("whole: 1_000", "whole = '1_000': should be a valid integer; write 1000"),
        ("whole: 010", "write 10"),
        ("whole: 12:30:45", "whole = '12:30:45': should be a valid integer"),
        ("flag: yes", "flag = 'yes': should be a valid boolean; write true or false"),
        ("whole: true", "should be a valid integer"),
        ("real: true", "should be a valid number"),
        ("real: .nan", "should be a finite number"),
        ("whole: 1e3", "whole = 1000.0: should be a valid integer"),
        (f"wrong: {'x' * 500_000}", "unknown key"),
        (f"{'x' * 500}: 1", "unknown key"),
        (f"whole: [{'[x], ' * 1000}]", "should be a valid integer"),
        ("- value", "must hold `key: value` lines; it holds list"),
        ("# nothing", "it holds nothing"),
    ],
)
def test_a_wrong_type_is_reported_in_one_short_line(
    tmp_path: Path, text: str, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        _load(tmp_path, text)
    message = str(caught.value).removeprefix(str(tmp_path))
    assert expected in message
    assert len(message) <= 300


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("value: é".encode("utf-16"), "not text in UTF-8"),
        ("value: é".encode("latin-1"), ":1: is not text in UTF-8"),
        ("value: x".encode("utf-16-le"), "U+0000 is not allowed"),
        (b"value: \xed\xa0\x80", "not text in UTF-8"),
        (b"# " + b"x" * 1_000_000, "larger than 1 MB"),
    ],
)
def test_bytes_that_are_not_text_are_refused(tmp_path: Path, content: bytes, expected: str) -> None:
    with pytest.raises(UserError, match=expected.replace("+", r"\+")):
        _load(tmp_path, content)


def test_windows_line_ends_and_a_byte_order_mark_are_read(tmp_path: Path) -> None:
    assert _load(tmp_path, b"\xef\xbb\xbfwhole: 3\r\nvalue: a b\r\n") == Holder(
        whole=3, value="a b"
    )


@pytest.mark.parametrize(
    "name", ["folder", "pipe", "loop", "n" * 300, "a\0b", "zero", "file/below"]
)
def test_anything_but_a_readable_file_is_a_user_error(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError):
        yaml_model.load(tmp_path / name, Holder)


def test_any_text_survives_a_dump(tmp_path: Path) -> None:
    draw = random.Random(0)
    letters = "0123456789eE+-._:#&*!|>'\"%@`,[]{}?~ =<\n\txyzéß中🙂\u00a0\ufeff"
    words = ["1e5", "yes", "null", "12:30", "0x1f", "<<", "2026-11-25", "1_0", "", " ", "-", "true"]
    words += ["".join(draw.choices(letters, k=draw.randint(1, 12))) for _ in range(300)]
    text = yaml_model.dump(Holder(value=words), "comment")
    assert _load(tmp_path, text).value == words
