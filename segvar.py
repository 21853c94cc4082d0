"""Seg-VAR: everything in a picture, from the picture alone (Zheng et al., NeurIPS 2025; no code of theirs is public).

    python segvar.py                                        # embedded picture, embedded checkpoint
    python segvar.py --image x.jpg --json x.json            # your own; COCO's panoptic and instance results
    python segvar.py --dataset scenes-instances --split test    # PQ, AP and mIoU

Segmentation becomes the generation of one picture. The masks of all instances are painted into a color map, in which
the color of an instance says where it is; the map and the classes become a "seglat", a picture of three channels, and
the seglat becomes discrete tokens, coarse to fine. A posterior over these tokens is learnt from the masks, a prior from
the picture, and the two are trained to agree. To segment, the prior writes tokens, and all masks are read from them:

    log p(masks | picture)  >=  E_q(z | masks) [log p(masks | z)]  -  KL(q(z | masks) || p(z | picture))

The order here is the paper's: Psi (color_map) and its inverse, T_phi (LatentEncoder), q_phi and p_theta (a MultiScaleVQ
and LatentDecoder), p_psi and the three stages of training (SegVAR).
Legend: a the grid, H W a picture's height and width, N instances, S the side that the model sees, C classes, B batch,
M tokens of all scales, K codebook size, D width. Masks are bool (N, H, W).
"""

import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from data import (
    Batches, load_segments, open_picture, resize_mask, resize_picture, resize_pixels, rle_decode, rle_encode, to_pixels,
    to_rgb, write_picture,
)
from metrics import (
    AveragePrecision, PanopticQuality, Parser, SegmentationMetrics, printable, read_records, write_json,
)
from model import SIGLIP2, Llama, LlamaConfig, LlamaSeg, MaskWriter, SigLIP, SigLIPConfig, check_fields, pick_device
from tokenizer import VAR_SCALES, AttnBlock, MultiScaleVQ, ResBlock, VQGANConfig, full_float32
from weights import ASSETS, read_own, reading, sha256_of

# ---- Psi: masks to a picture in which color is place -----------------------------------------------------


