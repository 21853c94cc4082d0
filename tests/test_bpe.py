"""BPETokenizer: official ids, a plain merge loop written here, texts that come back, and what is refused."""

import copy
import json
import random
from collections import Counter
from pathlib import Path

import pytest
import torch

from mllm import BPETokenizer

FOLDER = Path(__file__).parent / "fixtures" / "janus_bpe"
OFFICIAL = json.loads((FOLDER / "io.json").read_text())
FILE = json.loads((FOLDER / "tokenizer.json").read_text())
BYTES = [token for token in FILE["model"]["vocab"] if len(token) == 1]  # the characters that stand for bytes
BOS, PAD, BEGIN, END, IMAGE = (OFFICIAL["special_tokens"][name] for name in (
    "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>", "<end_of_image>", "<image_placeholder>"))


@pytest.fixture(scope="module")
def official():
    return BPETokenizer.from_json(FOLDER)


def added(name, id, normalized=False):
    return {"id": id, "content": name, "normalized": normalized, "special": False,
            "single_word": False, "lstrip": False, "rstrip": False}


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def build(merges, steps=(), tokens=(), vocab=None):
    """A tokenizer of the bytes and `merges` with the given steps of the pre-tokenizer and added tokens."""
    content = copy.deepcopy(FILE)
    vocab = vocab or BYTES + [left + right for left, right in merges]
    content["model"] |= {"vocab": {token: id for id, token in enumerate(vocab)}, "merges": list(map(list, merges))}
    content["pre_tokenizer"]["pretokenizers"][:-1] = steps
    content["added_tokens"] = list(tokens)
    return BPETokenizer(content)


def pieces(tokenizer, text):
    return [tokenizer.decode([id]) for id in tokenizer.encode(text)]


# --- official ids


def test_official_ids_of_all_texts(official):
    assert len(OFFICIAL["cases"]) == 60
    for case in OFFICIAL["cases"]:
        assert official.encode(case["text"]) == case["ids"], case["text"]
        assert [BOS, *official.encode(case["text"])] == case["ids_with_bos"]
        assert official.decode(case["ids"]) == case["text"]


def test_official_ids_of_all_chat_prompts(official):
    assert len(OFFICIAL["prompts"]) == 4
    for prompt in OFFICIAL["prompts"]:
        ids = [BOS]
        for id in official.encode(prompt["prompt"]):
            ids += [BEGIN, *[IMAGE] * prompt.get("num_image_tokens", 0), END] if id == IMAGE else [id]
        assert ids == prompt["input_ids"]
        if "uncond_input_ids" in prompt:
            assert [BOS, *[PAD] * (len(ids) - 2), BEGIN] == prompt["uncond_input_ids"]


def test_names_and_sizes(official):
    assert official.special_tokens == OFFICIAL["special_tokens"]
    assert official.vocab_size == 994
    for name, id in official.special_tokens.items():
        assert official.encode(name) == [id] and official.decode([id]) == name


def test_merges_that_are_written_as_pairs(official):
    content = copy.deepcopy(FILE)
    content["model"]["merges"] = [merge.split(" ") for merge in FILE["model"]["merges"]]
    text = OFFICIAL["prompts"][0]["prompt"]
    assert BPETokenizer(content).encode(text) == official.encode(text)


# --- tiktoken's ranks and the file's merges


def merge(text, ranks):
    """The plain merge loop: join the neighbours that are listed first, leftmost first, until none is listed."""
    tokens = list(text)
    while found := [(ranks[pair], i) for i, pair in enumerate(zip(tokens, tokens[1:])) if pair in ranks]:
        _, i = min(found)
        tokens[i:i + 2] = [tokens[i] + tokens[i + 1]]
    return tokens


def learn(text, count):
    """Merges that are learned from a text: again and again the pair that comes most often."""
    ranks, tokens = {}, list(text)
    while len(ranks) < count and len(tokens) > 1:
        pair = Counter(zip(tokens, tokens[1:])).most_common(1)[0][0]
        ranks[pair], tokens = len(ranks), merge(tokens, {pair: 0})
    return ranks


