"""Official weights: download, verify, read, account for every tensor; and files of our own.

    python weights.py download NAME          # official weights, into weights/NAME
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import pickle
import re
import shutil
import sys
import time
import zipfile
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import requests
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from metrics import Parser, nobody_reads, printable, whole

WEIGHTS = Path(__file__).parent / "weights"  # where `python weights.py download NAME` puts the official weights

ASSETS = Path(__file__).parent / "assets"


def locate(path):
    """A path as it is, or for the bare name of official weights the folder that `weights.py download` made."""
    return path if path is None or path.exists() or len(path.parts) > 1 else WEIGHTS / path


# ----------------------------------------------------------------------------------------------------------
# files of our own


@contextmanager
def only_one(path):
    """Hold the lock file `path` while the block runs; ValueError if another process holds it.

    A process that dies lets go of it. Its children never hold it, so workers that outlive it are not in the way.
    """
    with open(path, "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{path}: another process is writing to this folder: wait for its end, or give another "
                             "folder") from None  # fmt: skip
        yield


def sha256_of(path):
    """SHA-256 of a file as hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def write_weights(model, path, kind, dtype):
    """What a model was trained to, in one .safetensors with its config and frozen parts in the header; OSError."""
    header = {"config": json.dumps(asdict(model.config)), "frozen": json.dumps(model.frozen)}
    write_tensors(path, model.trained_state(), dtype, {"format": kind, **header})


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
    """The header of a file that train.py wrote, a dict of texts; {} for another file."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def read_own(path, kind, make, dtype):
    """(config, frozen, {name: tensor}) of a file of `write_weights`; FileNotFoundError, ValueError in one line."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; give the .safetensors that train.py wrote")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            weights = {}
            for name in file.keys():  # noqa: SIM118
                weights[name] = file.get_tensor(name)
                check_kinds(path, {name: weights[name]})
                weights[name] = weights[name].to(dtype)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path}: damaged or not a .safetensors file ({error}); "
                         "copy it again or take another") from None
    if header.get("format") != kind or "config" not in header:
        name = {"llamaseg": "LlamaSeg", "janusseg": "JanusSeg"}[kind]
        raise ValueError(f"{path}: not a {name} checkpoint (no config in its header); "
                         "give the .safetensors that train.py wrote")
    try:
        config = make(**json.loads(header["config"]))
        frozen = json.loads(header.get("frozen", "{}"))
        for part in frozen.values():
            known = set(part) == {"name", "sha256"} and isinstance(part["sha256"], str)
            if not known or Path(part["name"]).name != part["name"]:
                raise ValueError(f"frozen parts {frozen!r}")
    except (TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: its config does not fit this version of model.py ({error!s:.300})") from None
    return config, frozen, weights


def check_source(path, part, frozen, source):
    """ValueError unless the frozen `part` at hand, a {"name", "sha256"}, is the one that `path` was trained with."""
    expected = frozen.get(part)
    if expected and expected["sha256"] != source["sha256"]:
        raise ValueError(f"{path}: was trained with the {part.replace('_', ' ')} {expected['name']} "
                         f"({expected['sha256'][:12]}), found {source['name']} ({source['sha256'][:12]}): "
                         "give that one, or --any-weights to take this one")


# ----------------------------------------------------------------------------------------------------------
# official directories


def read_config(directory):
    """config.json of a Hugging Face directory as a dict; FileNotFoundError or ValueError in one line."""
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: no such folder{download_hint(directory)}")
    path = directory / "config.json"
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file, expected a Hugging Face directory"
                                f"{download_hint(directory)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected an object")
    return content


def download_hint(path):
    """What to add to "no such file" for a path below WEIGHTS."""
    return f": python weights.py download {path.name}" if path.parent == WEIGHTS else ""


def check_config(path, values, expected):
    """ValueError if a field of config.json is there and not the one value that this code implements."""
    for name, value in expected.items():
        if values.get(name, value) != value:
            raise ValueError(f"{path}: {name} is {values[name]!r}, expected {value!r}")


