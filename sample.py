"""A picture and a prompt in, a mask out.

    python sample.py                                             # embedded picture, embedded checkpoint
    python sample.py --image x.jpg --prompt "the red circle"     # your own; --prompt can be repeated
    python sample.py --image folder --prompt "everything blue" --json masks.json
    python sample.py --image x.jpg --prompt "the red circle" --confidence sure.png --attention looks.png
    python sample.py --checkpoint janus-pro-1b --image x.jpg --chat "What is on the table?"   # words
    python sample.py --checkpoint argenseg-8b --image x.jpg --chat "Segment the cat, please."  # words and masks
    python sample.py --bench                                     # where the time goes, plain and drafted
    python sample.py --bench argenseg-8b --dtype bfloat16        # of random weights, beside the least time
    python sample.py --dataset scenes --split test               # score a checkpoint on a data set
    torchrun --nproc_per_node=8 sample.py --dataset refcoco --split testA --root data --checkpoint out

For each picture and prompt, OUT gets NAME-K-PROMPT-mask.png (white object on black, at the picture's own size) and
NAME-K-PROMPT-overlay.png (the object outlined, the rest faded). Where other processes keep the CPU busy, set
OMP_NUM_THREADS=1: a mask then takes about 0.1 s, with more threads it can take 5 s. In Python:

    from sample import Segmenter
    masks = Segmenter.load()(image, ["the red circle", "a sign of love"])    # bool arrays (H, W)
"""

import io
import json
import math
import os
import re
import signal
import sys
import time
import timeit
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

from data import (
    JSONLines, contact_sheet, load_dataset, load_examples, open_picture, pad_picture, padded_box, resize_picture,
    rle_decode, rle_encode, to_pixels, to_rgb, write_picture,
)
from metrics import BadUsage, Parser, SegmentationMetrics, add_up, printable, read_records, whole, write_json
from mllm import (
    MASK, VAR, ARGenSeg, ARGenSegPrompt, ChatCache, JanusPrompt, JanusSeg, ScenesPrompt, picture_mask, tiles,
)
from mllm import PRESETS as MLLM_PRESETS
from model import DECODES, DRAFTS, LlamaSeg, clock, compute_dtype, peak_memory, pick_device
from tokenizer import VQGAN, MultiScaleVQ, TextTokenizer, decode_masks, mask_to_image
from weights import ASSETS, WEIGHTS, check_source, locate, only_one, read_config, read_header, sha256_of

KINDS = ("mask", "overlay")  # the two pictures of each mask
EXAMPLE = ASSETS / "example.png"
EXAMPLE_PROMPTS = ("the red circle", "the blue square", "something to wear on a finger", "a sign of love")
# The flags that each way to decode reads. Paper: 3 beams, top 3, top 0.9; the temperature is not stated, we use 1.
DECODING = {"greedy": ("draft", "compiled"), "beam": ("beams",), "top-k": ("top_k", "temperature", "seed"),
            "top-p": ("top_p", "temperature", "seed"), "random": ("temperature", "seed")}
USUAL = {"draft": "auto", "compiled": False, "beams": 3, "top_k": 3, "top_p": 0.9, "temperature": 1.0, "seed": 0}
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm"}
MOST_BYTES = 192_000_000  # of the pictures that are in memory together, with their masks
SCORE_BATCH = 32  # examples decoded together: the same ones after a stop or on more ranks, so that no digit changes


# ---- the one path of inference -----------------------------------------------------------------------------


