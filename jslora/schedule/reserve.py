"""How many pages will be held at most, if every row grows to its end and nobody joins.

Room that is free now is not free later: rows grow by a token a step until they end, and give all
back then. The most ever held is found without playing it through, because between two ends pages
only grow: it is enough to look at the step in which each row ends, just before it leaves. This is
S-LoRA's test of admission (arXiv 2311.03285, in its code), here exact in pages of every row instead
of tokens in all.

Invariant: the peak is exactly the one that playing all rows to their ends would reach, so it is
never below the pages held now. Host only: no jax.
"""

import copy

import numpy as np


class Future:
    """Rows that run, and the pages they all hold in the step in which each of them ends.

    One row more, asked about or taken in, costs time in proportion to the rows.
    """

    def __init__(self, held: np.ndarray, remaining: np.ndarray, page_size: int) -> None:
        """Take in rows: tokens that each holds now, and how many more at its end, both (rows,)."""
        assert held.shape == remaining.shape and held.ndim == 1, f"{held.shape} {remaining.shape}"
        assert page_size > 0, f"a page of {page_size} tokens"
        self._size, self._held, self._remaining = page_size, held, remaining
        self._at_ends: np.ndarray | None = None  # not needed while there is room enough for all

    @property
    def most(self) -> int:
        """Pages of all rows if each held as many as at its end: the peak is no higher."""
        return int((-(-(self._held + self._remaining) // self._size)).sum())

    @property
    def peak(self) -> int:
        """The most pages ever held at once."""
        return int(self._pages.max(initial=0))

    @property
    def _pages(self) -> np.ndarray:
        """Pages of all rows that are still there when each ends."""
        if self._at_ends is None:
            order = np.argsort(-self._remaining)
            self._held, self._remaining = self._held[order].astype(np.int64), self._remaining[order]
            self._at_ends = _pages_at_ends(self._held, self._remaining, self._size)
        return self._at_ends

    def copy(self) -> "Future":
        """Another one that rows may join; what is known of this one's peak is not lost."""
        assert len(self._pages) == len(self._held), f"{len(self._pages)} ends of {len(self._held)}"
        return copy.copy(self)

    def join(self, held: int, remaining: int, most: float = np.inf) -> bool:
        """Take in one more row, unless the peak would then be above `most`; whether it was."""
        pages, at_its_end = self._beside(held, remaining)
        if max(int(pages.max(initial=0)), at_its_end) > most:
            return False
        self._held = np.append(self._held, held)
        self._remaining = np.append(self._remaining, remaining)
        self._at_ends = np.append(pages, at_its_end)
        return True

    def _beside(self, held: int, remaining: int) -> tuple[np.ndarray, int]:
        """Pages when each row ends, and when this one more does, which counts in all of them."""
        pages = self._pages
        own = np.where(self._remaining <= remaining, -(-(held + self._remaining) // self._size), 0)
        there = self._held[self._remaining >= remaining]
        others = int((-(-(there + remaining) // self._size)).sum())
        return pages + own, others - (-(held + remaining) // self._size)


def _pages_at_ends(held: np.ndarray, remaining: np.ndarray, size: int) -> np.ndarray:
    """Pages of all rows still there when each ends, (rows,), of rows sorted last to end first.

    Row j holds ceil((held_j + t) / size) pages after t steps. Split held_j + size - 1 and t into
    whole pages and a rest each: these are the whole ones, and one more if the rests fill a page.
    So the wholes add up in running sums, and how many more there are is counted by rest.
    Of rows that end together only the last counts all of them, which is the most.
    """
    whole, rest = np.divmod(held + (size - 1), size)
    steps, left = np.divmod(remaining, size)
    rows = np.arange(len(held))
    at_least = np.cumsum(rest[:, None] >= size - np.arange(size), axis=0, dtype=np.int32)
    return np.cumsum(whole) + (rows + 1) * steps + at_least[rows, left]
