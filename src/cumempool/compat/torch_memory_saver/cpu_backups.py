"""Keeps the views of backups that a program has asked for, also after a resume."""

from __future__ import annotations

import weakref
from collections.abc import Collection
from typing import TYPE_CHECKING

from cumempool._locks import fork_safe_lock
from cumempool.allocator import CuMemAllocator
from cumempool.errors import NotInPoolError

if TYPE_CHECKING:
    import torch

_ViewKey = tuple[str, int, int, str, tuple[int, ...], tuple[int, ...]]


class CpuBackups:
    """Views of backups. If backups are retained, a tensor's view stays at its address.

    The next sleep writes to other memory while a program holds a view. If the program retains
    backups and asks again, it gets the older view with the newer contents.
    """

    def __init__(self) -> None:
        self._lock = fork_safe_lock()
        self._kept: dict[_ViewKey, torch.Tensor] = {}
        self._given: dict[_ViewKey, weakref.ref[torch.Tensor]] = {}

    def view(
        self, allocator: CuMemAllocator, tensor: torch.Tensor, retain: bool
    ) -> torch.Tensor | None:
        """Returns a read-only view; None if there is no backup to view."""
        try:
            info = allocator.allocation_of(tensor)
        except NotInPoolError:
            return None
        key = (
            info.tag,
            info.sequence,
            tensor.data_ptr(),
            f"{tensor.dtype} {tensor.is_conj()} {tensor.is_neg()}",
            tuple(tensor.shape),
            tuple(tensor.stride()),
        )
        with self._lock:
            if info.state == "awake":
                return self._kept.get(key) if retain else None
            if info.state == "discarded":
                return None
            view = allocator.read_backup(tensor)
            if not retain:
                return view
            if info.backup_tier != "file":  # views of a file are mapped read-only
                view = self._at_its_address(key, view)
            self._kept[key] = view
            return view

    def _at_its_address(self, key: _ViewKey, view: torch.Tensor) -> torch.Tensor:
        given = self._given.get(key)
        older = None if given is None else given()
        if older is None:
            self._given[key] = weakref.ref(view)
            return view
        if older.data_ptr() != view.data_ptr():
            _bytes_of(older).copy_(_bytes_of(view))
        return older

    def forget(self, tags: Collection[str]) -> None:
        """Drops the views of some tags, so that a sleep can write to their backups in place."""
        with self._lock:
            self._kept = {key: view for key, view in self._kept.items() if key[0] not in tags}
            self._given = {key: ref for key, ref in self._given.items() if ref() is not None}


def _bytes_of(view: torch.Tensor) -> torch.Tensor:
    """Returns the memory of a view as an ordinary tensor."""
    import torch

    return torch.empty(0, dtype=torch.uint8).set_(view.untyped_storage())
