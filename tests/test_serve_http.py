"""The HTTP front through a real server on the loopback: images, events, refusals, load, the end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import http.client
import io
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from serve_cases import Clock, Gate, engine, model

from fastdiff import cli, schedules
from fastdiff.data import encode_png
from fastdiff.models import AutoencoderConfig, DiTConfig, LatentDiffusion, LatentDiffusionConfig
from fastdiff.serve import Engine
from fastdiff.serve.http import BODY, Server, create_app

WAIT = 60  # seconds that no test needs; a hang is a failure, not a wait


class Announced(Server):
    """Tells when it listens, and where."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, port=0, log_level="warning", ws="none", **options)
        self.ready = threading.Event()

    async def startup(self, *args: Any, **kw: Any) -> None:
        await super().startup(*args, **kw)
        self.port = self.servers[0].sockets[0].getsockname()[1]
        self.ready.set()


class Client:
    """Speaks to the server, a connection a call."""

    def __init__(self, port: int, name: str = "") -> None:
        self.port, self.headers = port, {"X-Client": name} if name else {}

    @contextmanager
    def open(self, method: str, path: str, body: Any = None) -> Iterator[http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=WAIT)
        raw = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        with contextlib.closing(connection):
            connection.request(method, path, raw, self.headers)
            with connection.getresponse() as response:
                yield response

    def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        with self.open(method, path, body) as response:
            raw = response.read()
            kind = response.headers["content-type"]
            return response.status, json.loads(raw) if kind == "application/json" else raw

    def submit(self, **fields: Any) -> str:
        status, body = self.call("POST", "/samples", fields)
        assert status == 202, body
        return str(body["id"])

    def events(self, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Kind and data of each, as they come."""
        with self.open("GET", f"/samples/{name}/events") as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            kind = ""
            for line in response:
                word, _, value = line.decode().rstrip("\n").partition(": ")
                if word == "event":
                    kind = value
                elif word == "data":
                    yield kind, json.loads(value)


@contextmanager
def serving(of: Engine, **options: Any) -> Iterator[Client]:
    server = Announced(of, **options)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        assert server.ready.wait(WAIT)
        yield Client(server.port)
    finally:
        server.should_exit = True
        thread.join(WAIT)
    assert not thread.is_alive() and not of.alive  # the engine ends with the server


def pixels(png: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(png)) as picture:
        return np.asarray(picture)


def test_images_are_those_of_the_engine() -> None:
    """The shipped model: a PNG of each seed, class by name, and the events on the way."""
    torch.set_num_threads(1)
    made = Engine.from_checkpoint("fashion", slots=2)
    expected = made.alone(seeds=[4, 5], steps=3, cond={"label": [9, 3]})
    with serving(made) as client:
        name = client.submit(seeds=[4, 5], steps=3, label=["boot", 3])
        events = list(client.events(name))
        for i in range(2):
            status, png = client.call("GET", f"/samples/{name}/images/{i}.png")
            assert status == 200 and png == encode_png(expected[i])
            assert pixels(png).shape == (32, 32)
        assert client.call("GET", f"/samples/{name}")[1]["status"] == "done"
        assert client.call("GET", "/health") == (200, {"status": "ok", **made.stats()._asdict()})
    kinds = [kind for kind, _ in events]
    assert kinds[-1] == "done" and set(kinds) <= {"waiting", "running", "done"}
    rows = [data["done"] for _, data in events]
    assert rows == sorted(rows) and rows[-1] == events[-1][1]["total"] == 6


def test_events_come_as_it_runs() -> None:
    gate = Gate()
    with serving(engine(gate)) as client:
        name = client.submit(steps=3)
        events = client.events(name)
        assert next(events) == (
            "waiting", {"status": "waiting", "done": 0, "total": 3, "images": 1, "error": None}
        )  # fmt: skip
        for done in (1, 2):
            gate.open(1)
            kind, data = next(events)
            assert (kind, data["done"]) == ("running", done)
        gate.open(1)
        last = list(events)
        # the last row and the image are two pieces of news, which may come as one
        assert last[-1][0] == "done" and all(data["done"] == 3 for _, data in last)
        first = next(client.events(name))
        assert first[0] == "done"  # whoever comes late is told at once


def test_cancel_and_what_is_gone() -> None:
    gate = Gate()
    with serving(engine(gate, slots=1)) as client:
        runs, waits = client.submit(steps=2), client.submit(steps=2)
        gate.wait()
        events = client.events(waits)
        assert next(events)[0] == "waiting"
        status, state = client.call("DELETE", f"/samples/{waits}")
        assert (status, state["status"]) == (200, "cancelled")
        assert [kind for kind, _ in events] == ["cancelled"]
        status, answer = client.call("GET", f"/samples/{waits}/images/0.png")
        assert (status, answer) == (410, {"error": "samples: job must be kept, got cancelled"})
        assert client.call("DELETE", f"/samples/{runs}")[0] == 200
        gate.open(1)
        last = client.submit(steps=1)
        gate.open(1)
        assert client.call("GET", f"/samples/{last}/images/0.png")[0] == 200
        status, answer = client.call("DELETE", f"/samples/{last}")
        assert (status, answer) == (409, {"error": "samples: job must not be done, got done"})
        for path in ("/samples/none", "/samples/none/events", "/samples/none/images/0.png"):
            assert client.call("GET", path)[0] == 404
        for file in ("1.png", "x.png", "0.jpg", "-1.png"):
            status, answer = client.call("GET", f"/samples/{last}/images/{file}")
            want = f"samples: image must be 0.png to 0.png, got {file!r}"
            assert (status, answer) == (404, {"error": want})


def test_back_pressure_and_deadlines_have_their_status() -> None:
    gate, clock = Gate(), Clock()
    made = engine(gate, slots=1, queue=2, clock=clock)
    with serving(made) as client:
        first = client.submit(steps=1)
        gate.wait()
        waits = [client.submit(steps=1, deadline=1.0), client.submit(steps=1)]
        with client.open("POST", "/samples", {"steps": 1}) as response:
            assert response.status == 429 and response.headers["retry-after"] == "1"
            want = "submit: queue must have room for 1 images, got 2 of 2 waiting"
            assert json.loads(response.read()) == {"error": want}
        clock.now = 1.0
        gate.open(2)
        assert client.call("GET", f"/samples/{first}/images/0.png")[0] == 200
        status, answer = client.call("GET", f"/samples/{waits[0]}/images/0.png")
        assert status == 504 and "deadline must leave time for 1 rows" in answer["error"]
        assert client.call("GET", f"/samples/{waits[1]}/images/0.png")[0] == 200
        made.shutdown()
        status, answer = client.call("POST", "/samples", {})
        want = "submit: engine must be open, got one that was shut down"
        assert (status, answer) == (503, {"error": want})
        assert client.call("GET", "/health")[0] == 503


def test_a_model_that_fails_is_a_500() -> None:
    def sick(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("out of memory")

    with serving(engine(sick)) as client:
        name = client.submit(steps=1)
        answer = client.call("GET", f"/samples/{name}/images/0.png")
        assert answer == (500, {"error": "RuntimeError: out of memory"})
        assert [kind for kind, _ in client.events(name)][-1] == "failed"


# a body, its status, and what is said of it
BODIES = (
    (b"", 400, "samples: body must be JSON, got "),
    (b"{", 400, "samples: body must be JSON, got "),
    (b"\xff\xfe", 400, "samples: body must be JSON, got "),
    (b"[" * 30_000, 400, "samples: body must be JSON, got "),
    (b'{"steps": NaN}', 400, "samples: body must be JSON, got numbers must be finite, got NaN"),
    (b"[]", 400, "samples: body must be an object, got list"),
    (b" " * (BODY + 1), 413, "samples: body must be at most 65536 bytes, got more"),
    ({"stepz": 3}, 422, "samples: fields must be among seeds, "),
    ({"callback": 3}, 422, "samples: fields must be among seeds, "),
    ({"client": "x"}, 422, "samples: fields must be among seeds, "),
    ({"steps": 8.0}, 422, "submit: steps must be an integer, got 8.0"),
    ({"steps": 10**6}, 422, "submit: steps must lie in [1, 1000], got 1000000"),
    ({"seeds": [1, "2"]}, 422, "submit: seeds must be integers, got str"),
    ({"seeds": {"a": 1}}, 422, "submit: seeds must be a sequence, got dict"),
    ({"seeds": None}, 422, "submit: seeds must be integers, got NoneType"),
    ({"seeds": list(range(257))}, 422, "submit: seeds must be at most 256, got 257"),
    ({"solver": ["ddim"]}, 422, "submit: solver must be a name or a StepTable, got ['ddim']"),
    ({"spacing": {}}, 422, "submit: spacing must be a name or None, got {}"),
    ({"options": {"eta": {}}}, 422, "submit: options must be numbers, words or tuples"),
    ({"options": {"spacing": "karras"}}, 422, "submit: options must be of the solver or its grid"),
    ({"guidance": {"w": 1}}, 422, "Sampler: guidance must be a number, got dict"),
    ({"guidance_interval": 3}, 422, "Sampler: guidance_interval must be two numbers"),
    ({"cond": {"label": 99.5}}, 422, "submit: cond label must be torch.int64"),
    ({"cond": {"label": {}}}, 422, "submit: cond label must be numbers or a tensor, got {}"),
    ({"label": "boat"}, 422, "sample: label must be 0 to 1 or one of bag, boot, got 'boat'"),
    ({"label": "bag,boot"}, 422, "sample: label must be 0 to 1 or one of bag, boot, got 'bag,bo"),
    ({"deadline": 10**400}, 422, "submit: deadline must be finite and above 0"),
    ({"guidance": 10**400}, 422, "Sampler: guidance must be finite"),
    ({"label": []}, 422, "submit: cond label must "),
    ({"label": 1, "cond": {"label": 1}}, 422, "samples: cond must be an object without label"),
    ({"deadline": -1}, 422, "submit: deadline must be finite and above 0, got -1"),
)  # fmt: skip


def test_a_malformed_body_is_refused_in_the_librarys_words() -> None:
    made = engine(classes=("bag", "boot"))
    with serving(made) as client:
        for body, status, message in BODIES:
            answer = client.call("POST", "/samples", body)
            assert answer[0] == status, (body, answer)
            assert answer[1]["error"].startswith(message), (body, answer)
        assert made.stats().ended == 0 and made.stats().waiting == 0
        assert client.call("PUT", "/samples")[0] == 405


def test_load_from_many_clients() -> None:
    """Forty requests from eight connections at once; every image is the one that it is alone."""
    made = engine(slots=4, queue=64)
    requests = [
        {"seeds": k, "solver": s, "steps": 2 + k % 5, "guidance": 1 + k % 3, "cond": {"label": k}}
        for k, s in enumerate(("ddim", "heun", "ddpm", "dpmpp_2m", "unipc") * 8)
    ]
    expected = [encode_png(made.alone(**request)[0]) for request in requests]
    with serving(made, keep=len(requests)) as client:

        def fetch(k: int) -> bytes:
            mine = Client(client.port, f"client {k % 8}")
            name = mine.submit(**requests[k])
            list(mine.events(name)) if k % 2 else None
            status, png = mine.call("GET", f"/samples/{name}/images/0.png")
            assert status == 200
            return bytes(png)

        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert list(pool.map(fetch, range(len(requests)))) == expected
        assert made.stats().finished == len(requests)


def test_finished_jobs_are_kept_to_a_number() -> None:
    gate = Gate()
    gate.open(6)
    with serving(engine(gate), keep=3) as client:
        names = []
        for k in range(6):
            names.append(client.submit(seeds=[k] * (1 + k % 2), steps=1))
            assert client.call("GET", f"/samples/{names[-1]}/images/0.png")[0] == 200
        client.submit(steps=1)  # it is at work, so it is kept beside them
        kept = [client.call("GET", f"/samples/{name}")[0] == 200 for name in names]
        gate.open(1)
    assert kept == [False] * 4 + [True] * 2


def test_a_finished_job_outlives_its_own_answer() -> None:
    """More images than are kept, ready before the client has heard of the job."""
    made = engine()
    submit = made.submit

    def finished(**fields: Any) -> Any:
        job = submit(**fields)
        job.result(WAIT)
        return job

    made.submit = finished  # type: ignore[method-assign]
    with serving(made, keep=1) as client:
        for _ in range(2):
            name = client.submit(seeds=[1, 2], steps=1)
            assert client.call("GET", f"/samples/{name}/images/1.png")[0] == 200


@pytest.mark.parametrize(
    ("grace", "last"),
    (
        (WAIT, "done"),  # what somebody waits for is finished
        (0.0, "cancelled"),  # there is no time for it
    ),
)
def test_the_server_ends_with_jobs_at_work(grace: float, last: str) -> None:
    def lasting(x: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """The first step takes until the server ends, or until the job has been cancelled."""
        begun.set()
        while made.alive or (grace == 0 and "cancelled" not in kinds):
            threading.Event().wait(1e-3)
        return model(x, t, label)

    begun, made, kinds = threading.Event(), engine(lasting, slots=1), []
    with serving(made, grace=grace) as client:
        name = client.submit(steps=2)
        assert begun.wait(WAIT)
        events = client.events(name)
        kinds.append(next(events)[0])
        follower = threading.Thread(target=lambda: kinds.extend(kind for kind, _ in events))
        follower.start()
    follower.join(WAIT)
    assert kinds[0] == "waiting" and kinds[-1] == last
    assert made.stats()[:2] == (0, 0)


def test_only_pictures_are_served() -> None:
    with engine(model) as made:
        made.shape = (4, 5, 5)
        with pytest.raises(ValueError, match=r"serve: images must have shape .*, got \(4, 5, 5\)"):
            create_app(made)
    # three latent channels would pass for colours
    autoencoder = AutoencoderConfig(channels=(8,), groups=4, latent_channels=3)
    denoiser = DiTConfig(
        in_channels=3, image_size=4, width=8, depth=1, heads=1, num_classes=2, learn_sigma=False
    )
    latent = LatentDiffusion(LatentDiffusionConfig(denoiser, autoencoder))
    with (
        Engine(latent, schedules.cosine(), (3, 4, 4), slots=1, sizes=[2]) as made,
        pytest.raises(ValueError, match="serve: model must make images, got one of latents"),
    ):
        create_app(made)


def test_the_command(tiny: Any) -> None:
    """It serves the checkpoint that it was told, and ends when it is interrupted."""
    words = ["--model", str(tiny), "--port", "0", "--slots", "2", "--dtype", "float32"]
    command = [sys.executable, "-m", "fastdiff", "serve", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        hang = threading.Timer(4 * WAIT, process.kill)  # then the lines below fail
        hang.start()
        log = []
        for line in process.stderr:
            log.append(line)
            if "running on http" in line:
                break
        client = Client(int(re.findall(r"http://127\.0\.0\.1:(\d+)", log[-1])[0]))
        name = client.submit(steps=1, label="boot")
        status, png = client.call("GET", f"/samples/{name}/images/0.png")
        process.send_signal(signal.SIGINT)
        log += process.stderr.readlines()
        hang.cancel()
    assert status == 200 and pixels(png).shape == (16, 16)
    assert process.returncode == 0 and "Traceback" not in "".join(log)


def test_the_command_says_what_is_wrong(tiny: Any, capsys: Any) -> None:
    for words, message in (
        (["--port", "70000"], "serve: port must lie in [0, 65535], got 70000"),
        (["--slots", "0"], "Engine: slots must be at least 1, got 0"),
        (["--model", "nothing"], "nothing"),
    ):
        assert cli.main(["serve", "--model", str(tiny), *words]) == 2
        assert message in capsys.readouterr().err
