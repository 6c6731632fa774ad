"""The command line as a user meets it: exit codes, messages, JSON. Nothing here needs an engine,
and what needs none must not import torch."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cp_convert import cli
from cp_convert.cli import config, convert, mesh
from tests.bundle.test_folder import written

Run = Callable[..., "Result"]
Write = Callable[..., Path]


class Result:
    """Exit code and both streams."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def cp_convert(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """Runs the command line in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*args: object) -> Result:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(a) for a in args])
        captured = capfd.readouterr()
        return Result(int(stop.value.code or 0), captured.out, captured.err)

    return run


@pytest.mark.parametrize(
    "command", [[], ["convert"], ["presets"], ["inspect"], ["verify"], ["cache"]]
)
def test_help_reads(cp_convert: Run, command: list[str]) -> None:
    result = cp_convert(*command, "--help")
    assert result.code == 0
    assert "Usage: cp-convert" in result.out
    assert "..." not in result.out.replace("[ARGS]...", "").split("Commands:")[0]


def test_torch_is_imported_only_to_convert(tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    for args in (
        ["--help"], ["convert", "--help"], ["presets"], ["presets", "flux.1-dev"],
        ["inspect", str(out)], ["verify", str(out)], ["cache", "info"],
    ):  # fmt: skip
        script = (
            "import sys\nfrom cp_convert import cli\n"
            f"try: cli.main({args!r})\nexcept SystemExit as stop: assert not stop.code\n"
            "heavy = {'torch', 'tensorrt', 'torch_tensorrt', 'numpy'} & set(sys.modules)\n"
            "assert not heavy, heavy"
        )
        subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL)


def test_inspect_shows_what_the_manifest_says(cp_convert: Run, tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    result = cp_convert("inspect", out)
    assert result.code == 0
    for part in ("ulysses over 2 ranks", "rank1.engine", "all_to_all", "blocks.*.attn", "2 of 4",
                 "input x", "w: why", "flag = True", "passed"):  # fmt: skip
        assert part in result.out
    document = json.loads(cp_convert("inspect", out, "--json").out)
    assert document == json.loads((out / "manifest.json").read_text())
    assert cp_convert("inspect", out / "manifest.json").code == 0


def test_verify_answers_by_exit_code(cp_convert: Run, tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    assert cp_convert("verify", out).code == 0
    (out / "rank1.engine").write_bytes(b"x")
    result = cp_convert("verify", out)
    assert result.code == 6
    assert "rank1.engine 1 bytes, expected 7" in result.err
    result = cp_convert("verify", "--json", out)
    assert result.code == 6
    assert json.loads(result.out)["status"] == "damaged"
    assert cp_convert("verify", tmp_path / "absent").code == 6


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["absent.py", "-s", "ring", "-w", "2"], "there is no file absent.py"),
        (["model.py", "-s", "ring", "-w", "0"], "--world 0: a world has at least one rank"),
        (["model.py", "-s", "ring", "-w", "two"], "'two' is not a valid integer"),
        (["model.py", "-s", "rings", "-w", "2"], "'rings' is not one of"),
        (["model.py", "-w", "2"], "Missing option '-s' / '--strategy'"),
        (["model.py", "-s", "ring", "-w", "2", "--backend", "onnx"], "'onnx' is not one of"),
        (["model.py", "-s", "ring", "-w", "2", "--backend", "tensorrt"], "no tensorrt backend"),
        (["model.py", "-s", "ring", "-w", "2", "--compute-capability", "9.0"], "can target 7.5"),
        (["model.py", "-s", "ring", "-w", "2", "--rtol", "7"], "--rtol 7.0"),
        (["model.py", "-s", "ring", "-w", "2", "--wordl", "3"], "--wordl"),
        (["inspct", "-s", "ring", "-w", "2"], "there is no file inspct"),
        (["model.py", "-s", "ring", "-w", "2", "--config", "absent.toml"], "absent.toml"),
        (["presets", "flux.1-dv"], "there is no preset 'flux.1-dv'"),
        (["flux.1-dv", "--tiny"], "there is no file flux.1-dv"),
        (["wan2.1-14b", "--tiny", "--world", "0"], "--world 0"),
        (["model.py", "--world", "2"], "Missing option '-s' / '--strategy'"),
        (
            ["model.py", "-s", "ring", "-w", "2", "--tiny"],
            "--tiny and --resolution are for",
        ),
        ([".", "-s", "ring", "-w", "2"], ". is a folder"),
        (["pkg.absent", "-s", "ring", "-w", "2"], "there is no file pkg.absent"),
        (["model.py", "-s", "ulyses", "-w", "2"], "Did you mean ulysses?"),
        (["model.py", "-s", "ring", "-w", "2", "-p", "fp15"], "Did you mean fp16?"),
        (["flux.1-dev", "--tiny", "--resolution", "1024x1025"], "no resolution '1024x1025'"),
        (["model.py", "-s", "ring", "-w", "2", "--hardware", "h20"], "--hardware h20"),
        (["inspect", "x", "--html", "manifest.json"], "the name of a page ends in .html"),
        (["plan", "flux.1-dev", "--html", "absent/a.html"], "there is no folder"),
        (["run", "x", "--timeout", "nan"], "nan is no finite number"),
        (["run", "x", "--timeout", "1e12"], "not in the range"),
        (["run", "x", "--step-cache", "inf"], "inf is no finite number"),
        (["model.py", "-s", "ring", "-w", "2", "--max-loss", "nan"], "nan is no finite number"),
        (["model.py", "-s", "ring", "-w", "2", "--dynamic", "n=a:b:"], "--dynamic n=a:b:: it is"),
    ],
)
def test_usage_errors_exit_2_with_one_message(
    cp_convert: Run, model_file: Write, args: list[str], message: str
) -> None:
    model_file()
    result = cp_convert(*args)
    assert result.code == 2
    assert message in result.err
    assert "Traceback" not in result.err
    assert result.out == ""
    document = json.loads(cp_convert(*args, "--json").out)
    assert document["exit_code"] == 2
    assert message in document["error"]["message"]


