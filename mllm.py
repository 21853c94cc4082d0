"""Pretrained MLLMs that write masks: Janus-Pro with LoRA, and ARGenSeg; their chats and text tokenizers.

Shapes as in model.py: B batch, L text tokens, N image tokens, M mask tokens, T tokens of a sequence, D width,
S side of the picture, K codebook size, r rank of LoRA; n tiles of a picture.
"""

import hashlib
import json
import math
import re
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import sentencepiece
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from model import (
    UNSEEN, KVCache, Llama, LlamaConfig, MaskWriter, SigLIP, SigLIPBlock, SigLIPConfig, check_fields, llama_config,
    rope_tables,
)
from tokenizer import UNUSED, VAR_SCALES, VQGAN, MultiScaleVQ, VQGANConfig, var_names, vqgan_config
from weights import (
    WEIGHTS, build_from, check_config, check_source, fingerprint, read_config, read_own, read_weights, reading,
    sha256_of, weight_files,
)

# ---- LoRA -----------------------------------------------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """A frozen linear layer plus a trained product of two thin matrices (Hu et al. 2021): W x + alpha / r  B A x.

    B starts at zero, so that nothing changes before training. The names of weight and bias stay, lora_a (r,in) and
    lora_b (out,r) join them.
    """

    def __init__(self, linear, rank, alpha, dropout):
        nn.Module.__init__(self)  # no memory for a weight of its own
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        make = {"device": linear.weight.device, "dtype": torch.float32}  # small, and trained: not in bfloat16
        self.lora_a = nn.Parameter(torch.empty(rank, linear.in_features, **make))
        self.lora_b = nn.Parameter(torch.zeros(linear.out_features, rank, **make))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        self.scale, self.dropout = alpha / rank, dropout

    def forward(self, x):
        y = F.linear(x, self.weight, self.bias)
        x = F.dropout(x, self.dropout, self.training)
        return y + self.scale * F.linear(F.linear(x.to(self.lora_a.dtype), self.lora_a), self.lora_b).to(y.dtype)

    @torch.no_grad()
    def merged(self):
        """A plain linear layer with the product added to the weight."""
        weight = (self.weight.float() + self.scale * (self.lora_b @ self.lora_a)).to(self.weight.dtype)
        linear = nn.Linear(self.in_features, self.out_features, device="meta")  # no memory for what is replaced
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return linear


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class MLLM:
    """What both models share: the prompt, and LoRA. They have config, token_embedding and llama."""

    def blocks(self, text_ids, length):
        """Block ids (B,length), see Llama.forward: the position, and UNSEEN for the padding at the left of text_ids."""
        positions = torch.arange(length, device=text_ids.device).expand(len(text_ids), -1)
        padding = (text_ids == self.config.pad_id).cumprod(1).sum(1, keepdim=True)  # (B,1) how many there are
        return positions.masked_fill(positions < padding, UNSEEN)

    def prefix(self, text_ids, pixels):
        """text_ids (B,L) with image_id in the places of a picture, and what encode_image takes -> (B,L,D). pixels may
        be None, for no picture. In JanusSeg B/b rows share one of b pictures, in ARGenSeg all rows have the same."""
        words, places = self.token_embedding(text_ids), text_ids == self.config.image_id  # (B,L,D), (B,L)
        if pixels is None:
            return words
        image = self.encode_image(pixels).to(words.dtype)  # (b,N,D), or (n*N,D) of tiles
        image = image.view(-1, *image.shape[-2:])
        return words.masked_scatter(places[:, :, None], image.repeat_interleave(len(words) // len(image), dim=0))

    def add_lora(self, rank=16, alpha=32, dropout=0.0, targets=LORA_TARGETS):
        """Freeze all and put LoRALinear in place of the layers of the LLaMA that `targets` names: only lora_a and
        lora_b receive gradients. ValueError for numbers that no LoRA has."""
        width = self.config.llama.width
        if not (type(rank) is int and 1 <= rank <= width and 0 < alpha < math.inf and 0 <= dropout < 1):
            raise ValueError(f"LoRA rank {rank}, alpha {alpha}, dropout {dropout}: want an integer from 1 to the "
                             f"model's width {width}, above 0, in [0, 1)")
        self.requires_grad_(False)
        for part in [part for layer in self.llama.layers for part in (layer.self_attn, layer.mlp)]:
            for name in [name for name, _ in part.named_children() if name in targets]:
                setattr(part, name, LoRALinear(getattr(part, name), rank, alpha, dropout))
        self.config.lora = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": list(targets)}

    def merge(self):
        """Add LoRA to the weights for good, for decoding at the speed of the base."""
        for part in list(self.llama.modules()):
            for name, layer in part.named_children():
                if isinstance(layer, LoRALinear):
                    setattr(part, name, layer.merged())

    def fuse(self):
        """Merge LoRA, then lay out the weights for decoding."""
        self.merge()
        self.llama.fuse()

    def trained_state(self):
        """The LoRA matrices: what a checkpoint holds."""
        return {name: w for name, w in self.state_dict().items() if name.rpartition(".")[2] in ("lora_a", "lora_b")}


# parts of the official names: ours. Each replacement sees what those above it left.
NAMES = {
    "language_model.model.embed_tokens.": "token_embedding.",
    "language_model.model.tok_embeddings.": "token_embedding.", "language_model.model.": "llama.",
    "language_model.lm_head.": "lm_head.", "language_model.output.": "lm_head.",
    # InternLM2 and InternViT, of ARGenSeg
    ".attention.wqkv.": ".self_attn.qkv_proj.", ".attention.wo.": ".self_attn.o_proj.",
    ".attention_norm.": ".input_layernorm.", ".ffn_norm.": ".post_attention_layernorm.",
    ".feed_forward.w1.": ".mlp.gate_proj.", ".feed_forward.w3.": ".mlp.up_proj.",
    ".feed_forward.w2.": ".mlp.down_proj.", "vision_model.embeddings.": "vision.", "vision_model.encoder.": "vision.",
    # Janus-Pro
    "aligner.layers.": "aligner.", "gen_head.output_mlp_projector.": "gen_head.0.",
    "gen_head.vision_head.": "gen_head.2.", "vision_model.vision_tower.": "vision.vision_model.",
    "patch_embed.proj.": "embeddings.patch_embedding.", "pos_embed": "embeddings.position_embedding.weight",
    "blocks.": "encoder.layers.", "vision_model.norm.": "vision_model.post_layernorm.",
    # both vision towers
    ".norm1.": ".layer_norm1.", ".norm2.": ".layer_norm2.", ".attn.qkv.": ".self_attn.qkv_proj.",
    ".attn.proj.": ".self_attn.out_proj.",
}
IMAGE_TOKENIZER = "image_tokenizer."  # what the names of the tensors of ARGenSeg's mask tokenizer begin with


def our_names(weights, llama=None):
    """Official tensors, taken out of the dict, under our names. Unknown names stay, to be reported. A fused qkv becomes
    three. A vision tower has them one after the other; InternLM2, of whose shape `llama` is, has for each key/value
    head in turn its query heads, its key and its value."""
    ours = {}
    for name in list(weights):
        w = weights.pop(name)
        for official, own in NAMES.items():
            name = name.replace(official, own)
        if ".qkv_proj." not in name:
            ours[name] = w[0] if name.endswith(".position_embedding.weight") else w  # (1,N,D) -> (N,D)
            continue
        parts = w.chunk(3)
        if name.startswith("llama."):
            groups = w.unflatten(0, (llama.kv_heads, -1, llama.head_dim))  # (nkv,nh/nkv+2,hd,D)
            parts = [part.flatten(0, 2) for part in groups.split([llama.heads // llama.kv_heads, 1, 1], dim=1)]
        ours |= {name.replace(".qkv_", f".{letter}_"): part for letter, part in zip("qkv", parts)}
    return ours


# ---- Janus-Pro ------------------------------------------------------------------------------------------------------


@dataclass
class JanusConfig:
    """Shape of a Janus model; the defaults are Janus-Pro-1B's."""

    siglip: SigLIPConfig = field(default_factory=lambda: SigLIPConfig(
        image_size=384, vision_width=1024, vision_layers=24, vision_heads=16, vision_mlp=4096, gelu="none"))
    llama: LlamaConfig = field(default_factory=lambda: LlamaConfig(width=2048, layers=24, heads=16, mlp=5632))
    vocab_size: int = 102400
    codebook_size: int = 16384
    code_width: int = 8  # of the embedding of generated image tokens
    head_width: int = 2048  # between the two layers of the generation head
    projector_layers: int = 2  # of both aligners
    hide: bool = False  # as in LlamaSegConfig
    image_id: int = 100581  # <image_placeholder>
    pad_id: int = 100015
    lora: dict | None = None  # rank, alpha, dropout, targets
    scales = ()  # next-token prediction

    def __post_init__(self):
        check_fields(self)

    @property
    def mask_grid(self):
        return self.siglip.image_size // 16  # masks have the side of the pictures, 16 pixels per token

    @property
    def mask_tokens(self):
        return self.mask_grid**2  # M


