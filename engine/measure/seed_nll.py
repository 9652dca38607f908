"""Likelihoods of training examples under the seed model, token by token, computed once and kept

    DIRECTORY/seed-nll-<hash>.jsonl        a line per example: {"id", "nll"}, nats of each response
                                           token, the end token included
    DIRECTORY/seed-nll-<hash>.jsonl.meta.json    of which model and examples

The hash is that of the model, its dtype and the examples, so runs over the same examples share a
file and others lie beside it. Lines are appended as they are computed and are never computed again;
under torchrun every process computes a part (runtime/resumable.py).

The forward is that of training (packed rows, a shared prompt prefix where the operations support
it) without an adapter, in micro-batches that depend on the examples alone. So a number does not
depend on kills or on the number of processes, and differs from what a training step finds before
its first update by rounding only.
"""

# N = response tokens of a micro-batch

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from engine.data.disk_tables import SeenIds
from engine.data.encode import Example, fingerprint, names, sizes
from engine.data.pack import MicroBatch, pack
from engine.data.rows import FirstFaults
from engine.measure.likelihood import BATCH_TOKENS, collective_rounds
from engine.runtime.distributed import World
from engine.runtime.files import sha256
from engine.runtime.locking import lock_file
from engine.runtime.process_memory import memory_for
from engine.runtime.resumable import Line
from engine.runtime.short_memory import attempt, tried_twice
from engine.runtime.stored_lines import ResumedOnDisk
from engine.runtime.terminal import progress
from kernels.dtypes import accumulate_dtype
from model.llama import Llama

FIELDS = {"nll": list}  # of a line, beside the id


@memory_for("computing the seed's likelihoods", "lower --max-length, or leave long rows out")
def nll_under_seed(
    model: Llama,
    examples: Sequence[Example],
    directory: Path,
    model_hash: str,
    world: World | None = None,
) -> dict[str, Tensor]:
    """Example id -> nll (its response tokens,) in nats under the model without an adapter.

    Read from the file in `directory`; what is missing there is computed and appended. The tensors
    are on the CPU, in the accumulation dtype of the model. model_hash: of the model's files.
    ValueError for ids that are not different, and for a file that is not what was written.
    """
    _check_ids(examples)
    settings = {
        "model": model_hash,
        "dtype": str(model.dtype),
        "examples": fingerprint(examples),
    }
    out = directory / f"seed-nll-{sha256(repr(settings))[:12]}.jsonl"
    dtype = accumulate_dtype(model.dtype)
    found = {}
    with lock_file(out), ResumedOnDisk(out, settings, wanted=FIELDS, world=world) as file:
        _compute_missing(model, examples, file)
        file.put_in_order(Names(examples))
        for example in examples:
            line = file.done[example.id]
            _check_line(example, line, out)
            found[example.id] = torch.tensor(line["nll"], dtype=dtype)
    return found


class Names:
    """The ids of examples; may be iterated several times."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __iter__(self) -> Iterator[str]:
        return names(self.examples)


def _compute_missing(model: Llama, examples: Sequence[Example], file: ResumedOnDisk) -> None:
    """Compute and write the lines that the file lacks.

    A micro-batch of which a line is missing is computed as a whole, so that its numbers are those
    of the first time.
    """
    lengths = [size.tokens for size in sizes(examples)]
    missing: list[list[int]] = []  # indices of the examples of each micro-batch
    for indices in pack(lengths, BATCH_TOKENS[model.device.type]):
        if any(examples[i].id not in file.done for i in indices):
            missing.append(indices)
    own = file.mine(missing)
    rounds = collective_rounds(model, file.world, len(own))
    is_quiet = not file.world.is_rank0 or not rounds
    with (
        file.world.report_lost_rank(),
        progress(total=len(own), desc="seed likelihoods", unit="batch", disable=is_quiet) as bar,
    ):
        for indices in own:
            batch_examples = [examples[i] for i in indices]
            of_batch = _nll_on_short_memory(model, batch_examples)
            for example, nll in zip(batch_examples, of_batch, strict=True):
                if example.id not in file.done:
                    file.write({"id": example.id, "nll": nll})
            bar.update()
        for _ in range(rounds - len(own)):  # this rank joins the collectives of the others
            _nll_of(model, [])


def _nll_on_short_memory(model: Llama, examples: Sequence[Example]) -> list[list[float]]:
    """`_nll_of` some examples, in halves where memory is short for all of them.

    The numbers are then the same within rounding. torch.OutOfMemoryError where one example does not
    fit alone, and under sharded weights, whose forwards are those of all ranks together.
    """
    if model.is_sharded:
        return _nll_of(model, examples)
    if len(examples) <= 1:
        return tried_twice("seed likelihoods", model.device, _nll_of, model, examples)
    found, failure = attempt(model.device, _nll_of, model, examples)
    if failure is None:
        return found
    middle = len(examples) // 2
    print(
        f"\nseed likelihoods: out of memory with {len(examples)} examples at once ({failure}); "
        f"continuing with {middle}"
    )
    first_half = _nll_on_short_memory(model, examples[:middle])
    return first_half + _nll_on_short_memory(model, examples[middle:])


def _nll_of(model: Llama, examples: Sequence[Example]) -> list[list[float]]:
    """The nll of the response tokens of each example, by one packed forward.

    Without examples a forward of one dummy token, and [].
    """
    if examples:
        share_prefix = model.device.type in model.ops.shares_prefix
        batch = MicroBatch.build(examples, 0, model.device, share_prefix)
    else:
        batch = MicroBatch.idle(0, model.device)
    hidden = model.forward(batch.tokens, batch.packed)  # (T, D)
    nll, _ = model.nll(hidden[batch.select], batch.targets, need_grad=False)  # (N,)
    counts = [len(example.ids) - example.n_prompt for example in examples]
    return [part.tolist() for part in nll.split(counts)] if counts else []


def _check_ids(examples: Sequence[Example]) -> None:
    """ValueError where two examples have one id."""
    repeated = FirstFaults()
    with contextlib.closing(SeenIds()) as seen:
        for name in names(examples):
            if seen.copies_of(name) > 1:
                repeated.add(name)
    if repeated.count:
        fault = f"{repeated.count} examples have the id of another"
        way_out = "a loss that compares with the seed needs ids that differ: rename them"
        raise ValueError(repeated.listing(fault, way_out))


def _check_line(example: Example, line: Line, out: Path) -> None:
    """ValueError where a line does not hold one finite number per response token."""
    count = len(example.ids) - example.n_prompt
    numbers = [value for value in line["nll"] if type(value) is float]
    is_right = len(line["nll"]) == len(numbers) == count
    if not is_right or not torch.tensor(numbers).isfinite().all():
        raise ValueError(
            f"{out}: the line of {example.id} does not hold {count} finite numbers; delete the "
            "file, and the same command writes it anew"
        )
