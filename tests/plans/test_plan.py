"""What a plan counts, and what its file may say."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from fxshare.errors import PlanError
from fxshare.plans.plan import Group, Plan
from fxshare.sites.site import Site, SliceSpec

Edit = Callable[[dict[str, Any]], object]


def _site(name: str, *, size: int = 8, lookups: tuple[str, ...] = ()) -> Site:
    """Of two slices of half of the rows."""
    halves = ((f"{name}.q", 0, size // 2), (f"{name}.k", size // 2, size))
    return Site(
        name=name,
        calls=(name,),
        type="fc",
        layer=None,
        in_features=size,
        out_features=size,
        bias=False,
        slices=tuple(SliceSpec(name=n, start=a, stop=b) for n, a, b in halves),
        lookups=lookups,
    )


def _group(name: str, *slices: str, **given: Any) -> Group:
    fields = {"type": "fc", "label": "", "layers": (), "in_features": 8, "rank": 3}
    return Group(name=name, slices=slices, out_features=4 * len(slices), **{**fields, **given})


def _plan() -> Plan:
    """Two groups over two of three sites; of the second site half is in none."""
    groups = (_group("one", "a.q", "a.k", storage="pivoted"), _group("two", "b.k", rank=1))
    return Plan(mode="planned", sites=(_site("a"), _site("b"), _site("c")), groups=groups)


def test_a_plan_counts_groups_and_what_is_in_none() -> None:
    plan = _plan()
    assert [group.dense_numbers for group in plan.groups] == [64, 32]
    # a basis of 3 × 5, 3 indices and 8 × 3 coefficients; a basis of 8 and 4 coefficients
    assert [group.stored_numbers for group in plan.groups] == [15 + 3 + 24, 8 + 4]
    assert plan.dense_numbers == 3 * 64
    assert plan.stored_numbers == 42 + 12 + 32 + 64
    assert plan.params_kept == 150 / 192


def test_a_slice_has_one_site() -> None:
    plan = _plan()
    assert plan.site_of("b.k") is plan.sites[1]
    assert plan.site_of("c.q") is plan.sites[2]
    with pytest.raises(PlanError, match=r"the plan has no slice named 'b\.v'"):
        plan.site_of("b.v")


def test_a_plan_is_read_as_it_was_written() -> None:
    text = _plan().to_json()
    assert Plan.from_json(text) == _plan()
    assert text.startswith('{\n "version": 1,\n "mode": "planned",\n')
    assert text.endswith("\n}\n")
    plain = json.loads(text)
    del plain["version"]
    assert Plan.from_json(json.dumps(plain)) == _plan()


@pytest.mark.parametrize(("storage", "rank"), [("plain", 1), ("plain", 8), ("pivoted", 8)])
def test_ranks_from_one_to_full(storage: str, rank: int) -> None:
    plain = json.loads(_plan().to_json())
    plain["groups"][0].update(storage=storage, rank=rank)
    assert Plan.from_json(json.dumps(plain)).groups[0].rank == rank


def _edit(at: int, **values: Any) -> Edit:
    return lambda plain: plain["groups"][at].update(values)


def _looked_up(plain: dict[str, Any]) -> None:
    plain["sites"][0]["lookups"] = ["wte"]


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (_edit(0, rank=0), "group 'one': rank 0 is outside 1..8"),
        (_edit(0, rank=9), "group 'one': rank 9 is outside 1..8"),
        (_edit(1, rank=5), "group 'two': rank 5 is outside 1..4"),
        (_edit(1, name="one"), "two groups are named 'one'"),
        (_edit(1, slices=["zzz"]), "group 'two': 'zzz' is not a slice of any site"),
        (
            _edit(1, slices=["b.kk"]),
            "group 'two': 'b.kk' is not a slice of any site; did you mean 'b.k'?",
        ),
        (
            _edit(1, slices=["a.k"]),
            "slice 'a.k' is in group 'one' and in 'two'; a slice has one basis, once",
        ),
        (_edit(0, in_features=7), "group 'one' says in_features 7, its slices read [8]"),
        (_edit(1, out_features=5), "group 'two' says out_features 5, its slices have 4"),
        (
            _looked_up,
            "group 'one': the rows of 'a.q' are looked up, and its basis is stored plain; found "
            "storage 'pivoted'",
        ),
        (lambda plain: plain.update(version=4), "the plan has version 4, this fxshare reads up to "
         "3; upgrade fxshare"),
        (lambda plain: plain.update(colour="red"), "colour: unknown key; found 'red'"),
        (lambda plain: plain.pop("mode"), "mode: Field required"),
        (_edit(1, colour="red"), "group 'two': colour: unknown key; found 'red'"),
        (_edit(1, rank="high"), "group 'two': rank: Input should be a valid integer, unable to "
         "parse string as an integer; found 'high'"),
        (lambda plain: plain["groups"][1].pop("rank"), "group 'two': rank: Field required"),
        (lambda plain: plain["sites"][2].pop("name"), "sites.2: name: Field required"),
        (lambda plain: plain["sites"][2].update(name=3), "sites.2: name: Input should be a valid "
         "string; found 3"),
        (lambda plain: plain["sites"].append(3), "sites.3: Input should be an object; found 3"),
        (
            lambda plain: plain["sites"][1]["slices"][1].update(stop="x"),
            "site 'b': slices.1.stop: Input should be a valid integer, unable to parse string as "
            "an integer; found 'x'",
        ),
        (lambda plain: plain.update(sites=3), "sites: Input should be a valid array; found 3"),
    ],
)  # fmt: skip
def test_a_fault_is_named_with_where_it_is(edit: Edit, said: str) -> None:
    plain = json.loads(_plan().to_json())
    edit(plain)
    with pytest.raises(PlanError) as caught:
        Plan.from_json(json.dumps(plain))
    assert str(caught.value) == said


def test_a_name_without_a_grammar_says_which_it_has() -> None:
    plain = json.loads(_plan().to_json())
    plain["groups"][1]["name"] = "two'"
    with pytest.raises(PlanError, match=r"""^group "two'": name: expected the name of a group"""):
        Plan.from_json(json.dumps(plain))


def test_what_is_looked_up_is_stored_plain() -> None:
    plain = json.loads(_plan().to_json())
    _looked_up(plain)
    plain["groups"][0]["storage"] = "plain"
    plan = Plan.from_json(json.dumps(plain))
    assert plan.sites[0].lookups == ("wte",)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"version": "x"}', '{"version": null}'])
def test_what_is_no_plan_is_said_to_be_none(text: str) -> None:
    with pytest.raises(PlanError, match=r"^not a plan: "):
        Plan.from_json(text)
