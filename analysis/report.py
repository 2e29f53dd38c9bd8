"""Makes a report of runs: tables with intervals, figures, pictures, and the paper's claims put to the test.

    python analysis/report.py [--experiment NAME] [--sweep SWEEP] [--runs RUN …] --out DIR

DIR/index.html holds all of it and works offline; the same tables lie in DIR/tables as CSV and Parquet, figures and
pictures in DIR/figures as PNG and SVG. Nothing is trained; drawing pictures takes seconds a run. A report that is
at DIR already is replaced.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import pandas as pd

from analysis import curves, runs
from analysis.html_page import clean, png_bytes, render, svg_text
from analysis.report_data import Material
from analysis.report_images import MOST_RUNS, Picture, opened, pictures
from analysis.report_sections import MADE_BY, sections, summary
from cvae import command_line
from cvae.command_line import Parser
from cvae.errors import UserError
from cvae.files.output_folder import check_folder, whole_folder
from cvae.run.directory import RunDirectory

_CURVES = ["train/loss", "val/loss"]
_NAME = "report.py"


def parser() -> Parser:
    parser = Parser(
        prog="report.py", description="Makes a report of runs: one HTML file, tables, figures."
    )
    parser.add_argument(
        "--experiment", metavar="NAME", help="all runs of the experiment of that name"
    )
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
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", UserWarning)
        found = runs(options.experiment, sweep=options.sweep, names=options.runs)
        points = curves(
            found, [name for name in _CURVES if name in found and found[name].notna().any()]
        )
    notes = [str(warning.message) for warning in told if warning.category is UserWarning]
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    material = Material(found, points, notes)
    drawn, refused = _pictures(material)
    notes += [f"no pictures of {name}: {reason}" for name, reason in refused.items()]
    _write(
        out,
        _title(options, found),
        material,
        drawn,
        " ".join(["python analysis/report.py", *arguments]),
    )
    for line in summary(material):
        print(line)
    print(out / "index.html")
    return 0


def _pictures(material: Material) -> tuple[list[Picture], dict[str, str]]:
    """What the shown runs draw, and of those that cannot, why."""
    here = [RunDirectory(Path(path)) for path in material.showcase(MOST_RUNS)]
    trained, refused = opened(here)
    return list(pictures(trained, material.labels)), refused


def _write(out: Path, title: str, material: Material, drawn: list[Picture], command: str) -> None:
    try:
        with whole_folder(out, _NAME, _is_older_report) as folder:
            (folder / "tables").mkdir()
            (folder / "figures").mkdir()
            made = sections(material, drawn)
            for name, frame in made.tables.items():
                frame.to_csv(folder / "tables" / f"{name}.csv", index=False, errors="replace")
                _plain(frame).to_parquet(folder / "tables" / f"{name}.parquet", index=False)
            for name, figure in made.figures.items():
                (folder / "figures" / f"{name}.svg").write_text(svg_text(figure, name), "utf-8")
                (folder / "figures" / f"{name}.png").write_bytes(png_bytes(figure))
            for picture in drawn:
                (folder / "figures" / f"{picture.name}.png").write_bytes(png_bytes(picture.image))
            page = render(
                title,
                f"{time.strftime('%d %B %Y, %H:%M')}; {command}",
                made.sections,
                summary=summary(material),
                warnings=material.notes,
                footer=MADE_BY,
            )
            (folder / "index.html").write_text(page, "utf-8")
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror}") from None


def _plain(frame: pd.DataFrame) -> pd.DataFrame:
    """A column of mixed types has none in Parquet: such become text."""
    mixed = {
        name: frame[name].map(lambda x: None if x is None or x is pd.NA else clean(str(x)))
        for name in frame.columns
        if frame[name].dtype == object
    }
    return frame.assign(**mixed).rename(columns=lambda name: clean(str(name)))


def _title(options: argparse.Namespace, found: pd.DataFrame) -> str:
    if options.sweep:
        return f"Sweep {options.sweep}"
    if options.experiment:
        return str(options.experiment)
    return ", ".join(found.index) if len(found) < 4 else f"{len(found)} runs"


def _is_older_report(folder: Path) -> bool:
    """Whether it is a report, and nothing else, of a version that left no marker."""
    page = folder / "index.html"
    if {file.name for file in folder.iterdir()} - {page.name, "tables", "figures"}:
        return False
    return page.is_file() and MADE_BY in page.read_text("utf-8", errors="replace")


if __name__ == "__main__":
    command_line.run(main)
