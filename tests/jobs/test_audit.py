"""The audit: the page of a traced step, and the violations that its check finds."""

import contextlib
import html
import importlib
import io
import re
import sys
from pathlib import Path

import pytest
import torch

from engine.jobs import audit, audit_trace
from engine.jobs.audit import AuditConfig, audit_job, with_a_model
from engine.jobs.audit_check import ANCHOR, COMPUTING, ran, violations
from engine.jobs.audit_page import Counts, count_table, marked_lines, render_page, render_text
from engine.jobs.audit_records import describe
from engine.jobs.audit_source import (
    ROOT,
    c_function,
    path_of,
    read_source,
    source_of,
)
from engine.jobs.audit_trace import Tracer
from engine.session import ModelConfig, Session
from kernels import rms_norm, swiglu
from kernels.attention.triton_forward import attention_forward_triton
from kernels.cpu import native
from kernels.launch.triton_launch import INTERPRETED, why_unavailable
from kernels.packed import Packed
from kernels.swiglu import swiglu_forward
from model.lora import Lora
from tests.helpers import interpreter, programs
from tests.layout.test_layout import code_lines

if INTERPRETED:
    interpreter.install()  # and a traced kernel takes a fraction of the time


def page_of(trace):
    return render_page("Work", "about it", trace, [])


def problems(trace):
    """The violations, but for calls of functions of tests/, which helpers patch into triton."""
    return violations(trace, page_of(trace), COMPUTING | {"tests"})


def opened(ops, out):
    """The tiny random Llama, as the script makes it."""
    config = with_a_model(AuditConfig(tiny=True), ModelConfig(model=None, ops=ops), out)
    return Session.open(config)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return opened("torch", tmp_path_factory.mktemp("audit"))


@pytest.fixture(scope="module")
def step(session):
    return audit.trace_step(session)


# ---- the training step


def test_a_step_calls_no_autograd_no_pickle_nothing_foreign_and_hides_nothing(step):
    assert problems(step) == []
    assert "torch" in step.packages and len(step.seen) > 100
    assert ran(step) == set(step.records)


@pytest.mark.parametrize("ops", ["native", "triton"])
def test_a_step_on_other_operations_is_as_clean(ops, tmp_path, monkeypatch):
    if ops == "native" and native.why_unavailable():
        pytest.skip(native.why_unavailable())
    if ops == "triton" and why_unavailable("cpu"):
        pytest.skip(why_unavailable("cpu"))
    monkeypatch.setattr(audit, "ROWS", audit.ROWS[:1])  # the interpreter is slow
    trace = audit.trace_step(opened(ops, tmp_path))
    assert problems(trace) == [] and ran(trace) == set(trace.records)
    if ops == "triton":
        launched = {name for name, record in trace.records.items() if record.launches}
        assert launched == trace.kernels and len(launched) >= 10
        assert "kernels.adamw.adamw_kernel" in launched
        # quoted of four rows; one takes nearly the same way
        assert_quoted("a step, `--ops triton`", trace)


