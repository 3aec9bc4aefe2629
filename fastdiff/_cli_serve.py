"""``fastdiff serve``: a checkpoint behind HTTP."""

from __future__ import annotations

import argparse
import contextlib
import socket

from fastdiff import _ranks
from fastdiff._cli_sample import DTYPES


def add_arguments(s: argparse.ArgumentParser) -> None:
    """The options of the command."""
    s.add_argument("--model", default="fashion", help="shipped name or .safetensors path")
    s.add_argument("--host", default="127.0.0.1", help="the loopback unless told otherwise")
    s.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    s.add_argument("--slots", type=int, default=16, help="images in the running batch")
    s.add_argument("--queue", type=int, default=256, help="images that may wait")
    s.add_argument("--per-client", type=int, default=None, help="of one client, default: as many")
    s.add_argument(
        "--grace", type=float, default=10.0, help="seconds to finish what runs, when interrupted"
    )
    s.add_argument("--device", default="auto")
    s.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="of the model")
    s.set_defaults(run=run)


def _require_free(host: str, port: int) -> None:
    """Raises OSError where nothing can listen: before the model is loaded, and not from within the
    server, which has no other way than to end the process."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        rule = "host and port must be an address of this machine that is free"
        raise OSError(f"serve: {rule}, got {host} {port} ({error.strerror})") from error


def run(args: argparse.Namespace) -> int:
    """Serve until interrupted."""
    try:
        from fastdiff.serve.http import Server
    except ImportError as error:
        raise ValueError(
            f"serve: fastapi and uvicorn must be installed (the extra 'serve'), got {error}"
        ) from None
    from fastdiff.serve import Engine

    if not 0 <= args.port < 1 << 16:
        raise ValueError(f"serve: port must lie in [0, 65535], got {args.port}")
    _require_free(args.host, args.port)
    engine = Engine.from_checkpoint(
        args.model,
        dtype=DTYPES.get(args.dtype),
        device=_ranks.local_device(args.device, "serve"),
        slots=args.slots,
        queue=args.queue,
        per_client=args.per_client,
    )
    # after an orderly end, uvicorn raises the signal that it was ended by again
    with engine, contextlib.suppress(KeyboardInterrupt):
        Server(engine, host=args.host, port=args.port, grace=args.grace).run()
    return 0
