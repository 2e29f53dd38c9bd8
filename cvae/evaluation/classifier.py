"""A small classifier trained on real images: the judge of whether samples show what they were asked for."""

import hashlib
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

_EPOCHS, _BATCH, _LR, _SEED = 3, 128, 4e-3, 0


class SampleAccuracy(NamedTuple):
    """Share of samples that the classifier puts in the class they were asked for."""

    overall: float
    per_class: dict[str, float]


@dataclass(frozen=True)
class Classifier:
    network: nn.Module
    classes: list[str]
    real_accuracy: float
    """On the real images of the evaluated split, which it was not trained on."""

    @torch.inference_mode()
    def classify(self, images: NDArray[np.uint8]) -> NDArray[np.int64]:
        """Class numbers (n,) of images (n, C, H, W)."""
        device = next(self.network.parameters()).device
        blocks = [
            self.network(to_unit(torch.from_numpy(np.array(block)).to(device))).argmax(1).cpu()
            for block in np.array_split(images, -(-len(images) // 512))
        ]
        return torch.cat(blocks).numpy()

    def sample_accuracy(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64]
    ) -> SampleAccuracy:
        """images: (n, C, H, W), drawn for the classes of labels (n,)."""
        right = self.classify(images) == labels
        per_class = {
            self.classes[label]: float(right[labels == label].mean()) for label in np.unique(labels)
        }
        return SampleAccuracy(float(right.mean()), per_class)


def reference_classifier(data: ExperimentData, device: torch.device) -> Classifier:
    """The classifier of a labelled data set; trained at first use (about a minute), then kept.

    It lies beside the store as <store>.classifier.{safetensors,json}, and is trained anew when the data
    changed or a file is damaged. Raises UserError for data without labels.
    """
    classes = data.store.manifest.classes
    if classes is None:
        raise UserError(
            f"{data.store.path.name} has no labels: no classifier can judge its samples"
        )
    network = _network(data.image_shape, len(classes))
    weights_file = data.store.path.with_name(f"{data.store.path.name}.classifier.safetensors")
    identity = {
        "data": data.digest,
        "recipe": f"{_EPOCHS} epochs, batch {_BATCH}, lr {_LR}, seed {_SEED}",
    }
    facts = _kept(weights_file, identity)
    if facts is None:
        _train(network, data, device)
        accuracy = _accuracy(network.to(device), data, classes)
        weights = save({name: value.cpu() for name, value in network.state_dict().items()})
        facts = {**identity, "real_accuracy": accuracy}
        write_atomically(weights_file, weights)
        # Last, because it vouches for the weights.
        checksum = hashlib.sha256(weights).hexdigest()
        text = json.dumps({**facts, "sha256": checksum}, indent=1)
        write_atomically(weights_file.with_suffix(".json"), text + "\n")
    else:
        network.load_state_dict(load_file(weights_file))
    return Classifier(network.to(device).eval(), classes, float(facts["real_accuracy"]))


def _kept(weights_file: Path, identity: dict[str, str]) -> dict[str, str | float] | None:
    """What is known of the kept classifier, if it is intact and of this identity."""
    try:
        facts: dict[str, str | float] = json.loads(weights_file.with_suffix(".json").read_text())
        if identity.items() <= facts.items() and facts["sha256"] == sha256_of_file(weights_file):
            return facts
    except (OSError, ValueError, KeyError, AttributeError):
        pass  # absent or damaged: the caller trains it anew
    return None


def _network(shape: ImageShape, n_classes: int) -> nn.Module:
    """Two convolutions with pooling, two linear layers; its initial weights are always the same."""
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
    # One cycle (Smith & Topin 2018) reaches in three epochs what a constant rate needs ten for.
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


def _accuracy(network: nn.Module, data: ExperimentData, classes: list[str]) -> float:
    assert data.val.labels is not None
    found = Classifier(network.eval(), classes, 0.0).classify(data.val.images)
    return float((found == data.val.labels).mean())
