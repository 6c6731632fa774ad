"""What the user asked for, frozen and checked. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Final

import psutil

from .errors import UsageError
from .mesh import SEQUENCE, Mesh

STRATEGY_NAMES: Final = ("allgather-kv", "ring", "stream-kv", "ulysses", "usp")
FUSED: Final = "fused"
"""TensorRT's own multi-device attention, which few GPUs and only one backend have."""
PRECISIONS: Final = ("fp16", "bf16", "fp32")
USUAL_PRECISION: Final = "bf16"
"""Of a model that says nothing: what diffusion transformers are trained and published in."""
RESIDUAL: Final = "residual"
"""Among the patterns of ``--float32``: the sums that run from block to block."""
AUTO: Final = "auto"
EXCHANGES: Final = {"int8": "qkv", "int8:kv": "kv", "int8:qkvo": "qkvo"}
"""What attention may send in 8 bits: queries, keys, values and outputs, by their letters."""
QUANTIZED: Final = ("fp8",)
"""Codes that linear layers may multiply."""
VARIANT_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""What a variant may be called: it is a folder's name."""
BACKEND_NAMES: Final = ("auto", "tensorrt-rtx", "tensorrt")
PLANS: Final = ("auto", "model")
WEIGHTS_MODES: Final = (AUTO, "embedded", "external")
ALLOW_CASTS: Final = ("float8",)
"""Stored types that are computed with in a larger one only when asked for."""
LAYOUTS: Final = (AUTO, "per-rank", "shared")
EXTERNAL_FROM: Final = 1 << 30
"""Bytes of weights from which on ``auto`` keeps them out of the engines: a second copy in every
engine, and several while one is built, no longer fit a small machine."""
DEVICES: Final = ("cpu", "cuda")
PROGRAMS: Final = (AUTO, "yes", "no")
PROOFS: Final = ("auto", "none", "program", "network")


@dataclass(frozen=True)
class Variant:
    """One of the shapes that a model is converted for.

    Attributes:
        name: ``None`` where there is but one, and nobody named it.
        resolution: of a preset; ``None``: its usual one.
        batch: how many samples a preset's inputs hold; ``None``: one.
        text: how many tokens a preset's text has; ``None``: the resolution's.
    """

    name: str | None = None
    resolution: str | None = None
    batch: int | None = None
    text: int | None = None

    @property
    def within(self) -> str:
        """The folder, in a bundle, of what a further variant has to itself; the first has none."""
        return f"variants/{self.name}/"


