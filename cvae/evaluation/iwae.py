"""The importance-weighted bound on log p(x|c): with many draws of z close to the true likelihood."""

import math

import torch
from torch import Tensor

from cvae.data.draws import binarised, iwae_noise
from cvae.evaluation.evaluation_input import EvaluationBatch, EvaluationInput
from cvae.sampling.inference import AdaptiveBatches, memory_for_images, memory_of_an_image

_IMAGES_AT_ONCE = 2_048  # decoded: of all draws of some images
_PIXELS_AT_ONCE = 2**23


def evaluate_iwae(subject: EvaluationInput, n_draws: int) -> dict[str, float]:
    """iwae_K: −log (1/K) Σ p(x,z_k|c) / q(z_k|y,c), mean over the split (Burda et al. 2016, eq. 8).

    In nats per image, and in bits per dimension. It bounds −log P(x|c), a probability of pixels, from above. Under
    a Bernoulli likelihood x is the image binarised by one draw per pixel, while the posterior is told the grey y
    that the model was trained on: any distribution of z gives a bound. Under a Gaussian one x has 256 levels and
    y = x.
    """
    total = torch.zeros(1, dtype=torch.float64, device=subject.ranks.device)
    with torch.inference_mode():
        for _, bounds in subject.each(lambda part: _bound(subject, part, n_draws), advances=False):
            total += bounds.sum()
    nats = float(subject.ranks.sum(total)) / len(subject.split)
    bits = nats / math.prod(subject.model.shape) / math.log(2)
    return {f"iwae_{n_draws}": nats, f"iwae_{n_draws}_bits_per_dim": bits}


def _bound(subject: EvaluationInput, part: EvaluationBatch, n_draws: int) -> Tensor:
    """−log of the mean weight of each image, (b,) fp64."""
    model, (images, condition, _) = subject.model, part.batch
    observed = images
    if model.likelihood.is_binary:
        grey = images.cpu().numpy()
        observed = torch.from_numpy(binarised(subject.seed, part.rows, grey)).to(images.device)
    room = min(
        _IMAGES_AT_ONCE,
        _PIXELS_AT_ONCE // math.prod(model.shape),
        memory_for_images(images.device) // memory_of_an_image(model),
    )
    total = torch.full((len(images),), -math.inf, dtype=torch.float64, device=images.device)
    done = 0.0

    def weighed(draws: slice) -> Tensor:
        """log of the sum of these draws' weights, (b,)."""
        numbers = range(draws.start, draws.stop)
        noise = iwae_noise(subject.seed, part.block, numbers, model.latent_shape)[:, part.places]
        weights = model.log_weights(
            images, observed, condition, torch.from_numpy(noise).to(images.device)
        )
        nonlocal done
        done += len(images) * len(numbers) / n_draws
        subject.advance(len(images) * len(numbers) / n_draws)
        return weights.logsumexp(0)

    try:
        # Memory may be too small for one draw of all these images: then there are fewer images.
        for logs in AdaptiveBatches(max(1, room // len(images))).each(range(n_draws), weighed):
            total = torch.logaddexp(total, logs)
    except torch.OutOfMemoryError:
        subject.advance(-done)
        raise
    return math.log(n_draws) - total
