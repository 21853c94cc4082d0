"""Are metrics and loaders fast enough for an evaluation? Ratios within one run; not a test, LOG.md has runs.

    python tests/bench_metrics.py ahd       # AHD beside distance transforms and a k-d tree
    python tests/bench_metrics.py rle       # run lengths beside pycocotools (pip install pycocotools)
    python tests/bench_metrics.py pairs     # 10,000 pairs of 480 x 640: decode, IoU, AHD at 256 px
    python tests/bench_metrics.py loader    # batches of JPEGs beside PIL's decoding and resizing alone
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from data import Batches, load_dataset, resize_picture, rle_decode, rle_encode  # noqa: E402
from metrics import SegmentationMetrics, average_hausdorff_distance, boundary  # noqa: E402


def blob(height, width, seed):
    """A wavy disc."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    y, x = y - height * rng.uniform(0.47, 0.53), x - width * rng.uniform(0.47, 0.53)
    radius = min(height, width) * (0.33 + 0.05 * np.sin(rng.integers(8, 11) * np.arctan2(y, x)))
    return np.hypot(y, x) < radius


def medians(calls, rounds=30):
    """Median seconds of each call, taken in turn."""
    times = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(row) for name, row in times.items()}


def bench_ahd():
    a, b = blob(256, 256, 1), blob(256, 256, 2)

    def tree():
        x, y = np.argwhere(boundary(a)), np.argwhere(boundary(b))
        return (cKDTree(y).query(x)[0].mean() + cKDTree(x).query(y)[0].mean()) / 2

    def transforms():
        x, y = boundary(a), boundary(b)
        return (distance_transform_edt(~y)[x].mean() + distance_transform_edt(~x)[y].mean()) / 2

    calls = {"ours": lambda: average_hausdorff_distance(a, b), "k-d tree": tree, "transforms": transforms}
    times = medians(calls)
    print(f"{boundary(a).sum()} and {boundary(b).sum()} boundary points: " + ", ".join(
        f"{name} {1000 * t:.2f} ms ({t / times['ours']:.1f}x)" for name, t in times.items()))
    print("largest difference", max(abs(call() - calls["ours"]()) for call in calls.values()))


def bench_rle():
    from pycocotools import mask as official

    mask = blob(1500, 2250, 3)
    mask[::50, ::40] ^= blob(1500, 2250, 4)[::50, ::40]  # some thousand runs
    fortran, rle = np.asfortranarray(mask.astype(np.uint8)), rle_encode(mask)
    assert official.encode(fortran)["counts"].decode() == rle["counts"]
    times = medians({"encode": lambda: rle_encode(mask), "their encode": lambda: official.encode(fortran),
                     "decode": lambda: rle_decode(rle), "their decode": lambda: official.decode(rle)}, 10)
    for name in ("encode", "decode"):
        ours, theirs = times[name], times[f"their {name}"]
        print(f"{name} 1500 x 2250, {len(rle['counts'])} characters: {1000 * ours:.1f} ms, pycocotools "
              f"{1000 * theirs:.1f} ms, ratio {ours / theirs:.1f}")


def score_pairs(pairs):
    metrics = SegmentationMetrics()
    for a, b in pairs:
        metrics.update(rle_decode(a), rle_decode(b))
    return metrics.compute()["count@0.5"]


def bench_pairs():
    rles = [rle_encode(blob(480, 640, seed)) for seed in range(40)]
    pairs = [(rles[i % 40], rles[(7 * i + 1) % 40]) for i in range(10_000)]
    start, cores = time.perf_counter(), os.cpu_count()
    with ProcessPoolExecutor(cores) as pool:
        counted = sum(pool.map(score_pairs, [pairs[i::cores] for i in range(cores)]))
    print(f"10,000 pairs of 480 x 640, {counted} with a distance: {time.perf_counter() - start:.1f} s on {cores} cores")


def bench_loader():
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        mask = rle_encode(blob(375, 500, 1))
        rng = np.random.default_rng(0)
        with open(folder / "x.jsonl", "w") as file:
            for i in range(200):
                picture = Image.fromarray(rng.integers(0, 255, (47, 63, 3), np.uint8)).resize((500, 375), 3)
                picture.save(folder / f"{i}.jpg", quality=90)
                file.write(json.dumps({"image": f"{i}.jpg", "phrase": "the disc", "mask": mask}) + "\n")
        batches = Batches(load_dataset(f"jsonl:{folder / 'x.jsonl'}", "train"),
                          lambda texts: torch.zeros(len(texts), 64, dtype=torch.long), 256, 256, 20, 20)

        def alone():
            for i in range(200):
                with Image.open(folder / f"{i}.jpg") as picture:
                    resize_picture(picture, 256)

        times = medians({"alone": alone, "loader": lambda: [batches[k] for k in range(10)]}, 15)
        print(f"decode and resize alone {200 / times['alone']:.0f} pictures/s, loader {200 / times['loader']:.0f}: "
              f"{times['alone'] / times['loader']:.2f} of it")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = {"ahd": bench_ahd, "rle": bench_rle, "pairs": bench_pairs, "loader": bench_loader}
    parser.add_argument("what", choices=jobs)
    jobs[parser.parse_args().what]()
