"""The processes of one command: alone, or as torchrun started them.

Words travel between them (who takes which work, how much is done), by gloo on every device; tensors
do in training alone, and on a GPU by nccl.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch

_Value = TypeVar("_Value")
_POLL_SECONDS = 0.2
_CPU = torch.device("cpu")


class StoppedElsewhere(Exception):
    """Another process failed, and has said why."""


def launched() -> bool:
    """Whether torchrun, or what sets the same variables, started this process."""
    return all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))


def first() -> bool:
    """Whether this process is the one that speaks."""
    return not launched() or os.environ["RANK"] == "0"


def restarted() -> bool:
    """Whether torchrun started this process anew after one had failed."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"


def local_device(name: str, where: str) -> str:
    """ "auto" and "cuda" as the device of this process, a GPU for each one of a machine.

    Args:
        where: the command, for the message.

    Raises:
        ValueError: torch has no such device, or not here.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0")) if launched() else 0
        return f"cuda:{local % torch.cuda.device_count()}"
    name = "cpu" if name == "auto" else name
    try:
        # asked of torch itself, whose kinds of device each have their own way to say no
        torch.zeros(1, device=name).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        rule = "be auto, cpu or a device that torch has here"
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{where}: device must {rule}, got {name!r} ({reason})") from None
    return "cpu" if torch.device(name).type == "cpu" else name  # torch has "cpu:0" too


class Ranks:
    """One process: it is the first, takes all the work and waits for nobody.

    Attributes:
        rank, size: number of this process, and of all.
    """

    rank, size = 0, 1

    def __init__(self) -> None:
        self._taken = self._done = 0

    def share(self, make: Callable[[], _Value]) -> _Value:
        """What ``make`` gives on the first process, which alone calls it.

        Raises:
            StoppedElsewhere: it raised there.
        """
        return make()

    def take(self) -> int:
        """The next number that no process has taken, from 0."""
        self._taken += 1
        return self._taken - 1

    def add(self, count: int) -> int:
        """Count work as done; returns how much is, in all processes."""
        self._done += count
        return self._done

    def sum(self, tensor: torch.Tensor) -> None:
        """Make the tensor the sum over all processes, in place."""

    def finish(self, watch: Callable[[int], object]) -> None:
        """Wait for the others; the first process calls ``watch`` with what is done meanwhile."""
        watch(self._done)


class Launched(Ranks):
    """One of the processes that torchrun started.

    Args:
        tensors: the device of the tensors that travel.
    """

    def __init__(self, tensors: str) -> None:
        import torch.distributed as dist
        from torch.distributed.rendezvous import rendezvous

        super().__init__()
        self._dist = dist
        # pictures must not depend on the number of processes, and their last bits may depend on
        # that of threads: torchrun gives each of several processes one, so one alone has one too
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self._store, self.rank, self.size = next(iter(rendezvous("env://")))
        on_cpu = torch.device(tensors).type == "cpu"
        dist.init_process_group(
            "gloo" if on_cpu else "cpu:gloo,cuda:nccl",
            store=self._store,
            rank=self.rank,
            world_size=self.size,
            timeout=timedelta(days=1),
        )

    def share(self, make: Callable[[], _Value]) -> _Value:
        told: list[Any] = [None, None]
        if self.rank == 0:
            try:
                told[1] = make()
            except Exception:
                told[0] = "failed"
                self._dist.broadcast_object_list(told, device=_CPU)
                self._leave()
                raise
        self._dist.broadcast_object_list(told, device=_CPU)
        if told[0] is not None:
            self._leave()
            raise StoppedElsewhere
        value: _Value = told[1]
        return value

    def take(self) -> int:
        return int(self._store.add("taken", 1)) - 1

    def add(self, count: int) -> int:
        return int(self._store.add("done", count))

    def sum(self, tensor: torch.Tensor) -> None:
        self._dist.all_reduce(tensor)

    def finish(self, watch: Callable[[int], object]) -> None:
        waiting = self._dist.barrier(async_op=True)
        while not waiting.is_completed():
            if self.rank == 0:
                watch(self.add(0))
            time.sleep(_POLL_SECONDS)
        waiting.wait()  # raises where a process was lost
        if self.rank == 0:
            watch(self.add(0))
        self._leave()

    def _leave(self) -> None:
        # together: the first process has the store, which the others still read
        self._dist.barrier()
        self._dist.destroy_process_group()


def join(tensors: str = "cpu") -> Ranks:
    """The processes that this one belongs to; ``tensors``: the device of those that travel."""
    return Launched(tensors) if launched() else Ranks()
