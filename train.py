"""Train LlamaSeg: one visible loop, on a laptop CPU, one GPU or many.

    python train.py                                   # the `scenes` preset on this machine
    torchrun --nproc_per_node=2 train.py              # the same run on two processes (gloo on CPU, NCCL on GPU)
    python train.py --out-dir out --resume auto       # go on where out/ stopped; Ctrl-C and SIGTERM save first
    python train.py --plot out                        # out/curves.png from the log
    python train.py --preset llamaseg-b --print-config    # sizes, memory, hyper-parameters; trains nothing
    torchrun --nproc_per_node=8 train.py --preset llamaseg-b --stage pretrain --root data   # the paper, first stage
    torchrun --nproc_per_node=8 train.py --preset llamaseg-janus --stage pretrain --root data    # LoRA on Janus-Pro
    python train.py --merge out                       # LoRA into a whole Janus directory: out/merged
    python train.py --preset segvar --stage seglat    # Seg-VAR, then --stage latent and align with --init-from

OUT_DIR gets log.jsonl (one object per step), curves.png, grid-STEP.png at each evaluation (picture, phrase, predicted,
truth), the last checkpoint-STEP.pt (weights, optimizer, step: resumable), best.safetensors (best validation cIoU, or
mIoU for semantic sets), and the three files that sample.py --checkpoint OUT_DIR reads: model.safetensors,
mask_tokenizer.safetensors, text.model. Frozen parts from official files are not copied: model.safetensors has their
names and hashes, and `python weights.py download NAME` fetches them.
"""

import argparse
import json
import math
import os
import re
import signal
import sys
import time
import timeit
import zipfile
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from data import (
    TEMPLATES, Batches, LabelMaps, Mixture, Patches, contact_sheet, hold_out, load_mixture, load_segments,
    paint_segments, rle_decode, to_pixels, write_picture,
)
from metrics import Parser, add_up, parse_json, printable, regular, whole, write_json
from mllm import LORA_TARGETS, JanusConfig, JanusPrompt, JanusSeg, janus_config
from mllm import PRESETS as MLLM_PRESETS
from model import HEAD_PART, SIGLIP2, LlamaSeg, SigLIP, clock, compute_dtype, peak_memory, siglip_config
from model import PRESETS as MODEL_PRESETS
from sample import (
    SCORE_BATCH, Segmenter, check_parts, check_ranges, checkpoint_file, contact_sheet_of, from_all_ranks,
    one_rank_first, score_examples, setup_ranks, words_of,
)
from scenes import WORLDS, vocabulary
from segvar import PRESETS as SEGVAR_PRESETS
from segvar import STAGES, SegmentBatches, SegVAR, predict, scores_of
from tokenizer import VQGAN, MultiScaleVQ, TextTokenizer, VQGANConfig, mask_to_image, read_tokens
from weights import ASSETS, DOWNLOADS, WEIGHTS, check_source, locate, only_one, read_weights, write_tensors

PRESETS = MODEL_PRESETS | MLLM_PRESETS | SEGVAR_PRESETS

# What a flag means where it is left out: the stage's value where the stage has one (None: it has none), else the
# preset's. A flag on the command line overrides both. A flag that is not in this table has one default: see --help.
# Paper: batch size, warm-up of pre-training, clipping, which tokenizer of LlamaGen (c2i or t2i) and how the sets are
# mixed are not stated; we use LlamaGen's batch of 256 (32 phrases on each of 8 GPUs), 1000 steps, 1.0, c2i, and about
# the sizes of the sets, 2M masks to 4 x 0.1M phrases.
COLUMNS = ("scenes", "llamaseg-*", "pretrain", "finetune-semantic", "finetune-referring")
PRETRAIN_SETS = "sa-ovrs:16,refcoco:1,refcoco+:1,refcocog:1,refclef:1"
DEFAULTS = {  #           preset scenes  llamaseg-*    stage pretrain  finetune-semantic  finetune-referring
    "data":              ("scenes",      "scenes",     PRETRAIN_SETS,  "ade20k",          "refcoco,refcoco+,refcocog"),
    "epochs":            (None,          None,         4,              10,                20),  # None: see --max-steps
    "batch_size":        (64,            256,          None,           None,              None),
    "optimizer":         ("muon",        "adamw",      "adamw",        "adamw",           "adamw"),
    "lr":                (3e-3,          2e-4,         2e-4,           1e-4,              1e-4),
    "betas":             ([0.9, 0.95],   [0.9, 0.95],  [0.9, 0.95],    [0.9, 0.99],       [0.9, 0.99]),
    "weight_decay":      (0.05,          0.05,         0.05,           0.0,               0.0),
    "warmup_steps":      (100,           1000,         None,           0.01,              0.01),  # below 1: a share
    "hide":              (True,          False,        None,           None,              None),
    "background_weight": (0.4,           1.0,          None,           None,              None),
    "encoder_steps":     (1500,          0,            0,              0,                 0),
    "mask_tokenizer":    (ASSETS / "mask_tokenizer.safetensors", WEIGHTS / "vq_ds16_c2i", None, None, None),
    "text_tokenizer":    (ASSETS / "text.model", None, None, None, None),  # None: the encoder's
}


PATCH_BATCH = 32  # pictures in a step of learn_patches


# ---- flags -----------------------------------------------------------------------------------------------


