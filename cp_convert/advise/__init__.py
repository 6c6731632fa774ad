"""The wing advise."""
