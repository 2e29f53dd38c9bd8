"""Odd values as YAML text, and trees of plain data with some of them."""

import random
from typing import Any

import yaml

VALUES = [
    *("0", "-1", "1", "2", "3", "7", "64", "100000", "2147483648", "9223372036854775807"),
    *(
        "9223372036854775808",
        "-9223372036854775809",
        "1" + "0" * 90,
        "9" * 5000,
        "0x10",
        "010",
        "1_0",
    ),
    *("0.5", "1.0", "1e3", "1e-400", "1e400", "-0.0", ".inf", "-.inf", ".nan", "1e308", "5e-324"),
    *("true", "false", "yes", "off", "null", "~", "''", '""', "' '", "12:30:45", "2026-11-25"),
    *(
        "[]",
        "{}",
        "[[]]",
        "[1, 2]",
        "[0.9, 0.99, 0.999]",
        "[true, '1']",
        "{a: 1}",
        "{a: {b: {c: 1}}}",
    ),
    *(
        "x",
        "..",
        ".",
        "../x",
        "/etc",
        "a/b",
        "-x",
        "--wrap=x",
        "latest",
        "x y",
        "x\\ny",
        "a,b",
        "é",
        "中",
    ),
    *(
        "&a [*a]",
        "*a",
        "!!int ''",
        "!!python/object:os.system x",
        "{a: 1, a: 2}",
        "<<",
        "{<<: {a: 1}}",
    ),
    *('"\\u0000"', '"\\e[31m"', '"\\UFFFFFFFF"', '"\\uD800"', '"a\\nb"', '"\\u202e"', '"\\u00a0"'),
    *(
        "[" * 50,
        "[" * 1000,
        "{a: " * 30,
        "x" * 256,
        "x" * 5000,
        "é" * 200,
        "[" + "1, " * 3000 + "1]",
    ),
    *(
        "'unclosed",
        "a: b: c",
        "- x",
        "|\n  x",
        ">",
        "@x",
        "`x`",
        "%x",
        "\tx",
        "\x00",
        "\x1b[31m",
        "\ufeffx",
    ),
    *(
        "mlp",
        "conv",
        "resnet",
        "ldm",
        "text",
        "label",
        "none",
        "spatial",
        "vector",
        "film",
        "deepspeed",
    ),
]


class Raw(str):
    """A value that stands in the file as it is here."""


def value(draw: random.Random) -> Raw:
    if draw.random() < 0.1:
        letters = "0123456789abcxyz-+._:/\\ \t\"'[]{},#&*!|>%@`~=\x07\x7f\x85é\u2028🙂"
        return Raw("".join(draw.choices(letters, k=draw.randint(1, 20))))
    return Raw(draw.choice(VALUES))


def mutate(draw: random.Random, tree: dict[str, Any], keys: list[str]) -> None:
    """Changes the tree at one place. keys: dotted names that the schema knows."""
    blocks = [tree, *(block for block in tree.values() if isinstance(block, dict))]
    block = draw.choice(blocks)
    act = draw.random()
    if act < 0.6:
        *path, name = draw.choice(keys).split(".")
        for part in path:
            below = tree.setdefault(part, {})
            if not isinstance(below, dict):
                return
            tree = below
        tree[name] = value(draw)
    elif act < 0.75 and block:
        del block[draw.choice(list(block))]
    elif act < 0.9:
        block[
            draw.choice(["", "x", "lr", "<<", "a.b", "é", "? [a]", "'", "k" * 300, "1", "on"])
        ] = value(draw)
    elif block:
        block[draw.choice(list(block))] = value(draw)


def text_of(tree: dict[str, Any], indent: str = "") -> str:
    lines = []
    for key, item in tree.items():
        if isinstance(item, dict) and item:
            lines.append(f"{indent}{key}:\n{text_of(item, indent + '  ')}")
        elif isinstance(item, Raw):
            lines.append(f"{indent}{key}: {item}\n")
        else:
            flow = yaml.safe_dump(item, default_flow_style=True, width=10**9).removesuffix("...\n")
            lines.append(f"{indent}{key}: {flow.strip()}\n")
    return "".join(lines)


def damage(draw: random.Random, text: str) -> bytes:
    """The text in bytes, now and then cut, doubled, in another encoding or with a byte changed."""
    content = text.encode()
    act = draw.random()
    at = draw.randrange(len(content) + 1)
    if act < 0.8:
        return content
    if act < 0.84:
        return content[:at]
    if act < 0.87:
        return content[:at] + bytes([draw.randrange(256)]) + content[at:]
    if act < 0.9:
        return content * 2
    if act < 0.93:
        return text.encode(draw.choice(["utf-16", "utf-8-sig", "utf-32-le"]))
    if act < 0.96:
        return content.replace(
            b"\n", draw.choice([b"\r\n", b"\r", b"\n\t", b"\n\n---\n", b"\n...\n"])
        )
    return draw.choice(
        [b"", b"\n", b"#", b"- a\n", b"x", b"null", b"\x00" * 100, b"%YAML 3.0\n---\n", b"["]
    )