def flags():
    """The parser of the command line, with the flags in groups."""
    parser = Parser(description=__doc__)
    add = parser.add_argument_group("model and data").add_argument
    add("--preset", default="scenes", choices=sorted(PRESETS), help="the model's shape (default: scenes)")
    add("--stage", choices=(*COLUMNS[2:], *STAGES), help="the paper's hyper-parameters; other flags override them "
        "(default: none); of segvar: which parts learn (default: seglat)")
    add("--data", help="data sets with weights, as in ade20k:1,refcoco:2; README has their names (default: scenes)")
    add("--val", metavar="DATA", help="validation set (default: the val split of the first of --data; of a jsonl file, "
        "a twentieth of its pictures, which are then not trained on)")
    add("--root", type=Path, help="folder in which their official archives were unpacked")
    add("--mask-tokens", type=Path, metavar="FILE", help="mask tokens of the training split, by tokenizer.py encode")
    add("--phrases", type=int, help="phrases asked about each drawn picture (default: 4)")
    add("--encoder", type=Path, metavar="DIR", help="frozen SigLIP or SigLIP2, a Hugging Face directory or a name that "
        "weights.py downloads (default: none for scenes, siglip2-large for llamaseg-b and -l); llamaseg-janus: the "
        "Janus directory (default: janus-pro-1b), tokenizers included")
    add("--mask-tokenizer", type=Path, metavar="FILE", help="frozen VQGAN (default: embedded; llamaseg-*: vq_ds16_c2i)")
    add("--text-tokenizer", type=Path, metavar="FILE", help="tokenizer.model or .json (default: the encoder's own)")
    add("--any-weights", action="store_true", help="take other frozen parts than the weights were trained with")
    add("--init-from", type=Path, metavar="FILE", help="start from the weights of a model.safetensors")
    add = parser.add_argument_group("optimization").add_argument
    add("--max-steps", type=int, help="optimizer steps of the whole run (default: 6000)")
    add("--epochs", type=float, help="instead: how often the run goes through the data")
    add("--batch-size", type=int, help="phrases per step: all ranks, all micro-batches (default: 64; llamaseg-*: 256)")
    add("--micro-batch-size", type=int, metavar="N", help="phrases in a forward pass (default: batch size / ranks)")
    add("--optimizer", choices=("muon", "adamw"), help="muon: on matrices alone (default: muon; llamaseg-*: adamw)")
    add("--lr", type=float, help="peak learning rate (default: 3e-3; llamaseg-*: 2e-4, the paper's; fine-tuning: 1e-4)")
    add("--betas", type=float, nargs=2, help="of AdamW (default: 0.9 0.95; fine-tuning: 0.9 0.99)")
    add("--warmup-steps", type=float, help="below 1: a share of all (default: 100; llamaseg-*: 1000; stages: 0.01)")
    add("--weight-decay", type=float, help="on matrices (default: 0.05, the paper's; fine-tuning: 0)")
    add("--clip", type=float, default=1.0, help="gradient norm limit (default: 1)")
    add("--encoder-steps", type=int, help="steps in which the encoders learn from patches of drawn pictures before the "
        "first mask (default: 1500; with --init-from and llamaseg-*: none)")
    add("--hide", action=argparse.BooleanOptionalAction, help="hide a random share of the mask tokens from the model's "
        "input (default: on; llamaseg-*: off)")
    add("--background-weight", type=float, metavar="W", help="weight in the loss of mask token 0, plain background in "
        "the embedded mask tokenizer (default: 0.4; llamaseg-*: 1, the paper's)")
    add("--temperature", type=float, metavar="T", help="of segvar's posterior in the stage align (default: the nearest "
        "code alone, whose KL is a cross-entropy)")
    add("--seed", type=int, default=0, help="of the initial weights and of all batches (default: 0)")
    add("--lora-rank", type=int, default=16, help="of llamaseg-janus (default: 16)")
    add("--lora-alpha", type=float, default=32.0, help="default: 32")
    add("--lora-dropout", type=float, default=0.0, help="default: 0")
    add("--lora-targets", nargs="+", default=LORA_TARGETS, choices=LORA_TARGETS, help="linear layers (default: all)")
    add = parser.add_argument_group("machine").add_argument
    add("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    add("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help="of autocast (default: auto)")
    add("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile")
    add("--activation-checkpointing", action="store_true", help="a third more arithmetic, a fraction of the memory")
    add("--workers", type=int, default=-1, help="processes that draw batches (default: 0 on CPU, 4 on a GPU)")
    add = parser.add_argument_group("what is kept").add_argument
    add("--out-dir", type=Path, default=Path("out"), help="default: out")
    add("--eval-every", type=int, default=500, help="steps between evaluations (default: 500)")
    add("--eval-count", type=int, default=200, help="validation examples (default: 200)")
    add("--save-every", type=int, default=500, help="steps between checkpoints (default: 500)")
    add("--keep", type=int, default=2, help="checkpoints to keep, the newest (default: 2)")
    add("--resume", metavar="{auto,PATH}", help="go on from a checkpoint-STEP.pt; auto: OUT_DIR's newest, if any")
    add = parser.add_argument_group("instead of training").add_argument
    add("--print-config", action="store_true", help="print sizes, parameters, memory and hyper-parameters")
    add("--merge", type=Path, metavar="OUT_DIR", help="write OUT_DIR/merged, a Janus directory with the LoRA of a run")
    add("--plot", type=Path, metavar="OUT_DIR", help="draw the loss and cIoU of a run: curves.png")
    return parser


def parse_args(argv=None):
    """The flags, checked; those that were left out are filled in from DEFAULTS."""
    parser = flags()
    args = parser.parse_args(argv)
    given, preset = argparse.Namespace(**vars(args)), PRESETS[args.preset]
    segvar = args.preset in SEGVAR_PRESETS
    if (args.stage in STAGES) != segvar and args.stage:
        parser.error(f"--stage {args.stage} has no use with --preset {args.preset}")
    args.stage = args.stage or (next(iter(STAGES)) if segvar else None)
    args.data = args.data or ("scenes-instances" if segvar else None)
    for name, values in DEFAULTS.items():
        if getattr(args, name) is None and not (name == "epochs" and args.max_steps):
            of_stage = values[COLUMNS.index(args.stage)] if args.stage in COLUMNS else None
            small = args.preset.startswith("scenes") or args.preset == "segvar"
            setattr(args, name, values[not small] if of_stage is None else of_stage)
    if not args.epochs and args.max_steps is None:
        args.max_steps = 6000
    if args.preset == "llamaseg-janus":
        args.encoder = args.mask_tokenizer = args.encoder or Path("janus-pro-1b")
    elif preset.freeze_encoders:
        args.encoder = args.encoder or Path(f"siglip2-large-patch16-{preset.siglip.image_size}")
    if segvar and given.mask_tokenizer is None:
        args.mask_tokenizer = WEIGHTS / "var-vq"
    args.encoder, args.mask_tokenizer = locate(args.encoder), locate(args.mask_tokenizer)
    args.text_tokenizer = args.text_tokenizer or args.encoder
    args.init_from = args.init_from and checkpoint_file(args.init_from)
    if args.data not in WORLDS or args.init_from:
        args.encoder_steps = 0
    refuse_unread(parser, given, f"{args.data},{args.val or ''}")
    check_ranges(parser, args, ("phrases max_steps batch_size micro_batch_size eval_every eval_count save_every keep",
                                1, 9_999_999), ("lr clip background_weight epochs temperature", 1e-9, 1e9),
                 ("weight_decay warmup_steps encoder_steps", 0, 1e9), ("seed", 0, 2**32 - 1), ("workers", -1, 999))
    args.phrases = args.phrases or (4 if args.data in WORLDS else 1)
    return args


def refuse_unread(parser, given, data):
    """A usage error for a flag that the asked job would not read. given: the flags as typed; data: all data sets."""
    janus, lora = given.preset == "llamaseg-janus", {"lora_rank", "lora_alpha", "lora_dropout", "lora_targets"}
    segvar = given.preset in SEGVAR_PRESETS
    sets = {re.sub(r":\d+$", "", part.strip()) for part in data.split(",") if part.strip()}
    for holds, job, unread in (
            (given.plot, "--plot", vars(given).keys() - {"plot"}),
            (given.merge, "--merge", vars(given).keys() - {"merge", "encoder", "any_weights"}),
            (given.max_steps, "--max-steps", {"epochs"}),
            (not janus, f"--preset {given.preset}", lora),
            (given.init_from, "--init-from", lora),
            (janus, "--preset llamaseg-janus: its directory has both tokenizers", {"mask_tokenizer", "text_tokenizer"}),
            (not (janus or given.merge or PRESETS[given.preset].freeze_encoders),
             f"--preset {given.preset}: it trains its own encoder", {"encoder"}),
            (not (given.init_from or given.resume or given.merge), "a new run", {"any_weights"}),
            (segvar, f"--preset {given.preset}", {"phrases", "mask_tokens", "text_tokenizer", "hide",
                                                  "background_weight", "encoder_steps"}),
            (given.preset == "segvar", "--preset segvar: it trains its own tokenizer", {"mask_tokenizer"}),
            (given.stage != "align", f"--stage {given.stage}", {"temperature"}),
            (not sets <= WORLDS.keys(), f"--data {given.data}: no drawn pictures", {"phrases", "encoder_steps"}),
            (given.init_from or not given.preset.startswith("scenes"), "a run without new encoders", {"encoder_steps"}),
            (sets <= WORLDS.keys(), "drawn scenes", {"root"})):
        if holds:
            parser.check_read(given, job, vars(given).keys() - unread)


