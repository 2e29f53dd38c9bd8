import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cvae.preparation.image_decoding import Unreadable, decode

RED, BLUE = (220, 30, 40), (30, 60, 200)


def halves(width: int = 300, height: int = 200) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    return image


def saved(path: Path, image: Image.Image, **options: object) -> Path:
    image.save(path, **options)  # type: ignore[arg-type]
    return path


def assert_halves(pixels: np.ndarray, tolerance: int = 12) -> None:
    assert pixels.shape == (3, 32, 32)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    for columns, colour in ((slice(0, 14), RED), (slice(18, 32), BLUE)):
        difference = pixels[:, :, columns].astype(int) - np.array(colour)[:, None, None]
        assert np.abs(difference).max() <= tolerance


@pytest.mark.parametrize("size", [(300, 200), (64, 64), (32, 32), (20, 700), (5, 5)])
def test_the_whole_image_becomes_a_square(tmp_path: Path, size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, RED)
    pixels = decode(saved(tmp_path / "x.jpg", image, quality=95), 32)
    assert np.abs(pixels.astype(int) - np.array(RED)[:, None, None]).max() <= 4
    assert pixels.shape == (3, 32, 32)


def test_draft_decodes_small_and_true(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = coarse.resize((1600, 1200), Image.Resampling.BICUBIC)
    pixels = decode(saved(tmp_path / "x.jpg", image, quality=95), 32)
    exact = np.asarray(image.resize((32, 32), Image.Resampling.BICUBIC)).transpose(2, 0, 1)
    assert np.abs(pixels.astype(int) - exact).mean() < 2


def test_rgb_palette_cmyk(tmp_path: Path) -> None:
    assert_halves(decode(saved(tmp_path / "rgb.jpg", halves(), quality=95), 32))
    palette = halves().convert("P", palette=Image.Palette.ADAPTIVE)
    assert_halves(decode(saved(tmp_path / "p.png", palette), 32))
    cmyk = saved(tmp_path / "cmyk.jpg", halves().convert("CMYK"), quality=95)
    with Image.open(cmyk) as image:
        assert image.mode == "CMYK"
    assert_halves(decode(cmyk, 32))


def test_crop_takes_the_centre_square(tmp_path: Path) -> None:
    for size, box in (((300, 200), (50, 0, 250, 200)), ((200, 301), (0, 50, 200, 250))):
        rng = np.random.default_rng(0)
        coarse = Image.fromarray(rng.integers(0, 256, (9, 7, 3), dtype=np.uint8))
        image = coarse.resize(size, Image.Resampling.BICUBIC)
        pixels = decode(saved(tmp_path / "x.png", image), 32, crop=True)
        square = image.crop(box).resize((32, 32), Image.Resampling.BICUBIC)
        exact = np.asarray(square).transpose(2, 0, 1).astype(int)
        assert np.abs(pixels - exact).max() <= 6  # odd sizes: half a pixel
        squeezed = decode(tmp_path / "x.png", 32)
        assert np.abs(squeezed - exact).mean() > 10
    square = saved(tmp_path / "square.png", image.crop((0, 0, 64, 64)))
    np.testing.assert_array_equal(decode(square, 32, crop=True), decode(square, 32))


def test_sixteen_bits_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16)
    deep = saved(tmp_path / "deep.png", Image.fromarray(np.tile(ramp, (64, 1))))
    with Image.open(deep) as image:
        assert image.mode == "I;16"
    pixels = decode(deep, 64)
    assert (pixels[0] == pixels[2]).all()
    assert np.abs(pixels[0, 5].astype(int) - ramp // 256).max() <= 2


def test_grey(tmp_path: Path) -> None:
    grey = saved(tmp_path / "grey.jpg", halves().convert("L"), quality=95)
    pixels = decode(grey, 32)
    assert (pixels[0] == pixels[1]).all()
    assert (pixels[0] == pixels[2]).all()
    assert abs(int(pixels[0, 5, 5]) - 88) < 3  # 0.299 R + 0.587 G + 0.114 B
    assert abs(int(pixels[0, 5, 28]) - 67) < 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_undone(tmp_path: Path, orientation: int) -> None:
    # What a camera stores for each orientation, so that upright it shows `halves`.
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    image = halves() if undo is None else halves().transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert_halves(decode(saved(tmp_path / "x.jpg", image, exif=exif, quality=95), 32))


def test_transparency_becomes_white(tmp_path: Path) -> None:
    image = halves().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 300, 100))
    pixels = decode(saved(tmp_path / "x.png", image), 32)
    assert (pixels[:, :14] > 250).all()
    assert_halves(np.repeat(pixels[:, 20:21], 32, axis=1))


def test_damaged_files_say_why_and_name_no_folder(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    halves().save(buffer, "JPEG")
    files = {
        "zero.jpg": (b"", "empty file"),
        "text.jpg": (b"not an image at all", "not an image"),
        "head.jpg": (buffer.getvalue()[:20], "not an image|cannot be decoded"),
        "cut.jpg": (buffer.getvalue()[:-900], "cannot be decoded: image file is truncated"),
        "png.jpg": (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0", "not an image|cannot be decoded"),
    }
    for name, (content, reason) in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Unreadable, match=reason) as caught:
            decode(tmp_path / name, 32)
        assert str(tmp_path) not in str(caught.value)
    with pytest.raises(Unreadable, match="file is absent"):
        decode(tmp_path / "nowhere.jpg", 32)
    (tmp_path / "folder.jpg").mkdir()
    with pytest.raises(Unreadable, match="cannot be decoded: Is a directory"):
        decode(tmp_path / "folder.jpg", 32)
