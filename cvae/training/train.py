"""The training loop: what every rank of a run does, from its experiment.yaml to its last checkpoint."""

import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from cvae.config.experiment import Experiment
from cvae.data.draws import BatchOrder
from cvae.data.experiment_data import ExperimentData, open_data
from cvae.data.feed import MicroBatch, micro_batches, training_feed
from cvae.distributed.precision import before_cuda
from cvae.distributed.ranks import Ranks, connect
from cvae.distributed.stop_flag import StopFlag
from cvae.distributed.watchdog import Watchdog, watched
from cvae.errors import UserError, in_words
from cvae.evaluation.elbo import evaluate_elbo
from cvae.models.cvae import Cvae, build_model
from cvae.models.published import load_published
from cvae.preflight import inspection
from cvae.run import checkpoint
from cvae.run.checkpoint import TrainingState
from cvae.run.directory import RunDirectory
from cvae.run.provenance import facts
from cvae.run.training_lock import exclusively
from cvae.sampling import pictures
from cvae.training.engine import build_engine
from cvae.training.optimization import kl_weight, learning_rate
from cvae.training.rates import SKIPPED_AT_MOST, Meter
from cvae.training.run_logger import RunLogger, open_logger


class TrainingResult(NamedTuple):
    """How a call of train() ended."""

    status: str
    """finished | failed | stopped (by a signal, with everything saved)."""
    step: int
    reason: str
    signals: tuple[str, ...] = ()
    """The names of the signals that stopped it."""


class Diverged(Exception):
    """Training cannot go on: a loss, gradient or weight is not finite. Raised on all ranks together."""

    def __init__(self, step: int, reason: str):
        super().__init__(reason)
        self.step = step


def train(run_path: Path, mirrored: bool = True) -> TrainingResult:
    """Trains a run to its end from wherever it is; called once in every rank's process.

    The ranks find each other by torch's environment variables. mirrored: whether MLflow follows while the run
    goes on; the journal can be pushed there later too. Raises UserError if another process trains this run, or if
    data or nodes do not fit; other errors pass through. All but the first are in the journal by then.
    """
    run = RunDirectory(run_path)
    stop = StopFlag()
    with suppress(UserError):  # of an unreadable experiment.yaml, which is reported below
        before_cuda(run.experiment().training)
    with (
        connect() as ranks,
        watched(ranks) as watchdog,
        exclusively(run, ranks),
        open_logger(run, ranks, mirrored) as logger,
    ):
        try:
            result = _train(run.experiment(), ranks, logger, watchdog, stop)
        except Diverged as diverged:
            result = TrainingResult("failed", diverged.step, str(diverged))
        except BaseException as error:
            reason = str(error)
            if not isinstance(error, UserError):
                reason = f"rank 0 on {socket.gethostname()}: {in_words(error)}"
            logger.end("failed", logger.step, reason)
            raise
        logger.end(result.status, result.step, result.reason)
        return result


def _train(
    experiment: Experiment, ranks: Ranks, logger: RunLogger, watchdog: Watchdog, stop: StopFlag
) -> TrainingResult:
    data, model, saved = _open(experiment, ranks, logger)
    trainer = Trainer(experiment, data, model, ranks, logger, watchdog)
    trainer.restore(saved)
    for batch in trainer.batches():
        vote = ranks.ask_any(bool(stop))  # the answers come in while the step is computed
        trainer.update(batch)
        stops = vote()
        saves = stops or trainer.save_is_due()
        if saves or trainer.log_is_due():
            trainer.log()
        if saves:
            watchdog.rest()
            trainer.save(trainer.evaluate())
        if stops and trainer.step < trainer.total_steps:
            logger.checkpoints.finish()
            signals = tuple(sorted(set(filter(None, ranks.gather(stop.signal)))))
            reason = f"{', '.join(signals)} at step {trainer.step}, saved"
            return TrainingResult("stopped", trainer.step, reason, signals)
    logger.final_model()
    return TrainingResult("finished", trainer.total_steps, "")


