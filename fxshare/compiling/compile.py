"""``fxshare.compile`` and ``fxshare.plan``: the stages, one after the other."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable, Sequence

from torch import nn

from fxshare.base.memory import give_back
from fxshare.base.processes import here, in_step
from fxshare.base.progress import stage
from fxshare.base.surroundings import outside_inference, plain_surroundings
from fxshare.calibration.losses import Loss
from fxshare.calibration.statistics import Statistics
from fxshare.capture import Mode, device_of
from fxshare.compiling.budgeted import within_budget
from fxshare.compiling.build import built
from fxshare.compiling.foretold import foretell
from fxshare.compiling.given import check_plan, check_plan_units, check_values, named_passes
from fxshare.compiling.stages import Stages, configuration, prepare, working
from fxshare.config import ConfigSource
from fxshare.errors import CalibrationError
from fxshare.factors.codes import CodedSlices
from fxshare.factors.realise import (
    Factorised,
    planned_factors,
    remade_factors,
    sharing_factors,
)
from fxshare.generation.shell import generate
from fxshare.models.wrapped import unwrapped
from fxshare.planning.kinds.named import carried_out, kinds_named
from fxshare.planning.rules import make_plan
from fxshare.planning.work import Work
from fxshare.plans.plan import Plan
from fxshare.result.face import Verbs
from fxshare.result.module import Compiled, attach
from fxshare.rewriting.lowering import lower_module, with_lowered
from fxshare.sites.tensors import dense_weights, site_biases
from fxshare.store.pretrained import save_pretrained
from fxshare.verifying.verify import verify
from passes import Pass

_LOG = logging.getLogger(__name__)


@plain_surroundings()
@in_step()
def compile(
    model: nn.Module,
    cfg: ConfigSource | Sequence[ConfigSource] | None = None,
    *,
    calibration: Iterable[object] | None = None,
    example: object = None,
    plan: Plan | None = None,
    capture: Mode | None = None,
    passes: Sequence[Pass] = (),
    loss: Loss | None = None,
    copy: bool = False,
    check: bool = True,
    seed: int = 0,
    work: str | os.PathLike[str] | None = None,
) -> Compiled:
    """Rewrite a model under a configuration; the model itself is never touched.

    Parameters
    ----------
    model
        Any ``nn.Module``. Parameters that no pattern matches are shared with the result. What is
        inside of ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel`` is compiled
        without them.
    cfg
        A :class:`ShareConfig`, a mapping, a path to YAML, or a list of these (later ones win).
        Where None, what :func:`fxshare.init` finds in the model: exact mode. A budget goes with it
        as ``[fxshare.init(model), {"budget": {"params_kept": 0.8}}]``.
    calibration
        Batches: tensors, tuples, or mappings with an optional ``attention_mask``. What is no list
        is gone through once; where it is needed again (a budget, several passes under a limit of
        memory, a work folder) what exceeds 64 MB of it is kept in files meanwhile.
        Without it the sharing mode is a plain SVD of the weights.
    example
        One batch to capture with; the first calibration batch where it is not given. Give one with
        labels if the result is to return a loss.
    plan
        A plan to realise instead of making one (:func:`fxshare.plan`, or a file edited by hand).
    capture
        Which front end; the configuration's where None.
    passes
        Passes of your own, after those named in the configuration.
    loss
        For a budget: ``(output, batch) -> scalar``, summed over tokens, whose increase the planner
        minimises. Next-token cross-entropy for language models where None, else the output's
        energy.
    copy
        Clone the parameters that are not rewritten, so that training the result leaves the model
        alone.
    check
        Verify the result on small random inputs before handing it out.
    seed
        Of the random choices: sampled labels.
    work
        A folder for what is computed on the way: a run that was ended goes on from there, and
        another budget needs no second calibration of the dense model. It holds for one model, one
        set of data and one matching configuration; the factors of a plan that was made in it need
        no data.

    Inside of a process group of torch.distributed all ranks call this with the same arguments, the
    whole calibration data included; they share the work, and each returns the whole result.

    Returns
    -------
    Compiled
        A :class:`ShareModule` (a ``torch.fx.GraphModule``) with the signature of ``model.forward``;
        for capture at module granularity a copy of the model's own class. Either has ``.fxshare``.

    Raises
    ------
    FxShareError
        One of its kinds, naming what was expected, what was found, and the way out.
    """
    start = time.perf_counter()
    model = outside_inference(unwrapped(model))
    stages = prepare(model, configuration(model, cfg), calibration, example, capture)
    cfg = stages.cfg
    own = (*named_passes(cfg), *passes)
    given = (
        None if plan is None else (plan.groups, plan.units, plan.rounded)
    )  # how long it took to make is each rank's own
    here().agree({"call": "compile", "plan": given, "passes": [type(p).__name__ for p in own]})
    if plan is None:
        foretell(stages, work)
    with working(stages, work, loss, seed) as (stages, held):
        plan, factors, statistics = _plan_and_factors(stages, plan, loss, seed, held)
    give_back(plan.dense_numbers)  # what was kept to plan with
    return finished(stages, plan, factors, statistics, own, copy=copy, check=check, start=start)


def finished(
    stages: Stages,
    plan: Plan,
    factors: Factorised,
    statistics: Statistics | None,
    own: Sequence[Pass] = (),
    *,
    copy: bool = False,
    check: bool = True,
    start: float,
) -> Compiled:
    """The compiled model of a plan and its factors, verified."""
    cfg = stages.cfg
    result, record = built(stages, plan, factors, statistics, own, copy=copy, start=start)
    if cfg.lower is not None:
        with stage("lower", _LOG):
            result, lowered = lower_module(result, cfg.lower.prefer)
        record = with_lowered(record, lowered, result)
    compiled = attach(result, record, Verbs(generate, save_pretrained))
    # a pass of the user's own may mean to change the function: then there is nothing to hold it to
    exact = all(p.exact for p in own)
    if check and exact and record.inputs and device_of(stages.model).type != "meta":
        verify(stages.model, compiled, strict=True)
    return compiled


def _plan_and_factors(
    stages: Stages, plan: Plan | None, loss: Loss | None, seed: int, work: Work | None
) -> tuple[Plan, Factorised, Statistics | None]:
    """The plan (made, or checked where it was given), and the factors that realise it."""
    model, cfg = stages.model, stages.cfg
    if plan is not None:
        check_plan(plan, stages.sites)
        check_plan_units(plan, stages.captured)
    elif cfg.mode != "planned":
        plan = make_plan(cfg, stages.sites, stages.skipped)
    weights = dense_weights(model, stages.sites if plan is None else plan.sites)
    if plan is None or not plan.is_dense:
        check_values(weights)
    if plan is None:
        budgeted = within_budget(stages, weights, loss, seed, work)
        plan, made, units = budgeted.plan, budgeted.factors, budgeted.units
        statistics: Statistics | None = budgeted.statistics
        coded = budgeted.coded
        budgeted.search = None  # no other budget is asked for, and it holds what judges plans
    elif plan.mode == "planned" and not plan.is_dense:
        statistics = stages.calibrate(gradients=True, loss=loss, seed=seed, work=work)
        if statistics is None:
            raise CalibrationError(
                "a planned plan needs calibration data to be carried out: give calibration=..."
            )
        made, units, coded = None, {}, None
    else:
        given = stages.calibrate(work=work) if plan.groups else None
        with stage("factorise", _LOG):
            return plan, sharing_factors(plan, weights, given, cfg), given
    biases = site_biases(model, plan.sites)
    with stage("factorise", _LOG):
        if made is None:
            assert statistics is not None
            made = again = remade_factors(plan, weights, biases, statistics, cfg)
            if plan.rounded:
                coded = CodedSlices(plan.dense_bits, again.spectra, cfg.planner.bias)
            units = carried_out(plan, again, kinds_named(cfg.planner.kinds))
        factors = planned_factors(plan, weights, biases, made, units, coded)
        return plan, factors, statistics
