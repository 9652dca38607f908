"""Adapters merged into the model: on disk for others to load, in memory for sampling."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.sampling.requests import Request, SamplerConfig
from engine.sampling.sampler import Sampler
from kernels.registry import TORCH
from model.llama import Llama
from model.lora import PRESETS, Lora
from model.merge import merge, rewrite_checkpoint
from model.peft_format import load_lora, save_lora
from model.sampling_weights import for_sampling
from tests.helpers import programs
from tests.helpers.adapters import TOKENS, ask_peft, distance, random_lora
from tests.helpers.shards import split

ROOT = Path(__file__).resolve().parents[2]
SMOLLM2 = ROOT / "tests" / "golden" / "smollm2.json"

# ---- on disk


@pytest.mark.peers
def test_merged_models_in_transformers(smollm2_dir, tiny_llama_dir, run_peer, tmp_path):
    """The logits of our merged model are close to the fp64 truth of base and adapter.

    In fp32 within twice the error of peft's unmerged fp32 logits; in 16 bits, where the error is
    that of rounding the weights, within twice the error of peft's own merged model.
    """
    half = tiny_llama_dir(dtype=torch.bfloat16, tied=False)
    sources = {
        "smollm2": smollm2_dir,
        "f32": tiny_llama_dir(),
        "f16": tiny_llama_dir(dtype=torch.float16),
        "bf16": half,
        "sharded-bf16": split(half, tmp_path / "half", 3),
    }
    sixteen = [name for name in sources if "16" in name]
    jobs = {"merge": {}, "logits": {}}
    with tempfile.TemporaryDirectory(dir=tmp_path) as place:  # pytest would keep the large ones
        for name, source in sources.items():
            adapter = Path(place, f"{name}-lora")
            ours = Path(place, f"{name}-ours")
            theirs = Path(place, f"{name}-theirs")
            save_lora(random_lora(Llama.from_pretrained(source), "all"), adapter)
            merge(source, load_lora(adapter), ours)
            apart = {"dir": source, "adapter": adapter, "tokens": TOKENS}
            jobs["logits"][name] = apart
            jobs["logits"][f"{name}-ours"] = {**apart, "dir": ours, "adapter": None}
            if name in sixteen:
                jobs["merge"][name] = {"dir": source, "adapter": adapter, "out": theirs}
                jobs["logits"][f"{name}-theirs"] = {**apart, "dir": theirs, "adapter": None}
        made = ask_peft(run_peer, tmp_path, **jobs)
    for name in sources:
        truth = made[f"{name}/fp64"]
        yardstick = f"{name}-theirs/fp32" if name in sixteen else f"{name}/fp32"
        error = distance(made[f"{name}-ours/fp32"], truth)
        unit = distance(made[yardstick], truth)
        print(f"{name}: merged {error:.3g} from base and adapter, {yardstick} {unit:.3g}")
        assert error <= 2 * unit


@pytest.mark.peers
def test_vllm_answers_greedily_as_we_do(tiny_llama_dir, run_peer, vllm_python, tmp_path):
    """From a merged checkpoint (Llama, Qwen3), and from an adapter beside its model (Llama)."""
    prompts = [[5, 9, 200, 31, 7], [17, 3, 88, 120, 64, 250, 11]]
    config = SamplerConfig(max_new_tokens=32, ignore_eos=True)
    ours, jobs = [], []
    for family, settings in (("llama", {}), ("qwen3", {"hidden": 96})):
        source = tiny_llama_dir(model_type=family, head_dim=32, **settings)
        model = Llama.from_pretrained(source, ops=TORCH)
        lora = random_lora(model, "all")
        save_lora(lora, tmp_path / f"{family}-lora")
        merge(source, lora, tmp_path / f"{family}-merged")
        requests = [Request(str(n), ids) for n, ids in enumerate(prompts)]
        with Sampler(model, str, [], config, lora=lora) as sampler:
            texts = {made.id: made.ids for made in sampler.run(requests)}
        places = [{"dir": str(tmp_path / f"{family}-merged")}]
        if family == "llama":
            places.append({"dir": str(source), "adapter": str(tmp_path / f"{family}-lora")})
        for place in places:
            ours.append([texts[request.id] for request in requests])
            jobs.append({**place, "prompts": prompts, "new": config.max_new_tokens})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    theirs = run_peer("vllm_peer.py", tmp_path / "jobs.json", python=vllm_python)
    assert theirs == ours


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shards", [1, 3])
def test_merged_weights_are_the_sum_rounded_once(tiny_llama_dir, tmp_path, dtype, shards):
    """W + s B A; other tensors, names and files stay as they were."""
    source = tiny_llama_dir(dtype=dtype, tied=False, tokenizer=True)
    if shards > 1:
        source = split(source, tmp_path / "shards", shards)
    lora = random_lora(Llama.from_pretrained(source), "qv", rslora=True)
    out = tmp_path / "deep" / "merged"
    merge(source, lora, out)
    adapter = {name: view.double() for name, view in lora.views(lora.params).items()}
    weights = sorted(source.glob("*.safetensors"))
    assert len(weights) == shards
    for file in weights:
        old = load_file(file)
        new = load_file(out / file.name)
        assert old.keys() == new.keys()
        for name, weight in old.items():
            stem = name.removesuffix(".weight")
            if f"{stem}.lora_A.weight" not in adapter:
                assert torch.equal(new[name], weight), name
                continue
            delta = adapter[f"{stem}.lora_B.weight"] @ adapter[f"{stem}.lora_A.weight"]
            expected = (weight.double() + 16 / 8**0.5 * delta).to(dtype)
            assert new[name].dtype == dtype and not torch.equal(new[name], weight)
            # where fp32 falls on the other side of a rounding boundary, the last bit differs
            differ = (new[name] != expected).double().mean().item()
            assert differ < (0.3 if dtype == torch.float32 else 1e-3), f"{name}: {differ:.1%}"
            torch.testing.assert_close(new[name], expected, rtol=torch.finfo(dtype).eps, atol=1e-7)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    (tmp_path / "plain").touch()
    modes = {file.stat().st_mode for file in [*out.iterdir(), tmp_path / "plain"]}
    assert len(modes) == 1, "a merged model has the file mode of other files"
    if dtype == torch.float32:
        merged = Llama.from_pretrained(out)
        apart = Llama.from_pretrained(source)
        assert distance(merged.logits(TOKENS), apart.logits(TOKENS, lora)) < 2e-5


def test_config_json_of_a_merged_model_is_corrected(tiny_llama_dir, tmp_path, capsys):
    """It stated tied embeddings beside a stored head, and quantisation of plain tensors."""
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    source = tiny_llama_dir(dtype=torch.bfloat16, quantization_config=quantised, note="kept")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
    save_file(tensors, source / "model.safetensors")
    model = Llama.from_pretrained(source)
    lora = random_lora(model, "qv")
    assert merge(source, lora, tmp_path / "merged") == []
    expected = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
    del expected["quantization_config"]
    assert json.loads((tmp_path / "merged" / "config.json").read_text()) == expected
    capsys.readouterr()
    merged = Llama.from_pretrained(tmp_path / "merged")
    assert capsys.readouterr().out == "", "the corrected model loads without messages"
    assert torch.equal(merged.weights["head"], model.weights["head"])
    assert distance(merged.logits(TOKENS), model.logits(TOKENS, lora)) < 0.1


def test_merge_copies_plain_files_and_lists_the_others(tiny_llama_dir, tmp_path):
    """Files of the directory and of the Hugging Face cache are copied."""
    cache = tmp_path / "models--some--model"
    source = cache / "snapshots" / "0123abc"
    blobs = cache / "blobs"
    source.mkdir(parents=True)
    blobs.mkdir()
    for n, file in enumerate(sorted(tiny_llama_dir(tokenizer=True).iterdir())):
        file.rename(blobs / f"{n:040x}")
        (source / file.name).symlink_to(f"../../blobs/{n:040x}")
    (source / "README.md").write_text("a card")
    (source / "inside.txt").symlink_to("README.md")
    (tmp_path / "secret").write_text("a key")
    (source / "outside.txt").symlink_to(tmp_path / "secret")
    (source / "up.txt").symlink_to("../../../secret")
    (source / "broken.txt").symlink_to("nothing")
    (source / "folder").mkdir()
    os.mkfifo(source / "pipe")
    (source / "pytorch_model.bin").write_bytes(b"")
    (source / "model.safetensors.index.json").write_text("{}")  # model.safetensors is read alone
    lora = random_lora(Llama.from_pretrained(source), "qv")
    left_out = merge(source, lora, tmp_path / "merged")
    assert [line.split(" ")[0] for line in left_out] == [
        "broken.txt",
        "folder",
        "model.safetensors.index.json",
        "outside.txt",
        "pipe",
        "pytorch_model.bin",
        "up.txt",
    ]
    assert str(tmp_path / "secret") in left_out[3] and "a directory" in left_out[1]
    found = {file.name for file in (tmp_path / "merged").iterdir()}
    others = {"tokenizer.json", "tokenizer_config.json", "README.md", "inside.txt"}
    assert found == {"config.json", "model.safetensors", "merge.json", *others}
    assert not any(file.is_symlink() for file in (tmp_path / "merged").iterdir())


def test_merge_of_nan_is_refused(tiny_llama_dir, tmp_path):
    """Also in weights that have no adapter."""
    source = tiny_llama_dir()
    lora = random_lora(Llama.from_pretrained(source), "qv")
    tensors = load_file(source / "model.safetensors")
    for name in ("model.norm.weight", "model.layers.1.self_attn.q_proj.weight"):
        broken = {**tensors, name: tensors[name].clone()}
        broken[name].view(-1)[7] = torch.nan
        save_file(broken, source / "model.safetensors")
        with pytest.raises(ValueError, match=f"{name} holds 1 numbers that are NaN"):
            merge(source, lora, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_merge_that_overflows_is_refused(tiny_llama_dir, tmp_path):
    source = tiny_llama_dir(dtype=torch.float16)
    lora = random_lora(Llama.from_pretrained(source), "qv")
    lora.params.mul_(1e4)
    with pytest.raises(ValueError, match="q_proj.weight merged is not finite in torch.float16"):
        merge(source, lora, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from model.merge import rewrite_checkpoint

left = int(sys.argv[3])
def change(name, tensor):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return tensor

rewrite_checkpoint(Path(sys.argv[1]), Path(sys.argv[2]), change)
"""


