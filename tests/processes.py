"""Commands in several processes, as torchrun starts them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_SECONDS = 600  # long for a loaded machine too: what takes longer hangs


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    # sums of a network may round otherwise with another number of threads
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **more}


def started(
    count: int, command: list[str], output: int | None = subprocess.PIPE
) -> list[subprocess.Popen[str]]:
    """The command in so many processes, with the variables that torchrun sets."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=environment(
                RANK=str(rank), WORLD_SIZE=str(count), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            ),
            stdout=output, stderr=output, text=True,
        )
        for rank in range(count)
    ]  # fmt: skip


def by_variables(
    count: int, arguments: list[str], script: str | None = None
) -> tuple[list[int], str, str]:
    """Exit codes and all that was printed, of the command or of a script in its place."""
    start = ["-m", "fastdiff"] if script is None else ["-c", script]
    processes = started(count, [*start, *arguments])
    try:
        printed = [process.communicate(timeout=_SECONDS) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    out, err = ("".join(parts) for parts in zip(*printed, strict=True))
    return [process.returncode for process in processes], out, err


def by_torchrun(count: int, arguments: list[str]) -> tuple[list[int], str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone",
         "--nproc-per-node", str(count), "-m", "fastdiff", *arguments],
        env=environment(), capture_output=True, text=True, timeout=_SECONDS,
    )  # fmt: skip
    return [done.returncode], done.stdout, done.stderr
