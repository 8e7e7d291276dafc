"""`probe` and `is_available`: every no has a reason and a hint, and nothing ever raises."""

from __future__ import annotations

import ctypes
import importlib
import json
from collections.abc import Callable, Sequence
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from conftest import GRANULE, MIB, RunPython
from refusals import refuses
from simulated_cuda import SimulatedCuda

import cumempool
from cumempool import CuMemAllocator, CuMemConfig, UnavailableError, _torch, is_available, probe
from cumempool import probe as probe_function
from cumempool.errors import DriverError

probe_module = importlib.import_module("cumempool.probe")

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
    assert device.fence == "host registration"
    assert device.pins_host_memory
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
    with refuses(UnavailableError, names=("driver='cuda'", "libcuda.so.1"), operation="verify"):
        CuMemConfig(enable_sleep_mode=True, driver="cuda").verify()
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


# ---- what is found on GPUs, with a driver and a torch made for it


class FakeDriver:
    """A driver whose devices are what a test says; an exception is what its probe raises."""

    version = 12_080

    def __init__(self, *devices: dict[str, Any] | Exception) -> None:
        self._devices = devices

    @property
    def device_count(self) -> int:
        return len(self._devices)

    def probe(self, ordinal: int) -> dict[str, Any]:
        found = self._devices[ordinal]
        if isinstance(found, Exception):
            raise found
        return dict(found)


def device(usable: bool = True, reason: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {"name": "a GPU", "usable": usable, "reason": reason}
    found |= {"compute_capability": 90, "virtual_memory": True, "rdma": False}
    found |= {"fence": 1, "pins_host_memory": True}
    found |= {"handle_types": 1, "handle_types_claimed": 9, "rdma_claimed": True}
    return found | {"granularity": GRANULE, "free_bytes": GRANULE, "total_bytes": 2 * GRANULE}


FindOnGpu = Callable[..., cumempool.Availability]


@pytest.fixture
def find(monkeypatch: pytest.MonkeyPatch) -> FindOnGpu:
    """Probes a `cuda` driver that is made up, with a torch that is."""

    def find(
        *devices: dict[str, Any] | Exception,
        build: str = "cuda",
        initialized: bool = True,
        routes: bool | Exception = True,
    ) -> cumempool.Availability:
        def route_once(driver: object) -> bool:
            if isinstance(routes, Exception):
                raise routes
            return routes

        monkeypatch.setattr(probe_module, "open_driver", lambda config: FakeDriver(*devices))
        monkeypatch.setattr(_torch, "build_kind", lambda: build)
        monkeypatch.setattr(_torch, "is_initialized", lambda: initialized)
        monkeypatch.setattr(probe_module, "_route_once", route_once)
        return probe(driver="cuda")

    return find


def test_a_gpu_that_works_is_described(find: FindOnGpu) -> None:
    found = find(device(), device(usable=False, reason="it is full"))
    assert found.ok, found
    assert (found.driver, found.driver_version) == ("cuda", "12.8")
    first, second = found.devices
    assert (first.compute_capability, first.handle_types) == ("9.0", ("posix_fd",))
    assert first.handle_types_claimed == ("posix_fd", "fabric")
    assert first.rdma_claimed
    assert not first.rdma
    assert (second.usable, second.reason) == (False, "it is full")
    assert (found.torch.build, found.torch.routes, found.torch.reason) == ("cuda", True, "")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (0, ""),
        (1, "host registration"),
        (2, "allocation"),
        (3, "context synchronisation"),
        (4, "none"),
    ],
)
def test_the_way_of_the_fence_is_named(find: FindOnGpu, number: int, said: str) -> None:
    (found,) = find(device() | {"fence": number, "pins_host_memory": False}).devices
    assert found.fence == said
    assert not found.pins_host_memory


def test_a_driver_that_pins_no_host_memory_is_usable(monkeypatch: pytest.MonkeyPatch) -> None:
    from cumempool import _core

    unpinned = _core.open_host(
        devices=1, bytes_per_device=8 * MIB, granularity=GRANULE, rdma=False, fabric=False, fence=2
    )
    monkeypatch.setattr(probe_module, "open_driver", lambda config: unpinned)
    found = probe(driver="host")
    assert found.ok
    (device,) = found.devices
    assert (device.fence, device.pins_host_memory) == ("allocation", False)


def test_torch_is_not_made_to_use_cuda(find: FindOnGpu) -> None:
    found = find(device(), initialized=False, routes=AssertionError("not to be tried"))
    assert found.ok
    assert found.torch.routes is None
    assert "not in use" in found.torch.reason


def test_a_driver_without_devices_says_so(find: FindOnGpu) -> None:
    found = find()
    assert not found.ok
    assert "no device" in found.reason
    assert "CUDA_VISIBLE_DEVICES" in found.hint


