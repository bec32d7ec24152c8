"""Ray workers forked from a process that has imported everything, instead of each importing it again.

A worker spends some seconds of processor time on importing torch, transformers, PEFT and DeepSpeed, and a test session
starts hundreds. Run as a script, this is what Ray starts in the place of Python: it hands the command and the
environment to the server, whose child runs Ray's own worker by them. Nothing of the worker is replaced.

Forked workers share one seed of string hashes. Clusters that start their own workers do without the server: the demo,
the README's commands, submitted jobs, nodes that are lost.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

_IMPORTED = (
    "deepspeed",
    "peft",
    "transformers.models.llama.modeling_llama",
    "rose_ray.model.scoring",
    "rose_ray.stages.features",
    "rose_ray.stages.warmup",
)


@contextmanager
def fork_server(folder: Path, environ: Mapping[str, str]) -> Iterator[str]:
    """Run a server; yield what Ray takes as ``py_executable``.

    Args:
        folder: For the socket. Its path has to be short.
        environ: Of the workers: some packages read it once, when they are imported.
    """
    address = folder / "forks"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(address))
        listener.listen(64)  # who asks while the server still imports, waits
        server = subprocess.Popen(
            [sys.executable, "-m", "tests.distributed.fork_server", str(listener.fileno())],
            pass_fds=[listener.fileno()],
            env={**os.environ, **environ},
            cwd=Path(__file__).parents[2],
            stdin=subprocess.DEVNULL,
        )
    try:
        yield f"{sys.executable} -E -S {__file__} {address}"
    finally:
        server.kill()
        server.wait()


def serve(listener: socket.socket) -> NoReturn:
    """Import what workers need, then fork one for whoever asks, until killed."""
    for name in _IMPORTED:
        importlib.import_module(name)
    assert "ray" not in sys.modules, "Ray's native part reads the environment, a worker's own, when it is imported"
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody here waits for a child
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            with connection.makefile() as stream:
                _become_worker(json.loads(stream.readline()))
        connection.close()


def _become_worker(order: dict[str, Any]) -> NoReturn:
    import numpy

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.environ.clear()
    os.environ.update(order["environ"])
    os.chdir(order["cwd"])
    numpy.random.seed()  # its own, as if NumPy had been imported here
    sys.argv = order["argv"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    status = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        os._exit(status)


def ask(address: str, argv: list[str]) -> None:
    """Have a worker started; return at its end, as a process that had become the worker would."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(address)
        order = {"argv": argv, "environ": dict(os.environ), "cwd": os.getcwd()}
        connection.sendall(json.dumps(order).encode() + b"\n")
        connection.recv(1)  # never comes: the worker's end closes the connection


if __name__ == "__main__":
    if sys.argv[1].isdigit():
        serve(socket.socket(fileno=int(sys.argv[1])))
    ask(sys.argv[1], sys.argv[2:])