# the paper's second model; its shape is read from the official directory
PRESETS = {"llamaseg-janus": JanusConfig()}


def projector(inside, outside, layers):
    """Janus' `mlp_gelu`: linear layers with the exact GELU between them."""
    more = [module for _ in range(layers - 1) for module in (nn.GELU(), nn.Linear(outside, outside))]
    return nn.Sequential(nn.Linear(inside, outside), *more)


class JanusSeg(MLLM, MaskWriter):
    """Janus-Pro (Chen et al. 2025) as a segmenter, the paper's second model: it reads phrase and picture as in a chat
    and writes the mask with the parts that it has for generating pictures. Only LoRA on its LLaMA is trained; paper:
    rank and targets are not stated, see train.py. The prompt, text_ids, comes whole from JanusPrompt. Paper: which
    token begins the mask is not stated; we use the `<begin_of_image>` that Janus knows. No classifier-free guidance.
    """

    file_format = "janusseg"

    def __init__(self, config: JanusConfig):
        super().__init__(config)
        D = config.llama.width
        self.vision = SigLIP(config.siglip, text=False)
        self.aligner = projector(config.siglip.vision_width, D, config.projector_layers)
        self.token_embedding = nn.Embedding(config.vocab_size, D)
        self.llama = Llama(config.llama)
        self.lm_head = nn.Linear(D, config.vocab_size, bias=False)
        self.gen_embed = nn.Embedding(config.codebook_size, config.code_width)
        self.gen_aligner = projector(config.code_width, D, config.projector_layers)
        self.gen_head = nn.Sequential(nn.Linear(D, config.head_width), nn.GELU(),
                                      nn.Linear(config.head_width, config.codebook_size))

    def encode_image(self, pixels):
        """pixels (B,3,S,S) float in [-1,1] -> (B,N,D): vision tower, then aligner."""
        return self.aligner(self.vision.encode_image(pixels))

    def mask_embedding(self, tokens):
        return self.gen_aligner(self.gen_embed(tokens))

    def head(self, hidden):
        return self.gen_head(hidden)

    @torch.no_grad()
    def answer(self, text_ids, pixels, length=128, stop=()):
        """Words: one prompt (1,L) with a picture (1,3,S,S) -> the likeliest next tokens, a list of at most `length` ids
        that ends before one of `stop`."""
        prefix, found = self.prefix(text_ids, pixels), []
        cache = self.new_cache(prefix, length)
        hidden = self.llama(prefix, cache, self.blocks(text_ids, prefix.shape[1]))
        while True:
            token = self.lm_head(hidden[:, -1]).float().argmax(-1).item()
            if token in stop or len(found) == length:
                return found
            found.append(token)
            hidden = self.llama(self.token_embedding(torch.tensor([[token]], device=text_ids.device)), cache)

    @classmethod
    def from_pretrained(cls, path, base=None, dtype=torch.float32, any_weights=False):
        """Load an official Janus directory (config.json; pytorch_model.bin or .safetensors, sharded or not), strictly;
        or a file of `save_pretrained` on its base, by default the directory of its name below WEIGHTS. In eval mode.
        any_weights: take another base than that of the training. FileNotFoundError, or ValueError in one line."""
        path = Path(path)
        if path.is_dir() or not path.suffix:
            return cls._from_directory(path, dtype)
        config, frozen, weights = read_own(path, cls.file_format, JanusConfig, torch.float32)  # LoRA stays in float32
        with reading(path, "a header that names its Janus model"):
            name = frozen["mllm"]["name"]
        model = cls._from_directory(Path(base or WEIGHTS / name), dtype)
        if not any_weights:
            check_source(path, "mllm", frozen, model.frozen["mllm"])
        with reading(path, "LoRA for a Janus model"):
            model.add_lora(**config.lora)
            model.load_trained_state(weights)
        model.config.hide, model.frozen = config.hide, frozen
        return model.eval()

    @classmethod
    def _from_directory(cls, directory, dtype):
        config = janus_config(directory)

        def wanted(name):  # the pooling head has no use here; the image tokenizer is VQGAN.from_pretrained's
            return not name.startswith(("vision_model.vision_tower.attn_pool.", "gen_vision_model."))

        weights = our_names(read_weights(directory, wanted))
        model = build_from(lambda: cls(config), weights, directory, dtype)
        model.frozen = {"mllm": {"name": directory.absolute().name, "sha256": fingerprint(weights)}}
        return model.requires_grad_(False)


JANUS_PARTS = ("vision_config", "aligner_config", "gen_vision_config", "gen_aligner_config", "gen_head_config")
# special tokens of tokenizer.json
BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
BEGIN, IMAGE, END = "<begin_of_image>", "<image_placeholder>", "<end_of_image>"


