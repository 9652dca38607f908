"""Presets: the published values, typed flags that win over them, and names that are nearly right.

The table is typed from the SDFT paper (arXiv 2402.13669) and its published scripts; it is not
derived from the presets.
"""

import dataclasses
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from engine.data.config import DataConfig
from engine.data.distilled import load_distilled
from engine.data.encode import EncodeRules, encode
from engine.distill.config import PAPER_SAMPLING, DistillConfig
from engine.distill.distill import can_be_asked
from engine.distill.rewrite_prompts import TEMPLATES, prompt
from engine.distill.selection import OURS, PAPER
from engine.jobs.job_config import JobConfig
from engine.presets import PRESETS, get_preset, parse
from engine.runtime.flags import add_flags, from_flags, make_parser
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig
from engine.train.config import EncodeConfig, TrainConfig
from model.chat import Chat
from model.lora import LoraConfig
from model.tokenizer import load_tokenizer
from tests.helpers.published_code import published_lengths
from tests.helpers.scripts import run_script as script
from tests.helpers.tokenizer_dirs import golden_checkpoint

ROOT = Path(__file__).resolve().parents[2]
MATH = (
    "You are an expert in math. Below is a math question. Write a response that appropriately "
    "answers the question."
)


class Published(NamedTuple):
    """The published settings that differ between the training sets."""

    template: str
    chat: str
    verify: str
    paper_verify: str  # the rule of the published code
    epochs: int
    system: str | None


PUBLISHED = {
    "alpaca": Published("using", "alpaca", "none", "none", 2, None),
    "dolly": Published("using", "alpaca", "none", "none", 2, None),
    "lima": Published("using", "alpaca", "none", "none", 2, None),
    "openhermes": Published("using", "alpaca", "none", "none", 2, None),
    "gsm8k": Published("gsm8k", "llama2", "number", "paper_number", 5, MATH),
    "openfunctions": Published("refer", "alpaca", "call", "paper_call", 5, None),
    "magicoder": Published("refer", "alpaca", "paper_code", "paper_code", 2, None),
}
CONFIGS = (ModelConfig, DataConfig, DistillConfig, SamplerConfig, EncodeConfig, TrainConfig)
NEEDED = ["--model", "m", "--data", "d"]


def parser_of_the_main_job():
    parser = make_parser(__doc__)
    for config in CONFIGS[:3]:
        add_flags(parser, config)
    add_flags(parser, SamplerConfig, {"max_new_tokens", "stop", "seed"}, **PAPER_SAMPLING)
    add_flags(parser, EncodeConfig, {"target"})
    add_flags(parser, TrainConfig)
    add_flags(parser, LoraConfig, {"seed"})
    return parser


def settings(*typed):
    """The dataclasses that a script would run with, by class."""
    args = parse(parser_of_the_main_job(), [*NEEDED, *typed])
    made = {config: from_flags(config, args) for config in CONFIGS if config is not SamplerConfig}
    made[SamplerConfig] = from_flags(SamplerConfig, args, max_new_tokens=512)
    made[LoraConfig] = from_flags(LoraConfig, args)
    return made


def test_every_training_set_of_the_paper_has_its_preset():
    assert set(PRESETS) == {"default", *(f"yang2024-{name}" for name in PUBLISHED)}


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_preset_has_the_published_values(name):
    published = PUBLISHED[name]
    made = settings("--preset", f"yang2024-{name}", "--paper-exact")
    assert made[ModelConfig].chat_format == published.chat
    assert made[DataConfig].system == published.system
    distilling = made[DistillConfig]
    assert distilling.template == published.template
    assert distilling.verify == published.verify
    assert distilling.cascade == "guided:1"
    assert distilling.verifier == published.paper_verify and distilling.rules is PAPER
    assert distilling.limit(1) == distilling.limit(4000) == 512
    sampling = made[SamplerConfig]
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.95, 0.7, 50)
    assert (sampling.repetition_penalty, sampling.min_p, sampling.seed) == (1.0, 0.0, 42)
    lora = made[LoraConfig]
    assert (lora.rank, lora.alpha, lora.dropout, lora.rslora) == (8, 16.0, 0.1, False)
    assert {m.split(".")[1] for m in lora.module_names()} == {"q_proj", "v_proj"}
    training = made[TrainConfig]
    assert (training.lr, training.schedule, training.warmup) == (1e-4, "cosine", 0.0)
    assert (training.epochs, training.batch_rows) == (published.epochs, 2 * 4)
    assert training.weight_decay == 0.0
    assert (training.clip, training.max_steps) == (1.0, 0)  # the Trainer's default norm
    encoding = made[EncodeConfig]
    assert (encoding.max_length, encoding.truncate, encoding.mix) == (1024, True, 0.0)
    assert made[DataConfig].drop_long
    for config in made.values():
        if hasattr(config, "check"):
            config.check()


