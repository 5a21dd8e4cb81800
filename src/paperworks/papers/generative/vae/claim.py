"""Claim: the bound is reached sooner than by wake-sleep, superfluous latents do not overfit, and draws of the prior decode to digits.

``paperworks claim vae``: twelve runs of 1000 steps on 5000 digits. ``aevb`` has 20 latents; ``aevb_100`` differs in having 100; ``wake_sleep``
trains the same two networks as ``aevb`` by the paper's rival; ``autoencoder`` has the same widths and code, neither noise nor KL term.

``nats`` is minus the bound on unseen digits (estimator A, mean of five draws), ``likelihood_nats`` minus the importance-weighted estimate of
50 draws, ``frechet`` the distance of 1000 decoded draws of N(0, I) from the unseen digits. For the autoencoder ``frechet_fitted`` draws from
a Gaussian with the mean and covariance of its training codes, which the paper's model does not need; it is shown and not judged.

What can fail: wake-sleep's decoder learns fast when its encoder is good enough, and is ahead of the bound in the first few hundred steps; 80
latents more could cost more than the tolerance of 5 %. Steps and rate were chosen in a trial with another seed.
"""

from __future__ import annotations

from statistics import fmean

import torch
from torch import Tensor

from paperworks.tasks.claim import Claim, Lab, Results, Trained
from paperworks.tasks.generation import frechet

STEPS = 1000
SAMPLES = 1000
SETTINGS = {
    "aevb": {},
    "aevb_100": {"latents": 100},
    "wake_sleep": {"estimator": "wake_sleep"},
}


def run(lab: Lab, arm: str) -> dict[str, float]:
    """Train one arm, and judge it on unseen digits."""
    truth, generator = images(lab.validation), torch.Generator().manual_seed(lab.seed)
    if arm == "autoencoder":
        trained = lab.fit("autoencoder", variant="small", steps=STEPS, lr=3e-3, schedule="constant", widths="400", code=20)
        return {**draws_of_codes(trained, lab, truth, generator), "psnr": lab.evaluate(trained.predict)["psnr"]}
    trained = lab.fit(variant="small", steps=STEPS, lr=3e-3, **SETTINGS[arm])
    network = trained.network
    with torch.inference_mode():
        once = [float(network.importance_weighted(truth, 1, generator).mean()) for _ in range(5)]  # pyright: ignore[reportCallIssue]
        often = float(network.importance_weighted(truth, 50, generator).mean())  # pyright: ignore[reportCallIssue]
        drawn = network.sample(SAMPLES, generator)  # pyright: ignore[reportCallIssue]
    return {
        "nats": -fmean(once),
        "likelihood_nats": -often,
        "frechet": frechet(truth, drawn),
        "psnr": lab.evaluate(trained.predict)["psnr"],
    }


def draws_of_codes(trained: Trained, lab: Lab, truth: Tensor, generator: torch.Generator) -> dict[str, float]:
    """Distances of decoded Gaussian codes: of N(0, I), and of the Gaussian that fits the training codes."""
    network = trained.network
    with torch.inference_mode():
        codes = network.encode(images(lab.training))  # pyright: ignore[reportCallIssue]
        noise = torch.randn(SAMPLES, codes.shape[1], generator=generator)
        spread = torch.linalg.cholesky(codes.T.cov() + 1e-4 * torch.eye(codes.shape[1]))
        plain, fitted = network.decode(noise), network.decode(codes.mean(0) + noise @ spread.T)  # pyright: ignore[reportCallIssue]
    return {"frechet": frechet(truth, plain), "frechet_fitted": frechet(truth, fitted)}


def images(samples: object) -> Tensor:
    """All of a split, N C S S."""
    return torch.stack([sample["image"].as_subclass(Tensor) for sample in samples])  # pyright: ignore[reportGeneralTypeIssues]


def holds(results: Results) -> bool:
    """A better bound than wake-sleep's, at most 5 % worse with 100 latents, and nearer samples than the autoencoder's."""
    nats = {arm: fmean(results[arm]["nats"]) for arm in ("aevb", "aevb_100", "wake_sleep")}
    distance = {arm: fmean(results[arm]["frechet"]) for arm in ("aevb", "autoencoder")}
    return nats["aevb"] < nats["wake_sleep"] and nats["aevb_100"] < 1.05 * nats["aevb"] and distance["aevb"] < distance["autoencoder"]


CLAIM = Claim(
    data="pack:mnist_subset",
    arms=("aevb", "aevb_100", "wake_sleep", "autoencoder"),
    control="wake_sleep",
    metric="frechet",
    run=run,
    holds=holds,
    rule=(
        "Averaged over the seeds, minus the bound on unseen digits is smaller than wake-sleep's after as many steps; with 100 latents it is "
        "less than 5 % larger than with 20; and decoded draws of N(0, I) have a smaller Frechet distance than the autoencoder's.",
        "按随机种子取平均：同样步数后，未见数字上的负下界小于 wake-sleep 的；用 100 个隐变量时比 20 个大不到 5%；从 N(0, I) 采样解码出的图，其 Fréchet 距离小于自编码器的。",
    ),
    minutes=6.0,
)
