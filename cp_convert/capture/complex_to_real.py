"""Complex arithmetic as arithmetic on pairs: TensorRT has no complex tensors.

A complex tensor of shape ``[...]`` becomes a real one of shape ``[..., 2]``; rotary embeddings
written as ``view_as_real(view_as_complex(x) * freqs)`` become::

    (a + ib)(c + id)  ->  [a c - b d, a d + b c]

Tables of frequencies that are computed from constants have been evaluated before
(:func:`cp_convert.ir.passes.fold_constants`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, fx

from ..errors import CannotLower
from ..ir.program import arguments, erase_dead, module_path, source_line, with_argument
from ..ir.writer import Writer

aten: Final = torch.ops.aten


def complex_to_real(graph_module: fx.GraphModule) -> int:
    """Replace every complex value; returns how many there were.

    Raises:
        CannotLower: a complex operator that is not known here.
    """
    graph = graph_module.graph
    if not any(_is_complex(n) for n in graph.nodes):
        return 0
    pairs = _Pairs(graph_module)
    count = 0
    for node in list(graph.nodes):
        reads_complex = any(n in pairs.of for n in node.all_input_nodes)
        if _is_complex(node) or reads_complex:
            pairs.replace(node)
            count += 1
    erase_dead(graph)
    graph.lint()
    return count


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype.is_complex


class _Pairs(Writer):
    """Complex nodes and the real ones that stand for them."""

    def __init__(self, graph_module: fx.GraphModule) -> None:
        super().__init__(graph_module.graph)
        self.module = graph_module
        self.of: dict[fx.Node, fx.Node] = {}

    def replace(self, node: fx.Node) -> None:
        """Put real operators in the place of ``node``."""
        self.origin = node
        with self.graph.inserting_before(node):
            if node.op == "get_attr":
                self.of[node] = self._constant(node)
                return
            rule = _RULES.get(node.target)
            if rule is None:
                raise CannotLower(
                    f"{node.target} on complex tensors is not supported.",
                    where=f"{module_path(node)} ({source_line(node)})",
                    hint="write it with real numbers (cosine and sine).",
                )
            result = rule(self, node)
        if _is_complex(node):
            self.of[node] = result
        else:
            node.replace_all_uses_with(result)

    def _constant(self, node: fx.Node) -> fx.Node:
        value = torch.view_as_real(self.module.get_buffer(str(node.target)).resolve_conj())
        name = f"{node.target}_pair"
        self.module.register_buffer(name, value.contiguous().clone(), persistent=False)
        pair = self.graph.get_attr(name)
        pair.meta = dict(node.meta)
        with self.mode:
            pair.meta["val"] = torch.empty(value.shape, dtype=value.dtype)
        return pair

    def parts(self, x: Any) -> tuple[fx.Node, fx.Node]:
        """Real and imaginary part of an operand; a real one has an imaginary part of zero."""
        pair = self.of[x]
        last = pair.meta["val"].dim() - 1
        return self.op(aten.select.int, pair, last, 0), self.op(aten.select.int, pair, last, 1)

    def joined(self, real: fx.Node, imaginary: fx.Node) -> fx.Node:
        """The pair of two parts."""
        last = real.meta["val"].dim()
        columns = [self.op(aten.unsqueeze.default, x, last) for x in (real, imaginary)]
        return self.op(aten.cat.default, columns, last)


def _taken(pairs: _Pairs, node: fx.Node) -> fx.Node:
    return node.args[0]  # type: ignore[return-value]


def _given(pairs: _Pairs, node: fx.Node) -> fx.Node:
    return pairs.of[node.args[0]]  # type: ignore[index]


def _product(pairs: _Pairs, node: fx.Node) -> fx.Node:
    x, y = node.args
    mul = aten.mul.Tensor
    if x not in pairs.of or y not in pairs.of:
        pair, real = (x, y) if x in pairs.of else (y, x)
        own = pairs.of[pair]  # type: ignore[index]
        if isinstance(real, fx.Node):
            last = real.meta["val"].dim()
            real = pairs.op(aten.unsqueeze.default, real, last)
        return pairs.op(mul, own, real)
    (a, b), (c, d) = pairs.parts(x), pairs.parts(y)
    real = pairs.op(aten.sub.Tensor, pairs.op(mul, a, c), pairs.op(mul, b, d))
    return pairs.joined(real, pairs.op(aten.add.Tensor, pairs.op(mul, a, d), pairs.op(mul, b, c)))


def _elementwise(pairs: _Pairs, node: fx.Node) -> fx.Node:
    """Operators that do the same to both parts."""
    args = fx.map_arg(node.args, lambda n: pairs.of.get(n, n))
    kwargs = dict(node.kwargs)
    if isinstance(kwargs.get("dtype"), torch.dtype):
        kwargs["dtype"] = kwargs["dtype"].to_real()  # type: ignore[union-attr]
    return pairs.op(node.target, *args, **kwargs)


def _moved(pairs: _Pairs, node: fx.Node) -> fx.Node:
    """Operators with one ``dim``, counted from the front before the pair is appended."""
    rank = node.all_input_nodes[0].meta["val"].dim()
    extra = 1 if node.target is aten.unsqueeze.default else 0
    dim = arguments(node)["dim"] % (rank + extra)
    args, kwargs = with_argument(node, "dim", dim)(node.args, node.kwargs)
    args = fx.map_arg(args, lambda n: pairs.of.get(n, n))
    return pairs.op(node.target, *args, **kwargs)


def _sized(pairs: _Pairs, node: fx.Node) -> fx.Node:
    return pairs.op(node.target, _given(pairs, node), [*node.meta["val"].shape, 2])


def _permuted(pairs: _Pairs, node: fx.Node) -> fx.Node:
    rank = node.meta["val"].dim()
    order = [d % rank for d in node.args[1]]  # type: ignore[union-attr]
    return pairs.op(aten.permute.default, _given(pairs, node), [*order, rank])


def _polar(pairs: _Pairs, node: fx.Node) -> fx.Node:
    length, angle = node.args
    real = pairs.op(aten.mul.Tensor, length, pairs.op(aten.cos.default, angle))
    return pairs.joined(real, pairs.op(aten.mul.Tensor, length, pairs.op(aten.sin.default, angle)))


def _complex(pairs: _Pairs, node: fx.Node) -> fx.Node:
    return pairs.joined(*node.args)  # type: ignore[arg-type]


def _conjugate(pairs: _Pairs, node: fx.Node) -> fx.Node:
    a, b = pairs.parts(node.args[0])
    return pairs.joined(a, pairs.op(aten.neg.default, b))


_RULES: Final[dict[Any, Callable[[_Pairs, fx.Node], fx.Node]]] = {
    aten.view_as_complex.default: _taken,
    aten.view_as_real.default: _given,
    aten._to_copy.default: _elementwise,
    aten.clone.default: _elementwise,
    aten.add.Tensor: _elementwise,
    aten.sub.Tensor: _elementwise,
    aten.neg.default: _elementwise,
    aten.mul.Tensor: _product,
    aten.cat.default: _moved,
    aten.slice.Tensor: _moved,
    aten.select.int: _moved,
    aten.unsqueeze.default: _moved,
    aten.squeeze.dim: _moved,
    aten.index_select.default: _moved,
    aten.index.Tensor: _elementwise,
    aten._reshape_copy.default: _sized,
    aten.view.default: _sized,
    aten.expand.default: _sized,
    aten.permute.default: _permuted,
    aten.polar.default: _polar,
    aten.complex.default: _complex,
    aten._conj.default: _conjugate,
    aten.real.default: lambda pairs, node: pairs.parts(node.args[0])[0],
    aten.imag.default: lambda pairs, node: pairs.parts(node.args[0])[1],
}
