"""`cumempool demo`: says loudly what it runs on, shows what happened, and exits accordingly."""

from __future__ import annotations

import importlib.metadata
import io
import re

import pytest
import torch
from click.testing import CliRunner
from conftest import MIB, RunPython
from rich.console import Console
from simulated_cuda import SimulatedCuda

from cumempool import Availability, CuMemConfig, __version__
from cumempool.tools import demo as demo_module
from cumempool.tools.cli import main

without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the demo would use the GPU")


def assert_shows_everything(text: str) -> None:
    for row in ("sleep", "wake_up"):
        assert re.search(rf"{row} +│ weights +│ +8\.00 MiB +│ +8\.00 MiB", text), text
    assert re.search(r"sleep +│ kv_cache +│ +8\.00 MiB +│ +-", text), text
    assert "GB/s" in text
    assert "16.00 MiB awake, 0 bytes asleep: 16.00 MiB given back" in text
    assert "Results after waking: bit-equal." in text
    assert re.search(r"Addresses of \d+ tensors: unchanged\.", text)


@without_gpu
def test_without_a_gpu_the_first_line_says_so_loudly(run_python: RunPython) -> None:
    done = run_python("", "-m", "cumempool", "demo", "--driver", "auto", "--mib", "8")
    assert (done.code, done.err) == (0, "")
    first, second = done.out.splitlines()[:2]
    assert "Driver: host. NO GPU IS USED" in first
    assert "why not cuda" in second
    assert_shows_everything(done.out)


def test_the_host_driver_can_be_asked_for() -> None:
    result = CliRunner().invoke(main, ["demo", "--driver", "host", "--mib", "8"])
    assert result.exit_code == 0, result.output
    assert result.output.startswith("Driver: host")
    assert_shows_everything(result.output)


@pytest.mark.parametrize("driver", ["auto", "cuda"])
def test_on_a_gpu_torch_allocates_in_the_scope_and_the_device_counts_its_memory(
    monkeypatch: pytest.MonkeyPatch, driver: str
) -> None:
    cuda = SimulatedCuda(monkeypatch)
    text = io.StringIO()
    with cuda.tensors(monkeypatch):
        assert demo_module.run_demo(driver, 8 * MIB, Console(file=text, width=200))
    assert text.getvalue().startswith("Driver: cuda. Memory is device memory of a simulated GPU.\n")
    assert_shows_everything(text.getvalue())
    assert any(event.startswith("beginAllocate") for event in cuda.events)


@without_gpu
def test_cuda_asked_for_and_missing_is_an_error_with_the_reason() -> None:
    result = CliRunner().invoke(main, ["demo", "--driver", "cuda"])
    assert result.exit_code == 1
    assert "Error:" in result.output
    assert "Traceback" not in result.output
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_the_exit_status_is_1_where_a_result_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module._Model, "compute", lambda self: torch.rand(3))
    result = CliRunner().invoke(main, ["demo", "--driver", "host", "--mib", "8"])
    assert result.exit_code == 1
    assert "DIFFERENT" in result.output


@pytest.mark.parametrize("arguments", [["--driver", "rocm"], ["--mib", "0"], ["--mib", "many"]])
def test_bad_options_are_usage_errors(arguments: list[str]) -> None:
    result = CliRunner().invoke(main, ["demo", *arguments])
    assert result.exit_code == 2
    assert arguments[0] in result.output


def test_more_than_the_device_has_is_an_error_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        demo_module, "_choose_driver", lambda wanted, console: small_configuration()
    )
    result = CliRunner().invoke(main, ["demo", "--driver", "host", "--mib", "64"])
    assert result.exit_code == 1
    assert "CUDA_ERROR_OUT_OF_MEMORY" in result.output


def test_on_a_gpu_the_first_line_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_module, "probe", lambda driver: Availability(True, "", "", driver))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H999")
    output = io.StringIO()
    for wanted in ("cuda", "auto"):
        config = demo_module._choose_driver(wanted, Console(file=output, width=120))
        assert config.driver == "cuda"
    assert output.getvalue().count("device memory of NVIDIA H999") == 2
    assert "NO GPU" not in output.getvalue()


def test_memory_in_use_on_a_gpu_is_what_its_driver_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Allocator:
        config = CuMemConfig(driver="cuda")

    order: list[str] = []

    def count() -> tuple[int, int]:
        order.append("count")
        return 30, 100

    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", count)
    assert demo_module._memory_used(Allocator()) == 70  # type: ignore[arg-type]
    assert order == ["synchronize", "count"]


def small_configuration() -> object:
    return demo_module.CuMemConfig(driver="host", host_driver_bytes=8 << 20)


def test_version_is_that_of_the_package_and_of_the_library(run_python: RunPython) -> None:
    from cumempool import _core

    assert _core.version() == __version__
    try:
        installed = importlib.metadata.version("cumempool")
    except importlib.metadata.PackageNotFoundError:
        installed = __version__  # run from a tree that is not installed
    assert installed == __version__
    done = run_python("", "-m", "cumempool", "--help")
    assert (done.code, done.err) == (0, "")
    assert "demo" in done.out
