"""Rows are computed together only where that changes no bit, which is tried on this machine"""

import dataclasses

import pytest
import torch

from engine.measure import packed_rows
from engine.measure.packed_rows import AnsweredRow, groups, states_of
from engine.measure.row_invariance import rows_keep_their_bits
from model.llama import Llama
from tests.helpers.adapters import new_lora

LENGTHS = (40, 9, 100, 8, 17, 128, 300, 30, 5, 60, 12)
BEGINNING = 6  # tokens that all rows begin with


@pytest.fixture
def model(tiny_llama_dir):
    return Llama.from_pretrained(tiny_llama_dir())


@pytest.fixture
def adapter(model):
    lora = new_lora(model, modules="all")
    lora.params.add_(0.1)
    return lora


@pytest.fixture
def rows(model):
    random = torch.Generator().manual_seed(1)
    made = []
    for length in LENGTHS:
        ids = torch.randint(model.config.vocab_size, (length,), generator=random).tolist()
        ids[:BEGINNING] = range(1, BEGINNING + 1)
        made.append(AnsweredRow(ids=ids[:length], n_prompt=max(1, min(length - 1, 20))))
    return made


def replace_op(model, name, operation):
    model.ops = dataclasses.replace(model.ops, **{name: operation})


def test_states_of_a_group_are_those_of_each_row_alone(model, adapter, rows):
    """True of any machine: where the products round by the number of rows, none stand together."""
    for lora in (None, adapter):
        of_all = []
        for group in groups(rows, model, [lora]):
            of_all += states_of(model, group, lora)
        assert len(of_all) == len(rows)
        for row, states in zip(rows, of_all, strict=True):
            (alone,) = states_of(model, [row], lora)
            assert torch.equal(states, alone) and len(states) == len(row.ids) - row.n_prompt


def test_groups_are_neighbours_of_limited_size(model, rows, monkeypatch):
    monkeypatch.setattr(packed_rows, "rows_keep_their_bits", lambda model, loras: True)
    together = [[len(row.ids) for row in group] for group in groups(rows, model, [None])]
    assert together == [[40, 9, 100, 8, 17, 128], [300, 30], [5], [60, 12]]
    rows = [AnsweredRow(ids=[0] * length, n_prompt=1) for length in (200, 312, 10, 600, 9)]
    assert [len(group) for group in groups(rows, model, [None])] == [2, 1, 1, 1]
    assert list(groups([], model, [None])) == []
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert [len(group) for group in groups(rows, model, [None])] == [1] * 5


def depends_on_rows(operation, place):
    """The operation with a result that is another one where many rows stand together."""

    def changed(*args):
        result, rest = operation(*args)
        if len(result) > 100:
            result = result * (1 + torch.finfo(result.dtype).eps * place)
        return result, rest

    return changed


@pytest.mark.parametrize("name", ["lora_linear_forward", "attention_forward"])
def test_products_that_round_by_the_number_of_rows_are_found(model, adapter, rows, name):
    operation = getattr(model.ops, name)
    replace_op(model, name, depends_on_rows(operation, 4))
    assert not rows_keep_their_bits(model, [None, adapter])
    assert [len(group) for group in groups(rows, model, [None])] == [1] * len(rows)
    replace_op(model, name, depends_on_rows(operation, 0))
    wanted = rows_keep_their_bits(model, [None])
    replace_op(model, name, operation)
    assert rows_keep_their_bits(model, [None]) == wanted


def test_a_product_of_an_adapter_that_rounds_by_the_number_of_rows_is_found(model, adapter):
    operation = model.ops.lora_linear_forward
    changed = depends_on_rows(operation, 4)

    def with_an_adapter(x, weight, group=None, dropout=None, bias=None):
        chosen = operation if group is None else changed
        return chosen(x, weight, group, dropout, bias)

    wanted = rows_keep_their_bits(model, [None])
    replace_op(model, "lora_linear_forward", with_an_adapter)
    assert rows_keep_their_bits(model, [None]) == wanted
    assert not rows_keep_their_bits(model, [None, adapter])
