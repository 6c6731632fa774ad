"""A dense program comes in, one SPMD program goes out, its sequence spread over ranks (ADR 8).

One rule an operator (``rules``), where splitting begins (``propagation``), the walk (``shard``).
"""
