"""Write the generated parts of README.md and docs: ``python -m benchmarks.readme`` (``--check``
compares).

Everything between ``<!-- generated: NAME -->`` and ``<!-- end -->`` comes from the registries and
from the JSON in benchmarks/results, so the texts cannot drift from either.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import tables

ROOT = Path(__file__).resolve().parent.parent

# the generated parts of each page
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"backends": tables.backend_table, "headlines": tables.headline_table},
    "docs/benchmarks.md": {"benchmarks": tables.benchmark_table},
    "docs/quality.md": {"quality": tables.quality_table},
    "docs/solvers.md": {
        "solvers": tables.solver_table,
        "orders": tables.orders_table,
        "spacings": tables.spacings_table,
        "work_precision": tables.work_precision_table,
    },
}


def render(page: str, text: str) -> str:
    """A page with every generated part made anew."""
    for name, make in PAGES[page].items():
        pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- end -->)"
        body = make().strip()
        body = f"\n{body}\n\n" if body else ""
        text, count = re.subn(
            pattern, lambda m, body=body: m[1] + body + m[2], text, flags=re.DOTALL
        )
        if count != 1:
            raise ValueError(f"readme: {page} must have one part {name!r}, got {count}")
    return text


def main() -> int:
    """Write or compare; exit status 1 where ``--check`` finds a difference."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args().check
    stale = 0
    for page in PAGES:
        path = ROOT / page
        old = path.read_text(encoding="utf-8")
        new = render(page, old)
        if not check:
            path.write_text(new, encoding="utf-8")
        elif new != old:
            print(f"{page} is out of date: python -m benchmarks.readme", file=sys.stderr)
            stale = 1
    return stale


if __name__ == "__main__":
    raise SystemExit(main())
