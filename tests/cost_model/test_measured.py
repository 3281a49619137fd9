"""Tables of measured seconds, and what the cost model makes of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from fxshare.cost_model import Attention, Matmul, product_seconds, read_rates, seconds, write_rates
from fxshare.cost_model.measured import Measured
from fxshare.errors import FxShareWarning
from fxshare.plans.cost import Shape
from fxshare.plans.storage import PIVOTED, PLAIN
from tests.cost_model.test_cost_model import SLOW

TABLE = Measured(
    products=(
        ((1, 36, 64), 9.0),
        ((1, 68, 32), 7.0),
        ((1, 100, 32), 1.0),
        ((1, 100, 64), 2.0),
        ((1, 32, 80), 3.0),
        ((1, 64, 80), 5.0),
        ((1, 100, 80), 8.0),
    ),
    attentions=(((2, 4, 4, 8, 1), 6.0),),
)
KNOWS = replace(SLOW, measured=TABLE)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((100, 32), 1.0),
        ((100, 48), 1.5),  # bases of one input
        ((100, 80), 8.0),
        ((48, 80), 4.0),  # coefficients of one output
        ((52, 48), 8.0),  # tables of pivoted bases
        ((100, 16), np.nan),
        ((100, 96), np.nan),
        ((99, 48), np.nan),
    ],
)
def test_between_two_ranks_is_a_line_and_beyond_them_nothing(
    sizes: tuple[int, int], expected: float
) -> None:
    assert TABLE.product_seconds(1, *sizes) == pytest.approx(expected, nan_ok=True)
    assert np.isnan(TABLE.product_seconds(2, *sizes))
    both = TABLE.product_seconds(1, np.array([sizes[0], 1]), np.array([sizes[1], 1]))
    assert both == pytest.approx([expected, np.nan], nan_ok=True)


def test_the_roofline_is_for_what_was_not_measured() -> None:
    known, unknown = Matmul(1, 100, 32), Matmul(2, 100, 32)
    attention = Attention(2, 4, 4, 8, causal=True)
    launch = SLOW.launch_compiled
    assert seconds(KNOWS, [known], compiled=True) == pytest.approx(1.0 + launch)
    assert seconds(KNOWS, [attention], compiled=True) == pytest.approx(6.0 + launch)
    for one in (unknown, replace(attention, causal=False)):
        assert seconds(KNOWS, [one], compiled=True) == seconds(SLOW, [one], compiled=True)


def test_groups_are_priced_by_what_was_measured() -> None:
    shape, ranks = Shape(100, 80), np.array([32, 48, 16])
    plain = product_seconds(KNOWS, shape, ranks, PLAIN, tokens=1)
    assert plain[:2] == pytest.approx([1.0 + 3.0, 1.5 + 4.0])
    assert plain[2] == product_seconds(SLOW, shape, ranks, PLAIN, tokens=1)[2]
    pivoted = product_seconds(KNOWS, shape, np.array([48]), PIVOTED, tokens=1)
    gather = 2 * 100 * 4 / 1e9
    assert pivoted == pytest.approx([8.0 + 4.0 + gather])
    # a slice of a taller weight is its part of it, however many there are
    for height in (80, 40, 8):
        part = product_seconds(KNOWS, replace(shape, out_features=height), 0, None, tokens=1)
        assert float(part) == pytest.approx(8.0 * height / 80)


def test_tables_are_kept_beside_the_constants(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = write_rates(KNOWS)
    where = (KNOWS.device, KNOWS.name, KNOWS.dtype, KNOWS.threads)
    assert read_rates(*where) == KNOWS
    path.write_text(path.read_text().replace("9.0", "-9.0"))
    with pytest.warns(FxShareWarning, match="measured shapes: expected positive finite seconds"):
        assert read_rates(*where) is None


def test_what_was_measured_last_counts() -> None:
    newer = Measured(products=(((1, 100, 32), 4.0), ((3, 1, 1), 1.0)))
    both = newer.with_others(TABLE)
    assert dict(both.products)[1, 100, 32] == 4.0
    assert len(both.products) == len(TABLE.products) + 1
    assert both.attentions == TABLE.attentions
