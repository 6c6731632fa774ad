"""What Torch-TensorRT would import besides, and does not."""

import importlib
import sys
from pathlib import Path

import pytest

from cp_convert.trt.modelopt import without_modelopt


def test_modelopt_is_kept_away_unless_the_model_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "modelopt").mkdir()
    (tmp_path / "modelopt" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "modelopt", None)  # forgotten afterwards
    del sys.modules["modelopt"]
    with without_modelopt(), pytest.raises(ImportError):
        importlib.import_module("modelopt")
    found = importlib.import_module("modelopt")
    assert found.__file__ is not None
    assert Path(found.__file__).is_relative_to(tmp_path)
    with without_modelopt():
        assert importlib.import_module("modelopt") is found