class Segmenter:
    """Model, mask tokenizer and text tokenizer on one device: all inference goes through here, also train.py's.
    tiles, guidance: of ARGenSeg, the most tiles of a picture, and the strength of its classifier-free guidance."""

    def __init__(self, model, mask_tokenizer, text_tokenizer):
        self.model, self.mask_tokenizer, self.text_tokenizer = model, mask_tokenizer, text_tokenizer
        self.padded = isinstance(model, JanusSeg)  # Janus keeps a picture's aspect ratio
        self.answers = isinstance(model, ARGenSeg)  # in words, with masks between them
        self.tiles, self.guidance, self.turns = 1, 0.0, None  # turns: what ARGenSeg remembers of a conversation
        if model.config.scales and not self.answers:
            model.quantizer = mask_tokenizer.quantize

    @property
    def device(self):
        return next(self.model.parameters()).device

    @classmethod
    def load(cls, checkpoint=None, device="auto", dtype="float32", encoder=None, mask_tokenizer=None,
             any_weights=False):
        """Open a checkpoint: the embedded one, a folder that train.py wrote, the model.safetensors in it, or an
        official directory of Janus or ARGenSeg. FileNotFoundError, or ValueError with one line that names the file.

        dtype: of the model's weights, "float32", "bfloat16" or "auto", see compute_dtype; the mask tokenizer stays in
        float32. encoder, mask_tokenizer: where the frozen parts lie that the checkpoint names; default: beside it, else
        where `weights.py download` put them. any_weights: take others than those of the training.
        """
        file, device = checkpoint_file(checkpoint), pick_device(device)
        dtype = compute_dtype(device, dtype)[0]
        official = file.is_dir() and read_config(file).get("model_type") == "internvl_chat"
        if official or not file.is_dir() and read_header(file).get("format") == ARGenSeg.file_format:
            if official and (encoder or any_weights):
                raise BadUsage(f"{file}: an ARGenSeg checkpoint reads no --encoder and no --any-weights")
            model = ARGenSeg.from_pretrained(file, mask_tokenizer, dtype, encoder, any_weights).to(device)
            model.fuse()
            prompt = (ARGenSegPrompt(model.directory, model.config.image_tokens) if model.directory else
                      ScenesPrompt(file.with_name("text.model"), model.config.image_tokens))
            return cls(model, model.mask_tokenizer, prompt)
        janus = file.is_dir() or read_header(file).get("format") == "janusseg"
        model = (JanusSeg if janus else LlamaSeg).from_pretrained(file, encoder, dtype, any_weights)
        if janus:
            codes = file if file.is_dir() else encoder or WEIGHTS / model.frozen["mllm"]["name"]
            text_tokenizer = JanusPrompt(codes, model.config.siglip.image_tokens)
        else:
            codes = file.with_name("mask_tokenizer.safetensors")
            text_tokenizer = TextTokenizer(file.with_name("text.model"), model.config.siglip.text_length)
            if not codes.exists() and "mask_tokenizer" in model.frozen:
                codes = WEIGHTS / model.frozen["mask_tokenizer"]["name"]
        mask_tokenizer = VQGAN.from_pretrained(mask_tokenizer or codes)
        check_parts(file, model, mask_tokenizer, text_tokenizer, any_weights)
        model.to(device).eval().fuse()  # the weights are laid out for decoding
        return cls(model, mask_tokenizer.to(device), text_tokenizer)

    def __call__(self, image, prompts, **decoding):
        """PIL picture (any mode and size) and a list of n prompts -> n bool arrays (H, W), at its own size. decoding:
        options of LlamaSeg.generate, such as decode="top-p", seed=1. ValueError as `check`."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        self.check(prompts)
        return self.many([image], [prompts], **decoding)[0] if prompts else []

    def check(self, prompts):
        """BadUsage, a ValueError, for a prompt that is empty, no Unicode, or of more tokens than the model reads."""
        for prompt in prompts:
            if not prompt.strip() or any("\ud800" <= c <= "\udfff" for c in prompt):
                raise BadUsage(f"prompt {prompt[:40]!r} is empty or not UTF-8: give a phrase, as 'the red circle'")
            if needed := self.text_tokenizer.too_long(prompt):
                raise BadUsage(f"prompt {prompt[:40]!r} has {needed} tokens, the limit is {self.text_tokenizer.length}")

    @torch.inference_mode()
    def many(self, images, prompts, inside=None, tasks=None, **decoding):
        """b pictures and for each a list of n prompts, which are not checked -> for each n bool arrays (H, W).

        tasks: of each picture, which instruction ARGenSeg gets around its prompts (default: "referring").
        inside: a dict to fill with what the model saw and wrote: "text_ids" (b*n, L), "pixels", "tokens" (b*n, M), and
        with "prompts" and "unknown" of `read` for each of them. A phrase with an unknown word has an empty mask.
        """
        if self.answers:
            return self.many_answers(images, prompts, inside, tasks or ["referring"] * len(images), decoding)
        n, pixels = len(prompts[0]), self.pixels(images)  # (b,3,S,S)
        prompts, unknown = zip(*(self.read(prompt) for asked in prompts for prompt in asked))
        text_ids = self.text_tokenizer(list(prompts)).to(self.device)  # (b*n,L)
        tokens = self.model.generate(text_ids, pixels, **decoding)  # (b*n,M)
        if inside is not None:
            inside.update(text_ids=text_ids, pixels=pixels, tokens=tokens, prompts=prompts, unknown=unknown)
        masks = self.decode(tokens, [image.size for image in images for _ in range(n)])
        masks = [np.zeros_like(mask) if words else mask for mask, words in zip(masks, unknown)]
        return [masks[i:i + n] for i in range(0, len(masks), n)]

    @torch.inference_mode()
    def decode(self, tokens, sizes):
        """Mask tokens (n,m), tensor or lists -> n bool arrays (H,W), for the n sizes (W,H) of pictures. m < M: what is
        known so far; the tokens that are not are those of an empty mask, and scales that are not add nothing."""
        tokens = torch.as_tensor(tokens, device=self.device)
        if tokens.shape[1] < self.model.config.mask_tokens and not self.model.config.scales:
            tokens = torch.cat([tokens, self.empty[:, tokens.shape[1]:].expand(len(tokens), -1)], dim=1)
        boxes = [padded_box(*size, self.model.config.siglip.image_size) for size in sizes] if self.padded else None
        return decode_masks(self.mask_tokenizer, tokens, [size[::-1] for size in sizes], boxes)

    @torch.inference_mode()
    def stream(self, image, prompt, tell, force=(), inside=None, **decoding):
        """The mask of one prompt as `many` makes it, greedily and after the first tokens `force`, a list.

        After each pass tell(start, tokens, sure, guesses) gets lists: the tokens that are decided now, from place
        `start` on, their probabilities, and what was guessed of them and those after them; None without a draft. What
        tell raises ends the decoding. An ARGenSeg, which answers in words, calls nothing.
        """
        def watch(start, logits, guesses):  # see MaskWriter.generate
            chosen, given = logits.argmax(-1), force[start:start + len(logits)]
            chosen[:len(given)] = torch.tensor(given)
            known = len(chosen) if guesses is None else 1 + int((guesses == chosen)[:-1].cumprod(0).sum())
            sure = logits[:known].softmax(-1).gather(1, chosen[:known, None])[:, 0]
            tell(start, chosen[:known].tolist(), sure.tolist(), None if guesses is None else guesses.tolist())
            return chosen

        decoding = {} if self.answers else decoding | {"watch": watch}
        return self.many([image], [[prompt]], inside, **decoding)[0][0]

    @torch.inference_mode()
    def look(self, inside, place, size, count=6):
        """What the token at a place of the mask in `inside`, as `many` fills it, looked at when it was chosen, in the
        last layer: shares of image tokens (none of Janus) and of mask tokens, those of its own scale included. Then the
        `count` likeliest tokens there: (token, probability, mask (H,W) with it alone changed, at the size (W,H))."""
        seen = [inside[part] for part in ("text_ids", "pixels", "tokens")]
        weights, M = self.model.mask_attention(*seen, whole=True)[0], seen[2].shape[1]  # (T,T)
        first = len(weights) - M  # <BOM>, which chooses the first mask token
        looks, N = weights[first + place], 0 if self.padded else self.model.config.siglip.image_tokens
        sure, tokens = self.model(*seen)[0][0, place].float().softmax(-1).topk(count)
        others = seen[2].repeat(count, 1)
        others[:, place] = tokens
        masks = self.decode(others, [size] * count)
        return (looks[first - N:first].tolist(), looks[first + (not self.model.config.scales):].tolist(),
                list(zip(tokens.tolist(), sure.tolist(), masks)))

    def many_answers(self, images, prompts, inside, tasks, decoding):
        """`many` of ARGenSeg: the first mask of its answer to the official instruction, an empty one where there is
        none. inside: "answers" are its words."""
        usual = {**USUAL, "decode": "greedy"}
        if given := {name: value for name, value in decoding.items() if value != usual.get(name)}:
            raise BadUsage(f"{given} has no use with an ARGenSeg checkpoint, which decodes greedily")
        answers = [[self.chat(image, self.text_tokenizer.instruction(prompt, task), 128) for prompt in asked]
                   for image, asked, task in zip(images, prompts, tasks)]
        if inside is not None:
            words = [words for row in answers for words, _ in row]
            inside.update(prompts=[p for asked in prompts for p in asked], unknown=[[]] * len(words), answers=words)
        return [[masks[0] if masks else np.zeros(image.size[::-1], bool) for _, masks in row]
                for image, row in zip(images, answers)]

    def read(self, prompt):
        """A prompt -> the prompt as the model reads it, and the words in it that the model does not know. A word that
        differs by one letter from a single one of config.names is read as that: "circel" as "circle"."""
        config, unknown = self.model.config, []
        known = set(getattr(config, "words", ()))
        for word in words_of(prompt) if known else ():
            if word not in known:
                near = [name for name in config.names if min(len(word), len(name)) > 3 and one_edit_apart(word, name)]
                if len(near) == 1:
                    prompt = re.sub(rf"\b{re.escape(word)}\b", near[0], prompt, flags=re.IGNORECASE)
                else:
                    unknown.append(word)
        return prompt, unknown

    @cached_property
    def empty(self):
        """The mask tokens of an empty mask: (1,M)."""
        side = self.model.config.mask_grid * self.mask_tokenizer.config.downsample
        return self.mask_tokenizer.encode(mask_to_image(torch.zeros(1, side, side, dtype=bool, device=self.device)))

    @torch.inference_mode()
    def there(self, inside):
        """The probability that what each phrase names is in its picture, a list of floats: 1 minus the probability that
        the model gives the tokens of an empty mask, and 0 if a word is unknown. inside: as `many` fills it."""
        tokens = self.empty.expand(len(inside["text_ids"]), -1)
        sure = self.model.confidence(inside["text_ids"], inside["pixels"], tokens)  # (B,M)
        found = 1 - sure.double().log().sum(1).exp()
        return [0.0 if words else p for words, p in zip(inside["unknown"], found.tolist())]

    def pixels(self, images):
        """b PIL pictures of any size -> what the model sees of them, (b,3,S,S), or all their tiles for ARGenSeg."""
        side = self.model.config.siglip.image_size
        if self.answers:
            return torch.cat([tiles(to_rgb(image), side, self.tiles) for image in images]).to(self.device)
        squares = [(pad_picture if self.padded else resize_picture)(image, side) for image in images]
        return to_pixels(np.stack(squares)).to(self.device)

    def prepare(self, image, prompts):
        """PIL picture, n prompts -> text_ids (n,L), pixels (1,3,S,S) for model.generate; ValueError as `check`."""
        self.check(prompts)
        pixels = self.pixels([image])
        count = [len(pixels)] if self.answers else []
        return self.text_tokenizer([self.read(p)[0] for p in prompts], *count).to(self.device), pixels

    @torch.inference_mode()
    def chat(self, image, messages, length=None):
        """A conversation about a picture -> (words of the answer, masks), of an MLLM; ValueError for another model.

        image: PIL, for ARGenSeg also None; messages: the user's words, or a list user, answer, user, ... for ARGenSeg.
        The words have "<mask>" where a mask stands; masks: a list of bool (H,W) at the picture's own size, none of
        Janus. length: tokens of the answer, at most; a longer one of ARGenSeg is cut, and standard error tells.
        """
        messages = [messages] if isinstance(messages, str) else list(messages)
        if not (self.padded or self.answers):
            raise ValueError("this checkpoint writes masks only: --chat needs an ARGenSeg or Janus checkpoint")
        if len(messages) % 2 == 0 or self.padded and (image is None or len(messages) > 1):
            raise ValueError(f"{len(messages)} messages{'' if image else ' without a picture'}: want the user's words, "
                             "an answer, the user's words and so on; Janus takes one question about a picture")
        self.check(messages[::2])
        prompt, pixels = self.text_tokenizer, None if image is None else self.pixels([image])
        if self.padded:
            ids = prompt.chat(messages[0]).to(self.device)
            return prompt.decode(self.model.answer(ids, pixels, length or 128, {prompt.eos})), []
        count, length = 0 if pixels is None else len(pixels), length or 1024
        ids = prompt.chat(messages, count)
        if self.guidance:
            ids = prompt.pad_left([ids, prompt.chat([prompt.nothing], count)])
        found, codes, self.turns = self.model.answer(ids.to(self.device), pixels, length, self.guidance, self.turns)
        if found[0, -1] != self.model.config.stop_id:
            print(f"the answer is cut: it did not end within {length} tokens", file=sys.stderr)
        masks = [picture_mask(self.mask_tokenizer.decode(tokens)[0], image and image.size) for tokens in codes]
        return prompt.decode(found[0].tolist()), masks


def words_of(prompt):
    """The words of a prompt, in lower case."""
    return re.findall(r"[\w']+", prompt.lower())


def one_edit_apart(a, b):
    """True if one letter more, less, changed or swapped with the next makes one word of the other."""
    a, b = sorted((a, b), key=len)
    same = next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), len(a))  # so many letters in front agree
    if len(a) < len(b):
        return a[same:] == b[same + 1:]
    swapped = a[same + 1:same + 2] + a[same:same + 1] + a[same + 2:]
    return a[same + 1:] == b[same + 1:] or swapped == b[same:]


def checkpoint_file(checkpoint=None):
    """What to load: the model.safetensors of a folder that train.py wrote, such a file itself, or an official Janus
    directory, by path or by the name that weights.py downloads; None: the embedded one."""
    path = locate(Path(checkpoint or ASSETS))
    return path / "model.safetensors" if path.is_dir() and not (path / "config.json").is_file() else path


def check_parts(file, model, mask_tokenizer, text_tokenizer, any_weights):
    """ValueError unless `model`, which `file` holds, was trained with these tokenizers, or with others that fit it
    where any_weights allows them. Returns {part: {"name", "sha256"}} of the tokenizers."""
    config, janus = model.config, isinstance(text_tokenizer, JanusPrompt)
    sources = {"mask_tokenizer": mask_tokenizer.source}
    if not janus:  # its text tokenizer is part of its directory
        sources["text_tokenizer"] = text_tokenizer.source
    for part, source in sources.items() if not any_weights else ():
        check_source(file, part, model.frozen, source)
    pieces = text_tokenizer.bpe.vocab_size if janus else text_tokenizer.model.vocab_size()
    most, codes = config.vocab_size if janus else config.siglip.vocab_size, mask_tokenizer.config.codebook_size
    fits = pieces <= most if janus else pieces == most  # Janus' table has rows to spare
    if mask_tokenizer.config.scales != config.scales:
        raise ValueError(f"{file}: a mask tokenizer of scales {mask_tokenizer.config.scales} beside a model of "
                         f"{config.scales}: not of one training run")
    if codes != config.codebook_size or not fits:
        raise ValueError(f"{file}: {codes} codes and {pieces} text pieces beside a model of {config.codebook_size} "
                         f"and {most}: not of one training run")
    return sources


# ---- python sample.py: pictures to masks, or to words ------------------------------------------------------


def segment(args):
    """Masks and overlays of pictures, one line per mask; returns the exit code, 1 if pictures could not be read."""
    pictures, prompts, records, broken = find_pictures(args.image), args.prompt or EXAMPLE_PROMPTS, [], []
    if (args.confidence or args.attention) and len(pictures) * len(prompts) > 1:
        raise BadUsage("--confidence and --attention are for one picture and one --prompt")
    segmenter = load(args)
    segmenter.check(prompts)
    names = picture_names(pictures)
    stems = mask_stems(names, prompts)
    args.out.mkdir(parents=True, exist_ok=True)
    check_outputs(args, [os.path.join(args.out, f"{stem}-{kind}.png") for stem in stems for kind in KINDS], pictures)
    try:
        for batch in batches(pictures, len(prompts), broken):
            images, inside, start = [image for _, image in batch], {}, time.perf_counter()
            masks = segmenter.many(images, [prompts] * len(batch), inside, **decoding(args))
            ms = 1000 * (time.perf_counter() - start) / (len(batch) * len(prompts))
            there = None if "answers" in inside else segmenter.there(inside)
            for row, (i, image) in enumerate(batch):
                for k, mask in enumerate(masks[row]):
                    at = row * len(prompts) + k
                    described = {"image": str(pictures[i]), "prompt": prompts[k], "read_as": inside["prompts"][at],
                                 "unknown": inside["unknown"][at]}
                    described |= {"there": round(there[at], 4)} if there else {"answer": inside["answers"][at]}
                    stem, title = stems[i * len(prompts) + k], f"{names[i]}: {prompts[k]}"
                    records.append(described | keep(args, title, stem, image, mask, described, ms))
            explain(args, segmenter, images[0], inside)
            del images, image, masks, mask  # large pictures leave the memory before others are read
    finally:
        if args.json:  # of what is done, however the run ends
            write_json(args.json, records)
    return 1 if broken else 0


def batches(pictures, count, broken):
    """Read the pictures, each with `count` prompts; yield those that are segmented together, [(index, image), ...].
    MOST_BYTES bounds their pixels and masks. Of a picture that cannot be read the index is appended to `broken`."""
    together, waiting = max(1, SCORE_BATCH // count), []
    for i, source in enumerate(tqdm(pictures, desc="pictures", disable=len(pictures) <= together)):
        try:
            waiting.append((i, open_picture(io.BytesIO(sys.stdin.buffer.read()) if source == "-" else source)))
        except (ValueError, OSError) as error:
            tqdm.write(f"error: {printable(error)}", file=sys.stderr)
            broken.append(i)
        size = sum(image.width * image.height * (3 + count) for _, image in waiting)
        if waiting and (len(waiting) == together or size >= MOST_BYTES or i + 1 == len(pictures)):
            yield waiting
            waiting.clear()


def keep(args, title, stem, image, mask, described, ms):
    """Write mask and overlay of a picture's prompt, print a line that begins with `title`; what --json says of it
    besides `described`."""
    mask_file, overlay_file = (args.out / f"{stem}-{kind}.png" for kind in KINDS)
    mask_picture = Image.fromarray(mask.view(np.uint8) * 255)
    write_picture(mask_picture, mask_file)
    write_picture(overlay(image, mask), overlay_file)
    area, corners = int(mask.sum()), mask_picture.getbbox()
    box = corners and (*corners[:2], corners[2] - corners[0], corners[3] - corners[1])
    where = "{} px ({:.1f} %), box {},{} {}x{}".format(area, 100 * area / mask.size, *box) if box else "nothing found"
    if described["unknown"]:
        where += f" (unknown word: {', '.join(described['unknown'])})"
    if described["read_as"] != described["prompt"]:
        where += f" (read as {described['read_as']!r})"
    if "there" in described:
        where += f", {100 * described['there']:.0f} % sure that it is there"
    elif MASK not in described["answer"]:
        where += f" (the answer: {described['answer']})"
    tqdm.write(printable(f"{title}: {where}, {ms:.0f} ms -> {overlay_file}"), file=lines_to(args))
    return {"area": area, "box": box, "rle": rle_encode(mask), "ms": round(ms, 1), "mask": str(mask_file),
            "overlay": str(overlay_file)}


def explain(args, segmenter, image, inside):
    """Write what --confidence and --attention ask for, of the one picture and prompt; inside: what `many` filled."""
    seen = [inside.get(name) for name in ("text_ids", "pixels", "tokens")]
    if args.confidence:
        side = segmenter.model.config.siglip.image_size
        box = [n / side for n in padded_box(*image.size, side)] if segmenter.padded else (0, 0, 1, 1)
        sure = segmenter.model.confidence(*seen)[0].tolist()
        write_picture(confidence_picture(sure, image.size, box), args.confidence)
    if args.attention:
        weights = segmenter.model.mask_attention(*seen)[0].float().cpu().numpy()
        write_picture(attention_picture(weights), args.attention)


def chat(args):
    """An answer for each picture and question, in words, and its masks as `segment` writes them; returns the exit code,
    1 if pictures could not be read. Several questions are one conversation."""
    pictures, segmenter, broken = find_pictures(args.image), load(args), []
    segmenter.check(args.chat)
    names = picture_names(pictures)
    stems = mask_stems(names, args.chat)
    for batch in batches(pictures, 1, broken):
        for i, image in batch:
            messages = []
            for k, question in enumerate(args.chat):
                start = time.perf_counter()
                words, masks = segmenter.chat(image, [*messages, question])
                ms = 1000 * (time.perf_counter() - start)
                messages += [question, words]
                answer = "\n".join(map(printable, words.splitlines()))
                print(f"{printable(names[i])}: {answer}", flush=True)
                described = {"prompt": question, "read_as": question, "unknown": [], "answer": words}
                for n, mask in enumerate(masks):
                    stem = f"{stems[i * len(args.chat) + k]}-{n}"
                    args.out.mkdir(parents=True, exist_ok=True)
                    check_outputs(args, [os.path.join(args.out, f"{stem}-{kind}.png") for kind in KINDS], pictures)
                    keep(args, MASK, stem, image, mask, described, ms)
    return 1 if broken else 0


def load(args):
    """The Segmenter that the flags ask for."""
    segmenter = Segmenter.load(args.checkpoint, args.device, args.dtype, locate(args.encoder),
                               locate(args.mask_tokenizer), args.any_weights)
    unread = {"confidence", "attention"} if segmenter.answers else ANSWERS
    if given := [flag for flag in sorted(unread) if getattr(args, flag)]:
        raise BadUsage(f"--{given[0].replace('_', '-')} has no use with the checkpoint {args.checkpoint}")
    segmenter.tiles, segmenter.guidance = args.tiles or 1, args.cfg or 0.0
    return segmenter


def decoding(args):
    """The options of model.generate that the flags ask for."""
    return {"decode": args.decode} | {name: getattr(args, name) for name in DECODING[args.decode]}


def lines_to(args):
    """Where lines for people go: `--json -` keeps standard output clean for the JSON."""
    return sys.stderr if args.json == "-" else sys.stdout


# ---- files -------------------------------------------------------------------------------------------------


def find_pictures(sources):
    """What --image names, files, folders (their pictures, sorted; else the folder itself) and "-", as a list."""
    found = []
    for source in sources or [EXAMPLE]:
        folder = Path(source).iterdir() if source != "-" and Path(source).is_dir() else []
        found += sorted(path for path in folder if path.suffix.lower() in PICTURES) or [source]
    return found


def picture_names(pictures):
    """A name for each picture in lines and files: without its ending, unless another one has the same name then."""
    stems = ["stdin" if source == "-" else Path(source).stem for source in pictures]
    count = Counter(stems)
    return [stem if count[stem] == 1 else Path(source).name for stem, source in zip(stems, pictures)]


def mask_stems(names, prompts):
    """What the names of the files of each picture and prompt begin with, pictures first: no two are the same."""
    slugs, stems = [re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40] for prompt in prompts], {}
    for i, name in enumerate(names):
        for k, slug in enumerate(slugs):
            stem = f"{os.fsdecode(os.fsencode(name)[:160])}-{k}-{slug}".rstrip("-")
            while stem in stems:  # of another picture
                stem = f"{stem}-{i}"
            stems[stem] = None
    return list(stems)


def check_outputs(args, files, inputs):
    """Raise, before the work, for an output that cannot be written or would overwrite an input or another output.
    files: outputs besides those of --json, --confidence and --attention. An input is known by any link."""
    files = [file for file in (args.json, args.confidence, args.attention, *files) if file not in (None, "-")]
    real, read, taken = cache(os.path.realpath), {os.path.realpath(file) for file in inputs}, set()
    for path in files:
        folder, name = os.path.split(path)
        file = os.path.join(real(folder), name)  # cached: there may be 100,000 files in one folder
        if not os.access(real(folder), os.W_OK):
            raise ValueError(f"{folder or '.'}: cannot write here")
        if file in taken:
            raise BadUsage(f"{file}: two outputs would be written to this file")
        taken.add(file)
        if os.path.exists(file) and (not os.path.isfile(file) or os.path.realpath(file) in read):
            raise BadUsage(f"{file}: this run reads it, or it is no file: give the output another name")
    for folder in (args.root, checkpoint_file(args.checkpoint), locate(args.encoder), WEIGHTS):  # they hold JSON
        if folder and args.json and os.path.exists(args.json) and folder.resolve() in Path(args.json).resolve().parents:
            raise BadUsage(f"--json {args.json}: there is such a file already, and this run reads files of {folder}")


# ---- pictures that are made --------------------------------------------------------------------------------


def overlay(image, mask):
    """The picture with everything but the object faded, and the object outlined in white and black, one of which stands
    off from any surroundings; PIL RGB. The lines lie outside the object and are the thicker the larger the picture."""
    line, picture = 1 + max(image.size) // 300, image.convert("RGB")
    white = grow(mask, line)
    result = picture.point([round(0.4 * value + 0.6 * 255) for value in range(256)] * 3)
    for color, where in (("black", grow(white, line)), ("white", white), (picture, mask)):
        result.paste(color, None, Image.fromarray(where))
    return result


def grow(mask, steps):
    """A mask (H, W) grown by so many pixels, nearly round: by the 4 and the 8 neighbours in turn."""
    for step in range(steps):
        grown = mask.copy()
        grown[1:] |= mask[:-1]
        grown[:-1] |= mask[1:]
        beside = grown.copy() if step % 2 else mask
        grown[:, 1:] |= beside[:, :-1]
        grown[:, :-1] |= beside[:, 1:]
        mask = grown
    return mask


def confidence_picture(probabilities, size, box=(0, 0, 1, 1)):
    """Probabilities (M,) of a mask's tokens -> grey PIL picture of `size` (W, H): white is 1. box: where the picture
    stands in the square that the tokens cover: (left, top, width, height), as shares of it."""
    grid = math.isqrt(len(probabilities))
    left, top, width, height = (share * grid for share in box)
    x, y = math.floor(left), math.floor(top)  # only the tokens that the picture touches count
    values = np.asarray(probabilities, np.float32).reshape(grid, grid)
    values = values[y:math.ceil(top + height), x:math.ceil(left + width)]
    box = (left - x, top - y, left + width - x, top + height - y)
    large = Image.fromarray(values).resize(size, Image.Resampling.BILINEAR, box)
    return Image.fromarray((np.asarray(large).clip(0, 1) * 255).round().astype(np.uint8))


def attention_picture(weights, side=768):
    """Attention (M-1,M-1) of mask tokens on mask tokens -> PIL picture in log scale, black 1e-4 and less, yellow 1."""
    share = (np.log10(np.maximum(weights, 1e-4)) + 4) / 4  # 0 to 1
    colors = np.array([[0, 0, 0], [70, 10, 110], [190, 50, 90], [250, 150, 40], [255, 250, 170]])
    pixels = np.stack([np.interp(share, np.linspace(0, 1, len(colors)), channel) for channel in colors.T], axis=-1)
    return Image.fromarray(pixels.round().astype(np.uint8)).resize((side, side), Image.Resampling.NEAREST)


# ---- python sample.py --dataset: scores of a data set ------------------------------------------------------


def setup_ranks(device_name):
    """(rank, world size, device); one process unless torchrun started us."""
    device = pick_device(device_name)
    if "RANK" not in os.environ:
        return 0, 1, device
    if device.type == "cuda":
        device = pick_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")  # ValueError for more processes than GPUs
        torch.cuda.set_device(device)
    # a rank that waits for another longer than this gives up: only a hung machine takes so long
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=20))
    return dist.get_rank(), dist.get_world_size(), device


def from_all_ranks(value):
    """The value of each rank, in a list that all ranks get."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


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
    args.device = str(device)
    options = {name: getattr(args, name) for name in ("split_by", "classes") if getattr(args, name)}
    with one_rank_first():
        dataset = load_examples(args.dataset, args.split, args.root, **options)
    count = min(args.count or len(dataset), len(dataset))
    if count == 0:
        raise ValueError(f"{args.dataset}:{args.split} has no examples")
    segmenter = load(args)
    lines = [dataset.path] if isinstance(dataset, JSONLines) else []
    run = run_header(args, options, count, lines, segmenter)
    stem = args.out / run_name(args, run, len(dataset))
    path, lock = Path(f"{stem}.jsonl"), stem.with_name(f".{stem.name}.lock")
    args.out.mkdir(parents=True, exist_ok=True)
    check_outputs(args, [path, f"{stem}.json", f"{stem}.png"], lines)
    with only_one(lock) if rank == 0 else nullcontext():
        predict_rest(lambda indices: score_batch(segmenter, dataset, indices, args), run, path, rank, world_size)
        if rank == 0:
            report(args, run, sorted(read_records(path)[1], key=lambda record: record["index"]), dataset, stem)
            lock.unlink()


