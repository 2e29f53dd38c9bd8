"""The paper's claims, each put to the test by the runs at hand: effect, interval, verdict.

Values are compared between runs that agree in everything else, paired by seed (analysis.intervals). Runs that
differ in more than the claim is about are not compared, and the keys are named.

No difference is ever exactly zero, so "no better" is judged by a margin, with the two one-sided tests of
Schuirmann 1987 at 95 %. It is supported if a bound excludes that the system is better by more than MARGIN (it is
equivalent, or worse), contradicted if the other bound says that it is better by more, and else not decided.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.intervals import Interval, changed_keys, compare, interval, paired_difference, usable
from analysis.report_data import MEANING

NOT_TESTED, NOT_COMPARABLE = "not tested", "not comparable"
MARGIN = 5.0
"""Nats per image of val/loss: a smaller difference is none."""
_ONE_SIDED = 0.90
"""The two-sided interval whose bounds are each of a one-sided test at 95 %."""
# What a run reads; data_digest is of these files.
_STORE = ("data.name", "data.image_size", "data.train", "data.val", "data.text_encoder")
_SWEEP = "python workflows/sweep.py configs/sweeps"
_COLUMNS = (
    "claim", "where", "verdict", "metric", "effect", "low", "high", "seeds", "setting", "why",
)  # fmt: skip


class Found(NamedTuple):
    """What the runs say about one claim."""

    effect: Interval
    bounds: Interval
    """The same effect, with one-sided bounds of 95 %."""
    metric: str
    runs: pd.DataFrame
    """Those that enter."""
    why: str


class Refused(NamedTuple):
    """The runs that a claim is about cannot be compared: they differ in these keys, too."""

    keys: list[str]


class Claim(NamedTuple):
    claim: str
    where: str
    """In the paper, as far as it is known here."""
    supported_by: str
    """lower | higher: the sign of an effect that supports it."""
    find: Callable[[pd.DataFrame], Found | Refused | None]
    data: str
    """What the paper used."""
    needs: str
    """The command that makes runs to test it."""
    margin: float | None = None
    """Of a claim that one system is no better than another."""


def judge(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a claim.

    Columns: claim, where, verdict (supported | contradicted | not decided | one seed | not comparable | not
    tested), metric, effect with its 95 % interval (low, high), seeds, setting (of these runs, and the paper's),
    why.
    """
    return pd.DataFrame([_row(claim, runs) for claim in CLAIMS], columns=list(_COLUMNS))


def _row(claim: Claim, runs: pd.DataFrame) -> dict[str, Any]:
    told: dict[str, Any] = {"claim": claim.claim, "where": claim.where}
    found = claim.find(runs) if len(runs) else None
    if found is None:
        return {**told, "verdict": NOT_TESTED, "why": f"needs other runs: {claim.needs}"}
    if isinstance(found, Refused):
        keys = ", ".join(found.keys)
        why = f"these runs differ in {keys}, too: choose alike ones with --runs"
        return {**told, "verdict": NOT_COMPARABLE, "why": why}
    mean, low, high, n = found.effect
    why = found.why
    verdict = "one seed" if n == 1 else "not decided"
    if claim.margin is not None and n > 1:
        verdict, reason = _no_better(found.bounds, claim.margin)
        why = f"{reason}; {why}"
    elif found.effect.decided:
        sign = "lower" if mean < 0 else "higher"
        verdict = "supported" if sign == claim.supported_by else "contradicted"
    setting = _setting(found.runs, claim.data)
    numbers = {"effect": mean, "low": low, "high": high, "seeds": n}
    return {
        **told,
        "verdict": verdict,
        "metric": found.metric,
        **numbers,
        "setting": setting,
        "why": why,
    }


def _no_better(bounds: Interval, margin: float) -> tuple[str, str]:
    """The verdict on "no better" by one-sided bounds of a difference of losses, and its reason."""
    told = f"one-sided 95 % bounds {bounds.low:.3g} and {bounds.high:.3g}, margin ±{margin:g} nats"
    if bounds.low > -margin:
        kind = "equivalent" if bounds.high < margin else "not better by the margin"
        return "supported", f"{kind}: {told}"
    if bounds.high < -margin:
        return "contradicted", f"better by more than the margin: {told}"
    return "not decided", told


def _setting(runs: pd.DataFrame, published: str) -> str:
    """What the runs trained on and for how long; and whether that is what the paper did."""
    parts = []
    for key, name in (
        ("data.name", "{}"),
        ("data.image_size", "{} pixels"),
        ("train_images", "{} training images"),
        ("model.backbone", "{}"),
        ("model.latent_dim", "latent_dim {}"),
        ("training.epochs", "{} epochs"),
    ):
        values = sorted({_number(value) for value in runs[key].dropna()}) if key in runs else []
        if values:
            parts.append(name.format(" and ".join(values)))
    steps = runs["step"].dropna()
    if len(steps):
        parts.append(f"{int(steps.min()):,} steps" + ("" if steps.nunique() == 1 else " or more"))
    return f"{', '.join(parts)} (the paper: {published})"


