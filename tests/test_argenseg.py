"""ARGenSeg against the official outputs, its conversations, its files, and the commands that reach it."""

import json
import os
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image
from safetensors.torch import load_file, save_file

import train
from data import Dialogues, load_dataset
from mllm import (
    MASK, ARGenSeg, ARGenSegConfig, ARGenSegPrompt, ChatCache, ScenesPrompt, clean_up, mask_pictures, normalize,
    our_names, picture_mask, shuffle_pixels, tile_grid, tiles,
)
from mllm import PRESETS as MLLM_PRESETS
from sample import Segmenter
from tokenizer import VQGAN, MultiScaleVQ

FIXTURE = REPO / "tests" / "fixtures" / "argenseg"
CHECKPOINT = FIXTURE / "checkpoint"
SEGMENT = "Given the following instructions: the dog; please perform referring segmentation on this image."


@pytest.fixture(scope="module")
def io():
    return json.loads((FIXTURE / "io.json").read_text())


@pytest.fixture(scope="module")
def vision():
    return load_file(FIXTURE / "vision.safetensors")


@pytest.fixture(scope="module")
def llm():
    return load_file(FIXTURE / "llm.safetensors")


@pytest.fixture(scope="module")
def seg():
    return load_file(FIXTURE / "seg.safetensors")


@pytest.fixture(scope="module")
def model():
    return ARGenSeg.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def prompt(model):
    return ARGenSegPrompt(CHECKPOINT, model.config.image_tokens)


@pytest.fixture
def segmenter():
    return Segmenter.load(CHECKPOINT, "cpu")


@pytest.fixture(scope="module")
def pictures():
    return [Image.open(FIXTURE / f"picture_{i}.png") for i in (0, 1)]


@pytest.fixture
def watch(model, monkeypatch):
    """What the model computes while it answers: "words", logits of the ordinary passes; "codes", logits of each scale;
    "inputs" and "hidden" of all passes."""
    seen = {"words": [], "codes": [], "inputs": [], "hidden": []}
    mask_head, llama = model.mask_head, model.llama.forward

    def watched_head(hidden):
        seen["codes"].append(mask_head(hidden))
        return seen["codes"][-1]

    def watched_llama(embeddings, *more):
        seen["inputs"].append(embeddings)
        seen["hidden"].append(llama(embeddings, *more))
        return seen["hidden"][-1]

    monkeypatch.setattr(model, "mask_head", watched_head)
    monkeypatch.setattr(model.llama, "forward", watched_llama)
    hook = model.lm_head.register_forward_hook(lambda layer, args, logits: seen["words"].append(logits))
    yield seen
    hook.remove()


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


