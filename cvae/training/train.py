"""The training loop: what every rank of a run does, from its experiment.yaml to its last checkpoint."""

import signal
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch

from cvae.config.experiment import Experiment
from cvae.data.draws import BatchOrder
from cvae.data.experiment_data import ExperimentData, open_data
from cvae.data.feed import micro_batches, training_feed
from cvae.distributed.precision import before_cuda
from cvae.distributed.ranks import Ranks, connect
from cvae.distributed.watchdog import Watchdog, watched
from cvae.errors import UserError, in_words
from cvae.evaluation.elbo import evaluate_elbo
from cvae.models.cvae import build_model
from cvae.models.published import load_published
from cvae.preflight import inspection
from cvae.run import checkpoint
from cvae.run.directory import RunDirectory
from cvae.run.provenance import facts
from cvae.run.training_lock import exclusively
from cvae.sampling import pictures
from cvae.training.engine import build_engine
from cvae.training.rates import SKIPPED_AT_MOST, Meter
from cvae.training.run_logger import Record, open_record
from cvae.training.schedule import kl_weight, learning_rate


class Outcome(NamedTuple):
    """How a call of train() ended."""

    status: str
    """finished | failed | stopped (by a signal, with everything saved)."""
    step: int
    reason: str
    signals: tuple[str, ...] = ()
    """The names of the signals that stopped it."""


class StopFlag:
    """Set by SIGTERM (preemption, scancel) and SIGUSR2 (time limit); acted on at a step's boundary only."""

    def __init__(self) -> None:
        self.signal: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._set)

    def _set(self, number: int, frame: Any) -> None:
        self.signal = signal.Signals(number).name


def train(run_path: Path, mirrored: bool = True) -> Outcome:
    """Trains a run from where it is to its end; called once in every rank's process.

    The ranks find each other by torch's own environment variables. mirrored: whether MLflow is told while
    the run goes on; what the journal holds can be brought there later too. Raises UserError where another process
    trains this run already; where data or nodes are not as they must be; and whatever went wrong otherwise. But
    for the first, it has been written to the journal by then.
    """
    run = RunDirectory(run_path)
    stop = StopFlag()
    with suppress(UserError):  # of an unreadable experiment.yaml, which is reported below
        before_cuda(run.experiment().training)
    with (
        connect() as ranks,
        watched(ranks) as watchdog,
        exclusively(run, ranks),
        open_record(run, ranks, mirrored) as record,
    ):
        try:
            outcome = _train(run, run.experiment(), ranks, record, stop, watchdog)
        except BaseException as error:
            what = str(error)
            if not isinstance(error, UserError):
                what = f"rank 0 on {socket.gethostname()}: {in_words(error)}"
            record.end("failed", record.step, what)
            raise
        record.end(outcome.status, outcome.step, outcome.reason)
        return outcome


