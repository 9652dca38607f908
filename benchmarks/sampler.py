"""The sampler beside transformers' `generate` and llama.cpp: same rows, prompts and stopping.

    python -m benchmarks.sampler --model MODEL_DIR --data ../shared/data/alpaca_train.json
    python -m benchmarks.sampler ... --limit 64 --rows 32,1 --batches 8,16,32,1 --draft off,auto \
        --repeats 3 --score --peer-malloc --peer-python PATH --gguf FILE --llama-python PATH

A CPU benchmark, fp32 (llama.cpp: what the GGUF file holds). Prompts are the template in the model's
chat format, each row's reference in it; a row ends with an end token or after --max-new tokens;
greedy. Every run of every engine is a process of its own with the same number of threads, and the
engines take turns. Seconds are those of generation, detokenising included on our side only; loading
and packing the weights are timed apart. Useful tokens are the new ones up to and including the end
token. Peak RSS is the process's VmHWM, loading included.

Ours must write the same tokens at every setting, or the benchmark fails. transformers computes
in another order and llama.cpp with other weights: the first token at which a row differs from ours
is reported. "share" is the arithmetic floor (benchmarks/floor.py has the formula), from ceilings
measured before and after the runs, over our seconds.

Our processes set glibc's malloc as all scripts do (engine/runtime/process_memory.py); --peer-malloc
adds runs of transformers that keep it from giving pages back (processes.MALLOC). llama.cpp runs
where --gguf is given or the demo model's file is installed, and `llama_cpp` is importable by
--llama-python.

Other processes falsify times: with more than processes.BUSY cores taken by others, before the start
or in any run, it stops and prints none (--busy prints them all the same, with a warning).
The last line is JSON, appended to benchmarks/results/sampler.jsonl if all runs were undisturbed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.clock import machine, record
from benchmarks.floor import generation_floor, scoring_floor
from benchmarks.processes import BUSY, MALLOC, Job, OutOfMemory, Quiet, run
from engine.data.config import DataConfig
from engine.distill.rewrite_prompts import TEMPLATES, prompt
from engine.jobs.gguf_import import demo_gguf
from engine.runtime.terminal import table
from model.chat import Chat
from model.config import LlamaConfig
from model.tokenizer import load_tokenizer

PEERS = Path(__file__).resolve().parent / "peers"


def parse_args() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(n) for n in text.split(",") if n]

    def interpreter(text: str) -> str:  # peers run in another directory
        return os.path.abspath(shutil.which(text) or text)

    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="model directory")
    add("--data", required=True, help="rows")
    add("--limit", type=int, default=64, help="rows used")
    add("--max-new", type=int, default=128, help="new tokens per row")
    add("--template", default="using", choices=sorted(TEMPLATES), help="how references are shown")
    add("--rows", type=numbers, default="32,1", help="sequences decoded together to try, ours")
    add("--draft", default="off,auto", help="draft settings to try, ours")
    add(
        "--batches",
        type=numbers,
        default="8,16,32,1",
        help="batch sizes, transformers; '' for none",
    )
    add("--sequences", type=numbers, default="1,8", help="sequences, llama.cpp; '' for none")
    add("--repeats", type=int, default=1, help="runs of each; medians are printed")
    add(
        "--peer-python",
        type=interpreter,
        default=sys.executable,
        help="interpreter with transformers",
    )
    add("--peer-malloc", action="store_true", help="transformers also with settings of malloc")
    add("--gguf", help="the model for llama.cpp (default: the demo model's, where installed)")
    add(
        "--llama-python",
        type=interpreter,
        default=sys.executable,
        help="interpreter with llama_cpp",
    )
    add("--score", action="store_true", help="time the scoring of references and answers, too")
    add("--profile", action="store_true", help="say where our time goes, at the first of --rows")
    add("--busy", action="store_true", help="print times even if the machine is busy")
    args = parser.parse_args()
    if not args.rows:
        parser.error("--rows: expected at least one number")
    return args


# ---- the runs


def own_run(*arguments: object) -> list[str]:
    """The command of one run of ours: benchmarks/sampler_job.py with these arguments."""
    texts = [str(argument) for argument in arguments]
    return [sys.executable, "-m", "benchmarks.sampler_job", *texts]


def llama_file(args: argparse.Namespace) -> Path | None:
    """The file for llama.cpp; None, with the reason printed, where llama.cpp cannot run."""
    try:
        file = Path(args.gguf).resolve() if args.gguf else demo_gguf()
    except ValueError as error:
        print(f"llama.cpp is left out: {error}")
        return None
    importing = [args.llama_python, "-c", "import llama_cpp"]
    if subprocess.run(importing, capture_output=True).returncode:
        print(f"llama.cpp is left out: {args.llama_python} cannot import llama_cpp")
        return None
    return file


def commands(args: argparse.Namespace) -> dict[str, tuple[list[str], bool]]:
    """Name -> command, and whether with processes.MALLOC; engines take turns in this order."""
    ours: dict[str, tuple[list[str], bool]] = {}
    for rows in args.rows:
        for draft in args.draft.split(","):
            command = own_run("generate", rows, draft)
            ours[f"ours, {rows} rows, draft {draft}"] = (command, False)

    peers: dict[str, tuple[list[str], bool]] = {}
    script = str(PEERS / "transformers_generate.py")
    for batch in args.batches:
        command = [args.peer_python, script, str(batch)]
        peers[f"transformers, batch {batch}"] = (command, False)
        if args.peer_malloc:
            peers[f"transformers, batch {batch}, malloc"] = (command, True)
    file = llama_file(args) if args.sequences else None
    if file is not None:
        script = str(PEERS / "llama_cpp_generate.py")
        quantisation = file.stem.rpartition(".")[2]  # as Q4_1
        for n in args.sequences:
            command = [args.llama_python, script, str(file), str(n)]
            peers[f"llama.cpp {quantisation}, {n} sequences"] = (command, False)

    # Ours and the peers' alternate, in proportion to their numbers.
    turns = {}
    our_names, peer_names = list(ours), list(peers)
    while our_names or peer_names:
        our_share_left = len(our_names) * len(peers)
        peer_share_left = len(peer_names) * len(ours)
        if our_share_left >= peer_share_left:
            name = our_names.pop(0)
            turns[name] = ours[name]
        else:
            name = peer_names.pop(0)
            turns[name] = peers[name]
    return turns


def make_job(args: argparse.Namespace) -> tuple[Job, Chat, LlamaConfig]:
    """The input of every process; the chat format; the model's config."""
    path = Path(args.model).resolve()
    config = LlamaConfig.from_dir(path)
    chat = Chat.from_dir(path, load_tokenizer(path))
    template = TEMPLATES[args.template]
    rows = []
    for row in DataConfig(args.data, limit=args.limit).load():
        context = list(row.messages[:-1])
        ids = chat.prompt_ids(prompt(chat, template, context, row.reference), template.prefix)
        if len(ids) + args.max_new > config.max_position:
            sys.exit(f"row {row.id}: {len(ids)} + {args.max_new} tokens do not fit the model")
        rows.append(
            {
                "id": row.id,
                "messages": context,
                "prompt": ids,
                "reference": row.reference,
                "reference_ids": chat.response_ids(row.reference),
            }
        )
    job = {
        "model": str(path),
        "threads": torch.get_num_threads(),
        "rows": rows,
        "max_new": args.max_new,
        "end_ids": list(chat.end_ids),
        "pad_id": chat.end_id,
        "vocab_size": config.vocab_size,
    }
    return job, chat, config


