"""What the scripts say about their flags: two lengths of help, defaults in words, and the nearest
flag for a wrong name.

The tables of engine/runtime/flag_groups.py are held against the parsers of all scripts.
"""

import dataclasses
import importlib.util
import re
import sys
from pathlib import Path

import pytest

from engine.data.config import DataConfig
from engine.distill.config import DistillConfig
from engine.evaluate.lm_eval_harness import HarnessConfig
from engine.evaluate.tasks.run import TaskConfig
from engine.jobs.audit import AuditConfig
from engine.jobs.preflight import PreflightConfig
from engine.jobs.sdft import SdftConfig
from engine.jobs.study_config import StudyConfig
from engine.presets import PRESETS, parse
from engine.runtime.flag_groups import COMMON, GROUPS, RENAMED, SYNONYMS
from engine.runtime.flag_parser import FlagParser, name_of, split_default
from engine.runtime.flags import InWords, add_flags, from_flags, make_parser
from engine.sampling.requests import SamplerConfig
from engine.session import ModelConfig
from engine.train.config import EncodeConfig, TrainConfig
from engine.train.replay import ReplayConfig
from engine.train.validate import ValidateConfig
from model.lora import LoraConfig

ROOT = Path(__file__).resolve().parents[2]
MAIN = ["sdft", "distill", "train", "evaluate", "retention", "generate", "pareto", "preflight"]
# few flags: `--help` shows all of them
SMALL = ["merge", "report", "import_gguf", "export_gguf", "audit"]
USUAL = 16  # flags in a short help, at most
CONFIGS = [
    ModelConfig,
    DataConfig,
    SdftConfig,
    DistillConfig,
    SamplerConfig,
    EncodeConfig,
    TrainConfig,
    LoraConfig,
    TaskConfig,
    HarnessConfig,
    ValidateConfig,
    ReplayConfig,
    StudyConfig,
    PreflightConfig,
    AuditConfig,
]


