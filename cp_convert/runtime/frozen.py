"""Arguments that are part of the engines, against what a caller gives for them."""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import Any, Final

from torch import Tensor

from ..bundle.manifest import Frozen
from ..errors import UsageError
from ..ir.frozen_value import digest_of, leaves

_SHOWN: Final = 80


def check_frozen(name: str, value: Any, inside: Sequence[Frozen]) -> None:
    """Refuse another value for an argument than the engines were built with.

    Numbers are compared as numbers (1 is 1.0), containers by what they hold in order, ``None``
    within them left out, tensors that were frozen by name by their digest.

    Args:
        name: the argument's.
        value: what is given.
        inside: what the manifest has for it.

    Raises:
        UsageError: it is another; both are named.
    """
    digests = [one.sha256 for one in inside if one.sha256 is not None]
    if digests:
        same = [digest_of(value)] == digests
    else:
        same = is_same(value, [literal(one.value) for one in inside])
    if not same:
        built = ", ".join(_short(one.value) for one in inside)
        raise UsageError(
            f"{name} is {shown(value)}; the engines were built with {built}, which is part of "
            "them.",
            hint="pass that value, or convert again with this one.",
        )


def is_same(value: Any, other: Any) -> bool:
    """Whether two values hold the same; no tensor is the same as a number."""
    ours, theirs = _held(value), _held(other)
    return len(ours) == len(theirs) and all(map(_equal, ours, theirs))


def shown(value: Any) -> str:
    """A value in a message, shortened; of a tensor its shape."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return _short(repr(value))


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


class _Verbatim:
    """A value of which only the ``repr`` is known."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


def literal(text: str) -> Any:
    """A value out of its ``repr``, as the manifest keeps it."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return _Verbatim(text)


def _held(value: Any) -> list[Any]:
    return [leaf for _, leaf in leaves(value) if leaf is not None]


def _equal(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, Tensor) or isinstance(theirs, Tensor):
        return False
    return bool(ours == theirs) or repr(ours) == repr(theirs)
