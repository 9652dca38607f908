"""The main job and the scripts a person types, end to end on a tiny random model."""

import json
import math
import shutil
from collections import Counter

import pytest
import torch

from engine.data.config import DataConfig
from engine.data.distilled import load_distilled
from engine.evaluate.target_task import Score
from engine.runtime.files import read_jsonl
from engine.session import ModelConfig, Session
from engine.train.validate import ValidateConfig, Validator
from model.llama import Llama
from model.peft_format import load_lora
from tests.helpers.llama_dirs import CHATML
from tests.helpers.scripts import run_script as script

FLAGS = ["--max-new-tokens", "8", "--eval-max-new", "6", "--retention-max-new", "4"]
FLAGS += ["--epochs", "1", "--batch-rows", "4", "--rank", "2", "--report-rows", "5"]
FLAGS += ["--report-answers", "3"]


def test_the_main_job_measures_both_arms_and_a_second_run_changes_nothing(
    chat_dir, problems, tmp_path
):
    out = tmp_path / "run"
    args = ["--model", chat_dir, "--data", problems / "train.json"]
    args += ["--eval-data", problems / "test.json"]
    args += ["--verify", "number", "--out", out, *FLAGS]
    printed = script("sdft", *args)
    result = json.loads((out / "summary.json").read_text())
    assert set(result["evaluation"]) == {"seed", "sft", "sdft"} and "KL to seed" in printed
    assert result["evaluation"]["seed"]["n"] == 4
    assert all(0 <= result["retention"][arm]["kl"] < 1 for arm in ("sft", "sdft"))
    assert result["training"]["sft"]["steps"] == result["training"]["sdft"]["steps"] == 2
    assert sum(result["distilled"]["counts"].values()) == 8
    for arm in ("sft", "sdft"):
        Llama.from_pretrained(chat_dir).bind(load_lora(out / arm))
    _check_report(out, printed)
    # the same command again computes nothing
    files = ["distilled.jsonl", "evaluation.jsonl", "retention.jsonl", "sft/metrics.jsonl"]
    files += ["tokens.jsonl", "answers.jsonl", "retention_task.jsonl"]
    before = [(out / name).read_bytes() for name in files]
    script("sdft", *args)
    assert [(out / name).read_bytes() for name in files] == before
    again = json.loads((out / "summary.json").read_text())
    for name in ("evaluation", "retention", "retention_task", "update_norms"):
        assert again[name] == result[name]
    # another setting is refused by name
    printed = script("sdft", *args, "--template", "refer", code=2)
    assert "distill.template: 'using' -> 'refer'" in printed and "Traceback" not in printed


