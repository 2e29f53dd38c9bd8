"""The parts of a preparation that the ranks of a job fill, on other cores, GPUs and hosts.

The preparing process locks the store, writes the plan and assembles the parts; ranks only write parts.
"""

import functools
import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cvae.data.text_encoder import TextEncoder, load_encoder
from cvae.errors import UserError
from cvae.files.paths import write_atomically
from cvae.preparation.caption_encoding import CaptionParts
from cvae.preparation.image_decoding import ImageParts
from cvae.preparation.parts import Parts, cores
from cvae.progress import progress_bar

_PLAN = "plan.json"


@dataclass(frozen=True)
class PartPlan:
    """All parts that must be filled to make a store; folder: where the store is built."""

    folder: Path
    images: list[ImageParts]
    captions: list[CaptionParts]
    encoder: TextEncoder

    @property
    def total(self) -> int:
        return sum(parts.total for parts in (*self.images, *self.captions))

    def unfinished(self) -> int:
        """Returns how many parts are not finished."""
        return sum(len(parts.unfinished()) for parts in (*self.images, *self.captions))

    def write(self) -> None:
        """Writes the plan for fill_parts; its paths must be valid on every host of the job."""
        folder = Path(self.encoder.name)
        content = {
            "images": [{**vars(p), "images": p.images.resolve()} for p in self.images],
            "captions": [parts.folder for parts in self.captions],
            "encoder": folder.resolve() if folder.is_dir() else self.encoder.name,
            "identity": self.encoder.identity,
        }
        write_atomically(self.folder / _PLAN, json.dumps(content, default=str))


def fill_parts(folder: Path) -> None:
    """Fills this rank's share of the unfinished parts of the plan in `folder`.

    torch's environment variables RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE identify the rank. Ranks
    do not wait for each other. Raises UserError if this host's encoder differs from the plan's.
    """
    plan = json.loads((folder / _PLAN).read_bytes())
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    encoder = functools.cache(lambda: _load_encoder(plan))
    all_parts: list[Parts] = [
        ImageParts(**{**entry, **{key: Path(entry[key]) for key in ("folder", "images")}})
        for entry in plan["images"]
    ]
    all_parts += [CaptionParts.read(Path(captions), encoder) for captions in plan["captions"]]
    # The preparing process shows the progress of all ranks.
    with progress_bar(0, "part", "", disable=True) as bar:
        for parts in all_parts:
            parts.fill([n for n in parts.unfinished() if n % world_size == rank], bar)


def _load_encoder(plan: dict[str, Any]) -> TextEncoder:
    import torch

    if torch.cuda.is_available():
        # A cluster may show each rank only its own GPU.
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(cores())
    encoder = load_encoder(plan["encoder"], plan["identity"]["precision"])
    if encoder.identity != {**plan["identity"], "name": encoder.name}:
        raise UserError(
            f"text encoder '{encoder.name}' on {socket.gethostname()} is not the one that the "
            "preparation was begun with"
        )
    return encoder
