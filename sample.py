"""A picture and a prompt in, a mask out.

    python sample.py                                             # embedded picture, embedded checkpoint
    python sample.py --image x.jpg --prompt "the red circle"     # your own; --prompt can be repeated
    python sample.py --image folder --prompt "everything blue" --json masks.json
    python sample.py --dataset scenes --split test               # score a checkpoint on a data set
    torchrun --nproc_per_node=8 sample.py --dataset refcoco --split testA --root data --checkpoint out

For each picture and prompt, OUT gets NAME-K-PROMPT-mask.png (white object on black, at the picture's own
size) and NAME-K-PROMPT-overlay.png. In Python:

    from sample import Segmenter
    masks = Segmenter.load()(image, ["the red circle", "a sign of love"])    # bool arrays (H, W)
"""

import argparse
import io
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from data import (
    BadUsage,
    contact_sheet,
    load_dataset,
    open_picture,
    resize_picture,
    rle_decode,
    rle_encode,
    sha256_of,
    to_pixels,
    write_picture,
)
from metrics import SegmentationMetrics, add_up, boundary, read_records, write_json
from model import DECODES, WEIGHTS, LlamaSeg, check_source, compute_dtype, pick_device
from tokenizer import VQGAN, TextTokenizer, decode_masks
from train import ASSETS, check_fit, locate, predict, setup_ranks

SEMANTIC = ("ade20k", "cocostuff", "voc20", "pc59", "pc459")
EXAMPLE = ASSETS / "example.png"
EXAMPLE_PROMPTS = ("the red circle", "the blue square", "something to wear on a finger", "a sign of love")
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


class PromptTooLong(ValueError):
    """A prompt of more tokens than the model reads."""


def checkpoint_file(checkpoint=None):
    """The model.safetensors of a checkpoint: a folder, the file itself, or None for the embedded one."""
    path = Path(checkpoint or ASSETS)
    return path / "model.safetensors" if path.is_dir() else path


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
        file = checkpoint_file(checkpoint)
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
        check_fit(model.config, mask_tokenizer, text_tokenizer, file.parent)
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


def load(args, device):
    """The Segmenter that the flags ask for."""
    return Segmenter.load(args.checkpoint, str(device), args.dtype, locate(args.encoder), locate(args.mask_tokenizer),
                          args.any_weights)  # fmt: skip


def segment(args):
    """Masks and overlays of pictures; one line a mask."""
    say = sys.stderr if args.json == "-" else sys.stdout  # keep standard output clean for the JSON
    pictures = find_pictures(args.image or [EXAMPLE])
    prompts = args.prompt or EXAMPLE_PROMPTS
    check_targets(args)
    segmenter = load(args, args.device)
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


SCORE_BATCH = 32  # examples decoded together; always the same ones, so that a stop or more ranks change no digit


def score(args):
    """Metrics of a checkpoint on a data set, in all and by task. Under torchrun the ranks share the work.

    OUT gets NAME-SPLIT.jsonl (a line for each example), .json (the numbers) and .png (the first examples). A killed
    run goes on when the same command is typed again.
    """
    rank, world_size, device = setup_ranks(args.device)
    options = {name: value for name, value in (("split_by", args.split_by), ("classes", args.classes)) if value}
    dataset = load_dataset(args.dataset, args.split, args.root, **options)
    count = min(args.count or len(dataset), len(dataset))
    if count == 0:
        raise ValueError(f"{args.dataset}:{args.split} has no examples")
    check_targets(args)
    segmenter = load(args, device)
    name = re.sub(r"[^A-Za-z0-9+-]+", "-", args.dataset)
    stem = args.out / f"{name}-{args.split}"
    run = {"dataset": args.dataset, "split": args.split, **options, "count": count, "decode": args.decode,
           "dtype": args.dtype, "model": sha256_of(checkpoint_file(args.checkpoint)),
           "mask_tokenizer": segmenter.mask_tokenizer.source["sha256"], "protocol": protocol(args)}  # fmt: skip

    done = gather(stem, run)
    if world_size > 1:
        torch.distributed.barrier()  # all ranks share out the same rest: nobody writes before everybody has read
    whole = {i for i, record in done.items() if "broken" not in record}  # what was broken is tried again
    batches = [range(i, min(i + SCORE_BATCH, count)) for i in range(0, count, SCORE_BATCH)]
    batches = [batch for batch in batches if not whole.issuperset(batch)][rank::world_size]
    mine = stem.with_name(f"{stem.name}.rank{rank}.jsonl")
    if batches:
        write_lines(mine, run, [r for r in done.values() if r["rank"] == rank])  # without a half-written line
        with open(mine, "a") as file:
            for batch in tqdm(batches, desc=f"{args.dataset}:{args.split}", unit="batch", disable=rank > 0):
                lines = score_batch(segmenter, dataset, batch, args, rank)
                file.write("".join(json.dumps(line) + "\n" for line in lines))
                file.flush()
    if world_size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    if rank == 0:
        records = sorted(gather(stem, run).values(), key=lambda r: r["index"])
        if len(records) != count:
            raise ValueError(f"{stem}: {len(records)} of {count} examples are there: type the command again")
        for part in stem.parent.glob(f"{stem.name}.rank*.jsonl"):
            part.unlink()
        write_lines(stem.with_name(f"{stem.name}.jsonl"), run, records)
        report(args, run, records, dataset, stem)


