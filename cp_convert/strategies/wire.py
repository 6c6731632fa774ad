"""What goes over the wire: numbers as they are, or codes of 8 bits. In and out: tensors.

With ``--exchange int8`` a tensor is quantized just before its collective, each head of each token
by its own largest number, and is what it was (but for the rounding) right after::

    codes, largest = encoded(x)          8 bits a number, and one number for D of them
    x' = decoded(collective(codes), collective(largest))

No calibration, and nothing depends on how tokens are spread over the ranks: the dense model with
the same rounding of its queries, keys and values computes the same (:mod:`.rounded`).
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..ir.quantize import decoded, encoded


def sent(collective: Callable[[Tensor], Tensor], x: Tensor, *, eight: bool) -> Tensor:
    """``collective(x)``, whose last dimension is that of a head.

    Args:
        collective: moves rows about, and leaves what is in a row.
        x: ``[..., D]``.
        eight: whether it travels in 8 bits.
    """
    if not eight:
        return collective(x)
    codes, largest = encoded(x)
    return decoded(collective(codes), collective(largest), x.dtype)
