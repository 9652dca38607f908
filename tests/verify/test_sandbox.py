"""The sandbox: a program cannot leave it, and each way in which it ends has its own reason."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine.verify import sandbox
from engine.verify.sandbox import Outcome, Unprotected, run_program

try:
    is_available = run_program("pass").ok
    why_unavailable = ""
except Unprotected as error:
    is_available = False
    why_unavailable = str(error)

needs_sandbox = pytest.mark.skipif(not is_available, reason=why_unavailable)


@needs_sandbox
def test_a_program_that_ends_is_ok():
    outcome = run_program("import math, hashlib\nprint(math.gcd(12, 18))")
    assert outcome == Outcome(True, "ok", "6\n")


FORK_BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
MANY_FILES = "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(bytes(10**7))"
MANY_DIRECTORIES = "import os\ni = 0\nwhile True:\n    i += 1\n    os.mkdir(str(i))"
# Directories nested deeper than Python's recursion; DEEPER gives the upper ones longer names, so
# that the path is longer than the longest that the system takes.
MANY_LEVELS = """
import os, time
path = "d"
while len(path) < 4000:
    os.mkdir(path)
    path += "/d"
"""
DEEP = MANY_LEVELS + "time.sleep(60)"
DEEPER = f"""{MANY_LEVELS}
path = "d"
for _ in range(9):
    longer = path[:-1] + "e" * 250
    os.rename(path, longer)
    path = longer + "/d"
time.sleep(60)
"""
REMOVED = """
import os, time
kept = []
for name in "abcdefghijklmnopqrst":
    kept.append(open(name, "wb"))
    os.remove(name)
    for _ in range(15):
        kept[-1].write(bytes(1 << 20))
    kept[-1].flush()
time.sleep(60)
"""
THREADS = """
import threading, time
threading.stack_size(32768)
while True:
    threading.Thread(target=time.sleep, args=(60,)).start()
"""
DAEMON = """
import os, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        time.sleep(1000)
"""


@needs_sandbox
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("assert 1 == 2", "error"),
        ("def f(:", "syntax"),
        ("import sys\nsys.exit(0)", "exit"),
        ("raise SystemExit", "exit"),
        ("import os\nos._exit(0)", "exit"),
        ("while True: pass", "timeout"),
        ("import time\ntime.sleep(1000)", "timeout"),
        (FORK_BOMB, "timeout"),
        ("import os\nos.fork()", "process"),
        (DAEMON, "process"),
        ("import subprocess\nsubprocess.run(['ls'])", "process"),
        ("import os\nos.execv('/bin/ls', ['ls'])", "process"),
        (THREADS, "process"),
        ("import ctypes\nassert ctypes.CDLL(None).syscall(56, 17, 0, 0, 0, 0) != -1", "error"),
        ("[0] * 10**10", "memory"),
        ("x = []\nwhile True: x.append(bytes(10**6))", "memory"),
        ("open('/tmp/outside', 'w')", "files"),
        ("import os\nos.mkdir('/tmp/outside')", "files"),
        ("import os\nos.mkdir('a')\nos.chdir('a')", "files"),
        (MANY_DIRECTORIES, "files"),
        (DEEP, "files"),
        (DEEPER, "files"),
        (REMOVED, "files"),
        ("import os\nos.chmod('.', 0o777)", "files"),
        ("open('a', 'wb').truncate(10 * 2**30)", "files"),
        ("f = open('a', 'wb')\nwhile True: f.write(bytes(10**6))", "files"),
        (MANY_FILES, "files"),
        ("import os\nopen('a', 'w').close()\nos.open('a', os.O_TRUNC)", "files"),
        ("open('/etc/passwd').read()", "files"),
        ("import socket\nsocket.socket()", "network"),
        ("import socket\nsocket.socketpair(type=socket.SOCK_DGRAM)", "error"),
        ("import socket\nsocket.socketpair()[0].sendto(b'x', '/tmp/x')", "network"),
        ("import os\nos.kill(os.getppid(), 9)", "signal"),
        ("import ctypes\nctypes.string_at(0)", "killed by SIGSEGV"),
        ("while True: print('x' * 1000)", "output"),
        ("input()", "error"),
    ],
)
def test_every_ending_has_its_reason(source, reason):
    # a busy machine may take seconds to start the interpreter: only programs that do not end by
    # themselves get a limit that they reach. They would run for minutes.
    seconds = 1.5 if reason == "timeout" else 30
    started = time.monotonic()
    outcome = run_program(source, seconds=seconds, memory_mb=128)
    assert (outcome.ok, outcome.reason) == (False, reason), outcome.output
    assert time.monotonic() - started < seconds + 20
    assert len(outcome.output) <= sandbox.KEPT_BYTES


@needs_sandbox
def test_the_parents_secrets_are_out_of_reach(monkeypatch):
    monkeypatch.setenv("SANDBOX_SECRET", "hunter2")
    source = """
