"""Replay: the seed's own answers as training rows, made once, and kept apart from retention."""

from __future__ import annotations

import dataclasses
import inspect
import json
import textwrap

import pytest
import torch

from engine.data.config import DataConfig
from engine.data.rows import Row
from engine.evaluate.retention import refuse_replayed, retention_job
from engine.measure.general_prompts import PROMPTS, plain_words
from engine.runtime.files import read_jsonl
from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from engine.session import ModelConfig, Session
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.replay import (
    ReplayConfig,
    prompt_key,
    refuse_held_out,
    replay_examples,
    replay_pool,
)
from engine.train.train import TrainJobConfig, train_job
from engine.train.validate import ValidateConfig
from model.lora import LoraConfig

SAMPLING = SamplerConfig(temperature=1.0, seed=3)
OWN = ReplayConfig("own", replay_share=0.25, replay_max_new=6)


@pytest.fixture
def session(chat_dir):
    return Session.open(ModelConfig(str(chat_dir)))


@pytest.fixture
def prompts(tmp_path):
    """A function that writes a data file of prompts, with references that must not be used."""

    def write(*texts):
        file = tmp_path / "prompts.json"
        rows = [{"instruction": text, "output": "NOT USED"} for text in texts]
        file.write_text(json.dumps(rows))
        return str(file)

    return write


def make(session, config, file, task_rows=9, max_length=120, seed=0, sampling=SAMPLING):
    return replay_examples(
        session,
        config,
        file,
        replay_pool(session, config),
        task_rows=task_rows,
        max_length=max_length,
        seed=seed,
        sampling=sampling,
    )


def test_our_prompts_are_many_different_ones_and_none_measures_retention(session):
    pool = replay_pool(session, OWN)
    assert len(pool) == 309 == len({prompt.key for prompt in pool})
    texts = {plain_words(prompt.messages[0]["content"]) for prompt in pool}
    assert not texts & {plain_words(text) for _, text in PROMPTS}
    assert f"own ({len(pool)} prompts of ours)" in inspect.getsource(ReplayConfig), "as --help says"


@pytest.mark.parametrize(
    ("share", "task", "rows"),
    [(0.2, 80, 20), (0.5, 7, 7), (0.25, 10, 3), (0.01, 5, 1), (0.9, 10, 90)],
)
def test_the_share_is_of_all_rows_of_the_training(share, task, rows):
    """r / (n + r) is as close to the share as whole rows allow, and r is at least 1."""
    assert ReplayConfig("own", replay_share=share).rows(task) == rows


def test_rows_are_what_the_seed_samples_with_its_end_token(session, tmp_path, capsys):
    config = dataclasses.replace(OWN, replay_max_new=40)
    examples = make(session, config, tmp_path / "r.jsonl", max_length=400)
    assert len(examples) == 3
    said = capsys.readouterr().out
    assert "replay: 3 of 12 training rows (25.0%) are the seed model's own answers to 3" in said
    assert "retention is measured on other prompts" in said
    lines = {line["id"]: line for line in read_jsonl(tmp_path / "r.jsonl")}
    chat = session.chat
    decoding = dataclasses.replace(SAMPLING, max_new_tokens=40)
    with Sampler(session.model, chat.tokenizer.decode, chat.end_ids, decoding) as sampler:
        for example in examples:
            line = lines[example.id]
            prompt = chat.prompt_ids(line["messages"])
            name, _, sample = example.id.rpartition("/")
            (alone,) = sampler.run([Request(name, prompt, 40, int(sample))])
            end = [chat.end_id] if alone.finish == "stop" else []
            assert example.ids == prompt + alone.ids + end and example.n_prompt == len(prompt)


def test_other_seeds_and_shares_draw_other_prompts_from_one_file(session, tmp_path):
    file = tmp_path / "r.jsonl"
    first = make(session, OWN, file)
    assert make(session, OWN, file) == first
    other = make(session, OWN, file, seed=1)
    assert {example.id for example in other} != {example.id for example in first}
    more = make(session, OWN, file, task_rows=30)
    assert more[: len(first)] == first and len(more) == 10
    names = [line["id"] for line in read_jsonl(file)]
    assert len(names) == len(set(names)) == 10 + len({x.id for x in other} - {x.id for x in more})
    apart = make(session, OWN, tmp_path / "apart.jsonl", seed=1)
    assert apart == other, "an answer depends on no other request"
    with pytest.raises(
        ValueError, match="begun with other settings.*(?s:.)*max_new_tokens: 6 -> 7"
    ):
        make(session, dataclasses.replace(OWN, replay_max_new=7), file)


