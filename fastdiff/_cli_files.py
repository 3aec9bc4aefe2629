"""``fastdiff sample --outdir``: one file a seed, by one process or by those of torchrun.

The unit of work is a run of ``--batch`` seeds of the list, the same ones whoever computes it: a
network's sums may round otherwise in another batch, so a seed's neighbours are part of its picture.
A unit of which files are missing is computed whole, and the missing ones are written.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastdiff import _ranks, backends
from fastdiff._cli_sample import BATCH, Job, labels_of, load_job, parse_seeds, report
from fastdiff._files import make_folder, written_whole
from fastdiff.data import save_image
from fastdiff.formats.files import read_json
from fastdiff.ops.noise import as_seeds
from fastdiff.version import __version__

MANIFEST = "manifest.json"


class Work(NamedTuple):
    """What is to be done.

    Attributes:
        units: seeds that are computed together, in their order.
        paths: the file of each seed.
    """

    units: list[list[int]]
    paths: dict[int, Path]

    def missing(self, unit: int) -> list[int]:
        """Seeds of a unit that have no file."""
        return [seed for seed in self.units[unit] if not self.paths[seed].exists()]


def run(args: argparse.Namespace) -> int:
    """One file a seed; the exit status."""
    seeds = parse_seeds(args.seeds)
    as_seeds(seeds, where="sample")
    batch = BATCH if args.batch is None else args.batch
    if batch < 1:
        raise ValueError(f"sample: batch must be at least 1, got {batch}")
    work = Work(
        [seeds[first : first + batch] for first in range(0, len(seeds), batch)],
        {seed: path_of(Path(args.outdir), seed, args.subdirs) for seed in seeds},
    )
    ranks = _ranks.join()
    job = load_job(args)
    start = time.perf_counter()
    try:
        left, kept = ranks.share(lambda: prepare(args, job, work, batch))
    except _ranks.StoppedElsewhere:
        return 2
    written = make(args, job, work, left, ranks, kept)
    spent = time.perf_counter() - start
    if ranks.rank == 0:
        report(args, job, f"{written} images")
        print(
            f"sample and write {spent:.2f} s ({spent / max(written, 1) * 1e3:.1f} ms an image), "
            f"{kept} kept: {args.outdir}"
        )
    return 0


def make(
    args: argparse.Namespace,
    job: Job,
    work: Work,
    left: Sequence[int],
    ranks: _ranks.Ranks,
    kept: int,
) -> int:
    """Compute units as long as there are any; returns how many files all processes wrote."""
    from tqdm import tqdm

    bar = tqdm(
        total=len(work.paths), initial=kept, unit="image",
        disable=ranks.rank > 0 or not sys.stderr.isatty(),
    )  # fmt: skip
    written = 0

    def show(done: int) -> None:
        nonlocal written
        bar.update(done - written)
        written = done

    with bar, backends.use_backend(args.backend):
        while (turn := ranks.take()) < len(left):
            unit = work.units[left[turn]]
            missing = set(work.missing(left[turn]))
            images = job.images(unit, labels_of(unit, job.labels))
            for seed, image in zip(unit, images, strict=True):
                if seed in missing:
                    save_image(image, work.paths[seed])
                    show(ranks.add(1))
        ranks.finish(show)
    return written


def prepare(args: argparse.Namespace, job: Job, work: Work, batch: int) -> tuple[list[int], int]:
    """Make the folder ready; returns the units that miss files, and how many files are kept."""
    folder, described = Path(args.outdir), describe(args, job, batch)
    resumes = args.resume or _ranks.restarted()
    if resumes:
        check_manifest(folder / MANIFEST, described, any(p.exists() for p in work.paths.values()))
    for parent in {folder, *(path.parent for path in work.paths.values())}:
        make_folder(parent, "sample: outdir")
        for part in parent.glob(".*.png.*.part"):  # of a process that was killed
            part.unlink(missing_ok=True)
    if not resumes:
        # of an earlier run: this one, killed and resumed, would take them for its own
        for path in work.paths.values():
            path.unlink(missing_ok=True)
    with written_whole(folder / MANIFEST) as part:
        part.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
    missing = [len(work.missing(unit)) for unit in range(len(work.units))]
    return [unit for unit, count in enumerate(missing) if count], len(work.paths) - sum(missing)


def describe(args: argparse.Namespace, job: Job, batch: int) -> dict[str, Any]:
    """All that the bits of the pictures depend on."""
    device = torch.device(args.device)
    on_cpu = device.type == "cpu"
    return {
        "fastdiff": __version__,
        "torch": torch.__version__,
        "device": torch.backends.cpu.get_cpu_capability()
        if on_cpu
        else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads() if on_cpu else None,
        "backend": args.backend,
        "dtype": str(job.dtype).removeprefix("torch."),
        "model": args.model,
        "weights_sha256": weights_sha256(job.sampler.model),
        "solver": args.solver,
        "steps": args.steps,
        "spacing": args.spacing,
        "options": args.option,
        "guidance": job.guidance,
        "clip": job.sampler.clip,
        "labels": list(job.labels),
        "seeds": args.seeds,
        "batch": batch,
        "subdirs": args.subdirs,
    }


def weights_sha256(model: Any) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of a model's tensors, as they are used."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def check_manifest(path: Path, described: dict[str, Any], files: bool) -> None:
    """Raises ValueError where a run can not go on from what is there.

    Args:
        files: whether pictures are there.
    """
    if not path.is_file():
        if files:
            raise ValueError(
                f"sample: resume must find the {path.name} of the run that it continues, "
                f"got none in {path.parent}"
            )
        return
    try:
        found = read_json(path)
    except ValueError as error:
        raise ValueError(
            f"sample: resume must find a {path.name} as sample wrote it, got {path} ({error})"
        ) from error
    for name in {**described, **found}:
        if found.get(name) != described.get(name):
            raise ValueError(
                f"sample: {name} must be {found.get(name)!r} to resume the run in {path.parent}, "
                f"got {described.get(name)!r}"
            )


def path_of(folder: Path, seed: int, subdirs: bool) -> Path:
    """``000123.png``, within ``000000`` where there are folders of 1000 seeds."""
    folder = folder / f"{seed - seed % 1000:06d}" if subdirs else folder
    return folder / f"{seed:06d}.png"
