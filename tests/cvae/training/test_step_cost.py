"""A guard of speed that no busy machine disturbs: it counts operations instead of seconds."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from cvae.config.experiment import Experiment
from cvae.data.draws import BatchOrder
from cvae.data.experiment_data import open_data
from cvae.data.feed import micro_batches
from cvae.distributed.ranks import Ranks
from cvae.models.cvae import build_model
from cvae.training.engine import build_engine
from cvae.training.rates import Meter
from tests.conftest import tiny_experiment
from tests.studies.benchmarks.contestants import Subject, bare

# What reads a number on the host: on a GPU it waits for everything before it.
_WAITING = {"aten._local_scalar_dense.default", "aten.nonzero.default", "aten.equal.default"}
_HERE = torch.device("cpu")


class _Counted(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("more", [{}, {"clip_norm": 1.0}])
def test_a_step_of_the_loop_is_little_more_than_the_bare_one(
    tiny_store: Path, more: dict[str, float]
) -> None:
    tree = tiny_experiment(precision="fp32")
    tree["optimizer"] |= more
    experiment = Experiment.model_validate(tree)
    data = open_data(experiment)
    model = build_model(experiment.model, data.image_shape, data.condition_dim, experiment.seed)
    ranks = Ranks(0, 1, _HERE, None)
    engine = build_engine(model, experiment, ranks)
    meter = Meter(model, experiment, ranks, engine.precision, total_steps=100)
    batch_size = experiment.training.global_batch_size
    order = BatchOrder(experiment.seed, data.train_rows, batch_size, model.latent_shape)
    limit = bare(Subject(experiment, data, "fp32", _HERE, None))
    # The first steps make Adam's state.
    limit.step()
    engine.step(_batch(data, order, 0, batch_size), 1e-3, 1.0)
    with _Counted() as bare_step:
        limit.step()
    with _Counted() as whole_step:
        meter.note(2, engine.step(_batch(data, order, 1, batch_size), 1e-3, 1.0))
    assert not _WAITING & whole_step.seen.keys()
    extra = whole_step.seen.total() - bare_step.seen.total()
    # The norm of the gradient, the sums that the journal holds; clipping if it is on.
    assert extra <= (22 if more else 17), whole_step.seen - bare_step.seen


def _batch(data: Any, order: BatchOrder, step: int, size: int) -> Any:
    return micro_batches(data, data.train, order.batch(step), slice(0, size), None, _HERE)