def test_a_killed_file_is_completed_to_the_same_bytes(session, tmp_path):
    file = tmp_path / "r.jsonl"
    examples = make(session, OWN, file, task_rows=18)
    whole = file.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == 6
    file.write_bytes(lines[4] + lines[1] + lines[0][:-9])  # another order, the last line torn
    assert make(session, OWN, file, task_rows=18) == examples
    assert file.read_bytes() == whole


def test_few_prompts_get_several_samples_but_not_at_temperature_0(session, prompts, tmp_path):
    config = ReplayConfig(prompts("Why?", "How far?", "why? "), replay_share=0.5, replay_max_new=5)
    examples = make(session, config, tmp_path / "r.jsonl", task_rows=5)
    keys = [prompt_key([{"role": "user", "content": text}]) for text in ("Why?", "How far?")]
    samples = [example.id.removeprefix("replay:").split("/") for example in examples]
    assert sorted(samples) == sorted(
        [[keys[0], "0"], [keys[1], "0"], [keys[0], "1"], [keys[1], "1"], [samples[0][0], "2"]]
    )
    assert len({tuple(example.ids) for example in examples}) == 5
    greedy = dataclasses.replace(SAMPLING, temperature=0.0)
    with pytest.raises(ValueError, match="2 prompts, but a share of 0.5 needs 5 rows, and at"):
        make(session, config, tmp_path / "g.jsonl", task_rows=5, sampling=greedy)
    assert not (tmp_path / "g.jsonl").exists()


def test_references_are_not_used_and_long_prompts_are_left_out(session, prompts, tmp_path, capsys):
    config = ReplayConfig(prompts("Why?", "long " * 60, "How far?"), 0.5, replay_max_new=50)
    examples = make(session, config, tmp_path / "r.jsonl", task_rows=2, max_length=60)
    assert all(len(example.ids) <= 60 for example in examples)
    said = capsys.readouterr().out
    assert "references in" in said and "are not used, the seed model answers" in said
    used = {session.chat.tokenizer.decode(example.ids) for example in examples}
    assert len(used) == 2 and not any("NOT USED" in text or "long" in text for text in used)
    with pytest.raises(ValueError, match="no prompt leaves room for an answer within 20 tokens"):
        make(session, config, tmp_path / "x.jsonl", max_length=20)


def test_prompts_over_which_retention_is_measured_are_refused_by_name(session, prompts):
    """Other letter case or space is the same prompt."""
    first, second = PROMPTS[0][1], PROMPTS[63][1]
    file = prompts("Why?", f" {first.upper()} ", second)
    with pytest.raises(ValueError, match="2 of its prompts are among the 64 over which") as error:
        replay_pool(session, ReplayConfig(file))
    assert file in str(error.value) and first.upper() in str(error.value)
    assert second in str(error.value) and "Why?" not in str(error.value)
    assert f"{file}:1: ' {first.upper()} '" in str(error.value)


def held_out(row_id, *texts):
    """A held-out row of a system message, questions and answers, its reference last."""
    messages = [{"role": "system", "content": "Be brief."}]
    for i, text in enumerate(texts):
        messages.append({"role": ("user", "assistant")[i % 2], "content": text})
    return Row(row_id, tuple(messages))


def test_prompts_of_held_out_rows_are_refused_with_file_and_line(session, tmp_path):
    """The whole prompt of a row: letter case, space and a system message make no other."""
    file = tmp_path / "general.jsonl"
    texts = ["Who?", "What is it?", "  HOW  far? "]
    lines = [json.dumps({"instruction": text, "output": ""}) for text in texts]
    file.write_text("\n".join([lines[0], "", *lines[1:]]))  # the second prompt is on line 3
    config = ReplayConfig(str(file))
    pool = replay_pool(session, config)
    one, other = held_out("t1", "what is it?", "A."), held_out("t2", "How far?", "Near.")
    longer = held_out("t3", "Who?", "I.", "Which?", "None.")
    with pytest.raises(ValueError, match="general.jsonl: 2 of its prompts are those of held-") as e:
        refuse_held_out(config, pool, [one, longer, other])
    listed = str(e.value).splitlines()[1:]
    assert [line.strip() for line in listed] == [
        f"{file}:3: 'What is it?' is the prompt of held-out row t1",
        f"{file}:4: 'HOW far?' is the prompt of held-out row t2",
    ]
    assert "remove them from one of the two files" in str(e.value)
    refuse_held_out(config, pool, [longer])

    ours = replay_pool(session, OWN)
    text = ours[4].messages[0]["content"]
    with pytest.raises(ValueError, match="own: 1 of its prompts.*or give --replay a file") as e:
        refuse_held_out(OWN, ours, [held_out("t4", text, "A.")])
    assert f"{textwrap.shorten(text, 80)!r} is the prompt of held-out row t4" in str(e.value)


