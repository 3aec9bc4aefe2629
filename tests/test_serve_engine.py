"""The engine as its clients see it: futures, turns, limits, deadlines, failures and the end."""

from __future__ import annotations

import concurrent.futures
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from serve_cases import REQUESTS, SHAPE, Clock, Gate, engine, model
from torch import Tensor

from fastdiff import schedules, solvers, use_backend
from fastdiff.backends import forced
from fastdiff.serve import Closed, DeadlineExceeded, Progress, QueueFull

WAIT = 60  # seconds that no test needs; a hang is a failure, not a wait


def cancelled_or_none(job: concurrent.futures.Future[Tensor]) -> Tensor | None:
    try:
        return job.result(WAIT)
    except concurrent.futures.CancelledError:
        return None


@pytest.fixture
def gate() -> Iterator[Gate]:
    gate = Gate()
    yield gate
    gate.open(10_000)  # whatever a failed test left waiting


def test_many_threads_submit_and_cancel() -> None:
    """Each request from a thread of its own, twice; a third of the second ones is cancelled."""
    start = threading.Barrier(2 * len(REQUESTS))
    with engine() as serving:
        expected = [serving.alone(**request) for request in REQUESTS]

        def client(k: int) -> Tensor | None:
            start.wait(WAIT)
            i = k % len(REQUESTS)
            job = serving.submit(client=str(k), **REQUESTS[i])
            if k >= len(REQUESTS) and i % 3 == 0:
                job.cancel()
            return cancelled_or_none(job)

        with concurrent.futures.ThreadPoolExecutor(2 * len(REQUESTS)) as pool:
            images = list(pool.map(client, range(2 * len(REQUESTS))))
    for k, image in enumerate(images):
        if k < len(REQUESTS):
            assert image is not None
        if image is not None:
            assert_same_bits(image, expected[k % len(REQUESTS)], f"request {k}")
    assert serving.stats()[:3] == (0, 0, 4)


def test_a_request_joins_what_runs_and_leaves_first(gate: Gate) -> None:
    with engine(gate) as serving:
        long = serving.submit(steps=6, cond={"label": 1})
        gate.open(2)
        for _ in range(3):
            gate.wait()  # the third step has begun
        short = serving.submit(steps=2, cond={"label": 2})
        gate.open(3)
        assert_same_bits(short.result(WAIT), serving_alone(steps=2, cond={"label": 2}))
        assert not long.done()
        gate.open(1)
        assert_same_bits(long.result(WAIT), serving_alone(steps=6, cond={"label": 1}))
    assert gate.batches == [[1], [1], [1], [1, 2], [1, 2], [1]]


def serving_alone(**fields: Any) -> Tensor:
    with engine() as other:
        return other.alone(**fields)


def test_progress_is_told_after_every_step(gate: Gate) -> None:
    told: list[Progress] = []
    gate.open(100)
    with engine(gate, slots=2) as serving:
        job = serving.submit(seeds=[1, 2, 3], steps=2, callback=told.append)
        job.result(WAIT)
        assert job.progress == (6, 6)
    # two images at a time, then the third
    assert told == [(2, 6), (4, 6), (5, 6), (6, 6)]


def test_a_job_is_cancelled_at_any_step(gate: Gate) -> None:
    """Waiting, in its first step, and later; the others go on and its slot is free."""
    with engine(gate, slots=2) as serving:
        kept = serving.submit(steps=4, cond={"label": 1})
        gate.wait()
        first = serving.submit(steps=4, cond={"label": 2})
        waits = serving.submit(steps=4, cond={"label": 3})
        later = serving.submit(steps=4, cond={"label": 4})
        gate.open(1)
        gate.wait()  # the first two are at work, and the others wait
        assert waits.cancel() and first.cancel() and waits.cancel()
        assert serving.stats().waiting == 1
        gate.open(1)
        gate.wait()
        assert gate.batches == [[1], [1, 2], [1, 4]]  # the slot was taken at the next step
        assert later.cancel()
        gate.open(4)
        assert_same_bits(kept.result(WAIT), serving_alone(steps=4, cond={"label": 1}))
        assert not kept.cancel() and kept.done()
        done, _ = concurrent.futures.wait([first, waits, later], WAIT)
        assert len(done) == 3 and all(job.cancelled() for job in done)
    assert gate.batches == [[1], [1, 2], [1, 4], [1]]
    assert serving.stats().ended == 3 and serving.stats().finished == 1


