"""The command-line options of every command that submits a job: --nodes, --gpus, --cluster and --time."""

import argparse

from cvae.command_line import positive
from slurm.commands import minutes_of


def add_job_options(
    parser: argparse._ActionsContainer,
    nodes: int | None = 1,
    defaults: str | None = None,
    gpus: str = "one per node",
    time: str = "the cluster file's",
) -> None:
    """Adds the four options. nodes: the value without --nodes. Others: the defaults that the help states."""
    where = defaults or "SLURM if a controller responds, else this machine"
    parser.add_argument(
        "--nodes", type=positive, default=nodes, metavar="N", help=f"default: {defaults or 1}"
    )
    parser.add_argument(
        "--gpus", type=positive, metavar="G", help=f"in total (default: {defaults or gpus})"
    )
    parser.add_argument(
        "--cluster", metavar="NAME", help=f"configs/clusters/NAME.yaml (default: {where})"
    )
    parser.add_argument(
        "--time",
        type=_minutes,
        metavar="TIME",
        help="time limit of the job on SLURM: minutes, or as SLURM writes it, 1:30:00 or 1-12"
        f" (default: {time})",
    )


def _minutes(text: str) -> int:
    minutes = minutes_of(text)
    if not minutes:
        raise argparse.ArgumentTypeError(
            f"{text[:200]!r} is no time limit; write minutes, as 90, or hours:minutes:seconds, as 1:30:00,"
            " or days-hours, as 1-12"
        )
    return minutes
