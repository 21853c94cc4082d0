"""LlamaSeg: text-prompted segmentation as next-token prediction of mask tokens.

A SigLIP pair turns the phrase and the picture into text tokens and image tokens, two adaptors bring them to
the width of a LLaMA, and the LLaMA writes the mask tokens in raster order:

    [text tokens] <BOI> [image tokens] <BOM> [mask tokens]

With config.scales it writes them coarse to fine instead, all tokens of a scale at once (next-scale prediction).
The mask tokenizer (tokenizer.VQGAN) turns a mask into M mask tokens, numbers of rows of its codebook, and back; code 0
of those that this repository trains is plain background.

Shapes used below, with their sizes in the preset scenes:
    B batch, b pictures, L text tokens (24), N image tokens (64), M mask tokens (mask_grid squared, 64),
    T tokens of a sequence or of a pass, D width of the network at hand (256), K codebook size (4096),
    S side of the picture in pixels (128), P side of a patch in pixels (16), nh heads, nkv key/value heads,
    hd width of a head

From the top: MaskWriter and LlamaSeg, the LLaMA with its KV cache, ways to decode, devices, SigLIP, configs, helpers.
"""

import copy
import math
import resource
import sys
import time
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from weights import (
    WEIGHTS, build_from, check_config, check_fields, check_source, compare_weights, fingerprint, read_config, read_own,
    read_weights, reading, without_numbers, write_weights,
)

# ---- LlamaSeg -------------------------------------------------------------------------------------------------------


@dataclass
class LlamaSegConfig:
    """The whole model's shape. A checkpoint holds `asdict` of it as JSON; LlamaSegConfig(**that) is equal."""

    siglip: "SigLIPConfig" = field(default_factory=lambda: SigLIPConfig())
    llama: "LlamaConfig" = field(default_factory=lambda: LlamaConfig())
    codebook_size: int = 16384  # K, rows of the mask tokenizer's codebook
    mask_grid: int = 16  # h = w tokens
    freeze_encoders: bool = True  # no gradient for SigLIP
    hide: bool = False  # train.py sets it: trained with hide_tokens (see forward), so it can guess all tokens at once
    words: tuple = ()  # train.py sets it for drawn scenes: all words of the training phrases; none: any word may come
    names: tuple = ()  # those of them that a misspelled word is read as
    patch_head: bool = False  # see LlamaSeg.prefix_loss
    scales: tuple = ()  # next-scale prediction: sides of the grids of tokens, from 1 to mask_grid; (): next-token
    scale_attention: str = "block"  # a token sees all of its own scale, as in VAR; "causal": those before it
    code_width: int = 8  # C, of the rows of the mask tokenizer's codebook; read with scales alone

    def __post_init__(self):
        check_fields(self)
        self.words, self.names, self.scales = tuple(self.words), tuple(self.names), tuple(self.scales)
        if self.patch_head and (self.scales or self.mask_tokens != self.siglip.image_tokens):
            raise ValueError(f"patch_head needs a mask token for each of {self.siglip.image_tokens} image tokens")
        if self.scales and (self.scales[0], self.scales[-1]) != (1, self.mask_grid):
            raise ValueError(f"scales are {self.scales}, expected 1 to mask_grid {self.mask_grid}")

    @property
    def mask_tokens(self):
        return sum(s * s for s in self.scales) or self.mask_grid**2  # M


HEAD_PART = 1024  # mask tokens whose logits are in memory at once, with llama.recompute
DECODES = ("greedy", "beam", "top-k", "top-p", "random")
DRAFTS = ("auto", "none", "jacobi", "hidden")


