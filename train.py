"""Train LlamaSeg: one visible loop, on a laptop CPU, one GPU or many.

    python train.py                                   # the `scenes` preset on this machine
    torchrun --nproc_per_node=2 train.py              # the same run on two processes (gloo on CPU, NCCL on GPU)
    python train.py --out-dir out --resume auto       # go on where out/ stopped
    python train.py --preset llamaseg-b --print-config    # sizes, memory, hyper-parameters; trains nothing
    torchrun --nproc_per_node=8 train.py --preset llamaseg-b    # the paper's model, on official frozen parts

OUT_DIR gets log.jsonl (one object a step), grid-STEP.png at each evaluation (picture, phrase, predicted, truth),
checkpoint.pt (weights, optimizer, step: resumable), and the three files that sample.py --checkpoint OUT_DIR
reads: model.safetensors, mask_tokenizer.safetensors, text.model. Frozen parts from official files are not copied:
model.safetensors has their names and hashes, and `python data.py download NAME` fetches them.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data import DOWNLOADS, BadUsage, Batches, contact_sheet, load_mixture, resize_picture, to_pixels
from metrics import SegmentationMetrics, write_json
from model import PRESETS, SIGLIP2, WEIGHTS, LlamaSeg, SigLIP, check_source, compute_dtype, pick_device, siglip_config
from tokenizer import VQGAN, TextTokenizer, VQGANConfig, decode_masks, mask_to_image, read_tokens

ASSETS = Path(__file__).parent / "assets"

# What a preset means where a flag is left out. All else has one default for all presets, see --help.
SCENES_RECIPE = {
    "mask_tokenizer": ASSETS / "mask_tokenizer.safetensors", "text_tokenizer": ASSETS / "text.model",
    "optimizer": "muon", "lr": 3e-3, "batch_size": 64, "warmup_steps": 100, "hide": True, "background_weight": 0.4,
}  # fmt: skip
# The paper's pre-training stage. Paper: batch size, warm-up, gradient clipping and which tokenizer of LlamaGen (c2i or
# t2i) are not stated; we use LlamaGen's batch of 256, 1000 steps, 1.0 and c2i.
PAPER_RECIPE = {
    "mask_tokenizer": WEIGHTS / "vq_ds16_c2i",
    "optimizer": "adamw", "lr": 2e-4, "batch_size": 256, "warmup_steps": 1000, "hide": False, "background_weight": 1.0,
}  # fmt: skip


def locate(path):
    """A path as it is, or for the bare name of official weights the folder that `data.py download` made."""
    return path if path is None or path.exists() or len(path.parts) > 1 else WEIGHTS / path


def parse_args(argv=None):
    """The flags, in groups."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("model and data")
    group.add_argument("--preset", default="scenes", choices=sorted(PRESETS), help="the model's shape (model.py)")
    group.add_argument("--data", default="scenes", help="data sets with weights, as in ade20k:1,refcoco:2; README has "
                       "their names (default: scenes); the first one's val split is the validation set")
    group.add_argument("--root", type=Path, help="folder in which their official archives were unpacked")
    group.add_argument("--mask-tokens", type=Path, metavar="FILE",
                       help="cached mask tokens of the training split (tokenizer.py encode): the VQGAN encoder rests")
    group.add_argument("--rich", action=argparse.BooleanOptionalAction, default=False,
                       help="scenes with more of everything")
    group.add_argument("--phrases", type=int, help="phrases asked of each picture of scenes (default: 4)")
    group.add_argument("--encoder", type=Path, metavar="DIR",
                       help="frozen SigLIP or SigLIP2, a Hugging Face directory or a name that data.py downloads "
                       "(default: none for scenes, siglip2-large for llamaseg-*)")
    group.add_argument("--mask-tokenizer", type=Path, metavar="FILE",
                       help="frozen VQGAN (default: the embedded one for scenes, vq_ds16_c2i for llamaseg-*)")
    group.add_argument("--text-tokenizer", type=Path, metavar="FILE",
                       help="tokenizer.model or .json (default: the embedded one for scenes, else the encoder's)")
    group.add_argument("--any-weights", action="store_true",
                       help="with --init-from or --resume: take frozen parts other than those of that training")
    group.add_argument("--init-from", type=Path, metavar="FILE", help="start from the weights of a model.safetensors")
    group = parser.add_argument_group("optimization")
    group.add_argument("--max-steps", type=int, default=6000, help="optimizer steps of the whole run (default: 6000)")
    group.add_argument("--batch-size", type=int,
                       help="phrases in a step: all ranks, all micro-batches (default: 64; llamaseg-*: 256)")
    group.add_argument("--micro-batch-size", type=int, metavar="N", help="phrases in one forward pass of one rank "
                       "(default: batch size / ranks, no accumulation)")
    group.add_argument("--optimizer", choices=("muon", "adamw"), help="muon: Muon for the matrices, AdamW for "
                       "the rest; adamw: the paper's (default: muon; llamaseg-*: adamw)")
    group.add_argument("--lr", type=float, help="peak learning rate (default: 3e-3; llamaseg-*: 2e-4, the paper's)")
    group.add_argument("--warmup-steps", type=int,
                       help="linear warm-up, then cosine to 0 (default: 100; llamaseg-*: 1000)")
    group.add_argument("--weight-decay", type=float, default=0.05, help="on matrices (default: 0.05, the paper's)")
    group.add_argument("--clip", type=float, default=1.0, help="gradient norm limit (default: 1)")
    group.add_argument("--hide", action=argparse.BooleanOptionalAction, help="hide a random share of the mask tokens "
                       "from the model's input (default: on; llamaseg-*: off)")
    group.add_argument("--background-weight", type=float, metavar="W", help="weight in the loss of mask token 0, plain "
                       "background in the embedded mask tokenizer (default: 0.4; llamaseg-*: 1, the paper's)")
    group.add_argument("--seed", type=int, default=0, help="of the initial weights and of all batches (default: 0)")
    group = parser.add_argument_group("machine")
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    group.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto",
                       help="of autocast; auto: bfloat16 where the device multiplies it fast (default: auto)")
    group.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile")
    group.add_argument("--workers", type=int, default=-1,
                       help="processes that draw batches (default: 0 on CPU, 4 on a GPU)")
    group = parser.add_argument_group("what is kept")
    group.add_argument("--out-dir", type=Path, default=Path("out"), help="default: out")
    group.add_argument("--eval-every", type=int, default=500, help="steps between evaluations (default: 500)")
    group.add_argument("--eval-count", type=int, default=200, help="validation examples (default: 200)")
    group.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (default: 500)")
    group.add_argument("--resume", metavar="{auto,PATH}", help="go on from a checkpoint.pt; auto: OUT_DIR's, if any")
    parser.add_argument("--print-config", action="store_true",
                        help="print sizes, parameters, memory and hyper-parameters, then stop; allocates no model")
    args = parser.parse_args(argv)
    recipe = SCENES_RECIPE if args.preset == "scenes" else PAPER_RECIPE
    for name, value in recipe.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if PRESETS[args.preset].freeze_encoders:
        args.encoder = args.encoder or Path(f"siglip2-large-patch16-{PRESETS[args.preset].siglip.image_size}")
    elif args.encoder:
        parser.error(f"--encoder {args.encoder}: --preset {args.preset} trains its own encoder")
    if args.phrases and args.data != "scenes":
        parser.error(f"--phrases {args.phrases} is for --data scenes alone")
    args.phrases = args.phrases or (4 if args.data == "scenes" else 1)
    args.encoder, args.mask_tokenizer = locate(args.encoder), locate(args.mask_tokenizer)
    args.text_tokenizer = args.text_tokenizer or args.encoder
    for name in ("phrases", "max_steps", "batch_size", "micro_batch_size", "eval_every", "eval_count", "save_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least 1")
    for name, low in (("lr", 0.0), ("weight_decay", -1e-9), ("clip", 0.0), ("background_weight", 0.0)):
        if not low < getattr(args, name) < math.inf:
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be above {max(low, 0):g} and finite")
    try:
        pick_device(args.device)
    except ValueError as error:
        parser.error(f"--device: {error}")
    return args


