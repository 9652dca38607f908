"""The quantised matrices of a GGUF stay quantised for sampling on a CPU: same texts, less memory.

`plain` in a name is the same import without `model.gguf_blocks`: how it was sampled without them.
"""

from __future__ import annotations

import ctypes
import dataclasses
import shutil

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from engine.jobs.generate import generate_job
from engine.jobs.gguf_import import import_gguf
from engine.runtime.run_record import model_fingerprint
from engine.sampling.requests import SamplerConfig
from engine.sampling.sampler import Sampler
from engine.session import ModelConfig, Session
from kernels.cpu import native
from kernels.cpu.native import Loaded, Loader
from kernels.cpu.panels import Panels
from kernels.cpu.quantised_panels import QuantisedPanels
from kernels.registry import NATIVE, TORCH
from model.layout import GROUPS
from model.llama import Llama
from model.merge import merge
from model.peft_format import load_lora, save_lora
from model.quantised_file import FILE
from model.sampling_weights import for_sampling, restore_weights
from tests.helpers.adapters import new_lora
from tests.helpers.llama_dirs import write_llama
from tests.helpers.sampling import SAMPLED, random_requests, text

gguf = pytest.importorskip("gguf", reason="needs the package gguf (extra `demo`)")
pytest.importorskip("tokenizers", reason="needs the package tokenizers (extra `bpe`)")

from tests.helpers.gguf_files import gguf_name, random_blocks, vocabulary, write_gguf  # noqa: E402

pytestmark = pytest.mark.skipif(
    native.why_unavailable() is not None, reason="no native kernels here"
)
# as llama.cpp's Q4_K_M mixes them; a matrix whose members differ is in the larger form
MIXED = {"v_proj": "Q6_K", "down_proj": "Q6_K", "embed_tokens": "Q4_0", "lm_head": "Q6_K"}
MIXED_BITS = {"qkv": 12, "o": 6, "gate_up": 6, "down": 10, "embed": 5, "head": 10}


def small_blocks(name, rows, columns, seed):
    """Blocks of random codes whose numbers are of the size of a weight."""
    kind = gguf.GGMLQuantizationType[name]
    blocks = random_blocks(kind, rows, columns, seed)
    scale = np.frombuffer(np.float16(0.001).tobytes(), dtype=np.uint8)
    numbers, size = gguf.GGML_QUANT_SIZES[kind]
    by_block = blocks.reshape(-1, size)
    if name == "Q6_K":
        by_block[:, -2:] = scale
        by_block[:, -18:-2] = by_block[:, -18:-2] & 0x83  # factors -128 ... -125 and 0 ... 3
    elif name == "Q4_K":
        by_block[:, 0:2] = scale
        by_block[:, 2:4] = scale
    else:
        by_block[:, 0:2] = scale * 1
    return blocks, kind


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """An import of a model in Q4_K, Q6_K and Q4_0."""
    folder = tmp_path_factory.mktemp("mixed")
    (folder / "model").mkdir()
    model = write_llama(
        folder / "model", vocab=len(vocabulary()), layers=2, hidden=256, intermediate=256,
        head_dim=64, kv_heads=2, tied=False,
    )  # fmt: skip
    blocks = {}
    for seed, (name, weight) in enumerate(load_file(model / "model.safetensors").items()):
        if weight.ndim == 2:
            kind = MIXED.get(name.split(".")[-2], "Q4_K")
            blocks[gguf_name(name)] = small_blocks(kind, *weight.shape, seed)
    write_gguf(folder / "m.gguf", model, blocks=blocks)
    import_gguf(folder / "m.gguf", folder / "out")
    return folder / "out"


@pytest.fixture
def plain_copy(imported, tmp_path):
    """The import without its blocks."""
    shutil.copytree(imported, tmp_path / "plain")
    (tmp_path / "plain" / FILE).unlink()
    return tmp_path / "plain"


def loaded(path, **settings):
    return Llama.from_pretrained(path, dtype=torch.float32, **settings)


def written(model, lora=None, **config):
    """(id, sample) -> tokens and log-probabilities."""
    with Sampler(model, text, (7,), SamplerConfig(**SAMPLED, **config), lora) as sampler:
        requests = random_requests(model, 5, longest=40)
        short = [dataclasses.replace(r, max_new_tokens=min(9, r.max_new_tokens)) for r in requests]
        completions = list(sampler.run(short))
    return {(c.id, c.sample): (c.ids, c.logprobs) for c in completions}


def same(weights, others):
    """Whether both are plain tensors of the same names and the same bits."""
    if weights.keys() != others.keys():
        return False
    for name, weight in weights.items():
        if not isinstance(weight, torch.Tensor):
            return False
        if not torch.equal(weight.view(torch.int32), others[name].view(torch.int32)):
            return False
    return True


