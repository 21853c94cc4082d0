"""Pictures and text to integers and back: the mask tokenizers (VQGAN, MultiScaleVQ) and the text tokenizer.

    python tokenizer.py train            # train a mask tokenizer on the masks of a data set
    python tokenizer.py train --scales 1,2,3,4,6,8 --init-from assets/mask_tokenizer.safetensors --free-steps 0
    python tokenizer.py eval             # total IoU, mAHD and codebook use of one on held-out masks
    python tokenizer.py encode           # cache the mask tokens of a data set, so that training need not encode
    python tokenizer.py text             # make the small text vocabulary of scenes

Legend: B batch, H W picture height and width, h w token grid (H/16, W/16), C channels of a latent,
K rows of the codebook, s side of a scale, M mask tokens.
"""

import hashlib
import json
import re
import signal
import struct
import sys
from collections import OrderedDict
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from metrics import Parser, SegmentationMetrics, parse_json, whole, write_json
from scenes import COLOR_RIDDLES, SHAPE_RIDDLES
from weights import ASSETS, build_from, fingerprint, read_header, read_weights, reading, weight_files, write_tensors

# ---- masks and pictures ---------------------------------------------------------------------------------------------


def mask_to_image(masks):
    """bool (B, H, W) -> mask image float (B, 3, H, W): -1 background (black), +1 object (white)."""
    return (masks.to(torch.float32) * 2 - 1).unsqueeze(1).repeat(1, 3, 1, 1)


def image_to_mask(images):
    """Binarize: float (B, 3, H, W) -> bool (B, H, W), True where the channel mean is >= 0 (paper, section 3)."""
    return images.mean(1) >= 0


@contextmanager
def full_float32(device_type):
    """Compute in float32 while the block runs: without autocast, and without TF32 in matrix products and convolutions.
    The settings are PyTorch's older ones, as train.py's are: the older and the newer ones must not be mixed."""
    matmul, convolution = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False
        with nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = convolution


# ---- VQGAN, in the layout and with the parameter names of LlamaGen (tokenizer/tokenizer_image/vq_model.py) ----------


@dataclass
class VQGANConfig:
    """Shape of a mask tokenizer; the defaults are LlamaGen's VQ-16 (72M parameters)."""

    channels: int = 128  # width at full resolution
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)  # one entry per resolution; downsample ratio 2^(len - 1)
    decoder_mult: tuple[int, ...] | None = None  # None: as channel_mult, from full resolution down too
    res_blocks: int = 2  # per resolution in the encoder; the decoder has one more
    latent_channels: int = 256
    codebook_size: int = 16384
    codebook_dim: int = 8
    norm_groups: int = 32  # LlamaGen: 32; narrower models need fewer
    scales: tuple[int, ...] = ()  # sides of the token grids of MultiScaleVQ, coarse to fine
    unit_latents: bool = False  # MultiScaleVQ: latents have unit length, as those of VQGAN; VAR's have not

    def __post_init__(self):
        self.channel_mult, self.scales = tuple(self.channel_mult), tuple(self.scales)
        self.decoder_mult = tuple(self.decoder_mult or self.channel_mult)

    @property
    def downsample(self):
        """Pixels along the side of one token."""
        return 2 ** (len(self.channel_mult) - 1)


def _norm(channels, config):
    return nn.GroupNorm(config.norm_groups, channels, eps=1e-6)


class ResBlock(nn.Module):
    """norm, SiLU, 3x3 conv, twice, plus the input (through a 1x1 conv where the width changes)."""

    def __init__(self, c_in, c_out, config):
        super().__init__()
        self.norm1 = _norm(c_in, config)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = _norm(c_out, config)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return self.nin_shortcut(x) + y


class AttnBlock(nn.Module):
    """Self-attention over all positions of a feature map, one head."""

    def __init__(self, channels, config):
        super().__init__()
        self.norm = _norm(channels, config)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        y = self.norm(x)
        # (B, C, h, w) -> (B, 1, h*w, C): one head
        q, k, v = (f(y).flatten(2).transpose(1, 2).unsqueeze(1) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v)
        y = y.squeeze(1).transpose(1, 2).reshape(x.shape)  # (B, C, h, w)
        return x + self.proj_out(y)


class Level(nn.Module):
    """The blocks of one resolution: `res`, `attn` (lowest resolution only), then a change of resolution."""

    def __init__(self, c_in, c_out, count, attention, config, downsample=False, upsample=False):
        super().__init__()
        self.res = nn.ModuleList(ResBlock(c_in if i == 0 else c_out, c_out, config) for i in range(count))
        self.attn = nn.ModuleList(AttnBlock(c_out, config) if attention else nn.Identity() for _ in range(count))
        self.downsample, self.upsample = nn.Identity(), nn.Identity()
        if downsample:  # half the side, with zero padding on the right and at the bottom only
            conv = nn.Conv2d(c_out, c_out, 3, stride=2)
            self.downsample = nn.Sequential(OrderedDict(pad=nn.ZeroPad2d((0, 1, 0, 1)), conv=conv))
        if upsample:
            conv = nn.Conv2d(c_out, c_out, 3, padding=1)
            self.upsample = nn.Sequential(OrderedDict(resize=nn.Upsample(scale_factor=2.0), conv=conv))

    def forward(self, x):
        for res, attn in zip(self.res, self.attn):
            x = attn(res(x))
        return self.upsample(self.downsample(x))