def test_20000_strings_equal_the_plain_merge_loop():
    # tiktoken joins all neighbours that together are a token, the file lists which: the same for learned merges. Half
    # of the strings have the official merges, half those of rows of a few letters, where most pairs overlap.
    rng = random.Random(0)
    files = [{tuple(pair.split(" ")): rank for rank, pair in enumerate(FILE["model"]["merges"])}]
    for _ in range(50):
        files.append(learn("".join(rng.choices("abc"[: rng.randrange(1, 4)], k=40)), rng.randrange(1, 20)))
    for ranks in files:
        made = [left + right for left, right in ranks]
        assert all(merge(token, ranks) == [token] for token in made)
        vocab = BYTES + made + ["never"]
        rng.shuffle(vocab)  # ids are not ranks
        tokenizer, ids = build(ranks, vocab=vocab), {token: id for id, token in enumerate(vocab)}
        letters = sorted({c for token in made for c in token if c.isascii()})
        parts = letters + [token for token in made if token.isascii() and len(token) < 5]
        for _ in range(10_000 if ranks is files[0] else 200):
            text = "".join(rng.choices(parts, k=rng.randrange(1, 9)))
            assert tokenizer.encode(text) == [ids[token] for token in merge(text, ranks)], (ranks, text)


def test_merges_by_hand():
    tokenizer = build([("a", "b"), ("b", "c"), ("a", "ab")])  # (a, b) comes first
    assert pieces(tokenizer, "aabc") == ["aab", "c"]
    assert pieces(tokenizer, "abcbc") == ["ab", "c", "bc"]
    tokenizer = build([("a", "a"), ("aa", "aa"), ("aaaa", "aaaa")])
    assert pieces(tokenizer, "a" * 80_007) == ["a" * 8] * 10_000 + ["aaaa", "aa", "a"]  # leftmost first
    assert tokenizer.encode("é\n" * 20_000) == tokenizer.encode("é\n") * 20_000


# --- texts in, texts out


def random_text(rng, words):
    """Words of the vocabulary, special names and parts of them, white space of all kinds, any code point."""
    kinds = (
        lambda: rng.choice(words),
        lambda: rng.choice(list(OFFICIAL["special_tokens"]))[: rng.randrange(2, 40)],
        lambda: rng.choice(" \t\n\r\v\f\x1c\x1f\x85\xa0\u2003\u2028\u3000\u200b\ufeff\0") * rng.randrange(1, 4),
        lambda: rng.choice("0²Ⅷ१zZ!~،一龥龦ࠀ가\ud7ff\U00010400é😀ü"),
        lambda: chr(rng.choice([rng.randrange(0xD800), rng.randrange(0xE000, 0x110000)])),
        lambda: bytes(rng.randrange(256) for _ in range(4)).decode("utf-8", "ignore"),
    )
    return "".join(rng.choice(kinds)() for _ in range(rng.randrange(1, 20)))


def test_every_text_comes_back_byte_for_byte(official):
    rng = random.Random(0)
    words = [official.decode([id]) for id in range(official.vocab_size)]
    for _ in range(3000):
        text = random_text(rng, words)
        ids = official.encode(text)
        assert official.decode(ids) == text and official.decode(torch.tensor(ids)) == text


def test_decode_of_what_is_no_text(official):
    ids = official.encode("😀")
    assert len(ids) > 1 and official.decode(ids[:-1]) == "\ufffd" and official.decode([]) == ""
    with pytest.raises(ValueError, match="surrogates"):
        official.encode("half \ud83d")


