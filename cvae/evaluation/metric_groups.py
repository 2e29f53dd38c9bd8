"""The groups of metrics that a run can be evaluated by, and which of them fit it. Imports no torch."""

from collections.abc import Iterable
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
    """What evaluate_runs is asked to find out about a run, as plain data."""

    run: str
    """Its folder."""
    split: str
    """val | train"""
    groups: list[str]
    iwae_samples: int
    inception: str | None = None
    """The file of the Inception network, and its sha256."""
    inception_sha256: str | None = None

    def key(self, group: str) -> str:
        """Returns under which key the journal has a group's metrics, once a checkpoint.

        It holds whatever else than the checkpoint and the run's data the numbers depend on.
        """
        settings = {"iwae": str(self.iwae_samples), "fid": (self.inception_sha256 or "")[:16]}
        return "-".join([f"{self.split}/{group}", *filter(None, [settings.get(group)])])


def metric_prefix(split: str) -> str:
    """Before the metrics' names."""
    return "eval" if split == "val" else f"eval_{split}"


def fitting_groups(
    experiment: Experiment,
    labelled: bool,
    wanted: list[str] | None,
    inception: str | None,
    split: str = "val",
) -> list[str]:
    """Returns the wanted groups in their order, or all that fit a run and a split.

    labelled: whether its data have classes. Raises UserError if a wanted one is unknown or does not fit.
    """
    condition = experiment.model.condition
    unfit = {
        "fid": None if inception else "needs --inception FILE, a TorchScript Inception network",
        "classifier": None if condition == "label" else "is for models that are told a class",
        "probe": None if labelled else f"needs labels, which {experiment.data.name} has not",
        "captions": None if condition == "text" else "is for models that are told a caption",
    }
    if split != "val":
        # Its samples are of no split, and it is itself trained on the training images.
        unfit["classifier"] = unfit["classifier"] or f"judges samples, which no --split {split} has"
    if wanted is None:
        return [name for name in METRIC_GROUPS if unfit.get(name) is None]
    for name in wanted:
        if name not in METRIC_GROUPS:
            near = did_you_mean(name, METRIC_GROUPS)
            raise UserError(f"--metrics {name}: there is no such group{near}; {_all()}")
        if unfit.get(name) is not None:
            raise UserError(f"--metrics {name}: {unfit[name]} (model.condition = {condition!r})")
    return [name for name in METRIC_GROUPS if name in wanted]


def _all() -> str:
    return f"they are {', '.join(METRIC_GROUPS)}"