def adapter(model, modules="qv"):
    lora = new_lora(model, rank=4, alpha=8, modules=modules, seed=3)
    with torch.no_grad():
        lora.params.add_(0.1 * torch.randn(lora.params.shape))
    model.bind(lora)
    return lora


def test_every_matrix_stays_quantised_for_sampling_and_comes_back_bit_for_bit(imported, plain_copy):
    model, plain = loaded(imported), loaded(plain_copy)
    assert same(model.weights, plain.weights)
    sampling, _ = for_sampling(model, release=True)
    for name, weight in sampling.weights.items():
        kind = name.rpartition(".")[2]
        if kind in MIXED_BITS:
            assert isinstance(weight, QuantisedPanels) and weight.bits == MIXED_BITS[kind], name
            assert model.weights[name] is weight, "held once"
    restore_weights(model)
    assert same(model.weights, plain.weights)


@pytest.mark.parametrize("rows", [1, 5])
def test_texts_are_those_of_the_fp32_import(imported, plain_copy, rows):
    """Tokens and log-probabilities, bit for bit; of the model loaded packed too."""
    want = written(loaded(plain_copy), rows=2)
    assert any(ids for ids, _ in want.values())
    assert written(loaded(imported), rows=rows) == want
    assert written(loaded(imported, ops=NATIVE), rows=rows) == want
    assert written(loaded(imported, packed=True), rows=rows) == want


def test_tied_embeddings_and_every_format_that_gguf_writes(tmp_path, tiny_llama_dir):
    """Q8_0 as the head and the embedding in one; rows of q and k in their order."""
    for kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        path = tiny_llama_dir(vocab=len(vocabulary()), head_dim=32, kv_heads=2, tied=True)
        write_gguf(tmp_path / f"{kind}.gguf", path, kind=kind)
        out = tmp_path / kind
        import_gguf(tmp_path / f"{kind}.gguf", out)
        model = loaded(out)
        sampling, _ = for_sampling(model)
        names = [name for name in model.weights if name.rpartition(".")[2] in (*GROUPS, "head")]
        assert all(isinstance(sampling.weights[name], QuantisedPanels) for name in names)
        assert sampling.weights["embed"] is sampling.weights["head"]
        quantised = written(model)
        (out / FILE).unlink()
        assert written(model) == written(loaded(out)) == quantised, "also once the file is gone"


@pytest.mark.parametrize("packed", [False, True])
def test_a_matrix_with_an_adapter_is_merged_in_fp32_and_the_others_stay_quantised(
    imported, plain_copy, packed
):
    plain = loaded(plain_copy)
    lora = adapter(plain)
    want = written(plain, lora)
    model = loaded(imported, packed=packed)
    model.bind(lora)
    sampling, left = for_sampling(model, lora)
    assert left is None
    for name in (name for name in model.weights if name.rpartition(".")[2] in GROUPS):
        is_quantised = isinstance(sampling.weights[name], QuantisedPanels)
        assert is_quantised == (not name.endswith("qkv")), name
    assert sampling.weights["0.qkv"].bytes == 4
    assert written(model, lora) == want
    assert written(model, lora.scaled(0)) == written(plain) != want
    assert model.weights.stays_packed == packed


def test_a_model_loaded_packed_holds_no_matrix_in_fp32(imported, plain_copy):
    """During sampling and after it; of another checkpoint it holds 2 to 4 bytes a number."""
    for path, kind in ((imported, QuantisedPanels), (plain_copy, Panels)):
        model = loaded(path, packed=True)
        for _ in range(2):
            matrices = [w for w in model.weights.values() if isinstance(w, Panels)]
            assert len(matrices) == 2 * 4 + 2 and {type(w) for w in matrices} == {kind}
            others = [w for w in model.weights.values() if not isinstance(w, Panels)]
            assert all(w.dim() == 1 for w in others), "norms"
            written(model)
    fp32 = sum(weight.nbytes for weight in loaded(imported).weights.values())
    packed = loaded(imported, packed=True).weights.nbytes
    assert packed < 0.32 * fp32, "5 to 12 bits in place of 32"
    assert loaded(imported, packed=True, ops=TORCH).weights.stays_packed is False


def test_generate_loads_packed_and_answers_the_same(imported, plain_copy, tmp_path, capsys):
    answers = []
    for path, packed in ((imported, True), (plain_copy, False)):
        session = Session.open(ModelConfig(str(path), chat_format="alpaca"), packed=packed)
        assert session.model.weights.stays_packed == packed
        assert ("GB packed" in capsys.readouterr().out) == packed
        config = SamplerConfig(max_new_tokens=12, temperature=0.9)
        answers.append(generate_job(session, "the hand", config, samples=3))
    assert answers[0] == answers[1] and len(answers[0]) == 3


