"""The ``cp::*`` custom operators: signatures, shapes, and their meaning on all ranks at once.

A program that contains them is the same for every rank (SPMD). They cannot be run on one rank
alone; :func:`on_all_ranks` computes each from the list of all ranks' values, which is what the
proof does, and ``cp_convert.converters`` lowers each to TensorRT.

Every collective carries its groups: ``groups`` lists all ranks, ``size`` to a group
(:attr:`cp_convert.mesh.Axis.flat`). As in TensorRT's ``IDistCollectiveLayer``, collectives act on
dimension 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..mesh import Axis, split_groups
from . import attention8

_LIBRARY: Final = torch.library.Library("cp", "DEF")

_GROUPS = "int[] groups, int size"
_SPMD_SCHEMAS: Final = (
    f"shard(Tensor x, int dim, {_GROUPS}) -> Tensor",
    f"all_gather(Tensor x, {_GROUPS}) -> Tensor",
    f"all_to_all(Tensor x, {_GROUPS}) -> Tensor",
    f"broadcast(Tensor x, int root, {_GROUPS}) -> Tensor",
    f"all_reduce(Tensor x, str kind, {_GROUPS}) -> Tensor",
    f"reduce(Tensor x, str kind, int root, {_GROUPS}) -> Tensor",
    f"reduce_scatter(Tensor x, str kind, {_GROUPS}) -> Tensor",
    f"gather(Tensor x, int root, {_GROUPS}) -> Tensor",
    f"scatter(Tensor x, int root, {_GROUPS}) -> Tensor",
    f"fused_attention(Tensor query, Tensor key, Tensor value, float? scale, {_GROUPS}) -> Tensor",
)
for _schema in _SPMD_SCHEMAS:
    # The tag keeps constant folding away: the value depends on the rank, not on the arguments
    # alone, and torch's folder evaluates whatever is not tagged.
    _LIBRARY.define(_schema, tags=(torch.Tag.nondeterministic_seeded,))
# aten.scaled_dot_product_attention's own signature, under a name that no decomposition table
# knows: decompositions were seen to tear the aten operator apart (ADR 5). With `steps` it reads
# codes of 8 bits (attention8).
_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
    "float dropout_p=0.0, bool is_causal=False, *, float? scale=None, "
    "bool enable_gqa=False, float[]? steps=None) -> Tensor"
)
# What a program returns, as a tensor of its own: TensorRT cannot return one tensor under two
# names, nor an input.
_LIBRARY.define("result(Tensor x) -> Tensor")
# A line of the plan, in a program that is still dense: the sequence is split or gathered here.
_LIBRARY.define("mark(Tensor x, str kind, int dim) -> Tensor")


def _fake(name: str) -> Callable[[Callable[..., Tensor]], Callable[..., Tensor]]:
    def register(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        torch.library.register_fake(f"cp::{name}", function, lib=_LIBRARY)
        return function

    return register


@_fake("shard")
def _shard_fake(x: Tensor, dim: int, groups: Sequence[int], size: int) -> Tensor:
    shape = list(x.shape)
    shape[dim] //= size
    return x.new_empty(shape)


@_fake("all_gather")
def _all_gather_fake(x: Tensor, groups: Sequence[int], size: int) -> Tensor:
    return x.new_empty([x.shape[0] * size, *x.shape[1:]])


@_fake("all_to_all")
def _all_to_all_fake(x: Tensor, groups: Sequence[int], size: int) -> Tensor:
    return x.new_empty(x.shape)


@_fake("broadcast")
def _broadcast_fake(x: Tensor, root: int, groups: Sequence[int], size: int) -> Tensor:
    return x.new_empty(x.shape)


@_fake("all_reduce")
def _all_reduce_fake(x: Tensor, kind: str, groups: Sequence[int], size: int) -> Tensor:
    return x.new_empty(x.shape)


@_fake("reduce")
def _reduce_fake(x: Tensor, kind: str, root: int, groups: Sequence[int], size: int) -> Tensor:
    return x.new_empty(x.shape)


@_fake("reduce_scatter")
def _reduce_scatter_fake(x: Tensor, kind: str, groups: Sequence[int], size: int) -> Tensor:
    return x.new_empty([x.shape[0] // size, *x.shape[1:]])


@_fake("gather")
def _gather_fake(x: Tensor, root: int, groups: Sequence[int], size: int) -> Tensor:
    return x.new_empty([x.shape[0] * size, *x.shape[1:]])


@_fake("scatter")
def _scatter_fake(x: Tensor, root: int, groups: Sequence[int], size: int) -> Tensor:
    return x.new_empty([x.shape[0] // size, *x.shape[1:]])


@_fake("mark")
def _mark_fake(x: Tensor, kind: str, dim: int) -> Tensor:
    return x.new_empty(x.shape)


@_fake("attention")
def _attention_fake(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return query.new_empty([*query.shape[:-1], value.shape[-1]])


@_fake("fused_attention")
def _fused_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None, groups: Sequence[int], size: int
) -> Tensor:
    return _attention_fake(query, key, value)


@_fake("result")
def _result_fake(x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


_LIBRARY.impl("result", torch.clone, "CPU")
_LIBRARY.impl("result", torch.clone, "CUDA")
for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("mark", lambda x, kind, dim: x.clone(), _device)
    _LIBRARY.impl("attention", attention8.attention, _device)


def shard(x: Tensor, dim: int, axis: Axis) -> Tensor:
    """This rank's equal part of ``x`` along ``dim``: ``[..., n, ...] -> [..., n / size, ...]``."""
    return torch.ops.cp.shard(x, dim % x.dim(), axis.flat, axis.size)  # type: ignore[no-any-return]