def palette(grid):
    """The colors of the a * a cells in raster order, after black for the background: uint8 (1 + a * a, 3).

    They lie far apart and far from black: they are points of the cube's grid of m x m x m, (m - 1) x m x m or
    (m - 1) x (m - 1) x m levels whose three indices have an even sum (the densest packing of balls), m as small as can
    be. Where such a grid has more points than are needed, some in even steps are left out.
    Paper: the colors are not stated; we use these. The smallest distance is 81 of 255 for a = 8, 48 for a = 16.
    """
    needed = grid * grid + 1
    m = 3
    while m**3 < 2 * needed:
        m += 1
    levels = next(sides for sides in ((m - 1, m - 1, m), (m - 1, m, m), (m, m, m)) if np.prod(sides) >= 2 * needed)
    points = np.stack(np.meshgrid(*map(np.arange, levels), indexing="ij"), -1).reshape(-1, 3)
    points = points[points.sum(1) % 2 == 0]  # the first one is black
    chosen = points[np.arange(needed) * (len(points) - 1) // (needed - 1)]
    return np.round(chosen * 255 / (np.array(levels) - 1)).astype(np.uint8)


def color_map(masks, grid):
    """Psi: masks bool (N, H, W) -> uint8 (H, W, 3), each instance in the color of its cell, see `cell_map`."""
    cells = cell_map(masks, grid)
    return palette(grid)[cells]


def cell_map(masks, grid):
    """Masks bool (N, H, W) -> int64 (H, W): 0 for background, else 1 + the cell that holds the instance's center.

    The center is the mean of an instance's pixels. Where two centers fall into one cell, the larger instance keeps it
    and the other takes the nearest free cell. The order is by area, then by the first pixel, so that the map does not
    depend on the order of the masks. Paper: what happens to clashes is not stated; we use the above.
    Of overlapping masks the smaller is painted over the larger. Empty masks take no cell. Of more than a * a instances
    the smallest stay background. A crowd is many instances in one mask: leave it out.
    """
    masks = np.asarray(masks)
    if masks.ndim != 3 or masks.dtype != bool or not masks.shape[1] * masks.shape[2] or grid < 1:
        raise ValueError(f"expected masks bool (N, H, W) and a grid of at least 1, got {masks.dtype} {masks.shape} and "
                         f"{grid}")
    size = np.array(masks.shape[1:])
    pixels = [np.argwhere(mask) for mask in masks]  # (n, 2) in raster order
    order = sorted((k for k, p in enumerate(pixels) if len(p)), key=lambda k: (-len(pixels[k]), pixels[k][0].tolist()))
    found, free = np.zeros(size, np.int64), np.ones(grid * grid, bool)
    cells = np.stack(np.divmod(np.arange(grid * grid), grid), 1)  # (a * a, 2): row and column
    for k in order[: grid * grid]:
        n = len(pixels[k])
        # floor(center * a / size), the center being the mean of the pixel + 0.5; in integers, so that it is exact
        home = (2 * pixels[k].sum(0) + n) * grid // (2 * n * size)
        distance = ((cells - home) ** 2).sum(1)
        cell = np.where(free, distance, distance.max() + 1).argmin()  # of equally near ones the first
        free[cell] = False
        found[masks[k]] = 1 + cell
    return found


def instances(picture, grid, size=None, least=1):
    """The inverse of `color_map`: uint8 (h, w, 3) -> bool (N, H, W), a mask for each cell whose color is there, in the
    raster order of the cells. Disjoint masks, at most a * a, come back exactly.

    Every pixel goes to the nearest color of the palette. A cell with fewer than `least` pixels is noise: they go to the
    nearest of the other colors. size: the (H, W) of the masks if the picture has another. Then the distances to the
    colors are resized, not the picture: a mixture of two colors is a third one, an instance that is not there. (Their
    squares would not do: the color whose mixed squares are least is again the mixture of the two.)
    """
    picture = np.asarray(picture)
    if picture.ndim != 3 or picture.shape[2] != 3 or picture.dtype != np.uint8:
        raise ValueError(f"expected a picture uint8 (H, W, 3), got {picture.dtype} {picture.shape}")
    numbers, where = np.unique(picture @ np.array([1, 256, 65536]), return_inverse=True)  # each color is judged once
    found = np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], 1).astype(np.float32)
    colors = palette(grid).astype(np.float32)
    squares = (-2 * found) @ colors.T  # of the distances (found, 1 + a * a): whole numbers, which float32 holds exactly
    squares += (colors**2).sum(1)
    squares += (found**2).sum(1)[:, None]
    where = where.reshape(picture.shape[:2])
    areas = np.bincount(squares.argmin(1)[where].ravel(), minlength=len(colors))
    there = np.flatnonzero((areas >= max(least, 1)) | (np.arange(len(colors)) == 0))  # background may always be there
    if size in (None, picture.shape[:2]):
        owner = squares[:, there].argmin(1)[where]
    else:
        planes = torch.from_numpy(np.sqrt(squares[:, there])[where]).permute(2, 0, 1)[None]  # (1, colors, h, w)
        owner = F.interpolate(planes, size, mode="bilinear", align_corners=False)[0].argmin(0).numpy()
    cells = np.unique(owner)
    return owner == cells[cells > 0].reshape(-1, 1, 1)


# ---- the model -------------------------------------------------------------------------------------------


@dataclass
class SegVARConfig:
    """Shape of a Seg-VAR; a checkpoint holds `asdict` of it as JSON. Paper: no size is stated; ours are small."""

    siglip: SigLIPConfig  # the image encoder; its phrase encoder is not made
    llama: LlamaConfig
    vq: VQGANConfig  # of the seglats; its scales are those of the prior
    classes: dict = field(default_factory=dict)  # {name: is it a thing?}
    grid: int = 8  # a
    width: int = 48  # channels of the latent encoder and decoder
    freeze_encoders: bool = False  # no gradient for the image encoder
    temperature: float | None = None  # of the posterior, a softmax of minus squared distances; None: the nearest code

    hide = False  # as in LlamaSegConfig

    def __post_init__(self):
        check_fields(self)
        if isinstance(self.vq, dict):
            self.vq = VQGANConfig(**self.vq)
        side = self.vq.downsample * self.vq.scales[-1]
        if side != self.siglip.image_size:
            raise ValueError(f"scales {self.vq.scales} are of {side} px, the pictures have {self.siglip.image_size}")

    codebook_size = property(lambda self: self.vq.codebook_size)  # K
    scales = property(lambda self: self.vq.scales)
    mask_grid = property(lambda self: self.vq.scales[-1])
    mask_tokens = property(lambda self: sum(s * s for s in self.vq.scales))  # M


