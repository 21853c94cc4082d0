"""Official weights: download, verify, read, account for every tensor; and files of our own.

    python weights.py download NAME          # official weights, into weights/NAME

Stop a download at any time and run it again: it goes on where it was. HF_ENDPOINT names a mirror of the Hugging Face
hub, STORAGE_EMULATOR_HOST one of Google's buckets. HF_TOKEN is sent to the hub for gated files. A proxy is taken from
HTTPS_PROXY.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import re
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import get_type_hints

import requests
import torch
import urllib3
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from metrics import Parser, parse_json, whole

WEIGHTS = Path(__file__).parent / "weights"  # where `python weights.py download NAME` puts the official weights
ASSETS = Path(__file__).parent / "assets"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def locate(path):
    """A path as it is, or for the bare name of official weights the folder that `weights.py download` made."""
    return path if path is None or path.exists() or len(path.parts) > 1 else WEIGHTS / path


def download_hint(path):
    """What to add to "no such file" for a path that `weights.py download` would have made."""
    return f": python weights.py download {path.name}" if path.parent == WEIGHTS or path.name in DOWNLOADS else ""


@contextmanager
def reading(path, expected):
    """What a strange or damaged file makes its reader raise becomes a ValueError of one line with the file's name."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, EOFError, RuntimeError,
            re.error) as error:
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path}: expected {expected} ({reason.removeprefix(f'{path}: '):.500})") from None


# ---- files of our own -----------------------------------------------------------------------------------------------


@contextmanager
def only_one(path):
    """Hold the lock file `path` while the block runs; ValueError if another process holds it. The lock ends with the
    process that holds it. Its children never hold it, so workers that outlive it do not block."""
    with open(path, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path}: another process is writing to this folder: wait for its end, or give another "
                             "folder") from None
        yield


def write_weights(model, path, kind, dtype, weights=None):
    """Write what a model was trained to, or `weights`, as one .safetensors with config and frozen parts in its header;
    OSError."""
    header = {"config": json.dumps(asdict(model.config)), "frozen": json.dumps(model.frozen)}
    write_tensors(path, weights or model.trained_state(), dtype, {"format": kind, **header})


def write_tensors(path, tensors, dtype=None, header=None):
    """Write {name: tensor} as a .safetensors file, in `dtype` if one is given; OSError in one line."""
    # copied: fused weights share memory, which safetensors does not write
    tensors = {name: w.detach().to("cpu", dtype or w.dtype, copy=True).contiguous() for name, w in tensors.items()}
    with whole(path) as temporary:
        try:
            save_file(tensors, temporary, metadata=header)
            os.chmod(temporary, 0o644)  # safetensors lets only the owner read it
        except SafetensorError as error:
            raise OSError(f"{path}: cannot write ({error})") from None


