"""The replayer against independent truth, and faults that only a network can show.

Truth: ONNX models that TensorRT's own parser turns into networks, run by onnxruntime.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from cp_convert import ContextParallelInput, ContextParallelOutput
from cp_convert.backends import BACKENDS
from cp_convert.engine.build import network_of, prepare
from cp_convert.engine.lower import lower
from cp_convert.engine.readback import constants_of, read_network
from cp_convert.engine.specialise import specialise
from cp_convert.errors import ProofFailed
from cp_convert.ir.network import Layer, Network
from cp_convert.ir.program import Lowered
from cp_convert.ir.proof import Error
from cp_convert.job import STRATEGY_NAMES
from cp_convert.model.cast import cast_inputs, cast_module
from cp_convert.prove import Proof, flat_inputs, measure, prove, prove_networks
from cp_convert.prove.layers import LAYERS
from cp_convert.prove.replay import replay
from cp_convert.trt.libraries import trt
from tests.conftest import TINY_PLAN, rewritten, tiny, tiny_inputs
from tests.sharding.test_shard import joint, joint_inputs, mask_of, model, sdpa, tokens

pytestmark = pytest.mark.engine
prepare(BACKENDS["tensorrt-rtx"])

FLOAT = TensorProto.FLOAT


def array(*shape: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def parsed(model: onnx.ModelProto) -> Network:
    """The network that TensorRT's own ONNX parser makes."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    assert parser.parse(model.SerializeToString()), parser.get_error(0).desc()
    return read_network(network)


