"""One decode step over buffers that stay where they are, so that it can be captured as a CUDA graph

Forward, head, sampling, moving on by one position. Its inputs lie in one flat buffer, which a
single copy fills for several steps. What the host has not read yet (the last tokens of sequences
whose steps are still in flight) is taken from the device.
"""

# B = sequences of a bucket, P = pages of each, L = tokens of P pages, D = hidden size,
# V = vocabulary

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from engine.sampling.page_pool import PagePool
from engine.sampling.requests import SamplerConfig
from engine.sampling.sequence import RunningSequence
from kernels.cached import Cached
from kernels.integers import cdiv
from model.llama import Llama
from model.lora import Lora

ALIGNMENT = 16  # 8-byte numbers: each tensor begins at 128 bytes, as an allocation does


class FlatBuffer:
    """Named int64 tensors one behind the other, in host memory and on the device.

    The host's are filled one by one; `upload` moves all of them in one copy. The host has them
    twice, and fills them in turn: the copy of the other ones may not have been made yet.
    """

    def __init__(self, sizes: dict[str, int], device: torch.device) -> None:
        starts: dict[str, int] = {}
        total = 0
        for name, size in sizes.items():
            starts[name] = total
            total += cdiv(size, ALIGNMENT) * ALIGNMENT
        pinned = device.type == "cuda"
        self.all_on_host: list[Tensor] = []
        for _ in range(2):
            zeros = torch.zeros(total, dtype=torch.int64, pin_memory=pinned)
            self.all_on_host.append(zeros)
        self.all_on_device = torch.zeros(total, dtype=torch.int64, device=device)
        self.side = 0  # of the host's two, which is filled now
        self.on_host: list[dict[str, Tensor]] = [{}, {}]
        self.on_device: dict[str, Tensor] = {}
        for name, size in sizes.items():
            span = slice(starts[name], starts[name] + size)
            for side in (0, 1):
                self.on_host[side][name] = self.all_on_host[side][span]
            self.on_device[name] = self.all_on_device[span]

    def fill(self, name: str, values: Sequence[int]) -> None:
        """Set the host's tensor of that name, on the side that is filled now."""
        tensor = self.on_host[self.side][name]
        tensor.copy_(torch.tensor(values, dtype=tensor.dtype))

    def turn_over(self) -> int:
        """End the filling; returns the side to upload. The next `fill` is on the other one."""
        filled = self.side
        self.side = 1 - filled
        return filled

    def upload(self, side: int) -> None:
        """Copy one side of the host to the device; the host does not wait for it."""
        self.all_on_device.copy_(self.all_on_host[side], non_blocking=True)


class Bucket(NamedTuple):
    """The sizes and the setting that are fixed in a captured step."""

    sequences: int  # B: the step's slots
    pages: int  # P: the most that a sequence may hold
    temperature: float  # of all sequences


