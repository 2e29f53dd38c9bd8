"""Fréchet distances between real images, reconstructions and samples, in two spaces of features.

FID is the distance in the features of one certain Inception network. Where the user has no such file, a random
network that is always the same stands in; its distances compare among themselves and are never called FID.
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

_SEED = 0
_STATES = tuple(
    f"{kind}_features_{part}"
    for kind in ("real", "fake")
    for part in ("sum", "cov_sum", "num_samples")
)


class RandomFeatures(nn.Module):
    """64 features of a convolutional network with random weights of a fixed seed.

    The idea is "R64" of Naeem et al. 2020 ("Reliable Fidelity and Diversity Metrics"), who take VGG16's shape;
    here are four convolutions.
    """

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 32, 64, 64, 64)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            layers: list[nn.Module] = []
            for before, after in pairwise(widths):
                layer = nn.Conv2d(before, after, kernel_size=3, stride=2, padding=1)
                nn.init.kaiming_normal_(layer.weight)
                layers += [layer, nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 64) of RGB images, uint8 (B, 3, H, W)."""
        features: Tensor = self.layers(2 * to_unit(images) - 1)
        return features.mean((2, 3))


class Inception(nn.Module):
    """A TorchScript Inception network as StyleGAN's metrics publish it: uint8 RGB images → features."""

    def __init__(self, file: Path, device: torch.device, sha256: str | None = None):
        """Raises UserError if the file is no such network, or not the one of this sha256."""
        super().__init__()
        try:
            content = file.read_bytes()
        except OSError as error:
            raise UserError(f"--inception {file}: cannot be read: {error.strerror}") from None
        if sha256 not in (None, hashlib.sha256(content).hexdigest()):
            raise UserError(f"--inception {file}: has changed since the evaluation was asked for")
        try:
            self.network = torch.jit.load(io.BytesIO(content), map_location=device).eval()  # type: ignore[no-untyped-call]
            black = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device=device)
            self.num_features = int(self.network(black, return_features=True).shape[1])
        except Exception as error:
            reason = str(error).strip().splitlines()[-1][:120] if str(error).strip() else ""
            raise UserError(
                f"--inception {file}: must be a TorchScript network that takes uint8 RGB images and"
                f" return_features=True, as inception-2015-12-05.pt ({type(error).__name__}: {reason})"
            ) from None

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.network(images, return_features=True)
        return features


def evaluate_frechet(subject: EvaluationInput, features: nn.Module, name: str) -> dict[str, float]:
    """name_reconstructions, name_samples: distance of the split's images (Heusel et al. 2017, eq. 6) from their
    mean reconstructions, and from one sample of the prior p(z|c) for each image's condition.

    Raises UserError where the split has one image alone.
    """
    if len(subject.split) < 2:
        raise UserError("a Fréchet distance needs two images or more")
    device = subject.ranks.device
    features = features.to(device).eval()
    # The features are computed here, where a batch that does not fit is cut.
    ready = nn.Identity()
    ready.num_features = features.num_features
    measures = [FrechetInceptionDistance(ready, sync_on_compute=False).to(device) for _ in range(2)]

    def featured(part: EvaluationBatch) -> list[Tensor]:
        """The features of the images, of their reconstructions and of samples."""
        images, condition, noise = part.batch
        mean = subject.model.encode(to_unit(images), condition).mean
        latents = (mean, subject.model.draw_latent(noise, condition))
        found: list[Tensor] = [features(_rgb(images))]
        for latent in latents:
            made = subject.model.decode(latent, condition)
            # As bytes, what is not a number would be black.
            whole = made.isfinite().flatten(1).all(1, keepdim=True)
            found.append(features(_rgb(to_bytes(made))).where(whole, math.nan))
        return found

    with torch.inference_mode():
        for _, (real, *fakes) in subject.each(featured):
            for measure, fake in zip(measures, fakes, strict=True):
                measure.update(real, real=True)
                measure.update(fake, real=False)
        distances = []
        for measure in measures:
            for state in _STATES:
                subject.ranks.sum(getattr(measure, state))
            measure.orig_dtype = torch.float64
            known = measure.fake_features_sum.isfinite().all()
            distances.append(float(measure.compute()) if known else math.nan)
    return {f"{name}_reconstructions": distances[0], f"{name}_samples": distances[1]}


def _rgb(images: Tensor) -> Tensor:
    return images.expand(-1, 3, -1, -1)
