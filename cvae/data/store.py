"""The prepared store: images as memory-mapped bytes, captions already encoded.

<data>/<dataset>-<image_size>/
    manifest.json                 what is here, from where, with checksums; written last
    <split>/images.npy            uint8 (N, C, H, W)
    <split>/ids.npy               int64 (N,), ids of the source
    <split>/labels.npy            int64 (N,), labelled data only
    <split>/captions.json         list of M strings in order of images, captioned data only
    <split>/caption_offsets.npy   int64 (N+1,), image i has captions[o[i]:o[i+1]]
    <split>/text/<encoder>.npy    float32 (M, D), one per text encoder
"""

import hashlib
import json
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from cvae.errors import UserError
from cvae.paths import data_dir

MANIFEST = "manifest.json"
_PREPARE_ARGUMENTS = {"coco": "coco --root DIR --size {image_size}"}


Precision = Literal["fp32", "bf16"]


class FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    bytes: int
    sha256: str


class Skipped(BaseModel):
    """Something of the source that is not in the store: an image file, or one of its captions."""

    model_config = ConfigDict(extra="forbid")
    file: str
    reason: str


class SplitManifest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    source: dict[str, Any]
    images: int
    captions: int
    skipped: list[Skipped]
    files: dict[str, FileEntry]


class TextEncoderEntry(BaseModel):
    """Identity of the encoder whose vectors are in text/<name>.npy."""

    model_config = ConfigDict(extra="forbid")
    dim: int
    hash: str  # sha256 of its weights
    files: dict[str, str] = {}  # sha256 of its configuration and its tokenizer's files
    revision: str | None = None  # the hub's commit, where it is known
    pooling: str
    precision: Precision = "fp32"
    max_tokens: int
    truncated: dict[str, int]  # captions longer than max_tokens, per split


class Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    dataset: str
    image_size: int
    channels: int
    classes: list[str] | None
    splits: dict[str, SplitManifest]
    text_encoders: dict[str, TextEncoderEntry]

    def to_json(self) -> str:
        return json.dumps(self.model_dump(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


class Split:
    """One split of a store. The arrays are memory-mapped, so opening costs nothing.

    images           uint8 (N, C, H, W)
    ids              int64 (N,)
    labels           int64 (N,), or None
    caption_offsets  int64 (N+1,), or None
    text             float32 (M, D) of the chosen encoder, or None
    """

    def __init__(self, folder: Path, classes: int, text_encoder: str | None) -> None:
        self._folder = folder
        self._classes = classes
        self.images: NDArray[np.uint8] = _mapped(folder / "images.npy")
        self.ids: NDArray[np.int64] = np.load(folder / "ids.npy")
        self.labels: NDArray[np.int64] | None = None
        self.caption_offsets: NDArray[np.int64] | None = None
        self.text: NDArray[np.float32] | None = None
        if (folder / "labels.npy").exists():
            self.labels = np.load(folder / "labels.npy")
        if (folder / "caption_offsets.npy").exists():
            self.caption_offsets = np.load(folder / "caption_offsets.npy")
        if text_encoder is not None:
            self.text = _mapped(folder / text_file(text_encoder))

    def __len__(self) -> int:
        return len(self.images)

    @cached_property
    def captions(self) -> list[str]:
        """All captions in order of images; empty for data without captions. Read at first use."""
        if self.caption_offsets is None:
            return []
        captions: list[str] = json.loads((self._folder / "captions.json").read_text("utf-8"))
        return captions

    @property
    def condition_dim(self) -> int:
        """Width of condition(): number of classes, width of the text embedding, or 0."""
        if self.labels is not None:
            return self._classes
        return 0 if self.text is None else int(self.text.shape[1])

    def caption_rows(
        self, indices: NDArray[np.int64], choice: NDArray[np.floating]
    ) -> NDArray[np.int64]:
        """Row in `captions` and `text` of caption floor(choice · n) of each image that has n.

        indices int64 (B,); choice (B,), uniform in [0, 1). Raises ValueError without captions.
        """
        if self.caption_offsets is None:
            raise ValueError(f"{self._folder} has no captions")
        first = self.caption_offsets[indices]
        count = self.caption_offsets[np.asarray(indices) + 1] - first
        number = np.floor(np.asarray(choice, np.float64) * count).astype(np.int64)
        rows: NDArray[np.int64] = first + np.minimum(number, count - 1)
        return rows

    def caption(self, index: int, choice: float = 0.0) -> str:
        """The caption that condition() encodes for the same index and choice."""
        return self.captions[int(self.caption_rows(np.array([index]), np.array([choice]))[0])]

    def condition(
        self, indices: NDArray[np.int64], choice: NDArray[np.floating]
    ) -> NDArray[np.float32] | None:
        """What the model is told about each image: float32 (B, condition_dim), or None.

        One-hot labels where there are labels; else the embedding of the caption that `choice` (B,),
        uniform in [0, 1), picks (see caption_rows); None where there is neither.
        """
        if self.labels is not None:
            one_hot = np.zeros((len(indices), self._classes), np.float32)
            one_hot[np.arange(len(indices)), self.labels[indices]] = 1.0
            return one_hot
        if self.text is None:
            return None
        return self.text.take(self.caption_rows(indices, choice), axis=0)


def _mapped(file: Path) -> NDArray[Any]:
    # A plain array over the mapped file: to index a memmap takes twice as long.
    array: NDArray[Any] = np.load(file, mmap_mode="r").view(np.ndarray)
    return array


class Store:
    """A prepared data set on disk. `digest` is the sha256 of its manifest: its identity."""

    def __init__(self, path: Path) -> None:
        """Reads the manifest; raises UserError when it is damaged and OSError when absent."""
        self.path = path
        content = (path / MANIFEST).read_bytes()
        self.digest = hashlib.sha256(content).hexdigest()
        try:
            self.manifest = Manifest.model_validate_json(content)
        except ValidationError as error:
            where = error.errors()[0]
            raise UserError(
                f"{path / MANIFEST} is damaged ({where['loc']}: {where['msg']}); "
                f"delete {path} and prepare it again: {self.command}"
            ) from None

    @property
    def command(self) -> str:
        dataset, _, image_size = self.path.name.rpartition("-")
        return prepare_command(dataset, image_size)

    def split(self, name: str, text_encoder: str | None = None) -> Split:
        """Opens a split, with the vectors of a text encoder if one is named.

        Raises UserError when the store has no such split or no such vectors.
        """
        if name not in self.manifest.splits:
            have = ", ".join(self.manifest.splits)
            raise UserError(f"{self.path} has no split '{name}'; it has: {have}")
        if text_encoder is not None and not (
            text_encoder in self.manifest.text_encoders
            and text_file(text_encoder) in self.manifest.splits[name].files
        ):
            have = ", ".join(self.manifest.text_encoders) or "none"
            raise UserError(
                f"the captions of {self.path} (split {name}) are not encoded by '{text_encoder}'; "
                f"encoders prepared: {have}; prepare it with: {self.command} --text {text_encoder}"
            )
        return Split(self.path / name, len(self.manifest.classes or ()), text_encoder)

    def check_sizes(self, split: str | None = None) -> None:
        """Raises UserError when a file is missing or of another length than the manifest says."""
        for file, entry in self._files(split):
            size = file.stat().st_size if file.is_file() else None
            if size != entry.bytes:
                found = "missing" if size is None else f"{size} bytes instead of {entry.bytes}"
                raise UserError(f"{file} is damaged ({found}); prepare it again: {self.command}")

    def verify(
        self, split: str | None = None, advance: Callable[[int], object] = lambda n: None
    ) -> None:
        """Reads everything (of one split); raises UserError when a file is not what was prepared.

        advance: called with the bytes read since the call before.
        """
        self.check_sizes(split)
        for file, entry in self._files(split):
            if file_sha256(file, advance) != entry.sha256:
                raise UserError(
                    f"{file} is damaged (its sha256 is not the manifest's); "
                    f"prepare it again: {self.command}"
                )

    def _files(self, only: str | None) -> list[tuple[Path, FileEntry]]:
        return [
            (self.path / split / name, entry)
            for split, content in self.manifest.splits.items()
            for name, entry in content.files.items()
            if only in (None, split)
        ]


def file_sha256(path: Path, advance: Callable[[int], object] = lambda n: None) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
            advance(len(block))
    return digest.hexdigest()


def text_file(encoder: str) -> str:
    """Where a split keeps the vectors of an encoder; its name may be a hub name or a folder."""
    return f"text/{encoder.strip('/').replace('/', '--')}.npy"


def store_path(dataset: str, image_size: int) -> Path:
    return data_dir() / f"{dataset}-{image_size}"


def prepare_command(dataset: str, image_size: int | str) -> str:
    arguments = _PREPARE_ARGUMENTS.get(dataset, dataset).format(image_size=image_size)
    return f"python workflows/prepare.py {arguments}"


def open_store(dataset: str, image_size: int) -> Store:
    """Opens a prepared store; sizes of the files are checked, contents are not (Store.verify).

    Raises UserError, naming the command that prepares it, when it is absent or damaged.
    """
    path = store_path(dataset, image_size)
    if not (path / MANIFEST).is_file():
        others = sorted(p.parent.name for p in data_dir().glob(f"{dataset}-*/{MANIFEST}"))
        hint = f" (there is {', '.join(others)})" if others else ""
        raise UserError(
            f"{dataset} is not prepared at {image_size}×{image_size}: no {path / MANIFEST}{hint}; "
            f"prepare it with: {prepare_command(dataset, image_size)}"
        )
    store = Store(path)
    store.check_sizes()
    return store
