"""Typed numbers: invalid ones are refused by name, before any work."""

import dataclasses
import re
from pathlib import Path

import pytest

from engine.data.config import DataConfig
from engine.distill.config import DistillConfig
from engine.evaluate.lm_eval_harness import HarnessConfig
from engine.evaluate.tasks.run import TaskConfig
from engine.jobs.adapted_model import AdaptedModelConfig
from engine.jobs.audit import AuditConfig
from engine.jobs.preflight import PreflightConfig
from engine.jobs.sdft import SdftConfig
from engine.jobs.study_config import StudyConfig
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.replay import ReplayConfig
from engine.train.validate import ValidateConfig
from model.lora import LoraConfig

ROOT = Path(__file__).resolve().parents[2]


# the fields that have no default
REQUIRED = {
    SdftConfig: {"out": "x"},
    StudyConfig: {"out": "x", "eval_data": "y"},
    ModelConfig: {"model": "x"},
    DataConfig: {"data": "x"},
    AdaptedModelConfig: {"model": "x"},
}
CONFIGS = [
    ModelConfig,
    DataConfig,
    DistillConfig,
    SamplerConfig,
    EncodeConfig,
    TrainConfig,
    LoraConfig,
    ValidateConfig,
    ReplayConfig,
    SdftConfig,
    StudyConfig,
    PreflightConfig,
    AuditConfig,
    TaskConfig,
    HarnessConfig,
    AdaptedModelConfig,
]


def number_fields():
    """(config, field name, "int" or "float") of every field that is a number, or may be None."""
    found = []
    for cls in CONFIGS:
        for field in dataclasses.fields(cls):
            kind, *_ = str(field.type).split(" ")
            if kind in ("int", "float"):
                found.append((cls, field.name, kind))
    return found


NUMBERS = number_fields()


def test_every_flag_that_is_a_number_is_tested():
    named = {cls.__name__ for cls in CONFIGS}
    used = set()
    for file in (ROOT / "scripts").glob("*.py"):
        used |= set(re.findall(r"\b(\w+Config)\b", file.read_text()))
    hold_others = {"JobConfig", "TrainJobConfig"}  # they have no numbers of their own
    assert used == named | hold_others
    assert len(NUMBERS) > 40


@pytest.mark.parametrize(("cls", "name", "kind"), NUMBERS, ids=lambda x: getattr(x, "__name__", x))
def test_invalid_numbers_are_refused_by_name(cls, name, kind):
    required = REQUIRED.get(cls, {})
    cls(**required).check()
    invalid = [10**30, -(10**30)] if name == "seed" else [10**30, -1]
    if kind == "float":
        invalid += [float("nan"), float("inf"), float("-inf"), 1e300, -1.0]
    for value in invalid:
        with pytest.raises(ValueError) as error:
            cls(**{**required, name: value}).check()
        message = str(error.value)
        assert re.search(rf"\b{name}\b", message)
        assert "expected" in message and "\n" not in message


def test_bad_numbers_stop_before_anything_is_loaded(tmp_path, script):
    common = ["--model", "/nowhere", "--data", "/nowhere", "--out", tmp_path / "x"]
    for name, flags, said in (
        ("sdft", ["--threads", "-1"], "threads -1"),
        ("sdft", ["--threads", "100000"], "threads 100000"),
        ("sdft", ["--temperature", "nan"], "temperature nan: expected a finite number"),
        ("sdft", ["--lr", "nan"], "lr nan"),
        ("sdft", ["--clip", "inf"], "clip inf"),
        ("sdft", ["--alpha", "nan"], "rank 8, alpha nan"),
        ("sdft", ["--weight-decay", "nan"], "weight_decay nan"),
        ("sdft", ["--loss", "stm:-1"], "loss 'stm:-1': expected stm:TAU, where TAU is above 1"),
        ("train", ["--loss", "kl"], "loss 'kl': expected one of sft, stm:TAU"),
        ("sdft", ["--mix", "2"], "mix 2.0: expected a share from 0 to 1"),
        ("sdft", ["--kv-memory", "nan"], "kv_memory nan"),
        ("sdft", ["--limit", "-1"], "limit -1: expected at least 1"),
        ("sdft", ["--eval-limit", "0"], "eval_limit 0: expected at least 1"),
        ("train", ["--max-length", "0"], "max_length 0: expected at least 1"),
        ("pareto", ["--eval-data", "x", "--alpha", "inf"], "alpha inf"),
        ("distill", ["--temperature", "1e-30"], "temperature 1e-30"),
        ("evaluate", ["--kv-memory", "inf"], "kv_memory inf"),
    ):
        code, printed = script(name, *common, *flags)
        assert code == 2 and f"error: {said}" in printed, printed
    assert not list(tmp_path.iterdir())
