"""The paper's claims, each put to the test by the runs at hand: effect, interval, verdict.

Values are compared between runs that agree in everything else, paired by seed (analysis.intervals). "No better" is
a claim about one side: it is supported where the interval excludes that the system is better, contradicted where
it is decidedly better, and not decided where the interval holds zero.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from analysis.intervals import Interval, changed_keys, compare, interval, paired_difference, usable
from analysis.material import MEANING

NOT_TESTED = "not tested"
_SWEEP = "python workflows/sweep.py configs/sweeps"
_COLUMNS = (
    "claim", "where", "verdict", "metric", "effect", "low", "high", "seeds", "setting", "why",
)  # fmt: skip


class Found(NamedTuple):
    """What the runs say about one claim."""

    effect: Interval
    metric: str
    runs: pd.DataFrame
    """Those that enter."""
    why: str


class Claim(NamedTuple):
    claim: str
    where: str
    """In the paper, as far as it is known here."""
    supported_by: str
    """lower | higher: the sign of an effect that supports it."""
    find: Callable[[pd.DataFrame], Found | None]
    data: str
    """What the paper used."""
    needs: str
    """The command that makes runs to test it."""


def judge(runs: pd.DataFrame) -> pd.DataFrame:
    """A row a claim.

    Columns: claim, where, verdict (supported | contradicted | not decided | one seed | not tested), metric, effect
    with its 95 % interval (low, high), seeds, setting (of these runs, and the paper's), why.
    """
    return pd.DataFrame([_row(claim, runs) for claim in CLAIMS], columns=list(_COLUMNS))


def _row(claim: Claim, runs: pd.DataFrame) -> dict[str, Any]:
    told: dict[str, Any] = {"claim": claim.claim, "where": claim.where}
    found = claim.find(runs) if len(runs) else None
    if found is None:
        return {**told, "verdict": NOT_TESTED, "why": f"needs other runs: {claim.needs}"}
    mean, low, high, n = found.effect
    verdict = "one seed" if n == 1 else "not decided"
    if found.effect.decided:
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
        "why": found.why,
    }


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


def _between(runs: pd.DataFrame, key: str, first: str, second: str, metric: str) -> Found | None:
    """second − first of a key, over the seeds of the mean over all settings that both have."""
    runs = usable(_of(runs, **{key.replace(".", "_", 1): [first, second]}), metric)
    best: Found | None = None
    for _, alike in runs.groupby([key for key in MEANING if key in runs], dropna=False):
        rows = compare(alike, key, metric)
        if rows.empty:
            continue
        sign = 1 if rows["first"].iloc[0] == first else -1
        pooled = rows.iloc[0]
        low, high = sorted((sign * float(pooled["low"]), sign * float(pooled["high"])))
        effect = Interval(sign * float(pooled["difference"]), low, high, int(pooled["seeds"]))
        each = [
            f"{row['setting'] or 'alone'}: {sign * row['difference']:+.3g}"
            for _, row in rows.iterrows()
        ]
        why = f"{metric} of {second} minus that of {first}; {'; '.join(each)}"
        if best is None or effect.n > best.effect.n:
            best = Found(effect, metric, alike, why)
    return best


def _mixes_classes(runs: pd.DataFrame) -> Found | None:
    found = _between(
        _of(runs, data_name="fashion_mnist"),
        "model.condition",
        "none",
        "label",
        "eval/linear_probe",
    )
    return found and found._replace(
        why=f"a linear probe reads the class from μ; less is more mixed. {found.why}"
    )


def _concat_beats_add(runs: pd.DataFrame) -> Found | None:
    return _between(_of(runs, model_condition="text"), "model.fusion", "add", "concat", "val/loss")


def _resnet(runs: pd.DataFrame) -> Found | None:
    # Options of a backbone that is not the run's own are no difference.
    return _between(
        _of(runs, model_condition="text"), "model.backbone", "conv", "resnet", "val/loss"
    )


def _small_ldm(runs: pd.DataFrame) -> Found | None:
    """The LDM on 5 % against the baseline on 30 %: paired by seed, though latent and data differ as published."""
    text = usable(
        _of(runs, data_name="coco", model_condition="text", model_fusion="concat"), "val/loss"
    )
    ldm = _of(text, model_backbone="ldm", data_fraction=0.05)
    conv = _of(text, model_backbone="conv", data_fraction=0.3)
    pairs = pd.DataFrame({"ldm": _by_seed(ldm), "conv": _by_seed(conv)}).dropna()
    both = pd.concat([ldm, conv])
    if pairs.empty or any(both[key].nunique() > 1 for key in MEANING):
        return None
    effect = paired_difference(pairs["conv"], pairs["ldm"])
    return Found(
        effect, "val/loss", both, "val/loss of ldm (5 % of the data) minus that of conv (30 %)"
    )


def _more_data(runs: pd.DataFrame) -> Found | None:
    text = usable(_of(runs, model_condition="text", model_backbone="ldm"), "val/loss")
    if text.empty or text["data.fraction"].nunique() < 2:
        return None
    least, most = text["data.fraction"].min(), text["data.fraction"].max()
    ends = _of(text, data_fraction=[least, most])
    if set(changed_keys(ends)) - {"data.fraction", "seed"}:
        return None
    pairs = pd.DataFrame(
        {
            "least": _by_seed(_of(ends, data_fraction=least)),
            "most": _by_seed(_of(ends, data_fraction=most)),
        }
    ).dropna()
    if pairs.empty:
        return None
    why = f"val/loss with data.fraction {most:g} minus that with {least:g}"
    return Found(paired_difference(pairs["least"], pairs["most"]), "val/loss", ends, why)


def _samples_match(runs: pd.DataFrame) -> Found | None:
    metric, real, chance = "eval/sample_accuracy", "eval/classifier_real_accuracy", 0.1
    alike = usable(_of(runs, data_name="fashion_mnist", model_condition="label"), metric)
    if alike.empty or set(changed_keys(alike)) - {"seed"}:
        return None
    accuracy = alike[metric].astype(float)
    found = interval(accuracy - chance)
    why = (
        f"share of samples that a classifier takes for the class they were drawn for, less chance ({chance:.0%});"
        f" {accuracy.mean():.1%} of samples, {alike[real].astype(float).mean():.1%} of real images"
    ).replace("%", " %")
    return Found(found, metric, alike, why)


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
        "the ResNet experiment", "higher", _resnet, _COCO, f"{_SWEEP}/ablation.yaml",
    ),
    Claim(
        "The LDM autoencoder on 5 % of the data is no better than the baseline.",
        "the LDM experiment", "higher", _small_ldm, "COCO 64 pixels, 5 % beside 30 %, one run each",
        "configs/coco_ldm_5pct.yaml and configs/coco_baseline.yaml with some seeds",
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
