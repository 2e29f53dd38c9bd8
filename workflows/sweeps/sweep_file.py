"""The sweep file: which keys of an experiment take which values, and how they are searched."""

import itertools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, model_validator

from cvae.config import yaml_model
from cvae.config.experiment import Experiment, Name, Positive, load_experiment
from cvae.config.yaml_model import FromList, Strict
from cvae.errors import UserError, cut, did_you_mean
from cvae.metrics import OBJECTIVE, better, reported_as

_MOST_CHECKED = 5_000
_MOST_TRIALS = 10_000
_MOST_VALUES = 1_000
Values = Annotated[list[Any] | None, Field(min_length=1, max_length=_MOST_VALUES)]
Range = Annotated[tuple[int | float, int | float] | None, FromList]
MUTABLE = ("optimizer.lr", "optimizer.weight_decay", "model.beta", "model.free_bits")
"""Keys that may change during training; others change the shapes of the weights, or the batches."""
METRICS = tuple(
    f"val/{metric.name}" for metric in reported_as("val") if not metric.name.endswith("_se")
)


class Space(Strict):
    """The values of one key: exactly one of these."""

    grid: Values = None
    """Each of these values."""
    choice: Values = None
    """One of these values, drawn at random."""
    uniform: Range = None
    """Drawn between two numbers, both included."""
    loguniform: Range = None
    """Drawn uniformly in the logarithm."""
    seeds: Positive | None = None
    """For the key seed: this many seeds, beginning with the experiment's."""

    @model_validator(mode="after")
    def _one_kind(self) -> "Space":
        if len(self._given) != 1:
            raise ValueError("give one of grid, choice, uniform, loguniform, seeds")
        bounds = self.uniform or self.loguniform
        if bounds is not None and not bounds[0] < bounds[1]:
            raise ValueError(f"{list(bounds)}: the first must be the smaller")
        if self.loguniform is not None and self.loguniform[0] <= 0:
            raise ValueError(f"loguniform = {list(self.loguniform)}: both must be above 0")
        return self

    @property
    def kind(self) -> str:
        return self._given[0]

    @property
    def _given(self) -> list[str]:
        return [name for name, value in self if value is not None]

    def examples(self) -> list[Any]:
        """Returns all listed values, or the ends of a range; nothing for seeds."""
        return list(self.grid or self.choice or self.uniform or self.loguniform or [])


class Search(Strict):
    name: Literal["grid", "random", "optuna"] = "grid"
    """grid: every combination; random: draws; optuna: draws of its sampler (TPE), which learns
    from earlier trials."""
    samples: Positive = 1
    """Number of draws, each combined with every combination of grid values."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the draws."""


class Scheduler(Strict):
    name: Literal["none", "asha", "pbt"] = "none"
    """asha: stops the worst trials early (Li et al. 2020); pbt: the worst trials continue from
    the weights of the best, with changed keys (Jaderberg et al. 2017)."""
    grace_epochs: Positive = 1
    """asha: epochs before a trial may be stopped."""
    reduction_factor: Annotated[int, Field(gt=1, le=2**31 - 1)] = 4
    """asha: one in this many trials continues."""
    every_epochs: Positive = 1
    """pbt: epochs between two changes."""
    mutate: list[Literal[MUTABLE]] = Field([])  # type: ignore[valid-type]
    """pbt: the keys of the space that may change during training."""


class Sweep(Strict):
    name: Name
    """Beginning of the names of the sweep and of its runs."""
    experiment: str = Field(min_length=1, max_length=1000)
    """Experiment file, relative to the project's root."""
    values: dict[str, Any] = Field({})
    """Values of keys of the experiment, for all trials."""
    space: dict[str, Space] = Field(min_length=1)
    """Keys that differ between trials."""
    metric: Literal[METRICS] = OBJECTIVE  # type: ignore[valid-type]
    """Metric of the evaluations by which trials are judged."""
    mode: Literal["min", "max"] = "min"
    """Better end of the metric; default: as the registry of metrics says."""
    search: Search = Search()
    scheduler: Scheduler = Scheduler()
    concurrency: Positive | None = None
    """Most trials at once; null: as many as there is room for."""
    hours: float | None = Field(None, gt=0, le=1e6)
    """Time after which the running trials are stopped."""

    @model_validator(mode="before")
    @classmethod
    def _better_end(cls, tree: Any) -> Any:
        if isinstance(tree, dict) and better(str(tree.get("metric"))) == "higher":
            return {"mode": "max", **tree}
        return tree

    @model_validator(mode="after")
    def _parts_fit_together(self) -> "Sweep":
        kinds = {key: space.kind for key, space in self.space.items()}
        drawn = [key for key, kind in kinds.items() if kind in ("choice", "uniform", "loguniform")]
        listed = [key for key in kinds if key not in drawn]
        for key, space in self.space.items():
            if space.seeds is not None and key != "seed":
                raise ValueError(f"space.{cut(key, 100)}: seeds is for the key seed")
            if key in self.values:
                raise ValueError(
                    f"space.{cut(key, 100)}: it is fixed among values; remove one of the two"
                )
        if self.search.name == "grid" and drawn:
            raise ValueError(
                f"space.{cut(drawn[0], 100)} is drawn ({kinds[drawn[0]]}): search.name must be random or optuna"
            )
        if self.search.name == "grid" and self.search.samples > 1:
            raise ValueError("search.samples is for random and optuna; repeat by seed: {seeds: 3}")
        if self.search.name == "optuna" and listed:
            raise ValueError(
                f"space.{cut(listed[0], 100)}: optuna draws, it has no {kinds[listed[0]]}; use choice"
            )
        if self.n_trials > _MOST_TRIALS:
            raise ValueError(f"{self.n_trials:,} trials; a sweep has at most {_MOST_TRIALS:,}")
        for key in self.scheduler.mutate:
            if key not in drawn:
                raise ValueError(f"scheduler.mutate: {key} must be drawn in the space")
        if self.scheduler.name == "pbt" and not self.scheduler.mutate:
            raise ValueError(f"scheduler.name = 'pbt' needs scheduler.mutate, of {MUTABLE}")
        if self.scheduler.name == "pbt" and self.search.name == "optuna":
            raise ValueError("scheduler.name = 'pbt' searches by itself; use search.name = random")
        return self

    @property
    def n_trials(self) -> int:
        listed = [space.seeds or len(space.grid or [None]) for space in self.space.values()]
        return self.search.samples * math.prod(listed)