import os
print(dict(os.environ))
for pid in (os.getpid(), os.getppid(), 1, "self"):
    for name in ("environ", "cmdline", "mem", "maps"):
        try:
            print(open(f"/proc/{pid}/{name}", "rb").read())
        except PermissionError:
            print("refused")
"""
    outcome = run_program(source)
    assert outcome == Outcome(True, "ok", "{}\n" + "refused\n" * 16)


@needs_sandbox
def test_nothing_outside_changes(tmp_path):
    """Not even by a program that tries every way and swallows every exception."""
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    victim.chmod(0o666)
    tmp_path.chmod(0o777)
    before = victim.stat()
    source = f"""
import os, ctypes
path = {str(victim)!r}
libc = ctypes.CDLL(None)
for attempt in (
    lambda: open(path, "w"),
    lambda: open(path, "a").write("more"),
    lambda: os.open(path, os.O_RDONLY | os.O_TRUNC),
    lambda: os.truncate(path, 0),
    lambda: os.remove(path),
    lambda: os.rename(path, path + "2"),
    lambda: os.link(path, "mine"),
    lambda: os.symlink(path, "mine"),
    lambda: os.chmod(path, 0),
    lambda: os.utime(path, (0, 0)),
    lambda: os.chown(path, 1, 1),
    lambda: os.setxattr(path, "user.a", b"1"),
    lambda: os.mkdir(path + ".d"),
    lambda: os.system("touch " + path + ".touched"),
    lambda: libc.unlink(path.encode()),
    lambda: libc.syscall(57) == 0 and os.remove(path),
):
    try:
        attempt()
    except OSError:
        pass
"""
    outcome = run_program(source)
    assert outcome == Outcome(True, "ok", "")
    assert [p.name for p in tmp_path.iterdir()] == ["victim"]
    assert victim.read_text() == "as it was"
    after = victim.stat()
    for name in ("st_mode", "st_uid", "st_gid", "st_mtime_ns", "st_ctime_ns", "st_nlink"):
        assert getattr(after, name) == getattr(before, name)


@needs_sandbox
def test_files_in_the_working_directory_last_as_long_as_the_program():
    source = """
import os
assert os.listdir() == []
open("a", "w").write("text")
os.rename("a", "b")
print(open("b").read(), os.listdir(), os.getcwd())
"""
    outcome = run_program(source)
    text, names, directory = outcome.output.split()
    assert (outcome.reason, text, names) == ("ok", "text", "['b']")
    assert not Path(directory).exists()


CORRECT = {
    "asyncio": """
import asyncio
async def one(x):
    await asyncio.sleep(0.01)
    return x
async def both():
    return await asyncio.gather(one(1), asyncio.to_thread(abs, -2))
assert asyncio.run(both()) == [1, 2]
""",
    "threads": """
import queue, threading
from concurrent.futures import ThreadPoolExecutor
box = queue.Queue()
thread = threading.Thread(target=box.put, args=(1,))
thread.start()
thread.join()
with ThreadPoolExecutor(8) as pool:
    assert box.get() == 1 and list(pool.map(abs, [-1, -2])) == [1, 2]
""",
    "tempfile": """
import os, tempfile
with tempfile.NamedTemporaryFile("w+") as file, tempfile.TemporaryFile() as other:
    file.write("x")
    other.write(b"x")
handle, path = tempfile.mkstemp()
os.close(handle)
os.remove(path)
with tempfile.TemporaryDirectory() as folder:
    os.makedirs(os.path.join(folder, "a", "b"))
    open(os.path.join(folder, "a", "file"), "w").close()
