"""DeepLab v1 against torchvision's VGG-16 and the paper's table 2; its CRF against pydensecrf and brute force."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from paperworks.errors import InputError
from paperworks.nn.permutohedral import Permutohedral
from paperworks.papers.segmentation.deeplab_crf import deeplab_crf
from paperworks.papers.segmentation.deeplab_crf.deeplab_crf import (
    METHODS,
    VARIANTS,
    DeepLab,
    DenseCRFConfig,
    dense_crf,
    kernels,
    loss,
    mean_field,
)
from paperworks.papers.segmentation.deeplab_crf.weights import from_torchvision
from peers import relative

PEER = Path(__file__).parent / "fixtures" / "deeplab_crf_pydensecrf.json"
CARD = tomllib.loads((Path(deeplab_crf.__file__).parent / "card.toml").read_text(encoding="utf-8"))


# The network


@pytest.mark.parametrize("variant", VARIANTS)
def test_number_of_parameters(variant: str) -> None:
    facts = CARD["variants"][variant]
    with torch.device("meta"):
        network = DeepLab(facts["channels"], facts["classes"], VARIANTS[variant])
    assert sum(p.numel() for p in network.parameters()) == facts["params"]


def test_table_2(evidence) -> None:
    """20.5, 134.3 and 65.1 million; exact counts from the layers' sizes."""
    known = {"largefov": 20_505_429, "7x7": 134_346_581, "4x4": 65_140_565, "deeplab": 65_140_565}
    assert {name: CARD["variants"][name]["params"] for name in known} == known
    evidence.property("parameter counts of the four settings of table 2", "表 2 四种视野设置的参数量")


@pytest.mark.parametrize("variant", ["largefov", "msc_largefov", "4x4", "7x7"])
def test_scores_at_stride_8(variant: str) -> None:
    """321 -> 161 -> 81 -> 41, whatever the kernel of fc6."""
    with torch.device("meta"):
        network = DeepLab(3, 21, VARIANTS[variant])
        output = network(torch.empty(1, 3, 321, 265))
    assert output["scores"].shape == (1, 21, 41, 34)
    assert output["logits"].shape == (1, 21, 321, 265)


def narrow(variant: str, **changes: object) -> DeepLab:
    torch.manual_seed(0)
    return DeepLab(1, 2, replace(VARIANTS[variant], widths=(2, 2, 2, 2, 2), features=2, **changes)).double().eval()


def extent(gradient: torch.Tensor) -> int:
    """Rows between the first and the last that matter, inclusive."""
    rows = gradient.abs().sum((0, 1, 3)).nonzero()
    return int(rows.max() - rows.min()) + 1


@pytest.mark.parametrize(("variant", "field"), [("largefov", 224), ("7x7", 224), ("4x4", 224), ("deeplab", 128)])
def test_field_of_view_of_table_2(variant: str, field: int, evidence) -> None:
    """The paper counts each cell of pool5 as the 32 pixels that it had in VGG-16, and 8 pixels from one to the next."""
    network = narrow(variant)
    x = torch.ones(1, 2, 65, 65, dtype=torch.double, requires_grad=True)
    network.fc6[0](x)[..., 32, 32].sum().backward()
    assert x.grad is not None
    assert 8 * (extent(x.grad) - 1) + 32 == field
    evidence.property(
        f"field of view of {variant}: {field} pixels, by the support of the gradient",
        f"{variant} 的视野：{field} 像素，由梯度的非零范围测得",
    )


def test_whole_receptive_field(monkeypatch: pytest.MonkeyPatch) -> None:
    """435 pixels for LargeFOV, once every layer is linear and positive: more than the 224 that fc6 is named after."""
    monkeypatch.setattr(F, "max_pool2d", lambda x, kernel, stride, padding: F.avg_pool2d(x, kernel, stride, padding))
    network = narrow("largefov", dropout=0.0)
    for p in network.parameters():
        p.data.abs_()
    size = jump = 1
    for depth, stride, dilation in zip((2, 2, 3, 3, 3), (2, 2, 2, 1, 1), (1, 1, 1, 1, 2)):
        size += depth * 2 * dilation * jump + 2 * jump
        jump *= stride
    size += 2 * jump + 2 * 12 * jump  # average pooling, fc6
    image = torch.ones(1, 1, 449, 449, dtype=torch.double, requires_grad=True)
    network(image)["scores"][0, 0, 28, 28].backward()
    assert image.grad is not None
    assert extent(image.grad) == size == 435


