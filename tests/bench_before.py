"""Is this checkout slower than another one, and are its masks the same?

    git clone . ../before && git -C ../before checkout REVISION
    python tests/bench_before.py ../before --pairs 7

Each measurement runs in a process of its own, in the two checkouts in turn, because the speed of a busy machine changes
from minute to minute. The table gives the ratio of the best times and of the medians. A ratio above 1 means that this
checkout is faster.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parents[1]
# Each prints a number of milliseconds; `masks` prints a hash and the passes instead.
PROGRAMS = {
    "cold start": """
import runpy, time
start = time.perf_counter()
sys.argv = ["sample.py", "--out", sys.argv[1]]
try:
    runpy.run_path("sample.py", run_name="__main__")
except SystemExit as end:
    assert not end.code
print(1000 * (time.perf_counter() - start))
""",
    "one mask": """
import time
from data import load_dataset
from sample import Segmenter
from scenes import WORLDS
plain = "scenes-plain" if "scenes-plain" in WORLDS else "scenes"  # its name before the wider world
segmenter, dataset = Segmenter.load(device="cpu"), load_dataset(plain, "test")
examples = [dataset[i] for i in range(40)]
def best(example):
    times = []
    for _ in range(4):
        start = time.perf_counter()
        segmenter(example.image, [example.phrase])
        times.append(time.perf_counter() - start)
    return min(times)
print(1000 * sum(map(best, examples)) / len(examples))
""",
    "32 masks": """
import time, torch
from data import load_dataset
from sample import Segmenter
from scenes import WORLDS
plain = "scenes-plain" if "scenes-plain" in WORLDS else "scenes"  # its name before the wider world
segmenter, dataset = Segmenter.load(device="cpu"), load_dataset(plain, "test")
rows = [segmenter.prepare(dataset[i].image, [dataset[i].phrase]) for i in range(32)]
text_ids, pixels = (torch.cat(parts) for parts in zip(*rows))
times = []
for _ in range(6):
    start = time.perf_counter()
    segmenter.model.generate(text_ids, pixels)
    times.append(time.perf_counter() - start)
print(1000 * min(times))
""",
    "loader": """
import time
from data import Batches, load_mixture
from scenes import WORLDS
from tokenizer import TextTokenizer
mixture = load_mixture("scenes-plain" if "scenes-plain" in WORLDS else "scenes", "train", phrases=4)
batches = Batches(mixture, TextTokenizer("assets/text.model", 24), 128, 64, 64, 64, 4, 0, 1, 0, True, 128)
times = []
for k in range(13):
    start = time.perf_counter()
    batches[k]
    times.append(time.perf_counter() - start)
print(1000 * min(times[1:]))
""",
    "training step": """
import json, train
train.main(["--out-dir", sys.argv[1], "--max-steps", "9", "--eval-every", "1000", "--eval-count", "1",
            "--save-every", "1000", "--dtype", "float32"])
steps = [json.loads(line) for line in open(sys.argv[1] + "/log.jsonl")]
print(min(64000 / step["samples_per_s"] for step in steps if "loss" in step))
""",
    "metrics": """
import time
import numpy as np
from metrics import SegmentationMetrics
rng = np.random.default_rng(0)
y, x = np.mgrid[:480, :640]
masks = [(x - rng.integers(200, 440)) ** 2 + (y - rng.integers(150, 330)) ** 2 < rng.integers(100, 150) ** 2
         for _ in range(60)]
times = []
for _ in range(5):
    metrics, start = SegmentationMetrics(), time.perf_counter()
    for pred, gt in zip(masks, masks[1:]):
        metrics.update(pred, gt)
    metrics.compute()
    times.append(time.perf_counter() - start)
print(1000 * min(times))
""",
    "masks": """
import hashlib
import numpy as np
from data import load_dataset
from sample import Segmenter
from scenes import WORLDS
plain = "scenes-plain" if "scenes-plain" in WORLDS else "scenes"  # its name before the wider world
segmenter, dataset = Segmenter.load(device="cpu"), load_dataset(plain, "test")
digest, passes = hashlib.sha256(), 0
for i in range(200):
    stats = {}
    (mask,) = segmenter(dataset[i].image, [dataset[i].phrase], stats=stats)
    digest.update(dataset[i].phrase.encode() + np.packbits(mask).tobytes())
    passes += sum(stats["mask_passes"])
print(digest.hexdigest()[:16], passes)
""",
}


def run(checkout, program):
    """The last line that a program prints in a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        code = "import sys\nsys.path.insert(0, '.')\n" + PROGRAMS[program]
        command = [sys.executable, "-c", code, f"{folder}/out"]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{checkout}: {program}: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout.splitlines()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="the other checkout")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each measurement in each checkout (default: 5)")
    parser.add_argument("--only", choices=PROGRAMS, nargs="+", default=list(PROGRAMS), help="default: all")
    args = parser.parse_args()
    for program in args.only:
        if program == "masks":
            print(f"masks and passes: before {run(args.before, program)}, now {run(HERE, program)}")
            continue
        times = {args.before: [], HERE: []}
        for pair in range(args.pairs):
            for checkout in sorted(times, reverse=pair % 2 == 1):
                times[checkout].append(float(run(checkout, program)))
        before, now = times.values()
        print(f"{program:14} before {min(before):8.1f} ms, now {min(now):8.1f} ms; ratio of the best "
              f"{min(before) / min(now):.2f}, of the medians {statistics.median(before) / statistics.median(now):.2f}",
              flush=True)


if __name__ == "__main__":
    main()
