"""Damaged files of every kind that is read: an error of this library names the file and the rule.

Weights and configs of others are in test_formats_hostile.py.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import os
import struct
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from idx_files import write_squares

from fastdiff import checkpoints, cli, training
from fastdiff._cli_files import check_manifest
from fastdiff.data.fashion import read_idx
from fastdiff.reference.flow import RealNVP, RealNVPConfig
from fastdiff.serve import Engine
from fastdiff.training import TrainConfig

# --- a checkpoint of training ---------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("run")
    return TrainConfig(
        out=str(folder / "out"), name="tiny", data=str(write_squares(folder)), steps=2, batch=8,
        channels=(32,), patch_size=4, sample_every=100, dtype="float32",
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(config: TrainConfig) -> training.Run:
    run = training.Run(config)
    run.advance()
    return run


@pytest.fixture(scope="module")
def whole(run: training.Run, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "last.pt"
    run.save(path)
    return path.read_bytes()


def without_the_end(name: str, data: bytes) -> bytes:
    """A zip file whose entry of that name has lost its last half."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            keep = len(content) // 2 if entry.filename.endswith(name) else len(content)
            new.writestr(entry.filename, content[:keep])
    return out.getvalue()


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


# name: what is left of the file's bytes
BYTES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "one byte": lambda data: data[:1],
    "half": lambda data: data[: len(data) // 2],
    "no directory at the end": lambda data: data[:-100],
    "zeros": lambda data: bytes(len(data)),
    "another magic": lambda data: b"GARBAGE!" + data[8:],
    "text": lambda data: b"<html>404</html>",
    "half a pickle": lambda data: without_the_end("data.pkl", data),
    "half a tensor": lambda data: without_the_end("data/0", data),
    "an empty zip": lambda data: b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("damage", BYTES.values(), ids=BYTES)
def test_bytes_of_a_checkpoint_of_training(
    damage: Callable[[bytes], bytes], run: training.Run, whole: bytes, tmp_path: Path
) -> None:
    path = tmp_path / "last.pt"
    path.write_bytes(damage(whole))
    with pytest.raises(ValueError, match=r"train: path must be a whole \.pt file .*last\.pt"):
        run.load(path)


def _set(*keys: Any) -> Callable[[dict[str, Any]], Any]:
    """Puts the last of these at the place that the others lead to; ... takes it away."""

    def change(state: dict[str, Any]) -> Any:
        *way, last, value = keys
        for key in way:
            state = state[key]
        if value is ...:
            del state[last]
        else:
            state[last] = value
        return None

    return change


HUGE = torch.zeros(1).expand(2**40)
STEM = "stem.weight"
# name: change of the content, and what the message says
CONTENT: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda state: [state], "the checkpoint must be an object"),
    "nothing in it": (lambda state: {}, "config must be an object"),
    "no config": (_set("config", ...), "config must be an object"),
    "config a list": (_set("config", []), "config must be an object"),
    "another model": (_set("config", "model", "vae-mlp"), "model must be that of"),
    "model a number": (_set("config", "model", 3), "model must be that of"),
    "no weights": (_set("model", ...), "model must hold tensors by name"),
    "no average": (_set("ema", ...), "ema must hold tensors by name"),
    "weights a tensor": (_set("model", torch.ones(2)), r"by name, got a tensor \(2,\)"),
    "a weight a number": (_set("model", STEM, 1.0), "model must hold tensors by name"),
    "a weight gone": (_set("ema", STEM, ...), r"missing    stem\.weight"),
    "a weight more": (_set("ema", "stem.more", torch.ones(1)), r"unexpected stem\.more"),
    "a weight of another shape": (_set("model", STEM, torch.ones(1)), r"misshapen  stem\.weight"),
    "a weight of a terabyte": (_set("model", STEM, HUGE), r"misshapen  stem\.weight"),
    "a weight of integers": (
        lambda state: state["model"].update({STEM: state["model"][STEM].long()}),
        r"mistyped   stem\.weight",
    ),
    "a weight without memory": (
        lambda state: state["model"].update(
            {STEM: torch.zeros(()).expand(state["model"][STEM].shape)}
        ),
        "must be a dense tensor of its own memory",
    ),
    "no optimizer": (_set("optimizer", ...), "optimizer must hold state"),
    "an optimizer of something": (_set("optimizer", {"state": {}}), "optimizer must hold state"),
    "groups a number": (_set("optimizer", "param_groups", 3), "param_groups must be a list"),
    "no group": (_set("optimizer", "param_groups", []), "param_groups must be a list of 1"),
    "a group of others": (
        _set("optimizer", "param_groups", 0, "params", [0]), "must name the parameters",
    ),
    "a rate of words": (_set("optimizer", "param_groups", 0, "lr", "fast"), "lr must be such as"),
    "a rate of NaN": (_set("optimizer", "param_groups", 0, "lr", math.nan), "lr must be such as"),
    "three betas": (
        _set("optimizer", "param_groups", 0, "betas", (0.9,) * 3), "betas must be such as",
    ),
    "moments a list": (_set("optimizer", "state", []), "state must have an entry for each"),
    "moments of some": (_set("optimizer", "state", 0, ...), "state must have an entry for each"),
    "a moment gone": (_set("optimizer", "state", 0, "exp_avg", ...), "exp_avg of state 0 must be"),
    "a moment of another shape": (
        _set("optimizer", "state", 0, "exp_avg_sq", torch.ones(3)),
        r"exp_avg_sq of state 0 must be .* got a tensor \(3,\)",
    ),
    "a moment more": (_set("optimizer", "state", 0, "sum", torch.ones(1)), "state 0 must hold"),
    "a step of words": (_set("step", "one"), "step must be an integer"),
    "a step of truth": (_set("step", True), "step must be an integer"),
    "a step below 0": (_set("step", -1), "step must be an integer, 0 or more, got -1"),
    "no step": (_set("step", ...), "step must be an integer, 0 or more, got None"),
    "time of NaN": (_set("elapsed", math.nan), "elapsed must be seconds"),
    "losses a list": (_set("losses", [0.1]), "losses must be one number for each of 1 steps"),
    "losses too many": (_set("losses", torch.zeros(5)), "for each of 1 steps"),
    "losses a terabyte": (_set("losses", HUGE), "for each of 1 steps"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), CONTENT.values(), ids=CONTENT)
