"""An interpreter that has imported torch and MONAI, and is forked for each command of test_docs.py.

The imports are more than half of the time of a small command. A command that is forked has its own folder, environment,
arguments, streams and exit status, and imports the modules of its copy itself.
"""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import warnings
from pathlib import Path


def start(address: Path) -> subprocess.Popen:
    """Start the interpreter. It listens at a socket in the file system until it is killed."""
    return subprocess.Popen([sys.executable, __file__, str(address)], env=os.environ | {"OMP_NUM_THREADS": "1"})


def can_run(words: list[str], address: str | None) -> bool:
    """Whether the interpreter is there and can run the arguments of ``python``: a module or a file."""
    first = words[2:] if words[:1] == ["-W"] else words
    known = first[:2] == ["-m", "monai.bundle"] or (first[:1] == ["-m"] and first[1].startswith("scripts."))
    known |= bool(first) and first[0].endswith(".py")
    return known and bool(address) and Path(address).exists()


def run(words: list[str], address: str) -> int:
    """Let the interpreter run the arguments of ``python``, and wait: the exit status."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        request = {"words": words, "folder": os.getcwd(), "environment": dict(os.environ)}
        socket.send_fds(connection, [b"streams"], [0, 1, 2])
        connection.sendall(json.dumps(request).encode() + b"\n")
        return int(connection.makefile().read() or 1)


def serve(address: str) -> dict:
    """Wait for commands. Returns in the process of a command alone, with what it was asked for."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # ended processes leave nothing behind
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen()
        os.rename(f"{address}.new", address)  # who finds it can connect
        while True:
            connection, _ = listener.accept()
            if not os.fork():
                break
            connection.close()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    _, streams, _, _ = socket.recv_fds(connection, 7, 3)
    request = json.loads(connection.makefile().readline())
    if command := os.fork():
        status = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
        connection.sendall(str(status if status >= 0 else 128 - status).encode())
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return request


def become(words: list[str], folder: str, environment: dict[str, str]) -> None:
    """What ``python`` does with its arguments."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment | {"DOCS_INSIDE": "1"})
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", os.cpu_count())))  # the interpreter was started with 1
    sys.executable = shutil.which("python") or sys.executable  # for what a command runs in its turn
    if words[0] == "-W":
        warnings.simplefilter(words[1])
        words = words[2:]
    if words[0] == "-m":
        sys.argv, sys.path[0] = words[1:], folder
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = words, str(Path(words[0]).resolve().parent)
        runpy.run_path(words[0], run_name="__main__")


if __name__ == "__main__":
    import monai.bundle  # noqa: F401
    import torch

    become(**serve(sys.argv[1]))
