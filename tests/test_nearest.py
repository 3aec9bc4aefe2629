"""Distances to the training set: known ones, and none of an image to itself."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks import nearest
from fastdiff import checkpoints, data, randn, schedules
from fastdiff.models import UNet, UNetConfig


def test_known_distances():
    among = torch.stack([torch.full((3, 4, 4), v) for v in (-1.0, 0.0, 0.75, 1.0)])
    images = torch.stack([torch.full((3, 4, 4), v) for v in (0.75, 0.25, -1.0)])
    distances, indices = nearest.nearest(images, among)
    assert indices.tolist() == [2, 1, 0]
    # every value is a sum of few bits, so that the distances are exact but for the root
    assert distances.tolist() == pytest.approx([0, 0.25, 0], rel=4 * np.finfo(float).eps)


def test_an_image_is_no_neighbour_of_itself():
    # more than one block of 256 rows
    images = randn(list(range(300)), (1, 2, 2))
    images[299] = images[7]
    distances, indices = nearest.nearest(images, images, others=True)
    assert indices[7] == 299 and indices[299] == 7 and distances[7] == 0
    assert (indices != torch.arange(300)).all() and (distances > 0).sum() == 298
    exact = (images[3] - images).double().square().mean((1, 2, 3)).sqrt()
    exact[3] = torch.inf
    assert float(distances[3]) == pytest.approx(float(exact.min()), rel=8 * np.finfo(float).eps)


def test_the_card_is_told(tmp_path, monkeypatch):
    torch.manual_seed(0)
    config = UNetConfig(
        in_channels=3, image_size=8, channels=(16,), embed_dim=16, groups=4, head_dim=16
    )
    card = {
        "prediction": "v_prediction",
        "classes": [str(i) for i in range(10)],
        "sampling": {"solver": "ddim", "guidance": 1.0, "clip": 1.0, "shape": [3, 8, 8]},
        "metrics": {"kept": 1},
    }
    path = checkpoints.save(tmp_path / "m", UNet(config), schedules.cosine(), card)
    images = randn(list(range(5)), (3, 8, 8)).clamp(-1, 1)
    made = data.Dataset(images, torch.zeros(5).long(), ("a",), "n", "s", "l")
    monkeypatch.setattr(data, "load", lambda name, folder: made)
    png, told = tmp_path / "pairs.png", path.with_suffix(".json")
    words = ["--model", path, "--n", 20, "--steps", 2, "--png", png, "--card", told]
    nearest.main([str(w) for w in words])
    metrics = json.loads(told.read_text())["metrics"]
    assert metrics["kept"] == 1 and metrics["nearest"]["n"] == 20
    assert 0 < metrics["nearest"]["samples_to_training"]["median"] < 2
    # two rows of ten samples, each above a row of training images
    pixels = np.asarray(Image.open(png))
    assert pixels.shape == (4 * 8, 10 * 8, 3)
    known = {i.tobytes() for i in ((images.permute(0, 2, 3, 1) + 1) * 127.5).round().byte().numpy()}
    assert {pixels[8:16, k : k + 8].tobytes() for k in range(0, 80, 8)} <= known
    assert pixels[:8, :8].tobytes() not in known
    # the checkpoint still loads: the sha256 is of the weights
    checkpoints.load(path)
