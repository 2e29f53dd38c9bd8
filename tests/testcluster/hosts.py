"""Hosts made of namespaces: boot, enter, end; for nodes also the faults that tests inject."""

import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

BRIDGE = "cluster"
# What the daemons get to see: nothing of the caller's SLURM_*, LD_* or virtual environment. Debian's
# su without "-" leaves the sbin folders out of PATH.
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# A host's process 1. Records its launcher before there is anything to clean up, so that even a
# killed `up` leaves nothing that `down` cannot find. A shell in an endless loop also reaps orphans.
_LAUNCH = 'cat /proc/$$/stat >"$0/launcher" && exec "$@"'
_BOOT = """
set -e
hostname "$1"
mount -n --bind "$2/hosts-file" /etc/hosts
mount -n --bind "$0/ray" /tmp/ray
mount -n -t tmpfs -o mode=1777 tmpfs /dev/shm
ip link set lo up
touch "$0/booted"
while :; do sleep 3600; done
"""


class ClusterError(Exception):
    """A part of the test cluster does not work; .log is the file that tells why."""

    def __init__(self, message: str, log: Path | None = None) -> None:
        super().__init__(message)
        self.log = log


def wait_for(condition: Callable[[], bool], seconds: float, error: str, log: Path | None) -> None:
    """Raises ClusterError(error, log) when the condition does not come true in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise ClusterError(f"{error} (waited {seconds:.0f} s)", log)
        time.sleep(0.05)


def execute(
    command: Sequence[str],
    log: Path | None = None,
    enter: Sequence[str] = (),
    **environment: str,
) -> str:
    """Runs a command (behind the words of `enter`) to its end and returns its output.

    Raises ClusterError with the last line of what it printed; all of it goes to the log.
    """
    name = Path(command[0]).name
    try:
        result = subprocess.run(
            [*enter, *command],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env={"PATH": PATH, "LC_ALL": "C.UTF-8", "HOME": "/root"} | environment,
            timeout=120,
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(f"{name} does not end", log) from error
    if result.returncode != 0:
        last = (result.stderr.strip() or result.stdout.strip() or "no message").splitlines()[-1]
        if log is not None:
            # A daemon that fails early says so here only, before it opens its own log.
            with log.open("a") as file:
                file.write(result.stdout + result.stderr)
        raise ClusterError(f"{name} failed: {last.removeprefix(f'{name}: ')}", log)
    return result.stdout


class Host:
    """One machine of the cluster, on the machine that we are on."""

    def __init__(self, state: Path, name: str, address: str) -> None:
        self.state = state
        self.name = name
        self.address = address
        self.folder = state / "hosts" / name
        self.log = state / "log" / f"{name}.log"

    def launcher(self) -> psutil.Process | None:
        """The process whose only child is the host's process 1; None when the host is off."""
        try:
            recorded = (self.folder / "launcher").read_text()
            pid = int(recorded.split()[0])
            current = Path(f"/proc/{pid}/stat").read_text()
            # Process ids come round again; id and start time together do not.
            if _start_time(current) != _start_time(recorded):
                return None
            process = psutil.Process(pid)
            return None if process.status() == psutil.STATUS_ZOMBIE else process
        except (OSError, ValueError, IndexError, psutil.NoSuchProcess):
            return None

    def power_on(self) -> None:
        """Boots the host with its loopback only."""
        (self.folder / "ray").mkdir(parents=True, exist_ok=True)
        (self.folder / "ray").chmod(0o1777)
        (self.folder / "booted").unlink(missing_ok=True)
        unshare = ["unshare", "--net", "--uts", "--pid", "--fork", "--kill-child"]
        # slave: a file system that is mounted later shows up on the hosts too, but none of their
        # own mounts shows up here.
        unshare += ["--mount", "--propagation", "slave", "--mount-proc"]
        boot = ["sh", "-c", _BOOT, str(self.folder), self.name, str(self.state)]
        with self.log.open("ab") as log:
            subprocess.run(
                ["setsid", "--fork", "sh", "-c", _LAUNCH, str(self.folder), *unshare, *boot],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={"PATH": PATH},
                check=True,
            )
        booted = self.folder / "booted"
        wait_for(booted.exists, 10, f"host {self.name} did not boot", self.log)

    def power_off(self) -> None:
        """Ends every process of the host at once; the kernel then drops its network and mounts."""
        power_off([self])

    def run(self, *command: str, log: Path | None = None, **environment: str) -> str:
        """Runs a command on the host to its end and returns its output. Raises ClusterError."""
        return execute(command, log or self.log, self._enter(), **environment)

    def _enter(self) -> list[str]:
        launcher = self.launcher()
        if launcher is None:
            raise ClusterError(f"host {self.name} is off")
        target = ["nsenter", "--target", str(launcher.pid), "--net", "--uts", "--mount"]
        return [*target, f"--pid=/proc/{launcher.pid}/ns/pid_for_children"]