# ---- results


def diverging(a: list[list[int]], b: list[list[int]]) -> dict[int, int]:
    """Row -> first position at which the two differ, for the rows that are not identical."""
    found = {}
    for row, (x, y) in enumerate(zip(a, b, strict=True)):
        if x == y:
            continue
        position = 0
        while position < min(len(x), len(y)) and x[position] == y[position]:
            position += 1
        found[row] = position
    return found


def summary(several: list[dict[str, Any]], job: Job, ours: list[list[int]]) -> dict[str, Any]:
    """Medians of an engine's runs."""
    answers = several[0]["answers"]
    seconds = [r["seconds"] for r in several]
    median = statistics.median(seconds)
    new = [min(len(ids) + 1, job["max_new"]) for ids in answers]  # the end token is useful too
    differ = diverging(answers, ours)
    return {
        "seconds": median,
        "spread": (max(seconds) - min(seconds)) / median,
        "all_seconds": seconds,
        "load_seconds": statistics.median(r["load_seconds"] for r in several),
        "pack_seconds": statistics.median(r.get("pack_seconds", 0.0) for r in several),
        "rss": max(r["rss"] for r in several),
        "tokens": sum(new),
        "tokens_s": sum(new) / median,
        "rows_s": len(answers) / median,
        "rows_as_ours": len(answers) - len(differ),
        "diverging": differ,
        "new": new,
        "stats": several[0].get("stats"),
        "others": [r["others"] for r in several],
        "built": several[0].get("built"),
    }


def fastest(results: dict[str, dict[str, Any]], *starts: str) -> dict[str, Any] | None:
    """The result with the most tokens/s among those whose name begins with one of these."""
    found = [r for name, r in results.items() if name.startswith(starts)]
    return max(found, key=lambda r: r["tokens_s"], default=None)


