"""kill -9, signals and a full disk: in training, sampling to a folder, writing checkpoints."""

from __future__ import annotations

import gzip
import resource
import signal
import struct
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import finish, hashes, start, wait_until
from PIL import Image

from fastdiff import checkpoints, cli, data, schedules
from fastdiff._cli_files import MANIFEST
from fastdiff._files import written_whole
from fastdiff.models.unet import UNet, UNetConfig

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")

# The command line, but that each PNG takes long to write: most of a run is in the middle of a file.
SLOW_FILES = """
import io, sys, time
from PIL import Image
from fastdiff import cli
save = Image.Image.save
def slowly(image, path, **kw):
    memory = io.BytesIO()
    save(image, memory, **kw)
    raw = memory.getvalue()
    with open(path, "wb") as file:
        file.write(raw[:20])
        file.flush()
        time.sleep(0.02)
        file.write(raw[20:])
Image.Image.save = slowly
raise SystemExit(cli.main(sys.argv[1:]))
"""

# The command line, but that the picture of samples after training is made of zeros; with a number
# first, the process kills itself in the middle of that checkpoint.
TRAIN = """
import io, os, signal, sys, torch
from fastdiff import cli, sampler
sampler.Sampler.__call__ = lambda self, shape, **kw: torch.zeros(len(kw["cond"]["label"]), *shape)
save, left = torch.save, int(sys.argv[1])
def cut(state, path):
    global left
    left -= 1
    if left == 0:
        memory = io.BytesIO()
        save(state, memory)
        with open(path, "wb") as file:
            file.write(memory.getvalue()[:len(memory.getvalue()) // 2])
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    save(state, path)
torch.save = cut
raise SystemExit(cli.main(["train", *sys.argv[2:]]))
"""


def _size(picture: Path) -> tuple[int, int]:
    with Image.open(picture) as image:
        image.load()  # which refuses a file that is cut
        return image.size


