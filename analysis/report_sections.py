"""What a report says, in its order: claims, runs, ablations, curves, pictures, where it all comes from."""

import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from analysis import figures
from analysis.claims import CLAIMS, MARGIN, NOT_TESTED, judge
from analysis.html_page import (
    Direction,
    Measure,
    Part,
    Section,
    drawing,
    picture,
    shown,
    table,
)
from analysis.intervals import compare, importance
from analysis.intervals import summary as mean_and_se
from analysis.report_data import MEANING, METRIC, Material
from analysis.report_images import Picture
from cvae.evaluation.metric_groups import likelihood_note
from cvae.metrics import better

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MADE_BY = "Made by analysis/report.py of cvae-workflow."
_MOST_CHANGED_VALUES = 8
_ABLATION = [
    # What matters comes first: a phone shows three columns.
    *("first", "second", "verdict", "difference", "95 % interval", "seeds", "metric", "setting"),
    *("first mean", "second mean"),
]


class Report(NamedTuple):
    sections: list[Section]
    tables: dict[str, pd.DataFrame]
    figures: "dict[str, Figure]"


def summary(material: Material) -> list[str]:
    """Some sentences: how many runs, and the best."""
    runs, whole = material.runs, material.whole
    counts = ", ".join(f"{n} {status}" for status, n in runs["status"].value_counts().items())
    lines = [f"{len(runs)} runs: {counts}." if len(runs) > 1 else f"One run: {counts[2:]}."]
    if METRIC not in runs or runs[METRIC].isna().all():
        lines.append(
            "No run has been evaluated yet, so there is nothing to compare: training evaluates after every"
            " training.eval_every epochs."
        )
    elif not whole.empty and not material.differ_in_meaning:
        best = str(whole[METRIC].astype(float).idxmin())
        of = f" ({material.groups[best]})" if material.keys else ""
        lines.append(
            f"Lowest {METRIC}: {whole[METRIC].astype(float).min():.2f} nats per image, {best}{of}."
        )
    if len(whole) and whole.groupby(material.groups[whole.index]).size().max() == 1:
        lines.append("One seed each: no interval can be given, and none is made up.")
    return lines


def sections(material: Material, drawn: Sequence[Picture]) -> Report:
    tables: dict[str, pd.DataFrame] = {}
    made: dict[str, Figure] = {}
    claims = _claims(material, tables)
    tested = not (tables["claims"]["verdict"] == NOT_TESTED).all()
    parts = [
        *([claims] if tested else []),
        _overview(material, tables),
        _groups(material, tables),
        _ablations(material, tables),
        _curves(material, made),
        _search(material, made),
        Section("pictures", "Pictures", [picture(p.image, p.title, p.text) for p in drawn]),
        *([] if tested else [claims]),
        _left_out(material),
        _next(material),
        _provenance(material, tables),
    ]
    return Report(parts, tables, made)


def _overview(material: Material, tables: dict[str, pd.DataFrame]) -> Section:
    runs = material.runs
    # What matters comes first: a phone shows two columns or three.
    columns: dict[str, object] = {"run": runs.index}
    if METRIC in material.metrics:
        columns[METRIC] = runs[METRIC]
    columns["status"] = runs["status"]
    seed = ["seed"] if runs["seed"].nunique() > 1 else []
    columns |= {key: runs[key] for key in [*material.keys, *seed]}
    columns |= {name: runs[name] for name in material.metrics}
    columns |= {
        "epochs": runs["epoch"].astype(float).round(2),
        "minutes": (runs["seconds"] / 60).round(1),
        "GPU hours": runs["gpu_hours"].astype(object).where(runs["gpu_hours"].notna(), None),
        "seconds per epoch": runs["seconds_per_epoch"].astype(float).round(2),
    }
    frame = pd.DataFrame(columns)
    tables["runs"] = frame
    text = (
        f"Metrics of the best epoch; in bold the best of a column. A click on a head sorts. {_constants(material)}"
    ).rstrip()
    if material.differ_in_meaning:
        keys = " and ".join(material.differ_in_meaning)
        text += (
            f" The runs differ in {keys}: their losses have different meanings and are not ranked."
        )
    told = _missing(frame)
    for run, metrics in material.nan_metrics.items():
        told.loc[run, metrics] = math.nan
    if len(told) == 1:
        alone = pd.DataFrame(
            {"": told.columns[1:], told["run"].iloc[0]: told.iloc[0, 1:].map(shown)}
        )
        return Section(
            "runs", "The run", [table(alone, sortable=False)], "Metrics of the best epoch."
        )
    return Section("runs", "Runs", [table(told, best=_best(material))], text)


