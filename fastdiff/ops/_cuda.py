"""The CUDA C++ backend: kernels of csrc/cuda compiled at run time by NVRTC, through cuda.core.

No toolkit is needed: NVRTC comes with CUDA builds of torch or as a wheel. A kernel is compiled once
for each device architecture and each set of macros, and its cubin is kept in a folder of the user
(``FASTDIFF_CACHE_DIR``, else the platform's cache folder) by a hash of everything that made it.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fastdiff.ops import _film_launches, _launches, _modulate_launches
from fastdiff.ops._film_checks import FilmNorm
from fastdiff.ops._film_launches import Chip
from fastdiff.ops._launches import Launch, Macros
from fastdiff.ops._modulate_checks import Modulate
from fastdiff.ops._step_checks import Step
from fastdiff.ops.add_noise import AddNoise
from fastdiff.ops.brownian import Increment
from fastdiff.ops.guidance_rescale import GuidanceRescale
from fastdiff.ops.noise import Draw
from fastdiff.ops.reparameterize import Reparameterize, ReparameterizeBackward

_PACKAGE = Path(__file__).resolve().parents[1]
_DIGEST = 32

# Blocks for each multiprocessor beyond which a kernel loops: enough waves to even out their ends.
_WAVES = 32


@cache
def sources() -> Path:
    """The folder csrc: in the installed package, or beside it in an editable install.

    Raises:
        FileNotFoundError: the installation lacks the sources.
    """
    for folder in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc"):
        if (folder / "cuda" / "noise.cu").is_file():
            return folder
    raise FileNotFoundError(f"cuda: csrc must be installed with the package, not in {_PACKAGE}")


# --- the cache of cubins --------------------------------------------------------------------


def cache_folder() -> Path | None:
    """Where cubins are kept; None where the user has no such folder."""
    chosen = os.environ.get("FASTDIFF_CACHE_DIR")
    if chosen:
        return Path(chosen)
    try:
        if sys.platform == "win32":
            base = os.environ.get("LOCALAPPDATA")
            return Path(base) / "fastdiff" if base else Path.home() / "AppData/Local/fastdiff"
        if sys.platform == "darwin":
            return Path.home() / "Library/Caches/fastdiff"
        base = os.environ.get("XDG_CACHE_HOME")
        return Path(base) / "fastdiff" if base else Path.home() / ".cache/fastdiff"
    except RuntimeError:  # no home folder
        return None


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, cubin = content[:_DIGEST], content[_DIGEST:]
    return cubin if cubin and hashlib.sha256(cubin).digest() == digest else None


def _write(path: Path, cubin: bytes) -> None:
    # under a name of its own, then renamed: another process sees the whole file or none
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, nothing else
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        try:
            with os.fdopen(handle, "wb") as part:
                part.write(hashlib.sha256(cubin).digest() + cubin)
            os.replace(name, path)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(name)
            raise


# --- compilation ----------------------------------------------------------------------------


def options(macros: Macros, arch: str, **more: Any) -> dict[str, Any]:
    """Arguments of ``cuda.core.ProgramOptions``: what equal bits need, and the macros.

    A source that promises no bits has the macro FD_CONTRACT, and mul and add may become fma.
    """
    return {
        "arch": arch,
        "std": "c++17",
        "fma": ("FD_CONTRACT", 1) in macros,
        "ftz": False,
        "prec_sqrt": True,
        "prec_div": True,
        "device_as_default_execution_space": True,  # of lambdas too, which NVRTC 13.0 refuses else
        "define_macro": [(name, str(value)) for name, value in macros],
        **more,
    }


@cache
def _all_sources() -> bytes:
    folder = sources()
    files = sorted([*folder.glob("*.h"), *folder.glob("cuda/*")])
    return b"\0".join(f.name.encode() + b"\0" + f.read_bytes() for f in files if f.is_file())


@cache
def _versions() -> str:
    import cuda.core
    from cuda.bindings import nvrtc

    return f"{cuda.core.__version__} {nvrtc.nvrtcVersion()[1:]}"


def compile_source(source: str, macros: Macros, arch: str, log: Any = None, **more: Any) -> bytes:
    """The cubin of one file of csrc/cuda, compiled without the cache.

    Args:
        source: file name in csrc/cuda.
        arch: ``sm_90`` and the like.
        log: receives what the compiler says, if given.
        more: further arguments of ``cuda.core.ProgramOptions``.
    """
    from cuda.core import Program, ProgramOptions

    chosen = options(macros, arch, include_path=str(sources()), **more)
    text = (sources() / "cuda" / source).read_text(encoding="utf-8")
    program = Program(text, "c++", ProgramOptions(**chosen))
    try:
        return bytes(program.compile("cubin", logs=log).code)
    finally:
        program.close()


def cubin(source: str, macros: Macros, arch: str, *, fresh: bool = False) -> bytes:
    """The compiled source, from the cache where it is there and whole; ``fresh`` compiles anew."""
    key = hashlib.sha256(_all_sources())
    key.update(repr((source, sorted(options(macros, arch).items()), _versions())).encode())
    folder = cache_folder()
    path = None if folder is None else folder / f"{Path(source).stem}-{key.hexdigest()}.cubin"
    found = None if path is None or fresh else _read(path)
    if found is None:
        found = compile_source(source, macros, arch)
        if path is not None:
            _write(path, found)
    return found


# --- launching ------------------------------------------------------------------------------


def _allow_shared(kernel: Any, shared: int, device: int) -> None:
    """Lets the launches of a kernel ask for all the shared memory that the device has for a block;
    without it they may have 48 KiB."""
    from cuda.bindings import driver

    attribute = driver.CUfunction_attribute
    handle, place = driver.CUkernel(int(kernel.handle)), driver.CUdevice(device)
    fixed = kernel.attributes.shared_size_bytes  # what the source declares counts too
    name = attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuKernelSetAttribute(name, shared - fixed, handle, place)
    if error != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"cuda: {shared - fixed} bytes of shared memory refused: {error.name}")


class _Device:
    """One CUDA device: its architecture, and the kernels loaded so far."""

    def __init__(self, index: int) -> None:
        from cuda.core import Device

        self._device = Device(index)
        properties = torch.cuda.get_device_properties(index)
        self.arch = f"sm_{properties.major}{properties.minor}"
        self.blocks = properties.multi_processor_count * _WAVES
        self.chip = Chip(
            properties.multi_processor_count,
            self._device.properties.max_shared_memory_per_block_optin,
            properties.major >= 9,
        )
        self._kernels: dict[tuple[str, str, Macros], tuple[Any, Any]] = {}
        self._streams: dict[int, Any] = {}

    def _load(self, launch: Launch) -> tuple[Any, Any]:
        from cuda.core import ObjectCode

        def load(fresh: bool) -> tuple[Any, Any]:
            code = cubin(launch.source, launch.macros, self.arch, fresh=fresh)
            module = ObjectCode.from_cubin(code, name=launch.source)
            kernel = module.get_kernel(launch.kernel)
            if launch.shared:
                _allow_shared(kernel, self.chip.shared, self._device.device_id)
            return module, kernel  # the module must outlive its kernel

        try:
            return load(fresh=False)
        except Exception:  # of the driver: the file is whole, but not for this one
            return load(fresh=True)

    def run(self, launches: list[Launch]) -> None:
        """Launch on torch's current stream of this device, which must be the current one."""
        from cuda.core import LEGACY_DEFAULT_STREAM, LaunchConfig, Stream
        from cuda.core import launch as cuda_launch

        self._device.set_current()
        handle = torch.cuda.current_stream().cuda_stream
        stream = self._streams.get(handle)
        if stream is None:
            stream = Stream.from_handle(handle) if handle else LEGACY_DEFAULT_STREAM
            self._streams[handle] = stream
        for launch in launches:
            key = (launch.source, launch.kernel, launch.macros)
            found = self._kernels.get(key)
            if found is None:
                found = self._kernels[key] = self._load(launch)
            # with a cluster, cuda.core counts the grid in clusters
            grid = (launch.grid[0] // launch.cluster, launch.grid[1])
            cluster = (launch.cluster, 1) if launch.cluster > 1 else None
            config = LaunchConfig(
                grid=grid, cluster=cluster, block=launch.block, shmem_size=launch.shared
            )
            # an int goes as 64 bits, which is what every integer and pointer parameter is
            args = [ctypes.c_float(a) if isinstance(a, float) else a for a in launch.args]
            cuda_launch(stream, config, found[1], *args)


_devices: dict[int, _Device] = {}


def _device(t: torch.Tensor) -> _Device:
    index = t.device.index
    found = _devices.get(index)
    if found is None:
        found = _devices[index] = _Device(index)
    return found


def noise(draw: Draw) -> None:
    """Fill ``draw.out``."""
    if draw.out.numel() == 0:
        return
    with torch.cuda.device(draw.out.device):
        device = _device(draw.out)
        device.run(_launches.noise(draw, device.blocks))


def add_noise(call: AddNoise) -> None:
    """Fill ``call.x`` and ``call.wanted``."""
    if call.x.numel() == 0:
        return
    with torch.cuda.device(call.x.device):
        device = _device(call.x)
        device.run(_launches.add_noise(call, device.blocks))


def brownian(call: Increment) -> None:
    """Fill ``call.out``."""
    if call.out.numel() == 0:
        return
    with torch.cuda.device(call.out.device):
        device = _device(call.out)
        device.run(_launches.brownian(call, device.blocks))


def reverse_step(step: Step) -> None:
    """Write ``out``, ``y``, ``history`` and ``model_input`` of the step."""
    if step.x.numel() == 0:
        return
    with torch.cuda.device(step.x.device):
        device = _device(step.x)
        device.run(_launches.reverse_step(step, device.blocks))


def guidance_rescale(call: GuidanceRescale) -> None:
    """Fill ``call.out``."""
    if call.output.numel() == 0:
        call.out.fill_(1.0)
        return
    with torch.cuda.device(call.output.device):
        device = _device(call.output)
        # `memory` goes back to torch's allocator, which reuses it in the order of the stream
        launches, memory = _launches.guidance_rescale(call, device.blocks)
        device.run(launches)
        del memory


def reparameterize(call: Reparameterize) -> None:
    """Fill ``call.z`` and ``call.kl``."""
    if call.mu.numel() == 0:
        call.kl.zero_()
        return
    with torch.cuda.device(call.mu.device):
        device = _device(call.mu)
        # `memory` goes back to torch's allocator, which reuses it in the order of the stream
        launches, memory = _launches.reparameterize(call, device.blocks)
        device.run(launches)
        del memory


def reparameterize_backward(call: ReparameterizeBackward) -> None:
    """Fill ``call.grad_mu`` and ``call.grad_logvar``."""
    if call.mu.numel() == 0:
        return
    with torch.cuda.device(call.mu.device):
        device = _device(call.mu)
        device.run(_launches.reparameterize_backward(call, device.blocks))


def film_norm(call: FilmNorm) -> None:
    """Fill ``call.out``."""
    if call.x.numel() == 0:
        return
    with torch.cuda.device(call.x.device):
        device = _device(call.x)
        # `memory` goes back to torch's allocator, which reuses it in the order of the stream
        launches, memory = _film_launches.film_norm(call, device.chip)
        device.run(launches)
        del memory


def modulate(call: Modulate) -> None:
    """Fill ``call.out`` and ``call.total``."""
    if call.x.numel() == 0:
        return
    with torch.cuda.device(call.x.device):
        device = _device(call.x)
        device.run(_modulate_launches.modulate(call, device.blocks))
