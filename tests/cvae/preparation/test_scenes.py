import re
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cvae.data.store import open_store, store_path
from cvae.errors import UserError
from cvae.files.paths import data_dir
from cvae.preparation import scenes, scenes_coco
from cvae.preparation.coco_annotations import read_annotations
from cvae.preparation.scenes import COLOURS, PLACES, SHAPES, SIZES, Scene, Thing
from cvae.preparation.scenes_coco import prepare_scenes
from tests.cvae.data.conftest import contents

PHRASE_OF_PLACE = {phrase: place for place, phrases in PLACES.items() for phrase in phrases}
WORD_OF_SHAPE = {word: shape for shape, words in SHAPES.items() for word in words}
WORD_OF_SIZE = {word: size for size, words in SIZES.items() for word in words if word}


def longest_first(words: dict[str, str]) -> str:
    return "|".join(sorted(words, key=len, reverse=True))


THING = (
    rf"an? (?:(?P<size>{longest_first(WORD_OF_SIZE)}) )?(?P<colour>{'|'.join(COLOURS)}) "
    rf"(?P<shape>{longest_first(WORD_OF_SHAPE)})"
)
PLACE = rf"(?P<place>{longest_first(PHRASE_OF_PLACE)})"


def understood(caption: str) -> Scene:
    """Reads a full caption back. A second, independent account of what the words mean."""
    place_first = re.match(PLACE, caption) is not None
    pattern = f"{PLACE} {THING}" if place_first else f"{THING} {PLACE}"
    things = tuple(
        Thing(
            WORD_OF_SHAPE[m["shape"]],
            m["colour"],
            WORD_OF_SIZE[m["size"]] if m["size"] else "",
            PHRASE_OF_PLACE[m["place"]],
        )
        for m in re.finditer(pattern, caption)
    )
    ground = re.match(r"([a-z ]+) background,", caption) or re.search(
        r"on (?:a )?((?:light )?[a-z]+)(?: background)?$", caption
    )
    assert ground is not None, caption
    return Scene(things, ground[1])


def scene_of(seed: int, image_id: int) -> Scene:
    return scenes.draw_scene(scenes.generator(seed, image_id))


def test_captions_are_true_and_four_of_five_tell_all() -> None:
    for image_id in range(1, 400):
        scene = scene_of(0, image_id)
        captions = scenes.captions_of(0, image_id)
        assert len(captions) == scenes.CAPTIONS_PER_IMAGE == 5
        for caption in captions[:4]:
            assert understood(caption) == scene, caption
        assert len(set(captions[:4])) == 4
        colours = [
            c for c in COLOURS if re.search(rf"\b{c}\b", captions[4].replace("light blue", ""))
        ]
        assert set(colours) == {thing.colour for thing in scene.things}


def test_a_scene_is_a_function_of_seed_and_id() -> None:
    picture, captions = scenes.example(3, 17)
    again, same = scenes.example(3, 17)
    assert picture.tobytes() == again.tobytes()
    assert captions == same == scenes.captions_of(3, 17)
    assert scene_of(3, 17) != scene_of(4, 17)
    assert scene_of(3, 17) != scene_of(3, 18)


def test_scenes_are_varied_and_apart() -> None:
    drawn = [scene_of(0, image_id) for image_id in range(1, 2001)]
    shares = Counter(len(scene.things) for scene in drawn)
    assert [round(shares[n] / 2000, 1) for n in (1, 2, 3)] == [0.6, 0.3, 0.1]
    assert len(set(drawn)) > 1500
    for scene in drawn:
        assert len({thing.place for thing in scene.things}) == len(scene.things)
        assert len({thing.colour for thing in scene.things}) == len(scene.things)


def test_pictures_show_what_is_said() -> None:
    for image_id in range(1, 120):
        scene = scene_of(0, image_id)
        exact = np.asarray(scenes.render(scene)).astype(float)
        jittered = np.asarray(scenes.example(0, image_id)[0]).astype(float)
        for pixels in (exact, jittered):
            for thing in scene.things:
                x, y = (round(64 * part) for part in scenes._centre(scene, thing))
                assert nearest(pixels[y - 1 : y + 2, x - 1 : x + 2], COLOURS) == thing.colour
            corner = min(
                ((2, 2), (2, 61), (61, 2), (61, 61)),
                key=lambda at: np.abs(pixels[at] - scenes.BACKGROUNDS[scene.background]).sum(),
            )
            assert nearest(pixels[corner], scenes.BACKGROUNDS) == scene.background
        assert 0 < np.abs(exact - jittered).mean() < 40


def nearest(pixels: np.ndarray, names: dict[str, tuple[int, int, int]]) -> str:
    mean = pixels.reshape(-1, 3).mean(0)
    return min(names, key=lambda name: float(np.abs(mean - names[name]).sum()))


@pytest.mark.usefixtures("home")
def test_the_demo_goes_the_way_of_coco(
    small_bert: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(scenes_coco, "_PART", 16)
    assert prepare_scenes(60, text_encoder=small_bert).made
    root, path = data_dir() / "scenes-coco", store_path("scenes", 64)
    assert (root / "train2017" / "000000000001.jpg").exists()
    assert len(read_annotations(root, "val2017").images) == 6
    store = open_store("scenes", 64)
    split = store.split("train", small_bert)
    assert len(split) == 60
    assert split.captions[10:15] == scenes.captions_of(0, 3)
    drawn = np.asarray(scenes.example(0, 3)[0]).transpose(2, 0, 1).astype(int)
    assert np.abs(split.images[2] - drawn).mean() < 3  # JPEG
    before, pictures = contents(path), contents(root)

    shutil_free = root.rename(root.with_name("away"))  # a complete store needs its source no more
    assert not prepare_scenes(60, text_encoder=small_bert).made
    with pytest.raises(UserError, match=r"other settings \(train: 60 images, seed 0"):
        prepare_scenes(61, text_encoder=small_bert)
    with pytest.raises(UserError, match="other settings"):
        prepare_scenes(60, seed=1, text_encoder=small_bert)
    assert contents(path) == before
    shutil_free.rename(root)

    # Cut short in mid-drawing, then begun again.
    part = root / "parts" / "train2017-00002"
    part.unlink()
    (root / "train2017" / "000000000040.jpg").write_bytes(b"half a pict")
    drawn_at = (root / "train2017" / "000000000001.jpg").stat().st_mtime_ns
    (path / "manifest.json").unlink()
    prepare_scenes(60, text_encoder=small_bert)
    assert contents(path) == before
    assert contents(root) == pictures
    assert (root / "train2017" / "000000000001.jpg").stat().st_mtime_ns == drawn_at


def test_killed_between_the_last_picture_and_the_captions(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, ids = home / "scenes-coco", {"train": range(1, 3), "val": range(3, 4)}
    infos = {name: scenes_coco._info(0, len(ids[name])) for name in ids}
    monkeypatch.setattr(
        scenes_coco, "run_parallel", lambda function, tasks, bar: [*map(function, tasks)]
    )
    draw = partial(scenes_coco._draw, root, ids, infos, 0)
    root.mkdir()
    draw()
    for name in ("train2017", "val2017"):
        file = root / "annotations" / f"captions_{name}.json"
        whole = file.read_bytes()
        file.unlink()
        draw()
        assert file.read_bytes() == whole


def test_pictures_are_of_the_size_that_is_promised() -> None:
    picture, _ = scenes.example(0, 1)
    assert isinstance(picture, Image.Image)
    assert (picture.size, picture.mode) == ((64, 64), "RGB")
