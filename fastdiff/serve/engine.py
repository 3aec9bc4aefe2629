"""The engine: a thread that runs a batch which requests join and leave at any step."""

from __future__ import annotations

import atexit
import contextvars
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdiff import _cards, checkpoints
from fastdiff._state import Model, first_parameter
from fastdiff.ops._checks import is_finite
from fastdiff.sampler import Sampler
from fastdiff.schedules import Schedule
from fastdiff.serve._batch import Batch, Sample
from fastdiff.serve._queue import FairQueue
from fastdiff.serve.job import DeadlineExceeded, Job, Progress
from fastdiff.serve.request import Plan, Planner
from fastdiff.serve.sizes import FixedSizes, agreeing_sizes


class Closed(RuntimeError):
    """The engine accepts no requests any more."""


class Stats(NamedTuple):
    """What an engine is at.

    Attributes:
        waiting: images in the queue.
        running: images in the batch.
        slots: images that can be.
        finished: images that were made.
        ended: jobs that ended without their images: cancelled, late or failed.
        steps: of the batch.
    """

    waiting: int
    running: int
    slots: int
    finished: int
    ended: int
    steps: int


class Engine:
    """Makes images for many clients in one batch that they join and leave at any step.

    Every image runs its own solver, steps, guidance and condition at its own row, and has the bits
    that it has alone: those of `Sampler` on ``engine.model`` with that one seed (`alone`). Where
    the model's own bits depend on the size of a batch, ``engine.model`` calls it with such sizes
    only as agree (`FixedSizes`). This holds for one number of threads, taken when the engine is
    made.

    The engine is a context manager; at its end it finishes what was accepted.

    Args:
        model: as for `Sampler`.
        schedule: of the model.
        shape: of one image.
        prediction: what the model predicts, as in `solvers.build`.
        null: arguments of the model that stand for "no condition", by name, each of one image and
            so without a sample axis: their shapes and dtypes are those of every condition.
        slots: images in the batch.
        queue: images that may wait.
        per_client: images of one client that may wait; None: as many as may wait at all.
        max_steps: steps that a request may ask for.
        defaults: fields of a `Request` where one names no others.
        classes: names of the values of "label", for fronts that take names.
        sizes: batch sizes for the model in which a sample has the same bits; None: found by some
            thirty model calls (`agreeing_sizes`).
        dtype: of the model input; None: as `Sampler` takes it.
        device: of the state; None: of the model's first parameter, or the CPU.
        clock: seconds, for deadlines.

    Raises:
        TypeError, ValueError: an argument breaks its rule.
    """

    def __init__(
        self,
        model: Model,
        schedule: Schedule,
        shape: Sequence[int],
        *,
        prediction: str = "epsilon",
        null: Mapping[str, Tensor] | None = None,
        slots: int = 16,
        queue: int = 256,
        per_client: int | None = None,
        max_steps: int = 1000,
        defaults: Mapping[str, Any] | None = None,
        classes: Sequence[str] = (),
        sizes: Sequence[int] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        per_client = queue if per_client is None else per_client
        limits = {"slots": slots, "queue": queue, "per_client": per_client, "max_steps": max_steps}
        for name, value in limits.items():
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"Engine: {name} must be an integer, got {value!r}")
            if value < 1:
                raise ValueError(f"Engine: {name} must be at least 1, got {value}")
        if not isinstance(schedule, Schedule):
            raise TypeError(f"Engine: schedule must be a Schedule, got {type(schedule).__name__}")
        null = dict(null or {})
        for name, entry in null.items():
            if not isinstance(entry, Tensor):
                raise TypeError(f"Engine: null {name} must be a tensor, got {entry!r}")
        first = first_parameter(model)
        self.dtype = dtype or (torch.float32 if first is None else first.dtype)
        where = device or (torch.device("cpu") if first is None else first.device)
        self.device, self.shape, self.classes = torch.device(where), tuple(shape), tuple(classes)
        self._planner = Planner(schedule, prediction, null, defaults or {}, max_steps)
        if defaults:
            self.plan()  # they are in order
        if sizes is None:
            times = schedule.t_min, schedule.t_max
            sizes = agreeing_sizes(
                model, 2 * slots, self.shape, null,
                times=times, dtype=self.dtype, device=self.device,
            )  # fmt: skip
        self.model = FixedSizes(model, sizes)
        self._batch = Batch(self.model, self.shape, slots, null, self.dtype, self.device)
        self._queue: FairQueue[Sample] = FairQueue(queue, per_client)
        self._jobs: set[Job] = set()
        self._clock, self._threads = clock, torch.get_num_threads()
        self._finished = self._ended = self._steps = 0
        self._closed = False
        # of the clients' threads and the engine's; taken again where a callback submits
        self._change = threading.Condition(threading.RLock())
        run = contextvars.copy_context().run  # so that a forced backend is forced there too
        self._thread = threading.Thread(target=run, args=(self._run,), name="fastdiff-engine")
        self._thread.daemon = True  # a process that ends is not kept by what is left to do
        atexit.register(self._leave)
        self._thread.start()

    @classmethod
    def from_checkpoint(
        cls,
        name: str = "fashion",
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **options: Any,
    ) -> Engine:
        """The engine of a checkpoint, with the solver, guidance and clip of its card as defaults.

        Args:
            name: as in `fastdiff.load`, of a model with a noise schedule.
            dtype: of the model; None: `checkpoints.fast_dtype` of the device.
            device: of the model.
            options: of `Engine`.

        Raises:
            TypeError, ValueError: an argument breaks its rule.
        """
        dtype = checkpoints.fast_dtype(device) if dtype is None else dtype
        model, schedule, card = checkpoints.load(name, dtype=dtype, device=device)
        if schedule is None:
            raise ValueError(f"Engine: model must have a noise schedule, got {name} without one")
        if torch.device(device).type == "cpu":
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        own, classes = _cards.advice("Engine", card)
        defaults = {key: own[key] for key in ("solver", "steps", "guidance", "clip") if key in own}
        null = {"label": torch.tensor(-1)} if classes else {}
        if not null:
            defaults.pop("guidance", None)
        return cls(
            model, schedule, own["shape"], prediction=card["prediction"], null=null,
            **{"defaults": defaults, "classes": classes, **options},
        )  # fmt: skip

    def plan(self, **fields: Any) -> Plan:
        """What a request of these fields would run; nothing is submitted.

        Raises:
            TypeError, ValueError: a field breaks its rule.
        """
        return self._planner(**fields)

    def submit(
        self,
        *,
        client: str = "",
        deadline: float | None = None,
        callback: Callable[[Progress], object] | None = None,
        **fields: Any,
    ) -> Job:
        """Ask for images; from any thread.

        Args:
            client: who asks; clients take turns.
            deadline: seconds from now, after which the job ends with `DeadlineExceeded`, wherever
                it is; None: never.
            callback: called on the engine's thread after every step of the job; what it raises
                ends the job. It should be quick, as the batch waits for it.
            fields: of a `Request`.

        Raises:
            TypeError, ValueError: an argument breaks its rule. QueueFull: there is no room now.
            Closed: the engine was shut down. In all these cases nothing has been accepted.
        """
        if not isinstance(client, str):
            raise TypeError(f"submit: client must be a str, got {client!r}")
        if deadline is not None:
            if isinstance(deadline, bool) or not isinstance(deadline, (int, float)):
                raise TypeError(f"submit: deadline must be a number, got {deadline!r}")
            if not (deadline > 0 and is_finite(deadline, torch.float64)):
                raise ValueError(f"submit: deadline must be finite and above 0, got {deadline}")
        if not (callback is None or callable(callback)):
            raise TypeError(f"submit: callback must be callable, got {callback!r}")
        plan = self.plan(**fields)
        expires = None if deadline is None else self._clock() + deadline
        job = Job(plan, client, expires, callback)
        with self._change:
            if self._closed:
                raise Closed("submit: engine must be open, got one that was shut down")
            self._queue.push(client, job.samples, plan.cost)
            self._jobs.add(job)
            self._change.notify_all()
        job.add_done_callback(self._forget)
        return job

    def alone(self, **fields: Any) -> Tensor:
        """(N, *S) images of a request, each made alone by `Sampler` on this thread.

        They have the bits that a job of the same fields gives.

        Raises:
            TypeError, ValueError: a field breaks its rule.
        """
        plan = self.plan(**fields)
        request = plan.request
        sampler = Sampler(
            self.model,
            plan.table,
            guidance=request.guidance,
            guidance_interval=request.guidance_interval,
            guidance_rescale=request.guidance_rescale,
            clip=request.clip,
            dtype=self.dtype,
            device=self.device,
        )
        guided = any(plan.calls)
        images = []
        for i in range(len(plan.seeds)):
            cond = {key: value[i : i + 1] for key, value in plan.cond.items()}
            uncond = {key: value[i : i + 1] for key, value in plan.uncond.items()}
            images.append(
                sampler(
                    self.shape,
                    seeds=plan.seeds[i : i + 1],
                    cond=cond,
                    uncond=uncond if guided else None,
                )
            )
        return torch.cat(images)

    @property
    def alive(self) -> bool:
        """Whether requests are accepted."""
        return not self._closed

    def stats(self) -> Stats:
        """Where the engine stands now."""
        with self._change:
            return Stats(
                len(self._queue), len(self._batch), self._batch.slots,
                self._finished, self._ended, self._steps,
            )  # fmt: skip

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Accept nothing more, finish what was accepted, and end; from any thread, at any time.

        Args:
            wait: until the engine has ended.
            cancel_futures: cancel what was accepted rather than finish it.
        """
        with self._change:
            self._closed = True
            jobs = list(self._jobs) if cancel_futures else []
            self._change.notify_all()
        for job in jobs:
            job.cancel()
        if wait and threading.current_thread() is not self._thread:
            self._thread.join()
            atexit.unregister(self._leave)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.shutdown(cancel_futures=error is not None)

    def _leave(self) -> None:
        self.shutdown(cancel_futures=True)

    def _forget(self, job: Any) -> None:
        """Called once for every job, when it is done."""
        with self._change:
            self._queue.discard(job.client, lambda sample: sample.owner is job)
            self._jobs.discard(job)
            self._ended += job.cancelled() or job.exception() is not None
            self._change.notify_all()
        job.release()
        if job.cancelled():
            job.set_running_or_notify_cancel()  # for `concurrent.futures.wait`

    def _run(self) -> None:
        torch.set_num_threads(self._threads)
        try:
            while self._work_to_do():
                self._end_late_jobs()
                self._fill()
                if self._batch:
                    self._step()
        except BaseException as error:
            with self._change:
                self._closed = True
                jobs = list(self._jobs)
            for job in jobs:
                job.settle(error)
            raise

    def _work_to_do(self) -> bool:
        """Waits for some; False: there will be none."""
        with self._change:
            while not (self._batch or self._queue or self._closed):
                self._change.wait()
            return bool(self._batch or self._queue)

    def _end_late_jobs(self) -> None:
        now = self._clock()
        with self._change:
            late = [job for job in self._jobs if job.expires is not None and job.expires <= now]
        for job in late:
            job.settle(
                DeadlineExceeded(
                    f"submit: deadline must leave time for {job.progress.total} rows, "
                    f"got to row {job.progress.done}"
                )
            )

    def _fill(self) -> None:
        """Take those out of the batch whose jobs have ended, and others in."""
        batch = self._batch
        with self._change:
            for sample in [s for s in batch.samples if s.owner.done()]:
                batch.drop(sample)
            while len(batch) < batch.slots and self._queue:
                batch.add(self._queue.pop())

    def _step(self) -> None:
        """A step of the batch; then tell and deliver, whatever clients' callbacks do."""
        batch = self._batch
        jobs = dict.fromkeys(sample.owner for sample in batch.samples)
        try:
            failed = batch.step()
        except Exception as error:  # of the step itself, so of all
            for job in jobs:
                job.settle(error)
            return
        self._steps += 1
        for sample, reason in failed:
            sample.owner.settle(reason)
        for job in jobs:
            try:
                job.tell()
            except BaseException as error:
                job.settle(error)
        for sample in [s for s in batch.samples if s.done]:
            self._finished += 1
            last = sample.owner.keep(sample, batch.image(sample))
            batch.drop(sample)
            if last:
                sample.owner.settle()
