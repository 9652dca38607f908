"""The C kernels: compiled, cached, chosen, and a model's weights packed for them.

Their results are tested in test_native.py.
"""

import dataclasses
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.sampling.requests import SamplerConfig
from engine.sampling.sampler import Sampler
from kernels import select_ops
from kernels.cpu import native
from kernels.cpu.native import Loader
from kernels.cpu.panels import Panels
from kernels.cpu.prepack import Prepacked
from kernels.packed import Packed
from kernels.registry import NATIVE, OPS, TORCH
from kernels.spec import Widths
from model.layout import GROUPS
from model.llama import Llama
from model.sampling_weights import for_sampling, restore_weights
from model.tape import Tape
from model.weights import PlainWeights
from tests.helpers.adapters import new_lora
from tests.helpers.sampling import SAMPLED, random_requests, text

ROOT = Path(__file__).resolve().parents[2]
REASON = native.why_unavailable()
pytestmark = pytest.mark.skipif(REASON is not None, reason=f"no native kernels: {REASON}")
CPU = torch.device("cpu")


# compiled in a third of the time
FAST_BUILD = tuple("-O0" if flag == "-O3" else flag for flag in native.FLAGS)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A library as the next process would name it."""
    return native.build(tmp_path_factory.mktemp("built"), FAST_BUILD)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache, and a process that has compiled nothing yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    with new_process():
        yield tmp_path / "cache" / "sdft-engine"


def put(library, cache):
    """The library where this process will look for it."""
    cache.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copy(library, cache))


def new_process():
    """Inside, the library is looked for as a new process would."""
    return native.loading_by(Loader(FAST_BUILD))


def works():
    made = Panels(torch.arange(6.0).view(2, 3))
    return torch.equal(made(torch.eye(3)), torch.arange(6.0).view(2, 3).T)


def script(path, lines):
    """A program that stands in for a compiler."""
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# ---- compiled once


def test_compiled_once_and_cached(cache, monkeypatch, capsys):
    """And what a process left that was killed while it compiled is taken away when it is old."""
    left = cache / ".native-left"
    busy = cache / ".native-busy"
    for folder in (left, busy):
        folder.mkdir(parents=True)
        (folder / "linear.o").write_text("half")
    os.utime(left, (1, 1))
    assert native.why_unavailable() is None and works()
    assert capsys.readouterr().out.count("compiles the C kernels for this processor") == 1
    assert not left.exists() and busy.exists()
    shutil.rmtree(busy)
    (library,) = cache.iterdir()
    assert library.name.startswith("native-") and library.suffix == ".so"
    assert native.name() == f"cpu, {library.stem}"
    written = library.stat().st_mtime_ns
    ran = []

    def recorded_run(command, folder=None):
        ran.append(command)
        return subprocess_output(command)

    monkeypatch.setattr(native, "_run", recorded_run)
    with new_process():
        assert native.why_unavailable() is None and works()
    assert [command[1:] for command in ran] == [["--version"]], (
        "the second process compiles nothing"
    )
    assert library.stat().st_mtime_ns == written and list(cache.iterdir()) == [library]


def subprocess_output(command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_another_compiler_flag_or_source_has_its_own_file(cache, monkeypatch, tmp_path):
    """By names alone: the compiler here only writes down that it was called."""
    made = []  # names of libraries

    def write_library(command, folder=None):
        if "-shared" in command:
            name = command[command.index("-o") + 1]
            Path(folder, name).write_bytes(b"library")
            made.append(name)
        return version

    monkeypatch.setattr(native, "_run", write_library)
    version = "gcc 12"
    files = []
    files.append(native.build(cache))
    assert native.build(cache) == files[0] and len(made) == 1
    version = "gcc 13"
    files.append(native.build(cache))
    files.append(native.build(cache, ("-O2",)))
    monkeypatch.setattr(native, "_processor", lambda: "flags: avx2 fma")
    files.append(native.build(cache))
    copied = tmp_path / "native"
    copied.mkdir()
    for path in native.FOLDER.iterdir():
        (copied / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(native, "FOLDER", copied)
    assert native.build(cache) == files[-1], "where the sources lie is nothing to it"
    (copied / "vec.h").write_bytes((copied / "vec.h").read_bytes() + b"\n")
    files.append(native.build(cache))
    (copied / "common").mkdir()
    (copied / "vec.h").rename(copied / "common" / "vec.h")
    files.append(native.build(cache))
    assert len(set(files)) == len(made) == 6
    assert sorted(cache.iterdir()) == sorted(files)


@pytest.mark.parametrize("broken", ["empty", "half", "end", "changed", "text"])
def test_a_broken_library_is_compiled_again(cache, built, broken):
    """Not loaded: one that was cut off would end the process. And not left there for the next."""
    library = put(built, cache)
    whole = library.read_bytes()
    middle = len(whole) // 2
    content = {
        "empty": b"",
        "half": whole[:middle],
        "end": whole[:-1],
        "changed": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
        "text": b"not a library, but longer than the hash at its end\n",
    }[broken]
    library.write_bytes(content)
    assert native.why_unavailable() is None and works()
    assert native._is_whole(library) and list(cache.iterdir()) == [library]
    assert native.library()._name == str(library)


def test_a_library_in_use_is_not_written_into(cache, built):
    """What replaces it is another file: the process that has loaded it goes on."""
    put(built, cache)
    assert works()
    (library,) = cache.iterdir()
    before = os.stat(library).st_ino
    beside = cache / "kept"
    os.link(library, beside)
    library.unlink()
    library.write_bytes(b"")
    native.build(cache, FAST_BUILD)
    assert os.stat(library).st_ino != before and works() and native._is_whole(beside)


@pytest.mark.parametrize("where", ["a file", "a folder of that name"])
def test_without_a_cache_it_is_compiled_for_this_process(cache, built, monkeypatch, where):
    """(For root every folder can be written; a file in the way cannot be got round.)"""
    if where == "a file":
        cache.parent.write_text("")
    else:
        library = cache / built.name
        library.mkdir(parents=True)
    temporary = cache.parent.parent / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(native.tempfile, "tempdir", str(temporary))
    assert native.why_unavailable() is None and works()
    assert list(temporary.iterdir()) == [], "compiled for this process, and nothing left of it"
    assert not Path(native.library()._name).exists()
    assert where == "a file" or [p.name for p in cache.iterdir()] == [library.name]


def test_without_a_home_directory_it_is_compiled_for_this_process(cache, monkeypatch, capsys):
    def unknown_home():
        raise RuntimeError("Could not determine home directory.")

    temporary = cache.parent.parent / "tmp"
    temporary.mkdir()
    monkeypatch.setattr(native.tempfile, "tempdir", str(temporary))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", staticmethod(unknown_home))
    assert select_ops.choose().sampled is NATIVE and works()
    assert "not remembered, there is no home directory" in capsys.readouterr().out
    assert list(temporary.iterdir()) == [] and not cache.exists()


def given_away(place):
    if os.geteuid():
        pytest.skip("only root can give a file to another user")
    os.chown(place, 12345, -1)


def open_to_all(place):
    place.chmod(place.stat().st_mode | 0o022)


@pytest.mark.parametrize("change", [given_away, open_to_all])
@pytest.mark.parametrize("which", ["the library", "its folder", "the folder around it"])
def test_a_library_that_another_user_could_write_is_not_loaded(
    cache, built, monkeypatch, capsys, which, change
):
    """Said so, and the C forms are used all the same; what lies there stays as it is."""
    library = put(built, cache)
    place = {"the library": library, "its folder": cache}.get(which, cache.parent)
    change(place)
    before = library.read_bytes()
    loaded = []
    bind = native.bind

    def recorded_bind(path):
        loaded.append(path)
        return bind(path)

    monkeypatch.setattr(native, "bind", recorded_bind)
    assert native.why_unavailable() is None and works()
    assert len(loaded) == 1 and cache not in loaded[0].parents and not loaded[0].exists()
    said = capsys.readouterr().out
    why = "belongs to user 12345" if change is given_away else "may be written by other users"
    assert f"ops: {place} {why}, so nothing is taken from there" in said
    assert "compiled for this process alone; set XDG_CACHE_HOME to a folder that only" in said
    assert list(cache.iterdir()) == [library] and library.read_bytes() == before


def test_cached_files_are_private_to_this_user(cache):
    """Or else a generous umask would have the next process refuse it."""
    before = os.umask(0)
    try:
        assert native.why_unavailable() is None and select_ops.choose().sampled is NATIVE
    finally:
        os.umask(before)
    cache.parent.chmod(0o1777)  # sticky and open to all, as /tmp is
    for place in (cache, *cache.iterdir()):
        assert place.stat().st_mode & 0o077 == 0, place
    with new_process():
        assert native.why_unavailable() is None and Path(native.library()._name).parent == cache


def test_a_command_in_CC_is_split_as_a_shell_does(cache, monkeypatch, tmp_path):
    """A compiler with a flag, one behind ccache, one whose path has a space in it."""
    compiler = native._compiler()[0]
    (tmp_path / "a folder").mkdir()
    wrapper = script(tmp_path / "a folder" / "cache it", ['exec "$@"'])
    ran = []
    run = native._run

    def recorded_run(command, folder=None):
        ran.append(command)
        return run(command, folder)

    monkeypatch.setattr(native, "_run", recorded_run)
    for given, words in (
        (f"{compiler} -O1 -DFIRST", [compiler, "-O1", "-DFIRST"]),
        (f"'{wrapper}' {compiler}", [wrapper, compiler]),
    ):
        ran.clear()
        monkeypatch.setenv("CC", given)
        with new_process():
            assert native.why_unavailable() is None and works()
        assert len(ran) == 3 and all(command[: len(words)] == words for command in ran)
    assert len(list(cache.iterdir())) == 2, "each command has a library of its own"
    monkeypatch.setenv("CC", "gcc 'not closed")
    with new_process():
        assert native.why_unavailable() == "no C compiler is there (gcc 'not closed); install gcc"


def test_two_processes_compile_at_once(cache):
    """Each finds a whole library, and one stays."""
    code = (
        "from pathlib import Path; from kernels.cpu import native; import sys\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "library = native.build(Path(sys.argv[1]), tuple(sys.argv[2:]))\n"
        "print(native.bind(library).panel_columns(), library.name)"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code, str(cache), *FAST_BUILD]
    both = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    said = {process.communicate(timeout=100)[0].splitlines()[-1] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    (library,) = cache.iterdir()
    assert said == {f"{native.library().panel_columns()} {library.name}"}
    assert native._is_whole(library)


def test_torchs_own_openmp_is_taken(monkeypatch):
    """Whatever another package loaded before; where torch brings none, the system's."""
    own = str(Path(torch.__file__).resolve().parent / "lib" / "libgomp.so.1")
    other, system = "/x/site-packages/sk.libs/libgomp-6a.so.1", "/usr/lib/libgomp.so.1"

    def maps(*paths):
        lines = [f"7f0000-7f1000 r-xp 00000000 08:01 123 {path}" for path in ("/bin/x", *paths)]
        monkeypatch.setattr(native, "_lines", lambda path: lines)
        return native._openmp()

    assert maps(other, own, system) == own and maps(other, system, own) == own
    assert maps(other, system) == system and maps(other) == other and maps() == ""


