"""cp-convert: context-parallel TensorRT engines from PyTorch diffusion transformers."""

from .model.plan import ContextParallelInput, ContextParallelOutput

__version__ = "0.1.0"

__all__ = ["ContextParallelInput", "ContextParallelOutput", "__version__"]
