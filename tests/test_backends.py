"""Choice of a backend: forced ones run or raise, "auto" falls to the next, imports stay light."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from bits import assert_same_bits
from tables import needs_extension

import fastdiff
from fastdiff import BackendError, backends, use_backend
from fastdiff.backends import BACKENDS, Implementation, Op, choose, describe, forced
from fastdiff.ops import _native, randn


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Reasons by backend that a test may set; what was cached of the real machine comes back."""
    reasons: dict[str, str | None] = dict.fromkeys(BACKENDS)
    monkeypatch.setattr(backends, "unavailable", lambda name: reasons[name])
    return reasons


def _op(**refuse: str | None) -> Op:
    """An op whose backends return their own name and refuse with the given reasons."""
    return Op(
        "toy",
        {
            name: Implementation(lambda name=name: lambda args: name, lambda args, r=r: r)
            for name, r in refuse.items()
        },
    )


def test_auto_takes_the_first_that_is_able(machine: dict[str, str | None]) -> None:
    name, function = choose(_op(cuda="too small", cpu=None, reference=None), None)
    assert (name, function(None)) == ("cpu", "cpu")
    machine["cpu"] = "not built"
    assert choose(_op(cpu=None, reference=None), None)[0] == "reference"


def test_auto_raises_with_every_reason(machine: dict[str, str | None]) -> None:
    machine["triton"] = "not installed"
    message = "toy: no backend takes these arguments (triton: not installed; reference: odd shape)"
    with pytest.raises(BackendError, match=re.escape(message)):
        choose(_op(triton=None, reference="odd shape"), None)


def test_a_forced_backend_runs_or_raises(machine: dict[str, str | None]) -> None:
    op = _op(cpu=None, triton="odd shape", cuda=None)
    machine["cuda"] = "no device"
    with use_backend("cpu"):
        assert choose(op, None)[0] == "cpu"
    # refused by the arguments, by the machine, and not there for this op
    for name, message in {
        "triton": "toy: backend triton refused: odd shape",
        "cuda": "toy: backend cuda refused: no device",
        "reference": "toy: has no backend 'reference', only cpu, triton, cuda",
    }.items():
        with use_backend(name), pytest.raises(BackendError, match=re.escape(message)):
            choose(op, None)


def test_describe_tells_the_choice_and_every_reason(machine: dict[str, str | None]) -> None:
    op = _op(triton=None, cpu="odd shape", reference=None)
    machine["triton"] = "not installed"
    expected = {"triton": "not installed", "cpu": "odd shape", "reference": "chosen"}
    assert describe(op, None) == expected
    machine["triton"] = None
    assert describe(op, None) == {"triton": "chosen", "cpu": "odd shape", "reference": "able"}
    with use_backend("reference"):
        assert describe(op, None)["triton"] == "able"
        assert describe(op, None)["reference"] == "chosen"


# a typing error, the empty name, and a name of another library
@pytest.mark.parametrize("name", ("Cpu", "", "mps"))
def test_unknown_names(name: str) -> None:
    message = f"use_backend: name must be one of auto, {', '.join(BACKENDS)}, got {name!r}"
    with pytest.raises(ValueError, match=re.escape(message)), use_backend(name):
        pass
    assert forced() == "auto"


def test_nesting_and_errors_restore_the_outer_choice() -> None:
    with use_backend("reference"):
        with use_backend("cpu"):
            assert forced() == "cpu"
        assert forced() == "reference"
        with pytest.raises(KeyError), use_backend("auto"):
            raise KeyError
        assert forced() == "reference"
    assert forced() == "auto"


def test_threads_choose_for_themselves() -> None:
    seen: list[str] = []
    inside, leave = threading.Event(), threading.Event()

    def other() -> None:
        seen.append(forced())
        with use_backend("cpu"):
            inside.set()
            leave.wait(10)

    with use_backend("reference"):
        thread = threading.Thread(target=other)
        thread.start()
        assert inside.wait(10)
        assert forced() == "reference"
        leave.set()
        thread.join()
    assert seen == ["auto"]


