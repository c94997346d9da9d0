"""Every process of a run tells the others that it lives; who falls silent ends them all.

What all processes do together waits for everybody: for one that was killed until its connection
breaks, in an error that names nobody; for one that stands still, for ever.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NoReturn

import torch.distributed as dist

from promptkd.errors import UserError
from promptkd.ranks import Ranks

EVERY, PATIENCE = 2.0, 45.0
"""Seconds between two signs of life, and without one until a process counts as lost."""
FOLLOWING = 10.0
"""Seconds that a process may still wait for one that has said why it ends."""
VARIABLE = "PROMPTKD_PATIENCE"
"""Of the environment: other seconds until then."""
WORDS_FOR_A_LOST_PEER = ("closed by peer", "reset by peer", "Broken pipe", "Timed out", "NCCL")


class RollCall:
    """Signs of life by the store that brought the processes together.

    Two threads: one talks to the store, which may never answer; the other watches the clock.

    Attributes:
        phase: what this process does now, for messages.
        patience: seconds without a sign of life until a process counts as lost.
    """

    def __init__(self, ranks: Ranks):
        self.phase = "loading"
        self._ranks, self.patience = ranks, _patience()
        self._others = [rank for rank in range(ranks.number) if rank != ranks.rank]
        self._blamed: int | None = None
        self._is_done, self._last_words = False, ""
        self._wake = threading.Event()
        self._talker = threading.Thread(target=self._talk, daemon=True)
        self._heard: dict[int, dict[str, Any]] = {rank: {} for rank in self._others}
        self._since = dict.fromkeys(self._others, time.monotonic())
        self._answered = time.monotonic()
        if self._others:
            self._talker.start()
            threading.Thread(target=self._watch, daemon=True).start()

    @contextmanager
    def held(self) -> Iterator[None]:
        """While processes work together; what ends this one is told to the others.

        Raises:
            UserError: in place of the network's error, naming the rank that was lost.
        """
        try:
            yield
        except BaseException as error:
            if self._others and _is_of_the_network(error):
                self._blamed = self._find_lost()
                sentence = self._sentence(self._blamed, "was lost")
                self.close()
                raise UserError(sentence) from None
            self._last_words = str(error) or f"{type(error).__name__}."
            self.close()
            raise

    def close(self) -> None:
        """The last sign: this process is done, whether the run is or not."""
        self._is_done = True
        self._wake.set()
        if self._others:  # the interpreter's end aborts a process whose thread asks the store
            self._talker.join(3 * EVERY)

    def _talk(self) -> None:
        shared: Any = dist.distributed_c10d._get_default_store()  # its stubs know no clone
        store = shared.clone()  # a connection of this thread's own
        store.set_timeout(timedelta(seconds=self.patience))
        number = 0
        while True:
            is_last, number = self._is_done, number + 1
            sign = {"number": number, "phase": self.phase, "blamed": self._blamed}
            sign |= {"done": is_last, "last_words": self._last_words}
            try:
                store.set(f"sign/{self._ranks.rank}", json.dumps(sign))
                self._hear(store)
                if is_last:
                    self._stay(store)
                    return
            except RuntimeError:  # the store's host is gone
                return
            self._wake.wait(EVERY)

    def _hear(self, store: Any) -> None:
        for rank in self._others:
            if store.check([f"sign/{rank}"]):
                heard = json.loads(store.get(f"sign/{rank}"))
                if heard != self._heard[rank]:
                    self._heard[rank], self._since[rank] = heard, time.monotonic()
        self._answered = time.monotonic()

    def _stay(self, store: Any) -> None:
        """The first process, with which the store ends, gives the others time to hear it."""
        end = time.monotonic() + 1.5 * EVERY
        while self._ranks.rank == 0 and time.monotonic() < end:
            if all(sign.get("done") for sign in self._heard.values()):
                return
            time.sleep(0.1)
            self._hear(store)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._is_done:
            time.sleep(1)
            now = time.monotonic()
            if now - before > self.patience / 4:  # this process stood still itself
                self._answered, self._since = now, dict.fromkeys(self._others, now)
            before = now
            silent = self._silent(now)
            if silent is not None and not self._is_done:
                self._end(silent)

    def _silent(self, now: float) -> int | None:
        if now - self._answered > self.patience:
            return 0  # which hosts the store
        for rank, sign in self._heard.items():
            limit = float("inf") if sign.get("done") else self.patience
            if sign.get("last_words"):
                limit = FOLLOWING
            if now - self._since[rank] > limit:
                return rank
        return None

    def _end(self, rank: int) -> NoReturn:
        """A call that waits for the others can't be interrupted, only left with the process."""
        print(f"promptkd: {self._sentence(rank, 'stands still')}", file=sys.stderr, flush=True)
        os._exit(1)

    def _find_lost(self) -> int:
        """The rank that said why it ended, or that others blame, or else the one silent longest."""
        time.sleep(2.5 * EVERY)
        for rank, sign in self._heard.items():
            if sign.get("last_words"):
                return rank
        if time.monotonic() - self._answered > 2 * EVERY and self._ranks.rank:
            return 0
        blamed = [sign["blamed"] for sign in self._heard.values() if sign.get("blamed") is not None]
        return blamed[0] if blamed else min(self._others, key=self._since.__getitem__)

    def _sentence(self, rank: int, what: str) -> str:
        said = self._heard[rank].get("last_words") if rank in self._heard else ""
        how = f"{what} in {self.phase}: it was killed or stopped, or ended before it could say why."
        if said:
            how = f"ended in {self.phase} and said: {said}"
        return (
            f"Rank {rank} of {self._ranks.number} {how} So every process ends; what was saved is "
            "intact, and the same command goes on."
        )


def _is_of_the_network(error: BaseException) -> bool:
    said = str(error)
    return isinstance(error, RuntimeError) and any(word in said for word in WORDS_FOR_A_LOST_PEER)


def _patience() -> float:
    given = os.environ.get(VARIABLE) or str(PATIENCE)
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not EVERY < seconds < float("inf"):
        raise UserError(f"{VARIABLE} is '{given}'. Give seconds, more than {EVERY:g}.")
    return seconds
