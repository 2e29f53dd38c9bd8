"""The test cluster for tests that are marked `cluster`."""

import fcntl
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.testcluster import Cluster, ClusterError, missing


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The test cluster, 2 hosts × 4 GPUs: the one that is up, else one of this session's own.

    Several sessions at once (pytest-xdist's workers, say) share one; the last of them takes it
    down, unless it was up before the first.
    """
    if reason := missing():
        pytest.skip(reason)
    cluster = Cluster()
    users = cluster.state / "test-sessions"
    if cluster.up():
        users.touch()
    last = False
    if users.exists():
        with users.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield cluster
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                last = True
            except BlockingIOError:
                pass
    else:
        yield cluster
    if last:
        cluster.down()


@pytest.fixture
def on_cluster(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Cluster:
    """The test cluster, with SLURM's commands of this test (and submitit's) bound to it."""
    monkeypatch.setenv("SLURM_CONF", str(cluster.slurm_conf))
    return cluster


@pytest.fixture
def names_at_loopback(cluster: Cluster) -> Iterator[None]:
    """On each host its own name leads to 127.0.1.1, as Debian's installer has it."""
    for node in cluster.nodes:
        own = f"{node.folder}/own-hosts"
        line = f"s/^[0-9.]* {node.name}$/127.0.1.1 {node.name}/"
        node.run("sh", "-c", f"sed '{line}' /etc/hosts >{own}; mount -n --bind {own} /etc/hosts")
        assert "127.0.1.1" in node.run("getent", "hosts", node.name)
    yield
    for node in cluster.nodes:
        with suppress(ClusterError):  # it has been off since
            node.run("sh", "-c", "grep -q 127.0.1.1 /etc/hosts && umount -n /etc/hosts")
