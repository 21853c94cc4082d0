"""Seg-VAR: the color map and its inverse, the model and its three stages, the command."""

import json
import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import segvar
import train
from data import Panoptic, SceneInstances, load_dataset, rle_decode, rle_encode, to_pixels
from metrics import PanopticQuality
from model import LlamaConfig, SigLIPConfig
from segvar import (
    STAGES, SegmentBatches, SegVAR, SegVARConfig, color_map, instances, maps_of, palette, scores_of,
)
from tokenizer import VQGANConfig


def as_set(masks):
    return {mask.tobytes() for mask in masks}


def boxes(height, width, *corners):
    """Masks of rectangles (top, left, bottom, right)."""
    masks = np.zeros((len(corners), height, width), bool)
    for mask, (top, left, bottom, right) in zip(masks, corners):
        mask[top:bottom, left:right] = True
    return masks


def cell_of(picture, mask, grid):
    """(row, column) of the cell whose color a mask has; None for black."""
    (color,) = np.unique(picture[mask], axis=0)
    number = int(np.flatnonzero((palette(grid) == color).all(1))[0])
    return divmod(number - 1, grid) if number else None


@pytest.mark.parametrize("grid,apart", [(1, 360), (2, 254), (3, 179), (4, 152), (8, 81), (16, 47)])
def test_the_colors_lie_far_apart_and_far_from_black(grid, apart):
    colors = palette(grid).astype(int)
    assert colors.shape == (grid * grid + 1, 3) and not colors[0].any()
    squares = ((colors[:, None] - colors) ** 2).sum(-1) + 10**6 * np.eye(len(colors), dtype=int)
    assert squares.min() >= apart**2
    # plain m x m x m levels with as many points are not farther apart
    assert squares.min() ** 0.5 >= 255 / (np.ceil(round((grid * grid + 1) ** (1 / 3), 6)) - 1) - 1


@pytest.mark.parametrize("grid", [1, 3, 8, 16])
def test_disjoint_masks_come_back_exactly(grid):
    rng = np.random.default_rng(grid)
    for trial in range(12):
        height, width = rng.integers(grid if trial % 3 == 0 else 1, 60, 2)
        count = min(int(rng.integers(0, grid * grid + 1)) if trial % 4 else grid * grid, height * width)
        # pixels of one mask anywhere; the last number is background
        owner = rng.integers(0, count + 1, (height, width)) if trial % 2 else np.minimum(
            rng.permutation(height * width), count).reshape(height, width)  # every mask has one pixel
        masks = owner == np.arange(count)[:, None, None]
        masks = masks[masks.any((1, 2))]
        picture = color_map(masks, grid)
        assert picture.shape == (height, width, 3) and picture.dtype == np.uint8
        back = instances(picture, grid)
        assert back.dtype == bool and back.shape == masks.shape and as_set(back) == as_set(masks)


def test_drawn_scenes_come_back_with_panoptic_quality_1():
    metrics, dataset = PanopticQuality(), load_dataset("scenes-instances", "test")
    for i in range(0, 60, 2):
        gt = dataset[i]
        back = instances(color_map(gt.masks[gt.is_thing], 8), 8)
        label = {mask.tobytes(): label for mask, label in zip(gt.masks, gt.labels)}
        pred = [{"mask": mask, "label": label[mask.tobytes()]} for mask in back]
        metrics.update([*pred, {"mask": ~back.any(0), "label": "background"}], gt)
    assert metrics.compute()["All"] == {"pq": 1.0, "sq": 1.0, "rq": 1.0, "n": 9}


def test_an_instance_has_the_color_of_the_cell_of_its_center():
    masks = boxes(40, 80, (0, 0, 4, 4), (0, 76, 4, 80), (36, 0, 40, 4), (15, 30, 25, 50))
    picture = color_map(masks, 4)
    assert [cell_of(picture, mask, 4) for mask in masks] == [(0, 0), (0, 3), (3, 0), (2, 2)]  # on the border: the next
    assert not picture[~masks.any(0)].any()


