"""The report's figures: learning curves, the two parts of −ELBO, and what the swept keys do to a metric.

Every function takes the tables of `analysis.runs` and `analysis.curves` and returns a matplotlib Figure, or None
where the runs have nothing to show there.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart also by people who see few colours (Okabe & Ito 2008), on white and on black.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#a08500", "#56b4e9", "#8a5a44", "#7f7f7f")
MOST_GROUPS = len(_COLOURS)
INK = "#1b1f24"
"""Colour of text and axes; the page replaces it by its own, for the dark mode."""
_MOST_POINTS, _MOST_VALUES = 120, 12


def learning_curves(curves: pd.DataFrame, groups: pd.Series) -> "Figure | None":
    """Training and validation loss over the steps: mean of each group's runs, with a band of ± one standard error.

    curves: tidy, as of analysis.curves. groups: the group's name of each run, by run.
    """
    names = list(dict.fromkeys(groups))[:MOST_GROUPS]
    metrics = [name for name in ("train/loss", "val/loss") if (curves["metric"] == name).any()]
    if not metrics:
        return None
    figure, panels = _panels(len(metrics), 5.2, 3.7)
    for axes, metric in zip(panels, metrics, strict=True):
        points = curves[(curves["metric"] == metric) & np.isfinite(curves["value"])]
        points = points.assign(group=points["run"].astype(str).map(groups))
        shown: list[NDArray[np.float64]] = []
        for name, colour in zip(names, _COLOURS, strict=False):
            band = _band(points[points["group"] == name])
            if band.empty:
                continue
            axes.plot(band.index, band["mean"], color=colour, lw=1.6, label=name)
            low, high = band["mean"] - band["se"], band["mean"] + band["se"]
            axes.fill_between(band.index, low, high, color=colour, alpha=0.22, lw=0)
            # The first steps are far off; the scale belongs to what follows.
            shown.append(band["mean"].to_numpy()[len(band) // 12 :])
        if shown:
            _limit(axes, np.concatenate(shown))
        what = "training (batch)" if metric == "train/loss" else "validation"
        axes.set(title=f"loss, {what}", xlabel="step")
    panels[0].set_ylabel("nats per image")
    _legend(figure, panels[-1], len(names))
    return figure


def elbo_parts(runs: pd.DataFrame, groups: pd.Series) -> "Figure | None":
    """−ELBO split into reconstruction and KL (bars, means over a group's runs), and as rate and distortion.

    Right: rate is val/kl, distortion val/recon_loss, both in nats per image, a point a run (Alemi et al. 2018,
    "Fixing a Broken ELBO", section 3).
    """
    parts = ["val/recon_loss", "val/kl"]
    if not set(parts) <= set(runs.columns):
        return None
    finite = runs[np.isfinite(runs[parts].astype(float)).all(axis=1)]
    names = [name for name in dict.fromkeys(groups) if (groups[finite.index] == name).any()]
    names = names[:MOST_GROUPS]
    if not names:
        return None
    figure, (bars, plane) = _panels(2, 5.2, max(2.6, 0.42 * len(names) + 1.6))
    for row, (name, colour) in enumerate(zip(names, _COLOURS, strict=False)):
        members = finite[groups[finite.index] == name]
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
    """A line a run through its values of the keys to its metric; the best are dark and lie on top."""
    keys = [key for key in keys if runs[key].nunique(dropna=True) > 1]
    runs = runs[np.isfinite(runs[metric].astype(float))] if metric in runs else runs.iloc[:0]
    if len(keys) < 2 or len(runs) < 4:
        return None
    import matplotlib

    figure, (axes,) = _panels(1, max(6.0, 1.9 * (len(keys) + 1)), 3.6)
    columns = [_scaled(runs[key]) for key in keys] + [_scaled(runs[metric])]
    rank = runs[metric].astype(float).rank(pct=True).to_numpy()
    colours = matplotlib.colormaps["viridis"]
    for position in np.argsort(-rank):
        heights = [places[position] for places, _ in columns]
        axes.plot(
            range(len(columns)), heights, color=colours(0.9 * rank[position]), lw=1.4, alpha=0.85
        )
    for place, (_, ticks) in enumerate(columns):
        axes.axvline(place, color=INK, lw=0.8, alpha=0.5)
        for height, text in ticks:
            axes.text(place + 0.03, height + 0.012, text, fontsize=8, color=INK, va="bottom")
    axes.set(xticks=range(len(columns)), yticks=[], xlim=(-0.2, len(columns) - 0.6))
    axes.set_xticklabels([*keys, metric], fontsize=9)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    return figure


def importance_bars(importance: pd.Series) -> "Figure | None":
    """Share of the metric's variation that each key explains (analysis.intervals.importance)."""
    if importance.empty or not np.isfinite(importance.astype(float)).all():
        return None
    figure, (axes,) = _panels(1, 6.0, 0.36 * len(importance) + 1.1)
    ordered = importance.astype(float).sort_values()
    axes.barh(ordered.index.astype(str), ordered.to_numpy(), color=_COLOURS[0], height=0.62)
    for row, share in enumerate(ordered):
        axes.text(
            share, row, f" {share:.0%}".replace("%", " %"), va="center", fontsize=8, color=INK
        )
    axes.set(xlim=(0, 1.12), xlabel="share of the variation explained")
    return figure


def _band(points: pd.DataFrame) -> pd.DataFrame:
    """Mean and standard error over the runs at every step that all have, thinned to what a screen shows."""
    if points.empty:
        return pd.DataFrame()
    table = points.pivot_table(index="step", columns="run", values="value", observed=True)
    # Where a run ended early the mean would jump to the others' level.
    table = table.dropna() if table.notna().all(axis=1).any() else table.interpolate()
    # Neighbouring points are averaged: a thousand noisy ones hide the curve.
    part: NDArray[np.int64] = (
        np.arange(len(table)) * min(_MOST_POINTS, len(table)) // max(1, len(table))
    )
    steps = table.index.to_series().groupby(part).mean()
    table = table.groupby(part).mean().set_axis(steps, axis=0)
    se = table.std(axis=1, ddof=1) / np.sqrt(table.shape[1]) if table.shape[1] > 1 else 0.0
    return pd.DataFrame({"mean": table.mean(axis=1), "se": se})


def _scaled(values: pd.Series) -> tuple[NDArray[np.float64], list[tuple[float, str]]]:
    """Heights in [0, 1], and the labels of an axis: numbers by size (logarithmic over decades), words in turn."""
    numbers = pd.to_numeric(values, errors="coerce")
    distinct: list[Any] = sorted(dict.fromkeys(values.astype(str)))
    if numbers.isna().any() or any(isinstance(value, bool) for value in values):
        places = {text: i / max(1, len(distinct) - 1) for i, text in enumerate(distinct)}
        heights = values.astype(str).map(places).to_numpy(float)
        return heights, [(height, text) for text, height in places.items()]
    raw = numbers.to_numpy(float)
    wide = raw.min() > 0 and raw.max() / raw.min() > 20
    scaled = np.log(raw) if wide else raw
    low, high = scaled.min(), scaled.max()
    heights = (scaled - low) / ((high - low) or 1.0)
    few = dict(sorted(zip(heights.tolist(), raw.tolist(), strict=True)))
    if len(few) > _MOST_VALUES or min(np.diff(list(few)), default=1) < 0.03:
        few = {0.0: float(raw.min()), 1.0: float(raw.max())}
    return heights, [(height, f"{value:.4g}") for height, value in few.items()]


def _limit(axes: "Axes", values: NDArray[np.float64]) -> None:
    low, high = np.nanmin(values), np.nanmax(values)
    space = 0.06 * (high - low) or 1.0
    axes.set_ylim(low - space, high + space)


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


def _legend(figure: "Figure", axes: "Axes", entries: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    if entries > 1 and handles:
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(4, entries),
            frameon=False,
            fontsize=8,
            labelcolor=INK,
        )
