"""Seeds: 64-bit integers, of which all bits are used, and the random streams of data that they key."""

import operator

import numpy as np

from sedd.errors import UserError

# Purposes of `philox`. The batches of epoch e have purpose e, so that with the same seed the first epochs use the
# streams of these purposes. They draw other things from them; other keys would change the batches of existing runs.
HELD_OUT_DOCUMENTS, DOCUMENT_ORDER, SAMPLE_LENGTHS = range(3)


def check_seed(seed: int, name: str = "seed") -> int:
    """Returns the seed as an int. UserError, with `name` in it, unless it is an integer in [0, 2**64)."""
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**64:
        raise UserError(f"{name} must be a whole number from 0 to 2**64 - 1, not {seed!r}")
    return number


def philox(seed: int, purpose: int) -> np.random.Generator:
    """Returns the random stream keyed by (seed, purpose). UserError if the seed is invalid."""
    return np.random.Generator(np.random.Philox(key=np.array([check_seed(seed), purpose], np.uint64)))
