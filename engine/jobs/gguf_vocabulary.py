"""The tokenizer of a Hugging Face directory as the metadata `tokenizer.*` of a GGUF file.

    tokenizer.json, byte-level BPE       model "gpt2": tokens, merges, and a name for the way text
                                         is cut before BPE (PRE_TOKENIZERS in gguf_tokenizer.py)
    tokenizer.json made from a           model "llama": tokens with scores. The scores are the ranks
    sentencepiece model                  of the merges, after a check that this is the same rule
    tokenizer.model                      model "llama": its own pieces, scores and types

llama.cpp puts a space before the text after every special token of a sentencepiece vocabulary.
Where the checkpoint does not (`legacy` false, as in Llama 2's own files), chats differ by that. It
does not normalise text to NFC, which the tokenizers of Qwen2 and Qwen3 do.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.jobs.gguf_reader import optional
from engine.jobs.gguf_tokenizer import (
    LLAMA3_NAMES,
    PRE_TOKENIZERS,
    SENTENCEPIECE,
    make_normalizer,
    make_pre_tokenizer,
)
from engine.jobs.sentencepiece_file import (
    BPE,
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    read_model,
)
from model.chat_formats import checkpoint_eos_ids, checkpoint_template
from model.config import read_json
from model.tokenizer import load_tokenizer
from model.tokenizer_base import BYTE_PIECE, Tokenizer

OUT_OF_ORDER = 1000.0  # score below every merge: of pieces that no merge makes


def vocabulary(directory: Path, rows: int) -> dict[str, Any]:
    """The metadata of the tokenizer in `directory`, for a model with that many embedding rows.

    Rows without a token are named [PAD<id>]. A token beyond the rows, which the model cannot read,
    is left out with a printed note. ValueError for a tokenizer that llama.cpp would cut otherwise.
    """
    tokenizer = load_tokenizer(directory)
    file = directory / "tokenizer.json"
    if file.exists():
        document = read_json(file)
        _check_flags(file, document)
        if document["model"].get("byte_fallback"):
            stated = _converted(file, document)
        else:
            stated = _byte_level(file, document)
    else:
        stated = _sentencepiece(directory / "tokenizer.model")
    pieces = dict(enumerate(stated.pop("pieces")))
    metadata = stated | _tokens(pieces, tokenizer, rows, directory)
    return metadata | _named(directory, tokenizer)


def _tokens(
    pieces: Mapping[int, Piece], tokenizer: Tokenizer, rows: int, directory: Path
) -> dict[str, Any]:
    """Spelling, type and score of every row, the added tokens among them."""
    placed = dict(pieces)
    for spelling, id in tokenizer.added.items():
        is_special = spelling in tokenizer.special
        known = placed.get(id)
        if known is not None and known.kind == UNKNOWN:
            continue
        kind = CONTROL if is_special else USER_DEFINED
        score = known.score if known is not None else -OUT_OF_ORDER
        placed[id] = Piece(spelling, score, kind)
    beyond = sorted(id for id in placed if id >= rows)
    if beyond:
        named = ", ".join(repr(placed[id].spelling) for id in beyond[:4])
        print(
            f"tokenizer: {len(beyond)} tokens of {directory} have no row in the model and are left "
            f"out: {named}"
        )
    listed = []
    for id in range(rows):
        listed.append(placed.get(id, Piece(f"[PAD{id}]", -OUT_OF_ORDER, UNUSED)))
    metadata: dict[str, Any] = {
        "tokenizer.ggml.tokens": [piece.spelling for piece in listed],
        "tokenizer.ggml.token_type": [piece.kind for piece in listed],
    }
    if any(piece.score != 0 for piece in pieces.values()):
        metadata["tokenizer.ggml.scores"] = [float(piece.score) for piece in listed]
    return metadata


def _named(directory: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids of the tokens with a role, whether bos begins a text, and the chat template."""

    def id_of(role: str) -> int | None:
        return tokenizer.added.get(tokenizer.named.get(role, ""))

    # the tokens that end an answer, beside eos: <|eot_id|>, and <|eom_id|> of Llama 3.1
    ends = [id for id in checkpoint_eos_ids(directory) if id != tokenizer.eos_id]
    eom = [id for id in ends if "eom" in tokenizer.piece(id)]
    eot = [id for id in ends if id not in eom]
    unnamed = [tokenizer.piece(id) for id in eot[1:] + eom[1:]]
    if unnamed:
        print(
            f"end tokens: a GGUF names eos, eot and eom; {', '.join(unnamed)} end an answer too, "
            "and llama.cpp knows them only by their spelling"
        )
    try:
        template = checkpoint_template(directory)
    except ValueError as error:
        print(f"chat template: none is written ({error})")
        template = None
    return {
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_id,
        "tokenizer.ggml.eot_token_id": eot[0] if eot else None,
        "tokenizer.ggml.eom_token_id": eom[0] if eom else None,
        "tokenizer.ggml.unknown_token_id": id_of("unk_token"),
        "tokenizer.ggml.padding_token_id": id_of("pad_token"),
        "tokenizer.ggml.add_bos_token": tokenizer.add_bos,
        "tokenizer.ggml.add_eos_token": False,
        # a text gets the space, one that continues another does not
        "tokenizer.ggml.add_space_prefix": tokenizer.encode("a")
        != tokenizer.encode("a", continues=True),
        "tokenizer.chat_template": template,
    }


