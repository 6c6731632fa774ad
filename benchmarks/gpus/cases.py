"""What is run: a model, its depth, a resolution and a precision each."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

STRATEGIES: Final = ("ulysses", "allgather-kv", "ring", "stream-kv")
GUIDED: Final = "cfg"
"""What the name of a program begins with whose ranks share guidance branches, and their number."""
IN_CODES: Final = " in fp8"
"""What the name of a program ends with whose linear layers multiply FP8."""


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        name: of its folder.
        preset: which model.
        depth: what replaces the preset's own depth; nothing for the whole model.
        resolution: of the preset.
        precision: of parameters and inputs.
        strategies: which programs are made.
        peers: which of diffusers' own context parallelisms run beside.
        compiled: whether all of it is compiled as well.
        batch: of the inputs; nothing for the preset's own.
        tf32: whether the float32 reference multiplies in TF32, where it would take minutes.
    """

    name: str
    preset: str
    depth: Mapping[str, int]
    resolution: str
    precision: str = "bf16"
    strategies: tuple[str, ...] = STRATEGIES
    peers: tuple[str, ...] = ("ulysses", "ring")
    compiled: bool = True
    batch: int | None = None
    tf32: bool = False

    def config(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """The model's configuration, at this depth."""
        return {**config, **self.depth}


_PART: Final = Case(
    "flux-2-4-at-1024", "flux.1-dev", {"num_layers": 2, "num_single_layers": 4}, "1024x1024"
)
CASES: Final = (
    Case(
        "flux-1-1-fp32",
        "flux.1-dev",
        {"num_layers": 1, "num_single_layers": 1},
        "1024x1024",
        "fp32",
        peers=(),
        compiled=False,
    ),
    _PART,
    replace(
        _PART,
        name="flux-2-4-at-2048",
        resolution="2048x2048",
        strategies=(*STRATEGIES, f"ulysses{IN_CODES}"),
    ),
    replace(_PART, name="flux-2-4-at-4096", resolution="4096x4096"),
    replace(
        _PART,
        name="flux-whole",
        depth={},
        strategies=(*STRATEGIES, f"ulysses{IN_CODES}"),
    ),
    Case(
        "wan-of-two-branches",
        "wan2.1-1.3b",
        {},
        "480p-81f",
        strategies=(f"{GUIDED}2", "ulysses"),
        peers=("ulysses",),
        compiled=False,
        batch=2,
        tf32=True,
    ),
)
FORECAST: Final = ("flux-2-4-at-1024", "flux-2-4-at-2048", "flux-2-4-at-4096", "flux-whole")
"""Of which ``benchmarks.forecast`` compares forecasts with measurements."""


def chosen(names: str | None) -> list[Case]:
    """The named cases, or all."""
    wanted = [case.name for case in CASES] if names is None else names.split(",")
    known = {case.name: case for case in CASES}
    return [known[name] for name in wanted]
