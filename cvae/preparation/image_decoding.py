"""Image files, decoded and resized once to rows of a store, in parallel, part by part."""

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
from cvae.preparation.parts import Parts, parts_folder, run_parallel, save_part

PART = 512
_PART_BYTES = 128 << 20  # a worker holds two parts in memory
# By `crop`. Part of a store's identity.
RESIZE = {False: "whole image, bicubic", True: "centre square of the shorter side, bicubic"}


class Unreadable(Exception):
    """An image file cannot be used; the message names no path of this machine."""


@dataclass(frozen=True)
class ImageParts(Parts):
    """The image files of a split, decoded to uint8 (3, image_size, image_size).

    <folder>/<n>.npy holds the images of part n; <folder>/<n>.json, written last, lists which files
    could be decoded and why the others could not.
    """

    images: Path
    image_size: int
    crop: bool
    unit = "image"
    suffix = ".json"

    @classmethod
    def begin(
        cls,
        folder: Path,
        images: Path,
        files: list[str],
        image_size: int,
        crop: bool,
        made_from: dict[str, Any],
    ) -> "ImageParts":
        """Cuts files of the folder `images` into parts; removes parts of another source.

        made_from: identity of the source that lists the files.
        """
        part = max(1, min(PART, _PART_BYTES // (3 * image_size**2)))
        settings = {"image_size": image_size, "resize": RESIZE[crop], "part": part}
        parts_folder(folder, {**made_from, **settings})
        return cls(folder, files, part, images, image_size, crop)

    def fill(self, numbers: Sequence[int], bar: "tqdm[Any]") -> None:
        tasks = [
            (self.path(n, ""), self.images, self.items_of(n), self.image_size, self.crop)
            for n in numbers
        ]
        run_parallel(_decode_part, tasks, bar)

    def decoded_files(self) -> list[int]:
        """Returns the numbers of the files that could be decoded, in order."""
        return [
            number * self.part + index
            for number, report in enumerate(self._reports())
            for index in report["kept"]
        ]

    def skipped(self) -> list[Skipped]:
        return [Skipped(**entry) for report in self._reports() for entry in report["skipped"]]

    def decoded_images(self) -> Iterator[NDArray[np.uint8]]:
        """Yields the images of each part, uint8 (B, 3, image_size, image_size)."""
        return (np.load(self.path(n, ".npy"), mmap_mode="r") for n in range(self.total))

    def discard_damaged(self) -> None:
        """Removes the parts with damaged files, so that a restart reads the repaired files."""
        for number, report in enumerate(self._reports()):
            if report["skipped"]:
                self.path(number, ".json").unlink()

    def _reports(self) -> list[dict[str, Any]]:
        files = (self.path(number, ".json") for number in range(self.total))
        return [json.loads(file.read_text("utf-8")) for file in files]


def _decode_part(task: tuple[Path, Path, list[str], int, bool]) -> int:
    """Decodes and writes one part; returns its number of files."""
    part, folder, files, image_size, crop = task
    images: list[NDArray[np.uint8]] = [np.empty((0, 3, image_size, image_size), np.uint8)]
    decoded, skipped = [], []
    for index, name in enumerate(files):
        try:
            images.append(decode(folder / name, image_size, crop)[None])
            decoded.append(index)
        except Unreadable as error:
            skipped.append({"file": name, "reason": str(error)})
    save_part(part.with_suffix(".npy"), np.concatenate(images))
    report = json.dumps({"kept": decoded, "skipped": skipped}, ensure_ascii=False)
    write_atomically(part.with_suffix(".json"), report)
    return len(files)


def decode(file: Path, image_size: int, crop: bool = False) -> NDArray[np.uint8]:
    """Returns an image, upright and in RGB, as a square: uint8 (3, image_size, image_size).

    crop: resizes the centre square, as wide as the shorter side, instead of squeezing the whole image.
    Transparent pixels are blended with white. Raises Unreadable if the file is absent or damaged.
    """
    try:
        if file.stat().st_size == 0:
            raise Unreadable("empty file")
        with warnings.catch_warnings(), Image.open(file) as image:
            warnings.simplefilter("ignore")
            # Decodes JPEG at 1/2, 1/4 or 1/8 of its size, but not below twice the target.
            image.draft(None, (2 * image_size, 2 * image_size))
            upright = _rgb(ImageOps.exif_transpose(image))
            if crop:
                square = ImageOps.fit(upright, (image_size, image_size), Image.Resampling.BICUBIC)
            else:
                square = upright.resize((image_size, image_size), Image.Resampling.BICUBIC)
    except Unreadable:
        raise
    except UnidentifiedImageError:
        raise Unreadable("not an image") from None
    except FileNotFoundError:
        raise Unreadable("file is absent") from None
    except Exception as error:  # Pillow can raise anything for a damaged file
        reason = getattr(error, "strerror", None) or str(error).replace(str(file), file.name)
        raise Unreadable(f"cannot be decoded: {reason}") from None
    return np.ascontiguousarray(np.asarray(square).transpose(2, 0, 1))


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # 16 bits per pixel; convert() would clip them to 8 bits instead of scaling.
        pixels = np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8
        image = Image.fromarray(pixels.astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGBA", layer.size, "white")
        image.alpha_composite(layer)
    return image.convert("RGB")
