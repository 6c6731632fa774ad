"""Every attention whose keys are sharded becomes the strategy's; the others are left alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from ..errors import CannotShard
from ..ir import ops
from ..ir.attention import Outcome, Refusal
from ..ir.attention8 import steps_of
from ..ir.ops import ATTENTION
from ..ir.program import (
    PROVENANCE,
    Lowered,
    arguments,
    copied,
    erase_dead,
    fake_mode_of,
    module_of,
    module_path,
    source_line,
    tensor_of,
)
from ..ir.sharded import Sharded
from ..mesh import Axis
from . import Site, Strategy
from .tokens import repeated


def rewrite(
    sharded: Sharded,
    strategy: Strategy,
    name: str,
    axis: Axis,
    decompositions: Mapping[Any, Any],
    *,
    eight: str = "",
) -> tuple[Lowered, tuple[Outcome, ...]]:
    """Put ``strategy`` in the place of every attention over sharded keys.

    Args:
        sharded: a sharded program; it stays as it is.
        strategy: the module of :data:`cp_convert.strategies.STRATEGIES` to apply.
        name: what the strategy is called; the new nodes carry it.
        axis: the ranks that share the sequence.
        decompositions: into which operators the strategy's code is decomposed.
        eight: which of q, k, v and o travel in 8 bits, where the strategy sends them.

    Raises:
        CannotShard: an attention cannot be split this way; nothing is rewritten then.
    """
    program = sharded.program
    graph = copied(program.graph_module.graph)
    nodes = list(graph.find_nodes(op="call_function", target=ATTENTION))
    sites = [_site(i, node, sharded, eight) for i, node in enumerate(nodes)]
    for site in sites:
        refusal = _why_not(site, strategy, axis) if site.keys_sharded else None
        if refusal is not None:
            raise CannotShard(
                f"{name} cannot split this attention: {refusal.reason}",
                where=site.where,
                hint=refusal.hint,
            )
    writer = _Writer(graph, strategy, name, axis, decompositions)
    outcomes, renamed = [], {}
    for node, site in zip(nodes, sites, strict=True):
        old = node.name
        new = writer.replace(node, site) if _changes(site) else node
        renamed[old] = new.name
        if site.keys_sharded:
            cost = strategy.cost(site, axis)
            outcomes.append(Outcome(site, new.name, None, cost.heads, cost.way))
        else:
            outcomes.append(Outcome(site, new.name, _why_kept(axis), site.heads))
    graph.lint()
    outputs = tuple(replace(b, node=renamed.get(b.node, b.node)) for b in program.outputs)
    module = module_of(program.graph_module, graph)
    return replace(program, graph_module=module, outputs=outputs), tuple(outcomes)


def _why_not(site: Site, strategy: Strategy, axis: Axis) -> Refusal | None:
    """Codes are read by fused attentions that see all keys."""
    refusal = strategy.why_not(site, axis)
    if refusal is None and site.steps is not None and strategy.cost(site, axis).way != "one":
        return Refusal(
            "it is to be computed over FP8 codes, and what parts of its keys give cannot be "
            "merged so.",
            "--strategy ulysses, allgather-kv or stream-kv, a ring of two; or --attention "
            "precision.",
        )
    return refusal


def _changes(site: Site) -> bool:
    """Whether the node is replaced; grouped heads are written out even where nothing is sharded."""
    return site.keys_sharded or site.kv_heads != site.heads


def _why_kept(axis: Axis) -> str:
    if axis.size > 1:
        return "its keys are whole on every rank"
    return "the world is 1" if len(axis.groups) == 1 else "no ranks share the sequence"


def _site(index: int, node: fx.Node, sharded: Sharded, eight: str) -> Site:
    given = arguments(node)
    q, k = (tensor_of(given[name]) for name in ("query", "key"))
    queries, keys = sharded.places.get(node.name, (None, None))
    mask = given["attn_mask"]
    return Site(
        index=index,
        module=module_path(node),
        source=source_line(node),
        batch=q.shape[0],
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[3],
        queries=q.shape[2],
        keys=k.shape[2],
        query_layout=queries,
        key_layout=keys,
        mask=None if mask is None else tuple(tensor_of(mask).shape),
        causal=bool(given["is_causal"]),
        scale=given["scale"],
        dtype=q.dtype,
        mask_dtype=None if mask is None else tensor_of(mask).dtype,
        eight=eight,
        steps=steps_of(given["steps"]),
    )


class _Writer:
    """Traces the strategy once for each shape of attention and puts it into the graph."""

    def __init__(
        self,
        graph: fx.Graph,
        strategy: Strategy,
        name: str,
        axis: Axis,
        decompositions: Mapping[Any, Any],
    ) -> None:
        self.graph, self.strategy, self.name, self.axis = graph, strategy, name, axis
        self.decompositions = dict(decompositions)
        self.templates: dict[Any, fx.Graph] = {}

    def replace(self, node: fx.Node, site: Site) -> fx.Node:
        """The traced strategy in the node's place; returns the node of the result."""
        given = arguments(node)
        names = ("query", "key", "value", "attn_mask")
        operands = [given[name] for name in names if given[name] is not None]
        values = [tensor_of(operand) for operand in operands]
        unique = replace(site, index=0, module="", source=None)
        kind = (unique, tuple((tuple(v.shape), v.dtype) for v in values))
        if kind not in self.templates:
            self.templates[kind] = self._traced(site, values)
        prefix = f"{self.name.replace('-', '_')}_{site.index}"
        return _inline(self.templates[kind], node, operands, prefix)

    def _traced(self, site: Site, values: list[Tensor]) -> fx.Graph:
        """The strategy's code as a graph, with fake tensors of the program's own mode."""
        attend = self._attend(site)
        with fake_mode_of(self.graph), torch.no_grad():
            like = [torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in values]
            made = functionalize(attend, remove="mutations")
            traced = make_fx(made, decomposition_table=self.decompositions)(*like)
        assert not traced.graph.find_nodes(op="get_attr")
        erase_dead(traced.graph)  # assertions about dtypes and devices among them
        graph: fx.Graph = traced.graph
        return graph

    def _attend(self, site: Site) -> Callable[..., Tensor]:
        """The strategy's code over the operands of one site: q, k, v and perhaps a mask."""

        def attend(*operands: Tensor) -> Tensor:
            q, k, v, *mask = operands
            own = mask[0] if mask else None
            if site.keys_sharded:
                return self.strategy.attend(q, k, v, own, site=site, axis=self.axis)
            k, v = (repeated(x, site.heads // site.kv_heads) for x in (k, v))
            return ops.attention(
                q, k, v, own, scale=site.scale, causal=site.causal, steps=site.steps
            )

        return attend


def _inline(template: fx.Graph, node: fx.Node, operands: list[fx.Node], prefix: str) -> fx.Node:
    graph = node.graph
    copies: dict[fx.Node, Any] = {}
    remaining = list(operands)
    result: fx.Node | None = None
    with graph.inserting_before(node):
        for part in template.nodes:
            if part.op == "placeholder":
                copies[part] = remaining.pop(0)
            elif part.op == "output":
                result = copies[part.args[0]]
            else:
                copies[part] = graph.create_node(
                    part.op,
                    part.target,
                    fx.map_arg(part.args, copies.__getitem__),
                    fx.map_arg(part.kwargs, copies.__getitem__),
                    name=f"{prefix}_{part.name}",
                )
                copies[part].meta = {k: node.meta[k] for k in PROVENANCE if k in node.meta}
                copies[part].meta["val"] = part.meta.get("val")
    assert result is not None
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return result
