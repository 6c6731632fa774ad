"""Benchmarks: whole processes, medians, printed as Markdown tables. Never part of the tests."""
