"""The wing capture."""