@pytest.mark.parametrize("name", ["notes.txt", "a.safetensors", "a.ipynb", "a.onnx"])
def test_other_files_are_no_models(cp_convert: Run, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    result = cp_convert(name, "-s", "ring", "-w", "2")
    assert result.code == 2
    assert f"{name} is neither a Python file" in result.err


def test_a_config_file_has_numbers_for_numbers() -> None:
    command = convert.command
    values = {"rtol": 0.01, "max-loss": 1}
    assert config.defaults(command, values, "job.toml") == {"rtol": 0.01, "max_loss": 1}


@pytest.mark.parametrize(
    "line",
    ['world = "8"', "world = 2.5", "world = true", 'force = "false"', 'strategy = ["ring"]',
     "freeze = 'x'", "freeze = [1]", 'rtol = "small"', "memory = []", "[convert]"],
)  # fmt: skip
def test_a_config_file_says_what_toml_can_say(
    cp_convert: Run, model_file: Write, tmp_path: Path, line: str
) -> None:
    model_file()
    (tmp_path / "job.toml").write_text(line)
    result = cp_convert("model.py", "--config", "job.toml")
    assert result.code == 2
    assert "--config job.toml" in result.err
    assert line.split(" =")[0].strip("[]") in result.err


def test_a_module_can_be_named(cp_convert: Run, model_file: Write, tmp_path: Path) -> None:
    (tmp_path / "nets_of_test").mkdir()
    model_file(("def build_model", "def x")).rename(tmp_path / "nets_of_test" / "net.py")
    result = cp_convert("nets_of_test.net", "-s", "ring", "-w", "2")
    assert "does not define build_model" in result.err


def test_others_stay_aside(cp_convert: Run, model_file: Write) -> None:
    """Warnings are for -v; what native code prints never gets between JSON's lines."""
    noise = """
    import logging, os, warnings
    warnings.showwarning = lambda *_, **__: os.write(2, b"old ")
    warnings.warn("old")
    logging.getLogger("lib").addHandler(logging.StreamHandler())
    logging.getLogger("lib").warning("loud")
    os.write(1, b"raw ")
    return 1
"""
    model_file(("    torch.manual_seed(0)\n    return Model()\n", noise))
    args = ("model.py", "-s", "ring", "-w", 2, "--json")
    result = cp_convert(*args)
    assert json.loads(result.out)["exit_code"] == 2
    assert "raw" in result.err
    assert "old" not in result.err
    assert "loud" not in result.err
    result = cp_convert(*args, "-v")
    assert "old" in result.err
    assert "loud" in result.err


def test_hints_say_what_to_try(cp_convert: Run, model_file: Write) -> None:
    model_file()
    assert "did you mean `cp-convert inspect`?" in cp_convert("inspct", "-s", "ring", "-w", 2).err
    assert (
        "pip install 'cp-convert[tensorrt]'"
        in cp_convert("model.py", "-s", "ring", "-w", 2, "--backend", "tensorrt").err
    )
    assert (
        "need --backend tensorrt"
        in cp_convert("model.py", "-s", "ring", "-w", 2, "--compute-capability", "9.0").err
    )


@pytest.mark.parametrize(
    ("change", "args", "code", "message"),
    [
        (("def build_model", "def x"), [], 2, "does not define build_model"),
        (("(1, 16, 8)", "(1, 16, 9)"), [], 3, "shapes cannot be multiplied"),
        (('{"x":', '{"y":'), [], 3, "example_inputs() does not fit Model.forward"),
        (("", ""), ["-w", 17], 3, "16 tokens along dimension 1 are fewer than the 17 ranks"),
        (("", ""), ["-s", "ulysses", "-w", 8], 3, "4 heads are fewer than the 8 ranks"),
        (("", ""), ["--freeze", "mask"], 2, "cannot freeze mask"),
        (("", ""), ["--rtol", "1e-12"], 4, "went astray"),
        (("8 * q, k, v)", "q, k, 0 * v)"), [], 4, "nothing was proven"),
        (("", ""), ["--weights", "absent.safetensors"], 2, "there is no absent.safetensors"),
    ],
)
def test_a_conversion_that_fails_says_why_and_writes_nothing(  # type: ignore[no-untyped-def]
    cp_convert: Run, model_file: Write, tmp_path: Path, change, args, code: int, message: str
) -> None:
    model_file(change)
    result = cp_convert("model.py", "-s", "ring", "-w", 2, *args)
    assert result.code == code, result.err
    assert message in result.err
    assert "Traceback" not in result.err
    assert [p.name for p in tmp_path.iterdir() if p.name != "__pycache__"] == ["model.py"]


def test_errors_come_alone(cp_convert: Run, model_file: Write) -> None:
    """torch.export logs and prints a page before it raises; a user sees one message."""
    model_file(("        q, k, v =", "        x = -x if x.sum() > 0 else x\n        q, k, v ="))
    result = cp_convert("model.py", "-s", "ring", "-w", 2, "--json", "-q")
    assert len(result.err.splitlines()) == 3, result.err
    error = json.loads(result.out)["error"]
    assert "decides by the value of a tensor" in error["message"]
    assert error["where"].endswith("model.py:18")


def test_what_the_model_prints_is_not_the_document(cp_convert: Run, model_file: Write) -> None:
    model_file(("    torch.manual_seed(0)\n", "    print('building')\n"))
    result = cp_convert("model.py", "-s", "ring", "-w", 17, "--json")
    assert json.loads(result.out)["exit_code"] == 3
    assert "building" in result.err


def test_twice_verbose_shows_the_traceback(cp_convert: Run, model_file: Write) -> None:
    model_file(("def build_model", "def x"))
    assert "Traceback" in cp_convert("model.py", "-s", "ring", "-w", 2, "-vv").err


def test_a_config_file_gives_defaults_and_flags_win(
    cp_convert: Run, model_file: Write, tmp_path: Path
) -> None:
    model_file()
    config = tmp_path / "job.toml"
    config.write_text('strategy = "ulysses"\nworld = 8\ncompute-capability = ["9.0"]\n')
    result = cp_convert("model.py", "--config", config)
    assert "9.0" in result.err, "the list in the file was taken"
    config.write_text('strategy = "ulysses"\nworld = 8\nno-proof = true\n')
    assert "4 heads are fewer than the 8 ranks" in cp_convert("model.py", "--config", config).err
    assert "16 tokens" in cp_convert("model.py", "--config", config, "--world", 17).err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("wrld = 2", "no option 'wrld'"),
        ("world =", "not valid TOML"),
        ("[x]\ny=1", "no option 'x'"),
    ],
)
def test_a_config_file_with_a_mistake_is_refused(
    cp_convert: Run, model_file: Write, tmp_path: Path, text: str, message: str
) -> None:
    model_file()
    (tmp_path / "job.toml").write_text(text)
    result = cp_convert("model.py", "-s", "ring", "-w", 2, "--config", "job.toml")
    assert result.code == 2
    assert message in result.err