def _open(
    experiment: Experiment, ranks: Ranks, logger: RunLogger
) -> tuple[ExperimentData, Cvae, TrainingState | None]:
    """Returns the data, the initial model and the checkpoint to continue from; None for a new run.

    Raises UserError if the ranks, the data or the nodes do not fit the run.
    """
    checkpoints = logger.run.checkpoints
    data = ranks.everywhere(lambda: open_data(experiment))
    experiment.check_ranks(ranks.world_size)
    if logger.data_digest not in (None, data.digest):
        raise UserError(
            f"{logger.run.name} was trained on other data than {data.store.path} holds now (digest"
            f" {str(logger.data_digest)[:12]}, now {data.digest[:12]}); prepare the data as it was, or start a"
            " new run"
        )
    model = build_model(experiment.model, data.image_shape, data.condition_dim, experiment.seed)
    need = inspection.need_of(experiment, model, ranks.world_size, checkpoints, logger.begun)
    logger.preflight(inspection.check(checkpoints, ranks, need, data.digest))
    if experiment.model.standardize_condition:
        # One rank reads all of the embeddings, which spares the file system the others.
        statistics = ranks.tell(data.text_statistics() if ranks.is_first else None)
        assert statistics is not None
        model.set_condition_statistics(*map(torch.from_numpy, statistics))
    saved = _newest_checkpoint(checkpoints, ranks, logger)
    if saved is None and experiment.model.init_from is not None:
        load_published(model, experiment.model, experiment.model.init_from)
    return data, model, saved


def _newest_checkpoint(folder: Path, ranks: Ranks, logger: RunLogger) -> TrainingState | None:
    """Returns the newest intact checkpoint, the same on all ranks; None if there is none yet."""
    # Rank 0 chooses: ranks may see different states of the shared file system.
    newest = checkpoint.load_newest(folder, logger.notice) if ranks.is_first else None
    step = ranks.tell(None if newest is None else newest.state["step"])
    return None if step is None else newest or checkpoint.load_step(folder, step)


