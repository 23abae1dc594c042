"""Token ids are sam3's and open_clip's, and the tiny vocabulary can say anything."""

import gzip
import html
import pickle
from pathlib import Path

import numpy as np
import pytest

from sam3jax.data.tokenizer import Tokenizer, build_byte_tokenizer, build_clip_tokenizer, clean

SHARED = Path(__file__).parents[1] / ".." / "shared" / "data" / "clip_bpe"

FIXED = [
    "", " ", "a red car", "A  RED\tCar\n", "Zoë's naïve café", "café", "cafe\u0301 &amp; cre\u0300me", "ﬁne ﬂour", "straße İstanbul",
    "we'll I'm they've it's don't we'd you're", "O’Neill’s “quote”", "1234567890", "route 66b", "3.14159", "x2y3", "½ ¾ ² Ⅷ ٣ 五",
    "&amp;lt;b&amp;gt;", "&lt;b&gt;bold&lt;/b&gt;", "<e&#769;>", "&eacute;&#x1F600;", "&amp;amp;amp; &nbsp; &", "fish &chips; &copy 2020",
    "👩‍👩‍👧‍👦 family", "🏳️‍🌈🇩🇪", "dog🐶cat", "❤️‍🔥", "日本の車", "красная машина", "سيارة حمراء", "ลิง", "한국어",
    "schÃ¶n", "â€œmojibakeâ€\x9d", "\x1b[31mred\x1b[0m", "tab\there", "\u3000wide\u3000", "\u200bzero\u200bwidth", "\x1c\x1d fs gs \x85",
    "!", "!!!", "a!b", "?!.,;:-_()[]{}", "#@$%^&*", "--__--", "C++ & C#", "e-mail@example.com", "https://a.b/c?d=e&f=g", "don''t ''s", "'ſ 'S 'Re",
    "<start_of_text> a <end_of_text>", "<START_OF_TEXT>", "<|startoftext|>", "<ſtart_of_text>", "</w>", "a</w>", "Ġ Ċ", "\ufeffbom", "\ufffd",
    "word " * 200, "w" * 400, "é" * 100, "🐶" * 50, "1" * 100, "antidisestablishmentarianism", "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaab",
]  # fmt: skip


def awkward_strings(count: int = 500) -> list[str]:
    """The fixed ones, then seeded mixtures of words, marks, entities and any assigned character."""
    rng = np.random.default_rng(3)
    pieces = [
        *"aeinorst AEIé!?'-.<>&;0123456789",
        *FIXED[2:40],
        "&quot;",
        "&#39;",
        "'s",
        "red",
        "Ünï",
    ]

    def mixture() -> str:
        some = [pieces[i] for i in rng.integers(0, len(pieces), rng.integers(1, 12))]
        wild = [
            chr(c) for c in rng.integers(1, 0x1FFFF, rng.integers(0, 6)) if not 0xD800 <= c < 0xE000
        ]
        return "".join(rng.permutation([*some, *wild]))

    return [*FIXED, *(mixture() for _ in range(count - len(FIXED)))]


@pytest.fixture(scope="module")
def vocabulary_file() -> Path:
    for folder in (SHARED, *(Path(p) for p in _open_clip_folder())):
        if (folder / "bpe_simple_vocab_16e6.txt.gz").is_file():
            return folder / "bpe_simple_vocab_16e6.txt.gz"
    pytest.skip("no CLIP vocabulary file: it comes with open_clip_torch")


def _open_clip_folder() -> list[str]:
    try:
        import open_clip
    except ImportError:
        return []
    return list(open_clip.__path__)


@pytest.fixture(scope="module")
def clip(vocabulary_file: Path) -> Tokenizer:
    return Tokenizer(build_clip_tokenizer(vocabulary_file), 32)


@pytest.mark.parametrize("length", [32, 7])
def test_ids_equal_those_of_sam3(vocabulary_file: Path, clip: Tokenizer, length: int):
    theirs = pytest.importorskip("sam3.model.tokenizer_ve").SimpleTokenizer(
        bpe_path=str(vocabulary_file)
    )
    texts = awkward_strings()
    ours = Tokenizer(clip.to_json(), length)(texts)
    expected = theirs(texts, context_length=length).numpy()
    wrong = [(t, o, e) for t, o, e in zip(texts, ours, expected, strict=True) if (o != e).any()]
    assert ours.dtype == np.int32
    assert not wrong, f"{len(wrong)} of {len(texts)} differ, first {wrong[0]}"


