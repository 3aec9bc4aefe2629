"""Continuous batching: one engine, many clients, each image at its own step.

`Engine` is in process; `fastdiff.serve.http` puts it behind HTTP.
"""

from fastdiff.serve._queue import QueueFull
from fastdiff.serve.engine import Closed, Engine, Stats
from fastdiff.serve.job import DeadlineExceeded, Job, Progress
from fastdiff.serve.request import Plan, Request
from fastdiff.serve.sizes import FixedSizes, agreeing_sizes

__all__ = [
    "Closed",
    "DeadlineExceeded",
    "Engine",
    "FixedSizes",
    "Job",
    "Plan",
    "Progress",
    "QueueFull",
    "Request",
    "Stats",
    "agreeing_sizes",
]