class LatentEncoder(nn.Module):
    """T_phi: what each pixel belongs to -> seglat. It starts as the color map with a tint for each class.

    Paper: transformer layers; we use two linear layers on each pixel, for its color and class are all that it shows.
    """

    def __init__(self, config):
        super().__init__()
        colors = torch.from_numpy(palette(config.grid)) / 127.5 - 1
        self.register_buffer("colors", colors, persistent=False)
        self.class_embedding = nn.Embedding(len(config.classes) + 1, 8)  # the last one for void
        self.mix = nn.Sequential(nn.Linear(3 + 8, config.width), nn.GELU(), nn.Linear(config.width, 3))

    def forward(self, cells, classes):
        """cells (B,S,S) of cell_map, classes (B,S,S) with C for void -> (B,3,S,S), about -1 to 1."""
        colors = self.colors.to(cells.device)[cells]  # (B,S,S,3)
        seglats = colors + self.mix(torch.cat([colors, self.class_embedding(classes)], dim=-1))
        return seglats.permute(0, 3, 1, 2)


class LatentDecoder(nn.Module):
    """The inverse of T_phi: seglat (B,3,S,S) -> logits of the cell (B,1+a*a,S,S) and the class (B,C,S,S) of each pixel.

    A quarter of the resolution sees the whole picture; the full one keeps the edges.
    """

    def __init__(self, config):
        super().__init__()
        W, self.cells = config.width, 1 + config.grid**2
        self.fine = nn.Conv2d(3, W, 3, padding=1)
        self.coarse = nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(48, 2 * W, 3, padding=1),
                                    ResBlock(2 * W, 2 * W, config.vq), AttnBlock(2 * W, config.vq),
                                    ResBlock(2 * W, 2 * W, config.vq), nn.Conv2d(2 * W, W, 1))
        self.head = nn.Sequential(nn.SiLU(), nn.Conv2d(W, W, 3, padding=1), nn.SiLU(),
                                  nn.Conv2d(W, self.cells + len(config.classes), 1))

    def forward(self, seglats):
        coarse = F.interpolate(self.coarse(seglats), scale_factor=4, mode="bilinear")  # (B,W,S,S)
        logits = self.head(self.fine(seglats) + coarse).float()
        return logits[:, :self.cells], logits[:, self.cells:]


STAGES = {  # of training, in their order: the parts of SegVAR that learn
    "seglat": ("seglat_vq",),
    "latent": ("latent_encoder", "latent_decoder"),
    "align": ("encoder", "image_adaptor", "bom", "scale_adaptor", "scale_embedding", "place_embedding", "llama",
              "head"),
}


