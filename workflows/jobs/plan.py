"""Plans a launch: checks that it is possible and says what it will do, before anything is written."""

from pathlib import Path
from typing import NamedTuple

from cvae.config.experiment import Experiment, Training, load_experiment
from cvae.data.store import open_store
from cvae.errors import UserError
from cvae.files import paths
from cvae.run.code_snapshot import CodeSnapshot
from cvae.run.directory import RunDirectory, check_new_name
from slurm import cluster_file, executors
from slurm.cluster_file import UNLIMITED, Place, Placement, TimeLimit, count
from workflows.jobs.checkpoint_notice import expected_save_s, grace_fact
from workflows.jobs.run_facts import open_mlflow
from workflows.jobs.scaling_model import expected_fact, meta_model
from workflows.jobs.submission import job_of
from workflows.terminal.formatting import Fact, clock, shown


class LaunchPlan(NamedTuple):
    place: Place
    """With the gaps of its file filled in by SLURM."""
    placement: Placement
    facts: list[Fact]
    sbatch_script: str | None
    """None on this machine."""


def plan_launch(
    experiment: Experiment,
    origin: str,
    name: str,
    requested: Placement,
    cluster_name: str | None,
    dry_run: bool,
    time: TimeLimit = UNLIMITED,
) -> LaunchPlan:
    """Returns the plan of a new run. origin: the experiment's file and overrides. dry_run: SLURM may be absent.

    Raises UserError if any part of it is impossible; the cheapest checks come first.
    """
    check_new_name(name)
    # Before torch is imported, which takes seconds.
    open_store(experiment.data.name, experiment.data.image_size)
    place, placement, facts = locate(requested, cluster_name, dry_run, time)
    run = RunDirectory(paths.runs_dir() / name)
    config, script = place.config, None
    has_slurm = config.executor == "slurm" and config.slurm().answers()
    facts = [
        ("experiment", origin),
        ("run", name),
        *facts,
        *experiment_facts(experiment, place, placement, has_slurm),
        ("run folder", shown(run.path)),
        ("logs", shown(run.logs)),
        ("MLflow", open_mlflow()),
    ]
    if config.executor == "slurm":
        script = executors.sbatch_script(job_of(run, CodeSnapshot().path), config, placement)
        if has_slurm:
            start = config.slurm().test(script)
            expected = f" and expects it to start {clock(start)}" if start else ""
            facts.append(("queue", f"SLURM would accept the job now{expected}"))
    return LaunchPlan(place, placement, facts, script)


def locate(
    requested: Placement, cluster_name: str | None, dry: bool, time: TimeLimit = UNLIMITED
) -> tuple[Place, Placement, list[Fact]]:
    """Returns the place, the ranks that it can hold, and a description of both.

    Raises UserError if SLURM does not respond (unless dry), or has less than is requested.
    """
    place = cluster_file.choose(cluster_name)
    config, placement, ranks = place.config, requested, str(requested)
    if config.executor == "local":
        placement, device = cluster_file.fit_here(config, requested)
        ranks = str(placement)
        if placement.world_size < requested.world_size:
            ranks += (
                f"\n{count(requested.world_size, 'rank')} requested, {placement.world_size:,} available;"
                " the result does not depend on it"
            )
        unused = "; --time has no effect here" if time.requested else ""
        where = f"this machine ({place.why}); {device}{unused}"
    elif dry and not config.slurm().answers():
        config = config.model_copy(update={"time_limit_min": time.of(place)})
        where = f"cluster {place.name}; its SLURM does not respond here, so this is unchecked"
    else:
        config = cluster_file.fit(place, requested, time)
        limit = config.time_limit_min
        allowed = f"at most {limit} minutes" if limit else "no time limit"
        where = f"cluster {place.name} ({place.why}); {allowed}"
        ranks += ", one per GPU"
    return place._replace(config=config), placement, [("where", where), ("ranks", ranks)]