@dataclass(frozen=True)
class Job:
    """One conversion.

    Attributes:
        model: path of the Python file that defines the model, or of a preset's TOML.
        strategy: one of :data:`STRATEGY_NAMES`, ``fused``, or ``auto`` for the one with the
            shortest estimated forward that fits into memory.
        world: the world size, at least 1.
        out: directory of the bundle.
        cfg: how many groups of ranks share the guidance branches of a batch.
        tp: how many ranks share every weight.
        combine: name of an input of the engines, the scale of guidance, by which they combine two
            branches; ``None``: they return every branch.
        unbatched: arguments of forward that have one row whatever the batch is.
        ulysses: for ``usp``, how many neighbouring ranks exchange heads for tokens; the others
            form the ring.
        hardware: what ``auto`` estimates for, see :mod:`cp_convert.advise.hardware`.
        precision: floating-point type of parameters and floating inputs; ``None`` is decided when
            the model has been loaded (docs/adr/0015).
        float32: patterns of module paths that compute in float32 all the same; :data:`RESIDUAL`
            is the residual stream.
        backend: one of :data:`BACKEND_NAMES`.
        weights: a ``.safetensors`` file, an ``.index.json`` or a folder holding either.
        weights_mode: ``embedded`` in every engine, ``external`` as inputs of the engines, or
            ``auto``: external from :data:`EXTERNAL_FROM` bytes on.
        allow_cast: of :data:`ALLOW_CASTS`; ``float8`` takes weights that were merely cast to it.
        copy_weights: external weights are copied into the bundle, whatever the user's files hold.
        program: whether the program is stored in the bundle, to be run by torch; ``auto``: unless
            that would copy more than :data:`EXTERNAL_FROM` bytes of weights.
        layout: ``per-rank`` bakes a rank's slices into its engine, ``shared`` takes them by a
            collective, so that all ranks have the same engine; ``auto``: shared where weights are
            external and the strategy lets it.
        compute_capabilities: RTX targets such as ``"8.9"``; empty means the backend's default.
        proof: how far down the conversion is proven: not at all, the program, or the program and
            the TensorRT networks; ``auto`` leaves the networks out where that takes longer than
            building them.
        proof_device: where the proof computes, ``cpu`` or ``cuda``.
        plan: ``model`` takes the model's own plan, ``auto`` finds one from the program; ``None``
            takes the model's if it has one.
        freeze: arguments of forward whose example values become part of the engines, besides those
            that the model file names.
        tiny: shrink a preset's depth and width.
        resolutions: of the preset's; none takes its usual one.
        batches: how many samples a preset's inputs hold; none: one.
        texts: how many tokens a preset's text has; none: as many as the resolution says.
        variants: names among those of the model file; none takes all.
        exchange: one of :data:`EXCHANGES`; ``None`` sends everything in the model's precision.
        quantize: one of :data:`QUANTIZED`; what linear layers multiply. ``None``: the precision.
        keep: patterns of the paths of linear layers that are left in the precision.
        calibration: safetensors files of inputs, whose range decides the scales beside the
            example's.
        max_loss: what quantization may cost of the output, relative, as a root mean square.
        rtol: replaces the proof's own bound on the relative error.
        unsafe_groups: build collectives of a part of the ranks for a release that ignores groups.
        force: replace an existing bundle.
        cache: folder of what earlier conversions made; ``None``: everything is made anew.
        jobs: how many engines are built at once, at most; ``None``: as many as there are CPUs.
        memory: bytes that the conversion and its workers should hold at most; it decides how many
            work at once. ``None``: four fifths of what is free when it begins.
        command: the command line, as recorded in the manifest.
        module: the dotted name of the model file, where it was named by that.
    """

    model: Path
    strategy: str
    world: int
    out: Path
    cfg: int = 1
    tp: int = 1
    combine: str | None = None
    unbatched: tuple[str, ...] = ()
    ulysses: int | None = None
    hardware: str = "h200"
    precision: str | None = None
    float32: tuple[str, ...] = ()
    backend: str = "auto"
    weights: Path | None = None
    weights_mode: str = AUTO
    allow_cast: tuple[str, ...] = ()
    copy_weights: bool = False
    program: str = AUTO
    layout: str = AUTO
    compute_capabilities: tuple[str, ...] = ()
    proof: str = "auto"
    proof_device: str = "cpu"
    plan: str | None = None
    freeze: tuple[str, ...] = ()
    tiny: bool = False
    resolutions: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    texts: tuple[int, ...] = ()
    variants: tuple[str, ...] = ()
    exchange: str | None = None
    quantize: str | None = None
    keep: tuple[str, ...] = ()
    calibration: tuple[Path, ...] = ()
    max_loss: float | None = None
    rtol: float | None = None
    unsafe_groups: bool = False
    force: bool = False
    cache: Path | None = None
    jobs: int | None = None
    memory: int | None = None
    command: str = ""
    module: str | None = None

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
        _one_of("proof-device", self.proof_device, DEVICES)
        if self.exchange is not None:
            _one_of("exchange", self.exchange, tuple(EXCHANGES))
        if self.plan is not None:
            _one_of("plan", self.plan, PLANS)
        if self.world < 1:
            raise UsageError(
                f"--world {self.world}: a world has at least one rank.",
                hint="--world 1 builds one plain engine; 2 and more distribute the attention.",
            )
        self._check_mesh()
        for option, value in (("jobs", self.jobs), ("memory", self.memory)):
            if value is not None and value < 1:
                raise UsageError(f"--{option} {value}: at least 1 is needed.")
        self._check_quantize()
        self._check_errors()
        _check_model(self.model)
        self._check_shapes()

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
        if self.quantize is None:
            for option, given in (("keep", self.keep), ("calibration", self.calibration)):
                if given:
                    raise UsageError(f"--{option}: it goes with --quantize.")
            return
        _one_of("quantize", self.quantize, QUANTIZED)
        if old := without_fp8(self.compute_capabilities):
            raise UsageError(
                f"--quantize {self.quantize} with --compute-capability {', '.join(old)}: FP8 is "
                "multiplied from 8.9 on.",
                hint="leave these targets out, or convert for them without --quantize.",
            )
        for file in self.calibration:
            if not file.is_file():
                raise UsageError(f"--calibration {file}: there is no such file.")

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
        if self.exchange is None and self.quantize is None:
            raise UsageError(
                "--max-loss: nothing is quantized that could lose anything.",
                hint="it goes with --exchange and --quantize.",
            )
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

    @property
    def shapes(self) -> tuple[Variant, ...]:
        """What is asked of a preset: every resolution with every batch and every text length."""
        asked: tuple[Sequence[Any], ...] = (self.resolutions, self.batches, self.texts)
        found = [Variant(None, *one) for one in product(*(values or (None,) for values in asked))]
        if len(found) == 1:
            return tuple(found)
        return tuple(Variant(_named(one), one.resolution, one.batch, one.text) for one in found)

    @property
    def is_preset(self) -> bool:
        """Whether the model is described by a preset."""
        return self.model.suffix == ".toml"

    @property
    def mesh(self) -> Mesh:
        """How the ranks are arranged."""
        return Mesh.of(self.world, self.cfg, self.tp)

    @property
    def named_groups(self) -> str | None:
        """The option that has a part of the ranks communicate; ``auto`` is not decided yet."""
        if self.mesh.names_groups:
            return f"--mesh {self.mesh.words}"
        is_split = self.ulysses is not None and 1 < self.ulysses < self.mesh.size(SEQUENCE)
        return "--strategy usp" if is_split else None

    @property
    def eight(self) -> str:
        """Which of q, k, v and o may travel in 8 bits."""
        return "" if self.exchange is None else EXCHANGES[self.exchange]

    @property
    def workers(self) -> int:
        """How many engines are built at once, at most."""
        has_affinity = hasattr(os, "sched_getaffinity")
        return self.jobs or (len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1)

    @property
    def memory_limit(self) -> int:
        """Bytes that the conversion and its workers should hold together."""
        return self.memory or psutil.virtual_memory().available * 4 // 5

    @property
    def name(self) -> str:
        """The model's name: its file's stem."""
        name = self.model.name.removesuffix(self.model.suffix)
        if self.module is not None:
            name = self.module.rpartition(".")[2]
        return name + ("-tiny" if self.tiny else "")


def _named(asked: Variant) -> str:
    """Such as ``1024x1024-b2-t256``: what was named of it."""
    parts = (
        asked.resolution,
        None if asked.batch is None else f"b{asked.batch}",
        None if asked.text is None else f"t{asked.text}",
    )
    return "-".join(part for part in parts if part is not None)


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


def without_fp8(compute_capabilities: Collection[str]) -> list[str]:
    """Those of GPUs older than Ada (8.9), which do not multiply in FP8."""
    known = ((one, tuple(map(int, one.rstrip("+").split(".")))) for one in compute_capabilities)
    return [one for one, version in known if version < (8, 9)]


def _one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise UsageError(f"--{option} {value}: not one of {', '.join(known)}.")
