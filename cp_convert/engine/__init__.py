"""A rewritten program comes in, TensorRT engines go out.

Lowered once, taken apart by rank (ADR 6) or not (ADR 11), built in worker processes (ADR 12).
"""
