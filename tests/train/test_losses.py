"""Weighted losses: each published one by autograd, the flag, and what weights may not change."""

import dataclasses
import json
import math
import re
import shutil
from inspect import getsource

import pytest
import torch

from engine.data.pack import MicroBatch
from engine.measure import seed_nll as seed_nll_module
from engine.measure.seed_nll import nll_under_seed
from engine.runtime.files import read_jsonl
from engine.train import loop as loop_module
from engine.train import step as step_module
from engine.train.config import TrainConfig
from engine.train.loop import batches
from engine.train.losses import LARGEST_LOG_RATIO, METHODS, Loss, Tokens
from engine.train.step import micro_step, step_gradients
from engine.train.train import FrozenModel, train
from engine.train.weighted_loss import WeightedLoss
from kernels.linear_cross_entropy import nll_reference
from kernels.registry import REFERENCE, TORCH
from model.llama import Llama
from tests.helpers.adapters import new_lora
from tests.helpers.training import LORA, SMALL, examples, metrics_lines, run_training

ALL = ("sft", "stm:2.5", "dft", "eaft", "eaft:2", "psft:0.2", "k3:0.02")
WEIGHTED = ALL[1:]
N, D, V = 60, 12, 40
LN_20 = math.log(20)


@pytest.fixture
def tiny(tiny_llama_dir):
    return Llama.from_pretrained(tiny_llama_dir())


# ---- the published losses: (nll n, the seed's nll s, logits) of N tokens -> the published mean


def published_sft(n, s, logits):
    return n.mean()


def published_stm(n, s, logits):
    """Cross-entropy of the labels that are left: its mean is over these alone."""
    kept = s.exp() <= 2.5
    assert 0 < kept.sum() < len(n)
    return n[kept].mean() * kept.sum() / len(n)  # to a mean over all N


def published_dft(n, s, logits):
    p = torch.softmax(logits, -1)
    assert torch.allclose(-n, p.gather(1, TARGETS[:, None])[:, 0].log())
    return -((-n).exp().detach() * -n).mean()


def published_eaft(n, s, logits, alpha=1.0, normaliser=LN_20):
    ranked = logits.detach().sort(-1, descending=True).values[:, :20]
    p = ranked.exp() / ranked.exp().sum(-1, keepdim=True)
    entropy = -(p * p.log()).sum(-1)
    return ((entropy / normaliser) ** alpha * n).mean()


def published_psft(n, s, logits):
    """PPO's clipped objective; every advantage is 1."""
    ratio = (-n - -s).exp()
    clipped = ratio.clip(1 - 0.2, 1 + 0.2)
    assert (ratio > 1.2).any() and (ratio < 0.8).any()
    return -torch.minimum(ratio * 1.0, clipped * 1.0).mean()


def published_k3(n, s, logits):
    """Schulman's estimate of KL(q || p) by x ~ q, with r = p(x) / q(x): (r - 1) - ln r."""
    log_q, log_p = -n, -s  # q the adapter, p the seed
    r = (log_p - log_q).exp()
    return (n + 0.02 * ((r - 1) - (log_p - log_q))).mean()


PUBLISHED = {
    "sft": published_sft,
    "stm:2.5": published_stm,
    "dft": published_dft,
    "eaft": published_eaft,
    "eaft:2": lambda n, s, logits: published_eaft(n, s, logits, alpha=2.0),
    "psft:0.2": published_psft,
    "k3:0.02": published_k3,
}
TARGETS = torch.randint(V, (N,), generator=torch.Generator().manual_seed(3))


def made_tokens():
    """hidden (N, D), head (V, D) in fp64, and the seed's nll: that of hidden states nearby."""
    g = torch.Generator().manual_seed(0)
    head = torch.randn(V, D, generator=g, dtype=torch.float64)
    hidden = torch.randn(N, D, generator=g, dtype=torch.float64) + 0.4 * head[TARGETS]
    nearby = hidden + 0.1 * torch.randn(N, D, generator=g, dtype=torch.float64)
    return hidden, head, nll_reference(nearby, head, TARGETS)


