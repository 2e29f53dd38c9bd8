"""The plan of a launch."""

from pathlib import Path
from typing import Any

import pytest

from cvae.config.experiment import Experiment
from cvae.models.cvae import Cvae
from slurm.cluster_file import ClusterConfig, Place, Placement
from slurm.commands import Slurm
from tests.conftest import tiny_experiment
from workflows.jobs.plan import experiment_facts


def test_a_plan_builds_the_model_once(tiny_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[Any] = []
    construct = Cvae.__init__

    def counted(self: Cvae, *arguments: Any) -> None:
        built.append(arguments)
        construct(self, *arguments)

    monkeypatch.setattr(Cvae, "__init__", counted)
    monkeypatch.setattr(Slurm, "preemption", lambda self, partition: ("OFF", 0))
    place = Place("site", ClusterConfig(executor="slurm", tflops_per_gpu=1e-6), "requested")
    experiment = Experiment.model_validate(tiny_experiment())
    facts = dict(experiment_facts(experiment, place, Placement(1, 2), has_slurm=True))
    # Each of the three needs the model.
    assert {"model", "expected", "grace"} <= set(facts)
    assert len(built) == 1
