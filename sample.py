"""A picture and a prompt in, a mask out.

    python sample.py                                             # embedded picture, embedded checkpoint
    python sample.py --image x.jpg --prompt "the red circle"     # your own; --prompt can be repeated
    python sample.py --image folder --prompt "everything blue" --json masks.json
    python sample.py --dataset scenes --split test               # score a checkpoint on a data set

For each picture and prompt, OUT gets NAME-K-PROMPT-mask.png (white object on black, at the picture's own
size) and NAME-K-PROMPT-overlay.png. In Python:

    from sample import Segmenter
    masks = Segmenter.load()(image, ["the red circle", "a sign of love"])    # bool arrays (H, W)
"""

import argparse
import io
import json
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import Scenes, contact_sheet, load_dataset, open_picture, resize_picture, rle_encode, to_pixels, write_picture
from metrics import boundary, write_json
from model import DECODES, WEIGHTS, LlamaSeg, check_source, compute_dtype, pick_device
from tokenizer import VQGAN, TextTokenizer, decode_masks
from train import ASSETS, evaluate, locate

EXAMPLE = ASSETS / "example.png"
EXAMPLE_PROMPTS = ("the red circle", "the blue square", "something to wear on a finger", "a sign of love")
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


class PromptTooLong(ValueError):
    """A prompt of more tokens than the model reads."""


class Segmenter:
    """A checkpoint ready for use: model, mask tokenizer, text tokenizer."""

    def __init__(self, model, mask_tokenizer, text_tokenizer, device):
        self.model = model.to(device).eval()
        self.mask_tokenizer = mask_tokenizer.to(device).eval()
        self.text_tokenizer = text_tokenizer
        self.device = device

    @classmethod
    def load(cls, checkpoint=None, device="auto", dtype="float32", encoder=None, mask_tokenizer=None,
             any_weights=False):  # fmt: skip
        """Open a checkpoint: the embedded one, a folder that train.py wrote, or the model.safetensors in it.

        dtype: of the model's weights, "float32", "bfloat16" or "auto" (bfloat16 where the device multiplies it fast);
        the mask tokenizer stays in float32. encoder, mask_tokenizer: where the frozen parts lie that the checkpoint
        names; default: beside it, else where `data.py download` put them. any_weights: take others than those of the
        training. Raises FileNotFoundError or ValueError with one line that names the file.
        """
        folder = Path(checkpoint or ASSETS)
        file = folder / "model.safetensors" if folder.is_dir() else folder
        device = pick_device(device)
        model = LlamaSeg.from_pretrained(file, encoder, compute_dtype(device, dtype)[0], any_weights)
        if mask_tokenizer is None:
            mask_tokenizer = file.with_name("mask_tokenizer.safetensors")
            if not mask_tokenizer.exists() and "mask_tokenizer" in model.frozen:
                mask_tokenizer = WEIGHTS / model.frozen["mask_tokenizer"]["name"]
        mask_tokenizer = VQGAN.from_pretrained(mask_tokenizer)
        if not any_weights:
            check_source(file, "mask_tokenizer", model.frozen, mask_tokenizer.source)
        text_tokenizer = TextTokenizer(file.with_name("text.model"), model.config.siglip.text_length)
        sizes = {"codes": (mask_tokenizer.config.codebook_size, model.config.codebook_size),
                 "text pieces": (text_tokenizer.model.vocab_size(), model.config.siglip.vocab_size)}  # fmt: skip
        for what, (has, wants) in sizes.items():
            if has != wants:
                raise ValueError(f"{file.parent}: {has} {what} beside a model of {wants}: not of one training run")
        return cls(model, mask_tokenizer, text_tokenizer, device)

    def prepare(self, image, prompts):
        """PIL picture and n prompts -> text_ids (n, L), pixels (1, 3, S, S): what model.generate takes.

        Raises ValueError for an empty prompt or one with more tokens than the model reads.
        """
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("empty prompt: say what to segment, as in 'the red circle'")
            needed = self.text_tokenizer.too_long(prompt)
            if needed:
                raise PromptTooLong(f"prompt {prompt[:40]!r}... has {needed} tokens, the model reads "
                                 f"{self.text_tokenizer.length}: make it shorter")  # fmt: skip
        pixels = to_pixels(resize_picture(image, self.model.config.siglip.image_size)[None])
        return self.text_tokenizer(list(prompts)).to(self.device), pixels.to(self.device)

    @torch.inference_mode()
    def __call__(self, image, prompts, decode="greedy"):
        """PIL picture (any mode and size) and a list of n prompts -> n bool arrays (H, W), at its own size.

        The picture is encoded once. Raises ValueError as `prepare` does.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts:
            return []
        text_ids, pixels = self.prepare(image, prompts)
        tokens = self.model.generate(text_ids, pixels, decode=decode)
        return decode_masks(self.mask_tokenizer, tokens, [image.size[::-1]] * len(prompts))


# ----------------------------------------------------------------------------------------------------------
# files


def find_pictures(sources):
    """What --image names, files, folders (their pictures, sorted) and "-": a list of (name, path or "-")."""
    found = []
    for source in sources:
        if source != "-" and Path(source).is_dir():
            inside = sorted(p for p in Path(source).iterdir() if p.suffix.lower() in PICTURES)
            if not inside:
                raise ValueError(f"{source}: no pictures in this folder (looked for {' '.join(sorted(PICTURES))})")
            found += inside
        else:
            found.append(source)
    if found.count("-") > 1:
        raise ValueError("standard input (-) can be read only once")
    names = ["stdin" if source == "-" else Path(source).stem for source in found]
    # a.png beside a.jpg: keep the ending, and number what is still the same
    names = [Path(source).name if names.count(name) > 1 else name for name, source in zip(names, found)]
    return [(f"{n}-{i}" if names.count(n) > 1 else n, source) for i, (n, source) in enumerate(zip(names, found))]


def overlay(image, mask, color=(255, 0, 160)):
    """The picture with the object tinted and outlined, everything else a little faded; PIL RGB."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    tinted = 0.5 * pixels + 0.5 * np.array(color, np.float32)
    faded = 0.75 * pixels + 0.25 * 255
    pixels = np.where(mask[..., None], tinted, faded)
    pixels[boundary(mask)] = color
    return Image.fromarray(pixels.round().astype(np.uint8))


