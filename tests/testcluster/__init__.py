"""A real SLURM cluster of N hosts × G fake GPUs on one Debian machine, for development and tests.

    python -m tests.testcluster up [--hosts 2] [--gpus 4]
    export SLURM_CONF=/run/cvae-testcluster/slurm.conf      # sbatch, srun, sinfo, sacct, submitit
    python -m tests.testcluster down

Every host is a set of namespaces (network, host name, mounts, processes) with its own address on a
bridge, /tmp/ray and /dev/shm; the rest of the machine's file system is the cluster's shared one.
The controller (munged, MariaDB, slurmdbd, slurmctld) is such a host too, so no port, process or
mount of the cluster can meet those of a real SLURM on the machine, and ending a host's first
process ends all of it. Everything else lies in one folder, /run/cvae-testcluster.

Hosts cannot reach the outside. They reach the machine itself as ``cvae-host`` (10.213.77.2): bind a
service, such as an MLflow server, to that address and give the jobs ``http://cvae-host:<port>``.
A GPU is a character device like /dev/null: jobs get their CUDA_VISIBLE_DEVICES and run on the CPU.

Partitions: main (default) and graceful are preempted by urgent; settings.py says how they differ.

For fault tests: ``Cluster().host("cvae-node2").cut_link()``, and see Host and Node.
"""

from tests.testcluster.cluster import Cluster, missing
from tests.testcluster.hosts import ClusterError, Host, Node

__all__ = ["Cluster", "ClusterError", "Host", "Node", "missing"]
