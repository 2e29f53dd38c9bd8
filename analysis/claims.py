"""The paper's claims, each tested on the runs at hand: effect, interval, verdict.

Runs are compared if they agree in everything but what the claim is about, paired by seed (analysis.intervals).

No difference is ever exactly zero, so "no better" is judged by a margin, with the two one-sided tests of
Schuirmann 1987 at 95 %. It is supported if a bound excludes that the system is better by more than MARGIN (it is
equivalent, or worse), contradicted if the other bound says that it is better by more, and else not decided.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.intervals import (
    MEANING,
    Interval,
    changed_keys,
    compare,
    interval,
    paired_difference,
    usable,
)

NOT_TESTED, NOT_COMPARABLE = "not tested", "not comparable"
MARGIN = 5.0
"""A smaller difference of val/loss, in nats per image, counts as none."""
_ONE_SIDED = 0.90
"""Each bound of a two-sided interval of this level is that of a one-sided test at 95 %."""
_LOSS = "val/loss"
# data_digest covers the files that these keys choose.
_STORE = ("data.name", "data.image_size", "data.train", "data.val", "data.text_encoder")
_SETTING = {
    "data.name": "{}", "data.image_size": "{} pixels", "train_images": "{} training images",
    "model.backbone": "{}", "model.latent_dim": "latent_dim {}", "training.epochs": "{} epochs",
}  # fmt: skip
_COLUMNS = (
    "claim", "where", "verdict", "metric", "effect", "low", "high", "seeds", "setting", "why",
)  # fmt: skip


class Evidence(NamedTuple):
    """The effect that a claim is about, as measured."""

    effect: Interval
    bounds: Interval
    """The same effect, with one-sided bounds of 95 %."""
    metric: str
    runs: pd.DataFrame
    """The runs that enter."""
    why: str


class Mismatch(NamedTuple):
    """The runs that a claim is about cannot be compared, because they also differ in these keys."""

    keys: list[str]


Result = Evidence | Mismatch | None
"""None if no runs are about the claim."""


class Claim(NamedTuple):
    claim: str
    where: str
    """In the paper, as far as it is known here."""
    supported_by: str
    """lower | higher: the sign of an effect that supports it."""
    measure: Callable[[pd.DataFrame], Result]
    data: str
    """The paper's."""
    command: str
    """Makes runs that test it; "" if it takes more than a command."""
    then: str = ""
    """What else that takes."""
    margin: float | None = None
    """For a claim that one system is no better than another."""


def judge(runs: pd.DataFrame) -> pd.DataFrame:
    """Returns a row per claim.

    Columns: claim, where, verdict (supported | contradicted | not decided | one seed | not comparable | not
    tested), metric, effect with its 95 % interval (low, high), seeds, setting (of these runs, and the paper's),
    why.
    """
    rows = [
        {"claim": claim.claim, "where": claim.where} | judge_one(claim, runs) for claim in CLAIMS
    ]
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def judge_one(claim: Claim, runs: pd.DataFrame) -> dict[str, Any]:
    """Returns the other columns of a claim's row; those that have no value are left out."""
    result = claim.measure(runs) if len(runs) else None
    if result is None:
        needs = ", then ".join(filter(None, (claim.command, claim.then)))
        return {"verdict": NOT_TESTED, "why": f"needs other runs: {needs}"}
    if isinstance(result, Mismatch):
        keys = ", ".join(result.keys)
        why = f"these runs differ in {keys}, too: choose alike ones with --runs"
        return {"verdict": NOT_COMPARABLE, "why": why}
    effect, why = result.effect, result.why
    verdict = "one seed" if effect.n == 1 else "not decided"
    if claim.margin is not None and effect.n > 1:
        verdict, reason = no_better(result.bounds, claim.margin)
        why = f"{reason}; {why}"
    elif effect.decided:
        sign = "lower" if effect.mean < 0 else "higher"
        verdict = "supported" if sign == claim.supported_by else "contradicted"
    numbers = dict(zip(("effect", "low", "high", "seeds"), effect, strict=True))
    setting = _setting(result.runs, claim.data)
    return {"verdict": verdict, "metric": result.metric, **numbers, "setting": setting, "why": why}


def no_better(bounds: Interval, margin: float) -> tuple[str, str]:
    """Returns the verdict on "no better" by one-sided bounds of a difference of losses, and its reason."""
    reason = (
        f"one-sided 95 % bounds {bounds.low:.3g} and {bounds.high:.3g}, margin ±{margin:g} nats"
    )
    if bounds.low > -margin:
        kind = "equivalent" if bounds.high < margin else "not better by the margin"
        return "supported", f"{kind}: {reason}"
    if bounds.high < -margin:
        return "contradicted", f"better by more than the margin: {reason}"
    return "not decided", reason


