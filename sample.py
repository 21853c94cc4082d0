"""A picture and a prompt in, a mask out.

    python sample.py                                             # embedded picture, embedded checkpoint
    python sample.py --image x.jpg --prompt "the red circle"     # your own; --prompt can be repeated
    python sample.py --image folder --prompt "everything blue" --json masks.json
    python sample.py --image x.jpg --prompt "the red circle" --confidence sure.png --attention looks.png
    python sample.py --checkpoint janus-pro-1b --image x.jpg --chat "What is on the table?"   # words, of Janus alone
    python sample.py --bench                                     # where the time goes, drafted and plain
    python sample.py --dataset scenes --split test               # score a checkpoint on a data set
    torchrun --nproc_per_node=8 sample.py --dataset refcoco --split testA --root data --checkpoint out

For each picture and prompt, OUT gets NAME-K-PROMPT-mask.png (white object on black, at the picture's own
size) and NAME-K-PROMPT-overlay.png. In Python:

    from sample import Segmenter
    masks = Segmenter.load()(image, ["the red circle", "a sign of love"])    # bool arrays (H, W)
"""

import io
import json
import math
import os
import re
import signal
import stat
import sys
import time
from collections import Counter
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from data import (
    JSONLines,
    contact_sheet,
    load_dataset,
    open_picture,
    pad_picture,
    padded_box,
    resize_picture,
    rle_decode,
    rle_encode,
    to_pixels,
    write_picture,
)
from metrics import (
    BadUsage,
    Parser,
    SegmentationMetrics,
    add_up,
    boundary,
    nobody_reads,
    printable,
    read_records,
    whole,
    write_json,
)
from mllm import JanusPrompt, JanusSeg
from model import (
    DECODES,
    DRAFTS,
    PRESETS,
    LlamaSeg,
    clock,
    compute_dtype,
    draft_window,
    peak_memory,
    pick_device,
)
from tokenizer import VQGAN, TextTokenizer, VQGANConfig, decode_masks
from weights import ASSETS, WEIGHTS, check_source, locate, only_one, read_header, sha256_of

SEMANTIC = ("ade20k", "cocostuff", "voc20", "pc59", "pc459")
EXAMPLE = ASSETS / "example.png"
EXAMPLE_PROMPTS = ("the red circle", "the blue square", "something to wear on a finger", "a sign of love")
# The flags that each way to decode reads. Paper: 3 beams, top 3, top 0.9; the temperature is not stated, we use 1.
DECODING = {"greedy": ("draft",), "beam": ("beams",), "top-k": ("top_k", "temperature", "seed"),
            "top-p": ("top_p", "temperature", "seed"), "random": ("temperature", "seed")}  # fmt: skip
USUAL = {"draft": "auto", "beams": 3, "top_k": 3, "top_p": 0.9, "temperature": 1.0, "seed": 0}
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}


class PromptTooLong(ValueError):
    """A prompt of more tokens than the model reads."""


def checkpoint_file(checkpoint=None):
    """What to load: the model.safetensors of a folder that train.py wrote, such a file itself, or an official Janus
    directory, by path or by the name that weights.py downloads; None: the embedded one."""
    path = locate(Path(checkpoint or ASSETS))
    return path / "model.safetensors" if path.is_dir() and not (path / "config.json").is_file() else path


def check_fit(config, mask_tokenizer, text_tokenizer, where):
    """ValueError unless the tokenizers have as many codes and text pieces as the model of `config` was made for."""
    sizes = {"codes": (mask_tokenizer.config.codebook_size, config.codebook_size)}
    if isinstance(text_tokenizer, TextTokenizer):
        sizes["text pieces"] = (text_tokenizer.model.vocab_size(), config.siglip.vocab_size)
    elif text_tokenizer.bpe.vocab_size > config.vocab_size:  # Janus' table has rows to spare
        sizes["text pieces"] = (text_tokenizer.bpe.vocab_size, config.vocab_size)
    for what, (has, wants) in sizes.items():
        if has != wants:
            raise ValueError(f"{where}: {has} {what} beside a model of {wants}: not of one training run")