def _constants(material: Material) -> str:
    """What stands between a loss and a likelihood of the same images."""
    found = material.runs.get("model.likelihood", pd.Series(dtype=object)).dropna().unique()
    return likelihood_note(found)


def _groups(material: Material, tables: dict[str, pd.DataFrame]) -> Section:
    """Means over seeds."""
    whole = material.whole
    rows = []
    for name, members in whole.groupby(material.groups[whole.index], sort=False):
        row: dict[str, object] = {"runs that differ in the seed alone": name, "seeds": len(members)}
        for metric in material.metrics:
            values = members[metric].dropna().astype(float)
            finite = values[np.isfinite(values)]
            if len(finite):
                mean, se, _ = mean_and_se(finite)
                row |= {metric: mean, f"{metric} se": se}
        rows.append(row)
    frame = pd.DataFrame(rows)
    if whole.empty or len(rows) == len(whole):
        return Section("groups", "Means over seeds", [])
    tables["groups"] = frame
    text = "Mean and standard error over the seeds; runs that are left out are listed below."
    best = {name: end for name, end in _best(material).items() if name in frame}
    return Section("groups", "Means over seeds", [table(_with_errors(frame), best=best)], text)


def _ablations(material: Material, tables: dict[str, pd.DataFrame]) -> Section:
    parts = []
    shown_frames: list[pd.DataFrame] = []
    for key in material.keys:
        if material.runs[key].nunique(dropna=False) > _MOST_CHANGED_VALUES:
            continue
        compared = [compare(material.runs, key, metric) for metric in _compared(material, key)]
        frames = [frame for frame in compared if not frame.empty]
        if frames:
            frame = pd.concat(frames, ignore_index=True)
            tables[f"ablation_{key}"] = frame
            pooled = frame["setting"].str.startswith("mean over") | (frame["setting"] == "")
            shown_frames.append(frame[(frame["metric"] == METRIC) | pooled])
            told = _with_errors(shown_frames[-1])
            parts.append(table(_with_interval(told, "difference")[_ABLATION], key, sortable=False))
    text = (
        "Runs that agree in everything but one key, paired by all the others and the seed. Differences are second"
        " minus first, with 95 % bootstrap intervals; where an interval holds zero, nothing is decided. Of metrics"
        f" other than {METRIC} only the mean over settings is shown; the folder tables beside this page has all."
    )
    intervals = sum(int(frame["low"].notna().sum()) for frame in shown_frames)
    if intervals > 1:
        text += (
            f" Of {intervals} such intervals about {intervals / 20:.2g} would exclude zero by chance alone if"
            " no key did anything."
        )
    return Section("ablations", "What each key does", parts, text if parts else "")


def _compared(material: Material, key: str) -> list[str]:
    """Metrics with a better end. A key that changes what a loss means leaves those out that are losses."""
    ended = [name for name in material.metrics if _end(name) is not None or name.endswith("_probe")]
    # Bits per dimension are the same nats once more.
    metrics = [name for name in ended if not name.endswith("bits_per_dim")]
    return [name for name in metrics if not (key in MEANING and _is_of_the_loss(name))]


