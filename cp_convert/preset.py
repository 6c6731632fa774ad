"""For model files: presets as data, see :mod:`cp_convert.model.preset`; this older path stays."""

from .model.preset import Input, Preset, evaluate, names, path_of, read

__all__ = ["Input", "Preset", "evaluate", "names", "path_of", "read"]
