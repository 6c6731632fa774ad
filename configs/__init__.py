"""Presets, one TOML a model (imported as ``cp_convert.configs``); README.md tells their form."""