def compare(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, np.ndarray[Any, Any]],
    constants: Mapping[str, np.ndarray[Any, Any]] | None = None,
) -> set[str]:
    """Replay and onnxruntime agree; returns the kinds of layers that were met."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(n, FLOAT, x.shape) for n, x in inputs.items()],
        [helper.make_tensor_value_info("out", FLOAT, None)],
        [numpy_helper.from_array(x, n) for n, x in (constants or {}).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (truth,) = session.run(["out"], dict(inputs))
    network = parsed(model)
    tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
    ((ours,),) = replay([network], tensors)
    torch.testing.assert_close(ours, torch.from_numpy(truth), rtol=1e-5, atol=1e-5)
    return {layer.kind for layer in network.layers}


X = {"x": array(2, 6, 4)}
XY = {"x": array(2, 6, 4), "y": array(2, 6, 4, seed=1)}
INTS = np.int64


def node(op: str, *names: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, list(names), ["out"], **attributes)


@pytest.mark.parametrize("op", ["Add", "Sub", "Mul", "Div", "Max", "Min"])
def test_elementwise(op: str) -> None:
    assert "ELEMENTWISE" in compare([node(op, "x", "y")], XY)


def test_broadcasting_and_powers() -> None:
    compare([node("Mul", "x", "y")], {"x": array(2, 6, 4), "y": array(1, 1, 4)})
    compare([node("Pow", "x", "c")], {"x": np.abs(array(2, 3)) + 1}, {"c": array(1, 3)})


@pytest.mark.parametrize(
    "op",
    [
        "Exp",
        "Sqrt",
        "Reciprocal",
        "Abs",
        "Neg",
        "Sin",
        "Cos",
        "Ceil",
        "Floor",
        "Erf",
        "Log",
        "Sign",
    ],
)
def test_unary(op: str) -> None:
    compare([node(op, "x")], {"x": np.abs(array(3, 5)) + 0.1})


@pytest.mark.parametrize(
    ("op", "attributes"),
    [
        ("Relu", {}),
        ("Sigmoid", {}),
        ("Tanh", {}),
        ("LeakyRelu", {"alpha": 0.3}),
        ("Elu", {"alpha": 0.7}),
        ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}),
        ("Softplus", {}),
    ],
)
def test_activations(op: str, attributes: dict[str, float]) -> None:
    assert "ACTIVATION" in compare([node(op, "x", **attributes)], X)


@pytest.mark.parametrize("order", [[2, 0, 1], [1, 0, 2], [0, 2, 1]])
def test_shuffle_transposes(order: list[int]) -> None:
    assert "SHUFFLE" in compare([node("Transpose", "x", perm=order)], X)


@pytest.mark.parametrize("shape", [[4, 12], [0, -1], [2, 2, 3, 4], [-1]])
def test_shuffle_reshapes(shape: list[int]) -> None:
    compare([node("Reshape", "x", "s")], X, {"s": np.array(shape, INTS)})


def test_transpose_and_reshape_in_one_layer() -> None:
    steps = [
        helper.make_node("Transpose", ["x"], ["a"], perm=[2, 0, 1]),
        helper.make_node("Reshape", ["a", "s"], ["b"]),
        node("Transpose", "b", perm=[1, 0]),
    ]
    compare(steps, X, {"s": np.array([8, 6], INTS)})


@pytest.mark.parametrize(
    ("starts", "ends", "axes", "steps"),
    [
        ([1], [5], [1], [2]),
        ([0, 1], [1, 4], [0, 2], [1, 1]),
        ([-3], [100], [1], [1]),
        ([5], [0], [1], [-2]),
    ],
)
def test_slices(starts: list[int], ends: list[int], axes: list[int], steps: list[int]) -> None:
    constants = {
        name: np.array(value, INTS)
        for name, value in (("a", starts), ("b", ends), ("c", axes), ("d", steps))
    }
    assert "SLICE" in compare([node("Slice", "x", "a", "b", "c", "d")], X, constants)


def test_concatenation_and_expansion() -> None:
    assert "CONCATENATION" in compare([node("Concat", "x", "y", axis=1)], XY)
    compare([node("Expand", "x", "s")], {"x": array(2, 1, 4)}, {"s": np.array([2, 5, 4], INTS)})


@pytest.mark.parametrize("op", ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin"])
@pytest.mark.parametrize(("axes", "keep"), [([1], 1), ([0, 2], 0), ([-1], 0)])
def test_reductions(op: str, axes: list[int], keep: int) -> None:
    constants = {"a": np.array(axes, INTS)}
    assert "REDUCE" in compare([node(op, "x", "a", keepdims=keep)], X, constants)


@pytest.mark.parametrize(
    ("a", "b"), [((2, 3, 4), (2, 4, 5)), ((2, 3, 4), (1, 4, 5)), ((3, 4), (4, 2))]
)
def test_matrix_products(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    assert "MATRIX_MULTIPLY" in compare(
        [node("MatMul", "x", "y")], {"x": array(*a), "y": array(*b)}
    )


def test_transposed_matrix_products() -> None:
    compare([node("Gemm", "x", "y", transB=1)], {"x": array(3, 4), "y": array(5, 4)})


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_gather(axis: int) -> None:
    constants = {"i": np.array([[0, 1], [-1, 0]], INTS)}
    assert "GATHER" in compare([node("Gather", "x", "i", axis=axis)], X, constants)


def test_normalization() -> None:
    constants = {"s": array(4, seed=2), "b": array(4, seed=3)}
    steps = [node("LayerNormalization", "x", "s", "b", axis=-1, epsilon=1e-3)]
    assert "NORMALIZATION" in compare(steps, X, constants)


@pytest.mark.parametrize("axis", [1, -1])
def test_softmax(axis: int) -> None:
    assert "SOFTMAX" in compare([node("Softmax", "x", axis=axis)], X)


@pytest.mark.parametrize(
    "attributes",
    [
        {"strides": [1, 2], "pads": [0, 0, 0, 0]},
        {"strides": [1, 1], "pads": [1, 2, 0, 1], "dilations": [1, 2]},
        {"strides": [2, 2], "pads": [1, 0, 1, 0], "group": 2},
    ],
)
def test_convolution(attributes: dict[str, Any]) -> None:
    kernel = array(6, 4 // attributes.get("group", 1), 2, 2, seed=4)
    constants = {"k": kernel, "b": array(6, seed=5)}
    assert "CONVOLUTION" in compare(
        [node("Conv", "x", "k", "b", **attributes)], {"x": array(2, 4, 7, 8)}, constants
    )


def test_squeezing_casting_selecting() -> None:
    compare([node("Unsqueeze", "x", "a")], X, {"a": np.array([0, -1], INTS)})
    compare([node("Squeeze", "x", "a")], {"x": array(2, 1, 4)}, {"a": np.array([1], INTS)})
    steps = [
        helper.make_node("Greater", ["x", "y"], ["c"]),
        helper.make_node("Where", ["c", "x", "y"], ["d"]),
        helper.make_node("Cast", ["d"], ["e"], to=TensorProto.INT64),
        node("Cast", "e", to=FLOAT),
    ]
    assert {"SELECT", "CAST"} <= compare(steps, XY)


def test_tensorrts_own_attention_layer() -> None:
    """The parser makes none, so this one is made by hand and held against torch."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    q, k, v = (network.add_input(n, trt.float32, (2, 3, 8, 4)) for n in "qkv")
    attention = network.add_attention_v2(
        q, k, v, trt.AttentionNormalizationOp.SOFTMAX, trt.CausalMaskKind.NONE
    )
    attention.decomposable = True
    network.mark_output(attention.get_output(0))
    tensors = {n: torch.from_numpy(array(2, 3, 8, 4, seed=i)) for i, n in enumerate("qkv")}
    ((ours,),) = replay([read_network(network)], tensors)
    scores = tensors["q"] @ tensors["k"].mT
    torch.testing.assert_close(ours, torch.softmax(scores, -1) @ tensors["v"])


