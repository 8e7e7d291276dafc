"""`probe` and `is_available`: every no has a reason and a hint, and nothing ever raises."""

from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from conftest import GRANULE, MIB, RunPython

import cumempool
from cumempool import CuMemAllocator, CuMemConfig, UnavailableError, is_available, probe
from cumempool import probe as probe_function

without_gpu = pytest.mark.skipif(
    torch.cuda.is_available(), reason="checks what happens without a GPU"
)


def test_the_host_driver_is_available_and_described() -> None:
    found = probe(driver="host")
    assert found.ok
    assert bool(found)
    assert (found.reason, found.hint, found.driver) == ("", "", "host")
    (device,) = found.devices
    assert device.usable
    assert device.virtual_memory
    assert (device.ordinal, device.reason) == (0, "")
    assert device.handle_types == device.handle_types_claimed == ("posix_fd",)
    assert not device.rdma
    assert device.granularity == GRANULE
    assert device.free_bytes == device.total_bytes == CuMemConfig().host_driver_bytes
    assert device.name
    assert found.torch.version == torch.__version__
    assert found.torch.build in {"cpu", "cuda", "rocm"}


def test_the_sizes_of_a_configuration_count() -> None:
    config = CuMemConfig(driver="host", host_driver_devices=3, host_driver_bytes=8 * MIB)
    for found in (probe(config), probe(config, driver="host")):
        assert [device.ordinal for device in found.devices] == [0, 1, 2]
        assert {device.total_bytes for device in found.devices} == {8 * MIB}


def test_the_argument_overrules_the_driver_and_keeps_the_sizes() -> None:
    config = CuMemConfig(driver="cuda", host_driver_devices=2)
    found = probe(config, driver="host")
    assert (found.driver, len(found.devices)) == ("host", 2)


@without_gpu
def test_without_a_gpu_cuda_says_why_not_and_what_to_do() -> None:
    found = probe()
    assert not found.ok
    assert not found
    assert (found.driver, found.devices) == ("cuda", ())
    assert found.reason
    assert found.hint
    assert found.hint not in found.reason
    assert not is_available()
    with pytest.raises(UnavailableError) as caught:
        CuMemAllocator(CuMemConfig(driver="cuda"))
    assert found.reason in str(caught.value)
    assert caught.value.advice == found.hint


@without_gpu
def test_asking_for_sleep_mode_without_a_gpu_is_a_value_error_with_the_reason() -> None:
    with pytest.raises(ValueError, match="not supported here with driver='cuda'") as caught:
        CuMemConfig(enable_sleep_mode=True, driver="cuda").verify()
    assert probe(driver="cuda").reason in str(caught.value)
    CuMemConfig(enable_sleep_mode=True, driver="host").verify()


def test_is_available_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUMEMPOOL_DRIVER", "host")
    assert is_available()
    assert probe().driver == "host"
    monkeypatch.setenv("CUMEMPOOL_DRIVER", "rocm")
    found = probe()
    assert not found.ok
    assert "CUMEMPOOL_DRIVER" in found.reason
    assert found.hint


@pytest.mark.parametrize("driver", ["rocm", "", 3, [], True, "\ud800"], ids=ascii)
def test_bad_drivers_do_not_raise(driver: Any) -> None:
    found = probe(driver=driver)
    assert isinstance(found.driver, str)
    assert found.reason or found.ok
    assert bool(found.hint) is not found.ok
    assert is_available(driver) is found.ok


@pytest.mark.parametrize("config", [3, "host", {"driver": "host"}], ids=repr)
def test_bad_configurations_do_not_raise(config: Any) -> None:
    found = probe(config)
    assert not found.ok
    assert "CuMemConfig" in found.reason
    assert found.hint


def test_a_device_too_small_for_a_granule_is_a_no_with_a_reason() -> None:
    found = probe(CuMemConfig(driver="host", host_driver_bytes=1))
    assert not found.ok
    assert "host_driver_bytes=1" in found.reason


def test_findings_are_immutable_and_become_json() -> None:
    found = probe(driver="host")
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["ok"] is True
    assert plain["devices"][0]["granularity"] == GRANULE
    assert plain["torch"]["version"] == torch.__version__
    with pytest.raises(FrozenInstanceError):
        found.ok = False  # type: ignore[misc]


def test_the_name_stays_a_function_where_the_module_has_the_same() -> None:
    assert cumempool.probe is probe_function
    assert callable(cumempool.probe)


def test_probing_takes_no_memory_and_can_be_repeated() -> None:
    config = CuMemConfig(driver="host", host_driver_bytes=GRANULE)
    assert all(probe(config).ok for _ in range(20))


def test_probing_without_torch_says_what_is_missing(run_python: RunPython) -> None:
    code = """
import importlib.metadata
real = importlib.metadata.version
def version(name):
    if name == "torch":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.version = version
import cumempool, sys
found = cumempool.probe()
assert not found.ok and "torch" in found.reason and found.hint == "install torch", found
assert found.torch.build == "none" and found.devices[0].usable, found
assert "torch" not in sys.modules
"""
    done = run_python(code)
    assert (done.code, done.out, done.err) == (0, "", "")