class Segmenter:
    """Model, mask tokenizer and text tokenizer on one device: all inference goes through here, also train.py's."""

    def __init__(self, model, mask_tokenizer, text_tokenizer):
        self.model, self.mask_tokenizer, self.text_tokenizer = model, mask_tokenizer, text_tokenizer
        self.padded = isinstance(model, JanusSeg)  # Janus keeps a picture's aspect ratio

    @property
    def device(self):
        return next(self.model.parameters()).device

    @classmethod
    def load(cls, checkpoint=None, device="auto", dtype="float32", encoder=None, mask_tokenizer=None,
             any_weights=False):  # fmt: skip
        """Open a checkpoint: the embedded one, a folder that train.py wrote, or the model.safetensors in it.

        dtype: of the model's weights, "float32", "bfloat16" or "auto" (bfloat16 where the device multiplies it fast);
        the mask tokenizer stays in float32. encoder, mask_tokenizer: where the frozen parts lie that the checkpoint
        names; default: beside it, else where `weights.py download` put them. any_weights: take others than those of the
        training. Raises FileNotFoundError or ValueError with one line that names the file.
        """
        file = checkpoint_file(checkpoint)
        device = pick_device(device)
        dtype = compute_dtype(device, dtype)[0]
        if file.is_dir() or read_header(file).get("format") == "janusseg":
            model = JanusSeg.from_pretrained(file, encoder, dtype, any_weights)
            base = file if file.is_dir() else encoder or WEIGHTS / model.frozen["mllm"]["name"]
            mask_tokenizer = VQGAN.from_pretrained(mask_tokenizer or base)
            if not any_weights:
                check_source(file, "mask_tokenizer", model.frozen, mask_tokenizer.source)
            prompt = JanusPrompt(base, model.config.siglip.image_tokens)
            check_fit(model.config, mask_tokenizer, prompt, base)
            return cls(model.to(device), mask_tokenizer.to(device), prompt).ready()
        model = LlamaSeg.from_pretrained(file, encoder, dtype, any_weights)
        if mask_tokenizer is None:
            mask_tokenizer = file.with_name("mask_tokenizer.safetensors")
            if not mask_tokenizer.exists() and "mask_tokenizer" in model.frozen:
                mask_tokenizer = WEIGHTS / model.frozen["mask_tokenizer"]["name"]
        mask_tokenizer = VQGAN.from_pretrained(mask_tokenizer)
        if not any_weights:
            check_source(file, "mask_tokenizer", model.frozen, mask_tokenizer.source)
        text_tokenizer = TextTokenizer(file.with_name("text.model"), model.config.siglip.text_length)
        if not any_weights:
            check_source(file, "text_tokenizer", model.frozen, text_tokenizer.source)
        check_fit(model.config, mask_tokenizer, text_tokenizer, file.parent)
        return cls(model.to(device), mask_tokenizer.to(device), text_tokenizer).ready()

    def ready(self):
        """Lay out the weights for decoding. Not for a model in training."""
        self.model.eval().fuse()
        return self

    def check(self, prompts):
        """ValueError for an empty prompt, PromptTooLong for one with more tokens than the model reads."""
        for prompt in prompts:
            if not prompt.strip():
                raise ValueError("empty prompt: say what to segment, as in 'the red circle'")
            needed = self.text_tokenizer.too_long(prompt)
            if needed:
                raise PromptTooLong(f"prompt {prompt[:40]!r}... has {needed} tokens, the model reads "
                                    f"{self.text_tokenizer.length}: make it shorter")  # fmt: skip

    def prepare(self, image, prompts):
        """PIL picture and n prompts -> text_ids (n, L), pixels (1, 3, S, S): what model.generate takes.

        Raises ValueError as `check` does.
        """
        self.check(prompts)
        return self.text_tokenizer(list(prompts)).to(self.device), self.pixels([image])

    def pixels(self, images):
        """b PIL pictures of any size -> what the model sees of them, (b,3,S,S)."""
        side = self.model.config.siglip.image_size
        squares = [(pad_picture if self.padded else resize_picture)(image, side) for image in images]
        return to_pixels(np.stack(squares)).to(self.device)

    def __call__(self, image, prompts, **decoding):
        """PIL picture (any mode and size) and a list of n prompts -> n bool arrays (H, W), at its own size.

        decoding: options of LlamaSeg.generate, such as decode="top-p", seed=1. The picture is encoded once.
        Raises ValueError as `check` does.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.check(prompts)
        return self.many([image], [prompts], **decoding)[0] if prompts else []

    @torch.inference_mode()
    def many(self, images, prompts, inside=None, **decoding):
        """b pictures and for each a list of n prompts, which are not checked -> for each n bool arrays (H, W).

        inside: a dict to fill with what the model saw and wrote: "text_ids" (b*n, L), "pixels", "tokens" (b*n, M).
        """
        n, pixels = len(prompts[0]), self.pixels(images)  # (b,3,S,S)
        text_ids = self.text_tokenizer([prompt for asked in prompts for prompt in asked]).to(self.device)  # (b*n,L)
        tokens = self.model.generate(text_ids, pixels, **decoding)  # (b*n,M)
        if inside is not None:
            inside.update(text_ids=text_ids, pixels=pixels, tokens=tokens)
        sizes = [image.size for image in images for _ in range(n)]
        boxes = [padded_box(*size, pixels.shape[-1]) for size in sizes] if self.padded else None
        masks = decode_masks(self.mask_tokenizer, tokens, [size[::-1] for size in sizes], boxes)
        return [masks[i:i + n] for i in range(0, len(masks), n)]

    @torch.inference_mode()
    def chat(self, image, question, length=128):
        """A question about a picture -> the answer in words, of a Janus checkpoint; ValueError for another."""
        if not self.padded:
            raise ValueError("this checkpoint writes masks only: --chat needs a Janus checkpoint")
        _, pixels = self.prepare(image, [question])
        ids = self.text_tokenizer.chat(question).to(self.device)
        answer = self.model.answer(ids, pixels, length, {self.text_tokenizer.special["eos"]})
        bpe = self.text_tokenizer.bpe  # the table has rows that are no text token
        silent = set(bpe.special_tokens.values())
        return bpe.decode([id for id in answer if id < bpe.vocab_size and id not in silent]).strip()


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
    stems = ["stdin" if source == "-" else Path(source).stem for source in found]
    often = Counter(stems)  # a.png beside a.jpg: keep the ending
    return list(zip(unique(Path(s).name if often[stem] > 1 else stem for stem, s in zip(stems, found)), found))


def unique(names):
    """The names in their order; one that was there before gets a number."""
    taken = set()
    for i, name in enumerate(names):
        while name in taken:
            name = f"{name}-{i}"
        taken.add(name)
        yield name


def read_picture(source):
    """The picture at a path, or the one that standard input holds for "-"."""
    if source != "-":
        return open_picture(source)
    if sys.stdin is None:
        raise ValueError("standard input is closed: no picture to read from it")
    return open_picture(io.BytesIO(sys.stdin.buffer.read()))


def overlay(image, mask, color=(255, 0, 160)):
    """The picture with the object tinted and outlined, everything else a little faded; PIL RGB."""
    levels = np.arange(256, dtype=np.float32)[:, None]
    tinted = (0.5 * levels + 0.5 * np.array(color, np.float32)).round().astype(np.uint8)  # (256, 3)
    faded = (0.75 * levels[:, 0] + 0.25 * 255).round().astype(np.uint8)  # (256,)
    if image.mode != "RGB":
        image = image.convert("RGB")
    result = Image.new("RGB", image.size)
    for top in range(0, image.height, 256):  # strips: a large picture must not be in memory many times
        pixels = np.asarray(image.crop((0, top, image.width, min(top + 256, image.height))))
        inside = mask[top:top + 256]
        strip = faded[pixels]
        strip[inside] = tinted[pixels[inside], np.arange(3)]
        above = min(top, 1)  # the boundary of a row depends on the rows beside it
        strip[boundary(mask[top - above:top + 257])[above:above + 256]] = color
        result.paste(Image.fromarray(strip), (0, top))
    return result


def describe(mask):
    """(area in pixels, box (left, top, width, height) or None)."""
    rows, cols = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, None
    box = (int(cols[0]), int(rows[0]), int(cols[-1] - cols[0] + 1), int(rows[-1] - rows[0] + 1))
    return int(mask.sum()), box


def confidence_picture(probabilities, size, box=(0, 0, 1, 1)):
    """Probabilities (M,) of a mask's tokens -> grey PIL picture of `size` (W, H): white is 1.

    box: where the picture stands in the square that the tokens cover: (left, top, width, height), as shares of it.
    """
    grid = math.isqrt(len(probabilities))
    values = np.asarray(probabilities, np.float32).reshape(grid, grid)
    left, top, width, height = (share * grid for share in box)
    x, y = math.floor(left), math.floor(top)  # only the tokens that the picture touches count
    values = values[y:math.ceil(top + height), x:math.ceil(left + width)]
    box = (left - x, top - y, left + width - x, top + height - y)
    large = Image.fromarray(values).resize(size, Image.Resampling.BILINEAR, box)
    return Image.fromarray((np.asarray(large).clip(0, 1) * 255).round().astype(np.uint8))


def attention_picture(weights, side=768):
    """Attention (M-1,M-1) of mask tokens on mask tokens -> PIL picture in log scale, black 1e-4 and less, yellow 1."""
    share = (np.log10(np.maximum(weights, 1e-4)) + 4) / 4  # 0 to 1
    colors = np.array([[0, 0, 0], [70, 10, 110], [190, 50, 90], [250, 150, 40], [255, 250, 170]], np.float32)
    place = share * (len(colors) - 1)
    low = np.minimum(place.astype(int), len(colors) - 2)
    mix = (place - low)[..., None]
    pixels = colors[low] * (1 - mix) + colors[low + 1] * mix
    image = Image.fromarray(pixels.round().astype(np.uint8))
    return image.resize((side, side), Image.Resampling.NEAREST)


def check_outputs(files, inputs):
    """Raise, before the work, for a file that cannot be written or would overwrite another output or an input.

    An input is recognized by the file itself, whatever name or link leads to it.
    """
    read, taken, folders = {}, set(), {}
    for file in inputs:
        with suppress(OSError):  # whoever opens it says that it is missing
            status = os.stat(file)
            read[status.st_dev, status.st_ino] = file
    for file in files:
        folder, name = os.path.split(file)
        if folder not in folders:
            folders[folder] = os.path.realpath(folder)
            if not os.access(folders[folder], os.W_OK):
                raise ValueError(f"{folder or '.'}: cannot write here")
        if (folders[folder], name) in taken:
            raise BadUsage(f"{file}: two outputs would be written to this file")
        taken.add((folders[folder], name))
        with suppress(FileNotFoundError):
            status = os.stat(file)
            if not stat.S_ISREG(status.st_mode):
                raise BadUsage(f"{file}: a folder or device, expected the name of a file to write")
            if (status.st_dev, status.st_ino) in read:
                raise BadUsage(f"{file}: would overwrite {read[status.st_dev, status.st_ino]}, which this run reads")


def checkpoint_files(args):
    """The files that model and tokenizers may be read from."""
    file, encoder = checkpoint_file(args.checkpoint), locate(args.encoder)
    folders = [folder for folder in (file, encoder, *WEIGHTS.glob("*")) if folder and folder.is_dir()]
    return [*(file.with_name(name) for name in (file.name, "mask_tokenizer.safetensors", "text.model")),
            *([locate(args.mask_tokenizer)] if args.mask_tokenizer else []),
            *(path for folder in folders for path in folder.iterdir())]  # fmt: skip


def make_folder(path):
    """Make the --out folder."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"--out {path}: a file, expected a folder")
    path.mkdir(parents=True, exist_ok=True)


