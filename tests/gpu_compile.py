"""What the GPU kernels compile to, without a GPU: registers, spills, instructions, PTX.

    python tests/gpu_compile.py

writes the table benchmarks/results/gpu_compile.json, which test_triton.py and test_cuda_compile.py
hold against a fresh compilation. The cases go through the same host code as a launch on a device;
only the last step differs.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import film_cases
import torch

from fastdiff.table import Row, StepTable

TABLE = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "gpu_compile.json"
COMMAND = "python tests/gpu_compile.py"
TRITON_ARCHS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
CUDA_ARCHS = ("sm_80", "sm_90a", "sm_100")

# importlib: `fastdiff.ops.noise` is a module, but for `reverse_step` the function hides it
noise_op = importlib.import_module("fastdiff.ops.noise")
step_op = importlib.import_module("fastdiff.ops.reverse_step")
vae_op = importlib.import_module("fastdiff.ops.reparameterize")
modulate_op = importlib.import_module("fastdiff.ops.modulate")

F32, BF16 = torch.float32, torch.bfloat16
LAST = torch.channels_last
_SHAPE = (4, 64, 32, 32)


# --- cases ----------------------------------------------------------------------------------


def _noise(dtype: torch.dtype, fmt: torch.memory_format = torch.contiguous_format) -> Any:
    out = torch.empty(_SHAPE, dtype=dtype).contiguous(memory_format=fmt)
    return noise_op.prepare(range(4), _SHAPE[1:], out=out)


_EVERY = dict.fromkeys(("x", "m", "d", "h0", "n1", "n2", "u"), 0.5)
_TABLE = StepTable(
    "shapes",
    (
        Row(x={"x": 0.9, "m": 0.1}, time=4.0),  # DDIM
        Row(x={"x": 0.9, "d": 0.1}, push=True, time=3.0),
        Row(x={"x": 0.9, "d": 0.1, "h0": 0.3}, push=True, time=2.0),  # DPM-Solver++(2M)
        Row(x={"x": 0.9, "m": 0.1, "n1": 0.3}, draws=((1, 3),), time=1.0),  # DDPM
        Row(
            x={**_EVERY},
            y={**_EVERY},
            draws=((1, 4), (2, 4)),
            push=True,
            log_variance=(0.3, 0.4),
            time=0.5,
        ),
        Row(x={**_EVERY, "y": 0.5, "h1": 0.5, "h2": 0.5}, draws=((1, 5), (2, 5)), time=0.1),
    ),
)


def _step(
    row: int | list[int],
    dtype: torch.dtype,
    fmt: torch.memory_format = torch.contiguous_format,
    *,
    guided: bool = False,
    every: bool = False,
) -> Any:
    x = torch.empty(_SHAPE).contiguous(memory_format=fmt)
    model = x.to(dtype)
    ring = torch.empty(4, *x.permute(0, 2, 3, 1).shape) if fmt == LAST else torch.empty(4, *_SHAPE)
    history = ring.permute(0, 1, 4, 2, 3) if fmt == LAST else ring
    given: dict[str, Any] = {"history": history, "seeds": torch.arange(4)}
    if guided or every:
        given |= {"uncond": model, "guidance": 3.0, "model_input": model.clone()}
    if every:
        given |= {"variance": model, "y": x.clone(), "clip": 1.0}
    if isinstance(row, list):
        given |= {"guidance": torch.ones(4), "clip": torch.ones(4)}
    index = torch.tensor(row) if isinstance(row, list) else row
    return step_op.prepare(x, model, _TABLE, index, **given)


def _vae(dtype: torch.dtype) -> Any:
    mu = torch.empty(4, 16, 32, 32, dtype=dtype)
    return vae_op.prepare(mu, mu.clone(), 3)


def _vae_backward(dtype: torch.dtype) -> Any:
    call = _vae(dtype)
    mu = call.mu
    return vae_op.ReparameterizeBackward(
        mu, call.kl, mu, call.logvar, call.seeds, 0, 3, mu.clone(), mu.clone()
    )


def _modulate(dtype: torch.dtype, *, added: bool = True, channels: int = 1152) -> Any:
    x = torch.empty(4, 256, channels, dtype=dtype)
    scale, shift, gate = torch.empty(4, 3 * channels, dtype=dtype).chunk(3, dim=1)
    more = {"residual": x.clone(), "gate": gate} if added else {}
    return modulate_op.prepare(x, scale, shift, **more)


# name: (op, its checked arguments)
CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "noise f32": ("noise", lambda: _noise(F32)),
    "noise bf16": ("noise", lambda: _noise(BF16)),
    "noise f32 channels_last": ("noise", lambda: _noise(F32, LAST)),
    "step ddim bf16": ("reverse_step", lambda: _step(0, BF16)),
    "step ddim f32": ("reverse_step", lambda: _step(0, F32)),
    "step ddim guided bf16": ("reverse_step", lambda: _step(0, BF16, guided=True)),
    "step 2m bf16": ("reverse_step", lambda: _step(2, BF16)),
    "step 2m f32": ("reverse_step", lambda: _step(2, F32)),
    "step ddpm bf16": ("reverse_step", lambda: _step(3, BF16)),
    "step ddpm f32": ("reverse_step", lambda: _step(3, F32)),
    "step ddpm bf16 channels_last": ("reverse_step", lambda: _step(3, BF16, LAST)),
    "step everything bf16": ("reverse_step", lambda: _step(4, BF16, every=True)),
    "step rows bf16": ("reverse_step", lambda: _step([0, 3, 4, 5], BF16, every=True)),
    "step rows f32": ("reverse_step", lambda: _step([0, 3, 4, 5], F32, every=True)),
    "reparameterize f32": ("reparameterize", lambda: _vae(F32)),
    "reparameterize bf16": ("reparameterize", lambda: _vae(BF16)),
    "reparameterize backward f32": ("reparameterize_backward", lambda: _vae_backward(F32)),
    "reparameterize backward bf16": ("reparameterize_backward", lambda: _vae_backward(BF16)),
    "modulate f32": ("modulate", lambda: _modulate(F32)),
    "modulate bf16": ("modulate", lambda: _modulate(BF16)),
    "modulate bf16 alone": ("modulate", lambda: _modulate(BF16, added=False)),
    "modulate bf16 long": ("modulate", lambda: _modulate(BF16, channels=16384)),
}
EXACT = tuple(CASES)  # what is promised as bits: no contraction, no approximation
CASES |= {f"film_norm {name}": ("film_norm", make) for name, make in film_cases.COMPILED.items()}
# cases with a bfloat16 tensor among their outputs
STORES_BF16 = {
    "noise bf16",
    "step ddim guided bf16",
    "step everything bf16",
    "step rows bf16",
    "reparameterize bf16",
    "reparameterize backward bf16",
    "modulate bf16",
    "modulate bf16 alone",
    "modulate bf16 long",
}


class Compiled(NamedTuple):
    """One kernel for one architecture."""

    case: str
    kernel: str
    arch: str
    registers: int
    spills: int  # bytes of local memory: spills and stack
    shared: int  # bytes
    instructions: int | None  # None where not counted, or no disassembler reads the file
    ptx: str
    cubin: bytes

    def row(self) -> dict[str, Any]:
        """As it stands in the table."""
        return {
            name: value for name, value in self._asdict().items() if name not in ("ptx", "cubin")
        }

    def listed(self, rows: list[dict[str, Any]]) -> bool:
        """Whether the table has it so; instructions are counted for the table alone."""
        return any(row | {"instructions": None} == self.row() for row in rows)


def _cuobjdump(cubin: bytes, flag: str) -> str:
    """What the tool of that name in the Triton wheel says; nothing where it is missing."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, flag, file.name], capture_output=True, text=True).stdout


