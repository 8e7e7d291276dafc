"""A machine with CUDA devices as torch and the library see it, made of the host driver and fakes.

The memory is that of the host driver, the slots are the library's own, and only what torch says of
CUDA is made up. It shows what is done with torch and in which order, and nothing about a GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import GRANULE, MIB
from test_torch_route import FakeTorch
from torch.overrides import TorchFunctionMode

from cumempool import CuMemAllocator, CuMemConfig, WakeHandle, _core, _torch

#: What `torch.cuda.get_device_properties` says of a device's identity.
UUIDS = ("GPU-0", "GPU-1")

# As libcuda, a driver never goes: memory from slots may outlast its allocator, and what has its
# address later would be taken for it.
_drivers: list[_core.Driver] = []


class TensorsOnCuda(TorchFunctionMode):
    """What is asked for on a CUDA device is made in a pool, or on the CPU outside of one.

    All tensors say that they are on the first CUDA device. What is called while a graph is captured
    is written down instead of being run.
    """

    def __init__(self, cuda: SimulatedCuda) -> None:
        super().__init__()
        self.cuda = cuda
        self.captured: list[Callable[[], object]] | None = None

    def __torch_function__(
        self, func: Any, types: object, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func == torch.Tensor.device.__get__:  # type: ignore[attr-defined]
            return torch.device("cuda", 0)
        if self.captured is not None:
            self.captured.append(partial(func, *args, **kwargs))
            return None
        kwargs.pop("pin_memory", None)
        if torch.device(kwargs.get("device") or "cpu").type != "cuda":
            return func(*args, **kwargs)
        kwargs["device"] = "cpu"
        return self.cuda.tensor(func(*args, **kwargs))


class SimulatedCuda(FakeTorch):
    """Devices of the host driver under the name of cuda, and a torch that has started on them.

    What `allocate` is asked for goes to the slot of the innermost route, as torch would have it.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, mib: int = 64) -> None:
        super().__init__(monkeypatch)
        self.contexts = {0}
        self.routes: list[tuple[int, tuple[int, int]]] = []
        self.cached_outside = 0
        self.capturing = False
        self.allocators: list[CuMemAllocator] = []

        def open_cuda() -> _core.Driver:
            _drivers.append(
                _core.open_host(
                    devices=len(UUIDS),
                    bytes_per_device=mib * MIB,
                    granularity=GRANULE,
                    rdma=False,
                    fabric=False,
                )
            )
            return _drivers[-1]

        monkeypatch.setattr(_core, "open_cuda", open_cuda)
        monkeypatch.setattr("cumempool.config._missing", lambda driver: "")
        monkeypatch.setattr(_torch.runtime, "torch_version", lambda: (2, 11))
        monkeypatch.setattr(torch.version, "cuda", "13.0")
        monkeypatch.setattr(torch.version, "hip", None)
        for name, value in {
            "init": lambda: None,
            "is_initialized": lambda: True,
            "is_available": lambda: True,
            "is_current_stream_capturing": lambda: self.capturing,
            "current_device": lambda: self.device,
            "device_count": lambda: len(UUIDS),
            "current_stream": lambda device=None: SimpleNamespace(cuda_stream=0),
            "memory_reserved": lambda device: self.cached_outside if device == 0 else 0,
            "memory_allocated": lambda device: 0,
            "get_per_process_memory_fraction": lambda device: 1.0,
            "get_device_properties": lambda device: SimpleNamespace(uuid=UUIDS[device]),
            "can_device_access_peer": lambda device, peer: device != peer,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for name, value in {
            "_cuda_hasPrimaryContext": self.contexts.__contains__,
            "_cuda_memorySnapshot": lambda asked: {"segments": [], "allocator_settings": {}},
        }.items():
            monkeypatch.setattr(torch._C, name, value, raising=False)

    def call(self, name: str) -> Any:
        noted = super().call(name)

        def routed(device: int, pool_id: tuple[int, int]) -> None:
            noted(device, pool_id)
            if "begin" in name:
                self.routes.append((device, pool_id))
            elif "end" in name:
                self.routes.remove((device, pool_id))

        return routed

    def make_allocator(self, **settings: Any) -> CuMemAllocator:
        self.allocators.append(CuMemAllocator(CuMemConfig(driver="cuda", **settings)))
        return self.allocators[-1]

    def allocate(self, size: int, *states: str, pool: tuple[int, int] | None = None) -> int:
        """What torch does for a tensor: a segment from the slot of a pool; its address.

        Args:
            size: Bytes.
            states: Of its blocks, which are a granule each; in use where none is given.
            pool: None: that of the innermost route of the current device.
        """
        if pool is None:
            pool = next(pool for device, pool in reversed(self.routes) if device == self.device)
        device, slot = self.made[pool[1] - 1]
        malloc = ctypes.CDLL(str(_torch.LIBRARY))[f"cumempool_malloc_{slot}"]
        malloc.argtypes = [ctypes.c_ssize_t, ctypes.c_int, ctypes.c_void_p]
        malloc.restype = ctypes.c_void_p
        address = malloc(size, device, None)
        if address is None:
            raise torch.OutOfMemoryError("CUDA out of memory")
        blocks = [
            {"address": address + number * GRANULE, "size": GRANULE, "state": state}
            for number, state in enumerate(states or ["active_allocated"] * (size // GRANULE))
        ]
        self.segments.append({"address": address, "segment_pool_id": pool, "blocks": blocks})
        return int(address)

    @contextlib.contextmanager
    def tensors(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Has torch make tensors on CUDA devices in the body, and capture and replay graphs."""
        mode = TensorsOnCuda(self)

        class Graph:
            def __init__(self) -> None:
                self.calls: list[Callable[[], object]] = []

            def replay(self) -> None:
                for call in self.calls:
                    call()

        @contextlib.contextmanager
        def capture(graph: Graph) -> Iterator[None]:
            mode.captured = graph.calls
            yield
            mode.captured = None

        wait = WakeHandle.wait

        def wait_here(handle: WakeHandle, tensor: torch.Tensor) -> None:
            wait(handle, tensor)
            handle.result()  # what the CPU does to tensors is not ordered behind a stream

        monkeypatch.setattr(WakeHandle, "wait", wait_here)
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, value in {
            "CUDAGraph": Graph,
            "graph": capture,
            "Stream": lambda: stream,
            "stream": lambda stream: contextlib.nullcontext(),
            "synchronize": lambda: None,
            "get_device_name": lambda: "a simulated GPU",
            "mem_get_info": self.memory,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "manual_seed", torch.default_generator.manual_seed)
        monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)
        monkeypatch.setattr(
            torch.UntypedStorage, "device", property(lambda storage: torch.device("cuda", 0))
        )
        try:
            with mode:
                yield
        finally:
            gc.collect()
            for segment in self.segments:  # of allocators that were closed by force
                _core.free(segment["address"])
            self.segments = []

    def memory(self) -> tuple[int, int]:
        """Bytes that are free on the current device, and all that it has."""
        found = _drivers[-1].probe(self.device)
        return found["free_bytes"], found["total_bytes"]

    def tensor(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor with the contents of another where torch would allocate it now."""
        if not like.nbytes or not any(device == self.device for device, _ in self.routes):
            return like
        size = -(-like.nbytes // GRANULE) * GRANULE
        address = self.allocate(size)
        memory = (ctypes.c_char * like.nbytes).from_address(address)
        weakref.finalize(memory, self.drop_tensors, address).atexit = False
        return torch.frombuffer(memory, dtype=like.dtype).view(like.shape).copy_(like)

    def drop_tensors(self, address: int | None = None) -> None:
        """The tensors of one segment, or of all, are gone; torch keeps what they lay in."""
        for segment in self.segments:
            if address not in (None, segment["address"]):
                continue
            for block in segment["blocks"]:
                block["state"] = "inactive"

    def empty_cache(self) -> None:
        """Frees segments of which nothing is used, where nobody counts their pool any more."""
        self.events.append("empty_cache")
        self.cached_outside = 0
        kept = []
        for segment in self.segments:
            used = any(block["state"] != "inactive" for block in segment["blocks"])
            if used or self.counts[segment["segment_pool_id"]] > 0:
                kept.append(segment)
            else:
                _core.free(segment["address"])
        self.segments = kept
