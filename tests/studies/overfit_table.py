"""Measures whether every combination overfits 32 image-caption pairs; trains by launch.py, prints PSNRs.

It needs COCO prepared at 64×64 (encoded by minilm) in $CVAE_HOME. The models are narrow: the question is whether
each combination can reproduce its training images.
"""

import argparse
import itertools
import subprocess
import sys

import numpy as np

from cvae.data.experiment_data import open_data
from cvae.data.store import open_store
from cvae.sampling.sampler import load
from tests.conftest import PROJECT_ROOT

PAIRS, STEPS = 32, 400
BACKBONES = {
    "conv": ["model.conv.width=16", "model.latent_dim=64"],
    "resnet": ["model.resnet.width=16", "model.resnet.blocks=1", "model.latent_dim=64"],
    "ldm": [
        "model.ldm.block_out_channels=[8, 16, 16, 16]",
        "model.ldm.layers_per_block=1",
        "model.ldm.norm_num_groups=4",
        "model.latent_dim=4",
        "training.max_steps=120",  # half a second each
        "optimizer.lr=4e-3",
    ],
}
FUSIONS = ("concat", "add", "film")
PRIORS = ("standard", "text")
LIKELIHOODS = ("gaussian", "optimal_gaussian", "bernoulli")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.studies.overfit_table", description=__doc__
    )
    parser.add_argument(
        "backbones", nargs="*", metavar="BACKBONE", help=f"default: {', '.join(BACKBONES)}"
    )
    return parser


def main(backbones: list[str]) -> None:
    print("| backbone | fusion | prior | " + " | ".join(LIKELIHOODS) + " |")
    print("|---" * (3 + len(LIKELIHOODS)) + "|")
    for backbone, fusion, prior in itertools.product(backbones, FUSIONS, PRIORS):
        cells = []
        for likelihood in LIKELIHOODS:
            name = f"overfit-{backbone}-{fusion}-{prior}-{likelihood}"
            options = [
                f"model.backbone={backbone}",
                f"model.fusion={fusion}",
                f"model.prior={prior}",
                f"model.likelihood={likelihood}",
                *BACKBONES[backbone],
            ]
            train(name, options)
            cells.append(f"{psnr(name):.1f}")
        print(f"| {backbone} | {fusion} | {prior} | {' | '.join(cells)} |", flush=True)


def train(name: str, options: list[str]) -> None:
    command = [
        sys.executable,
        "workflows/launch.py",
        "configs/coco_baseline.yaml",
        "data.text_encoder=minilm",
        f"data.fraction={fraction()}",
        "training.epochs=100000",
        f"training.max_steps={STEPS}",
        "training.log_every=100",
        "training.eval_every=100000",
        f"training.global_batch_size={PAIRS}",
        "optimizer.lr=2e-3",
        "--name",
        name,
        *options,
    ]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def fraction() -> float:
    return (PAIRS + 0.01) / open_store("coco", 64).manifest.splits["train"].images


def psnr(name: str) -> float:
    """Returns the mean PSNR in dB of the reconstructions of the training images."""
    trained = load(name)
    data = open_data(trained.experiment)
    assert len(data.train_rows) == PAIRS
    images = np.array(data.train.images[data.train_rows])
    captions = [data.train.caption(int(row)) for row in data.train_rows]
    error = (trained.reconstruct(images, captions) / 255 - images / 255) ** 2
    return float((-10 * np.log10(error.mean((1, 2, 3)))).mean())


if __name__ == "__main__":
    main(parser().parse_args().backbones or list(BACKBONES))