def test_every_reader_has_a_meaning() -> None:
    from cp_convert.engine.readback import _READERS

    assert set(_READERS) - {"DIST_COLLECTIVE"} == set(LAYERS)


def test_a_layer_that_is_not_known_is_an_error() -> None:
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    x = network.add_input("x", trt.float32, (4, 4))
    network.mark_output(network.add_topk(x, trt.TopKOperation.MAX, 2, 1).get_output(0))
    with pytest.raises(ProofFailed, match="cannot read a TOPK layer"):
        read_network(network)


# --- networks of our own, with and without faults -------------------------------------------------


Prepared = tuple[list[Network], Proof, dict[str, Tensor], Lowered]


def prepared(name: str, world: int, dtype: torch.dtype = torch.float32) -> Prepared:
    """All ranks' networks of the tiny model, and the proof of its program."""
    module = tiny()
    cast_module(module, dtype)
    return prepared_from(module, cast_inputs(tiny_inputs(), dtype), name, world, TINY_PLAN)


def prepared_from(
    module: nn.Module,
    inputs: dict[str, Any],
    name: str,
    world: int,
    plan: Mapping[str, Any] | None = None,
) -> Prepared:
    """The same of any model; without a plan, one is found."""
    stages = rewritten(module, inputs, name, world, plan or {})
    lowered = lower(stages.rewritten)
    proof = prove(measure(module, inputs), inputs, replace(stages, lowered=lowered))
    networks: list[Network] = []
    for rank in range(world):
        interpreter = network_of(specialise(lowered, rank))
        known = [*lowered.state.values(), *constants_of(networks)]
        networks.append(read_network(interpreter.ctx.net, known))
    return networks, proof, flat_inputs(lowered, inputs), lowered


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_networks_are_proven(name: str, dtype: torch.dtype) -> None:
    world = 4 if name == "usp" else 3 if dtype == torch.float32 else 2
    networks, proof, inputs, lowered = prepared(name, world, dtype)
    found = prove_networks(networks, inputs, proof, lowered)
    assert all(error.max < 1e-5 for error in found.algebra)
    assert all(error.within(proof.bound) for error in found.ranks)


def test_no_network_is_blamed_for_what_the_dense_model_loses() -> None:
    """As the program is not: where the bound shows nothing, that is said."""
    networks, proof, inputs, lowered = prepared("ulysses", 2, torch.bfloat16)
    narrow = replace(proof, bound=Error(1e-9, 1e-9))
    with pytest.raises(ProofFailed, match="the networks go astray"):
        prove_networks(networks, inputs, narrow, lowered)
    unheld = replace(narrow, rounded=proof.reference)
    with pytest.raises(ProofFailed, match="nothing can be proven in this precision"):
        prove_networks(networks, inputs, unheld, lowered)


