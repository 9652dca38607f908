"""Chat format, end token and system message of a training are recorded with the adapter."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import pytest

from engine.data.config import DataConfig
from engine.data.distilled import Distilled
from engine.data.encode import EncodeRules, encode
from engine.data.rows import Row
from engine.distill.distill import check_rows
from engine.distill.seed_likelihoods import score
from engine.evaluate.target_task import evaluate_job, reference_nll
from engine.jobs.generate import generate_job
from engine.measure.likelihood import nll
from engine.runtime.files import read_jsonl
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig, ScaledAdapter, Session, as_trained
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.train import TrainJobConfig, train_job
from engine.train.validate import ValidateConfig
from model.chat import Chat
from model.chat_formats import FORMATS
from model.llama import Llama
from model.lora import LoraConfig
from model.merge import merge
from model.peft_format import load_lora, save_lora
from model.tokenizer import load_tokenizer
from model.trained_chat import FILE, OWN, TrainedChat, common_system
from tests.helpers import programs
from tests.helpers.adapters import random_lora
from tests.helpers.tokenizer_dirs import FLAGS, golden_checkpoint, tiny_sentencepiece, write_json

ROOT = Path(__file__).resolve().parents[2]
ROW = {"prompt": "Say hi.", "completion": "hi hi"}
ASKED = [{"role": "user", "content": "Say hi."}]
END = 258  # <|im_end|>
OLD = 256  # <|endoftext|>


_made: dict[str, Path] = {}  # a base model and an adapter, made once: training takes seconds


@pytest.fixture
def base(tiny_llama_dir) -> Path:
    """A base model: a tokenizer with ChatML's tokens, eos <|endoftext|>, and no chat template."""
    if "base" not in _made:
        path = tiny_llama_dir(tokenizer=True, eos_token_id=OLD)
        named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>"}
        write_json(path / "tokenizer_config.json", named)
        write_json(path / "generation_config.json", {"eos_token_id": OLD, "bos_token_id": OLD})
        _made["base"] = path
    return _made["base"]


def train(
    base: Path,
    out: Path,
    chat_format: str | None = "chatml",
    resume: bool = False,
    **given: object,
) -> Path:
    """Train an adapter until the tiny model says its one answer by heart."""
    data = out.with_suffix(".jsonl")
    data.write_text(json.dumps(ROW) + "\n")
    session = Session.open(ModelConfig(str(base), dtype="float32", chat_format=chat_format))
    config = TrainJobConfig(
        data=DataConfig(str(data), **given),
        encode=EncodeConfig(),
        train=TrainConfig(lr=2e-2, max_steps=60, batch_rows=1, schedule="constant", save_every=30),
        lora=LoraConfig(rank=8, modules="all"),
        validate=ValidateConfig(),
    )
    train_job(session, config, out, resume=resume)
    return out


@pytest.fixture
def adapter(base, tmp_path_factory) -> Path:
    """An adapter trained on the base in chatml, with a system message."""
    if "adapter" not in _made:
        place = tmp_path_factory.mktemp("adapter") / "run"
        _made["adapter"] = train(base, place, system="Be kind.")
    return _made["adapter"]


def generate(
    model: Path, adapter: Path | None, prompt: str = "Say hi.", **given: object
) -> list[dict]:
    config = ModelConfig(str(model), dtype="float32", **given)
    adapters = [] if adapter is None else [str(adapter)]
    return generate_job(
        Session.open(as_trained(config, adapters)),
        prompt,
        SamplerConfig(temperature=0.0, max_new_tokens=24),
        adapter=ScaledAdapter(adapters[0]) if adapters else None,
        system="Be kind.",
    )


# The record


def test_training_records_its_chat_beside_every_adapter(adapter, base):
    found = TrainedChat.read(adapter)
    assert found.chat_format == "chatml" and (found.end_id, found.end_token) == (END, "<|im_end|>")
    assert found.system == "Be kind."
    places = sorted((adapter / "checkpoints").iterdir())
    assert places and all(TrainedChat.read(place) == found for place in places)
    assert TrainedChat.read(base) is None
    assert load_lora(adapter).config.rank == 8, "another file does not disturb a reader"


