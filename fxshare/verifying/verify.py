"""Is the rewritten model what it says it is? Numerical comparison with the original."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxshare.base.numerics import Distance, relative_error, tolerance, worst
from fxshare.base.progress import stage
from fxshare.base.surroundings import plain_surroundings
from fxshare.capture import Call, device_of, dtype_of, quiet, resized, tensors
from fxshare.capture.adapted import runnable
from fxshare.capture.call import as_float32
from fxshare.errors import CheckFailed, MatchError
from fxshare.models.wrapped import unwrapped
from fxshare.plans.plan import Plan
from fxshare.result.module import record_of
from fxshare.result.products import site_bias
from fxshare.sites.tensors import site_tensors
from fxshare.verifying.evaluated import evaluated, only_in_its_dtype
from fxshare.verifying.multiplied import Products, is_large, multiplied_out
from passes.errors import FxShareError
from passes.graph.modes import cast_dtypes

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Check:
    """One comparison. ``limit`` is what rounding explains; ``original`` the distance from the
    uncompressed model, for information (in exact mode the same as ``distance``)."""

    what: str
    distance: Distance
    limit: float
    original: float

    @property
    def ok(self) -> bool:
        """Whether the distance is within the limit."""
        return self.distance.relative <= self.limit


@dataclass(frozen=True)
class Verification:
    """All comparisons. In exact mode the outputs are compared with the original's; in the sharing
    mode with those of the original in which every matched weight is multiplied out."""

    mode: str
    dtype: str
    depth: int
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether every check is within its limit."""
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        """The result as plain data."""
        checks = [{**asdict(c), "ok": c.ok} for c in self.checks]
        return {
            "ok": self.ok,
            "mode": self.mode,
            "dtype": self.dtype,
            "depth": self.depth,
            "checks": checks,
        }

    def __str__(self) -> str:
        head = (
            f"{'equal' if self.ok else 'DIFFERENT'}: {self.mode} mode, compared in {self.dtype} at "
            f"depth {self.depth}"
        )
        rows = [
            f"  {'ok  ' if c.ok else 'FAIL'} {c.what}: {c.distance}; limit {c.limit:.1e}"
            + ("" if self.mode == "exact" else f"; from the original {c.original:.2e}")
            for c in self.checks
        ]
        return "\n".join([head, *rows])


@stage("verify", _LOG)
@plain_surroundings()
def verify(
    model: nn.Module,
    gm: nn.Module,
    inputs: Sequence[object] | object = None,
    *,
    seed: int = 0,
    strict: bool = False,
) -> Verification:
    """Compare a compiled model with the model it was made from.

    ``inputs`` is one batch or a list of batches; beside them random ones of the captured form are
    tried, at the captured shapes and at batch 1. Half-precision models are compared in float32,
    where rounding hides less, unless their code has a path for that dtype alone. In the sharing
    mode the slices' weights are compared as well: the relative error of each must be the one that
    was recorded when it was factorised.

    Raises :class:`CheckFailed` when ``strict`` and a check fails, and :class:`FxShareError` when
    there is nothing to compare on. The models, the RNG and the grad mode stay as they are.
    """
    record = record_of(gm)
    model = unwrapped(model)
    check_sites(model, record.plan)
    model = runnable(model)
    calls = _calls(model, gm, inputs, seed)
    if not calls:
        raise FxShareError(
            "nothing to verify on: the model was captured without example inputs; give inputs=..."
        )
    half = dtype_of(model) in (torch.float16, torch.bfloat16) and not only_in_its_dtype(gm)
    left, right = evaluated(model, half), evaluated(gm, half)
    depth = 2 * len(record.plan.sites) + 1
    dtype = torch.float32 if half else dtype_of(model)
    if isinstance(gm, fx.GraphModule):  # what is rounded further under autocast is equal to that
        dtype = max((dtype, *cast_dtypes(gm.graph)), key=lambda d: torch.finfo(d).eps)
    limit = tolerance(dtype, depth)
    if half:
        calls = [(what, as_float32(call)) for what, call in calls]
    by_call = record.plan.mode != "exact" and is_large(model, record.plan)
    products = Products(gm, record.plan, again=by_call)
    if record.plan.mode == "exact":
        checks = _outputs(left, left, right, calls, limit)
    else:
        checks = _outputs(
            multiplied_out(left, gm, products, by_call=by_call), left, right, calls, limit
        )
        if by_call and not all(check.ok for check in checks):
            # the model may read a weight without calling its module
            checks = _outputs(multiplied_out(left, gm, products), left, right, calls, limit)
    checks += [_weights(model, gm, products), _biases(model, gm), *_others(model, gm)]
    result = Verification(record.plan.mode, str(dtype).removeprefix("torch."), depth, tuple(checks))
    if strict and not result.ok:
        raise CheckFailed(str(result))
    return result


def _outputs(
    left: nn.Module,
    original: nn.Module,
    right: nn.Module,
    calls: Sequence[tuple[str, Call]],
    limit: float,
) -> list[Check]:
    """The outputs of ``right`` compared with those of ``left``, and with the ``original``'s."""
    checks = []
    for what, call in calls:
        with quiet():
            expected = left(**call)
            found = right(**call)
            exact = expected if original is left else original(**call)
        distance = worst(expected, found)
        from_original = distance if original is left else worst(exact, found)
        checks.append(Check(what, distance, limit, from_original.relative))
    return checks


