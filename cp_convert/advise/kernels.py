"""A program to the kernels that run it: products, attentions, what is fused between, collectives.

In: an SPMD program. Out: :class:`Kernel` objects in the order in which they are started. What lies
between products, attentions and collectives is taken together as compilers do that fuse loops
(TorchInductor, TensorRT's Myelin): connected pointwise operators are one kernel, which reads and
writes once what others need. Views cost nothing; a reshape that is no view is a copy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from ..ir import ops
from ..ir.program import HALF, Lowered
from ..mesh import bytes_sent
from ..runtime.curves import TILE

aten: Final = torch.ops.aten
_PRODUCTS: Final[Mapping[Any, int]] = {
    # position of the left operand, whose last dimension is contracted
    aten.mm.default: 0,
    aten.bmm.default: 0,
    aten.matmul.default: 0,
    aten.linear.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}
_RESHAPES: Final = {aten.view.default, aten._reshape_copy.default, aten.reshape.default}
VIEWS: Final = {
    *_RESHAPES, aten.permute.default, aten.transpose.int, aten.expand.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor,
    aten.select.int, aten.alias.default, aten.t.default, aten.split_with_sizes.default,
    aten.unbind.int,
}  # fmt: skip


@dataclass(frozen=True)
class Kernel:
    """One kernel, or one collective, of one rank.

    Attributes:
        kind: ``product``, ``attention``, ``fused`` or ``collective``.
        inputs: positions, in the program's list, of the kernels whose results it reads.
        operations: floating-point operations of a product or an attention.
        bytes: read and written; of a collective, put on the wire.
        half: whether it computes in float16 or bfloat16.
        head_dim: of an attention.
        tiles: of an attention: 128 queries of a head each.
        collective: its operation, such as ``ALL_GATHER``.
        size: ranks that a collective joins.
    """

    kind: str
    inputs: tuple[int, ...]
    operations: int = 0
    bytes: int = 0
    half: bool = True
    head_dim: int = 0
    tiles: int = 1
    collective: str = ""
    size: int = 1


def kernels_of(program: Lowered) -> list[Kernel]:
    """The kernels of one rank's forward, in the order of the program."""
    return _Kernels(program.graph_module.graph).made


def operations(node: fx.Node) -> int:
    """Floating-point operations of a product or an attention; zero for anything else."""
    args: Any = node.args
    if node.target in _PRODUCTS:
        left = args[_PRODUCTS[node.target]].meta["val"]
        return 2 * int(node.meta["val"].numel()) * int(left.shape[-1])
    if node.target is aten.convolution.default:
        return 2 * int(node.meta["val"].numel()) * int(prod(args[1].meta["val"].shape[1:]))
    if node.target is ops.ATTENTION:
        return 4 * int(args[0].meta["val"].numel()) * int(args[1].meta["val"].shape[2])
    return 0


def size_of(value: Any) -> int:
    """Bytes of a tensor, or of several."""
    leaves = pytree.tree_leaves(value)
    return sum(x.numel() * x.element_size() for x in leaves if isinstance(x, Tensor))


@dataclass
class _Fused:
    """Pointwise operators that become one kernel."""

    nodes: list[fx.Node] = field(default_factory=list)


