import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image

from data import Scenes, load_dataset, rle_decode
from metrics import SegmentationMetrics
from sample import Segmenter, describe, overlay


@pytest.fixture(scope="module")
def segmenter():
    """The embedded checkpoint."""
    return Segmenter.load(device="cpu")


@pytest.fixture
def picture(tmp_path):
    Scenes("test")[3].image.save(tmp_path / "x.png")
    return tmp_path / "x.png"


# --- the embedded default


def test_the_embedded_model_segments_test_scenes(segmenter):
    dataset, intersection, union = Scenes("test"), 0, 0
    for i in range(24):
        example = dataset[i]
        (mask,) = segmenter(example.image, [example.phrase])
        assert mask.dtype == bool and mask.shape == example.mask.shape
        intersection += (mask & example.mask).sum()
        union += (mask | example.mask).sum()
    assert intersection / union > 0.6  # the full test is `python sample.py --dataset scenes`, in LOG.md


def test_a_circle_drawn_by_hand_is_found_in_any_picture_mode(segmenter):
    y, x = np.mgrid[:200, :300]
    circle = (x - 90) ** 2 + (y - 100) ** 2 < 60**2
    square = (abs(x - 230) < 40) & (abs(y - 100) < 40)
    picture = np.full((200, 300, 3), 235, np.uint8)
    picture[circle] = (220, 30, 30)
    picture[square] = (40, 70, 220)
    for mode in ("RGB", "RGBA", "P"):
        red, blue = segmenter(Image.fromarray(picture).convert(mode), ["the red circle", "the blue square"])
        assert (red & circle).sum() / (red | circle).sum() > 0.7
        assert (blue & square).sum() / (blue | square).sum() > 0.7


def test_prompts_together_equal_prompts_alone(segmenter):
    image = Scenes("test")[7].image
    prompts = ["the leftmost object", "everything", "a sign of love"]
    together = segmenter(image, prompts)
    for prompt, mask in zip(prompts, together):
        assert (segmenter(image, [prompt])[0] == mask).all()
    assert (segmenter(image, "everything")[0] == together[1]).all()
    assert segmenter(image, []) == []


def test_pictures_together_equal_pictures_alone(segmenter):
    images, prompts = [Scenes("test")[i].image for i in (7, 30, 90)], ["the leftmost object", "everything"]
    together = segmenter.many(images, prompts)
    for image, masks in zip(images, together):
        assert all((one == other).all() for one, other in zip(segmenter(image, prompts), masks))
    assert segmenter.many([], prompts) == [] and segmenter.many(images, []) == [[], [], []]


@torch.inference_mode()
def test_drafted_masks_are_the_plain_ones_in_a_tenth_of_the_passes(segmenter):
    dataset, passes = Scenes("test"), []
    for i in range(6):
        text_ids, pixels = segmenter.prepare(dataset[40 * i].image, [dataset[40 * i].phrase])
        plain = segmenter.model.generate(text_ids, pixels, draft="none")
        for draft in ("row", "jacobi", "hidden", "auto"):
            stats = {}
            assert torch.equal(segmenter.model.generate(text_ids, pixels, draft=draft, stats=stats), plain)
        passes += stats["mask_passes"]
    assert np.mean(passes) < 6.4


def test_a_picture_is_encoded_once_however_many_prompts(segmenter, monkeypatch):
    calls = []
    real = segmenter.model.encoder.encode_image
    monkeypatch.setattr(segmenter.model.encoder, "encode_image", lambda x: calls.append(len(x)) or real(x))
    segmenter(Scenes("test")[0].image, ["the circle", "the star", "everything red"])
    assert calls == [1]


def test_prepare_is_what_generate_takes(segmenter):
    text_ids, pixels = segmenter.prepare(Scenes("test")[0].image, ["the circle", "the star"])
    assert text_ids.shape == (2, 24) and pixels.shape == (1, 3, 128, 128)
    tokens = segmenter.model.generate(text_ids, pixels)
    assert tokens.shape == (2, 64) and torch.equal(tokens, segmenter.model.generate(text_ids, pixels))


@pytest.mark.parametrize("size", [(1, 1), (4000, 20), (3, 500)])
def test_pictures_of_odd_sizes_work(segmenter, size):
    (mask,) = segmenter(Image.new("RGB", size, "white"), ["the circle"])
    assert mask.shape == size[::-1]


# --- the command