class SegVAR(MaskWriter):
    """A picture in, all its segments out. encoder: a pretrained SigLIP of the shape config.siglip, seglat_vq: a
    pretrained MultiScaleVQ of the shape config.vq; None makes them with random weights."""

    file_format = "segvar"

    def __init__(self, config: SegVARConfig, encoder=None, seglat_vq=None):
        super().__init__(config)
        D = config.llama.width
        self.stage = "align"
        self.latent_encoder, self.latent_decoder = LatentEncoder(config), LatentDecoder(config)
        self.seglat_vq = seglat_vq or MultiScaleVQ(config.vq)
        # the prior p_psi: [image tokens] <BOM> [inputs of the second scale] [inputs of the third] ...
        self.encoder = encoder or SigLIP(config.siglip, text=False)
        self.image_adaptor = nn.Sequential(nn.Linear(config.siglip.vision_width, D), nn.GELU(), nn.Linear(D, D))
        self.bom = nn.Parameter(torch.empty(D))
        self.scale_adaptor = nn.Linear(config.vq.codebook_dim, D)
        self.scale_embedding = nn.Embedding(len(config.scales), D)
        self.place_embedding = nn.Embedding(config.mask_tokens, D)
        self.llama = Llama(config.llama)
        self.head = nn.Linear(D, config.codebook_size, bias=False)
        for table in (self.bom, self.scale_embedding.weight, self.place_embedding.weight, self.head.weight):
            nn.init.normal_(table, std=0.02)
        if seglat_vq is None:
            # of any direction and of lengths from 0 to 1, so that no code stays unused for being far from all latents
            codes = self.seglat_vq.quantize.embedding.weight.data
            lengths = torch.linspace(0, 1, len(codes), device=codes.device)[:, None]
            codes.copy_(F.normalize(torch.randn_like(codes), dim=1) * lengths)

    def learn(self, stage):
        """Train the parts of a stage and freeze the others. Returns the model."""
        self.stage = stage
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name.partition(".")[0] in STAGES[stage])
        if self.config.freeze_encoders:
            self.encoder.requires_grad_(False)
        return self

    def forward(self, pixels, cells, classes):
        """pixels (B,3,S,S) in [-1,1], cells and classes (B,S,S) as in LatentEncoder -> the terms of the stage's loss by
        name, each (), and the loss (), their sum. The term "cross_entropy" is told and not counted."""
        losses = {"seglat": self.seglat_losses, "latent": self.latent_losses, "align": self.align_losses}
        terms = losses[self.stage](pixels, cells, classes)
        loss = sum(value for name, value in terms.items() if name != "cross_entropy")
        return {name: value.detach() for name, value in terms.items()}, loss

    def seglat_losses(self, pixels, cells, classes):
        """Stage 1: the seglat encoder and decoder learn on pictures and seglats alike, as the paper has it."""
        seglats = self.latent_encoder(cells, classes)
        decoded, code_loss = self.seglat_vq(torch.cat([pixels, seglats]))
        pictures, again = decoded.float().chunk(2)
        return {"pictures": F.l1_loss(pictures, pixels), "seglats": F.l1_loss(again, seglats), "codes": code_loss}

    def latent_losses(self, pixels, cells, classes):
        """Stage 2: -log p(masks | z), which are "cells" and "classes", a mean over pixels, through the frozen seglat
        encoder and decoder. The other terms teach T_phi seglats that get through them."""
        seglats = self.latent_encoder(cells, classes)
        again, code_loss = self.seglat_vq(seglats)
        cell_logits, class_logits = self.latent_decoder(again.clamp(-1, 1))
        return {"cells": F.cross_entropy(cell_logits, cells),
                "classes": F.cross_entropy(class_logits, classes, ignore_index=len(self.config.classes)),
                "seglats": F.l1_loss(again.float(), seglats), "codes": code_loss}

    def align_losses(self, pixels, cells, classes):
        """Stage 3: KL(q || p) of each token, a mean over tokens. Without a temperature q is the nearest code, and
        the KL is the cross-entropy of p."""
        with torch.no_grad():
            tokens, q = self.posterior(self.latent_encoder(cells, classes))  # (B,M), (B,M,K)
        logits, cross_entropy = super().forward(tokens[:, :0], pixels, tokens)
        if q is None:
            return {"kl": cross_entropy}
        log_p = logits.float().log_softmax(-1)
        return {"kl": F.kl_div(log_p, q, reduction="sum") / tokens.numel(), "cross_entropy": cross_entropy}

    def posterior(self, seglats):
        """q(z | masks): seglats (B,3,S,S) -> the likeliest tokens (B,M), and the probabilities of all codes (B,M,K),
        None without a temperature. What a scale describes depends on the likeliest tokens of the coarser ones."""
        quantizer, temperature = self.seglat_vq.quantize, self.config.temperature
        with full_float32(seglats.device.type):
            latents = self.seglat_vq.latents(seglats.float())
            tokens = quantizer.encode(latents)
            if temperature is None:
                return tokens, None
            z = torch.cat([rest.flatten(2) for rest in quantizer.rests(latents)], dim=2).mT  # (B,M,C)
            distances = torch.cdist(z, quantizer.codebook.float()[None]).square()  # (B,M,K)
            return tokens, (-distances / temperature).softmax(-1)

    # what MaskWriter asks for: forward and generate are its

    def prefix(self, text_ids, pixels):
        """pixels (B,3,S,S) -> (B,N+1,D): image tokens and <BOM>. There is no phrase."""
        image = self.image_adaptor(self.encoder.encode_image(pixels).to(self.bom.dtype))  # (B,N,D)
        return torch.cat([image, self.bom.expand(len(image), 1, -1)], dim=1)

    quantizer = property(lambda self: self.seglat_vq.quantize)
    mask_inputs, scale_of = LlamaSeg.mask_inputs, LlamaSeg.scale_of

    def blocks(self, text_ids, length):
        """Tokens of a scale see all of it: they have a block id in common. <BOM> is the first scale's."""
        N, device = self.config.siglip.image_tokens, text_ids.device
        ids = torch.cat([torch.arange(N, device=device), N + self.scale_of(device)])
        return ids[:length].expand(len(text_ids), -1)

    trained_state = nn.Module.state_dict  # all weights: the checkpoint of any stage is whole

    # inference

    @torch.inference_mode()
    def segment(self, image):
        """PIL picture -> list of {"mask" bool (H, W), "label", "score" in [0, 1], "is_thing"}, which do not overlap."""
        side, device = self.config.siglip.image_size, self.bom.device
        pixels = to_pixels(resize_picture(to_rgb(image), side)[None]).to(device)
        tokens = self.generate(torch.zeros(1, 0, dtype=torch.long, device=device), pixels)
        cell_logits, class_logits = self.latent_decoder(self.seglat_vq.decode(tokens))
        return self.segments(cell_logits[0], class_logits[0], image.size[::-1])

    def segments(self, cell_logits, class_logits, size, least=6):
        """Logits (1+a*a,S,S), (C,S,S) of a picture -> its segments at `size` (H, W), as `segment` gives them.

        A cell that wins fewer than `least` pixels is noise. A thing is the pixels of a cell; its class has the highest
        mean probability, which times that of the cell is the score. The rest is stuff, each pixel of its likeliest
        class. Logits are resized, not decisions: between two cells lies no third one.
        """
        names, is_thing = list(self.config.classes), torch.tensor([*self.config.classes.values()])
        won = cell_logits.argmax(0).flatten().bincount(minlength=len(cell_logits)) >= least
        won[0] = True  # there may always be background
        there = won.nonzero()[:, 0]

        def resized(logits):  # (n,S,S) -> probabilities (n,H,W)
            return F.interpolate(logits[None], size, mode="bilinear", align_corners=False)[0].softmax(0).cpu()

        cells, classes, found = resized(cell_logits[there]), resized(class_logits), []
        owner = cells.argmax(0)  # (H,W)
        for k in range(1, len(there)):
            mask = owner == k
            if mask.any():
                mean = torch.where(is_thing, classes[:, mask].mean(1), -1)
                score = mean.max() * cells[k][mask].mean()
                found.append({"mask": mask.numpy(), "label": names[int(mean.argmax())], "score": float(score),
                              "is_thing": True})
        stuff = (~is_thing).nonzero()[:, 0]
        if len(stuff):
            rest = classes[stuff].argmax(0)  # (H,W)
            for k in range(len(stuff)):
                mask = (owner == 0) & (rest == k)
                if mask.any():
                    found.append({"mask": mask.numpy(), "label": names[stuff[k]], "is_thing": False,
                                  "score": float(classes[stuff[k]][mask].mean())})
        return found

    @classmethod
    def from_pretrained(cls, path, dtype=torch.float32):
        """Read a file of `save_pretrained`, or the model.safetensors of a folder, on the CPU and in eval mode.
        FileNotFoundError, or ValueError in one line."""
        path = weights_file(path)
        config, _, weights = read_own(path, cls.file_format, SegVARConfig, dtype)
        model = cls(config)
        with reading(path, "a whole Seg-VAR checkpoint"):
            model.load_trained_state(weights)
        return model.eval()


