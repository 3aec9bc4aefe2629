"""The results in the repository are what the commands beside them make."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from benchmarks import measure
from benchmarks.quality import same_table
from fastdiff import checkpoints, solvers

ROOT = Path(__file__).resolve().parents[1]
RESULTS = {
    path.stem: [r for r in json.loads(path.read_text()) if isinstance(r, dict)]
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))
}
# rows of several functions timed in turn, as `measure.row` makes them
TIMED = {k: rows for k, rows in RESULTS.items() if rows and all("ratios" in r for r in rows)}


def options(command: str) -> tuple[str, dict[str, list[str]]]:
    """The module that a command runs, and its arguments by name."""
    words = shlex.split(command)
    module, given = words[words.index("-m") + 1], words[words.index("-m") + 2 :]
    found: dict[str, list[str]] = {}
    for word in given:
        if word.startswith("--"):
            found[word] = []
        else:
            found[list(found)[-1]].append(word)
    return module, found


def test_there_are_results() -> None:
    assert {"film_conv2d", "film_norm", "modulate", "reverse_step", "unet"} <= set(TIMED)


def test_the_page_of_results_lists_every_file() -> None:
    folder = ROOT / "benchmarks" / "results"
    page = (folder / "README.md").read_text(encoding="utf-8")
    rows = "".join(line.split("|")[1] for line in page.splitlines() if line.startswith("| `"))
    listed = set(re.findall(r"`([\w-]+\.\w+)`", rows))
    # "`name.json`, `.png`" stands for both
    listed |= {f"{name}.png" for name in re.findall(r"`([\w-]+)\.json`, `\.png`", rows)}
    assert listed == {path.name for path in folder.iterdir()} - {"README.md"}


def test_figures_in_the_text_are_those_of_the_files() -> None:
    """What the README and the page of training say outside of generated tables."""
    pages = (ROOT / "README.md", ROOT / "docs" / "training.md")
    readme, training = (" ".join(page.read_text(encoding="utf-8").split()) for page in pages)

    def told(value: dict[str, Any]) -> str:
        return f"{value['bits_per_dim']:.2f} ± {value['bits_per_dim_standard_error']:.2f}"

    (scored,) = RESULTS["eval_fashion"]
    assert f"needs {told(scored['vlb'])} bits/dim by its variational bound" in readme
    assert f"{told(scored['ode']['decoder'])} by its ODE" in readme
    assert f"the bound lies {told(scored['vlb_minus_ode'])} above" in readme
    (vae,) = RESULTS["eval_vae-mlp"]
    elbo, iwae = (-vae[f"negative_{name}"]["nats"] for name in ("elbo", "iwae"))
    assert f"test ELBO of {elbo:.1f} nats" in readme
    assert f"an ELBO of {elbo:.2f} nats on the 10,000 test images" in training
    assert f"bound of {vae['negative_iwae']['samples']} draws of {iwae:.2f}" in training
    ten, twenty = sorted(RESULTS["quality_latent"], key=lambda r: r["steps"])
    for page in (readme, training):
        assert f"{100 * twenty['accuracy']:.1f} %" in page
        assert f"{100 * twenty['classifier_accuracy']:.1f} % of the real" in page
    assert f"{100 * ten['accuracy']:.1f} % at 10" in training
    (latent,) = RESULTS["eval_latent"]
    near = latent["reconstruction"]
    assert f"a PSNR of {near['psnr']:.1f} dB, a root mean square error of {near['rmse']:.2f}" in (
        training
    )
    card = json.loads((ROOT / "fastdiff" / "assets" / "emoji.json").read_text())
    assert f"trained in {card['training']['minutes']:.0f} minutes" in readme


@pytest.mark.parametrize("name", TIMED)
def test_rows_can_be_shown(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for row in TIMED[name]:
        measure.show(row, "a fact")
        line = capsys.readouterr().out
        assert line.count("\n") == 1 and row["case"] in line and "; a fact" in line
        for peer, ratio in row["ratios"].items():
            told = f"; {peer} takes {ratio['quiet']:.2f} times as long in the fastest round"
            assert (told in line) is (peer != "copy")


@pytest.mark.parametrize("name", TIMED)
def test_rows_are_those_of_their_command(name: str) -> None:
    rows: list[dict[str, Any]] = TIMED[name]
    (command,) = {r["command"] for r in rows}
    module, given = options(command)
    assert module == f"benchmarks.bench_{name}"
    assert (ROOT / f"{module.replace('.', '/')}.py").is_file()
    assert given.get("--out", [f"benchmarks/results/{name}.json"])[0].endswith(f"{name}.json")
    rounds = {t["rounds"] for r in rows for t in r["seconds"].values()}
    assert len(rounds) == 1
    if "--repeats" in given:
        assert rounds == set(map(int, given["--repeats"]))
    if "--threads" in given:
        assert {r["threads"] for r in rows} == set(map(int, given["--threads"]))
    assert all(r["machine"]["threads"] == r["threads"] for r in rows)
    if "--no-compile" in given:
        assert not any("compiled" in who for r in rows for who in r["seconds"])
    # a run that writes its rows as it goes changes the checkout itself
    assert len({r["machine"]["commit"].removesuffix("+changes") for r in rows}) == 1


def test_memory_of_many_samples_is_that_of_the_result_alone() -> None:
    (peak,) = {tuple(r["peak_bytes"].items()) for r in TIMED["reparameterize"]
               if "peak_bytes" in r and r["threads"] == 2}  # fmt: skip
    found = dict(peak)
    result = 50 * 4 * 16 * 4 * 64 * 64
    assert result <= found["fastdiff"] < 1.1 * result
    assert found["eager"] > 2.5 * found["fastdiff"]  # its noise and their product stand beside it


def test_rows_that_share_a_run_share_their_table() -> None:
    _, schedule, card = checkpoints.load("fashion")
    shared = [r for r in RESULTS["quality"] if "same_table_as" in r]
    pairs = {("euler", "ddim"), ("euler_ancestral", "ddpm")}
    assert {(r["solver"], r["same_table_as"]) for r in shared} <= pairs
    for row in RESULTS["quality"]:  # what the page says of all of them
        for pair in pairs:
            if row["solver"] in pair:
                one, two = (
                    solvers.build(name, schedule, row["steps"], prediction=card["prediction"])
                    for name in pair
                )
                assert same_table(one, two, clip=row["clip"] is not None), (pair, row["steps"])
    for row in shared:
        (run,) = (
            r
            for r in RESULTS["quality"]
            if (r["solver"], r["steps"]) == (row["same_table_as"], row["steps"])
        )
        assert {**run, "solver": row["solver"], "same_table_as": run["solver"]} == row
