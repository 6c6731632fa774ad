"""What forward returns, with ``return_dict`` and without."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..bundle.manifest import Returned
from ..runtime.opened import Fields, rebuilt


def owned(outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies: an executor's outputs belong to its next call.

    With guidance a pipeline calls twice before it looks at the first result.
    """
    return {name: tensor.clone() for name, tensor in outputs.items()}


def answered(tree: Returned, outputs: Mapping[str, Tensor], return_dict: bool | None) -> Any:
    """The outputs in the containers of ``tree``.

    Args:
        tree: what forward returned when it was converted.
        outputs: by name.
        return_dict: ``True``: an object with named fields, ``sample`` first; ``False``: a tuple;
            ``None``: as it was converted.
    """
    value = rebuilt(tree, outputs)
    if return_dict is None:
        return value
    if tree.kind == "fields":
        return value if return_dict else tuple(value.values())
    values = value if isinstance(value, tuple) else (value,)
    if not return_dict:
        return values
    names = ["sample", *(f"output_{number}" for number in range(1, len(values)))]
    return Fields(zip(names, values, strict=True))
