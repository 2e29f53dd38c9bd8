"""The registry of metrics: unit, better end, group and meaning of every number that a run or a sweep reports.

A metric's full name is "<prefix>/<name>": train/ and val/ are written by training, eval/ and eval_train/ by
evaluate.py, system/ by the host's monitor, trials/ and best/ by a sweep in MLflow.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from functools import cache
from typing import Literal, NamedTuple

OBJECTIVE = "val/loss"
"""The metric that chooses the best checkpoint and ranks runs, at the best epoch."""

METRIC_GROUPS = {
    "elbo": "−ELBO and its parts, text gain",
    "iwae": "the importance-weighted bound on −log p(x|c)",
    "active_units": "latent dimensions in use",
    "reconstruction": "PSNR and SSIM; pictures of the worst and best",
    "frechet": "Fréchet distances in random features, of reconstructions and of samples",
    "fid": "the same in Inception's features; needs --inception FILE",
    "classifier": "whether samples show the class they were drawn for",
    "probe": "how well a linear classifier reads the class from μ",
    "captions": "whether drawings find their own caption's scene",
}
"""The groups that evaluate.py measures one by one; the others are training, system and sweep."""


class Metric(NamedTuple):
    name: str
    """Without its prefix; * stands for any text."""
    prefixes: str
    """Those under which it is reported, separated by spaces."""
    unit: str
    """ "" for a pure number or a share from 0 to 1."""
    better: Literal["lower", "higher"] | None
    """The better end; None if neither is better."""
    group: str
    meaning: str
    """One sentence without its full stop."""

    def description(self) -> str:
        """Returns the meaning, with the unit in brackets if there is one."""
        return f"{self.meaning} ({self.unit})" if self.unit else self.meaning


_NATS, _BITS, _MB = "nats per image", "bits per dimension", "MB"
# A name belongs to the first entry that it matches.
METRICS = [
    Metric(*fields)
    for fields in (
        # name, prefixes, unit, better end, group, meaning
        ("loss", "train val eval", _NATS, "lower", "elbo", "Reconstruction loss + β·KL"),
        ("recon_loss", "train val eval", _NATS, "lower", "elbo", "Reconstruction loss"),
        ("kl", "train val eval", _NATS, None, "elbo", "KL(q ‖ p) of the latent and its prior"),
        ("bits_per_dim", "train val eval", _BITS, "lower", "elbo", "−ELBO, constants included"),
        ("text_gain", "val eval", _NATS, "higher", "elbo", "ELBO with the own caption less another's"),
        ("text_gain_se", "val eval", _NATS, None, "elbo", "Standard error of text_gain"),
        ("neg_elbo", "eval", _NATS, "lower", "elbo", "−ELBO: reconstruction loss + KL"),
        ("iwae_*_bits_per_dim", "eval", _BITS, "lower", "iwae", "Importance-weighted bound on −log p(x|c)"),
        ("iwae_*", "eval", _NATS, "lower", "iwae", "Importance-weighted bound on −log p(x|c)"),
        ("active_units", "eval", "", None, "active_units", "Latent dimensions whose mean varies with the image"),
        ("psnr", "eval", "dB", "higher", "reconstruction", "Peak signal-to-noise ratio of reconstructions"),
        ("ssim", "eval", "", "higher", "reconstruction", "Structural similarity of reconstructions"),
        ("frechet_*_reconstructions", "eval", "", "lower", "frechet", "Fréchet distance of reconstructions"),
        ("frechet_*_samples", "eval", "", "lower", "frechet", "Fréchet distance of samples"),
        ("fid_reconstructions", "eval", "", "lower", "fid", "FID of reconstructions"),
        ("fid_samples", "eval", "", "lower", "fid", "FID of samples"),
        ("sample_accuracy", "eval", "", "higher", "classifier", "Share of samples classified as their class"),
        ("classifier_real_accuracy", "eval", "", None, "classifier", "The classifier's accuracy on real images"),
        ("linear_probe", "eval", "", None, "probe", "Accuracy of a linear classifier of the class that reads μ"),
        ("linear_probe_chance", "eval", "", None, "probe", "Accuracy of the most frequent class"),
        ("caption_match", "eval", "", "higher", "captions", "Share of drawings matched with their own scene"),
        ("*chance", "eval", "", None, "captions", "Share of drawings that match by chance"),
        ("learning_rate", "train", "", None, "training", "Learning rate of the step"),
        ("beta", "train", "", None, "training", "Weight of the KL at the step"),
        ("images_per_second", "train", "images/s", "higher", "training", "Throughput of all ranks together"),
        ("data_wait_share", "train", "", "lower", "training", "Share of the time spent waiting for data"),
        ("grad_norm", "train", "", None, "training", "Norm of the gradient before clipping"),
        ("cpu_utilization_percentage", "system", "%", None, "system", "CPU time in use on the first rank's host"),
        ("system_memory_usage_percentage", "system", "%", None, "system", "Memory in use on the host"),
        ("system_memory_usage_megabytes", "system", _MB, None, "system", "Memory in use on the host"),
        ("process_memory_megabytes", "system", _MB, None, "system", "Resident memory of the first rank's process"),
        ("network_*_megabytes", "system", _MB, None, "system", "Network traffic since the start"),
        ("gpu_*_utilization_percentage", "system", "%", None, "system", "Time in which the GPU was busy"),
        ("gpu_*_memory_usage_percentage", "system", "%", None, "system", "GPU memory in use"),
        ("gpu_*_power_usage_watts", "system", "W", None, "system", "Power drawn by the GPU"),
        ("ended", "trials", "", None, "sweep", "Trials of the sweep that have ended"),
        ("failed", "trials", "", "lower", "sweep", "Trials of the sweep that have failed"),
    )
]  # fmt: skip


@cache
def find(name: str) -> Metric | None:
    """Returns the entry of a metric by its name, with or without its prefix; None if it has none."""
    prefix, _, short = name.rpartition("/")
    prefix = prefix.removeprefix("best/").removesuffix("_train")
    for metric in METRICS:
        if fnmatchcase(short, metric.name) and (not prefix or prefix in metric.prefixes.split()):
            return metric
    return None


def unit(name: str) -> str:
    metric = find(name)
    return "" if metric is None else metric.unit


def better(name: str) -> Literal["lower", "higher"] | None:
    metric = find(name)
    return None if metric is None else metric.better


def reported_as(prefix: str) -> Iterator[Metric]:
    """Yields the metrics that are reported under a prefix, in the registry's order."""
    return (metric for metric in METRICS if prefix in metric.prefixes.split())