def sass(cubin: bytes, kernel: str) -> list[tuple[int, str]]:
    """Address and text of the instructions of one kernel, without the padding; none if unread."""
    for part in _cuobjdump(cubin, "-sass").split("Function : ")[1:]:
        if part.split()[0] == kernel:
            lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*);", part, re.MULTILINE)
            return [(int(at, 16), text) for at, text in lines if "NOP" not in text]
    return []


def instructions(cubin: bytes, kernel: str) -> int | None:
    """Static SASS instructions of one kernel: slow paths count too."""
    return len(sass(cubin, kernel)) or None


# --- Triton ---------------------------------------------------------------------------------

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
}
_MODULES = {
    "noise": "noise",
    "reverse_step": "reverse_step",
    "reparameterize": "reparameterize",
    "reparameterize_backward": "reparameterize",
    "film_norm": "film_norm",
    "modulate": "modulate",
}
Launched = tuple[Any, tuple[Any, ...], dict[str, Any]]  # kernel, arguments, keywords


@contextmanager
def recorded(module: Any) -> Iterator[list[Launched]]:
    """Within the block the kernels of the module note their launches instead of running."""
    import triton

    calls: list[Launched] = []
    kernels = {
        name: value
        for name, value in vars(module).items()
        if isinstance(value, triton.JITFunction) and name.endswith("_kernel")
    }

    class Noted:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Callable[..., None]:
            return lambda *args, **keywords: calls.append((self.kernel, args, keywords))

    try:
        for name, kernel in kernels.items():
            setattr(module, name, Noted(kernel))
        yield calls
    finally:
        for name, kernel in kernels.items():
            setattr(module, name, kernel)


