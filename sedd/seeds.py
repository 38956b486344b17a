"""Seeds: numbers of 64 bits, every bit of which is used, wherever one is taken."""

import operator

from sedd.errors import UserError


def check_seed(seed: int, name: str = "seed") -> int:
    """The seed as an int. UserError, which calls it by the name, unless it is a whole number below 2**64, 0 or more."""
    try:
        number = operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**64:
        raise UserError(f"{name} must be a whole number from 0 to 2**64 - 1, not {seed!r}")
    return number