def run_header(args, options, count, lines, segmenter):
    """All that the numbers of a run depend on, and what they mean in words: records of another run are not its own."""
    file, dtype = checkpoint_file(args.checkpoint), next(segmenter.model.parameters()).dtype
    same = {"draft", "compiled"} if dtype == torch.float32 else set()  # in float32 the mask does not depend on them
    classes = "every class" if args.classes == "all" else "the classes present in each picture"
    asked = "the official instruction of its task around a phrase" if segmenter.answers else "the bare phrases"
    return {
        "dataset": printable(args.dataset), "split": args.split, **options, "root": args.root and printable(args.root),
        "data": sha256_of(lines[0]) if lines else None,
        "encoder": printable(args.encoder) if args.encoder and args.any_weights else None,
        **{name: value for name, value in decoding(args).items() if name not in same},
        **{name: getattr(args, name) for name in sorted(ANSWERS) if getattr(args, name)},
        "count": count, "dtype": str(dtype).removeprefix("torch."),
        "model": segmenter.model.frozen["mllm"]["sha256"] if file.is_dir() else sha256_of(file),
        "mask_tokenizer": segmenter.mask_tokenizer.source["sha256"],
        "protocol": f"prompts: {asked}, of semantic sets those of {classes}; {args.decode} decoding; "
                    "masks at the pictures' own sizes, ignored pixels left out; mIoU per class over the prompted "
                    "classes; AHD in pixels at 256 x 256, over pairs with IoU > t",
    }