def check_sites(model: nn.Module, plan: Plan) -> None:
    """:class:`FxShareError` where ``model`` has not the weights that the plan is about."""
    if not isinstance(model, nn.Module):
        raise FxShareError(
            f"expected the model that was compiled, an nn.Module, found "
            f"{_described(model)}; load it first"
        )
    for site in plan.sites:
        try:
            found = f"one of {tuple(site_tensors(model, site)[0].shape)}"
        except MatchError:
            found = f"no weight {site.name!r}"
        if found == f"one of {(site.out_features, site.in_features)}":
            continue
        raise FxShareError(
            f"{type(model).__name__} is not the model that was compiled: expected "
            f"{site.name!r} to be a linear ({site.out_features}, {site.in_features}), found {found}"
        )


def _described(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"{type(value).__name__}"


def _calls(
    model: nn.Module, gm: nn.Module, inputs: Sequence[object] | object, seed: int
) -> list[tuple[str, Call]]:
    device = device_of(model)
    given: list[object] = []
    if inputs is not None:
        given = list(inputs) if isinstance(inputs, list) else [inputs]
    record = record_of(gm)
    caller = record.caller(model)
    calls: list[tuple[str, Call]] = []
    for number, batch in enumerate(given):
        call = caller(batch)
        calls.append((f"given {number} {_shape(call)}", call))
    for number in range(len(record.inputs)):
        call = record.random_call(number, seed=seed + number, device=device)
        calls.append((f"random {_shape(call)}", call))
    if len(record.inputs) > 1:
        call = resized(record.random_call(0, seed=seed + 7, device=device), batch=1)
        if _takes(model, call):
            calls.append((f"random {_shape(call)}", call))
    return calls


def _takes(model: nn.Module, call: Call) -> bool:
    """Whether the original takes a call of one row, which nobody has tried."""
    try:
        with quiet():
            model(**call)
    except Exception as error:
        _LOG.debug("a call of one row is left out: %s", error)
        return False
    return True


def _shape(call: Call) -> str:
    return " ".join("×".join(map(str, t.shape)) for t in tensors(call)[:1])


def _weights(model: nn.Module, gm: nn.Module, products: Mapping[str, Tensor]) -> Check:
    """The worst deviation of a slice's relative error from the recorded one."""
    record = record_of(gm)
    result = Distance(0.0, 0.0, 0.0, 0.0, "slice", ())
    for site in record.plan.sites:
        weight_OI, _ = site_tensors(model, site)
        product_OI = products[site.name]
        for s in site.slices:
            # a slice outside every group still has its own rows
            expected = record.slice_errors.get(s.name, 0.0)
            rows = slice(s.start, s.stop)
            found = relative_error(weight_OI[rows], product_OI[rows].double())
            gap = abs(found - expected)
            if not gap <= result.relative:
                result = Distance(gap, gap, expected, found, f"slice {s.name}", (s.out_features,))
    return Check("relative error of each slice's weight", result, _limit(gm), result.found)


def _limit(gm: nn.Module) -> float:
    """What may lie between a recorded error and the same error measured again.

    Both are float64 sums over the stored numbers, whatever those are rounded to; 64 eps of a half
    precision would let a basis of the wrong group pass. A cast after compiling rounds once more.
    """
    dtype = dtype_of(gm)
    as_recorded = str(dtype).removeprefix("torch.") == record_of(gm).report.dtype
    half = dtype in (torch.float16, torch.bfloat16)
    return 64 * torch.finfo(torch.float32 if as_recorded and half else dtype).eps


def _biases(model: nn.Module, gm: nn.Module) -> Check:
    """The worst deviation of a slice's shift of the bias from the recorded one."""
    record = record_of(gm)
    result = Distance(0.0, 0.0, 0.0, 0.0, "bias", ())
    for site in record.plan.sites:
        _, bias = site_tensors(model, site)
        found = site_bias(gm, site)
        if bias is None and found is None:
            continue
        size = 0.0 if bias is None else max(float(bias.detach().double().norm()), 1e-30)
        for s in site.slices:
            expected = record.bias_shifts.get(s.name, 0.0)
            gap = math.inf
            moved = math.nan
            if bias is not None and found is not None:
                rows = slice(s.start, s.stop)
                moved = float((found[rows].double() - bias.detach()[rows].double()).norm())
                gap = abs(moved - expected) / size
            if not gap <= result.relative:
                result = Distance(gap, gap, expected, moved, f"bias of {s.name}", (s.out_features,))
    return Check("shift of each slice's bias", result, _limit(gm), result.found)


def _others(model: nn.Module, gm: nn.Module) -> list[Check]:
    """The worst deviation of the shift of a parameter outside of all sites, where refining trained
    some."""
    shifts = record_of(gm).other_shifts
    if not shifts:
        return []
    then = dict(model.named_parameters(remove_duplicate=False))
    now = dict(gm.named_parameters(remove_duplicate=False))
    result = Distance(0.0, 0.0, 0.0, 0.0, "parameter", ())
    for name, expected in shifts.items():
        gap = moved = math.inf
        if name in then and name in now:
            old = then[name].detach().double()
            moved = float((now[name].detach().to(old.device).double() - old).norm())
            gap = abs(moved - expected) / max(float(old.norm()), 1e-30)
        if not gap <= result.relative:
            result = Distance(gap, gap, expected, moved, name, ())
    return [Check("shift of each other refined parameter", result, _limit(gm), result.found)]