def test_torchs_own_openmp_is_taken_through_a_link(monkeypatch, tmp_path):
    """A .venv that is a link: torch is imported by it, the process's maps do not show it."""
    (tmp_path / "venv" / "torch").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "venv")
    monkeypatch.setattr(native.torch, "__file__", str(tmp_path / "link" / "torch" / "__init__.py"))
    own = str(tmp_path.resolve() / "venv" / "torch" / "lib" / "libgomp.so.1")
    other = "/x/site-packages/sentencepiece.libs/libgomp-6a.so.1"
    lines = [f"7f0000-7f1000 r-xp 00000000 08:01 123 {path}" for path in (other, own)]
    monkeypatch.setattr(native, "_lines", lambda path: lines)
    assert native._openmp() == own


# ---- where there is none


def refusals(cache):
    """Case -> the environment that stands in the way, and a part of the reason that is given."""
    (compiler,) = native._compiler()
    folder = cache.parent.parent
    fails = script(folder / "fails", [
        '[ "$1" = --version ] && exec ' + compiler + " --version",
        "echo something >&2; echo 'vec.h:1: error: no room' >&2; exit 3",
    ])  # fmt: skip
    links = script(folder / "links", [
        'for a in "$@"; do [ "$a" = -shared ] && { echo "cannot find -lm" >&2; exit 1; }; done',
        "exec " + compiler + ' -O0 "$@"',
    ])  # fmt: skip
    writes_nothing = script(folder / "nothing", ["exit 0"])
    text_file = script(folder / "text", [
        'while [ $# -gt 0 ]; do [ "$1" = -o ] && seq 99 > "$2"; shift; done',
    ])  # fmt: skip
    undefined = script(folder / "undefined", [f'exec {compiler} -O0 -Dsqrtf=__kmpc_none "$@"'])
    (folder / "odd").write_bytes(b"#!/nonexistent/interpreter\n")
    (folder / "odd").chmod(0o755)
    return {
        "absent": ({"CC": "/nonexistent"}, "no C compiler is there (/nonexistent); install gcc"),
        "path": ({"PATH": ""}, "no C compiler is there (cc, gcc or clang); install gcc"),
        "false": ({"CC": "false"}, "false failed with status 1"),
        "fails": ({"CC": fails}, "status 3: something / vec.h:1: error: no room"),
        "links": ({"CC": links}, "links failed with status 1: cannot find -lm"),
        "nothing": ({"CC": writes_nothing}, "No such file"),
        "text": ({"CC": text_file}, "invalid ELF header"),
        "undefined": ({"CC": undefined}, "undefined symbol: __kmpc_none"),
        "odd": ({"CC": str(folder / "odd")}, "odd cannot be run"),
    }


