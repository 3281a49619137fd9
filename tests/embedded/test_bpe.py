from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fxshare.embedded.bpe import PATTERN, SEPARATOR, Tokenizer, train_bpe
from fxshare.errors import DataError

SOURCE = Path(re.__file__).read_text(encoding="utf-8")
TOKENIZER = train_bpe([SOURCE], vocab_size=600)

TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@settings(deadline=None, max_examples=300)
@given(TEXT)
@example("def f(x):\r\n\tif x:   # é\n\n        return  x_1 + 12345\n   ")
@example("\x00\u2028\u00a0\x1c\U0010ffff")
def test_decode_inverts_encode(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@settings(deadline=None, max_examples=300)
@given(TEXT)
def test_the_pieces_cover_the_text(text: str) -> None:
    assert "".join(re.findall(PATTERN, text)) == text


@settings(deadline=None)
@given(TEXT)
def test_encoding_is_by_piece(text: str) -> None:
    pieces = re.findall(PATTERN, text)
    assert TOKENIZER.encode(text) == [i for piece in pieces for i in TOKENIZER.encode(piece)]


def test_pieces_of_source() -> None:
    text = "if x:\n\n        return  foo_bar12345 ** 2"
    assert re.findall(PATTERN, text) == [
        "if", " x", ":", "\n\n        ", "return", " ", " foo_bar", "123", "45", " **", " 2",
    ]  # fmt: skip


def test_source_gets_shorter() -> None:
    assert len(TOKENIZER.encode(SOURCE)) < 0.6 * len(SOURCE)


def test_lowest_rank_merges_first() -> None:
    # "bc" is learnt before "ab", so "abc" is a + bc.
    tokenizer = Tokenizer([(ord("b"), ord("c")), (ord("a"), ord("b"))])
    assert tokenizer.encode("abc") == [ord("a"), 257]
    assert tokenizer.encode("aab") == [ord("a"), 258]


def test_training_counts_pairs_and_breaks_ties_by_id() -> None:
    tokenizer = train_bpe(["xyz xyz xyz"], vocab_size=258)
    assert tokenizer.token_bytes[257] == b"xy"


def test_overlapping_pairs_merge_from_the_left() -> None:
    tokenizer = Tokenizer([(ord("="), ord("="))])
    assert tokenizer.encode("===") == [257, ord("=")]


def test_separator_has_no_text() -> None:
    assert TOKENIZER.token_bytes[SEPARATOR] == b""
    assert TOKENIZER.decode([SEPARATOR, ord("a"), SEPARATOR]) == "a"


def test_a_cut_character_decodes_to_a_replacement() -> None:
    assert Tokenizer([]).decode("é".encode()[:1]) == "\ufffd"


def test_lone_surrogate_is_refused() -> None:
    with pytest.raises(DataError, match="lone surrogate"):
        TOKENIZER.encode("a\ud800b")


def test_save_and_load(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "bpe.json")
    again = Tokenizer.from_json((tmp_path / "bpe.json").read_text(encoding="utf-8"))
    assert again.token_bytes == TOKENIZER.token_bytes
    assert again.encode(SOURCE) == TOKENIZER.encode(SOURCE)
    assert again.vocab_size == 600


def test_a_megabyte_takes_seconds() -> None:
    text = (SOURCE * (1_000_000 // len(SOURCE) + 1))[:1_000_000]
    start = time.process_time()
    Tokenizer.encode(TOKENIZER, text)
    assert time.process_time() - start < 10
