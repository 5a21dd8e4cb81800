"""Bottom-up and top-down attention: a caption attends to regions that a detector proposes, in the place of the cells of a grid.

Anderson, He, Buehler, Teney, Johnson, Gould and Zhang, "Bottom-Up and Top-Down Attention for Image Captioning and Visual Question Answering",
CVPR 2018 (arXiv 1707.07998).

Bottom-up: Faster R-CNN, which learns objects and their attributes, says where something is; each region's mean-pooled feature is v_i. Top-down:
two LSTMs write the caption, and the first one's state weights the regions anew for each word. It is built on this archive's Faster R-CNN.

Different from the official Caffe code: regions are pooled by RoIAlign; conv5 keeps its stride (theirs is dilated); detector and captions are
learned together, the latter on features that are cut off from the gradient; images are squares; a box has one attribute. Data without boxes get
the grid of the paper's own baseline, and then the convolutions learn from the captions.

Shapes: B images, R regions, F features of one, M sentences an image, L words, V vocabulary, H attention's width, S side, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import box_iou, roi_align

from paperworks.data.boxes import BoxAugment
from paperworks.nn.boxes import BACKGROUND, BETWEEN, encode, match, suppress
from paperworks.nn.resnet import Depth, ResNet
from paperworks.papers.detection.faster_rcnn import faster_rcnn
from paperworks.papers.detection.faster_rcnn.faster_rcnn import HEAD_WEIGHTS, RPN, FasterRCNN, anchor_shapes, multi_task_loss, sample
from paperworks.tasks.base import Batch, Grid, Loss, Output, Paper, Recipe, Spec
from paperworks.tasks.captions import END, UNKNOWN

NEVER = -1e9
"""Log-probability of what must not be."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The paper's captioner with the detector that it was published with."""

    regions: Literal["detected", "grid"] = "detected"
    """``grid``: the cells of the last map, resized to a fixed number of them (the paper's ResNet baseline)."""
    cells: int = 10
    """Cells of the grid along a side."""
    least: int = 10
    """Regions of an image, at least ..."""
    most: int = 100
    """... and at most."""
    confidence: float = 0.2
    """Regions with any class above it are taken."""
    overlap: float = 0.3
    """Of the suppression in each class."""
    image_size: int = 600
    depth: Depth = 101
    width: int = 64
    """Channels of the ResNet's first stage."""
    stage: int = 3
    """Regions are pooled from what this many stages give, and go through the next one."""
    pool: int = 14
    """Side of a pooled region."""
    sizes: tuple[int, ...] = (64, 128, 256, 512)
    """Square roots of the anchors' areas."""
    ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    before: tuple[int, int] = (12000, 6000)
    """Proposals that go into the suppression, in training and in use."""
    after: tuple[int, int] = (2000, 300)
    """Proposals that come out of it."""
    smallest: float = 16.0
    """Shortest side of a proposal."""
    sampled: int = 128
    """Regions of an image that train the detector's head."""
    class_embedding: int = 256
    attribute_hidden: int = 512
    attribute_weight: float = 0.5
    embedding: int = 1000
    """Of a word, not pre-trained."""
    cells_lstm: int = 1000
    """M of the paper: cells of each LSTM."""
    attention: int = 512
    """H of the paper."""
    std: float = 0.01
    """Of the captioner's first weights."""
    beam: int = 5
    cross_entropy: int | None = 60_000
    """Steps of cross-entropy; then self-critical ones begin. None: there are no others."""
    explore: Literal["beam", "policy"] = "beam"
    """Sampled captions are those of the beam (section 3.2.2: fast, and near the best ones), or drawn from the policy (plain SCST)."""


# --- Bottom-up (section 3.1) -----------------------------------------------------------------------------------------------------------------


