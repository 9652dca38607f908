"""The benchmarks of kernels and steps: what is wrong gets no time, floors are arithmetic."""

import dataclasses
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import clock, operations, step, work
from benchmarks import kernels as bench
from kernels import registry
from kernels.launch import triton_launch
from kernels.registry import REFERENCE, SPECS, TORCH
from kernels.spec import MODELS


@pytest.fixture(autouse=True)
def small_ceilings(monkeypatch):
    """The machine is not measured in a test."""
    monkeypatch.setattr(bench, "ceilings", lambda *_: {"flops": 1e12, "bytes": 1e11})
    monkeypatch.delenv("OUT", raising=False)


def document(capsys):
    out = capsys.readouterr().out
    return out, json.loads(out.splitlines()[-1])


def test_a_run_ends_in_json_and_is_recorded(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(triton_launch, "why_unavailable", lambda device: "no card here")
    bench.main(["--kernel", "swiglu", "--slot", "0.01", "--device", "cpu", "--dtype", "fp32"])
    out, last = document(capsys)
    assert "our kernels are not timed: no card here" in out
    assert {r["form"] for r in last["results"]} == {"eager", "torch"}
    assert json.loads((tmp_path / "kernels.jsonl").read_text()) == last
    first = last["results"][0]
    assert tuple(first["shape"]) in SPECS["swiglu"].bench_shapes
    low, median, high = first["ms"]
    assert 0 < low <= median <= high and first["calls"] >= 3
    assert first["x_floor"] == pytest.approx(median / first["floor_ms"])
    assert {"commit", "torch", "triton", "device", "driver", "date"} <= last["environment"].keys()


def test_the_record_goes_to_the_results_of_the_clone(capsys, tmp_path, monkeypatch):
    """Appended, unless $OUT is set (above) or it is a rehearsal."""
    monkeypatch.setattr(clock, "RESULTS", tmp_path)
    monkeypatch.setattr(triton_launch, "why_unavailable", lambda device: "no card here")
    asked = ["--kernel", "swiglu", "--device", "cpu", "--dtype", "fp32", "--rows", "1"]
    for n in (1, 2):
        bench.main([*asked, "--slot", "0.01"])
        assert len((tmp_path / "kernels.jsonl").read_text().splitlines()) == n
    bench.main([*asked, "--dry"])
    assert len((tmp_path / "kernels.jsonl").read_text().splitlines()) == 2
    _, last = document(capsys)
    assert last["results"] == [], "the rehearsal's shape has three rows"


def test_a_linear_of_the_users_own_shape(capsys, tmp_path, monkeypatch):
    """M, K, N, r: forward and backward of one matrix with its adapter, peft's form beside it."""
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setattr(triton_launch, "why_unavailable", lambda device: "no card here")
    where = ["--device", "cpu", "--dtype", "fp32", "--slot", "0.01"]
    bench.main(["--backward", "--shape", "5,24,16,4", *where])
    _, last = document(capsys)
    assert {r["form"] for r in last["results"]} == {"eager", "peft", "torch"}
    for r in last["results"]:
        assert (r["operation"], r["shape"]) == ("lora_linear", [5, 24, 4, 16])
    for wrong in (["--shape", "5,24,16"], ["--shape", "5,24,16,4", "--kernel", "swiglu"]):
        with pytest.raises(SystemExit):
            bench.main([*wrong, *where])
    said = capsys.readouterr().err
    assert "expected four numbers" in said and "not of swiglu" in said


def test_a_red_form_has_no_time(capsys, monkeypatch):
    """A kernel that is 1 % off is named RED beside the timed ones, and the run fails."""

    def wrong(gate_up):
        return TORCH.swiglu_forward(gate_up) * 1.01

    planted = dataclasses.replace(TORCH, name="triton", swiglu_forward=wrong)
    monkeypatch.setattr(registry, "TRITON", planted)
    monkeypatch.setattr(registry, "VARIANTS", {})
    monkeypatch.setattr(triton_launch, "why_unavailable", lambda device: None)
    dry = ["--dry", "--kernel", "swiglu", "--device", "cpu", "--dtype", "fp32"]
    with pytest.raises(SystemExit) as stopped:
        bench.main(dry)
    assert stopped.value.code == 1
    out, last = document(capsys)
    (red,) = (r for r in last["results"] if r["form"] == "triton")
    assert "ms" not in red and "RED, not timed: AssertionError: swiglu h" in red["skipped"]
    assert "triton: RED" in out and all("ms" in r for r in last["results"] if r is not red)


def test_variants_have_names_of_their_own(monkeypatch):
    fused = dataclasses.replace(TORCH, lora_linear_forward=operations.peft_forward)
    monkeypatch.setattr(registry, "TRITON", dataclasses.replace(TORCH, name="triton", rope_=None))
    monkeypatch.setattr(registry, "VARIANTS", {"lora_linear fused": fused})
    assert [t.name for t in bench.our_tables("rope")] == ["triton"]
    assert [t.name for t in bench.our_tables("lora_linear")] == ["triton fused"]
    assert bench.our_tables("swiglu") == []


@pytest.mark.parametrize("operation", SPECS)
def test_every_call_runs_on_drawn_inputs(operation):
    """REFERENCE and TORCH agree call by call, so each form times the same thing."""
    shape = SPECS[operation].test_shapes[1]
    calls = {key: call for key, call in operations.CALLS.items() if key[0] == operation}
    assert calls and all(key in work.WORK for key in calls)
    assert SPECS[operation].fields, "no function of the operation is known"
    for call in calls.values():
        outs = []
        for ops in (REFERENCE, TORCH):
            inputs = operations.make_inputs(operation, shape, torch.float32, "cpu")
            out = call.run(ops, inputs, call.saved(ops, inputs))
            outs.append(out if isinstance(out, tuple) else (out,))
        for want, got in zip(*outs, strict=True):
            if isinstance(want, torch.Tensor):
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4, check_dtype=False)


