"""The page on checkpoints: its blocks run in turn, on small files of the kinds that it names."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import torch
from test_formats_diffusers import dit, vae
from test_formats_guided import published

from fastdiff.formats.diffusers import KINDS
from fastdiff.models import UNet, UNetConfig

PAGE = Path(__file__).resolve().parent.parent / "docs" / "checkpoints.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_blocks_run_in_turn(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    diffusers.DiTPipeline(dit(), vae(), diffusers.DDIMScheduler()).save_pretrained("dit-folder")
    config = UNetConfig(
        in_channels=3, out_channels=6, image_size=16, channels=(32, 64), num_classes=0,
        null_class=False, patch_size=1, embed_dim=128, time_dim=32, groups=32, heads=4, head_dim=1,
        upsample="conv",
    )  # fmt: skip
    torch.save(published(UNet(config)), "model.pt")
    blocks = re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)
    assert len(blocks) == 5
    scope: dict[str, object] = {}
    with torch.no_grad():
        for block in blocks:
            exec(compile(block, PAGE.name, "exec"), scope)
    assert capsys.readouterr().out == "(32, 64) learned_range\n"
    assert scope["same"].config == config
    assert scope["latents"].shape == (2, 4, 8, 8) and scope["z"].shape == (2, 4, 8, 8)
    assert scope["images"].shape == (2, 3, 16, 16) and scope["images"].isfinite().all()
    assert scope["x0"].isfinite().all()


def test_every_class_is_in_the_table():
    assert sorted(re.findall(r"^\| `(\w+)` \| `fastdiff", TEXT, re.MULTILINE)) == sorted(KINDS)
