"""Forks, threads, caches built at once, and machines where a compiler or Triton is broken."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from faults import LIMIT, finish, hashes, paths, start

from fastdiff import Sampler, randn, schedules, solvers
from fastdiff.ops import _native
from fastdiff.table import StepTable

ROOT = Path(__file__).resolve().parents[1]

# Every op that shares its work among threads, with tensors large enough for three of them.
FORK = """
import os, signal, sys, torch, fastdiff
from fastdiff import ops, schedules, solvers
torch.set_num_threads(3)
x = torch.sin(torch.arange(4 * 96 * 1024) / 7.0).view(4, 96, 32, 32)
half = 0.5 * x
table = solvers.build("ddpm", schedules.linear(), 4)
def results():
    return [
        fastdiff.randn(0, (300_000,)),
        ops.reverse_step(x, x, table, 1, seeds=torch.arange(4)),
        ops.film_norm(x, 8),
        ops.dynamic_threshold(x)[0],
        ops.reparameterize(x, x, 0)[0],
        ops.add_noise(x, 0, 0.5, 0.5)[0],
        ops.modulate(x.view(4, 96, 1024)),
        ops.guidance_rescale(x, half, 3.0, 0.7),
    ]
before = results()
read, write = os.pipe()
child = os.fork()
if child == 0:
    signal.alarm(int(sys.argv[1]))
    after = results()
    # not torch.equal, whose own threads would wait
    same = [bytes(memoryview(a.numpy()).cast("B")) == bytes(memoryview(b.numpy()).cast("B"))
            for a, b in zip(before, after)]
    os.write(write, repr(same).encode())
    os._exit(0)
os.close(write)
print(os.waitpid(child, 0)[1], os.read(read, 1000).decode())
print(all(torch.equal(a, b) for a, b in zip(before, results())))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.skipif(_native.extension is None, reason=str(_native.missing))
def test_ops_in_a_forked_child() -> None:
    """libgomp's threads are the parent's alone: a child that waited for them would never end.

    In the parent they work as before. (torch's own ops do wait; it asks for set_num_threads(1).)
    """
    said = finish(start(FORK, 120, env={"OMP_NUM_THREADS": "3"}))
    child, parent = said.splitlines()[:2]
    assert child == f"0 {[True] * 8}" and parent == "True"


class Elementwise(torch.nn.Module):
    """Images that do not depend on the batch in any bit."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(0.7))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.weight * x + t.view(-1, 1, 1, 1) / 700)


# first order, stochastic, multistep, and a corrector whose noise is drawn again
SOLVERS = ("ddim", "ddpm", "dpmpp_2m_sde", "sa_solver")


@pytest.mark.parametrize("name", SOLVERS)
def test_eight_threads_sample_at_once(name: str) -> None:
    """One `Sampler` for all, met by none before, and seeds of their own: the bits of another
    that runs one after the other."""
    sampler, alone = (
        Sampler(Elementwise(), solvers.build(name, schedules.linear(), 8)) for _ in range(2)
    )
    seeds = [[10 * i, 10 * i + 1, 7] for i in range(8)]
    expected = [alone((3, 24, 24), seeds=s) for s in seeds]
    found: dict[tuple[int, int], torch.Tensor] = {}
    ready = threading.Barrier(8)

    def work(i: int) -> None:
        ready.wait()
        for repeat in range(3):
            found[i, repeat] = sampler((3, 24, 24), seeds=seeds[i])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 24
    for (i, _), images in found.items():
        assert torch.equal(images, expected[i])


FIRST_CALLS = """
import hashlib, sys, threading, torch
from fastdiff import Sampler, schedules, solvers
threads = int(sys.argv[1])
found, ready = {}, threading.Barrier(threads)
def work(i):
    if threads > 1:
        ready.wait()
    sampler = Sampler(lambda x, t: torch.tanh(x), solvers.build("sa_solver", schedules.linear(), 6))
    found[i] = hashlib.sha256(sampler((3, 16, 16), seeds=i).numpy().tobytes()).hexdigest()
if threads > 1:
    team = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    for t in team: t.start()
    for t in team: t.join()
else:
    for i in range(8): work(i)
