import contextlib
import functools
import gzip
import hashlib
import struct
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from cvae.data.store import open_store, store_path
from cvae.errors import UserError
from cvae.preparation import fashion_mnist
from cvae.preparation.fashion_mnist import DEBIAN_FOLDER, MD5, download, prepare_fashion_mnist
from tests.cvae.data.conftest import contents
from tests.helpers.stores import write_idx_folder


@pytest.mark.usefixtures("home")
def test_images_and_labels_stay_together(tmp_path: Path) -> None:
    folder = write_idx_folder(tmp_path / "idx")
    plain = folder / "t10k-images-idx3-ubyte.gz"
    plain.with_suffix("").write_bytes(gzip.decompress(plain.read_bytes()))
    plain.unlink()  # idx and idx.gz may be mixed
    assert prepare_fashion_mnist(folder).made
    store = open_store("fashion_mnist", 28)
    store.verify()
    assert store.manifest.channels == 1
    assert store.manifest.classes is not None
    assert store.manifest.classes[9] == "Ankle boot"
    for name, count in (("train", 60), ("test", 20)):
        split = store.split(name)
        assert split.images.shape == (count, 1, 28, 28)
        np.testing.assert_array_equal(split.images[:, 0, 0, 0], split.labels)
        assert split.condition_dim == 10


@pytest.mark.usefixtures("home")
def test_prepared_once(tmp_path: Path) -> None:
    folder = write_idx_folder(tmp_path / "idx")
    prepare_fashion_mnist(folder)
    before = contents(store_path("fashion_mnist", 28))
    assert not prepare_fashion_mnist(folder).made
    assert not prepare_fashion_mnist().made
    other = write_idx_folder(tmp_path / "other", train=61)
    with pytest.raises(UserError, match="was prepared from other files than those in"):
        prepare_fashion_mnist(other)
    assert contents(store_path("fashion_mnist", 28)) == before


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "train-images-idx3-ubyte.gz",
            lambda raw: raw[:-5],
            "is damaged: 47035 bytes of data, .* 47040",
        ),
        ("train-images-idx3-ubyte.gz", lambda raw: raw + b"x", "is damaged: 47041 bytes"),
        ("train-images-idx3-ubyte.gz", lambda raw: raw[:9], "is not an idx file"),
        ("train-images-idx3-ubyte.gz", lambda raw: b"\0\0\x0d\3" + raw[4:], "is not an idx file"),
        (
            "train-images-idx3-ubyte.gz",
            lambda raw: raw[:4] + struct.pack(">I", 30) + raw[8:],
            "damaged",
        ),
        ("t10k-labels-idx1-ubyte.gz", lambda raw: raw[:-1] + b"\x0a", "label 10"),
        (
            "t10k-labels-idx1-ubyte.gz",
            lambda raw: raw[:4] + struct.pack(">I", 19) + raw[8:-1],
            "20 images but 19 labels",
        ),
    ],
)
def test_a_damaged_idx_file_is_one_line(home: Path, name: str, change, message: str) -> None:  # type: ignore[no-untyped-def]
    folder = write_idx_folder(home / "idx")
    raw = gzip.decompress((folder / name).read_bytes())
    (folder / name).write_bytes(gzip.compress(change(raw)))
    with pytest.raises(UserError, match=message):
        prepare_fashion_mnist(folder)
    assert not list((home / "data").glob("fashion_mnist*"))  # nothing is written


def test_a_damaged_gzip_file_is_one_line(home: Path) -> None:
    folder = write_idx_folder(home / "idx")
    path = folder / "train-labels-idx1-ubyte.gz"
    content = path.read_bytes()
    for damaged in (content[:-12], content[:-6] + b"\0\0" + content[-4:], b"hello", b""):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"train-labels-idx1-ubyte.gz is (damaged|not an idx)"):
            prepare_fashion_mnist(folder)
    path.unlink()
    with pytest.raises(UserError, match=r"has neither train-labels-idx1-ubyte.gz nor"):
        prepare_fashion_mnist(folder)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler = functools.partial(Quiet, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of files that are taken for the published ones."""
    folder = write_idx_folder(tmp_path / "published")
    for name in MD5:
        md5 = hashlib.md5((folder / name).read_bytes()).hexdigest()
        monkeypatch.setitem(fashion_mnist.MD5, name, md5)
    return folder


def test_download_checks_what_it_gets(published: Path, tmp_path: Path) -> None:
    with serve(published) as url:
        assert contents(download(tmp_path / "got", url)) == contents(published)
        name = "t10k-labels-idx1-ubyte.gz"
        (tmp_path / "got" / name).unlink()
        (published / name).write_bytes(b"something else")
        (published / "train-images-idx3-ubyte.gz").unlink()  # was fetched: not asked for again
        with pytest.raises(UserError, match=r"t10k-labels.* is not the published file"):
            download(tmp_path / "got", url)
        assert not (tmp_path / "got" / name).exists()
        (published / name).unlink()
        with pytest.raises(
            UserError, match=r"cannot download .*\((Not Found|File not found)\)"
        ) as e:
            download(tmp_path / "got", url)
        assert "--source DIR" in str(e.value)


@pytest.mark.usefixtures("home")
def test_without_a_source_it_is_downloaded(
    published: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "absent")
    with serve(published) as url:
        monkeypatch.setattr(fashion_mnist, "URL", url)
        assert prepare_fashion_mnist().made
    assert len(open_store("fashion_mnist", 28).split("train")) == 60
    assert not (store_path("fashion_mnist", 28) / ".preparing").exists()


def test_no_server_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"cannot download .*Connection refused.*dataset-fashion-mnist"
    ):
        download(tmp_path, "http://127.0.0.1:9")


@pytest.mark.skipif(not DEBIAN_FOLDER.exists(), reason="Debian's dataset-fashion-mnist is absent")
@pytest.mark.usefixtures("home")
def test_the_real_data_set() -> None:
    prepare_fashion_mnist()
    store = open_store("fashion_mnist", 28)
    train, test = store.split("train"), store.split("test")
    assert (len(train), len(test)) == (60000, 10000)
    assert train.labels is not None
    assert np.bincount(train.labels).tolist() == [6000] * 10
    assert train.labels[:5].tolist() == [9, 0, 0, 3, 0]  # the well-known first five
    assert abs(train.images.mean() / 255 - 0.2860) < 1e-4
