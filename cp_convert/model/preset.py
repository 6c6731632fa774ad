"""Presets: what is known about one published model, in one TOML file. No torch.

A preset states a diffusers class, its published configuration, the inputs of its forward and what
usually is chosen for it. Sizes are expressions over the numbers of a resolution, of ``[sizes]`` and
of the configuration::

    [resolutions.1024x1024]
    height = 1024
    width = 1024

    [sizes]
    image_tokens = "(height // 16) * (width // 16)"

    [inputs.hidden_states]
    normal = [1, "image_tokens", "in_channels"]
"""

from __future__ import annotations

import ast
import operator
import re
import tomllib
from collections.abc import Callable, Mapping
from math import gcd
from pathlib import Path
from typing import Any, Final

import msgspec

from ..errors import UsageError
from ..words import near
from .shipped import shipped

TINY: Final = "tiny"
"""The name of the resolution that goes with the shrunken model."""
BATCH: Final = "batch"
TEXT: Final = "text_tokens"
"""Numbers that are asked for beside a resolution."""
_STEP: Final = 16
"""Pixels that the usual autoencoders and patches make one of."""

Size = int | str


class Input(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, rename={"tensors": "list"}):
    """How one argument of forward is made; exactly one way is named.

    Attributes:
        normal: shape of standard normal numbers.
        full: shape of a constant ``value``.
        integers: shape of random integers below ``below``.
        arange: first and one past the last of consecutive integers.
        positions: extents of a grid whose coordinates are listed row by row.
        joined: pieces put together along ``dim``.
        tensors: those of a list (``list`` in the file).
        literal: a value that is no tensor; strings in it are sizes, innermost lists tuples.
        times: how often what a literal list holds is repeated.
        value, below, dim: see above.
        columns: of ``positions``: zeros are put in front (or after the coordinates, where
            ``columns_after`` is set) up to that many.
        columns_after: see ``columns``.
        rows: how often ``arange`` is repeated, one below the other.
        transposed: whether ``positions`` have the coordinates in dimension 0.
        offset: what is added.
        dtype: of the tensor; floating inputs are cast to the job's precision later.
    """

    normal: list[Size] | None = None
    full: list[Size] | None = None
    integers: list[Size] | None = None
    arange: list[Size] | None = None
    positions: list[Size] | None = None
    joined: list[Input] | None = None
    tensors: list[Input] | None = None
    literal: Any = None
    times: Size = 1
    value: float | int | bool = 0
    below: Size = 0
    dim: int = 0
    columns: int = 0
    columns_after: bool = False
    rows: int = 0
    transposed: bool = False
    offset: Size = 0
    dtype: str = "float32"


class Preset(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, rename={"kind": "class"}):
    """One published model.

    Attributes:
        title: its name in words.
        kind: the diffusers class (``class`` in the file).
        repository: where it is published.
        source: the file that its numbers are from, and how they were checked.
        parameters: how many numbers the model has learned, as the class counts them.
        strategy, world, precision: a good choice.
        resolution: the one that is taken when none is named.
        keep_float32: inputs that are not cast to the job's precision.
        freeze: arguments whose values decide shapes.
        config: the published configuration.
        tiny: what of it ``--tiny`` replaces.
        resolutions: numbers by the resolution's name; ``tiny`` is among them.
        sizes: expressions over them, in order.
        inputs: the arguments of forward.
    """

    title: str
    kind: str
    repository: str
    source: str
    parameters: int
    strategy: str
    world: int
    precision: str
    resolution: str
    config: dict[str, Any]
    tiny: dict[str, Any]
    resolutions: dict[str, dict[str, int]]
    sizes: dict[str, str]
    inputs: dict[str, Input]
    keep_float32: list[str] = []
    freeze: list[str] = []

    def numbers(
        self,
        resolution: str,
        config: Mapping[str, Any],
        *,
        tiny: bool = False,
        batch: int | None = None,
        text: int | None = None,
    ) -> dict[str, int]:
        """All sizes by name, at one resolution.

        Args:
            resolution: its name.
            config: the model's.
            tiny: shrink it, as the usual one is shrunk to ``tiny``.
            batch: how many samples; ``None``: one.
            text: how many tokens of text; ``None``: the resolution's.

        Raises:
            UsageError: there is no such resolution, or the inputs have no batch or text to choose.
        """
        self.check_resolution(resolution)
        found = {name: value for name, value in config.items() if isinstance(value, int)}
        found |= self._shrunk(resolution) if tiny else self.resolutions[resolution]
        for name, value in ((BATCH, batch), (TEXT, text)):
            if value is not None and not self._uses(name):
                raise UsageError(
                    f"{self.title}: the inputs of this preset have no {name} that could be chosen.",
                    hint="leave it out, or name it in a copy of the preset: configs/README.md.",
                )
        found[BATCH] = batch or 1
        found |= {} if text is None else {TEXT: text}
        for name, expression in self.sizes.items():
            found[name] = evaluate(expression, found)
        return found

    def _uses(self, name: str) -> bool:
        """Whether a size or an input is an expression over ``name``."""
        told = repr(msgspec.to_builtins([self.sizes, self.inputs]))
        return re.search(rf"\b{name}\b", told) is not None

    def _shrunk(self, resolution: str) -> dict[str, int]:
        """A resolution's numbers in the proportion of ``tiny`` to the usual one, in whole steps."""
        tiny, usual = self.resolutions[TINY], self.resolutions[self.resolution]
        if resolution in (TINY, self.resolution):
            return tiny
        found = {}
        for name, value in self.resolutions[resolution].items():
            step = gcd(tiny[name], _STEP)
            found[name] = max(step, value * tiny[name] // usual[name] // step * step)
        return found

    def check_resolution(self, resolution: str) -> None:
        """Refuse an unknown one.

        Raises:
            UsageError: there is no such resolution.
        """
        if resolution not in self.resolutions:
            known = [name for name in self.resolutions if name != TINY]
            raise UsageError(
                f"{self.title} has no resolution {resolution!r}.", hint=near(resolution, known)
            )


def names() -> list[str]:
    """Of all presets that are shipped."""
    return sorted(shipped("cp_convert.configs"))


def path_of(name: str) -> Path | None:
    """The file of the shipped preset called ``name``, if there is one."""
    return shipped("cp_convert.configs").get(name)


def read(path: Path) -> Preset:
    """The preset that ``path`` holds.

    Raises:
        UsageError: it cannot be read, or is no preset.
    """
    try:
        return msgspec.convert(tomllib.loads(path.read_text()), Preset)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}.") from error
    except msgspec.ValidationError as error:
        raise UsageError(
            f"{path} is no preset: {error}.", hint="configs/README.md tells what a preset says."
        ) from error


_OPERATORS: Final[Mapping[type[ast.operator], Callable[[int, int], int]]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}


def evaluate(expression: Size, numbers: Mapping[str, int]) -> int:
    """Whole-number arithmetic (``+ - * // %``) over names; nothing else is understood.

    Raises:
        UsageError: anything else, or an unknown name.
    """
    if isinstance(expression, int):
        return expression

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(constant)):
                return constant
            case ast.Name(id=name) if name in numbers:
                return numbers[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
                return _OPERATORS[type(op)](value(left), value(right))
        raise UsageError(
            f"{ast.unparse(node)!r} in the size {expression!r} is not understood.",
            hint=f"names are {', '.join(sorted(numbers))}; operators + - * // %.",
        )

    try:
        return value(ast.parse(expression, mode="eval").body)
    except SyntaxError as error:
        raise UsageError(f"the size {expression!r} is no expression.") from error