@pytest.mark.parametrize(
    ("family", "settings"), [("mistral", {"sliding_window": 480}), ("qwen3", {})]
)
def test_the_main_job_runs_on_another_family_and_continues(
    tiny_llama_dir, problems, tmp_path, family, settings
):
    """Prompts fit inside the window. What a kill took is made again: half of the answers, and the
    second arm with all that followed."""
    model = tiny_llama_dir(tokenizer=True, model_type=family, **settings)
    out = tmp_path / "run"
    args = ["--model", model, "--data", problems / "train.json", "--out", out, *FLAGS]
    args += ["--eval-data", problems / "test.json", "--verify", "number"]
    printed = script("sdft", *args)
    assert ("a sliding window of 480 tokens" in printed) == (family == "mistral")
    assert f"report: {out}/report.html" in printed and (out / "report.html").exists()
    answers = (out / "evaluation.jsonl").read_bytes()
    adapter = (out / "sdft" / "adapter_model.safetensors").read_bytes()
    result = json.loads((out / "summary.json").read_text())
    (out / "evaluation.jsonl").write_bytes(answers[: len(answers) // 2])  # as a kill leaves it
    shutil.rmtree(out / "sdft")
    (out / "summary.json").unlink()
    script("sdft", *args)
    assert sorted((out / "evaluation.jsonl").read_bytes().splitlines()) == sorted(
        answers.splitlines()
    )
    assert (out / "sdft" / "adapter_model.safetensors").read_bytes() == adapter
    again = json.loads((out / "summary.json").read_text())
    assert again["evaluation"] == result["evaluation"]
    for arm in ("sft", "sdft"):
        Llama.from_pretrained(model).bind(load_lora(out / arm))


def test_both_arms_are_validated_and_keep_their_best(chat_dir, problems, tmp_path):
    out = tmp_path / "run"
    args = ["--model", chat_dir, "--data", problems / "train.json", "--no-score", "--out", out]
    args += FLAGS
    validation = ["--val-every", "1", "--val-data", problems / "test.json", "--val-prompts", "1"]
    script("sdft", *args, *validation, "--best", "kl")
    result = json.loads((out / "summary.json").read_text())
    for arm in ("sft", "sdft"):
        lines = read_jsonl(out / arm / "validation.jsonl")
        assert [line["step"] for line in lines] == [1, 2]
        assert all(line["nll"] > 0 for line in lines)
        best = result["training"][arm]["best"]
        assert best["metric"] == "kl" and best["value"] == min(line["kl"] for line in lines)
    printed = script("sdft", *args, code=2)  # without validation it is another run
    assert "validate" in printed and "Traceback" not in printed
    assert "--best nll needs" in script("sdft", *args, "--best", "nll", code=2)


def _check_report(out, printed):
    """The page, the training texts with the likelihoods that score.py found, the tuned answers."""
    assert f"report: {out}/report.html" in printed and "8 rows" in printed
    assert f'"name":"{out.name}"' in (out / "report.html").read_text()
    scores = {line["id"]: line for line in read_jsonl(out / "distilled.jsonl.scores.jsonl")}
    tokens = read_jsonl(out / "tokens.jsonl")
    assert len(tokens) == 5 and len({line["id"] for line in tokens}) == 5
    for line in tokens:
        sft, score = line["sft"], scores[line["id"]]
        assert len(sft["pieces"]) == sft["prompt"] + len(sft["nll"])
        mean_nll = sum(sft["nll"]) / len(sft["nll"])
        assert mean_nll == pytest.approx(score["reference_nll"], abs=1e-3)
        answer = "".join(sft["pieces"][sft["prompt"] : -1])
        assert answer.startswith("The answer is")

    # the answers to the three general prompts with the largest drift of either arm
    lines = read_jsonl(out / "answers.jsonl")
    general = [line for line in lines if "prompt" in line]
    assert Counter(line["arm"] for line in general) == {"sft": 3, "sdft": 3}
    drift = {}
    for line in read_jsonl(out / "retention.jsonl"):
        kl = line["kl"] / line["tokens"]
        drift[line["prompt"]] = max(kl, drift.get(line["prompt"], 0))
    most_drifted = sorted(drift, key=drift.get)[-3:]
    assert {line["prompt"] for line in general} == set(most_drifted)

    held_out = [line for line in lines if "id" in line]
    assert len(held_out) == 6
    answers = read_jsonl(out / "evaluation.jsonl")
    seed_answers = {line["id"]: line for line in answers if line["arm"] == "seed"}
    for line in held_out:
        assert 0 <= line["kl"] < line["tokens"]
        # the seed's answer, with its end token where it ended
        assert line["tokens"] - len(seed_answers[line["id"]]["ids"]) in (0, 1)


def test_held_out_rows_must_not_be_trained_on(chat_dir, problems, tmp_path):
    train = problems / "train.json"
    args = ["--model", chat_dir, "--data", train, "--eval-data", train, "--out", tmp_path / "x"]
    assert "8 held-out rows are also trained on" in script("sdft", *args, code=2)


def test_the_scripts_of_single_stages_take_each_others_files(chat_dir, problems, tmp_path):
    model, train = ["--model", chat_dir], ["--data", problems / "train.json"]
    distilled = tmp_path / "d.jsonl"
    said = script("distill", *model, *train, "--out", distilled, "--max-new-tokens", "8")
    assert "targets that differ" in said and "NLL per token" in said
    run = tmp_path / "sft"
    said = script("train", *model, "--data", distilled, "--target", "reference", "--out", run,
                  "--epochs", "1", "--modules", "all")  # fmt: skip
    assert "LoRA on 14/14 linears" in said
    raw = tmp_path / "raw"  # plain rows give the same adapter as their references
    script("train", *model, *train, "--out", raw, "--epochs", "1", "--modules", "all")
    torch.testing.assert_close(load_lora(raw).params, load_lora(run).params, rtol=0, atol=0)
    shown = script("train", *model, "--data", distilled, "--target", "reference", "--show", "1")
    assert "with loss (*)" in shown and "  * " in shown
    test = ["--data", problems / "test.json", "--verify", "number"]
    said = script("evaluate", *model, "--adapter", run, *test, "--max-new-tokens", "6",
                  "--out", tmp_path / "e.jsonl")  # fmt: skip
    assert "seed" in said and "sft" in said and "0/4" in said
    said = script("retention", *model, "--adapter", run, "--max-new-tokens", "3",
                  "--out", tmp_path / "r.jsonl")  # fmt: skip
    assert "KL careful" in said and "KL from seed" in said
    said = script("generate", *model, "--prompt", "Hi", "--max-new-tokens", "3", "--adapter", run)
    script("generate", *model, *train, "--samples", "2", "--temperature", "1",
           "--max-new-tokens", "3", "--out", tmp_path / "g.jsonl")  # fmt: skip
    answers = [json.loads(line) for line in (tmp_path / "g.jsonl").read_text().splitlines()]
    assert len(answers) == 16 and {answer["sample"] for answer in answers} == {0, 1}


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--model", "/nowhere", "--data", "x"], "/nowhere"),
        (["--model", "TINY", "--data", "/nowhere.json"], "/nowhere.json"),
        (["--model", "TINY", "--data", "DATA", "--ops", "fast"], "--ops 'fast' is not known"),
        (["--model", "TINY", "--data", "DATA", "--lr", "-1"], "lr > 0"),
        (["--model", "TINY", "--data", "DATA", "--modules", "q_proj,x"], "a Llama layer has no x"),
        (["--model", "TINY", "--data", "DATA", "--verify", "magic"], "magic"),
        (["--model", "TINY", "--data", "DATA", "--columns", "prompt"], "--columns"),
        (["--model", "TINY", "--data", "DATA", "--chat-format", "llama3"], "llama3"),
        (["--model", "TINY", "--data", "DATA", "--rows", "-1"], "rows -1"),
        (["--model", "TINY", "--data", "DATA", "--report-rows", "-1"], "report_rows -1"),
    ],
)
def test_mistakes_get_one_clear_message_before_work_starts(
    chat_dir, problems, tmp_path, args, said
):
    paths = {"TINY": str(chat_dir), "DATA": str(problems / "train.json")}
    args = [paths.get(arg, arg) for arg in args]
    printed = script("sdft", *args, "--out", tmp_path / "run", code=2)
    assert said in printed and "Traceback" not in printed and "error: " in printed
    assert not (tmp_path / "run").exists()


NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + CHATML
)


@pytest.fixture
def no_system(tiny_llama_dir):
    """A model whose chat template refuses system messages (Gemma's do)."""
    path = tiny_llama_dir(tokenizer=True)
    settings = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": NO_SYSTEM}))
    return path


def test_validation_reads_its_file_as_training_does(chat_dir, problems, tmp_path):
    """--system, --columns and --skip-bad; train.py and sdft.py find the same number."""
    for name in ("train", "test"):
        file = problems / f"{name}.json"
        rows = [{"q": row["question"], "a": row["answer"]} for row in json.loads(file.read_text())]
        unusable = {"q": "", "a": "x"}
        file.write_text(json.dumps([*rows, unusable]))
    args = ["--model", chat_dir, "--data", problems / "train.json"]
    args += ["--epochs", "1", "--batch-rows", "4"]
    args += ["--columns", "prompt=q,response=a", "--skip-bad", "--system", "Count.", "--rank", "2"]
    args += ["--val-every", "1", "--val-data", problems / "test.json", "--val-prompts", "0"]
    said = script("train", *args, "--out", tmp_path / "sft", "--lr", "1e-3")
    assert "data: 4 rows from" in said and "1 unusable rows left out" in said
    found = [x["nll"] for x in read_jsonl(tmp_path / "sft" / "validation.jsonl")]
    job = ["--max-new-tokens", "4", "--no-score", "--retention-max-new", "2", "--report-rows", "0"]
    job += ["--report-answers", "0", "--lr", "1e-3", "--out", tmp_path / "run"]
    script("sdft", *args, *job)
    assert [x["nll"] for x in read_jsonl(tmp_path / "run" / "sft" / "validation.jsonl")] == found
    # the system message changes the loss, so it was read
    session = Session.open(ModelConfig(str(chat_dir)))
    validation = ValidateConfig(val_every=1, val_data=str(problems / "test.json"), val_prompts=0)
    lora = load_lora(tmp_path / "sft")
    session.model.bind(lora)

    def held_out_nll(system):
        data = DataConfig(
            str(problems / "test.json"), "prompt=q,response=a", skip_bad=True, system=system
        )
        return Validator(validation, data, session)(lora)[0]

    with_system = held_out_nll("Count.")
    assert with_system == pytest.approx(found[-1], rel=1e-6)
    assert abs(held_out_nll(None) - with_system) > 1e-3


