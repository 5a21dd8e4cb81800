"""The pages about speed, from results/benchmarks: docs/benchmarks.md, docs/backbones.md with its figure, and both in Chinese."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def recorded(name: str) -> dict[str, Any]:
    """A benchmark's record; empty where there is none."""
    path = ROOT / "results" / "benchmarks" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


# --- docs/benchmarks.md

Row = tuple[tuple[str, str], str, str, float, float]
"""What was measured (English, Chinese), ours, the other's, ours / the other's, the most that it should be."""


def ms(value: float) -> str:
    """Milliseconds, or seconds from a thousand on."""
    return f"{value:.3g} ms" if value < 999.5 else f"{value / 1e3:.3g} s"


def rows() -> Iterator[Row]:
    """Everything that has something to be measured against."""
    peers = recorded("peers")
    kinds = (("forward", "前向", 1.0), ("step", "训练步", 1.0), ("predict", "predict", 0.5), ("bf16", "predict --precision bf16", 0.5))
    for what, zh, aim in kinds if peers else ():
        mean = peers["geometric_mean"][what]
        said = zh if what == "bf16" else what
        yield (f"{said}, geometric mean of all networks", f"{zh}，全部网络的几何平均"), "", "", mean, aim
        for r in peers["rows"]:
            if r["what"] == what:
                yield (
                    (f"{said}, {r['network']} ({r['library']})", f"{zh}，{r['network']}（{r['library']}）"),
                    ms(r["ours_ms"]),
                    ms(r["theirs_ms"]),
                    r["ratio"],
                    aim if aim < 1 else 1.1,
                )
    backbones = [r for r in recorded("backbones").get("rows", ()) if r["size"] == "paper" and r.get("onnxruntime_1_ms")]
    if backbones:
        mean = math.exp(sum(math.log(r["onnxruntime_1_ms"] / r["eager_1_ms"]) for r in backbones) / len(backbones))
        yield ("exported, geometric mean of the wing, against eager", "导出后，分类网络的几何平均，对比 eager"), "", "", mean, 0.5
    for r in recorded("augmentation").get("rows", ()):
        if r["library"] == "albumentations":
            kind = ("with elastic deformation", "含弹性形变") if r["elastic"] else ("without", "不含")
            said = tuple(f"{w} {k}, {r['channels']} ch, {r['threads']} thr" for w, k in zip(("augmentation", "增强"), kind))
            ours = 1e3 * r["seconds"] / r["times_ours"]
            yield (said[0], said[1]), ms(ours), ms(1e3 * r["seconds"]), 1 / r["times_ours"], 0.5 if r["elastic"] else 1.0
    for r in recorded("dense_crf").get("rows", ()):
        if r["arm"] != "paperworks":
            yield (
                (f"dense CRF, {r['setting']} kernels", f"稠密 CRF，{r['setting']}"),
                ms(1e3 * r["seconds"] / r["times_ours"]),
                ms(1e3 * r["seconds"]),
                1 / r["times_ours"],
                0.5,
            )
    tiled = {(r["network"], r["size"], r["arm"]): r["seconds"] for r in recorded("tiling").get("rows", ())}
    for (network, size, arm), seconds in tiled.items():
        if arm != "monai":
            form, theirs = " in bf16" if arm == "paperworks/bf16" else "", tiled[network, size, "monai"]
            said = f"tiled prediction, {network}{form}, {size}", f"分块预测，{network}{form.replace(' in', '')}，{size}"
            yield said, ms(1e3 * seconds), ms(1e3 * theirs), seconds / theirs, 0.6
    loaded = {(r["workers"], r["arm"]): r["seconds"] for r in recorded("loading").get("rows", ())}
    for workers in sorted({workers for workers, _ in loaded}):
        seconds, theirs = loaded[workers, "paperworks"], loaded[workers, "torchvision"]
        said = f"training images read and varied, {workers} workers", f"训练图像的读取与增强，{workers} 个进程"
        yield said, ms(1e3 * seconds), ms(1e3 * theirs), seconds / theirs, 1.0
    for r in recorded("boxes").get("rows", ()):
        yield (r["what"], r["zh"]), ms(r["ours_ms"]), ms(r["theirs_ms"]), r["ratio"], 1.0
    for r in recorded("startup").get("rows", ()):
        yield (f"start-up: {r['what']}", f"启动：{r['what']}"), ms(1e3 * r["seconds"]), ms(1e3 * r["limit"]), r["seconds"] / r["limit"], 1.0
    for r in recorded("gallery").get("rows", ()):
        if r["arm"] == "first time":
            yield (
                (f"gallery of {r['papers']} papers", f"{r['papers']} 篇论文的展厅"),
                ms(1e3 * r["seconds"]),
                "20 s",
                r["seconds"] / 20,
                1.0,
            )
    for r in recorded("halving").get("rows", ()):
        yield (
            (f"compare --halving, {r['pack']}, {r['papers']} papers, missed {r['missed']:.3f}", f"compare --halving，{r['pack']}，{r['papers']} 篇，差 {r['missed']:.3f}"),
            ms(1e3 * r["halving_seconds"]), ms(1e3 * r["whole_seconds"]), r["time"], 1 / 3,
        )  # fmt: skip