def _sample(model: Path, folder: Path) -> list[object]:
    # one seed a batch: a convolution of another batch size may round another way
    return [
        "sample", "--model", model, "--outdir", folder, "--seeds", "0-19", "--batch", 1,
        "--steps", 2, "--solver", "ddpm", "--dtype", "float32", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A model, and the hashes of its samples where nothing went wrong."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    config = UNetConfig(image_size=16, channels=(8, 8), num_classes=3, embed_dim=16, head_dim=8)
    card = {
        "prediction": "v_prediction", "classes": ["Coat", "Bag", "Boot"],
        "sampling": {"guidance": 1.5, "shape": [1, 16, 16]},
    }  # fmt: skip
    model = checkpoints.save(folder / "model", UNet(config), schedules.cosine(), card)
    assert "20 images" in finish(start(SLOW_FILES, *_sample(model, folder / "out")))
    return model, hashes(folder / "out")


# each signal, the exit code that it gives, and whether a hidden part may be left
SIGNALS = {
    "kill": (signal.SIGKILL, -signal.SIGKILL, 1),
    "ctrl-c": (signal.SIGINT, 130, 0),
    "terminate": (signal.SIGTERM, -signal.SIGTERM, 1),
}


@pytest.mark.parametrize(("sent", "code", "parts"), SIGNALS.values(), ids=SIGNALS)
def test_stopped_sampling_leaves_whole_pictures_and_resumes(
    whole: tuple[Path, dict[str, str]], tmp_path: Path, sent: int, code: int, parts: int
) -> None:
    model, expected = whole
    process = start(SLOW_FILES, *_sample(model, tmp_path))
    wait_until(lambda: len(list(tmp_path.glob("*.png"))) >= 3, process)
    process.send_signal(sent)
    said = finish(process, code)
    left = hashes(tmp_path)
    pictures = {name: digest for name, digest in left.items() if name.endswith(".png")}
    assert 3 <= len(pictures) < 20 and pictures.items() <= expected.items()
    hidden = [name for name in left if name not in {*pictures, MANIFEST}]
    assert len(hidden) <= parts and all(name.startswith(".") for name in hidden)
    if sent == signal.SIGINT:
        assert said == "fastdiff: interrupted; what was written is whole\n"
    assert "kept" in finish(start(SLOW_FILES, *_sample(model, tmp_path), "--resume"))
    assert {k: v for k, v in hashes(tmp_path).items() if k not in hidden} == expected


def _write_idx(path: Path, array: np.ndarray) -> None:
    header = b"\x00\x00\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twenty images of ten classes."""
    folder = tmp_path_factory.mktemp("idx")
    shades = np.arange(20)[:, None, None] * 12 + np.arange(28)[:, None] + np.arange(28)
    for split in ("train", "t10k"):
        _write_idx(folder / f"{split}-images-idx3-ubyte.gz", shades % 256)
        _write_idx(folder / f"{split}-labels-idx1-ubyte.gz", np.arange(20) % 10)
    return folder


def _train(images: Path, out: Path) -> list[object]:
    return [
        "--data", images, "--out", out, "--name", "tiny", "--steps", 12, "--batch", 8,
        "--warmup", 2, "--channels", 32, "--patch-size", 4, "--save-every", 1,
        "--sample-every", 1000, "--dtype", "float32", "--seed", 5,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The weights of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("trained")
    finish(start(TRAIN, 0, *_train(images, out)))
    return (out / "tiny.safetensors").read_bytes()


def _step(out: Path) -> int:
    return int(torch.load(out / "last.pt", weights_only=True)["step"])


def _reached(out: Path, step: int) -> bool:
    return (out / "last.pt").exists() and _step(out) >= step


@pytest.mark.parametrize(
    ("sent", "code", "steps"),
    [(signal.SIGKILL, -signal.SIGKILL, (2, 5)), (signal.SIGINT, 130, (3,))],
    ids=["kill", "ctrl-c"],
)
def test_stopped_training_resumes_to_the_same_weights(
    images: Path, trained: bytes, tmp_path: Path, sent: int, code: int, steps: tuple[int, ...]
) -> None:
    """Stopped wherever the process then is: in a step, between two, or in a checkpoint."""
    resume: list[str] = []
    for step in steps:
        process = start(TRAIN, 0, *_train(images, tmp_path), *resume)
        wait_until(partial(_reached, tmp_path, step), process)
        process.send_signal(sent)
        finish(process, code)
        assert step <= _step(tmp_path) < 12
        resume = ["--resume"]
    if sent == signal.SIGINT:
        assert list(hashes(tmp_path)) == ["last.pt"]
    finish(start(TRAIN, 0, *_train(images, tmp_path), "--resume"))
    assert (tmp_path / "tiny.safetensors").read_bytes() == trained


def test_killed_in_the_middle_of_a_checkpoint(images: Path, trained: bytes, tmp_path: Path) -> None:
    """The fourth is cut at half its bytes: the third stays, and the run goes on from there."""
    finish(start(TRAIN, 4, *_train(images, tmp_path)), -signal.SIGKILL)
    assert _step(tmp_path) == 3
    finish(start(TRAIN, 0, *_train(images, tmp_path), "--resume"))
    assert (tmp_path / "tiny.safetensors").read_bytes() == trained


SAVE = """
import os, signal, sys, torch
from fastdiff import checkpoints, schedules
from fastdiff.models.unet import UNet, UNetConfig
replace, left = os.replace, int(sys.argv[1])
def kill(a, b):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(a, b)
os.replace = kill
torch.manual_seed(int(sys.argv[2]))
model = UNet(UNetConfig(image_size=16, channels=(8, 8), embed_dim=16, head_dim=8))
checkpoints.save(sys.argv[3], model, schedules.cosine(), {"prediction": "epsilon"})
"""


def test_killed_between_the_weights_and_their_card(tmp_path: Path) -> None:
    """Before either has its name the old pair is there; between the two, loading says so."""
    path = tmp_path / "model.safetensors"
    finish(start(SAVE, 0, 1, path))
    before = hashes(tmp_path)
    finish(start(SAVE, 1, 2, path), -signal.SIGKILL)
    assert before.items() <= hashes(tmp_path).items()
    checkpoints.load(path)
    finish(start(SAVE, 2, 2, path), -signal.SIGKILL)
    with pytest.raises(ValueError, match="weights must have the card's sha256"):
        checkpoints.load(path)
    finish(start(SAVE, 0, 2, path))
    checkpoints.load(path)


@contextmanager
def full_disk(size: int = 4096) -> Iterator[None]:
    """No file grows beyond this size, in this process: a write fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _model() -> UNet:
    return UNet(UNetConfig(image_size=16, channels=(8, 8), embed_dim=16, head_dim=8))


def _noise_picture(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


# everything that the library writes for a user, to the path given
WRITERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "image": ("a.png", lambda p: data.save_image(_noise_picture(3, 64, 64), p)),
    "grid": ("a.png", lambda p: data.save_grid(_noise_picture(4, 1, 64, 64), p, 2)),
    "weights": (
        "a.safetensors",
        lambda p: checkpoints.save(p, _model(), schedules.cosine(), {"prediction": "epsilon"}),
    ),
    "any file": ("a.bin", lambda p: _bytes(p)),
}


def _bytes(path: Path) -> None:
    with written_whole(path) as part:
        part.write_bytes(bytes(8192))


@pytest.mark.parametrize(("name", "write"), WRITERS.values(), ids=WRITERS)
def test_a_full_disk_leaves_the_old_file(
    tmp_path: Path, name: str, write: Callable[[Path], Any]
) -> None:
    with full_disk(), pytest.raises(OSError, match="too large"):
        write(tmp_path / name)
    assert hashes(tmp_path) == {}  # no new file, no part
    (tmp_path / name).write_bytes(b"old")
    with full_disk(), pytest.raises(OSError, match="too large"):
        write(tmp_path / name)
    assert list(hashes(tmp_path)) == [name] and (tmp_path / name).read_bytes() == b"old"
    write(tmp_path / name)
    assert (tmp_path / name).stat().st_size > 4096


def test_a_full_disk_in_the_command_line(
    whole: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error of one line and exit status 2; files of seeds that fitted stay, and resume works."""
    model, expected = whole
    words = [str(w) for w in _sample(model, tmp_path)]
    with full_disk(64):
        assert cli.main(words) == 2
    assert "fastdiff: error: [Errno 27] File too large" in capsys.readouterr().err
    assert hashes(tmp_path) == {}
    assert cli.main([*words, "--resume"]) == 0
    assert hashes(tmp_path).keys() == expected.keys()


def test_a_full_disk_beside_the_grid(
    whole: tuple[Path, dict[str, str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without room for the picture both old files stay; with it, the old arrays do."""
    grid, arrays = tmp_path / "x.png", tmp_path / "x.npz"
    words = ["sample", "--model", whole[0], "--steps", 1, "--out", grid, "--save", arrays]
    for path in (grid, arrays):
        path.write_bytes(b"old")
    with full_disk(64):
        assert cli.main([str(w) for w in words]) == 2
    assert grid.read_bytes() == arrays.read_bytes() == b"old"
    with full_disk(2048):
        assert cli.main([str(w) for w in words]) == 2
    assert _size(grid) == (128, 48) and arrays.read_bytes() == b"old"
    assert len(hashes(tmp_path)) == 2
    assert capsys.readouterr().err.count("fastdiff: error: [Errno 27] File too large") == 2


def test_a_full_disk_while_training(images: Path, trained: bytes, tmp_path: Path) -> None:
    """The checkpoint before stays; the run says what happened, and goes on when there is room."""
    finish(start(TRAIN, 4, *_train(images, tmp_path)), -signal.SIGKILL)
    before = (tmp_path / "last.pt").read_bytes()
    for hidden in tmp_path.glob(".*"):
        hidden.unlink()
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, -1))\n{TRAIN}"
    said = finish(start(limited, 0, *_train(images, tmp_path), "--resume"), 2)
    assert "fastdiff: error: " in said and "Traceback" not in said
    assert list(hashes(tmp_path)) == ["last.pt"]
    assert (tmp_path / "last.pt").read_bytes() == before
    finish(start(TRAIN, 0, *_train(images, tmp_path), "--resume"))
    assert (tmp_path / "tiny.safetensors").read_bytes() == trained


def test_output_to_a_full_device() -> None:
    """/dev/full takes no byte: an error of one line, not a traceback."""
    code = "import sys; from fastdiff import cli; sys.stdout = open('/dev/full', 'w')\n"
    said = finish(start(f"{code}raise SystemExit(cli.main(['solvers']))"), 2)
    assert said == "fastdiff: error: [Errno 28] No space left on device\n"


def test_pictures_are_whole(whole: tuple[Path, dict[str, str]]) -> None:
    """What the hashes above stand for."""
    folder = whole[0].parent / "out"
    assert {_size(folder / name) for name in whole[1] if name != MANIFEST} == {(16, 16)}
