"""The C forms for CPUs: compiled on this machine when first used, kept, and called through ctypes

native/*.c hold what a sampling run on a CPU consists of; python files bind them, each call one C
function over torch's memory. They are compiled by the C compiler that is there ($CC, split into
words as a shell does, else cc, gcc or clang) for the processor that is there, against the OpenMP
that torch has loaded already, so that both share one set of threads. The library lies in
$XDG_CACHE_HOME (~/.cache)/sdft-engine/native-<key>.so; the key is made of the sources, the command,
the compiler's version and the processor's flags. A hash stands at its end: a file that was cut off
or changed is compiled anew. Where that cannot be written, or another user could write it too
(kernels/disk_cache.py), or there is no home directory, it is compiled for this process alone.

`usable` says why there is none: not Linux on x86-64, no AVX2, no compiler, a compiler that fails.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor

from kernels import disk_cache

FOLDER = Path(__file__).resolve().parent / "native"
SOURCES = ("share.c", "linear.c", "attention.c", "rowwise.c", "sample.c", "layers.c")
# -O3 unrolls and puts in line; nothing may reorder a sum, so none of -ffast-math is in it, and no
# compiler makes one rounding of two (gcc would, of intrinsics too)
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC")
SECONDS = 120  # a compilation takes three

Long, Pointer = ctypes.c_long, ctypes.c_void_p
Float, Double = ctypes.c_float, ctypes.c_double
SIGNATURES = {
    "panel_columns": (Long,),
    "pack": (None, Pointer, Pointer, Long, Long, Long),
    "look_up": (None, Pointer, Long, Pointer, Pointer, Long, Long),
    "linear": (ctypes.c_int, *[Pointer] * 3, *[Long] * 4),
    "rms_norm": (ctypes.c_int, *[Pointer] * 6, Long, Long, Float),
    "rope": (ctypes.c_int, *[Pointer] * 3, *[Long] * 4, Float),
    "swiglu": (ctypes.c_int, Pointer, Pointer, Long, Long),
    "kv_write": (ctypes.c_int, *[Pointer] * 5, *[Long] * 5),
    "cached_attention": (ctypes.c_int, *[Pointer] * 7, *[Long] * 6),
    "layers": (ctypes.c_int, *[Pointer] * 15, Float),
    "sample": (ctypes.c_int, *[Pointer] * 5, Long, Long, Double, Long, Double, Double),
}


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def _processor() -> str:
    """The flags of the processor, which -march=native asks too."""
    return next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")


def _openmp() -> str:
    """torch's OpenMP library. Another (scikit-learn brings one) would have threads of its own."""
    paths = [line.split(maxsplit=5)[-1] for line in _lines("/proc/self/maps")]
    names = ("libgomp", "libiomp5", "libomp")
    found = [p for p in dict.fromkeys(paths) if os.path.basename(p).startswith(names)]
    own = str(Path(torch.__file__).resolve().parent)  # maps has no links, a .venv may be one
    return min(found, key=lambda p: (not p.startswith(own), "site-packages" in p), default="")


def _compiler() -> list[str]:
    """The compiler's path and the words of $CC behind it; [] where there is none."""
    try:
        wanted = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # a quotation that does not end
        return []
    commands = [wanted] if wanted else [["cc"], ["gcc"], ["clang"]]
    found = ([path, *rest] for name, *rest in commands if (path := shutil.which(name)))
    return next(found, [])


def _run(command: list[str], folder: str | None = None) -> str:
    """Standard output; RuntimeError with the last lines of what a failing command said."""
    how = {"capture_output": True, "text": True, "errors": "replace", "cwd": folder}
    try:
        done = subprocess.run(command, timeout=SECONDS, **how)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode:
        said = " / ".join(done.stderr.strip().splitlines()[-3:])[-300:]
        raise RuntimeError(f"{command[0]} failed with status {done.returncode}: {said}")
    return done.stdout


