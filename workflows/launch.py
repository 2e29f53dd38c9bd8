"""Trains an experiment, on SLURM or on this machine: prints the plan, submits, follows.

    python workflows/launch.py [EXPERIMENT] --nodes N --gpus G [--cluster NAME] [--engine ENGINE]
                               [--name RUN] [--time TIME] [--dry-run] [--preflight] [--detach] [key=value …]

Exit status: 0 finished (or the preflight passed), 1 failed, 2 bad input (nothing is written; unless only
the job could find it, on its nodes), 3 stopped or cancelled, 130 detached by Ctrl-C (the run goes on).
"""

from pathlib import Path

from cvae import command_line
from cvae.command_line import Parser, files_and_overrides, positive
from cvae.config.experiment import Experiment, load_experiment
from cvae.errors import UserError
from cvae.files import paths
from cvae.run.directory import free_name, telling_name
from slurm import cluster_file
from slurm.job_state import requeue_warning
from workflows.jobs.follow import follow
from workflows.jobs.job_options import add_time
from workflows.jobs.plan import default_experiment, plan_launch
from workflows.jobs.run_state import submissions
from workflows.jobs.submission import submit_new
from workflows.terminal.formatting import shown


def parser() -> Parser:
    parser = Parser(
        prog="launch.py", description="Trains an experiment, on SLURM or on this machine."
    )
    parser.add_argument(
        "words",
        nargs="*",
        metavar="EXPERIMENT | key=value",
        help="the experiment's YAML file (default: COCO where it is prepared and there are GPUs, else"
        " the demo), and values that replace the file's, as model.latent_dim=64",
    )
    parser.add_argument("--nodes", type=positive, default=1, metavar="N")
    parser.add_argument(
        "--gpus", type=positive, metavar="G", help="in total (default: one per node)"
    )
    parser.add_argument(
        "--cluster",
        metavar="NAME",
        help="configs/clusters/NAME.yaml (default: SLURM where it answers, else this machine)",
    )
    parser.add_argument(
        "--engine", choices=["ddp", "deepspeed"], help="short for training.engine=…"
    )
    parser.add_argument(
        "--name", metavar="RUN", help="default: the experiment, what was changed, the time"
    )
    add_time(parser, "the cluster file's; ten minutes for --preflight")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print plan and sbatch script; submit and write nothing",
    )
    parser.add_argument(
        "--preflight",
        action="store_true",
        help="only look at the nodes: GPUs, memory, disk, clocks, packages, network; train nothing",
    )
    parser.add_argument("--detach", action="store_true", help="submit and do not wait")
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_intermixed_args(arguments)
    files, overrides = files_and_overrides(options.words)
    if options.engine:
        overrides.append(f"training.engine={options.engine}")
    if len(files) > 1:
        raise UserError(f"one experiment at a time: {' and '.join(files)}; overrides are key=value")
    # Everything that needs no library first: a typing error is answered at once.
    asked = cluster_file.split(options.nodes, options.gpus or options.nodes)
    if options.cluster:
        cluster_file.load(options.cluster)

    if options.preflight:
        from workflows.jobs.preflight_job import preflight  # torch: seconds

        checked = _experiment_to_check(files, overrides)
        return preflight(asked, options.cluster, checked, options.time)
    if files:
        file = _find(files[0])
    else:
        file, why = default_experiment()
        print(f"{shown(file)} is trained, as {why}", flush=True)
    experiment = load_experiment(file, overrides)
    origin = " ".join([shown(file), *overrides])
    changed = {key: value for key, _, value in (word.partition("=") for word in overrides)}
    name = options.name or free_name(telling_name(experiment.name, changed))
    time = cluster_file.TimeLimit(options.time)
    plan = plan_launch(experiment, origin, name, asked, options.cluster, options.dry_run, time)
    print(plan.text(), flush=True)

    if options.dry_run:
        script = plan.sbatch_script()
        print(f"\n{script}" if script else "\n(dry run: nothing was started)")
        return 0
    run = submit_new(plan.name, experiment, plan.place, plan.placement, plan.gpus)
    if warning := requeue_warning(submissions(run)[-1]):
        print(f"warning: {warning}")
    print()
    if options.detach:
        print(f"submitted {run.name}; follow it: python workflows/runs.py logs {run.name} --follow")
        return 0
    return follow(run)


def _experiment_to_check(files: list[str], overrides: list[str]) -> Experiment | None:
    """What a preflight checks for; None where none is named and the default one's data are not prepared."""
    from cvae.data.experiment_data import open_data

    experiment = load_experiment(_find(files[0]) if files else default_experiment()[0], overrides)
    try:
        open_data(experiment)
    except UserError:
        if files:
            raise
        return None
    return experiment


def _find(word: str) -> Path:
    """The file as named from here or, as configs/demo.yaml, from the project's root."""
    file = Path(word)
    if not file.exists() and not file.is_absolute() and (paths.PROJECT_ROOT / file).exists():
        return paths.PROJECT_ROOT / file
    return file


if __name__ == "__main__":
    command_line.run(main)
