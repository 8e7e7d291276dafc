"""A process that opens what others share: one command per line, each answered with one line."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import stat
import sys
import warnings

import torch

from cumempool import CuMemAllocator, CuMemConfig, CumempoolError, open_shared

held: dict[str, list[torch.Tensor]] = {}


def run(words: list[str]) -> str:
    if words[0] == "open":
        memory = pickle.loads(bytes.fromhex(words[2]))
        opened = open_shared(memory, writable=words[3] == "write")
        held[words[1]] = opened if isinstance(opened, list) else [opened]
        return f"{len(held[words[1]])} {sum(t.nbytes for t in held[words[1]])}"
    if words[0] == "fill":
        for tensor in held[words[1]]:
            tensor.fill_(int(words[2]))
        return "filled"
    if words[0] == "read":
        return " ".join(str(tensor.flatten()[-1].item()) for tensor in held[words[1]])
    if words[0] == "close":
        del held[words[1]]
        return "closed"
    if words[0] == "fork":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer Pythons warn of threads
            child = os.fork()
        if child == 0:
            signal.pause()
        return str(child)
    if words[0] == "receive":
        held[words[1]] = [pickle.loads(bytes.fromhex(words[2]))]
        return "received"
    if words[0] == "hang-up":  # as a process does that dies, before it is gone
        for number in map(int, os.listdir("/proc/self/fd")):
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.fstat(number).st_mode):
                    with socket.socket(fileno=os.dup(number)) as connection:
                        connection.shutdown(socket.SHUT_RDWR)
        return "hung up"
    if words[0] == "fds":
        return str(len(os.listdir("/proc/self/fd")))
    raise AssertionError(words)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        # All that is imported on first use: the other user may not be able to read it.
        CuMemAllocator(CuMemConfig(driver="host")).empty(1)
        os.setgid(int(sys.argv[1]))
        os.setuid(int(sys.argv[1]))
    print("ready", flush=True)
    for line in sys.stdin:
        try:
            answer = run(line.split())
        except (CumempoolError, ValueError) as error:
            answer = f"{type(error).__name__}: {error}"
        print(answer, flush=True)