def test_hole_algorithm(evidence) -> None:
    """Dilated filters on the dense map compute what the original ones compute on each of its subsamplings, interleaved."""
    network = narrow("7x7")
    x = torch.randn(1, 2, 33, 33, dtype=torch.double)
    for layers, step in ((network.stages[4], 2), (network.fc6, 4)):
        dense = layers(x)
        interleaved = torch.empty_like(dense)
        convs = [m for m in layers.modules() if isinstance(m, nn.Conv2d)]
        for i in range(step):
            for j in range(step):
                y = x[..., i::step, j::step]
                for conv in convs:
                    y = F.conv2d(y, conv.weight, conv.bias, padding=conv.kernel_size[0] // 2).relu()
                interleaved[..., i::step, j::step] = y
        assert relative(dense, interleaved) < 1e-12
    evidence.property(
        "hole algorithm: dilation equals filtering every subsampling and interleaving the results",
        "空洞算法：空洞卷积等于对每个抽样子图滤波，再把结果交错拼回",
    )


def torchvision_deeplab(state: dict[str, torch.Tensor]) -> nn.Sequential:
    """LargeFOV out of torchvision's own VGG-16 features, its poolings and conv5 changed in place."""
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    features.load_state_dict({k.removeprefix("features."): v for k, v in state.items() if k.startswith("features.")})
    pools = [m for m in features if isinstance(m, nn.MaxPool2d)]
    for pool, stride in zip(pools, (2, 2, 2, 1, 1)):
        pool.kernel_size, pool.stride, pool.padding, pool.ceil_mode = 3, stride, 1, True
    for i in (24, 26, 28):
        features[i].dilation = features[i].padding = (2, 2)
    fc6, fc7 = nn.Conv2d(512, 1024, 3, padding=12, dilation=12), nn.Conv2d(1024, 1024, 1)
    fc6.weight.data = state["classifier.0.weight"].unflatten(1, (512, 7, 7))[::4, :, ::3, ::3]
    fc6.bias.data = state["classifier.0.bias"][::4]
    fc7.weight.data = state["classifier.3.weight"][::4, ::4].unflatten(1, (1024, 1, 1))
    fc7.bias.data = state["classifier.3.bias"][::4]
    return nn.Sequential(features, nn.AvgPool2d(3, 1, 1), fc6, nn.ReLU(), fc7, nn.ReLU()).eval()


def vgg16_state() -> dict[str, torch.Tensor]:
    """Random weights under torchvision's names, with biases that matter; fc6 is a product, which is quick to draw."""
    torch.manual_seed(0)
    state = {f"features.{k}": v for k, v in torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"]).state_dict().items()}
    for key in state:
        nn.init.normal_(state[key], std=0.1 if key.endswith("bias") else (2 / state[key][0].numel()) ** 0.5)
    state["classifier.0.weight"] = (torch.randn(4096, 512, 1) * torch.randn(49) / 100).flatten(1)
    state["classifier.3.weight"] = torch.randn(4096, 4096) / 50
    state["classifier.0.bias"], state["classifier.3.bias"] = torch.randn(2, 4096) / 10
    return state


def test_equals_torchvision(evidence) -> None:
    state = vgg16_state()
    network = DeepLab(3, 21, VARIANTS["largefov"]).eval()
    missing, unexpected = network.load_state_dict(from_torchvision(state), strict=False)
    assert missing == ["fc8.weight", "fc8.bias"]
    assert not unexpected
    peer = torchvision_deeplab(state)
    image = torch.randn(1, 3, 65, 81)
    with torch.no_grad():
        scores, logits = network(image).values()
        theirs = network.fc8(peer(image))
        error = relative(scores, theirs)
        assert error < 1e-4
        assert relative(logits, F.interpolate(theirs, (65, 81), mode="bilinear", align_corners=True)) < 1e-4
        peer[0][28].weight.data *= 1.01
        assert relative(scores, network.fc8(peer(image))) > 1e-3
    evidence.fidelity(against=f"torchvision {torchvision.__version__} vgg16, poolings and dilations changed", error=error)


@pytest.mark.parametrize(("variant", "kept"), [("7x7", [0, 1, 2, 3, 4, 5, 6]), ("4x4", [0, 2, 4, 6])])
def test_decimation_of_fc6(variant: str, kept: list[int]) -> None:
    state = {k: v.expand(4096, -1) if k == "classifier.0.weight" else v for k, v in vgg16_like_zeros().items()}
    ours = from_torchvision(state, replace(VARIANTS[variant], features=64))
    assert ours["fc6.0.weight"].shape == (64, 512, len(kept), len(kept))
    assert ours["fc6.0.weight"][7, 3].tolist() == [[float(3 * 49 + 7 * i + j) for j in kept] for i in kept]


def vgg16_like_zeros() -> dict[str, torch.Tensor]:
    state = {
        f"features.{i}.{kind}": torch.zeros(1) for i in (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28) for kind in ("weight", "bias")
    }
    numbered = torch.arange(512.0 * 49)[None]  # broadcast over the features: a hundred million numbers are not needed
    return state | {
        "classifier.0.weight": numbered,
        "classifier.0.bias": torch.zeros(4096),
        "classifier.3.weight": torch.zeros(1).expand(4096, 4096),
        "classifier.3.bias": torch.zeros(4096),
    }


def test_loss_subsamples_the_truth() -> None:
    torch.manual_seed(0)
    scores = torch.randn(2, 3, 3, 4)
    mask = torch.full((2, 17, 25), 255)
    mask[:, ::8, ::8] = torch.randint(0, 3, (2, 3, 4))
    mask[0, 0, 0] = 255
    log_p = scores.log_softmax(1)
    expected = -torch.stack([log_p[b, mask[b, 8 * i, 8 * j], i, j] for b in (0, 1) for i in range(3) for j in range(4) if b + i + j])
    assert torch.allclose(loss({"scores": scores}, {"mask": mask})["loss"], expected.mean())
    assert loss({"scores": scores}, {"mask": torch.full_like(mask, 255)})["loss"] == 0


@pytest.mark.parametrize("changes", [{}, {"multi_scale": 4}])
def test_every_parameter_learns(changes: dict[str, int]) -> None:
    torch.manual_seed(0)
    network = DeepLab(1, 2, replace(VARIANTS["test"], dropout=0.0, **changes))
    loss(network(torch.randn(2, 1, 65, 65)), {"mask": torch.randint(0, 2, (2, 65, 65))})["loss"].backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and p.grad.abs().sum() > 0, name
    heads = {id(p) for p in network.head_parameters()}
    new = {id(p) for n, p in network.named_parameters() if n.startswith(("fc8", "branches"))}
    assert heads == new


# The lattice


def scene(height: int, width: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image (3 H W, whole numbers 0..255) and probabilities (K H W), smooth in parts and with edges, by formula."""
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    edge = ((x - 0.6 * y) % 23 < 11).double()
    image = torch.stack([110 + 90 * torch.sin(x / 9 + c) * torch.cos(y / 7 - c) + (40 - 60 * edge) * (c + 1) / 3 for c in range(3)])
    image = (image + 6 * torch.sin(37 * x + 91 * y)).round().clamp(0, 255)
    energy = [2 * torch.sin(x / (5 + k) + k) + 2 * torch.cos(y / (6 + k) - k) for k in range(classes)]
    return image, torch.stack(energy).softmax(0)


def exact(features: torch.Tensor) -> torch.Tensor:
    return torch.exp(-(torch.cdist(features, features) ** 2) / 2)


def normalised(kernel: torch.Tensor) -> torch.Tensor:
    d = kernel.sum(1).rsqrt()
    return d[:, None] * kernel * d


@pytest.mark.parametrize(("sigma_alpha", "sigma_beta", "most"), [(3.0, None, 0.02), (10.0, 20.0, 0.08), (80.0, 13.0, 0.08)])
def test_lattice_against_brute_force(sigma_alpha: float, sigma_beta: float | None, most: float, evidence) -> None:
    """Normalised as the CRF uses it. The bound is the lattice's own error, not rounding."""
    image, probabilities = scene(30, 40, 5)
    config = DenseCRFConfig(w1=1.0, sigma_alpha=sigma_alpha, sigma_beta=sigma_beta or 1.0, w2=1.0, sigma_gamma=sigma_alpha)
    features = kernels(image / 255, config)[0 if sigma_beta else 1][1]
    values = probabilities.flatten(1).T.contiguous()
    error = relative(deeplab_crf.gaussian(1.0, features)(values), normalised(exact(features)) @ values)
    assert 1e-4 < error < most
    evidence.property(
        f"{features.shape[1]}-D lattice against the dense Gaussian, normalised: relative error {error:.1%}",
        f"{features.shape[1]} 维格对稠密高斯，归一化后：相对误差 {error:.1%}",
    )


def test_lattice_is_a_partition_of_unity_and_forgets_the_order(evidence) -> None:
    torch.manual_seed(0)
    features, values = torch.randn(500, 4, dtype=torch.double), torch.randn(500, 3, dtype=torch.double)
    lattice = Permutohedral(features)
    share = lattice.weight * (1 + 2.0**-4) ** 0.5
    assert share.min() >= -1e-12
    assert torch.allclose(share.sum(1), torch.ones(500, dtype=torch.double))
    order = torch.randperm(500)
    assert torch.allclose(Permutohedral(features[order])(values[order]), lattice(values)[order])
    evidence.property(
        "lattice: barycentric weights sum to one; the order of the points does not matter",
        "格：重心坐标的权之和为一；与点的次序无关",
    )


def test_lattice_on_a_point_and_far_points() -> None:
    """A point far from all others gets its own value back, times the kernel's height."""
    features = torch.tensor([[0.3, 0.1], [50.0, -20.0]])
    out = Permutohedral(features)(torch.tensor([[2.0], [0.0]]))
    assert out[1].item() == 0
    assert 0.5 < out[0].item() < 2.0
    assert torch.allclose(out[0] / 2, Permutohedral(features).diagonal()[0], atol=0.3)


def test_diagonal_on_a_full_lattice() -> None:
    """Where all corners exist, the closed form is what the filter does; elsewhere some of it is lost."""
    y, x = torch.meshgrid(torch.arange(12.0), torch.arange(12.0), indexing="ij")
    lattice = Permutohedral(torch.stack([x, y], -1).flatten(0, 1).double() / 2)
    matrix = lattice(torch.eye(144, dtype=torch.double))
    inner = ((x > 3) & (x < 8) & (y > 3) & (y < 8)).flatten()
    assert torch.allclose(lattice.diagonal()[inner], matrix.diagonal()[inner])


def test_sum_and_scaling_of_lattices() -> None:
    torch.manual_seed(0)
    a, b = Permutohedral(torch.randn(80, 2).double()), Permutohedral(torch.randn(80, 4).double())
    values, factor = torch.randn(80, 3).double(), torch.rand(80).double()
    for whole in (a + b, b + a):
        assert torch.allclose(whole(values), a(values) + b(values))
    assert torch.allclose(a.scaled(factor)(values), factor[:, None] * a(factor[:, None] * values))


def test_lattice_is_differentiable_in_the_values() -> None:
    torch.manual_seed(0)
    lattice = Permutohedral(torch.randn(12, 3).double())
    assert torch.autograd.gradcheck(lattice, torch.randn(12, 2).double().requires_grad_())


def test_lattice_out_of_numbers() -> None:
    with pytest.raises(ValueError, match="64 bits"):
        Permutohedral(torch.tensor([[0.0] * 8, [1000.0] * 8]))


# The CRF


def brute_force(image: torch.Tensor, probabilities: torch.Tensor, config: DenseCRFConfig, normalise: bool = True) -> torch.Tensor:
    """Mean field as the text has it: dense kernels, the compatibility as a K x K matrix, in float64."""
    classes = len(probabilities)
    height, width = image.shape[1:]
    y, x = torch.meshgrid(torch.arange(height).double(), torch.arange(width).double(), indexing="ij")
    position, colour = torch.stack([x, y], -1).flatten(0, 1), 255 * image.double().flatten(1).T
    apart, differ = torch.cdist(position, position) ** 2, torch.cdist(colour, colour) ** 2
    appearance = torch.exp(-apart / (2 * config.sigma_alpha**2) - differ / (2 * config.sigma_beta**2))
    smoothness = torch.exp(-apart / (2 * config.sigma_gamma**2))
    if normalise:
        appearance, smoothness = normalised(appearance), normalised(smoothness)
    pairwise = config.w1 * appearance + config.w2 * smoothness
    if config.exclude_self:
        pairwise.fill_diagonal_(0)
    mu = 1 - torch.eye(classes).double()
    unary = -probabilities.double().flatten(1).T.clamp(min=1e-5).log()
    q = torch.exp(-unary) / torch.exp(-unary).sum(1, keepdim=True)
    for _ in range(config.iterations):
        energy = unary + (pairwise @ q) @ mu
        q = torch.exp(-energy) / torch.exp(-energy).sum(1, keepdim=True)
    return q.T.reshape(probabilities.shape)


@pytest.mark.parametrize("exclude_self", [False, True])
def test_mean_field_is_exact_given_exact_filters(exclude_self: bool, evidence) -> None:
    image, probabilities = scene(20, 24, 4)
    image = image / 255
    config = DenseCRFConfig(w1=3.0, sigma_alpha=6.0, sigma_beta=15.0, w2=1.0, sigma_gamma=2.0, iterations=10, exclude_self=exclude_self)
    dense = sum(w * normalised(exact(f)) for w, f in kernels(image, config))
    assert isinstance(dense, torch.Tensor)
    if exclude_self:
        dense = dense - dense.diagonal().diag()
    ours = mean_field(-probabilities.flatten(1).T.clamp(min=1e-5).log(), lambda q: dense @ q, 10).T.reshape(probabilities.shape)
    theirs = brute_force(image, probabilities, config)
    assert (ours - theirs).abs().max() < 1e-10
    assert (theirs - brute_force(image, probabilities, replace(config, w2=1.02))).abs().max() > 1e-5
    assert (theirs - brute_force(image, probabilities, replace(config, exclude_self=not exclude_self))).abs().max() > 1e-3
    evidence.property(
        f"mean field equals dense float64 brute force to 1e-10, {'without' if exclude_self else 'with'} the self-message",
        f"平均场与 float64 稠密暴力计算相差不到 1e-10，{'不含' if exclude_self else '含'}自消息",
    )


@pytest.mark.parametrize("exclude_self", [False, True])
def test_crf_against_brute_force(exclude_self: bool, evidence) -> None:
    """The lattice's error through ten iterations: small beside what the CRF changes."""
    image, probabilities = scene(30, 40, 4)
    image, probabilities = image.float() / 255, probabilities.float()
    config = DenseCRFConfig(w1=3.0, sigma_alpha=8.0, sigma_beta=15.0, w2=1.0, sigma_gamma=2.0, exclude_self=exclude_self)
    ours, theirs = dense_crf(config)(image, probabilities), brute_force(image, probabilities, config)
    error, moved = (ours - theirs).abs().mean().item(), (theirs - probabilities).abs().mean().item()
    same = (ours.argmax(0) == theirs.argmax(0)).double().mean().item()
    assert torch.allclose(ours.sum(0), torch.ones(30, 40), atol=1e-5)
    assert error < 0.1 * moved
    assert same > 0.98
    without = "without" if exclude_self else "with"
    evidence.property(
        f"lattice CRF {without} the self-message against dense brute force: mean |dQ| {error:.4f} of {moved:.4f} moved",
        f"用格的 CRF 对稠密暴力计算，{'不含' if exclude_self else '含'}自消息：|dQ| 平均为 {error:.4f}，改动量为 {moved:.4f}",
    )


SETTINGS = (
    {"w1": 10.0, "sigma_alpha": 80.0, "sigma_beta": 13.0, "w2": 3.0, "sigma_gamma": 3.0, "iterations": 5},
    {"w1": 3.0, "sigma_alpha": 8.0, "sigma_beta": 10.0, "w2": 1.0, "sigma_gamma": 2.0, "iterations": 10},
)


def record_pydensecrf() -> dict[str, object]:
    """New golden numbers (``--record``; needs pydensecrf2). Every seventh pixel of Q."""
    import importlib.metadata

    import numpy as np
    import pydensecrf.densecrf as peer

    image, probabilities = scene(36, 48, 4)
    q = []
    for s in SETTINGS:
        crf = peer.DenseCRF2D(48, 36, 4)
        crf.setUnaryEnergy((-probabilities.clamp(min=1e-5).log()).flatten(1).float().numpy())
        crf.addPairwiseGaussian(sxy=s["sigma_gamma"], compat=s["w2"])
        rgb = np.ascontiguousarray(image.permute(1, 2, 0).to(torch.uint8).numpy())
        crf.addPairwiseBilateral(sxy=s["sigma_alpha"], srgb=s["sigma_beta"], rgbim=rgb, compat=s["w1"])
        q.append([[round(float(v), 7) for v in row] for row in np.array(crf.inference(s["iterations"])).reshape(4, -1)[:, ::7]])
    return {
        "peer": f"pydensecrf2 {importlib.metadata.version('pydensecrf2')}",
        "input": "scene(36, 48, 4) of test_deeplab_crf.py",
        "settings": SETTINGS,
        "q": q,
    }


def test_equals_pydensecrf(request: pytest.FixtureRequest, evidence) -> None:
    """The same lattice, corner by corner: what is left is the rounding of float32."""
    if request.config.getoption("--record"):
        PEER.write_text(json.dumps(record_pydensecrf()) + "\n", encoding="utf-8")
    golden = json.loads(PEER.read_text(encoding="utf-8"))
    image, probabilities = scene(36, 48, 4)
    errors = []
    for settings, q in zip(golden["settings"], golden["q"]):
        theirs = torch.tensor(q)

        def refined(config: DenseCRFConfig) -> torch.Tensor:
            return dense_crf(config)((image / 255).float(), probabilities.float()).flatten(1)[:, ::7]

        config = DenseCRFConfig(**settings)
        errors.append(relative(refined(config), theirs))
        assert errors[-1] < 1e-4
        assert relative(refined(replace(config, w1=config.w1 * 1.02)), theirs) > 1e-4
        assert relative(refined(replace(config, exclude_self=True)), theirs) > 1e-3
    evidence.fidelity(against=golden["peer"], error=max(errors))


def half_and_half() -> tuple[torch.Tensor, torch.Tensor]:
    """A bright right half, from column 20, on which the network's smooth border lies four pixels too far left."""
    torch.manual_seed(0)
    x = torch.arange(40.0).expand(30, 40)
    image = (0.3 + 0.4 * (x >= 20) + 0.02 * torch.randn(30, 40)).clamp(0, 1)[None]
    right = torch.sigmoid((x - 15.5) / 3)
    return image, torch.stack([1 - right, right])


EDGE = DenseCRFConfig(w1=4.0, sigma_alpha=10.0, sigma_beta=15.0, w2=0.5, sigma_gamma=2.0)


def border(probabilities: torch.Tensor) -> float:
    """Mean column at which class 1 begins."""
    return (probabilities.argmax(0) == 0).sum(1).double().mean().item()


def test_border_snaps_to_the_edge(evidence) -> None:
    image, probabilities = half_and_half()
    assert border(probabilities) == 16
    assert border(dense_crf(EDGE)(image, probabilities)) == pytest.approx(20, abs=0.2)
    evidence.property("the border moves to the image's edge, four pixels away", "边界移到四个像素以外的图像边缘")


def test_without_colours_nothing_snaps(evidence) -> None:
    """A constant image, or colours left in 0..1 under a sigma meant for 0..255: the appearance kernel knows positions only."""
    image, probabilities = half_and_half()
    blind = dense_crf(EDGE)(torch.full_like(image, 0.5), probabilities)
    assert border(blind) == pytest.approx(16, abs=1)
    unscaled = dense_crf(replace(EDGE, sigma_beta=255 * EDGE.sigma_beta))(image, probabilities)
    assert (unscaled - blind).abs().mean() < 0.01
    constant = kernels(torch.full_like(image, 0.5), EDGE)[0][1]
    assert torch.allclose(exact(constant), exact(constant[:, :2]))
    evidence.property(
        "constant image, or colours in 0..1: the border stays where the network put it",
        "图像为常数，或颜色在 0..1：边界停在网络给出的位置",
    )


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_any_image_and_hard_labels(channels: int) -> None:
    torch.manual_seed(0)
    image = torch.rand(channels, 11, 13)
    hard = F.one_hot(torch.randint(0, 3, (11, 13)), 3).permute(2, 0, 1).float()
    refined = METHODS["dense_crf"].build(METHODS["dense_crf"].config)(image, hard)
    assert refined.shape == hard.shape
    assert refined.isfinite().all()
    assert torch.allclose(refined.sum(0), torch.ones(11, 13), atol=1e-5)
    again = dense_crf(DenseCRFConfig(iterations=0))(image, hard)
    assert torch.allclose(again, hard, atol=1e-4)


def test_a_weight_of_zero_switches_a_kernel_off() -> None:
    image, probabilities = half_and_half()
    alone = dense_crf(replace(EDGE, w1=0.0))(image, probabilities)
    assert torch.equal(alone, dense_crf(replace(EDGE, w1=0.0))(1 - image, probabilities))
    with pytest.raises(InputError, match="one of them more than 0"):
        replace(EDGE, w1=0.0, w2=0.0)
    with pytest.raises(InputError, match="sigma_beta"):
        replace(EDGE, sigma_beta=0.0)


def test_absurd_weights_stay_finite() -> None:
    image, probabilities = half_and_half()
    refined = dense_crf(replace(EDGE, w1=5000.0))(image, probabilities)
    assert refined.isfinite().all()
    assert torch.allclose(refined.sum(0), torch.ones(30, 40), atol=1e-5)
