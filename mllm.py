"""Pretrained MLLMs that write masks: Janus-Pro with LoRA, its chat and its text tokenizer.

Shapes as in model.py: B batch, L text tokens, N image tokens, M mask tokens, T tokens of a sequence, D width,
S side of the picture, K codebook size, r rank of LoRA.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import (
    UNSEEN,
    Llama,
    LlamaConfig,
    MaskWriter,
    SigLIP,
    SigLIPConfig,
    check_indices,
    check_numbers,
    llama_config,
    phrases_per_picture,
)
from weights import (
    WEIGHTS,
    build_from,
    check_config,
    check_source,
    fingerprint,
    read_config,
    read_own,
    read_weights,
)

# ----------------------------------------------------------------------------------------------------------
# LoRA


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
        with torch.device("meta"):  # no memory for a weight that is replaced
            linear = nn.Linear(self.in_features, self.out_features)
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return linear


LORA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def add_lora(llama, rank, alpha, dropout, targets):
    """Put LoRALinear in place of the layers of `llama` that `targets` names; ValueError for an unknown one."""
    unknown = [name for name in targets if name not in LORA_TARGETS]
    if unknown or not targets:
        raise ValueError(f"LoRA targets {', '.join(unknown) or 'none'}, choose from {', '.join(LORA_TARGETS)}")
    if not (type(rank) is int and 1 <= rank <= llama.config.width and 0 < alpha < math.inf and 0 <= dropout < 1):
        raise ValueError(f"LoRA rank {rank}, alpha {alpha}, dropout {dropout}: want an integer from 1 to the model's "
                         f"width {llama.config.width}, above 0, in [0, 1)")
    for part in [part for layer in llama.layers for part in (layer.self_attn, layer.mlp)]:
        for name in [name for name, _ in part.named_children() if name in targets]:
            setattr(part, name, LoRALinear(getattr(part, name), rank, alpha, dropout))


# ----------------------------------------------------------------------------------------------------------
# Janus-Pro


@dataclass
class JanusConfig:
    """Shape of a Janus model; the defaults are Janus-Pro-1B's."""

    siglip: SigLIPConfig = field(default_factory=lambda: SigLIPConfig(
        image_size=384, vision_width=1024, vision_layers=24, vision_heads=16, vision_mlp=4096, gelu="none"))
    llama: LlamaConfig = field(default_factory=lambda: LlamaConfig(
        width=2048, layers=24, heads=16, mlp=5632, norm_eps=1e-6))
    vocab_size: int = 102400
    codebook_size: int = 16384
    code_width: int = 8  # of the embedding of generated image tokens
    head_width: int = 2048  # between the two layers of the generation head
    projector_layers: int = 2  # of both aligners
    hide: bool = False  # as in LlamaSegConfig
    image_id: int = 100581  # <image_placeholder>
    pad_id: int = 100015
    lora: dict | None = None  # rank, alpha, dropout, targets

    def __post_init__(self):
        if isinstance(self.siglip, dict):
            self.siglip = SigLIPConfig(**self.siglip)
        if isinstance(self.llama, dict):
            self.llama = LlamaConfig(**self.llama)
        check_numbers(self)

    @property
    def mask_grid(self):
        """Masks have the side of the pictures, 16 pixels a token."""
        return self.siglip.image_size // 16

    @property
    def mask_tokens(self):
        """M"""
        return self.mask_grid**2


# the paper's second model; its shape is read from the official directory
PRESETS = {"llamaseg-janus": JanusConfig()}


def projector(inside, outside, layers):
    """Janus' `mlp_gelu`: linear layers with the exact GELU between them."""
    modules = [nn.Linear(inside, outside)]
    for _ in range(layers - 1):
        modules += [nn.GELU(), nn.Linear(outside, outside)]
    return nn.Sequential(*modules)