def test_blocks_of_other_numbers_are_not_used(imported, plain_copy, tmp_path, capsys):
    """As beside weights that were changed after the import: said, and those weights count."""
    changed = tmp_path / "changed"
    shutil.copytree(imported, changed)
    tensors = load_file(changed / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = tensors[name].copy()
    tensors[name][-1, -1] = np.nextafter(tensors[name][-1, -1], np.float32(9))
    save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    sampling, _ = for_sampling(loaded(changed))
    said = capsys.readouterr().out
    assert f"{changed / FILE} holds other numbers for 1.down than the weights beside it" in said
    assert said.count("other numbers") == 1
    assert sampling.weights["1.down"].bits == 32
    assert isinstance(sampling.weights["0.down"], QuantisedPanels)
    want = torch.from_numpy(tensors[name])
    assert torch.equal(sampling.weights["1.down"].unpack(), want)


DAMAGED = {
    "cut": (None, "cannot be read as safetensors"),
    "format": ({"model.layers.0.mlp.up_proj.weight": "Q9_9"}, "has the format 'Q9_9'; expected"),
    "other format": (
        {"model.layers.0.mlp.up_proj.weight": "Q5_K"},
        r"is U8 \(256, 144\); expected U8 \(256, 176\) in Q5_K",
    ),
    "no format": ({"model.layers.0.mlp.up_proj.weight": None}, "has the format None"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_blocks_are_refused_by_name(imported, tmp_path, case):
    changes, message = DAMAGED[case]
    path = tmp_path / "damaged"
    shutil.copytree(imported, path)
    if changes is None:
        content = (path / FILE).read_bytes()
        (path / FILE).write_bytes(content[:-9])
    else:
        from safetensors import safe_open

        with safe_open(path / FILE, "np") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
            metadata = opened.metadata() | changes
        metadata = {name: kind for name, kind in metadata.items() if kind is not None}
        save_file(tensors, path / FILE, metadata=metadata)
    with pytest.raises(ValueError, match=message) as refused:
        loaded(path)
    assert FILE in str(refused.value)


class WrongProducts:
    """The C library, with an error in every product with a weight quantised in one form."""

    def __init__(self, library, form):
        self.library = library
        self.form = form
        self._name = "wrong"

    def __getattr__(self, name):
        return getattr(self.library, name)

    def linear(self, x, w, bias, y, form, T, K, N):
        self.library.linear(x, w, bias, y, form, T, K, N)
        if form == self.form and T > 5:
            ctypes.c_float.from_address(y).value += 1


def test_a_form_whose_products_are_wrong_here_is_not_used(imported, capsys):
    """Of one form, in tiles that a step of one row does not reach: found before it is used."""
    form = 32 * 16 + 4 + 1  # Q4_K's
    library = WrongProducts(native.library(), form)
    with native.loading_by(Loader(loaded=Loaded(library))):
        sampling, _ = for_sampling(loaded(imported, ops=NATIVE))
    assert "products with the quantised 0.o are wrong here" in capsys.readouterr().out
    assert sampling.weights["0.o"].bits == sampling.weights["1.gate_up"].bits == 32
    assert isinstance(sampling.weights["0.down"], QuantisedPanels)


def test_without_c_kernels_an_import_is_sampled_as_ever(imported, plain_copy):
    texts = []
    with native.loading_by(Loader(loaded=Loaded(reason="no compiler"))):
        for path in (imported, plain_copy):
            model = loaded(path, packed=True)
            assert model.ops is TORCH and not model.weights.stays_packed
            texts.append(written(model))
    assert texts[0] == texts[1]


def test_the_blocks_change_no_fingerprint_and_are_not_copied_into_a_merged_model(
    imported, plain_copy, tmp_path
):
    assert model_fingerprint(imported) == model_fingerprint(plain_copy)
    lora = adapter(loaded(imported))
    save_lora(lora, tmp_path / "adapter")
    left_out = merge(imported, load_lora(tmp_path / "adapter"), tmp_path / "merged")
    assert not (tmp_path / "merged" / FILE).exists()
    assert any(FILE in line for line in left_out)


def test_a_gguf_without_quantised_matrices_has_no_blocks(tmp_path, tiny_llama_dir):
    write_gguf(tmp_path / "m.gguf", tiny_llama_dir(vocab=len(vocabulary())), kind="F16")
    import_gguf(tmp_path / "m.gguf", tmp_path / "out")
    assert not (tmp_path / "out" / FILE).exists()
