"""A module comes in, one dense program of core operators goes out, for all worlds and strategies.

Tracing, what is frozen, attention recognised; then decomposition, equal calls once (ADR 8).
"""
