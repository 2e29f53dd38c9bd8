"""The captions of a split, encoded once, part by part."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cvae.data.text_encoder import TextEncoder
from cvae.files.paths import write_atomically
from cvae.preparation.store_writer import (
    part_path,
    parts_folder,
    save_part,
    unfinished,
    write_array,
)
from cvae.progress import progress_bar

PART = 512
_ROWS = 16384
_CAPTIONS = "captions.json"


@dataclass(frozen=True)
class CaptionParts:
    """The captions of a split, each once, to be encoded in parts.

    captions: the longest first, so that a part's captions are about equally long and need little
    padding. tokens: how many each has. Part n is captions [n * part, (n + 1) * part): <folder>/<n>.npy
    is their vectors. Whoever fills a part, with how many others, the batches in it are the same.
    """

    folder: Path
    captions: list[str]
    tokens: list[int]
    part: int

    @classmethod
    def begin(
        cls, folder: Path, captions: Sequence[str], encoder: TextEncoder, what: str
    ) -> "CaptionParts":
        """Sorts the captions, or reads how they were sorted. Parts of anything else are removed."""
        unique = sorted(set(captions))
        text = "\n".join(unique).encode()
        settings = {"captions": hashlib.sha256(text).hexdigest(), "part": PART}
        parts_folder(folder, {**encoder.identity, **settings})
        if not (folder / _CAPTIONS).exists():
            counts: dict[str, int] = {}
            with progress_bar(len(unique), "caption", f"{what}, tokens", delay=2) as bar:
                for start in range(0, len(unique), _ROWS):
                    chunk = unique[start : start + _ROWS]
                    counts.update(zip(chunk, encoder.token_counts(chunk).tolist(), strict=True))
                    bar.update(len(chunk))
            unique.sort(key=lambda caption: (-counts[caption], caption))
            content = {"captions": unique, "tokens": [counts[caption] for caption in unique]}
            write_atomically(folder / _CAPTIONS, json.dumps({**content, "part": PART}))
        return cls.read(folder)

    @classmethod
    def read(cls, folder: Path) -> "CaptionParts":
        return cls(folder, **json.loads((folder / _CAPTIONS).read_bytes()))

    @property
    def total(self) -> int:
        return -(-len(self.captions) // self.part)

    def todo(self) -> list[int]:
        return unfinished(self.folder, ".npy", self.total)

    def fill(self, numbers: Sequence[int], encoder: TextEncoder, bar: "tqdm[Any]") -> None:
        """Encodes these parts; the bar counts captions."""
        for number in numbers:
            vectors = encoder.encode_unique(self._captions(number), bar.update)
            save_part(part_path(self.folder, number, ".npy"), vectors)

    def fill_here(self, encoder: TextEncoder, what: str) -> None:
        """Encodes what is left to do, under a bar."""
        todo = self.todo()
        left = sum(len(self._captions(number)) for number in todo)
        with progress_bar(len(self.captions), "caption", what, len(self.captions) - left) as bar:
            self.fill(todo, encoder, bar)

    def write_vectors(self, path: Path, captions: Sequence[str], encoder: TextEncoder) -> int:
        """Writes float32 (len(captions), encoder.dim), the vectors of any of these captions, to `path`.

        Returns how many of them were longer than the encoder's limit and had to be cut.
        """
        in_order = self.folder / "unique.npy"
        files = [part_path(self.folder, number, ".npy") for number in range(self.total)]
        write_array(in_order, (len(self.captions), encoder.dim), "f4", map(np.load, files))
        vectors = np.load(in_order, mmap_mode="r")
        position = {caption: number for number, caption in enumerate(self.captions)}
        rows = np.array([position[caption] for caption in captions], np.int64)
        blocks = (vectors[rows[start : start + _ROWS]] for start in range(0, len(rows), _ROWS))
        write_array(path, (len(captions), encoder.dim), "f4", blocks)
        return sum(self.tokens[row] > encoder.max_tokens for row in rows)

    def _captions(self, number: int) -> list[str]:
        return self.captions[number * self.part : (number + 1) * self.part]
