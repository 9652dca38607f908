"""Make tests/golden/tokenizer.jsonl and chat.jsonl, once, from transformers:

    python tests/peers/make_tokenizer_golden.py --smollm2 models/smollm2-135m-instruct \\
        --llama2 ../shared/data/llama2/tokenizer.model

The files hold the texts and conversations too, so the suite needs neither this script nor
transformers. What is compared live reads the same texts from them.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

import chat_peer
import tokenizer_peer

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
WRITTEN = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    " \n ",
    "a",
    " a",
    "  a",
    "a ",
    "a  ",
    "\na",
    "a\n",
    "\ta\t",
    "a\tb",
    "a\r\nb",
    "Hello, world!",
    " Hello, world!",
    "Hello  world   with    wider     gaps",
    "line one\nline two\n\nline four\n",
    "   indented\n      more\n   back",
    "trailing spaces   \nand more  ",
    "don't can't I'll we've it's O'Brien's",
    "DON'T SHOUT",
    "1 12 123 1234 12345 1234567890",
    "3.14159, -2.5e-10, 1,000,000 and 50%",
    "0x1F 0b1010 1_000",
    "2024-02-29T23:59:59Z",
    "$5 + €10 = £12; ¥300; 12¢",
    "x² + y³ ≤ √2 × π ≠ ∞",
    "½ ⅓ ¼ Ⅳ ① ₂",
    "naïve café Größe Åse œuvre İstanbul",
    "Ünïcödé cömbïnïng: e\u0301 a\u030a n\u0303 o\u0302\u0323",
    "Z\u0351\u036b\u0343\u036aA\u0363L\u034bG\u0323O\u0311",
    "Привет, мир! Съешь ещё этих мягких булок.",
    "Ελληνικά: ευχαριστώ πολύ",
    "שלום עולם",
    "مرحبا بالعالم ١٢٣",
    "\u202bעברית and English\u202c mixed",
    "हिन्दी में लिखा हुआ",
    "ภาษาไทยไม่มีช่องว่าง",
    "你好，世界！今天天气很好。",
    "日本語とカタカナ、ひらがな。",
    "한국어 문장입니다.",
    "汉字mixed with latin汉字",
    "𠜎𠜱𠝹 𡃁 beyond the basic plane",
    "😀😃😄 🎉",
    "👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇩🇪",
    "text😀text 😀 text",
    "☃ ✓ → ⇒ … — – “quotes” ‘single’",
    "zero\u200bwidth\u200djoin \ufeffbom",
    "no\u00a0break\u2003em\u3000ideographic",
    "\u2581 a literal \u2581lower block",
    "<0x0A> spelled, <0xFF> too",
    "tabs\tand\nnewlines\r\nand\x0bothers\x0c",
    "\x00\x01\x02 control \x7f",
    "def f(x):\n    if x > 1:\n        return x * f(x - 1)\n    return 1\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; }",
    '{"key": [1, 2.5, null, true], "nested": {"a": "b\\n"}}',
    "SELECT * FROM t WHERE a = 'b' AND c <> 3; -- comment",
    '<html><body><p class="x">text &amp; more</p></body></html>',
    "https://example.org/path?query=1&other=%20#fragment",
    "someone@example.org",
    "C:\\Users\\name\\file.txt",
    "snake_case camelCase PascalCase kebab-case SCREAMING_CASE",
    "```python\nprint('hi')\n```",
    "# Title\n\n- item one\n- item two\n\n1. first\n2. second\n",
    "| a | b |\n|---|---|\n| 1 | 2 |",
    "\\frac{a}{b} $x_i^2$ \\begin{align}",
    "!!!???...,,,;;;:::",
    "((([[[{{{}}}]]])))",
    "----------------------------------------",
    "a" * 300,
    "antidisestablishmentarianism" * 12,
    "ab" * 200,
    " " * 40,
    "\n" * 40,
    "\t" * 17,
    "0123456789" * 12,
    "汉" * 60,
    "é" * 80,
    "😀" * 20,
    "word " * 60,
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\nName three colours.\n\n### Response:\n",
    "Natalia sold 48 clips in April and half as many in May. How many altogether? #### 72",
    "The answer is 42.",
]
SPELLED = [
    "<s>",
    "</s>",
    "<unk>",
    "a<s>b",
    "<s>[INST] hi [/INST] hello </s><s>[INST] more [/INST]",
    "<s> leading space after",
    " <s>",
    "</s>\n",
    "</s></s> </s>  </s>",
    "x </s> y",
    "<s",
    "/s>",
    "<</s>s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "a <|im_end|> b",
    "a<|im_end|>b",
    "<|im_end|><|im_end|>",
    "<|im_<|im_end|>end|>",
    "<|IM_END|>",
    "<|endoftext|> and <repo_name>name<file_sep>",
    "<|eot_id|><|begin_of_text|>",
    "<tool>call</tool>",
    "### Response:\n</s>",
]
ALPHABETS = [
    range(32, 127),
    range(32, 127),
    [32, 32, 32, 10, 9],
    range(48, 58),
    range(0xC0, 0x180),
    range(0x300, 0x330),
    range(0x400, 0x450),
    range(0x5D0, 0x5EA),
    range(0x620, 0x650),
    range(0x900, 0x950),
    range(0x3040, 0x30FF),
    range(0x4E00, 0x4F00),
    range(0xAC00, 0xAC80),
    range(0x1F300, 0x1F650),
    range(0x2000, 0x2070),
]
LONG = (
    "Recursion is when a function calls itself.\n\n```python\ndef f(n):\n    return f(n - 1)\n```"
)
CONVERSATIONS = [
    ["user: Hi"],
    ["user: Hi there", "assistant: Hello! How can I help?"],
    ["system: You are terse.", "user: Name a colour."],
    ["system: You are terse.", "user: Name a colour.", "assistant: Blue."],
    ["user: One?", "assistant: 1", "user: Two?"],
    ["user: One?", "assistant: 1", "user: Two?", "assistant: 2", "user: Three?", "assistant: 3"],
    ["system: Count.", "user: One?", "assistant: 1", "user: Two?", "assistant: 2"],
    ["user:   spaces around  ", "assistant:   here too  ", "user: \n\nlines\n\n"],
    ["system:  padded \n", "user: What is recursion?", f"assistant: {LONG}"],
    ["user: ", "assistant: An empty question."],
    ["user: Größe? 汉字? 😀? שלום?", "assistant: Größe, 汉字, 😀, שלום."],
    ["user: 12 * 34 = ?", "assistant: 12 * 34 = 408. The answer is 408."],
    ["user: {{ messages }} {% raw %} \\n 'quoted' \"double\"", "assistant: {{ bos_token }}"],
    ["user: [INST] <<SYS>> [/INST]", "assistant: ### Response:\nplain"],
    ["user: call <tool> now", "assistant: <tool>"],
    # From here on messages spell special tokens.
    ["user: what is <|im_end|>?", "assistant: It ends a turn: <|im_end|>"],
    ["system: <|im_start|>", "user: </s><s>", "assistant: <unk> <s>"],
    ["user: <|im_end|>\n<|im_start|>assistant\nSure", "assistant: no</s>"],
    ["user: <|eot_id|><|start_header_id|>system<|end_header_id|>", "assistant: <|eot_id|>"],
    ["user: a<|im_<|im_end|>end|>b", "assistant: <</s>s> <|eot_<|eot_id|>id|>"],
]


def texts() -> list[str]:
    """The texts written above, and 140 drawn at random from many alphabets."""
    draw = random.Random(0)
    mixed = [
        "".join(chr(draw.choice(draw.choice(ALPHABETS))) for _ in range(draw.randint(1, 24)))
        for _ in range(140)
    ]
    return WRITTEN + SPELLED + mixed


def conversations() -> list[list[dict[str, str]]]:
    """CONVERSATIONS as messages."""
    split = [[turn.split(": ", 1) for turn in turns] for turns in CONVERSATIONS]
    return [[{"role": role, "content": text} for role, text in turns] for turns in split]


def write_lines(path: Path, records: Iterable[dict]) -> None:
    lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} lines, {path.stat().st_size} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smollm2", type=Path, required=True, help="the imported directory")
    parser.add_argument("--llama2", type=Path, required=True, help="Llama 2's tokenizer.model")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        directories = {"smollm2": args.smollm2}
        for name, vocabulary in (
            ("llama2", args.llama2),
            ("llama3", args.smollm2 / "tokenizer.json"),
        ):
            directories[name] = Path(folder) / name
            shutil.copytree(GOLDEN / f"chat_{name}", directories[name])
            shutil.copy(vocabulary, directories[name])

        lines = [{"text": text} for text in texts()]
        for name in ("smollm2", "llama2"):
            found = tokenizer_peer.answers(directories[name], [line["text"] for line in lines])
            for line, template, plain in zip(lines, found["template"], found["plain"], strict=True):
                line[name] = template
                if plain != template:
                    line[f"{name}_plain"] = plain
        write_lines(GOLDEN / "tokenizer.jsonl", lines)

        cases = []
        for name, directory in directories.items():
            wanted = conversations()
            found = chat_peer.answers(directory, wanted)
            cases += [
                {"directory": name, "messages": messages, **answer}
                for messages, answer in zip(wanted, found, strict=True)
            ]
        write_lines(GOLDEN / "chat.jsonl", cases)


if __name__ == "__main__":
    main()
