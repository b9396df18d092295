"""The few largest of many numbers, in two passes over them: to sort or part a vocabulary takes ten times as long."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_COLUMNS = 512
_ROWS = 4  # fewer of them, and there is nothing to gain


def largest(values: Array, count: int) -> npt.NDArray[np.int64]:
    """Places, ascending, of the ``count`` largest of ``values`` [V], and of those that equal the last of them."""
    size = len(values)
    if count >= size:
        return np.arange(size)
    columns = max(_COLUMNS, 4 * count)
    whole = size - size % columns
    if whole < _ROWS * columns:
        return np.flatnonzero(values >= np.partition(values, size - count)[size - count])
    # So many columns have a value that is no less than this: the one that is looked for isn't either.
    least = np.partition(values[:whole].reshape(-1, columns).max(axis=0), columns - count)[columns - count]
    found = np.flatnonzero(values >= least)
    kept = values[found]
    return np.asarray(found[kept >= np.partition(kept, len(kept) - count)[len(kept) - count]])
