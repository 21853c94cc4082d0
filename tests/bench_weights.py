"""What the official sizes cost here, with random weights in the official formats. Not a test; LOG.md has runs.

    python tests/bench_weights.py siglip        # SigLIP2-large vision beside transformers (pip install transformers)
    python tests/bench_weights.py vqgan         # VQ-16 at 256 px against the machine's matrix-product rate
    python tests/bench_weights.py llamaseg-b    # sample.py end to end: 6 GB of disk in a temporary folder
    python tests/bench_weights.py janus         # peak memory of loading Janus-Pro-1B in bfloat16: 4 GB of disk
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.utils.flop_counter import FlopCounterMode

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from model import PRESETS, SIGLIP2, LlamaSeg, SigLIP  # noqa: E402
from tokenizer import VQGAN, VQGANConfig  # noqa: E402


def seconds(calls, rounds):
    """Median seconds of each of `calls`, taken in turn so that the machine's mood is shared."""
    times = [[] for _ in calls]
    for _ in range(rounds + 1):
        for row, call in zip(times, calls):
            start = time.perf_counter()
            call()
            row.append(time.perf_counter() - start)
    return [statistics.median(row[1:]) for row in times]  # the first round warms up


@torch.inference_mode()
def bench_siglip(rounds):
    """The same random weights in transformers' SiglipModel and in ours: the vision tower, 256 px, batch 1."""
    from transformers import SiglipConfig, SiglipModel

    config = official_siglip_config("siglip2-large-patch16-256")
    config["text_config"] |= {"vocab_size": 1000, "num_hidden_layers": 1}  # not measured
    whole = SiglipModel(SiglipConfig(**config)).eval()
    with tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder)
        ours = SigLIP.from_pretrained(folder)
    theirs = whole.vision_model
    pixels = torch.rand(1, 3, 256, 256) * 2 - 1
    for dtype in (torch.float32, torch.bfloat16):
        x = pixels.to(dtype)
        calls = [partial(theirs.to(dtype), pixel_values=x), partial(ours.to(dtype).encode_image, x)]
        difference = (calls[0]().last_hidden_state - calls[1]()).abs().max().item()
        a, b = seconds(calls, rounds)
        print(f"{dtype}: transformers {1000 * a:.0f} ms, ours {1000 * b:.0f} ms, ratio {a / b:.2f}, "
              f"largest difference {difference:.1e}")


@torch.inference_mode()
def bench_vqgan(rounds):
    """One 256 px picture through the tokenizer at the official widths, and the share of the matrix-product rate."""
    model = VQGAN(VQGANConfig()).eval()
    image, tokens = torch.rand(1, 3, 256, 256) * 2 - 1, torch.randint(16384, (1, 256))
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    calls = {"encode": lambda: model.encode(image), "decode": lambda: model.decode(tokens)}
    product, *times = seconds([lambda: a @ b, *calls.values()], rounds)
    rate = 2 * 2048**3 / product
    print(f"matrix product of 2048: {rate / 1e9:.0f} GFLOP/s")
    for name, took in zip(calls, times):
        with FlopCounterMode(display=False) as counter:
            calls[name]()
        flops = counter.get_total_flops()
        print(f"{name}: {1000 * took:.0f} ms, {flops / 1e9:.0f} GFLOP, {100 * flops / took / rate:.0f} % of that rate")


def official_siglip_config(name):
    """The config.json of a released model, as a dict."""
    c = SIGLIP2[name]
    sizes = {"hidden_size": c.vision_width, "num_hidden_layers": c.vision_layers,
             "num_attention_heads": c.vision_heads, "intermediate_size": c.vision_mlp}
    return {"model_type": "siglip", "text_config": {**sizes, "vocab_size": c.vocab_size},
            "vision_config": {**sizes, "image_size": c.image_size, "patch_size": c.patch_size}}


