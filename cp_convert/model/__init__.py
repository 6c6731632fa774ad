"""The wing model."""
