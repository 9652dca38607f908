"""The training benchmark: a peer that runs out of memory is named so, and the others go on."""

import sys

import pytest

from benchmarks import processes, train
from benchmarks.processes import OutOfMemory, why_out_of_memory

ANSWERS = """
import json, os, signal, sys
for line in sys.stdin:
    number = int(line.split()[-1])
    {what}
    told = {{"loss": 2.0, "grad_norm": 1.0, "seconds": 0.5, "rss": 10**9}}
    print(json.dumps(told), flush=True)
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL) if number == {} else None"
TORCHS = "RuntimeError: [enforce fail at alloc_cpu.cpp:116] DefaultCPUAllocator: can't allocate"
RAISES = f'sys.exit("{TORCHS}") if number == {{}} else None'


def engine(name, what="pass"):
    return train.Engine(name, [sys.executable, "-c", ANSWERS.format(what=what)])


def turns(*engines, count=3):
    products = engine("the products")
    try:
        return train.take_turns(list(engines), products, count)
    finally:
        for one in (*engines, products):
            one.close()


@pytest.mark.parametrize("what", [KILLED, RAISES])
@pytest.mark.parametrize("step", [0, 2])
def test_a_peer_without_memory_is_named_and_the_others_go_on(capsys, what, step):
    peers = engine("peft, 8 rows", what.format(step)), engine("peft, 2 rows")
    ours = engine("ours")
    floors, lost = turns(ours, *peers)
    assert floors == [0.5] * 3 and list(lost) == ["peft, 8 rows"]
    assert lost["peft, 8 rows"].startswith("out of memory (")
    assert [len(e.steps) for e in (ours, *peers)] == [3, step, 3]
    assert "peft, 8 rows: out of memory (" in capsys.readouterr().err
    steps = [[{"ids": [1] * 10}]] * 3
    found = train.report("all", steps, [ours, *peers], floors[1:], lost)
    out = capsys.readouterr().out
    assert f"peft, 8 rows  {lost['peft, 8 rows']}" in out and "1.00x peft, 2 rows (its best)" in out
    assert found["engines"].keys() == {"ours", "peft, 2 rows"} and found["lost"] == lost


def test_a_peer_killed_while_it_waits_is_noticed():
    peer = engine("peft, 4 rows")
    peer.ask("0")
    peer.process.kill()
    peer.process.wait()
    with pytest.raises(OutOfMemory, match=r"out of memory \(killed\)"):
        peer.ask("1")
    peer.close()


def test_no_peer_left_means_no_speed(capsys):
    ours = engine("ours")
    floors, lost = turns(ours, engine("peft, 8 rows", KILLED.format(1)))
    found = train.report("all", [[{"ids": [1]}]] * 3, [ours], floors[1:], lost)
    assert found == {"engines": {}, "lost": {"peft, 8 rows": "out of memory (killed)"}}
    assert "no peer is left to agree with" in capsys.readouterr().out


def test_other_failures_and_our_own_end_the_benchmark():
    with pytest.raises(SystemExit, match="ended with code 1:\nno such model"):
        turns(engine("ours"), engine("peft, 2 rows", "sys.exit('no such model')"))
    with pytest.raises(SystemExit, match="ours: out of memory"):
        turns(engine("ours", KILLED.format(0)), engine("peft, 2 rows"))


def test_reasons_why_a_process_ended():
    assert why_out_of_memory(-9, "") == why_out_of_memory(137, "") == "out of memory (killed)"
    reason = why_out_of_memory(1, "a\n  torch.OutOfMemoryError: CUDA out of memory. Tried\nb")
    assert reason.startswith("out of memory (torch.OutOfMemoryError")
    assert why_out_of_memory(1, f"Traceback\n{TORCHS}") == f"out of memory ({TORCHS})"
    assert why_out_of_memory(1, "ValueError: no such file") is None
    assert why_out_of_memory(-15, "") is None


def test_a_single_run_without_memory_is_named(tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(f"import sys; sys.exit({TORCHS!r})")
    with pytest.raises(OutOfMemory, match="DefaultCPUAllocator"):
        processes.run([sys.executable, str(script)], {}, malloc=False)
    script.write_text("import sys; sys.exit('something else')")
    with pytest.raises(SystemExit, match="something else"):
        processes.run([sys.executable, str(script)], {}, malloc=False)
