"""Minimal realisation: a sampler's coefficient rows, laid as rows that the kernel can run.

What a sampler hands to its model at call i is a vector X_i over the start, the model outputs D_j of
the earlier calls and the noise draws; its result is one more such vector. After call i, the future
depends on the past through the span S_i of the future vectors with everything later than call i
left out (the state space of a linear system in its minimal realisation: Kalman 1963; Ho and Kalman
1966). A table's state is x = X_{i+1}, the anchor y and up to four predictions that were pushed, so
the sampler fits if, for every i, S_i lies in the span of X_{i+1}, the newest pushes and one vector
more: that is y. S_i comes from the last call backwards, S_i = X_{i+1} + (S_{i+1} without D_{i+1}
and the draws of that row), compressed by SVD to its few dimensions.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SLOTS, DRAWS = 4, 2  # of a row
RANK = 1e-14  # singular values below this share of the largest state are rounding, at least
EXACT = 1e-13  # of the largest term of a state: a row that misses less needs no more terms
RESIDUAL = 1e-12  # of the same: what a row may miss
_EPS = float(np.finfo(float).eps)
# the noise prediction needs the state of its own row, so it is no sum of later terms
PUSHES = ("data", "epsilon")


@dataclass
class Plan:
    """One row in the sampler's own space.

    Attributes:
        x, y: coefficients by term; y None where the anchor stays.
        draws: numbers of the draws that are n1 and n2.
        push: whether the prediction enters the history.
    """

    x: dict[str, float]
    y: dict[str, float] | None = None
    draws: tuple[int, ...] = ()
    push: bool = False


@dataclass
class Realisation:
    """The rows of a sampler.

    Attributes:
        lead: the row before the first evaluation, or None where the start is what the model sees.
        rows: one for each evaluation.
        kind: what is pushed, one of `PUSHES`.
    """

    lead: Plan | None
    rows: list[Plan] = field(default_factory=list)
    kind: str = "data"

    @property
    def cost(self) -> tuple[int, int]:
        """Memory it takes: the most pushes and anchors at once, then anchors alone."""
        used = [k for row in self.rows for k, c in row.x.items() if c != 0.0]
        depth = max((int(k[1]) + 1 for k in used if k[0] == "h"), default=0)
        anchor = int(any(row.y is not None for row in self.rows))
        return depth + anchor, anchor


def realise(inputs: Array, end: Array, sigmas: Array, n_draws: int) -> Realisation:
    """The rows with the least memory.

    Args:
        inputs: (n, size) X_i over the coordinates start, D_1 ... D_n, draws.
        end: (size,) the result.
        sigmas: (n,) level of each call, of which the noise prediction (X - D)/sigma is made.
        n_draws: number of the draws, the last coordinates.

    Raises:
        ValueError: the rows do not fit, with the reason.
    """
    refusals, found = [], []
    problem = _Problem(inputs, end, sigmas, n_draws)
    for kind in PUSHES:
        try:
            found.append(problem.rows(kind))
        except ValueError as error:
            refusals.append(str(error))
    if not found:
        raise ValueError(refusals[0])
    return min(found, key=lambda r: r.cost)


class _Problem:
    def __init__(self, inputs: Array, end: Array, sigmas: Array, n_draws: int) -> None:
        scale = np.ones(inputs.shape[1])
        scale[0] = sigmas[0] or 1.0  # so that ranks are judged in units of clean data
        self.inputs, self.sigmas, self.n = inputs * scale, sigmas, len(inputs)
        self.start = scale[0]
        self.rank = max(RANK, self.n * _EPS)  # a sampler rounds once a step
        self.targets = np.vstack([self.inputs[1:], (end * scale)[None]])  # what row i makes
        self.size = inputs.shape[1]
        self.first_draw = self.size - n_draws
        # a draw belongs to the row whose target is the first to hold it; -1: the lead row
        held = np.vstack([self.inputs[:1], self.targets])[:, self.first_draw :] != 0.0
        self.row_of_draw = np.where(held.any(axis=0), held.argmax(axis=0) - 1, self.n)
        for i in range(-1, self.n):
            self._draws(i)  # refuses the first row that draws too often
        self.largest = float(np.abs(np.vstack([self.inputs[:1], self.targets])).max())
        self.spaces = self._spaces()

    def rows(self, kind: str) -> Realisation:
        """The rows with one kind of push."""
        covers = [self._cover(kind, i) for i in range(self.n - 1)]
        pushed = sorted({j for needed, _ in covers for j in needed})
        for i, (needed, _) in enumerate(covers):
            if not set(needed) <= set([j for j in pushed if j <= i][-SLOTS:]):
                raise self._too_much(i)
        result = Realisation(self._lead(), kind=kind)
        anchor: Array | None = None
        for i in range(self.n):
            known = {"x": self.inputs[i]}
            before = [j for j in pushed if j < i][-SLOTS:]
            known |= {f"h{age}": self._push(kind, j) for age, j in enumerate(reversed(before))}
            if anchor is not None:
                known["y"] = anchor
            plan = Plan(self._solve(self.targets[i], known, i), push=i in pushed)
            plan.draws = self._draws(i)
            if i < self.n - 1 and covers[i][1]:
                after = [self._push(kind, j) for j in pushed if j <= i][-SLOTS:]
                anchor, plan.y = self._anchor(i, known, [self.targets[i], *after])
            result.rows.append(plan)
        return result

    def _draws(self, i: int) -> tuple[int, ...]:
        found = tuple(int(k) for k in np.flatnonzero(self.row_of_draw == i))
        if len(found) > DRAWS:
            raise ValueError(
                f"more noise than a row has: {len(found)} draws after evaluation {i + 1} of "
                f"{self.n}, at most {DRAWS} fit"
            )
        return found

    def _fresh(self, i: int) -> dict[str, int]:
        """Coordinates that row i is the first to know, by term."""
        output = {"d": 1 + i} if i >= 0 else {}
        return output | {f"n{k}": self.first_draw + j for k, j in enumerate(self._draws(i), 1)}

    def _lead(self) -> Plan | None:
        first = self.inputs[0]
        terms = {"x": float(first[0] / self.start)}
        terms |= {term: float(first[c]) for term, c in self._fresh(-1).items()}
        return None if terms == {"x": 1.0} else Plan(terms, draws=self._draws(-1))

    def _spaces(self) -> list[Array]:
        """S_i for each row, as few vectors as it has dimensions."""
        spaces: list[Array] = []
        future = np.zeros((0, self.size))
        for i in reversed(range(self.n)):
            spaces.insert(0, self._compressed(np.vstack([self.targets[i][None], future])))
            future = spaces[0].copy()
            future[:, list(self._fresh(i).values())] = 0.0
        return spaces

    def _compressed(self, vectors: Array) -> Array:
        _, s, v = np.linalg.svd(vectors, full_matrices=False)
        keep = s > self.rank * self.largest
        return np.asarray(s[keep, None] * v[keep])

    def _outside(self, space: Array, known: list[Array]) -> Array:
        """What the span of known vectors leaves of the vectors of a space."""
        unit = np.array([v / np.linalg.norm(v) for v in known if v.any()])
        u, s, _ = np.linalg.svd(unit.T, full_matrices=False)
        u = u[:, s > self.rank]
        for _ in range(2):  # once more for what cancellation left
            space = space - (space @ u) @ u.T
        return space

    def _push(self, kind: str, i: int) -> Array:
        """What evaluation i pushes."""
        output = np.zeros(self.size)
        output[1 + i] = 1.0
        if kind == "data":
            return output
        return np.asarray((self.inputs[i] - output) / (self.sigmas[i] or 1.0))

    def _cover(self, kind: str, i: int) -> tuple[list[int], bool]:
        """Evaluations whose pushes with x, and with y if the flag says so, span S_i."""
        for anchors in (0, 1):
            for count in range(min(i + 1, 3 * SLOTS) + 1):
                ages = list(range(count))
                if not self._covers(kind, i, ages, anchors):
                    continue
                for age in range(count):  # those in between may be of no use
                    fewer = [a for a in ages if a != age]
                    if self._covers(kind, i, fewer, anchors):
                        ages = fewer
                if len(ages) <= SLOTS:
                    return [i - a for a in ages], bool(anchors)
        raise self._too_much(i)

    def _covers(self, kind: str, i: int, ages: list[int], anchors: int) -> bool:
        known = [self.targets[i], *(self._push(kind, i - a) for a in ages)]
        return len(self._compressed(self._outside(self.spaces[i], known))) <= anchors

    def _too_much(self, i: int) -> ValueError:
        return ValueError(
            f"more history than a table has: what follows evaluation {i + 1} of {self.n} depends "
            f"on {len(self.spaces[i])} states or predictions of the past, not all of them among "
            f"the state, one anchor and the {SLOTS} newest predictions pushed"
        )

    def _anchor(
        self, i: int, known: dict[str, Array], after: list[Array]
    ) -> tuple[Array | None, dict[str, float] | None]:
        """The anchor after row i, and its coefficients if it is not the one before."""
        space = self.spaces[i]
        oldest_first = reversed([t for t in known if t[0] == "h"])
        candidates = [t for t in ("y", "x", *oldest_first) if t in known]
        outside = [self._outside(space, [*after, known[t]]) for t in candidates]
        # differences below rounding are no reason to prefer one
        misses = [max(float(np.abs(v).max()), _EPS * self.largest) for v in outside]
        best = int(np.argmin(misses))
        if misses[best] <= self.rank * self.largest:
            term = candidates[best]
            return known[term], None if term == "y" else {term: 1.0}
        left = np.linalg.norm(self._outside(space, after), axis=1)
        vector = space[int(left.argmax())]
        return vector, self._solve(vector, known, i)

    def _solve(self, target: Array, known: dict[str, Array], i: int) -> dict[str, float]:
        """Coefficients of a vector by term, of as few terms as give it."""
        fresh = self._fresh(i)
        found = {term: float(target[c]) for term, c in fresh.items() if target[c] != 0.0}
        rest = target.copy()
        rest[list(fresh.values())] = 0.0
        size = float(np.linalg.norm(target))
        history = [t for t in known if t[0] == "h"]
        tries: list[list[str]] = [[]] + [
            ["x", *anchor, *history[:k]]
            for anchor in ([], ["y"])
            if set(anchor) <= set(known)
            for k in range(len(history) + 1)
        ]
        best: tuple[float, dict[str, float]] = (np.inf, {})
        for terms in tries:
            coefficients, left, largest = np.zeros(0), rest, size
            if terms:
                columns = np.array([known[t] for t in terms]).T
                lengths = np.maximum(np.linalg.norm(columns, axis=0), np.finfo(float).tiny)
                coefficients = np.linalg.lstsq(columns / lengths, rest, rcond=RANK)[0] / lengths
                left = rest - columns @ coefficients
                # the sampler's own rounding is of its largest term
                largest = max(size, float(np.abs(coefficients * lengths).max()))
            miss = float(np.linalg.norm(left)) / (largest or 1.0)
            if miss < best[0]:
                best = miss, dict(zip(terms, map(float, coefficients), strict=True))
            if miss <= EXACT:
                break
        if best[0] > RESIDUAL:
            raise ValueError(
                f"the row of evaluation {i + 1} of {self.n} could not be solved for: it misses "
                f"{best[0]:.1e} of the state"
            )
        return {t: c for t, c in (best[1] | found).items() if c != 0.0}