class MaskWriter(nn.Module):
    """Mask tokens after a prefix: how they are learned (`forward`) and written (`generate_naive`, `generate`).

    LlamaSeg (below) and JanusSeg (mllm.py) differ in the prefix and agree in all after it. A subclass has llama,
    file_format, a config with codebook_size, mask_grid, mask_tokens, hide and scales, and
        prefix(text_ids, pixels) -> embeddings (B,T,D) of all before the first mask token
        mask_embedding(tokens (B,T)) -> (B,T,D), and head(hidden (...,D)) -> logits (...,K): modules or methods
        trained_state() -> the part of its state dict that a checkpoint holds
    """

    def __init__(self, config):
        super().__init__()
        self.config, self.frozen, self.decoders = config, {}, {}  # decoders: what compile_decoder made, by shape

    def blocks(self, text_ids, length):
        """Block ids (B,length) of a sequence that begins with the prefix, see Llama.forward; None: causal."""
        return None

    def mask_inputs(self, tokens):
        """The first mask tokens (B,m) -> all that can be read once they are known, (B,m,D)."""
        return self.mask_embedding(tokens)

    def prefix_loss(self, hidden, mask_tokens):
        """What is learned besides from the states of the prefix (B,T,D) in training; 0: nothing."""
        return 0.0

    def forward(self, text_ids, pixels, mask_tokens, hide_tokens=None, background_weight=1.0):
        """Teacher forcing: text_ids (B,L), pixels (b,3,S,S), mask_tokens (B,M) -> logits (B,M,K), loss (); ValueError.

        logits[:, t] predict mask token t; the loss is their mean cross-entropy, in float32. In training with
        llama.recompute the logits are None: they too are made in parts, and again in the backward pass.
        hide_tokens: bool (B,M), mask tokens whose input embedding becomes zero, so that picture and phrase alone must
        tell the tokens after them (word dropout, Bowman et al. 2016). Paper: does not do this; the preset scenes does.
        background_weight: of targets that are code 0, plain background. One edge has many codes that look alike and
        background has one, so the likeliest token is background too often. Paper: 1.
        """
        B, M = text_ids.shape[0], self.config.mask_tokens
        if mask_tokens.shape != (B, M):
            raise ValueError(f"mask_tokens have shape {tuple(mask_tokens.shape)}, want ({B}, {M})")
        prefix = self.prefix(text_ids, pixels)
        inputs = self.mask_inputs(mask_tokens)[:, :M - 1]  # (B,M-1,D): the last token predicts nothing
        if hide_tokens is not None:
            inputs = inputs.masked_fill(hide_tokens[:, :-1, None], 0.0)
        sequence = torch.cat([prefix, inputs.to(prefix.dtype)], dim=1)
        hidden = self.llama(sequence, blocks=self.blocks(text_ids, sequence.shape[1]))  # (B,T-1,D)
        more_loss = self.prefix_loss(hidden[:, :prefix.shape[1]], mask_tokens)
        hidden, targets = hidden[:, prefix.shape[1] - 1:].flatten(0, 1), mask_tokens.flatten()  # from <BOM> on
        if self.llama.recompute and torch.is_grad_enabled():
            parts = zip(hidden.split(HEAD_PART), targets.split(HEAD_PART))
            losses = [checkpoint(self.losses, *part, use_reentrant=False)[1] for part in parts]
            logits, losses = None, torch.cat(losses)  # (B*M,)
        else:
            logits, losses = self.losses(hidden, targets)  # (B*M,K), (B*M,)
            logits = logits.view(B, M, -1)
        return logits, (losses * torch.where(targets == 0, background_weight, 1.0)).mean() + more_loss

    def losses(self, hidden, targets):
        """hidden (n,D), targets (n,) -> logits (n,K), cross-entropy of each (n,) in float32."""
        logits = self.head(hidden)
        return logits, F.cross_entropy(logits.float(), targets, reduction="none")

    @torch.no_grad()
    def generate_naive(self, text_ids, pixels):
        """Greedy decoding without cache, the reference for `generate`: (B,L), (b,3,S,S) -> (B,M) int64."""
        prefix = self.prefix(text_ids, pixels)
        tokens = text_ids[:, :0]  # (B,0): no mask token yet
        while tokens.shape[1] < self.config.mask_tokens:
            sequence = torch.cat([prefix, self.mask_inputs(tokens)], dim=1)
            hidden = self.llama(sequence, blocks=self.blocks(text_ids, sequence.shape[1]))
            chosen = self.head(hidden[:, prefix.shape[1] - 1 + tokens.shape[1]:]).argmax(-1)  # (B,1), or of a scale
            tokens = torch.cat([tokens, chosen], dim=1)
        return tokens

    @torch.no_grad()
    def generate(self, text_ids, pixels, decode="greedy", beams=3, top_k=3, top_p=0.9, temperature=1.0,
                 seed=0, draft="auto", window=None, compiled=False, stats=None, watch=None):
        """text_ids (B,L), pixels (b,3,S,S) -> mask tokens (B,M) int64, one after the other with a KV cache.

        decode: "greedy"; "beam", the best of `beams` sequences kept by summed log-probability; or a draw at
        `temperature` from the `top_k` likeliest tokens ("top-k"), from the fewest that together reach
        probability `top_p` ("top-p"), or from all ("random").
        seed: an int for all masks, or a list with one int per mask. The same seed draws the same tokens for a mask,
        whatever else is in its batch; only rounding, which depends on the batch size, can tip a draw.
        draft: how greedy decoding guesses tokens to verify several per pass, see `decode_drafted`: "jacobi", "hidden",
        "none" (or None) for one token per pass, "auto" for the fastest. window: tokens per pass, with a draft.
        compiled: greedy decoding in compiled passes, see compile_decoder, which pays for many masks on a GPU: the first
        call for a batch size takes about a minute.
        In float32 the mask depends on none of these. In bfloat16, where rounding depends on the shape of a pass, 6 to 8
        of 200 masks of the default changed.
        stats: a dict to fill: "passes", transformer passes after the prefill; "mask_passes", for each mask the passes
        that it took part in; "prefill_ms", encoders included; "decode_ms".
        watch: chooses the tokens of a single mask in place of greedy decoding: a function (start, logits (n,K), guesses
        (n,) or None) -> tokens (n,), called once per pass for the mask tokens from place `start` on. Those after the
        first that differs from its guess are chosen again in the next pass.
        With scales, a pass writes all tokens of a scale, and beam, drafts and compiled are refused. ValueError.
        """
        B, M, device, draft = len(text_ids), self.config.mask_tokens, text_ids.device, draft or "none"
        seeds = seed if isinstance(seed, list) else [seed] * B
        check_decoding(self.config, B, decode, beams, top_k, top_p, temperature, seeds, draft, window, compiled)
        if watch and (B > 1 or decode != "greedy" or compiled):
            raise ValueError("watch is for one mask, decoded greedily and not compiled")
        if decode != "greedy" or self.config.scales:
            draft = "none"
        if draft == "auto":  # hidden makes a longer prefill, which a CPU that is busy with a full batch feels
            draft = "hidden" if self.config.hide and (device.type == "cuda" or B < 8) else "jacobi"
        window = min(M, window or draft_window(draft, B, device))
        start = clock(device)
        logits, cache, guesses = self.prefill(text_ids, pixels, M - 1 + window, draft == "hidden" and window > 1)
        prefilled = clock(device)
        if decode == "beam":
            tokens, mask_passes = decode_beam(self, logits, cache, beams)
        elif compiled:
            shape = B, window, cache.length
            if shape not in self.decoders:
                self.decoders[shape] = compile_decoder(self, cache, window)
            tokens, mask_passes = self.decoders[shape](cache, guesses)
        elif window > 1:
            if watch:
                guesses[:, 0] = watch(0, logits, None)
            tokens, mask_passes = decode_drafted(self, cache, guesses, window, watch)
        else:
            numbers = torch.stack([torch.rand(M, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
            numbers = numbers.to(device)  # (B,M), drawn on the CPU, so that every device gets the same ones

            def pick(logits, start):  # (B,n,K), of the mask tokens from `start` on -> (B,n)
                if watch:
                    return watch(start, logits[0], None)[None]
                if decode == "greedy":
                    return logits.argmax(-1)
                return draw(logits, decode, top_k, top_p, temperature, numbers[:, start:start + logits.shape[1]])

            tokens, mask_passes = decode_plain(self, logits, cache, text_ids, pick)
        if stats is not None:
            stats |= {"passes": max(mask_passes), "mask_passes": mask_passes,
                      "prefill_ms": 1000 * (prefilled - start), "decode_ms": 1000 * (clock(device) - prefilled)}
        return tokens

    def prefill(self, text_ids, pixels, more, guess=False):
        """Read the prefix -> logits (B,K) of mask token 0, a cache with room for `more` tokens, guesses (B,M), of which
        the first is the likeliest token. guess: read M - 1 hidden mask tokens in the same pass, which gives guesses of
        all mask tokens at once; without it the others are -1."""
        sequence = prefix = self.prefix(text_ids, pixels)
        (B, prefix_length, D), M = prefix.shape, self.config.mask_tokens
        cache = self.new_cache(prefix, more)
        if guess:  # zeros, as hide_tokens makes them in forward: each token is guessed from prefix and place alone
            sequence = torch.cat([prefix, prefix.new_zeros(B, M - 1, D)], dim=1)
        hidden = self.llama(sequence, cache, self.blocks(text_ids, sequence.shape[1]))
        cache.position = prefix_length  # takes back the hidden mask tokens
        logits = self.head(hidden[:, prefix_length - 1]).float()
        guesses = self.head(hidden[:, prefix_length - 1:]).argmax(-1) if guess else text_ids.new_full((B, M), -1)
        guesses[:, 0] = logits.argmax(-1)
        return logits, cache, guesses

    def new_cache(self, prefix, more):
        """An empty KVCache for the prefix (B,T,D) and `more` tokens after it. On a CPU it is in float32: attention to
        one in bfloat16 takes six times as long there (LOG.md)."""
        (B, T, _), device, dtype = prefix.shape, prefix.device, prefix.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        return KVCache(self.config.llama, B, T + more, device, torch.float32 if device.type == "cpu" else dtype)

    @torch.no_grad()
    def confidence(self, text_ids, pixels, tokens):
        """The probability that the model gives each of the mask tokens (B,M), given those before it: (B,M) float32."""
        return self(text_ids, pixels, tokens)[0].float().softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]

    @torch.no_grad()
    def mask_attention(self, text_ids, pixels, tokens, whole=False):
        """What each mask token (row) looks at among the mask tokens (columns) in the last layer, mean over heads:
        (B,M-1,M-1), for the last mask token is never read. The rest to 1 went to text and picture. Paper: Figure 5.
        whole: rows and columns of all tokens, (B,T,T), the mask tokens last."""
        prefix = self.prefix(text_ids, pixels)
        x = torch.cat([prefix, self.mask_inputs(tokens)[:, :tokens.shape[1] - 1]], dim=1)
        context, (*layers, last) = self.llama.context(x, blocks=self.blocks(text_ids, x.shape[1])), self.llama.layers
        for index, layer in enumerate(layers):
            x = layer(x, index, **context)
        q, k, _ = last.self_attn.queries_keys_values(last.input_layernorm(x), context["rope"])
        values = torch.eye(x.shape[1], device=x.device).expand(*k.shape[:2], -1, -1)  # so that the weights come out
        weights = attention(q.float(), k.float(), values, context["causal"], context["mask"]).mean(1)  # (B,T,T)
        return weights if whole else weights[:, prefix.shape[1]:, prefix.shape[1]:]

    def save_pretrained(self, path, dtype=None, weights=None):
        """Write `trained_state`, or `weights` that were gathered from several ranks, to one .safetensors whose header
        holds the config and, with name and hash, the frozen parts that are not written. dtype: store the weights so;
        None keeps them. ValueError after `fuse`."""
        if self.llama.fused or not self.trained_state():
            raise ValueError(f"{path}: fused or merged weights are not saved: load the model again")
        write_weights(self, path, self.file_format, dtype, weights)

    def load_trained_state(self, weights, assign=False, spread=lambda tensor, like: tensor):
        """Put back what `trained_state` gave; ValueError with the names that do not fit. assign: take the tensors
        themselves as the parameters instead of copying them. spread: train.spread, if the model may be sharded."""
        own = self.trained_state()
        problems = compare_weights(own, weights)
        if problems:
            raise ValueError(f"weights do not fit the model: {problems}")
        weights = {name: spread(w, own[name]) for name, w in weights.items()}
        self.load_state_dict(weights, strict=False, assign=assign)  # checked above: only what is frozen is absent


class LlamaSeg(MaskWriter):
    """Phrase and picture in, mask tokens out. encoder: a pretrained SigLIP of the shape config.siglip; None makes one
    with random weights. frozen: {"encoder": {"name", "sha256"}, "mask_tokenizer": ...}, trained with and not held."""

    file_format = "llamaseg"

    def __init__(self, config: LlamaSegConfig, encoder=None):
        super().__init__(config)
        D, K, siglip = config.llama.width, config.codebook_size, config.siglip
        if encoder is not None and encoder.config != siglip:
            raise ValueError(f"the encoder has the shape {encoder.config}, the model wants {siglip}")
        self.encoder = SigLIP(siglip) if encoder is None else encoder
        self.frozen = {"encoder": self.encoder.source} if config.freeze_encoders and self.encoder.source else {}
        self.text_adaptor = nn.Sequential(nn.Linear(siglip.text_width, D), nn.GELU(), nn.Linear(D, D))
        self.image_adaptor = nn.Sequential(nn.Linear(siglip.vision_width, D), nn.GELU(), nn.Linear(D, D))
        self.boi, self.bom = (nn.Parameter(torch.empty(D)) for _ in range(2))  # <BOI>, <BOM>: begin of image, of mask
        if config.scales:
            self.quantizer = None  # of the MultiScaleVQ, frozen: sample.Segmenter sets it
            self.scale_adaptor = nn.Linear(config.code_width, D)
            self.scale_embedding = nn.Embedding(len(config.scales), D)
            self.place_embedding = nn.Embedding(config.mask_tokens, D)
        else:
            self.mask_embedding = nn.Embedding(K, D)
        if config.patch_head:
            self.patch_head = nn.Linear(D, 1)
        self.llama = Llama(config.llama)
        self.head = nn.Linear(D, K, bias=False)
        self.head_std = 0.2 / math.sqrt(D)  # states have length sqrt(D): logits of std 0.2, first loss ln(K) + 0.02
        self.init_weights(skip=() if encoder is None else set(encoder.modules()))
        self.encoder.requires_grad_(not config.freeze_encoders)

    def prefix(self, text_ids, pixels):
        """All that stands before the first mask token: text_ids (B,L), pixels (b,3,S,S) -> (B,L+1+N+1,D). Each run of
        B/b phrases shares a picture, which is encoded once."""
        B, dtype = len(text_ids), self.boi.dtype  # a frozen encoder may be in bfloat16
        text = self.text_adaptor(self.encoder.encode_text(text_ids).to(dtype))  # (B,L,D)
        image = self.image_adaptor(self.encoder.encode_image(pixels).to(dtype))  # (b,N,D)
        image = image.repeat_interleave(B // len(pixels), dim=0)  # (B,N,D)
        boi, bom = self.boi.expand(B, 1, -1), self.bom.expand(B, 1, -1)
        return torch.cat([text, boi, image, bom], dim=1)

    def mask_inputs(self, tokens):
        """With scales: all tokens of some scales (B,m) -> what is read for the scales up to the next one, (B,m',D). It
        is what the coarser scales decode to, at the size of the next. <BOM> stands for the first scale."""
        if not self.config.scales:
            return self.mask_embedding(tokens)
        maps = self.quantizer.inputs(tokens).to(self.bom.dtype)  # (B,m',C)
        places = slice(1, 1 + maps.shape[1])
        scale_idx = self.scale_of(tokens.device)[places]
        return self.scale_adaptor(maps) + self.scale_embedding(scale_idx) + self.place_embedding.weight[places]

    def scale_of(self, device):
        """The scale of each mask token: (M,), from 0."""
        return torch.tensor([i for i, s in enumerate(self.config.scales) for _ in range(s * s)], device=device)

    def blocks(self, text_ids, length):
        """With scales that see all of themselves: their tokens have block ids in common. <BOM> is the first scale's."""
        prefix_length = self.config.siglip.text_length + self.config.siglip.image_tokens + 2
        if not self.config.scales or self.config.scale_attention == "causal" or length <= prefix_length:
            return None
        ids = self.scale_of(text_ids.device) + prefix_length - 1
        ids = torch.cat([torch.arange(prefix_length - 1, device=ids.device), ids])
        return ids[:length].expand(len(text_ids), -1)

    def prefix_loss(self, hidden, mask_tokens):
        """Of hidden (B,T,D), each image token's state tells whether its patch has something of the mask, so that what a
        phrase means is learned sooner. Paper: does not do this; the preset scenes does."""
        if not self.config.patch_head:
            return 0.0
        told = self.patch_head(hidden[:, -1 - self.config.siglip.image_tokens:-1])[:, :, 0]  # (B,N), N = M
        return F.binary_cross_entropy_with_logits(told.float(), (mask_tokens != 0).float())

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
        for weight, std in ((self.boi, 0.02), (self.bom, 0.02), (self.head.weight, self.head_std)):
            nn.init.normal_(weight, std=std)

    @torch.no_grad()
    def init_mask_tokens(self, codebook):
        """Start mask embedding and head from the l2-normalised rows of the mask tokenizer's codebook (K,C), through one
        fixed random projection, so that codes that look alike start alike. Paper: not stated; we use this."""
        generator = torch.Generator().manual_seed(0)  # the same on every rank
        projection = torch.randn(codebook.shape[1], self.config.llama.width, generator=generator)
        rows = F.normalize(codebook.detach().float().cpu(), dim=-1) @ projection  # (K,D) of variance 1
        if not self.config.scales:
            self.mask_embedding.weight.copy_(rows * 0.02)
        self.head.weight.copy_(rows * self.head_std)

    def fuse(self):
        """Lay out the weights for decoding, see Llama.fuse. Not for a model in training."""
        self.llama.fuse()
        self.head.weight.data = decoding_layout(self.head.weight.data)

    def trained_state(self):
        """The state dict without the quantizer and a frozen encoder from official files: what a checkpoint holds."""
        frozen = ("quantizer.", "encoder.") if self.config.freeze_encoders and self.encoder.source else ("quantizer.",)
        return {name: w for name, w in self.state_dict().items() if not name.startswith(frozen)}

    @classmethod
    def from_pretrained(cls, path, encoder=None, dtype=torch.float32, any_weights=False):
        """Read a file of `save_pretrained`, on the CPU, in `dtype` whatever it was stored in. encoder: directory of the
        frozen SigLIP, if the file names one; default: its name below WEIGHTS. any_weights: take an encoder other than
        the one of the training. FileNotFoundError, or ValueError in one line."""
        path, siglip = Path(path), None
        config, frozen, weights = read_own(path, cls.file_format, LlamaSegConfig, dtype)
        if config.freeze_encoders and "encoder" in frozen:
            siglip = SigLIP.from_pretrained(encoder or WEIGHTS / frozen["encoder"]["name"], dtype=dtype)
            if not any_weights:
                check_source(path, "encoder", frozen, siglip.source)
        elif encoder:
            raise ValueError(f"{path}: holds its own encoder, --encoder {encoder} has no use")
        model = without_numbers(lambda: cls(config, siglip))
        model.frozen = frozen
        with reading(path, "a whole LlamaSeg checkpoint"):
            model.load_trained_state(weights, assign=True)
        return model


# ---- Llama: the decoder ---------------------------------------------------------------------------------------------

UNSEEN = 2**62  # block id of padding, see Llama.forward: it is above all others, so only padding sees padding


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
        check_fields(self)


def attention(q, k, v, causal, mask=None):
    """softmax(q k^T / sqrt(hd)) v: q (B,nh,T,hd), k and v (B,nkv,keys,hd) -> (B,nh,T,hd). A token sees itself and all
    before if `causal`, else the keys where mask (B,1,T,keys) is True, or all of them."""
    if mask is None and written_out_is_faster(q, k):
        scores = (q @ k.mT).float() * q.shape[-1] ** -0.5  # (B,nh,T,T)
        if causal:
            scores = scores.masked_fill(q.new_ones(scores.shape[2:], dtype=torch.bool).triu(1), -math.inf)
        return scores.softmax(-1).type_as(v) @ v
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=k.shape[1] != q.shape[1])


class RMSNorm(nn.RMSNorm):
    """Zhang and Sennrich 2019, computed in float32 whatever comes in."""

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


class KVCache:
    """Keys and values of the tokens seen so far. The caller makes it, passes it to Llama and owns it.

    It is allocated once for `length` tokens and written in place: per layer (B,nkv,length,hd). `position`, the number
    of tokens seen, is a Python int that the host knows without waiting for the device. To take tokens back, lower it.
    """

    def __init__(self, config: LlamaConfig, batch, length, device=None, dtype=torch.float32):
        shape = (batch, config.kv_heads, length, config.head_dim)
        self.keys, self.values = ([torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)]
                                  for _ in range(2))
        self.rope = rope_tables(torch.arange(length, device=device), config.head_dim, config.rope_theta)
        self.blocks = torch.arange(length, device=device).repeat(batch, 1)  # block ids (B,length), see Llama.forward
        self.length, self.position, self.causal = length, 0, True  # causal: the block ids are the positions
        self.reach = length  # slots that passes with `slots` look at: the eager ones lower it, to look at fewer

    def update(self, layer, k, v, slots=None):
        """Write k, v (B,nkv,T,hd) of a layer at `position`; return all valid ones, (B,nkv,position+T,hd).
        slots: int64 (B,T), write there instead, of the first B rows, and return those below `reach`."""
        keys, values = self.keys[layer], self.values[layer]
        if slots is None:
            end = self.position + k.shape[2]
            keys[:, :, self.position:end] = k
            values[:, :, self.position:end] = v
            return keys[:, :, :end], values[:, :, :end]
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        keys[rows, :, slots] = k.transpose(1, 2).to(keys.dtype)
        values[rows, :, slots] = v.transpose(1, 2).to(values.dtype)
        return keys[:len(slots), :, :self.reach], values[:len(slots), :, :self.reach]

    def repeat(self, n):
        """From now on every row stands n times in a row (the beams of one example)."""
        self.keys, self.values = ([x.repeat_interleave(n, dim=0) for x in part] for part in (self.keys, self.values))
        self.blocks = self.blocks.repeat_interleave(n, dim=0)

    def copy_rows(self, sources, targets, start=0):
        """The rows `targets` go on from what `sources` hold; tokens before `start` must be common to both."""
        for x in self.keys + self.values:
            x[targets, :, start:] = x[sources, :, start:]
        self.blocks[targets] = self.blocks[sources]


class LlamaAttention(nn.Module):
    """Self-attention with rotary positions, with or without a KV cache."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.widths = [heads * config.head_dim for heads in (config.heads, config.kv_heads, config.kv_heads)]
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(config.width, width, bias=False) for width in self.widths)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.width, bias=False)
        self.qkv_proj = None  # stands for the first three after Llama.fuse

    def queries_keys_values(self, x, rope):
        """x (B,T,D) -> rotated q (B,nh,T,hd) and k (B,nkv,T,hd), and v (B,nkv,T,hd)."""
        if self.qkv_proj is None:
            qkv = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        else:
            qkv = self.qkv_proj(x).split(self.widths, dim=-1)
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in qkv)
        return rotate(q, *rope), rotate(k, *rope), v

    def forward(self, x, index, rope, causal, mask, cache, slots):
        """x (B,T,D) -> (B,T,D). index: of the layer, from 0; the rest is what Llama.context gives."""
        q, k, v = self.queries_keys_values(x, rope)
        if cache is not None:
            k, v = cache.update(index, k, v, slots)
        y = attention(q.to(k.dtype), k, v, causal, mask)  # a cache may be in float32 beside weights in bfloat16
        return self.o_proj(y.transpose(1, 2).flatten(2).to(x.dtype))


class LlamaMLP(nn.Module):
    """SwiGLU, Shazeer 2020."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(config.width, config.mlp, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(config.mlp, config.width, bias=False)
        self.gate_up_proj = None  # stands for the first two after Llama.fuse

    def forward(self, x):
        if self.gate_up_proj is None:
            gate, up = self.gate_proj(x), self.up_proj(x)
        else:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class LlamaBlock(nn.Module):
    """Attention, then the MLP, each on normalised input and added to the stream (pre-norm)."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.width, config.norm_eps)
        self.self_attn = LlamaAttention(config)
        self.post_attention_layernorm = RMSNorm(config.width, config.norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(self, x, index, **context):
        x = x + self.self_attn(self.input_layernorm(x), index, **context)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The transformer of LLaMA (Touvron et al. 2023) from embeddings to the final norm, with the parameter
    names that Hugging Face has below `model.`. Token embedding and output head belong to the caller.

    recompute: in training run each layer again in the backward pass instead of keeping what is inside (activation
    checkpointing, Chen et al. 2016): a third more arithmetic, a fraction of the memory.
    """

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config, self.recompute, self.fused = config, False, False
        self.layers = nn.ModuleList(LlamaBlock(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.width, config.norm_eps)

    def forward(self, embeddings, cache=None, blocks=None, slots=None):
        """embeddings (B,T,D) -> hidden states (B,T,D) after the final norm.

        A token sees all tokens whose block id is not above its own. blocks: int64 (B,T); None stands for the positions,
        which makes attention causal. Ids of scales would make it next-scale prediction. Padding has UNSEEN.
        With a cache the T embeddings continue the `cache.position` tokens that it holds, and join them; ValueError if
        it is full. slots: int64 (B,T), where in the first B rows of the cache each embedding stands instead, if rows
        are of unequal length; blocks must be None then, and `cache.position` stays. The slots above a row's own hold
        what is stale, and their block ids hide it. So the shapes of a pass do not depend on how many tokens there are.
        """
        context, x = self.context(embeddings, cache, blocks, slots), embeddings
        for index, layer in enumerate(self.layers):
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, index, use_reentrant=False, **context)
            else:
                x = layer(x, index, **context)
        if cache is not None and slots is None:
            cache.position += embeddings.shape[1]
        return self.norm(x)

    def context(self, embeddings, cache=None, blocks=None, slots=None):
        """What all layers of a pass share: where its tokens stand, and, decided here alone, what they see."""
        (B, T, _), start = embeddings.shape, 0
        if cache is None:
            rope = rope_tables(torch.arange(T, device=embeddings.device), self.config.head_dim, self.config.rope_theta)
            causal, keys, queries = blocks is None, blocks, blocks  # block ids of what is looked at, and of who looks
        elif slots is not None:
            rope = [table[slots][:, None] for table in cache.rope]  # (B,1,T,hd)
            causal, keys, queries = False, cache.blocks[:B, :cache.reach], cache.blocks[:B].gather(1, slots)
        else:
            start, end = cache.position, cache.position + T
            if end > cache.length:
                raise ValueError(f"{start} + {T} tokens do not fit a KV cache of {cache.length}")
            if blocks is not None:
                cache.blocks[:, start:end], cache.causal = blocks, False
            rope = [table[start:end] for table in cache.rope]  # (T,hd)
            causal, keys, queries = cache.causal, cache.blocks[:, :end], cache.blocks[:, start:end]
        if causal and (start == 0 or T == 1):
            causal, mask = start == 0, None  # PyTorch has a faster kernel for it. A single new token sees all.
        else:
            causal, mask = False, keys[:, None, None, :] <= queries[:, None, :, None]  # (B,1,T,keys)
        return {"rope": rope, "cache": cache, "slots": slots, "causal": causal, "mask": mask}

    def fuse(self):
        """Swap q, k and v for one linear layer, and gate and up for another, laid out for decoding. There is no way
        back, and the weights have other names then. ValueError if a layer has LoRA, which would be lost."""
        if any(isinstance(module, nn.Linear) and type(module) is not nn.Linear for module in self.modules()):
            raise ValueError("LoRA must be merged before the weights are fused")
        for layer in self.layers if not self.fused else ():
            layer.self_attn.qkv_proj = fuse_linear(layer.self_attn, "q_proj", "k_proj", "v_proj")
            layer.self_attn.o_proj.weight.data = decoding_layout(layer.self_attn.o_proj.weight.data)
            layer.mlp.gate_up_proj = fuse_linear(layer.mlp, "gate_proj", "up_proj")
        self.fused = True

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32):
        """Load a Hugging Face `LlamaForCausalLM` or `LlamaModel` directory, strictly, in eval mode, but for the token
        embedding and the output head. FileNotFoundError, or ValueError in one line."""
        directory = Path(directory)
        hf, path = read_config(directory), directory / "config.json"
        with reading(path, "the config of a LLaMA"):
            config = llama_config(hf, path)

        def wanted(name):
            dropped = ("embed_tokens.", "lm_head.")  # the caller's; inv_freq is computed, not learned
            return not name.removeprefix("model.").startswith(dropped) and not name.endswith(".inv_freq")

        weights = {name.removeprefix("model."): w for name, w in read_weights(directory, wanted).items()}
        return build_from(lambda: cls(config), weights, directory, dtype)


