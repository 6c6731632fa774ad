"""A bundle at work: a finished bundle comes in, its ranks run together, or are made ready to.

Nothing here converts: what runs, or is handed to a server or to C++, is what the bundle holds.
``open`` gives one rank of a bundle, called as the model was, by TensorRT's engine or by torch from
the stored program; ``launch`` starts ranks as processes and ends all of them when one fails.
ADR 16.
"""

from .executors import EXECUTORS, Executor
from .opened import Opened, open  # noqa: A004

__all__ = ["EXECUTORS", "Executor", "Opened", "open"]