print([found[i] for i in range(8)])
"""


def test_the_first_calls_of_a_process_come_from_eight_threads() -> None:
    """What is made once a process (tables, backends, ops) is made by all of them at once."""
    assert finish(start(FIRST_CALLS, 8)) == finish(start(FIRST_CALLS, 1))


def test_an_interrupt_in_a_sample_leaves_its_inputs_and_the_sampler() -> None:
    """Ctrl-C in the middle of a row of a multistep solver, whose history is then half written."""

    class Interrupted(Elementwise):
        calls = 0

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 4:
                signal.raise_signal(signal.SIGINT)
            return super().forward(x, t)

    sampler = Sampler(Interrupted(), solvers.build("dpmpp_2m_sde", schedules.linear(), 8))
    noise = randn(0, (3, 8, 8))
    before = noise.clone()
    with pytest.raises(KeyboardInterrupt):
        sampler(noise=noise, seeds=[5])
    assert torch.equal(noise, before)
    again = sampler(noise=noise, seeds=[5])
    table: StepTable = sampler.table
    assert torch.equal(again, Sampler(Elementwise(), table)(noise=noise, seeds=[5]))


# cubin() with a compiler that takes a while and gives a megabyte
CACHE = """
import hashlib, os, signal, sys, time
from fastdiff.ops import _cuda
def compile_source(source, macros, arch, log=None, **more):
    time.sleep(0.01)
    return hashlib.sha256(repr((source, macros, arch)).encode()).digest() * (1 << 15)
_cuda.compile_source, _cuda._versions = compile_source, lambda: "1"
if sys.argv[1] == "killed":
    os.replace = lambda a, b: os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "nobody" and os.geteuid() == 0:  # whom no folder is closed to
    os.setuid(65534)
print([hashlib.sha256(_cuda.cubin("noise.cu", (("N", n),), "sm_90")).hexdigest() for n in range(8)])
"""


def test_processes_build_a_cache_at_once(tmp_path: Path) -> None:
    env = {"FASTDIFF_CACHE_DIR": str(tmp_path)}
    finish(start(CACHE, "killed", env=env), -signal.SIGKILL)
    part = list(hashes(tmp_path))
    assert len(part) == 1 and part[0].endswith(".part")  # no process takes it for a cubin
    processes = [start(CACHE, "at once", env=env) for _ in range(4)]
    said = {finish(process) for process in processes}
    assert len(said) == 1
    files = [name for name in hashes(tmp_path) if name not in part]
    assert len(files) == 8 and all(name.endswith(".cubin") for name in files)
    assert {finish(start(CACHE, "after", env=env))} == said


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_a_cache_that_may_only_be_read(tmp_path: Path) -> None:
    """An empty one, and one that is full already."""
    folder = tmp_path / "cache"
    folder.mkdir()
    env = {"FASTDIFF_CACHE_DIR": "."}
    folder.chmod(0o555)
    first = finish(start(CACHE, "nobody", env=env, cwd=folder))
    assert list(folder.iterdir()) == []
    folder.chmod(0o755)
    assert finish(start(CACHE, "owner", env=env, cwd=folder)) == first
    folder.chmod(0o555)
    before = hashes(folder)
    assert finish(start(CACHE, "nobody", env=env, cwd=folder)) == first
    assert hashes(folder) == before and len(before) == 8
    folder.chmod(0o755)


TRITON = """
import sys, torch, fastdiff
from fastdiff import cli
print(fastdiff.randn(3, (5,)).tolist())
try:
    with fastdiff.use_backend("triton"):
        fastdiff.randn(3, (5,))
except fastdiff.BackendError as error:
    print(error)
raise SystemExit(cli.main(["doctor"]))
"""


@pytest.mark.parametrize("error", ["ImportError", "RuntimeError", "AttributeError"])
def test_a_broken_triton_is_a_reason_and_no_crash(tmp_path: Path, error: str) -> None:
    """It is installed, and fails at import: libraries of another Python, a driver at odds, ..."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text(f"raise {error}('libtriton.so is at odds')")
    env = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{paths()}", "TRITON_INTERPRET": "1"}
    values, refused, *doctor = finish(start(TRITON, env=env)).splitlines()
    assert values == str(randn(3, (5,)).tolist())
    reason = f"triton cannot be imported ({error}: libtriton.so is at odds)"
    assert refused == f"noise: backend triton refused: {reason}"
    assert any("triton" in line and reason in line for line in doctor)


def test_the_build_without_a_compiler(tmp_path: Path) -> None:
    """CMake finds none: it warns, builds nothing and succeeds, so that the wheel installs.

    What then runs is in test_backends.py: everything, on the reference.
    """
    tools = {name: shutil.which(name) for name in ("cmake", "make")}
    if None in tools.values():
        pytest.skip(f"needs {' and '.join(tools)}")
    (tmp_path / "bin").mkdir()
    for name, path in tools.items():
        (tmp_path / "bin" / name).symlink_to(str(path))
    env = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "CMAKE_GENERATOR")}
    done = subprocess.run(
        ["cmake", "-S", ROOT, "-B", tmp_path / "build", "-G", "Unix Makefiles"],
        env={**env, "PATH": str(tmp_path / "bin")}, capture_output=True, text=True, timeout=LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler found, installing without the CPU kernels" in done.stderr
    assert not list((tmp_path / "build").rglob("_cpu*"))
