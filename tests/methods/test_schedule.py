from __future__ import annotations

import re
from dataclasses import astuple
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, LlamaConfig, MixtralConfig

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
from evengaze.testing import tiny

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
    assert all(size > 0 for size in astuple(shape) if size is not None), shape


def config_of(kind: str, **sizes: Any) -> Any:
    return CONFIG_MAPPING[kind](**sizes).get_text_config()


@pytest.mark.parametrize(
    ("config", "width"),
    [
        (("mixtral", {}), 2 * 14336),
        (("qwen3_moe", {"num_experts_per_tok": 8, "moe_intermediate_size": 768}), 8 * 768),
        # Every second layer has experts, two of these ten do not; the others are 6144 wide.
        (
            ("qwen3_moe", {"num_hidden_layers": 20, "decoder_sparse_step": 2, "mlp_only_layers": [1, 3]}),
            (8 * 8 * 768 + 12 * 6144) // 20,
        ),
        (("qwen2_moe", {}), 4 * 1408 + 5632),
        (("qwen3_5_moe", {}), 8 * 512 + 512),
        (("deepseek_v3", {}), round((3 * 18432 + 58 * (8 + 1) * 2048) / 61)),
        (("glm4v_moe", {}), round((1 * 10944 + 45 * (8 + 1) * 1408) / 46)),
        (("llama4", {}), 8192 + 8192),
        # Maverick: every second layer has one of its experts and the shared one, the others an MLP of 16384.
        (
            ("llama4_text", {"interleave_moe_layer_step": 2, "moe_layers": list(range(1, 48, 2))}),
            (24 * (8192 + 8192) + 24 * 16384) // 48,
        ),
        (("aria", {}), (2 + 2) * 4096),
        (("ernie4_5_vl_moe", {}), round((1 * 12288 + 27 * (6 + 2) * (1536 + 512) / 2) / 28)),
        (("gpt_oss", {}), 4 * 2880),
        (("granitemoehybrid", {"num_local_experts": 0, "shared_intermediate_size": 8192}), 8192),
        (
            (
                "gemma4_text",
                {"enable_moe_block": True, "num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704},
            ),
            9216 + 8 * 704,
        ),
        (("gemma3n", {}), 16384),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_mixture_is_as_wide_as_all_experts_that_a_token_visits(
    config: tuple[str, dict[str, Any]], width: int
) -> None:
    kind, sizes = config
    assert DecoderShape.from_config(config_of(kind, **sizes)).intermediate == width


def test_latent_attention_counted_by_hand() -> None:
    """DeepSeek-V3: 128 heads of 128 + 64 for keys and 128 for values, made from 512 latents, queries from 1536."""
    shape = DecoderShape.from_config(config_of("deepseek_v3"))
    queries = 7168 * 1536 + 1536 * 128 * 192
    keys_and_values = 7168 * (512 + 64) + 512 * 128 * (128 + 128)
    weights = queries + keys_and_values + 128 * 128 * 7168 + 3 * 7168 * 18432
    assert shape.layer_weights == weights
    assert shape.layer_flops(10) == 2 * (10 * weights + 10 * 10 * 128 * (192 + 128))
    assert shape.kv_bytes(10) == 10 * (512 + 64) * 2  # the cache holds latents and what is rotated


def test_layers_without_attention_counted_by_hand() -> None:
    """Qwen3.5-MoE: one layer of four attends and caches; the others have a state of one size."""
    shape = DecoderShape.from_config(config_of("qwen3_5_moe"))
    full = 2048 * (2 * 4096 + 2 * 512) + 4096 * 2048  # queries with their gates, keys, values, outputs
    linear = 2048 * (2 * 16 * 128 + 32 * 128 + 32 * 128 + 2 * 32) + 32 * 128 * 2048
    weights = (full + 3 * linear) // 4 + 3 * 2048 * (8 + 1) * 512
    assert shape.layer_weights == weights
    assert shape.layer_flops(10) == 2 * (10 * weights + 10 * 10 * 16 * (256 + 256) // 4)
    assert shape.kv_bytes(10) == 10 * 2 * (256 + 256) * 2 // 4


@pytest.mark.parametrize(
    "kind",
    [
        *("llama", "gemma3_text", "qwen3_moe", "mixtral", "deepseek_v3", "llama4_text", "qwen3_5_moe", "qwen3_vl_moe"),
        *("aria_text", "glm4v_moe", "ernie4_5_moe", "minimax_m3_vl", "mistral4", "gpt_oss", "glm4_moe_lite"),
    ],
)
def test_weights_are_those_of_the_model_that_transformers_builds(kind: str) -> None:
    """All matrices of the layers but routers; of the experts the share that a token is sent to."""
    config = config_of(kind)
    with torch.device("meta"):
        layers = AutoModel.from_config(config).layers
    names = ("num_experts_per_tok", "moe_topk", "moe_k")
    chosen = next((n for name in names if (n := getattr(config, name, None))), 1)
    total = 0.0
    for name, weight in layers.named_parameters():
        routed = re.search(r"(?<!shared_)experts\.", name)
        if weight.ndim < 2 or re.search(r"router|gate\.weight|gate\.classifier|shared_expert_gate|conv1d|bias", name):
            continue
        total += weight.numel() * chosen / len(weight) if routed else weight.numel()
    assert DecoderShape.from_config(config).layer_weights * len(layers) == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("family", ["kimi_k25", "qwen3_5_moe", "aria"])
def test_bytes_of_a_cache_are_those_that_a_run_measures(family: str) -> None:
    """Of latents, and of layers of which some have no cache."""
    model, inputs = tiny(family)
    with FastV(keep=4)(model) as run:
        model.generate(**inputs, max_new_tokens=1)
    shape = DecoderShape.from_config(model.config)
    for measured, entering in (
        (run.trace.kv_bytes, run.trace.entering),
        (run.trace.kv_bytes_unpruned, [run.trace.length] * run.trace.layers),
    ):
        assert sum(shape.kv_bytes(tokens, 4) for tokens in entering) == sum(measured)


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
