"""Every attention whose keys are sharded becomes the strategy's; the others are left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .errors import CannotShard
from .mesh import Axis
from .program import Program, module_path, source_line, tensor_of
from .strategies import Refusal, Site, Strategy

ATTENTION: Final = torch.ops.cp.attention.default
_PROVENANCE: Final = ("nn_module_stack", "stack_trace", "source_fn_stack")


@dataclass(frozen=True)
class Outcome:
    """What was done with one attention.

    Attributes:
        site: the attention as it was traced.
        node: name of the node that holds its result in the rewritten program.
        kept: why it was left alone; ``None`` when it was rewritten.
    """

    site: Site
    node: str
    kept: str | None


def rewrite(
    program: Program, strategy: Strategy, name: str, axis: Axis
) -> tuple[Program, tuple[Outcome, ...]]:
    """Put ``strategy`` in the place of every attention over sharded keys; ``program`` stays as is.

    Args:
        program: a traced program whose attentions see local keys only.
        strategy: the module of :data:`cp_convert.strategies.STRATEGIES` to apply.
        name: what the strategy is called; the new nodes carry it.
        axis: the ranks that share the sequence.

    Raises:
        CannotShard: an attention cannot be split this way; nothing is rewritten then.
    """
    program = _copy(program)
    graph = program.graph_module.graph
    sharded = sharded_nodes(graph)
    nodes = [node for node in graph.nodes if node.target is ATTENTION]
    sites = [_site(i, node, sharded, axis) for i, node in enumerate(nodes)]
    for site in sites:
        refusal = _why_not(site, strategy, axis) if _is_split(site, axis) else None
        if refusal is not None:
            raise CannotShard(
                f"{name} cannot split this attention: {refusal.reason}",
                where=site.where,
                hint=refusal.hint,
            )
    outcomes = []
    templates: dict[Any, fx.GraphModule] = {}
    for node, site in zip(nodes, sites, strict=True):
        if not _is_split(site, axis):
            outcomes.append(Outcome(site, node.name, _why_kept(axis)))
            continue
        result = _replace(node, site, strategy, name, axis, templates)
        program.exported.graph_signature.replace_all_uses(node.name, result.name)
        outcomes.append(Outcome(site, result.name, None))
    graph.lint()
    program.graph_module.recompile()
    outputs = tuple(
        replace(binding, node=node)
        for binding, node in zip(
            program.outputs,
            [n for n in program.exported.graph_signature.user_outputs if isinstance(n, str)],
            strict=True,
        )
    )
    return replace(program, outputs=outputs), tuple(outcomes)


def sharded_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes whose values differ between ranks: what depends on a split and is not gathered."""
    sharded: set[fx.Node] = set()
    for node in graph.nodes:
        depends = any(source in sharded for source in node.all_input_nodes)
        is_gather = node.target is torch.ops.cp.all_gather.default
        if node.target is torch.ops.cp.shard.default or (depends and not is_gather):
            sharded.add(node)
    return sharded


def _is_split(site: Site, axis: Axis) -> bool:
    return site.keys_sharded and axis.size > 1


def _why_kept(axis: Axis) -> str:
    return "its keys are whole on every rank" if axis.size > 1 else "the world is 1"


def _why_not(site: Site, strategy: Strategy, axis: Axis) -> Refusal | None:
    """Limits that all strategies share, then the strategy's own."""
    if site.causal:
        return Refusal("it is causal, and causal attention over sharded keys is not supported.")
    if site.mask:
        return Refusal(
            "it has a mask, and masks over sharded keys are not supported.",
            "drop the mask from example_inputs() if every token is real.",
        )
    if site.kv_heads != site.heads:
        return Refusal(
            f"it has {site.heads} query heads but {site.kv_heads} key heads, and grouped-query "
            "attention over sharded keys is not supported.",
            "repeat the key and value heads inside the model.",
        )
    return strategy.why_not(site, axis)


def _site(index: int, node: fx.Node, sharded: set[fx.Node], axis: Axis) -> Site:
    arguments = _arguments(node)
    query, key, value = (arguments[name] for name in ("query", "key", "value"))
    q, k, v = (tensor_of(n) for n in (query, key, value))
    where = f"{module_path(node)} ({source_line(node)})"
    if q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        raise CannotShard(
            f"attention over tensors of shape {list(q.shape)} is not supported; "
            "[batch, heads, sequence, head_dim] is.",
            where=where,
        )
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
        queries_sharded=query in sharded,
        keys_sharded=key in sharded or value in sharded,
        world=axis.size,
        mask=arguments["attn_mask"] is not None,
        causal=bool(arguments["is_causal"]),
    )


def _arguments(node: fx.Node) -> dict[str, Any]:
    """The node's arguments by name, defaults included."""
    schema = torch.ops.cp.attention.default._schema
    named = {a.name: a.default_value for a in schema.arguments}
    named.update(zip(named, node.args, strict=False))
    named.update(node.kwargs)
    return named


def _replace(
    node: fx.Node,
    site: Site,
    strategy: Strategy,
    name: str,
    axis: Axis,
    templates: dict[Any, fx.GraphModule],
) -> fx.Node:
    """Put the traced strategy in the node's place; returns the node of the result."""
    arguments = _arguments(node)
    operands = [arguments[part] for part in ("query", "key", "value")]
    values = [tensor_of(operand) for operand in operands]
    scale = arguments["scale"]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return strategy.attend(q, k, v, scale=scale, axis=axis)

    kind = (scale, *((tuple(v.shape), v.dtype, v.stride()) for v in values))
    if kind not in templates:
        templates[kind] = _traced(attend, values)
    prefix = f"{name.replace('-', '_')}_{site.index}"
    return _inline(templates[kind].graph, node, operands, prefix)


def _traced(attend: Callable[..., Tensor], values: list[Tensor]) -> fx.GraphModule:
    with torch.no_grad():
        return make_fx(attend, pre_dispatch=True)(*values)


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
                copies[part].meta = {k: node.meta[k] for k in _PROVENANCE if k in node.meta}
                copies[part].meta["val"] = part.meta["val"]
    assert result is not None
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return result


def _copy(program: Program) -> Program:
    """The program with a graph and a signature of its own; weights are shared."""
    exported = program.exported
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(exported.graph, copies)
    graph.output(output)
    graph.set_codegen(exported.graph._codegen)
    last = next(iter(reversed(graph.nodes)))
    last.meta = dict(next(iter(reversed(exported.graph.nodes))).meta)
    assert all(old.name == new.name for old, new in copies.items())
    module = fx.GraphModule(exported.graph_module, graph)
    module.meta.update(exported.graph_module.meta)
    return replace(
        program,
        exported=torch.export.ExportedProgram(
            root=module,
            graph=graph,
            graph_signature=copy.deepcopy(exported.graph_signature),
            state_dict=exported.state_dict,
            range_constraints=exported.range_constraints,
            module_call_graph=exported.module_call_graph,
            example_inputs=exported.example_inputs,
            constants=exported.constants,
            verifiers=exported.verifiers,
        ),
    )
