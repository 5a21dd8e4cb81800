"""Where training starts from: published weights under our names (``convert``, ``pretrained=True``), or the encoder of another run."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from paperworks import papers
from paperworks.errors import InputError
from paperworks.tasks.base import Published, Spec
from paperworks.train.run import Run, configure

log = logging.getLogger("paperworks")


def convert(name: str, state_dict: Mapping[str, Tensor], source: str, variant: str, **settings: Any) -> dict[str, Tensor]:
    """Somebody else's state dict under the names of our network.

    Args:
        name: the paper's id.
        state_dict: theirs.
        source: whose, as ``timm`` or ``torchvision``.
        variant: of the paper, whose sizes the weights have.
        **settings: fields of the paper's configuration.

    Raises:
        InputError: the paper knows no such source, or the weights are of another variant.

    Example:
        >>> import paperworks, timm
        >>> theirs = timm.create_model("convnext_tiny").state_dict()
        >>> ours = paperworks.convert("convnext", theirs, source="timm", variant="tiny")
    """
    sources = _weights(name).SOURCES
    if source not in sources:
        raise InputError(f"{name} knows no weights of {source!r}; it knows those of {', '.join(sources)}")
    _, config, _ = configure(name, variant, settings)
    try:
        return sources[source](state_dict, config)
    except (KeyError, RuntimeError, ValueError) as error:
        raise InputError(f"the weights are not those of {name} {variant} from {source} ({type(error).__name__}: {error})") from None


def published(name: str, variant: str) -> Published:
    """Where a variant's trained weights lie.

    Raises:
        InputError: nobody published any.
    """
    known = _weights(name).PUBLISHED
    if variant not in known:
        raise InputError(f"nobody published weights of {name} {variant}; there are some of {', '.join(known) or 'no variant'}")
    return known[variant]


def pretrained_spec(name: str, variant: str, spec: Spec) -> Spec:
    """The data's spec with the mean and standard deviation that the published weights expect.

    Raises:
        InputError: the images have other channels than the weights.
    """
    found = published(name, variant)
    if spec.channels != found.channels:
        raise InputError(f"the published weights of {name} {variant} take {found.channels} channels, these images have {spec.channels}")
    return replace(spec, mean=found.mean, std=found.std)


def load_pretrained(network: nn.Module, name: str, variant: str, classes: int, settings: Mapping[str, Any]) -> None:
    """Fetch a variant's published weights (once; they are kept in the usual cache) and put them into the network.

    Where the network tells other classes apart than the weights, its head stays as it was initialised.

    Raises:
        InputError: there are none, they cannot be fetched, or they do not fit.
    """
    where = published(name, variant)
    log.info("weights of %s %s: %s, licence: %s", name, variant, where.repo or where.url, where.licence)
    known = set(vars(papers.paper(name).variants[variant]))
    ours = convert(name, fetch(where), where.source, variant, **{k: v for k, v in settings.items() if k in known})
    own = network.state_dict()
    if classes != where.classes:
        heads = _heads(network)
        ours = {key: value for key, value in ours.items() if key not in heads}
    for key, value in ours.items():
        if key not in own:
            raise InputError(f"the published weights of {name} {variant} hold {key}, which this network does not have")
        if own[key].shape != value.shape:
            raise InputError(
                f"the published weights of {name} {variant}: {key} has shape {tuple(value.shape)} where the network has "
                f"{tuple(own[key].shape)}; leave --pretrained out, or the settings that change the network"
            )
    network.load_state_dict(own | ours)
    if missing := sorted(own.keys() - ours.keys()):
        log.info("as initialised, since nothing is published for them: %s", ", ".join(missing))


def encoder_spec(run: Run, spec: Spec) -> Spec:
    """The data's spec with the mean and standard deviation that the encoder of a run was trained with.

    Raises:
        InputError: the images have other channels than those it was trained on.
    """
    if spec.channels != run.spec.channels:
        raise InputError(f"--encoder {run.folder} was trained on {run.spec.channels} channels, these images have {spec.channels}")
    return replace(spec, mean=run.spec.mean, std=run.spec.std)


def load_encoder(network: nn.Module, run: Run) -> None:
    """Put what a run has learnt to see into the part of ``network`` that has the same architecture; the rest stays as it was initialised.

    What a run has learnt to see is its network's ``encoder`` where it has one (methods that train a backbone), else the whole network, in
    either case without the head.

    Raises:
        InputError: no part of the network holds all the weights of the encoder.
    """
    theirs = run.network()
    theirs = getattr(theirs, "encoder", theirs)
    heads = _heads(theirs)
    weights = {key: value for key, value in theirs.state_dict().items() if key not in heads}
    for where, part in network.named_modules():
        own = part.state_dict()
        if all(key in own and own[key].shape == value.shape for key, value in weights.items()):
            part.load_state_dict(own | weights)
            log.info("encoder of %s: %d tensors into %s", run.folder, len(weights), where or "the network")
            return
    request = run.request
    raise InputError(
        f"--encoder {run.folder} holds {request.paper} {request.variant}, and no part of this network has its {len(weights)} tensors; "
        "pre-train with the backbone that you want to use (--set backbone=PAPER/VARIANT)"
    )


def fetch(where: Published) -> dict[str, Tensor]:
    """The published state dict, from the cache or the network; never unpickled without torch's restriction to weights."""
    try:
        if where.url:
            return torch.hub.load_state_dict_from_url(where.url, map_location="cpu", weights_only=True)
        from huggingface_hub import hf_hub_download
        from safetensors.torch import load_file

        return load_file(Path(hf_hub_download(where.repo, where.file)))
    except Exception as error:  # whatever the network, the hub or the file does
        line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{where.repo or where.url} could not be fetched ({line}); check the connection and try again") from None


def _heads(network: nn.Module) -> set[str]:
    """Names of the parameters that tell the classes apart."""
    head = {id(p) for p in network.head_parameters()} if hasattr(network, "head_parameters") else set()  # type: ignore[operator]
    return {key for key, p in network.named_parameters() if id(p) in head}


def _weights(name: str) -> ModuleType:
    card = papers.card(name)
    where = f"paperworks.papers.{card.section}.{name}.weights"
    if importlib.util.find_spec(where) is None:
        raise InputError(f"no trained weights of {name} are published that this archive knows of; train it with `paperworks train {name}`")
    return importlib.import_module(where)