def bench_llamaseg_b(folder):
    """python sample.py on a LlamaSeg-B of random weights: seconds per mask, peak memory, the floor of the decoding."""
    encoder, checkpoint = folder / "siglip2-large-patch16-256", folder / "out"
    encoder.mkdir()
    checkpoint.mkdir()
    c = PRESETS["llamaseg-b"].siglip
    (encoder / "config.json").write_text(json.dumps(official_siglip_config(encoder.name)))
    save_file(SigLIP(c).state_dict(), encoder / "model.safetensors")
    content = json.loads((REPO / "tests" / "fixtures" / "gemma_text" / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab |= {f"<spare{i}>": i for i in range(len(vocab), c.vocab_size)}
    (encoder / "tokenizer.json").write_text(json.dumps(content))
    torch.save({"model": VQGAN(VQGANConfig()).state_dict()}, folder / "vq_ds16_c2i.pt")
    model = LlamaSeg(PRESETS["llamaseg-b"], SigLIP.from_pretrained(encoder))
    model.save_pretrained(checkpoint / "model.safetensors", torch.float16)
    from tokenizer import TextTokenizer

    (checkpoint / "text.model").write_bytes(TextTokenizer(encoder).model.serialized_model_proto())
    weights = sum(p.numel() for part in (model.llama, model.head) for p in part.parameters())
    del model

    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        out = folder / f"{dtype}.json"
        start = time.perf_counter()
        subprocess.run([sys.executable, str(REPO / "sample.py"), "--checkpoint", str(checkpoint), "--encoder",
                        str(encoder), "--mask-tokenizer", str(folder / "vq_ds16_c2i.pt"), "--image",
                        str(REPO / "assets" / "example.png"), "--prompt", "the red circle", "--dtype", dtype,
                        "--out", str(folder / "masks"), "--json", str(out)], check=True)
        wall = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # of the largest child so far
        ms = json.loads(out.read_text())[0]["ms"]
        block = torch.ones(2**28, dtype=torch.float32)
        bandwidth = block.nbytes / min(seconds([block.sum], 5))
        floor = 256 * weights * size / bandwidth
        print(f"{dtype}: {ms / 1000:.1f} s per mask, {wall:.0f} s in all, peak {peak:.1f} GiB; floor of the decoding "
              f"{floor:.1f} s = 256 x {weights * size / 1e9:.2f} GB at {bandwidth / 1e9:.1f} GB/s")


# VmHWM, as ru_maxrss begins with that of the parent process
LOAD = """
import re, sys
sys.path.insert(0, sys.argv[1])
import torch
from mllm import JanusSeg
def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
model = JanusSeg.from_pretrained(sys.argv[2], dtype=torch.bfloat16)
weights, more = sum(w.nbytes for w in model.state_dict().values()), peak() - before
print(f"{sys.argv[3]}: {weights / 1e9:.2f} GB of weights, peak {more / 1e9:.2f} GB more than before, "
      f"ratio {more / weights:.2f}")
"""


def bench_janus(folder):
    """JanusSeg.from_pretrained of random weights in the released shape, as one .bin and as .safetensors."""
    config = json.loads((REPO / "tests" / "fixtures" / "janus_pro" / "config.json").read_text())
    config["language_config"] = {"model_type": "llama", "hidden_size": 2048, "num_hidden_layers": 24,
                                 "num_attention_heads": 16, "intermediate_size": 5632,
                                 "vocab_size": 102400}
    config["vision_config"]["params"] = {"image_size": 384, "model_name": "siglip_large_patch16_384",
                                         "select_feature": "same", "select_layer": -1}
    config["aligner_config"]["params"] |= {"input_dim": 1024, "n_embed": 2048}
    config["gen_aligner_config"]["params"] |= {"n_embed": 2048}
    config["gen_head_config"]["params"] = {"image_token_embed": 2048, "image_token_size": 16384, "n_embed": 2048}
    config["gen_vision_config"]["params"] = {"image_token_size": 16384, "n_embed": 8}
    official = official_weights()
    for kind in ("bin", "safetensors"):
        target = folder / kind
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config))
        if kind == "bin":
            torch.save(official, target / "pytorch_model.bin")
        else:
            save_file(official, target / "model.safetensors", metadata={"format": "pt"})
        subprocess.run([sys.executable, "-c", LOAD, str(REPO), str(target), kind], check=True)


def official_weights():
    """Random tensors under the names of Janus-Pro-1B's files, without the image tokenizer."""
    D, W, tower = 2048, 1024, "vision_model.vision_tower."
    shapes = {
        tower + "pos_embed": (1, 576, W), tower + "norm.weight": (W,), tower + "norm.bias": (W,),
        tower + "patch_embed.proj.weight": (W, 3, 16, 16), tower + "patch_embed.proj.bias": (W,),
        "gen_embed.weight": (16384, 8),
        "language_model.model.embed_tokens.weight": (102400, D), "language_model.lm_head.weight": (102400, D),
        "language_model.model.norm.weight": (D,),
    }

    def linear(name, outside, inside):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outside, inside), (outside,)

    for name, inside in (("aligner", W), ("gen_aligner", 8)):
        linear(f"{name}.layers.0", D, inside)
        linear(f"{name}.layers.2", D, D)
    linear("gen_head.output_mlp_projector", D, D)
    linear("gen_head.vision_head", 16384, D)
    for i in range(24):
        block, layer = f"{tower}blocks.{i}.", f"language_model.model.layers.{i}."
        for name, outside, inside in (("attn.qkv", 3 * W, W), ("attn.proj", W, W), ("mlp.fc1", 4 * W, W),
                                      ("mlp.fc2", W, 4 * W)):
            linear(block + name, outside, inside)
        shapes |= {f"{block}norm{k}.{part}": (W,) for k in (1, 2) for part in ("weight", "bias")}
        shapes |= {f"{layer}self_attn.{name}_proj.weight": (D, D) for name in "qkvo"}
        shapes |= {f"{layer}mlp.{name}_proj.weight": (5632, D) for name in ("gate", "up")}
        shapes[f"{layer}mlp.down_proj.weight"] = (D, 5632)
        shapes |= {f"{layer}{name}_layernorm.weight": (D,) for name in ("input", "post_attention")}
    return {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["siglip", "vqgan", "llamaseg-b", "janus"])
    parser.add_argument("--rounds", type=int, default=10, help="default: 10")
    args = parser.parse_args()
    if args.what in ("llamaseg-b", "janus"):
        with tempfile.TemporaryDirectory() as folder:
            {"llamaseg-b": bench_llamaseg_b, "janus": bench_janus}[args.what](Path(folder))
    else:
        {"siglip": bench_siglip, "vqgan": bench_vqgan}[args.what](args.rounds)
