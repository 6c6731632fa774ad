"""Finished work, by what it was made from: keys come in, folders that are whole go out (ADR 13)."""
