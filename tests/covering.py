"""Pairwise covering designs: rows in which every two levels of every two factors meet."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Row = dict[str, Any]
_TRIES = 6  # completions of a pair that are weighed against each other


def covering(
    factors: Mapping[str, Sequence[Any]], valid: Callable[[Row], bool]
) -> tuple[list[Row], list[Row]]:
    """Rows that cover all pairs of levels, and rows that `valid` refuses for a pair it never takes.

    Greedy and deterministic: the first pair that is not covered yet is completed in a few ways,
    each time with the level that covers most pairs, and the valid row that covers most is kept.

    Args:
        factors: name -> its levels.
        valid: whether a row can be run at all.
    """
    names = list(factors)
    places = {n: i for i, n in enumerate(names)}
    open_pairs = {
        (a, i, b, j): None
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }

    def pairs(row: dict[str, int]) -> list[tuple[str, int, str, int]]:
        chosen = sorted(row, key=places.__getitem__)
        return [(a, row[a], b, row[b]) for a, b in itertools.combinations(chosen, 2)]

    def gain(row: dict[str, int]) -> int:
        return sum(pair in open_pairs for pair in pairs(row))

    def worth(row: dict[str, int]) -> tuple[int, int]:
        return -sum(pair in never for pair in pairs(row)), gain(row)

    def completed(start: dict[str, int], turn: int) -> dict[str, int]:
        row = dict(start)
        rest = [n for n in names if n not in row]
        for name in rest[turn % max(len(rest), 1) :] + rest[: turn % max(len(rest), 1)]:
            levels = len(factors[name])
            order = [(turn + k) % levels for k in range(levels)]
            row[name] = max(order, key=lambda i, name=name: worth({**row, name: i}))
        return row

    def shown(row: dict[str, int]) -> Row:
        return {n: factors[n][row[n]] for n in names}

    never: set[tuple[str, int, str, int]] = set()
    rows: list[Row] = []
    refused: list[Row] = []
    while open_pairs:
        a, i, b, j = next(iter(open_pairs))
        tries = [completed({a: i, b: j}, turn) for turn in range(_TRIES)]
        # the simplest row that has the pair, for pairs that go with few others
        tries.append(dict.fromkeys(names, 0) | {a: i, b: j})
        tries.sort(key=gain, reverse=True)
        row = next((r for r in tries if valid(shown(r))), None)
        if row is None:
            del open_pairs[a, i, b, j]
            never.add((a, i, b, j))
            refused.append(shown(tries[-1]))
            continue
        for pair in pairs(row):
            open_pairs.pop(pair, None)
        rows.append(shown(row))
    return rows, refused