def _number(value: Any) -> str:
    return f"{value:,.6g}" if isinstance(value, (int, float, np.number)) else str(value)


def _of(runs: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """The runs whose keys (model_backbone for model.backbone) have these values."""
    for name, value in wanted.items():
        key = name.replace("_", ".", 1)
        if key not in runs:
            return runs.iloc[:0]
        runs = runs[runs[key].isin(value if isinstance(value, (list, tuple)) else [value])]
    return runs


def _between(
    runs: pd.DataFrame, key: str, first: str, second: str, metric: str
) -> Found | Refused | None:
    """second − first of a key, over the seeds of the mean over all settings of the model that both have."""
    runs = usable(_of(runs, **{key.replace(".", "_", 1): [first, second]}), metric)
    if runs.empty or runs[key].nunique() < 2:
        return None
    runs = _without_inert(runs, key)
    best: Found | Refused | None = None
    for _, alike in runs.groupby([key for key in MEANING if key in runs], dropna=False):
        found = _pooled(alike, key, first, second, metric)
        if isinstance(found, Found) and not (
            isinstance(best, Found) and best.effect.n >= found.effect.n
        ):
            best = found
        best = best or found
    return best or Refused(_differing(runs, {key}) or ["seed"])


def _pooled(
    alike: pd.DataFrame, key: str, first: str, second: str, metric: str
) -> Found | Refused | None:
    if alike[key].nunique() < 2:
        return None
    # Settings of the model are a design, whose mean is an effect; no other key may differ.
    foreign = [name for name in _differing(alike, {key}) if not name.startswith("model.")]
    if foreign:
        return Refused(foreign)
    rows = compare(alike, key, metric)
    whole = len(rows) == 1 or (len(rows) and str(rows["setting"].iloc[0]).startswith("mean over"))
    if not whole:
        return Refused(_differing(alike, {key}) or ["seed"])
    one_sided = compare(alike, key, metric, _ONE_SIDED)
    sign = 1 if rows["first"].iloc[0] == first else -1
    each = [
        f"{row['setting'] or 'alone'}: {sign * row['difference']:+.3g}"
        for _, row in rows.iterrows()
    ]
    why = f"{metric} of {second} minus that of {first}; {'; '.join(each)}"
    return Found(_turned(rows, sign), _turned(one_sided, sign), metric, alike, why)


def _turned(rows: pd.DataFrame, sign: int) -> Interval:
    """The first row's difference, of the other sign for -1."""
    row = rows.iloc[0]
    low, high = sorted((sign * float(row["low"]), sign * float(row["high"])))
    return Interval(sign * float(row["difference"]), low, high, int(row["seeds"]))


def _sides(
    first: pd.DataFrame, second: pd.DataFrame, free: Callable[[str], bool], why: str
) -> Found | Refused | None:
    """second − first of val/loss of two systems, each of one setting, that differ in nothing but what is free."""
    if first.empty or second.empty:
        return None
    both = pd.concat([first, second])
    keys = [key for key in _differing(both, set()) if not free(key)]
    for side in (first, second):
        keys += [key for key in _differing(side, set()) if key not in keys]
    if keys:
        return Refused(keys)
    pairs = pd.DataFrame({"first": _by_seed(first), "second": _by_seed(second)}).dropna()
    if pairs.empty:
        return Refused(["seed"])
    values = pairs["first"], pairs["second"]
    bounds = paired_difference(*values, level=_ONE_SIDED)
    return Found(paired_difference(*values), bounds, "val/loss", both, why)


def _differing(runs: pd.DataFrame, free: set[str]) -> list[str]:
    """What else than the seed and the free keys differs among runs, and so forbids a mean of them."""
    found = [key for key in changed_keys(runs) if key not in free | {"seed"}]
    store = [key for key in _STORE if key in runs]
    if "data_digest" in runs and store:
        by_store = runs.groupby(store, dropna=False)["data_digest"].nunique()
        if (by_store > 1).any():
            found.append("data_digest (the data were prepared anew)")
    return found


def _without_inert(runs: pd.DataFrame, key: str) -> pd.DataFrame:
    """The runs without the options of backbones that are not their own: those change nothing.

    If backbones are compared, each brings its own options, which are no second difference.
    """
    runs = runs.copy()
    for name in [name for name in runs if _is_option(str(name))]:
        backbone = str(name).split(".")[1]
        own = runs["model.backbone"] == backbone
        if key == "model.backbone" and runs[name][own].map(str).nunique() <= 1:
            runs = runs.drop(columns=name)
        else:
            runs[name] = runs[name].astype(object).where(own, None)
    return runs


def _is_option(key: str) -> bool:
    """Whether a key is an option of one backbone, as model.conv.width."""
    return key.startswith("model.") and key.count(".") == 2


def _mixes_classes(runs: pd.DataFrame) -> Found | Refused | None:
    found = _between(
        _of(runs, data_name="fashion_mnist"),
        "model.condition",
        "none",
        "label",
        "eval/linear_probe",
    )
    if not isinstance(found, Found):
        return found
    why = f"a linear probe reads the class from μ; less is more mixed. {found.why}"
    return found._replace(why=why)


def _concat_beats_add(runs: pd.DataFrame) -> Found | Refused | None:
    return _between(_of(runs, model_condition="text"), "model.fusion", "add", "concat", "val/loss")


def _resnet(runs: pd.DataFrame) -> Found | Refused | None:
    return _between(
        _of(runs, model_condition="text"), "model.backbone", "conv", "resnet", "val/loss"
    )


def _small_ldm(runs: pd.DataFrame) -> Found | Refused | None:
    """The LDM on 5 % against the baseline on 30 %: paired by seed, though latent and data differ as published."""
    text = usable(
        _of(runs, data_name="coco", model_condition="text", model_fusion="concat"), "val/loss"
    )
    published = ("model.backbone", "model.latent", "model.latent_dim", "data.fraction")
    return _sides(
        _own(_of(text, model_backbone="conv", data_fraction=0.3)),
        _own(_of(text, model_backbone="ldm", data_fraction=0.05)),
        lambda key: key in published or _is_option(key),
        "val/loss of ldm (5 % of the data) minus that of conv (30 %)",
    )


def _own(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs of one backbone, without the options of the others."""
    return _without_inert(runs, "") if len(runs) else runs


def _more_data(runs: pd.DataFrame) -> Found | Refused | None:
    text = usable(_of(runs, model_condition="text", model_backbone="ldm"), "val/loss")
    if text.empty or text["data.fraction"].nunique() < 2:
        return None
    least, most = text["data.fraction"].min(), text["data.fraction"].max()
    return _sides(
        _own(_of(text, data_fraction=least)),
        _own(_of(text, data_fraction=most)),
        lambda key: key == "data.fraction",
        f"val/loss with data.fraction {most:g} minus that with {least:g}",
    )


def _samples_match(runs: pd.DataFrame) -> Found | Refused | None:
    metric, real, chance = "eval/sample_accuracy", "eval/classifier_real_accuracy", 0.1
    alike = usable(_of(runs, data_name="fashion_mnist", model_condition="label"), metric)
    if alike.empty:
        return None
    if keys := _differing(_own(alike), set()):
        return Refused(keys)
    # Repetitions of a seed are one value.
    accuracy = alike[metric].astype(float).groupby(alike["seed"]).mean()
    found = interval(accuracy - chance)
    why = (
        f"share of samples that a classifier takes for the class they were drawn for, less chance ({chance:.0%});"
        f" {accuracy.mean():.1%} of samples, {alike[real].astype(float).mean():.1%} of real images"
    ).replace("%", " %")
    return Found(found, interval(accuracy - chance, level=_ONE_SIDED), metric, alike, why)


def _by_seed(runs: pd.DataFrame) -> pd.Series:
    return runs.groupby("seed")["val/loss"].mean().astype(float)


_COCO = "COCO 64 pixels, 30 % of train2017, 20 epochs, one run each, judged by eye"
CLAIMS = (
    Claim(
        "The CVAE mixes the classes in its latent space more than the plain VAE.",
        "Figure 3", "lower", _mixes_classes, "FashionMNIST, 50 epochs, one run each",
        f"{_SWEEP}/fashion_mnist.yaml, then workflows/evaluate.py on its runs",
    ),
    Claim(
        "Concatenating the text beats adding it.", "the fusion ablation", "lower", _concat_beats_add,
        _COCO, f"{_SWEEP}/ablation.yaml",
    ),
    Claim(
        "A ResNet is no better than the convolutional baseline at the same data and epochs.",
        "the ResNet experiment", "higher", _resnet, _COCO, f"{_SWEEP}/ablation.yaml", MARGIN,
    ),
    Claim(
        "The LDM autoencoder on 5 % of the data is no better than the baseline.",
        "the LDM experiment", "higher", _small_ldm, "COCO 64 pixels, 5 % beside 30 %, one run each",
        "configs/coco_ldm_5pct.yaml and configs/coco_baseline.yaml with some seeds", MARGIN,
    ),
    Claim(
        "The LDM autoencoder improves with all of the data (conjecture).", "outlook", "lower", _more_data,
        "not run", f"{_SWEEP}/data_fraction.yaml",
    ),
    Claim(
        "FashionMNIST samples match the label they were drawn for.", "Figures 4 and 5", "higher",
        _samples_match, "FashionMNIST, 50 epochs, judged by eye",
        f"{_SWEEP}/fashion_mnist.yaml, then workflows/evaluate.py on its runs",
    ),
)  # fmt: skip
