"""Compares the validation −ELBO of our loop with that of the paper's after the same number of steps.

It needs an official COCO download and its store, prepared at 64×64 (minilm) in $CVAE_HOME. The paper's loop is
written anew: JPEGs decoded whole and resized, fp32, torch's Adam, shuffled epochs, captions and noise from torch's
generator. Ours is cvae.training.train in bf16 with the same initial weights. Both are evaluated on the store's
images.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from cvae.config.experiment import Experiment, load_experiment
from cvae.data.experiment_data import open_data
from cvae.distributed.ranks import Ranks
from cvae.evaluation.elbo import evaluate_elbo
from cvae.models.cvae import build_model
from cvae.preparation.coco_annotations import read_annotations
from cvae.run import journal
from cvae.run.directory import RunDirectory
from cvae.training.train import train
from tests.conftest import PROJECT_ROOT

_OPTIONS = ["data.text_encoder=minilm", "data.fraction=1.0", "training.eval_every=1000000"]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.studies.published_elbo", description=__doc__
    )
    parser.add_argument("coco", type=Path, metavar="DIR", help="an official MS COCO download")
    parser.add_argument("steps", nargs="?", type=int, default=60)
    parser.add_argument("seeds", nargs="?", type=int, default=3)
    return parser


def main(coco: Path, steps: int, seeds: int) -> None:
    print("| seed | ours, bf16 | published, fp32 | difference |\n|---|---|---|---|")
    differences = []
    for seed in range(seeds):
        options = [*_OPTIONS, f"seed={seed}", f"training.max_steps={steps}"]
        experiment = load_experiment(PROJECT_ROOT / "configs" / "coco_baseline.yaml", options)
        elbos = ours(experiment), published(experiment, coco)
        differences.append(elbos[0] - elbos[1])
        print(f"| {seed} | {elbos[0]:.1f} | {elbos[1]:.1f} | {differences[-1]:+.1f} |", flush=True)
    print(f"\nmean difference {np.mean(differences):+.2f} nats after {steps} steps")


def ours(experiment: Experiment) -> float:
    """Trains by our loop; returns the −ELBO of val in nats per image."""
    training = experiment.training.model_copy(update={"precision": "bf16"})
    with TemporaryDirectory() as folder:
        made = experiment.model_copy(update={"training": training})
        run = RunDirectory.create("run", made, Path(folder))
        train(run.path, False)
        epochs = [one for one in journal.read(run.journal_file)[0] if one["kind"] == "epoch"]
    return float(epochs[-1]["metrics"]["val/loss"])


def published(experiment: Experiment, coco: Path) -> float:
    """Trains by the paper's loop; returns the −ELBO of val in nats per image."""
    data, batch_size = open_data(experiment), experiment.training.global_batch_size
    assert data.train.text is not None
    assert data.train.caption_offsets is not None
    torch.manual_seed(experiment.seed)
    model = build_model(experiment.model, data.image_shape, data.condition_dim, experiment.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=experiment.optimizer.lr)
    text, offsets = torch.tensor(data.train.text), torch.tensor(data.train.caption_offsets)
    pixels = _decoded_whole(coco, data.train.ids.tolist(), experiment.data.image_size)
    items = TensorDataset(pixels, offsets[:-1], offsets.diff())
    loader = DataLoader(items, batch_size, shuffle=True, drop_last=True)
    left = experiment.total_steps(len(data.train))
    with tqdm(total=left, unit="step", desc="published", leave=False) as bar:
        while left > 0:
            for images, first, count in loader:
                captions = text[first + (torch.rand(len(images)) * count).long()]
                noise = torch.randn(len(images), *model.latent_shape)
                elbo = model(images, captions, noise)
                optimizer.zero_grad()
                (elbo.recon_loss + elbo.kl).mean().backward()
                optimizer.step()
                bar.update()
                left -= 1
                if left == 0:
                    break
    ranks = Ranks(0, 1, torch.device("cpu"), None)
    return evaluate_elbo(model, data, data.val, experiment, ranks)["loss"]


def _decoded_whole(coco: Path, ids: list[int], size: int) -> torch.Tensor:
    """Returns uint8 (N, 3, size, size), without the decoder's shortcut to a smaller image."""
    names = {one.id: one.file_name for one in read_annotations(coco, "train2017").images}
    arrays = []
    for image_id in ids:
        with Image.open(coco / "train2017" / names[image_id]) as picture:
            arrays.append(np.array(picture.convert("RGB").resize((size, size))))
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


if __name__ == "__main__":
    options = parser().parse_args()
    main(options.coco, options.steps, options.seeds)
