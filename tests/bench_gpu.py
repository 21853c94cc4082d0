"""The figures that only a GPU can give: correctness, decoding, training, learning. `bash tests/gpu.sh` runs all parts.

    python tests/bench_gpu.py decode-b out_gpu               # one part, at most 9 minutes; writes out_gpu/decode-b.json
    python tests/bench_gpu.py decode-b out_gpu --rehearse    # the same at toy sizes, in seconds on a CPU
    python tests/bench_gpu.py table out_gpu                  # of the parts that are there: gpu.json, gpu.md for LOG.md

correct     the tests that take --device; masks that bfloat16 changes; mask tokens beside those of the CPU
decode-b    LlamaSeg-B of random weights: ms per pass beside the bytes that it reads over the measured copy bandwidth
train-b     a training step from cached mask tokens: samples/s, MFU (of the rate of one large matrix product), peak
            memory beside the estimate of --print-config, with and without activation checkpointing; the largest
            micro-batch that fits; samples/s where the mask tokenizer, in float32, encodes in each step too
decode-l, train-l    the same of LlamaSeg-L
learn       the embedded default trained from nothing, in out_gpu/learn; run it again to go on
loader      drawn pictures/s of so many workers beside what train-b consumed

Random weights do not change the time of a pass. How many passes a drafted mask takes is that of the embedded default.
"""

import argparse
import functools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import timeit
import traceback
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import model as M  # noqa: E402
import train  # noqa: E402
from bench_decode import accepted_tokens, compare_drafts  # noqa: E402
from data import Batches, load_dataset, load_mixture, resize_mask  # noqa: E402
from metrics import write_json  # noqa: E402
from model import PRESETS, LlamaSeg, SigLIPConfig, clock, peak_memory, pick_device  # noqa: E402
from tokenizer import VQGAN, TextTokenizer, VQGANConfig, mask_to_image  # noqa: E402
from weights import ASSETS  # noqa: E402

# Seconds after which a part begins no further measurement, and `learn` saves. What is left is "not run" in the table.
LIMITS = {"correct": 300, "decode-b": 360, "decode-l": 360, "train-b": 330, "train-l": 330, "learn": 430}
TOY = replace(PRESETS["scenes"], siglip=SigLIPConfig(32, 8, 32, 1, 2, 32, 768, 24, 32, 1, 2, 32), freeze_encoders=True,
              patch_head=False,
              llama=replace(PRESETS["scenes"].llama, width=32, layers=2, heads=2, kv_heads=2, head_dim=16, mlp=48),
              codebook_size=64, mask_grid=2)


def parts(config, args):
    """A LlamaSeg and a mask tokenizer with random weights, on the device."""
    small = {"channels": 32, "channel_mult": (1, 1, 1, 1, 1), "res_blocks": 1} if args.rehearse else {}
    with torch.device(args.device):
        return LlamaSeg(config), VQGAN(VQGANConfig(codebook_size=config.codebook_size, **small)).requires_grad_(False)


def correct(args):
    """The suite's tests on the device, and what differs in bfloat16."""
    tests = ["tests/test_model.py", "-k", "cached_greedy"] if args.rehearse else ["tests"]
    limit = ["timeout", "--signal", "INT", "--kill-after", "10", "300"] if args.device.type == "cuda" else []
    command = [*limit, sys.executable, "-m", "pytest", "--device", str(args.device), *tests]
    alone = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # a plugin may have a --device of its own
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, env=alone)
    said = f"{done.stdout}\n{done.stderr}".strip()
    print(said[-6000:], flush=True)
    torch.set_float32_matmul_precision("highest")  # TF32 would change masks, and is not sample.py's default
    count = 2 if args.rehearse else 512
    dataset = load_dataset("scenes-plain", "test")
    tokenizer = VQGAN.from_pretrained(ASSETS / "mask_tokenizer.safetensors")
    masks = torch.from_numpy(np.stack([resize_mask(dataset[i].mask, 128) for i in range(count)])).bool()
    with torch.inference_mode():
        here = tokenizer.encode(mask_to_image(masks))
        there = tokenizer.to(args.device).encode(mask_to_image(masks.to(args.device))).cpu()
    ways = [(dtype, compiled) for dtype in ("float32", "bfloat16") for compiled in (False, True)]
    result = {"tests": (done.stdout.strip() or said).splitlines()[-1], "exit code": done.returncode,
              "mask tokens other than the CPU's": (here != there).sum().item(), "of": here.numel(), "rows": []}
    for dtype, compiled in ways[2:3] if args.rehearse else ways:
        rows = attempt(compare_drafts, count, dtype, compiled, args.device, (32,))
        result["rows"] += rows if isinstance(rows, list) else [{"dtype": dtype, "compiled": compiled} | rows]
        save(args, result)
    return result