# ----------------------------------------------------------------------------------------------------------
# distributed: plain torchrun, under twenty lines


def setup_ranks(device_name):
    """(rank, world size, device); one process unless torchrun started us."""
    if "RANK" not in os.environ:
        return 0, 1, pick_device(device_name)
    device = pick_device(device_name)
    if device.type == "cuda":
        local_rank = int(os.environ["LOCAL_RANK"])
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"process {local_rank} has no GPU, {torch.cuda.device_count()} are here: "
                             "lower --nproc_per_node")  # fmt: skip
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def mean_over_ranks(value, world_size):
    """Mean of a 0-d tensor over all ranks."""
    if world_size > 1:
        dist.all_reduce(value)
    return value / world_size


# ----------------------------------------------------------------------------------------------------------
# the parts of a step


def check_fit(config, mask_tokenizer, text_tokenizer, where):
    """ValueError unless the tokenizers have as many codes and text pieces as the model of `config` was made for."""
    sizes = {"codes": (mask_tokenizer.config.codebook_size, config.codebook_size),
             "text pieces": (text_tokenizer.model.vocab_size(), config.siglip.vocab_size)}  # fmt: skip
    for what, (has, wants) in sizes.items():
        if has != wants:
            raise ValueError(f"{where}: {has} {what} beside a model of {wants}: not of one training run")