# ---- the run ---------------------------------------------------------------------------------------------


def train(args, at_end):
    """The whole run. Ctrl-C or SIGTERM let the step end and save. at_end: an ExitStack that its owner closes."""
    run, stop = set_up(args, at_end), []
    at_end.enter_context(on_signal(lambda number, frame: stop.append(number)))
    model = parallel(run)
    goes_on = True
    if args.encoder_steps and not run.first_step:
        goes_on = learn_patches(run, stop)
    elif run.evaluation_left_out:
        goes_on = evaluate_after(run, run.first_step)
    started, (batch, ids) = time.perf_counter(), next_batch(run)
    for step in range(run.first_step, args.max_steps if goes_on else 0):
        torch.manual_seed((args.seed * args.max_steps + step) * run.world_size + run.rank)  # of LoRA's dropout, if any
        sums, seen = torch.zeros(3, device=run.device), []  # loss, gradient norm, ranks that were asked to stop
        for micro in range(run.accumulation):
            with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
                if dist.is_initialized():  # gradients are summed over ranks only once per step
                    model.require_backward_grad_sync = micro == run.accumulation - 1
                logits, loss = model(**batch)  # of a segvar the terms of its loss, by name
            (loss / run.accumulation).backward()
            sums[0] += loss.detach() / run.accumulation
            seen.append((ids, loss.detach()))
            batch, ids = next_batch(run)  # meanwhile a GPU works on the last one
        lr = learning_rate(step, args)
        sums[1] = nn.utils.clip_grad_norm_(model.parameters(), args.clip)  # the norm before clipping
        sums[2] = len(stop)
        if dist.is_initialized():
            dist.all_reduce(sums)
        mean_loss, grad_norm, stopping = (sums / run.world_size).tolist()  # the host waits here, once per step
        check_finite(mean_loss, grad_norm, seen, step, run.rank)  # before it reaches the weights
        for optimizer in run.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        done, evaluation_is_due = step + 1, (step + 1) % args.eval_every == 0 or step + 1 == args.max_steps
        if run.log:
            terms = {name: value.item() for name, value in logits.items()} if isinstance(logits, dict) else {}
            log_step(run, done, mean_loss, grad_norm, lr, time.perf_counter() - started, terms)
            # before the evaluation, which may take longer than torchrun waits after a signal
            if done % args.save_every == 0 or evaluation_is_due or stopping:
                save_checkpoint(args.out_dir, run.segmenter.model, run.optimizers, done, args)
        if stopping:
            say(f"stopped at step {done} of {args.max_steps}, saved: go on with --resume auto")
            break
        if evaluation_is_due and not evaluate_after(run, done):
            break
        started = time.perf_counter()
    if run.bar:  # a step was done, and this is the first rank
        plot(args.out_dir)
    if dist.is_initialized():
        del model  # DDP first: the last to let go of the process group may hold the lock its threads still need
        dist.destroy_process_group()


def set_up(args, at_end):
    """Ranks, model, data and what an earlier run left: the parts of a run."""
    rank, world_size, device = setup_ranks(args.device)
    dtype, reason = compute_dtype(device, args.dtype)
    torch.manual_seed(args.seed)  # the initial weights
    torch.set_float32_matmul_precision("high")
    if args.preset in SEGVAR_PRESETS:
        segmenter = SimpleNamespace(model=load_segvar(args).train().to(device), text_tokenizer=None)
    else:
        segmenter = Segmenter(*load_parts(args, device, dtype))
    model = segmenter.model
    with one_rank_first():
        train_set, val_set = load_data(args)
    args.files = train_set.file_hashes()
    args.max_steps = args.max_steps or math.ceil(args.epochs * len(train_set) / args.batch_size)
    batches = make_batches(args, segmenter, train_set, rank, world_size)
    optimizers = make_optimizers(model, args)
    if rank == 0:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        at_end.enter_context(only_one(args.out_dir / "lock"))
    first_step = open_run(args, segmenter, optimizers, rank)

    peak_flops, step_flops = matmul_rate(device, dtype), args.batch_size * training_flops(model, args.phrases)
    say(f"{args.init_from or args.preset}: {describe(args)}")
    say(f"{world_size} x {device}, {dtype} ({reason}), {peak_flops / 1e12:.2f} TFLOP/s in a matrix product")
    say(f"step = {args.batch_size} phrases = {world_size} ranks x {batches.accumulation} micro-batches x "
        f"{batches.micro_batch_size}, {step_flops / 1e12:.2f} TFLOP")
    records = read_log(args.out_dir / "log.jsonl")
    # mIoU for semantic sets, as the papers report them
    metric = "mIoU" if isinstance(getattr(val_set, "datasets", [val_set])[0], LabelMaps) else "cIoU"
    if isinstance(model, SegVAR):
        metric = "PSNR" if args.stage == "seglat" else "PQ"
    # a stop or a kill left it out; only the first rank is sure to see the log
    due = first_step and (first_step % args.eval_every == 0 or first_step == args.max_steps)
    left_out = due and not any(r["step"] == first_step and metric in r for r in records)
    return SimpleNamespace(
        args=args, rank=rank, world_size=world_size, device=device, dtype=dtype, segmenter=segmenter, val_set=val_set,
        optimizers=optimizers, first_step=first_step, accumulation=batches.accumulation,
        loader=start_loader(args, batches, first_step, device, at_end),
        # of the first rank alone; the bar's clock starts after the first step, which may take a minute to compile
        log=at_end.enter_context(open(args.out_dir / "log.jsonl", "a", buffering=1)) if rank == 0 else None,
        bar=None, at_end=at_end, ideal_seconds=step_flops / world_size / peak_flops,
        metric=metric, best=max((r[metric] for r in records if r.get(metric) is not None), default=-1.0),
        evaluation_left_out=from_all_ranks(left_out)[0])


