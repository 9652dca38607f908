"""Programs that tests fork are as real as those that they start (tests/helpers/programs.py)."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import programs

SEEN = """
import __main__, json, os, signal, sys
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "name": __name__,
    "file": getattr(__main__, "__file__", None),
    "directory": os.getcwd(),
    "variables": {name: os.environ.get(name) for name in ("RANK", "OMP_NUM_THREADS", "HOME")},
    "interrupt": str(signal.getsignal(signal.SIGINT)),
}))
print("an error", file=sys.stderr)
sys.exit(3)
"""


pytestmark = pytest.mark.skipif("programs.are_real", reason="here every program is started")


def outcome(done):
    """What a run of SEEN tells."""
    return json.loads(done.stdout), done.stderr, done.returncode


@pytest.mark.parametrize("form", ["file", "code", "module"])
def test_a_forked_program_sees_what_a_started_one_does(tmp_path, form):
    (tmp_path / "seen.py").write_text(SEEN)
    forms = {"file": [tmp_path / "seen.py"], "code": ["-c", SEEN], "module": ["-m", "seen"]}
    command = [sys.executable, *forms[form], "--flag", "a value"]
    how = {"cwd": tmp_path, "env": os.environ | {"RANK": "1", "OMP_NUM_THREADS": "1"}}
    started = subprocess.run(command, capture_output=True, text=True, **how)
    assert outcome(programs.run(command, **how)) == outcome(started)
    program = programs.start(command, **how, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert isinstance(program, programs.Program) and program.wait() == 3


def test_it_is_another_process_with_torch_imported_and_no_thread_but_its_own():
    code = (
        "import os, sys; print('torch' in sys.modules, len(os.listdir('/proc/self/task')));"
        "import torch; print(torch.get_num_threads(), os.getpid())"
    )
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    said = programs.run([sys.executable, "-c", code], env=variables).stdout.split()
    assert said[:3] == ["True", "1", "1"] and int(said[3]) != os.getpid()


def test_it_dies_of_signals_and_exceptions_as_any_process():
    code = "import os, signal; os.kill(os.getpid(), signal.{})"
    for name in ("SIGKILL", "SIGTERM", "SIGSEGV"):
        done = programs.run([sys.executable, "-c", code.format(name)])
        assert done.returncode == -signal.Signals[name]
    done = programs.run([sys.executable, "-c", "1 / 0"])
    assert done.returncode == 1 and done.stderr.endswith("ZeroDivisionError: division by zero\n")
    with pytest.raises(subprocess.CalledProcessError):
        programs.run([sys.executable, "-c", "1 / 0"], check=True)


def test_it_can_be_watched_killed_and_timed_out():
    waiting = [sys.executable, "-c", "import time; time.sleep(60)"]
    program = programs.start(waiting)
    assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    assert program.wait(timeout=30) == program.poll() == -signal.SIGTERM
    before = time.monotonic()
    with pytest.raises(TimeoutError):
        programs.run(waiting, timeout=0.2)
    assert time.monotonic() - before < 30


def test_two_programs_in_turn_hash_strings_differently():
    code = "print(hash('a'), __import__('random').random())"
    said = [programs.run([sys.executable, "-c", code]).stdout.split() for _ in range(3)]
    hashes, drawn = zip(*said, strict=True)
    assert hashes[0] != hashes[1]
    assert len(set(drawn)) == 3, "they share a state of random"


def test_a_program_whose_imports_may_read_another_environment_is_started(monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/nowhere")
    program = programs.start([sys.executable, "-c", ""])
    assert isinstance(program, subprocess.Popen) and program.wait() == 0
    monkeypatch.undo()
    for command in (["-I", "-c", ""], ["-W", "ignore", "-c", ""]):
        program = programs.start([sys.executable, *command])
        assert isinstance(program, subprocess.Popen) and program.wait() == 0


def test_torchrun_forks_its_ranks_and_sees_how_they_end(tmp_path):
    """The ranks are children of the fork server; torchrun reports the code of the one that died."""
    job = tmp_path / "job.py"
    job.write_text(
        "import os, sys, signal\n"
        "rank, torch = os.environ['RANK'], sys.modules['torch']  # nobody imported it here\n"
        "print(f'rank {rank} of {os.environ[\"WORLD_SIZE\"]}, {torch.get_num_threads()} threads')\n"
        "sys.stdout.flush()\n"
        "if rank == sys.argv[1]:\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    for killed in ("none", "1"):
        done = programs.run([*torchrun, "--nproc-per-node=2", job, killed], timeout=120)
        assert (done.returncode == 0) == (killed == "none"), done.stderr
        assert "rank 1 of 2, 1 threads" in done.stdout
        assert ("Signal 9 (SIGKILL)" in done.stderr) == (killed == "1"), done.stderr
