"""Parts of a preparation, filled by the ranks of a job: on other cores, GPUs and hosts.

The process that prepares keeps the lock and writes the plan; ranks write parts, each visible by rename
once it is done, and nothing else; then the process puts the store together from the parts.
"""

import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

from cvae.data.text_encoder import TextEncoder, load_encoder
from cvae.errors import UserError
from cvae.files.paths import write_atomically
from cvae.preparation.caption_encoding import CaptionParts
from cvae.preparation.image_decoding import ImageParts
from cvae.preparation.store_writer import cores
from cvae.progress import progress_bar

_PLAN = "plan.json"


@dataclass(frozen=True)
class Plan:
    """What is to be decoded and encoded to make a store; folder: where it is built."""

    folder: Path
    images: list[ImageParts]
    captions: list[CaptionParts]
    encoder: TextEncoder

    @property
    def total(self) -> int:
        """Parts, of images and of captions."""
        return sum(parts.total for parts in self._parts())

    def left(self) -> int:
        """How many of them nobody has finished."""
        return sum(len(parts.todo()) for parts in self._parts())

    def _parts(self) -> "list[ImageParts | CaptionParts]":
        return [*self.images, *self.captions]

    def write(self) -> None:
        """For fill_parts. Its paths hold on every host that shares the file systems."""
        name = self.encoder.name
        content = {
            "images": [
                {
                    **asdict(parts),
                    "folder": str(parts.folder),
                    "images": str(parts.images.resolve()),
                }
                for parts in self.images
            ],
            "captions": [str(parts.folder) for parts in self.captions],
            "encoder": str(Path(name).resolve()) if Path(name).is_dir() else name,
            "precision": self.encoder.precision,
            "identity": self.encoder.identity,
        }
        write_atomically(self.folder / _PLAN, json.dumps(content))


def fill_parts(folder: Path) -> None:
    """Fills this rank's share of the parts of the plan in `folder`: those that nobody has finished.

    The rank is told by torch's environment variables RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE. Ranks
    never wait for each other. Raises UserError where the encoder is another one on this host.
    """
    plan = json.loads((folder / _PLAN).read_bytes())
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))

    def share(numbers: list[int]) -> list[int]:
        return [number for number in numbers if number % world_size == rank]

    # The bar of all ranks is the client's.
    with progress_bar(0, "part", "", disable=True) as bar:
        for entry in plan["images"]:
            paths = {key: Path(entry[key]) for key in ("folder", "images")}
            images = ImageParts(**{**entry, **paths})
            images.fill(share(images.todo()), bar)
        mine = [CaptionParts.read(Path(captions)) for captions in plan["captions"]]
        if not any(share(captions.todo()) for captions in mine):
            return
        encoder = _encoder(plan)
        for captions in mine:
            captions.fill(share(captions.todo()), encoder, bar)


def _encoder(plan: dict[str, object]) -> TextEncoder:
    import torch

    if torch.cuda.is_available():
        # Where the cluster binds one GPU to each task, every task sees just one.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores())
    encoder = load_encoder(str(plan["encoder"]), plan["precision"])  # type: ignore[arg-type]
    wanted = {**plan["identity"], "name": encoder.name}  # type: ignore[dict-item]
    if encoder.identity != wanted:
        raise UserError(
            f"text encoder '{encoder.name}' on {socket.gethostname()} is not the one that the "
            "preparation was begun with"
        )
    return encoder