def copy_checkpoint(folder, change=None, config=None):
    """The fixture's checkpoint as one file, after change(tensors) and with fields of its config replaced."""
    folder.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(CHECKPOINT / name, folder / name)
    fields = json.loads((CHECKPOINT / "config.json").read_text())
    for name, value in (config or {}).items():
        part, _, name = name.rpartition(".")
        (fields[part] if part else fields)[name] = value
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {name: w for file in CHECKPOINT.glob("*.safetensors") for name, w in load_file(file).items()}
    if change:
        change(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


# --- pictures


def test_pictures_and_tiles_are_the_official_ones(pictures, vision, io):
    close(torch.cat([tiles(picture, 56) for picture in pictures]), vision["pixel_values"], 1e-6)
    several = tiles(pictures[1], 56, io["tiling"]["max_num"]).permute(0, 2, 3, 1)
    levels = (several * torch.tensor([0.229, 0.224, 0.225]) + torch.tensor([0.485, 0.456, 0.406])) * 255
    close(levels, vision["tiles_uint8"].float(), 1e-3)
    assert tile_grid((115, 113), 56, 4) == tuple(io["tiling"]["grid_wh"])
    for least, most, width, height, columns, rows in io["tiling_choices"]:
        assert tile_grid((width, height), 448, most, least) == (columns, rows)


@torch.no_grad()
def test_vision_features_are_the_official_ones(model, pictures, vision):
    features = model.vision(vision["pixel_values"])
    close(features, vision["vit_last_hidden"], 2e-5)
    close(shuffle_pixels(features[:, 1:]), vision["pixel_shuffled"], 2e-5)
    close(model.encode_image(vision["pixel_values"]), vision["image_embeds"].flatten(0, 1), 2e-5)
    close(model.encode_image(tiles(pictures[1], 56, 4)), vision["tiles_image_embeds"].flatten(0, 1), 2e-5)


# --- the language model


@torch.no_grad()
def test_logits_are_the_official_ones_also_beyond_the_trained_positions(model, llm):
    def logits(embeddings, cache):
        return model.lm_head(model.read(embeddings, cache))[0]

    close(model.lm_head(model.llama(model.token_embedding(llm["tf_ids"]))), llm["tf_logits"], 2e-4)
    embeddings = model.token_embedding(llm["long_ids"])
    close(logits(embeddings, ChatCache(model, 1))[-4:], llm["long_logits_last4"], 1.5e-3)
    cache = ChatCache(model, 1)
    logits(embeddings[:, :508], cache)
    steps = [logits(embeddings[:, i:i + 1], cache) for i in range(508, 516)]
    close(torch.cat(steps), llm["long_cached_logits"], 1.5e-3)
    # the official model keeps the larger base after a long input; here a new cache starts with the plain one
    close(logits(model.token_embedding(llm["tf_ids"]), ChatCache(model, 1)), llm["tf_logits"][0], 2e-4)


def test_what_a_long_prompt_left_does_not_touch_the_next_one(model, llm):
    long, ids = llm["long_ids"].masked_fill(llm["long_ids"] == model.config.image_id, 5), llm["text_prompt_ids"]
    cache = model.answer(long, None, 1)[2]
    found, _, cache = model.answer(ids, None, 12, cache=cache)
    assert torch.equal(found, llm["text_generated_ids"]) and cache.position < 512


def test_the_shape_of_the_official_model():
    with torch.device("meta"):
        model = ARGenSeg(ARGenSegConfig())
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    language = sum(counts[name] for name in ("llama", "token_embedding", "lm_head"))
    assert (counts["vision"], language, counts["mlp1"]) == (304_012_288, 7_771_369_472, 33_570_816)
    total = sum(p.numel() for p in model.parameters())
    assert total == 8_220_862_339 - 108_948_355  # without VAR's tokenizer
    assert (model.config.image_tokens, model.config.mask_tokens) == (256, 680)


@pytest.mark.parametrize("name", ["text", "turn1", "turn2", "tiles"])
def test_chats_are_the_official_ones(model, prompt, watch, pictures, vision, llm, io, name):
    chat = io["chat"][name]
    messages = [*(io["chat"]["turn1"][part] for part in ("question", "response") if name == "turn2"), chat["question"]]
    pixels = vision["pixel_values"][:1] if "turn" in name else None
    if name == "tiles":
        pixels = tiles(pictures[1], 56, 4)
    ids = prompt.chat(messages, 0 if pixels is None else len(pixels))
    assert torch.equal(ids, llm[f"{name}_prompt_ids"])
    want = llm[f"{name}_generated_ids"]
    found, masks, _ = model.answer(ids, pixels, want.shape[1])
    assert torch.equal(found, want) and not masks
    assert prompt.decode(found[0].tolist()) == chat["response"]
    close(torch.cat(watch["words"]), llm[f"{name}_step_logits"], 5e-4)


# --- masks between words


def check_masks(model, watch, seg, name, start, codes, picture):
    """The mask `name` in seg, which begins at pass `start` of those that were watched."""
    inputs, scales = watch["inputs"][start:start + 4], len(model.config.scales)
    for scale_idx in range(scales):
        close(inputs[scale_idx], seg[f"{name}_scale{scale_idx}_inputs"], 2e-5)
        close(watch["codes"][scale_idx], seg[f"{name}_scale{scale_idx}_logits"], 3e-4)
    maps = model.mask_tokenizer.teacher_inputs(codes)
    want = [seg[f"{name}_next_map{i}"].flatten(2).mT for i in range(scales - 1)]
    close(maps, torch.cat(want, dim=1), 1e-5)
    check_picture(model, seg, name, codes, picture)


def check_picture(model, seg, name, codes, picture):
    assert torch.equal(codes[0], seg[f"{name}_ids"])
    close(torch.cat(list(model.mask_tokenizer.quantize.sums(codes))), seg[f"{name}_f_hat"], 1e-5)
    decoded = model.mask_tokenizer.decode(codes)[0]
    levels = ((decoded + 1) / 2 * 255).permute(1, 2, 0).int()
    off = np.abs(levels.numpy() - seg[f"{name}_uint8"].numpy())
    assert off.max() <= 1 and (off > 0).mean() <= 0.001
    mask = picture_mask(decoded, picture.size)
    assert (mask != seg[f"{name}_mask"].numpy().astype(bool)).mean() <= 0.002


@torch.no_grad()
def test_two_masks_in_an_answer_are_the_official_ones(model, prompt, watch, vision, seg, io, pictures):
    pixels = vision["pixel_values"][:1]
    ids = prompt([" the dog"])
    assert torch.equal(ids, seg["seg_prompt_ids"])
    assert torch.equal(ids, prompt.chat([io["seg"]["seg"]["question"]], 1))  # the official form, with <image>
    close(model.prefix(ids, pixels), seg["seg_prompt_embeds"], 2e-5)
    found, masks, cache = model.answer(ids, pixels)
    assert torch.equal(found, seg["seg_generated_ids"]) and len(masks) == 2
    close(torch.cat(watch["words"]), seg["seg_step_logits"], 5e-4)
    lengths = torch.tensor([x.shape[1] for x in watch["inputs"]]).cumsum(0)
    assert lengths[5:9].tolist() == seg["seg0_attention_len"].tolist()
    assert lengths[11 + 1:][:4].tolist() == seg["seg1_attention_len"].tolist()
    check_masks(model, watch, seg, "seg0", 5, masks[0], pictures[0])
    close(model.mask_tokenizer.decode(masks[0])[0], seg["seg0_decoded"], 2e-5)
    check_picture(model, seg, "seg1", masks[1], pictures[0])
    words = prompt.decode(found[0].tolist())
    assert words.count(MASK) == 2 and clean_up(words.replace(MASK, "")) == io["seg"]["seg"]["response"]
    # with a cache as without
    hidden = model.llama(torch.cat(watch["inputs"], dim=1))
    close(torch.cat(watch["hidden"][:-1], dim=1), hidden, 2e-5)
    assert cache.position == len(cache.ids) == hidden.shape[1]


@torch.no_grad()
def test_guided_masks_are_the_official_ones(model, prompt, watch, vision, seg, io, pictures):
    ids = prompt.pad_left([prompt.chat([SEGMENT], 1), prompt.chat([prompt.nothing], 1)])
    assert torch.equal(ids, seg["cfg_prompt_ids"])
    found, masks, cache = model.answer(ids, vision["pixel_values"][:1], 9, guidance=4.0)
    assert torch.equal(found, seg["cfg_generated_ids"]) and len(masks) == 1
    close(torch.stack(watch["words"]), seg["cfg_step_logits"], 5e-4)
    check_masks(model, watch, seg, "cfg", 5, masks[0], pictures[0])
    for scale_idx, logits in enumerate(watch["codes"]):
        strength = 4 * scale_idx / 9
        guided = (1 + strength) * logits[:1] - strength * logits[1:]
        close(guided, seg[f"cfg_scale{scale_idx}_guided"], 8e-4)
    assert prompt.decode(found[0].tolist()).replace(MASK, "") == io["seg"]["cfg"]["response"][0]
    # not guided, the rows do not depend on each other
    alone, codes, _ = model.answer(ids[:1], vision["pixel_values"][:1], 9)
    both, same, _ = model.answer(ids, vision["pixel_values"][:1], 9)
    assert torch.equal(alone[0], both[0]) and all(map(torch.equal, codes, same))


def test_a_mask_as_the_very_first_token_is_no_special_case(model, prompt, watch, vision, monkeypatch):
    ids, pixels = prompt(["the dog"]), vision["pixel_values"][:1]
    weight = model.lm_head.weight.clone()
    try:
        hidden = model.llama(model.prefix(ids, pixels))[0, -1]
        model.lm_head.weight[model.config.start_id] = hidden  # the likeliest after the prompt
        found, masks, _ = model.answer(ids, pixels, 1)
    finally:
        model.lm_head.weight.copy_(weight)
    assert found.tolist() == [[model.config.end_id]] and masks[0].shape == (1, 30)


# --- training


@pytest.fixture(scope="module")
def lessons():
    """The official training tensors, and the micro-batches that ours makes of the same lines: line 1, lines 1 to 3."""
    dataset = load_dataset(f"jsonl:{FIXTURE / 'train.jsonl'}", "train")
    model = ARGenSeg.from_pretrained(CHECKPOINT)
    prompt = ARGenSegPrompt(CHECKPOINT, model.config.image_tokens)
    batches = {}
    for name, count in (("one", 1), ("batch", 3)):
        item = Dialogues([dataset[i] for i in range(count)], prompt, 56, 30, count, count, mask_size=64)
        item._index = lambda position: position  # in the order of the file
        batches[name] = item[0]
    return load_file(FIXTURE / "train.safetensors"), batches, model


def test_training_batches_are_the_official_ones(lessons):
    official, batches, model = lessons
    for name, item in batches.items():
        want = official[f"{name}_input_ids"][:, :-1], official[f"{name}_labels"][:, :-1]  # ours have no last newline
        attended = official[f"{name}_attention_mask"]
        for row, length in enumerate(attended.sum(1).tolist()):
            assert item["text_ids"][row, :length - 1].equal(want[0][row, :length - 1])
            assert item["labels"][row, :length - 1].equal(want[1][row, :length - 1])
            assert (item["labels"][row, length - 1:] == -100).all()
        count = len(item["masks"])
        assert item["masks"].equal(official["masks_uint8"][:count])
        tokens = model.mask_tokenizer.encode(mask_pictures(item["masks"]))
        assert tokens.equal(official["mask_codes"][:count])
        close(model.mask_tokenizer.teacher_inputs(tokens), official["mask_var_input"][:count], 1e-5)


@pytest.mark.parametrize("name", ["one", "batch"])
def test_losses_and_gradients_are_the_official_ones(lessons, io, name):
    official, batches, model = lessons
    item, want = batches[name], io["train"][name]
    tokens = model.mask_tokenizer.encode(mask_pictures(item["masks"]))
    model.start_training()
    model.zero_grad()
    logits, loss = model(item["text_ids"], normalize(item["pictures"]), tokens, item["labels"])
    assert len(logits) == want["text_targets"] + want["mask_targets"]
    assert loss.item() == pytest.approx(want["loss"], abs=2e-4)
    loss.backward()
    norms = dict.fromkeys(want["grad_norm"], 0.0)
    for official_name in norms:
        parts = our_names({official_name: torch.zeros(1)}) if "wqkv" not in official_name else {
            official_name.replace("language_model.model", "llama").replace("attention.wqkv", f"self_attn.{p}_proj"): 0
            for p in "qkv"}
        norms[official_name] = sum(model.get_parameter(ours).grad.pow(2).sum().item() for ours in parts) ** 0.5
    assert norms == pytest.approx(want["grad_norm"], rel=1e-3)
    assert not any(p.grad is not None for part in (model.vision, model.mask_tokenizer) for p in part.parameters())
    if name == "one":
        close(model.word_embed.weight.grad, official["one_grad_word_embed_weight"], 3e-5)
        close(model.lvl_embed.weight.grad, official["one_grad_lvl_embed"], 3e-5)
        close(model.pos_1LC.grad, official["one_grad_pos_1LC"], 3e-5)
        coded = logits[8:38]  # of 7 words and <ge_start>, the mask, a full stop and the end
        close(coded[:, -64:], official["one_mask_logits"], 3e-4)
        close(coded.logsumexp(1), official["one_mask_logsumexp"], 3e-4)
        close(torch.cat([logits[:8], logits[38:]]), official["one_text_logits"], 5e-4)


def test_a_batch_without_masks_still_reaches_every_parameter(lessons):
    """Else DistributedDataParallel would wait for the gradients of the mask parts."""
    _, batches, model = lessons
    item = batches["batch"]
    ids, labels = item["text_ids"][2:], item["labels"][2:]
    model.start_training()
    model.zero_grad()
    none = torch.zeros(0, 30, dtype=torch.long)
    loss = model(ids, normalize(item["pictures"][2:]), none, labels)[1]
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in model.parameters() if p.requires_grad)