def test_the_default_preset_changes_measured_flags_only():
    """All linears at 3e-4: the README's table of rates, ranks and modules says why."""
    assert settings() == settings("--preset", "default")
    made = settings()
    assert made[DistillConfig] == DistillConfig() and made[DistillConfig].rules is OURS
    assert made[TrainConfig] == TrainConfig(lr=3e-4) and TrainConfig() != TrainConfig(lr=3e-4)
    assert made[LoraConfig] == LoraConfig(modules="all", dropout=0.1)
    assert (LoraConfig().modules, LoraConfig().dropout) == ("qv", 0.0)
    assert made[SamplerConfig] == SamplerConfig(**PAPER_SAMPLING)
    assert made[ModelConfig] == ModelConfig("m") and made[DataConfig] == DataConfig("d")
    assert settings("--lr", "1e-4", "--modules", "qv")[TrainConfig] == TrainConfig()


def test_typed_flags_win_before_and_after_the_preset(capsys):
    typed = ["--epochs", "1", "--chat-format", "own", "--no-truncate", "--verify", "exact"]
    made = settings(*typed, "--preset", "yang2024-gsm8k", "--system", "Count.")
    assert made[TrainConfig].epochs == 1 and made[TrainConfig].batch_rows == 8
    assert made[ModelConfig].chat_format == "own" and made[EncodeConfig].truncate is False
    assert made[DistillConfig].verify == "exact" and made[DataConfig].system == "Count."
    said = capsys.readouterr().out
    assert said.startswith("preset yang2024-gsm8k: chat_format='own' (typed), template='gsm8k',")
    assert "epochs=1 (typed), batch_rows=8," in said and "rank=8," in said


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_names_flags_only_and_values_of_their_type(name):
    plain = vars(parser_of_the_main_job().parse_args(NEEDED))
    for flag, value in PRESETS[name].items():
        assert flag in plain
        assert plain[flag] is None or type(value) is type(plain[flag]), flag


@pytest.mark.parametrize(
    "name, said",
    [
        ("yang2024-gsm", "did you mean yang2024-gsm8k"),
        ("yang-alpaca", "did you mean yang2024-alpaca"),
        ("defalt", "did you mean default"),
        ("zzz", "no preset 'zzz'; expected one of default, yang2024-alpaca"),
    ],
)
def test_an_unknown_preset_offers_the_nearest(name, said):
    with pytest.raises(ValueError, match=said):
        get_preset(name)


