"""The demo's data set: drawn scenes in the layout of a COCO download, prepared as COCO is."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvae.data.store import Store, store_path, text_file
from cvae.data.text_encoder import MINILM
from cvae.errors import UserError
from cvae.files.paths import data_dir, write_atomically
from cvae.preparation import scenes
from cvae.preparation.coco import SPLITS, prepare_coco
from cvae.preparation.store_writer import (
    Prepared,
    intact_manifest,
    locked,
    parts_folder,
    run_parallel,
)
from cvae.progress import progress_bar

TRAIN_IMAGES = 3000
# Counts changes of what is drawn or said, so that pictures of an older program are not mixed in.
_VERSION = "2"
_QUALITY = 95
_PART = 128


@dataclass(frozen=True)
class _Part:
    folder: Path
    ids: range
    seed: int
    done: Path  # written when all its pictures are


def prepare_scenes(
    count: int = TRAIN_IMAGES, seed: int = 0, text_encoder: str = MINILM
) -> Prepared:
    """Draws `count` training scenes and a tenth as many for validation, and prepares scenes-64.

    The pictures are in data/scenes-coco, laid out as an official COCO download. Raises UserError
    when the store was prepared with another count or seed, and as prepare_coco does.
    """
    ids = {
        "train": range(1, count + 1),
        "val": range(scenes.FIRST_VAL_ID, scenes.FIRST_VAL_ID + max(1, count // 10)),
    }
    infos = {name: _info(seed, len(ids[name])) for name in SPLITS}
    path = store_path("scenes", scenes.IMAGE_SIZE)
    manifest = intact_manifest(path, SPLITS)
    have = manifest.splits if manifest else {}
    for name in SPLITS:
        if name in have and have[name].source["info"] != infos[name]:
            was = have[name].source["info"]
            raise UserError(
                f"{path} was prepared with other settings ({name}: {was['images']} images, seed "
                f"{was['seed']}, version {was['version']}); delete that folder to prepare it anew"
            )
    if all(name in have and text_file(text_encoder) in have[name].files for name in SPLITS):
        return Prepared(Store(path), made=False)
    root = data_dir() / "scenes-coco"
    with locked(root):
        _draw(root, ids, infos, seed)
        return prepare_coco(root, SPLITS, scenes.IMAGE_SIZE, text_encoder, dataset="scenes")


def _info(seed: int, images: int) -> dict[str, Any]:
    return {"description": "drawn scenes", "version": _VERSION, "seed": seed, "images": images}


def _draw(root: Path, ids: dict[str, range], infos: dict[str, dict[str, Any]], seed: int) -> None:
    """Writes pictures first, annotations last: what they list is there."""
    parts_folder(root, infos)
    (root / "parts").mkdir(exist_ok=True)
    (root / "annotations").mkdir(exist_ok=True)
    parts = []
    for name, folder in SPLITS.items():
        (root / folder).mkdir(exist_ok=True)
        for start in range(0, len(ids[name]), _PART):
            done = root / "parts" / f"{folder}-{start // _PART:05}"
            parts.append(_Part(root / folder, ids[name][start : start + _PART], seed, done))
    todo = [part for part in parts if not part.done.exists()]
    if todo:
        total = sum(len(part.ids) for part in parts)
        done_before = total - sum(len(part.ids) for part in todo)
        with progress_bar(total, "image", "scenes: draw", done_before) as bar:
            run_parallel(_draw_part, todo, bar)
    for name, folder in SPLITS.items():
        file = root / "annotations" / f"captions_{folder}.json"
        # A process that is killed after its last picture has not written them yet.
        if todo or not file.exists():
            write_atomically(file, json.dumps(_annotations(ids[name], infos[name], seed)))


def _draw_part(part: _Part) -> int:
    for image_id in part.ids:
        picture, _ = scenes.example(part.seed, image_id)
        # 4:4:4: half the colour resolution would blur the edges of saturated shapes.
        picture.save(part.folder / _file_name(image_id), quality=_QUALITY, subsampling=0)
    write_atomically(part.done, "")
    return len(part.ids)


def _annotations(ids: range, info: dict[str, Any], seed: int) -> dict[str, Any]:
    size = scenes.IMAGE_SIZE
    captions = [(i, caption) for i in ids for caption in scenes.captions_of(seed, i)]
    first = ids.start * scenes.CAPTIONS_PER_IMAGE
    return {
        "info": info,
        "licenses": [],
        "images": [
            {"id": i, "file_name": _file_name(i), "width": size, "height": size} for i in ids
        ],
        "annotations": [
            {"id": first + number, "image_id": i, "caption": caption}
            for number, (i, caption) in enumerate(captions)
        ],
    }


def _file_name(image_id: int) -> str:
    return f"{image_id:012}.jpg"
