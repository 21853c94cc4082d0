"""Train LlamaSeg: one visible loop, on a laptop CPU, one GPU or many.

    python train.py                                   # the `scenes` preset on this machine
    torchrun --nproc_per_node=2 train.py              # the same run on two processes (gloo on CPU, NCCL on GPU)
    python train.py --out-dir out --resume auto       # go on where out/ stopped; Ctrl-C and SIGTERM save first
    python train.py --plot out                        # out/curves.png from the log
    python train.py --preset llamaseg-b --print-config    # sizes, memory, hyper-parameters; trains nothing
    torchrun --nproc_per_node=8 train.py --preset llamaseg-b --stage pretrain --root data   # the paper, first stage
    torchrun --nproc_per_node=8 train.py --preset llamaseg-janus --stage pretrain --root data    # LoRA on Janus-Pro
    python train.py --merge out                       # LoRA into a whole Janus directory: out/merged

OUT_DIR gets log.jsonl (one object a step), curves.png, grid-STEP.png at each evaluation (picture, phrase, predicted,
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
import zipfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import Batches, LabelMaps, contact_sheet, hold_out, load_mixture, to_pixels, write_picture
from metrics import BadUsage, Parser, SegmentationMetrics, parse_json, printable, regular, whole, write_json
from mllm import LORA_TARGETS, JanusConfig, JanusPrompt, JanusSeg, janus_config
from mllm import PRESETS as MLLM_PRESETS
from model import (
    HEAD_PART,
    SIGLIP2,
    LlamaSeg,
    SigLIP,
    clock,
    compute_dtype,
    peak_memory,
    pick_device,
    siglip_config,
)
from model import PRESETS as MODEL_PRESETS
from sample import Segmenter, check_fit, one_rank_first, setup_ranks
from scenes import WORLDS
from tokenizer import VQGAN, TextTokenizer, VQGANConfig, mask_to_image, read_tokens
from weights import (
    ASSETS,
    DOWNLOADS,
    WEIGHTS,
    check_source,
    locate,
    only_one,
    read_header,
    read_weights,
    write_tensors,
)

PRESETS = MODEL_PRESETS | MLLM_PRESETS

# What a preset means where a flag is left out, and below what a stage says instead. --help has the flags.
SCENES_RECIPE = {
    "mask_tokenizer": ASSETS / "mask_tokenizer.safetensors", "text_tokenizer": ASSETS / "text.model",
    "optimizer": "muon", "lr": 3e-3, "betas": (0.9, 0.95), "weight_decay": 0.05, "batch_size": 64,
    "warmup_steps": 100, "hide": True, "background_weight": 0.4, "data": "scenes",
}  # fmt: skip
# Paper: batch size, warm-up of pre-training, gradient clipping and which tokenizer of LlamaGen (c2i or t2i) are not
# stated; we use LlamaGen's batch of 256 (32 phrases on each of 8 GPUs), 1000 steps, 1.0 and c2i.
PAPER_RECIPE = {
    "mask_tokenizer": WEIGHTS / "vq_ds16_c2i",  # llamaseg-janus: its own
    "optimizer": "adamw", "lr": 2e-4, "betas": (0.9, 0.95), "weight_decay": 0.05, "batch_size": 256,
    "warmup_steps": 1000, "hide": False, "background_weight": 1.0, "data": "scenes",
}  # fmt: skip
FINE_TUNING = {"optimizer": "adamw", "lr": 1e-4, "betas": (0.9, 0.99), "weight_decay": 0.0, "warmup_steps": 0.01}
STAGES = {
    # Paper: how the sets are mixed is not stated; we use about their sizes, 2M masks to 4 x 0.1M phrases.
    "pretrain": {"optimizer": "adamw", "lr": 2e-4, "betas": (0.9, 0.95), "weight_decay": 0.05, "epochs": 4,
                 "data": "sa-ovrs:16,refcoco:1,refcoco+:1,refcocog:1,refclef:1"},
    "finetune-semantic": {**FINE_TUNING, "epochs": 10, "data": "ade20k"},  # or --data cocostuff
    "finetune-referring": {**FINE_TUNING, "epochs": 20, "data": "refcoco,refcoco+,refcocog"},
}  # fmt: skip


def parse_args(argv=None):
    """The flags, in groups."""
    parser = Parser(description=__doc__)
    group = parser.add_argument_group("model and data")
    group.add_argument("--preset", default="scenes", choices=sorted(PRESETS), help="the model's shape (model.py)")
    group.add_argument("--stage", choices=sorted(STAGES), help="the paper's: sets data, epochs, learning rate, betas, "
                       "weight decay and warm-up; a flag of your own still wins (default: none)")
    group.add_argument("--data", help="data sets with weights, as in ade20k:1,refcoco:2; README has "
                       "their names (default: scenes)")
    group.add_argument("--val", metavar="DATA", help="validation set (default: the val split of the first of --data; "
                       "of a jsonl file, a twentieth of its pictures, which are then not trained on)")
    group.add_argument("--root", type=Path, help="folder in which their official archives were unpacked")
    group.add_argument("--mask-tokens", type=Path, metavar="FILE",
                       help="cached mask tokens of the training split (tokenizer.py encode): the VQGAN encoder rests")
    group.add_argument("--phrases", type=int, help="phrases asked of each picture of scenes (default: 4)")
    group.add_argument("--encoder", type=Path, metavar="DIR",
                       help="frozen SigLIP or SigLIP2, a Hugging Face directory or a name that weights.py downloads "
                       "(default: none for scenes, siglip2-large for llamaseg-b and -l); llamaseg-janus: the Janus "
                       "directory (default: janus-pro-1b), tokenizers included")
    group.add_argument("--mask-tokenizer", type=Path, metavar="FILE",
                       help="frozen VQGAN (default: the embedded one for scenes, vq_ds16_c2i for llamaseg-*)")
    group.add_argument("--text-tokenizer", type=Path, metavar="FILE",
                       help="tokenizer.model or .json (default: the embedded one for scenes, else the encoder's)")
    group.add_argument("--any-weights", action="store_true",
                       help="with --init-from or --resume: take frozen parts other than those of that training")
    group.add_argument("--init-from", type=Path, metavar="FILE", help="start from the weights of a model.safetensors")
    group = parser.add_argument_group("optimization")
    group.add_argument("--max-steps", type=int, help="optimizer steps of the whole run (default: 6000)")
    group.add_argument("--epochs", type=float, help="instead: times that the run goes through the data")
    group.add_argument("--batch-size", type=int,
                       help="phrases in a step: all ranks, all micro-batches (default: 64; llamaseg-*: 256)")
    group.add_argument("--micro-batch-size", type=int, metavar="N", help="phrases in one forward pass of one rank "
                       "(default: batch size / ranks, no accumulation)")
    group.add_argument("--optimizer", choices=("muon", "adamw"), help="muon: Muon for the matrices, AdamW for "
                       "the rest; adamw: the paper's (default: muon; llamaseg-*: adamw)")
    group.add_argument("--lr", type=float, help="peak learning rate (default: 3e-3; llamaseg-*: 2e-4, the paper's)")
    group.add_argument("--betas", type=float, nargs=2, help="of AdamW (default: 0.9 0.95; fine-tuning: 0.9 0.99)")
    group.add_argument("--warmup-steps", type=float, help="linear warm-up, then cosine to 0; below 1: a share of all "
                       "steps (default: 100; llamaseg-*: 1000; fine-tuning: 0.01)")
    group.add_argument("--weight-decay", type=float, help="on matrices (default: 0.05, the paper's; fine-tuning: 0)")
    group.add_argument("--clip", type=float, default=1.0, help="gradient norm limit (default: 1)")
    group.add_argument("--hide", action=argparse.BooleanOptionalAction, help="hide a random share of the mask tokens "
                       "from the model's input (default: on; llamaseg-*: off)")
    group.add_argument("--background-weight", type=float, metavar="W", help="weight in the loss of mask token 0, plain "
                       "background in the embedded mask tokenizer (default: 0.4; llamaseg-*: 1, the paper's)")
    group.add_argument("--seed", type=int, default=0, help="of the initial weights and of all batches (default: 0)")
    group.add_argument("--lora-rank", type=int, default=16, help="of llamaseg-janus (default: 16)")
    group.add_argument("--lora-alpha", type=float, default=32.0, help="default: 32")
    group.add_argument("--lora-dropout", type=float, default=0.0, help="default: 0")
    group.add_argument("--lora-targets", nargs="+", default=LORA_TARGETS, choices=LORA_TARGETS, metavar="NAME",
                       help=f"linear layers that get one (default: {' '.join(LORA_TARGETS)})")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                       help="of autocast; auto: bfloat16 where the device multiplies it fast (default: auto)")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile")
    group.add_argument("--activation-checkpointing", action="store_true", help="keep only the layers' inputs and run "
                       "each layer again in the backward pass: a third more arithmetic, a fraction of the memory")
    group.add_argument("--workers", type=int, default=-1,
                       help="processes that draw batches (default: 0 on CPU, 4 on a GPU)")
    group = parser.add_argument_group("what is kept")
    group.add_argument("--out-dir", type=Path, default=Path("out"), help="default: out")
    group.add_argument("--eval-every", type=int, default=500, help="steps between evaluations (default: 500)")
    group.add_argument("--eval-count", type=int, default=200, help="validation examples (default: 200)")
    group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (default: 500)")
    group.add_argument("--keep", type=int, default=2, help="checkpoints to keep, the newest (default: 2)")
    group.add_argument("--resume", metavar="{auto,PATH}", help="go on from a checkpoint-STEP.pt; auto: from OUT_DIR's "
                       "newest whole one, if any")
    group.add_argument("--wandb", metavar="PROJECT", help="also log to Weights & Biases, if the package is there")
    group = parser.add_argument_group("instead of training")
    group.add_argument("--print-config", action="store_true",
                       help="print sizes, parameters, memory and hyper-parameters; allocates no model")
    group.add_argument("--merge", type=Path, metavar="OUT_DIR", help="add the LoRA of a llamaseg-janus run to its base "
                       "and write OUT_DIR/merged, a Janus directory of its own")
    group.add_argument("--plot", type=Path, metavar="OUT_DIR", help="draw the loss and cIoU of a run: curves.png")
    args = parser.parse_args(argv)
    refuse_unread(parser, args)
    if args.max_steps and args.epochs:
        parser.error(f"--max-steps {args.max_steps} and --epochs {args.epochs:g} both say how long: drop one")
    recipe = SCENES_RECIPE if args.preset == "scenes" else PAPER_RECIPE
    for name, value in {**recipe, **STAGES.get(args.stage, {})}.items():
        if getattr(args, name) is None and not (name == "epochs" and args.max_steps):
            setattr(args, name, value)
    if not args.epochs and args.max_steps is None:
        args.max_steps = 6000
    if args.preset == "llamaseg-janus":
        args.encoder = locate(args.encoder or Path("janus-pro-1b"))
        args.mask_tokenizer = args.text_tokenizer = args.encoder
    elif PRESETS[args.preset].freeze_encoders:
        args.encoder = args.encoder or Path(f"siglip2-large-patch16-{PRESETS[args.preset].siglip.image_size}")
    elif args.encoder and not args.merge:
        parser.error(f"--encoder {args.encoder}: --preset {args.preset} trains its own encoder")
    sets = {re.sub(r":\d+$", "", part.strip()) for part in f"{args.data},{args.val or ''}".split(",") if part.strip()}
    if args.phrases is not None and args.data not in WORLDS:
        parser.error(f"--phrases {args.phrases} is for drawn scenes alone, not for --data {args.data}")
    if args.root and sets <= WORLDS.keys():
        parser.error(f"--root {args.root}: scenes are drawn, not read from a folder")
    if args.phrases is None:
        args.phrases = 4 if args.data in WORLDS else 1
    args.encoder, args.mask_tokenizer = locate(args.encoder), locate(args.mask_tokenizer)
    args.text_tokenizer = args.text_tokenizer or args.encoder
    for name in ("phrases", "max_steps", "batch_size", "micro_batch_size", "eval_every", "eval_count", "save_every",
                 "keep"):  # fmt: skip
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    for name, low in (("lr", 0.0), ("weight_decay", -1e-9), ("clip", 0.0), ("background_weight", 0.0),
                      ("warmup_steps", -1e-9), ("epochs", 0.0)):  # fmt: skip
        if getattr(args, name, None) is not None and not low < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be above {max(low, 0):g} and finite")
    if not (0 <= args.seed < 2**32 and args.workers >= -1):
        parser.error(f"--seed {args.seed} must be in [0, 2^32), --workers {args.workers} not negative")
    if not all(0 <= beta < 1 for beta in args.betas):
        parser.error(f"--betas {args.betas[0]:g} {args.betas[1]:g} must be in [0, 1)")
    try:
        pick_device(args.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    return args


def refuse_unread(parser, args):
    """A usage error for a flag that the asked job would not read."""
    if args.plot:
        parser.check_read(args, "--plot", ("plot",))
    if args.merge:
        parser.check_read(args, "--merge", ("merge", "encoder", "any_weights"))
    lora = [name for name in vars(args) if name.startswith("lora_") and getattr(args, name) != parser.get_default(name)]
    if lora and (args.preset != "llamaseg-janus" or args.init_from):
        parser.error(f"--{lora[0].replace('_', '-')} is for a new run of --preset llamaseg-janus")
    if args.preset == "llamaseg-janus" and (args.mask_tokenizer or args.text_tokenizer):
        parser.error("--preset llamaseg-janus has both tokenizers in its own directory: drop --mask-tokenizer and "
                     "--text-tokenizer")  # fmt: skip
    if args.any_weights and not (args.init_from or args.resume or args.merge):
        parser.error("--any-weights has no use without --init-from, --resume or --merge")


# ----------------------------------------------------------------------------------------------------------
# distributed: plain torchrun


def on_signal(handler):
    """What Ctrl-C and SIGTERM do from now on."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, handler)


