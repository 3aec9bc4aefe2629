"""The tables of docs/diffusers_defects.md; run as a script, it writes them."""

from __future__ import annotations

from pathlib import Path

from diffusers_defects import DEPARTS, FAILS

# scheduler, configuration, what diffusers does, what the drop-in does, with corrected=True, test
MORE = [
    (
        "DDPM, DDIM, CogVideoXDDIM, LCM, TCD",
        "rescale_betas_zero_snr, epsilon, from the last timestep",
        "NaN or infinity; with clip_sample a first step of noise",
        "ValueError with the advice; diffusers' own step where it clips",
        "ValueError",
        "test_nothing_but_noise",
    ),
    (
        "DDIMInverse",
        "prediction_type='sample', set_alpha_to_one",
        "NaN",
        "ValueError with the advice",
        "the same",
        "test_nothing_but_data",
    ),
    (
        "DPMSolverSinglestep, SASolver",
        "thresholding in terms of the noise",
        "RuntimeError: alpha is looked up by None",
        "thresholds with the scales of the step",
        "the same",
        "test_thresholding_of_the_noise_form",
    ),
    (
        "CosineDPMSolverMultistep",
        "final_sigmas_type='sigma_min'",
        "RecursionError or NaN: noise over no time",
        "the last step changes nothing",
        "the same",
        "test_cosine_ends_at_sigma_min",
    ),
    (
        "EDMDPMSolverMultistep",
        "sde-dpmsolver++, order 3, sigma_min, exponential",
        "UnboundLocalError; its last sigma is rounded up",
        "the last step changes nothing",
        "the same",
        "test_edm_sde_ends_at_sigma_min",
    ),
    (
        "UniPCMultistep",
        "order 3, karras, sigma_min, lower_order_final=False",
        "NaN at the last sigma, which comes twice",
        "the corrected state",
        "the same",
        "test_unipc_ends_twice",
    ),
    (
        "KDPM2AncestralDiscrete",
        "squaredcos_cap_v2",
        "NaN timesteps: sigma_down lost in a difference",
        "sigma_next^2/sigma",
        "the same",
        "test_levels_below_an_ancestral_step",
    ),
    (
        "KDPM2Discrete",
        "squaredcos_cap_v2, karras",
        "NaN: begins at the second level",
        "begins at the first",
        "the same",
        "test_dpm_2_begins_at_the_first_level",
    ),
    (
        "all with timestep_spacing='linspace' from 0",
        "one step, with a ramp of sigmas too",
        "begins at the least noisy level",
        "the same",
        "begins at the noisiest",
        "test_one_step_begins_at_the_noisiest",
    ),
    (
        "EDMEuler, EDMDPMSolverMultistep, CosineDPMSolverMultistep",
        "any",
        "init_noise_sigma is sqrt(sigma_max^2 + 1)",
        "the same",
        "sigma_max",
        "test_first_noise_of_edm",
    ),
]

# what stays as it is in diffusers, and why
KEPT = [
    (
        "DPMSolverMultistep, UniPC, DEIS and others",
        "karras, exponential, beta",
        "rounds the timesteps that the network is told",
        "they are handed out before the step",
        "test_rounded_times",
    ),
    (
        "EulerDiscrete, EDMEuler",
        "s_churn > 0",
        "adds the noise after the network was called",
        "so does every caller of its interface",
        "test_churn_comes_after_the_network",
    ),
    (
        "DPMSolverMultistep, UniPC, SASolver, EDM",
        "sigma_min with a ramp of sigmas",
        "evaluates the network once more for a step of length 0",
        "the number of timesteps is the caller's",
        "test_one_evaluation_too_many",
    ),
    (
        "CogVideoXDDIM",
        "clip_sample",
        "never reads it",
        "its checkpoints have it True, and videos are made without",
        "test_cogvideox_never_clips",
    ),
    (
        "PNDM",
        "fewer than 4 steps, skip_prk_steps=False",
        "ValueError from numpy",
        "four timesteps are needed to begin with",
        "test_pndm_needs_four_steps",
    ),
    (
        "DDIM, DDPM, PNDM",
        "1000 steps, steps_offset=1",
        "IndexError",
        "there is no timestep 1000",
        "test_no_timestep_1000",
    ),
    (
        "DPMSolverMultistepInverse",
        "sde-dpmsolver++, sde-dpmsolver",
        "NaN",
        "an SDE has no inverse",
        "test_no_inverse_of_an_sde",
    ),
    (
        "SASolver",
        "corrector_order=0",
        "AssertionError",
        "its orders are 1 to 4",
        "test_sa_solver_has_a_corrector",
    ),
    (
        "DDIMParallel, DDPMParallel",
        "batch_step_no_noise",
        "steps back by T // steps",
        "the method is diffusers' own",
        "test_batch_step_is_theirs",
    ),
]


def _shown(config):
    return ", ".join(k if v is True else f"{k}={v!r}" for k, v in config.items()) or "default"


def _table(heads, rows):
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


def tables() -> str:
    """The tables, in Markdown."""
    always = [
        (
            ", ".join(d.schedulers), _shown({**d.config, **d.options}), d.steps, d.theirs,
            d.reason, f"`test_mended[{key}]`",
        )
        for key, d in FAILS.items()
    ]  # fmt: skip
    chosen = [
        (
            ", ".join(d.schedulers), _shown(d.config), d.steps, d.theirs, d.reason,
            f"`test_corrected[{key}]`",
        )
        for key, d in DEPARTS.items()
    ]  # fmt: skip
    who = ("scheduler", "configuration")
    parts = [
        "## Mended always",
        _table((*who, "steps", "diffusers", "drop-in", "test"), always),
        "## Mended by `corrected=True`",
        _table((*who, "steps", "diffusers, and the default", "corrected", "test"), chosen),
        "## Further",
        _table(
            (*who, "diffusers", "drop-in", "corrected", "test"),
            [(*row[:-1], f"`{row[-1]}`") for row in MORE],
        ),
        "## Not mended",
        _table(
            (*who, "diffusers", "why it stays", "test"),
            [(*row[:-1], f"`{row[-1]}`") for row in KEPT],
        ),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    page = Path(__file__).parent.parent / "docs/diffusers_defects.md"
    page.write_text(page.read_text().split("## Mended always")[0] + tables())