class OneHead:
    """As much of a model as a loss needs."""

    def __init__(self, head, ops):
        self.head = head
        self.ops = ops

    def nll(self, hidden, targets, entropy=None):
        return self.ops.linear_cross_entropy(hidden, self.head, targets, entropy=entropy)


@pytest.mark.parametrize("ops", [TORCH, REFERENCE], ids=lambda ops: ops.name)
@pytest.mark.parametrize("text", ALL)
def test_gradients_and_values_are_those_of_autograd_of_the_published_loss(text, ops):
    """fp64: 1e-9 of the largest number."""
    hidden, head, seed_nll = made_tokens()
    leaf = hidden.clone().requires_grad_()
    published = PUBLISHED[text](nll_reference(leaf, head, TARGETS), seed_nll, leaf @ head.T)
    (gradient,) = torch.autograd.grad(published, leaf)
    loss = Loss.parse(text)
    model = OneHead(head, ops)
    if loss.is_plain:
        values, ours = model.nll(hidden, TARGETS)
    else:
        batch = MicroBatch(None, None, None, TARGETS, ["a"] * 40 + ["b"] * 20)
        weighted = WeightedLoss(loss, {"a": seed_nll[:40], "b": seed_nll[40:]})
        _, ours = weighted.nll(model, hidden, batch)
        values = weighted.of_step(hidden.new_empty(0)).values
    assert abs(values.mean() - published) < 1e-9 * abs(published)
    assert (ours / N - gradient).abs().max() < 1e-9 * gradient.abs().max()


def test_llama_factory_divides_the_entropy_by_three():
    hidden, head, seed_nll = made_tokens()
    nll, logits = nll_reference(hidden, head, TARGETS), hidden @ head.T
    for alpha in (1.0, 2.0):
        theirs = published_eaft(nll, seed_nll, logits, alpha, normaliser=3.0)
        ours = published_eaft(nll, seed_nll, logits, alpha)
        assert theirs / ours == pytest.approx((math.log(20) / 3) ** alpha, rel=1e-12)


def test_the_entropy_is_that_of_the_twenty_likeliest_tokens_by_hand():
    """Plain Python; fewer than 20 tokens: all of them."""
    hidden, head, _ = made_tokens()
    for vocabulary in (V, 7):
        entropy = torch.empty(N, dtype=torch.float64)
        for ops in (TORCH, REFERENCE):
            targets = TARGETS % vocabulary
            ops.linear_cross_entropy(hidden, head[:vocabulary], targets, entropy=entropy)
            for row, found in zip((hidden @ head[:vocabulary].T).tolist(), entropy, strict=True):
                likeliest = [math.exp(z) for z in sorted(row)[-20:]]
                p = [e / sum(likeliest) for e in likeliest]
                assert found == pytest.approx(-sum(q * math.log(q) for q in p), rel=1e-9)


def test_adapter_gradients_are_the_weighted_sum_of_the_tokens_gradients(tiny_llama_dir):
    """fp64, the whole model: each token's own gradient, times its weight."""
    model = Llama.from_pretrained(tiny_llama_dir(), dtype=torch.float64)
    lora = new_lora(model, rank=3, modules="all", seed=1)
    lora.params.add_(0.05)
    rows = examples(2)
    batch = MicroBatch.build(rows, 1, model.device)
    of_token = []
    for index in range(len(batch.targets)):
        one = slice(index, index + 1)
        alone = dataclasses.replace(batch, select=batch.select[one], targets=batch.targets[one])
        lora.grads.zero_()
        micro_step(model, lora, alone, "none")
        of_token.append(lora.grads.clone())
    of_tokens = torch.stack(of_token)  # (tokens, parameters)
    for text in ("stm:300", *WEIGHTED[1:]):
        weighted = WeightedLoss(Loss.parse(text), made_seed_nll(rows))
        lora.grads.zero_()
        micro_step(model, lora, batch, "none", weighted)
        weights = weighted.of_step(lora.grads.new_empty(0)).weights  # (tokens,)
        assert len(weights.unique()) > 1
        error = (lora.grads - weights @ of_tokens).abs().max()
        assert error < 1e-9 * lora.grads.abs().max(), text


