"""Calling the model's forward, eagerly or in a trace: whatever it raises becomes one message."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from ..errors import CannotTrace, ConvertError
from ..words import near
from .unwrap import eagerly

FREEZE: Final = (
    "if a mask or an index decides how many tokens there are, freeze it: --freeze ARGUMENT makes "
    "its example value part of the engines."
)
ALONE: Final = (
    "forward must run with example_inputs() and must not branch on the values of tensors; "
    "build_model()(**example_inputs()) should work by itself."
)
_LONGEST: Final = 500
_NOT_THE_MODEL: Final = (Path(torch.__file__).parent, Path(__file__).parent.parent)


def check_arguments(module: nn.Module, inputs: Mapping[str, Any]) -> None:
    """Check that forward takes what example_inputs() gives.

    Raises:
        CannotTrace: it does not.
    """
    signature = inspect.signature(module.forward)
    complaints, hint = _misfits(signature, inputs)
    try:
        if not complaints:
            signature.bind(**inputs)
    except TypeError as error:
        complaints.append(str(error))
    if complaints:
        raise CannotTrace(
            f"example_inputs() does not fit {type(module).__name__}.forward: "
            f"{'; '.join(complaints)}.",
            where=_where(module),
            hint=hint or f"forward{signature}",
        )


def _misfits(
    signature: inspect.Signature, inputs: Mapping[str, Any]
) -> tuple[list[str], str | None]:
    """Arguments that forward lacks or is not given, and what was meant by one of them."""
    parameters = signature.parameters.values()
    complaints: list[str] = []
    hint = None
    unknown = [name for name in inputs if name not in signature.parameters]
    if unknown and not any(p.kind is p.VAR_KEYWORD for p in parameters):
        free = [name for name in signature.parameters if name not in inputs]
        complaints.append(f"forward has no argument {', '.join(map(repr, unknown))}")
        hint = f"{near(unknown[0], free)} forward{signature}" if free else None
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    missing = [
        p.name
        for p in parameters
        if p.kind in named and p.default is p.empty and p.name not in inputs
    ]
    if missing:
        complaints.append(f"it gives no {', '.join(map(repr, missing))}, which has no default")
    return complaints, hint


def _where(module: nn.Module) -> str | None:
    code = getattr(inspect.unwrap(module.forward), "__code__", None)
    return None if code is None else f"{code.co_filename}:{code.co_firstlineno}"


@contextmanager
def blamed_on_forward() -> Iterator[None]:
    """Turn what the model's own code raises into one message with its line.

    What forward calls runs as it was written, also where ``torch.compile`` is around it.
    """
    try:
        with eagerly():
            yield
    except ConvertError:
        raise
    except SystemExit as error:
        raise CannotTrace(
            f"forward ended the program: SystemExit({error.code!r}).", where=_model_line(error)
        ) from error
    except KeyboardInterrupt:  # a person's, or the system's; never the model's
        raise
    # forward may raise anything at all (GeneratorExit too), and torch.export raises it again.
    except BaseException as error:
        if (own := _own_error(error)) is not None:
            raise own from None
        decides = "DataDependent" in type(error).__name__ or "SymInt" in str(error)
        raise CannotTrace(
            _reason(error), where=_model_line(error), hint=FREEZE if decides else ALONE
        ) from error


def _own_error(error: BaseException | None) -> ConvertError | None:
    """A hook's complaint that torch.export wrapped in errors of its own."""
    while error is not None and not isinstance(error, ConvertError):
        error = error.__cause__
    return error


def _reason(error: BaseException) -> str:
    if "DataDependent" in type(error).__name__:
        return (
            "forward decides by the value of a tensor, which a program of fixed shapes cannot "
            f"({_first_lines(str(error), 1)})."
        )
    if ".numpy() is not supported" in str(error):
        return "forward takes a tensor's numbers to NumPy, where a trace cannot follow."
    return f"{type(error).__name__}: {_first_lines(str(error))}"


def _first_lines(text: str, count: int = 4) -> str:
    """The beginning of a message, without the advice of others that follows it."""
    text = re.split(r"\n\s*\n|\n(?:While executing|Original traceback)", text.strip())[0]
    told = "\n".join(text.splitlines()[:count])
    return told if len(told) <= _LONGEST else f"{told[:_LONGEST]} ..."


def _model_line(error: BaseException) -> str | None:
    """The innermost frame outside torch: the model's own line."""
    frame = error.__traceback__
    where = None
    while frame is not None:
        file = frame.tb_frame.f_code.co_filename
        if not file.startswith("<") and not any(
            Path(file).is_relative_to(folder) for folder in _NOT_THE_MODEL
        ):
            where = f"{file}:{frame.tb_lineno}"
        frame = frame.tb_next
    return where
