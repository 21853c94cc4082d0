"""Greedy decoding beside transformers' `generate`, drafts beside none, and the paper's shapes. LOG.md has runs.

    python tests/bench_decode.py                    # pip install transformers
    python tests/bench_decode.py --dtype bfloat16
    python tests/bench_decode.py --drafts 1000      # that many test scenes through the embedded default
    python tests/bench_decode.py --preset llamaseg-b --dtype bfloat16    # or llamaseg-l; --device, --json FILE.json

Beside transformers: width 1024, 8 layers, a prefix of 322 tokens, 256 mask tokens, batch 1; dynamic and static cache,
plain and drafted. --rounds: how often each is timed.

--preset measures a model of the paper's shape with random weights, on a CPU at batch 1 only. No draft can guess the
masks of random weights, so each mask takes as many passes per token as the embedded default needs on drawn scenes. The
table is that of `python sample.py --bench`, with the tokens per pass and the share of the memory bandwidth that a pass
reaches: the time in which products of a matrix and a vector read all weights once, over the time of a pass.
"""

import argparse
import json
import math
import statistics
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from data import load_dataset  # noqa: E402
from metrics import write_json  # noqa: E402
from model import (  # noqa: E402
    PRESETS, LlamaConfig, LlamaSeg, LlamaSegConfig, SigLIPConfig, clock, draft_window, pick_device,
)
from sample import Segmenter, bench_row, print_table  # noqa: E402
from tokenizer import VQGAN, VQGANConfig  # noqa: E402


