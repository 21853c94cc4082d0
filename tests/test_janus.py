"""The MLLM route: Janus-Pro's parts against the official outputs, LoRA, prompts, and from train.py to sample.py."""

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPO
from PIL import Image
from safetensors.torch import load_file, save_file

import data
import train
from mllm import BEGIN, BOS, END, IMAGE, LORA_TARGETS, JanusPrompt, JanusSeg, LoRALinear
from tokenizer import VQGAN, VQGANConfig, decode_masks, mask_to_image

FIXTURE = REPO / "tests" / "fixtures" / "janus_pro"


@pytest.fixture(scope="module")
def io():
    return load_file(FIXTURE / "io.safetensors")


@pytest.fixture
def janus():
    model = JanusSeg.from_pretrained(FIXTURE)
    model.config.image_id, model.config.pad_id = 260, 258  # the fixture has no tokenizer.json
    return model


def lora_layers(model):
    return [layer for layer in model.modules() if isinstance(layer, LoRALinear)]


def close(a, b, tolerance):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=0)


# --- official outputs


@torch.no_grad()
def test_features_embeddings_and_logits_are_the_official_ones(janus, io):
    pixels = io["pixel_values"][:, 0]
    close(janus.vision.encode_image(pixels), io["vision_features"], 3e-5)
    close(janus.encode_image(pixels), io["vision_aligned"], 2e-5)
    close(janus.prefix(io["und_input_ids"], pixels)[1:], io["und_inputs_embeds_row1"], 2e-5)
    close(janus.prefix(io["gen_input_ids"], pixels[:1]), io["gen_prompt_embeds"], 2e-5)
    hidden = janus.llama(janus.prefix(io["und_input_ids"][:1], pixels[:1]))
    close(janus.lm_head(hidden)[:, -8:], io["und_logits_row0_last"], 2e-4)
    logits, loss = janus(io["gen_input_ids"], pixels[:1], io["tf_image_tokens"])
    close(logits, io["tf_logits"], 2e-4)
    close(loss, torch.nn.functional.cross_entropy(io["tf_logits"][0], io["tf_image_tokens"][0]), 2e-4)


@pytest.mark.parametrize("draft", ["none", "jacobi", "hidden"])
def test_greedy_mask_tokens_are_the_official_ones(janus, io, device, draft):
    janus.to(device)
    text_ids, pixels = io["gen_input_ids"].to(device), io["pixel_values"][:1, 0].to(device)
    tokens = janus.generate(text_ids, pixels, draft=draft)
    assert torch.equal(tokens.cpu(), io["greedy_image_tokens"])
    assert torch.equal(janus.generate_naive(text_ids, pixels), tokens)


def test_greedy_text_is_the_official_one_with_and_without_padding(janus, io):
    pixels = io["pixel_values"][:, 0]
    for row in (0, 1):  # row 1 has six paddings
        ids = io["und_input_ids"][row:row + 1]
        want = io["und_generated_ids"][row].tolist()
        assert janus.answer(ids, pixels[row:row + 1], 12) == want
        assert janus.answer(ids[:, 6 * row:], pixels[row:row + 1], 12) == want
        assert janus.answer(ids, pixels[row:row + 1], 12, stop={want[5]}) == want[:want.index(want[5])]


@torch.no_grad()
@pytest.mark.parametrize("decode", ["greedy", "beam", "top-k"])
def test_prompts_of_several_lengths_together_equal_each_alone(janus, io, decode):
    long = io["gen_input_ids"]
    short = torch.cat([torch.full((1, 4), 258), long[:, :1], long[:, 5:]], dim=1)
    pixels = io["pixel_values"][:, 0]
    together = janus.generate(torch.cat([long, short]), pixels, decode=decode)
    assert torch.equal(together[:1], janus.generate(long, pixels[:1], decode=decode))
    assert torch.equal(together[1:], janus.generate(short[:, 4:], pixels[1:], decode=decode))


def test_compiled_passes_know_the_padding(janus, io, one_graph):
    text_ids, pixels = io["gen_input_ids"].repeat(2, 1), io["pixel_values"][:2, 0]
    text_ids[0] = torch.cat([text_ids.new_full((4,), janus.config.pad_id), text_ids[0, :-4]])
    with one_graph():
        for _ in range(2):
            tokens = janus.generate(text_ids, pixels, draft="none", compiled=True)
            assert torch.equal(tokens, janus.generate(text_ids, pixels, draft="none"))
            text_ids = text_ids.roll(1, 0)


