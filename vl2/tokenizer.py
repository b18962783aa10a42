"""DeepSeek-VL2's tokenizer: the published tokenizer.json plus the special tokens that the official processor adds.

Built on the `tokenizers` library alone. It encodes text and knows the ids; the chat template is vl2/prompt.py's.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import reprlib
from collections.abc import Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any

import tokenizers

from vl2.errors import UserError
from vl2.json_object import read_json_object

BOS_TOKEN = "<｜begin▁of▁sentence｜>"
EOS_TOKEN = "<｜end▁of▁sentence｜>"
PAD_TOKEN = "<｜▁pad▁｜>"
IMAGE_TOKEN = "<image>"
GROUNDING_TOKENS = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>")
USER_TOKEN = "<|User|>"
ASSISTANT_TOKEN = "<|Assistant|>"

_PLAIN_FLAGS = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
_GROUNDING_SPLIT = re.compile("(" + "|".join(map(re.escape, GROUNDING_TOKENS)) + ")")


class Tokenizer:
    """Text to ids and back.

    Attributes:
        bos_id, eos_id, image_id, user_id, assistant_id: ids of the tokens the template places.
        special_ids: every token that is matched as a whole instead of being built from pieces, with its id.
        fingerprint: sha256 hex of everything that decides an id.
    """

    def __init__(self, tokenizer_json: str, config: dict[str, Any] | None = None, source: str = "tokenizer.json"):
        """Build from the text of a tokenizer.json and the dictionary of a tokenizer_config.json.

        Args:
            tokenizer_json: contents of tokenizer.json.
            config: contents of tokenizer_config.json; names the BOS, EOS and padding tokens.
            source: where they come from, for errors.

        Raises:
            UserError: if the JSON is no tokenizer, or it has no BOS or EOS.
        """
        config = config or {}
        try:
            self._as_read: dict[str, Any] = json.loads(tokenizer_json)
            self._matching = tokenizers.Tokenizer.from_str(tokenizer_json)
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # the library raises a bare Exception, and where it panics not even that
            raise UserError(f"{source}: expected a tokenizer of the `tokenizers` library, found: {error}") from error
        # Neither kind of text may be cut or filled by settings that somebody left in the file.
        self._matching.no_truncation()
        self._matching.no_padding()

        self._bos, self._eos, self._pad = (
            _token_name(config, key, default, source)
            for key, default in (("bos_token", BOS_TOKEN), ("eos_token", EOS_TOKEN), ("pad_token", PAD_TOKEN))
        )
        for key, token in (("bos_token", self._bos), ("eos_token", self._eos)):
            if self._matching.token_to_id(token) is None:
                raise UserError(
                    f"{source}: expected the {key} {token!r} in the vocabulary, found none; "
                    "tokenizer.json and tokenizer_config.json must belong together"
                )
        self._add_missing_tokens()

        # A second tokenizer that knows no special token: what it encodes is plain text whatever it looks like.
        # (`encode_special_tokens=True` would still match added tokens that are not flagged as special.)
        plain = copy.copy(self._as_read)
        plain.update(added_tokens=[], post_processor=None, truncation=None, padding=None)
        self._plain = tokenizers.Tokenizer.from_str(json.dumps(plain))

        self.special_ids: dict[str, int] = {
            token.content: index for index, token in sorted(self._matching.get_added_tokens_decoder().items())
        }
        self.bos_id = self._id_of(self._bos)
        self.eos_id = self._id_of(self._eos)
        self.image_id = self._id_of(IMAGE_TOKEN)
        self.user_id = self._id_of(USER_TOKEN)
        self.assistant_id = self._id_of(ASSISTANT_TOKEN)

    @classmethod
    def from_folder(cls, folder: str | PathLike[str]) -> Tokenizer:
        """Read tokenizer.json and tokenizer_config.json of a model folder.

        Raises:
            UserError: if tokenizer.json is missing, or one of the two is broken.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{folder}: expected a tokenizer.json, found none; is this a DeepSeek-VL2 model folder?")
        config = path.with_name("tokenizer_config.json")
        return cls(_read_text(path), read_json_object(config) if config.is_file() else {}, source=str(path))

    def __len__(self) -> int:
        """Number of entries, added tokens included."""
        return self._matching.get_vocab_size(with_added_tokens=True)

    @cached_property
    def num_rows(self) -> int:
        """Rows that an embedding must have at least: one more than the highest id."""
        return 1 + max(self._matching.get_vocab(with_added_tokens=True).values())

    @cached_property
    def fingerprint(self) -> str:
        """sha256 hex of the vocabulary, the rules and the names of the special tokens, in whichever form they stand."""
        model = self._as_read["model"]
        merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model.get("merges", [])]
        content = {**self._as_read, "model": {**model, "merges": merges}}
        decides = json.dumps([content, self._bos, self._eos, self._pad], sort_keys=True)
        return hashlib.sha256(decides.encode()).hexdigest()

    def encode(self, text: str, *, plain: bool = False) -> list[int]:
        """Encode a text and add nothing.

        Args:
            text: any text; a special token in it becomes its one id.
            plain: encode special tokens, except grounding tokens, as the ordinary characters they are written with.

        Example: with plain, "<|User|>" becomes the pieces of "<", "|", "User", "|", ">", and "<|ref|>" its one id.
        """
        if not plain:
            return self._matching.encode(text, add_special_tokens=False).ids
        ids: list[int] = []
        for part in _GROUNDING_SPLIT.split(text):
            if part in GROUNDING_TOKENS:
                ids.append(self.special_ids[part])
            elif part:
                ids.extend(self._plain.encode(part, add_special_tokens=False).ids)
        return ids

    def count_batch(self, texts: Sequence[str]) -> list[int]:
        """Count the ids that `encode` makes of each text, all of them at once.

        The library takes threads for it, on all cores, unless TOKENIZERS_PARALLELISM is false.
        """
        # The fast one keeps no offsets.
        return [len(encoding) for encoding in self._matching.encode_batch_fast(texts, add_special_tokens=False)]

    def least_tokens(self, text: str) -> int:
        """Count the tokens that a text has at least, without encoding it; 0 where the tokenizer's rules tell nothing.

        Encoding takes some 300 bytes of memory for each byte of text, so what is far too long is better not tried.

        Example: of 1,000 bytes, with a longest token of 128 bytes, at least 8.
        """
        return -(-len(text.encode()) // self._longest_token) if self._longest_token else 0

    def decode(self, ids: Sequence[int]) -> str:
        """Decode token ids to text, special tokens as they are written."""
        return self._matching.decode([int(index) for index in ids], skip_special_tokens=False)

    def find_typed_special(self, text: str) -> str | None:
        """Return the first special token that somebody typed into a text, grounding tokens and <image> excepted."""
        if not any(start in text for start in self._special_starts):
            return None
        found = self._typed_special.search(text)
        return found.group() if found else None

    @cached_property
    def _longest_token(self) -> int:
        """Most bytes of text that a token stands for; 0 where it cannot be told.

        A byte-level BPE spells every byte of the text as one character of a token, so a token of n characters stands
        for n bytes.  That holds for all of a text if no step before it drops or rewrites a part: no normalizer, no
        splitter that removes what it splits at, no byte without a token, no special token that takes spaces with it.
        """
        model, vocabulary = self._as_read["model"], self._as_read["model"].get("vocab")
        steps = _steps(self._as_read.get("pre_tokenizer"), "pretokenizers")
        lossless = (
            model.get("type") == "BPE"
            and not model.get("continuing_subword_prefix")
            and not model.get("end_of_word_suffix")
            and set(tokenizers.pre_tokenizers.ByteLevel.alphabet()) <= vocabulary.keys()
            and not _steps(self._as_read.get("normalizer"), "normalizers")
            and any(step["type"] == "ByteLevel" for step in steps)
            and all(
                step["type"] in ("ByteLevel", "Digits") or (step["type"] == "Split" and step["behavior"] != "Removed")
                for step in steps
            )
            and not any(token.get("lstrip") or token.get("rstrip") for token in self._as_read["added_tokens"])
        )
        if not lossless:
            return 0
        return max(*map(len, vocabulary), *(len(token.encode()) for token in self.special_ids))

    @cached_property
    def _typed_special(self) -> re.Pattern[str]:
        legitimate = {IMAGE_TOKEN, *GROUNDING_TOKENS}
        forbidden = sorted(set(self.special_ids) - legitimate, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, forbidden)))

    @cached_property
    def _special_starts(self) -> frozenset[str]:
        """First characters of special tokens; to look for them first is ten times as fast as to look for all tokens."""
        return frozenset(token[0] for token in self.special_ids)

    def _add_missing_tokens(self) -> None:
        """Add what the official processor adds, in its order, both to the library's object and to what is saved."""
        known = {entry["content"] for entry in self._as_read.setdefault("added_tokens", [])}
        for token in (self._pad, IMAGE_TOKEN, *GROUNDING_TOKENS, USER_TOKEN, ASSISTANT_TOKEN):
            if token not in known:
                self._matching.add_special_tokens([tokenizers.AddedToken(token, normalized=False, special=True)])
                entry = {"id": self._id_of(token), "content": token, **_PLAIN_FLAGS, "special": True}
                self._as_read["added_tokens"].append(entry)

    def _id_of(self, token: str) -> int:
        index = self._matching.token_to_id(token)
        assert index is not None, token
        return index


def _steps(part: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer: those of a sequence, itself alone, or none."""
    if part is None:
        return []
    if not isinstance(part, dict):  # the library takes a list of fields too
        return [{"type": None}]
    return [step for inner in part[name] for step in _steps(inner, name)] if part["type"] == "Sequence" else [part]


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected JSON in UTF-8, found other bytes ({error})") from error


def _token_name(config: dict[str, Any], key: str, default: str, source: str) -> str:
    """Name of a special token in a tokenizer_config: a string, the dictionary of an AddedToken, or not there."""
    value = config.get(key)
    name = value.get("content") if isinstance(value, dict) else default if value in (None, "") else value
    # JSON can spell half a surrogate pair, which is no text that could be encoded.
    if not isinstance(name, str) or not name or any("\ud800" <= character <= "\udfff" for character in name):
        raise UserError(
            f"{source}: {key} of its tokenizer_config.json: expected a token's text, or an object with it as content, "
            f"found {reprlib.repr(value)}"
        )
    return name