@pytest.mark.parametrize("script", ["distill", "train", "sdft"])
def test_the_scripts_take_presets(script, monkeypatch):
    spec = importlib.util.spec_from_file_location(script, ROOT / "scripts" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    argv = [script, *NEEDED, "--out", "o", "--preset", "yang2024-openfunctions"]
    monkeypatch.setattr(sys, "argv", argv)
    args = module.parse_args()
    assert args.chat_format == "alpaca"
    if script != "train":
        assert (args.template, args.verify, args.max_new_tokens) == ("refer", "call", "512")
    if script != "distill":
        assert (args.epochs, args.rank, args.dropout, args.truncate) == (5, 8, 0.1, True)


@pytest.fixture(scope="session")
def llama2(shared_data, tmp_path_factory):
    """Llama 2's tokenizer with a tiny random model around it."""
    path = tmp_path_factory.mktemp("llama2")
    golden_checkpoint(path, "llama2", shared_data / "llama2" / "tokenizer.model")
    return path


SETS = {  # file, rows, turns whose prompt has 1,024 tokens or more of Llama 2's tokenizer
    "alpaca": ("alpaca_train.json", 2000, 0),
    "dolly": ("dolly_train.json", 2000, 28),
    "gsm8k": ("gsm8k_train.json", 7473, 0),
    "openfunctions": ("openfunction_train.json", 2211, 42),
}


@pytest.mark.parametrize("name", SETS)
def test_a_preset_runs_on_the_whole_published_file(llama2, shared_data, name):
    """Every row is trained on under --paper-exact; else long prompts are left out, and counted."""
    file, count, long = SETS[name]
    made = settings("--preset", f"yang2024-{name}", "--data", str(shared_data / file))
    tokenizer = load_tokenizer(llama2)
    chat = Chat.from_dir(llama2, tokenizer, made[ModelConfig].chat_format)
    data, asked = made[DataConfig], made[DistillConfig]
    rows = data.load(check=can_be_asked(chat, asked))
    assert len(rows) == count
    given = {"target": "target", "max_length": 1024, "truncate": made[EncodeConfig].truncate}
    examples, counts = encode(rows, chat, EncodeRules(drop_long=data.drop_long, **given))
    assert (len(examples), counts.dropped) == (count - long, long)
    config = JobConfig(
        model=made[ModelConfig],
        data=data,
        job=None,
        distill=dataclasses.replace(asked, paper_exact=True),
        sampling=made[SamplerConfig],
        encode=made[EncodeConfig],
        train=made[TrainConfig],
        lora=made[LoraConfig],
    )
    exact = config.as_published().encode
    assert exact.cut_in_proportion and not made[EncodeConfig].cut_in_proportion
    examples, counts = encode(
        rows, chat, EncodeRules(drop_long=data.drop_long, in_proportion=True, **given)
    )
    assert len(examples) == count and counts.dropped == 0
    cut = 0
    for row, example in zip(rows, examples, strict=True):
        prompt_tokens = len(chat.prompt_ids(row.messages[:-1]))
        answer_tokens = len(chat.response_ids(row.reference)) + 1  # with the end token
        kept = len(example.ids)
        kept_of_answer = kept - example.n_prompt
        assert (kept, kept_of_answer) == published_lengths([(prompt_tokens, answer_tokens)])
        if prompt_tokens + answer_tokens > kept:
            cut += 1
    assert counts.cut == cut
    if long:
        with pytest.raises(ValueError, match=f"{long} turns cannot be trained on .*--drop-long"):
            encode(rows, chat, EncodeRules(**given))


def test_the_script_takes_a_whole_published_file(tiny_llama_dir, llama2, shared_data, tmp_path):
    """train.py with Llama 2's tokenizer: left out and counted, or cut as published."""
    model = tiny_llama_dir(vocab=32000, bos_token_id=1, eos_token_id=2)
    for file in llama2.iterdir():
        shutil.copy(file, model)
    data = shared_data / "openfunction_train.json"
    args = ["--model", model, "--data", data, "--preset", "yang2024-openfunctions", "--show", "1"]
    args += ["--limit", "400"]
    left_out = script("train", *args, "--no-truncate", "--max-length", "512")
    whole = script("train", *args, "--max-length", "512", "--cut-in-proportion")
    dropped = int(re.search(r"dropped (\d+)", left_out)[1])
    assert dropped and f"examples {400 - dropped}," in left_out
    assert "examples 400," in whole and "dropped" not in whole and ", cut " in whole
    said = script("train", *args, "--max-length", "512", "--no-drop-long", code=2)
    assert "--drop-long" in said and "Traceback" not in said


def test_a_preset_reaches_the_prompts_and_the_trained_tokens_of_the_main_job(
    tiny_llama_dir, tmp_path
):
    """The paper's GSM8K forms reach the model, and its defects the trained tokens."""
    model = tiny_llama_dir(tokenizer=True, max_position_embeddings=2048)
    out, train = tmp_path / "run", tmp_path / "d.json"
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}."} for i in range(6)]
    train.write_text(json.dumps(rows))
    args = ["--model", model, "--data", train, "--out", out, "--preset", "yang2024-gsm8k"]
    args += ["--paper-exact", "--max-new-tokens", "8", "--epochs", "1", "--retention-max-new", "2"]
    said = script("sdft", *args, "--report-rows", "1", "--report-answers", "1")
    assert "preset yang2024-gsm8k: chat_format='llama2'" in said and "epochs=1 (typed)" in said
    settings = json.loads((out / "summary.json").read_text())["settings"]
    assert settings["TrainConfig"]["seed"] == settings["SamplerConfig"]["seed"] == 42
    assert settings["LoraConfig"]["dropout"] == 0.1 and settings["DistillConfig"]["paper_exact"]
    for line in load_distilled(out / "distilled.jsonl"):
        assert line.messages[0] == {"role": "system", "content": MATH}
        # the beginning is asked for, but not part of what is trained on
        assert line.response_tokens <= 8 and not line.response.startswith("Great!")
        chat = Chat.from_dir(model, load_tokenizer(model), "llama2")
        asked = prompt(chat, TEMPLATES["gsm8k"], line.messages, line.reference)
        text = chat.render(asked, add_generation_prompt=True)
        assert MATH not in text and "Below are a math question and its reference answer" in text
        assert text.endswith(f"{line.messages[1]['content']}\n\n{line.reference} [/INST]")
        ids = chat.prompt_ids(asked, "Great! Let's think step by step. ")
        assert line.prompt_tokens == len(ids)


def test_a_frozen_preset_is_not_changed_by_use():
    before = {name: dict(preset) for name, preset in PRESETS.items()}
    settings("--preset", "yang2024-lima", "--epochs", "9")
    assert {name: dict(preset) for name, preset in PRESETS.items()} == before
    assert dataclasses.replace(PAPER) == PAPER != OURS