def json_files(args):
    """The file that --json names, as a list: empty without the flag, and for standard output."""
    return [args.json] if args.json not in (None, "-") else []


def put_json(value, target):
    """JSON to a file, or to standard output for "-"."""
    if target == "-":
        print(json.dumps(value, indent=2))
    else:
        write_json(target, value)


@contextmanager
def json_list(target):
    """Yield a function that adds a record to a JSON list: in a file, on standard output for "-", nowhere for None.

    However the block ends, the list is whole: a file has a temporary name until then, and is renamed.
    """
    if target is None:
        yield lambda record: None
        return
    path = None if target == "-" else Path(target)
    temporary = path and path.with_name(f".{path.name}.{os.getpid()}.tmp")
    file, before = open(temporary, "w") if path else sys.stdout, ""

    def add(record):
        nonlocal before
        file.write(f"{before}\n{json.dumps(record)}")
        file.flush()
        before = ","

    try:
        file.write("[")
        try:
            yield add
        finally:
            print("\n]", file=file, flush=True)
            if path:
                os.replace(temporary, path)
    finally:
        if path:
            temporary.unlink(missing_ok=True)
            file.close()


# ----------------------------------------------------------------------------------------------------------
# the jobs


def load(args, device):
    """The Segmenter that the flags ask for."""
    segmenter = Segmenter.load(args.checkpoint, str(device), args.dtype, locate(args.encoder),
                               locate(args.mask_tokenizer), args.any_weights)  # fmt: skip
    codes = segmenter.model.config.codebook_size
    for flag, value in (("--beams", args.beams), ("--top-k", args.top_k)):
        if value > codes:
            raise BadUsage(f"{flag} {value} must be at most {codes}, the number of mask tokens to choose from")
    return segmenter