def test_the_larger_keeps_its_cell_and_the_other_takes_the_nearest_free_one():
    small, large, third = boxes(40, 40, (14, 14, 16, 16), (11, 11, 14, 19), (16, 11, 18, 13))
    masks = np.stack([small, large, third])
    picture = color_map(masks, 4)
    assert cell_of(picture, large, 4) == (1, 1)
    assert cell_of(picture, small, 4) == (0, 1) and cell_of(picture, third, 4) == (1, 0)  # of one area: by place
    for order in ([0, 1, 2], [2, 1, 0], [1, 2, 0]):  # the order of the masks says nothing
        assert np.array_equal(color_map(masks[order], 4), picture)
    full = np.arange(100) == np.arange(9)[:, None, None]  # nine in one corner cell of 3 x 3 fill all of them
    assert {cell_of(color_map(full, 3), mask, 3) for mask in full} == {divmod(k, 3) for k in range(9)}


def test_more_instances_than_cells_leave_the_smallest_black():
    masks = boxes(10, 20, (0, 0, 3, 3), (0, 10, 2, 12), (5, 0, 9, 4), (5, 10, 10, 20), (0, 19, 1, 20), (9, 0, 10, 1))
    picture = color_map(masks, 2)
    assert cell_of(picture, masks[4], 2) is None and cell_of(picture, masks[5], 2) is None
    assert as_set(instances(picture, 2)) == as_set(masks[:4])


def test_overlaps_empty_masks_and_crowds():
    large, small, empty = boxes(20, 20, (0, 0, 20, 10), (5, 5, 10, 15), (0, 0, 0, 0))
    for order in ([large, small, empty], [empty, small, large]):
        picture = color_map(np.stack(order), 4)
        assert as_set(instances(picture, 4)) == as_set([large & ~small, small])  # the smaller lies on top
    for none in (np.zeros((0, 5, 7), bool), np.zeros((3, 5, 7), bool)):
        picture = color_map(none, 4)
        assert picture.shape == (5, 7, 3) and not picture.any() and instances(picture, 4).shape == (0, 5, 7)
    hidden = np.stack([boxes(4, 4, (0, 0, 2, 2))[0]] * 2)  # twice the same: the second covers the first
    assert len(instances(color_map(hidden, 2), 2)) == 1
    is_crowd = np.array([False, True, False])  # a crowd is left out by whoever calls
    assert as_set(instances(color_map(np.stack([large, small, empty])[~is_crowd], 4), 4)) == as_set([large])


def test_noise_is_read_as_the_nearest_color():
    rng = np.random.default_rng(0)
    owner = rng.integers(0, 5, (6, 8)).repeat(10, 0).repeat(10, 1)
    masks = owner == np.arange(4)[:, None, None]
    picture = color_map(masks, 8).astype(int)
    noisy = np.clip(picture + rng.integers(-20, 21, picture.shape), 0, 255).astype(np.uint8)
    assert as_set(instances(noisy, 8)) == as_set(masks)
    spot = noisy.copy()
    spot[0, :3] = palette(8)[60]
    assert len(instances(spot, 8)) == 5
    assert len(instances(spot, 8, least=4)) == 4


def test_a_resized_map_gets_no_new_instances():
    masks = boxes(16, 16, (2, 2, 8, 14), (8, 2, 14, 14))
    picture = color_map(masks, 8)
    back = instances(picture, 8, size=(48, 64))
    assert back.shape == (2, 48, 64)
    for mask, wanted in zip(sorted(back, key=lambda m: m[:24].sum()), masks[::-1]):
        wanted = wanted.repeat(3, 0).repeat(4, 1)
        assert (mask & wanted).sum() / (mask | wanted).sum() > 0.9
    assert np.array_equal(instances(picture, 8, size=(16, 16)), instances(picture, 8))


