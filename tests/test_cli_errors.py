"""Wrong input to every command: one line that says what to do, and exit status 2."""

from __future__ import annotations

import socket

import pytest
import torch

from fastdiff import cli
from fastdiff.serve.http import Server
from fastdiff.training import command
from fastdiff.training.config import TrainConfig


def told(capsys):
    """What a command said that it refused: a single line."""
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1, printed
    return printed.err.rstrip()


# what argparse refuses, in the words of the command that it was given to
USAGE = {
    "no such command": (["nonsense"], "fastdiff", "invalid choice: 'nonsense'"),
    "no number": (["sample", "--steps", "x"], "fastdiff sample", "--steps: invalid int value: 'x'"),
    "no such choice": (["sample", "--backend", "x"], "fastdiff sample", "invalid choice: 'x'"),
    "nothing to score": (["eval"], "fastdiff eval", "required: checkpoint"),
    "no such demo": (["demo", "nosuch"], "fastdiff demo", "invalid choice: 'nosuch'"),
    "no such option": (["doctor", "--x"], "fastdiff", "unrecognized arguments: --x"),
    "no folder": (["train"], "fastdiff train", "required: --out"),
    "no such model": (["train", "--model", "x"], "fastdiff train", "invalid choice: 'x'"),
    "no port": (["serve", "--port", "x"], "fastdiff serve", "--port: invalid int value: 'x'"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage(case, capsys):
    words, name, message = USAGE[case]
    with pytest.raises(SystemExit) as stopped:
        cli.main(words)
    assert stopped.value.code == 2
    line = told(capsys)
    assert line.startswith(f"{name}: error: ") and line.endswith(f"; see {name} --help")
    assert message in line


# a name that torch has not, a GPU more than there are, and a device without memory
DEVICES = ("nosuch", f"cuda:{torch.cuda.device_count()}", "meta")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("words", [["sample"], ["eval", "fashion"], ["train", "--out"], ["serve"]])
def test_devices_that_are_not_there(words, device, capsys, tmp_path):
    words = [*words, str(tmp_path / "run")] if words[-1] == "--out" else words
    assert cli.main([*words, "--device", device]) == 2
    assert f"{words[0]}: device must be auto, cpu or a device that torch has" in told(capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["sample", "train"])
def test_a_folder_that_is_a_file(command, tiny, capsys, tmp_path):
    file = tmp_path / "file"
    file.write_text("x")
    words = {"sample": ["--model", str(tiny), "--outdir"], "train": ["--out"]}[command]
    assert cli.main([command, *words, str(file)]) == 2
    name = words[-1].removeprefix("--")
    assert f"{command}: {name} must be a folder, or one that can be made, got" in told(capsys)
    assert file.read_text() == "x"


def test_an_address_that_is_not_free(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == 2
    line = told(capsys)
    assert f"free, got 127.0.0.1 {port} (" in line and line.startswith("fastdiff: error: serve: ")
    assert cli.main(["serve", "--host", "192.0.2.1", "--port", "0"]) == 2  # of nobody: RFC 5737
    assert "free, got 192.0.2.1 0 (" in told(capsys)


@pytest.mark.parametrize("grace", [-1.0, float("nan")])
def test_a_server_without_grace(grace):
    with pytest.raises(ValueError, match="Server: grace must be at least 0, got"):
        Server(None, grace=grace)


def test_the_help_of_train_says_what_each_option_is(capsys):
    """From the docstring of the config, which must therefore describe every field."""
    with pytest.raises(SystemExit):
        command.parse(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "optimizer steps (default: 15000)" in shown
    assert "of the transformer (latent) (default: 192)" in shown
    assert set(command._described()) == set(TrainConfig.__dataclass_fields__)
    assert all(command._described().values())
