"""Whether a model draws what a caption says: each drawing must be nearest to its own scene among others."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from cvae.data.store import Split
from cvae.errors import UserError
from cvae.sampling.grids import MARGIN, PAPER, enlarge
from cvae.sampling.inference import sample
from cvae.sampling.lettering import FONT_SIZE, TEXT, font, wrap, write_lines
from cvae.sampling.trained_model import TrainedModel

N_SCENES = 32
_COLUMNS = 4
_RIGHT, _WRONG = (34, 139, 84), (200, 64, 47)


class Scenes(NamedTuple):
    """Images of distinct scenes, each with a caption of its own."""

    indices: NDArray[np.int64]  # (n,) rows of the split
    captions: list[str]
    images: NDArray[np.uint8]  # (n, C, H, W)


class CaptionMatch(NamedTuple):
    scenes: Scenes
    drawn: NDArray[np.uint8]  # (n, C, H, W)
    right: NDArray[np.bool_]  # (n,) whether a drawing's own scene is the nearest

    @property
    def share(self) -> float:
        return float(self.right.mean())

    @property
    def chance(self) -> float:
        return 1 / len(self.right)

    def sentence(self) -> str:
        return (
            f"{self.right.sum()} of {len(self.right)} captions matched to their own scene:"
            f" {self.share:.0%} (chance {self.chance:.0%})".replace("%", " %")
        )


def caption_match(trained: TrainedModel, split: Split | None = None) -> CaptionMatch:
    """Draws one image for the caption of each of up to N_SCENES scenes, from fixed noise, and matches them.

    split: val by default. Raises UserError for a run that is not conditioned on text.
    """
    if trained.experiment.model.condition != "text":
        raise UserError(f"{trained.name} is not conditioned on captions")
    split = split or trained.data.val
    scenes = distinct_scenes(split)
    condition = trained.data.condition(split, scenes.indices, np.zeros(len(scenes.indices)))
    drawn = sample(trained.model, trained.noise(len(scenes.indices)), condition)
    return CaptionMatch(scenes, drawn, nearest(drawn, scenes.images) == np.arange(len(drawn)))


def distinct_scenes(split: Split, count: int = N_SCENES) -> Scenes:
    """Returns the first images of a split whose first captions and whose pixels all differ.

    Raises UserError if there are fewer than two.
    """
    rows: dict[str, int] = {}
    pictures: set[bytes] = set()
    for index in range(len(split)):
        caption, picture = split.caption(index), split.images[index].tobytes()
        if caption not in rows and picture not in pictures:
            rows[caption] = index
            pictures.add(picture)
        if len(rows) == count:
            break
    if len(rows) < 2:
        raise UserError("the evaluated split does not have two different scenes")
    indices = np.array(list(rows.values()), np.int64)
    return Scenes(indices, list(rows), np.array(split.images[indices]))


def nearest(drawn: NDArray[np.uint8], real: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Returns the index of the real image with the smallest mean squared error for each of n drawings, (n,)."""
    d = drawn.reshape(len(drawn), -1).astype(np.float64)
    r = real.reshape(len(real), -1).astype(np.float64)
    # |d − r|² = |d|² − 2 d·r + |r|², of which |d|² is the same for all r.
    indices: NDArray[np.int64] = ((r**2).sum(1) - 2 * d @ r.T).argmin(1)
    return indices


def match_grid(match: CaptionMatch) -> Image.Image:
    """Returns a card for each caption: the drawing, the real image, a mark for right or wrong, the caption."""
    drawn, real = enlarge(match.drawn), enlarge(match.scenes.images)
    height, width = drawn.shape[1:3]
    card_width, line = 2 * width + 6, round(1.3 * (FONT_SIZE - 2))
    face, small = font(FONT_SIZE - 2), font(FONT_SIZE - 3)
    captions = [wrap(text, face, card_width - 22) for text in match.scenes.captions]
    card_height = height + 8 + max(len(lines) for lines in captions) * line + MARGIN
    n_rows = -(-len(drawn) // _COLUMNS)
    top = MARGIN + 2 * line + 18
    size = (MARGIN + _COLUMNS * (card_width + MARGIN), top + n_rows * card_height)
    page = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(page)
    write_lines(draw, (MARGIN, MARGIN), [match.sentence()], font(bold=True))
    for number, right in enumerate(match.right):
        row, column = divmod(number, _COLUMNS)
        x, y = MARGIN + column * (card_width + MARGIN), top + row * card_height
        pictures = ((x, "drawn", drawn[number]), (x + width + 6, "real", real[number]))
        for left, head, picture in pictures:
            page.paste(Image.fromarray(picture), (left, y))
            if row == 0:
                place = (left + width // 2, top - line - 4)
                write_lines(draw, place, [head], small, anchor="m")
        mark, colour = ("✓", _RIGHT) if right else ("✗", _WRONG)
        write_lines(draw, (x, y + height + 5), [mark], font(FONT_SIZE + 2, bold=True), colour)
        write_lines(draw, (x + 22, y + height + 8), captions[number], face, TEXT)
    return page
