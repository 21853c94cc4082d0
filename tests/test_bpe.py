"""BPETokenizer: official ids, a byte-exact round trip, a slow tokenizer written here, and what it refuses."""

import copy
import json
import random
from pathlib import Path

import pytest
import torch

from mllm import BPETokenizer

FOLDER = Path(__file__).parent / "fixtures" / "janus_bpe"
OFFICIAL = json.loads((FOLDER / "io.json").read_text())
FILE = json.loads((FOLDER / "tokenizer.json").read_text())
VOCAB = FILE["model"]["vocab"]
BYTES = [token for token in VOCAB if len(token) == 1]  # the characters that stand for bytes
BOS, PAD, BEGIN, END, IMAGE = (OFFICIAL["special_tokens"][name] for name in (
    "<｜begin▁of▁sentence｜>", "<｜▁pad▁｜>", "<begin_of_image>", "<end_of_image>", "<image_placeholder>"))  # fmt: skip


@pytest.fixture(scope="module")
def official():
    return BPETokenizer.from_json(FOLDER)


def added(name, id, **flags):
    token = {"id": id, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return token | {"special": False} | flags


def split(pattern):
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def build(merges, steps=(), tokens=(), vocab=None):
    """A tokenizer of the bytes, `merges` and nothing else but the given steps of the pre-tokenizer and added tokens."""
    content = copy.deepcopy(FILE)
    vocab = vocab or list(dict.fromkeys(BYTES + [left + right for left, right in merges]))
    content["model"] |= {"vocab": {token: id for id, token in enumerate(vocab)}, "merges": list(map(list, merges))}
    content["pre_tokenizer"]["pretokenizers"][:-1] = steps
    content["added_tokens"] = list(tokens)
    return BPETokenizer(content)


def pieces(tokenizer, text):
    return [tokenizer.decode([id]) for id in tokenizer.encode(text)]


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


def brute_force(text, merges, ids):
    """Byte-pair encoding as its paper has it: again and again the pair that is listed first, wherever it is."""
    symbols = [bytes([byte]) for byte in text.encode()]
    while True:
        pairs = {pair for pair in zip(symbols, symbols[1:]) if pair in merges}
        if not pairs:
            return [ids[symbol] for symbol in symbols]
        best, joined, i = min(pairs, key=merges.index), [], 0
        while i < len(symbols):
            if tuple(symbols[i : i + 2]) == best:
                joined.append(symbols[i] + symbols[i + 1])
                i += 2
            else:
                joined.append(symbols[i])
                i += 1
        if merges.index(best) > min((merges.index(p) for p in zip(joined, joined[1:]) if p in merges), default=9e9):
            return None  # a new pair comes before the one that made it: all at once and one by one may differ
        symbols = joined


def test_equals_brute_force_where_ids_are_not_ranks():
    # Random merges: several of one token, tokens that no text reaches, rows of one letter, ids in any order.
    rng, compared = random.Random(1), 0
    for _ in range(150):
        tokens, merges = list("abc"[: rng.randrange(1, 4)]), []
        letters = list(tokens)
        for _ in range(rng.randrange(1, 30)):
            pair = (rng.choice(tokens), rng.choice(tokens))
            if pair not in merges and len("".join(pair)) < 9:
                merges.append(pair)
                tokens += {"".join(pair)} - set(tokens)
        vocab = BYTES + [token for token in tokens if len(token) > 1] + ["never"]
        rng.shuffle(vocab)
        tokenizer = build(merges, vocab=vocab)
        encoded = [(left.encode(), right.encode()) for left, right in merges]
        ids = {token.encode(): id for id, token in enumerate(vocab) if token in tokens}
        for _ in range(10):
            text = "".join(rng.choice(letters) for _ in range(rng.choice([1, 4, 12, 40])))
            expected = brute_force(text, encoded, ids)
            compared += expected is not None
            assert expected is None or tokenizer.encode(text) == expected, (merges, text)
    assert compared > 1000


def test_merges_by_hand():
    # aab: (a, b) comes first. ab|c has no merge though "abc" is a token of a|bc, which ab pre-empts.
    tokenizer = build([("a", "b"), ("b", "c"), ("a", "bc"), ("a", "ab")])
    assert pieces(tokenizer, "aabc") == ["aab", "c"]
    assert pieces(tokenizer, "abcbc") == ["ab", "c", "bc"]
    assert pieces(build([("a", "a"), ("aa", "a")]), "aaaaaaa") == ["aa", "aa", "aaa"]  # leftmost first
    assert pieces(build([("a", "b"), ("b", "c"), ("a", "b")]), "abc") == ["a", "bc"]  # listed twice: the last counts
    newer, older = copy.deepcopy(FILE), copy.deepcopy(FILE)
    newer["model"]["merges"] = [merge.split(" ") for merge in older["model"]["merges"]]
    text = OFFICIAL["prompts"][0]["prompt"]
    assert BPETokenizer(newer).encode(text) == BPETokenizer(older).encode(text)


def test_a_long_piece_equals_its_merges_by_hand():
    tokenizer = build([("a", "a"), ("aa", "aa"), ("aaaa", "aaaa")])
    assert pieces(tokenizer, "a" * 80_007) == ["a" * 8] * 10_000 + ["aaaa", "aa", "a"]
    assert tokenizer.encode("é\n" * 20_000) == tokenizer.encode("é\n") * 20_000


def test_splits_one_after_the_other():
    joins = [("a", " "), ("a", "b"), (" ", "a"), ("1", "1"), ("a", "1"), ("\n", " ")]
    joins = [tuple(part.replace(" ", "Ġ").replace("\n", "Ċ") for part in pair) for pair in joins]
    assert pieces(build(joins), "a a11") == ["a ", "a", "11"]
    assert pieces(build(joins, [split(r"\s?[a-z]+")]), "a a11") == ["a", " a", "11"]
    # the second pattern sees only what the first has left, piece by piece: $ is the end of each of them
    assert pieces(build(joins, [split("a"), split(r"\s+$")]), "a a") == ["a", " ", "a"]
    assert pieces(build(joins, [split(r"\s+$")]), "a a") == ["a ", "a"]
    assert pieces(build([("a", "Ċ")], [split("a$")]), "a\na") == ["a", "\n", "a"]  # and of each line
    # Oniguruma's white space has U+0085 and U+3000, not U+001C to U+001F
    for space, count in (("\x85", 1), ("\u3000", 1), ("\x1c", 2), ("\x1f", 2)):
        tokenizer = build([], [split(r"\s?a")])
        assert len([x for x in tokenizer.splits[-1][0].split(f"{space}a") if x]) == count
    digits = {"type": "Digits", "individual_digits": True}
    assert pieces(build(joins, [digits]), "a11") == ["a", "1", "1"]
    assert pieces(build(joins, [digits | {"individual_digits": False}]), "a11") == ["a", "11"]


def test_added_tokens_come_first():
    at = len(BYTES)
    tokenizer = build([], tokens=[added("<a", at), added("<a>", at + 1), added("｜é", at + 2), added("a", 64)])
    assert tokenizer.encode("<a><ab ｜éa") == [at + 1, at, *tokenizer.encode("b "), at + 2, 64]  # the longest
    assert tokenizer.decode([at + 2, 64]) == "｜éa"  # é is é, not the byte 0xE9 that the vocabulary writes so
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
    assert tokenizer.encode("", "für <ü>") == tokenizer.encode("für <ü>")  # a letter is nobody's name


def test_in_words_the_name_of_an_added_token_is_text():
    at = len(BYTES) + 2
    tokenizer = build([("a", "b"), ("b", "c")], tokens=[added("<a>", at), added("<b>", at + 1, normalized=True)])
    letters = [id for c in "<a>" for id in tokenizer.encode(c)]
    assert tokenizer.encode("<a>", "<a>", "<a>") == [at, *letters, at]
    assert tokenizer.encode("", "<b>") == [tokenizer.encode(c)[0] for c in "<b>"]
    assert tokenizer.encode("<", "a>") == tokenizer.encode("<", "a>", "") == letters  # nor is one that begins in text
    assert tokenizer.encode("a", "b", "c") == tokenizer.encode("abc")  # merges go across
    assert tokenizer.encode() == tokenizer.encode("") == tokenizer.encode("", "", "") == []


def test_decode_of_what_is_no_text(official):
    ids = official.encode("😀")
    assert len(ids) > 1 and official.decode(ids[:-1]) == "\ufffd" and official.decode([]) == ""
    for id in (-1, 994):
        with pytest.raises(ValueError, match=f"text token {id} is none of 0 to 993"):
            official.decode([0, id])
    with pytest.raises(ValueError, match="surrogates"):
        official.encode("half \ud83d")


GONE = object()


def change(*keys, to):
    """A change of the file: the entry at `keys` becomes `to`, or goes."""

    def apply(content):
        for key in keys[:-1]:
            content = content[key]
        if to is GONE:
            del content[keys[-1]]
        else:
            content[keys[-1]] = to

    return apply


STEPS = ("pre_tokenizer", "pretokenizers")
REFUSED = {
    "another model": (change("model", to={"type": "Unigram", "vocab": []}), "its model's type is 'Unigram'"),
    "no model": (change("model", to=GONE), "KeyError.*model"),
    "dropout": (change("model", "dropout", to=0.1), "dropout is 0.1"),
    "byte fallback": (change("model", "byte_fallback", to=True), "byte_fallback is True"),
    "whole words": (change("model", "ignore_merges", to=True), "ignore_merges is True"),
    "prefix": (change("model", "continuing_subword_prefix", to="##"), "continuing_subword_prefix is '##'"),
    "suffix": (change("model", "end_of_word_suffix", to="</w>"), "end_of_word_suffix is '</w>'"),
    "model option": (change("model", "new", to=1), "its model's option 'new' is not known"),
    "part": (change("new", to=1), "its option 'new' is not known"),
    "truncation": (change("truncation", to={"max_length": 3}), "its truncation is {'max_length': 3}, supported: None"),
    "padding": (change("padding", to={"strategy": "BatchLongest"}), "its padding is"),
    "normalizer": (change("normalizer", to={"type": "NFC"}), "its normalizer is {'type': 'NFC'}, supported: None or"),
    "no decoder": (change("decoder", to=None), "its decoder's type is None, supported: 'ByteLevel'"),
    "decoder": (change("decoder", to={"type": "Metaspace", "replacement": "_"}), "its decoder's type is 'Metaspace'"),
    "id twice": (change("model", "vocab", "!", to=1), "980 ids of its vocabulary have gaps or come twice"),
    "gap": (change("model", "vocab", "new", to=2000), "have gaps"),
    "no byte": (lambda file: file["model"].update(vocab={"XX" if t == "X" else t: i for t, i in VOCAB.items()}),
                "no token for byte 0x58"),
    "merge of no token": (change("model", "merges", 3, to="q q"), "merge 3: 'qq' is not in its vocabulary"),
    "merge of three": (change("model", "merges", 3, to="q q q"), "merge 3 is .*, supported: two tokens"),
    "merge of no bytes": (lambda file: file["model"].update(vocab=VOCAB | {"｜": 980, "x｜": 981}, merges=["x ｜"]),
                          "merge 0: '｜' is not in its vocabulary, or not of its bytes"),
    "no merges": (change("model", "merges", to=GONE), "merges"),
    "lstrip": (change("added_tokens", 1, "lstrip", to=True), "'<｜end▁of▁sentence｜>': lstrip is True"),
    "rstrip": (change("added_tokens", 1, "rstrip", to=True), "rstrip is True, supported: False"),
    "single word": (change("added_tokens", 1, "single_word", to=True), "single_word is True"),
    "flag missing": (change("added_tokens", 1, "normalized", to=GONE), "normalized is None"),
    "new flag": (change("added_tokens", 1, "new", to=True), "option 'new' is not known"),
    "added id": (change("added_tokens", 13, "id", to=2000), "'<end_of_image>': id is 2000, supported: 993"),
    "added twice": (change("added_tokens", 13, to=added("<｜▁pad▁｜>", 993)), "'<｜▁pad▁｜>' is empty, comes twice"),
    "added nothing": (change("added_tokens", 13, to=added("", 993)), "'' is empty"),
    "added byte": (change("added_tokens", 13, to=added("ü", VOCAB["ü"])), "'ü' .* of other bytes"),
    "no pre-tokenizer": (change("pre_tokenizer", to=None), "its pre-tokenizer is 'None'"),
    "pre-tokenizer": (change("pre_tokenizer", to={"type": "Metaspace"}), "its pre-tokenizer is 'Metaspace'"),
    "step": (change(*STEPS, 2, to={"type": "Punctuation"}), "is 'Split Split Punctuation Split"),
    "order": (lambda file: file["pre_tokenizer"]["pretokenizers"].reverse(), "is 'ByteLevel Digits Split"),
    "no bytes": (lambda file: file["pre_tokenizer"]["pretokenizers"].pop(), "Digits', supported"),
    "prefix space": (change(*STEPS, -1, "add_prefix_space", to=True), "add_prefix_space is True, supported: False"),
    "GPT-2's regex": (change(*STEPS, -1, "use_regex", to=True), "ByteLevel's use_regex is True"),
    "use_regex missing": (change(*STEPS, -1, "use_regex", to=GONE), "ByteLevel's use_regex is None"),
    "behavior": (change(*STEPS, 0, "behavior", to="MergedWithNext"), "Split's behavior is 'MergedWithNext'"),
    "invert": (change(*STEPS, 0, "invert", to=True), "Split's invert is True"),
    "digits option": (change(*STEPS, 5, "new", to=1), "Digits' option 'new'"),
    "string": (change(*STEPS, 0, "pattern", to={"String": " "}), "Split's pattern is {'String': ' '}"),
    "empty match": (change(*STEPS, 0, to=split("a*")), r"'a\*' matches an empty piece"),
    "range": (change(*STEPS, 0, to=split("[z-a]")), "bad character range"),
}
for pattern in (r"\p{L}+", r"\d", r"\w", r"(?i:a)", "(a|b)", "a|b", "^a", "a$b", r"[\s]", "[[:alpha:]]", "[a&&b]",
                "a{2}", "a++", "a+?", ".", r"\\s", r"\b", "[]", "[a", "a]", "", r"\s+(?!\S)"):  # fmt: skip
    REFUSED[f"regex {pattern}"] = (change(*STEPS, 0, to=split(pattern)), "Split's pattern is .*supported: a Regex")


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_in_one_line_what_it_does_not_know(name, tmp_path):
    edit, message = REFUSED[name]
    content, path = copy.deepcopy(FILE), tmp_path / "tokenizer.json"
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        BPETokenizer.from_json(tmp_path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "{}", '"x"', "[" * 100_000, "\ud800"])
def test_refuses_what_is_no_tokenizer_at_all(content, tmp_path):
    path = tmp_path / "x.json"
    path.write_bytes(content.encode("utf-16", "surrogatepass"))
    with pytest.raises(ValueError, match="x.json: no byte-level BPE tokenizer.json") as caught:
        BPETokenizer.from_json(path)
    assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="y: no such text tokenizer"):
        BPETokenizer.from_json(tmp_path / "y")
    with pytest.raises(FileNotFoundError, match="tokenizer.json: no such"):
        BPETokenizer.from_json(tmp_path)
