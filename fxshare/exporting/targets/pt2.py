"""``pt2``: a ``torch.export`` program, which loads with torch alone."""

from __future__ import annotations

from pathlib import Path

import torch

from fxshare.exporting.program import traced
from fxshare.exporting.subject import Subject
from fxshare.exporting.written import Written


def write(subject: Subject, path: Path) -> Written:
    """Write ``path`` with ``torch.export.save``; ``torch.export.load(path).module()`` takes the
    inputs by name and returns plain containers of tensors."""
    found = traced(subject)
    found.program.example_inputs = None  # data does not travel with the model
    torch.export.save(found.program, path)
    loaded = torch.export.load(path).module()
    return Written(lambda call: loaded(**call), found.batch, found.sequence, found.notes)
