"""A strategy by itself, over any layout and with a mask: what the tests of single ones share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from cp_convert.ir import ops
from cp_convert.ir.attention import Site
from cp_convert.ir.layout import Layout, merged
from cp_convert.ir.program import Binding, Lowered
from cp_convert.mesh import Axis
from cp_convert.strategies import Strategy


def site_of(
    tensors: list[Tensor],
    world: int,
    *,
    layout: Layout | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
) -> Site:
    """The self-attention over whole Q, K and V, ``[B, H, S, D]``, spread by ``layout``."""
    (batch, heads, tokens, dim), kv_heads = tensors[0].shape, tensors[1].shape[1]
    layout = Layout.even([tokens], world) if layout is None else layout
    return Site(
        index=0, module="attn", source=None, batch=batch, heads=heads, kv_heads=kv_heads,
        head_dim=dim, queries=layout.local, keys=layout.local, query_layout=layout,
        key_layout=layout, mask=None if mask is None else tuple(mask.shape), causal=causal,
        dtype=tensors[0].dtype, mask_dtype=None if mask is None else mask.dtype,
    )  # fmt: skip


def attention_alone(
    strategy: Strategy, tensors: list[Tensor], mask: Tensor | None, site: Site, axis: Axis
) -> Lowered:
    """Shards whole Q, K and V, attends, and gathers the output in the model's order."""
    layout = site.query_layout
    assert layout is not None

    def whole(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        parts = [_sharded(x, layout, axis) for x in (q, k, v)]
        out = strategy.attend(parts[0], parts[1], parts[2], mask, site=site, axis=axis)
        joined = ops.all_gather(out.movedim(2, 0), axis).movedim(0, 2)
        return _in_order(joined, layout)

    def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return whole(q, k, v, None)

    given = [*tensors, *([] if mask is None else [mask])]
    forward: Any = unmasked if mask is None else whole
    with torch._subclasses.FakeTensorMode() as mode, torch.no_grad():
        graph_module = make_fx(forward)(*[mode.from_tensor(x) for x in given])
    graph = graph_module.graph
    nodes = [n.name for n in graph.find_nodes(op="placeholder")]
    names = ("q", "k", "v", "mask")
    inputs = [
        Binding(b, n, x.dtype, tuple(x.shape)) for b, n, x in zip(names, nodes, given, strict=False)
    ]
    result: Any = graph.output_node().all_input_nodes[0]
    output = Binding("out", result.name, tensors[0].dtype, tuple(result.meta["val"].shape))
    return Lowered(graph_module, {}, tuple(inputs), (output,))


def _sharded(x: Tensor, layout: Layout, axis: Axis) -> Tensor:
    """This rank's slots of ``x``, segment by segment; padding holds zeros."""
    parts = []
    for start, segment in zip(layout.cuts, layout.segments, strict=False):
        part = x.narrow(2, start, segment.length)
        missing = layout.size * segment.local - segment.length
        if missing:
            part = torch.cat([part, part.new_zeros(*x.shape[:2], missing, x.shape[3])], 2)
        parts.append(ops.shard(part, 2, axis))
    return torch.cat(parts, 2)


def _in_order(x: Tensor, layout: Layout) -> Tensor:
    """All ranks' slots joined, as the model had the tokens: padding dropped."""
    slots, tokens = (
        [one for start, stop in ranges for one in range(start, stop)]
        for ranges in (layout.slots, layout.order)
    )
    places = [slots[tokens.index(token)] for token in range(layout.length)]
    return torch.cat([x.narrow(2, a, b - a) for a, b in merged((p, p + 1) for p in places)], 2)
