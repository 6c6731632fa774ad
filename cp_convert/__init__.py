"""cp-convert: context-parallel TensorRT engines from PyTorch diffusion transformers."""

from .model.plan import ContextParallelInput, ContextParallelOutput
from .model.tp_plan import PackedColwiseParallel, PackedRowwiseParallel
from .version import __version__

__all__ = [
    "ContextParallelInput",
    "ContextParallelOutput",
    "PackedColwiseParallel",
    "PackedRowwiseParallel",
    "__version__",
]