@pytest.mark.parametrize(
    "case", ["absent", "path", "false", "fails", "links", "nothing", "text", "undefined", "odd"]
)
def test_without_a_working_compiler_auto_is_torch_and_native_is_refused(
    cache, monkeypatch, capsys, case
):
    """A reason, torch's table for `auto`, a refusal for `native`, and nothing left behind but what
    a compiler said was a library. ("undefined": as clang's beside a torch with gcc's OpenMP.)"""
    environment, said = refusals(cache)[case]
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert said in native.why_unavailable() and native.name() == "cpu"
    with pytest.raises(RuntimeError, match="no native kernels: "):
        native.library()
    assert select_ops.choose() is TORCH
    reason = native.why_unavailable()
    line = f"ops: sampling goes the slower way of torch, without native kernels: {reason}"
    assert capsys.readouterr().out.splitlines()[-1] == line
    with pytest.raises(ValueError) as refused:
        select_ops.choose("native")
    assert str(refused.value) == (
        f"--ops native cannot run here: {reason}; use --ops auto or torch"
    )
    left = list(cache.iterdir()) if cache.exists() else []
    assert all(path.suffix == ".so" for path in left)
    assert bool(left) == (case in ("text", "undefined"))


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("system", "for Linux on x86-64, and this is Darwin x86_64"),
        ("machine", "for Linux on x86-64, and this is Linux aarch64"),
        ("processor", "neither AVX-512 nor AVX2 with FMA"),
        ("openmp", "torch has loaded no OpenMP that is known"),
    ],
)
def test_machines_that_the_kernels_are_not_for_get_a_reason(cache, monkeypatch, what, said):
    if what in ("system", "machine"):
        monkeypatch.setattr(
            native.platform, what, lambda: "Darwin" if what == "system" else "aarch64"
        )
    elif what == "processor":
        monkeypatch.setattr(native, "_processor", lambda: "flags : sse2 avx avx2")
    else:
        monkeypatch.setattr(native, "_openmp", lambda: "")
    assert said in native.why_unavailable() and not cache.exists()


