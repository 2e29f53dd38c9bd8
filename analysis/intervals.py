"""Statistics over seeds: standard errors, intervals of paired differences, importance of keys."""

import math
import warnings
from collections.abc import Callable
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from cvae.errors import UserError, did_you_mean

_LEVEL, _RESAMPLES = 0.95, 9_999
# A resample of fewer values has too few distinct ones to estimate a tail: tests/analysis/test_intervals.py.
_LEAST_FOR_RESAMPLING = 10
_BLOCKS = ("data.", "model.", "optimizer.", "training.", "checkpoint.")
MEANING = ("model.likelihood", "model.beta", "data.name", "data.image_size", "data.val")
"""Losses of runs that differ in one of these keys are different quantities."""
# These keys change nothing in what a run learns.
_WITHOUT_EFFECT = (
    "training.log_every", "training.micro_batch_size", "training.engine", "training.deepspeed.", "checkpoint.",
)  # fmt: skip
# Null without captions: the condition determines that, so it is no difference of its own.
_FOLLOWS = ("data.text_encoder",)
_COMPARED = (
    "first", "second", "setting", "metric", "first mean", "first se", "second mean", "second se", "difference",
    "low", "high", "seeds", "verdict", "settings",
)  # fmt: skip


class Summary(NamedTuple):
    mean: float
    se: float
    """Standard error of the mean; NaN for a single value."""
    n: int


class Interval(NamedTuple):
    mean: float
    low: float
    high: float
    """Both bounds are NaN for a single value."""
    n: int

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def summary(values: ArrayLike) -> Summary:
    """Returns mean, standard error and number. Raises ValueError if a value is not finite."""
    x = _finite(values)
    se = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan
    return Summary(float(x.mean()), se, len(x))


def interval(values: ArrayLike, seed: int = 0, level: float = _LEVEL) -> Interval:
    """Returns a studentised bootstrap interval of the mean (Efron & Tibshirani 1993, section 12.5).

    Ten values or more are resampled. With fewer, as with most numbers of seeds, the bootstrap is parametric:
    resamples of a normal distribution, whose studentised mean follows Student's t in closed form. (The percentile
    bootstrap of five values covers 82 %, not 95 %.) Raises ValueError if a value is not finite.
    """
    x = _finite(values)
    mean, se, n = summary(x)
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    tails = [(1 - level) / 2, (1 + level) / 2]
    if n < _LEAST_FOR_RESAMPLING or se == 0:
        low, high = stats.t.ppf(tails, n - 1)
    else:
        resamples = np.random.default_rng(seed).choice(x, (_RESAMPLES, n))
        spread = resamples.std(1, ddof=1) / math.sqrt(n)
        t = (resamples.mean(1) - mean)[spread > 0] / spread[spread > 0]
        low, high = np.quantile(t, tails)
    return Interval(mean, float(mean - high * se), float(mean - low * se), n)


def paired_difference(
    first: ArrayLike, second: ArrayLike, seed: int = 0, level: float = _LEVEL
) -> Interval:
    """Returns the interval of second − first, paired by position. Raises ValueError if a value is not finite."""
    return interval(_finite(second) - _finite(first), seed, level)


def config_keys(runs: pd.DataFrame) -> list[str]:
    """Returns the columns of a table of runs that are keys of the experiment, the seed last."""
    keys = [str(name) for name in runs if str(name).startswith(_BLOCKS)]
    return [*keys, *(["seed"] if "seed" in runs else [])]


def changed_keys(runs: pd.DataFrame) -> list[str]:
    """Returns the keys of the experiment that differ among the runs and can change a result."""
    keys = [key for key in config_keys(runs) if not key.startswith(_WITHOUT_EFFECT)]
    # A trial that has not begun has no configuration yet. In all other runs null is a value.
    begun = runs[runs[keys].notna().any(axis=1)]
    several = [key for key in keys if begun[key].nunique(dropna=key in _FOLLOWS) > 1]
    return [key for key in several if begun[key].map(_exact).nunique() > 1]


