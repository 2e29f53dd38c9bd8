"""Whether a run has time to save when SLURM ends it: the notice it gets against what a checkpoint takes."""

from pathlib import Path
from typing import TYPE_CHECKING

from cvae.config.experiment import Experiment
from cvae.run import journal
from slurm.cluster_file import Place
from workflows.terminal.formatting import Fact, duration

if TYPE_CHECKING:  # torch takes seconds to import, and a typing error is answered at once
    from cvae.data.experiment_data import ExperimentData

# Of a shared file system, with the checksum and the wait for the disk; what is measured replaces it.
_BYTES_PER_S = 100e6
_MEASURED = 20


def expected_save_s(experiment: Experiment, data: "ExperimentData") -> float:
    """Seconds for a first checkpoint: weights and Adam's two moments in fp32, averaged weights where kept."""
    import torch

    from cvae.models.cvae import build_model

    with torch.device("meta"):
        model = build_model(experiment.model, data.image_shape, data.condition_dim, experiment.seed)
    copies = 3 if experiment.training.ema_decay is None else 4
    return 4 * copies * model.n_parameters() / _BYTES_PER_S


def measured_save_s(journal_file: Path) -> float | None:
    """The longest that one of the run's last checkpoints took; None where there was none."""
    saves = [line for line in journal.read(journal_file)[0] if line["kind"] == "checkpoint"]
    return max(
        (x.get("stall_s", 0) + x.get("write_s", 0) for x in saves[-_MEASURED:]), default=None
    )


def grace_fact(place: Place, save_s: float, how: str) -> Fact:
    """how: "measured" or "expected". Asks SLURM."""
    slurm, config = place.config.slurm(), place.config
    mode, notice_s = slurm.preemption(config.partition)
    notices = {f"before the time limit (grace_s = {config.grace_s})": config.grace_s}
    if mode != "OFF":
        notices[f"at a preemption (PreemptMode={mode})"] = notice_s
    # A step, the agreement of the ranks and the requeueing come on top.
    needed = save_s + 3
    told = f"a checkpoint takes about {duration(max(1, save_s))} ({how}); notice: " + ", ".join(
        f"{duration(seconds)} {when}" for when, seconds in notices.items()
    )
    short = [when for when, seconds in notices.items() if seconds < needed]
    if short:
        told += (
            f"\nWARNING: too short {' and '.join(short)}: what was trained since the last checkpoint would"
            " be lost; set checkpoint.every_steps to save more often"
            + (", or a longer grace_s" if config.grace_s < needed else "")
        )
    return ("grace", told)