def test_where_no_device_is_usable_the_first_one_says_why(find: FindOnGpu) -> None:
    full = find(device(usable=False, reason="it is full"), routes=AssertionError("not to be tried"))
    assert not full.ok
    assert "it is full" in full.reason
    assert full.hint
    broken = find(DriverError("the device has fallen off the bus"))
    assert not broken.ok
    assert "fallen off the bus" in broken.reason
    assert not broken.devices[0].usable


@pytest.mark.parametrize("build", ["cpu", "rocm"])
def test_a_torch_without_cuda_is_no_torch_for_a_gpu(find: FindOnGpu, build: str) -> None:
    found = find(device(), build=build)
    assert not found.ok
    assert f"built for {build}" in found.reason
    assert "CUDA build of torch" in found.hint
    assert found.torch.routes is None


@pytest.mark.parametrize(
    ("routes", "why"),
    [(False, "allocated elsewhere"), (RuntimeError("no such pool"), "RuntimeError: no such pool")],
)
def test_a_torch_that_does_not_route_is_a_no(
    find: FindOnGpu, routes: bool | Exception, why: str
) -> None:
    found = find(device(), routes=routes)
    assert not found.ok
    assert why in found.reason
    assert "torch 2.6" in found.hint


def test_a_rocm_build_of_torch_cannot_be_used_with_the_cuda_driver(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    SimulatedCuda(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", "6.2")
    found = probe(driver="cuda")
    assert not found.ok
    assert found.torch.build == "rocm"
    assert "is built for rocm, not for CUDA" in found.reason
    assert found.hint == "install a CUDA build of torch"
    assert probe(driver="host").ok


def test_a_torch_that_cannot_be_imported_says_why(run_python: RunPython) -> None:
    code = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise OSError("libcudart.so.12: cannot open shared object file")
sys.meta_path.insert(0, Broken())
import cumempool
found = cumempool.probe(driver="host")
assert not found.ok and found.torch.build == "none", found
assert "libcudart.so.12" in found.reason and found.hint == "install torch", found
"""
    done = run_python(code)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_an_extension_that_cannot_be_loaded_is_a_no(monkeypatch: pytest.MonkeyPatch) -> None:
    def open_driver(config: CuMemConfig) -> object:
        raise ImportError("GLIBCXX_3.4.32 not found")

    monkeypatch.setattr(probe_module, "open_driver", open_driver)
    found = probe(driver="host")
    assert not found.ok
    assert "GLIBCXX_3.4.32" in found.reason
    assert "pip" in found.hint


class RouteThroughSlot:
    """In place of `PoolRoute`: while it is open, `torch.empty` may ask the slot for memory."""

    def __init__(self, slot: int, devices: Sequence[int]) -> None:
        self._slot = slot
        self.library = ctypes.CDLL(str(_torch.LIBRARY))
        self.open = 0

    def begin(self) -> None:
        self.open += 1

    def end(self) -> None:
        self.open -= 1

    def allocate(self, *arguments: object, **keywords: object) -> object:
        assert self.open == 1
        malloc = getattr(self.library, f"cumempool_malloc_{self._slot}")
        malloc.restype = ctypes.c_void_p
        malloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
        address = malloc(4, 0, None)
        assert address
        free = getattr(self.library, f"cumempool_free_{self._slot}")
        free.argtypes = [ctypes.c_void_p, ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
        free(address, 4, 0, None)
        return object()


@pytest.mark.parametrize("through_slot", [True, False])
def test_routing_is_tried_with_one_allocation_that_goes_again(
    monkeypatch: pytest.MonkeyPatch, through_slot: bool
) -> None:
    routes: list[RouteThroughSlot] = []

    def make_route(slot: int, devices: Sequence[int]) -> RouteThroughSlot:
        routes.append(RouteThroughSlot(slot, devices))
        return routes[0]

    monkeypatch.setattr(_torch, "PoolRoute", make_route)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch, "empty", lambda *_, **__: routes[0].allocate() if through_slot else object()
    )
    driver = probe_module.open_driver(CuMemConfig(driver="host", host_driver_bytes=4 * MIB))
    free = driver.probe(0)["free_bytes"]
    assert probe_module._route_once(driver) is through_slot
    assert routes[0].open == 0
    assert driver.probe(0)["free_bytes"] == free


def test_a_route_that_fails_leaves_no_slot_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(RouteThroughSlot):
        def begin(self) -> None:
            raise RuntimeError("the pool was refused")

    monkeypatch.setattr(_torch, "PoolRoute", Refused)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    driver = probe_module.open_driver(CuMemConfig(driver="host"))
    for _ in range(70):  # more often than there are slots
        with pytest.raises(RuntimeError, match="refused"):
            probe_module._route_once(driver)


@pytest.mark.parametrize(
    "error", [TypeError, ValueError, KeyError, AssertionError, UnavailableError]
)
def test_whatever_a_torch_raises_is_a_no_with_the_reason(error: type[Exception]) -> None:
    def route() -> bool:
        raise error("MemPool takes something else")

    found = probe_module._try(route, "9.9", "cuda")
    assert found.routes is False
    assert found.reason.startswith(f"{error.__name__}: ")
    assert "MemPool takes something else" in found.reason
