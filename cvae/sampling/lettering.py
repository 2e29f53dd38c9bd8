"""Text in pictures: wrapped lines that never show an empty box for a letter without a font."""

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


@lru_cache
def font(size: int = FONT_SIZE, bold: bool = False) -> ImageFont.FreeTypeFont:
    """Returns DejaVu Sans of matplotlib: Latin, Greek, Cyrillic, Hebrew, Arabic, ✓ and ✗."""
    # The basic layout engine draws the same pixels whether or not the system has libraqm.
    return ImageFont.truetype(_dejavu(bold), size, layout_engine=ImageFont.Layout.BASIC)


def wrap(text: str, face: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Returns lines of at most `width` pixels, broken between words, or within a word that is wider.

    Letters without a font are replaced as in `legible`. More than eight lines end in an ellipsis.
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
    """Draws lines one below the other from `place`, whose x is the l(eft), m(iddle) or r(ight) of each line."""
    y = place[1]
    for line in lines:
        x = place[0] - {"l": 0.0, "m": 0.5, "r": 1.0}[anchor] * text_length(line, face)
        for part, part_face in _runs(line, face):
            # Fonts share the baseline.
            draw.text((x, y + face.getmetrics()[0]), part, colour, part_face, anchor="ls")
            x += part_face.getlength(part)
        y += line_height(int(face.size))


def line_height(size: int = FONT_SIZE) -> int:
    return round(1.3 * size)


def text_height(lines: Sequence[str], size: int = FONT_SIZE) -> int:
    return len(lines) * line_height(size)


def text_length(text: str, face: ImageFont.FreeTypeFont) -> int:
    """Returns the width in pixels."""
    return int(np.ceil(sum(part_face.getlength(part) for part, part_face in _runs(text, face))))


def legible(text: str) -> str:
    """Returns the text with a replacement for each letter that no font on this machine has.

    A symbol is replaced by its name, as "[dog face]" for 🐶, another letter by its code point, as "U+4E00".
    Marks without a shape of their own (joiners, variation selectors, skin tones) are dropped.
    """
    return "".join(letter if letter in " \t\n" else _shape(letter) for letter in text)


def without_font(texts: Iterable[str]) -> list[str]:
    """Returns the distinct letters that `legible` replaces in these texts, in order."""
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
    """Splits the text into parts of one font each, in the size of `face`."""
    if text.isascii():
        return [(text, face)]
    first = Path(str(face.path))

    def file_of(letter: str) -> Path:
        return first if ord(letter) in _letters(first) else _font_file(letter) or first

    parts = [(path, "".join(letters)) for path, letters in groupby(text, file_of)]
    return [(part, _face(path, int(face.size), _needs_shaping(part))) for path, part in parts]


def _needs_shaping(text: str) -> bool:
    """Returns whether letters change places or shapes next to others, as in Arabic, Hebrew, Devanagari."""
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


@cache
def _dejavu(bold: bool = False) -> Path:
    import matplotlib  # a quarter of a second that only rank 0 has to pay

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return Path(matplotlib.get_data_path(), "fonts", "ttf", name)


@cache
def _font_file(letter: str) -> Path | None:
    """Returns the first font that has a letter, DejaVu before the system's; None if none has it."""
    if ord(letter) in _letters(_dejavu()):
        return _dejavu()
    if unicodedata.category(letter) in ("Cc", "Cs", "Cn", "Co"):
        return None
    return next((path for path in _system_fonts() if ord(letter) in _letters(path)), None)


@cache
def _system_fonts() -> list[Path]:
    """Returns the files of the system's outline fonts, those without serifs first."""
    from matplotlib.font_manager import findSystemFonts

    files = map(Path, findSystemFonts())
    return sorted(files, key=lambda path: ("Sans" not in path.name, len(path.name), path))


@cache
def _letters(path: Path) -> frozenset[int]:
    """Returns the code points that a font has; none for a damaged file or coloured emoji of one fixed size."""
    from matplotlib.ft2font import FT2Font

    try:
        ImageFont.truetype(path, FONT_SIZE)
        return frozenset(FT2Font(str(path)).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