class Controller(Host):
    """Runs the central daemons and is the switch that the links of all others end in."""

    def connect(self, port: str, network: int, interface: str, address: str) -> None:
        """Plugs a cable from the switch's port into the network namespace of process `network`."""
        launcher = self.launcher()
        if launcher is None:
            raise ClusterError(f"host {self.name} is off")
        # Only the network: the process id has to mean the same on both sides.
        here = ["nsenter", f"--net=/proc/{launcher.pid}/ns/net"]
        there = ["nsenter", f"--net=/proc/{network}/ns/net"]
        link = f"ip link add name {port} type veth peer name {interface} netns {network}"
        execute(link.split(), enter=here)
        execute(f"ip link set {port} master {BRIDGE} up".split(), enter=here)
        execute(f"ip address add {address}/24 dev {interface}".split(), enter=there)
        execute(f"ip link set {interface} up".split(), enter=there)

    def power_on(self) -> None:
        super().power_on()
        self.run("ip", "link", "add", "name", BRIDGE, "type", "bridge")
        self.run("ip", "address", "add", f"{self.address}/24", "dev", BRIDGE)
        self.run("ip", "link", "set", BRIDGE, "up")


class Node(Host):
    """A compute node, with the faults that a test may inject."""

    def __init__(self, state: Path, name: str, address: str, controller: Controller) -> None:
        super().__init__(state, name, address)
        self.controller = controller

    def power_on(self) -> None:
        """Boots the host, connects it and starts slurmd. After power_off() SLURM takes it back."""
        super().power_on()
        launcher = self.launcher()
        assert launcher is not None
        self.controller.connect(self.name, launcher.pid, "eth0", self.address)
        self.start_slurmd()

    def power_off(self) -> None:
        """Pulls the plug: processes, network and memory file systems are gone at once."""
        super().power_off()
        # The kernel removes a network some time after its last process; its cable must be gone
        # before the next power_on.
        if self.controller.launcher():
            with suppress(ClusterError):
                self.controller.run("ip", "link", "delete", self.name)

    def cut_link(self) -> None:
        """Unplugs the network cable; processes go on. SLURM notices after 15 to 30 s."""
        self.controller.run("ip", "link", "set", self.name, "down")

    def heal_link(self) -> None:
        """Plugs it in again. A node that SLURM has set down comes back within a minute (a restart
        of slurmd makes that seconds)."""
        self.controller.run("ip", "link", "set", self.name, "up")

    def throttle_link(self, mbit_s: float | None) -> None:
        """Limits what the host receives, in Mb/s; None: no limit."""
        queue = ["tc", "qdisc", "replace", "dev", self.name, "root"]
        if mbit_s is None:
            self.controller.run(*queue, "pfifo_fast")
        else:
            shape = ["tbf", "rate", f"{mbit_s}mbit", "burst", "128kb", "latency", "200ms"]
            self.controller.run(*queue, *shape)

    def start_slurmd(self) -> None:
        log = self.state / "log" / f"slurmd-{self.name}.log"
        self.run("slurmd", log=log, SLURM_CONF=str(self.state / "slurm.conf"))

    def kill_slurmd(self) -> None:
        """SIGKILL to slurmd alone: jobs go on, and are found again by start_slurmd()."""
        pid = (self.folder / "slurmd.pid").read_text().strip()
        self.run("kill", "-KILL", pid)


def power_off(hosts: Iterable[Host]) -> None:
    """Ends every process of the hosts, and returns when they are gone."""
    processes: list[psutil.Process] = []
    for host in hosts:
        if launcher := host.launcher():
            processes += [*launcher.children(), launcher]
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    # Process 1 is gone only after every other process of its namespace: waiting for it is waiting
    # for all of them.
    _, alive = psutil.wait_procs(processes, timeout=30)
    if alive:
        raise ClusterError(f"these processes do not end: {alive}")


def _start_time(stat: str) -> str:
    """Field 22 of /proc/<pid>/stat; the name in field 2 may hold blanks and brackets."""
    return stat.rpartition(")")[2].split()[19]
