import json
import os
from pathlib import Path
from typing import Any

import pytest

from cvae.errors import UserError
from cvae.preparation.coco_annotations import read_annotations
from tests.cvae.data.conftest import read_annotations_file, write_annotations, write_coco


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_coco(tmp_path, {"val2017": 10})


def changed(root: Path, **extra: list[dict[str, Any]]) -> None:
    content = read_annotations_file(root, "val2017")
    for key, entries in extra.items():
        content[key] += entries
    write_annotations(root, "val2017", **{k: content[k] for k in ("images", "annotations")})


def test_images_come_in_order_of_id_with_clean_captions(root: Path) -> None:
    annotations = read_annotations(root, "val2017")
    assert [image.id for image in annotations.images] == list(range(7, 71, 7))
    assert annotations.images[2].file_name == "000000000021.jpg"
    assert all("\n" not in c and c.strip() == c for i in annotations.images for c in i.captions)
    assert annotations.skipped_images == annotations.skipped_captions == []
    assert annotations.info == {"description": "a test"}


def test_what_cannot_be_used_is_listed_with_its_reason(root: Path) -> None:
    changed(
        root,
        images=[
            {"id": 1000, "file_name": "bare.jpg"},
            {"id": 1001, "file_name": "blank.jpg"},
            {"id": 7, "file_name": "twin.jpg"},
            {"id": 1002, "file_name": "000000000014.jpg"},
        ],
        annotations=[
            {"id": 900, "image_id": 1001, "caption": " \n"},
            {"id": 901, "image_id": 7, "caption": ""},
            {"id": 902, "image_id": 7, "caption": None},
            {"id": 903, "image_id": 5, "caption": "of nothing"},
            {"id": 1, "image_id": 14, "caption": "a second caption of id 1"},
        ],
    )
    for name in ("bare.jpg", "blank.jpg", "twin.jpg", "stray.jpg"):
        (root / "val2017" / name).touch()
    annotations = read_annotations(root, "val2017")
    assert len(annotations.images) == 10
    assert {(s.file, s.reason) for s in annotations.skipped_images} == {
        ("bare.jpg", "no captions"),
        ("blank.jpg", "no captions"),
        ("twin.jpg", "id 7 is taken by another image"),
        ("000000000014.jpg", "file is that of image 14, too"),
        ("stray.jpg", "not listed in captions_val2017.json"),
    }
    assert {(s.file, s.reason) for s in annotations.skipped_captions} == {
        ("blank.jpg", "caption 900 is empty"),
        ("000000000007.jpg", "caption 901 is empty"),
        ("000000000007.jpg", "caption 902 is empty"),
        ("captions_val2017.json", "caption 903 is of image 5, which is not listed"),
        ("000000000014.jpg", "caption id 1 is taken by another caption"),
    }


def test_unicode_survives_and_what_is_none_does_not(root: Path) -> None:
    changed(
        root,
        annotations=[
            {"id": 900, "image_id": 7, "caption": "ein Bär 🐻 im  Schnee"},
            {"id": 901, "image_id": 7, "caption": "half a pair \ud83d."},
        ],
    )
    captions = read_annotations(root, "val2017").images[0].captions
    assert captions[-2:] == ("ein Bär 🐻 im Schnee", "half a pair ?.")


