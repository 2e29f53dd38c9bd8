"""Chooses the network interface over which the ranks of several hosts communicate.

By default gloo takes the address that a host's own name resolves to. On many systems that is 127.0.1.1, which
no other host can reach. NCCL ignores such addresses by itself.
"""

import ipaddress
import os
import socket
from typing import TYPE_CHECKING

import psutil

from cvae.errors import UserError

if TYPE_CHECKING:  # importing torch takes a second, and a node that only serves Ray needs none
    from torch.distributed.distributed_c10d import Store


def check_address(on_first_host: bool) -> None:
    """Raises UserError if MASTER_ADDR does not lead from this host to the first one."""
    host = os.environ["MASTER_ADDR"]
    own = source_address(host)
    if not on_first_host and is_loopback(own):
        raise UserError(
            f"{socket.gethostname()}: MASTER_ADDR = {host} leads to this host itself ({own}); give {host} its"
            " address in /etc/hosts or DNS, or set MASTER_ADDR in the cluster file's env or setup"
        )


def choose(store: "Store", rank: int, world_size: int) -> None:
    """Sets GLOO_SOCKET_IFNAME to the interface of the route to the first rank, unless the site has set it.

    The first host, whose own name may resolve to itself alone, takes the route to another host.
    """
    own = source_address(os.environ["MASTER_ADDR"])
    store.set(f"address {rank}", own)
    addresses = [store.get(f"address {other}").decode() for other in range(world_size)]
    if is_loopback(own):
        others = [address for address in addresses if not is_loopback(address)]
        own = source_address(others[0]) if others else own
    name = interface_of(own)
    if name is not None:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def source_address(host: str) -> str:
    """Returns this host's own address on the route to `host`, without sending anything.

    Raises UserError if the name cannot be resolved or no route leads there.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(
            f"{socket.gethostname()}: cannot reach MASTER_ADDR = {host}: {error.strerror}"
        ) from None


def interface_of(address: str) -> str | None:
    """Returns the name of the interface that has the address."""
    for name, addresses in psutil.net_if_addrs().items():
        if address in [one.address.partition("%")[0] for one in addresses]:
            return name
    return None


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
