"""This process's place among the ranks, and the small decisions that all ranks make together."""

import datetime
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from cvae.distributed import network_interface
from cvae.errors import UserError

T = TypeVar("T")
# All ranks connect within this time, or none begins. $CVAE_START_S takes precedence.
_CONNECT_S = 330
# Rank 0 may draw and write for some minutes while the others wait. The watchdog finds a lost rank, or a step that
# hangs, earlier.
_COLLECTIVE = datetime.timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """rank of world_size, computing on `device`. With one rank no process group exists."""

    rank: int
    world_size: int
    device: torch.device
    control: "dist.ProcessGroup | None"
    """A gloo group for small decisions: asking the others never waits for the GPU's queue."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def share(self, n: int) -> slice:
        """Returns this rank's part of n items; parts differ by at most one and follow one another by rank."""
        return slice(n * self.rank // self.world_size, n * (self.rank + 1) // self.world_size)

    def any(self, flag: bool) -> bool:
        """Returns on all ranks whether the flag is set on at least one."""
        return self.ask_any(flag)()

    def ask_any(self, flag: bool) -> Callable[[], bool]:
        """Asks all ranks, without waiting for them, whether the flag is set on at least one.

        Returns a function that waits for the answer. All ranks ask, and take the answer, in the same order.
        """
        if self.control is None:
            return lambda: flag
        votes = torch.tensor([int(flag)])
        work = dist.all_reduce(votes, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(votes.item())

        return answer

    def sum(self, values: Tensor) -> Tensor:
        """Returns the elementwise sum over all ranks, in place."""
        if self.control is not None:
            dist.all_reduce(values)
        return values

    def min(self, values: Tensor) -> Tensor:
        """Returns the elementwise minimum over all ranks, in place."""
        if self.control is not None:
            dist.all_reduce(values, dist.ReduceOp.MIN)
        return values

    def tell(self, value: T) -> T:
        """Returns rank 0's value on every rank. Plain data only: it travels pickled between our own ranks."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Returns every rank's value, in order of rank, on all ranks. Plain data only, as for `tell`."""
        if self.control is None:
            return [value]
        values = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def everywhere(self, action: Callable[[], T]) -> T:
        """Returns action() on this rank. If a rank raises UserError, all do: none waits for the others."""
        result, own_error = None, None
        try:
            result = action()
        except UserError as error:
            own_error = error
        answers = self.gather((socket.gethostname(), own_error))
        failed = [(host, refusal) for host, refusal in answers if refusal is not None]
        if failed:
            host, refusal = failed[0]
            if len(failed) < len(answers):
                refusal.args = (f"{host}: {refusal}",)
            raise refusal
        return result  # type: ignore[return-value]


@contextmanager
def connect() -> Iterator[Ranks]:
    """Joins the other ranks by torch's environment variables; yields a single rank if they are not set.

    The device is this rank's GPU, or else the CPU. The cores of a host are shared out among its ranks, unless
    OMP_NUM_THREADS or CVAE_CORES (this rank's share) says otherwise.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_host = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if torch.cuda.is_available():
        # If the cluster binds one GPU to each task, every task sees just one, whatever its local rank.
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ:
            cores = int(os.environ.get("CVAE_CORES", 0)) or len(os.sched_getaffinity(0)) // on_host
            torch.set_num_threads(max(1, cores))
    if world_size == 1:
        yield Ranks(0, 1, device, None)
        return
    # As init_process_group would make it, but with a time-out of its own.
    if several_hosts := on_host < world_size:
        network_interface.check_address(rank < on_host)
    store = _store(world_size, is_master=rank == 0)
    check_same_device(store, rank, world_size, device.type)
    if several_hosts:
        network_interface.choose(store, rank, world_size)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=_COLLECTIVE,
    )
    try:
        control = dist.group.WORLD if device.type == "cpu" else dist.new_group(backend="gloo")
        yield Ranks(rank, world_size, device, control)
    finally:
        dist.destroy_process_group()


def check_same_device(store: Store, rank: int, world_size: int, kind: str) -> None:
    """Raises UserError on all ranks if only some have a GPU: they would wait for each other."""
    store.set(f"device {rank}", f"{kind} {socket.gethostname()}")
    devices = [store.get(f"device {other}").decode().split() for other in range(world_size)]
    store.set(f"device heard {rank}", "yes")
    if rank == 0:
        # The store ends with this process.
        store.wait([f"device heard {other}" for other in range(world_size)])
    if len({kind for kind, _ in devices}) > 1:
        without = sorted({host for kind, host in devices if kind == "cpu"})
        raise UserError(
            f"{', '.join(without)}: PyTorch sees no GPU there, but elsewhere in the job; see what"
            " nvidia-smi says there, or keep the job away from that node"
        )


def another_store() -> Store:
    """Returns a second connection to the store at which the ranks met, for a thread of its own."""
    return PrefixStore("watchdog", _store(None, is_master=False))


def _store(world_size: int | None, is_master: bool) -> Store:
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size,
        is_master,
        timeout=datetime.timedelta(seconds=float(os.environ.get("CVAE_START_S", _CONNECT_S))),
        wait_for_workers=world_size is not None,
    )