def detector_config(config: Config) -> faster_rcnn.Config:
    """What Faster R-CNN's own parts must know."""
    return faster_rcnn.Config(
        image_size=config.image_size, sizes=config.sizes, ratios=config.ratios, before=config.before, after=config.after,
        smallest=config.smallest, regions=config.sampled, background=0.0, per_position=False,
    )  # fmt: skip


class Detector(FasterRCNN):
    """Faster R-CNN on one map of a ResNet: regions are pooled from it and go through the next stage; a second head names an attribute.

    Without ``classes`` it is nothing but the convolutions.
    """

    def __init__(self, channels: int, classes: int, attributes: int, config: Config) -> None:
        nn.Module.__init__(self)  # of the parent the methods are used, not the parts
        self.config, self.own = detector_config(config), config
        trunk = ResNet(config.depth, channels, width=config.width)
        stages = [trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4]
        self.stages = nn.Sequential(trunk.conv1, trunk.bn1, trunk.relu, trunk.maxpool, *stages[: config.stage])
        self.last = stages[config.stage]
        self.stride, self.features = trunk.strides[config.stage - 1], trunk.widths[config.stage]
        self.classes = classes
        if classes:
            shapes = anchor_shapes(config.sizes, config.ratios)
            self.register_buffer("shapes_0", shapes, persistent=False)
            self.rpn = RPN(trunk.widths[config.stage - 1], len(shapes), softmax=True)
            self.cls, self.reg = nn.Linear(self.features, classes + 1), nn.Linear(self.features, 4 * (classes + 1))
            layers = [self.cls, self.reg]
            if attributes:
                self.class_embedding = nn.Embedding(classes + 1, config.class_embedding)
                self.fc_attr = nn.Linear(self.features + config.class_embedding, config.attribute_hidden)
                self.attr = nn.Linear(config.attribute_hidden, attributes + 1)  # 0: no attribute
                nn.init.normal_(self.class_embedding.weight, std=0.01)
                layers += [self.fc_attr, self.attr]
            for layer in layers:
                nn.init.normal_(layer.weight, std=0.01)
                nn.init.zeros_(layer.bias)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, image: Float[Tensor, "B C S S"], boxes: Float[Tensor, "B G 4"], labels: Int[Tensor, "B G"], attributes: Int[Tensor, "B G"]
    ) -> Output:
        """What Faster R-CNN's loss compares (its ``logits`` are ``region_logits``), and ``attribute_logits`` with ``attribute_label``."""
        maps, side = [self.stages(image)], image.shape[-1]
        anchors = self._anchors(maps, side)
        objectness, t = self.rpn(maps)
        real = [k >= 0 for k in labels]
        with torch.no_grad():
            proposals, valid = self._propose(objectness, t, anchors, side)
            targets = self._rpn_targets(torch.cat(anchors), [(b[r], k[r]) for b, k, r in zip(boxes, labels, real)], side)
        chosen = [
            self._assigned(p[is_real], b[r], k[r], a[r])
            for p, is_real, b, k, a, r in zip(proposals, valid, boxes, labels, attributes, real)
        ]
        label, attribute, t_star = (torch.cat([c[i] for c in chosen]) for i in (1, 2, 3))
        v = self.pooled(maps[0], [c[0] for c in chosen])
        coded = self.reg(v).view(len(v), -1, 4)
        out: Output = {
            "objectness": torch.cat(objectness, 1),
            "t": torch.cat(t, 1),
            **targets,
            "region_logits": self.cls(v),
            "region_t": coded[torch.arange(len(label), device=label.device), label],
            "region_label": label,
            "region_t_star": t_star,
        }
        if hasattr(self, "attr"):
            of_objects = label > 0
            known = torch.cat([v[of_objects], self.class_embedding(label[of_objects])], 1)  # the true class, as in the official code
            out |= {"attribute_logits": self.attr(F.relu(self.fc_attr(known))), "attribute_label": attribute[of_objects] + 1}
        return out

    def _assigned(self, regions: Tensor, boxes: Tensor, labels: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Regions that train the head, with class (0: background), attribute and target; the true boxes are among them."""
        regions = torch.cat([regions, boxes])
        if not len(boxes):
            label = torch.zeros(len(regions), dtype=torch.int64, device=regions.device)
            chosen = sample(label, self.config.regions, 0.25)
            return regions[chosen], label[chosen], label[chosen] - 1, torch.zeros_like(regions[chosen])
        matched = match(box_iou(boxes, regions), 0.5, 0.5)
        label = (1 + labels[matched.clamp(min=0)]).where(matched >= 0, torch.where(matched == BETWEEN, -1, 0))
        attribute = attributes[matched.clamp(min=0)].where(matched != BACKGROUND, -1)
        chosen = sample(label, self.config.regions, 0.25)
        t_star = encode(boxes[matched[chosen].clamp(min=0)], regions[chosen], HEAD_WEIGHTS)
        return regions[chosen], label[chosen], attribute[chosen], t_star

    def pooled(self, feature: Float[Tensor, "B c h w"], regions: Sequence[Tensor]) -> Float[Tensor, "N F"]:
        """Mean-pooled features of boxes, image after image."""
        x = roi_align(feature, self._regions(regions), (self.own.pool,) * 2, 1 / self.stride, sampling_ratio=2)
        return self.last(x).mean((2, 3))

    def detected(self, image: Float[Tensor, "B C S S"]) -> tuple[Float[Tensor, "B R F"], Bool[Tensor, "B R"], Float[Tensor, "B R 4"]]:
        """Features of the chosen proposals, which of the rows are any, and their boxes (not refined: the feature is that of the proposal)."""
        maps, side = [self.stages(image)], image.shape[-1]
        proposals, valid = self._propose(*self.rpn(maps), self._anchors(maps, side), side)  # pyright: ignore[reportCallIssue]
        v = self.pooled(maps[0], list(proposals.unbind(0)))
        scores = self.cls(v).softmax(1)[:, 1:].view(*valid.shape, -1)  # B P K
        v = v.view(*valid.shape, -1)
        best = torch.stack([self._confidence(p, s) for p, s in zip(proposals, scores)]).where(valid, -1.0)
        order = torch.arange(best.shape[1], device=best.device)
        # Those that are suppressed in every class are all at 0: they keep the RPN's order, wherever the network runs.
        index = (best - 1e-7 * order).topk(min(self.own.most, best.shape[1]), dim=1).indices
        best, rank = best.gather(1, index), order[: index.shape[1]]
        mask = ((best > self.own.confidence) | (rank < self.own.least)) & (best >= 0) | (rank == 0)
        v, boxes = (x.gather(1, index[..., None].expand(-1, -1, x.shape[2])) for x in (v, proposals))
        return v, mask, boxes

    def _confidence(self, boxes: Float[Tensor, "P 4"], scores: Float[Tensor, "P K"]) -> Float[Tensor, " P"]:
        """The highest probability of any class in whose suppression the region is kept."""
        group = torch.zeros(len(boxes), dtype=torch.int64, device=boxes.device)
        best = torch.zeros_like(scores[:, 0])
        for score in scores.unbind(1):
            best = torch.maximum(best, score * suppress(boxes, score, group, self.own.overlap))
        return best

    def gridded(self, image: Float[Tensor, "B C S S"]) -> tuple[Float[Tensor, "B R F"], Bool[Tensor, "B R"], Float[Tensor, "B R 4"]]:
        """The same of the cells of a grid: the last map, resized to a fixed number of them."""
        n, side = self.own.cells, image.shape[-1]
        last = F.interpolate(self.last(self.stages(image)), (n, n), mode="bilinear", align_corners=False)
        v = last.flatten(2).transpose(1, 2)
        y, x = torch.meshgrid(*(torch.arange(n, device=image.device, dtype=image.dtype),) * 2, indexing="ij")
        boxes = (torch.stack([x, y, x + 1, y + 1], -1) * (side / n)).view(1, -1, 4).expand(len(image), -1, -1)
        return v, torch.ones_like(boxes[..., 0], dtype=torch.bool), boxes


# --- Top-down (section 3.2) ------------------------------------------------------------------------------------------------------------------


class LSTM(nn.Module):
    """A step of a long short-term memory with one bias; the forget gate's begins at 1."""

    def __init__(self, inputs: int, cells: int, std: float) -> None:
        super().__init__()
        self.gates = nn.Linear(inputs + cells, 4 * cells)
        nn.init.normal_(self.gates.weight, std=std)
        nn.init.zeros_(self.gates.bias)
        nn.init.ones_(self.gates.bias[cells : 2 * cells])

    def forward(self, x: Float[Tensor, "N I"], h: Float[Tensor, "N M"], c: Float[Tensor, "N M"]) -> tuple[Tensor, Tensor]:
        """The next h and c."""
        i, f, g, o = self.gates(torch.cat([x, h], 1)).chunk(4, 1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        return o.sigmoid() * c.tanh(), c


class Regions(NamedTuple):
    """What the captioner knows of images; everything that does not change from word to word."""

    v: Float[Tensor, "N R F"]
    projected: Float[Tensor, "N R H"]
    mean: Float[Tensor, "N F"]
    mask: Bool[Tensor, "N R"]

    def times(self, count: int) -> Regions:
        """Each image ``count`` times in a row."""
        return Regions(*(x.repeat_interleave(count, 0) for x in self))


State = tuple[Tensor, Tensor, Tensor, Tensor]
"""h and c of the attention LSTM, h and c of the language LSTM."""


class TopDown(nn.Module):
    """Figure 3: the attention LSTM, attention over regions, the language LSTM."""

    def __init__(self, features: int, words: int, config: Config) -> None:
        super().__init__()
        cells = self.cells = config.cells_lstm
        self.w_e = nn.Embedding(words, config.embedding)
        self.attention_lstm = LSTM(cells + features + config.embedding, cells, config.std)
        self.w_va = nn.Linear(features, config.attention, bias=False)
        self.w_ha = nn.Linear(cells, config.attention, bias=False)
        self.w_a = nn.Linear(config.attention, 1, bias=False)
        self.language_lstm = LSTM(features + cells, cells, config.std)
        self.w_p = nn.Linear(cells, words)
        for layer in (self.w_e, self.w_va, self.w_ha, self.w_a, self.w_p):
            nn.init.normal_(layer.weight, std=config.std)
        nn.init.zeros_(self.w_p.bias)

    def regions(self, v: Float[Tensor, "B R F"], mask: Bool[Tensor, "B R"]) -> Regions:
        """The features with their mean (over regions that are any) and their projection."""
        weight = mask.to(v.dtype)[..., None]
        return Regions(v, self.w_va(v), (v * weight).sum(1) / weight.sum(1), mask)

    def start(self, regions: Regions) -> State:
        """Zeros."""
        zeros = regions.mean.new_zeros(len(regions.mean), self.cells)
        return zeros, zeros, zeros, zeros

    def step(self, word: Int[Tensor, " N"], state: State, regions: Regions) -> tuple[Float[Tensor, "N M"], Float[Tensor, "N R"], State]:
        """h2 after a word, the attention, and the next state."""
        h1, c1, h2, c2 = state
        h1, c1 = self.attention_lstm(torch.cat([h2, regions.mean, self.w_e(word)], 1), h1, c1)  # eq. 2
        a = self.w_a(torch.tanh(regions.projected + self.w_ha(h1)[:, None]))[..., 0]  # eq. 3
        alpha = a.where(regions.mask, NEVER).softmax(1)  # eq. 4
        v_hat = (alpha[..., None] * regions.v).sum(1)  # eq. 5
        h2, c2 = self.language_lstm(torch.cat([v_hat, h1], 1), h2, c2)  # eq. 6
        return h2, alpha, (h1, c1, h2, c2)

    def forward(self, regions: Regions, words: Int[Tensor, "B M L"]) -> Float[Tensor, "B M L V"]:
        """Logits of each word (eq. 7) given those before it."""
        count, length = words.shape[1:]
        regions, before = regions.times(count), F.pad(words.flatten(0, 1).clamp(min=END), (1, -1), value=END)
        state, hidden = self.start(regions), []
        for t in range(length):
            h2, _, state = self.step(before[:, t], state, regions)
            hidden.append(h2)
        return self.w_p(torch.stack(hidden, 1)).view(*words.shape, -1)

    def search(self, regions: Regions, width: int, length: int) -> Output:
        """The ``width`` most probable captions that a beam finds, best first: ``words`` and ``logp`` B W L, ``attention`` B W L R.

        No word comes twice in a row, and the unknown one never. After its end a caption goes on with ends that cost nothing. A width of 1 is
        greedy decoding.
        """
        batch, rest = len(regions.mean), regions.times(width)
        state, word = self.start(rest), torch.full((batch * width,), END, device=regions.mean.device)
        score = torch.full((1, width), NEVER, device=word.device, dtype=rest.mean.dtype)
        score = torch.cat([torch.zeros_like(score[:, :1]), score[:, 1:]], 1).expand(batch, -1)  # all start alike: one of them counts
        base = torch.arange(batch, device=word.device)[:, None] * width
        found: list[list[Tensor]] = [[], [], []]
        for t in range(length):
            h2, alpha, state = self.step(word, state, rest)
            logp = F.log_softmax(self.w_p(h2), 1)
            place = torch.arange(logp.shape[1], device=word.device)
            logp = logp.where((place != word[:, None]) & (place != UNKNOWN), NEVER)
            if t:
                logp = torch.where((word == END)[:, None], torch.where(place == END, 0.0, NEVER).to(logp), logp)
            total = score[..., None] + logp.view(batch, width, -1)
            score, index = total.flatten(1).topk(width, dim=1)
            parent = (base + index // logp.shape[1]).flatten()
            word = (index % logp.shape[1]).flatten()
            state = cast(State, tuple(x[parent] for x in state))
            gained = logp[parent].gather(1, word[:, None])[:, 0]
            for kept, new in zip(found, (word, gained, alpha[parent])):
                kept[:] = [*(x[parent] for x in kept), new]
        words, logp, attention = (torch.stack(kept, 1).unflatten(0, (batch, width)) for kept in found)
        return {"words": words, "logp": logp, "attention": attention}

    def draw(self, regions: Regions, count: int, length: int) -> Int[Tensor, "B W L"]:
        """``count`` captions of each image, drawn word by word."""
        rest = regions.times(count)
        state, word, drawn = self.start(rest), torch.full((len(rest.mean),), END, device=rest.mean.device), []
        for t in range(length):
            h2, _, state = self.step(word, state, rest)
            new = torch.multinomial(self.w_p(h2).softmax(1), 1)[:, 0]
            word = new.where((word != END) | (t == 0), END)
            drawn.append(word)
        return torch.stack(drawn, 1).unflatten(0, (-1, count))


# --- The network and its losses --------------------------------------------------------------------------------------------------------------


class UpDown(nn.Module):
    """Regions, and captions of them."""

    steps: Tensor

    def __init__(self, spec: Spec, config: Config) -> None:
        super().__init__()
        self.config, self.grid, self.length = config, Grid(fixed=config.image_size), spec.more["length"]
        self.detector = Detector(spec.channels, len(spec.classes), len(spec.more["attributes"]), config)
        self.top_down = TopDown(self.detector.features, len(spec.more["words"]), config)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def look(self, image: Float[Tensor, "B C S S"]) -> tuple[Regions, Float[Tensor, "B R 4"]]:
        """Bottom-up: the regions of images, and their boxes."""
        grid = self.config.regions == "grid" or not self.detector.classes
        v, mask, boxes = self.detector.gridded(image) if grid else self.detector.detected(image)
        return self.top_down.regions(v, mask), boxes

    def forward(
        self,
        image: Float[Tensor, "B C S S"],
        words: Int[Tensor, "B M L"] | None = None,
        boxes: Float[Tensor, "B G 4"] | None = None,
        labels: Int[Tensor, "B G"] | None = None,
        attributes: Int[Tensor, "B G"] | None = None,
    ) -> Output:
        """Captions of images; with captions and boxes what the loss compares.

        Without: ``words``, ``logp`` B L, ``attention`` B L R and ``boxes`` B R 4. With: what the detector's loss needs, and ``logits`` B M L V
        or, in the self-critical steps, ``sampled`` B W L with the log-probabilities ``sampled_logp`` B W, and ``greedy`` B L.
        """
        if words is None:
            regions, found = self.look(image)
            best = {key: value[:, 0] for key, value in self.top_down.search(regions, self.config.beam, self.length).items()}
            return best | {"boxes": found}
        out = Output()
        if self.detector.classes:
            out |= self.detector(image, boxes, labels, attributes)
            training = self.detector.training
            self.detector.eval()  # captions are learned on the features that they will be written from, and leave the detector alone
            with torch.no_grad():
                regions, _ = self.look(image)
            self.detector.train(training)
            regions = self.top_down.regions(regions.v, regions.mask)
        else:
            regions, _ = self.look(image)
        if self.config.cross_entropy is None or self.steps < self.config.cross_entropy:
            out["logits"] = self.top_down(regions, words)
        else:
            out |= self.self_critical(regions)
        if self.training:
            self.steps += 1
        return out

    def self_critical(self, regions: Regions) -> Output:
        """Captions that are tried, how probable they are, and the one that they must be better than."""
        with torch.no_grad():
            greedy = self.top_down.search(regions, 1, self.length)["words"][:, 0]
            beam = self.config.explore == "beam"
            count, length = self.config.beam, self.length
            sampled = self.top_down.search(regions, count, length)["words"] if beam else self.top_down.draw(regions, count, length)
        ended = sampled == END
        counts = ended.cumsum(2) - ended.long() == 0  # up to the first end, which counts too
        logp = self.top_down(regions, sampled).log_softmax(3).gather(3, sampled[..., None])[..., 0]
        return {"greedy": greedy, "sampled": sampled, "sampled_logp": (logp * counts).sum(2)}


def loss(config: Config) -> Loss:
    """Faster R-CNN's multi-task loss, the attributes', and of the captions eq. 9 or 11."""
    detection = multi_task_loss(detector_config(config))

    def summed(output: Output, batch: Batch) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = {}
        if "region_logits" in output:
            terms["detector"] = detection(output | {"logits": output["region_logits"]}, batch)["loss"]
        if "attribute_logits" in output:
            wrong = F.cross_entropy(output["attribute_logits"], output["attribute_label"], reduction="sum")
            terms["attribute"] = config.attribute_weight * wrong / max(len(output["attribute_label"]), 1)
        if "logits" in output:
            terms["words"] = F.cross_entropy(output["logits"].flatten(0, 2).float(), batch["words"].flatten(), ignore_index=-1)
            return {"loss": torch.stack(list(terms.values())).sum(), **terms}
        logp = output["sampled_logp"]
        r, r_greedy = (
            torch.tensor([[reward(s) for s in some] for reward, some in zip(batch["reward"], captions.tolist())]).to(logp)
            for captions in (output["sampled"], output["greedy"][:, None])
        )
        terms["policy"] = -((r - r_greedy) * logp).mean()  # eq. 11
        return {"loss": torch.stack(list(terms.values())).sum(), **terms, "reward": r.mean()}

    return summed


# --- Questions (section 3.3) -----------------------------------------------------------------------------------------------------------------


class GatedTanh(nn.Module):
    """f(x) = tanh(W x + b) * sigmoid(W' x + b')."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.value, self.gate = nn.Linear(inputs, outputs), nn.Linear(inputs, outputs)

    def forward(self, x: Float[Tensor, "*n I"]) -> Float[Tensor, "*n O"]:
        """The gated value."""
        return self.value(x).tanh() * self.gate(x).sigmoid()


class QuestionAnswering(nn.Module):
    """Figure 4: one pass of attention over the regions by the question, and a score from 0 to 1 for each of the candidate answers."""

    def __init__(self, features: int, words: int, answers: int, hidden: int = 512, embedding: int = 300) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, embedding)
        self.gru = nn.GRU(embedding, hidden, batch_first=True)
        self.f_a, self.w_a = GatedTanh(features + hidden, hidden), nn.Linear(hidden, 1, bias=False)
        self.f_q, self.f_v, self.f_o = GatedTanh(hidden, hidden), GatedTanh(features, hidden), GatedTanh(hidden, hidden)
        self.w_o = nn.Linear(hidden, answers)

    def forward(
        self, v: Float[Tensor, "B R F"], mask: Bool[Tensor, "B R"], question: Int[Tensor, "B L"]
    ) -> tuple[Float[Tensor, "B A"], Float[Tensor, "B R"]]:
        """Logits of the answers (trained by binary cross-entropy on soft scores) and the attention."""
        q = self.gru(self.embedding(question))[1][0]
        a = self.w_a(self.f_a(torch.cat([v, q[:, None].expand(-1, v.shape[1], -1)], 2)))[..., 0]
        alpha = a.where(mask, NEVER).softmax(1)
        h = self.f_q(q) * self.f_v((alpha[..., None] * v).sum(1))
        return self.w_o(self.f_o(h)), alpha


# --- Variants and recipe ---------------------------------------------------------------------------------------------------------------------

_PAPER = Config()
_SMALL = Config(
    least=8, most=16, cells=4, image_size=64, depth=18, width=32, stage=1, pool=7, sizes=(16, 24), ratios=(1.0, 1.7, 4.0), before=(100, 60),
    after=(40, 16), smallest=3.0, sampled=12, class_embedding=32, attribute_hidden=64, embedding=64, cells_lstm=128, attention=64, std=0.1,
    cross_entropy=None,
)  # fmt: skip

VARIANTS = {
    "resnet101": _PAPER,
    "resnet101_grid": replace(_PAPER, regions="grid"),
    "small": _SMALL,
    "small_grid": replace(_SMALL, regions="grid"),
    "small_cider": replace(_SMALL, cross_entropy=150),
    "test": replace(
        _SMALL, least=3, most=6, cells=3, width=4, before=(40, 40), after=(12, 12), sampled=8, class_embedding=4, attribute_hidden=8,
        embedding=8, cells_lstm=12, attention=8, std=0.3, beam=3,
    ),
}  # fmt: skip


def recipe(config: Config) -> Recipe:
    """The paper's for its captioner; minutes from nothing for the laptop's. Captions speak of left and right: nothing is mirrored."""
    augment = BoxAugment(flip=False, crop=1.0, brightness=0.05, contrast=0.1)
    if config.depth == 101:
        return Recipe(optimizer="sgd", lr=0.01, weight_decay=5e-4, schedule="poly", warmup=0.0, batch_size=100, clip=10.0, augment=augment)
    return Recipe(lr=5e-3, weight_decay=1e-4, batch_size=8, clip=5.0, augment=augment)


PAPER = Paper(variants=VARIANTS, build=UpDown, recipe=recipe, auto=("small",), loss=loss)
