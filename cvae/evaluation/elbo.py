"""−ELBO of a whole split: exact for the last partial batch, summed over the ranks."""

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
    """Returns the means over the split of loss (recon_loss + beta·kl), recon_loss, kl and bits_per_dim.

    For captions also text_gain = ELBO(x | own caption) − ELBO(x | another image's), with the same noise,
    and its standard error text_gain_se. All are in nats per image, except for bits_per_dim. Each image has
    one draw of z, the same at every call: two evaluations differ by the model alone.
    """
    model.eval()
    dtype = precision.resolve_to_measure(experiment.training.precision, ranks.device)
    # No more images at once than a training step has: a model that can be trained can be evaluated.
    size = ranks.share(experiment.training.global_batch_size)
    at_once = experiment.training.micro_batch_size or size.stop - size.start
    is_captioned = experiment.model.condition == "text" and len(split) > 1
    sums = torch.zeros(4, dtype=torch.float64, device=ranks.device)
    batches = AdaptiveBatches(at_once)
    with torch.inference_mode(), precision.autocast(dtype, ranks.device):
        for block in eval_blocks(experiment.seed, len(split), model.latent_shape):
            share = ranks.share(len(block.indices))
            strangers = block._replace(indices=(block.indices + 1) % len(split))

            def part_sums(
                places: slice, block: Batch = block, strangers: Batch = strangers
            ) -> Tensor:
                """Returns the sums of recon_loss, kl, the text's gain and its square, (4,)."""
                (own,) = micro_batches(data, split, block, places, None, ranks.device)
                elbo = model(*own)
                values = [elbo.recon_loss, elbo.kl]
                if is_captioned:
                    (other,) = micro_batches(data, split, strangers, places, None, ranks.device)
                    swapped = model(own.images, other.condition, own.noise)
                    gain = (swapped.recon_loss - elbo.recon_loss) + (swapped.kl - elbo.kl)
                    values += [gain, gain.double().square()]
                part = torch.zeros(4, dtype=torch.float64, device=ranks.device)
                part[: len(values)] = torch.stack([v.sum(dtype=torch.float64) for v in values])
                return part

            for part in batches.map(range(share.start, share.stop), part_sums):
                sums += part
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
    if is_captioned:
        metrics["text_gain"] = gain_sum / n
        # In this order: max(0.0, nan) is 0.0.
        variance = max(gain_squares - gain_sum**2 / n, 0.0) / (n - 1)
        metrics["text_gain_se"] = math.sqrt(variance / n)
    return metrics