def test_preprocessing_is_the_official_one(io):
    image = Image.open(FIXTURE / "picture_1.png")
    assert np.array_equal(data.pad_picture(image, 64).transpose(2, 0, 1), io["preprocessed_1"].numpy())
    left, top, w, h = data.padded_box(*image.size, 64)
    mask = data.pad_mask(np.ones(image.size[::-1], bool), 64)
    assert mask[top:top + h, left:left + w].all() and mask.sum() == w * h and (w, h) == (14, 64)


@pytest.mark.parametrize("size", [(30, 90), (90, 30), (64, 64), (5, 200)])
def test_a_mask_goes_into_the_square_and_comes_back(size):
    mask = np.zeros(size[::-1], bool)
    mask[size[1] // 4: size[1] // 2, size[0] // 4: size[0] // 2] = True
    square = torch.from_numpy(data.pad_mask(mask, 256))

    class Echo:
        """A mask tokenizer whose tokens are the mask."""

        def decode(self, tokens):
            return mask_to_image(tokens)

    (back,) = decode_masks(Echo(), square[None], [mask.shape], [data.padded_box(*size, 256)])
    assert back.shape == mask.shape and (back & mask).sum() / (back | mask).sum() > 0.8


# --- files


def test_official_files_of_every_kind_load_the_same(janus, tmp_path):
    tensors = load_file(FIXTURE / "model.safetensors")
    for name in ("whole", "sharded"):
        folder = tmp_path / name
        folder.mkdir()
        shutil.copyfile(FIXTURE / "config.json", folder / "config.json")
        if name == "whole":
            torch.save(tensors, folder / "pytorch_model.bin")
        else:
            names = sorted(tensors)
            parts = {"a.bin": names[::2], "b.bin": names[1::2]}
            for file, inside in parts.items():
                torch.save({n: tensors[n] for n in inside}, folder / file)
            places = {n: file for file, inside in parts.items() for n in inside}
            (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))
        again = JanusSeg.from_pretrained(folder)
        assert all(torch.equal(w, again.state_dict()[n]) for n, w in janus.state_dict().items())
        assert again.frozen["mllm"]["sha256"] == janus.frozen["mllm"]["sha256"]


@pytest.mark.parametrize("change, message", [
    (lambda c, w: w.pop("aligner.layers.2.bias"), "missing: aligner.2.bias"),
    (lambda c, w: w.update(extra=torch.zeros(1)), "left over: extra"),
    (lambda c, w: c["aligner_config"]["params"].update(projector_type="identity"), "projector_type is 'identity'"),
    (lambda c, w: c["vision_config"]["params"].update(select_layer=-2), "select_layer is -2"),
    (lambda c, w: c.pop("gen_head_config"), "KeyError.*gen_head_config"),
    (lambda c, w: c.update(model_type="llama"), "model_type is 'llama'"),
    (lambda c, w: c["gen_head_config"].update(params=None), "config.json: .*AttributeError"),
    (lambda c, w: c.update(language_config=5), "config.json: .*AttributeError"),
    (lambda c, w: c["vision_config"]["params"].update(mlp_ratio=1e308), "OverflowError.*float infinity"),
    (lambda c, w: w.update({"gen_embed.weight": torch.full((96, 8), float("nan"))}), "not finite: gen_embed.weight"),
], ids=range(10))
def test_what_does_not_fit_is_named(tmp_path, change, message):
    content = json.loads((FIXTURE / "config.json").read_text())
    tensors = load_file(FIXTURE / "model.safetensors")
    change(content, tensors)
    (tmp_path / "config.json").write_text(json.dumps(content))
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        JanusSeg.from_pretrained(tmp_path)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.parametrize("id", ["x", None, -5, 10**30])
def test_odd_ids_of_special_tokens_end_in_one_line(tmp_path, id):
    shutil.copytree(FIXTURE, tmp_path, dirs_exist_ok=True)
    tokens = [{"content": "<image_placeholder>", "id": 4}, {"content": "<｜▁pad▁｜>", "id": id}]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
    with pytest.raises(ValueError, match="tokenizer.json: .*pad_id is"):
        JanusSeg.from_pretrained(tmp_path)


# --- LoRA