def selected(q: Tensor, k: Tensor, v: Tensor, given: Tensor) -> Tensor:
    """A boolean mask made the way HunyuanVideo makes its: selected, then written into."""
    mask = torch.where(given > 0.5, given < 0.9, given > 0.2)
    mask[..., 0] = True
    return sdpa(q, k, v, mask)


@pytest.mark.parametrize("name", STRATEGY_NAMES)
def test_networks_with_boolean_masks_are_proven(name: str) -> None:
    """Torch-TensorRT makes such a mask an integer, and adds it to the scores."""
    mask = torch.rand(23, 23, generator=torch.Generator().manual_seed(5))
    inputs = {"x": tokens(23), "given": mask}
    networks, proof, flat, lowered = prepared_from(model(selected), inputs, name, 2)
    found = prove_networks(networks, flat, proof, lowered)
    assert all(error.max < 1e-5 for error in found.algebra)


def test_weights_are_held_once() -> None:
    networks, _, _, lowered = prepared("ulysses", 2, torch.bfloat16)
    held = {t.untyped_storage().data_ptr() for t in constants_of(networks[:1]) if t.numel() > 100}
    again = {t.untyped_storage().data_ptr() for t in constants_of(networks[1:]) if t.numel() > 100}
    own = {t.untyped_storage().data_ptr() for t in lowered.state.values()}
    assert again == held
    assert len(held & own) >= 4


Edit = Callable[[list[Layer]], list[Layer]]


def edited(network: Network, edit: Edit) -> Network:
    return replace(network, layers=tuple(edit(list(network.layers))))


def first(layers: list[Layer], kind: str) -> int:
    return next(i for i, layer in enumerate(layers) if layer.kind == kind)


def with_parameters(layer: Layer, **changes: Any) -> Layer:
    return replace(layer, parameters={**layer.parameters, **changes})


def a_dropped_collective(layers: list[Layer]) -> list[Layer]:
    i = first(layers, "DIST_COLLECTIVE")
    layers[i] = replace(layers[i], kind="IDENTITY", parameters={})
    return layers


def keys_and_values_swapped(layers: list[Layer]) -> list[Layer]:
    i = first(layers, "ATTENTION_INPUT")
    q, k, v = layers[i].inputs[:3]
    layers[i] = replace(layers[i], inputs=(q, v, k))
    return layers


def a_stale_group(layers: list[Layer]) -> list[Layer]:
    i = first(layers, "DIST_COLLECTIVE")
    layers[i] = with_parameters(layers[i], group=[1, 0])
    return layers


def a_dropped_bias(layers: list[Layer]) -> list[Layer]:
    """A bias that is not added: what plain REFIT was reported to do to a GEMM."""
    i = next(i for i, x in enumerate(layers) if x.kind == "ELEMENTWISE" and "add_bias" in x.name)
    layers[i] = replace(layers[i], kind="IDENTITY", parameters={}, inputs=layers[i].inputs[:1])
    return layers


@pytest.mark.parametrize(
    "edit", [a_dropped_collective, keys_and_values_swapped, a_stale_group, a_dropped_bias]
)
def test_a_fault_in_every_ranks_network_is_caught(edit: Edit) -> None:
    networks, proof, inputs, lowered = prepared("ulysses", 2)
    with pytest.raises(ProofFailed, match="astray"):
        prove_networks([edited(network, edit) for network in networks], inputs, proof, lowered)


def test_a_mask_in_the_wrong_order_is_caught() -> None:
    """Columns in the model's order (text, image), where keys stand as text0, image0, text1, ..."""

    def unordered(layers: list[Layer]) -> list[Layer]:
        by_result = {layer.outputs[0].name: i for i, layer in enumerate(layers)}
        attention = layers[first(layers, "ATTENTION_INPUT")]
        i = by_result[attention.parameters["mask"]]
        while layers[i].kind != "CONCATENATION":
            i = by_result[layers[i].inputs[0]]
        text0, image0, text1, image1 = layers[i].inputs
        layers[i] = replace(layers[i], inputs=(text0, text1, image0, image1))
        return layers

    inputs = {**joint_inputs(12), "given": mask_of((1, 1, 36), "additive")}
    networks, proof, flat, lowered = prepared_from(joint(), inputs, "ulysses", 2)
    prove_networks(networks, flat, proof, lowered)
    with pytest.raises(ProofFailed, match="astray"):
        prove_networks([edited(network, unordered) for network in networks], flat, proof, lowered)