def listing(**image: Any) -> str:
    content = {"id": 1, "file_name": "1.jpg", **image}
    return json.dumps(
        {"images": [content], "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]}
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [{"id"', "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        ("[1, 2]", "is not COCO captions"),
        ('{"info": {}}', "is not COCO captions"),
        (
            '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": '
            '[{"id": 1, "image_id": 1, "bbox": [0, 0, 1, 1]}]}',
            r"has no captions; .* not in instances_",
        ),
        (
            '{"images": [{"file_name": "1.jpg"}], "annotations": '
            '[{"id": 1, "image_id": 1, "caption": "x"}]}',
            "COCO captions",
        ),
        ('{"images": {"a": 1}, "annotations": [{"id": 1, "image_id": 1}]}', "not COCO captions"),
        ('{"images": [1], "annotations": [2]}', "is not COCO captions"),
        ('{"images": 5, "annotations": "x"}', "is not COCO captions"),
        ("null", "is not COCO captions"),
        ("[" * 100_000, "is not JSON"),
        (listing(id="1"), "no whole number as id"),
        (listing(id=True), "no whole number as id"),
        (listing(id=1.0), "no whole number as id"),
        (listing(id=2**70), "no whole number as id"),
        (listing(file_name=None), "an image has no file_name"),
        (listing(file_name="../x.jpg"), r"image 1 is not the plain name of a file: '../x.jpg'"),
        (listing(file_name="/etc/passwd"), "is not the plain name of a file"),
        (listing(file_name=".."), "is not the plain name of a file"),
        (listing(file_name="a\0.jpg"), "is not the plain name of a file"),
        (listing(file_name="\ud83d.jpg"), "is not the plain name of a file"),
        (listing(file_name="x" * 300), "is not the plain name of a file"),
        (
            '{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": '
            '[{"id": "a", "image_id": "1", "caption": "x"}]}',
            "a caption has no whole numbers as id and image_id",
        ),
        (
            '{"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1, "caption": "x"}]}',
            "an image has no file_name or no whole number as id",
        ),
    ],
)
def test_other_files_are_refused_in_one_line(
    root: Path, content: str | bytes, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = root / "annotations" / "captions_val2017.json"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UserError, match=message) as caught:
        read_annotations(root, "val2017")
    assert "captions_val2017.json" in str(caught.value)
    assert capsys.readouterr().out == ""  # pycocotools likes to talk


def test_an_absent_source_says_what_is_expected(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"must hold train2017/ and annotations/captions_train2017"):
        read_annotations(root, "train2017")
    (tmp_path / "train2017").write_text("")
    annotations = root / "annotations"
    (annotations / "captions_val2017.json").rename(annotations / "captions_train2017.json")
    with pytest.raises(UserError, match=r"train2017 is not a folder; .* must hold"):
        read_annotations(root, "train2017")
    (annotations / "captions_val2017.json").mkdir()
    with pytest.raises(UserError, match=r"captions_val2017.json is not a file; .* must hold"):
        read_annotations(root, "val2017")
    with pytest.raises(UserError, match="train2017 is a file; it must be the folder of"):
        read_annotations(tmp_path / "train2017", "val2017")


NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("info", "plain"),
    [
        ({"description": "a\ud800b"}, {"description": "a?b"}),
        ({"\udfff": 1}, {"?": 1}),
        ({"x": [NAN, INFINITY, -INFINITY]}, {"x": ["NaN", "Infinity", "-Infinity"]}),
        ({"year": 2017, "π": {"a": [None, True, 1.5, 10**40]}},) * 2,
        (["no object"], {}),
        (None, {}),
    ],
)
def test_info_reads_back_as_it_is_written(root: Path, info: Any, plain: dict[str, Any]) -> None:
    content = read_annotations_file(root, "val2017")
    write_annotations(root, "val2017", **{**content, "info": info})
    annotations = read_annotations(root, "val2017")
    assert annotations.info == plain
    assert json.loads(json.dumps(annotations.info, ensure_ascii=False).encode()) == plain


def test_info_of_too_many_levels_is_refused(root: Path) -> None:
    content = read_annotations_file(root, "val2017")
    info: dict[str, Any] = {}
    for _ in range(60):
        info = {"a": [info]}
    write_annotations(root, "val2017", **{**content, "info": info})
    with pytest.raises(UserError, match="info is nested more than 50 levels deep"):
        read_annotations(root, "val2017")


@pytest.mark.parametrize("caption", [" \n", "", 5, None])
def test_a_source_without_any_usable_caption_is_refused(root: Path, caption: object) -> None:
    content = read_annotations_file(root, "val2017")
    for annotation in content["annotations"]:
        annotation["caption"] = caption
    write_annotations(root, "val2017", **content)
    with pytest.raises(
        UserError, match="no image has a usable caption, for example: caption 1 is empty"
    ):
        read_annotations(root, "val2017")


def test_names_that_cannot_be_printed_are_listed_as_escapes(root: Path) -> None:
    for name in (b"\xff\xfe.jpg", b"a\nb\x1b[2J.jpg"):
        (root / "val2017" / os.fsdecode(name)).write_bytes(b"")
    names = [skipped.file for skipped in read_annotations(root, "val2017").skipped_images]
    assert names == [r"a\nb\x1b[2J.jpg", r"\xff\xfe.jpg"]