class JanusSeg(MaskWriter):
    """Janus-Pro (Chen et al. 2025) as a segmenter, the paper's second model: it reads phrase and picture as in a chat
    and writes the mask with the parts that it has for generating pictures. Only LoRA on its LLaMA is trained; paper:
    rank and targets are not stated, see train.py.

    The prompt, text_ids, comes whole from tokenizer.JanusPrompt: padding at the left, begin of sentence,
    `<|User|>: phrase<begin_of_image>` N placeholders `<end_of_image>\n\n<|Assistant|>:<begin_of_image>`. Paper: which
    token begins the mask is not stated; we use the `<begin_of_image>` that Janus knows. No classifier-free guidance.
    """

    file_format = "janusseg"

    def __init__(self, config: JanusConfig):
        super().__init__()
        self.config, self.frozen = config, {}
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

    def blocks(self, text_ids, length):
        """Block ids (B,length), see Llama.forward: the position, and UNSEEN for the padding at the left."""
        positions = torch.arange(length, device=text_ids.device).expand(len(text_ids), -1)
        padding = (text_ids == self.config.pad_id).cumprod(1).sum(1, keepdim=True)  # (B,1) how many there are
        return positions.masked_fill(positions < padding, UNSEEN)

    def prefix(self, text_ids, pixels, text_features=None):
        """text_ids (B,L) with N image_id in each row, pixels (b,3,S,S) -> (B,L,D); B/b rows share a picture.

        ValueError if a row has another number of places for the picture.
        """
        N, shared = self.config.siglip.image_tokens, phrases_per_picture(text_ids, pixels)
        places = text_ids == self.config.image_id  # (B,L)
        if text_ids.device.type == "cpu" and not torch.compiler.is_compiling() and (places.sum(1) != N).any():
            raise ValueError(f"text_ids have {places.sum(1).tolist()} image placeholders ({self.config.image_id}), "
                             f"want {N} in each row")
        check_indices("text_ids", text_ids, self.config.vocab_size)
        with torch.no_grad():
            image = self.encode_image(pixels).repeat_interleave(shared, dim=0)  # (B,N,D)
            words = self.token_embedding(text_ids)  # (B,L,D)
            return words.masked_scatter(places[:, :, None], image.to(words.dtype))

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

    def add_lora(self, rank=16, alpha=32, dropout=0.0, targets=LORA_TARGETS):
        """Freeze all and add LoRA to the LLaMA: only lora_a and lora_b receive gradients."""
        self.requires_grad_(False)
        add_lora(self.llama, rank, alpha, dropout, targets)
        self.config.lora = {"rank": rank, "alpha": alpha, "dropout": dropout, "targets": list(targets)}

    def lora_layers(self):
        return [layer for layer in self.llama.modules() if isinstance(layer, LoRALinear)]

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

    @classmethod
    def from_pretrained(cls, path, base=None, dtype=torch.float32, any_weights=False):
        """Load an official Janus directory (config.json; pytorch_model.bin or .safetensors, sharded or not), strictly;
        or a file of `save_pretrained` on its base, by default the directory of its name below WEIGHTS. In eval mode.

        FileNotFoundError, or ValueError with one line that names file, tensor, expected and found; also if the base
        is another one, unless any_weights.
        """
        path = Path(path)
        if path.is_dir() or not path.suffix:
            return cls._from_directory(path, dtype)
        config, frozen, weights = read_own(path, cls.file_format, JanusConfig, torch.float32)  # LoRA stays in float32
        if "mllm" not in frozen:
            raise ValueError(f"{path}: its header does not name the Janus model that it belongs to")
        model = cls._from_directory(Path(base) if base else WEIGHTS / frozen["mllm"]["name"], dtype)
        if not any_weights:
            check_source(path, "mllm", frozen, model.frozen["mllm"])
        try:
            model.add_lora(**config.lora)
            model.load_trained_state(weights)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None
        model.config.hide, model.frozen = config.hide, frozen
        return model.eval()

    @classmethod
    def _from_directory(cls, directory, dtype):
        config = janus_config(directory)

        def wanted(name):  # the pooling head has no use here; the image tokenizer is VQGAN.from_pretrained's
            return not name.startswith(("vision_model.vision_tower.attn_pool.", "gen_vision_model."))

        weights = janus_names(read_weights(directory, wanted))
        model = build_from(lambda: cls(config), weights, directory, dtype)
        model.frozen = {"mllm": {"name": directory.absolute().name, "sha256": fingerprint(weights)}}
        return model.requires_grad_(False)


# official prefix: ours
JANUS_NAMES = {
    "language_model.model.embed_tokens.": "token_embedding.", "language_model.model.": "llama.",
    "language_model.lm_head.": "lm_head.", "aligner.layers.": "aligner.", "gen_embed.": "gen_embed.",
    "gen_aligner.layers.": "gen_aligner.", "gen_head.output_mlp_projector.": "gen_head.0.",
    "gen_head.vision_head.": "gen_head.2.",
}


