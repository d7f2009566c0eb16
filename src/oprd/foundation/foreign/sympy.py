"""What we use of SymPy that it keeps private."""

import sympy


def known_bits(number: sympy.Float) -> int:
    """How many bits of a number `sympy.N` could make sure of: few where what it computes is zero.

    Until `Float` has a public property for it (tested with 1.14).
    """
    return number._prec
