"""``fxshare refine``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxshare
from fxshare.cli.compile import check_free, save_checked
from fxshare.cli.option_groups import Data, spread
from fxshare.cli.options import (
    AllowMissing,
    AsJson,
    Debug,
    Length,
    NoBos,
    Padded,
    Quiet,
    RowsOfABatch,
    Samples,
    Seed,
    TextKey,
    Tokens,
    Verbose,
)
from fxshare.cli.output import Result, note
from fxshare.cli.ranks import is_first

if TYPE_CHECKING:
    from fxshare.data.batches import Batch
    from fxshare.loading.names import LoadedModel

_INTERRUPTED = 130


class Steps(str, Enum):
    """Values of ``--optimiser``."""

    ADAMW = "adamw"
    MUON = "muon"


class By(str, Enum):
    """Values of ``--objective``."""

    KL = "kl"
    CE = "ce"
    HIDDEN = "hidden"
    BLOCKS = "blocks"


@dataclass(frozen=True)
class Windows:
    """How data is cut into samples: as for ``compile``."""

    tokens: Tokens = None
    samples: Samples = None
    text_key: TextKey = None
    padded: Padded = False
    length: Length = None
    batch_size: RowsOfABatch = None
    seed: Seed = 0
    no_bos: NoBos = False

    def of(self, spec: str, loaded: LoadedModel) -> list[Batch]:
        """The batches of a source."""
        found = Data(calibration=spec, **vars(self)).batches(loaded)
        assert found is not None
        return found

    def parted(
        self, spec: str, apart: str | None, loaded: LoadedModel
    ) -> tuple[list[Batch], list[Batch] | None]:
        """The batches to train on, and those to measure on: of a source of their own or, of padded
        texts, a tenth of the texts; of the others pieces are trained on too. None: not divided."""
        if apart is not None:
            return self.of(spec, loaded), self.of(apart, loaded)
        if not self.padded:
            return self.of(spec, loaded), None
        return Data(calibration=spec, **vars(self)).batches_to_refine_on(loaded)


@dataclass(frozen=True)
class Training:
    """How it is trained."""

    minutes: Annotated[
        float | None,
        typer.Option(metavar="M", help="How long it may take. This or --steps is needed."),
    ] = None
    steps: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="So many steps at most.")
    ] = None
    objective: Annotated[
        By | None,
        typer.Option(
            help="kl: the divergence from the teacher's logits. hidden: the distance to its "
            "outputs. ce: the data's own loss. blocks: one block after the other. Default: kl for "
            "language models, hidden for others.",
            show_default=False,
        ),
    ] = None
    also: Annotated[
        str | None,
        typer.Option(metavar="KINDS", help="Trained beside the factors: norms, biases or both."),
    ] = None
    optimiser: Annotated[
        Steps,
        typer.Option(
            help="muon: for matrices, AdamW for the rest; its steps take longer and may bring more."
        ),
    ] = Steps.ADAMW
    temperature: Annotated[
        float, typer.Option(metavar="T", help="Of both distributions, for kl.")
    ] = 1.0
    data_weight: Annotated[
        float, typer.Option(metavar="W", help="The share of the data's own loss in kl, 0 to 1.")
    ] = 0.0
    pool_weight: Annotated[
        float,
        typer.Option(
            metavar="W",
            help="The share of the distance between means over tokens (sentence embeddings) in "
            "hidden, 0 to 1.",
        ),
    ] = 0.0
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Relative to each tensor's size. Default: the best of some that are tried.",
        ),
    ] = None
    accumulate: Annotated[int, typer.Option(min=1, metavar="N", help="Batches for one step.")] = 1
    recompute: Annotated[
        bool | None,
        typer.Option(
            "--recompute/--no-recompute",
            help="Compute what is inside a layer again in the backward pass, for less memory. "
            "Default: where activations take more than half of what is free.",
            show_default=False,
        ),
    ] = None
    shard: Annotated[
        bool,
        typer.Option(
            "--shard",
            help="Of several processes each keeps a part of what is trained, of its gradients and "
            "of the optimiser's state.",
        ),
    ] = False

    @property
    def keywords(self) -> dict[str, Any]:
        """As keywords of :func:`fxshare.refine`."""
        names = [] if self.also is None else [name.strip() for name in self.also.split(",")]
        objective = None if self.objective is None else self.objective.value
        return {
            **vars(self),
            "objective": objective,
            "also": tuple(names),
            "optimiser": self.optimiser.value,
        }

    def check(self) -> None:
        """A ``ConfigError`` before anything is loaded."""
        from fxshare.refining.options import RefineOptions, also_of

        if self.minutes is None and self.steps is None:
            raise fxshare.errors.ConfigError(
                "expected --minutes M or --steps N, found neither; say how long it may take"
            )
        RefineOptions(**{**self.keywords, "also": also_of(self.keywords["also"])})


@spread
def refine_model(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A folder that fxshare saved.")],
    teacher: Annotated[
        str,
        typer.Option(metavar="MODEL", help="The model that it was compiled from.", show_default=""),
    ],
    data: Annotated[
        str,
        typer.Option(metavar="SPEC", help="Data to train on (see 'eval --data').", show_default=""),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Save the result here.", show_default=""
        ),
    ],
    *,
    training: Training,
    windows: Windows,
    held_out: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="Data to measure on along the way. Default: a tenth of --data, drawn by the seed; "
            "of --padded texts, of whose others pieces are trained on too.",
        ),
    ] = None,
    second: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Another corpus, measured before and after."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            metavar="DIR",
            help="Keep checkpoints here: a run that was ended goes on from the last one.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Keep checkpoints in DIR.work beside -o DIR, and go on from there."
        ),
    ] = False,
    draw: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the held-out loss against seconds: .svg, .png or .pdf. Needs "
            "'fxshare[viz]'.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace an output folder of fxshare.")
    ] = False,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
    debug: Debug = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> Result:
    """Train the factors of a saved model towards the original's outputs, and save the result.

    Plan and size stay; the state that is best on held-out data is saved, the first one included.
    Ctrl-C saves the best state so far (exit code 130).

    \b
    Examples:
      fxshare refine out/ --teacher path/to/gpt2 --data wiki.txt --minutes 10 -o better/
      fxshare refine out/ --teacher path/to/gpt2 --data wiki.txt --minutes 60 -o better/ --resume
    """
    del as_json, debug, verbose, quiet
    from fxshare.loading.names import is_saved, load_model

    training.check()
    if not is_saved(folder):
        raise fxshare.errors.ConfigError(
            f"{folder}: expected a folder that 'fxshare compile -o' or fxshare.save wrote; what is "
            "refined is a compiled model"
        )
    check_free(output, force, work)
    if draw is not None:
        from fxshare.views.figure import check_drawable

        check_drawable(draw)
    original = load_model(teacher, allow_missing=allow_missing)
    compiled = load_model(folder, original=original.model, allow_missing=allow_missing)
    read = (
        original
        if original.tokenizer is not None
        else replace(original, tokenizer=compiled.tokenizer)
    )
    batches, apart = windows.parted(data, held_out, read)
    note(f"refining {folder} ({type(original.model).__name__})")
    gm = fxshare.refine(
        compiled.model,
        original.model,
        batches,
        **training.keywords,
        heldout=apart,
        second=None if second is None else windows.of(second, read),
        seed=windows.seed,
        work=output.with_name(f"{output.name}.work") if resume and work is None else work,
    )
    done = gm.fxshare.refined[-1]
    if not is_first():
        return Result({}, "")
    keeping = compiled if compiled.tokenizer is not None else read
    save_checked(gm, replace(keeping, model=original.model), batches[0], output, force)
    if draw is not None:
        from fxshare.views.curve import draw_curve

        draw_curve(done, draw)
    text = f"{done}\nsaved to {output}"
    if done.stopped == "interrupted":
        text = f"interrupted at step {done.steps}; {text}"
    found = {**asdict(done), "saved_to": str(output)}
    return Result(found, text, code=_INTERRUPTED if done.stopped == "interrupted" else 0)
