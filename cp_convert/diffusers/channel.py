"""Control messages between the ranks of a bundle, over a gloo group of their own.

Rank 0 also says every few seconds that it is still there, so that ranks that follow can tell a
pipeline that is slow, or waits for a user, from one that is gone.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from ..bundle.manifest import Manifest
from ..errors import RunFailed
from ..ir.tensors import as_bytes
from ..runtime.arguments import inputs_of
from ..runtime.guarded import first_line
from ..runtime.watch import Silence, watched

Tensors = Mapping[str, Tensor]
Variant = str | None
Context = tuple[int, str | None]
"""Of a step cache: which picture, by number, and which of its branches."""
Run = Callable[[Variant, Tensors], dict[str, Tensor]]
Told = Callable[[str], None]
_CALL: Final = "call"
_WAIT: Final = "wait"
_END: Final = "end"
_FAILED: Final = "failed"
_PATIENCE: Final = 1800.0
"""Seconds for which ranks wait for one another between calls: one may decode, and save a film."""


class Channel:
    """This rank's end.

    Args:
        group: the process group of the bundle's ranks, in which inputs are sent.
        timeout: seconds without a word from rank 0 after which a rank that follows ends.
    """

    def __init__(self, group: Any, timeout: float) -> None:
        self.group, self.timeout = group, timeout
        self.rank: int = group.rank()
        self._control: Any = dist.new_group(
            dist.get_process_group_ranks(group),
            timeout=timedelta(seconds=max(timeout, _PATIENCE)),
            backend="gloo",
            use_local_synchronization=group is not dist.group.WORLD,
        )
        self._one_at_a_time = threading.Lock()
        self._over = threading.Event()

    def everyone(self, told: Any) -> list[Any]:
        """What all ranks tell, by rank; collective."""
        found: list[Any] = [None] * self.group.size()
        dist.all_gather_object(found, told, group=self._control)
        return found

    def lead(self) -> None:
        """Rank 0: say from now on that it is there."""
        if self.rank == 0:
            threading.Thread(target=self._present, daemon=True).start()

    def led(
        self, variant: Variant, context: Context, given: Tensors, run: Run
    ) -> dict[str, Tensor]:
        """Rank 0: a forward on all ranks."""
        with self._one_at_a_time:
            self._tell(_CALL, (variant, context))
            for tensor in given.values():
                self._send(tensor)
            return run(variant, given)

    def heard(
        self, manifests: Mapping[Variant, Manifest], device: torch.device, told: Told
    ) -> Iterator[tuple[Variant, Context, Tensors]]:
        """The others: variant, context and inputs of call after call, until rank 0 is done.

        Raises:
            RunFailed: rank 0 says that it failed.
        """
        while True:
            told("waiting for rank 0")
            kind, words = self._hear()
            if kind == _FAILED:
                raise RunFailed(f"rank 0 failed, and this rank followed it: {words}")
            if kind == _END:
                return
            if kind == _CALL:
                told("running a forward")
                variant, context = words
                inputs = inputs_of(manifests[variant])
                given = {name: self._received(io, device) for name, io in inputs.items()}
                yield variant, context, given

    def settle(self, device: torch.device) -> None:
        """Wait for the forward, so that one that hangs is noticed here."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def end(self, words: str) -> None:
        """Rank 0: no call will come any more; ``words`` say why where it failed."""
        self._over.set()
        with self._one_at_a_time:
            self.last(lambda _: self._tell(_FAILED if words else _END, words))

    def last(self, farewell: Callable[[Channel], object]) -> None:
        """A last message; nobody is left to be told where it does not arrive."""
        with suppress(RuntimeError, ValueError):
            farewell(self)

    def _present(self) -> None:
        with suppress(RuntimeError):  # the next call says that a rank is gone
            while not self._over.wait(self.timeout / 5):
                with self._one_at_a_time:
                    if not self._over.is_set():
                        self._tell(_WAIT)

    def _tell(self, kind: str, words: Any = "") -> None:
        dist.broadcast_object_list([(kind, words)], group_src=0, group=self._control)

    def _hear(self) -> tuple[str, Any]:
        found: list[Any] = [None]
        dist.broadcast_object_list(found, group_src=0, group=self._control)
        kind, words = found[0]
        return kind, words

    def _send(self, tensor: Tensor) -> None:
        # Bytes go through every backend; gloo knows no booleans.
        dist.broadcast(as_bytes(tensor.contiguous()), group_src=0, group=self.group)

    def _received(self, io: Any, device: torch.device) -> Tensor:
        tensor = torch.empty(io.shape, dtype=getattr(torch, io.dtype), device=device)
        dist.broadcast(as_bytes(tensor), group_src=0, group=self.group)
        return tensor


@contextmanager
def explained(rank: int) -> Iterator[None]:
    """Say of an error of torch.distributed what it means.

    Raises:
        RunFailed: a peer is gone.
    """
    try:
        yield
    except RuntimeError as error:
        # gloo has no error class of its own for a peer that is gone.
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise RunFailed(
            f"rank {rank}: another rank is gone, or did not come: {first_line(error)}",
            hint="look at what the other ranks said; rank 0 has to close() the transformer.",
        ) from error


@contextmanager
def watched_follower(channel: Channel) -> Iterator[Told]:
    """End the process when rank 0 says nothing, or a forward hangs, for longer than the time-out.

    Nobody else may: a rank that follows stands in a collective.
    """

    def ended(silence: Silence) -> None:
        said = f"rank {channel.rank}, {silence.doing}: {silence.message}."
        sys.stderr.write(f"{RunFailed.title}: {said}\n")
        sys.stderr.flush()

    with watched(channel.timeout, ended) as watch:
        yield watch.told
