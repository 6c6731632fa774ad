import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import msgspec
import pytest

from cp_convert import bundle
from cp_convert.bundle import manifest as m
from cp_convert.errors import DamagedBundle, OutputError


def manifest(folder: Path, world: int = 2) -> m.Manifest:
    """A manifest that describes the engine files in ``folder``."""
    files = [folder / bundle.engine_name(rank) for rank in range(world)]
    error = m.Error(max=1e-7, rms=1e-8)
    return m.Manifest(
        schema_version=7,
        tool=m.Tool(name="cp-convert", version="0"),
        created="2026-01-01T00:00:00+00:00",
        model=m.Model(
            name="x", kind="X", source="x.py", source_sha256="0" * 64, parameters=1, weights=None,
            config=None, matched=[], casts=[],
        ),
        request=m.Request(
            tiny=False, resolution=None, freeze=[], variant=None, batch=None, text=None
        ),
        program=None,
        strategy="ulysses",
        axes={"cp": world},
        groups={},
        guidance=None, tensor=None,
        layout="per-rank",
        weights_mode="embedded",
        weights=[],
        lora=[],
        quantization=None,
        variants=[],
        world=world,
        precision="fp16",
        float32=["residual"],
        backend=m.Backend(
            name="tensorrt-rtx", version="1", compute_capabilities=["8.9"], workarounds=["w: why"]
        ),
        runs_on=m.RunsOn(
            release="1.7.1", nccl="2.28.3", compute_capabilities=["8.9"], doubt=None
        ),
        torch="2",
        torch_tensorrt="2",
        io=[m.Io(name="x", mode="input", dtype="float16", shape=[1, 2])],
        frozen=[m.Frozen(name="flag", value="True", sha256=None)],
        forward=m.Forward(
            arguments=["x"], defaults={"flag": "True"},
            returned=m.Returned(kind="none", name=None, keys=[], items=[])
        ),
        plan_source="model",
        sharding=[
            m.Sharding(
                axis="cp",
                kind="split", operator="x", module="model", source=None, dim=1, tokens=4, local=2,
                segments=[4], padding=0, padding_percent=0.0,
            )
        ],
        plan=[
            m.PlanEntry(
                kind="split", module="", tensor="input x", dim=1, applied=True, reason=None,
                global_size=4,
            )
        ],
        attention=[
            m.Attention(
                module=f"blocks.{i}.attn", source="x.py:1", batch=1, heads=4, kv_heads=4,
                head_dim=8, mask=None, causal=False, padded_heads=0, padded_queries=0,
                padded_keys=0, padding_percent=0.0,
                local_query=2, global_query=4, local_key=2, global_key=4, rewritten=True,
                reason=None, way="one",
            )
            for i in range(3)
        ],
        collectives=[
            m.Collective(kind="all_to_all", layer="ALL_TO_ALL", count=6, bytes_sent=4096)
        ],
        engines=[
            m.Engine(
                rank=r, file=f.name, bytes=f.stat().st_size, sha256=bundle.sha256(f),
                activation_bytes=2**20,
                recalled=False,
            )
            for r, f in enumerate(files)
        ],
        proof=m.Proof(
            status="passed", level="program", device="cpu", reference="dense", against="reference",
                algebra=[error] * world,
            ranks=[error] * world, dense=error, spread=[], bound=error, control=error, controls={},
            network=None,
            seconds=1.0, recalled=False,
        ),
        timings={"trace": 1.0},
        command="cp-convert x.py",
    )  # fmt: skip


def written(out: Path, content: bytes = b"engine") -> Path:
    """A whole bundle; its engines are stand-ins, for nothing here opens them."""
    with bundle.staged(out) as folder:
        for rank in range(2):
            (folder / bundle.engine_name(rank)).write_bytes(content + bytes([rank]))
        bundle.publish(folder, out, manifest(folder), force=True)
    return out


def problems(path: Path) -> dict[str, str]:
    return {c.subject: c.problem for c in bundle.verify(path) if c.problem}


def test_a_bundle_is_written_whole_and_reads_back(tmp_path: Path) -> None:
    out = written(tmp_path / "deep" / "out")
    assert sorted(p.name for p in out.iterdir()) == [
        "manifest.json",
        "rank0.engine",
        "rank1.engine",
    ]
    assert [p.name for p in out.parent.iterdir()] == ["out"]
    assert bundle.read(out) == bundle.read(out / "manifest.json")
    assert problems(out) == {}


