"""Hand a compiled model to other runtimes: :func:`export`.

Each target is a module with a ``write``; what it wrote is read back by its own loader, run, and
compared with the compiled model before it takes its place. docs/how-to/export.md shows each.
"""

from __future__ import annotations

import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fxshare.base.numerics import Distance, beyond_rounding, worst
from fxshare.base.progress import stage
from fxshare.base.randomness import randomness_as_before
from fxshare.base.surroundings import plain_surroundings
from fxshare.errors import CheckFailed, ExportError
from fxshare.exporting.options import TARGETS, Options, Target
from passes.errors import FxShareError

if TYPE_CHECKING:
    from fxshare.capture.call import Call
    from fxshare.exporting.subject import Subject
    from fxshare.exporting.written import Written
    from fxshare.store.skeleton import ModelSource
    from fxshare.store.tokenizer import TokenizerSource

_LOG = logging.getLogger(__name__)
_WITHOUT_CODES = ("py", "vllm")
"""Targets that have no form for quantised weights."""


@dataclass(frozen=True)
class Exported:
    """What was written, and how it compared with the compiled model.

    ``distance`` is the worst of the calls in ``checked``, and ``limit`` what rounding explains;
    ``distance`` is None where nothing could be run, and ``notes`` says why.
    """

    path: str
    target: str
    bytes: int
    inputs: tuple[str, ...]
    batch_varies: bool
    sequence_varies: bool
    checked: tuple[str, ...]
    distance: Distance | None
    limit: float
    notes: tuple[str, ...]
    certificate: str = ""
    """The path of the certificate, see docs/how-to/serve.md."""

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        varies = [
            what
            for what, does in (("batch", self.batch_varies), ("sequence", self.sequence_varies))
            if does
        ]
        lines = [
            f"{self.target}: {self.path}, {self.bytes:,} bytes",
            f"  inputs: {', '.join(self.inputs)}; "
            + (f"{' and '.join(varies)} may vary" if varies else "every size is fixed"),
        ]
        if self.distance is not None:
            bit_equal = self.distance.absolute == 0
            lines.append(
                f"  equal to the compiled model on {'; '.join(self.checked)}: "
                + ("bit by bit" if bit_equal else f"{self.distance}; limit {self.limit:.1e}")
            )
        lines.append(f"  certificate: {self.certificate}")
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


@plain_surroundings()
@stage("export", _LOG)
def export(
    gm: nn.Module,
    path: str | os.PathLike[str],
    *,
    to: Target,
    example: object = None,
    dynamic: bool = True,
    opset: int | None = None,
    original: ModelSource | None = None,
    untie: bool = False,
    tokenizer: TokenizerSource | None = None,
    force: bool = False,
    seed: int = 0,
) -> Exported:
    """Write a compiled model for another runtime, check it, and only then put it in its place.

    Parameters
    ----------
    gm
        What :func:`fxshare.compile` or :func:`fxshare.load` returned, lowered or not. It is
        exported in eval mode as it is now, and left as it is.
    path
        The file to make, or the folder (``py``, ``vllm``, and ``dense`` unless it ends in
        ``.safetensors``).
    to
        ``pt2`` (``torch.export``), ``aoti`` (AOTInductor), ``onnx``, ``dense`` (the original's
        state dict with the products multiplied out), ``py`` (the graph as a Python module),
        ``vllm`` (a folder that vLLM and transformers load, in which bases stay shared),
        ``ort-genai`` (a folder for ONNX Runtime GenAI: a graph with a cache).
    example
        One batch to export with. Where None, random numbers of the form that the model was
        captured with.
    dynamic
        Let batch size and sequence length vary where the model does; else they are the example's.
    opset
        For ``onnx`` and ``ort-genai``; torch's default where None.
    original
        For ``dense``: the original model, a function that makes one, or
        ``"package.module:function"``, where the compiled model cannot say its class or does not use
        all of its parameters. For ``vllm`` the model, for the last reason.
    untie
        For ``vllm``: give every linear its own copy of the bases that it reads.
    tokenizer
        For ``vllm`` and ``ort-genai``: a folder whose tokenizer files are copied, or a tokenizer of
        transformers. Where None, those of the folder that the original was loaded from.
    force
        Replace an older export at ``path``; it stays until the new one is checked.
    seed
        Of the random example.

    Raises
    ------
    ExportError
        A model or an option that the target cannot carry, or a package that is not installed.
    CheckFailed
        What was written does not compute what ``gm`` computes. Nothing is left behind.
    StoreError
        ``path`` exists or cannot be written.
    FxShareError
        ``gm`` was not made by fxshare.
    """
    from fxshare.base.files import write_text
    from fxshare.exporting import place
    from fxshare.exporting.certifying.certificate import certificate_path
    from fxshare.exporting.certifying.certify import certify
    from fxshare.exporting.codes import refuse_codes
    from fxshare.exporting.subject import subject_of
    from fxshare.exporting.targets import dense, onnx, ort_genai, python, vllm

    place_of = Path(path)
    options = Options(opset, original, untie, tokenizer)
    options.check(to, place_of)
    gm = getattr(gm, "_orig_mod", gm)  # what torch.compile wraps
    if to in _WITHOUT_CODES:
        refuse_codes(gm, to)
    if to == "vllm":
        gm = vllm.as_written(gm)
    ours = {"py": python.ours, "vllm": vllm.ours, "ort-genai": ort_genai.ours}
    if place_of.suffix != dense.SUFFIX:
        ours["dense"] = dense.ours
    renames = onnx.rename_data if to == "onnx" else None
    with place.new_place(place_of, force=force, ours=ours.get(to), renames=renames) as temporary:
        subject = subject_of(gm, example, dynamic=dynamic, seed=seed)
        written = _write(subject, temporary, to, options)
        checked, distance, limit, notes = _check(subject, written, to, seed)
        certificate = certify(subject, written, to, seed=seed)
        size = sum(f.stat().st_size for f in temporary.parent.rglob("*") if f.is_file())
        if temporary.is_dir():
            text = certificate.of_files(temporary).to_json()
            certificate_path(temporary).write_text(text, encoding="utf-8")
    if place_of.is_file():
        # beside a file it cannot appear with it; an older one does not have the sums of this file
        write_text(certificate_path(place_of), certificate.of_files(place_of).to_json())
    return Exported(
        path=str(path),
        target=to,
        bytes=size,
        inputs=tuple(subject.inputs),
        batch_varies=written.batch,
        sequence_varies=written.sequence,
        checked=checked,
        distance=distance,
        limit=limit,
        notes=(*subject.notes, *written.notes, *notes),
        certificate=str(certificate_path(place_of)),
    )


