"""The tokenizer of a checkpoint, of one of the two kinds of file that Llama checkpoints ship.

`tokenizer.json` is read where it exists (model/tokenizer_json.py), else `tokenizer.model`
(model/tokenizer_sentencepiece.py). Ids equal those of transformers 5 with
`add_special_tokens=False`:

  special tokens    are recognised in text that a chat template wrote (`encode_template`) and never
                    in plain text (`encode`)
  added tokens      beyond the vocabulary (added_tokens.json, `added_tokens_decoder`) are matched as
                    transformers matches them: those that are not special in plain text as well.
                    Tokens that a chat template writes around turns are the exception:
                    `with_control` makes a tokenizer to which they are special, however the files
                    mark them
  bos and eos       are those that the small files name; else the tokenizer's own (the control
                    pieces of a tokenizer.model, the bos that a tokenizer.json's post-processor
                    puts, <s> and </s> of class LlamaTokenizer); else those that config.json gives
                    by id, if they are control tokens: it often kept the ids of another vocabulary
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from model.file_checks import check_file, check_links
from model.tokenizer_base import Tokenizer
from model.tokenizer_json import JsonTokenizer
from model.tokenizer_sentencepiece import SentencePieceTokenizer


def load_tokenizer(path: str | Path, control: Collection[str] = ()) -> Tokenizer:
    """The tokenizer of the checkpoint directory `path`; `control` as in `Tokenizer.with_control`.

    ValueError when the directory holds none, or one that is not supported; ImportError when there
    is a tokenizer.json and the package `tokenizers` is missing. (A tokenizer.model beside it is not
    taken instead: its ids may differ, and would then depend on the packages that are installed.)
    """
    path = Path(path)
    check_links(path)
    kinds = {"tokenizer.json": JsonTokenizer, "tokenizer.model": SentencePieceTokenizer}
    for name, kind in kinds.items():
        if (path / name).exists():
            check_file(path / name)
            return kind(path, frozenset(control))
    raise ValueError(
        f"{path} holds no tokenizer: looked for tokenizer.json and tokenizer.model; "
        "copy it from the checkpoint the weights came from"
    )
