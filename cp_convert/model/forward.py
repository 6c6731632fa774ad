"""Calling the model's forward, eagerly or in a trace: whatever it raises becomes one message."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from torch import nn

from ..errors import CannotTrace, ConvertError

FREEZE: Final = (
    "if a mask or an index decides how many tokens there are, freeze it: --freeze ARGUMENT makes "
    "its example value part of the engines."
)


def check_arguments(module: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Check that forward takes what example_inputs() gives.

    Raises:
        CannotTrace: it does not.
    """
    try:
        inspect.signature(module.forward).bind(**inputs)
    except TypeError as error:
        raise CannotTrace(
            f"example_inputs() does not fit {type(module).__name__}.forward: {error}.",
            hint=f"forward{inspect.signature(module.forward)}",
        ) from error


@contextmanager
def blamed_on_forward() -> Iterator[None]:
    """Turn what the model's own code raises into one message with its line."""
    try:
        yield
    except ConvertError:
        raise
    # forward may raise anything at all, and torch.export raises it again.
    except Exception as error:
        if isinstance(error.__cause__, ConvertError):
            raise error.__cause__ from None
        decides = "DataDependent" in type(error).__name__ or "SymInt" in str(error)
        raise CannotTrace(
            _reason(error),
            where=_model_line(error),
            hint=FREEZE
            if decides
            else "forward must run with example_inputs() and must not branch on the values of "
            "tensors; build_model()(**example_inputs()) should work by itself.",
        ) from error


def _reason(error: Exception) -> str:
    if "DataDependent" in type(error).__name__:
        return (
            "forward decides by the value of a tensor, which a program of fixed shapes cannot "
            f"({_first_lines(str(error), 1)})."
        )
    return f"{type(error).__name__}: {_first_lines(str(error))}"


def _first_lines(text: str, count: int = 4) -> str:
    return "\n".join(text.strip().splitlines()[:count])


def _model_line(error: BaseException) -> str | None:
    """The innermost frame outside torch: the model's own line."""
    frame = error.__traceback__
    where = None
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if not any(part in file for part in ("/torch/", "/cp_convert/", "<")):
            where = f"{file}:{frame.tb_lineno}"
        frame = frame.tb_next
    return where
