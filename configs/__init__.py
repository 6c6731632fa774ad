"""Presets, one TOML a model (imported as ``cp_convert.configs``). None is shipped yet."""