def test_a_bundle_is_replaced_whole(tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    written(out, b"other")
    assert (out / "rank0.engine").read_bytes() == b"other\0"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failure_leaves_nothing_and_keeps_what_was_there(tmp_path: Path) -> None:
    out = written(tmp_path / "out")

    def fail_half_way() -> None:
        with bundle.staged(out) as folder:
            (folder / "rank0.engine").write_bytes(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_half_way()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert problems(out) == {}


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="No space left") as caught, bundle.staged(tmp_path / "o"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "rank0.engine")
    assert "disk is full" in (caught.value.hint or "")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"GB free; the engines need about 1000000000\.0 GB"):
        bundle.check_space(tmp_path / "out", 10**18)


def test_what_a_killed_conversion_left_is_swept_away(tmp_path: Path) -> None:
    script = (
        "import os, signal; from pathlib import Path; from cp_convert import bundle\n"
        f"with bundle.staged(Path({str(tmp_path / 'out')!r})) as folder:\n"
        "    (folder / 'rank0.engine').write_bytes(b'half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script], check=False)
    (left,) = tmp_path.glob(".out.partial-*")
    assert left.name.startswith(".out.partial-")
    written(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_what_may_not_be_replaced(tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    with pytest.raises(OutputError, match="already holds a bundle"):
        bundle.check_target(out, force=False)
    bundle.check_target(out, force=True)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(OutputError, match="something other than a bundle"):
        bundle.check_target(tmp_path / "mine", force=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="not a folder"):
        bundle.check_target(tmp_path / "file", force=True)
    (tmp_path / "empty").mkdir()
    bundle.check_target(tmp_path / "empty", force=False)


def test_an_unwritable_folder_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # As root every folder is writable, so the system's answer is stood in for.
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(OutputError, match="is not writable"):
        bundle.check_target(tmp_path / "out", force=False)


def test_every_damage_is_found(tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    (out / "rank0.engine").write_bytes(b"enginf\0")
    (out / "rank1.engine").unlink()
    assert problems(out) == {
        "rank0.engine": "SHA-256 differs from the manifest's",
        "rank1.engine": "missing",
    }
    (out / "rank0.engine").write_bytes(b"longer than before")
    assert problems(out)["rank0.engine"] == "18 bytes, expected 7"


def test_ranks_must_be_complete(tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    document = json.loads((out / "manifest.json").read_text())
    document["engines"].pop()
    (out / "manifest.json").write_text(json.dumps(document))
    assert problems(out) == {"ranks": "lists ranks [0], expected [0, 1]"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world": "2"}, r"Expected `int`, got `str` - at `\$.world`"),
        ({"world": 0}, ">= 1"),
        ({"surprise": 1}, "unknown field `surprise`"),
        ({"schema_version": 1}, "follows schema 1"),
        ({"engines": None}, "engines"),
    ],
)
def test_a_manifest_that_breaks_the_schema_is_refused(
    tmp_path: Path, change: dict[str, object], message: str
) -> None:
    out = written(tmp_path / "out")
    document = {**json.loads((out / "manifest.json").read_text()), **change}
    (out / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(DamagedBundle, match=message):
        bundle.read(out)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(document, json.loads(m.SCHEMA_FILE.read_text()))


def test_what_is_no_bundle_is_told(tmp_path: Path) -> None:
    with pytest.raises(DamagedBundle, match="cannot be read"):
        bundle.read(tmp_path / "absent")
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(DamagedBundle, match="not a valid manifest"):
        bundle.read(tmp_path)


def test_the_published_schema_is_the_structs(tmp_path: Path) -> None:
    published = json.loads(m.SCHEMA_FILE.read_text())
    assert published == m.json_schema(), "run python -m cp_convert.bundle.manifest"
    jsonschema.Draft202012Validator.check_schema(published)
    out = written(tmp_path / "out")
    jsonschema.validate(json.loads((out / "manifest.json").read_text()), published)
    assert m.decode(m.encode(bundle.read(out)[0])) == bundle.read(out)[0]


def test_encoding_is_stable(tmp_path: Path) -> None:
    out = written(tmp_path / "out")
    text = (out / "manifest.json").read_bytes()
    assert text == m.encode(m.decode(text))
    assert text.endswith(b"}\n")
    assert msgspec.json.decode(text)["schema_version"] == 7


@pytest.mark.parametrize(
    ("theirs", "way_out"), [(8, "a later one"), (6, "convert the model again")]
)
def test_another_schema_says_who_reads_it(tmp_path: Path, theirs: int, way_out: str) -> None:
    path = written(tmp_path / "out") / "manifest.json"
    text = path.read_text().replace('"schema_version": 7', f'"schema_version": {theirs}')
    text = text.replace('"version": "0"', '"version": "9.8.7"', 1)
    path.write_text(text.replace('"created"', '"renamed"'))
    with pytest.raises(DamagedBundle, match=f"follows schema {theirs}.*reads schema 7") as caught:
        bundle.read(path)
    assert "cp-convert 9.8.7 wrote it" in str(caught.value.hint)
    assert way_out in str(caught.value.hint)
