"""examples/bandit2d.py: densities and policies against closed forms, for scores that are known exactly."""

import ast
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run
from test_copies import pieces

sys.path.insert(0, str(ROOT / "examples"))
import bandit2d

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # what torch.func itself uses

MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
COVARIANCE = torch.tensor([[1.5, 0.6], [0.6, 0.8]], dtype=torch.float64)


def gaussian(a_t, t):
    """eps of N(MEAN, COVARIANCE): a_t [R, B, 2], t [R, B, 1]."""
    alpha = torch.exp(-(0.1 * t + 19.9 * t**2 / 2) / 2)
    total = alpha[..., None] ** 2 * COVARIANCE + (1 - alpha[..., None] ** 2) * torch.eye(2, dtype=torch.float64)
    way = (a_t - alpha * MEAN)[..., None]
    return (1 - alpha**2).sqrt() * torch.linalg.solve(total, way)[..., 0]


def mixture(a_t, t):
    """eps of 0.3 N((-2, 0), 0.25 I) + 0.7 N((1.5, 1), 0.25 I)."""
    alpha = torch.exp(-(0.1 * t + 19.9 * t**2 / 2) / 2)
    means, weights = torch.tensor([[-2.0, 0.0], [1.5, 1.0]]).to(a_t), torch.tensor([0.3, 0.7]).to(a_t)
    variance = 0.25 * alpha**2 + 1 - alpha**2
    way = a_t[..., None, :] - alpha[..., None] * means
    share = torch.softmax(weights.log() - (way**2).sum(-1) / (2 * variance), dim=-1)
    return (1 - alpha**2).sqrt() * (share[..., None] * way).sum(-2) / variance


def mixture_density(a):
    parts = [(0.3, torch.tensor([-2.0, 0.0])), (0.7, torch.tensor([1.5, 1.0]))]
    return sum(w * torch.exp(-(a - m).square().sum(-1) / 0.5) / (0.5 * np.pi) for w, m in parts)


GRID = torch.cartesian_prod(*[torch.arange(-5, 5.01, 0.25, dtype=torch.float64)] * 2)[None]


def test_density_of_a_gaussian():
    exact = torch.distributions.MultivariateNormal(MEAN, COVARIANCE).log_prob(GRID)
    error = (bandit2d.log_density(gaussian, GRID) - exact)[exact > -8].abs().max()
    assert error < 0.03  # at t = 1 the model takes N(0, I), though alpha = 0.0066 is left of the data


def test_density_of_a_mixture_and_its_integral():
    found, exact = bandit2d.log_density(mixture, GRID).exp(), mixture_density(GRID)
    assert (found - exact).abs().max() < 0.01 * exact.max()
    assert found.sum().item() * 0.25**2 == pytest.approx(1, abs=0.01)


def test_support_is_the_smallest_region_of_its_mass():
    """Of a standard Gaussian, 90% lie within the radius sqrt(-2 log 0.1)."""

    def standard(a_t, t):
        return bandit2d.alpha_sigma(t)[1] * a_t  # the total variance is 1 at all times

    support = bandit2d.Support(standard, 100, 1)
    assert support.mass.item() == pytest.approx(1, abs=1e-3)
    radius = (-2 * np.log(0.1)) ** 0.5
    assert support.threshold.item() == pytest.approx(0.1 / (2 * np.pi), rel=0.05)
    angle = torch.linspace(0, 6, 50)
    circle = torch.stack([angle.cos(), angle.sin()], dim=-1)[None, None]
    assert support.share(0.92 * radius * circle).item() == 1 and support.share(1.08 * radius * circle).item() == 0
    assert support.share(torch.full((1, 1, 3, 2), 99.0)).item() == 0  # outside the picture


TARGETS = torch.tensor([[[3.0, 1.0], [-2.0, 2.0], [0.0, 0.0]]])


def balance(betas, precision):
    """The point where beta grad Q = 2 beta (target - a) balances precision (a - MEAN)."""
    eye = torch.eye(2)
    solved = [
        torch.linalg.solve(2 * b * eye + precision, 2 * b * TARGETS[0].T + (precision @ MEAN)[:, None]) for b in betas
    ]
    return torch.stack([x.T for x in solved])[None]


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def test_policies_by_one_time(float64):
    """Eq. 10 with the score of a Gaussian: the policy is a weighted mean of target and data."""
    alpha, sigma = bandit2d.alpha_sigma(torch.tensor(0.02))
    precision = torch.linalg.inv(alpha**2 * COVARIANCE + sigma**2 * torch.eye(2))
    targets, betas = TARGETS.double(), [0.2, 2.0]
    a = bandit2d.extract(bandit2d.single_time(gaussian), targets, betas)
    # the score at t is precision (a - alpha mean), and alpha(0.02) is 0.997
    assert a.numpy() == pytest.approx(balance(betas, precision).numpy(), abs=0.01)