# ---- ways to decode: from what `prefill` returned to the mask tokens (B,M), and the passes that each mask took part in


def decode_plain(model, logits, cache, text_ids, pick):
    """One token per pass, or with scales all tokens of a scale (Tian et al. 2024), as `pick` of `generate` chooses."""
    tokens, passes = pick(logits[:, None], 0), 0  # (B,1)
    while tokens.shape[1] < model.config.mask_tokens:
        known = tokens.shape[1]
        if model.config.scales:
            inputs = model.mask_inputs(tokens)[:, known - 1:]  # (B,s*s,D), of the next scale
        else:
            inputs = model.mask_embedding(tokens[:, -1:])  # (B,1,D)
        blocks = model.blocks(text_ids, cache.position + inputs.shape[1])
        hidden = model.llama(inputs, cache, None if blocks is None else blocks[:, cache.position:])
        tokens = torch.cat([tokens, pick(model.head(hidden).float(), known)], dim=1)
        passes += 1
    return tokens, [passes] * len(tokens)


def draw(logits, decode, top_k, top_p, temperature, uniform):
    """Tokens (...) from logits (...,K) float32; see MaskWriter.generate for the ways to draw. uniform: (...) in [0, 1),
    the first token is drawn at which the summed probabilities exceed the number."""
    probs = ((logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)).softmax(-1)  # no infinity
    if decode in ("top-k", "top-p"):
        probs, index = probs.sort(dim=-1, descending=True, stable=True)
        if decode == "top-k":
            probs[..., top_k:] = 0
        else:
            before = probs.cumsum(-1) - probs  # what the likelier tokens have together
            probs[..., 1:].masked_fill_(before[..., 1:] >= top_p, 0)
    sums = probs.cumsum(-1)
    drawn = torch.searchsorted(sums, uniform[..., None] * sums[..., -1:], right=True)  # (...,1)
    if decode != "random":  # clamped, for a GPU may round sums of equal value differently
        drawn = index.gather(-1, drawn.clamp(max=(probs > 0).sum(-1, keepdim=True) - 1))
    return drawn[..., 0]


