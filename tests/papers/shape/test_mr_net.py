"""MR-Net: counts, graph convolutions and Laplacian as dense matrices, reading of volumes by hand, farthest points, Chamfer distance, what is absolute."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import scipy
import torch
from scipy import sparse
from scipy.ndimage import map_coordinates
from scipy.spatial import cKDTree
from torch import Tensor
from torch.nn import functional as F

from paperworks.data.meshes import edges_of
from paperworks.papers.shape.mr_net.mr_net import (
    BLOCK_WEIGHTS,
    VARIANTS,
    GraphConvolution,
    MRNet,
    VolumeCNN,
    adjacency,
    build,
    farthest_points,
    laplacian,
    loss,
    mean_in_cells,
    mesh_losses,
    nearest,
    occupancy,
    read_at,
    vertex_normals,
    within_radius,
)
from paperworks.tasks.meshes import Meshes, sphere

TOLERANCE = 1e-4
SPHERE = sphere()


def relative(ours: Tensor, theirs: Tensor) -> float:
    ours, theirs = ours.detach().double(), theirs.detach().double()
    return float((ours - theirs).norm() / theirs.norm())


def network(**changes) -> MRNet:
    torch.manual_seed(0)
    return build(Meshes.plain_spec(), replace(VARIANTS["test"], **changes)).eval()


def cloud(batch: int = 2, number: int = 64, seed: int = 0) -> Tensor:
    return torch.rand(batch, 3, number, generator=torch.Generator().manual_seed(seed)) * 1.4 - 0.7


def dense(faces: np.ndarray) -> np.ndarray:
    """0 and 1 of neighbours, from the faces one by one."""
    found = np.zeros((faces.max() + 1,) * 2)
    for face in faces:
        for a in face:
            for b in face:
                found[a, b] = a != b
    return found


def test_parameter_counts(evidence):
    with torch.device("meta"):
        net = build(Meshes.plain_spec(), VARIANTS["paper"])
    count = lambda part: sum(p.numel() for p in part.parameters())  # noqa: E731
    assert count(net.cnn) == 22_604_156 and count(net.abstraction) == 25_216
    assert [count(block) for block in net.blocks] == [2_070_787, 2_333_187, 2_398_083]
    assert count(net) == 29_431_429
    per_block = [sum(isinstance(m, GraphConvolution) for m in block.modules()) for block in net.blocks]
    assert per_block == [14, 15, 16]
    assert net.blocks[0].first[0].own.in_features == 963 and net.blocks[1].first[0].own.in_features == 963 + 256
    evidence.property(
        "29,431,429 parameters: CNN, three blocks of 14, 15 and 16 graph convolutions, point branch, each as in the release",
        "29,431,429 个参数：CNN、分别有 14、15、16 层图卷积的三块、点分支，各部分与发布代码一致",
    )


def test_graph_convolution_is_two_dense_products(evidence):
    torch.manual_seed(0)
    layer, x = GraphConvolution(5, 7), torch.randn(3, 66, 5)
    torch.nn.init.normal_(layer.own.bias)
    a = dense(SPHERE.faces)
    root = np.diag(a.sum(1) ** -0.5)
    a_hat = torch.from_numpy(root @ a @ root)
    w0, w1, b = layer.own.weight.T.double(), layer.neighbours.weight.T.double(), layer.own.bias.double()
    expected = torch.stack([(one @ w0 + a_hat @ one @ w1 + b).relu() for one in x.double()])
    error = relative(layer(x, adjacency(SPHERE.faces, 66)), expected)
    assert error < TOLERANCE
    with torch.no_grad():
        layer.neighbours.weight[0] *= 1.1
    assert relative(layer(x, adjacency(SPHERE.faces, 66)), expected) > TOLERANCE
    evidence.fidelity(against=f"graph convolution as dense matrices, numpy {np.__version__}", error=error)


def test_block_in_the_release_s_numbering(evidence):
    """The release keeps one list of 48 layers, adds at fixed numbers and concatenates at two; this spells its loop with our weights."""
    net = network(pairs=6)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
        points = cloud()
        volumes = net.volumes(points.transpose(1, 2))
        order = []
        for i, block in enumerate(net.blocks):
            order += ["read", *block.first, *(layer for pair in block.pairs for layer in pair)]
            order += ([block.narrow] if i == 2 else []) + [block.coordinates]
        assert len(order) == 48
        skips, joins = {3, 5, 7, 9, 11, 13, 19, 21, 23, 25, 27, 29, 35, 37, 39, 41, 43, 45}, {15, 31}
        kept = [net.template.expand(2, -1, -1)]
        for index, layer in enumerate(order):
            if layer == "read":
                read = [read_at(v, kept[-1], net.config.side) for v in volumes]
                read[4] = read[4].repeat_interleave(4, -1)
                hidden = torch.cat([kept[-1], *read], -1)
            else:
                hidden = layer(kept[-1], net.a_hat)
            if index in skips:
                hidden = (hidden + kept[-2]) * 0.5
            if index in joins:
                hidden = torch.cat([hidden, kept[-2]], -1)
            kept.append(hidden)
        out = net(points)
        for number, index in enumerate((15, 31, 48)):
            error = relative(out["blocks"][:, number].transpose(1, 2), kept[index])
            assert error < 1e-5
    evidence.property(
        "skips, concatenations and outputs where the release's list of 48 layers has them",
        "跳连、拼接和输出的位置与发布代码的 48 层列表一致",
    )


def test_convolutions_pad_as_tensorflow_does(evidence):
    """SAME at stride 2 on an even side pads behind only: output i sees inputs 2 i ... 2 i + 2."""
    torch.manual_seed(0)
    cnn = VolumeCNN((2, 3, 4, 5))
    volume = (torch.rand(1, 1, 8, 8, 8) > 0.7).float()
    x = volume.repeat(1, 3, 1, 1, 1)
    for layer in cnn.levels[0]:
        x = F.conv3d(x, layer.weight, layer.bias, padding=1).relu()
    first = cnn.levels[1][0]
    byhand = torch.zeros(1, 3, 4, 4, 4)
    padded = F.pad(x, (0, 1) * 3)
    for place in np.ndindex(4, 4, 4):
        window = padded[0][:, *(slice(2 * i, 2 * i + 3) for i in place)]
        byhand[(0, slice(None), *place)] = (first.weight * window).sum((1, 2, 3, 4)) + first.bias
    x = byhand.relu()
    for layer in list(cnn.levels[1])[1:]:
        x = F.conv3d(x, layer.weight, layer.bias, padding=1).relu()
    found = cnn(volume)
    assert [v.shape[1:] for v in found] == [(2, 8, 8, 8), (3, 4, 4, 4), (4, 2, 2, 2), (5, 1, 1, 1)]
    error = relative(found[1], x)
    assert error < TOLERANCE
    evidence.fidelity(against="strided 3-D convolution by hand with TensorFlow's padding", error=error)


def test_reading_is_bilinear_in_two_axes_and_the_next_cell_in_the_third(evidence):
    """scipy interpolates linearly; in z it is asked at whole numbers only."""
    torch.manual_seed(0)
    volume, vertices = torch.randn(1, 3, 8, 8, 8), torch.rand(1, 50, 3) * 2.4 - 1.2
    found = read_at(volume, vertices, 16)[0]
    place = ((vertices[0] * 8 + 8).clamp(0, 15) / 2)[:, [1, 0, 2]].numpy()
    place[:, 2] = np.minimum(np.ceil(place[:, 2]), 7)
    expected = np.stack([map_coordinates(v.numpy(), place.T, order=1, mode="nearest") for v in volume[0]], 1)
    error = relative(found, torch.from_numpy(expected))
    assert error < TOLERANCE
    whole = torch.tensor([[[0.0, 0.25, -0.5]]])  # cells (10, 8, 4) of 16: the release's floor and ceil give no weight to anything here
    assert torch.allclose(read_at(volume, whole, 16)[0, 0], volume[0, :, 5, 4, 2])
    moved = vertices.clone().requires_grad_()
    read_at(volume, moved, 16).sum().backward()
    assert moved.grad is not None and moved.grad[..., :2].any() and not moved.grad[..., 2].any()
    evidence.fidelity(against=f"scipy {scipy.__version__} map_coordinates: features at vertices", error=error)
    evidence.property(
        "features at whole-numbered places are the cell's own; no gradient goes through the third axis",
        "整数处的特征就是该格自己的；第三轴没有梯度",
    )


def test_volumes_of_points(evidence):
    points = torch.tensor([[[0.0, 0.0, 0.0], [0.01, 0.0, 0.0], [-1.0, 0.9, 5.0]]])
    volume = occupancy(points, 4)
    assert volume.sum() == 2 and volume[0, 0, 2, 2, 2] == 1 and volume[0, 0, 3, 0, 3] == 1, "axes are y, x, z; outside goes to the border"
    features = torch.tensor([[[1.0, 2.0], [3.0, 6.0], [5.0, 5.0]]])
    mean = mean_in_cells(points, features, 4)
    assert mean[0, :, 2, 2, 2].tolist() == [2, 4] and mean[0, :, 3, 0, 3].tolist() == [5, 5] and mean.sum() == 16
    evidence.property(
        "points are voxelised as in the release, axes y, x, z, what lies outside at the border",
        "点的体素化与发布代码一致：轴序 y、x、z，体积外的点归到边界",
    )


def test_farthest_points_by_brute_force(evidence):
    points = cloud(2, 40).transpose(1, 2)
    index = farthest_points(points, 12)
    for one, found in zip(points, index):
        taken = [0]
        while len(taken) < 12:
            apart = torch.cdist(one, one[taken]).amin(1)
            taken.append(int(apart.argmax()))
        assert found.tolist() == taken
    evidence.property("farthest point sampling from the first point on: equals brute force", "从第一个点开始的最远点采样：与暴力法相同")


def test_neighbourhoods_are_the_first_within_the_radius(evidence):
    points = cloud(1, 60).transpose(1, 2)
    index = within_radius(points, points[:, :9], 0.45, 5)
    tree = cKDTree(points[0].numpy())
    for centre, found in zip(points[0, :9], index[0]):
        near = sorted(tree.query_ball_point(centre.numpy(), 0.45))[:5]
        assert found.tolist() == near + [near[0]] * (5 - len(near))
    evidence.property(
        "ball query: the first points within the radius, the first again where there are fewer (cKDTree)",
        "球查询：取半径内最先的几个点，不够时重复第一个（cKDTree）",
    )


def test_losses_against_dense_matrices_and_trees(evidence):
    torch.manual_seed(0)
    truth = torch.from_numpy(SPHERE.vertices)[None].repeat(2, 1, 1) * (1 + 0.1 * torch.randn(2, 66, 1))
    predicted = truth + 0.2 * torch.randn(2, 66, 3)
    a, b, _ = nearest(truth, predicted)
    trees = [(cKDTree(p).query(t)[0] ** 2, cKDTree(t).query(p)) for t, p in zip(truth.numpy(), predicted.numpy())]
    chamfer = np.mean([x.mean() + y[0].__pow__(2).mean() for x, y in trees]) / 2
    edges = edges_of(SPHERE.faces)
    neighbours = dense(SPHERE.faces)
    mean = neighbours / neighbours.sum(1, keepdims=True)
    byhand = torch.from_numpy((np.eye(66) - mean) @ predicted.double().numpy())
    assert relative(laplacian(predicted, torch.from_numpy(edges)), byhand) < TOLERANCE
    normals = vertex_normals(truth, torch.from_numpy(SPHERE.faces))
    found = mesh_losses(predicted, truth, normals, torch.from_numpy(edges))
    edge = predicted[:, edges[:, 0]] - predicted[:, edges[:, 1]]
    cosines = []
    for i, (_, (_, index)) in enumerate(trees):
        normal = normals[i][index][edges[:, 0]]
        cosines.append(F.cosine_similarity(normal, edge[i], dim=-1).abs().mean())
    expected = torch.tensor([1000 * (truth - predicted).abs().mean(), chamfer, edge.norm(dim=-1).square().mean(), sum(cosines) / 2])
    ours = torch.stack([found[key] for key in ("coordinates", "chamfer", "edges", "normals")])
    error = max(relative(o, e) for o, e in zip(ours, expected))
    assert error < TOLERANCE and a.shape == b.shape == (2, 66)
    outward = (normals * F.normalize(torch.from_numpy(SPHERE.vertices), dim=-1)).sum(-1)
    assert (outward.abs() > 0.7).all(), "normals stand on the surface"
    evidence.fidelity(
        against=f"scipy {scipy.__version__} cKDTree and dense matrices: Chamfer, edge, normal and Laplacian losses", error=error
    )


def test_blocks_are_weighted_as_in_the_release(evidence):
    net = network()
    spec = Meshes.plain_spec()
    batch = Meshes.plain_batch(net, spec)
    truth = batch["vertices"]
    for block, weight in enumerate(BLOCK_WEIGHTS):
        guesses = truth[:, None].repeat(1, 3, 1, 1)
        guesses[:, block] += 0.1
        base = loss({"blocks": truth[:, None].repeat(1, 3, 1, 1), "template": net.template.T}, batch)
        moved = loss({"blocks": guesses, "template": net.template.T}, batch)
        assert float(moved["coordinates"]) == pytest.approx(weight * 100, rel=1e-3)
        assert float(moved["laplacian"]) == pytest.approx(float(base["laplacian"]), rel=1e-3), "a shift changes no Laplacian"
    evidence.property(
        "blocks weigh 0.1, 0.3, 0.6; coordinates count a thousandfold; a shift leaves the Laplacian term alone",
        "各块权重 0.1、0.3、0.6；坐标项乘一千；整体平移不改变拉普拉斯项",
    )


def test_outputs_are_places_and_not_moves(evidence):
    """As released, zeros in a last layer put every vertex at the origin; only ``offsets`` begins at the template."""
    for offsets, expected in ((False, 0.0), (True, 1.0)):
        net = network(offsets=offsets)
        with torch.no_grad():
            for block in net.blocks:
                for p in block.coordinates.parameters():
                    p.zero_()
        out = net(cloud())
        assert torch.allclose(out["vertices"], expected * net.template.T.expand(2, -1, -1))
    moved = network(offsets=False)
    shifted = MRNet(moved.template.numpy() + 0.3, SPHERE.faces, moved.config).eval()
    shifted.load_state_dict(moved.state_dict())
    assert not torch.allclose(moved(cloud())["vertices"] + 0.3, shifted(cloud())["vertices"], atol=1e-2), (
        "moving the template does not move the answer"
    )
    evidence.property(
        "absolute coordinates as released: a zero last layer gives the origin, not the template",
        "与发布代码相同，输出绝对坐标：末层为零时得到原点，而不是模板",
    )


def test_order_of_vertices_is_kept(evidence):
    """The same network on a template whose vertices were renumbered answers with the renumbered vertices."""
    net = network()
    order = np.random.default_rng(0).permutation(66)
    place = np.argsort(order)
    other = MRNet(net.template.numpy()[order], place[SPHERE.faces], net.config).eval()
    other.load_state_dict(net.state_dict())
    assert relative(other(cloud())["vertices"], net(cloud())["vertices"][:, :, order]) < TOLERANCE
    evidence.property(
        "vertex i of the answer is vertex i of the template, however they are numbered",
        "无论模板顶点如何编号，结果的第 i 个顶点就是模板的第 i 个顶点",
    )


def test_point_features_reach_vertices_only_when_asked(evidence):
    released, drawn = network(point_features=False), network(point_features=True)
    assert not any(p.requires_grad for p in released.abstraction.parameters())
    for net, matters in ((released, False), (drawn, True)):
        before = net(cloud())["vertices"]
        with torch.no_grad():
            for p in net.abstraction.parameters():
                p.add_(0.3)
        assert torch.equal(before, net(cloud())["vertices"]) is not matters
    evidence.property(
        "as released the learned point features reach no vertex; with point_features they do",
        "照发布代码，学到的点特征到不了任何顶点；打开 point_features 就能到",
    )


def test_sparse_and_dense_adjacency_agree():
    edges = edges_of(SPHERE.faces)
    pairs = np.concatenate([edges, edges[:, ::-1]])
    a = sparse.csr_array((np.ones(len(pairs)), (pairs[:, 0], pairs[:, 1])))
    scale = sparse.diags_array(1 / np.sqrt(a.sum(1)))
    assert np.allclose((scale @ a @ scale).toarray(), adjacency(SPHERE.faces, 66).numpy(), atol=1e-6)
