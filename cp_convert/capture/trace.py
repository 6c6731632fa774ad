"""``torch.export``, once for all ranks, worlds and strategies; the plan's lines become marks."""

from __future__ import annotations

import io
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import zip_longest
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.fx._lazy_graph_module import _use_lazy_graph_module
from torch.utils import _pytree as pytree

from ..errors import CannotShard, CannotTrace
from ..ir.program import Binding, Constant, Program, module_path, source_line, tensor_of
from ..ir.signature import Applied
from ..mesh import Axis
from ..model.forward import FREEZE, blamed_on_forward, check_arguments
from ..model.plan import normalise
from .c10d import own_collectives
from .frozen import fold_frozen, frozen
from .planned import planned
from .recognise import recognise
from .returned import returned


def trace(
    module: nn.Module,
    inputs: Mapping[str, Any],
    plan: Mapping[str, Any],
    freeze: Collection[str] = (),
    *,
    peers: Sequence[nn.Module] = (),
    groups: Mapping[str, Axis] | None = None,
) -> tuple[Program, tuple[Applied, ...]]:
    """Capture ``module(**inputs)``, whole; the plan's splits and gathers become ``cp::mark``.

    The program is the same for every world and strategy.

    Args:
        module: the model, in eval mode.
        inputs: keyword arguments of its forward; their shapes are the program's shapes.
        plan: see :mod:`cp_convert.model.plan`; empty when the plan is to be found, or for a world
            of 1.
        freeze: arguments whose values become part of the program. A mask that decides how many
            tokens there are must be frozen, because an engine's shapes are fixed.
        peers: rank 1, 2, ... where ranks hold different parameters; each is traced as well.
        groups: the process groups in which forward communicates, by name.

    Raises:
        CannotTrace: forward fails with these inputs, torch.export cannot capture it, it
            communicates in an unknown way, or a peer's forward is another program.
        CannotShard: the plan does not fit the model.
    """
    check_arguments(module, inputs)
    exported, applied = _captured(module, inputs, plan, freeze, groups or {})
    for rank, peer in enumerate(peers, 1):
        _check_alike(exported, _captured(peer, inputs, plan, freeze, groups or {})[0], rank)
    program = _program(exported, {name: inputs[name] for name in freeze})
    held = tuple(peer.state_dict(keep_vars=True) for peer in peers)
    return replace(program, peers=held), tuple(applied)


def _captured(
    module: nn.Module,
    inputs: Mapping[str, Any],
    plan: Mapping[str, Any],
    freeze: Collection[str],
    groups: Mapping[str, Axis],
) -> tuple[torch.export.ExportedProgram, list[Applied]]:
    applied: list[Applied] = []
    cuts = normalise(plan, [name for name, _ in module.named_modules()])
    with torch.no_grad(), planned(module, cuts, applied), frozen(module, inputs, freeze):
        exported = _export(module, {k: None if k in freeze else v for k, v in inputs.items()})
    _check_operators(exported.graph)
    _check_shapes(exported.graph)
    own_collectives(exported.graph, groups)
    if freeze:
        fold_frozen(exported)
    if cuts and not any(a.cut.kind == "split" and a.reason is None for a in applied):
        raise CannotShard(
            "no split of the plan met a tensor, so nothing would be sharded.",
            hint="; ".join(sorted({a.reason for a in applied if a.reason})) or None,
        )
    _drop_assertions(exported.graph)
    recognise(exported.graph)
    _check_numbers(exported.graph)
    exported.graph_module.recompile()
    return exported, applied


def _check_alike(
    first: torch.export.ExportedProgram, other: torch.export.ExportedProgram, rank: int
) -> None:
    """One program serves all ranks, so theirs may differ in the values of parameters only."""
    for ours, theirs in zip_longest(first.graph.nodes, other.graph.nodes):
        if ours is None or theirs is None or ours.format_node() != theirs.format_node():
            node = ours or theirs
            raise CannotTrace(
                f"forward of rank {rank} is another program than rank 0's: "
                f"{_told(theirs)} instead of {_told(ours)}.",
                where=f"{module_path(node)} ({source_line(node)})",
                hint="what depends on the rank has to be a parameter, not a number in forward.",
            )
    for name, value in first.constants.items():
        if isinstance(value, Tensor) and not torch.equal(value, other.constants[name]):
            raise CannotTrace(
                f"forward of rank {rank} has another constant {name} than rank 0's.",
                hint="what depends on the rank has to be a parameter.",
            )


def _told(node: torch.fx.Node | None) -> str:
    return "nothing" if node is None else f"{node.target}{node.args}"