def test_killed_merge_leaves_nothing_under_the_name(tiny_llama_dir, tmp_path):
    """At several moments, shards written already included; the next run is not disturbed."""
    source = split(tiny_llama_dir(), tmp_path / "source", 3)
    out = tmp_path / "out"
    tensors = sum(len(load_file(file)) for file in source.glob("*.safetensors"))
    for moment in (0, tensors // 2, tensors - 1):
        command = [sys.executable, "-c", KILLED, str(source), str(out), str(moment)]
        assert programs.run(command, cwd=ROOT).returncode == -9
        assert not out.exists()
    rewrite_checkpoint(source, out, lambda name, tensor: tensor)
    expected = Llama.from_pretrained(source).logits(TOKENS)
    assert torch.equal(Llama.from_pretrained(out).logits(TOKENS), expected)


def test_the_merge_script_merges_once_and_refuses_the_rest(tiny_llama_dir, tmp_path):
    source = tiny_llama_dir()
    out = tmp_path / "merged"
    model = Llama.from_pretrained(source)
    lora = random_lora(model, "all")
    save_lora(lora, tmp_path / "adapter")

    def run(model_dir):
        paths = ["--model", model_dir, "--adapter", tmp_path / "adapter", "--out", out]
        command = [sys.executable, ROOT / "scripts" / "merge.py", *paths]
        return programs.run(command, cwd=tmp_path)

    refused = run(tmp_path / "nowhere")
    assert refused.returncode == 2 and refused.stderr.startswith("error: ")
    assert "nowhere/config.json is missing" in refused.stderr and not out.exists()
    done = run(source)
    assert done.returncode == 0 and "q_proj, k_proj, v_proj, o_proj" in done.stdout, done.stderr
    assert distance(Llama.from_pretrained(out).logits(TOKENS), model.logits(TOKENS, lora)) < 2e-5
    before = (out / "model.safetensors").stat()
    assert "not copied" not in done.stdout
    refused = run(source)
    assert refused.returncode == 2 and f"{out} exists already" in refused.stderr
    assert (out / "model.safetensors").stat() == before


# ---- in memory, for sampling


def assert_merges_for_sampling(path, modules, tokens):
    """No further from the fp64 truth than twice the unmerged logits; the base stays as it is."""
    model = Llama.from_pretrained(path)
    exact = Llama.from_pretrained(path, dtype=torch.float64)
    lora = random_lora(model, modules)
    again = Lora(lora.config, {name: slot.shape for name, slot in lora.slots.items()})
    again.params.copy_(lora.params)
    truth = exact.logits(tokens, again)
    before = {name: weight.clone() for name, weight in model.weights.items()}
    sampling, left = for_sampling(model, lora)
    assert left is None, "on a CPU in fp32 the adapter is merged"
    merged = sampling.logits(tokens)
    error = distance(merged, truth)
    unit = distance(model.logits(tokens, lora), truth)
    print(f"merged for sampling: error {error:.3g}, unmerged {unit:.3g}")
    assert error <= 2 * unit
    assert distance(merged, model.logits(tokens)) > 1e-2, "the adapter did nothing"
    for name, weight in model.weights.items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize("modules", [*PRESETS, "k_proj,down_proj"])
def test_logits_of_an_adapter_merged_for_sampling(tiny_llama_dir, modules):
    assert_merges_for_sampling(tiny_llama_dir(tied=False), modules, TOKENS)


def test_smollm2_logits_of_an_adapter_merged_for_sampling(smollm2_dir):
    tokens = json.loads(SMOLLM2.read_text())["tokens"][:48]
    assert_merges_for_sampling(smollm2_dir, "all", tokens)
