"""`--ops auto`: operations that fail their check fall back, results are kept, refusals say why."""

import ast
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine import session as session_module
from engine.session import ModelConfig, Session
from kernels import disk_cache, select_ops
from kernels.cpu import native
from kernels.cpu.native import Loaded, Loader
from kernels.launch import tile_config, triton_launch
from kernels.launch.compile_ahead import without_memory
from kernels.registry import OPS, REFERENCE, SPECS, TORCH, TRITON, functions
from kernels.self_check import results
from kernels.self_check.cases import cases
from kernels.self_check.sources import Sources
from kernels.spec import MODELS, Widths, cast, check
from model.llama import Llama, default_dtype

CPU = torch.device("cpu")
Group = namedtuple("Group", ["gr_name", "gr_mem"])
Account = namedtuple("Account", ["pw_name"])
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    native.why_unavailable()  # compiles, if need be, into the cache of this machine
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sdft-engine"


def plain_swiglu(gate_up):
    return TORCH.swiglu_forward(gate_up)


def plain_rope(*args, **kwargs):
    return TORCH.rope_(*args, **kwargs)


def wrong_swiglu(gate_up):
    return TORCH.swiglu_forward(gate_up) * 1.01


def raising(*_):
    raise RuntimeError("no room for 300 KiB of shared memory\nand a long trace")


def candidate(**functions):
    return dataclasses.replace(TORCH, name="triton", **functions)


def run(ops, said=None, widths=None):
    """The table with what fails its check replaced, and the failures; `said` takes the lines."""
    say = [].append if said is None else said.append
    return select_ops.with_fallback(ops, TORCH, CPU, torch.bfloat16, widths, say)


def test_every_function_belongs_to_one_spec():
    fields = [field for spec in SPECS.values() for field in spec.fields]
    assert all(spec.fields for spec in SPECS.values())
    assert sorted(fields) == sorted(TORCH.table())


def test_only_the_operation_that_fails_falls_back():
    said = []
    table = candidate(swiglu_forward=wrong_swiglu, rope_=plain_rope)
    ops, reasons = run(table, said)
    assert list(reasons) == ["swiglu"] and "over the bound" in reasons["swiglu"]
    assert ops.swiglu_forward is TORCH.swiglu_forward and ops.rope_ is plain_rope
    assert any(line.startswith("ops: swiglu runs in its torch form") for line in said)
    text = select_ops.parts_of(ops, [TORCH, table], reasons)
    assert text.startswith("torch (rms_norm, norm_rope, swiglu: check failed: swiglu h")
    assert text.endswith("triton (rope)")


def test_an_exception_is_a_failure():
    ops, reasons = run(candidate(swiglu_forward=raising, swiglu_backward=plain_swiglu))
    assert reasons == {"swiglu": "RuntimeError: no room for 300 KiB of shared memory"}
    assert ops.swiglu_backward is TORCH.swiglu_backward, "the pair falls back together"


OWN = Widths(D=56, F=72, H=6, G=2, d=24, V=301)


def test_checks_at_the_models_own_widths():
    """A form that is wrong at one width is used by models of another."""

    def wrong_at_72(gate_up):
        factor = 1.01 if gate_up.shape[1] == 2 * OWN.F else 1
        return TORCH.swiglu_forward(gate_up) * factor

    table = candidate(swiglu_forward=wrong_at_72)
    assert run(table)[1] == {}
    assert run(table, widths=dataclasses.replace(OWN, F=64))[1] == {}
    ops, reasons = run(table, widths=OWN)
    assert "over the bound" in reasons["swiglu"] and ops.swiglu_forward is TORCH.swiglu_forward
    assert run(table)[1] == {}, "remembered for the widths that it was found at"


def test_a_session_checks_at_its_models_widths(monkeypatch, tiny_llama_dir):
    def refuse(name, device, dtype, widths):
        raise ValueError(f"asked for {widths}")

    monkeypatch.setattr(session_module, "choose", refuse)
    with pytest.raises(ValueError, match="asked for Widths.D=64, F=96, H=4, G=2, d=16, V=320"):
        Session.open(ModelConfig(str(tiny_llama_dir()), device="cpu"))