class _Kernels:
    """Walks a graph once; ``made`` is what it found."""

    def __init__(self, graph: fx.Graph) -> None:
        self.made: list[Kernel] = []
        self._at: dict[int, int] = {}
        """Where a fence's kernel, or a group's, is in ``made``, by ``id``."""
        self._group: dict[fx.Node, _Fused] = {}
        self._stage: dict[fx.Node, int] = {}
        for node in graph.nodes:
            self._look_at(node)
        for node in graph.nodes:
            if self._is_fence(node):
                self._emit(node)
        for node in graph.output_node().all_input_nodes:
            self._emitted(_root(node))

    def _look_at(self, node: fx.Node) -> None:
        """How many fences lie before it at most, and with whom it is fused."""
        before = [_root(one) for one in node.all_input_nodes]
        stage = max((self._stage.get(one, 0) for one in before), default=0)
        self._stage[node] = stage + self._is_fence(node)
        if not self._is_pointwise(node):
            return
        same = [self._group[one] for one in before if one in self._group]
        same = [one for one in same if self._stage[one.nodes[0]] == stage]
        group = same[0] if same else _Fused()
        for other in same[1:]:
            if other is not group and self._group[other.nodes[0]] is not group:
                group.nodes += other.nodes
                self._group.update(dict.fromkeys(other.nodes, group))
        group.nodes.append(node)
        self._group[node] = group

    @staticmethod
    def _is_fence(node: fx.Node) -> bool:
        return node.op == "call_function" and (
            node.target in ops.COLLECTIVES or operations(node) > 0
        )

    def _is_pointwise(self, node: fx.Node) -> bool:
        return (
            node.op == "call_function"
            and not is_view(node)
            and not self._is_fence(node)
            and size_of(node.meta.get("val")) > 0
        )

    def _emitted(self, root: fx.Node) -> int | None:
        """The kernel that makes ``root``'s value; ``None`` for what is given."""
        if root in self._group:
            group = self._group[root]
            if id(group) not in self._at:
                self._emit_group(group)
            return self._at[id(group)]
        if self._is_fence(root) and id(root) not in self._at:
            self._emit(root)
        return self._at.get(id(root))

    def _add(self, key: object, kernel: Kernel) -> None:
        self._at[id(key)] = len(self.made)
        self.made.append(kernel)

    def _before(self, roots: Iterable[fx.Node]) -> tuple[int, ...]:
        found = (self._emitted(root) for root in dict.fromkeys(roots))
        return tuple(sorted({one for one in found if one is not None}))

    def _emit(self, node: fx.Node) -> None:
        if id(node) in self._at:
            return
        before = self._before(_root(one) for one in node.all_input_nodes)
        value, work = node.meta["val"], operations(node)
        first: Any = node.args[0]
        half = isinstance(value, Tensor) and value.dtype in HALF
        if work:
            moved = sum(size_of(n.meta.get("val")) for n in node.all_input_nodes) + size_of(value)
            made = Kernel("product", before, work, moved, half)
            if node.target is ops.ATTENTION:
                batch, heads, queries, dim = map(int, first.meta["val"].shape)
                tiles = batch * heads * -(-queries // TILE)
                made = replace(made, kind="attention", head_dim=dim, tiles=tiles)
            self._add(node, made)
            return
        given = first.meta["val"]
        if isinstance(given, Tensor) and not given.is_contiguous():  # NCCL wants it in one piece
            self.made.append(Kernel("fused", before, bytes=2 * size_of(given), half=half))
            before = (len(self.made) - 1,)
        kind, size = str(node.target).split(".")[1].upper(), int(node.args[-1])  # type: ignore[arg-type]
        sent = bytes_sent(kind, size_of(given), size)
        self._add(
            node, Kernel("collective", before, bytes=sent, half=half, collective=kind, size=size)
        )

    def _emit_group(self, group: _Fused) -> None:
        inside = set(group.nodes)
        read = [one for node in group.nodes for one in node.all_input_nodes]
        outside = list(dict.fromkeys(one for one in read if _root(one) not in inside))
        by_root: dict[fx.Node, int] = {}
        for one in outside:
            root = _root(one)
            size = min(size_of(one.meta.get("val")), size_of(root.meta.get("val")))
            by_root[root] = by_root.get(root, 0) + size
        moved = sum(min(n, size_of(root.meta.get("val"))) for root, n in by_root.items())
        moved += sum(size_of(node.meta["val"]) for node in group.nodes if self._is_kept(node))
        self._add(group, Kernel("fused", self._before(map(_root, outside)), bytes=moved))

    def _is_kept(self, node: fx.Node) -> bool:
        """Whether a pointwise result is written out: something outside its kernel reads it."""
        return any(self._group.get(user) is not self._group[node] for user in _readers(node))


def is_view(node: fx.Node) -> bool:
    """Whether the operator moves nothing: it only says how its operand is looked at."""
    if node.op != "call_function" or node.target not in VIEWS:
        return node.op == "call_function" and getattr(node.target, "__name__", "") == "getitem"
    if node.target not in _RESHAPES:
        return True
    first: Any = node.args[0]
    given, value = first.meta["val"], node.meta["val"]
    strided = torch.empty_strided(given.shape, given.stride(), device="meta", dtype=given.dtype)
    try:
        strided.view(value.shape)
    except RuntimeError:  # how torch says that there is no such view
        return False
    return True


def _root(node: fx.Node) -> fx.Node:
    """What a view looks at."""
    while is_view(node):
        node = node.all_input_nodes[0]
    return node


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """Who reads a value, directly or through views."""
    waiting = list(node.users)
    while waiting:
        user = waiting.pop()
        if is_view(user):
            waiting += user.users
        else:
            yield user
