"""Writes a run's best model as a folder that draws on any machine.

    python workflows/export.py RUN DIR

RUN is a run's name, its folder, or "latest". DIR is made: weights, experiment, the text encoder, and a model
card that tells of training data, metrics and limits. It needs no MLflow, SLURM or Ray:

    python workflows/generate.py DIR "a red bus on a street"
"""

import sys
import warnings
from pathlib import Path

from cvae import command_line
from cvae.command_line import Parser
from cvae.errors import UserError
from cvae.files.output_folder import MARKER
from cvae.run.directory import RunDirectory
from cvae.sampling.export_format import CONFIG, check_target
from workflows.terminal import formatting

_UNITS = ("B", "kB", "MB", "GB")


def parser() -> Parser:
    parser = Parser(
        prog="export.py",
        description="Writes a run's best model as a folder that draws on any machine.",
    )
    parser.add_argument("run", metavar="RUN", help='name or folder of a run, or "latest"')
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to make")
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    run = RunDirectory.open(options.run)
    folder: Path = options.folder
    if (run.path / CONFIG).is_file():
        raise UserError(f"{run.path} is an exported model already; copy it")
    check_target(folder)

    # Only now: torch takes seconds to import, and a typing error is answered at once.
    from cvae.sampling.export import export_run

    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    exported = export_run(run, folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MARKER)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    rows = [(name, size(count)) for name, count in sizes.items()]
    print(
        formatting.table(
            ("file", "size"), [*rows, ("all", size(sum(sizes.values())))], right=("size",)
        )
    )
    print(f"{exported.name}, step {exported.step:,}: {formatting.shown(folder.resolve())}")
    return 0


def size(count: int) -> str:
    """ "90.9 MB"."""
    value, unit = float(count), 0
    while value >= 1000 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.{1 if unit else 0}f} {_UNITS[unit]}"


if __name__ == "__main__":
    command_line.run(main)
