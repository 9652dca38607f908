"""What transformers and a plain-Python BPE make of a GGUF and of the directory imported from it.

    python gguf_peer.py model.gguf imported_dir texts.json

`texts.json` holds a list of strings. Run in a process of its own, outside the clone. The last line
printed is a JSON object; test_gguf.py says what must hold.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import regex
import torch
from gguf import GGUFReader
from transformers import AutoModelForCausalLM, AutoTokenizer

# pytorch issue 188792: else, now and then, the first call is wrong for one thread's share
for function in (torch.cos, torch.sin, torch.exp, torch.log, torch.sqrt, torch.rsqrt):
    function(torch.ones(16))

# One match is one piece. For 'smollm' the digits have been taken out one by one before.
PIECES = {
    "smollm": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "llama-bpe": r"'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD]|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def byte_spelling() -> dict[int, str]:
    """GPT-2's alphabet: a printable byte is itself, the others are 256, 257, ... in order."""
    shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    hidden = [b for b in range(256) if b not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + n) for n, b in enumerate(hidden)}


class PlainBpe:
    """Byte-level BPE from a GGUF's own lists, by the definition: merge the best-ranked pair first.

    Bytes that the vocabulary lacks give no token (SmolLM2 lacks 21, mostly control characters).
    """

    def __init__(self, fields: dict) -> None:
        self.ids = {t: i for i, t in enumerate(fields["tokenizer.ggml.tokens"].contents())}
        merges = fields["tokenizer.ggml.merges"].contents()
        self.rank = {tuple(merge.split(" ")): n for n, merge in enumerate(merges)}
        self.pre = fields["tokenizer.ggml.pre"].contents()
        self.spelling = byte_spelling()

    def encode(self, text: str) -> list[int]:
        ids = []
        runs = regex.split(r"(\p{N})", text) if self.pre == "smollm" else [text]
        for run in runs:
            for piece in regex.findall(PIECES[self.pre], run):
                ids += self._word([self.spelling[b] for b in piece.encode()])
        return ids

    def _word(self, parts: list[str]) -> list[int]:
        parts = [part for part in parts if part in self.ids]
        if self.pre == "llama-bpe" and "".join(parts) in self.ids:
            return [self.ids["".join(parts)]]
        while len(parts) > 1:
            ranks = [self.rank.get(pair, len(self.rank)) for pair in pairwise(parts)]
            best = min(ranks)
            if best == len(self.rank):
                break
            at = ranks.index(best)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ids[part] for part in parts]


def main() -> None:
    gguf, imported, texts = (
        Path(sys.argv[1]),
        sys.argv[2],
        json.loads(Path(sys.argv[3]).read_text()),
    )
    fast = AutoTokenizer.from_pretrained(imported)
    converted = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    plain = PlainBpe(GGUFReader(gguf).fields)

    def ids_of(tokenizer, text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    mine = AutoModelForCausalLM.from_pretrained(imported, dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    ).eval()
    worst = largest = 0.0
    with torch.no_grad():
        for text in texts[:8]:
            tokens = torch.tensor([plain.encode(text)])
            a, b = mine(tokens).logits, theirs(tokens).logits
            worst = max(worst, (a - b).abs().max().item())
            largest = max(largest, b.abs().max().item())
    weights = theirs.state_dict()
    turn = [{"role": "user", "content": "Hi"}]
    result = {
        "worst": worst,
        "largest": largest,
        "unequal": [k for k, v in mine.state_dict().items() if not torch.equal(v, weights[k])],
        "fast": [ids_of(fast, text) for text in texts],
        "converted": [ids_of(converted, text) for text in texts],
        "plain": [plain.encode(text) for text in texts],
        "chat": fast.apply_chat_template(turn, tokenize=False) if fast.chat_template else None,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