def test_rows_refused_by_the_template_are_listed_and_skipped(no_system, problems, tmp_path):
    """Rows with a system message, in every script; all of them at once, and before any work."""
    mixed = json.loads((problems / "train.json").read_text())[:6]
    for row in mixed[1::2]:
        row["messages"] = [
            {"role": "system", "content": "s"},
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": row["answer"]},
        ]
    (problems / "mixed.json").write_text(json.dumps(mixed))
    args = ["--model", no_system, "--data", problems / "mixed.json"]
    flags = ["--max-new-tokens", "4", "--epochs", "1"]
    for name, own in (
        ("distill", ["--max-new-tokens", "4"]),
        ("train", ["--epochs", "1"]),
        ("sdft", [*flags, "--no-score", "--retention-max-new", "2", "--report-answers", "0"]),
        ("evaluate", ["--max-new-tokens", "4"]),
    ):
        out = tmp_path / name
        said = script(name, *args, *own, "--out", out, code=2)
        assert "3 unusable rows" in said and said.count("System role not supported") == 3
        assert "--skip-bad" in said and "--max-length" not in said and not out.exists()
        said = script(name, *args, *own, "--out", out, "--skip-bad")
        assert "3 rows from" in said and "3 unusable rows left out" in said
    # a template of ours that tells a system message is named, where the rows have none
    plain = ["--model", no_system, "--data", problems / "train.json", "--out", tmp_path / "g"]
    said = script("distill", *plain, "--template", "gsm8k", code=2)
    assert "8 unusable rows" in said and "as the request for a rewrite (--template gsm8k)" in said


def test_messages_that_are_context_only_go_through_the_whole_job(chat_dir, tmp_path):
    """OpenAI's weight 0: not rewritten, not scored, not trained on; the context of what follows."""

    def talk(i):
        return {
            "messages": [
                {"role": "user", "content": f"What is {i}?"},
                {"role": "assistant", "content": "Wrong.", "weight": 0},
                {"role": "user", "content": "Again."},
                {"role": "assistant", "content": f"It is {i}.", "weight": 1},
            ]
        }

    data, out = tmp_path / "talk.jsonl", tmp_path / "run"
    data.write_text("".join(json.dumps(talk(i)) + "\n" for i in range(4)))
    args = ["--model", chat_dir, "--data", data]
    said = script("sdft", *args, "--out", out, *FLAGS)
    assert "4 of the assistant's messages are context only" in said
    assert "4 turns: " in said and "4 further turns are context only" in said
    assert said.count("examples 4, ") == 3 and said.count("context 4") == 3
    lines = load_distilled(out / "distilled.jsonl")
    assert [line.status == "context_only" for line in lines] == [True, False] * 4
    rewritten = lines[1::2]
    for line in rewritten:
        assert line.messages[1] == {"role": "assistant", "content": "Wrong."}
    scored = [line["id"] for line in read_jsonl(out / "distilled.jsonl.scores.jsonl")]
    assert scored == [line.id for line in rewritten]
    plain = script("train", *args, "--out", tmp_path / "sft", *FLAGS[6:12])
    assert "examples 4," in plain and "context 4" in plain
    torch.testing.assert_close(
        load_lora(tmp_path / "sft").params, load_lora(out / "sft").params, rtol=0, atol=0
    )
    said = script("preflight", *args, "--max-new-tokens", "4", "--sample", "2")
    assert json.loads(said.splitlines()[-1])["sample"] == 2


def long_rows(problems):
    """train.json with a prompt that fills the model (512), and one that leaves little room."""
    rows = json.loads((problems / "train.json").read_text())
    rows[3]["question"] += " x" * 300
    rows[5]["question"] += " x" * 200
    (problems / "long.json").write_text(json.dumps(rows))
    return problems / "long.json"


