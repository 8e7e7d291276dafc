"""What an owner of shared memory answers to who knows all of a descriptor, and asks without us."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys

import pytest
import torch
from conftest import GRANULE
from refusals import refuses

from cumempool import CuMemAllocator, SharedMemory, SharingError, open_shared
from cumempool.sharing.wire import Wire, close_all

NOBODY = 65534

#: Sends a request as somebody, and prints the first byte of the answer.
ASK = """
import os, socket, sys
name, request, user = sys.argv[1:]
os.setgid(int(user))
os.setuid(int(user))
with socket.socket(socket.AF_UNIX) as connection:
    connection.settimeout(60)
    connection.connect("\\0" + name)
    try:
        connection.sendall(bytes.fromhex(request))
        print(connection.recv(1))
    except (BrokenPipeError, ConnectionResetError):
        print(b"")
"""


def request_for(memory: SharedMemory) -> bytes:
    data = json.dumps(memory._request(True)).encode()
    return struct.pack("!I", len(data)) + data


def answer_to(memory: SharedMemory, user: int) -> str:
    arguments = [memory.endpoint, request_for(memory).hex(), str(user)]
    done = subprocess.run(
        [sys.executable, "-c", ASK, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_who_knows_the_secret_is_hung_up_on(alloc: CuMemAllocator) -> None:
    kv = alloc.empty(3, tag="kv")
    memory = alloc.share(kv)
    assert answer_to(memory, NOBODY) == "b''"
    assert answer_to(memory, os.geteuid()) == "b'f'", "the request itself is a good one"


def test_memory_that_took_the_place_of_what_was_shared_is_refused(alloc: CuMemAllocator) -> None:
    alloc.share(alloc.empty(1, tag="first"))  # starts threads, which take addresses
    for _ in range(100):
        shared = alloc.empty(GRANULE, dtype=torch.uint8, tag="kv")
        memory = alloc.share(shared)
        del shared
        again = alloc.empty(GRANULE, dtype=torch.uint8, tag="kv")
        if again.data_ptr() == memory.ranges[0].address:
            break
    else:
        pytest.skip("the system did not give the same addresses again")
    with refuses(SharingError, names="freed"):
        open_shared(memory)


def test_descriptors_that_arrive_are_not_inherited() -> None:
    here, there = socket.socketpair()
    with here, there, open(os.devnull) as null:
        Wire(there).send_fds([null.fileno()] * 3)
        received = Wire(here).receive_fds(3)
        try:
            assert not any(os.get_inheritable(fd) for fd in received)
        finally:
            close_all(received)
