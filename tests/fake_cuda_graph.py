"""CUDA graphs without a CUDA device: what a body does on the CPU is recorded and replayed.

As on a device, recording changes no memory, a replay writes where the recording wrote, Python does
not run again, and a look at a value from Python while recording is an error.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastdiff.ops import _native

# what waits for the device
SYNCS = ("_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal")
OPS = ("reverse_step", "guidance_rescale", "dynamic_threshold")


class FakeGraph:
    """In place of `torch.cuda.CUDAGraph`."""

    made: ClassVar[list[FakeGraph]] = []

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []
        self.replays = 0
        self.nodes: list[str] = []
        FakeGraph.made.append(self)

    def replay(self) -> None:
        self.replays += 1
        with torch.inference_mode():  # memory has no modes
            for call in self.calls:
                call()


class Recorder(TorchDispatchMode):
    """Records ATen calls, and kernels by `kernel`, into a graph."""

    now: Recorder | None = None

    def __init__(self, graph: FakeGraph) -> None:
        super().__init__()
        self.graph = graph
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.born: set[int] = set()

    def keep(self, values: Any) -> None:
        """Remember what was in memory before the recording."""
        with torch.utils._python_dispatch._disable_current_modes():
            for t in tree_leaves(values):
                if isinstance(t, torch.Tensor):
                    at = t.untyped_storage().data_ptr()
                    if at not in self.before and at not in self.born:
                        whole = torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage())
                        self.before[at] = (whole, whole.clone())

    def restore(self) -> None:
        for whole, kept in self.before.values():
            whole.copy_(kept)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        if name in SYNCS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        self.keep((args, kwargs))
        out = func(*args, **kwargs)
        given = {id(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        new = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor) and id(t) not in given]
        if func.is_view:
            return out
        self.born.update(t.untyped_storage().data_ptr() for t in new)
        self.graph.nodes.append(name)

        def again() -> None:
            result = func(*args, **kwargs)
            fresh = [t for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
            for to, value in zip(tree_leaves(out), fresh, strict=True):
                if id(to) not in given:
                    to.copy_(value)

        self.graph.calls.append(again)
        return out

    def kernel(self, run: Callable[[Any], None], call: Any) -> None:
        self.keep(call)
        with torch.utils._python_dispatch._disable_current_modes():
            run(call)
        self.graph.nodes.append("kernel")
        self.graph.calls.append(lambda: run(call))


@contextlib.contextmanager
def recording(graph: FakeGraph, capture_error_mode: str) -> Iterator[None]:
    """In place of `torch.cuda.graph`; what other threads do shall not end a recording."""
    assert capture_error_mode == "thread_local"
    recorder = Recorder(graph)
    Recorder.now = recorder
    try:
        with recorder:
            yield
    finally:
        Recorder.now = None
    recorder.restore()


class FakeStream:
    def __init__(self, device: torch.device | None = None) -> None:
        self.waited_for: list[FakeStream] = []

    def wait_stream(self, other: FakeStream) -> None:
        assert isinstance(other, FakeStream)
        self.waited_for.append(other)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeGraph]]:
    """The graphs that are made while the CPU stands in for a CUDA device."""
    loop = importlib.import_module("fastdiff._graph_loop")
    monkeypatch.setattr(loop, "require_cuda", lambda device: None)
    monkeypatch.setattr(importlib.import_module("fastdiff.sampler"), "require_cuda", lambda d: None)
    for name, fake in {
        "CUDAGraph": FakeGraph,
        "graph": recording,
        "Stream": FakeStream,
        "current_stream": FakeStream,
        "stream": lambda stream: contextlib.nullcontext(),
        "device": lambda device: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    # kernels are seen where an op chooses them; the quick step of the CPU chooses none
    monkeypatch.setattr(_native, "reads_tensors", False)
    for name in OPS:
        module = importlib.import_module(f"fastdiff.ops.{name}")
        monkeypatch.setattr(module, "choose", _seen(module.choose))
    monkeypatch.setattr(FakeGraph, "made", [])
    yield FakeGraph.made


def _seen(choose: Callable[..., Any]) -> Callable[..., Any]:
    def choosing(op: Any, call: Any) -> Any:
        name, run = choose(op, call)

        def kernel(call: Any) -> None:
            if Recorder.now is None:
                run(call)
            else:
                Recorder.now.kernel(run, call)

        return name, kernel

    return choosing
