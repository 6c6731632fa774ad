"""``torch_tensorrt`` without NVIDIA ModelOpt, which it imports wherever it is installed.

It registers converters for ModelOpt's operators then, and looks for these when it folds constants.
No program of ours has any: quantizers are operators of our own (:mod:`cp_convert.ir.quantize`).
Importing it takes every process that builds an engine as long again as TensorRT itself.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

_NAME: Final = "modelopt"


@contextmanager
def without_modelopt() -> Iterator[None]:
    """Let nobody import it meanwhile, unless the user's model has already."""
    if _NAME in sys.modules:
        yield
        return
    modules: dict[str, Any] = sys.modules
    modules[_NAME] = None
    try:
        yield
    finally:
        del modules[_NAME]
