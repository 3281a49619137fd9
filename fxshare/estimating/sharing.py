"""What factorising takes in the sharing mode."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fxshare.config import ShareConfig
from fxshare.cost_model.pace import NOTHING, Amount, Pace
from fxshare.estimating import pricing
from fxshare.estimating.pricing import Candidate
from fxshare.sites.site import Site


def sharing(
    pace: Pace,
    cfg: ShareConfig,
    sites: Sequence[Site],
    reads: Mapping[str, object],
    singular: frozenset[int],
    keep: float,
) -> Amount:
    """Basis Sharing: a group of so many layers at a time, a whitening for each; ``keep`` is the
    share of the matched numbers that is kept."""
    found = NOTHING
    terms = pricing.Terms(pace, singular, {})
    seen = set()
    for part in _groups(cfg, sites, reads):
        inputs, outputs = part[0].inputs, sum(one.outputs for one in part)
        read = frozenset(one.read for one in part)
        found += NOTHING if read in seen else terms.input_root(inputs)
        seen.add(read)
        size = min(inputs, outputs)
        if outputs < inputs:
            found += pace.triangle(outputs, inputs)
            found += pace.product(outputs, inputs, inputs) * 0.6
        else:
            found += pace.triangle(inputs, outputs)
            found += pace.triangle(inputs, inputs) * 2
        found += pace.eigenvectors(size)
        rank = pricing.rank_of(inputs, outputs, keep, pivoted=False)
        found += pace.product(outputs, inputs, rank) * 2
        found += pace.product(outputs, rank, inputs)
        found += pace.moved(8 * 4 * outputs * inputs)
    return found


def _groups(
    cfg: ShareConfig, sites: Sequence[Site], reads: Mapping[str, object]
) -> list[Candidate]:
    rows: dict[tuple[str, str], list[pricing.Member]] = {}
    for site in sites:
        for s in site.slices:
            one = pricing.Member(site, s, reads[site.name])
            rows.setdefault((site.type, s.label), []).append(one)
    found: list[Candidate] = []
    for (type_name, _), row in rows.items():
        size = cfg.group_size_of(type_name)
        found += [tuple(row[at : at + size]) for at in range(0, len(row), size)]
    return found


__all__ = ["sharing"]