@torch.no_grad()
def test_teacher_forcing_agrees_with_answering(model, prompt, vision, seg):
    """The answer with two masks, learned as it was given, is the likeliest at every place."""
    c, pixels = model.config, vision["pixel_values"][:1]
    found, masks, _ = model.answer(seg["seg_prompt_ids"], pixels)
    ids, labels = seg["seg_prompt_ids"][0].tolist(), [-100] * seg["seg_prompt_ids"].shape[1]
    for id in found[0].tolist():
        new = [c.start_id, *[c.place_id] * 29, c.end_id] if id == c.end_id else [id]
        labels += [c.place_id if id == c.end_id else id for id in new]
        ids += new
    logits, _ = model(torch.tensor([ids]), pixels, torch.cat(masks), torch.tensor([labels]))
    places = torch.tensor([label == c.place_id for label in labels if label >= 0])
    assert logits[places][:, -64:].argmax(-1).equal(torch.cat(masks).flatten())
    words = torch.tensor([label for label in labels if label >= 0 and label != c.place_id])
    assert logits[~places].argmax(-1).equal(words) and len(words) == found.shape[1]


def test_lessons_of_several_turns(prompt):
    """The ids are those of the chat but for the masks, and only the answers are learned."""
    messages = ["<image>\nIs there a dog?", "No.", "And a <mask> cat?", "Yes: <mask>."]
    ids, labels = prompt.lesson(messages, 30)
    asked = prompt.chat(messages[:3], 1)[0].tolist()
    assert ids[:len(asked)] == asked and prompt.decode(ids[len(asked):]) == "Yes: <mask>."
    assert ids.index(prompt.mask) - ids.index(prompt.special["<ge_start>"]) == 30 == labels.count(prompt.place)
    learned = [id for id, label in zip(ids, labels) if label >= 0]
    assert prompt.decode(learned) == "No.Yes: <mask>." and learned.count(prompt.special["<|im_end|>"]) == 2


