"""scripts/gpu_check.py, as far as a CPU can run it: its own code on tiny shapes, what it reports, how it ends."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from scripts import gpu_check

SCRIPT = str(ROOT / "scripts" / "gpu_check.py")
SMALL = ["--device", "cpu", "--small"]


def check(*args: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, SCRIPT, *args], capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu_check")
    return folder, check("nccl", "environment", "parity", "update", "--out", str(folder), *SMALL)


def test_a_part_that_raises_is_reported_and_the_next_ones_run(done):
    folder, process = done
    assert process.returncode == 1
    found = json.loads((folder / "result.json").read_text())
    assert list(found) == ["nccl", "environment", "parity", "update"]
    assert [bool(part["failed"]) for part in found.values()] == [True, False, False, False], process.stdout
    assert "no GPU is to be seen" in found["nccl"]["failed"] and "\n" not in found["nccl"]["failed"]
    assert "Traceback" not in (folder / "parity.log").read_text()
    assert not list(folder.glob("nccl.json"))


def test_the_table_says_what_the_json_says(done):
    folder, process = done
    found, table = json.loads((folder / "result.json").read_text()), (folder / "table.md").read_text()
    assert table in process.stdout
    assert table.count("\n") == 2 + sum(1 + len(part["found"]) for part in found.values())
    assert f"| environment | torch | {torch.__version__} |" in table
    assert "| nccl | **verdict** | FAILED: " in table and "| parity | **verdict** | ok (" in table
    assert found["parity"]["found"]["gradient of weights against the plain formula"] < 1e-5
    assert found["update"]["found"]["ppo, replica, checkpointing: learnt from"] == "yes"


def test_without_a_gpu_it_ends_with_one_line(tmp_path):
    process = check("--out", str(tmp_path))
    assert process.returncode == 2 and process.stdout == ""
    assert process.stderr == "scripts/gpu_check.py needs an NVIDIA GPU, and torch sees none here\n"


def test_parts_are_listed_and_an_unknown_one_is_named(capsys):
    assert gpu_check.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(gpu_check.PARTS)
    assert sum(limit for _, limit in gpu_check.PARTS.values()) <= 1800, "half an hour"
    with pytest.raises(gpu_check.InputError, match="updat: no such part; there are environment"):
        gpu_check.main(["updat"])


def test_a_part_that_hangs_is_ended_and_says_so(tmp_path):
    part = gpu_check.supervise("environment", SMALL, tmp_path, 0.2)
    assert part["failed"].startswith("not done after 0.2 s") and part["seconds"] < 60


def test_a_number_above_its_limit_or_nan_is_wrong(tmp_path, capsys):
    check = gpu_check.Check(torch.device("cpu"), True, tmp_path, "parity")
    check.within("fine", 1.0, 1.0)
    assert check.wrong == []
    check.within("high", 1.5, 1.0)
    check.within("nothing", float("nan"), 1.0)
    check.must("equal", False)
    assert check.wrong == ["high is 1.5, above 1", "nothing is nan, above 1", "not so: equal"]
    assert set(json.loads((tmp_path / "parity.json").read_text())) == {"fine", "high", "nothing", "equal"}
