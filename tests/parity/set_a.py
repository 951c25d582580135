"""Cases of FastV, PyramidDrop, SparseVLM and padding masks ("set_a" format)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from evengaze.debias import Debias, Exponential, PaddingMask, Polynomial, TrendCurve
from evengaze.layout import ImageInfo, VisualLayout
from evengaze.methods.base import Pruner
from evengaze.methods.fastv import FastV
from evengaze.methods.official import FastVMasked, FastVRecompute
from evengaze.methods.pyramiddrop import PyramidDrop
from evengaze.methods.sparsevlm import Raters, SparseVLM, density_peaks, relevance
from evengaze.protocol import take_states
from evengaze.schedule import Schedule
from parity.record import Folder, Recorded, Report, run

SCORE, HIDDEN, LOGITS, MERGED = 5e-6, 1e-3, 2e-3, 5e-4


class SetA:
    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.inputs = folder.arrays(folder.index["inputs"]["file"])
        model = folder.index["model"]
        self.model = folder.model(model["config"].split()[0], model["weights"].split()[0])

    def cases(self) -> list[dict[str, Any]]:
        masks = {"case": "masks", "method": "masks", "file": self.folder.index["masks"]["file"]}
        return [masks, *self.folder.index["cases"]]

    def name(self, case: dict[str, Any]) -> str:
        return str(case["case"])

    def method(self, case: dict[str, Any]) -> str:
        return str(case["method"])

    def check(self, case: dict[str, Any], report: Report) -> None:
        if case["method"] == "masks":
            _masks(report)
            return
        embeds, layout = self.prompt(case)
        tokens = report.want("decode_tokens").tolist() if "decode_tokens" in report else []
        pruner = self.pruner(case)
        stages = range(len(pruner.stages(self.model.config.num_hidden_layers))) if pruner else []
        ties = case.get("ties_at_zero_score")
        prefer = {i: report.want(f"s{i}_keep") for i in stages} if ties else None
        noise = {i: report.want(f"s{i}_noise") for i in stages if f"s{i}_noise" in report}
        recorded = run(
            self.model,
            embeds,
            tokens,
            pruner,
            layout,
            cached=not isinstance(pruner, FastVRecompute),
            prefer=prefer,
            noise=noise,
        )
        if "lmms" in case["variant"]:  # it calls layer K-1 twice, whose cache then holds everything twice, to no effect
            twice = torch.ones(len(recorded.prefill.cached), dtype=torch.long)
            twice[pruner.stages(len(twice))[0].layer - 1] = 2
            for name in ("prefill_kv_len", "decode_kv_len"):
                report.arrays[name] = report.arrays[name] // twice.numpy()
        _model(report, recorded)
        if pruner is None:
            return
        if case["method"] == "sparsevlm":
            _sparsevlm(report, recorded, pruner, case)
        _stages(report, recorded, ties=bool(ties))

    def pruner(self, case: dict[str, Any]) -> Pruner | None:
        method = case["method"]
        if method in ("none", "masks"):
            return None
        common: dict[str, Any] = {"debias": self.debias(case), "mode": "official"}
        if method == "fastv":
            if "fast_v_agg_layer" in case:
                kind = FastVRecompute if "no KV cache" in case["variant"] else FastVMasked
                return kind(case["fast_v_attention_rank"], case["fast_v_agg_layer"], **common)
            if "fastv_k" in case:
                return FastV(1 - case["fastv_r"], case["fastv_k"], **common)
            return FastV(case["effective_budget"], 3, **common)  # lmms-eval: hard-coded layer
        if method == "pyramiddrop":
            return PyramidDrop(tuple(case["image_token_ratio_list"]), tuple(case["layer_list"]), **common)
        if method == "sparsevlm":
            return SparseVLM(case["retained_tokens"], tuple(s["layer"] for s in case["stages"]), **common)
        raise NotImplementedError(method)

    def debias(self, case: dict[str, Any]) -> Debias | None:
        padding, weight = None, case.get("weight_name")
        if case.get("image_size"):
            if case["method"] == "fastv":
                padding = PaddingMask(formula="unpad") if case["tag"] == "before" else PaddingMask(0.5, "pad")
            else:
                padding = (
                    PaddingMask(0.01, "pad") if case["method"] == "pyramiddrop" else PaddingMask(formula="bilinear")
                )
        if padding is None and weight is None:
            return None
        return Debias(padding, None if weight is None else trend(self.folder.weights[weight], case["n_image"]))

    def prompt(self, case: dict[str, Any]) -> tuple[Tensor, VisualLayout]:
        """Embeddings and where the image is."""
        embeds = torch.from_numpy(self.inputs[case["input"]])
        rows = len(embeds)
        names = ("sys_length", "image_token_start_index", "image_index", "pre_prompt_length")
        start = next((case[n] for n in names if n in case), 35)
        count = case["n_image"]
        side = round(count**0.5)
        sizes = [tuple(case["image_size"])] * rows if case.get("image_size") else None
        return embeds, VisualLayout.from_spans([(start, start + count)] * rows, (side, side), image_sizes=sizes)


def trend(entry: dict[str, Any], tokens: int) -> TrendCurve:
    """A weight of weights.json."""
    if "k_per_index" in entry:
        return Exponential.per_index(entry["k_per_index"], tokens)
    return Polynomial(tuple(reversed(entry["one_over_w_coefficients_of_x_high_to_low"])))


def _masks(report: Report) -> None:
    sizes = report.want("sizes_wh").tolist()
    for name in report.arrays:
        kind, _, rest = name.partition("_")
        if kind not in ("unpad", "pad", "bilinear"):
            continue
        side, _, threshold = rest.partition("_thr")
        mask = PaddingMask(float(threshold or 0.5), kind)  # type: ignore[arg-type]
        report.equal(name, [mask.lines(ImageInfo((int(side), int(side)), 1, tuple(size))) for size in sizes])


def _model(report: Report, recorded: Recorded) -> None:
    """Logits, hidden states, positions and lengths."""
    prefill, steps = recorded.prefill, recorded.steps
    report.close("prefill_logits", prefill.logits[0], atol=LOGITS)
    report.close("prefill_logits_b2", prefill.logits, atol=LOGITS)
    report.close("prefill_hidden_last_per_layer", torch.stack([x[0] for x in prefill.last]), atol=HIDDEN)
    report.close("prefill_hidden_last_prenorm", prefill.prenorm[0], atol=HIDDEN)
    report.close("prefill_hidden_last_norm", prefill.norm[0], atol=HIDDEN)
    report.equal("prefill_n_in", [x.shape[1] for x in prefill.inputs])
    report.equal("prefill_pos_last", [x[0, -1] for x in prefill.positions])
    report.equal("prefill_kv_len", prefill.cached)
    for i, (hidden, position) in enumerate(zip(prefill.inputs, prefill.positions, strict=True)):
        report.close(f"layer{i}_input", hidden[0], atol=HIDDEN)
        report.equal(f"prefill_pos_layer{i}", position[0])
    if steps:
        report.close("decode_logits", torch.stack([x.logits[0] for x in steps]), atol=LOGITS)
        report.equal("decode_pos", [[p[0, -1] for p in x.positions] for x in steps])
        report.equal("decode_kv_len", [x.cached for x in steps])


def _stages(report: Report, recorded: Recorded, *, ties: bool) -> None:
    """Scores and choices of every stage, and of every step of a method that ranks again."""
    rows = len(recorded.prefill.logits)
    entries = recorded.log
    again = "decode_keep" in report
    prefill = entries[: len(entries) - 4] if again else entries
    for i in range(len(prefill) // rows):
        group = prefill[i * rows : (i + 1) * rows]
        entry = group[0]
        report.close(f"s{i}_scores_raw", entry.raw, atol=SCORE)
        report.close(f"s{i}_scores_rank", entry.score, atol=SCORE)
        report.same_set(f"s{i}_keep", entry.selection.keep)
        report.same_set(f"s{i}_keep_orig", entry.tokens.cell[entry.selection.keep])
        report.close(f"s{i}_scores_rank_b2", torch.stack([e.score for e in group]), atol=SCORE)
        report.equal(f"s{i}_keep_b2", torch.stack([e.selection.keep for e in group]))
        if f"s{i}_topk_order" in report:
            order = report.want(f"s{i}_topk_order")
            ours = torch.sort(entry.score, descending=True, stable=True).indices[: len(order)]
            report.equal(f"s{i}_topk_order", ours)
    if again:
        report.close("decode_scores_rank", torch.stack([e.score for e in entries[-4:]]), atol=SCORE)
        report.equal("decode_keep", torch.stack([e.selection.keep for e in entries[-4:]]))


def _sparsevlm(report: Report, recorded: Recorded, pruner: Pruner, case: dict[str, Any]) -> None:
    first = recorded.log[0].view
    raters = first.memory.get(Raters)
    report.equal("raters", raters.chosen[0].nonzero().flatten())
    visual = take_states(first.embeddings, first.initial.position)
    report.close("rater_scores", relevance(visual[:1], first.question[:1])[0], atol=SCORE)
    if "weights_used" in report and pruner.debias is not None:
        valid = pruner.debias.valid(first.initial.row(0), official=True)
        report.close("weights_used", valid * pruner.debias.weight(first.initial.row(0)), atol=SCORE)
    layers = len(recorded.prefill.inputs)
    schedule = Schedule.of(pruner, layers, case["n_image"])
    report.close("avg_tokens_official", sum([*schedule.entering[1:], schedule.entering[-1]]) / layers, atol=1e-4)
    flops = schedule.paper_flops(64, 128, mlp_matrices=3, text=recorded.prefill.inputs[0].shape[1] - case["n_image"])
    report.close("flops_official", flops, atol=0, rtol=1e-6)

    origin = torch.arange(case["n_image"])
    for i, entry in enumerate(recorded.log):
        merge, centres = entry.selection.merge, entry.selection.recycled
        assert merge is not None and centres is not None
        report.equal(f"s{i}_origin", origin)
        report.equal(f"s{i}_recycle_idx", merge.source)
        report.close(f"s{i}_recycle_in", entry.features[merge.source], atol=HIDDEN)
        place = {int(t): k for k, t in enumerate(merge.source)}
        label = {int(t): k for k, t in enumerate(centres)}
        report.equal(f"s{i}_centers", [place[int(t)] for t in centres])
        report.equal(f"s{i}_assign", [label[int(t)] for t in merge.target])
        merged = torch.zeros(len(centres), entry.features.shape[1])
        merged.index_add_(
            0, torch.tensor([label[int(t)] for t in merge.target]), entry.features[merge.source] * merge.weight[:, None]
        )
        report.close(f"s{i}_merged", merged, atol=MERGED)
        noise = 1e-6 * report.want(f"s{i}_noise") if f"s{i}_noise" in report else torch.zeros(len(merge.source))
        score = density_peaks(entry.features[merge.source][None], len(centres), noise)[2][0]
        report.close(f"s{i}_center_scores", score, atol=SCORE)
        clusters = -(100 * (i + 1) + torch.arange(len(centres)))
        origin = torch.cat([origin[entry.selection.keep], clusters])