def made_seed_nll(rows, near=5.75):
    """Some nll of every response token: about ln 320, that of a random model of 320 tokens."""
    g = torch.Generator().manual_seed(1)
    found = {}
    for row in rows:
        count = len(row.ids) - row.n_prompt
        found[row.id] = near + 0.3 * torch.randn(count, generator=g, dtype=torch.float64)
    return found


@pytest.mark.parametrize("text", ["stm:300", "dft", "eaft", "psft:0.2", "k3:0.02"])
def test_gradients_do_not_depend_on_packing_and_micro_batches(tiny_llama_dir, text):
    """fp64, dropout on: one micro-batch, one row each, and any order of the rows."""
    model = Llama.from_pretrained(tiny_llama_dir(), dtype=torch.float64)
    lora = new_lora(model, rank=3, modules="all", dropout=0.2, seed=1)
    lora.params.add_(0.05)
    rows = examples(9)
    weighted = WeightedLoss(Loss.parse(text), made_seed_nll(rows))
    found = []
    for order, micro_tokens in ((rows, 10**6), (rows, 1), (rows[::-1], 64)):
        gradients = step_gradients(model, lora, order, 3, micro_tokens, "none", weighted=weighted)
        found.append((gradients.weighed.values.sum(), lora.grads.clone()))
        assert len(gradients.weighed.weights) == len(gradients.nll) == gradients.n_response
    (value, grads), *others = found
    assert grads.abs().max() > 0
    step_gradients(model, lora, rows, 3, 10**6, "full", weighted=weighted)
    assert torch.equal(lora.grads, grads), "recomputation changes no bit"
    for other_value, other_grads in others:
        assert abs(other_value - value) < 1e-9 * abs(value)
        assert (other_grads - grads).abs().max() < 1e-9 * grads.abs().max()


# ---- bounds


def test_no_ratio_makes_a_weight_or_value_infinite():
    nll = torch.tensor([1e4, 0.0, 1e4, 1.0])
    seed_nll = torch.tensor([0.0, 1e4, 1e4, 1.0])
    largest = math.exp(LARGEST_LOG_RATIO)
    psft = Loss.parse("psft:0.2").weigh(Tokens(nll, seed_nll))
    assert psft.weights.tolist() == pytest.approx([1 / largest, 0, 1, 1])
    assert psft.values.tolist() == pytest.approx([-1 / largest, -1.2, -1, -1])
    k3 = Loss.parse("k3:0.5").weigh(Tokens(nll, seed_nll))
    assert k3.weights.tolist() == pytest.approx(
        [0.5 + 0.5 * largest, 0.5 + 0.5 / largest, 1, 1], rel=1e-5
    )
    assert k3.values.isfinite().all()
    at_the_threshold = torch.tensor([math.log(2.5), math.log(2.51)], dtype=torch.float64)
    stm = Loss.parse("stm:2.5").weigh(Tokens(at_the_threshold, at_the_threshold))
    assert stm.weights.tolist() == [1, 0]


def test_the_k3_penalty_pulls_to_the_seed_and_the_published_baseline_pushes_away():
    """A token that the adapter made likelier is pushed less; the published sign pushes it more."""
    likelier = Tokens(torch.tensor([1.0]), torch.tensor([2.0]))
    unlikelier = Tokens(torch.tensor([2.0]), torch.tensor([1.0]))
    k3 = Loss.parse("k3:0.1")
    assert k3.weigh(likelier).weights.item() == pytest.approx(1 - 0.1 * (1 - math.exp(-1)))
    assert k3.weigh(unlikelier).weights.item() == pytest.approx(1 + 0.1 * (math.e - 1))
    n = torch.tensor([1.0], requires_grad=True)  # as train_with_kl.py has it: loss += -coef * k3
    log_r = n - 2.0
    (published,) = torch.autograd.grad(n - 0.1 * (log_r.exp() - 1 - log_r), n)
    assert published > 1 > k3.weigh(likelier).weights


