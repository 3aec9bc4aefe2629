"""``torchrun -m fastdiff train``: the gradient of the whole batch, resumed to the same bits."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from idx_files import write_squares
from processes import by_variables, started

from fastdiff import training
from fastdiff.training import TrainConfig
from fastdiff.training.run import OBJECTIVES

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    folder = write_squares(tmp_path)
    return TrainConfig(
        out=str(tmp_path / "run"), name="tiny", data=str(folder), steps=6, batch=8, warmup=2,
        channels=(32,), patch_size=4, save_every=3, sample_every=100, dtype="float32", seed=5,
    )  # fmt: skip


def words(config: TrainConfig) -> list[str]:
    return config.command().split()[1:] + (["--resume"] if config.resume else [])


def state(config: TrainConfig) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(Path(config.out) / "last.pt", weights_only=True)
    return found


# the command, of which every process ends in the middle
CUT = """
import os, sys
from fastdiff import cli, training
advance = training.Run.advance
def cut(run):
    if run.step == 4:
        os._exit(7)
    return advance(run)
training.Run.advance = cut
sys.exit(cli.main(sys.argv[1:]))
"""


def test_two_processes(config: TrainConfig, tmp_path: Path) -> None:
    codes, out, err = by_variables(2, words(config))
    assert codes == [0, 0], err
    assert out.count("weights") == 1  # one of them speaks
    assert sorted(p.name for p in Path(config.out).iterdir()) == [
        "last.pt", "tiny.json", "tiny.png", "tiny.safetensors",
    ]  # fmt: skip
    got = state(config)

    # one process that computes both shares: halves add up without rounding
    torch.set_num_threads(1)
    run = training.Run(replace(config, out=str(tmp_path / "one")))
    shares = [
        OBJECTIVES["unet"](replace(config, seed=config.seed * 2 + rank, batch=4), run.dataset)
        for rank in range(2)
    ]

    def loss(index: torch.Tensor, step: int) -> torch.Tensor:
        first, second = (
            share.loss(run.model, part, step)
            for share, part in zip(shares, index.split(4), strict=True)
        )
        return (first + second) / 2

    run._loss = loss
    for _ in range(config.steps):
        run.advance()
    assert_same_bits(got["losses"], torch.tensor(run.losses))
    for name, value in run.ema.state_dict().items():
        assert_same_bits(got["ema"][name], value, name)

    # cut off at step 4, resumed from step 3
    again = replace(config, out=str(tmp_path / "again"))
    processes = started(2, ["-c", CUT, *words(again)], None)
    assert [p.wait(timeout=200) for p in processes] == [7, 7]
    assert state(again)["step"] == 3
    codes, _, err = by_variables(2, words(replace(again, resume=True)))
    assert codes == [0, 0], err
    for part in ("model", "ema"):
        for name, value in got[part].items():
            assert_same_bits(state(again)[part][name], value, name)


def test_a_batch_that_has_no_equal_shares(config: TrainConfig) -> None:
    codes, _, err = by_variables(2, words(replace(config, batch=7)))
    assert 0 not in codes
    assert "train: batch must be a multiple of the 2 processes, got 7" in err


def test_the_noise_goes_by_the_place_in_the_whole_batch(config: TrainConfig) -> None:
    """What `Share` says of its seeds."""
    whole = OBJECTIVES["unet"](config, training.Run(config).dataset)
    for size in (2, 4):
        for rank in range(size):
            share = replace(config, seed=config.seed * size + rank, batch=config.batch // size)
            part = OBJECTIVES["unet"](share, training.Run(config).dataset)
            assert part.first_seed == whole.first_seed + rank * share.batch
