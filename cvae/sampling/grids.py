"""Labelled grids of images, the layout of all pictures of samples."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cvae.sampling.lettering import (
    FAINT,
    FONT_SIZE,
    font,
    text_height,
    text_length,
    wrap,
    write_lines,
)

PAPER = (255, 255, 255)
MARGIN, GAP = 16, 3
_LABEL_WIDTH = 280
# In pixels: small images are enlarged to about _CELL, large ones shown at up to _LARGEST, and many images
# smaller, so that both sides of a page stay within _PAGE, which viewers and memory can take.
_CELL, _LARGEST, _SMALLEST, _PAGE = 96, 256, 32, 8192


def labelled_grid(
    cells: NDArray[np.uint8],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    title: str = "",
) -> Image.Image:
    """Returns images in rows and columns, with labels at the left and above.

    cells: (rows, columns, C, H, W), grey or RGB. They are enlarged to a whole multiple of their size, or shrunk
    if the page would be too large. Labels are wrapped; too long ones end in an ellipsis.
    """
    images = enlarge(cells, widest(*cells.shape[:2]))
    n_rows, n_columns, height, width = images.shape[:4]
    step = width + GAP
    labels = [wrap(label, font(), _LABEL_WIDTH) for label in row_labels] or [[]] * n_rows
    heads = [wrap(label, font(FONT_SIZE - 3), width) for label in column_labels]
    label_width = max((text_length(line, font()) for lines in labels for line in lines), default=0)
    left = MARGIN + (label_width + MARGIN if label_width else 0)
    title_lines = wrap(title, font(bold=True), left - MARGIN + n_columns * step)
    title_height = text_height(title_lines) + MARGIN // 2 if title_lines else 0
    head_height = max((text_height(lines, FONT_SIZE - 3) for lines in heads), default=0)
    top = MARGIN + title_height + (head_height + 6 if heads else 0)
    row_heights = [max(height, text_height(lines) + 6) + GAP for lines in labels]

    size = (left + n_columns * step - GAP + MARGIN, top + sum(row_heights) - GAP + MARGIN)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    write_lines(draw, (MARGIN, MARGIN), title_lines, font(bold=True))
    for column, lines in enumerate(heads):
        x, y = left + column * step + width // 2, top - 6 - text_height(lines, FONT_SIZE - 3)
        write_lines(draw, (x, y), lines, font(FONT_SIZE - 3), FAINT, anchor="m")
    y = top
    for row, row_height in zip(range(n_rows), row_heights, strict=True):
        middle = y + (row_height - GAP - text_height(labels[row])) // 2
        write_lines(draw, (left - MARGIN, middle), labels[row], font(), anchor="r")
        for column in range(n_columns):
            cell = Image.fromarray(images[row, column])
            page.paste(cell, (left + column * step, y + (row_height - GAP - height) // 2))
        y += row_height
    return page


def widest(n_rows: int, n_columns: int) -> int:
    """Returns the maximum width and height in pixels of a cell in a grid of this many."""
    return min(_LARGEST, max(_SMALLEST, _PAGE // max(n_rows, n_columns) - GAP))


def shrink(images: NDArray[np.uint8], most: int) -> NDArray[np.uint8]:
    """Scales images (…, C, H, W) down until neither side exceeds `most` pixels."""
    height, width = images.shape[-2:]
    scale = most / max(height, width)
    if scale >= 1:
        return images
    size = (max(1, round(scale * width)), max(1, round(scale * height)))
    planes = [
        np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BOX))
        for plane in images.reshape(-1, height, width)
    ]
    return np.stack(planes).reshape(*images.shape[:-2], *planes[0].shape)


def enlarge(images: NDArray[np.uint8], most: int = _LARGEST) -> NDArray[np.uint8]:
    """Returns images (…, C, H, W) as RGB (…, H', W', 3): no side over `most`, small ones about _CELL wide."""
    images = shrink(images, most)
    factor = max(1, min(round(_CELL / images.shape[-1]), most // max(images.shape[-2:])))
    images = np.moveaxis(images, -3, -1)
    images = np.broadcast_to(images, (*images.shape[:-1], 3))
    return np.ascontiguousarray(images.repeat(factor, axis=-3).repeat(factor, axis=-2))
