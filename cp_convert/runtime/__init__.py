"""A bundle at work: a finished bundle comes in, its ranks run together, or are made ready to.

Nothing here converts: what runs, or is handed to a server or to C++, is what the bundle holds.
"""