def describe(mask):
    """(area in pixels, box (left, top, width, height) or None)."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, None
    box = (int(cols[0]), int(rows[0]), int(cols[-1] - cols[0] + 1), int(rows[-1] - rows[0] + 1))
    return int(mask.sum()), box


def check_targets(args):
    """Make the --out folder, and say before the work, not after it, where nothing can be written."""
    args.out.mkdir(parents=True, exist_ok=True)
    folders = [args.out] + ([Path(args.json).parent] if args.json and args.json != "-" else [])
    for folder in folders:
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{folder}: cannot write here")


def put_json(value, target):
    """JSON to a file, or to standard output for "-"."""
    if target == "-":
        print(json.dumps(value, indent=2))
    else:
        write_json(target, value)


# ----------------------------------------------------------------------------------------------------------
# the two jobs


def load(args):
    """The Segmenter that the flags ask for."""
    return Segmenter.load(args.checkpoint, args.device, args.dtype, locate(args.encoder), locate(args.mask_tokenizer),
                          args.any_weights)  # fmt: skip


def segment(args):
    """Masks and overlays of pictures; one line a mask."""
    say = sys.stderr if args.json == "-" else sys.stdout  # keep standard output clean for the JSON
    pictures = find_pictures(args.image or [EXAMPLE])
    prompts = args.prompt or EXAMPLE_PROMPTS
    check_targets(args)
    segmenter = load(args)
    records = []
    for name, source in tqdm(pictures, desc="pictures", disable=len(pictures) < 2):
        image = open_picture(io.BytesIO(sys.stdin.buffer.read()) if source == "-" else source)
        start = time.perf_counter()
        masks = segmenter(image, prompts, decode=args.decode)
        ms = 1000 * (time.perf_counter() - start) / len(prompts)
        for k, (prompt, mask) in enumerate(zip(prompts, masks)):
            slug = re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40]
            stem = f"{name}-{k}-{slug}" if slug else f"{name}-{k}"
            files = {kind: args.out / f"{stem}-{kind}.png" for kind in ("mask", "overlay")}
            write_picture(Image.fromarray(mask.astype(np.uint8) * 255), files["mask"])
            write_picture(overlay(image, mask), files["overlay"])
            area, box = describe(mask)
            where = "nothing found" if box is None else f"box {box[0]},{box[1]} {box[2]}x{box[3]}"
            tqdm.write(f"{name}: {prompt}: {area} px ({100 * area / mask.size:.1f} %), {where}, {ms:.0f} ms -> "
                       f"{files['overlay']}", file=say)  # fmt: skip
            records.append({"image": str(source), "prompt": prompt, "area": area,
                            "box": box, "rle": rle_encode(mask), "ms": round(ms, 1), "mask": str(files["mask"]),
                            "overlay": str(files["overlay"])})  # fmt: skip
    if args.json:
        put_json(records, args.json)


def score(args):
    """Metrics of a checkpoint on a data set, in all and by task, and a contact sheet of the first examples."""
    dataset = load_dataset(args.dataset, args.split)
    check_targets(args)
    segmenter = load(args)
    count = min(args.count or len(dataset), len(dataset))
    total, by_task, cells = evaluate(segmenter.model, segmenter.mask_tokenizer, segmenter.text_tokenizer, dataset,
                                     count, device=segmenter.device, decode=args.decode, progress=True)  # fmt: skip
    tables = {"all": total.compute()} | {task: by_task[task].compute() for task in sorted(by_task)}
    columns = ("count", "cIoU", "gIoU", "mAHD@0.5", "mAHD@0.7", "mAHD@0.9")
    say = sys.stderr if args.json == "-" else sys.stdout  # keep standard output clean for the JSON
    print(f"{args.dataset}:{args.split}, {args.decode} decoding", file=say)
    print(f"{'':12}" + "".join(f"{c:>10}" for c in columns), file=say)
    for name, row in tables.items():
        values = ("-" if row[c] is None else row[c] if c == "count" else f"{row[c]:.4f}" for c in columns)
        print(f"{name:12}" + "".join(f"{v:>10}" for v in values), file=say)
    sheet = args.out / f"{args.dataset}-{args.split}.png"
    contact_sheet(cells, sheet)
    print(f"wrote {sheet} (picture, predicted, truth)", file=say)
    if args.json:
        put_json({"dataset": args.dataset, "split": args.split, "decode": args.decode, **tables}, args.json)


def main(argv=None):
    """The command line; returns the exit code: 0, 1 for bad data, 2 for bad usage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("what to segment")
    group.add_argument("--image", nargs="+", metavar="PATH",
                       help="files, folders, or - for standard input (default: the embedded picture)")
    group.add_argument("--prompt", action="append", help="what to look for; repeat for more masks of the picture")
    group.add_argument("--out", type=Path, default=Path("out_masks"), help="folder for the PNGs (default: out_masks)")
    group.add_argument("--json", metavar="FILE", help="also write JSON with COCO run-length masks; - for stdout")
    group = parser.add_argument_group("scoring a data set")
    group.add_argument("--dataset", choices=["scenes"], help="data set to score on")
    group.add_argument("--split", choices=list(Scenes.SPLITS), default="test", help="default: test")
    group.add_argument("--count", type=int, help="first examples only (default: all of the split)")
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", metavar="PATH", help="folder that train.py wrote, or its model.safetensors")
    group.add_argument("--encoder", type=Path, metavar="DIR", help="frozen SigLIP that the checkpoint names (default: "
                       "where `data.py download` put it)")
    group.add_argument("--mask-tokenizer", type=Path, metavar="FILE", help="frozen VQGAN that the checkpoint names "
                       "(default: beside the checkpoint, else where `data.py download` put it)")
    group.add_argument("--any-weights", action="store_true",
                       help="take frozen parts other than those of the training")
    group.add_argument("--decode", choices=DECODES, default="greedy", help="default: greedy, the paper's")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps (default: auto)")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32",
                       help="of the weights; auto: bfloat16 where the device multiplies it fast (default: float32)")
    args = parser.parse_args(argv)
    if args.image and not args.prompt:
        parser.error('--image needs at least one --prompt, as in --prompt "the red circle"')
    if args.dataset and (args.image or args.prompt):
        parser.error("--dataset brings its own pictures and phrases: drop --image and --prompt")
    if any(not prompt.strip() for prompt in args.prompt or ()):
        parser.error("empty --prompt: say what to segment, as in 'the red circle'")
    if args.count is not None and args.count < 1:
        parser.error(f"--count {args.count} must be at least 1")
    try:
        pick_device(args.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    try:
        if args.dataset:
            score(args)
        else:
            segment(args)
    except PromptTooLong as error:
        parser.error(str(error))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
