"""Training on a made-up data set: determinism, resuming, the clock, and the data reader."""

import json
import math
import shlex
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from idx_files import COUNT, write_squares
from PIL import Image
from training_runs import losses

from fastdiff import checkpoints, data, randn, schedules, training
from fastdiff.models import UNet, UNetConfig
from fastdiff.ops import Stream
from fastdiff.reference.diffusion import to_prediction
from fastdiff.training import TrainConfig, progress_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_squares(tmp_path_factory.mktemp("idx"))


@pytest.fixture
def config(folder, tmp_path):
    return TrainConfig(
        out=str(tmp_path / "run"), name="tiny", data=str(folder), steps=8, batch=8, warmup=2,
        channels=(32,), patch_size=4, save_every=4, sample_every=100, dtype="float32", seed=5,
    )  # fmt: skip


@pytest.fixture(autouse=True)
def no_grids(monkeypatch):
    """Sampling costs more than these trainings; `test_sample_grid` alone does it."""
    paths: list[Path] = []
    monkeypatch.setattr(training.Run, "show", lambda run, path: paths.append(path))
    return paths


def test_sample_grid(config, monkeypatch):
    monkeypatch.undo()
    run = training.Run(config)
    path = Path(config.out)
    path.mkdir()
    run.show(path / "grid.png", rows=1)
    # a column a class; an untrained model answers 0, so that noise remains
    pixels = np.asarray(Image.open(path / "grid.png"))
    assert pixels.shape == (32, 320)
    assert pixels.std() > 0


def test_a_finished_run_is_written_again_unchanged(config):
    first = training.train(config).read_bytes()
    path = training.train(replace(config, resume=True))
    assert path.read_bytes() == first
    assert len(losses(config)) == config.steps


def test_result_and_card(config, no_grids):
    path = training.train(replace(config, sample_every=3))
    assert path == Path(config.out) / "tiny.safetensors"
    model, schedule, card = checkpoints.load(path)
    assert schedule.name == "cosine"
    assert model.config.channels == (32,)
    assert card["prediction"] == "v_prediction"
    assert card["metrics"] == {}
    assert card["classes"][0] == "t-shirt"
    assert card["sampling"]["shape"] == [1, 32, 32]
    facts = card["training"]
    assert (facts["steps"], facts["images_seen"]) == (8, 64)
    assert facts["loss"] == [round(v, 5) for v in losses(config)]
    names = [p.name for p in no_grids]
    assert names == ["samples-000003.png", "samples-000006.png", "tiny.png"]
    # the weights are the average, not the last step's
    state = torch.load(Path(config.out) / "last.pt", weights_only=True)
    assert torch.equal(
        model.state_dict()["stem.weight"], state["ema"]["stem.weight"].half().float()
    )
    assert not torch.equal(state["model"]["stem.weight"], state["ema"]["stem.weight"])


def test_it_learns(config):
    training.train(replace(config, steps=40, prediction="sample", gamma=0.0, save_every=100))
    curve = losses(config)
    # a black image, the mean of nearly every pixel, already removes most of the loss
    assert np.mean(curve[-10:]) < curve[0] / 4


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_every_prediction_trains(config, prediction):
    path = training.train(replace(config, prediction=prediction, gamma=0.0, steps=2))
    assert checkpoints.load(path)[2]["prediction"] == prediction
    assert all(math.isfinite(v) for v in losses(config))


def test_bfloat16_trains(config):
    training.train(replace(config, dtype="bfloat16", steps=2))
    assert all(math.isfinite(v) for v in losses(config))


def test_a_run_starts_as_the_first_release_did(config):
    """The weights, the first batch and its loss, as they were when fashion was the only set."""
    run = training.Run(config)
    torch.manual_seed(config.seed)
    want = UNet(UNetConfig(channels=(32,), patch_size=4)).state_dict()
    assert all(torch.equal(v, want[k]) for k, v in run.model.state_dict().items())
    order = training.objective.generator(config.seed, 0, 1)
    first = torch.randperm(COUNT, generator=order)[: config.batch]
    assert torch.equal(batch_of(run)[0], run.dataset.images[first])
    # an untrained model answers 0, so the loss is a weighted mean of 8 * 32 * 32 squares; a sum
    # in pairs of 2 ** 13 terms may be off by 13 units, and three roundings make each term
    assert run.advance() == pytest.approx(0.2971578538417816, rel=16 * torch.finfo().eps)


def test_command_gives_the_config_back(config):
    for c in (config, TrainConfig(out="x"), replace(config, channels=(32, 64), lr=2.5e-4)):
        assert training.parse(c.command().split()[2:]) == c
    spaced = TrainConfig(out="my runs/a's", data="the data")
    assert training.parse(shlex.split(spaced.command())[2:]) == spaced
    assert TrainConfig(out="x", resume=True).command() == "fastdiff train --out x"


