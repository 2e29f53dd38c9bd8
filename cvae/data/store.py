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
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from cvae.data.row_reader import LARGE, RowReader
from cvae.data.verified_checksums import Verified
from cvae.errors import UserError
from cvae.files.paths import data_dir, printable

MANIFEST = "manifest.json"
_PREPARE_ARGUMENTS = {"coco": "coco --root DIR --size {image_size}"}


Precision = Literal["fp32", "bf16"]
Count = Annotated[int, Field(ge=0, lt=2**40)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# Plain names inside the store.
SplitName = Annotated[str, Field(pattern=r"^\w[\w.-]{0,99}$")]
FileName = Annotated[
    str,
    Field(
        pattern=r"^((images|ids|labels|caption_offsets)\.npy|captions\.json|text/[^/\x00]{1,250}\.npy)$"
    ),
]


class FileEntry(BaseModel):
    model_config = ConfigDict(extra="forbid")
    bytes: Annotated[int, Field(ge=0, lt=2**60)]
    sha256: Sha256


# Names of files may hold line breaks and what a terminal takes for orders.
_Printable = Annotated[str, AfterValidator(printable)]


class Skipped(BaseModel):
    """Something of the source that is not in the store: an image file, or one of its captions."""

    model_config = ConfigDict(extra="forbid")
    file: _Printable
    reason: _Printable


class SplitManifest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    source: dict[str, Any]
    images: Annotated[int, Field(ge=1, lt=2**40)]
    captions: Count
    skipped: list[Skipped]
    files: dict[FileName, FileEntry]


class TextEncoderEntry(BaseModel):
    """Identity of the encoder whose vectors are in text/<name>.npy."""

    model_config = ConfigDict(extra="forbid")
    dim: Annotated[int, Field(ge=1, le=2**16)]
    hash: str  # sha256 of its weights
    files: dict[str, str] = {}  # sha256 of its configuration and its tokenizer's files
    revision: str | None = None  # the hub's commit, where it is known
    pooling: str
    precision: Precision = "fp32"
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    truncated: dict[str, Count]  # captions longer than max_tokens, per split


class Manifest(BaseModel):
    model_config = ConfigDict(extra="forbid")
    format: Literal[1] = 1
    dataset: str
    image_size: Annotated[int, Field(ge=1, le=4096)]
    channels: Annotated[int, Field(ge=1, le=16)]
    classes: Annotated[list[str], Field(min_length=1)] | None
    splits: dict[SplitName, SplitManifest]
    text_encoders: dict[str, TextEncoderEntry]

    def to_json(self) -> str:
        return json.dumps(self.model_dump(), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


class Split:
    """One split of a store. The large arrays are memory-mapped, so opening costs little.

    images           uint8 (N, C, H, W)
    ids              int64 (N,)
    labels           int64 (N,), or None
    caption_offsets  int64 (N+1,), or None
    text             float32 (M, D) of the chosen encoder, or None
    """

    def __init__(self, folder: Path, manifest: "Manifest", text_encoder: str | None) -> None:
        """Raises UserError for an array that is not of the kind and shape that the manifest promises."""
        split = manifest.splits[folder.name]
        self._folder = folder
        self._classes = len(manifest.classes or ())
        self._n_captions = split.captions
        for name in ("images.npy", "ids.npy"):
            if name not in split.files:
                raise _Odd(folder / name, "the manifest does not list it")
        n, size = split.images, manifest.image_size
        shape = (n, manifest.channels, size, size)
        # Plain arrays over the mapped files: to index a memmap takes twice as long.
        images = _mapped(folder / "images.npy", "uint8", shape)
        self.images: NDArray[np.uint8] = images.view(np.ndarray)
        self._large: RowReader | None = None
        if self.images[0].nbytes >= LARGE:
            self._large = RowReader(folder / "images.npy", images.offset, shape)
        self.ids: NDArray[np.int64] = np.array(_mapped(folder / "ids.npy", "int64", (n,)))
        self.labels: NDArray[np.int64] | None = None
        self.caption_offsets: NDArray[np.int64] | None = None
        self.text: NDArray[np.float32] | None = None
        if "labels.npy" in split.files:
            self.labels = np.array(_mapped(folder / "labels.npy", "int64", (n,)))
            if self.labels.min() < 0 or self.labels.max() >= self._classes:
                raise _Odd(
                    folder / "labels.npy", f"labels are not all from 0 to {self._classes - 1}"
                )
        if "caption_offsets.npy" in split.files:
            file = folder / "caption_offsets.npy"
            offsets = np.array(_mapped(file, "int64", (n + 1,)))
            if offsets[0] != 0 or offsets[-1] != split.captions or (np.diff(offsets) < 1).any():
                raise _Odd(file, f"offsets do not rise from 0 to {split.captions}")
            self.caption_offsets = offsets
        if text_encoder is not None:
            width = manifest.text_encoders[text_encoder].dim
            file = folder / text_file(text_encoder)
            self.text = _mapped(file, "float32", (split.captions, width)).view(np.ndarray)

    def __len__(self) -> int:
        return len(self.images)

    def take_images(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Returns the images of these rows, uint8 (B, C, H, W); large ones sooner than images[indices]."""
        return (
            self.images.take(indices, axis=0) if self._large is None else self._large.take(indices)
        )

    @cached_property
    def captions(self) -> list[str]:
        """All captions in order of images; empty for data without captions. Read at first use."""
        if self.caption_offsets is None:
            return []
        file = self._folder / "captions.json"
        try:
            captions: list[str] = json.loads(file.read_text("utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file} is damaged ({str(error)[:100]}); prepare it again") from None
        if (
            not isinstance(captions, list)
            or len(captions) != self._n_captions
            or not all(isinstance(caption, str) for caption in captions)
        ):
            raise UserError(
                f"{file} is damaged (not {self._n_captions} captions); prepare it again"
            )
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


class _Odd(Exception):
    """A file of a store that is not what it should be, and why."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"{file} is damaged ({reason})")


def _mapped(file: Path, dtype: str, shape: tuple[int, ...]) -> "np.memmap[Any, Any]":
    try:
        mapped = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a strange header can raise anything in there
        raise _Odd(file, f"no array can be read: {str(error)[:100]}") from None
    if not isinstance(mapped, np.memmap):
        raise _Odd(file, "it is no array")
    if (mapped.dtype, mapped.shape) != (np.dtype(dtype), shape):
        raise _Odd(file, f"it is {mapped.dtype} {mapped.shape} instead of {dtype} {shape}")
    if not mapped.flags.c_contiguous:
        raise _Odd(file, "its rows are not one after the other")
    return mapped


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
                f"{path / MANIFEST} is damaged ({'.'.join(map(str, where['loc']))[:100]}: {where['msg'][:100]}); "
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
        try:
            return Split(self.path / name, self.manifest, text_encoder)
        except _Odd as odd:
            raise UserError(f"{odd}; prepare it again: {self.command}") from None

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
        self.check_contents(self.checksums(split), advance)

    def checksums(self, split: str | None = None) -> list[tuple[Path, str]]:
        """Every file (of one split) with the sha256 that it should have."""
        return [(file, entry.sha256) for file, entry in self._files(split)]

    def check_contents(
        self, files: list[tuple[Path, str]], advance: Callable[[int], object] = lambda n: None
    ) -> None:
        """Reads these of checksums() whole; raises UserError if one is not what was prepared."""
        wrong = Verified(self.path).check(files, advance)
        if wrong is not None:
            raise UserError(
                f"{wrong} is damaged (its sha256 is not the manifest's); "
                f"prepare it again: {self.command}"
            )

    def _files(self, only: str | None) -> list[tuple[Path, FileEntry]]:
        return [
            (self.path / split / name, entry)
            for split, content in self.manifest.splits.items()
            for name, entry in content.files.items()
            if only in (None, split)
        ]


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
