"""The engine behind HTTP: requests as JSON, progress as server-sent events, images as PNG.

Needs the extra "serve" (FastAPI and uvicorn).
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import re
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from fastdiff._cli_sample import parse_label
from fastdiff.data import encode_png
from fastdiff.models import LatentDiffusion
from fastdiff.serve._queue import QueueFull
from fastdiff.serve.engine import Closed, Engine
from fastdiff.serve.job import DeadlineExceeded, Job
from fastdiff.serve.request import NAMES

__all__ = ["Server", "create_app"]

BODY = 1 << 16  # bytes of a request
FIELDS = (*(name for name in NAMES), "label", "deadline")


class Problem(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Entry:
    """A job, and who waits for news of it; all but `changed` on the server's own thread."""

    def __init__(self) -> None:
        self.job: Job | None = None
        self.listeners: set[asyncio.Event] = set()
        self._loop = asyncio.get_running_loop()

    def changed(self, _: object) -> None:
        """Called by the engine."""
        if self.listeners:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and nobody listens
                self._loop.call_soon_threadsafe(self._wake)

    def _wake(self) -> None:
        for event in self.listeners:
            event.set()

    def state(self) -> dict[str, Any]:
        """What a client is told of the job."""
        job = self.job
        assert job is not None  # set before the entry is found by anyone
        done, total = job.progress
        status, error = "running" if done else "waiting", None
        if job.cancelled():
            status = "cancelled"
        elif job.done():
            reason = job.exception()
            status = "done" if reason is None else "failed"
            if isinstance(reason, DeadlineExceeded):
                status = "late"
            error = None if reason is None else f"{type(reason).__name__}: {reason}"
        images = len(job.plan.seeds)
        return {"status": status, "done": done, "total": total, "images": images, "error": error}

    async def states(self) -> AsyncIterator[dict[str, Any]]:
        """The state now and after each change, as fast as they are taken, until the job is done."""
        news, last = asyncio.Event(), None
        self.listeners.add(news)
        try:
            while True:
                news.clear()
                # in this order: a job that is done between the two is told of in the next round
                over, state = self.job is not None and self.job.done(), self.state()
                if state != last:
                    yield state
                    last = state
                if over:
                    return
                await news.wait()
        finally:
            self.listeners.discard(news)


class _Service:
    """What the routes call.

    Args:
        engine: that makes the images.
        keep: images of jobs that are done; the oldest go first.
    """

    def __init__(self, engine: Engine, keep: int) -> None:
        self.engine, self.classes, self.keep = engine, list(engine.classes), keep
        self._entries: OrderedDict[str, _Entry] = OrderedDict()

    async def submit(self, request: Request) -> Response:
        body = await _body(request)
        peer = request.client.host if request.client else ""
        client, entry = request.headers.get("x-client", peer), _Entry()
        try:
            fields = self._fields(body)
            # in another thread, as a table may have to be built
            job = await run_in_threadpool(
                self.engine.submit, client=client, callback=entry.changed, **fields
            )
        except (TypeError, ValueError) as error:
            raise Problem(422, str(error)) from None
        except QueueFull as error:
            raise Problem(429, str(error)) from None
        except Closed as error:
            raise Problem(503, str(error)) from None
        entry.job = job
        job.add_done_callback(entry.changed)
        name = secrets.token_urlsafe(12)
        self._prune()  # before it is among them: its client has not heard of it yet
        self._entries[name] = entry
        where = f"/samples/{name}"
        return JSONResponse({"id": name, **entry.state()}, 202, {"Location": where})

    def _fields(self, body: dict[str, Any]) -> dict[str, Any]:
        unknown = sorted(set(body) - set(FIELDS))
        if unknown:
            raise TypeError(
                f"samples: fields must be among {', '.join(FIELDS)}, got {unknown[0]!r}"
            )
        if "label" in body:
            label = body.pop("label")
            if not self.classes:
                raise ValueError(
                    f"samples: label must be left out for a model without classes, got {label!r}"
                )
            several = label if isinstance(label, list) else [label]
            numbers = [parse_label(str(one), self.classes) for one in several]
            cond = body.get("cond", {})
            if not isinstance(cond, dict) or "label" in cond:
                raise ValueError(f"samples: cond must be an object without label, got {cond!r}")
            body["cond"] = {**cond, "label": numbers if isinstance(label, list) else numbers[0]}
        return body

    def _prune(self) -> None:
        """Forget the oldest jobs that are done, beyond what is kept; the rest the queue bounds."""
        over = [(n, e.job) for n, e in self._entries.items() if e.job is not None and e.job.done()]
        images = sum(len(job.plan.seeds) for _, job in over)
        for name, job in over:
            if images <= self.keep:
                break
            images -= len(job.plan.seeds)
            del self._entries[name]

    def _find(self, name: str) -> _Entry:
        if name not in self._entries:
            raise Problem(404, f"samples: id must be of a job that is kept, got {name!r}")
        return self._entries[name]

    async def state(self, name: str) -> Response:
        return JSONResponse({"id": name, **self._find(name).state()})

    async def events(self, name: str) -> Response:
        entry = self._find(name)

        async def lines() -> AsyncIterator[str]:
            async for state in entry.states():
                yield f"event: {state['status']}\ndata: {json.dumps(state)}\n\n"

        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)

    async def image(self, name: str, file: str) -> Response:
        entry, match = self._find(name), re.fullmatch(r"([0-9]{1,6})\.png", file)
        count = entry.state()["images"]
        if match is None or int(match[1]) >= count:
            raise Problem(404, f"samples: image must be 0.png to {count - 1}.png, got {file!r}")
        async for state in entry.states():
            status, error = state["status"], state["error"]
        failures = {"cancelled": 410, "late": 504, "failed": 500}
        if status in failures:
            raise Problem(failures[status], error or f"samples: job must be kept, got {status}")
        assert entry.job is not None  # it was found
        pixels = entry.job.result()[int(match[1])]
        return Response(await run_in_threadpool(encode_png, pixels), media_type="image/png")

    async def cancel(self, name: str) -> Response:
        entry = self._find(name)
        assert entry.job is not None  # it was found
        if not entry.job.cancel():
            raise Problem(409, f"samples: job must not be done, got {entry.state()['status']}")
        return JSONResponse({"id": name, **entry.state()})

    async def health(self) -> Response:
        alive = self.engine.alive
        state = {"status": "ok" if alive else "closed", **self.engine.stats()._asdict()}
        return JSONResponse(state, 200 if alive else 503)


