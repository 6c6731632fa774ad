"""One class of diffusers in a process of its own: what became of it, of one kind after another.

What a kind is (a mesh, a type of codes) is the caller's: it begins a class once for all of them,
and proves each. No torch before a process is there.
"""

from __future__ import annotations

import multiprocessing
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

Result = dict[str, Any]
Begin = Callable[[str, Sequence[str]], Any]
"""A class, measured and traced, for all kinds."""
Prove = Callable[[Any, str], Result]
"""What is told of one kind that is proven."""


def in_process(
    name: str, kinds: Sequence[str], begin: Begin, prove: Prove, *, timeout: float, first: str
) -> dict[str, Result]:
    """Results by kind, of a process that is forked from one that has imported ``first`` and ours.

    What is not there after ``timeout`` seconds, or when the process ends, has failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.zoo", first, "cp_convert.stages"])
    reader, writer = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(writer, name, kinds, begin, prove))
    process.start()
    writer.close()
    found: dict[str, Result] = {}
    failed, end = f"took longer than {timeout} s", time.monotonic() + timeout
    try:
        while len(found) < len(kinds) and reader.poll(max(0.0, end - time.monotonic())):
            kind, result = reader.recv()
            found[kind] = result
    except EOFError:
        process.join()
        failed = f"ended with exit code {process.exitcode}"
    process.kill()
    return {kind: found.get(kind, {"failed": failed}) for kind in kinds}


def _answer(writer: Any, name: str, kinds: Sequence[str], begin: Begin, prove: Prove) -> None:
    for found in _every(name, kinds, begin, prove):
        writer.send(found)


def _every(
    name: str, kinds: Sequence[str], begin: Begin, prove: Prove
) -> Iterator[tuple[str, Result]]:
    import torch

    from cp_convert.errors import ConvertError

    torch.set_num_threads(1)
    try:
        begun = begin(name, kinds)
    except ConvertError as error:
        yield from ((kind, _stopped(error)) for kind in kinds)
        return
    for kind in kinds:
        try:
            yield kind, {"proven": prove(begun, kind)}
        except ConvertError as error:
            yield kind, _stopped(error)


def _stopped(error: Any) -> Result:
    from cp_convert.errors import CannotConvert, UsageError

    kind = "refused" if isinstance(error, CannotConvert | UsageError) else "failed"
    where = f" [{error.where}]" if error.where else ""
    text = re.sub(r" at 0x\w+|/\S*site-packages/", "", f"{error}{where}")  # this machine's
    return {kind: " ".join(text.split())[:400]}
