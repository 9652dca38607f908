"""`--template FILE`: how a reference is shown, in a user's own words; and rewriting without it."""

from __future__ import annotations

import dataclasses

import pytest

from engine.data.distilled import KEPT
from engine.distill import writer
from engine.distill.config import DistillConfig
from engine.distill.rewrite_prompts import get_template, prompt
from engine.distill.selection import OURS, judge
from engine.sampling.requests import Request
from engine.sampling.sampler import Sampler
from engine.verify.verifiers import get_verifier
from tests.helpers.distillation import SAMPLING, judge_by_hash, load, rows, run_distillation

TEXT = """[system]
You are a teacher. {system}
[user]
{instruction}

### Model solution:
{reference}

Explain {{it}} as {"json": 1}.
[prefix]
Let us see.
"""


@pytest.fixture
def template(tmp_path):
    """A function that writes a template file and returns its path as text."""

    def write(text=TEXT, name="template.txt"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def message(role, content):
    return {"role": role, "content": content}


def test_a_files_parts_become_the_messages(template):
    """Texts that are put in are not searched for placeholders; earlier turns stay."""
    found = get_template(template())
    earlier = [message("user", "Hi"), message("assistant", "Hello")]
    context = [message("system", "Be {reference}."), *earlier, message("user", "Add {system}.")]
    asked = 'Add {system}.\n\n### Model solution:\n5 {instruction}\n\nExplain {it} as {"json": 1}.'
    assert prompt(None, found, context, "5 {instruction}") == [
        message("system", "You are a teacher. Be {reference}."),
        *earlier,
        message("user", asked),
    ]
    assert found.prefix == "Let us see." and found.marks == ("### Model solution:",)
    assert prompt(None, found, context[1:], "5")[0] == message("system", "You are a teacher.")


def test_a_file_without_headings_is_the_users_message(template):
    """Then the row's system message stays as it is."""
    found = get_template(template("\ufeffQ: {instruction}\r\nA: {reference}\r\n"))
    context = [message("system", "Be kind."), message("user", "Why?")]
    expected = [message("system", "Be kind."), message("user", "Q: Why?\nA: So.")]
    assert prompt(None, found, context, "So.") == expected
    assert prompt(None, found, context[1:], "So.") == expected[1:] and found.prefix == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{instruction}\n{refrence}", r":2: no placeholder \{refrence\}; expected \{instruction\}"),
        ("{reference}", r"txt: \{instruction\} is missing"),
        ("{instruction}", r"txt: \{reference\} is missing.*--cascade unguided"),
        ("[system]\n{instruction}\n[user]\n{reference}", r"\{instruction\} is missing"),
        ("{{instruction}} {reference}", r"\{instruction\} is missing"),
        ("", "is missing"),
        ("[user]\n{instruction}{reference}\n[user]\nx", r":3: a second part \[user\]"),
        ("x {instruction}{reference}\n[user]\nx", r":2: a second part \[user\]"),
        ("{instruction}{reference}\n[prefix]\n{system}", r":3: the part \[prefix\] has a placeh"),
    ],
)
def test_a_faulty_file_is_refused_with_its_line(template, text, message):
    with pytest.raises(ValueError, match=message):
        DistillConfig(template=template(text)).check()


def test_what_is_neither_a_name_nor_a_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match="template 'usng': expected one of using, refer, gsm8k"):
        DistillConfig(template="usng").check()
    (tmp_path / "bytes").write_bytes(b"\xff{instruction}{reference}")
    with pytest.raises(ValueError, match="cannot be read as UTF-8"):
        DistillConfig(template=str(tmp_path / "bytes")).check()


def test_settings_hold_the_files_content_not_its_place(template, tmp_path):
    """So a moved file continues a run, and a changed one is refused."""
    first = DistillConfig(template=template())
    moved = DistillConfig(template=template(name="moved.txt"))
    assert first.settings() == moved.settings() and "sha256" in first.settings()["template"]
    assert DistillConfig().settings() == dataclasses.asdict(DistillConfig())
    before = first.settings()
    template(TEXT.replace("teacher", "poet"))
    assert first.settings() == before, "it is read once"
    assert DistillConfig(template=first.template).settings() != before


def test_rewrites_are_sampled_from_the_files_prompt(template, tiny_llama_dir, tmp_path):
    """The prefix is forced, and part of the response."""
    path = tiny_llama_dir(tokenizer=True)
    config = DistillConfig(max_new_tokens="9", template=template())
    report = run_distillation(path, tmp_path / "d.jsonl", config, given=rows(2)[1:])
    (line,) = report.lines
    model, chat = load(path)
    messages = prompt(chat, config.shown_template, line.messages, line.reference)
    assert "### Model solution:" in messages[-1]["content"]
    request = Request(line.id, chat.prompt_ids(messages, "Let us see."), 9)
    with Sampler(model, chat.tokenizer.decode, chat.end_ids, SAMPLING) as sampler:
        (alone,) = sampler.run([request])
    assert line.response_ids == [*chat.prefix_ids("Let us see."), *alone.ids]


def test_an_answer_that_repeats_a_heading_of_the_file_is_an_echo(template):
    """Unless the reference has such a line too."""
    rules = DistillConfig(template=template()).rules
    assert DistillConfig().rules is OURS and rules.marks == ("### Model solution:",)
    context = [message("user", "What is two and three?")]
    verifier = get_verifier("none")

    def status(response, reference="It is five."):
        return judge(context, reference, response, "stop", verifier, rules=rules)

    assert status("Five.") == "accepted"
    assert status("Sure.\n  ### model solution:\nFive.") == "echo"
    assert status("The model solution: five.") == "accepted", "only a whole line counts"
    assert status("### Model solution:\nFive.", "### Model solution:\n5") == "accepted"


# ---- unguided self-output


def test_unguided_asks_as_often_and_never_shows_the_reference():
    assert DistillConfig().unguided().stages == DistillConfig(cascade="unguided").stages
    assert DistillConfig(cascade="unguided").cascade == "unguided"
    three = DistillConfig(cascade="guided:2,cooler:1", verify="number").unguided()
    assert three.cascade == "unguided:3" and three.verify == "number"
    assert not any(stage.guided for stage in three.stages)
    DistillConfig(paper_exact=True).unguided().check()  # also asks once
    most = DistillConfig(cascade="unguided:64,guided:64").unguided()
    most.check()


def test_unguided_answers_are_verified_and_fall_back_to_the_reference(
    tiny_llama_dir, tmp_path, monkeypatch
):
    monkeypatch.setattr(writer, "judge", judge_by_hash)
    path = tiny_llama_dir(tokenizer=True)
    config = DistillConfig(max_new_tokens="9", cascade="unguided")
    lines = run_distillation(path, tmp_path / "d.jsonl", config).lines
    _, chat = load(path)
    assert {line.status in KEPT for line in lines} == {True, False}
    for line in lines:
        assert line.prompt_tokens == len(chat.prompt_ids(line.messages))
        assert list(line.tries) == ["unguided"]
        kept = line.status in KEPT
        assert line.target == (line.response if kept else line.reference)
        assert line.is_rejected != kept
