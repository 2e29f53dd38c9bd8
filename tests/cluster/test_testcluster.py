"""The test cluster is a real one, and leaves no trace."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import submitit

from cvae.errors import UserError
from tests.helpers.waiting import until
from tests.testcluster import Cluster, ClusterError, missing, settings
from tests.testcluster import cluster as module

pytestmark = pytest.mark.cluster


# --- Up and down: a second, smaller cluster beside the one that the other tests share.


class Traces:
    """What a cluster has on this machine while it is up, and whether any of that is left."""

    def __init__(self) -> None:
        self.before = self._named()
        self.namespaces: set[str] = set()
        self.processes: list[psutil.Process] = []

    def _named(self) -> dict[str, set[str]]:
        folders = ["/run", "/run/lock", "/etc", "/etc/slurm", "/etc/munge", "/var/log", "/dev"]
        folders += ["/var/spool", "/var/lib", "/var/lib/mysql"]
        names = {folder: set(os.listdir(folder)) for folder in folders if os.path.isdir(folder)}
        names["/tmp"] = {name for name in os.listdir("/tmp") if name == "ray" or "slurm" in name}
        names["links"] = set(os.listdir("/sys/class/net"))
        names["mounts"] = {
            line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()
        }
        names["cgroups"] = {str(path) for path in Path("/sys/fs/cgroup").glob("*/*slurm*")}
        # The cluster that other tests share may come up at the same time.
        shared = Cluster()
        return {key: value - {shared.name, shared.interface} for key, value in names.items()}

    def look_at(self, cluster: Cluster) -> None:
        own = {os.readlink(path) for path in Path("/proc/self/ns").iterdir()}
        for host in (cluster.controller, *cluster.nodes):
            launcher = host.launcher()
            if launcher is not None:
                self.processes += [launcher, *launcher.children(recursive=True)]
        for process in self.processes:
            for path in Path(f"/proc/{process.pid}/ns").iterdir():
                self.namespaces.add(os.readlink(path))
        self.namespaces -= own

    def assert_gone(self) -> None:
        # A namespace's network is removed a moment after its last process.
        until(lambda: self._named() == self.before, 5, 0.1, "links, mounts and files of before")
        assert [process for process in self.processes if process.is_running()] == []
        for process in psutil.process_iter():
            try:
                namespaces = {
                    os.readlink(path) for path in Path(f"/proc/{process.pid}/ns").iterdir()
                }
            except OSError:
                continue
            assert not namespaces & self.namespaces, process


@pytest.fixture
def second() -> Iterator[Cluster]:
    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster("cvae-testcluster-2", "10.213.78")
    cluster.down()
    yield cluster
    cluster.down()


def test_down_leaves_no_trace(second: Cluster) -> None:
    traces = Traces()
    assert second.up(hosts=1, gpus=2)
    traces.look_at(second)
    daemons = {"munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd"}
    assert daemons <= {process.name() for process in traces.processes}
    assert len(traces.namespaces) == 2 * len(["net", "uts", "mnt", "pid"])
    assert second.node_states() == {"cvae-node1": "idle"}
    assert not second.up(hosts=1, gpus=2), "up already"
    with pytest.raises(UserError, match="1 hosts × 2 GPUs is up"):
        second.up(hosts=2, gpus=2)

    assert second.down()
    traces.assert_gone()
    assert not second.down()


def test_down_cleans_up_after_a_killed_up(second: Cluster) -> None:
    traces = Traces()
    code = "from tests.testcluster import Cluster; Cluster('cvae-testcluster-2', '10.213.78').up()"
    up = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    until((second.state / "slurmdbd.pid").exists, 30, 0.1, "a cluster half up")
    up.send_signal(signal.SIGKILL)
    up.wait()
    traces.look_at(second)
    assert second.down()
    assert traces.processes
    traces.assert_gone()


def test_a_daemon_that_fails_takes_all_down_and_keeps_its_log(
    second: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    traces = Traces()
    monkeypatch.setattr(settings, "SLURMDBD_CONF", settings.SLURMDBD_CONF + "Nonsense=1\n")
    with pytest.raises(ClusterError, match="slurmdbd") as caught:
        second.up(hosts=1, gpus=1)
    log = caught.value.log
    assert log is not None
    assert log == second.failed_logs / "slurmdbd.log"
    assert "Nonsense" in log.read_text()
    for file in second.failed_logs.iterdir():
        file.unlink()
    second.failed_logs.rmdir()
    traces.assert_gone()


def test_without_root_or_packages_one_line_and_status_2(
    second: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Not by another user, who might not even be allowed to read this Python.
    code = "import os, sys; from tests.testcluster.__main__ import main; os.seteuid(65534);"
    code += " sys.argv = ['testcluster', 'up']; sys.exit(main())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (2, "error: the test cluster needs root\n")
    monkeypatch.setattr(module, "PATH", "/nowhere")
    with pytest.raises(UserError, match=r"apt-get install .*munge slurm-wlm slurmdbd"):
        second.up()


# --- What runs on it.


def all_reduce() -> dict[str, str | float]:
    """One rank: joins the others over the hosts' network and adds the ranks' numbers."""
    import os
    import socket

    import submitit
    import torch

    environment = submitit.JobEnvironment()
    os.environ["MASTER_ADDR"] = environment.hostnames[0]
    os.environ["MASTER_PORT"] = "29500"
    torch.distributed.init_process_group(
        "gloo", rank=environment.global_rank, world_size=environment.num_tasks
    )
    total = torch.tensor(float(environment.global_rank))
    torch.distributed.all_reduce(total)
    torch.distributed.destroy_process_group()
    return {
        "host": socket.gethostname(),
        "gpu": os.environ["CUDA_VISIBLE_DEVICES"],
        "total": total.item(),
    }


def test_eight_ranks_on_two_hosts(on_cluster: Cluster, tmp_path: Path) -> None:
    executor = submitit.AutoExecutor(tmp_path, cluster="slurm")
    executor.update_parameters(
        nodes=2,
        tasks_per_node=4,
        timeout_min=5,
        slurm_additional_parameters={"gpus_per_task": 1},
        slurm_srun_args=["--cpus-per-task=1", "--kill-on-bad-exit=1"],
    )
    job = executor.submit(all_reduce)
    try:
        results = job.results()
    finally:
        job.cancel()
    assert [result["total"] for result in results] == [28.0] * 8
    expected = [(f"cvae-node{node}", str(gpu)) for node in (1, 2) for gpu in range(4)]
    assert [(result["host"], result["gpu"]) for result in results] == expected
    accounted = on_cluster.command("sacct", "-n", "-P", "-X", "-j", job.job_id, "-o", "AllocTRES")
    assert "gres/gpu=8" in accounted


class CountingJob:
    """A job of one host that notes each of its starts and each SIGTERM, and stays."""

    def __init__(self, cluster: Cluster, folder: Path, *options: str) -> None:
        self.journal = folder / "journal"
        self.journal.touch()
        script = folder / "job.sh"
        script.write_text(
            "#!/bin/bash\n"
            f'srun bash -c \'trap "echo SIGTERM >>{self.journal}; exit 0" TERM;'
            f" echo start $SLURM_RESTART_COUNT >>{self.journal};"
            " for i in {1..600}; do sleep 0.1; done'\n"
        )
        output = f"--output={folder}/output"
        command = ["sbatch", "--parsable", "--gpus=4", "--nodes=1", output, *options, str(script)]
        self.id = cluster.command(*command).strip()

    def lines(self) -> list[str]:
        return [line.strip() for line in self.journal.read_text().splitlines()]


@pytest.fixture
def counting_job(on_cluster: Cluster, tmp_path: Path) -> Iterator[Callable[..., CountingJob]]:
    jobs: list[CountingJob] = []

    def submit(*options: str) -> CountingJob:
        folder = tmp_path / f"job-{len(jobs)}"
        folder.mkdir()
        jobs.append(CountingJob(on_cluster, folder, *options))
        until(lambda: jobs[-1].lines() == ["start"], 30, 0.1, "the job's first start")
        return jobs[-1]

    yield submit
    on_cluster.command("scancel", *(job.id for job in jobs))


def test_requeued_and_preempted_jobs_run_again(
    on_cluster: Cluster, counting_job: Callable[..., CountingJob]
) -> None:
    requeued = counting_job("--partition=main", "--nodelist=cvae-node1")
    preempted = counting_job("--partition=main", "--nodelist=cvae-node2")
    on_cluster.command("scontrol", "requeue", requeued.id)
    command = ["srun", "--partition=urgent", "--nodelist=cvae-node2", "--gpus=4", "hostname"]
    assert on_cluster.command(*command) == "cvae-node2\n"
    for job in (requeued, preempted):
        until(lambda job=job: len(job.lines()) == 3, 40, 0.1, "a second start")  # type: ignore[misc]
        assert job.lines() == ["start", "SIGTERM", "start 1"]


def test_a_job_outlives_its_slurmd(
    on_cluster: Cluster, counting_job: Callable[..., CountingJob]
) -> None:
    job = counting_job("--nodelist=cvae-node2")
    node = on_cluster.host("cvae-node2")
    node.kill_slurmd()
    with pytest.raises(ClusterError):
        node.run("kill", "-0", (node.folder / "slurmd.pid").read_text().strip())
    node.start_slurmd()
    # Only a slurmd that knows the job's processes can pass this signal on.
    on_cluster.command("scancel", "--signal=TERM", job.id)
    until(lambda: job.lines() == ["start", "SIGTERM"], 20, 0.1, "the signal")


def test_a_cut_link_cuts_and_heals(on_cluster: Cluster) -> None:
    node, other = on_cluster.host("cvae-node1"), on_cluster.host("cvae-node2")

    def reaches() -> bool:
        try:
            other.run("timeout", "1", "bash", "-c", f"echo >/dev/tcp/{node.name}/26818")
        except ClusterError:
            return False
        return True

    assert reaches()
    node.cut_link()
    try:
        assert not reaches()
        assert node.run("hostname") == "cvae-node1\n"
    finally:
        node.heal_link()
    until(reaches, 5, 0.1, "the healed link")


def test_a_host_comes_back_after_power_loss(on_cluster: Cluster) -> None:
    node = on_cluster.host("cvae-node2")
    node.power_off()
    assert node.launcher() is None
    with pytest.raises(ClusterError, match="cvae-node2 is off"):
        node.run("true")
    node.power_on()
    until(on_cluster.is_ready, 30, 0.1, "all nodes idle")
    assert on_cluster.command("srun", "--nodelist=cvae-node2", "hostname") == "cvae-node2\n"