def test_a_full_queue_refuses_and_recovers(gate: Gate) -> None:
    with engine(gate, slots=1, queue=3, per_client=2) as serving:
        serving.submit(steps=1)
        gate.wait()  # it runs
        serving.submit(steps=1, client="a", seeds=[1, 2])
        with pytest.raises(
            QueueFull, match="queue of client 'a' must have room for 1 images, got 2"
        ):
            serving.submit(steps=1, client="a")
        last = serving.submit(steps=1, client="b")
        with pytest.raises(
            QueueFull, match="queue must have room for 1 images, got 3 of 3 waiting"
        ):
            serving.submit(steps=1, client="c")
        assert serving.stats().waiting == 3
        with pytest.raises(ValueError, match="submit: seeds must be at most 2, got 3"):
            serving.submit(steps=1, client="c", seeds=[1, 2, 3])
        assert last.cancel()
        again = serving.submit(steps=1, client="c")
        gate.open(4)
        assert again.result(WAIT).shape == (1, *SHAPE)


def test_a_deadline_ends_what_waits_and_what_runs(gate: Gate) -> None:
    clock = Clock()
    with engine(gate, slots=1, clock=clock) as serving:
        runs = serving.submit(steps=5, deadline=2.0)
        gate.wait()
        waits = serving.submit(steps=1, deadline=1.0)
        patient = serving.submit(steps=1, deadline=3.0)
        clock.now = 1.0
        gate.open(1)
        with pytest.raises(DeadlineExceeded, match="leave time for 1 rows, got to row 0"):
            waits.result(WAIT)
        gate.wait()
        clock.now = 2.5
        gate.open(1)
        with pytest.raises(DeadlineExceeded, match="leave time for 5 rows, got to row 2"):
            runs.result(WAIT)
        gate.open(1)
        assert patient.result(WAIT).shape == (1, *SHAPE)


