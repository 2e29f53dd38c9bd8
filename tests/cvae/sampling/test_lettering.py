import shutil
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib import font_manager
from PIL import Image, ImageDraw, features

from cvae.sampling import lettering
from cvae.sampling.lettering import font, legible, text_length, without_font, wrap, write_lines

STIX = Path(matplotlib.get_data_path(), "fonts", "ttf", "STIXGeneral.ttf")
NOT_IN_DEJAVU = "⏞"  # U+23DE, which STIX has


@pytest.fixture
def system_fonts(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """The fonts of a system that has none; tests add to them."""
    fonts: list[Path] = []
    monkeypatch.setattr(lettering, "_system_fonts", lambda: fonts)
    lettering._font_file.cache_clear()
    yield fonts
    lettering._font_file.cache_clear()


def ink(text: str) -> np.ndarray:
    page = Image.new("L", (400, 40), 255)
    write_lines(ImageDraw.Draw(page), (8, 8), [text], font(), 0)  # type: ignore[arg-type]
    return np.asarray(page)


def test_letters_without_a_font_are_named_and_reported(system_fonts: list[Path]) -> None:
    texts = ["一 dog 🐶!", "größer قطة 👍🏽"]
    assert legible(texts[0]).split() == ["U+4E00", "dog", "[dog", "face]", "!"]
    assert legible(texts[1]).split() == ["größer", "قطة", "[thumbs", "up", "sign]"]
    assert without_font(texts) == ["一", "🐶", "👍"]
    # There is no box for a letter without a font.
    assert wrap("一二", font(), 300) == ["U+4E00 U+4E8C"]


def test_a_font_of_the_system_steps_in(system_fonts: list[Path], tmp_path: Path) -> None:
    assert legible(NOT_IN_DEJAVU).strip() == "U+23DE"
    lettering._font_file.cache_clear()
    broken = tmp_path / "broken.ttf"
    broken.write_bytes(b"no font")
    system_fonts += [broken, Path("/nowhere/at/all.ttf"), STIX]
    assert legible(NOT_IN_DEJAVU) == NOT_IN_DEJAVU
    assert without_font([NOT_IN_DEJAVU]) == []
    box = ink("\uffff")[:, 8:24]
    drawn = ink(NOT_IN_DEJAVU)[:, 8:24]
    assert (drawn < 128).any()
    assert not np.array_equal(drawn, box)
    assert text_length(f"a{NOT_IN_DEJAVU}b", font()) > text_length("ab", font())


def test_matplotlib_finds_the_fonts_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(STIX, tmp_path / "Sans.ttf")
    monkeypatch.setattr(font_manager, "X11FontDirectories", [str(tmp_path)])
    assert tmp_path / "Sans.ttf" in lettering._system_fonts.__wrapped__()
    monkeypatch.setenv("MPL_IGNORE_SYSTEM_FONTS", "1")
    assert lettering._system_fonts.__wrapped__() == []


@pytest.mark.skipif(not features.check("raqm"), reason="Pillow without raqm cannot turn lines")
def test_hebrew_is_read_from_the_right() -> None:
    text = "אבג"
    assert unicodedata.bidirectional(text[0]) == "R"
    assert np.array_equal(ink(text), ink(f"\u202d{text[::-1]}\u202c"))
    assert not np.array_equal(ink(text), ink(text[::-1]))
