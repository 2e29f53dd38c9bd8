"""How well images come back from the posterior's mean."""

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
    extremes: Image.Image | None
    """The worst and the best reconstructions; on rank 0."""


def evaluate_reconstruction(subject: EvaluationInput) -> Reconstruction:
    """psnr in dB and ssim (Wang et al. 2004) of the mean reconstruction in [0, 1]; means over the images."""

    def scored(part: EvaluationBatch) -> torch.Tensor:
        """(b, 2): PSNR and SSIM."""
        images, condition, _ = part.batch
        target = to_unit(images)
        mean = subject.model.encode(target, condition).mean
        found = subject.model.decode(mean, condition)
        psnr = peak_signal_noise_ratio(
            found, target, data_range=1.0, reduction="none", dim=(1, 2, 3)
        )
        ssim = structural_similarity_index_measure(found, target, data_range=1.0, reduction="none")
        assert isinstance(ssim, torch.Tensor)
        return torch.stack([psnr.reshape(-1), ssim.reshape(-1)], dim=1)

    with torch.inference_mode():
        found = [(part.rows, scores) for part, scores in subject.each(scored)]
    rows, scores = [of for of, _ in found], [of for _, of in found]
    whole = subject.every(scores, rows, 2)
    psnr, ssim = whole.double().mean(0).tolist()
    picture = _extremes(subject, whole[:, 0].cpu().numpy()) if subject.ranks.is_first else None
    return Reconstruction({"psnr": psnr, "ssim": ssim}, picture)


def _extremes(subject: EvaluationInput, psnr: NDArray[np.float32]) -> Image.Image:
    """Two pairs of rows: the worst images above their reconstructions, then the best."""
    order = np.argsort(psnr, kind="stable")
    n = min(_SHOWN, len(order) // 2) or len(order)
    cells, heads = [], []
    for chosen in (order[:n], order[::-1][:n]):
        # In ascending rows, as a memory map likes them.
        chosen = np.sort(chosen)
        images = np.array(subject.split.images[chosen])
        condition = subject.trained.data.condition(subject.split, chosen, np.zeros(n))
        cells += [images, reconstruct(subject.model, images, condition)]
        heads.append(f"{psnr[chosen].min():.1f} to {psnr[chosen].max():.1f} dB")
    labels = [f"worst, {heads[0]}", "reconstruction", f"best, {heads[1]}", "reconstruction"]
    return labelled_grid(np.stack(cells), labels)