def test_ids_equal_those_of_open_clip(vocabulary_file: Path, clip: Tokenizer):
    open_clip = pytest.importorskip("open_clip")
    texts = awkward_strings()
    expected = open_clip.tokenizer.SimpleTokenizer(bpe_path=str(vocabulary_file))(
        texts, context_length=32
    )
    np.testing.assert_array_equal(clip(texts), expected.numpy())


def test_start_and_end_under_their_transformers_names_give_the_same_ids(clip: Tokenizer):
    renamed = (
        clip.to_json()
        .replace("<start_of_text>", "<|startoftext|>")
        .replace("<end_of_text>", "<|endoftext|>")
    )
    texts = awkward_strings()
    np.testing.assert_array_equal(Tokenizer(renamed, 32)(texts), clip(texts))


def test_vocabulary_size_and_special_ids_are_clips(clip: Tokenizer):
    assert (clip.vocab_size, clip.start, clip.end) == (49408, 49406, 49407)


def test_a_long_phrase_is_cut_and_keeps_its_end(clip: Tokenizer):
    row = clip(["word " * 200])[0]
    assert row[0] == clip.start
    assert row[-1] == clip.end
    assert len(set(row[1:-1])) == 1
    assert not clip.fits("word " * 31)
    assert clip.fits("word " * 30)


def test_the_tiny_vocabulary_never_uses_the_padding_id():
    tiny = Tokenizer(build_byte_tokenizer(), 16)
    texts = awkward_strings()
    rows = tiny(texts)
    assert tiny.vocab_size == 1024
    assert (tiny.start, tiny.end) == (1022, 1023)
    assert all(0 < i < 1024 for text in texts for i in tiny.encode(text))
    assert ((rows == 0).argmax(1) == np.where(rows.all(1), 0, (rows != 0).sum(1))).all(), (
        "padding only at the end"
    )


def test_the_tiny_vocabulary_loses_nothing_of_a_phrase():
    """Ids back to text gives the cleaned phrase, white space between words aside."""
    import json

    from sam3jax.data.tokenizer import byte_alphabet

    tiny = Tokenizer(build_byte_tokenizer(), 16)
    names = {i: t for t, i in json.loads(tiny.to_json())["model"]["vocab"].items()}
    byte = {c: b for b, c in enumerate(byte_alphabet())}
    special = (tiny.start, tiny.end)
    for text in awkward_strings():
        spelled = "".join(
            names[i].removesuffix("</w>") for i in tiny.encode(text) if i not in special
        )
        back = bytes(byte[c] for c in spelled).decode("utf-8")
        kept = clean(text).replace("<start_of_text>", "").replace("<end_of_text>", "")
        assert "".join(back.split()) == "".join(kept.split())


def test_the_tiny_vocabulary_knows_colours_and_shapes_as_few_tokens():
    tiny = Tokenizer(build_byte_tokenizer(), 16)
    assert [len(tiny.encode(t)) for t in ("red circle", "blue square", "green star", "dog")] == [
        2,
        2,
        2,
        1,
    ]
    assert tiny.fits("a large yellow triangle on the left")


def test_the_tiny_vocabulary_is_the_same_every_time():
    assert build_byte_tokenizer() == build_byte_tokenizer()


def test_a_tokenizer_survives_pickling(clip: Tokenizer):
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(clip))(FIXED), clip(FIXED))


def test_cleaning_unescapes_twice():
    assert clean(html.escape(html.escape("A < B"))) == "a < b"


def test_wrong_files_are_named(tmp_path: Path):
    with pytest.raises(ValueError, match="no tokenizer file"):
        Tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"not a readable tokenizer\.json"):
        Tokenizer(tmp_path / "tokenizer.json")
    with gzip.open(tmp_path / "merges.txt.gz", "wt") as file:
        file.write("#version\na b\n")
    with pytest.raises(ValueError, match="expected 48894 pairs"):
        build_clip_tokenizer(tmp_path / "merges.txt.gz")
