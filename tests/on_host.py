"""CUDA launches on the host: the real .cu files, compiled by the host compiler over a shim."""

from __future__ import annotations

import ctypes
import os
import shutil
import struct
import subprocess
from pathlib import Path

from fastdiff.ops._launches import Launch

TESTS = Path(__file__).resolve().parent
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
KERNELS = {
    "noise.cu": ("noise",),
    "add_noise.cu": ("add_noise",),
    "brownian.cu": ("brownian",),
    "reverse_step.cu": ("reverse_step",),
    "film_norm.cu": (
        "film_norm_resident",
        "film_norm_statistics",
        "film_norm_merge",
        "film_norm_apply",
    ),
    "reparameterize.cu": ("reparameterize", "reparameterize_sum", "reparameterize_backward"),
    "modulate.cu": ("modulate",),
    "guidance_rescale.cu": ("guidance_rescale", "guidance_rescale_sum"),
}


class Host:
    """Compiles each source once for each set of macros, into a folder that is its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._libraries: dict[object, ctypes.CDLL] = {}

    def _library(self, launch: Launch) -> ctypes.CDLL:
        key = (launch.source, launch.macros)
        if key in self._libraries:
            return self._libraries[key]
        exports = "\n".join(f"FD_EXPORT({k})" for k in KERNELS[launch.source])
        code = f'#include "cuda_on_host.h"\n#include "cuda/{launch.source}"\n{exports}\n'
        name = self._folder / f"{Path(launch.source).stem}{len(self._libraries)}"
        name.with_suffix(".cpp").write_text(code)
        subprocess.run(
            [
                str(COMPILER), "-std=c++17", "-O1", "-ffp-contract=off", "-fno-strict-aliasing",
                "-w", "-shared", "-fPIC", f"-I{TESTS}", f"-I{TESTS.parent / 'csrc'}",
                *(f"-D{macro}={value}" for macro, value in launch.macros),
                str(name.with_suffix(".cpp")), "-o", str(name.with_suffix(".so")),
            ],
            check=True,
        )  # fmt: skip
        found = self._libraries[key] = ctypes.CDLL(str(name.with_suffix(".so")))
        return found

    def run(self, launches: list[Launch]) -> None:
        """Run the launches in order; their addresses are those of CPU tensors."""
        for launch in launches:
            words = b"".join(
                struct.pack("<fi", a, 0) if isinstance(a, float) else struct.pack("<q", a)
                for a in launch.args
            )
            assert launch.cluster == 1, "blocks run one after the other here"
            geometry = struct.pack("<5Q", *launch.grid, *launch.block, launch.shared)
            kernel = getattr(self._library(launch), f"host_{launch.kernel}")
            beyond = kernel(geometry, words)
            assert beyond == 0, f"{launch.kernel}: {beyond} blocks wrote beyond their shared memory"
