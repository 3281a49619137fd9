"""How many plans each effort tries."""

from __future__ import annotations

import pytest

from fxshare.planning.trials import Effort, trials
from tests.planning.models import PLAIN, compiled, features, plain_model


@pytest.mark.parametrize(
    ("effort", "mergeable", "count", "merged"),
    [
        ("off", True, 1, 0),
        ("quick", False, 6, 0),
        ("quick", True, 7, 1),
        ("thorough", False, 11, 0),
        ("thorough", True, 13, 2),
    ],
)
def test_more_effort_tries_more_and_starts_with_the_plain_optimum(
    effort: Effort, mergeable: bool, count: int, merged: int
) -> None:
    found = trials(effort, mergeable=mergeable)
    assert len({trial.name for trial in found}) == len(found) == count
    assert sum(trial.merge for trial in found) == merged
    first = found[0]
    assert (first.floor, first.blend, first.merge, first.loss_aware) == (0.0, 0.0, False, True)


def test_the_report_has_every_trial_of_every_round() -> None:
    """Those on statistics measured again too, and what a limit of the loss made of the best."""
    counts = [
        len(
            compiled(
                plain_model(),
                PLAIN,
                budget,
                {"remeasure": remeasure},
                calibration=features(4, rows=64),
            ).fxshare.plan.outlook.trials
        )
        for budget, remeasure in (
            ({"params_kept": 0.5}, 0),
            ({"params_kept": 0.5}, 1),
            ({"max_loss_increase": 0.1}, 0),
        )
    ]
    assert counts[0] > 0
    assert counts[1] == 2 * counts[0]
    assert counts[2] > counts[0]
