"""Captions in pictures: wrapped lines in a font that has their letters, and honest stand-ins where none does."""

import subprocess
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np
from PIL import ImageDraw, ImageFont, features

TEXT, FAINT = (32, 33, 36), (110, 115, 122)
FONT_SIZE = 15
_MAX_LINES = 8
_OUTLINES = (".ttf", ".otf", ".ttc")


@lru_cache
def font(size: int = FONT_SIZE, bold: bool = False) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which comes with matplotlib: Latin, Greek, Cyrillic, Hebrew, Arabic, ✓ and ✗."""
    # The basic layout engine draws the same pixels whether or not the system has libraqm.
    return ImageFont.truetype(_dejavu(bold), size, layout_engine=ImageFont.Layout.BASIC)


def wrap(text: str, face: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels, broken between words, and within a word that is wider.

    Letters that no font here has are replaced, see `legible`.
    """
    lines: list[str] = []
    for word in legible(text).split():
        if lines and text_length(f"{lines[-1]} {word}", face) <= width:
            lines[-1] += f" {word}"
            continue
        lines.append("")
        for letter in word:
            if lines[-1] and text_length(lines[-1] + letter, face) > width:
                lines.append("")
            lines[-1] += letter
        if len(lines) > _MAX_LINES:
            lines[_MAX_LINES - 1 :] = [lines[_MAX_LINES - 1][:-1] + "…"]
            break
    return lines


def write_lines(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    lines: Sequence[str],
    face: ImageFont.FreeTypeFont,
    colour: tuple[int, int, int] = TEXT,
    anchor: str = "l",
) -> None:
    """Lines under one another from `place` down; anchor: l, m or r of each line is at place's x."""
    y = place[1]
    for line in lines:
        x = place[0] - {"l": 0.0, "m": 0.5, "r": 1.0}[anchor] * text_length(line, face)
        for part, fitting in _runs(line, face):
            # By the baseline, which is what fonts share.
            draw.text((x, y + face.getmetrics()[0]), part, colour, fitting, anchor="ls")
            x += fitting.getlength(part)
        y += line_height(int(face.size))


def line_height(size: int = FONT_SIZE) -> int:
    return round(1.3 * size)


def text_height(lines: Sequence[str], size: int = FONT_SIZE) -> int:
    return len(lines) * line_height(size)


def text_length(text: str, face: ImageFont.FreeTypeFont) -> int:
    """Width in pixels."""
    return int(np.ceil(sum(fitting.getlength(part) for part, fitting in _runs(text, face))))


def legible(text: str) -> str:
    """The text with a stand-in for every letter that no font on this machine has.

    A symbol is named, as "[dog face]" for 🐶; any other letter is its code point, as "U+4E00". Marks without
    a shape of their own (joiners, variation selectors, skin tones) go without one.
    """
    return "".join(letter if letter in " \t\n" else _shape(letter) for letter in text)


def without_font(texts: Iterable[str]) -> list[str]:
    """The different letters that `legible` replaces in these texts, in order."""
    letters = dict.fromkeys(letter for text in texts for letter in text if not letter.isspace())
    return [letter for letter in letters if _shape(letter) not in ("", letter)]


def _shape(letter: str) -> str:
    if _font_file(letter) is not None:
        return letter
    kind, name = unicodedata.category(letter), unicodedata.name(letter, "")
    if kind in ("Cf", "Sk") or name.startswith("VARIATION SELECTOR"):
        return ""
    return f" [{name.lower()}] " if kind == "So" and name else f" U+{ord(letter):04X} "


def _runs(text: str, face: ImageFont.FreeTypeFont) -> list[tuple[str, ImageFont.FreeTypeFont]]:
    """The text in parts of one font each, in the size of `face`."""
    if text.isascii():
        return [(text, face)]
    first = Path(str(face.path))

    def file(letter: str) -> Path:
        return first if ord(letter) in _letters(first) else _font_file(letter) or first

    runs = []
    for path, letters in groupby(text, file):
        part = "".join(letters)
        runs.append((part, _face(path, int(face.size), _needs_shaping(part))))
    return runs


def _needs_shaping(text: str) -> bool:
    """Whether letters change places or shapes beside one another: Arabic, Hebrew, Devanagari, …"""
    return any(
        unicodedata.bidirectional(letter) in ("R", "AL", "AN")
        or unicodedata.category(letter) in ("Mn", "Mc")
        for letter in text
    )


@lru_cache
def _face(path: Path, size: int, shaped: bool) -> ImageFont.FreeTypeFont:
    shaped = shaped and features.check_feature("raqm") is True
    engine = ImageFont.Layout.RAQM if shaped else ImageFont.Layout.BASIC
    return ImageFont.truetype(path, size, layout_engine=engine)


@lru_cache
def _dejavu(bold: bool = False) -> Path:
    import matplotlib  # a quarter of a second that only rank 0 has to pay

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return Path(matplotlib.get_data_path(), "fonts", "ttf", name)


_further: list[Path] = []
"""Fonts of the system that turned out to be needed."""


@cache
def _font_file(letter: str) -> Path | None:
    """The font that has a letter: DejaVu, else one of the system's; None where there is none."""
    for path in (_dejavu(), *_further):
        if ord(letter) in _letters(path):
            return path
    if unicodedata.category(letter) in ("Cc", "Cs", "Cn", "Co"):
        return None
    for path in _system_fonts(letter):
        if _usable(path) and ord(letter) in _letters(path):
            _further.append(path)
            return path
    return None


def _system_fonts(letter: str) -> list[Path]:
    """Files of outline fonts that fontconfig knows to have the letter; none where it is not installed."""
    command = ["fc-list", f":charset={ord(letter):x}", "file"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    files = [Path(line.strip().removesuffix(":")) for line in answer.stdout.splitlines()]
    upright = [path for path in files if path.suffix.lower() in _OUTLINES]
    return sorted(upright, key=lambda path: ("Sans" not in path.name, len(path.name), path))


def _usable(path: Path) -> bool:
    try:
        ImageFont.truetype(path, FONT_SIZE)
    except OSError:  # coloured emoji in one fixed size, a damaged file
        return False
    return True


@lru_cache
def _letters(path: Path) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(str(path)).get_charmap())
