"""The demo's data set: drawn scenes in the layout of a COCO download, prepared like COCO."""

import json
from pathlib import Path
from typing import Any

from cvae.data.store import Store, store_path, text_file
from cvae.data.text_encoder import MINILM
from cvae.errors import UserError
from cvae.files.paths import data_dir, write_atomically
from cvae.preparation import scenes
from cvae.preparation.coco import PREPARE_ANEW, SPLITS, CocoRequest, prepare_coco
from cvae.preparation.parts import parts_folder, run_parallel
from cvae.preparation.store_writer import Prepared, intact_manifest, locked
from cvae.progress import progress_bar

TRAIN_IMAGES = 3000
# Raised by changes of the drawings or captions, so that older pictures are not mixed in.
_VERSION = "2"
_QUALITY = 95
_PART = 128


def prepare_scenes(
    count: int = TRAIN_IMAGES, seed: int = 0, text_encoder: str = MINILM
) -> Prepared:
    """Draws `count` training scenes and a tenth as many for validation, and prepares scenes-64.

    The pictures are in data/scenes-coco, in the layout of a COCO download. Raises UserError if the
    store was prepared with another count or seed, or as prepare_coco does.
    """
    first = scenes.FIRST_VAL_ID
    ids = {"train": range(1, count + 1), "val": range(first, first + max(1, count // 10))}
    infos = {name: _info(seed, len(ids[name])) for name in SPLITS}
    path = store_path("scenes", scenes.IMAGE_SIZE)
    manifest = intact_manifest(path, SPLITS)
    splits = manifest.splits if manifest else {}
    for name in SPLITS:
        info = splits[name].source["info"] if name in splits else infos[name]
        if info != infos[name]:
            raise UserError(
                f"{path} was prepared with other settings ({name}: {info['images']} images, seed "
                f"{info['seed']}, version {info['version']}); {PREPARE_ANEW}"
            )
    if all(name in splits and text_file(text_encoder) in splits[name].files for name in SPLITS):
        return Prepared(Store(path), made=False)
    root = data_dir() / "scenes-coco"
    with locked(root):
        _draw(root, ids, infos, seed)
        return prepare_coco(
            CocoRequest(root, SPLITS, scenes.IMAGE_SIZE, text_encoder, dataset="scenes")
        )


def _info(seed: int, images: int) -> dict[str, Any]:
    return {"description": "drawn scenes", "version": _VERSION, "seed": seed, "images": images}


def _draw(root: Path, ids: dict[str, range], infos: dict[str, dict[str, Any]], seed: int) -> None:
    """Draws the pictures, then writes the annotations, so that every listed picture exists."""
    parts_folder(root, infos)
    for folder in ("parts", "annotations", *SPLITS.values()):
        (root / folder).mkdir(exist_ok=True)
    parts = [
        (root, folder, ids[name][start : start + _PART], seed, start // _PART)
        for name, folder in SPLITS.items()
        for start in range(0, len(ids[name]), _PART)
    ]
    unfinished = [part for part in parts if not _marker(root, part[1], part[4]).exists()]
    if unfinished:
        total, left = (sum(len(part[2]) for part in some) for some in (parts, unfinished))
        with progress_bar(total, "image", "scenes: draw", total - left) as bar:
            run_parallel(_draw_part, unfinished, bar)
    for name, folder in SPLITS.items():
        file = root / "annotations" / f"captions_{folder}.json"
        # A process that was killed after its last picture has not written them.
        if unfinished or not file.exists():
            write_atomically(file, json.dumps(_annotations(ids[name], infos[name], seed)))


def _marker(root: Path, folder: str, number: int) -> Path:
    """Returns the file that exists once all pictures of a part are drawn."""
    return root / "parts" / f"{folder}-{number:05}"


def _draw_part(part: tuple[Path, str, range, int, int]) -> int:
    root, folder, ids, seed, number = part
    for image_id in ids:
        picture, _ = scenes.example(seed, image_id)
        # 4:4:4: half the colour resolution would blur the edges of saturated shapes.
        picture.save(root / folder / _file_name(image_id), quality=_QUALITY, subsampling=0)
    write_atomically(_marker(root, folder, number), "")
    return len(ids)


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
