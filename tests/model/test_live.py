"""Modules that ModelOpt has quantized live: by a stand-in with its attributes, and by the real one.

The stand-in's quantizers compute what ModelOpt's do on a CPU, so that what comes out can be held
against the module's own forward.
"""

import textwrap
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.checkpoints.exported import on_a_cpu
from cp_convert.backends import BACKENDS
from cp_convert.cache.store import Cache
from cp_convert.capture.capture import capture, traced
from cp_convert.engine.build import prepare
from cp_convert.errors import ConvertError
from cp_convert.ir.quantize import FP8
from cp_convert.ir.records import Loaded
from cp_convert.ir.source import Source
from cp_convert.job import Job
from cp_convert.model.load import load, surroundings
from cp_convert.model.quantizers import scales
from cp_convert.progress import Clock, Progress
from cp_convert.prove import flat_inputs
from cp_convert.prove.lockstep import run
from cp_convert.quantizing import quantized
from tests.conftest import table
from tests.model.test_modelopt import MODEL as PLAIN

MODEL = (
    PLAIN.replace("self.qkv, self.out =", "self.norm, self.qkv, self.out = nn.LayerNorm(64),")
    .replace("self.qkv(x)", "self.qkv(self.norm(x))")
    .replace("def build_model()", "def plain()")
)
"""With a norm, as ModelOpt puts quantizers there too; ``build_model`` is each test's."""

STAND_IN = """
class TensorQuantizer(nn.Module):
    def __init__(self, num_bits=(4, 3), axis=None):
        super().__init__()
        self.num_bits, self.axis, self.block_sizes, self.unsigned = num_bits, axis, None, False
        self.fake_quant, self.is_enabled, self._dynamic, self._if_calib = True, True, False, True
        self.bias, self.rotate_is_enabled, self.pre_quant_scale = None, False, None

    @property
    def amax(self):
        return getattr(self, "_amax", None)

    def forward(self, x):
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale
        if self._if_calib:
            over = x.abs().amax(1, True) if self.axis == 0 else x.abs().amax()
            self.register_buffer("_amax", over)
        elif self.is_enabled and self.num_bits == (4, 3):
            codes = (x * (448 / self.amax)).clamp(-448, 448).to(torch.float8_e4m3fn)
            x = codes.to(x.dtype) / (448 / self.amax)
        elif self.is_enabled:
            x = (x * (127 / self.amax)).round().clamp(-128, 127) / (127 / self.amax)
        return x

LOW = torch.eye(64)

class QuantLinear(nn.Linear):
    def forward(self, x):
        x, weight = self.input_quantizer(x), self.weight_quantizer(self.weight)
        return functional.linear(x, weight, self.bias)

class QuantLayerNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(self.input_quantizer(x))

for one in (QuantLinear, QuantLayerNorm, TensorQuantizer):
    one.__module__ = "modelopt.torch.quantization.nn"

def build_model():
    model = plain()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Linear) and "blocks" in name:
            layer.__class__ = QuantLinear
            layer.input_quantizer = TensorQuantizer(BITS)
            layer.weight_quantizer = TensorQuantizer(BITS, 0 if BITS == 8 else None)
            layer.output_quantizer = TensorQuantizer()
            layer.output_quantizer.is_enabled = False
            if BITS == 8 or SMOOTH:
                factors = torch.linspace(0.5, 1.5, layer.weight.shape[1])
                layer.weight.data /= factors
                layer.input_quantizer.pre_quant_scale = factors
    with torch.no_grad():
        model(**example_inputs())
    for one in model.modules():
        if isinstance(one, TensorQuantizer):
            one._if_calib = False
    CHANGE
    return model
"""

REAL = """
import modelopt.torch.quantization as mtq

def build_model():
    model = plain()
    mtq.quantize(model, mtq.CONFIG, lambda model: model(**example_inputs()))
    mtq.disable_quantizer(model, lambda name: "blocks" not in name or "norm" in name)
    CHANGE
    return model
"""


def loaded(folder: Path, code: str, **options: Any) -> Source:
    (folder / "dit.py").write_text(MODEL + code)
    asked = job(folder, **options)
    with surroundings(asked):
        return load(asked)


def job(folder: Path, **options: Any) -> Job:
    usual: dict[str, Any] = {"precision": "fp32", "weights_mode": "external"}
    return Job(
        model=folder / "dit.py", strategy="ulysses", world=2, out=folder / "out",
        **usual | options,
    )  # fmt: skip


