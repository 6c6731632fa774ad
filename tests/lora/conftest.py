"""Bundles of three models with external weights, made once."""

from __future__ import annotations

import runpy
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from tests.runtime.bundles import FLUX, QWEN, WAN, converted

MODELS = {"flux": (FLUX, "ulysses"), "wan": (WAN, "ring"), "qwen": (QWEN, "allgather-kv")}


@dataclass(frozen=True)
class Made:
    """A bundle for two ranks and the file of its model."""

    file: Path
    bundle: Path

    def model(self) -> nn.Module:
        """The dense model, anew."""
        return self._module.build_model().eval()  # type: ignore[no-any-return]

    def inputs(self) -> dict[str, Any]:
        """Its example inputs."""
        return self._module.example_inputs()  # type: ignore[no-any-return]

    @property
    def _module(self) -> Any:
        return SimpleNamespace(**runpy.run_path(str(self.file)))

    def copy(self, folder: Path) -> Path:
        """A bundle of one's own."""
        return Path(shutil.copytree(self.bundle, folder / "out"))


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    """The bundle of a model by its name; nobody writes into it, see :meth:`Made.copy`."""

    @cache
    def bundle(name: str) -> Made:
        folder = tmp_path_factory.mktemp(name)
        text, strategy = MODELS[name]
        (folder / "model.py").write_text(text)
        converted(folder / "model.py", folder / "out", strategy, 2, weights_mode="external")
        return Made(folder / "model.py", folder / "out")

    return bundle
