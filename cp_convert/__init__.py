"""cp-convert: context-parallel TensorRT engines from PyTorch diffusion transformers."""

from .model.plan import ContextParallelInput, ContextParallelOutput
from .version import __version__

__all__ = ["ContextParallelInput", "ContextParallelOutput", "__version__"]