def janus_config(directory):
    """JanusConfig of an official directory: config.json, and, if it is there, tokenizer.json for special tokens' ids.
    ValueError in one line."""
    hf, path = read_config(directory), directory / "config.json"
    with reading(path, "the config of a Janus-Pro"):
        check_config(path, hf, {"model_type": "multi_modality"})
        vision, aligner, gen_vision, gen_aligner, gen_head = (hf[part]["params"] for part in JANUS_PARTS)
        language, width, depth = hf.get("language_config") or {}, vision.get("width", 1024), aligner.get("depth", 2)
        check_config(path, vision, {"model_name": "siglip_large_patch16_384", "select_feature": "same",
                                    "select_layer": -1})
        for params in (aligner, gen_aligner):
            check_config(path, params, {"projector_type": "mlp_gelu", "depth": depth})
        config = JanusConfig(
            siglip=SigLIPConfig(
                image_size=vision.get("image_size", 384), patch_size=vision.get("patch_size", 16), vision_width=width,
                vision_layers=vision.get("layers", 24), vision_heads=vision.get("heads", 16),
                vision_mlp=int(width * vision.get("mlp_ratio", 4)), gelu="none"),
            llama=llama_config(language, path), vocab_size=language.get("vocab_size", 32000),
            codebook_size=gen_head.get("image_token_size", 16384), code_width=gen_vision.get("n_embed", 8),
            head_width=gen_head.get("image_token_embed", 2048), projector_layers=depth)
    path = directory / "tokenizer.json"
    if path.is_file():
        with reading(path, "the text tokenizer of a Janus-Pro"):
            ids = {token["content"]: token["id"] for token in json.loads(path.read_bytes())["added_tokens"]}
            return replace(config, image_id=ids[IMAGE], pad_id=ids[PAD])
    return config


# ---- ARGenSeg -------------------------------------------------------------------------------------------------------


@dataclass
class ARGenSegConfig:
    """Shape of an ARGenSeg; the defaults are ARGenSeg-8B's."""

    siglip: SigLIPConfig = field(default_factory=lambda: SigLIPConfig(  # InternViT differs in layer scale and <CLS>
        image_size=448, patch_size=14, vision_width=1024, vision_layers=24, vision_heads=16, vision_mlp=4096,
        gelu="none"))
    llama: LlamaConfig = field(default_factory=lambda: LlamaConfig(
        width=4096, layers=32, heads=32, kv_heads=8, mlp=14336, rope_theta=1e6, norm_eps=1e-5))
    vocab_size: int = 96653  # words, then special tokens, then the codebook_size mask tokens
    max_positions: int = 32768  # beyond them the rotary base grows by rope_factor, see ChatCache
    rope_factor: float = 2.0
    codebook_size: int = 4096
    code_width: int = 32  # C, of the rows of the codebook
    scales: tuple = VAR_SCALES
    lora: dict | None = None  # as in JanusConfig; None: the whole language model is trained
    image_id: int = 92546  # <IMG_CONTEXT>
    start_id: int = 92554  # <ge_start>
    end_id: int = 92555  # <ge_end>
    place_id: int = 92556  # <MASK_CONTEXT>, in training the places of all mask tokens but the last
    stop_id: int = 92542  # <|im_end|>
    pad_id: int = 2

    def __post_init__(self):
        check_fields(self)
        self.scales = tuple(self.scales)

    @property
    def image_tokens(self):
        return self.siglip.image_tokens // 4  # N, of a tile

    @property
    def mask_grid(self):
        return self.scales[-1]

    @property
    def mask_tokens(self):
        return sum(s * s for s in self.scales)  # M


# the shape of its mask tokenizer, VAR's
VAR = VQGANConfig(channels=160, latent_channels=32, codebook_size=4096, codebook_dim=32, scales=VAR_SCALES)
PRESETS |= {
    "argenseg-8b": ARGenSegConfig(),  # read from the official directory, too
    # All trained from nothing on the drawn world: 10.8 million parameters. Words are those of assets/text.model.
    "argenseg-scenes": ARGenSegConfig(
        siglip=SigLIPConfig(image_size=128, patch_size=8, vision_width=256, vision_layers=4, vision_heads=4,
                            vision_mlp=768, gelu="none"),
        llama=LlamaConfig(width=256, layers=6, heads=4, mlp=704, rope_theta=1000.0), vocab_size=776 + 4096,
        scales=(1, 2, 3, 4, 6, 8), image_id=768, start_id=769, end_id=770, place_id=771, stop_id=772, pad_id=1),
}


class InternViTBlock(SigLIPBlock):
    """SigLIP's block with layer scale: a learned factor for each channel of both branches (Touvron et al. 2021)."""

    def __init__(self, width, *shape):
        super().__init__(width, *shape)
        self.ls1, self.ls2 = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x):
        x = x + self.ls1 * self.self_attn(self.layer_norm1(x))
        return x + self.ls2 * self.mlp(self.layer_norm2(x))


