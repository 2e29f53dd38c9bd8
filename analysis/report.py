"""Makes a report of runs: tables with intervals, figures, pictures, and verdicts on the paper's claims.

    python analysis/report.py [--experiment NAME] [--sweep SWEEP] [--runs RUN …] --out DIR

DIR/index.html holds everything and works offline. DIR/tables has the tables as CSV and Parquet, DIR/figures the
figures and pictures as PNG and SVG. Nothing is trained; drawing pictures takes seconds per run. A report that is
already at DIR is replaced.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

from analysis import curves, runs
from analysis.html_page import render
from analysis.report_data import ReportData
from analysis.report_images import MOST_RUNS, pictures
from analysis.report_sections import sections, summary
from cvae import command_line
from cvae.command_line import Parser
from cvae.errors import UserError
from cvae.files.output_folder import check_folder, whole_folder

_NAME = "report.py"
_MADE_BY = "Made by analysis/report.py of cvae-workflow."


def parser() -> Parser:
    parser = Parser(
        prog=_NAME, description="Makes a report of runs: one HTML file, tables, figures."
    )
    parser.add_argument("--experiment", metavar="NAME", help="all runs of the experiment")
    parser.add_argument("--sweep", metavar="SWEEP", help="the trials of a sweep")
    parser.add_argument("--runs", nargs="+", metavar="RUN", help='names or folders, or "latest"')
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if not (options.experiment or options.sweep or options.runs):
        raise UserError(
            "a report of which runs? give --experiment NAME, --sweep SWEEP or --runs RUN …"
        )
    out: Path = options.out
    check_folder(out, _NAME, _is_older_report)
    data = _load(options)
    for note in data.notes:
        print(f"note: {note}", file=sys.stderr)
    drawn, refused = pictures(data.showcase(MOST_RUNS), data.labels)
    data.notes += refused
    made = sections(data, drawn)
    command = " ".join(["python analysis/report.py", *arguments])
    page = render(
        _title(options, list(data.runs.index)),
        f"{time.strftime('%d %B %Y, %H:%M')}; {command}",
        made,
        summary=summary(data),
        warnings=data.notes,
        footer=_MADE_BY,
    )
    files = {
        path: content
        for section in made
        for part in section.parts
        for path, content in part.files.items()
    }
    try:
        with whole_folder(out, _NAME, _is_older_report) as folder:
            for path, content in (files | {"index.html": page.encode()}).items():
                (folder / path).parent.mkdir(exist_ok=True)
                (folder / path).write_bytes(content)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None
    print(*summary(data), out / "index.html", sep="\n")
    return 0


def _load(options: argparse.Namespace) -> ReportData:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        table = runs(options.experiment, sweep=options.sweep, names=options.runs)
        drawn = ("train/loss", "val/loss")
        points = curves(
            table, [name for name in drawn if name in table and table[name].notna().any()]
        )
    notes = [str(warning.message) for warning in caught if warning.category is UserWarning]
    return ReportData(table, points, notes)


def _title(options: argparse.Namespace, names: list[str]) -> str:
    if options.sweep:
        return f"Sweep {options.sweep}"
    return options.experiment or (", ".join(names) if len(names) < 4 else f"{len(names)} runs")


def _is_older_report(folder: Path) -> bool:
    """Whether the folder is a report of a version that left no marker, and holds nothing else."""
    page = folder / "index.html"
    if {file.name for file in folder.iterdir()} - {page.name, "tables", "figures"}:
        return False
    return page.is_file() and _MADE_BY in page.read_text("utf-8", errors="replace")


if __name__ == "__main__":
    command_line.run(main)
