"""Out of memory anywhere in a job is survived: an allocator fails at the n-th tensor of a stage

Undisturbed, a stage makes so many tensors; it is then run again with the n-th refused, for several
n from the first to the last. Its files must be the same, byte for byte.
"""

import dataclasses
import json
import re
import shutil

import pytest
import torch

from engine.data.config import DataConfig
from engine.data.rows import load_rows
from engine.distill.config import DistillConfig
from engine.distill.distill import distill
from engine.distill.seed_likelihoods import score
from engine.evaluate.retention import retention
from engine.evaluate.target_task import evaluate, nll_file
from engine.measure.seed_answers import seed_answers
from engine.report.collect import token_nll, tuned_answers
from engine.sampling import cuda_graphs
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import SamplerConfig
from engine.train import step as step_module
from engine.train.optim import Optimizer
from engine.train.validate import ValidateConfig, Validator
from model.chat import Chat
from model.llama import Llama
from model.lora import LoraConfig
from model.tokenizer import load_tokenizer
from tests.helpers.adapters import new_lora
from tests.helpers.distillation import rows
from tests.helpers.failing_memory import Memory
from tests.helpers.sessions import session_of
from tests.helpers.training import SMALL, examples, metrics_lines, run_training

PROMPTS = [("a", "Why?"), ("b", "Say it.")]
SAMPLED = SamplerConfig(rows=3, temperature=1.0, top_k=60, seed=1, page_size=16)
GREEDY = SamplerConfig(rows=2, max_new_tokens=4, page_size=16)
DISTILL = DistillConfig(max_new_tokens="5")
CHOICE = DistillConfig(max_new_tokens="5", cascade="unguided:3", choose="likelihood", verify="none")


class Job:
    """A tiny model with what its stages need, and the stages; each writes into a directory."""

    def __init__(self, path, folder):
        self.model = Llama.from_pretrained(path)
        self.chat = Chat.from_dir(path, load_tokenizer(path))
        self.adapter = new_lora(self.model, modules="all")
        self.adapter.params.add_(0.1)
        self.arms = {"seed": None, "sft": self.adapter}
        self.generator = ChatGenerator(self.model, self.chat, GREEDY)
        pairs = [{"instruction": text, "output": text * 3} for text in ("abcd", "h")]
        self.file = folder / "held_out.json"
        self.file.write_text(json.dumps(pairs))
        self.held_out = load_rows(self.file)
        self.lines = self.distil(folder, DISTILL, 4).lines
        self.answers = seed_answers(self.generator, folder / "seed.jsonl", {}, PROMPTS)
        retention(self.model, self.answers, self.arms, folder / "retention.jsonl", {})
        self.evaluate(folder)
        self.folder = folder

    def distil(self, out, config, count):
        generator = ChatGenerator(self.model, self.chat, SAMPLED)
        return distill(generator, rows(count), out / "distilled.jsonl", config, settings={"s": 1})

    def distill(self, out):
        self.distil(out, DISTILL, 4)

    def distill_with_choice(self, out):
        self.distil(out, CHOICE, 2)

    def score(self, out):
        score(self.model, self.chat, self.lines, out / "scores.jsonl", {})

    def validate(self, out):
        config = ValidateConfig(val_every=1, val_data=str(self.file), val_prompts=1)
        session = session_of(self.model, self.chat)
        validator = Validator(config, DataConfig(str(self.file)), session)
        (out / "values").write_text(repr(validator(self.adapter)))

    def evaluate(self, out):
        file = out / "evaluation.jsonl"
        evaluate(self.generator, self.held_out, "contains", self.arms, file, {})
        assert nll_file(file).exists()

    def retention(self, out):
        answers = seed_answers(self.generator, out / "seed.jsonl", {}, PROMPTS)
        retention(self.model, answers, self.arms, out / "retention.jsonl", {})

    def report(self, out):
        for name in ("retention.jsonl", "evaluation.jsonl"):
            shutil.copy(self.folder / name, out / name)
        few = examples(2)
        token_nll(self.model, self.chat.tokenizer, few, few[::-1], out / "tokens.jsonl", {})
        tuned_answers(self.generator, self.arms, out, self.held_out, 1, {})


JOBS = []  # the one of all tests: no stage may leave a trace in it