def all_gather(x: Tensor, axis: Axis) -> Tensor:
    """All ranks' ``x`` joined in rank order on dimension 0: ``[n, ...] -> [size * n, ...]``."""
    return torch.ops.cp.all_gather(x, axis.flat, axis.size)  # type: ignore[no-any-return]


def all_to_all(x: Tensor, axis: Axis) -> Tensor:
    """Block ``j`` of rank ``i`` becomes block ``i`` of rank ``j``; dimension 0 holds the blocks."""
    return torch.ops.cp.all_to_all(x, axis.flat, axis.size)  # type: ignore[no-any-return]


def broadcast(x: Tensor, root: int, axis: Axis) -> Tensor:
    """The ``x`` of the group's member number ``root``, on every rank; the shape is unchanged."""
    return torch.ops.cp.broadcast(x, root, axis.flat, axis.size)  # type: ignore[no-any-return]


def all_reduce(x: Tensor, kind: str, axis: Axis) -> Tensor:
    """All ranks' ``x`` combined elementwise (:data:`REDUCTIONS`), of the same shape."""
    return torch.ops.cp.all_reduce(x, kind, axis.flat, axis.size)  # type: ignore[no-any-return]


def reduce(x: Tensor, kind: str, root: int, axis: Axis) -> Tensor:
    """:func:`all_reduce` for the group's member number ``root``; undefined on the others."""
    return torch.ops.cp.reduce(x, kind, root, axis.flat, axis.size)  # type: ignore[no-any-return]


def reduce_scatter(x: Tensor, kind: str, axis: Axis) -> Tensor:
    """Every rank's own block of :func:`all_reduce`: ``[n, ...] -> [n / size, ...]``."""
    return torch.ops.cp.reduce_scatter(x, kind, axis.flat, axis.size)  # type: ignore[no-any-return]


def gather(x: Tensor, root: int, axis: Axis) -> Tensor:
    """:func:`all_gather` for the group's member number ``root``; undefined on the others."""
    return torch.ops.cp.gather(x, root, axis.flat, axis.size)  # type: ignore[no-any-return]


def scatter(x: Tensor, root: int, axis: Axis) -> Tensor:
    """Block ``i`` of the root's ``x`` on member ``i``: ``[n, ...] -> [n / size, ...]``."""
    return torch.ops.cp.scatter(x, root, axis.flat, axis.size)  # type: ignore[no-any-return]


def mark(x: Tensor, kind: str, dim: int) -> Tensor:
    """``x`` itself; says that the sequence is to be split or gathered here along ``dim``."""
    return torch.ops.cp.mark(x, kind, dim % x.dim())  # type: ignore[no-any-return]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    *,
    scale: float | None,
    causal: bool = False,
    steps: attention8.Steps | None = None,
) -> Tensor:
    """``softmax(q @ k^T * scale + mask) @ v`` over ``[B, H, S, D]``: TensorRT's attention.

    With ``steps`` over FP8 codes of q, k and v (:mod:`.attention8`).
    """
    more: dict[str, Any] = {} if steps is None else {"steps": list(steps)}
    return torch.ops.cp.attention(q, k, v, mask, 0.0, causal, scale=scale, **more)  # type: ignore[no-any-return]


def fused_attention(q: Tensor, k: Tensor, v: Tensor, axis: Axis, *, scale: float | None) -> Tensor:
    """:func:`attention` over the ``k`` and ``v`` of all ranks, which the layer itself exchanges."""
    return torch.ops.cp.fused_attention(q, k, v, scale, axis.flat, axis.size)  # type: ignore[no-any-return]


