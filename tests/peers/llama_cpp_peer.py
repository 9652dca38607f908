"""What llama.cpp makes of a GGUF: token ids of texts, and logits.

    python llama_cpp_peer.py model.gguf job.json logits.npz

job.json    "texts": texts whose ids are wanted, "special": whether special tokens are recognised in
            them, "ids": lists of ids whose logits are wanted, "lora": a GGUF of an adapter or null,
            "dequantise": type of ggml -> hexadecimal bytes of blocks to be dequantised
logits.npz  "logits<n>" (T, V) of the n-th list, and dequantised numbers by type

Needs the package xllamacpp, which brings llama.cpp compiled; its C interface (llama.h) is called by
ctypes. The last line printed is a JSON object. Keys and values are kept in F32 and attention
is the plain one, so that the weights alone decide how far the logits are from fp32 ones.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import sys
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

CONTEXT = 512  # tokens
F32, F16 = 0, 1  # of enum ggml_type
DISABLED = 0  # of enum llama_flash_attn_type
DEFAULT_THREADS = 4


class Options(ctypes.Structure):
    """llama_model_params or llama_context_params, whose fields differ from version to version."""

    _fields_ = [("numbers", c_int32 * 128)]


class Batch(ctypes.Structure):
    """llama_batch."""

    _fields_ = [
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    ]


def library() -> ctypes.CDLL:
    """llama.cpp, with the types of what is called here."""
    spec = importlib.util.find_spec("xllamacpp")
    (file,) = Path(spec.origin).parent.glob("xllamacpp*.so")
    lib = ctypes.CDLL(str(file))
    for name, result, arguments in (
        ("llama_model_default_params", Options, []),
        ("llama_context_default_params", Options, []),
        ("llama_model_load_from_file", c_void_p, [c_char_p, Options]),
        ("llama_model_get_vocab", c_void_p, [c_void_p]),
        ("llama_vocab_n_tokens", c_int32, [c_void_p]),
        ("llama_vocab_bos", c_int32, [c_void_p]),
        ("llama_vocab_eos", c_int32, [c_void_p]),
        ("llama_vocab_is_eog", c_bool, [c_void_p, c_int32]),
        ("llama_vocab_get_add_bos", c_bool, [c_void_p]),
        (
            "llama_tokenize",
            c_int32,
            [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool],
        ),
        ("llama_init_from_model", c_void_p, [c_void_p, Options]),
        ("llama_adapter_lora_init", c_void_p, [c_void_p, c_char_p]),
        (
            "llama_set_adapters_lora",
            c_int32,
            [c_void_p, POINTER(c_void_p), c_size_t, POINTER(c_float)],
        ),
        ("llama_batch_init", Batch, [c_int32, c_int32, c_int32]),
        ("llama_decode", c_int32, [c_void_p, Batch]),
        ("llama_get_logits_ith", POINTER(c_float), [c_void_p, c_int32]),
        ("llama_batch_free", None, [Batch]),
        ("llama_free", None, [c_void_p]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


def tokenised(lib, vocab, text: str, special: bool) -> list[int]:
    data = text.encode()
    room = len(data) + 16
    tokens = (c_int32 * room)()
    count = lib.llama_tokenize(vocab, data, len(data), tokens, room, False, special)
    assert count >= 0, f"{count} tokens for {text!r}"
    return list(tokens[:count])


def context_options(lib) -> Options:
    """Default options but room for CONTEXT tokens, keys and values in F32, plain attention.

    Fields that move from version to version are found by their defaults.
    """
    options = lib.llama_context_default_params()
    numbers = options.numbers
    for place in range(3):  # n_ctx, n_batch, n_ubatch come first
        numbers[place] = CONTEXT
    # the types of keys and values are the only two neighbours that are 1 (F16), after n_seq_max
    pairs = [at for at in range(4, 60) if numbers[at] == numbers[at + 1] == F16]
    # the types of rope scaling, pooling, attention and flash attention are four times -1
    fours = [at for at in range(4, 60) if list(numbers[at : at + 4]) == [-1] * 4]
    assert len(pairs) == len(fours) == 1, f"the options have another form: {list(numbers)}"
    # the numbers of threads are the first neighbours that are 4; beyond the processors they wait
    threads = next(at for at in range(4, 12) if numbers[at] == numbers[at + 1] == DEFAULT_THREADS)
    numbers[threads] = numbers[threads + 1] = min(2, len(os.sched_getaffinity(0)))
    numbers[pairs[0]] = numbers[pairs[0] + 1] = F32
    numbers[fours[0] + 3] = DISABLED
    return options


def logits_of(lib, model, adapter, ids: list[int], vocab_size: int) -> np.ndarray:
    context = lib.llama_init_from_model(model, context_options(lib))
    assert context, "no context"
    if adapter is not None:
        code = lib.llama_set_adapters_lora(context, (c_void_p * 1)(adapter), 1, (c_float * 1)(1.0))
        assert code == 0, f"llama_set_adapters_lora: {code}"
    batch = lib.llama_batch_init(len(ids), 0, 1)
    batch.n_tokens = len(ids)
    for i, token in enumerate(ids):
        batch.token[i], batch.pos[i], batch.logits[i] = token, i, 1
        batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
    code = lib.llama_decode(context, batch)
    assert code == 0, f"llama_decode: {code}"
    rows = [
        np.ctypeslib.as_array(lib.llama_get_logits_ith(context, i), (vocab_size,)).copy()
        for i in range(len(ids))
    ]
    lib.llama_batch_free(batch)
    lib.llama_free(context)
    return np.stack(rows)  # (T, V)


def dequantised(lib, name: str, blocks: bytes, numbers: int) -> np.ndarray:
    """ggml's own numbers of quantised blocks; name: as in its function dequantize_row_<name>."""
    values = np.empty(numbers, dtype=np.float32)
    function = getattr(lib, f"dequantize_row_{name}")
    function.restype, function.argtypes = None, [c_char_p, c_void_p, c_int64]
    function(blocks, values.ctypes.data, numbers)
    return values


def main() -> None:
    path, job = sys.argv[1], json.loads(Path(sys.argv[2]).read_text())
    lib = library()
    results = {}
    answer: dict = {}
    for name, (blocks, numbers) in job.get("dequantise", {}).items():
        results[name] = dequantised(lib, name, bytes.fromhex(blocks), numbers)
    if path != "none":
        model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        assert model, f"{path} does not load"
        vocab = lib.llama_model_get_vocab(model)
        size = lib.llama_vocab_n_tokens(vocab)
        adapter = None
        if job.get("lora"):
            adapter = lib.llama_adapter_lora_init(model, job["lora"].encode())
            assert adapter, f"{job['lora']} does not load"
        special = job.get("special", False)
        answer["tokens"] = [tokenised(lib, vocab, text, special) for text in job.get("texts", [])]
        for n, ids in enumerate(job.get("ids", [])):
            results[f"logits{n}"] = logits_of(lib, model, adapter, ids, size)
        answer |= {
            "bos": lib.llama_vocab_bos(vocab),
            "eos": lib.llama_vocab_eos(vocab),
            "ends": [i for i in range(size) if lib.llama_vocab_is_eog(vocab, i)],
            "add_bos": lib.llama_vocab_get_add_bos(vocab),
        }
    np.savez(sys.argv[3], **results)
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
