"""A small classifier trained on real images, which judges whether samples show their class."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional

from cvae.data.experiment_data import ExperimentData
from cvae.errors import UserError
from cvae.files.checksums import sha256_of_file
from cvae.files.paths import write_atomically
from cvae.models.backbone import ImageShape
from cvae.models.cvae import to_unit
from cvae.progress import progress_bar
from cvae.sampling.inference import Advance, sample
from cvae.sampling.trained_model import TrainedModel

SAMPLES_PER_CLASS = 200
_EPOCHS, _BATCH, _LR, _SEED = 3, 128, 4e-3, 0


class SampleAccuracy(NamedTuple):
    """Share of samples that the classifier assigns to the class that they were drawn for."""

    overall: float
    per_class: dict[str, float]
    real: float  # the same share of real images


@dataclass(frozen=True)
class Classifier:
    network: nn.Module
    classes: list[str]
    real_accuracy: float
    """Accuracy on the real images of the evaluated split, which it was not trained on."""

    @torch.inference_mode()
    def classify(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Returns the class numbers (n,) of images (n, C, H, W)."""
        device = next(self.network.parameters()).device
        blocks = [
            self.network(to_unit(torch.from_numpy(np.array(block)).to(device))).argmax(1).cpu()
            for block in np.array_split(images, -(-len(images) // 512))
        ]
        return torch.cat(blocks).numpy()

    def sample_accuracy(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64]
    ) -> SampleAccuracy:
        """Judges images (n, C, H, W) that were drawn for the classes `labels`, (n,)."""
        right = self.classify(images) == labels
        per_class = {
            self.classes[label]: float(right[labels == label].mean()) for label in np.unique(labels)
        }
        return SampleAccuracy(float(right.mean()), per_class, self.real_accuracy)


def judge_samples(trained: TrainedModel, advance: Advance | None = None) -> SampleAccuracy:
    """Draws SAMPLES_PER_CLASS images of each class and judges them by the reference classifier.

    advance: see inference.sample. Raises UserError for data without labels.
    """
    classifier = reference_classifier(trained.data, trained.device)
    labels = np.repeat(np.arange(len(trained.classes)), SAMPLES_PER_CLASS)
    condition = np.eye(len(trained.classes), dtype=np.float32)[labels]
    drawn = sample(trained.model, trained.noise(len(labels)), condition, advance)
    return classifier.sample_accuracy(drawn, labels)


def reference_classifier(data: ExperimentData, device: torch.device) -> Classifier:
    """Returns the classifier of a labelled data set, which is trained at first use (about a minute).

    It is stored next to the data as <store>.classifier.{safetensors,json}, and trained again if the data
    have changed or a file is damaged. Raises UserError for data without labels.
    """
    classes = data.store.manifest.classes
    if classes is None:
        raise UserError(
            f"{data.store.path.name} has no labels: no classifier can judge its samples"
        )
    network = _network(data.image_shape, len(classes))
    file = data.store.path.with_name(f"{data.store.path.name}.classifier.safetensors")
    identity = {
        "data": data.digest,
        "recipe": f"{_EPOCHS} epochs, batch {_BATCH}, lr {_LR}, seed {_SEED}",
    }
    facts = _stored_facts(file, identity)
    if facts is not None:
        network.load_state_dict(load_file(file))
        return Classifier(network.to(device).eval(), classes, float(facts["real_accuracy"]))
    _train(network, data, device)
    assert data.val.labels is not None
    untested = Classifier(network.to(device).eval(), classes, 0.0)
    accuracy = float((untested.classify(data.val.images) == data.val.labels).mean())
    write_atomically(
        file, save({name: value.cpu() for name, value in network.state_dict().items()})
    )
    # The facts come last, because they vouch for the weights.
    facts = {**identity, "real_accuracy": accuracy, "sha256": sha256_of_file(file)}
    write_atomically(file.with_suffix(".json"), json.dumps(facts, indent=1) + "\n")
    return Classifier(network, classes, accuracy)


def _stored_facts(file: Path, identity: dict[str, str]) -> dict[str, str | float] | None:
    """Returns the facts about the stored classifier, or None if it is absent, damaged or another."""
    try:
        facts: dict[str, str | float] = json.loads(file.with_suffix(".json").read_text())
        intact = identity.items() <= facts.items() and facts["sha256"] == sha256_of_file(file)
    except (OSError, ValueError, KeyError, AttributeError):
        return None
    return facts if intact else None


def _network(shape: ImageShape, n_classes: int) -> nn.Module:
    """Returns two convolutions with pooling and two linear layers, with the same initial weights each time."""
    channels, height, width = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        return nn.Sequential(
            nn.Conv2d(channels, 24, kernel_size=3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Conv2d(24, 48, kernel_size=3, padding=1),
            nn.MaxPool2d(2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(48 * (height // 4) * (width // 4), 128),
            nn.ReLU(),
            nn.Linear(128, n_classes),
        )


def _train(network: nn.Module, data: ExperimentData, device: torch.device) -> None:
    assert data.train.labels is not None
    network.to(device).train()
    n_batches = -(-len(data.train) // _BATCH)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    # One cycle (Smith & Topin 2018) reaches in three epochs what a constant rate reaches in ten.
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=_EPOCHS * n_batches)
    generator = np.random.default_rng(_SEED)
    with progress_bar(_EPOCHS * n_batches, "batch", "train classifier") as bar:
        for _ in range(_EPOCHS):
            for rows in np.array_split(generator.permutation(len(data.train)), n_batches):
                images = to_unit(torch.from_numpy(data.train.images[rows]).to(device))
                labels = torch.from_numpy(data.train.labels[rows]).to(device)
                loss: Tensor = functional.cross_entropy(network(images), labels)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                schedule.step()
                bar.update()
