import json
import os
from pathlib import Path

import numpy as np
import pytest

import workflows
from cvae.data.store import open_store, text_file
from cvae.errors import UserError


def test_labels_become_one_hot(tiny_store: Path) -> None:
    split = open_store("tiny", 16).split("train")
    indices = np.array([3, 0, 49])
    condition = split.condition(indices, np.zeros(3))
    assert split.labels is not None
    assert condition is not None
    assert condition.shape == (3, split.condition_dim) == (3, 3)
    assert condition.dtype == np.float32
    assert condition.argmax(1).tolist() == split.labels[indices].tolist()
    assert condition.sum(1).tolist() == [1, 1, 1]


def test_choice_picks_each_caption_equally_often(tiny_captioned_store: Path) -> None:
    split = open_store("tinytext", 16).split("train", "toy")
    offsets, text = split.caption_offsets, split.text
    assert offsets is not None
    assert text is not None
    image = int(np.argmax(np.diff(offsets) == 3))
    choice = np.linspace(0, 1, 300, endpoint=False)
    condition = split.condition(np.full(300, image), choice)
    rows = np.repeat(np.arange(offsets[image], offsets[image + 1]), 100)
    assert condition is not None
    np.testing.assert_array_equal(condition, text[rows])
    assert split.caption(image, 0.5) == f"train caption {offsets[image] + 1}"


def test_choice_just_below_one_stays_with_its_image(tiny_captioned_store: Path) -> None:
    split = open_store("tinytext", 16).split("train", "toy")
    every = np.arange(len(split))
    assert split.caption_offsets is not None
    last = split.caption_offsets[1:] - 1
    for just_below in (np.nextafter(np.float32(1), np.float32(0)), 1 - 2**-53):
        choice = np.full(len(split), just_below)
        np.testing.assert_array_equal(split.caption_rows(every, choice), last)


def test_without_labels_and_encoder_there_is_no_condition(tiny_captioned_store: Path) -> None:
    split = open_store("tinytext", 16).split("val")
    assert split.condition(np.array([0]), np.zeros(1)) is None
    assert split.condition_dim == 0
    assert len(split.captions) == int(split.caption_offsets[-1])  # type: ignore[index]


def test_commands_add_how_to_prepare_what_is_absent(home: Path, tiny_captioned_store: Path) -> None:
    for dataset, size, command in (
        ("scenes", 64, "prepare.py scenes"),
        ("coco", 128, "prepare.py coco --root DIR --size 128"),
    ):
        with pytest.raises(
            UserError, match=rf"is not prepared at {size}×{size}: no /[^;]*$"
        ) as caught:
            open_store(dataset, size)
        expected = f"; prepare it with: python {workflows.__name__}/{command}"
        assert caught.value.with_hint() == f"{caught.value}{expected}"
    with pytest.raises(UserError, match=r"there is tinytext-16"):
        open_store("tinytext", 32)
    store = open_store("tinytext", 16)
    with pytest.raises(UserError, match=r"no split 'test'; it has: train, val"):
        store.split("test")
    with pytest.raises(UserError, match=r"not encoded by 'bert'; encoders prepared: toy"):
        store.split("train", "bert")


def test_damage_is_found(tiny_store: Path) -> None:
    images = tiny_store / "train" / "images.npy"
    content = images.read_bytes()
    images.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    store = open_store("tiny", 16)  # a flipped byte costs a full reading
    store.verify("val")
    with pytest.raises(UserError, match=r"train/images.npy is damaged \(its sha256"):
        store.verify()
    images.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"train/images.npy is damaged \(12927 bytes instead of"):
        open_store("tiny", 16)
    images.unlink()
    with pytest.raises(UserError, match=r"train/images.npy is damaged \(missing\)$"):
        open_store("tiny", 16)


def test_a_damaged_manifest_is_one_line(tiny_store: Path) -> None:
    manifest = tiny_store / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "format": 2}))
    with pytest.raises(UserError, match=r"manifest.json is damaged \(.*format"):
        open_store("tiny", 16)
    manifest.write_text(json.dumps(content)[:-9])
    with pytest.raises(UserError, match=r"manifest.json is damaged"):
        open_store("tiny", 16)


def test_encoders_named_by_folder_stay_inside_the_store() -> None:
    assert text_file("/models/bert") == "text/models--bert.npy"
    assert text_file("minilm") == "text/minilm.npy"


def test_large_rows_are_the_same_bits(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvae.data.store.LARGE", 1)
    split = open_store("tiny", 16).split("train")
    rows = np.random.default_rng(0).integers(0, len(split), 200)
    taken = split.take_images(rows)
    assert type(split.images) is np.ndarray
    assert taken.dtype == np.uint8
    np.testing.assert_array_equal(taken, split.images[rows])
    assert split.take_images(rows[:0]).shape == (0, 1, 16, 16)
    file = tiny_store / "train" / "images.npy"
    os.truncate(file, file.stat().st_size - 300)
    with pytest.raises(OSError, match="has become shorter"):
        split.take_images(np.array([0, len(split) - 1]))
