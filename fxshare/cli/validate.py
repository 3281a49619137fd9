"""``fxshare validate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxshare
from fxshare.cli.options import AllowMissing, AsJson, Configs, Debug, Sets, config_of
from fxshare.cli.output import Result, table

if TYPE_CHECKING:
    from torch import nn

    from fxshare.compiling.shown import Shown
    from fxshare.config import ShareConfig


def validate(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="A model to match the configuration against."),
    ] = None,
    config: Configs = [],  # noqa: B006  typer reads the default, nothing changes it
    set_: Sets = None,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Result:
    """Check a configuration, alone or against a model: what it matches, counts per weight type.

    \b
    Examples:
      fxshare validate -c configs/gpt2.yaml --set group_size=2 --set compression_rate=0.8
      fxshare validate path/to/gpt2 -c configs/gpt2.yaml
    """
    del debug
    if not config and model is not None and model.endswith((".yaml", ".yml")):
        raise fxshare.errors.ConfigError(
            f"{model} stands where the model goes; give a configuration as -c {model}"
        )
    cfg = config_of(config, set_)
    head = f"valid: {cfg.mode} mode, {len(cfg.weight_types)} weight types"
    data: dict[str, Any] = {
        "valid": True,
        "mode": cfg.mode,
        "config": cfg.model_dump(mode="json"),
    }
    if model is None:
        names = ", ".join(cfg.weight_types)
        return Result(data, f"{head}: {names}\n(give a MODEL to see what they match)")
    from fxshare.loading.names import load_model

    loaded = load_model(model, allow_missing=allow_missing).model
    return _against(loaded, model, cfg, head, data)


def _against(
    model: nn.Module, name: str, cfg: ShareConfig, head: str, data: dict[str, Any]
) -> Result:
    from fxshare.compiling.shown import shown
    from fxshare.planning.rules import exact_plan, make_plan

    matching = shown(model, cfg)
    planned = cfg.mode == "planned"  # its ranks are decided by data, not here
    sites, skipped = matching.sites, matching.skipped
    plan = exact_plan(sites, skipped) if planned else make_plan(cfg, sites, skipped)
    types = [_type(name, cfg, matching) for name in cfg.weight_types]
    unmatched = _unmatched(model, matching)
    data["model"] = name
    data["types"] = types
    data["skipped"] = [s.model_dump() for s in matching.skipped]
    data["unmatched"] = unmatched
    data["by_names"] = matching.by_names or None
    data["weights"] = plan.dense_numbers
    data["stored_numbers"] = None if planned else plan.stored_numbers
    data["params_kept"] = None if planned else plan.params_kept
    header = ["weight type", "pattern", "sites", "modules", "slices", "layers", "weights"]
    rows = [
        [
            t["type"],
            t["pattern"],
            *(f"{t[key]:,}" for key in ("sites", "modules", "slices", "layers", "weights")),
        ]
        for t in types
    ]
    lines = [
        f"{head}, against {name} ({type(model).__name__})",
        f"{plan.dense_numbers:,} weights; 'fxshare plan' spends the budget on them"
        if planned
        else f"params_kept {plan.params_kept:.4f}: {plan.dense_numbers:,} weights → "
        f"{plan.stored_numbers:,} stored numbers",
        table(header, rows, left=2),
        *(f"not rewritten: {s.name} ({s.type}): {s.reason}" for s in matching.skipped),
    ]
    lines += by_names(matching)
    if unmatched:
        more = ", ..." if len(unmatched) > 6 else ""
        lines.append(
            f"{len(unmatched)} linear modules match no pattern and stay as they are: "
            f"{', '.join(unmatched[:6])}{more}"
        )
    return Result(data, "\n".join(lines))


def by_names(found: Shown) -> list[str]:
    """A line where no call of the model could be tried."""
    if not found.by_names:
        return []
    return [
        f"told by names alone, since no call of the model was tried: {found.by_names}; compiling "
        "leaves out what its data do not reach"
    ]


def _type(name: str, cfg: ShareConfig, matching: Shown) -> dict[str, Any]:
    sites = [site for site in matching.sites if site.type == name]
    return {
        "type": name,
        "pattern": cfg.weight_types[name].pattern,
        "split": cfg.weight_types[name].split,
        "sites": len(sites),
        "modules": sum(len(site.readers) for site in sites),
        "slices": sum(len(site.slices) for site in sites),
        "layers": len({site.layer for site in sites if site.layer is not None}),
        "weights": sum(site.weights for site in sites),
    }


def _unmatched(model: nn.Module, matching: Shown) -> list[str]:
    from passes.graph.graph import is_linear

    known = {call for site in matching.sites for call in site.readers}
    known |= {s.name for s in matching.skipped}
    modules = model.named_modules(remove_duplicate=False)
    return [name for name, module in modules if is_linear(module) and name not in known]