# ---- the flag


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stm:-1", r"loss 'stm:-1': expected stm:TAU, where TAU is above 1 and at most"),
        ("stm:1", "where TAU is above 1"),
        ("stm", "loss 'stm': expected stm:TAU.*highest perplexity.*stm:2.5"),
        ("stm:nan", "loss 'stm:nan'"),
        ("stm:inf", "at most 1e[+]06"),
        ("stm:", "expected stm:TAU"),
        ("psft:0", "where EPS is above 0"),
        ("psft:x", "loss 'psft:x'"),
        ("k3:-0.1", "loss 'k3:-0.1': expected k3:BETA"),
        ("eaft:0", "where ALPHA is above 0"),
        ("eaft:", "expected eaft:ALPHA"),
        ("sft:1", "loss 'sft:1': sft takes no number"),
        ("dft:2", "dft takes no number"),
        ("kl", "expected one of sft, stm:TAU, dft, eaft.:ALPHA., psft:EPS, k3:BETA"),
        ("", "loss ''"),
    ],
)
def test_a_bad_loss_is_refused_by_name_before_any_work(text, message):
    with pytest.raises(ValueError, match=message) as error:
        dataclasses.replace(SMALL, loss=text).check()
    assert "expected" in str(error.value) and "\n" not in str(error.value)


def test_every_spelling_of_a_loss_is_one_loss():
    assert str(Loss.parse("eaft")) == str(Loss.parse("eaft:1")) == str(Loss.parse("eaft:1.0"))
    for text in ("sft", "stm:2.5", "stm:3", "dft", "eaft:1", "psft:0.28", "k3:1e-05"):
        assert str(Loss.parse(text)) == text and Loss.parse(str(Loss.parse(text))).name in METHODS
    assert [name for name in METHODS if METHODS[name].needs_seed] == ["stm", "psft", "k3"]


# ---- runs


