"""The runs of a report: which keys differ among them, what they are called, which of them enter a mean."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from analysis.claims import judge
from analysis.html_page import shown
from analysis.intervals import MEANING, changed_keys
from analysis.tables import METRICS
from cvae.metrics import OBJECTIVE, reported_as

METRIC = OBJECTIVE
"""Runs are ranked by recon_loss + beta·kl of the validation split at the best epoch, in nats per image."""


@dataclass
class ReportData:
    """The tables of analysis.runs and analysis.curves, and notes for the reader."""

    runs: pd.DataFrame
    curves: pd.DataFrame
    notes: list[str] = field(default_factory=list)

    @cached_property
    def keys(self) -> list[str]:
        """The configuration's keys that differ among the runs, without the seed."""
        return [key for key in changed_keys(self.runs) if key != "seed"]

    @cached_property
    def keys_and_seed(self) -> list[str]:
        return [*self.keys, *(["seed"] if self.runs["seed"].nunique() > 1 else [])]

    @cached_property
    def groups(self) -> pd.Series:
        """By run: the values that its group has in common, as "fusion=add, backbone=conv"."""
        short = [key.rpartition(".")[2] for key in self.keys]
        names = {
            key: key if short.count(name) > 1 else name
            for key, name in zip(self.keys, short, strict=True)
        }
        labels = [
            ", ".join(f"{name}={shown(row[key])}" for key, name in names.items()) or "all runs"
            for _, row in self.runs.iterrows()
        ]
        return pd.Series(labels, index=self.runs.index)

    @cached_property
    def labels(self) -> dict[str, str]:
        """By run: its group if keys differ, else its name."""
        return {str(name): group if self.keys else str(name) for name, group in self.groups.items()}

    @cached_property
    def ranked(self) -> pd.Series:
        """groups, the best group's runs first."""
        if METRIC not in self.runs:
            return self.groups
        means = self.whole[METRIC].astype(float).groupby(self.groups[self.whole.index]).mean()
        return self.groups.loc[self.groups.map(means).sort_values(kind="stable").index]

    @cached_property
    def best(self) -> str | None:
        """The run with the lowest METRIC, if any has one."""
        return None if self.whole.empty else str(self.whole[METRIC].astype(float).idxmin())

    @cached_property
    def metrics(self) -> list[str]:
        """The metrics that at least one run has; of two that training and evaluate.py measured, the former."""
        nan = {name for names in self.nan_metrics.values() for name in names}
        measured = [
            str(name)
            for name in self.runs
            if str(name).startswith(METRICS) and (name in nan or self.runs[name].notna().any())
        ]
        of_training = [f"val/{metric.name}" for metric in reported_as("val")]
        first = [name for name in of_training if name in measured]
        twice = {f"eval/{name.partition('/')[2]}" for name in first}
        return first + [name for name in measured if name not in twice and name not in first]

    @cached_property
    def nan_metrics(self) -> dict[str, list[str]]:
        """By run, for those that have any: the metrics that were measured as NaN."""
        names = self.runs["nan_metrics"].dropna()
        return {str(run): text.split(", ") for run, text in names.items()}

    @cached_property
    def excluded(self) -> pd.Series:
        """By run: why it enters no mean and no comparison; the others are not listed."""
        reasons = {}
        for name, row in self.runs.iterrows():
            if row["status"] != "finished":
                reasons[name] = f"{row['status']}: {shown(row['reason'])}".removesuffix(": –")
            elif METRIC in self.nan_metrics.get(str(name), ()):
                reasons[name] = f"its {METRIC} is NaN"
            elif METRIC not in row or pd.isna(row[METRIC]):
                reasons[name] = f"has no {METRIC}"
            elif not np.isfinite(row[METRIC]):
                reasons[name] = f"its {METRIC} is infinite"
        return pd.Series(reasons, dtype=object)

    @cached_property
    def whole(self) -> pd.DataFrame:
        """The runs that enter means and comparisons."""
        return self.runs.drop(index=self.excluded.index)

    @cached_property
    def differ_in_meaning(self) -> list[str]:
        """The keys of MEANING that differ: the runs' losses cannot be ranked."""
        return [key for key in MEANING if key in self.runs and self.runs[key].nunique() > 1]

    @cached_property
    def claims(self) -> pd.DataFrame:
        """The verdicts on the paper's claims, as of analysis.claims.judge."""
        return judge(self.runs)

    def showcase(self, most: int) -> list[str]:
        """Returns the folders of the best runs of the best groups, in the table's order."""
        if METRIC not in self.runs:
            return []
        local = self.whole[self.whole["path"].notna()].sort_values(METRIC)
        firsts = local.assign(group=self.groups).groupby("group", sort=False)["path"].first()
        chosen = set(firsts[:most])
        return [str(path) for path in self.runs["path"] if path in chosen]