def attempt(measure, *how):
    """measure(*how); where it fails, a traceback on the screen and {"error": ...}, so that the rest is measured."""
    try:
        return measure(*how)
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"[:200]}


def copy_bandwidth(device):
    """Bytes/s, read and written, of a large copy: what a pass that only reads its weights is compared with."""
    x = torch.ones(2**31 if device.type == "cuda" else 2**27, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return 2 * x.nbytes / min(timeit.repeat(lambda: (y.copy_(x), clock(device)), number=1, repeat=10))


@torch.inference_mode()
def decode(preset, args):
    """Rows of plain and drafted, eager and compiled passes at 256 and 384 px; the most important ones first."""
    batches, names = ((2,), [preset]) if args.rehearse else ((1, 8, 32), [preset, f"{preset}-384"])
    bandwidth, dtype = copy_bandwidth(args.device), str(args.dtype).removeprefix("torch.")
    accepted = accepted_tokens(args.device, dtype, 2 if args.rehearse else 32)
    result = {"copy bandwidth GB/s": bandwidth / 1e9, "dtype": dtype, "rows": []}
    for batch in batches:
        for name in names:
            model, mask_tokenizer = parts(TOY if args.rehearse else PRESETS[name], args)
            model.to(args.dtype).fuse()
            ways = [("none", True), ("none", False), ("jacobi", True), ("jacobi", False)]
            for draft, compiled in ways[1:3] if args.rehearse else ways:
                row = {"preset": name, "batch": batch, "draft": draft, "compiled": compiled}
                if time.perf_counter() - args.began < LIMITS[args.part]:
                    row |= attempt(decode_row, model, mask_tokenizer, batch, draft, compiled, bandwidth,
                                   accepted[draft])
                print(row, flush=True)
                result["rows"].append(row)
                save(args, result)
                model.decoders.clear()
                torch._dynamo.reset()
    return result


def decode_row(model, mask_tokenizer, batch, draft, compiled, bandwidth, accepted):
    """What one way to decode takes: the best of two rounds after one that warms up or compiles."""
    siglip, count, device = model.config.siglip, model.config.mask_tokens, model.boi.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)  # the peak of this row, not of those before it
    text_ids = torch.zeros(batch, siglip.text_length, dtype=torch.long, device=device)
    pixels, rounds = torch.rand(batch, 3, siglip.image_size, siglip.image_size, device=device), []
    for _ in range(3):
        start = clock(device)
        rounds.append({})
        tokens = model.generate(text_ids, pixels, draft=draft, compiled=compiled, stats=rounds[-1])
        written = clock(device)
        mask_tokenizer.decode(tokens)
        rounds[-1] |= {"seconds": written - start, "vqgan_ms": 1000 * (clock(device) - written)}
    pass_ms = min(stats["decode_ms"] / stats["passes"] for stats in rounds[1:])
    c, P = model.config.llama, siglip.text_length + siglip.image_tokens + 2
    cache = 2 * c.layers * batch * c.kv_heads * c.head_dim * (P + count) * model.boi.element_size()
    read = sum(p.nbytes for part in (model.llama, model.head) for p in part.parameters()) + cache
    prefill_ms, vqgan_ms = (min(stats[name] for stats in rounds[1:]) for name in ("prefill_ms", "vqgan_ms"))
    passes = math.ceil((count - 1) / accepted)
    return {"first call s": rounds[0]["seconds"], "prefill ms": prefill_ms, "ms per pass": pass_ms,
            "floor ms": 1000 * read / bandwidth, "share of bandwidth": 1000 * read / bandwidth / pass_ms,
            "passes per mask": passes, "vqgan ms": vqgan_ms,
            "masks/s": 1000 * batch / (prefill_ms + passes * pass_ms + vqgan_ms), "peak GB": peak_memory(device) / 1e9}