def test_a_processor_with_avx2_is_enough(monkeypatch):
    for flags, fine in (("avx2 fma", True), ("avx512f", True), ("avx2", False), ("fma", False)):
        monkeypatch.setattr(native, "_processor", lambda flags=flags: f"flags : sse2 {flags}")
        assert (native.why_no_build() is None) == fine, flags


# ---- chosen


def test_native_is_for_fp32_on_a_cpu(cache, built):
    put(built, cache)
    for device, dtype in (("cpu", torch.float64), ("cpu", torch.bfloat16), ("cuda", torch.float32)):
        wanted = f"for fp32 on a CPU, not {dtype} on {device}; use --ops auto or torch"
        with pytest.raises(ValueError, match=wanted):
            select_ops.choose("native", device, dtype)
    assert select_ops.choose("native") is NATIVE


def test_auto_on_a_cpu_samples_with_it(cache, built, capsys):
    put(built, cache)
    ops = select_ops.choose()
    assert ops.sampled is NATIVE and ops.name == "torch, sampling native"
    assert dataclasses.replace(ops, name="torch", sampled=None) == TORCH, "training is torch's"
    said = capsys.readouterr().out
    assert said.count("\n") == 2 and f"checking the kernels on {native.name()}" in said
    assert select_ops.choose() == ops and capsys.readouterr().out == "", "checked once"


