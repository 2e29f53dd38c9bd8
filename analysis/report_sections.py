"""The sections of a report, in the order of the page."""

import math
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from analysis import figures
from analysis.claims import CLAIMS, MARGIN, NOT_TESTED
from analysis.html_page import Direction, Part, Section, drawing, shown, table, table_files
from analysis.intervals import MEANING, compare, importance
from analysis.intervals import summary as mean_and_se
from analysis.report_data import METRIC, ReportData
from cvae.evaluation.metric_groups import likelihood_note
from cvae.metrics import better

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_CHANGED_VALUES = 8
_ERRORS = {"first mean": "first se", "second mean": "second se"}
# What matters comes first: a phone shows three columns.
_ABLATION = (
    "first", "second", "verdict", "difference", "95 % interval", "seeds", "metric", "setting", *_ERRORS,
    *_ERRORS.values(),
)  # fmt: skip


def summary(data: ReportData) -> list[str]:
    """Returns some sentences: how many runs, and the best."""
    runs, whole = data.runs, data.whole
    counts = ", ".join(f"{n} {status}" for status, n in runs["status"].value_counts().items())
    lines = [f"{len(runs)} runs: {counts}." if len(runs) > 1 else f"One run: {counts[2:]}."]
    if METRIC not in runs or runs[METRIC].isna().all():
        lines.append(
            "No run has been evaluated yet, so there is nothing to compare: training evaluates every"
            " training.eval_every epochs."
        )
    elif data.best is not None and not data.differ_in_meaning:
        group = f" ({data.groups[data.best]})" if data.keys else ""
        lowest = whole[METRIC].astype(float).min()
        lines.append(f"Lowest {METRIC}: {lowest:.2f} nats per image, {data.best}{group}.")
    if len(whole) and whole.groupby(data.groups[whole.index]).size().max() == 1:
        lines.append("One seed each, so there are no intervals.")
    return lines


def sections(data: ReportData, pictures: Sequence[Part]) -> list[Section]:
    """Returns the sections in their order; those without content have neither parts nor text."""
    claims = _claims(data)
    none_tested = (data.claims["verdict"] == NOT_TESTED).all()
    made = [make(data) for make in (_runs, _groups, _ablations, _curves, _search)]
    made.append(Section("pictures", "Pictures", pictures))
    made.insert(len(made) if none_tested else 0, claims)
    return made + [make(data) for make in (_excluded, _next, _provenance)]


def _claims(data: ReportData) -> Section:
    tested = data.claims["verdict"] != NOT_TESTED
    text = (
        "Each claim of the paper, tested on the runs of this report alone. One system is better than another if it"
        f" is so by more than a margin of {MARGIN:g} nats per image, by two one-sided tests at 95 %."
    )
    if not tested.all():
        text += (
            f" {(~tested).sum()} of {len(tested)} claims need other runs: see the commands below."
        )
    part = Part(files=table_files("claims", data.claims))
    if tested.any():
        cells = _with_interval(_without_nan(data.claims[tested]), "effect")
        long = ("claim", "setting", "why")
        part = table(cells, long=long, sortable=False, files=part.files)
    return Section("claims", "The paper's claims", [part], text)


def _runs(data: ReportData) -> Section:
    runs = data.runs
    # What matters comes first: a phone shows two columns or three.
    columns: dict[str, object] = {"run": runs.index}
    if METRIC in data.metrics:
        columns[METRIC] = runs[METRIC]
    columns["status"] = runs["status"]
    columns |= {name: runs[name] for name in [*data.keys_and_seed, *data.metrics]}
    columns |= {
        "epochs": runs["epoch"].astype(float).round(2),
        "minutes": (runs["seconds"] / 60).round(1),
        "GPU hours": runs["gpu_hours"].astype(object).where(runs["gpu_hours"].notna(), None),
        "seconds per epoch": runs["seconds_per_epoch"].astype(float).round(2),
    }
    frame = pd.DataFrame(columns)
    files = table_files("runs", frame)
    cells = _without_nan(frame)
    for run, metrics in data.nan_metrics.items():
        cells.loc[run, metrics] = math.nan
    text = "Metrics of the best epoch."
    if len(cells) == 1:
        values = cells.iloc[0, 1:].map(shown)
        alone = pd.DataFrame({"": values.index, cells["run"].iloc[0]: values.to_numpy()})
        return Section("runs", "The run", [table(alone, sortable=False, files=files)], text)
    text = "Metrics of the best epoch; the best of a column is bold. Click on a heading to sort."
    likelihoods = runs.get("model.likelihood", pd.Series(dtype=object)).dropna().unique()
    if note := likelihood_note(likelihoods):
        text = f"{text} {note}"
    if keys := " and ".join(data.differ_in_meaning):
        text += (
            f" The runs differ in {keys}: their losses have different meanings and are not ranked."
        )
    return Section("runs", "Runs", [table(cells, best=_best(data), files=files)], text)


