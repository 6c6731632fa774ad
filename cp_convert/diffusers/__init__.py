"""A bundle in a diffusers pipeline: it stands where the model stood, on every rank.

A bundle comes in; a module goes out that a pipeline calls as it called the model. All ranks run the
pipeline alike, or rank 0 runs it and the others follow. docs/diffusers.md, ADR 16.
"""

from .load import load_transformer
from .module import Transformer

__all__ = ["Transformer", "load_transformer"]
