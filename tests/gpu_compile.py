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
from gpu_cases import CASES

TABLE = Path(__file__).resolve().parents[1] / "benchmarks" / "results" / "gpu_compile.json"
COMMAND = "python tests/gpu_compile.py"
TRITON_ARCHS = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
CUDA_ARCHS = ("sm_80", "sm_90a", "sm_100")


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
    "add_noise": "add_noise",
    "brownian": "brownian",
    "reverse_step": "reverse_step",
    "reparameterize": "reparameterize",
    "reparameterize_backward": "reparameterize",
    "film_norm": "film_norm",
    "modulate": "modulate",
    "guidance_rescale": "guidance_rescale",
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
