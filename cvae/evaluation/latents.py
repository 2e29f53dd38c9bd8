"""How a model uses its latent space: active units, a linear probe of μ, and its t-SNE (the paper's Figure 3)."""

import contextlib
import io
import math
import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from cvae.errors import UserError
from cvae.models.cvae import to_unit
from cvae.progress import progress_bar
from cvae.sampling.inference import encode
from cvae.sampling.trained_model import TrainedModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    # It imports what a machine that only draws need not have.
    from cvae.evaluation.evaluation_input import EvaluationBatch, EvaluationInput

_ACTIVE = 0.01
_PROBED, _SHOWN, _SEED, _TSNE_STEPS = 10_000, 2_500, 0, 750


class Probe(NamedTuple):
    """How well a linear classifier reads the class from μ, on images that it was not fitted to."""

    accuracy: float
    chance: float  # share of the most frequent class among the test images, which guessing reaches
    n_test: int


class LatentMap(NamedTuple):
    name: str
    places: NDArray[np.float32]  # t-SNE of μ, (n, 2)
    labels: NDArray[np.int64]  # (n,)
    probe: Probe


def active_units(subject: "EvaluationInput") -> dict[str, float]:
    """Returns active_units, the number of latent dimensions whose posterior mean varies over the images.

    A dimension varies if the variance exceeds 0.01 (Burda et al. 2016, section 5.2). Under a learned prior
    p(z|c) its mean is subtracted: a dimension that only repeats the text says nothing about the image.
    """
    size = int(np.prod(subject.model.latent_shape))
    sums = torch.zeros(2, size, dtype=torch.float64, device=subject.ranks.device)

    def moments(batch: "EvaluationBatch") -> torch.Tensor:
        images, condition, noise = batch.batch
        mean = subject.model.encode(to_unit(images), condition).mean
        mean = mean - subject.model.draw_latent(torch.zeros_like(noise), condition)
        mean = mean.flatten(1).double()
        return torch.stack([mean.sum(0), mean.square().sum(0)])

    with torch.inference_mode():
        for _, own in subject.map(moments):
            sums += own
    first, second = subject.ranks.sum(sums) / len(subject.split)
    variance = second - first.square()
    active = float((variance > _ACTIVE).sum()) if variance.isfinite().all() else math.nan
    return {"active_units": active}


def probe(subject: "EvaluationInput") -> dict[str, float]:
    """Returns linear_probe and linear_probe_chance for a labelled split; see linear_probe()."""
    labels = subject.split.labels
    assert labels is not None

    def mean(batch: "EvaluationBatch") -> torch.Tensor:
        return subject.model.encode(to_unit(batch.batch.images), batch.batch.condition).mean

    means = subject.gather(mean, int(np.prod(subject.model.latent_shape)))
    accuracies: tuple[float, float] | None = None
    if subject.ranks.is_first:
        rows = _evenly_spread(len(means), _PROBED)
        result = linear_probe(means.cpu().numpy()[rows], labels[rows])
        accuracies = (result.accuracy, result.chance)
    accuracy, chance = subject.ranks.tell(accuracies) or (math.nan, math.nan)
    return {"linear_probe": accuracy, "linear_probe_chance": chance}


def latent_map(trained: TrainedModel) -> LatentMap:
    """Returns a run's map and probe on its evaluated split; deterministic, about 20 s on two cores.

    Raises UserError for data without labels, or if a μ is not finite.
    """
    val = trained.data.val
    if val.labels is None:
        raise UserError(
            f"{trained.name}: a latent map is coloured by class, but {trained.experiment.data.name} has no labels"
        )
    rows = _evenly_spread(len(val), _PROBED)
    condition = trained.data.condition(val, rows, np.zeros(len(rows)))
    means = encode(trained.model, val.images[rows], condition).reshape(len(rows), -1)
    if not np.isfinite(means).all():
        raise UserError(f"{trained.name}: a latent map needs finite numbers; μ of this run is NaN")
    labels = val.labels[rows]
    shown = _evenly_spread(len(rows), _SHOWN)
    kind = "plain VAE" if trained.data.condition_dim == 0 else "CVAE"
    return LatentMap(
        f"{kind} ({trained.name})",
        _tsne(means[shown], trained.name),
        labels[shown],
        linear_probe(means, labels),
    )


