"""What the latent dimensions are used for."""

import math

import numpy as np
import torch

from cvae.evaluation.evaluation_input import EvaluationBatch, EvaluationInput
from cvae.evaluation.latent_map import linear_probe
from cvae.models.cvae import to_unit

_ACTIVE = 0.01
_PROBED = 10_000


def active_units(subject: EvaluationInput) -> dict[str, float]:
    """Number of latent dimensions whose posterior's mean varies over the images (Burda et al. 2016, section 5.2).

    Varies: by a variance above 0.01. Under a learned prior p(z|c) the mean is taken from its mean: a dimension
    that only repeats what the text says tells nothing of the image.
    """
    size = int(np.prod(subject.model.latent_shape))
    sums = torch.zeros(2, size, dtype=torch.float64, device=subject.ranks.device)

    def moments(part: EvaluationBatch) -> torch.Tensor:
        images, condition, noise = part.batch
        mean = subject.model.encode(to_unit(images), condition).mean
        mean = mean - subject.model.draw_latent(torch.zeros_like(noise), condition)
        mean = mean.flatten(1).double()
        return torch.stack([mean.sum(0), mean.square().sum(0)])

    with torch.inference_mode():
        for _, found in subject.each(moments):
            sums += found
    n = len(subject.split)
    first, second = subject.ranks.sum(sums) / n
    variance = second - first.square()
    active = float((variance > _ACTIVE).sum()) if variance.isfinite().all() else math.nan
    return {"active_units": active}


def probe(subject: EvaluationInput) -> dict[str, float]:
    """How well a linear classifier reads the class from μ (see latent_map.linear_probe); labelled splits."""
    assert subject.split.labels is not None

    def mean(part: EvaluationBatch) -> torch.Tensor:
        return subject.model.encode(to_unit(part.batch.images), part.batch.condition).mean

    with torch.inference_mode():
        found = [(part.rows, means) for part, means in subject.each(mean)]
    rows, means = [of for of, _ in found], [of for _, of in found]
    whole = subject.every(means, rows, int(np.prod(subject.model.latent_shape)))
    answer: tuple[float, float] | None = None
    if subject.ranks.is_first:
        chosen = np.linspace(0, len(whole) - 1, min(len(whole), _PROBED)).astype(np.int64)
        result = linear_probe(whole.cpu().numpy()[chosen], subject.split.labels[chosen])
        answer = (result.accuracy, result.chance)
    accuracy, chance = subject.ranks.tell(answer) or (float("nan"), float("nan"))
    return {"linear_probe": accuracy, "linear_probe_chance": chance}
