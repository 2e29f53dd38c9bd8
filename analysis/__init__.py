"""Runs as pandas tables, and reports made of them.

import analysis
runs = analysis.runs("fashion_mnist")                       # a row a run
curves = analysis.curves(runs, ["val/loss"])                # tidy: run, metric, step, epoch, time, value
analysis.compare(runs, "model.condition", "val/loss")       # paired by seed, with intervals
"""

from analysis.intervals import changed_keys, compare, importance
from analysis.tables import curves, runs

__all__ = ["changed_keys", "compare", "curves", "importance", "runs"]
