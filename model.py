"""LlamaSeg: text-prompted segmentation as next-token prediction of mask tokens.

A SigLIP pair turns the phrase and the picture into text tokens and image tokens, two adaptors bring them to
the width of a LLaMA, and the LLaMA writes the mask tokens in raster order:

    [text tokens] <BOI> [image tokens] <BOM> [mask tokens]

Shapes used below:
    B batch, L text tokens, N image tokens, M mask tokens (mask_grid squared), T = L+1+N+1+M the sequence,
    D width (of the network at hand), S side of the picture in pixels, P side of a patch in pixels,
    K codebook size, nh heads, nkv key/value heads, hd width of a head.

mllm.py does the same with pretrained MLLMs; MaskWriter is what all have in common: training and decoding.

Read in this order: SigLIP, Llama and its KVCache, MaskWriter, LlamaSeg, then the helpers: device, dtype.
"""

import math
import sys
import time
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from weights import (
    WEIGHTS,
    build_from,
    check_config,
    check_source,
    compare_weights,
    fingerprint,
    read_config,
    read_own,
    read_weights,
    write_weights,
)

# ------------------------------------------------------------------------------
# attention


def attention(q, k, v, causal):
    """softmax(q k^T / sqrt(hd)) v over (B,nh,T,hd), each token seeing itself and all before if `causal`.

    PyTorch's fused kernel, except for training in bfloat16 on a CPU: there its backward pass is slower than these lines
    at the lengths of the small preset (154 tokens).
    """
    by_hand = q.device.type == "cpu" and q.requires_grad and q.dtype == torch.bfloat16 and q.shape[2] <= 256
    if not by_hand or k.shape[1] != q.shape[1]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5  # (B,nh,T,T)
    if causal:
        T = q.shape[2]
        later = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1).type_as(v) @ v


# ------------------------------------------------------------------------------
# shapes


def check_numbers(config):
    """ValueError unless the fields of a config hold what their types say: integers and floats are positive.

    No integer may be above 2^20, so that the size of a tensor, a product of three at most, fits 63 bits.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        if f.type in (int, int | None) and (type(value) is not int or not 0 < value <= 2**20):
            raise ValueError(f"{f.name} is {value!r:.100}, expected an integer from 1 to 2^20")
        if f.type is bool and type(value) is not bool:
            raise ValueError(f"{f.name} is {value!r:.100}, expected true or false")
        if f.type is float and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise ValueError(f"{f.name} is {value!r}, expected a positive number")
        if f.name.endswith("layers") and value > 1000:
            raise ValueError(f"{f.name} is {value}, expected at most 1000")


# ------------------------------------------------------------------------------
# SigLIP: the picture encoder and the phrase encoder


@dataclass
class SigLIPConfig:
    """Shape of both towers; the defaults are those of SigLIP base, as its class in Hugging Face has them."""

    image_size: int = 256  # S, pixels
    patch_size: int = 16  # P, pixels
    vision_width: int = 768
    vision_layers: int = 12
    vision_heads: int = 12
    vision_mlp: int = 3072
    vocab_size: int = 32000
    text_length: int = 64  # L: every phrase is padded to this many tokens
    text_width: int = 768
    text_layers: int = 12
    text_heads: int = 12
    text_mlp: int = 3072
    norm_eps: float = 1e-6
    gelu: str = "tanh"  # PyTorch's name of the form: tanh, or none for the exact one, as in Janus

    def __post_init__(self):
        check_numbers(self)
        if self.gelu not in ("tanh", "none"):
            raise ValueError(f"gelu is {self.gelu!r}, expected tanh or none")
        for tower in ("vision", "text"):
            width, heads = getattr(self, f"{tower}_width"), getattr(self, f"{tower}_heads")
            if width % heads:
                raise ValueError(f"{tower}_width {width} is no multiple of {tower}_heads {heads}")

    @property
    def image_tokens(self):
        """N; a rest that fills no patch is left out, as in so400m-patch14-384."""
        return (self.image_size // self.patch_size) ** 2


def _siglip2(size, image_size):
    """One of the released fixed-resolution SigLIP 2 models; both towers have the same shape."""
    width, layers, heads, mlp = {"base": (768, 12, 12, 3072), "large": (1024, 24, 16, 4096),
                                 "so400m": (1152, 27, 16, 4304)}[size]
    return SigLIPConfig(image_size=image_size, vision_width=width, vision_layers=layers, vision_heads=heads,
                        vision_mlp=mlp, vocab_size=256000, text_width=width, text_layers=layers, text_heads=heads,
                        text_mlp=mlp)


# by the names that `python weights.py download` knows
SIGLIP2 = {f"siglip2-{size}-patch16-{image_size}": _siglip2(size, image_size)
           for size in ("base", "large", "so400m") for image_size in (256, 384)}


class SigLIPAttention(nn.Module):
    """Every token looks at every token, padding included, as in SigLIP's training: there is no mask."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x):
        B, T, D = x.shape
        split = (B, T, self.heads, D // self.heads)
        q = self.q_proj(x).view(split).transpose(1, 2)  # (B,nh,T,hd)
        k = self.k_proj(x).view(split).transpose(1, 2)
        v = self.v_proj(x).view(split).transpose(1, 2)
        y = attention(q, k, v, causal=False)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, D))


class SigLIPMLP(nn.Module):
    """Two layers with GELU between them."""

    def __init__(self, width, hidden, gelu):
        super().__init__()
        self.gelu = gelu
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.gelu))