def with_native(**functions):
    """The tables of operations, with other functions in NATIVE."""
    return {**OPS, "native": dataclasses.replace(NATIVE, **functions)}


@pytest.mark.parametrize("field", ["swiglu_forward", "linear"])
def test_one_wrong_operation_makes_all_fall_back(cache, built, capsys, field):
    """Forms that a row meets one after the other: none of them is mixed with torch's."""
    put(built, cache)

    def wrong(*args):
        return getattr(TORCH, field)(*args) * 1.01

    tables = with_native(**{field: wrong})
    assert select_ops.choose(tables=tables) is TORCH
    said = capsys.readouterr().out.splitlines()
    operation = field.removesuffix("_forward")
    assert said[-1].startswith(
        f"ops: sampling goes the slower way of torch, without native kernels: {operation}: "
        f"{operation} "
    )
    assert "over the bound" in said[-1]
    with pytest.raises(ValueError, match=f"native cannot run here: {operation}: .*over the bound"):
        select_ops.choose("native", tables=tables)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_packed_weights_of_every_size_are_checked(cache, built, count):
    """Also the two bytes of a checkpoint in bf16, though a check's weights are drawn in fp32."""
    put(built, cache)

    def wrong(x, weight):
        packed = Panels(weight)
        factor = 1.01 if packed.bytes == count else 1
        return packed(x) * factor

    widths = Widths(64, 96, 4, 2, 16, 320)
    assert select_ops.choose(widths=widths, tables=with_native(linear=wrong)) is TORCH