def read_header(path):
    """The header of a file of `write_tensors`, a dict of texts; {} for another file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def read_own(path, kind, make, dtype):
    """(config, frozen, {name: tensor}) of a file of `write_weights`; FileNotFoundError, ValueError in one line."""
    header, weights = read_file(path)
    with reading(path, "a .safetensors of train.py whose config fits this version of model.py"):
        if header.get("format") != kind or "config" not in header:
            raise ValueError(f"not a {make.__name__.removesuffix('Config')} checkpoint")
        config = make(**json.loads(header["config"]))
        frozen = json.loads(header.get("frozen", "{}"))
        if any(part["name"] != Path(part["name"]).name or type(part["sha256"]) is not str for part in frozen.values()):
            raise ValueError(f"frozen parts {frozen!r}")
    return config, frozen, {name: w.to(dtype) for name, w in weights.items()}


def check_source(path, part, frozen, source):
    """ValueError unless the frozen `part` at hand, a {"name", "sha256"}, is the one that `path` was trained with."""
    expected = frozen.get(part)
    if expected and expected["sha256"] != source["sha256"]:
        raise ValueError(f"{path}: was trained with the {part.replace('_', ' ')} {expected['name']} "
                         f"({expected['sha256'][:12]}), found {source['name']} ({source['sha256'][:12]}): "
                         "give that one, or --any-weights to take this one")


# ---- official files -------------------------------------------------------------------------------------------------


def read_config(directory):
    """config.json of a Hugging Face directory as a dict; FileNotFoundError or ValueError in one line."""
    path = directory / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file, expected a Hugging Face directory{download_hint(directory)}")
    with reading(path, "a JSON object"):
        return {**parse_json(path.read_bytes())}


def check_config(path, values, expected):
    """ValueError if a field of config.json is there and not the one value that this code implements."""
    for name, value in expected.items():
        if values.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {values[name]!r}, expected {value!r}")


def check_fields(config):
    """TypeError or ValueError unless the fields of a config hold what their types say; parts from JSON become theirs.
    Numbers are positive, integers at most 2^20, so that the size of a tensor, a product of three, fits 63 bits."""
    for name, kind in get_type_hints(type(config)).items():
        value, most = getattr(config, name), 1000 if name.endswith("layers") else 2**20
        if kind in (int, int | None) and (type(value) is not int or not 0 < value <= most):
            raise ValueError(f"{name} is {value!r:.100}, expected an integer from 1 to {most}")
        if kind is bool and type(value) is not bool:
            raise ValueError(f"{name} is {value!r:.100}, expected true or false")
        if kind is float and (type(value) not in (int, float) or not 0 < value < math.inf):
            raise ValueError(f"{name} is {value!r:.100}, expected a positive number")
        if is_dataclass(kind) and not isinstance(value, kind):
            setattr(config, name, kind(**value))


def read_weights(path, wanted=lambda name: True, dtype=None):
    """{name: tensor} of a file or of a folder, as stored; only names for which wanted(name) are read. dtype: copy what
    is in .safetensors, one tensor at a time, so that no file stays in memory beside them. FileNotFoundError, or
    ValueError with one line for a file that is damaged or of another kind."""
    weights = {}
    for file in weight_files(path, wanted):
        found = read_file(file, wanted, dtype)[1]
        if found.keys() & weights.keys():
            raise ValueError(f"{file}: another file of {path} holds {min(found.keys() & weights.keys())} too")
        weights |= found
    return weights


def weight_files(path, wanted=lambda name: True):
    """The files with the weights of `path`: itself, or in a folder those of the index, else all of one kind."""
    if not path.is_dir():
        return [path]
    for pattern in ("model.safetensors.index.json", "model.safetensors", "pytorch_model.bin.index.json",
                    "pytorch_model.bin", "*.safetensors", "*.bin", "*.pt", "*.pth"):
        files = sorted(path.glob(pattern))
        if files and pattern.endswith(".index.json"):
            with reading(files[0], "a weight_map of files beside it"):
                places = parse_json(files[0].read_bytes())["weight_map"]
                files = sorted({path / file for name, file in places.items() if wanted(name)})
                if any(file.parent != path for file in files):
                    raise ValueError("a file outside the directory")
            return files
        if files:
            return files
    raise FileNotFoundError(f"{path}: has neither model.safetensors nor another file of weights{download_hint(path)}")


def read_file(file, wanted=lambda name: True, dtype=None):
    """(header, {name: tensor}) of a .safetensors or of a file of torch.save, whose header is {}; ValueError.

    Nothing but tensors of floating-point numbers is unpickled. Where torch.save wrote several dicts, `ema`, then
    `model`, then `state_dict` is taken, as LlamaGen's demo does. The tensors may share memory, or be windows into the
    file on disk.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file{download_hint(file)}")
    header = {}
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt") as opened:
                names = [name for name in opened.keys() if wanted(name)]  # noqa: SIM118
                header, weights = opened.metadata() or {}, {name: opened.get_tensor(name) for name in names}
        else:
            # LlamaGen's trainer saves its flags as a Namespace, which holds values but no code
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
            dicts = (content[name] for name in ("ema", "model", "state_dict") if isinstance(content.get(name), dict))
            weights = {name: w for name, w in next(dicts, content).items() if wanted(name)}
        for name, w in weights.items():
            kind = getattr(w, "dtype", type(w).__name__)
            if kind not in FLOATS or w.layout != torch.strided or w.is_meta:
                raise ValueError(f"{name!s:.99} holds {kind}, expected floating-point numbers of 16 bits or more")
        if dtype and file.suffix == ".safetensors":
            # The largest first, while there is little beside it; what was read stays in memory until a file is closed.
            for name in sorted(weights, key=lambda name: -weights[name].numel()):
                with safe_open(file, framework="pt") as opened:
                    weights[name] = opened.get_tensor(name).to(dtype, copy=True)
    except Exception as error:  # safetensors and torch.load raise many kinds for a damaged file
        found = re.search(r"GLOBAL (\S+)", str(error))
        if found:
            raise ValueError(f"{file}: refused, this pickle holds {found[1]}; expected tensors only") from None
        line = f"{str(error) or type(error).__name__:.300}".splitlines()[0]
        raise ValueError(f"{file}: damaged or not a {file.suffix} file of tensors ({line}); get it again") from None
    return header, weights


