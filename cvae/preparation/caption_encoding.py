"""The captions of a split, encoded once, part by part."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from cvae.data.text_encoder import TextEncoder
from cvae.files.paths import write_atomically
from cvae.preparation.parts import Parts, parts_folder, save_part
from cvae.preparation.store_writer import write_array
from cvae.progress import progress_bar

PART = 512
_ROWS = 16384
_CAPTIONS = "captions.json"


@dataclass(frozen=True)
class CaptionParts(Parts):
    """The different captions of a split, each once; <folder>/<n>.npy holds the vectors of part n.

    The longest captions come first: captions of a part are about equally long and need little padding.
    """

    tokens: list[int]
    """The number of tokens of each caption."""
    encoder: Callable[[], TextEncoder]
    """Returns the encoder; called when the first part is filled."""
    unit = "caption"
    suffix = ".npy"

    @classmethod
    def begin(
        cls, folder: Path, captions: Sequence[str], encoder: TextEncoder, title: str
    ) -> "CaptionParts":
        """Sorts the captions, or reads their order from an earlier start; removes other parts."""
        unique = sorted(set(captions))
        text = "\n".join(unique).encode()
        settings = {"captions": hashlib.sha256(text).hexdigest(), "part": PART}
        parts_folder(folder, {**encoder.identity, **settings})
        if not (folder / _CAPTIONS).exists():
            counts: dict[str, int] = {}
            with progress_bar(len(unique), "caption", f"{title}, tokens", delay=2) as bar:
                for start in range(0, len(unique), _ROWS):
                    chunk = unique[start : start + _ROWS]
                    counts.update(zip(chunk, encoder.token_counts(chunk).tolist(), strict=True))
                    bar.update(len(chunk))
            unique.sort(key=lambda caption: (-counts[caption], caption))
            content = {"captions": unique, "tokens": [counts[caption] for caption in unique]}
            write_atomically(folder / _CAPTIONS, json.dumps({**content, "part": PART}))
        return cls.read(folder, lambda: encoder)

    @classmethod
    def read(cls, folder: Path, encoder: Callable[[], TextEncoder]) -> "CaptionParts":
        content = json.loads((folder / _CAPTIONS).read_bytes())
        return cls(folder, content["captions"], content["part"], content["tokens"], encoder)

    def fill(self, numbers: Sequence[int], bar: "tqdm[Any]") -> None:
        for number in numbers:
            vectors = self.encoder().encode_unique(self.items_of(number), bar.update)
            save_part(self.path(number, ".npy"), vectors)

    def write_vectors(self, path: Path, captions: Sequence[str]) -> int:
        """Writes the vectors of these captions, float32 (len(captions), dim), to `path`.

        Every one must be among the parts' captions. Returns how many exceed the encoder's limit.
        """
        encoder = self.encoder()
        sorted_vectors = self.folder / "unique.npy"
        parts = (np.load(self.path(number, ".npy")) for number in range(self.total))
        write_array(sorted_vectors, (len(self.items), encoder.dim), "f4", parts)
        vectors = np.load(sorted_vectors, mmap_mode="r")
        position = {caption: number for number, caption in enumerate(self.items)}
        rows = np.array([position[caption] for caption in captions], np.int64)
        blocks = (vectors[rows[start : start + _ROWS]] for start in range(0, len(rows), _ROWS))
        write_array(path, (len(captions), encoder.dim), "f4", blocks)
        return sum(self.tokens[row] > encoder.max_tokens for row in rows)
