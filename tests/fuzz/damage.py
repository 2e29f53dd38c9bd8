"""What becomes of the files of a folder: bytes changed, values of other types, files gone or something else."""

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

VALUES: list[Any] = [
    None,
    True,
    -1,
    7,
    1.5,
    1e300,
    10**40,
    "x",
    "",
    "é\ud800",
    [],
    [1],
    [[]],
    {},
    {"x": {}},
]
BYTES = [
    *(b"", b"\0", b"\xff\xfe\x00", b"[" * 30_000, b"{}", b"[]", b"null", b"7", b'"x"', b"[[]]"),
    *(b"[null]", b"9" * 5000, b"\n\n", b"- &a [*a]", b"{\xe9: 1}", b"NaN", b"[{}]", b"{" * 200),
    b"x: " + b"y" * 100_000,
]


def other_value(draw: random.Random, tree: Any) -> Any:
    """The tree with one value, somewhere in it, of another kind or gone."""
    if isinstance(tree, dict) and tree and draw.random() < 0.9:
        key = draw.choice(list(tree))
        if draw.random() < 0.25:
            return {name: value for name, value in tree.items() if name != key}
        return {**tree, key: other_value(draw, tree[key])}
    if isinstance(tree, list) and tree and draw.random() < 0.9:
        place = draw.randrange(len(tree))
        return [*tree[:place], other_value(draw, tree[place]), *tree[place + 1 :]]
    return draw.choice(VALUES)


def damaged(draw: random.Random, content: bytes) -> bytes:
    """Other content: cut, with bytes changed, something else, or well-formed with other values."""
    kind = draw.randrange(6)
    place = draw.randrange(len(content) or 1)
    if kind == 0:
        return content[:place]
    if kind == 1:
        return content[:place] + draw.choice(BYTES) + content[place + draw.randrange(40) :]
    if kind == 2:
        return draw.choice(BYTES)
    if kind == 3:
        changed = bytearray(content or b"x")
        for _ in range(draw.choice([1, 1, 3])):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        return bytes(changed)
    try:
        return json.dumps(other_value(draw, json.loads(content))).encode()
    except (ValueError, RecursionError):
        pass
    try:
        lines = [json.loads(line) for line in content.splitlines()]
    except (ValueError, RecursionError):
        words = content.decode("latin-1").split("\n")
        words[draw.randrange(len(words))] += draw.choice([": {", "- x", " !!int ''", ": 7", "\t"])
        return "\n".join(words).encode("latin-1")
    for _ in range(3 if lines else 0):
        at = draw.randrange(len(lines))
        lines[at] = other_value(draw, lines[at])
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()


def damage_a_file(draw: random.Random, folder: Path, files: list[str]) -> str:
    """Damages one of these files of a folder, and says which and how."""
    name = draw.choice(files)
    file = folder / name
    act = draw.random()
    if not file.is_file():
        return f"{name}: gone before"
    if act < 0.8:
        content = damaged(draw, file.read_bytes())
        file.write_bytes(content)
        return f"{name}: {content[:200]!r}"
    file.unlink()
    if act < 0.86:
        file.mkdir()
        return f"{name}: a folder"
    if act < 0.92:
        file.symlink_to(draw.choice(["nowhere", file.name, "."]))
        return f"{name}: a link to {file.readlink()}"
    return f"{name}: removed"


def contents(folder: Path) -> dict[str, Any]:
    """Everything below a folder by name: the bytes of files, the targets of links."""
    return {
        str(file.relative_to(folder)): file.readlink()
        if file.is_symlink()
        else (file.read_bytes() if file.is_file() else None)
        for file in sorted(folder.rglob("*"))
    }


@contextmanager
def untouched(*folders: Path) -> Iterator[None]:
    """Raises AssertionError if what is done has changed anything below these folders."""
    before = [contents(folder) for folder in folders]
    try:
        yield
    finally:
        for folder, was in zip(folders, before, strict=True):
            now = contents(folder)
            changed = [name for name in {**was, **now} if was.get(name, ...) != now.get(name, ...)]
            assert not changed, f"{changed[:5]} of {folder.name} were changed by a reader"


def copy(original: Path, folder: Path) -> None:
    shutil.copytree(original, folder, symlinks=True, dirs_exist_ok=True)