class PatchReader(nn.Module):
    """What SigLIP's training gives the paper's encoders, in small: phrases and patches that belong together become
    alike (SigLIP's sigmoid loss, on patches instead of pictures), and a linear layer tells what each patch shows.
    things: how many colours and shapes scenes.patch_truth has, and one for any object."""

    def __init__(self, encoder, things, width=128):
        super().__init__()
        self.encoder, self.things = encoder, things
        self.head = nn.Linear(encoder.config.vision_width, things + 3 + 64)
        self.image_side = nn.Linear(encoder.config.vision_width, width)
        self.text_side = nn.Linear(encoder.config.text_width, width)
        self.scale, self.bias = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(-3.0))

    def forward(self, pixels, truth, text_ids, named):
        """pixels (b,3,S,S), truth (b,N,...), text_ids (b*P,L), named (b*P,N) -> logits of `named` (b,P,N), loss ()."""
        b, image = len(pixels), self.encoder.encode_image(pixels)  # (b,N,D)
        things, places, cover = self.head(image).float().split([self.things, 3, 64], -1)
        true_things, true_places, true_cover, there = truth.split([self.things, 3, 64, 1], -1)
        text = self.text_side(self.encoder.encode_text(text_ids).mean(1)).float().unflatten(0, (b, -1))  # (b,P,width)
        logits = self.scale * text @ self.image_side(image).float().mT + self.bias  # (b,P,N)
        share = there / there.sum()  # of the patches with an object
        cover_loss = F.binary_cross_entropy_with_logits(cover, true_cover, reduction="none").mean(-1, True)
        place_loss = F.smooth_l1_loss(places, true_places, reduction="none").mean(-1, True)
        return logits, (4 * F.binary_cross_entropy_with_logits(things, true_things)
                        + 4 * F.binary_cross_entropy_with_logits(logits, named.view_as(logits))
                        + ((place_loss + cover_loss) * share).sum())


def learn_patches(run, stop):
    """--encoder-steps: before the first mask the encoders learn what each patch of a drawn picture shows, and what of
    it phrases name. Masks alone teach that slowly: LOG.md. False if a signal ended it, which leaves nothing of it."""
    args, siglip, world = run.args, run.segmenter.model.encoder, WORLDS[run.args.data]
    reader = PatchReader(siglip, len(world.colors) + len(world.shapes) + 1).to(run.device)
    optimizers = make_optimizers(reader, args)
    batches = Patches(args.data, run.segmenter.text_tokenizer, siglip.config.image_size,
                      math.isqrt(siglip.config.image_tokens), PATCH_BATCH, rank=run.rank, world_size=run.world_size)
    model = torch.compile(reader) if args.compile else reader
    for step in (bar := tqdm(range(args.encoder_steps), desc="encoder", disable=run.rank > 0)):
        batch = {name: value.to(run.device) for name, value in batches[step].items()}
        with torch.autocast(run.device.type, run.dtype, enabled=run.dtype != torch.float32):
            loss = model(to_pixels(batch.pop("pictures")), **batch)[1]
        loss.backward()
        if any(from_all_ranks(bool(stop))):
            say("stopped before the first step: nothing is saved")
            return False
        gradients = [p.grad for p in reader.parameters()]
        for gradient in gradients if dist.is_initialized() else ():
            dist.all_reduce(gradient.div_(run.world_size))
        nn.utils.clip_grad_norm_(reader.parameters(), args.clip)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1, (step + 1) / 100)  # warm-up alone: it falls with the masks
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        bar.set_postfix_str(f"loss {loss.item():.4f}", False)
    return True


def parallel(run):
    """The model as the loop calls it: compiled if asked for, its gradients summed over the ranks."""
    model = run.segmenter.model
    model.llama.recompute = run.args.activation_checkpointing
    if run.args.compile:
        say("compiling, about a minute: the first step takes that much longer")
        model = torch.compile(model)
    if dist.is_initialized():  # frozen parts stay out of it: no gradient to sum, and every rank has read the same file
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        model = DistributedDataParallel(model, device_ids=[run.device] if run.device.type == "cuda" else None,
                                        gradient_as_bucket_view=True)
    return model


def say(line):
    """Print a line beside the progress bar, once and not once per rank."""
    if int(os.environ.get("RANK", 0)) == 0:
        tqdm.write(line)


@contextmanager
def on_signal(handler):
    """Ctrl-C and SIGTERM call `handler` while the block runs."""
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def check_finite(loss, grad_norm, seen, step, rank):
    """ValueError that names the examples, if a step's loss or gradient is not finite; seen: ids and loss of each
    micro-batch of this rank."""
    if not math.isfinite(loss + grad_norm):
        bad = [ids for ids, value in seen if math.isfinite(loss) or not math.isfinite(value.item())]
        raise ValueError(f"loss is {loss}, gradient norm {grad_norm} at step {step + 1}, on rank {rank} in the "
                         f"micro-batches of {' '.join(sum(bad, [])) or 'no example'}: lower --lr, or look at them")


