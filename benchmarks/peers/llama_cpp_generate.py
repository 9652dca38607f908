"""llama.cpp on given prompts, in a process of its own; last line JSON.

    python llama_cpp_generate.py MODEL.gguf SEQUENCES < JOB.json

JOB.json: as for transformers_generate.py, and "vocab_size". Up to SEQUENCES rows run together
through `llama_batch`, each in a sequence of its own; a row that ends makes room for the next. As in
llama-server, a sequence keeps what its last prompt and its next have in common. Greedy, token ids
in and out, nothing is detokenised.
"""

import ctypes
import json
import sys
import time
from os.path import commonprefix

import llama_cpp as lc

BATCH = 2048  # tokens per llama_decode


@lc.llama_log_callback
def quiet(level, text, data) -> None:
    """Errors only: loading alone says some hundred lines."""
    if level == 4:
        sys.stderr.write(text.decode(errors="replace"))


class Sequences:
    """A model with room for so many texts of so many tokens."""

    def __init__(self, path: str, count: int, longest: int, threads: int) -> None:
        self.model = lc.llama_model_load_from_file(path.encode(), lc.llama_model_default_params())
        assert self.model, f"{path} does not load"
        options = lc.llama_context_default_params()
        options.n_ctx = count * (-(-longest // 256) * 256)
        options.n_seq_max = count
        options.n_batch = BATCH
        options.n_threads = options.n_threads_batch = threads
        self.context = lc.llama_init_from_model(self.model, options)
        assert self.context, "no context: out of memory?"
        self.memory = lc.llama_get_memory(self.context)
        self.greedy = lc.llama_sampler_init_greedy()
        self.batch = lc.llama_batch_init(BATCH, 0, 1)
        self.kept: list[list[int]] = [[] for _ in range(count)]  # tokens in each sequence

    def vocab_size(self) -> int:
        return lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(self.model))

    def begin(self, sequence: int, prompt: list[int]) -> list[int]:
        """What of the prompt is still to compute."""
        known = len(commonprefix([self.kept[sequence], prompt[:-1]]))
        lc.llama_memory_seq_rm(self.memory, sequence, known, -1)
        self.kept[sequence] = prompt[:known]
        return prompt[known:]

    def forward(self, pieces: list[tuple[int, list[int]]]) -> dict[int, int]:
        """Append tokens to sequences; the next token of each."""
        entries = []  # (sequence, token, position, whether it is the last of its piece)
        for sequence, tokens in pieces:
            kept = self.kept[sequence]
            for i, token in enumerate(tokens):
                entries.append((sequence, token, len(kept), i == len(tokens) - 1))
                kept.append(token)
        chosen = {}
        for start in range(0, len(entries), BATCH):
            chunk = entries[start : start + BATCH]
            b = self.batch
            b.n_tokens = len(chunk)
            for i, (sequence, token, position, last) in enumerate(chunk):
                b.token[i], b.pos[i], b.logits[i] = token, position, last
                b.n_seq_id[i], b.seq_id[i][0] = 1, sequence
            code = lc.llama_decode(self.context, b)
            assert code == 0, f"llama_decode: {code}"
            for i, (sequence, _, _, last) in enumerate(chunk):
                if last:
                    chosen[sequence] = lc.llama_sampler_sample(self.greedy, self.context, i)
        return chosen


def generate(sequences: Sequences, prompts: list[list[int]], job: dict) -> list[list[int]]:
    """Every prompt's new tokens, without the end token."""
    answers: list[list[int]] = [[] for _ in prompts]
    waiting = list(reversed(range(len(prompts))))
    free = list(range(len(sequences.kept)))
    flying: dict[int, int] = {}  # sequence -> row
    while waiting or flying:
        pieces = [(sequence, answers[row][-1:]) for sequence, row in flying.items()]
        while waiting and free:
            sequence = free.pop()
            flying[sequence] = waiting.pop()
            pieces.append((sequence, sequences.begin(sequence, prompts[flying[sequence]])))
        for sequence, token in sequences.forward(pieces).items():
            answer = answers[flying[sequence]]
            if token not in job["end_ids"]:
                answer.append(token)
            if token in job["end_ids"] or len(answer) == job["max_new"]:
                del flying[sequence]
                free.append(sequence)
    return answers


def main() -> None:
    path, count, job = sys.argv[1], int(sys.argv[2]), json.load(sys.stdin)
    lc.llama_log_set(quiet, ctypes.c_void_p(0))
    prompts = [row["prompt"] for row in job["rows"]]
    longest = max(map(len, prompts)) + job["max_new"]
    began = time.perf_counter()
    sequences = Sequences(path, count, longest, job["threads"])
    found, wanted = sequences.vocab_size(), job["vocab_size"]
    assert found == wanted, f"{path} has {found} tokens, the model {wanted}: not the same model"
    started = time.perf_counter()
    answers = generate(sequences, prompts, job)
    seconds = time.perf_counter() - started
    with open("/proc/self/status") as file:
        rss = next(int(x.split()[1]) * 1024 for x in file if x.startswith("VmHWM"))
    loaded = started - began
    result = {"load_seconds": loaded, "seconds": seconds, "rss": rss, "answers": answers}
    built = lc.llama_print_system_info().decode()  # which instructions it was compiled for
    print(json.dumps(result | {"version": lc.__version__, "built": built}))


if __name__ == "__main__":
    main()
