"""All ranks of an SPMD program, run in one process, one operator at a time.

A value that is the same on every rank is computed once and held once; the weights are shared. A
``cp::*`` operator is computed from all ranks' values together, by ``ops.on_all_ranks``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..ir import ops
from ..ir.program import HALF, Executable, with_dtypes, written_in_place
from ..mesh import Axis
from .device import exact

Watch = Callable[[fx.Node, "PerRank"], None]
Alter = Callable[[fx.Node, "PerRank"], "PerRank"]


@dataclass(frozen=True)
class PerRank:
    """One value of each rank, or a single one that all ranks have in common."""

    values: tuple[Any, ...]

    def __getitem__(self, rank: int) -> Any:
        return self.values[rank if len(self.values) > 1 else 0]

    @property
    def is_common(self) -> bool:
        """Whether all ranks hold the very same value."""
        return len(self.values) == 1


def run(
    program: Executable,
    inputs: Mapping[str, Tensor],
    world: int,
    *,
    widen: bool = False,
    partial: Axis | None = None,
    alone: Axis | None = None,
    watch: Watch | None = None,
    alter: Alter | None = None,
) -> list[list[Tensor]]:
    """Run every rank of ``program`` on the same full inputs.

    Args:
        program: what to run.
        inputs: the full input tensors by binding name.
        world: how many ranks there are.
        widen: compute in float32 wherever the program says float16 or bfloat16.
        partial: leave all-reduces over this axis out, so that every rank keeps its own partial
            result.
        alone: along this axis every rank communicates with copies of itself.
        watch: called with every node and its values, as they are computed.
        alter: the same, and gives the values that are put in their place.

    Returns:
        Every rank's outputs, in the order of ``program.outputs``.
    """
    env: dict[fx.Node, PerRank] = {}
    bound = {b.node: inputs[b.name] for b in program.inputs}
    graph = program.graph_module.graph
    dying, own = _last_uses(graph), written_in_place(graph)
    results: list[list[Tensor]] = []
    with torch.no_grad(), exact(), HalfMatmulsInFloat32():
        for node in graph.nodes:
            if node.op in ("placeholder", "get_attr"):
                values = _given(program, node, bound)
                env[node] = PerRank(tuple(widened(v) if widen else v for v in values))
            elif node.op == "output":
                results = _outputs(node, env, program, world)
            else:
                env[node] = _left_out(node, env, partial, alone) or _call(
                    node, env, world, widen=widen, own=node in own
                )
            if alter is not None and node in env:
                env[node] = alter(node, env[node])
            if watch is not None and node in env:
                watch(node, env[node])
            for dead in dying.get(node, ()):
                env.pop(dead, None)
    return results


def _given(program: Executable, node: fx.Node, bound: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """What an input, a parameter or a constant is; one value where all ranks hold the same."""
    if node.op == "get_attr":
        return (_attribute(program.graph_module, str(node.target)),)
    value = bound.get(node.name, program.state.get(node.name, node.meta.get("val")))
    return tuple(program.own.get(node.name, (value,)))


def reduces_over(node: fx.Node, axis: Axis) -> bool:
    """Whether ``node`` combines partial results of the ranks of ``axis``."""
    return node.target is torch.ops.cp.all_reduce.default and node.args[2:] == (
        axis.flat,
        axis.size,
    )


def _left_out(
    node: fx.Node, env: Mapping[fx.Node, PerRank], partial: Axis | None, alone: Axis | None
) -> PerRank | None:
    """What every rank has where ``node`` communicates along an axis on which it must not."""
    if partial is not None and reduces_over(node, partial):
        return env[node.all_input_nodes[0]]
    return _by_itself(node, env) if alone is not None and is_along(node, alone) else None


def is_along(node: fx.Node, axis: Axis) -> bool:
    """Whether ``node`` is a collective of the ranks of ``axis``."""
    return node.target in ops.COLLECTIVES and node.args[-2:] == (axis.flat, axis.size)


def _by_itself(node: fx.Node, env: Mapping[fx.Node, PerRank]) -> PerRank:
    """A collective in which every rank's peers are the rank itself."""
    x, *rest, flat, size = node.args
    assert isinstance(x, fx.Node) and isinstance(flat, list) and isinstance(size, int)
    place = {rank: number % size for number, rank in enumerate(flat)}
    held = env[x]
    return PerRank(
        tuple(
            ops.on_a_group(node.target, [held[rank]] * size, rest)[place[rank]]
            for rank in sorted(flat)
        )
    )


