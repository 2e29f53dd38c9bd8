"""Ranks of several hosts find each other whatever their own names resolve to."""

import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from cvae.distributed import network_interface
from cvae.distributed.ranks import connect
from cvae.errors import UserError

# Two hosts in miniature, joined by a cable: each has its own network, name and /etc/hosts.
TWO_HOSTS = """
set -e
hostname hosta; mount --bind $1/hosta /etc/hosts; ip link set lo up
RANK=1 unshare --net --uts --mount bash -c '
  hostname hostb; mount --bind $1/hostb /etc/hosts; ip link set lo up
  until ip address add 10.213.7.2/24 dev cable 2> /dev/null; do sleep 0.05; done
  ip link set cable up; exec "${@:2}"' - "$@" &
while [ "$(readlink /proc/$!/ns/net)" = "$(readlink /proc/self/ns/net)" ]; do sleep 0.05; done
ip link add cable0 type veth peer name cable netns $!
ip address add 10.213.7.1/24 dev cable0; ip link set cable0 up
RANK=0 "${@:2}"
wait $!
"""
PROGRAM = """
import os, sys
from cvae.errors import UserError
from cvae.distributed.ranks import connect
try:
    with connect() as ranks:
        total = sum(map(int, ranks.gather(os.environ["RANK"])))
        # At once: both ranks write into one pipe.
        os.write(1, f"sum {total} {os.environ.get('GLOO_SOCKET_IFNAME')}\\n".encode())
except UserError as error:
    print(error, flush=True)
    sys.exit(2)
"""


def two_hosts(folder: Path, hosts_a: str, hosts_b: str) -> str:
    (folder / "hosta").write_text(hosts_a)
    (folder / "hostb").write_text(hosts_b)
    variables = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "CUDA_VISIBLE_DEVICES": ""}
    variables |= {"MASTER_ADDR": "hosta", "MASTER_PORT": "29111"}
    command = ["unshare", "--net", "--uts", "--mount", "bash", "-c", TWO_HOSTS, "-", str(folder)]
    done = subprocess.run(
        [*command, sys.executable, "-c", PROGRAM],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=60,
    )
    return done.stdout


@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("ip") is None, reason="needs root and iproute2"
)
def test_hosts_whose_own_names_are_loopback_meet(tmp_path: Path) -> None:
    loopback = "127.0.0.1 localhost\n127.0.1.1 {}\n10.213.7.{} {}\n"
    output = two_hosts(
        tmp_path, loopback.format("hosta", 2, "hostb"), loopback.format("hostb", 1, "hosta")
    )
    assert sorted(output.splitlines()) == ["sum 1 cable", "sum 1 cable0"]


def test_a_first_host_that_nobody_can_reach_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    network_interface.check_address(on_first_host=True)
    with pytest.raises(UserError, match=r"MASTER_ADDR = localhost leads to this host itself"):
        network_interface.check_address(on_first_host=False)
    monkeypatch.setenv("MASTER_ADDR", "no such host")
    with pytest.raises(UserError, match=r"cannot reach MASTER_ADDR = no such host: "):
        network_interface.check_address(on_first_host=False)


def test_what_the_site_has_named_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")  # so that it is as before in the end
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    network_interface.choose(HashStore(), 0, 1)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "lo"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    network_interface.choose(HashStore(), 0, 1)
    assert os.environ["GLOO_SOCKET_IFNAME"] == "ib0"


def test_one_host_needs_no_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no such host")
    monkeypatch.setattr(socket, "getaddrinfo", None)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with connect() as ranks:
        assert ranks.world_size == 1
