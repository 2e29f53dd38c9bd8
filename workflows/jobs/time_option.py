"""`--time`: how long a job may run on SLURM, for every command that submits one."""

import argparse

from slurm.commands import minutes_of


def add_time(parser: argparse._ActionsContainer, default: str = "the cluster file's") -> None:
    parser.add_argument(
        "--time",
        type=_minutes,
        metavar="TIME",
        help="time limit of the job on SLURM: minutes, or as SLURM writes it, 1:30:00 or 1-12"
        f" (default: {default})",
    )


def _minutes(text: str) -> int:
    minutes = minutes_of(text)
    if not minutes:
        raise argparse.ArgumentTypeError(
            f"{text[:200]!r} is no time limit; write minutes, as 90, or hours:minutes:seconds, as 1:30:00,"
            " or days-hours, as 1-12"
        )
    return minutes