def test_an_existing_bundle_is_not_touched_without_force(
    cp_convert: Run, model_file: Write, tmp_path: Path
) -> None:
    model_file()
    out = written(tmp_path / "model-ring-w2")
    result = cp_convert("model.py", "-s", "ring", "-w", 2)
    assert result.code == 2
    assert "already holds a bundle" in result.err
    assert cp_convert("verify", out).code == 0


def test_sigterm_leaves_nothing(model_file: Write, tmp_path: Path) -> None:
    """Stopped while it works: no bundle, no half of one."""
    model_file(
        (
            "def build_model():",
            "def build_model():\n    import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        )
    )
    done = subprocess.run(
        [sys.executable, "-m", "cp_convert", "model.py", "-s", "ring", "-w", "2"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 130
    assert "nothing was written" in done.stderr
    assert [p.name for p in tmp_path.iterdir() if p.name != "__pycache__"] == ["model.py"]


# --- presets --------------------------------------------------------------------------------------


def test_presets_are_listed_and_printed(cp_convert: Run, tmp_path: Path) -> None:
    listed = cp_convert("presets")
    assert "flux.1-dev" in listed.out
    assert "75,600" in listed.out
    told = json.loads(cp_convert("presets", "--json").out)
    assert told["wan2.1-14b"]["config"]["num_layers"] == 40
    (tmp_path / "mine.toml").write_text(cp_convert("presets", "flux.1-dev").out)
    assert json.loads(cp_convert("presets", "--json", "flux.1-dev").out) == told["flux.1-dev"]


@pytest.mark.parametrize(
    ("given", "left"),
    [({}, ("cfg", "tp")), ({"tp": 1}, ("cfg",)), ({"cfg": 2, "tp": 2}, ()),
     ({"mesh": "cfg=2"}, ("tp",)), ({"mesh": "cp=8"}, ())],
)  # fmt: skip
def test_auto_decides_the_axes_that_nobody_named(
    given: dict[str, Any], left: tuple[str, ...]
) -> None:
    options = {"mesh": None, "cfg": None, "tp": None, "world": 8, **given}
    mesh.taken(options)
    assert options["open_axes"] == left