@torch.no_grad()
def test_lora_starts_as_nothing_and_merges_to_the_same(janus, io):
    ask = io["gen_input_ids"], io["pixel_values"][:1, 0], io["tf_image_tokens"]
    before = janus(*ask)[0]
    janus.add_lora(rank=4, alpha=8.0, targets=["q_proj", "v_proj", "down_proj"])
    assert torch.equal(janus(*ask)[0], before)
    assert len(lora_layers(janus)) == 6  # three in each of two layers
    for layer in lora_layers(janus):
        layer.lora_b.normal_(std=0.3)
    apart = janus(*ask)[0]
    assert (apart - before).abs().max() > 0.01
    for _ in range(2):  # a second time changes nothing
        janus.merge()
        close(janus(*ask)[0], apart, 1e-3)
    assert not lora_layers(janus)


@torch.no_grad()
@pytest.mark.parametrize("targets", [[name] for name in LORA_TARGETS] + [["k_proj", "up_proj", "o_proj"], LORA_TARGETS])
def test_fused_and_merged_in_any_order_the_outputs_are_the_same(janus, io, targets, tmp_path):
    ask = io["gen_input_ids"], io["pixel_values"][:1, 0], io["tf_image_tokens"]
    before = janus(*ask)[0]
    janus.add_lora(rank=4, alpha=8.0, targets=targets)
    for layer in lora_layers(janus):
        layer.lora_b.normal_(std=0.3)
    apart = janus(*ask)[0]
    assert (apart - before).abs().max() > 0.1
    with pytest.raises(ValueError, match="LoRA must be merged before the weights are fused"):
        janus.llama.fuse()
    for step in (janus.fuse, janus.merge, janus.fuse, janus.llama.fuse):
        step()
        close(janus(*ask)[0], apart, 1e-3)
    with pytest.raises(ValueError, match="merged weights .* not saved"):
        janus.save_pretrained(tmp_path / "lora.safetensors")


def test_lora_stays_in_float32_beside_weights_in_bfloat16(janus, tmp_path):
    janus.add_lora(rank=2)
    torch.nn.init.normal_(lora_layers(janus)[0].lora_b)
    janus.save_pretrained(tmp_path / "lora.safetensors")
    again = JanusSeg.from_pretrained(tmp_path / "lora.safetensors", FIXTURE, torch.bfloat16)
    assert again.lm_head.weight.dtype == torch.bfloat16
    for name, w in janus.trained_state().items():
        assert torch.equal(again.state_dict()[name], w) and w.dtype == again.state_dict()[name].dtype == torch.float32


def test_only_lora_receives_gradients(janus, io):
    janus.add_lora(rank=2)
    _, loss = janus(io["gen_input_ids"], io["pixel_values"][:1, 0], io["tf_image_tokens"])
    loss.backward()
    reached = {name for name, p in janus.named_parameters() if p.grad is not None}
    assert reached == {name for name, _ in janus.named_parameters() if name.endswith(("lora_a", "lora_b"))}
    assert len(reached) == 2 * 7 * 2 and set(janus.trained_state()) == reached


def test_a_compiled_training_step_is_one_graph_and_one_for_other_lengths(janus, io, one_graph):
    """Prompts are as long as the longest of their batch: the second graph is for any length."""
    janus.add_lora(rank=2)
    text_ids, pixels, tokens = io["gen_input_ids"], io["pixel_values"][:1, 0], io["tf_image_tokens"]
    with one_graph("eager", graphs=2):
        compiled = torch.compile(janus)
        for padding in (0, 0, 3, 5, 1, 3):
            asked = F.pad(text_ids, (padding, 0), value=janus.config.pad_id)
            loss = compiled(asked, pixels, tokens)[1]
            loss.backward()
            torch.testing.assert_close(loss, janus(asked, pixels, tokens)[1])


def test_a_lora_file_is_small_and_knows_its_base(janus, io, tmp_path):
    janus.add_lora(rank=2, alpha=3.0, targets=["o_proj"])
    with torch.no_grad():
        for layer in lora_layers(janus):
            layer.lora_b.normal_()
    janus.save_pretrained(tmp_path / "lora.safetensors")
    assert (tmp_path / "lora.safetensors").stat().st_size < 10_000
    again = JanusSeg.from_pretrained(tmp_path / "lora.safetensors", FIXTURE)
    again.config.image_id, again.config.pad_id = 260, 258
    with torch.no_grad():
        ask = io["gen_input_ids"], io["pixel_values"][:1, 0], io["tf_image_tokens"]
        assert torch.equal(again(*ask)[0], janus(*ask)[0])
    tensors = load_file(FIXTURE / "model.safetensors")
    tensors["gen_embed.weight"] = tensors["gen_embed.weight"] * 2
    other = tmp_path / "other"
    other.mkdir()
    save_file(tensors, other / "model.safetensors")
    shutil.copyfile(FIXTURE / "config.json", other / "config.json")
    with pytest.raises(ValueError, match="was trained with the mllm janus_pro"):
        JanusSeg.from_pretrained(tmp_path / "lora.safetensors", other)
    JanusSeg.from_pretrained(tmp_path / "lora.safetensors", other, any_weights=True)


