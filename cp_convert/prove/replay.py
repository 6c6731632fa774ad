"""A TensorRT network, run layer by layer with torch, all ranks in lockstep.

What runs is what was handed to TensorRT's builder (:mod:`..ir.network`), with the meaning that
TensorRT's operator documentation gives each layer. An unknown layer, or an attribute whose meaning
is not implemented, is an error and never skipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor

from ..errors import ProofFailed
from ..ir import ops
from ..ir.network import FP4, Layer, Network, Result
from ..ir.nvfp4 import from_pairs
from ..ir.program import HALF
from ..ir.quantize import LARGEST
from .device import exact
from .layers import LAYERS
from .lockstep import HalfMatmulsInFloat32, PerRank, merged

NOTHING: Final[Mapping[str, tuple[Tensor, ...]]] = {}
SAME: Final[Mapping[str, str]] = {}


def replay_pieces(
    pieces: Sequence[Sequence[Network]],
    inputs: Mapping[str, Tensor],
    *,
    own: Mapping[str, tuple[Tensor, ...]] = NOTHING,
    widen: bool = False,
    names: Sequence[Mapping[str, str]] = (),
) -> list[list[Tensor]]:
    """Run all ranks' networks of one piece after another, each on what earlier ones return.

    See :func:`replay`, which is this for one piece; the outputs are the last one's. ``names`` are
    those of every piece, where several have the same networks.
    """
    between: dict[str, PerRank] = {}
    outputs: list[list[Tensor]] = []
    for networks, called in zip(pieces, names or [SAME] * len(pieces), strict=True):
        outputs = replay(networks, inputs, own=own, widen=widen, between=between, names=called)
        for number, binding in enumerate(networks[0].outputs):
            name = called.get(binding.name, binding.name)
            between[name] = merged([of_rank[number] for of_rank in outputs])
    return outputs


def replay(
    networks: Sequence[Network],
    inputs: Mapping[str, Tensor],
    *,
    own: Mapping[str, tuple[Tensor, ...]] = NOTHING,
    widen: bool = False,
    between: Mapping[str, PerRank] | None = None,
    names: Mapping[str, str] = SAME,
) -> list[list[Tensor]]:
    """Run every rank's network on the same full inputs.

    Args:
        networks: one for every rank, rank 0 first.
        inputs: by binding name.
        own: inputs that differ from rank to rank: weights of which every rank has its share.
        widen: compute in float32 wherever a network says float16 or bfloat16.
        between: inputs that networks before have returned, which are taken as they are.
        names: by binding, under which name its value is known, where that is another.

    Returns:
        Every rank's outputs, in the order of the networks' own.

    Raises:
        ProofFailed: the ranks' networks are not of one program, or a layer is not understood.
    """
    world = len(networks)
    _check_alike(networks)
    order = _order(networks[0])
    known, env = between or {}, dict[str, PerRank]()
    for b in networks[0].inputs:
        name = names.get(b.name, b.name)
        if name in known:
            env[b.name] = known[name]
            continue
        given = own[name] if name in own else (inputs[name],)
        env[b.name] = PerRank(tuple(_in(one, b.dtype, widen) for one in given))
    dying = _last_uses(networks[0], order)
    with torch.no_grad(), exact(), HalfMatmulsInFloat32():
        for position in order:
            alike = [network.layers[position] for network in networks]
            env.update(_run(alike, env, world, widen=widen))
            for name in dying.get(position, ()):
                env.pop(name, None)
    outputs = networks[0].outputs
    return [[env[b.name][rank] for b in outputs] for rank in range(world)]


def _check_alike(networks: Sequence[Network]) -> None:
    """Ranks run one program: the same layers in the same order, on the same names."""
    first = networks[0]
    for rank, network in enumerate(networks):
        shape = [(x.kind, x.name, x.inputs, x.outputs) for x in network.layers]
        if shape != [(x.kind, x.name, x.inputs, x.outputs) for x in first.layers]:
            raise ProofFailed(f"rank {rank}'s network is not of the same program as rank 0's.")
        if network.inputs != first.inputs or network.outputs != first.outputs:
            raise ProofFailed(f"rank {rank}'s network has other bindings than rank 0's.")


def _results_of(layer: Layer) -> list[str]:
    if len(layer.outputs) != 1 and layer.kind != "DYNAMIC_QUANTIZE":
        raise ProofFailed(f"{layer.name}: a {layer.kind} of several results is not understood.")
    return [result.name for result in layer.outputs]


def _in(tensor: Tensor, dtype: torch.dtype, widen: bool) -> Tensor:
    """An input as the binding takes it (TensorRT has no float64); of 4 bits, its numbers."""
    if dtype == FP4:
        return from_pairs(tensor)
    tensor = tensor.to(dtype)
    return tensor.float() if widen and dtype in HALF else tensor


def _order(network: Network) -> list[int]:
    """Every layer after what it reads; an attention's mask may be added after the attention."""
    known = {binding.name for binding in network.inputs}
    waiting, order = list(range(len(network.layers))), []
    while waiting:
        late = []
        for position in waiting:
            layer = network.layers[position]
            if all(name in known for name in _reads(layer)):
                order.append(position)
                known.update(_results_of(layer))
            else:
                late.append(position)
        if len(late) == len(waiting):
            raise ProofFailed(f"{network.layers[late[0]].name} reads what no layer computes.")
        waiting = late
    return order