SPEED = {
    "docs/benchmarks.md": {
        "title": "Benchmarks",
        "other": "[中文](benchmarks.zh.md)",
        "how": "`make bench` measures, `make docs` writes this page from `results/benchmarks/`, where machine, versions and spread stand. Ratios are ours / the other's, so that below 1 ours is "
        "faster; arms take turns. Start-up is measured against the time that is allowed, halving against training every paper to the end "
        "(*missed*: by how much its winner is worse than the best of all). Bold: more than was aimed at; [decision 14](decisions/0014-fast-path.md) says "
        "where the time goes. Everything is measured on the processor: no GPU was at hand so far.",
        "head": ("what", "ours", "other", "ratio", "aim"),
        "serving": "The gallery's server under visitors who ask again and again for a picture of 256 x 256 pixels by one of two networks (`benchmarks/serve.py`); what is more than it "
        "takes at once is refused, and asked again.",
        "served": ("visitors", "answers a second", "half within", "95 % within", "refused"),
    },
    "docs/benchmarks.zh.md": {
        "title": "性能基准",
        "other": "[English](benchmarks.md)",
        "how": "`make bench` 负责测量，`make docs` 由 `results/benchmarks/` 生成本页，机器、版本与离散程度见该处。比值为我们 / 对方，小于 1 表示我们更快；各方轮流运行。"
        "启动时间与允许的时间相比，halving 与把每篇论文都训练到底相比"
        "（“差”：其胜者比全体最优差多少）。粗体：未达到目标，时间花在哪里见[决策 14](decisions/0014-fast-path.md)。全部在处理器上测得，目前没有 GPU 可用。",
        "head": ("项目", "我们", "对方", "比值", "目标"),
        "serving": "展厅的服务器：访客不断请求两个网络之一处理一张 256 x 256 像素的图（`benchmarks/serve.py`）；超出同时受理数的请求会被拒绝，由访客重试。",
        "served": ("访客", "每秒回答", "半数不超过", "95 % 不超过", "拒绝"),
    },
}


def benchmarks(words: Mapping[str, Any], chinese: bool) -> str:
    """The page of all ratios."""
    lines = [words["head"], ["---"] * len(words["head"])]
    for said, ours, theirs, ratio, aim in rows():
        value = f"{ratio:.2f}"
        lines.append([said[chinese], ours, theirs, value if float(value) <= round(aim, 2) else f"**{value}**", f"{aim:.2f}"])
    served = [words["served"], ["---"] * len(words["served"])]
    for r in recorded("serve").get("rows", ()):
        served.append(
            [str(r["visitors"]), f"{r['requests_per_second']:.1f}", ms(1e3 * r["p50_s"]), ms(1e3 * r["p95_s"]), str(r["refused"])]
        )
    tables = ["\n".join("| " + " | ".join(line) + " |" for line in part) for part in (lines, served)]
    return "\n\n".join([f"# {words['title']}", words["other"], words["how"], tables[0], words["serving"], tables[1]]) + "\n"


# --- docs/backbones.md

COLUMNS = ("eager_1_ms", "channels_last_1_ms", "onnxruntime_1_ms", "eager_8_ms", "channels_last_8_ms", "onnxruntime_8_ms")
WING = {
    "docs/backbones.md": {
        "title": "Networks that classify images, side by side",
        "other": "[中文](backbones.zh.md)",
        "how": "All on one machine: {hardware}, {threads} threads, {date}. Operations count a multiplication with its addition as two; activations are the numbers "
        "that convolutions, matrix products and attentions write. Latencies are medians in milliseconds at batch 1 and 8. `python benchmarks/backbones.py` measures, "
        "`make docs` writes this page.",
        "laptop": "Small variants: what they learn",
        "learnt": "Images of 32 pixels, ten classes. Accuracy after the same training: {steps} steps of {batch} images of `{pack}` from fresh weights, one seed; 500 "
        "validation images, so differences below four points say little. Baselines: {baselines}. In bold: the front, on which no other is both faster and better.",
        "paper": "At the paper's size",
        "own": "The smallest variant that the paper describes for ImageNet, at its own image size, with fresh weights.",
        "head": ("paper", "variant", "M parameters", "MFLOPs", "M activations", "accuracy"),
        "forms": ("eager 1", "channels_last 1", "onnxruntime 1", "eager 8", "channels_last 8", "onnxruntime 8"),
        "figure": "Accuracy against latency; the line is the front",
    },
    "docs/backbones.zh.md": {
        "title": "图像分类网络的并列比较",
        "other": "[English](backbones.md)",
        "how": "同一台机器：{hardware}，{threads} 线程，{date}。一次乘加计为两次运算；激活数是卷积、矩阵乘法和注意力写出的数值个数。延迟为批量 1 和 8 时的中位数（毫秒）。"
        "`python benchmarks/backbones.py` 负责测量，`make docs` 生成本页。",
        "laptop": "小型变体：学到了多少",
        "learnt": "32 像素、十个类别。相同训练之后的准确率：从头训练，`{pack}` 上每步 {batch} 张、共 {steps} 步，一个随机种子；验证图像 500 张，因此四个百分点以内的差别说明不了什么。"
        "基线：{baselines}。粗体为前沿：没有别的网络比它既更快又更好。",
        "paper": "论文自身的规模",
        "own": "论文为 ImageNet 描述的最小变体，使用其自身的图像尺寸，权重未经训练。",
        "head": ("论文", "变体", "参数（百万）", "MFLOPs", "激活（百万）", "准确率"),
        "forms": ("eager 1", "channels_last 1", "onnxruntime 1", "eager 8", "channels_last 8", "onnxruntime 8"),
        "figure": "准确率与延迟；折线为前沿",
    },
}


