"""Pretrained MLLMs that write masks: Janus-Pro with LoRA, its chat and its text tokenizer.

Shapes as in model.py: B batch, L text tokens, N image tokens, M mask tokens, T tokens of a sequence, D width,
S side of the picture, K codebook size, r rank of LoRA.
"""

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from model import UNSEEN, Llama, LlamaConfig, MaskWriter, SigLIP, SigLIPConfig, check_fields, llama_config
from weights import (
    WEIGHTS, build_from, check_config, check_source, fingerprint, read_config, read_own, read_weights, reading,
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


class JanusSeg(MaskWriter):
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

    def blocks(self, text_ids, length):
        """Block ids (B,length), see Llama.forward: the position, and UNSEEN for the padding at the left."""
        positions = torch.arange(length, device=text_ids.device).expand(len(text_ids), -1)
        padding = (text_ids == self.config.pad_id).cumprod(1).sum(1, keepdim=True)  # (B,1) how many there are
        return positions.masked_fill(positions < padding, UNSEEN)

    def prefix(self, text_ids, pixels):
        """text_ids (B,L) with N image_id in each row, pixels (b,3,S,S) -> (B,L,D); B/b rows share a picture."""
        with torch.no_grad():
            image = self.encode_image(pixels).repeat_interleave(len(text_ids) // len(pixels), dim=0)  # (B,N,D)
            words = self.token_embedding(text_ids)  # (B,L,D)
            places = text_ids == self.config.image_id  # (B,L)
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

        weights = janus_names(read_weights(directory, wanted))
        model = build_from(lambda: cls(config), weights, directory, dtype)
        model.frozen = {"mllm": {"name": directory.absolute().name, "sha256": fingerprint(weights)}}
        return model.requires_grad_(False)


# parts of the official names: ours
JANUS_NAMES = {
    "language_model.model.embed_tokens.": "token_embedding.", "language_model.model.": "llama.",
    "language_model.lm_head.": "lm_head.", "aligner.layers.": "aligner.",
    "gen_head.output_mlp_projector.": "gen_head.0.", "gen_head.vision_head.": "gen_head.2.",
    "vision_model.vision_tower.": "vision.vision_model.", "patch_embed.proj.": "embeddings.patch_embedding.",
    "pos_embed": "embeddings.position_embedding.weight", "blocks.": "encoder.layers.", ".norm1.": ".layer_norm1.",
    ".norm2.": ".layer_norm2.", ".attn.proj.": ".self_attn.out_proj.",
    "vision_model.norm.": "vision_model.post_layernorm.",
}


def janus_names(weights):
    """Official tensors under our names; a fused qkv becomes three views. Unknown names stay, to be reported."""
    ours = {}
    for name, w in weights.items():
        for official, own in JANUS_NAMES.items():
            name = name.replace(official, own)
        if ".attn.qkv." in name:
            for part, piece in zip("qkv", w.chunk(3)):
                ours[name.replace(".attn.qkv.", f".self_attn.{part}_proj.")] = piece
        else:
            ours[name] = w[0] if name.endswith(".position_embedding.weight") else w  # (1,N,D) -> (N,D)
    return ours


JANUS_PARTS = ("vision_config", "aligner_config", "gen_vision_config", "gen_aligner_config", "gen_head_config")
IMAGE, PAD = "<image_placeholder>", "<｜▁pad▁｜>"  # special tokens of tokenizer.json


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
        joined, ids = [], []  # of strings, and the ids of added tokens that were found
        for i, part in enumerate(parts):
            part.encode()
            for piece in cut([part], self.letters if i % 2 else self.names):
                if isinstance(piece, str) and joined and isinstance(joined[-1], str):
                    piece = joined.pop() + piece  # two parts meet here
                joined.append(piece)
        for piece in cut(joined, self.splits):
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


class JanusPrompt:
    """What Janus-Pro is asked: phrases or a question, in its chat template, as ids with room for a picture.

    The name of a special token in a phrase or question is text like any other. directory: an official one with a
    tokenizer.json. image_tokens: N, places that the picture takes.
    """

    # the official processor's text for questions about a picture; for generated pictures it has none
    system = ("You are a helpful language and vision assistant. You are able to understand the visual content that the "
              "user provides, and assist the user with a variety of tasks using natural language.")
    names = {"bos": "<｜begin▁of▁sentence｜>", "eos": "<｜end▁of▁sentence｜>", "pad": PAD,
             "begin": "<begin_of_image>", "image": IMAGE, "end": "<end_of_image>"}
    length = 256  # text tokens of a phrase or question, at most; our limit: the model itself reads thousands

    def __init__(self, directory, image_tokens):
        self.bpe, self.image_tokens = BPETokenizer.from_json(directory), image_tokens
        with reading(directory, "a text tokenizer with Janus' special tokens"):
            self.special = {short: self.bpe.special_tokens[name] for short, name in self.names.items()}

    def too_long(self, text):
        """The number of tokens that `text` needs if it is above `length`, else 0."""
        needed = len(self.bpe.encode("", text.strip()))
        return needed if needed > self.length else 0

    def ids(self, *parts):
        """A prompt in parts, as BPETokenizer.encode takes them -> list of ids: begin of sentence first, and N places
        for the picture where the text has <image_placeholder>."""
        special, ids = self.special, [self.special["bos"]]
        picture = [special["begin"], *[special["image"]] * self.image_tokens, special["end"]]
        for id in self.bpe.encode(*parts):
            ids += picture if id == special["image"] else [id]
        return ids

    def __call__(self, phrases):
        """list of B phrases -> int64 (B, L), padded at the left to the longest.

        The paper: `<|User|>: [text]<image>  <|Assistant|>: <begin_of_mask>`, in Janus' own white space.
        """
        rows = [self.ids("<|User|>: ", phrase.strip(), "<image_placeholder>\n\n<|Assistant|>:<begin_of_image>")
                for phrase in phrases]
        longest = max(map(len, rows))
        return torch.tensor([[self.special["pad"]] * (longest - len(row)) + row for row in rows])

    def chat(self, question):
        """A question about a picture -> int64 (1, L)."""
        system = f"{self.system}\n\n<|User|>: <image_placeholder>\n"
        return torch.tensor([self.ids(system, question.strip(), "\n\n<|Assistant|>:")])
