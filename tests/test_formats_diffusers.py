"""Folders that diffusers writes, loaded without it: the same outputs, schedules and cards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from budget import assert_within_budget

import fastdiff
from fastdiff import Sampler, checkpoints, schedules, solvers
from fastdiff.models import Autoencoder, DiT, UNet

UNET = {
    "sample_size": 16, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": 4,
    "num_class_embeds": 3,
}  # fmt: skip
DIT = {
    "num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8,
    "num_layers": 2, "sample_size": 8, "num_embeds_ada_norm": 3,
}  # fmt: skip
VAE = {
    "block_out_channels": (8, 16), "norm_num_groups": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip


def unet() -> diffusers.UNet2DModel:
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**UNET).eval()


def dit() -> diffusers.DiTTransformer2DModel:
    torch.manual_seed(0)
    model = diffusers.DiTTransformer2DModel(**DIT).eval()
    first = model.transformer_blocks[0].norm1.emb.state_dict()
    model.transformer_blocks[1].norm1.emb.load_state_dict(first)
    return model


def vae() -> diffusers.AutoencoderKL:
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(**VAE).eval()


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Ours from the module in memory, which the tests of the models hold against diffusers."""
    kinds = {"UNet2DModel": UNet, "DiTTransformer2DModel": DiT, "AutoencoderKL": Autoencoder}
    return kinds[type(model).__name__].from_diffusers(model).state_dict()


def assert_same_weights(got: torch.nn.Module, want: dict[str, torch.Tensor]) -> None:
    have = got.state_dict()
    assert set(have) == set(want)
    assert all(torch.equal(have[name], value) for name, value in want.items())


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# --- models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "kind"), [(unet, UNet), (dit, DiT), (vae, Autoencoder)])
def test_component(make, kind, tmp_path):
    model = make()
    model.save_pretrained(tmp_path / "part")
    ours, schedule, card = fastdiff.load(tmp_path / "part")
    assert isinstance(ours, kind) and not ours.training and schedule is None
    assert_same_weights(ours, weights_of(model))
    assert card["class"] == type(model).__name__ and card["name"] == "part"
    assert card["source"] == str(tmp_path / "part") and "prediction" not in card


# how diffusers lays the weights: the words of save_pretrained, and of load
@pytest.mark.parametrize(
    ("how", "names"),
    [
        ({"safe_serialization": False}, ["diffusion_pytorch_model.bin"]),
        ({"variant": "fp16"}, ["diffusion_pytorch_model.fp16.safetensors"]),
        ({"variant": "ema", "safe_serialization": False}, ["diffusion_pytorch_model.ema.bin"]),
        ({"max_shard_size": "20KB"}, ["diffusion_pytorch_model.safetensors.index.json"]),
        ({"max_shard_size": "20KB", "variant": "fp16"},
         ["diffusion_pytorch_model.safetensors.index.fp16.json"]),
        ({"max_shard_size": "20KB", "safe_serialization": False},
         ["diffusion_pytorch_model.bin.index.json"]),
    ],
    ids=["bin", "variant", "bin variant", "shards", "variant shards", "bin shards"],
)  # fmt: skip
def test_layouts_of_weights(how, names, tmp_path):
    model = vae()
    model.save_pretrained(tmp_path, **how)
    there = {path.name for path in tmp_path.iterdir()}
    assert set(names) <= there and ("max_shard_size" not in how or len(there) > 4)
    assert_same_weights(fastdiff.load(tmp_path)[0], weights_of(model))
    named = how.get("variant")
    assert_same_weights(fastdiff.load(tmp_path, variant=named)[0], weights_of(model))


def test_variants(tmp_path):
    """The plain weights unless another word is given; one of several must be named."""
    plain, other = vae(), vae()
    with torch.no_grad():
        other.quant_conv.bias.add_(1)
    plain.save_pretrained(tmp_path)
    other.save_pretrained(tmp_path, variant="ema")
    assert_same_weights(fastdiff.load(tmp_path)[0], weights_of(plain))
    assert_same_weights(fastdiff.load(tmp_path, variant="ema")[0], weights_of(other))
    with pytest.raises(FileNotFoundError, match=r"or variant be one of \['ema'\], got variant 'b'"):
        fastdiff.load(tmp_path, variant="b")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    other.save_pretrained(tmp_path, variant="fp16")
    with pytest.raises(FileNotFoundError, match=r"variant be one of \['ema', 'fp16'\], got var"):
        fastdiff.load(tmp_path)
    with pytest.raises(ValueError, match=r"variant must be a word such as 'fp16', got '\.\./x'"):
        fastdiff.load(tmp_path, variant="../x")


