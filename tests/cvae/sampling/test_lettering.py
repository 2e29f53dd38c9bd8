import unicodedata
from collections.abc import Iterator
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, features

from cvae.sampling import lettering
from cvae.sampling.lettering import font, legible, text_length, without_font, wrap, write_lines

STIX = Path(matplotlib.get_data_path(), "fonts", "ttf", "STIXGeneral.ttf")
NOT_IN_DEJAVU = "⏞"  # U+23DE, which STIX has


@pytest.fixture
def fontconfig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fontconfig that knows no font; tests write into its answer."""
    answer = tmp_path / "answer"
    answer.write_text("")
    command = tmp_path / "fc-list"
    command.write_text(f"#!/bin/sh\ncat '{answer}'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(lettering, "_further", [])
    lettering._font_file.cache_clear()
    yield answer
    lettering._font_file.cache_clear()


def ink(text: str) -> np.ndarray:
    page = Image.new("L", (400, 40), 255)
    write_lines(ImageDraw.Draw(page), (8, 8), [text], font(), 0)  # type: ignore[arg-type]
    return np.asarray(page)


def test_letters_without_a_font_are_named_and_told(fontconfig: Path) -> None:
    texts = ["一 dog 🐶!", "größer قطة 👍🏽"]
    assert legible(texts[0]).split() == ["U+4E00", "dog", "[dog", "face]", "!"]
    assert legible(texts[1]).split() == ["größer", "قطة", "[thumbs", "up", "sign]"]
    assert without_font(texts) == ["一", "🐶", "👍"]
    # What is drawn is what is said: no box for a letter that is not there.
    assert wrap("一二", font(), 300) == ["U+4E00 U+4E8C"]


def test_a_font_of_the_system_steps_in(fontconfig: Path) -> None:
    assert legible(NOT_IN_DEJAVU).strip() == "U+23DE"
    lettering._font_file.cache_clear()
    broken = fontconfig.with_name("broken.ttf")
    broken.write_bytes(b"no font")
    fontconfig.write_text(f"{broken}:\n/nowhere/at/all.ttf:\n{STIX}:\n")
    assert legible(NOT_IN_DEJAVU) == NOT_IN_DEJAVU
    assert without_font([NOT_IN_DEJAVU]) == []
    box = ink("\uffff")[:, 8:24]
    drawn = ink(NOT_IN_DEJAVU)[:, 8:24]
    assert (drawn < 128).any()
    assert not np.array_equal(drawn, box)
    assert text_length(f"a{NOT_IN_DEJAVU}b", font()) > text_length("ab", font())


def test_a_machine_without_fontconfig_has_stand_ins(
    fontconfig: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert legible("一").strip() == "U+4E00"


@pytest.mark.skipif(not features.check("raqm"), reason="Pillow without raqm cannot turn lines")
def test_hebrew_is_read_from_the_right() -> None:
    text = "אבג"
    assert unicodedata.bidirectional(text[0]) == "R"
    assert np.array_equal(ink(text), ink(f"\u202d{text[::-1]}\u202c"))
    assert not np.array_equal(ink(text), ink(text[::-1]))