def step_of(preset, args, micro_batch, recompute, compiled):
    """(a training step of two micro-batches, what --print-config counts for its memory, FLOP per sample, the encoding
    of at most 32 masks, which a step from cached mask tokens leaves out)."""
    config, device = TOY if args.rehearse else PRESETS[preset], args.device
    M.written_out_is_faster = lambda q, k: False  # on a CPU too the attention of a GPU, whose memory is counted
    model, mask_tokenizer = parts(config, args)
    model.encoder.to(args.dtype)
    flops = train.training_flops(model, phrases=1)
    model.llama.recompute = recompute
    flags = ["--preset", preset, "--micro-batch-size", str(micro_batch), "--encoder", "none"]
    flags = train.parse_args([*flags, "--mask-tokenizer", "none", *["--activation-checkpointing"] * recompute])
    optimizers, side = train.make_optimizers(model, flags), 16 * config.mask_grid
    text_ids = torch.zeros(micro_batch, config.siglip.text_length, dtype=torch.long, device=device)
    pixels = torch.rand(micro_batch, 3, config.siglip.image_size, config.siglip.image_size, device=device)
    masks = torch.rand(min(32, micro_batch), side, side, device=device) < 0.5
    mask_tokens = torch.randint(config.codebook_size, (micro_batch, config.mask_tokens), device=device)
    called = torch.compile(model) if compiled else model

    def step():
        for _ in range(2):  # gradients stay from one micro-batch to the next
            with torch.autocast(device.type, args.dtype, enabled=args.dtype != torch.float32):
                loss = called(text_ids, pixels, mask_tokens)[1]
            loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return (step, train.memory_of_a_rank(model, mask_tokenizer, flags)["peak"], flops,
            lambda: mask_tokenizer.encode(mask_to_image(masks)))


def train_steps(preset, args):
    """Rows of training steps, and the largest micro-batch that fits. --alone: one row, in a process of its own."""
    if args.alone:
        return train_row(preset, args, *args.alone)
    config, common = (TOY, 2) if args.rehearse else (PRESETS[preset], 32)
    result = {"dtype": str(args.dtype)[6:], "rows": []}
    for how in [(1, 0)] if args.rehearse else [(0, 0), (0, 1), (1, 0)]:
        alone(args, result, common, *how)
    for recompute in (0, 1) if args.device.type == "cuda" else ():  # as many as should fit, or 5 % fewer, ...
        per_sample = (train.activation_bytes(config, 2 * common, recompute)
                      - train.activation_bytes(config, common, recompute)) / common
        estimates = [row["estimate GB"] for row in result["rows"]
                     if row["activation checkpointing"] == bool(recompute) and "estimate GB" in row]
        if estimates:  # 0.98: a part of the GPU's memory is CUDA's own
            room = 0.98 * torch.cuda.get_device_properties(args.device).total_memory - 1e9 * estimates[0]
            size = common + 8 * int(room / per_sample / 8)
            for _ in range(4):
                if size <= common or "samples/s" in alone(args, result, size, recompute, 0):
                    break
                size = 8 * int(size * 0.95 / 8)
    if not args.rehearse:  # compiling takes minutes
        alone(args, result, common, 1, 1)
    # last, for this process' memory would be missing in those that measure
    return result | {"matrix product TFLOP/s": train.matmul_rate(args.device, args.dtype) / 1e12}


