"""Makes runs that look trained: real run directories with a checkpoint of initial weights, over tiny stores."""

import json
from contextlib import closing
from pathlib import Path

import numpy as np
from torch import Tensor

from cvae.config.experiment import Experiment
from cvae.data.experiment_data import open_data
from cvae.data.store import Manifest, text_file
from cvae.data.text_encoder import load_encoder
from cvae.files.checksums import sha256_of_file
from cvae.models.cvae import build_model
from cvae.run import checkpoint
from cvae.run.directory import RunDirectory
from cvae.run.journal import Journal
from tests.conftest import tiny_experiment
from tests.helpers.ranks import new_run


def make_run(
    name: str = "tiny", captioned: bool = False, condition: str | None = None, encoder: str = "toy"
) -> RunDirectory:
    """Returns a run on the tiny store, which must exist, with a checkpoint of step 7."""
    tree = tiny_experiment(captioned)
    if condition is not None:
        tree["model"]["condition"] = condition  # type: ignore[index]
    if captioned:
        tree["data"]["text_encoder"] = None if condition == "none" else encoder  # type: ignore[index]
    experiment = Experiment.model_validate(tree)
    run = RunDirectory.create(name, experiment)
    data = open_data(experiment)
    model = build_model(experiment.model, data.image_shape, data.condition_dim, seed=1)
    save_weights(run, model.state_dict(), step=7)
    return run


def make_run_on_other_data() -> RunDirectory:
    """Returns a run that was trained on other data than the tiny store has now."""
    run = make_run()
    with closing(Journal(run.journal_file)) as journal:
        journal.append("start", step=0, data_digest="0" * 64)
    return run


def save_weights(run: RunDirectory, weights: dict[str, Tensor], step: int, part: str = "") -> None:
    """Saves a best checkpoint; part "ema": with these weights as averaged ones, and zeros as the model's."""
    # A checkpoint without the optimizer's part is damaged.
    tensors: dict[str, dict[str, Tensor]] = {"model": weights, "optimizer": {}}
    if part == "ema":
        zeros = {name: tensor * 0 for name, tensor in weights.items()}
        tensors |= {"model": zeros, "ema": weights}
    checkpoint.save(
        run.checkpoints, checkpoint.TrainingState(tensors, {"step": step}), 3, best=True
    )


def encode_with(root: Path, name: str = "minilm") -> None:
    """Adds the vectors of a real encoder to a tiny captioned store, so that its runs take new captions."""
    encoder = load_encoder(name)
    manifest = Manifest.model_validate_json((root / "manifest.json").read_bytes())
    for split_name, split in manifest.splits.items():
        captions = json.loads((root / split_name / "captions.json").read_text())
        file = root / split_name / text_file(name)
        np.save(file, encoder.encode(captions))
        entry = split.files["text/toy.npy"].model_copy(
            update={"bytes": file.stat().st_size, "sha256": sha256_of_file(file)}
        )
        split.files[text_file(name)] = entry
    manifest.text_encoders[name] = encoder.entry()
    (root / "manifest.json").write_text(manifest.to_json())


START = {
    "world_size": 2,
    "hosts": ["a", "b"],
    "device": "Tesla V100",
    "commit": "0123abc" * 5,
    "packages": {"torch": "2.13.0"},
    "data_name": "tiny",
    "data_digest": "d" * 64,
}


def make_journal(name: str, losses: list[float], status: str | None = "finished") -> RunDirectory:
    """Makes a run whose journal has two points and an evaluation for each loss."""
    run = new_run(name, tiny_experiment())
    journal = Journal(run.journal_file)
    journal.append("start", step=0, **START)
    for epoch, loss in enumerate(losses, start=1):
        for step in (10 * epoch - 5, 10 * epoch):
            journal.append("step", step=step, metrics={"train/loss": loss + 1, "train/kl": 2.0})
        metrics = {"val/loss": loss, "val/kl": 3.0 + epoch}
        journal.append("epoch", step=10 * epoch, epoch=2.0 * epoch, metrics=metrics)
    if status is not None:
        journal.append(
            "end",
            status=status,
            step=10 * len(losses),
            reason="" if status == "finished" else "<b>no</b>",
        )
    journal.close()
    return run