def assert_quoted(work, trace, within=0.03):
    """README.md has the counts of this work, so near: scripts/audit.py prints the present ones."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    number = r"([\d,]+)"
    row = rf"\| {re.escape(work)} \| {number} \| {number} \| {number} \| {number} \|"
    quoted = [int(text.replace(",", "")) for text in re.search(row, readme).groups()]
    counts = Counts.of(list(trace.records.values()))
    measured = (
        counts.functions,
        counts.lines_run,
        counts.lines_of_functions,
        counts.lines_of_files,
    )
    assert quoted == pytest.approx(measured, rel=within), measured


def test_readme_quotes_the_counts(step):
    assert_quoted("a step, `--ops torch`", step)


def test_a_step_shows_its_functions_in_the_order_of_their_calls(step):
    names = list(step.records)
    order = [
        "engine.train.step.step_gradients",
        "engine.data.pack.MicroBatch.build",
        "engine.train.step.micro_step",
        "model.llama.Llama.forward",
        "kernels.lora_linear.torch_form.lora_linear_forward",
        "kernels.linear_cross_entropy.linear_cross_entropy",
        "model.llama.Llama.backward",
        "kernels.lora_linear.torch_form.lora_linear_backward",
        "engine.train.step.step_update",
        "engine.train.optim.Optimizer.update",
        "kernels.adamw.adamw_",
    ]
    assert [name for name in names if name in order] == order
    assert step.records[order[2]].calls == 2  # micro-batches
    assert step.records[order[3]].called_from == order[2]
    anchors = [html.unescape(anchor) for anchor in ANCHOR.findall(page_of(step))]
    assert anchors == names and len(set(anchors)) == len(anchors)


def test_a_record_has_shapes_counts_and_functions_of_torch(step):
    norm = step.records["kernels.rms_norm.rms_norm_forward"]
    width = 64
    tokens = int(re.search(r"\((\d+), 64\)", norm.arguments[0][1])[1])
    assert norm.arguments == [
        ("x", f"float32 ({tokens}, {width})"),
        ("w", f"float32 ({width},)"),
    ]
    assert norm.results[0].startswith(f"(float32 ({tokens}, {width}); float32 ({tokens},")
    assert norm.calls > 2  # of two micro-batches; norms that add the residual call it too
    assert norm.torch["aten.mul"] == norm.calls


def test_the_rooms_of_the_table_add_up_to_its_total(step):
    header, *rooms, total = count_table(step)
    for column in range(1, len(header)):
        counts = [int(row[column].replace(",", "")) for row in rooms]
        assert sum(counts) == int(total[column].replace(",", ""))
    counts = Counts.of(list(step.records.values()))
    assert 0 < counts.lines_run <= counts.lines_of_functions < counts.lines_of_files
    assert {row[0] for row in rooms} >= {"engine/train", "engine/data", "model", "kernels"}


@pytest.mark.skipif(not INTERPRETED, reason="here Triton's kernels are compiled")
def test_an_interpreted_kernel_shows_its_launch_and_lines():
    with Tracer() as tracer:
        swiglu.swiglu_forward_triton(torch.randn(3, 64))
    names = tracer.trace.kernels
    assert len(names) == 1
    record = tracer.trace.records[names.pop()]
    assert record.launches == 1 and record.calls >= 1 and not record.untraced
    assert record.launch.grid and record.launch.constants
    assert any("float32 (3, 64)" in text for _, text in record.launch.arguments)
    assert record.ran and problems(tracer.trace) == []
    assert "launched: once; first over a grid of" in render_text("", "", tracer.trace, [])


@pytest.mark.skipif(not INTERPRETED, reason="here Triton's kernels are compiled")
def test_a_compiled_kernel_is_shown_with_the_functions_that_it_names(monkeypatch):
    """As on a GPU, where no line of a kernel is traced."""
    monkeypatch.setattr(audit_trace, "is_interpreted", lambda kernel: False)
    with Tracer() as tracer:
        attention_forward_triton(torch.randn(3, 128), Packed.from_lengths([3]), 4, 2)
    file = "kernels.attention.triton_forward"
    helpers = {f"{file}.{name}" for name in ("row_source", "read_block", "write_block", "add_keys")}
    assert tracer.trace.kernels >= {f"{file}.attention_forward_kernel", *helpers}
    kernel = tracer.trace.records[f"{file}.attention_forward_kernel"]
    assert kernel.untraced
    assert kernel.ran == set(source_of(kernel.function).code_of(kernel.function))
    assert problems(tracer.trace) == []


def test_a_c_function_shows_its_file():
    if native.why_unavailable():
        pytest.skip(native.why_unavailable())
    with Tracer(uses_c=True) as tracer:
        rms_norm.rms_norm_forward_native(torch.randn(3, 64), torch.ones(64), 1e-5)
    assert tracer.trace.c_functions == {"kernels.cpu.native.rowwise.c.rms_norm"}
    record = tracer.trace.records["kernels.cpu.native.rowwise.c.rms_norm"]
    assert (record.calls, record.function.path) == (1, "kernels/cpu/native/rowwise.c")
    assert record.called_from == "kernels.rms_norm.rms_norm_forward_native"
    assert problems(tracer.trace) == []
    for name in native.SIGNATURES:
        lines = source_of(c_function(name)).lines
        assert f"{name}(" in lines[c_function(name).first - 1]


def test_a_traced_step_computes_the_same_numbers(session, monkeypatch):
    adapters = []
    init = Lora.init

    def kept(*args):
        adapters.append(init(*args))
        return adapters[-1]

    monkeypatch.setattr(Lora, "init", kept)
    audit.trace_step(session)
    monkeypatch.setattr(audit, "tracer_for", lambda session: contextlib.nullcontext(Tracer()))
    assert audit.trace_step(session).records == {}
    traced, untraced = adapters
    assert untraced.grads.norm() > 0
    assert torch.equal(traced.grads, untraced.grads)
    assert torch.equal(traced.params, untraced.params)


# ---- planted violations


def planted(work, monkeypatch, session):
    """The violations of a step in which `work` runs inside `Lora.group`."""
    group = Lora.group

    def with_work(self, *args):
        work()
        return group(self, *args)

    monkeypatch.setattr(Lora, "group", with_work)
    trace = audit.trace_step(session)
    return problems(trace)


def gradient():
    x = torch.ones(2, requires_grad=True)
    torch.autograd.grad((x * x).sum(), x)


def backward():
    x = torch.ones(2, requires_grad=True)
    (x * x).sum().backward()


def differentiable():
    torch.ones(2, requires_grad=True) * 2


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return 2 * x

    @staticmethod
    def backward(context, dy):
        return 2 * dy


def custom_function():
    Twice.apply(torch.ones(2))


# as an import statement it would be a violation of this repository's layout
PICKLE = importlib.import_module("pickle")


def unpickle():
    PICKLE.loads(PICKLE.dumps([1]))


def unpickle_from_a_file():
    PICKLE.Unpickler(io.BytesIO(PICKLE.dumps([1]))).load()


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (gradient, r"autograd: .* calls torch\.autograd\.grad"),
        (backward, r"autograd: .* calls torch\._tensor\.backward"),
        (differentiable, r"autograd: .* gives torch a tensor that requires a gradient"),
        (custom_function, r"autograd: .* calls torch\.autograd\.function\.apply"),
        (unpickle, r"unpickling: .* calls _pickle\.loads"),
        (unpickle_from_a_file, r"unpickling: .* calls _pickle\.load"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_planted_work_turns_the_check_red(work, said, monkeypatch, session):
    found = planted(work, monkeypatch, session)
    assert any(re.match(said, sentence) for sentence in found), found
    assert not any(sentence.startswith("hidden") for sentence in found)


def test_a_foreign_package_turns_the_check_red(monkeypatch, session):
    from tqdm import tqdm

    found = planted(lambda: list(tqdm([], disable=True)), monkeypatch, session)
    assert len(found) == 1 and re.match(r"package: .* calls tqdm, which is not a core", found[0])


def test_a_hidden_function_turns_the_check_red(step):
    name = "kernels.adamw.adamw_"
    page = page_of(step)
    start = page.index(f'<section id="{name}"')
    without = page[:start] + page[page.index("</section>", start) :]
    assert violations(step, without) == [f"hidden: {name} ran and the page does not show it"]
    # a link to it is not it, and a record that was lost is missed as well
    assert f'href="#{name}"' in without
    record = step.records.pop(name)
    try:
        assert problems(step) == [f"hidden: {name} ran and the page does not show it"]
    finally:
        step.records[name] = record


def test_the_reference_operations_are_autograd(tmp_path):
    model = ModelConfig(model=None, ops="reference")
    found = audit_job(AuditConfig(tiny=True), model, tmp_path)
    assert found and all(sentence.startswith("autograd: ") for sentence in found)


# ---- other work


@pytest.mark.parametrize("what", ["distill", "decode"])
def test_sampling_is_clean_and_shown(what, session, tmp_path, capsys):
    work = audit.WORK[what]
    trace = work.trace(session)
    assert audit.write_audit(work.title, what, session, trace, tmp_path) == []
    assert "engine.sampling.model_runner.ModelRunner.decode" in trace.records
    prefill = "engine.sampling.model_runner.ModelRunner.prefill"
    assert (prefill in trace.records) == (what == "distill")
    assert "no autograd, no unpickling" in capsys.readouterr().out
    assert (tmp_path / "audit.html").exists() and (tmp_path / "audit.txt").exists()
    if what == "distill":
        # of SmolLM2-135M, whose tokenizer is another: the tiny Llama's takes 9 % more lines
        assert_quoted("a distilled row, `--ops torch`", trace, within=0.12)


def test_an_unknown_work_is_refused():
    with pytest.raises(ValueError, match="what 'training': expected one of step, decode, distill"):
        AuditConfig(what="training").check()


# ---- the page


def test_the_page_loads_nothing_and_escapes_everything(step):
    page = render_page("<b>Work</b>", "a & b <script>", step, ["no <i>"])
    assert "<b>Work" not in page and "<script" not in page and "no <i>" not in page
    assert "default-src 'none'; style-src 'sha256-" in page
    assert not re.search(r"""(src|href)=["'](?!#)""", page) and "url(" not in page
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page


