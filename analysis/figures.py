"""The report's figures: learning curves, the two parts of −ELBO, and what the swept keys do to a metric.

Each function takes the tables of `analysis.runs` and `analysis.curves` and returns a matplotlib Figure, or None if
the runs have nothing to show in it.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distinct for people with colour vision deficiencies, too, on white and on black (Okabe & Ito 2008).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a08500", "#56b4e9", "#8a5a44", "#7f7f7f")
MOST_GROUPS = len(_COLOURS)
INK = "#1b1f24"
"""Colour of text and axes; the page replaces it by its own, for the dark mode."""
_TITLES = {"train/loss": "loss, training (batch)", "val/loss": "loss, validation"}
_MOST_POINTS, _MOST_VALUES = 120, 12


def learning_curves(curves: pd.DataFrame, groups: pd.Series) -> "Figure | None":
    """Draws training and validation loss over the steps: a group's mean, with a band of ± one standard error.

    curves: as of analysis.curves. groups: the name of each run's group, by run.
    """
    names = list(dict.fromkeys(groups))[:MOST_GROUPS]
    metrics = [name for name in _TITLES if (curves["metric"] == name).any()]
    if not metrics:
        return None
    figure, panels = _panels(len(metrics), 5.2, 3.7)
    for axes, metric in zip(panels, metrics, strict=True):
        points = curves[(curves["metric"] == metric) & np.isfinite(curves["value"])]
        group_of_point = points["run"].astype(str).map(groups)
        shown: list[float] = []
        for name, colour in zip(names, _COLOURS, strict=False):
            if not (group_of_point == name).any():
                continue
            steps, mean, se = _band(points[group_of_point == name])
            axes.plot(steps, mean, color=colour, lw=1.6, label=name)
            axes.fill_between(steps, mean - se, mean + se, color=colour, alpha=0.22, lw=0)
            # The first steps are far off; the scale is that of the others.
            shown += mean[len(mean) // 12 :].tolist()
        if shown:
            low, high = np.nanmin(shown), np.nanmax(shown)
            space = 0.06 * (high - low) or 1.0
            axes.set_ylim(low - space, high + space)
        axes.set(title=_TITLES[metric], xlabel="step")
    panels[0].set_ylabel("nats per image")
    handles, labels = panels[-1].get_legend_handles_labels()
    if len(names) > 1 and handles:
        look = {"frameon": False, "fontsize": 8, "labelcolor": INK, "ncols": min(4, len(names))}
        figure.legend(handles, labels, loc="outside lower center", **look)
    return figure


def elbo_parts(runs: pd.DataFrame, groups: pd.Series) -> "Figure | None":
    """Draws −ELBO split into reconstruction and KL (bars, means of groups), and as rate and distortion.

    Right: rate is val/kl, distortion val/recon_loss, both in nats per image, a point per run (Alemi et al. 2018,
    "Fixing a Broken ELBO", section 3).
    """
    parts = ["val/recon_loss", "val/kl"]
    if not set(parts) <= set(runs.columns):
        return None
    finite = runs[np.isfinite(runs[parts].astype(float)).all(axis=1)]
    group_of_run = groups[finite.index]
    names = [name for name in dict.fromkeys(groups) if (group_of_run == name).any()][:MOST_GROUPS]
    if not names:
        return None
    figure, (bars, plane) = _panels(2, 5.2, max(2.6, 0.42 * len(names) + 1.6))
    for row, (name, colour) in enumerate(zip(names, _COLOURS, strict=False)):
        members = finite[group_of_run == name]
        recon, kl = (float(members[part].astype(float).mean()) for part in parts)
        bars.barh(row, recon, color=colour, height=0.62)
        bars.barh(row, kl, left=recon, color=colour, alpha=0.45, height=0.62)
        bars.text(recon + kl, row, f" {recon:.4g} + {kl:.3g}", va="center", fontsize=8, color=INK)
        plane.scatter(members["val/kl"], members["val/recon_loss"], color=colour, s=26, label=name)
    bars.set(yticks=range(len(names)), yticklabels=names, xlabel="nats per image")
    bars.set_title("reconstruction (full) + KL (pale)")
    bars.invert_yaxis()
    bars.margins(x=0.28)
    plane.set(title="rate and distortion", xlabel="rate: kl", ylabel="distortion: recon_loss")
    plane.margins(0.12)
    return figure


def parallel_coordinates(runs: pd.DataFrame, keys: Sequence[str], metric: str) -> "Figure | None":
    """Draws a line per run through its values of the keys to its metric; the best are dark and on top."""
    keys = [key for key in keys if runs[key].nunique(dropna=True) > 1]
    runs = runs[np.isfinite(runs[metric].astype(float))] if metric in runs else runs.iloc[:0]
    if len(keys) < 2 or len(runs) < 4:
        return None
    import matplotlib

    names = [*keys, metric]
    figure, (axes,) = _panels(1, max(6.0, 1.9 * len(names)), 3.6)
    columns = [_scaled(runs[name]) for name in names]
    rank = runs[metric].astype(float).rank(pct=True).to_numpy()
    colours = matplotlib.colormaps["viridis"](0.9 * rank)
    for position in np.argsort(-rank):
        heights = [places[position] for places, _ in columns]
        axes.plot(range(len(names)), heights, color=colours[position], lw=1.4, alpha=0.85)
    for place, (_, ticks) in enumerate(columns):
        axes.axvline(place, color=INK, lw=0.8, alpha=0.5)
        for height, text in ticks:
            axes.text(place + 0.03, height + 0.012, text, fontsize=8, color=INK, va="bottom")
    axes.set(xticks=range(len(names)), yticks=[], xlim=(-0.2, len(names) - 0.6))
    axes.set_xticklabels(names, fontsize=9)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def importance_bars(importance: pd.Series) -> "Figure | None":
    """Draws the share of the metric's variation that each key explains (analysis.intervals.importance)."""
    shares = importance.astype(float).sort_values()
    if shares.empty or not np.isfinite(shares).all():
        return None
    figure, (axes,) = _panels(1, 6.0, 0.36 * len(shares) + 1.1)
    bars = axes.barh(shares.index.astype(str), shares.to_numpy(), color=_COLOURS[0], height=0.62)
    labels = [f" {share:.0%}".replace("%", " %") for share in shares]
    axes.bar_label(bars, labels, fontsize=8, color=INK)
    axes.set(xlim=(0, 1.12), xlabel="share of the variation explained")
    return figure