JANUS_TOWER = {
    "vision_model.vision_tower.": "vision.vision_model.", "patch_embed.proj.": "embeddings.patch_embedding.",
    "pos_embed": "embeddings.position_embedding.weight", "blocks.": "encoder.layers.", ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.", ".attn.proj.": ".self_attn.out_proj.",
    "vision_model.norm.": "vision_model.post_layernorm.",
}


def janus_names(weights):
    """Official tensors under our names; a fused qkv becomes three views. Unknown names stay, to be reported."""
    ours = {}
    for name, w in weights.items():
        if name.startswith("vision_model.vision_tower."):
            for official, own in JANUS_TOWER.items():
                name = name.replace(official, own)
            if ".attn.qkv." in name and w.shape[0] % 3 == 0:
                for part, piece in zip("qkv", w.chunk(3)):
                    ours[name.replace(".attn.qkv.", f".self_attn.{part}_proj.")] = piece
                continue
            ours[name] = w[0] if name.endswith("position_embedding.weight") and w.dim() == 3 else w
        else:
            official = next((prefix for prefix in JANUS_NAMES if name.startswith(prefix)), "")
            ours[JANUS_NAMES.get(official, "") + name.removeprefix(official)] = w
    return ours


def janus_config(directory):
    """JanusConfig of an official directory: config.json, and, if it is there, tokenizer.json for special tokens' ids.

    ValueError for a kind of projector, tower or image tokenizer that this code has not.
    """
    hf, path = read_config(directory), directory / "config.json"
    check_config(path, hf, {"model_type": "multi_modality"})
    parts = {}
    for part, expected in (("vision", "CLIPVisionTower"), ("aligner", "MlpProjector"), ("gen_vision", "VQ-16"),
                           ("gen_aligner", "MlpProjector"), ("gen_head", "vision_head")):  # fmt: skip
        try:
            parts[part] = dict(hf[f"{part}_config"]["params"])
            check_config(path, {f"{part}_config.cls": hf[f"{part}_config"]["cls"]}, {f"{part}_config.cls": expected})
        except (KeyError, TypeError):
            raise ValueError(f"{path}: has no {part}_config with cls and params") from None
    vision, aligner, language = parts["vision"], parts["aligner"], hf.get("language_config") or {}
    if not isinstance(language, dict):
        raise ValueError(f"{path}: language_config is {language!r:.100}, expected an object")
    check_config(path, vision, {"model_name": "siglip_large_patch16_384", "select_feature": "same", "select_layer": -1})
    for part in ("aligner", "gen_aligner"):
        check_config(path, parts[part], {"projector_type": "mlp_gelu", "depth": aligner.get("depth", 2)})
    width = vision.get("width", 1024)
    try:
        config = JanusConfig(
            siglip=SigLIPConfig(
                image_size=vision.get("image_size", 384), patch_size=vision.get("patch_size", 16), vision_width=width,
                vision_layers=vision.get("layers", 24), vision_heads=vision.get("heads", 16),
                vision_mlp=int(width * vision.get("mlp_ratio", 4)), gelu="none"),
            llama=llama_config(language, path), vocab_size=language.get("vocab_size", 32000),
            codebook_size=parts["gen_head"].get("image_token_size", 16384),
            code_width=parts["gen_vision"].get("n_embed", 8),
            head_width=parts["gen_head"].get("image_token_embed", 2048),
            projector_layers=aligner.get("depth", 2),
        )  # fmt: skip
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"{path}: {error}".replace(f"{path}: {path}", str(path))) from None
    if (directory / "tokenizer.json").is_file():
        try:
            added = json.loads((directory / "tokenizer.json").read_bytes())["added_tokens"]
            ids = {token["content"]: token["id"] for token in added}
            config.image_id, config.pad_id = ids["<image_placeholder>"], ids["<｜▁pad▁｜>"]
            check_numbers(config)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{directory / 'tokenizer.json'}: no special token {error}") from None
    return config


# ----------------------------------------------------------------------------------------------------------
# text