def test_a_failing_request_ends_alone() -> None:
    """A condition that the model refuses, and callbacks that raise, beside good ones."""

    def strict(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        if (label > 9).any():
            raise ValueError(f"label must be at most 9, got {label.tolist()}")
        return model(x, t, label)

    def broken(progress: Progress) -> None:
        raise SystemExit("broken callback")

    with engine(strict) as serving:
        good = [serving.submit(seeds=k, steps=7, cond={"label": k}) for k in range(3)]
        bad = serving.submit(seeds=[1, 2], steps=7, cond={"label": [5, 11]}, guidance=2.0)
        worse = serving.submit(steps=7, callback=broken)
        with pytest.raises(ValueError, match=r"label must be at most 9, got \[11, -1\]"):
            bad.result(WAIT)
        with pytest.raises(SystemExit, match="broken callback"):
            worse.result(WAIT)
        for k, job in enumerate(good):
            assert_same_bits(
                job.result(WAIT), serving.alone(seeds=k, steps=7, cond={"label": k}), f"{k}"
            )
        assert serving.stats().ended == 2


def test_a_model_that_fails_for_all_leaves_the_engine_alive() -> None:
    state = {"fails": True}

    def sick(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        if state["fails"]:
            raise RuntimeError("out of memory")
        return model(x, t, label)

    with engine(sick) as serving:
        jobs = [serving.submit(seeds=k, steps=3) for k in range(3)]
        for job in jobs:
            with pytest.raises(RuntimeError, match="out of memory"):
                job.result(WAIT)
        state["fails"] = False
        assert serving.submit(steps=3).result(WAIT).shape == (1, *SHAPE)


def test_the_backend_of_the_thread_that_made_it() -> None:
    """A forced backend is forced for the engine too, which has a thread of its own."""
    seen = []

    def noting(x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        seen.append(forced())
        return model(x, t, label)

    with use_backend("reference"):
        serving = engine(noting)
    with serving:
        serving.submit(steps=1).result(WAIT)
    assert seen == ["reference"] and forced() == "auto"


def test_shutdown_finishes_or_cancels(gate: Gate) -> None:
    serving = engine(gate, slots=1)
    jobs = [serving.submit(steps=2) for _ in range(3)]
    gate.wait()
    serving.shutdown(wait=False)
    with pytest.raises(Closed, match="submit: engine must be open, got one that was shut down"):
        serving.submit(steps=2)
    gate.open(6)
    serving.shutdown()
    assert all(job.done() and job.exception() is None for job in jobs)
    other = Gate()
    serving = engine(other, slots=1)
    jobs = [serving.submit(steps=2) for _ in range(3)]
    other.wait()
    serving.shutdown(wait=False, cancel_futures=True)
    assert all(job.cancelled() for job in jobs)
    other.open(1)
    serving.shutdown()
    assert len(other.batches) == 1


def test_an_error_in_the_block_cancels(gate: Gate) -> None:
    with pytest.raises(KeyError), engine(gate) as serving:
        job = serving.submit(steps=1000)
        gate.open(10_000)
        raise KeyError
    assert job.cancelled()


def test_nothing_is_kept_of_what_is_done() -> None:
    """Not even by a cycle, which would hold images until the collector comes."""
    with engine() as serving:
        jobs = [serving.submit(seeds=k, steps=3, client=str(k)) for k in range(8)]
        jobs[3].cancel()
        concurrent.futures.wait(jobs, WAIT)
        gone = [weakref.ref(job) for job in jobs]
        gc.disable()
        try:
            del jobs
            # two steps, so that the frame that delivered the last of them is gone too
            serving.submit(steps=2).result(WAIT)
            assert [ref() for ref in gone] == [None] * 8
        finally:
            gc.enable()
        assert serving._queue._clients == {}


def test_a_process_ends_with_an_engine_at_work() -> None:
    """No hang and no crash where nobody shut it down."""
    code = (
        "import torch; from fastdiff import schedules; from fastdiff.serve import Engine\n"
        "e = Engine(lambda x, t: x * 0.5, schedules.linear(), (1, 8, 8), slots=2)\n"
        "jobs = [e.submit(seeds=i, steps=1000) for i in range(50)]\n"
        "jobs[0].add_done_callback(lambda job: print(job.cancelled()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout.strip() in ("True", "False"), done.stderr
    assert done.stderr == ""


HUGE = 10**400  # larger than any float

# what a user gets wrong: the field, and what is said of it
WRONG = (
    ({"stepz": 3}, TypeError, "submit: fields must be among seeds, solver, .*, got 'stepz'"),
    ({"steps": "3"}, TypeError, "submit: steps must be an integer, got '3'"),
    ({"steps": 0}, ValueError, r"submit: steps must lie in \[1, 1000\], got 0"),
    ({"steps": 1001}, ValueError, r"submit: steps must lie in \[1, 1000\], got 1001"),
    ({"solver": "dpm++"}, ValueError, "build: solver must be one of .*, got 'dpm\\+\\+'"),
    ({"solver": 3}, TypeError, "submit: solver must be a name or a StepTable, got 3"),
    ({"solver": "ddim", "options": {"eta": [1]}}, TypeError, "submit: options must be numbers"),
    ({"spacing": 3}, TypeError, "submit: spacing must be a name or None, got 3"),
    ({"options": 3}, TypeError, "submit: options must be a mapping of names, got 3"),
    ({"options": {1: 2, "a": 3}}, TypeError, "submit: options must be a mapping of names, got {1"),
    ({"options": {"etta": 1}}, TypeError, "build: options of dpmpp_2m must be among"),
    ({"seeds": []}, ValueError, "submit: seeds must not be empty"),
    ({"seeds": "1"}, TypeError, "submit: seeds must be integers, got str"),
    ({"seeds": -1}, ValueError, r"submit: seeds must lie in \[0, 2\*\*64\), got -1"),
    ({"guidance": torch.ones(1)}, TypeError, "submit: guidance must be one number for all images"),
    ({"guidance": "7"}, TypeError, "guidance must be a number, got str"),
    ({"guidance_rescale": torch.ones(1)}, TypeError, "submit: guidance_rescale must be a number"),
    ({"guidance_rescale": 2.0}, ValueError, r"guidance_rescale must lie in \[0, 1\], got 2.0"),
    ({"guidance": 1e39}, ValueError, "guidance must be finite, got 1e\\+39"),
    ({"guidance": HUGE}, ValueError, "guidance must be finite, got 1000"),
    ({"guidance_rescale": HUGE}, ValueError, "guidance_rescale must be finite, got 1000"),
    ({"clip": HUGE}, ValueError, "clip must be finite, got 1000"),
    ({"deadline": HUGE}, ValueError, "submit: deadline must be finite and above 0, got 1000"),
    ({"callback": 3}, TypeError, "submit: callback must be callable, got 3"),
    ({"clip": -1.0}, ValueError, "submit: clip must not be negative, got -1.0"),
    ({"cond": {"text": 3}}, ValueError, "submit: cond must be among label, got 'text'"),
    ({"cond": {1: 2, "text": 3}}, ValueError, "submit: cond must be among label, got 1"),
    ({"cond": 3}, TypeError, "submit: cond must be a mapping, got 3"),
    ({"cond": {"label": 1.5}}, TypeError, "submit: cond label must be torch.int64, got "),
    ({"cond": {"label": "boot"}}, TypeError, "submit: cond label must be numbers or a tensor"),
    ({"cond": {"label": [1, 2]}}, ValueError, r"must have shape \(\) or \(1,\), got \(2,\)"),
    ({"uncond": {"label": None}}, TypeError, "submit: uncond label must be numbers or a tensor"),
    ({"deadline": 0}, ValueError, "submit: deadline must be finite and above 0, got 0"),
    ({"deadline": "1"}, TypeError, "submit: deadline must be a number, got '1'"),
    ({"client": 3}, TypeError, "submit: client must be a str, got 3"),
)  # fmt: skip


def test_what_is_wrong_is_said_and_nothing_accepted() -> None:
    with engine() as serving:
        for fields, kind, message in WRONG:
            with pytest.raises(kind, match=message):
                serving.submit(**fields)
        assert serving.stats() == (0, 0, 4, 0, 0, 0) and not serving._jobs
    message = "guidance must be left out for a model without conditions, got 2.0"
    with engine(lambda x, t: x, null={}) as serving, pytest.raises(ValueError, match=message):
        serving.submit(guidance=2.0)


def test_a_bool_is_no_number_that_was_asked_for_before() -> None:
    with engine() as serving:
        serving.plan(solver="ddim", options={"eta": 1})
        with pytest.raises(TypeError, match="eta must be a number, got bool"):
            serving.plan(solver="ddim", options={"eta": True})


def test_tensors_of_the_caller_may_change_while_a_request_waits(gate: Gate) -> None:
    seeds, null = torch.tensor([1, 2]), torch.tensor(-1)
    with engine(gate, slots=1, null={"label": null}) as serving:
        first = serving.submit(steps=1)
        gate.wait()
        waits = serving.submit(seeds=seeds, steps=1)
        seeds += 7
        null += 3
        gate.open(100)
        first.result(WAIT)
        assert_same_bits(waits.result(WAIT), serving.alone(seeds=[1, 2], steps=1))
        assert_same_bits(
            waits.result(WAIT), serving.alone(seeds=[1, 2], steps=1, cond={"label": -1})
        )


def test_a_table_of_the_callers() -> None:
    schedule = schedules.scaled_linear()
    mine = solvers.build("ddim", schedule, 5, spacing="leading")
    with engine() as serving:
        got = serving.submit(solver=mine, steps=None, seeds=3).result(WAIT)
        same = {"solver": "ddim", "steps": 5, "spacing": "leading", "seeds": 3}
        assert_same_bits(got, serving.alone(**same))
        with pytest.raises(ValueError, match="steps, spacing and options must be left out with a"):
            serving.submit(solver=mine, steps=5)
        with pytest.raises(ValueError, match="solver must be one table for epsilon, got 1 for sam"):
            serving.submit(
                solver=solvers.build("ddim", schedule, 5, prediction="sample"), steps=None
            )


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    (
        ({"slots": 0}, ValueError, "Engine: slots must be at least 1, got 0"),
        ({"queue": 2.0}, TypeError, "Engine: queue must be an integer, got 2.0"),
        ({"null": {"label": -1}}, TypeError, "Engine: null label must be a tensor, got -1"),
        ({"sizes": []}, ValueError, r"FixedSizes: sizes must be at least 1, got \(\)"),
        ({"defaults": {"step": 3}}, TypeError, "submit: defaults must be among .*, got 'step'"),
        ({"defaults": {"steps": 0}}, ValueError, "submit: steps must lie in"),
    ),
)
def test_an_engine_refuses(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    before = threading.active_count()
    with pytest.raises(kind, match=message):
        engine(**options)
    assert threading.active_count() == before
