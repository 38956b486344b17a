"""Seeds: 64-bit integers, of which all bits are used."""

import operator

from sedd.errors import UserError


def check_seed(seed: int, name: str = "seed") -> int:
    """Returns the seed as an int. UserError, with `name` in it, unless it is an integer in [0, 2**64)."""
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**64:
        raise UserError(f"{name} must be a whole number from 0 to 2**64 - 1, not {seed!r}")
    return number