def test_a_slice_of_the_wrong_rank_is_caught() -> None:
    networks, proof, inputs, lowered = prepared("ulysses", 2)
    with pytest.raises(ProofFailed, match="astray"):
        prove_networks([networks[0], networks[0]], inputs, proof, lowered)


def test_a_group_that_leaves_a_rank_out_is_caught() -> None:
    def outside(layers: list[Layer]) -> list[Layer]:
        i = first(layers, "DIST_COLLECTIVE")
        layers[i] = with_parameters(layers[i], group=[0, 2])
        return layers

    networks, proof, inputs, lowered = prepared("ulysses", 2)
    with pytest.raises(ProofFailed, match=r"on rank 1 names the group \[0, 2\]"):
        prove_networks([edited(network, outside) for network in networks], inputs, proof, lowered)


def test_a_rank_built_from_another_program_is_caught() -> None:
    ulysses, proof, inputs, lowered = prepared("ulysses", 2)
    ring, _, _, _ = prepared("ring", 2)
    with pytest.raises(ProofFailed, match="not of the same program"):
        prove_networks([ulysses[0], ring[1]], inputs, proof, lowered)


def test_a_wrong_permutation_in_our_converter_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted in the converter itself: blocks arrive in the reverse order of ranks."""
    from cp_convert.converters import lowerings as converters

    original = converters.LOWERINGS["all_to_all"]

    def reversed_blocks(ctx: Any, name: str, x: Any, groups: list[int], size: int) -> Any:
        received = original(ctx, name, x, groups, size)
        shape = list(received.shape)
        start, stride = [0] * len(shape), [1] * len(shape)
        blocks = []
        for block in reversed(range(size)):
            start[0] = block * (shape[0] // size)
            part = [shape[0] // size, *shape[1:]]
            blocks.append(ctx.net.add_slice(received, start, part, stride).get_output(0))
        joined = ctx.net.add_concatenation(blocks)
        joined.axis = 0
        return joined.get_output(0)

    monkeypatch.setitem(converters.LOWERINGS, "all_to_all", reversed_blocks)
    prepare(BACKENDS["tensorrt-rtx"])
    try:
        networks, proof, inputs, lowered = prepared("ulysses", 2)
    finally:
        monkeypatch.undo()
        prepare(BACKENDS["tensorrt-rtx"])
    with pytest.raises(ProofFailed, match="although the program they were made from does not"):
        prove_networks(networks, inputs, proof, lowered)


def test_constants_that_lowering_rounded_are_told_from_faults() -> None:
    """A table computed from constants in float16 is folded with float16's rounding."""

    class Table(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = tiny()
            self.register_buffer("grid", torch.linspace(0.1, 0.9, 8))

        def forward(self, x: Tensor, text: Tensor) -> Tensor:
            return self.inner(x * (self.grid * 1.7).exp(), text)

    plan = {
        "": {"x": ContextParallelInput(1)},
        "inner.leave": ContextParallelOutput(1),
    }
    module = Table().eval()
    cast_module(module, torch.float16)
    inputs = cast_inputs(tiny_inputs(), torch.float16)
    stages = rewritten(module, inputs, "ring", 2, plan)
    lowered = lower(stages.rewritten)
    proof = prove(measure(module, inputs), inputs, replace(stages, lowered=lowered))
    interpreters = [network_of(specialise(lowered, rank)) for rank in range(2)]
    networks = [read_network(interpreter.ctx.net) for interpreter in interpreters]
    flat = flat_inputs(lowered, inputs)
    found = prove_networks(networks, flat, proof, lowered)
    assert 1e-5 < max(error.max for error in found.algebra) < proof.bound.max
    faulty = [edited(network, a_dropped_bias) for network in networks]
    with pytest.raises(ProofFailed, match="the networks go astray"):
        prove_networks(faulty, flat, proof, lowered)
