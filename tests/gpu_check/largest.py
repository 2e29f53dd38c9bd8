"""Training, evaluation, IWAE and sampling at the largest batches that fit, beside what users get."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cvae.config.experiment import Experiment
from cvae.data.draws import BatchOrder
from cvae.data.experiment_data import ExperimentData, open_data
from cvae.data.feed import MicroBatch, micro_batches
from cvae.distributed import precision
from cvae.distributed.ranks import Ranks, connect
from cvae.evaluation.elbo import evaluate_elbo
from cvae.evaluation.evaluation_input import EvaluationInput
from cvae.evaluation.iwae import evaluate_iwae
from cvae.models.cvae import Cvae
from cvae.sampling import inference
from cvae.sampling.inference import sample
from cvae.sampling.sampler import load_run
from cvae.training.engine import build_engine
from cvae.training.train import train
from tests.gpu_check import clock, runs
from tests.gpu_check.curves import wait
from tests.gpu_check.findings import Finding, judged, measured, skipped
from tests.gpu_check.setting import Setting

_DRAWS, _DIFFERENT = 8, 64


def largest(setting: Setting) -> Iterator[Finding]:
    for backbone in ("conv", "ldm"):
        try:
            yield from _largest(setting, backbone)
        except ModuleNotFoundError as error:
            yield skipped(backbone, f"needs the package {error.name}")


def _largest(setting: Setting, backbone: str) -> Iterator[Finding]:
    experiment = setting.experiment(backbone, precision="auto", max_steps=2)
    run = runs.new_run(f"largest-{backbone}", experiment)
    train(run.path, mirrored=False)
    trained = load_run(run)
    most = 64 if setting.small else 2**17
    with connect() as ranks:
        data, model = open_data(experiment), trained.model
        actions = _actions(experiment, data, model, ranks)
        tries = torch.backends.cudnn.benchmark
        # To try every kernel for every size would take most of the time.
        torch.backends.cudnn.benchmark = False
        for what, action in actions.items():
            fit = clock.largest(action, ranks.device, most)
            if fit is None:
                yield judged(f"{backbone}: {what}", False, "not one image fits", "at least one")
                continue
            memory = (
                f", {fit.peak_bytes / fit.images / 2**20:.2f} MiB an image"
                if fit.peak_bytes
                else ""
            )
            yield measured(
                f"{backbone}: {what}",
                f"{fit.images:,} at once, {fit.images_per_second:,.0f} images/s{memory}",
                f"ended because {fit.ended_by}",
                images=fit.images,
                images_per_second=fit.images_per_second,
                peak_bytes=fit.peak_bytes,
            )
        torch.backends.cudnn.benchmark = tries
        yield _same_in_any_batch(experiment, data, model, ranks)
        yield from _as_users_have_it(setting, backbone, trained, ranks)


def _actions(
    experiment: Experiment, data: ExperimentData, model: Cvae, ranks: Ranks
) -> dict[str, Callable[[int], object]]:
    """What takes a number of images at once; the images repeat, the work does not depend on that."""
    name = precision.resolve(experiment.training.precision, ranks.device)
    engine = build_engine(model, experiment, ranks)

    def train_step(count: int) -> None:
        model.train()
        engine.step([_batch(data, model, count, ranks)], 0.0, 1.0)

    @torch.inference_mode()
    def evaluate(count: int) -> Tensor:
        model.eval()
        with precision.autocast(name, ranks.device):
            return model(*_batch(data, model, count, ranks)).recon_loss.sum()

    @torch.inference_mode()
    def draw_weights(count: int) -> Tensor:
        """count: decoded images, of eight draws each where there are so many."""
        model.eval()
        draws = min(_DRAWS, count)
        batch = _batch(data, model, count // draws, ranks)
        noise = torch.stack([batch.noise] * draws)
        return model.log_weights(batch.images, batch.images, batch.condition, noise)

    @torch.inference_mode()
    def draw(count: int) -> Tensor:
        model.eval()
        batch = _batch(data, model, count, ranks)
        z = model.draw_latent(batch.noise, batch.condition)
        return inference.to_bytes(model.decode(z, batch.condition))

    return {
        "a training step": train_step,
        "evaluation": evaluate,
        "IWAE, decoded": draw_weights,
        "sampling": draw,
    }


def _batch(data: ExperimentData, model: Cvae, count: int, ranks: Ranks) -> MicroBatch:
    """Returns some images again and again: to gather so many would take the host longer than the GPU."""
    some = min(count, _DIFFERENT)
    order = BatchOrder(0, data.train_rows, some, model.latent_shape)
    few = micro_batches(data, data.train, order.batch(0), slice(0, some), None, ranks.device)[0]
    times = -(-count // some)
    images, noise = (torch.cat([part] * times)[:count] for part in (few.images, few.noise))
    condition = None if few.condition is None else torch.cat([few.condition] * times)[:count]
    return MicroBatch(images, condition, noise)


def _same_in_any_batch(
    experiment: Experiment, data: ExperimentData, model: Cvae, ranks: Ranks
) -> Finding:
    """The losses of some images, one at a time and all at once, in fp32."""
    model.eval()
    count = 8
    with torch.inference_mode():
        whole = _batch(data, model, count, ranks)
        together = model(*whole).recon_loss
        alone = [
            model(*(None if part is None else part[n : n + 1] for part in whole)).recon_loss
            for n in range(count)
        ]
    off = float(((torch.cat(alone) - together) / together).abs().max())
    return judged(
        f"{experiment.model.backbone}: an image's loss alone and among {count}",
        off <= 1e-4,
        f"{off:.1e} apart",
        "at most 1e-4: other kernels may add in another order",
        deviation=off,
    )


def _as_users_have_it(
    setting: Setting, backbone: str, trained: Any, ranks: Ranks
) -> Iterator[Finding]:
    """evaluate_elbo, evaluate_iwae and sample choose their batches themselves."""
    model, data, experiment = trained.model, trained.data, trained.experiment
    count = len(data.val)
    subject = EvaluationInput(trained, data.val, ranks, lambda images: None)
    draws = 2 if setting.small else _DRAWS
    rows = np.arange(count)
    condition = data.condition(data.val, rows, np.zeros(count))
    noise = trained.noise(count)
    uses: dict[str, tuple[int, Callable[[], Any]]] = {
        "evaluate_elbo": (count, lambda: evaluate_elbo(model, data, data.val, experiment, ranks)),
        f"evaluate_iwae, {draws} draws": (draws * count, lambda: evaluate_iwae(subject, draws)),
        "sample": (count, lambda: sample(model, noise, condition, lambda images: None)),
    }
    for what, (images, use) in uses.items():
        model.eval()
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(ranks.device)
        use()
        wait(ranks.device)
        began = time.perf_counter()
        found = use()
        wait(ranks.device)
        per_second = images / (time.perf_counter() - began)
        peak = torch.cuda.max_memory_allocated(ranks.device) if setting.has_gpu else 0
        if isinstance(found, dict):
            good, shown = all(np.isfinite(list(found.values()))), "finite"
        else:
            good, shown = found.shape == (count, *model.shape) and found.std() > 0, "not all alike"
        memory = f", at most {peak / 2**30:.2f} GiB" if peak else ""
        yield judged(
            f"{backbone}: {what} of {count} images, as users have it",
            bool(good),
            f"{per_second:,.0f} images/s{memory}",
            f"beside the rates above; its results are {shown}",
            images_per_second=per_second,
            peak_bytes=peak,
        )
