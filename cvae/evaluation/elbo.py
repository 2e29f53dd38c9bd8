"""−ELBO of a whole split: exact on the last partial batch, added up over the ranks."""

import math

import torch
from torch import Tensor

from cvae.config.experiment import Experiment
from cvae.data.draws import Batch, eval_blocks
from cvae.data.experiment_data import ExperimentData
from cvae.data.feed import micro_batches
from cvae.data.store import Split
from cvae.distributed import precision
from cvae.distributed.ranks import Ranks
from cvae.models.cvae import Cvae
from cvae.sampling.inference import AdaptiveBatches


def evaluate_elbo(
    model: Cvae, data: ExperimentData, split: Split, experiment: Experiment, ranks: Ranks
) -> dict[str, float]:
    """Means over the split, in nats per image: loss (recon_loss + beta·kl), recon_loss and kl; bits_per_dim.

    For captions also text_gain = ELBO(x | own caption) − ELBO(x | another image's), with the same noise,
    and its standard error text_gain_se. One draw of z per image, the same at every call: two evaluations
    differ by the model alone.
    """
    model.eval()
    dtype = precision.resolve_to_measure(experiment.training.precision, ranks.device)
    # As many images at once as a training step has, so that what could be trained can be evaluated.
    size = ranks.share(experiment.training.global_batch_size)
    at_once = experiment.training.micro_batch_size or size.stop - size.start
    by_text = experiment.model.condition == "text" and len(split) > 1
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    parts = AdaptiveBatches(at_once)
    with torch.inference_mode(), precision.autocast(dtype, ranks.device):
        for block in eval_blocks(experiment.seed, len(split), model.latent_shape):
            share = ranks.share(len(block.indices))
            strangers = block._replace(indices=(block.indices + 1) % len(split))

            def summed(places: slice, block: Batch = block, strangers: Batch = strangers) -> Tensor:
                """(4,): sums of recon_loss, of kl, of the text's gain and of its square."""
                (own,) = micro_batches(data, split, block, places, None, ranks.device)
                elbo = model(*own)
                found = torch.zeros(4, dtype=torch.float64, device=ranks.device)
                found[:2] = _sums(elbo.recon_loss, elbo.kl)
                if by_text:
                    (told,) = micro_batches(data, split, strangers, places, None, ranks.device)
                    other = model(own.images, told.condition, own.noise)
                    gain = (other.recon_loss - elbo.recon_loss) + (other.kl - elbo.kl)
                    found[2:] = _sums(gain, gain.double().square())
                return found

            for found in parts.each(range(share.start, share.stop), summed):
                sums += found
    n = len(split)
    recon_loss, kl, gain_sum, gain_squares = ranks.sum(sums).tolist()
    recon_loss, kl = recon_loss / n, kl / n
    model.train()
    metrics = {
        "loss": recon_loss + model.beta * kl,
        "recon_loss": recon_loss,
        "kl": kl,
        "bits_per_dim": model.bits_per_dim(recon_loss + kl),
    }
    if by_text:
        metrics["text_gain"] = gain_sum / n
        # In this order: max(0.0, nan) is 0.0.
        variance = max(gain_squares - gain_sum**2 / n, 0.0) / (n - 1)
        metrics["text_gain_se"] = math.sqrt(variance / n)
    return metrics


def _sums(*values: Tensor) -> Tensor:
    return torch.stack([value.sum(dtype=torch.float64) for value in values])
