"""What the user asked for, frozen; :mod:`.job` checks it. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

import psutil

from .mesh import SEQUENCE, Mesh
from .span import Span as Span

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
QUANTIZED: Final = ("fp8", "int8", "nvfp4")
"""Codes that linear layers may multiply."""
ATTENTION_FP8: Final = "fp8"
PRECISION: Final = "precision"
ATTENTIONS: Final = (ATTENTION_FP8, PRECISION)
"""What attention is computed with: FP8 codes of queries, keys, values and probabilities, or numbers
of the job's precision, whatever scales a checkpoint has."""
VARIANT_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")
"""What a variant may be called: it is a folder's name, which file systems want short."""
BACKEND_NAMES: Final = ("auto", "tensorrt-rtx", "tensorrt")
PLANS: Final = ("auto", "model")
WEIGHTS_MODES: Final = (AUTO, "embedded", "external")
ALLOW_CASTS: Final = ("float8",)
"""Stored types that are computed with in a larger one only when asked for."""
BLOCKS: Final = "blocks"
"""The layout in which equal blocks share an engine."""
LAYOUTS: Final = (AUTO, "per-rank", "shared", BLOCKS)
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
        size: of a range, one of its sizes; ``None``: the model is not converted for a range.
    """

    name: str | None = None
    resolution: str | None = None
    batch: int | None = None
    text: int | None = None
    size: int | None = None

    @property
    def within(self) -> str:
        """The folder, in a bundle, of what a further variant has to itself; the first has none."""
        return f"variants/{self.name}/"


@dataclass(frozen=True)
class Asked:
    """One conversion, unchecked.

    Attributes:
        model: path of the Python file that defines the model, or of a preset's TOML.
        strategy: one of :data:`STRATEGY_NAMES`, ``fused``, or ``auto`` for the one with the
            shortest estimated forward that fits into memory.
        world: the world size, at least 1.
        out: directory of the bundle.
        cfg: how many groups of ranks share the guidance branches of a batch.
        tp: how many ranks share every weight.
        open_axes: those of ``cfg`` and ``tp`` that ``auto`` may make larger: guidance where the
            batch is even and that is faster, weights where nothing fits otherwise.
        tp_plan: ``model`` takes the model's own plan of weights, ``auto`` shares all that can be;
            ``None`` takes the model file's if it has one.
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
            external and the strategy lets it; ``blocks``: likewise, and one engine for every kind
            of block.
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
        dynamic: a range of sizes for one engine; ``None``: an engine has one.
        exchange: one of :data:`EXCHANGES`; ``None`` sends everything in the model's precision.
        quantize: one of :data:`QUANTIZED`; what linear layers multiply. ``None``: the precision.
        attention: one of :data:`ATTENTIONS`; ``None``: as the checkpoint has it, which is the
            precision where it has no scales for it.
        keep: patterns of the paths of linear layers, and of modules that attend, that are left in
            the precision.
        split_after: paths of modules after which the program is cut; the model is then several
            engines a rank, run one after another.
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
    open_axes: tuple[str, ...] = ()
    tp_plan: str | None = None
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
    dynamic: Span | None = None
    exchange: str | None = None
    quantize: str | None = None
    attention: str | None = None
    keep: tuple[str, ...] = ()
    split_after: tuple[str, ...] = ()
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

    @property
    def shapes(self) -> tuple[Variant, ...]:
        """What is asked of a preset: every resolution with every batch and every text length."""
        if self.dynamic is not None:
            return self.sizes
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
    def unit(self) -> int:
        """Slots of a padded sequence that a rank has a multiple of.

        Of two ranks and a range of sizes it is two: odd lengths alone, which is all that is padded
        otherwise, would not tell one slot of padding from the number one.
        """
        is_padded = self.dynamic is not None and not self.dynamic.divides(2)
        return 2 if is_padded and self.mesh.size(SEQUENCE) == 2 else 1

    @property
    def multiple(self) -> int:
        """What the length of a spread sequence is padded to a multiple of."""
        return self.mesh.size(SEQUENCE) * self.unit

    @property
    def sizes(self) -> tuple[Variant, ...]:
        """What a range of sizes is traced at, the largest first; nothing where there is none."""
        if self.dynamic is None:
            return ()
        name, sizes = self.dynamic.name, self.dynamic.proven(self.multiple)
        of_preset = name in ("batch", "text") and self.is_preset
        one = Variant(
            resolution=next(iter(self.resolutions), None),
            batch=next(iter(self.batches), None),
            text=next(iter(self.texts), None),
        )
        found = [replace(one, name=f"{name}-{n}", size=n) for n in reversed(sizes)]
        if of_preset and name == "batch":
            return tuple(replace(v, batch=v.size) for v in found)
        return tuple(replace(v, text=v.size) for v in found) if of_preset else tuple(found)

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
    def may_share(self) -> bool:
        """Whether pieces are asked for, of which equal ones share an engine."""
        return self.layout == BLOCKS or bool(self.split_after)

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
