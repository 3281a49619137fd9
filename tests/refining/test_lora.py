"""LoRA on the coefficients by PEFT, as in the how-to: merged without growing, and recorded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fxshare
from fxshare.result.products import slices_of
from tests.refining.build import equal, everything, ids, refined, subject


@pytest.mark.parametrize("how", ["shared", "planned"])
def test_merged_adapters_come_nearer_at_the_same_size_and_are_recorded(how: Any) -> None:
    peft = pytest.importorskip("peft")
    model, gm = subject("llama", how)
    before = everything(gm)
    batches = ids()

    def loss_of(module: Any, batch: Any) -> Any:
        with torch.no_grad():
            wanted = model.eval()(batch).logits.log_softmax(-1).flatten(0, 1)
        own = module(batch).logits.log_softmax(-1).flatten(0, 1)
        return F.kl_div(own, wanted, log_target=True, reduction="batchmean")

    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets)
    tuned = peft.get_peft_model(copy.deepcopy(gm), config).eval()
    adapters = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2)
    for batch in batches * 3:
        optimizer.zero_grad()
        loss_of(tuned, batch).backward()
        optimizer.step()
    merged = tuned.merge_and_unload()

    # of the same names are linears that the plan left dense
    adapted = {f"{p.module}.weight" for p in slices_of(gm).values()}
    adapted = {name for name in adapted if any(f".{target}" in name for target in targets)}
    after = everything(merged)
    assert {n: t.shape for n, t in before.items()} == {n: t.shape for n, t in after.items()}
    moved = {n for n in before if not torch.equal(before[n], after[n])}
    assert moved == adapted
    with torch.no_grad():
        losses = [sum(float(loss_of(m, b)) for b in batches) for m in (gm, merged)]
    assert losses[1] < losses[0]
    assert equal(before, everything(gm))

    failed = [c.what for c in fxshare.verify(model, merged).checks if not c.ok]
    assert failed == ["relative error of each slice's weight"]
    result = refined(merged, model, steps=1)
    assert fxshare.verify(model, result).ok
    done = result.fxshare.refined[-1]
    assert done.after.objective <= done.before.objective
