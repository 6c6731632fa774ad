"""Transposed convolutions, in a form that Torch-TensorRT's converter and TensorRT's builder take.

- One dimension becomes two: the converter takes the kernel for the input where the kernel is a
  tensor of the network (a weight that is an engine's input, say) and there is one dimension::

      conv_transpose1d(x, w)  ->  squeeze(conv_transpose2d(unsqueeze(x), unsqueeze(w)))

- bfloat16 is computed in float32, and rounded once, as torch accumulates: the builder does not know
  it ("Could not infer output types ... deconv", TensorRT-RTX 1.6.1).
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import fx

from ..ir.program import arguments, erase_dead, tensor_of
from ..ir.writer import Writer

aten: Final = torch.ops.aten
_CAST: Final = aten._to_copy.default


def deconvolutions(graph: fx.Graph) -> None:
    """Rewrite the transposed convolutions of ``graph``, in place."""
    writer = Writer(graph)
    for node in graph.find_nodes(op="call_function", target=aten.convolution.default):
        named = arguments(node)
        is_flat = len(named["stride"]) == 1
        is_bfloat16 = tensor_of(node).dtype == torch.bfloat16
        if not named["transposed"] or not (is_flat or is_bfloat16):
            continue
        writer.origin = node
        with graph.inserting_before(node):
            result = _computed(writer, named, is_flat=is_flat, is_bfloat16=is_bfloat16)
        node.replace_all_uses_with(result)
    erase_dead(graph)


def _computed(
    writer: Writer, named: dict[str, Any], *, is_flat: bool, is_bfloat16: bool
) -> fx.Node:
    if is_flat:
        for name in ("input", "weight"):
            named[name] = writer.op(aten.unsqueeze.default, named[name], -1)
        for name, one in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0)):
            named[name] = [*named[name], one]
    if is_bfloat16:
        for name in ("input", "weight", "bias"):
            if named[name] is not None:
                named[name] = writer.op(_CAST, named[name], dtype=torch.float32)
    result = writer.op(aten.convolution.default, *named.values())
    if is_bfloat16:
        result = writer.op(_CAST, result, dtype=torch.bfloat16)
    return writer.op(aten.squeeze.dim, result, -1) if is_flat else result
