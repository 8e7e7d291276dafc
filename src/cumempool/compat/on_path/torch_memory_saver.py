"""Imports as ``torch_memory_saver`` if this folder comes first on the path of a process."""

from cumempool.compat.torch_memory_saver import install

install()
