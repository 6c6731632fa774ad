"""LoRA: a file of small factors and a finished bundle come in, a named set of weights goes out.

Only the weights that a file changes are computed, and stored beside the others; which set is in
effect is decided when a bundle is opened, or later. Needs no TensorRT, and diffusers only for files
in the names of a model's authors. ADR 18.
"""