def script(name):
    spec = importlib.util.spec_from_file_location(f"script_{name}", ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def said(monkeypatch, capsys):
    """A function that runs a script with flags that end it; returns exit code, stdout, stderr."""

    def ended(name, *flags):
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
        monkeypatch.setenv("COLUMNS", "100")
        with pytest.raises(SystemExit) as end:
            script(name).parse_args()
        printed = capsys.readouterr()
        return end.value.code, printed.out, printed.err

    return ended


@pytest.fixture(scope="module")
def parsers():
    """The parser of every script, before it parses."""

    class Made(Exception):
        pass

    def stop(parser, given=None):
        raise Made(parser)

    def made(name):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{name}.py"])
            patch.setattr(FlagParser, "parse_args", stop)
            with pytest.raises(Made) as raised:
                script(name).parse_args()
        return raised.value.args[0]

    return {name: made(name) for name in MAIN + SMALL}


def shown(text):
    """Flag names and headings of a help page."""
    flags = re.findall(r"^  (?:-h, )?--(?:\[no-\])?([a-z-]+)", text, re.MULTILINE)
    return flags, re.findall(r"^(\S.*):$", text, re.MULTILINE)


@pytest.mark.parametrize("name", MAIN)
def test_the_short_help_shows_the_usual_flags_under_headings(name, said):
    code, text, errors = said(name, "--help")
    assert (code, errors) == (0, "")
    assert text.startswith(script(name).__doc__.strip())
    flags, headings = shown(text)
    assert set(flags) == {*COMMON[name].split(), "help", "help-all"}
    assert len(flags) == len(set(flags)) and len(flags) - 2 <= USUAL
    assert [heading for heading in GROUPS if heading in headings] == headings
    assert "Config" not in text and "--help-all shows all" in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("name", MAIN + SMALL)
def test_the_long_help_shows_every_flag(name, said, parsers):
    code, text, _ = said(name, "--help-all")
    flags, headings = shown(text)
    named = {name_of(action) for action in parsers[name].arguments if action.option_strings}
    assert code == 0 and sorted(flags) == sorted(named)
    assert "Other" not in headings and "usual flags;" not in text
    assert not re.search(r"\bNone\b|\(\)|\[\]|default: *\]", text)


@pytest.mark.parametrize("name", SMALL)
def test_a_script_with_few_flags_has_one_help(name, said):
    assert said(name, "--help") == said(name, "--help-all")
    assert said(name, "-h")[1] == said(name, "--help")[1]


def all_arguments(parsers):
    """The arguments of all scripts."""
    arguments = []
    for parser in parsers.values():
        arguments += parser.arguments
    return arguments


def test_every_field_is_a_flag_of_some_script(parsers):
    known = {action.dest for action in all_arguments(parsers)}
    for config in CONFIGS:
        for field in dataclasses.fields(config):
            assert field.name in known


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_help_texts_are_sentences_and_tell_the_default(config):
    parser = make_parser("")
    add_flags(parser, config)
    by_name = {action.dest: action for action in parser.arguments}
    for field in dataclasses.fields(config):
        text, words = split_default(by_name[field.name].help)
        assert len(text.split()) >= 3 and re.match(r"[A-Za-z0-9]", text), field.name
        assert not text.endswith((".", ":", ",", ";")) and "  " not in text, field.name
        assert "None" not in text and "wanted" not in text, field.name
        if field.default in (None, (), ""):
            assert words, f"{field.name}: its default says nothing, [default: ...] is missing"
        if words and words.startswith("auto"):
            assert re.fullmatch(r"auto \(.+\)", words), field.name
            assert field.default in (0, 0.0, "auto"), field.name


def test_the_tables_name_flags_that_there_are(parsers):
    headed = " ".join(GROUPS.values()).split()
    assert len(headed) == len(set(headed))
    known = {name_of(action) for action in all_arguments(parsers)}
    assert set(headed) == known
    assert set(COMMON) == set(MAIN)
    for name, flags in COMMON.items():
        assert set(flags.split()) <= {name_of(action) for action in parsers[name].arguments}
    assert {target.removeprefix("no-") for target in SYNONYMS.values()} <= known
    assert not set(SYNONYMS) & known
    assert set(RENAMED.values()) <= known


@pytest.mark.parametrize(
    "name, typed, meant",
    [
        ("sdft", "--learning-rate", "--lr"),
        ("sdft", "--num-epochs", "--epochs"),
        ("sdft", "--lora-r", "--rank"),
        ("sdft", "--lora-alpha", "--alpha"),
        ("sdft", "--max-seq-len", "--max-length"),
        ("sdft", "--batch-size", "--batch-rows"),
        ("sdft", "--dataset", "--data"),
        ("sdft", "--output-dir", "--out"),
        ("sdft", "--tasks", "--task"),  # though it begins --tasks-dir
        ("sdft", "-lr", "--lr"),
        ("sdft", "--max_length", "--max-length"),
        ("sdft", "--evaldata", "--eval-data"),
        ("sdft", "--no-cuda-graph", "--no-graphs"),
        ("train", "--val-evry", "--val-every"),
        ("pareto", "--ranks", "--rank"),
        ("generate", "--max-tokens", "--max-new-tokens"),
        ("evaluate", "--max-num-seqs", "--rows"),
        ("merge", "--adaptor", "--adapter"),
    ],
)
def test_a_wrong_flag_names_the_nearest(name, typed, meant, said):
    expected = f"error: unknown flag {typed}; did you mean {meant}?\n"
    assert said(name, typed, "5") == (2, "", expected)
    assert said(name, f"{typed}=5") == (2, "", expected)


def test_a_flag_that_resembles_no_other_points_to_help_all(said):
    error = "error: unknown flag --zzz; --help-all lists every flag\n"
    assert said("sdft", "--zzz") == (2, "", error)


def test_a_wrong_flag_offers_those_that_share_a_word_with_it(said):
    _, _, error = said("sdft", "--token-budget", "8")
    assert error == "error: unknown flag --token-budget; --help-all lists every flag\n"
    _, _, error = said("sdft", "--tokens-per-answer", "8")
    offered = "--max-new-tokens or --prefill-tokens or --micro-tokens"
    assert error == f"error: unknown flag --tokens-per-answer; did you mean {offered}?\n"


def test_an_ambiguous_beginning_names_every_flag_that_begins_so(said):
    code, out, error = said("sdft", "--temp", "0.5")
    assert (code, out) == (2, "") and error.count("\n") == 1
    assert "--temp is ambiguous: --template or --temperature; did you mean --temperature?" in error
    _, _, error = said("sdft", "--max", "5")
    assert error == (
        "error: flag --max is ambiguous: --max-new-tokens or --max-length or --max-steps\n"
    )


def test_other_errors_are_one_line_too(said):
    code, out, error = said("sdft", "--epochs", "many", "--model", "m", "--data", "d", "--out", "o")
    assert (code, out) == (2, "")
    assert error == "error: argument --epochs: invalid int value: 'many'\n"
    _, _, error = said("sdft", "--model", "m")
    assert error == "error: the following arguments are required: --data, --out\n"


def test_a_unique_beginning_stands_for_its_flag_and_values_are_left_alone():
    parser = make_parser("", "generate")
    add_flags(parser, SamplerConfig)
    parser.add_argument("--prompt")
    parser.add_argument("--number", type=float)
    parser.add_argument("files", nargs="*")
    typed = ["--temp", "0.5", "--no-gra", "--prompt", "--lr is what?", "--number", "-0.5"]
    args = parser.parse_args([*typed, "--", "--learning-rate"])
    assert (args.temperature, args.graphs, args.number) == (0.5, False, -0.5)
    assert args.prompt == "--lr is what?" and args.files == ["--learning-rate"]
    assert parser.parse_args(["--prompt=--learning-rate 5"]).prompt == "--learning-rate 5"


@pytest.mark.parametrize("flag", ["--batch-invariant", "--invariant"])
def test_a_renamed_flag_keeps_its_old_name_and_its_saved_key(flag):
    parser = make_parser("")
    add_flags(parser, SamplerConfig)
    assert "--[no-]batch-invariant" in parser.help_text(everything=True)
    config = from_flags(SamplerConfig, parser.parse_args([flag]))
    assert config == SamplerConfig(invariant=True) and config.settings()["invariant"] is True
    off = parser.parse_args([flag, flag.replace("--", "--no-")])
    assert from_flags(SamplerConfig, off) == SamplerConfig()


def test_the_help_shows_the_defaults_of_the_preset(said):
    _, plain, _ = said("sdft", "--help-all")
    _, paper, _ = said("sdft", "--help-all", "--preset", "yang2024-gsm8k")
    for text, lr, epochs, chat in (
        (plain, "0.0003", 2, "what the adapter was trained with; else own"),
        (paper, "0.0001", 5, "llama2"),
    ):
        text = " ".join(text.split())
        assert f"--lr X peak learning rate [default: {lr}]" in text
        assert f"passes over the training rows [default: {epochs}]" in text
        assert f"[default: {chat}]" in text
    assert "The defaults shown are those of --preset yang2024-gsm8k." in paper
    assert "those of --preset" not in plain


def test_a_preset_is_found_wherever_it_is_typed():
    def made(*typed):
        parser = make_parser("")
        add_flags(parser, TrainConfig)
        return parse(parser, list(typed)).epochs

    assert made("--preset", "yang2024-gsm8k") == made("--preset=yang2024-gsm8k") == 5
    assert made("--epochs", "3", "--pre", "yang2024-gsm8k") == 3
    assert made() == TrainConfig().epochs and PRESETS["yang2024-gsm8k"]["epochs"] == 5
    with pytest.raises(SystemExit):
        made("--preset")


@dataclasses.dataclass(frozen=True)
class Example:
    """A help text over several lines, beside one that is not."""

    size: int = 0  # how large it is: it goes on in the lines
    #   below the field, 100 % of it
    #   [default: auto (64; 32 on a CPU)]
    name: str | None = None  # how it is called [default: none]
    ratio: float = 0.5  # how much of it is used
    kinds: tuple[str, ...] = ()  # which of its kinds are used [default: none]
    source: str = "x"  # where it comes from [default: the field's own words]


def test_a_help_text_goes_on_below_its_field():
    parser = make_parser("")
    add_flags(parser, Example, ratio=0.25, source=InWords(None, "those of the script"))
    texts = {action.dest: action.help for action in parser.arguments}
    assert texts["size"] == (
        "how large it is: it goes on in the lines below the field, 100 % of it "
        "[default: auto (64; 32 on a CPU)]"
    )
    assert texts["name"] == "how it is called [default: none]"
    page = " ".join(parser.help_text(everything=True).split())
    assert "--size N how large it is: it goes on" in page
    assert "[default: auto (64; 32 on a CPU)]" in page and "used [default: 0.25]" in page
    assert "--source SOURCE where it comes from [default: those of the script]" in page
    assert parser.parse_args([]).source is None and parser.parse_args([]).kinds is None
    args = parser.parse_args(["--kinds", "a", "--kinds", "b"])
    assert from_flags(Example, args, source="y") == Example(0, None, 0.25, ("a", "b"), "y")
