from __future__ import annotations

from dataclasses import astuple

import pytest
from transformers import CONFIG_MAPPING, LlamaConfig, MixtralConfig

from evengaze import methods
from evengaze.errors import ConfigError
from evengaze.methods.baselines import Dense
from evengaze.methods.fastv import FastV
from evengaze.methods.himap import HiMAP
from evengaze.methods.illava import ILLaVA
from evengaze.methods.pyramiddrop import PyramidDrop
from evengaze.methods.sparsevlm import SparseVLM
from evengaze.methods.tokencarve import TokenCarve
from evengaze.models.support import CHECKED
from evengaze.protocol import Stage
from evengaze.schedule import DecoderShape, Schedule, solve_for_budget

SOLVABLE = [n for n in methods.names() if n != "dense"]


@pytest.mark.parametrize(
    ("pruner", "average"),
    [
        (FastV(128), 156.0),
        (FastV(288), 306.0),
        (FastV(64), 96.0),
        (PyramidDrop(), 128.0),
        (PyramidDrop((0.5, 0.25, 0.125), (8, 16, 24)), 270.0),
        (SparseVLM(192), 206.5),
        (SparseVLM(128), 145.40625),
        (SparseVLM(64), 82.25),
        (HiMAP((288, 72)), 144.0),
        (HiMAP((115, 90)), 125.0625),
        (TokenCarve(192), 216.0),
        (TokenCarve(64), 96.0),
        (ILLaVA(0.7, 2), 413.8125),
        (ILLaVA(0.7, 8), 446.25),
        (ILLaVA(1.0, 2, (5, 6, 7, 8), 92), 208.0),
        (Dense(), 576.0),
    ],
    ids=lambda value: methods.spec(value) if not isinstance(value, float) else "",
)
def test_published_settings_by_tokens_that_enter(pruner: methods.Pruner, average: float) -> None:
    assert Schedule.of(pruner, 32, 576).average == average


def test_tokens_are_counted_where_they_enter() -> None:
    schedule = Schedule.of(SparseVLM(128), 32, 576)
    assert [schedule.entering[i] for i in (2, 3, 6, 7, 15, 16)] == [576, 312, 312, 117, 117, 39]
    assert schedule.cached == schedule.entering


def test_a_method_that_trims_earlier_caches() -> None:
    schedule = Schedule.of(TokenCarve(64), 32, 576)
    assert schedule.entering[:3] == (576, 576, 64)
    assert set(schedule.cached) == {64}


@pytest.mark.parametrize("name", SOLVABLE)
@pytest.mark.parametrize(("layers", "visual"), [(32, 576), (40, 576), (28, 1000)])
def test_every_method_solves_for_an_average(name: str, layers: int, visual: int) -> None:
    pruner = methods.get(name)()
    solved = Schedule.solve_for_budget(pruner, 0.25 * visual, layers=layers, visual=visual)
    assert type(solved) is type(pruner)
    assert Schedule.of(solved, layers, visual).average == pytest.approx(0.25 * visual, rel=0.01)


def test_the_solution_is_the_closest_one() -> None:
    assert solve_for_budget(FastV(), 128, layers=32, visual=576).keep == 98
    assert solve_for_budget(PyramidDrop(), 128, layers=32, visual=576).keep == (184, 92, 46)


@pytest.mark.parametrize("average", [30, 97, 128, 160, 190])
def test_sparsevlm_has_a_table_for_any_average(average: int) -> None:
    """Also where the default budget is more than half of a picture's tokens."""
    schedule = Schedule.of(SparseVLM(average, layers=(2, 6, 15)), 32, 196)
    assert schedule.average == pytest.approx(average, abs=2)
    assert list(schedule.entering) == sorted(schedule.entering, reverse=True)


def test_a_budget_out_of_reach_says_what_is_in_reach() -> None:
    with pytest.raises(ConfigError, match=r"36\.9 to 576\.0.*earlier layer"):
        solve_for_budget(FastV(), 20, layers=32, visual=576)
    with pytest.raises(ConfigError, match="ask for less"):
        solve_for_budget(FastV(), 600, layers=32, visual=576)
    with pytest.raises(ConfigError, match="no budget"):
        solve_for_budget(Dense(), 128, layers=32, visual=576)