@pytest.fixture
def job(tiny_llama_dir, tmp_path_factory, monkeypatch):
    monkeypatch.setattr("engine.train.validate.ANSWER_TOKENS", 3)
    monkeypatch.setattr("gc.collect", lambda: 0)  # half a second each beside all of torch
    if not JOBS:
        path = tiny_llama_dir(layers=1, tokenizer=True)
        JOBS.append(Job(path, tmp_path_factory.mktemp("inputs")))
    return JOBS[0]


def contents(out):
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def spread(count, tries):
    """`tries` numbers from 1 to `count`, evenly."""
    return [1 + round(i * (count - 1) / (tries - 1)) for i in range(tries)]


STAGES = {  # -> words of the message that the refusals cause
    "distill": "sampling: out of memory with",
    "distill_with_choice": "out of memory",
    "score": "scoring: out of memory with",
    "validate": "validation: out of memory",
    "evaluate": "out of memory",
    "retention": "out of memory",
    "report": "out of memory",
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_survives_an_allocation_that_fails(job, tmp_path, stage, capsys):
    weights = {name: weight.clone() for name, weight in job.model.weights.items()}
    plain = tmp_path / "plain"
    plain.mkdir()
    with Memory() as memory:
        getattr(job, stage)(plain)
    wanted = contents(plain)
    assert memory.made > 50
    capsys.readouterr()
    for n in spread(memory.made, 4):
        out = tmp_path / f"refused-{n}"
        out.mkdir()
        with Memory(refused=n) as failing:
            getattr(job, stage)(out)
        assert failing.refusals == 1
        assert contents(out) == wanted, n
        said = capsys.readouterr().out
        assert "out of memory" in said, n
    assert STAGES[stage] in said or "packing the weights" in said
    for name, weight in weights.items():
        assert torch.equal(job.model.weights[name], weight), name


def directory_of(path):
    path.mkdir()
    return path


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        ("distill", r"sampling: out of memory with \d+ sequences at a time; continuing with \d+"),
        ("score", r"scoring: out of memory with \d+ tokens together; continuing with up to \d+"),
    ],
)
def test_a_stage_takes_on_less_where_large_tensors_never_fit(job, tmp_path, stage, said, capsys):
    """Every tensor above two fifths of the largest one is refused, each time."""
    with Memory() as memory:
        getattr(job, stage)(directory_of(tmp_path / "plain"))
    capsys.readouterr()
    with Memory(largest=0.4 * memory.peak) as small:
        getattr(job, stage)(directory_of(tmp_path / "small"))
    assert 1 <= small.refusals <= 8, "what follows is taken in the smaller size at once"
    assert contents(tmp_path / "small") == contents(tmp_path / "plain")
    assert re.search(said, capsys.readouterr().out)