def learning_rate(step, args):
    """Linear warm-up, then cosine to 0; step counts from 0."""
    warmup = args.warmup_steps if args.warmup_steps >= 1 else round(args.warmup_steps * args.max_steps)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, args.max_steps - warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizers(model, args):
    """AdamW (paper: see DEFAULTS), or Muon (Jordan et al. 2024) for the matrices.

    Embeddings, the head, vectors and the patch embedding stay with AdamW, as Muon's authors advise.
    """
    matrices, tables, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            inner = p.dim() == 2 and "embedding" not in name and name != "head.weight"
            (matrices if inner else tables if p.dim() > 1 else vectors).append(p)
    if args.optimizer == "adamw":
        matrices, tables = [], matrices + tables
    groups = [{"params": group, "weight_decay": decay}
              for group, decay in ((tables, args.weight_decay), (vectors, 0.0)) if group]
    # fused: one pass over the memory instead of a dozen
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    optimizers = [torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=fused)] if groups else []
    if matrices:
        # match_rms_adamw: one learning rate serves both (Liu et al. 2025, "Muon is scalable")
        optimizers.append(torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


# ---- its parts: model and data ---------------------------------------------------------------------------


def load_parts(args, device, dtype):
    """(model, mask_tokenizer, text_tokenizer) of a run, the frozen ones in the precision that they need."""
    mask_tokenizer = VQGAN.from_pretrained(args.mask_tokenizer).to(device).requires_grad_(False)
    model = load_model(args, dtype)
    if isinstance(model, JanusSeg):
        text_tokenizer = JanusPrompt(args.encoder, model.config.siglip.image_tokens)
    else:
        text_tokenizer = TextTokenizer(args.text_tokenizer, model.config.siglip.text_length)
    start = args.init_from or args.mask_tokenizer
    model.frozen |= check_parts(start, model, mask_tokenizer, text_tokenizer, args.any_weights)
    model.config.hide = args.hide
    if isinstance(model, LlamaSeg):
        names, words = vocabulary(WORLDS[args.data]) if args.data in WORLDS else ((), ())
        around = words_of(" ".join(TEMPLATES).replace("{}", "")) if words else ()
        model.config.names, model.config.words = names, tuple(sorted({*words, *around}))
    if isinstance(model, LlamaSeg) and not args.init_from:
        model.init_mask_tokens(mask_tokenizer.quantize.codebook)
    model.train().to(device)
    if isinstance(model, LlamaSeg) and model.config.freeze_encoders:
        model.encoder.to(dtype)
    return model, mask_tokenizer, text_tokenizer


def load_segvar(args):
    """SegVAR with the weights of --init-from, or new ones, for the classes of --data; its --stage learns."""
    classes = load_segments(args.data, "train", args.root).classes
    config = replace(PRESETS[args.preset], classes=classes, temperature=args.temperature)
    if args.init_from:
        model = SegVAR.from_pretrained(args.init_from)
    elif config.freeze_encoders:  # official weights, the mask tokenizer for seglats; their files tell the shapes
        encoder = SigLIP.from_pretrained(args.encoder)
        del encoder.text_model
        vq = MultiScaleVQ.from_pretrained(args.mask_tokenizer, config.scales)
        config = replace(config, siglip=encoder.config, vq=vq.config)
        model = SegVAR(config, encoder, vq)
    else:
        model = SegVAR(config)
    model.config.temperature = args.temperature
    if args.init_from and config.freeze_encoders:
        config = replace(config, siglip=model.config.siglip, vq=model.config.vq)
    if model.config != config:
        raise ValueError(f"{args.init_from}: its shape or classes are not those of --preset {args.preset} and "
                         f"--data {args.data}")
    return model.learn(args.stage)


def load_model(args, dtype):
    """LlamaSeg or JanusSeg with new weights or those of --init-from, on the frozen parts of the preset."""
    preset, start = PRESETS[args.preset], args.init_from
    if isinstance(preset, JanusConfig):
        if start:
            return JanusSeg.from_pretrained(start, args.encoder, dtype, args.any_weights)
        model = JanusSeg.from_pretrained(args.encoder, dtype=dtype)
        model.add_lora(args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)
    elif start:
        model = LlamaSeg.from_pretrained(start, args.encoder, any_weights=args.any_weights)
        if replace(model.config, siglip=preset.siglip, hide=preset.hide, words=(), names=()) != preset:
            raise ValueError(f"{start}: its shape is not that of --preset {args.preset}")
    else:
        encoder = SigLIP.from_pretrained(args.encoder) if args.encoder else None
        model = LlamaSeg(replace(preset, siglip=encoder.config if encoder else preset.siglip), encoder)
    return model


def load_data(args):
    """(training Mixture, validation set) of --data and --val."""
    if args.preset in SEGVAR_PRESETS:
        train_set, val_set = (load_segments(name, split, args.root)
                              for name, split in ((args.data, "train"), (args.val or args.data, "val")))
        return Mixture([train_set], [1]), val_set
    train_set = load_mixture(args.data, "train", args.root, phrases=args.phrases)
    first = args.data.split(",")[0].strip()
    if args.val or not first.startswith("jsonl:"):
        return train_set, load_mixture(args.val or first, "val", args.root)
    count = len(train_set.datasets[0])
    parts, val_set = hold_out(train_set.datasets)
    say(f"validation: {len(val_set)} of the {count} lines of {first}; --val gives others")
    return Mixture(parts, train_set.weights), val_set


def make_batches(args, segmenter, train_set, rank, world_size):
    """The Batches of this rank, with the mask tokens of --mask-tokens where it is given."""
    config, micro_batch_size = segmenter.model.config, args.micro_batch_size or args.batch_size // world_size
    if args.preset in SEGVAR_PRESETS:
        return SegmentBatches(train_set, config, args.batch_size, micro_batch_size, rank, world_size, args.seed)
    mask_tokenizer, cached = segmenter.mask_tokenizer, None
    mask_size = config.mask_grid * mask_tokenizer.config.downsample
    if args.mask_tokens:
        rows, count = [], 0  # rows of the cache that are trained on: it has those of the examples held out, too
        for part in train_set.datasets:
            part_size = len(getattr(part, "dataset", part))
            rows.append(count + getattr(part, "indices", np.arange(part_size)))
            count += part_size
        cached = read_tokens(args.mask_tokens, (count, config.mask_tokens), mask_tokenizer.source, data=args.data,
                             split="train", files=train_set.file_hashes(), size=mask_size, padded=segmenter.padded)
        cached = cached if len(train_set) == count else cached[np.concatenate(rows)]
    return Batches(train_set, segmenter.text_tokenizer, config.siglip.image_size, config.mask_tokens, args.batch_size,
                   micro_batch_size, args.phrases, rank, world_size, args.seed, args.hide, mask_size, cached,
                   segmenter.padded)


def start_loader(args, batches, first_step, device, at_end):
    """Iterator over the micro-batches of the steps to come, which --workers draw ahead."""
    todo = range(first_step * batches.accumulation, args.max_steps * batches.accumulation)
    workers = args.workers if args.workers >= 0 else (4 if device.type == "cuda" else 0)
    loader = iter(DataLoader(batches, batch_size=None, sampler=todo, num_workers=workers,
                             worker_init_fn=leave_signals_to_parent, pin_memory=device.type == "cuda"))
    # on every way out: workers ignore the signal by which Python ends them, and Python would wait for them for ever
    at_end.callback(getattr(loader, "_shutdown_workers", lambda: None))
    return loader


def leave_signals_to_parent(worker_id):
    """A DataLoader worker ignores Ctrl-C and SIGTERM, which reach the whole process group: its parent ends it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@torch.no_grad()
def next_batch(run):
    """(keyword arguments of model.forward for the next micro-batch, ids of its examples); None, None at the end.

    The mask tokenizer has already run. ValueError for an example that cannot be read.
    """
    try:
        item = next(run.loader, None)
    except (ValueError, OSError) as error:  # of a worker: its traceback, which ends in its error
        raise ValueError(re.sub(r"(?s)Caught .*\n[\w.]+: ", "", str(error)).strip()) from None
    if item is None:
        return None, None
    ids = item.pop("ids")
    item = {name: value.to(run.device, non_blocking=True) for name, value in item.items()}
    if "cells" in item:
        return {"pixels": to_pixels(item["pictures"]), "cells": item["cells"], "classes": item["classes"]}, ids
    if "mask_tokens" not in item:  # in float32: in bfloat16 codes that lie close together would be mixed up
        # phrases about one picture often have the same mask: each is encoded once
        masks, places = torch.unique(item["masks"].flatten(1), dim=0, return_inverse=True)  # (n,m*m), (b,)
        masks = masks.unflatten(1, item["masks"].shape[1:])
        item["mask_tokens"] = run.segmenter.mask_tokenizer.encode(mask_to_image(masks))[places]  # (b,M)
    return {"text_ids": item["text_ids"], "pixels": to_pixels(item["pictures"]),  # (b/P,3,S,S)
            "mask_tokens": item["mask_tokens"], "hide_tokens": item["hide"] if run.args.hide else None,
            "background_weight": run.args.background_weight}, ids


# ---- its parts: checkpoints ------------------------------------------------------------------------------


# What a resumed run must share with the one it goes on from. Steps, learning rate, warm-up and ranks may change.
SAME_RUN = ("preset", "stage", "data", "val", "phrases", "hide", "background_weight", "batch_size", "seed", "optimizer",
            "betas", "weight_decay", "clip", "lora_alpha", "lora_dropout", "files")


class Damaged(ValueError):
    """A checkpoint that is cut off or is none."""


def open_run(args, segmenter, optimizers, rank):
    """Put back what --resume asks for and make OUT_DIR what sample.py needs; returns the steps already done."""
    log, here = args.out_dir / "log.jsonl", saved_steps(args.out_dir)
    paths = here if args.resume == "auto" else [Path(args.resume)] if args.resume else []
    run_is_here = bool(here) or log.exists() and log.stat().st_size > 0
    goes_on = args.resume == "auto" or paths and paths[0].resolve().parent == args.out_dir.resolve()
    model_is_here = (args.out_dir / "model.safetensors").exists()
    if rank == 0 and (not goes_on if run_is_here else model_is_here):
        raise FileExistsError(f"{args.out_dir} holds a run or a model, which this run would overwrite: --resume auto "
                              "goes on with a run, --out-dir starts elsewhere")
    done, damaged = 0, []
    for path in paths:
        try:
            done = load_checkpoint(path, segmenter.model, optimizers, args)
            break
        except Damaged as error:
            if path == paths[-1]:
                raise
            damaged.append((path, error))
    if len(set(from_all_ranks(done))) > 1:  # without a common file system they may have found different ones
        raise ValueError(f"{args.out_dir}: the ranks found checkpoints of different steps: give all the same files")
    if rank == 0:
        for broken, error in damaged:
            say(f"{error}: set aside as {broken.name}.damaged")
            broken.rename(f"{broken}.damaged")
        later = [path for path in saved_steps(args.out_dir) if step_of(path) > done]
        if later:  # the run would end with fewer steps than there are now, and lose what it saves to --keep
            raise ValueError(f"{later[0]} is of a later step: delete it to go back to step {done}, or give another "
                             "--out-dir")
        if done:
            say(f"resumed from {path.stem}, going on with {done} of {args.max_steps} steps done")
        fill_folder(args, segmenter.text_tokenizer, done)
    return done


def fill_folder(args, text_tokenizer, done):
    """Clean OUT_DIR of what a killed run left after step `done`, and write all that is there from the start."""
    log = args.out_dir / "log.jsonl"
    if log.exists():  # those steps come again
        lines = [json.dumps(record) + "\n" for record in read_log(log) if record["step"] <= done]
        write_whole(log, "".join(lines).encode())
    for path in args.out_dir.glob(".*.tmp"):
        if re.fullmatch(r"\.(checkpoint|model|best|mask_tokenizer|text|args|grid|curves).*\.\d+\.tmp", path.name):
            path.unlink()
    # one of this repository's own goes along
    if args.preset not in SEGVAR_PRESETS and args.mask_tokenizer.suffix == ".safetensors":
        write_whole(args.out_dir / "mask_tokenizer.safetensors", args.mask_tokenizer.read_bytes())
    if isinstance(text_tokenizer, TextTokenizer):
        write_whole(args.out_dir / "text.model", text_tokenizer.model.serialized_model_proto())
    write_json(args.out_dir / "args.json", {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()})


def write_whole(path, content):
    """Write bytes under a temporary name, then rename the file."""
    with whole(path) as temporary:
        temporary.write_bytes(content)


def saved_steps(out_dir):
    """Paths of the checkpoints in OUT_DIR, newest first."""
    return sorted(out_dir.glob(f"checkpoint-{7 * '[0-9]'}.pt"), reverse=True)


def step_of(path):
    """How many steps a checkpoint has done, by its name."""
    return int(path.stem.removeprefix("checkpoint-"))


def save_checkpoint(out_dir, model, optimizers, step, args):
    """Weights, optimizers and step; then the newest `--keep` checkpoints stay.

    The file is on the disk before it gets its name: a machine that dies at any moment leaves whole files.
    No random state: a batch is a function of (seed, step), and the model itself draws nothing.
    """
    path = out_dir / f"checkpoint-{step:07d}.pt"
    state = {"model": model.trained_state(), "optimizers": [o.state_dict() for o in optimizers], "step": step,
             "run": {name: getattr(args, name) for name in SAME_RUN}, "frozen": model.frozen}
    try:
        with whole(path) as temporary, open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
    except (RuntimeError, OSError) as error:  # RuntimeError: what torch.save makes of a full disk
        why = getattr(error, "strerror", None) or "No space left on device"
        raise OSError(f"{path}: {why}; --resume auto goes on from the checkpoint before it") from None
    save_weights(model, out_dir / "model.safetensors")
    for old in saved_steps(out_dir)[args.keep:]:
        old.unlink()


def save_weights(model, path):
    """The weights alone: in float16, or whole where they are LoRA's few."""
    model.save_pretrained(path, dtype=None if isinstance(model, JanusSeg) else torch.float16)


def load_checkpoint(path, model, optimizers, args):
    """Put a checkpoint back; returns its steps. Damaged if it is not whole, ValueError if it is another run's."""
    try:
        with zipfile.ZipFile(regular(path)) as archive:  # torch.load does not look at the checksums
            if broken := archive.testzip():
                raise ValueError(f"{broken} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        run, step, frozen = state["run"], state["step"], state["frozen"]
    except Exception as error:  # torch.load raises many kinds for a damaged file
        raise Damaged(f"{path}: not a whole checkpoint of train.py ({type(error).__name__}: {error!s:.200})") from None
    other = [f"--{name.replace('_', '-')} {run[name]}, not {getattr(args, name)}" for name in SAME_RUN
             if name in run and run[name] != getattr(args, name)]
    if other:
        raise ValueError(f"{path}: is of another run, made with {'; '.join(other)}")
    if step > args.max_steps:
        raise ValueError(f"{path}: has done {step} steps, more than --max-steps {args.max_steps}")
    for part, source in model.frozen.items():
        if not args.any_weights:
            check_source(path, part, frozen, source)
    try:
        model.load_trained_state(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: does not fit --preset {args.preset} --optimizer {args.optimizer} "
                         f"({error!s:.200})") from None
    return step


# ---- its parts: evaluation and log -----------------------------------------------------------------------


def log_step(run, step, loss, grad_norm, lr, seconds, terms):
    """A line of log.jsonl and the progress bar. terms: of the loss of the first rank's last micro-batch.

    mfu: model FLOP utilisation, training_flops per second over the rate of one large matrix product.
    """
    rate, mfu = run.args.batch_size / seconds, run.ideal_seconds / seconds
    record = {"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "samples_per_s": rate, "mfu": mfu,
              "peak_memory_gb": peak_memory(run.device) / 1e9, **terms}
    run.log.write(json.dumps(record) + "\n")
    if run.bar is None:
        run.bar = tqdm(initial=step, total=run.args.max_steps, smoothing=0.02, desc="train")
        run.at_end.callback(run.bar.close)
    run.bar.set_postfix_str(f"loss {loss:.4f} lr {lr:.1e} {rate:.0f} samples/s mfu {100 * mfu:.0f} %", False)
    run.bar.update(step - run.bar.n)


def evaluate_after(run, step):
    """Evaluate, log the scores, and keep the weights if they are the best. False if a signal ended it."""
    try:
        with on_signal(signal.default_int_handler):
            records = evaluate(run, run.val_set, run.args.eval_count)
    except KeyboardInterrupt:
        say(f"stopped in the evaluation after step {step}, which is saved: go on with --resume auto")
        return False
    if run.log:
        sheet = run.args.out_dir / f"grid-{step:06d}.png"
        if isinstance(run.segmenter.model, SegVAR):
            scores = scores_of(records, run.val_set)
            segments_sheet(records, run.val_set, sheet)
        else:
            total, by_task = add_up(records)
            tasks = {task: metrics.compute()["cIoU"] for task, metrics in sorted(by_task.items())}
            scores = total.compute() | {"tasks": tasks}
            contact_sheet_of(records, run.val_set, sheet)
        run.log.write(json.dumps({"step": step, **scores}) + "\n")
        shown = [f"{name} {scores[name]:.4f}" for name in ("cIoU", "gIoU", "mAHD@0.5", "PQ", "AP50", "mIoU", "PSNR")
                 if scores.get(name) is not None]
        say(f"step {step}: {' '.join(shown)}")
        if (scores[run.metric] or 0.0) > run.best:
            run.best = scores[run.metric] or 0.0
            save_weights(run.segmenter.model, run.args.out_dir / "best.safetensors")
    return True


def evaluate(run, dataset, count):
    """Greedy masks of `count` examples, evenly spread over the data set: a record for each, as sample.py scores it, or
    segvar.py. The ranks share them and all get all records."""
    records, model = [], run.segmenter.model
    training = model.training
    model.eval()
    count = min(count, len(dataset))
    indices = [i * len(dataset) // count for i in range(count)][run.rank::run.world_size]
    for start in tqdm(range(0, len(indices), SCORE_BATCH), desc="evaluate", leave=False, disable=run.rank > 0):
        some = indices[start:start + SCORE_BATCH]
        records += (predict(model, some, dataset) if isinstance(model, SegVAR) else
                    score_examples(run.segmenter, [(i, dataset[i]) for i in some]))
    model.train(training)
    return sum(from_all_ranks(records), [])


def segments_sheet(records, dataset, path):
    """Write a PNG of the first pictures: picture, predicted segments, truth."""
    cells = []
    for record in records[:24]:
        true = dataset[record["index"]]
        found = [segment for segment in record["segments"] if segment["is_thing"]]
        masks = np.array([rle_decode(s["rle"]) for s in found], bool).reshape(-1, *true.masks.shape[1:])
        cells.append((", ".join(s["label"] for s in found), [
            true.image, paint_segments(SimpleNamespace(masks=masks)),
            paint_segments(SimpleNamespace(masks=true.masks[np.array(true.is_thing, bool)]))]))
    contact_sheet(cells, path, headings=("picture", "predicted", "truth"))


def read_log(path):
    """The records of a log.jsonl, none if there is no such file. A last line without its end, as a killed run leaves
    it, is left out; ValueError for any other line that train.py does not write."""
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(True) if path.exists() else (), 1):
        try:
            if line.endswith(b"\n"):
                record = parse_json(line)
                records.append(record | {"step": int(record["step"])})
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}: line {number} is not what train.py writes: remove it") from None
    return records


# ---- instead of training ---------------------------------------------------------------------------------


def plot(out_dir):
    """Draw loss and cIoU over the steps of OUT_DIR/log.jsonl into curves.png, whose path it returns; ValueError."""
    records = read_log(out_dir / "log.jsonl")
    losses, scores = ([(r["step"], r[name]) for r in records if r.get(name) is not None] for name in ("loss", "cIoU"))
    if not losses:
        raise ValueError(f"{out_dir / 'log.jsonl'}: no such log, or no step in it")
    # an exponential mean that starts at the first loss, so that people see the trend
    mean = accumulate((loss for _, loss in losses), lambda mean, loss: mean + 0.05 * (loss - mean))
    smooth = [(step, value) for (step, _), value in zip(losses, mean)]
    picture, last = Image.new("RGB", (960, 640), "white"), losses[-1][0]
    draw = ImageDraw.Draw(picture)
    for name, base, top, curves in (  # base: the row of the picture where 0 is, top: the largest value
            ("loss", 272, max(loss for _, loss in losses) or 1.0, [(losses, "#c8d4f0"), (smooth, "#2050c0")]),
            ("validation cIoU", 592, 1.0, [(scores, "#c03020")])):
        draw.text((48, base - 248), f"{name} over steps", fill="black")
        for share in (0, 0.25, 0.5, 0.75, 1):
            draw.line([48, base - share * 224, 912, base - share * 224], fill="#e0e0e0")
            draw.text((40, base - share * 224), f"{share * top:.2f}", "black", anchor="rm")
            draw.text((48 + share * 864, base + 8), f"{share * last:.0f}", "black", anchor="ma")
        for points, color in curves:
            spots = [(48 + step / last * 864, base - value / top * 224) for step, value in points]
            draw.line(spots, fill=color, width=2)
            for x, y in spots if len(spots) < 100 else ():
                draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=color)
    write_picture(picture, out_dir / "curves.png")
    return out_dir / "curves.png"


