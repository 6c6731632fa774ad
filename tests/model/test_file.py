"""Model files as people write them: what Python runs is run, mistakes are named with their line."""

import importlib
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from cp_convert.errors import CannotTrace, ConvertError, ModelFileError
from cp_convert.job import Job
from cp_convert.model.home import at_home, find_module, home_of
from cp_convert.model.load import load, surroundings
from cp_convert.model.unwrap import unwrapped
from cp_convert.prove.measure import measure

Write = Callable[..., Path]
BUILD = "    torch.manual_seed(0)\n    return Model()"
INPUTS = '    return {"x": torch.randn(1, 16, 8)}'
FORWARD = "        q, k, v = self.qkv"
TOP = "class Model"
RETURN = "return self.leave(mixed.transpose(1, 2).flatten(2))"
PARSER = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("x")
parser.parse_args()

"""
OUTPUTS = """
from dataclasses import dataclass

@dataclass(frozen=True)
class Inner:
    held: torch.Tensor
    name: str

@dataclass
class Out:
    sample: torch.Tensor
    inner: Inner

"""


def job(model: Path, module: str | None = None) -> Job:
    return Job(model, "ring", 2, Path("unused"), precision="fp32", module=module)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (BUILD, "    pass", "returned None"),
        (BUILD, "    return Model", "returned the class Model"),
        (BUILD, "    return Model(), 1", "of type tuple"),
        (BUILD, "    yield Model()", "of type generator"),
        (BUILD, "    return Model().state_dict()", "of type OrderedDict"),
        (BUILD, "    return torch.jit.script(nn.Linear(8, 8))", "TorchScript"),
        (BUILD, "    with torch.device('meta'):\n        return Model()", "6 tensors without numb"),
        (BUILD, "    import sys; sys.exit('gone')", r"SystemExit\('gone'\)"),
        (BUILD, "    raise GeneratorExit", "failed with GeneratorExit"),
        (TOP, "raise BaseException('odd')\nclass Model", "failed with BaseException: odd"),
        (BUILD, "    input('path? ')", "nobody answers"),
        (BUILD, "    return build_model()", "RecursionError"),
        (
            BUILD,
            "    return nn.Linear(8, 8).to(torch.float8_e4m3fn)",
            "2 parameters in float8_e4m3",
        ),
        (BUILD, "    return nn.Module()", r"defines no forward\(\)"),
        ("build_model()", "build_model(size)", "wants size"),
        ("example_inputs()", "example_inputs(batch)", "wants batch"),
        (INPUTS, "    return [torch.ones(1)]", "of type list"),
        (INPUTS, "    pass", "returned None"),
        (INPUTS, "    return {0: torch.ones(1)}", "keys that are no words"),
        (INPUTS, "    import numpy; return {'x': numpy.ones(3)}", "of type ndarray for 'x'"),
        (INPUTS, "    return {'x': torch.ones(1, device='meta')}", "on the meta device for 'x'"),
        (INPUTS, "    return {'x': torch.ones(1, 2).to_sparse()}", "a sparse_coo tensor for 'x'"),
        (INPUTS, "    return {'x': torch.ones(1, 0, 8)}", "an empty tensor for 'x'"),
        (INPUTS, "    return {'x': [print]}", "for 'x.0', which no program can take"),
        (TOP, "raise SystemExit\n\nclass Model", "importing it ended the program"),
        (TOP, "from . import sizes\nclass Model", "imports relatively"),
        (TOP, "freeze = ['y']\nclass Model", "freeze names 'y'"),
        (TOP, "keep_float32 = 3\nclass Model", "keep_float32 is 3"),
        (TOP, "process_groups = {'tp': 3}\nclass Model", "not lists of ranks"),
        ("cp_plan = {", "cp_plan = [1] or {", "cp_plan is a list"),
        (
            TOP,
            f"{PARSER}{TOP}",
            "ArgumentParser wants arguments",
        ),
    ],
)
def test_mistakes_exit_2_and_name_the_file(
    model_file: Write, old: str, new: str, message: str
) -> None:
    path = model_file((old, new))
    with pytest.raises(ModelFileError, match=message) as caught:
        load(job(path))
    assert str(path) in (caught.value.where or "")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("new", "message"),
    [
        ("        return None\n", "returns None, and no tensor"),
        ("        return [x, object()]\n", "returns an object as 1"),
        ("        return (t for t in x)\n", "returns a generator"),
        ("        raise SystemExit(3)\n", r"SystemExit\(3\)"),
        ("        raise GeneratorExit\n", "GeneratorExit"),
        ("        return self.forward(x)\n", "RecursionError"),
        ("        import absent_module\n", "No module named 'absent_module'"),
    ],
)
def test_what_forward_does_wrong_exits_3(model_file: Write, new: str, message: str) -> None:
    path = model_file((FORWARD, new + FORWARD))
    source = load(job(path))
    with pytest.raises(CannotTrace, match=message):
        measure(source.module, source.inputs)


@pytest.mark.parametrize("place", [BUILD, FORWARD])
def test_an_interruption_is_nobodys_mistake(model_file: Write, place: str) -> None:
    source = 8 * " " if place == FORWARD else 4 * " "
    path = model_file((place, f"{source}raise KeyboardInterrupt\n{place}"))
    with pytest.raises(KeyboardInterrupt):
        measure((found := load(job(path))).module, found.inputs)


@pytest.mark.parametrize(
    ("inputs", "message", "hint"),
    [
        ('{"xs": x}', "no argument 'xs'; it gives no 'x'", "did you mean x?"),
        ("{}", "gives no 'x'", "forward"),
        ('{"x": x, "mask": None}', "no argument 'mask'", "forward"),
    ],
)
def test_arguments_that_do_not_fit(model_file: Write, inputs: str, message: str, hint: str) -> None:
    path = model_file((INPUTS, f"    x = torch.ones(1, 16, 8)\n    return {inputs}"))
    source = load(job(path))
    with pytest.raises(ConvertError, match=message) as caught:
        measure(source.module, source.inputs)
    assert hint in (caught.value.hint or "")
    assert (caught.value.where or "").endswith("model.py:17")


def test_the_file_is_a_module_of_its_own_name_while_it_is_used(
    model_file: Write, tmp_path: Path
) -> None:
    (tmp_path / "late_beside.py").write_text("SCALE = 2.0")
    path = model_file(
        ("\nimport torch\n", "\nfrom __future__ import annotations\nimport sys\nimport torch\n"),
        (
            TOP,
            "from dataclasses import dataclass\n@dataclass\nclass C:\n    w: int = 3\nclass Model",
        ),
        (FORWARD, "        import late_beside\n        x = x * late_beside.SCALE\n" + FORWARD),
        (BUILD, "    assert sys.argv == [__file__]\n" + BUILD),
        name="own_name.py",
    )
    before = list(sys.path), list(sys.argv)
    with surroundings(job(path)):
        source = load(job(path))
        assert type(source.module).__module__ == "own_name"
        assert "own_name" in sys.modules
        measure(source.module, source.inputs)
    assert (sys.path, sys.argv) == before
    assert not {"own_name", "late_beside"} & set(sys.modules)


def test_a_name_that_is_taken_is_left_to_its_owner(tmp_path: Path) -> None:
    assert home_of(tmp_path / "json.py").name == "json_model"


def test_files_of_packages(model_file: Write, tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    package = tmp_path / "pkg_of_test"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "sizes.py").write_text("HEADS = 4")
    text = model_file(
        ("\nimport torch\n", "\nfrom .sizes import HEADS\nimport torch\n")
    ).read_text()
    (package / "net.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert find_module("pkg_of_test.net") == package / "net.py"
    assert find_module("pkg_of_test.absent") is None
    named = job(package / "net.py", module="pkg_of_test.net")
    assert named.name == "net"
    for one in (named, job(package / "net.py")):
        assert type(load(one).module).__module__ == "pkg_of_test.net"
    assert "pkg_of_test" not in sys.modules


def test_dataclasses_and_objects_are_taken_apart(model_file: Write) -> None:
    path = model_file(
        (TOP, OUTPUTS + TOP),
        (RETURN, f"y = {RETURN.removeprefix('return ')}\n        return Out(y, Inner(y + 1, 'a'))"),
    )
    from cp_convert.capture.trace import trace

    source = load(job(path))
    assert len(measure(source.module, source.inputs).reference) == 2
    program, _ = trace(source.module, source.inputs, {})
    assert [one.name for one in program.outputs] == ["sample", "inner.held"]


def test_wrappers_are_taken_off() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    inner[0] = torch.compile(inner[0])  # type: ignore[assignment]
    inner[1].compile()
    inner.forward = torch.compile(inner.forward)  # type: ignore[method-assign]
    found = unwrapped(torch.compile(nn.DataParallel(inner)))  # type: ignore[arg-type]
    assert found is inner
    assert list(found.state_dict()) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    torch.export.export(found, (torch.ones(1, 2),))


def test_layerwise_casting_is_undone() -> None:
    from diffusers.hooks import apply_layerwise_casting

    module = nn.Sequential(nn.Linear(4, 4))
    apply_layerwise_casting(module, torch.float8_e4m3fn, torch.bfloat16, skip_modules_pattern=())
    assert module[0].weight.dtype == torch.float8_e4m3fn
    x = torch.ones(1, 4, dtype=torch.bfloat16)
    expected = module(x)
    assert unwrapped(module)[0].weight.dtype == torch.bfloat16  # type: ignore[index]
    assert torch.equal(module(x), expected)
    assert module[0].weight.dtype == torch.bfloat16


def test_surroundings_within_surroundings_end_once(tmp_path: Path) -> None:
    path = tmp_path / "m.py"
    with at_home(path):
        with at_home(path):
            pass
        assert sys.path[0] == str(tmp_path)


def test_what_is_installed_beneath_the_model_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as an environment in the project: ``.venv``, or ``pip install --target deps``."""
    deps = tmp_path / "deps"
    for folder, names in ((deps, ("installed_here", "spaced_here/inner")), (tmp_path, ("near",))):
        for name in names:
            (folder / name).mkdir(parents=True)
            (folder / name / "__init__.py").write_text("")
    monkeypatch.setattr(sys, "path", [str(deps), *sys.path])
    with at_home(tmp_path / "m.py"):
        for name in ("installed_here", "spaced_here.inner", "near"):
            importlib.import_module(name)
    installed = ("installed_here", "spaced_here", "spaced_here.inner")
    left = [name for name in (*installed, "near") if sys.modules.pop(name, None)]
    assert left == list(installed)


def test_spaces_near_the_model_are_forgotten_with_what_is_in_them(tmp_path: Path) -> None:
    """A namespace package finds its path by its parent."""
    (tmp_path / "outer_space" / "inner_space" / "last").mkdir(parents=True)
    with at_home(tmp_path / "m.py"):
        importlib.import_module("outer_space.inner_space.last")
    assert not [name for name in sys.modules if name.startswith("outer_space")]