class InternViT(nn.Module):
    """The vision tower of InternVL (Chen et al. 2024): a ViT with a class token and without a final norm."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        width, P = config.vision_width, config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, P, stride=P)
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + config.image_tokens, width))
        self.layers = nn.ModuleList(
            InternViTBlock(width, config.vision_heads, config.vision_mlp, config.norm_eps, config.gelu)
            for _ in range(config.vision_layers))

    def forward(self, pixels):
        """pixels (n,3,S,S), normalized -> (n,1+patches,D): <CLS>, then the patches in raster order."""
        x = self.patch_embedding(pixels.to(self.patch_embedding.weight.dtype)).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), -1, -1), x], dim=1) + self.position_embedding
        for layer in self.layers:
            x = layer(x)
        return x


def shuffle_pixels(x):
    """(n,h*h,D) -> (n,h/2*h/2,4*D): the channels of each square of 2 x 2 patches side by side, in raster order."""
    h = round(x.shape[1] ** 0.5)
    squares = x.unflatten(1, (h // 2, 2, h // 2, 2)).transpose(2, 3)  # (n,h/2,h/2,2,2,D)
    return squares.flatten(3).flatten(1, 2)


class ChatCache(KVCache):
    """A KVCache that grows, and that knows what it holds, so that the next turn of a conversation can go on from it.

    ids: of its tokens in row 0; -1 for those of a mask, and a hash of the picture for those of the picture. Beyond
    max_positions the rotary base depends on the length (InternLM2's dynamic NTK scaling). Keys that are there keep
    their rotation, as officially.
    """

    def __init__(self, model, batch):
        like = model.token_embedding.weight  # on a CPU it is in float32, see MaskWriter.new_cache
        dtype = torch.float32 if like.device.type == "cpu" else like.dtype
        super().__init__(model.config.llama, batch, 0, like.device, dtype)
        self.config, self.ids = model.config, []

    def make_room(self, count):
        """Prepare for a pass of `count` tokens."""
        c, end, d = self.config, self.position + count, self.config.llama.head_dim
        if end <= min(self.length, c.max_positions):
            return
        if end > self.length:
            more, self.length = end + 512 - self.length, end + 512
            self.keys, self.values = ([F.pad(x, (0, 0, 0, more)) for x in part] for part in (self.keys, self.values))
        places, known = torch.arange(self.length, device=self.blocks.device), self.blocks.shape[1]
        self.blocks = torch.cat([self.blocks, places[known:].expand(len(self.blocks), -1)], dim=1)
        growth = max(1.0, c.rope_factor * end / c.max_positions - c.rope_factor + 1)
        self.rope = rope_tables(places, d, c.llama.rope_theta * growth ** (d / (d - 2)))

    def go_back(self, ids):
        """Keep what is common with a new prompt, a list of ids; its last token is read again."""
        same = 0
        for new, old in zip(ids[:-1], self.ids[:self.position]):
            if new != old:
                break
            same += 1
        self.position, self.ids = same, ids


class ARGenSeg(MLLM, nn.Module):
    """ARGenSeg (Wang et al. 2025): InternVL2.5 that answers in words and masks. One head chooses words and mask tokens.

    The answer is written word by word until <ge_start>; then a mask, one scale per pass; then words again. Inside a
    scale attention is causal too. The mask tokens stay in the context of all that follows. mask_tokenizer: VAR's, in
    float32, frozen.
    """

    file_format = "argenseg"

    def __init__(self, config: ARGenSegConfig):
        super().__init__()
        D, vision = config.llama.width, 4 * config.siglip.vision_width  # of the image tokens, see shuffle_pixels
        self.config, self.directory, self.mask_tokenizer = config, None, None
        self.vision = InternViT(config.siglip)
        self.mlp1 = nn.Sequential(nn.LayerNorm(vision), nn.Linear(vision, D), nn.GELU(), nn.Linear(D, D))
        self.token_embedding = nn.Embedding(config.vocab_size, D)
        self.llama = Llama(config.llama)
        self.lm_head = nn.Linear(D, config.vocab_size, bias=False)
        self.word_embed = nn.Linear(config.code_width, D)  # official names: of what coarser scales decode to,
        self.lvl_embed = nn.Embedding(len(config.scales), D)  # of the scale,
        self.pos_1LC = nn.Parameter(torch.zeros(1, config.mask_tokens, D))  # and of the place among all mask tokens

    def start_training(self):
        """Let learn what config.lora says and the mask parts, or without LoRA all but the vision tower, as officially;
        a model of no directory learns all. What is trained is in float32."""
        lora = self.config.lora
        if lora:
            self.add_lora(**lora)
        for name, part in self.named_children():
            if name != "mask_tokenizer" and not (lora and name in ("token_embedding", "llama", "lm_head", "mlp1")):
                part.requires_grad_(name != "vision" or not self.directory)
        self.pos_1LC.requires_grad_()
        for p in self.parameters():
            p.data = p.data.float() if p.requires_grad else p.data

    def encode_image(self, pixels):
        """Tiles (n,3,S,S) of a picture, normalized -> (n*N,D): vision tower, pixel shuffle, projector."""
        patches = shuffle_pixels(self.vision(pixels)[:, 1:])
        return self.mlp1(patches.to(self.mlp1[1].weight.dtype)).flatten(0, 1)

    def mask_inputs(self, tokens):
        """All tokens of the first scales (B,m) -> what is read for the scales up to the next one, (B,m',D), as in
        LlamaSeg. <ge_start> stands for the first scale, so that place 0 of both tables is never used."""
        maps = self.mask_tokenizer.teacher_inputs(tokens).to(self.word_embed.weight.dtype)  # (B,m',C)
        scale_idx = torch.tensor([i for i, s in enumerate(self.config.scales) for _ in range(s * s)])
        scale_idx = scale_idx[1:1 + maps.shape[1]].to(tokens.device)
        inputs = self.word_embed(maps) + self.lvl_embed(scale_idx) + self.pos_1LC[:, 1:1 + maps.shape[1]]
        return inputs.to(self.token_embedding.weight.dtype)

    def forward(self, text_ids, pixels, mask_tokens, labels):
        """Teacher forcing: B conversations (B,T) of ARGenSegPrompt.lesson, the tile (b,3,S,S) of each picture, which
        B/b of them share, the mask tokens (n,M) of all masks in them, in turn, and labels (B,T) -> logits (targets,V),
        loss (): the mean cross-entropy of the words plus that of the mask tokens, both over the whole vocabulary."""
        c, words = self.config, self.token_embedding(text_ids)
        image = self.encode_image(pixels).unflatten(0, (len(pixels), -1))  # (b,N,D)
        image = image.repeat_interleave(len(words) // len(image), dim=0).to(words.dtype)
        words = words.masked_scatter((text_ids == c.image_id)[:, :, None], image)
        masks = self.mask_inputs(mask_tokens)[:, :c.mask_tokens - 1]  # (n,M-1,D)
        words = words.masked_scatter((text_ids == c.place_id)[:, :, None], masks)
        labels = labels.masked_scatter(labels == c.place_id, mask_tokens + c.vocab_size - c.codebook_size)[:, 1:]
        hidden, targets = self.llama(words)[:, :-1][labels >= 0], labels[labels >= 0]
        logits = self.lm_head(hidden)
        losses, coded = F.cross_entropy(logits.float(), targets, reduction="none"), targets > c.place_id
        # of a batch without masks, or without words, that part is 0
        return logits, sum((losses * part).sum() / part.sum().clamp(min=1) for part in (~coded, coded))

    def mask_head(self, hidden):
        """hidden (...,D) -> logits of the mask tokens (...,K): the last rows of the head."""
        return F.linear(hidden, self.lm_head.weight[-self.config.codebook_size:])

    def read(self, embeddings, cache, blocks=None):
        """Llama.forward of embeddings (B,T,D) after what the cache holds, in which there is always room."""
        cache.make_room(embeddings.shape[1])
        return self.llama(embeddings, cache, blocks)

    @torch.no_grad()
    def answer(self, text_ids, pixels, length=1024, guidance=0.0, cache=None):
        """A prompt (1,L), the tiles of its picture (n,3,S,S) or None -> the likeliest answer: ids (1,T) of at most
        `length` tokens, up to config.stop_id, with one config.end_id for each mask; a list of mask tokens (1,M), one
        for each of them; and a cache. Given with the next prompt of the conversation, only what is new is read.

        Two prompts (2,L), padded at the left, and a `guidance` above 0: the masks of the first are steered away from
        what the second, about nothing, would give (classifier-free guidance, Ho and Salimans 2022).
        """
        c, (B, L) = self.config, text_ids.shape
        if cache is None or B + len(cache.blocks) > 2 or max(L, cache.position) > c.max_positions:
            cache = ChatCache(self, B)  # beyond max_positions the rotations depend on how the tokens came
        picture = None if pixels is None else hash(pixels.cpu().numpy().tobytes())
        cache.go_back([picture if id == c.image_id else id for id in text_ids[0].tolist()])
        blocks = self.blocks(text_ids, L) if B > 1 else None
        text_ids = text_ids[:, cache.position:]
        hidden = self.read(self.prefix(text_ids, pixels if c.image_id in text_ids else None), cache, blocks)
        finished, found, masks = torch.zeros(B, dtype=torch.bool, device=text_ids.device), [], []
        while True:
            token = self.lm_head(hidden[:, -1]).float().argmax(-1)  # (B,)
            if token[0] == c.start_id:  # the first prompt alone decides; the second enters with its own likeliest word
                masks.append(self.write_mask(token, cache, guidance))
                cache.ids += [-1] * c.mask_tokens
                token = torch.full_like(token, c.end_id)
            token = torch.where(finished, c.pad_id, token)  # the second one may end before the first
            finished = finished | (token == c.stop_id)
            found.append(token)
            if finished[0] or len(found) == length:
                return torch.stack(found, dim=1), masks, cache
            hidden = self.read(self.token_embedding(token[:, None]), cache)
            cache.ids.append(int(token[0]))

    def write_mask(self, token, cache, guidance):
        """The likeliest mask tokens (1,M) after the words in the cache, one scale per pass. token (B,): <ge_start>."""
        c, inputs, tokens = self.config, self.token_embedding(token[:, None]), token.new_empty(1, 0)
        for scale_idx, s in enumerate(c.scales):
            if scale_idx:
                inputs = self.mask_inputs(tokens)[:, -s * s:].expand(len(token), -1, -1)  # (B,s*s,D)
            logits = self.mask_head(self.read(inputs, cache)).float()  # (B,s*s,K)
            if len(token) > 1:
                strength = guidance * scale_idx / 9  # officially 9 for any number of scales
                logits = (1 + strength) * logits[:1] - strength * logits[1:]
            tokens = torch.cat([tokens, logits.argmax(-1)[:1]], dim=1)
        return tokens

    def trained_state(self):
        """What start_training lets learn, which is all that a checkpoint holds."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    save_pretrained, load_trained_state = MaskWriter.save_pretrained, MaskWriter.load_trained_state

    @cached_property
    def frozen(self):
        """{"mllm": {"name", "sha256"}} of the directory; hashed when it is asked for, which reads all files again."""
        files = "".join(sha256_of(file) for file in weight_files(self.directory))
        return {"mllm": {"name": self.directory.absolute().name, "sha256": hashlib.sha256(files.encode()).hexdigest()}}

    @classmethod
    def from_nothing(cls, config, mask_tokenizer):
        """New weights, N(0, 0.02) as GPT-2's; ValueError if the mask tokenizer does not fit."""
        model = cls(config_for(config, mask_tokenizer, mask_tokenizer.source["name"]))
        for p in model.parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02)
        model.frozen, model.mask_tokenizer = {}, mask_tokenizer.requires_grad_(False)
        model.start_training()
        return model

    @classmethod
    def from_pretrained(cls, path, mask_tokenizer=None, dtype=torch.float32, base=None, any_weights=False):
        """Load an official directory, strictly, in `dtype`; frozen, in eval mode. It never takes more memory than the
        weights in `dtype` and one tensor. mask_tokenizer: VAR's file, to take it instead of the one in the checkpoint.
        The mask tokenizer is in float32.

        Or a file of `save_pretrained`, as JanusSeg has it: on the directory `base`, by default that of its name below
        WEIGHTS; if it names none it is whole but for the mask tokenizer, by default mask_tokenizer.safetensors beside
        it. FileNotFoundError, or ValueError in one line."""
        path = Path(path)
        if path.is_dir() or not path.suffix:
            return cls._from_directory(path, mask_tokenizer, dtype)
        config, frozen, weights = read_own(path, cls.file_format, ARGenSegConfig, torch.float32)
        if "mllm" in frozen:
            model = cls._from_directory(Path(base or WEIGHTS / frozen["mllm"]["name"]), mask_tokenizer, dtype)
        else:
            vq = VQGAN.from_pretrained(mask_tokenizer or path.with_name("mask_tokenizer.safetensors"))
            model = cls.from_nothing(config, vq)
        for part, source in (model.frozen | {"mask_tokenizer": model.mask_tokenizer.source}).items():
            if not any_weights:
                check_source(path, part, frozen, source)
        with reading(path, "weights for its ARGenSeg"):
            model.config.lora = config.lora
            model.start_training()
            model.load_trained_state(weights)
        model.frozen = frozen
        return model.eval()

    @classmethod
    def _from_directory(cls, directory, mask_tokenizer, dtype):
        config = argenseg_config(directory)
        vq = read_mask_tokenizer(directory, mask_tokenizer, config.scales)
        config = config_for(config, vq, directory)
        weights = read_weights(directory, lambda name: not name.startswith(IMAGE_TOKENIZER), dtype)
        with reading(directory, "the tensors of an ARGenSeg"):
            weights = our_names(weights, config.llama)
            model = build_from(lambda: cls(config), weights, directory, dtype)
        model.directory, model.mask_tokenizer = directory, vq
        return model.requires_grad_(False)


def config_for(config, vq, path):
    """`config` with the code width of a mask tokenizer; ValueError with `path` if its other fields do not fit."""
    want, found = (config.scales, config.codebook_size), (vq.config.scales, vq.config.codebook_size)
    if want != found:
        raise ValueError(f"{path}: scales and mask tokens {want}, but {found} in its mask tokenizer")
    return replace(config, code_width=vq.config.codebook_dim)


def read_mask_tokenizer(directory, path, scales):
    """The MultiScaleVQ of the file `path`; None: that of the checkpoint, or else of VAR's file in its folder or where
    weights.py downloads it. FileNotFoundError, ValueError."""
    weights = {} if path else read_weights(directory, lambda name: name.startswith(IMAGE_TOKENIZER))
    if not weights:
        path = path or next(directory.glob("vae_*.pth"), WEIGHTS / "var-vq")
        return MultiScaleVQ.from_pretrained(path, scales)
    with reading(directory, "VAR's mask tokenizer among its tensors"):
        weights = var_names({name.removeprefix(IMAGE_TOKENIZER): w for name, w in weights.items()})
        weights = {name: w for name, w in weights.items() if name not in UNUSED}
        config = vqgan_config(weights, norm_groups=32, scales=scales)
        vq = build_from(lambda: MultiScaleVQ(config), weights, directory, torch.float32)
    vq.source = {"name": directory.absolute().name, "sha256": fingerprint(weights)}
    return vq


def argenseg_config(directory):
    """ARGenSegConfig of an official directory but for code_width: config.json, and the ids of special tokens in
    tokenizer_config.json. ValueError in one line."""
    hf, path = read_config(directory), directory / "config.json"
    with reading(path, "the config of an ARGenSeg"):
        vision, language = hf["vision_config"], hf["llm_config"]
        check_config(path, {"model_type": None, **hf}, {
            "model_type": "internvl_chat", "template": "internvl2_5", "ps_version": "v2", "select_layer": -1,
            "pad2square": False, "downsample_ratio": 0.5, "use_thumbnail": True,
            "force_image_size": vision["image_size"]})
        check_config(path, vision, {"hidden_act": "gelu", "norm_type": "layer_norm", "qkv_bias": True,
                                    "qk_normalization": False, "num_channels": 3})
        check_config(path, language, {"model_type": "internlm2", "hidden_act": "silu", "bias": False,
                                      "tie_word_embeddings": False})
        rope = language.get("rope_scaling")
        check_config(path, rope or {}, {"type": "dynamic", "rope_type": "dynamic"})
        names = added_tokens(directory)
        return ARGenSegConfig(
            siglip=SigLIPConfig(
                image_size=vision["image_size"], patch_size=vision["patch_size"], vision_width=vision["hidden_size"],
                vision_layers=vision["num_hidden_layers"], vision_heads=vision["num_attention_heads"],
                vision_mlp=vision["intermediate_size"], norm_eps=vision.get("layer_norm_eps", 1e-6), gelu="none"),
            llama=llama_config({**language, "model_type": "llama", "rope_scaling": None}, path),
            vocab_size=language["vocab_size"], scales=hf.get("patch_nums") or VAR_SCALES,
            codebook_size=sum(name.startswith("<visual token ") for name in names),
            max_positions=language["max_position_embeddings"] if rope else 2**20,
            rope_factor=rope["factor"] if rope else 1, image_id=names["<IMG_CONTEXT>"], start_id=names["<ge_start>"],
            end_id=names["<ge_end>"], place_id=names["<MASK_CONTEXT>"], stop_id=names["<|im_end|>"],
            pad_id=names["</s>"])


# pictures in, masks out, as the official evaluation does both


def tile_grid(size, side, most, least=1):
    """(columns, rows) of the grid of tiles of side x side pixels that a picture of `size` (W,H) is cut into: of those
    with `least` to `most` tiles the one whose shape is nearest to the picture's."""
    (W, H), best, nearest = size, (1, 1), math.inf
    # Where two are as near as each other the order decides. Officially it is that of a set of these pairs, made so:
    pairs = {(i, j) for n in range(least, most + 1) for i in range(1, n + 1) for j in range(1, n + 1)
             if least <= i * j <= most}
    for i, j in sorted(pairs, key=math.prod):
        away = abs(W / H - i / j)
        if away < nearest or away == nearest and W * H > 0.5 * side * side * i * j:
            best, nearest = (i, j), away
    return best


def tiles(image, side, most=1):
    """PIL picture, RGB -> float32 (n,3,S,S): resized to its tile_grid with PIL's bicubic, aspect ratio not kept, cut
    row by row, and normalized as ImageNet is. Where there are several tiles, the whole picture follows in one more."""
    i, j = tile_grid(image.size, side, most)
    grid = image.resize((side * i, side * j), Image.Resampling.BICUBIC)
    cut = [grid.crop((x, y, x + side, y + side)) for y in range(0, side * j, side) for x in range(0, side * i, side)]
    if len(cut) > 1:
        cut.append(image.resize((side, side), Image.Resampling.BICUBIC))
    return normalize(torch.from_numpy(np.stack([np.asarray(tile) for tile in cut])))


def normalize(levels):
    """uint8 (n,S,S,3) on any device -> float32 (n,3,S,S), normalized as ImageNet is."""
    mean, deviation = levels.new_tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], dtype=torch.float32)
    return ((levels.float() / 255 - mean) / deviation).permute(0, 3, 1, 2).contiguous()


