"""Prepares a store from a COCO download: decodes and resizes its images, encodes its captions."""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

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
from cvae.preparation import store_writer
from cvae.preparation.caption_encoding import CaptionParts
from cvae.preparation.coco_annotations import Annotations, read_annotations
from cvae.preparation.image_decoding import RESIZE, ImageParts
from cvae.preparation.part_workers import PartPlan
from cvae.preparation.store_writer import Prepared, save_array, write_array
from cvae.progress import progress_bar

SPLITS = {"train": "train2017", "val": "val2017"}
MAX_SIZE = 1024
_TOLERATED = 0.01
PREPARE_ANEW = "delete that folder to prepare it anew"


@dataclass(frozen=True)
class CocoRequest:
    """What to prepare from <root>/<folder>/ and <root>/annotations/captions_<folder>.json."""

    root: Path
    splits: Mapping[str, str] = field(default_factory=SPLITS.copy)
    """The folder of each split."""
    image_size: int = 64
    text_encoder: str = MINILM
    dataset: str = "coco"
    crop: bool = False
    """Resize the centre square of each image instead of squeezing the whole image."""
    text_precision: Precision = "fp32"


class _Source(NamedTuple):
    """A split of the download."""

    split: str
    folder: Path
    annotations: Annotations
    identity: dict[str, Any]


def prepare_coco(request: CocoRequest, fill: Callable[[PartPlan], None] | None = None) -> Prepared:
    """Prepares the store <dataset>-<image_size>, or adds the splits and vectors that it lacks.

    A preparation that was killed at any moment and is started again ends in the same bytes. `fill`
    may have other processes fill parts of the plan, by fill_parts; the rest is filled here.

    Raises UserError if the source is absent or not COCO captions, if more than 1 % of it is unusable, if
    the encoder cannot be loaded, or if the store was prepared from something else or is being prepared
    by another process.
    """
    if not 1 <= request.image_size <= MAX_SIZE:
        possible = f"COCO's photos are 640 pixels wide; 1 to {MAX_SIZE} can be made"
        raise UserError(f"image size {request.image_size}: {possible}")
    path, vectors = store_path(request.dataset, request.image_size), text_file(request.text_encoder)
    with store_writer.building(path) as folder:
        manifest = store_writer.intact_manifest(path, request.splits) or Manifest(
            dataset=request.dataset,
            image_size=request.image_size,
            channels=3,
            classes=None,
            splits={},
            text_encoders={},
        )
        sources = _read_sources(request)
        _check_same(path, manifest, sources, request)
        new = [source for source in sources if source.split not in manifest.splits]
        encoded = {name for name, split in manifest.splits.items() if vectors in split.files}
        unencoded = [source for source in sources if source.split not in encoded]
        if not unencoded:
            return Prepared(Store(path), made=False)
        encoder = load_encoder(request.text_encoder, request.text_precision)
        entry = _encoder_entry(path, manifest, encoder)

        images = {source.split: _begin_images(folder, source, request) for source in new}
        captions = {source.split: _begin_captions(folder, source, encoder) for source in unencoded}
        if fill is not None:
            fill(PartPlan(folder, [*images.values()], [*captions.values()], encoder))

        for source in unencoded:
            name, written = source.split, path
            if source in new:
                images[name].fill_rest(f"{source.folder.name}: decode")
                manifest.splits[name] = _write_images(folder / name, images[name], source)
                written = folder
            captions[name].fill_rest(f"{source.folder.name}: encode")
            in_order = json.loads((written / name / "captions.json").read_text("utf-8"))
            entry.truncated[name] = captions[name].write_vectors(folder / name / vectors, in_order)
            manifest.splits[name].files |= store_writer.file_entries(folder / name)
        return Prepared(store_writer.commit(folder, path, manifest), made=True)


def _read_sources(request: CocoRequest) -> list[_Source]:
    sources = []
    with progress_bar(len(request.splits), "split", "read captions", delay=2) as bar:
        for split, folder in request.splits.items():
            annotations = read_annotations(request.root, folder)
            identity = {
                "images": folder,
                "annotations": annotations.file,
                "annotations_sha256": annotations.sha256,
                "info": annotations.info,
                "resize": RESIZE[request.crop],
            }
            sources.append(_Source(split, request.root / folder, annotations, identity))
            bar.update()
    return sources