def read_weights(directory, wanted):
    """{name: tensor} of a Hugging Face directory, as stored; only names for which wanted(name) are read.

    model.safetensors or pytorch_model.bin, in one file or in the shards of an index.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (directory / f"{name}.index.json").is_file():
            try:
                places = json.loads((directory / f"{name}.index.json").read_bytes())["weight_map"]
                files = sorted({file for tensor, file in places.items() if wanted(tensor)})
                if any(Path(file).name != file for file in files):
                    raise ValueError("a file outside the directory")
            except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
                raise ValueError(f"{directory / name}.index.json: holds no weight_map of files beside it") from None
            break
        if (directory / name).is_file():
            files = [name]
            break
    else:
        raise FileNotFoundError(f"{directory}: has neither model.safetensors nor pytorch_model.bin, whole or sharded"
                                f"{download_hint(directory)}")
    weights = {}
    for file in (directory / name for name in files):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file, though the index names it")
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as opened:
                    found = {name: opened.get_tensor(name) for name in opened.keys() if wanted(name)}  # noqa: SIM118
            else:
                tensors = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
                found = {name: tensor for name, tensor in tensors.items() if wanted(name)}
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL (\S+)", str(error))
            raise ValueError(f"{file}: refused, this pickle holds {found[1] if found else 'no tensors'}; "
                             "expected tensors only") from None
        except Exception as error:  # safetensors and torch.load raise many kinds for a damaged file
            line = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise ValueError(f"{file}: damaged or not what its name says ({line}); get it again") from None
        for name in found.keys() & weights.keys():
            raise ValueError(f"{file}: another file of {directory} holds {name} too")
        weights |= found
    return weights


def build_from(make, weights, directory, dtype):
    """make() on the meta device, then filled with `weights` in `dtype`; ValueError in one line if they do not fit."""
    check_kinds(directory, weights)
    with torch.device("meta"):
        model = make()
    problems = compare_weights(model.state_dict(), weights)
    if problems:
        raise ValueError(f"{directory}: {problems}")
    model.load_state_dict({name: w.to(dtype) for name, w in weights.items()}, assign=True)
    return model.eval()


def check_kinds(path, weights):
    """ValueError unless all weights are tensors of floating-point numbers of 16 bits or more."""
    for name, w in weights.items():
        kind = w.dtype if isinstance(w, torch.Tensor) else type(w).__name__
        known = kind in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        if not known or w.layout != torch.strided or w.is_meta:
            raise ValueError(f"{path}: {name} holds {kind}, expected plain floating-point numbers of 16 bits or more")


def compare_weights(want, have):
    """Two dicts of tensors -> one line with what is missing, left over, of a wrong shape or not finite; "" if
    they agree."""
    fit = [n for n in want if n in have and have[n].shape == want[n].shape]
    shapes = [f"{n} {tuple(have[n].shape)}, expected {tuple(want[n].shape)}"
              for n in want if n in have and have[n].shape != want[n].shape]
    kinds = {"missing": [n for n in want if n not in have], "left over": [n for n in have if n not in want],
             "wrong shape": shapes, "not finite": [n for n in fit if not finite(have[n])]}
    parts = []
    for kind, names in kinds.items():
        if names:
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            parts.append(f"{kind}: {', '.join(names[:5])}{more}")
    return "; ".join(parts)


def finite(w):
    """Are all numbers of a tensor finite? By its ends, which takes no memory beside it: NaN is both."""
    return not w.numel() or all(math.isfinite(end) for end in map(float, w.detach().aminmax()))


def fingerprint(weights):
    """SHA-256 of names, shapes and stored values as hex: the same however they were split over files."""
    digest = hashlib.sha256()
    for name, w in sorted(weights.items()):
        digest.update(f"{name} {tuple(w.shape)} {w.dtype}".encode())
        digest.update(w.contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def read_checkpoint(path):
    """Tensors of a mask tokenizer as they lie on disk: (header of a .safetensors, {parameter name: tensor}).

    Nothing but tensors is ever unpickled. ValueError with one line for a file that is damaged or of another kind.
    """
    path = Path(path)
    files = [path]
    if path.is_dir():
        for pattern in ("model*.safetensors", "pytorch_model*.bin", "*.safetensors", "*.bin", "*.pt"):
            if files := sorted(path.glob(pattern)):
                break
        else:
            raise FileNotFoundError(f"{path}: no *.safetensors, *.bin or *.pt in this folder: for official weights "
                                    f"python weights.py download {path.name}")  # fmt: skip
    elif not path.is_file():
        raise FileNotFoundError(f"{path}: no such mask tokenizer: for official weights "
                                f"python weights.py download {path.name}")  # fmt: skip
    header, tensors = {}, {}
    for file in files:
        if file.suffix == ".safetensors":
            try:
                with safe_open(file, "pt") as opened:
                    header = opened.metadata() or {}
                    found = {key: opened.get_tensor(key) for key in opened.keys()
                             if len(files) == 1 or key.startswith(JANUS)}  # fmt: skip
            except (SafetensorError, OSError) as error:
                raise ValueError(f"{file}: not a whole safetensors file ({error}): get it again") from None
        else:
            found = read_pickle(file)
        for key in found.keys() & tensors.keys():
            raise ValueError(f"{file}: another file of {path} holds {key} too")
        tensors |= found
    if any(str(key).startswith(JANUS) for key in tensors):
        tensors = {key.removeprefix(JANUS): w for key, w in tensors.items() if str(key).startswith(JANUS)}
    return header, tensors


JANUS = "gen_vision_model."  # where a Janus-Pro checkpoint keeps its image tokenizer


def read_pickle(file):
    """{name: tensor} of a torch.save file; of several wrappers `ema`, then `model`, then `state_dict` is the one,
    as LlamaGen's demo takes them."""
    try:
        # Namespace: the official trainer saves its flags; a plain bag of values without code
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        what = f"code ({found[1]})" if found else "no tensors"
        raise ValueError(f"{file}: refused, this pickle holds {what}; expected tensors only") from None
    except Exception as error:  # torch.load raises many kinds for a damaged file
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: damaged ({line}): get it again") from None
    for wrapper in ("ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
            break
    if not isinstance(content, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise ValueError(f"{file}: holds no weights (expected a dict of tensors, or one in ema, model or state_dict)")
    return content


# ----------------------------------------------------------------------------------------------------------
# downloads

_SIGLIP2_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
                  "preprocessor_config.json", "special_tokens_map.json")  # fmt: skip

# our name: (repository of the Hugging Face hub, or bucket of Google Cloud Storage as gs://..., files)
DOWNLOADS = {
    "vq_ds16_c2i": ("FoundationVision/LlamaGen", ("vq_ds16_c2i.pt",)),
    "vq_ds16_t2i": ("peizesun/llamagen_t2i", ("vq_ds16_t2i.pt",)),
    **{f"siglip2-{size}-patch16-{side}": (f"google/siglip2-{size}-patch16-{side}", _SIGLIP2_FILES)
       for size in ("base", "large", "so400m") for side in (256, 384)},
    "janus-pro-1b": ("deepseek-ai/Janus-Pro-1B", ("config.json", "pytorch_model.bin", "tokenizer.json",
                     "tokenizer_config.json", "preprocessor_config.json", "processor_config.json",
                     "special_tokens_map.json")),
    "var-vq": ("FoundationVision/var", ("vae_ch160v4096z32.pth",)),
    "gemma-tokenizer": ("gs://big_vision", ("gemma_tokenizer.model",)),
    "paligemma-tokenizer": ("gs://big_vision", ("paligemma_tokenizer.model",)),
}  # fmt: skip


def address(place, file, revision="main"):
    """The URL of a file; a mirror may stand in for the hub (HF_ENDPOINT) or for the bucket (STORAGE_EMULATOR_HOST)."""
    if place.startswith("gs://"):
        host = os.environ.get("STORAGE_EMULATOR_HOST") or "https://storage.googleapis.com"
        return f"{host.rstrip('/')}/{place.removeprefix('gs://')}/{file}"
    return f"{(os.environ.get('HF_ENDPOINT') or 'https://huggingface.co').rstrip('/')}/{place}/resolve/{revision}/{file}"


class TryAgain(Exception):
    """A download that broke for a reason that may pass; `pause`: seconds that the server asked for."""

    def __init__(self, reason, pause=0.0):
        super().__init__(reason)
        self.pause = pause


def fetch(url, path, token=None, attempts=6, wait=1.0):
    """Download `url` to `path`: streamed to path.part, checked, then renamed. Returns its SHA-256.

    A stopped download goes on where it was, if the server's file is still the same one. Broken connections and the
    answers 429 and 5xx are tried again after wait, 2 wait, 4 wait ... seconds, `attempts` times without progress.
    Size: as the server announces it. Hash: the one recorded beside the file (path.sha256), else the hub's own for
    large files; without either it is recorded. A file that is already there is only checked.
    A proxy comes from the usual variables (HTTPS_PROXY). token: sent as a bearer token, for gated files.
    Raises OSError (network, disk) or ValueError (wrong size or hash), in one line.
    """
    path = Path(path)
    part, record = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.sha256")
    words = record.read_text(errors="replace").split() if record.exists() else []
    recorded = words[0].lower() if words else None
    if path.exists():
        found = sha256_of(path)
        if recorded and found != recorded:
            raise ValueError(f"{path}: its SHA-256 is {found}, recorded was {recorded}: delete it and run this again, "
                             "or delete the .sha256 if the change is yours")  # fmt: skip
        _record(record, f"{found}  {path.name}\n")
        return found
    path.parent.mkdir(parents=True, exist_ok=True)
    failures, most = 0, 0
    with requests.Session() as session, tqdm(desc=path.name, unit="B", unit_scale=True, unit_divisor=1024) as bar:
        session.headers["Accept-Encoding"] = "identity"  # sizes and ranges are those of the file itself
        if token:
            if not (token.isascii() and token.isprintable()):
                raise ValueError("HF_TOKEN holds characters that no token has: set it again")
            session.headers["Authorization"] = f"Bearer {token}"
        while True:
            try:
                size, announced = receive(session, url, part, bar)
                break
            except (TryAgain, requests.RequestException) as error:
                if isinstance(error, (ValueError, requests.TooManyRedirects)):  # ValueError: this is no address at all
                    raise ValueError(f"{url}: {error}") from None
                reason, pause = str(error).splitlines()[0][:200], getattr(error, "pause", 0)
            came = part.stat().st_size if part.exists() else 0
            failures, most = (0 if came > most else failures) + 1, max(came, most)
            if failures >= attempts:
                raise OSError(f"{url}: gave up after {failures} attempts ({reason}); what came is kept: run this again")
            pause = max(pause, wait * 2 ** (failures - 1))
            tqdm.write(f"{path.name}: {reason}; again in {pause:g} s", file=sys.stderr)
            time.sleep(pause)
    found, expected, came = sha256_of(part), recorded or announced, part.stat().st_size
    wrong = None
    if size is not None and came != size:
        wrong = f"{came:,} bytes came, expected {size:,}"
    elif expected and found != expected:
        wrong = f"its SHA-256 is {found}, expected {expected}"
    part.with_suffix(".etag").unlink(missing_ok=True)
    if wrong:
        part.unlink()
        raise ValueError(f"{url}: {wrong}: deleted, run this again")
    _record(record, f"{found}  {path.name}\n")
    os.replace(part, path)
    return found


def receive(session, url, part, bar):
    """One attempt of `fetch`: appends what is missing to `part`; returns (size, SHA-256), None where not announced."""
    tag = part.with_suffix(".etag")  # of the file that `part` belongs to
    have = part.stat().st_size if part.exists() else 0
    known = tag.read_text(errors="replace").strip() if tag.exists() else ""
    known = known if known.isascii() and known.isprintable() else ""
    resume = {"Range": f"bytes={have}-", "If-Range": known} if have and known else {}
    with session.get(url, headers=resume, stream=True, timeout=60) as answer:
        status = f"{answer.status_code} {answer.reason}"
        if answer.status_code in (408, 429) or answer.status_code >= 500:
            raise TryAgain(f"the server answers {status}", min(_number(answer, "Retry-After") or 0, 300))
        if answer.status_code == 416 and resume:
            if answer.headers.get("Content-Range") == f"bytes */{have}":  # it was all there
                return have, hub_hash(answer)
            part.unlink()
            raise TryAgain("the part on disk does not belong to it, starting again")
        if answer.status_code in (401, 403):
            raise OSError(f"{url}: the server answers {status}: a gated file needs a token in HF_TOKEN")
        if answer.status_code not in (200, 206):
            raise OSError(f"{url}: the server answers {status}")
        if answer.headers.get("Content-Type", "").startswith("text/html"):
            raise OSError(f"{url}: a web page came instead of the file: is a proxy or a login in between?")
        if answer.headers.get("Content-Encoding", "identity") != "identity":
            raise OSError(f"{url}: came as {answer.headers['Content-Encoding']}, not as it is: is a proxy in between?")
        etag = answer.headers.get("ETag", "W/")
        if answer.status_code == 206:
            span = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if not resume or not span or int(span[1]) != have or etag not in (known, "W/"):
                part.unlink(missing_ok=True)
                raise TryAgain("another part of a file came than was asked for, starting again")
            size = int(span[2])
        else:
            have, size = 0, _number(answer, "Content-Length")
        linked = next((n for one in [answer, *answer.history] if (n := _number(one, "X-Linked-Size"))), None)
        if etag.startswith("W/"):
            tag.unlink(missing_ok=True)  # nothing to tell the file by: no going on later
        else:
            _record(tag, etag)
        free = shutil.disk_usage(part.parent).free
        if size and size - have > free:
            raise OSError(f"{part}: {size - have:,} bytes to come, the disk has {free:,} left: make room, then go on")
        bar.total, bar.n = size, have
        with open(part, "ab" if have else "wb") as file:
            for chunk in answer.iter_content(1 << 16):
                file.write(chunk)
                bar.update(len(chunk))
            file.flush()
            os.fsync(file.fileno())
            if file.tell() == 0 or size and file.tell() < size:
                raise TryAgain(f"{file.tell():,} bytes came, expected {size or 'some'}")
        return linked or size, hub_hash(answer)


def _record(path, text):
    with whole(path) as temporary:
        temporary.write_text(text)


def _number(answer, header):
    """A header that holds a whole number, or None."""
    value = answer.headers.get(header, "")
    return int(value) if re.fullmatch("[0-9]{1,18}", value) else None


def hub_hash(answer):
    """The SHA-256 that the hub gives for large files in X-Linked-Etag, before the redirect, or in ETag; else None."""
    for one in [*answer.history, answer]:
        for name in ("X-Linked-Etag", "ETag"):
            value = one.headers.get(name, "").strip('"')
            if re.fullmatch("[0-9a-f]{64}", value):
                return value
    return None


def download(name, root=WEIGHTS, revision="main"):
    """Fetch official weights into ROOT/NAME/. Stop it at any time and run it again: it goes on where it was.

    HF_ENDPOINT names a mirror of the hub, HF_TOKEN is sent for gated files, HTTPS_PROXY is respected.
    """
    place, files = DOWNLOADS[name]
    (root / name).mkdir(parents=True, exist_ok=True)
    token = None if place.startswith("gs://") else os.environ.get("HF_TOKEN", "").strip()
    with only_one(root / name / ".lock"):  # two writers of one file would leave a mix of both
        for file in files:
            path = root / name / file
            already = " (already there, only checked)" if path.exists() else ""
            print(f"{path}{already}: sha256 {fetch(address(place, file, revision), path, token)}")


def main(argv=None):
    """The command line; returns the exit code: 0, 1 for bad data, 2 for bad usage (argparse)."""
    parser = Parser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("download", help="fetch official weights", description=download.__doc__)
    p.add_argument("name", choices=DOWNLOADS, metavar="NAME", help=", ".join(DOWNLOADS))
    p.add_argument("--root", type=Path, default=WEIGHTS,
                   help="default: weights/ beside this file, where train.py and sample.py look")
    p.add_argument("--revision", default="main", help="of the repository (default: main)")
    args = parser.parse_args(argv)
    if DOWNLOADS[args.name][0].startswith("gs://"):
        p.check_read(args, f"download {args.name}", vars(args).keys() - {"revision"})
    try:
        download(args.name, args.root, args.revision)
    except BrokenPipeError:
        return nobody_reads()
    except (ValueError, OSError) as error:
        print(f"error: {printable(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped: run this again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
