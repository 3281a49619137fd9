"""A compiled model is called as the original is, or says which argument is not as it was captured.

The graph is the path of one example: what decides about the path beside the numbers in tensors is
held, for every front end, after a copy, a lowering and a folder, and under ``torch.compile``.
"""

from __future__ import annotations

import copy
import enum
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxshare
from fxshare.base.numerics import tolerance, worst
from fxshare.capture.forms import form_of, matches, shown
from fxshare.errors import CalibrationError, CaptureError, GuardError

CONFIG = {"weight_types": {"w": {"pattern": r"first|second"}}}
GRAPHS = ("fx", "export")
X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
Y = torch.randn(3, 6, 8, generator=torch.Generator().manual_seed(1))
IDS = torch.arange(12).view(2, 6)


class Net(nn.Module):
    """Two linears; every other model here calls them in its own way."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def run(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(torch.tanh(self.first(x)))
        return y


class Options(Net):
    def forward(
        self,
        parts: list[Tensor],
        scale: float = 1.0,
        mode: str = "plain",
        factors: tuple[int, ...] = (1, 2),
        *,
        flag: bool = False,
        extra: Tensor | None = None,
    ) -> Tensor:
        y = self.run(sum(part * n for n, part in enumerate(parts, 1)))  # type: ignore[arg-type]
        y = y * scale * factors[0] * (5 if mode == "five" else 1) + int(flag)
        return y if extra is None else y + extra


class Color(enum.Enum):
    RED = 1
    BLUE = 2


@dataclass(frozen=True)
class Batch:
    x: Tensor
    mode: str = "a"
    y: Tensor | None = None


class Batched(Net):
    def forward(self, batch: Batch) -> Tensor:
        y = self.run(batch.x) * (2 if batch.mode == "a" else 3)
        return y if batch.y is None else y + batch.y


class Nested(Net):
    def forward(self, d: dict[str, Any]) -> Tensor:
        return self.run(d["a"] - 2 * d["b"][0][0])


class Keywords(Net):
    def forward(self, x: Tensor, color: Color = Color.RED, **more: Any) -> Tensor:
        y = self.run(x) * (1 if color is Color.RED else 2)
        return y + more.get("shift", 0)


class Masked(Net):
    """A model of tokens for which ``meaning`` says what a mask does."""

    def __init__(self, meaning: str = "keep") -> None:
        super().__init__()
        self.embed, self.meaning = nn.Embedding(12, 8), meaning

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        y = self.embed(input_ids)
        if attention_mask is not None:
            mask = attention_mask[..., None].to(y.dtype)
            y = y * mask if self.meaning == "keep" else y + mask
        return self.run(y)


def compiled(model: nn.Module, example: object, capture: str = "auto") -> Any:
    return fxshare.compile(model.eval(), CONFIG, example=example, capture=capture)


def assert_same(model: nn.Module, gm: nn.Module, *args: Any, **kwargs: Any) -> None:
    with torch.no_grad():
        distance = worst(model(*args, **kwargs), gm(*args, **kwargs))
    assert distance.relative <= tolerance(torch.float32, 4), distance


def refused(reason: str) -> Any:
    return pytest.raises(GuardError, match=re.escape(reason))


def lowered(gm: Any) -> Any:
    return fxshare.lower(gm, prefer="speed")


def through_a_folder(gm: Any, folder: Path, model: nn.Module) -> Any:
    fxshare.save(gm, folder / "saved")
    return fxshare.load(folder / "saved", model=model)


@pytest.fixture(scope="module", params=GRAPHS)
def options(request: pytest.FixtureRequest) -> tuple[nn.Module, Any]:
    model = Options().eval()
    return model, compiled(model, {"parts": [X, X], "mode": "five"}, request.param)


@pytest.fixture(scope="module")
def everywhere(
    options: tuple[nn.Module, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    model, gm = options
    folder = tmp_path_factory.mktemp("contract")
    loaded = through_a_folder(gm, folder, model)
    return {
        "as compiled": gm,
        "lowered": lowered(gm),
        "copied": copy.deepcopy(gm),
        "loaded": loaded,
    }


# Options and containers


def test_what_was_captured_is_what_the_model_computes(
    options: tuple[nn.Module, Any], everywhere: dict[str, Any]
) -> None:
    for gm in everywhere.values():
        assert_same(options[0], gm, [Y, Y], mode="five")
        assert_same(options[0], gm, [Y, Y], 1.0, "five", (1, 2), flag=False, extra=None)
        assert_same(options[0], gm, parts=[Y, Y], mode="five", scale=np.float64(1.0))


def test_a_call_of_another_form_is_refused_with_what_was_captured_and_the_way_out(
    options: tuple[nn.Module, Any], everywhere: dict[str, Any]
) -> None:
    two = "parts=[a tensor, a tensor]"
    for gm in everywhere.values():
        for parts in ([Y, Y, Y], [Y], (Y, Y), Y, None, [Y, None]):
            with refused(two):
                gm(parts, mode="five")
        with refused("without it Options would take 'plain'"):
            gm([Y, Y])
        with refused("mode='five', and the graph has no other path; this call gives 'plain'"):
            gm([Y, Y], mode="plain")
        for options_given, captured in (
            ({"scale": 2.0}, "scale=1.0"),
            ({"scale": 1}, "scale=1.0"),
            ({"factors": (3, 2)}, "factors=(1, 2)"),
            ({"factors": [1, 2]}, "factors=(1, 2)"),
            ({"flag": True}, "flag=False"),
            ({"flag": 0}, "flag=False"),
            ({"extra": Y}, "extra=None"),
        ):
            with refused(captured) as caught:
                gm([Y, Y], mode="five", **options_given)
            assert "example=..." in str(caught.value)
            assert "capture='modules'" in str(caught.value)


def test_misused_arguments_are_refused_by_name(everywhere: dict[str, Any]) -> None:
    for gm in everywhere.values():
        with refused("argument 'parts' is missing: the model was captured with parts="):
            gm(mode="five")
        with refused("did you mean 'mode'?"):
            gm([Y, Y], modes="five")
        with refused("takes 4: parts, scale, mode, factors; it takes flag, extra by name"):
            gm([Y, Y], 1.0, "five", (1, 2), True)
        with refused("argument 'parts' of Options was given twice"):
            gm([Y, Y], parts=[Y, Y], mode="five")


def test_a_compiler_meets_the_same_guards(options: tuple[nn.Module, Any]) -> None:
    model, gm = options
    torch._dynamo.reset()
    fast = torch.compile(gm, backend="eager", fullgraph=True)
    assert_same(model, fast, [Y, Y], mode="five")
    for args, kwargs in (
        (([Y, Y],), {}),
        (([Y, Y, Y],), {"mode": "five"}),
        (([Y, Y],), {"mode": "five", "factors": (3, 2)}),
    ):
        with pytest.raises(Exception, match="captured with"):
            fast(*args, **kwargs)


@pytest.mark.parametrize("capture", GRAPHS)
def test_dictionaries_and_lists_in_them(capture: str) -> None:
    model = Nested().eval()
    gm = compiled(model, {"d": {"a": X, "b": [[X]]}}, capture)
    assert_same(model, gm, {"a": Y, "b": [[Y]]})
    for other in (
        {"a": Y, "b": [[Y]], "c": Y},
        {"a": Y, "e": [[Y]]},
        {"a": Y},
        {"a": Y, "b": [[Y, Y]]},
        {"a": Y, "b": [[Y], []]},
        {"b": [[Y]], "a": Y},
        OrderedDict(a=Y, b=[[Y]]),
    ):
        with refused("d={'a': a tensor, 'b': [[a tensor]]}"):
            gm(other)


def test_tensors_in_a_data_class() -> None:
    model = Batched().eval()
    gm = compiled(model, Batch(X), "fx")
    assert_same(model, gm, Batch(Y))
    for other in (Batch(Y, "b"), Batch(Y, y=Y)):
        with refused("batch=Batch(x=a tensor, mode='a', y=None)"):
            gm(other)
    with pytest.raises(fxshare.FxShareError, match="a Batch, which a folder cannot describe"):
        fxshare.save(gm, "nowhere")


def test_what_no_graph_can_hold_is_left_to_the_models_own_code() -> None:
    class Held:
        def __init__(self, x: Tensor) -> None:
            self.x = x

    class Opaque(Net):
        def forward(self, x: Tensor, held: object = None) -> Tensor:
            return self.run(x) if held is None else self.run(held.x)  # type: ignore[attr-defined]

    model = Opaque().eval()
    gm = compiled(model, {"x": X, "held": Held(X)})
    assert gm.fxshare.front_end == "modules"
    assert "can hold no guard on a" in gm.fxshare.report.notes[0]
    assert_same(model, gm, Y, Held(2 * Y))
    for capture in GRAPHS:
        with pytest.raises(CaptureError, match=r"argument 'held' of Opaque.*capture='modules'"):
            compiled(model, {"x": X, "held": Held(X)}, capture)


# Keywords that go into **kwargs, and defaults that code cannot hold


@pytest.mark.parametrize("capture", GRAPHS)
def test_keywords_that_forward_does_not_name(capture: str) -> None:
    model = Keywords().eval()
    gm = compiled(model, {"x": X, "shift": torch.ones(8)}, capture)
    assert_same(model, gm, Y, shift=2 * torch.ones(8))
    assert_same(model, gm, Y, Color.RED, shift=torch.ones(8))
    with refused("argument 'shift' is missing"):
        gm(Y)
    with refused("color=Color.RED"):
        gm(Y, Color.BLUE, shift=torch.ones(8))
    plain = compiled(model, X, capture)
    assert_same(model, plain, Y)
    with refused("argument 'shift': the model was captured without it"):
        plain(Y, shift=torch.ones(8))


@pytest.mark.parametrize("name", ["class", "a b", "self.first", "__x__"])
def test_keywords_that_no_code_can_hold(name: str) -> None:
    class Any_(Net):
        def forward(self, x: Tensor, **more: Tensor) -> Tensor:
            return self.run(x + more[name])

    with pytest.raises(CaptureError, match="expected a name that a function's argument can have"):
        compiled(Any_(), {"x": X, name: X}, "fx")
    gm = compiled(Any_(), {"x": X, name: X})
    assert gm.fxshare.front_end == "modules"
    assert_same(Any_().eval(), gm, Y, **{name: Y})


def test_an_argument_with_a_name_that_the_code_reads() -> None:
    class Shadow(Net):
        def forward(self, x: Tensor, torch: Tensor) -> Tensor:
            return self.run(x + torch)

    with pytest.raises(CaptureError, match="argument 'torch' of Shadow has the name of what"):
        compiled(Shadow(), (X, X), "fx")


@pytest.mark.parametrize("capture", GRAPHS)
def test_a_required_argument_after_optional_ones(capture: str) -> None:
    class Late(Net):
        def forward(self, gm: Tensor, input: int = 1, *, y: Tensor) -> Tensor:
            return self.run(gm * input + y)

    model = Late().eval()
    gm = compiled(model, {"gm": X, "y": X}, capture)
    assert_same(model, gm, Y, y=Y)
    with refused("argument 'y' is missing"):
        gm(Y)
    with refused("argument 'y' is None, and the model was captured with a tensor"):
        gm(Y, y=None)


@pytest.mark.parametrize("example", [X, (X, X)], ids=["one", "two"])
def test_what_has_no_names_is_refused_with_the_way_out(example: object) -> None:
    class Position(Net):
        def forward(self, x: Tensor, /, y: Tensor | None = None) -> Tensor:
            return self.run(x if y is None else x + y)

    class Rest(Net):
        def forward(self, *parts: Tensor) -> Tensor:
            return self.run(sum(parts))  # type: ignore[arg-type]

    class More(Net):
        def forward(self, x: Tensor, *more: Tensor) -> Tensor:
            return self.run(sum(more, x))

    with pytest.raises(CalibrationError, match=r"takes 'x' by position only.*without '/'"):
        compiled(Position(), example)
    with pytest.raises(
        CalibrationError, match=r"all of its inputs as \*parts, by position, and an"
    ):
        compiled(Rest(), example)
    with pytest.raises(CalibrationError, match=r"the entry 'parts', but Rest.*capture='modules'"):
        compiled(Rest(), {"parts": X})
    with pytest.raises(CalibrationError, match=r"takes \['x'\] by name and the rest as \*more"):
        compiled(More(), (X, X, X))
    with pytest.raises(CalibrationError, match=r"entry 'y', but More.*the rest as \*more"):
        compiled(More(), {"x": X, "y": X})
    assert_same(More().eval(), compiled(More(), X), Y)
    assert_same(Rest().eval(), compiled(Rest(), None, "modules"), Y, Y)


# Masks


@pytest.mark.parametrize("capture", GRAPHS)
@pytest.mark.parametrize("given", [False, True], ids=["filled in", "given"])
def test_a_mask_stays_optional(capture: str, given: bool, tmp_path: Path) -> None:
    model = Masked().eval()
    ones = torch.ones_like(IDS)
    gm = compiled(model, {"input_ids": IDS, "attention_mask": ones} if given else IDS, capture)
    other, mask = IDS[:, :5].repeat(2, 1), torch.ones_like(IDS[:, :5].repeat(2, 1))
    mask[0, 2:] = 0
    for each in (gm, lowered(gm), through_a_folder(gm, tmp_path, model)):
        assert_same(model, each, other)
        assert_same(model, each, other, None)
        assert_same(model, each, other, mask)


@pytest.mark.parametrize("capture", GRAPHS)
def test_where_no_mask_means_another_thing_than_ones(capture: str, tmp_path: Path) -> None:
    model = Masked("add").eval()
    without = compiled(model, IDS, capture)
    assert_same(model, without, IDS[:, :4])
    with refused("attention_mask=None"):
        without(IDS, torch.ones_like(IDS))
    ones = torch.ones_like(IDS)
    gm = compiled(model, {"input_ids": IDS, "attention_mask": ones}, capture)
    for each in (gm, through_a_folder(gm, tmp_path, model)):
        assert_same(model, each, IDS, 3 * ones)
        for call in ({"input_ids": IDS}, {"input_ids": IDS, "attention_mask": None}):
            with refused("argument 'attention_mask' is"):
                each(**call)


# Data, which brings no options along


def test_data_is_run_with_the_options_of_the_example() -> None:
    model = Options().eval()
    sharing = {**CONFIG, "group_size": 1, "compression_rate": 0.3}
    data = [{"parts": [X, X]}, {"parts": [Y, Y]}] * 2
    example = {"parts": [X, X], "mode": "five"}
    gm = fxshare.compile(model, sharing, example=example, calibration=data)
    assert fxshare.verify(model, gm, data[1]).ok
    with refused("mode='five'"):
        gm([Y, Y])


# Forms


FORMS: tuple[tuple[Callable[[], object], str], ...] = (
    (lambda: True, "True"),
    (lambda: 1, "1"),
    (lambda: 1.0, "1.0"),
    (lambda: float("nan"), "nan"),
    (lambda: "1", "'1'"),
    (lambda: None, "None"),
    (lambda: [1], "[1]"),
    (lambda: (1,), "(1,)"),
    (lambda: {1}, "{1}"),
    (lambda: {"a": 1}, "{'a': 1}"),
    (lambda: Color.RED, "Color.RED"),
    (lambda: torch.float16, "torch.float16"),
    (lambda: torch.relu, "relu"),
    (lambda: nn.functional.silu, "silu"),
    (lambda: slice(1, None), "slice(1, None, None)"),
    (lambda: X, "a tensor"),
    (lambda: [X], "[a tensor]"),
)


def test_each_form_is_that_of_its_own_value_only() -> None:
    made = [(make, form_of(make())) for make, _ in FORMS]
    for make, form in made:
        assert [other for other, _ in made if matches(other(), form)] == [make]
    assert [shown(form) for _, form in made] == [text for _, text in FORMS]


def _lambdas() -> Iterator[Callable[[int], int]]:
    for n in (1, 2):
        yield lambda x, n=n: x + n  # type: ignore[misc]


def test_two_lambdas_of_one_name_are_not_taken_for_each_other() -> None:
    one, other = _lambdas()
    assert one.__qualname__ == other.__qualname__

    class Applying(Net):
        def forward(self, x: Tensor, f: Callable[[Any], Any] = one) -> Tensor:
            return self.run(f(x))

    gm = compiled(Applying(), X, "fx")
    assert_same(Applying().eval(), gm, Y)
    with refused("argument 'f'"):
        gm(Y, other)