def linear_probe(means: NDArray[np.float32], labels: NDArray[np.int64]) -> Probe:
    """Fits logistic regression to standardised μ (n, d) of half the images and tests it on the other half.

    The accuracy is NaN if a μ is not finite, or if the fitted half has fewer than two classes.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    order = np.random.default_rng(_SEED).permutation(len(labels))
    fit, test = np.array_split(order, 2)
    chance = float(np.bincount(labels[test]).max() / len(test)) if len(test) else math.nan
    if not np.isfinite(means).all() or len(np.unique(labels[fit])) < 2 or not len(test):
        return Probe(math.nan, chance, len(test))
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=500))
    model.fit(means[fit], labels[fit])
    return Probe(float(model.score(means[test], labels[test])), chance, len(test))


def latent_figure(maps: list[LatentMap], classes: list[str]) -> "Figure":
    """Returns a figure with the maps side by side, coloured by class, each above its probe's accuracy."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.text import Text

    figure = Figure(figsize=(5.2 * len(maps) + 1.6, 5.6), layout="constrained")
    panels = figure.subplots(1, len(maps), squeeze=False)[0]
    few = len(classes) <= 10
    colours = matplotlib.colormaps["tab10" if few else "gist_rainbow"](
        np.arange(len(classes)) if few else np.linspace(0, 1, len(classes))
    )
    for axes, shown in zip(panels, maps, strict=True):
        axes.scatter(*shown.places.T, s=7, c=colours[shown.labels], linewidths=0)
        low, high = shown.places.min(0), shown.places.max(0)
        # Squares of the same scale on both axes.
        x, y = (low + high) / 2
        reach = 0.53 * (high - low).max()
        axes.set(xlim=(x - reach, x + reach), ylim=(y - reach, y + reach), aspect="equal")
        axes.set(xticks=[], yticks=[], title=shown.name)
        probe = shown.probe
        caption = (
            f"a linear probe reads the class from μ: {probe.accuracy:.1%} right"
            f"\n(chance {probe.chance:.1%}; {probe.n_test:,} images)"
        )
        axes.set_xlabel(caption.replace("%", " %"), fontsize=11)
        axes.spines[:].set_color("#c8ccd2")
    handles = [Line2D([], [], linestyle="", marker="o", color=tuple(colour)) for colour in colours]
    if len(classes) <= 30:
        figure.legend(handles, classes, loc="outside right center", frameon=False)
    for text in figure.findobj(Text):
        assert isinstance(text, Text)
        text.set_parse_math(False)  # a dollar sign in a name is no formula
    return figure


def _evenly_spread(n: int, count: int) -> NDArray[np.int64]:
    """Returns up to `count` of the numbers below n, evenly spread."""
    return np.linspace(0, n - 1, min(n, count)).astype(np.int64)


def _tsne(means: NDArray[np.float32], name: str) -> NDArray[np.float32]:
    """Maps (n, d) to (n, 2) (van der Maaten & Hinton 2008), with a progress bar."""
    from sklearn.manifold import TSNE

    class Printed(io.TextIOBase):
        """Moves the bar: scikit-learn's t-SNE has no callback, but prints its steps."""

        def write(self, text: str) -> int:
            if step := re.search(r"Iteration (\d+)", text):
                bar.update(int(step[1]) - bar.n)
            return len(text)

    tsne = TSNE(
        perplexity=min(30.0, (len(means) - 1) / 3),
        init="pca" if means.shape[1] > 1 else "random",
        max_iter=_TSNE_STEPS,
        random_state=_SEED,
        verbose=2,
    )
    with (
        progress_bar(_TSNE_STEPS, "step", f"t-SNE of {name}") as bar,
        contextlib.redirect_stdout(Printed()),
    ):
        places: NDArray[np.float32] = tsne.fit_transform(means)
        bar.update(_TSNE_STEPS - bar.n)
    return places
