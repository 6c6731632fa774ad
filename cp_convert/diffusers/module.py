"""The module that a pipeline calls in the model's place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..model.cast import DTYPES
from ..runtime.choice import fitting
from ..runtime.opened import Opened, named
from ..runtime.step_cache import StepCache
from .config import Config
from .given import Arguments
from .pairs import Branches, of_one_branch
from .promised import kept
from .ranks import Ranks
from .refused import Refusing
from .returned import answered, owned


class Transformer(Refusing, nn.Module):
    """One rank of a bundle as a model of diffusers; made by :func:`.load.load_transformer`.

    A context manager: its end frees what it holds, and ends the ranks that follow.

    Attributes:
        config: the model's whole configuration.
        rank: of the bundle's.
        world: how many there are.
    """

    def __init__(
        self,
        opened: Opened,
        device: torch.device,
        *,
        config: Mapping[str, Any],
        ranks: Ranks,
        ends: ExitStack,
        pairs: bool = False,
    ) -> None:
        super().__init__()
        self.config = Config({**(opened.manifest.model.config or {}), **config})
        self.rank, self.world = opened.rank, opened.manifest.world
        self._opened, self._device = opened, device
        self._manifests = views = opened.manifests
        if pairs:  # such a bundle has no other variants
            views = {name: of_one_branch(one) for name, one in views.items()}
        self._branches = Branches(opened.manifest, device, self._on_all_ranks) if pairs else None
        count = 1 if self._branches is None else self._branches.known.branches
        self._arguments = cache(lambda name: Arguments(views[name], device, count))
        self._ranks, self._ends = ranks, ends
        # diffusers asks a module's first parameter or buffer where the module is.
        marker = torch.empty(0, dtype=self.dtype, device=device)
        self.register_buffer("_place", marker, persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """What the engines compute in."""
        return DTYPES[self._opened.manifest.precision]

    @property
    def device(self) -> torch.device:
        """Where this rank runs."""
        return self._device

    @torch.no_grad()
    def forward(self, *args: Any, return_dict: bool | None = None, **kwargs: Any) -> Any:
        """What the model returns for these arguments.

        Tensors are cast to the bundle's types and moved to its device.

        Args:
            args: the model's arguments by place.
            return_dict: an object with named fields, or a tuple; ``None``: the model's default.
            kwargs: the model's arguments by name.

        Raises:
            UsageError: an argument that the engines do not take, or of another size.
            RunFailed: the ranks are not called alike, or one is gone.
        """
        arguments = kept(named(self._opened.manifest, args, kwargs))
        if self._branches is None:
            variant, outputs = self._ranks.run(lambda: self._bound(arguments), self._run)
        else:
            variant, given = self._bound(arguments)
            outputs = dict(self._branches.called(given))
        if return_dict is None:
            return_dict = self._arguments(variant).defaults.get("return_dict")
        return answered(self._manifests[variant].forward.returned, outputs, return_dict)

    @torch.no_grad()
    def _on_all_ranks(self, given: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        name = next(iter(self._manifests))
        return self._ranks.run(lambda: (name, dict(given)), self._run)[1]

    def _bound(self, arguments: Mapping[str, Any]) -> tuple[str | None, dict[str, Tensor]]:
        """The variant that the arguments have the shapes of, and its inputs."""
        several = len(self._manifests) > 1
        if several:
            variant = fitting(self._manifests, arguments, has_defaults=True)
        else:
            variant = next(iter(self._manifests))
        return variant, self._arguments(variant).bound(arguments)

    def _run(self, variant: str | None, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self._opened.steps is not None:
            self._opened.steps.enter(*self._ranks.context)
        return owned(self._opened.executor.run(variant, given))

    def follow(self) -> int:
        """Serve the calls of rank 0's pipeline until it is done; returns how many there were.

        Every rank but 0 calls this where rank 0 runs the pipeline.

        Raises:
            UsageError: this is rank 0, or ranks run the pipeline and follow at once.
            RunFailed: rank 0 failed, in its own words, or is gone.
        """
        return self._ranks.follow(self._manifests, self._device, self._run)

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Iterator[None]:
        """Which of a pipeline's branches is called, for the step cache, if there is one."""
        picture, before = self._ranks.context
        # Branches of one call are one trajectory, whoever's turn it is when they are computed.
        self._ranks.context = (picture, name if self._branches is None else None)
        try:
            yield
        finally:
            self._ranks.context = (self._ranks.context[0], before)

    @property
    def is_cache_enabled(self) -> bool:
        """Whether a step cache is on."""
        return self._opened.steps is not None

    def _reset_stateful_cache(self, recurse: bool = True) -> None:
        """Pipelines call it at their end: the next step is another picture's."""
        picture, name = self._ranks.context
        self._ranks.context = (picture + 1, name)

    @property
    def steps(self) -> StepCache | None:
        """How many steps were computed and skipped, where a step cache is on."""
        return self._opened.steps

    def unload_lora(self) -> None:
        """Nothing was loaded, and nothing is left to do."""

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Itself, where nothing has to change for that.

        Raises:
            UsageError: it is asked to another device or type.
        """
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if dtype is not None and dtype != self.dtype:
            raise UsageError(
                f"the engines compute in {self.dtype}, and are asked for {dtype}.",
                hint="convert with another --precision, or give the pipeline's other parts that "
                f"type: torch_dtype={self.dtype}.",
            )
        if device is not None and not _is_here(device, self.device):
            raise UsageError(
                f"the engines are on {self.device}, and are asked to {device}.",
                hint=f'pipe.to("{self.device}"); offloading to the CPU moves the other parts one '
                "by one (pipe.vae.to(...)).",
            )
        return self

    def cuda(self, device: int | torch.device | None = None) -> Self:
        """See :meth:`to`."""
        return self.to(torch.device("cuda" if device is None else device))

    def cpu(self) -> Self:
        """See :meth:`to`."""
        return self.to("cpu")

    def half(self) -> Self:
        """See :meth:`to`."""
        return self.to(torch.float16)

    def bfloat16(self) -> Self:
        """See :meth:`to`."""
        return self.to(torch.bfloat16)

    def float(self) -> Self:
        """See :meth:`to`."""
        return self.to(torch.float32)

    def __getattr__(self, name: str) -> Any:
        """What else pipelines ask a model for: a number of its configuration."""
        config = self.__dict__.get("config", {})
        if name in config:
            return config[name]
        try:
            return nn.Module.__getattr__(self, name)
        except AttributeError:
            raise AttributeError(
                f"a bundle has no {name!r}: engines have neither the model's modules nor its "
                "other methods. What a pipeline needs of them has to be kept beside."
            ) from None

    def close(self, error: BaseException | None = None) -> None:
        """Free everything, and end the ranks that follow; a second time it does nothing."""
        self._ranks.close(error)
        if error is None:
            self._ends.close()
        else:
            self._ends.__exit__(type(error), error, error.__traceback__)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(error)


def _is_here(device: torch.device, own: torch.device) -> bool:
    """Whether ``device`` names our own; ``cuda`` alone does, as every rank has one GPU."""
    return device.type == own.type and device.index in (None, own.index)
