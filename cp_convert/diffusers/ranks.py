"""How the ranks of a bundle come to be called alike: all by themselves, or all by rank 0."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor

from ..bundle.manifest import Manifest
from ..errors import ConvertError, RunFailed, UsageError
from ..runtime.choice import check_same
from ..runtime.join import digest_of_inputs
from .channel import Channel, Context, Run, Variant, explained, watched_follower

_CALLS: Final = "calls"
_FOLLOWS: Final = "follows"
_ENDS: Final = "ends"


Bind = Callable[[], tuple[Variant, dict[str, Tensor]]]


class _Bound(NamedTuple):
    """What a rank is called with, or why it cannot be."""

    variant: Variant
    given: dict[str, Tensor]
    refusal: ConvertError | None

    def check(self) -> None:
        """Raise the refusal, if there is one."""
        if self.refusal is not None:
            raise self.refusal


def _attempted(bind: Bind) -> _Bound:
    try:
        return _Bound(*bind(), None)
    except ConvertError as refusal:
        return _Bound(None, {}, refusal)


class Ranks:
    """The ranks of a bundle, seen by one of them.

    Whether all run the pipeline, or rank 0 alone, is found out at the first call.

    Args:
        channel: to the others; ``None`` where there are none.
        check: whether ranks that run the pipeline by themselves compare what they are given.
        several: whether the bundle has several variants, of which they compare which it is.

    Attributes:
        context: of the next call; on ranks that follow, rank 0's.
    """

    def __init__(self, channel: Channel | None, *, check: bool, several: bool = False) -> None:
        self.channel, self.check, self.several = channel, check, several
        self.context: Context = (0, None)
        self._led: bool | None = None
        self._closed = False

    def run(self, bind: Bind, run: Run) -> tuple[Variant, dict[str, Tensor]]:
        """A forward, together with the others; returns which variant, and its outputs.

        Args:
            bind: finds the variant and its inputs, or refuses what this rank was given.
            run: the forward.

        Raises:
            RunFailed: the others are given something else, ended or failed.
        """
        if self._closed:
            raise UsageError(
                "the bundle is closed; its engines are gone.",
                hint="call the pipeline within `with load_transformer(...) as transformer:`.",
            )
        own = _attempted(bind)
        if self.channel is None or self._led is not False:  # nobody waits for this rank's word
            own.check()
        if self.channel is None:
            return own.variant, run(own.variant, own.given)
        with explained(self.channel.rank):
            if self._led is None:
                self._meet(_CALLS)
            if self._led:
                outputs = self.channel.led(own.variant, self.context, own.given, run)
                return own.variant, outputs
            if self.check or self.several:
                self._compare(own)
            own.check()
            return own.variant, run(own.variant, own.given)

    def follow(self, manifests: Mapping[Variant, Manifest], device: torch.device, run: Run) -> int:
        """Run what rank 0 calls until it is done; returns how many calls there were.

        Raises:
            UsageError: this is rank 0, or ranks do both.
            RunFailed: rank 0 failed, or is gone.
        """
        if self.channel is None or self.channel.rank == 0:
            raise UsageError(
                "rank 0 runs the pipeline, and the others follow it.",
                hint="if transformer.rank: transformer.follow()",
            )
        count = 0
        with explained(self.channel.rank):
            if not self._meet(_FOLLOWS):  # may take minutes: rank 0 loads the pipeline's parts
                return 0
        with watched_follower(self.channel) as told, explained(self.channel.rank):
            for variant, context, given in self.channel.heard(manifests, device, told):
                self.context = context
                run(variant, given)
                count += 1
                self.channel.settle(device)
        return count

    def _meet(self, own: str, words: str = "") -> bool:
        """Learn what all do; returns whether there will be calls."""
        assert self.channel is not None
        told = self.channel.everyone((own, words))
        kinds = [kind for kind, _ in told]
        for rank, (kind, why) in enumerate(told):
            if kind == _ENDS and why:
                raise RunFailed(f"rank {rank} failed before the first call: {why}")
        if kinds[0] == _ENDS or own == _ENDS:
            return False
        if _ENDS in kinds:
            raise RunFailed(f"rank {kinds.index(_ENDS)} ended without a call; others make calls.")
        led = _FOLLOWS in kinds
        if led and kinds != [_CALLS] + [_FOLLOWS] * (len(kinds) - 1):
            both = ", ".join(f"rank {rank} {kind}" for rank, kind in enumerate(kinds))
            raise UsageError(
                f"ranks run the pipeline and follow at once: {both}.",
                hint="either every rank runs it with one seed, or rank 0 alone, and every other "
                "calls follow().",
            )
        self._led = led
        if led:
            self.channel.lead()
        return True

    def _compare(self, own: _Bound) -> None:
        """Refuse ranks that were given other sizes, or other inputs: a seed was forgotten."""
        assert self.channel is not None
        refusal = None if own.refusal is None else own.refusal.message
        digests = {name: digest_of_inputs({name: tensor}) for name, tensor in own.given.items()}
        told = self.channel.everyone((own.variant, refusal, digests if self.check else {}))
        check_same([(variant, why) for variant, why, _ in told], own.refusal)
        first = told[0][2]
        for rank, (_, _, other) in enumerate(told):
            names = [name for name in first if other[name] != first[name]]
            if names:
                raise RunFailed(
                    f"rank {rank} was given another {names[0]} than rank 0.",
                    hint="every rank runs the pipeline with the same prompt and seed "
                    "(generator=torch.Generator().manual_seed(0)), or rank 0 alone and the others "
                    "follow().",
                )

    def close(self, error: BaseException | None = None, *, quick: bool = False) -> None:
        """Tell the others that this rank is done, or why it failed; once.

        Args:
            error: what ended it.
            quick: do not wait for ranks that did not call yet.
        """
        if self._closed:
            return
        self._closed = True
        if self.channel is None:
            return
        words = "" if error is None else f"{type(error).__name__}: {error}"
        if self._led is None and not quick and not isinstance(error, RunFailed):
            self.channel.last(lambda channel: channel.everyone((_ENDS, words)))
        elif self._led and self.channel.rank == 0:
            self.channel.end(words)