def usable(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Returns the finished runs whose metric is finite: only these enter a mean or a comparison."""
    if metric not in runs:
        return runs.iloc[:0]
    values = pd.to_numeric(runs[metric], errors="coerce").astype(float)
    return runs[(runs["status"] == "finished") & np.isfinite(values)]


def compare(runs: pd.DataFrame, key: str, metric: str, level: float = _LEVEL) -> pd.DataFrame:
    """Returns what changing one key does to a metric: a row per pair of its values and setting of the other keys.

    Pairs are usable runs that agree in everything but the key, the seed included. Columns: first, second (values
    of the key), setting (the other keys that differ), metric, mean and se of each, difference (second − first),
    low, high, seeds, verdict on the second (lower | higher | not decided | one seed), settings (how many the row
    averages). If several settings have pairs, a first row averages them seed by seed, so that its interval is
    over seeds, too.

    Raises UserError, with the nearest name, if no run has the key or the metric.
    """
    if key not in runs:
        near = did_you_mean(key, config_keys(runs))
        raise UserError(f"{key}: no key of these runs' experiments{near}")
    if metric not in runs:
        metrics = [name for name in map(str, runs) if "/" in name]
        near = did_you_mean(metric, metrics) or f"; they have {', '.join(metrics) or 'none'}"
        raise UserError(f"{metric}: no run here has such a metric{near}")
    runs = usable(runs, metric)
    others = [name for name in changed_keys(runs) if name not in (key, "seed")]
    texts = {name: runs[name].map(_formatter(runs[name])) for name in [key, *others]}
    settings = [
        ", ".join(f"{name}={texts[name].iloc[row]}" for name in others) for row in range(len(runs))
    ]
    cells = pd.DataFrame({"value": texts[key], "setting": settings, "seed": runs["seed"]})
    cells["metric"] = runs[metric].astype(float)
    rows = []
    for first, second in combinations(dict.fromkeys(cells["value"]), 2):
        a, b = (
            cells[cells["value"] == value].groupby(["setting", "seed"])["metric"].mean()
            for value in (first, second)
        )
        pairs = pd.DataFrame({"a": a, "b": b}).dropna()
        by_setting = {str(name): rows for name, rows in pairs.groupby(level="setting", sort=False)}
        n = len(by_setting)
        entries = [(1, setting, chosen) for setting, chosen in by_setting.items()]
        if n > 1:
            # Only the seeds that every setting has: a mean over others would compare settings.
            shared = pairs.groupby(level="seed")["a"].transform("size") == n
            mean = (n, f"mean over {n} settings", pairs[shared].groupby(level="seed").mean())
            repeated = pairs.groupby(level="setting").size().max() > 1
            entries = [mean, *(entries if repeated else [])]
        values = {"first": first, "second": second, "metric": metric}
        rows += [
            values | {"setting": setting, "settings": n_settings} | _difference(chosen, level)
            for n_settings, setting, chosen in entries
            if len(chosen)
        ]
    return pd.DataFrame(rows, columns=list(_COMPARED))


def importance(runs: pd.DataFrame, metric: str) -> pd.Series:
    """Returns the share of the metric's variation that each changed key explains, most important first.

    The method is functional ANOVA (Hutter et al. 2014). The result is empty if fewer than four runs are usable or
    fewer than two keys differ.
    """
    runs = usable(runs, metric)
    keys = changed_keys(runs)
    if len(runs) < 4 or len(keys) < 2 or runs[metric].nunique() < 2:
        return pd.Series(dtype=float)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    params, spaces = {}, {}
    for key in keys:
        if all(map(_is_number, runs[key])):
            params[key] = runs[key].astype(float)
            low, high = params[key].min(), params[key].max()
            log = low > 0 and high / low > 20
            spaces[key] = optuna.distributions.FloatDistribution(low, high, log=log)
        else:
            params[key] = runs[key].map(str)
            spaces[key] = optuna.distributions.CategoricalDistribution(sorted(set(params[key])))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study()
        for row, value in enumerate(runs[metric].astype(float)):
            chosen = {key: params[key].iloc[row] for key in keys}
            trial = optuna.trial.create_trial(params=chosen, distributions=spaces, value=value)
            study.add_trial(trial)
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        shares = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return pd.Series(shares, dtype=float)


def _difference(pairs: pd.DataFrame, level: float) -> dict[str, Any]:
    """Returns the columns of compare() from "first mean" to "verdict"."""
    first, second = summary(pairs["a"]), summary(pairs["b"])
    difference = paired_difference(pairs["a"], pairs["b"], level=level)
    verdict = "one seed" if difference.n == 1 else "not decided"
    if difference.decided:
        verdict = "lower" if difference.mean < 0 else "higher"
    values = (first.mean, first.se, second.mean, second.se, *difference, verdict)
    return dict(zip(_COMPARED[4:-1], values, strict=True))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


def _formatter(values: pd.Series) -> Callable[[Any], str]:
    """Returns how the values of a key are written: with four digits, unless that makes two of them look alike."""
    return _short if values.map(_short).nunique() == values.map(_exact).nunique() else _exact


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _exact(value: Any) -> str:
    """Returns a text that differs for any two values; the numbers 1 and 1.0 are the same."""
    if pd.isna(value):
        return "null"
    return repr(float(value)) if _is_number(value) else str(value)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    x = np.atleast_1d(np.asarray(values, np.float64))
    if not len(x) or not np.isfinite(x).all():
        raise ValueError("only finite values have a mean")
    return x
