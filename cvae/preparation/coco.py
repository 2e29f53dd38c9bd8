"""A COCO download becomes a store: images decoded and resized once, captions encoded once."""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cvae.data.store import (
    Manifest,
    Precision,
    Skipped,
    SplitManifest,
    Store,
    TextEncoderEntry,
    store_path,
    text_file,
)
from cvae.data.text_encoder import MINILM, TextEncoder, load_encoder
from cvae.errors import UserError
from cvae.files.paths import printable, write_atomically
from cvae.preparation.caption_encoding import CaptionParts
from cvae.preparation.coco_annotations import Annotations, read_annotations
from cvae.preparation.image_decoding import RESIZE, ImageParts
from cvae.preparation.part_workers import Plan
from cvae.preparation.store_writer import (
    Prepared,
    building,
    commit,
    file_entries,
    intact_manifest,
    save_array,
    write_array,
)
from cvae.progress import progress_bar

SPLITS = {"train": "train2017", "val": "val2017"}
MAX_SIZE = 1024
_TOLERATED = 0.01


def prepare_coco(
    root: Path,
    splits: Mapping[str, str] = SPLITS,
    image_size: int = 64,
    text_encoder: str = MINILM,
    dataset: str = "coco",
    crop: bool = False,
    text_precision: Precision = "fp32",
    fill: Callable[[Plan], None] | None = None,
) -> Prepared:
    """Prepares <dataset>-<image_size> from <root>/<folder>/ and <root>/annotations/captions_*.json.

    splits: folder of each split. crop: cuts the centre square of each image instead of squeezing the
    whole. text_precision: see load_encoder. A store that is there is added to: splits and encoders that
    it lacks are made, the others left as they are. Killed at any moment and started again, it ends in
    the same bytes.

    fill: is given the plan of what is to be decoded and encoded, and may have others fill parts of it,
    through cvae.preparation.part_workers.fill_parts; what it leaves to do is done here. The bytes are the same.

    Raises UserError for a source that is absent or not COCO captions, for one of which more than
    1 % cannot be used, for an encoder that cannot be had, and when the store was prepared from
    something else or is being prepared by another process.
    """
    if not 1 <= image_size <= MAX_SIZE:
        raise UserError(
            f"image size {image_size}: COCO's photos are 640 pixels wide; 1 to {MAX_SIZE} can be made"
        )
    path = store_path(dataset, image_size)
    with building(path) as folder:
        manifest = intact_manifest(path, splits) or Manifest(
            dataset=dataset,
            image_size=image_size,
            channels=3,
            classes=None,
            splits={},
            text_encoders={},
        )
        with progress_bar(len(splits), "split", "read captions", delay=2) as bar:
            annotations = {}
            for name in splits:
                annotations[name] = read_annotations(root, splits[name])
                bar.update()
        sources = {name: _source(splits[name], annotations[name], crop) for name in splits}
        check_same_resize(path, manifest, RESIZE[crop])
        for name in splits:
            check_same_source(path, manifest, name, sources[name])
        _check_same_precision(path, manifest, text_encoder, text_precision)
        vectors = text_file(text_encoder)
        bare = [
            name
            for name in splits
            if name not in manifest.splits or vectors not in manifest.splits[name].files
        ]
        if not bare:
            return Prepared(Store(path), made=False)
        encoder = load_encoder(text_encoder, text_precision)
        entry = _encoder_entry(path, manifest, encoder)

        images = {}
        for name in bare:
            if name not in manifest.splits:
                check_enough(annotations[name], root / splits[name])
                files = [image.file_name for image in annotations[name].images]
                parts = folder / f"{name}.images"
                images[name] = ImageParts.cut(parts, root / splits[name], files, image_size, crop)
                images[name].begin(sources[name])
        captions = {}
        for name in bare:
            texts = [caption for image in annotations[name].images for caption in image.captions]
            what = f"{splits[name]}: encode"
            captions[name] = CaptionParts.begin(folder / f"{name}.text", texts, encoder, what)
        if fill is not None:
            fill(Plan(folder, [*images.values()], [*captions.values()], encoder))

        for name in bare:
            if name in images:
                images[name].fill_here(f"{splits[name]}: decode")
                manifest.splits[name] = _write_images(
                    folder / name, images[name], annotations[name], sources[name]
                )
            captions[name].fill_here(encoder, f"{splits[name]}: encode")
            in_order = folder / name / "captions.json"
            if name not in images:
                in_order = path / name / "captions.json"
            entry.truncated[name] = captions[name].write_vectors(
                folder / name / vectors, json.loads(in_order.read_text("utf-8")), encoder
            )
            manifest.splits[name].files |= file_entries(folder / name)
        return Prepared(commit(folder, path, manifest), made=True)