def test_no_arguments_segments_the_embedded_picture(run, tmp_path):
    done = run("sample.py", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.decode().splitlines()
    files = sorted(p.name for p in (tmp_path / "out_masks").iterdir())
    assert len(files) == 2 * len(lines) and len(lines) >= 3
    assert all(" px (" in line and " ms" in line for line in lines)


def test_own_picture_with_json(sample, picture, tmp_path, tiny_checkpoint):
    out = tmp_path / "masks"
    done = sample("sample.py", "--image", picture, "--prompt", "the red circle", "--prompt", "Everything, blue!",
               "--out", out, "--json", tmp_path / "m.json", "--checkpoint", tiny_checkpoint)  # fmt: skip
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "m.json").read_text())
    assert [r["prompt"] for r in records] == ["the red circle", "Everything, blue!"]
    size = Image.open(picture).size
    for record in records:
        mask = np.asarray(Image.open(record["mask"])) > 0
        assert mask.shape == size[::-1] and Image.open(record["overlay"]).size == size
        assert (rle_decode(record["rle"]) == mask).all() and record["area"] == mask.sum()
    assert not list(out.glob("*.tmp")) and not list(out.glob(".*"))


def test_stdin_and_folders(sample, picture, tmp_path, tiny_checkpoint):
    flags = ("--prompt", "the star", "--out", tmp_path / "o", "--json", "-", "--checkpoint", tiny_checkpoint)
    done = sample("sample.py", "--image", "-", *flags, stdin=picture.read_bytes())
    assert done.returncode == 0, done.stderr
    assert [r["image"] for r in json.loads(done.stdout)] == ["-"]  # nothing but JSON on standard output
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("a.png", "a.jpg", "b.png"):
        Image.open(picture).save(folder / name)
    (folder / "notes.txt").write_text("not a picture")
    done = sample("sample.py", "--image", folder, *flags)
    records = json.loads(done.stdout)
    assert len({r["mask"] for r in records}) == 3


def test_every_way_to_decode(sample, picture, tmp_path, tiny_checkpoint):
    for decode in ("greedy", "beam", "top-k", "top-p", "random"):
        done = sample("sample.py", "--image", picture, "--prompt", "the star", "--decode", decode,
                   "--out", tmp_path / decode, "--checkpoint", tiny_checkpoint)  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_confidence_and_attention_are_pictures(sample, picture, tmp_path):
    files = {name: tmp_path / f"{name}.png" for name in ("confidence", "attention")}
    flags = [f"--{name}={path}" for name, path in files.items()]
    done = sample("sample.py", "--image", picture, "--prompt", "the leftmost object", "--out", tmp_path / "m", *flags)
    assert done.returncode == 0, done.stderr
    sure = np.asarray(Image.open(files["confidence"]))
    assert sure.shape == Image.open(picture).size[::-1] and np.median(sure) > 128 > sure.min()  # unsure at some edge
    looks = np.asarray(Image.open(files["attention"]).convert("L")).astype(int)
    side = len(looks) // 63  # rows look back, and never ahead
    assert looks[5 * side, 50 * side] == 0 and looks[50 * side, : 40 * side].max() > 40
    done = sample("sample.py", "--image", picture, "--prompt", "a", "--prompt", "b", *flags)
    assert done.returncode == 2 and b"one --prompt" in done.stderr
    done = sample("sample.py", "--image", picture, "--prompt", "a", "--decode", "beam", "--draft", "row")
    assert done.returncode == 2 and b"--decode greedy" in done.stderr


def test_the_bench_measures(sample, tmp_path, tiny_checkpoint):
    done = sample("sample.py", "--bench", "--checkpoint", tiny_checkpoint, "--json", tmp_path / "b.json")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "b.json").read_text())
    rows = {(row["batch"], row["draft"]): row for row in result["rows"]}
    assert len(rows) == 9 and result["bandwidth"] > 1e8
    tokens = rows[1, "none"]["passes_per_mask"]
    for row in rows.values():
        assert row["passes_per_mask"] <= tokens and row["masks_per_s"] > 0
        assert row["tokens_per_pass"] == pytest.approx(tokens / row["passes_per_mask"])


def test_scoring_prints_all_kinds_and_writes_json(sample, tmp_path, tiny_checkpoint):
    done = sample("sample.py", "--dataset", "scenes", "--split", "novel", "--count", 40, "--json", tmp_path / "s.json",
               "--out", tmp_path, "--checkpoint", tiny_checkpoint)  # fmt: skip
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "s.json").read_text())
    kinds = ("semantic", "referring", "reasoning")
    assert scores["all"]["count"] == 40 == sum(scores[kind]["count"] for kind in kinds)
    assert all(kind.encode() in done.stdout for kind in kinds)


def scored(folder):
    return json.loads((folder / "scenes-novel.json").read_text()), (folder / "scenes-novel.jsonl").read_text()