def weights_file(checkpoint):
    """The model.safetensors of a folder, or the file itself."""
    return Path(checkpoint) / "model.safetensors" if Path(checkpoint).is_dir() else Path(checkpoint)


PRESETS = {
    # drawn scenes: 7 million parameters
    "segvar": SegVARConfig(
        siglip=SigLIPConfig(image_size=128, patch_size=16, vision_width=256, vision_layers=4, vision_heads=4,
                            vision_mlp=512),
        llama=LlamaConfig(width=256, layers=4, heads=4, mlp=512, rope_theta=1000.0),
        vq=VQGANConfig(channels=16, channel_mult=(1, 1, 2, 4, 4), decoder_mult=(1, 1, 2, 4, 4), res_blocks=1,
                       latent_channels=32, codebook_size=4096, codebook_dim=16, norm_groups=8,
                       scales=(1, 2, 3, 4, 6, 8), unit_latents=True)),
    # public data sets at 256 px with 680 tokens, on official weights; not trained here. Paper: no size is stated
    "segvar-coco": SegVARConfig(
        siglip=SIGLIP2["siglip2-base-patch16-256"],
        llama=LlamaConfig(width=1024, layers=16, heads=16, mlp=2730, norm_eps=1e-5),
        vq=VQGANConfig(channels=160, latent_channels=32, codebook_size=4096, codebook_dim=32, scales=VAR_SCALES),
        grid=16, width=96, freeze_encoders=True),
}


