"""Advice before anything is built: a model and a GPU come in, each strategy's estimate goes out.

Work is counted in the very programs that convert would build, then priced by a roofline (ADR 9).
"""
