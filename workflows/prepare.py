"""Prepares a data set once, so that training only reads memory-mapped arrays.

python workflows/prepare.py fashion_mnist      Fashion-MNIST, 28×28, ten classes
python workflows/prepare.py scenes             the demo's drawn scenes, 64×64, with captions
python workflows/prepare.py coco --root DIR    an official MS COCO download (--download fetches it)
"""

import argparse
import re
import time
from pathlib import Path

from cvae.command_line import Parser, positive, run
from cvae.data.store import Skipped, store_path
from cvae.data.text_encoder import MINILM
from cvae.errors import UserError
from cvae.preparation.coco import CocoRequest, prepare_coco
from cvae.preparation.coco_download import download_coco
from cvae.preparation.fashion_mnist import prepare_fashion_mnist
from cvae.preparation.scenes_coco import TRAIN_IMAGES, prepare_scenes
from cvae.preparation.store_writer import Prepared
from slurm import cluster_file
from workflows.jobs import prepare_job
from workflows.jobs.job_options import add_job_options
from workflows.terminal.formatting import duration, shown

_MOST_REASONS = 5


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    start = time.monotonic()
    prepared: Prepared = options.prepare(options)
    if prepared.made:
        _print_summary(prepared, time.monotonic() - start)
    else:
        print(f"{shown(prepared.store.path)} is complete and intact: nothing to do")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="prepare.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    datasets = parser.add_subparsers(metavar="DATASET", required=True)

    fashion_mnist = datasets.add_parser("fashion_mnist", help="Fashion-MNIST, labelled")
    source = "folder of the four idx or idx.gz files (default: that of Debian's package "
    source += "dataset-fashion-mnist, else a download)"
    fashion_mnist.add_argument("--source", type=Path, metavar="DIR", help=source)
    fashion_mnist.set_defaults(prepare=lambda options: prepare_fashion_mnist(options.source))

    scenes = datasets.add_parser("scenes", help="the demo: drawn scenes with captions")
    count = "training images; a tenth as many are for validation (default: %(default)s)"
    scenes.add_argument("--count", type=positive, default=TRAIN_IMAGES, metavar="N", help=count)
    _add_text(scenes, MINILM)
    scenes.set_defaults(
        prepare=lambda options: prepare_scenes(options.count, text_encoder=options.text)
    )

    coco = datasets.add_parser("coco", help="MS COCO with its captions")
    root = "folder that holds annotations/, train2017/, val2017/"
    coco.add_argument("--root", type=Path, required=True, metavar="DIR", help=root)
    splits = ["train2017", "val2017"]
    coco.add_argument("--split", nargs="+", default=splits, metavar="FOLDER", help="of images")
    coco.add_argument("--size", type=positive, default=64, help="height and width in pixels")
    crop = "cut the centre square of each image instead of squeezing the whole image"
    coco.add_argument("--crop", action="store_true", help=crop)
    _add_text(coco, "bert-base-uncased")
    precision = (
        "of the encoder's matrix products; bf16 is twice as fast on hardware that supports it"
    )
    coco.add_argument("--text-precision", choices=["fp32", "bf16"], default="fp32", help=precision)
    download = "first download what --root lacks of the official archives; resumes, and checks them"
    coco.add_argument("--download", action="store_true", help=download)
    ranks = coco.add_argument_group("on several GPUs or nodes (default: in this process)")
    add_job_options(ranks, nodes=None)
    coco.set_defaults(prepare=_prepare_coco)
    return parser


def _add_text(parser: argparse.ArgumentParser, default: str) -> None:
    text = "'minilm' (needs no network), a name on the Hugging Face hub, or a folder "
    text += "(default: %(default)s)"
    parser.add_argument("--text", default=default, metavar="ENCODER", help=text)


def _prepare_coco(options: argparse.Namespace) -> Prepared:
    request = CocoRequest(
        root=options.root,
        splits=_splits(options.split),
        image_size=options.size,
        text_encoder=options.text,
        crop=options.crop,
        text_precision=options.text_precision,
    )
    fill = None
    if options.nodes or options.gpus or options.cluster or options.time:
        nodes = options.nodes or 1
        requested = cluster_file.split(nodes, options.gpus or nodes)
        fill = prepare_job.filler(requested, options.cluster, options.time)
    if options.download:
        download_coco(options.root, options.split)
    prepare_job.end_leftover(store_path("coco", options.size))
    return prepare_coco(request, fill)


def _splits(folders: list[str]) -> dict[str, str]:
    """Returns the folder of each split: train2017 is "train", val2017 is "val"."""
    for folder in folders:
        if not re.fullmatch(r"\w[\w.-]*", folder):
            raise UserError(f"--split {folder}: give the name of a folder in --root, as train2017")
    splits = {re.sub(r"\d+$", "", folder) or folder: folder for folder in folders}
    if len(splits) < len(folders):
        raise UserError(f"--split {' '.join(folders)}: two folders would be one split")
    return splits


def _print_summary(prepared: Prepared, seconds: float) -> None:
    manifest = prepared.store.manifest
    print(f"prepared {shown(prepared.store.path)} in {duration(seconds)}")
    for name, split in manifest.splits.items():
        captions = f", {split.captions:,} captions" if split.captions else ""
        skipped = f", {len(split.skipped)} skipped (see manifest.json)" if split.skipped else ""
        truncated = sum(entry.truncated.get(name, 0) for entry in manifest.text_encoders.values())
        cut = f", {truncated} captions cut to the encoder's limit" if truncated else ""
        print(f"  {name}: {split.images:,} images{captions}{skipped}{cut}")
        for line in _reasons(split.skipped):
            print(f"    {line}")


def _reasons(skipped: list[Skipped]) -> list[str]:
    """Returns a line with the count and an example of each kind of reason, the commonest first."""
    kinds: dict[str, list[Skipped]] = {}
    for entry in skipped:
        kinds.setdefault(re.sub(r"\d+", "…", entry.reason), []).append(entry)
    ordered = sorted(kinds.values(), key=len, reverse=True)
    first, rest = ordered[:_MOST_REASONS], sum(map(len, ordered[_MOST_REASONS:]))
    lines = [f"{len(kind):,} × {kind[0].reason} ({kind[0].file})" for kind in first]
    return [*lines, f"{rest:,} × something else"] if rest else lines


if __name__ == "__main__":
    run(main)
