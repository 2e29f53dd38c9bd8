"""What a launch is going to do, checked and told before anything is written."""

from pathlib import Path
from typing import NamedTuple

from cvae.config.experiment import Experiment, Training
from cvae.data.store import open_store
from cvae.errors import UserError
from cvae.files import paths
from cvae.run.code_snapshot import CodeSnapshot
from cvae.run.directory import RunDirectory, check_new_name
from slurm import cluster_file, executors
from slurm.cluster_file import UNASKED, Place, Placement, TimeLimit, count
from slurm.executors import Job
from workflows.jobs.checkpoint_notice import expected_save_s, grace_fact
from workflows.jobs.follow import open_mlflow
from workflows.jobs.scaling_model import expected_fact
from workflows.jobs.submission import job_of
from workflows.terminal.formatting import Fact, aligned, clock, shown


class Plan(NamedTuple):
    experiment: Experiment
    name: str
    place: Place
    """With what SLURM says filled in."""
    placement: Placement
    gpus: int
    """The total that was asked for."""
    facts: list[Fact]

    @property
    def job(self) -> Job:
        return job_of(RunDirectory(paths.runs_dir() / self.name), CodeSnapshot().path)

    def text(self) -> str:
        return aligned(self.facts)

    def sbatch_script(self) -> str | None:
        if self.place.config.executor != "slurm":
            return None
        return executors.sbatch_script(self.job, self.place.config, self.placement)


def plan_launch(
    experiment: Experiment,
    origin: str,
    name: str,
    asked: Placement,
    cluster_name: str | None,
    dry: bool,
    time: TimeLimit = UNASKED,
) -> Plan:
    """origin: where the experiment was read, for the reader. dry: make do without SLURM's answers.

    Raises UserError where anything of it cannot be: from the cheapest check to the dearest.
    """
    check_new_name(name)
    # Before torch is imported, which takes seconds.
    open_store(experiment.data.name, experiment.data.image_size)
    place, placement, where = locate(asked, cluster_name, dry, time)
    asks = place.config.executor == "slurm" and place.config.slurm().answers()
    facts = [
        ("experiment", origin),
        ("run", name),
        *where,
        *_facts_of(experiment, place, placement, asks),
        ("run folder", shown(paths.runs_dir() / name)),
        ("logs", shown(RunDirectory(paths.runs_dir() / name).logs)),
        ("MLflow", open_mlflow()),
    ]
    plan = Plan(experiment, name, place, placement, asked.world_size, facts)
    script = plan.sbatch_script()
    if script is not None and asks:
        start = place.config.slurm().test(script)
        expected = f" and expects it to start {clock(start)}" if start else ""
        facts.append(("queue", f"SLURM would take the job now{expected}"))
    return plan


def locate(
    asked: Placement, cluster_name: str | None, dry: bool, time: TimeLimit = UNASKED
) -> tuple[Place, Placement, list[Fact]]:
    """The place, the ranks as the place holds them, and both in words.

    Raises UserError where SLURM does not answer (unless dry), or has less than is asked.
    """
    place = cluster_file.choose(cluster_name)
    if place.config.executor == "slurm":
        if dry and not place.config.slurm().answers():
            where = f"cluster {place.name}; its SLURM does not answer here, so nothing is checked with it"
            limits = {"time_limit_min": time.of(place)}
            place = place._replace(config=place.config.model_copy(update=limits))
            return place, asked, [("where", where), ("ranks", str(asked))]
        place = place._replace(config=cluster_file.fit(place, asked, time))
        limit = place.config.time_limit_min
        allowed = f"at most {limit} minutes" if limit else "no time limit"
        where = f"cluster {place.name} ({place.why}); {allowed}"
        return place, asked, [("where", where), ("ranks", f"{asked}, one per GPU")]
    placement, device = cluster_file.fit_here(place.config, asked)
    ranks = str(placement)
    if placement.world_size < asked.world_size:
        ranks += (
            f"\n{count(asked.world_size, 'rank')} asked, this machine holds {placement.world_size}:"
            " by rule 2 the result is the same"
        )
    where = f"this machine ({place.why}); {device}"
    if time.asked:
        where += "; --time means nothing here"
    return place, placement, [("where", where), ("ranks", ranks)]