@pytest.mark.parametrize("name", SPECS)
def test_the_shapes_of_a_model_have_its_widths(name):
    """Torch's form passes at them, and they are another model's no longer."""
    shapes = SPECS[name].model_shapes(OWN)
    for shape in shapes:
        check(SPECS[name], TORCH, REFERENCE, shape, torch.bfloat16)
    assert bool(shapes) == (name != "adamw"), "which has no width"
    assert not shapes or shapes != SPECS[name].model_shapes(MODELS["llama-3-8b"])


def test_the_second_run_checks_nothing(cache, monkeypatch):
    table = candidate(swiglu_forward=wrong_swiglu, rope_=plain_rope)
    _, first = run(table)
    monkeypatch.setattr(select_ops, "why_failing", None)  # a call would raise
    said = []
    ops, second = run(table, said)
    assert second == first and ops.rope_ is plain_rope
    assert len(said) == 1, "one line for what does not run as wished, none about checking"
    kept = {file.name.split("-")[1]: json.loads(file.read_text()) for file in results_in(cache)}
    assert kept.keys() == {"swiglu", "rope"}
    assert kept["rope"]["fails"] == "" and kept["swiglu"]["fails"] == first["swiglu"]


def results_in(cache):
    """The files with results, in the order of their names."""
    return sorted(cache.glob("check-*"))


@pytest.mark.parametrize("content", ["{", "[]", '{"fails": 3}', '{"fails": null}', "\\xff"])
def test_a_cache_file_that_is_not_understood_is_replaced(cache, content):
    table = candidate(swiglu_forward=wrong_swiglu)
    run(table)
    (file,) = results_in(cache)
    good = file.read_text()
    file.write_bytes(content.encode().decode("unicode_escape").encode("latin-1"))
    old = cache / "kernels-0123456789abcdef.json"  # an older version's, of all operations together
    old.write_text('{"results": {"swiglu": ""}}')
    assert list(run(table)[1]) == ["swiglu"]
    left = {file, old, cache / "checks.lock"}
    assert file.read_text() == good and set(cache.iterdir()) == left, "nothing left beside it"


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    said = []
    assert list(run(candidate(swiglu_forward=wrong_swiglu), said)[1]) == ["swiglu"]
    assert any("not remembered, " in x and "the next run checks again" in x for x in said)


def test_without_a_home_directory_each_run_checks_again(monkeypatch):
    """As for a user id that is not in /etc/passwd, with no HOME: no traceback."""

    def unknown_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", staticmethod(unknown_home))
    for _ in range(2):
        said = []
        assert list(run(candidate(swiglu_forward=wrong_swiglu), said)[1]) == ["swiglu"]
        assert any("not remembered, there is no home directory" in line for line in said)


def test_results_that_others_could_have_written_are_not_used(cache, capsys):
    table, said = candidate(swiglu_forward=wrong_swiglu), []
    run(table)
    (file,) = results_in(cache)
    forged = file.read_text().replace(json.loads(file.read_text())["fails"], "")
    file.write_text(forged)
    assert run(table)[1] == {}, "the owner's own words are believed"
    file.chmod(0o666)
    assert list(run(table, said)[1]) == ["swiglu"]
    assert any(f"not remembered, {file} may be written by other users" in line for line in said)
    assert file.read_text() == forged


