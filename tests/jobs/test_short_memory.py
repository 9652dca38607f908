"""Out of memory anywhere in a job is survived: an allocator fails at the n-th tensor of a stage

Undisturbed, a stage makes so many tensors; it is then run again with the n-th refused, for several
n from the first to the last. Its files must be the same, byte for byte.
"""

import json
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
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import SamplerConfig
from engine.train.validate import ValidateConfig, Validator
from model.chat import Chat
from model.llama import Llama
from model.tokenizer import load_tokenizer
from tests.helpers.adapters import new_lora
from tests.helpers.distillation import rows
from tests.helpers.failing_memory import Memory
from tests.helpers.sessions import session_of
from tests.helpers.training import examples

PROMPTS = [("a", "Why?"), ("a", "How far?"), ("b", "Say it again.")]
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
        pairs = [{"instruction": text, "output": text * 3} for text in ("abcd", "efg", "h")]
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
        self.distil(out, DISTILL, 5)

    def distill_with_choice(self, out):
        self.distil(out, CHOICE, 2)

    def score(self, out):
        score(self.model, self.chat, self.lines, out / "scores.jsonl", {})

    def validate(self, out):
        config = ValidateConfig(val_every=1, val_data=str(self.file), val_prompts=2)
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
        few = examples(3)
        token_nll(self.model, self.chat.tokenizer, few, few[::-1], out / "tokens.jsonl", {})
        tuned_answers(self.generator, self.arms, out, self.held_out, 2, {})


@pytest.fixture
def job(tiny_llama_dir, tmp_path):
    folder = tmp_path / "inputs"
    folder.mkdir()
    return Job(tiny_llama_dir(tokenizer=True), folder)


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
    for n in spread(memory.made, 6):
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
