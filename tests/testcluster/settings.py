"""The private configuration files of the test cluster."""

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from tests.testcluster.hosts import Host

CONTROLLER = "cvae-controller"
MACHINE = "cvae-host"
# Hosts' numbers in the network 10.213.x.0/24.
CONTROLLER_NUMBER = 1
MACHINE_NUMBER = 2
FIRST_NODE_NUMBER = 11
MAX_NODES = 200


def cpus_per_node(gpus: int) -> int:
    """What a node claims to have, whatever the machine has: two for each GPU, at least eight."""
    return max(8, 2 * gpus)


# Why these values:
# - SlurmctldTimeout … KillWait: faults should show in seconds. KillWait is the time between SIGTERM
#   and SIGKILL when a job is requeued or preempted (7 s measured).
# - Two partitions to be preempted. From main, a job is requeued whatever it does. In graceful it is
#   told by SIGTERM and has GraceTime to save; but if it then ends by itself it is *not* requeued
#   (measured), unless it asks for that with `scontrol requeue`. Real clusters have either kind.
# - cred_expire: a requeued job waits for its old credential to expire, 120 s by default.
# - bf_interval, sched_interval: 30 and 60 s by default, which is what a requeued job waits at worst.
# - config_overrides: nodes claim more CPUs and memory than there are.
SLURM_CONF = """\
ClusterName=cvae-testcluster
SlurmctldHost={controller}({controller_address})
SlurmUser=root
SlurmctldPort=26817
SlurmdPort=26818
AuthType=auth/munge
CryptoType=crypto/munge
AuthInfo=socket={state}/munge/socket,cred_expire=10

StateSaveLocation={state}/slurmctld
SlurmdSpoolDir={state}/hosts/%n/spool
SlurmctldPidFile={state}/slurmctld.pid
SlurmdPidFile={state}/hosts/%n/slurmd.pid
SlurmctldLogFile={state}/log/slurmctld.log
SlurmdLogFile={state}/log/slurmd-%n.log
MailProg=/bin/true

SlurmctldTimeout=15
SlurmdTimeout=15
KillWait=5
ReturnToService=2
JobRequeue=1

SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=2,sched_interval=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SlurmdParameters=config_overrides

JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=10
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={controller_address}
AccountingStoragePort=26819
AccountingStoragePass={state}/munge/socket
AccountingStorageTRES=gres/gpu

GresTypes=gpu
NodeName=DEFAULT CPUs={cpus} Sockets=1 CoresPerSocket={cpus} ThreadsPerCore=1 \
RealMemory={memory_mib} {node_gres}
{nodes}
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefaultTime=60
PartitionName=main Default=YES PriorityTier=1
PartitionName=graceful PriorityTier=1 GraceTime=30
PartitionName=urgent PriorityTier=10 PreemptMode=OFF
"""

SLURMDBD_CONF = """\
DbdHost={controller}
DbdAddr={controller_address}
DbdPort=26819
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={state}/munge/socket
LogFile={state}/log/slurmdbd.log
PidFile={state}/slurmdbd.pid
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm
"""

# Naming a plugin keeps slurmd from looking for one in /sys/fs/cgroup and from talking to systemd;
# nothing here uses cgroups, so none is made.
CGROUP_CONF = "CgroupPlugin=cgroup/v1\n"


def write(
    state: Path, controller: Host, machine_address: str, nodes: Sequence[Host], gpus: int
) -> None:
    """Writes all files below `state` and makes the device nodes of `gpus` fake GPUs (per node)."""
    for folder, mode in {"": 0o755, "log": 0o755, "munge": 0o755, "mariadb": 0o700}.items():
        (state / folder).mkdir(mode=mode, exist_ok=True)
        (state / folder).chmod(mode)
    for folder in ("slurmctld", "hosts", "gpus", *(f"hosts/{node.name}" for node in nodes)):
        (state / folder).mkdir(exist_ok=True)
        # Whatever the umask: other users' jobs run from here.
        (state / folder).chmod(0o755)

    for number in range(gpus):
        # /dev/null's number: harmless to whoever opens it. SLURM takes the GPU's index from the name.
        os.mknod(state / f"gpus/gpu{number}", 0o020666, os.makedev(1, 3))
    devices = f"{state}/gpus/gpu[0-{gpus - 1}]" if gpus > 1 else f"{state}/gpus/gpu0"
    gres = f"AutoDetect=off\nName=gpu File={devices}\n" if gpus else ""

    memory_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20
    values = {
        "state": state,
        "controller": controller.name,
        "controller_address": controller.address,
        "cpus": cpus_per_node(gpus),
        "memory_mib": memory_mib,
        "node_gres": f"Gres=gpu:{gpus}" if gpus else "",
        "nodes": "\n".join(f"NodeName={node.name} NodeAddr={node.address}" for node in nodes),
    }
    _write(state / "slurm.conf", SLURM_CONF.format(**values), 0o644)
    _write(state / "slurmdbd.conf", SLURMDBD_CONF.format(**values), 0o600)
    _write(state / "cgroup.conf", CGROUP_CONF, 0o644)
    _write(state / "gres.conf", gres, 0o644)
    _write(state / "munge/key", secrets.token_bytes(128), 0o400)

    # The machine's own name too: a job may have been told to call back there.
    names = ["127.0.0.1 localhost", f"{machine_address} {MACHINE} {os.uname().nodename}"]
    names += [f"{host.address} {host.name}" for host in (controller, *nodes)]
    _write(state / "hosts-file", "\n".join(names) + "\n", 0o644)


def _write(path: Path, content: str | bytes, mode: int) -> None:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    path.chmod(mode)
