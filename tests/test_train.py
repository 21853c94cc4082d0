import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import model as M
import train
from data import Scenes
from model import LlamaConfig, LlamaSeg, LlamaSegConfig, SigLIPConfig
from sample import Segmenter


@pytest.fixture
def small(tiny_checkpoint, monkeypatch):
    """Flags for a run that takes seconds: the tiny shape as the preset `scenes`."""
    config = LlamaSeg.from_pretrained(tiny_checkpoint / "model.safetensors").config
    monkeypatch.setitem(train.PRESETS, "scenes", config)
    monkeypatch.setitem(train.DEFAULTS, "encoder_steps", (0,) * 5)
    monkeypatch.setattr(train, "matmul_rate", lambda device, dtype: 1e11)  # a fifth of such a run
    monkeypatch.setattr(train, "training_flops", lambda model, phrases: 1e9)

    def flags(out, *more):
        return ["--mask-tokenizer", str(tiny_checkpoint / "mask_tokenizer.safetensors"), "--out-dir", str(out),
                "--batch-size", "8", "--max-steps", "6", "--warmup-steps", "2", "--eval-every", "6",
                "--eval-count", "4", "--save-every", "3", "--device", "cpu", "--dtype", "float32", *more]

    return flags


def records(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def losses(out):
    return {r["step"]: r["loss"] for r in records(out) if "loss" in r}


def test_a_run_leaves_what_it_promises(small, tmp_path):
    assert train.main(small(tmp_path)) == 0
    steps = [r for r in records(tmp_path) if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert all(0 < r["grad_norm"] < 100 for r in steps)
    assert all({"loss", "lr", "samples_per_s", "peak_memory_gb"} <= set(r) for r in steps)
    assert all(r["mfu"] == pytest.approx(r["samples_per_s"] * 1e9 / 1e11) for r in steps)
    (scores,) = [r for r in records(tmp_path) if "cIoU" in r]
    assert scores["count"] == 4 and {"gIoU", "mAHD@0.5"} <= set(scores)
    assert Image.open(tmp_path / "grid-000006.png").size[0] > 300
    names = {p.name for p in tmp_path.iterdir()}
    assert {"checkpoint-0000003.pt", "checkpoint-0000006.pt", "best.safetensors", "curves.png", "args.json",
            "model.safetensors", "mask_tokenizer.safetensors", "text.model"} <= names
    assert not any(name.endswith(".tmp") for name in names)


@pytest.fixture
def exact(device):
    """The name of the device, whose kernels give the same digits in every run; conftest.py sets cuBLAS' part."""
    torch.use_deterministic_algorithms(True)
    yield str(device)
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_gives_the_losses_of_the_unbroken_run(small, tmp_path, exact, optimizer):
    def call(out, *more):
        assert train.main(small(out, "--optimizer", optimizer, "--device", exact, *more)) == 0

    call(tmp_path / "whole")
    # Stopped after step 3: the schedule must be the whole run's, so the stop is a kill, not a smaller --max-steps.
    real = train.save_checkpoint

    def save_and_die(*args):
        real(*args)
        raise KeyboardInterrupt

    train.save_checkpoint = save_and_die
    try:
        assert train.main(small(tmp_path / "broken", "--optimizer", optimizer, "--device", exact)) == 130
    finally:
        train.save_checkpoint = real
    assert max(losses(tmp_path / "broken")) == 3
    with open(tmp_path / "broken" / "log.jsonl", "a") as log:  # a kill a little later leaves steps without checkpoint
        log.write('{"step": 4, "loss": 99.0}\n')
    call(tmp_path / "broken", "--resume", "auto")
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    assert [r["step"] for r in records(tmp_path / "broken") if "loss" in r] == [1, 2, 3, 4, 5, 6]
    a, b = (torch.load(tmp_path / d / "checkpoint-0000006.pt", weights_only=True)["model"]
            for d in ("whole", "broken"))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_resume_auto_without_a_checkpoint_starts_over(small, tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 99.0}\n')  # killed before the first checkpoint
    assert train.main(small(tmp_path, "--resume", "auto")) == 0
    assert 99.0 not in losses(tmp_path).values() and len(losses(tmp_path)) == 6


def test_accumulation_gives_the_same_losses(small, tmp_path):
    assert train.main(small(tmp_path / "a")) == 0
    assert train.main(small(tmp_path / "b", "--micro-batch-size", "4")) == 0
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert all(abs(a[s] - b[s]) < 1e-4 for s in a)


def test_one_process_of_torchrun_gives_the_losses_of_none(small, tmp_path, exact, monkeypatch):
    """DistributedDataParallel with gloo, or NCCL on a GPU."""
    assert train.main(small(tmp_path / "none", "--micro-batch-size", "4", "--device", exact)) == 0
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "localhost",
                        "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, str(value))
    assert train.main(small(tmp_path / "one", "--micro-batch-size", "4", "--device", exact)) == 0
    none, one = losses(tmp_path / "none"), losses(tmp_path / "one")
    assert len(one) == 6 and all(one[step] == pytest.approx(none[step], abs=1e-5) for step in none)


LAUNCH = """
import os, signal, sys, time, train
from model import LlamaSeg
train.PRESETS["scenes"] = LlamaSeg.from_pretrained(sys.argv.pop(1)).config
rank, step, number = map(int, os.environ.get("SIGNAL", "-1 0 0").split())  # what that rank sends in that step
rate = train.learning_rate
def learning_rate(at, args):
    if rank == int(os.environ["RANK"]) and step == at + 1:
        if number > 0:
            signal.raise_signal(number)  # in this thread: the handler runs before the step ends
        else:  # to torchrun, which passes it on to the process groups of its ranks; wait until it is here
            came, handler = [], signal.getsignal(-number)
            signal.signal(-number, lambda *call: (came.append(True), handler(*call)))
            os.kill(os.getppid(), -number)
            while not came:
                time.sleep(0.01)
    if step == at + 1 and number < 0:
        sys.setswitchinterval(1)  # seconds that a thread keeps Python's lock: who needs it to end waits longest here
    return rate(at, args)
train.learning_rate = learning_rate
train.matmul_rate, train.training_flops = lambda *_: 1e11, lambda *_: 1e9
train.DEFAULTS["encoder_steps"] = (0,) * 5
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture
def torchrun(tiny_checkpoint, tmp_path):
    """torchrun(flags, signal): train.py in two processes on the tiny model."""
    (tmp_path / "launch.py").write_text(LAUNCH)

    def run(flags, sent="-1 0 0"):
        return subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
             str(tmp_path / "launch.py"), str(tiny_checkpoint / "model.safetensors"), *flags],
            env={**os.environ, "PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", "SIGNAL": sent},
            capture_output=True, text=True, timeout=240,
        )

    return run


def test_two_processes_stopped_by_a_signal_to_torchrun_and_one_that_goes_on(small, torchrun, tmp_path):
    """Two processes with workers that accumulate, stopped by SIGTERM, and one that does not: the losses of one run."""
    # a small learning rate: a large one makes of the seventh digit the fourth
    flags = ["--max-steps", "10", "--eval-every", "4", "--lr", "1e-3", "--phrases", "2"]
    assert train.main(small(tmp_path / "one", *flags)) == 0
    flags = small(tmp_path / "two", *flags, "--save-every", "100")
    done = torchrun([*flags, "--micro-batch-size", "2", "--workers", "2"], f"1 6 {-signal.SIGTERM}")
    assert "stopped at step 6 of 10, saved" in done.stdout + done.stderr, done.stderr[-2000:]
    assert [train.step_of(path) for path in train.saved_steps(tmp_path / "two")] == [6, 4]
    assert train.main([*flags, "--resume", "auto"]) == 0
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert list(two) == list(range(1, 11)) and all(two[step] == pytest.approx(one[step], abs=1e-4) for step in two)
    scores = [[r for r in records(tmp_path / d) if "cIoU" in r] for d in ("one", "two")]
    for one, two in zip(*scores, strict=True):  # each example once, on whichever rank
        assert one["step"] == two["step"] and one["count"] == two["count"] == 4


def test_sharded_losses_are_those_of_plain_ranks_and_any_number_resumes(small, torchrun, tmp_path):
    flags = ["--batch-size", "16", "--micro-batch-size", "4", "--optimizer", "adamw"]

    def run(out, *more):
        done = torchrun(small(tmp_path / out, *flags, *more))
        assert done.returncode == 0, done.stderr
        return losses(tmp_path / out)

    plain, sharded = run("plain"), run("sharded", "--shard")
    assert len(plain) == 6 and all(sharded[step] == pytest.approx(plain[step], abs=1e-5) for step in plain)
    for out in ("two", "one"):
        shutil.copytree(tmp_path / "sharded", tmp_path / out)
        (tmp_path / out / "checkpoint-0000006.pt").unlink()
    assert run("two", "--shard", "--resume", "auto") == sharded
    states = [torch.load(tmp_path / out / "checkpoint-0000006.pt", weights_only=True) for out in ("sharded", "two")]
    assert all(torch.equal(w, states[1]["model"][name]) for name, w in states[0]["model"].items())
    assert train.main(small(tmp_path / "one", *flags, "--resume", "auto")) == 0  # one rank, not sharded
    assert all(losses(tmp_path / "one")[step] == pytest.approx(plain[step], abs=1e-5) for step in plain)
    assert all((tmp_path / "sharded" / name).exists() for name in ("best.safetensors", "model.safetensors"))


def test_a_killed_rank_ends_the_job(small, torchrun, tmp_path):
    done = torchrun(small(tmp_path / "out", "--max-steps", "3000"), f"1 5 {int(signal.SIGKILL)}")
    assert done.returncode != 0
    assert "another rank ended" in done.stderr or "SIGKILL" in done.stderr
    assert max(losses(tmp_path / "out")) <= 5


def stop_at(monkeypatch, at, number=signal.SIGTERM):
    """A signal reaches the process in that step."""
    real = train.learning_rate

    def learning_rate(step, args):
        if step + 1 == at:
            signal.raise_signal(number)
        return real(step, args)

    monkeypatch.setattr(train, "learning_rate", learning_rate)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_step_and_saves(small, tmp_path, monkeypatch, capsys, number):
    assert train.main(small(tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        stop_at(patch, 2, number)
        assert train.main(small(tmp_path / "broken")) == 0
    assert max(losses(tmp_path / "broken")) == 2
    assert train.main(small(tmp_path / "broken", "--resume", "auto")) == 0
    assert "resumed from checkpoint-0000002, going on with 2 of 6 steps done" in capsys.readouterr().out
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_a_stop_saves_before_an_evaluation_and_does_without_it(small, tmp_path, monkeypatch):
    """torchrun kills what has not ended 30 seconds after its signal, and an evaluation may take longer."""
    real, saved = train.evaluate, []

    def evaluate(*args, **more):
        saved.append([train.step_of(path) for path in train.saved_steps(tmp_path)])
        return real(*args, **more)

    monkeypatch.setattr(train, "evaluate", evaluate)
    stop_at(monkeypatch, 4)
    assert train.main(small(tmp_path, "--eval-every", "2", "--save-every", "100")) == 0
    assert saved == [[2]] and [train.step_of(path) for path in train.saved_steps(tmp_path)] == [4, 2]


def test_an_evaluation_that_a_stop_left_out_comes_at_the_resumption(small, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at(patch, 6)  # in the last step
        assert train.main(small(tmp_path)) == 0
    assert not any("cIoU" in r for r in records(tmp_path)) and not (tmp_path / "best.safetensors").exists()
    assert train.main(small(tmp_path, "--resume", "auto")) == 0
    assert [r["step"] for r in records(tmp_path) if "cIoU" in r] == [6] and (tmp_path / "best.safetensors").exists()
    assert train.main(small(tmp_path, "--resume", "auto")) == 0
    assert [r["step"] for r in records(tmp_path) if "cIoU" in r] == [6]  # once


def test_a_signal_ends_an_evaluation_at_once(small, tmp_path, monkeypatch, capsys):
    handler, real = signal.getsignal(signal.SIGTERM), train.Segmenter.many

    def many(*args, **more):
        signal.raise_signal(signal.SIGTERM)
        return real(*args, **more)

    with monkeypatch.context() as patch:
        patch.setattr(train.Segmenter, "many", many)
        assert train.main(small(tmp_path, "--eval-every", "2")) == 0
    assert "stopped in the evaluation after step 2, which is saved" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) is handler and max(losses(tmp_path)) == 2
    assert train.main(small(tmp_path, "--eval-every", "2", "--resume", "auto")) == 0
    assert [r["step"] for r in records(tmp_path) if "cIoU" in r] == [2, 4, 6]


def test_a_broken_example_in_a_worker_is_one_line_and_leaves_no_process(small, tmp_path, capsys):
    line = json.dumps({"image": "none.png", "phrase": "the square", "mask": [[1, 1, 9, 1, 9, 9]]})
    (tmp_path / "mine.jsonl").write_text(f"{line}\n{line}\n")
    flags = ["--data", f"jsonl:{tmp_path / 'mine.jsonl'}", "--val", "scenes", "--workers", "1"]
    assert train.main(small(tmp_path / "out", *flags)) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and "mine.jsonl: line " in error and "Traceback" not in error
    assert not multiprocessing.active_children()  # one would be waited for without end


def test_going_back_needs_the_later_checkpoints_out_of_the_way(small, tmp_path, monkeypatch, capsys):
    """--keep would delete what the earlier step leads to, and --resume auto would take the later one."""
    assert train.main(small(tmp_path / "a")) == 0
    later, older = train.saved_steps(tmp_path / "a")
    log = (tmp_path / "a" / "log.jsonl").read_text()
    assert train.main(small(tmp_path / "a", "--resume", str(older))) == 1
    assert "checkpoint-0000006.pt is of a later step" in capsys.readouterr().err
    assert train.saved_steps(tmp_path / "a") == [later, older] and (tmp_path / "a" / "log.jsonl").read_text() == log
    later.rename(tmp_path / "elsewhere.pt")
    stop_at(monkeypatch, 5)
    assert train.main(small(tmp_path / "a", "--resume", str(older), "--keep", "1")) == 0
    assert [train.step_of(path) for path in train.saved_steps(tmp_path / "a")] == [5]
    # the checkpoint of another run does not go on in a folder that holds a run
    (tmp_path / "elsewhere.pt").rename(tmp_path / "checkpoint-0000006.pt")
    assert train.main(small(tmp_path / "a", "--resume", str(tmp_path / "checkpoint-0000006.pt"))) == 1
    assert "holds a run" in capsys.readouterr().err
    assert train.main(small(tmp_path / "b", "--resume", str(tmp_path / "checkpoint-0000006.pt"))) == 0
    assert train.main(small(tmp_path / "a", "--resume", "auto", "--max-steps", "4")) == 1
    assert "has done 5 steps, more than --max-steps 4" in capsys.readouterr().err


def test_two_runs_do_not_share_a_folder(small, tmp_path, capsys):
    hold = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold, tmp_path / "lock"], stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    other.stdout.readline()
    assert train.main(small(tmp_path)) == 1
    assert "another process is writing to this folder" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]
    other.communicate(b"\n")
    assert train.main(small(tmp_path)) == 0


def test_a_resumed_run_keeps_its_optimizer(small, tmp_path, capsys):
    """The optimizer's state would bring back the old value, whatever the summary says."""
    assert train.main(small(tmp_path, "--max-steps", "3")) == 0
    for flag in ("--betas 0.77 0.95", "--weight-decay 0.1", "--background-weight 1", "--clip 2"):
        assert train.main(small(tmp_path, "--resume", "auto", *flag.split())) == 1
        name, value = flag.split()[:2]
        assert name in (error := capsys.readouterr().err) and f"not {float(value)}" in error.replace("[", "")


@pytest.mark.parametrize("spoil, message", [
    (lambda model, loss: loss * math.nan, "loss is nan"),
    (lambda model, loss: loss + (0 * model.boi).sqrt().sum(), "gradient norm nan"),  # 0, with the gradient 0 * infinity
])
def test_what_is_not_finite_never_reaches_the_weights(small, tmp_path, monkeypatch, capsys, spoil, message):
    real = train.LlamaSeg.forward

    def broken(self, *args, **more):
        logits, loss = real(self, *args, **more)
        return logits, spoil(self, loss)

    monkeypatch.setattr(train.LlamaSeg, "forward", broken)
    assert train.main(small(tmp_path, "--save-every", "1")) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and "at step 1" in error and "train-" in error
    assert not train.saved_steps(tmp_path)


def test_a_run_overwrites_nothing_of_others(small, tmp_path, tiny_checkpoint, capsys):
    shutil.copyfile(tiny_checkpoint / "model.safetensors", tmp_path / "model.safetensors")
    for more in ([], ["--resume", "auto"]):
        assert train.main(small(tmp_path, *more)) == 1 and "would overwrite" in capsys.readouterr().err
    (tmp_path / "model.safetensors").unlink()
    assert train.main(small(tmp_path)) == 0
    (tmp_path / ".notes.tmp").write_text("important")
    (tmp_path / ".args.json.12.tmp").write_text("of a killed run")
    shutil.copyfile(tmp_path / "checkpoint-0000003.pt", tmp_path / "checkpoint-best.pt")  # not one of the run's names
    assert train.main(small(tmp_path, "--resume", "auto")) == 0
    assert [path.name for path in tmp_path.glob(".*")] == [".notes.tmp"] and (tmp_path / "checkpoint-best.pt").exists()


def test_another_text_tokenizer_is_refused(small, tmp_path, capsys):
    assert train.main(small(tmp_path / "out", "--max-steps", "3")) == 0
    state = torch.load(tmp_path / "out" / "checkpoint-0000003.pt", weights_only=True)
    assert set(state["frozen"]) == {"mask_tokenizer", "text_tokenizer"}
    state["frozen"]["text_tokenizer"]["sha256"] = "0" * 64  # as if it had been trained with another one
    torch.save(state, tmp_path / "out" / "checkpoint-0000003.pt")
    assert train.main(small(tmp_path / "out", "--resume", "auto")) == 1
    assert "was trained with the text tokenizer" in capsys.readouterr().err


def damage_bytes(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2:len(content) // 2 + 40] = b"\x3c" * 40
    path.write_bytes(content)


def damage_state(change):
    def damage(path):
        state = torch.load(path, weights_only=True)
        change(state)
        torch.save(state, path)

    return damage


HOSTILE = [
    (damage_bytes, "damaged"), (damage_state(lambda s: s.pop("frozen")), "not a whole checkpoint"),
    (damage_state(lambda s: s["model"].popitem()), "does not fit"),
    (damage_state(lambda s: s["optimizers"].pop()), "does not fit"),
    (lambda path: (path.unlink(), os.mkfifo(path)), "a pipe"),
]


def test_a_hostile_checkpoint_is_one_line(small, tmp_path, capsys):
    assert train.main(small(tmp_path, "--max-steps", "3")) == 0
    (path,) = train.saved_steps(tmp_path)
    whole = path.read_bytes()
    for damage, message in HOSTILE:
        path.write_bytes(whole)
        damage(path)
        assert train.main(small(tmp_path, "--resume", str(path))) == 1
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("error: ") and message in error and path.name in error


@pytest.mark.parametrize("line, code", [('{"step": 1, "loss": 0.0}', 0), ('"x"', 1), ("[1]", 1), ("{}", 1)])
def test_a_hostile_log_is_one_line(tmp_path, capsys, line, code):
    (tmp_path / "log.jsonl").write_text(line + "\n")
    assert train.main(["--plot", str(tmp_path)]) == code
    assert code == 0 or "log.jsonl: line 1 is not what train.py writes" in capsys.readouterr().err


def test_a_full_disk_is_one_line(small, tmp_path, monkeypatch, capsys):
    def full(state, file):
        file.write(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:676] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", full)
    assert train.main(small(tmp_path)) == 1
    assert "checkpoint-0000003.pt: No space left on device" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.pt")) and not list(tmp_path.glob(".*"))


def test_validation_is_spread_over_the_set(tiny_checkpoint):
    scenes, asked = Scenes("val"), []

    class Ten:
        def __len__(self):
            return 10

        def __getitem__(self, i):
            asked.append(i)
            return scenes[i]

    parts = Segmenter.load(tiny_checkpoint, "cpu")
    train.evaluate(SimpleNamespace(segmenter=parts, rank=0, world_size=1), Ten(), 4)
    assert asked == [0, 2, 5, 7]


def test_own_data_is_held_out_by_picture(small, tmp_path, monkeypatch, capsys):
    line = {"phrase": "the square", "mask": [[1, 1, 9, 1, 9, 9]]}
    for i in range(12):
        Image.new("RGB", (20, 20), (8 * i, 0, 0)).save(tmp_path / f"{i}.png")
    lines = [json.dumps({**line, "image": f"{i}.png", "id": f"{i}-{k}"}) for k in range(3) for i in range(12)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    trained, checked = [], []
    forward, evaluate = train.next_batch, train.evaluate

    def next_batch(*args):
        batch, ids = forward(*args)
        trained.extend(ids or [])
        return batch, ids

    def spy(*args, **more):
        checked.extend(args[1][i].id for i in range(len(args[1])))
        return evaluate(*args, **more)

    monkeypatch.setattr(train, "next_batch", next_batch)
    monkeypatch.setattr(train, "evaluate", spy)
    own = ["--data", f"jsonl:{tmp_path / 'mine.jsonl'}", "--max-steps", "5"]  # all of it
    assert train.main(small(tmp_path / "a", *own)) == 0
    held, seen = ({id.split("-")[0] for id in ids} for ids in (checked, trained))
    assert len(held) == 1 and len(set(checked)) == 3 and not held & seen and len(held | seen) == 12
    assert "validation: 3 of the 36 lines" in capsys.readouterr().out
    trained.clear()
    (tmp_path / "more.jsonl").write_text(lines[0].replace("0-0", "0-9") + "\n" + lines[1].replace("1-0", "1-9"))
    both = ["--data", f" {own[1]} , jsonl:{tmp_path / 'more.jsonl'}", *own[2:]]  # of the same pictures
    assert train.main(small(tmp_path / "c", *both)) == 0
    assert not held & {id.split("-")[0] for id in trained}
    (tmp_path / "mine.jsonl").write_text("\n".join(lines[::-1]))
    assert train.main(small(tmp_path / "a", *own, "--resume", "auto")) == 1  # the examples' order is another one
    assert "--files" in capsys.readouterr().err
    trained.clear()
    assert train.main(small(tmp_path / "b", *own, "--val", own[1])) == 0
    assert {id.split("-")[0] for id in trained} == held | seen  # nothing is held out


@pytest.mark.parametrize("data, metric", [("scenes", "cIoU"), ("voc20", "mIoU")])
def test_the_best_weights_are_those_of_the_best_evaluation(small, tmp_path, monkeypatch, data, metric):
    """By mIoU for a semantic set; the other number is best at another step."""
    real, scores = train.add_up, iter([0.2, 0.5, 0.4])

    def add_up(records):
        total, by_task = real(records)
        value = next(scores)
        numbers = {"cIoU": 1 - value, "mIoU": 1 - value, "gIoU": None, "mAHD@0.5": None, metric: value}
        monkeypatch.setattr(total, "compute", lambda: numbers)
        return total, by_task

    monkeypatch.setattr(train, "add_up", add_up)
    root = [] if data == "scenes" else ["--root", str(REPO / "tests" / "fixtures" / "pascal_voc")]
    if root:  # an index is written beside the data
        root = ["--root", str(shutil.copytree(root[1], tmp_path / "voc"))]
    flags = ["--data", data, *root, "--max-steps", "3", "--eval-every", "1", "--keep", "3", "--batch-size", "4"]
    assert train.main(small(tmp_path / "out", *flags)) == 0
    second = torch.load(train.saved_steps(tmp_path / "out")[1], weights_only=True)["model"]
    best = load_file(tmp_path / "out" / "best.safetensors")
    assert all(torch.equal(best[name], second[name].half()) for name in second)


@pytest.mark.parametrize("local_rank, order", [("0", ["index", "barrier"]), ("1", ["barrier", "index"])])
def test_one_rank_indexes_and_the_others_wait(monkeypatch, local_rank, order):
    found = []
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(train.dist, "barrier", lambda: found.append("barrier"))
    with train.one_rank_first():
        found.append("index")
    assert found == order


@pytest.mark.parametrize("flags", [
    ["--plot", "out", "--lr", "1"], ["--merge", "out", "--preset", "llamaseg-b"], ["--lora-rank", "3"], ["--root", "x"],
    ["--any-weights"], ["--preset", "llamaseg-janus", "--mask-tokenizer", "x"],
    ["--max-step", "3"], ["--preset", "llamaseg-janus", "--init-from", "x", "--lora-alpha", "3"],
])
def test_a_flag_that_would_not_be_read_is_refused(capsys, flags):
    with pytest.raises(SystemExit) as stopped:
        train.main(flags)
    assert stopped.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_a_damaged_checkpoint_is_passed_over(small, tmp_path, capsys):
    assert train.main(small(tmp_path)) == 0
    before = losses(tmp_path)
    newest, older = train.saved_steps(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-1000])  # half a copy
    (tmp_path / ".checkpoint-0000007.pt.1.tmp").write_bytes(b"half a save")
    assert train.main(small(tmp_path, "--resume", "auto")) == 0
    said = capsys.readouterr().out
    assert "checkpoint-0000006.pt: not a whole checkpoint" in said
    assert "resumed from checkpoint-0000003, going on with 3 of 6 steps done" in said
    assert losses(tmp_path) == before and not list(tmp_path.glob(".*"))
    assert (tmp_path / "checkpoint-0000006.pt.damaged").exists() and train.saved_steps(tmp_path) == [newest, older]
    for path in (newest, older):
        path.write_bytes(b"nothing")
    assert train.main(small(tmp_path, "--resume", "auto")) == 1
    assert "not a whole checkpoint" in capsys.readouterr().err


def test_only_the_newest_checkpoints_stay(small, tmp_path):
    assert train.main(small(tmp_path, "--save-every", "1", "--keep", "3")) == 0
    assert [int(p.stem[-7:]) for p in train.saved_steps(tmp_path)] == [6, 5, 4]


def test_the_learning_rate_warms_up_and_falls_to_zero():
    for warmup in ("100", "0.1"):  # steps, or a share of them
        args = train.parse_args(["--max-steps", "1000", "--warmup-steps", warmup, "--lr", "0.5"])
        rates = [train.learning_rate(s, args) for s in range(1001)]
        assert rates[0] == pytest.approx(0.005) and rates[99] == rates[100] == 0.5 and rates[1000] == pytest.approx(0)
        assert rates[550] == pytest.approx(0.25) and all(a >= b for a, b in zip(rates[99:], rates[100:]))


def test_each_parameter_has_exactly_one_optimizer(tiny_checkpoint):
    model = LlamaSeg.from_pretrained(tiny_checkpoint / "model.safetensors")
    for name in ("muon", "adamw"):
        optimizers = train.make_optimizers(model, train.parse_args(["--optimizer", name]))
        held = [id(p) for o in optimizers for g in o.param_groups for p in g["params"]]
        assert sorted(held) == sorted(id(p) for p in model.parameters())
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith("q_proj.weight"))  # matrices alone, as LoRA's
    assert len(train.make_optimizers(model, train.parse_args([]))) == 1


def test_wrong_use_ends_in_one_line(small, tmp_path, capsys):
    assert train.main(small(tmp_path)) == 0
    assert train.main(small(tmp_path)) == 1  # would mix two runs
    assert "--resume" in capsys.readouterr().err
    assert train.main(small(tmp_path, "--resume", "auto", "--seed", "7")) == 1
    assert "--seed 0, not 7" in capsys.readouterr().err
    assert train.main(small(tmp_path, "--resume", "auto", "--phrases", "2")) == 1
    assert "--phrases 4, not 2" in capsys.readouterr().err
    assert train.main(small(tmp_path / "x", "--micro-batch-size", "6")) == 1
    assert "8" in capsys.readouterr().err
    whole = (tmp_path / "checkpoint-0000006.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    assert train.main(small(tmp_path / "new", "--resume", str(tmp_path / "cut.pt"))) == 1
    assert "cut.pt" in capsys.readouterr().err
    log = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "log.jsonl").write_text("[]\n" + log)
    assert train.main(["--plot", str(tmp_path)]) == 1 and "log.jsonl: line 1 is not" in capsys.readouterr().err
    (tmp_path / "log.jsonl").unlink()
    assert train.main(small(tmp_path)) == 1  # its checkpoints are there
    other = small(tmp_path / "new", "--init-from", str(REPO / "assets" / "model.safetensors"))
    assert train.main(other) == 1 and "not that of --preset scenes" in capsys.readouterr().err
    assert train.main(small(tmp_path / "new", "--data", "scenes:9999999999")) == 2
    for flags in (["--max-stepz", "3"], ["--seed", "-1"], ["--workers", "-2"], ["--batch-size", "0"],
                  ["--micro-batch-size", "-8"], ["--dtype", "fp16"], ["--preset", "huge"], ["--device", "gpu"]):
        with pytest.raises(SystemExit) as stopped:
            train.main(flags)
        assert stopped.value.code == 2


# --- official frozen parts


@pytest.fixture
def official(tmp_path, monkeypatch):
    """The flags of a tiny LlamaSeg on official-format frozen parts, as the preset llamaseg-b."""
    fixtures, encoder = REPO / "tests" / "fixtures", tmp_path / "siglip-tiny"
    encoder.mkdir()
    content = json.loads((fixtures / "siglip" / "config.json").read_text())
    content["text_config"]["vocab_size"] = 620  # as many as the small Gemma tokenizer has
    (encoder / "config.json").write_text(json.dumps(content))
    tensors = load_file(fixtures / "siglip" / "model.safetensors")
    tensors["text_model.embeddings.token_embedding.weight"] = torch.randn(620, 48)
    save_file(tensors, encoder / "model.safetensors")
    shutil.copyfile(fixtures / "gemma_text" / "tokenizer.json", encoder / "tokenizer.json")
    config = LlamaSegConfig(llama=LlamaConfig(width=32, layers=2, heads=2, mlp=48), codebook_size=64, mask_grid=4)
    monkeypatch.setitem(train.PRESETS, "llamaseg-b", config)
    return ["--preset", "llamaseg-b", "--encoder", str(encoder),
            "--mask-tokenizer", str(fixtures / "llamagen_vq16" / "vq_ds16.pt"), "--batch-size", "8", "--max-steps", "4",
            "--warmup-steps", "1", "--eval-every", "4", "--eval-count", "2", "--save-every", "2",
            "--device", "cpu"]


def test_training_on_official_parts_keeps_them_apart(official, sample, tmp_path, capfdbinary):
    out = tmp_path / "out"
    assert train.main([*official, "--out-dir", str(out)]) == 0
    names = {p.name for p in out.iterdir()}
    assert "text.model" in names and "mask_tokenizer.safetensors" not in names
    with safe_open(out / "model.safetensors", "pt") as file:
        assert not any(name.startswith("encoder.") for name in file.keys())
        frozen = json.loads(file.metadata()["frozen"])
    assert (frozen["encoder"]["name"], frozen["mask_tokenizer"]["name"]) == ("siglip-tiny", "vq_ds16")
    state = torch.load(out / "checkpoint-0000004.pt", weights_only=True)
    assert not any(name.startswith("encoder.") for name in state["model"])

    picture, (_, _, _, encoder, _, vqgan, *_) = REPO / "assets" / "example.png", official
    flags = ["--checkpoint", out, "--image", picture, "--prompt", "the ring", "--out", tmp_path / "m"]
    given = ["--encoder", encoder, "--mask-tokenizer", vqgan]
    assert sample("sample.py", *flags, *given).returncode == 0
    done = sample("sample.py", *flags)
    assert done.returncode == 1 and b"weights.py download siglip-tiny" in done.stderr
    other = REPO / "tests" / "fixtures" / "llamagen_vq16" / "vq_ds16_ema.pt"
    given = ["--encoder", encoder, "--mask-tokenizer", other]
    done = sample("sample.py", *flags, *given)
    assert done.returncode == 1 and b"trained with the mask tokenizer vq_ds16 (" in done.stderr
    assert sample("sample.py", *flags, *given, "--any-weights").returncode == 0

    assert train.main([*official, "--out-dir", str(out), "--resume", "auto", "--max-steps", "6"]) == 0
    assert max(losses(out)) == 6
    capfdbinary.readouterr()
    new = ["--out-dir", tmp_path / "new", "--init-from", out / "model.safetensors"]
    for old in (["--out-dir", out, "--resume", "auto"], new):
        again = [*official, *map(str, old), "--mask-tokenizer", str(other), "--max-steps", "7"]
        assert train.main(again) == 1
        assert b"trained with the mask tokenizer vq_ds16" in capfdbinary.readouterr().err
    assert train.main([*again, "--any-weights"]) == 0


def test_official_parts_that_are_missing_are_named(capsys):
    args = ["--preset", "llamaseg-b", "--device", "cpu", "--mask-tokenizer", "vq_no", "--max-steps", "1"]
    assert train.main(args) == 1
    error = capsys.readouterr().err
    assert "vq_no" in error and "weights.py download" in error and "Traceback" not in error
    with pytest.raises(SystemExit) as stopped:
        train.main(["--encoder", "siglip2-base-patch16-256"])  # scenes trains its own
    assert stopped.value.code == 2


@pytest.mark.parametrize("flags,code", [(["--mask-tokenizer", "typo.pt"], 1), (["--lr", "nan"], 2), (["--lr", "0"], 2)])
def test_print_config_of_what_cannot_be(capsys, flags, code):
    try:
        assert train.main(["--preset", "llamaseg-b", "--print-config", *flags]) == code
    except SystemExit as stopped:
        assert stopped.code == code
    assert flags[1] in capsys.readouterr().err


def test_print_config_of_shared_models(capsys, monkeypatch):
    """ARGenSeg-8B has the official parameters; trained as a whole it fits no GPU of 80 GB, an eighth of it does."""
    monkeypatch.setenv("WORLD_SIZE", "8")
    peaks = []
    for more in ([], ["--shard"]):
        assert train.main(["--preset", "argenseg-8b", "--print-config", "--lora-rank", "0", "--micro-batch-size", "4",
                           "--activation-checkpointing", *more]) == 0
        text = capsys.readouterr().out
        trainable, frozen = (int(n.replace(",", "")) for n in re.search(r"  all +([\d,]+) +([\d,]+)", text).groups())
        assert trainable + frozen == 8_220_862_339 and ("of 8 with micro-batches of 4" in text) == bool(more)
        peaks.append(float(re.search(r"peak +([\d.]+) GB", text)[1]))
    # 16 bytes for each parameter that is trained, a share of them if sharded
    assert peaks[0] - peaks[1] == pytest.approx(16e-9 * trainable * 7 / 8 + 6, abs=4) and peaks[1] < 80


def test_print_config_counts_without_allocating(capsys, monkeypatch):
    monkeypatch.setattr(train, "training_flops", lambda model, phrases: 1e9)  # the next test has it
    assert train.main(["--preset", "llamaseg-l", "--print-config", "--encoder", "siglip2-so400m-patch16-256"]) == 0
    text = capsys.readouterr().out
    assert "width=2304, layers=22, heads=32" in text and "vision_width=1152, vision_layers=27" in text
    (trainable,) = re.findall(r"  all +([\d,]+)", text)
    assert abs(int(trainable.replace(",", "")) / 1.5e9 - 1) < 0.02
    assert "lr 0.0002" in text and "weight decay 0.05" in text


def test_print_config_has_the_numbers_of_the_tables(capsys):
    """Of README and RESULTS.md: GB per rank with 32 phrases, GFLOP per sample."""
    assert train.main(["--preset", "llamaseg-b", "--print-config"]) == 0
    text = capsys.readouterr().out
    assert "micro-batches of 32 phrases" in text and "  peak                       44.29 GB" in text
    assert re.search(r"GFLOP per sample +2,705\n", text)


class FusedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.rms_norm(x, weight.shape, weight)

    @staticmethod
    def backward(ctx, gradient):
        raise NotImplementedError("only what is kept counts here")


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_estimate_of_activations_is_what_autograd_keeps(monkeypatch, kv_heads):
    """Counted independently: every tensor that autograd saves, parameters aside, with fused attention as on a GPU."""
    config = LlamaSegConfig(
        siglip=SigLIPConfig(image_size=128, vision_width=32, vision_layers=1, vision_heads=2, vision_mlp=32,
                            vocab_size=50, text_width=32, text_layers=1, text_heads=2, text_mlp=32),
        llama=LlamaConfig(width=128, layers=3, heads=4, kv_heads=kv_heads, head_dim=24, mlp=352), codebook_size=600,
        mask_grid=8,
    )
    monkeypatch.setattr(M, "written_out_is_faster", lambda q, k: False)
    # PyTorch's fused RMSNorm, which it has on GPUs only, keeps its input and one number a token
    monkeypatch.setattr(M.RMSNorm, "forward", lambda self, x: FusedRMSNorm.apply(x.float(), self.weight))
    model, batch, kept = LlamaSeg(config), 4, {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        if x.untyped_storage().data_ptr() not in weights:
            kept[x.untyped_storage().data_ptr()] = x  # holding it keeps its address its own
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        model(torch.zeros(batch, 64, dtype=torch.long), torch.zeros(batch, 3, 128, 128),
              torch.zeros(batch, 64, dtype=torch.long))
    weight_shapes = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape[::-1]) for p in model.parameters()}
    kept = [x for x in kept.values() if tuple(x.shape) not in weight_shapes]  # autocast's copies are counted apart
    bytes = sum(x.untyped_storage().nbytes() for x in kept)
    assert abs(train.activation_bytes(config, batch) / bytes - 1) < 0.05


# --- the paper's stages, and what a run costs


def test_stages_are_the_papers_and_flags_win():
    args = train.parse_args(["--preset", "llamaseg-b", "--stage", "pretrain"])
    assert (args.lr, args.betas, args.weight_decay, args.epochs, args.max_steps) == (2e-4, [0.9, 0.95], 0.05, 4, None)
    assert args.data.startswith("sa-ovrs") and args.optimizer == "adamw"
    for stage, epochs, data in (("finetune-semantic", 10, "ade20k"), ("finetune-referring", 20, "refcoco")):
        args = train.parse_args(["--preset", "llamaseg-l", "--stage", stage])
        assert (args.lr, args.betas, args.weight_decay, args.epochs) == (1e-4, [0.9, 0.99], 0.0, epochs)
        assert args.data.startswith(data) and args.warmup_steps == 0.01
    args = train.parse_args(["--stage", "finetune-semantic", "--lr", "3e-4", "--data", "cocostuff", "--max-steps", "7",
                             "--betas", "0.8", "0.9"])
    assert (args.lr, args.data, args.max_steps, args.epochs, args.betas) == (3e-4, "cocostuff", 7, None, [0.8, 0.9])
    with pytest.raises(SystemExit):
        train.parse_args(["--epochs", "2", "--max-steps", "7"])


def test_epochs_become_steps(small, tmp_path):
    one = {"image": str(REPO / "assets" / "example.png"), "mask": [[1, 1, 9, 1, 9, 9]]}
    lines = [json.dumps({**one, "phrase": f"thing {i}"}) for i in range(10)]
    for split in ("train", "val"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
    flags = [f for f in small(tmp_path / "out", "--data", "sa-ovrs", "--root", str(tmp_path), "--epochs", "3")]
    at = flags.index("--max-steps")
    assert train.main(flags[:at] + flags[at + 2:]) == 0
    assert max(losses(tmp_path / "out")) == 4  # 3 x 10 phrases in batches of 8


def test_training_flops_are_those_of_palm():
    """Per trained weight and token 6, per frozen one 2, and 12 T width for attention (Chowdhery et al. 2022)."""
    siglip = SigLIPConfig(image_size=128, vision_width=64, vision_layers=2, vision_heads=2, vision_mlp=96,
                          vocab_size=50, text_width=32, text_layers=3, text_heads=2, text_mlp=48)
    config = LlamaSegConfig(siglip=siglip, codebook_size=600, mask_grid=8,
                            llama=LlamaConfig(width=128, layers=3, heads=4, kv_heads=2, head_dim=24, mlp=352))
    T, layer = 64 + 1 + 64 + 1 + 63, 128 * (2 * 4 * 24 + 2 * 2 * 24 + 3 * 352)
    llama, head = T * 3 * (6 * layer + 12 * T * 4 * 24), 6 * 64 * 128 * 600
    towers = sum(64 * layers * (2 * (4 * width**2 + 2 * width * mlp) + 4 * 64 * width)
                 for layers, width, mlp in ((2, 64, 96), (3, 32, 48))) + 64 * 2 * 3 * 16**2 * 64
    adaptors = 64 * 6 * 128 * (32 + 128 + 64 + 128)
    model = LlamaSeg(config)
    assert train.training_flops(model, 1) == pytest.approx(llama + head + towers + adaptors, rel=0.02)
    assert 0.5 < train.training_flops(model, 4) / train.training_flops(model, 1) < 1  # the picture is encoded once


def test_activation_checkpointing_changes_no_loss(small, tmp_path):
    assert train.main(small(tmp_path / "a")) == 0
    assert train.main(small(tmp_path / "b", "--activation-checkpointing")) == 0
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert all(a[step] == pytest.approx(b[step], abs=1e-5) for step in a)
    whole, parts = (train.activation_bytes(train.PRESETS["llamaseg-b"], 32, recompute) for recompute in (False, True))
    assert parts < whole / 4


def test_the_first_step_which_may_compile_is_not_in_the_time_left(small, tmp_path, monkeypatch, capsys):
    clocks = []

    class Bar(train.tqdm):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            clocks.append((more.get("desc"), self.n))

    monkeypatch.setattr(train, "tqdm", Bar)
    monkeypatch.setattr(torch, "compile", lambda model: model)
    assert train.main(small(tmp_path, "--compile")) == 0
    assert "compiling, about a minute" in capsys.readouterr().out
    assert clocks == [("train", 1), ("evaluate", 0)]  # the clock starts when that many steps are done


def test_curves_are_drawn(tmp_path):
    lines = ({"step": 1, "loss": 4.0}, {"step": 2, "loss": 0.0}, {"step": 2, "cIoU": 0.5})
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert train.main(["--plot", str(tmp_path)]) == 0
    picture, loss, cIoU = Image.open(tmp_path / "curves.png"), (32, 80, 192), (192, 48, 32)
    assert picture.getpixel((480, 48)) == loss and picture.getpixel((912, 59)) == loss  # 4.0, then 3.8: smoothed
    assert picture.getpixel((912, 480)) == cIoU
    assert train.main(["--plot", str(tmp_path / "none")]) == 1


# --- what the encoders learn before the first mask


def test_encoders_learn_patches_first(small, tmp_path, monkeypatch):
    """On one batch, again and again, the loss falls, and all of the encoders moves."""
    told, before = [], {}
    real, one = train.PatchReader.forward, train.Patches.__getitem__

    def forward(self, pixels, truth, text_ids, named):
        if not told:
            before.update({name: p.clone() for name, p in self.encoder.named_parameters()})
        logits, loss = real(self, pixels, truth, text_ids, named)
        told.append(loss.item())
        return logits, loss

    monkeypatch.setattr(train.PatchReader, "forward", forward)
    monkeypatch.setattr(train.Patches, "__getitem__", lambda self, k: one(self, 0))
    monkeypatch.setattr(train, "PATCH_BATCH", 4)
    assert train.main(small(tmp_path, "--encoder-steps", "12", "--max-steps", "1", "--lr", "1e-2")) == 0
    assert len(told) == 12 and np.mean(told[-3:]) < 0.8 * np.mean(told[:3])
    after = LlamaSeg.from_pretrained(tmp_path / "model.safetensors").encoder.named_parameters()
    assert all(not torch.equal(p, before[name]) for name, p in after)
    assert train.main(small(tmp_path, "--encoder-steps", "12", "--max-steps", "2", "--resume", "auto")) == 0
    assert len(told) == 12  # a run that goes on has had them


def test_a_stop_among_the_encoders_lessons_leaves_nothing(small, tmp_path, monkeypatch, capsys):
    real = train.PatchReader.forward

    def forward(self, *args, **batch):
        signal.raise_signal(signal.SIGTERM)
        return real(self, *args, **batch)

    monkeypatch.setattr(train.PatchReader, "forward", forward)
    monkeypatch.setattr(train, "PATCH_BATCH", 2)
    assert train.main(small(tmp_path, "--encoder-steps", "12")) == 0
    said = capsys.readouterr()
    assert "nothing is saved" in said.out + said.err and "error" not in said.err
    assert not list(tmp_path.glob("checkpoint-*")) and not records(tmp_path)


def test_the_loss_between_patches_and_phrases_is_siglips(tiny_checkpoint):
    """Brute force: a sigmoid for each pair of a phrase and a patch of its own picture."""
    torch.manual_seed(0)
    encoder = LlamaSeg.from_pretrained(tiny_checkpoint / "model.safetensors").encoder.eval()
    reader = train.PatchReader(encoder, 17)
    reader.head.weight.data.zero_()
    pixels, text_ids = torch.randn(2, 3, 64, 64), torch.randint(768, (6, 24))
    truth, named = torch.zeros(2, 16, 85), torch.randint(2, (6, 16)).float()
    truth[:, :, -1] = 1
    logits, loss = reader(pixels, truth, text_ids, named)
    image, text = encoder.encode_image(pixels), encoder.encode_text(text_ids).mean(1)
    total = 0.0
    for phrase in range(6):
        for patch in range(16):
            alike = reader.text_side(text[phrase]) @ reader.image_side(image[phrase // 3, patch])
            logit = reader.scale * alike + reader.bias
            assert torch.isclose(logit, logits[phrase // 3, phrase % 3, patch], atol=1e-4)
            sign = 2 * named[phrase, patch] - 1
            total -= torch.nn.functional.logsigmoid(sign * logit) / 96
    flat = torch.nn.functional.binary_cross_entropy_with_logits  # the linear layer tells its bias, whatever it sees
    bias = reader.head.bias
    rest = 4 * flat(bias[:17], torch.zeros(17)) + flat(bias[20:], torch.zeros(64))
    rest += torch.nn.functional.smooth_l1_loss(bias[17:20], torch.zeros(3))
    assert torch.isclose(loss, 4 * total + rest, atol=1e-4)


def test_encoder_steps_are_refused_where_nothing_reads_them(small, tmp_path, tiny_checkpoint, capsys):
    with pytest.raises(SystemExit):
        train.main(["--preset", "llamaseg-b", "--encoder-steps", "5"])
    with pytest.raises(SystemExit):
        train.main(small(tmp_path, "--encoder-steps", "5", "--init-from", str(tiny_checkpoint / "model.safetensors")))
    assert capsys.readouterr().err.count("--encoder-steps") == 2
