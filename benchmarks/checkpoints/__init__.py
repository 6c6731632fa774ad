"""Quantized checkpoints of small models, written from the layouts that their makers document.

In: a module, and which of its layers are codes. Out: tensors, or a file. Tests and benchmarks read
them; nothing here is part of cp-convert.
"""