# --- train.py


@pytest.fixture
def quick(monkeypatch):
    """Flags for a run of seconds; train.py's own numbers of speed are left out."""
    monkeypatch.setattr(train, "matmul_rate", lambda device, dtype: 1e11)

    def flags(out, *more):
        return [str(flag) for flag in ("--out-dir", out, "--device", "cpu", "--dtype", "float32", "--max-steps", 4,
                                       "--batch-size", 3, "--eval-every", 4, "--eval-count", 1, "--save-every", 2,
                                       "--warmup-steps", 2, "--optimizer", "adamw", *more)]

    return flags


def losses(out):
    records = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.parametrize("rank", [4, 0])
def test_a_run_starts_from_the_official_loss_and_resumes(quick, tmp_path, io, pictures, rank):
    official = ["--preset", "argenseg-8b", "--encoder", CHECKPOINT, "--lora-rank", rank, "--val", "scenes", "--data",
                f"jsonl:{FIXTURE / 'train.jsonl'}", "--lr", 1e-3]
    assert train.main(quick(tmp_path / "whole", *official)) == 0
    whole = losses(tmp_path / "whole")
    assert whole[0] == pytest.approx(io["train"]["batch"]["loss"], abs=2e-4) and whole[-1] < whole[0] - 1
    shutil.copytree(tmp_path / "whole", tmp_path / "broken")
    (tmp_path / "broken" / "checkpoint-0000004.pt").unlink()
    assert train.main(quick(tmp_path / "broken", *official, "--resume", "auto")) == 0
    assert losses(tmp_path / "broken") == whole
    # the file is read on its base, and another base is refused
    loaded = Segmenter.load(tmp_path / "whole", "cpu", encoder=CHECKPOINT)
    questions = [(loaded, 8), (Segmenter.load(CHECKPOINT, "cpu"), 8)]
    answers = [segmenter.chat(pictures[0], SEGMENT, length)[0] for segmenter, length in questions]
    assert answers[0] != answers[1]
    names = set(load_file(tmp_path / "whole" / "model.safetensors"))
    assert {"word_embed.weight", "lvl_embed.weight", "pos_1LC"} <= names
    assert ("lm_head.weight" in names) == (rank == 0) and any("lora_a" in name for name in names) == (rank > 0)
    assert not any(name.startswith(("vision.", "mask_tokenizer.")) for name in names)
    other = copy_checkpoint(tmp_path / "other", lambda tensors: tensors["mlp1.3.bias"].add_(1))
    with pytest.raises(ValueError, match="trained with the mllm checkpoint"):
        Segmenter.load(tmp_path / "whole", "cpu", encoder=other)
    Segmenter.load(tmp_path / "whole", "cpu", encoder=other, any_weights=True)