def _middle(channels, config):
    return nn.Sequential(ResBlock(channels, channels, config), AttnBlock(channels, config),
                         ResBlock(channels, channels, config))


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, latent_channels, h, w)."""

    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in config.channel_mult]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(3, config.channels, 3, padding=1)
        self.conv_blocks = nn.Sequential(*(
            Level(c_in, c_out, config.res_blocks, i == last, config, downsample=i < last)
            for i, (c_in, c_out) in enumerate(zip([config.channels] + widths, widths))))
        self.mid = _middle(widths[-1], config)
        self.norm_out = _norm(widths[-1], config)
        self.conv_out = nn.Conv2d(widths[-1], config.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.mid(self.conv_blocks(self.conv_in(x)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(nn.Module):
    """(B, latent_channels, h, w) -> (B, 3, H, W); conv_blocks[0] is the lowest resolution."""

    def __init__(self, config):
        super().__init__()
        widths = [config.channels * m for m in reversed(config.decoder_mult)]
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid = _middle(widths[0], config)
        self.conv_blocks = nn.Sequential(*(
            Level(c_in, c_out, config.res_blocks + 1, i == 0, config, upsample=i < last)
            for i, (c_in, c_out) in enumerate(zip([widths[0]] + widths, widths))))
        self.norm_out = _norm(widths[-1], config)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        z = self.conv_blocks(self.mid(self.conv_in(z)))
        return self.conv_out(F.silu(self.norm_out(z)))


class VectorQuantizer(nn.Module):
    """Nearest row of an l2-normalised codebook (LlamaGen, section 3.1; ViT-VQGAN)."""

    def __init__(self, config):
        super().__init__()
        self.embedding = nn.Embedding(config.codebook_size, config.codebook_dim)

    @property
    def codebook(self):
        """The l2-normalised rows, (K, codebook_dim): on disk they are not normalised."""
        return F.normalize(self.embedding.weight, dim=-1)

    def nearest(self, latents, unit=True):
        """Latents (B, C, h, w) -> the nearest rows of the codebook: code indices (B, h*w), raster order."""
        with full_float32(latents.device.type):  # codes that lie close together differ by less than bfloat16 resolves
            z, codebook = latents.float().flatten(2).transpose(1, 2), self.codebook.float()  # (B, h*w, C), (K, C)
            z = F.normalize(z, dim=-1) if unit else z
            # |z - e|^2 = |z|^2 + |e|^2 - 2 z.e, as the official code writes it; |z| is shared by all e
            return (codebook.pow(2).sum(-1) - 2 * z @ codebook.T).argmin(-1)

    def lookup(self, tokens, grid):
        """Code indices (B, h*w) -> quantized latents (B, C, h, w)."""
        return self.codebook[tokens].transpose(1, 2).unflatten(2, grid)


JANUS = "gen_vision_model."  # where a Janus-Pro checkpoint keeps its image tokenizer
# statistics of the official trainers, on which no output depends
UNUSED = ("quantize.codebook_used", "quantize.ema_vocab_hit_SV")
MULTI = ("scales", "unit_latents")  # fields of VQGANConfig that MultiScaleVQ has


class VQGAN(nn.Module):
    """The mask tokenizer: LlamaGen's VQ-16, every width configurable. source: {"name", "sha256"} of the file that
    from_pretrained read."""

    def __init__(self, config):
        super().__init__()
        self.source = None
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quantize = VectorQuantizer(config)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.codebook_dim, 1)
        self.post_quant_conv = nn.Conv2d(config.codebook_dim, config.latent_channels, 1)

    def latents(self, images):
        """(B, 3, H, W) in [-1, 1] -> latents before quantization (B, codebook_dim, h, w), in full float32."""
        height, width = images.shape[-2:]
        if height % self.config.downsample or width % self.config.downsample:
            raise ValueError(f"picture of {height}x{width}: both sides must divide by {self.config.downsample}")
        with full_float32(images.device.type):
            return self.quant_conv(self.encoder(images))

    def decode_latents(self, quantized):
        """Quantized latents (B, codebook_dim, h, w) -> (B, 3, H, W), not clamped."""
        return self.decoder(self.post_quant_conv(quantized))

    def encode(self, images):
        """(B, 3, H, W) float in [-1, 1] -> code indices int64 (B, h*w), raster order."""
        # on a CPU a few pictures at a time, whose activations stay in its cache: 2.4 times as fast
        parts = images.split(4) if images.device.type == "cpu" else [images]
        return torch.cat([self.quantize.nearest(self.latents(part)) for part in parts])

    def decode(self, tokens, grid=None):
        """Code indices (B, h*w) -> (B, 3, H, W), not clamped; grid=(h, w) where the picture is not square."""
        grid = grid or (round(tokens.shape[1] ** 0.5),) * 2
        return self.decode_latents(self.quantize.lookup(tokens, grid))

    def forward(self, images, noise=None):
        """One training pass: (pictures decoded from the codes, the quantizer's loss).

        The gradient passes the nearest-code choice straight through (VQ-VAE, section 3.2; LlamaGen's
        commitment weight of 0.25). With `noise` (a float) nothing is quantized: the latents only get Gaussian
        noise of that size, which is how the model starts before there is a codebook.
        """
        z = F.normalize(self.latents(images), dim=1)  # (B, C, h, w), unit length
        loss = self.flat_loss(images, z)
        if noise is not None:
            z = F.normalize(z + noise * torch.randn_like(z), dim=1)
            return self.decode_latents(z), loss
        with torch.no_grad():
            tokens = self.quantize.nearest(z)
        codes = self.quantize.lookup(tokens, z.shape[-2:])
        loss = loss + F.mse_loss(codes, z.detach()) + 0.25 * F.mse_loss(z, codes.detach())
        return self.decode_latents(z + (codes - z).detach()), loss

    def flat_loss(self, images, z):
        """Pull latents of all-background patches to code 0 and of all-object patches to code 1.

        GroupNorm and attention let every latent see the whole mask; left alone, plain background gets hundreds
        of codes, which wastes the codebook and makes mask tokens hard to predict. LlamaGen has no such term.
        """
        level = F.avg_pool2d(images.mean(1, keepdim=True), self.config.downsample).squeeze(1)  # (B, h, w)
        rows = self.quantize.codebook.detach()
        target = torch.where((level < 0)[:, None], rows[0, :, None, None], rows[1, :, None, None])  # (B, C, h, w)
        flat = (level.abs() > 1 - 1e-4)[:, None]
        return 10 * ((z - target).square() * flat).mean()

    def save_pretrained(self, path, dtype=None):
        """Write one .safetensors with the config in its header; `dtype` (torch.float16) makes it smaller."""
        tensors = {name: w.to(dtype or w.dtype) for name, w in self.state_dict().items()}
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"{path}: not written, the weights are no longer finite: try a smaller learning rate")
        write_tensors(path, tensors, header={"format": "vqgan", "config": json.dumps(asdict(self.config))})

    @classmethod
    def from_pretrained(cls, path, scales=None):
        """Load a mask tokenizer, strictly, as float32, in eval mode; its sizes are read off the tensors.

        path: our own .safetensors; a released LlamaGen file (vq_ds16_c2i.pt, vq_ds16_t2i.pt) or one that the official
        trainer wrote; a Janus-Pro checkpoint, whose tokenizer lies under `gen_vision_model.`; VAR's
        vae_ch160v4096z32.pth, which is a MultiScaleVQ; or a folder with one of these, in one file or sharded.
        scales: of VAR's file, which does not hold them (default: VAR_SCALES).
        FileNotFoundError, or ValueError with one line that names file and tensor.
        """
        path = Path(path)
        weights = read_weights(path, lambda name: name.removeprefix(JANUS) not in UNUSED)
        janus = {name.removeprefix(JANUS): w for name, w in weights.items() if name.startswith(JANUS)}
        weights, header = janus or weights, next(map(read_header, weight_files(path)), {})
        with reading(path, "a mask tokenizer"):
            more = json.loads(header["config"]) if header.get("format") == "vqgan" else {"norm_groups": 32}
            if any(name.startswith("decoder.up.") for name in weights):
                weights, more = var_names(weights), more | {"scales": scales or VAR_SCALES}
            config = vqgan_config(weights, **{name: more[name] for name in ("norm_groups", *MULTI) if name in more})
            kind = MultiScaleVQ if config.scales else VQGAN
            if not issubclass(kind, cls):
                raise ValueError("it has one scale")
            own = {name: w.to(torch.float32, copy=True) for name, w in weights.items()}  # can be trained
            model = build_from(lambda: kind(config), own, path, torch.float32)
        model.source = {"name": path.absolute().stem, "sha256": fingerprint(weights)}
        return model


def vqgan_config(weights, **more):
    """VQGANConfig, read off the tensors but for `more`; LookupError or ValueError if they are another model's."""
    names = [name.split(".") for name in weights if name.startswith("encoder.conv_blocks.")]
    levels = range(len({name[2] for name in names}))
    channels = weights["encoder.conv_in.weight"].shape[0]
    codebook_size, codebook_dim = weights["quantize.embedding.weight"].shape

    def mults(coder):
        firsts = (weights[f"{coder}.conv_blocks.{level}.res.0.conv1.weight"] for level in levels)
        return [first.shape[0] // channels for first in firsts]

    return VQGANConfig(
        channels=channels, channel_mult=mults("encoder"), decoder_mult=mults("decoder")[::-1],
        res_blocks=len({name[4] for name in names if name[2:4] == ["0", "res"]}),
        latent_channels=weights["encoder.conv_out.weight"].shape[0],
        codebook_size=codebook_size, codebook_dim=codebook_dim, **more)

# ---- multi-scale VQ, in the layout of VAR (models/vqvae.py, models/quant.py) ----------------------------------------


class MultiScaleQuantizer(VectorQuantizer):
    """Latents (B, C, h, h) as a sum over scales, coarse to fine. The tokens of a scale describe what the coarser scales
    have left (residual quantization; Tian et al. 2024, "Visual Autoregressive Modeling", algorithms 1 and 2)."""

    def __init__(self, config):
        super().__init__(config)
        C, self.scales = config.codebook_dim, config.scales
        self.phi = nn.ModuleList(nn.Conv2d(C, C, 3, padding=1) for _ in range(4))  # shared by the scales
        # Scales lie between 0 and 1, and each takes the nearest of four ticks. Between two of ten scales rounding
        # decides, so the ticks must be NumPy's, as in the official code.
        ticks, last = np.linspace(1 / 3 / 4, 1 - 1 / 3 / 4, 4), max(1, len(self.scales) - 1)
        self.phi_of = [int(np.argmin(np.abs(ticks - i / last))) for i in range(len(self.scales))]

    @property
    def codebook(self):
        """The rows as stored, (K, C)."""
        return self.embedding.weight

    def nearest(self, latents):
        """As VectorQuantizer's, but nothing has unit length."""
        return super().nearest(latents, unit=False)

    def contribution(self, z, scale_idx):
        """Rows (B, C, s, s) of a scale -> what they add to the latents, (B, C, h, h)."""
        if z.shape[-1] != self.scales[-1]:
            z = F.interpolate(z, (self.scales[-1],) * 2, mode="bicubic")
        return 0.5 * z + 0.5 * self.phi[self.phi_of[scale_idx]](z)

    def rests(self, latents, quantized=True):
        """Latents (B, C, h, h) -> what each scale has left to describe, (B, C, s, s), one after the other.
        quantized: the scales before it described it with rows of the codebook; else exactly, as far as s*s vectors can.
        """
        rest = latents.float()
        for scale_idx, s in enumerate(self.scales):
            z = F.interpolate(rest, (s, s), mode="area")  # of the same size: unchanged
            yield z
            if quantized:
                z = self.lookup(self.nearest(z), (s, s))
            rest = rest - self.contribution(z, scale_idx)

    def encode(self, latents):
        """Latents (B, C, h, h) -> tokens of all scales, (B, M)."""
        with full_float32(latents.device.type):
            return torch.cat([self.nearest(z) for z in self.rests(latents)], dim=1)

    def sums(self, tokens):
        """Tokens of all or the first scales (B, m) -> latents (B, C, h, h) as known up to each scale, one by one."""
        total, start = 0, 0
        for scale_idx, s in enumerate(self.scales):
            if start < tokens.shape[1]:
                z = self.lookup(tokens[:, start : start + s * s], (s, s))
                total, start = total + self.contribution(z, scale_idx), start + s * s
                yield total

    def inputs(self, tokens):
        """Tokens of all or the first scales (B, m) -> what a transformer reads from the second scale to the one after
        them, (B, m', C): what the coarser scales decode to, at the size of the scale to come."""
        maps = [F.interpolate(latents, (s, s), mode="area").flatten(2)
                for latents, s in zip(self.sums(tokens), self.scales[1:])]
        return torch.cat([self.embedding.weight.new_empty(len(tokens), self.embedding.embedding_dim, 0), *maps], 2).mT


VAR_SCALES = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)  # of VAR's 256 px models


class MultiScaleVQ(VQGAN):
    """VAR's tokenizer: the encoder and decoder of VQGAN around a MultiScaleQuantizer. Pictures are square. M tokens,
    the sum of the squares of `scales`, coarse to fine, raster order within a scale."""

    def __init__(self, config):
        super().__init__(config)
        C, latent_channels = config.codebook_dim, config.latent_channels  # the same in VAR's file
        self.quantize = MultiScaleQuantizer(config)
        self.quant_conv = nn.Conv2d(latent_channels, C, 3, padding=1)
        self.post_quant_conv = nn.Conv2d(C, latent_channels, 3, padding=1)

    @property
    def scales(self):
        return self.config.scales

    @classmethod
    def from_plain(cls, vqgan, scales):
        """A MultiScaleVQ with the encoder and decoder of a VQGAN. Its codebook is random; phi returns its input."""
        model = cls(replace(vqgan.config, scales=scales, unit_latents=True))
        state = {name: w for name, w in vqgan.state_dict().items() if not name.startswith("quantize.")}
        for name in ("quant_conv.weight", "post_quant_conv.weight"):
            state[name] = F.pad(state[name], (1, 1, 1, 1))  # 1x1 -> 3x3
        model.load_state_dict(model.state_dict() | state)
        for phi in model.quantize.phi:
            nn.init.dirac_(phi.weight)
            nn.init.zeros_(phi.bias)
        return model

    def latents(self, images):
        z = super().latents(images)
        return F.normalize(z, dim=1) if self.config.unit_latents else z

    def forward(self, images, noise=None):
        """One training pass as in VQGAN.forward. The quantizer's loss is VAR's: the squared error of the latents known
        up to a scale, averaged over the scales."""
        z = self.latents(images)
        with torch.no_grad():
            tokens = self.quantize.encode(z)
        sums = list(self.quantize.sums(tokens))
        loss = sum(F.mse_loss(latents.float(), z.detach()) + 0.25 * F.mse_loss(z, latents.detach()) for latents in sums)
        return self.decode_latents(sums[-1] + z - z.detach()), loss / len(sums)  # straight through the choice of codes

    def encode(self, images):
        """(B, 3, H, W) float in [-1, 1] -> code indices int64 (B, M); ValueError if they are not of the last scale."""
        latents = self.latents(images)
        if latents.shape[2:] != (self.scales[-1],) * 2:
            raise ValueError(f"pictures of {tuple(images.shape[2:])} px have latents of {tuple(latents.shape[2:])}, "
                             f"expected the last scale, {self.scales[-1]}")
        return self.quantize.encode(latents)

    def decode(self, tokens, grid=None):
        """Code indices (B, M) -> (B, 3, H, W), clamped to [-1, 1] as VAR does."""
        return self.decode_scales(tokens, last=True)[0]

    def decode_scales(self, tokens, last=False):
        """Code indices (B, M) -> a picture (B, 3, H, W) for each scale: what is known up to it. last: of it alone."""
        return [self.decode_latents(latents).clamp(-1, 1)
                for latents in list(self.quantize.sums(tokens))[-1 if last else 0:]]

    def teacher_inputs(self, tokens):
        """Code indices (B, M) -> (B, M - scales[0]**2, C), see MultiScaleQuantizer.inputs."""
        return self.quantize.inputs(tokens)


def var_names(weights):
    """Tensors of VAR's file under our names; a fused qkv becomes three views. Unknown names stay, to be reported."""
    ours, last = {}, max(int(name.split(".")[2]) for name in weights if name.startswith("decoder.up."))
    for name, w in weights.items():
        name = re.sub(r"^encoder\.down\.", "encoder.conv_blocks.", name)
        name = re.sub(r"^decoder\.up\.(\d+)", lambda level: f"decoder.conv_blocks.{last - int(level[1])}", name)
        for official, own in ((".block.", ".res."), (".mid.block_1.", ".mid.0."), (".mid.attn_1.", ".mid.1."),
                              (".mid.block_2.", ".mid.2."), (".quant_resi.qresi_ls.", ".phi.")):
            name = name.replace(official, own)
        for part, piece in zip("qkv", w.chunk(3)) if ".qkv." in name else [("", w)]:
            ours[name.replace(".qkv.", f".{part}.")] = piece
    return ours


@torch.no_grad()
def decode_masks(mask_tokenizer, tokens, sizes, boxes=None):
    """Mask tokens (B, M) -> masks at the pictures' own sizes: soft decode, resize, then binarize.

    sizes: B pairs (H, W). boxes: where the pictures stand in the decoded square, B of (left, top, width, height), as
    data.padded_box gives them; None: they fill it. Returns a list of bool arrays (H, W).
    Paper: the order is not stated; binarizing last keeps smooth edges smooth.
    """
    soft = mask_tokenizer.decode(tokens).float().mean(1, keepdim=True).cpu()  # (B, 1, S, S)
    if boxes is not None:
        soft = [m[:, top : top + h, left : left + w] for m, (left, top, w, h) in zip(soft, boxes)]
    return [(F.interpolate(m[None], size, mode="bilinear", antialias=True)[0, 0] >= 0).numpy()
            for m, size in zip(soft, sizes)]


# ---- text tokenizer -------------------------------------------------------------------------------------------------


class TextTokenizer:
    """SentencePiece with SigLIP2's rules: lower-case, encode, append EOS, pad on the right to `length`.

    A text of more than length - 1 tokens is cut and keeps EOS last; `too_long` tells.
    model_path: a SentencePiece tokenizer.model (Gemma's), the tokenizer.json that lies beside SigLIP2's weights,
    or a folder with one of them; both files give the same ids.
    """

    def __init__(self, model_path, length=64):
        path = Path(model_path)
        if path.is_dir():
            path = path / ("tokenizer.model" if (path / "tokenizer.model").exists() else "tokenizer.json")
        model = sentencepiece_from_json(path) if path.suffix == ".json" else path.read_bytes()
        self.model = sentencepiece.SentencePieceProcessor()
        with reading(path, "a SentencePiece model"):
            self.model.LoadFromSerializedProto(model)
        self.length = length
        self.source = {"name": path.stem, "sha256": hashlib.sha256(self.model.serialized_model_proto()).hexdigest()}

    def _ids(self, text):
        text.encode()  # a UnicodeEncodeError, which is a ValueError, on half of a surrogate pair
        # character by character, as SigLIP2's tokenizer lowers: "Σ" at the end of a word stays non-final
        return self.model.encode("".join(c.lower() for c in text))

    def too_long(self, text):
        """How many tokens `text` needs if that is more than fit, else 0."""
        needed = len(self._ids(text)) + 1
        return needed if needed > self.length else 0

    def __call__(self, texts):
        """list of B strings -> int64 (B, length)."""
        ids = torch.full((len(texts), self.length), max(self.model.pad_id(), 0), dtype=torch.long)
        for row, text in zip(ids, texts):
            pieces = self._ids(text)[: self.length - 1] + [self.model.eos_id()]
            row[: len(pieces)] = torch.tensor(pieces)
        return ids


def sentencepiece_from_json(path):
    """tokenizer.json of a Gemma tokenizer -> the SentencePiece model (bytes of its protocol buffer) it was made from.

    A merge's rank becomes the score of the piece it makes: SentencePiece joins the neighbours of the best score first,
    as the merges do. ValueError if the file is no such tokenizer.
    """
    special = {"<unk>": 2, "<bos>": 3, "<eos>": 3, "<pad>": 3}  # SentencePiece.Type: unknown is 2, control is 3
    with reading(path, "Gemma's tokenizer.json"):
        content = parse_json(path.read_bytes())
        bpe, added = content["model"], {token["content"] for token in content["added_tokens"]}
        ids, merges = bpe["vocab"], bpe["merges"]
        whole_ids = sorted(ids.values()) == list(range(len(ids))) and special.keys() <= ids.keys()
        if bpe["type"] != "BPE" or not bpe["byte_fallback"] or not whole_ids:
            raise ValueError(f"expected BPE with byte_fallback, ids without gaps, and {', '.join(special)}")
        made = ["".join(pair).replace(" ", "") for pair in merges]
        rank = {piece: i for i, piece in reversed(list(enumerate(made)))}  # the first merge that makes a piece counts
        pieces = []
        for piece in sorted(ids, key=ids.get):
            kind = special.get(piece, 4 if piece in added else 1)  # user defined, else normal
            score = -float(rank.get(piece, len(made)))
            if re.fullmatch("<0x[0-9A-F]{2}>", piece):
                kind = 6  # a byte
            elif piece == "\t" and ids[piece] == ids.get("<0x08>", -2) + 1:  # Hugging Face writes byte 9 as itself
                piece, kind = "<0x09>", 6
            pieces.append((1, protobuf((1, piece.encode()), (2, score), (3, kind))))
    trainer = [(3, 2), (4, len(ids)), (35, 1), *((40 + i, ids[piece]) for i, piece in enumerate(special)),
               (46, b"<bos>"), (47, b"<eos>")]  # model_type BPE, vocab_size, byte_fallback, ids of special pieces
    normalizer = [(1, b"identity"), (3, 0), (4, 0)]  # no dummy prefix; extra white space stays
    return protobuf(*pieces, (2, protobuf(*trainer)), (3, protobuf(*normalizer)))


def protobuf(*fields):
    """(number, value) pairs in the wire format of protocol buffers; a value is an int >= 0, a float or bytes."""

    def varint(n):
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    def field(number, value):
        if isinstance(value, int):
            return varint(number << 3) + varint(value)
        if isinstance(value, float):
            return varint(number << 3 | 5) + struct.pack("<f", value)
        return varint(number << 3 | 2) + varint(len(value)) + value

    return b"".join(field(number, value) for number, value in fields)


# ---- python tokenizer.py train | eval | encode | text ---------------------------------------------------------------

# The default's mask tokenizer: 128 px, 64 mask tokens. LOG.md has what it cost and reached.
SCENES = VQGANConfig(channels=16, channel_mult=(1, 1, 2, 4, 4), decoder_mult=(1, 1, 2, 6, 6), res_blocks=1,
                     latent_channels=32, codebook_size=4096, codebook_dim=8, norm_groups=8)


def mask_batch(dataset, size, start, count, padded=False):
    """Masks of examples start .. start + count - 1 (the data set repeats): bool (count, size, size). padded: with the
    pictures' aspect ratio, as Janus sees them."""
    from data import pad_mask, resize_mask

    masks = (dataset[(start + i) % len(dataset)].mask for i in range(count))
    return torch.stack([torch.from_numpy((pad_mask if padded else resize_mask)(mask, size)) for mask in masks])


def crop_masks(masks, size):
    """A window of side `size` about an object pixel of each mask: bool (B, S, S) -> (B, size, size)."""
    side, crops = masks.shape[-1], []
    for mask in masks:
        pixels = mask.nonzero()
        row, col = pixels[torch.randint(len(pixels), ())] if len(pixels) else (side // 2, side // 2)
        top, left = (int(min(max(c - torch.randint(size, ()), 0), side - size)) for c in (row, col))
        crops.append(mask[top : top + size, left : left + size])
    return torch.stack(crops)


def k_means(points, count, start=None, unit=True):
    """k-means of vectors (n, C) -> (count, C): a codebook without dead rows to begin with.

    start: (count, C) to begin with, so that a row keeps its meaning; default: random points.
    unit: points and rows have unit length (spherical k-means).
    """
    def normal(x):
        return F.normalize(x, dim=-1) if unit else x

    # most latents are plain background: without the unique() most rows would be spent on it
    points = normal(torch.unique((points * 50).round(), dim=0).float() / 50)
    if len(points) < count:
        raise ValueError(f"{len(points)} different latents cannot fill a codebook of {count}: train longer first")
    centers = points[torch.randperm(len(points))[:count]] if start is None else start
    for _ in range(25):
        lengths = centers.pow(2).sum(-1)
        nearest = torch.cat([(lengths - 2 * chunk @ centers.T).argmin(-1) for chunk in points.split(8192)])
        sums = torch.zeros_like(centers).index_add_(0, nearest, points)
        members = torch.bincount(nearest, minlength=count)
        sums[members == 0] = points[torch.randint(len(points), (int((members == 0).sum()),))]
        centers = normal(sums / members.clamp(min=1)[:, None])
    return centers


def reconstruction_loss(images, masks):
    """Decoded pictures (B, 3, H, W) against masks bool (B, H, W).

    The paper fine-tunes with LlamaGen's picture loss (L2, perceptual, GAN). A mask has two values and is
    read by the sign of the channel mean, so we use the cross-entropy of that sign and a little L2.
    """
    images = images.float()
    sign = F.binary_cross_entropy_with_logits(4 * images.mean(1), masks.float())
    return sign + 0.1 * F.mse_loss(images, mask_to_image(masks))


@torch.no_grad()
def evaluate(model, dataset, size, count):
    """Encode and decode the first `count` masks, or all if they are fewer, at size x size.

    Returns (metrics at that size, metrics at the pictures' own sizes, codes used, cells of a contact sheet: up to 24
    of phrase, picture, mask and reconstruction at the picture's own size, {scale: total IoU after it}).
    """
    square, own, cells, device = SegmentationMetrics(), SegmentationMetrics(), [], next(model.parameters()).device
    used, after = torch.zeros(model.config.codebook_size, dtype=torch.bool), {s: 0 for s in model.config.scales}
    for indices in torch.arange(min(count, len(dataset))).split(32):
        examples = [dataset[i] for i in indices.tolist()]
        masks = mask_batch(examples, size, 0, len(examples))
        tokens = model.encode(mask_to_image(masks.to(device)))
        used[tokens.unique().cpu()] = True
        for s, picture in zip(after, model.decode_scales(tokens) if after else ()):
            found = image_to_mask(picture).cpu()
            after[s] += torch.stack([(found & masks).sum(), (found | masks).sum()])
        small = decode_masks(model, tokens, [(size, size)] * len(examples))
        large = decode_masks(model, tokens, [e.mask.shape for e in examples])
        for example, mask, again, again_large in zip(examples, masks.numpy(), small, large):
            square.update(again, mask, id=example.id)
            own.update(again_large, example.mask, id=example.id)
            if len(cells) < 24:
                cells.append((example.phrase, [example.image, example.mask, again_large]))
    after = {s: (intersection / union).item() for s, (intersection, union) in after.items()}
    return square.compute(), own.compute(), int(used.sum()), cells, after


def summary(scores):
    """The numbers of SegmentationMetrics.compute as a phrase; "-" stands for a number that is not defined."""
    total, mean, ahd = ("-" if scores[k] is None else f"{scores[k]:.4f}" for k in ("cIoU", "gIoU", "mAHD@0.5"))
    return f"total IoU {total}, mean IoU {mean}, mAHD@0.5 {ahd} px"


def train(args):
    """Train a mask tokenizer in three phases; any of them can be left out by giving it 0 steps.

    free     no codebook: encoder and decoder learn with a little noise on the latents;
    codes    a codebook from k-means, then VQ training of everything;
    decoder  k-means once more, so that no code is wasted; then encoder and codebook stay and the decoder alone
             goes on. Given --init-from and only this phase, every mask keeps the mask tokens it had.

    A run that is stopped saves its weights and prints the command that goes on.
    """
    from data import hold_out, load_dataset

    torch.manual_seed(0)
    dataset = load_dataset(args.data, "train", args.root)
    if args.data.startswith("jsonl:"):
        (dataset,), val_set = hold_out([dataset])
    else:
        val_set = load_dataset(args.data, "val", args.root)
    model = VQGAN.from_pretrained(args.init_from) if args.init_from else VQGAN(SCENES)
    left = {"free": args.free_steps, "codes": args.steps, "decoder": args.decoder_steps}
    encoder_moved, has_codebook = False, args.free_steps == 0  # the free steps change what the codes stand for
    of_plain = bool(args.scales) and not model.config.scales
    if of_plain:
        model, encoder_moved = MultiScaleVQ.from_plain(model, args.scales), True
    model.to(args.device)
    try:
        with tqdm(total=sum(left.values()), smoothing=0.05) as bar:
            for phase in (phase for phase in left if left[phase]):
                if encoder_moved:
                    learned = bool(args.init_from) and not of_plain or phase == "decoder" and args.steps > 0
                    model.quantize.embedding.weight.data.copy_(fit_codebook(model, dataset, args, learned))
                encoder_moved, has_codebook = phase != "decoder", has_codebook or phase != "free"
                train_phase(model, dataset, val_set, phase, left, args, bar)
    except BaseException:  # Ctrl-C, SIGTERM or an error
        if bar.n == 0:
            print("nothing was saved: no step was done", file=sys.stderr)
            raise
        model.save_pretrained(args.out, torch.float16)
        # the codebook is made after the last free step, so one such step is needed until there is a codebook
        left["free"] = max(left["free"], int(not has_codebook))
        print(f"saved {args.out} after {bar.n:,} of {bar.total:,} steps"
              f"{'' if has_codebook else '; its codebook is not trained yet'}\nto go on, with a new warm-up: the same "
              f"command with --init-from {args.out} --start {args.start} --free-steps {left['free']} "
              f"--steps {left['codes']} --decoder-steps {left['decoder']}", file=sys.stderr)
        raise


def train_phase(model, dataset, val_set, phase, left, args, bar):
    """One phase of `train`; saves and evaluates as it goes. Counts left[phase] down, and args.start up to the masks
    of the next phase or of a command that goes on."""
    bar.set_description(f"mask tokenizer, {phase}")
    learning = [model.decoder, model.post_quant_conv]
    if phase != "decoder":
        learning = [*learning, model.quantize] if model.config.scales else [model]
    model.requires_grad_(False)
    parameters = [p.requires_grad_(True) for module in learning for p in module.parameters()]
    # Muon takes matrices: a filter bank (out, in, 3, 3) is one of (out, in*9). The views share the weights' memory.
    banks = [p for p in parameters if p.dim() == 4]
    views = [nn.Parameter(p.data.flatten(1)) for p in banks]
    others = [p for p in parameters if p.dim() != 4]
    optimizers = (torch.optim.Muon(views, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
                  torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0))
    position, steps = args.start, left[phase]
    for step in range(steps):
        fraction = step / steps
        # Crops about the object, where there is something to learn; whole masks in the last third, with a codebook.
        uncropped = bool(model.config.scales) or phase != "free" and fraction > 2 / 3
        count = args.batch_size if uncropped else args.batch_size * 2
        masks = mask_batch(dataset, args.size, position, count)
        position += count
        masks = (masks if uncropped else crop_masks(masks, args.size // 2)).to(args.device)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bfloat16):
            decoded, code_loss = model(mask_to_image(masks), 0.05 if phase == "free" else None)
        loss = reconstruction_loss(decoded, masks) + code_loss
        model.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for view, bank in zip(views, banks):
            view.grad = None if bank.grad is None else bank.grad.flatten(1)  # a phi that no scale takes has none
        for optimizer in optimizers:
            for group in optimizer.param_groups:  # short warm-up, flat, then down to 2 %
                group["lr"] = args.lr * min(1, (step + 1) / 50, max(0.02, 2 - 2 * fraction))
            optimizer.step()
        bar.update()
        left[phase] -= 1
        args.start += args.batch_size * 2
        if step % 50 == 0:
            wrong = (image_to_mask(decoded.detach()) ^ masks).sum() / masks.sum()
            bar.set_postfix_str(f"loss {loss.item():.4f} wrong {wrong:.3f} code {code_loss.item():.4f}")
        if (step + 1) % args.save_every == 0 or step + 1 == steps:
            model.save_pretrained(args.out, torch.float16)
            if phase != "free":
                scores, _, used, *_ = evaluate(model, val_set, args.size, 128)
                bar.write(f"step {step + 1}: {summary(scores)}, {used} of {model.config.codebook_size} codes used")


@torch.no_grad()
def fit_codebook(model, dataset, args, learned):
    """Codes 0 and 1 stay (VQGAN.flat_loss); the others are k-means of the other latents of --fit-masks masks, from the
    codes there are if those are `learned`. Of MultiScaleVQ code 0 is the zero vector, for where nothing is left to say,
    and the others are k-means of what is left for all scales."""
    rows = []
    for start in range(0, args.fit_masks, 20):
        masks = mask_batch(dataset, args.size, len(dataset) // 2 + start, 20).to(args.device)
        z = F.normalize(model.latents(mask_to_image(masks)), dim=1)
        parts = model.quantize.rests(z, quantized=learned) if model.config.scales else [z]
        rows += [part.permute(0, 2, 3, 1).flatten(0, 2).cpu() for part in parts]
    rows, codebook = torch.cat(rows), model.quantize.codebook.cpu()
    if model.config.scales:
        others = k_means(rows[rows.norm(dim=-1) > 0.02], len(codebook) - 1, codebook[1:] if learned else None, False)
        return torch.cat([torch.zeros_like(codebook[:1]), others])
    plain, others = codebook[:2], codebook[2:]
    edges = rows[(rows @ plain.T).max(-1).values < 0.99]
    return torch.cat([plain, k_means(edges, len(others), start=others if learned else None)])


def text_sentences():
    """What the small vocabulary is made from: phrases of rich scenes, bare and as instructions."""
    from data import TEMPLATES, instruct, load_dataset

    dataset = load_dataset("scenes-rich", "train", phrases=12)
    riddles = [text for texts in (SHAPE_RIDDLES | COLOR_RIDDLES).values() for text in texts] * 40
    for i, phrase in enumerate(chain((dataset[i].phrase for i in range(18_000)), riddles)):
        yield phrase
        yield instruct(phrase, TEMPLATES[i % len(TEMPLATES)])


def report(args):
    """Print total IoU, mAHD and codebook use on held-out masks, and draw masks and reconstructions.

    At the tokenizer's own square size, and through it to the pictures' own sizes, as a model's masks are scored.
    """
    from data import contact_sheet, load_dataset

    model, dataset = VQGAN.from_pretrained(args.mask_tokenizer), load_dataset(args.data, args.split, args.root)
    square, own, used, cells, after = evaluate(model, dataset, args.size, args.count)
    print(f"{args.data}:{args.split}, {square['count']} masks, {used} of {model.config.codebook_size} codes used\n"
          f"at {args.size} x {args.size} px: {summary(square)}\nat the pictures' own sizes: {summary(own)}")
    if after:
        print("total IoU after each scale:", ", ".join(f"{s} x {s} {value:.4f}" for s, value in after.items()))
    contact_sheet(cells, args.out, headings=("picture", "mask", "reconstruction"))
    write_json(args.out.with_suffix(".json"), {"data": args.data, "split": args.split, "size": args.size,
                                               "codes_used": used, "square": square, "own_size": own,
                                               "total IoU after each scale": after})
    print(f"wrote {args.out} and {args.out.with_suffix('.json')}")


@torch.no_grad()
def encode(args):
    """Cache the mask tokens of a data set: OUT.npy, a uint16 array (examples, tokens), and OUT.json that says of what.

    `python train.py --mask-tokens OUT.npy` then never runs the VQGAN encoder.
    """
    from data import load_mixture

    model = VQGAN.from_pretrained(args.mask_tokenizer).to(args.device)
    dataset = load_mixture(args.data, "train", args.root)
    count = len(dataset)
    length = sum(s * s for s in model.config.scales) or (args.size // model.config.downsample) ** 2
    with whole(args.out) as temporary, open(temporary, "wb") as file:  # a memory map would end in SIGBUS on a full disk
        np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (count, length)})
        for start in tqdm(range(0, count, args.batch_size), desc="encode"):
            masks = mask_batch(dataset, args.size, start, min(args.batch_size, count - start), args.padded)
            tokens = model.encode(mask_to_image(masks.to(args.device)))
            file.write(tokens.cpu().numpy().astype("<u2").tobytes())
    write_json(args.out.with_suffix(".json"), {
        "data": args.data, "split": "train", "files": dataset.file_hashes(), "count": count,
        "size": args.size, "padded": args.padded, "mask_tokenizer": model.source})
    print(f"wrote {args.out}: {count:,} examples x {length} mask tokens, and {args.out.with_suffix('.json')}")


def read_tokens(path, shape, source, **expected):
    """The memory-mapped array (examples, tokens) of `encode`; ValueError unless it is of what is expected. shape: of
    the array; source: the mask tokenizer's; expected: data, split, files, size and padded of the JSON."""
    expected |= {"dtype": np.uint16, "shape": shape, "mask tokenizer": source["sha256"]}
    with reading(path, "what python tokenizer.py encode writes"):
        table, found = np.load(path, mmap_mode="r"), json.loads(path.with_suffix(".json").read_text())
        found |= {"dtype": table.dtype, "shape": table.shape, "mask tokenizer": found["mask_tokenizer"]["sha256"]}
        other = [f"{what} {found[what]}, expected {wants}" for what, wants in expected.items() if found[what] != wants]
    if other:
        raise ValueError(f"{path}: was made with {'; '.join(other)}: encode again")
    return table


def text(args):
    """Train the small SentencePiece vocabulary on the phrases of scenes; special ids as Gemma's."""
    with whole(args.out) as temporary, open(temporary, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(sentence.lower() for sentence in text_sentences()), model_writer=file,
            vocab_size=768, model_type="bpe", pad_id=0, eos_id=1, bos_id=2, unk_id=3, minloglevel=2,
            required_chars="abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()-/")
    print(f"wrote {args.out}")


def parse_args(argv=None):
    """The flags of the sub-commands."""
    from model import pick_device

    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    jobs = {"train": (train, "mask_tokenizer.safetensors"), "eval": (report, "mask_tokenizer_eval.png"),
            "encode": (encode, "mask_tokens.npy"), "text": (text, "text.model")}
    for name, (job, out) in jobs.items():
        command = commands.add_parser(name, description=job.__doc__)
        command.set_defaults(job=job)
        command.add_argument("--out", type=Path, default=Path(out), help=f"file to write (default: {out})")

    add = commands.choices["train"].add_argument
    add("--init-from", type=Path, metavar="FILE", help="go on from these weights and their codebook")
    add("--scales", type=scales, metavar="S,S,...", help="make a multi-scale tokenizer of the plain one of "
        "--init-from: 1,2,3,4,6,8 for 128 px; the encoder stays, so it takes no --free-steps")
    add("--free-steps", type=int, default=6000, help="steps without a codebook (default: 6000)")
    add("--steps", type=int, default=6000, help="steps of VQ training (default: 6000)")
    add("--decoder-steps", type=int, default=3000, help="steps of the decoder alone (default: 3000)")
    add("--batch-size", type=int, default=8, help="whole masks per step, or twice as many crops (default: 8)")
    add("--lr", type=float, default=2e-3, help="peak learning rate (default: 2e-3)")
    add("--fit-masks", type=int, default=2600, help="masks for each k-means (default: 2600)")
    add("--bfloat16", action="store_true", help="train in bfloat16: twice as fast where the hardware has it")
    add("--start", type=int, default=0, help="first training mask, to go on with new ones")
    add("--save-every", type=int, default=400, help="steps between saves and evaluations (default: 400)")

    add = commands.choices["eval"].add_argument
    add("--split", default="test", help="default: test")
    add("--count", type=int, default=2000, help="masks (default: 2000)")

    add = commands.choices["encode"].add_argument
    add("--padded", action="store_true", help="keep the pictures' aspect ratio, as --preset llamaseg-janus does")
    add("--batch-size", type=int, default=32, help="default: 32")

    for name in ("train", "eval", "encode"):
        add = commands.choices[name].add_argument
        add("--data", default="scenes", help="data set as for train.py; for `encode` also several (default: scenes)")
        add("--root", type=Path, help="folder in which the official archives were unpacked")
        add("--size", type=int, default=128, help="side of the masks in pixels (default: 128; llamaseg-*: 256)")
        if name != "eval":
            add("--device", type=pick_device, default="cuda" if torch.cuda.is_available() else "cpu",
                help="cpu, cuda, cuda:N or mps (default: cuda, else cpu)")
        if name != "train":
            add("--mask-tokenizer", type=Path, default=ASSETS / "mask_tokenizer.safetensors", metavar="FILE",
                help="default: the embedded one")
    args = parser.parse_args(argv)
    check_args(commands.choices[args.command], args)
    return parser, args


def scales(text):
    """ "1,2,4" -> (1, 2, 4); ValueError unless they grow."""
    found = tuple(map(int, text.split(",")))
    if not 0 < found[0] or any(a >= b for a, b in zip(found, found[1:])):
        raise ValueError
    return found


def check_args(parser, args):
    """Error for values that a sub-command cannot use, and for an output that would overwrite another's file."""
    least = dict.fromkeys(("size", "batch_size", "fit_masks", "save_every", "count"), 1)
    least |= dict.fromkeys(("free_steps", "steps", "decoder_steps", "start"), 0) | {"lr": 1e-12}
    for name, minimum in least.items():
        if not getattr(args, name, minimum) >= minimum:  # NaN is not
            parser.error(f"--{name.replace('_', '-')} {getattr(args, name)} must be at least {minimum}")
    if not args.out.parent.is_dir():
        parser.error(f"--out {args.out}: there is no folder {args.out.parent}")
    ending = parser.get_default("out").suffix
    if args.out.suffix != ending:
        parser.error(f"--out {args.out}: the file's name must end in {ending}")
    if args.command == "train" and args.out.exists() and not (
            args.init_from and args.init_from.exists() and args.out.samefile(args.init_from)):
        parser.error(f"--out {args.out}: there is such a file already: give another name, or it as --init-from too")
    if args.command == "train" and args.scales:
        if not args.init_from or args.free_steps:
            parser.error("--scales needs --init-from FILE and --free-steps 0")
        if args.size != 16 * args.scales[-1]:
            parser.error(f"--scales {args.scales}: the last one is {args.size // 16} for masks of {args.size} px")
    if args.command == "eval" and args.data.startswith("jsonl:"):
        parser.check_read(args, f"--data {args.data}", vars(args).keys() - {"split"})
    if args.command == "encode" and args.out.with_suffix(".json").exists() and not args.out.exists():
        parser.error(f"--out {args.out}: the .json beside it is there already and not from this command")


def main(argv=None):
    """Run a sub-command; returns the exit code: 0, 1 for bad data, 2 for bad usage, 130 after Ctrl-C."""
    parser, args = parse_args(argv)
    return parser.run(args.job, args, stopped="stopped" if args.command == "train" else "stopped: nothing was written")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: temporary files go and `train` saves
    sys.exit(main())
