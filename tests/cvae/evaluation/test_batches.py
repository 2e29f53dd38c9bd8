"""How many images go through a model at once: what memory holds, and no number depends on it."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cvae.distributed.device import Memory
from cvae.distributed.ranks import Ranks
from cvae.evaluation import iwae
from cvae.evaluation.elbo import evaluate_elbo
from cvae.evaluation.evaluation_input import EvaluationInput
from cvae.evaluation.frechet import RandomFeatures, evaluate_frechet
from cvae.evaluation.iwae import evaluate_iwae
from cvae.evaluation.latents import active_units, probe
from cvae.evaluation.reconstruction import evaluate_reconstruction
from cvae.models.cvae import Cvae
from cvae.sampling import inference
from cvae.sampling.sampler import load_run
from cvae.sampling.trained_model import TrainedModel
from tests.helpers.trained_runs import make_run

ALONE = Ranks(0, 1, torch.device("cpu"), None)
GPU = torch.device("cuda")


@pytest.fixture
def trained(tiny_store: Path) -> TrainedModel:
    return load_run(make_run(), torch.device("cpu"))


def everything(
    trained: TrainedModel, tell: Callable[[float], object] = lambda n: None
) -> dict[str, float]:
    subject = EvaluationInput(trained, trained.data.train, ALONE, tell)
    found = evaluate_elbo(
        trained.model, trained.data, subject.split, trained.experiment, ALONE
    ) | evaluate_iwae(subject, 7)
    trained.model.eval()
    found |= active_units(subject) | probe(subject) | evaluate_reconstruction(subject).metrics
    return found | evaluate_frechet(subject, RandomFeatures(), "r64")


class SmallDevice:
    """Stands in for a device that holds so many images, by the encoder and decoder of a model."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: Cvae, room: int):
        self.room, self.most, self.refused = room, 0, 0
        for side in ("encoder", "decoder"):
            whole = getattr(model, side).forward
            monkeypatch.setattr(getattr(model, side), "forward", self._guarded(whole))

    def _guarded(self, whole: Callable[..., object]) -> Callable[..., object]:
        def forward(batch: torch.Tensor, condition: torch.Tensor | None) -> object:
            if len(batch) > self.room:
                self.refused += 1
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            self.most = max(self.most, len(batch))
            return whole(batch, condition)

        return forward


@pytest.mark.parametrize("room", [1, 3, 20])
def test_a_device_that_is_too_small_finds_the_same_numbers(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    expected = everything(trained)
    small = SmallDevice(monkeypatch, trained.model, room)
    done: list[float] = []
    found = everything(trained, done.append)
    assert small.refused > 0
    assert small.most <= room
    # Fréchet's distance is a difference of larger numbers.
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    # IWAE, active units, the probe, reconstruction and the distance tell every image once.
    assert sum(done) == pytest.approx(5 * len(trained.data.train))
    noise = trained.noise(20)
    condition = torch.eye(3).repeat(7, 1)[:20].numpy()
    drawn = inference.sample(trained.model, noise, condition)
    small.room = 100
    assert (abs(inference.sample(trained.model, noise, condition) - drawn.astype(int)) <= 1).all()


def test_a_device_without_room_for_one_image_says_so(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    SmallDevice(monkeypatch, trained.model, room=0)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        everything(trained)


def test_a_gpu_takes_what_its_free_memory_holds(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained.model
    # As many parameters as Stable Diffusion's autoencoder has: on a CPU, twelve images at once.
    monkeypatch.setattr(model, "n_parameters", lambda: 83_700_000)
    assert inference.images_at_once(model) == 12
    each = inference.memory_of_an_image(model)
    monkeypatch.setattr(inference, "device_of", lambda model: GPU)
    for free, images in ((2**36, 512), (200 * each, 100), (each, 1)):
        monkeypatch.setattr(inference, "memory", lambda device, free=free: Memory(free, 2**37))
        assert inference.images_at_once(model) == images
    # After training PyTorch holds most of a GPU, and what it does not use of that is as good as free.
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 300 * each)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 101 * each)
    assert inference.images_at_once(model) == 100


def test_memory_is_measured_by_the_largest_map(tiny_captioned_store: Path) -> None:
    # Four channels of 8×8 behind the first convolution, and two copies of 16×16 pixels in fp64.
    narrow = load_run(make_run("narrow", captioned=True), torch.device("cpu")).model
    assert inference.memory_of_an_image(narrow) == 8 * 4 * 2 * 16 * 16
    wide = load_run(make_run("wide", captioned=True), torch.device("cpu")).model
    wide.encoder.stages[0] = torch.nn.Sequential(
        torch.nn.Conv2d(1, 64, 3, padding=1), torch.nn.Conv2d(64, 4, 4, 2, 1)
    )
    assert inference.memory_of_an_image(wide) == 8 * 4 * 64 * 16 * 16


def test_iwae_decodes_no_more_draws_than_memory_holds(
    trained: TrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    subject = EvaluationInput(trained, trained.data.val, ALONE, lambda images: None)
    small = SmallDevice(monkeypatch, trained.model, room=10**6)
    whole = evaluate_iwae(subject, 40)
    assert small.most == 40 * len(subject.split)
    small.most = 0
    limit = 100 * inference.memory_of_an_image(trained.model)
    monkeypatch.setattr(iwae, "memory_for_images", lambda device: limit)
    assert evaluate_iwae(subject, 40) == pytest.approx(whole, rel=1e-6)
    assert small.most == 4 * len(subject.split)