def test_command_line(config, capsys):
    assert training.main(config.command().split()[2:]) == 0
    assert json.loads(capsys.readouterr().out)["weights"].endswith("tiny.safetensors")


def batch_of(run):
    return run.objective.batch(run.index(), run.step)


def drawn_by(run):
    """All that the present step draws; where the noise is the target, it is the last."""
    x0, label, t = batch_of(run)
    return (x0, label, t, *run.objective.noisy(x0, t, run.step))


def test_batches_depend_on_the_step_and_the_seed_alone(config):
    config = replace(config, prediction="epsilon")
    run, other = training.Run(config), training.Run(config)
    run.step = other.step = 3
    first = drawn_by(run)
    assert all(torch.equal(a, b) for a, b in zip(first, drawn_by(other), strict=True))
    noises = {first[-1].numpy().tobytes()}
    for seed, step in ((5, 4), (6, 3), (2**40 + 5, 3)):
        other = training.Run(replace(config, seed=seed))
        other.step = step
        noises.add(drawn_by(other)[-1].numpy().tobytes())
    assert len(noises) == 4


def test_images_of_one_batch_and_of_two_runs_have_noises_of_their_own(config):
    config = replace(config, prediction="epsilon")
    found = [drawn_by(training.Run(replace(config, seed=seed)))[-1] for seed in (0, 1, 2)]
    assert len({noise.numpy().tobytes() for batch in found for noise in batch}) == 3 * config.batch


@pytest.mark.parametrize("target", ("epsilon", "v_prediction", "flow", "sample"))
@pytest.mark.parametrize(
    "schedule", (schedules.cosine(), schedules.edm(), schedules.flow()), ids=lambda s: s.kind
)
def test_noised_is_the_formula_at_the_times_of_the_schedule(schedule, target):
    t = torch.tensor([0.3, 0.7, 1.0]) * schedule.t_max
    x0 = randn([1, 2, 3], (2, 4, 4))
    x, wanted = training.noised(schedule, x0, t, [7, 8, 9], target=target, step=3)
    noise = randn([7, 8, 9], (2, 4, 4), step=3, stream=Stream.FORWARD)
    alpha, sigma = (
        torch.from_numpy(np.array(f(t.numpy()))).float().view(3, 1, 1, 1)
        for f in (schedule.alpha, schedule.sigma)
    )
    assert torch.equal(x, alpha * x0 + sigma * noise)
    assert torch.equal(wanted, to_prediction(target, x0, noise, alpha, sigma))


def test_noised_refuses_times_that_are_no_tensor():
    with pytest.raises(TypeError, match="noised: t must be a tensor, got list"):
        training.noised(schedules.cosine(), torch.zeros(1, 2), [3], 0)


