"""A pytest plugin: --one-in N keeps every N-th test, so that a slow run still meets every file."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--one-in", type=int, default=1, help="run one test in so many")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    every = config.getoption("--one-in")
    config.hook.pytest_deselected(items=[t for i, t in enumerate(items) if i % every])
    items[:] = items[::every]