def experiment_facts(
    experiment: Experiment, place: Place, placement: Placement, has_slurm: bool
) -> list[Fact]:
    """Returns what is going to be computed. Raises UserError if the data or this installation do not suit it."""
    from cvae.data.experiment_data import open_data

    data = open_data(experiment)
    settings, training, model = experiment.data, experiment.training, experiment.model
    experiment.check_ranks(placement.world_size)
    if model.init_from is not None:
        from cvae.models.published import published_folder

        # This machine may have a network; the nodes of a cluster often have none.
        published_folder(model, data.image_shape[0], model.init_from)
    built = meta_model(experiment, data.image_shape, data.condition_dim)
    n_images, batch_size = len(data.train_rows), training.global_batch_size
    total = experiment.total_steps(n_images)
    epochs = total * batch_size / n_images
    used = f"{n_images:,} of " if settings.fraction < 1 else ""
    facts = [
        ("batch", _batch(training, placement.world_size)),
        ("steps", f"{total:,}, {epochs:.4g} epochs of {count(n_images, 'image')}"),
        ("model", f"{_model(experiment)}: {count(built.n_parameters(), 'parameter')}"),
        (
            "data",
            f"{settings.name} {settings.image_size}×{settings.image_size}: {settings.train}"
            f" {used}{len(data.train):,}, {settings.val} {len(data.val):,}; digest {data.digest[:12]}",
        ),
        ("engine", _engine(training)),
    ]
    if expected := expected_fact(place.config, placement, built, batch_size, total):
        facts.append(("expected", expected))
    facts.append(("precision", _precision(training.precision, place)))
    if has_slurm:
        save_s = expected_save_s(built.n_parameters(), training.ema_decay is not None)
        facts.append(grace_fact(place, save_s, "expected"))
    return facts


def _batch(training: Training, world_size: int) -> str:
    batch, micro_batch_size = training.global_batch_size, training.micro_batch_size
    share = -(-batch // world_size)
    per_rank = f"{share}" if batch % world_size == 0 else f"{batch // world_size} or {share}"
    text = f"{count(batch, 'image')}: {per_rank} per rank"
    if micro_batch_size is not None and share > micro_batch_size:
        text += f", accumulated from {-(-share // micro_batch_size)} × at most {micro_batch_size}"
    return text


def _model(experiment: Experiment) -> str:
    model = experiment.model
    start = f", from {model.init_from}" if model.init_from is not None else ""
    fusion = f" ({model.fusion})" if model.condition != "none" else ""
    kind = "spatial latent_dim" if model.is_spatial else "latent_dim"
    return (
        f"{model.backbone}{start}, condition {model.condition}{fusion}, {kind} {model.latent_dim},"
        f" prior {model.prior}, {model.likelihood}"
    )


def _engine(training: Training) -> str:
    """Raises UserError if DeepSpeed is not installed here; the nodes have what is installed here."""
    if training.engine == "ddp":
        return "DDP"
    from cvae.training.engine import check_deepspeed

    check_deepspeed()
    return f"DeepSpeed, ZeRO stage {training.deepspeed.zero_stage}"


def _precision(requested: str, place: Place) -> str:
    """Raises UserError if the run is for this machine and its device lacks the requested precision."""
    from cvae.distributed import precision
    from cvae.distributed.device import default_device

    if place.config.executor == "local":
        resolved = precision.resolve(requested, default_device())
        return resolved if requested == resolved else f"{resolved} ({requested})"
    if requested != "auto":
        return requested
    return "auto: bf16 on GPUs of capability 8.0 or more, fp16 on older ones, fp32 on CPUs"


def default_experiment() -> tuple[Path, str]:
    """Returns the experiment file to train if none is named, and why it is that one."""
    configs = paths.PROJECT_ROOT / "configs"
    large, small = configs / "coco_ldm.yaml", configs / "demo.yaml"
    if not large.is_file():
        return small, "there is no configs/coco_ldm.yaml"
    try:
        data = load_experiment(large).data
        open_store(data.name, data.image_size)
    except UserError:
        return small, "COCO is not prepared"
    place = cluster_file.choose(None)
    if place.config.executor == "slurm" or cluster_file.gpus_here():
        return large, "COCO is prepared and there are GPUs"
    return small, "COCO is prepared, but there are no GPUs"
