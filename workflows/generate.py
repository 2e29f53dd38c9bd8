"""Draws with a trained model: captions or classes in, labelled pictures out.

    python workflows/generate.py RUN [CAPTION …] [-n COUNT] [--seed SEED] [--reconstruct]
                                 [--latent-map [RUN …]] [--out FILE]

RUN is a run's name, its folder, "latest", or a folder that export.py wrote. Without captions it shows what the
run can do, with a number: samples of every class, and how many of them a classifier assigns to their class; or,
for captioned data, how many captions are matched to their own scene. The same call draws the same pictures;
--seed draws others.
"""

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from cvae import command_line
from cvae.command_line import Parser, positive
from cvae.errors import UserError
from cvae.files.output_folder import check_file
from cvae.sampling.export_format import find_model
from workflows.terminal import formatting

_MOST = 100


def parser() -> Parser:
    parser = Parser(prog="generate.py", description="Draws with a trained model.")
    parser.add_argument(
        "run", metavar="RUN", help='name or folder of a run, "latest", or an exported folder'
    )
    parser.add_argument(
        "captions",
        nargs="*",
        metavar="CAPTION",
        help="what to draw, one row each; for labelled data, names or numbers of classes",
    )
    parser.add_argument(
        "-n", type=positive, default=8, metavar="COUNT", help="images in a row (default: 8)"
    )
    parser.add_argument(
        "--seed", type=_seed, metavar="SEED", help="seed of the noise (default: the run's own)"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--reconstruct", action="store_true", help="show real images above their reconstructions"
    )
    mode.add_argument(
        "--latent-map",
        nargs="*",
        metavar="RUN",
        help="show t-SNE of the latent means by class, next to that of these runs",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="a PNG (default: one in the run's pictures/, or here for an exported model, whose name depends on"
        " captions, count and seed)",
    )
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_intermixed_args(arguments)
    _check(options)
    models = [find_model(name) for name in (options.run, *(options.latent_map or []))]

    # Imported late: torch takes seconds, and a typing error is reported at once.
    from cvae.sampling.sampler import load
    from workflows import generate_figures

    # Without the line of source code that Python adds.
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    trained = [load(model) for model in models]
    if options.seed is not None:
        trained[0] = replace(trained[0], seed=options.seed)
    if options.latent_map is not None:
        figure = generate_figures.latent_maps(trained)
    elif options.reconstruct:
        figure = generate_figures.reconstructions(trained[0], options.n)
    elif options.captions:
        figure = generate_figures.drawings(trained[0], options.captions, options.n)
    else:
        figure = generate_figures.abilities(trained[0], options.n)
    for line in figure.text:
        print(line)
    for path in generate_figures.save(figure, trained[0], options.out):
        print(formatting.shown(path))
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raises UserError for options that do not go together, before minutes of work."""
    draws = not options.reconstruct and options.latent_map is None
    captions, out = options.captions, options.out
    if options.n > _MOST:
        raise UserError(f"-n {options.n}: at most {_MOST} images in a row")
    if captions and not draws:
        raise UserError("--reconstruct and --latent-map take no captions")
    if len(captions) > _MOST:
        raise UserError(f"{len(captions)} captions: a picture holds at most {_MOST}")
    if options.seed is not None and not draws:
        raise UserError("--seed is for drawing: --reconstruct and --latent-map draw no noise")
    for number, caption in enumerate(captions, 1):
        if not caption.strip():
            raise UserError(f"caption {number} of {len(captions)} is empty; say what to draw")
    if out is not None:
        if out.suffix.lower() != ".png":
            raise UserError(f"--out {out}: a picture is written as PNG; name it {out.stem}.png")
        for file in (out, out.with_suffix(".json")):
            check_file(file)


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2⁶³ − 1")
    return int(text)


if __name__ == "__main__":
    command_line.run(main)