def _setting(runs: pd.DataFrame, published: str) -> str:
    """Returns what the runs trained on and for how long, and what the paper did."""
    parts = []
    for key, text in _SETTING.items():
        values = sorted({_number(value) for value in runs[key].dropna()}) if key in runs else []
        if values:
            parts.append(text.format(" and ".join(values)))
    steps = runs["step"].dropna()
    if len(steps):
        parts.append(f"{int(steps.min()):,} steps" + ("" if steps.nunique() == 1 else " or more"))
    return f"{', '.join(parts)} (the paper: {published})"


def _number(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, (int, float, np.number)) else str(value)


def _select(runs: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """Returns the runs whose keys (model_backbone for model.backbone) have these values."""
    for name, value in values.items():
        key = name.replace("_", ".", 1)
        if key not in runs:
            return runs.iloc[:0]
        runs = runs[runs[key].isin(value if isinstance(value, list) else [value])]
    return runs


def _of_key(
    runs: pd.DataFrame,
    key: str,
    first: str,
    second: str,
    metric: str = _LOSS,
    note: str = "",
    **of: str,
) -> Result:
    """Measures second − first of a key, over the seeds of the mean over all settings of the model that both have.

    of: values of keys, as of _select, that choose the runs. note: comes first in the reason.
    """
    runs = _select(runs, **of, **{key.replace(".", "_", 1): [first, second]})
    runs = usable(runs, metric)
    if runs.empty or runs[key].nunique() < 2:
        return None
    runs = _without_inert(runs, key)
    mismatch = Mismatch(_differing(runs, key) or ["seed"])
    results: list[Evidence | Mismatch] = []
    for _, alike in runs.groupby([name for name in MEANING if name in runs], dropna=False):
        if alike[key].nunique() < 2:
            continue
        # Settings of the model are a design, whose mean is an effect; no other key may differ.
        differing = _differing(alike, key)
        foreign = [name for name in differing if not name.startswith("model.")]
        rows = compare(alike, key, metric)
        if foreign or not (len(rows) == 1 or (len(rows) and rows["settings"].iloc[0] > 1)):
            results.append(Mismatch(foreign or differing or ["seed"]))
            continue
        sign = 1 if rows["first"].iloc[0] == first else -1
        effects = "; ".join(
            f"{setting or 'alone'}: {sign * difference:+.3g}"
            for setting, difference in zip(rows["setting"], rows["difference"], strict=True)
        )
        why = f"{note}{metric} of {second} minus that of {first}; {effects}"
        bounds = _signed(compare(alike, key, metric, _ONE_SIDED), sign)
        results.append(Evidence(_signed(rows, sign), bounds, metric, alike, why))
    evidence = [result for result in results if isinstance(result, Evidence)]
    return max(evidence, key=lambda one: one.effect.n) if evidence else [*results, mismatch][0]


def _signed(rows: pd.DataFrame, sign: int) -> Interval:
    """Returns the first row's difference, times sign."""
    row = rows.iloc[0]
    low, high = sorted((sign * float(row["low"]), sign * float(row["high"])))
    return Interval(sign * float(row["difference"]), low, high, int(row["seeds"]))


def _of_systems(
    first: pd.DataFrame, second: pd.DataFrame, free: Callable[[str], bool], why: str
) -> Result:
    """Measures second − first of val/loss of two systems, each of one setting, that differ only in free keys."""
    if first.empty or second.empty:
        return None
    sides = [_without_inert(first), _without_inert(second)]
    both = pd.concat(sides)
    keys = [key for key in _differing(both) if not free(key)]
    keys += [key for side in sides for key in _differing(side)]
    if keys:
        return Mismatch(list(dict.fromkeys(keys)))
    means = [side.groupby("seed")[_LOSS].mean().astype(float) for side in sides]
    pairs = pd.concat(means, axis=1, keys=["first", "second"]).dropna()
    if pairs.empty:
        return Mismatch(["seed"])
    values = pairs["first"], pairs["second"]
    bounds = paired_difference(*values, level=_ONE_SIDED)
    return Evidence(paired_difference(*values), bounds, _LOSS, both, why)


def _differing(runs: pd.DataFrame, key: str = "") -> list[str]:
    """Returns what differs among the runs besides the seed and `key`, and so forbids a mean of them."""
    differing = [name for name in changed_keys(runs) if name not in (key, "seed")]
    store = [name for name in _STORE if name in runs]
    if (
        "data_digest" in runs
        and store
        and (runs.groupby(store, dropna=False)["data_digest"].nunique() > 1).any()
    ):
        differing.append("data_digest (the data were prepared anew)")
    return differing


def _without_inert(runs: pd.DataFrame, key: str = "") -> pd.DataFrame:
    """Returns the runs without the options of backbones that they do not use.

    If backbones are compared, each brings its own options, which are no second difference.
    """
    runs = runs.copy()
    for name in [name for name in runs if _is_option(str(name))]:
        own = runs["model.backbone"] == str(name).split(".")[1]
        if key == "model.backbone" and runs[name][own].map(str).nunique() <= 1:
            runs = runs.drop(columns=name)
        else:
            runs[name] = runs[name].astype(object).where(own, None)
    return runs


def _is_option(key: str) -> bool:
    """Whether a key is an option of one backbone, like model.conv.width."""
    return key.startswith("model.") and key.count(".") == 2


def _small_ldm(runs: pd.DataFrame) -> Result:
    """Compares the LDM on 5 % of the data with the baseline on 30 %; latent and data differ as published."""
    published = ("model.backbone", "model.latent", "model.latent_dim", "data.fraction")
    runs = _select(runs, data_name="coco", model_condition="text", model_fusion="concat")
    runs = usable(runs, _LOSS)
    return _of_systems(
        _select(runs, model_backbone="conv", data_fraction=0.3),
        _select(runs, model_backbone="ldm", data_fraction=0.05),
        lambda key: key in published or _is_option(key),
        "val/loss of ldm (5 % of the data) minus that of conv (30 %)",
    )


def _more_data(runs: pd.DataFrame) -> Result:
    runs = usable(_select(runs, model_condition="text", model_backbone="ldm"), _LOSS)
    if runs.empty or runs["data.fraction"].nunique() < 2:
        return None
    least, most = runs["data.fraction"].min(), runs["data.fraction"].max()
    return _of_systems(
        _select(runs, data_fraction=least),
        _select(runs, data_fraction=most),
        lambda key: key == "data.fraction",
        f"val/loss with data.fraction {most:g} minus that with {least:g}",
    )


def _samples_match(runs: pd.DataFrame) -> Result:
    metric, real, chance = "eval/sample_accuracy", "eval/classifier_real_accuracy", 0.1
    runs = usable(_select(runs, data_name="fashion_mnist", model_condition="label"), metric)
    if runs.empty:
        return None
    if keys := _differing(_without_inert(runs)):
        return Mismatch(keys)
    # Repetitions of a seed are one value.
    accuracy = runs[metric].astype(float).groupby(runs["seed"]).mean()
    why = (
        f"share of samples that a classifier takes for the class they were drawn for, less chance ({chance:.0%});"
        f" {accuracy.mean():.1%} of samples, {runs[real].astype(float).mean():.1%} of real images"
    ).replace("%", " %")
    bounds = interval(accuracy - chance, level=_ONE_SIDED)
    return Evidence(interval(accuracy - chance), bounds, metric, runs, why)


_SWEEP = "python workflows/sweep.py configs/sweeps"
_EVALUATE = "workflows/evaluate.py on its runs"
_COCO = "COCO 64 pixels, 30 % of train2017, 20 epochs, one run each, judged by eye"
CLAIMS = (
    Claim(
        "The CVAE mixes the classes in its latent space more than the plain VAE.", "Figure 3", "lower",
        partial(
            _of_key, key="model.condition", first="none", second="label", metric="eval/linear_probe",
            note="a linear probe reads the class from μ; less is more mixed. ", data_name="fashion_mnist",
        ),
        "FashionMNIST, 50 epochs, one run each", f"{_SWEEP}/fashion_mnist.yaml", _EVALUATE,
    ),
    Claim(
        "Concatenating the text beats adding it.", "the fusion ablation", "lower",
        partial(_of_key, key="model.fusion", first="add", second="concat", model_condition="text"),
        _COCO, f"{_SWEEP}/ablation.yaml",
    ),
    Claim(
        "A ResNet is no better than the convolutional baseline at the same data and epochs.",
        "the ResNet experiment", "higher",
        partial(_of_key, key="model.backbone", first="conv", second="resnet", model_condition="text"),
        _COCO, f"{_SWEEP}/ablation.yaml", margin=MARGIN,
    ),
    Claim(
        "The LDM autoencoder on 5 % of the data is no better than the baseline.",
        "the LDM experiment", "higher", _small_ldm, "COCO 64 pixels, 5 % beside 30 %, one run each",
        "", "configs/coco_ldm_5pct.yaml and configs/coco_baseline.yaml with some seeds", MARGIN,
    ),
    Claim(
        "The LDM autoencoder improves with all of the data (conjecture).", "outlook", "lower", _more_data,
        "not run", f"{_SWEEP}/data_fraction.yaml",
    ),
    Claim(
        "FashionMNIST samples match the label they were drawn for.", "Figures 4 and 5", "higher",
        _samples_match, "FashionMNIST, 50 epochs, judged by eye", f"{_SWEEP}/fashion_mnist.yaml", _EVALUATE,
    ),
)  # fmt: skip