def leave_signals_to_parent(worker_id):
    """A DataLoader worker ignores Ctrl-C and SIGTERM, which reach the whole process group: its parent ends it."""
    on_signal(signal.SIG_IGN)


def mean_over_ranks(value, world_size):
    """Mean of a tensor over all ranks."""
    if world_size > 1:
        dist.all_reduce(value)
    return value / world_size


# ----------------------------------------------------------------------------------------------------------
# the parts of a step


def learning_rate(step, args):
    """Linear warm-up, then cosine to 0; step counts from 0."""
    warmup = args.warmup_steps if args.warmup_steps >= 1 else round(args.warmup_steps * args.max_steps)
    if step < warmup:
        return args.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, args.max_steps - warmup)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizers(model, args):
    """AdamW (paper: see STAGES), or Muon (Jordan et al. 2024) for the matrices.

    Embeddings, the head, vectors and the patch embedding stay with AdamW, as Muon's authors advise.
    """
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    inner = {name: p for name, p in parameters.items() if "embedding" not in name and name != "head.weight"}
    matrices = [p for p in inner.values() if p.dim() == 2]
    chosen = {id(p) for p in matrices}
    tables = [p for p in parameters.values() if p.dim() > 1 and id(p) not in chosen]
    vectors = [p for p in parameters.values() if p.dim() <= 1]
    if args.optimizer == "adamw":
        matrices, tables = [], matrices + tables
    groups = [{"params": tables, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    # fused: one pass over the memory instead of a dozen
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters.values())
    optimizers = [torch.optim.AdamW(groups, lr=args.lr, betas=tuple(args.betas), fused=fused)] if groups else []
    if matrices:
        # match_rms_adamw: one learning rate serves both (Liu et al. 2025, "Muon is scalable")
        optimizers.append(torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))  # fmt: skip
    return optimizers