class Undrawn(TorchFunctionMode):
    """Modules made inside draw no weights: on the meta device that would import PyTorch's compiler, which takes a
    second at the start of every command."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) != "torch.nn.init":
            return func(*args, **(kwargs or {}))


def without_numbers(make):
    """make(), a model, on the meta device: all shapes, no weights."""
    with torch.device("meta"), Undrawn():
        return make()


def build_from(make, weights, path, dtype):
    """make(), filled with `weights` in `dtype`, in eval mode; ValueError in one line if they do not fit."""
    model = without_numbers(make)
    problems = compare_weights(model.state_dict(), weights)
    if problems:
        raise ValueError(f"{path}: {problems}")
    model.load_state_dict({name: w.to(dtype) for name, w in weights.items()}, assign=True)
    return model.eval()


def compare_weights(want, have):
    """Two dicts of tensors -> one line with what is missing, left over, of a wrong shape or not finite; else ""."""
    largest = torch.finfo(torch.float32).max  # the smallest and the largest number tell: NaN would be both of them
    kinds = {"missing": [name for name in want if name not in have],
             "left over": [name for name in have if name not in want], "wrong shape": [], "not finite": []}
    for name, w in have.items():
        if name in want and w.shape != want[name].shape:
            kinds["wrong shape"].append(f"{name} {tuple(w.shape)}, expected {tuple(want[name].shape)}")
        elif name in want and w.numel() and not all(abs(float(end)) <= largest for end in w.detach().aminmax()):
            kinds["not finite"].append(name)
    return "; ".join(f"{kind}: {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if names[5:] else "")
                     for kind, names in kinds.items() if names)


def sha256_of(path):
    """SHA-256 of a file as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(weights):
    """SHA-256 of names, shapes and stored values as hex: the same however they were split over files."""
    digest = hashlib.sha256()
    for name, w in sorted(weights.items()):
        digest.update(f"{name} {tuple(w.shape)} {w.dtype}".encode())
        digest.update(w.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


# ---- downloads ------------------------------------------------------------------------------------------------------

_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
          "special_tokens_map.json")

# our name: (repository of the Hugging Face hub, or bucket of Google Cloud Storage as gs://..., files; an index brings
# the files that it names)
DOWNLOADS = {
    "vq_ds16_c2i": ("FoundationVision/LlamaGen", ["vq_ds16_c2i.pt"]),
    "vq_ds16_t2i": ("peizesun/llamagen_t2i", ["vq_ds16_t2i.pt"]),
    **{f"siglip2-{size}-patch16-{side}": (f"google/siglip2-{size}-patch16-{side}", [*_FILES, "model.safetensors"])
       for size in ("base", "large", "so400m") for side in (256, 384)},
    "janus-pro-1b": ("deepseek-ai/Janus-Pro-1B", [*_FILES, "processor_config.json", "pytorch_model.bin"]),
    "argenseg-8b": ("inclusionAI/ARGenSeg-8B", ["config.json", "tokenizer_config.json", "tokenizer.model",
                                                "model.safetensors.index.json"]),
    "var-vq": ("FoundationVision/var", ["vae_ch160v4096z32.pth"]),
    "gemma-tokenizer": ("gs://big_vision", ["gemma_tokenizer.model"]),
    "paligemma-tokenizer": ("gs://big_vision", ["paligemma_tokenizer.model"]),
}
BUSY = (408, 429, *range(500, 600))  # answers that mean: ask again later


def download(name, root=WEIGHTS):
    """Fetch official weights into ROOT/NAME/; OSError, ValueError in one line."""
    place, files = DOWNLOADS[name]
    if place.startswith("gs://"):
        host, token = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com", None
        base = f"{host.rstrip('/')}/{place.removeprefix('gs://')}"
    else:
        host, token = os.environ.get("HF_ENDPOINT") or "https://huggingface.co", os.environ.get("HF_TOKEN", "").strip()
        base = f"{host.rstrip('/')}/{place}/resolve/main"
    (root / name).mkdir(parents=True, exist_ok=True)
    with only_one(root / name / ".lock"):  # two writers of one file would leave a mix of both
        files = list(files)
        for file in files:  # an index adds to them
            path = root / name / file
            already = " (already there, only checked)" if path.exists() else ""
            print(f"{path}{already}: sha256 {fetch(f'{base}/{file}', path, token)}")
            if file.endswith(".index.json"):
                with reading(path, "an index of .safetensors files"):
                    index = parse_json(path.read_bytes())
                    shards, size = sorted(set(index["weight_map"].values())), index["metadata"]["total_size"] / 1e9
                    if strange := [shard for shard in shards if not re.fullmatch(r"[\w.-]+\.safetensors", shard)]:
                        raise ValueError(f"it names {strange[0]!r:.100}")
                print(f"{name}: {size:.1f} GB of weights in {len(shards)} files")
                files += shards


