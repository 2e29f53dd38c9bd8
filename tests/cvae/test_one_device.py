"""No tensor of the CPU meets one of the GPU: PyTorch's meta device stands for a GPU that no machine here has."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cvae.config.experiment import Experiment
from cvae.data import feed
from cvae.data.draws import BatchOrder
from cvae.data.experiment_data import open_data
from cvae.distributed.ranks import Ranks
from cvae.evaluation.elbo import evaluate_elbo
from cvae.evaluation.evaluation_input import EvaluationInput
from cvae.evaluation.iwae import evaluate_iwae
from cvae.models.cvae import build_model
from cvae.sampling import inference
from cvae.training import engine as engine_module
from cvae.training.engine import build_engine
from tests.conftest import tiny_experiment

GPU = torch.device("meta")
aten = torch.ops.aten


class OneDevice(TorchDispatchMode):
    """Fails where an operation mixes devices, as on a GPU. What is read from the GPU is 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket
        tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        if any(one.is_meta for one in tensors):
            if name in (aten._local_scalar_dense, aten.item):
                return torch.ones((), dtype=args[0].dtype).item()
            to_cpu = torch.device("cpu") in [*args[1:], *kwargs.values()]
            if name in (aten._to_copy, aten.to) and to_cpu:
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            # The CPU's scalars and indices may take part.
            from_cpu = [one for one in tensors if not one.is_meta and one.dim() > 0]
            assert not from_cpu or name in (aten.copy_, aten.index, aten.index_put_), str(func)
        return func(*args, **kwargs)


@pytest.mark.parametrize(
    "model",
    [
        {"backbone": "conv", "fusion": "film", "prior": "text"},
        {"backbone": "resnet", "fusion": "add", "likelihood": "optimal_gaussian"},
        {"backbone": "ldm", "fusion": "concat"},
        {"backbone": "mlp", "likelihood": "bernoulli"},
    ],
    ids=lambda model: str(model["backbone"]),
)
@pytest.mark.filterwarnings("ignore:for .*copying from a non-meta parameter")
def test_training_and_measures_keep_to_the_gpu(
    tiny_captioned_store: object, model: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Neither is there for the meta device.
    monkeypatch.setattr(feed, "_to", lambda device, array: torch.from_numpy(array).to(device))
    monkeypatch.setattr(
        engine_module,
        "build_adam",
        lambda model, _: torch.optim.AdamW(model.parameters(), foreach=False),
    )
    plain: dict[str, Any] = tiny_experiment(captioned=True, ema_decay=0.9)
    plain["model"] |= {
        **model,
        "conv": {"width": 4},
        "resnet": {"width": 4, "blocks": 1},
        "ldm": {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4},
    }
    experiment = Experiment.model_validate(plain)
    ranks, data = Ranks(0, 1, GPU, None), open_data(experiment)
    made = build_model(experiment.model, data.image_shape, data.condition_dim, 0)
    with OneDevice():
        engine = build_engine(made, experiment, ranks)
        order = BatchOrder(0, data.train_rows, 4, made.latent_shape)
        batch = order.batch(0)
        micros = feed.micro_batches(data, data.train, batch, slice(0, 4), 2, GPU)
        assert engine.step(micros, 1e-3, 1.0).is_meta
        saved = engine.snapshot({})
        loaded = {
            part: {name: value.cpu() for name, value in tensors.items()}
            for part, tensors in saved.tensors.items()
        }
        engine.restore(saved._replace(tensors=loaded))
        engine.step(micros, 1e-3, 1.0)
        averaged = engine.eval_model
        evaluate_elbo(averaged, data, data.val, experiment, ranks)
        trained: Any = SimpleNamespace(model=averaged, data=data, experiment=experiment)
        evaluate_iwae(EvaluationInput(trained, data.val, ranks, lambda done: None), 2)
        condition = data.condition(data.val, np.arange(2), np.zeros(2))
        assert len(inference.sample(averaged, batch.noise[:2], condition)) == 2
