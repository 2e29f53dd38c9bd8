"""The COCO path from a download to a store, with damage and company."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cvae.data.store import open_store, store_path
from cvae.data.text_encoder import load_encoder
from cvae.errors import UserError
from cvae.preparation.coco import CocoRequest, prepare_coco
from cvae.preparation.image_decoding import decode
from cvae.preparation.store_writer import locked
from tests.conftest import PROJECT_ROOT
from tests.cvae.data.conftest import (
    contents,
    read_annotations_file,
    write_annotations,
    write_coco,
)

COCO_SAMPLE = PROJECT_ROOT.parent / "shared" / "coco_sample"
SPLITS = {"train": "train2017", "val": "val2017"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_coco(tmp_path_factory.mktemp("coco"), {"train2017": 150, "val2017": 30})


@pytest.mark.usefixtures("home")
def test_a_store_holds_what_the_download_holds(root: Path, small_bert: str) -> None:
    made = prepare_coco(CocoRequest(root, SPLITS, 16, small_bert))
    assert made.made
    store = open_store("coco", 16)
    store.verify()
    split = store.split("train", small_bert)
    source = read_annotations_file(root, "train2017")
    name_of = {image["id"]: image["file_name"] for image in source["images"]}
    assert split.ids.tolist() == sorted(name_of)
    assert split.images.shape == (150, 3, 16, 16)
    assert split.caption_offsets is not None
    assert split.text is not None
    assert split.text.dtype == np.float32
    for index in (0, 77, 149):
        image_id = int(split.ids[index])
        expected = decode(root / "train2017" / name_of[image_id], 16)
        np.testing.assert_array_equal(split.images[index], expected)
        first, last = split.caption_offsets[index : index + 2]
        captions = [a["caption"] for a in source["annotations"] if a["image_id"] == image_id]
        assert split.captions[first:last] == [caption.strip() for caption in captions]
        vectors = load_encoder(small_bert).encode(split.captions[first:last])
        np.testing.assert_allclose(split.text[first:last], vectors, atol=1e-5)
    content = store.manifest.splits["train"]
    assert (content.images, content.captions) == (150, len(source["annotations"]))
    assert content.source["images"] == "train2017"
    assert "/" not in json.dumps({**content.source, "info": None})  # no path of this machine


@pytest.mark.usefixtures("home")
def test_a_complete_store_is_left_alone(root: Path, small_bert: str) -> None:
    prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert))
    path = store_path("coco", 16)
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    assert not prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert)).made
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before


@pytest.mark.usefixtures("home")
def test_splits_and_encoders_are_added_to_what_is_there(
    root: Path, small_bert: str, tmp_path: Path
) -> None:
    prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert))
    path = store_path("coco", 16)
    images = (path / "val" / "images.npy").stat().st_mtime_ns
    prepare_coco(CocoRequest(root, SPLITS, 16, small_bert))
    twin = str(shutil.copytree(small_bert, tmp_path / "twin"))
    prepare_coco(CocoRequest(root, SPLITS, 16, twin))
    store = open_store("coco", 16)
    store.verify()
    assert (path / "val" / "images.npy").stat().st_mtime_ns == images
    for name in SPLITS:
        ours, theirs = (store.split(name, encoder).text for encoder in (small_bert, twin))
        assert ours is not None
        assert theirs is not None
        np.testing.assert_array_equal(ours, theirs)
    assert list(store.manifest.text_encoders) == sorted([small_bert, twin])
    assert not (path / ".preparing").exists()

    weights = Path(twin) / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    (path / "train" / "text").rename(path / "train" / "lost")
    with pytest.raises(UserError, match=r"encoded by another .*weights of sha256"):
        prepare_coco(CocoRequest(root, SPLITS, 16, twin))
    weights.write_bytes(content)
    with (Path(twin) / "vocab.txt").open("a") as vocabulary:
        vocabulary.write("\nyellow")
    with pytest.raises(UserError, match=r"encoded by another .*\(vocab.txt differs\)"):
        prepare_coco(CocoRequest(root, SPLITS, 16, twin))


@pytest.mark.usefixtures("home")
def test_a_damaged_split_is_made_anew(root: Path, small_bert: str) -> None:
    prepare_coco(CocoRequest(root, SPLITS, 16, small_bert))
    path = store_path("coco", 16)
    intact = contents(path)
    images = path / "val" / "images.npy"
    content = images.read_bytes()
    images.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    train = (path / "train" / "images.npy").stat().st_mtime_ns
    assert prepare_coco(CocoRequest(root, SPLITS, 16, small_bert)).made
    assert contents(path) == intact
    assert (path / "train" / "images.npy").stat().st_mtime_ns == train


@pytest.mark.usefixtures("home")
def test_another_source_never_mixes_with_what_is_there(
    root: Path, small_bert: str, tmp_path: Path
) -> None:
    prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert))
    before = contents(store_path("coco", 16))
    other = write_coco(tmp_path / "other", {"val2017": 31})
    with pytest.raises(UserError, match=r"made from something else \(annotations_sha256 differ"):
        prepare_coco(CocoRequest(other, {"val": "val2017"}, 16, small_bert))
    assert contents(store_path("coco", 16)) == before


@pytest.mark.usefixtures("home")
def test_cropped_and_squeezed_never_mix(root: Path, small_bert: str) -> None:
    prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert, crop=True))
    path = store_path("coco", 16)
    split = open_store("coco", 16).split("val")
    name = f"{int(split.ids[3]):012}.jpg"
    expected = decode(root / "val2017" / name, 16, crop=True)
    np.testing.assert_array_equal(split.images[3], expected)
    before = contents(path)
    for splits in (SPLITS, {"val": "val2017"}, {"train": "train2017"}):
        with pytest.raises(UserError, match="prepared the other way: split 'val' is centre square"):
            prepare_coco(CocoRequest(root, splits, 16, small_bert))
    assert contents(path) == before


@pytest.mark.usefixtures("home")
def test_captions_of_another_split_are_called_that(small_bert: str, tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco", {"train2017": 30, "val2017": 30})
    shutil.rmtree(root / "val2017")
    write_coco(tmp_path / "other", {"val2017": 3})
    val = Path(shutil.copytree(tmp_path / "other" / "val2017", root / "val2017"))
    for number, file in enumerate(sorted(val.iterdir())):
        file.rename(val / f"{number + 5000:012}.jpg")
    with pytest.raises(UserError, match=r"none of the 30 .* captions of another split\?") as caught:
        prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert))
    assert "000000000007.jpg and others, as the folder holds 000000005000.jpg" in str(caught.value)
    assert not store_path("coco", 16).exists()


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("size", [0, 1025, 10**6])
def test_absurd_sizes_are_refused(root: Path, small_bert: str, size: int) -> None:
    with pytest.raises(UserError, match=f"image size {size}: .* 1 to 1024 can be made"):
        prepare_coco(CocoRequest(root, SPLITS, size, small_bert))


@pytest.mark.usefixtures("home")
def test_damaged_images_are_listed_and_skipped(small_bert: str, tmp_path: Path) -> None:
    root = write_coco(tmp_path / "coco", {"val2017": 200})
    (root / "val2017" / "000000000007.jpg").write_bytes(b"")
    (root / "val2017" / "000000001400.jpg").unlink()
    store = prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert)).store
    content = store.manifest.splits["val"]
    assert content.images == 198
    assert [(s.file, s.reason) for s in content.skipped] == [
        ("000000000007.jpg", "empty file"),
        ("000000001400.jpg", "file is absent"),
    ]
    split = store.split("val", small_bert)
    assert split.ids.tolist() == [7 * n for n in range(2, 200)]
    assert split.caption_offsets is not None
    assert len(split.captions) == content.captions == split.caption_offsets[-1]


@pytest.mark.usefixtures("home")
def test_too_many_are_an_error_and_mended_files_are_read_again(
    small_bert: str, tmp_path: Path
) -> None:
    root = write_coco(tmp_path / "coco", {"val2017": 200})
    broken = sorted((root / "val2017").iterdir())[5:8]
    good = [file.read_bytes() for file in broken]
    for file in broken:
        file.write_bytes(file.read_bytes()[:-200])
    with pytest.raises(
        UserError, match=r"3 of 200 images of .*val2017 cannot .* more than 1%; .*jpg"
    ):
        prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert))
    assert not (store_path("coco", 16) / "manifest.json").exists()
    for file, intact in zip(broken, good, strict=True):
        file.write_bytes(intact)
    assert (
        prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert))
        .store.manifest.splits["val"]
        .images
        == 200
    )

    content = read_annotations_file(root, "val2017")
    for annotation in content["annotations"][:30]:
        annotation["caption"] = ""
    write_annotations(root, "val2017", images=content["images"], annotations=content["annotations"])
    with pytest.raises(UserError, match="made from something else"):
        prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert))
    with pytest.raises(UserError, match=r"cannot be used, more than 1%"):
        prepare_coco(CocoRequest(root, {"val": "val2017"}, 24, small_bert))
    assert not store_path("coco", 24).exists()


@pytest.mark.usefixtures("home")
def test_long_captions_are_counted(small_bert: str, tmp_path: Path) -> None:
    root = write_coco(tmp_path, {"val2017": 20})
    content = read_annotations_file(root, "val2017")
    content["annotations"][3]["caption"] = "red " * 500
    write_annotations(root, "val2017", images=content["images"], annotations=content["annotations"])
    store = prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert)).store
    assert store.manifest.text_encoders[small_bert].truncated == {"val": 1}
    assert max(map(len, store.split("val").captions)) == 4 * 500 - 1  # the words are all kept


@pytest.mark.usefixtures("home")
def test_one_at_a_time(root: Path, small_bert: str) -> None:
    with (
        locked(store_path("coco", 16)),
        pytest.raises(UserError, match="is being prepared by another process"),
    ):
        prepare_coco(CocoRequest(root, SPLITS, 16, small_bert))
    prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert))


@pytest.mark.skipif(not COCO_SAMPLE.exists(), reason="../shared/coco_sample is absent")
@pytest.mark.usefixtures("home")
def test_real_coco_images(small_bert: str) -> None:
    store = prepare_coco(CocoRequest(COCO_SAMPLE, {"val": "val2017"}, 64, small_bert)).store
    content = store.manifest.splits["val"]
    assert (content.images, content.captions, content.skipped) == (1965, 9831, [])
    split = store.split("val", small_bert)
    assert 80 < np.mean(split.images) < 150
    assert int(split.ids[0]) == 139
    assert any("woman" in caption for caption in split.captions[:5])


def test_vectors_in_bf16_are_asked_for_and_kept_apart(
    home: Path, root: Path, small_bert: str
) -> None:
    splits = {"val": "val2017"}
    made = prepare_coco(CocoRequest(root, splits, 16, small_bert, text_precision="bf16"))
    assert made.store.manifest.text_encoders[small_bert].precision == "bf16"
    assert not prepare_coco(CocoRequest(root, splits, 16, small_bert, text_precision="bf16")).made
    with pytest.raises(UserError, match="in bf16, requested is fp32"):
        prepare_coco(CocoRequest(root, splits, 16, small_bert))


def test_odd_info_is_recognised_at_the_next_start(
    home: Path, small_bert: str, tmp_path: Path
) -> None:
    root = write_coco(tmp_path / "odd", {"val2017": 3})
    content = read_annotations_file(root, "val2017")
    info = {"x": float("nan"), "\ud800": "\udfff", "y": float("inf")}
    write_annotations(root, "val2017", **{**content, "info": info})
    made = [
        prepare_coco(CocoRequest(root, {"val": "val2017"}, 16, small_bert)).made for _ in range(2)
    ]
    assert made == [True, False]
