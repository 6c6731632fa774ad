"""A model as it was loaded: what tracing begins with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..job import Variant
from ..mesh import Axis
from .attention8 import Steps
from .nvfp4 import dequantize_blocks
from .quantize import dequantize
from .shares import Declared
from .tensors import Location


@dataclass(frozen=True)
class Cast:
    """Weights that are computed with in another type than their files store them in.

    Attributes:
        stored, computed: the types, as torch names them.
        tensors: how many.
    """

    stored: str
    computed: str
    tensors: int


@dataclass(frozen=True)
class Branches:
    """What is known of a model's guidance branches.

    Attributes:
        rows: the batch, all branches together; 0 where nothing shares them.
        widened: whether the example has one branch and was repeated.
        added: inputs besides forward's: the scale, where the engines combine the branches.
    """

    rows: int = 0
    widened: bool = False
    added: Mapping[str, Tensor] = field(default_factory=dict)

    def are_in(self, sizes: Sequence[int]) -> bool:
        """Whether a tensor of these sizes has the batch."""
        return len(sizes) > 0 and sizes[0] == self.rows > 0


@dataclass(frozen=True)
class Codes:
    """A layer's weight as codes, and how its input becomes codes, if it does.

    Attributes:
        codes: ``[N, K]``, INT8 or FP8; NVFP4: ``[N, K/2]``, see :mod:`.nvfp4`.
        weight_scale: what a code of 1 stands for: one number, or one a row (float32 ``[N]``).
        input_scale: the same for the input; ``None``: each token by its own largest number, or not
            at all.
        by_token: which of the two.
        smooth: ``[K]``, float32: what the input is multiplied with before; ``None``: nothing.
        blocks: NVFP4's scales of blocks, E4M3 ``[N, K/16]``; ``weight_scale`` multiplies them.
        low_rank: ``[R, K]`` and ``[N, R]``: a product of numbers that is added to that of codes.
    """

    codes: Tensor
    weight_scale: float | Tensor
    input_scale: float | None
    by_token: bool = False
    smooth: Tensor | None = None
    blocks: Tensor | None = None
    low_rank: tuple[Tensor, Tensor] | None = None

    @property
    def is_multiplied(self) -> bool:
        """Whether the input becomes codes, too."""
        return self.by_token or self.input_scale is not None

    def numbers(self) -> Tensor:
        """What the codes alone stand for, float32 ``[N, K]``."""
        if self.blocks is not None:
            return dequantize_blocks(self.codes, self.blocks, self.step, torch.float32)
        numbers = dequantize(self.codes, self.step, torch.float32)
        return numbers if self.rows is None else numbers.mul_(self.rows[:, None])

    @property
    def step(self) -> float:
        """The weight's scale, the largest of all rows."""
        scale = self.weight_scale
        return float(scale.max()) if isinstance(scale, Tensor) else scale

    @property
    def rows(self) -> Tensor | None:
        """What each row's scale is of :attr:`step`, float32 ``[N]``; ``None`` where all have it."""
        scale = self.weight_scale
        return scale / self.step if isinstance(scale, Tensor) else None


def of_blocks(name: str) -> str:
    """What the scales of the blocks of a weight are called, after the weight; as ModelOpt does."""
    return f"{name}_scale"


@dataclass(frozen=True)
class Example:
    """What forward is called with: keyword arguments, and which variant they are."""

    variant: Variant
    inputs: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A model, ready to be traced.

    Attributes:
        module: the model, in eval mode and in the job's precision.
        inputs: keyword arguments of ``forward``.
        plan: where the sequence is split and gathered; empty when that is to be found, or when
            the world is 1.
        freeze: arguments whose example values become part of the engines.
        sha256: of the model file or preset.
        parameters: how many numbers the model has learned.
        bytes: their size in memory.
        peers: rank 1, 2, ... of a model whose ranks hold different parameters.
        groups: the process groups in which the model itself communicates.
        external: whether weights stay outside the engines.
        located: where the user's files hold the parameters, and scales of their blocks.
        casts: types of weights that were changed.
        codes: parameters that are stored as codes; the module has the numbers that they stand for,
            rounded to its precision, or none (on ``meta``) where no stage computes with them.
        attentions: by the path of a module that attends, what its codes stand for, where the
            weights come with scales for that.
        told: what was done to make the weights fit, in words for a person.
        precision: that the model was cast to, one of :data:`..job.PRECISIONS`.
        branches: how guidance branches stand in ``inputs``.
        tp_plan: by name, the weights that ranks share where the model's plan says so; empty: all
            that can be.
        variant: which of the model's shapes the inputs have.
        others: the same model with the inputs of further variants; the parameters are the same.
    """

    module: nn.Module
    inputs: dict[str, Any]
    plan: Mapping[str, Any]
    freeze: tuple[str, ...]
    sha256: str
    parameters: int
    bytes: int
    peers: tuple[nn.Module, ...] = ()
    groups: Mapping[str, Axis] = field(default_factory=dict)
    external: bool = False
    located: Mapping[str, Location] = field(default_factory=dict)
    casts: tuple[Cast, ...] = ()
    codes: Mapping[str, Codes] = field(default_factory=dict)
    attentions: Mapping[str, Steps] = field(default_factory=dict)
    told: tuple[str, ...] = ()
    precision: str = "fp32"
    branches: Branches = field(default_factory=Branches)
    tp_plan: Mapping[str, Declared] = field(default_factory=dict)
    variant: Variant = field(default_factory=Variant)
    others: tuple[Source, ...] = ()

    @property
    def all_inputs(self) -> dict[str, Any]:
        """The program's inputs: those of forward, and what was added to them."""
        return {**self.inputs, **self.branches.added}

    def declared(self, names: Mapping[str, str]) -> dict[str, Declared]:
        """The ``tp_plan`` by placeholders, of which ``names`` says which weights they are."""
        return {node: self.tp_plan[name] for node, name in names.items() if name in self.tp_plan}

    @property
    def parameters_outside(self) -> dict[str, Tensor]:
        """What external weights are, tied ones under all their names; nothing where embedded."""
        if not self.external:
            return {}
        own: dict[str, Tensor] = dict(self.module.named_parameters(remove_duplicate=False))
        own |= {name: one.codes for name, one in self.codes.items()}
        scales = {of_blocks(name): one.blocks for name, one in self.codes.items()}
        return own | {name: one for name, one in scales.items() if one is not None}