def test_between_two_instances_no_third_one_appears():
    colors = palette(8).astype(int)
    a, b, c = next((a, b, c) for a in range(1, 65) for b in range(a + 1, 65) for c in range(1, 65)
                   if abs(colors[a] + colors[b] - 2 * colors[c]).max() <= 2 and c not in (a, b))  # c lies between
    owner = np.full((16, 16), a)
    owner[:, 8:], owner[12:, :4] = b, c
    masks = instances(palette(8)[owner], 8, size=(96, 96))
    third = masks[sorted((a, b, c)).index(c)]
    assert len(masks) == 3 and third[80:, :16].all() and not third[:, 30:].any()
    small = instances(palette(8)[owner.repeat(4, 0).repeat(4, 1)], 8, size=(16, 16))
    assert len(small) == 3 and small.sum(0).all()


@pytest.mark.parametrize("masks,grid", [(np.zeros((4, 4), bool), 8), (np.zeros((1, 4, 4), np.uint8), 8),
                                        (np.zeros((1, 0, 4), bool), 8), (np.zeros((1, 4, 4), bool), 0)])
def test_what_is_no_set_of_masks(masks, grid):
    with pytest.raises(ValueError, match="expected masks bool"):
        color_map(masks, grid)
    with pytest.raises(ValueError, match="expected a picture uint8"):
        instances(masks, 8)


# ---- the model -------------------------------------------------------------------------------------------


@pytest.fixture
def tiny(monkeypatch):
    """The preset segvar, small enough for seconds: 32 px, 16 image tokens, 21 tokens of 3 scales."""
    config = SegVARConfig(
        siglip=SigLIPConfig(image_size=32, patch_size=8, vision_width=16, vision_layers=1, vision_heads=2,
                            vision_mlp=32),
        llama=LlamaConfig(width=32, layers=2, heads=2, mlp=48),
        vq=VQGANConfig(channels=8, channel_mult=(1, 1, 2, 2), res_blocks=1, latent_channels=8, codebook_size=64,
                       codebook_dim=4, norm_groups=4, scales=(1, 2, 4), unit_latents=True),
        classes=SceneInstances.classes, grid=4, width=8)
    monkeypatch.setitem(train.PRESETS, "segvar", config)
    monkeypatch.setattr(train, "matmul_rate", lambda device, dtype: 1e11)
    return config


def run(out, *more):
    """Six steps of a stage into a folder."""
    return train.main(["--preset", "segvar", "--out-dir", str(out), "--batch-size", "4", "--max-steps", "6", "--lr",
                       "1e-2", "--warmup-steps", "1", "--eval-every", "6", "--eval-count", "3", "--device", "cpu",
                       "--dtype", "float32", *map(str, more)])


