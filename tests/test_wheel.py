"""The wheel, installed where nothing else is: reading bundles, then converting."""

import json
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from packaging.version import Version

from tests.conftest import EXAMPLES, ROOT, shorter

pytestmark = pytest.mark.engine


def run(*args: object) -> subprocess.CompletedProcess[str]:
    words = [str(a) for a in args]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, source = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source")
    for name in ("cp_convert", "converters", "configs", "pyproject.toml", "README.md"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, source)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_linked_folders_and_nothing_at_top_level(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"cp_convert"}
    for part in (
        "converters/lowerings.py",
        "configs/README.md",
        "configs/flux.1-dev.toml",
        "configs/hardware/h200.toml",
        "bundle/manifest.schema.json",
        "runtime/cpp/CMakeLists.txt",
        "runtime/cpp/README.md",
        "runtime/cpp/src/main.cpp",
        "runtime/cpp/src/world.h",
        "py.typed",
    ):
        assert f"cp_convert/{part}" in names


def test_the_wheel_reads_without_torch_and_converts_with_it(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # python -m would find the checkout in the current folder
    monkeypatch.delenv("PYTHONPATH", raising=False)
    run(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    pip_there = (sys.executable, "-m", "pip", "--python", python, "--quiet")
    run(*pip_there, "install", wheel)
    script = "import importlib.util as u; assert not u.find_spec('torch'); import cp_convert.bundle"
    run(python, "-c", script)
    help_text = run(tmp_path / "venv" / "bin" / "cp-convert", "--help").stdout
    assert "cp-convert model.py --strategy ulysses --world 8" in help_text
    presets = json.loads(run(python, "-m", "cp_convert", "presets", "--json").stdout)
    assert presets["flux.1-dev"]["parameters"] == 11_901_408_320
    refused = subprocess.run(
        [python, "-m", "cp_convert", EXAMPLES / "plain_dit.py", "-s", "ring", "-w", "2", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert refused.returncode == 2
    assert "pip install 'cp-convert[rtx]'" in json.loads(refused.stdout)["error"]["hint"]

    # Torch and TensorRT are 6 GB: they are lent by the environment that runs the tests.
    site = Path(
        run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    )
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    origin = run(python, "-c", "import cp_convert.converters as c; print(c.__file__)").stdout
    assert origin.startswith(str(site))
    # The README's second command: over what Torch-TensorRT-RTX pins.
    script = "from cp_convert.releases import NEWER; print(NEWER['tensorrt-rtx'])"
    pip, *words = shlex.split(run(python, "-c", script).stdout)
    assert pip == "pip"
    run(*pip_there, *words)
    model, out = shorter("plain_dit", tmp_path), tmp_path / "bundle"
    run(python, "-m", "cp_convert", model, "-s", "ulysses", "-w", 2, "-o", out)
    (site / "lent.pth").unlink()
    run(python, "-m", "cp_convert", "verify", out)
    manifest = json.loads(run(python, "-m", "cp_convert", "inspect", "--json", out).stdout)
    assert manifest["world"] == 2
    assert Version(manifest["backend"]["version"]) >= Version("1.7.1")
    assert (manifest["runs_on"]["release"], manifest["runs_on"]["doubt"]) == ("1.7.1", None)
    assert manifest["backend"]["workarounds"] == []
