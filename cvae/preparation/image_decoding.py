"""Image files become rows of a store: decoded and resized once, in parallel, part by part."""

import json
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from cvae.data.store import Skipped
from cvae.files.paths import write_atomically
from cvae.preparation.store_writer import (
    part_path,
    parts_folder,
    run_parallel,
    save_part,
    unfinished,
)
from cvae.progress import progress_bar

PART = 512
_PART_BYTES = 128 << 20  # a worker holds two parts in memory
# By `crop`. Part of a store's identity.
RESIZE = {
    False: "whole image, bicubic",
    True: "centre square of the shorter side, bicubic",
}


class Unreadable(Exception):
    """Why an image file cannot be used, in words that name no path of this machine."""


@dataclass(frozen=True)
class ImageParts:
    """The image files of a split, to be decoded to uint8 (3, image_size, image_size) in parts.

    Part n is files [n * part, (n + 1) * part): <folder>/<n>.npy is its images, <folder>/<n>.json,
    written last, what became of each file. Whoever fills a part, its bytes are the same.
    """

    folder: Path
    images: Path
    files: list[str]
    image_size: int
    crop: bool
    part: int

    @classmethod
    def cut(
        cls, folder: Path, images: Path, files: list[str], image_size: int, crop: bool
    ) -> "ImageParts":
        part = max(1, min(PART, _PART_BYTES // (3 * image_size**2)))
        return cls(folder, images, files, image_size, crop, part)

    def begin(self, made_from: dict[str, Any]) -> None:
        """made_from: what the list of files was made from; parts of anything else are removed."""
        settings = {"image_size": self.image_size, "resize": RESIZE[self.crop], "part": self.part}
        parts_folder(self.folder, {**made_from, **settings})

    @property
    def total(self) -> int:
        return -(-len(self.files) // self.part)

    def todo(self) -> list[int]:
        return unfinished(self.folder, ".json", self.total)

    def fill(self, numbers: Sequence[int], bar: "tqdm[Any]") -> None:
        """Decodes these parts in as many processes as this one has cores; the bar counts files."""
        run_parallel(_decode_part, [self._task(number) for number in numbers], bar)

    def fill_here(self, what: str) -> None:
        """Decodes what is left to do, under a bar."""
        todo = self.todo()
        left = sum(len(self._task(number).files) for number in todo)
        with progress_bar(len(self.files), "image", what, len(self.files) - left) as bar:
            self.fill(todo, bar)

    def decoded(self) -> "Decoded":
        kept: list[int] = []
        skipped: list[Skipped] = []
        paths = [self._task(number).path for number in range(self.total)]
        for number, path in enumerate(paths):
            report = _report(path)
            kept += [number * self.part + index for index in report["kept"]]
            skipped += [Skipped(**entry) for entry in report["skipped"]]
        return Decoded(kept, skipped, paths)

    def _task(self, number: int) -> "_Task":
        files = self.files[number * self.part : (number + 1) * self.part]
        paths = tuple(self.images / file for file in files)
        return _Task(part_path(self.folder, number, ""), paths, self.image_size, self.crop)


@dataclass(frozen=True)
class _Task:
    path: Path  # of the part, without suffix
    files: tuple[Path, ...]
    image_size: int
    crop: bool


@dataclass(frozen=True)
class Decoded:
    """kept: numbers of the files that could be decoded, in order; images: these, part by part."""

    kept: list[int]
    skipped: list[Skipped]
    paths: list[Path]

    def images(self) -> Iterator[NDArray[np.uint8]]:
        return (np.load(path.with_suffix(".npy"), mmap_mode="r") for path in self.paths)

    def forget_damaged(self) -> None:
        """Removes the parts with damaged files, so that a restart looks at the mended files."""
        for path in self.paths:
            if _report(path)["skipped"]:
                path.with_suffix(".json").unlink()


def _report(path: Path) -> dict[str, list[Any]]:
    report: dict[str, list[Any]] = json.loads(path.with_suffix(".json").read_text("utf-8"))
    return report


def _decode_part(task: _Task) -> int:
    images, kept, skipped = [], [], []
    for index, file in enumerate(task.files):
        try:
            images.append(decode(file, task.image_size, task.crop))
            kept.append(index)
        except Unreadable as error:
            skipped.append({"file": file.name, "reason": str(error)})
    empty = np.empty((0, 3, task.image_size, task.image_size), np.uint8)
    save_part(task.path.with_suffix(".npy"), np.stack(images) if images else empty)
    report = json.dumps({"kept": kept, "skipped": skipped}, ensure_ascii=False)
    write_atomically(task.path.with_suffix(".json"), report)
    return len(task.files)


def decode(file: Path, image_size: int, crop: bool = False) -> NDArray[np.uint8]:
    """The image, upright, in RGB, as a square: uint8 (3, image_size, image_size).

    crop: its centre square, the shorter side resized to image_size; else the whole image is squeezed.
    Transparency becomes white. Raises Unreadable for a file that is absent, empty or damaged.
    """
    try:
        if file.stat().st_size == 0:
            raise Unreadable("empty file")
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("ignore")
            # JPEG alone: decodes at half, a quarter or an eighth, not below twice the target.
            image.draft(None, (2 * image_size, 2 * image_size))
            upright = _rgb(ImageOps.exif_transpose(image))
            # The box alone is resampled, so that this is one step.
            box = _centre_square(upright.size) if crop else None
            square = upright.resize((image_size, image_size), Image.Resampling.BICUBIC, box)
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable("not an image") from None
    except FileNotFoundError:
        raise Unreadable("file is absent") from None
    except Exception as error:  # a damaged file can raise anything in Pillow
        reason = getattr(error, "strerror", None) or str(error).replace(str(file), file.name)
        raise Unreadable(f"cannot be decoded: {reason}") from None
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _centre_square(size: tuple[int, int]) -> tuple[float, float, float, float]:
    width, height = size
    side = min(size)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits a pixel; convert() would clip them to 8 instead of scaling.
        pixels = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        image = Image.fromarray(pixels.astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")