def test_an_old_run_without_a_record_resumes(base, tmp_path):
    """Its checkpoints have no chat.json, and its settings know nothing of one."""
    run = train(base, tmp_path / "run")
    meta = json.loads((run / "meta.json").read_text())
    for file in run.rglob(FILE):
        file.unlink()
    assert TrainedChat.read(run) is None and "chat" not in json.dumps(meta["settings"])
    write_json(run / "meta.json", {"settings": meta["settings"], "finished": False})
    shutil.rmtree(run / "checkpoints" / "step-000060")
    train(base, run, resume=True)
    assert TrainedChat.read(run).chat_format == "chatml"
    assert not (run / "checkpoints" / "step-000030" / FILE).exists()


def test_the_common_system_message_is_the_one_that_all_rows_have():
    told = [{"role": "system", "content": "s"}, *ASKED]
    assert common_system([told, told]) == "s"
    assert common_system([told, ASKED]) is None and common_system([ASKED]) is None
    other = [{"role": "system", "content": "t"}, *ASKED]
    assert common_system([told, other]) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chat_format": "vicuna"}, "chat format 'vicuna'; expected one of own, chatml"),
        ({"chat_format": None}, "chat_format is None, which training does not write"),
        ({"end_id": "2"}, "end_id is '2'"),
        ({"system": 5}, "system is 5"),
    ],
)
def test_a_broken_record_is_named(adapter, tmp_path, change, reason):
    record = dataclasses.asdict(TrainedChat.read(adapter))
    write_json(tmp_path / FILE, record | change)
    with pytest.raises(ValueError, match=f"chat.json: {reason}"):
        TrainedChat.read(tmp_path)


# Prompts for an adapter


def test_the_recorded_format_is_used_when_none_is_typed(adapter, base, capsys):
    (answer,) = generate(base, adapter)
    assert (answer["answer"], answer["finish"]) == ("hi hi", "stop")
    said = capsys.readouterr().out
    assert "chat format chatml: as the adapter was trained" in said and "WARNING" not in said


@pytest.mark.parametrize("script", ["generate", "evaluate", "retention"])
def test_scripts_prompt_an_adapter_as_it_was_trained(adapter, base, tmp_path, script):
    """Without its record the base, which has no template, could not be asked at all."""
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(ROW) + "\n")
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), "--model", str(base)]
    command += ["--adapter", str(adapter), "--data", str(data)]
    command += ["--out", str(tmp_path / "out.jsonl")]
    command += ["--temperature", "0", "--max-new-tokens", "8", "--dtype", "float32"]
    if script != "retention":
        command += ["--system", "Be kind."]
    done = programs.run(command, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "chat format chatml: as the adapter was trained (its chat.json)" in done.stdout
    assert "WARNING" not in done.stdout


def test_another_format_on_the_command_line_gives_a_warning(adapter, base, capsys):
    generate(base, adapter, chat_format="alpaca")
    said = capsys.readouterr().out
    assert f"WARNING: adapter {adapter}: it was trained with --chat-format chatml, this run" in said


def test_a_changed_template_gives_a_warning(capsys, tmp_path, tiny_llama_dir):
    path = tiny_llama_dir(tokenizer=True)
    own = train(path, tmp_path / "own", chat_format=None)
    assert TrainedChat.read(own).chat_format == OWN and TrainedChat.read(own).system is None
    generate(path, own)
    said = capsys.readouterr().out
    assert "WARNING" not in said and "chat format own" not in said
    assert "was trained with the system message" not in said
    (path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
    )
    generate(path, own)
    assert "trained with another chat template than the model's" in capsys.readouterr().out


def test_prompts_without_the_trained_system_message_give_a_note(adapter, base, capsys, tmp_path):
    config = as_trained(ModelConfig(str(base), dtype="float32"), [str(adapter)])
    session = Session.open(config)
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps(ROW) + "\n")
    sampling = SamplerConfig(temperature=0.0, max_new_tokens=4)
    for system, word in ((None, "none"), ("Be brief.", "another"), ("Be kind.", None)):
        rows = DataConfig(str(data), system=system)
        out = tmp_path / f"{word}.jsonl"
        evaluate_job(session, rows, "number", [str(adapter)], out, sampling)
        said = capsys.readouterr().out
        note = "was trained with the system message 'Be kind.', these prompts have "
        if word is None:
            assert note not in said
        else:
            assert f"{note}{word}" in said