def _check_flags(file: Path, document: dict[str, Any]) -> None:
    """ValueError for added tokens that are matched with the spaces or words around them."""
    for token in document.get("added_tokens") or []:
        for flag in ("lstrip", "rstrip", "single_word"):
            if token.get(flag):
                raise ValueError(
                    f"{file}: the added token {token['content']!r} sets {flag}, which a GGUF "
                    "cannot state; write false there if prompts do not need it"
                )


# ---- byte-level BPE


def _byte_level(file: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Pieces, merges and the pre-tokenizer's name of a byte-level tokenizer.json."""
    model = document["model"]
    merges = _merges(model)
    if model.get("type") != "BPE" or not merges:
        raise ValueError(f"{file}: llama.cpp reads BPE vocabularies with merges; this is none")
    vocab: dict[str, int] = model["vocab"]
    pieces = [Piece(f"[PAD{id}]", 0.0, UNUSED) for id in range(max(vocab.values()) + 1)]
    for spelling, id in vocab.items():
        pieces[id] = Piece(spelling, 0.0, NORMAL)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": _pre_name(file, document),
        "pieces": pieces,
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges],
    }


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    """The merges in the order of their ranks; files write them as texts or as pairs."""
    merges = []
    for merge in model.get("merges") or []:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        merges.append((left, right))
    return merges


def _pre_name(file: Path, document: dict[str, Any]) -> str:
    """llama.cpp's name for the way in which a byte-level tokenizer.json cuts text before BPE."""
    tk = optional("tokenizers")
    found = _steps(document)
    ignores_merges = bool(document["model"].get("ignore_merges"))
    for name in PRE_TOKENIZERS:
        same_cut = found == _steps(_document_of(tk, name))
        if same_cut and ignores_merges == (name in LLAMA3_NAMES):
            return name
    raise ValueError(
        f"{file} cuts text in a way that has no name here (normalizer "
        f"{document.get('normalizer')}, pre-tokenizer "
        f"{json.dumps(document.get('pre_tokenizer'))[:200]}); those of SmolLM2, Llama 3, SmolLM3, "
        "Qwen2, Qwen3 and GPT-2 can be exported"
    )