def mask_pictures(levels):
    """uint8 (n,m,m) of data.mask_levels -> float32 (n,3,m,m) in [-1,1] for the mask tokenizer."""
    return (levels.float() / 127.5 - 1)[:, None].expand(-1, 3, -1, -1)


def picture_mask(decoded, size=None):
    """Decoded mask (3,H,W) in [-1,1] -> bool (H,W), at least half bright in grey; resized by PIL to `size` (W,H)."""
    levels = ((decoded.float() + 1) / 2 * 255).to(torch.uint8)
    picture = Image.fromarray(levels.permute(1, 2, 0).cpu().numpy())
    return np.asarray(picture.resize(size or picture.size, Image.Resampling.BILINEAR).convert("L")) >= 128


# ---- text -----------------------------------------------------------------------------------------------------------

# A vocabulary writes a byte as its Latin-1 character if that is printable, else as a character from U+0100 on (GPT-2).
UNPRINTED = [byte for byte in range(256) if byte == 0x20 or not chr(byte).isprintable()]
BYTE_OF = {chr(0x100 + UNPRINTED.index(byte) if byte in UNPRINTED else byte): byte for byte in range(256)}
NEVER = {0xC0, 0xC1, *range(0xF5, 0x100)}  # UTF-8 has no such bytes, so they need no token

