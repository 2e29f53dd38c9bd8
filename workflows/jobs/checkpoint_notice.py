"""Compares the notice that SLURM gives before it ends a run with the time that a checkpoint takes."""

from pathlib import Path

from cvae.run import journal
from slurm.cluster_file import Place
from workflows.terminal.formatting import Fact, duration

# Of a shared file system, checksum and fsync included; used until a checkpoint has been measured.
_BYTES_PER_S = 100e6
_MEASURED = 20
# A step, the agreement of the ranks and the requeueing.
_OVERHEAD_S = 3


def expected_save_s(n_parameters: int, averages: bool) -> float:
    """Returns the seconds of a checkpoint in fp32: weights, Adam's two moments and, if kept, averaged weights."""
    return 4 * (4 if averages else 3) * n_parameters / _BYTES_PER_S


def measured_save_s(journal_file: Path) -> float | None:
    """Returns the longest that one of the run's last checkpoints took; None if there was none."""
    saves = [line for line in journal.read(journal_file)[0] if line["kind"] == "checkpoint"]
    return max(
        (x.get("stall_s", 0) + x.get("write_s", 0) for x in saves[-_MEASURED:]), default=None
    )


def grace_fact(place: Place, save_s: float, how: str) -> Fact:
    """Asks SLURM for its notice and returns a fact about it, with a warning if it is shorter than save_s.

    how: "measured" or "expected".
    """
    config = place.config
    mode, notice_s = config.slurm().preemption(config.partition)
    notices = {f"before the time limit (grace_s = {config.grace_s})": config.grace_s}
    if mode != "OFF":
        notices[f"at a preemption (PreemptMode={mode})"] = notice_s
    needed_s = save_s + _OVERHEAD_S
    listed = ", ".join(f"{duration(seconds)} {when}" for when, seconds in notices.items())
    text = f"a checkpoint takes about {duration(max(1, save_s))} ({how}); notice: {listed}"
    if short := [when for when, seconds in notices.items() if seconds < needed_s]:
        text += (
            f"\nWARNING: too short {' and '.join(short)}: training since the last checkpoint would be lost;"
            " set checkpoint.every_steps to save more often"
            + (", or a longer grace_s" if config.grace_s < needed_s else "")
        )
    return ("grace", text)