class SigLIPBlock(nn.Module):
    """Pre-norm transformer block; pictures and phrases use the same one."""

    def __init__(self, width, heads, mlp, norm_eps, gelu):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.self_attn = SigLIPAttention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = SigLIPMLP(width, mlp, gelu)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SigLIP(nn.Module):
    """The two encoders of SigLIP (Zhai et al. 2023) and of fixed-resolution SigLIP 2, with the parameter
    names of Hugging Face. Their pooling heads are absent: LlamaSeg reads the last hidden states.

    vision, text: build only one of the towers. `source` tells where the weights are from, see from_pretrained.
    """

    def __init__(self, config: SigLIPConfig, vision=True, text=True):
        super().__init__()
        self.config = config
        self.source = None
        self.vision_model = self._vision_tower(config) if vision else None
        self.text_model = self._text_tower(config) if text else None

    @staticmethod
    def _vision_tower(c):
        blocks = (SigLIPBlock(c.vision_width, c.vision_heads, c.vision_mlp, c.norm_eps, c.gelu)
                  for _ in range(c.vision_layers))
        return nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                # only holds the official (D,3,P,P) weight; encode_image says why it is not called
                "patch_embedding": nn.Conv2d(3, c.vision_width, c.patch_size, stride=c.patch_size),
                "position_embedding": nn.Embedding(c.image_tokens, c.vision_width),
            }),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(blocks)}),
            "post_layernorm": nn.LayerNorm(c.vision_width, eps=c.norm_eps),
        })

    @staticmethod
    def _text_tower(c):
        blocks = (SigLIPBlock(c.text_width, c.text_heads, c.text_mlp, c.norm_eps, c.gelu)
                  for _ in range(c.text_layers))
        return nn.ModuleDict({
            "embeddings": nn.ModuleDict({
                "token_embedding": nn.Embedding(c.vocab_size, c.text_width),
                "position_embedding": nn.Embedding(c.text_length, c.text_width),
            }),
            "encoder": nn.ModuleDict({"layers": nn.ModuleList(blocks)}),
            "final_layer_norm": nn.LayerNorm(c.text_width, eps=c.norm_eps),
        })

    def encode_image(self, pixels):
        """pixels (B,3,S,S) float in [-1,1] -> image tokens (B,N,D), raster order, after the final norm.

        ValueError if the picture is not of the size in the config.
        """
        if self.vision_model is None:
            raise ValueError("this SigLIP was loaded without its vision tower")
        S, P = self.config.image_size, self.config.patch_size
        if pixels.dim() != 4 or pixels.shape[1:] != (3, S, S):
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}, want (B, 3, {S}, {S})")
        model = self.vision_model
        patch = model.embeddings.patch_embedding
        # A convolution whose stride is its size is a matrix product over patches, much faster so on a CPU.
        side = S // P * P
        x = pixels[:, :, :side, :side].to(patch.weight.dtype).reshape(-1, 3, S // P, P, S // P, P)
        x = x.permute(0, 2, 4, 1, 3, 5).reshape(pixels.shape[0], -1, 3 * P * P)  # (B,N,3*P*P)
        x = F.linear(x, patch.weight.flatten(1), patch.bias)  # (B,N,D)
        x = x + model.embeddings.position_embedding.weight
        for layer in model.encoder.layers:
            x = layer(x)
        return model.post_layernorm(x)

    def encode_text(self, text_ids):
        """text_ids (B,L) int64 in [0, vocab_size), padded to L -> text tokens (B,L,D) after the final norm.

        ValueError if L or an index does not fit the config.
        """
        if self.text_model is None:
            raise ValueError("this SigLIP was loaded without its text tower")
        c = self.config
        if text_ids.dim() != 2 or text_ids.shape[1] != c.text_length:
            raise ValueError(f"text_ids have shape {tuple(text_ids.shape)}, want (B, {c.text_length})")
        check_indices("text_ids", text_ids, c.vocab_size)
        model = self.text_model
        x = model.embeddings.token_embedding(text_ids) + model.embeddings.position_embedding.weight  # (B,L,D)
        for layer in model.encoder.layers:
            x = layer(x)
        return model.final_layer_norm(x)

    @classmethod
    def from_pretrained(cls, directory, vision=True, text=True, dtype=torch.float32):
        """Load a Hugging Face directory (config.json, model.safetensors, sharded or not), strictly, in eval mode.

        SigLIP and fixed-resolution SigLIP 2, or one tower saved alone. vision, text: a tower that is not asked for
        is not read. `source` then holds {"name", "sha256"} of what was read. FileNotFoundError, or ValueError with
        one line that names file, tensor, expected and found.
        """
        directory, asked = Path(directory), {"vision": vision, "text": text}
        config = siglip_config(directory)
        # a tower that was saved alone: older files have its name before each tensor, newer ones leave it out
        kind = read_config(directory)["model_type"]
        alone = "" if kind == "siglip" else f"{kind.removeprefix('siglip_')}."

        def full(name):
            return name if name.startswith(alone) else alone + name

        def wanted(name):
            name = full(name)
            tower = name.split("_model.")[0]
            # pooling heads and the contrastive scale: no output that we use depends on them
            dropped = name.startswith((f"{tower}_model.head.", "logit_scale", "logit_bias"))
            return not dropped and not name.endswith(".position_ids") and asked.get(tower, True)

        weights = {full(name): w for name, w in read_weights(directory, wanted).items()}
        for tower in asked:
            if asked[tower] and not any(name.startswith(f"{tower}_model.") for name in weights):
                raise ValueError(f"{directory}: has no {tower} tower (no tensor {tower}_model.*)")
        model = build_from(lambda: cls(config, vision, text), weights, directory, dtype)
        model.source = {"name": directory.absolute().name, "sha256": fingerprint(weights)}
        return model


# our field: (field of Hugging Face's config.json, what its class takes where that is left out)
SIGLIP_FIELDS = {
    "vision": {
        "image_size": ("image_size", 224), "patch_size": ("patch_size", 16), "vision_width": ("hidden_size", 768),
        "vision_layers": ("num_hidden_layers", 12), "vision_heads": ("num_attention_heads", 12),
        "vision_mlp": ("intermediate_size", 3072),
    },
    "text": {
        "vocab_size": ("vocab_size", 32000), "text_length": ("max_position_embeddings", 64),
        "text_width": ("hidden_size", 768), "text_layers": ("num_hidden_layers", 12),
        "text_heads": ("num_attention_heads", 12), "text_mlp": ("intermediate_size", 3072),
    },
}


def siglip_config(directory):
    """SigLIPConfig of a Hugging Face directory; ValueError if it is of another kind, NaFlex for one."""
    hf, path = read_config(directory), directory / "config.json"
    kind = hf.get("model_type")
    if kind not in ("siglip", "siglip_vision_model", "siglip_text_model"):
        raise ValueError(f"{path}: model_type is {kind!r}, expected siglip, which SigLIP and fixed-resolution SigLIP 2 "
                         "have (NaFlex is not supported)")
    towers = {"vision": hf if kind == "siglip_vision_model" else hf.get("vision_config") or {},
              "text": hf if kind == "siglip_text_model" else hf.get("text_config") or {}}
    fields = {}
    for tower, values in towers.items():
        if not isinstance(values, dict):
            raise ValueError(f"{path}: {tower}_config is {values!r}, expected an object")
        check_config(path, values, {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_channels": 3})
        for name, (official, default) in SIGLIP_FIELDS[tower].items():
            fields[name] = values.get(official, default)
    try:
        return SigLIPConfig(**fields)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------
# Llama: the decoder


@dataclass
class LlamaConfig:
    """Shape of the transformer; kv_heads below heads means grouped key and value heads."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    kv_heads: int | None = None  # None: as many as heads
    head_dim: int | None = None  # None: width // heads
    mlp: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6

    def __post_init__(self):
        self.kv_heads = self.kv_heads or self.heads
        self.head_dim = self.head_dim or (self.width // self.heads if self.heads else 0)
        check_numbers(self)
        if self.heads % self.kv_heads:
            raise ValueError(f"heads {self.heads} is no multiple of kv_heads {self.kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, but rotary positions turn pairs")


class KVCache:
    """Keys and values of the tokens seen so far. The caller makes it, passes it to Llama and owns it.

    It is allocated once for `length` tokens and written in place. `position`, the number of tokens seen, is
    a Python int: each pass adds a length that the host knows from a shape, so no `.item()`, which would make
    the host wait for the device, is ever needed. To take tokens back, lower it: they are overwritten.
    """

    def __init__(self, config: LlamaConfig, batch, length, device=None, dtype=torch.float32):
        shape = (config.layers, batch, config.kv_heads, length, config.head_dim)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.rope = rope_tables(torch.arange(length, device=device), config.head_dim, config.rope_theta)
        self.padding = None  # (B,) tokens at the left of each row that nobody looks at, or None
        self.position = 0
        self.config = config

    def update(self, layer, k, v):
        """Write k, v (B,nkv,T,hd) of a layer at `position`; return all valid ones, (B,nkv,position+T,hd)."""
        end = self.position + k.shape[2]
        self.keys[layer, :, :, self.position:end] = k
        self.values[layer, :, :, self.position:end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def update_rows(self, layer, k, v, positions):
        """Write k, v (B,nkv,T,hd), B the first rows, at positions (B,T), each row's own; return what there is before
        the position, (B,nkv,position,hd): the caller has put that behind all of them."""
        B, end = len(positions), self.position
        rows = torch.arange(B, device=positions.device)[:, None]
        self.keys[layer][rows, :, positions] = k.transpose(1, 2).to(self.keys.dtype)
        self.values[layer][rows, :, positions] = v.transpose(1, 2).to(self.keys.dtype)
        return self.keys[layer, :B, :, :end], self.values[layer, :B, :, :end]

    def move(self, source, target):
        """Copy one row over another."""
        for x in (self.keys, self.values):
            x[:, target, :, :self.position] = x[:, source, :, :self.position]
        if self.padding is not None:
            self.padding[target] = self.padding[source]

    def repeat(self, n):
        """A new cache in which every row stands n times in a row (the beams of one example)."""
        _, B, _, length, _ = self.keys.shape
        new = KVCache(self.config, B * n, length, self.keys.device, self.keys.dtype)
        new.keys[:, :, :, :self.position] = self.keys[:, :, :, :self.position].repeat_interleave(n, dim=1)
        new.values[:, :, :, :self.position] = self.values[:, :, :, :self.position].repeat_interleave(n, dim=1)
        new.padding = None if self.padding is None else self.padding.repeat_interleave(n)
        new.position = self.position
        return new

    def reorder(self, rows, start):
        """Row i continues row rows[i], rows (B,) int64; tokens before `start` must be common to both."""
        for x in (self.keys, self.values):
            x[:, :, :, start:self.position] = x[:, rows, :, start:self.position]


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019, computed in float32 whatever comes in."""

    def __init__(self, width, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).type_as(x)


def rope_tables(positions, head_dim, theta):
    """positions (T,) -> cos and sin (T,hd) in float32 for `rotate`. Su et al. 2021."""
    powers = torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim
    angles = positions.float()[:, None] * theta**-powers  # (T,hd/2)
    angles = torch.cat([angles, angles], dim=-1)  # (T,hd)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn the pairs (x[i], x[i + hd/2]) of x (B,nh,T,hd): split halves, not interleaved, as in HF Llama."""
    a, b = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-b, a], dim=-1) * sin).type_as(x)