@needs_extension
def test_forced_cpu_never_falls_back() -> None:
    with use_backend("cpu"):
        with pytest.raises(
            BackendError, match=r"noise: backend cpu refused: dtype must be float32"
        ):
            randn([0], (4,), dtype=torch.float64)
        with pytest.raises(BackendError, match="out must be contiguous or channels_last"):
            randn([0], (4,), out=torch.zeros(1, 8)[:, ::2])
    assert randn([0], (4,), dtype=torch.float64).dtype == torch.float64  # "auto" may


def test_gpu_backends_refuse_what_is_not_there() -> None:
    for name in ("triton", "cuda"):
        if backends.unavailable(name) is None:
            continue
        with use_backend(name), pytest.raises(BackendError, match=f"noise: backend {name} refused"):
            randn([0], (4,))


def test_public_explanation_names_every_backend() -> None:
    answers = fastdiff.ops.describe("noise", [0], (4,))
    assert list(answers) == list(fastdiff.ops.OPS["noise"].backends)
    assert list(answers.values()).count("chosen") == 1
    with pytest.raises(ValueError, match=r"explain: op must be one of .*noise, .*, got 'nosuch'"):
        fastdiff.explain("nosuch")


# --- in a process of their own --------------------------------------------------------------


def _run(code: str, **environment: str) -> str:
    """Output of a fresh interpreter, started away from the checkout."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("FASTDIFF", "TRITON"))}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**clean, **environment},
        cwd=Path(__file__).resolve().parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_light() -> None:
    """No Triton, no kernels, no peers; and a first call on the CPU loads none of them either."""
    out = _run(
        "import sys, fastdiff\n"
        "fastdiff.randn([0], (4,))\n"
        "heavy = ('triton', 'fastdiff.kernels', 'diffusers', 'matplotlib', 'scipy', 'cuda.core')\n"
        "print([m for m in heavy if m in sys.modules])"
    )
    assert out.strip() == "[]"


def test_without_the_extension_everything_runs_on_the_reference() -> None:
    out = _run(
        "import sys\n"
        "sys.modules['fastdiff._cpu'] = None\n"
        "import torch, fastdiff\n"
        "from fastdiff.table import Row, StepTable\n"
        "z = fastdiff.randn([3], (5,))\n"
        "table = StepTable('t', (Row(x={'x': 0.5, 'm': 2.0}, time=0.0),))\n"
        "x = fastdiff.ops.reverse_step(z, z, table, 0)\n"
        "print(z[0].tolist(), torch.equal(x, z * 0.5 + z * 2))\n"
        "fastdiff.explain('noise', [3], (5,))\n"
        "with fastdiff.use_backend('cpu'):\n"
        "    try:\n"
        "        fastdiff.randn([3], (5,))\n"
        "    except fastdiff.BackendError as error:\n"
        "        print(error)\n"
    )
    values, *explained = out.strip().splitlines()
    numbers, equal = values.rsplit(" ", 1)
    expected = randn([3], (5,))[0]
    assert_same_bits(torch.tensor([float(v) for v in numbers.strip("[]").split(",")]), expected)
    assert equal == "True"
    reason = "the C++ extension fastdiff._cpu cannot be imported"
    assert any(reason in line and line.startswith("noise: cpu") for line in explained)
    assert any(line.split() == ["noise:", "reference", "chosen"] for line in explained)
    assert explained[-1].startswith(f"noise: backend cpu refused: {reason}")


@needs_extension
def test_an_instruction_set_may_be_forced() -> None:
    """The lowest is on every machine; a wrong name is refused with the name."""
    out = _run(
        "from fastdiff.ops._native import extension\nprint(extension.isa())",
        FASTDIFF_CPU_ISA="portable",
    )
    assert out.strip() == "portable"
    with pytest.raises(ValueError, match="this CPU has no instruction set 'sse9'"):
        _native.extension.set_isa("sse9")
