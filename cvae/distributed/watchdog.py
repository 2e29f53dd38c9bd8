"""Ends a process whose ranks have come to a standstill; a collective would wait for the lost one for ever.

Every rank tells its step to a store that all can reach, about once a second, from a thread of its own. Each
watches the others there, so that it is known which rank fell silent, and its own steps besides.
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

# A file server that fails over stands still for 45 s, and for a minute or two at the worst.
_DEFAULT_LIMIT_S = 120
# A step may be so much slower than the slowest so far.
_SLOWER = 10
_BYE = "bye"
_log = logging.getLogger(__name__)


class Alarm(NamedTuple):
    rank: int
    """Whose fault it is, as far as that can be known."""
    what: str


class Watchdog:
    """begin(), beat() and rest() cost a clock and an assignment; the rest happens in two threads.

    limit_s: how long a rank may be silent, and a step may take, where none has been slow before.
    """

    def __init__(self, ranks: Ranks, hosts: list[str], limit_s: float):
        self.rank, self.hosts, self.limit_s = ranks.rank, hosts, limit_s
        self.step = 0
        self.alarm: Alarm | None = None
        self._poll_s = min(1.0, limit_s / 10)
        self._beat_at: float | None = None
        self._began_at = time.monotonic()
        self._slowest = 0.0
        self._beats = 0
        now = time.monotonic()
        self._others = {rank: (now, "0 0") for rank in range(ranks.world_size) if rank != self.rank}
        self._store_at = now
        self._over = threading.Event()

    def begin(self) -> None:
        """A step begins."""
        self._began_at = time.monotonic()

    def beat(self, step: int) -> None:
        """A step is done."""
        now = time.monotonic()
        # The first one (compiling, warming up) says how long the second may take, and no more.
        before = 0.0 if self._beats == 1 else self._slowest
        self._slowest = max(before, now - self._began_at)
        self._beats += 1
        self.step, self._beat_at = step, now

    def rest(self) -> None:
        """What follows is no step (an evaluation, a save) and may take its time, until the next beat."""
        self._beat_at = None

    def talk(self, store: Store) -> None:
        """Tells this rank's step and hears the others'; may hang with the network, at no harm."""
        count = 0
        try:
            while not self._over.wait(self._poll_s):
                count += 1
                store.set(f"rank {self.rank}", f"{count} {self.step}")
                keys = [f"rank {rank}" for rank in self._others]
                for rank, value in zip(self._others, store.multi_get(keys), strict=True):
                    said = value.decode()
                    if said != self._others[rank][1]:
                        self._others[rank] = (time.monotonic(), said)
                self._store_at = time.monotonic()
            store.set(f"rank {self.rank}", _BYE)
        except Exception as error:  # rank 0 has gone: judged by its silence
            _log.debug("the ranks' store: %s", error)

    def watch(self) -> None:
        """Until all is over; ends the process where nothing moves any more."""
        looked = time.monotonic()
        while not self._over.wait(self._poll_s):
            now = time.monotonic()
            if now - looked > self.limit_s / 3:
                # This very process stood still, as a suspended job does: nobody else is to blame for that.
                self._forgive(now)
            looked = now
            self.alarm = self._look(now)
            if self.alarm is not None and not self._over.is_set():
                self._end(self.alarm)

    def stop(self) -> None:
        self._over.set()

    def _look(self, now: float) -> Alarm | None:
        others = {rank: said for rank, said in self._others.items() if said[1] != _BYE}
        if others and now - self._store_at > self.limit_s:
            # Rank 0 holds the store.
            what = f"cannot be reached from {self.hosts[self.rank]} any more"
            return Alarm(0, f"{what} (silent for {now - self._store_at:.0f} s)")
        allowed = max(self.limit_s, _SLOWER * self._slowest)
        beat_at = self._beat_at
        stuck = beat_at is not None and now - beat_at > allowed
        # Who has stopped this rank by being silent has been so a little shorter than it stands still.
        silence = self.limit_s / 3 if stuck else self.limit_s
        for rank, (heard, said) in others.items():
            if now - heard > silence:
                at = f"last heard at step {said.split()[1]}"
                return Alarm(rank, f"silent for {now - heard:.0f} s, {at}")
        if stuck and beat_at is not None:
            # The last to have told of a step has not come as far as the others.
            steps = {rank: int(said.split()[1]) for rank, (_, said) in others.items()}
            behind = min(steps, key=lambda rank: steps[rank], default=self.rank)
            rank = behind if steps and steps[behind] < self.step else self.rank
            return Alarm(rank, f"no progress for {now - beat_at:.0f} s after step {self.step}")
        return None

    def _forgive(self, now: float) -> None:
        self._store_at = now
        self._others = {rank: (now, said) for rank, (_, said) in self._others.items()}
        if self._beat_at is not None:
            self._beat_at = now

    def _end(self, alarm: Alarm) -> None:
        host = self.hosts[alarm.rank]
        by = "" if alarm.rank == self.rank else f", noticed by rank {self.rank}"
        _log.error("watchdog: rank %d on %s: %s%s", alarm.rank, host, alarm.what, by)
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        file = os.environ.get("CVAE_FAILURE_FILE")
        if file:
            facts = {"rank": alarm.rank, "host": host, "error": f"hangs: {alarm.what}{by}"}
            with open(file, "w") as report:
                json.dump({"time": time.time(), **facts}, report)
        # Nothing less would end a thread that hangs in a collective.
        os._exit(1)


@contextmanager
def watched(ranks: Ranks) -> Iterator[Watchdog]:
    """A watchdog for as long as the context lasts; the limit is $CVAE_WATCHDOG_S, in seconds."""
    limit_s = float(os.environ.get("CVAE_WATCHDOG_S", _DEFAULT_LIMIT_S))
    watchdog = Watchdog(ranks, ranks.gather(socket.gethostname()), limit_s)
    threads = [threading.Thread(target=watchdog.watch, name="watchdog", daemon=True)]
    if ranks.world_size > 1:
        store = another_store()
        store.set(f"rank {ranks.rank}", "0 0")
        ranks.any(False)  # all are there now
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