@torch.inference_mode()
def compare_drafts(count, dtype):
    """Masks that differ from plain ones of the same batch; passes: all, and the smallest, largest, thinnest third."""
    segmenter, dataset = Segmenter.load(dtype=dtype), load_dataset("scenes", "test")
    examples = [dataset[i] for i in range(count)]
    asked = [segmenter.prepare(e.image, [e.phrase]) for e in examples]
    text_ids, pixels = (torch.cat(rows) for rows in zip(*asked))
    area = np.array([e.mask.mean() for e in examples])
    thickness = area / [1e-9 + np.mean(e.mask[1:] != e.mask[:-1]) + np.mean(e.mask[:, 1:] != e.mask[:, :-1])
                        for e in examples]
    order, thin, third = area.argsort(), thickness.argsort(), max(1, count // 3)

    def generate(batch, draft):
        tokens, passes = [], []
        for i in range(0, count, batch):
            stats = {}
            some = slice(i, i + batch)
            tokens.append(segmenter.model.generate(text_ids[some], pixels[some], draft=draft, stats=stats))
            passes += stats["mask_passes"]
        return torch.cat(tokens), np.array(passes)

    for batch in (1, 3, 32):
        plain, _ = generate(batch, "none")
        for draft in ("jacobi", "hidden"):
            tokens, passes = generate(batch, draft)
            other = tokens != plain
            parts = [passes, passes[order[:third]], passes[order[-third:]], passes[thin[:third]]]
            small_to_thin = ", ".join(f"{name} {part.mean():.1f}" for name, part in
                                      zip(("passes", "small", "large", "thin"), parts))
            print(f"{dtype} batch {batch:2} {draft:6}: {other.any(1).sum()} of {count} masks differ, "
                  f"{other.sum()} tokens; {small_to_thin}", flush=True)


def accepted_tokens(device, dtype):
    """{draft: tokens per pass} of the embedded default on 32 drawn scenes, at batch 1's window."""
    segmenter, dataset = Segmenter.load(None, str(device), dtype), load_dataset("scenes", "test")
    examples, accepted = [dataset[i] for i in range(32)], {"none": 1.0}
    text_ids = segmenter.text_tokenizer([e.phrase for e in examples]).to(device)
    pixels = segmenter.pixels([e.image for e in examples])
    for draft in ("jacobi", "hidden"):
        stats = {}
        segmenter.model.generate(text_ids, pixels, draft=draft, window=draft_window(draft, 1, device), stats=stats)
        accepted[draft] = (segmenter.model.config.mask_tokens - 1) / np.mean(stats["mask_passes"])
    return accepted


@torch.inference_mode()
def measure_preset(args):
    """The table and JSON of --preset."""
    device, dtype = pick_device(args.device), getattr(torch, args.dtype)
    accepted = accepted_tokens(device, args.dtype)
    with torch.device(device):
        model, mask_tokenizer = LlamaSeg(PRESETS[args.preset]).to(dtype), VQGAN(VQGANConfig())
    model.fuse()
    siglip, M = model.config.siglip, model.config.mask_tokens
    text_ids = torch.zeros(32, siglip.text_length, dtype=torch.long, device=device)
    pixels = torch.zeros(32, 3, siglip.image_size, siglip.image_size, device=device)
    weight_bytes = sum(p.nbytes for part in (model.llama, model.head) for p in part.parameters())
    bandwidth, rows = matvec_bandwidth(device, dtype), []

    def generate(some, draft, stats):
        stats |= replay(model, text_ids[some], pixels[some], draft, accepted[draft])
        return torch.zeros(len(text_ids[some]), M, dtype=torch.long, device=device)

    for batch in (1,) if device.type == "cpu" else (1, 8, 32):
        for draft in ("none", "jacobi", "hidden"):
            row = bench_row(generate, mask_tokenizer, device, batch, draft, rounds=1)
            rows.append(row | {"tokens_per_pass": (M - 1) / row["passes_per_mask"],
                               "bandwidth_share": weight_bytes / bandwidth / row["ms_per_pass"] * 1000})
    print(f"{args.preset} on {device}, {args.dtype}, {torch.get_num_threads()} threads: {weight_bytes / 1e9:.3f} GB of "
          f"weights per pass, matrix-vector products read {bandwidth / 1e9:.1f} GB/s: "
          f"{1000 * weight_bytes / bandwidth:.2f} ms")
    print_table(rows, sys.stdout, digits=2)
    result = {"model": args.preset, "device": str(device), "dtype": args.dtype, "weight_bytes": weight_bytes,
              "bandwidth": bandwidth, "rows": rows}
    print(json.dumps(result))
    if args.json:
        write_json(args.json, result)


def replay(model, text_ids, pixels, draft, accepted):
    """The passes that a mask takes where each is right about `accepted` tokens; the stats that generate gives."""
    device, M = text_ids.device, model.config.mask_tokens
    begun = clock(device)
    prefix = model.prefix(text_ids, pixels)
    B, P, D = prefix.shape
    width = draft_window(draft, B, device)
    cache = model.new_cache(prefix, 2 * M)
    extra = prefix.new_zeros(B, M - 1 if draft == "hidden" else 0, D)
    model.next_logits(torch.cat([prefix, extra], dim=1), cache)
    prefilled = clock(device)
    passes = math.ceil((M - 1) / accepted)
    for k in range(passes):
        place = P + int(k * accepted)
        embeddings = prefix.new_zeros(B, width, D)
        cache.position = place
        if draft == "none":
            model.next_logits(embeddings, cache).argmax(-1)
        else:
            slots = torch.arange(place, place + width, device=device).expand(B, width)
            model.head(model.llama(embeddings, cache, slots=slots)).float().argmax(-1).tolist()
    return {"prefill_ms": 1000 * (prefilled - begun), "decode_ms": 1000 * (clock(device) - prefilled),
            "passes": passes, "mask_passes": passes}


def matvec_bandwidth(device, dtype):
    """Bytes/s at which products of a large matrix and a vector read the matrix: the limit of decoding one mask."""
    matrices = [torch.randn(8192, 4096, device=device).to(dtype) for _ in range(8)]  # more than any cache holds
    x, seconds = torch.randn(1, 4096, device=device).to(dtype), []
    for k in range(20):
        start = clock(device)
        torch.nn.functional.linear(x, matrices[k % 8])
        seconds.append(clock(device) - start)
    return matrices[0].nbytes / float(np.median(seconds[4:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drafts", type=int, metavar="SCENES", help="compare the drafts on so many scenes instead")
    parser.add_argument("--preset", choices=("llamaseg-b", "llamaseg-l"), help="measure this shape instead")
    parser.add_argument("--device", default="auto", help="of --preset: auto, cpu, cuda, cuda:N, mps")
    parser.add_argument("--json", metavar="FILE", help="of --preset: also write the table as JSON")
    args = parser.parse_args()
    if args.drafts:
        compare_drafts(args.drafts, args.dtype)
    elif args.preset:
        measure_preset(args)
    else:
        compare_transformers(args)


@torch.inference_mode()
def compare_transformers(args):
    """Time of a mask, theirs over ours, and the share of equal tokens."""
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    dtype, device = getattr(torch, args.dtype), pick_device()
    small = SigLIPConfig(image_size=256, vision_width=32, vision_layers=1, vision_heads=1, vision_mlp=32, vocab_size=8,
                         text_width=32, text_layers=1, text_heads=1, text_mlp=32)
    ours = LlamaSeg(LlamaSegConfig(siglip=small, llama=LlamaConfig(width=1024, layers=8, heads=16, mlp=2752)))
    theirs = LlamaForCausalLM(TheirConfig(
        hidden_size=1024, num_hidden_layers=8, num_attention_heads=16, intermediate_size=2752, vocab_size=16384,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0)).eval()
    theirs.model.load_state_dict({**ours.llama.state_dict(), "embed_tokens.weight": ours.mask_embedding.weight})
    theirs.lm_head.load_state_dict(ours.head.state_dict())
    ours, theirs = ours.to(device, dtype), theirs.to(device, dtype)
    ours.fuse()
    text_ids, pixels = torch.zeros(1, 64, dtype=torch.long, device=device), torch.rand(1, 3, 256, 256, device=device)

    def generate(cache):
        prefix = ours.prefix(text_ids, pixels)
        return theirs.generate(inputs_embeds=prefix, attention_mask=torch.ones(1, prefix.shape[1], device=device),
                               max_new_tokens=256, min_new_tokens=256, do_sample=False, cache_implementation=cache)

    calls = {"transformers, dynamic cache": partial(generate, None),
             "transformers, static cache": partial(generate, "static"),
             "ours, plain": partial(ours.generate, text_ids, pixels, draft="none"),
             "ours, jacobi, no guess right": partial(ours.generate, text_ids, pixels, draft="jacobi")}
    times, tokens = {name: [] for name in calls}, {}
    for turn in range(args.rounds + 1):
        for name, call in calls.items():
            start = clock(device)
            tokens[name] = call()
            if turn:
                times[name].append(clock(device) - start)
    base = statistics.median(times["ours, plain"])
    for name, row in times.items():
        same = (tokens[name] == tokens["ours, plain"]).float().mean().item()
        middle = statistics.median(row)
        print(f"{args.dtype} {name}: {middle:.2f} s, {middle / base:.2f} of ours plain; "
              f"{100 * same:.0f} % of the tokens the same")


if __name__ == "__main__":
    main()
