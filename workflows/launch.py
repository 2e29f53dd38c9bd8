"""Trains an experiment on SLURM or on this machine: prints the plan, submits the run and follows it.

    python workflows/launch.py [EXPERIMENT] --nodes N --gpus G [--cluster NAME] [--engine ENGINE]
                               [--name RUN] [--time TIME] [--dry-run] [--preflight] [--detach] [key=value …]

Submits to SLURM if a controller responds; otherwise runs locally, one rank per GPU or core. Exit status:
0 finished (or the preflight passed), 1 failed, 2 bad input (nothing is written, unless only the job could find
it, on its nodes), 3 stopped or cancelled, 130 detached by Ctrl-C (the run continues).
"""

from pathlib import Path

from cvae import command_line
from cvae.command_line import Parser, files_and_overrides
from cvae.config.experiment import Experiment, load_experiment
from cvae.errors import UserError
from cvae.files import paths
from cvae.run.directory import free_name, telling_name
from slurm import cluster_file
from workflows.jobs.follow import follow_or_detach
from workflows.jobs.job_options import add_job_options
from workflows.jobs.plan import default_experiment, plan_launch
from workflows.jobs.submission import submit_new
from workflows.terminal.formatting import aligned, shown


def parser() -> Parser:
    parser = Parser(
        prog="launch.py", description="Trains an experiment, on SLURM or on this machine."
    )
    add = parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="EXPERIMENT | key=value",
        help="the experiment's YAML file (default: COCO if it is prepared and there are GPUs, else the"
        " demo), and values that replace the file's, as model.latent_dim=64",
    )
    add_job_options(parser, time="the cluster file's; ten minutes for --preflight")
    add("--engine", choices=["ddp", "deepspeed"], help="short for training.engine=…")
    add("--name", metavar="RUN", help="default: the experiment, what was changed, the time")
    flags = {
        "--dry-run": "print the plan and the sbatch script; submit and write nothing",
        "--preflight": "only check the nodes: GPUs, memory, disk, clocks, packages, network; train nothing",
        "--detach": "submit and do not wait",
    }
    for flag, text in flags.items():
        add(flag, action="store_true", help=text)
    return parser


def main(arguments: list[str]) -> int:
    options = parser().parse_intermixed_args(arguments)
    files, overrides = files_and_overrides(options.words)
    if options.engine:
        overrides.append(f"training.engine={options.engine}")
    if len(files) > 1:
        raise UserError(f"one experiment at a time: {' and '.join(files)}; overrides are key=value")
    # What needs no library comes first, so that a typing error is reported at once.
    requested = cluster_file.split(options.nodes, options.gpus or options.nodes)
    if options.cluster:
        cluster_file.load(options.cluster)

    if options.preflight:
        from workflows.jobs.preflight_job import preflight  # torch: seconds

        checked = _experiment_to_check(files, overrides)
        return preflight(requested, options.cluster, checked, options.time)
    if files:
        file = _find(files[0])
    else:
        file, reason = default_experiment()
        print(f"training {shown(file)}: {reason}", flush=True)
    experiment = load_experiment(file, overrides)
    changed = {key: value for key, _, value in (word.partition("=") for word in overrides)}
    name = options.name or free_name(telling_name(experiment.name, changed))
    plan = plan_launch(
        experiment,
        " ".join([shown(file), *overrides]),
        name,
        requested,
        options.cluster,
        options.dry_run,
        cluster_file.TimeLimit(options.time),
    )
    print(aligned(plan.facts), flush=True)

    if options.dry_run:
        print(f"\n{plan.sbatch_script or '(dry run: nothing was started)'}")
        return 0
    run = submit_new(name, experiment, plan.place, plan.placement, requested.world_size)
    print()
    return follow_or_detach(run, options.detach)


def _experiment_to_check(files: list[str], overrides: list[str]) -> Experiment | None:
    """Returns the experiment of a preflight; None if none is named and the default one's data are not prepared."""
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
    """Returns the file, relative to the working directory or else to the project's root."""
    file, in_project = Path(word), paths.PROJECT_ROOT / word
    return in_project if not file.exists() and in_project.exists() else file


if __name__ == "__main__":
    command_line.run(main)