def test_flops_by_the_papers_formula() -> None:
    # Specified figures: HiMAP 24.6 % on 7B and 22.2 % on 13B; TokenCarve 36.9/26.6/16.4 %; iLLaVA 71.3 and 77.0 %.
    assert Schedule.of(HiMAP(), 32, 576).paper_ratio() == pytest.approx(0.246, abs=5e-4)
    assert Schedule.of(HiMAP(layers=(2, 8)), 40, 576).paper_ratio(5120, 13824) == pytest.approx(0.222, abs=5e-4)
    for keep, ratio in ((192, 0.369), (128, 0.266), (64, 0.164)):
        assert Schedule.of(TokenCarve(keep), 32, 576).paper_ratio() == pytest.approx(ratio, abs=5e-4)
    assert Schedule.of(ILLaVA(0.7, 2), 32, 576).paper_ratio() == pytest.approx(0.713, abs=5e-4)
    assert Schedule.of(ILLaVA(0.7, 8), 32, 576).paper_ratio() == pytest.approx(0.770, abs=5e-4)


def test_flops_counted_by_hand() -> None:
    shape = DecoderShape(hidden=8, intermediate=12, heads=4, kv_heads=2, head_dim=3)
    n, q, k = 5, 12, 6
    expected = 2 * (n * 8 * q + 2 * n * 8 * k + 2 * n * n * q + n * q * 8 + 3 * n * 8 * 12)
    assert shape.layer_flops(n) == expected
    dense = Schedule.of(Dense(), 3, 4)
    assert dense.flops(shape, text=1) == 3 * expected
    assert dense.flop_ratio(shape, text=1) == 1.0
    assert dense.kv_bytes(shape, text=1) == (2 * 6 * 5 * 2,) * 3


def test_shapes_from_configs() -> None:
    llama = LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    assert DecoderShape.from_config(llama) == DecoderShape(64, 96, 4, 2, 16, 3)
    assert DecoderShape.from_config(LlamaConfig()) == DecoderShape()
    mixture = MixtralConfig(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_experts_per_tok=2)
    assert DecoderShape.from_config(mixture).intermediate == 192


@pytest.mark.parametrize("kind", sorted(CHECKED & set(CONFIG_MAPPING)))
def test_every_checked_family_has_a_shape(kind: str) -> None:
    """Also those whose layers, or whose experts for text and for pictures, are of different sizes."""
    config = CONFIG_MAPPING[kind]()
    shape = DecoderShape.from_config(config)
    assert min(astuple(shape)) > 0, shape
    text = config.get_text_config()
    sizes = {
        "qwen3_5_moe": lambda: (shape.intermediate, text.num_experts_per_tok * text.moe_intermediate_size),
        "ernie4_5_vl_moe": lambda: (shape.intermediate, text.moe_k * sum(text.moe_intermediate_size) // 2),
        "aria": lambda: (shape.intermediate, text.moe_topk * text.intermediate_size),
        "gemma3n": lambda: (shape.intermediate, round(sum(text.intermediate_size) / text.num_hidden_layers)),
    }
    if kind in sizes:
        found, expected = sizes[kind]()
        assert found == expected


def test_a_size_that_layers_have_of_their_own_is_their_mean() -> None:
    config = LlamaConfig(num_hidden_layers=4, head_dim=16, per_layer_config={1: {"head_dim": 32}, 3: {"head_dim": 32}})
    assert DecoderShape.from_config(config).head_dim == 24


def test_the_description_names_what_matters() -> None:
    text = Schedule.of(FastV(128), 32, 576).describe(text=64)
    assert "layers  0-1     576 visual tokens enter" in text
    assert "layers  2-31    128 visual tokens enter" in text
    assert "average      156.00" in text
    assert "26.6%" in text


def test_stages_out_of_order_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FastV, "stages", lambda self, layers: [Stage(5), Stage(3)])
    with pytest.raises(ConfigError, match="out of order"):
        Schedule.of(FastV(), 32, 576)
