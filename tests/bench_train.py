"""What training costs and whether it survives. Not a test: minutes to half an hour; LOG.md has runs.

    python tests/bench_train.py step       # a step of the LLaMA part beside transformers (pip install transformers)
    python tests/bench_train.py kills      # 20 times kill -9, half of them in the middle of a save
"""

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from model import Llama, LlamaConfig, clock, pick_device  # noqa: E402

CODES, TOKENS, BATCH = 16384, 577, 4


class Ours(torch.nn.Module):
    """The LLaMA part of LlamaSeg with its head."""

    def __init__(self, config):
        super().__init__()
        self.llama = Llama(config)
        self.head = torch.nn.Linear(config.width, CODES, bias=False)

    def forward(self, embeddings, labels):
        logits = self.head(self.llama(embeddings)[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten())


def bench_step(rounds=2):
    """The same random weights, embeddings and labels; median seconds of a step, taken in turn."""
    from transformers import LlamaConfig as TheirConfig
    from transformers import LlamaForCausalLM

    device = pick_device()
    config = LlamaConfig(width=1024, layers=8, heads=16, mlp=2752)
    theirs = LlamaForCausalLM(TheirConfig(hidden_size=1024, num_hidden_layers=8, num_attention_heads=16,
                                          intermediate_size=2752, vocab_size=CODES)).to(device)
    ours = Ours(config).to(device)
    weights = {n.removeprefix("model."): w for n, w in theirs.model.state_dict().items() if "embed_tokens" not in n}
    ours.llama.load_state_dict(weights)
    ours.head.load_state_dict(theirs.lm_head.state_dict())
    theirs.model.embed_tokens.requires_grad_(False)
    embeddings = torch.randn(BATCH, TOKENS, 1024, device=device)
    labels = torch.randint(0, CODES, (BATCH, TOKENS), device=device)

    for dtype in (torch.float32, torch.bfloat16):
        for compiled in (False, True):
            calls = {"ours": ours, "transformers": theirs}
            if compiled:
                calls = {name: torch.compile(call) for name, call in calls.items()}
            losses, times = {}, {name: [] for name in calls}
            for turn in range(rounds + 1):
                for name, call in calls.items():
                    parameters = [p for p in call.parameters() if p.requires_grad]
                    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)  # the weights stay the same
                    start = clock(device)
                    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                        loss = (call(embeddings, labels) if name == "ours" else
                                call(inputs_embeds=embeddings, labels=labels).loss)
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad(set_to_none=True)
                    if turn:  # the first one warms up, or compiles
                        times[name].append(clock(device) - start)
                    losses[name] = loss.item()
            a, b = (statistics.median(times[name]) for name in ("transformers", "ours"))
            print(f"{dtype} {'compiled' if compiled else 'plain'}: transformers {1000 * a:.0f} ms, ours {1000 * b:.0f} "
                  f"ms, ratio {a / b:.2f}; losses {losses['transformers']:.4f} {losses['ours']:.4f}", flush=True)


def bench_kills(times=20, steps=80):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)

        def start(out):
            return subprocess.Popen(
                [sys.executable, REPO / "train.py", "--max-steps", str(steps), "--batch-size", "4", "--phrases", "2",
                 "--dtype", "float32", "--device", "cpu", "--eval-every", "1000", "--eval-count", "1", "--save-every",
                 "2", "--out-dir", folder / out, "--resume", "auto"],
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )

        def losses(out):
            path = folder / out / "log.jsonl"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            records = [json.loads(line) for line in lines if line.endswith("}\n")]
            return {r["step"]: r["loss"] for r in records if "loss" in r}

        assert start("whole").wait() == 0
        draw, saves = random.Random(0), 0
        for k in range(times):
            run, first, begun = start("killed"), None, time.time()
            target = draw.randint(1, 4)
            while run.poll() is None:
                done = max(losses("killed"), default=0)
                first = done if first is None or done < first else first  # a resume takes steps away
                saving = any((folder / "killed").glob(".checkpoint*.tmp"))
                if saving and k % 2 or time.time() - begun > 3 and done - first >= target and not k % 2:
                    run.send_signal(signal.SIGKILL)
                    saves += saving
                    break
                time.sleep(0.0005)
            run.wait()
            left = [p.name for p in (folder / "killed").glob(".*.tmp")]
            print(f"kill {k + 1}: after step {max(losses('killed'), default=0)} {' '.join(left)}", flush=True)
        last = start("killed")
        _, error = last.communicate()
        assert last.returncode == 0, error.decode()
        same = losses("whole") == losses("killed")
        print(f"{times} kills, {saves} in the middle of a save; {len(losses('killed'))} losses "
              f"{'equal' if same else 'NOT equal'} to the unbroken run's")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("step", "kills"))
    {"step": bench_step, "kills": bench_kills}[parser.parse_args().what]()
