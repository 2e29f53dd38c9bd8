"""What runs draw, side by side: the same captions and the same noise through each of them."""

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cvae.data.draws import sample_noise
from cvae.errors import UserError
from cvae.evaluation.latent_map import latent_figure, latent_map
from cvae.files.paths import printable
from cvae.run import journal
from cvae.run.directory import RunDirectory
from cvae.sampling.grids import labelled_grid
from cvae.sampling.inference import reconstruct, sample, sample_rows
from cvae.sampling.sampler import load_run
from cvae.sampling.trained_model import TrainedModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MOST_RUNS = 6
_CAPTIONS, _CLASSES, _IMAGES, _MAPS = 6, 10, 10, 3


class Picture(NamedTuple):
    name: str
    """Of its file."""
    title: str
    text: str
    image: "Image.Image | Figure"


def opened(runs: Sequence[RunDirectory]) -> tuple[list[TrainedModel], dict[str, str]]:
    """The runs that can draw, and of the others why they cannot."""
    trained, refused = [], {}
    for run in runs:
        try:
            trained.append(load_run(run))
        except (UserError, OSError) as error:
            refused[printable(run.name)] = printable(str(error))
    return trained, refused


def pictures(trained: Sequence[TrainedModel], labels: Mapping[str, str]) -> Iterator[Picture]:
    """Grids of samples and of reconstructions for each data set among the runs; latent maps of labelled ones.

    labels: what each run is called in a grid, by its name.
    """
    by_data: dict[str, list[TrainedModel]] = {}
    for run in trained:
        by_data.setdefault(run.data.store.path.name, []).append(run)
    for data, runs in by_data.items():
        suffix = f"_{data}" if len(by_data) > 1 else ""
        yield samples(runs, labels, suffix)
        yield reconstructions(runs, labels, suffix)
        if runs[0].data.val.labels is not None:
            maps = [latent_map(run) for run in _one_per_condition(runs)]
            text = "t-SNE of the posterior's mean μ, coloured by class (the paper's Figure 3)."
            figure = latent_figure(maps, runs[0].data.store.manifest.classes or [])
            yield Picture(f"latent_map{suffix}", "Latent maps", text, figure)
    for run in trained:
        yield from _extremes(run)


def samples(runs: Sequence[TrainedModel], labels: Mapping[str, str], suffix: str) -> Picture:
    """A row for each caption or class, the runs' samples beside one another; a column has one noise in all rows.

    Where latent shapes agree the runs have the same noise, else draws of the same seed.
    """
    first = runs[0]
    val, classes = first.data.val, first.data.store.manifest.classes
    each = 2 if len(runs) > 3 else 3
    if val.labels is not None and classes is not None:
        rows_are = classes[:_CLASSES]
        columns, heads = [], []
    else:
        rows = np.arange(min(_CAPTIONS, len(val)))
        captioned = val.caption_offsets is not None
        rows_are = [val.caption(int(row)) for row in rows] if captioned else []
        columns, heads = [val.images[rows][:, None]], ["real"]
    n_rows = len(rows_are) or min(_CAPTIONS, len(val))
    for run in runs:
        drawn = _drawn(run, n_rows, each)
        columns.append(drawn)
        heads += [labels[printable(run.name)]] + [""] * (each - 1)
    grid = labelled_grid(np.concatenate(columns, axis=1), rows_are, heads)
    text = "The same captions and the same noise through each run's best checkpoint."
    if classes is not None:
        text = "The same classes and the same noise through each run; a plain VAE is told no class."
    return Picture(f"samples{suffix}", "Samples side by side", text, grid)


def reconstructions(
    runs: Sequence[TrainedModel], labels: Mapping[str, str], suffix: str
) -> Picture:
    """The first images of val through each run and back, by way of the posterior's mean."""
    val = runs[0].data.val
    rows = np.arange(min(_IMAGES, len(val)))
    originals = np.array(val.images[rows])
    cells = [originals]
    for run in runs:
        condition = run.data.condition(val, rows, np.zeros(len(rows)))
        cells.append(reconstruct(run.model, originals, condition))
    grid = labelled_grid(
        np.stack(cells), ["original", *(labels[printable(run.name)] for run in runs)]
    )
    text = "Images of the evaluated split, and what each run makes of them."
    return Picture(f"reconstructions{suffix}", "Reconstructions", text, grid)


def _drawn(run: TrainedModel, n_rows: int, each: int) -> NDArray[np.uint8]:
    """(n_rows, each, C, H, W)."""
    rows, data = np.arange(n_rows), run.data
    # The report's own noise: a run's own seed would give each run another.
    count = each if data.condition_dim else n_rows * each
    noise = sample_noise(0, count, run.model.latent_shape)
    if data.condition_dim == 0:
        return sample(run.model, noise, None).reshape(n_rows, each, *run.image_shape)
    if data.val.labels is not None:
        condition = np.eye(data.condition_dim, dtype=np.float32)[:n_rows]
    else:
        described = data.condition(data.val, rows, np.zeros(n_rows))
        assert described is not None
        condition = described
    return sample_rows(run.model, condition, noise)


def _one_per_condition(runs: Sequence[TrainedModel]) -> list[TrainedModel]:
    """A map takes t-SNE's twenty seconds: one of the CVAEs, one of the plain VAEs, …"""
    kinds = {run.experiment.model.condition: run for run in reversed(runs)}
    return list(reversed(kinds.values()))[:_MAPS]


def _extremes(run: TrainedModel) -> Iterator[Picture]:
    """The worst and best reconstructions, where the run was evaluated."""
    assert run.run is not None
    lines = [
        line
        for line in journal.read(run.run.journal_file)[0]
        if line["kind"] == "picture" and line["key"] == "extremes"
    ]
    if lines and (path := run.run.path / lines[-1]["path"]).is_file():
        title = f"Worst and best reconstructions: {printable(run.name)}"
        text = f"By PSNR over the evaluated split, at step {lines[-1]['step']:,}."
        with Image.open(path) as image:
            yield Picture(f"extremes_{printable(run.name)}", title, text, image.convert("RGB"))
