"""What is fuzzed: each target reads bytes that a stranger may have written.

A target returns where the bytes were taken, and where they were refused as the library refuses: a
ValueError, TypeError or OSError whose message names what was wrong. Anything else that comes out of
it is a defect. `fuzz.py` drives them; tests/test_fuzz_corpus.py replays the kept inputs.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import hashlib
import io
import json
import os
import re
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastdiff
from fastdiff import _cli_sample, checkpoints, schedules, solvers
from fastdiff.formats.files import STEM, read_json, read_shards, read_weights
from fastdiff.models import DiT, DiTConfig, UNet, UNetConfig
from fastdiff.serve import Engine
from fastdiff.serve.http import create_app
from fastdiff.table import Row, StepTable

# every message of the library says first what refuses: "load: ", "UNetConfig: ", "beta.x: "
HOUSE = re.compile(r"[A-Za-z_][\w.]*( \w+)?: \S")
MOST_STEPS = 40  # of a table: how long it takes is the user's own wish

_folder = Path(tempfile.mkdtemp(prefix="fastdiff-fuzz-", dir=os.environ.get("FASTDIFF_FUZZ_TMP")))


@contextlib.contextmanager
def refusing() -> Any:
    """Passes what may come out; the message must be the library's own."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            yield
    except (ValueError, TypeError, OSError) as error:
        if not HOUSE.match(str(error)):
            raise AssertionError(f"no message of the library: {error!r}") from error


def weights(data: bytes) -> None:
    """A file of weights; the first byte chooses the suffix."""
    path = _folder / ("w" + (".safetensors", ".pt", ".bin")[data[0] % 3 if data else 0])
    path.write_bytes(data[1:])
    with refusing():
        for value in read_weights(path).values():
            # reads all of it: what lies outside the file would crash here
            value.double().sum() if value.is_floating_point() else value.sum()


def index(data: bytes) -> None:
    """The index of a sharded checkpoint."""
    path = _folder / f"{STEM}.safetensors.index.json"
    path.write_bytes(data)
    part = _folder / "a.safetensors"
    if not part.exists():
        part.write_bytes(checkpoints.to_bytes({"w": torch.ones(2)}))
    with refusing():
        read_json(path)
        read_shards(path)


def _small(name: str) -> Path:
    """A checkpoint of a few weights, made once."""
    path = _folder / f"{name}.safetensors"
    if not path.exists():
        model: torch.nn.Module
        if name == "unet":
            model = UNet(
                UNetConfig(
                    image_size=4, channels=(8,), num_classes=2, embed_dim=8, head_dim=8,
                    patch_size=1, groups=4, middle="plain",
                )
            )  # fmt: skip
        else:
            model = DiT(DiTConfig(image_size=4, width=16, depth=1, heads=1, num_classes=2))
        card = {"prediction": "epsilon", "classes": ["a", "b"]}
        card["sampling"] = {"guidance": 1.5, "shape": [model.config.in_channels, 4, 4]}
        checkpoints.save(path, model, schedules.linear(10), card)
    return path


def card(data: bytes) -> None:
    """The card beside a checkpoint, with the digest of its weights, through the command line."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        found = None
    name = "unet" if not isinstance(found, dict) or "channels" in str(found) else "dit"
    path = _small(name)
    own = path.with_suffix(".json").read_bytes()
    if isinstance(found, dict):
        found["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        data = json.dumps(found).encode()
    path.with_suffix(".json").write_bytes(data)
    parser = argparse.ArgumentParser(exit_on_error=False)
    _cli_sample.add_arguments(parser)
    try:
        with refusing():
            args = parser.parse_args(["--model", str(path), "--steps", "2", "--device", "cpu"])
            job = _cli_sample.load_job(args)
            job.images([0], job.labels[:1])
    finally:
        path.with_suffix(".json").write_bytes(own)


def scheduler(data: bytes) -> None:
    """A scheduler's config of diffusers."""
    from fastdiff.formats.diffusers import as_written
    from fastdiff.formats.schedulers import read_scheduler

    path = _folder / "scheduler_config.json"
    path.write_bytes(data)
    with refusing():
        config = read_json(path)
        with as_written(path):
            read_scheduler(config)


