"""Phrases to token ids, as sam3's text tower expects them (sam3.model.tokenizer_ve.SimpleTokenizer).

A phrase is cleaned (ftfy, two HTML unescapes, white space, lower case) and cut into words here, because
no `tokenizer.json` holds those rules; each word's bytes then go through the byte-pair model of a
`tokenizer.json`. Normalizers, pre-tokenizers and post-processors in the file are not used, so CLIP's
file from a transformers folder and the one built here give the same ids.

Id 0 is padding to the text tower. In CLIP's vocabulary it is also "!", which is therefore masked; the
`tiny` vocabulary gives it to no text.
"""

from __future__ import annotations

import functools
import gzip
import html
import itertools
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ftfy
import numpy as np
import regex
import tokenizers

START, END = "<start_of_text>", "<end_of_text>"
STARTS, ENDS = (START, "<|startoftext|>"), (END, "<|endoftext|>")
_END_OF_WORD = "</w>"
# CLIP's words: contractions, runs of letters, single digits, runs of anything else.
_WORD = r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"
_WORDS = regex.compile(f"{START}|{END}|{_WORD}", regex.IGNORECASE)
_CLIP_MERGES = 49152 - 256 - 2  # of the lines in CLIP's file, those that its published models use

# What people ask the tiny model for: each becomes one token, or few.
_TINY_WORDS = """
a an the of in on with and or to from at by for no not is are
red green blue yellow orange purple pink brown black white grey gray cyan magenta teal violet
circle square triangle rectangle ellipse star ring cross diamond hexagon pentagon arrow bar disc dot line
heart moon oval cube ball box shape visual
small large big tiny thin thick long short round tall wide striped dotted dark light bright pale
left right top bottom centre center
person man woman child dog cat bird horse car truck bus bicycle boat tree flower house door window
wheel bottle cup plate table chair book phone bag shirt hat shoe hand face food fruit apple banana
cell crack sign road water sky
glass plastic metal wooden paper label
"""


@functools.cache
def byte_alphabet() -> tuple[str, ...]:
    """The printable character that stands for each of the 256 bytes (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return tuple(chr(b if b in printable else next(others)) for b in range(256))


def _alphabet_in_vocabulary_order() -> list[str]:
    """CLIP numbers the printable bytes first, then the others."""
    return sorted(byte_alphabet(), key=ord)


def clean(text: str) -> str:
    """Mend the encoding, unescape HTML twice, collapse white space, lower case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    # The outer strip comes first and last because Python's white space (U+001C, say) is more than
    # the pattern's; lower case comes last because it may lengthen a text. The order is sam3's.
    return regex.sub(r"\s+", " ", text.strip()).strip().lower()


def words(text: str) -> tuple[str, ...]:
    """What the byte-pair model reads of a text: texts of equal words have equal token rows."""
    return tuple(_WORDS.findall(clean(text)))


class Tokenizer:
    """Turns phrases into rows of token ids.

    source: path of a `tokenizer.json`, its text, its parsed content, or a `tokenizers.Tokenizer`.
    length: tokens of a row, start and end included.
    Raises ValueError where the file is no byte-level byte-pair vocabulary with start and end tokens.
    """

    def __init__(
        self, source: str | Path | dict[str, Any] | tokenizers.Tokenizer, length: int = 32
    ):
        if length < 2:
            raise ValueError(f"length {length}: at least 2, for the start and the end token")
        self._tokenizer = _read(source)
        self.length = length
        self.start, self.end = (self._special(names) for names in (STARTS, ENDS))
        missing = [c for c in byte_alphabet() if self._tokenizer.token_to_id(c) is None]
        if not isinstance(self._tokenizer.model, tokenizers.models.BPE) or missing:
            kind = type(self._tokenizer.model).__name__
            raise ValueError(
                f"the tokenizer is {kind} with {256 - len(missing)} of 256 bytes, expected CLIP's byte-level "
                "byte-pair encoding: take the tokenizer.json that lies beside the checkpoint, or build one with "
                "python -m convert ... --tokenizer bpe_simple_vocab_16e6.txt.gz"
            )
        self._model = self._tokenizer.model
        self._ids = functools.lru_cache(maxsize=65536)(self._word_ids)

    def _special(self, names: tuple[str, ...]) -> int:
        for name in names:
            if (token := self._tokenizer.token_to_id(name)) is not None:
                return token
        raise ValueError(f"the tokenizer has no {' or '.join(names)} token: is it CLIP's?")

    @property
    def vocab_size(self) -> int:
        """Number of ids, special tokens included."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str) -> list[int]:
        """Token ids of one phrase, without start, end, padding or truncation."""
        return [i for word in words(text) for i in self._ids(word)]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Token ids [len(texts), length] int32: start, phrase, end, zeros. Too long: cut, end kept."""
        if isinstance(texts, str):
            raise TypeError(f"expected a list of phrases, found the string {texts!r}")
        rows = np.zeros((len(texts), self.length), np.int32)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.start, *self.encode(text)[: self.length - 2], self.end]
            row[: len(ids)] = ids
        return rows

    def fits(self, text: str) -> bool:
        """Whether the whole phrase is kept, nothing cut off at `length`."""
        return len(self.encode(text)) <= self.length - 2

    def to_json(self) -> str:
        """The content of `tokenizer.json`."""
        return self._tokenizer.to_str()

    def __getstate__(self) -> dict[str, Any]:
        return {"json": self.to_json(), "length": self.length}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(json.loads(state["json"]), state["length"])

    def _word_ids(self, word: str) -> tuple[int, ...]:
        if word == START:
            return (self.start,)
        if word == END:
            return (self.end,)
        alphabet = byte_alphabet()
        spelled = "".join(alphabet[b] for b in word.encode("utf-8"))
        return tuple(token.id for token in self._model.tokenize(spelled))


