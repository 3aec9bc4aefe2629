"""``torchrun -m fastdiff sample --outdir``: the same files whatever the number of processes, and
after a process was killed."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from processes import by_torchrun, by_variables, environment, started

from fastdiff import cli

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo and SIGKILL")

SEEDS = 11  # in units of 3: four units, the last one short


def words(model: Path, folder: Path, *more: str) -> list[str]:
    return [
        "sample", "--model", str(model), "--dtype", "float32", "--device", "cpu",
        "--solver", "ddpm", "--steps", "3", "--seeds", f"0-{SEEDS - 1}", "--batch", "3",
        "--outdir", str(folder), *more,
    ]  # fmt: skip


def hashes(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*.png"))
    }


@pytest.fixture
def whole(tiny: Path, tmp_path: Path) -> dict[str, str]:
    """What one process writes without torchrun."""
    subprocess.run(
        [sys.executable, "-m", "fastdiff", *words(tiny, tmp_path / "whole")],
        env=environment(), check=True, capture_output=True, timeout=300,
    )  # fmt: skip
    found = hashes(tmp_path / "whole")
    assert len(found) == len(set(found.values())) == SEEDS
    return found


def test_any_number_of_processes(tiny: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    manifests = []
    for count, launch in ((1, by_variables), (2, by_torchrun), (3, by_variables)):
        folder = tmp_path / str(count)
        codes, out, err = launch(count, words(tiny, folder))
        assert set(codes) == {0}, err
        assert hashes(folder) == whole
        assert sorted(p.name for p in folder.iterdir()) == [*sorted(whole), "manifest.json"]
        # one process speaks, of what all did
        assert out.count(f"{SEEDS} images, ddpm with 3 steps") == 1
        manifests.append(json.loads((folder / "manifest.json").read_text()))
    assert manifests[0] == manifests[1] == manifests[2]


# runs the command in a process that is killed while it writes one of the pictures
KILLED = """
import os, signal, sys
from fastdiff import cli
replace = os.replace
def dying(part, path):
    if str(path).endswith("000004.png"):
        os.kill(os.getpid(), signal.SIGKILL)
    replace(part, path)
os.replace = dying
sys.exit(cli.main(sys.argv[1:]))
"""


def test_killed_and_resumed(tiny: Path, tmp_path: Path, whole: dict[str, str]) -> None:
    folder = tmp_path / "out"
    processes = started(2, ["-c", KILLED, *words(tiny, folder)], subprocess.DEVNULL)
    try:
        codes = [process.wait(timeout=200) for process in processes]
    finally:
        for process in processes:
            process.kill()
    # the other one notices, and does not wait for ever
    assert -signal.SIGKILL in codes and 0 not in codes
    some = hashes(folder)
    assert 0 < len(some) < SEEDS and some.items() < whole.items()
    assert len(list(folder.glob(".000004.png.*.part"))) == 1  # what the killed one was writing
    times = {path: (folder / path).stat().st_mtime_ns for path in some}
    codes, out, err = by_variables(3, words(tiny, folder, "--resume"))
    assert codes == [0, 0, 0], err
    assert hashes(folder) == whole
    assert f"{len(some)} kept" in out and f"{SEEDS - len(some)} images" in out
    for path, before in times.items():  # nothing twice
        assert (folder / path).stat().st_mtime_ns == before
    assert not list(folder.glob(".*"))


def test_a_failure_is_told_once(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    assert cli.main(words(tiny, folder)) == 0
    codes, out, err = by_variables(2, words(tiny, folder, "--resume", "--guidance", "7.5"))
    assert codes == [2, 2]
    assert err.strip().startswith("fastdiff: error: sample: guidance must be 1.5 to resume")
    assert err.count("error") == 1 and not out


CHANGES: dict[str, list[str]] = {
    "steps must be 3 to resume": ["--steps", "4"],
    "solver must be 'ddpm' to resume": ["--solver", "ddim"],
    "batch must be 3 to resume": ["--batch", "4"],
    "seeds must be '0-10' to resume": ["--seeds", "0-11"],
    "options must be [] to resume": ["--option", "variance=fixed_large"],
    "labels must be [0, 1, 2] to resume": ["--label", "Bag"],
    "dtype must be 'float32' to resume": ["--dtype", "bfloat16"],
}


def test_settings_are_kept(tiny: Path, tmp_path: Path, capsys: Any) -> None:
    folder = tmp_path / "out"
    assert cli.main(words(tiny, folder)) == 0
    before = hashes(folder)
    for message, more in CHANGES.items():
        assert cli.main(words(tiny, folder, "--resume", *more)) == 2
        assert message in capsys.readouterr().err
    for path in (tiny, tiny.with_suffix(".json")):  # the same name, other weights
        path.with_name("other" + path.suffix).write_bytes(path.read_bytes())
    manifest = folder / "manifest.json"
    described = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**described, "weights_sha256": "0" * 64}))
    assert cli.main(words(tiny, folder, "--resume")) == 2
    assert "weights_sha256 must be '000" in capsys.readouterr().err
    for text in ("[1]", "{", "7"):
        manifest.write_text(text)
        assert cli.main(words(tiny, folder, "--resume")) == 2
        assert "resume must find a manifest.json as sample wrote it" in capsys.readouterr().err
    manifest.unlink()
    assert cli.main(words(tiny, folder, "--resume")) == 2
    assert "resume must find the manifest.json of the run" in capsys.readouterr().err
    assert hashes(folder) == before
    # a new folder, to begin with
    assert cli.main(words(tiny, tmp_path / "new", "--resume")) == 0
    assert hashes(tmp_path / "new") == before


def test_a_new_run_leaves_nothing_of_the_old_one(tiny: Path, tmp_path: Path) -> None:
    """Killed and resumed, it would keep files of other settings."""
    folder = tmp_path / "out"
    assert cli.main(words(tiny, folder)) == 0
    before = hashes(folder)
    assert cli.main(words(tiny, folder, "--steps", "2")) == 0
    after = hashes(folder)
    assert after.keys() == before.keys() and not set(after.values()) & set(before.values())
    assert json.loads((folder / "manifest.json").read_text())["steps"] == 2


def test_one_picture_is_for_one_process(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    for name, value in {
        "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    assert cli.main(["sample"]) == 2
    assert "outdir must be given for 2 processes, got none" in capsys.readouterr().err
