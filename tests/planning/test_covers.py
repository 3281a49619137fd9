"""Losses of groups that are held above those of their parts, and bounds that cost nothing."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from fxshare.factors.spectra import Spectra
from fxshare.planning.kinds.basis import Covers
from tests.planning.build import gram, node, slice_of

LAYERS, WIDTH = 5, 6


def made() -> tuple[Spectra, list[str]]:
    """Layers of one type, each with inputs of another size and shape."""
    names = [f"h.{layer}" for layer in range(LAYERS)]
    slices = {
        name: slice_of(4, WIDTH, at, input=at, gram_II=gram(WIDTH, at) * 10.0 ** (at % 3))
        for at, name in enumerate(names)
    }
    return Spectra(slices), names


@pytest.mark.parametrize("at_hand", list(itertools.product([False, True], repeat=3)))
def test_bounds_of_what_is_not_at_hand_price_nothing_and_hold(at_hand: tuple[bool, ...]) -> None:
    spectra, names = made()
    nodes = {n: node(n, layer=at, input=at, out_features=4) for at, n in enumerate(names)}
    exact, covers = Covers(nodes, made()[0]), Covers(nodes, spectra, known=spectra.is_computed)
    for name in names:
        spectra.tails(frozenset({name}))
    for first, wanted in enumerate(at_hand):
        if wanted:
            spectra.tails(frozenset(names[first : first + 2]))
    before = spectra.computed
    for a, b in itertools.combinations(range(LAYERS + 1), 2):
        part = frozenset(names[a:b])
        least, own = covers.least(part), exact.tails(part)
        assert len(least) == len(own)
        assert (least <= own + 1e-12 * own[0]).all()
        assert least[0] == pytest.approx(own[0]) or b - a > 1
        assert np.count_nonzero(least) > 0
    assert spectra.computed == before
