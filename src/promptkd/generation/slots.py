"""Which request each row of a batch writes for; whose response has ended, the row is free."""

from collections.abc import Container

WORTH_READING = 0.25
"""Of the rows: so many are refilled at once, if there are as many requests.

Each refill is a pass of its own. An eighth took as long on a CPU.
"""


class Slots:
    """Requests in their order through a number of rows.

    Attributes:
        requests: the request of each row; a free row still has its last one.
        live: rows whose responses go on.
        token_ids: of every request, as far as it is written.

    Args:
        num_rows: at most as many as there are requests.
        max_new_tokens: which end a response, as a token of ``stop`` does.
    """

    def __init__(self, num_requests: int, num_rows: int, max_new_tokens: int, stop: Container[int]):
        self.requests = [*range(num_rows)]
        self.live = [*range(num_rows)]
        self.token_ids = [list[int]() for _ in range(num_requests)]
        self._started = num_rows
        self._max_new_tokens, self._stop = max_new_tokens, stop

    @property
    def num_waiting(self) -> int:
        return len(self.token_ids) - self._started

    @property
    def free(self) -> list[int]:
        return [row for row in range(len(self.requests)) if row not in set(self.live)]

    @property
    def times(self) -> list[int]:
        """How many tokens each row's request has; less than the most, also if it has ended."""
        last = self._max_new_tokens - 1
        return [min(len(self.token_ids[request]), last) for request in self.requests]

    def append(self, tokens: list[int]) -> list[int]:
        """A token for each row, of which the free rows' are dropped; rows that end with it."""
        for row in self.live:
            self.token_ids[self.requests[row]].append(tokens[row])
        ended = [row for row in self.live if tokens[row] in self._stop or self._is_full(row)]
        self.live = [row for row in self.live if row not in ended]
        return ended

    def refill(self) -> list[int]:
        """Free rows that the next requests take: none, or a quarter, or one for each that waits.

        Reading a few requests takes as long as reading a single one.
        """
        free = self.free
        num = min(len(free), self.num_waiting)
        if num < self.num_waiting and num < WORTH_READING * len(self.requests):
            return []
        for row in free[:num]:
            self.requests[row] = self._started
            self._started += 1
        self.live = sorted([*self.live, *free[:num]])
        return free[:num]

    def leave(self, share: float) -> list[int]:
        """Rows that stay, counted anew: if nobody waits and at most a ``share`` of all goes on."""
        kept = self.live
        if self.num_waiting or len(kept) > share * len(self.requests):
            return []
        self.requests = [self.requests[row] for row in kept]
        self.live = [*range(len(kept))]
        return kept

    def _is_full(self, row: int) -> bool:
        return len(self.token_ids[self.requests[row]]) == self._max_new_tokens