def decoding(args):
    """What model.generate takes of the flags."""
    return {"decode": args.decode} | {name: getattr(args, name) for name in DECODING[args.decode]}


def segment(args):
    """Masks and overlays of pictures, one line a mask; returns the exit code, 1 if pictures could not be read."""
    pictures = find_pictures(args.image or [EXAMPLE])
    prompts = args.prompt or EXAMPLE_PROMPTS
    if (args.confidence or args.attention) and len(pictures) > 1:
        raise BadUsage(f"--confidence and --attention are for one picture, {args.image[0]} has {len(pictures)}")
    slugs = [re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] for prompt in prompts]
    stems = list(unique(f"{os.fsdecode(os.fsencode(name)[:160])}-{k}" + f"-{slug}" * bool(slug)
                        for name, _ in pictures for k, slug in enumerate(slugs)))  # fmt: skip
    make_folder(args.out)
    named = [file for file in (*json_files(args), args.confidence, args.attention) if file]
    check_outputs([*named, *(os.path.join(args.out, f"{stem}-{kind}.png") for stem in stems for kind in KINDS)],
                  [*checkpoint_files(args), *(source for _, source in pictures if source != "-")])  # fmt: skip
    segmenter = load(args, args.device)
    segmenter.check(prompts)
    together, broken, waiting = max(1, SCORE_BATCH // len(prompts)), 0, []
    with json_list(args.json) as add:
        for i, (name, source) in enumerate(tqdm(pictures, desc="pictures", disable=len(pictures) <= together)):
            try:
                waiting.append((name, source, read_picture(source), stems[i * len(prompts):(i + 1) * len(prompts)]))
            except (ValueError, OSError) as error:
                tqdm.write(f"error: {printable(error)}", file=sys.stderr)
                broken += 1
            held = sum(image.width * image.height for _, _, image, _ in waiting) * (3 + len(prompts))
            if waiting and (len(waiting) == together or held >= MOST_BYTES or i + 1 == len(pictures)):
                segment_batch(args, segmenter, waiting, prompts, add)
                waiting.clear()
    return 1 if broken else 0


def segment_batch(args, segmenter, batch, prompts, add):
    """Segment some pictures together: (name, source, image, stems of its files), each asked all prompts."""
    say = sys.stderr if args.json == "-" else sys.stdout  # keep standard output clean for the JSON
    images, inside = [image for _, _, image, _ in batch], {}
    group = len(prompts)  # prompts at a time: fewer for a picture that fills the memory alone
    if len(images) == 1:
        group = max(1, MOST_BYTES // (images[0].width * images[0].height) - 3)
    for k in range(0, len(prompts), group):
        asked, start = prompts[k:k + group], time.perf_counter()
        masks = segmenter.many(images, [asked] * len(images), inside, **decoding(args))
        ms = 1000 * (time.perf_counter() - start) / (len(images) * len(asked))
        for (name, source, image, stems), of_image in zip(batch, masks):
            for stem, prompt, mask in zip(stems[k:], asked, of_image):
                add(keep(args, stem, name, source, image, prompt, mask, ms, say))
    if args.confidence:
        side, size = segmenter.model.config.siglip.image_size, images[0].size
        box = [n / side for n in padded_box(*size, side)] if segmenter.padded else (0, 0, 1, 1)
        sure = segmenter.model.confidence(**inside)[0].tolist()
        write_picture(confidence_picture(sure, size, box), Path(args.confidence))
    if args.attention:
        weights = segmenter.model.mask_attention(**inside)[0].float().cpu().numpy()
        write_picture(attention_picture(weights), Path(args.attention))


def chat(args):
    """An answer in words for each picture; returns the exit code, 1 if pictures could not be read."""
    pictures, segmenter = find_pictures(args.image or [EXAMPLE]), load(args, args.device)
    segmenter.check([args.chat])
    broken = 0
    for name, source in pictures:
        try:
            image = read_picture(source)
        except (ValueError, OSError) as error:
            print(f"error: {printable(error)}", file=sys.stderr)
            broken += 1
            continue
        answer = "\n".join(map(printable, segmenter.chat(image, args.chat).splitlines()))
        print(f"{printable(name)}: {answer}", flush=True)
    return 1 if broken else 0


def keep(args, stem, name, source, image, prompt, mask, ms, say):
    """Write mask and overlay of a picture's prompt, print a line, return the record for --json."""
    files = {kind: args.out / f"{stem}-{kind}.png" for kind in KINDS}
    write_picture(Image.fromarray(mask.view(np.uint8) * 255), files["mask"])
    write_picture(overlay(image, mask), files["overlay"])
    area, box = describe(mask)
    where = "nothing found" if box is None else f"box {box[0]},{box[1]} {box[2]}x{box[3]}"
    tqdm.write(printable(f"{name}: {prompt}: {area} px ({100 * area / mask.size:.1f} %), {where}, {ms:.0f} ms -> "
                         f"{files['overlay']}"), file=say)  # fmt: skip
    return {"image": str(source), "prompt": prompt, "area": area, "box": box, "rle": rle_encode(mask),
            "ms": round(ms, 1), "mask": str(files["mask"]), "overlay": str(files["overlay"])}  # fmt: skip


KINDS = ("mask", "overlay")  # the two pictures of each mask
MOST_BYTES = 192_000_000  # of the pictures that are in memory together, with their masks
SCORE_BATCH = 32  # examples decoded together; always the same ones, so that a stop or more ranks change no digit


def setup_ranks(device_name):
    """(rank, world size, device); one process unless torchrun started us."""
    if "RANK" not in os.environ:
        return 0, 1, pick_device(device_name)
    device = pick_device(device_name)
    if device.type == "cuda":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"process {local_rank} has no GPU, {torch.cuda.device_count()} are here: "
                             "lower --nproc_per_node")  # fmt: skip
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    # a rank that waits for another longer than this gives up: only a hung machine takes so long
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=20))
    return dist.get_rank(), dist.get_world_size(), device