def _facts_of(experiment: Experiment, place: Place, placement: Placement, asks: bool) -> list[Fact]:
    from cvae.data.experiment_data import open_data

    data = open_data(experiment)
    training = experiment.training
    batch, world_size = training.global_batch_size, placement.world_size
    experiment.check_ranks(world_size)
    total = experiment.total_steps(len(data.train_rows))
    epochs = total * batch / len(data.train_rows)
    settings = experiment.data
    expected = expected_fact(
        place.config, placement, experiment, data.image_shape, data.condition_dim, total
    )
    used = f"{len(data.train_rows):,} of " if settings.fraction < 1 else ""
    return [
        ("batch", _batch(batch, world_size, training.micro_batch_size)),
        ("steps", f"{total:,}, {epochs:.4g} epochs of {count(len(data.train_rows), 'image')}"),
        ("model", _model(experiment, data.image_shape, data.condition_dim)),
        (
            "data",
            f"{settings.name} {settings.image_size}×{settings.image_size}: {settings.train}"
            f" {used}{len(data.train):,}, {settings.val} {len(data.val):,}; digest {data.digest[:12]}",
        ),
        ("engine", _engine(training)),
        *([("expected", expected)] if expected else []),
        ("precision", _precision(training.precision, place)),
        *([grace_fact(place, expected_save_s(experiment, data), "expected")] if asks else []),
    ]


def _batch(batch: int, world_size: int, micro_batch_size: int | None) -> str:
    share = -(-batch // world_size)
    per_rank = f"{share}" if batch % world_size == 0 else f"{batch // world_size} or {share}"
    text = f"{count(batch, 'image')}: {per_rank} per rank"
    if micro_batch_size is not None and share > micro_batch_size:
        text += f", accumulated from {-(-share // micro_batch_size)} × at most {micro_batch_size}"
    return text


def _model(experiment: Experiment, shape: tuple[int, int, int], condition_dim: int) -> str:
    import torch

    from cvae.models.cvae import build_model
    from cvae.models.published import published_folder

    model = experiment.model
    if model.init_from is not None:
        # Here there may be a network, on a cluster's nodes often not.
        published_folder(model, shape[0], model.init_from)
    with torch.device("meta"):
        parameters = build_model(model, shape, condition_dim, experiment.seed).n_parameters()
    told = f"condition {model.condition}" + (
        f" ({model.fusion})" if model.condition != "none" else ""
    )
    kind = "spatial latent_dim" if model.is_spatial else "latent_dim"
    start = f", from {model.init_from}" if model.init_from is not None else ""
    return (
        f"{model.backbone}{start}, {told}, {kind} {model.latent_dim}, prior {model.prior},"
        f" {model.likelihood}: {count(parameters, 'parameter')}"
    )


def _engine(training: Training) -> str:
    """Raises UserError where it is not installed here; the nodes have what is installed here."""
    if training.engine == "ddp":
        return "DDP"
    from cvae.training.engine import check_deepspeed

    check_deepspeed()
    return f"DeepSpeed, ZeRO stage {training.deepspeed.zero_stage}"


def _precision(wanted: str, place: Place) -> str:
    """Raises UserError where this machine cannot do what is wanted."""
    from cvae.distributed import precision
    from cvae.distributed.device import default_device

    if place.config.executor == "local":
        resolved = precision.resolve(wanted, default_device())
        return resolved if wanted == resolved else f"{resolved} ({wanted})"
    if wanted != "auto":
        return wanted
    return "auto: bf16 on GPUs of capability 8.0 or more, fp16 on older ones, fp32 on CPUs"


def default_experiment() -> tuple[Path, str]:
    """What is trained when nothing is named, and why."""
    large, small = (
        paths.PROJECT_ROOT / "configs" / f"{name}.yaml" for name in ("coco_ldm", "demo")
    )
    if not large.is_file():
        return small, "there is no configs/coco_ldm.yaml"
    try:
        from cvae.config.experiment import load_experiment

        data = load_experiment(large).data
        open_store(data.name, data.image_size)
    except UserError:
        return small, "COCO is not prepared"
    place = cluster_file.choose(None)
    if place.config.executor == "slurm" or cluster_file.gpus_here():
        return large, "COCO is prepared and there are GPUs"
    return small, "COCO is prepared, but there are no GPUs"