def test_scores_do_not_depend_on_stops_or_ranks(sample, tmp_path, tiny_checkpoint, monkeypatch):
    import sample as S

    flags = ["--dataset", "scenes", "--split", "novel", "--count", 70, "--checkpoint", tiny_checkpoint]
    assert sample("sample.py", *flags, "--out", tmp_path / "whole").returncode == 0
    numbers, lines = scored(tmp_path / "whole")

    real, batches = S.score_batch, []

    def dies(*args):
        if len(batches) == 1:
            raise KeyboardInterrupt
        batches.append(args)
        return real(*args)

    monkeypatch.setattr(S, "score_batch", dies)
    assert sample("sample.py", *flags, "--out", tmp_path / "broken").returncode == 130
    part = tmp_path / "broken" / "scenes-novel.rank0.jsonl"
    part.write_text(part.read_text() + '{"index": 32, "id": "half a li')
    monkeypatch.setattr(S, "score_batch", lambda *args: batches.append(args) or real(*args))
    assert sample("sample.py", *flags, "--out", tmp_path / "broken").returncode == 0
    assert len(batches) == 3 and scored(tmp_path / "broken")[0] == numbers  # of 32, 32 and 6: none came twice
    assert sorted(p.suffix for p in (tmp_path / "broken").iterdir()) == [".json", ".jsonl", ".png"]
    done = sample("sample.py", *flags, "--out", tmp_path / "broken", "--decode", "beam")
    assert done.returncode == 1 and b"is of another run (other decode, protocol)" in done.stderr

    two = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(REPO / "sample.py"),
         *map(str, flags), "--out", str(tmp_path / "two")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert two.returncode == 0, two.stderr[-2000:]
    assert scored(tmp_path / "two")[0] == numbers

    records = [json.loads(line) for line in lines.splitlines()[1:]]  # the same numbers from the masks themselves
    total, dataset = SegmentationMetrics(), load_dataset("scenes", "novel")
    for record in records:
        example = dataset[record["index"]]
        total.update(rle_decode(record["rle"]), example.mask, label=example.label, id=example.id)
    assert total.compute() == numbers["all"]
    from metrics import main

    assert main([str(tmp_path / "whole" / "scenes-novel.jsonl"), "--json", str(tmp_path / "again.json")]) == 0
    assert json.loads((tmp_path / "again.json").read_text()) == numbers["all"]


def test_broken_examples_stop_a_score_or_are_told(sample, tmp_path, tiny_checkpoint):
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    line = {"image": "a.png", "phrase": "the square", "mask": [[5, 5, 20, 5, 20, 20, 5, 20]]}
    lines = [json.dumps(line), json.dumps(line | {"image": "b.png"}), "{"]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    flags = ["--dataset", f"jsonl:{tmp_path / 'mine.jsonl'}", "--checkpoint", tiny_checkpoint, "--out", tmp_path / "o"]
    assert "mine.jsonl: line 2: " in error_of(sample("sample.py", *flags), 1)
    done = sample("sample.py", *flags, "--skip-broken")
    assert "2 of 3 examples are broken: no number" in error_of(done, 1)
    assert b"line 2: " in done.stdout and b"line 3: " in done.stdout
    done = sample("sample.py", *flags, "--skip-broken", "--allow-skipped", "--json", tmp_path / "s.json")
    assert done.returncode == 0, done.stderr
    scores = json.loads((tmp_path / "s.json").read_text())
    assert scores["skipped"] == 2 and scores["all"]["count"] == 1


def test_a_public_set_is_scored_per_class(sample, tmp_path, tiny_checkpoint):
    root = shutil.copytree(REPO / "tests" / "fixtures" / "pascal_voc", tmp_path / "voc")
    flags = ["--dataset", "voc20", "--split", "val", "--root", root, "--checkpoint", tiny_checkpoint]
    for classes, count in (("present", 4), ("all", 40)):
        out = tmp_path / classes
        done = sample("sample.py", *flags, "--classes", classes, "--out", out)
        assert done.returncode == 0, done.stderr
        numbers = json.loads((out / "voc20-val.json").read_text())
        assert numbers["all"]["count"] == count and numbers["all"]["mIoU"] is not None
    assert b"of every class" in done.stdout
    assert "--root" in error_of(sample("sample.py", "--dataset", "voc20"), 2)
    assert "imagenet" in error_of(sample("sample.py", "--dataset", "imagenet"), 2)
    assert "no split 'x'" in error_of(sample("sample.py", "--dataset", "scenes", "--split", "x"), 2)


def error_of(done, code):
    assert done.returncode == code, (done.returncode, done.stderr)
    assert b"Traceback" not in done.stderr
    return done.stderr.decode().strip().splitlines()[-1]


def test_wrong_use_exits_with_2(sample, picture):
    assert "--promt" in error_of(sample("sample.py", "--promt", "x"), 2)
    assert "--prompt" in error_of(sample("sample.py", "--image", picture), 2)
    assert "empty" in error_of(sample("sample.py", "--image", picture, "--prompt", " "), 2)
    assert "gpu7" in error_of(sample("sample.py", "--device", "gpu7"), 2)
    long = "the circle " * 40
    assert "24" in error_of(sample("sample.py", "--image", picture, "--prompt", long), 2)


