"""Error bars over seeds: means with standard errors, paired differences with intervals, importance of keys."""

import math
import warnings
from collections.abc import Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray
from scipy import stats

_LEVEL, _RESAMPLES = 0.95, 9_999
# Below, a resample of n values has too few distinct ones to tell a tail: see tests/analysis/test_intervals.py.
_LEAST_FOR_RESAMPLING = 10
_BLOCKS = ("data.", "model.", "optimizer.", "training.", "checkpoint.")
# By design these change nothing of what a run learns.
_WITHOUT_EFFECT = ("training.log_every", "training.micro_batch_size", "training.engine")


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


def interval(values: ArrayLike, seed: int = 0) -> Interval:
    """95 % bootstrap interval of the mean, studentised (Efron & Tibshirani 1993, section 12.5).

    From ten values on they are resampled. Of fewer, as seeds usually are, the bootstrap is parametric: resamples
    of a normal distribution, whose studentised mean is Student's t in closed form. (The percentile bootstrap of
    five values covers 82 %, not 95 %.) Raises ValueError where a value is not finite.
    """
    x = _finite(values)
    mean, se, n = summary(x)
    if n == 1:
        return Interval(mean, math.nan, math.nan, 1)
    if n < _LEAST_FOR_RESAMPLING or se == 0:
        low, high = stats.t.ppf([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2], n - 1)
    else:
        drawn = np.random.default_rng(seed).choice(x, (_RESAMPLES, n))
        spread = drawn.std(1, ddof=1) / math.sqrt(n)
        t = (drawn.mean(1) - mean)[spread > 0] / spread[spread > 0]
        low, high = np.quantile(t, [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(mean, float(mean - high * se), float(mean - low * se), n)


def paired_difference(first: ArrayLike, second: ArrayLike, seed: int = 0) -> Interval:
    """Interval of second − first, paired by position. Raises ValueError where a value is not finite."""
    return interval(_finite(second) - _finite(first), seed)


def config_keys(runs: pd.DataFrame) -> list[str]:
    """The columns of a table of runs that are keys of the experiment, the seed last."""
    keys = [str(name) for name in runs if str(name).startswith(_BLOCKS)]
    return [*keys, *(["seed"] if "seed" in runs else [])]


def changed_keys(runs: pd.DataFrame) -> list[str]:
    """Those of config_keys() that differ among the runs and can change a result."""
    # A trial that has not begun has no configuration yet.
    return [key for key in _with_effect(runs) if runs[key].dropna().map(str).nunique() > 1]


def usable(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The finished runs whose metric is a finite number: only these enter a mean or a comparison."""
    if metric not in runs:
        return runs.iloc[:0]
    values = pd.to_numeric(runs[metric], errors="coerce").astype(float)
    return runs[(runs["status"] == "finished") & np.isfinite(values)]


def compare(runs: pd.DataFrame, key: str, metric: str) -> pd.DataFrame:
    """What changing one key does to a metric: a row a pair of its values and a setting of the other keys.

    Pairs are usable runs that agree in everything but the key, the seed included. Columns: first, second (values
    of the key), setting (the others that differ), metric, mean and se of each, difference (second − first), low,
    high, seeds, verdict (lower | higher | not decided | one seed) of the second. Where several settings have
    pairs, a first row takes their mean seed by seed, so that its interval is over seeds as well.
    """
    runs = usable(runs, metric)
    others = [name for name in changed_keys(runs) if name not in (key, "seed")]
    cells = pd.DataFrame(
        {
            "value": runs[key].map(_shown) if key in runs else None,
            "setting": [
                ", ".join(f"{o}={_shown(row[o])}" for o in others) for _, row in runs.iterrows()
            ],
            "seed": runs["seed"],
            "metric": runs[metric].astype(float) if metric in runs else None,
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
                    | _row(found)
                )
    return pd.DataFrame(rows)


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


def _row(pairs: pd.DataFrame) -> dict[str, Any]:
    first, second = summary(pairs["a"]), summary(pairs["b"])
    found = paired_difference(pairs["a"], pairs["b"])
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


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    x = np.atleast_1d(np.asarray(values, np.float64))
    if not len(x) or not np.isfinite(x).all():
        raise ValueError("only finite values have a mean")
    return x