class LoadedSweep(NamedTuple):
    sweep: Sweep
    experiment: Experiment
    """The experiment with the sweep's `values`."""
    impossible: list[str]
    """For each combination of the space that the experiment's schema refuses, why it does."""


def load_sweep(file: Path, overrides: list[str], root: Path) -> LoadedSweep:
    """Reads and checks a sweep file.

    overrides: key=value for keys of the sweep file, or of the experiment, which are then taken out of
    the space. root: the folder to which the experiment's path is relative. Raises UserError with one
    line, such as for a key that the experiment does not have or a value that it can never take.
    """
    own = [word for word in overrides if word.partition("=")[0].split(".")[0] in _OWN_KEYS]
    fixed = [word for word in overrides if word not in own]
    sweep = yaml_model.load(file, Sweep, own)
    base = load_experiment(root / sweep.experiment)
    for key, value in sweep.values.items():
        _check(file, "values", key, [value], base)
    values = [f"{key}={json.dumps(x, ensure_ascii=False)}" for key, x in sweep.values.items()]
    experiment = load_experiment(root / sweep.experiment, [*values, *fixed])
    pinned = {word.partition("=")[0].strip() for word in fixed}
    space = {key: domain for key, domain in sweep.space.items() if key not in pinned}
    if not space:
        raise UserError("command line: every key of the space is given a value; use launch.py")
    if sweep.metric == "val/text_gain" and experiment.model.condition != "text":
        raise UserError(f"{file}: metric = 'val/text_gain' needs model.condition = 'text'")
    grace, epochs = sweep.scheduler.grace_epochs, experiment.training.epochs
    if sweep.scheduler.name == "asha" and grace > epochs:
        raise UserError(
            f"{file}: scheduler.grace_epochs = {grace} exceeds training.epochs = {epochs:g}"
        )
    for key in sweep.scheduler.mutate:
        if key not in space:
            raise UserError(f"command line: {key} is among scheduler.mutate and cannot be fixed")
    sweep = sweep.model_copy(update={"space": space})
    for key, domain in space.items():
        _check(file, "space", key, domain.examples(), experiment)
    return LoadedSweep(sweep, experiment, _impossible(sweep, experiment))


def with_values(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """Returns a trial's experiment. Raises UserError if these values do not fit together."""
    return yaml_model.replaced(experiment, values)


def _impossible(sweep: Sweep, experiment: Experiment) -> list[str]:
    lists = {key: space.grid or space.choice for key, space in sweep.space.items()}
    keys = [key for key, values in lists.items() if values]
    combinations = itertools.product(*(lists[key] or [] for key in keys))
    reasons = []
    for values in itertools.islice(combinations, _MOST_CHECKED):
        try:
            with_values(experiment, dict(zip(keys, values, strict=True)))
        except UserError as error:
            reasons.append(str(error))
    return reasons


def _check(file: Path, block: str, key: str, values: list[Any], experiment: Experiment) -> None:
    leaves = yaml_model.leaf_keys(Experiment)
    line = yaml_model.line_of(file, (block, key))
    if key not in leaves:
        near = did_you_mean(key, leaves)
        raise UserError(
            f"{file}:{line}: {block}.{cut(key, 100)}: the experiment has no such key{near}"
        )
    for value in values:
        problem = yaml_model.wrong_value(experiment, key, value)
        if problem:
            raise UserError(f"{file}:{line}: {block}.{problem}")


_OWN_KEYS = set(Sweep.model_fields) - {"values", "space"}
