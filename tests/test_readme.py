"""The commands of README.md: those that need seconds are run, of the others every flag is read."""

import importlib
import io
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
from conftest import REPO
from PIL import Image

README = (REPO / "README.md").read_text()
# What each script does with its flags, by the names of its functions; these would need hours, weights or data.
JOBS = {"train": ("train", "merge", "print_config"), "weights": ("download",),
        "tokenizer": ("train", "encode"), "annotate": ("annotate", "export"), "segvar": ("segment_pictures", "score"),
        "page": ("open_server",)}
RUN = ("python sample.py --image", "cat x.png", "python sample.py --checkpoint out --image", "python data.py",
       "python metrics.py")


class Nothing(list):
    """What a job that is not done returns, also in the place of a server."""

    def serve_forever(self):
        return None


def commands():
    """(line of README.md, script, its arguments) of each command in its bash blocks and tables."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", README, re.DOTALL) for line in block.splitlines()]
    for line in lines + re.findall(r"\| `(python [^`]*)` \|", README):
        line = re.sub(r"\s{2,}#.*", "", line)
        words = shlex.split(line)
        scripts = [i for i, word in enumerate(words) if word.endswith(".py")]
        if scripts:
            yield line, words[scripts[-1]].removesuffix(".py"), words[scripts[-1] + 1:]


def test_every_command_of_a_block_is_found():
    assert len(list(commands())) > 25
    assert {script for _, script, _ in commands()} == {"annotate", "data", "metrics", "page", "sample", "segvar",
                                                       "tokenizer", "train", "weights"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with the files that the commands name."""
    example = Image.open(REPO / "assets" / "example.png").convert("RGB")
    (tmp_path / "folder").mkdir()
    for name in ("x.jpg", "x.png", "folder/1.png", "folder/2.png"):
        example.save(tmp_path / name)
    shutil.copytree(REPO / "tests" / "fixtures" / "ade20k", tmp_path / "data")
    (tmp_path / "out").mkdir()
    for name in ("model.safetensors", "mask_tokenizer.safetensors", "text.model"):
        (tmp_path / "out" / name).symlink_to(REPO / "assets" / name)
    (tmp_path / "out" / "log.jsonl").write_text('{"step": 1, "loss": 5.0}\n{"step": 2, "loss": 4.0, "cIoU": 0.1}\n')
    (tmp_path / "sa1b").mkdir()
    (tmp_path / "ovrs").mkdir()
    for name in ("predicted_masks", "true_masks"):
        (tmp_path / name).mkdir()
        Image.fromarray(np.eye(9, dtype=np.uint8) * 255).save(tmp_path / name / "1.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("line,script,words", [pytest.param(*command, id=command[0]) for command in commands()])
def test_command(line, script, words, folder, monkeypatch, capsys):
    module = importlib.import_module(script)
    if any(start in line for start in RUN):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((folder / "x.png").read_bytes())))
        assert module.main(words) == 0
        assert capsys.readouterr().out
        return
    done = []
    for job in JOBS.get(script, ()):
        monkeypatch.setattr(module, job, lambda *args, **more: done.append(args) or Nothing())
    if script == "sample":
        for name, (_, flags) in module.JOBS.items():
            monkeypatch.setitem(module.JOBS, name, (lambda args: done.append(args), flags))
    assert module.main(words) == 0 and len(done) == 1