def test_one_row_that_does_not_fit_ends_a_stage_with_a_clear_error(job, tmp_path, monkeypatch):
    """And the model's matrices are its own again."""
    forward = Llama.forward

    def no_forward(*args, **kwargs):
        with Memory(largest=2000):
            return forward(*args, **kwargs)

    monkeypatch.setattr(Llama, "forward", no_forward)
    weights = {name: weight.clone() for name, weight in job.model.weights.items()}
    for stage, message in (
        ("distill", r"out of memory while distilling \(.*one sequence at a time does not fit"),
        ("score", r"out of memory while scoring \(.*--no-score leaves it out"),
        ("validate", r"out of memory while answering general prompts for validation \("),
        ("evaluate", r"out of memory while answering held-out rows \("),
        ("report", r"out of memory while taking likelihoods for the report \("),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(job, stage)(directory_of(tmp_path / stage))
    for name, weight in weights.items():
        assert torch.equal(job.model.weights[name], weight), name


# ---- training, in fp64: what micro-batches change is then 1e-9 at most


def trained(model, out, micro_tokens):
    """Two steps over eight rows, with dropout."""
    config = dataclasses.replace(
        SMALL, epochs=1, save_every=1, batch_rows=4, micro_tokens=micro_tokens
    )
    return run_training(model, out, config, examples(8), lora=LoraConfig(rank=4, dropout=0.1))


@pytest.fixture
def doubles(tiny_llama_dir):
    return Llama.from_pretrained(tiny_llama_dir(layers=1), dtype=torch.float64)


def test_training_survives_an_allocation_that_fails(doubles, tmp_path, capsys, monkeypatch):
    """In a step the micro-batches are halved, once, which is recorded; the same run otherwise.

    Refusals outside of the forward and backward (a fresh adapter, AdamW, a checkpoint) change no
    bit.
    """
    monkeypatch.setattr("gc.collect", lambda: 0)
    with Memory() as memory:
        plain, summary = trained(doubles, tmp_path / "plain", 128)
    assert summary["halved"] == []
    lines = metrics_lines(tmp_path / "plain")
    halved = 0
    for n in spread(0.97 * memory.made, 6):  # the first run makes tables for those after it
        out = tmp_path / f"refused-{n}"
        capsys.readouterr()
        with Memory(refused=n) as failing:
            lora, summary = trained(doubles, out, 128)
        said = capsys.readouterr().out
        assert failing.refusals == 1 and "out of memory" in said, n
        again = metrics_lines(out)
        assert [line["step"] for line in again] == [line["step"] for line in lines]
        for line, other in zip(again, lines, strict=True):
            assert line["loss"] == pytest.approx(other["loss"], rel=1e-9)
        if summary["halved"]:
            halved += 1
            ((step, tokens),) = summary["halved"]
            assert tokens == 64 and f"step {step}: out of memory" in said
            torch.testing.assert_close(lora.params, plain.params, rtol=0, atol=1e-9)
        else:
            assert torch.equal(lora.params, plain.params), n
    assert 3 <= halved <= 5


def test_the_update_changes_nothing_before_it_has_all_memory(doubles):
    """A step of AdamW that is refused any tensor can be done again."""
    lora = new_lora(doubles)
    lora.grads.normal_()
    before = lora.params.clone()

    def update(refused):
        lora.params.copy_(before)
        optimizer = Optimizer.fresh(lora, weight_decay=0.1)
        with Memory(refused=refused) as memory:
            if refused:
                with pytest.raises(torch.OutOfMemoryError):
                    optimizer.update(doubles.ops, lora, 1e-2, 0.5, 1.0)
                assert torch.equal(lora.params, before) and optimizer.step == 0
                assert not optimizer.m.any() and not optimizer.v.any()
            optimizer.update(doubles.ops, lora, 1e-2, 0.5, 1.0)
        return memory.made, lora.params.clone()

    made, updated = update(0)
    assert made >= 3 and not torch.equal(updated, before)
    for n in range(1, made + 1):
        assert torch.equal(update(n)[1], updated), n


def test_training_takes_smaller_micro_batches_where_large_tensors_never_fit(
    doubles, tmp_path, monkeypatch
):
    monkeypatch.setattr("gc.collect", lambda: 0)
    with Memory() as memory:
        plain, _ = trained(doubles, tmp_path / "plain", 512)
    with Memory(largest=0.6 * memory.peak) as small:
        lora, summary = trained(doubles, tmp_path / "small", 512)
    assert summary["halved"][0] == [1, 256] and small.refusals == len(summary["halved"]) > 1
    torch.testing.assert_close(lora.params, plain.params, rtol=0, atol=1e-9)


def test_one_row_is_trained_with_more_recomputation_before_it_is_given_up(
    doubles, tmp_path, capsys, monkeypatch
):
    """Under --recompute auto; recomputation changes no bit."""
    monkeypatch.setattr("gc.collect", lambda: 0)
    plain, _ = trained(doubles, tmp_path / "plain", 1)
    step = step_module.micro_step

    def only_full(model, lora, batch, policy, *rest):
        if policy != "full":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(model, lora, batch, policy, *rest)

    monkeypatch.setattr(step_module, "micro_step", only_full)
    lora, summary = trained(doubles, tmp_path / "run", 1)
    said = capsys.readouterr().out
    assert "step 1: out of memory with one row at a time; continuing with recompute full" in said
    assert said.count(": out of memory") == 2, "the steps after it begin with full"
    assert torch.equal(lora.params, plain.params) and summary["halved"] == []


def test_where_capturing_runs_out_of_memory_fewer_sequences_are_tried(job, tmp_path, monkeypatch):
    """Before the recording began; with one sequence left, steps are launched as without graphs."""
    job.distill(directory_of(tmp_path / "plain"))
    made = []

    class Refused:
        def __init__(self, model, lora, pool, config, bucket, *rest):
            made.append(bucket.sequences)
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(cuda_graphs, "DEVICE_TYPES", ("cpu",))
    monkeypatch.setattr(cuda_graphs, "why_not_captured", lambda ops: None)
    monkeypatch.setattr(cuda_graphs, "DecodeStep", Refused)
    job.distill(directory_of(tmp_path / "refused"))
    assert made == [3, 1], "slots for three sequences, for one; then nothing is captured"
    assert contents(tmp_path / "refused") == contents(tmp_path / "plain")
