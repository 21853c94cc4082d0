"""How fast are scenes drawn? `python tests/bench_scenes.py` prints scenes/s of one core (aim: 250 and more)."""

import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import Scenes, resize_mask, resize_pixels
from scenes import WORLDS

for name in WORLDS:
    dataset, count = Scenes("train", name), 500
    dataset[count]  # warm up
    start = time.perf_counter()
    for i in range(count):
        example = dataset[i]
        resize_pixels(np.array(example.image), 128), resize_mask(example.mask, 128)
    rate = count / (time.perf_counter() - start)
    print(f"{name}: {rate:.0f} scenes/s, drawn, phrased and resized to 128 px")