def _curves(material: Material, made: "dict[str, Figure]") -> Section:
    parts = []
    drawn = {
        "learning_curves": figures.learning_curves(material.curves, material.ranked),
        "elbo_parts": figures.elbo_parts(material.whole, material.ranked),
    }
    titles = {
        "learning_curves": (
            "Learning curves",
            "Mean over a group's runs, band: ± a standard error.",
        ),
        "elbo_parts": ("The two parts of −ELBO", "At each run's best epoch, in nats per image."),
    }
    n_groups = material.groups.nunique()
    if n_groups > figures.MOST_GROUPS:
        more = f" The best {figures.MOST_GROUPS} of {n_groups} groups."
        titles = {name: (title, text + more) for name, (title, text) in titles.items()}
    for name, figure in drawn.items():
        if figure is not None:
            made[name] = figure
            parts.append(drawing(figure, *titles[name]))
    return Section("curves", "Curves", parts)


def _search(material: Material, made: "dict[str, Figure]") -> Section:
    keys = [*material.keys, *(["seed"] if material.runs["seed"].nunique() > 1 else [])]
    parts = []
    lines = figures.parallel_coordinates(material.whole, keys, METRIC)
    if lines is not None:
        made["parallel_coordinates"] = lines
        text = f"A line is a run; the darker, the lower its {METRIC}."
        parts.append(drawing(lines, "Parallel coordinates", text))
    bars = figures.importance_bars(importance(material.whole, METRIC))
    if bars is not None:
        made["importance"] = bars
        text = f"How much of the variation of {METRIC} each key explains (functional ANOVA, by Optuna)."
        parts.append(drawing(bars, "Importance of each key", text))
    return Section("search", "What the search found", parts)


def _claims(material: Material, tables: dict[str, pd.DataFrame]) -> Section:
    frame = judge(material.runs)
    tables["claims"] = frame
    text = (
        "Each claim of the paper, put to the test by the runs of this report alone. A system counts as better"
        f" if it is so by more than a margin of {MARGIN:g} nats per image, by two one-sided tests at 95 %."
    )
    tested = frame["verdict"] != NOT_TESTED
    parts = []
    if tested.any():
        told = _with_interval(_missing(frame[tested]), "effect")
        long = ("claim", "setting", "why")
        parts.append(table(told, long=long, sortable=False))
    if not tested.all():
        text += (
            f" {(~tested).sum()} of {len(frame)} claims need other runs: see the commands below."
        )
    return Section("claims", "The paper's claims", parts, text)


def _next(material: Material) -> Section:
    """Commands that go on from here."""
    runs = material.runs
    rows = []
    unfinished = runs.index[runs["status"].isin(["stopped", "failed", "unfinished"])]
    for name in unfinished[:3]:
        rows.append(
            ("go on with a run that did not finish", _workflow("runs.py resume", str(name)))
        )
    whole = material.whole
    if len(whole):
        best = str(whole[METRIC].astype(float).idxmin())
        if not any(name.startswith("eval/") for name in material.metrics):
            rows.append(("measure likelihoods, PSNR and more", _workflow("evaluate.py", best)))
        rows.append(("draw with the best run", _workflow("generate.py", best)))
        rows.append(("give its model away", _workflow("export.py", best, f"exports/{best}")))
        if whole["seed"].nunique() < 3 and isinstance(whole.loc[best, "path"], str):
            file = f"runs/{best}/experiment.yaml"
            used = {int(seed) for seed in whole["seed"].dropna()}
            seed = next(n for n in range(len(used) + 1) if n not in used)
            command = _workflow("launch.py", file, f"seed={seed}")
            rows.append(("another seed, for an interval", command))
    judged = judge(runs)
    untested = set(judged["claim"][judged["verdict"] == NOT_TESTED])
    commands = dict.fromkeys(claim.needs for claim in CLAIMS if claim.claim in untested)
    for command in (text for text in commands if text.startswith("python")):
        first, _, after = command.partition(", then ")
        rows.append(("test more claims" + (f"; then {after}" if after else ""), first))
    frame = pd.DataFrame(rows, columns=["what", "command"])
    parts = [table(frame, code=("command",), long=("what", "command"), sortable=False)]
    return Section("next", "What next", parts if rows else [])


