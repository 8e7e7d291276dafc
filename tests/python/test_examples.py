"""The examples, small and on the host driver: they run, prove what they say, and fail otherwise."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.extensive

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
NOT_RUN = 77


def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py"), *arguments],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env=environment,
    )


def figures(tmp_path: Path, name: str, *arguments: str) -> dict[str, Any]:
    """Runs an example on the host driver; what it wrote about what it has proven."""
    target = tmp_path / "figures.json"
    done = run(name, "--driver", "host", "--json", str(target), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    return found


def needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the example needs {package}, which is not installed")


def test_a_tensor_parallel_model_sleeps_on_all_ranks(tmp_path: Path) -> None:
    sizes = "--layers 2 --hidden 64 --heads 4 --kv-heads 2 --ffn 128 --vocabulary 512"
    found = figures(tmp_path, "tensor_parallel", *sizes.split(), "--cycles", "2")
    assert found["identical"]
    assert found["refused_on_all"]
    assert [len(rank["cycles"]) for rank in found["ranks"]] == [2, 2]
    for rank in found["ranks"]:
        assert len(set(rank["tokens"])) > 1
        assert all(cycle["asleep_bytes"] == 0 for cycle in rank["cycles"])


def test_a_trainer_and_an_engine_take_turns(tmp_path: Path) -> None:
    sizes = "--layers 2 --hidden 256 --heads 4 --vocabulary 512 --batch 4 --prompt 8 --rollout 8"
    found = figures(tmp_path, "rlhf_loop", *sizes.split())
    assert found["equal_losses"]
    assert found["equal_state"]
    assert len(found["losses"]) == 6
    assert len(set(found["losses"])) > 3
    most = {way: max(found[way]["memory_bytes"].values()) for way in ("all_awake", "in_turns")}
    assert most["in_turns"] < most["all_awake"]


def test_models_are_switched_behind_an_endpoint(tmp_path: Path) -> None:
    needs("transformers", "starlette", "uvicorn")
    sizes = "--layers 2 --hidden 64 --vocabulary 512 --requests 24 --tokens 3"
    found = figures(tmp_path, "model_switch", *sizes.split())
    assert found["identical"]
    assert found["switches"] > 5
    assert found["tied"] == ["qwen2", "gpt2"]
    assert 0 < found["switch_p50_seconds"] <= found["switch_p99_seconds"]
    assert found["most_bytes"] == max(found["model_bytes"].values())


def test_ray_actors_sleep_together(tmp_path: Path) -> None:
    # Not among the packages of the tests: it is larger than all of them but torch.
    needs("ray")
    sizes = "--actors 3 --layers 2 --hidden 64"
    found = figures(tmp_path, "ray_actors", *sizes.split())
    assert found["asleep_bytes"] == 0
    assert found["awake_bytes"] > 0


@pytest.mark.parametrize("name", ["tensor_parallel", "rlhf_loop", "ray_actors"])
def test_without_a_gpu_the_reason_is_told(name: str) -> None:
    done = run(name)
    assert (done.returncode, done.stdout) == (NOT_RUN, "")
    assert done.stderr.startswith("not run: this example needs ")