def test_policies_by_the_ensemble(float64):
    """Eq. 15 of a Gaussian in expectation: pull = E[omega alpha sigma total^-1] (a - mean), integrated numerically."""
    t = torch.linspace(0.02, 0.98, 2001).view(1, -1, 1)
    alpha, sigma = (x[0, :, 0] for x in bandit2d.alpha_sigma(t))
    total = alpha[:, None, None] ** 2 * COVARIANCE + sigma[:, None, None] ** 2 * torch.eye(2)
    for omega in (lambda alpha, sigma: sigma**2, lambda alpha, sigma: alpha / sigma):
        weight = (omega(alpha, sigma) * alpha * sigma)[:, None, None]
        precision = torch.trapezoid(weight * torch.linalg.inv(total), dx=1 / 2000, dim=0)
        targets, betas = TARGETS.double(), [0.1, 0.5]
        a = bandit2d.extract(bandit2d.ensemble(gaussian, omega, samples=200), targets, betas)
        assert a.numpy() == pytest.approx(balance(betas, precision).numpy(), abs=0.08)  # noise: 0.03


def test_reverse_kl_with_a_gaussian(float64):
    data = torch.distributions.MultivariateNormal(MEAN, COVARIANCE).sample((1, 200_000))
    a = bandit2d.reverse_kl_gaussian(data, TARGETS.double(), [0.2, 2.0])
    assert a.numpy() == pytest.approx(balance([0.2, 2.0], torch.linalg.inv(COVARIANCE)).numpy(), abs=0.03)


def test_forward_kl_samples_the_moments(float64):
    """mu exp(beta Q) of a Gaussian is the Gaussian of precision C^-1 + 2 beta I, whose mean balances both."""
    data = torch.distributions.MultivariateNormal(MEAN, COVARIANCE).sample((1, 4000))
    target = torch.tensor([[[1.0, 0.0]]]).expand(1, 2000, 2)
    (a,) = bandit2d.forward_kl(data, target, [0.5])[0]
    covariance = torch.linalg.inv(torch.linalg.inv(COVARIANCE) + torch.eye(2))
    mean = covariance @ (torch.linalg.inv(COVARIANCE) @ MEAN + target[0, 0])
    assert a.mean(0).numpy() == pytest.approx(mean.numpy(), abs=0.08)
    assert a.T.cov().numpy() == pytest.approx(covariance.numpy(), abs=0.08)


def test_the_vae_bounds_the_density_from_below():
    """A linear Gaussian is a VAE's easiest case: the bound comes near the entropy, and never above it."""
    torch.manual_seed(0)
    normal = torch.distributions.MultivariateNormal(MEAN.float(), COVARIANCE.float())
    data = normal.sample((1, 20_000))
    vae = bandit2d.train_vae(data, 1000)
    gap = (normal.log_prob(data) - vae.elbo(data)).mean().item()
    assert -0.02 < gap < 0.2
    pull = bandit2d.sampled_divergence(vae, samples=400)
    a = MEAN.float() + torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    exact = torch.linalg.solve(COVARIANCE.float(), (a[0] - MEAN.float()).T).T
    assert pull(a)[0].numpy() == pytest.approx(exact.numpy(), abs=0.5)


@pytest.mark.parametrize("name", bandit2d.DISTRIBUTIONS)
def test_distributions_fill_the_picture(name):
    a = bandit2d.DISTRIBUTIONS[name](5000, np.random.default_rng(0))
    assert a.shape == (5000, 2) and np.abs(a).max() < bandit2d.EXTENT and np.ptp(a, axis=0).min() > 4
    again = bandit2d.DISTRIBUTIONS[name](5000, np.random.default_rng(0))
    assert np.array_equal(a, again)


def test_the_layers_are_those_of_the_stages():
    ours, theirs = pieces("examples/bandit2d.py"), pieces("srpo_actor.py")
    shared = ours.keys() & theirs.keys() - {"Args"}
    assert shared >= {"Linear", "alpha_sigma", "BETA_0"}
    assert all(ours[name] == theirs[name] for name in shared)
    for node in ast.walk(ast.parse((ROOT / "examples" / "bandit2d.py").read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not (ROOT / f"{node.module}.py").exists()


def quick(folder):
    done = run("examples/bandit2d.py", "--quick", "--steps", 600, "--out-dir", folder)
    assert "policies in support" in done.stdout
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_quick_draws_all_pictures(tmp_path):
    assert set(quick(tmp_path)) == {"srpo.png", "times.png", "methods.png", "curves.png"}


@pytest.mark.slow
def test_the_same_seed_draws_the_same_pictures(tmp_path):
    assert quick(tmp_path / "a") == quick(tmp_path / "b")
