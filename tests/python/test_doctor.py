"""`cumempool doctor`: what each check says of good and of bad machines, and the exit code."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from simulated_cuda import SimulatedCuda

import cumempool
from cumempool import CuMemAllocator
from cumempool.errors import OutOfMemoryError
from cumempool.probe import Availability, DeviceProbe, TorchProbe
from cumempool.tools import doctor, machine
from cumempool.tools.cli import main
from cumempool.tools.doctor import Check

H200 = DeviceProbe(
    ordinal=0,
    name="NVIDIA H200",
    compute_capability="9.0",
    usable=True,
    reason="",
    virtual_memory=True,
    handle_types=("posix_fd",),
    handle_types_claimed=("posix_fd", "fabric"),
    rdma=True,
    rdma_claimed=True,
    granularity=2 * 1024**2,
    free_bytes=140 * 1024**3,
    total_bytes=141 * 1024**3,
    fence="host registration",
    pins_host_memory=True,
)
TORCH = TorchProbe("2.13.0", "cuda", True, "")
GOOD = Availability(True, "", "", "cuda", "13.0", (H200,), TORCH)


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def only(checks: Any) -> Check:
    (check,) = checks
    assert isinstance(check, Check)
    return check


# ---- installation and devices ----------------------------------------------------------------


def test_a_good_device_passes_with_its_figures() -> None:
    checks = list(doctor._device(H200, "cuda"))
    assert [check.status for check in checks] == ["PASS", "PASS", "PASS", "PASS"]
    assert "NVIDIA H200, compute capability 9.0, 140.00 GiB free of 141.00 GiB" in checks[0].value


def test_a_device_that_cannot_be_used_fails_with_the_reason() -> None:
    check = only(doctor._device(replace(H200, usable=False, reason="no room"), "cuda"))
    assert (check.status, check.reason) == ("FAIL", "no room")
    assert check.fix


@pytest.mark.parametrize(
    ("fence", "pinned", "status", "said"),
    [
        ("allocation", True, "PASS", ""),
        ("allocation", False, "WARN", "pins no host memory"),
        ("context synchronisation", True, "WARN", "while a stream captures"),
    ],
)
def test_how_a_device_is_waited_for(fence: Any, pinned: bool, status: str, said: str) -> None:
    check = doctor._fence(replace(H200, fence=fence, pins_host_memory=pinned), "device 0")
    assert (check.name, check.status) == ("device 0: fence", status)
    assert check.value.startswith(fence)
    assert said in check.reason
    assert bool(check.fix) == (status == "WARN")


def test_memory_that_cannot_be_exported_is_a_warning() -> None:
    check = doctor._handles(replace(H200, handle_types=()), "device 0")
    assert check.status == "WARN"
    assert "cannot be shared" in check.reason


@pytest.mark.parametrize(("channels", "status"), [((), "PASS"), (("channel0",), "WARN")])
def test_refused_fabric_handles_matter_where_there_are_channels(
    monkeypatch: pytest.MonkeyPatch, channels: tuple[str, ...], status: str
) -> None:
    monkeypatch.setattr(machine, "imex_channels", lambda: channels)
    assert doctor._handles(H200, "device 0").status == status


def test_refused_rdma_is_a_warning_where_it_was_claimed() -> None:
    assert doctor._rdma(replace(H200, rdma=False), "device 0").status == "WARN"
    absent = replace(H200, rdma=False, rdma_claimed=False)
    assert doctor._rdma(absent, "device 0").status == "PASS"


@pytest.mark.parametrize(
    ("torch_probe", "driver", "status", "said"),
    [
        (TORCH, "cuda", "PASS", ""),
        (replace(TORCH, build="cpu"), "cuda", "FAIL", "built for cpu"),
        (replace(TORCH, build="cpu"), "host", "PASS", ""),
        (TorchProbe("", "none", None, "torch is not installed"), "host", "FAIL", "not installed"),
    ],
)
def test_torch(torch_probe: TorchProbe, driver: str, status: str, said: str) -> None:
    check = doctor._torch_build(replace(GOOD, torch=torch_probe, driver=driver))
    assert check.status == status
    assert said in check.reason
    assert bool(check.fix) == (status == "FAIL")


@pytest.mark.parametrize(("routes", "status"), [(True, "PASS"), (False, "FAIL"), (None, "FAIL")])
def test_routing(routes: bool | None, status: str) -> None:
    torch_probe = TorchProbe("2.13.0", "cuda", routes, "" if routes else "for a reason")
    check = doctor._routing(replace(GOOD, torch=torch_probe))
    assert check.status == status
    assert check.reason == torch_probe.reason


# ---- a sleep and a wake ------------------------------------------------------------------------


def test_the_round_trip_is_tried_and_leaves_nothing() -> None:
    check = doctor._round_trip(replace(GOOD, driver="host"))
    assert check.status == "PASS", check
    assert "64.00 MiB equal" in check.value
    assert "not copied again" in check.value


def test_contents_that_differ_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "equal", lambda *_: False)
    assert doctor._round_trip(replace(GOOD, driver="host")).status == "FAIL"


def test_a_round_trip_that_raises_fails_with_the_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: object) -> Check:
        raise OutOfMemoryError("the device is full", advice="free some")

    monkeypatch.setattr(doctor, "_try_cycles", refuse)
    check = doctor._round_trip(replace(GOOD, driver="host"))
    assert (check.name, check.status, check.fix) == ("sleep and wake", "FAIL", "free some")
    assert "the device is full" in check.reason


# ---- settings ----------------------------------------------------------------------------------


def test_torch_without_its_cache_fails() -> None:
    assert doctor._caching({}).status == "PASS"
    check = doctor._caching({"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    assert check.status == "FAIL"
    assert check.fix == "unset PYTORCH_NO_CUDA_MEMORY_CACHING"


def test_expandable_segments_are_a_warning_that_names_their_source() -> None:
    assert doctor._expandable({}).status == "PASS"
    check = doctor._expandable({"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"})
    assert check.status == "WARN"
    assert "PYTORCH_CUDA_ALLOC_CONF" in check.value
    assert "IBV_WC_REM_ACCESS_ERR" in check.reason


# ---- host --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("available", "status"), [(70 * 1024**3, "WARN"), (71 * 1024**3, "PASS")])
def test_host_memory_is_measured_against_half_a_device(
    monkeypatch: pytest.MonkeyPatch, available: int, status: str
) -> None:
    monkeypatch.setattr(machine, "host_room", lambda: (available, 2**40, "/job/memory.max"))
    check = doctor._host_memory(GOOD)
    assert check.status == status
    assert check.value.endswith("GiB of 1.00 TiB available (/job/memory.max)")


@pytest.mark.parametrize(
    ("name", "value", "check", "status"),
    [
        ("transparent_huge_pages", "madvise", doctor._huge_pages, "PASS"),
        ("transparent_huge_pages", "never", doctor._huge_pages, "WARN"),
        ("transparent_huge_pages", "", doctor._huge_pages, "WARN"),
        ("address_space_limit", None, doctor._address_space, "PASS"),
        ("address_space_limit", 2**40, doctor._address_space, "FAIL"),
        ("map_limit", 65530, doctor._mappings, "PASS"),
        ("map_limit", 0, doctor._mappings, "PASS"),
        ("map_limit", 1000, doctor._mappings, "WARN"),
        ("file_limit", None, doctor._files, "PASS"),
        ("file_limit", 256, doctor._files, "WARN"),
    ],
)
def test_limits_of_the_host(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object, check: Any, status: str
) -> None:
    monkeypatch.setattr(machine, name, lambda: value)
    found = check()
    assert found.status == status
    assert bool(found.reason and found.fix) == (status != "PASS")


def test_host_memory_is_what_a_sleep_measures() -> None:
    available, limit, source = machine.host_room()
    assert 0 < available <= limit
    assert source == "/proc/meminfo" or "/memory." in source
    assert 0 < machine.host_memory() <= limit


def test_the_mode_of_huge_pages_is_the_one_in_brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_read", lambda _: "always [madvise] never")
    assert machine.transparent_huge_pages() == "madvise"
    monkeypatch.setattr(machine, "_read", lambda _: "")
    assert machine.transparent_huge_pages() == ""


def test_limits_come_from_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (77, resource.RLIM_INFINITY))
    assert machine.address_space_limit() == machine.file_limit() == 77
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY,) * 2)
    assert machine.address_space_limit() is machine.file_limit() is None


def test_what_is_not_there_reads_as_nothing(tmp_path: Path) -> None:
    assert machine._read(str(tmp_path / "missing")) == ""
    assert machine.imex_channels() == () or all(machine.imex_channels())
    assert isinstance(machine.peer_memory_module(), bool)


# ---- the command -------------------------------------------------------------------------------


def test_on_a_machine_without_a_gpu_it_fails_with_reasons() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch is built for CUDA, and there may be a GPU")
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 1
    assert "FAIL" in result.output
    assert "built for cpu" in result.output.replace("\n", " ")
    assert "fix:" in result.output
    assert "\x1b[" not in result.output, "plain where it is piped"


def test_the_host_driver_passes() -> None:
    result = CliRunner().invoke(main, ["doctor", "--driver", "host", "--json"])
    record = json.loads(result.output)
    checks = by_name([Check(**check) for check in record["checks"]])
    assert checks["sleep and wake"].status == "PASS"
    assert checks["routing"].status == "PASS"
    failed = [check for check in checks.values() if check.status == "FAIL"]
    assert record["passed"] == (not failed)
    assert result.exit_code == (1 if failed else 0)


def test_an_extension_that_is_missing_is_the_first_thing_it_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "cumempool._core", None)
    monkeypatch.delattr(cumempool, "_core", raising=False)
    monkeypatch.setattr(doctor, "find_spec", lambda name: None if "_core" in name else object())
    checks = by_name(doctor.examine("host"))
    assert checks["package"].status == "FAIL"
    assert "cannot be loaded" in checks["package"].reason
    assert not doctor.passed(list(checks.values()))


# ---- on cuda, which is simulated ---------------------------------------------------------------


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedCuda]:
    cuda = SimulatedCuda(monkeypatch, mib=256)
    with cuda.tensors(monkeypatch):
        yield cuda


def test_cuda_is_started_so_that_the_routing_can_be_tried(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[bool] = []
    monkeypatch.setattr(torch.cuda, "init", lambda: started.append(True))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: bool(started))
    checks = by_name(doctor.examine("cuda"))
    assert started[0]
    assert checks["routing"].status == "PASS"
    assert checks["driver cuda"].value.endswith("2 devices")
    assert (checks["sleep and wake"].status, checks["sleep and wake"].reason) == ("PASS", "")
    assert not cuda.segments


def test_a_torch_that_allocates_elsewhere_fails(
    cuda: SimulatedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "tensor", lambda like: like)
    checks = doctor.examine("cuda")
    assert [check.name for check in checks if check.status == "FAIL"] == ["routing"]
    check = by_name(checks)["routing"]
    assert "allocated elsewhere" in check.reason
    assert "torch 2.6" in check.fix
    assert "sleep and wake" not in by_name(checks)


def test_unchanged_contents_that_are_copied_again_are_a_warning(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sleep = CuMemAllocator.sleep

    def without_retained_backup(self: CuMemAllocator, **named: Any) -> object:
        self.release_host_memory()
        return sleep(self, **named)

    monkeypatch.setattr(CuMemAllocator, "sleep", without_retained_backup)
    check = by_name(doctor.examine("host"))["sleep and wake"]
    assert (check.status, check.reason) == ("WARN", "unchanged contents were copied again")
    assert check.value.startswith("64.00 MiB equal")


@pytest.mark.parametrize("command", ["doctor", "selftest", "bench", "demo"])
@pytest.mark.parametrize(("variable", "option"), [("host", None), ("rocm", "host"), ("", "host")])
def test_the_variable_of_the_driver_holds_for_every_command(
    command: str, variable: str, option: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def note(driver: object, *rest: object, **named: object) -> list[object]:
        asked.append(getattr(driver, "driver", driver))
        return []

    for function in ("doctor.examine", "selftest.run_selftest", "bench.run_bench", "demo.run_demo"):
        monkeypatch.setattr(f"cumempool.tools.{function}", note)
    monkeypatch.setenv("CUMEMPOOL_DRIVER", variable)
    arguments = [] if option is None else ["--driver", option]
    CliRunner().invoke(main, [command, *arguments])
    assert asked == ["host"]


def test_an_empty_variable_of_the_driver_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUMEMPOOL_DRIVER", "")
    asked: list[object] = []
    monkeypatch.setattr(doctor, "examine", lambda driver: asked.append(driver) or [])
    CliRunner().invoke(main, ["doctor"])
    assert asked == ["cuda"]


def test_a_wrong_variable_of_the_driver_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUMEMPOOL_DRIVER", "rocm")
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 2
    assert "'rocm'" in result.output
    assert "CUMEMPOOL_DRIVER" in result.output