@pytest.mark.parametrize("operation", ["rms_norm", "swiglu", "lora_linear", "attention"])
def test_autograd_times_the_same_backward(operation):
    """The graph whose backward stands beside ours gives our gradients."""
    inputs = operations.make_inputs(
        operation, SPECS[operation].test_shapes[1], torch.float32, "cpu"
    )
    for (name, _), call in operations.CALLS.items():
        if name != operation or call.graph is None:
            continue
        ours = call.run(TORCH, inputs, call.saved(TORCH, inputs))
        for ops in [REFERENCE, *([operations.BY_HAND[name]] if name in operations.BY_HAND else [])]:
            outs, leaves, douts = call.graph(ops, inputs)
            theirs = torch.autograd.grad(outs, leaves, douts)
            by_parts = operation == "attention" and ops is not REFERENCE  # dq, dk, dv
            theirs = torch.cat(theirs, dim=1).flatten(1) if by_parts else theirs[0]
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lengths", [(5, 5, 5), (7, 1, 30)])
@pytest.mark.parametrize("groups", [1, 4])
def test_forms_by_hand_compute_the_same(lengths, groups):
    inputs = operations.make_inputs("attention", (4, groups, 16, *lengths), torch.float32, "cpu")
    args = (inputs["qkv"], inputs["packed"], 4, groups)
    outs = operations.sdpa_forward(*args)[0]
    assert len(outs) == (1 if len(set(lengths)) == 1 else len(lengths))
    torch.testing.assert_close(torch.cat(outs), REFERENCE.attention_forward(*args)[0])
    inputs = operations.make_inputs("lora_linear", (5, 24, 8, 16, 8, 8), torch.float32, "cpu")
    args = (inputs["x"], inputs["w"], inputs["group"])
    ours = REFERENCE.lora_linear_forward(*args)[0]
    torch.testing.assert_close(torch.cat(operations.peft_forward(*args)[0], dim=1), ours)


class Copies(TorchDispatchMode):
    """Collects the operations inside that copy whole tensors."""

    COPY = ("copy_", "clone", "cat", "contiguous", "_to_copy", "stack", "index_select")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in self.COPY:
            self.found.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lengths", [(16, 16, 16), (7, 1, 30)])