def score_batch(segmenter, dataset, indices, args, rank):
    """Predict and compare some examples; a record for each. Broken ones stop the run, or with --skip-broken say why."""
    examples, records = [], []
    for i in indices:
        try:
            examples.append((i, dataset[i]))
        except (ValueError, OSError) as error:
            if not args.skip_broken:
                raise
            records.append({"index": i, "rank": rank, "broken": str(error)})
    masks = predict(segmenter.model, segmenter.mask_tokenizer, segmenter.text_tokenizer, [e for _, e in examples],
                    args.decode) if examples else []  # fmt: skip
    for (i, example), mask in zip(examples, masks):
        one = SegmentationMetrics()
        intersection, union, _, ahd = one.update(mask, example.mask, ignore=example.ignore)
        records.append({"index": i, "rank": rank, "id": example.id, "phrase": example.phrase, "task": example.task,
                        "label": example.label, "rle": rle_encode(mask), "intersection": intersection, "union": union,
                        "iou": one.compute()["gIoU"], "ahd": None if math.isnan(ahd) else ahd})  # fmt: skip
    return records


def gather(stem, run):
    """{index: record} of what OUT already holds of this run, finished or not; ValueError if it is of another run."""
    done = {}
    for path in sorted(stem.parent.glob(f"{stem.name}.jsonl")) + sorted(stem.parent.glob(f"{stem.name}.rank*.jsonl")):
        header, records = read_records(path)
        if header != run:
            changed = [key for key in run if header.get(key) != run[key]] if isinstance(header, dict) else ["run"]
            raise ValueError(f"{path}: is of another run (other {', '.join(changed)}): remove it, or --out elsewhere")
        done |= {record["index"]: record for record in records}
    return done


def write_lines(path, run, records):
    """Write the lines of an evaluation under a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            file.writelines(json.dumps(line) + "\n" for line in [{"run": run}, *records])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def protocol(args):
    """What the numbers mean, in words."""
    asked = ""
    if args.dataset in SEMANTIC:
        asked = " of every class" if args.classes == "all" else " of the classes present in each picture"
    return (f"prompts: the bare phrases{asked}; {args.decode} decoding; masks at the pictures' own sizes, ignored "
            "pixels left out; mIoU per class over the prompted classes; AHD in pixels at 256 x 256, over pairs with "
            "IoU > t")  # fmt: skip


def report(args, run, records, dataset, stem):
    """Print the table, write .json and .png; refuses where examples were skipped, unless asked."""
    say = sys.stderr if args.json == "-" else sys.stdout  # keep standard output clean for the JSON
    broken = [record for record in records if "broken" in record]
    records = [record for record in records if "broken" not in record]
    for record in broken:
        print(f"broken: {record['broken']}", file=say)
    if broken and not args.allow_skipped:
        raise ValueError(f"{len(broken)} of {run['count']} examples are broken: no number without them; "
                         "--allow-skipped asks for the rest's")  # fmt: skip
    total, by_task = add_up(records)
    tables = {"all": total.compute()} | {task: by_task[task].compute() for task in sorted(by_task)}
    print(f"{args.dataset}:{args.split}: {run['protocol']}", file=say)
    if broken:
        print(f"{len(broken)} broken examples are left out", file=say)
    columns = ("count", "mIoU", "cIoU", "gIoU", *(f"Pr@{t}" for t in (0.5, 0.7, 0.9)))
    rows = [("", *columns)] + [(name, *(row[c] for c in columns)) for name, row in tables.items()]
    thresholds = (0.5, 0.6, 0.7, 0.8, 0.9)
    ahd = [("", *(f"mAHD@{t} (pairs)" for t in thresholds))]
    ahd += [(name, *(f"{show(row[f'mAHD@{t}'])} ({row[f'count@{t}']})" for t in thresholds))
            for name, row in tables.items()]  # fmt: skip
    for table, width in ((rows, 10), (ahd, 18)):
        for row in table:
            print(f"{row[0]:12}" + "".join(f"{show(value):>{width}}" for value in row[1:]), file=say)
    cells = [(r["phrase"], [example.image, rle_decode(r["rle"]), example.mask])
             for r in records[:24] for example in [dataset[r["index"]]]]  # fmt: skip
    contact_sheet(cells, stem.with_name(f"{stem.name}.png"))
    result = {**run, "skipped": len(broken), **tables}
    write_json(stem.with_name(f"{stem.name}.json"), result)
    print(f"wrote {stem}.jsonl, .json and .png (picture, predicted, truth)", file=say)
    if args.json:
        put_json(result, args.json)


def show(value):
    """A cell of a table."""
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


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
    group.add_argument("--dataset", metavar="NAME", help="data set to score on: scenes, ade20k, refcoco, jsonl:PATH "
                       "... (README has the table); can be stopped and typed again, and run under torchrun")
    group.add_argument("--split", default="test", help="default: test")
    group.add_argument("--root", type=Path, help="folder in which its official archives were unpacked")
    group.add_argument("--split-by", help="splitter of a referring set: unc, google, umd, berkeley")
    group.add_argument("--classes", choices=("present", "all"),
                       help="classes asked of each picture of a semantic set (default: those that are in it)")
    group.add_argument("--skip-broken", action="store_true", help="list broken examples instead of stopping")
    group.add_argument("--allow-skipped", action="store_true", help="report numbers without the skipped examples")
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
    except (PromptTooLong, BadUsage) as error:
        parser.error(str(error))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        if torch.distributed.is_initialized():
            os._exit(1)  # the other ranks would wait for this one: torchrun ends them
        return 1
    except KeyboardInterrupt:
        print("stopped: the same command goes on with a data set where it was", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