def run_name(args, run, size):
    """The name of a run's files: NAME-SPLIT where all is the default, else with what is not: scenes-test-beam-count9.
    size: examples that the split has. A checkpoint other than the embedded one is named by the start of its SHA-256."""
    usual = {**USUAL, **dict.fromkeys(ANSWERS), "split_by": None, "classes": None, "decode": "greedy", "count": size,
             "dtype": "float32", "model": sha256_of(checkpoint_file())}
    more = [value[:8] if isinstance(value, str) else f"{name}{value}"
            for name, value in run.items() if usual.get(name, value) != value]
    name = re.sub(r"[^A-Za-z0-9+-]+", "-", args.dataset)
    return "-".join([name, re.sub(r"[^\w+.-]+", "-", args.split), *(re.sub("[._]", "-", part) for part in more)])


def predict_rest(predict, run, path, rank, world_size):
    """Predict the examples that the .jsonl at `path` lacks. The ranks share them, the first one writes them.
    predict: a list of indices -> a record for each."""
    batches = from_all_ranks(open_lines(path, run) if rank == 0 else None)[0]
    with open(path, "a") if rank == 0 else nullcontext() as file:
        # as many turns on each rank: in the last one some have no batch
        for i in tqdm(range(rank, len(batches) + rank, world_size), desc=printable(path.stem), disable=rank > 0):
            mine = predict(batches[i]) if i < len(batches) else []
            lines = [json.dumps(record) + "\n" for records in from_all_ranks(mine) for record in records]
            if rank == 0:
                file.write("".join(lines))
                file.flush()
    if dist.is_initialized():
        dist.destroy_process_group()