def test_splits_one_after_the_other():
    joins = [("a", " "), ("a", "b"), (" ", "a"), ("1", "1"), ("a", "1"), ("\n", " ")]
    joins = [tuple(part.replace(" ", "Ġ").replace("\n", "Ċ") for part in pair) for pair in joins]
    assert pieces(build(joins), "a a11") == ["a ", "a", "11"]
    assert pieces(build(joins, [split(r"\s?[a-z]+")]), "a a11") == ["a", " a", "11"]
    # the second pattern sees only what the first has left, piece by piece: $ is the end of each of them
    assert pieces(build(joins, [split("a"), split(r"\s+$")]), "a a") == ["a", " ", "a"]
    assert pieces(build(joins, [split(r"\s+$")]), "a a") == ["a ", "a"]
    assert pieces(build([("a", "Ċ")], [split("a$")]), "a\na") == ["a", "\n", "a"]  # and of each line
    assert pieces(build(joins, [split(r"[\-\[ ]")]), "a -[a1") == ["a", " ", "-", "[", "a1"]
    # Oniguruma's white space has U+0085, which is the bytes C2 85, but not U+001C
    assert [len(build([("a", "Â"), ("a", "Ĝ")], [split(r"\s")]).encode(f"a{c}")) for c in "\x85\x1c"] == [3, 1]
    digits = {"type": "Digits", "individual_digits": True}
    assert pieces(build(joins, [digits]), "a11") == ["a", "1", "1"]
    assert pieces(build(joins, [digits | {"individual_digits": False}]), "a11") == ["a", "11"]


# --- added tokens


def test_added_tokens_come_first():
    at = len(BYTES)
    tokenizer = build([], tokens=[added("<a", at), added("<a>", at + 1), added("｜é", at + 2), added("a", 64)])
    assert tokenizer.encode("<a><ab ｜éa") == [at + 1, at, *tokenizer.encode("b "), at + 2, 64]  # the longest
    assert tokenizer.decode([at + 2, 64]) == "｜éa"  # the text é, not the byte 0xE9, which the vocabulary writes as é
    assert build([], [split("b")], [added("!", 0)]).encode("!a!") == [0, 64, 0]
    # those that are `normalized` only see what the others leave
    tokenizer = build([], tokens=[added("<a>", at, normalized=True), added(">b", at + 1)])
    assert tokenizer.encode("<a>b") == [*tokenizer.encode("<a"), at + 1]
    assert tokenizer.encode("<a><a>") == [at, at]
    tokenizer = build([], tokens=[added("<a>", at, normalized=True), added("a", 64)])
    assert at not in tokenizer.encode("<a>")


def test_bytes_that_no_text_has_need_no_token():
    # DeepSeek's vocabularies lack them, and have their 13 characters as added tokens
    never = [chr(byte) for byte in (0xC0, 0xC1, *range(0xF5, 0x100))]
    vocab = [token for token in BYTES if token not in never]
    tokenizer = build([], tokens=[added(c, len(vocab) + i, normalized=True) for i, c in enumerate(never)], vocab=vocab)
    text = "für Àÿ\U0010ffff" + "".join(map(chr, range(0x250)))
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("ü") == [tokenizer.special_tokens["ü"]] and tokenizer.vocab_size == 256
    assert tokenizer.encode("", "für <ü>") == tokenizer.encode("für <ü>")  # one letter cannot be a role


def test_in_words_the_name_of_an_added_token_is_text():
    at = len(BYTES) + 2
    tokenizer = build([("a", "b"), ("b", "c")], tokens=[added("<a>", at), added("<b>", at + 1, normalized=True)])
    letters = [id for c in "<a>" for id in tokenizer.encode(c)]
    assert tokenizer.encode("<a>", "<a>", "<a>") == [at, *letters, at]
    assert tokenizer.encode("", "<b>") == [tokenizer.encode(c)[0] for c in "<b>"]
    assert tokenizer.encode("<", "a>") == tokenizer.encode("<", "a>", "") == letters  # split or not
    assert tokenizer.encode("a", "b", "c") == tokenizer.encode("abc")  # merges go across
    assert tokenizer.encode() == tokenizer.encode("") == tokenizer.encode("", "", "") == []


# --- what is refused: it would give other ids than Hugging Face, or is damaged


def edit(content, *keys, to):
    """A copy of the parsed file in which the entry at `keys` is `to`, or is gone for None."""
    content = part = copy.deepcopy(content)
    for key in keys[:-1]:
        part = part[key]
    if to is None:
        del part[keys[-1]]
    else:
        part[keys[-1]] = to
    return content