def _drop_assertions(graph: torch.fx.Graph) -> None:
    """Assertions about dtypes, which torch.export puts beside every cast."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)


_UNWRAPPED: Final = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
"""Regions that decomposition dissolves."""


def _check_operators(graph: torch.fx.Graph) -> None:
    """Nothing but plain operators: no control flow, no compiled attention, no vmap."""
    for node in graph.nodes:
        if node.op == "call_function" and not (
            isinstance(node.target, torch._ops.OpOverload)
            or getattr(node.target, "__module__", None) in ("_operator", "builtins", "math")
            or str(node.target) in _UNWRAPPED
        ):
            raise CannotTrace(
                f"forward uses {_named(node.target)}, which is no plain tensor operator.",
                where=f"{module_path(node)} ({source_line(node)})",
                hint="choose another attention backend in the model, or write it with "
                "scaled_dot_product_attention.",
            )


def _named(target: Any) -> str:
    """What a person would have written to get this operator."""
    if str(getattr(target, "__module__", "")).startswith("torch._functorch"):
        return "torch.func.vmap, as FlexAttention's masks do"
    return str(target)


def _check_shapes(graph: torch.fx.Graph) -> None:
    """Every shape must be known: an engine's are fixed."""
    for node in graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(value, Tensor) and not all(isinstance(n, int) for n in value.shape):
                raise CannotTrace(
                    f"the shape that {node.target} returns depends on the values of a tensor.",
                    where=f"{module_path(node)} ({source_line(node)})",
                    hint=FREEZE,
                )


def _check_numbers(graph: torch.fx.Graph) -> None:
    """No number is taken out of a tensor: an engine computes with tensors alone."""
    for node in graph.nodes:
        values = pytree.tree_leaves(node.meta.get("val"))
        if node.users and any(isinstance(v, torch.SymFloat | torch.SymInt) for v in values):
            raise CannotTrace(
                f"forward takes a Python number out of a tensor ({node.target}), which an engine "
                "cannot.",
                where=f"{module_path(node)} ({source_line(node)})",
                hint="compute with the tensor itself, without .item(), float() or int(); or, if "
                "it comes from an argument that stays the same, --freeze ARGUMENT.",
            )


def _export(module: nn.Module, inputs: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """Graphs on the way write no Python code: nobody calls them (a seventh of the time)."""
    with blamed_on_forward(), _hushed(), _no_fused_layers(), _use_lazy_graph_module(True):
        return torch.export.export(module, args=(), kwargs=dict(inputs))


@contextmanager
def _hushed() -> Iterator[None]:
    """torch.export logs and prints what it then raises; the exception is told once, by us."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


@contextmanager
def _no_fused_layers() -> Iterator[None]:
    """nn.MultiheadAttention's inference path is one operator that hides its attention."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _program(exported: torch.export.ExportedProgram, given: Mapping[str, Any]) -> Program:
    signature = exported.graph_signature
    nodes = {node.name: node for node in exported.graph.nodes}
    assert exported.call_spec.in_spec is not None and exported.call_spec.out_spec is not None
    inputs: list[Binding] = []
    frozen: list[Constant] = []
    for name, node in zip(names_of(exported.call_spec.in_spec), signature.user_inputs, strict=True):
        if isinstance(node, str) and node in nodes and isinstance(nodes[node].meta["val"], Tensor):
            inputs.append(_binding(name, nodes[node]))
        else:
            value = nodes[node].meta["val"] if isinstance(node, str) and node in nodes else node
            frozen.append(Constant(name, given.get(name, value)))
    names = {
        leaf: (name, node)
        for leaf, (name, node) in enumerate(
            zip(names_of(exported.call_spec.out_spec), signature.user_outputs, strict=True)
        )
        if isinstance(node, str)
    }
    outputs = [_binding(name, nodes[node]) for name, node in names.values()]
    tree = returned(exported.call_spec.out_spec, {leaf: name for leaf, (name, _) in names.items()})
    return Program(exported, tuple(inputs), tuple(outputs), tuple(frozen), tree)


def _binding(name: str, node: torch.fx.Node) -> Binding:
    value = tensor_of(node)
    return Binding(name, node.name, value.dtype, tuple(value.shape))


@dataclass(frozen=True)
class _Leaf:
    """Stands for a tensor, wherever in a tree it is held."""

    number: int


def names_of(spec: pytree.TreeSpec) -> list[str]:
    """A name for every leaf: keys, fields and indices on the way to it, joined with dots."""
    tree = pytree.tree_unflatten([_Leaf(i) for i in range(spec.num_leaves)], spec)
    if isinstance(tree, tuple) and len(tree) == 2 and tree[0] == ():
        tree = tree[1]  # (args, kwargs), of which only the second is used
    names = dict(_paths(tree, ()))
    return [_join(names.get(leaf, ("output", str(leaf)))) for leaf in range(spec.num_leaves)]


def _paths(tree: Any, path: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    if isinstance(tree, _Leaf):
        yield tree.number, path
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _paths(value, (*path, str(key)))
    elif is_dataclass(tree):
        for field in fields(tree):
            yield from _paths(getattr(tree, field.name, None), (*path, field.name))
    elif isinstance(tree, tuple | list):
        keys = getattr(tree, "_fields", range(len(tree)))
        for key, value in zip(keys, tree, strict=True):
            yield from _paths(value, (*path, str(key)))
    else:
        for key, value in getattr(tree, "__dict__", {}).items():
            yield from _paths(value, (*path, str(key)))


def _join(path: tuple[str, ...]) -> str:
    first = "output" if not path else f"output{path[0]}" if path[0].isdigit() else path[0]
    return ".".join((first, *path[1:]))