@pytest.mark.parametrize("make", [unet, vae])
def test_old_names_of_attention(make, tmp_path):
    """Files of diffusers before 0.15 have other names for the layers of attention."""
    model = make()
    model.save_pretrained(tmp_path, safe_serialization=False)
    path = tmp_path / "diffusion_pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    assert any(".proj_attn." in key for key in state)
    torch.save(state, path)
    assert_same_weights(fastdiff.load(tmp_path)[0], weights_of(model))


def test_old_configs(tmp_path):
    """Options that came later are left out; block types and DiT once had other names."""
    model = unet()
    model.save_pretrained(tmp_path / "unet")
    path = tmp_path / "unet" / "config.json"
    config = json.loads(path.read_text())
    for name in ("dropout", "add_attention", "attn_norm_num_groups", "downsample_type"):
        del config[name]
    config["down_block_types"] = ["UNetResDownBlock2D", "UNetResAttnDownBlock2D"]
    path.write_text(json.dumps(config))
    assert_same_weights(fastdiff.load(tmp_path / "unet")[0], weights_of(model))

    other = dit()
    other.save_pretrained(tmp_path / "dit")
    extra = {"cross_attention_dim": None, "only_cross_attention": False, "num_vector_embeds": None}
    edit(tmp_path / "dit" / "config.json", _class_name="Transformer2DModel", **extra)
    assert_same_weights(fastdiff.load(tmp_path / "dit")[0], weights_of(other))
    edit(tmp_path / "dit" / "config.json", norm_type="ada_norm_single")
    with pytest.raises(ValueError, match="got 'Transformer2DModel'"):
        fastdiff.load(tmp_path / "dit")


def test_options_in_place_of_the_config(tmp_path):
    diffusers.UNet2DModel(**{**UNET, "sample_size": None}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="image_size must be an int where sample_size is none"):
        fastdiff.load(tmp_path)
    model, _, card = fastdiff.load(tmp_path, config={"sample_size": 24})
    assert model.config.image_size == 24 and card["sampling"]["shape"] == [3, 24, 24]


def test_dtype(tmp_path):
    vae().half().save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        model = fastdiff.load(tmp_path, dtype=dtype)[0]
        assert {p.dtype for p in model.parameters()} == {dtype}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("UNet2DConditionModel", "its blocks attend to a text, and models.UNet has no such layers"),
        ("FluxTransformer2DModel", "load it with diffusers"),
        (None, "got None"),
    ],
    ids=["text", "another", "none"],
)
def test_classes_without_a_counterpart(kind, reason, tmp_path):
    """Refused before the weights are read, with the advice to keep diffusers' own module."""
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": kind}))
    with pytest.raises(ValueError, match=reason) as caught:
        fastdiff.load(tmp_path)
    assert "fastdiff.accelerate" in str(caught.value)
    assert "['AutoencoderKL', 'DiTTransformer2DModel', 'UNet2DModel']" in str(caught.value)


def test_a_text_unet_of_diffusers_is_refused(tmp_path):
    model = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=1, cross_attention_dim=4,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), attention_head_dim=1,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"got 'UNet2DConditionModel'.*its blocks attend to a text"
    ):
        fastdiff.load(tmp_path)


# --- pipelines ------------------------------------------------------------------------------


@torch.no_grad()
def test_pipeline(tmp_path):
    """A picture of the folder's model and schedule is that of diffusers' pipeline."""
    # no clipping: DDIM of diffusers then steps along the noise of before it
    scheduler = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(**{**UNET, "num_class_embeds": None}).eval()
    pipeline = diffusers.DDIMPipeline(model, scheduler)
    pipeline.save_pretrained(tmp_path)
    ours, schedule, card = fastdiff.load(tmp_path)
    assert_same_weights(ours, weights_of(model))
    assert schedule == schedules.cosine()
    assert card["prediction"] == "epsilon" and card["classes"] == []
    assert card["sampling"] == {"shape": [3, 16, 16], "guidance": 1.0, "clip": None}
    assert card["scheduler"]["_class_name"] == "DDIMScheduler"

    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    scheduler.set_timesteps(5)

    def loop(double: bool) -> torch.Tensor:
        """diffusers' own loop, its network in float32 or float64."""
        x = noise.double() if double else noise
        for t in scheduler.timesteps:
            x = scheduler.step(model(x, t).sample, t, x).prev_sample
        return x

    table = solvers.build("ddim", schedule, 5, spacing="leading", prediction=card["prediction"])
    got = Sampler(ours, table, clip=card["sampling"]["clip"])(noise=noise)
    plain = loop(False)
    model.double()
    # the schedule of diffusers is in float32: 5 steps of a few roundings of alphabar
    assert_within_budget(got, plain, loop(True), ulps=64)


