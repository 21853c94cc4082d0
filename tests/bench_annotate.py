"""Speed and memory of annotate.py, stage by stage: python tests/bench_annotate.py [PICTURES ...] [--per-part N]

Archives of tiny pictures go through all stages, the export and the stats. Each stage is a process of its own, whose
peak memory is printed; it must not grow with the number of pictures. The servers are functions within that process
that answer at once, so the pictures per second are those of the client without its network.
"""

import argparse
import io
import json
import os
import re
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
from PIL import Image

import annotate
from data import rle_encode

BOXES = {"dog": (4, 4, 30, 20), "cup": (10, 30, 50, 60)}


def make_archives(folder, count, per_part):
    """Archives of `count` pictures of 64 x 64 pixels with two masks each, `per_part` in an archive."""
    folder.mkdir(parents=True)
    picture, annotations = io.BytesIO(), []
    Image.new("RGB", (64, 64), "gray").save(picture, "JPEG")
    for number, (x0, y0, x1, y1) in enumerate(BOXES.values()):
        mask = np.zeros((64, 64), bool)
        mask[y0:y1, x0:x1] = True
        box = [x0, y0, x1 - x0 - 1, y1 - y0 - 1]
        annotations.append({"id": number, "bbox": box, "segmentation": rle_encode(mask)})
    files = {".jpg": picture.getvalue(), ".json": json.dumps({"annotations": annotations}).encode()}
    for start in range(0, count, per_part):
        with tarfile.open(folder / f"sa_{start // per_part:06}.tar", "w") as archive:
            for n in range(start, min(start + per_part, count)):
                for suffix, content in files.items():
                    member = tarfile.TarInfo(f"./sa_{n}{suffix}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                archive.members.clear()


def answer(server, body):
    """Both servers: what they would answer about any of the pictures."""
    if "inputs" in body:
        return [{"score": 0.9, "label": label, "box": dict(zip(("xmin", "ymin", "xmax", "ymax"), BOXES[label]))}
                for label in body["parameters"]["candidate_labels"] if label in BOXES]
    name = body["response_format"]["json_schema"]["name"]
    label = re.search(r"(?:Label: |There is one )(\w+)", body["messages"][0]["content"][1]["text"])
    value = {"labels": list(BOXES), "entities": list(BOXES), "expression": f"the {label and label[1]} on the left",
             "verify": False, "reasoning": f"what {label and len(label[1]) + ord(label[1][0])} people need"}[name]
    content = json.dumps({annotate.ANSWERS[name][0]: value})
    return {"choices": [{"finish_reason": "stop", "message": {"content": content}}]}


def run_stage(stage, source, out):
    """In a process of its own: run a stage and print its peak memory in MiB."""
    annotate.Server.post = answer
    flags = {"input": source, "vlm_url": "http://h/v1", "vlm_model": "m", "detector_url": "http://h"}
    argv = [word for name, value in flags.items() if name in annotate.READS[stage]
            for word in (f"--{name.replace('_', '-')}", value)]
    code = annotate.main([stage, "--out", out, *argv])
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
    return code


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pictures", nargs="*", type=int, default=[20_000, 200_000])
    parser.add_argument("--per-part", type=int, default=10_000, help="pictures in an archive (SA-1B has about 11,000)")
    args = parser.parse_args()
    for count in args.pictures:
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder, "in"), Path(folder, "out")
            make_archives(source, count, args.per_part)
            for stage in (*annotate.STAGES, "export", "stats"):
                began = time.monotonic()
                command = [sys.executable, __file__, "--run", stage, str(source), str(out)]
                done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True, text=True)
                seconds = time.monotonic() - began
                print(f"{count:9} pictures {stage:9}{done.stdout.split()[-1]:>6} MiB peak {count / seconds:8.0f} /s",
                      flush=True)
            records = sum(1 for name in ("train", "val") for _ in open(out / f"{name}.jsonl"))
            print(f"{count:9} pictures {records} records, {sum(p.stat().st_size for p in out.rglob('*.jsonl')) >> 20} "
                  "MiB on disk", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        code = run_stage(*sys.argv[2:])
        sys.stdout.flush()
        os._exit(code)
    main()
