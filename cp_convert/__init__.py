"""cp-convert: context-parallel TensorRT engines from PyTorch diffusion transformers."""

from .model.packed import PackedColwiseParallel, PackedRowwiseParallel
from .model.plan import ContextParallelInput, ContextParallelOutput
from .version import __version__

__all__ = [
    "ContextParallelInput",
    "ContextParallelOutput",
    "PackedColwiseParallel",
    "PackedRowwiseParallel",
    "__version__",
]
