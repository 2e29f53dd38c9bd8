"""Which groups of metrics fit a run, and the request to evaluate them. Imports no torch."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from cvae.config.experiment import Experiment
from cvae.errors import UserError, did_you_mean
from cvae.metrics import METRIC_GROUPS

_LOSS_NOTE = (
    "loss = recon_loss + beta·kl and neg_elbo = recon_loss + kl leave constants of the likelihood out;"
    " iwae and bits_per_dim include them."
)
_GAUSSIAN_NOTE = (
    "A Gaussian's constant is ½ log π + log 255 = 6.11 nats a dimension, which makes iwae so much larger"
    " than loss: compare them in bits per dimension"
)
_LIKELIHOOD_NOTES = {
    "gaussian": _GAUSSIAN_NOTE + " (σ² = ½).",
    "optimal_gaussian": _GAUSSIAN_NOTE + ".",
    "bernoulli": "Bernoulli's loss is that of grey pixels, iwae that of pixels drawn as 0 or 1, without a"
    " constant.",
}


def likelihood_note(likelihoods: Iterable[str]) -> str:
    """Returns which constants the losses under these likelihoods leave out; "" if none of them is known."""
    notes = [_LIKELIHOOD_NOTES[name] for name in likelihoods if name in _LIKELIHOOD_NOTES]
    return " ".join([_LOSS_NOTE, *notes]) if notes else ""


@dataclass(frozen=True)
class EvaluationRequest:
    """Groups of metrics to measure for one run, as plain data."""

    run: str  # the run's folder
    split: str  # val | train
    groups: list[str]
    iwae_samples: int
    inception: str | None = None  # the file of the Inception network
    inception_sha256: str | None = None

    def key(self, group: str) -> str:
        """Returns the key of a group's metrics in the journal, which has each key once per checkpoint.

        It names everything else that the numbers depend on, except for the run's data.
        """
        settings = {"iwae": str(self.iwae_samples), "fid": (self.inception_sha256 or "")[:16]}
        return "-".join([f"{self.split}/{group}", *filter(None, [settings.get(group)])])


def metric_prefix(split: str) -> str:
    """Returns the prefix of the metrics' names."""
    return "eval" if split == "val" else f"eval_{split}"


def fitting_groups(
    experiment: Experiment,
    labelled: bool,
    requested: Sequence[str] | None,
    inception: str | None,
    split: str = "val",
) -> list[str]:
    """Returns the requested groups in their standard order; by default all that fit the run and the split.

    labelled: whether the data have classes. Raises UserError if a requested group is unknown or does not fit.
    """
    condition = experiment.model.condition
    obstacles = {
        "fid": "" if inception else "needs a TorchScript Inception network",
        "classifier": "" if condition == "label" else "needs a model that draws from classes",
        "probe": "" if labelled else f"needs labels, which {experiment.data.name} does not have",
        "captions": "" if condition == "text" else "needs a model that draws from captions",
    }
    if split != "val" and not obstacles["classifier"]:
        # Samples belong to no split, and the classifier is itself trained on the training images.
        obstacles["classifier"] = f"judges samples, which the split {split} does not have"
    for name in requested or ():
        if name not in METRIC_GROUPS:
            near = did_you_mean(name, METRIC_GROUPS)
            raise UserError(
                f"there is no group of metrics {name!r}{near}; they are {', '.join(METRIC_GROUPS)}"
            )
        if obstacles.get(name):
            text = f"the metrics {name!r}: {obstacles[name]} (model.condition = {condition!r})"
            raise UserError(text, hint=f"measure_{name}")
    if requested is None:
        return [name for name in METRIC_GROUPS if not obstacles.get(name)]
    return [name for name in METRIC_GROUPS if name in requested]
