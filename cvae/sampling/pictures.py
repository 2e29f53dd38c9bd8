"""What a run shows of itself: samples, reconstructions, learning curves."""

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from cvae.config.experiment import Experiment
from cvae.data import draws
from cvae.data.experiment_data import ExperimentData
from cvae.files.paths import write_atomically
from cvae.models.cvae import Cvae
from cvae.run import journal
from cvae.run.directory import RunDirectory
from cvae.sampling.grids import labelled_grid
from cvae.sampling.inference import reconstruct, sample, sample_rows

if TYPE_CHECKING:  # half a second of import that training's ranks would all pay
    from matplotlib.figure import Figure

_CAPTIONS, _SAMPLES, _RECONSTRUCTIONS, _MAX_CLASSES = 8, 8, 10, 20


@torch.inference_mode()
def training_pictures(
    model: Cvae, data: ExperimentData, experiment: Experiment, device: torch.device
) -> dict[str, Image.Image]:
    """The pictures of one evaluation: "samples" and "reconstructions".

    Prompts, images and noise are the same every time, so that two pictures differ by the model alone.
    model: in eval mode, on `device`.
    """
    return {
        "samples": sample_grid(model, data, experiment.seed),
        "reconstructions": reconstruction_grid(model, data),
    }


def sample_grid(model: Cvae, data: ExperimentData, seed: int) -> Image.Image:
    """Samples of every class; of the first captions of val, the real image first; or of nothing.

    All rows share the z of a column.
    """
    n_columns = _SAMPLES
    if data.condition_dim == 0:
        noise = draws.sample_noise(seed, n_columns**2, model.latent_shape)
        return labelled_grid(in_rows(sample(model, noise, None), n_columns))
    noise = draws.sample_noise(seed, n_columns, model.latent_shape)
    classes = data.store.manifest.classes
    if classes is not None:
        condition = np.eye(data.condition_dim, dtype=np.float32)[:_MAX_CLASSES]
        return labelled_grid(sample_rows(model, condition, noise), classes[:_MAX_CLASSES])
    shown = np.arange(min(_CAPTIONS, len(data.val)))
    described = data.condition(data.val, shown, np.zeros(len(shown)))
    assert described is not None
    drawn = sample_rows(model, described, noise[2:])
    cells = np.concatenate([data.val.images[shown][:, None], drawn], axis=1)
    heads = ["real"] + ["drawn"] * (n_columns - 2)
    return labelled_grid(cells, [data.val.caption(int(i)) for i in shown], heads)


def reconstruction_grid(
    model: Cvae, data: ExperimentData, count: int = _RECONSTRUCTIONS
) -> Image.Image:
    """Images of val above their reconstructions; of labelled data the classes in turn."""
    shown, heads = np.arange(min(count, len(data.val))), []
    classes, labels = data.store.manifest.classes, data.val.labels
    if labels is not None and classes is not None:
        # By how many of its class came before it, then by class.
        nth = np.zeros(len(labels), np.int64)
        for label in range(len(classes)):
            nth[labels == label] = np.arange((labels == label).sum())
        shown = np.lexsort((labels, nth))[:count]
        heads = [classes[label] for label in labels[shown]]
    originals = np.array(data.val.images[shown])
    condition = data.condition(data.val, shown, np.zeros(len(shown)))
    cells = np.stack([originals, reconstruct(model, originals, condition)])
    return labelled_grid(cells, ["original", "reconstruction"], heads)


def write_learning_curves(run: RunDirectory) -> Path:
    """Draws the run's journal to pictures/curves.png. Raises OSError."""
    path = run.pictures / "curves.png"
    path.parent.mkdir(exist_ok=True)
    write_png(learning_curves(run), path)
    return path


def write_png(picture: "Image.Image | Figure", path: Path) -> None:
    """Writes a PNG that appears whole or not at all. Raises OSError."""
    buffer = io.BytesIO()
    if isinstance(picture, Image.Image):
        picture.save(buffer, format="PNG")
    else:
        picture.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())


def learning_curves(run: RunDirectory) -> "Figure":
    """−ELBO and its two parts over the steps, in nats per image, training and validation."""
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
        # The first steps are far off; the scale belongs to what follows.
        tail = np.concatenate([y[len(y) // 20 :] for _, y in (train, val)])
        if len(tail):
            low, high = tail.min(), tail.max()
            space = 0.05 * (high - low) or 1.0
            axes.set_ylim(low - space, high + space)
    panels[0].set_ylabel("nats per image")
    panels[0].legend(frameon=False)
    figure.suptitle(run.name, fontsize="medium")
    return figure


_CURVES = {"loss": "loss (−ELBO)", "recon_loss": "reconstruction loss", "kl": "KL"}


def _curve(
    lines: list[dict[str, Any]], kind: str, metric: str
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps and finite values of a metric in the journal."""
    points = [
        (line["step"], line["metrics"][metric])
        for line in lines
        if line["kind"] == kind and math.isfinite(line["metrics"].get(metric, math.nan))
    ]
    points.sort()
    return (
        np.array([step for step, _ in points], np.int64),
        np.array([value for _, value in points], np.float64),
    )


def in_rows(images: NDArray[np.uint8], n_columns: int) -> NDArray[np.uint8]:
    """(n, C, H, W) → (n / n_columns, n_columns, C, H, W)."""
    return images.reshape(-1, n_columns, *images.shape[1:])
