"""Ends a process whose ranks have stopped making progress; a collective would wait for a lost rank for ever.

A thread of every rank writes the rank's step to a store that all ranks reach, about once a second. A second thread
watches what the others write and how the rank's own steps advance, so that it knows which rank fell silent.
"""

import faulthandler
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch.distributed.distributed_c10d import Store

from cvae.distributed.ranks import Ranks, another_store

# A file server that fails over hangs for 45 s, and for a minute or two at the worst.
_DEFAULT_LIMIT_S = 120
# A step may take this many times as long as the slowest so far.
_SLOWER = 10
_BYE = "bye"
_log = logging.getLogger(__name__)


class Alarm(NamedTuple):
    rank: int
    """The rank at fault, as far as that can be known."""
    problem: str


class Watchdog:
    """Watches one rank and, through the store, the others; begin(), beat() and rest() cost next to nothing."""

    def __init__(self, ranks: Ranks, hosts: list[str], limit_s: float):
        """limit_s: how long a rank may be silent, and a step may take unless one has been slow before."""
        self.rank, self.hosts, self.limit_s = ranks.rank, hosts, limit_s
        self.step = 0
        self.alarm: Alarm | None = None
        self._poll_s = min(1.0, limit_s / 10)
        self._beat_at: float | None = None
        self._slowest = 0.0
        self._beats = 0
        self._began_at = self._store_at = now = time.monotonic()
        # When each of the other ranks was last heard, and its message: "<count> <step>".
        self._others = {rank: (now, "0 0") for rank in range(ranks.world_size) if rank != self.rank}
        self._over = threading.Event()

    def begin(self) -> None:
        """Marks the beginning of a step."""
        self._began_at = time.monotonic()

    def beat(self, step: int) -> None:
        """Marks the end of a step."""
        now = time.monotonic()
        # The first one (compiling, warming up) limits the second, and no other.
        before = 0.0 if self._beats == 1 else self._slowest
        self._slowest = max(before, now - self._began_at)
        self._beats += 1
        self.step, self._beat_at = step, now

    def rest(self) -> None:
        """Suspends the limit of a step until the next beat, for an evaluation or a save."""
        self._beat_at = None

    def talk(self, store: Store) -> None:
        """Writes this rank's step and reads the others'; the body of a thread, which may hang with the network."""
        count = 0
        try:
            while not self._over.wait(self._poll_s):
                count += 1
                store.set(f"rank {self.rank}", f"{count} {self.step}")
                keys = [f"rank {rank}" for rank in self._others]
                for rank, value in zip(self._others, store.multi_get(keys), strict=True):
                    message = value.decode()
                    if message != self._others[rank][1]:
                        self._others[rank] = (time.monotonic(), message)
                self._store_at = time.monotonic()
            store.set(f"rank {self.rank}", _BYE)
        except Exception as error:  # rank 0 has gone: watch() judges it by its silence
            _log.debug("the ranks' store: %s", error)

    def watch(self) -> None:
        """Ends the process if nothing advances any more; the body of a thread, which lasts until stop()."""
        looked = time.monotonic()
        while not self._over.wait(self._poll_s):
            now = time.monotonic()
            if now - looked > self.limit_s / 3:
                # This very process was suspended, as a job can be, and no other rank is to blame.
                self._forgive(now)
            looked = now
            self.alarm = self._look(now)
            if self.alarm is not None and not self._over.is_set():
                self._end(self.alarm)

    def stop(self) -> None:
        self._over.set()

    def _look(self, now: float) -> Alarm | None:
        others = {rank: heard for rank, heard in self._others.items() if heard[1] != _BYE}
        if others and now - self._store_at > self.limit_s:
            # Rank 0 holds the store.
            problem = f"cannot be reached from {self.hosts[self.rank]} any more"
            return Alarm(0, f"{problem} (silent for {now - self._store_at:.0f} s)")
        since_beat = 0.0 if self._beat_at is None else now - self._beat_at
        is_stuck = since_beat > max(self.limit_s, _SLOWER * self._slowest)
        # A silent rank that holds up this one has been silent for a little less time than this one is stuck.
        silence = self.limit_s / 3 if is_stuck else self.limit_s
        steps = {rank: int(message.split()[1]) for rank, (_, message) in others.items()}
        for rank, (heard_at, _) in others.items():
            if now - heard_at > silence:
                problem = f"silent for {now - heard_at:.0f} s, last heard at step {steps[rank]}"
                return Alarm(rank, problem)
        if is_stuck:
            # The rank at fault has not come as far as the others.
            behind = min(steps, key=lambda rank: steps[rank], default=self.rank)
            rank = behind if steps and steps[behind] < self.step else self.rank
            return Alarm(rank, f"no progress for {since_beat:.0f} s after step {self.step}")
        return None

    def _forgive(self, now: float) -> None:
        self._store_at = now
        self._others = {rank: (now, message) for rank, (_, message) in self._others.items()}
        if self._beat_at is not None:
            self._beat_at = now

    def _end(self, alarm: Alarm) -> None:
        host = self.hosts[alarm.rank]
        by = "" if alarm.rank == self.rank else f", noticed by rank {self.rank}"
        _log.error("watchdog: rank %d on %s: %s%s", alarm.rank, host, alarm.problem, by)
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        file = os.environ.get("CVAE_FAILURE_FILE")
        if file:
            facts = {"rank": alarm.rank, "host": host, "error": f"hangs: {alarm.problem}{by}"}
            with open(file, "w") as report:
                json.dump({"time": time.time(), **facts}, report)
        # Nothing less would end a thread that hangs in a collective.
        os._exit(1)


@contextmanager
def watched(ranks: Ranks) -> Iterator[Watchdog]:
    """Yields a watchdog for as long as the context lasts; its limit is $CVAE_WATCHDOG_S, in seconds."""
    limit_s = float(os.environ.get("CVAE_WATCHDOG_S", _DEFAULT_LIMIT_S))
    watchdog = Watchdog(ranks, ranks.gather(socket.gethostname()), limit_s)
    threads = [threading.Thread(target=watchdog.watch, name="watchdog", daemon=True)]
    if ranks.world_size > 1:
        store = another_store()
        store.set(f"rank {ranks.rank}", "0 0")
        ranks.any(False)  # every rank has written by now
        talk = threading.Thread(target=watchdog.talk, args=(store,), name="heartbeat", daemon=True)
        threads.append(talk)
    for thread in threads:
        thread.start()
    try:
        yield watchdog
    finally:
        watchdog.stop()
        for thread in threads[1:]:
            thread.join(2.0)
