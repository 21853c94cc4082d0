"""The discriminative rival of LlamaSeg: the same encoders and the same LLaMA, and a head that tells each pixel at once.

    python tests/bench_baseline.py --minutes 60                    # train on scenes, then score test and novel
    python tests/bench_baseline.py --minutes 60 --llamaseg out     # beside a checkpoint of train.py
    python tests/bench_baseline.py --minutes 0.2 --count 64        # does it run?

The paper's Table 2 shows that discriminative models are still ahead. This one reads [text tokens] <BOI> [image tokens]
as LlamaSeg does, and a linear layer turns the state of each image token into the logits of its patch of pixels. There
is no mask tokenizer, no mask token and no decoding. It has the data, the phrases per picture, the optimizers and the
learning rate of train.py, for so many minutes; train the other one with --encoder-steps 0 for the comparison.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

import train  # noqa: E402
from data import Batches, load_dataset, load_mixture, resize_picture, to_pixels  # noqa: E402
from metrics import SegmentationMetrics, add_up  # noqa: E402
from model import LlamaSeg, clock  # noqa: E402
from sample import SCORE_BATCH, Segmenter, print_table, score_examples  # noqa: E402
from tokenizer import TextTokenizer  # noqa: E402


class Baseline(nn.Module):
    """LlamaSeg's encoders, adaptors and LLaMA with a head for pixels."""

    def __init__(self, config):
        super().__init__()
        self.config, base = config.siglip, LlamaSeg(config)
        self.encoder, self.text_adaptor, self.image_adaptor = base.encoder, base.text_adaptor, base.image_adaptor
        self.boi, self.bom, self.llama, self.prefix = base.boi, base.bom, base.llama, base.prefix
        self.pixel_head = nn.Linear(config.llama.width, self.config.patch_size**2)

    def forward(self, text_ids, pixels, masks):
        """text_ids (B,L), pixels (b,3,S,S), masks bool (B,S,S) or None -> logits (B,S,S), loss ()."""
        P, h = self.config.patch_size, self.config.image_size // self.config.patch_size
        hidden = self.llama(self.prefix(text_ids, pixels))[:, -1 - h * h:-1]  # (B,h*h,D), the image tokens
        patches = self.pixel_head(hidden).float().unflatten(1, (h, h)).unflatten(3, (P, P))  # (B,h,h,P,P)
        logits = patches.permute(0, 1, 3, 2, 4).reshape(len(text_ids), h * P, h * P)
        return logits, None if masks is None else F.binary_cross_entropy_with_logits(logits, masks.float())


def learn(args, text_tokenizer):
    """A Baseline after so many minutes. The learning rate falls with the time that is spent."""
    torch.manual_seed(args.seed)
    config = train.PRESETS["scenes"]
    model, flags = Baseline(config), train.parse_args(["--phrases", "8"])
    optimizers, start, step = train.make_optimizers(model, flags), time.time(), 0
    dataset, side = load_mixture(args.data, "train", phrases=8), config.siglip.image_size
    batches = Batches(dataset, text_tokenizer, side, 0, 64, 64, 8, seed=args.seed)
    compiled = torch.compile(model) if args.minutes > 5 else model
    with tqdm(total=1, bar_format="{l_bar}{bar}| {elapsed}<{remaining} {postfix}") as bar:
        while (spent := (time.time() - start) / 60 / args.minutes) < 1:
            batch = batches[step]
            with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
                loss = compiled(batch["text_ids"], to_pixels(batch["pictures"]), batch["masks"])[1]
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = flags.lr * min((step + 1) / 100, 1 - spent)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update(spent - bar.n)
            bar.set_postfix_str(f"{64 * step:,} phrases, loss {loss.item():.4f}")
    return model.eval(), 64 * step


@torch.inference_mode()
def score(model, text_tokenizer, examples):
    """SegmentationMetrics of examples, at the pictures' own sizes."""
    metrics, side = SegmentationMetrics(), model.config.image_size
    for start in range(0, len(examples), SCORE_BATCH):
        some = examples[start:start + SCORE_BATCH]
        pixels = torch.cat([to_pixels(resize_picture(e.image, side)[None]) for e in some])
        logits = model(text_tokenizer([e.phrase for e in some]), pixels, None)[0]
        for example, picture in zip(some, logits):
            own = F.interpolate(picture[None, None], example.mask.shape, mode="bilinear", antialias=True)[0, 0]
            metrics.update((own >= 0).numpy(), example.mask, id=example.id)
    return metrics


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="of training (default: 60)")
    parser.add_argument("--llamaseg", type=Path, help="a checkpoint of train.py to put beside it")
    parser.add_argument("--data", default="scenes", help="default: scenes")
    parser.add_argument("--count", type=int, default=2000, help="examples of each split (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    args = parser.parse_args()
    torch.set_num_threads(1)
    text_tokenizer = TextTokenizer(REPO / "assets" / "text.model", train.PRESETS["scenes"].siglip.text_length)
    model, phrases = learn(args, text_tokenizer)
    segmenter, rows = Segmenter.load(args.llamaseg) if args.llamaseg else None, []
    for split in ("test", "novel"):
        dataset = load_dataset(args.data, split)
        examples = [dataset[i] for i in range(args.count)]
        start = clock(torch.device("cpu"))
        found = {"pixel head": score(model, text_tokenizer, examples)}
        ms = {"pixel head": 1000 * (clock(torch.device("cpu")) - start) / len(examples)}
        if segmenter:
            start, records = clock(torch.device("cpu")), []
            for at in range(0, len(examples), SCORE_BATCH):
                records += score_examples(segmenter, [*enumerate(examples)][at:at + SCORE_BATCH])
            found["mask tokens"] = add_up(records)[0]
            ms["mask tokens"] = 1000 * (clock(torch.device("cpu")) - start) / len(examples)
        for name, metrics in found.items():
            numbers = metrics.compute()
            rows.append({"model": name, "split": split, "cIoU": numbers["cIoU"], "gIoU": numbers["gIoU"],
                         "mAHD@0.5": numbers["mAHD@0.5"], "ms a mask, scoring included": ms[name]})
    print(f"{phrases:,} phrases in {args.minutes:g} minutes")
    print_table(rows, sys.stdout, 3)


if __name__ == "__main__":
    main()
