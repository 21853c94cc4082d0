"""How often the default finds what is not there, and misses what is: 2,000 absent phrases and 2,000 present ones.

    python tests/bench_absent.py                       # the embedded default, about 5 minutes on one core
    python tests/bench_absent.py --checkpoint out --count 400
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

from data import load_dataset  # noqa: E402
from sample import SCORE_BATCH, Segmenter, print_table  # noqa: E402
from scenes import ABSENT  # noqa: E402


def measure(segmenter, data, split, count):
    """For `count` examples of a split: is the mask not empty (count,), and the probability that it should be."""
    dataset, found, there = load_dataset(data, split), [], []
    for start in tqdm(range(0, count, SCORE_BATCH), desc=split):
        examples, inside = [dataset[i] for i in range(start, min(start + SCORE_BATCH, count))], {}
        masks = segmenter.many([e.image for e in examples], [[e.phrase] for e in examples], inside)
        found += [mask.any() for (mask,) in masks]
        there += segmenter.there(inside)
    return np.array(found), np.array(there)


def auroc(positive, negative):
    """The chance that a positive scores above a negative; half of a tie."""
    return float(np.mean((positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="default: the embedded one")
    parser.add_argument("--data", default="scenes", help="default: scenes")
    parser.add_argument("--count", type=int, default=2000, help="phrases of each split (default: 2000)")
    args = parser.parse_args()
    segmenter = Segmenter.load(args.checkpoint)
    absent, absent_there = measure(segmenter, args.data, "absent", args.count)
    present, present_there = measure(segmenter, args.data, "test", args.count)
    rows = [{"phrases": kind, "gets a mask": absent[k::len(ABSENT)].mean(),
             "mean probability": absent_there[k::len(ABSENT)].mean()} for k, kind in enumerate(ABSENT)]
    rows.append({"phrases": "all absent", "gets a mask": absent.mean(), "mean probability": absent_there.mean()})
    rows.append({"phrases": "present", "gets a mask": present.mean(), "mean probability": present_there.mean()})
    print_table(rows, sys.stdout, digits=3)
    print(f"\nAUROC of the probability: {auroc(present_there, absent_there):.4f}")


if __name__ == "__main__":
    main()