def test_long_turns_are_reported_before_distillation(chat_dir, problems, tmp_path):
    out, rows = tmp_path / "run", long_rows(problems)
    args = ["--model", chat_dir, "--data", rows, *FLAGS, "--max-length", "300", "--out", out]
    said = script("sdft", *args, code=2)
    assert "2 turns cannot be trained on with max_length=300" in said and "--drop-long" in said
    assert not out.exists()
    said = script("sdft", *args, "--drop-long")
    assert said.count("examples 6, ") == 3 and said.count("dropped 2") == 3
    assert said.index("dropped 2") < said.index("8 turns: ")
    for arm in ("sft", "sdft"):
        meta = json.loads((out / arm / "meta.json").read_text())
        assert meta["summary"]["examples"] == 6
    said = script("sdft", *args[:-1], tmp_path / "exact", "--paper-exact")
    assert said.count("examples 8, ") == 3 and said.count("cut 2") == 3
    # stage by stage the same
    distilled = ["--model", chat_dir, "--data", rows, "--max-new-tokens", "4"]
    said = script("distill", *distilled, "--out", tmp_path / "d.jsonl")
    assert "NOTE: 1 of 8 turns have prompts of 512 tokens or more" in said
    assert said.index("NOTE: 1 of 8") < said.index("prompt_too_long")
    assert "requests 2 leave no room" in said or "requests 1 leave no room" in said
    trained = ["--model", chat_dir, "--data", tmp_path / "d.jsonl", "--max-length", "300"]
    trained += ["--epochs", "1", "--out", tmp_path / "t"]
    assert "--drop-long" in script("train", *trained, code=2)
    assert "examples 6," in script("train", *trained, "--drop-long")


def test_held_out_and_validation_rows_must_fit_before_work_starts(chat_dir, problems, tmp_path):
    out, rows = tmp_path / "run", long_rows(problems)
    held = json.loads(rows.read_text())
    for row in held:
        row["question"] = "Else: " + row["question"]
    (problems / "held.json").write_text(json.dumps(held))
    args = ["--model", chat_dir, "--data", problems / "train.json", *FLAGS, "--no-score"]
    args += ["--out", out]
    said = script("sdft", *args, "--eval-data", problems / "held.json", code=2)
    assert "1 held-out rows of" in said and "longer than the model's 512 tokens" in said
    looking = ["--val-every", "2", "--val-data", problems / "held.json", "--val-prompts", "0"]
    assert "--drop-long" in script("sdft", *args, *looking, code=2) and not out.exists()
    said = script("sdft", *args, *looking, "--eval-data", problems / "held.json", "--drop-long")
    assert "1 held-out rows left out" in said and "validation: 1 turns are too long" in said
    assert json.loads((out / "summary.json").read_text())["evaluation"]["seed"]["n"] in (0, 7)
    judged = ["--model", chat_dir, "--data", problems / "held.json", "--max-new-tokens", "4"]
    judged += ["--out", tmp_path / "e.jsonl"]
    assert "--drop-long" in script("evaluate", *judged, code=2)
    assert "1 held-out rows left out" in script("evaluate", *judged, "--drop-long")


def test_a_warmup_as_long_as_the_run_is_reported_before_it(chat_dir, problems, tmp_path):
    args = ["--model", chat_dir, "--data", problems / "train.json", "--max-new-tokens", "4"]
    args += ["--out", tmp_path / "run", "--warmup", "0.1", "--max-steps", "1"]
    for name in ("sdft", "train"):
        own = args[:4] + args[6:] if name == "train" else args
        said = script(name, *own, code=2)
        assert "the warm-up is the whole run (1 steps)" in said
        kept = [file.name for file in (tmp_path / "run").glob("*")]
        assert kept == ([] if name == "sdft" else ["examples"])  # encoded: no run has begun
    for warmup, out, warned in (("0.9", "run", True), ("0.5", "other", False)):
        said = script("train", *args[:4], "--out", tmp_path / out, "--warmup", warmup,
                      "--max-steps", "2")  # fmt: skip
        assert ("WARNING: the warm-up (--warmup 0.9) takes the whole run" in said) == warned


def test_every_script_names_a_file_of_another_format(chat_dir, tmp_path):
    (tmp_path / "a.json").write_bytes(b"PAR1" + bytes(100))
    for name in ("distill", "train", "sdft", "evaluate", "preflight", "generate"):
        args = ["--model", chat_dir, "--data", tmp_path / "a.json"]
        args += [] if name == "preflight" else ["--out", tmp_path / "x"]
        said = script(name, *args, code=2)
        assert "a.json cannot be read as a table: Parquet" in said and "Traceback" not in said


def test_the_interval_of_a_score_is_wilsons():
    """Wilson (1927): 8 of 10 gives 0.490 to 0.943."""
    low, high = Score(10, 8, 0, 1.0).interval()
    assert (round(low, 3), round(high, 3)) == (0.490, 0.943)
    low, high = Score(20, 0, 0, 1.0).interval()
    assert low == 0 and 0.15 < high < 0.17
    assert math.isnan(Score(0, 0, 0, 1.0).share)