def _write(subject: Subject, path: Path, to: str, options: Options) -> Written:
    from fxshare.exporting.targets import aoti, dense, onnx, ort_genai, pt2, python, vllm

    if any(t.device.type == "meta" for t in subject.model.parameters()):
        raise ExportError(f"{subject.name} is on the meta device: it has no values to export")
    if to == "dense":
        return dense.write(subject, path, options.original)
    if to == "onnx":
        return onnx.write(subject, path, options.opset)
    if to == "vllm":
        return vllm.write(subject, path, options)
    if to == "ort-genai":
        return ort_genai.write(subject, path, options)
    write = {"pt2": pt2.write, "aoti": aoti.write, "py": python.write}[to]
    return write(subject, path)


def _check(
    subject: Subject, written: Written, to: str, seed: int
) -> tuple[tuple[str, ...], Distance | None, float, tuple[str, ...]]:
    """Compare the export with the model on other sizes and values than the example's.

    The first call has to run. One of a single row or position may be refused, as some runtimes
    do, and is noted then; what is returned has to be right.
    """
    calls = subject.other_calls(batch=written.batch, sequence=written.sequence, seed=seed)
    limit = 0.0
    found: Distance | None = None
    checked: list[str] = []
    notes: list[str] = []
    for what, call in calls if written.run is not None else ():
        assert written.run is not None
        expected = subject.run(call)
        try:
            with randomness_as_before(), torch.no_grad():
                given = written.run(call)
        except FxShareError:
            raise
        except Exception as error:
            reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
            if checked:
                notes.append(f"{to} refuses {what}: {reason}")
                continue
            raise CheckFailed(
                f"the {to} export of {subject.name} fails on {what}, which the model accepts: "
                f"{reason}; try dynamic=False, or an example=... of other sizes"
            ) from error
        call_limit = subject.limit(call, expected)
        limit = max(limit, call_limit)
        if written.unmasked_only:
            expected, given = _unmasked(expected, call), _unmasked(given, call)
        distance = worst(expected, given)
        if not distance.relative <= call_limit:
            raise CheckFailed(
                f"the {to} export of {subject.name} differs from the compiled model on {what} by "
                f"{beyond_rounding(distance, call_limit)}. Nothing was written"
            )
        checked.append(what)
        if found is None or distance.relative > found.relative:
            found = distance
    return tuple(checked), found, limit, tuple(notes)


def _unmasked(output: Any, call: Call) -> Any:
    """The output at the positions that the attention mask ``(batch, sequence)`` leaves in."""
    from fxshare.capture.call import MASK

    mask = call.get(MASK)
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return output
    kept = mask.bool()

    def rows(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rows(v) for key, v in value.items()}
        if isinstance(value, (tuple, list)):
            return [rows(v) for v in value]
        matches = isinstance(value, Tensor) and value.shape[:2] == kept.shape
        return value[kept] if matches else value

    return rows(output)


__all__ = ["TARGETS", "Exported", "Target", "export"]