def _call(
    node: fx.Node, env: Mapping[fx.Node, PerRank], world: int, *, widen: bool, own: bool
) -> PerRank:
    if ops.is_spmd(node.target):
        given = _all_arguments(node)
        operands = [x for x in given if isinstance(x, fx.Node)]
        held = [tuple(env[x][rank] for x in operands) for rank in range(world)]
        values = held if len(operands) > 1 else [value for (value,) in held]
        return merged(ops.on_all_ranks(node.target, values, given[len(operands) :]))
    assert node.op == "call_function", node.format_node()
    differs = own or any(not env[n].is_common for n in node.all_input_nodes)
    count = world if differs else 1
    function: Any = node.target
    args, kwargs = node.args, node.kwargs
    if widen:
        args, kwargs = with_dtypes((args, kwargs), dict.fromkeys(HALF, torch.float32))

    def on(rank: int) -> Any:
        values = {n: env[n][rank] for n in node.all_input_nodes}
        return function(
            *fx.map_arg(args, values.__getitem__), **fx.map_arg(kwargs, values.__getitem__)
        )

    return PerRank(tuple(on(rank) for rank in range(count)))


def _all_arguments(node: fx.Node) -> list[Any]:
    target: Any = node.target
    names = [argument.name for argument in target._schema.arguments]
    return [*node.args, *(node.kwargs[name] for name in names[len(node.args) :])]


def merged(values: list[Tensor]) -> PerRank:
    """One value when a collective left the same tensor everywhere."""
    same = all(value is values[0] for value in values)
    return PerRank((values[0],) if same else tuple(values))


def _attribute(module: torch.nn.Module, path: str) -> Tensor:
    *parents, name = path.split(".")
    value: Tensor = getattr(module.get_submodule(".".join(parents)), name)
    return value


def _outputs(
    node: fx.Node, env: Mapping[fx.Node, PerRank], program: Executable, world: int
) -> list[list[Tensor]]:
    by_name = {n.name: n for n in node.all_input_nodes}
    wanted = [by_name[binding.node] for binding in program.outputs]
    return [[env[n][rank] for n in wanted] for rank in range(world)]


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every node, the nodes whose values are not needed after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        last[node] = node
        for source in node.all_input_nodes:
            last[source] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for node, user in last.items():
        dying.setdefault(user, []).append(node)
    return dying


_MATMULS: Final = (
    torch.ops.aten.mm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.baddbmm.default,
    torch.ops.aten.convolution.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
)


class HalfMatmulsInFloat32(TorchDispatchMode):
    """Half-precision products accumulated in float32 and rounded once, as tensor cores do.

    A CPU without half-precision units is several times faster this way, and nearer to a GPU.
    """

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run ``func``; products of half-precision CPU tensors in float32."""
        kwargs = kwargs or {}
        first = next((a for a in args if isinstance(a, Tensor)), None)
        if func not in _MATMULS or first is None or first.dtype not in HALF or first.is_cuda:
            return func(*args, **kwargs)
        half = first.dtype
        args, kwargs = pytree.tree_map(widened, (args, kwargs))
        result = func(*args, **kwargs)
        return pytree.tree_map(lambda t: _down(t, half), result)


def widened(leaf: Any) -> Any:
    """A half-precision tensor in float32; anything else as it is."""
    return leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in HALF else leaf


def _down(leaf: Any, dtype: torch.dtype) -> Any:
    is_float = isinstance(leaf, Tensor) and leaf.dtype == torch.float32
    return leaf.to(dtype) if is_float else leaf