def test_the_seed_loss_is_the_trainings_own_before_the_first_update(tiny_llama_dir, tmp_path):
    """B is 0, so every ratio is 1: the weights of k3 and psft are 1, up to rounding in fp32 and a
    hundredth in bf16. stm keeps the tokens that its threshold says."""
    path = tiny_llama_dir()
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        model = Llama.from_pretrained(path, dtype=dtype)
        for text in ("k3:0.5", "psft:0.2"):
            config = dataclasses.replace(SMALL, loss=text, max_steps=1)
            out = tmp_path / f"{text} {dtype}"
            run_training(model, out, config, lora=dataclasses.replace(LORA, dropout=0.0))
            (line,) = metrics_lines(out)
            assert line["mean_weight"] == pytest.approx(1, abs=tolerance) and line["kept"] == 1
            value = line["loss"] if text == "k3:0.5" else -1
            assert line["weighted_loss"] == pytest.approx(value, abs=tolerance)
    (file,) = out.glob("seed-nll-*.jsonl")
    nats = sorted(nll for line in read_jsonl(file) for nll in line["nll"])
    tau = math.exp(nats[len(nats) // 3])
    config = dataclasses.replace(SMALL, loss=f"stm:{tau!r}", batch_rows=20, max_steps=1)
    run_training(model, tmp_path / "stm", config)
    (line,) = metrics_lines(tmp_path / "stm")
    kept = sum(math.exp(nll) <= tau for nll in nats) / len(nats)
    assert line["kept"] == line["mean_weight"] == pytest.approx(kept) and 0.3 < kept < 0.4


def test_a_plain_run_knows_no_weights(tiny, tmp_path, monkeypatch):
    """Its metrics have no other keys, no likelihoods are computed, no weight is asked for."""
    monkeypatch.setattr(WeightedLoss, "nll", None)
    run_training(tiny, tmp_path / "run", dataclasses.replace(SMALL, max_steps=2))
    (first, _) = metrics_lines(tmp_path / "run")
    keys = "step epoch lr tokens response_tokens loss grad_norm tokens_s"
    assert list(first) == keys.split()
    assert not list((tmp_path / "run").glob("seed-nll*"))


@pytest.mark.parametrize("text", ["stm:320", "eaft"])
def test_a_run_that_was_killed_goes_on_to_the_same_bytes(tiny, tmp_path, monkeypatch, text):
    """Also where the likelihoods were lost meanwhile; under another loss it is refused."""
    config = dataclasses.replace(SMALL, loss=text)
    whole, _ = run_training(tiny, tmp_path / "whole", config)
    step = loop_module.step_update

    def failing(model, lora, optimizer, *rest):
        if optimizer.step == 7:
            raise KeyError("killed")
        return step(model, lora, optimizer, *rest)

    out = tmp_path / "killed"
    monkeypatch.setattr(loop_module, "step_update", failing)
    with pytest.raises(KeyError):
        run_training(tiny, out, config)
    monkeypatch.setattr(loop_module, "step_update", step)
    with pytest.raises(ValueError, match=f"train.loss: '{Loss.parse(text)}' -> 'dft'"):
        run_training(tiny, out, dataclasses.replace(config, loss="dft"), resume=True)
    for file in out.glob("seed-nll*"):
        file.unlink()
    resumed, _ = run_training(tiny, out, config, resume=True)
    assert torch.equal(resumed.params, whole.params)
    assert metrics_lines(out) == metrics_lines(tmp_path / "whole")


def test_a_run_of_an_older_version_without_the_setting_goes_on_as_sft(tiny, tmp_path):
    out = tmp_path / "run"
    config = dataclasses.replace(SMALL, max_steps=2)
    run_training(tiny, out, config)
    meta = json.loads((out / "meta.json").read_text())
    assert meta["settings"]["train"].pop("loss") == "sft"
    meta |= {"finished": False}
    del meta["summary"], meta["published"], meta["environment"]
    (out / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="train.loss: 'sft' -> 'dft'"):
        run_training(tiny, out, dataclasses.replace(config, loss="dft"), resume=True)
    run_training(tiny, out, config, resume=True)


def test_a_step_that_ran_out_of_memory_counts_no_token_twice(tiny, tmp_path, monkeypatch):
    """The second micro-batch of the first step does not fit: the step begins anew."""
    step = step_module.micro_step
    calls = []

    def small_machine(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return step(*args)

    config = dataclasses.replace(SMALL, loss="dft", max_steps=1)
    run_training(tiny, tmp_path / "whole", config)
    monkeypatch.setattr(step_module, "micro_step", small_machine)
    run_training(tiny, tmp_path / "small", config)
    (whole,) = metrics_lines(tmp_path / "whole")
    (small,) = metrics_lines(tmp_path / "small")
    for name in ("weighted_loss", "mean_weight", "kept"):
        assert small[name] == pytest.approx(whole[name], rel=1e-5)


def test_the_guards_read_the_weighted_loss_too(tiny, tmp_path, monkeypatch):
    weigh = Loss.weigh

    def broken(self, tokens):
        weighed = weigh(self, tokens)
        return weighed._replace(values=weighed.values * math.nan)

    monkeypatch.setattr(Loss, "weigh", broken)
    with pytest.raises(ValueError, match=r"step 1: weighted_loss is nan; rows \['r"):
        run_training(tiny, tmp_path / "run", dataclasses.replace(SMALL, loss="dft"))


def test_a_step_whose_tokens_are_all_left_out_is_no_error_but_such_a_run_is(tiny, tmp_path):
    rows = examples(4)
    config = dataclasses.replace(SMALL, batch_rows=1, epochs=1)
    first_row = rows[next(batches(4, config)).indices[0]]
    likeliest = {}  # row id -> nats of its likeliest response token
    for example_id, nats in nll_under_seed(tiny, rows, tmp_path, "h").items():
        likeliest[example_id] = nats.min().item()
    of_first = likeliest.pop(first_row.id)
    assert min(likeliest.values()) < of_first, "another seed: the first row has the likeliest"
    tau = math.exp((of_first + min(likeliest.values())) / 2)
    run_training(tiny, tmp_path / "run", dataclasses.replace(config, loss=f"stm:{tau}"), rows)
    lines = metrics_lines(tmp_path / "run")
    assert lines[0]["kept"] == lines[0]["grad_norm"] == 0 and lines[0]["loss"] > 1
    assert any(line["kept"] for line in lines)
    count = sum(len(row.ids) - row.n_prompt for row in rows)
    with pytest.raises(ValueError, match=f"stm:2 leaves out all {count} response.*raise TAU"):
        run_training(tiny, tmp_path / "none", dataclasses.replace(config, loss="stm:2"), rows)


def test_arms_over_the_same_examples_share_one_file(tiny, tmp_path, monkeypatch):
    """Also one that finds it half written, by a kill, with a torn last line."""
    shared = tmp_path / "likelihoods"
    frozen = FrozenModel(tiny, "b", "h", seed_nll_dir=shared)

    def arm(name, loss, rows=None):
        config = dataclasses.replace(SMALL, loss=loss, max_steps=2)
        lora, _ = train(frozen, rows or examples(), LORA, config, tmp_path / name)
        return lora.params

    first = arm("first", "k3:0.1")
    (file,) = shared.glob("*.jsonl")
    content = file.read_bytes()
    lines = content.splitlines(keepends=True)
    assert len(lines) == 20 and not list((tmp_path / "first").glob("seed-nll*"))
    with monkeypatch.context() as patch:
        patch.setattr(seed_nll_module, "_nll_of", None)  # all are there: none is computed
        arm("psft", "psft:0.2")
    assert file.read_bytes() == content
    arm("others", "stm:320", examples(5))
    assert len(list(shared.glob("*.jsonl"))) == 2
    file.write_bytes(b"".join(lines[:13]) + lines[13][:20])
    assert torch.equal(arm("second", "k3:0.1"), first)
    assert file.read_bytes() == content
    file.write_bytes(content.replace(b'"nll": [', b'"nll": [1.0, ', 1))
    with pytest.raises(ValueError, match=r"seed-nll-\w+.jsonl: the line of r0/0 does not hold"):
        arm("damaged", "k3:0.1")
    shutil.rmtree(shared)


def test_likelihoods_under_the_seed_are_computed_in_halves_where_memory_is_short(
    tiny, tmp_path, monkeypatch, capsys
):
    rows = examples(9)
    whole = nll_under_seed(tiny, rows, tmp_path / "whole", "h")
    of_examples = seed_nll_module._nll_of
    computed = []

    def small_machine(model, batch_examples):
        if len(batch_examples) > 2:
            raise torch.OutOfMemoryError("out of memory")
        computed.extend(example.id for example in batch_examples)
        return of_examples(model, batch_examples)

    monkeypatch.setattr(seed_nll_module, "_nll_of", small_machine)
    halves = nll_under_seed(tiny, rows, tmp_path / "halves", "h")
    assert "seed likelihoods: out of memory with" in capsys.readouterr().out
    assert sorted(computed) == sorted(example.id for example in rows), "each once"
    assert list(halves) == list(whole)
    for example_id, nll in whole.items():
        torch.testing.assert_close(halves[example_id], nll, rtol=1e-5, atol=1e-6)


def test_two_examples_of_one_id_are_refused_where_the_seed_is_needed(tiny, tmp_path):
    rows = examples(3) + examples(1)
    run_training(tiny, tmp_path / "dft", dataclasses.replace(SMALL, loss="dft"), rows)
    with pytest.raises(ValueError, match="1 examples have the id of another"):
        run_training(tiny, tmp_path / "k3", dataclasses.replace(SMALL, loss="k3:1"), rows)


def test_the_help_text_names_every_method_as_it_is_typed():
    typed = re.findall(r"\b(?:stm:|psft:|k3:)[\d.]+|\b(?:sft|dft|eaft)\b", getsource(TrainConfig))
    assert [Loss.parse(text).name for text in dict.fromkeys(typed)] == list(METHODS)
