"""Every family saved and loaded, and written for its own code and as Python.

Both exports read what they wrote back and compare it with the compiled model at other sizes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import fxshare
from fxshare.base.numerics import float_leaves
from tests.strategies import no_warnings_of_ours
from tests.zoo.families import FAMILIES, Family

# one of each kind of site: linear modules, a tied head, bare parameters, stacks of experts
# (transposed, with biases); what `modules` would do is in test_store
_EACH = {"gpt_oss", "t5"}


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, id=f.name, marks=() if f.name in _EACH else pytest.mark.slow)
        for f in FAMILIES
    ],
)
def test_saved_dense_and_python(family: Family, tmp_path: Path) -> None:
    model: Any = family.model()
    known = hasattr(model, "config")
    with no_warnings_of_ours():  # an expert sees few tokens
        gm = fxshare.compile(
            model,
            [family.config, {"group_size": 1, "compression_rate": 0.5}],
            calibration=family.batches(),
        )
    call = family.call()
    with torch.no_grad():
        expected = dict(float_leaves(gm(**call)))
    fxshare.save(gm, tmp_path / "saved")
    loaded = fxshare.load(tmp_path / "saved", **({} if known else {"model": family.model()}))
    with torch.no_grad():
        found = dict(float_leaves(loaded(**call)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[path], t) for path, t in expected.items())
    dense = fxshare.export(
        gm, tmp_path / "dense", to="dense", **({} if known else {"original": model})
    )
    assert dense.distance is not None
    assert fxshare.export(gm, tmp_path / "python", to="py").distance is not None