def test_a_place_is_trusted_if_no_other_user_may_write_it(tmp_path, monkeypatch):
    """A group that has the user's name and no other member is the user's own."""
    place = tmp_path / "cache" / "file"
    place.parent.mkdir()
    assert disk_cache.why_distrusted(place) is None
    place.write_text("")
    place.chmod(0o664)
    owner = Group("me", [])
    monkeypatch.setattr(disk_cache.pwd, "getpwuid", lambda uid: Account("me"))
    for group, fine in (
        (owner, True),
        (Group("me", ["me"]), True),
        (Group("me", ["me", "you"]), False),
        (Group("staff", []), False),
    ):
        monkeypatch.setattr(disk_cache.grp, "getgrgid", lambda gid, group=group: group)
        assert (disk_cache.why_distrusted(place) is None) == fine, group
    place.chmod(0o646)
    assert disk_cache.why_distrusted(place) == f"{place} may be written by other users"
    place.chmod(0o644)
    tmp_path.chmod(0o777)
    assert disk_cache.why_distrusted(place) == f"{tmp_path} may be written by other users"
    tmp_path.chmod(0o1777)
    assert disk_cache.why_distrusted(place) is None
    tmp_path.chmod(0o700)


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A copy of kernels/ whose files a test may change, and the keys of all of TRITON there."""
    shutil.copytree(ROOT / "kernels", tmp_path / "kernels")
    monkeypatch.setattr(tile_config, "FOLDER", tmp_path / "kernels" / "launch" / "tiles")

    def keys():
        tile_config.forget()
        with tile_config.pretending("sm_90"):
            found = Sources(tmp_path)
            return {
                name: results.identity(spec, TRITON, CPU, torch.bfloat16, None, found)["sources"]
                for name, spec in SPECS.items()
            }

    yield tmp_path / "kernels", keys
    tile_config.forget()


@pytest.mark.parametrize(
    ("file", "changed"),
    [
        ("swiglu.py", {"swiglu"}),
        # the norm of heads and their rotation in one pass calls the rotation in its torch form
        ("rope.py", {"rope", "norm_rope"}),
        ("norm_rope.py", {"norm_rope"}),
        ("attention/triton_backward.py", {"attention"}),
        # of the forward pass the cached one takes a constant
        ("attention/triton_forward.py", {"attention", "cached_attention"}),
        ("lora_linear/triton_forward.py", {"lora_linear", "linear"}),
        ("philox.py", {"lora_linear", "linear", "sample"}),
        ("spec.py", set(SPECS)),
        ("self_check/cases.py", set(SPECS)),
        ("launch/triton_launch.py", set(SPECS)),
        ("launch/tile_config.py", set(SPECS)),
        ("self_check/results.py", set()),
        ("self_check/program.py", set()),
        ("launch/compile_ahead.py", set()),
        ("registry.py", set()),
        ("README.md", set()),
        ("cpu/fused_layers.py", set()),
    ],
)
def test_an_edit_makes_those_be_checked_again_that_depend_on_it(clone, file, changed):
    """And no other operation."""
    folder, keys = clone
    before = keys()
    path = folder / file
    path.write_text(path.read_text() + "\n")
    after = keys()
    assert {name for name in SPECS if before[name] != after[name]} == changed


def test_of_the_tiles_only_the_own_rows_for_this_card_count(clone):
    folder, keys = clone
    before = keys()
    path = folder / "launch" / "tiles" / "rope.json"
    tiles = json.loads(path.read_text())

    def edited(device, **change):
        (config,) = list(tiles["rope_kernel"][device].values())[:1]
        config |= change
        path.write_text(json.dumps(tiles))
        after = keys()
        return {name for name in SPECS if before[name] != after[name]}

    assert edited("sm_80", num_warps=16) == set()
    assert edited("sm_90", **{"from": "somewhere else"}) == set()
    assert edited("sm_90", num_warps=16) == {"rope", "norm_rope"}


def test_every_import_and_every_kernel_is_seen():
    """By the patterns of sources.py: as python's own parser and the look-ups themselves say."""
    found = Sources()
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        named = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                named |= {f"{node.module}.{alias.name}" for alias in node.names}
        files = {found.path_of(name) for name in named if name.startswith("kernels")}
        missing = files - set(found.closure(found.of(path).imports)) - {None}
        assert not missing, f"{path}: {missing}"

    looked_up = {}
    for name, spec in SPECS.items():
        with (
            tile_config.pretending("sm_90"),
            tile_config.watching(lambda look: looked_up.setdefault(name, set()).add(look.kernel)),  # noqa: B023
            triton_launch.recording_launches(lambda *_: None),
            without_memory(),
        ):
            for shape, dtype in cases(spec, torch.bfloat16, OWN)[:2]:
                inputs = spec.make_inputs(shape, torch.Generator().manual_seed(0))
                spec.run(TRITON, cast(inputs, dtype))
        modules = {f.__module__ for f in functions(TRITON, spec)}
        in_files = set().union(*(found.of(path).kernels for path in found.closure(modules)))
        assert looked_up.get(name, set()) <= in_files, name
    assert len(looked_up) == len(SPECS) - 1, "all but linear, which is torch's"


