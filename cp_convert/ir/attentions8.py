"""What became of every attention of a model where some are computed over FP8 codes, as data."""

from __future__ import annotations

from dataclasses import dataclass

from .attention8 import Steps
from .linear8 import Kept, Scales


@dataclass(frozen=True)
class Attention8:
    """An attention over FP8 codes.

    Attributes:
        module: the path of who called it.
        steps: see :data:`.attention8.Steps`.
        loss: its own: the root mean square of what its output differs by, over the output's;
            ``None`` where nothing was computed.
        given: ``both`` where the checkpoint has the scales, ``none`` where they come from inputs.
    """

    module: str
    steps: Steps
    loss: float | None
    given: Scales = "none"


@dataclass(frozen=True)
class Attentions:
    """What became of every attention of a model some of whose attentions read FP8 codes.

    Attributes:
        eight, kept: those that do, and those that do not.
        sets: how many sets of inputs were looked at for scales; 0: the checkpoint has them all.
    """

    eight: tuple[Attention8, ...] = ()
    kept: tuple[Kept, ...] = ()
    sets: int = 0