def fastest(row: Mapping[str, Any]) -> float:
    """Milliseconds of one image in the fastest of the forms."""
    return min(row[c] for c in COLUMNS[:3] if row.get(c))


def on_front(rows: list[dict[str, Any]]) -> set[str]:
    """The papers to which no other is at least as fast and better."""
    front, best = set(), -1.0
    for row in sorted(rows, key=lambda r: (fastest(r), -r["top1"])):
        if row["top1"] > best:
            best = row["top1"]
            front.add(row["paper"])
    return front


def wing(found: Mapping[str, Any], words: Mapping[str, Any]) -> str:
    """The page of all classification networks."""
    rows = [r for r in found["rows"] if "failed" not in r]
    laptop = sorted((r for r in rows if "top1" in r), key=lambda r: -r["top1"])
    front = on_front(laptop)
    said = {
        "hardware": found["hardware"].get("cpu") or "CPU",
        "threads": found["threads"],
        "date": found["date"],
        "steps": found["steps"],
        "batch": found["batch"],
        "pack": found["pack"],
        "baselines": ", ".join(f"{name} {value:.3f}" for name, value in found["baselines"].items()),
    }
    out = [f"# {words['title']}", words["other"], words["how"].format(**said)]
    for size, title, text in (("laptop", "laptop", "learnt"), ("paper", "paper", "own")):
        head = [*words["head"][: 6 if size == "laptop" else 5], *words["forms"]]
        lines = [head, ["---"] * len(head)]
        for row in laptop if size == "laptop" else sorted((r for r in rows if r["size"] == size), key=lambda r: r["mega_flops"]):
            name = f"**{row['name']}**" if size == "laptop" and row["paper"] in front else row["name"]
            cells = [
                name,
                f"`{row['variant']}`",
                f"{row['params'] / 1e6:.2f}",
                f"{row['mega_flops']:,.0f}",
                f"{row['mega_activations']:.2f}",
            ]
            cells += [f"{row['top1']:.3f}"] if size == "laptop" else []
            lines.append([*cells, *(f"{row[c]:.1f}" if row.get(c) else "-" for c in COLUMNS)])
        table_ = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        picture = [f"![{words['figure']}](backbones.png)"] if size == "laptop" else []
        out += [f"## {words[title]}", words[text].format(**said), *picture, table_]
    return "\n\n".join(out) + "\n"


def draw() -> None:
    """The figure of docs/backbones.md: accuracy against latency, with the front."""
    from matplotlib.figure import Figure

    found = recorded("backbones")
    if not found:
        return
    rows = sorted((r for r in found["rows"] if "top1" in r), key=fastest)
    front = on_front(rows)
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    line = [r for r in rows if r["paper"] in front]
    axes.step([fastest(r) for r in line], [r["top1"] for r in line], where="post", color="0.6", linestyle="--")
    for row in rows:
        chosen = row["paper"] in front
        axes.plot(fastest(row), row["top1"], "o", color="#0072b2" if chosen else "0.6")
        axes.annotate(
            row["name"], (fastest(row), row["top1"]), (5, 3), textcoords="offset points", fontsize=8, weight="bold" if chosen else "normal"
        )
    axes.set_xscale("log")
    axes.set_xticks(ticks := [0.1, 0.2, 0.5, 1, 2, 5], [f"{tick:g}" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set(xlabel="milliseconds, one image of 32 pixels, fastest form", ylabel="accuracy")
    axes.grid(alpha=0.3)
    figure.savefig(ROOT / "docs" / "backbones.png", dpi=110)


def pages() -> Iterator[tuple[str, str]]:
    """Every page with its text."""
    for name, words in SPEED.items():
        yield name, benchmarks(words, name.endswith(".zh.md"))
    if found := recorded("backbones"):
        yield from ((name, wing(found, words)) for name, words in WING.items())
