"""Prepared stores that somebody has changed, with and without new checksums."""

import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest

from cvae.config.experiment import Experiment
from cvae.data.experiment_data import open_data
from tests.conftest import tiny_experiment, write_store
from tests.fuzz import odd
from tests.fuzz.frame import Case, target


@target("stores")
def stores(draw: random.Random, folder: Path) -> Case:
    root = write_store(folder, captioned=True, sizes=(6, 3))
    manifest = root / "manifest.json"
    tree = json.loads(manifest.read_text())
    files = sorted(root.glob("*/**/*.npy")) + sorted(root.glob("*/*.json"))
    file = draw.choice(files)
    before = file.read_bytes()
    content = bytearray(before)
    for _ in range(draw.choice([0, 1, 1, 3])):
        # Headers are where reading goes wrong.
        at = draw.randrange(min(len(content), draw.choice([128, len(content)])))
        content[at] = draw.choice([0, 10, 39, 40, 48, 57, 62, 91, 123, 255, draw.randrange(256)])
    if draw.random() < 0.1:
        content = content[: draw.randrange(len(content))]
    file.write_bytes(content)
    sealed = draw.random() < 0.5
    if sealed:
        split, _, name = file.relative_to(root).as_posix().partition("/")
        entry = tree["splits"][split]["files"][name]
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    if draw.random() < 0.4:
        odd.mutate(draw, tree, ["images", "captions", "bytes", "dim", "image_size", "channels"])
    manifest.write_text(json.dumps(tree))

    def read() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CVAE_HOME", str(folder))
            data = open_data(Experiment.model_validate(tiny_experiment(captioned=True)))
            rows = np.arange(len(data.train))
            images, condition = (
                data.train.take_images(rows),
                data.condition(data.train, rows, rows / 9),
            )
            _ = data.train.captions
        assert images.shape == (6, 1, 16, 16), f"images {images.shape}"
        assert condition is not None, "no condition"
        assert condition.shape == (6, 12), f"condition {condition.shape}"
        assert sealed or file.read_bytes() == before, "a file that is not what was prepared"

    return Case(
        f"{file.relative_to(root)} {bytes(content[:200])!r} {json.dumps(tree)[:1500]}", read
    )