@pytest.fixture
def small_scenes(tmp_path, monkeypatch):
    """The preset argenseg-scenes with fewer layers; the file of a multi-scale mask tokenizer for it."""
    c = train.PRESETS["argenseg-scenes"]
    small = replace(c, siglip=replace(c.siglip, vision_layers=1), llama=replace(c.llama, layers=1))
    monkeypatch.setitem(train.PRESETS, "argenseg-scenes", small)
    path = tmp_path / "scales.safetensors"
    plain = VQGAN.from_pretrained(REPO / "assets" / "mask_tokenizer.safetensors")
    MultiScaleVQ.from_plain(plain, c.scales).save_pretrained(path)
    return path


def test_argenseg_scenes_trains_and_answers(quick, small_scenes, tmp_path, sample, capfdbinary):
    with torch.device("meta"):
        assert sum(p.numel() for p in ARGenSeg(MLLM_PRESETS["argenseg-scenes"]).parameters()) < 12e6
    flags = ["--preset", "argenseg-scenes", "--data", "scenes-questions", "--mask-tokenizer", small_scenes]
    assert train.main(quick(tmp_path / "out", *flags, "--batch-size", 8)) == 0
    assert losses(tmp_path / "out")[0] == pytest.approx(2 * np.log(776 + 4096), abs=1.0)
    capfdbinary.readouterr()
    done = sample("sample.py", "--checkpoint", tmp_path / "out", "--chat", "How many circles are there?")
    assert done.returncode == 0 and done.stdout.startswith(b"example: ")
    done = sample("sample.py", "--checkpoint", tmp_path / "out", "--dataset", "scenes", "--count", 2, "--out", tmp_path)
    assert done.returncode == 0, done.stderr


def test_a_few_conversations_can_be_learned(small_scenes):
    """Words and masks come back from `answer` as they were taught, each by the conversation that asks for it."""
    config = train.PRESETS["argenseg-scenes"]
    model = ARGenSeg.from_nothing(config, VQGAN.from_pretrained(small_scenes))
    prompt = ScenesPrompt(REPO / "assets" / "text.model", config.image_tokens)
    dataset = load_dataset("scenes-questions", "train")
    chosen = [next(dataset[i] for i in range(500) if dataset[i].messages[1] == words)
              for words in ("<mask>", "yes: <mask>.", "2.", "none.")]
    item = Dialogues(chosen, prompt, 128, 130, 4, 4, mask_size=128)
    item._index = lambda position: position
    item = item[0]
    batch = {"text_ids": item["text_ids"], "labels": item["labels"], "pixels": normalize(item["pictures"]),
             "mask_tokens": model.mask_tokenizer.encode(mask_pictures(item["masks"]))}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    for _ in range(60):
        model(**batch)[1].backward()
        optimizer.step()
        optimizer.zero_grad()
    segmenter, written = Segmenter(model.eval(), model.mask_tokenizer, prompt), []
    for talk in chosen:
        words, _ = segmenter.chat(talk.image, talk.messages[0])
        assert words == talk.messages[1]
        found, masks, _ = model.answer(segmenter.prepare(talk.image, [talk.messages[0]])[0],
                                       segmenter.pixels([talk.image]))
        written += masks
    assert (torch.cat(written) == batch["mask_tokens"]).float().mean() > 0.95


def test_conversations_are_refused_where_nothing_reads_them(quick, sample, tmp_path, capfdbinary):
    talks = f"jsonl:{FIXTURE / 'train.jsonl'}"
    for flags, line in ((["--data", talks], "has conversations"), (["--data", "scenes-questions"], "has conversations"),
                        (["--preset", "argenseg-8b", "--encoder", CHECKPOINT, "--data", talks], "with --val")):
        assert train.main(quick(tmp_path, *flags)) == 2
        error = capfdbinary.readouterr().err.decode()
        assert line in error and error.count("\n") == 1
    assert sample("sample.py", "--dataset", "scenes-questions", "--out", tmp_path).returncode == 2
    for flags in (["--lora-rank", "8"], ["--hide"], ["--background-weight", "0.5"], ["--encoder-steps", "3"]):
        with pytest.raises(SystemExit):
            train.parse_args(["--preset", "argenseg-scenes", *flags])


@pytest.mark.parametrize("change,line", [
    ({"mask": []}, "1 times <mask> in the answers beside 0 masks"),
    ({"mask": ["mask_0.png", "mask_0.png"]}, "beside 2 masks"), ({"mask": "mask_1.png"}, "a mask of size"),
    ({"conversations": []}, "expected human, gpt"),
    ({"conversations": [{"from": "human", "value": "x"}]}, "expected human, gpt"),
    ({"conversations": [{"from": "human", "value": "x"}, {"from": "gpt"}]}, "no 'value'"),
    ({"conversations": 3}, "line 1"), ({"mask": "no.png"}, "no.png"),
])
def test_a_broken_conversation_is_one_line(tmp_path, change, line):
    record = json.loads((FIXTURE / "train.jsonl").read_text().splitlines()[0])
    (tmp_path / "a.jsonl").write_text(json.dumps(record | change) + "\n")
    dataset = load_dataset(f"jsonl:{tmp_path / 'a.jsonl'}", "train", FIXTURE)
    with pytest.raises((ValueError, OSError), match=line) as error:
        dataset[0]
    assert "\n" not in str(error.value)