@pytest.mark.parametrize("lora, frozen, message", [
    (None, {}, "must be a mapping"), (5, {}, "must be a mapping"), ({"rank": 10**9}, {}, "want an integer from 1 to"),
    ({"rank": 1.5}, {}, "LoRA rank 1.5"), ({"alpha": "x"}, {}, "not supported"), ({"alpha": math.inf}, {}, "alpha inf"),
    ({"targets": 5}, {}, "not iterable"), ({"targets": ["lm_head"]}, {}, "left over"), ({"new": 1}, {}, "new"),
    ({"rank": 3}, {}, "wrong shape"), ({}, None, "expected a header that names its Janus model"),
], ids=str)
def test_a_lora_file_that_does_not_fit_ends_in_one_line(janus, tmp_path, lora, frozen, message):
    janus.add_lora(rank=2)
    known = janus.config.lora
    janus.config.lora = known | lora if isinstance(lora, dict) else lora
    janus.frozen = {} if frozen is None else janus.frozen
    janus.save_pretrained(tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        JanusSeg.from_pretrained(tmp_path / "lora.safetensors", FIXTURE)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_dropout_is_for_training_alone():
    layer = LoRALinear(torch.nn.Linear(8, 8), 4, 4.0, 0.5)
    torch.nn.init.normal_(layer.lora_b)
    x = torch.randn(3, 8)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


# --- from train.py to sample.py


@pytest.fixture
def directory(tmp_path):
    """A Janus directory that can be trained: the fixture's parts, a text tokenizer with enough rows in the table, and
    a small image tokenizer."""
    folder = tmp_path / "janus-tiny"
    folder.mkdir()
    torch.manual_seed(0)
    tensors = {name: w.float() for name, w in load_file(FIXTURE / "model.safetensors").items()}
    shutil.copyfile(REPO / "tests" / "fixtures" / "janus_bpe" / "tokenizer.json", folder / "tokenizer.json")
    content = json.loads((FIXTURE / "config.json").read_text())
    vocab = JanusPrompt(folder, 16).bpe.vocab_size + 3
    content["language_config"]["vocab_size"] = vocab
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        tensors[name] = torch.randn(vocab, 48) * tensors[name].std()
    vqgan = VQGAN(VQGANConfig(channels=32, channel_mult=(1, 1, 1, 1, 1), res_blocks=1, latent_channels=32,
                              codebook_size=96))
    tensors |= {f"gen_vision_model.{name}": w for name, w in vqgan.state_dict().items()}
    save_file({name: w.contiguous() for name, w in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def losses(out):
    records = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return {r["step"]: r["loss"] for r in records if "loss" in r}


def test_train_resume_sample_chat_and_merge(directory, sample, tmp_path):
    flags = ["--preset", "llamaseg-janus", "--encoder", str(directory), "--batch-size", "16", "--lr", "3e-3",
             "--phrases", "2", "--max-steps", "18", "--warmup-steps", "2", "--eval-every", "18", "--eval-count", "2",
             "--save-every", "12", "--device", "cpu", "--dtype", "float32", "--lora-rank", "8"]
    whole = tmp_path / "whole"
    assert train.main([*flags, "--out-dir", str(whole)]) == 0
    found = losses(whole)
    assert sum(found[s] for s in range(14, 19)) / 5 < 0.85 * found[1]
    older = train.saved_steps(whole)[1]
    broken = tmp_path / "broken"
    broken.mkdir()
    shutil.copyfile(older, broken / older.name)
    assert train.main([*flags, "--out-dir", str(broken), "--resume", "auto", "--activation-checkpointing"]) == 0
    assert all(losses(broken)[s] == pytest.approx(found[s], abs=1e-5) for s in range(13, 19))

    picture = REPO / "assets" / "example.png"
    ask = ["--image", picture, "--prompt", "the ring", "--prompt", "all that is not red", "--out", tmp_path / "m"]
    done = sample("sample.py", "--checkpoint", whole, "--encoder", directory, *ask)
    assert done.returncode == 0, done.stderr
    masks = [Image.open(path) for path in sorted((tmp_path / "m").glob("*-mask.png"))]
    assert len(masks) == 2 and masks[0].size == Image.open(picture).size
    done = sample("sample.py", "--checkpoint", whole, *ask)
    assert done.returncode == 1 and b"janus-tiny" in done.stderr and b"Traceback" not in done.stderr
    done = sample("sample.py", "--checkpoint", whole, "--encoder", directory, "--dataset", "scenes", "--count", "3",
                  "--out", tmp_path / "s")
    assert done.returncode == 0, done.stderr

    assert train.main(["--merge", str(whole), "--encoder", str(directory)]) == 0
    merged = JanusSeg.from_pretrained(whole / "merged")
    apart = JanusSeg.from_pretrained(whole / "model.safetensors", directory)
    apart.merge()
    for name, w in merged.llama.state_dict().items():
        close(w, apart.llama.state_dict()[name], 0.02)  # in bfloat16
    done = sample("sample.py", "--checkpoint", whole / "merged", "--image", picture, "--chat", "What is it?")
    assert done.returncode == 0 and b"example: " in done.stdout
    done = sample("sample.py", "--image", picture, "--chat", "What is it?")
    assert done.returncode == 1 and b"Janus checkpoint" in done.stderr


def test_prompts_keep_special_tokens_out_of_a_users_hands(directory):
    prompt = JanusPrompt(directory, 16)
    names = list(prompt.bpe.special_tokens)
    hostile = [*names, "<image_pla<end_of_image>ceholder>", "<image_placeholder", "".join(names), "<|Us<|User|>er|>",
               *(a[:5] + b + a[5:] for a, b in zip(names, reversed(names))), "＜image_placeholder＞",
               "\0<|User|>\ufeff", "<|User|>" * 1000]
    for words in hostile:
        ids, chat = prompt([f"the {words} cat"])[0].tolist(), prompt.chat(f"Where {words}?")[0].tolist()
        for found, asked in ((ids, prompt(["cat"])), (chat, prompt.chat("Where?"))):
            special = [[id for id in some if id in prompt.bpe.special_tokens.values()] for some in (found, asked[0])]
            assert special[0] == special[1]
            assert words in prompt.bpe.decode(found)  # and nothing of it was taken away
    ids = prompt(["the cat <image_placeholder><|User|>", "cat"])
    assert ids[1, 0] == prompt.pad and prompt.bpe.decode(ids[0, :1].tolist()) == BOS
    assert prompt.too_long("<|User|>" * 100) == len(prompt.bpe.encode("", "<|User|>" * 100)) > 256
    for ask in (prompt.chat, prompt.too_long, lambda text: prompt([text])):
        with pytest.raises(ValueError, match="surrogates"):
            ask("half \ud83d")


def test_a_prompt_in_parts_has_the_ids_of_the_whole(directory):
    prompt, draw = JanusPrompt(directory, 16), random.Random(0)
    parts = list("ab .,:!?<>|\n\t09é日😀ü\u3000") + ["the ", " cat", "\n\n", "  ", "image_", "User|>", "<|"]
    for _ in range(2000):
        words = "".join(draw.choices(parts, k=draw.randrange(12)))
        template = ("<|User|>: ", words, "<image_placeholder>\n\n<|Assistant|>:", words[::-1], words, " \n")
        if not any(name in "".join(template[i] for i in (1, 3, 4)) for name in prompt.bpe.special_tokens):
            assert prompt.bpe.encode(*template) == prompt.bpe.encode("".join(template)), template
        plain = "".join(words.split("<|"))
        whole = f"{BOS}<|User|>: {plain.strip()}{BEGIN}{IMAGE}{END}\n\n<|Assistant|>:{BEGIN}"
        assert prompt.ids(whole).equal(prompt([plain]))


def test_print_config_of_janus(capsys):
    assert train.main(["--preset", "llamaseg-janus", "--print-config", "--micro-batch-size", "1"]) == 0
    text = capsys.readouterr().out
    counts = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line.startswith("  ")}
    assert counts["gen_head"][0] == "0" and int(counts["llama"][0].replace(",", "")) == 24 * 16 * (
        4 * (2048 + 2048) + 3 * (2048 + 5632))
    assert "width=2048, layers=24" in text


