"""The C kernels for CPUs: compiled on this machine when first used, cached, and called by ctypes.

native/*.c hold the operations of a sampling run on a CPU. Python files bind them: each call is one
C function over torch's memory. They are compiled by the C compiler that is installed ($CC, split
into words as a shell does, else cc, gcc or clang) for the processor of this machine, and linked to
the OpenMP library that torch has loaded already, so that both share one set of threads.

The library is cached as $XDG_CACHE_HOME (~/.cache)/sdft-engine/native-<key>.so; the key is made of
the sources, the command, the compiler's version and the processor's flags. The file ends in a hash
of itself: one that was cut off or changed is compiled again. Where the file cannot be written, or
another user could write it too (kernels/disk_cache.py), or there is no home directory, it is
compiled for this process alone.

`why_unavailable` says why there is none: not Linux on x86-64, no AVX2, no compiler, a compiler that
fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kernels import disk_cache

FOLDER = Path(__file__).resolve().parent / "native"
SOURCES = ("share.c", "linear.c", "quantised.c", "attention.c", "rowwise.c", "sample.c", "layers.c")
# -O3 unrolls and inlines. Nothing may reorder a sum, so none of -ffast-math is in it, and no
# compiler fuses a product and a sum into one rounding (gcc would, of intrinsics too).
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-fPIC")
SECONDS = 120  # a compilation takes a few
REASON = 300  # characters of a compiler's error output that are kept
STALE = 3600  # seconds after which a half-made build of a killed process is removed

Long = ctypes.c_long
Pointer = ctypes.c_void_p
Float = ctypes.c_float
Double = ctypes.c_double
Status = ctypes.c_int  # 0, or -1 where there was no memory for a thread's buffers


class Signature(NamedTuple):
    """The types of a C function; native/native.h says what its arguments mean."""

    result: Any
    arguments: list[Any]


SIGNATURES = {
    "panel_columns": Signature(Long, []),
    "pack": Signature(None, [Pointer, Pointer, Long, Long, Long]),
    "pack_quantised": Signature(None, [Pointer] * 4 + [Long] * 3),
    "look_up": Signature(None, [Pointer, Long, Pointer, Pointer, Long, Long]),
    "linear": Signature(Status, [Pointer] * 4 + [Long] * 4),
    "rms_norm": Signature(Status, [Pointer] * 6 + [Long, Long, Float]),
    "rope": Signature(Status, [Pointer] * 3 + [Long] * 4 + [Float]),
    "norm_rope": Signature(Status, [Pointer] * 5 + [Long] * 4 + [Float]),
    "swiglu": Signature(Status, [Pointer, Pointer, Long, Long]),
    "kv_write": Signature(Status, [Pointer] * 5 + [Long] * 5),
    "cached_attention": Signature(Status, [Pointer] * 7 + [Long] * 6),
    "layers": Signature(Status, [Pointer] * 15 + [Float]),
    "sample": Signature(Status, [Pointer] * 5 + [Long, Long, Double, Long, Double, Double]),
}

# ---- for the operations


def why_unavailable() -> str | None:
    """Why there are no C kernels here; None when there are. The first call may compile them."""
    return _loader.loaded().reason


def library() -> ctypes.CDLL:
    """The C functions; RuntimeError with the reason where there are none."""
    loaded = _loader.loaded()
    if loaded.library is None:
        raise RuntimeError(f"no native kernels: {loaded.reason}")
    return loaded.library


def name() -> str:
    """The compiled library as "cpu, native-<key>"; "cpu" where there is none."""
    loaded = _loader.loaded()
    if loaded.library is None:
        return "cpu"
    return f"cpu, {Path(loaded.library._name).stem}"


def at(x: Tensor, dtype: torch.dtype = torch.float32) -> int:
    """The address of a contiguous tensor of that dtype on the CPU."""
    if x.dtype is not dtype or not x.is_contiguous() or not x.is_cpu:
        raise AssertionError(
            f"expected contiguous {dtype} on the CPU, got {x.dtype} on {x.device} with strides "
            f"{x.stride()}"
        )
    return x.data_ptr()


# ---- the library of this process


@dataclass(frozen=True)
class Loaded:
    """The compiled library, or the reason why there is none."""

    library: ctypes.CDLL | None = None  # or an object with the same functions
    reason: str | None = None


class Loader:
    """Finds or compiles the library when it is first asked for, and keeps it."""

    def __init__(self, flags: tuple[str, ...] = FLAGS, loaded: Loaded | None = None) -> None:
        self.flags = flags
        self._loaded = loaded

    def loaded(self) -> Loaded:
        """The library; found or compiled by the first call."""
        if self._loaded is None:
            self._loaded = self._find()
        return self._loaded

    def _find(self) -> Loaded:
        reason = why_no_build()
        if reason is not None:
            return Loaded(reason=reason)
        try:
            library = self._cached()
            if library is None:
                library = self._for_this_process()
            return Loaded(library)
        except (OSError, AttributeError, RuntimeError) as error:
            return Loaded(reason=str(error))

    def _cached(self) -> ctypes.CDLL | None:
        """The library in the cache, compiled if need be; None where the cache cannot be used."""
        folder = disk_cache.folder()
        if folder is None:
            return None
        try:
            return bind(build(folder, self.flags))
        except disk_cache.NotOurs as error:
            print(
                f"ops: {error}, so nothing is taken from there and the C kernels are compiled for "
                "this process alone; set XDG_CACHE_HOME to a folder that only you can write"
            )
        except OSError:  # the folder is not writable, or libraries in it may not be loaded
            pass
        return None

    def _for_this_process(self) -> ctypes.CDLL:
        """A library without a file: once loaded, it needs its file no more."""
        with tempfile.TemporaryDirectory() as folder:
            return bind(build(Path(folder, disk_cache.NAME), self.flags))


_loader = Loader()


@contextlib.contextmanager
def loading_by(loader: Loader) -> Iterator[None]:
    """Inside, the library is the one that this loader gives.

    `Loader()` looks for it as a new process would; `Loader(loaded=Loaded(reason=...))` is a machine
    without C kernels. For tests, and for benchmarks that time each function.
    """
    global _loader
    previous = _loader
    _loader = loader
    try:
        yield
    finally:
        _loader = previous


def bind(library: Path) -> ctypes.CDLL:
    """The library's functions with their signatures.

    OSError where it cannot be loaded, AttributeError where a function is missing. Functions that
    return a Status raise MemoryError where that is not 0.
    """
    loaded = ctypes.CDLL(str(library))
    for name, signature in SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype = signature.result
        function.argtypes = signature.arguments
        if signature.result is Status:
            function.errcheck = _check_memory
    return loaded


def _check_memory(result: int, function: ctypes._CFuncPtr, arguments: tuple) -> None:
    if result:
        raise MemoryError(f"no memory for a thread's buffers in the native {function.__name__}")


# ---- compilation


def build(folder: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    """The library for this machine in `folder`, compiled if it is not there.

    RuntimeError where the compiler fails; OSError where the folder cannot be written, or, as
    NotOurs, where another user may write it too.
    """
    compiler = _compiler()
    openmp = _openmp()
    library = folder / f"native-{_key(compiler, openmp, flags)}.so"
    reason = disk_cache.why_distrusted(library)
    if reason is not None:
        raise disk_cache.NotOurs(reason)
    if _is_whole(library):
        return library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _remove_stale_builds(folder)
    print(
        f"ops: {shlex.join(compiler)} compiles the C kernels for this processor (once: {library})"
    )
    sources = [str(FOLDER / name) for name in SOURCES]
    objects = [Path(name).with_suffix(".o").name for name in SOURCES]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".native-") as beside:
        _run([*compiler, *flags, "-c", *sources], beside)
        # without -fopenmp, which would link the system's OpenMP beside torch's
        _run([*compiler, "-shared", "-o", library.name, *objects, openmp, "-lm"], beside)
        made = Path(beside, library.name)
        with made.open("r+b") as file:
            digest = _digest(file.read())
            file.write(digest)  # behind it: the loader ignores bytes after its tables
        made.chmod(0o700)  # other users must not write it, whatever the umask allows
        os.replace(made, library)
    return library


def _key(compiler: list[str], openmp: str, flags: tuple[str, ...]) -> str:
    """Hash of all that decides the library's code."""
    version = _run([*compiler, "--version"])
    build = f"{shlex.join(compiler)} {version} {flags} {openmp} {_processor()}"
    digest = hashlib.sha256(build.encode())
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    for path in sorted(files):
        name = path.relative_to(FOLDER).as_posix()
        header = f"{name} {path.stat().st_size} "
        digest.update(header.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _remove_stale_builds(folder: Path) -> None:
    """Remove what processes left there that were killed while they compiled."""
    for left in folder.glob(".native-*"):
        if time.time() - left.stat().st_mtime > STALE:
            shutil.rmtree(left, ignore_errors=True)


DIGEST_BYTES = hashlib.sha256().digest_size


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def _is_whole(library: Path) -> bool:
    """Whether a library is there as it was written: loading one that was cut off would crash."""
    if not library.exists():
        return False
    content = library.read_bytes()
    size = len(content) - DIGEST_BYTES
    return size > 0 and _digest(content[:size]) == content[size:]


def _run(command: list[str], folder: str | None = None) -> str:
    """Standard output; RuntimeError with the last lines of a failing command's error output."""
    try:
        done = subprocess.run(
            command,
            timeout=SECONDS,
            cwd=folder,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{command[0]} cannot be run: {error}") from None
    if done.returncode != 0:
        last_lines = " / ".join(done.stderr.strip().splitlines()[-3:])
        raise RuntimeError(
            f"{command[0]} failed with status {done.returncode}: {last_lines[-REASON:]}"
        )
    return done.stdout


# ---- this machine


def why_no_build() -> str | None:
    """Why the C kernels cannot be compiled for this machine; None when they can be tried."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"they are for Linux on x86-64, and this is {platform.system()} {platform.machine()}"
    flags = _processor().split()
    has_avx2 = "avx2" in flags and "fma" in flags
    if "avx512f" not in flags and not has_avx2:
        return "the processor has neither AVX-512 nor AVX2 with FMA"
    if not _openmp():
        return "torch has loaded no OpenMP that is known (libgomp, libiomp5, libomp)"
    if not _compiler():
        wanted = os.environ.get("CC") or "cc, gcc or clang"
        return f"no C compiler is there ({wanted}); install gcc"
    return None


def _compiler() -> list[str]:
    """The compiler's path and the words of $CC after it; [] where there is none."""
    try:
        words = shlex.split(os.environ.get("CC", ""))
    except ValueError:  # a quotation that does not end
        return []
    commands = [words] if words else [["cc"], ["gcc"], ["clang"]]
    for command in commands:
        path = shutil.which(command[0])
        if path is not None:
            return [path, *command[1:]]
    return []


def _processor() -> str:
    """The processor's line of flags, which -march=native follows too; "" where it is unknown."""
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("flags"):
            return line
    return ""


def _openmp() -> str:
    """The path of torch's OpenMP library; "" where there is none.

    Another one (scikit-learn brings one) would have threads of its own.
    """
    names = ("libgomp", "libiomp5", "libomp")
    loaded = [line.split(maxsplit=5)[-1] for line in _lines("/proc/self/maps")]
    candidates = [path for path in loaded if os.path.basename(path).startswith(names)]
    # maps has no links, and a .venv may be one
    torch_folder = str(Path(torch.__file__).resolve().parent)

    def rank(path: str) -> int:
        """torch's own first, then the system's, then another package's."""
        if path.startswith(torch_folder):
            return 0
        return 2 if "site-packages" in path else 1

    return min(candidates, key=rank, default="")


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