def test_content_of_a_checkpoint_of_training(
    change: Callable[[dict[str, Any]], Any], message: str, run: training.Run, whole: bytes,
    tmp_path: Path,
) -> None:  # fmt: skip
    state = torch.load(io.BytesIO(whole), weights_only=True)
    path = tmp_path / "last.pt"
    changed = change(state)
    torch.save(state if changed is None else changed, path)
    weights = {key: value.clone() for key, value in run.model.state_dict().items()}
    before = run.step, run.losses[:]
    with pytest.raises(ValueError, match=f"train: (?s:.*){message}(?s:.*)last.pt"):
        run.load(path)
    assert (run.step, run.losses) == before
    assert all(torch.equal(value, weights[key]) for key, value in run.model.state_dict().items())


def test_a_checkpoint_with_code_runs_none_of_it(run: training.Run, tmp_path: Path) -> None:
    torch.save({"config": Trap(tmp_path / "sprung")}, tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"train: path must be a whole \.pt file of plain tensors"):
        run.load(tmp_path / "last.pt")
    assert not (tmp_path / "sprung").exists()


def test_resuming_from_the_whole_one(config: TrainConfig, whole: bytes) -> None:
    """What the table damages is in order; through `train`, and from a run before its first step."""
    out = Path(config.out)
    out.mkdir()
    (out / "last.pt").write_bytes(whole)
    run = training.Run(replace(config, resume=True))
    run.load(out / "last.pt")
    assert run.step == 1
    fresh = training.Run(config)
    fresh.save(out / "last.pt")
    run.load(out / "last.pt")
    assert run.step == 0 and run.losses == []


# --- a manifest -----------------------------------------------------------------------------

MANIFESTS = {
    "empty": b"",
    "half": b'{"solver": "dd',
    "zeros": bytes(64),
    "no text": b"\xff\xfe\xfa",
    "a list": b"[]",
    "pairs": b'[["solver", "ddim"]]',
    "a number": b"3",
    "brackets": b"[" * 100_000,
    "too much": b" " * ((1 << 25) + 1),
}


@pytest.mark.parametrize("content", MANIFESTS.values(), ids=MANIFESTS)
def test_manifest(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"sample: resume must find a manifest\.json as .*got /"):
        check_manifest(path, {"solver": "ddim"}, files=True)


@pytest.mark.parametrize("value", [None, 3, "ddpm", ["ddim"]], ids=str)
def test_manifest_of_other_values(value: Any, tmp_path: Path) -> None:
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps({"solver": value}))
    with pytest.raises(ValueError, match=r"sample: solver must be .* to resume the run in"):
        check_manifest(path, {"solver": "ddim"}, files=True)


# --- data sets ------------------------------------------------------------------------------


def idx(shape: tuple[int, ...], data: bytes) -> bytes:
    return b"\x00\x00\x08" + bytes([len(shape)]) + struct.pack(f">{len(shape)}I", *shape) + data


