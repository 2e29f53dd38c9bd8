"""Writes files of data sets: the manifest of a store that a test has made, and the idx files of Fashion-MNIST."""

import gzip
import struct
from pathlib import Path

import numpy as np

from cvae.data.store import FileEntry, Manifest, SplitManifest, TextEncoderEntry
from cvae.files.checksums import sha256_of_file


def write_manifest(
    root: Path,
    shape: tuple[int, int],
    counts: dict[str, tuple[int, int]],
    classes: list[str] | None,
    text_dim: int | None,
) -> None:
    """Writes manifest.json for the files under root, whose name is <dataset>-<image size>.

    shape: channels and image size. counts: images and captions of each split. text_dim: dimension of the vectors
    of the encoder "toy"; None without text.
    """
    splits = {}
    for name, (images, captions) in counts.items():
        files = {
            str(file.relative_to(root / name)): FileEntry(
                bytes=file.stat().st_size, sha256=sha256_of_file(file)
            )
            for file in sorted((root / name).rglob("*"))
            if file.is_file()
        }
        splits[name] = SplitManifest(
            source={}, images=images, captions=captions, skipped=[], files=files
        )
    encoders = {}
    if text_dim is not None:
        encoders["toy"] = TextEncoderEntry(
            dim=text_dim, hash="0", pooling="masked mean", max_tokens=9, truncated={}
        )
    manifest = Manifest(
        dataset=root.name.rpartition("-")[0],
        image_size=shape[1],
        channels=shape[0],
        classes=classes,
        splits=splits,
        text_encoders=encoders,
    )
    (root / "manifest.json").write_text(manifest.to_json())


def write_idx_folder(folder: Path, train: int = 60, test: int = 20) -> Path:
    """Random pictures in the four files; pixel (0, 0) of each is its label."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for prefix, count in (("train", train), ("t10k", test)):
        labels = rng.integers(0, 10, count, dtype=np.uint8)
        images = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        images[:, 0, 0] = labels
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            path = folder / f"{prefix}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(header + array.tobytes(), mtime=0))
    return folder
