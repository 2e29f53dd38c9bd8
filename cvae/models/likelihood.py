"""p(x|z,c): turns the decoder's output into a loss and into an image."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn
from torch.nn import functional

# −log N(x; m, σ²) has ½ log 2πσ² per dimension, σ² = ½; and a pixel is one of 256 levels, each 1/255 wide.
_GAUSSIAN_NATS_PER_DIM = 0.5 * math.log(math.pi) + math.log(255)


class Likelihood(nn.Module, ABC):
    """Turns the decoder's raw output into a loss in nats and into an image."""

    nats_per_dim = 0.0
    """The constant that recon_loss omits, in nats per pixel and channel (for bits per dimension)."""
    is_adaptive = False
    """Whether `observe` must be called after every step."""

    is_binary = False
    """Whether `nll` takes images whose pixels are 0 or 255."""

    def __init__(self, signed_output: bool = False):
        """signed_output: the decoder's output is an image in [−1, 1] itself, not a sigmoid's logits."""
        super().__init__()
        self.signed_output = signed_output

    @abstractmethod
    def nll(self, output: Tensor, images: Tensor) -> Tensor:
        """Returns −log P(x|z,c), a probability of levels, in nats, (B,) fp64; both (B, C, H, W), images uint8."""

    @abstractmethod
    def recon_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Returns −log p(x|z,c) without constants, in nats, (B,); both (B, C, H, W), target in [0, 1]."""

    def mean(self, output: Tensor) -> Tensor:
        """Returns the mean image of the decoder's output, same shape, in [0, 1] or nearly so."""
        return (output.float() + 1) / 2 if self.signed_output else output.float().sigmoid()

    def observe(self, mean_recon_loss: Tensor, dims: int) -> None:
        """Learns from a step. mean_recon_loss: over the whole global batch, (); dims: C·H·W."""


class Bernoulli(Likelihood):
    """Binary cross-entropy of grey values, summed over pixels (Kingma & Welling 2014, appendix C.1).

    For grey pixels it is the usual loss and not a density, and bits per dimension are nominal. The output
    is always logits.
    """

    is_binary = True

    def nll(self, output: Tensor, images: Tensor) -> Tensor:
        """Takes binary images (pixels 0 or 255), for which the loss is a probability."""
        return self.recon_loss(output, images.float() / 255).double()

    def recon_loss(self, output: Tensor, target: Tensor) -> Tensor:
        loss = functional.binary_cross_entropy_with_logits(output.float(), target, reduction="none")
        return loss.flatten(1).sum(1)

    def mean(self, output: Tensor) -> Tensor:
        return output.float().sigmoid()


class Gaussian(Likelihood):
    """Squared error summed over pixels: a Gaussian of variance 1/2 (the paper's loss)."""

    nats_per_dim = _GAUSSIAN_NATS_PER_DIM

    def nll(self, output: Tensor, images: Tensor) -> Tensor:
        """See discretised_gaussian; σ² = 1/2."""
        return discretised_gaussian(self.mean(output), math.sqrt(0.5), images)

    def recon_loss(self, output: Tensor, target: Tensor) -> Tensor:
        return (self.mean(output) - target).square().flatten(1).sum(1)


class OptimalGaussian(Likelihood):
    """A Gaussian whose one variance σ² is the mean squared error (the optimal σ-VAE, Rybkin et al. 2021).

    That paper takes σ² from the batch itself, which needs every rank's error before any gradient. Here it is a
    running mean over the last steps' global batches, saved with the weights: the same on any number of
    ranks, and one proper likelihood for every image of an evaluation.
    """

    nats_per_dim = _GAUSSIAN_NATS_PER_DIM
    is_adaptive = True
    variance: Tensor

    _MOMENTUM = 0.1
    _LEAST = 1 / (12 * 255**2)  # variance of rounding to 256 levels: less would explain noise

    def __init__(self, signed_output: bool = False):
        super().__init__(signed_output)
        self.register_buffer("variance", torch.tensor(0.5))  # at first as Gaussian

    def nll(self, output: Tensor, images: Tensor) -> Tensor:
        """See discretised_gaussian; σ² is the running variance."""
        return discretised_gaussian(self.mean(output), math.sqrt(float(self.variance)), images)

    def recon_loss(self, output: Tensor, target: Tensor) -> Tensor:
        error = (self.mean(output) - target).square().flatten(1)
        return error.sum(1) / (2 * self.variance) + self._log_term(error.shape[1])

    def observe(self, mean_recon_loss: Tensor, dims: int) -> None:
        squared_error = 2 * self.variance * (mean_recon_loss - self._log_term(dims))
        optimal = (squared_error / dims).clamp(min=self._LEAST)
        self.variance.lerp_(optimal, self._MOMENTUM)

    def _log_term(self, dims: int) -> Tensor:
        return 0.5 * dims * (2 * self.variance).log()


def discretised_gaussian(mean: Tensor, std: float, images: Tensor) -> Tensor:
    """Returns −log P of levels 0 to 255 under N(mean, std²) in [0, 1], in nats, (B,) fp64; mean, images: (B, …).

    A level is the interval of width 1/255 around it; the outermost ones have the tails (as the discretised
    logistic of Salimans et al. 2017, PixelCNN++, section 2.1).
    """
    centre = (images.double() / 255 - mean.double()) / std
    half = 0.5 / 255 / std
    low = torch.where(images == 0, -math.inf, centre - half)
    high = torch.where(images == 255, math.inf, centre + half)
    # The difference of two probabilities near 1 would be lost in rounding: the other tail keeps it.
    flip = low > 0
    low, high = torch.where(flip, -high, low), torch.where(flip, -low, high)
    upper, lower = torch.special.log_ndtr(high), torch.special.log_ndtr(low)
    nll: Tensor = -(upper + torch.log(-torch.expm1(lower - upper)))
    return nll.flatten(1).sum(1)


LIKELIHOODS: dict[str, type[Likelihood]] = {
    "bernoulli": Bernoulli,
    "gaussian": Gaussian,
    "optimal_gaussian": OptimalGaussian,
}