async def _body(request: Request) -> dict[str, Any]:
    raw = b""
    async for part in request.stream():
        raw += part
        if len(raw) > BODY:
            raise Problem(413, f"samples: body must be at most {BODY} bytes, got more")

    def refuse(word: str) -> None:
        raise ValueError(f"numbers must be finite, got {word}")

    try:
        body = json.loads(raw, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Problem(400, f"samples: body must be JSON, got {error}") from None
    if not isinstance(body, dict):
        raise Problem(400, f"samples: body must be an object, got {type(body).__name__}")
    return body


async def _answer(request: Request, problem: Any) -> Response:
    """An error as the library words it."""
    again = {"Retry-After": "1"} if problem.status == 429 else None
    return JSONResponse({"error": str(problem)}, problem.status, again)


def create_app(engine: Engine, *, keep: int = 1024) -> FastAPI:
    """The application, for uvicorn or any other ASGI server.

    ``POST /samples`` takes the fields of a `Request` as JSON, and ``label`` (number or name) and
    ``deadline`` (seconds); the client that takes turns with others is the header ``X-Client``, or
    the address. ``GET /samples/ID`` tells the state, ``GET /samples/ID/events`` streams it,
    ``GET /samples/ID/images/0.png`` waits for an image, ``DELETE /samples/ID`` cancels,
    ``GET /health`` tells what the engine is at. An error is ``{"error": ...}`` in the words of the
    library: 400 and 422 for what is wrong in a request, 404, 409, 410 and 413, 429 where the queue
    is full, 503 where the engine has been shut down, 504 for a deadline.

    Args:
        engine: of images of 1 or 3 channels; it is shut down with the server.
        keep: images of finished jobs that are kept to be fetched.

    Raises:
        ValueError: the engine's images are no pictures.
    """
    if len(engine.shape) != 3 or engine.shape[0] not in (1, 3):
        raise ValueError(
            f"serve: images must have shape (1, h, w) or (3, h, w), got {engine.shape}"
        )
    if isinstance(engine.model.model, LatentDiffusion):
        raise ValueError("serve: model must make images, got one of latents, to be decoded")
    service = _Service(engine, keep)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(engine.shutdown, cancel_futures=True)

    app = FastAPI(title="fastdiff", lifespan=lifespan)
    app.add_exception_handler(Problem, _answer)
    for method, path, route, status in (
        ("POST", "/samples", service.submit, 202),
        ("GET", "/samples/{name}", service.state, 200),
        ("DELETE", "/samples/{name}", service.cancel, 200),
        ("GET", "/samples/{name}/events", service.events, 200),
        ("GET", "/samples/{name}/images/{file}", service.image, 200),
        ("GET", "/health", service.health, 200),
    ):
        app.add_api_route(path, route, methods=[method], status_code=status, response_model=None)
    return app


class Server(uvicorn.Server):  # type: ignore[misc]  # which mypy is told nothing of
    """uvicorn for one engine: ``Server(engine).run()`` serves until it is interrupted.

    It then accepts nothing more and finishes what was accepted, as far as somebody waits for it and
    the time of grace lasts; what is left is cancelled, which ends the streams of events.

    Args:
        engine, keep: as for `create_app`.
        host, port: to listen at; port 0 is any that is free.
        grace: seconds, at least 0.
        options: of `uvicorn.Config`.

    Raises:
        ValueError: the grace is negative or no number.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        host: str = "127.0.0.1",
        port: int = 8000,
        grace: float = 10.0,
        keep: int = 1024,
        **options: Any,
    ) -> None:
        if not grace >= 0:
            raise ValueError(f"Server: grace must be at least 0, got {grace}")
        app = create_app(engine, keep=keep)
        super().__init__(uvicorn.Config(app, host=host, port=port, **options))
        self.engine, self.grace = engine, grace

    async def shutdown(self, sockets: Any = None) -> None:
        """Called by uvicorn, before it waits for its connections to end."""
        self.engine.shutdown(wait=False)
        end = functools.partial(self.engine.shutdown, wait=False, cancel_futures=True)
        timer = asyncio.get_running_loop().call_later(self.grace, end)
        await super().shutdown(sockets)
        timer.cancel()