def evaluate(segmenter, dataset, count, rank=0, world_size=1, batch_size=32,
             progress=False):  # fmt: skip
    """Greedy masks of `count` examples, evenly spread over the data set, against the truth at the pictures' own sizes.

    Every rank takes every world_size-th example and all get the whole result. Returns (SegmentationMetrics,
    {task: SegmentationMetrics}, cells for a contact sheet: (phrase, [picture, predicted, truth])).
    """
    total, by_task, cells, training = SegmentationMetrics(), {}, [], segmenter.model.training
    segmenter.model.eval()
    count = min(count, len(dataset))
    mine = [i * len(dataset) // count for i in range(count)][rank::world_size]
    for start in tqdm(range(0, len(mine), batch_size), desc="evaluate", leave=False, disable=not progress):
        examples = [dataset[i] for i in mine[start : start + batch_size]]
        masks = segmenter.many([e.image for e in examples], [[e.phrase] for e in examples])
        for example, (mask,) in zip(examples, masks):
            scores = by_task.setdefault(example.task, SegmentationMetrics())
            for metrics in (total, scores):
                metrics.update(mask, example.mask, label=example.label, id=example.id, ignore=example.ignore)
            if len(cells) < 24:
                cells.append((example.phrase, [example.image, mask, example.mask]))
    segmenter.model.train(training)
    if world_size > 1:
        gathered = [None] * world_size
        dist.all_gather_object(gathered, (total, by_task))
        total, by_task = SegmentationMetrics(), {}
        for other_total, other_tasks in gathered:
            total.merge(other_total)
            for task, scores in other_tasks.items():
                by_task.setdefault(task, SegmentationMetrics()).merge(scores)
    return total, by_task, cells


# What a resumed run must share with the one it goes on from. Steps, learning rate, warm-up and ranks may change.
SAME_RUN = ("preset", "data", "val", "phrases", "hide", "background_weight", "batch_size", "seed", "optimizer",
            "betas", "weight_decay", "clip", "lora_alpha", "lora_dropout", "files")  # fmt: skip


def save_weights(model, path):
    """The weights alone: in float16, or whole where they are LoRA's few."""
    model.save_pretrained(path, dtype=None if isinstance(model, JanusSeg) else torch.float16)


def saved_steps(out_dir):
    """Paths of the checkpoints in OUT_DIR, newest first."""
    paths = [path for path in out_dir.glob("checkpoint-*.pt") if re.fullmatch(r"checkpoint-\d+", path.stem)]
    return sorted(paths, key=step_of, reverse=True)


def run_of(args):
    """What a checkpoint records of its run."""
    values = {name: getattr(args, name) for name in SAME_RUN}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def step_of(path):
    """Optimizer steps that a checkpoint has done."""
    return int(path.stem.removeprefix("checkpoint-"))


def save_checkpoint(out_dir, model, optimizers, step, args):
    """Weights, optimizers and step; then the newest `--keep` checkpoints stay.

    A temporary name first, on the disk before it is renamed: a machine that dies at any moment leaves whole files.
    No random state: a batch is a function of (seed, step), and the model itself draws nothing.
    """
    path = out_dir / f"checkpoint-{step:07d}.pt"
    state = {"model": model.trained_state(), "optimizers": [o.state_dict() for o in optimizers], "step": step,
             "run": run_of(args), "frozen": model.frozen}  # fmt: skip
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


class Damaged(ValueError):
    """A checkpoint that is cut off or is none."""


def load_checkpoint(path, model, optimizers, args):
    """Put a checkpoint back; returns the steps it has done. Damaged if it is not whole, ValueError if it is not this
    run's."""
    try:
        with zipfile.ZipFile(regular(path)) as archive:  # torch.load does not look at the checksums
            if broken := archive.testzip():
                raise ValueError(f"{broken} is damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        run, step, frozen = state["run"], state["step"], state["frozen"]
        if not (isinstance(run, dict) and type(step) is int and step > 0 and isinstance(state["model"], dict)
                and all(part["sha256"] for part in frozen.values())):  # fmt: skip
            raise ValueError("its contents are not those of a run")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises many kinds for a damaged file
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Damaged(f"{path}: not a whole checkpoint of train.py ({line})") from None
    other = [f"--{name.replace('_', '-')} {run[name]}, not {asked}" for name, asked in run_of(args).items()
             if name in run and run[name] != asked]  # fmt: skip
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
            check_moments(optimizer, saved)
            optimizer.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: does not fit --preset {args.preset} --optimizer {args.optimizer} "
                         f"({str(error).splitlines()[0]})") from None  # fmt: skip
    return step


def check_moments(optimizer, saved):
    """ValueError unless the moments of a saved optimizer have the shapes of the parameters, which PyTorch trusts."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, moments in saved["state"].items():
        for name, w in moments.items():
            if w.shape not in ((), parameters[index].shape) or not w.isfinite().all():
                raise ValueError(f"{name} of parameter {index} is {tuple(w.shape)}, expected finite numbers of shape "
                                 f"{tuple(parameters[index].shape)}")  # fmt: skip


def read_log(path):
    """The records of a log.jsonl, none if there is no such file. A last line without its end, as a killed run leaves
    it, is left out; ValueError for any other line that train.py does not write."""
    records, lines = [], regular(path).read_bytes().splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n"):
            try:
                records.append(parse_json(line))
                numbers = [records[-1].get(name) for name in ("step", "loss", "cIoU", "mIoU")]
                if not numbers[0] > 0 or not all(value is None or math.isfinite(value) for value in numbers):
                    raise ValueError
            except (ValueError, TypeError, AttributeError):
                raise ValueError(f"{path}: line {number} is not what train.py writes: remove it") from None
    return records


def trim_log(path, step):
    """Drop what a killed run logged after the checkpoint that it goes on from: those steps come again."""
    if path.exists():
        lines = [json.dumps(record) + "\n" for record in read_log(path) if record["step"] <= step]
        write_whole(path, "".join(lines).encode())


def evaluated(path, step):
    """Whether a log has the evaluation of a step."""
    return any("cIoU" in record for record in read_log(path) if record["step"] == step)


def best_score(path, metric):
    """The best evaluation in a log; -1 if there is none."""
    return max((record[metric] for record in read_log(path) if record.get(metric) is not None), default=-1.0)


def write_whole(path, content):
    """Write bytes to a file."""
    with whole(path) as temporary:
        temporary.write_bytes(content)


# ----------------------------------------------------------------------------------------------------------
# what a run would cost

PAPER = """  pre-training          SA-OVRS and the referring sets, 4 epochs; AdamW 2e-4, betas 0.9 / 0.95,
                        weight decay 0.05
  fine-tuning           ADE20K or COCO-Stuff 10 epochs, referring 20 epochs; AdamW 1e-4, betas 0.9 / 0.99,
                        no weight decay, warm-up 1 %, then cosine
  not stated            batch size, warm-up of pre-training, clipping, MLP width, size of SigLIP2"""


def activation_bytes(config, samples, recompute=False):
    """Bytes that `samples` phrases keep for the backward pass under bfloat16 autocast with fused attention.

    Each LLaMA layer, a token: two norms keep their float32 input (8 D) and give five bfloat16 copies to the matrices
    (10 D); attention keeps q, k, v and its output (4 H + 4 Hkv); the MLP keeps four hidden states (8 F). After the
    layers: logits in bfloat16 and float32 and their log-softmax (10 K a mask token). With activation checkpointing:
    each layer's float32 input, and all of the above for one layer and for HEAD_PART mask tokens at a time. Frozen
    encoders keep nothing; scenes' small ones are left out.
    """
    c, tokens = config.llama, samples * (sum(sequence(config).values()) - 1)  # the last mask token is only predicted
    H, Hkv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    layer = 18 * c.width + 4 * H + 4 * Hkv + 8 * c.mlp
    logits = samples * config.mask_tokens
    if recompute:
        kept = tokens * (c.layers * 4 * c.width + layer)
        return kept + min(logits, HEAD_PART) * config.codebook_size * 10
    return tokens * c.layers * layer + logits * config.codebook_size * 10


def training_flops(config, phrases=1):
    """FLOP that one phrase costs in training, of `phrases` that share a picture; two per multiply-add.

    A trained matrix of n weights costs 6 n a token, a frozen one 2 n, and attention 12 T width a token and layer
    (4 if frozen), as in PaLM's appendix B. Elementwise work, the mask tokenizer and recomputation do not count.
    """
    s, c = config.siglip, config.llama
    tokens, N, M = sum(sequence(config).values()) - 1, s.image_tokens, config.mask_tokens
    D, H, Hkv = c.width, c.heads * c.head_dim, c.kv_heads * c.head_dim

    def tower(tokens, layers, width, mlp):  # the forward pass of one of SigLIP's towers
        return tokens * layers * (2 * (4 * width * width + 2 * width * mlp) + 4 * tokens * width)

    image = tower(N, s.vision_layers, s.vision_width, s.vision_mlp) + N * 2 * 3 * s.patch_size**2 * s.vision_width
    text = tower(s.text_length, s.text_layers, s.text_width, s.text_mlp)
    adaptors = s.text_length * 2 * D * (s.text_width + D) + N / phrases * 2 * D * (s.vision_width + D)
    llama = tokens * c.layers * (2 * D * (2 * H + 2 * Hkv + 3 * c.mlp) + 4 * tokens * H)
    if isinstance(config, JanusConfig):  # all of it frozen: LoRA itself is next to nothing, gradients pass through
        aligner = N * 2 * D * (s.vision_width + (config.projector_layers - 1) * D)
        head = M * 2 * (D * config.head_width + config.head_width * config.codebook_size)
        return 2 * (llama + head) + (image + aligner) / phrases
    encoders = image / phrases + text
    return 3 * (adaptors + llama + M * 2 * D * config.codebook_size) + encoders * (1 if config.freeze_encoders else 3)


@torch.no_grad()
def matmul_rate(device, dtype):
    """FLOP/s of a square matrix product, the best of five: the peak that the log's `mfu` is a share of."""
    n = 1024 if device.type == "cpu" else 8192
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        start = clock(device)
        a @ a
        seconds.append(clock(device) - start)
    return 2 * n**3 / min(seconds)


def sequence(config):
    """Tokens of one sample by kind, in their order."""
    return {"text": config.siglip.text_length, "<BOI>": 1, "image": config.siglip.image_tokens, "<BOM>": 1,
            "mask": config.mask_tokens}  # fmt: skip


def print_config(args):
    """Sizes, parameters by part, tokens of a sample, memory of a rank and hyper-parameters; no weights are made."""
    config, janus = PRESETS[args.preset], args.preset == "llamaseg-janus"
    if janus and args.encoder.exists():
        config = janus_config(args.encoder)
    elif not janus and config.freeze_encoders:
        siglip = SIGLIP2.get(args.encoder.name) or siglip_config(args.encoder)
        config = replace(config, siglip=siglip)
    to_come = args.mask_tokenizer.name in DOWNLOADS and not args.mask_tokenizer.exists()
    vqgan = VQGANConfig() if to_come else VQGAN.from_pretrained(args.mask_tokenizer).config
    with torch.device("meta"):
        model, mask_tokenizer = JanusSeg(config) if janus else LlamaSeg(config), VQGAN(vqgan)
        if janus:
            model.add_lora(args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)
    s, c = config.siglip, config.llama
    print(f"{args.preset}")
    print(f"  picture               {s.image_size} px, patches of {s.patch_size} px")
    print(f"  SigLIP vision         {s.vision_layers} layers x {s.vision_width}, {s.vision_heads} heads")
    if not janus:
        print(f"  SigLIP text           {s.text_layers} layers x {s.text_width}, {s.text_heads} heads, "
              f"{s.vocab_size} pieces")
    print(f"  LLaMA                 {c.layers} layers x {c.width}, {c.heads} heads of {c.head_dim}, MLP {c.mlp}")
    print(f"  mask tokenizer        {config.codebook_size} codes x {vqgan.codebook_dim}, downsample {vqgan.downsample}")
    parts = dict(model.named_children()) if janus else {
        "SigLIP vision": model.encoder.vision_model, "SigLIP text": model.encoder.text_model,
        "adaptors": nn.ModuleList([model.text_adaptor, model.image_adaptor]), "<BOI> and <BOM>": None,
        "mask embedding": model.mask_embedding, "LLaMA": model.llama, "head": model.head}  # fmt: skip
    parts["mask tokenizer"] = mask_tokenizer.requires_grad_(False)
    print(f"\n{'parameters':24}{'trainable':>14}{'frozen':>14}")
    sums = {True: 0, False: 0}
    for name, module in parts.items():
        counts = {True: 0, False: 0}
        for p in module.parameters() if module else (model.boi, model.bom):
            counts[p.requires_grad] += p.numel()
            sums[p.requires_grad] += p.numel()
        print(f"  {name:22}{counts[True]:14,}{counts[False]:14,}")
    print(f"  {'all':22}{sums[True]:14,}{sums[False]:14,}")
    tokens = sequence(config)
    terms = " + ".join(f"{name} {n}" for name, n in tokens.items())
    print(f"\ntokens of a sample       {terms} = {sum(tokens.values())}")

    ranks = int(os.environ.get("WORLD_SIZE", 1))
    micro_batch_size = args.micro_batch_size or args.batch_size // ranks
    if micro_batch_size < 1 or args.batch_size % (micro_batch_size * ranks):
        raise ValueError(f"batch size {args.batch_size} must be a multiple of {ranks} ranks x {micro_batch_size}")
    memory = memory_of_a_rank(model, mask_tokenizer, config, args, micro_batch_size)
    print(f"\nmemory of a rank         {ranks} ranks, {micro_batch_size} of {args.batch_size} samples in a micro-batch")
    alone = ranks == 1 and args.batch_size == micro_batch_size
    for name, size in [*memory.items(), ("peak", peak_of(memory, alone))]:
        print(f"  {name:22}{size / 1e9:10.2f} GB")
    gflop, count = training_flops(config, args.phrases) / 1e9, 6 * sums[True] * sum(tokens.values()) / 1e9
    print(f"\narithmetic               {gflop:,.0f} GFLOP to train on a sample (6 x trainable x tokens: {count:,.0f})")
    print(f"\nthis run                 {describe(args)}")
    print(f"\nthe paper\n{PAPER}")


def memory_of_a_rank(model, mask_tokenizer, config, args, micro_batch_size):
    """{what: bytes} of one rank in training; the modules may be on the meta device."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return {
        "trainable weights": 4 * sum(p.numel() for p in trainable),  # float32
        "frozen weights": 2 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
        + 4 * sum(p.numel() for p in mask_tokenizer.parameters()),  # encoder bfloat16, mask tokenizer float32
        "bfloat16 copies": 2 * sum(p.numel() for p in trainable if p.dim() > 1),  # autocast's, for a step
        "gradients": 4 * sum(p.numel() for p in trainable),
        "optimizer": optimizer_bytes(model, args),
        "activations": activation_bytes(config, micro_batch_size, args.activation_checkpointing),
    }


def peak_of(memory, alone):
    """Bytes that are there at once. Gradients stay from step to step under DDP and from one micro-batch to the next;
    a rank `alone` without accumulation makes them while the activations go."""
    return sum(memory.values()) - (min(memory["gradients"], memory["activations"]) if alone else 0)


def describe(args):
    """The resolved hyper-parameters in words."""
    warmup = f"{args.warmup_steps:g} steps" if args.warmup_steps >= 1 else f"{100 * args.warmup_steps:g} % of the steps"
    length = f"{args.epochs:g} epochs" if args.max_steps is None else f"{args.max_steps} steps"
    betas = f"{args.betas[0]:g} / {args.betas[1]:g}"
    return (f"{args.data}, {length} of {args.batch_size} phrases; {args.optimizer}, lr {args.lr:g}, betas {betas}, "
            f"weight decay {args.weight_decay:g}, warm-up {warmup}, cosine to 0, clip {args.clip:g}")  # fmt: skip


def optimizer_bytes(model, args):
    """What the optimizers keep: AdamW two float32 moments a parameter, Muon one."""
    return sum(4 * p.numel() * (2 if isinstance(optimizer, torch.optim.AdamW) else 1)
               for optimizer in make_optimizers(model, args) for group in optimizer.param_groups
               for p in group["params"])  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# what people see


class Log:
    """log.jsonl, the progress bar, the pictures and, if asked for, Weights & Biases; on the master alone."""

    def __init__(self, args):
        self.out_dir, self.wandb = args.out_dir, None
        if args.wandb:
            try:
                import wandb
            except ImportError:
                raise ImportError(f"--wandb {args.wandb}: pip install wandb first, or leave it out") from None
            self.wandb = wandb.init(project=args.wandb, config={k: str(v) for k, v in vars(args).items()})
        self.file = open(args.out_dir / "log.jsonl", "a", buffering=1)

    def write(self, record):
        self.file.write(json.dumps(record) + "\n")
        if self.wandb:
            self.wandb.log(record, step=record["step"])

    def step(self, bar, step, loss, grad_norm, lr, samples_per_s, mask_tokens_per_s, mfu, peak_bytes):
        """mfu: model FLOP utilisation, training_flops a second over the rate of one large matrix product."""
        bar.set_postfix_str(f"loss {loss:.4f} lr {lr:.1e} {samples_per_s:.0f} samples/s mfu {100 * mfu:.0f} %",
                            refresh=False)  # fmt: skip
        self.write({"step": step, "loss": loss, "grad_norm": grad_norm, "lr": lr, "samples_per_s": samples_per_s,
                    "mask_tokens_per_s": mask_tokens_per_s, "mfu": mfu,
                    "peak_memory_gb": peak_bytes / 1e9})  # fmt: skip

    def evaluation(self, step, scores, by_task, cells):
        tasks = {task: metrics.compute()["cIoU"] for task, metrics in sorted(by_task.items())}
        self.write({"step": step, **scores, "tasks": tasks})
        contact_sheet(cells, self.out_dir / f"grid-{step:06d}.png")
        shown = {name: "-" if value is None else f"{value:.4f}" for name, value in scores.items()}
        tqdm.write(f"step {step}: cIoU {shown['cIoU']} gIoU {shown['gIoU']} mAHD@0.5 {shown['mAHD@0.5']} px")


def plot(out_dir):
    """Draw loss and cIoU over the steps of OUT_DIR/log.jsonl into curves.png; returns its path.

    FileNotFoundError without a log, ValueError for one without steps.
    """
    path = out_dir / "log.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such log")
    records = read_log(path)
    losses = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    scores = [(r["step"], r["cIoU"]) for r in records if r.get("cIoU") is not None]
    if not losses:
        raise ValueError(f"{path}: holds no step")
    width, height, margin = 960, 320, 48
    picture = Image.new("RGB", (width, 2 * height), "white")
    draw = ImageDraw.Draw(picture)
    last = max(step for step, _ in losses)
    smooth, mean = [], losses[0][1]  # a running mean, that people see the trend
    for step, loss in losses:
        mean += 0.05 * (loss - mean)
        smooth.append((step, mean))
    rows = [("loss", max(loss for _, loss in losses) or 1.0, [(losses, "#c8d4f0"), (smooth, "#2050c0")]),
            ("cIoU, validation", 1.0, [(scores, "#c03020")])]  # fmt: skip
    for row, (name, top, curves) in enumerate(rows):
        base = (row + 1) * height - margin

        def place(step, value, base=base, top=top):
            return margin + step / last * (width - 2 * margin), base - value / top * (height - 2 * margin)

        for share in (0, 0.25, 0.5, 0.75, 1):
            (x, y), (far, _) = place(0, share * top), place(last, share * top)
            draw.line([x, y, far, y], fill="#e0e0e0")
            draw.text((8, y - 6), f"{share * top:.2f}", fill="black")
            draw.text((place(share * last, 0)[0] - 12, base + 8), f"{share * last:.0f}", fill="black")
        draw.text((margin, base - height + 2 * margin - 24), f"{name} over steps", fill="black")
        for points, color in curves:
            spots = [place(*point) for point in points]
            draw.line(spots, fill=color, width=2)
            if len(spots) < 100:
                for x, y in spots:
                    draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=color)
    write_picture(picture, out_dir / "curves.png")
    return out_dir / "curves.png"


# ----------------------------------------------------------------------------------------------------------
# the run


def open_run(args, model, optimizers, text_tokenizer, master, say):
    """Make OUT_DIR what sample.py and --resume need; returns the steps already done."""
    log = args.out_dir / "log.jsonl"
    paths = saved_steps(args.out_dir) if args.resume == "auto" else [Path(args.resume)] if args.resume else []
    from_here = args.resume == "auto" or args.resume and paths[0].resolve().parent == args.out_dir.resolve()
    run_is_here = bool(saved_steps(args.out_dir)) or log.exists() and log.stat().st_size > 0
    if master and run_is_here and not from_here:
        raise FileExistsError(f"{args.out_dir} holds a run: --resume auto goes on, --out-dir starts elsewhere")
    if master and not run_is_here and (args.out_dir / "model.safetensors").exists():
        raise FileExistsError(f"{args.out_dir} holds a model.safetensors, which the run would overwrite: give another "
                              "--out-dir")  # fmt: skip
    done, damaged = 0, []
    for path in paths:
        try:
            done = load_checkpoint(path, model, optimizers, args)
            break
        except Damaged as error:
            damaged.append((path, error))
    if damaged and done == 0:
        raise damaged[-1][1]
    if dist.is_initialized():  # without a common file system the ranks may have found different ones
        steps = [None] * dist.get_world_size()
        dist.all_gather_object(steps, done)
        if len(set(steps)) > 1:
            raise ValueError(f"{args.out_dir}: the ranks found checkpoints of steps {steps}: give all the same files")
    if not master:
        return done
    for path, error in damaged:
        say(f"{error}: set aside as {path.name}.damaged")
        path.rename(f"{path}.damaged")
    later = [path for path in saved_steps(args.out_dir) if step_of(path) > done]
    if later:  # the run would end with fewer steps than there are now, and lose what it saves to --keep
        raise ValueError(f"{args.resume}: {later[0]} is of a later step: delete it to go back to step {done}, or give "
                         "another --out-dir")  # fmt: skip
    if done:
        say(f"resumed after step {done} of {args.max_steps}" + ", the last one" * (done == args.max_steps))
    trim_log(log, done)
    for path in args.out_dir.glob(".*.tmp"):  # of a run that was killed while it saved
        if re.fullmatch(r"\.(checkpoint|model|best|mask_tokenizer|text|args|grid|curves).*\.\d+\.tmp", path.name):
            path.unlink()
    if args.mask_tokenizer.suffix == ".safetensors":  # one of this repository's own goes along
        write_whole(args.out_dir / "mask_tokenizer.safetensors", args.mask_tokenizer.read_bytes())
    if isinstance(text_tokenizer, TextTokenizer):
        write_whole(args.out_dir / "text.model", text_tokenizer.model.serialized_model_proto())
    write_json(args.out_dir / "args.json", {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()})
    return done


def load_data(args, say):
    """(training Mixture, validation set) of --data and --val."""
    train_set = load_mixture(args.data, "train", args.root, phrases=args.phrases)
    first = args.data.split(",")[0].strip()
    if args.val or not first.startswith("jsonl:"):
        return train_set, load_mixture(args.val or first, "val", args.root)
    whole = train_set.datasets[0]
    train_set.datasets, val_set = hold_out(train_set.datasets)
    say(f"validation: {len(val_set)} of the {len(whole)} lines of {first}" + (
        ", the pictures of which are not trained on" if len(val_set) < len(whole) else
        ", which are trained on too: it has one picture; --val gives others"))  # fmt: skip
    return train_set, val_set


def read_cache(args, train_set, length, source, size, padded):
    """The cached mask tokens (examples, length) of --mask-tokens for a Mixture, or None."""
    if not args.mask_tokens:
        return None
    rows, count = [], 0  # rows of the cache that are trained on: it has those of the examples that are held out, too
    for part in train_set.datasets:
        size_of_part = len(getattr(part, "dataset", part))
        rows.append(count + getattr(part, "indices", np.arange(size_of_part)))
        count += size_of_part
    table = read_tokens(args.mask_tokens, (count, length), source, data=args.data, split="train",
                        files=train_set.file_hashes(), size=size, padded=padded)  # fmt: skip
    return table if len(train_set) == count else table[np.concatenate(rows)]


class TextFeatures:
    """A frozen text encoder that is asked once for each phrase: text_ids (B,L) on the CPU -> (B,L,D) on its device.

    Semantic sets have a few thousand different phrases in all. Where there are more than `room`, it starts over.
    """

    def __init__(self, encoder, device, room=2048):
        self.encoder, self.device, self.room, self.known = encoder, device, room, {}

    def __call__(self, text_ids):
        rows = {row.numpy().tobytes(): row for row in text_ids}  # each phrase once
        new = [key for key in rows if key not in self.known]
        if len(self.known) + len(new) > self.room:
            self.known, new = {}, list(rows)
        if new:
            features = self.encoder.encode_text(torch.stack([rows[key] for key in new]).to(self.device))
            self.known |= {key: row.clone() for key, row in zip(new, features)}
        return torch.stack([self.known[row.numpy().tobytes()] for row in text_ids])


@torch.no_grad()
def next_batch(loader, device, mask_tokenizer, text_features, args):
    """(keyword arguments of model.forward for the next micro-batch, ids of its examples); None, None at the end.

    The text encoder, if it is frozen, and the mask tokenizer are already asked.
    """
    item = next(loader, None)
    if item is None:
        return None, None
    text, ids = text_features(item["text_ids"]) if text_features else None, item.pop("ids")  # (b,L,D)
    item = {name: value.to(device, non_blocking=True) for name, value in item.items()}
    batch = {"text_ids": item["text_ids"], "text_features": text, "pixels": to_pixels(item["pictures"]),  # (b/P,3,S,S)
             "hide_tokens": item["hide"] if args.hide else None, "background_weight": args.background_weight}
    if "mask_tokens" in item:
        batch["mask_tokens"] = item["mask_tokens"]
    else:  # in float32: in bfloat16 codes that lie close together would be mixed up
        batch["mask_tokens"] = mask_tokenizer.encode(mask_to_image(item["masks"]))  # (b,M)
    return batch, ids


def load_parts(args, device, dtype):
    """(model, mask_tokenizer, text_tokenizer) of a run, the frozen ones in the precision that they need."""
    if args.preset == "llamaseg-janus":
        return load_janus(args, device, dtype)
    mask_tokenizer = VQGAN.from_pretrained(args.mask_tokenizer).to(device).requires_grad_(False)
    if args.init_from:
        model = LlamaSeg.from_pretrained(args.init_from, args.encoder, any_weights=args.any_weights)
        preset = PRESETS[args.preset]
        if replace(model.config, siglip=preset.siglip, hide=preset.hide) != preset:
            raise ValueError(f"{args.init_from}: its shape is not that of --preset {args.preset}")
        if not args.any_weights:
            check_source(args.init_from, "mask_tokenizer", model.frozen, mask_tokenizer.source)
    else:
        encoder = SigLIP.from_pretrained(args.encoder) if args.encoder else None
        model = LlamaSeg(replace(PRESETS[args.preset], **({"siglip": encoder.config} if encoder else {})), encoder)
    model.frozen["mask_tokenizer"], model.config.hide = mask_tokenizer.source, args.hide
    text_tokenizer = TextTokenizer(args.text_tokenizer, model.config.siglip.text_length)
    if args.init_from and not args.any_weights:
        check_source(args.init_from, "text_tokenizer", model.frozen, text_tokenizer.source)
    model.frozen["text_tokenizer"] = text_tokenizer.source
    check_fit(model.config, mask_tokenizer, text_tokenizer, args.mask_tokenizer)
    if not args.init_from:
        model.init_mask_tokens(mask_tokenizer.quantize.codebook)
    model.to(device)
    if model.config.freeze_encoders:
        model.encoder.to(dtype)
    model.llama.recompute = args.activation_checkpointing
    return model, mask_tokenizer, text_tokenizer


def load_janus(args, device, dtype):
    """The same for LoRA on a Janus directory, which has both tokenizers in it."""
    if args.init_from:
        if args.init_from.is_dir():
            raise ValueError(f"{args.init_from}: a folder: give the model.safetensors in it")
        model = JanusSeg.from_pretrained(args.init_from, args.encoder, dtype, args.any_weights)
    else:
        model = JanusSeg.from_pretrained(args.encoder, dtype=dtype)
        model.add_lora(args.lora_rank, args.lora_alpha, args.lora_dropout, args.lora_targets)
    mask_tokenizer = VQGAN.from_pretrained(args.encoder).to(device).requires_grad_(False)
    model.frozen["mask_tokenizer"], model.config.hide = mask_tokenizer.source, args.hide
    text_tokenizer = JanusPrompt(args.encoder, model.config.siglip.image_tokens)
    check_fit(model.config, mask_tokenizer, text_tokenizer, args.encoder)
    model.llama.recompute = args.activation_checkpointing
    return model.train().to(device), mask_tokenizer, text_tokenizer


def train(args, at_end):
    """The whole run; returns the last evaluation's metrics. Ctrl-C or SIGTERM let the step end and save.

    at_end: an ExitStack, whose owner closes it when the run has ended.
    """
    # --- device, ranks
    rank, world_size, device = setup_ranks(args.device)
    master = rank == 0
    say = tqdm.write if master else lambda line: None
    dtype, reason = compute_dtype(device, args.dtype)
    torch.manual_seed(args.seed)  # the initial weights
    torch.set_float32_matmul_precision("high")

    # --- model, data, what an earlier run left
    raw_model, mask_tokenizer, text_tokenizer = load_parts(args, device, dtype)
    config, segmenter = raw_model.config, Segmenter(raw_model, mask_tokenizer, text_tokenizer)
    with one_rank_first():
        train_set, val_set = load_data(args, say)
    # mIoU for semantic sets, as the papers report them
    metric = "mIoU" if isinstance(getattr(val_set, "datasets", [val_set])[0], LabelMaps) else "cIoU"
    mask_size, padded = config.mask_grid * mask_tokenizer.config.downsample, isinstance(raw_model, JanusSeg)
    cached = read_cache(args, train_set, config.mask_tokens, mask_tokenizer.source, mask_size, padded)
    args.files = train_set.file_hashes()
    args.max_steps = args.max_steps or math.ceil(args.epochs * len(train_set) / args.batch_size)
    micro_batch_size = args.batch_size // world_size if args.micro_batch_size is None else args.micro_batch_size
    batches = Batches(train_set, text_tokenizer, config.siglip.image_size, config.mask_tokens, args.batch_size,
                      micro_batch_size, args.phrases, rank, world_size, args.seed, args.hide, mask_size, cached,
                      padded)  # fmt: skip
    accumulation = batches.accumulation
    optimizers = make_optimizers(raw_model, args)
    if master:
        args.out_dir.mkdir(parents=True, exist_ok=True)
        at_end.enter_context(only_one(args.out_dir / "lock"))
    first_step = open_run(args, raw_model, optimizers, text_tokenizer, master, say)
    best = best_score(args.out_dir / "log.jsonl", metric)
    todo = range(first_step * accumulation, args.max_steps * accumulation)
    workers = args.workers if args.workers >= 0 else (4 if device.type == "cuda" else 0)
    loader = iter(torch.utils.data.DataLoader(batches, batch_size=None, sampler=todo, num_workers=workers,
                                              worker_init_fn=leave_signals_to_parent,
                                              pin_memory=device.type == "cuda"))  # fmt: skip
    # on every way out: workers ignore the signal by which Python ends them, and Python would wait for them for ever
    at_end.callback(getattr(loader, "_shutdown_workers", lambda: None))
    apart = isinstance(raw_model, LlamaSeg) and config.freeze_encoders
    text_features = TextFeatures(raw_model.encoder, device) if apart else None
    model = torch.compile(raw_model) if args.compile else raw_model
    if world_size > 1:  # frozen parts stay out of it: no gradient to sum, and every rank has read the same file
        frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, frozen)
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None,
                                        gradient_as_bucket_view=True)  # fmt: skip

    # --- the bill
    peak_flops, step_flops = matmul_rate(device, dtype), args.batch_size * training_flops(config, args.phrases)
    count = sum(p.numel() for p in raw_model.parameters() if p.requires_grad)
    say(f"{args.init_from or args.preset}: {count / 1e6:.1f}M trainable, {step_flops / 1e12:.2f} TFLOP a step")
    say(f"{world_size} x {device}, {dtype} ({reason}), {peak_flops / 1e12:.2f} TFLOP/s in a matrix product")
    say(f"step = {args.batch_size} phrases = {world_size} ranks x {accumulation} micro-batches x {micro_batch_size}")
    say(describe(args))

    # --- evaluation
    log = Log(args) if master else None

    def due(step):
        return step % args.eval_every == 0 or step == args.max_steps

    def evaluate_after(step):
        """The scores, logged, and the weights if they are the best; None if a signal ended it: the step is saved."""
        nonlocal best
        on_signal(signal.default_int_handler)
        try:
            total, by_task, cells = evaluate(segmenter, val_set, args.eval_count, rank, world_size, progress=master)
        except KeyboardInterrupt:
            say(f"stopped in the evaluation after step {step}, which is saved: go on with --resume auto")
            return None
        on_signal(ask_to_stop)
        scores = total.compute()
        if master:
            log.evaluation(step, scores, by_task, cells)
            if (scores[metric] or 0.0) > best:
                save_weights(raw_model, args.out_dir / "best.safetensors")
        best = max(best, scores[metric] or 0.0)
        return scores

    # --- loop
    stop = []  # no longer empty once the run shall end

    def ask_to_stop(number, frame):
        stop.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        at_end.callback(signal.signal, number, signal.getsignal(number))
    on_signal(ask_to_stop)
    steps, scores = range(first_step, args.max_steps), {}
    missing = master and first_step and due(first_step) and not evaluated(args.out_dir / "log.jsonl", first_step)
    if mean_over_ranks(torch.tensor([float(missing)], device=device), world_size).item():  # it was killed or stopped
        scores = evaluate_after(first_step)
        steps = range(0) if scores is None else steps
    bar = tqdm(steps, initial=first_step, total=args.max_steps, disable=not master, smoothing=0.02, desc="train")
    at_end.callback(bar.close)  # before an error is printed
    started = time.perf_counter()
    batch, ids = next_batch(loader, device, mask_tokenizer, text_features, args)
    for step in bar:
        torch.manual_seed((args.seed * args.max_steps + step) * world_size + rank)  # of LoRA's dropout, if any
        sums, seen = torch.zeros(3, device=device), []  # loss, gradient norm, ranks that were asked to stop
        for micro in range(accumulation):
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                if world_size > 1:  # gradients are summed over ranks only once a step
                    model.require_backward_grad_sync = micro == accumulation - 1
                micro_loss = model(**batch)[1]
            (micro_loss / accumulation).backward()
            sums[0] += micro_loss.detach() / accumulation
            seen.append((ids, micro_loss.detach()))
            # a GPU is still at the last one
            batch, ids = next_batch(loader, device, mask_tokenizer, text_features, args)
        lr = learning_rate(step, args)
        sums[1] = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), args.clip)  # the norm before clipping
        sums[2] = len(stop)
        loss, grad_norm, stopping = mean_over_ranks(sums, world_size).tolist()  # the host waits here, once a step
        if not math.isfinite(loss + grad_norm):  # before it reaches the weights
            bad = [ids for ids, value in seen if math.isfinite(loss) or not math.isfinite(value.item())]
            raise ArithmeticError(f"loss is {loss}, gradient norm {grad_norm} at step {step + 1}, on rank {rank} in "
                                  f"the micro-batches of {' '.join(sum(bad, [])) or 'no example'}: lower --lr, or "
                                  "look at them")  # fmt: skip
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        done, seconds = step + 1, time.perf_counter() - started
        if master:
            log.step(bar, done, loss, grad_norm, lr, args.batch_size / seconds,
                     args.batch_size * config.mask_tokens / seconds,
                     step_flops / seconds / world_size / peak_flops, peak_memory(device))  # fmt: skip
        if master and (done % args.save_every == 0 or due(done) or stopping):  # first: the evaluation may take long
            save_checkpoint(args.out_dir, raw_model, optimizers, done, args)
        if stopping:
            say(f"stopped at step {done} of {args.max_steps}, saved: go on with --resume auto")
            break
        if due(done):
            scores = evaluate_after(done)
            if scores is None:
                break
        started = time.perf_counter()
    if master and first_step < args.max_steps:
        plot(args.out_dir)
    if world_size > 1:
        del model  # DDP first: the last to let go of the process group may hold the lock its threads still need
        dist.destroy_process_group()
    return scores or {}


def merge(out_dir, base, any_weights):
    """LoRA of OUT_DIR added to its base: OUT_DIR/merged, an official directory with model.safetensors. Its path."""
    if read_header(out_dir / "model.safetensors").get("format") == "llamaseg":
        raise ValueError(f"{out_dir}: holds a LlamaSeg, which has no LoRA to merge")
    model = JanusSeg.from_pretrained(out_dir / "model.safetensors", base, torch.bfloat16, any_weights)
    base = base or WEIGHTS / model.frozen["mllm"]["name"]
    model.merge()
    weights = read_weights(base, lambda name: True)
    for name, w in model.llama.state_dict().items():
        if not name.endswith(("lora_a", "lora_b")):
            weights[f"language_model.model.{name}"] = w
    target = out_dir / "merged"
    target.mkdir(exist_ok=True)
    write_tensors(target / "model.safetensors", weights, header={"format": "pt"})
    for file in base.glob("*.json"):
        if not file.name.endswith(".index.json"):
            write_whole(target / file.name, file.read_bytes())
    return target


def main(argv=None):
    """Run; returns the exit code: 0, also when a signal stopped it after a step; 1 for bad data, 2 for bad usage."""
    args = parse_args(argv)
    try:
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
    except (ValueError, OSError, ArithmeticError, ImportError) as error:
        return fail(str(error), 2 if isinstance(error, BadUsage) else 1)
    except (torch.OutOfMemoryError, MemoryError) as error:
        return fail(f"out of memory ({str(error)[:200]}): lower --micro-batch-size, or "
                    "--activation-checkpointing")  # fmt: skip
    except RuntimeError as error:
        if not dist.is_initialized():
            raise
        return fail(f"rank {dist.get_rank()} cannot go on: another rank ended, or this one failed "
                    f"({str(error).splitlines()[0]})")  # fmt: skip
    return 0


def fail(message, code=1):
    """Say why, and return the exit code; as a rank end at once: others may wait for it, and torchrun ends them."""
    if message.startswith("Caught "):  # a DataLoader worker's traceback, which ends in its error
        message = message.strip().splitlines()[-1].partition(": ")[2]
    print(f"error: {printable(message)}", file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(code)
    return code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(fail("stopped", 130))