@pytest.mark.parametrize("share", [0.0, 0.96, -0.1, float("nan")])
def test_shares_out_of_range_are_refused(share):
    with pytest.raises(ValueError, match="replay_share .*: expected a share above 0 and at most"):
        ReplayConfig("own", replay_share=share).check()


# ---- a training with replay


def job(data, replay, seed=5):
    return TrainJobConfig(
        data=DataConfig(str(data)),
        encode=EncodeConfig(max_length=120),
        train=TrainConfig(lr=1e-3, epochs=1, batch_rows=4, seed=seed),
        lora=LoraConfig(rank=2),
        validate=ValidateConfig(),
        replay=replay,
    )


def test_a_training_mixes_them_in_and_retention_refuses_their_prompts(
    session, prompts, problems, tmp_path, capsys
):
    """A run that is started again takes the same rows; another file is not its continuation."""
    data, out = problems / "train.json", tmp_path / "run"
    replay = ReplayConfig(prompts("Why?", "How far?"), replay_share=0.2, replay_max_new=5)
    plain = train_job(session, job(data, ReplayConfig()), tmp_path / "plain")
    summary = train_job(session, job(data, replay), out)
    assert (plain["examples"], summary["examples"], summary["steps"]) == (8, 10, 3)
    assert len(read_jsonl(tmp_path / "run.replay.jsonl")) == 2
    settings = json.loads((out / "meta.json").read_text())["settings"]
    assert settings["replay"]["rows"] == 2 and len(settings["replay"]["prompts"]) == 2
    assert "replay" not in json.loads((tmp_path / "plain" / "meta.json").read_text())["settings"]
    again = train_job(session, job(data, replay), out, resume=True)
    assert again == summary
    with pytest.raises(ValueError, match="was started with other settings.*(?s:.)*data: "):
        train_job(session, job(data, ReplayConfig()), out, resume=True)
    capsys.readouterr()

    refuse_replayed([str(out)], PROMPTS)
    said = capsys.readouterr().out
    assert "trained with replay of 2 general prompts; drift is measured on others" in said
    refuse_replayed([str(tmp_path / "plain")], [("file", "Why?")])
    assert not capsys.readouterr().out
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([{"instruction": "how FAR?"}, {"instruction": "Who?"}]))
    measure = DataConfig(str(file))
    with pytest.raises(ValueError, match=r"replay\) to 1 of these 2 prompts") as error:
        retention_job(session, [str(out)], tmp_path / "r.jsonl", SAMPLING, measure)
    assert "how FAR?" in str(error.value) and "Who?" not in str(error.value)
    assert not (tmp_path / "r.jsonl").exists()


def test_replay_pulls_the_adapter_towards_the_seed(session, prompts, problems, tmp_path):
    """With nine of ten rows replay, the same steps move the logits on their prompts less."""
    data = problems / "train.json"
    texts = ["Why?", "How far?", "Who?"]
    replay = ReplayConfig(prompts(*texts), replay_share=0.9, replay_max_new=8)
    config = job(data, replay)
    steps = dataclasses.replace(config.train, max_steps=5, schedule="constant", lr=1e-2)
    moved = {}
    for name, used in (("with", replay), ("without", ReplayConfig())):
        of_run = dataclasses.replace(config, train=steps, replay=used)
        train_job(session, of_run, tmp_path / name)
        lora = session.adapter(tmp_path / name)
        distance = 0.0
        for line in read_jsonl(tmp_path / "with.replay.jsonl"):
            ids = session.chat.prompt_ids(line["messages"]) + line["ids"]
            seed = torch.log_softmax(session.model.logits(ids), -1)
            tuned = torch.log_softmax(session.model.logits(ids, lora), -1)
            distance += (seed.exp() * (seed - tuned)).sum(-1).mean().item()
        moved[name] = distance
    print(moved)
    assert 0 < moved["with"] < 0.5 * moved["without"]