@dataclass
class Place:
    """Where the tokens of a pass stand, worked out once for all layers."""

    cos: torch.Tensor  # (T,hd) or (B,1,T,hd)
    sin: torch.Tensor
    cache: KVCache | None = None
    positions: torch.Tensor | None = None  # (B,T), where each row has its own
    visible: torch.Tensor | None = None  # bool, broadcast to (B,nh,T,all tokens); None: causal, or all


def decoding_layout(weight):
    """A matrix (out,in), by columns where a product with one vector reads it a fifth faster so: float32 on a CPU."""
    by_columns = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.shape[0] >= weight.shape[1]
    return weight.t().contiguous().t() if by_columns else weight


class Fused:
    """Several linear layers of one input as one product, for decoding, where each product is a walk through memory.

    `lay` puts their weights behind each other; the layers' own parameters become views of that, so nothing is there
    twice, names stay, and in-place changes reach both. Whatever gives one of the layers other memory (`to` another
    device or dtype, merging or unmerging LoRA) ends it, and the layers are asked one by one again.
    """

    def __init__(self, *layers):
        self.layers, self.weight, self.places = layers, None, []

    def lay(self):
        self.weight = decoding_layout(torch.cat([layer.weight.data for layer in self.layers]))
        for layer, part in zip(self.layers, self.weight.split([layer.out_features for layer in self.layers])):
            layer.weight.data = part
        self.places = [layer.weight.data_ptr() for layer in self.layers]

    def __call__(self, x):
        """x (B,T,D) -> the output of each layer."""
        if self.weight is None or self.places != [layer.weight.data_ptr() for layer in self.layers]:
            return [layer(x) for layer in self.layers]
        return F.linear(x, self.weight).split([layer.out_features for layer in self.layers], dim=-1)


class LlamaAttention(nn.Module):
    """Causal self-attention with rotary positions, with or without a KV cache."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.q_proj = nn.Linear(config.width, config.heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * config.head_dim, bias=False)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.qkv = Fused(self.q_proj, self.k_proj, self.v_proj)

    def queries_keys_values(self, x, place):
        """x (B,T,D) -> rotated q (B,nh,T,hd) and k (B,nkv,T,hd), and v (B,nkv,T,hd)."""
        q, k, v = (y.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for y in self.qkv(x))
        return rotate(q, place.cos, place.sin), rotate(k, place.cos, place.sin), v

    def forward(self, x, layer, place):
        B, T, _ = x.shape
        c, cache = self.config, place.cache
        q, k, v = self.queries_keys_values(x, place)
        if place.positions is not None:
            k, v = cache.update_rows(layer, k, v, place.positions)
        elif cache is not None:
            k, v = cache.update(layer, k, v)
        q = q.to(k.dtype)  # a cache may be in float32 beside weights in bfloat16
        if place.visible is None and (cache is None or cache.position == 0):
            y = attention(q, k, v, causal=True)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=place.visible, enable_gqa=c.kv_heads != c.heads)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1).to(x.dtype))


class LlamaMLP(nn.Module):
    """SwiGLU, Shazeer 2020."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp, bias=False)
        self.down_proj = nn.Linear(config.mlp, config.width, bias=False)
        self.gate_up = Fused(self.gate_proj, self.up_proj)

    def forward(self, x):
        gate, up = self.gate_up(x)
        return self.down_proj(F.silu(gate) * up)