def _reason() -> str:
    """Why there can be no C forms here, "" where nothing speaks against them."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"they are for Linux on x86-64, and this is {platform.system()} {platform.machine()}"
    flags = _processor().split()
    if "avx512f" not in flags and not ("avx2" in flags and "fma" in flags):
        return "the processor has neither AVX-512 nor AVX2 with FMA"
    if not _openmp():
        return "torch has loaded no OpenMP that is known (libgomp, libiomp5, libomp)"
    if not _compiler():
        return f"no C compiler is there ({os.environ.get('CC') or 'cc, gcc or clang'}); install gcc"
    return ""


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _whole(library: Path) -> bool:
    """Whether a library is there as it was written: to load one that was cut off is a crash."""
    content = library.read_bytes() if library.exists() else b""
    size = len(content) - len(_digest(b""))
    return size > 0 and _digest(content[:size]) == content[size:]


def build(folder: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    """The library for this machine in `folder`, compiled if it is not there.

    RuntimeError where the compiler fails, OSError where the folder cannot be written, the NotOurs
    among them where another user may write it too.
    """
    compiler, openmp = _compiler(), _openmp()
    version, command = _run([*compiler, "--version"]), shlex.join(compiler)
    digest = hashlib.sha256(f"{command} {version} {flags} {openmp} {_processor()}".encode())
    for path in sorted(path for path in FOLDER.rglob("*") if path.is_file()):
        name = path.relative_to(FOLDER).as_posix()
        digest.update(f"{name} {path.stat().st_size} ".encode() + path.read_bytes())
    library = folder / f"native-{digest.hexdigest()[:16]}.so"
    if reason := disk_cache.distrusted(library):
        raise disk_cache.NotOurs(reason)
    if _whole(library):
        return library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for left in folder.glob(".native-*"):  # by a process that was killed while it compiled
        if time.time() - left.stat().st_mtime > 3600:
            shutil.rmtree(left, ignore_errors=True)
    print(f"ops: {command} compiles the C kernels for this processor (once: {library})")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".native-") as beside:
        _run([*compiler, *flags, "-c", *(str(FOLDER / name) for name in SOURCES)], beside)
        objects = [Path(name).with_suffix(".o").name for name in SOURCES]
        # without -fopenmp, which would bring the system's library in beside torch's
        _run([*compiler, "-shared", "-o", library.name, *objects, openmp, "-lm"], beside)
        made = Path(beside, library.name)
        with made.open("r+b") as file:
            file.write(_digest(file.read()))  # the loader looks at nothing behind its tables
        made.chmod(0o700)  # whatever the umask lets others write
        os.replace(made, library)
    return library


def bind(library: Path) -> ctypes.CDLL:
    """The library's functions with their signatures; OSError or AttributeError if it has not.

    Those that return an int raise MemoryError where that is not 0.
    """
    loaded = ctypes.CDLL(str(library))
    for name, (result, *arguments) in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
        if result is ctypes.c_int:
            function.errcheck = _done
    return loaded


def _done(result: int, function: ctypes._CFuncPtr, arguments: tuple) -> None:
    if result:
        raise MemoryError(f"no memory for what a thread of the native {function.__name__} needs")


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str]:
    """The library, or why there is none."""
    if reason := _reason():
        return None, reason
    try:
        kept = disk_cache.folder()
        try:
            if kept is not None:
                return bind(build(kept)), ""
        except disk_cache.NotOurs as error:
            print(
                f"ops: {error}, so nothing is taken from there and the C kernels are compiled for "
                "this process alone; set XDG_CACHE_HOME to a folder that only you can write"
            )
        except OSError:  # not writable, or nothing there may be run
            pass
        with tempfile.TemporaryDirectory() as folder:
            return bind(
                build(Path(folder, disk_cache.NAME))
            ), ""  # loaded, it needs its file no more
    except (OSError, AttributeError, RuntimeError) as error:
        return None, str(error)


def usable() -> str:
    """Empty when there are C forms here, else the reason. The first call may compile them."""
    return _loaded()[1]


def library() -> ctypes.CDLL:
    """The C functions; RuntimeError with the reason where there are none."""
    loaded, reason = _loaded()
    if loaded is None:
        raise RuntimeError(f"no native kernels: {reason}")
    return loaded


def name() -> str:
    """What was compiled for this processor, or "cpu" where nothing was."""
    loaded, _ = _loaded()
    return "cpu" if loaded is None else f"cpu, {Path(loaded._name).stem}"


def at(x: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """The address of a contiguous tensor of that dtype on the CPU."""
    if x.dtype is not dtype or not x.is_contiguous() or not x.is_cpu:
        raise AssertionError(
            f"{x.dtype} on {x.device} with strides {x.stride()}: contiguous {dtype} is wanted"
        )
    return x.data_ptr()