def _groups(data: ReportData) -> Section:
    rows = []
    for name, members in data.whole.groupby(data.groups[data.whole.index], sort=False):
        row: dict[str, object] = {"runs that differ in the seed alone": name, "seeds": len(members)}
        for metric in data.metrics:
            values = members[metric].dropna().astype(float)
            finite = values[np.isfinite(values)]
            if len(finite):
                mean, se, _ = mean_and_se(finite)
                row |= {metric: mean, f"{metric} se": se}
        rows.append(row)
    if len(rows) == len(data.whole):
        return Section("groups", "Means over seeds")
    frame = pd.DataFrame(rows)
    best = {name: end for name, end in _best(data).items() if name in frame}
    errors = {name: f"{name} se" for name in data.metrics if name in frame}
    files = table_files("groups", frame)
    part = table(_without_nan(frame), best=best, errors=errors, files=files)
    text = "Mean and standard error over the seeds; excluded runs are listed below."
    return Section("groups", "Means over seeds", [part], text)


def _ablations(data: ReportData) -> Section:
    parts, n_intervals = [], 0
    for key in data.keys:
        if data.runs[key].nunique(dropna=False) > _MOST_CHANGED_VALUES:
            continue
        compared = [compare(data.runs, key, metric) for metric in _compared(data, key)]
        frames = [frame for frame in compared if not frame.empty]
        if not frames:
            continue
        frame = pd.concat(frames, ignore_index=True)
        is_mean = (frame["settings"] > 1) | (frame["setting"] == "")
        frame = frame.drop(columns="settings")
        visible = frame[(frame["metric"] == METRIC) | is_mean]
        n_intervals += int(visible["low"].notna().sum())
        cells = _with_interval(_without_nan(visible), "difference")[list(_ABLATION)]
        files = table_files(f"ablation_{key}", frame)
        parts.append(table(cells, key, errors=_ERRORS, sortable=False, files=files))
    text = (
        "Runs that agree in everything but one key, paired by all the others and the seed. Differences are second"
        " minus first, with 95 % bootstrap intervals; an interval that holds zero decides nothing. Of metrics"
        f" other than {METRIC} only the mean over settings is shown; the folder tables next to this page has all."
    )
    if n_intervals > 1:
        text += (
            f" Of {n_intervals} such intervals about {n_intervals / 20:.2g} would exclude zero by chance alone if"
            " no key had an effect."
        )
    return Section("ablations", "What each key does", parts, text if parts else "")


def _compared(data: ReportData, key: str) -> list[str]:
    """Returns the metrics with a better end; without losses if the key changes what a loss means."""
    return [
        name
        for name in data.metrics
        if (better(name) is not None or name.endswith("_probe"))
        # Bits per dimension are the same nats once more.
        and not name.endswith("bits_per_dim")
        and not (key in MEANING and _is_of_the_loss(name))
    ]


def _curves(data: ReportData) -> Section:
    n_groups, most = data.groups.nunique(), figures.MOST_GROUPS
    more = f" The best {most} of {n_groups} groups." if n_groups > most else ""
    curves = figures.learning_curves(data.curves, data.ranked)
    parts = figures.elbo_parts(data.whole, data.ranked)
    text = "Mean over a group's runs, band: ± a standard error."
    split = "At each run's best epoch, in nats per image."
    drawn = [
        *_drawing(curves, "learning_curves", "Learning curves", text + more),
        *_drawing(parts, "elbo_parts", "The two parts of −ELBO", split + more),
    ]
    return Section("curves", "Curves", drawn)


def _search(data: ReportData) -> Section:
    lines = figures.parallel_coordinates(data.whole, data.keys_and_seed, METRIC)
    bars = figures.importance_bars(importance(data.whole, METRIC))
    text = f"A line is a run; the darker, the lower its {METRIC}."
    shares = (
        f"Share of the variation of {METRIC} that each key explains (functional ANOVA, by Optuna)."
    )
    drawn = [
        *_drawing(lines, "parallel_coordinates", "Parallel coordinates", text),
        *_drawing(bars, "importance", "Importance of each key", shares),
    ]
    return Section("search", "What the search found", drawn)