def test_each_task_has_its_official_instruction(prompt, segmenter, pictures, monkeypatch):
    asked = []
    monkeypatch.setattr(segmenter, "chat", lambda image, words, length: asked.append(words) or ("", []))
    segmenter.many(pictures[:1] * 3, [["the dog"]] * 3, tasks=["referring", "semantic", "reasoning"])
    assert asked == [SEGMENT, "Please segment the dog in this image.",
                     "Please perform instance segmentation following the instructions below: the dog."]


# --- text


def test_text_is_encoded_and_decoded_as_officially(prompt, io):
    for case in io["tokenizer_cases"]:
        assert prompt.encode("<s>" + case["text"]) == case["ids"]
        words = prompt.decode(case["ids"])
        assert clean_up(words.replace(MASK, "")) == clean_up(case["decoded_skip_special"])
    question = io["eval_prompt"]["question"]
    assert prompt.chat([question], 1)[0].tolist() == io["eval_prompt"]["ids"]


def test_special_tokens_are_out_of_a_users_hands(prompt, io):
    plain = {id for id in prompt.silent if id != prompt.model.unk_id()}
    pieces = [prompt.model.id_to_piece(id) for id in plain if id < prompt.model.vocab_size()]
    for name in [*prompt.special, *pieces, "<image>"]:
        words = f"what is {name}{name}, please? {name}"
        ids = prompt.encode("", words)
        assert not plain & set(ids) and prompt.model.decode(ids) == words
    assert prompt.chat(["a", "Sure, <mask>.", "b"], 1).equal(prompt.chat(["a", "Sure,.", "b"], 1))  # as officially
    empty = prompt.chat(["", "", ""], 2)[0].tolist()
    asked = prompt.chat(["<|im_end|>", f"{MASK}<|im_start|>", "<IMG_CONTEXT>"], 2)[0].tolist()
    assert [id for id in asked if id in plain] == [id for id in empty if id in plain]
    assert prompt.chat(["what is <image>\n?"], 1).eq(prompt.special["<IMG_CONTEXT>"]).sum() == 4
    assert prompt.too_long("dog " * 10_000) > 4096 and not prompt.too_long("dog")
    with pytest.raises(ValueError):
        prompt.encode("", "\ud800")


# --- conversations


def test_a_conversation_on_one_cache_equals_one_from_nothing(segmenter, pictures, seg, llm, io, capsys):
    words, masks = segmenter.chat(pictures[0], SEGMENT)
    assert len(masks) == words.count(MASK) == 2
    for mask, name in zip(masks, ("seg0", "seg1")):
        assert mask.dtype == bool and np.array_equal(mask, seg[f"{name}_mask"].numpy().astype(bool))
    asked = [SEGMENT, words, "What color is it?", "It is red.", SEGMENT]
    lengths, read = [], segmenter.model.read
    segmenter.model.read = lambda x, *more: (lengths.append(x.shape[1]), read(x, *more))[1]
    for count in (3, 5):
        lengths.clear()
        words, masks = segmenter.chat(pictures[0], asked[:count])
        assert lengths[0] < 60  # of a prompt of more than 170
        fresh = Segmenter.load(CHECKPOINT, "cpu").chat(pictures[0], asked[:count])
        assert words == fresh[0] and len(masks) == len(fresh[1]) and all(map(np.array_equal, masks, fresh[1]))
    first, second = io["chat"]["turn1"], io["chat"]["turn2"]
    assert segmenter.chat(pictures[0], first["question"]) == (first["response"], [])
    asked = [first["question"], first["response"], second["question"]]
    assert segmenter.chat(pictures[0], asked)[0] == second["response"]
    # another picture, and none
    assert segmenter.chat(pictures[1], SEGMENT)[0] == Segmenter.load(CHECKPOINT, "cpu").chat(pictures[1], SEGMENT)[0]
    capsys.readouterr()
    text = io["chat"]["text"]
    assert segmenter.chat(None, text["question"]) == (text["response"], []) and not capsys.readouterr().err
    assert text["response"].startswith(segmenter.chat(None, text["question"], length=7)[0])
    assert capsys.readouterr().err == "the answer is cut: it did not end within 7 tokens\n"


def test_tiles_and_guidance_of_the_front_door(segmenter, pictures, seg, io):
    segmenter.guidance = 4.0
    words, masks = segmenter.chat(pictures[0], SEGMENT, length=9)
    assert words.replace(MASK, "") == io["seg"]["cfg"]["response"][0]
    assert np.array_equal(masks[0], seg["cfg_mask"].numpy().astype(bool))
    segmenter.guidance, segmenter.tiles = 0.0, 4
    assert segmenter.chat(pictures[1], io["chat"]["tiles"]["question"], length=6)[0] == io["chat"]["tiles"]["response"]
    text_ids, pixels = segmenter.prepare(pictures[1], ["the dog", "a small brown dog"])
    assert pixels.shape == (5, 3, 56, 56) and (text_ids == segmenter.model.config.image_id).sum().tolist() == 40


