"""How long training takes: from nothing to a validation cIoU of 0.8 on scenes-plain, with the shipped tokenizers.

    python tests/bench_speedrun.py                     # two processes, one per core: about two hours
    python tests/bench_speedrun.py --target 0.5 --processes 1

OUT gets the run of train.py, speedrun.json and speedrun.png, the curve. The clock starts with the command and stops
with the evaluation that reaches the target, so it counts compiling, the encoders' lessons and the evaluations.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw

REPO = Path(__file__).resolve().parents[1]
RECIPE = ["--data", "scenes-plain", "--compile", "--phrases", "8", "--batch-size", "128", "--micro-batch-size", "32",
          "--eval-every", "100", "--save-every", "100"]


def curve(points, target, path):
    """Draw cIoU over minutes; points: [(minutes, cIoU), ...]."""
    picture, last = Image.new("RGB", (720, 360), "white"), max(minutes for minutes, _ in points)
    draw = ImageDraw.Draw(picture)
    for share in (0, 0.2, 0.4, 0.6, 0.8, 1.0):
        draw.line([50, 320 - 290 * share, 700, 320 - 290 * share], fill="#c03020" if share == target else "#e0e0e0")
        draw.text((44, 320 - 290 * share), f"{share:.1f}", "black", anchor="rm")
        draw.text((50 + 650 * share, 326), f"{share * last:.0f} min", "black", anchor="ma")
    draw.line([(50 + 650 * minutes / last, 320 - 290 * value) for minutes, value in points], fill="#2050c0", width=3)
    draw.text((56, 8), "validation cIoU", "black")
    picture.save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=float, default=0.8, help="cIoU to stop at (default: 0.8)")
    parser.add_argument("--steps", type=int, default=3000, help="length of the schedule (default: 3000)")
    parser.add_argument("--processes", type=int, default=2, help="default: 2")
    parser.add_argument("--out", type=Path, default=Path("out_speedrun"), help="default: out_speedrun")
    args = parser.parse_args()
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={args.processes}", REPO / "train.py",
               *RECIPE, "--max-steps", str(args.steps), "--out-dir", args.out]
    print(" ".join(map(str, command)))
    start, points, log = time.time(), [], args.out / "log.jsonl"
    run = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    while run.poll() is None and not (points and points[-1]["cIoU"] >= args.target):
        time.sleep(1)
        lines = log.read_text().splitlines() if log.exists() else []
        for record in map(json.loads, lines[:-1]):  # the last line may still be written
            if "cIoU" in record and record["step"] not in {point["step"] for point in points}:
                points.append({"minutes": (time.time() - start) / 60, "step": record["step"],
                               "phrases": 128 * record["step"], "cIoU": record["cIoU"]})
                print(points[-1], flush=True)
    run.send_signal(signal.SIGTERM)
    run.wait()
    (args.out / "speedrun.json").write_text(json.dumps({"target": args.target, "points": points}, indent=1))
    curve([(point["minutes"], point["cIoU"]) for point in [{"minutes": 0, "cIoU": 0}, *points]], args.target,
          args.out / "speedrun.png")


if __name__ == "__main__":
    main()