STEPS = ("pre_tokenizer", "pretokenizers")
REFUSED = [
    (("model",), None, "KeyError.*model"), (("model", "merges"), None, "KeyError.*merges"),
    (("model",), {"type": "Unigram"}, "its steps are Unigram Split"), (("model", "dropout"), 0.1, r"\['dropout'\]"),
    (("model", "end_of_word_suffix"), "</w>", r"\['end_of_word_suffix'\]"),
    (("normalizer",), {"type": "NFC"}, "its steps are NFC BPE"),
    (("normalizer", "normalizers"), [{"type": "Lowercase"}], "its steps are Lowercase BPE"),
    (("model", "vocab", "!"), 1, "980 ids of its vocabulary have gaps or come twice"),
    (("model", "vocab", "new"), 2000, "have gaps"),
    (("model", "vocab"), {"XX" if t == "X" else t: i for t, i in FILE["model"]["vocab"].items()}, "KeyError.*X"),
    (("model", "merges", 3), "q qq", "'q qq' does not make a new token of two earlier ones"),
    (("model", "merges", 3), FILE["model"]["merges"][-1], "does not make a new token"),
    (("model", "merges", 3), FILE["model"]["merges"][2], "does not make a new token"),
    (("model", "merges", 3), "q q q", "too many values"), (("model", "merges", -1), "q q", "KeyError.*qq"),
    (("added_tokens", 1, "lstrip"), True, r"\['lstrip'\]"), (("added_tokens", 1, "rstrip"), True, r"\['rstrip'\]"),
    (("added_tokens", 1, "single_word"), True, r"\['single_word'\]"),
    (("added_tokens", 1, "normalized"), None, "KeyError.*normalized"),
    (("added_tokens", 13, "id"), 2000, "'<end_of_image>' has the id 2000 of something else"),
    (("added_tokens", 13), added("<｜▁pad▁｜>", 993), "'<｜▁pad▁｜>' has the id 993"),
    (("added_tokens", 13), added("", 993), "'' has the id 993"),
    (("added_tokens", 13), added("ü", FILE["model"]["vocab"]["ü"]), "'ü' has the id"),
    (("pre_tokenizer",), {"type": "Metaspace"}, "KeyError.*pretokenizers"),
    ((*STEPS, 2), {"type": "Punctuation"}, "BPE Split Split Punctuation Split"),
    (STEPS, FILE["pre_tokenizer"]["pretokenizers"][::-1], "BPE ByteLevel Digits Split"),
    ((*STEPS, -1), None, "Digits with"), ((*STEPS, -1, "add_prefix_space"), True, r"\['add_prefix_space'\]"),
    ((*STEPS, -1, "use_regex"), True, "ByteLevel with"), ((*STEPS, -1, "use_regex"), None, "KeyError"),
    ((*STEPS, 0, "behavior"), "MergedWithNext", "'MergedWithNext'.* is not supported"),
    ((*STEPS, 0, "invert"), True, r"\['invert'\]"), ((*STEPS, 0, "pattern"), {"String": " "}, "KeyError.*Regex"),
    ((*STEPS, 0), split("[z-a]"), "bad character range"),
    # Python's `re` would read these in another way than Oniguruma, or they match nothing
    *(((*STEPS, 0), split(pattern), "its step .* is not supported") for pattern in (
        r"\p{L}+", r"\w", r"(?i:a)", "(a|b)", "^a", "a$b", r"[\s]", "[[:alpha:]]", "[a&&b]", "a{2}", "a++", ".",
        r"\b", "[a", "", "a*", r"\s+(?!\S)")),
]


@pytest.mark.parametrize("keys, to, message", REFUSED, ids=range(len(REFUSED)))
def test_refuses_in_one_line_what_would_give_other_ids(keys, to, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(edit(FILE, *keys, to=to)))
    with pytest.raises(ValueError, match=message) as caught:
        BPETokenizer.from_json(tmp_path)
    assert str(caught.value).startswith(f"{path}: expected a byte-level BPE") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '"x"', "[" * 100_000, "\ud800"])
def test_refuses_what_is_no_tokenizer_at_all(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content.encode("utf-16", "surrogatepass"))
    with pytest.raises(ValueError, match="x.json: expected a byte-level BPE tokenizer.json") as caught:
        BPETokenizer.from_json(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="tokenizer.json"):
        BPETokenizer.from_json(tmp_path)