def open_lines(path, run):
    """Write the .jsonl of a run with what an earlier start left in it; returns the indices to predict, in batches.
    ValueError for a file of another run."""
    header, records = read_records(path) if path.exists() else (run, [])
    if changed := [key for key in {**run, **header} if header.get(key) != run.get(key)]:
        raise ValueError(f"{path}: is of another run (other {', '.join(changed)}): remove it, or --out elsewhere")
    done = {record["index"]: record for record in records if "broken" not in record}  # those are tried again
    with whole(path) as temporary, open(temporary, "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in [{"run": run}, *done.values()])
    rest = [i for i in range(run["count"]) if i not in done]
    return [rest[i:i + SCORE_BATCH] for i in range(0, len(rest), SCORE_BATCH)]


def score_batch(segmenter, dataset, indices, args):
    """Predict and compare some examples; a record for each. Broken ones stop the run, or with --skip-broken say why."""
    examples, records = [], []
    for i in indices:
        try:
            example = dataset[i]
            if needed := segmenter.text_tokenizer.too_long(example.phrase):
                raise ValueError(f"example {i} ({example.id}): its phrase has {needed} tokens, the model reads "
                                 f"{segmenter.text_tokenizer.length}")
            examples.append((i, example))
        except (ValueError, OSError) as error:
            if not args.skip_broken:
                raise
            records.append({"index": i, "broken": printable(error)})
    if not examples:
        return records
    options = decoding(args)
    if "seed" in options:  # of each example alone: neither stops nor ranks nor the batch change what is drawn
        options["seed"] = [int(np.random.SeedSequence((args.seed, i)).generate_state(1)[0]) for i, _ in examples]
    return records + score_examples(segmenter, examples, **options)


def score_examples(segmenter, examples, **decoding):
    """Masks of examples, [(index, Example), ...], against the truth at the pictures' own sizes; a record for each."""
    asked, tasks, records = [[e.phrase] for _, e in examples], [e.task for _, e in examples], []
    masks = segmenter.many([e.image for _, e in examples], asked, tasks=tasks, **decoding)
    for (i, example), (mask,) in zip(examples, masks):
        intersection, union, _, ahd = SegmentationMetrics().update(mask, example.mask, ignore=example.ignore)
        records.append({"index": i, "id": example.id, "phrase": example.phrase, "task": example.task,
                        "label": example.label, "rle": rle_encode(mask), "intersection": intersection, "union": union,
                        "iou": intersection / union if union else 1.0, "ahd": None if math.isnan(ahd) else ahd})
    return records


def contact_sheet_of(records, dataset, path):
    """Write a PNG of the first examples: picture, predicted mask, truth."""
    shown = [(record, dataset[record["index"]]) for record in records[:24]]
    cells = [(e.phrase, [e.image, rle_decode(record.get("rle")), e.mask]) for record, e in shown]
    contact_sheet(cells, path, headings=("picture", "predicted", "truth"))


def report(args, run, records, dataset, stem):
    """Print the tables, write .json and .png; refuses where examples were skipped, unless asked."""
    say, good = lines_to(args), [record for record in records if "broken" not in record]
    for reason in (record["broken"] for record in records if "broken" in record):
        print(f"broken: {printable(reason)}", file=say)
    skipped = len(records) - len(good)
    if not good or skipped and not args.allow_skipped:
        raise ValueError(f"{skipped} of {run['count']} examples are broken: no number without them; "
                         "--allow-skipped asks for the rest's")
    total, by_task = add_up(records)
    tables = {"all": total.compute()} | {task: by_task[task].compute() for task in sorted(by_task)}
    print(printable(f"{args.dataset}:{args.split}: {run['protocol']}"), file=say)
    for keys in (("count", "mIoU", "cIoU", "gIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9"),
                 [f"{name}@0.{d}" for d in range(5, 10) for name in ("mAHD", "count")]):
        print_table([{"": name} | {key: numbers[key] for key in keys} for name, numbers in tables.items()], say)
    contact_sheet_of(good, dataset, f"{stem}.png")
    print(printable(f"wrote {stem}.jsonl, .json and .png"), file=say)
    for target in filter(None, (f"{stem}.json", args.json)):
        write_json(target, {**run, "skipped": skipped, **tables})


def print_table(rows, file, digits=4):
    """Print rows, dicts with the same keys, under their keys; "-" stands for None."""
    lines = [list(rows[0])]
    for row in rows:
        lines.append([f"{value:.{digits}f}" if isinstance(value, float) else "-" if value is None else str(value)
                      for value in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths)), file=file)


