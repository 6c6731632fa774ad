"""Torch-TensorRT converters for ``cp::*`` operators: one table.

Imported as ``cp_convert.converters``. Every collective becomes exactly one
``IDistCollectiveLayer`` whose group and size come from the operator, never from the environment;
``cp::shard`` has become a slice before conversion (:mod:`cp_convert.engine.specialise`).
"""

from .lowerings import register
from .workarounds import WORKAROUNDS, Workaround, active

__all__ = ["WORKAROUNDS", "Workaround", "active", "register"]