def _signature(kernel: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[Any, Any]:
    """What Triton would specialize the launch to, and the options of the launch."""
    from triton.compiler import ASTSource

    names = kernel.arg_names
    given = dict(zip(names, args, strict=False)) | keywords
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        name, value = parameter.name, given[parameter.name]
        plain = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (plain and type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = _TYPES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]  # as memory of torch on a device
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if plain and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    return source, {name: value for name, value in keywords.items() if name not in names}


def compile_triton(case: str, arch: str, *, count: bool = False) -> list[Compiled]:
    """Every kernel that a case launches; `count` disassembles them too."""
    import triton
    from triton.backends.compiler import GPUTarget

    op, make = CASES[case]
    module = importlib.import_module(f"fastdiff.kernels.{_MODULES[op]}")
    with recorded(module) as calls:
        getattr(module, op)(make())
    found = []
    for kernel, args, keywords in calls:
        source, options = _signature(kernel, args, keywords)
        target = GPUTarget("cuda", TRITON_ARCHS[arch], 32)
        compiled = triton.compile(source, target=target, options=options)
        name, cubin = kernel.fn.__name__, compiled.asm["cubin"]
        usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", _cuobjdump(cubin, "-res-usage")))
        local = int(usage["STACK"]) + int(usage["LOCAL"])
        lines = instructions(cubin, name) if count else None
        numbers = (int(usage["REG"]), local, compiled.metadata.shared, lines)
        found.append(Compiled(case, name, arch, *numbers, compiled.asm["ptx"], cubin))
    return found


# --- CUDA C++ -------------------------------------------------------------------------------


def launches(case: str, arch: str = "sm_90a") -> list[Any]:
    """The CUDA launches of a case."""
    from fastdiff.ops import _film_launches, _launches, _modulate_launches

    op, make = CASES[case]
    if op == "film_norm":
        return _film_launches.film_norm(make(), film_cases.CHIPS[arch])[0]
    module = _modulate_launches if op == "modulate" else _launches
    made = getattr(module, op)(make(), 4096)
    return made[0] if isinstance(made, tuple) else made


def _usage(log: str, kernel: str) -> tuple[int, int, int]:
    """Registers, bytes of local memory and of shared memory, from what ptxas says of a kernel."""
    (said,) = (
        p for p in log.split("Compiling entry function")[1:] if p.split()[0] == f"'{kernel}'"
    )

    def number(pattern: str) -> int:
        found = re.search(pattern, said)
        return int(found[1]) if found else 0

    local = sum(
        number(rf"(\d+) bytes {what}") for what in ("stack frame", "spill stores", "spill loads")
    )
    return number(r"Used (\d+) registers"), local, number(r"(\d+) bytes smem")


def _ptx(source: str, macros: Any, arch: str) -> str:
    """By NVRTC itself: cuda.core makes PTX only where a driver is there to ask about it."""
    from cuda.bindings import nvrtc
    from cuda.core import ProgramOptions

    from fastdiff.ops import _cuda

    def checked(result: tuple[Any, ...]) -> Any:
        assert result[0] == nvrtc.nvrtcResult.NVRTC_SUCCESS, result[0]
        return result[1] if len(result) == 2 else None

    folder = _cuda.sources()
    chosen = _cuda.options(macros, arch, include_path=str(folder))
    flags = ProgramOptions(**chosen).as_bytes("nvrtc")
    text = (folder / "cuda" / source).read_bytes()
    program = checked(nvrtc.nvrtcCreateProgram(text, source.encode(), 0, [], []))
    checked(nvrtc.nvrtcCompileProgram(program, len(flags), flags))
    ptx = b" " * checked(nvrtc.nvrtcGetPTXSize(program))
    checked(nvrtc.nvrtcGetPTX(program, ptx))
    checked(nvrtc.nvrtcDestroyProgram(program))
    return ptx.decode()


def compile_cuda(case: str, arch: str, *, count: bool = False) -> list[Compiled]:
    """Every kernel that a case launches; `count` disassembles them too."""
    from fastdiff.ops import _cuda

    found = []
    for launch in launches(case, arch):
        source, macros = launch.source, launch.macros
        log = io.StringIO()
        cubin = _cuda.compile_source(source, macros, arch, log=log, ptxas_options=["-v"])
        ptx = _ptx(source, macros, arch)
        usage = _usage(log.getvalue(), launch.kernel)
        lines = instructions(cubin, launch.kernel) if count else None
        found.append(Compiled(case, launch.kernel, arch, *usage, lines, ptx, cubin))
    return found


# --- the table ------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    import triton
    from cuda.bindings import nvrtc

    return {
        "triton": triton.__version__,
        "nvrtc": ".".join(map(str, nvrtc.nvrtcVersion()[1:])),
    }


def main() -> None:
    rows: dict[str, list[dict[str, Any]]] = {"triton": [], "cuda": []}
    for case in CASES:
        for arch in TRITON_ARCHS:
            rows["triton"] += [c.row() for c in compile_triton(case, arch, count=True)]
        for arch in CUDA_ARCHS:
            rows["cuda"] += [c.row() for c in compile_cuda(case, arch, count=True)]
    lines = {k: "[\n  " + ",\n  ".join(json.dumps(r) for r in v) + "\n ]" for k, v in rows.items()}
    TABLE.parent.mkdir(parents=True, exist_ok=True)
    TABLE.write_text(
        f'{{\n "command": {json.dumps(COMMAND)},\n "versions": {json.dumps(versions())},\n'
        f' "triton": {lines["triton"]},\n "cuda": {lines["cuda"]}\n}}\n'
    )


if __name__ == "__main__":
    main()
