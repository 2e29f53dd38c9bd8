"""Up, down and status of the whole test cluster."""

import json
import math
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from cvae.errors import UserError
from cvae.files.file_lock import file_lock
from tests.testcluster import settings
from tests.testcluster.hosts import (
    PATH,
    ClusterError,
    Controller,
    Host,
    Node,
    execute,
    power_off,
    wait_for,
)

PACKAGES = {
    "slurm-wlm": ["slurmctld", "slurmd", "sbatch", "sinfo"],
    "slurmdbd": ["slurmdbd"],
    "munge": ["munged"],
    # Not mariadb-server, which would start a database of the machine's own.
    "mariadb-server-core": ["mariadbd", "mariadb-install-db"],
    "mariadb-client-core": ["my_print_defaults"],
    "iproute2": ["ip"],
    "util-linux": ["unshare", "nsenter", "setsid"],
}


def missing() -> str | None:
    """What this machine lacks for a test cluster, in one line; None when it has all."""
    if sys.platform != "linux":
        return "the test cluster needs Linux"
    absent = {
        package
        for package, programs in PACKAGES.items()
        if any(shutil.which(program, path=PATH) is None for program in programs)
    }
    if absent:
        return f"the test cluster needs Debian packages: apt-get install {' '.join(sorted(absent))}"
    if os.geteuid() != 0:
        return "the test cluster needs root"
    try:
        execute(["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "true"])
    except ClusterError as error:
        return f"the test cluster needs a root that may make namespaces ({error})"
    return None


class Cluster:
    """A test cluster of this machine, whether up or down.

    People and tests share the default one. Another name and network (its first three numbers) make
    one beside it, for tests of the test cluster itself.
    """

    def __init__(self, name: str = "cvae-testcluster", network: str = "10.213.77") -> None:
        self.name = name
        self.network = network
        self.state = Path("/run") / name
        self.slurm_conf = self.state / "slurm.conf"
        # Where the logs of a cluster that did not come up are kept.
        self.failed_logs = Path("/var/log") / name
        self.machine_address = f"{network}.{settings.MACHINE_NUMBER}"
        self.interface = f"cvae-net{network.split('.')[-1]}"
        address = f"{network}.{settings.CONTROLLER_NUMBER}"
        self.controller = Controller(self.state, settings.CONTROLLER, address)

    def shape(self) -> tuple[int, int] | None:
        """(hosts, GPUs per host) of the cluster that is up or has left something behind."""
        try:
            shape = json.loads((self.state / "shape.json").read_text())
            return int(shape["hosts"]), int(shape["gpus"])
        except (OSError, ValueError, KeyError):
            return None

    @property
    def nodes(self) -> list[Node]:
        shape = self.shape()
        return self._nodes(shape[0]) if shape else []

    def host(self, name: str) -> Node:
        for node in self.nodes:
            if node.name == name:
                return node
        names = ", ".join(node.name for node in self.nodes) or "none: it is down"
        raise UserError(f"the test cluster has no host {name!r}; it has {names}")

    def command(self, *command: str) -> str:
        """Runs one of SLURM's commands on the machine itself, as a user would; returns its output.

        Raises ClusterError with the last line it printed.
        """
        return execute(command, SLURM_CONF=str(self.slurm_conf))

    def node_states(self) -> dict[str, str]:
        """Node name → state as sinfo says it, such as idle, mixed, down*. Raises ClusterError."""
        lines = self.command("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").splitlines()
        return dict(line.split() for line in lines)

    def is_ready(self) -> bool:
        """All nodes are up and in reach, and the accounting answers."""
        # Without this, a cluster that is down costs the commands' own long time-outs.
        if self.controller.launcher() is None:
            return False
        try:
            states = self.node_states()
            self.command("sacct", "-n", "-X")
        except ClusterError:
            return False
        working = {"idle", "mixed", "allocated", "completing"}
        return len(states) == len(self.nodes) and set(states.values()) <= working

    def up(self, hosts: int = 2, gpus: int = 4) -> bool:
        """Brings the cluster up; False when it was up already.

        Remains of a cluster that does not work are taken down first. Raises UserError when the
        machine lacks something or a cluster of another shape is up, ClusterError (after having
        taken everything down again) when a part does not start.
        """
        if reason := missing():
            raise UserError(reason)
        if not 1 <= hosts <= settings.MAX_NODES or not 0 <= gpus <= 64:
            raise UserError(f"hosts={hosts} gpus={gpus}: 1 to {settings.MAX_NODES}, 0 to 64")
        with _alone(self.state.parent):
            if self.shape() is not None:
                with suppress(ClusterError):
                    wait_for(self.is_ready, 20, "the cluster does not answer", None)
                if self.is_ready():
                    if self.shape() == (hosts, gpus):
                        return False
                    other = "a cluster of {} hosts × {} GPUs is up".format(*self.shape() or ())
                    raise UserError(f"{other}; take it down before you ask for another one")
            self._clean()
            shutil.rmtree(self.failed_logs, ignore_errors=True)
            try:
                self._start(hosts, gpus)
            except BaseException as error:
                if isinstance(error, ClusterError):
                    error.log = self._keep_logs(error.log)
                self._clean()
                raise
        return True

    def down(self) -> bool:
        """Takes down whatever there is, whole or half dead; False when there was nothing.

        Raises UserError without root, ClusterError when a process does not end.
        """
        if not self.state.exists() and not self._is_plugged_in():
            return False
        if os.geteuid() != 0:
            raise UserError("taking the test cluster down needs root")
        with _alone(self.state.parent):
            return self._clean()

    def _start(self, hosts: int, gpus: int) -> None:
        nodes = self._nodes(hosts)
        self.state.mkdir(mode=0o755)
        steps: list[tuple[str, Callable[[], None]]] = [
            ("files", lambda: self._write_files(nodes, gpus)),
            ("network", self._start_network),
            ("munge", self._start_munge),
            ("MariaDB", self._start_mariadb),
            ("slurmdbd", self._start_slurmdbd),
            ("slurmctld", self._start_slurmctld),
            *((node.name, node.power_on) for node in nodes),
            ("all nodes idle", self._wait_ready),
        ]
        terminal = sys.stderr.isatty()
        with tqdm(
            steps,
            leave=False,
            mininterval=0.1 if terminal else 10,
            bar_format="test cluster: {desc:15}{bar:20} {elapsed}",
        ) as bar:
            for name, step in bar:
                bar.set_description_str(name, refresh=terminal)
                step()

    def _write_files(self, nodes: list[Node], gpus: int) -> None:
        settings.write(self.state, self.controller, self.machine_address, nodes, gpus)
        # Mount points must exist outside too, where a real Ray may have made this one.
        with suppress(FileExistsError):
            Path("/tmp/ray").mkdir(mode=0o1777)
            (self.state / "made-tmp-ray").touch()
        (self.state / "shape.json").write_text(json.dumps({"hosts": len(nodes), "gpus": gpus}))

    def _start_network(self) -> None:
        self.controller.power_on()
        self.controller.connect("machine", os.getpid(), self.interface, self.machine_address)

    def _start_munge(self) -> None:
        folder = self.state / "munge"
        files = {"socket": "socket", "pid-file": "pid", "seed-file": "seed", "key-file": "key"}
        options = [f"--{option}={folder}/{name}" for option, name in files.items()]
        log = self.state / "log/munged.log"
        self.controller.run("munged", *options, f"--log-file={log}", log=log)

    def _start_mariadb(self) -> None:
        folder, log = self.state / "mariadb", self.state / "log/mariadbd.log"
        options = ["--no-defaults", "--user=root", f"--datadir={folder}/data"]
        # A database that nobody will miss: small, and never waiting for a disk.
        options += ["--innodb-log-file-size=4M", "--innodb-flush-log-at-trx-commit=0"]
        install = ["mariadb-install-db", *options, "--auth-root-authentication-method=socket"]
        self.controller.run(*install, "--skip-test-db", log=log)
        options += ["--skip-networking", f"--socket={folder}/socket", f"--tmpdir={folder}"]
        options += [f"--pid-file={folder}/pid", f"--log-error={log}"]
        self.controller.run("setsid", "--fork", "mariadbd", *options, log=log)
        wait_for(lambda: _answers(folder / "socket"), 30, "MariaDB did not start", log)

    def _start_slurmdbd(self) -> None:
        log = self.state / "log/slurmdbd.log"
        # libmariadb's variable; slurmdbd.conf knows no socket.
        environment = {"MYSQL_UNIX_PORT": str(self.state / "mariadb/socket")}
        self.controller.run("slurmdbd", log=log, SLURM_CONF=str(self.slurm_conf), **environment)
        self._wait_for_answer(["sacctmgr", "-n", "show", "cluster"], log)

    def _start_slurmctld(self) -> None:
        log = self.state / "log/slurmctld.log"
        self.controller.run("slurmctld", log=log, SLURM_CONF=str(self.slurm_conf))
        self._wait_for_answer(["scontrol", "ping"], log)

    def _wait_for_answer(self, command: list[str], log: Path) -> None:
        def answers() -> bool:
            try:
                self.command(*command)
            except ClusterError:
                return False
            return True

        wait_for(answers, 30, f"{log.stem} does not answer", log)

    def _wait_ready(self) -> None:
        wait_for(self.is_ready, 60, "not all nodes came up", self.state / "log/slurmctld.log")

    def _nodes(self, hosts: int) -> list[Node]:
        return [
            Node(
                self.state,
                f"cvae-node{number + 1}",
                f"{self.network}.{settings.FIRST_NODE_NUMBER + number}",
                self.controller,
            )
            for number in range(hosts)
        ]

    def _is_plugged_in(self) -> bool:
        """Whether this machine has an end of a cable to the cluster."""
        return Path(f"/sys/class/net/{self.interface}").exists()

    def _keep_logs(self, log: Path | None) -> Path | None:
        with suppress(OSError):
            shutil.copytree(self.state / "log", self.failed_logs)
        kept = self.failed_logs / log.name if log else self.failed_logs
        return kept if kept.exists() else None

    def _clean(self) -> bool:
        """Ends and removes everything. Looks at what is there, not at what should be."""
        found = self.state.exists()
        power_off(Host(self.state, folder.name, "") for folder in (self.state / "hosts").glob("*"))
        if self._is_plugged_in():
            found = True
            # It may go by itself in between: its other end's network is being removed.
            with suppress(ClusterError):
                execute(["ip", "link", "delete", self.interface])
        if (self.state / "made-tmp-ray").exists():
            # Not empty when somebody has started a Ray of his own since.
            with suppress(OSError):
                Path("/tmp/ray").rmdir()
        if self.state.exists():
            shutil.rmtree(self.state)
        return found


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One `up` or `down` at a time. The lock is on a folder that exists anyway: nothing is left."""
    with file_lock(folder, math.inf):
        yield


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(str(path))
        except OSError:
            return False
    return True
