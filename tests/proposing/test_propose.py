"""A configuration from the model itself: what is found, what is left out, and the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

import fxshare
from fxshare.cli import main
from fxshare.config import ShareConfig, load_config
from fxshare.errors import ConfigError, MatchError
from fxshare.models.examples import made_up_call
from fxshare.proposing.layout import Layout, parts_of
from fxshare.proposing.patterns import matchable, pattern_of
from fxshare.proposing.proposal import Proposal
from fxshare.proposing.weights import weights_of
from fxshare.sites.match import match
from tests.zoo.families import FAMILIES, Family, family, transformers_model
from tests.zoo.written import HEADS, LAYERS, WIDTH


def proposed(name: str, *, seen: bool = False) -> Proposal:
    one = family(name)
    return fxshare.propose(one.model(), example=one.call() if seen else None)


def keys(found: Proposal) -> dict[str, dict[str, object]]:
    """Per type what the configuration says beside the pattern."""
    types = found.config.weight_types
    return {t: s.model_dump(exclude_defaults=True, exclude={"pattern"}) for t, s in types.items()}


# What is found


@pytest.mark.parametrize("one", FAMILIES, ids=lambda f: f.name)
def test_each_family_is_matched_and_cut_as_written_by_hand(one: Family) -> None:
    model, by_hand = one.model(), load_config(one.config)
    by_init = {s.name: s for s in match(model, fxshare.init(model)).sites}
    expected = {s.name: s for s in match(model, by_hand).sites if s.type != "router"}
    assert set(by_init) == set(expected)
    for name, site in expected.items():
        if one.name == "nanogpt" and name.endswith("c_attn"):
            assert [s.part for s in by_init[name].slices] == ["q", "k", "v"]  # nothing tells heads
            continue
        found = by_init[name]
        assert [(s.label, s.start) for s in found.slices] == [
            (s.label, s.start) for s in site.slices
        ]
        assert (found.layer, found.in_features) == (site.layer, site.in_features)


def test_counts_are_of_what_matching_finds() -> None:
    found = proposed("gpt2")
    attention = next(t for t in found.types if t.name == "c_attn")
    slices = LAYERS * 3 * HEADS
    assert (attention.sites, attention.slices) == (LAYERS, slices)
    assert attention.layers == tuple(range(LAYERS))
    assert attention.numbers == LAYERS * 3 * WIDTH * WIDTH
    assert f"{LAYERS} of 32 → 96 in layers 0 to {LAYERS - 1}" in found.text
    assert "q, k and v of 4 heads in one weight" in found.text
    assert f"{slices} slices" in found.text


def test_heads_of_separate_projections_are_told() -> None:
    found = proposed("gemma")
    heads = {t.name: t.heads for t in found.types}
    assert (heads["q_proj"], heads["k_proj"]) == ((4, 8), (1, 8))
    assert heads["o_proj"] is None  # it reads heads, its rows are none
    assert heads["up_proj"] is None


@pytest.mark.parametrize(
    ("name", "type_", "expected"),
    [
        ("gpt2", "c_attn", {"split": "heads", "qkv_order": "qkv", "n_head": 4}),
        (
            "phi3",
            "qkv_proj",
            {"split": "heads", "qkv_order": "qkv", "n_head": 4, "n_kv_head": 2},
        ),
        (
            "gpt_neox",
            "query_key_value",
            {"split": "heads", "qkv_order": "qkv", "n_head": 4, "interleaved": True},
        ),
    ],
)
def test_the_graph_shows_how_rows_are_ordered(
    name: str, type_: str, expected: dict[str, object]
) -> None:
    found = proposed(name, seen=True)
    assert found.seen, found.unseen
    assert keys(found)[type_] == expected
    assert next(t for t in found.types if t.name == type_).layout.seen
    assert "seen in the captured graph" in " ".join(found.text.split("\n    # "))


class FusedAttention(nn.Module):
    """A fused projection whose name and widths do not tell how its rows are ordered: ``[v q k]``
    per head, or the blocks k and v before q."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order, self.num_heads, self.kv = order, HEADS, HEADS if order == "head" else 2
        self.c_attn = nn.Linear(WIDTH, WIDTH + 2 * self.kv * WIDTH // HEADS)
        self.c_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        size = d // self.num_heads
        rows = self.c_attn(x)
        if self.order == "head":
            q, k, v = rows.view(b, t, self.num_heads, 3 * size).transpose(1, 2).chunk(3, -1)
        else:
            k, v, q = rows.split([self.kv * size, self.kv * size, d], dim=-1)
            q, k, v = (x.view(b, t, -1, size).transpose(1, 2) for x in (q, k, v))
            k, v = (x.repeat_interleave(self.num_heads // self.kv, 1) for x in (k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.c_proj(y.transpose(1, 2).reshape(b, t, d))


class Blocks(nn.Module):
    def __init__(self, make: Callable[[], nn.Module], layers: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


def test_an_order_of_rows_that_no_name_tells() -> None:
    x = torch.randn(2, 7, WIDTH)
    model = Blocks(lambda: FusedAttention("head"))
    blind, seen = fxshare.propose(model), fxshare.propose(model, example=x)
    assert keys(blind)["c_attn"] == {"split": "heads", "qkv_order": "qkv", "n_head": HEADS}
    assert keys(seen)["c_attn"] == {**keys(blind)["c_attn"], "interleaved": True}
    model = Blocks(lambda: FusedAttention("kvq"))
    blind, seen = fxshare.propose(model), fxshare.propose(model, example=x)
    assert keys(blind)["c_attn"]["qkv_order"] == "qkv"
    assert keys(seen)["c_attn"] == {**keys(blind)["c_attn"], "qkv_order": "kvq"}


def test_parts_of_rows() -> None:
    assert parts_of(Layout("qkv", 4, 2)) == "qqqqkkvv"
    assert parts_of(Layout("qkv", 4, 2, order="kvq")) == "kkvvqqqq"
    assert parts_of(Layout("qkv", 4, 2, interleaved=True)) == "qqkvqqkv"


def test_a_wide_hidden_layer_is_not_taken_for_fused() -> None:
    """Two and three times the width, in a module that states heads: what reads it tells."""

    class Wide(nn.Module):
        def __init__(self, times: int) -> None:
            super().__init__()
            self.num_heads = HEADS
            self.up = nn.Linear(WIDTH, times * WIDTH)
            self.down = nn.Linear(times * WIDTH, WIDTH)

    for times in (2, 3):
        found = fxshare.propose(Blocks(lambda times=times: Wide(times)))
        assert keys(found) == {"up": {}, "down": {}}


def test_what_reads_one_activation() -> None:
    assert proposed("llama").same_input == (
        ("q_proj", "k_proj", "v_proj"),
        ("gate_proj", "up_proj"),
    )
    # only the graph tells that attention and feed-forward are side by side
    assert proposed("falcon").same_input == ()
    assert proposed("falcon", seen=True).same_input == (("query_key_value", "dense_h_to_4h"),)


def test_what_a_graph_says_can_be_used_as_it_stands() -> None:
    found = proposed("llama", seen=True)
    text = found.text.replace("# budget: {params_kept: 0.8}", "budget: {params_kept: 0.8}")
    text = text.replace("# planner: ", "planner: ")
    cfg = ShareConfig(**yaml.safe_load(text))
    assert cfg.mode == "planned"
    assert cfg.planner.may_share == found.same_input == proposed("llama").same_input


# What is left out, and why


def test_heads_and_embeddings_are_offered_and_off() -> None:
    found = proposed("gpt2")
    assert not found.left_out
    assert not any(spec.embedding for spec in found.config.weight_types.values())
    offered = {one.name: one.readers for one in found.optional}
    assert offered == {
        "wte": ("transformer.wte", "lm_head"),
        "wpe": ("transformer.wpe",),
    }
    assert "# wte: {pattern: 'transformer\\.wte$', embedding: true}" in found.text


def test_gates_of_experts_are_left_out() -> None:
    reasons = [w.reason for w in proposed("qwen2_moe").left_out]
    assert reasons[0] == "one rank stores as much as the weight"

    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(WIDTH, 6)
            self.experts = nn.Parameter(torch.randn(6, WIDTH, WIDTH))

    found = fxshare.propose(Blocks(Sparse))
    assert list(found.config.weight_types) == ["experts"]
    assert "chooses among 6 experts" in found.left_out[0].reason


def test_a_type_of_no_weight_is_left_out() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.large, self.small = nn.Linear(200, 200), nn.Linear(5, 5)

    found = fxshare.propose(Blocks(Block))
    assert list(found.config.weight_types) == ["large"]
    assert found.left_out[0].reason == "less than 0.1% of the parameters"


def test_weights_that_matching_refuses_are_left_out_with_its_reason() -> None:
    model = Blocks(lambda: FusedAttention("head"))
    for block in model.blocks:
        block.c_proj.register_forward_hook(lambda module, args, output: output)
    found = fxshare.propose(model)
    assert list(found.config.weight_types) == ["c_attn"]
    assert "forward hooks" in found.left_out[0].reason


# Unknown structures


def test_a_plain_mlp_has_a_type_for_each_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 16), nn.Linear(16, 16))
    found = fxshare.propose(model)
    assert found.config.block_pattern is None
    assert sorted(s.name for s in match(model, found.config).sites) == ["0", "2", "3"]
    gm = fxshare.compile(model, example=torch.randn(2, 8))
    fxshare.verify(model, gm, strict=True)


def test_layers_of_unequal_width_have_types_of_their_own() -> None:
    model = nn.ModuleDict(
        {
            "net": nn.Sequential(
                nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)
            )
        }
    )
    found = fxshare.propose(model)
    sites = {s.name: (s.type, s.layer) for s in match(model, found.config).sites}
    assert [layer for _, layer in sites.values()] == [0, 2, 4]
    assert sites["net.2"][0] == sites["net.4"][0] != sites["net.0"][0]


def test_stages_are_not_layers() -> None:
    """Blocks repeat within a stage, the stages differ in width (Swin)."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.fc = nn.Linear(width, width)

    stages = [nn.ModuleList(Block(width) for _ in range(2)) for width in (8, 16)]
    found = fxshare.propose(nn.ModuleDict({"stages": nn.ModuleList(stages)}))
    assert [t.layers for t in found.types] == [(0, 1), (0, 1)]
    assert found.config.block_pattern == r"stages\.\d+\.(\d+)"
    patterns = [t.spec.pattern for t in found.types]
    assert patterns == [rf"stages\.{n}\.\d+\.fc$" for n in (0, 1)]


def test_containers_in_containers() -> None:
    """Between the stages stands what is in none of their blocks."""

    class Stage(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Blocks(lambda: nn.Linear(width, width)) for _ in range(3))
            self.down = nn.Linear(width, 2 * width)

    found = fxshare.propose(_stages(Stage))
    sites = {s.name: (s.type, s.layer) for s in match(_stages(Stage), found.config).sites}
    assert sites["layers.1.blocks.2.blocks.1"][1] == 2  # not the blocks inside the block
    assert sites["layers.1.down"][1] == 1
    assert len({type_ for type_, _ in sites.values()}) == len(found.types)


def _stages(stage: Callable[[int], nn.Module]) -> nn.Module:
    return nn.ModuleDict({"layers": nn.ModuleList([stage(8), stage(16)])})


def test_a_matrix_with_columns_in_heads_is_no_stack_of_experts() -> None:
    class Einsum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Parameter(torch.randn(WIDTH, HEADS, 8))
            self.o = nn.Linear(WIDTH, WIDTH)

    assert list(fxshare.init(Blocks(Einsum)).weight_types) == ["o"]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Embedding(4, 4), "no linear weight that could be rewritten.*found Embedding"),
        (nn.Linear(4, 1), "no weight worth rewriting"),
        (nn.Identity(), "found no parameters"),
    ],
)
def test_nothing_to_compress(model: nn.Module, message: str) -> None:
    with pytest.raises(MatchError, match=message):
        fxshare.init(nn.ModuleDict({"only": model}))


def test_not_a_model() -> None:
    with pytest.raises(ConfigError, match=r"expected an nn\.Module to look at, found dict"):
        fxshare.propose({})  # type: ignore[arg-type]


def test_patterns_match_what_they_mean_and_nothing_else() -> None:
    model = family("bert").model()
    names = matchable(model)
    down = [w for w in weights_of(model) if w.inside == "output.dense"]
    assert pattern_of(down, names) == r".*\.layer\.\d+\.output\.dense$"
    # no shorter pattern tells one layer from the others
    assert pattern_of(down[:1], names) == r"(?:bert\.encoder\.layer\.0\.output\.dense)$"


# In compile and plan


def test_without_a_configuration_compile_and_plan_use_it() -> None:
    one = family("gpt2")
    model = one.model()
    gm = fxshare.compile(model, example=one.call())
    assert gm.fxshare.config == fxshare.init(model)
    assert fxshare.plan(model).sites == gm.fxshare.plan.sites
    fxshare.verify(model, gm, strict=True)


def test_a_budget_goes_with_it() -> None:
    model = family("llama").model()
    plan = fxshare.plan(model, [fxshare.init(model), {"budget": {"params_kept": 0.7}}])
    assert plan.mode == "planned"
    assert plan.params_kept <= 0.7


def test_a_model_without_values_will_do() -> None:
    with torch.device("meta"):
        model = transformers_model(
            "LlamaConfig",
            "LlamaForCausalLM",
            vocab_size=32000,
            hidden_size=4096,
            num_hidden_layers=4,
            num_attention_heads=32,
            num_key_value_heads=8,
            intermediate_size=11008,
        )
    found = fxshare.propose(model)
    heads = {t.name: t.heads for t in found.types}
    assert (heads["q_proj"], heads["k_proj"]) == ((32, 128), (8, 128))


def test_the_model_stays_as_it_is() -> None:
    one = family("gpt2")
    model = one.model().train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    fxshare.propose(model, example=one.call())
    assert torch.equal(torch.rand(1), expected)
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# The file and the command


@pytest.mark.parametrize("name", ["gpt2", "phi3", "nn_transformer", "t5"])
def test_the_file_reads_back(name: str, tmp_path: Path) -> None:
    found = proposed(name)
    path = tmp_path / "made.yaml"
    path.write_text(found.text, encoding="utf-8")
    assert load_config(path) == found.config
    assert max(map(len, found.text.splitlines())) <= 100


@pytest.mark.parametrize("name", ["llama", "t5", "whisper", "vit"])
def test_calls_are_made_up_for_models_that_say_what_they_read(name: str) -> None:
    one = family(name)
    model = one.model()
    call = made_up_call(model)
    with torch.no_grad():
        model(**call) if isinstance(call, dict) else model(call)
    assert made_up_call(nn.Linear(3, 3)) is None


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    family("gpt2").model().save_pretrained(tmp_path / "model")  # type: ignore[operator]
    return tmp_path


def test_the_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, file = str(folder / "model"), folder / "made.yaml"
    assert main(["init", model, "--no-capture"]) == 0
    printed = capsys.readouterr().out
    assert main(["init", model, "-o", str(file)]) == 0
    assert f"written to {file}" in capsys.readouterr().out
    written = file.read_text(encoding="utf-8")
    assert "rows in blocks, seen in the captured graph" in written
    assert yaml.safe_load(written) == yaml.safe_load(printed)
    assert main(["validate", model, "-c", str(file)]) == 0
    assert f"{LAYERS * WIDTH * WIDTH:,}" in capsys.readouterr().out  # weights of attn_c_proj


def test_the_command_does_not_overwrite(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "mine.yaml"
    file.write_text("mine", encoding="utf-8")
    command = ["init", str(folder / "model"), "--no-capture", "-o", str(file)]
    assert main(command) == 2
    assert "--force overwrites it" in capsys.readouterr().err
    assert file.read_text(encoding="utf-8") == "mine"
    assert main([*command, "--force"]) == 0
    assert "weight_types:" in file.read_text(encoding="utf-8")
    assert main(["init", str(folder / "model"), "--force"]) == 2


def test_the_command_wants_the_original(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = family("gpt2")
    fxshare.save(fxshare.compile(one.model(), capture="modules"), folder / "saved")
    assert main(["init", str(folder / "saved")]) == 2
    assert "expected an original model, found one that fxshare" in capsys.readouterr().err


def test_the_command_as_data(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", str(folder / "model"), "--no-capture", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert [t["type"] for t in data["types"]] == ["c_attn", "attn_c_proj", "c_fc", "mlp_c_proj"]
    assert data["captured"] is False
    assert load_config(data["config"]).mode == "exact"
