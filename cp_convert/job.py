"""What the user asked for, checked. No torch."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from .asked import ALLOW_CASTS as ALLOW_CASTS
from .asked import ATTENTION_FP8 as ATTENTION_FP8
from .asked import ATTENTIONS as ATTENTIONS
from .asked import AUTO as AUTO
from .asked import BACKEND_NAMES as BACKEND_NAMES
from .asked import BLOCKS as BLOCKS
from .asked import DEVICES as DEVICES
from .asked import EXCHANGES as EXCHANGES
from .asked import EXTERNAL_FROM as EXTERNAL_FROM
from .asked import FUSED as FUSED
from .asked import LAYOUTS as LAYOUTS
from .asked import PLANS as PLANS
from .asked import PRECISION as PRECISION
from .asked import PRECISIONS as PRECISIONS
from .asked import PROGRAMS as PROGRAMS
from .asked import PROOFS as PROOFS
from .asked import QUANTIZED as QUANTIZED
from .asked import RESIDUAL as RESIDUAL
from .asked import STRATEGY_NAMES as STRATEGY_NAMES
from .asked import USUAL_PRECISION as USUAL_PRECISION
from .asked import VARIANT_NAME as VARIANT_NAME
from .asked import WEIGHTS_MODES as WEIGHTS_MODES
from .asked import Asked
from .asked import Span as Span
from .asked import Variant as Variant
from .errors import UsageError
from .mesh import SEQUENCE, TENSOR


@dataclass(frozen=True)
class Job(Asked):
    """One conversion, see :class:`.asked.Asked` for what is asked.

    Raises:
        UsageError: what was asked for cannot be, whatever the model is.
    """

    def __post_init__(self) -> None:
        _one_of("strategy", self.strategy, (*STRATEGY_NAMES, FUSED, AUTO))
        self._check_precision()
        _one_of("backend", self.backend, BACKEND_NAMES)
        _one_of("proof", self.proof, PROOFS)
        _one_of("weights-mode", self.weights_mode, WEIGHTS_MODES)
        _one_of("program", self.program, PROGRAMS)
        for one in self.allow_cast:
            _one_of("allow-cast", one, ALLOW_CASTS)
        _one_of("layout", self.layout, LAYOUTS)
        if self.layout == BLOCKS and self.weights_mode == "embedded":
            raise UsageError(
                "--layout blocks --weights-mode embedded: equal blocks share an engine only where "
                "their weights are inputs of it.",
                hint="leave one of the two out.",
            )
        _one_of("proof-device", self.proof_device, DEVICES)
        if self.exchange is not None:
            _one_of("exchange", self.exchange, tuple(EXCHANGES))
        for option, named in (("plan", self.plan), ("tp-plan", self.tp_plan)):
            if named is not None:
                _one_of(option, named, PLANS)
        if self.world < 1:
            raise UsageError(
                f"--world {self.world}: a world has at least one rank.",
                hint="--world 1 builds one plain engine; 2 and more distribute the attention.",
            )
        self._check_mesh()
        for option, value in (("jobs", self.jobs), ("memory", self.memory)):
            if value is not None and value < 1:
                raise UsageError(f"--{option} {value}: at least 1 is needed.")
        _check_listed("split-after", self.split_after)
        self._check_quantize()
        self._check_errors()
        _check_model(self.model)
        self._check_shapes()
        if self.dynamic is not None:
            self._check_dynamic(self.dynamic)

    def _check_dynamic(self, span: Span) -> None:
        """A range goes with what it was proven with, and with nothing else."""
        known = ("batch", "text")
        if self.is_preset and span.name not in known:
            raise UsageError(
                f"--dynamic {span.words}: a preset's range is of {' or '.join(known)}.",
                hint="--resolution, repeated, makes variants: an engine for each size.",
            )
        beside = {
            f"--mesh {self.mesh.words}": bool(self.mesh.others),
            f"--strategy {self.strategy}": self.strategy in (AUTO, FUSED, "usp"),
            f"--quantize {self.quantize}": self.quantize is not None,
            f"--exchange {self.exchange}": self.exchange is not None,
            "--split-after": bool(self.split_after),
            f"--layout {self.layout}": self.layout == BLOCKS,
            "--variant": bool(self.variants),
            "several --resolution": len(self.resolutions) > 1,
            f"--{span.name}": bool({"batch": self.batches, "text": self.texts}.get(span.name)),
            "several --batch": len(self.batches) > 1,
            "several --text": len(self.texts) > 1,
        }
        for option in (option for option, given in beside.items() if given):
            # Of several shapes, variants go with the rest, but not with these.
            way = (
                "a bundle for each size is" if self.mesh.others or self.quantize else "variants are"
            )
            raise UsageError(
                f"--dynamic {span.words} and {option}: the two do not go together.",
                hint=f"leave one of them out; {way} the other way to several sizes.",
            )
        span.proven(self.multiple)

    def _check_shapes(self) -> None:
        shapes = {"resolution": self.resolutions, "batch": self.batches, "text": self.texts}
        if (self.tiny or any(shapes.values())) and not self.is_preset:
            raise UsageError(
                "--tiny and --resolution are for presets, and so are --batch and --text; "
                f"{self.model} is a Python file.",
                hint="its build_model() and example_inputs() say how large it is; several sizes "
                'are variants = {"wide": {"width": 1360}}, each given to example_inputs().',
            )
        if self.variants and self.is_preset:
            raise UsageError(
                f"--variant is for model files with variants; {self.model.stem} is a preset.",
                hint="--resolution, --batch and --text.",
            )
        for option, values in {**shapes, "variant": self.variants}.items():
            _check_listed(option, values)

    def _check_mesh(self) -> None:
        sharing = self.mesh.size(SEQUENCE)
        if self.unbatched and self.cfg == 1:
            raise UsageError(
                "--unbatched is for --cfg, which repeats one row of the others.",
                hint="leave it out.",
            )
        if self.tp_plan is not None and self.tp == 1 and TENSOR not in self.open_axes:
            raise UsageError(
                f"--tp-plan {self.tp_plan}: it is for --tp, which has ranks share weights.",
                hint="leave it out.",
            )
        if self.combine is not None and (self.cfg != 2 or not self.combine.isidentifier()):
            raise UsageError(
                f"--combine {self.combine}: it names the engines' new input, the scale s in "
                "uncond + s * (cond - uncond), which two branches have.",
                hint="--cfg 2 --combine guidance_scale.",
            )
        if self.strategy == FUSED and sharing < self.world:
            raise UsageError(
                f"--strategy fused --mesh {self.mesh.words}: TensorRT's multi-device attention is "
                "of all ranks.",
                hint="another strategy.",
            )
        if (self.strategy == "usp") != (self.ulysses is not None):
            raise UsageError(
                "--strategy usp needs --ulysses and --ring, and no other strategy has them.",
                hint="--strategy usp --ulysses 4 --ring 2 takes eight ranks.",
            )
        if self.ulysses is not None and (self.ulysses < 1 or sharing % self.ulysses):
            raise UsageError(
                f"--ulysses {self.ulysses}: {sharing} ranks cannot be put into such groups."
            )

    def _check_quantize(self) -> None:
        if (self.exchange or self.quantize) and self.mesh.others:
            option = (
                f"--exchange {self.exchange}" if self.exchange else f"--quantize {self.quantize}"
            )
            raise UsageError(
                f"{option} --mesh {self.mesh.words}: codes and other axes than the sequence's were "
                "never proven together.",
                hint="leave one of the two out.",
            )
        self._check_attention()
        if self.quantize is None:
            for option, given in (("keep", self.keep), ("calibration", self.calibration)):
                if given and self.attention != ATTENTION_FP8:
                    raise UsageError(f"--{option}: it goes with --quantize.")
            return
        _one_of("quantize", self.quantize, QUANTIZED)
        if old := without(self.quantize, self.compute_capabilities):
            first = ".".join(map(str, MULTIPLIED_FROM[self.quantize]))
            raise UsageError(
                f"--quantize {self.quantize} with --compute-capability {', '.join(old)}: "
                f"{self.quantize.upper()} is multiplied from {first} on.",
                hint="leave these targets out, or convert for them with --quantize int8.",
            )
        for file in self.calibration:
            if not file.is_file():
                raise UsageError(f"--calibration {file}: there is no such file.")

    def _check_attention(self) -> None:
        if self.attention is None:
            return
        _one_of("attention", self.attention, ATTENTIONS)
        if self.attention != ATTENTION_FP8:
            return
        for option, given in (
            (f"--strategy {self.strategy}", self.strategy == FUSED),
            (f"--precision {self.precision}", self.precision == "fp32"),
        ):
            if given:
                raise UsageError(
                    f"--attention fp8 and {option}: the two do not go together.",
                    hint="FP8 attention is for quantized linear layers (--quantize, or a "
                    "quantized checkpoint), in bf16 or fp16, by every strategy but fused.",
                )
        if old := without(ATTENTION_FP8, self.compute_capabilities):
            raise UsageError(
                f"--attention fp8 with --compute-capability {', '.join(old)}: FP8 is multiplied "
                f"from {'.'.join(map(str, FP8_FROM))} on.",
                hint="leave these targets out, or --attention fp8.",
            )

    def _check_errors(self) -> None:
        if self.rtol is not None and not 0 < self.rtol < 1:
            raise UsageError(
                f"--rtol {self.rtol}: a relative error lies between 0 and 1.",
                hint="leave it out to use the bound derived from the precision.",
            )
        if self.max_loss is None:
            return
        if not 0 < self.max_loss < 1:
            raise UsageError(f"--max-loss {self.max_loss}: a relative loss lies between 0 and 1.")
        if self.proof == "none":
            raise UsageError("--max-loss is measured by the proof, which --no-proof leaves out.")

    def _check_precision(self) -> None:
        if self.precision is None:
            return
        _one_of("precision", self.precision, PRECISIONS)
        if self.strategy == FUSED and self.precision == "fp32":
            raise UsageError(
                "--strategy fused: TensorRT's multi-device attention computes in FP16 and BF16.",
                hint="add --precision bf16, or take another strategy.",
            )
        if self.precision == "bf16" and (old := without_bf16(self.compute_capabilities)):
            raise UsageError(
                f"--precision bf16: compute capability {', '.join(old)} has none.",
                hint="--precision fp16; --float32 residual where that overflows.",
            )


def _check_listed(option: str, values: Sequence[Any]) -> None:
    """Refuse what is named twice, or is no positive number."""
    for value in values:
        if isinstance(value, int) and value < 1:
            raise UsageError(f"--{option} {value}: at least 1 is needed.")
        if values.count(value) > 1:
            raise UsageError(f"--{option} {value} is given twice.", hint="name each once.")


_TAKEN_OTHERWISE: Final = {
    ".safetensors": "weights are named by --weights, beside a Python file or a preset that says "
    "what to compute with them.",
    ".onnx": "conversion starts from the PyTorch model that the graph was exported from.",
    ".ipynb": "write the cells that build the model into a Python file.",
}
_A_MODEL: Final = (
    "name a Python file that defines build_model() and example_inputs(); examples/flux.py is one. "
    "`cp-convert presets` lists models that need no file."
)


def _check_model(model: Path) -> None:
    if model.is_dir():
        is_published = (model / "model_index.json").is_file() or (model / "config.json").is_file()
        raise UsageError(
            f"{model} is a folder, not a model file.",
            hint="a published model's folder is given to a preset: cp-convert PRESET --weights "
            f"{model}; see `cp-convert presets`."
            if is_published
            else _A_MODEL,
        )
    if not model.is_file():
        raise UsageError(f"there is no file {model}.", hint=_A_MODEL)
    if model.suffix not in (".py", ".toml"):
        raise UsageError(
            f"{model} is neither a Python file (.py) nor a preset (.toml).",
            hint=_TAKEN_OTHERWISE.get(model.suffix, _A_MODEL),
        )


def without_bf16(compute_capabilities: Collection[str]) -> list[str]:
    """Those of GPUs older than Ampere (8.0), which do not compute in bfloat16."""
    return [one for one in compute_capabilities if int(one.split(".")[0]) < 8]


FP8_FROM: Final = (8, 9)
"""The first compute capability that multiplies FP8 (Ada)."""
MULTIPLIED_FROM: Final = {"fp8": FP8_FROM, "nvfp4": (10, 0)}
"""The same of all codes that not every GPU multiplies; of NVFP4's, TensorRT-RTX runs on 12.x."""


def without(codes: str, compute_capabilities: Collection[str]) -> list[str]:
    """Those of GPUs that do not multiply ``codes``, one of :data:`QUANTIZED`."""
    first = MULTIPLIED_FROM.get(codes, (0, 0))
    known = {one: re.fullmatch(r"(\d+)\.(\d+)\+?", one) for one in compute_capabilities}
    # What is no compute capability is refused with the backend's targets.
    return [one for one, told in known.items() if told and tuple(map(int, told.groups())) < first]


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"--{option} {value}: not one of {', '.join(known)}.")
