"""The importance-weighted bound on log p(x|c): with many draws of z close to the true likelihood."""

import math

import torch
from torch import Tensor

from cvae.data.draws import binarised, iwae_noise
from cvae.evaluation.evaluation_input import EvaluationBatch, EvaluationInput
from cvae.sampling.inference import AdaptiveBatches, memory_for_images, memory_of_an_image

# Decoded at once: draws times images, and their pixels.
_IMAGES_AT_ONCE, _PIXELS_AT_ONCE = 2_048, 2**23


def evaluate_iwae(subject: EvaluationInput, n_draws: int) -> dict[str, float]:
    """Returns iwae_K, in nats per image and in bits per dimension, means over the split.

    It is −log (1/K) Σ p(x,z_k|c) / q(z_k|y,c) (Burda et al. 2016, eq. 8), an upper bound on −log P(x|c), a
    probability of pixels. Under a Gaussian likelihood x has 256 levels and y = x. Under a Bernoulli one x is
    the image binarised by one draw per pixel, and y is the grey image that the model was trained on: the
    bound holds for any distribution of z.
    """
    total = torch.zeros(1, dtype=torch.float64, device=subject.ranks.device)
    with torch.inference_mode():
        for _, bounds in subject.map(lambda batch: _bound(subject, batch, n_draws), advances=False):
            total += bounds.sum()
    nats = float(subject.ranks.sum(total)) / len(subject.split)
    bits = nats / math.prod(subject.model.shape) / math.log(2)
    return {f"iwae_{n_draws}": nats, f"iwae_{n_draws}_bits_per_dim": bits}


def _bound(subject: EvaluationInput, batch: EvaluationBatch, n_draws: int) -> Tensor:
    """Returns −log of the mean weight of each image, fp64 (b,)."""
    model, (images, condition, _) = subject.model, batch.batch
    observed = images
    if model.likelihood.is_binary:
        grey = images.cpu().numpy()
        observed = torch.from_numpy(binarised(subject.seed, batch.rows, grey)).to(images.device)
    images_at_once = min(
        _IMAGES_AT_ONCE,
        _PIXELS_AT_ONCE // math.prod(model.shape),
        memory_for_images(images.device) // memory_of_an_image(model),
    )
    total = torch.full((len(images),), -math.inf, dtype=torch.float64, device=images.device)
    done = 0.0

    def log_sum(draws: slice) -> Tensor:
        """Returns the log of the sum of these draws' weights, (b,)."""
        numbers = range(draws.start, draws.stop)
        noise = iwae_noise(subject.seed, batch.block, numbers, model.latent_shape)[:, batch.places]
        weights = model.log_weights(
            images, observed, condition, torch.from_numpy(noise).to(images.device)
        )
        nonlocal done
        done += len(images) * len(numbers) / n_draws
        subject.advance(len(images) * len(numbers) / n_draws)
        return weights.logsumexp(0)

    try:
        # If one draw of all these images does not fit, the caller tries again with fewer images.
        draws_at_once = max(1, images_at_once // len(images))
        for logs in AdaptiveBatches(draws_at_once).map(range(n_draws), log_sum):
            total = torch.logaddexp(total, logs)
    except torch.OutOfMemoryError:
        subject.advance(-done)
        raise
    return math.log(n_draws) - total