def stand_in(bits: str = "(4, 3)", change: str = "", *, smooth: bool = False) -> str:
    """``bits`` may look at the ``name`` of a layer."""
    code = STAND_IN.replace("BITS", bits).replace("SMOOTH", str(smooth))
    return code.replace("CHANGE", textwrap.indent(change, "    ").strip())


def real(config: str, change: str = "") -> str:
    pytest.importorskip("modelopt.torch.quantization")
    return REAL.replace("CONFIG", config).replace("CHANGE", change)


def own_output(code: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What the live module returns, and the same model without quantizers."""
    space: dict[str, Any] = {"__name__": "dit"}
    exec(MODEL + code, space)
    with torch.no_grad():
        return space["build_model"]()(x), space["plain"]()(x)


LAYERS = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("qkv", "out")]


REAL_ONES = {
    "FP8_DEFAULT_CFG": "fp8",
    "INT8_SMOOTHQUANT_CFG": "int8",
    "NVFP4_DEFAULT_CFG": "nvfp4",
    "NVFP4_SVDQUANT_DEFAULT_CFG": "nvfp4",
}
TYPES = {"fp8": FP8, "int8": torch.int8, "nvfp4": torch.uint8}


def cases() -> Iterator[Any]:
    yield pytest.param(lambda: stand_in("(4, 3)"), "fp8", id="stand-in-fp8")
    yield pytest.param(lambda: stand_in("8"), "int8", id="stand-in-int8")
    for config, kind in REAL_ONES.items():
        yield pytest.param(lambda config=config: real(config), kind, id=config)


@pytest.mark.engine
@pytest.mark.parametrize(("made", "kind"), cases())
def test_the_program_computes_what_the_live_module_does(
    made: Any, kind: str, tmp_path: Path
) -> None:
    prepare(BACKENDS["tensorrt-rtx"])
    code = made()
    is_svd = "SVD" in code
    with on_a_cpu() if "mtq" in code else nullcontext():
        source = loaded(tmp_path, code)
        truth, without = own_output(code, source.inputs["x"])
    assert sorted(source.codes) == sorted(f"{layer}.weight" for layer in LAYERS)
    assert {one.codes.dtype for one in source.codes.values()} == {TYPES[kind]}
    assert not [name for name, _ in source.module.named_modules() if "quantizer" in name]
    assert type(source.module.get_submodule("blocks.0.qkv")) is nn.Linear
    assert type(source.module.get_submodule("blocks.0.norm")) is nn.LayerNorm
    for name, one in source.codes.items():
        assert (one.rows is not None) == (kind == "int8")
        assert (one.smooth is not None) == (kind == "int8" or is_svd)
        assert (one.low_rank is not None) == is_svd
        assert source.parameters_outside[name] is one.codes
    check_same(source, truth, without, tmp_path)


def check_same(source: Source, truth: Tensor, without: Tensor, folder: Path) -> None:
    """The program's output is the live module's, by far less than what rounding does."""
    trace = traced(source, Clock(Progress()))
    captured = capture(source, trace, table(), Cache(None), None, Clock(Progress()))
    asked = Loaded(job(folder), BACKENDS["tensorrt-rtx"], source, "", None, folder)
    program = quantized(asked, captured, Clock(Progress())).dense
    (found,) = run(program, flat_inputs(program, source.inputs), 1)[0]
    loss = (truth - without).norm() / without.norm()
    assert 1e-3 < loss < 0.2
    assert (found - truth).norm() / truth.norm() < 0.05 * loss


@pytest.mark.engine
@pytest.mark.parametrize("bits", ["(4, 3)", '(8 if "qkv" in name else (4, 3))'])
def test_factors_beside_fp8_and_layers_of_two_kinds(bits: str, tmp_path: Path) -> None:
    prepare(BACKENDS["tensorrt-rtx"])
    code = stand_in(bits, smooth=True)
    source = loaded(tmp_path, code)
    types = {name: one.codes.dtype for name, one in source.codes.items()}
    of_qkv = FP8 if bits == "(4, 3)" else torch.int8
    own = [of_qkv, FP8]
    assert types == {f"{layer}.weight": own["out" in layer] for layer in LAYERS}
    assert all(one.smooth is not None for one in source.codes.values())
    check_same(source, *own_output(code, source.inputs["x"]), tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("model.blocks[0].qkv.input_quantizer._dynamic = True", "qkv.input_quantizer has dynamic"),
        ("model.blocks[0].qkv.weight_quantizer.block_sizes = {-1: 16}", "has scales of blocks"),
        ("model.blocks[0].qkv.weight_quantizer.num_bits = (2, 1)", "has scales of blocks as {}"),
        ("model.blocks[0].qkv.weight_quantizer.num_bits = (3, 2)", r"has num_bits \(3, 2\)"),
        ("model.blocks[0].qkv.weight_quantizer.backend = 'mine'", "a backend of its own"),
        (
            "q = model.blocks[0].out.weight_quantizer; q.svdquant_lora_a = q.svdquant_lora_b = LOW",
            "adds a low rank to codes of 8 bits",
        ),
        (
            "model.blocks[0].qkv.weight_quantizer.svdquant_lora_a = torch.ones(4, 64)",
            "one factor of a low rank and not the other",
        ),
        ("model.blocks[0].qkv.weight_quantizer.num_bits = 4", "has num_bits 4"),
        ("model.blocks[0].qkv.weight_quantizer.num_bits = 8", "types|scales"),
        ("model.blocks[0].qkv.weight_quantizer.fake_quant = False", "holds compressed weights"),
        ("model.blocks[0].qkv.weight_quantizer.is_enabled = False", "its input and not its weight"),
        ("model.blocks[0].qkv.output_quantizer.is_enabled = True", "what the layer returns"),
        ("model.blocks[0].qkv.input_quantizer._if_calib = True", "is being calibrated still"),
        ("model.blocks[0].qkv.input_quantizer.unsigned = True", "without a sign"),
        ("model.blocks[0].qkv.input_quantizer.rotate_is_enabled = True", "rotates"),
        ("model.blocks[0].qkv.input_quantizer._amax *= 0", "has an amax of 0.0"),
        ("model.blocks[0].qkv.input_quantizer._amax *= torch.nan", "has an amax of nan"),
        ("model.blocks[0].qkv.input_quantizer._amax *= torch.inf", "has an amax of inf"),
        ("model.blocks[0].qkv.input_quantizer._amax *= 1e-37", r"has an amax of \S+e-3\d"),
        ("model.blocks[0].out.weight_quantizer._amax *= 1e-37", r"has an amax of \S+e-3\d"),
        ("del model.blocks[0].qkv.input_quantizer._amax", "has no amax"),
        (
            "model.blocks[0].qkv.weight_quantizer._amax = torch.ones(192, 1)",
            "has 192 scales, and 1 are taken",
        ),
        (
            "model.blocks[0].qkv.weight_quantizer = nn.Sequential(TensorQuantizer())",
            "quantizes twice",
        ),
        (
            "q = model.blocks[0].qkv.output_quantizer; q.rotate_is_enabled = True",
            "what the layer returns",
        ),
        (
            "model.blocks[0].qkv.input_quantizer.pre_quant_scale = -torch.ones(64)",
            "has a pre_quant_scale that is none",
        ),
        (
            "model.blocks[0].qkv.input_quantizer.pre_quant_scale = torch.full((64,), 1e-40)",
            "has a pre_quant_scale that is none",
        ),
        (
            "model.blocks[0].q_bmm_quantizer = TensorQuantizer()",
            "blocks.0.q_bmm_quantizer quantizes attention without a k_bmm_quantizer",
        ),
        (
            "q = model.blocks[0].softmax_quantizer = TensorQuantizer(); q._amax = torch.ones(())",
            "blocks.0.softmax_quantizer quantizes attention",
        ),
        (
            "for l in 'qkv': setattr(model.blocks[0], l + '_bmm_quantizer', TensorQuantizer())",
            "q_bmm_quantizer is being calibrated still",
        ),
        (
            "model.blocks[1].qkv.weight = model.blocks[0].qkv.weight",
            "blocks.1.qkv has the weight of blocks.0.qkv",
        ),
    ],
)
def test_what_cannot_be_is_refused_by_name(change: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match=told) as caught:
        loaded(tmp_path, stand_in(change=change))
    assert caught.value.exit_code == 2
    assert "ModelOpt" in str(caught.value)


def test_a_row_of_next_to_nothing_has_the_scale_of_the_largest() -> None:
    """As one of zeros has: numbers of 1e-36 are codes of zero, and no scale of 1e-38 is left."""
    quantizer = nn.Module()
    quantizer.amax = torch.tensor([[0.0], [1e-36], [12.7], [1.27]])
    found = scales("q", quantizer, torch.int8, 4)
    torch.testing.assert_close(found, torch.tensor([0.1, 0.1, 0.1, 0.01]))


def test_options_that_would_change_the_numbers(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(b"")
    for options, told in (
        ({"allow_cast": ("float8",)}, "--allow-cast float8 is for files"),
        ({"quantize": "fp8"}, "dit.py is quantized already"),
        ({"cfg": 2}, "never proven together"),
        ({"compute_capabilities": ("8.6",)}, "FP8, which is multiplied from 8.9 on"),
    ):
        with pytest.raises(ConvertError, match=told) as caught:
            loaded(tmp_path, stand_in(), **options)
        assert caught.value.exit_code == 2


def test_what_is_switched_off_may_still_multiply(tmp_path: Path) -> None:
    change = "\n".join(
        f"model.blocks[0].qkv.{own}_quantizer.is_enabled = False" for own in ("input", "weight")
    )
    source = loaded(tmp_path, stand_in("8", change))
    assert len(source.codes) == 3
    plain = source.module.get_submodule("blocks.0.qkv").weight
    truth, without = own_output(stand_in("8", change), source.inputs["x"])
    space: dict[str, Any] = {"__name__": "dit"}
    exec(MODEL, space)
    assert torch.allclose(plain, space["plain"]().blocks[0].qkv.weight)
    assert 1e-3 < (truth - without).norm() / without.norm() < 0.1


def test_inputs_of_norms_are_left_and_told(tmp_path: Path) -> None:
    change = (
        "model.blocks[0].norm.__class__ = QuantLayerNorm\n"
        "model.blocks[0].norm.input_quantizer = TensorQuantizer()"
    )
    source = loaded(tmp_path, stand_in(change=change))
    assert type(source.module.get_submodule("blocks.0.norm")) is nn.LayerNorm
    assert "inputs of 1 norms" in source.told[0]
    assert source.told[1] == "4 linear layers quantized by ModelOpt in build_model()"


ATTENDED = """
for letter in "qkv":
    one = TensorQuantizer()
    one._amax, one._if_calib = torch.tensor(4.48), False
    setattr(model.blocks[1], letter + "_bmm_quantizer", one)
"""


def test_attention_over_codes(tmp_path: Path) -> None:
    source = loaded(tmp_path, stand_in(change=ATTENDED))
    assert list(source.attentions) == ["blocks.1"]
    assert source.attentions["blocks.1"] == pytest.approx((0.01, 0.01, 0.01))
    assert not any("quantizer" in name for name, _ in source.module.named_modules())
    without = loaded(tmp_path, stand_in(change=ATTENDED), attention="precision")
    assert without.attentions == {}
    assert "scales of 1 attentions left out (--attention precision)" in without.told[-1]
    others = stand_in("8", ATTENDED + "    one.num_bits = 8\n")
    with pytest.raises(ConvertError, match="q_bmm_quantizer quantizes attention to other codes"):
        loaded(tmp_path, others)


def test_a_softmax_that_nothing_passed_through_is_left(tmp_path: Path) -> None:
    """ModelOpt's presets for diffusers switch it on, and calibrate nothing."""
    change = "q = model.blocks[0].softmax_quantizer = TensorQuantizer()\nq._if_calib = False"
    source = loaded(tmp_path, stand_in(change=change))
    assert len(source.codes) == 4
    assert not any("quantizer" in name for name, _ in source.module.named_modules())


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ("FP8_PER_CHANNEL_PER_TOKEN_CFG", r"blocks.0.qkv.(weight|input)_quantizer has"),
        ("MXFP8_DEFAULT_CFG", r"blocks.0.qkv.(weight|input)_quantizer has scales of blocks"),
        ("INT4_BLOCKWISE_WEIGHT_ONLY_CFG", r"blocks.0.qkv.weight_quantizer has num_bits 4"),
    ],
)
def test_what_the_real_one_quantizes_otherwise_is_refused(
    config: str, told: str, tmp_path: Path
) -> None:
    code = real(config)
    with pytest.raises(ConvertError, match=told):
        loaded(tmp_path, code)