def test_pipeline_with_classes_and_an_autoencoder(tmp_path):
    pipeline = diffusers.DiTPipeline(dit(), vae(), diffusers.DDIMScheduler())
    pipeline.save_pretrained(tmp_path)
    # as the published folders of DiT have them
    edit(tmp_path / "model_index.json", id2label={"0": "cat", "1": "dog", "2": "a, b"})
    model, schedule, card = fastdiff.load(tmp_path)
    assert_same_weights(model, weights_of(pipeline.transformer))
    assert isinstance(model, DiT) and schedule == schedules.linear()
    assert card["classes"] == ["cat", "dog", "a, b"]
    decoder, none, _ = fastdiff.load(tmp_path / "vae")
    assert_same_weights(decoder, weights_of(pipeline.vae))
    assert none is None and decoder.config.latent_scale == pipeline.vae.config.scaling_factor


def test_pipeline_whose_model_lies_beside_its_index(tmp_path):
    """As the first releases of diffusers wrote them: all configs in one folder."""
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path / "new")
    old = tmp_path / "old"
    old.mkdir()
    for name in ("unet", "scheduler"):
        for path in (tmp_path / "new" / name).iterdir():
            shutil.copy(path, old)
    shutil.copy(tmp_path / "new" / "model_index.json", old)
    model, schedule, card = fastdiff.load(old)
    assert_same_weights(model, weights_of(unet()))
    assert schedule == schedules.linear() and card["classes"] == ["0", "1", "2"]


@pytest.mark.parametrize("entry", [None, [None, None], []], ids=["none", "left out", "empty"])
def test_pipeline_without_a_model(entry, tmp_path):
    index = {"vae": ["diffusers", "AutoencoderKL"], "unet": entry}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must name one of \['unet', 'transformer'\], got \[\]"):
        fastdiff.load(tmp_path)


def test_diffusers_is_not_needed(tmp_path):
    diffusers.DDPMPipeline(unet(), diffusers.DDPMScheduler()).save_pretrained(tmp_path)
    code = f"""
import sys
for name in ("diffusers", "huggingface_hub", "transformers"):
    sys.modules[name] = None  # importing it fails
import fastdiff
model, schedule, card = fastdiff.load({str(tmp_path)!r})
print(type(model).__name__, schedule.name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "UNet linear\n", done.stderr


def test_saved_again(tmp_path):
    """What came from diffusers goes into the library's own format and back."""
    pipeline = diffusers.DiTPipeline(
        dit(), vae(), diffusers.DDIMScheduler(trained_betas=np.linspace(0.01, 0.2, 1000).tolist())
    )
    pipeline.save_pretrained(tmp_path / "theirs")
    for part, name in ((tmp_path / "theirs", "model"), (tmp_path / "theirs" / "vae", "vae")):
        model, schedule, card = fastdiff.load(part)
        path = checkpoints.save(tmp_path / name, model, schedule, card)
        again, same, kept = fastdiff.load(path)
        assert same == schedule and type(again) is type(model) and again.config == model.config
        assert {k: kept[k] for k in card} == card
        rounded = {k: v.half().float() for k, v in model.state_dict().items()}
        assert_same_weights(again, rounded)
    with pytest.raises(ValueError, match="schedule must be a Schedule for a model of class DiT"):
        checkpoints.save(tmp_path / "x", fastdiff.load(tmp_path / "theirs")[0], None, {})
    with pytest.raises(ValueError, match="schedule must be None for a model of class Autoencoder"):
        checkpoints.save(tmp_path / "x", model, schedules.cosine(), {})


@torch.no_grad()
def test_a_model_of_a_flow_sees_the_time_that_diffusers_gives_it(tmp_path):
    model, scheduler = unet(), diffusers.FlowMatchEulerDiscreteScheduler()
    diffusers.DDPMPipeline(model, scheduler).save_pretrained(tmp_path)
    ours = fastdiff.load(tmp_path)[0]
    x, label = fastdiff.randn([0, 1], (3, 16, 16)), torch.tensor([1, 2])
    # sigma 0.25 is time 250 of 1000
    want = UNet.from_diffusers(model)(x, torch.full((2,), 250.0), label)
    exact = UNet.from_diffusers(model).double()(x.double(), torch.full((2,), 250.0), label)
    assert_within_budget(ours(x, torch.full((2,), 0.25), label), want, exact, ulps=2)
