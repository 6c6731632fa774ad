"""The wing ir."""