def merge(out_dir, base, any_weights):
    """LoRA of OUT_DIR added to its base: OUT_DIR/merged, an official directory with model.safetensors. Its path."""
    model = JanusSeg.from_pretrained(out_dir / "model.safetensors", base, torch.bfloat16, any_weights)
    model.merge()
    base = base or WEIGHTS / model.frozen["mllm"]["name"]
    weights = read_weights(base, lambda name: True)
    weights |= {f"language_model.model.{name}": w for name, w in model.llama.state_dict().items()}
    target = out_dir / "merged"
    target.mkdir(exist_ok=True)
    write_tensors(target / "model.safetensors", weights, header={"format": "pt"})
    for file in base.glob("*.json"):
        if not file.name.endswith(".index.json"):
            write_whole(target / file.name, file.read_bytes())
    return target


def print_config(args):
    """Print sizes, parameters by part, memory of a rank, arithmetic and hyper-parameters; no weights are made."""
    model, mask_tokenizer = on_meta(args)
    print(f"{args.preset}\n  SigLIP          {model.config.siglip}\n  LLaMA           {model.config.llama}")
    print(f"  mask tokenizer  {mask_tokenizer.config}")
    print(f"\n{'parameters':24}{'trainable':>14}{'frozen':>14}")
    both = nn.ModuleList([model, mask_tokenizer])
    for name, part in [*model.named_children(), ("mask tokenizer", mask_tokenizer), ("all", both)]:
        trainable = sum(p.numel() for p in part.parameters() if p.requires_grad)
        print(f"  {name:22}{trainable:14,}{sum(p.numel() for p in part.parameters()) - trainable:14,}")
    args.micro_batch_size = args.micro_batch_size or min(args.batch_size, 32)  # as DEFAULTS has it
    print(f"\nmemory of a rank with micro-batches of {args.micro_batch_size} phrases")
    for name, size in memory_of_a_rank(model, mask_tokenizer, args).items():
        print(f"  {name:22}{size / 1e9:10.2f} GB")
    print(f"\nGFLOP per sample        {training_flops(model, args.phrases) / 1e9:14,.0f}")
    print(f"hyper-parameters        {describe(args)}")


