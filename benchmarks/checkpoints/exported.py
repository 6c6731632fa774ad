"""Checkpoints and modules that NVIDIA ModelOpt itself has quantized, by its presets for diffusers.

In: a diffusers model and inputs to calibrate with. Out: the model with ModelOpt's quantizers in
it, or the folder that ``export_hf_checkpoint`` writes. ModelOpt must be installed; and ``onnx``,
without which its quantizers of attention are absent without a word.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

LOW_RANK: Final = 8
_FEED_FORWARD: Final = ("ff", "mlp")
"""What the names of feed-forward layers have in them, in each of the small models."""
_BLOCKS: Final = {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}
_NVFP4: Final = {"num_bits": (2, 1), "block_sizes": _BLOCKS}
_QKV: Final = {"quantizer_name": "*[qkv]_bmm_quantizer", "cfg": {"num_bits": (4, 3), "axis": None}}
_SMOOTH: Final = {"method": "smoothquant", "alpha": 0.8}
_AWQ: Final = {"method": "awq_lite", "alpha_step": 0.5}
_LOW: Final = {"method": "svdquant", "lowrank": LOW_RANK}


def _feed_forward(weight: Mapping[str, Any], inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Feed-forward layers quantized otherwise than the preset says."""
    return tuple(
        {"quantizer_name": f"*{layers}*{of}_quantizer", "cfg": cfg}
        for layers in _FEED_FORWARD
        for of, cfg in (("weight", weight), ("input", inputs))
    )


_IN_NVFP4: Final = _feed_forward(_NVFP4, _NVFP4)
_IN_INT8: Final = _feed_forward({"num_bits": 8, "axis": 0}, {"num_bits": 8, "axis": None})
KINDS: Final[Mapping[str, tuple[str, tuple[Any, ...], Any]]] = {
    "fp8": ("fp8", (), None),
    "fp8-awq": ("fp8", (), _AWQ),
    "fp8-attention": ("fp8", (_QKV,), None),
    "int8": ("int8", (), _SMOOTH),
    "nvfp4": ("nvfp4", (), None),
    "nvfp4-svd": ("nvfp4", (), _LOW),
    "nvfp4-attention": ("nvfp4", (_QKV,), None),
    "mixed": ("fp8", _IN_NVFP4, None),
    "mixed-awq": ("fp8", _IN_NVFP4, _AWQ),
    "mixed-svd": ("fp8", _IN_NVFP4, _LOW | {"skip_layers": ["*attn*"]}),
    "mixed-int8": ("fp8", _IN_INT8, None),
}
"""By name: ModelOpt's preset, what is quantized besides, and how it calibrates otherwise."""


def configuration(kind: str, keep: Iterable[str] = ()) -> dict[str, Any]:
    """One of :data:`KINDS` as ``mtq.quantize`` takes it; modules of ``keep`` are left alone."""
    from modelopt.torch.opt.config_loader import load_config
    from modelopt.torch.quantization.config import QuantizeConfig

    preset, more, algorithm = KINDS[kind]
    path = f"configs/ptq/presets/diffusers/{preset}"
    found = load_config(path, schema_type=QuantizeConfig).model_dump(exclude_unset=True)
    off = ({"quantizer_name": f"{name}.*_quantizer", "enable": False} for name in keep)
    found["quant_cfg"] = [*found["quant_cfg"], *deepcopy(more), *off]
    return found if algorithm is None else found | {"algorithm": dict(algorithm)}


def quantized(module: nn.Module, inputs: Mapping[str, Any], kind: str) -> nn.Module:
    """``module``, in place: everything in its blocks has quantizers, modulation too."""
    import modelopt.torch.quantization as mtq

    given = {name: _as(module, name, value) for name, value in inputs.items()}
    # Not switched off afterwards: some algorithms run, with kernels, what they have quantized.
    outside = [name for name, _ in module.named_modules() if name and "blocks" not in name]
    with torch.no_grad(), on_a_cpu(), redirect_stdout(io.StringIO()):
        mtq.quantize(module, configuration(kind, outside), lambda own: own(**given))
    return module


def exported(module: nn.Module, inputs: Mapping[str, Any], kind: str, folder: Path) -> Path:
    """The folder with ``config.json`` and weights; ``module`` stays as it is."""
    from modelopt.torch.export import export_hf_checkpoint

    own = quantized(deepcopy(module).bfloat16().eval(), inputs, kind)
    with redirect_stdout(io.StringIO()):
        export_hf_checkpoint(own, export_dir=folder)
    return folder


@contextmanager
def on_a_cpu() -> Iterator[None]:
    """NVFP4's rounding by ModelOpt's own arithmetic where its kernels, which need a GPU, are not.

    ModelOpt calibrates NVFP4 on a CPU, but for algorithms that run what they have rounded
    (``svdquant``): these end in "amax must be a CUDA tensor". A convolution in three dimensions
    takes such a kernel even when its quantizers are off.
    """
    from modelopt.torch.quantization import tensor_quant
    from modelopt.torch.quantization.nn.modules.quant_conv import _QuantConv3d

    if torch.cuda.is_available():
        yield
        return
    given, fused = tensor_quant.dynamic_block_quantize_op, _QuantConv3d._should_use_implicit_gemm
    tensor_quant.dynamic_block_quantize_op = lambda x, size, amax, *_: _rounded(x, size, amax)
    _QuantConv3d._should_use_implicit_gemm = lambda self: False
    try:
        yield
    finally:
        tensor_quant.dynamic_block_quantize_op = given
        _QuantConv3d._should_use_implicit_gemm = fused


def _rounded(x: Tensor, size: int, amax: Tensor) -> Tensor:
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    rows = x.reshape(-1, x.shape[-1])
    codes, blocks, whole = NVFP4QTensor.quantize(rows, size, None, amax.float().amax() / (6 * 448))
    sizes = {-1: size}
    found = codes.dequantize(x.dtype, scale=blocks, double_scale=whole, block_sizes=sizes)
    return found.view(x.shape)


def _as(module: nn.Module, name: str, value: Any) -> Any:
    """An input in the type of the weights; positions stay as they are."""
    if isinstance(value, Tensor) and value.is_floating_point() and not name.endswith("_ids"):
        return value.to(next(module.parameters()).dtype)
    return value