def _workflow(script: str, *words: str) -> str:
    return " ".join([f"python workflows/{script}", *map(shlex.quote, words)])


def _left_out(material: Material) -> Section:
    reasons = material.out_of_the_means
    frame = pd.DataFrame({"run": reasons.index, "why": reasons.to_numpy()})
    text = "These are in the table of runs, and in no mean, no comparison and no claim."
    parts = [table(frame, long=("why",))] if len(frame) else []
    return Section("left_out", "Left out of the means", parts, text if parts else "")


def _provenance(material: Material, tables: dict[str, pd.DataFrame]) -> Section:
    runs = material.runs
    frame = pd.DataFrame(
        {
            "run": runs.index,
            "commit": runs["commit"].map(lambda x: None if pd.isna(x) else str(x)[:12]),
            "changed since": runs["uncommitted_changes"],
            "data": runs["data_name"],
            "digest": runs["data_digest"].map(lambda x: None if pd.isna(x) else str(x)[:12]),
            "ranks": runs["world_size"],
            "hosts": runs["hosts"],
            "device": runs["device"],
            "reproduce": [_command(row) for _, row in runs.iterrows()],
        }
    )
    tables["provenance"] = frame
    packages = [found for found in runs["packages"] if isinstance(found, dict)]
    versions = {
        name: ", ".join(sorted({str(found[name]) for found in packages if found.get(name)}))
        for name in (packages[0] if packages else {})
    }
    listed = pd.DataFrame({"package": versions.keys(), "version": versions.values()})
    parts: list[Part] = [table(_missing(frame), code=("reproduce",), long=("reproduce",))]
    if len(listed):
        parts.append(table(listed, "Packages", sortable=False))
    return Section("provenance", "Where it comes from", parts)


def _command(row: pd.Series) -> str | None:
    """Repeats a run, wherever it was launched from: its resolved experiment."""
    if isinstance(row["path"], str):
        return f"python workflows/launch.py {shlex.quote(f'runs/{row.name}/experiment.yaml')}"
    return None if pd.isna(row["command"]) else str(row["command"])


def _best(material: Material) -> "dict[str, Direction]":
    ends = {name: _end(name) for name in material.metrics}
    found = {name: end for name, end in ends.items() if end is not None}
    if material.differ_in_meaning:
        return {name: end for name, end in found.items() if not _is_of_the_loss(name)}
    return found


def _is_of_the_loss(metric: str) -> bool:
    """Whether it is another quantity under another likelihood or beta."""
    return any(part in metric for part in ("loss", "elbo", "bits"))


def _end(metric: str) -> "Direction | None":
    """Returns which end of a metric is best; None if neither is."""
    ends: dict[str | None, Direction] = {"lower": "min", "higher": "max"}
    return ends.get(better(metric))


def _with_interval(frame: pd.DataFrame, effect: str) -> pd.DataFrame:
    """low and high as one column behind the effect that they are of."""
    bounds = [
        "" if low is None or high is None else f"{shown(low)} to {shown(high)}"
        for low, high in zip(frame["low"], frame["high"], strict=True)
    ]
    told = frame.drop(columns=["low", "high"])
    told.insert(told.columns.get_loc(effect) + 1, "95 % interval", bounds)
    return told


def _with_errors(frame: pd.DataFrame) -> pd.DataFrame:
    """Each mean together with the standard error that stands behind it, as one column."""
    errors = {name: f"{str(name).removesuffix(' mean')} se" for name in frame}
    measured = {
        str(name): pd.Series(
            [
                Measure(mean, error) if isinstance(mean, float) else mean
                for mean, error in zip(frame[name], frame[se], strict=True)
            ],
            index=frame.index,
            dtype=object,
        )
        for name, se in errors.items()
        if se in frame
    }
    whole = frame.astype(object).assign(**measured)
    return _missing(whole.drop(columns=[se for se in errors.values() if se in frame]))


def _missing(frame: pd.DataFrame) -> pd.DataFrame:
    """Where pandas writes NaN for what is not there, nothing."""
    return frame.astype(object).where(frame.notna(), None)
