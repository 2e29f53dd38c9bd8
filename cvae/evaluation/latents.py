"""How a model uses its latent dimensions."""

import math

import numpy as np
import torch

from cvae.evaluation.evaluation_input import EvaluationBatch, EvaluationInput
from cvae.evaluation.latent_map import PROBED, evenly_spread, linear_probe
from cvae.models.cvae import to_unit

_ACTIVE = 0.01


def active_units(subject: EvaluationInput) -> dict[str, float]:
    """Returns active_units, the number of latent dimensions whose posterior mean varies over the images.

    A dimension varies if the variance exceeds 0.01 (Burda et al. 2016, section 5.2). Under a learned prior
    p(z|c) its mean is subtracted: a dimension that only repeats the text says nothing about the image.
    """
    size = int(np.prod(subject.model.latent_shape))
    sums = torch.zeros(2, size, dtype=torch.float64, device=subject.ranks.device)

    def moments(batch: EvaluationBatch) -> torch.Tensor:
        images, condition, noise = batch.batch
        mean = subject.model.encode(to_unit(images), condition).mean
        mean = mean - subject.model.draw_latent(torch.zeros_like(noise), condition)
        mean = mean.flatten(1).double()
        return torch.stack([mean.sum(0), mean.square().sum(0)])

    with torch.inference_mode():
        for _, own in subject.map(moments):
            sums += own
    first, second = subject.ranks.sum(sums) / len(subject.split)
    variance = second - first.square()
    active = float((variance > _ACTIVE).sum()) if variance.isfinite().all() else math.nan
    return {"active_units": active}


def probe(subject: EvaluationInput) -> dict[str, float]:
    """Returns linear_probe and linear_probe_chance for a labelled split; see latent_map.linear_probe."""
    labels = subject.split.labels
    assert labels is not None

    def mean(batch: EvaluationBatch) -> torch.Tensor:
        return subject.model.encode(to_unit(batch.batch.images), batch.batch.condition).mean

    means = subject.gather(mean, int(np.prod(subject.model.latent_shape)))
    accuracies: tuple[float, float] | None = None
    if subject.ranks.is_first:
        rows = evenly_spread(len(means), PROBED)
        result = linear_probe(means.cpu().numpy()[rows], labels[rows])
        accuracies = (result.accuracy, result.chance)
    accuracy, chance = subject.ranks.tell(accuracies) or (math.nan, math.nan)
    return {"linear_probe": accuracy, "linear_probe_chance": chance}
