"""Where the classes lie in the latent space: t-SNE of μ (the paper's Figure 3) and a linear probe."""

import contextlib
import io
import math
import re
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cvae.errors import UserError
from cvae.progress import progress_bar
from cvae.sampling.inference import encode
from cvae.sampling.trained_model import TrainedModel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PROBED = 10_000
_SHOWN, _SEED, _TSNE_STEPS = 2_500, 0, 750


class Probe(NamedTuple):
    """How well a linear classifier reads the class from μ, on images that it was not fitted to."""

    accuracy: float
    chance: float
    """Share of the most frequent class among the test images, which guessing reaches."""
    n_test: int


class LatentMap(NamedTuple):
    name: str
    places: NDArray[np.float32]
    """t-SNE of μ, (n, 2)."""
    labels: NDArray[np.int64]
    """(n,)"""
    probe: Probe


def latent_map(trained: TrainedModel) -> LatentMap:
    """Returns a run's map and probe on its evaluated split; deterministic, about 20 s on two cores.

    Raises UserError for data without labels, or if a μ is not finite.
    """
    val = trained.data.val
    if val.labels is None:
        raise UserError(
            f"{trained.name}: a latent map is coloured by class, but {trained.experiment.data.name} has no labels"
        )
    rows = evenly_spread(len(val), PROBED)
    condition = trained.data.condition(val, rows, np.zeros(len(rows)))
    means = encode(trained.model, val.images[rows], condition).reshape(len(rows), -1)
    if not np.isfinite(means).all():
        raise UserError(f"{trained.name}: a latent map needs finite numbers; μ of this run is NaN")
    labels = val.labels[rows]
    shown = evenly_spread(len(rows), _SHOWN)
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


def evenly_spread(n: int, count: int) -> NDArray[np.int64]:
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
