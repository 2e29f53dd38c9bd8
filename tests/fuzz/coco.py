"""COCO downloads that are odd: annotations of other forms, images of every kind or none."""

import io
import json
import os
import random
import struct
import zlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cvae.data.store import open_store
from cvae.data.text_encoder import TextEncoder
from cvae.errors import UserError
from cvae.preparation import coco as product
from cvae.preparation import image_decoding
from tests.fuzz import damage
from tests.fuzz.frame import Case, command, target

_FOLDER, _CAPTIONS = "val2017", "annotations/captions_val2017.json"
_MODES = ("RGB", "L", "CMYK", "1", "P", "RGBA", "LA", "I;16", "F", "YCbCr")
_NAMES: list[Any] = [
    "x.jpg",
    "é.png",
    "..",
    "../x.jpg",
    "/etc/passwd",
    "",
    "a\0b",
    "\ud800.jpg",
    "x" * 300,
    "A.JPG",
]
_TEXTS: list[Any] = [
    "",
    " \n",
    None,
    5,
    "half a pair \ud83d",
    "\0",
    "ein Bär 🐻",
    "word " * 600,
    ["x"],
    {},
    "\u202e",
    True,
]
_IDS: list[Any] = [0, -1, 1, 2**63, -(2**63), 10**40, "1", 1.0, True, None, [], {}, float("nan")]


class _Toy(TextEncoder):
    """Vectors of four sums of code points: what an encoder is told, and no more."""

    def token_counts(self, captions: Sequence[str]) -> NDArray[np.int64]:
        return np.array([len(caption.split()) + 2 for caption in captions], np.int64)

    def encode_unique(
        self, captions: Sequence[str], advance: Callable[[int], object] = lambda count: None
    ) -> NDArray[np.float32]:
        advance(len(captions))
        sums = [[sum(map(ord, caption[n::4])) for n in range(4)] for caption in captions]
        return np.array(sums, np.float32).reshape(-1, 4)


def _toy(name: str, precision: str = "fp32") -> _Toy:
    return _Toy("toy", "0" * 64, {}, None, 4, 32, "fp32", None, None)


def _in_this_process(function: Callable[[Any], int], tasks: Iterable[Any], bar: Any) -> None:
    """As run_parallel, whose processes take longer to start than a case has."""
    for task in tasks:
        bar.update(function(task))


@target("coco")
def coco(draw: random.Random, folder: Path) -> Case:
    root = folder / "coco"
    (root / _FOLDER).mkdir(parents=True)
    (root / "annotations").mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number in range(4):
        name = f"{number:012}.jpg"
        (root / _FOLDER / name).write_bytes(_image(draw, odd=draw.random() < 0.2))
        images.append({"id": number, "file_name": name, "height": 8, "width": 8})
        annotations.append({"id": number, "image_id": number, "caption": f"Picture {number}.\n"})
    tree: Any = {"info": {"year": 2017}, "images": images, "annotations": annotations}
    done = [draw.choice(_ACTS)(draw, root, tree) for _ in range(draw.choice([0, 1, 1, 2, 3]))]
    if draw.random() < 0.15:
        tree = damage.other_value(draw, tree)
    content = json.dumps(tree).encode()
    if draw.random() < 0.2:
        content = damage.damaged(draw, content)
    (root / _CAPTIONS).write_bytes(content)
    if draw.random() < 0.05:
        done.append(damage.damage_a_file(draw, root, [_CAPTIONS]))
    # So small a source has no hundred images of which one may be bad.
    tolerated = draw.choice([0.01, 1.0])

    def read() -> None:
        from workflows import prepare

        words = ["coco", "--root", str(root), "--split", _FOLDER, "--size", "8"]
        words += draw.choice([[], ["--crop"]])
        with ExitStack() as patched, damage.untouched(root):
            patched.enter_context(mock.patch.dict(os.environ, {"CVAE_HOME": str(folder)}))
            for place, name, value in (
                (product, "load_encoder", _toy),
                (product, "_TOLERATED", tolerated),
                (image_decoding, "run_parallel", _in_this_process),
            ):
                patched.enter_context(mock.patch.object(place, name, value))
            words += ["--text", "toy"]
            outcome = command(prepare.main, words, str(root), "captions_val2017.json")
            store = folder / "data" / "coco-8"
            if outcome.refusal:
                assert not (store / "manifest.json").exists(), "a store of what was refused"
                raise UserError(outcome.refusal)
            _check(root, store, tree)
            assert "nothing to do" in command(prepare.main, words).out, "prepared anew"

    return Case(f"{done} {content[:1500]!r}", read)