def config(data: bytes) -> None:
    """A model's config of diffusers, without its weights."""
    folder = _folder / "model"
    folder.mkdir(exist_ok=True)
    weights_of = folder / f"{STEM}.safetensors"
    if not weights_of.exists():
        weights_of.write_bytes(checkpoints.to_bytes({f"w{i}": torch.ones(2) for i in range(40)}))
    (folder / "config.json").write_bytes(data)
    with refusing():
        fastdiff.load(folder)


def cli(data: bytes) -> None:
    """Words of ``fastdiff sample``, one a line, up to where a model would be run."""
    words = data.decode("utf-8", "replace").split("\n")
    parser = argparse.ArgumentParser(exit_on_error=False, add_help=False)
    _cli_sample.add_arguments(parser)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            args = parser.parse_args(words)
    except (SystemExit, argparse.ArgumentError):
        return
    with refusing():
        _cli_sample.as_seeds(_cli_sample.parse_seeds(args.seeds), where="sample")
    with refusing():
        _cli_sample.parse_labels(args.label, ["t-shirt", "bag"])
    for schedule in (schedules.cosine(20), schedules.edm(), schedules.flow()):
        with refusing():
            solvers.build(
                args.solver, schedule, min(args.steps, MOST_STEPS), prediction="sample",
                spacing=args.spacing, **_cli_sample.parse_options(args.option),
            )  # fmt: skip


def table(data: bytes) -> None:
    """Rows of a table as JSON objects with the fields of `Row`."""
    try:
        rows = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not (isinstance(rows, list) and all(isinstance(r, dict) for r in rows)):
        return
    names = set(Row.__dataclass_fields__)
    with refusing():
        made = StepTable(
            "fuzz", tuple(Row(**{"x": {}} | {k: r[k] for k in r if k in names}) for r in rows)
        )
        for clip in (False, True):
            if not bool(made.packed(clip=clip).floats.isfinite().all()):
                raise AssertionError("a coefficient is not finite")


@functools.cache
def _served() -> tuple[asyncio.AbstractEventLoop, Any]:
    """A loop, and the application of an engine whose model costs nothing."""
    engine = Engine(
        lambda x, t, label: x * 0.5 + label.view(-1, 1, 1, 1) * 0.125, schedules.scaled_linear(),
        (1, 2, 2), null={"label": torch.tensor(-1)}, slots=8, sizes=range(1, 17),
        max_steps=MOST_STEPS, classes=("bag", "boot"),
    )  # fmt: skip
    return asyncio.new_event_loop(), create_app(engine)


async def _call(app: Any, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of an answer."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {
        "type": "http", "http_version": "1.1", "method": method, "path": path, "headers": [],
        "query_string": b"", "client": ("127.0.0.1", 1),
    }  # fmt: skip
    await app(scope, receive, send)
    return sent[0]["status"], b"".join(m.get("body", b"") for m in sent)


def http(data: bytes) -> None:
    """The body of a request for samples; what is accepted must end with its first image."""
    loop, app = _served()

    async def ask() -> None:
        status, answer = await _call(app, "POST", "/samples", data)
        found = json.loads(answer)
        if status != 202:
            assert status in (400, 413, 422) and HOUSE.match(found["error"]), (status, answer)
            return
        status, answer = await _call(app, "GET", f"/samples/{found['id']}/images/0.png")
        # 504: it asked for a deadline, and missed it
        assert status == 200 or (status == 504 and b"deadline" in data), (status, answer)

    loop.run_until_complete(ask())


TARGETS: dict[str, Callable[[bytes], None]] = {
    f.__name__: f for f in (weights, index, card, scheduler, config, cli, table, http)
}
