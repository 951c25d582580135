"""Cases of HiMAP, TokenCarve and iLLaVA ("set_b" format)."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from evengaze.debias import Debias, PaddingMask
from evengaze.layout import VisualLayout
from evengaze.methods.base import Pruner
from evengaze.methods.himap import HiMAP
from evengaze.methods.illava import ILLaVA
from evengaze.methods.official import HiMAPRecompute
from evengaze.methods.tokencarve import TokenCarve
from parity.record import Folder, Recorded, Report, run
from parity.set_a import trend

ATOL, RTOL = 2e-3, 1e-3


class SetB:
    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        files = folder.index["shared_files"]
        weights = next(f for f in files if "llama" in f and f.endswith(".safetensors"))
        config = next(f for f in files if "llama" in f and f.endswith(".json"))
        self.model = folder.model(config, weights)

    def cases(self) -> list[dict[str, Any]]:
        return list(self.folder.index["cases"])

    def name(self, case: dict[str, Any]) -> str:
        return str(case["name"])

    def method(self, case: dict[str, Any]) -> str:
        return str(case["method"]).split()[0].lower()

    def check(self, case: dict[str, Any], report: Report) -> None:
        if "encoder" in case["method"]:
            from parity.vision import check_tower

            check_tower(self.folder, case, report)
            return
        tokens = report.want("decode_tokens").tolist()[:-1]
        pruner = self.pruner(case)
        embeds, layout = self.prompt(case)
        prefer = {0: report.want("keep1")} if case.get("ties_possible") and "keep1" in report else None
        recorded = run(self.model, embeds, tokens, pruner, layout, prefer=prefer)
        _model(report, recorded)
        method = self.method(case)
        if method == "himap":
            _himap(report, recorded, case)
            if "nc_tokens" in report:
                tokens = report.want("nc_tokens").tolist()[:-1]
                again = HiMAPRecompute(pruner.keep, pruner.layers, debias=pruner.debias)  # type: ignore[union-attr]
                recorded = run(self.model, embeds, tokens, again, layout, cached=False, prefer=prefer)
                self._recomputed(report, recorded)
        elif method == "tokencarve":
            _tokencarve(report, recorded, case)
        elif method == "illava":
            _illava(report, recorded, case)

    def prompt(self, case: dict[str, Any]) -> tuple[Tensor, VisualLayout]:
        """Embeddings and where the image is."""
        shared, seed = self.folder.arrays(case["input"]["file"]), case["input"]["seed"]
        embed = self.model.get_input_embeddings()
        with torch.no_grad():
            before, after = (embed(torch.from_numpy(shared[f"{k}_ids_s{seed}"]).long()) for k in ("sys", "txt"))
        embeds = torch.cat([before, torch.from_numpy(shared[f"img_s{seed}"]), after])[None]
        p, count = case["params"], case["input"]["n_img"]
        start = p.get("sys_length", p.get("image_token_start_index", case["input"]["sys"]))
        size, side = p.get("image_size_wh"), round(count**0.5)
        sizes = [tuple(size)] if size else None
        return embeds, VisualLayout.from_spans([(start, start + count)], (side, side), image_sizes=sizes)

    def pruner(self, case: dict[str, Any]) -> Pruner | None:
        p, method = case["params"], self.method(case)
        common: dict[str, Any] = {"debias": self.debias(case), "mode": "official"}
        if method == "none" or "encoder" in case["method"]:
            return None
        if method == "himap":
            stages = [(p["txt_rank"], p["txt_layer"]), (p.get("img_rank"), p.get("img_layer"))]
            keep, layers = zip(*(s for s in stages if s[0] is not None), strict=True)
            return HiMAP(keep, layers, **common)
        if method == "tokencarve":
            balance = (p["SV_AV_weight"], 0.0, 1.0)[p["SV_AV_mode"]]
            return TokenCarve(p["N"], p["work_layer"], balance, **common)
        if method == "illava":
            dropped, (layer,) = p["illava_llm_r"], p["illava_llm_k"]
            keep = float(dropped) if dropped < 1 else case["input"]["n_img"] - dropped
            return ILLaVA(keep, layer, **common)
        raise NotImplementedError(method)

    def debias(self, case: dict[str, Any]) -> Debias | None:
        p = case["params"]
        padding = PaddingMask(p["mask_threshold"], "pad") if p.get("image_size_wh") else None
        weight = p.get("weight")
        if padding is None and weight is None:
            return None
        name = None if weight is None else re.split(r"[: ]", weight.replace("debias_weights.npz:", ""))[0]
        curve = None if name is None else trend(self.folder.weights[name], case["input"]["n_img"])
        return Debias(padding, curve)

    def _recomputed(self, report: Report, recorded: Recorded) -> None:
        """The steps of the evaluation without a cache; the prompt is that of the cached run."""
        stages = len(recorded.log) // (1 + len(recorded.steps))
        entries = recorded.log[stages:]
        report.close("nc_logits", torch.stack([s.logits[0] for s in recorded.steps]), atol=ATOL, rtol=RTOL)
        for i in range(stages):
            kept = [e.tokens.cell[e.selection.keep] for e in entries[i::stages]]
            report.equal(f"nc_keep{i + 1}", torch.stack(kept))


def _model(report: Report, recorded: Recorded) -> None:
    prefill, steps = recorded.prefill, recorded.steps
    report.close("logits", prefill.logits[0], atol=ATOL, rtol=RTOL)
    report.close("hidden_last", prefill.norm[0], atol=ATOL, rtol=RTOL)
    report.close("hidden_prenorm", prefill.prenorm[0], atol=ATOL, rtol=RTOL)
    report.equal("kv_len", prefill.cached)
    report.close("decode_logits", torch.stack([s.logits[0] for s in steps]), atol=ATOL, rtol=RTOL)
    report.equal("decode_positions", [[p[0, -1] for p in s.positions] for s in steps])


def _himap(report: Report, recorded: Recorded, case: dict[str, Any]) -> None:
    report.equal("pos_mid", recorded.prefill.positions[case["params"]["txt_layer"]][0])
    report.equal("pos_final", recorded.prefill.positions[-1][0])
    for i, entry in enumerate(recorded.log, start=1):
        if i == 1:
            report.close("scores1_raw", entry.raw, atol=1e-7, rtol=1e-4)
        report.close(f"scores{i}", entry.score, atol=1e-7, rtol=1e-4)
        report.same_set(f"keep{i}", entry.tokens.cell[entry.selection.keep])
        if f"topk{i}" in report:
            report.sorts(f"topk{i}", entry.score, 1e-6)


def _tokencarve(report: Report, recorded: Recorded, case: dict[str, Any]) -> None:
    p, entry = case["params"], recorded.log[0]
    memory, merge = entry.details, entry.selection.merge
    report.close("av_raw", entry.raw, atol=1e-8, rtol=1e-4)
    report.close("av", entry.score, atol=1e-8, rtol=1e-4)
    report.close("sv", memory["contribution"], atol=1e-6, rtol=1e-3)
    report.close("singular_values", torch.linalg.svdvals(entry.features), atol=1e-4, rtol=1e-3)
    report.sorts("av_order", entry.score, 1e-5)
    report.sorts("sv_order", memory["contribution"], 1e-5)
    if p["SV_AV_mode"] == 0:
        off = (memory["rank_sum"] - report.want("rank_sum")).abs()
        # Neighbours in the order of contributions may swap places if they are closer than float32 SVDs can tell.
        if float(off.max()) > 0.5 or bool((_gap(report.want("sv"))[off > 0] > 1e-5).any()):
            report.fail(f"rank_sum: {int((off > 0).sum())} entries differ, by up to {float(off.max())}")
    else:
        report.waive("rank_sum")  # not what this mode ranks by
    better, worse = memory["better"], memory["worse"]
    report.same_set("top", torch.cat([better, worse]))
    report.same_set("set_a", better)
    report.same_set("set_b", worse)
    place = {int(t): k for k, t in enumerate(worse)}
    rows = torch.tensor([place.get(int(t), 0) for t in report.want("set_b")])
    report.close("cos_max", memory["closeness"][rows], atol=1e-4)
    names = report.want("set_a")[report.want("cos_arg")]
    if not torch.equal(better[memory["partner"][rows]], names):
        report.fail("cos_arg: other partners")
    assert merge is not None
    moved = merge.source != merge.target
    pairs = set(zip(merge.source[moved].tolist(), merge.target[moved].tolist(), strict=True))
    if pairs != set(zip(report.want("merge_b").tolist(), report.want("merge_a").tolist(), strict=True)):
        report.fail("merge_b, merge_a: other pairs")
    report.same_set("keep_b", sorted(set(worse.tolist()) - {b for b, _ in pairs}))
    length, start, count = recorded.prefill.inputs[0].shape[1], p["sys_length"], case["input"]["n_img"]
    kept = entry.selection.keep + start
    report.equal("keep_abs", torch.cat([torch.arange(start), kept, torch.arange(start + count, length)]))
    report.equal("keep_abs", recorded.prefill.positions[-1][0])
    report.close("hidden_l2_in", recorded.prefill.inputs[p["work_layer"]][0], atol=ATOL, rtol=RTOL)


def _gap(score: Tensor) -> Tensor:
    """Relative distance of each score to the nearest other one."""
    ordered, order = score.double().sort()
    step = torch.diff(ordered, prepend=ordered[:1] - 1, append=ordered[-1:] + 1)
    gap = torch.empty_like(ordered)
    gap[order] = torch.minimum(step[1:], step[:-1]) / ordered.abs()
    return gap


def _illava(report: Report, recorded: Recorded, case: dict[str, Any]) -> None:
    entry, (layer,) = recorded.log[0], case["params"]["illava_llm_k"]
    merge = entry.selection.merge
    assert merge is not None
    members = merge.source
    report.close("score_raw", entry.raw, atol=1e-8, rtol=1e-4)
    report.close("score", entry.score, atol=1e-8, rtol=1e-4)
    # Scores that differ by rounding only sort differently on another processor.
    report.sorts("order", entry.score, 1e-6)
    report.same_set("merge_members", members)
    report.sorts("merge_members", entry.score, 1e-6)
    report.equal("target", merge.target[0])
    report.same_set("dropped", members[1:])
    report.sorts("dropped", entry.score, 1e-6)
    report.equal("keep", entry.selection.keep)
    hidden, position = recorded.prefill.inputs[layer][0], recorded.prefill.positions[layer][0]
    report.close("hidden_k_in", hidden, atol=ATOL, rtol=RTOL)
    report.equal("pos", position)
    start = int(entry.view.initial.position[0, 0])
    place = int((entry.selection.keep == merge.target[0]).nonzero()) + start
    report.close("merged_value", hidden[place], atol=ATOL, rtol=RTOL)