@contextmanager
def one_rank_first():
    """The first rank of each machine runs the block before the others do, which then find the index that it wrote."""
    later = dist.is_initialized() and int(os.environ.get("LOCAL_RANK", 0)) > 0
    if later:
        dist.barrier()
    yield
    if dist.is_initialized() and not later:
        dist.barrier()


def score(args):
    """Metrics of a checkpoint on a data set, in all and by task. Under torchrun the ranks share the work.

    OUT gets NAME-SPLIT.jsonl (a line for each example), .json (the numbers) and .png (the first examples); what is not
    the default is part of NAME-SPLIT, see run_name. A killed run goes on when the same command is typed again.
    """
    rank, world_size, device = setup_ranks(args.device)
    options = {name: value for name, value in (("split_by", args.split_by), ("classes", args.classes)) if value}
    with one_rank_first():
        dataset = load_dataset(args.dataset, args.split, args.root, **options)
    count = min(args.count or len(dataset), len(dataset))
    if count == 0:
        raise ValueError(f"{args.dataset}:{args.split} has no examples")
    make_folder(args.out)
    lines = [dataset.path] if isinstance(dataset, JSONLines) else []
    check_outputs(json_files(args), [*checkpoint_files(args), *lines])
    segmenter = load(args, device)
    weights = next(segmenter.model.parameters())
    more = {"root": args.root, "data": sha256_of(lines[0]) if lines else None,
            "encoder": args.encoder if args.any_weights else None}  # fmt: skip
    same = {"draft"} if weights.dtype == torch.float32 else set()  # in float32 the mask does not depend on it
    run = {"dataset": printable(args.dataset), "split": args.split, **options, "count": count,
           **{name: printable(value) for name, value in more.items() if value},
           **{name: value for name, value in decoding(args).items() if name not in same},
           "dtype": str(weights.dtype).removeprefix("torch."), "model": identity(args.checkpoint, segmenter.model),
           "mask_tokenizer": segmenter.mask_tokenizer.source["sha256"], "protocol": protocol(args)}  # fmt: skip
    stem = args.out / run_name(args, run, len(dataset))
    check_outputs(json_files(args) + [stem.with_name(f"{stem.name}.{kind}") for kind in ("jsonl", "json", "png")], [])
    lock = stem.with_name(f".{stem.name}.lock")
    with only_one(lock) if rank == 0 else nullcontext():
        predict_rest(segmenter, dataset, run, stem, args, rank, world_size)
        if rank == 0:
            records = sorted(gather(stem, run).values(), key=lambda r: r["index"])
            if len(records) != count:
                raise ValueError(f"{stem}: {len(records)} of {count} examples are there: type the command again")
            write_lines(stem.with_name(f"{stem.name}.jsonl"), run, records)
            for part in stem.parent.glob(f"{stem.name}.rank*.jsonl"):
                part.unlink()
            report(args, run, records, dataset, stem)
            lock.unlink()


def predict_rest(segmenter, dataset, run, stem, args, rank, world_size):
    """Predict the examples that OUT does not hold yet; each rank writes its share to a file of its own."""
    done = gather(stem, run)
    if world_size > 1:
        dist.barrier()  # all ranks share out the same rest: nobody writes before everybody has read
    whole = {i for i, record in done.items() if "broken" not in record}  # what was broken is tried again
    batches = [range(i, min(i + SCORE_BATCH, run["count"])) for i in range(0, run["count"], SCORE_BATCH)]
    batches = [batch for batch in batches if not whole.issuperset(batch)][rank::world_size]
    mine = stem.with_name(f"{stem.name}.rank{rank}.jsonl")
    if batches:
        write_lines(mine, run, [r for r in done.values() if r["rank"] == rank])  # without a half-written line
        with open(mine, "a") as file:
            for batch in tqdm(batches, desc=printable(stem.name), unit="batch", disable=rank > 0):
                lines = score_batch(segmenter, dataset, batch, args, rank)
                file.write("".join(json.dumps(line) + "\n" for line in lines))
                file.flush()
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def run_name(args, run, size):
    """The name of a run's files: NAME-SPLIT where all is the default, else with what is not: scenes-test-beam-count9.

    size: examples that the split has. A checkpoint other than the embedded one is named by the start of its SHA-256.
    """
    more = [args.split_by, args.classes, args.decode if args.decode != "greedy" else None]
    more += [f"{name}{run[name]}" for name, value in USUAL.items() if run.get(name, value) != value]
    more += [f"count{run['count']}" if run["count"] < size else None]
    more += [run["dtype"] if run["dtype"] != "float32" else None]
    if args.checkpoint and run["model"] != sha256_of(checkpoint_file()):
        more.append(run["model"][:8])
    name = re.sub(r"[^A-Za-z0-9+-]+", "-", args.dataset)
    return "-".join([name, re.sub(r"[^\w+.-]+", "-", args.split), *(re.sub("[._]", "-", m) for m in more if m)])


