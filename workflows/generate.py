"""Draws with a trained model: captions or classes in, labelled pictures out.

    python workflows/generate.py RUN [CAPTION …] [-n COUNT] [--seed SEED] [--reconstruct]
                                 [--latent-map [RUN …]] [--out FILE]

RUN is a run's name, its folder, "latest", or a folder that export.py wrote. Without captions it shows what the
run can do, with a number beside it: samples of every class, and how many a classifier takes for what they
should be; or, for captioned data, how many captions are matched to their own scene. The same call draws the
same pictures, unless --seed asks for others.
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
from workflows.terminal import formatting as text

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
        help="what to draw, a row each; class names or numbers for a run on labelled data",
    )
    parser.add_argument(
        "-n", type=positive, default=8, metavar="COUNT", help="images in a row (default: 8)"
    )
    parser.add_argument(
        "--seed", type=_seed, metavar="SEED", help="draws others (default: the run's own seed)"
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument(
        "--reconstruct", action="store_true", help="real images above their reconstructions"
    )
    mode.add_argument(
        "--latent-map",
        nargs="*",
        metavar="RUN",
        help="t-SNE of the latent means by class; these runs beside the first",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="a PNG (default: in the run's pictures/, of an exported model here; other captions, counts and "
        "seeds get other names)",
    )
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_intermixed_args(arguments)
    if options.n > _MOST:
        raise UserError(f"-n {options.n}: at most {_MOST} images in a row")
    if options.captions and (options.reconstruct or options.latent_map is not None):
        raise UserError("--reconstruct and --latent-map take no captions")
    if len(options.captions) > _MOST:
        raise UserError(f"{len(options.captions)} captions: a picture holds at most {_MOST}")
    if options.seed is not None and (options.reconstruct or options.latent_map is not None):
        raise UserError("--seed is for drawing: --reconstruct and --latent-map draw no noise")
    for number, caption in enumerate(options.captions, 1):
        if not caption.strip():
            which = f"caption {number} of {len(options.captions)}"
            raise UserError(f"{which} is empty; say what to draw")
    if options.out is not None:
        _check_out(options.out)
    models = [find_model(name) for name in (options.run, *(options.latent_map or []))]

    # Only now: torch takes seconds to import, and a typing error is answered at once.
    from cvae.sampling.sampler import load
    from workflows import generate_figures

    # A note, as "checkpoint … is damaged", and not a library's line of source code.
    warnings.showwarning = lambda message, *_: print(f"note: {message}", file=sys.stderr)
    trained = [load(model) for model in models]
    if options.seed is not None:
        trained[0] = replace(trained[0], seed=options.seed)
    if options.latent_map is not None:
        shown = generate_figures.latent_maps(trained)
    elif options.reconstruct:
        shown = generate_figures.reconstructions(trained[0], options.n)
    elif options.captions:
        shown = generate_figures.drawings(trained[0], options.captions, options.n)
    else:
        shown = generate_figures.abilities(trained[0], options.n)
    for line in shown.text:
        print(line)
    for path in generate_figures.save(shown, trained[0], options.out):
        print(text.shown(path))
    return 0


def _seed(text: str) -> int:
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 0 to 2⁶³ − 1")
    return int(text)


def _check_out(path: Path) -> None:
    """Before minutes of work: whether the picture can be put there at all."""
    if path.suffix.lower() != ".png":
        raise UserError(f"--out {path}: a picture is written as PNG; name it {path.stem}.png")
    for written in (path, path.with_suffix(".json")):
        check_file(written)


if __name__ == "__main__":
    command_line.run(main)