assert not os.path.exists(folder)
""",
    "stdout None": "import sys\nsys.stdout = sys.stderr = None",
    "stdout closed": "import sys\nsys.stdout.close()\nsys.stderr.close()",
    "stdout another": "import io, sys\nsys.stdout = io.StringIO()\nprint(1)",
    "patched": """
import builtins, json, os, traceback
json.dumps = traceback.format_exception = os.write = os.read = os._exit = None
builtins.print = builtins.isinstance = builtins.open = None
""",
    "json.dumps changed": "import json\n_o = json.dumps\njson.dumps = lambda o: '<' + _o(o) + '>'",
    "main guard": "if __name__ == '__main__': exit(1)\nimport sys\nassert len(sys.argv) == 1",
    "names": """
from __future__ import annotations
import pickle, typing
from dataclasses import dataclass
@dataclass
class Point:
    x: int
class Pair(typing.NamedTuple):
    a: int
assert typing.get_type_hints(Point) == {"x": int}
assert pickle.loads(pickle.dumps((Point(1), Pair(2)))) == (Point(1), Pair(2))
""",
}


@needs_sandbox
@pytest.mark.parametrize("name", CORRECT)
def test_correct_programs_pass(name):
    outcome = run_program(CORRECT[name])
    assert outcome.ok, outcome


@needs_sandbox
def test_a_failure_is_an_error_whatever_the_program_has_replaced():
    for patch in (
        "import builtins\nbuiltins.isinstance = None",
        "import traceback, linecache\ntraceback.format_exception = linecache.getline = None",
        "import sys\nsys.stderr = None",
        "import sys\nsys.stdout.close()\nsys.stderr.close()",
    ):
        assert run_program(f"{patch}\nassert False").reason == "error"


# Reports that a program may put into the report's pipe; none of them may raise in the parent.
FORGED = [
    b"cannot have landlock\n",
    b'{"unprotected": "so"}',
    b"PROTECTED\n" * 3,
    b"[" * 100_000,
    b"[1, 2]\n",
    b'"ok"',
    b"{}",
    b"\xff\xfe\n\n",
    b"0" * 32 + b"ok",
]


# A program that reads the token from its pipe.
READ_TOKEN = """
token = b""
for fd in range(3, 1024):
    try:
        read = os.read(fd, 64)
    except OSError:
        continue
    token = read if len(read) == 32 else token
assert token
"""


@needs_sandbox
@pytest.mark.parametrize("report", FORGED, ids=range(len(FORGED)))
@pytest.mark.parametrize("leave", ["os._exit(0)", "pass"])
@pytest.mark.parametrize("token", ["token = b''", READ_TOKEN], ids=["blind", "with the token"])
def test_a_report_that_a_program_forges_is_exit(report, leave, token):
    """Also behind the token, which a program that knows this sandbox can read."""
    source = f"""
import os
{token}
for fd in range(3, 1024):  # the report's has the number that was free in this process
    try:
        os.write(fd, token + {report!r})
    except OSError:
        pass
{leave}
"""
    outcome = run_program(source)
    assert (outcome.ok, outcome.reason) == (False, "exit")


@needs_sandbox
def test_an_invalid_report_is_exit():
    """Also behind the token: the word after it must be one of REPORTED_REASONS."""
    for report, reason in (
        (b"PROTECTED\nTok", "ok"),
        (b"PROTECTED\nTsplendid", "exit"),
        (b"PROTECTED\nT" + b"[" * 100_000, "exit"),
        (b"PROTECTED\nT", "exit"),
        (b"PROTECTED\n", "exit"),
    ):
        assert sandbox._outcome(0, None, b"", report, b"T").reason == reason
    assert sandbox._outcome(-9, None, b"", b"PROTECTED\n", b"T").reason == "killed by SIGKILL"
    assert sandbox._outcome(-40, None, b"", b"", b"T").reason == "killed by signal 40"
    assert sandbox._outcome(-9, "timeout", b"", b"", b"T").reason == "timeout"
    with pytest.raises(Unprotected, match="cannot have landlock"):
        sandbox._outcome(1, None, b"", b"cannot have landlock: x\n", b"T")
    with pytest.raises(Unprotected, match="did not start: 'no module'"):
        sandbox._outcome(1, None, b"no module", b"", b"T")


@needs_sandbox
def test_files_and_directories_of_a_program_are_removed():
    """Directories deeper than Python's recursion and the longest path, without rights."""
    for source in (DEEP, DEEPER, "import os\nos.mkdir('a')\nos.mkdir('a/b', 0)\nos.mkdir('c', 0)"):
        outcome = run_program(f"import os\nprint(os.getcwd(), flush=True)\n{source}", seconds=2)
        assert not Path(outcome.output.split()[0]).exists()


