"""Graph passes between decomposition and Torch-TensorRT's own lowering."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..program import erase_dead, tensor_of

_SLICE_SCATTER = torch.ops.aten.slice_scatter.default
_COPY = torch.ops.aten.copy.default


def interleave_strided_writes(graph: fx.Graph) -> int:
    """Turn strided writes that fill a tensor completely into one stack; returns how many.

    Before and after, for rotary embeddings written as ``out[..., 0::2] = a; out[..., 1::2] = b``::

        slice_scatter(slice_scatter(base, a, dim, 0, end, 2), b, dim, 1, end, 2)
        reshape(stack([a, b], dim + 1), base.shape)

    The base, a constant as large as the activation, and the scatters disappear.
    """
    done = 0
    for node in reversed(list(graph.nodes)):
        parts = _parts(node) if node.users else None
        if parts is None:
            continue
        dim = _slice_arguments(node)[2]
        with graph.inserting_before(node):
            like = tensor_of(node)
            sources = [_source(graph, part, like.dtype) for part in parts]
            columns = [
                _call(graph, torch.ops.aten.unsqueeze.default, source, dim + 1)
                for source in sources
            ]
            stacked = _call(graph, torch.ops.aten.cat.default, columns, dim + 1)
            result = _call(graph, torch.ops.aten.reshape.default, stacked, list(like.shape))
        node.replace_all_uses_with(result)
        _erase_chain(node)
        done += 1
    return done


def simplify(graph: fx.Graph) -> None:
    """Drop assertions about dtypes, and name the pieces of every split."""
    for node in list(graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)
        elif node.target is torch.ops.aten.split.Tensor:
            x, _, *dim = node.args
            along = int(dim[0] if dim else node.kwargs.get("dim", 0))  # type: ignore[call-overload]
            sizes = [part.shape[along] for part in node.meta["val"]]
            node.target = torch.ops.aten.split_with_sizes.default
            node.args, node.kwargs = (x, sizes, along), {}
    erase_dead(graph)


def _erase_chain(node: fx.Node) -> None:
    """Remove the writes that nothing reads any more, last to first."""
    while node.target is _SLICE_SCATTER and not node.users:
        base, source = node.args[0], node.args[1]
        node.graph.erase_node(node)
        for dead in (source, base):
            if isinstance(dead, fx.Node) and dead.target is _COPY and not dead.users:
                destination = dead.args[0]
                node.graph.erase_node(dead)
                if isinstance(destination, fx.Node) and not destination.users:
                    node.graph.erase_node(destination)
        assert isinstance(base, fx.Node)
        node = base


def _parts(last: fx.Node) -> list[fx.Node] | None:
    """What is written at offsets 0, 1, ... of every stride, when that fills the tensor."""
    if last.target is not _SLICE_SCATTER:
        return None
    _, _, dim, _, _, step = _slice_arguments(last)
    size = tensor_of(last).shape[dim]
    written: dict[int, fx.Node] = {}
    node: Any = last
    while isinstance(node, fx.Node) and node.target is _SLICE_SCATTER:
        base, source, own_dim, start, end, own_step = _slice_arguments(node)
        if (own_dim, own_step) != (dim, step) or end < size or not 0 <= start < step:
            return None
        written.setdefault(start, source)
        node = base
    if step < 2 or size % step or sorted(written) != list(range(step)):
        return None
    return [written[offset] for offset in range(step)]


def _slice_arguments(node: fx.Node) -> tuple[Any, Any, int, int, int, int]:
    names = ("self", "src", "dim", "start", "end", "step")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    size = tensor_of(node).shape[given.get("dim", 0)]
    return (
        given["self"],
        given["src"],
        int(given.get("dim", 0)) % tensor_of(node).dim(),
        int(given.get("start") or 0),
        size if given.get("end") is None else int(given["end"]),
        int(given.get("step", 1)),
    )


def _source(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """The value that is written, free of the tensor that it is written into."""
    if node.target is not _COPY:
        return node
    shape = list(tensor_of(node).shape)
    source = node.args[1]
    assert isinstance(source, fx.Node)
    if tensor_of(source).dtype != dtype:
        source = _call(graph, torch.ops.aten._to_copy.default, source, dtype=dtype)
    if list(tensor_of(source).shape) != shape:
        source = _call(graph, torch.ops.aten.expand.default, source, shape)
    return source


def _call(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """A new node with the fake tensor that tells its shape."""
    node = graph.call_function(target, args, kwargs)
    values = fx.map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta["val"] = target(*values[0], **values[1])
    return node