def _check(root: Path, path: Path, tree: Any) -> None:
    """The store holds, image by image, what the files and the annotations say."""
    store = open_store("coco", 8)
    store.verify()
    split = store.split("val", "toy")
    listed = store.manifest.splits["val"]
    assert len(split.images) == listed.images, "another number of images than the manifest's"
    assert split.captions is not None
    assert split.caption_offsets is not None
    assert split.text is not None
    assert len(split.captions) == len(split.text) == listed.captions == split.caption_offsets[-1]
    assert np.array_equal(split.text, _toy("toy").encode_unique(split.captions)), "other vectors"
    assert all(caption.strip() for caption in split.captions), "an empty caption"
    try:
        listing = json.loads((root / _CAPTIONS).read_bytes())
    except ValueError:
        raise AssertionError("annotations that are not JSON") from None
    names: dict[int, str] = {}
    for image in listing["images"]:
        names.setdefault(image["id"], image["file_name"])
    crop = "centre" in listed.source["resize"]
    for row, number in enumerate(split.ids.tolist()):
        expected = image_decoding.decode(root / _FOLDER / names[number], 8, crop)
        assert np.array_equal(split.images[row], expected), f"image {number} is another"
        first, last = split.caption_offsets[row : row + 2]
        said = [a["caption"] for a in listing["annotations"] if a.get("image_id") == number]
        plain = [
            " ".join(t.encode("utf-8", "replace").decode().split())
            for t in said
            if isinstance(t, str)
        ]
        assert all(caption in plain for caption in split.captions[first:last]), (
            f"captions of {number}"
        )


def _image(draw: random.Random, odd: bool) -> bytes:
    if odd and draw.random() < 0.2:
        return draw.choice([b"", b"\xff\xd8\xff", b"GIF89a", b"<svg/>", bytes(500), _huge()])
    size = draw.choice([(1, 1), (1, 300), (300, 1), (9, 7)]) if odd else (9, 7)
    mode = draw.choice(_MODES) if odd else "RGB"
    content = _encoded(
        mode,
        size,
        draw.choice(["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"]) if odd else "JPEG",
        draw.choice([0, 1, 3, 6, 9, 255]) if odd else 0,
    )
    if odd and draw.random() < 0.3:
        changed = bytearray(content[: draw.randrange(len(content))] or content)
        changed[draw.randrange(len(changed))] = draw.randrange(256)
        return bytes(changed)
    return content


@cache
def _encoded(mode: str, size: tuple[int, int], kind: str, orientation: int) -> bytes:
    pixels = np.random.default_rng(size).integers(0, 255, (size[1], size[0], 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    image = (
        image.convert("L").convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
    )
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    file = io.BytesIO()
    try:
        image.save(file, kind, exif=exif)
    except (OSError, ValueError):  # of a mode that this format does not have
        image.convert("RGB").save(file, kind, exif=exif)
    return file.getvalue()


@cache
def _huge() -> bytes:
    """A PNG of 60,000 × 60,000 pixels, in a few bytes."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content))
            + kind
            + content
            + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(999)))
        + chunk(b"IEND", b"")
    )


def _odd_key(draw: random.Random, root: Path, tree: Any) -> str:
    """A key of an image or a caption gone, or of another value."""
    entry = draw.choice(draw.choice([tree["images"], tree["annotations"]]) or [{}])
    key = draw.choice(["id", "file_name", "image_id", "caption", "height"])
    if draw.random() < 0.3:
        entry.pop(key, None)
        return f"no {key}"
    entry[key] = draw.choice({"file_name": _NAMES, "caption": _TEXTS}.get(key, _IDS))
    return f"{key} is {str(entry[key])[:30]!r}"


def _more(draw: random.Random, root: Path, tree: Any) -> str:
    """An image or a caption twice, of something absent, or without company."""
    act = draw.choice(["image", "caption", "absent", "bare", "stray"])
    if act == "image":
        tree["images"].append({**draw.choice(tree["images"]), "id": draw.choice([0, 77])})
    elif act == "caption":
        tree["annotations"].append(
            {"id": draw.choice([0, 88]), "image_id": draw.choice([0, 1, 5555]), "caption": "x"}
        )
    elif act == "absent":
        _remove(root / _FOLDER / "000000000001.jpg")
    elif act == "bare":
        tree["annotations"] = tree["annotations"][1:]
    else:
        name = draw.choice([b"stray.jpg", b"\xff\xfe.png", b"a\nb.jpg", b"notes.txt"])
        (root / _FOLDER / os.fsdecode(name)).write_bytes(_encoded("RGB", (9, 7), "JPEG", 0))
    return act


def _nested(draw: random.Random, root: Path, tree: Any) -> str:
    value: Any = draw.choice([None, float("nan"), "\ud800", 10**400])
    for _ in range(draw.choice([1, 40, 60, 300])):
        value = draw.choice([[value], {"a": value}, {"\ud800": value}, [None, value]])
    place = draw.choice([tree, tree["images"][0], (tree["annotations"] or tree["images"])[0]])
    place[draw.choice(["info", "licenses", "x"])] = value
    return "nested"


def _remove(file: Path) -> None:
    if file.is_dir():
        file.rmdir()
    else:
        file.unlink(missing_ok=True)


def _other_file(draw: random.Random, root: Path, tree: Any) -> str:
    file = root / _FOLDER / f"{draw.randrange(4):012}.jpg"
    _remove(file)
    act = draw.choice(["folder", "link", "loop", "pipe"])
    if act == "folder":
        file.mkdir()
    elif act == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(file.name if act == "loop" else "nowhere")
    return act


_ACTS = (_odd_key, _odd_key, _more, _more, _nested, _other_file)
