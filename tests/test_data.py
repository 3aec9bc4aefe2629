"""Training sets: the emoji sheet on a made-up one, how often an image is drawn, and the trainer on
a set of another size and colour."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import checkpoints, data, training
from fastdiff.data import emoji
from fastdiff.training import TrainConfig

# row and column of the sheet: what the cell holds, as RGBA over its two left and two right quarters
CELLS = {
    (0, 0): ((255, 0, 0, 255), (0, 0, 255, 255)),
    (0, 1): ((0, 255, 0, 255), (0, 255, 0, 0)),  # the right half is clear
    (1, 0): ((0, 0, 0, 255), (0, 0, 0, 255)),
    (1, 2): ((10, 20, 30, 255), (40, 50, 60, 255)),
}
TABLE = [
    {"category": "Flags", "sheet_x": 0, "sheet_y": 0},
    {
        "category": "People & Body",
        "sheet_x": 0,
        "sheet_y": 1,
        "skin_variations": {"1F3FB": {"sheet_x": 2, "sheet_y": 1}},
    },
    {"category": "Symbols", "sheet_x": 1, "sheet_y": 0},
]


@pytest.fixture
def folder(tmp_path):
    """The package's files: a sheet of 2 by 3 cells whose borders are magenta, and its table."""
    pixels = np.zeros((2 * 66, 3 * 66, 4), np.uint8)
    pixels[..., [0, 2, 3]] = 255
    for (row, column), (left, right) in CELLS.items():
        cell = pixels[66 * row + 1 : 66 * row + 65, 66 * column + 1 : 66 * column + 65]
        cell[:, :32], cell[:, 32:] = left, right
    sheet = tmp_path / "package" / emoji.SHEET
    sheet.parent.mkdir(parents=True)
    Image.fromarray(pixels).save(sheet)
    (tmp_path / "package" / emoji.TABLE).write_text(json.dumps(TABLE))
    return tmp_path / "package"


def test_emoji_sheet(folder):
    found = data.load("emoji", folder)
    assert found.images.shape == (4, 3, 32, 32) and found.images.dtype == torch.float32
    assert len(found.classes) == 10
    assert [found.classes[i] for i in found.labels] == ["flags", "people", "people", "symbols"]
    colours = [(CELLS[0, 0]), CELLS[1, 0], CELLS[1, 2], ((0, 255, 0), (255, 255, 255))]
    for image, halves in zip(found.images, colours, strict=True):
        for part, colour in zip((image[..., :16], image[..., 16:]), halves, strict=True):
            want = torch.tensor(colour[:3], dtype=torch.float32) / 127.5 - 1
            assert torch.equal(part, want.view(3, 1, 1).expand(3, 32, 16))


def test_emoji_pixels_are_means(folder):
    """Of 64x64 pixels of a gradient, half of them see-through."""
    across, down = np.meshgrid(np.arange(64), np.arange(64))
    alpha = np.where((across + down) % 2, 255, 102)
    pixels = np.stack([across * 4, down * 4, across + down, alpha], axis=-1).astype(np.uint8)
    whole = np.zeros((66, 66, 4), np.uint8)
    whole[1:65, 1:65] = pixels
    Image.fromarray(whole).save(folder / emoji.SHEET)
    (folder / emoji.TABLE).write_text(json.dumps(TABLE[:1]))
    share = alpha[..., None] / 255
    white = pixels[..., :3] * share + 255 * (1 - share)
    for size in (8, 32, 64):
        image = emoji.load(folder, size).images[0].permute(1, 2, 0).numpy()
        step = 64 // size
        want = white.reshape(size, step, size, step, 3).mean((1, 3)) / 127.5 - 1
        # bytes are rounded once when they are laid over white
        assert np.abs(image - want).max() <= 1 / 127.5
        # and the rounding errs to both sides: a mean of 64 pixels has less of it
        assert size > 8 or np.abs(image - want).mean() <= 0.5 / 127.5


@pytest.mark.parametrize(
    ("table", "message"),
    # one row for each rule of the table
    [
        ("[{", "must be as the package has it, got JSONDecodeError"),
        ("[]", "must name an image, got none"),
        ("[7]", "must be as the package has it, got TypeError"),
        ([{"sheet_x": 0, "sheet_y": 0}], "must be as the package has it, got KeyError: 'category'"),
        ([{"category": "Cars"}], "must have categories of .*, got 'Cars'"),
        ([{**TABLE[0], "sheet_x": "0"}], "must be as the package has it, got TypeError: sheet_x"),
        ([{**TABLE[0], "sheet_x": 3}], "must name cells of a sheet .* got column 3, row 0"),
        ([{**TABLE[0], "sheet_y": -1}], "must name cells of a sheet .* got column 0, row -1"),
        ([{**TABLE[0], "skin_variations": [1]}], "must be as the package has it, got Attribute"),
    ],
)
def test_malformed_table(folder, table, message):
    text = table if isinstance(table, str) else json.dumps(table)
    (folder / emoji.TABLE).write_text(text)
    with pytest.raises(ValueError, match=rf"data: .*emoji\.json {message}"):
        emoji.load(folder)