# A Split's regular expression: literals, \s and [classes of literals], each bare or with ? * or +, and $ at the end.
# Python reads these as Hugging Face's Oniguruma does, but for \s, which is Unicode's White_Space there.
SPLIT = re.compile(r"((\\[nrts\W]|[^]\[(){}.*+?|^$\\]|\[\^?(\\[nrt\W]|[^]\[&\\])+\])[?*+]?)+\$?")
WHITE_SPACE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"

# Settings of a tokenizer.json that change the ids. They are not implemented: no DeepSeek file has one of them set.
CHANGES = ("dropout", "byte_fallback", "ignore_merges", "continuing_subword_prefix", "end_of_word_suffix", "lstrip",
           "rstrip", "single_word", "invert", "add_prefix_space")


def check_kind(content):
    """ValueError unless a parsed tokenizer.json is byte-level BPE after Splits and Digits, with none of CHANGES set."""
    normalizer, steps = content["normalizer"] or {"normalizers": []}, content["pre_tokenizer"]["pretokenizers"]
    parts = [*normalizer.get("normalizers", [normalizer]), content["model"], *steps]
    kinds = " ".join(str(part["type"]) for part in parts)
    changes = [name for name in CHANGES if any(part.get(name) for part in parts + content["added_tokens"])]
    if not re.fullmatch("BPE (Split )*(Digits )?ByteLevel", kinds) or changes or steps[-1]["use_regex"]:
        raise ValueError(f"its steps are {kinds} with {changes}; supported: BPE, Splits, Digits or not, ByteLevel")
    ids = content["model"]["vocab"].values()
    if sorted(ids) != list(range(len(ids))):
        raise ValueError(f"the {len(ids)} ids of its vocabulary have gaps or come twice")


