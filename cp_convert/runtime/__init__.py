"""A bundle at work: a bundle and a rank come in, the model's outputs go out.

``open_rank`` gives one rank an executor (TensorRT's engine, or the stored program by torch);
``launch`` starts ranks as processes and ends all of them when one fails. ADR 16.
"""

from .executors import EXECUTORS, Executor, open_rank

__all__ = ["EXECUTORS", "Executor", "open_rank"]