def fetch(url, path, token=None, wait=1.0):
    """Download `url` to `path`: streamed to path.part, checked, then renamed. Returns its SHA-256.

    A file that is already there is only checked. Its hash is the one recorded beside it (path.sha256), else the hub's
    own for large files; without either it is recorded.
    token: sent as a bearer token, for gated files. wait: seconds before the first repetition; the pauses double, or
    are what the server asks for. OSError (network, disk) or ValueError (wrong hash), in one line.
    """
    part, record = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.sha256")
    expected = record.read_text(errors="replace").lower().split()[:1] if record.exists() else []
    came = path if path.exists() else part
    if token and not (token.isascii() and token.isprintable()):
        raise ValueError("HF_TOKEN holds characters that no token has: set it again")
    if came == part:
        retry = urllib3.Retry(5, backoff_factor=wait, status_forcelist=BUSY, raise_on_status=False, retry_after_max=300)
        try:
            with requests.Session() as session:
                for scheme in ("https://", "http://"):
                    session.mount(scheme, requests.adapters.HTTPAdapter(max_retries=retry))
                session.headers["Accept-Encoding"] = "identity"  # sizes and ranges are those of the file itself
                if token:  # requests drops it where another host takes over
                    session.headers["Authorization"] = f"Bearer {token}"
                published = receive(session, url, part, wait)
            expected = expected or published
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise OSError(f"{url}: {error!s:.300}: what came is kept, run this again; a gated file needs a token in "
                          "HF_TOKEN") from None
    found = sha256_of(came)
    part.with_suffix(".etag").unlink(missing_ok=True)
    if expected and found != expected[0]:
        part.unlink(missing_ok=True)
        raise ValueError(f"{came}: its SHA-256 is {found}, expected {expected[0]}: delete {path.name} if it is there "
                         "and run this again, or delete the .sha256 if the change is yours")
    os.replace(came, path)
    record.write_text(f"{found}  {path.name}\n")
    return found


def receive(session, url, part, wait):
    """Bring `part` to its full length; returns [its SHA-256], or [] where the server does not announce it. Where the
    connection breaks it goes on, also in a later run, if the server's file is still the same: `part` has the ETag of
    its file beside it."""
    tag = part.with_suffix(".etag")
    with tqdm(desc=part.stem, unit="B", unit_scale=True) as bar:
        for _ in range(100):
            known = tag.read_text(errors="replace") if part.exists() and tag.exists() else ""
            # The last byte is asked for again, so that the server has something to send where all came before.
            have = max(part.stat().st_size - 1, 0) if known else 0
            asked = {"Range": f"bytes={have}-", "If-Range": known} if have else {}
            with session.get(url, headers=asked, stream=True, timeout=60) as answer:
                answer.raise_for_status()
                if answer.headers.get("Content-Type", "").startswith("text/html"):
                    raise OSError(f"{url}: came as a web page: is a proxy or a login in between?")
                tag.write_text(answer.headers.get("ETag", ""))
                have = have if answer.status_code == 206 else 0  # else the whole file comes, as another one is there
                bar.n, bar.total = have, have + (answer.raw.length_remaining or 0)
                with open(part, "r+b" if have else "wb") as file, suppress(requests.RequestException):
                    file.seek(have)
                    for chunk in answer.iter_content(1 << 16):
                        file.write(chunk)
                        bar.update(len(chunk))
                    if bar.n >= max(bar.total, 1):
                        hashes = (one.headers.get(name, "") for one in (*answer.history, answer)
                                  for name in ("X-Linked-Etag", "ETag"))  # the hub's, then of the host it sends us to
                        return re.findall(r"\b[0-9a-f]{64}\b", " ".join(hashes))[:1]
            tqdm.write(f"{part.stem}: the connection broke, going on", file=sys.stderr)
            time.sleep(wait)
    raise OSError(f"{url}: the connection broke 100 times: what came is kept, run this again")


def main(argv=None):
    """The command line; returns the exit code: 0, 1 for bad data, 2 for bad usage (argparse)."""
    parser = Parser(description=__doc__)
    parser.add_argument("command", choices=["download"], help="fetch official weights")
    parser.add_argument("name", choices=DOWNLOADS, metavar="NAME", help=", ".join(DOWNLOADS))
    parser.add_argument("--root", type=Path, default=WEIGHTS,
                        help="default: weights/ beside this file, where train.py and sample.py look")
    args = parser.parse_args(argv)
    return parser.run(download, args.name, args.root, stopped="stopped: run this again to go on")


if __name__ == "__main__":
    sys.exit(main())
