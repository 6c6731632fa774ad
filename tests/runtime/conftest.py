"""Bundles of five variants each, made once."""

from __future__ import annotations

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tests.runtime.bundles import FLUX, QWEN, WAN, converted

SEVERAL = {
    "flux": (FLUX, "ulysses", [{}, {"rows": 5}, {"text": 9}, {"batch": 2}, {"rows": 9, "text": 5}]),
    "wan": (WAN, "ring", [{}, {"rows": 12}, {"text": 9}, {"batch": 2}, {"frames": 1}]),
    "qwen": (
        QWEN,
        "allgather-kv",
        [{}, {"rows": 8, "columns": 6}, {"text": 9}, {"batch": 2}, {"rows": 5}],
    ),
    "two of qwen": (QWEN, "allgather-kv", [{}, {"rows": 8, "columns": 6}]),
}
"""Models, and what their variants ``v0`` to ``v4`` are; Qwen-Image's ``v1`` differs from ``v0`` in
``img_shapes`` alone, which is part of the engines."""
PROVEN = ("wan", "qwen")
"""Those whose conversion proves what tests see again, once the ranks have run; they are seldom."""


@dataclass(frozen=True)
class Several:
    """A bundle of several variants for two ranks and the file of its model."""

    file: Path
    bundle: Path
    variants: dict[str, dict[str, Any]]

    def model(self) -> nn.Module:
        """The dense model, anew."""
        return self._module.build_model().eval()  # type: ignore[no-any-return]

    def inputs(self, **sizes: Any) -> dict[str, Any]:
        """Its example inputs."""
        return self._module.example_inputs(**sizes)  # type: ignore[no-any-return]

    @property
    def _module(self) -> Any:
        return SimpleNamespace(**runpy.run_path(str(self.file)))


@pytest.fixture(scope="session")
def several(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Several]:
    """The bundle of a model by its name; nobody writes into it."""

    @cache
    def bundle(name: str) -> Several:
        folder = tmp_path_factory.mktemp(name)
        text, strategy, sizes = SEVERAL[name]
        variants = {f"v{number}": one for number, one in enumerate(sizes)}
        (folder / "model.py").write_text(f"{text}\nvariants = {variants!r}\n")
        converted(
            folder / "model.py", folder / "out", strategy, 2, weights_mode="external",
            proof="program" if name in PROVEN else "none",
        )  # fmt: skip
        return Several(folder / "model.py", folder / "out", variants)

    return bundle
