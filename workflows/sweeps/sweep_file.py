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
from cvae.metrics import OBJECTIVE, reported_as

Range = Annotated[tuple[int | float, int | float] | None, FromList]
# Others would change the weights' shapes, or the batches, under a trial that is half trained.
MUTABLE = ("optimizer.lr", "optimizer.weight_decay", "model.beta", "model.free_bits")
METRICS = tuple(
    f"val/{metric.name}" for metric in reported_as("val") if not metric.name.endswith("_se")
)
_MOST_CHECKED = 5_000
# Each is a run of its own, which a driver starts, watches and writes down.
_MOST_TRIALS = 10_000
_MOST_VALUES = 1_000


class Space(Strict):
    """What one key may be: exactly one of these."""

    grid: list[Any] | None = Field(
        None, min_length=1, max_length=_MOST_VALUES, description="each of these values"
    )
    choice: list[Any] | None = Field(
        None, min_length=1, max_length=_MOST_VALUES, description="one of these, at random"
    )
    uniform: Range = Field(None, description="between two numbers, both included")
    loguniform: Range = Field(None, description="the same, even in the logarithm")
    seeds: Positive | None = Field(
        None, description="for the key seed: so many, from the experiment's on"
    )

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
        """All values of a list, the ends of a range; for seeds their number alone is known here."""
        return list(self.grid or self.choice or self.uniform or self.loguniform or [])


class Search(Strict):
    name: Literal["grid", "random", "optuna"] = Field(
        "grid", description="grid: every combination; optuna: its model-based sampler (TPE)"
    )
    samples: Positive = Field(1, description="draws; each is combined with every grid value")
    seed: int = Field(0, ge=0, lt=2**32, description="of the draws")


class Scheduler(Strict):
    name: Literal["none", "asha", "pbt"] = Field(
        "none",
        description="asha: stops what lags behind (Li et al. 2020); pbt: what lags behind goes on from the"
        " weights of what leads, with changed keys (Jaderberg et al. 2017)",
    )
    grace_epochs: Positive = Field(1, description="asha: epochs that every trial gets")
    reduction_factor: Annotated[int, Field(gt=1, le=2**31 - 1)] = Field(
        4, description="asha: one in so many goes on"
    )
    every_epochs: Positive = Field(1, description="pbt: epochs between two changes")
    mutate: list[Literal[MUTABLE]] = Field(  # type: ignore[valid-type]
        [], description="pbt: the keys of the space that may change in mid-run"
    )


class Sweep(Strict):
    name: Name
    experiment: str = Field(
        min_length=1, max_length=1000, description="experiment file, from the project's root"
    )
    values: dict[str, Any] = Field({}, description="keys of the experiment that are set for all")
    space: dict[str, Space] = Field(min_length=1, description="keys that differ between trials")
    metric: Literal[METRICS] = Field(  # type: ignore[valid-type]
        OBJECTIVE, description="of the evaluations"
    )
    mode: Literal["min", "max"] = "min"
    search: Search = Search()
    scheduler: Scheduler = Scheduler()
    concurrency: Positive | None = Field(None, description="most trials at once; null: all slots")
    hours: float | None = Field(None, gt=0, le=1e6, description="budget; what runs then is stopped")

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


class Loaded(NamedTuple):
    sweep: Sweep
    experiment: Experiment
    """With the sweep's `values`, before any of the space's."""
    impossible: list[str]
    """Why, for each combination of the space that the experiment's schema refuses."""


def load_sweep(file: Path, overrides: list[str], root: Path) -> Loaded:
    """Reads and checks a sweep file. root: where the experiment's path begins.

    overrides: key=value; keys of the sweep file, or of the experiment (these leave the space). Raises UserError
    with one line: a key that the experiment does not know, a value that it can never take.
    """
    own = [word for word in overrides if word.partition("=")[0].split(".")[0] in _OWN_KEYS]
    fixed = [word for word in overrides if word not in own]
    sweep = yaml_model.load(file, Sweep, own)
    base = load_experiment(root / sweep.experiment)
    for key, value in sweep.values.items():
        _check(file, "values", key, [value], base)
    set_by_file = [
        f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in sweep.values.items()
    ]
    experiment = load_experiment(root / sweep.experiment, [*set_by_file, *fixed])
    pinned = {word.partition("=")[0].strip() for word in fixed}
    space = {key: found for key, found in sweep.space.items() if key not in pinned}
    if not space:
        raise UserError("command line: every key of the space is given a value; use launch.py")
    if sweep.metric == "val/text_gain" and experiment.model.condition != "text":
        raise UserError(f"{file}: metric = 'val/text_gain' needs model.condition = 'text'")
    least, epochs = sweep.scheduler.grace_epochs, experiment.training.epochs
    if sweep.scheduler.name == "asha" and least > epochs:
        raise UserError(
            f"{file}: scheduler.grace_epochs = {least} exceeds training.epochs = {epochs:g}"
        )
    gone = [key for key in sweep.scheduler.mutate if key not in space]
    if gone:
        raise UserError(f"command line: {gone[0]} is among scheduler.mutate and cannot be fixed")
    sweep = sweep.model_copy(update={"space": space})
    for key, found in space.items():
        _check(file, "space", key, found.examples(), experiment)
    return Loaded(sweep, experiment, _impossible(sweep, experiment))


def with_values(experiment: Experiment, values: Mapping[str, Any]) -> Experiment:
    """A trial's experiment. Raises UserError where these values do not go together."""
    return yaml_model.replaced(experiment, values)


def seeds(experiment: Experiment, number: int) -> list[int]:
    return list(range(experiment.seed, experiment.seed + number))


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
