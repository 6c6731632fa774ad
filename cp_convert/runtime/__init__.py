"""A bundle at work: a finished bundle comes in, its ranks run together, or are made ready to.

Nothing here converts: what runs, or is handed to a server or to C++, is what the bundle holds.
``open_rank`` gives one rank an executor (TensorRT's engine, or the stored program by torch);
``launch`` starts ranks as processes and ends all of them when one fails. ADR 16.
"""

from .executors import EXECUTORS, Executor, open_rank

__all__ = ["EXECUTORS", "Executor", "open_rank"]