# ---- python sample.py --bench: where the time goes ---------------------------------------------------------


@torch.inference_mode()
def bench(args):
    """Measure the checkpoint on drawn test scenes, plain and drafted; a table and JSON."""
    check_outputs(args, [], [])
    if args.bench is not True:
        return bench_answers(args)
    segmenter = load(args)
    if segmenter.padded or segmenter.answers:
        raise BadUsage(f"--bench measures a LlamaSeg, not Janus or ARGenSeg as in {args.checkpoint}")
    device, dtype, dataset = segmenter.device, next(segmenter.model.parameters()).dtype, load_dataset("scenes", "test")
    examples = [dataset[i] for i in range(32)]
    text_ids = segmenter.text_tokenizer([e.phrase for e in examples]).to(device)
    pixels = segmenter.pixels([e.image for e in examples])
    runs = [(batch, draft) for batch in (1, 8, 32) for draft in ("none", "jacobi", "hidden")]
    rows = [bench_row(segmenter, text_ids, pixels, *run) for run in tqdm(runs, desc="bench")]
    report_bench(args, str(args.checkpoint or "default"), device, dtype, rows)


def report_bench(args, name, device, dtype, rows):
    """Print and write what was measured."""
    head = {"model": name, "device": str(device), "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads()}
    print(", ".join(f"{name} {value}" for name, value in head.items()), file=lines_to(args))
    print_table(rows, lines_to(args), digits=2)
    result = head | {"rows": rows}
    print(json.dumps(result), file=lines_to(args))
    if args.json:
        write_json(args.json, result)


def bench_row(segmenter, text_ids, pixels, batch, draft, rounds=8):
    """Medians of at most so many rounds of decoding a batch and of the VQGAN, as a row. text_ids (32,L)."""
    measured = []
    for start in [0, *range(0, 32, batch)][:1 + rounds]:
        some, stats = slice(start, start + batch), {}
        tokens = segmenter.model.generate(text_ids[some], pixels[some], draft=draft, stats=stats)
        begun = clock(tokens.device)
        segmenter.mask_tokenizer.decode(tokens)
        measured.append(stats | {"vqgan_ms": 1000 * (clock(tokens.device) - begun)})
    prefill, decode, vqgan, passes, mask_passes = (
        float(np.median([np.mean(one[key]) for one in measured[1:]]))  # the first one warms up
        for key in ("prefill_ms", "decode_ms", "vqgan_ms", "passes", "mask_passes"))
    return {"batch": batch, "draft": draft, "prefill_ms": prefill, "ms_per_pass": decode / passes,
            "passes_per_mask": mask_passes, "decode_ms": decode, "vqgan_ms": vqgan,
            "masks_per_s": 1000 * batch / (prefill + decode + vqgan), "peak_gb": peak_memory(segmenter.device) / 1e9}


def bench_answers(args, words=128, rounds=3):
    """Measure random weights of an ARGenSeg's shape on a prompt of so many words and one picture, whatever they write.

    The floor of a step is the longer of two times: of its multiplications at matmul_rate, and of reading once per pass
    the weights that it needs, at the rate at which a large tensor is copied.
    """
    device = pick_device(args.device)
    config, dtype = MLLM_PRESETS[args.bench], compute_dtype(device, args.dtype)[0]
    with torch.device("meta"):
        model = ARGenSeg(config)
    model.to(dtype).to_empty(device=device).eval().fuse()
    for p in model.parameters():
        p.normal_(std=0.02)
    code = {"codebook_size": config.codebook_size, "codebook_dim": config.code_width, "scales": config.scales}
    model.mask_tokenizer = MultiScaleVQ(replace(VAR, **code)).to(device)
    text_ids = torch.full((1, words + config.image_tokens), 5, device=device)
    text_ids[:, 40:40 + config.image_tokens] = config.image_id
    pixels = torch.zeros(1, 3, *[config.siglip.image_size] * 2, device=device)

    def steps():
        cache, start = ChatCache(model, 1), torch.tensor([config.start_id], device=device)
        yield
        model.lm_head(model.read(model.prefix(text_ids, pixels), cache)[:, -1])
        yield
        codes = model.write_mask(start, cache, 0.0)
        yield
        model.mask_tokenizer.decode(codes)
        yield
        for _ in range(words):
            model.lm_head(model.read(model.token_embedding(text_ids[:, :1]), cache)).argmax(-1)
        yield

    measured = [np.diff([clock(device) for _ in steps()]) for _ in range(1 + rounds)]
    ms = 1000 * np.median(measured[1:], axis=0)  # the first one warms up
    copied = torch.empty(2**28 if device.type == "cuda" else 2**24, device=device)
    bytes_per_ms = 8 * copied.numel() / 1000 / min(timeit.repeat(lambda: (copied.clone(), clock(device)), number=1))
    flop_per_ms, size = matmul_rate(device, dtype) / 1000, dtype.itemsize
    llama, seen = (sum(p.numel() for p in part.parameters()) for part in (model.llama, model.vision))
    head, patches, L = model.lm_head.weight.numel(), config.siglip.image_tokens, text_ids.shape[1]
    needs = {  # passes, weights that each reads, multiplications of all
        "prefill": (1, llama + seen + head, llama * L + seen * patches + head),
        "mask": (len(config.scales), llama, (llama + config.codebook_size * config.llama.width) * config.mask_tokens),
        "mask tokenizer": None, "words": (words, llama + head, (llama + head) * words)}
    rows = []
    for (step, need), took in zip(needs.items(), ms.tolist()):
        floor = need and max(need[0] * need[1] * size / bytes_per_ms, 2 * need[2] / flop_per_ms)
        rows.append({"step": step, "passes": need and need[0], "ms": took, "floor_ms": floor,
                     "per_s": 1000 * (words if step == "words" else 1) / took, "peak_gb": peak_memory(device) / 1e9})
    report_bench(args, args.bench, device, dtype, rows)


@torch.no_grad()
def matmul_rate(device, dtype):
    """FLOP/s of a square matrix product, the best of five: the peak that the log's `mfu` is a share of."""
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(timeit.repeat(lambda: (a @ a, clock(device)), number=1))  # clock waits for a GPU


# ---- flags -------------------------------------------------------------------------------------------------


MODEL = {"checkpoint", "encoder", "mask_tokenizer", "any_weights", "device", "dtype"}
ANSWERS = {"tiles", "cfg"}
MASKS = MODEL | ANSWERS | {"decode", *USUAL, "out", "json"}
JOBS = {  # by the flag that asks for it: the function, and the flags that it reads
    "bench": (bench, MODEL | {"bench", "json"}),
    "chat": (chat, MODEL | ANSWERS | {"chat", "image", "out"}),
    "dataset": (score, MASKS | {"dataset", "split", "root", "split_by", "classes", "skip_broken", "allow_skipped",
                                "count"}),
    "pictures": (segment, MASKS | {"image", "prompt", "confidence", "attention"}),
}


def make_parser():
    """The parser of the command line, with the flags in groups."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("what to segment").add_argument
    add("--image", nargs="+", action="extend", metavar="PATH", help="files, folders, or - for standard input")
    add("--prompt", action="append", metavar="TEXT", help="what to look for; repeat for more masks of the picture")
    add("--chat", action="append", metavar="WORDS", help="talk to a Janus or ARGenSeg checkpoint about the picture; "
        "repeat for more turns with ARGenSeg, whose answers can have masks")
    add("--out", type=Path, default=Path("out_masks"), help="folder for the PNGs (default: %(default)s)")
    add("--json", metavar="FILE", help="also write JSON with COCO run-length masks, FILE.json; - for standard output")
    add("--confidence", metavar="FILE", help="PNG of how sure each place of the mask is; for one picture and prompt")
    add("--attention", metavar="FILE", help="PNG of what mask tokens look at among mask tokens, last layer, log scale")
    add("--bench", nargs="?", const=True, choices=("argenseg-8b", "argenseg-scenes"), help="measure the checkpoint "
        "instead, plain and drafted; or random weights of such a shape, each step beside the least time it could take")
    add = parser.add_argument_group("scoring a data set").add_argument
    add("--dataset", metavar="NAME", help="scenes, ade20k, refcoco, jsonl:PATH ... (README has the table); "
        "goes on when typed again, and runs under torchrun")
    add("--split", default="test", help="default: %(default)s")
    add("--root", type=Path, help="folder in which its official archives were unpacked")
    add("--split-by", help="splitter of a referring set: unc, google, umd, berkeley")
    add("--classes", choices=("present", "all"), help="asked of each picture of a semantic set (default: present)")
    add("--skip-broken", action="store_true", help="list broken examples instead of stopping")
    add("--allow-skipped", action="store_true", help="report numbers without the skipped examples")
    add("--count", type=int, help="first examples only (default: all of the split)")
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", metavar="PATH", help="folder of train.py, its model.safetensors, or a Janus or "
        "ARGenSeg directory")
    add("--encoder", type=Path, metavar="DIR", help="frozen SigLIP or Janus that the checkpoint names (default: where "
        "`weights.py download` put it)")
    add("--mask-tokenizer", type=Path, metavar="FILE", help="frozen VQGAN that the checkpoint names (default: beside "
        "the checkpoint, else where `weights.py download` put it)")
    add("--any-weights", action="store_true", help="take frozen parts other than those of the training")
    add("--tiles", type=int, metavar="N", help="ARGenSeg sees the picture in up to N tiles and as a whole (default: 1)")
    add("--cfg", type=float, nargs="?", const=4.0, metavar="STRENGTH", help="ARGenSeg's masks with classifier-free "
        "guidance (default: without; 4 if no number follows)")
    add("--decode", choices=DECODES, default="greedy", help="default: greedy, the paper's")
    add("--beams", type=int, metavar="N", help="sequences that beam keeps (default: %(default)s)")
    add("--top-k", type=int, metavar="K", help="tokens that top-k draws from (default: %(default)s)")
    add("--top-p", type=float, metavar="P", help="likeliest tokens up to this total probability (default: %(default)s)")
    add("--temperature", type=float, metavar="T", help="below 1 draws likelier tokens (default: %(default)s)")
    add("--seed", type=int, metavar="N", help="the same seed draws the same mask of a picture (default: %(default)s)")
    add("--draft", choices=DRAFTS, help="how greedy decoding guesses tokens to verify several in a pass (default: "
        "auto, the fastest); the mask is the same in float32, in bfloat16 rounding can change it")
    add("--compile", dest="compiled", action="store_true", help="compile greedy decoding, which pays for many masks on "
        "a GPU: about a minute for each batch size; the mask is the same in float32")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps (default: %(default)s)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="float32", help="of the weights; auto: bfloat16 "
        "where the device multiplies it fast (default: %(default)s)")
    parser.set_defaults(**USUAL)
    return parser


def check_flags(parser, args):
    """A usage error for flags that do not go together or are out of range; returns the job, a key of JOBS."""
    job = next((flag for flag in ("bench", "chat", "dataset") if getattr(args, flag)), "pictures")
    read, name = JOBS[job][1], job if job == "pictures" else f"--{job}"
    if job == "dataset":
        kind = args.dataset.split(":")[0]
        read, name = read - {{"scenes": "root", "jsonl": "split"}.get(kind)}, f"--dataset {kind}"
    if job == "bench" and args.bench is not True:  # no checkpoint is loaded
        read, name = {"bench", "json", "device", "dtype"}, f"--bench {args.bench}"
    parser.check_read(args, name, read)
    if "decode" in read:
        parser.check_read(args, f"--decode {args.decode}", read - set(USUAL) | set(DECODING[args.decode]))
    if args.allow_skipped and not args.skip_broken:
        parser.error("--allow-skipped has no use without --skip-broken")
    if args.image and not args.prompt and not args.chat:
        parser.error('--image needs at least one --prompt, as in --prompt "the red circle"')
    for flag, file, ending in (("--json", None if args.json == "-" else args.json, ".json"),
                               ("--confidence", args.confidence, ".png"), ("--attention", args.attention, ".png")):
        if file and Path(file).suffix.lower() != ending:
            parser.error(f"{flag} {file}: the name must end in {ending}")
    check_ranges(parser, args, ("count beams top_k", 1, 2**32 - 1), ("seed", 0, 2**32 - 1), ("top_p", 1e-9, 1),
                 ("temperature", 0.001, 1000), ("tiles", 1, 64), ("cfg", 0, 100))
    return job


def check_ranges(parser, args, *ranges):
    """A usage error for a device that is not there, or for a value out of its range: (names, least, most)."""
    for name, least, most in ((name, *ends) for names, *ends in ranges for name in names.split()):
        value = getattr(args, name)
        if value is not None and not least <= value <= most:
            parser.error(f"--{name.replace('_', '-')} {value} must be from {least} to {most}")
    try:
        pick_device(args.device)
    except ValueError as error:
        parser.error(f"--device: {error}")


def main(argv=None):
    """The command line; returns the exit code: 0, 1 for bad data, 2 for bad usage."""
    parser = make_parser()
    args = parser.parse_args(argv)
    job = check_flags(parser, args)
    stopped = "stopped: type the same command to go on" if args.dataset else "stopped"
    code = parser.run(JOBS[job][0], args, stopped=stopped)
    if code == 1 and dist.is_initialized():
        os._exit(1)  # the other ranks would wait for this one: torchrun ends them
    return code


if __name__ == "__main__":
    if "RANK" not in os.environ:  # torchrun ends a rank that waits for another, which Python would not notice
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) != signal.SIG_IGN:  # as nohup has it
                signal.signal(number, signal.default_int_handler)
    sys.exit(main())
