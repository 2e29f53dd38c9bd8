"""How well images are reconstructed from the posterior's mean."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from cvae.evaluation.evaluation_input import EvaluationBatch, EvaluationInput
from cvae.models.cvae import to_unit
from cvae.sampling.grids import labelled_grid
from cvae.sampling.inference import reconstruct

_SHOWN = 8


class Reconstruction(NamedTuple):
    metrics: dict[str, float]
    extremes: Image.Image | None  # the worst and the best reconstructions; on rank 0 only


def evaluate_reconstruction(subject: EvaluationInput) -> Reconstruction:
    """Returns psnr in dB and ssim (Wang et al. 2004) of the mean reconstructions in [0, 1], as means."""

    def scores(batch: EvaluationBatch) -> torch.Tensor:
        """Returns PSNR and SSIM, (b, 2)."""
        images, condition, _ = batch.batch
        target = to_unit(images)
        mean = subject.model.encode(target, condition).mean
        decoded = subject.model.decode(mean, condition)
        psnr = peak_signal_noise_ratio(
            decoded, target, data_range=1.0, reduction="none", dim=(1, 2, 3)
        )
        ssim = structural_similarity_index_measure(
            decoded, target, data_range=1.0, reduction="none"
        )
        assert isinstance(ssim, torch.Tensor)
        return torch.stack([psnr.reshape(-1), ssim.reshape(-1)], dim=1)

    both = subject.gather(scores, 2)
    psnr, ssim = both.double().mean(0).tolist()
    picture = _extremes(subject, both[:, 0].cpu().numpy()) if subject.ranks.is_first else None
    return Reconstruction({"psnr": psnr, "ssim": ssim}, picture)


def _extremes(subject: EvaluationInput, psnr: NDArray[np.float32]) -> Image.Image:
    """Returns two pairs of rows: the worst images above their reconstructions, then the best."""
    order = np.argsort(psnr, kind="stable")
    n = min(_SHOWN, len(order) // 2) or len(order)
    cells, labels = [], []
    for name, rows in (("worst", np.sort(order[:n])), ("best", np.sort(order[::-1][:n]))):
        images = np.array(subject.split.images[rows])
        condition = subject.trained.data.condition(subject.split, rows, np.zeros(n))
        cells += [images, reconstruct(subject.model, images, condition)]
        label = f"{name}, {psnr[rows].min():.1f} to {psnr[rows].max():.1f} dB"
        labels += [label, "reconstruction"]
    return labelled_grid(np.stack(cells), labels)
