"""torch's own CPU stream from our kernel: the same bits, the same state, on every instruction set.

Every comparison is with torch itself, so nothing is measured against a number of ours. Where the
kernel must have run, not torch behind it, the test counts (`drawn`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from bits import assert_same_bits
from tables import needs_extension
from torch import Tensor
from torch_twins import DTYPES, OURS, assert_same_draw, twins

from fastdiff.integrations import _torch_noise
from fastdiff.integrations._torch_noise import fill_, randn, state_before, untempered

pytestmark = needs_extension


# --- every tail, every position, every pair --------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tail(dtype: torch.dtype, vector_isa: str, drawn: list[int]) -> None:
    """16 to 2,000 and around multiples of a state, one after the other from one generator."""
    sizes = [*range(16, 2001), *(624 * k + d for k in (8, 9, 20) for d in range(-17, 18))]
    ours, theirs = twins(7)
    for size in sizes:
        assert_same_draw(size, ours, theirs, dtype)
    assert drawn == (sizes if dtype in OURS else [])


@pytest.mark.parametrize("size", (16, 17, 640, 5000))
def test_every_position_in_the_state(size: int, vector_isa: str, drawn: list[int]) -> None:
    """Before a draw torch has used 1 to 624 of the words, and none at all."""
    for used in range(625):
        ours, theirs = twins(used)
        for generator in (ours, theirs):
            torch.rand(used, generator=generator)
        assert_same_draw(size, ours, theirs)
    assert drawn == [size] * 625


def states(radii: np.ndarray, angles: np.ndarray) -> Iterator[Tensor]:
    """One state, again and again with 304 more pairs of words that torch draws from it next."""
    words = np.stack([radii.reshape(-1, 38, 8), angles.reshape(-1, 38, 8)], 2).reshape(-1, 608)
    state = state_before(words[0])
    inside = state[_torch_noise.WORDS].view(torch.int64)[1:609]
    for chunk in np.array_split(words, -(-len(words) // 1024)):
        for raw in torch.from_numpy(untempered(chunk)):
            inside.copy_(raw)
            yield state


def test_every_radius_and_every_angle(vector_isa: str) -> None:
    """All 2^24 radii at angle 0, whose cosine is 1, and all 2^24 angles at a radius of 1.

    Both factors of every normal that there is: what is left is their product, rounded once.
    """
    got, expected = torch.empty(608), torch.empty(608)
    ours, theirs = torch.Generator(), torch.Generator()
    near = (round((1 - np.exp(-0.5)) * 2**24) + np.arange(-152, 152)).astype(np.uint32)
    for state in states(near, np.zeros_like(near)):
        expected.normal_(generator=theirs.set_state(state))
    (at_one, *_) = (expected.view(-1, 2, 8)[:, 0].flatten() == 1).nonzero()
    every = np.arange(-(2**24) // 304 * -304, dtype=np.uint32) % np.uint32(2**24)
    for radii, angles in (
        (every, np.zeros_like(every)),
        (np.full_like(every, near[int(at_one)]), every),
    ):
        for state in states(radii, angles):
            _torch_noise._draw(got, ours.set_state(state))
            expected.normal_(generator=theirs.set_state(state))
            if not torch.equal(got.view(torch.int32), expected.view(torch.int32)):
                assert_same_bits(got, expected)


def test_hundred_million_draws(vector_isa: str, drawn: list[int]) -> None:
    """10^8 from one generator, in sizes of the field and with a tail, on 1 and 2 threads."""
    ours, theirs = twins(2024)
    sizes = (4_838_400, 524_288, 16_384, 1_000_003, 2_097_152 + 9)
    while sum(drawn) < 10**8:
        torch.set_num_threads(1 + len(drawn) % 2)
        assert_same_draw(sizes[len(drawn) % len(sizes)], ours, theirs)


# as many as there are, more than cores, and a number that divides nothing
@pytest.mark.parametrize("threads", (1, 2, 3, 7))
@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_share_a_draw(
    dtype: torch.dtype, threads: int, vector_isa: str, drawn: list[int]
) -> None:
    """From where a second thread is worth waking up to where all are."""
    sizes = [16_000 + 331 * k for k in range(40)] + [99_984, 100_001, 300_011]
    ours, theirs = twins(threads)
    torch.set_num_threads(threads)
    for size in sizes:
        assert_same_draw(size, ours, theirs, dtype)
    assert drawn == (sizes if dtype in OURS else [])


def test_nothing_beside_the_output_is_written(vector_isa: str, drawn: list[int]) -> None:
    for dtype in DTYPES:
        for size in (16, 31, 47, 640, 1000):
            memory = torch.full((size + 128,), 3.0, dtype=dtype)
            fill_(memory[64 : 64 + size], torch.Generator().manual_seed(size))
            assert (memory[:64] == 3).all()
            assert (memory[64 + size :] == 3).all()
    assert len(drawn) == 5 * len(OURS)


# --- beside torch's own draws ----------------------------------------------------------------

# what else draws from a generator: one word a value, two words, an odd number of scalar normals,
# which leaves one in the state for later, a permutation, another distribution, a strided tensor
OTHERS: dict[str, Callable[[torch.Generator], object]] = {
    "rand": lambda g: torch.rand(37, generator=g),
    "randint": lambda g: torch.randint(0, 2**40, (5,), generator=g),
    "one normal": lambda g: torch.randn(1, generator=g),
    "three normals": lambda g: torch.randn(3, generator=g, dtype=torch.float64),
    "double": lambda g: torch.randn(33, generator=g, dtype=torch.float64),
    "randperm": lambda g: torch.randperm(100, generator=g),
    "exponential": lambda g: torch.empty(9).exponential_(generator=g),
    "strided": lambda g: torch.empty(20, 4).t().normal_(generator=g),
    "reseeded": lambda g: g.manual_seed(3),
    "set": lambda g: g.set_state(torch.Generator().manual_seed(8).get_state()),
}


@pytest.mark.parametrize("seed", (0, 1, 2**32, 2**63 + 5))
def test_interleaved_with_other_draws(seed: int, vector_isa: str, drawn: list[int]) -> None:
    ours, theirs = twins(seed)
    sizes = iter(range(100, 1000, 7))
    for first in OTHERS.values():
        for second in OTHERS.values():
            for other in (first, second):
                other(ours)
                other(theirs)
                assert_same_draw(next(sizes, 641), ours, theirs)
    assert len(drawn) == 2 * len(OTHERS) ** 2


def test_the_default_generator(vector_isa: str, drawn: list[int]) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        got = (randn((70, 30)), fill_(torch.empty(5000)), torch.rand(3))
        torch.manual_seed(11)
        expected = (torch.randn(70, 30), torch.randn(5000), torch.rand(3))
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)
    assert drawn == [2100, 5000]


def test_a_state_that_torch_would_not_leave(vector_isa: str, drawn: list[int]) -> None:
    """torch reads on from any position that it was given; that is left to torch."""
    state = torch.Generator().manual_seed(1).get_state()
    state[8:12].view(torch.int32).fill_(300)
    state[16:24].view(torch.int64).fill_(5)
    ours, theirs = torch.Generator().set_state(state), torch.Generator().set_state(state)
    assert_same_draw(4000, ours, theirs)
    assert drawn == []


def test_threads_of_python_share_a_generator(vector_isa: str, drawn: list[int]) -> None:
    """Calls come one after the other in some order, none lost and none drawn twice."""
    ours, theirs = twins(5)
    got: list[Tensor] = []

    def work() -> None:
        for _ in range(50):
            got.append(randn((3000,), ours))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = [torch.randn(3000, generator=theirs) for _ in range(150)]
    assert sorted(x[0].item() for x in got) == sorted(x[0].item() for x in expected)
    assert torch.equal(ours.get_state(), theirs.get_state())
    assert drawn == [3000] * 150
