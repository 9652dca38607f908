"""GGUF files for tests, written from random small models with gguf's own writer.

The rows of q and k are put into GGUF's order by an index computed here.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import gguf
import numpy as np
import tokenizers
from safetensors.numpy import load_file

SPECIAL = ["<|begin|>", "<|end|>", "<|turn|>"]
# Merges in rank order. "12" and "123" only ever form where digits are not split one by one; "hello"
# has a token without merges that lead to it.
MERGES = "Ġ t,h e,Ġt he,1 2,12 3,i n,in g,a n,d o,do n,Ġ Ġ,ĠĠ Ġ,e r,Ġ 1,Ã ©,Ċ Ċ".split(",")
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def vocabulary() -> list[str]:
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    return SPECIAL + alphabet + [merge.replace(" ", "") for merge in MERGES] + ["hello"]


def gguf_name(hf_name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, _, kind = hf_name.rpartition(".")
    if stem in top:
        return f"{top[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    return f"blk.{layer}.{PARTS[part]}.{kind}"


def neighbours_first(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows in GGUF's order: of each head first row 0 and row d/2, then 1 and d/2 + 1, ..."""
    d = weight.shape[0] // heads
    order = []
    for head in range(heads):
        for i in range(d // 2):
            first = head * d + i
            order += [first, first + d // 2]
    return weight[order]


def write_gguf(
    path: Path, hf_dir: Path, *, kind="F32", pre="llama-bpe", drop=(), blocks=None, **extra
) -> dict:
    """Write the model in `hf_dir` as a GGUF; returns its tensors in Hugging Face's names and order.

    `extra` adds or replaces metadata (None removes) and, where the value is an array, tensors;
    `blocks` are quantised matrices by their GGUF names, (bytes, type), written as they are.
    """
    config = json.loads((hf_dir / "config.json").read_text())
    weights = load_file(hf_dir / "model.safetensors")
    vocab = vocabulary()
    normal = len(vocab) - len(SPECIAL)
    metadata = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.key_length": config["head_dim"],
        "llama.attention.value_length": config["head_dim"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "llama.rope.freq_base": config["rope_theta"],
        "llama.rope.dimension_count": config["head_dim"],
        "llama.vocab_size": config["vocab_size"],
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * normal,
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        **{key: value for key, value in extra.items() if not isinstance(value, np.ndarray)},
    }
    model_type = config["model_type"]
    is_llama = model_type in ("llama", "mistral")
    architecture = metadata.pop("general.architecture", "llama" if is_llama else model_type)
    if not is_llama:  # the keys of another architecture bear its name
        metadata = {key.replace("llama.", f"{model_type}."): v for key, v in metadata.items()}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    quantised = gguf.GGMLQuantizationType[kind]
    is_reordered = is_llama or model_type == "smollm3"
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    expected = {}
    for name, weight in weights.items():
        expected[name] = weight
        if gguf_name(name) in drop:
            continue
        if blocks and gguf_name(name) in blocks:
            stored, stored_kind = blocks[gguf_name(name)]
            writer.add_tensor(gguf_name(name), stored, raw_dtype=stored_kind)
            continue
        if weight.ndim == 1 or quantised == gguf.GGMLQuantizationType.F32:
            stored_kind, stored = gguf.GGMLQuantizationType.F32, weight
        else:
            # quantised along a row, so the order of rows changes nothing about the values
            stored_kind, stored = quantised, gguf.quantize(weight, quantised)
            expected[name] = gguf.dequantize(stored, quantised)
        module = name.split(".")[-2]
        if is_reordered and module in heads:
            stored = neighbours_first(stored, heads[module])
        writer.add_tensor(gguf_name(name), stored, raw_dtype=stored_kind)
    for name, value in extra.items():
        if isinstance(value, np.ndarray):
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


def texts() -> list[str]:
    """A few hundred texts: languages, emoji, digits, spaces and line ends in every position."""
    words = (
        "the The don't I'LL we're hello Hello naïve café Straße Привет мир 你好 世界 こんにちは "
        "مرحبا 🎉 👩‍👩‍👧 ½ ² ٣ Ⅷ 1 12 123 2024 3.14 1,000 -7 +x == != /* */ {a:b} [0] _x_ "
        "snake_case camelCase URL https://a.b/c?d=1 e\u0301 ﬁ \u200b \u00a0 \ufeff … — « » 𝒳 Ω"
    ).split(" ")
    gaps = [" ", "  ", "   ", "\n", "\n\n", " \n", "\t", "\t\t", "\r\n", "", ".", ", ", "'"]
    draw = random.Random(7)
    made = []
    for _ in range(260):
        text = ""
        for _ in range(draw.randint(1, 12)):
            text += draw.choice(words) + draw.choice(gaps)
        made.append(text)
    edges = ["a", " a", "  a", "a ", "a  ", "\n", "\n\n\n", " \n \n", "\t5", "  5", " 5 5", "5  5"]
    code = [
        "for i in range(10):\n    print(i, 'x')\n\n\nif a  == 22:\n\treturn\n",
        "x = {\r\n}\r\n",
    ]
    return edges + code + words + made


def random_blocks(kind, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Rows of a quantised matrix, of random bytes; blocks whose numbers are not finite are redrawn.

    Every pattern of bytes is a block: scales, minima and quantised numbers of any size.
    """
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    draw = np.random.default_rng(seed)
    blocks = draw.integers(0, 256, (rows * columns // numbers, size), dtype=np.uint8)
    while True:
        with np.errstate(all="ignore"):
            values = gguf.dequantize(blocks, kind).reshape(len(blocks), numbers)
            bad = ~(np.abs(values).max(axis=1) < 1e30)  # "not <": NaN too
        if not bad.any():
            return blocks.reshape(rows, -1)
        blocks[bad] = draw.integers(0, 256, (int(bad.sum()), size), dtype=np.uint8)


def split_gguf(path: Path, count: int) -> list[Path]:
    """Write the tensors of a GGUF into `count` parts, as llama-gguf-split does; returns them.

    The first part has all metadata; every part has its number, the count and that of all tensors.
    """
    reader = gguf.GGUFReader(path)
    tensors = reader.tensors
    parts = []
    for number in range(count):
        part = path.with_name(f"{path.stem}-{number + 1:05d}-of-{count:05d}.gguf")
        writer = gguf.GGUFWriter(part, "llama")
        if number == 0:
            for key, field in reader.fields.items():
                if key.startswith("GGUF.") or key == "general.architecture":
                    continue
                kind, *inner = field.types
                writer.add_key_value(key, field.contents(), kind, *inner[-1:])
        writer.add_uint16("split.no", number)
        writer.add_uint16("split.count", count)
        writer.add_int32("split.tensors.count", len(tensors))
        for tensor in tensors[number::count]:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        parts.append(part)
    return parts