# ---- data and scores -------------------------------------------------------------------------------------


def maps_of(example, config):
    """A data.Panoptic -> cells and classes int64 (S,S), as LatentEncoder takes them. Crowds are void."""
    size, void = config.siglip.image_size, len(config.classes)
    masks = np.array([resize_mask(mask, size) for mask in example.masks]).reshape(-1, size, size)
    things = [k for k, thing in enumerate(example.is_thing) if thing and not example.is_crowd[k]]
    cells, classes, names = cell_map(masks[things], config.grid), np.full((size, size), void), list(config.classes)
    for k in sorted(range(len(masks)), key=lambda k: -masks[k].sum()):  # smaller over larger ones, as in the cells
        classes[masks[k]] = void if example.is_crowd[k] else names.index(example.labels[k])
    return cells, classes


class SegmentBatches(Batches):
    """data.Batches of pictures with all their segments: pictures uint8 (b,S,S,3), cells and classes (b,S,S), ids."""

    def __init__(self, dataset, config, batch_size, micro_batch_size, rank=0, world_size=1, seed=0):
        super().__init__(dataset, None, config.siglip.image_size, 0, batch_size, micro_batch_size, 1, rank, world_size,
                         seed)
        self.config = config

    def __getitem__(self, k):
        examples = [self.mixture[i] for i in self.indices(k)[0]]
        pictures = [resize_pixels(np.array(to_rgb(example.image)), self.size) for example in examples]
        cells, classes = zip(*(maps_of(example, self.config) for example in examples))
        return {"pictures": torch.from_numpy(np.array(pictures)), "cells": torch.from_numpy(np.array(cells)),
                "classes": torch.from_numpy(np.array(classes)), "ids": [example.id for example in examples]}


@torch.no_grad()
def predict(model, indices, dataset):
    """A record for each of some pictures: its segments with run-length masks. In the stages before the last one they
    come from the posterior, of the true masks: what can be reached. Stage "seglat": how well seglats are decoded."""
    records = []
    for index in indices:
        example = dataset[index]
        record = {"index": index, "id": example.id}
        if model.stage == "align":
            segments = model.segment(example.image)
        else:
            maps = (torch.from_numpy(values)[None].to(model.bom.device) for values in maps_of(example, model.config))
            seglats = model.latent_encoder(*maps)
            again = model.seglat_vq.decode(model.posterior(seglats)[0])
            cell_logits, class_logits = model.latent_decoder(again)
            segments = model.segments(cell_logits[0], class_logits[0], example.image.size[::-1])
            record["error"] = F.mse_loss(again.float(), seglats.float()).item()
        records.append(record | {"segments": [
            {name: value for name, value in segment.items() if name != "mask"} | {"rle": rle_encode(segment["mask"])}
            for segment in segments]})
    return records


