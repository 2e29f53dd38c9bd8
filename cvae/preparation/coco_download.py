"""The official archives of MS COCO 2017, fetched and unpacked."""

import os
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from cvae.errors import UserError
from cvae.preparation.download import fetch, file_md5, partial_file
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
    """Brings what is absent of <root>/<folder>/ and <root>/annotations/captions_<folder>.json.

    Archives that lie in `root` are used, others fetched into <root>/.download and removed once they are
    unpacked. Killed at any moment and called again, it goes on where it was. Raises UserError for a folder
    that COCO 2017 does not have, without network, for an archive that is not the published one, and when
    there is no room.
    """
    for folder in folders:
        if folder not in IMAGES:
            raise UserError(f"--download fetches {' and '.join(IMAGES)}, not '{folder}'")
    if root.exists() and not root.is_dir():
        raise UserError(f"{root} is a file; it must be the folder of a COCO download")
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / "download"):
        # The captions first: they are small, and without them the images are of no use.
        members = [f"annotations/captions_{folder}.json" for folder in IMAGES]
        if not all((root / f"annotations/captions_{folder}.json").is_file() for folder in folders):
            with _opened(root, ANNOTATIONS, url, ANNOTATIONS.bytes) as archive:
                _unpack_files(archive, root, members)
        _forget(root, ANNOTATIONS)
        for folder in folders:
            if not (root / folder).is_dir():
                nascent = root / f".{folder}.unpacking"
                there = nascent.iterdir() if nascent.is_dir() else ()
                room = IMAGES[folder].bytes - sum(file.stat().st_size for file in there)
                with _opened(root, IMAGES[folder], url, room) as archive:
                    _unpack_folder(archive, nascent, folder)
                os.sync()
                os.replace(nascent, root / folder)
            _forget(root, IMAGES[folder])


@contextmanager
def _opened(root: Path, archive: Archive, url: str, room: int) -> Iterator[zipfile.ZipFile]:
    """The archive that a person has placed, else the one that is fetched.

    room: bytes that is unpacked of it. Raises UserError where it is damaged, also from within the block.
    """
    path = root / archive.name
    if path.is_file():
        if file_md5(path) != archive.md5:
            raise UserError(f"{path} is not the published file (its MD5 differs)")
    else:
        path = _ours(root, archive)
        path.parent.mkdir(exist_ok=True)
        files = (path, partial_file(path))
        have = max((file.stat().st_size for file in files if file.exists()), default=0)
        _check_room(root, archive.bytes - have + room)
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


def _ours(root: Path, archive: Archive) -> Path:
    """Where it is fetched to; what lies there is ours to remove."""
    return root / ".download" / archive.name


def _forget(root: Path, archive: Archive) -> None:
    path = _ours(root, archive)
    path.unlink(missing_ok=True)
    with suppress(OSError):  # another archive is there, or there is no such folder
        path.parent.rmdir()


def _check_room(root: Path, needed: int) -> None:
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"{root} has {free / 1e9:.1f} GB free, and {needed / 1e9:.1f} GB are needed for the archive "
            "and what is unpacked from it"
        )


def _unpack_files(archive: zipfile.ZipFile, root: Path, members: Sequence[str]) -> None:
    for name in members:
        (root / name).parent.mkdir(exist_ok=True)
        if not (root / name).exists():
            _extract(archive, archive.getinfo(name), root / name)


def _unpack_folder(archive: zipfile.ZipFile, nascent: Path, folder: str) -> None:
    """Unpacks <folder>/* of the archive into `nascent`, those that are not there."""
    nascent.mkdir(exist_ok=True)
    members = {
        member.filename.removeprefix(f"{folder}/"): member
        for member in archive.infolist()
        if member.filename.startswith(f"{folder}/") and not member.is_dir()
    }
    for name in members:
        if "/" in name or name.startswith("."):
            raise UserError(
                f"{archive.filename} holds {folder}/{name}, which is not an image of COCO"
            )
    for file in nascent.glob(".*"):
        file.unlink()
    there = set(os.listdir(nascent))
    todo = {name: member for name, member in members.items() if name not in there}
    with progress_bar(len(members), "image", f"{folder}: unpack", len(there)) as bar:
        for name, member in todo.items():
            _extract(archive, member, nascent / name)
            bar.update()


def _extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """The file is there when it is whole; its CRC is checked at the last read."""
    temporary = path.with_name(f".{path.name}")
    with archive.open(member) as source, temporary.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    os.replace(temporary, path)
