"""Captions in the layout of an official COCO download, checked."""

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
_DEEPEST = 50


@dataclass(frozen=True)
class CaptionedImage:
    id: int
    file_name: str
    captions: tuple[str, ...]


@dataclass(frozen=True)
class Annotations:
    """What captions_<folder>.json says, ordered by image id, and what of it cannot be used."""

    file: str
    images: list[CaptionedImage]
    skipped_images: list[Skipped]
    skipped_captions: list[Skipped]
    info: dict[str, Any]
    sha256: str


def read_annotations(root: Path, folder: str) -> Annotations:
    """Reads <root>/annotations/captions_<folder>.json.

    Skipped are: captions that are empty, no text, of no listed image or a second one of an id;
    images without a usable caption, a second image of an id or of a file, and files that are not
    listed. Raises UserError when the file is absent or not COCO captions, or when <root>/<folder> is
    absent.
    """
    path = root / "annotations" / f"captions_{folder}.json"
    _check_layout(root, folder, path)
    content = _load(path)
    names, skipped_images = _image_names(path, content)
    captions, skipped_captions = _captions(path, content, names)
    bare = [names[image_id] for image_id in sorted(names) if not captions[image_id]]
    skipped_images += [Skipped(file=name, reason="no captions") for name in bare]
    files = {name for name in os.listdir(root / folder) if Path(name).suffix.lower() in _SUFFIXES}
    for name in sorted(files.difference(image["file_name"] for image in content["images"])):
        skipped_images.append(Skipped(file=printable(name), reason=f"not listed in {path.name}"))
    if not any(captions.values()):
        skipped = [*skipped_captions, *skipped_images]
        raise UserError(f"{path}: no image has a usable caption, for example: {skipped[0].reason}")
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


def _info(path: Path, content: dict[str, Any]) -> dict[str, Any]:
    """What the file says about itself, as plain JSON that reads back as it was written: NaN and infinity, which
    are none, become their names, and lone surrogates question marks."""
    info = content.get("info")
    if not isinstance(info, dict):
        return {}
    if _depth(info) > _DEEPEST:
        raise UserError(f"{path}: info is nested more than {_DEEPEST} levels deep")
    text = json.dumps(info, ensure_ascii=False).encode("utf-8", "replace").decode()
    plain: dict[str, Any] = json.loads(text, parse_constant=str)
    return plain


def _depth(value: Any) -> int:
    """Levels of lists and objects in each other, counted up to one more than _DEEPEST."""
    level = [value]
    for depth in range(_DEEPEST + 1):
        inner = [list(v.values()) if isinstance(v, dict) else v for v in level]
        level = [entry for v in inner if isinstance(v, list) for entry in v]
        if not level:
            return depth
    return _DEEPEST + 1


def _check_layout(root: Path, folder: str, path: Path) -> None:
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; it must be the folder of a COCO download")
    for needed, there in ((path, path.is_file()), (root / folder, (root / folder).is_dir())):
        if not there:
            what = "is not a file" if needed is path else "is not a folder"
            raise UserError(
                f"{needed} {what if needed.exists() else 'is absent'}; {root} must hold {folder}/ and "
                f"annotations/{path.name}, as in an official COCO download"
            )


def _load(path: Path) -> dict[str, Any]:
    """The file's content, whose images and annotations are lists of objects."""
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
    lists = [content.get(key) if content else None for key in ("images", "annotations")]
    if not all(
        isinstance(entries, list) and entries and all(isinstance(entry, dict) for entry in entries)
        for entries in lists
    ):
        raise UserError(f"{path} is not COCO captions: it lacks images or annotations")
    assert content is not None
    if not any("caption" in annotation for annotation in content["annotations"]):
        raise UserError(
            f"{path} has no captions; COCO's captions are in captions_*.json, "
            "not in instances_*.json or person_keypoints_*.json"
        )
    return dict(content)


def _image_names(path: Path, content: dict[str, Any]) -> tuple[dict[int, str], list[Skipped]]:
    names: dict[int, str] = {}
    id_of: dict[str, int] = {}
    skipped = []
    for image in content["images"]:
        image_id, name = image.get("id"), image.get("file_name")
        if type(image_id) is not int or abs(image_id) >= _ID_LIMIT or not isinstance(name, str):
            raise UserError(
                f"{path}: an image has no file_name or no whole number as id: {str(image)[:80]!r}"
            )
        if not _is_plain(name):
            raise UserError(
                f"{path}: file_name of image {image_id} is not the plain name of a file: {name[:80]!r}"
            )
        if image_id in names:
            skipped.append(Skipped(file=name, reason=f"id {image_id} is taken by another image"))
        elif name in id_of:
            skipped.append(Skipped(file=name, reason=f"file is that of image {id_of[name]}, too"))
        else:
            names[image_id] = name
            id_of[name] = image_id
    return names, skipped


def _is_plain(name: str) -> bool:
    """Whether it names a file inside its folder, and nothing but a file."""
    try:
        encoded = name.encode()
    except UnicodeEncodeError:
        return False
    return name not in ("", ".", "..") and not {"/", "\0"} & {*name} and len(encoded) < 256


def _captions(
    path: Path, content: dict[str, Any], names: dict[int, str]
) -> tuple[dict[int, list[str]], list[Skipped]]:
    captions: dict[int, list[str]] = {image_id: [] for image_id in names}
    skipped = []
    taken = set()
    for annotation in content["annotations"]:
        number, image_id = annotation.get("id"), annotation.get("image_id")
        if type(number) is not int or type(image_id) is not int:
            raise UserError(
                f"{path}: a caption has no whole numbers as id and image_id: {str(annotation)[:80]!r}"
            )
        caption = _clean(annotation.get("caption"))
        reason = None
        if image_id not in names:
            reason = f"caption {number} is of image {image_id}, which is not listed"
        elif number in taken:
            reason = f"caption id {number} is taken by another caption"
        elif not caption:
            reason = f"caption {number} is empty"
        if reason is None:
            captions[image_id].append(caption)
            taken.add(number)
        else:
            skipped.append(Skipped(file=names.get(image_id, path.name), reason=reason))
    return captions, skipped


def _clean(text: Any) -> str:
    if not isinstance(text, str):
        return ""
    # White space carries no meaning, and lone surrogates, which JSON can spell, are not Unicode.
    return " ".join(text.encode("utf-8", "replace").decode().split())
