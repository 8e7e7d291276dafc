"""Shares memory with other processes: `share` hands it out, `open_shared` opens it."""

from cumempool.sharing.descriptor import SharedLayout, SharedMemory, SharedRange
from cumempool.sharing.importer import open_shared
from cumempool.sharing.leases import Export
from cumempool.sharing.reducers import rebuild_storage, rebuild_tensor

__all__ = ["Export", "SharedLayout", "SharedMemory", "SharedRange", "open_shared"]

# Allow-lists of unpicklers name them by this module, wherever they are defined.
for _pickled in (SharedLayout, SharedMemory, SharedRange, rebuild_storage, rebuild_tensor):
    _pickled.__module__ = __name__
