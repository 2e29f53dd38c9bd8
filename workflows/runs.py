"""Lists runs, shows, follows, stops and continues them. RUN is a run's name, its folder, or `latest`."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cvae import command_line
from cvae.command_line import Parser
from cvae.errors import UserError
from cvae.files import paths
from cvae.run.directory import RunDirectory, all_runs
from cvae.tracking import mlflow_mirror
from slurm import cluster_file, job_state
from slurm.attempts import log_file
from workflows.jobs.checkpoint_notice import grace_fact, measured_save_s
from workflows.jobs.follow import follow, follow_or_detach
from workflows.jobs.job_options import add_job_options
from workflows.jobs.plan import locate
from workflows.jobs.run_facts import code_text
from workflows.jobs.run_state import last_submission, run_state
from workflows.jobs.submission import note_cancelled, submit
from workflows.listing.run_view import list_text, show_text
from workflows.sweeps import mirror
from workflows.sweeps.directory import SweepDirectory
from workflows.terminal.formatting import aligned, shown

_SAVE_PATIENCE_S = 60.0


def parser() -> Parser:
    parser = Parser(prog="runs.py", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name: str, action: Callable[[Any], object], text: str, run: bool = True) -> Parser:
        command: Parser = commands.add_parser(name, help=text, description=text)
        command.set_defaults(action=action)
        if run:
            command.add_argument("run", metavar="RUN", help="name, folder, or latest")
        return command

    add("list", lambda _: print(list_text(all_runs())), "list all runs, newest first", run=False)
    add("show", lambda x: print(show_text(_run(x))), "show all about a run, and why it failed")
    add("path", lambda x: print(_run(x).path), "print the run's folder")
    logs = add("logs", _logs, "print the log of a rank")
    logs.add_argument("--rank", type=int, metavar="R", help="default: 0")
    logs.add_argument("--follow", action="store_true", help="stay until the run ends")
    add("cancel", _cancel, "stop a run; it saves first and can be resumed")
    resume = add("resume", _resume, "continue a run from its newest checkpoint")
    add_job_options(resume, nodes=None, defaults="as the last time")
    resume.add_argument(
        "--force", action="store_true", help="even if it is unknown whether its last job has ended"
    )
    resume.add_argument("--detach", action="store_true", help="submit and do not wait")
    add("sync", _sync, "send to MLflow what it lacks")
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    status: int = options.action(options) or 0
    return status


def _run(options: Any) -> RunDirectory:
    return RunDirectory.open(options.run)


def _logs(options: Any) -> int:
    run = _run(options)
    last = last_submission(run)
    if last is None:
        raise UserError(f"{run.name} was never submitted, so there are no logs")
    if options.follow and options.rank is None:
        return follow(run)
    rank = options.rank or 0
    if not 0 <= rank < last.world_size:
        raise UserError(f"--rank {rank}: {run.name} has ranks 0 to {last.world_size - 1}")
    file = log_file(run.logs, last.job_id, rank)
    position = 0
    while True:
        # The job is queried before the log is read, so that its last lines are read too.
        alive = options.follow and job_state.look(last).alive
        if file.exists():
            with file.open(errors="replace") as log:
                log.seek(position)
                sys.stdout.write(log.read())
                sys.stdout.flush()
                position = log.tell()
        elif not options.follow:
            raise UserError(f"{shown(file)}: not there yet; {run.name} is {run_state(run).status}")
        if not alive:
            return 0
        time.sleep(1)


def _cancel(options: Any) -> int:
    run = _run(options)
    last, state = last_submission(run), run_state(run)
    if last is None or not (state.job.alive or state.status == "unknown"):
        raise UserError(f"{run.name} is {state.status}: there is nothing to cancel")
    note_cancelled(run, time.time())
    job = job_state.end(last, _SAVE_PATIENCE_S, lambda text: print(text, flush=True))
    if job.phase != "ended":
        print(
            f"{run.name}: whether {last.where} has ended is not known: {job.reason or job.slurm_state}"
        )
        return 1
    state = run_state(run)
    print(aligned([(state.status, f"{run.name}: {state.reason or state.job.slurm_state}")]))
    return 0


def _resume(options: Any) -> int:
    run = _run(options)
    last = last_submission(run)
    nodes = options.nodes or (last.nodes if last and not options.gpus else 1)
    gpus = options.gpus or (last.gpus if last and not options.nodes else nodes)
    name = options.cluster or (last.cluster if last else None)
    time_limit = cluster_file.TimeLimit(options.time)
    place, placement, facts = locate(cluster_file.split(nodes, gpus), name, False, time_limit)
    save_s = measured_save_s(run.journal_file)
    if save_s is not None and place.config.executor == "slurm":
        facts.append(grace_fact(place, save_s, "measured"))
    submit(run, place, placement, gpus, force=options.force)
    print(aligned([("run", run.name), *facts, ("code", code_text(run))]), flush=True)
    return follow_or_detach(run, options.detach)


def _sync(options: Any) -> int:
    name = Path(options.run).name
    # The run of a trial belongs below the parent run of its sweep.
    sweep = mirror.sweep_of(name)
    if sweep is None and not any(run.name == name for run in all_runs()):
        folder = paths.sweeps_dir() / name
        sweep = SweepDirectory(folder) if (folder / "sweep.yaml").is_file() else None
    if sweep is not None:
        mirror.sync(sweep)
        print(f"MLflow has all of {sweep.name}: {len(sweep.trials())} trials")
        return 0
    run = _run(options)
    missing = mlflow_mirror.behind(run.path)
    with tqdm(total=missing, unit="line", desc="to MLflow") as bar:
        mlflow_mirror.sync(run.path, bar.update)
    print(f"MLflow has all of {run.name}")
    return 0


if __name__ == "__main__":
    command_line.run(main)