def test_heads_that_are_no_whole_vectors_fall_back(cache, built, capsys, tiny_llama_dir):
    """For everything, said so, and the model samples."""
    put(built, cache)
    d = native.library().panel_columns() // 2
    for head in (d // 2, 12):
        model = Llama.from_pretrained(tiny_llama_dir(head_dim=head))
        assert model.ops is TORCH
        assert f"cached_attention: heads of {head} are not a multiple" in capsys.readouterr().out
        sampling, _ = for_sampling(model)
        assert sampling.ops is TORCH and not isinstance(sampling.weights["head"], Panels)
        assert written(model) == written(Llama(model.config, model.weights, TORCH))
    assert Llama.from_pretrained(tiny_llama_dir(head_dim=d)).ops.sampled is NATIVE


# ---- a model's weights, packed


def written(model, lora=None, **config):
    """(id, sample) -> tokens and log-probabilities."""
    config = SamplerConfig(**SAMPLED, **config)
    with Sampler(model, text, (7,), config, lora) as sampler:
        completions = list(sampler.run(random_requests(model, 6)))
    return {(c.id, c.sample): (c.ids, c.logprobs) for c in completions}


@pytest.fixture(params=["tied", "untied"])
def model(request, tiny_llama_dir):
    path = tiny_llama_dir(layers=2, tied=request.param == "tied", dtype=torch.bfloat16)
    return Llama.from_pretrained(path, dtype=torch.float32)


def adapter(model, modules="qv"):
    lora = new_lora(model, rank=4, alpha=8, modules=modules, seed=3)
    with torch.no_grad():
        lora.params.add_(0.1 * torch.randn(lora.params.shape))
    model.bind(lora)
    return lora


def matrices(model):
    return [name for name in model.weights if name.partition(".")[2] in GROUPS]


def same(weights, others):
    """Whether both are plain tensors of the same names and the same bits."""
    if weights.keys() != others.keys():
        return False
    for name, weight in weights.items():
        if not isinstance(weight, torch.Tensor):
            return False
        if not torch.equal(weight.view(torch.int32), others[name].view(torch.int32)):
            return False
    return True


def copied(model):
    return {name: weight.clone() for name, weight in model.weights.items()}


def hidden(model, lora=None):
    ids = torch.arange(30) * 7 % 320
    return model.forward(ids, Packed.from_lengths([11, 19]), lora=lora)


def test_matrices_are_packed_for_sampling_and_norms_stay_as_they_are(model):
    """What is multiplied by or looked up in, in two bytes a number; the rest as it is."""
    before, held = copied(model), dict(model.weights)
    sampling, lora = for_sampling(model)
    assert lora is None and sampling.ops is NATIVE
    assert all(model.weights[name] is held[name] for name in held) and same(model.weights, before)
    for name in ("head", "embed", *matrices(model)):
        packed = sampling.weights[name]
        assert isinstance(packed, Panels) and packed.bytes == 2, name
        assert torch.equal(packed.unpack(), before[name])
    norms = [name for name in held if "norm" in name]
    assert all(sampling.weights[name] is held[name] for name in norms)
    assert len(norms) + len(matrices(model)) + 2 == len(held) == len(sampling.weights)
    shared = sampling.weights["head"] is sampling.weights["embed"]
    assert shared == model.config.tie_embeddings, "one of both where they are one"
    torch.testing.assert_close(hidden(sampling), hidden(model), rtol=1e-4, atol=1e-5)


def test_released_matrices_are_restored_bit_for_bit(model):
    """Tied to each other as they were; while released the model computes as before."""
    before, want = copied(model), hidden(model)
    for _ in range(2):
        sampling, _ = for_sampling(model, release=True)
        assert all(isinstance(model.weights[name], Panels) for name in ("head", *matrices(model)))
        for name, weight in model.weights.items():
            assert weight is sampling.weights[name], "held once"
        torch.testing.assert_close(hidden(model), want, rtol=1e-4, atol=1e-5)
        assert torch.equal(hidden(model), hidden(Llama(model.config, model.weights, TORCH)))
        nll, _ = model.nll(hidden(model)[:3], torch.tensor([1, 2, 3]), need_grad=False)
        assert nll.isfinite().all() and model.dtype == torch.float32
        twice, _ = for_sampling(model, release=True)
        assert all(twice.weights[name] is sampling.weights[name] for name in model.weights)
        restore_weights(model)
        assert same(model.weights, before)
        tied = model.weights["head"] is model.weights["embed"]
        assert tied == model.config.tie_embeddings
        assert torch.equal(hidden(model), want)
    restore_weights(model)
    assert same(model.weights, before), "nothing to take back is no error"


def test_an_adapter_is_merged_into_the_copy(model):
    before = copied(model)
    held = dict(model.weights)
    lora = adapter(model)
    want = hidden(model, lora)
    for release in (True, False):
        sampling, left = for_sampling(model, lora, release=release)
        assert left is None and all(model.weights[name] is held[name] for name in held)
        torch.testing.assert_close(hidden(sampling), want, rtol=1e-4, atol=1e-5)
        sizes = {name: sampling.weights[name].bytes for name in ("head", *matrices(model))}
        merged = {f"{i}.qkv" for i in range(2)}
        assert {name for name, size in sizes.items() if size == 4} == merged
        assert all(size == 2 for name, size in sizes.items() if name not in merged)
    assert same(model.weights, before)
    seed, _ = for_sampling(model, release=True)
    with pytest.raises(AssertionError, match="released: restore it first"):
        for_sampling(model, lora)
    restore_weights(model)
    assert same(model.weights, before)
    assert not torch.equal(hidden(seed), hidden(sampling))


def test_torchs_table_packs_by_onednn(model):
    """`--ops torch` is oneDNN's layout, and the embeddings a plain tensor."""
    plain = Llama(model.config, PlainWeights(model.weights), TORCH)
    if not Prepacked.available(plain.weights["embed"]):
        pytest.skip("this CPU's torch has no oneDNN")
    before = copied(plain)
    sampling, _ = for_sampling(plain, release=True)
    assert sampling.ops is TORCH and isinstance(sampling.weights["embed"], torch.Tensor)
    assert all(isinstance(sampling.weights[n], Prepacked) for n in ("head", *matrices(plain)))
    restore_weights(plain)
    assert same(plain.weights, before)
    assert (plain.weights["head"] is plain.weights["embed"]) == plain.config.tie_embeddings


@pytest.mark.parametrize("adapted", [False, True])
def test_sampling_is_batch_invariant(model, adapted, capsys):
    """Through the sampler: any rows, pages and chunks, and the model as it was afterwards."""
    lora = adapter(model) if adapted else None
    before = copied(model)
    base = written(model, lora, rows=1, invariant=True)
    promise = "batch-invariant: on a CPU in float32 texts are so, with and without the flag\n"
    assert capsys.readouterr().out.endswith(promise)
    for settings in ({"rows": 4}, {"rows": 6, "prefill_tokens": 8}, {"rows": 3, "page_size": 64}):
        assert written(model, lora, **settings) == base
    assert same(model.weights, before)
    torchs = written(Llama(model.config, model.weights, TORCH), lora, rows=4)
    agreed = [key for key, (ids, _) in torchs.items() if ids == base[key][0]]
    assert len(agreed) >= len(base) - 1, "a uniform may fall between two roundings of a bound"
    for key in agreed:
        logprobs = torch.tensor(torchs[key][1])
        base_logprobs = torch.tensor(base[key][1])
        torch.testing.assert_close(logprobs, base_logprobs, rtol=1e-4, atol=1e-4)


def test_native_trains_too(model):
    """`--ops native`: its forwards under torch's backwards give torch's gradients."""
    tokens = torch.arange(30) * 7 % 320
    packed = Packed.from_lengths([11, 19])
    grads = []
    for ops in (NATIVE, TORCH):
        other = Llama(model.config, model.weights, ops)
        torch.manual_seed(0)
        lora = adapter(other)
        tape = Tape("selective")
        out = other.forward(tokens, packed, lora=lora, tape=tape)
        other.backward(torch.ones_like(out), tape)
        grads.append(lora.grads.clone())
    assert grads[0].abs().max() > 0
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-4)


def test_a_model_is_checked_at_its_own_widths(cache, built, capsys, tiny_llama_dir):
    """The check is at the model's own; another model is checked again."""
    put(built, cache)
    Llama.from_pretrained(tiny_llama_dir())
    assert "checked in" in capsys.readouterr().out
    select_ops.choose("auto", CPU, torch.float32, Widths(64, 96, 4, 2, 16, 320))
    assert capsys.readouterr().out == ""
    Llama.from_pretrained(tiny_llama_dir(vocab=321))
    assert "checked in" in capsys.readouterr().out
