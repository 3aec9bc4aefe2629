"""What waits: a line for each client, and turns by the work that clients ask for."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


class QueueFull(RuntimeError):
    """There is no room for a request now; the same request may be accepted later."""


class _Client(Generic[Item]):
    def __init__(self, credit: float) -> None:
        self.waiting: deque[tuple[Item, float]] = deque()
        self.credit = credit


class FairQueue(Generic[Item]):
    """Items of several clients, each with a cost; not thread-safe.

    Clients take turns, and a turn is as much work for each of them: deficit round robin (Shreedhar
    and Varghese 1995, doi:10.1145/217382.217453). So one who asks for many or for long images does
    not hold up the others, and what is kept is only of clients for whom something waits.

    Args:
        limit: items that may wait.
        per_client: items of one client that may wait.
    """

    def __init__(self, limit: int, per_client: int) -> None:
        self.limit, self.per_client = limit, per_client
        self._clients: OrderedDict[str, _Client[Item]] = OrderedDict()  # the first has the turn
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, client: str, items: Sequence[Item], cost: float) -> None:
        """Append all of the items, each of that cost, or none.

        Raises:
            QueueFull: they do not fit now. ValueError: they never do.
        """
        most = min(self.limit, self.per_client)
        if len(items) > most:
            raise ValueError(f"submit: seeds must be at most {most}, got {len(items)}")
        if self._count + len(items) > self.limit:
            raise QueueFull(
                f"submit: queue must have room for {len(items)} images, "
                f"got {self._count} of {self.limit} waiting"
            )
        mine = len(self._clients[client].waiting) if client in self._clients else 0
        if mine + len(items) > self.per_client:
            raise QueueFull(
                f"submit: queue of client {client!r} must have room for {len(items)} images, "
                f"got {mine} of {self.per_client} waiting"
            )
        if client not in self._clients:
            # enough for a first item when the turn comes
            self._clients[client] = _Client(cost)
        self._clients[client].waiting.extend((item, cost) for item in items)
        self._count += len(items)

    def pop(self) -> Item:
        """The next item; there must be one."""
        # with the cost of the dearest a turn, nobody's turn passes twice without an item
        turn = max(client.waiting[0][1] for client in self._clients.values())
        while True:
            name, client = next(iter(self._clients.items()))
            item, cost = client.waiting[0]
            if cost <= client.credit:
                break
            client.credit += turn
            self._clients.move_to_end(name)
        client.waiting.popleft()
        client.credit -= cost
        self._count -= 1
        if not client.waiting:
            del self._clients[name]
        return item

    def discard(self, name: str, unwanted: Callable[[Item], bool]) -> None:
        """Take out what the client no longer wants."""
        client = self._clients.get(name)
        if client is None:
            return
        kept = deque(entry for entry in client.waiting if not unwanted(entry[0]))
        self._count -= len(client.waiting) - len(kept)
        client.waiting = kept
        if not kept:
            del self._clients[name]
