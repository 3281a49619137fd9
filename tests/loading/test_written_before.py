"""Folders that were written before the files of this package moved load as they did then.

They were made by 0.1.0 while everything still lay flat in ``fxshare/``: a planned, pivoted and
lowered model of the embedded class, whose folders go on naming it ``fxshare.demo.model:GPT``; and a
mixture of experts of transformers, whose graph calls a function of a pass by its module's name.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import fxshare
from fxshare.models.source import EMBEDDED_CLASS
from fxshare.result.fingerprint import graph_sha256

FOLDERS = Path(__file__).parent / "written_before"


@pytest.mark.parametrize("name", ["embedded", "mixtral"])
def test_a_folder_written_before_the_move_loads_and_saves_again(name: str, tmp_path: Path) -> None:
    if name == "mixtral":
        transformers = pytest.importorskip("transformers")
        # an older one makes another graph, and `load` asks for the one that wrote the folder
        if tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 23):
            pytest.skip("written with transformers 5.23")
    folder = tmp_path / name
    shutil.copytree(FOLDERS / name, folder)
    gm = fxshare.load(folder)
    # a graph that is not the saved one, letter by letter, leaves a note. Mixtral's has become one
    # that keeps no_grad and what the model divides in place; it computes the same
    differs = [note for note in gm.fxshare.report.notes if "graph text differs" in note]
    assert len(differs) == (name == "mixtral")
    assert all("the output is within 0.0e+00 of the saved one" in note for note in differs)
    fxshare.save(gm, tmp_path / "again")
    again = fxshare.load(tmp_path / "again")
    assert again.fxshare.graph_sha256 == gm.fxshare.graph_sha256 == graph_sha256(gm)
    for (key, one), (_, other) in zip(
        gm.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert torch.equal(one, other), key


def test_the_class_of_the_embedded_model_keeps_its_name_in_folders() -> None:
    assert fxshare.load(FOLDERS / "embedded").fxshare.source.class_name == EMBEDDED_CLASS
    assert EMBEDDED_CLASS == "fxshare.demo.model:GPT"
