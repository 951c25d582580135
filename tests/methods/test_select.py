"""What methods choose, on views without a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from fakes import FakeAttention, select, view
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from evengaze import methods
from evengaze.debias import Debias, Exponential, PaddingMask
from evengaze.engine.attention import AttentionStates
from evengaze.errors import ScoreError
from evengaze.layout import VisualLayout
from evengaze.memory import Memory
from evengaze.methods._template import Norm
from evengaze.methods.base import Pruner
from evengaze.methods.baselines import Pool, Random, Uniform, lattice
from evengaze.methods.divprune import DivPrune
from evengaze.methods.fastv import FastV
from evengaze.methods.himap import HiMAP
from evengaze.methods.illava import ILLaVA
from evengaze.methods.pyramiddrop import PyramidDrop
from evengaze.methods.sparsevlm import Raters, SparseVLM, density_peaks, raters, recycling
from evengaze.methods.tokencarve import TokenCarve, contribution
from evengaze.methods.tome import ToMe
from evengaze.protocol import Merge, Selection, Stage, View, merge_states, top

ATTENTION: list[Pruner] = [
    FastV(5),
    PyramidDrop((5, 3), (2, 4)),
    SparseVLM((5, 3), (2, 4)),
    HiMAP((5, 3)),
    TokenCarve(5),
    ILLaVA(5),
]
BLIND: list[Pruner] = [Random(5), Uniform(5), Pool(5), DivPrune(5), ToMe(5), Norm(5)]
BLIND_NAMES = [p.name for p in BLIND]


def ids(pruner: Any) -> str:
    return pruner.name if isinstance(pruner, Pruner) else str(pruner)


def used(selection: Selection) -> set[int]:
    """All candidates that leave any trace."""
    parts = [selection.keep]
    if selection.recycled is not None:
        parts.append(selection.recycled)
    if selection.merge is not None:
        parts += [selection.merge.source, selection.merge.target]
    return set(torch.cat(parts).tolist())


def merged(v: View, merge: Merge) -> Tensor:
    features = v.features[0]
    out = features.clone()
    out[merge.target] = 0
    return out.index_add(0, merge.target, features[merge.source] * merge.weight.float()[:, None])


@pytest.mark.parametrize("mode", ["corrected", "official"])
@pytest.mark.parametrize("pruner", [*ATTENTION, *BLIND], ids=ids)
def test_the_budget_is_met_in_raster_order(pruner: Pruner, mode: str) -> None:
    pruner = pruner.replace(mode=mode)
    selection = select(pruner, view())
    assert selection.keep.tolist() == sorted(set(selection.keep.tolist()))
    recycled = 0 if selection.recycled is None else len(selection.recycled)
    assert len(selection.keep) == pruner.budget(0, 16, 16)
    assert len(selection.keep) + recycled == pruner.size_after(0, 16, 16)


@pytest.mark.parametrize("pruner", [*ATTENTION, *BLIND], ids=ids)
def test_keeping_all_changes_nothing(pruner: Pruner) -> None:
    keep = tuple(99 for _ in pruner.keep) if isinstance(pruner.keep, tuple) else 99  # type: ignore[attr-defined]
    selection = select(pruner.replace(keep=keep, debias=Debias(PaddingMask())), view(size=(40, 10)))
    assert selection.keep.tolist() == list(range(16))
    assert selection.merge is None and selection.recycled is None


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("pruner", ATTENTION, ids=ids)
def test_padding_is_neither_kept_nor_recycled_nor_merged(pruner: Pruner, stage: int) -> None:
    if stage >= len(pruner.stages(32)):
        pytest.skip("one stage only")
    memory = Memory()
    memory.put(Raters(torch.ones(1, 5, dtype=torch.bool)))
    v = view(size=(40, 20), stage=stage, memory=memory)  # first and last row of four are padding
    selection = select(pruner.replace(debias=Debias(PaddingMask())), v)
    assert used(selection) <= set(range(4, 12))


@pytest.mark.parametrize("pruner", ATTENTION, ids=ids)
def test_the_budget_falls_to_the_valid_tokens(pruner: Pruner) -> None:
    v = view(size=(40, 10))  # one row of four shows the picture, by halves
    valid = Debias(PaddingMask()).valid(v.tokens.row(0))
    keep = (12, 12) if isinstance(pruner.keep, tuple) else 12  # type: ignore[attr-defined]
    selection = select(pruner.replace(keep=keep, debias=Debias(PaddingMask())), v)
    assert selection.keep.tolist() == valid.nonzero().flatten().tolist()


def test_a_picture_of_nothing_but_padding_is_ranked_without_the_mask() -> None:
    v, debias = view(size=(2000, 10)), Debias(PaddingMask(formula="pad"))
    assert torch.equal(select(FastV(5, debias=debias), v).keep, select(FastV(5), v).keep)
    assert len(select(FastV(5, debias=debias, mode="official"), v).keep) == 0


def test_official_modes_fill_up_with_padding() -> None:
    v = view(size=(40, 20))
    official = select(HiMAP((12, 3), debias=Debias(PaddingMask()), mode="official"), v)
    assert len(official.keep) == 12
    sparse = select(SparseVLM((5, 3), (2, 4), debias=Debias(PaddingMask()), mode="official"), v)
    assert sparse.merge is not None and not set(sparse.merge.source.tolist()) <= set(range(4, 12))


def test_the_trend_is_divided_out_before_the_ranking() -> None:
    v = view()
    plain = v.attention(v.last)[0]
    weighted = plain * torch.exp(-2 * v.tokens.x[0]).float()
    selection = select(FastV(5, debias=Debias(trend=Exponential(2.0))), v)
    assert selection.keep.tolist() == top(weighted, 5).tolist()
    assert selection.raw is not None and torch.equal(selection.raw, plain)
    assert selection.scores is not None and torch.allclose(selection.scores, weighted)


def test_only_the_first_language_to_vision_ranking_is_debiased() -> None:
    trend = Debias(trend=Exponential(50.0))
    later = select(PyramidDrop((5, 3), (2, 4), debias=trend), view(stage=1))
    assert torch.equal(later.raw, later.scores)  # type: ignore[arg-type]
    later = select(HiMAP((5, 3), debias=Debias(trend=Exponential(50.0), stages="all")), view(stage=1))
    assert torch.equal(later.raw, later.scores)  # type: ignore[arg-type]
    always = Debias(trend=Exponential(50.0), stages="all")
    later = select(PyramidDrop((5, 3), (2, 4), debias=always), view(stage=1))
    assert not torch.equal(later.raw, later.scores)  # type: ignore[arg-type]


def test_a_stage_that_reads_no_attention_is_never_debiased() -> None:
    """Whatever a method says of itself: the trend is divided out at its first stage that reads attention."""

    @dataclass(frozen=True)
    class Mixed(PyramidDrop):
        def stages(self, layers: int) -> list[Stage]:
            return [Stage(1, None), Stage(2, "own")]

        def score(self, view: View) -> Tensor:
            return view.features.float().square().sum(-1)

    pruner = Mixed((5, 3), (1, 2), debias=Debias(trend=Exponential(50.0)))
    assert pruner.ranked_layer(32) == 2
    first = select(pruner, view(sources=[None]))
    assert torch.equal(first.raw, first.scores)  # type: ignore[arg-type]
    second = select(pruner, view(stage=1, sources=[None, "own"]))
    assert not torch.equal(second.raw, second.scores)  # type: ignore[arg-type]


def test_ties_go_to_the_lower_index() -> None:
    score = torch.tensor([1.0, 2.0, 2.0, 1.0, 2.0, 1.0])
    assert top(score, 4).tolist() == [0, 1, 2, 4]
    assert top(score, 2).tolist() == [1, 2]


def test_scores_that_cannot_be_ranked_are_errors() -> None:
    v = view()
    v.states.map[:] = float("nan")  # type: ignore[union-attr]
    with pytest.raises(ScoreError, match="NaN"):
        select(FastV(5), v)

    class Short(FastV):
        def score(self, view: View) -> Tensor:
            return torch.zeros(1, 3)

    with pytest.raises(ScoreError, match="scored"):
        select(Short(5), view())


@settings(max_examples=60, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    keep=st.one_of(st.integers(1, 90), st.floats(0.01, 1.0)),
    after=st.integers(0, 4),
    seed=st.integers(0, 9),
    mode=st.sampled_from(["corrected", "official"]),
)
def test_any_grid_any_picture_any_budget(
    grid: tuple[int, int], size: tuple[int, int], keep: float, after: int, seed: int, mode: str
) -> None:
    debias = Debias(PaddingMask(), Exponential(1.0))
    several = (keep, keep, keep)
    for name in ("fastv", "pyramiddrop", "sparsevlm", "himap", "tokencarve", "illava", *(p.name for p in BLIND[:-1])):
        budget: Any = {"pyramiddrop": several, "sparsevlm": several, "himap": several[:2]}.get(name, keep)
        pruner = methods.get(name)(keep=budget, debias=debias, mode=mode)
        v = view(grid, size=size, after=after, seed=seed)
        selection, n = select(pruner, v), len(v)
        kept = selection.keep.tolist()
        recycled = [] if selection.recycled is None else selection.recycled.tolist()
        assert kept == sorted(set(kept)) and not set(kept) & set(recycled)
        assert len(kept) + len(recycled) <= pruner.size_after(0, n, n) and used(selection) <= set(range(n))
        if selection.merge is not None:
            merge = selection.merge
            assert set(merge.target.tolist()) <= set(kept) | set(recycled)
            total = torch.zeros(n).index_add_(0, merge.target, merge.weight.float())
            assert torch.allclose(total[merge.target], torch.ones(len(merge.target)), atol=1e-5)
        valid = debias.valid(v.tokens.row(0))
        if mode == "corrected" and name not in BLIND_NAMES and len(kept) < n:
            assert used(selection) <= set(valid.nonzero().flatten().tolist())


# -- FastV, PyramidDrop, HiMAP ---------------------------------------------------------------------------------------
def test_fastv_reads_the_last_real_row() -> None:
    real = torch.ones(24, dtype=torch.bool)
    real[-2:] = False
    v = view(real=real)
    assert v.last.tolist() == [[21]]
    expected = v.states.map.mean(0)[21, 3:19]  # type: ignore[union-attr]
    assert torch.equal(FastV(5).score(v)[0], expected)


def test_himap_sums_text_rows_and_later_visual_rows() -> None:
    attention = FakeAttention(24).map.mean(0)
    assert torch.allclose(HiMAP().score(view())[0], attention[19:, 3:19].sum(0))
    assert torch.allclose(HiMAP().score(view(stage=1))[0], attention[3:19, 3:19].sum(0))


def test_pyramid_budgets_are_rounded_down_from_the_original_number() -> None:
    pruner = PyramidDrop()
    assert [pruner.budget(i, 576, 576) for i in range(3)] == [184, 92, 46]
    assert PyramidDrop((0.5, 0.25, 0.125)).budget(1, 3, 577) == 144
    assert PyramidDrop(0.5).keep == (0.5, 0.25, 0.125)
    assert PyramidDrop(100).keep == (100, 50, 25)


@pytest.mark.parametrize("depth", [4, 6, 24, 28, 32, 40])
def test_default_stages_fit_any_depth(depth: int) -> None:
    for pruner in (PyramidDrop(), SparseVLM(), HiMAP()):
        layers = [s.layer for s in pruner.stages(depth)]
        assert sorted(set(layers)) == layers and layers[0] > 0 and layers[-1] < depth
    assert [s.layer for s in SparseVLM().stages(32)] == [3, 7, 16]
    assert [s.layer for s in SparseVLM(mode="official").stages(40)] == [3, 7, 16]
    assert [s.layer for s in PyramidDrop().stages(32)] == [2, 10, 20]


# -- SparseVLM -------------------------------------------------------------------------------------------------------
def test_raters_are_above_average_and_never_none() -> None:
    visual, text = torch.eye(4)[None], torch.eye(4)[None, :3]

    def chosen(*tensors: Tensor) -> list[int]:
        return raters(*tensors)[0].nonzero().flatten().tolist()

    assert chosen(visual, text * 3) in ([0, 1, 2], [0], [1], [2], [0, 1])
    assert chosen(visual, torch.ones(1, 1, 4)) == [0]
    text[0, 1] *= 9
    assert chosen(visual, text) == [1]
    # Rows with less text are filled up: the fillers rate nothing and are no reason to rate.
    filled = torch.cat([torch.full((1, 2, 4), 50.0), text], 1)
    assert chosen(visual, filled, torch.tensor([[False, False, True, True, True]])) == [3]


def test_recycling_counts_of_the_published_table() -> None:
    # (dropped, recycled, clusters) of the three tables, 576 tokens.
    for dropped, members, clusters in [(276, 83, 9), (273, 82, 9), (510, 154, 16), (52, 16, 2), (15, 5, 1), (1, 1, 1)]:
        assert recycling(dropped) == (members, clusters)


def test_density_peaks_finds_separate_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    x = (centres[:, None] + 0.1 * torch.randn(3, 6, 2, generator=generator)).reshape(-1, 2)
    centre, label = (found[0] for found in density_peaks(x[None], 3)[:2])
    groups = label.reshape(3, 6)
    assert bool((groups == groups[:, :1]).all()) and len(groups[:, 0].unique()) == 3
    assert label[centre].tolist() == [0, 1, 2]


def test_density_ties_are_broken_by_index() -> None:
    x = torch.tensor([[0.0], [0.0], [5.0], [5.0]])
    centre, label = (found[0] for found in density_peaks(x[None], 2)[:2])
    assert centre.tolist() == [0, 2] and label.tolist() == [0, 0, 1, 1]


def test_clusters_hold_the_means_of_their_members() -> None:
    v = view((8, 8))
    selection = select(SparseVLM((20, 10, 5)), v)
    merge, centres = selection.merge, selection.recycled
    assert merge is not None and centres is not None
    assert (len(merge.source), len(centres)) == recycling(44)
    states = merged(v, merge)
    for centre in centres:
        members = merge.source[merge.target == centre]
        assert torch.allclose(states[centre], v.features[0, members].mean(0), atol=1e-6)
    assert not set(merge.source.tolist()) & set(selection.keep.tolist())


def test_budgets_without_a_table_are_derived() -> None:
    pruner = SparseVLM(0.25)
    table = [pruner.budget(i, 10**6, 1000) for i in range(3)]
    assert table[0] > table[1] > table[2]
    assert SparseVLM(100).schedule(32, 576).average == pytest.approx(100, abs=1)
    assert SparseVLM(128).budget(0, 64, 64) == 64  # an average of at least all
    assert SparseVLM(128, mode="official").budget(0, 64, 64) == 63


# -- TokenCarve ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(20, 50), (50, 20), (30, 30)])
def test_the_gram_route_gives_the_contribution(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(contribution(x), contribution(x, exact=True), rtol=1e-4)


def test_contribution_of_rank_one_features() -> None:
    x = torch.outer(torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.6, 0.8]))
    assert torch.allclose(contribution(x), torch.tensor([1.0, 2.0, 3.0]), atol=1e-5)


def test_tokencarve_ranks_merges_and_keeps_means() -> None:
    v = view()
    selection = select(TokenCarve(6), v)
    method = TokenCarve(6)
    rank, merge = method.rate(v, method.ranked(v), None).rank[0], selection.merge
    assert merge is not None
    best = torch.sort(rank, descending=True, stable=True).indices[:9]
    moved = merge.source != merge.target
    assert set(selection.keep.tolist()) | set(merge.source[moved].tolist()) == set(best.tolist())
    assert set(merge.target.tolist()) <= set(best[:4].tolist())
    assert int(moved.sum()) == 3
    states = merged(v, merge)
    for target in merge.target.unique():
        group = merge.source[merge.target == target]
        assert target in group
        assert torch.allclose(states[target], v.features[0, group].mean(0), atol=1e-6)


def test_tokencarve_can_keep_nearly_all() -> None:
    assert len(select(TokenCarve(15), view()).keep) == 15


# -- iLLaVA ----------------------------------------------------------------------------------------------------------
def test_illava_weights_grow_towards_the_least_attended() -> None:
    v = view()
    selection = select(ILLaVA(12), v)
    order = torch.sort(v.attention(v.last)[0], descending=True, stable=True).indices
    merge = selection.merge
    assert merge is not None
    assert merge.source.tolist() == order[11:].tolist()
    assert set(merge.target.tolist()) == {int(order[11])}
    assert torch.allclose(merge.weight, torch.arange(1, 6, dtype=torch.float64) / 15)


def test_illava_rounds_the_dropped_share() -> None:
    assert ILLaVA(0.7).budget(0, 576, 576) == 403
    assert ILLaVA(0.5).budget(0, 5, 5) == 3  # round(2.5) is 2
    with_tower = ILLaVA(0.5, 2, vision_layers=(5, 6, 7, 8), vision_drop=92)
    assert with_tower.budget(0, 729, 729) == 361
    assert with_tower.budget(1, 361, 729) == 181


# -- baselines -------------------------------------------------------------------------------------------------------
def test_random_depends_on_the_question_and_the_seed_only() -> None:
    v = view()
    first = select(Random(5), v).keep
    assert torch.equal(first, select(Random(5), view(rows=(3,), memory=Memory())).keep)
    assert not torch.equal(first, select(Random(5, seed=1), v).keep)
    other = v.embeddings.clone()
    other[:, -1] += 1
    assert not torch.equal(first, select(Random(5), view(embeddings=other)).keep)


def test_a_quarter_of_the_tokens_is_two_by_two_pooling() -> None:
    v = view((8, 8))
    selection = select(Pool(16), v)
    assert selection.merge is not None
    states = merged(v, selection.merge)[selection.keep]
    image = v.features[0].reshape(8, 8, -1).permute(2, 0, 1)
    expected = torch.nn.functional.avg_pool2d(image, 2).flatten(1).T
    assert torch.allclose(states, expected, atol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 7, 64, 100, 128, 143, 575, 576])
def test_the_lattice_is_even_in_both_directions(count: int) -> None:
    tokens = VisualLayout.from_spans([(0, 576)], (24, 24)).rows[0]
    group, middle = lattice(tokens, count)
    sizes = torch.bincount(group, minlength=count)
    assert len(middle.unique()) == count and int(sizes.max() - sizes.min()) <= 1
    assert torch.equal(group[middle], torch.arange(count))
    for quarter in (tokens.cell // 24 < 12, tokens.cell % 24 < 12):
        kept = int(quarter[middle].sum())
        assert abs(kept - count / 2) <= 1 + 0.1 * count


def test_the_lattice_shares_tokens_among_pictures_by_size() -> None:
    tokens = VisualLayout.from_spans([[(0, 64), (70, 102)]], [(4, 4), (4, 8)]).rows[0]  # four frames, one image
    group, middle = lattice(tokens, 12)
    assert torch.bincount(tokens.image[middle]).tolist() == [8, 4]
    group, middle = lattice(tokens, 3)
    assert len(middle) == 3 and int((group < 0).sum()) > 0


def test_divprune_is_the_greedy_max_min_choice() -> None:
    v = view()
    unit = torch.nn.functional.normalize(v.features[0], dim=-1)
    distance = 1 - unit @ unit.T
    apart = distance.clone().fill_diagonal_(float("inf"))
    chosen = [int(apart.min(1).values.argmax())]
    while len(chosen) < 5:
        nearest = distance[:, chosen].min(1).values
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    assert select(DivPrune(5), v).keep.tolist() == sorted(chosen)


def test_tome_groups_hold_plain_means_and_duplicates_go_first() -> None:
    v = view()
    v.hidden[0, 4], v.hidden[0, 8] = v.hidden[0, 3], v.hidden[0, 5]  # candidates 1 and 5 repeat 0 and 2
    selection = select(ToMe(14), v)
    assert selection.merge is not None
    assert set(range(16)) - set(selection.keep.tolist()) == {0, 2}
    states = merged(v, select(ToMe(4), v).merge)  # type: ignore[arg-type]
    merge = select(ToMe(4), v).merge
    assert merge is not None and len(merge.target.unique()) == 4
    for target in merge.target.unique():
        assert torch.allclose(states[target], v.features[0, merge.source[merge.target == target]].mean(0), atol=1e-6)


@pytest.mark.parametrize("name", ["random", "uniform", "pool", "divprune", "tome"])
def test_blind_methods_ignore_debiasing(name: str) -> None:
    debias = Debias(PaddingMask(), Exponential(9.0))
    one, two = methods.get(name)(keep=5), methods.get(name)(keep=5, debias=debias)
    blind = {"size": (40, 20), "sources": [None]}
    assert torch.equal(select(one, view(**blind)).keep, select(two, view(**blind)).keep)


@pytest.mark.parametrize("itself", [False, True])
def test_gradients_of_merges_are_those_of_their_sums(itself: bool) -> None:
    """Several parts go to one target: each of them counts once."""
    generator = torch.Generator().manual_seed(0)
    source = torch.stack([torch.randperm(9, generator=generator)[:7] for _ in range(2)])
    target = torch.tensor([[1, 1, 4, 1, 4, 8, 8], [0, 0, 0, 0, 0, 0, 2]])
    merge = Merge(source, target, torch.rand(2, 7, generator=generator))
    weights = torch.randn(2, 9, 3, generator=generator)
    leaves = [torch.randn(2, 9, 3, generator=generator, requires_grad=True) for _ in range(2)]
    states, out = leaves[0] * 1.0, leaves[0 if itself else 1] * 1.0
    plain = [list(rows) for rows in out.detach().clone()]
    leaf, other = (leaf.detach().clone().requires_grad_() for leaf in leaves)
    for b in range(2):
        for place in range(9):
            plain[b][place] = (leaf if itself else other)[b, place]
            parts = [k for k in range(7) if int(target[b, k]) == place]
            if parts:
                plain[b][place] = torch.stack([merge.weight[b, k] * leaf[b, source[b, k]] for k in parts]).sum(0)
    expected = torch.stack([torch.stack(rows) for rows in plain])
    merge_states(states.clone(), out, merge)
    assert torch.allclose(out, expected, atol=1e-6)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    for mine, its in zip(leaves, (leaf, other), strict=True):
        assert (mine.grad is None) == (its.grad is None)
        assert mine.grad is None or torch.allclose(mine.grad, its.grad, atol=1e-6)


class Elsewhere(torch.Tensor):
    """Indices on another device, as far as a CPU can show it: they index nothing before they are moved."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__ and any(isinstance(value, cls) for value in args[1:]):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor")
        made = super().__torch_function__(func, types, args, kwargs or {})
        return made.as_subclass(torch.Tensor) if func is torch.Tensor.to else made


def test_rows_of_states_that_lie_on_another_device_than_the_stage() -> None:
    """A model spread over several: the layer that was listened to may be on the one before."""
    states = torch.randn(3, 2, 4, 8)
    paid = AttentionStates(states, states, torch.ones(3, 4), 1.0, samples=torch.zeros(3, 4))
    some = paid.select(torch.tensor([0, 2]).as_subclass(Elsewhere))
    for found, whole in (
        (some.query, states),
        (some.key, states),
        (some.mask, paid.mask),
        (some.samples, paid.samples),
    ):
        assert torch.equal(found, whole[[0, 2]])
