"""The sandbox: what a program must not do it cannot, and each ending has a name of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from engine import sandbox
from engine.sandbox import Outcome, Unprotected, run_program

try:
    AVAILABLE = run_program("pass").ok
    WHY = ""
except Unprotected as error:
    AVAILABLE, WHY = False, str(error)

needs_sandbox = pytest.mark.skipif(not AVAILABLE, reason=WHY)


@needs_sandbox
def test_a_program_that_ends_is_ok():
    assert run_program("import math, hashlib\nprint(math.gcd(12, 18))") == Outcome(
        True, "ok", "6\n"
    )


FORK_BOMB = """
import os
while True:
    try:
        os.fork()
    except OSError:
        pass
"""
MANY_FILES = "i = 0\nwhile True:\n    i += 1\n    open(str(i), 'wb').write(bytes(10**7))"
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
        ("import threading\nthreading.Thread(target=print).start()", "process"),
        ("[0] * 10**10", "memory"),
        ("x = []\nwhile True: x.append(bytes(10**6))", "memory"),
        ("open('/tmp/outside', 'w')", "files"),
        ("import os\nos.mkdir('inside')", "files"),
        ("import os\nos.chmod('.', 0o777)", "files"),
        ("open('a', 'wb').truncate(10 * 2**30)", "files"),
        ("f = open('a', 'wb')\nwhile True: f.write(bytes(10**6))", "files"),
        (MANY_FILES, "files"),
        ("import os\nopen('a', 'w').close()\nos.open('a', os.O_TRUNC)", "files"),
        ("open('/etc/passwd').read()", "files"),
        ("import socket\nsocket.socket()", "network"),
        ("import socket\nsocket.socketpair()", "error"),
        ("import os\nos.kill(os.getppid(), 9)", "signal"),
        ("import ctypes\nctypes.string_at(0)", "killed by SIGSEGV"),
        ("while True: print('x' * 1000)", "output"),
        ("input()", "error"),
    ],
)
def test_every_ending_has_its_reason(source, reason):
    started = time.monotonic()
    outcome = run_program(source, seconds=1.5, memory_mb=128)
    assert (outcome.ok, outcome.reason) == (False, reason), outcome.output
    assert time.monotonic() - started < 5
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
    """A program that tries everything and swallows every exception changes nothing."""
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
def test_files_in_the_working_directory_are_kept_while_it_runs_and_removed_after():
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
seen, frame = [], sys._getframe()
while frame:
    seen.append(repr(frame.f_locals) + repr(frame.f_globals))
    frame = frame.f_back
seen += [repr(o) for o in gc.get_objects() if isinstance(o, (list, tuple, dict))]
print(sorted(set(re.findall(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])", " ".join(seen)))))
"""
    assert run_program(source) == Outcome(True, "ok", "[]\n")


@needs_sandbox
def test_it_dies_with_its_parent():
    """Also where the parent is killed and cannot clean up."""
    code = (
        "from engine.sandbox import run_program\n"
        "run_program('import os, time\\nprint(os.getpid(), flush=True)\\ntime.sleep(60)',"
        " seconds=60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
    child = ""
    for _ in range(200):
        child = child or children.read_text().strip()
        if child and "sandboxed.py" in Path(f"/proc/{child}/cmdline").read_text():
            break
        time.sleep(0.05)
    time.sleep(0.5)  # until it sleeps in the program
    parent.kill()
    parent.wait()
    state = Path(f"/proc/{child}/stat")
    for _ in range(100):
        if not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(int(child), 9)
    pytest.fail("the program outlived its parent")


@needs_sandbox
def test_the_same_program_gives_the_same_output():
    source = "print({'a', 'b', 'c', 'd', 'e'}, hash('x'))"
    assert run_program(source) == run_program(source)


@needs_sandbox
def test_what_cannot_be_protected_is_not_run(tmp_path, monkeypatch):
    """The launcher under a system without Landlock, or without seccomp: nothing runs."""
    launcher = Path(sandbox.__file__).with_name("sandboxed.py").read_text()
    for there, gone in (("LANDLOCK_CREATE, LANDLOCK_ADD", "444"), ("PR_SET_SECCOMP", "22")):
        assert there in launcher
        crippled = launcher.replace(f" {gone},", " 999,").replace(f", {gone}, ", ", 999, ")
        assert crippled != launcher
        (tmp_path / "sandboxed.py").write_text(crippled)
        monkeypatch.setattr(sandbox, "__file__", str(tmp_path / "sandbox.py"))
        with pytest.raises(Unprotected, match="landlock|seccomp"):
            run_program(f"open({str(tmp_path / 'ran')!r}, 'w')")
        assert not (tmp_path / "ran").exists()


def test_other_systems_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "aarch64")
    with pytest.raises(Unprotected, match="x86-64"):
        run_program("pass")


def test_limits_that_make_no_sense_are_refused(monkeypatch):
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sandbox.sys, "platform", "linux")
    for limits in ({"seconds": 0}, {"memory_mb": 8}):
        with pytest.raises(ValueError, match="wanted"):
            run_program("pass", **limits)
