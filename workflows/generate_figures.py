"""The pictures of generate.py, each with the lines to print about it."""

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL.Image import Image

from cvae.errors import UserError
from cvae.evaluation.caption_match import caption_match, match_grid
from cvae.evaluation.classifier import SAMPLES_PER_CLASS, judge_samples
from cvae.evaluation.latents import latent_figure, latent_map
from cvae.files.paths import write_atomically
from cvae.progress import progress_bar
from cvae.sampling.grids import labelled_grid, shrink, widest
from cvae.sampling.inference import sample
from cvae.sampling.lettering import without_font
from cvae.sampling.pictures import reconstruction_grid, write_png
from cvae.sampling.trained_model import TrainedModel
from workflows.terminal.formatting import aligned

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST_WORDS = 40


class GeneratedFigure(NamedTuple):
    name: str
    picture: "Image | Figure"
    text: list[str]  # lines to print
    facts: dict[str, Any]  # the numbers of the text, for a JSON file; empty if there are none


def drawings(trained: TrainedModel, captions: list[str], count: int) -> GeneratedFigure:
    """Draws `count` images of each caption or class. Raises UserError."""
    labels = trained.labels(captions)
    # Shrunk at once: a hundred rows of large images would fill the memory.
    limit = widest(len(captions), count)
    rows = [shrink(part, limit) for part in trained.draw_parts(captions, count)]
    note = []
    if missing := without_font(labels):
        shown = " ".join(missing[:12]) + (" …" if len(missing) > 12 else "")
        note = [f"no font here has {shown}: the labels name or number such letters"]
    name = _sheet_name(trained, labels, count)
    return GeneratedFigure(name, labelled_grid(np.concatenate(rows), labels), note, {})


def _sheet_name(trained: TrainedModel, labels: list[str], count: int) -> str:
    """Returns a name such as "captions-a_red_bus-3f2a91c0", which only the same drawings have."""
    words = re.sub(r"\W+", "_", labels[0])[:_LONGEST_WORDS].strip("_")
    drawn = json.dumps([trained.name, trained.step, trained.seed, count, labels])
    digest = hashlib.sha256(drawn.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return "-".join(filter(None, ["captions", words, digest]))


def reconstructions(trained: TrainedModel, count: int) -> GeneratedFigure:
    grid = reconstruction_grid(trained.model, trained.data, count)
    return GeneratedFigure("reconstructions", grid, [], {})


def abilities(trained: TrainedModel, count: int) -> GeneratedFigure:
    """Shows what a run can do without prompts; the figure depends on its condition."""
    condition = trained.experiment.model.condition
    if condition == "text":
        return _caption_match(trained)
    if condition == "label":
        return _classes(trained, count)
    limit, noise = widest(count, count), trained.noise(count**2)
    with progress_bar(len(noise), "image", "images", delay=2) as bar:
        rows = [
            shrink(sample(trained.model, noise[start : start + count], None, bar.update), limit)
            for start in range(0, len(noise), count)
        ]
    return GeneratedFigure("samples", labelled_grid(np.stack(rows)), [], {})


def latent_maps(trained: list[TrainedModel]) -> GeneratedFigure:
    """Draws the paper's Figure 3. Raises UserError unless all runs use the same labelled data."""
    stores = {run.data.store.path.name for run in trained}
    if len(stores) > 1:
        raise UserError(f"--latent-map compares runs on the same data, not {' and '.join(stores)}")
    maps = [latent_map(run) for run in trained]
    text = [
        f"{one.name}: a linear probe reads the class from μ of {_percent(one.probe.accuracy)}"
        f" of the images (chance {_percent(one.probe.chance)})"
        for one in maps
    ]
    probes = {run.name: one.probe._asdict() for run, one in zip(trained, maps, strict=True)}
    figure = latent_figure(maps, trained[0].classes)
    return GeneratedFigure("latent_map", figure, text, {"linear_probe": probes})


def save(figure: GeneratedFigure, trained: TrainedModel, out: Path | None) -> list[Path]:
    """Writes the picture, and its facts next to it as JSON; returns the files. Raises OSError."""
    if out is None and trained.run is not None:
        trained.run.pictures.mkdir(exist_ok=True)
        out = trained.run.pictures / f"{figure.name}.png"
    # An exported folder is not changed: its pictures go to the current folder.
    path = out or Path(f"{trained.name}-{figure.name}.png")
    write_png(figure.picture, path)
    if not figure.facts:
        return [path]
    facts = {"run": trained.name, "step": trained.step, **figure.facts}
    json_file = path.with_suffix(".json")
    write_atomically(json_file, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return [path, json_file]


def _classes(trained: TrainedModel, count: int) -> GeneratedFigure:
    """Draws the paper's Figures 4 and 5, with a classifier's verdict on many more samples."""
    accuracy = judge_samples(trained)
    verdict = (
        f"{_percent(accuracy.overall)} of samples are classified as their class, by a classifier"
        f" that gets {_percent(accuracy.real)} of real images right"
    )
    shares = {name: _percent(share, 0) for name, share in accuracy.per_class.items()}
    rows = [f"{name} {share}" for name, share in shares.items()]
    facts = {
        "sample_accuracy": accuracy.overall,
        "sample_accuracy_per_class": accuracy.per_class,
        "samples_per_class": SAMPLES_PER_CLASS,
        "classifier_real_accuracy": accuracy.real,
    }
    grid = labelled_grid(trained.draw(trained.classes, count), rows, title=verdict)
    return GeneratedFigure("classes", grid, [f"{verdict}:", aligned(shares.items())], facts)


def _caption_match(trained: TrainedModel) -> GeneratedFigure:
    match = caption_match(trained)
    right = dict(zip(match.scenes.captions, map(bool, match.right), strict=True))
    facts = {"caption_match": match.share, "chance": match.chance, "captions": right}
    return GeneratedFigure("caption_match", match_grid(match), [match.sentence()], facts)


def _percent(share: float, decimals: int = 1) -> str:
    return f"{100 * share:.{decimals}f} %"
