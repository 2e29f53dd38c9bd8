"""The pictures of generate.py, each with what is to be said about it."""

import hashlib
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL.Image import Image

from cvae.errors import UserError
from cvae.evaluation.caption_match import caption_match, match_grid
from cvae.evaluation.classifier import reference_classifier
from cvae.evaluation.latent_map import latent_figure, latent_map
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

_JUDGED_PER_CLASS = 200
_LONGEST_WORDS = 40


class Shown(NamedTuple):
    name: str
    picture: "Image | Figure"
    text: list[str]
    """Lines to print."""
    facts: dict[str, Any]
    """The same for machines; empty where the picture speaks for itself."""


def drawings(trained: TrainedModel, captions: list[str], count: int) -> Shown:
    """`count` drawings of every caption, or of every class named. Raises UserError."""
    labels = trained.labels(captions)
    # As small as they are shown: a hundred rows of large images would fill the memory.
    limit = widest(len(captions), count)
    rows = [shrink(part, limit) for part in trained.draw_parts(captions, count)]
    note = []
    if missing := without_font(labels):
        shown = " ".join(missing[:12]) + (" …" if len(missing) > 12 else "")
        note = [f"no font here has {shown}: such letters are named or numbered in the labels"]
    name = _sheet_name(trained, labels, count)
    return Shown(name, labelled_grid(np.concatenate(rows), labels), note, {})


def _sheet_name(trained: TrainedModel, labels: list[str], count: int) -> str:
    """As "captions-a_red_bus-3f2a91c0": the same for the same drawings, another for others."""
    drawn = json.dumps([trained.name, trained.step, trained.seed, count, labels])
    words = re.sub(r"\W+", "_", labels[0])[:_LONGEST_WORDS].strip("_")
    digest = hashlib.sha256(drawn.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    return "-".join(filter(None, ["captions", words, digest]))


def reconstructions(trained: TrainedModel, count: int) -> Shown:
    grid = reconstruction_grid(trained.model, trained.data, count)
    return Shown("reconstructions", grid, [], {})


def abilities(trained: TrainedModel, count: int) -> Shown:
    """What a run's condition lets it show without being asked for anything in particular."""
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
    return Shown("samples", labelled_grid(np.stack(rows)), [], {})


def latent_maps(trained: list[TrainedModel]) -> Shown:
    """The paper's Figure 3. Raises UserError for runs that are not on one labelled data set."""
    stores = {run.data.store.path.name for run in trained}
    if len(stores) > 1:
        raise UserError(f"--latent-map compares runs on the same data, not {' and '.join(stores)}")
    maps = [latent_map(run) for run in trained]
    text = [
        f"{found.name}: a linear probe reads the class from μ of {_percent(found.probe.accuracy)}"
        f" of the images (chance {_percent(found.probe.chance)})"
        for found in maps
    ]
    probes = {run.name: found.probe._asdict() for run, found in zip(trained, maps, strict=True)}
    return Shown(
        "latent_map", latent_figure(maps, trained[0].classes), text, {"linear_probe": probes}
    )


def save(shown: Shown, trained: TrainedModel, out: Path | None) -> list[Path]:
    """Writes the picture, and its facts beside it as JSON; returns what was written. Raises OSError."""
    if out is None and trained.run is not None:
        trained.run.pictures.mkdir(exist_ok=True)
        out = trained.run.pictures / f"{shown.name}.png"
    # An exported model is left as it is; its pictures go to where the person is.
    path = out or Path(f"{trained.name}-{shown.name}.png")
    write_png(shown.picture, path)
    if not shown.facts:
        return [path]
    facts = {"run": trained.name, "step": trained.step, **shown.facts}
    beside = path.with_suffix(".json")
    write_atomically(beside, json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    return [path, beside]


def _classes(trained: TrainedModel, count: int) -> Shown:
    """The paper's Figures 4 and 5, and a classifier's verdict on many more samples."""
    classes = trained.classes
    classifier = reference_classifier(trained.data, trained.device)
    labels = np.repeat(np.arange(len(classes)), _JUDGED_PER_CLASS)
    condition = np.eye(len(classes), dtype=np.float32)[labels]
    drawn = sample(trained.model, trained.noise(len(labels)), condition)
    accuracy = classifier.sample_accuracy(drawn, labels)
    verdict = (
        f"{_percent(accuracy.overall)} of samples are taken for what they should be, by a classifier"
        f" that gets {_percent(classifier.real_accuracy)} of real images right"
    )
    shares = {name: _percent(share, 0) for name, share in accuracy.per_class.items()}
    rows = [f"{name} {share}" for name, share in shares.items()]
    facts = {
        "sample_accuracy": accuracy.overall,
        "sample_accuracy_per_class": accuracy.per_class,
        "samples_per_class": _JUDGED_PER_CLASS,
        "classifier_real_accuracy": classifier.real_accuracy,
    }
    grid = labelled_grid(trained.draw(classes, count), rows, title=verdict)
    return Shown("classes", grid, [f"{verdict}:", aligned(shares.items())], facts)


def _caption_match(trained: TrainedModel) -> Shown:
    match = caption_match(trained)
    facts = {
        "caption_match": match.share,
        "chance": match.chance,
        "captions": {
            caption: bool(right)
            for caption, right in zip(match.scenes.captions, match.right, strict=True)
        },
    }
    return Shown("caption_match", match_grid(match), [match.sentence()], facts)


def _percent(share: float, decimals: int = 1) -> str:
    return f"{100 * share:.{decimals}f} %"