def _train(
    run: RunDirectory,
    experiment: Experiment,
    ranks: Ranks,
    record: Record,
    stop: StopFlag,
    watchdog: Watchdog,
) -> Outcome:
    data = inspection.everywhere(ranks, lambda: open_data(experiment))
    _check_fit(run, experiment, data, ranks, record)
    model = build_model(experiment.model, data.image_shape, data.condition_dim, experiment.seed)
    need = inspection.need_of(experiment, model, ranks.world_size, run.checkpoints, record.begun)
    record.preflight(inspection.check(run.checkpoints, ranks, need, data.digest))
    if experiment.model.standardize_condition:
        # One rank reads all of the embeddings; the others would, too, from the same file system.
        statistics = ranks.tell(data.text_statistics() if ranks.is_first else None)
        assert statistics is not None
        model.set_condition_statistics(*map(torch.from_numpy, statistics))
    saved = _newest(run, ranks, record)
    if saved is None and experiment.model.init_from is not None:
        load_published(model, experiment.model, experiment.model.init_from)
    engine = build_engine(model, experiment, ranks)
    step, skipped = 0, 0
    if saved is not None:
        engine.restore(saved)
        step = saved.state["step"]
        if saved.state["best_val_loss"] is not None:
            record.saver.best = saved.state["best_val_loss"]
        skipped = saved.state.get("skipped_updates", 0)  # older checkpoints lack it
    record.start(step=step, engine=engine.name, **facts(data, ranks, engine.precision))

    total = experiment.total_steps(len(data.train_rows))
    batch_size, micro = experiment.training.global_batch_size, experiment.training.micro_batch_size
    order = BatchOrder(experiment.seed, data.train_rows, batch_size, model.latent_shape)
    share = ranks.share(batch_size)
    meter = Meter(model, experiment, ranks, engine.precision, total, skipped)

    def draw() -> None:
        averaged = engine.eval_model
        if ranks.is_first:
            images = pictures.training_pictures(averaged, data, experiment, ranks.device)
            record.pictures(step, images)

    def save(val_loss: float | None) -> bool:
        """Returns whether there was something to save: weights and Adam's state that are all finite."""
        record.saver.wait()  # only what has been written counts as the best so far
        best = record.saver.best
        is_best = val_loss is not None and val_loss < best
        best = val_loss if val_loss is not None and is_best else best
        state = {"step": step, "best_val_loss": best, "skipped_updates": meter.skipped}
        snapshot = engine.snapshot(state)
        # The last update is seen in no loss yet.
        finite = ranks.tell(snapshot.is_finite() if ranks.is_first else True)
        if ranks.is_first and finite:
            record.checkpoint(snapshot, experiment.checkpoint.keep, is_best)
        return finite

    if step == 0:
        # The untrained model's pictures: the beginning of MLflow's slider.
        draw()
    if step < total:
        engine.settle(
            micro_batches(data, data.train, order.batch(step), share, micro, ranks.device)
        )
    meter.restart()
    # The ranks vote on stopping while they compute a step: asked before it, answered after it.
    answer = ranks.ask_any(stop.signal is not None) if step < total else None
    feed = training_feed(data, order, range(step, total), share, micro, ranks.device)
    for batch in meter.waiting(feed):
        lr = learning_rate(experiment.optimizer, step, total)
        watchdog.begin()
        sums = engine.step(batch, lr, kl_weight(experiment.model, step))
        step += 1
        watchdog.beat(step)
        meter.note(step, sums)

        evaluates = _crosses_epoch(step, total, experiment, len(data.train_rows))
        interval = experiment.checkpoint.every_steps
        saves = evaluates or (interval is not None and step % interval == 0)
        stops = answer is not None and answer()

        if saves or stops or meter.is_due(step):
            metrics = meter.read(step, sums)
            if meter.bad_step is not None:
                watchdog.rest()
                record.saver.wait()
                if meter.skipped >= SKIPPED_AT_MOST:
                    reason = _overflows(run, meter)
                else:
                    what = f"the loss or its gradient is not finite at step {meter.bad_step}"
                    reason = _not_finite(run, what)
                return Outcome("failed", meter.bad_step, reason)
            if meter.is_due(step):
                record.step_metrics(step, metrics)
        if saves or stops:
            watchdog.rest()
        val_loss = None
        if evaluates:
            val = evaluate_elbo(engine.eval_model, data, data.val, experiment, ranks)
            record.epoch(step, step * batch_size / len(data.train_rows), val)
            val_loss = val["loss"]
            draw()
        if (saves or stops) and not save(val_loss):
            record.saver.wait()
            what = f"weights or Adam's state are not finite after step {step}"
            return Outcome("failed", step, _not_finite(run, what))
        if saves or stops:
            meter.restart()
        if stops and step < total:
            record.saver.finish()
            signals = tuple(sorted({name for name in ranks.gather(stop.signal or "") if name}))
            reason = f"{', '.join(signals)} at step {step}, saved"
            return Outcome("stopped", step, reason, signals)
        answer = ranks.ask_any(stop.signal is not None) if step < total else None
    record.final_model()
    return Outcome("finished", total, "")


def _newest(run: RunDirectory, ranks: Ranks, record: Record) -> checkpoint.TrainingState | None:
    """The newest intact checkpoint, the same on all ranks; None where there is none yet."""
    # Rank 0 chooses, so that ranks whose view of the shared file system differs cannot disagree.
    found = checkpoint.load_newest(run.checkpoints, record.notice) if ranks.is_first else None
    chosen = ranks.tell(None if found is None else found.state["step"])
    return None if chosen is None else found or checkpoint.load_step(run.checkpoints, chosen)


def _check_fit(
    run: RunDirectory, experiment: Experiment, data: ExperimentData, ranks: Ranks, record: Record
) -> None:
    experiment.check_ranks(ranks.world_size)
    before = record.data_digest
    if before is not None and before != data.digest:
        raise UserError(
            f"{run.name} was trained on other data than {data.store.path} holds now (digest"
            f" {before[:12]}, now {data.digest[:12]}); prepare the data as it was, or start a new run"
        )


def _crosses_epoch(step: int, total: int, experiment: Experiment, n_train: int) -> bool:
    """Whether an evaluation follows this step: at every eval_every-th epoch's end, and at the run's."""
    per_evaluation = experiment.training.eval_every * n_train
    seen = step * experiment.training.global_batch_size
    before = seen - experiment.training.global_batch_size
    return step == total or seen // per_evaluation > before // per_evaluation


def _not_finite(run: RunDirectory, what: str) -> str:
    return (
        f"{what}; {_kept(run)}; try a lower optimizer.lr, optimizer.warmup_steps or"
        " optimizer.clip_norm"
    )


def _overflows(run: RunDirectory, meter: Meter) -> str:
    return (
        f"the gradient overflows in fp16 at every loss scale: {meter.skipped} updates in a row were skipped up to"
        f" step {meter.bad_step}; {_kept(run)}; try training.precision=fp32 (or bf16, on an A100 or later)"
    )


def _kept(run: RunDirectory) -> str:
    saved = checkpoint.steps(run.checkpoints)
    return f"the last good checkpoint is {saved[-1]}" if saved else "there was no checkpoint yet"