GOOD = idx((2, 3, 3), bytes(18))
IDX = {
    "empty": (b"", "must be an IDX file of uint8"),
    "no gzip": (GOOD, "must be a whole .gz file"),
    "half of a gzip": (gzip.compress(os.urandom(100))[:50], "must be a whole .gz file"),
    "a wrong checksum": (gzip.compress(GOOD)[:-8] + bytes(8), "must be a whole .gz file"),
    "damaged inside": (gzip.compress(GOOD)[:12] + bytes(20), "must be a whole .gz file"),
    "another magic": (gzip.compress(b"PNG" + GOOD), "must be an IDX file of uint8"),
    "sizes cut": (gzip.compress(GOOD[:7]), "must hold 3 sizes"),
    "data cut": (gzip.compress(GOOD[:-1]), "must hold 18 bytes"),
    "declared larger than memory": (
        gzip.compress(idx((2**32 - 1,) * 3, b"1234")), "must hold .* bytes for shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("content", "message"), IDX.values(), ids=IDX)
def test_idx_files(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "train-images-idx3-ubyte.gz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"data: .*ubyte\.gz ({message})"):
        read_idx(path)


def test_a_gzip_that_unpacks_to_more_than_is_read(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("fastdiff.data.fashion._MOST_BYTES", 1000)
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(idx((1000,), bytes(1000))))
    with pytest.raises(ValueError, match=r"bomb\.gz must hold at most 1000 bytes"):
        read_idx(path)


def npy(header: str, data: bytes) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + data


def _saved(value: Any, **how: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, value, **how)
    return out.getvalue()


def _archive() -> bytes:
    out = io.BytesIO()
    np.savez(out, points=np.zeros((4, 2)))
    return out.getvalue()


TERABYTE = "{'descr': '<f8', 'fortran_order': False, 'shape': (68719476736, 2), }"
NPY = {
    "empty": (b"", "must be a whole .npy file"),
    "half": (_saved(np.zeros((4, 2)))[:150], "must be a whole .npy file"),
    "zeros": (bytes(200), "must be a whole .npy file"),
    "a terabyte declared": (npy(TERABYTE, bytes(64)), "must be a whole .npy file"),
    "objects": (_saved(np.array([[1, "a"]], object), allow_pickle=True), "must be a whole .npy"),
    "an archive": (_archive(), "must hold one array"),
    "integers": (_saved(np.zeros((4, 2), np.int64)), "must be floating-point"),
    "another shape": (_saved(np.zeros((4, 3))), "must be floating-point"),
}


@pytest.mark.parametrize(("content", "message"), NPY.values(), ids=NPY)
def test_points_of_a_flow(
    content: bytes, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flow = RealNVP(**RealNVPConfig(dim=2, layers=2, hidden=4).to_config())
    saved = checkpoints.save(tmp_path / "flow", flow, None, {})
    path = tmp_path / "points.npy"
    path.write_bytes(content)
    assert cli.main(["eval", str(saved), "--data", str(path)]) != 0
    said = capsys.readouterr().err
    assert f"eval: data {message.split()[0]}" in said and message.split(" ", 1)[1] in said


# --- a card ---------------------------------------------------------------------------------

# name: change of the card of a diffusion model, and what the message says
CARDS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no sampling": (_set("sampling", ...), "sampling of the card must be an object"),
    "sampling a list": (_set("sampling", []), "sampling of the card must be an object"),
    "no classes": (_set("classes", ...), "classes of the card must be a list"),
    "classes of numbers": (_set("classes", [1, 2]), "classes of the card must be a list"),
    "no prediction": (_set("prediction", ...), "prediction of the card must be a word"),
    "prediction a number": (_set("prediction", 3), "prediction of the card must be a word"),
    "no shape": (_set("sampling", "shape", ...), "shape of the card must be three sizes"),
    "a huge shape": (_set("sampling", "shape", [1, 2**20, 2**20]), "shape of the card must be"),
    "guidance of words": (_set("sampling", "guidance", "1"), "guidance of the card must be"),
    "guidance infinite": (_set("sampling", "guidance", -math.inf), "guidance of the card must be"),
    "guidance beyond floats": (_set("sampling", "guidance", 10**400), "guidance of the card must"),
    "a clip below 0": (_set("sampling", "clip", -1), "clip of the card must be"),
}


@pytest.mark.parametrize("reader", ["Engine", "sample", "eval"])
@pytest.mark.parametrize(("change", "message"), CARDS.values(), ids=CARDS)
def test_cards(
    change: Callable[[dict[str, Any]], Any], message: str, reader: str, tiny: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tiny.with_suffix(".json")
    card = json.loads(path.read_text())
    change(card)
    path.write_text(json.dumps(card))
    if reader == "Engine":
        with pytest.raises(ValueError, match=f"Engine: .*{message}"):
            Engine.from_checkpoint(str(tiny))
        return
    flag = ["--model"] if reader == "sample" else []
    assert cli.main([reader, *flag, str(tiny)]) != 0
    said = capsys.readouterr().err
    assert f"{reader}: {message}" in said and "Traceback" not in said
