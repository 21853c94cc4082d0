"""Shared by the tests: one thread (small tensors gain nothing from more) and a tiny trained-nothing checkpoint."""

import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, at the first matrix product on a GPU

import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

REPO = Path(__file__).resolve().parents[1]
torch.set_num_threads(1)
# A shell that starts the tests in the background lets them ignore Ctrl-C, which some of them send.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption("--device", help="run the tests that take the fixture `device`, and no others, on this device")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device"):
        items[:] = [item for item in items if "device" in item.fixturenames]


@pytest.fixture
def device(request):
    """A torch.device, the CPU without --device. Products of float32 are whole there, not TF32."""
    torch.set_float32_matmul_precision("highest")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield torch.device(request.config.getoption("--device") or "cpu")


@pytest.fixture(autouse=True)
def seed():
    """Every test draws the same numbers in every run."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture
def one_graph(monkeypatch):
    """with one_graph(): the block compiles one graph, without a break, and does not compile it anew in later calls.
    graphs: so many instead, where shapes change."""
    from torch._dynamo import reset
    from torch._dynamo.utils import counters

    @contextmanager
    def block(backend="aot_eager", graphs=1):  # this backend writes no code, so that it is quick
        real = torch.compile
        reset()
        counters.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", lambda call, **more: real(call, backend=backend, **more))
            yield
        assert counters["stats"]["unique_graphs"] == graphs and not counters["graph_break"]
        reset()

    return block


@pytest.fixture
def run():
    """Run one of the scripts as a user would; returns the finished process with text output."""

    def call(*args, cwd=REPO, stdin=None):
        command = [sys.executable, str(REPO / args[0]), *map(str, args[1:])]
        return subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, timeout=240)

    return call


@pytest.fixture
def sample(monkeypatch, capfdbinary):
    """sample.py's main in this process, with the same result as `run`: no seconds for importing torch again."""
    import io

    from sample import main

    def call(script, *args, stdin=b""):
        assert script == "sample.py"
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            code = main([str(a) for a in args])
        except SystemExit as stopped:
            code = stopped.code
        return subprocess.CompletedProcess(args, code, *capfdbinary.readouterr())

    return call


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory):
    """A folder as train.py writes it, with random weights of a very small model."""
    from model import LlamaConfig, LlamaSeg, LlamaSegConfig, SigLIPConfig
    from tokenizer import VQGAN, VQGANConfig

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny")
    vqgan = VQGAN(VQGANConfig(channels=8, channel_mult=(1, 1, 1, 1, 2), res_blocks=1, latent_channels=8,
                              codebook_size=32, norm_groups=4))
    model = LlamaSeg(LlamaSegConfig(
        siglip=SigLIPConfig(image_size=64, vision_width=32, vision_layers=1, vision_heads=2, vision_mlp=32,
                            vocab_size=768, text_length=24, text_width=16, text_layers=1, text_heads=2, text_mlp=16),
        llama=LlamaConfig(width=32, layers=2, heads=2, mlp=48), codebook_size=32, mask_grid=4, freeze_encoders=False,
    ))
    vqgan.save_pretrained(folder / "mask_tokenizer.safetensors")
    model.save_pretrained(folder / "model.safetensors")
    shutil.copyfile(REPO / "assets" / "text.model", folder / "text.model")
    return folder