def test_adapters_of_several_formats_are_not_mixed(adapter, base, tmp_path):
    other = train(base, tmp_path / "alpaca", chat_format="alpaca")
    config = ModelConfig(str(base))
    with pytest.raises(ValueError, match=r"different chat formats \(.*run: chatml, .*: alpaca\)"):
        as_trained(config, [str(adapter), str(other)])
    typed = dataclasses.replace(config, chat_format="llama3")
    assert as_trained(typed, [str(adapter), str(other)]) == typed
    assert as_trained(config, [str(other)]).chat_format == "alpaca"
    assert as_trained(config, []) == config


# A merged model


@pytest.fixture
def merged(adapter, base, tmp_path) -> Path:
    command = [sys.executable, str(ROOT / "scripts" / "merge.py"), "--model", str(base)]
    command += ["--adapter", str(adapter), "--out", str(tmp_path / "merged")]
    done = programs.run(command, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "with it: chat format chatml, answers end with '<|im_end|>'" in done.stdout
    assert "system message 'Be kind.'" in done.stdout
    return tmp_path / "merged"


def test_a_merged_model_has_the_template_and_end_token_of_its_training(merged, capsys):
    (answer,) = generate(merged, None)
    assert (answer["answer"], answer["finish"]) == ("hi hi", "stop")
    chat = Chat.from_dir(merged, load_tokenizer(merged))
    assert (chat.end_id, chat.end_ids) == (END, (END, OLD))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((merged / name).read_text())["eos_token_id"] == [END, OLD]
    assert json.loads((merged / "generation_config.json").read_text())["bos_token_id"] == OLD


@pytest.mark.peers
def test_transformers_prompts_a_merged_model_as_it_was_trained(
    merged, adapter, base, run_peer, tmp_path
):
    system = {"role": "system", "content": "Be kind."}
    conversations = [
        [system, *ASKED],
        ASKED,
        [*ASKED, {"role": "assistant", "content": "x"}, *ASKED],
    ]
    write_json(tmp_path / "chats.json", conversations)
    theirs = run_peer("merged_chat_peer.py", merged, tmp_path / "chats.json")
    chat = Chat.from_dir(base, load_tokenizer(base), "chatml")
    assert theirs["ends"] == [END, OLD]
    assert theirs["prompts"] == [chat.prompt_ids(messages) for messages in conversations]
    assert theirs["answers"][0] == [*chat.response_ids("hi hi"), END]
    assert theirs["texts"][0] == "hi hi", "its pipeline"


def test_an_adapter_in_the_models_own_format_changes_no_file(tiny_llama_dir, tmp_path):
    path = tiny_llama_dir(tokenizer=True)
    chat = Chat.from_dir(path, load_tokenizer(path))
    save_lora(random_lora(Llama.from_pretrained(path), "qv"), tmp_path / "own")
    TrainedChat.of(chat, None).write(tmp_path / "own")
    record = TrainedChat.read(tmp_path / "own")
    merge(path, load_lora(tmp_path / "own"), tmp_path / "merged", finish=record.install)
    names = {file.name for file in path.iterdir()}
    assert {file.name for file in (tmp_path / "merged").iterdir()} == {*names, "merge.json"}
    for name in names - {"model.safetensors"}:
        assert (tmp_path / "merged" / name).read_bytes() == (path / name).read_bytes()


def test_an_adapter_without_a_record_leaves_the_models_own(base, tmp_path):
    save_lora(random_lora(Llama.from_pretrained(base), "qv"), tmp_path / "plain")
    merge(base, load_lora(tmp_path / "plain"), tmp_path / "merged")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        assert (tmp_path / "merged" / name).read_bytes() == (base / name).read_bytes()
    assert not (tmp_path / "merged" / "chat_template.jinja").exists()


@pytest.mark.parametrize("kind", ["byte-level", "sentencepiece", "legacy"])
@pytest.mark.parametrize("chat_format", FORMATS)
def test_a_built_in_format_as_a_template_gives_the_same_ids(kind, chat_format, tmp_path, request):
    """Loaded from a merged directory, where it is encoded as one text."""
    if kind == "byte-level":
        smollm2 = request.getfixturevalue("smollm2_dir")
        path = golden_checkpoint(tmp_path, "llama3", smollm2 / "tokenizer.json")
    else:
        path = tiny_sentencepiece(tmp_path, legacy=kind == "legacy")
        tokens = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|im_start|>")
        names = [*tokens, "<|im_end|>"]
        write_json(path / "added_tokens.json", {name: 360 + n for n, name in enumerate(names)})
    (path / "chat_template.jinja").unlink(missing_ok=True)
    write_json(path / "config.json", {"eos_token_id": 2})
    built_in = Chat.from_dir(path, load_tokenizer(path), chat_format)
    TrainedChat.of(built_in, None).install(path)
    again = Chat.from_dir(path, load_tokenizer(path))
    system = {"role": "system", "content": "Be brief."}
    answer = {"role": "assistant", "content": "the fox"}
    for messages in (
        ASKED,
        [system, *ASKED],
        [*ASKED, answer, *ASKED],
        [system, *ASKED, answer, *ASKED],
    ):
        assert again.prompt_ids(messages) == built_in.prompt_ids(messages)
    assert (again.end_id, again.end_ids[0]) == (built_in.end_id, built_in.end_id)
    wanted = built_in.target(ASKED, "the fox")
    target = again.target(ASKED, "the fox")
    assert (target.prompt, target.answer) == (wanted.prompt, wanted.answer)


# Rows and their prompts


def test_a_row_that_needs_a_token_beyond_the_embeddings_is_named_at_the_start(
    tiny_llama_dir, tmp_path
):
    """Two files of a checkpoint that are each valid and do not fit: refused before the first row is
    sampled, and before the first step."""
    path = tiny_llama_dir(tokenizer=True, vocab=259)
    document = json.loads((path / "tokenizer.json").read_text())
    document["added_tokens"].append({"id": 259, "content": "<tool>", "special": False, **FLAGS})
    write_json(path / "tokenizer.json", document)
    chat = Chat.from_dir(path, load_tokenizer(path))
    answers = ["fine", "a <tool> b"]
    rows = [
        Row(f"r{n}", (*ASKED, {"role": "assistant", "content": text}))
        for n, text in enumerate(answers)
    ]
    assert encode(rows[:1], chat, EncodeRules(max_length=99))[1].examples == 1
    beyond = "r1/0: the token '<tool>' has the id 259, .* for 259 ids"
    with pytest.raises(ValueError, match=beyond):
        encode(rows, chat, EncodeRules(max_length=99))
    with pytest.raises(ValueError, match=f"(?s)1 turns cannot be encoded for this model.*{beyond}"):
        check_rows(chat, rows)
    with pytest.raises(ValueError, match="'<tool>' has the id 259"):
        generate(path, None, prompt="Use <tool>")
    settings = json.loads((path / "tokenizer_config.json").read_text())
    write_json(path / "tokenizer_config.json", settings | {"eos_token": "<tool>"})
    template = "{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    (path / "chat_template.jinja").write_text(template)
    (path / "model.safetensors").write_bytes(b"not read before the error")
    with pytest.raises(ValueError, match="'<tool>'.* has the id 259"):
        Session.open(ModelConfig(str(path)))


def test_references_and_rewrites_are_scored_behind_the_prompts_they_are_trained_on(
    tiny_llama_dir, tmp_path
):
    """They differ where the template prompts otherwise than it begins a finished answer."""
    path = tiny_llama_dir(tokenizer=True)
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{{ m.content.split('</think>')[-1] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    model, chat = Llama.from_pretrained(path), Chat(template, load_tokenizer(path))
    ids = chat.response_ids("so</think>hi")
    line = Distilled(
        id="r/0", messages=ASKED, reference="hello", response="so</think>hi", response_ids=ids,
        target="so</think>hi", status="accepted", stage="guided", finish="stop", prompt_tokens=3,
        response_tokens=len(ids),
    )  # fmt: skip
    score(model, chat, [line], tmp_path / "scores.jsonl", {})
    (found,) = read_jsonl(tmp_path / "scores.jsonl")
    prompts = {}
    for name, target in (("reference", "reference"), ("response", "target")):
        (example,), _ = encode([line], chat, EncodeRules(target=target, max_length=99))
        prompts[name] = example.ids[: example.n_prompt]
        wanted = nll(model, prompts[name], example.ids[example.n_prompt :])
        assert found[f"{name}_nll"] == pytest.approx(wanted.mean().item(), rel=1e-5)
        assert found[f"{name}_tokens"] == len(wanted)
        row = Row("r", (*ASKED, {"role": "assistant", "content": "hello"}))
        if name == "reference":
            measured = reference_nll(model, chat, [row], {"seed": None}, tmp_path / "nll.jsonl", {})
            assert measured["seed"] == pytest.approx(wanted.mean().item(), rel=1e-5)
    assert prompts["response"] == [*prompts["reference"], *chat.response_ids("<think>\n")]