def test_a_phrase_gets_the_first_mask_or_an_empty_one(segmenter, pictures, seg, monkeypatch):
    (mask,) = segmenter(pictures[0], "the dog")
    assert np.array_equal(mask, seg["seg0_mask"].numpy().astype(bool))
    masks = segmenter.many(pictures, [["the dog", "a cat"]] * 2, inside := {})
    assert [[m.shape for m in row] for row in masks] == [[(45, 61)] * 2, [(113, 115)] * 2]
    assert len(inside["answers"]) == 4 and np.array_equal(masks[0][0], mask)
    monkeypatch.setattr(segmenter.model.config, "start_id", -1)
    (mask,) = segmenter(pictures[0], ["the dog"])
    assert mask.shape == (45, 61) and not mask.any()


@pytest.mark.parametrize("messages,line", [
    ([], "0 messages"), (["a", "b"], "2 messages"), ("", "empty"), (" \n", "empty"), ("dog " * 9000, "limit is 4096"),
    (["a", "b", "\ud800"], "UTF-8"),
])
def test_what_is_no_conversation_is_one_clear_line(segmenter, pictures, messages, line):
    with pytest.raises(ValueError, match=line) as error:
        segmenter.chat(pictures[0], messages)
    assert "\n" not in str(error.value)


# --- files


def test_every_tensor_is_accounted_for(tmp_path):
    def without(name):
        return lambda tensors: tensors.pop(name)

    def put(name, shape):
        return lambda tensors: tensors.update({name: torch.ones(shape)})

    key = "language_model.model.layers.1.attention.wqkv.weight"
    for i, (change, line) in enumerate((
        (without("word_embed.bias"), "missing: word_embed.bias"), (without("lvl_embed.weight"), "missing: lvl_embed"),
        (without(key), "missing: llama.layers.1.self_attn.q_proj.weight"), (put("extra", 3), "left over: extra"),
        (put(key, (64, 64)), "expected the tensors of an ARGenSeg"),
        (put(key, (128, 63)), r"wrong shape: llama.layers.1.self_attn.q_proj.weight \(64, 63\)"),
        (put("mlp1.3.bias", 63), r"wrong shape: mlp1.3.bias \(63,\), expected \(64,\)"),
        (without("pos_1LC"), "missing: pos_1LC"), (put("pos_1LC", (1, 31, 64)), "wrong shape: pos_1LC"),
        (put("vision_model.encoder.layers.0.ls1", 31), "wrong shape: vision.layers.0.ls1"),
        (without("image_tokenizer.decoder.conv_in.bias"), "missing: decoder.conv_in.bias"),
        (put("image_tokenizer.extra", 3), "left over: extra"),
        (lambda tensors: tensors.update({"mlp1.3.bias": torch.full((64,), float("nan"))}), "not finite: mlp1.3.bias"),
        (lambda tensors: tensors.update({"mlp1.3.bias": torch.ones(64, dtype=torch.int64)}), "mlp1.3.bias holds"),
    )):
        folder = copy_checkpoint(tmp_path / str(i), change)
        with pytest.raises(ValueError, match=line) as error:
            ARGenSeg.from_pretrained(folder)
        assert "\n" not in str(error.value) and str(folder) in str(error.value)


