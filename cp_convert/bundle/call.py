"""The part of the manifest that tells how the model is called. No torch, no tensorrt."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
VariantName = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]


class Struct(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Common options of every part of the manifest."""


class Io(Struct, frozen=True):
    """One binding of every engine; all ranks have the same."""

    name: str
    mode: Literal["input", "output"]
    dtype: str
    shape: list[Count]


class Frozen(Struct, frozen=True):
    """An argument of ``forward`` whose value is part of the engine.

    ``value`` is its ``repr``. ``sha256`` is there for tensors that were frozen by name, which
    ``repr`` shortens; see :func:`cp_convert.ir.frozen_value.digest_of`.
    """

    name: str
    value: str
    sha256: Sha256 | None


class Returned(Struct, frozen=True):
    """What ``forward`` returns, one node of the tree.

    ``kind`` is ``tensor`` (``name`` is its binding), ``none`` (nothing that changes), a container,
    or ``fields`` for an object with named fields, such as a dataclass (``name`` is its class).
    ``keys`` name a mapping's or an object's ``items``.
    """

    kind: Literal["tensor", "none", "tuple", "list", "mapping", "fields"]
    name: str | None
    keys: list[str]
    items: list[Returned]


class Forward(Struct, frozen=True):
    """The model's own signature: its parameters in order, and what it returns.

    ``defaults`` are the values, as ``repr``, of those that may be left out.
    """

    arguments: list[str]
    defaults: dict[str, str]
    returned: Returned


class Request(Struct, frozen=True):
    """What besides the model's file decides which dense model this is, and its inputs.

    ``variant`` names these inputs where the bundle has others; ``batch`` and ``text`` (in tokens)
    are what a preset was asked for.
    """

    tiny: bool
    resolution: str | None
    freeze: list[str]
    variant: VariantName | None
    batch: Positive | None
    text: Positive | None
