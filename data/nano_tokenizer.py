"""Makes nano's tokenizer: a small byte-level BPE with DeepSeek's pre-tokenizer and all official special tokens.

python -m data.nano_tokenizer vl2/nano
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

WORDS = Path(__file__).parent / "nano_words.txt"
NUM_LEARNED = 1000  # entries before the tokens that the official processor adds; the embedding has 1024 rows

BOS, EOS, PAD = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>"
ADDED = ("<image>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", "<|User|>", "<|Assistant|>")

# How a turn or a line ends; the template puts "\\n\\n" after what the user says.
_LINE_ENDS = ("\n", "\n\n", ".\n", ".\n\n", "?\n\n", "。\n", "。\n\n", "？\n\n", ":\n")

# As published with DeepSeek-VL2: numbers by up to three digits, runs of Chinese or kana, then words and punctuation.
_SPLITS = (
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True, kw_only=True)
class WordGroup:
    """Words of the list that count equally: `times` by themselves and/or `times` after a space."""

    times: int
    alone: bool
    spaced: bool
    words: list[str]


def read_words(path: Path = WORDS) -> list[WordGroup]:
    """The groups of the word list, in its order."""
    groups: list[WordGroup] = []
    for line in path.read_text("utf-8").splitlines():
        if line.startswith("= "):
            times, *how = line[2:].split()
            groups.append(WordGroup(times=int(times), alone="alone" in how, spaced="spaced" in how, words=[]))
        elif line and not line.startswith("# "):
            groups[-1].words.extend(line.split())
    return groups


def make_tokenizer() -> Tokenizer:
    """Train the tokenizer; the result depends on nothing but the word list."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in _SPLITS]
        + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_LEARNED,
        special_tokens=[_special(token) for token in (BOS, EOS, PAD)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer=trainer)
    tokenizer.add_special_tokens([_special(token) for token in ADDED])
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, bos_id)]
    )
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json, as the official models have them."""
    tokenizer = make_tokenizer()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(_json(_with_text_merges(json.loads(tokenizer.to_str()))), "utf-8")
    specials = {tokenizer.token_to_id(token): _special_fields(token) for token in (BOS, EOS, PAD, *ADDED)}
    additional = [_special_fields(token) for token in ("<|User|>", "<|Assistant|>")]
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(index): {**fields, "special": True} for index, fields in specials.items()},
        "additional_special_tokens": [fields["content"] for fields in additional],
        "bos_token": BOS,
        "clean_up_tokenization_spaces": False,
        "eos_token": EOS,
        "legacy": True,
        "model_max_length": 4096,
        "pad_token": PAD,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizerFast",
        "unk_token": None,
        "use_default_system_prompt": False,
    }
    tokens = {key: _special_fields(token) for key, token in (("bos", BOS), ("eos", EOS), ("pad", PAD))}
    special_map = {
        "additional_special_tokens": additional,
        **{f"{key}_token": fields for key, fields in tokens.items()},
    }
    for name, content in (("tokenizer_config.json", config), ("special_tokens_map.json", special_map)):
        (folder / name).write_text(_json(content, sort_keys=True), "utf-8")


def _with_text_merges(document: dict) -> dict:
    """Merges as "a b": the tokenizers 0.15 that the official code asks for cannot read the pairs of today's library.

    No piece of a byte-level BPE holds a space: it stands as "Ġ" there.
    """
    model = document["model"]
    return {**document, "model": {**model, "merges": [" ".join(pair) for pair in model["merges"]]}}


def _json(document: dict, *, sort_keys: bool = False) -> str:
    return json.dumps(document, ensure_ascii=False, indent=2, sort_keys=sort_keys) + "\n"


def _corpus() -> Iterator[str]:
    """Words only, never digits or whole sentences: so digits stay apart, and "红色圆形" is "红色" and "圆形"."""
    yield from _LINE_ENDS * 400
    for group in read_words():
        for word in group.words:
            yield from [word] * (group.times * group.alone) + [f" {word}"] * (group.times * group.spaced)


def _special(token: str) -> AddedToken:
    return AddedToken(token, special=True, normalized=False)


def _special_fields(token: str) -> dict:
    return {"content": token, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    write_tokenizer(parser.parse_args().folder)