def _drawing(figure: "Figure | None", name: str, title: str, text: str) -> list[Part]:
    return [] if figure is None else [drawing(figure, name, title, text)]


def _excluded(data: ReportData) -> Section:
    frame = data.excluded.rename_axis("run").reset_index(name="why")
    if frame.empty:
        return Section("left_out", "Left out of the means")
    text = "These are in the table of runs, and in no mean, no comparison and no claim."
    return Section("left_out", "Left out of the means", [table(frame, long=("why",))], text)


def _next(data: ReportData) -> Section:
    """Commands that go on from here."""
    unfinished = data.runs.index[data.runs["status"].isin(["stopped", "failed", "unfinished"])]
    rows = [
        ("continue a run that did not finish", _workflow("runs.py resume", str(name)))
        for name in unfinished[:3]
    ]
    if best := data.best:
        if not any(name.startswith("eval/") for name in data.metrics):
            rows.append(("measure likelihoods, PSNR and more", _workflow("evaluate.py", best)))
        rows.append(("draw with the best run", _workflow("generate.py", best)))
        rows.append(("export its model", _workflow("export.py", best, f"exports/{best}")))
        seeds = {int(seed) for seed in data.whole["seed"].dropna()}
        if len(seeds) < 3 and isinstance(data.whole.loc[best, "path"], str):
            seed = next(n for n in range(len(seeds) + 1) if n not in seeds)
            file = f"runs/{best}/experiment.yaml"
            command = _workflow("launch.py", file, f"seed={seed}")
            rows.append(("train another seed, for an interval", command))
    untested = set(data.claims["claim"][data.claims["verdict"] == NOT_TESTED])
    needed = [claim for claim in CLAIMS if claim.claim in untested and claim.command]
    commands = dict.fromkeys((claim.command, claim.then) for claim in needed)
    for command, then in commands:
        rows.append(("test more claims" + (f"; then {then}" if then else ""), command))
    frame = pd.DataFrame(rows, columns=["what", "command"])
    part = table(frame, code=("command",), long=("what", "command"), sortable=False)
    return Section("next", "What next", [part] if rows else [])


def _workflow(script: str, *words: str) -> str:
    return " ".join([f"python workflows/{script}", *map(shlex.quote, words)])


def _provenance(data: ReportData) -> Section:
    runs = data.runs
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
    files = table_files("provenance", frame)
    long = ("reproduce",)
    parts = [table(_without_nan(frame), code=long, long=long, files=files)]
    packages = [versions for versions in runs["packages"] if isinstance(versions, dict)]
    if packages:
        versions = {
            name: ", ".join(sorted({str(one[name]) for one in packages if one.get(name)}))
            for name in packages[0]
        }
        listed = pd.DataFrame({"package": versions.keys(), "version": versions.values()})
        parts.append(table(listed, "Packages", sortable=False))
    return Section("provenance", "Where it comes from", parts)


def _command(row: pd.Series) -> str | None:
    """Returns the command that repeats a run from its resolved experiment, or the one that launched it."""
    if isinstance(row["path"], str):
        return _workflow("launch.py", f"runs/{row.name}/experiment.yaml")
    return None if pd.isna(row["command"]) else str(row["command"])


def _best(data: ReportData) -> "dict[str, Direction]":
    """Returns the better end of the metrics that have one and can be ranked."""
    return {
        name: end
        for name in data.metrics
        if (end := better(name)) and not (data.differ_in_meaning and _is_of_the_loss(name))
    }


def _is_of_the_loss(metric: str) -> bool:
    """Whether it is another quantity under another likelihood or beta."""
    return any(part in metric for part in ("loss", "elbo", "bits"))


def _with_interval(frame: pd.DataFrame, effect: str) -> pd.DataFrame:
    """Replaces low and high by one column behind the effect that they belong to."""
    bounds = [
        "" if low is None or high is None else f"{shown(low)} to {shown(high)}"
        for low, high in zip(frame["low"], frame["high"], strict=True)
    ]
    joined = frame.drop(columns=["low", "high"])
    joined.insert(joined.columns.get_loc(effect) + 1, "95 % interval", bounds)
    return joined


def _without_nan(frame: pd.DataFrame) -> pd.DataFrame:
    """Puts None for pandas' NaN, which stands for what is missing."""
    return frame.astype(object).where(frame.notna(), None)