def test_links_of_the_page_lead_to_sections(step):
    page = page_of(step)
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(ANCHOR.findall(page))


def test_lines_that_ran_are_marked_apart(step):
    record = step.records["engine.data.pack.pack"]
    marks = {text.strip(): mark for _, mark, text in marked_lines(record)}
    assert marks["batches: list[list[int]] = []"] == "ran"
    assert marks["if micro_tokens < 1:"] == "ran"
    refusal = 'raise ValueError(f"micro_tokens={micro_tokens}; expected at least 1")'
    assert marks[refusal] == "idle"
    assert marks['"""Micro-batches of at most micro_tokens tokens, as indices into `lengths`.'] == (
        "text"
    )


# ---- sources and values


@pytest.mark.parametrize("path", ["model/llama.py", "kernels/adamw.py", "engine/train/step.py"])
def test_code_lines_are_counted_as_the_layout_counts_them(path):
    assert len(read_source(path).code) == code_lines((ROOT / path).read_text())


def test_our_files_are_those_of_three_floors_without_the_audit():
    assert path_of(swiglu_forward.__code__.co_filename) == "kernels/swiglu.py"
    assert path_of(torch.__file__) is None and path_of(__file__) is None
    assert path_of(audit.__file__) is None and path_of("<string>") is None


def test_a_value_is_described_by_its_tensors():
    x = torch.zeros(2, 3, dtype=torch.bfloat16)
    assert describe(x) == "bfloat16 (2, 3)"
    assert describe((x, None, x)) == "(bfloat16 (2, 3); bfloat16 (2, 3))"
    assert describe([1, "a"]) == "" and describe(3) == ""


def test_the_script_ends_with_1_where_there_are_violations(tmp_path):
    command = [sys.executable, str(Path(ROOT, "scripts/audit.py")), "--tiny", "--ops", "reference"]
    done = programs.run([*command, "--out", tmp_path], cwd=ROOT)
    assert done.returncode == 1, done.stderr
    assert "VIOLATION: autograd: " in done.stdout and "written: " in done.stdout
