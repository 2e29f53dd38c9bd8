"""The runs of a report: what differs among them, what they are called, which of them enter a mean."""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd

from analysis.html_page import shown
from analysis.intervals import changed_keys
from analysis.tables import METRICS
from cvae.metrics import OBJECTIVE, reported_as

METRIC = OBJECTIVE
"""What runs are ranked by: recon_loss + beta·kl of the validation split at the best epoch, nats per image."""
# Runs that differ in these have losses of different meaning.
MEANING = ("model.likelihood", "model.beta", "data.name", "data.image_size", "data.val")


@dataclass
class Material:
    """What a report is made of: the tables of analysis.runs and analysis.curves, and notes for the reader."""

    runs: pd.DataFrame
    curves: pd.DataFrame
    notes: list[str] = field(default_factory=list)

    @cached_property
    def keys(self) -> list[str]:
        """The configuration's keys that differ among the runs, without the seed."""
        return [key for key in changed_keys(self.runs) if key != "seed"]

    @cached_property
    def groups(self) -> pd.Series:
        """By run: the values that its group has in common, as "fusion=add, backbone=conv"."""
        short = {key: key.rpartition(".")[2] for key in self.keys}
        twice = {name for name in short.values() if list(short.values()).count(name) > 1}
        names = {key: key if name in twice else name for key, name in short.items()}
        labels = [
            ", ".join(f"{names[key]}={shown(row[key])}" for key in self.keys) or "all runs"
            for _, row in self.runs.iterrows()
        ]
        return pd.Series(labels, index=self.runs.index)

    @property
    def ranked(self) -> pd.Series:
        """groups, the best group's runs first."""
        if METRIC not in self.runs:
            return self.groups
        means = self.whole[METRIC].astype(float).groupby(self.groups[self.whole.index]).mean()
        return self.groups.loc[self.groups.map(means).sort_values(kind="stable").index]

    @cached_property
    def metrics(self) -> list[str]:
        """Those that at least one run has, without what evaluate.py and the training both measured."""
        found = [str(name) for name in self.runs if str(name).startswith(METRICS)]
        nan = {name for told in self.nan_metrics.values() for name in told}
        there = [name for name in found if name in nan or self.runs[name].notna().any()]
        of_training = [f"val/{metric.name}" for metric in reported_as("val")]
        first = [name for name in of_training if name in there]
        twice = {f"eval/{name.partition('/')[2]}" for name in first}
        return first + [name for name in there if name not in twice and name not in first]

    @cached_property
    def nan_metrics(self) -> dict[str, list[str]]:
        """By run, for those that have any: the metrics that were measured as NaN."""
        told = self.runs["nan_metrics"].dropna()
        return {str(name): names.split(", ") for name, names in told.items()}

    @cached_property
    def out_of_the_means(self) -> pd.Series:
        """By run: why it is in no mean and in no comparison; runs that are in are not listed."""
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

    @property
    def whole(self) -> pd.DataFrame:
        """The runs that are in."""
        return self.runs.drop(index=self.out_of_the_means.index)

    @property
    def differ_in_meaning(self) -> list[str]:
        there = [key for key in MEANING if key in self.runs]
        return [key for key in there if self.runs[key].nunique() > 1]

    @property
    def labels(self) -> dict[str, str]:
        """What each run is called in a picture: the keys that differ with their values, else its name."""
        return {str(name): group if self.keys else str(name) for name, group in self.groups.items()}

    def showcase(self, most: int) -> list[str]:
        """Returns the folders of the runs that draw, in the table's order: one of each of the best groups."""
        if METRIC not in self.runs:
            return []
        here = self.whole[self.whole["path"].notna()].sort_values(METRIC)
        firsts = here.assign(group=self.groups).groupby("group", sort=False)["path"].first()
        chosen = set(firsts[:most])
        return [str(path) for path in self.runs["path"] if path in chosen]