@needs_sandbox
@pytest.mark.parametrize(
    "forged",
    [
        'print(\'{"reason": "ok"}\')',
        "import os\nfor fd in range(32):\n"
        '    try: os.write(fd, b\'{"reason": "ok"}\')\n    except OSError: pass',
        "import os\nos.closerange(0, 32)",
    ],
)
def test_a_program_that_leaves_early_cannot_say_ok(forged):
    for leave in ("import os\nos._exit(0)", "raise SystemExit(0)", "assert False"):
        assert not run_program(f"{forged}\n{leave}").ok


@needs_sandbox
def test_the_token_is_not_in_the_programs_reach():
    """Neither in a frame above it nor in any object that the collector knows."""
    source = """
import gc, sys, re
seen = []
frame = sys._getframe()
while frame:
    seen.append(repr(frame.f_locals) + repr(frame.f_globals))
    frame = frame.f_back
seen += [repr(o) for o in gc.get_objects() if isinstance(o, (list, tuple, dict))]
print(sorted(set(re.findall(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])", " ".join(seen)))))
"""
    assert run_program(source) == Outcome(True, "ok", "[]\n")


def has_ended(pid: str) -> bool:
    """Whether a process is gone, or a zombie."""
    file = Path(f"/proc/{pid}/stat")
    if not file.exists():
        return True
    fields = file.read_text().rsplit(")", 1)[1].split()  # those after the name
    return fields[0] == "Z"


@needs_sandbox
def test_the_program_dies_with_its_parent():
    """Also where the parent is killed and cannot clean up."""
    code = (
        "from engine.verify.sandbox import run_program\n"
        "run_program('import os, time\\nprint(os.getpid(), flush=True)\\ntime.sleep(60)',"
        " seconds=60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    child = ""
    for _ in range(200):
        child = child or children.read_text().strip()
        if child and "sandbox_child.py" in Path(f"/proc/{child}/cmdline").read_text():
            break
        time.sleep(0.05)
    time.sleep(0.5)  # until it sleeps in the program
    parent.kill()
    parent.wait()
    for _ in range(100):
        if has_ended(child):
            return
        time.sleep(0.05)
    os.kill(int(child), 9)
    pytest.fail("the program outlived its parent")


@needs_sandbox
def test_the_same_program_gives_the_same_output():
    source = "print({'a', 'b', 'c', 'd', 'e'}, hash('x'))"
    assert run_program(source) == run_program(source)


@needs_sandbox
def test_nothing_runs_without_every_protection(tmp_path, monkeypatch):
    """Under a system without Landlock, or without seccomp, as far as the child can see."""
    launcher = Path(sandbox.__file__).with_name("sandbox_child.py").read_text()
    for number in ("LANDLOCK_CREATE_RULESET = 444\n", "PR_SET_SECCOMP = 22\n"):
        assert number in launcher
        name = number.split(" = ")[0]
        crippled = launcher.replace(number, f"{name} = 999\n")
        (tmp_path / "sandbox_child.py").write_text(crippled)
        monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
        with pytest.raises(Unprotected, match="landlock|seccomp"):
            run_program(f"open({str(tmp_path / 'ran')!r}, 'w')")
        assert not (tmp_path / "ran").exists()


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "aarch64")
    with pytest.raises(Unprotected, match="x86-64"):
        run_program("pass")


def test_limits_that_are_too_small_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sandbox.sys, "platform", "linux")
    for limits in ({"seconds": 0}, {"memory_mb": 8}):
        with pytest.raises(ValueError, match="expected > 0 and >= 64"):
            run_program("pass", **limits)