class LlamaBlock(nn.Module):
    """Attention, then the MLP, each on normalised input and added to the stream (pre-norm)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x, layer, place):
        x = x + self.self_attn(self.input_layernorm(x), layer, place)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The transformer of LLaMA (Touvron et al. 2023) from embeddings to the final norm, with the parameter
    names that Hugging Face has below `model.`. Token embedding and output head belong to the caller.

    recompute: in training keep only the input of each layer and run the layer again in the backward pass
    (activation checkpointing, Chen et al. 2016): a third more arithmetic, a fraction of the memory.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.recompute = False
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, embeddings, cache=None, positions=None, padding=None):
        """embeddings (B,T,D) -> hidden states (B,T,D) after the final norm; each sees itself and all before.

        With a cache the T embeddings continue the `cache.position` tokens it holds, and join them. With positions
        (B,T) as well, each row continues at its own, in the first B rows of the cache, which the caller has told to
        look at more than all of them (`cache.position`). padding (B,): how many tokens at the left of each row are
        none, said once with an empty cache. ValueError if they do not fit.
        """
        place = self.place(embeddings, cache, positions, padding)
        x = embeddings
        for i, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, i, place, use_reentrant=False)
            else:
                x = layer(x, i, place)
        if cache is not None and positions is None:
            cache.position += embeddings.shape[1]
        return self.norm(x)

    def fuse(self):
        """Lay out the weights for decoding, see Fused. Not for a model in training."""
        for layer in self.layers:
            layer.self_attn.qkv.lay()
            layer.mlp.gate_up.lay()
            layer.self_attn.o_proj.weight.data = decoding_layout(layer.self_attn.o_proj.weight.data)

    def place(self, embeddings, cache=None, positions=None, padding=None):
        """The Place of a pass."""
        T, device, start = embeddings.shape[1], embeddings.device, 0 if cache is None else cache.position
        if cache is None:
            tables = rope_tables(torch.arange(T, device=device), self.config.head_dim, self.config.rope_theta)
        else:
            tables = cache.rope
            cache.padding = padding = cache.padding if padding is None else padding
            if positions is None and start + T > cache.keys.shape[3]:
                raise ValueError(f"{start} + {T} tokens do not fit a KV cache of {cache.keys.shape[3]}")
        if positions is not None:
            rows, keys = positions[:, None, :, None], torch.arange(start, device=device)
            cos, sin = (table[positions][:, None] for table in tables)  # (B,1,T,hd)
        else:
            rows, keys = torch.arange(start, start + T, device=device)[:, None], torch.arange(start + T, device=device)
            cos, sin = (table[start:start + T] for table in tables)  # (T,hd)
        visible = None  # all that is there for one new token; causal for the first
        if padding is not None:  # a token that is none sees itself, as it must see something
            visible = (keys <= rows) & (keys >= padding[:len(embeddings), None, None, None]) | (keys == rows)
        elif positions is not None or start and T > 1:
            visible = keys <= rows
        return Place(cos, sin, cache, positions, visible)

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32):
        """Load a Hugging Face `LlamaForCausalLM` or `LlamaModel` directory, strictly, in eval mode.

        The token embedding and the output head are not read. FileNotFoundError, or ValueError with one line that
        names file, tensor, expected and found.
        """
        directory = Path(directory)
        config = llama_config(read_config(directory), directory / "config.json")

        def wanted(name):
            dropped = ("embed_tokens.", "lm_head.")  # the caller's; inv_freq is computed, not learned
            return not name.removeprefix("model.").startswith(dropped) and not name.endswith(".inv_freq")

        weights = {name.removeprefix("model."): w for name, w in read_weights(directory, wanted).items()}
        return build_from(lambda: cls(config), weights, directory, dtype)


def llama_config(hf, path):
    """LlamaConfig of the fields that Hugging Face has in `path`; ValueError if they ask for something else."""
    check_config(path, hf, {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False})
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{path}: rope_scaling is {rope!r}, expected an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{path}: rope_type is {kind!r}, expected 'default'")
    try:
        return LlamaConfig(
            width=hf.get("hidden_size", 4096), layers=hf.get("num_hidden_layers", 32),
            heads=hf.get("num_attention_heads", 32), kv_heads=hf.get("num_key_value_heads"),
            head_dim=hf.get("head_dim"), mlp=hf.get("intermediate_size", 11008),
            rope_theta=hf.get("rope_theta", rope.get("rope_theta", 10000.0)),
            norm_eps=hf.get("rms_norm_eps", 1e-6),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


# ------------------------------------------------------------------------------
# LlamaSeg


@dataclass
class LlamaSegConfig:
    """The whole model's shape. A checkpoint holds `asdict` of it as JSON; LlamaSegConfig(**that) is equal."""

    siglip: SigLIPConfig = field(default_factory=SigLIPConfig)
    llama: LlamaConfig = field(default_factory=LlamaConfig)
    codebook_size: int = 16384  # K, rows of the mask tokenizer's codebook
    mask_grid: int = 16  # h = w tokens, so M = mask_grid**2
    freeze_encoders: bool = True  # no gradient for SigLIP
    hide: bool = False  # trained with hidden mask tokens (LlamaSeg.forward), so it can guess them all at once

    def __post_init__(self):
        if isinstance(self.siglip, dict):
            self.siglip = SigLIPConfig(**self.siglip)
        if isinstance(self.llama, dict):
            self.llama = LlamaConfig(**self.llama)
        if not isinstance(self.siglip, SigLIPConfig) or not isinstance(self.llama, LlamaConfig):
            raise ValueError(f"siglip is {self.siglip!r} and llama is {self.llama!r}, expected a shape of each")
        check_numbers(self)
        if self.mask_grid > self.siglip.image_size:  # no tensor depends on it
            raise ValueError(f"mask_grid is {self.mask_grid}, expected at most image_size {self.siglip.image_size}")

    @property
    def mask_tokens(self):
        """M"""
        return self.mask_grid**2