def alone(args, result, *sizes):
    """A further row of the result, measured in a process of its own, whose peak of memory is the row's."""
    row = {"micro-batch": sizes[0], "activation checkpointing": bool(sizes[1]), "compiled": bool(sizes[2])}
    result["rows"].append(row)
    left = LIMITS[args.part] - (time.perf_counter() - args.began)
    if left < 0:
        return row
    command = [sys.executable, __file__, args.part, str(args.out), "--device", str(args.device),
               "--alone", *map(str, sizes), *["--rehearse"] * args.rehearse]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=left + 60)
        if done.returncode:
            print(done.stderr[-3000:])
            row["error"] = (done.stderr.strip().splitlines() or ["killed"])[-1][:200]
        else:
            row |= json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        row["error"] = f"took more than {left + 60:.0f} s"
    print(row, flush=True)
    save(args, result)
    return row


def train_row(preset, args, micro_batch, recompute, compiled):
    """samples/s and memory of one step."""
    before = peak_memory(args.device) if args.device.type == "cpu" else 0
    step, estimate, flops, encode = step_of(preset, args, micro_batch, bool(recompute), bool(compiled))
    times = []
    for _ in range(3 if args.rehearse else 12):
        start = clock(args.device)
        step()
        times.append(clock(args.device) - start)
        if len(times) > 2 and sum(times[1:]) > 30:
            break
    seconds, measured = statistics.median(times[2:]), peak_memory(args.device) - before
    rate, encoding = 2 * micro_batch / seconds, []
    for _ in range(3):
        start = clock(args.device)
        encode()
        encoding.append((clock(args.device) - start) / min(32, micro_batch))
    return {"samples/s": rate, "samples/s, encoded too": 1 / (1 / rate + min(encoding)),
            "MFU": rate * flops / train.matmul_rate(args.device, args.dtype),
            "first step s": times[0], "measured GB": measured / 1e9, "estimate GB": estimate / 1e9,
            "estimate/measured": estimate / max(1, measured)}


def learn(args):
    """train.py for its LIMITS seconds, or to its end; then how fast the workers draw when no model waits for them."""
    out, workers = args.out / "learn", args.workers
    # a guess for a GPU, where drawing limits the rate: 8 times the batch of the CPU's recipe, at its learning rate
    flags = ["--out-dir", str(out), "--resume", "auto", "--batch-size", "512", "--max-steps", "5000", "--warmup-steps",
             "200", "--workers", str(workers), "--eval-every", "1000", "--eval-count", "300", "--compile"]
    if args.rehearse:
        flags = [*flags[:4], "--batch-size", "8", "--max-steps", "3", "--encoder-steps", "2", "--eval-count", "2",
                 "--workers", "0"]
    flags += ["--device", str(args.device)]
    timer = threading.Timer(LIMITS["learn"], os.kill, (os.getpid(), signal.SIGTERM))  # train.py saves and ends
    timer.daemon = True
    timer.start()
    code = train.main(flags)
    timer.cancel()
    records = train.read_log(out / "log.jsonl")
    steps, scores = ([r for r in records if name in r] for name in ("samples_per_s", "cIoU"))
    batch, phrases = int(flags[flags.index("--batch-size") + 1]), 4
    result = {"exit code": code, "steps": steps[-1]["step"], "samples": steps[-1]["step"] * batch,
              "samples/s": statistics.median(r["samples_per_s"] for r in steps), "MFU": steps[-1]["mfu"],
              "drawing alone, samples/s": phrases * drawing_rate(args, 128, 8, batch, phrases)}
    curve = [{"step": r["step"], "cIoU": r["cIoU"], "gIoU": r["gIoU"], "mAHD@0.5": r["mAHD@0.5"]} for r in scores]
    return result | {"rows": curve}


