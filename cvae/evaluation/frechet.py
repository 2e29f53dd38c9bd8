"""Fréchet distances between real images, reconstructions and samples, in two spaces of features.

FID is the distance in the features of one particular Inception network, which the user has to provide. The
distances in the features of a fixed random network are comparable only with each other and are not FID.
"""

import hashlib
import io
import math
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

from cvae.errors import UserError
from cvae.evaluation.evaluation_input import EvaluationBatch, EvaluationInput
from cvae.models.cvae import to_unit
from cvae.sampling.inference import to_bytes

_STATES = tuple(
    f"{kind}_features_{part}"
    for kind in ("real", "fake")
    for part in ("sum", "cov_sum", "num_samples")
)


class RandomFeatures(nn.Module):
    """64 features of four convolutions with random weights of a fixed seed.

    After "R64" of Naeem et al. 2020 ("Reliable Fidelity and Diversity Metrics"), who use VGG16's architecture.
    """

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            layers: list[nn.Module] = []
            for before, after in pairwise((3, 32, 64, 64, 64)):
                layer = nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1)
                nn.init.kaiming_normal_(layer.weight)
                layers += [layer, nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Returns (B, 64) for RGB images, uint8 (B, 3, H, W)."""
        features: Tensor = self.layers(2 * to_unit(images) - 1)
        return features.mean((2, 3))


class Inception(nn.Module):
    """A TorchScript Inception network as published with StyleGAN: uint8 RGB images → features."""

    def __init__(self, file: Path, device: torch.device, sha256: str | None = None):
        """Loads a file. Raises UserError if it is no such network or does not have this sha256."""
        super().__init__()
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
        if sha256 not in (None, hashlib.sha256(content).hexdigest()):
            raise UserError(f"{file}: has changed since the evaluation was requested")
        try:
            self.network = torch.jit.load(io.BytesIO(content), map_location=device).eval()  # type: ignore[no-untyped-call]
            black = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device)
            self.num_features = int(self.network(black, return_features=True).shape[1])
        except Exception as error:
            reason = "".join(str(error).strip().splitlines()[-1:])[:120]
            raise UserError(
                f"{file}: must be a TorchScript network that takes uint8 RGB images and"
                f" return_features=True, as inception-2015-12-05.pt ({type(error).__name__}: {reason})"
            ) from None

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images, return_features=True)
        return features


def evaluate_frechet(subject: EvaluationInput, features: nn.Module, name: str) -> dict[str, float]:
    """Returns the distances of a split's images (Heusel et al. 2017, eq. 6) from two sets of images.

    <name>_reconstructions: from their mean reconstructions; <name>_samples: from one sample of the prior
    p(z|c) for the condition of each. Raises UserError if the split has only one image.
    """
    if len(subject.split) < 2:
        raise UserError("a Fréchet distance needs two images or more")
    device = subject.ranks.device
    features = features.to(device).eval()
    # The features are computed below, where a batch that does not fit is cut.
    identity = nn.Identity()
    identity.num_features = features.num_features
    distances = [
        FrechetInceptionDistance(identity, sync_on_compute=False).to(device) for _ in range(2)
    ]

    def compute_features(batch: EvaluationBatch) -> list[Tensor]:
        """Returns the features of the images, of their reconstructions and of samples."""
        images, condition, noise = batch.batch
        mean = subject.model.encode(to_unit(images), condition).mean
        latents = (mean, subject.model.draw_latent(noise, condition))
        values: list[Tensor] = [features(_rgb(images))]
        for latent in latents:
            decoded = subject.model.decode(latent, condition)
            # As bytes, NaN would be black.
            is_finite = decoded.isfinite().flatten(1).all(1, keepdim=True)
            values.append(features(_rgb(to_bytes(decoded))).where(is_finite, math.nan))
        return values

    with torch.inference_mode():
        for _, (real, *fakes) in subject.map(compute_features):
            for distance, fake in zip(distances, fakes, strict=True):
                distance.update(real, real=True)
                distance.update(fake, real=False)
        values = {}
        for kind, distance in zip(("reconstructions", "samples"), distances, strict=True):
            for state in _STATES:
                subject.ranks.sum(getattr(distance, state))
            distance.orig_dtype = torch.float64
            is_finite = distance.fake_features_sum.isfinite().all()
            values[f"{name}_{kind}"] = float(distance.compute()) if is_finite else math.nan
    return values


def _rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)
