"""Measures the training loop without making the device wait between two points of the curve."""

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from cvae.config import Experiment
from cvae.models.cvae import Cvae
from cvae.training.ranks import Ranks
from cvae.training.schedule import kl_weight, learning_rate

T = TypeVar("T")
_NEVER = torch.iinfo(torch.int64).max


class Meter:
    """Rate, share of time spent waiting for data, and the first step whose loss or gradient was not finite."""

    def __init__(
        self, model: Cvae, experiment: Experiment, ranks: Ranks, precision: str, total_steps: int
    ):
        """precision: as the engine has resolved it."""
        self.model, self.experiment, self.ranks = model, experiment, ranks
        self.total_steps = total_steps
        self.bad_step: int | None = None
        self._noted: list[tuple[int, Tensor]] = []
        # With loss scaling an overflow of the gradient is expected: the scaler skips that update by itself.
        self._watched = slice(0, 3) if precision == "fp16" else slice(0, 4)
        self.restart()

    def restart(self) -> None:
        """Begins a new interval: what came before (an evaluation, a save) is not training."""
        self._since = time.perf_counter()
        self._waited = 0.0
        self._steps = 0

    def waiting(self, feed: Iterable[T]) -> Iterator[T]:
        """The feed's own items, with the time that each was waited for added up."""
        iterator = iter(feed)
        while True:
            asked = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._waited += time.perf_counter() - asked
            yield item

    def note(self, step: int, sums: Tensor) -> None:
        """Takes the result of Engine.step; it stays on the device, unread."""
        self._steps += 1
        self._noted.append((step, sums))

    def is_due(self, step: int) -> bool:
        """Whether the training curve has a point at this step."""
        return (
            step == 1 or step % self.experiment.training.log_every == 0 or step == self.total_steps
        )

    def read(self, step: int, sums: Tensor) -> dict[str, float]:
        """This step's metrics over the whole global batch; sets bad_step. All ranks call it together."""
        self.bad_step = self._first_bad()
        recon_loss, kl, loss = self.ranks.sum(sums[:3].clone()).tolist()
        elapsed = time.perf_counter() - self._since
        batch_size = self.experiment.training.global_batch_size
        metrics = {
            "loss": loss,
            "recon_loss": recon_loss,
            "kl": kl,
            "bits_per_dim": self.model.bits_per_dim(recon_loss + kl),
            "grad_norm": float(sums[3]),
            "learning_rate": learning_rate(self.experiment.optimizer, step - 1, self.total_steps),
            "beta": kl_weight(self.experiment.model, step - 1),
            "images_per_second": self._steps * batch_size / elapsed,
            "data_wait_share": self._waited / elapsed,
        }
        self.restart()
        return metrics

    def _first_bad(self) -> int | None:
        """The first step since the last reading that is not finite on some rank."""
        noted, self._noted = self._noted, []
        # One look at all steps of the interval: one after each step would cost a small model some percent.
        finite = torch.stack([sums[self._watched] for _, sums in noted]).isfinite().all(1)
        steps = torch.tensor([step for step, _ in noted], device=finite.device)
        first = int(self.ranks.min(torch.where(finite, _NEVER, steps).min()).item())
        return None if first == _NEVER else first
