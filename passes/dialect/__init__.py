"""What a graph may consist of after each stage, as rules that can be run.

*captured* is what a front end hands over, *split* has a linear for each slice, *shared* has bases
and coefficients, *lowered* is packed. A rule says what it looks at, what it expects there, and the
way out; :func:`check` names the node and the rule that it breaks.
"""

from __future__ import annotations

from passes.dialect.stages import RULES, STAGES, Rule, Stage, check, stage_of, watch

__all__ = ["RULES", "STAGES", "Rule", "Stage", "check", "stage_of", "watch"]