class BPETokenizer:
    """Byte-level BPE of DeepSeek-LLM's kind (Janus-Pro) from a Hugging Face tokenizer.json, with the same ids.

    `encode` cuts the added tokens out of the text, splits the rest by the file's patterns, one after the other, and
    lets tiktoken merge the bytes of each piece. decode(encode(text)) is the text, byte for byte. The file's
    post-processor is not applied: no BOS, no EOS.

    special_tokens: {name: id} of all added tokens, "<|User|>" and the like; ids are 0 .. vocab_size - 1.
    """

    @classmethod
    def from_json(cls, path):
        """path: a tokenizer.json or its folder. OSError, or ValueError in one line for another kind."""
        path = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        with reading(path, "a byte-level BPE tokenizer.json of a known kind"):
            return cls(json.loads(path.read_bytes()))

    def __init__(self, content):
        """content: the parsed tokenizer.json."""
        import tiktoken  # here: only Janus-Pro's text needs it

        check_kind(content)
        vocab, added = content["model"]["vocab"], content["added_tokens"]
        # of each id; a token with other characters, as some added ones, stands for its own name
        self.bytes = [bytes(BYTE_OF[c] for c in token) if all(c in BYTE_OF for c in token) else token.encode()
                      for token in sorted(vocab, key=vocab.get)]
        self.special_tokens = {token["content"]: token["id"] for token in added}
        for name, id in self.special_tokens.items():
            if name not in vocab:  # then Hugging Face gives it the next id, whatever the file says
                self.bytes.append(name.encode())
            if not name or id != vocab.get(name, len(self.bytes) - 1) or self.bytes[id] != name.encode():
                raise ValueError(f"its added token {name!r:.100} has the id {id!r:.100} of something else")
        self.vocab_size = len(self.bytes)

        # Hugging Face joins the listed pair of the lowest rank. tiktoken joins any two neighbours whose bytes together
        # are a token, again the lowest rank first. Both give the same ids where the merges were learned from text: each
        # merge then makes a new token out of earlier ones, and its bytes merge in no other way. The tests compare both.
        tokens = {char: None for char, byte in BYTE_OF.items() if char in vocab or byte not in NEVER}
        for pair in content["model"]["merges"]:
            left, right = pair.split(" ") if isinstance(pair, str) else pair
            if left not in tokens or right not in tokens or left + right in tokens:
                raise ValueError(f"its merge {pair!r:.100} does not make a new token of two earlier ones")
            tokens[left + right] = None
        self.ids = [vocab[token] for token in tokens]  # of each rank
        ranks = {self.bytes[id]: rank for rank, id in enumerate(self.ids)}

        digits, self.splits = r"(?s:.+)", []
        for step in content["pre_tokenizer"]["pretokenizers"]:
            if step["type"] == "Split":
                regex = step["pattern"]["Regex"]
                if step["behavior"] != "Isolated" or not SPLIT.fullmatch(regex) or re.match(regex, ""):
                    raise ValueError(f"its step {step!r:.200} is not supported")
                regex = regex.replace(r"\s", WHITE_SPACE)
                self.splits.append((re.compile(f"({regex})", re.MULTILINE), {}))
            elif step["type"] == "Digits":
                digits = r"\p{N}|\P{N}+" if step["individual_digits"] else r"\p{N}+|\P{N}+"
        self.bpe = tiktoken.Encoding("tokenizer.json", pat_str=digits, mergeable_ranks=ranks, special_tokens={})
        # Names are looked for in two steps, those of `normalized` tokens last. In a user's words only the names of one
        # character count: DeepSeek has letters such as "ü" as added tokens.
        names = [{t["content"]: t["id"] for t in added if t["normalized"] == last} for last in (False, True)]
        self.names = [finder(ids) for ids in names]
        self.letters = [finder({name: id for name, id in ids.items() if len(name) == 1}) for ids in names]

    def encode(self, *parts):
        """Text -> list of ids. The name of an added token in the text becomes that token.

        Several parts are, in turn, text and words of a user, text again and so on. They are encoded as one text, but in
        the words the name of an added token is text like any other. UnicodeEncodeError, a ValueError, on half of a
        surrogate pair: UTF-8 has no bytes for it.
        """
        ids = []
        for piece in cut(join(parts, self.names, self.letters), self.splits):
            ids += [piece] if isinstance(piece, int) else [self.ids[rank] for rank in self.bpe.encode_ordinary(piece)]
        return ids

    def decode(self, ids):
        """ids in 0 .. vocab_size - 1 -> text; bytes that are not UTF-8, as half a character's, become U+FFFD."""
        return b"".join(self.bytes[id] for id in ids).decode(errors="replace")


def finder(ids):
    """{name: id} -> the step of `cut` that finds the names, the longest one where several begin."""
    names = "|".join(map(re.escape, sorted(ids, key=len, reverse=True)))
    return re.compile(f"({names or '(?!)'})"), ids


def cut(pieces, steps):
    """Cut strings by the pattern of each step; a piece with the name of one of its added tokens becomes its id."""
    for pattern, added in steps:
        parts = (part for piece in pieces for part in ([piece] if isinstance(piece, int) else pattern.split(piece)))
        pieces = [added.get(part, part) for part in parts]
    return [piece for piece in pieces if piece != ""]


def join(parts, steps, steps_of_words):
    """Text, words of a user, text and so on -> strings and ids of added tokens, of which `cut` finds those of `steps`
    in the text and those of steps_of_words in the words. Strings that meet become one."""
    joined = []
    for i, part in enumerate(parts):
        part.encode()  # a UnicodeEncodeError, which is a ValueError, on half of a surrogate pair
        for piece in cut([part], steps_of_words if i % 2 else steps):
            if isinstance(piece, str) and joined and isinstance(joined[-1], str):
                piece = joined.pop() + piece
            joined.append(piece)
    return joined


class MLLMPrompt:
    """What an MLLM is asked, as ids with room for a picture. The name of a special token in somebody's words is text
    like any other. image_tokens: N, places that a picture, or a tile of it, takes.

    A subclass has encode(*parts), which takes text, words of somebody, text and so on, and in the text makes names of
    special tokens these tokens; the ids image and pad; and length, the most tokens of a message.
    """

    def too_long(self, text):
        """The number of tokens that `text` needs if it is above `length`, else 0."""
        needed = len(self.encode("", text))
        return needed if needed > self.length else 0

    def ids(self, *parts, tiles=1):
        """A prompt in parts, as `encode` takes them -> int64 (1,L), with room for so many tiles."""
        ids = []
        for id in self.encode(*parts):
            ids += [id] * (tiles * self.image_tokens if id == self.image else 1)
        return torch.tensor([ids])

    def pad_left(self, rows):
        """Prompts, a list of (1,L) -> (B,L), as long as the longest."""
        longest = max(row.shape[1] for row in rows)
        return torch.cat([F.pad(row, (longest - row.shape[1], 0), value=self.pad) for row in rows])


class JanusPrompt(MLLMPrompt):
    """Phrases or a question in the chat template of Janus-Pro. directory: an official one with a tokenizer.json."""

    # the official processor's text for questions about a picture; for generated pictures it has none
    system = ("You are a helpful language and vision assistant. You are able to understand the visual content that the "
              "user provides, and assist the user with a variety of tasks using natural language.")
    length = 256  # our limit: the model itself reads thousands

    def __init__(self, directory, image_tokens):
        self.bpe, self.image_tokens = BPETokenizer.from_json(directory), image_tokens
        self.encode = self.bpe.encode
        with reading(directory, "a text tokenizer with Janus' special tokens"):
            self.eos, self.pad, self.image, *_ = [self.bpe.special_tokens[name]
                                                  for name in (EOS, PAD, IMAGE, BOS, BEGIN, END)]

    def __call__(self, phrases):
        """list of B phrases -> int64 (B, L), padded at the left to the longest.

        The paper: `<|User|>: [text]<image>  <|Assistant|>: <begin_of_mask>`, in Janus' own white space.
        """
        end = f"{BEGIN}{IMAGE}{END}\n\n<|Assistant|>:{BEGIN}"
        return self.pad_left([self.ids(f"{BOS}<|User|>: ", phrase.strip(), end) for phrase in phrases])

    def chat(self, question):
        """A question about a picture -> int64 (1, L)."""
        start = f"{BOS}{self.system}\n\n<|User|>: {BEGIN}{IMAGE}{END}\n"
        return self.ids(start, question.strip(), "\n\n<|Assistant|>:")

    def decode(self, ids):
        """Ids of an answer -> its text. The model's table of embeddings has rows beyond the vocabulary: no text."""
        silent = {*self.bpe.special_tokens.values()}
        return self.bpe.decode([id for id in ids if id < self.bpe.vocab_size and id not in silent]).strip()


