"""Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, github.com/zalandoresearch/fashion-mnist)."""

import gzip
import hashlib
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cvae.data.store import Manifest, SplitManifest, Store, store_path
from cvae.errors import UserError
from cvae.preparation import store_writer
from cvae.preparation.download import fetch
from cvae.preparation.store_writer import Prepared, save_array

IMAGE_SIZE = 28
_CLASSES = "T-shirt/top, Trouser, Pullover, Dress, Coat, Sandal, Shirt, Sneaker, Bag, Ankle boot"
CLASSES = _CLASSES.split(", ")
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist
URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com"
MD5 = {
    "train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
}
_PREFIXES = {"train": "train", "test": "t10k"}


def prepare_fashion_mnist(source: Path | None = None) -> Prepared:
    """Prepares fashion_mnist-28 with the splits train and test.

    source: a folder of the four idx or idx.gz files; by default Debian's, else they are downloaded.
    Raises UserError if a file is missing or damaged, if a download fails, or if the store was prepared
    from other files or is being prepared by another process.
    """
    path = store_path("fashion_mnist", IMAGE_SIZE)
    with store_writer.building(path) as folder:
        manifest = store_writer.intact_manifest(path, _PREFIXES)
        complete = manifest is not None and set(_PREFIXES) <= set(manifest.splits)
        if complete and source is None:
            return Prepared(Store(path), made=False)
        if source is None:
            source = DEBIAN_FOLDER if DEBIAN_FOLDER.is_dir() else download(folder / "download", URL)
        data = {split: _read_split(source, prefix) for split, prefix in _PREFIXES.items()}
        if manifest is not None:
            if any(content.source != data[name][2] for name, content in manifest.splits.items()):
                raise UserError(
                    f"{path} was prepared from other files than those in {source}; "
                    "delete that folder to prepare it anew"
                )
            if complete:
                return Prepared(Store(path), made=False)
        splits = {}
        for split, (images, labels, checksums) in data.items():
            save_array(folder / split / "images.npy", images[:, None])
            save_array(folder / split / "labels.npy", labels.astype(np.int64))
            save_array(folder / split / "ids.npy", np.arange(len(images), dtype=np.int64))
            splits[split] = SplitManifest(
                source=checksums,
                images=len(images),
                captions=0,
                skipped=[],
                files=store_writer.file_entries(folder / split),
            )
        manifest = Manifest(
            dataset="fashion_mnist",
            image_size=IMAGE_SIZE,
            channels=1,
            classes=CLASSES,
            splits=splits,
            text_encoders={},
        )
        return Prepared(store_writer.commit(folder, path, manifest), made=True)


def download(folder: Path, url: str) -> Path:
    """Downloads the four files that `folder` lacks, checks their MD5 and returns the folder.

    Raises UserError if the server cannot be reached or sends something else.
    """
    folder.mkdir(parents=True, exist_ok=True)
    instead = (
        "without network install Debian's package dataset-fashion-mnist or give a folder of the "
        "idx files: --source DIR"
    )
    for name, md5 in MD5.items():
        fetch(f"{url}/{name}", folder / name, md5, instead)
    return folder


def _read_split(
    folder: Path, prefix: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], dict[str, str]]:
    """Returns images (N, 28, 28), labels (N,) and the checksums of their files."""
    images, images_sha256 = read_idx(folder, f"{prefix}-images-idx3-ubyte", 3)
    labels, labels_sha256 = read_idx(folder, f"{prefix}-labels-idx1-ubyte", 1)
    files = f"{folder}/{prefix}-*"
    if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE) or len(images) == 0:
        raise UserError(f"{files}: images are {images.shape}, not (N, {IMAGE_SIZE}, {IMAGE_SIZE})")
    if len(images) != len(labels):
        raise UserError(f"{files}: {len(images)} images but {len(labels)} labels")
    if labels.max() >= len(CLASSES):
        raise UserError(f"{files}: label {labels.max()}; Fashion-MNIST has 0 to {len(CLASSES) - 1}")
    return images, labels, {"images_sha256": images_sha256, "labels_sha256": labels_sha256}


def read_idx(folder: Path, name: str, dims: int) -> tuple[NDArray[np.uint8], str]:
    """Returns the byte array of an idx file (yann.lecun.com/exdb/mnist), and the file's sha256.

    The file may be compressed, <name>.gz; its sha256 is that of the uncompressed content. Raises
    UserError if the file is absent or damaged.
    """
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.is_file()), None)
    if path is None:
        raise UserError(f"{folder} has neither {name}.gz nor {name}")
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is damaged: {error}") from None
    header = struct.calcsize(f">4B{dims}I")
    # Two zero bytes, 8 for unsigned bytes, the number of dimensions, their sizes.
    if len(content) < header or content[:4] != bytes([0, 0, 8, dims]):
        raise UserError(f"{path} is not an idx file of {dims}-dimensional unsigned bytes")
    shape = struct.unpack(f">{dims}I", content[4:header])
    if len(content) - header != math.prod(shape):
        raise UserError(
            f"{path} is damaged: {len(content) - header} bytes of data, "
            f"but its header promises {math.prod(shape)}"
        )
    array = np.frombuffer(content, np.uint8, offset=header).reshape(shape)
    return array, hashlib.sha256(content).hexdigest()