def ratios(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """Ours over the peers', in tokens/s, and one in memory; only those whose sides both ran."""
    plain = {}
    with_malloc = {}
    for name, result in results.items():
        if name.endswith("malloc"):
            with_malloc[name] = result
        else:
            plain[name] = result
    ours = fastest(plain, "ours")
    theirs = fastest(plain, "transformers")
    theirs_with_malloc = fastest(with_malloc, "transformers")
    pairs = {
        "ours / transformers' best": (ours, theirs),
        "ours / transformers' best with malloc settings": (ours, theirs_with_malloc),
        "ours / llama.cpp's best": (ours, fastest(plain, "llama.cpp")),
    }
    for name in plain:
        if name.startswith("ours, 1 rows, draft "):
            single = name.replace("1 rows", "1 row")
            pair = (plain[name], plain.get("transformers, batch 1"))
            pairs[f"{single} / transformers, batch 1"] = pair
    found = {}
    for name, (a, b) in pairs.items():
        if a and b:
            found[name] = a["tokens_s"] / b["tokens_s"]
    if ours and theirs:
        found["peak RSS, ours / transformers' best batch"] = ours["rss"] / theirs["rss"]
    return found


def report(results: dict[str, dict[str, Any]], runs: dict[str, list[dict[str, Any]]]) -> None:
    """The table, then our statistics and the positions at which rows of peers differ from ours."""
    columns = "engine,tokens/s,rows/s,seconds,spread,load + pack,peak RSS,share,rows as ours"
    lines = [columns.split(",")]
    for name, r in results.items():
        lines.append(
            [
                name,
                f"{r['tokens_s']:.1f}",
                f"{r['rows_s']:.2f}",
                f"{r['seconds']:.1f}",
                f"{r['spread']:.0%}",
                f"{r['load_seconds']:.1f} + {r['pack_seconds']:.1f}",
                f"{r['rss'] / 1e9:.2f} GB",
                f"{r['share']:.0%}" if "share" in r else "-",
                f"{r['rows_as_ours']}/{len(r['new'])}",
            ]
        )
    print(table(lines))
    for name, several in runs.items():
        stats = several[0].get("stats")
        positions = results[name]["diverging"]
        if stats:
            prefill, decode = stats["prefill_seconds"], stats["decode_seconds"]
            times = f"prefill {prefill:.1f} s, decode {decode:.1f} s in {stats['steps']} steps"
            print(f"{name}: {several[0]['stats_text']}; {times}")
        elif positions:
            places = ", ".join(f"{row}@{position}" for row, position in positions.items())
            print(f"{name}: row@position of the first token that differs from ours: {places}")


def scoring(
    job: Job, answers: list[list[int]], config: LlamaConfig, rates: dict[str, float], busy: bool
) -> dict[str, Any]:
    """Scoring (engine/measure/likelihood.py) of references and answers of the same rows."""
    with Quiet("while scoring", busy):
        result = run(own_run("score"), job | {"answers": answers}, malloc=False)
    tokens, seconds = result["answer_tokens"], result["seconds"]
    floor = scoring_floor(config, result["prompt_tokens"], tokens, rates)
    result |= {"tokens_s": tokens / seconds, "floor_seconds": floor, "share": floor / seconds}
    print(
        f"scoring: {tokens} answer tokens in {seconds:.1f} s, {result['tokens_s']:.0f} tokens/s, "
        f"{result['share']:.0%} of the floor, peak RSS {result['rss'] / 1e9:.2f} GB"
    )
    return result


def profiling(job: Job, rows: int, busy: bool) -> dict[str, Any]:
    """benchmarks.sampler_profile's seconds, and a table of them."""
    with Quiet("while profiling", busy):
        found = run(own_run("profile", rows), job, malloc=False)["profile"]
    prefill, decode = found["prefill"], found["decode"]  # part of the forward -> seconds
    names = sorted({*prefill, *decode}, key=lambda name: -decode.get(name, 0))
    lines = [["layers one by one", "prefill, s", "decode, s", "prefill", "decode"]]
    for name in names:
        prefill_seconds = prefill.get(name, 0.0)
        decode_seconds = decode.get(name, 0.0)
        lines.append(
            [
                name,
                f"{prefill_seconds:.2f}",
                f"{decode_seconds:.2f}",
                f"{prefill_seconds / sum(prefill.values()):.1%}",
                f"{decode_seconds / sum(decode.values()):.1%}",
            ]
        )
    print(table(lines))
    share = found["share"]["python"]
    print(f"{rows} rows: Python is {share:.1%} of decoding with all layers in one call")
    return found


def run_engines(
    args: argparse.Namespace, job: Job
) -> tuple[dict[str, list[dict[str, Any]]], dict[str, str]]:
    """Name -> the results of its runs, ours first; and name -> why it ran out of memory.

    The engines take turns; every second round goes through them in reverse.
    """
    turns = commands(args)
    runs: dict[str, list[dict[str, Any]]] = {}
    lost: dict[str, str] = {}
    for repeat in range(args.repeats):
        names = list(turns)
        if repeat % 2:
            names.reverse()
        for name in names:
            if name in lost:
                continue
            command, malloc = turns[name]
            try:
                with Quiet(f"during {name}", args.busy) as quiet:
                    result = run(command, job, malloc)
            except OutOfMemory as error:
                if name.startswith("ours"):
                    sys.exit(f"{name}: {error}")
                lost[name] = str(error)
                print(f"{name}: {error}; the others go on", file=sys.stderr, flush=True)
                continue
            runs.setdefault(name, []).append(result | {"others": quiet.others})
            print(f"{name}: {result['seconds']:.1f} s", file=sys.stderr, flush=True)
    ordered = {}
    for engine in ("ours", "transformers", "llama.cpp"):
        for name in turns:
            if name.startswith(engine) and name not in lost:
                ordered[name] = runs[name]
    return ordered, lost


def own_answers(runs: dict[str, list[dict[str, Any]]]) -> list[list[int]]:
    """Our token ids, which must be the same in every run of ours."""
    own = {name: several for name, several in runs.items() if name.startswith("ours")}
    first = next(iter(own))
    answers = own[first][0]["answers"]
    for name, several in own.items():
        for result in several:
            differing = diverging(result["answers"], answers)
            if differing:
                sys.exit(f"{name} differs from {first}, row: position {differing}")
    return answers


def add_floors(
    results: dict[str, dict[str, Any]],
    runs: dict[str, list[dict[str, Any]]],
    config: LlamaConfig,
    prompts: list[list[int]],
    ceilings: dict[str, float],
) -> None:
    """Add weight_bytes, floor_seconds and share to our results."""
    for name, result in results.items():
        if not name.startswith("ours"):
            continue
        rows = int(name.split()[1])  # "ours, 32 rows, draft off"
        size = runs[name][0]["weight_bytes"]
        floor = generation_floor(config, prompts, result["new"], rows, ceilings, size)
        result["weight_bytes"] = size
        result["floor_seconds"] = floor
        result["share"] = floor / result["seconds"]


def main() -> None:
    args = parse_args()
    load = os.getloadavg()[0]
    with Quiet("before the start", args.busy):
        time.sleep(2)

    # 1. every engine, between two measurements of the machine's ceilings
    job, chat, config = make_job(args)
    prompts = [row["prompt"] for row in job["rows"]]
    rates = [run(own_run("ceilings"), job, malloc=False)]
    runs, lost = run_engines(args, job)
    rates.append(run(own_run("ceilings"), job, malloc=False))
    ceilings = {name: max(r[name] for r in rates) for name in ("flops", "bytes")}

    # 2. results beside ours
    ours = own_answers(runs)
    results = {name: summary(several, job, ours) for name, several in runs.items()}
    add_floors(results, runs, config, prompts, ceilings)
    found = ratios(results)

    # 3. print and record
    about = machine("cpu")
    prompt_tokens = sum(len(prompt) for prompt in prompts)
    print(
        f"{about['device']}, {job['threads']} threads, load {load:.1f} before; product "
        f"{ceilings['flops'] / 1e9:.0f} GFLOP/s, read {ceilings['bytes'] / 1e9:.1f} GB/s; "
        f"{len(prompts)} rows, {prompt_tokens} prompt tokens"
    )
    report(results, runs)
    for name, reason in lost.items():
        print(f"{name}: {reason}")
    for name, value in found.items():
        print(f"{name}: {value:.2f}")
    document = {
        "benchmark": "sampler",
        "load_before": load,
        "busy_allowed": args.busy,
        "model": Path(args.model).name,
        "data": f"{Path(args.data).name}, {len(prompts)} rows, template {args.template}",
        "prompt_tokens": prompt_tokens,
        "max_new": args.max_new,
        "malloc": MALLOC,
        "ceilings": rates,
        "ratios": found,
        "results": results,
        "lost": lost,
    }
    if args.score:
        document["scoring"] = scoring(job, ours, config, ceilings, args.busy)
    if args.profile:
        document["profile"] = profiling(job, args.rows[0], args.busy)
    undisturbed = all(r["others"] <= BUSY for several in runs.values() for r in several)
    record(document | {"environment": about}, wanted=undisturbed)


if __name__ == "__main__":
    main()
