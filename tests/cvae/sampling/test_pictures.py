import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cvae.data.experiment_data import open_data
from cvae.models.cvae import build_model
from cvae.run.directory import RunDirectory
from cvae.run.journal import Journal
from cvae.sampling.grids import GAP, MARGIN, labelled_grid
from cvae.sampling.lettering import font, wrap
from cvae.sampling.pictures import training_pictures, write_learning_curves
from tests.helpers.trained_runs import make_run

CPU = torch.device("cpu")


def test_every_cell_is_shown_whole_and_in_its_place() -> None:
    colours = np.random.default_rng(0).integers(0, 255, (3, 4, 3)).astype(np.uint8)
    cells = np.broadcast_to(colours[..., None, None], (3, 4, 3, 32, 32))
    page = np.asarray(labelled_grid(cells, ["a", "b " * 90, "größer"], list("abcd"), "title"))
    corners = []
    for colour in colours.reshape(-1, 3):
        ys, xs = np.nonzero((page == colour).all(-1))
        assert len(ys) == 96 * 96
        corners.append((ys.min(), xs.min()))
    ys, xs = np.array(corners).reshape(3, 4, 2).transpose(2, 0, 1)
    assert (ys == ys[:, :1]).all()
    assert (xs == xs[:1]).all()
    assert (np.diff(ys[:, 0]) >= 96).all()
    assert (np.diff(xs[0]) >= 96).all()


@pytest.mark.parametrize(
    ("rows", "columns", "width", "shown"),
    [(1, 1, 28, 84), (1, 1, 256, 256), (1, 1, 512, 256), (1, 100, 28, 56), (90, 2, 256, 88)],
)
def test_cells_have_a_sensible_size(rows: int, columns: int, width: int, shown: int) -> None:
    cell = np.random.default_rng(0).integers(0, 255, (1, 1, 3, width, width)).astype(np.uint8)
    page = labelled_grid(np.broadcast_to(cell, (rows, columns, 3, width, width)))
    assert page.size[0] == columns * (shown + GAP) - GAP + 2 * MARGIN
    assert page.size[1] == rows * (shown + GAP) - GAP + 2 * MARGIN
    assert max(page.size) <= 8192 + 2 * MARGIN
    # Averaged and not picked: pixels of noise become grey.
    corner = np.asarray(page)[MARGIN : MARGIN + shown, MARGIN : MARGIN + shown]
    assert (corner.std() < 60) == (shown < width)


def test_a_grid_is_the_same_every_time_and_its_labels_matter() -> None:
    cells = np.zeros((1, 1, 1, 8, 8), np.uint8)
    one, two, other = (labelled_grid(cells, [text]) for text in ("cat", "cat", "dog"))
    assert one.tobytes() == two.tobytes()
    assert one.size != other.size or one.tobytes() != other.tobytes()


def test_wrapped_lines_fit_and_lose_nothing() -> None:
    text = "a remarkably long caption about a " + "v" * 60 + "ery big dog\n on  a bench"
    lines = wrap(text, font(), 150)
    assert all(font().getlength(line) <= 150 for line in lines)
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert wrap("", font(), 150) == []
    endless = wrap("word " * 500, font(), 150)
    assert len(endless) < 20
    assert endless[-1].endswith("…")


@pytest.mark.parametrize("letter", "éßΩЖ“”✓✗")
def test_the_font_has_letters_of_many_languages(letter: str) -> None:
    missing = font().getmask("\uffff")
    assert bytes(font().getmask(letter)) != bytes(missing)


@pytest.mark.parametrize("condition", ["label", "none", "text"])
def test_training_pictures_depend_on_the_model_alone(
    condition: str, tiny_store: Path, tiny_captioned_store: Path
) -> None:
    run = make_run(captioned=condition == "text", condition=condition)
    experiment = run.experiment()
    data = open_data(experiment)

    def draw(seed: int) -> dict[str, Image.Image]:
        model = build_model(experiment.model, data.image_shape, data.condition_dim, seed).eval()
        return training_pictures(model, data, experiment.seed)

    first, again, other = draw(1), draw(1), draw(2)
    assert set(first) == {"samples", "reconstructions"}
    for key, picture in first.items():
        assert picture.tobytes() == again[key].tobytes()
        assert picture.size == other[key].size
        assert picture.tobytes() != other[key].tobytes()


def test_learning_curves_survive_gaps_and_emptiness(tiny_store: Path) -> None:
    run = make_run()
    empty = Image.open(write_learning_curves(run)).convert("RGB")
    journal = Journal(run.journal_file)
    for step in range(1, 40):
        loss = math.nan if step == 20 else 300 - step
        metrics = {"train/loss": loss, "train/recon_loss": loss, "train/kl": math.inf}
        journal.append("step", step=step, metrics=metrics)
    journal.append("epoch", step=39, epoch=1.0, metrics={"val/loss": 262.0})
    journal.close()
    path = write_learning_curves(RunDirectory(run.path))
    assert path == run.pictures / "curves.png"
    assert Image.open(path).convert("RGB").tobytes() != empty.tobytes()
