"""Find a traced program's attentions, however they were written; they become ``cp::attention``.

Recognised are ``scaled_dot_product_attention`` (diffusers' processors end in it, and so does
``torch.nn.MultiheadAttention``) and attention written out by hand::

    softmax(Q K^T * scale + mask) V    ->    cp::attention(Q, K, V, mask, scale=scale)

with ``matmul``, ``bmm`` or ``baddbmm``, a multiplied or divided scale, an added mask or one that
fills, and casts and dropout in between. What does not match is left as it is: it is computed
rightly either way, but only a ``cp::attention`` is given to a strategy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import fx

from ..errors import CannotTrace
from ..ir.ops import ATTENTION
from ..ir.program import arguments, module_path, shape, source_line
from ..ir.writer import Writer

aten: Final = torch.ops.aten
_SDPA: Final = aten.scaled_dot_product_attention.default
_SOFTMAX: Final = (aten.softmax.int, aten._softmax.default)
_PRODUCTS: Final = (aten.matmul.default, aten.bmm.default)
_ALIKE: Final = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.dropout.default,
    aten.clone.default,
    aten.type_as.default,
    aten.contiguous.default,
    aten.alias.default,
)


def recognise(graph: fx.Graph) -> int:
    """Put ``cp::attention`` in the place of every attention of ``graph``; returns how many.

    Raises:
        CannotTrace: an attention has more dimensions than TensorRT's.
    """
    graph.eliminate_dead_code()  # such as averaged weights that nothing reads
    writer = _Attentions(graph)
    count = 0
    for node in list(graph.nodes):
        if node.target is _SDPA:
            writer.sdpa(node)
            count += 1
        elif node.target in _SOFTMAX and (found := _written_out(node)) is not None:
            writer.written_out(found)
            count += 1
    graph.eliminate_dead_code()
    graph.lint()
    return count


@dataclass
class _Found:
    """An attention written out by hand."""

    query: fx.Node
    key_t: fx.Node
    value: fx.Node
    result: fx.Node
    scale: float = 1.0
    added: list[fx.Node] = field(default_factory=list)
    hidden: list[fx.Node] = field(default_factory=list)


def _written_out(softmax: fx.Node) -> _Found | None:
    scores = softmax.args[0]
    rank = len(shape(softmax))
    if rank not in (3, 4) or softmax.args[1] not in (-1, rank - 1):
        return None
    weights = softmax
    while len(weights.users) == 1 and (user := next(iter(weights.users))).target in _ALIKE:
        weights = user
    if len(weights.users) != 1:
        return None
    result = next(iter(weights.users))
    if result.target not in _PRODUCTS or result.args[0] is not weights:
        return None
    found = _Found(softmax, softmax, result.args[1], result)  # type: ignore[arg-type]
    if not _scores(scores, found, softmax):
        return None
    leading = {shape(n)[:-2] for n in (found.query, found.key_t, found.value)}
    return found if len(leading) == 1 and len(shape(found.query)) == rank else None


def _scores(node: Any, found: _Found, user: fx.Node) -> bool:
    """Walk back from the softmax to the product, noting masks, then the scale."""
    while isinstance(node, fx.Node) and list(node.users) == [user]:
        user, args = node, node.args
        if node.target in _ALIKE:
            node = args[0]
        elif node.target is aten.add.Tensor and not node.kwargs and found.scale == 1.0:
            node = _with_mask(args, found)
        elif node.target is aten.masked_fill.Scalar and found.scale == 1.0:
            if float(args[2]) > -1e4:  # type: ignore[arg-type]
                return False
            found.hidden.append(args[1])  # type: ignore[arg-type]
            node = args[0]
        elif (factor := _factor(node)) is not None:
            found.scale *= factor
            node = args[0]
        elif node.target in _PRODUCTS:
            found.query, found.key_t = args[0], args[1]  # type: ignore[assignment]
            return True
        elif node.target is aten.baddbmm.default:
            return _added_product(node, found)
        else:
            return False
    return False


def _with_mask(args: Any, found: _Found) -> Any:
    """The scores of ``scores + mask``: the operand that a product leads to."""
    scores, mask = (args[1], args[0]) if _is_product(args[1]) else (args[0], args[1])
    if not isinstance(mask, fx.Node):
        return None
    found.added.append(mask)
    return scores


def _is_product(node: Any) -> bool:
    while isinstance(node, fx.Node) and (node.target in _ALIKE or _factor(node) is not None):
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target in _PRODUCTS


def _factor(node: fx.Node) -> float | None:
    if len(node.args) < 2 or not isinstance(node.args[1], int | float):
        return None
    if node.target in (aten.mul.Tensor, aten.mul.Scalar):
        return float(node.args[1])
    if node.target in (aten.div.Tensor, aten.div.Scalar):
        return 1 / float(node.args[1])
    return None


def _added_product(node: fx.Node, found: _Found) -> bool:
    given = arguments(node)
    if given["beta"] == 1 and found.scale == 1.0:
        found.added.append(given["self"])
    elif given["beta"] != 0:
        return False
    found.scale *= float(given["alpha"])
    found.query, found.key_t = given["batch1"], given["batch2"]
    return True


class _Attentions(Writer):
    """Builds ``cp::attention`` with four-dimensional operands."""

    def sdpa(self, node: fx.Node) -> None:
        """``scaled_dot_product_attention`` of any number of dimensions from 2 to 4."""
        given = arguments(node)
        with self.graph.inserting_before(node):
            self.origin = node
            q, k, v = (given[n] for n in ("query", "key", "value"))
            self._attention(
                node, q, k, v, given["attn_mask"], given["scale"], bool(given["is_causal"])
            )

    def written_out(self, found: _Found) -> None:
        """``softmax(Q K^T * scale + mask) V``."""
        with self.graph.inserting_before(found.result):
            self.origin = found.result
            key = self.op(aten.transpose.int, found.key_t, -1, -2)
            q, v = found.query, found.value
            mask = self._mask(found, q.meta["val"].dtype)
            self._attention(found.result, q, key, v, mask, found.scale, False)

    def _mask(self, found: _Found, dtype: torch.dtype) -> fx.Node | None:
        masks = [
            m if m.meta["val"].dtype == dtype else self.op(aten.to.dtype, m, dtype)
            for m in found.added
        ]
        for hidden in found.hidden:
            zeros = self.op(aten.zeros_like.default, hidden, dtype=dtype)
            masks.append(self.op(aten.masked_fill.Scalar, zeros, hidden, -math.inf))
        total = masks[0] if masks else None
        for mask in masks[1:]:
            total = self.op(aten.add.Tensor, total, mask)
        return total

    def _attention(
        self,
        node: fx.Node,
        q: fx.Node,
        k: fx.Node,
        v: fx.Node,
        mask: fx.Node | None,
        scale: float | None,
        causal: bool,
    ) -> None:
        rank = len(shape(q))
        if not 2 <= rank <= 4:
            raise CannotTrace(
                f"attention over {rank} dimensions is not supported; up to four are.",
                where=f"{module_path(node)} ({source_line(node)})",
                hint="reshape to [batch, heads, sequence, head_dim] first.",
            )
        for _ in range(4 - rank):
            q, k, v = (self.op(aten.unsqueeze.default, x, 0) for x in (q, k, v))
            if mask is not None and len(shape(mask)) > 2:
                mask = self.op(aten.unsqueeze.default, mask, 0)
        k, v = (self._over_batch(x, shape(q)[0]) for x in (k, v))
        grouped = shape(q)[1] != shape(k)[1]
        out = self.op(ATTENTION, q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=grouped)
        for _ in range(4 - rank):
            out = self.op(aten.squeeze.dim, out, 0)
        if out.meta["val"].dtype != node.meta["val"].dtype:
            out = self.op(aten.to.dtype, out, node.meta["val"].dtype)
        node.replace_all_uses_with(out)

    def _over_batch(self, x: fx.Node, batch: int) -> fx.Node:
        if shape(x)[0] == batch:
            return x
        return self.op(aten.expand.default, x, [batch, *shape(x)[1:]])
