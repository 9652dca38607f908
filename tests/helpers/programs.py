"""Python programs in processes of their own, forked from one that has imported what they need.

A program that a test starts takes 3 CPU seconds to import torch, and the suite starts hundreds.
`run` and `start` stand for subprocess.run and subprocess.Popen where the imports prove nothing. The
process is as real: its number, signals, exit code, directory, arguments and files. torchrun starts
its ranks so too (tests/helpers/fork_server.py, tests/helpers/forked_rank.py).

Subprocess starts it wherever a fork would not be the same: in an environment that imports may have
read, by another interpreter or with its flags, where there is a GPU, and everywhere with
`pytest --real-processes`. Programs come from two servers in turn, so that one after another hash
strings differently, as processes do.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import select
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
# Environment variables in which a program may differ from its server: those that no import reads,
# and those that the server takes care of. Hugging Face's are read by the kinds that set them alone.
OF_RANKS = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
OF_SERVERS = {"PYTHONPATH", "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_DATASETS_CACHE"}
SET_BY_IMPORTS = {"TRITON_DEFAULT_FP_FUSION", "GOMP_SPINCOUNT", "TORCHINDUCTOR_CACHE_DIR"}
INTERPRETER = "TRITON_INTERPRET"  # of the tests alone: a person runs a program without it
HARMLESS = OF_RANKS | OF_SERVERS | SET_BY_IMPORTS | {"PYTEST_CURRENT_TEST"}


class Kind(NamedTuple):
    """What a server has imported."""

    needed: tuple[str, ...]  # modules, and files of Python
    environment: dict[str, str]  # beside that of the tests
    has_ours: bool  # whether our sources are on the path of its imports
    servers: int  # asked in turn


SCRIPTS = tuple(str(path) for path in sorted((ROOT / "scripts").glob("*.py")))
# what the scripts import when they need it
LATER = (
    "tokenizers",
    "matplotlib.figure",
    "matplotlib.backends.backend_svg",
    "torch.distributed.run",
)
OURS = (*SCRIPTS, *LATER)
TRANSFORMERS = (
    "transformers.models.llama.modeling_llama",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.generation.utils",
    "peft",
)
OFFLINE = {"HF_HUB_OFFLINE": "1"}
KINDS = {
    "torch": Kind(("torch",), {}, False, servers=1),
    "ours": Kind(OURS, {}, True, servers=2),
    "sharded": Kind((*OURS, "model.sharded"), {}, True, servers=1),
    "harness": Kind((*OURS, "lm_eval.evaluator", "lm_eval.tasks"), OFFLINE, True, servers=1),
    "peers": Kind(TRANSFORMERS, OFFLINE | {"TOKENIZERS_PARALLELISM": "false"}, False, servers=1),
}


class Server:
    """A running fork server."""

    def __init__(self, kind: Kind) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fork-"))
        self.address = str(self.folder / "socket")
        own = {"HF_DATASETS_CACHE": str(self.folder / "datasets")}
        self.environment = {**environment, **kind.environment, **own}
        for name in ("PYTHONPATH", INTERPRETER):
            self.environment.pop(name, None)
        root = ROOT if kind.has_ours else self.folder
        needed = [name for name in kind.needed if _is_there(name)]
        command = [sys.executable, HELPERS / "fork_server.py", self.address, root, *needed]
        self.process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.rank = str(self.folder / "rank")  # an executable file in place of python, for torchrun
        rank = shlex.join([sys.executable, "-IS", str(HELPERS / "forked_rank.py")])
        Path(self.rank).write_text(f'#!/bin/sh\nexec {rank} "$@"\n')
        Path(self.rank).chmod(0o700)
        atexit.register(self.close)
        said = self.process.stdout.readline()
        assert said == "ready\n", f"the fork server ended with {self.process.wait()}"

    def close(self) -> None:
        """End it; programs that still run are killed with it."""
        self.process.stdin.close()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def serves(self, variables: Mapping[str, str]) -> bool:
        """Whether imports would find the same in an environment with these variables."""
        names = {*variables, *self.environment} - HARMLESS
        return all(variables.get(name) == self.environment.get(name) for name in names)


def _is_there(name: str) -> bool:
    """Whether it is a file, or a module of an installed package."""
    return name.endswith(".py") or find_spec(name.partition(".")[0]) is not None


# State of this process. `_server` changes it: the servers by kind, the next one to ask first.
running: dict[str, list[Server]] = {}
# tests/conftest.py changes these: the environment that pytest began with, and whether every program
# is started anew. A fork cannot use CUDA where its parent asked for it.
environment = dict(os.environ)
are_real = torch.cuda.is_available() or sys.platform != "linux"


def _server(kind: str) -> Server:
    """The server of this kind whose turn it is, started when it is first asked."""
    servers = running.setdefault(kind, [])
    if len(servers) < KINDS[kind].servers:
        servers.append(Server(KINDS[kind]))
        return servers[-1]
    servers.append(servers.pop(0))
    return servers[-1]


class Program:
    """A forked program: the part of subprocess.Popen's interface that tests use."""

    def __init__(self, server: Server, asked: dict[str, Any], files: Sequence[int]) -> None:
        self.asker = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.asker.connect(server.address)
        socket.send_fds(self.asker, [json.dumps(asked).encode()], files)
        self.pid = json.loads(self.asker.recv(1000))["pid"]
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it runs."""
        try:
            return self.wait(timeout=0)
        except TimeoutError:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """The exit code (minus the signal that ended it); TimeoutError after so many seconds."""
        if self.returncode is None:
            ready, _, _ = select.select([self.asker], [], [], timeout)
            if not ready:
                raise TimeoutError
            self.returncode = json.loads(self.asker.recv(1000))["code"]
            self.asker.close()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)


def start(
    command: Sequence[object],
    *,
    kind: str = "ours",
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    stdout: IO | int | None = None,
    stderr: IO | int | None = None,
) -> Program | subprocess.Popen:
    """As subprocess.Popen(command, ...); the files are open ones, DEVNULL or None.

    A program has no TRITON_INTERPRET: it does not import triton on a CPU, as for a person.
    """
    words = [os.fspath(word) for word in command]
    variables = dict(os.environ if env is None else env)
    variables.pop(INTERPRETER, None)
    can_fork = not are_real and words[0] == sys.executable and _is_program(words[1])
    server = _server(kind) if can_fork else None
    if server is None or not server.serves(variables):
        return subprocess.Popen(words, cwd=cwd, env=variables, stdout=stdout, stderr=stderr)
    if words[1:3] == ["-m", "torch.distributed.run"]:
        variables |= {"FORK_SERVER": server.address, "PYTHON_EXEC": server.rank}
    asked = {"argv": words[1:], "cwd": os.fspath(cwd or Path.cwd()), "env": variables}
    with open(os.devnull, "r+b") as nowhere:
        files = [0]
        for number, file in ((1, stdout), (2, stderr)):
            if file == subprocess.DEVNULL:
                file = nowhere
            files.append(number if file is None else file.fileno())
        return Program(server, asked, files)


def _is_program(word: str) -> bool:
    return word in ("-c", "-m") or word.endswith(".py")


def run(
    command: Sequence[object],
    *,
    kind: str = "ours",
    cwd: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    check: bool = False,
) -> subprocess.CompletedProcess:
    """As subprocess.run(command, capture_output=True, text=True, ...)."""
    with tempfile.TemporaryFile("w+") as stdout, tempfile.TemporaryFile("w+") as stderr:
        program = start(command, kind=kind, cwd=cwd, env=env, stdout=stdout, stderr=stderr)
        try:
            code = program.wait(timeout)
        except (TimeoutError, subprocess.TimeoutExpired):
            program.kill()
            program.wait()
            raise
        texts = []
        for file in (stdout, stderr):
            file.seek(0)
            texts.append(file.read())
    done = subprocess.CompletedProcess(command, code, *texts)
    if check:
        done.check_returncode()
    return done


def cpu_seconds() -> float:
    """CPU time of all servers and of the programs that they started and that have ended."""
    ticks = 0
    for server in itertools.chain(*running.values()):
        stat = Path(f"/proc/{server.process.pid}/stat").read_text()
        after_name = stat.rpartition(")")[2].split()
        ticks += sum(int(field) for field in after_name[11:15])  # utime, stime, cutime, cstime
    return ticks / os.sysconf("SC_CLK_TCK")
