"""Runs in words: one line each, or everything about one."""

import time

from cvae.run_directory import RunDirectory
from cvae.training import journal
from cvae.training.preflight_checks import Network, size
from slurm.queue import Submission
from workflows.follow import epoch_line, failure_facts, mlflow_fact
from workflows.run_state import (
    Line,
    best_epoch,
    brief_status,
    last_submission,
    newest_step,
    run_state,
    submissions,
    total_steps,
)
from workflows.story import story
from workflows.text import Fact, aligned, clock, count, duration, shown, table

_NOTICES_SHOWN = 10


def list_text(runs: list[RunDirectory]) -> str:
    header = ["RUN", "STATUS", "STEP", "VAL LOSS", "WHERE", "AGE"]
    return table(header, [_row(run) for run in runs], right=["STEP", "VAL LOSS", "AGE"])


def _row(run: RunDirectory) -> list[str]:
    lines = journal.read(run.journal_file)[0]
    best, last = best_epoch(lines), last_submission(run)
    return [
        run.name,
        brief_status(run),
        _progress(run, lines, "/"),
        f"{best['metrics']['val/loss']:.2f}" if best else "",
        f"{last.cluster}, {count(last.world_size, 'rank')}" if last else "",
        duration(time.time() - run.created),
    ]


def show_text(run: RunDirectory) -> str:
    lines = journal.read(run.journal_file)[0]
    state, experiment = run_state(run), run.experiment()
    model, training = experiment.model, experiment.training
    facts: list[Fact] = [
        ("run", f"{run.name}, made {clock(run.created)}"),
        ("status", f"{state.status}: {state.reason}" if state.reason else state.status),
    ]
    if state.status in ("failed", "died"):
        facts += failure_facts(run)
    facts += [
        ("experiment", f"{experiment.name}, seed {experiment.seed}; {shown(run.experiment_file)}"),
        ("model", f"{model.backbone}, condition {model.condition}, latent_dim {model.latent_dim}"),
        (
            "data",
            f"{experiment.data.name} {experiment.data.image_size}×{experiment.data.image_size}",
        ),
        ("training", f"batch {training.global_batch_size}, lr {experiment.optimizer.lr:g}"),
        (
            "steps",
            f"{_progress(run, lines, ' of ')}, {duration(journal.training_seconds(lines))} of training",
        ),
    ]
    facts += [("submitted", _submission(entry)) for entry in submissions(run)]
    told = story(run, lines, state.job)
    if told:
        facts.append(("tries", "\n".join(told)))
    facts += _preflight(lines) + _ran_on(lines) + _metrics(lines) + _checkpoints(run)
    notices = [f"{clock(x['time'])}: {x['message']}" for x in lines if x["kind"] == "notice"]
    if notices:
        facts.append(("notices", "\n".join(notices[-_NOTICES_SHOWN:])))
    facts += [
        ("pictures", shown(run.pictures)),
        ("logs", shown(run.logs)),
        ("MLflow", mlflow_fact(run, state)),
    ]
    return aligned(facts)


def _progress(run: RunDirectory, lines: list[Line], of: str) -> str:
    total = total_steps(run)
    return f"{newest_step(lines):,}" + (f"{of}{total:,}" if total else "")


def _submission(entry: Submission) -> str:
    cancelled = f"; cancelled {clock(entry.cancelled)}" if entry.cancelled else ""
    size = f"{count(entry.nodes, 'node')}, {count(entry.world_size, 'rank')}"
    return f"{clock(entry.time)}: {entry.where}, {size}{cancelled}"


def _preflight(lines: list[Line]) -> list[Fact]:
    """What the last start saw of its nodes. Its warnings are among the notices."""
    seen = [line for line in lines if line["kind"] == "preflight"]
    if not seen:
        return []
    last, hosts = seen[-1], seen[-1]["hosts"].values()
    disks = [host["free_disk"] for host in hosts if host["free_disk"] is not None]
    clocks = [host["clock_offset_s"] for host in hosts]
    nodes = [f"{count(len(hosts), 'node')} in {last['seconds']:.1f} s"]
    nodes.append(f"free memory {size(min(host['free_memory'] for host in hosts))}")
    if disks:
        nodes.append(f"free disk {size(min(disks))}")
    if len(clocks) > 1:
        nodes.append(f"clocks within {max(clocks) - min(clocks):.1f} s")
    text = ", ".join(nodes)
    if last["all_reduce"] is not None:
        text += f"\nall-reduce: {Network.model_validate(last['all_reduce'])}"
    return [("preflight", text)]


def _ran_on(lines: list[Line]) -> list[Fact]:
    starts = [line for line in lines if line["kind"] == "start"]
    if not starts:
        return []
    start = starts[-1]
    hosts = ", ".join(dict.fromkeys(start["hosts"]))
    code = (start.get("commit") or "unknown")[:12] + (
        " with uncommitted changes" if start.get("uncommitted_changes") else ""
    )
    return [
        ("started", f"{count(len(starts), 'time')}, last from step {starts[-1]['step']:,}"),
        ("ranks", f"{start['world_size']} × {start['device']}, {start['precision']}, on {hosts}"),
        ("code", code),
    ]


def _metrics(lines: list[Line]) -> list[Fact]:
    facts: list[Fact] = []
    steps = [line for line in lines if line["kind"] == "step"]
    if steps:
        values = {name.removeprefix("train/"): x for name, x in steps[-1]["metrics"].items()}
        text = ", ".join(f"{name} {value:,.5g}" for name, value in values.items())
        facts.append(("train", f"step {steps[-1]['step']:,}: {text}"))
    epochs = [line for line in lines if line["kind"] == "epoch"]
    if epochs:
        facts.append(("val", epoch_line(epochs[-1])))
        best = best_epoch(lines)
        if best is not epochs[-1] and best is not None:
            facts.append(("best", epoch_line(best)))
    return facts


def _checkpoints(run: RunDirectory) -> list[Fact]:
    names = sorted(path.name for path in run.checkpoints.glob("step-*"))
    link = run.checkpoints / "best"
    if not names:
        return []
    best = f"; best {link.readlink().name}" if link.is_symlink() else ""
    return [("checkpoints", ", ".join(names) + best)]
