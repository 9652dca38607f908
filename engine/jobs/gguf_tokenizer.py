"""The tokenizer of a GGUF file: its vocabulary and the small files that name special tokens.

    tokenizer.ggml.model    "gpt2", byte-level BPE: a tokenizer.json
                            "llama", sentencepiece: a tokenizer.model, pieces merged by score

A GGUF does not say whether a sentencepiece vocabulary puts a space after special tokens too
(`legacy`). It is imported without, as in the files of Llama 2 and TinyLlama on the hub.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from engine.jobs.gguf_config import write_stated
from engine.jobs.gguf_reader import need, optional
from engine.jobs.sentencepiece_file import (
    BYTE,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    write_model,
)

SENTENCEPIECE = "llama"  # a value of tokenizer.ggml.model

# The values of tokenizer.ggml.pre for Llama 3, three names of one pre-tokenizer
LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
# A tokenizer.json of Llama 3's first weeks: it cuts text in the same way, but does not say that a
# whole word of the vocabulary is one token, without merges
EARLY_LLAMA3 = "smaug-bpe"
# Llama 3 cuts text into these pieces before byte-level BPE: contractions, words with one leading
# mark, at most three digits, punctuation, line ends, spaces
LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Qwen2 cuts as Llama 3, but every digit by itself; the text is normalised to NFC before
QWEN2_PIECES = LLAMA3_PIECES.replace(r"\p{N}{1,3}", r"\p{N}")

# The values of tokenizer.ggml.pre that are known here; a vocabulary is exported under the first
# that cuts text as its tokenizer.json does
GPT2 = "gpt-2"
QWEN2 = "qwen2"
PRE_TOKENIZERS = ("smollm", QWEN2, *LLAMA3_NAMES, EARLY_LLAMA3, GPT2)


class VocabularyFile(NamedTuple):
    """The file of a vocabulary."""

    name: str  # tokenizer.json or tokenizer.model
    content: bytes


def vocabulary_file(meta: dict[str, Any], source: Path) -> VocabularyFile:
    """The vocabulary of a GGUF as the file that Hugging Face directories have.

    ValueError for another kind of vocabulary, and for one that is damaged.
    """
    kind = meta.get("tokenizer.ggml.model")
    if kind == "gpt2":
        text = byte_level_bpe(meta, source).to_str(pretty=True)
        return VocabularyFile("tokenizer.json", text.encode())
    if kind == SENTENCEPIECE:
        return VocabularyFile("tokenizer.model", sentencepiece_model(meta, source))
    raise ValueError(
        f"{source}: vocabulary of type {kind!r}; byte-level BPE ('gpt2') and sentencepiece "
        f"({SENTENCEPIECE!r}) are imported"
    )


def sentencepiece_model(meta: dict[str, Any], source: Path) -> bytes:
    """The content of tokenizer.model for a GGUF's sentencepiece vocabulary.

    ValueError where pieces lack a score or type, are spelled alike, or are not those of a Llama.
    """
    tokens = need(meta, "tokenizer.ggml.tokens", source)
    scores = need(meta, "tokenizer.ggml.scores", source)
    kinds = need(meta, "tokenizer.ggml.token_type", source)
    if not len(tokens) == len(scores) == len(kinds):
        raise ValueError(
            f"{source}: {len(tokens)} tokens with {len(scores)} scores and {len(kinds)} types"
        )
    if len(set(tokens)) != len(tokens):
        raise ValueError(f"{source}: the vocabulary spells two tokens the same way")
    pieces = [Piece(*fields) for fields in zip(tokens, scores, kinds, strict=True)]
    unknown = kinds.count(UNKNOWN)
    byte_pieces = kinds.count(BYTE)
    if unknown != 1 or byte_pieces not in (0, 256):
        raise ValueError(
            f"{source}: {unknown} tokens of type unknown and {byte_pieces} of type byte; a "
            "sentencepiece vocabulary has one and 256"
        )
    return write_model(
        pieces,
        space_before=meta.get("tokenizer.ggml.add_space_prefix", True),
        bos=meta.get("tokenizer.ggml.bos_token_id"),
        eos=meta.get("tokenizer.ggml.eos_token_id"),
    )


def byte_level_bpe(meta: dict[str, Any], source: Path) -> Any:
    """The `tokenizers` object for a GGUF's byte-level BPE vocabulary and pre-tokenizer.

    ValueError where the pre-tokenizer is unknown or not stated.
    """
    pre = meta.get("tokenizer.ggml.pre")
    tk = optional("tokenizers")
    _check_pre(pre, source)
    pre_tokenizer = make_pre_tokenizer(tk, pre)
    tokens = meta["tokenizer.ggml.tokens"]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise ValueError(f"{source}: the vocabulary spells two tokens the same way")
    merge_lines = need(meta, "tokenizer.ggml.merges", source)
    merges = [tuple(line.split(" ")) for line in merge_lines]
    # Llama 3 takes a whole word that is in the vocabulary, even where merges give other tokens
    bpe = tk.models.BPE(vocab=vocab, merges=merges, ignore_merges=pre in LLAMA3_NAMES)
    tokenizer = tk.Tokenizer(bpe)
    normalizer = make_normalizer(tk, pre)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = tk.decoders.ByteLevel()

    for token_id, is_special in _added_tokens(meta).items():
        token = tk.AddedToken(tokens[token_id], normalized=False, special=is_special)
        if is_special:
            tokenizer.add_special_tokens([token])
        else:
            tokenizer.add_tokens([token])

    bos_id = meta.get("tokenizer.ggml.bos_token_id")
    adds_bos = meta.get("tokenizer.ggml.add_bos_token", pre in LLAMA3_NAMES)
    if adds_bos and bos_id is not None:
        bos = tokens[bos_id]
        tokenizer.post_processor = tk.processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def make_pre_tokenizer(tk: Any, pre: str) -> Any:
    """The `tokenizers` object that cuts text before BPE; `pre` is one of PRE_TOKENIZERS."""
    cut = tk.pre_tokenizers
    if pre == GPT2:
        return cut.ByteLevel(add_prefix_space=False)
    if pre == "smollm":
        digits = cut.Digits(individual_digits=True)
        byte_level = cut.ByteLevel(add_prefix_space=False)
        return cut.Sequence([digits, byte_level])
    pattern = QWEN2_PIECES if pre == QWEN2 else LLAMA3_PIECES
    pieces = cut.Split(tk.Regex(pattern), behavior="isolated")
    byte_level = cut.ByteLevel(add_prefix_space=False, use_regex=False)
    return cut.Sequence([pieces, byte_level])


def make_normalizer(tk: Any, pre: str) -> Any:
    """The `tokenizers` object that is applied to a text before it is cut; None for none."""
    return tk.normalizers.NFC() if pre == QWEN2 else None


def _check_pre(pre: str | None, source: Path) -> None:
    """ValueError where tokenizer.ggml.pre, `pre`, is absent or unknown."""
    if pre is None:
        raise ValueError(
            f"{source}: tokenizer.ggml.pre is absent: the file was made before May 2024 and does "
            "not say how text is cut before BPE; take a newer file, or, if the model is a Llama 3, "
            "write the key: gguf-new-metadata --pre-tokenizer llama-bpe OLD NEW (package gguf)"
        )
    if pre not in PRE_TOKENIZERS:
        raise ValueError(
            f"{source}: pre-tokenizer {pre!r}; supported are {', '.join(PRE_TOKENIZERS)}"
        )


def _added_tokens(meta: dict[str, Any]) -> dict[int, bool]:
    """Id -> whether it is special (a control token), for tokens that are matched before BPE."""
    kinds = meta.get("tokenizer.ggml.token_type", [])
    added = {}
    for token_id, kind in enumerate(kinds):
        if kind in (CONTROL, USER_DEFINED):
            added[token_id] = kind == CONTROL
    return added


def _sentencepiece_settings(meta: dict[str, Any]) -> dict[str, Any]:
    """Settings of tokenizer_config.json that a tokenizer.model needs; none for another kind."""
    if meta.get("tokenizer.ggml.model") != SENTENCEPIECE:
        return {}
    return {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": False,
        "add_bos_token": meta.get("tokenizer.ggml.add_bos_token", True),
        "add_eos_token": False,
        "add_prefix_space": meta.get("tokenizer.ggml.add_space_prefix", True),
    }


def write_token_settings(out: Path, meta: dict[str, Any], max_length: int) -> None:
    """Write tokenizer_config.json, special_tokens_map.json and generation_config.json into `out`.

    They name the special tokens, the chat template and the tokens that end an answer.
    """
    tokens = meta["tokenizer.ggml.tokens"]
    # eot and eom: an instruct model may close a turn with another token than a document
    keys = ("bos", "eos", "unknown", "padding", "eot", "eom")
    ids = {key: meta.get(f"tokenizer.ggml.{key}_token_id") for key in keys}
    roles = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    named = {role: tokens[ids[key]] for key, role in roles.items() if ids[key] is not None}

    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added_tokens = {}
    for token_id, is_special in _added_tokens(meta).items():
        token = {"content": tokens[token_id], **flags, "special": is_special}
        added_tokens[str(token_id)] = token
    settings = {
        # not the checkpoint's own class: transformers 5 rebuilds those and drops the digit split
        "tokenizer_class": "PreTrainedTokenizerFast",
        **_sentencepiece_settings(meta),
        "added_tokens_decoder": added_tokens,
        **named,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": meta.get("tokenizer.chat_template"),
    }
    write_stated(out / "tokenizer_config.json", settings)
    write_stated(out / "special_tokens_map.json", named)

    ends = {ids[key] for key in ("eos", "eot", "eom") if ids[key] is not None}
    eos: int | list[int] | None = None
    if len(ends) == 1:
        (eos,) = ends
    elif ends:
        eos = sorted(ends)
    generation = {
        "bos_token_id": ids["bos"],
        "eos_token_id": eos,
        "pad_token_id": ids["padding"],
    }
    write_stated(out / "generation_config.json", generation)