@pytest.mark.parametrize("operation", operations.BY_HAND)
def test_no_copy_of_ours_is_timed_with_a_form_by_hand(operation, lengths):
    """Forwards and backwards: what is timed is the work of torch's own operators."""
    shape = (4, 4, 16, *lengths) if operation == "attention" else (5, 24, 8, 16, 8, 8)
    inputs = operations.make_inputs(operation, shape, torch.float32, "cpu")
    ops = operations.BY_HAND[operation]
    with Copies() as forward:
        operations.CALLS[operation, "forward"].run(ops, inputs, None)
    assert forward.found == []
    outs, leaves, douts = operations.CALLS[operation, "backward"].graph(ops, inputs)
    with Copies() as backward:
        torch.autograd.grad(outs, leaves, douts, retain_graph=True)
    assert backward.found == []
    with Copies() as seen:
        torch.cat((outs[0], outs[0]))
    assert seen.found == ["cat"]


def test_floors_equal_counts_by_hand():
    """q, k, v of Llama-2-7B at 8192 tokens, r 8 on q and v, bf16; a norm with its addition."""
    T, D, r = 8192, 4096, 8
    flops, size = work.WORK["lora_linear", "forward"](T, D, r, D, D, D, e=2)
    assert flops == 2 * T * D * 3 * D + 2 * (2 * T * D * r) * 2
    base, adapters = T * D + 3 * D * D + 3 * T * D, 2 * r * D + 2 * r * D
    assert size == 2 * (base + adapters + T * 2 * r)
    back, moved = work.WORK["lora_linear", "backward"](T, D, r, D, D, D, e=2)
    assert back == flops + 2 * T * adapters and moved == size + 2 * T * D + 8 * adapters
    assert work.WORK["rms_norm", "add forward"](T, D, e=2)[1] == 4 * T * D * 2
    # four rows of 2048: the published 137.4 GFLOP of a layer's causal forward
    flops, _ = work.WORK["attention", "forward"](32, 32, 128, *([2048] * 4), e=2)
    assert flops == pytest.approx(137.4e9, rel=1e-3)


def test_shapes_as_text():
    assert bench.shape_text((32, 8, 128, 2048, 2048, 2048, 2048)) == "32x8x128x2048*4"
    assert work.rows_of("attention", (32, 8, 128, 2048, 2048)) == 4096
    assert work.rows_of("cached_attention", (32, 8, 128, 64, 1, 1, 512, 512)) == 2


def test_operations_of_a_training_step():
    """Llama-2-7B: 26.4 GFLOP per token in the weights and 1.88 in attention at rows of 2048."""
    config = step.model_config("llama-2-7b")
    per_token = step.step_operations(config, [2048] * 4) / 8192
    assert per_token == pytest.approx(28.3e9, rel=2e-3)
    assert config.hidden_size == MODELS["llama-2-7b"].D
    weights = step.random_weights(step.model_config("tiny"), "cpu", torch.float32)
    assert weights["1.gate_up"].shape == (192, 64) and weights["head"].shape == (320, 64)


def test_a_step_of_every_table(capsys, monkeypatch):
    monkeypatch.setattr(step, "ceilings", lambda *_: {"flops": 1e12, "bytes": 1e11})
    tiny = ["--model", "tiny", "--tokens", "24", "--row", "10", "--steps", "1", "--device", "cpu"]
    decode = ["--rows", "2", "--prompt", "5", "--new", "4", "--dtype", "fp32"]
    step.main([*tiny, "--dtype", "fp32", "--no-decode", "--ops", "torch,reference"])
    out, last = document(capsys)
    ours, reference = last["training"]["torch"], last["training"]["reference"]
    assert ours["first_grad_norm"] == pytest.approx(reference["first_grad_norm"], rel=1e-4)
    assert ours["loss"] < ours["first_loss"], "AdamW has stepped"
    assert last["decoding"] == {} and "rows of 10 packed" in out
    step.main([*tiny, *decode, "--ops", "torch"])
    out, last = document(capsys)
    assert last["decoding"]["torch"]["sampled"]["rows_as_first"] == 2
    assert last["decoding"]["torch"]["greedy"]["tokens_s"] > 0 and "torch, greedy" in out