def _check_same(
    path: Path, manifest: Manifest, sources: list[_Source], request: CocoRequest
) -> None:
    """Raises UserError if the store was made from another source or with other settings."""
    keep_both = f"{PREPARE_ANEW}, or set CVAE_HOME to keep both"
    for name, split in manifest.splits.items():
        resize = split.source.get("resize")
        if resize != RESIZE[request.crop]:
            difference = f"split '{name}' is {resize}, requested is {RESIZE[request.crop]}"
            raise UserError(f"{path} was prepared the other way: {difference}; {keep_both}")
    for source in sources:
        if source.split in manifest.splits:
            old, new = manifest.splits[source.split].source, source.identity
            changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
            if changed:
                raise UserError(
                    f"{path} has a split '{source.split}' made from something else"
                    f" ({', '.join(changed)} differ); {PREPARE_ANEW}"
                )
    entry = manifest.text_encoders.get(request.text_encoder)
    if entry is not None and entry.precision != request.text_precision:
        raise UserError(
            f"{path} was encoded by '{request.text_encoder}' in {entry.precision}, requested is"
            f" {request.text_precision}; {keep_both}"
        )


def _encoder_entry(path: Path, manifest: Manifest, encoder: TextEncoder) -> TextEncoderEntry:
    """Returns the manifest's entry for this encoder, which is added if it is absent."""
    entry = manifest.text_encoders.setdefault(encoder.name, encoder.entry())
    difference = encoder.difference(entry)
    if difference is not None:
        raise UserError(
            f"{path} was encoded by another '{encoder.name}' than the one here ({difference}); "
            f"{PREPARE_ANEW}"
        )
    return entry


def _begin_images(folder: Path, source: _Source, request: CocoRequest) -> ImageParts:
    _check_usable(source)
    files = [image.file_name for image in source.annotations.images]
    parts, size = folder / f"{source.split}.images", request.image_size
    return ImageParts.begin(
        parts, source.folder, files, size, request.crop, made_from=source.identity
    )


def _begin_captions(folder: Path, source: _Source, encoder: TextEncoder) -> CaptionParts:
    captions = [caption for image in source.annotations.images for caption in image.captions]
    title = f"{source.folder.name}: encode"
    return CaptionParts.begin(folder / f"{source.split}.text", captions, encoder, title)


def _check_usable(source: _Source) -> None:
    """Raises UserError if more than 1 % of the images are absent or unlisted, or of the captions bad."""
    annotations, present = source.annotations, set(os.listdir(source.folder))
    absent = [image.file_name for image in annotations.images if image.file_name not in present]
    if len(absent) == len(annotations.images):
        raise UserError(
            f"none of the {len(absent)} images of {annotations.file} is in {source.folder}: are these"
            f" the captions of another split? They are of {printable(absent[0])} and others, as the"
            f" folder holds {printable(min(present, default='nothing'))}"
        )
    skipped = [Skipped(file=name, reason="file is absent") for name in absent]
    _check_skipped_images(source, skipped + annotations.skipped_images)
    captions = sum(len(image.captions) for image in annotations.images)
    captions += len(annotations.skipped_captions)
    _check_share(annotations.skipped_captions, captions, f"captions of {source.folder}")


def _check_skipped_images(source: _Source, skipped: list[Skipped]) -> None:
    listed = len(source.annotations.images) + len(source.annotations.skipped_images)
    _check_share(skipped, listed, f"images of {source.folder}")


def _check_share(skipped: list[Skipped], total: int, items: str) -> None:
    if len(skipped) > _TOLERATED * total:
        example = skipped[-1]
        raise UserError(
            f"{len(skipped)} of {total} {items} cannot be used, more than {_TOLERATED:.0%}; "
            f"for example {example.file}: {example.reason}"
        )


def _write_images(folder: Path, parts: ImageParts, source: _Source) -> SplitManifest:
    """Writes all files of a split but its vectors; returns its manifest without files."""
    annotations = source.annotations
    skipped = annotations.skipped_images + parts.skipped()
    try:
        _check_skipped_images(source, skipped)
    except UserError:
        parts.discard_damaged()
        raise
    images = [annotations.images[number] for number in parts.decoded_files()]
    captions = [caption for image in images for caption in image.captions]
    offsets = np.cumsum([0, *(len(image.captions) for image in images)], dtype=np.int64)
    shape = (len(images), 3, parts.image_size, parts.image_size)
    write_array(folder / "images.npy", shape, "u1", parts.decoded_images())
    save_array(folder / "ids.npy", np.array([image.id for image in images], np.int64))
    save_array(folder / "caption_offsets.npy", offsets)
    text = json.dumps(captions, ensure_ascii=False, indent=0)
    write_atomically(folder / "captions.json", text + "\n")
    return SplitManifest(
        source=source.identity,
        images=len(images),
        captions=len(captions),
        skipped=[*skipped, *annotations.skipped_captions],
        files={},
    )
