"""Claim: MR-Net is nearer to unseen shapes than a fitted shape model, and suffers less from missing slices.

``paperworks claim mr_net``: 1000 steps of ``small`` for each of three seeds, on synthetic ventricles whose vertices correspond. ``pca`` fits
mean + P b, ten modes of the same training shapes, to the nearest points by regularised least squares, again and again: the iterations that the
network is to replace, and a strong rival where shapes vary linearly. ``template`` is the mean shape at the contours' middle. These two know no
chance and give every seed the same numbers.

``vertex_error`` is the mean over validation shapes with 0, 2 and 4 slices missing, ``growth`` the error with four missing less that with none,
both in millimetres. What can fail: the shapes are smooth and few numbers describe them, which is what the shape model is made for; and a network
that has learnt little does not depend on its input, grows little, and is then caught by the first part of the rule.
"""

from __future__ import annotations

from statistics import fmean

from paperworks.tasks.claim import Claim, Lab, Results

STEPS = 1000


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train, or fit, and judge on unseen shapes."""
    predict = lab.fit(variant="small", steps=STEPS).predict if arm == "mr_net" else lab.data.baselines()[arm]
    found = lab.evaluate(predict)
    by = {count: found[f"vertex_error/{count} slices missing"] for count in (0, 2, 4)}
    rest = {name: found[name] for name in ("vertex_error", "chamfer", "surface_distance", "hausdorff", "volume_error")}
    return {**rest, "growth": by[4] - by[0], **{f"vertex_error/{count} slices missing": value for count, value in by.items()}}


def holds(results: Results) -> bool:
    """Smaller error and smaller growth than the fitted shape model's, and a smaller error than the template's."""
    mean = {arm: {name: fmean(results[arm][name]) for name in ("vertex_error", "growth")} for arm in ("mr_net", "pca", "template")}
    ours, rival = mean["mr_net"], mean["pca"]
    nearer = ours["vertex_error"] < min(rival["vertex_error"], mean["template"]["vertex_error"])
    return nearer and ours["growth"] < rival["growth"]


CLAIM = Claim(
    data="pack:ventricles",
    arms=("mr_net", "pca", "template"),
    control="pca",
    metric="vertex_error",
    run=run,
    holds=holds,
    rule=(
        "Averaged over the seeds, MR-Net's vertex error over 0, 2 and 4 missing slices is smaller than that of the fitted shape model and of the "
        "mean shape, and its growth from none to four missing slices is smaller than the shape model's.",
        "按随机种子取平均：MR-Net 在缺 0、2、4 层时的平均顶点误差小于形状模型拟合与平均形状，且从不缺到缺四层的误差增长小于形状模型。",
    ),
    minutes=6.0,
)