def test_missing_or_malformed_files(folder, tmp_path):
    with pytest.raises(ValueError, match="size must divide 64, got 30"):
        emoji.load(folder, 30)
    (folder / emoji.SHEET).write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    with pytest.raises(ValueError, match=r"64\.png must be a picture"):
        emoji.load(folder)
    (folder / emoji.SHEET).unlink()
    with pytest.raises(FileNotFoundError, match=r"hold img/.*64\.png, .*npm install emoji-data"):
        emoji.load(folder)
    with pytest.raises(FileNotFoundError, match=r"folder must hold emoji\.json, got .*npm install"):
        emoji.load(tmp_path)
    with pytest.raises(ValueError, match=r"dataset must be one of .*'emoji', .*got 'noto'"):
        data.load("noto", folder)
    with pytest.raises(ValueError, match=r"train: dataset must be one of .*got 'noto'"):
        TrainConfig(out="x", dataset="noto")
    with pytest.raises(ValueError, match="train: balance must be >= 0, got -1"):
        TrainConfig(out="x", balance=-1)


def made(**changes):
    facts = {
        "images": torch.zeros(6, 1, 4, 4), "labels": torch.tensor([0, 2, 0, 0, 2, 0]),
        "classes": ("a", "b", "c"), "name": "n", "source": "s", "licence": "l",
    }  # fmt: skip
    return data.Dataset(**{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    # one row for each rule
    [
        ({"images": torch.zeros(6, 1, 4, 4).double()}, "images must be float32"),
        ({"labels": torch.zeros(6)}, "labels int64, got torch.float32 and torch.float32"),
        ({"images": torch.zeros(6, 4, 4)}, r"shape \(N, C, H, W\) .* got \(6, 4, 4\)"),
        ({"images": torch.zeros(0, 1, 4, 4)}, r"with N >= 1, got \(0, 1, 4, 4\)"),
        ({"labels": torch.zeros(5).long()}, r"labels must have shape \(6,\), got \(5,\)"),
        ({"classes": ("a", "b")}, r"labels must lie in \[0, 1\], got 0 to 2"),
    ],
)
def test_dataset_errors(changes, message):
    with pytest.raises((TypeError, ValueError), match=f"data: .*{message}"):
        made(**changes)


# the power of a class's size: the shares of classes of 4, 0 and 2 images
@pytest.mark.parametrize(
    ("balance", "shares"), [(1.0, (4 / 6, 0, 2 / 6)), (0.0, (0.5, 0, 0.5)), (2.0, (0.8, 0, 0.2))]
)
def test_draw_weights(balance, shares):
    weights, labels = made().draw_weights(balance), made().labels
    assert [float(weights[labels == c].sum()) for c in range(3)] == pytest.approx(list(shares))
    assert len({float(w) for w in weights[labels == 0]}) == 1


@pytest.fixture
def config(folder, tmp_path):
    return TrainConfig(
        out=str(tmp_path / "run"), dataset="emoji", data=str(folder), balance=0.5, steps=4,
        batch=4, warmup=1, channels=(32,), patch_size=4, dtype="float32",
    )  # fmt: skip


def test_epochs_draw_by_weight(config):
    run = training.Run(config)
    run.dataset = made(images=torch.zeros(40, 1, 4, 4), labels=torch.tensor([0] * 30 + [2] * 10))
    weights = run.dataset.draw_weights(0.5)
    total, orders = Counter(), []
    for epoch in range(50):
        order = run._order(epoch).tolist()
        counts = Counter(order)
        expected = 40 * weights
        assert all(int(e) <= counts[i] <= int(e) + 1 for i, e in enumerate(expected))
        assert order == run._order(epoch).tolist()
        total += counts
        orders.append(tuple(order))
    assert len(set(orders)) == 50
    # the second class has a share of 10 ** 0.5 / (30 ** 0.5 + 10 ** 0.5) = 0.366, not 0.25, of
    # 40 a epoch; an epoch is off by less than one
    share = sum(total[i] for i in range(30, 40)) / 50
    assert abs(share - 40 * 10**0.5 / (30**0.5 + 10**0.5)) < 1
    run.config = replace(config, balance=1.0)
    assert sorted(run._order(3).tolist()) == list(range(40))


def test_colour_run(config):
    path = training.train(config)
    assert path == Path(config.out) / "emoji.safetensors"
    model, _, card = checkpoints.load(path)
    assert (model.config.in_channels, model.config.num_classes) == (3, 10)
    assert card["name"] == "emoji" and card["classes"] == list(emoji.CATEGORIES.values())
    assert card["sampling"]["shape"] == [3, 32, 32]
    assert card["data"]["name"].startswith("Noto Emoji") and "4 images" in card["data"]["name"]
    assert card["data"]["licence"].startswith("Apache-2.0")
    assert "--dataset emoji" in card["training"]["command"]
    assert "--balance 0.5" in card["training"]["command"]
    assert card["training"]["class_share"].endswith("to the power 0.5")
    pixels = np.asarray(Image.open(Path(config.out) / "emoji.png"))
    # a column a class, eight rows
    assert pixels.shape == (8 * 32, 10 * 32, 3)
    assert (pixels[..., 0] != pixels[..., 2]).any()


def test_images_must_be_square(config, monkeypatch):
    wide = made(images=torch.zeros(6, 1, 4, 8))
    monkeypatch.setattr(data, "load", lambda name, folder, size: wide)
    with pytest.raises(ValueError, match=r"dataset must hold square images, got \(4, 8\)"):
        training.Run(config)
