"""A process that has imported what programs need, and forks to become one of them.

    python fork_server.py SOCKET ROOT MODULE_OR_FILE...

It imports the modules, and runs the files as modules, with ROOT on the path. Then it waits at
SOCKET. A message there is a JSON object (`argv`, `cwd`, `env`) with three file descriptors:
standard input, output and error. The server forks; the child takes the files, directory,
environment, path and arguments of that program and runs it as the interpreter would (`argv` is
`[-u] FILE ...`, `-c CODE ...` or `-m MODULE ...`). It ends as any Python process does, by itself or
by a signal. The server answers with the child's number and, when it has ended, with its exit code.
A child whose asker ends first is killed.

The server has computed nothing: OpenMP has started no threads, which a child would lack. It ends
when its standard input does. It is started as a file, and needs only the standard library.
"""

from __future__ import annotations

import builtins
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import types
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MESSAGE = 1 << 17  # bytes: the longest message
THREADS = "OMP_NUM_THREADS"


class Server:
    """The waiting process: who asks, and which children run for whom."""

    def __init__(self, address: str) -> None:
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(address)
        self.listener.listen(64)
        self.woken, self.waker = os.pipe()  # a child has ended
        os.set_blocking(self.waker, False)
        self.children: dict[int, socket.socket] = {}  # process number -> who asked for it
        self.selector = selectors.DefaultSelector()
        for file in (self.listener, self.woken, 0):
            self.selector.register(file, selectors.EVENT_READ)
        self.interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the owner
        signal.signal(signal.SIGCHLD, lambda *_: None)  # writes to `waker`
        signal.set_wakeup_fd(self.waker, warn_on_full_buffer=False)

    def serve(self) -> dict[str, Any] | None:
        """Answer until the owner is gone (None); in a child, return the program it must become."""
        while True:
            for key, _ in self.selector.select():
                if key.fileobj == 0:
                    for number in self.children:
                        os.kill(number, signal.SIGKILL)
                    return None
                if key.fileobj is self.listener:
                    program = self.start(self.listener.accept()[0])
                    if program is not None:
                        return program
                elif key.fileobj == self.woken:
                    os.read(self.woken, 4096)
                    self.report_ended()
                else:
                    self.kill_child_of(key.fileobj)

    def start(self, asker: socket.socket) -> dict[str, Any] | None:
        """Fork for one message: None here, the program in the child."""
        message, files, _, _ = socket.recv_fds(asker, MESSAGE, 3)
        program = json.loads(message)
        with warnings.catch_warnings():  # OpenBLAS has threads; it ends them before a fork
            warnings.simplefilter("ignore")
            number = os.fork()
        if number == 0:
            self.leave(asker)
            for target, file in enumerate(files):
                os.dup2(file, target)
                os.close(file)
            return program
        for file in files:
            os.close(file)
        self.children[number] = asker
        self.selector.register(asker, selectors.EVENT_READ)
        asker.send(json.dumps({"pid": number}).encode())
        return None

    def leave(self, asker: socket.socket) -> None:
        """In a child: close what is the server's."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, self.interrupt)
        self.selector.close()
        for number in (self.woken, self.waker):
            os.close(number)
        for other in (self.listener, asker, *self.children.values()):
            other.close()

    def report_ended(self) -> None:
        """Tell who asked for it of every child that has ended."""
        while self.children:
            number, status = os.waitpid(-1, os.WNOHANG)
            if number == 0:
                return
            asker = self.children.pop(number)
            if asker in self.selector.get_map():
                self.selector.unregister(asker)
            code = os.waitstatus_to_exitcode(status)
            try:
                asker.send(json.dumps({"code": code}).encode())
            except OSError:
                pass  # it has ended
            asker.close()

    def kill_child_of(self, asker: socket.socket) -> None:
        """An asker sends nothing more: what can be read of it is its end."""
        self.selector.unregister(asker)
        for number, other in self.children.items():
            if other is asker:
                os.kill(number, signal.SIGKILL)


def become(program: dict[str, Any], start: Start) -> None:
    """Run the program in this process, as the interpreter runs a command line."""
    os.chdir(program["cwd"])
    os.environ.clear()
    os.environ.update(start.set_by_imports | program["env"])
    threads = os.environ.get(THREADS)  # OpenMP read it when torch was imported; torchrun sets 1
    if threads is not None and threads != start.threads:
        sys.modules["torch"].set_num_threads(int(threads))
    first, *arguments = program["argv"]
    if first == "-u":
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)
        first, *arguments = arguments
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    path = [*filter(None, named), *start.path]
    if first == "-m":
        sys.argv = arguments
        sys.path[:] = [os.getcwd(), *path]
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *arguments[1:]]
        sys.path[:] = ["", *path]
        run_as_main(arguments[0], None)
    else:
        sys.argv = [first, *arguments]
        sys.path[:] = [str(Path(first).resolve().parent), *path]
        run_as_main(Path(first).read_text(encoding="utf-8"), first)


def run_as_main(source: str, file: str | None) -> None:
    """Run source code as the module __main__ of this process."""
    main = types.ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    if file is not None:
        main.__dict__["__file__"] = file
    sys.modules["__main__"] = main
    exec(compile(source, file or "<string>", "exec"), main.__dict__)


@dataclass(frozen=True)
class Start:
    """What a program must find as it is in a process of its own."""

    path: list[str]  # sys.path without its first directory; the server has no PYTHONPATH
    threads: str | None  # OMP_NUM_THREADS
    set_by_imports: dict[str, str]  # environment variables


def start_serving(address: str, root: str, needed: list[str]) -> tuple[Server, Start]:
    """Import what programs need, and begin to listen."""
    path, before = sys.path[1:], dict(os.environ)
    for name in needed:
        sys.path[:] = [root, *path]
        if name.endswith(".py"):
            runpy.run_path(name, run_name="imported")
        else:
            importlib.import_module(name)
    added = {key: value for key, value in os.environ.items() if key not in before}
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it looks at
    server = Server(address)
    print("ready", flush=True)
    return server, Start(path, before.get(THREADS), added)


if __name__ == "__main__":
    waiting, at_start = start_serving(sys.argv[1], sys.argv[2], sys.argv[3:])
    asked = waiting.serve()
    if asked is not None:
        become(asked, at_start)
