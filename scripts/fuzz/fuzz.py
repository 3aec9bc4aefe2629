"""Coverage-guided fuzzing of one target: python scripts/fuzz/fuzz.py TARGET [libFuzzer options].

Needs atheris (pip install atheris). New inputs go to runs/fuzz/TARGET; the seeds are those of
tests/corpus/TARGET. An input that breaks the rule of targets.py ends the run and is written to
runs/fuzz/crash-...; libFuzzer's options hold, such as -max_total_time=300 or -runs=100000.
"""

from __future__ import annotations

import json
import random
import resource
import sys
from pathlib import Path
from typing import Any

import atheris
import torch  # before the instrumentation: it is not what is fuzzed

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]
# the finder of an editable install comes before every path, and its modules are not instrumented
sys.meta_path.sort(key=lambda finder: "Redirecting" in type(finder).__name__)
with atheris.instrument_imports(include=["fastdiff", "torch._weights_only_unpickler"]):
    import targets

MOST_MEMORY = 12 << 30  # bytes of addresses: an unbounded allocation fails rather than succeeds
BINARY = ("weights", "cli")

# numbers at the ends of types, and values of another type than a config holds
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 1 << 16, 1 << 31, 1 << 40, 1 << 63, 10**40, 0.5,
    -0.5, 1e-320, 1e-8, 1e30, 1e308, float("nan"), float("inf"), "", "a", "0", "x" * 40, [], [0],
    [1, 2], [[]], {}, {"a": 1}, ["a"], [1e308] * 3,
)  # fmt: skip


def _places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) of nested lists and dicts."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in list(keys):
        found.append((value, key))
        if isinstance(value[key], (dict, list)):
            _places(value[key], found)
    return found


def mutate_json(data: bytes, max_size: int, seed: int) -> bytes:
    """Another value at a place of the document, or libFuzzer's own change of its bytes."""
    rng = random.Random(seed)
    if rng.random() < 0.75:
        try:
            document = json.loads(data)
            places = _places(document, []) if isinstance(document, (dict, list)) else []
        except (ValueError, RecursionError):
            places = []
        if places:
            for _ in range(rng.choice((1, 1, 2, 3))):
                where, key = rng.choice(places)
                other, name = rng.choice(places)
                try:
                    kind = rng.random()
                    if kind < 0.6:
                        where[key] = rng.choice(ODD)
                    elif kind < 0.75:
                        where[key] = other[name]
                    elif kind < 0.9 and isinstance(where[key], (int, float)):
                        where[key] = where[key] * rng.choice((-1, 2, 0.5, 3, 1000)) + rng.choice(
                            (0, 1, -1)
                        )
                    elif isinstance(where, dict):
                        del where[key]
                    else:
                        where.append(rng.choice(ODD))
                except (LookupError, OverflowError):
                    continue  # an earlier change took the place away
            try:
                text = json.dumps(document).encode()
            except (ValueError, RecursionError):  # a value within itself
                text = b""
            if 0 < len(text) <= max_size:
                return text
    return bytes(atheris.Mutate(data, max_size))


def main() -> None:
    name, *options = sys.argv[1:]
    target = targets.TARGETS[name]
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    grown = ROOT / "runs" / "fuzz" / name
    grown.mkdir(parents=True, exist_ok=True)
    seeds = ROOT / "tests" / "corpus" / name
    args = [
        sys.argv[0], f"-artifact_prefix={grown.parent}/", "-timeout=60", "-max_len=4096",
        "-rss_limit_mb=4096", *options, str(grown), str(seeds),
    ]  # fmt: skip
    if name in BINARY:
        atheris.Setup(args, target)
    else:
        atheris.Setup(args, target, custom_mutator=mutate_json)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
