"""Make a tiny Janus directory, to try the MLLM route without its 4 GB of weights: 25 minutes on one core, see LOG.md.

    python tests/tiny_janus.py out/tiny_janus
    python train.py --preset llamaseg-janus --encoder out/tiny_janus ...

The language model is the random one of tests/fixtures/janus_pro, two layers of width 48. What a real Janus brings
along is learned here on the drawn scenes: an image tokenizer of 96 codes for 64 px, and a tower that sees which color
and shape lie in each of its 16 patches.
"""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tqdm import tqdm

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import tokenizer  # noqa: E402
from data import Scenes, pad_mask, pad_picture, to_pixels  # noqa: E402
from mllm import JanusPrompt, JanusSeg, our_names  # noqa: E402
from scenes import COLORS, SHAPES  # noqa: E402
from tokenizer import VQGAN, VQGANConfig  # noqa: E402

FIXTURES = REPO / "tests" / "fixtures"
SIDE, GRID, CODES = 64, 4, 96


def train_image_tokenizer(path):
    """A VQGAN with as many codes as the fixture's generation head has; about 18 minutes. Saved at `path` as it goes."""
    tokenizer.crop_masks = lambda masks, size: masks  # 64 px are no more than a crop already
    model = VQGAN(VQGANConfig(channels=32, channel_mult=(1, 1, 1, 1, 2), res_blocks=1, latent_channels=32,
                              codebook_size=CODES, codebook_dim=8))
    train_set, val_set, device = Scenes("train"), Scenes("val"), torch.device("cpu")
    args = SimpleNamespace(start=0, batch_size=8, size=SIDE, bfloat16=True, save_every=400, out=path, fit_masks=1200,
                           device=device)
    left = {"free": 900, "codes": 700, "decoder": 400}
    bar = tqdm(total=sum(left.values()))
    for phase, lr in (("free", 2e-3), ("codes", 1.5e-3), ("decoder", 1e-3)):
        args.lr = lr
        if phase != "free":
            codebook = tokenizer.fit_codebook(model, train_set, args, learned=phase == "decoder")
            model.quantize.embedding.weight.data.copy_(codebook)
        tokenizer.train_phase(model, train_set, val_set, phase, left, args, bar)
    return model


def patches(mask):
    """bool (H, W) -> share of each patch that it covers (16,)."""
    return pad_mask(mask, SIDE).reshape(GRID, SIDE // GRID, GRID, SIDE // GRID).mean((1, 3)).ravel()


def train_tower(model, count=6000, steps=2400, peak=3e-3):
    """Tower and aligner learn how much of each color, each shape and any object lies in each patch; 4 minutes."""
    scenes, pictures = Scenes("train"), np.empty((count, SIDE, SIDE, 3), np.uint8)
    shares = np.zeros((count, GRID * GRID, len(COLORS) + len(SHAPES) + 1), np.float32)
    for i in tqdm(range(count), desc="draw"):
        image, owner, objects, _ = scenes.scene(500_000 + i)
        pictures[i] = pad_picture(image, SIDE)
        for k, shape in enumerate(objects):
            where = (list(COLORS).index(shape.color), len(COLORS) + list(SHAPES).index(shape.kind), -1)
            shares[i][:, where] += patches(owner == k)[:, None]
    shares = torch.from_numpy(shares)  # (n, 16, 17)
    probe = torch.nn.Linear(model.config.llama.width, shares.shape[-1])
    parameters = [p.requires_grad_() for part in (model.vision, model.aligner, probe) for p in part.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak, weight_decay=0.0)
    bar = tqdm(range(steps), desc="tower")
    for step in bar:
        rows = torch.randint(count, (64,))
        loss = F.mse_loss(probe(model.encode_image(to_pixels(pictures[rows.numpy()]))), shares[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = peak * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.step()
        if step % 50 == 0:
            bar.set_postfix_str(f"loss {loss.item():.4f}")


def main(folder):
    torch.manual_seed(0)
    folder.mkdir(parents=True, exist_ok=True)
    vqgan = train_image_tokenizer(folder / "image_tokenizer.safetensors")
    shutil.copyfile(FIXTURES / "janus_bpe" / "tokenizer.json", folder / "tokenizer.json")
    config = json.loads((FIXTURES / "janus_pro" / "config.json").read_text())
    words = JanusPrompt(folder, GRID * GRID).bpe.vocab_size
    config["language_config"]["vocab_size"] = words
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: w.float() for name, w in load_file(FIXTURES / "janus_pro" / "model.safetensors").items()
               if not name.startswith("gen_vision_model.")}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        weights[name] = torch.randn(words, weights[name].shape[1]) * weights[name].std()
    weights |= {f"gen_vision_model.{name}": w.contiguous() for name, w in vqgan.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "image_tokenizer.safetensors").unlink()  # it is in there now

    model = JanusSeg.from_pretrained(folder)
    train_tower(model)
    state = {name: w.detach() for name, w in model.state_dict().items()}
    for name, w in weights.items():
        if name.startswith(("vision_model.", "aligner.")):
            ours = [state[key] for key in our_names({name: w}) if key in state]  # three for a fused qkv
            weights[name] = torch.cat(ours).reshape(w.shape).contiguous() if ours else w
    save_file(weights, folder / "model.safetensors")
    print(f"wrote {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
