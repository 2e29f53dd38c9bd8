"""What several runs draw side by side: the same captions and the same noise through each of them."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from analysis.html_page import Part, picture
from cvae.data.draws import sample_noise
from cvae.errors import UserError
from cvae.evaluation.latents import latent_figure, latent_map
from cvae.files.paths import printable
from cvae.run import journal
from cvae.run.directory import RunDirectory
from cvae.sampling.grids import labelled_grid
from cvae.sampling.inference import reconstruct, sample, sample_rows
from cvae.sampling.sampler import load_run
from cvae.sampling.trained_model import TrainedModel

MOST_RUNS = 6
_CAPTIONS, _CLASSES, _IMAGES, _MAPS = 6, 10, 10, 3


def pictures(folders: Sequence[str], labels: Mapping[str, str]) -> tuple[list[Part], list[str]]:
    """Returns what the runs in these folders draw, and a note for each run that cannot.

    These are grids of samples and reconstructions for each data set, maps of labelled ones, and what evaluate.py
    has drawn. labels: what each run is called in a grid, by its name.
    """
    trained, notes = [], []
    for folder in folders:
        run = RunDirectory(Path(folder))
        try:
            trained.append(load_run(run))
        except (UserError, OSError) as error:
            notes.append(f"no pictures of {printable(run.name)}: {printable(str(error))}")
    return list(_draw_all(trained, labels)), notes


def _draw_all(trained: Sequence[TrainedModel], labels: Mapping[str, str]) -> Iterator[Part]:
    by_data: dict[str, list[TrainedModel]] = {}
    for run in trained:
        by_data.setdefault(run.data.store.path.name, []).append(run)
    for data, runs in by_data.items():
        suffix = f"_{data}" if len(by_data) > 1 else ""
        heads = [labels[printable(run.name)] for run in runs]
        yield _samples(runs, heads, f"samples{suffix}")
        yield _reconstructions(runs, heads, f"reconstructions{suffix}")
        if runs[0].data.val.labels is not None:
            # A map takes t-SNE 20 seconds: one of the CVAEs, one of the plain VAEs, …
            kinds = {run.experiment.model.condition: run for run in reversed(runs)}
            maps = [latent_map(run) for run in list(reversed(kinds.values()))[:_MAPS]]
            text = "t-SNE of the posterior's mean μ, coloured by class (the paper's Figure 3)."
            figure = latent_figure(maps, runs[0].data.store.manifest.classes or [])
            yield picture(figure, f"latent_map{suffix}", "Latent maps", text)
    for run in trained:
        yield from _extremes(run)


def _samples(runs: Sequence[TrainedModel], labels: Sequence[str], name: str) -> Part:
    """Returns a grid: a row per caption or class, the runs' samples in columns, one noise in a column.

    Runs with the same latent shape have the same noise, others draws of the same seed.
    """
    val, classes = runs[0].data.val, runs[0].data.store.manifest.classes
    each = 2 if len(runs) > 3 else 3
    n_rows = min(_CAPTIONS, len(val))
    if val.labels is not None and classes is not None:
        row_labels, columns, heads = classes[:_CLASSES], [], []
        n_rows = len(row_labels) or n_rows
    else:
        captioned = val.caption_offsets is not None
        row_labels = [val.caption(row) for row in range(n_rows)] if captioned else []
        columns, heads = [val.images[np.arange(n_rows)][:, None]], ["real"]
    for run, label in zip(runs, labels, strict=True):
        columns.append(_draw(run, n_rows, each))
        heads += [label] + [""] * (each - 1)
    grid = labelled_grid(np.concatenate(columns, axis=1), row_labels, heads)
    text = "The same captions and the same noise through each run's best checkpoint."
    if classes is not None:
        text = "The same classes and the same noise through each run; a plain VAE has no class."
    return picture(grid, name, "Samples side by side", text)


def _reconstructions(runs: Sequence[TrainedModel], labels: Sequence[str], name: str) -> Part:
    """Returns a grid of the first images of val, encoded and decoded by each run with the posterior's mean."""
    val = runs[0].data.val
    rows = np.arange(min(_IMAGES, len(val)))
    originals = np.array(val.images[rows])
    conditions = [run.data.condition(val, rows, np.zeros(len(rows))) for run in runs]
    decoded = [reconstruct(r.model, originals, c) for r, c in zip(runs, conditions, strict=True)]
    grid = labelled_grid(np.stack([originals, *decoded]), ["original", *labels])
    text = "Images of the evaluated split, and each run's reconstructions of them."
    return picture(grid, name, "Reconstructions", text)


def _draw(run: TrainedModel, n_rows: int, each: int) -> NDArray[np.uint8]:
    """Returns samples (n_rows, each, C, H, W)."""
    data = run.data
    # The report's own noise: a run's own seed would give each run another.
    count = each if data.condition_dim else n_rows * each
    noise = sample_noise(0, count, run.model.latent_shape)
    if data.condition_dim == 0:
        return sample(run.model, noise, None).reshape(n_rows, each, *run.image_shape)
    if data.val.labels is not None:
        return sample_rows(run.model, np.eye(data.condition_dim, dtype=np.float32)[:n_rows], noise)
    condition = data.condition(data.val, np.arange(n_rows), np.zeros(n_rows))
    assert condition is not None
    return sample_rows(run.model, condition, noise)


def _extremes(run: TrainedModel) -> Iterator[Part]:
    """Yields the worst and best reconstructions, if the run was evaluated."""
    assert run.run is not None
    lines = [
        line
        for line in journal.read(run.run.journal_file)[0]
        if line["kind"] == "picture" and line["key"] == "extremes"
    ]
    if lines and (path := run.run.path / lines[-1]["path"]).is_file():
        name = printable(run.name)
        text = f"By PSNR over the evaluated split, at step {lines[-1]['step']:,}."
        with Image.open(path) as image:
            title = f"Worst and best reconstructions: {name}"
            yield picture(image.convert("RGB"), f"extremes_{name}", title, text)
