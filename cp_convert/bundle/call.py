"""The part of the manifest that tells how the model is called. No torch, no tensorrt."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

Count = Annotated[int, msgspec.Meta(ge=0)]


class Struct(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Common options of every part of the manifest."""


class Io(Struct, frozen=True):
    """One binding of every engine; all ranks have the same."""

    name: str
    mode: Literal["input", "output"]
    dtype: str
    shape: list[Count]


class Frozen(Struct, frozen=True):
    """An argument of ``forward`` that is no tensor and is therefore part of the engine."""

    name: str
    value: str


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
    """The model's own signature: its parameters in order, and what it returns."""

    arguments: list[str]
    returned: Returned