def _band(points: pd.DataFrame) -> tuple[NDArray[np.float64], ...]:
    """Returns steps, mean and standard error over the runs, at the steps that all have, thinned for a screen."""
    table = points.pivot_table(index="step", columns="run", values="value", observed=True)
    # After the end of one run the mean would jump to the others' level.
    table = table.dropna() if table.notna().all(axis=1).any() else table.interpolate()
    # Neighbouring points are averaged: a thousand noisy ones hide the curve.
    bins = np.arange(len(table)) * min(_MOST_POINTS, len(table)) // max(1, len(table))
    steps, means = table.index.to_series().groupby(bins).mean(), table.groupby(bins).mean()
    n = means.shape[1]
    se = means.std(axis=1, ddof=1) / np.sqrt(n) if n > 1 else 0.0 * means.sum(axis=1)
    return steps.to_numpy(), means.mean(axis=1).to_numpy(), se.to_numpy()


def _scaled(values: pd.Series) -> tuple[NDArray[np.float64], list[tuple[float, str]]]:
    """Returns heights in [0, 1] and an axis's labels: numbers by size (log over decades), words in turn."""
    numbers = pd.to_numeric(values, errors="coerce")
    if numbers.isna().any() or any(isinstance(value, bool) for value in values):
        words = sorted(set(values.astype(str)))
        places = dict(zip(words, np.linspace(0, 1, len(words)).tolist(), strict=True))
        heights = values.astype(str).map(places).to_numpy(float)
        return heights, [(height, word) for word, height in places.items()]
    raw = numbers.to_numpy(float)
    scaled = np.log(raw) if raw.min() > 0 and raw.max() / raw.min() > 20 else raw
    low, high = scaled.min(), scaled.max()
    heights = (scaled - low) / ((high - low) or 1.0)
    ticks = dict(sorted(zip(heights.tolist(), raw.tolist(), strict=True)))
    if len(ticks) > _MOST_VALUES or min(np.diff(list(ticks)), default=1) < 0.03:
        ticks = {0.0: float(raw.min()), 1.0: float(raw.max())}
    return heights, [(height, f"{value:.4g}") for height, value in ticks.items()]


def _panels(columns: int, width: float, height: float) -> "tuple[Figure, list[Axes]]":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    figure.patch.set_alpha(0)
    panels = list(figure.subplots(1, columns, squeeze=False)[0])
    for axes in panels:
        axes.patch.set_alpha(0)
        axes.grid(alpha=0.22, color=INK, lw=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[:].set_color(INK)
        axes.tick_params(colors=INK, labelsize=8)
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label):
            text.set_color(INK)
        axes.title.set_fontsize(10)
    return figure, panels