def decode_beam(model, logits, cache, beams):
    """The best mask tokens found by keeping the `beams` sequences of highest summed log-probability."""
    (B, K), M, prefix_length = logits.shape, model.config.mask_tokens, cache.position
    scores, token = logits.log_softmax(-1).topk(beams)  # (B,beams) summed log-probabilities, best first
    tokens = token.view(B * beams, 1)
    cache.repeat(beams)
    first_row = torch.arange(0, B * beams, beams, device=logits.device)[:, None]  # (B,1)
    for _ in range(M - 1):
        hidden = model.llama(model.mask_embedding(tokens[:, -1:]), cache)  # (B*beams,1,D)
        total = scores[:, :, None] + model.head(hidden).float().log_softmax(-1).view(B, beams, K)
        scores, index = total.flatten(1).topk(beams)  # (B,beams), index into beams*K
        rows = (first_row + index // K).flatten()  # the row that each new beam continues
        cache.copy_rows(rows, slice(None), start=prefix_length)
        tokens = torch.cat([tokens[rows], (index % K).view(-1, 1)], dim=1)
    return tokens.view(B, beams, M)[:, 0], [M - 1] * B


def decode_drafted(model, cache, guesses, window, watch=None):
    """Drafted greedy decoding, up to `window` tokens per pass. For one mask, until all M tokens are sure:

        1. Guess the tokens after the sure ones.
        2. Read the last sure token and the guesses in one causal pass, and choose the likeliest token after each.
        3. The choices are sure up to the first that differs from its guess, this one included.
        4. The later choices are guesses of the next pass.
    The masks are those of decode_plain, for a choice is right if the guesses before it were. (Stern et al. 2018,
    "Blockwise Parallel Decoding"; Santilli et al. 2023, Jacobi decoding.)

    guesses: (B,M), of which the first is sure. With draft "hidden", what the model chose with all mask tokens hidden;
    with "jacobi", -1: the first guess of a token is the one above it in the mask, for a mask resembles its row above.
    In a batch each mask advances at its own pace, and a mask that is done leaves.
    """
    B, M = guesses.shape
    tokens = F.pad(guesses, (0, window), value=-1)  # room: a row near its end chooses beyond M, which nobody reads
    sure = guesses.new_ones(B, 1)  # of each row: how many tokens are sure
    result, passes = torch.empty_like(guesses), [0] * B
    masks, counts, width = list(range(B)), [1] * B, window  # of each row: its place in the batch, `sure` on the host
    while masks:
        width = min(width, M - min(counts))
        cache.reach = cache.position + max(counts) + width - 1
        sure = drafted_pass(model, cache, tokens, sure, width, watch)
        before, counts = sum(counts), sure.flatten().tolist()  # the host waits here, once per pass
        gained = (sum(counts) - before) / len(counts)
        width = min(window, max(window // 2, math.ceil(2 * gained) + 2))  # narrower where few were right; measured
        for mask in masks:
            passes[mask] += 1
        done = [row for row, count in enumerate(counts) if count >= M]
        if done:
            result[[masks[row] for row in done]] = tokens[done, :M]
            stay = leave(cache, len(masks), done)
            tokens, sure = tokens[stay], sure[stay]
            masks, counts = [masks[row] for row in stay], [counts[row] for row in stay]
    return result, passes


def drafted_pass(model, cache, tokens, sure, width, watch=None):
    """Steps 1 to 3: write `width` choices into each row of tokens (rows,M+window), from its place sure (rows,1) on;
    return how many tokens are sure then, (rows,1). Of a row that is done, the choices are beyond M."""
    M, grid = model.config.mask_tokens, model.config.mask_grid
    places = sure.clamp(max=M) + torch.arange(width, device=sure.device)  # (rows,width): of the choices
    # An unknown token is guessed from the nearest known one above it in the mask, as few rows up as lead there; in the
    # first row of the mask, which has none above, from the last known token.
    known = (tokens >= 0).sum(1, keepdim=True)
    above = places - grid * ((places - known) // grid + 1)
    above = torch.where(above < 0, known - 1, above)
    guesses = tokens.gather(1, torch.where(places < known, places, above))
    # Slot cache.position + t of the cache holds mask token t, and reading it chooses token t + 1. The last guess need
    # not be read: whether it was right does not matter.
    inputs = torch.cat([tokens.gather(1, places[:, :1] - 1), guesses[:, :-1]], dim=1)
    hidden = model.llama(model.mask_embedding(inputs), cache, slots=cache.position + places - 1)
    logits = model.head(hidden).float()  # (rows,width,K)
    chosen = watch(sure.item(), logits[0], guesses[0])[None] if watch else logits.argmax(-1)  # (rows,width)
    tokens.scatter_(1, places, chosen)
    right = (guesses == chosen)[:, :-1].cumprod(1).sum(1, keepdim=True)  # before the first wrong one
    return places[:, :1] + right + 1


def leave(cache, count, done):
    """Close the gaps that the rows `done` leave in a cache of `count` rows, each with the last row that goes on;
    return the rows that go on, in their new order."""
    rows = list(range(count))
    for row in reversed(done):
        rows[row] = rows[-1]
        rows.pop()
    moved = [row for row, source in enumerate(rows) if source != row]
    cache.copy_rows([rows[row] for row in moved], moved)
    return rows


@torch.inference_mode(False)  # tensors and passes that fit every mode; it allows gradients
@torch.no_grad()
def compile_decoder(model, example, window):
    """A function like decode_drafted, whose passes all have the shapes of the cache `example`: a pass is one compiled
    graph and, on a GPU, one CUDA graph.

    The masks are the same; one that is done continues past its end, into places that nobody reads. A CUDA graph finds
    its tensors by their addresses, so they are kept from call to call, and the model's weights must stay in place.
    """
    own, (B, M), device = copy.deepcopy(example), (len(example.blocks), model.config.mask_tokens), example.blocks.device
    tokens, sure, passes = (torch.zeros(B, n, dtype=torch.long, device=device) for n in (M + window, 1, 1))

    def one_pass():
        passes.add_(sure < M)
        sure.copy_(drafted_pass(model, own, tokens, sure, window))

    step = torch.compile(one_pass, fullgraph=True, dynamic=False)
    if device.type == "cuda":
        step = cuda_graph(step, device)

    @torch.inference_mode(False)
    @torch.no_grad()
    def decode(cache, guesses):
        for mine, theirs in zip([*own.keys, *own.values, own.blocks], [*cache.keys, *cache.values, cache.blocks]):
            mine.copy_(theirs)
        tokens.copy_(F.pad(guesses, (0, window), value=-1))
        sure.fill_(1)
        passes.zero_()
        for _ in range(M - 1):
            step()
            if window > 1 and (sure >= M).all():  # the host waits here, once per pass
                break
        return tokens[:, :M].clone(), passes.flatten().tolist()

    return decode


def cuda_graph(step, device):
    """Record what `step` does on a GPU; the function that is returned does it again with one launch."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles it, and makes what a recording may not make
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
    return graph.replay


def check_decoding(config, B, decode, beams, top_k, top_p, temperature, seeds, draft, window, compiled):
    """ValueError unless `generate` can do what its arguments ask for."""
    K, drafted = config.codebook_size, decode == "greedy" and not config.scales
    decodes = [name for name in DECODES if name != "beam" or not config.scales]
    drafts = DRAFTS if drafted else ("auto", "none")
    known_seeds = len(seeds) == B and all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)
    for name, value, fits, expected in (
        ("decode", decode, decode in decodes, f"one of {', '.join(decodes)}"),
        ("draft", draft, draft in drafts, f"one of {', '.join(drafts)} where decode is {decode}"),
        ("window", window, window in (None, 1) or window > 1 and drafted and draft != "none",
         "at least 1, and no more without a draft"),
        ("compiled", compiled, drafted or not compiled, f"False where decode is {decode}"),
        ("beams", beams, 1 <= beams <= K, f"1 to {K}, the codebook size"),
        ("top_k", top_k, 1 <= top_k <= K, f"1 to {K}, the codebook size"),
        ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        ("temperature", temperature, temperature > 0, "above 0"),
        ("seed", seeds, known_seeds, f"an int from 0 to 2^63 - 1, or {B} of them"),
    ):
        if not fits:
            raise ValueError(f"{name} is {value!r:.100}, expected {expected}")


# ---- What each device does fastest, as measured (LOG.md). Nothing here changes a result beyond rounding. ------------


def written_out_is_faster(q, k):
    """Training in bfloat16 on a CPU, at the lengths of the small presets (153 tokens): the fused kernel's backward pass
    is slower there. At 577 tokens four plain lines made the whole step 1.4 times as long."""
    training = q.requires_grad and q.device.type == "cpu" and q.dtype == torch.bfloat16
    return training and q.shape[2] <= 384 and k.shape[1] == q.shape[1]


def decoding_layout(weight):
    """A matrix (out,in), by columns where a product with one vector reads it a fifth faster so: float32 on a CPU."""
    by_columns = weight.device.type == "cpu" and weight.dtype == torch.float32 and weight.shape[0] >= weight.shape[1]
    return weight.t().contiguous().t() if by_columns else weight


def fuse_linear(part, *names):
    """Take the linear layers `names` out of `part`. The layer that is returned gives their outputs side by side."""
    weight = torch.cat([getattr(part, name).weight.data for name in names])
    for name in names:
        delattr(part, name)
    fused = nn.Linear(*weight.shape[::-1], bias=False, device="meta")  # no memory for a weight that is replaced
    fused.weight = nn.Parameter(decoding_layout(weight), requires_grad=False)
    return fused


def draft_window(draft, batch, device):
    """Tokens per pass that decode fastest: a CPU pays for each of them, a GPU hardly."""
    most = {"none": 1, "jacobi": 16, "hidden": 64}[draft]
    return most if device.type == "cuda" else min(most, max(8, 96 // batch))


# ---- SigLIP: the picture encoder and the phrase encoder -------------------------------------------------------------


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
        check_fields(self)
        if self.vision_width % self.vision_heads or self.text_width % self.text_heads:
            raise ValueError(f"vision_width {self.vision_width} or text_width {self.text_width} is no multiple of "
                             f"vision_heads {self.vision_heads} or text_heads {self.text_heads}")

    @property
    def image_tokens(self):
        return (self.image_size // self.patch_size) ** 2  # N; a rest that fills no patch is left out


class SigLIPAttention(nn.Module):
    """Every token looks at every token, padding included, as in SigLIP's training: there is no mask."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x):  # (B,T,D)
        qkv = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in qkv)  # (B,nh,T,hd)
        return self.out_proj(attention(q, k, v, causal=False).transpose(1, 2).flatten(2))


class SigLIPBlock(nn.Module):
    """Pre-norm transformer block; pictures and phrases use the same one."""

    def __init__(self, width, heads, mlp, norm_eps, gelu):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.self_attn = SigLIPAttention(width, heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = nn.Sequential(OrderedDict(fc1=nn.Linear(width, mlp), gelu=nn.GELU(gelu), fc2=nn.Linear(mlp, width)))

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SigLIP(nn.Module):
    """The two encoders of SigLIP (Zhai et al. 2023) and of fixed-resolution SigLIP 2, with the parameter names of
    Hugging Face. Their pooling heads are absent: LlamaSeg reads the last hidden states. text: False leaves out the
    phrase encoder. source: {"name", "sha256"} of the official weights that from_pretrained read."""

    def __init__(self, config: SigLIPConfig, text=True):
        super().__init__()
        self.config, self.source = config, None
        self.vision_model = self.tower("vision", "post_layernorm", {
            # only holds the official (D,3,P,P) weight; encode_image says why it is not called
            "patch_embedding": nn.Conv2d(3, config.vision_width, config.patch_size, stride=config.patch_size),
            "position_embedding": nn.Embedding(config.image_tokens, config.vision_width),
        })
        if text:
            self.text_model = self.tower("text", "final_layer_norm", {
                "token_embedding": nn.Embedding(config.vocab_size, config.text_width),
                "position_embedding": nn.Embedding(config.text_length, config.text_width),
            })

    def tower(self, name, last_norm, embeddings):
        c = self.config
        width, layers, heads, mlp = (getattr(c, f"{name}_{size}") for size in ("width", "layers", "heads", "mlp"))
        blocks = nn.Sequential(*(SigLIPBlock(width, heads, mlp, c.norm_eps, c.gelu) for _ in range(layers)))
        return nn.ModuleDict({"embeddings": nn.ModuleDict(embeddings), "encoder": nn.ModuleDict({"layers": blocks}),
                              last_norm: nn.LayerNorm(width, eps=c.norm_eps)})

    def encode_image(self, pixels):
        """pixels (B,3,S,S) float in [-1,1] -> image tokens (B,N,D), raster order, after the final norm; ValueError."""
        S, P = self.config.image_size, self.config.patch_size
        if pixels.dim() != 4 or pixels.shape[1:] != (3, S, S):
            raise ValueError(f"pixels have shape {tuple(pixels.shape)}, want (B, 3, {S}, {S})")
        model = self.vision_model
        patch = model.embeddings.patch_embedding
        # A convolution whose stride is its size is a matrix product over patches, much faster so on a CPU.
        x = F.unfold(pixels.to(patch.weight.dtype), P, stride=P).mT  # (B,N,3*P*P)
        x = F.linear(x, patch.weight.flatten(1), patch.bias) + model.embeddings.position_embedding.weight  # (B,N,D)
        return model.post_layernorm(model.encoder.layers(x))

    def encode_text(self, text_ids):
        """text_ids (B,L) in [0, vocab_size), padded to L -> text tokens (B,L,D) after the final norm; ValueError."""
        L, model = self.config.text_length, self.text_model
        if text_ids.dim() != 2 or text_ids.shape[1] != L:
            raise ValueError(f"text_ids have shape {tuple(text_ids.shape)}, want (B, {L})")
        x = model.embeddings.token_embedding(text_ids) + model.embeddings.position_embedding.weight  # (B,L,D)
        return model.final_layer_norm(model.encoder.layers(x))

    @classmethod
    def from_pretrained(cls, directory, dtype=torch.float32):
        """Load a Hugging Face directory (config.json, model.safetensors, sharded or not), strictly, in eval mode;
        FileNotFoundError, or ValueError in one line."""
        directory = Path(directory)
        config = siglip_config(directory)

        def wanted(name):  # no output that we use depends on the pooling heads and the contrastive scale
            dropped = ("vision_model.head.", "text_model.head.", "logit_scale", "logit_bias")
            return not name.startswith(dropped) and not name.endswith(".position_ids")

        weights = read_weights(directory, wanted)
        model = build_from(lambda: cls(config), weights, directory, dtype)
        model.source = {"name": directory.absolute().name, "sha256": fingerprint(weights)}
        return model


# ---- configs: official ones and presets -----------------------------------------------------------------------------


def siglip_config(directory):
    """SigLIPConfig of a Hugging Face directory; ValueError if it is of another kind, NaFlex for one."""
    hf, path = read_config(directory), directory / "config.json"
    with reading(path, "the config of SigLIP or of a fixed-resolution SigLIP 2"):
        check_config(path, {"model_type": None, **hf}, {"model_type": "siglip"})
        vision, text = hf.get("vision_config") or {}, hf.get("text_config") or {}
        # the numbers here: what the official class takes where the file leaves a field out
        sizes = {"image_size": vision.get("image_size", 224), "patch_size": vision.get("patch_size", 16),
                 "vocab_size": text.get("vocab_size", 32000), "text_length": text.get("max_position_embeddings", 64)}
        for name, tower in (("vision", vision), ("text", text)):
            check_config(path, tower, {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6, "num_channels": 3})
            for size, official, default in (("width", "hidden_size", 768), ("layers", "num_hidden_layers", 12),
                                            ("heads", "num_attention_heads", 12), ("mlp", "intermediate_size", 3072)):
                sizes[f"{name}_{size}"] = tower.get(official, default)
        return SigLIPConfig(**sizes)


def llama_config(hf, path):
    """LlamaConfig of the fields that Hugging Face has in `path`, inside `reading`."""
    check_config(path, hf, {"model_type": "llama", "hidden_act": "silu", "attention_bias": False, "mlp_bias": False})
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    check_config(path, rope, {"rope_type": "default", "type": "default"})
    return LlamaConfig(
        width=hf.get("hidden_size", 4096), layers=hf.get("num_hidden_layers", 32),
        heads=hf.get("num_attention_heads", 32), kv_heads=hf.get("num_key_value_heads"),
        head_dim=hf.get("head_dim"), mlp=hf.get("intermediate_size", 11008),
        rope_theta=hf.get("rope_theta", rope.get("rope_theta", 10000.0)), norm_eps=hf.get("rms_norm_eps", 1e-6))


# The released fixed-resolution SigLIP 2 models, by the names that `python weights.py download` knows. A shape holds
# width, layers, heads and mlp of both towers.
SIGLIP2 = {
    f"siglip2-{name}-patch16-{image_size}": SigLIPConfig(image_size, 16, *shape, 256000, 64, *shape)
    for name, *shape in (("base", 768, 12, 12, 3072), ("large", 1024, 24, 16, 4096), ("so400m", 1152, 27, 16, 4304))
    for image_size in (256, 384)
}


def _paper(layers, width, heads, image_size):
    """A LlamaSeg of the paper, which gives layers, width, heads and 770M or 1.5B parameters. Paper: the size of SigLIP2
    and the MLP are not stated; we use large, and 8/3 of the width, as LLaMA and LlamaGen do."""
    return LlamaSegConfig(
        siglip=SIGLIP2[f"siglip2-large-patch16-{image_size}"],
        llama=LlamaConfig(width=width, layers=layers, heads=heads, mlp=width * 8 // 3, norm_eps=1e-5),
        codebook_size=16384, mask_grid=image_size // 16)


PRESETS = {  # by name; mllm.py has its own
    # Drawn scenes, everything trained from scratch: 10.2 million parameters, 20 MB in float16.
    "scenes": LlamaSegConfig(
        siglip=SigLIPConfig(
            image_size=128, patch_size=16, vision_width=256, vision_layers=6, vision_heads=4, vision_mlp=768,
            vocab_size=768, text_length=24, text_width=128, text_layers=2, text_heads=2, text_mlp=384,
        ),
        # rope_theta: the sequence has 153 tokens; Llama's 10000 is meant for thousands
        llama=LlamaConfig(width=256, layers=4, heads=4, mlp=704, rope_theta=1000.0),
        codebook_size=4096, mask_grid=8, freeze_encoders=False, patch_head=True,
    ),
    # The paper's models, at 256 px with 256 mask tokens and at 384 px with 576. Not trained here: README has the table.
    "llamaseg-b": _paper(layers=16, width=1920, heads=20, image_size=256),
    "llamaseg-l": _paper(layers=22, width=2304, heads=32, image_size=256),
    "llamaseg-b-384": _paper(layers=16, width=1920, heads=20, image_size=384),
    "llamaseg-l-384": _paper(layers=22, width=2304, heads=32, image_size=384),
}
PRESETS["scenes-next-scale"] = replace(PRESETS["scenes"], patch_head=False, scales=(1, 2, 3, 4, 6, 8))


# ---- helpers: clock, memory, device, dtype --------------------------------------------------------------------------


def clock(device):
    """Seconds, after everything queued on the device is done."""
    if device.type in ("cuda", "mps"):
        getattr(torch, device.type).synchronize()
    return time.perf_counter()


def peak_memory(device):
    """Bytes: of the GPU, as PyTorch's allocator counts them; on a CPU the most that the process has had at once."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def pick_device(name="auto"):
    """"auto" (cuda, else mps, else cpu) or a device's name -> torch.device; ValueError if it is not there."""
    cuda = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))] if torch.cuda.is_available() else []
    there = [*cuda, *(["mps"] if torch.backends.mps.is_available() else []), "cpu"]
    if name != "auto" and name not in there:
        raise ValueError(f"device {name!r} is not there, choose from auto, {', '.join(there)}")
    return torch.device(there[0] if name == "auto" else name)


def compute_dtype(device, name="auto"):
    """"auto", "bfloat16" or "float32" -> the dtype for autocast on a device, and why, as a phrase to print."""
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name], "as asked"
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, f"{torch.cuda.get_device_name(device)} multiplies bfloat16 in hardware"
    # PyTorch has no public question for this yet; without the private one, float32 is the safe answer.
    questions = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    if device.type == "cpu" and any(getattr(torch.cpu, question, bool)() for question in questions):
        return torch.bfloat16, "this CPU multiplies bfloat16 in hardware"
    return torch.float32, f"no fast bfloat16 on this {device.type}"
