from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fxshare.embedded.bpe import SEPARATOR, Tokenizer
from fxshare.embedded.corpus import (
    Document,
    calibration,
    held_out,
    load_documents,
    pack,
    role_of,
    token_stream,
    training,
)
from fxshare.errors import DataError


def test_roles_of_named_modules_never_change() -> None:
    # The packaged model was trained on this split: a change here makes its evaluation dishonest.
    for name in ["threading.py", "pdb.py", "unittest/case.py", "webbrowser.py", "pprint.py"]:
        assert role_of(name) == "held_out", name
    for name in ["argparse.py", "typing.py", "inspect.py", "asyncio/base_events.py", "ast.py"]:
        assert role_of(name) == "training", name


def test_a_module_that_becomes_a_package_keeps_its_role() -> None:
    for name in ["threading", "zipfile", "pathlib", "pdb", "sysconfig"]:
        assert role_of(f"{name}.py") == role_of(f"{name}/__init__.py")


def test_about_five_percent_are_held_out() -> None:
    roles = [role_of(f"package/module_{i}.py") for i in range(4000)]
    assert 0.04 < roles.count("held_out") / len(roles) < 0.06


def test_what_belongs(library: Path) -> None:
    names = [document.name for document in load_documents(library)]
    assert names == sorted(names)
    assert len(names) == 12
    assert {"threading.py", "encodings/idna.py", "json/scanner.py"} < set(names)


def test_the_split_is_a_partition(library: Path) -> None:
    documents = load_documents(library)
    train, test = training(documents), held_out(documents)
    assert {d.name for d in test} >= {"threading.py", "json/scanner.py"}
    assert not {d.name for d in train} & {d.name for d in test}
    assert sorted(train + test, key=lambda d: d.name) == documents


def test_calibration_is_a_deterministic_part_of_training(library: Path) -> None:
    documents = load_documents(library)
    sample = calibration(documents, n_bytes=100)
    assert 0 < len(sample) < len(training(documents))
    assert set(sample) < set(training(documents))
    assert sample == calibration(reversed(documents), n_bytes=100)
    assert sample == calibration(documents, n_bytes=200)[: len(sample)]
    assert sum(len(d.text) for d in sample) >= 100 > sum(len(d.text) for d in sample[:-1])


def test_the_running_library() -> None:
    documents = load_documents()
    names = {document.name for document in documents}
    assert {"argparse.py", "threading.py", "json/decoder.py"} <= names
    assert not any(set(name.split("/")) & {"test", "tests", "site-packages"} for name in names)
    assert sum(len(document.text) for document in documents) > 3_000_000


def test_no_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=re.escape(str(tmp_path))):
        load_documents(tmp_path)
    with pytest.raises(DataError, match="zipped"):
        load_documents(tmp_path / "python311.zip")


def test_stream_and_windows() -> None:
    stream = token_stream([Document("a.py", "abc"), Document("b.py", "de")], Tokenizer([]))
    assert stream == [*b"abc", SEPARATOR, *b"de", SEPARATOR]
    windows = pack(stream, window=3)
    assert windows.tolist() == [[97, 98, 99], [SEPARATOR, 100, 101]]
    assert windows.dtype == torch.int64


def test_too_few_tokens_are_refused() -> None:
    with pytest.raises(DataError, match="256 tokens"):
        pack([1, 2, 3])
