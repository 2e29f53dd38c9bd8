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
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cvae.data.row_reader import LARGE, RowReader
from cvae.data.verified_checksums import VerifiedFiles
from cvae.errors import UserError
from cvae.files.json_file import first_fault
from cvae.files.paths import data_dir, printable

MANIFEST = "manifest.json"
Precision = Literal["fp32", "bf16"]
Advance = Callable[[int], object]
Count = Annotated[int, Field(ge=0, lt=2**40)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
SplitName = Annotated[str, Field(pattern=r"^\w[\w.-]{0,99}$")]
_FILES = r"(images|ids|labels|caption_offsets)\.npy|captions\.json|text/[^/\x00]{1,250}\.npy"
FileName = Annotated[str, Field(pattern=f"^({_FILES})$")]
# Names of files may contain line breaks and control sequences of terminals.
_Printable = Annotated[str, AfterValidator(printable)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class FileEntry(_Entry):
    bytes: Annotated[int, Field(ge=0, lt=2**60)]
    sha256: Sha256


class Skipped(_Entry):
    """An image file of the source, or one of its captions, that is not in the store."""

    file: _Printable
    reason: _Printable


class SplitManifest(_Entry):
    source: dict[str, Any]
    images: Annotated[int, Field(ge=1, lt=2**40)]
    captions: Count
    skipped: list[Skipped]
    files: dict[FileName, FileEntry]


class TextEncoderEntry(_Entry):
    """Identity of the encoder whose vectors are in text/<name>.npy."""

    dim: Annotated[int, Field(ge=1, le=2**16)]
    hash: str  # sha256 of its weights
    files: dict[str, str] = {}  # sha256 of its configuration and tokenizer files
    revision: str | None = None  # the hub's commit, if known
    pooling: str
    precision: Precision = "fp32"
    max_tokens: Annotated[int, Field(ge=1, lt=2**31)]
    truncated: dict[str, Count]  # captions longer than max_tokens, per split


class Manifest(_Entry):
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
    """One split of a store. The large arrays are memory-mapped, so opening costs little."""

    images: NDArray[np.uint8]  # (N, C, H, W)
    ids: NDArray[np.int64]  # (N,)
    labels: NDArray[np.int64] | None = None  # (N,)
    caption_offsets: NDArray[np.int64] | None = None  # (N+1,)
    text: NDArray[np.float32] | None = None  # (M, D), of the chosen encoder

    def __init__(self, folder: Path, manifest: Manifest, text_encoder: str | None) -> None:
        """Raises UserError if an array is not of the type and shape that the manifest gives."""
        split = manifest.splits[folder.name]
        self._folder = folder
        self._n_classes = len(manifest.classes or ())
        self._n_captions = split.captions
        for name in ("images.npy", "ids.npy"):
            if name not in split.files:
                raise self._damaged(name, "the manifest does not list it")
        n, size = split.images, manifest.image_size
        shape = (n, manifest.channels, size, size)
        # Plain arrays over the mapped files: indexing a memmap takes twice as long.
        images = self._map("images.npy", "uint8", shape)
        self.images = images.view(np.ndarray)
        self._row_reader: RowReader | None = None
        if self.images[0].nbytes >= LARGE:
            self._row_reader = RowReader(folder / "images.npy", images.offset, shape)
        self.ids = np.array(self._map("ids.npy", "int64", (n,)))
        if "labels.npy" in split.files:
            self.labels = np.array(self._map("labels.npy", "int64", (n,)))
            if self.labels.min() < 0 or self.labels.max() >= self._n_classes:
                last = self._n_classes - 1
                raise self._damaged("labels.npy", f"labels are not all from 0 to {last}")
        if "caption_offsets.npy" in split.files:
            offsets = np.array(self._map("caption_offsets.npy", "int64", (n + 1,)))
            if offsets[0] != 0 or offsets[-1] != split.captions or (np.diff(offsets) < 1).any():
                reason = f"offsets do not rise from 0 to {split.captions}"
                raise self._damaged("caption_offsets.npy", reason)
            self.caption_offsets = offsets
        if text_encoder is not None:
            text_shape = (split.captions, manifest.text_encoders[text_encoder].dim)
            self.text = self._map(text_file(text_encoder), "float32", text_shape).view(np.ndarray)

    def __len__(self) -> int:
        return len(self.images)

    def take_images(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Returns the images of these rows, uint8 (B, C, H, W); faster than images[indices] if large."""
        if self._row_reader is None:
            return self.images.take(indices, axis=0)
        return self._row_reader.take(indices)

    @cached_property
    def captions(self) -> list[str]:
        """All captions in order of images, read at first use; empty for data without captions."""
        if self.caption_offsets is None:
            return []
        captions = None
        with suppress(OSError, ValidationError):
            content = (self._folder / "captions.json").read_bytes()
            captions = TypeAdapter(list[str]).validate_json(content)
        if captions is None or len(captions) != self._n_captions:
            raise self._damaged("captions.json", f"not {self._n_captions} captions")
        return captions

    @property
    def condition_dim(self) -> int:
        """Width of condition(): number of classes, width of the text embedding, or 0."""
        if self.labels is not None:
            return self._n_classes
        return 0 if self.text is None else int(self.text.shape[1])

    def caption_rows(
        self, indices: NDArray[np.int64], choice: NDArray[np.floating]
    ) -> NDArray[np.int64]:
        """Returns the row in `captions` and `text` of caption floor(choice · n) of each image with n captions.

        indices: int64 (B,); choice: (B,), uniform in [0, 1). Raises ValueError without captions.
        """
        if self.caption_offsets is None:
            raise ValueError(f"{self._folder} has no captions")
        first = self.caption_offsets[indices]
        count = self.caption_offsets[np.asarray(indices) + 1] - first
        number = np.floor(np.asarray(choice, np.float64) * count).astype(np.int64)
        rows: NDArray[np.int64] = first + np.minimum(number, count - 1)
        return rows

    def caption(self, index: int, choice: float = 0.0) -> str:
        """Returns the caption that condition() encodes for the same index and choice."""
        return self.captions[int(self.caption_rows(np.array([index]), np.array([choice]))[0])]

    def condition(
        self, indices: NDArray[np.int64], choice: NDArray[np.floating]
    ) -> NDArray[np.float32] | None:
        """Returns the condition vector of each image, float32 (B, condition_dim).

        It is the one-hot label of labelled data, else the embedding of the caption that `choice` selects
        (see caption_rows), or None if the data have neither.
        """
        if self.labels is not None:
            one_hot = np.zeros((len(indices), self._n_classes), np.float32)
            one_hot[np.arange(len(indices)), self.labels[indices]] = 1.0
            return one_hot
        if self.text is None:
            return None
        return self.text.take(self.caption_rows(indices, choice), axis=0)

    def _damaged(self, name: str, reason: str) -> UserError:
        return _damaged(self._folder.parent, self._folder / name, reason)

    def _map(self, name: str, dtype: str, shape: tuple[int, ...]) -> "np.memmap[Any, Any]":
        try:
            array = np.load(self._folder / name, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # a damaged header can raise anything
            reason = f"no array can be read: {str(error)[:100]}"
            raise self._damaged(name, reason) from None
        if not isinstance(array, np.memmap):
            raise self._damaged(name, "it is no array")
        if (array.dtype, array.shape) != (np.dtype(dtype), shape):
            reason = f"it is {array.dtype} {array.shape} instead of {dtype} {shape}"
            raise self._damaged(name, reason)
        if not array.flags.c_contiguous:
            raise self._damaged(name, "it is in column-major order")
        return array


class Store:
    """A prepared data set on disk. `digest`, the sha256 of its manifest, identifies it."""

    def __init__(self, path: Path) -> None:
        """Reads the manifest. Raises UserError if it is damaged, OSError if it is absent."""
        self.path = path
        content = (path / MANIFEST).read_bytes()
        self.digest = hashlib.sha256(content).hexdigest()
        try:
            self.manifest = Manifest.model_validate_json(content)
        except ValidationError as error:
            fault = f"{path / MANIFEST} is damaged ({first_fault(error)}); delete {path}"
            raise _error(path, fault, "repair") from None

    def split(self, name: str, text_encoder: str | None = None) -> Split:
        """Opens a split, with the vectors of a text encoder if one is named.

        Raises UserError if the store lacks the split or the vectors, or if they are damaged.
        """
        if name not in self.manifest.splits:
            splits = ", ".join(self.manifest.splits)
            raise UserError(f"{self.path} has no split '{name}'; it has: {splits}")
        if text_encoder is not None and not (
            text_encoder in self.manifest.text_encoders
            and text_file(text_encoder) in self.manifest.splits[name].files
        ):
            encoders = ", ".join(self.manifest.text_encoders) or "none"
            message = (
                f"the captions of {self.path} (split {name}) are not encoded by '{text_encoder}'"
            )
            message += f"; encoders prepared: {encoders}"
            raise _error(self.path, message, "encode", text_encoder=text_encoder)
        return Split(self.path / name, self.manifest, text_encoder)

    def check_sizes(self, split: str | None = None) -> None:
        """Raises UserError if a file (of one split) is missing or not as long as the manifest says."""
        for file, entry in self._files(split):
            size = file.stat().st_size if file.is_file() else None
            if size != entry.bytes:
                reason = "missing" if size is None else f"{size} bytes instead of {entry.bytes}"
                raise _damaged(self.path, file, reason)

    def verify(self, split: str | None = None, advance: Advance | None = None) -> None:
        """Reads all files (of one split); raises UserError if one differs from what was prepared.

        advance: called with the size of each block that was read.
        """
        self.check_sizes(split)
        files = [(file, entry.sha256) for file, entry in self._files(split)]
        self.check_contents(files, advance)

    def check_contents(self, files: list[tuple[Path, str]], advance: Advance | None = None) -> None:
        """Reads files; raises UserError if the sha256 of one is not the given one."""
        wrong = VerifiedFiles(self.path).check(files, advance)
        if wrong is not None:
            raise _damaged(self.path, wrong, "its sha256 is not the manifest's")

    def _files(self, only: str | None) -> list[tuple[Path, FileEntry]]:
        return [
            (self.path / split / name, entry)
            for split, content in self.manifest.splits.items()
            for name, entry in content.files.items()
            if only in (None, split)
        ]


def text_file(encoder: str) -> str:
    """Returns the file, inside a split, of the vectors of an encoder named by hub name or folder."""
    return f"text/{encoder.strip('/').replace('/', '--')}.npy"


def store_path(dataset: str, image_size: int) -> Path:
    return data_dir() / f"{dataset}-{image_size}"


def open_store(dataset: str, image_size: int) -> Store:
    """Opens a prepared store; checks the sizes of its files, but not their contents (Store.verify).

    Raises UserError if the store is absent or damaged.
    """
    path = store_path(dataset, image_size)
    if not (path / MANIFEST).is_file():
        others = sorted(p.parent.name for p in data_dir().glob(f"{dataset}-*/{MANIFEST}"))
        existing = f" (there is {', '.join(others)})" if others else ""
        message = f"{dataset} is not prepared at {image_size}×{image_size}: no {path / MANIFEST}"
        raise _error(path, f"{message}{existing}", "prepare")
    store = Store(path)
    store.check_sizes()
    return store


def _damaged(store: Path, file: Path, reason: str) -> UserError:
    return _error(store, f"{file} is damaged ({reason})", "repair")


def _error(store: Path, message: str, action: str, **values: str) -> UserError:
    """Returns an error with the hint <action>_<dataset>: how to prepare, repair or encode it."""
    dataset, _, image_size = store.name.rpartition("-")
    return UserError(message, hint=f"{action}_{dataset}", image_size=image_size, **values)
