"""Reads and checks captions in the layout of an official COCO download."""

import contextlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvae.data.store import Skipped
from cvae.errors import UserError
from cvae.files.checksums import sha256_of_file
from cvae.files.paths import printable

_SUFFIXES = {".jpg", ".jpeg", ".png"}
_ID_LIMIT = 2**63  # ids become int64
_MOST_LEVELS = 50


@dataclass(frozen=True)
class CaptionedImage:
    id: int
    file_name: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Annotations:
    """The usable content of captions_<folder>.json, ordered by image id, and what was skipped."""

    file: str
    images: list[CaptionedImage]
    skipped_images: list[Skipped]
    skipped_captions: list[Skipped]
    info: dict[str, Any]
    sha256: str


def read_annotations(root: Path, folder: str) -> Annotations:
    """Reads <root>/annotations/captions_<folder>.json.

    Skips captions that are empty, no text, of an unlisted image or of a repeated id, and images without a
    usable caption, of a repeated id or file, or unlisted. Raises UserError if the file is absent or not
    COCO captions, or if <root>/<folder> is absent.
    """
    path = root / "annotations" / f"captions_{folder}.json"
    _check_layout(root, folder, path)
    content = _load(path)
    names, skipped_images = _image_names(path, content["images"])
    captions, skipped_captions = _captions(path, content["annotations"], names)
    skipped_images += [
        Skipped(file=names[image_id], reason="no captions")
        for image_id in sorted(names)
        if not captions[image_id]
    ]
    files = {name for name in os.listdir(root / folder) if Path(name).suffix.lower() in _SUFFIXES}
    skipped_images += [
        Skipped(file=printable(name), reason=f"not listed in {path.name}")
        for name in sorted(files.difference(image["file_name"] for image in content["images"]))
    ]
    if not any(captions.values()):
        reason = [*skipped_captions, *skipped_images][0].reason
        raise UserError(f"{path}: no image has a usable caption, for example: {reason}")
    return Annotations(
        file=path.name,
        images=[
            CaptionedImage(image_id, names[image_id], tuple(captions[image_id]))
            for image_id in sorted(names)
            if captions[image_id]
        ],
        skipped_images=skipped_images,
        skipped_captions=skipped_captions,
        info=_info(path, content),
        sha256=sha256_of_file(path),
    )


def _check_layout(root: Path, folder: str, path: Path) -> None:
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; it must be the folder of a COCO download")
    images = root / folder
    missing = images if path.is_file() else path
    if missing == path or not images.is_dir():
        kind = "not a folder" if missing == images else "not a file"
        raise UserError(
            f"{missing} is {kind if missing.exists() else 'absent'}; {root} must hold {folder}/"
            f" and annotations/{path.name}, as in an official COCO download"
        )


def _load(path: Path) -> dict[str, Any]:
    """Returns the file's content, whose images and annotations are lists of objects."""
    from pycocotools.coco import COCO

    content: Any = None
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            content = COCO(str(path)).dataset
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not JSON: {error.reason} at byte {error.start}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON (cut short?): {error}") from None
    except (AssertionError, KeyError, TypeError, AttributeError):
        pass
    for key in ("images", "annotations"):
        entries = content.get(key) if content else None
        if not (
            isinstance(entries, list) and entries and all(isinstance(e, dict) for e in entries)
        ):
            raise UserError(f"{path} is not COCO captions: it lacks images or annotations")
    if not any("caption" in annotation for annotation in content["annotations"]):
        raise UserError(
            f"{path} has no captions; COCO's captions are in captions_*.json, "
            "not in instances_*.json or person_keypoints_*.json"
        )
    return dict(content)


def _info(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Returns the file's own description as JSON that is read back as it was written.

    NaN and infinity become their names, lone surrogates question marks.
    """
    info = content.get("info")
    if not isinstance(info, dict):
        return {}
    if _is_deep(info):
        raise UserError(f"{path}: info is nested more than {_MOST_LEVELS} levels deep")
    text = json.dumps(info, ensure_ascii=False).encode("utf-8", "replace").decode()
    plain: dict[str, Any] = json.loads(text, parse_constant=str)
    return plain


def _is_deep(value: Any, levels: int = _MOST_LEVELS) -> bool:
    """Returns whether lists and objects are nested more than `levels` deep."""
    if not isinstance(value, (dict, list)):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return bool(inner) if levels == 0 else any(_is_deep(entry, levels - 1) for entry in inner)


def _image_names(path: Path, images: list[Any]) -> tuple[dict[int, str], list[Skipped]]:
    """Returns the file of each image id, and the images that repeat an id or a file."""
    names: dict[int, str] = {}
    id_of: dict[str, int] = {}
    skipped = []
    for image in images:
        image_id, name = image.get("id"), image.get("file_name")
        if type(image_id) is not int or abs(image_id) >= _ID_LIMIT or not isinstance(name, str):
            fault = f"an image has no file_name or no whole number as id: {str(image)[:80]!r}"
            raise UserError(f"{path}: {fault}")
        if not _is_plain(name):
            fault = f"file_name of image {image_id} is not the plain name of a file: {name[:80]!r}"
            raise UserError(f"{path}: {fault}")
        if image_id in names:
            skipped.append(Skipped(file=name, reason=f"id {image_id} is taken by another image"))
        elif name in id_of:
            skipped.append(Skipped(file=name, reason=f"file is that of image {id_of[name]}, too"))
        else:
            names[image_id] = name
            id_of[name] = image_id
    return names, skipped


def _is_plain(name: str) -> bool:
    """Returns whether it can only be the name of a file inside a folder."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return False
    return name not in ("", ".", "..") and not {"/", "\0"} & {*name} and len(encoded) < 256


def _captions(
    path: Path, annotations: list[Any], names: dict[int, str]
) -> tuple[dict[int, list[str]], list[Skipped]]:
    """Returns the usable captions of each image id, and the other captions."""
    captions: dict[int, list[str]] = {image_id: [] for image_id in names}
    skipped = []
    taken = set()
    for annotation in annotations:
        number, image_id = annotation.get("id"), annotation.get("image_id")
        if type(number) is not int or type(image_id) is not int:
            fault = f"a caption has no whole numbers as id and image_id: {str(annotation)[:80]!r}"
            raise UserError(f"{path}: {fault}")
        text = _clean(annotation.get("caption"))
        if image_id not in names:
            reason = f"caption {number} is of image {image_id}, which is not listed"
        elif number in taken:
            reason = f"caption id {number} is taken by another caption"
        elif not text:
            reason = f"caption {number} is empty"
        else:
            captions[image_id].append(text)
            taken.add(number)
            continue
        skipped.append(Skipped(file=names.get(image_id, path.name), reason=reason))
    return captions, skipped


def _clean(caption: Any) -> str:
    """Returns a caption without superfluous white space and lone surrogates; "" if it is no text."""
    text = caption if isinstance(caption, str) else ""
    return " ".join(text.encode("utf-8", "replace").decode().split())