def on_meta(args):
    """(model, mask_tokenizer) as --preset, --encoder and --mask-tokenizer have them, with shapes but no weights."""
    config, janus = PRESETS[args.preset], args.preset == "llamaseg-janus"
    if args.preset in SEGVAR_PRESETS:
        with torch.device("meta"):
            model = SegVAR(replace(config, classes=load_segments(args.data, "train", args.root).classes))
        return model.learn(args.stage), model.seglat_vq
    if janus:
        config = janus_config(args.encoder) if args.encoder.exists() else config
    elif config.freeze_encoders:
        config = replace(config, siglip=SIGLIP2.get(args.encoder.name) or siglip_config(args.encoder))
    to_come = args.mask_tokenizer.name in DOWNLOADS and not args.mask_tokenizer.exists()
    vqgan = VQGANConfig() if to_come else VQGAN.from_pretrained(args.mask_tokenizer).config
    with torch.device("meta"):
        model = JanusSeg(config) if janus else LlamaSeg(config)
        mask_tokenizer = (MultiScaleVQ if vqgan.scales else VQGAN)(vqgan).requires_grad_(False)
        model.quantizer = mask_tokenizer.quantize if config.scales else None
        if janus:
            model.add_lora(args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)
    return model, mask_tokenizer


def describe(args):
    """The hyper-parameters in one line."""
    length = f"{args.epochs:g} epochs" if args.max_steps is None else f"{args.max_steps} steps"
    names = ("batch_size", "optimizer", "lr", "betas", "weight_decay", "warmup_steps", "clip")
    return f"{args.data}, {length}, " + ", ".join(f"{name.replace('_', ' ')} {getattr(args, name)}" for name in names)