def check_same_resize(path: Path, manifest: Manifest, resize: str) -> None:
    """Raises UserError when the store holds images that were resized in another way."""
    for name, split in manifest.splits.items():
        was = split.source.get("resize")
        if was != resize:
            raise UserError(
                f"{path} was prepared the other way: split '{name}' is {was}, asked for is {resize}; "
                "delete that folder to prepare it anew, or set CVAE_HOME to keep both"
            )


def check_same_source(path: Path, manifest: Manifest, split: str, source: dict[str, Any]) -> None:
    """Raises UserError when the split is in the store but was made from something else."""
    if split not in manifest.splits or manifest.splits[split].source == source:
        return
    was = manifest.splits[split].source
    changed = ", ".join(key for key in {**was, **source} if was.get(key) != source.get(key))
    raise UserError(
        f"{path} has a split '{split}' made from something else ({changed} differ); "
        "delete that folder to prepare it anew"
    )


def _check_same_precision(
    path: Path, manifest: Manifest, text_encoder: str, precision: Precision
) -> None:
    """Raises UserError when the store holds the encoder's vectors in another precision."""
    entry = manifest.text_encoders.get(text_encoder)
    if entry is not None and entry.precision != precision:
        raise UserError(
            f"{path} was encoded by '{text_encoder}' in {entry.precision}, asked for is {precision};"
            " delete that folder to prepare it anew, or set CVAE_HOME to keep both"
        )


def _source(folder: str, annotations: Annotations, crop: bool) -> dict[str, Any]:
    return {
        "images": folder,
        "annotations": f"captions_{folder}.json",
        "annotations_sha256": annotations.sha256,
        "info": annotations.info,
        "resize": RESIZE[crop],
    }


def _encoder_entry(path: Path, manifest: Manifest, encoder: TextEncoder) -> TextEncoderEntry:
    """The manifest's entry for this encoder, new if need be."""
    entry = manifest.text_encoders.setdefault(encoder.name, encoder.entry())
    difference = encoder.difference(entry)
    if difference is not None:
        raise UserError(
            f"{path} was encoded by another '{encoder.name}' than the one here ({difference}); "
            "delete that folder to prepare it anew"
        )
    return entry


def check_enough(annotations: Annotations, images: Path) -> None:
    """Raises UserError where more than 1 % of the captions or, as far as is known, images are unusable."""
    there = set(os.listdir(images))
    absent = [image.file_name for image in annotations.images if image.file_name not in there]
    if len(absent) == len(annotations.images):
        raise UserError(
            f"none of the {len(absent)} images of {annotations.file} is in {images}: are these the "
            f"captions of another split? They are of {printable(absent[0])} and others, as the folder holds "
            f"{printable(min(there, default='nothing'))}"
        )
    skipped = [Skipped(file=name, reason="file is absent") for name in absent]
    skipped += annotations.skipped_images
    listed = len(annotations.images) + len(annotations.skipped_images)
    _check_share(skipped, listed, f"images of {images}")
    captions = sum(len(image.captions) for image in annotations.images)
    captions += len(annotations.skipped_captions)
    _check_share(annotations.skipped_captions, captions, f"captions of {images}")


def _write_images(
    split: Path, parts: ImageParts, annotations: Annotations, source: dict[str, Any]
) -> SplitManifest:
    """Writes everything of a split but its vectors into the folder `split`."""
    decoded = parts.decoded()
    skipped = annotations.skipped_images + decoded.skipped
    listed = len(annotations.images) + len(annotations.skipped_images)
    try:
        _check_share(skipped, listed, f"images of {parts.images}")
    except UserError:
        decoded.forget_damaged()
        raise
    kept = [annotations.images[number] for number in decoded.kept]
    captions = [caption for image in kept for caption in image.captions]
    offsets = np.cumsum([0, *(len(image.captions) for image in kept)], dtype=np.int64)
    shape = (len(kept), 3, parts.image_size, parts.image_size)
    write_array(split / "images.npy", shape, "u1", decoded.images())
    save_array(split / "ids.npy", np.array([image.id for image in kept], np.int64))
    save_array(split / "caption_offsets.npy", offsets)
    text = json.dumps(captions, ensure_ascii=False, indent=0)
    write_atomically(split / "captions.json", text + "\n")
    return SplitManifest(
        source=source,
        images=len(kept),
        captions=len(captions),
        skipped=[*skipped, *annotations.skipped_captions],
        files={},
    )


def _check_share(skipped: list[Skipped], total: int, what: str) -> None:
    if len(skipped) > _TOLERATED * total:
        example = skipped[-1]
        raise UserError(
            f"{len(skipped)} of {total} {what} cannot be used, more than {_TOLERATED:.0%}; "
            f"for example {example.file}: {example.reason}"
        )