def _paper(layers, width, heads, image_size):
    """A LlamaSeg of the paper. It gives layers, width, heads and 770M or 1.5B parameters; not stated are the size of
    SigLIP2, for which we use large, and the MLP, for which we use 8/3 of the width, as LLaMA and LlamaGen do."""
    return LlamaSegConfig(
        siglip=SIGLIP2[f"siglip2-large-patch16-{image_size}"],
        llama=LlamaConfig(width=width, layers=layers, heads=heads, mlp=width * 8 // 3, norm_eps=1e-5),
        codebook_size=16384, mask_grid=image_size // 16,
    )


PRESETS = {  # by name; mllm.py has its own
    # Drawn scenes, everything trained from scratch: 10.1 million parameters, 20 MB in float16. A step on 64 phrases
    # of 16 pictures takes about 1.5 s on two CPU cores in bfloat16. LOG.md has the run and the cIoU that it reached.
    "scenes": LlamaSegConfig(
        siglip=SigLIPConfig(
            image_size=128, patch_size=16, vision_width=256, vision_layers=6, vision_heads=4, vision_mlp=768,
            vocab_size=768, text_length=24, text_width=128, text_layers=2, text_heads=2, text_mlp=384,
        ),
        # rope_theta: the sequence has 154 tokens; Llama's 10000 is meant for thousands
        llama=LlamaConfig(width=256, layers=4, heads=4, mlp=704, rope_theta=1000.0),
        codebook_size=4096, mask_grid=8, freeze_encoders=False,
    ),
    # The paper's models, at 256 px with 256 mask tokens and at 384 px with 576. Not trained here: README has the table.
    "llamaseg-b": _paper(layers=16, width=1920, heads=20, image_size=256),
    "llamaseg-l": _paper(layers=22, width=2304, heads=32, image_size=256),
    "llamaseg-b-384": _paper(layers=16, width=1920, heads=20, image_size=384),
    "llamaseg-l-384": _paper(layers=22, width=2304, heads=32, image_size=384),
}

HEAD_PART = 1024  # mask tokens whose logits are in memory at once, with llama.recompute

DECODES = ("greedy", "beam", "top-k", "top-p", "random")
DRAFTS = ("auto", "none", "row", "jacobi", "hidden")


class MaskWriter(nn.Module):
    """What LlamaSeg and JanusSeg have in common: mask tokens after a prefix, in training and in decoding.

    A subclass has config (codebook_size, mask_grid, hide), llama, and
        prefix(text_ids, pixels, text_features=None) -> embeddings (B,T,D) of all before the first mask token
        mask_embedding(tokens (B,T)) -> (B,T,D), and head(hidden (...,D)) -> logits (...,K)
        padding(text_ids) -> (B,) tokens at the left of the prefix that are none, or None
        trained_state() -> the part of its state dict that a checkpoint holds
    """

    def padding(self, text_ids):
        return None

    def load_trained_state(self, weights):
        """Put back what `trained_state` gave; ValueError with the names that do not fit."""
        problems = compare_weights(self.trained_state(), weights)
        if problems:
            raise ValueError(f"weights do not fit the model: {problems}")
        self.load_state_dict(weights, strict=False)  # checked above: only what is frozen is absent

    def fuse(self):
        """Lay out the weights for decoding. Not for a model in training."""
        self.llama.fuse()
        if isinstance(self.head, nn.Linear):  # JanusSeg has two layers there, of another shape
            self.head.weight.data = decoding_layout(self.head.weight.data)

    def forward(self, text_ids, pixels, mask_tokens, hide_tokens=None, background_weight=1.0, text_features=None):
        """Teacher forcing: text_ids (B,L), pixels (b,3,S,S), mask_tokens (B,M) -> logits (B,M,K), loss ().

        logits[:, t] predict mask token t; the loss is their mean cross-entropy, in float32. In training with
        llama.recompute the logits are None: they too are made in parts, and again in the backward pass.
        pixels may have fewer rows than text_ids, and text_features saves the text encoder, see `prefix`.
        hide_tokens: bool (B,M), mask tokens whose input embedding becomes zero, so that picture and phrase
        alone must tell the tokens after them (word dropout, Bowman et al. 2016, "Generating Sentences from
        a Continuous Space"). Paper: does not do this; train.py does it for the small preset.
        background_weight: weight in the loss of targets that are code 0, which is plain background in a mask
        tokenizer trained by this repository. One edge has many codes that look alike and plain background has one,
        so the likeliest single token is background too often; less weight sets that right. Paper: 1.
        ValueError for a wrong shape or index.
        """
        B, M, K = text_ids.shape[0], self.config.mask_tokens, self.config.codebook_size
        if mask_tokens.shape != (B, M):
            raise ValueError(f"mask_tokens have shape {tuple(mask_tokens.shape)}, want ({B}, {M})")
        if hide_tokens is not None and hide_tokens.shape != (B, M):
            raise ValueError(f"hide_tokens have shape {tuple(hide_tokens.shape)}, want ({B}, {M})")
        check_indices("mask_tokens", mask_tokens, K)
        prefix = self.prefix(text_ids, pixels, text_features)
        inputs = self.mask_embedding(mask_tokens[:, :-1])  # (B,M-1,D): the last token predicts nothing
        if hide_tokens is not None:
            inputs = inputs.masked_fill(hide_tokens[:, :-1, None], 0.0)
        sequence = torch.cat([prefix, inputs.to(prefix.dtype)], dim=1)
        hidden = self.llama(sequence, padding=self.padding(text_ids))  # (B,T-1,D)
        hidden, targets = hidden[:, prefix.shape[1] - 1:], mask_tokens.flatten()  # (B,M,D) from <BOM> on, (B*M,)
        if self.llama.recompute and torch.is_grad_enabled():
            parts = zip(hidden.flatten(0, 1).split(HEAD_PART), targets.split(HEAD_PART))
            losses = torch.cat([checkpoint(self.losses, *part, use_reentrant=False)[1] for part in parts])
            logits = None
        else:
            logits, losses = self.losses(hidden.flatten(0, 1), targets)
            logits = logits.view(B, M, K)
        if background_weight != 1.0:
            losses = losses * torch.where(targets == 0, background_weight, 1.0)
        return logits, losses.mean()

    def losses(self, hidden, targets):
        """hidden (n,D), targets (n,) -> logits (n,K), cross-entropy of each (n,) in float32."""
        logits = self.head(hidden)
        return logits, F.cross_entropy(logits.float(), targets, reduction="none")

    @torch.no_grad()
    def generate_naive(self, text_ids, pixels):
        """Greedy decoding without cache, the reference for `generate`: (B,L), (b,3,S,S) -> (B,M) int64."""
        prefix = self.prefix(text_ids, pixels)
        tokens = text_ids[:, :0]
        for _ in range(self.config.mask_tokens):
            hidden = self.llama(torch.cat([prefix, self.mask_embedding(tokens)], dim=1), padding=self.padding(text_ids))
            tokens = torch.cat([tokens, self.head(hidden[:, -1:]).argmax(-1)], dim=1)
        return tokens

    @torch.no_grad()
    def generate(self, text_ids, pixels, decode="greedy", beams=3, top_k=3, top_p=0.9, temperature=1.0,
                 seed=0, draft="auto", window=None, stats=None):
        """text_ids (B,L), pixels (b,3,S,S) -> mask tokens (B,M) int64, one after the other with a KV cache.

        decode: "greedy"; "beam", the best of `beams` sequences kept by summed log-probability; or a draw at
        `temperature` from the `top_k` likeliest tokens ("top-k"), from the fewest that together reach
        probability `top_p` ("top-p"), or from all ("random").
        seed: an int for all masks, or a list with one int per mask. The same seed draws the same tokens for a mask,
        whatever else is in its batch; only rounding, which depends on the batch size, can tip a draw.
        draft: how greedy decoding guesses tokens to verify several in a pass, see `greedy`: "row", "jacobi", "hidden",
        "none" (or None) for one a pass, "auto" for the fastest. window: tokens in a pass, with a draft.
        In float32 the mask does not depend on the draft. In bfloat16 the logits of two tokens are often equal or one
        rounding step apart, and rounding depends on the shape of a pass: 6 to 8 of 200 masks of the default changed.
        stats: a dict to fill: "passes", transformer passes after the prefill; "mask_passes", for each mask the passes
        that it took part in; "prefill_ms", encoders included; "decode_ms".
        ValueError for an unknown decode or draft or a value out of range.
        """
        K, M, device = self.config.codebook_size, self.config.mask_tokens, text_ids.device
        draft = draft or "none"
        for what, value, known in (("decode", decode, DECODES), ("draft", draft, DRAFTS)):
            if value not in known:
                raise ValueError(f"unknown {what} {value!r}, choose from {', '.join(known)}")
        if decode != "greedy" and draft not in ("auto", "none"):
            raise ValueError(f"draft {draft!r} is for greedy decoding, not for {decode!r}")
        if not (1 <= beams <= K and 1 <= top_k <= K):
            raise ValueError(f"beams {beams} and top_k {top_k} must be in 1 .. {K}, the codebook size")
        if not (0 < top_p <= 1 and temperature > 0):
            raise ValueError(f"top_p {top_p} must be in (0, 1], temperature {temperature} above 0")
        if window is not None and window < 1:
            raise ValueError(f"window {window} must be at least 1")
        if window is not None and window > 1 and (decode != "greedy" or draft == "none"):
            raise ValueError(f"window {window} has no use with decode {decode!r} and draft {draft!r}")
        seeds = seed if isinstance(seed, list) else [seed] * len(text_ids)
        if len(seeds) != len(text_ids) or any(type(s) is not int or not 0 <= s < 2**63 for s in seeds):
            raise ValueError(f"seed is {seed!r:.100}, want an int from 0 to 2^63 - 1, or {len(text_ids)} of them")
        start = clock(device)
        prefix = self.prefix(text_ids, pixels)
        B, P = prefix.shape[:2]
        if draft == "auto":  # as measured (LOG.md): guessing all at once makes a longer prefill, which a full CPU feels
            draft = "hidden" if self.config.hide and (device.type == "cuda" or B < 8) else "jacobi"
        window = min(M, window or draft_window(draft, B, device)) if decode == "greedy" else 1
        cache = self.new_cache(prefix, M - 1 + window)
        guesses = None
        if draft == "hidden" and window > 1:  # every mask token hidden: its guess for all of them, in the prefill pass
            hidden = self.llama(torch.cat([prefix, prefix.new_zeros(B, M - 1, prefix.shape[2])], dim=1), cache,
                                padding=self.padding(text_ids))
            guesses = self.head(hidden[:, P - 1:]).argmax(-1)  # (B,M)
            logits = self.head(hidden[:, P - 1]).float()
            cache.position = P
        else:
            logits = self.next_logits(prefix, cache, self.padding(text_ids))  # (B,K)
        prefilled = clock(device)
        mask_passes = [M - 1] * B
        if decode == "beam":
            tokens = self.beam_search(logits, cache, beams)
        elif window > 1:
            tokens, mask_passes = self.greedy(logits, cache, draft, window, guesses)
        else:
            # drawn on the CPU, so that every device gets the same numbers
            uniform = torch.stack([torch.rand(M, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(device)
            tokens = torch.empty(B, M, dtype=torch.long, device=device)
            for t in range(M):
                if t > 0:
                    logits = self.next_logits(self.mask_embedding(tokens[:, t - 1:t]), cache)
                tokens[:, t] = choose(logits, decode, top_k, top_p, temperature, uniform[:, t])
        if stats is not None:
            stats["passes"], stats["mask_passes"] = max(mask_passes), mask_passes
            stats["prefill_ms"] = 1000 * (prefilled - start)
            stats["decode_ms"] = 1000 * (clock(device) - prefilled)
        return tokens

    def greedy(self, logits, cache, draft, window, guesses):
        """Greedy decoding that verifies up to `window` tokens a pass -> mask tokens (B,M), passes of each mask.

        A pass reads the last sure token and guesses after it. Its own choices are right as long as the guesses before
        them were, and one more: those are sure now, and the others are guesses of the next pass. (Stern et al. 2018,
        "Blockwise Parallel Decoding"; Santilli et al. 2023, Jacobi decoding.) Where there is no guess yet, a mask
        resembles its row above: the token there, or the last sure one in the first row.
            row     copies the row above and throws the pass's own later choices away
            jacobi  keeps them
            hidden  starts from `guesses` (B,M), the choices when all mask tokens are hidden
        logits (B,K) of mask token 0; the cache holds the prefix. Each mask is at its own place; done ones leave.
        """
        B, grid, P, device = len(logits), self.config.mask_grid, cache.position, logits.device
        M = grid**2
        tokens = torch.zeros(B, M + window, dtype=torch.long, device=device)  # sure ones, then guesses
        if guesses is not None:
            tokens[:, :M] = guesses
        tokens[:, 0] = logits.argmax(-1)
        sure = torch.ones(B, 1, dtype=torch.long, device=device)  # how many tokens of each mask are sure
        guessed = torch.full_like(sure, M if draft == "hidden" else 1)  # and how many are at least guessed
        places, steps = torch.arange(M + window, device=device), torch.arange(window, device=device)
        masks, passes = list(range(B)), [0] * B  # the mask in each row of the cache
        result = torch.empty(B, M, dtype=torch.long, device=device)
        counts, least, most = [1] * B, 1, 1
        wanted = window
        while masks:
            width = min(wanted, M - least)
            if draft != "hidden":
                self.copy_rows_above(tokens, guessed, places, least, most + width)
            before = sum(counts)
            at = sure + steps[:width]  # (B,width): the places that this pass chooses for
            cache.position = P + most - 1 + width
            hidden = self.llama(self.mask_embedding(tokens.gather(1, at - 1)), cache, P - 1 + at)
            chosen = self.head(hidden).float().argmax(-1)  # (B,width)
            right = (tokens.gather(1, at[:, :-1]) == chosen[:, :-1]).cumprod(1).sum(1, keepdim=True)
            tokens.scatter_(1, at, chosen)
            if draft != "hidden":
                guessed = torch.maximum(guessed, sure + width) if draft == "jacobi" else sure + right + 1
            sure = sure + right + 1
            counts = sure.flatten().tolist()  # the host waits here, once a pass
            gained = (sum(counts) - before) / len(counts)
            wanted = min(window, max(window // 2, math.ceil(2 * gained) + 2))  # less where little was right
            for row in reversed(range(len(masks))):
                passes[masks[row]] += 1
                if counts[row] >= M:  # the last row takes the place of a mask that is done
                    result[masks[row]] = tokens[row, :M]
                    last = len(masks) - 1
                    if row < last:
                        cache.move(last, row)
                        tokens[row], sure[row], guessed[row] = tokens[last], sure[last], guessed[last]
                        masks[row], counts[row] = masks[last], counts[last]
                    masks.pop()
                    counts.pop()
            tokens, sure, guessed = (x[:len(masks)] for x in (tokens, sure, guessed))
            least, most = (min(counts), max(counts)) if masks else (M, M)
        return result, passes

    def copy_rows_above(self, tokens, guessed, places, start, end):
        """Guess the places from `guessed` (B,1) on, of those between start and end: the token of the row above."""
        grid = self.config.mask_grid
        for row in range(start // grid, (end - 1) // grid + 1):
            here = places[row * grid:(row + 1) * grid]
            above = tokens.gather(1, guessed - 1) if row == 0 else tokens[:, here - grid]
            tokens[:, here] = torch.where(here >= guessed, above, tokens[:, here])

    @torch.no_grad()
    def confidence(self, text_ids, pixels, tokens):
        """The probability that the model gives each of the mask tokens (B,M), given those before it: (B,M) float32."""
        logits, _ = self(text_ids, pixels, tokens)
        return logits.float().softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]

    @torch.no_grad()
    def mask_attention(self, text_ids, pixels, tokens):
        """What each mask token (row) looks at among the mask tokens (columns) in the last layer, mean over heads:
        (B,M-1,M-1), for the last mask token is chosen but never read. What a row leaves to 1 went to text and picture.
        The paper's Figure 5.
        """
        prefix = self.prefix(text_ids, pixels)
        x = torch.cat([prefix, self.mask_embedding(tokens[:, :-1])], dim=1)
        place = self.llama.place(x, padding=self.padding(text_ids))
        for i, layer in enumerate(self.llama.layers[:-1]):
            x = layer(x, i, place)
        last, c = self.llama.layers[-1], self.config.llama
        q, k, _ = last.self_attn.queries_keys_values(last.input_layernorm(x), place)
        T, k = q.shape[2], k.repeat_interleave(c.heads // c.kv_heads, dim=1)
        scores = (q @ k.transpose(-1, -2)).float() * c.head_dim**-0.5  # (B,nh,T,T)
        visible = torch.ones(T, T, dtype=torch.bool, device=x.device).tril() if place.visible is None else place.visible
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1).mean(1)  # (B,T,T)
        return weights[:, prefix.shape[1]:, prefix.shape[1]:]

    def new_cache(self, prefix, more):
        """An empty KVCache for the prefix (B,T,D) and `more` tokens after it, in the precision that decodes fastest."""
        B, T, _ = prefix.shape
        autocast = torch.is_autocast_enabled(prefix.device.type)
        dtype = torch.get_autocast_dtype(prefix.device.type) if autocast else prefix.dtype
        if prefix.device.type == "cpu":  # attention to a bfloat16 cache takes a CPU six times as long
            dtype = torch.float32
        return KVCache(self.config.llama, B, T + more, prefix.device, dtype)

    def next_logits(self, embeddings, cache, padding=None):
        """Feed embeddings (B,T,D) and return the logits (B,K) of the token after them, in float32."""
        return self.head(self.llama(embeddings, cache, padding=padding)[:, -1]).float()

    def beam_search(self, logits, cache, beams):
        """logits (B,K) of mask token 0 and the cache of the prefix -> the best mask tokens found, (B,M)."""
        B, K = logits.shape
        M, prefix_length = self.config.mask_tokens, cache.position
        scores, token = logits.log_softmax(-1).topk(beams)  # (B,beams) summed log-probabilities, best first
        tokens = token.view(B * beams, 1)
        cache = cache.repeat(beams)
        first_row = torch.arange(0, B * beams, beams, device=logits.device)[:, None]  # (B,1)
        for _ in range(M - 1):
            logits = self.next_logits(self.mask_embedding(tokens[:, -1:]), cache)  # (B*beams,K)
            total = scores[:, :, None] + logits.log_softmax(-1).view(B, beams, K)
            scores, index = total.flatten(1).topk(beams)  # (B,beams), index into beams*K
            rows = (first_row + index // K).flatten()  # the row that each new beam continues
            cache.reorder(rows, start=prefix_length)
            tokens = torch.cat([tokens[rows], (index % K).view(-1, 1)], dim=1)
        return tokens.view(B, beams, M)[:, 0]


class LlamaSeg(MaskWriter):
    """LlamaSeg: phrase and picture in, mask tokens out.

    encoder: a pretrained SigLIP of the shape config.siglip; None makes one with random weights.
    frozen: {"encoder": {"name", "sha256"}, "mask_tokenizer": ...}, what it was trained with and does not hold.
    """

    def __init__(self, config: LlamaSegConfig, encoder=None):
        super().__init__()
        self.config = config
        known = config.freeze_encoders and encoder is not None and encoder.source
        self.frozen = {"encoder": encoder.source} if known else {}
        D, K, siglip = config.llama.width, config.codebook_size, config.siglip
        if encoder is not None and encoder.config != siglip:
            raise ValueError(f"the encoder has the shape {encoder.config}, the model wants {siglip}")
        self.encoder = SigLIP(siglip) if encoder is None else encoder
        self.text_adaptor = nn.Sequential(nn.Linear(siglip.text_width, D), nn.GELU(), nn.Linear(D, D))
        self.image_adaptor = nn.Sequential(nn.Linear(siglip.vision_width, D), nn.GELU(), nn.Linear(D, D))
        self.boi = nn.Parameter(torch.empty(D))  # <BOI>, begin of image
        self.bom = nn.Parameter(torch.empty(D))  # <BOM>, begin of mask
        self.mask_embedding = nn.Embedding(K, D)
        self.llama = Llama(config.llama)
        self.head = nn.Linear(D, K, bias=False)
        self.init_weights(skip=() if encoder is None else set(encoder.modules()))
        self.encoder.requires_grad_(not config.freeze_encoders)

    @torch.no_grad()
    def init_weights(self, skip=()):
        """N(0, 0.02) everywhere but in the modules to skip, as GPT-2 does; paper: not stated."""
        for module in self.modules():
            if module not in skip and isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
        # A block adds two terms to the residual stream: scaled so that its variance does not grow with depth.
        towers = [self.encoder.vision_model.encoder, self.encoder.text_model.encoder, self.llama]
        for tower in [tower for tower in towers if tower not in skip]:
            for name, weight in tower.named_parameters():
                if name.endswith(("out_proj.weight", "fc2.weight", "o_proj.weight", "down_proj.weight")):
                    nn.init.normal_(weight, std=0.02 / math.sqrt(2 * len(tower.layers)))
        nn.init.normal_(self.boi, std=0.02)
        nn.init.normal_(self.bom, std=0.02)
        nn.init.normal_(self.head.weight, std=self.head_std)

    @property
    def head_std(self):
        """The head reads states of length sqrt(D): logits of std 0.2, so the first loss is ln(K) + 0.02."""
        return 0.2 / math.sqrt(self.config.llama.width)

    @torch.no_grad()
    def init_mask_tokens(self, codebook):
        """Start mask embedding and head from the mask tokenizer's codebook (K,C): its l2-normalised rows go
        through one fixed random projection to the model's width, so that codes that look alike start alike.
        Paper: not stated; this is our choice. ValueError if the codebook has not K rows."""
        K, D = self.mask_embedding.weight.shape
        if codebook.dim() != 2 or codebook.shape[0] != K:
            raise ValueError(f"codebook has shape {tuple(codebook.shape)}, want ({K}, C)")
        generator = torch.Generator().manual_seed(0)  # the same on every rank
        projection = torch.randn(codebook.shape[1], D, generator=generator)
        rows = F.normalize(codebook.detach().float().cpu(), dim=-1) @ projection  # (K,D) of variance 1
        self.mask_embedding.weight.copy_(rows * 0.02)
        self.head.weight.copy_(rows * self.head_std)

    def prefix(self, text_ids, pixels, text_features=None):
        """All that stands before the first mask token: text_ids (B,L), pixels (b,3,S,S) -> (B,L+1+N+1,D).

        B is a multiple of b: each run of B/b phrases shares a picture, which is encoded once. text_features:
        what encoder.encode_text(text_ids) gives, for a caller that has it already.
        """
        B, shared = text_ids.shape[0], phrases_a_picture(text_ids, pixels)
        # no gradient, even if a caller turned requires_grad on again
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_encoders):
            text = self.encoder.encode_text(text_ids) if text_features is None else text_features
            image = self.encoder.encode_image(pixels)
        text, image = text.to(self.boi.dtype), image.to(self.boi.dtype)  # a frozen encoder may be in bfloat16
        text = self.text_adaptor(text)  # (B,L,D)
        image = self.image_adaptor(image).repeat_interleave(shared, dim=0)  # (B,N,D)
        boi, bom = self.boi.expand(B, 1, -1), self.bom.expand(B, 1, -1)
        return torch.cat([text, boi, image, bom], dim=1)

    def trained_state(self):
        """The state dict without a frozen encoder that came from official files: what a checkpoint holds."""
        known = self.config.freeze_encoders and self.encoder.source
        return {name: w for name, w in self.state_dict().items() if not (known and name.startswith("encoder."))}

    def save_pretrained(self, path, dtype=None):
        """Write one .safetensors whose header holds the config: a temporary name first, then renamed.

        A frozen encoder from official files is not written; the header has its name and hash, as it has those of
        the mask tokenizer (`frozen`). dtype: store the weights so (torch.float16 halves the file); None keeps them.
        """
        write_weights(self, path, "llamaseg", dtype)

    @classmethod
    def from_pretrained(cls, path, encoder=None, dtype=torch.float32, any_weights=False):
        """Read a file of `save_pretrained`, on the CPU, in `dtype` whatever it was stored in.

        encoder: directory of the frozen SigLIP, if the file names one; default: its name below WEIGHTS.
        any_weights: take an encoder other than the one of the training.
        FileNotFoundError; ValueError if the file is damaged, of another kind, or does not fit its own config, or if
        the encoder is another one.
        """
        path = Path(path)
        config, frozen, weights = read_own(path, "llamaseg", LlamaSegConfig, dtype)
        siglip = None
        if config.freeze_encoders and "encoder" in frozen:
            siglip = SigLIP.from_pretrained(encoder or WEIGHTS / frozen["encoder"]["name"], dtype=dtype)
            if not any_weights:
                check_source(path, "encoder", frozen, siglip.source)
        elif encoder:
            raise ValueError(f"{path}: holds its own encoder, --encoder {encoder} has no use")
        with torch.device("meta"):  # shapes only: the weights come from the file
            model = cls(config, siglip)
        model.frozen = frozen
        problems = compare_weights(model.trained_state(), weights)
        if problems:
            raise ValueError(f"{path}: weights do not fit the config: {problems}")
        model.load_state_dict(weights, strict=siglip is None, assign=True)
        return model


def phrases_a_picture(text_ids, pixels):
    """text_ids (B,L), pixels (b,...) -> B / b; ValueError if B is no multiple of b."""
    B, b = text_ids.shape[0], pixels.shape[0]
    if b == 0 or B % b:
        raise ValueError(f"text_ids {tuple(text_ids.shape)} and pixels {tuple(pixels.shape)}: "
                         "the number of phrases must be a multiple of the number of pictures")
    return B // b


def draft_window(draft, batch, device):
    """Tokens in a pass that decode fastest, as measured (LOG.md): a CPU pays for each of them, a GPU hardly."""
    most = {"none": 1, "row": 16, "jacobi": 16, "hidden": 64}[draft]
    return most if device.type == "cuda" else min(most, max(8, 96 // batch))


def choose(logits, decode, top_k, top_p, temperature, uniform):
    """One token a row from logits (B,K) float32 -> (B,); see MaskWriter.generate for the ways to choose.

    uniform (B,): numbers in [0, 1). A row draws the first token at which the summed probabilities exceed its number.
    """
    if decode == "greedy":
        return logits.argmax(-1)
    probs = ((logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)).softmax(-1)  # no infinity
    if decode in ("top-k", "top-p"):
        probs, index = probs.sort(dim=-1, descending=True, stable=True)
        if decode == "top-k":
            probs[:, top_k:] = 0
        else:
            before = probs.cumsum(-1) - probs  # what the likelier tokens have together
            probs[:, 1:].masked_fill_(before[:, 1:] >= top_p, 0)
    sums = probs.cumsum(-1)
    chosen = torch.searchsorted(sums, uniform[:, None] * sums[:, -1:], right=True)
    if decode == "random":
        return chosen[:, 0]
    chosen = chosen.clamp(max=(probs > 0).sum(-1, keepdim=True) - 1)  # a GPU may round sums of equal value differently
    return index.gather(1, chosen)[:, 0]


# ------------------------------------------------------------------------------
# helpers: indices, device, dtype


def check_indices(name, ids, size):
    """ValueError if ids are outside [0, size). Looks only where that is free: reading a value from a GPU
    would make the host wait each step, and inside torch.compile it would break the graph; in both places
    the embedding kernel itself stops at a bad index, with a less helpful message."""
    if ids.device.type == "cpu" and not torch.compiler.is_compiling() and ids.numel():
        low, high = ids.min().item(), ids.max().item()
        if low < 0 or high >= size:
            raise ValueError(f"{name} has indices {low} .. {high}, want 0 .. {size - 1}")


def clock(device):
    """Seconds, after everything queued on the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def peak_memory(device):
    """Bytes: of the GPU, as PyTorch's allocator counts them; on a CPU the most that the process has had at once."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pick_device(name="auto"):
    """"auto" (cuda, else mps, else cpu) or a device's name -> torch.device; ValueError if it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}, choose auto, cpu, cuda, cuda:N or mps") from None
    if device.type not in ("cpu", "cuda", "mps") or device.type != "cuda" and device.index:
        raise ValueError(f"unknown device {name!r}, choose auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {name!r} is not there: {torch.cuda.device_count()} CUDA devices found")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"device {name!r} is not there: PyTorch finds no Apple GPU")
    return device


def compute_dtype(device, name="auto"):
    """The dtype for autocast on a device, and why: (torch.bfloat16 or torch.float32, a phrase to print).

    name: "auto", "bfloat16" or "float32". Weights, norms and loss stay in float32 either way.
    """
    if name in ("bfloat16", "float32"):
        return getattr(torch, name), "as asked"
    if name != "auto":
        raise ValueError(f"unknown dtype {name!r}, choose auto, bfloat16 or float32")
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, f"{torch.cuda.get_device_name(device)} multiplies bfloat16 in hardware"
    # PyTorch has no public question for this yet; without the private one, float32 is the safe answer.
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if device.type == "cpu" and any(getattr(torch.cpu, question, bool)() for question in questions):
        return torch.bfloat16, "this CPU multiplies bfloat16 in hardware"
    return torch.float32, f"no fast bfloat16 on this {device.type}"
