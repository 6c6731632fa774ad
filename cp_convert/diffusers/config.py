"""The model's configuration as pipelines read it."""

from __future__ import annotations

from typing import Any


class Config(dict[str, Any]):
    """``config.in_channels``, ``config["in_channels"]``, ``config.get(...)``; not to be changed.

    It went through JSON, as a published ``config.json`` does: what was a tuple is a list.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(
                f"the model's configuration, kept in the bundle, has no {name!r}: it has "
                f"{', '.join(self) or 'nothing'}. load_transformer(..., config={{...}}) adds to it."
            ) from None

    def __reduce__(self) -> tuple[type[Config], tuple[dict[str, Any]]]:
        return Config, (dict(self),)

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        raise TypeError(
            f"{name} = {value!r} changes nothing: the configuration is part of the engines."
        )
