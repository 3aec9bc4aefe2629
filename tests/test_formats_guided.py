"""State dicts of guided-diffusion and improved-diffusion with the flags of their scripts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from budget import assert_within_budget
from test_unet_guided_diffusion import CASES, Oracle, inputs, made

import fastdiff
from fastdiff import checkpoints, schedules
from fastdiff.formats.guided_diffusion import infer
from fastdiff.models import UNet, UNetConfig, _unet_keys

RUN = {"diffusion_steps": 1000, "noise_schedule": "linear"}
# what the weights do not tell, of the flags that made them
UNTOLD = ("image_size", "num_heads", "num_head_channels", "use_new_attention_order", "groups")


def told(case: dict) -> dict:
    return {name: case[name] for name in UNTOLD if name in case}


def published(unet: UNet) -> dict[str, torch.Tensor]:
    """A state dict with the names that those projects have for the weights of a `UNet`."""
    state: dict[str, torch.Tensor] = {}
    places = _unet_keys.guided_places(unet.config)
    for ours, theirs in _unet_keys.sources(unet, _unet_keys.GUIDED, places).items():
        value = unet.state_dict()[ours]
        rows = unet.film_widths if len(theirs) > 1 else [len(value)]
        state |= dict(zip(theirs, value.split(rows), strict=True))
    return state


def stored(name: str, folder) -> tuple[dict, dict, str]:
    _, case, state = made(name)
    path = folder / "model.pt"
    torch.save(state, path)
    return case, state, str(path)


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_the_weights_tell_the_rest(name, tmp_path):
    """The fewest flags give the network that all of them give."""
    case, state, path = stored(name, tmp_path)
    model, schedule, card = fastdiff.load(path, config={**told(case), **RUN})
    whole = UNet.from_guided_diffusion(state, **case)
    assert model.config == whole.config and not model.training
    for key, value in whole.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    assert schedule == schedules.linear() and card["prediction"] == "epsilon"
    assert card["classes"] == [str(i) for i in range(5 if case["class_cond"] else 0)]
    learned = "learned_range" if case["learn_sigma"] else "fixed_large"
    size = case["image_size"]
    assert card["sampling"] == {
        "shape": [3, size, size], "guidance": 1.0, "clip": 1.0, "variance": learned,
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_all_flags_agree_with_what_the_weights_tell(name, tmp_path):
    case, _, path = stored(name, tmp_path)
    fastdiff.load(path, config={**case, **RUN})
    found = infer(made(name)[2])
    for flag in ("num_channels", "num_res_blocks", "learn_sigma", "class_cond", "conv_resample",
                 "use_scale_shift_norm", "resblock_updown"):  # fmt: skip
        # with residual blocks for it, the other flag has no say
        if flag != "conv_resample" or not case["resblock_updown"]:
            assert found[flag] == case[flag], flag


def test_schedules_are_those_of_the_scripts(tmp_path):
    """create_gaussian_diffusion's betas: linear ones scaled to the number of steps, or cosine."""
    case, _, path = stored("adm", tmp_path)
    flags = {**told(case), "diffusion_steps": 250, "rescale_timesteps": False}
    linear = fastdiff.load(path, config={**flags, "noise_schedule": "linear"})[1]
    betas = np.linspace(4 * 0.0001, 4 * 0.02, 250)
    exact = torch.from_numpy(np.cumprod(1 - betas))
    got = torch.from_numpy(linear.alphas_cumprod.copy())
    assert_within_budget(got, exact, exact, ulps=4)  # the ends' quotients
    cosine = fastdiff.load(path, config={**flags, "noise_schedule": "cosine"})[1]
    assert cosine == schedules.cosine(250)


@torch.no_grad()
def test_rescaled_timesteps_and_predict_xstart(tmp_path):
    """Improved-diffusion's 4,000 steps reach the network as times below 1,000."""
    case, state, path = stored("additive", tmp_path)
    flags = {**told(case), "diffusion_steps": 4000, "noise_schedule": "cosine"}
    flags |= {"rescale_timesteps": True, "predict_xstart": True, "sigma_small": True}
    model, schedule, card = fastdiff.load(path, config=flags)
    assert len(schedule.alphas_cumprod) == 4000 and card["prediction"] == "sample"
    x, t = inputs(case)
    table = CASES["additive"][0]
    plain = Oracle(table, case, state)(x, t)
    double = {key: value.double() for key, value in state.items()}
    exact = Oracle(table, case, double)(x.double(), t.double())
    assert_within_budget(model(x, 4 * t), plain, exact, ulps=2)
    # and so it is when saved and loaded again
    again = fastdiff.load(checkpoints.save(tmp_path / "own", model, schedule, card))[0]
    assert again.config == model.config


def test_flags_that_only_say_how_the_scripts_run(tmp_path):
    case, _, path = stored("adm", tmp_path)
    runs = {"timestep_respacing": "250", "use_fp16": True, "use_checkpoint": False}
    card = fastdiff.load(path, config={**told(case), **RUN, **runs})[2]
    assert card["flags"]["timestep_respacing"] == "250"