def test_an_epoch_visits_every_image_once(config):
    run = training.Run(replace(config, label_dropout=0.0))
    run.objective.images = torch.arange(COUNT).view(COUNT, 1, 1, 1).float()
    orders = []
    for epoch in range(2):
        seen = []
        for step in range(COUNT // 8):
            run.step = epoch * (COUNT // 8) + step
            x0, label, _ = batch_of(run)
            seen += x0.flatten().long().tolist()
            assert torch.equal(label, run.dataset.labels[x0.flatten().long()])
        assert sorted(seen) == list(range(COUNT))
        orders.append(seen)
    assert orders[0] != orders[1]


def test_times_are_stratified_and_labels_dropped(config):
    run = training.Run(replace(config, batch=40, label_dropout=0.5))
    dropped = 0
    for run.step in range(50):
        _, label, t = batch_of(run)
        # one time in each of 40 equal parts of [0, 1000)
        assert (t // 25).tolist() == list(range(40))
        dropped += int((label == -1).sum())
    # 2,000 draws at one half: five standard deviations are 5 * sqrt(500)
    assert abs(dropped - 1000) <= 5 * math.sqrt(500)


def test_learning_rate_warms_up_and_decays(config):
    run = training.Run(config)
    rates = []
    for _ in range(config.steps):
        run.advance()
        rates.append(run.optimizer.param_groups[0]["lr"])
    want = [config.lr * min(1, (i + 1) / 2) * (1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)]
    assert rates == pytest.approx(want, rel=4 * np.finfo(float).eps)


def test_progress():
    config = TrainConfig(out="x", steps=100)
    assert progress_of(config, 25, 1e9) == 0.25
    timed = replace(config, max_minutes=10.0)
    assert progress_of(timed, 25, 60.0) == 0.25
    assert progress_of(timed, 25, 300.0) == 0.5
    assert progress_of(timed, 25, 6000.0) == 1.0


def test_pauses_are_not_counted(config, monkeypatch):
    # a second a step, and once a pause of an hour
    ticks = iter([0.0, 1.0, 2.0, 3602.0, 3603.0, *range(3604, 3620)])
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    training.train(replace(config, save_every=100, steps=5))
    state = torch.load(Path(config.out) / "last.pt", weights_only=True)
    assert state["elapsed"] == 5.0


def test_minutes_end_the_run(config, monkeypatch):
    ticks = iter(range(1000))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    training.train(replace(config, steps=1000, max_minutes=0.1))
    # 6 seconds at a second a step
    assert len(losses(config)) == 6


def test_checkpoint_is_whole_or_absent(config, monkeypatch):
    run = training.Run(config)
    path = Path(config.out)
    path.mkdir()
    run.save(path / "last.pt")
    before = (path / "last.pt").read_bytes()

    def fail(state, target):
        Path(target).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        run.save(path / "last.pt")
    assert (path / "last.pt").read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps must be >= 1, got 0"),
        ({"max_minutes": -1.0}, "max_minutes must be >= 0"),
        ({"lr": 0.0}, "lr must be > 0"),
        ({"lr": math.nan}, "lr must be > 0, got nan"),
        ({"guidance": math.inf}, "guidance must be finite, got inf"),
        ({"balance": math.inf}, "balance must be finite, got inf"),
        ({"name": "sub/x"}, "name must be that of a file in out, got 'sub/x'"),
        ({"name": ".."}, r"name must be that of a file in out, got '\.\.'"),
        ({"ema": 1.0}, r"ema must lie in \[0, 1\)"),
        ({"dtype": "int8"}, "dtype must be 'bfloat16' or 'float32', got 'int8'"),
        ({"prediction": "noise"}, "prediction must be one of"),
    ],
    # one row for each rule
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(out="x", **change)


def test_run_errors(config):
    with pytest.raises(ValueError, match="schedule must be discrete, got 'edm'"):
        training.train(replace(config, schedule="edm"))
    with pytest.raises(ValueError, match="schedule must name a schedule"):
        training.train(replace(config, schedule="cosin"))
    with pytest.raises(ValueError, match=r"schedule must name a schedule of \['cosine', 'edm'"):
        training.train(replace(config, schedule="from_betas"))
    with pytest.raises(ValueError, match=r"seed must be < 2\*\*64, got 18446744073709551616"):
        training.train(replace(config, seed=1 << 64))
    with pytest.raises(ValueError, match="batch must be at most 40, got 41"):
        training.train(replace(config, batch=41))
    with pytest.raises(FileNotFoundError, match=r"out must hold last\.pt to resume"):
        training.train(replace(config, resume=True))


def test_reader(folder):
    images, labels = data.fashion_mnist("train", folder)
    assert images.shape == (COUNT, 1, 32, 32) and images.dtype == torch.float32
    assert labels.tolist() == [i % 10 for i in range(COUNT)] and labels.dtype == torch.int64
    # two rows and columns of black on each side; 255 - 3 of label 3 on [-1, 1]
    assert images[:, :, [0, 1, 30, 31]].eq(-1).all() and images[..., [0, 1, 30, 31]].eq(-1).all()
    assert images[3, 0, 2 + 6, 2 + 4] == torch.tensor(252.0) / 127.5 - 1
    assert len(data.fashion_mnist("test", folder, size=28)[0]) == 10


def test_reader_errors(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        data.fashion_mnist("train", tmp_path)
    with pytest.raises(ValueError, match="split must be one of"):
        data.fashion_mnist("valid", folder)
    with pytest.raises(ValueError, match="size must be at least 28, got 27"):
        data.fashion_mnist("train", folder, size=27)
    bad = tmp_path / "bad"
    bad.write_bytes(b"\x00\x00\x0d\x01")
    with pytest.raises(ValueError, match="must be an IDX file of uint8, got header 00000d01"):
        data.read_idx(bad)
    bad.write_bytes(b"\x00\x00\x08\x02\x00\x00")
    with pytest.raises(ValueError, match="must hold 2 sizes"):
        data.read_idx(bad)
    bad.write_bytes(b"\x00\x00\x08\x01\x00\x00\x00\x03ab")
    with pytest.raises(ValueError, match=r"must hold 3 bytes for shape \(3,\), got 2"):
        data.read_idx(bad)


def test_grid_of_images(tmp_path):
    images = torch.tensor([-1.0, 0.0, 1.0, 7.0, -7.0]).view(5, 1, 1, 1).expand(5, 1, 2, 3)
    data.save_grid(images, tmp_path / "grid.png", 2)
    pixels = np.asarray(Image.open(tmp_path / "grid.png"))
    assert pixels[::2, ::3].tolist() == [[0, 128], [255, 255], [0, 0]]
    assert pixels.shape == (6, 6)
    with pytest.raises(ValueError, match="images must have shape"):
        data.save_grid(images[0], tmp_path / "grid.png", 2)
