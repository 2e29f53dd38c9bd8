"""Writes a run's best model as a folder that draws on any machine.

    python workflows/export.py RUN DIR

RUN is a run's name, its folder, or "latest". DIR must not exist. It gets the weights, the experiment, the text
encoder, and a model card with training data, metrics and limits. Drawing from it needs no MLflow, SLURM or Ray:

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
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder to create")
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    run = RunDirectory.open(options.run)
    folder: Path = options.folder
    if (run.path / CONFIG).is_file():
        raise UserError(f"{run.path} is already an exported model; copy it")
    check_target(folder)

    # Imported late: torch takes seconds, and a typing error is reported at once.
    from cvae.sampling.export import export_run

    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    exported = export_run(run, folder)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != MARKER)
    sizes = {str(file.relative_to(folder)): file.stat().st_size for file in files}
    sizes["all"] = sum(sizes.values())
    rows = [(name, size(count)) for name, count in sizes.items()]
    print(formatting.table(("file", "size"), rows, right=("size",)))
    print(f"{exported.name}, step {exported.step:,}: {formatting.shown(folder.resolve())}")
    return 0


def size(count: int) -> str:
    """Returns a number of bytes as "90.9 MB"."""
    unit = next((n for n in range(3) if count < 1000 ** (n + 1)), 3)
    return f"{count / 1000**unit:.{min(unit, 1)}f} {_UNITS[unit]}"


if __name__ == "__main__":
    command_line.run(main)