def _document_of(tk: Any, name: str) -> dict[str, Any]:
    """The tokenizer.json of a vocabulary that cuts text as llama.cpp's `name` says."""
    tokenizer = tk.Tokenizer(tk.models.BPE())
    normalizer = make_normalizer(tk, name)
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = make_pre_tokenizer(tk, name)
    return json.loads(tokenizer.to_str())


def _steps(document: dict[str, Any]) -> tuple[Any, Any]:
    """What a tokenizer.json does to a text before BPE: normalisation and cuts."""
    return document.get("normalizer"), _plain(document.get("pre_tokenizer"))


def _plain(step: Any) -> Any:
    """A step of a tokenizer.json in one form: sequences of one opened, what has no effect left out.

    trim_offsets concerns the places of tokens in the text alone.
    """
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Sequence":
        parts = [_plain(part) for part in step["pretokenizers"]]
        return parts[0] if len(parts) == 1 else parts
    defaults = {"use_regex": True, "add_prefix_space": True} if step["type"] == "ByteLevel" else {}
    return defaults | {key: value for key, value in step.items() if key != "trim_offsets"}


# ---- sentencepiece


def _sentencepiece(file: Path) -> dict[str, Any]:
    """Pieces of a tokenizer.model."""
    try:
        model = read_model(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    if model.kind != BPE or model.has_rules:
        raise ValueError(
            f"{file} is not of the kind that Llama has (BPE by score, text not normalised), and "
            "llama.cpp would cut text otherwise"
        )
    return _llama(model.pieces)


def _llama(pieces: Sequence[Piece]) -> dict[str, Any]:
    return {
        "tokenizer.ggml.model": SENTENCEPIECE,
        "tokenizer.ggml.pre": "default",
        "pieces": list(pieces),
    }


def _converted(file: Path, document: dict[str, Any]) -> dict[str, Any]:
    """Pieces of a tokenizer.json that was made from a sentencepiece model."""
    model = document["model"]
    vocab: dict[str, int] = model["vocab"]
    if model.get("type") != "BPE":
        raise ValueError(f"{file}: a {model.get('type')} vocabulary; llama.cpp's 'llama' is BPE")
    ranks = _ranks_by_piece(file, vocab, _merges(model))
    pieces = [Piece(f"[PAD{id}]", -OUT_OF_ORDER, UNUSED) for id in range(max(vocab.values()) + 1)]
    lowest = -float(len(vocab))
    for spelling, id in vocab.items():
        kind = BYTE if BYTE_PIECE.fullmatch(spelling) else NORMAL
        if spelling == model.get("unk_token"):
            kind = UNKNOWN
        rank = ranks.get(spelling)
        pieces[id] = Piece(spelling, lowest if rank is None else -float(rank), kind)
    return _llama(pieces)


def _ranks_by_piece(
    file: Path, vocab: Mapping[str, int], merges: Sequence[tuple[str, str]]
) -> dict[str, int]:
    """The place of every piece that merges make, in the order in which they are tried.

    A sentencepiece vocabulary merges any two neighbours whose concatenation is a piece, best score
    first. Merges say the same if every such pair is listed, those of one piece next to each other;
    ValueError where they are not.
    """
    ranks: dict[str, int] = {}
    last = ""
    for left, right in merges:
        piece = left + right
        if piece != last:
            if piece in ranks:
                raise _other_rule(file, piece)
            ranks[piece] = len(ranks)
            last = piece
    listed = set(merges)
    for piece in vocab:
        for cut in range(1, len(piece)):
            pair = (piece[:cut], piece[cut:])
            if pair[0] in vocab and pair[1] in vocab and pair not in listed:
                if not BYTE_PIECE.fullmatch(piece):
                    raise _other_rule(file, piece)
    return ranks


def _other_rule(file: Path, piece: str) -> ValueError:
    return ValueError(
        f"{file}: the merges that make {piece!r} are not those of a sentencepiece model, so "
        "llama.cpp, which goes by scores, would cut text otherwise; put the tokenizer.model that "
        "it was made from in its place"
    )
