"""The report is read by a person who has no network, and who did not choose the names in it."""

import copy
import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from paperworks.study.report import decimal, duration, front, si, write_report

NAMES = ("U-Net", "U-Net++", "Attention U-Net", "SegFormer", "PSPNet", "DeepLab v2", "SegNet", "ENet")
HOSTILE = "<script>alert(1)</script>\"'&$x_1$ 心脏"


def comparison(folder: Path, methods: int = 8, images: int = 4, hostile: bool = False, per_image: int = 102) -> dict:
    """A comparison as ``compare`` writes it: one method failed, one stopped, one with NaN, two baselines."""
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir(parents=True, exist_ok=True)

    def picture(name: str) -> str:
        y, x = np.mgrid[:136, :136]
        grey = 90 + 60 * np.sin(x / 19) * np.cos(y / 23) + rng.normal(0, 6, (136, 136))
        rgb = np.repeat(grey[..., None], 3, 2).clip(0, 255).astype(np.uint8)
        rgb[(x - 68) ** 2 + (y - 68) ** 2 < 900] = (220, 120, 60)
        Image.fromarray(rgb).save(folder / "pictures" / f"{name}.png")
        return f"pictures/{name}.png"

    rows = []
    for i in range(methods):
        dice = 0.93 - 0.013 * i
        steps = np.arange(0, 1200, 10)
        name = NAMES[i % len(NAMES)] + ("" if i < len(NAMES) else f" {i}")
        rows.append(
            {
                "id": f"m{i}", "name": HOSTILE if hostile and i == 1 else name, "title": f"{name}: a paper", "year": 2015 + i, "kind": "paper",
                "variant": "small", "status": "ok", "error": None,
                "metrics": {"dice": dice, "iou": dice / (2 - dice), "boundary_f": dice - 0.1, "accuracy": 0.99,
                            "dice/left ventricle": dice, "dice/<b>wall</b>": dice - 0.06},
                "spread": {"dice": 0.004}, "seeds": [0, 1, 2],
                "cost": {
                    "params": int(31_030_658 / 1.9**i), "flops": 9.1e9 / 1.6**i, "peak_memory_mib": 812.4 / (i + 1), "train_seconds": 89.2, "steps": 1200,
                    "samples_per_second": 44.0 + i, "export_error": 2e-6,
                    "latency_ms": {"eager": {"1": {"p50": 41.0 / 1.45**i, "p95": 44.2 / 1.4**i}, "8": {"p50": 300.0 / 1.5**i, "p95": 310.0 / 1.5**i}},
                                   "onnxruntime": {"1": {"p50": 22.5 / 1.4**i, "p95": 23.0 / 1.4**i}}},
                },
                "curves": {"step": steps.tolist(), "seconds": (steps * 0.07).tolist(), "loss": (1.6 * np.exp(-steps / 200) + 0.05 + 0.02 * i).tolist(),
                           "val_step": steps[::20].tolist(), "val_metric": (dice * (1 - np.exp(-(steps[::20] + 60) / 150))).tolist()},
                "per_image": [{"name": f"SC-HF-I-{k:03d}", "dice": float(np.clip(dice + 0.1 * np.sin(k), 0, 1))} for k in range(per_image)],
                "verdict": ("deployable", "buildable", "watch")[i % 3],
                "command": f"paperworks train m{i} pack:cardiac_mr --budget 90s --seed 0", "model": f"runs/m{i}/model.safetensors", "run": f"runs/m{i}",
            }
        )  # fmt: skip
    if methods > 4:
        rows[2] |= {"status": "failed", "error": "CUDA out of memory; take --variant small", "metrics": {}, "cost": {}, "curves": None, "per_image": None}
        rows[3] |= {"status": "stopped"}
        rows[4]["metrics"]["boundary_f"] = math.nan
        rows[4]["cost"]["latency_ms"] = None
    for name, dice in (("Otsu's threshold", 0.31), ("Majority class", 0.0)):
        rows.append({"id": name[:4], "name": name, "kind": "baseline", "status": "ok", "metrics": {"dice": dice, "iou": dice / (2 - dice)}, "cost": {}})
    pictures = []
    for k in range(images):
        name = HOSTILE if hostile and k == 0 else f"SC-HF-I-{k:03d}"
        sheet = {"name": name, "input": picture(f"{k}_input"), "truth": picture(f"{k}_truth"), "rows": {}}
        for row in rows[:methods]:
            if row["status"] != "failed":
                sheet["rows"][row["id"]] = {v: picture(f"{k}_{row['id']}_{v}") for v in ("overlay", "errors")} | {"dice": 0.9 - 0.1 * k}
        pictures.append(sheet)
    return {
        "kind": "compare", "title": HOSTILE if hostile else "cardiac_mr", "command": "paperworks compare pack:cardiac_mr --papers unet,unetpp --budget 90s",
        "created": "2026-11-21T10:00:00", "budget": "90 s each", "seed": 0,
        "hardware": {"cpu": "AMD EPYC 7B13", "cores": 2, "memory_gib": 24, "gpu": None}, "versions": {"paperworks": "0.1.0", "torch": "2.14.1"},
        "data": {"source": "pack:cardiac_mr", "layout": "images and masks", "task": "segmentation", "train": 424, "val": 102,
                 "classes": [{"name": "background", "pixels": 0.94}, {"name": "left ventricle", "pixels": 0.04}, {"name": "<b>wall</b>", "pixels": 0.02}],
                 "channels": 1, "dtype": "uint8", "size": [136, 136],
                 "problems": [{"path": HOSTILE if hostile else "images/broken.png", "what": "cannot be read", "fix": "save it again"}]},
        "metric": "dice", "higher_is_better": True, "rows": rows,
        "recommended": {"id": "m0", "reason": {"en": "U-Net has the highest dice, 0.930. It has 31.03 M parameters and takes 22.5 ms an image.",
                                               "zh": "U-Net 的 dice 最高（0.930）。参数量 31.03 M，每张图像 22.5 毫秒。"}},
        "pictures": pictures,
    }  # fmt: skip


def claim(held: bool | None = True) -> dict:
    arms = {"dice and focal loss": [0.911, 0.917, 0.905], "cross-entropy": [0.893, 0.899, 0.884], "without skip connections": [0.802, 0.815, 0.809]}
    return {
        "kind": "claim", "id": "unet", "title": "U-Net: Convolutional Networks for Biomedical Image Segmentation", "held": held, "metric": "dice",
        "claim": {"en": "Skip connections make the outlines precise.", "zh": "跳跃连接使轮廓更精确。"},
        "rule": {"en": "Dice with skips is at least 0.02 higher in every seed.", "zh": "每个种子上，带跳跃连接的 Dice 至少高 0.02。"},
        "arms": [{"name": n, "control": "without" in n, "metrics": {"dice": v, "boundary_f": [x - 0.2 for x in v]}} for n, v in arms.items()],
        "seeds": [0, 1, 2], "data": "pack:cardiac_mr", "steps": 300, "seconds": 512.3, "command": "paperworks claim unet", "created": "2026-11-21T10:00:00",
        "hardware": {"cpu": "AMD EPYC 7B13", "cores": 2, "memory_gib": 24, "gpu": None}, "versions": {"paperworks": "0.1.0", "torch": "2.14.1"},
    }  # fmt: skip