def added_tokens(directory):
    """{name: id} of the added tokens in the tokenizer_config.json of a directory; FileNotFoundError, ValueError."""
    path = directory / "tokenizer_config.json"
    with reading(path, "the added tokens of a text tokenizer"):
        added = json.loads(path.read_bytes())["added_tokens_decoder"]
        return {token["content"]: int(id) for id, token in added.items()}


MASK = "<mask>"


def clean_up(text):
    """Decoded text as Hugging Face's tokenizer for InternLM2 gives it, without white space at its ends."""
    text = re.sub(r" ([.?!,])", r"\1", text).replace(" ' ", "'")
    return re.sub(r" (n't|'m|'s|'ve|'re)", r"\1", text).strip()


class ARGenSegPrompt(MLLMPrompt):
    """A conversation in InternVL2.5's template. directory: an official one."""

    system = ("你是书生·万象，英文名是InternVL，"
              "是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。")
    opening = f"<s><|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
    picture = "<img><IMG_CONTEXT></img>\n"
    to_answer, to_user = (f"<|im_end|>\n<|im_start|>{who}\n" for who in ("assistant", "user"))
    instructions = {  # by the task of an Example: the official demonstration's, and those of the official training
        "referring": "Given the following instructions: {}; please perform referring segmentation on this image.",
        "semantic": "Please segment {} in this image.",
        "reasoning": "Please perform instance segmentation following the instructions below: {}."}
    answer = f"Sure, the segmentation result: {MASK}."  # that training gives to them
    nothing = "Please generate a picture about nothing."  # for guidance
    length, most = 4096, 8192  # tokens of a message, our limit, and of a conversation in training, the official one

    def __init__(self, directory, image_tokens):
        self.image_tokens, self.special = image_tokens, added_tokens(Path(directory))
        self.read_model(Path(directory) / "tokenizer.model")

    def read_model(self, path):
        """Take the SentencePiece model at `path`, and from the special tokens those that are needed by name."""
        self.model = sentencepiece.SentencePieceProcessor()
        with reading(path, "a SentencePiece model"):
            self.model.LoadFromSerializedProto(path.read_bytes())
        with reading(path.parent, "a text tokenizer with ARGenSeg's special tokens"):
            self.pad, self.image, self.mask, self.place = (
                self.special[name] for name in ("</s>", "<IMG_CONTEXT>", "<ge_end>", "<MASK_CONTEXT>"))
        self.names, self.silent = finder(self.special), set(self.special.values())

    def words(self, text):
        """Ids of text in which nothing is special. SentencePiece's model has a piece of its own, [UNUSED_TOKEN_141] or
        the like, for the ids of some special tokens: that piece is spelt here."""
        ids = []
        for id in self.model.encode(text):
            if id in self.silent and id != self.model.unk_id():
                piece = self.model.id_to_piece(id)
                ids += self.model.encode(piece[:1]) + self.model.encode(piece[1:])
            else:
                ids.append(id)
        return ids

    def encode(self, *parts):
        """Text, words of somebody, text and so on -> list of ids. In text names of special tokens are tokens."""
        ids = []
        for piece in join(parts, [self.names], []):
            ids += [piece] if isinstance(piece, int) else self.words(piece)
        return ids

    def chat(self, messages, tiles):
        """Words of the user, the answer, words of the user and so on, about a picture in so many tiles (0: none) ->
        int64 (1,L). The picture comes first, as if the first words began with the official "<image>\n". As
        officially, earlier masks are not in the prompt."""
        first, *rest = messages
        parts = [self.opening + (self.picture if tiles else ""), first.removeprefix("<image>\n") if tiles else first]
        for i, words in enumerate(rest):
            parts += [self.to_user, words] if i % 2 else [self.to_answer, clean_up(words.replace(MASK, ""))]
        return self.ids(*parts, self.to_answer, tiles=tiles)

    def lesson(self, messages, mask_tokens):
        """A conversation about a picture that ends with an answer -> two lists, its ids and the labels of
        ARGenSeg.forward: -100 but for the answers. A mask of M = mask_tokens takes M + 1 places: <ge_start>, M - 1 for
        what is read of it, <ge_end>. In the labels <MASK_CONTEXT> stands for each mask token, the last one under
        <ge_end>, so that <ge_end> is never learned."""
        mask, ids, labels = "<ge_start>" + "<MASK_CONTEXT>" * (mask_tokens - 1) + "<ge_end>", [], []
        for i, words in enumerate(messages):
            if i % 2:
                first, *rest = words.split(MASK)
                new = self.encode("", first, *(part for piece in rest for part in (mask, piece)), "<|im_end|>")
                labels += [self.place if id == self.mask else id for id in new]
            else:  # <|im_end|> is of the answer before
                new = (self.encode(self.to_user.removeprefix("<|im_end|>"), words, self.to_answer) if i else
                       self.chat([words], 1)[0].tolist())
                labels += [-100] * len(new)
            ids += new
        return ids, labels

    def __call__(self, phrases, tiles=1):
        """list of B phrases, each to be segmented in a picture -> int64 (B,L), padded at the left to the longest."""
        return self.pad_left([self.chat([self.instruction(phrase)], tiles) for phrase in phrases])

    def instruction(self, phrase, task="referring"):
        """The words around a phrase."""
        return self.instructions[task].format(phrase.strip())

    def decode(self, ids):
        """Ids of an answer -> its text: "<mask>" where a mask stands, and no other special token."""
        parts = [[]]
        for id in ids:
            if id == self.mask:
                parts.append([])
            elif id not in self.silent and id < self.model.vocab_size():  # a mask token is no word
                parts[-1].append(id)
        return clean_up(MASK.join(self.model.decode(part) if part else "" for part in parts))


class ScenesPrompt(ARGenSegPrompt):
    """The same for argenseg-scenes, in few tokens of our own. path: a text.model of SentencePiece with 768 pieces."""

    special = {name: 768 + i for i, name in enumerate((
        "<IMG_CONTEXT>", "<ge_start>", "<ge_end>", "<MASK_CONTEXT>", "<|im_end|>", "<answer>", "<img>", "</img>"))}
    special["</s>"] = 1
    opening, picture, to_answer, to_user, nothing = "", "<img><IMG_CONTEXT></img>", "<answer>", "<|im_end|>", "nothing"
    instructions = dict.fromkeys(ARGenSegPrompt.instructions, "{}")
    answer, length, most = MASK, 64, 1024

    def __init__(self, path, image_tokens):
        self.image_tokens = image_tokens
        self.read_model(Path(path))
        if self.model.vocab_size() != 768:
            raise ValueError(f"{path}: has {self.model.vocab_size()} pieces, argenseg-scenes has 768")

    def words(self, text):
        return self.model.encode(text.lower())

    def decode(self, ids):  # these pieces hold no space before a mask
        return super().decode(ids).replace(f":{MASK}", f": {MASK}")
