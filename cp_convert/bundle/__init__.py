"""The wing bundle."""