def learning_rate(step, args):
    """Linear warm-up, then cosine to 0; step counts from 0."""
    if step < args.warmup_steps:
        return args.lr * (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return args.lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizers(model, args):
    """AdamW (paper: betas 0.9 / 0.95, weight decay 0.05), or Muon (Jordan et al. 2024) for the matrices.

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
    optimizers = [torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95))]
    if matrices:
        # match_rms_adamw: one learning rate serves both (Liu et al. 2025, "Muon is scalable")
        optimizers.append(torch.optim.Muon(matrices, lr=args.lr, weight_decay=args.weight_decay,
                                           adjust_lr_fn="match_rms_adamw"))  # fmt: skip
    return optimizers


@torch.no_grad()
def predict(model, mask_tokenizer, text_tokenizer, examples, decode="greedy"):
    """Masks of a list of examples, asked by their bare phrases: bool arrays at the pictures' own sizes."""
    device, size = next(model.parameters()).device, model.config.siglip.image_size
    text_ids = text_tokenizer([e.phrase for e in examples]).to(device)
    pixels = to_pixels(np.stack([resize_picture(e.image, size) for e in examples]))
    tokens = model.generate(text_ids, pixels.to(device), decode=decode)
    return decode_masks(mask_tokenizer, tokens, [e.image.size[::-1] for e in examples])


def evaluate(model, mask_tokenizer, text_tokenizer, dataset, count, rank=0, world_size=1, batch_size=32,
             progress=False):  # fmt: skip
    """Greedy masks of the first `count` examples against the truth, at the pictures' own sizes.

    Every rank takes every world_size-th example and all get the whole result. Returns (SegmentationMetrics,
    {task: SegmentationMetrics}, cells for a contact sheet: (phrase, [picture, predicted, truth])).
    """
    total, by_task, cells = SegmentationMetrics(), {}, []
    mine = range(rank, min(count, len(dataset)), world_size)
    for start in tqdm(range(0, len(mine), batch_size), desc="evaluate", leave=False, disable=not progress):
        examples = [dataset[i] for i in mine[start : start + batch_size]]
        masks = predict(model, mask_tokenizer, text_tokenizer, examples)
        for example, mask in zip(examples, masks):
            scores = by_task.setdefault(example.task, SegmentationMetrics())
            for metrics in (total, scores):
                metrics.update(mask, example.mask, label=example.label, id=example.id, ignore=example.ignore)
            if len(cells) < 24:
                cells.append((example.phrase, [example.image, mask, example.mask]))
    if world_size > 1:
        gathered = [None] * world_size
        dist.all_gather_object(gathered, (total, by_task))
        total, by_task = SegmentationMetrics(), {}
        for other_total, other_tasks in gathered:
            total.merge(other_total)
            for task, scores in other_tasks.items():
                by_task.setdefault(task, SegmentationMetrics()).merge(scores)
    return total, by_task, cells


# What makes the batches and the optimizer what they are; steps and learning rate may change at a resume.
SAME_RUN = ("preset", "data", "rich", "phrases", "hide", "batch_size", "seed", "optimizer")


def save_checkpoint(path, model, optimizers, step, args):
    """Weights, optimizers and step under a temporary name, then renamed.

    No random state: a batch is a function of (seed, step), and the model itself draws nothing.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    state = {"model": model.trained_state(), "optimizers": [o.state_dict() for o in optimizers], "step": step,
             "run": {name: getattr(args, name) for name in SAME_RUN}, "frozen": model.frozen}  # fmt: skip
    try:
        torch.save(state, temporary)
        os.replace(temporary, path)
    except RuntimeError as error:  # what torch.save makes of a full disk
        raise OSError(f"{path}: cannot write ({str(error).splitlines()[0]})") from None
    finally:
        temporary.unlink(missing_ok=True)
    model.save_pretrained(path.with_name("model.safetensors"), dtype=torch.float16)


def load_checkpoint(path, model, optimizers, args):
    """Put a checkpoint back; returns the number of steps it has done. ValueError if it is not this run's."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        run, step, frozen = state["run"], state["step"], state["frozen"]
        if not (isinstance(run, dict) and set(SAME_RUN) <= set(run) and isinstance(step, int)
                and isinstance(frozen, dict) and isinstance(state["optimizers"], list)):  # fmt: skip
            raise ValueError("its contents are not those of a run")
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises many kinds for a damaged file
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a whole checkpoint of train.py ({line})") from None
    other = [f"--{name.replace('_', '-')} {run[name]}, not {getattr(args, name)}" for name in SAME_RUN
             if run[name] != getattr(args, name)]  # fmt: skip
    if other:
        raise ValueError(f"{path}: is of another run, made with {'; '.join(other)}")
    for part, source in model.frozen.items():
        if not args.any_weights:
            check_source(path, part, frozen, source)
    try:
        model.load_trained_state(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: does not fit --preset {args.preset} --optimizer {args.optimizer} "
                         f"({str(error).splitlines()[0]})") from None  # fmt: skip
    return step


def trim_log(path, step):
    """Drop what a killed run logged after the checkpoint that it goes on from: those steps come again."""
    if path.exists():
        lines = path.read_text().splitlines(keepends=True)
        lines = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text("".join(lines))
        os.replace(temporary, path)


# ----------------------------------------------------------------------------------------------------------
# what a run would cost

PAPER = """  pre-training          SA-OVRS and the referring sets, 4 epochs; AdamW 2e-4, betas 0.9 / 0.95,
                        weight decay 0.05
  fine-tuning           ADE20K or COCO-Stuff 10 epochs, referring 20 epochs; AdamW 1e-4, betas 0.9 / 0.99,
                        no weight decay, warm-up 1 %, then cosine
  not stated            batch size, warm-up of pre-training, clipping, MLP width, size of SigLIP2"""


def activation_bytes(config):
    """Bytes that one sample keeps for the backward pass under bfloat16 autocast with fused attention.

    Each LLaMA layer, a token: two norms keep their float32 input (8 D) and give five bfloat16 copies to the matrices
    (10 D); attention keeps q, k, v and its output (4 H + 4 Hkv); the MLP keeps four hidden states (8 F). After the
    layers: logits in bfloat16 and float32 and their log-softmax (10 K a mask token). Frozen encoders keep nothing;
    scenes' small ones are left out.
    """
    c, tokens = config.llama, sum(sequence(config).values()) - 1  # the last mask token is only predicted
    H, Hkv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    layer = 18 * c.width + 4 * H + 4 * Hkv + 8 * c.mlp
    return tokens * c.layers * layer + config.mask_grid**2 * config.codebook_size * 10


def sequence(config):
    """Tokens of one sample by kind, in their order."""
    return {"text": config.siglip.text_length, "<BOI>": 1, "image": config.siglip.image_tokens, "<BOM>": 1,
            "mask": config.mask_grid**2}  # fmt: skip


def print_config(args):
    """Sizes, parameters by part, tokens of a sample, memory of a rank and hyper-parameters; no weights are made."""
    config = PRESETS[args.preset]
    if config.freeze_encoders:
        siglip = SIGLIP2.get(args.encoder.name) or siglip_config(args.encoder)
        config = replace(config, siglip=siglip)
    to_come = args.mask_tokenizer.name in DOWNLOADS and not args.mask_tokenizer.exists()
    vqgan = VQGANConfig() if to_come else VQGAN.from_pretrained(args.mask_tokenizer).config
    with torch.device("meta"):
        model, mask_tokenizer = LlamaSeg(config), VQGAN(vqgan)
    s, c = config.siglip, config.llama
    print(f"{args.preset}")
    print(f"  picture               {s.image_size} px, patches of {s.patch_size} px")
    print(f"  SigLIP vision         {s.vision_layers} layers x {s.vision_width}, {s.vision_heads} heads")
    print(f"  SigLIP text           {s.text_layers} layers x {s.text_width}, {s.text_heads} heads, "
          f"{s.vocab_size} pieces")
    print(f"  LLaMA                 {c.layers} layers x {c.width}, {c.heads} heads of {c.head_dim}, MLP {c.mlp}")
    print(f"  mask tokenizer        {config.codebook_size} codes x {vqgan.codebook_dim}, downsample {vqgan.downsample}")
    parts = {"SigLIP vision": model.encoder.vision_model, "SigLIP text": model.encoder.text_model,
             "adaptors": nn.ModuleList([model.text_adaptor, model.image_adaptor]), "<BOI> and <BOM>": None,
             "mask embedding": model.mask_embedding, "LLaMA": model.llama, "head": model.head,
             "mask tokenizer": mask_tokenizer.requires_grad_(False)}  # fmt: skip
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
    trainable = [p for p in model.parameters() if p.requires_grad]
    memory = {
        "trainable weights": 4 * sums[True],  # float32
        "frozen weights": 2 * sum(p.numel() for p in model.parameters() if not p.requires_grad)
        + 4 * sum(p.numel() for p in mask_tokenizer.parameters()),  # encoder bfloat16, mask tokenizer float32
        "bfloat16 copies": 2 * sum(p.numel() for p in trainable if p.dim() > 1),  # autocast's, for a step
        "gradients": 4 * sums[True],
        "optimizer": optimizer_bytes(model, args),
        "activations": micro_batch_size * activation_bytes(config),
    }
    print(f"\nmemory of a rank         {ranks} ranks, {micro_batch_size} of {args.batch_size} samples in a micro-batch")
    for name, size in [*memory.items(), ("all", sum(memory.values()))]:
        print(f"  {name:22}{size / 1e9:10.2f} GB")
    print(f"\nthis run                 {args.optimizer}, lr {args.lr:g}, betas 0.9 / 0.95, "
          f"weight decay {args.weight_decay:g}, batch {args.batch_size},\n{'':25}warm-up {args.warmup_steps} steps, "
          f"cosine to 0 at step {args.max_steps}, clip {args.clip:g}")  # fmt: skip
    print(f"\nthe paper\n{PAPER}")


def optimizer_bytes(model, args):
    """What the optimizers keep: AdamW two float32 moments a parameter, Muon one."""
    return sum(4 * p.numel() * (2 if isinstance(optimizer, torch.optim.AdamW) else 1)
               for optimizer in make_optimizers(model, args) for group in optimizer.param_groups
               for p in group["params"])  # fmt: skip


# ----------------------------------------------------------------------------------------------------------
# the run


def open_run(args, model, optimizers, text_tokenizer, master):
    """Make OUT_DIR what sample.py and --resume need; returns the number of steps that are already done."""
    args.out_dir.mkdir(parents=True, exist_ok=True)
    checkpoint, log = args.out_dir / "checkpoint.pt", args.out_dir / "log.jsonl"
    if master and args.resume is None and log.exists():
        raise FileExistsError(f"{args.out_dir} holds a run: --resume auto goes on, --out-dir starts elsewhere")
    if args.resume == "auto":
        done = load_checkpoint(checkpoint, model, optimizers, args) if checkpoint.exists() else 0
    else:
        done = load_checkpoint(args.resume, model, optimizers, args) if args.resume else 0
    if master:
        trim_log(log, done)
        mine = args.out_dir / "mask_tokenizer.safetensors"  # one of this repository's own goes along
        if args.mask_tokenizer.suffix == ".safetensors" and args.mask_tokenizer.resolve() != mine.resolve():
            shutil.copyfile(args.mask_tokenizer, mine)
        (args.out_dir / "text.model").write_bytes(text_tokenizer.model.serialized_model_proto())
        write_json(args.out_dir / "args.json", {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()})
    return done


def train(args):
    """The whole run; returns the last evaluation's metrics."""
    # --- device, ranks
    rank, world_size, device = setup_ranks(args.device)
    master = rank == 0
    say = tqdm.write if master else lambda line: None
    dtype, reason = compute_dtype(device, args.dtype)
    torch.manual_seed(args.seed)  # the initial weights
    torch.set_float32_matmul_precision("high")

    # --- tokenizers, model
    mask_tokenizer = VQGAN.from_pretrained(args.mask_tokenizer).to(device).requires_grad_(False)
    if args.init_from:
        raw_model = LlamaSeg.from_pretrained(args.init_from, args.encoder, any_weights=args.any_weights)
        if not args.any_weights:
            check_source(args.init_from, "mask_tokenizer", raw_model.frozen, mask_tokenizer.source)
    else:
        encoder = SigLIP.from_pretrained(args.encoder) if args.encoder else None
        raw_model = LlamaSeg(replace(PRESETS[args.preset], **({"siglip": encoder.config} if encoder else {})), encoder)
    raw_model.frozen["mask_tokenizer"] = mask_tokenizer.source
    config = raw_model.config
    text_tokenizer = TextTokenizer(args.text_tokenizer, config.siglip.text_length)
    check_fit(config, mask_tokenizer, text_tokenizer, args.mask_tokenizer)
    if not args.init_from:
        raw_model.init_mask_tokens(mask_tokenizer.quantize.codebook)
    raw_model.to(device)
    if config.freeze_encoders:
        raw_model.encoder.to(dtype)
    optimizers = make_optimizers(raw_model, args)
    first_step = open_run(args, raw_model, optimizers, text_tokenizer, master)
    model = torch.compile(raw_model) if args.compile else raw_model
    if world_size > 1:
        model = DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)

    # --- data
    train_set = load_mixture(args.data, "train", args.root, rich=args.rich, phrases=args.phrases)
    val_set = load_mixture(args.data.split(",")[0], "val", args.root, rich=args.rich)
    cached = None
    if args.mask_tokens:
        cached = read_tokens(args.mask_tokens, args.data, mask_tokenizer.source, (len(train_set), config.mask_grid**2))
    micro_batch_size = args.batch_size // world_size if args.micro_batch_size is None else args.micro_batch_size
    batches = Batches(train_set, text_tokenizer, config.siglip.image_size, config.mask_grid**2, args.batch_size,
                      micro_batch_size, args.phrases, rank, world_size, args.seed, args.hide,
                      config.mask_grid * mask_tokenizer.config.downsample, cached)  # fmt: skip
    accumulation = batches.accumulation
    todo = range(first_step * accumulation, args.max_steps * accumulation)
    workers = args.workers if args.workers >= 0 else (4 if device.type == "cuda" else 0)
    loader = iter(torch.utils.data.DataLoader(batches, batch_size=None, sampler=todo, num_workers=workers,
                                              pin_memory=device.type == "cuda"))  # fmt: skip
    count = sum(p.numel() for p in raw_model.parameters() if p.requires_grad)
    say(f"{args.init_from or args.preset}: {count / 1e6:.1f}M trainable parameters")
    say(f"{world_size} x {device}, {dtype} ({reason})")
    say(f"step = {args.batch_size} phrases = {world_size} ranks x {accumulation} micro-batches x {micro_batch_size}")

    # --- loop
    log = open(args.out_dir / "log.jsonl", "a", buffering=1) if master else None
    bar = tqdm(range(first_step, args.max_steps), initial=first_step, total=args.max_steps, disable=not master,
               smoothing=0.02, desc="train")  # fmt: skip
    scores, started = {}, time.perf_counter()
    for step in bar:
        loss, seen = torch.zeros((), device=device), []
        for micro in range(accumulation):
            batch = next(loader)
            batch = {k: v.to(device, non_blocking=True) if k != "ids" else v for k, v in batch.items()}
            if cached is None:
                with torch.no_grad():  # in float32: in bfloat16 codes that lie close together would be mixed up
                    batch["mask_tokens"] = mask_tokenizer.encode(mask_to_image(batch["masks"]))  # (b, M)
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                if world_size > 1:  # gradients are summed over ranks only once a step
                    model.require_backward_grad_sync = micro == accumulation - 1
                _, micro_loss = model(batch["text_ids"], to_pixels(batch["pictures"]), batch["mask_tokens"],
                                      batch["hide"] if args.hide else None, args.background_weight)  # fmt: skip
            (micro_loss / accumulation).backward()
            loss += micro_loss.detach() / accumulation
            seen.append((batch["ids"], micro_loss.detach()))
        loss = mean_over_ranks(loss, world_size).item()
        if not math.isfinite(loss):
            ids = [id for ids, value in seen if not math.isfinite(value.item()) for id in ids]
            raise ArithmeticError(f"loss is {loss} at step {step + 1}, on rank {rank} in the micro-batches of "
                                  f"{' '.join(ids) or 'no example'}: lower --lr, or look at them")  # fmt: skip
        torch.nn.utils.clip_grad_norm_(raw_model.parameters(), args.clip)
        lr = learning_rate(step, args)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        done = step + 1
        speed = args.batch_size / (time.perf_counter() - started)
        bar.set_postfix_str(f"loss {loss:.4f} lr {lr:.1e} {speed:.0f} samples/s", refresh=False)
        if master:
            log.write(json.dumps({"step": done, "loss": loss, "lr": lr, "samples_per_s": speed}) + "\n")
        if done % args.eval_every == 0 or done == args.max_steps:
            total, by_task, cells = evaluate(raw_model, mask_tokenizer, text_tokenizer, val_set, args.eval_count, rank,
                                             world_size, progress=master)  # fmt: skip
            scores = total.compute()
            if master:
                tasks = {task: metrics.compute()["cIoU"] for task, metrics in sorted(by_task.items())}
                log.write(json.dumps({"step": done, **scores, "tasks": tasks}) + "\n")
                contact_sheet(cells, args.out_dir / f"grid-{done:06d}.png")
                ahd = "-" if scores["mAHD@0.5"] is None else f"{scores['mAHD@0.5']:.2f}"
                say(f"step {done}: cIoU {scores['cIoU']:.4f} gIoU {scores['gIoU']:.4f} mAHD@0.5 {ahd} px")
        if master and (done % args.save_every == 0 or done == args.max_steps):
            save_checkpoint(args.out_dir / "checkpoint.pt", raw_model, optimizers, done, args)
        started = time.perf_counter()
    if world_size > 1:
        dist.destroy_process_group()
    return scores


def main(argv=None):
    """Run; returns the exit code: 0, 1 for bad data, 2 for bad usage (argparse)."""
    args = parse_args(argv)
    try:
        if args.print_config:
            print_config(args)
        else:
            train(args)
    except (ValueError, OSError, ArithmeticError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        code = 2 if isinstance(error, BadUsage) else 1
        if dist.is_initialized():
            os._exit(code)  # the other ranks may wait for this one in a collective: torchrun ends them
        return code
    except KeyboardInterrupt:
        print("stopped: go on with --resume auto", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