def build_clip_tokenizer(bpe_file: str | Path) -> str:
    """`tokenizer.json` text of CLIP's vocabulary from its merges file (bpe_simple_vocab_16e6.txt.gz).

    Raises ValueError where the file is not that vocabulary.
    """
    path = Path(bpe_file)
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data).decode("utf-8")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a readable merges file: {error}") from error
    lines = text.split("\n")[1 : _CLIP_MERGES + 1]
    merges = [(pair[0], pair[1]) for line in lines if len(pair := line.split()) == 2]
    if len(merges) != _CLIP_MERGES:
        raise ValueError(
            f"{path} holds {len(merges)} merges after its first line, expected {_CLIP_MERGES} pairs: "
            "CLIP's file is called bpe_simple_vocab_16e6.txt.gz"
        )
    alphabet = _alphabet_in_vocabulary_order()
    tokens = [*alphabet, *(c + _END_OF_WORD for c in alphabet), *("".join(m) for m in merges)]
    return _tokenizer_json([*tokens, START, END], merges)


def build_byte_tokenizer(vocab_size: int = 1024) -> str:
    """`tokenizer.json` text of the `tiny` preset's vocabulary: every byte, and merges for simple English.

    Id 0 is reserved for padding, the last two ids are start and end. The same on every machine: the
    merges are learned here from a fixed list of words. vocab_size >= 515.
    """
    alphabet = _alphabet_in_vocabulary_order()
    tokens = ["<pad>", *alphabet, *(c + _END_OF_WORD for c in alphabet)]
    room = vocab_size - len(tokens) - 2
    if room < 0:
        raise ValueError(f"vocab_size {vocab_size}: at least {len(tokens) + 2} to hold every byte")
    merges = _learn_merges(_TINY_WORDS.split(), room)
    tokens += ["".join(pair) for pair in merges]
    tokens += [f"<unused_{i}>" for i in range(vocab_size - 2 - len(tokens))]
    return _tokenizer_json([*tokens, START, END], merges)


def _learn_merges(words: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, ties in alphabetical order."""
    spelled = [[*word[:-1], word[-1] + _END_OF_WORD] for word in words]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs = Counter(pair for word in spelled for pair in itertools.pairwise(word))
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelled = [_merge(word, best) for word in spelled]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    out: list[str] = []
    for symbol in word:
        if out and (out[-1], symbol) == pair:
            out[-1] += symbol
        else:
            out.append(symbol)
    return out


def _tokenizer_json(tokens: list[str], merges: list[tuple[str, str]]) -> str:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    model = tokenizers.models.BPE(
        vocab=vocabulary,
        merges=merges,
        end_of_word_suffix=_END_OF_WORD,
        continuing_subword_prefix="",
    )
    tokenizer = tokenizers.Tokenizer(model)
    # For other readers of the file: what it can hold of the rules above.
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [
            tokenizers.normalizers.NFC(),
            tokenizers.normalizers.Replace(tokenizers.Regex(r"\s+"), " "),
            tokenizers.normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(_WORD), "removed", invert=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(name, vocabulary[name]) for name in (START, END)],
    )
    return tokenizer.to_str()


def _read(source: str | Path | dict[str, Any] | tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    if isinstance(source, tokenizers.Tokenizer):
        return source
    if isinstance(source, dict):
        text, origin = json.dumps(source), "the tokenizer"
    elif isinstance(source, str) and source.lstrip().startswith("{"):
        text, origin = source, "the tokenizer"
    else:
        path = Path(source)
        if not path.is_file():
            raise ValueError(
                f"no tokenizer file {path}: expected the tokenizer.json of a model folder"
            )
        text, origin = path.read_text("utf-8"), str(path)
    try:
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises bare Exception
        raise ValueError(f"{origin} is not a readable tokenizer.json: {error}") from error