def drawing_rate(args, side, grid, batch, phrases):
    """Pictures/s that the workers draw when nobody waits for a model."""
    mixture, text_tokenizer = load_mixture("scenes", "train", phrases=phrases), TextTokenizer(ASSETS / "text.model", 24)
    batches = Batches(mixture, text_tokenizer, side, grid**2, batch, batch, phrases, 0, 1, 0, True, 16 * grid)
    workers = 0 if args.rehearse else args.workers
    loader = iter(torch.utils.data.DataLoader(batches, batch_size=None, sampler=range(9999), num_workers=workers))
    for _ in range(2 * workers + 1):  # what all workers draw at once in the beginning
        next(loader)
    start, count = time.perf_counter(), 0
    while count < 2 or workers and time.perf_counter() - start < 15:
        next(loader)
        count += 1
    return count * batch / phrases / (time.perf_counter() - start)


def loader(args):
    """Pictures/s for LlamaSeg-B beside what the part train-b consumed."""
    found = args.out / "train-b.json"
    rows = json.loads(found.read_text())["rows"] if found.exists() else []
    best = max((row.get("samples/s", 0) for row in rows), default=None)
    return {"workers": args.workers, "drawn pictures/s at 256 px": drawing_rate(args, 256, 16, 32, 1),
            "train-b samples/s": best}


def save(args, result):
    """OUT/PART.json of what is measured so far: a part that is ended keeps it."""
    name = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else "CPU"
    head = {"device": name, "torch": torch.__version__, "rehearsal": args.rehearse,
            "seconds": time.perf_counter() - args.began}
    args.out.mkdir(parents=True, exist_ok=True)
    write_json(args.out / f"{args.part}.json", head | result)


def table(args):
    """gpu.json and gpu.md of the parts in OUT."""
    parts = {name: json.loads((args.out / f"{name}.json").read_text())
             for name in PARTS if (args.out / f"{name}.json").exists()}
    lines = []
    for name, part in parts.items():
        lines += [f"### {name}", "", ", ".join(f"{key} {show(value)}" for key, value in part.items() if key != "rows")]
        rows = part.get("rows", [])
        keys = list(dict.fromkeys(key for row in rows for key in row))  # in order
        if keys:
            lines += ["", f"| {' | '.join(keys)} |", "|" + "---|" * len(keys)]
            lines += [f"| {' | '.join(show(row.get(key)) for key in keys)} |" for row in rows]
        lines.append("")
    write_json(args.out / "gpu.json", parts)
    (args.out / "gpu.md").write_text("\n".join(lines))
    print("\n".join(lines))


def show(value):
    """A value as a cell of the table."""
    return "not run" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)


PARTS = {
    "correct": correct, "decode-b": functools.partial(decode, "llamaseg-b"),
    "decode-l": functools.partial(decode, "llamaseg-l"), "train-b": functools.partial(train_steps, "llamaseg-b"),
    "train-l": functools.partial(train_steps, "llamaseg-l"), "learn": learn, "loader": loader,
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=[*PARTS, "table"])
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--rehearse", action="store_true", help="toy sizes; torch.compile without code generation")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--workers", type=int, default=max(1, os.cpu_count() - 2),
                        help="that draw (default: one per core but two, for the process that drives the GPU)")
    parser.add_argument("--alone", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.device, args.began = pick_device(args.device), time.perf_counter()
    args.dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    torch.set_float32_matmul_precision("high")
    if args.part == "table":
        return table(args)
    real = torch.compile
    if args.rehearse:  # small tensors gain nothing from more threads, and generating code takes a CPU a minute
        torch.set_num_threads(1)
        torch.compile = functools.partial(real, backend="aot_eager")
    try:
        result = PARTS[args.part](args)
    finally:
        torch.compile = real
    if args.alone:
        return print(json.dumps(result))
    save(args, result)
    print(f"wrote {args.out / args.part}.json")


if __name__ == "__main__":
    main()