def scores_of(records, dataset):
    """Records of `predict` -> {"PQ", "SQ", "RQ", "things", "stuff": {"pq", ...}, "AP", ..., "mIoU", "PSNR"}. PQ is
    None where true masks may overlap, as in coco-instances. PSNR: of the seglats, None for those of the prior."""
    quality, precision, semantic = PanopticQuality(), AveragePrecision(), SegmentationMetrics()
    panoptic = not all(dataset.classes.values())
    for record in records:
        true, found = dataset[record["index"]], defaultdict(list)
        segments = [segment | {"mask": rle_decode(segment["rle"])} for segment in record["segments"]]
        precision.update([segment for segment in segments if segment["is_thing"]], true)
        if panoptic:
            quality.update(segments, true)
        for segment in segments:
            found[segment["label"]].append(segment["mask"])
        for label in {*found, *true.labels}:
            mask = np.any(found[label], axis=0) if found[label] else np.zeros(true.masks.shape[1:], bool)
            same = np.array([other == label for other in true.labels], bool)
            semantic.update(mask, true.masks[same].any(0), label, id=f"{true.id} {label}", ignore=true.ignore)
    parts = quality.compute()
    errors = [record["error"] for record in records if "error" in record]
    return {**{name.upper(): parts["All"][name] for name in ("pq", "sq", "rq")}, "things": parts["Things"],
            "stuff": parts["Stuff"], **precision.compute(), "mIoU": semantic.compute()["mIoU"],
            "PSNR": 10 * np.log10(4 / np.mean(errors)).item() if errors else None}


# ---- python segvar.py ------------------------------------------------------------------------------------