def test_bad_data_exits_with_1_and_leaves_nothing(sample, picture, tmp_path, tiny_checkpoint):
    flags = ("--prompt", "the star", "--out", tmp_path / "o")
    assert "none.png" in error_of(sample("sample.py", "--image", tmp_path / "none.png", *flags), 1)
    (tmp_path / "broken.png").write_bytes(picture.read_bytes()[:300])
    assert "broken.png" in error_of(sample("sample.py", "--image", tmp_path / "broken.png", *flags), 1)
    assert not list((tmp_path / "o").iterdir())  # no mask, no half of one
    assert "pictures" in error_of(sample("sample.py", "--image", tmp_path / "o", *flags), 1)
    taken = tmp_path / "taken"
    taken.write_text("")
    tiny = ("--checkpoint", tiny_checkpoint)
    assert "taken" in error_of(sample("sample.py", "--image", picture, "--prompt", "x", "--out", taken, *tiny), 1)
    json_target = ("--json", tmp_path / "nowhere" / "m.json")
    assert "nowhere" in error_of(sample("sample.py", "--image", picture, *flags, *json_target, *tiny), 1)
    assert "once" in error_of(sample("sample.py", "--image", "-", "-", *flags, *tiny, stdin=b""), 1)
    assert "model.safetensors" in error_of(sample("sample.py", "--checkpoint", tmp_path), 1)
    other = tmp_path / "other"
    other.mkdir()
    (other / "model.safetensors").write_bytes((tiny_checkpoint / "mask_tokenizer.safetensors").read_bytes())
    assert "LlamaSeg" in error_of(sample("sample.py", "--checkpoint", other), 1)
    (other / "model.safetensors").write_bytes((tiny_checkpoint / "model.safetensors").read_bytes()[:5000])
    assert "model.safetensors" in error_of(sample("sample.py", "--checkpoint", other), 1)


# --- helpers


def test_describe_gives_area_and_box():
    mask = np.zeros((6, 8), bool)
    mask[2:4, 3:7] = True
    assert describe(mask) == (8, (3, 2, 4, 2))
    assert describe(np.zeros((6, 8), bool)) == (0, None)


@pytest.mark.parametrize("kind", ["1x1.png", "20000x20.png", "L.png", "P.png", "I;16.png", "exif.jpg"])
def test_odd_pictures_through_the_command(sample, tmp_path, tiny_checkpoint, kind):
    name, size = tmp_path / kind, (60, 40)
    if "x" in kind.split(".")[0] and kind[0].isdigit():
        size = tuple(int(n) for n in kind.split(".")[0].split("x"))
        Image.new("RGB", size, "white").save(name)
    elif kind == "exif.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", size).save(name, exif=exif)
        size = size[::-1]
    else:
        Image.new(kind.split(".")[0], size).save(name)
    done = sample("sample.py", "--image", name, "--prompt", "the star", "--out", tmp_path / "o", "--json", "-",
                  "--checkpoint", tiny_checkpoint)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (record,) = json.loads(done.stdout)
    assert Image.open(record["mask"]).size == Image.open(record["overlay"]).size == size


def test_the_assets_are_small():
    from train import ASSETS

    assert sum(p.stat().st_size for p in ASSETS.iterdir()) <= 25e6


def test_overlay_changes_the_object_and_keeps_the_size():
    image = Image.new("L", (8, 6), 100)
    mask = np.zeros((6, 8), bool)
    mask[1:5, 1:7] = True
    pixels = np.asarray(overlay(image, mask))
    assert pixels.shape == (6, 8, 3)
    assert tuple(pixels[1, 1]) == (255, 0, 160) and len({tuple(p) for p in pixels[~mask]}) == 1


def test_standard_input_that_is_no_picture(sample):
    done = sample("sample.py", "--image", "-", "--prompt", "x", stdin=b"zzz")
    assert "standard input" in error_of(done, 1)


def test_what_was_broken_is_tried_again(sample, tmp_path, tiny_checkpoint):
    line = {"image": "a.png", "phrase": "the square", "mask": [[5, 5, 20, 5, 20, 20, 5, 20]]}
    (tmp_path / "mine.jsonl").write_text(json.dumps(line))
    flags = ["--dataset", f"jsonl:{tmp_path / 'mine.jsonl'}", "--checkpoint", tiny_checkpoint, "--out", tmp_path / "o"]
    assert "1 of 1 examples are broken" in error_of(sample("sample.py", *flags, "--skip-broken"), 1)
    Image.new("RGB", (40, 30), "red").save(tmp_path / "a.png")
    done = sample("sample.py", *flags, "--json", tmp_path / "s.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "s.json").read_text())["all"]["count"] == 1
