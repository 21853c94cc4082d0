"""Greedy decoding beside transformers' `generate`, and drafts beside none. LOG.md has runs.

    python tests/bench_decode.py                    # pip install transformers
    python tests/bench_decode.py --dtype bfloat16
    python tests/bench_decode.py --drafts 1000      # that many test scenes through the embedded default

Beside transformers: width 1024, 8 layers, a prefix of 322 tokens, 256 mask tokens, batch 1; dynamic and static cache,
plain and drafted. --rounds: how often each is timed.
"""

import argparse
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
from model import LlamaConfig, LlamaSeg, LlamaSegConfig, SigLIPConfig, clock, draft_window, pick_device  # noqa: E402
from sample import Segmenter  # noqa: E402


@torch.inference_mode()
def compare_drafts(count, dtype, compiled, device, batches=(1, 3, 32)):
    """Print and return, of so many test scenes, the masks that differ from plain ones of the same batch; and the passes
    of all masks, and of the smallest, largest, thinnest third."""
    segmenter, dataset, rows = Segmenter.load(None, str(device), dtype), load_dataset("scenes-plain", "test"), []
    examples = [dataset[i] for i in range(count)]
    asked = [segmenter.prepare(e.image, [e.phrase]) for e in examples]
    text_ids, pixels = (torch.cat(parts) for parts in zip(*asked))
    area = np.array([e.mask.mean() for e in examples])
    thickness = area / [1e-9 + np.mean(e.mask[1:] != e.mask[:-1]) + np.mean(e.mask[:, 1:] != e.mask[:, :-1])
                        for e in examples]
    order, thin, third = area.argsort(), thickness.argsort(), max(1, count // 3)

    def generate(batch, draft, compiled=False):
        tokens, passes = [], []
        for i in range(0, count, batch):
            some, stats = slice(i, i + batch), {}
            tokens.append(segmenter.model.generate(
                text_ids[some], pixels[some], draft=draft, compiled=compiled, stats=stats))
            passes += stats["mask_passes"]
        return torch.cat(tokens), np.array(passes)

    for batch in batches:
        plain, _ = generate(batch, "none")
        for draft in ("jacobi",) if compiled else ("jacobi", "hidden"):
            tokens, passes = generate(batch, draft, compiled)
            other = tokens != plain
            parts = zip(("passes", "small", "large", "thin"),
                        (passes, passes[order[:third]], passes[order[-third:]], passes[thin[:third]]))
            rows.append({"dtype": dtype, "batch": batch, "draft": draft, "compiled": compiled,
                         "masks that differ": int(other.any(1).sum()), "of": count, "tokens": int(other.sum())})
            rows[-1] |= {name: float(part.mean()) for name, part in parts}
            print(", ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def accepted_tokens(device, dtype, count):
    """{draft: tokens per pass} of the embedded default on so many drawn scenes, at batch 1's window."""
    segmenter, dataset = Segmenter.load(None, str(device), dtype), load_dataset("scenes-plain", "test")
    examples, accepted = [dataset[i] for i in range(count)], {"none": 1.0}
    text_ids = segmenter.text_tokenizer([e.phrase for e in examples]).to(device)
    pixels = segmenter.pixels([e.image for e in examples])
    for draft in ("jacobi", "hidden"):
        stats = {}
        segmenter.model.generate(text_ids, pixels, draft=draft, window=draft_window(draft, 1, device), stats=stats)
        accepted[draft] = (segmenter.model.config.mask_tokens - 1) / np.mean(stats["mask_passes"])
    return accepted


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--drafts", type=int, metavar="SCENES", help="compare the drafts on so many scenes instead")
    args = parser.parse_args()
    if args.drafts:
        compare_drafts(args.drafts, args.dtype, False, pick_device())
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
