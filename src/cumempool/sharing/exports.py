"""Makes and withdraws the descriptors that an allocator gives to other processes.

The first sharing opens the endpoint of `owner.py`, which serves importers.
"""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Collection
from typing import TYPE_CHECKING

from cumempool._locks import fork_safe_lock
from cumempool._pool.checks import check_bool
from cumempool._pool.devices import Devices
from cumempool._pool.stats import AllocationInfo, allocations_of
from cumempool._pool.tags import Tags
from cumempool._pool.tensors import memory_of
from cumempool.errors import CumempoolError, InUseError, InvalidArgumentError
from cumempool.sharing.descriptor import SharedMemory, SharedRange, layout_of
from cumempool.sharing.leases import Export
from cumempool.sharing.owner import Endpoint

if TYPE_CHECKING:
    import torch

    from cumempool import _core


class Exports:
    """The memory of one allocator that other processes can open. Thread-safe."""

    def __init__(self, core: _core.Allocator, tags: Tags, devices: Devices, driver: str) -> None:
        self._core = core
        self._tags = tags
        self._devices = devices
        self._driver = driver
        self._lock = fork_safe_lock()
        self._endpoint: Endpoint | None = None

    def share(self, what: torch.Tensor | str, writable: bool, fabric: bool) -> SharedMemory:
        """See `CuMemAllocator.share`."""
        check_bool(writable=writable, fabric=fabric)
        if isinstance(what, str):
            self._tags.check_known(what, "share")
            infos, layout = [i for i in allocations_of(self._core) if i.tag == what], None
            if not infos:
                raise InvalidArgumentError(f"share: there is nothing of tag {what!r}", tag=what)
        else:
            infos = [AllocationInfo(**self._core.find(memory_of(what)))]
            layout = layout_of(what, infos[0].address)
        ranges = self._ranges(infos)
        endpoint = self._open_endpoint()
        return endpoint.describe(self._driver, infos[0].tag, ranges, layout, writable, fabric)

    def send(self, tensor: torch.Tensor, kept: object) -> SharedMemory:
        """Shares a tensor with the receiver of a message; keeps `kept` until that releases it."""
        found = AllocationInfo(**self._core.find(memory_of(tensor)))
        layout = layout_of(tensor, found.address)
        endpoint = self._open_endpoint()
        with contextlib.ExitStack() as failed:
            number = endpoint.leases.keep(found.tag, found.bytes, kept)
            failed.callback(endpoint.leases.forget, number)
            # Find it again: it may have slept before the message kept it awake.
            ranges = self._ranges([AllocationInfo(**self._core.find(found.address))])
            memory = endpoint.describe(
                self._driver, found.tag, ranges, layout, writable=True, message=number
            )
            failed.pop_all()
        return memory

    def holds(self, tensor: torch.Tensor) -> bool:
        """Returns whether a tensor's memory belongs to the allocator."""
        try:
            self._core.find(memory_of(tensor))
        except CumempoolError:
            return False
        return True

    def _ranges(self, infos: list[AllocationInfo]) -> list[SharedRange]:
        for info in infos:
            os.close(self._core.export_fd(info.address)[0])  # raises if it cannot be shared
        name = self._devices.name_for_others
        return [
            SharedRange(i.address, i.bytes, i.generation, i.sequence, name(i.device)) for i in infos
        ]

    def revoke(self, tag: str) -> int:
        """See `CuMemAllocator.revoke`."""
        self._tags.check_known(tag, "revoke")
        return 0 if self._endpoint is None else self._endpoint.leases.revoke(tag)

    def list(self) -> list[Export]:
        """See `CuMemAllocator.exports`."""
        return [] if self._endpoint is None else self._endpoint.leases.exports()

    def settle(self, tags: Collection[str]) -> None:
        """Notes what other processes have released of tags, before a sleep of the tags."""
        if self._endpoint is not None:
            self._endpoint.leases.settle(tags)

    def settle_close(self, force: bool) -> None:
        """Releases what messages keep, before a close. Importers keep what they have mapped."""
        waiting = [one for one in self.list() if not one.received]
        if waiting and not force:
            tags = sorted({one.tag for one in waiting})
            raise InUseError(
                f"{len(waiting)} messages of {', '.join(map(repr, tags))} were sent and not "
                f"received yet: {sum(one.bytes for one in waiting)} bytes",
                operation="close",
                tag=tags[0],
                advice="receive them; revoke() and close(force=True) withdraw them",
            )
        if self._endpoint is not None:
            self._endpoint.leases.forget_all()

    def close(self) -> None:
        """Closes the endpoint, if one was opened. A second close has no effect."""
        if self._endpoint is not None:
            self._endpoint.close()

    def _open_endpoint(self) -> Endpoint:
        if self._endpoint is not None:
            return self._endpoint
        made = Endpoint(self._core)
        with self._lock:
            if self._endpoint is None:
                self._endpoint = made
                weakref.finalize(self, made.stop)
            endpoint = self._endpoint
        if endpoint is not made:  # another thread was faster
            made.close()
        return endpoint
