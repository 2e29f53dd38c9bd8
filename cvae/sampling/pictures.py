"""The pictures of a run: samples, reconstructions, learning curves."""

import io
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cvae.data import draws
from cvae.data.experiment_data import ExperimentData
from cvae.files.paths import write_atomically
from cvae.models.cvae import Cvae
from cvae.run import journal
from cvae.run.directory import RunDirectory
from cvae.sampling.grids import labelled_grid
from cvae.sampling.inference import reconstruct, sample, sample_rows

if TYPE_CHECKING:  # its import takes half a second, which every rank of a training would pay
    from matplotlib.figure import Figure

_CAPTIONS, _SAMPLES, _RECONSTRUCTIONS, _MAX_CLASSES = 8, 8, 10, 20
_CURVES = {"loss": "loss (−ELBO)", "recon_loss": "reconstruction loss", "kl": "KL"}


@torch.inference_mode()
def training_pictures(model: Cvae, data: ExperimentData, seed: int) -> dict[str, Image.Image]:
    """Returns the pictures of one evaluation, "samples" and "reconstructions", by a model in eval mode.

    Prompts, images and noise are the same every time, so that two pictures differ by the model alone.
    """
    samples, reconstructions = sample_grid(model, data, seed), reconstruction_grid(model, data)
    return {"samples": samples, "reconstructions": reconstructions}


def sample_grid(model: Cvae, data: ExperimentData, seed: int) -> Image.Image:
    """Returns samples of every class, or of the first captions of val next to the real image, or of no prompt.

    All rows of classes or captions share the z of a column.
    """
    if data.condition_dim == 0:
        noise = draws.sample_noise(seed, _SAMPLES**2, model.latent_shape)
        drawn = sample(model, noise, None)
        return labelled_grid(drawn.reshape(_SAMPLES, _SAMPLES, *drawn.shape[1:]))
    noise = draws.sample_noise(seed, _SAMPLES, model.latent_shape)
    classes = data.store.manifest.classes
    if classes is not None:
        condition = np.eye(data.condition_dim, dtype=np.float32)[:_MAX_CLASSES]
        return labelled_grid(sample_rows(model, condition, noise), classes[:_MAX_CLASSES])
    rows = np.arange(min(_CAPTIONS, len(data.val)))
    captions = data.condition(data.val, rows, np.zeros(len(rows)))
    assert captions is not None
    drawn = sample_rows(model, captions, noise[2:])
    cells = np.concatenate([data.val.images[rows][:, None], drawn], axis=1)
    heads = ["real"] + ["drawn"] * (_SAMPLES - 2)
    return labelled_grid(cells, [data.val.caption(int(row)) for row in rows], heads)


def reconstruction_grid(
    model: Cvae, data: ExperimentData, count: int = _RECONSTRUCTIONS
) -> Image.Image:
    """Returns images of val above their reconstructions; the classes of labelled data take turns."""
    rows, heads = np.arange(min(count, len(data.val))), []
    classes, labels = data.store.manifest.classes, data.val.labels
    if labels is not None and classes is not None:
        # Sorted by the number of earlier images of the same class, then by class.
        nth = np.zeros(len(labels), np.int64)
        for label in range(len(classes)):
            nth[labels == label] = np.arange((labels == label).sum())
        rows = np.lexsort((labels, nth))[:count]
        heads = [classes[label] for label in labels[rows]]
    originals = np.array(data.val.images[rows])
    condition = data.condition(data.val, rows, np.zeros(len(rows)))
    cells = np.stack([originals, reconstruct(model, originals, condition)])
    return labelled_grid(cells, ["original", "reconstruction"], heads)


def write_png(picture: "Image.Image | Figure", path: Path) -> None:
    """Writes a PNG that appears whole or not at all. Raises OSError."""
    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(buffer, format="PNG")
    else:
        picture.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())


def write_learning_curves(run: RunDirectory) -> Path:
    """Writes the run's learning curves to pictures/curves.png and returns its path. Raises OSError."""
    path = run.pictures / "curves.png"
    path.parent.mkdir(exist_ok=True)
    write_png(learning_curves(run), path)
    return path


def learning_curves(run: RunDirectory) -> "Figure":
    """Returns a figure of −ELBO and its two parts over the steps, in nats per image, training and validation."""
    from matplotlib.figure import Figure

    lines = journal.read(run.journal_file)[0]
    figure = Figure(figsize=(12, 3.8), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (metric, name) in zip(panels, _CURVES.items(), strict=True):
        train = _curve(lines, "step", f"train/{metric}")
        val = _curve(lines, "epoch", f"val/{metric}")
        axes.plot(*train, color="#9db8d9", linewidth=1, label="training (batch)")
        axes.plot(*val, color="#c8402f", linewidth=2, marker=".", label="validation")
        axes.set(title=name, xlabel="step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        # The scale leaves out the first steps, whose values are far off.
        tail = np.concatenate([y[len(y) // 20 :] for _, y in (train, val)])
        if len(tail):
            low, high = tail.min(), tail.max()
            space = 0.05 * (high - low) or 1.0
            axes.set_ylim(low - space, high + space)
    panels[0].set_ylabel("nats per image")
    panels[0].legend(frameon=False)
    figure.suptitle(run.name, fontsize="medium")
    return figure


def _curve(
    lines: Iterable[dict[str, Any]], kind: str, metric: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Returns the steps and the finite values of a metric in the journal."""
    points = sorted(
        (line["step"], line["metrics"][metric])
        for line in lines
        if line["kind"] == kind and math.isfinite(line["metrics"].get(metric, math.nan))
    )
    steps, values = zip(*points, strict=True) if points else ((), ())
    return np.array(steps, np.int64), np.array(values, np.float64)
