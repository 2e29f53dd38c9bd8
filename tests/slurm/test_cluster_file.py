"""The cluster file, what is requested of a cluster, and the sbatch script that results."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from cvae.command_line import Parser
from cvae.config import yaml_model
from cvae.errors import UserError
from slurm import cluster_file, executors
from slurm.cluster_file import ClusterConfig, Place, Placement, TimeLimit
from slurm.commands import NodeSize, Slurm, complaint, gpus_of, minutes_of
from slurm.executors import Job
from tests.studies import benchmark
from workflows import evaluate, launch, prepare, runs, sweep


@pytest.mark.parametrize("name", sorted(file.stem for file in cluster_file.CLUSTERS.glob("*.yaml")))
def test_shipped_clusters_can_be_read(name: str) -> None:
    assert cluster_file.load(name).executor in ("slurm", "local")


def test_gpus_are_the_total() -> None:
    assert cluster_file.split(2, 8) == Placement(nodes=2, ranks_per_node=4)
    with pytest.raises(UserError, match=r"--gpus 7 .* --nodes 2; try --gpus 6 or --gpus 8"):
        cluster_file.split(2, 7)
    with pytest.raises(UserError, match=r"try --gpus 3$"):
        cluster_file.split(3, 2)


def test_an_unknown_cluster_is_answered_with_those_there_are() -> None:
    with pytest.raises(UserError, match=r"--cluster v10: .* there are local, slurm, .*v100"):
        cluster_file.choose("v10")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("executor: slurm\npartion: gpu", "partion = 'gpu': unknown key; did you mean partition?"),
        ("executor: local\npartition: gpu", "executor = 'local' has no partition"),
        ("executor: slurm\nnodes: '2'", "nodes = '2'"),
        (
            "executor: slurm\ntime_limit_min: 2\ngrace_s: 60",
            "grace_s = 60 must be at least a minute shorter",
        ),
        ("nodes: 2", "executor: missing"),
        (
            "executor: slurm\nconstraint: --wrap=x",
            ":2: constraint = '--wrap=x': should not begin with a dash",
        ),
        (
            "executor: slurm\nslurm_conf: --wrap=x",
            ":2: slurm_conf = '--wrap=x': should not begin with a dash",
        ),
        ("executor: slurm\npartition: 'a b'", "partition = 'a b': should be one word"),
        ('executor: slurm\npartition: "a\\n#SBATCH --x"', "should not hold the character '\\n'"),
        ("executor: slurm\nqos: ''", "qos = '': should not be empty"),
        ("executor: slurm\naccount: '  '", "should not be empty"),
        (
            'executor: slurm\naccount: "a\\x7Fb"',
            "the character U+007F is not allowed",
        ),
        ('executor: slurm\naccount: "a\\u2028b"', "the character U+2028 is not allowed"),
        ("executor: slurm\ngpu_type: v100:4", "gpu_type = 'v100:4' should be the type alone"),
        (
            "executor: slurm\nenv: {A=B: x}",
            ":2: env.A=B.[key] = 'A=B': should be a variable's name",
        ),
        ("executor: slurm\nenv:\n  1A: x", ":3: env.1A.[key] = '1A': should be a variable's name"),
        (
            'executor: local\nenv: {A: "x\\0"}',
            "the character U+0000 is not allowed",
        ),
        ('executor: local\nenv: {A: "x\\ny"}', "should not hold the character '\\n'"),
        ('executor: slurm\nsetup: ["module load x\\r"]', "should not hold the character '\\r'"),
        ("executor: slurm\ngrace_s: 65600\n", "grace_s = 65600"),
        ("executor: slurm\nnodes: 1000000", "nodes = 1000000"),
        ("executor: slurm\ntime_limit_min: 99999999999", "time_limit_min = 99999999999"),
    ],
)
def test_mistakes_in_a_cluster_file(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        yaml_model.load(file, ClusterConfig)
    assert message in str(caught.value)
    assert str(file) in str(caught.value)


def test_what_real_sites_write_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(
        "executor: slurm\npartition: gpu,gpu-long\nconstraint: '[rack1*2&rack2*4]'\nqos: normal+x\n"
        "slurm_conf: ~/my site/slurm.conf\nsetup:\n- |\n  module purge\n  module load cuda\n"
        "env: {EMPTY: '', QUOTED: a \"b\" $c}\n"
    )
    config = yaml_model.load(file, ClusterConfig)
    assert config.setup == ["module purge\nmodule load cuda\n"]
    script = executors.sbatch_script(Job("r", tmp_path, "m:f", (), {}), config, Placement(1, 1))
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("gres", "kind", "gpus"),
    [
        ("gpu:4", None, 4),
        ("gpu:v100:4(S:0-1)", None, 4),
        ("gpu:v100:4(S:0-1)", "v100", 4),
        ("gpu:v100:4(S:0-1)", "a100", 0),
        ("shard:8,gpu:a100:2,gpu:v100:1", None, 3),
        ("shard:8,gpu:a100:2,gpu:v100:1", "v100", 1),
        ("(null)", None, 0),
    ],
)
def test_gpus_in_slurms_notation(gres: str, kind: str | None, gpus: int) -> None:
    assert gpus_of(gres, kind) == gpus


def test_of_slurms_many_lines_the_telling_one_is_kept() -> None:
    stderr = (
        "sbatch: error: invalid partition specified: nope\n"
        "sbatch: error: Batch job submission failed: Invalid partition name specified\n"
    )
    assert complaint(stderr) == "Batch job submission failed: Invalid partition name specified"


class _Sizes(Slurm):
    """A cluster that is not at hand: two nodes of four GPUs and one of eight, limit one day."""

    def require(self, name: str) -> None:
        pass

    def node_sizes(self, partition: str | None, gpu_type: str | None) -> list[NodeSize]:
        return [NodeSize("gpu", gpus, 32, 1440) for gpus in (4, 4, 8)]


def _site(monkeypatch: pytest.MonkeyPatch, **keys: object) -> Place:
    monkeypatch.setattr(ClusterConfig, "slurm", lambda self: _Sizes(None))
    return Place("site", ClusterConfig.model_validate({"executor": "slurm", **keys}), "requested")


@pytest.mark.parametrize(
    ("keys", "requested", "message"),
    [
        ({}, Placement(4, 4), "--nodes 4 are requested; cluster site, partition gpu has 3 nodes"),
        ({}, Placement(2, 8), "has 1 node with 8 GPUs"),
        ({}, Placement(1, 16), "16 GPUs on each node .* has 8 on a node; try --nodes 2 --gpus 16"),
        ({"gpus_per_node": 4}, Placement(1, 8), "has 4 on a node; try --nodes 2 --gpus 8"),
        ({"nodes": 1}, Placement(2, 4), "has 1 node"),
        (
            {"time_limit_min": 1500},
            Placement(1, 4),
            "time_limit_min = 1500: .* allows 1440 minutes",
        ),
    ],
)
def test_more_than_the_cluster_has(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, object], requested: Placement, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        cluster_file.fit(_site(monkeypatch, **keys), requested)


def test_gaps_of_the_file_are_filled_by_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    fitted = cluster_file.fit(_site(monkeypatch), Placement(3, 4))
    assert (fitted.cpus_per_gpu, fitted.time_limit_min) == (4, 1440)
    limited = cluster_file.fit(
        _site(monkeypatch, cpus_per_gpu=2, time_limit_min=60), Placement(3, 4)
    )
    assert (limited.cpus_per_gpu, limited.time_limit_min) == (2, 60)


@pytest.mark.parametrize(
    ("keys", "time", "minutes"),
    [
        ({}, TimeLimit(), 1440),
        ({"time_limit_min": 60}, TimeLimit(requested=90), 90),
        ({}, TimeLimit(short=10), 10),
        ({"time_limit_min": 6}, TimeLimit(short=10), 6),
        # A signal before the end must not come before the beginning.
        ({"grace_s": 900}, TimeLimit(short=10), 17),
        ({}, TimeLimit(requested=20, short=10), 20),
    ],
)
def test_the_time_limit_of_a_job(
    monkeypatch: pytest.MonkeyPatch, keys: dict[str, object], time: TimeLimit, minutes: int
) -> None:
    place = _site(monkeypatch, **keys)
    assert cluster_file.fit(place, Placement(1, 4), time).time_limit_min == minutes


def test_a_time_limit_that_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    place = _site(monkeypatch)
    with pytest.raises(
        UserError, match=r"--time 3: grace_s = 120 of cluster site .* 4 minutes or more"
    ):
        cluster_file.fit(place, Placement(1, 4), TimeLimit(requested=3))
    with pytest.raises(UserError, match=r"--time 1441: .* allows 1440 minutes"):
        cluster_file.fit(place, Placement(1, 4), TimeLimit(requested=1441))


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("90", 90),
        ("90:00", 90),
        ("90:01", 91),
        ("1:30:00", 90),
        ("1-12", 36 * 60),
        ("1-12:30", 36 * 60 + 30),
        ("1-12:30:30", 36 * 60 + 31),
        ("30:00", 30),
        ("infinite", None),
        ("UNLIMITED", None),
        ("-5", None),
        ("1.5", None),
        ("٣", None),
        ("1-", None),
        ("", None),
        ("9" * 8, None),
        ("9" * 500, None),
    ],
)
def test_slurms_notations_of_a_time_limit(text: str, minutes: int | None) -> None:
    assert minutes_of(text) == minutes


@pytest.mark.parametrize(
    "parser",
    [launch.parser, evaluate.parser, sweep.parser, benchmark.parser, prepare._parser, runs.parser],
)
def test_every_command_that_submits_takes_a_time_limit(parser: Callable[[], Parser]) -> None:
    start = {
        prepare._parser: ["coco", "--root", "x"],
        runs.parser: ["resume", "r"],
        evaluate.parser: ["r"],
    }.get(parser, [])
    assert parser().parse_args([*start, "--time", "1:30:00"]).time == 90
    assert parser().parse_args(start).time is None
    for bad in ("0", "soon", "0:00", "-5", "1e3"):
        with pytest.raises(
            UserError, match=r"is no time limit; write minutes|expected one argument"
        ):
            parser().parse_args([*start, "--time", bad])


def test_this_machine_holds_no_more_ranks_than_cores_or_gpus() -> None:
    holds, _ = cluster_file.fit_here(ClusterConfig(executor="local"), Placement(2, 4096))
    assert holds.nodes == 1
    assert 1 <= holds.ranks_per_node < 4096
    assert cluster_file.fit_here(ClusterConfig(executor="local"), Placement(1, 1))[0] == Placement(
        1, 1
    )


def test_the_sbatch_script(tmp_path: Path) -> None:
    config = ClusterConfig(
        executor="slurm",
        partition="gpu",
        account="physics",
        constraint="v100&32gb",
        gpu_type="v100",
        cpus_per_gpu=8,
        mem_per_gpu_gb=40,
        time_limit_min=90,
        grace_s=300,
        setup=["module load cuda/12.6"],
        env={"NCCL_DEBUG": "WARN", "MLFLOW_TRACKING_URI": "http://ann:hush@host"},
    )
    job = Job("run-1", tmp_path / "log folder", "m:f", (), {"CVAE_HOME": "/a b"})
    script = executors.sbatch_script(job, config, Placement(2, 4))
    for line in (
        "#SBATCH --job-name=run-1",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=physics",
        "#SBATCH --constraint='v100&32gb'",
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=4",
        "#SBATCH --gpus-per-node=v100:4",
        "#SBATCH --cpus-per-task=8",
        "#SBATCH --mem=160G",
        "#SBATCH --time=90",
        "#SBATCH --signal=USR2@300",
        "export CVAE_HOME='/a b'",
        "export NCCL_DEBUG=WARN",
        "module load cuda/12.6",
    ):
        assert line in script.splitlines()
    assert "hush" not in script, "sbatch hands on the environment"
    srun = script.strip().splitlines()[-1]
    assert "--cpus-per-task=8 --kill-on-bad-exit=1" in srun
    assert script.index("module load") < script.index("srun ")
    assert "wckey" not in script
    assert not (tmp_path / "log folder").exists()
    # What is in quotes above is quoted for a shell.
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("chosen", "handed_on"),
    [
        (None, {}),
        ("all,X", {}),
        ("NONE", {"SBATCH_EXPORT": "MLFLOW_TRACKING_URI"}),
        ("nil", {"SBATCH_EXPORT": "MLFLOW_TRACKING_URI"}),
        ("X,Y", {"SBATCH_EXPORT": "X,Y,MLFLOW_TRACKING_URI"}),
    ],
)
def test_a_person_who_exports_nothing_withholds_no_password(
    chosen: str | None, handed_on: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SBATCH_EXPORT", raising=False)
    if chosen is not None:
        monkeypatch.setenv("SBATCH_EXPORT", chosen)
    assert executors._let_through({"MLFLOW_TRACKING_URI": "http://a:b@c"}) == handed_on
    assert executors._let_through({}) == {}