def records(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_each_stage_trains_its_parts_and_no_other(tiny, tmp_path):
    names = {"seglat": {"pictures", "seglats", "codes"}, "latent": {"cells", "classes", "seglats", "codes"},
             "align": {"kl", "cross_entropy"}}
    before = None
    for stage, terms in names.items():
        start = ["--init-from", before] if before else []
        if stage == "align":
            start += ["--temperature", "0.1"]
        assert run(tmp_path / stage, "--stage", stage, *start) == 0
        *steps, scores = records(tmp_path / stage)
        assert all(terms <= r.keys() for r in steps)
        for r in steps:  # the loss is the sum of its terms; the cross-entropy is only told
            assert r["loss"] == pytest.approx(sum(r[name] for name in terms - {"cross_entropy"}), abs=1e-5)
        assert {"PQ", "SQ", "RQ", "AP50", "mIoU"} <= scores.keys() and (scores["PSNR"] is None) == (stage == "align")
        assert (tmp_path / stage / "grid-000006.png").exists()
        if before:
            old, new = (SegVAR.from_pretrained(path).state_dict() for path in (before, tmp_path / stage))
            moved = {name.partition(".")[0] for name in new if not torch.equal(old[name], new[name])}
            assert moved == set(STAGES[stage])
        before = tmp_path / stage


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(tiny, tmp_path):
    assert run(tmp_path / "one", "--stage", "latent") == 0
    assert run(tmp_path / "two", "--stage", "latent", "--save-every", "3") == 0
    (tmp_path / "two" / "checkpoint-0000006.pt").unlink()
    assert run(tmp_path / "two", "--stage", "latent", "--resume", "auto") == 0
    assert [r.get("loss") for r in records(tmp_path / "one")] == [r.get("loss") for r in records(tmp_path / "two")]


def test_wrong_stages_and_checkpoints_are_one_line(tiny, tmp_path, capsys):
    for flags, code, said in (
            (["--stage", "pretrain"], 2, "--stage pretrain has no use with --preset segvar"),
            (["--hide"], 2, "--hide has no use with --preset segvar"),
            (["--stage", "latent", "--temperature", "1"], 2, "--temperature has no use with --stage latent"),
            (["--data", "scenes"], 2, "scenes has phrases"),
            (["--init-from", tmp_path / "none"], 1, "no such file")):
        with suppress(SystemExit):
            assert run(tmp_path / "out", *flags) == code
        err = capsys.readouterr().err
        assert said in err and "Traceback" not in err


def test_the_prior_with_a_cache_writes_what_it_writes_without(tiny):
    model = SegVAR(tiny).eval()
    for table in (model.head, model.place_embedding, model.seglat_vq.quantize.embedding):
        torch.nn.init.normal_(table.weight)
    pixels, nothing = torch.rand(2, 3, 32, 32) * 2 - 1, torch.zeros(2, 0, dtype=torch.long)
    tokens = model.generate(nothing, pixels, stats=(stats := {}))
    assert torch.equal(tokens, model.generate_naive(nothing, pixels)) and stats["passes"] == 2  # after the prefill
    assert tokens.shape == (2, 21) and len(tokens.unique()) > 8
    # the inputs of a scale come from the coarser ones: no token sees another of its own scale, nor of a later one
    logits = super(SegVAR, model).forward(nothing, pixels, tokens)[0]
    other = tokens.clone()
    other[:, 5:] = (other[:, 5:] + 7) % 64  # the last scale
    assert torch.allclose(logits, super(SegVAR, model).forward(nothing, pixels, other)[0], atol=1e-5)
    other[:, 4] = (other[:, 4] + 7) % 64
    changed = (logits - super(SegVAR, model).forward(nothing, pixels, other)[0]).abs().amax((0, 2)) > 1e-5
    assert changed.tolist() == [False] * 5 + [True] * 16


def test_the_posterior_is_a_softmax_of_distances_and_ends_in_the_nearest_code(tiny):
    model = SegVAR(tiny).eval()
    seglats = torch.rand(2, 3, 32, 32) * 2 - 1
    model.config.temperature = 0.05
    with torch.no_grad():
        tokens, q = model.posterior(seglats)
        latents = model.seglat_vq.latents(seglats)
        first = latents.mean((2, 3))  # what the scale 1 x 1 describes
        rows = model.seglat_vq.quantize.codebook
        by_hand = torch.stack([torch.exp(-((z - rows) ** 2).sum(1) / 0.05) for z in first])
        assert torch.allclose(q[:, 0], by_hand / by_hand.sum(1, keepdim=True), atol=1e-5)
        assert torch.equal(tokens, q.argmax(-1)) and torch.equal(tokens, model.seglat_vq.encode(seglats))
        # the colder, the nearer is the KL to the cross-entropy with the nearest code
        maps = torch.randint(0, 17, (2, 32, 32)), torch.randint(0, 9, (2, 32, 32))
        gaps = []
        for temperature in (1e-1, 1e-3, 1e-6):
            model.config.temperature = temperature
            terms = model.align_losses(seglats, *maps)
            gaps.append(abs(terms["kl"] - terms["cross_entropy"]).item())
        model.config.temperature = None
        assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-3
        assert model.align_losses(seglats, *maps)["kl"].item() == pytest.approx(terms["cross_entropy"].item(), abs=1e-5)


def test_the_kl_falls_and_seglats_are_learned(tiny, tmp_path):
    """On four pictures, over and over."""
    model = SegVAR(tiny).train()
    batch = SegmentBatches(load_dataset("scenes-instances", "train"), tiny, 4, 4)[0]
    batch = {"pixels": to_pixels(batch["pictures"]), "cells": batch["cells"], "classes": batch["classes"]}
    model.config.temperature = 0.05
    for stage, name, falls in (("seglat", "seglats", 0.6), ("latent", "cells", 0.6), ("align", "kl", 0.6)):
        optimizer = torch.optim.AdamW([p for p in model.learn(stage).parameters() if p.requires_grad], lr=1e-2)
        values = []
        for _ in range(40):
            terms, loss = model(**batch)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            values.append(terms[name].item())
        assert values[-1] < falls * values[0], (stage, values[0], values[-1])


# ---- from logits to segments -----------------------------------------------------------------------------


def test_certain_logits_give_the_true_segments(tiny):
    """One-hot logits of true maps, at the pictures' own sizes: panoptic quality nearly 1."""
    config = replace(tiny, siglip=replace(tiny.siglip, image_size=256, patch_size=64), grid=8,
                     vq=replace(tiny.vq, scales=(1, 32)))
    model, dataset, metrics, records = SegVAR(config), load_dataset("scenes-instances", "test"), PanopticQuality(), []
    for index in range(12):
        true = dataset[index]
        cells, classes = (torch.from_numpy(values) for values in maps_of(true, config))
        logits = (20 * F.one_hot(cells, 65).permute(2, 0, 1).float(),
                  20 * F.one_hot(classes.clamp(max=8), 9).permute(2, 0, 1).float())  # a few at the edges are void
        segments = model.segments(*logits, true.masks.shape[1:])
        metrics.update(segments, true)
        assert all(s["score"] > 0.9 for s in segments)
        records.append({"index": index, "id": true.id, "segments": [
            {**{k: v for k, v in s.items() if k != "mask"}, "rle": rle_encode(s["mask"])} for s in segments]})
    assert metrics.compute()["All"]["pq"] > 0.97
    scores = scores_of(records, dataset)
    assert scores["PQ"] == metrics.compute()["All"]["pq"] and scores["AP50"] == 1.0 and scores["mIoU"] > 0.97


def test_maps_of_overlaps_and_crowds(tiny):
    masks = boxes(32, 32, (0, 0, 32, 32), (0, 0, 16, 16), (4, 4, 12, 12), (20, 20, 30, 30))
    example = Panoptic(Image.new("RGB", (32, 32)), "x", masks, ["background", "circle", "star", "ring"],
                       [False, True, True, True], [False, False, False, True], classes=SceneInstances.classes)
    cells, classes = maps_of(example, tiny)
    names = list(SceneInstances.classes)
    assert classes[0, 0] == names.index("circle") and classes[8, 8] == names.index("star")
    assert classes[31, 0] == names.index("background") and classes[25, 25] == len(names)  # the crowd is void
    assert set(np.unique(cells[20:])) == {0} and len(np.unique(cells)) == 3


# ---- python segvar.py ------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(tiny, tmp_path):
    model = SegVAR(tiny).eval()
    torch.nn.init.normal_(model.head.weight, std=1.0)
    (tmp_path / "model").mkdir()
    model.save_pretrained(tmp_path / "model" / "model.safetensors")
    return tmp_path / "model"


def test_pictures_become_coco_files(checkpoint, tmp_path, capsys):
    image = load_dataset("scenes-instances", "test")[0].image
    image.save(tmp_path / "a.png")
    (tmp_path / "b.png").write_text("no picture")
    flags = ["--checkpoint", str(checkpoint), "--out", str(tmp_path / "out"), "--json", str(tmp_path / "all.json")]
    assert segvar.main([*flags, "--image", str(tmp_path / "a.png"), str(tmp_path / "b.png")]) == 1
    out = capsys.readouterr()
    assert "a: " in out.out and out.err.count("\n") == 1 and "b.png" in out.err
    assert Image.open(tmp_path / "out" / "a-segments.png").size == image.size
    panoptic, results = (json.loads((tmp_path / f"all{end}.json").read_text()) for end in ("", ".instances"))
    (annotation,), names = panoptic["annotations"], {c["id"]: c["name"] for c in panoptic["categories"]}
    numbers = np.asarray(Image.open(tmp_path / "out" / annotation["file_name"])) @ np.array([1, 256, 65536])
    segments = SegVAR.from_pretrained(checkpoint).segment(image)
    assert len(segments) == len(annotation["segments_info"]) > 0
    for segment, info in zip(segments, annotation["segments_info"]):
        assert np.array_equal(numbers == info["id"], segment["mask"]) and info["area"] == segment["mask"].sum()
        assert names[info["category_id"]] == segment["label"]
        left, top, width, height = info["bbox"]
        assert segment["mask"][top:top + height, left:left + width].sum() == info["area"]
    things = [s for s in segments if s["is_thing"]]
    assert [r["score"] for r in results] == [s["score"] for s in things]
    assert all(np.array_equal(rle_decode(r["segmentation"]), s["mask"]) for r, s in zip(results, things))


def test_scores_of_a_data_set_go_on_where_they_were(checkpoint, tmp_path, capsys):
    flags = ["--checkpoint", str(checkpoint), "--out", str(tmp_path), "--dataset", "scenes-instances", "--count", "3"]
    assert segvar.main(flags) == 0
    lines, said = tmp_path / "scenes-instances-test-segments.jsonl", capsys.readouterr().out
    first = lines.read_text()
    lines.write_text("".join(first.splitlines(True)[:2]))  # as a killed run leaves it
    assert segvar.main(flags) == 0 and capsys.readouterr().out == said and lines.read_text() == first
    numbers = json.loads(lines.with_suffix(".json").read_text())
    assert numbers["count"] == 3 and f"PQ   {numbers['PQ']:8.4f}" in said
    for more, text in ((["--dataset", "scenes"], "has phrases"), (["--image", "x"], "no use")):
        with pytest.raises(SystemExit):
            segvar.main([*flags, *more])
        assert text in capsys.readouterr().err


def test_the_public_preset_takes_a_step_on_official_files(tmp_path, monkeypatch, capsys):
    """SigLIP's and VAR's fixtures, both of 64 px, and a tree of COCO's."""
    public = train.PRESETS["segvar-coco"]
    assert public.mask_tokens == 680
    config = replace(public, llama=LlamaConfig(width=32, layers=1, heads=2, mlp=48), width=16,
                     siglip=replace(public.siglip, image_size=64), vq=replace(public.vq, scales=(1, 2, 3, 4)))
    monkeypatch.setitem(train.PRESETS, "segvar-coco", config)
    monkeypatch.setattr(train, "matmul_rate", lambda device, dtype: 1e11)
    fixtures = Path(__file__).parent / "fixtures"
    shutil.copytree(fixtures / "coco_panoptic" / "coco", tmp_path / "coco")
    for path in sorted((tmp_path / "coco").rglob("*val2017*")):  # the fixture has no other split
        path.parent.joinpath(path.name.replace("val", "train")).symlink_to(path)
    flags = ["--preset", "segvar-coco", "--data", "coco-panoptic", "--root", tmp_path, "--encoder",
             fixtures / "siglip", "--mask-tokenizer", fixtures / "var_vqvae" / "vae.pth"]
    for stage in ("latent", "align"):
        start = ["--init-from", tmp_path / "latent"] if stage == "align" else []
        assert run(tmp_path / stage, *flags, "--stage", stage, "--max-steps", "1", *start) == 0
    assert train.main([*map(str, flags), "--print-config"]) == 0
