"""scripts/sanitize: the tests there must run on the extension that was built for them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts" / "sanitize"
# what an editable install does: a finder of its own, before every path
IMPORT = """
import sys
from importlib.machinery import PathFinder

class Editable:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return PathFinder.find_spec(name, path or [sys.argv[1]], target)

sys.meta_path.insert(1 if "sitecustomize" in sys.modules else 0, Editable)
import fastdiff.part
print(fastdiff.__file__, fastdiff.part.__file__, sep="\\n")
"""


def test_the_sanitized_package_comes_before_an_editable_install(tmp_path: Path) -> None:
    for place in ("editable", "site"):
        package = tmp_path / place / "fastdiff"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / "part.py").touch()
    site = tmp_path / "site"
    env = {**os.environ, "FASTDIFF_SITE": str(site), "PYTHONPATH": f"{site}:{SCRIPTS}"}
    found = subprocess.run(
        [sys.executable, "-c", IMPORT, str(tmp_path / "editable")],
        env=env, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert found == [str(site / "fastdiff" / "__init__.py"), str(site / "fastdiff" / "part.py")]
