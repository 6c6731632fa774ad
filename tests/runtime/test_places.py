"""A process takes its place from whoever launched it."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cp_convert.errors import UsageError
from cp_convert.runtime.places import Place, place_of
from tests.conftest import MODEL_FILE
from tests.runtime.bundles import converted

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
MET = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
MPIRUN = {
    "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}  # fmt: skip
MPICH = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.fixture(autouse=True)
def nobody_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in NAMES})


@pytest.mark.parametrize("told", [TORCHRUN, MPIRUN, SRUN, MPICH])
def test_every_launcher_tells_the_same(told: dict[str, str]) -> None:
    os.environ.update({**told, **MET})
    assert place_of(4) == Place(rank=3, world=4, local=1, local_world=2)
    assert (os.environ["RANK"], os.environ["WORLD_SIZE"]) == ("3", "4")
    with pytest.raises(UsageError, match="started 4 ranks; the bundle has 8"):
        place_of(8)


@pytest.mark.parametrize(("nodes", "node", "local"), [("4(x2),3", 2, 3), ("1,2", 0, 1)])
def test_nodes_of_slurm_differ(nodes: str, node: int, local: int) -> None:
    os.environ.update(
        {**SRUN, **MET, "SLURM_STEP_TASKS_PER_NODE": nodes, "SLURM_NODEID": str(node)}
    )
    place = place_of(4)
    assert place is not None
    assert place.local_world == local


def test_where_nobody_waits_and_where_nobody_can_be_found() -> None:
    assert place_of(4) is None
    os.environ.update(SRUN)
    with pytest.raises(UsageError, match="srun does not say where rank 0 is"):
        place_of(4)
    os.environ.update({**SRUN, "SLURM_STEP_NUM_TASKS": "1"})
    assert place_of(4) is None


def test_two_processes_of_another_launcher_are_two_ranks(tmp_path: Path) -> None:
    (tmp_path / "model.py").write_text(MODEL_FILE)
    converted(tmp_path / "model.py", tmp_path / "out", "ulysses", 2)
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2",
        "--master-port", str(port), "-m", "cp_convert", "run", str(tmp_path / "out"),
        "--json", "--executor", "torch", "--devices", "cpu", "--repeat", "3", "--profile",
        "--outputs", str(tmp_path / "outputs.safetensors"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)  # of rank 0 alone
    assert [one["rank"] for one in document["ranks"]] == [0, 1]
    assert document["check"]["error"] <= document["check"]["bound"]
    forward = document["forward"]
    assert len(forward["seconds"]) == 3
    assert forward["minimum"] <= forward["median"] <= max(forward["seconds"])
    assert all(0 < one["collectives"] < 1 and one["peak"] > 0 for one in document["ranks"])
    assert all(one["first"] > 0 and one["apart"] == [0, 0] for one in document["ranks"])
    assert (tmp_path / "outputs.safetensors").is_file()
