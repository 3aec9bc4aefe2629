"""``torchrun -m fastdiff train --shard``: a part of the model in each process, the numbers of one
that has it whole, and checkpoints that any number of processes continues."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bits import assert_same_bits
from budget import assert_within_budget
from idx_files import write_squares
from processes import by_variables

from fastdiff import checkpoints, training
from fastdiff.training import TrainConfig
from fastdiff.training.run import OBJECTIVES

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo")

# all that is cut apart: blocks of the U-Net, the transformer, the autoencoder, and what is in none
SMALL: dict[str, dict[str, Any]] = {
    "unet": {"channels": (32,), "patch_size": 4},
    "latent": {"width": 24, "depth": 2, "heads": 2},  # beside an autoencoder that is not trained
    "autoencoder": {"channels": (8, 8, 8), "latent": 2},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_squares(tmp_path_factory.mktemp("idx"))


def config_of(model: str, folder: Path, out: Path, **more: Any) -> TrainConfig:
    options = {
        "name": "tiny", "data": str(folder), "steps": 6, "batch": 12, "warmup": 2, "save_every": 3,
        "sample_every": 100, "dtype": "float32", "seed": 5, "shard": True, **SMALL[model], **more,
    }  # fmt: skip
    return TrainConfig.of(model, str(out), **options)


def words(config: TrainConfig) -> list[str]:
    return config.command().split()[1:] + (["--resume"] if config.resume else [])


def state(config: TrainConfig) -> dict[str, Any]:
    found: dict[str, Any] = torch.load(Path(config.out) / "last.pt", weights_only=True)
    return found


# the command without its pictures, which take longer than these trainings; every process ends
# where a step is named
COMMAND = """
import os, sys
from fastdiff import cli, training
end = int(sys.argv.pop(1))
advance = training.Run.advance
def cut(run):
    if run.step == end:
        os._exit(7)
    return advance(run)
