"""The wing show."""
