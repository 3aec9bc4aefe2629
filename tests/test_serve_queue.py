"""Turns of clients: by work, whatever each of them asks for."""

from __future__ import annotations

import threading

import pytest
from serve_cases import Gate, engine

from fastdiff.serve import QueueFull
from fastdiff.serve._queue import FairQueue


def test_one_client_is_served_in_order() -> None:
    queue: FairQueue[int] = FairQueue(10, 10)
    queue.push("a", [1, 2], 5)
    queue.push("a", [3], 50)
    queue.push("a", [4], 1)
    assert [queue.pop() for _ in range(4)] == [1, 2, 3, 4] and len(queue) == 0


def test_clients_take_turns() -> None:
    queue: FairQueue[str] = FairQueue(100, 100)
    queue.push("many", ["m"] * 10, 20)
    queue.push("few", ["f"] * 2, 20)
    queue.push("one", ["o"], 20)
    assert "".join(queue.pop() for _ in range(13)) == "mfomfmmmmmmmm"


def test_a_turn_is_as_much_work_for_each() -> None:
    """While both wait, the work of each differs by no more than two of the dearest items."""
    queue: FairQueue[tuple[str, int]] = FairQueue(1000, 1000)
    queue.push("long", [("long", 100)] * 50, 100)
    queue.push("short", [("short", 8)] * 600, 8)
    work = {"long": 0, "short": 0}
    for _ in range(400):
        name, cost = queue.pop()
        work[name] += cost
        assert abs(work["long"] - work["short"]) <= 200
    assert min(work.values()) > 2000


def test_who_comes_back_does_not_pass_the_others() -> None:
    """One asks again as soon as it is served; the one with a long line is not held up."""
    queue: FairQueue[str] = FairQueue(100, 100)
    queue.push("line", ["l"] * 20, 10)
    served = ""
    for _ in range(20):
        if "again" not in queue._clients:
            queue.push("again", ["a"], 10)
        served += queue.pop()
    assert served == "la" * 10


def test_what_is_discarded_leaves_room() -> None:
    queue: FairQueue[int] = FairQueue(4, 3)
    queue.push("a", [1, 2, 3], 1)
    queue.push("b", [4], 1)
    with pytest.raises(QueueFull):
        queue.push("b", [5], 1)
    queue.discard("a", lambda item: item != 2)
    queue.discard("nobody", lambda item: True)
    assert len(queue) == 2
    queue.push("b", [5, 6], 1)
    queue.discard("b", lambda item: True)
    assert queue.pop() == 2 and len(queue) == 0 and queue._clients == {}


def test_a_refused_push_changes_nothing() -> None:
    queue: FairQueue[int] = FairQueue(4, 2)
    for items, kind in (([1, 2, 3], ValueError), ([1] * 5, ValueError)):
        with pytest.raises(kind):
            queue.push("a", items, 1)
        assert len(queue) == 0 and queue._clients == {}
    queue.push("a", [1, 2], 1)
    with pytest.raises(QueueFull):
        queue.push("a", [3], 1)
    assert [queue.pop(), queue.pop()] == [1, 2]


def test_the_engine_gives_a_free_slot_to_who_is_behind() -> None:
    """A client with a hundred images, then another with one: it is next, not last."""
    gate = Gate()
    with engine(gate, slots=1) as serving:
        many = serving.submit(client="many", seeds=range(100), steps=1, cond={"label": 1})
        gate.wait()
        one = serving.submit(client="one", steps=1, cond={"label": 2})
        done = threading.Event()
        one.add_done_callback(lambda job: done.set())
        gate.open(3)
        assert done.wait(60)
        many.cancel()
        gate.open(1)
    assert [2] in gate.batches[:3]