ATTENTION: Final = torch.ops.cp.attention.default
FUSED: Final = torch.ops.cp.fused_attention.default
MARK: Final = torch.ops.cp.mark.default

COLLECTIVES: Final = (
    torch.ops.cp.all_gather.default,
    torch.ops.cp.all_to_all.default,
    torch.ops.cp.broadcast.default,
    torch.ops.cp.all_reduce.default,
    torch.ops.cp.reduce.default,
    torch.ops.cp.reduce_scatter.default,
    torch.ops.cp.gather.default,
    torch.ops.cp.scatter.default,
)
"""The operators that communicate; each becomes one ``IDistCollectiveLayer``."""


Group = list[Tensor]


def _meaning_shard(group: Group, dim: int) -> Group:
    return [x.chunk(len(group), dim)[i] for i, x in enumerate(group)]


def _meaning_all_gather(group: Group) -> Group:
    return [torch.cat(group)] * len(group)


def _meaning_all_to_all(group: Group) -> Group:
    blocks = [x.chunk(len(group)) for x in group]
    return [torch.cat([blocks[i][j] for i in range(len(group))]) for j in range(len(group))]


def _meaning_broadcast(group: Group, root: int) -> Group:
    return [group[root]] * len(group)


REDUCTIONS: Final[dict[str, Any]] = {
    "sum": torch.sum,
    "prod": torch.prod,
    "max": torch.amax,
    "min": torch.amin,
    "avg": torch.mean,
}
"""What the reducing collectives can do with one number of every rank."""


def _meaning_all_reduce(group: Group, kind: str) -> Group:
    return [REDUCTIONS[kind](torch.stack(group), dim=0)] * len(group)


def _meaning_reduce(group: Group, kind: str, root: int) -> Group:
    (reduced, *_) = _meaning_all_reduce(group, kind)
    return _on_root(reduced, root, len(group))


def _meaning_reduce_scatter(group: Group, kind: str) -> Group:
    return _meaning_shard(_meaning_all_reduce(group, kind), 0)


def _meaning_gather(group: Group, root: int) -> Group:
    return _on_root(torch.cat(group), root, len(group))


def _meaning_scatter(group: Group, root: int) -> Group:
    return list(group[root].chunk(len(group)))


def _meaning_fused_attention(group: list[tuple[Tensor, ...]], scale: float | None) -> Group:
    k, v = (torch.cat([member[i] for member in group], dim=2) for i in (1, 2))
    return [attention(member[0], k, v, scale=scale) for member in group]


def _on_root(value: Tensor, root: int, size: int) -> Group:
    """Only the root's result is defined; the others' must not be read, and NaN shows who does."""
    is_float = value.dtype.is_floating_point
    poison = float("nan") if is_float else torch.iinfo(value.dtype).min
    undefined = torch.full_like(value, poison)
    return [value if member == root else undefined for member in range(size)]


_ON_A_GROUP: Final[dict[Any, Callable[..., Group]]] = {
    torch.ops.cp.shard.default: _meaning_shard,
    torch.ops.cp.all_gather.default: _meaning_all_gather,
    torch.ops.cp.all_to_all.default: _meaning_all_to_all,
    torch.ops.cp.broadcast.default: _meaning_broadcast,
    torch.ops.cp.all_reduce.default: _meaning_all_reduce,
    torch.ops.cp.reduce.default: _meaning_reduce,
    torch.ops.cp.reduce_scatter.default: _meaning_reduce_scatter,
    torch.ops.cp.gather.default: _meaning_gather,
    torch.ops.cp.scatter.default: _meaning_scatter,
    FUSED: _meaning_fused_attention,
}


def is_spmd(target: Any) -> bool:
    """Whether ``target`` means something only on all ranks together."""
    return target in _ON_A_GROUP


def on_a_group(target: Any, values: list[Any], args: Sequence[Any]) -> list[Tensor]:
    """Compute ``target`` on the members of one group; ``args`` are without ``groups, size``."""
    return _ON_A_GROUP[target](values, *args)


def on_all_ranks(target: Any, values: Sequence[Any], args: Sequence[Any]) -> list[Tensor]:
    """Compute ``target`` on every rank from every rank's operands.

    Args:
        target: a ``cp::*`` operator for which :func:`is_spmd` holds.
        values: the operand of every rank, or a tuple where there are several.
        args: the remaining arguments, ending in ``groups, size``.
    """
    *rest, flat, size = args
    results: dict[int, Tensor] = {}
    for group in split_groups(flat, size):
        parts = on_a_group(target, [values[rank] for rank in group], rest)
        results.update(zip(group, parts, strict=True))
    return [results[rank] for rank in range(len(values))]
