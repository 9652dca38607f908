"""--enable-thinking: told to the template as transformers does, in every prompt; recorded."""

from __future__ import annotations

import json

import pytest

from engine.runtime.files import read_jsonl
from engine.runtime.resumable import ResumedLines
from engine.session import ModelConfig, Session, as_trained
from model.chat import Chat
from model.chat_sources import THINKING, with_default
from model.llama import Llama
from model.tokenizer import load_tokenizer
from model.trained_chat import TrainedChat
from tests.helpers.scripts import run_script, write_word_problems
from tests.helpers.tokenizer_dirs import write_json

# Qwen3's shape: false closes an empty thought in the prompt; a finished last answer has one anyway.
LIKE_QWEN3 = (
    "{%- for m in messages %}{%- set c = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{{- '<|im_start|>' + m.role + '\n' }}"
    "{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}"
    "{{- c + '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
# SmolLM3's: it sets the variable itself where it has none, and names the mode in its first turn.
LIKE_SMOLLM3 = (
    "{%- if enable_thinking is not defined -%}{%- set enable_thinking = true -%}{%- endif -%}"
    "{%- set mode = '/think' if enable_thinking else '/no_think' -%}"
    "{%- set block = '' if enable_thinking else '<think>\n\n</think>\n' -%}"
    "{{- '<|im_start|>system\nReasoning Mode: ' + mode + '<|im_end|>\n' -}}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}"
    "{%- if m.role == 'assistant' -%}{{- block -}}{%- endif -%}"
    "{{- m.content + '<|im_end|>\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' + block -}}{%- endif -%}"
)
TEMPLATES = {"qwen3": LIKE_QWEN3, "smollm3": LIKE_SMOLLM3}
QUESTION = [{"role": "user", "content": "2 + 2?"}]
ANSWERED = [*QUESTION, {"role": "assistant", "content": "4."}]
CLOSED = "<think>\n\n</think>\n"
ENDS = {  # the end of a prompt, (style, value)
    ("qwen3", "false"): "assistant\n" + CLOSED + "\n",
    ("smollm3", "false"): "assistant\n" + CLOSED,
}


@pytest.fixture
def model_dir(tiny_llama_dir):
    """`model_dir(style)` is a random Llama with that template."""

    def make(style, **config):
        path = tiny_llama_dir(tokenizer=True, max_position_embeddings=1024, **config)
        (path / "chat_template.jinja").write_text(TEMPLATES[style], encoding="utf-8")
        return path

    return make


def open_chat(path, value):
    return Chat.from_dir(path, load_tokenizer(path), enable_thinking=THINKING[value])


@pytest.mark.parametrize("value", THINKING)
@pytest.mark.parametrize("style", TEMPLATES)
def test_prompts_and_targets_are_those_of_the_value(model_dir, style, value):
    path = model_dir(style)
    chat = open_chat(path, value)
    prompt = chat.render(QUESTION, add_generation_prompt=True)
    assert prompt.endswith(ENDS.get((style, value), "assistant\n"))
    mode = "/no_think" if value == "false" else "/think"
    assert (f"Reasoning Mode: {mode}<" in prompt) == (style == "smollm3")
    assert "".join(map(chat.tokenizer.piece, chat.prompt_ids(QUESTION))) == prompt
    target = chat.target(QUESTION, "4.")
    joined = [*target.prompt, *target.answer, chat.end_id]
    whole = chat.render(ANSWERED, add_generation_prompt=False)
    assert "".join(map(chat.tokenizer.piece, joined)) + "\n" == whole
    if value == "false":  # the model is not trained on a thought that its prompt has closed
        assert chat.tokenizer.decode(target.answer) == "4."
        assert target.prompt == chat.prompt_ids(QUESTION)


@pytest.mark.peers
@pytest.mark.parametrize("style", TEMPLATES)
def test_ids_equal_apply_chat_template_with_the_value(model_dir, run_peer, tmp_path, style):
    path = model_dir(style)
    asked = []
    for value in THINKING.values():
        told = {} if value is None else {"enable_thinking": value}
        for messages in (QUESTION, ANSWERED, [*ANSWERED, *QUESTION]):
            asked.append({"messages": messages, **told})
    write_json(tmp_path / "asked.json", asked)
    theirs = run_peer("chat_peer.py", path, tmp_path / "asked.json")
    assert len({tuple(answer["prompt_ids"]) for answer in theirs}) == 6, "the value matters"
    tokenizer = load_tokenizer(path)
    for given, wanted in zip(asked, theirs, strict=True):
        chat = Chat.from_dir(path, tokenizer, enable_thinking=given.get("enable_thinking"))
        assert chat.prompt_ids(given["messages"]) == wanted["prompt_ids"]
        if given["messages"] == ANSWERED:
            target = chat.target(QUESTION, "4.")
            ids = [*target.prompt, *target.answer, chat.end_id]
            assert ids == wanted["ids"][: len(ids)] and len(wanted["ids"]) == len(ids) + 1


def test_a_template_that_does_not_read_it_and_other_words_are_refused(tiny_llama_dir, model_dir):
    path = tiny_llama_dir(tokenizer=True)
    with pytest.raises(
        ValueError, match="false: the checkpoint chat template does not read enable_thinking"
    ):
        Session.open(ModelConfig(str(path), enable_thinking="false"))
    with pytest.raises(ValueError, match="true: the alpaca chat template does not read"):
        like_qwen3 = str(model_dir("qwen3"))
        Session.open(ModelConfig(like_qwen3, chat_format="alpaca", enable_thinking="true"))
    with pytest.raises(ValueError, match="'off': expected one of true, false, default"):
        ModelConfig(str(path), enable_thinking="off").check()
    assert open_chat(path, "default").sources.enable_thinking is None
    only_sets_it = "{% set enable_thinking = true %}" + LIKE_QWEN3.replace("enable_", "")
    with pytest.raises(ValueError, match="does not read"):
        Chat(only_sets_it, load_tokenizer(path), enable_thinking=True)
    tools_read_it = Chat(
        only_sets_it, load_tokenizer(path), tool_template=LIKE_QWEN3, enable_thinking=True
    )
    assert tools_read_it.sources.enable_thinking


def test_a_run_names_it_and_is_not_continued_under_another_value(model_dir, tmp_path, capsys):
    path = model_dir("smollm3")

    def begin_or_continue(value):
        session = Session.open(ModelConfig(str(path), enable_thinking=value))
        with ResumedLines(tmp_path / "answers.jsonl", session.settings) as lines:
            lines.write({"id": str(len(lines.done))})
        return session

    session = begin_or_continue("false")
    assert session.settings["enable_thinking"] is session.facts()["enable_thinking"] is False
    assert "; enable_thinking false" in capsys.readouterr().out
    begin_or_continue("false")
    with pytest.raises(ValueError, match="enable_thinking: False -> True"):
        begin_or_continue("true")
    with pytest.raises(ValueError, match="enable_thinking: False -> None"):
        begin_or_continue(None)
    plain = Session.open(ModelConfig(str(path)))
    assert "enable_thinking" not in plain.settings, "files of older versions are continued"
    assert (
        plain.settings == Session.open(ModelConfig(str(path), enable_thinking="default")).settings
    )


def test_training_sampling_and_evaluation_are_told_alike(model_dir, tmp_path, capsys):
    """The main job; then its adapter alone, which knows how it was trained."""
    path = model_dir("qwen3")
    write_word_problems(tmp_path, train=2, test=1)
    run = tmp_path / "run"
    args = ["--model", path, "--data", tmp_path / "train.json", "--out", run]
    args += ["--eval-data", tmp_path / "test.json", "--verify", "number", "--eval-max-new", "4"]
    args += ["--max-new-tokens", "4", "--retention-max-new", "2", "--epochs", "1", "--rank", "2"]
    printed = run_script("sdft", *args, "--report-rows", "1", "--enable-thinking", "false")
    assert "; enable_thinking false\n" in printed

    chat = open_chat(path, "false")
    (shown, *_) = read_jsonl(run / "tokens.jsonl")
    prompt = "".join(shown["sft"]["pieces"][: shown["sft"]["prompt"]])
    assert prompt.endswith(f"assistant\n{CLOSED}\n")
    model = Llama.from_pretrained(path)
    answers = read_jsonl(run / "evaluation.jsonl")[:1] + read_jsonl(run / "seed_answers.jsonl")
    for line in answers:  # of the seed, greedy
        asked = line.get("messages") or [{"role": "user", "content": line["prompt"]}]
        assert model.logits(chat.prompt_ids(asked))[-1].argmax() == line["ids"][0]
    for name in ("distilled.jsonl", "evaluation.jsonl", "retention.jsonl", "seed_answers.jsonl"):
        assert json.loads((run / f"{name}.meta.json").read_text())["enable_thinking"] is False
    summary = json.loads((run / "summary.json").read_text())
    assert summary["settings"]["ModelConfig"]["enable_thinking"] == "false"
    assert summary["model"]["enable_thinking"] is False

    as_told = as_trained(ModelConfig(str(path)), [str(run / "sft")])
    assert as_told.enable_thinking == "false"
    assert "enable_thinking false: as the adapter was trained" in capsys.readouterr().out
    config = ModelConfig(str(path), enable_thinking="true")
    assert as_trained(config, [str(run / "sft")]).enable_thinking == "true"
    trained = TrainedChat.read(run / "sdft")
    assert trained.enable_thinking is False
    assert trained.why_other(open_chat(path, "false")) is None
    why = trained.why_other(open_chat(path, "default"))
    assert "it was trained with --enable-thinking false, this run uses default" in why


def record(path, value):
    return TrainedChat.of(open_chat(path, value), None)


def test_adapters_told_otherwise_are_not_mixed(model_dir, tmp_path):
    path = model_dir("qwen3")
    for value in ("true", "default"):
        (tmp_path / value).mkdir()
        record(path, value).write(tmp_path / value)
    as_before = json.loads((tmp_path / "default" / "chat.json").read_text())
    assert not {"enable_thinking", "tool_template_hash"} & set(as_before)
    adapters = [str(tmp_path / "true"), str(tmp_path / "default")]
    config = ModelConfig(str(path))
    with pytest.raises(
        ValueError, match=r"different enable_thinking \(.*true: true, .*default: def"
    ):
        as_trained(config, adapters)
    typed = ModelConfig(str(path), enable_thinking="default")
    assert as_trained(typed, adapters).enable_thinking == "default"
    alpaca = ModelConfig(str(path), chat_format="alpaca")
    assert as_trained(alpaca, adapters[:1]) == alpaca, "a format that has no such switch"


@pytest.mark.parametrize("beginning", ["", "\n", "\n\n  ", "  {% if true %}\nx{% endif %}", "Hi\n"])
def test_a_template_with_a_default_writes_what_it_wrote(tiny_llama_dir, beginning):
    tokenizer = load_tokenizer(tiny_llama_dir(tokenizer=True))
    source = beginning + LIKE_QWEN3.replace("{%- for", "{% for", 1)
    for value in (True, False):
        wanted = Chat(source, tokenizer, enable_thinking=value)
        found = Chat(with_default(source, value), tokenizer)
        text = found.render(ANSWERED, add_generation_prompt=False)
        assert text == wanted.render(ANSWERED, add_generation_prompt=False)
        assert found.prompt_ids(QUESTION) == wanted.prompt_ids(QUESTION)
    assert with_default(source, None) == source


@pytest.mark.parametrize("style", TEMPLATES)
def test_a_merged_models_template_is_told_so_where_no_program_says_otherwise(model_dir, style):
    path = model_dir(style)
    wanted = {value: open_chat(path, value).prompt_ids(QUESTION) for value in THINKING}
    both = {"default": TEMPLATES[style], "tool_use": TEMPLATES[style]}
    named = [{"name": name, "template": source} for name, source in both.items()]
    config = json.loads((path / "tokenizer_config.json").read_text())
    write_json(path / "tokenizer_config.json", config | {"chat_template": named})
    record(path, "false").install(path)
    for _ in ("chat_template.jinja", "tokenizer_config.json"):  # the first one comes first
        for value in THINKING:
            expected = "false" if value == "default" else value
            assert open_chat(path, value).prompt_ids(QUESTION) == wanted[expected]
        (path / "chat_template.jinja").unlink(missing_ok=True)
    tool_template = open_chat(path, "default").sources.tool_template
    assert tool_template.startswith("{%- if enable_thinking is not defined %}")
