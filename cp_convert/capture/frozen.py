"""Arguments whose values become part of the program.

Some models let a mask decide how many tokens there are (``x[mask]``, ``mask.sum().item()``). An
engine's shapes are fixed, so such a mask must be a constant. While ``torch.export`` traces, tensors
have no values; these few are followed by value, and what they decide is decided at once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

import torch
from torch import Tensor, fx, nn
from torch._subclasses import fake_tensor
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from ..errors import UsageError
from ..ir.program import HALF, evaluated, fake_mode_of, written_in_place
from ..words import near

_FOLLOWED: Final = 1 << 20
"""Elements of the largest tensor that is followed by value."""
_FACTORIES: Final = (torch.ones, torch.zeros, torch.full, torch.arange)


@dataclass(frozen=True)
class _Literal:
    values: Any
    dtype: torch.dtype


@contextmanager
def frozen(module: nn.Module, inputs: Mapping[str, Any], names: Collection[str]) -> Iterator[None]:
    """Let forward be given the named arguments as constants whose values tracing knows.

    Raises:
        UsageError: ``inputs`` has no argument of such a name.
    """
    unknown = sorted(set(names) - set(inputs))
    if unknown:
        raise UsageError(
            f"cannot freeze {', '.join(unknown)}: example_inputs() gives no such argument.",
            hint=near(unknown[0], inputs),
        )
    literals = {name: pytree.tree_map(_literal, inputs[name]) for name in names}

    def hook(_: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        given = {n: pytree.tree_map(_constant, v, is_leaf=_is_literal) for n, v in literals.items()}
        return args, {**kwargs, **given}

    if not names:
        yield
        return
    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        # By default only scalars are followed by value through a trace.
        with patch.object(fake_tensor, "CONSTANT_NUMEL_LIMIT", _FOLLOWED), _ValuedFactories():
            yield
    finally:
        handle.remove()


class _ValuedFactories(TorchFunctionMode):
    """Small integer tensors made by forward itself are followed by value as well."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func``; a factory's integers or booleans become a literal."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func not in _FACTORIES or not isinstance(result, Tensor):
            return result
        small = all(isinstance(n, int) for n in result.shape) and result.numel() <= 4096
        if not small or result.is_floating_point() or result.is_complex():
            return result
        with fake_tensor.unset_fake_temporarily(), torch._C.DisableTorchFunctionSubclass():
            real = func(*args, **{**kwargs, "device": "cpu"})
            values = real.tolist()
        return torch.tensor(values, dtype=result.dtype).reshape(result.shape)


def _literal(leaf: Any) -> Any:
    return _Literal(leaf.tolist(), leaf.dtype) if isinstance(leaf, Tensor) else leaf


def _is_literal(leaf: Any) -> bool:
    return isinstance(leaf, _Literal)


def _constant(leaf: Any) -> Any:
    return torch.tensor(leaf.values, dtype=leaf.dtype) if isinstance(leaf, _Literal) else leaf


def fold_frozen(exported: torch.export.ExportedProgram) -> None:
    """Store what the constants decide, so that no later stage has to know their values.

    Half-precision values are left alone; see :func:`cp_convert.ir.passes.fold_constants`.
    """
    graph, signature = exported.graph, exported.graph_signature
    known: dict[fx.Node, Any] = {}
    nodes = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    held = {**signature.inputs_to_lifted_tensor_constants, **signature.inputs_to_buffers}
    for name, target in held.items():
        value = exported.constants.get(target, exported.state_dict.get(target))
        if isinstance(value, Tensor):
            known[nodes[name]] = value
    written = written_in_place(graph)
    known = {node: value for node, value in known.items() if node not in written}
    for node, value in evaluated(graph, known, lambda n: n not in written):
        if value.dtype not in HALF:
            constant = _hold(exported, node.name, value, node.meta["val"])
            node.replace_all_uses_with(constant)
    for node in list(graph.nodes):
        if node.target in _INDEXING:
            _by_position(exported, node)
    graph.eliminate_dead_code()
    exported.graph_module.recompile()


_INDEXING: Final = (
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
)


def _by_position(exported: torch.export.ExportedProgram, node: fx.Node) -> None:
    """``x[mask]`` with a constant mask becomes ``x[positions]``."""
    constants = exported.graph_signature.inputs_to_lifted_tensor_constants
    indices: list[Any] = []
    for index in node.args[1]:  # type: ignore[union-attr]
        held = exported.constants.get(constants.get(getattr(index, "name", ""), ""))
        if held is None or held.dtype != torch.bool:
            indices.append(index)
            continue
        mode = fake_mode_of(exported.graph)
        for axis, positions in enumerate(held.nonzero(as_tuple=True)):
            fake = mode.from_tensor(positions)
            indices.append(_hold(exported, f"{node.name}_{axis}", positions, fake))
    node.args = (node.args[0], indices, *node.args[2:])


def _hold(exported: torch.export.ExportedProgram, origin: str, value: Tensor, fake: Any) -> fx.Node:
    """One more constant in the program's signature."""
    graph, specs = exported.graph, exported.graph_signature.input_specs
    position = next(
        (i for i, spec in enumerate(specs) if spec.kind == InputKind.USER_INPUT), len(specs)
    )
    placeholders = list(graph.find_nodes(op="placeholder"))
    name = f"settled_{origin}"
    after = placeholders[position] if position < len(placeholders) else _first_call(graph)
    with graph.inserting_before(after):
        constant = graph.placeholder(name)
    constant.meta = {"val": fake}
    argument = TensorArgument(name=constant.name)
    specs.insert(position, InputSpec(InputKind.CONSTANT_TENSOR, argument, name, None))
    exported.constants[name] = value.detach().clone().contiguous()
    return constant  # type: ignore[no-any-return]


def _first_call(graph: fx.Graph) -> fx.Node:
    return next(node for node in graph.nodes if node.op != "placeholder")  # type: ignore[no-any-return]