def identity(checkpoint, model):
    """A hash that tells one checkpoint from another."""
    file = checkpoint_file(checkpoint)
    return model.frozen["mllm"]["sha256"] if file.is_dir() else sha256_of(file)


def score_batch(segmenter, dataset, indices, args, rank):
    """Predict and compare some examples; a record for each. Broken ones stop the run, or with --skip-broken say why."""
    examples, records = [], []
    for i in indices:
        try:
            example = dataset[i]
            needed = segmenter.text_tokenizer.too_long(example.phrase)
            if needed:
                raise ValueError(f"example {i} ({example.id}): its phrase has {needed} tokens, the model reads "
                                 f"{segmenter.text_tokenizer.length}")  # fmt: skip
            examples.append((i, example))
        except (ValueError, OSError) as error:
            if not args.skip_broken:
                raise
            records.append({"index": i, "rank": rank, "broken": printable(error)})
    options = decoding(args)
    if "seed" in options:  # of each example alone: neither stops nor ranks nor the batch change what is drawn
        options["seed"] = [int(np.random.SeedSequence((args.seed, i)).generate_state(1)[0]) for i, _ in examples]
    masks = segmenter.many([e.image for _, e in examples], [[e.phrase] for _, e in examples],
                           **options) if examples else []  # fmt: skip
    for (i, example), (mask,) in zip(examples, masks):
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
        if not all({"index", "rank"} | (set() if "broken" in r else {"phrase", "rle"}) <= r.keys() for r in records):
            raise ValueError(f"{path}: holds lines that sample.py does not write: remove it, or --out elsewhere")
        done |= {record["index"]: record for record in records}
    return done


def write_lines(path, run, records):
    """Write the lines of an evaluation under a temporary name, then rename it."""
    with whole(path) as temporary, open(temporary, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in [{"run": run}, *records])


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
        print(f"broken: {printable(record['broken'])}", file=say)
    if broken and not args.allow_skipped:
        raise ValueError(f"{len(broken)} of {run['count']} examples are broken: no number without them; "
                         "--allow-skipped asks for the rest's")  # fmt: skip
    if not records:
        raise ValueError(f"all {run['count']} examples are broken")
    total, by_task = add_up(records)
    tables = {"all": total.compute()} | {task: by_task[task].compute() for task in sorted(by_task)}
    print(printable(f"{args.dataset}:{args.split}: {run['protocol']}"), file=say)
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
    result = {**run, "skipped": len(broken), **tables}
    write_json(stem.with_name(f"{stem.name}.json"), result)
    cells = [(printable(r["phrase"])[:100], [example.image, rle_decode(r["rle"]), example.mask])
             for r in records[:24] for example in [dataset[r["index"]]]]  # fmt: skip
    contact_sheet(cells, stem.with_name(f"{stem.name}.png"))
    print(printable(f"wrote {stem}.jsonl, .json and .png (picture, predicted, truth)"), file=say)
    if args.json:
        put_json(result, args.json)


# ----------------------------------------------------------------------------------------------------------
# where the time goes