def test_the_key_names_sources_card_versions_dtype_and_shapes():
    def key(name, dtype=torch.bfloat16, widths=OWN):
        return results.identity(SPECS[name], TRITON, CPU, dtype, widths, Sources())

    here = key("swiglu")
    fields = "operation functions card torch triton dtype shapes sources".split()
    assert list(here) == "operation functions dtype shapes card torch triton sources".split()
    files = {results.file_of(here | {name: "other"}) for name in fields}
    assert len(files | {results.file_of(here)}) == len(here) + 1
    other = dataclasses.replace(OWN, V=77)
    assert key("swiglu", widths=other) == here, "it has nothing to do with the vocabulary"
    assert key("sample", widths=other) != key("sample")
    assert key("adamw", widths=other) == key("adamw", widths=None)


def test_a_kernel_that_breaks_the_device_is_remembered(cache, monkeypatch):
    def dead(*_, **__):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch, "zeros", dead)
    table = candidate(swiglu_forward=raising)
    with pytest.raises(RuntimeError, match="the Triton form of swiglu left cpu unusable.*again"):
        run(table)
    monkeypatch.undo()
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    assert list(run(table)[1]) == ["swiglu"]


def test_auto_on_a_cpu_is_torch(monkeypatch, capsys):
    """But for sampling in fp32, where a compiler is there: tests/kernels/test_native_use.py."""
    for dtype in (torch.bfloat16, torch.float64):
        assert select_ops.choose("auto", "cpu", dtype) is TORCH
        said = capsys.readouterr().out
        assert "sampling goes the slower way" in said and f"fp32 on a CPU, not {dtype}" in said
    assert dataclasses.replace(select_ops.choose(), name="torch", sampled=None) == TORCH
    with native.loading_by(Loader(loaded=Loaded(reason="no compiler"))):
        assert select_ops.choose() is TORCH


def test_auto_on_a_gpu_checks_the_kernels(monkeypatch, capsys):
    """With a card that only the checking knows: the table is named by what is in it."""
    tables = {**OPS, "triton": candidate(swiglu_forward=wrong_swiglu, rope_=plain_rope)}
    monkeypatch.setattr(triton_launch, "why_unavailable", lambda device: None)
    seen = []
    with_fallback = select_ops.with_fallback

    def checked_on_cpu(candidate, fallback, device, *rest):
        seen.append((device, *rest))
        return with_fallback(candidate, fallback, CPU, *rest)

    monkeypatch.setattr(select_ops, "with_fallback", checked_on_cpu)
    ops = select_ops.choose("auto", "cuda", torch.bfloat16, OWN, tables)
    assert seen == [(torch.device("cuda"), torch.bfloat16, OWN)]
    assert ops.rope_ is plain_rope and ops.swiglu_forward is TORCH.swiglu_forward
    assert "triton (rope)" in ops.name and "swiglu: check failed" in ops.name
    capsys.readouterr()
    assert select_ops.choose("auto", "cuda", torch.float64) is TORCH, "kernels compute in fp32"
    assert "they compute in fp32, and float64 was asked for" in capsys.readouterr().out
    monkeypatch.setattr(triton_launch, "why_unavailable", lambda device: "no triton")
    assert select_ops.choose("auto", "cuda", torch.bfloat16) is TORCH
    said = capsys.readouterr().out
    assert "torch's slower form on cuda, without Triton kernels: no triton" in said
    assert select_ops.choose("torch", "cuda", torch.bfloat16) is TORCH
    assert capsys.readouterr().out == "", "that was asked for"


@pytest.mark.parametrize("triton", [SimpleNamespace(__version__="3.5.1"), None])
def test_auto_says_how_to_have_the_kernels(monkeypatch, capsys, triton):
    """torch 2.9 and older bring a triton that is too old: the run is half as fast, and says so."""
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    monkeypatch.setattr(triton_launch, "triton", triton)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert select_ops.choose("auto", "cuda", torch.bfloat16) is TORCH
    said = capsys.readouterr().out
    assert ("triton is 3.5.1, and the kernels need 3.6" in said) == (triton is not None)
    assert ("triton is not installed" in said) == (triton is None)
    assert "slower form" in said and "pip install -U 'torch>=2.10'" in said