def painted(image, segments):
    """The picture with each segment in a color of its own, outlined, and its name in its middle; PIL RGB."""
    pixels, colors = np.asarray(image, np.float32), np.random.default_rng(1).integers(40, 256, (len(segments), 3))
    for segment, color in zip(segments, colors):
        mask, share = segment["mask"], 0.5 if segment["is_thing"] else 0.15
        pixels = np.where(mask[..., None], (1 - share) * pixels + share * color, pixels)
    picture = Image.fromarray(pixels.astype(np.uint8))
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(max(10, min(image.size) // 16))
    for segment in segments:
        if segment["is_thing"]:
            y, x = np.argwhere(segment["mask"]).mean(0)
            draw.text((x, y), segment["label"], "white", font, anchor="mm", stroke_width=1, stroke_fill="black")
    return picture


def as_coco(name, image, segments, classes, folder):
    """Segments of a picture in COCO's forms: its entries of "images" and "annotations" of a panoptic JSON, whose PNG is
    written to `folder` (number of a segment = R + 256 G + 65536 B), and a list of instance results."""
    numbers, infos, results = np.zeros(image.size[::-1], np.int64), [], []
    for number, segment in enumerate(segments, 1):
        mask, category = segment["mask"], 1 + list(classes).index(segment["label"])
        (top, left), (bottom, right) = np.argwhere(mask).min(0).tolist(), np.argwhere(mask).max(0).tolist()
        numbers[mask], box = number, [left, top, right - left + 1, bottom - top + 1]
        infos.append({"id": number, "category_id": category, "area": int(mask.sum()), "bbox": box, "iscrowd": 0})
        if segment["is_thing"]:
            results.append({"image_id": name, "category_id": category, "bbox": box, "score": segment["score"],
                            "segmentation": rle_encode(mask)})
    png = np.stack([numbers >> 8 * k & 255 for k in range(3)], -1).astype(np.uint8)
    write_picture(Image.fromarray(png), folder / f"{name}-panoptic.png")
    described = {"id": name, "file_name": f"{name}.png", "width": image.width, "height": image.height}
    return described, {"image_id": name, "file_name": f"{name}-panoptic.png", "segments_info": infos}, results


def segment_pictures(args):
    """Overlays of pictures, a line for each, and what --json asks for; returns 1 if pictures could not be read."""
    from sample import find_pictures, picture_names

    model = SegVAR.from_pretrained(args.checkpoint).to(pick_device(args.device))
    pictures, broken = find_pictures(args.image), 0
    args.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, source in zip(picture_names(pictures), pictures):
        try:
            image = open_picture(source)
        except (ValueError, OSError) as error:
            print(f"error: {printable(error)}", file=sys.stderr)
            broken += 1
            continue
        segments = model.segment(image)
        write_picture(painted(image, segments), args.out / f"{name}-segments.png")
        things = ", ".join(f"{s['label']} {s['score']:.2f}" for s in segments if s["is_thing"]) or "nothing"
        print(printable(f"{name}: {things} -> {args.out / name}-segments.png"))
        if args.json:
            rows.append(as_coco(name, image, segments, model.config.classes, args.out))
    if args.json:
        images, annotations, results = zip(*rows) if rows else ([], [], [])
        categories = [{"id": number, "name": name, "isthing": int(thing)}
                      for number, (name, thing) in enumerate(model.config.classes.items(), 1)]
        write_json(args.json, {"images": images, "annotations": annotations, "categories": categories})
        write_json(args.json.with_suffix(".instances.json"), sum(results, []))
    return 1 if broken else 0


def score(args):
    """PQ, AP and mIoU of a data set. Under torchrun the ranks share the work, and a killed run goes on."""
    from sample import one_rank_first, predict_rest, setup_ranks

    rank, world_size, device = setup_ranks(args.device)
    with one_rank_first():
        dataset = load_segments(args.dataset, args.split, args.root)
    model = SegVAR.from_pretrained(args.checkpoint).to(device)
    if dataset.classes != model.config.classes:
        raise ValueError(f"{args.checkpoint}: knows {len(model.config.classes)} classes, {args.dataset} has "
                         f"{len(dataset.classes)} others")
    count, stem = min(args.count or len(dataset), len(dataset)), args.out / f"{args.dataset}-{args.split}-segments"
    args.out.mkdir(parents=True, exist_ok=True)
    run = {"dataset": args.dataset, "split": args.split, "count": count,
           "model": sha256_of(weights_file(args.checkpoint))}
    path = stem.with_suffix(".jsonl")
    predict_rest(lambda indices: predict(model, indices, dataset), run, path, rank, world_size)
    if rank == 0:
        records = sorted(read_records(path)[1], key=lambda record: record["index"])
        numbers = scores_of(records, dataset)
        for name in ("PQ", "SQ", "RQ", "AP", "AP50", "AP75", "mIoU"):
            print(f"{name:5}{'-' if numbers[name] is None else f'{numbers[name]:.4f}':>8}")
        write_json(args.json or stem.with_suffix(".json"), {**run, **numbers})


def main(argv=None):
    """The command line; returns the exit code: 0, 1 for bad data, 2 for bad usage."""
    parser = Parser(description=__doc__)
    parser.add_argument("--image", nargs="+", help="pictures and folders (default: the embedded one)")
    parser.add_argument("--checkpoint", type=Path, default=ASSETS / "segvar", metavar="PATH",
                        help="a folder that train.py wrote, or its model.safetensors (default: the embedded one)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for pictures (default: out)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write COCO's panoptic JSON to FILE, its PNGs "
                        "to OUT, and the instance results to FILE with the ending .instances.json")
    parser.add_argument("--dataset", help="score a data set of segments instead, as scenes-instances or coco-panoptic")
    parser.add_argument("--split", default="test", help="default: test")
    parser.add_argument("--root", type=Path, help="folder in which the official archives were unpacked")
    parser.add_argument("--count", type=int, help="so many pictures (default: all)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    args = parser.parse_args(argv)
    if args.dataset:
        parser.check_read(args, "--dataset", vars(args).keys() - {"image"})
    else:
        parser.check_read(args, "pictures", vars(args).keys() - {"split", "root", "count"})
    return parser.run(score if args.dataset else segment_pictures, args)


if __name__ == "__main__":
    sys.exit(main())