@torch.inference_mode()
def bench(args):
    """Medians of decoding, plain and drafted, beside what reading the weights alone would take; a table and JSON.

    The embedded default segments test scenes. LlamaSeg-B and -L have random weights, whose masks no draft can guess:
    they make as many passes for a token as the default does.
    """
    device = pick_device(args.device)
    check_outputs(json_files(args), checkpoint_files(args))
    checkpoint = load(args, device)
    if checkpoint.padded:
        raise BadUsage(f"--bench measures a LlamaSeg, {args.checkpoint} is a Janus checkpoint")
    model, mask_tokenizer = checkpoint.model, checkpoint.mask_tokenizer
    dataset = load_dataset("scenes", "test")
    examples = [dataset[i] for i in range(32)]
    text_ids = checkpoint.text_tokenizer([e.phrase for e in examples]).to(device)
    size = model.config.siglip.image_size
    pixels = to_pixels(np.stack([resize_picture(e.image, size) for e in examples])).to(device)
    large = args.bench != "default"
    if large:
        guessed = {}
        for draft in ("jacobi", "hidden"):
            model.generate(text_ids, pixels, draft=draft, window=draft_window(draft, 1, device),
                           stats=guessed.setdefault(draft, {}))  # fmt: skip
        accepted = {draft: (model.config.mask_tokens - 1) / np.mean(stats["mask_passes"])
                    for draft, stats in guessed.items()} | {"none": 1.0}  # fmt: skip
        dtype = next(model.parameters()).dtype
        with torch.device(device):
            model, mask_tokenizer = LlamaSeg(PRESETS[args.bench]).to(dtype), VQGAN(VQGANConfig())
        model.fuse()
        siglip = model.config.siglip
        text_ids = torch.zeros(32, siglip.text_length, dtype=torch.long, device=device)
        pixels = torch.zeros(32, 3, siglip.image_size, siglip.image_size, device=device)
    weights = [p for part in (model.llama, model.head) for p in part.parameters()]
    weight_bytes, dtype = sum(p.nbytes for p in weights), weights[0].dtype
    M, bandwidth = model.config.mask_tokens, matvec_bandwidth(device, dtype)
    runs = [(batch, draft) for batch in (1, 8, 32) for draft in ("none", "jacobi", "hidden")]
    if large and device.type == "cpu":
        runs = runs[:3]
    rows = []
    for batch, draft in tqdm(runs, desc="bench"):
        rounds = []
        for start in [0, *range(0, 32, batch)][:2 if large else 9]:  # the first one warms up
            ids, stats = slice(start, start + batch), {}
            if large:
                stats = replay(model, text_ids[ids], pixels[ids], draft, accepted[draft])
                tokens = torch.zeros(batch, M, dtype=torch.long, device=device)
            else:
                tokens = model.generate(text_ids[ids], pixels[ids], draft=draft, stats=stats)
            begun = clock(device)
            mask_tokenizer.decode(tokens)
            stats["vqgan_ms"] = 1000 * (clock(device) - begun)
            rounds.append(stats)
        rounds = rounds[1:] if len(rounds) > 1 else rounds
        middle = {key: float(np.median([np.mean(r[key]) for r in rounds])) for key in rounds[0]}
        ms = middle["prefill_ms"] + middle["decode_ms"] + middle["vqgan_ms"]
        a_pass = middle["decode_ms"] / middle["passes"]
        rows.append({
            "batch": batch, "draft": draft, "prefill_ms": middle["prefill_ms"], "ms_per_pass": a_pass,
            "passes_per_mask": middle["mask_passes"], "tokens_per_pass": (M - 1) / middle["mask_passes"],
            "decode_ms": middle["decode_ms"], "vqgan_ms": middle["vqgan_ms"], "masks_per_s": 1000 * batch / ms,
            "bandwidth_share": weight_bytes / bandwidth / a_pass * 1000, "peak_gb": peak_memory(device) / 1e9,
        })  # fmt: skip
    say = sys.stderr if args.json == "-" else sys.stdout
    print(f"{args.bench} on {device}, {str(dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads: "
          f"{weight_bytes / 1e9:.3f} GB of weights a pass, matrix-vector products read {bandwidth / 1e9:.1f} GB/s: "
          f"{1000 * weight_bytes / bandwidth:.2f} ms", file=say)  # fmt: skip
    print("".join(f"{name.replace('_', ' '):>17}" for name in rows[0]), file=say)
    for row in rows:
        print("".join(f"{value:>17.2f}" if isinstance(value, float) else f"{value:>17}" for value in row.values()),
              file=say)  # fmt: skip
    result = {"model": args.bench, "device": str(device), "dtype": str(dtype), "weight_bytes": weight_bytes,
              "bandwidth": bandwidth, "rows": rows}  # fmt: skip
    print(json.dumps(result), file=say)
    if args.json:
        put_json(result, args.json)


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
            "passes": passes, "mask_passes": passes}  # fmt: skip


def matvec_bandwidth(device, dtype):
    """Bytes/s at which products of a large matrix and a vector read the matrix: the limit of decoding one mask."""
    matrices = [torch.randn(8192, 4096, device=device).to(dtype) for _ in range(8)]  # more than any cache holds
    x, seconds = torch.randn(1, 4096, device=device).to(dtype), []
    for k in range(20):
        start = clock(device)
        torch.nn.functional.linear(x, matrices[k % 8])
        seconds.append(clock(device) - start)
    return matrices[0].nbytes / float(np.median(seconds[4:]))


def show(value):
    """A cell of a table."""
    return "-" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)


MODEL = {"checkpoint", "encoder", "mask_tokenizer", "any_weights", "device", "dtype"}
MASKS = MODEL | {"decode", *USUAL, "out", "json"}
READS = {  # the flags of each job
    "--bench": MODEL | {"bench", "json"},
    "--chat": MODEL | {"chat", "image"},
    "--dataset": MASKS | {"dataset", "split", "root", "split_by", "classes", "skip_broken", "allow_skipped", "count"},
    "pictures": MASKS | {"image", "prompt", "confidence", "attention"},
}