def test_a_config_of_another_kind_is_refused(tmp_path):
    for i, (name, value) in enumerate((
        ("ps_version", "v1"), ("select_layer", -2), ("pad2square", True), ("template", "phi3"),
        ("vision_config.qk_normalization", True), ("vision_config.norm_type", "rms_norm"), ("llm_config.bias", True),
        ("llm_config.model_type", "qwen2"), ("llm_config.rope_scaling", {"type": "linear", "factor": 2.0}),
        ("force_image_size", 448), ("patch_nums", [1, 2, 3]), ("llm_config.hidden_size", "64"), ("patch_nums", None),
        ("downsample_ratio", 0.3), ("llm_config.vocab_size", 712),
        ("llm_config.num_key_value_heads", 3), ("vision_config.hidden_size", 33), ("patch_nums", "1234"),
    )):
        folder = copy_checkpoint(tmp_path / str(i), config={name: value})
        with pytest.raises(ValueError) as error:
            ARGenSeg.from_pretrained(folder)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_the_mask_tokenizer_comes_from_the_checkpoint_or_a_file(tmp_path, model, monkeypatch):
    prefix, vq = "image_tokenizer.", {}

    def take_out(tensors):
        vq.update({name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)})

    folder = copy_checkpoint(tmp_path / "bare", take_out)
    monkeypatch.setattr("mllm.WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="var-vq: no such file.*download var-vq"):
        ARGenSeg.from_pretrained(folder)
    torch.save(vq, tmp_path / "vae.pth")
    with pytest.raises(FileNotFoundError, match="none.pth: no such file"):
        ARGenSeg.from_pretrained(folder, tmp_path / "none.pth")
    given = ARGenSeg.from_pretrained(folder, tmp_path / "vae.pth", torch.bfloat16)
    shutil.copyfile(tmp_path / "vae.pth", folder / "vae_ch32.pth")
    beside = ARGenSeg.from_pretrained(folder)
    for other in (given, beside):
        assert isinstance(other.mask_tokenizer, MultiScaleVQ)
        for name, w in model.mask_tokenizer.state_dict().items():
            assert w.dtype == torch.float32 and torch.equal(w, other.mask_tokenizer.state_dict()[name])
    assert given.lm_head.weight.dtype == given.vision.layers[0].ls1.dtype == torch.bfloat16
    assert not any(p.requires_grad for p in given.parameters()) and not given.training
    os.unlink(folder / "tokenizer_config.json")
    with pytest.raises(FileNotFoundError, match="tokenizer_config.json"):
        ARGenSeg.from_pretrained(folder)


@torch.no_grad()
def test_a_config_without_scaling_or_with_other_sizes_loads(tmp_path, llm):
    folder = copy_checkpoint(tmp_path / "plain", config={"llm_config.rope_scaling": None})
    model = ARGenSeg.from_pretrained(folder)
    embeddings = model.token_embedding(llm["long_ids"])
    close(model.read(embeddings, ChatCache(model, 1)), model.llama(embeddings), 1e-5)


def test_bfloat16_answers_too(prompt, vision):
    model = ARGenSeg.from_pretrained(CHECKPOINT, dtype=torch.bfloat16)
    model.fuse()
    found, masks, _ = model.answer(prompt(["the dog"]), vision["pixel_values"][:1], 12)
    assert found.shape[1] <= 12 and all(codes.shape == (1, 30) for codes in masks)


# --- commands


def test_the_command_prints_words_and_writes_masks(sample, tmp_path, seg, io):
    flags = ["--checkpoint", CHECKPOINT, "--image", FIXTURE / "picture_0.png", "--out", tmp_path / "o"]
    done = sample("sample.py", *flags, "--chat", SEGMENT, "--chat", "What color is it?")
    assert done.returncode == 0, done.stderr
    first, *masks, second = done.stdout.decode().splitlines()
    assert first.startswith("picture_0: magees3ery<mask>") and len(masks) == 2 and second.startswith("picture_0: ")
    for i in (0, 1):
        stem = tmp_path / "o" / f"picture_0-0-given-the-following-instructions-the-dog-{i}"
        mask = np.asarray(Image.open(f"{stem}-mask.png")) > 0
        assert np.array_equal(mask, seg[f"seg{i}_mask"].numpy().astype(bool)) and str(stem) in masks[i]
    assert len(list((tmp_path / "o").iterdir())) == 4
    done = sample("sample.py", *flags, "--prompt", "the dog", "--tiles", 4, "--json", tmp_path / "m.json")
    assert done.returncode == 0 and b"the dog: 679 px" in done.stdout and b"sure" not in done.stdout
    assert json.loads((tmp_path / "m.json").read_text())[0]["answer"].count(MASK) == 2
    done = sample("sample.py", *flags, "--chat", SEGMENT, "--cfg")
    assert done.returncode == 0 and done.stdout.count(b"-overlay.png") == 1


def test_an_answer_without_a_mask_found_nothing(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(Segmenter, "chat", lambda *args: ("There is no dog.", []))
    done = sample("sample.py", "--checkpoint", CHECKPOINT, "--image", FIXTURE / "picture_0.png", "--prompt", "the dog",
                  "--out", tmp_path)
    assert done.returncode == 0 and b"the dog: nothing found (the answer: There is no dog.)" in done.stdout


def test_flags_that_are_of_other_checkpoints_are_refused(sample, tiny_checkpoint, tmp_path):
    picture = ["--image", FIXTURE / "picture_0.png", "--out", tmp_path / "o"]
    for checkpoint, flags, flag in (
        (CHECKPOINT, ["--prompt", "x", "--decode", "beam"], "{'decode': 'beam'}"),
        (CHECKPOINT, ["--bench"], "--bench measures a LlamaSeg"),
        (CHECKPOINT, ["--prompt", "x", "--draft", "none"], "{'draft': 'none'}"),
        (CHECKPOINT, ["--prompt", "x", "--confidence", "c.png"], "--confidence"),
        (CHECKPOINT, ["--prompt", "x", "--any-weights"], "--any-weights"),
        (tiny_checkpoint, ["--prompt", "x", "--tiles", "2"], "--tiles"),
        (tiny_checkpoint, ["--prompt", "x", "--cfg", "2"], "--cfg"),
        (CHECKPOINT, ["--chat", "x", "--tiles", "0"], "--tiles"),
    ):
        done = sample("sample.py", "--checkpoint", checkpoint, *([] if "--bench" in flags else picture), *flags)
        assert done.returncode == 2 and flag.encode() in done.stderr and b"Traceback" not in done.stderr
        assert done.stderr.count(b"\n") == 1


def test_the_bench_of_a_shape_needs_no_weights(sample, tmp_path):
    done = sample("sample.py", "--bench", "argenseg-scenes", "--device", "cpu", "--json", tmp_path / "b.json")
    assert done.returncode == 0, done.stderr
    rows = {row["step"]: row for row in json.loads((tmp_path / "b.json").read_text())["rows"]}
    assert [rows[step]["passes"] for step in ("prefill", "mask", "mask tokenizer", "words")] == [1, 6, None, 128]
    assert all(row["ms"] > 0 and row["per_s"] > 0 for row in rows.values()) and rows["words"]["floor_ms"] > 0
    assert sample("sample.py", "--bench", "argenseg-8b", "--checkpoint", CHECKPOINT).returncode == 2


def test_scores_name_what_is_not_usual(sample, tmp_path):
    done = sample("sample.py", "--checkpoint", CHECKPOINT, "--dataset", "scenes", "--count", 2, "--cfg", 2,
                  "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    (scores,) = [path for path in tmp_path.glob("*.json")]
    assert "cfg2-0" in scores.name and json.loads(scores.read_text())["cfg"] == 2.0
