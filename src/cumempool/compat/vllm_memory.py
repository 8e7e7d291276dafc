"""Reaches the allocator behind vLLM's interface, and describes allocations in vLLM's terms."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cumempool.allocator import CuMemAllocator as Pools
from cumempool.config import CuMemConfig
from cumempool.errors import DriverError, InvalidTypeError, NotInPoolError

if TYPE_CHECKING:
    import torch

    from cumempool._pool.stats import AllocationInfo

HandleType = tuple[int, int, int, int]
"""Device ordinal, bytes, address, and 0 in place of the driver's handle."""


@dataclass(frozen=True, slots=True)
class AllocationData:
    """A snapshot of one allocation.

    Attributes:
        handle: See `HandleType`.
        tag: Its tag.
        cpu_backup_tensor: None if it has no backup; else a tensor on the ``meta`` device, of the
            size of the backup. `cumempool.CuMemAllocator.read_backup` reads the contents.
        is_asleep: Whether it sleeps.
    """

    handle: HandleType
    tag: str
    cpu_backup_tensor: torch.Tensor | None = None
    is_asleep: bool = False


def shared() -> Pools:
    """Returns the shared allocator; makes it from the environment if there is none."""
    made = Pools._instance
    return Pools.get_instance(CuMemConfig.from_env()) if made is None else made


def check_tags(tags: object, what: str) -> tuple[str, ...]:
    """Returns the distinct tags of an argument; error texts call the argument `what`."""
    named = (tags,) if isinstance(tags, str) else tags
    if not isinstance(named, Iterable):
        raise InvalidTypeError(f"{what} is a tag or a sequence of tags, not {tags!r}")
    chosen = tuple(dict.fromkeys(named))
    if not all(isinstance(tag, str) for tag in chosen):
        raise InvalidTypeError(f"{what} holds something that is no tag: {tags!r}")
    return chosen


def data_of(info: AllocationInfo) -> AllocationData:
    """Returns an allocation in vLLM's terms."""
    backup = None
    if info.state == "backed_up":
        import torch

        backup = torch.empty(info.backup_bytes, dtype=torch.uint8, device="meta")
    handle = (info.device, info.bytes, info.address, 0)
    return AllocationData(handle, info.tag, backup, info.state != "awake")


def find(operation: str, handle: HandleType) -> AllocationInfo:
    """Returns the allocation of a handle; errors name the operation."""
    address = handle[2]
    for info in shared().snapshot():
        if info.address == address:
            return info
    raise NotInPoolError(f"there is no allocation at {address:#x}", operation=operation)


def return_what_nobody_uses(allocator: Pools) -> None:
    """Gives back memory that only garbage and torch's cache hold, so that no sleep copies it."""
    gc.collect()
    if allocator.config.driver == "cuda":
        from cumempool import _torch

        _torch.empty_cache()


class Memory:
    """Two calls of the CUDA runtime that programs use beside the allocator.

    Both are synchronous. They work on memory of either driver.
    """

    def cudaMemset(self, devPtr: int, value: int, count: int) -> None:  # noqa: N802, N803
        """Fills `count` bytes.

        Raises:
            DriverError: The driver refuses the address, or an earlier kernel has failed.
        """
        if shared().config.driver == "host":
            ctypes.memset(devPtr, value, count)
        else:
            self._call("cuMemsetD8_v2", devPtr, ctypes.c_ubyte(value), count)

    def cudaMemcpy(self, dst: int, src: int, count: int) -> None:  # noqa: N802
        """Copies `count` bytes between addresses of the device or the host.

        Raises:
            DriverError: As `cudaMemset`.
        """
        if shared().config.driver == "host":
            ctypes.memmove(dst, src, count)
        else:
            self._call("cuMemcpy", dst, ctypes.c_uint64(src), count)

    def _call(self, name: str, address: int, argument: Any, count: int) -> None:
        import torch

        torch.cuda.synchronize()  # which makes the context current, too
        function = getattr(ctypes.CDLL("libcuda.so.1"), name)
        result = function(ctypes.c_uint64(address), argument, ctypes.c_size_t(count))
        if result:
            advice = "check the address, and whether an earlier kernel has failed"
            raise DriverError(
                f"{name} of {count} bytes at {address:#x}: CUDA error {result}; {advice}",
                operation=name,
                bytes=count,
                driver_call=name,
                result=result,
                advice=advice,
            )
        torch.cuda.synchronize()
