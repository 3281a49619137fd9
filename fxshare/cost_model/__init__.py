"""How long a plan will take: a roofline over its matrix products, with measured constants.

Legend: T rows (tokens), I input features, O output features, R rank.
"""

from fxshare.cost_model.forecast import (
    DECODE,
    PREFILL,
    SIDE_UNIT,
    Forecast,
    dense_seconds,
    forecasts,
    linears_of,
    no_slower,
    product_seconds,
    time_shares,
    without_linears,
)
from fxshare.cost_model.rates import Rates, rates_folder, rates_path, read_rates, write_rates
from fxshare.cost_model.work import (
    Attention,
    Matmul,
    Step,
    Traffic,
    launches,
    pass_seconds,
    seconds,
    step_bytes,
    step_flops,
)

__all__ = [
    "DECODE",
    "PREFILL",
    "SIDE_UNIT",
    "Attention",
    "Forecast",
    "Matmul",
    "Rates",
    "Step",
    "Traffic",
    "dense_seconds",
    "forecasts",
    "launches",
    "linears_of",
    "no_slower",
    "pass_seconds",
    "product_seconds",
    "rates_folder",
    "rates_path",
    "read_rates",
    "seconds",
    "step_bytes",
    "step_flops",
    "time_shares",
    "without_linears",
    "write_rates",
]