training.Run.advance, training.Run.show = cut, lambda run, path: None
sys.exit(cli.main(sys.argv[1:]))
"""


def trained_by(count: int, config: TrainConfig, end: int = -1) -> dict[str, Any]:
    """The last checkpoint of so many processes; `end`: the step at which all are killed."""
    codes, _, err = by_variables(count, [str(end), *words(config)], COMMAND)
    assert codes == [0 if end < 0 else 7] * count, err
    return state(config)


def alone(config: TrainConfig, dtype: torch.dtype = torch.float32) -> training.Run:
    """One process that has the weights whole and computes the shares of two."""
    with pytest.MonkeyPatch.context() as patch:
        # as the parts are put together: convolutions round by the memory order of their weights
        patch.setattr(OBJECTIVES[config.model], "memory_format", torch.contiguous_format)
        run = training.Run(replace(config, shard=False))
    run.model.to(dtype)
    run.ema.to(dtype)
    shares = [
        OBJECTIVES[config.model](
            replace(config, seed=config.seed * 2 + rank, batch=config.batch // 2), run.dataset
        )
        for rank in range(2)
    ]

    def loss(index: torch.Tensor, step: int) -> torch.Tensor:
        halves = index.split(config.batch // 2)
        first, second = (
            share.loss(run.model, part, step) for share, part in zip(shares, halves, strict=True)
        )
        return (first + second) / 2

    run._loss = loss
    for _ in range(config.steps):
        run.advance()
    return run


def assert_same_state(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got["step"] == want["step"]
    assert_same_bits(got["losses"], want["losses"])
    for part in ("model", "ema"):
        assert list(got[part]) == list(want[part])
        for name, value in want[part].items():
            assert_same_bits(got[part][name], value, name)
    assert got["optimizer"]["param_groups"] == want["optimizer"]["param_groups"]
    moments = want["optimizer"]["state"]
    assert list(got["optimizer"]["state"]) == list(moments)
    for i, each in moments.items():
        for name, value in each.items():
            assert_same_bits(got["optimizer"]["state"][i][name], value, f"{name} of {i}")


def assert_as_alone(got: dict[str, Any], config: TrainConfig) -> None:
    torch.set_num_threads(1)
    float32, float64 = alone(config), alone(config, torch.float64)
    assert_within_budget(
        got["losses"],
        torch.tensor(float32.losses),
        torch.tensor(float64.losses, dtype=torch.float64),
        1,  # of the sum of two halves
    )
    for part in ("model", "ema"):
        want, exact = (getattr(run, part).state_dict() for run in (float32, float64))
        for name, value in want.items():
            # the fused optimizer rounds an element by its place in memory: what is left of it and
            # its new value, each step, which moves it by up to the learning rate
            at = exact[name].abs().clamp_min(config.lr)
            assert_within_budget(got[part][name], value, exact[name], 2 * config.steps, at)


# biases of the autoencoder before a norm, and of keys, have a gradient of zero: Adam moves them by
# its roundings, as far as the others, so that a second step has no number to compare
@pytest.mark.parametrize(("model", "steps"), [("latent", 6), ("autoencoder", 1)])
def test_the_numbers_of_one_process(model: str, steps: int, folder: Path, tmp_path: Path) -> None:
    config = config_of(model, folder, tmp_path / "run", steps=steps)
    got = trained_by(2, config)
    assert_as_alone(got, config)
    found, _, card = checkpoints.load(Path(config.out) / "tiny.safetensors")
    assert card["training"]["processes"] == 2
    for name, value in found.state_dict().items():
        assert_same_bits(value, got["ema"][name].half().float(), name)


def test_two_processes_a_cut_and_other_numbers_of_them(folder: Path, tmp_path: Path) -> None:
    # every gradient is longer than that
    config = config_of("unet", folder, tmp_path / "run", clip=0.05)
    whole = trained_by(2, config)
    assert_as_alone(whole, config)

    # cut off at step 4, resumed from step 3
    again = replace(config, out=str(tmp_path / "again"))
    third = trained_by(2, again, end=4)
    assert third["step"] == 3
    for name in ("three", "one"):
        (tmp_path / name).mkdir()
        shutil.copy(Path(again.out) / "last.pt", tmp_path / name)
    assert_same_state(trained_by(2, replace(again, resume=True)), whole)

    # three processes, whose parts are of other sizes, read it and write it
    three = replace(config, out=str(tmp_path / "three"), steps=3, resume=True)
    assert_same_state(trained_by(3, three), third)

    # and one that has no parts, with moments in the memory order of its weights
    run = training.Run(replace(config, shard=False))
    run.load(tmp_path / "one" / "last.pt")
    run.save(tmp_path / "one" / "last.pt")
    assert_same_state(state(replace(config, out=str(tmp_path / "one"))), third)
    for p in run.parameters:
        assert run.optimizer.state[p]["exp_avg"].stride() == p.stride()
    assert any(p.dim() == 4 and not p.is_contiguous() for p in run.parameters)


# how much of the weights, gradients, moments and averages each process holds after a step
COUNT = """
import json, os, sys
from fastdiff import training
from torch.distributed.tensor import DTensor
run = training.Run(training.parse(sys.argv[1:]))
run.advance()
moments = [s[k] for s in run.optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
held = {
    "weights": list(run.model.parameters()), "averages": list(run.ema.parameters()),
    "gradients": [p.grad for p in run.parameters], "moments": moments,
}
print(json.dumps({
    name: [sum(t.to_local().numel() for t in each), sum(t.numel() for t in each)]
    for name, each in held.items() if all(isinstance(t, DTensor) for t in each)
}))
run.share.leave()
"""


def test_each_holds_its_part(folder: Path, tmp_path: Path) -> None:
    config = config_of("latent", folder, tmp_path)
    codes, out, err = by_variables(2, words(config)[1:], COUNT)
    assert codes == [0, 0], err
    first, second = map(json.loads, out.splitlines())
    assert list(first) == list(second) == ["weights", "averages", "gradients", "moments"]
    for name, (held, all_of_it) in first.items():
        assert held + second[name][0] == all_of_it
        # the first has the larger half of an odd first dimension
        assert 0.5 * all_of_it <= held < 0.51 * all_of_it


def test_the_command(folder: Path, tmp_path: Path) -> None:
    """Pictures are made by one process of weights that it has for that."""
    config = config_of("latent", folder, tmp_path / "run", steps=2, sample_every=1)
    codes, out, err = by_variables(2, words(config))
    assert codes == [0, 0], err
    assert out.count("weights") == 1  # one of them speaks
    assert sorted(p.name for p in Path(config.out).iterdir()) == [
        "last.pt", "samples-000001.png", "samples-000002.png", "tiny.json", "tiny.png",
        "tiny.safetensors",
    ]  # fmt: skip
    # the same weights, the same picture
    pictures = [(Path(config.out) / f"{n}.png").read_bytes() for n in ("samples-000002", "tiny")]
    assert pictures[0] == pictures[1]


def test_one_process_has_all_parts(folder: Path, tmp_path: Path) -> None:
    config = config_of("autoencoder", folder, tmp_path / "sharded", steps=2)
    plain = replace(config, out=str(tmp_path / "plain"), shard=False)
    assert training.train(config).read_bytes() == training.train(plain).read_bytes()


def test_command_gives_the_config_back() -> None:
    config = TrainConfig(out="x", shard=True)
    assert config.command() == "fastdiff train --out x --shard"
    assert training.parse(config.command().split()[2:]) == config


def test_a_checkpoint_of_other_widths_is_refused(folder: Path, tmp_path: Path) -> None:
    config = config_of("unet", folder, tmp_path)
    training.Run(config).save(tmp_path / "last.pt")
    with pytest.raises(ValueError, match=r"misshapen  stem.weight \(64,"):
        training.Run(replace(config, channels=(64,))).load(tmp_path / "last.pt")