def test_products_on_a_gpu_are_summed_in_fp32(monkeypatch, tiny_llama_dir):
    """By whatever way a model comes to a GPU; torch's default adds parts of a bf16 sum in bf16."""
    products = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    before = [getattr(products, name) for name in names]

    def allowed():
        return [getattr(products, name) for name in names]

    def allow():
        for name in names:
            setattr(products, name, True)

    try:
        allow()
        assert allowed() == [True, True]
        select_ops.choose("torch", "cpu")
        assert allowed() == [True, True]
        select_ops.choose("torch", "cuda", torch.bfloat16)
        assert allowed() == [False, False]
        allow()
        model = Llama.from_pretrained(tiny_llama_dir(), ops=TORCH)
        monkeypatch.setattr(Llama, "device", property(lambda self: torch.device("cuda")))
        Llama(model.config, model.weights, TORCH)
        assert allowed() == [False, False]
    finally:
        for name, value in zip(names, before, strict=True):
            setattr(products, name, value)


@pytest.mark.parametrize("units", [True, False])
def test_bf16_is_the_default_only_where_a_gpu_computes_in_it(monkeypatch, units):
    """A T4 answers that bf16 is supported: it emulates it."""
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: units or including_emulation,
    )
    assert default_dtype("cuda") == (torch.bfloat16 if units else torch.float32)
    assert default_dtype("cpu") == torch.float32


def test_refusals_say_why(monkeypatch, tiny_llama_dir):
    monkeypatch.setattr(triton_launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="--ops triton cannot run here: TRITON_INTERPRET is not"):
        select_ops.choose("triton")
    with pytest.raises(ValueError, match="--ops triton cannot run here"):
        Session.open(ModelConfig(str(tiny_llama_dir()), device="cpu", ops="triton"))
    monkeypatch.setattr(triton_launch, "triton", None)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(
        ValueError, match="was built for CPUs and knows no GPU; use --ops auto or torch"
    ):
        select_ops.choose("triton", "cuda")
    with pytest.raises(ValueError, match="--ops 'fast' is not known; choose one of auto"):
        select_ops.choose("fast")


def test_the_interpreter_can_run_kernels():
    if triton_launch.why_unavailable("cpu") is not None:
        pytest.skip("there is a GPU, so kernels are not interpreted here")
    ops = select_ops.choose("triton")
    assert ops.name.startswith("triton (") or ", triton (" in ops.name
    assert ops.rms_norm_forward is TRITON.rms_norm_forward


@pytest.mark.skipif(bool(torch.version.cuda or torch.version.hip), reason="there triton is used")
def test_a_cpu_does_not_import_triton():
    """It takes 70 MB, and nothing could be launched; who compiles ahead imports it first."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    script = (
        "import sys, engine.sampling.sampler, engine.train.train, benchmarks.sampler_job\n"
        "from kernels.launch import triton_launch\n"
        "reasons = triton_launch.why_unavailable('cpu'), triton_launch.why_unavailable('cuda')\n"
        "print('triton' in sys.modules, *reasons, sep='|')"
    )
    for first, imported in (("", "False"), ("import benchmarks._common\n", "True")):
        command = [sys.executable, "-c", first + script]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        there, on_cpu, on_gpu = done.stdout.strip().split("|")
        assert there == imported and "TRITON_INTERPRET is not set" in on_cpu
        assert ("knows no GPU" in on_gpu) == (imported == "False")


@pytest.mark.parametrize(("version", "said"), [("3.2.0", "need 3.6"), ("3.10.1", None)])
def test_a_triton_that_is_too_old_is_not_used(monkeypatch, version, said):
    monkeypatch.setattr(triton_launch.triton, "__version__", version)
    monkeypatch.setattr(triton_launch, "INTERPRETED", True)
    reason = triton_launch.why_unavailable("cpu")
    assert (reason is None) if said is None else said in reason