def test_flags_that_are_needed_are_named(tmp_path):
    _, _, path = stored("adm", tmp_path)
    everything = r"\['image_size', 'diffusion_steps', 'noise_schedule', 'num_heads or num_head_"
    # the keys alone say what it is, so no card is missed
    with pytest.raises(ValueError, match=rf"config must hold the flags {everything}"):
        fastdiff.load(path)
    some = {"image_size": 8, "num_head_channels": 4, "noise_schedule": "linear"}
    with pytest.raises(ValueError, match=r"flags \['rescale_timesteps'\], which the weights"):
        fastdiff.load(path, config={**some, "diffusion_steps": 4000})
    with pytest.raises(ValueError, match=r"the flags \['num_heads or num_head_channels'\]"):
        fastdiff.load(path, config={**RUN, "image_size": 8, "num_head_channels": -1})


def test_flags_that_the_weights_deny_are_listed(tmp_path):
    case, _, path = stored("adm", tmp_path)
    wrong = {
        "num_channels": 16, "num_res_blocks": 2, "learn_sigma": False, "class_cond": False,
        "use_scale_shift_norm": False, "resblock_updown": False, "channel_mult": "1,4",
        "attention_resolutions": "8,4",
    }  # fmt: skip
    with pytest.raises(ValueError, match="config must agree with the weights, which") as caught:
        fastdiff.load(path, config={**told(case), **RUN, **wrong})
    assert sorted(line.strip() for line in str(caught.value).splitlines()[1:]) == [
        "attended [1], got [0, 1]",
        "class_cond True, got False",
        "learn_sigma True, got False",
        "num_channels 8, got 16",
        "num_res_blocks 1, got 2",
        "resblock_updown True, got False",
        "use_scale_shift_norm True, got False",
        "widths [8, 16], got [16, 64]",
    ]


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"small_size": 8}, ValueError, r"config must hold flags among .* got \['small_size'\]"),
        ({"class_cond": "True"}, TypeError, "class_cond must be of type bool, got 'True'"),
        ({"image_size": "8"}, TypeError, "image_size must be of type int, got '8'"),
        ({"image_size": 0}, ValueError, r"image_size must lie in \[1, 65536\], got 0"),
        (
            {"diffusion_steps": 10**12, "rescale_timesteps": True},
            ValueError,
            "diffusion_steps must",
        ),
        ({"image_size": 9}, ValueError, "image_size must be a multiple of 2 for 2 levels, got 9"),
        ({"noise_schedule": "sqrt"}, ValueError, "noise_schedule must be 'linear' or 'cosine'"),
        ({"num_heads_upsample": 2}, ValueError, "num_heads_upsample must be -1 or num_heads"),
    ],
    # one row for each rule
)
def test_flags_out_of_range(change, error, message, tmp_path):
    case, _, path = stored("adm", tmp_path)
    with pytest.raises(error, match=message):
        fastdiff.load(path, config={**told(case), **RUN, **change})


def test_super_resolution_is_refused(tmp_path):
    """Its network takes the small image beside the noisy one: six channels in."""
    case, state, path = stored("adm", tmp_path)
    stem = state["input_blocks.0.0.weight"]
    torch.save({**state, "input_blocks.0.0.weight": torch.cat([stem, stem], dim=1)}, path)
    with pytest.raises(ValueError, match="in_channels 6, got 3"):
        fastdiff.load(path, config={**told(case), **RUN})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("input_blocks.1.0.emb_layers.1.weight"), "got no .*emb_layers"),
        (lambda s: s.update({"output_blocks.4.0.x": torch.ones(1)}), "equal parts of 5 blocks on"),
        (lambda s: s.update({"input_blocks.x.0.y": torch.ones(1)}), "must be those of guided-diff"),
        (
            lambda s: s.update({"time_embed.0.weight": torch.ones(3)}),
            "must be those of guided-diff",
        ),
        (
            lambda s: s.update({"input_blocks.10000000000.0.y": torch.ones(1)}),
            "unexpected input_bl",
        ),
        (lambda s: s.update({"out.2.bias": torch.ones(1).int()}), r"misshapen  out\.2\.bias"),
    ],
    ids=["missing", "blocks", "no number", "shape", "a large number", "type"],
)
def test_weights_that_are_not_of_a_unet(change, message, tmp_path):
    case, state, path = stored("adm", tmp_path)
    change(state)
    torch.save(state, path)
    with pytest.raises(ValueError, match=message):
        fastdiff.load(path, config={**told(case), **RUN})


def test_widths_that_are_no_multiples_come_out_exactly(tmp_path):
    """61 / 14 * 14 is below 61 in floating point, and the flag is a multiple."""
    assert int(61 / 14 * 14) == 60
    config = UNetConfig(
        in_channels=3, image_size=4, channels=(61,), num_classes=0, null_class=False, patch_size=1,
        embed_dim=56, time_dim=14, groups=1, heads=1, upsample="conv",
    )  # fmt: skip
    torch.save(published(UNet(config)), tmp_path / "m.pt")
    flags = {**RUN, "image_size": 4, "num_heads": 1, "groups": 1}
    assert fastdiff.load(tmp_path / "m.pt", config=flags)[0].config.channels == (61,)
