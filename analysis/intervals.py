"""Error bars over seeds: means with standard errors, paired differences with intervals, importance of keys."""

import math
import warnings
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from cvae.errors import UserError, did_you_mean

_LEVEL, _RESAMPLES = 0.95, 9_999
# Below, a resample of n values has too few distinct ones to tell a tail: see tests/analysis/test_intervals.py.
_LEAST_FOR_RESAMPLING = 10
_BLOCKS = ("data.", "model.", "optimizer.", "training.", "checkpoint.")
# By design these change nothing of what a run learns.
_WITHOUT_EFFECT = ("training.log_every", "training.micro_batch_size", "training.engine")
# Null without captions: that follows from the condition and is no difference of its own.
_FOLLOWS = ("data.text_encoder",)
_COMPARED = (
    "first", "second", "setting", "metric", "first mean", "first se", "second mean", "second se", "difference",
    "low", "high", "seeds", "verdict",
)  # fmt: skip


class Summary(NamedTuple):
    mean: float
    se: float
    """Standard error of the mean; NaN of a single value."""
    n: int


class Interval(NamedTuple):
    mean: float
    low: float
    high: float
    """NaN where there is only one difference: no interval is made up."""
    n: int

    @property
    def decided(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def summary(values: ArrayLike) -> Summary:
    """Raises ValueError where a value is not finite."""
    x = _finite(values)
    se = float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan
    return Summary(float(x.mean()), se, len(x))


def interval(values: ArrayLike, seed: int = 0, level: float = _LEVEL) -> Interval:
    """Returns a bootstrap interval of the mean, studentised (Efron & Tibshirani 1993, section 12.5).

    From ten values on they are resampled. Of fewer, as seeds usually are, the bootstrap is parametric: resamples
    of a normal distribution, whose studentised mean is Student's t in closed form. (The percentile bootstrap of
    five values covers 82 %, not 95 %.) Raises ValueError where a value is not finite.
    """
    x = _finite(values)
    mean, se, n = summary(x)
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    tails = [(1 - level) / 2, (1 + level) / 2]
    if n < _LEAST_FOR_RESAMPLING or se == 0:
        low, high = stats.t.ppf(tails, n - 1)
    else:
        drawn = np.random.default_rng(seed).choice(x, (_RESAMPLES, n))
        spread = drawn.std(1, ddof=1) / math.sqrt(n)
        t = (drawn.mean(1) - mean)[spread > 0] / spread[spread > 0]
        low, high = np.quantile(t, tails)
    return Interval(mean, float(mean - high * se), float(mean - low * se), n)


def paired_difference(
    first: ArrayLike, second: ArrayLike, seed: int = 0, level: float = _LEVEL
) -> Interval:
    """Returns the interval of second − first, paired by position. Raises ValueError if a value is not finite."""
    return interval(_finite(second) - _finite(first), seed, level)


def config_keys(runs: pd.DataFrame) -> list[str]:
    """The columns of a table of runs that are keys of the experiment, the seed last."""
    keys = [str(name) for name in runs if str(name).startswith(_BLOCKS)]
    return [*keys, *(["seed"] if "seed" in runs else [])]


def changed_keys(runs: pd.DataFrame) -> list[str]:
    """Those of config_keys() that differ among the runs and can change a result."""
    keys = _with_effect(runs)
    # A trial that has not begun has no configuration yet. In all others null is a value like any other.
    begun = runs[runs[keys].notna().any(axis=1)]
    several = [key for key in keys if begun[key].nunique(dropna=key in _FOLLOWS) > 1]
    return [key for key in several if begun[key].map(_label).nunique() > 1]


def usable(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The finished runs whose metric is a finite number: only these enter a mean or a comparison."""
    if metric not in runs:
        return runs.iloc[:0]
    values = pd.to_numeric(runs[metric], errors="coerce").astype(float)
    return runs[(runs["status"] == "finished") & np.isfinite(values)]


def compare(runs: pd.DataFrame, key: str, metric: str, level: float = _LEVEL) -> pd.DataFrame:
    """What changing one key does to a metric: a row a pair of its values and a setting of the other keys.

    Pairs are usable runs that agree in everything but the key, the seed included. Columns: first, second (values
    of the key), setting (the others that differ), metric, mean and se of each, difference (second − first), low,
    high, seeds, verdict (lower | higher | not decided | one seed) of the second. If several settings have
    pairs, a first row takes their mean seed by seed, so that its interval is over seeds as well.

    Raises UserError, with the nearest name, for a key or a metric that no run has.
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
    told = {name: _told(runs, name) for name in others}
    cells = pd.DataFrame(
        {
            "value": runs[key].map(_told(runs, key)),
            "setting": [
                ", ".join(f"{name}={told[name](row[name])}" for name in others)
                for _, row in runs.iterrows()
            ],
            "seed": runs["seed"],
            "metric": runs[metric].astype(float),
        }
    )
    rows = []
    for first, second in combinations(dict.fromkeys(cells["value"]), 2):
        a, b = (
            cells[cells["value"] == value].groupby(["setting", "seed"])["metric"].mean()
            for value in (first, second)
        )
        pairs = pd.DataFrame({"a": a, "b": b}).dropna()
        settings = {str(name): found for name, found in pairs.groupby(level="setting", sort=False)}
        if len(settings) > 1:
            # Only the seeds that every setting has: a mean over others would compare settings.
            have = pairs.groupby(level="seed")["a"].transform("size") == len(settings)
            mean = {f"mean over {len(settings)} settings": pairs[have].groupby(level="seed").mean()}
            repeated = pairs.groupby(level="setting").size().max() > 1
            settings = mean | settings if repeated else mean
        for setting, found in settings.items():
            if len(found):
                rows.append(
                    {"first": first, "second": second, "setting": setting, "metric": metric}
                    | _row(found, level)
                )
    return pd.DataFrame(rows, columns=list(_COMPARED))


def importance(runs: pd.DataFrame, metric: str) -> pd.Series:
    """Share of the metric's variation that each changed key explains, by functional ANOVA (Hutter et al. 2014).

    Empty where fewer than four runs are usable, or fewer than two keys differ.
    """
    runs = usable(runs, metric)
    keys = changed_keys(runs)
    if len(runs) < 4 or len(keys) < 2 or runs[metric].nunique() < 2:
        return pd.Series(dtype=float)
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    spaces = {key: _distribution(runs[key]) for key in keys}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        study = optuna.create_study()
        for _, row in runs.iterrows():
            told = {key: _plain(row[key], spaces[key]) for key in keys}
            study.add_trial(
                optuna.trial.create_trial(
                    params=told, distributions=spaces, value=float(row[metric])
                )
            )
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return pd.Series(found, dtype=float)


def _row(pairs: pd.DataFrame, level: float) -> dict[str, Any]:
    first, second = summary(pairs["a"]), summary(pairs["b"])
    found = paired_difference(pairs["a"], pairs["b"], level=level)
    verdict = "one seed" if found.n == 1 else "not decided"
    if found.decided:
        verdict = "lower" if found.mean < 0 else "higher"
    return {
        "first mean": first.mean,
        "first se": first.se,
        "second mean": second.mean,
        "second se": second.se,
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "seeds": found.n,
        "verdict": verdict,
    }


def _with_effect(runs: pd.DataFrame) -> list[str]:
    return [
        key
        for key in config_keys(runs)
        if not key.startswith(("checkpoint.", "training.deepspeed.")) and key not in _WITHOUT_EFFECT
    ]


def _distribution(values: pd.Series) -> Any:
    import optuna

    if _numeric(values):
        low, high = float(values.min()), float(values.max())
        return optuna.distributions.FloatDistribution(low, high, log=low > 0 and high / low > 20)
    return optuna.distributions.CategoricalDistribution(sorted({str(value) for value in values}))


def _plain(value: Any, space: Any) -> Any:
    return str(value) if hasattr(space, "choices") else float(value)


def _numeric(values: Sequence[Any] | pd.Series) -> bool:
    return all(isinstance(x, (int, float, np.number)) and not isinstance(x, bool) for x in values)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _told(runs: pd.DataFrame, key: str) -> Callable[[Any], str]:
    """How the values of a key are written: short, if that tells them apart."""
    values = runs[key]
    short = values.map(_shown).nunique() == values.map(_label).nunique()
    return _shown if short else _label


def _label(value: Any) -> str:
    """The value as text that tells any two apart; of numbers, 1 and 1.0 are the same."""
    if pd.isna(value):
        return "null"
    is_number = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    return repr(float(value)) if is_number else str(value)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    x = np.atleast_1d(np.asarray(values, np.float64))
    if not len(x) or not np.isfinite(x).all():
        raise ValueError("only finite values have a mean")
    return x