class Trainer:
    """A run's training on this rank. All ranks call every method together."""

    def __init__(
        self,
        experiment: Experiment,
        data: ExperimentData,
        model: Cvae,
        ranks: Ranks,
        logger: RunLogger,
        watchdog: Watchdog,
    ):
        self.experiment, self.data = experiment, data
        self.ranks, self.logger, self.watchdog = ranks, logger, watchdog
        self.step = 0
        self.n_train = len(data.train_rows)
        self.total_steps = experiment.total_steps(self.n_train)
        self.engine = build_engine(model, experiment, ranks)
        self.meter = Meter(model, experiment, ranks, self.engine.precision, self.total_steps)
        self.latent_shape = model.latent_shape
        self.sums = torch.zeros(4)
        """What Engine.step returned last."""

    def restore(self, saved: TrainingState | None) -> None:
        """Continues from a checkpoint; without one, draws what the untrained model generates."""
        if saved is not None:
            self.engine.restore(saved)
            self.step = saved.state["step"]
            if saved.state["best_val_loss"] is not None:
                self.logger.checkpoints.best = saved.state["best_val_loss"]
            self.meter.skipped = saved.state.get("skipped_updates", 0)  # absent in older ones
        known = facts(self.data, self.ranks, self.engine.precision)
        self.logger.start(step=self.step, engine=self.engine.name, **known)
        if self.step == 0:
            self._draw()

    def batches(self) -> Iterator[list[MicroBatch]]:
        """Yields this rank's micro-batches of each step that is still to be done."""
        training, device = self.experiment.training, self.ranks.device
        size, micro = training.global_batch_size, training.micro_batch_size
        order = BatchOrder(self.experiment.seed, self.data.train_rows, size, self.latent_shape)
        share = self.ranks.share(size)
        if self.step < self.total_steps:
            batch = order.batch(self.step)
            first = micro_batches(self.data, self.data.train, batch, share, micro, device)
            self.engine.settle(first)
        self.meter.restart()
        steps = range(self.step, self.total_steps)
        yield from self.meter.waiting(training_feed(self.data, order, steps, share, micro, device))

    def update(self, batch: list[MicroBatch]) -> None:
        """Makes one step."""
        lr = learning_rate(self.experiment.optimizer, self.step, self.total_steps)
        self.watchdog.begin()
        self.sums = self.engine.step(batch, lr, kl_weight(self.experiment.model, self.step))
        self.step += 1
        self.watchdog.beat(self.step)
        self.meter.note(self.step, self.sums)

    def log_is_due(self) -> bool:
        return self.meter.is_due(self.step)

    def evaluation_is_due(self) -> bool:
        """Returns whether this step ends an eval_every-th epoch, or the run."""
        per_evaluation = self.experiment.training.eval_every * self.n_train
        seen = self.step * self.experiment.training.global_batch_size
        before = seen - self.experiment.training.global_batch_size
        ends = seen // per_evaluation > before // per_evaluation
        return ends or self.step == self.total_steps

    def save_is_due(self) -> bool:
        interval = self.experiment.checkpoint.every_steps
        return self.evaluation_is_due() or (interval is not None and self.step % interval == 0)

    def log(self) -> None:
        """Reads the measurements since the last call and logs them if a point is due.

        Raises Diverged if a loss or gradient was not finite, or too many updates in a row were skipped.
        """
        metrics = self.meter.read(self.step, self.sums)
        if self.meter.bad_step is not None:
            self.watchdog.rest()
            if self.meter.skipped >= SKIPPED_AT_MOST:
                raise self._overflowed(self.meter.bad_step)
            where = f"the loss or its gradient is not finite at step {self.meter.bad_step}"
            raise self._not_finite(self.meter.bad_step, where)
        if self.log_is_due():
            self.logger.step_metrics(self.step, metrics)

    def evaluate(self) -> float | None:
        """Returns val/loss if an evaluation is due, after logging it and drawing; else None."""
        if not self.evaluation_is_due():
            return None
        data, model = self.data, self.engine.eval_model
        metrics = evaluate_elbo(model, data, data.val, self.experiment, self.ranks)
        epoch = self.step * self.experiment.training.global_batch_size / self.n_train
        self.logger.epoch(self.step, epoch, metrics)
        self._draw()
        return metrics["loss"]

    def save(self, val_loss: float | None) -> None:
        """Saves a checkpoint, the best one if val_loss is the lowest so far; training goes on meanwhile.

        Raises Diverged if weights or Adam's state are not finite: no loss has shown the last update yet.
        """
        checkpoints = self.logger.checkpoints
        checkpoints.wait()  # only a checkpoint that has been written counts as the best so far
        is_best = val_loss is not None and val_loss < checkpoints.best
        state = self.engine.snapshot(
            {
                "step": self.step,
                "best_val_loss": val_loss if is_best else checkpoints.best,
                "skipped_updates": self.meter.skipped,
            }
        )
        if not self.ranks.tell(state.is_finite() if self.ranks.is_first else True):
            where = f"weights or Adam's state are not finite after step {self.step}"
            raise self._not_finite(self.step, where)
        if self.ranks.is_first:
            self.logger.checkpoint(state, self.experiment.checkpoint.keep, is_best)
        self.meter.restart()

    def _draw(self) -> None:
        averaged = self.engine.eval_model
        if self.ranks.is_first:
            images = pictures.training_pictures(averaged, self.data, self.experiment.seed)
            self.logger.pictures(self.step, images)

    def _not_finite(self, step: int, where: str) -> Diverged:
        return Diverged(
            step,
            f"{where}; {self._last_checkpoint()}; try a lower optimizer.lr, optimizer.warmup_steps or"
            " optimizer.clip_norm",
        )

    def _overflowed(self, step: int) -> Diverged:
        return Diverged(
            step,
            f"the gradient overflows in fp16 at every loss scale: {self.meter.skipped} updates in a row were"
            f" skipped up to step {step}; {self._last_checkpoint()}; try training.precision=fp32 (or bf16, on an"
            " A100 or later)",
        )

    def _last_checkpoint(self) -> str:
        self.logger.checkpoints.wait()
        saved = checkpoint.steps(self.logger.run.checkpoints)
        return (
            f"the last good checkpoint is {saved[-1]}" if saved else "there was no checkpoint yet"
        )