def make_parser():
    """The flags, in groups."""
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("what to segment")
    group.add_argument("--image", nargs="+", action="extend", metavar="PATH",
                       help="files, folders, or - for standard input (default: the embedded picture)")
    group.add_argument("--prompt", action="append", metavar="TEXT",
                       help="what to look for; repeat for more masks of the picture")
    group.add_argument("--chat", metavar="QUESTION", help="ask a Janus checkpoint about the picture, in words")
    group.add_argument("--out", type=Path, default=Path("out_masks"), help="folder for the PNGs (default: out_masks)")
    group.add_argument("--json", metavar="FILE", help="also write JSON with COCO run-length masks; - for stdout")
    group.add_argument("--confidence", metavar="FILE", help="write a picture of how sure each place of the mask is, "
                       "from the tokens' probabilities; for one picture and prompt")
    group.add_argument("--attention", metavar="FILE", help="write a picture of what mask tokens look at among mask "
                       "tokens, last layer, log scale; for one picture and prompt")
    group.add_argument("--bench", nargs="?", const="default", choices=("default", "llamaseg-b", "llamaseg-l"),
                       help="measure instead: the embedded checkpoint, or random weights of the paper's shapes")
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
    group.add_argument("--checkpoint", metavar="PATH", help="folder that train.py wrote, or its model.safetensors; or "
                       "a Janus directory")
    group.add_argument("--encoder", type=Path, metavar="DIR", help="frozen SigLIP or Janus that the checkpoint names "
                       "(default: where `weights.py download` put it)")
    group.add_argument("--mask-tokenizer", type=Path, metavar="FILE", help="frozen VQGAN that the checkpoint names "
                       "(default: beside the checkpoint, else where `weights.py download` put it)")
    group.add_argument("--any-weights", action="store_true",
                       help="take frozen parts other than those of the training")
    group.add_argument("--decode", choices=DECODES, default="greedy", help="default: greedy, the paper's")
    group.add_argument("--beams", type=int, metavar="N", help="sequences that beam keeps (default: %(default)s)")
    group.add_argument("--top-k", type=int, metavar="K", help="tokens that top-k draws from (default: %(default)s)")
    group.add_argument("--top-p", type=float, metavar="P", help="top-p draws from the fewest tokens that together have "
                       "this probability (default: %(default)s)")
    group.add_argument("--temperature", type=float, metavar="T", help="of top-k, top-p and random: below 1 the "
                       "likelier tokens are drawn more often (default: %(default)s)")
    group.add_argument("--seed", type=int, metavar="N", help="of top-k, top-p and random: the same seed draws the same "
                       "mask of a picture, whatever else the run segments (default: %(default)s)")
    group.add_argument("--draft", choices=DRAFTS, help="how greedy decoding guesses tokens to verify "
                       "several in a pass (default: auto, the fastest); the mask is the same in float32, in bfloat16 "
                       "rounding can change it")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps (default: auto)")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="float32",
                       help="of the weights; auto: bfloat16 where the device multiplies it fast (default: float32)")
    parser.set_defaults(**USUAL)
    return parser


def check_flags(parser, args):
    """A usage error for flags that do not go together or are out of range; returns the job, a key of READS."""
    job = ("--bench" if args.bench else "--chat" if args.chat is not None else "--dataset" if args.dataset
           else "pictures")  # fmt: skip
    parser.check_read(args, job, READS[job])
    if job == "--dataset":
        kind = args.dataset.split(":")[0]
        unread = {"scenes": "root", "jsonl": "split"}.get(kind)
        parser.check_read(args, f"--dataset {kind}", READS[job] - {unread})
    if job in ("--dataset", "pictures"):
        parser.check_read(args, f"--decode {args.decode}", READS[job] - set(USUAL) | set(DECODING[args.decode]))
    if args.allow_skipped and not args.skip_broken:
        parser.error("--allow-skipped has no use without --skip-broken")
    if args.json and Path(args.json).suffix.lower() in {".jsonl", *PICTURES}:
        parser.error(f"--json {args.json}: this is the name of a picture or of records, choose one that ends in .json")
    for flag, file in (("--confidence", args.confidence), ("--attention", args.attention)):
        if file and Path(file).suffix.lower() != ".png":
            parser.error(f"{flag} {file}: a PNG is written, so its name must end in .png")
    below = args.root and args.json and args.root.resolve() in Path(args.json).resolve().parents
    if below and Path(args.json).exists():
        parser.error(f"--json {args.json}: there is such a file below --root already")
    for text in (*(args.prompt or ()), *([] if args.chat is None else [args.chat])):
        if not text.strip():
            parser.error("empty --prompt or --chat: give it words, as in 'the red circle'")
        if any("\ud800" <= c <= "\udfff" for c in text):
            parser.error(f"{text[:40]}: a --prompt or --chat must be Unicode text in UTF-8")
    if args.image and not args.prompt and not args.chat:
        parser.error('--image needs at least one --prompt, as in --prompt "the red circle"')
    for flag, value, least in (("--count", args.count, 1), ("--beams", args.beams, 1), ("--top-k", args.top_k, 1),
                               ("--seed", args.seed, 0)):  # fmt: skip
        if value is not None and not least <= value < 2**32:
            parser.error(f"{flag} {value} must be from {least} to 2^32 - 1")
    if not 0 < args.top_p <= 1:
        parser.error(f"--top-p {args.top_p} must be above 0 and at most 1")
    if not 0.001 <= args.temperature <= 1000:
        parser.error(f"--temperature {args.temperature} must be from 0.001 to 1000")
    if (args.confidence or args.attention) and (len(args.prompt or ()) != 1 or len(args.image or ()) != 1):
        parser.error("--confidence and --attention are for one --image and one --prompt")
    try:
        pick_device(args.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    return job


def main(argv=None):
    """The command line; returns the exit code: 0, 1 for bad data, 2 for bad usage."""
    parser = make_parser()
    args = parser.parse_args(argv)
    job = check_flags(parser, args)
    try:
        code = {"--bench": bench, "--chat": chat, "--dataset": score, "pictures": segment}[job](args)
        print(end="", flush=True)
    except (PromptTooLong, BadUsage) as error:
        parser.error(str(error))
    except BrokenPipeError:
        return nobody_reads()
    except (ValueError, OSError) as error:
        print(f"error: {printable(error)}", file=sys.stderr, flush=True)
        if dist.is_initialized():
            os._exit(1)  # the other ranks would wait for this one: torchrun ends them
        return 1
    except KeyboardInterrupt:
        print("stopped" + (": type the same command to go on" if args.dataset else ""), file=sys.stderr)
        return 130
    return code or 0


if __name__ == "__main__":
    if "RANK" not in os.environ:  # torchrun ends a rank that waits for another, which Python would not notice
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, signal.default_int_handler)
    sys.exit(main())
