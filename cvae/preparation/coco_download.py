"""Downloads and unpacks the official archives of MS COCO 2017."""

import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cvae.errors import UserError
from cvae.preparation.download import checked_md5, fetch, partial_file
from cvae.preparation.store_writer import locked
from cvae.progress import progress_bar

URL = "http://images.cocodataset.org"


class Archive(NamedTuple):
    path: str
    bytes: int
    md5: str

    @property
    def name(self) -> str:
        return Path(self.path).name


IMAGES = {
    "train2017": Archive("zips/train2017.zip", 19336861798, "cced6f7f71b7629ddf16f17bbcfab6b2"),
    "val2017": Archive("zips/val2017.zip", 815585330, "442b8da7639aecaf257c1dceb8ba8c80"),
}
ANNOTATIONS = Archive(
    "annotations/annotations_trainval2017.zip", 252907541, "f4bbac642086de4f52a3fdda2de5fa2c"
)


def download_coco(root: Path, folders: Sequence[str], url: str = URL) -> None:
    """Downloads what is absent of <root>/<folder>/ and <root>/annotations/captions_<folder>.json.

    Uses archives that are in `root`; downloads others to <root>/.download and removes them once they are
    unpacked. Continues after a kill. Raises UserError for a folder that COCO 2017 does not have, without
    network, for an archive that is not the published one, and if the disk is too small.
    """
    for folder in folders:
        if folder not in IMAGES:
            raise UserError(f"--download fetches {' and '.join(IMAGES)}, not '{folder}'")
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; it must be the folder of a COCO download")
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / "download"):
        # First the captions, which are small: without them the images are useless.
        captions = [f"captions_{folder}.json" for folder in IMAGES]
        if not all((root / "annotations" / f"captions_{f}.json").is_file() for f in folders):
            with _opened(root, ANNOTATIONS, url, ANNOTATIONS.bytes) as archive:
                _unpack(archive, "annotations", root / "annotations", captions)
        _discard(root, ANNOTATIONS)
        for folder in folders:
            if not (root / folder).is_dir():
                unpacking = root / f".{folder}.unpacking"
                files = list(unpacking.iterdir()) if unpacking.is_dir() else []
                room = IMAGES[folder].bytes - sum(file.stat().st_size for file in files)
                for file in unpacking.glob(".*"):
                    file.unlink()
                with _opened(root, IMAGES[folder], url, room) as archive:
                    _unpack(archive, folder, unpacking)
                os.sync()
                os.replace(unpacking, root / folder)
            _discard(root, IMAGES[folder])


@contextmanager
def _opened(root: Path, archive: Archive, url: str, room: int) -> Iterator[zipfile.ZipFile]:
    """Opens the archive that a person has placed in `root`, else downloads it.

    room: bytes to be unpacked from it. Raises UserError if it is damaged, also within the block.
    """
    path = root / archive.name
    if path.is_file():
        if checked_md5(path) != archive.md5:
            raise UserError(f"{path} is not the published file (its MD5 differs)")
    else:
        path = _downloaded(root, archive)
        path.parent.mkdir(exist_ok=True)
        files = [file for file in (path, partial_file(path)) if file.exists()]
        needed = archive.bytes - max((file.stat().st_size for file in files), default=0) + room
        free = shutil.disk_usage(root).free
        if needed > free:
            raise UserError(
                f"{root} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed for the"
                " archive and what is unpacked from it"
            )
        fetch(
            f"{url}/{archive.path}",
            path,
            archive.md5,
            f"or place {archive.name} from elsewhere in {root}: the same command checks and unpacks it",
        )
    try:
        with zipfile.ZipFile(path) as file:
            yield file
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        raise UserError(f"{path} is damaged: {error}") from None


def _downloaded(root: Path, archive: Archive) -> Path:
    return root / ".download" / archive.name


def _discard(root: Path, archive: Archive) -> None:
    """Removes a downloaded archive, but not one that a person has placed in `root`."""
    path = _downloaded(root, archive)
    path.unlink(missing_ok=True)
    with suppress(OSError):  # the folder holds another archive, or is absent
        path.parent.rmdir()


def _unpack(archive: zipfile.ZipFile, source: str, target: Path, names: Sequence[str] = ()) -> None:
    """Unpacks the files of the archive's folder `source`, or those of `names`, that `target` lacks."""
    target.mkdir(exist_ok=True)
    members = {
        member.filename.removeprefix(f"{source}/"): member
        for member in archive.infolist()
        if member.filename.startswith(f"{source}/") and not member.is_dir()
    }
    members = {name: members[name] for name in names or members}
    for name in members:
        if "/" in name or name.startswith("."):
            raise UserError(
                f"{archive.filename} holds {source}/{name}, which is not a file of COCO"
            )
    present = set(os.listdir(target))
    missing = [name for name in members if name not in present]
    done = len(members) - len(missing)
    with progress_bar(len(members), "file", f"{source}: unpack", done) as bar:
        for name in missing:
            # Renamed when complete; reading its last block checks the CRC.
            temporary = target / f".{name}"
            with archive.open(members[name]) as packed, temporary.open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
            os.replace(temporary, target / name)
            bar.update()