class BPETokenizer:
    """Byte-level BPE of DeepSeek-LLM's kind (Janus-Pro) from a Hugging Face tokenizer.json, with the same ids.

    encode cuts the added tokens out of the text, splits the rest by the file's patterns, one after the other, and
    lets tiktoken merge the bytes of each piece. decode(encode(text)) is the text, byte for byte. The file's
    post-processor is not applied: no BOS, no EOS. ValueError on anything in the file that is not known here.

    special_tokens: {name: id} of all added tokens, "<|User|>" and the like; ids are 0 .. vocab_size - 1.
    """

    # A Split's regular expression: literals, \s and [classes of literals], each bare or with ? * or +, and $ at the
    # end. Python reads these as Hugging Face's Oniguruma does, but for \s, which is Unicode's White_Space there.
    escape = r"\\[]\[(){}.*+?|^$/&~rnt-]"
    literal, in_class = rf"(?:{escape}|[^]\[(){{}}.*+?|^$\\])", rf"(?:{escape}|[^]\[\\&^-])"
    known_pattern = re.compile(rf"(?:(?:{literal}|\\s|\[\^?(?:{in_class}(?:-{in_class})?)+])[?*+]?)+\$?")
    white_space = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"

    @classmethod
    def from_json(cls, path):
        """path: a tokenizer.json or the folder it lies in."""
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such text tokenizer (a tokenizer.json)")
        try:
            return cls(json.loads(path.read_bytes()))
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError, re.error) as error:
            what = error if isinstance(error, ValueError) else repr(error)
            raise ValueError(f"{path}: no byte-level BPE tokenizer.json of a known kind ({what})") from None

    def __init__(self, content):
        """content: the parsed tokenizer.json."""
        import tiktoken  # here: only Janus-Pro's text needs it

        self._check("its", content, truncation=[None], padding=[None], decoder=None, version=None, post_processor=None,
                    added_tokens=None, pre_tokenizer=None, model=None,
                    normalizer=[None, {"type": "Sequence", "normalizers": []}])  # fmt: skip
        self._check("its decoder's", content["decoder"] or {}, type=["ByteLevel"], add_prefix_space=None,
                    trim_offsets=None, use_regex=None)  # fmt: skip
        # unk_token and fuse_unk are for bytes without a token, of which there is none
        self._check("its model's", content["model"], type=["BPE"], vocab=None, merges=None, unk_token=None,
                    fuse_unk=None, dropout=[None, 0], byte_fallback=[None, False], ignore_merges=[None, False],
                    continuing_subword_prefix=[None, ""], end_of_word_suffix=[None, ""])  # fmt: skip
        ranks = self._read_vocabulary(content["model"]["vocab"], content["model"]["merges"])
        self._read_added_tokens(content["added_tokens"], content["model"]["vocab"])
        self.splits = []
        pattern = self._read_pre_tokenizer(content["pre_tokenizer"] or {})
        self.vocab_size = len(self.bytes)
        self.bpe = tiktoken.Encoding("tokenizer.json", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})

    @staticmethod
    def _check(what, found, **known):
        """ValueError unless `found` has only names of `known`, with one of the values there (None: with any)."""
        for name, values in known.items():
            if values and found.get(name) not in values:
                supported = " or ".join(map(repr, values))
                raise ValueError(f"{what} {name} is {found.get(name)!r:.100}, supported: {supported}")
        for name in found:
            if name not in known:
                raise ValueError(f"{what} option {name!r} is not known")

    def _read_vocabulary(self, vocab, merges):
        """Sets self.bytes (of each id) and self.ids (of each of tiktoken's ranks); returns tiktoken's bytes -> rank."""
        if sorted(vocab.values()) != list(range(len(vocab))):
            raise ValueError(f"the {len(vocab)} ids of its vocabulary have gaps or come twice")
        # The vocabulary writes a byte as its Latin-1 character if that prints, else as one from U+0100 on (GPT-2).
        prints = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
        others = [byte for byte in range(256) if byte not in prints]
        byte_of = {chr(b): b for b in prints} | {chr(0x100 + i): b for i, b in enumerate(others)}

        def to_bytes(token):  # a token with other characters, as some added ones, stands for its own name
            return bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode()

        never = {0xC0, 0xC1, *range(0xF5, 0x100)}  # in UTF-8; such a byte may lack a token
        missing = [f"0x{byte:02X}" for c, byte in byte_of.items() if c not in vocab and byte not in never]
        if missing:
            raise ValueError(f"its vocabulary has no token for byte {missing[0]}")

        rank_of = {}
        for i, pair in enumerate(merges):
            pair = pair.split(" ") if isinstance(pair, str) else pair
            if len(pair) != 2:
                raise ValueError(f"merge {i} is {pair!r:.100}, supported: two tokens")
            left, right = pair
            for token in (left, right, left + right):
                if token not in vocab or not all(c in byte_of for c in token):
                    raise ValueError(f"merge {i}: {token!r} is not in its vocabulary, or not of its bytes")
            rank_of[left, right] = i  # of a pair that comes twice the last one counts
        # Hugging Face merges the listed pair of the lowest rank; tiktoken any neighbours that together are a token, of
        # the lowest rank. That is the same if tiktoken gets just the tokens that their own bytes merge to, ranked by
        # the last of those merges: neighbours come from merges inside their bytes, in the order in which those bytes
        # alone would be merged, so if the two together are such a token, they are the pair of its last merge.
        self.bytes = [to_bytes(token) for token in sorted(vocab, key=vocab.get)]
        self.ids = {byte: vocab.get(c) for c, byte in byte_of.items()}
        ranks = {bytes([byte]): byte for byte in range(256)}
        for token in {left + right for left, right in rank_of}:
            parts, rank = self._merge(token, rank_of)
            if len(parts) == 1:
                ranks[to_bytes(token)], self.ids[256 + rank] = 256 + rank, vocab[token]
        return ranks

    @staticmethod
    def _merge(token, rank_of):
        """Join the neighbours of the lowest rank, leftmost first, until no pair has one: (parts, the last rank)."""
        parts, rank = list(token), None
        while found := [(rank_of[pair], i) for i, pair in enumerate(zip(parts, parts[1:])) if pair in rank_of]:
            rank, i = min(found)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        return parts, rank

    def _read_added_tokens(self, added, vocab):
        """Sets self.special_tokens, and as (pattern, {name: id}) self.names of all added tokens, to be cut out of a
        text, and self.letters of those that are one character, as DeepSeek's "ü", to be cut out of a user's words."""
        self.special_tokens, self.names, self.letters = {}, [], []
        for token in added:
            name, id = token["content"], token["id"]
            # The id is the one that Hugging Face gives, whatever the file says. A token that takes white space with
            # it, or is one only between words, would not come back from decode.
            self._check(f"added token {name!r}:", token, content=None, special=None, normalized=[False, True],
                        single_word=[False], lstrip=[False], rstrip=[False],
                        id=[vocab.get(name, len(self.bytes))])  # fmt: skip
            if name not in vocab:
                self.bytes.append(name.encode())
            if name in self.special_tokens or not name or self.bytes[id] != name.encode():
                raise ValueError(f"added token {name!r} is empty, comes twice or is the name of other bytes")
            self.special_tokens[name] = id
        for normalized in (False, True):  # in this order; of those that begin at a character the longest counts
            ids = {token["content"]: token["id"] for token in added if token["normalized"] == normalized}
            for found, kept in ((self.names, ids), (self.letters, {name: ids[name] for name in ids if len(name) == 1})):
                names = "|".join(re.escape(name) for name in sorted(kept, key=len, reverse=True))
                found += [(re.compile(f"({names})"), kept)] if kept else []

    def _read_pre_tokenizer(self, content):
        """Adds the patterns of the Splits to self.splits; returns tiktoken's pattern, which does the Digits."""
        steps = content["pretokenizers"] if content.get("type") == "Sequence" else [content]
        kinds = " ".join(str(step.get("type")) for step in steps)
        if not re.fullmatch("(Split )*(Digits )?ByteLevel", kinds):
            raise ValueError(f"its pre-tokenizer is {kinds!r}, supported: Splits, then Digits or not, then ByteLevel")
        digits = r"(?s:.+)"
        for step in steps:
            if step["type"] == "Split":
                self._check("Split's", step, type=None, pattern=None, behavior=["Isolated"], invert=[False])
                found = step["pattern"].get("Regex", "")
                if not self.known_pattern.fullmatch(found):
                    raise ValueError(f"Split's pattern is {step['pattern']!r:.100}, supported: a Regex of literals, "
                                     "\\s, [classes of literals], ? * + and $ at its end")  # fmt: skip
                pattern = re.compile("(" + found.replace(r"\s", self.white_space) + ")", re.MULTILINE)
                if pattern.search(""):
                    raise ValueError(f"Split's pattern {found!r:.100} matches an empty piece")
                self.splits.append((pattern, {}))
            elif step["type"] == "Digits":
                self._check("Digits'", step, type=None, individual_digits=[False, True])
                digits = r"\p{N}|\P{N}+" if step["individual_digits"] else r"\p{N}+|\P{N}+"
            else:
                self._check("ByteLevel's", step, type=["ByteLevel"], trim_offsets=None, add_prefix_space=[False],
                            use_regex=[False])  # fmt: skip
        return digits

    def encode(self, *parts):
        """Text -> list of ids. The name of an added token in the text becomes that token.

        Several parts are, in turn, text and words of a user, text again and so on. They are encoded as one text, but in
        the words the name of an added token is text like any other. UnicodeEncodeError, a ValueError, on half of a
        surrogate pair: UTF-8 has no bytes for it.
        """
        pieces = []  # strings, and the ids of added tokens that were found
        for i, part in enumerate(parts):
            part.encode()
            for piece in self._cut([part], self.letters if i % 2 else self.names):
                if isinstance(piece, str) and pieces and isinstance(pieces[-1], str):
                    piece = pieces.pop() + piece  # two parts meet here
                pieces.append(piece)
        ids = []
        for piece in self._cut(pieces, self.splits):
            ids += [piece] if isinstance(piece, int) else [self.ids[rank] for rank in self.bpe.encode_ordinary(piece)]
        return ids

    @staticmethod
    def _cut(pieces, steps):
        """Cut strings by the pattern of each step; a piece with the name of one of its added tokens becomes its id."""
        for pattern, added in steps:
            parts = (part for piece in pieces for part in ([piece] if isinstance(piece, int) else pattern.split(piece)))
            pieces = [added.get(part, part) for part in parts]
        return [piece for piece in pieces if piece != ""]

    def decode(self, ids):
        """ids -> text; bytes that are not UTF-8, as half a character's, become U+FFFD. ValueError on an unknown id."""
        ids = [int(id) for id in ids]
        for id in ids:
            if not 0 <= id < self.vocab_size:
                raise ValueError(f"text token {id} is none of 0 to {self.vocab_size - 1}")
        return b"".join(self.bytes[id] for id in ids).decode(errors="replace")