def _last_uses(network: Network, order: Sequence[int]) -> dict[int, list[str]]:
    last: dict[str, int] = {}
    for position in order:
        layer = network.layers[position]
        for name in (*_reads(layer), *_results_of(layer)):
            last[name] = position
    kept = {b.name for b in network.outputs}
    dying: dict[int, list[str]] = {}
    for name, position in last.items():
        if name not in kept:
            dying.setdefault(position, []).append(name)
    return dying


def _reads(layer: Layer) -> list[str]:
    mask = layer.parameters.get("mask")
    return [name for name in (*layer.inputs, mask) if name is not None]


def _run(
    layers: Sequence[Layer], env: Mapping[str, PerRank], world: int, *, widen: bool
) -> dict[str, PerRank]:
    """What a layer gives on all ranks, by the names of its results."""
    first = layers[0]
    reads = [env[name] for name in _reads(first)]
    if first.kind == "DIST_COLLECTIVE":
        return {
            _results_of(first)[0]: _collective(layers, [reads[0][rank] for rank in range(world)])
        }
    compute = LAYERS.get(first.kind)
    if compute is None:
        raise ProofFailed(f"the network proof does not know the layer {first.kind}: {first.name}.")
    ranks = first.parameters.get("num_ranks", 1)
    if ranks not in (1, world):
        raise ProofFailed(f"{first.name} attends over {ranks} of {world} ranks.")
    if ranks > 1 and first.parameters["mask"] is not None:
        raise ProofFailed(f"{first.name}: a mask of multi-device attention is not understood.")
    alike = all(_same(layer.parameters, first.parameters) for layer in layers)
    count = 1 if alike and all(value.is_common for value in reads) else world
    results = []
    for rank in range(count):
        arguments = [None if n is None else env[n][rank] for n in layers[rank].inputs]
        if ranks > 1:
            arguments[1:3] = [torch.cat([env[str(n)][r] for r in range(world)], dim=2)
                              for n in first.inputs[1:3]]  # fmt: skip
        mask = layers[rank].parameters.get("mask")
        if first.kind == "ATTENTION_INPUT":
            arguments.append(None if mask is None else env[mask][rank])
        given = compute(layers[rank], arguments)
        every = given if isinstance(given, tuple) else (given,)
        declared = zip(every, first.outputs, strict=True)
        results.append([_out(one, first, like, widen=widen) for one, like in declared])
    columns = zip(_results_of(first), zip(*results, strict=True), strict=True)
    return {name: PerRank(values) for name, values in columns}


def _same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(
        a[key] is b[key] or (not isinstance(a[key], Tensor) and a[key] == b[key]) for key in b
    )


def _out(result: Tensor, layer: Layer, declared: Result, *, widen: bool) -> Tensor:
    """The result in the tensor's declared type; a layer may compute in a wider one."""
    if not _fits(result, declared.shape):
        raise ProofFailed(
            f"{layer.name} gives {list(result.shape)} but declares {list(declared.shape)}."
        )
    is_codes = declared.dtype in LARGEST or declared.dtype == FP4
    if is_codes and result.dtype == torch.float32:
        return result  # not rounded, see :mod:`.quantizers`; those of 4 bits are always numbers
    if result.dtype != declared.dtype and not _may_convert(result.dtype, declared.dtype):
        raise ProofFailed(f"{layer.name} gives {result.dtype} but declares {declared.dtype}.")
    is_wide = widen and declared.dtype in HALF
    return result.float() if is_wide else result.to(declared.dtype)


def _fits(result: Tensor, shape: Sequence[int]) -> bool:
    """Whether it has the shape; -1 is a dimension that is known only when the network runs."""
    return result.dim() == len(shape) and all(
        told in (-1, here) for here, told in zip(result.shape, shape, strict=True)
    )


def _may_convert(have: torch.dtype, want: torch.dtype) -> bool:
    integers = (torch.int32, torch.int64)
    return (have.is_floating_point and want.is_floating_point) or (
        have in integers and want in integers
    )


_OPERATORS: Final = {op._schema.name.split("::")[1].upper(): op for op in ops.COLLECTIVES}


def _collective(layers: Sequence[Layer], values: Sequence[Tensor]) -> PerRank:
    """From all ranks' values; every rank's own layer says who its peers are."""
    flat: list[int] = []
    kind, root, reduce = (layers[0].parameters[key] for key in ("kind", "root", "reduce"))
    for rank, layer in enumerate(layers):
        told = layer.parameters
        group = told["group"]
        if rank not in group or told["num_ranks"] != len(group):
            raise ProofFailed(
                f"{layer.name} on rank {rank} names the group {group} of {told['num_ranks']}."
            )
        if (told["kind"], told["root"], told["reduce"]) != (kind, root, reduce):
            raise ProofFailed(f"{layer.name}: the ranks disagree on what is communicated.")
        if layers[group[0]].parameters["group"] != group:
            raise ProofFailed(f"{layer.name}: rank {group[0]} does not name rank {rank} its peer.")
        if rank == group[0]:
            flat += group
    if kind not in _OPERATORS or sorted(flat) != list(range(len(layers))):
        raise ProofFailed(f"{layers[0].name}: a {kind} over {flat} is not understood.")
    rest = [reduce] * (reduce != "none") + [root] * (root >= 0)
    size = layers[0].parameters["num_ranks"]
    results = ops.on_all_ranks(_OPERATORS[kind], values, [*rest, flat, size])
    return merged(results)
