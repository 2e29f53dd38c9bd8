"""The command line: python -m tests.testcluster up | down | status."""

import argparse
import signal
import sys

from cvae.errors import UserError
from tests.testcluster.cluster import Cluster
from tests.testcluster.hosts import ClusterError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.testcluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="bring the cluster up, if it is not (needs root)")
    up.add_argument("--hosts", type=int, default=2, help="number of nodes (default: 2)")
    up.add_argument("--gpus", type=int, default=4, help="fake GPUs per node (default: 4)")
    commands.add_parser("down", help="take it down without a trace")
    commands.add_parser("status", help="say whether it is up; exit status 1 when not")
    arguments = parser.parse_args()

    # As with Ctrl-C, a cluster that is half up is taken down again.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    cluster = Cluster()
    try:
        if arguments.command == "up":
            return _up(cluster, arguments.hosts, arguments.gpus)
        if arguments.command == "down":
            print("The test cluster is down." if cluster.down() else "There is no test cluster.")
            return 0
        return _status(cluster)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ClusterError as error:
        print(f"error: {error}" + (f"; see {error.log}" if error.log else ""), file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def _up(cluster: Cluster, hosts: int, gpus: int) -> int:
    new = cluster.up(hosts, gpus)
    print(f"The test cluster is up{'' if new else ' already'}: {hosts} hosts × {gpus} GPUs.")
    print("To use it:          ", f"export SLURM_CONF={cluster.slurm_conf}")
    print("To take it down:    ", "python -m tests.testcluster down")
    return 0


def _status(cluster: Cluster) -> int:
    if not cluster.is_ready():
        print("There is no test cluster." if cluster.shape() is None else "It does not answer.")
        return 1
    print(f"SLURM_CONF={cluster.slurm_conf}")
    for name, state in cluster.node_states().items():
        print(f"{name}  {state}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