class JanusPrompt:
    """What Janus-Pro is asked: phrases or a question, in its chat template, as ids with room for a picture.

    The name of a special token in a phrase or question is text like any other.

    directory: an official one with a tokenizer.json. image_tokens: N, places that the picture takes.
    """

    # the official processor's, for questions about a picture; for generated pictures it has none
    system = ("You are a helpful language and vision assistant. You are able to understand the visual content that the "
              "user provides, and assist the user with a variety of tasks using natural language.")
    length = 256  # text tokens of a phrase or question, at most; ours, the model itself reads thousands

    def __init__(self, directory, image_tokens):
        self.bpe, self.image_tokens = BPETokenizer.from_json(directory), image_tokens
        names = {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>", "pad": "<｜▁pad▁｜>",
                 "begin": "<begin_of_image>", "image": "<image_placeholder>", "end": "<end_of_image>"}  # fmt: skip
        missing = [name for name in names.values() if name not in self.bpe.special_tokens]
        if missing:
            raise ValueError(f"{directory}: its text tokenizer has no {', '.join(missing)}: not Janus'")
        self.special = {short: self.bpe.special_tokens[name] for short, name in names.items()}

    def too_long(self, text):
        """How many tokens `text` needs if that is more than fit, else 0."""
        needed = len(self.bpe.encode("", text.strip()))
        return needed if needed > self.length else 0

    def ids(self, *parts):
        """A prompt in parts, as BPETokenizer.encode takes them -> list of ids: begin of sentence first, and N places
        for the picture where the text has <image_placeholder>."""
        special, ids = self.special, [self.special["bos"]]
        for id in self.bpe.encode(*parts):
            ids += ([special["begin"]] + self.image_tokens * [special["image"]] + [special["end"]]
                    if id == special["image"] else [id])  # fmt: skip
        return ids

    def __call__(self, phrases):
        """list of B phrases -> int64 (B, L), padded at the left to the longest.

        The paper: `<|User|>: [text]<image>  <|Assistant|>: <begin_of_mask>`, in Janus' own white space.
        """
        rows = [self.ids("<|User|>: ", phrase.strip(), "<image_placeholder>\n\n<|Assistant|>:<begin_of_image>")
                for phrase in phrases]  # fmt: skip
        longest = max(map(len, rows))
        return torch.tensor([[self.special["pad"]] * (longest - len(row)) + row for row in rows])

    def chat(self, question):
        """A question about a picture -> int64 (1, L)."""
        system = f"{self.system}\n\n<|User|>: <image_placeholder>\n"
        return torch.tensor([self.ids(system, question.strip(), "\n\n<|Assistant|>:")])
