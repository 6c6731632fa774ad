"""The wing sharding."""