# ---- what a run costs ------------------------------------------------------------------------------------


def memory_of_a_rank(model, mask_tokenizer, args):
    """{what: bytes} of one rank in training, and their sum, the peak; the modules may be on the meta device.

    Gradients stay from step to step under DDP and from one micro-batch to the next, so they add to the peak.
    """
    trainable = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trainable)
    frozen = sum(p.numel() for p in model.parameters()) - count
    moments = sum(p.numel() * (2 if isinstance(optimizer, torch.optim.AdamW) else 1)  # Muon has one
                  for optimizer in make_optimizers(model, args)
                  for group in optimizer.param_groups for p in group["params"])
    memory = {"trainable weights": 4 * count,  # float32
              # encoder bfloat16, mask tokenizer float32
              "frozen weights": 2 * frozen + 4 * sum(p.numel() for p in mask_tokenizer.parameters()),
              "bfloat16 copies": 2 * sum(p.numel() for p in trainable if p.dim() > 1),  # autocast's, for a step
              "gradients": 4 * count, "optimizer": 4 * moments,
              "activations": activation_bytes(model.config, args.micro_batch_size, args.activation_checkpointing)}
    return memory | {"peak": sum(memory.values())}


def activation_bytes(config, samples, recompute=False):
    """Bytes that `samples` phrases keep for the backward pass under bfloat16 autocast with fused attention.

    Each LLaMA layer, per token: two norms keep their float32 input (8 D) and give five bfloat16 copies to the matrices
    (10 D); attention keeps q, k, v and its output (4 H + 4 Hkv); the MLP keeps four hidden states (8 F). After the
    layers: logits in bfloat16 and float32 and their log-softmax (10 K per mask token). With activation checkpointing:
    each layer's float32 input, and all of the above for one layer and for HEAD_PART mask tokens at a time. Frozen
    encoders keep nothing; scenes' small ones are left out.
    """
    c, s = config.llama, config.siglip
    # <BOI> and <BOM> join them, and the last mask token is only predicted
    tokens = samples * (s.text_length + s.image_tokens + config.mask_tokens + 1)
    layer = 18 * c.width + 4 * (c.heads + c.kv_heads) * c.head_dim + 8 * c.mlp
    mask_tokens, layers = samples * config.mask_tokens, c.layers * layer
    if recompute:
        mask_tokens, layers = min(mask_tokens, HEAD_PART), c.layers * 4 * c.width + layer
    return tokens * layers + mask_tokens * config.codebook_size * 10


def training_flops(model, phrases):
    """FLOP of the matrix products that one phrase costs in training, of `phrases` that share a picture.

    PyTorch counts them in a forward and a backward pass without data, two per multiply-add. Elementwise work and the
    mask tokenizer do not count.
    """
    weights = {name: torch.empty_like(p, dtype=torch.float32, device="meta").requires_grad_(p.requires_grad)
               for name, p in model.named_parameters()}
    s, M = model.config.siglip, model.config.mask_tokens
    L = s.text_length if isinstance(model, LlamaSeg) else s.text_length + s.image_tokens + 2  # Janus' prompt has all
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        picture, map_shape = (1, 3, s.image_size, s.image_size), (1, s.image_size, s.image_size)
        segvar = isinstance(model, SegVAR)
        shapes = (picture, map_shape, map_shape) if segvar else ((phrases, L), picture, (phrases, M))
        batch = [torch.zeros(shape, dtype=torch.float32 if len(shape) == 4 else torch.long) for shape in shapes]
        functional_call(model, weights, tuple(batch))[1].backward()
    return counter.get_total_flops() / phrases


@torch.no_grad()
def matmul_rate(device, dtype):
    """FLOP/s of a square matrix product, the best of five: the peak that the log's `mfu` is a share of."""
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(timeit.repeat(lambda: (a @ a, clock(device)), number=1))  # clock waits for a GPU


# ---- the command -----------------------------------------------------------------------------------------


def main(argv=None):
    """Run; returns the exit code: 0, also when a signal stopped it after a step; 1 for bad data, 2 for bad usage."""
    args, code = parse_args(argv), 1
    try:
        code = flags().run(job, args)
    except SystemExit as error:  # bad usage that only the data shows
        code = error.code
    except (RuntimeError, MemoryError) as error:
        if not (dist.is_initialized() or isinstance(error, (torch.OutOfMemoryError, MemoryError))):
            raise
        print(f"error: {printable(f'{error!s:.200}')}: out of memory (lower --micro-batch-size, or "
              "--activation-checkpointing), or another rank ended", file=sys.stderr, flush=True)
    if code and dist.is_initialized():
        os._exit(code)  # the other ranks would wait for this one: torchrun ends them
    return code


def job(args):
    """Print, plot, merge or train, as the flags ask."""
    if args.print_config:
        if int(os.environ.get("RANK", 0)) == 0:  # once, not once per process of torchrun
            print_config(args)
    elif args.plot:
        print(f"wrote {plot(args.plot)}")
    elif args.merge:
        print(f"wrote {merge(args.merge, args.encoder, args.any_weights)}")
    else:
        with ExitStack() as at_end:
            train(args, at_end)


if __name__ == "__main__":
    sys.exit(main())
