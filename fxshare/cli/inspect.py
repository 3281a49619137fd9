"""``fxshare inspect``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxshare
from fxshare.cli.options import (
    AllowMissing,
    AsJson,
    Configs,
    Debug,
    Draw,
    Original,
    Sets,
    config_of,
)
from fxshare.cli.output import Result, table
from fxshare.cli.plan import draw_named, plan_text, read_plan

if TYPE_CHECKING:
    from torch import nn

    from fxshare.config import ShareConfig
    from fxshare.result.record import Record


def inspect_model(
    model: Annotated[
        str,
        typer.Argument(
            metavar="OUT_OR_MODEL",
            help="A folder that fxshare saved, the JSON file of a plan, or any MODEL.",
        ),
    ],
    config: Configs = [],  # noqa: B006  typer reads the default, nothing changes it
    set_: Sets = None,
    slices: Annotated[
        bool, typer.Option("--slices", help="List every slice and where its rows are.")
    ] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph as code.")] = False,
    why: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Explain a module, slice or basis: what became of it, or why nothing did.",
        ),
    ] = None,
    draw: Draw = None,
    original: Original = None,
    allow_missing: AllowMissing = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> Result:
    """Show the report and the sites of a saved folder, a plan, or the linear modules of a model.

    With -c, the modules of a model that is not compiled yet are explained under a configuration.

    \b
    Examples:
      fxshare inspect out/
      fxshare inspect out/ --why transformer.h.0.attn.c_attn.q.3
      fxshare inspect path/to/gpt2 -c configs/gpt2.yaml --why lm_head
      fxshare inspect plan.json --draw plan.svg
    """
    del as_json, debug
    from fxshare.cli.why import explain
    from fxshare.loading.names import load_model

    if model.endswith(".json"):
        if config or set_ or original or slices or graph:
            raise fxshare.errors.ConfigError(
                f"{model}: a plan is shown as it is; leave -c, --set, --original, --slices and "
                "--graph out"
            )
        return _plan_file(Path(model), why, draw)
    structure = (
        None if original is None else load_model(original, allow_missing=allow_missing).model
    )
    loaded = load_model(model, original=structure, allow_missing=allow_missing)
    meta = getattr(loaded.model, "meta", None)
    record: Record | None = meta.get("fxshare") if isinstance(meta, dict) else None
    cfg = _config(config, set_, record)
    if why is not None:
        lines = explain(loaded.model, why, cfg, record)
        return Result({"name": why, "why": lines}, "\n".join([why, *(f"  {x}" for x in lines)]))
    if draw is not None:
        if record is None:
            raise fxshare.errors.ConfigError(
                f"--draw {draw}: {model} is not compiled and has no plan; draw one with 'fxshare "
                "plan ... --draw'"
            )
        draw_named(record.plan, draw, model)
    if graph:
        code = _graph(model, loaded.model, record)
        return Result({"model": model, "graph": code}, code)
    if record is None:
        return _linears(model, loaded.model, cfg)
    return _saved(model, loaded.model, record, slices)


def _plan_file(path: Path, why: str | None, draw: Path | None) -> Result:
    from fxshare.cli.why import explain_in_plan

    plan = read_plan(path)
    if draw is not None:
        draw_named(plan, draw, str(path))
    if why is None:
        return Result(json.loads(plan.to_json()), plan_text(plan))
    lines = explain_in_plan(plan, why)
    return Result({"name": why, "why": lines}, "\n".join([why, *(f"  {x}" for x in lines)]))


def _config(config: Any, set_: Any, record: Record | None) -> ShareConfig | None:
    if not config and not set_:
        return None if record is None else record.config
    if record is not None:
        raise fxshare.errors.ConfigError(
            "a saved folder is shown under the configuration it was compiled with; leave -c and "
            "--set out"
        )
    return config_of(config, set_)


def _graph(name: str, model: nn.Module, record: Record | None) -> str:
    from torch import fx

    from fxshare.capture import capture
    from fxshare.models.traits import example_ids

    if record is None:
        captured = capture(model, example_ids(model))
        if captured.side_by_side:
            raise fxshare.errors.CaptureError(
                f"{name}: no graph of the whole model: {'; '.join(captured.notes)}; only a model "
                "that reads token ids can be traced without data of yours"
            )
        return _code(captured.graph)
    if isinstance(model, fx.GraphModule):
        return _code(model)
    pieces = [(site.name, model.get_submodule(site.name)) for site in record.plan.sites]
    return "\n\n".join(
        f"# {site}\n{_code(piece)}" for site, piece in pieces if isinstance(piece, fx.GraphModule)
    )


def _code(gm: Any) -> str:
    code: str = gm.print_readable(print_output=False)
    return code.rstrip()


def _saved(name: str, model: nn.Module, record: Record, slices: bool) -> Result:
    from fxshare.result.products import slices_of

    places = slices_of(model)
    ranks = {s: g.rank for g in record.plan.groups for s in g.slices}
    sites = [
        {
            "site": site.name,
            "type": site.type,
            "layer": site.layer,
            "in_features": site.in_features,
            "out_features": site.out_features,
            "calls": list(site.calls),
            "lookups": list(site.lookups),
            "slices": [
                {
                    "slice": s.name,
                    "rows": [s.start, s.stop],
                    "module": places[s.name].module,
                    "module_rows": [places[s.name].start, places[s.name].stop],
                    "basis": places[s.name].basis,
                    "rank": ranks.get(s.name),
                    "relative_error": record.slice_errors.get(s.name),
                }
                for s in site.slices
            ],
        }
        for site in record.plan.sites
    ]
    data = {"model": name, "report": record.report.to_dict(), "sites": sites}
    listing = _slice_table(sites) if slices else _site_table(sites)
    return Result(data, f"{record.report}\n\n{listing}")


def _site_table(sites: list[dict[str, Any]]) -> str:
    header = ["site", "type", "layer", "in→out", "slices", "bases", "modules that read it"]
    rows = [
        [
            s["site"],
            s["type"],
            _or_dash(s["layer"]),
            f"{s['in_features']}→{s['out_features']}",
            str(len(s["slices"])),
            str(len({p["basis"] for p in s["slices"] if p["basis"]})),
            str(len(s["calls"]) + len(s["lookups"])),
        ]
        for s in sites
    ]
    return table(header, rows, left=2)


def _slice_table(sites: list[dict[str, Any]]) -> str:
    header = ["slice", "is in module", "basis", "rows", "rows there", "rank", "relative error"]
    rows = [
        [
            p["slice"],
            p["module"],
            p["basis"] or "–",
            "{}:{}".format(*p["rows"]),
            "{}:{}".format(*p["module_rows"]),
            "dense" if p["rank"] is None else str(p["rank"]),
            "–" if p["relative_error"] is None else f"{p['relative_error']:.3e}",
        ]
        for s in sites
        for p in s["slices"]
    ]
    return table(header, rows, left=3)


def _linears(name: str, model: nn.Module, cfg: ShareConfig | None) -> Result:
    from fxshare.cli.validate import by_names
    from fxshare.compiling.shown import shown
    from fxshare.proposing.coverage import left_dense
    from passes.graph.graph import is_linear, weight_and_bias

    matching = None if cfg is None else shown(model, cfg)
    types = {} if matching is None else {c: s.type for s in matching.sites for c in s.calls}
    names: dict[int, list[str]] = {}
    for parameter_name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(parameter_name)
    linears = []
    for module_name, module in model.named_modules(remove_duplicate=False):
        if not is_linear(module):
            continue
        weight_OI, bias = weight_and_bias(module)
        readers = [n.rpartition(".")[0] for n in names.get(id(module.weight), ())]
        linears.append(
            {
                "module": module_name,
                "kind": type(module).__name__,
                "in_features": weight_OI.shape[1],
                "out_features": weight_OI.shape[0],
                "bias": bias is not None,
                "shares_weight_with": [n for n in readers if n != module_name],
                "type": types.get(module_name),
            }
        )
    parameters = sum(p.numel() for p in model.parameters())
    data = {
        "model": name,
        "class": type(model).__name__,
        "parameters": parameters,
        "linears": linears,
        "skipped": [] if matching is None else [s.model_dump() for s in matching.skipped],
        "by_names": None if matching is None else matching.by_names or None,
    }
    dense = None if matching is None else left_dense(model, matching.sites, matching.skipped)
    header = ["module", "kind", "in→out", "bias", "shares weight with"]
    header += [] if cfg is None else ["weight type"]
    rows = [
        [
            line["module"],
            line["kind"],
            f"{line['in_features']}→{line['out_features']}",
            "yes" if line["bias"] else "no",
            ", ".join(line["shares_weight_with"]) or "–",
            *([] if cfg is None else [_or_dash(line["type"])]),
        ]
        for line in linears
    ]
    text = (
        f"{name}: {type(model).__name__}, {parameters:,} parameters, {len(linears)} linear "
        f"modules; not compiled by fxshare\n{table(header, rows, left=2)}"
    )
    if matching is not None:
        lines = [f"not rewritten: {s.name} ({s.type}): {s.reason}" for s in matching.skipped]
        text = "\n".join([text, *lines, *by_names(matching)])
    return Result(data, text if dense is None else f"warning: {dense}\n{text}")


def _or_dash(value: object) -> str:
    return "–" if value is None else str(value)