class DecodeStep:
    """One token for each of up to B sequences of up to P pages, over buffers that stay in place.

    `stage` and `load` fill the buffers; call number i since then, or since `go_on`, writes
    results[i]: (2, B) fp64, tokens and log-probabilities, both exact.
    """

    def __init__(
        self,
        model: Llama,
        lora: Lora | None,
        pool: PagePool,
        config: SamplerConfig,
        bucket: Bucket,
        steps: int,  # calls between two `load`s, at most
    ) -> None:
        self.model = model
        self.lora = lora
        self.pool = pool
        self.config = config
        self.temperature = bucket.temperature
        self.B = bucket.sequences
        self.P = bucket.pages
        self.L = self.P * config.page_size
        self.penalised = config.repetition_penalty != 1
        self.buffer = self._make_buffer()
        inputs = self.buffer.on_device
        self.tokens = inputs["tokens"]  # (B,) the tokens sampled last
        self.samples = inputs["samples"]  # (B,)
        self.row_keys = inputs["row_keys"]  # (B,)
        self.turn = inputs["turn"]  # (1,) calls since `load` or `go_on`
        self.carried_from = inputs["carried_from"]  # (B,) see `stage`
        self.history: Tensor | None = None  # (B, L) token ids so far, for a repetition penalty
        if self.penalised:
            self.history = inputs["history"].view(self.B, self.L)
        self.results = torch.zeros(steps, 2, self.B, dtype=torch.float64, device=model.device)
        self.before = self._describe(inputs)
        self.graph: torch.cuda.CUDAGraph | None = None
        self.angles: Tensor | None = None  # kept alive: the graph reads the model's rotary table
        self.staged: list[tuple[RunningSequence, int]] = []  # with the pages that each had then

    def _make_buffer(self) -> FlatBuffer:
        """The step's inputs: int64, but for `context_lens`, which is int32."""
        B = self.B
        sizes = {
            "tokens": B,
            "positions": B,
            "samples": B,
            "row_keys": B,
            "write_page": B,
            "write_offset": B,
            "block_table": B * self.P,
            "history": B * self.L if self.penalised else 0,
            "turn": 1,
            "carried_from": B,
            "context_lens": cdiv(B, 2),  # two int32 in the place of one int64
        }
        buffer = FlatBuffer(sizes, self.model.device)
        for tensors in (*buffer.on_host, buffer.on_device):
            as_int32 = tensors["context_lens"].view(torch.int32)
            tensors["context_lens"] = as_int32[:B]
        return buffer

    def _describe(self, inputs: dict[str, Tensor]) -> Cached:
        """The forward before the first one: a step begins by advancing it by one token.

        Its host lists state the most that the bucket holds, its device tensors are the inputs.
        """
        B = self.B
        device = self.model.device
        longest = min(self.L, self.model.config.max_position)
        return Cached(
            query_lens=(1,) * B,
            context_lens=(longest - 2,) * B,
            tables=((),) * B,
            page_size=self.config.page_size,
            decode=True,
            positions=inputs["positions"],
            write_page=inputs["write_page"],
            write_offset=inputs["write_offset"],
            last=torch.arange(B, device=device),
            block_table=inputs["block_table"].view(B, self.P),
            cu_queries=torch.arange(B + 1, dtype=torch.int32, device=device),
            contexts=inputs["context_lens"],
        )

    def holds(self, seqs: Sequence[RunningSequence]) -> bool:
        """Whether these sequences were staged last, in this order and with the pages they have."""
        if len(seqs) != len(self.staged):
            return False
        for seq, (staged, pages) in zip(seqs, self.staged, strict=True):
            if seq is not staged or len(seq.block_table) != pages:
                return False
        return True

    def stage(
        self, seqs: Sequence[RunningSequence], carried_from: Sequence[int | None] = ()
    ) -> int:
        """Prepare the inputs for these sequences on the host; returns the side for `load`.

        carried_from: for every sequence the place of its last token in the tensor that `load` gets,
        None where the host knows that token; () if it knows all. The other slots are empty.
        Their pages must hold every token up to the next `load`. The side that was staged before the
        last one must have been loaded.
        """
        self.staged = [(seq, len(seq.block_table)) for seq in seqs]
        empty_slots = self.B - len(seqs)
        zeros = [0] * empty_slots
        places = list(carried_from) or [None] * len(seqs)
        last_tokens = []
        for seq, place in zip(seqs, places, strict=True):
            last_tokens.append(seq.token_ids[-1] if place is None else 0)
        samples = [seq.request.sample for seq in seqs]
        row_keys = [seq.key for seq in seqs]
        # one less than in the cache, since a step begins by moving on by one
        before = [seq.context_len - 1 for seq in seqs] + [-1] * empty_slots
        known = [-1 if place is None else place for place in places] + [-1] * empty_slots
        fill = self.buffer.fill
        fill("tokens", last_tokens + zeros)
        fill("positions", before)
        fill("context_lens", before)
        fill("samples", samples + zeros)
        fill("row_keys", row_keys + zeros)
        fill("carried_from", known)
        fill("block_table", self._padded_block_tables(seqs))
        if self.penalised:
            fill("history", self._padded_histories(seqs))
        return self.buffer.turn_over()

    def load(self, side: int, last_tokens: Tensor | None, before: DecodeStep | None) -> None:
        """Put the staged sequences in, in one copy that is not waited for.

        last_tokens: (n,) of the sequences in flight, where `stage` found them; None for none
        before: the step whose first slots' tokens those begin with, if there is one; it may be this
        one, so what it holds is copied before it is overwritten
        """
        history = None
        if self.penalised and before is not None:
            history = before.history.clone()  # (slots of `before`, its L)
        self.buffer.upload(side)  # "turn" is 0 again, as it always is on the host
        if last_tokens is not None:
            is_carried = self.carried_from >= 0  # (B,)
            carried = last_tokens[self.carried_from.clamp(min=0)]  # (B,)
            self.tokens.copy_(torch.where(is_carried, carried, self.tokens))
        if history is not None:
            self._carry_histories(history)

    def _carry_histories(self, before: Tensor) -> None:
        """Take the tokens so far of sequences in flight from the step that they were in.

        before: (slots, its L). The host's history of them ends where the flight began.
        """
        slots, its_L = before.shape
        is_carried = (self.carried_from >= 0) & (self.carried_from < slots)  # (B,)
        rows = before[self.carried_from.clamp(min=0, max=slots - 1)]  # (B, its L)
        common = min(self.L, its_L)  # what is behind it is padding in both
        own = self.history[:, :common]
        own.copy_(torch.where(is_carried[:, None], rows[:, :common], own))

    def go_on(self) -> None:
        """In the place of `load`, if the sequences stay as they are: results begin anew."""
        self.turn.zero_()

    def _padded_block_tables(self, seqs: Sequence[RunningSequence]) -> list[int]:
        """B block tables of P pages one behind the other, padded with the padding page."""
        padding_page = self.pool.padding_pages[0]
        values: list[int] = []
        for seq in seqs:
            pages = seq.block_table[: self.P]
            padding = [padding_page] * (self.P - len(pages))
            values += pages + padding
        empty_slots = self.B - len(seqs)
        values += [padding_page] * (self.P * empty_slots)
        return values

    def _padded_histories(self, seqs: Sequence[RunningSequence]) -> list[int]:
        """B histories of L token ids one behind the other, padded with -1."""
        values: list[int] = []
        for seq in seqs:
            values += seq.prompt
            values += seq.token_ids
            values += [-1] * (self.L - len(seq.prompt) - len(seq.token_ids))
        empty_slots = self.B - len(seqs)
        values += [-1] * (self.L * empty_slots)
        return values

    def replay(self) -> None:
        """The step: the captured one, or if there is none the step itself."""
        if self.graph is None:
            self()
        else:
            self.graph.replay()

    def __call__(self) -> None:
        """The step itself: nothing in here is read on the host or copied from it."""
        cached = self.before.advance()
        if self.history is not None:
            self.history.scatter_(1, cached.positions[:, None], self.tokens[:, None])
        hidden = self.model.forward(
            self.tokens, cached, lora=self.lora, cache=self.pool.cache
        )  # (B, D)
        rows = self.config.sample_rows(
            cached.positions + 1, self.samples, self.row_keys, self.temperature, self.history
        )
        logits = self.model.head(hidden)  # (B, V)
        tokens, logprobs = self.model.ops.sample(logits, rows)  # (B,) both
        sampled = torch.stack((tokens.double(), logprobs.double()))  # (2, B)
        self.results.index_copy_(0, self.turn, sampled[None])
        self.tokens.copy_(tokens)
        self.turn.add_(1)
