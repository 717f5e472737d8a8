"""The paper's two-dimensional experiments (Figures 2 to 5 and 9 to 12): what the score does to a policy, in pictures.

    python examples/bandit2d.py                    # everything, minutes on a CPU -> runs/bandit2d/*.png
    python examples/bandit2d.py --quick            # one distribution

Actions a are points of the plane, without states. A diffusion model learns each of six behaviour distributions mu(a).
Then for every target of a grid, Q(a) = -|a - target|^2, and for every beta, a deterministic policy is extracted, one
point: it starts at the target, where Q is highest, and the score pulls it onto the data.

srpo.png       samples of mu, the model's density, and policies by Eq. 15, from greedy betas to conservative ones
times.png      the score at one time near 0 (Eq. 10) against ensembles of times (Eq. 15)
methods.png    other ways to stay near the data, at the same mean Q
curves.png     share of policies within the data's support, and mean Q, against beta
"""

import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import tyro
from scipy.integrate import solve_ivp
from tqdm import trange


@dataclass
class Args:
    out_dir: Path = Path("runs/bandit2d")
    """where the pictures go"""
    seed: int = 0
    """of data, weights and noise; the same seed draws the same figures"""
    steps: int = 6000
    """gradient steps of the behaviour models"""
    quick: bool = False
    """one distribution, a quarter of the steps, coarser grids"""


# ---- behaviour distributions, from -4 to 4 as in the paper


def eight_gaussians(n, rng):
    angle = rng.integers(8, size=n) * np.pi / 4
    return 3.2 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.25 * rng.standard_normal((n, 2))


def swiss_roll(n, rng):
    angle = 1.5 * np.pi * (1 + 2 * rng.random(n))
    return angle[:, None] / 4 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.12 * rng.standard_normal((n, 2))


def moons(n, rng):
    angle, lower = np.pi * rng.random(n), rng.integers(2, size=n)
    x, y = np.cos(angle), np.sin(angle)
    moon = np.where(lower[:, None], np.stack([1 - x, 0.5 - y], 1), np.stack([x, y], 1))
    return 2.4 * (moon - [0.5, 0.25]) + 0.2 * rng.standard_normal((n, 2))


def rings(n, rng):
    radius, angle = rng.choice([1.2, 2.4, 3.6], n), 2 * np.pi * rng.random(n)
    return radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.12 * rng.standard_normal((n, 2))


def checkerboard(n, rng):
    x, row = rng.random(n), rng.integers(4, size=n)
    column = 2 * rng.integers(2, size=n) + row % 2
    return 2 * np.stack([column + x, row + rng.random(n)], 1) - 4


def two_spirals(n, rng):
    angle, sign = 3 * np.pi * np.sqrt(rng.random(n)), rng.choice([-1, 1], n)
    spiral = (sign * angle / 2.5)[:, None] * np.stack([-np.cos(angle), np.sin(angle)], 1)
    return spiral + 0.12 * rng.standard_normal((n, 2))


DISTRIBUTIONS = {
    "8 Gaussians": eight_gaussians,
    "swiss roll": swiss_roll,
    "moons": moons,
    "rings": rings,
    "checkerboard": checkerboard,
    "two spirals": two_spirals,
}


# ---- the diffusion behaviour model; the replicas R of the layers are the distributions


class Linear(nn.Module):
    """R independent nn.Linear layers with nn.Linear's initial distribution: x [R, B, n_in] -> [R, B, n_out]."""

    def __init__(self, n_in, n_out, R):
        super().__init__()
        bound = n_in**-0.5
        self.weight = nn.Parameter(torch.empty(R, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(R, 1, n_out).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


BETA_0, BETA_1 = 0.1, 20.0  # of the noise schedule


def alpha_sigma(t):
    """The VPSDE's noise schedule: a_t = alpha a + sigma eps."""
    log_alpha = -(BETA_1 - BETA_0) / 4 * t**2 - BETA_0 / 2 * t
    return log_alpha.exp(), (1 - torch.exp(2 * log_alpha)).sqrt()


class NoiseModel(nn.Module):
    """eps_psi(a_t | t), the noise in a_t: a_t [R, B, 2], t [R, B, 1] -> [R, B, 2]."""

    def __init__(self, R):
        super().__init__()
        self.register_buffer("W", 0.3 * torch.randn(R, 3, 64))  # frequencies of action and noise level, never trained
        sizes = [3 + 128, 128, 128, 128, 2]
        layers = []
        for n_in, n_out in zip(sizes, sizes[1:]):
            layers += [Linear(n_in, n_out, R), nn.SiLU()]
        self.net = nn.Sequential(*layers[:-1])

    def forward(self, a_t, t):
        alpha, sigma = alpha_sigma(t)
        x = torch.cat([a_t, torch.log(alpha / sigma)], dim=-1)
        phase = 2 * torch.pi * x @ self.W
        return self.net(torch.cat([x, phase.sin(), phase.cos()], dim=-1))


def draw(data, batch_size):
    """Points of data [R, N, 2] drawn with replacement, for each distribution its own: [R, B, 2]."""
    index = torch.randint(data.shape[1], (len(data), batch_size, 1))
    return data.gather(1, index.expand(-1, -1, 2))


def train_behavior(data, steps, batch_size=256):
    """Noise prediction (Eq. 13) of all distributions at once, data [R, N, 2]; the learning rate on a cosine to 0."""
    eps_psi = NoiseModel(len(data))
    optimizer = torch.optim.Adam(eps_psi.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in trange(steps, desc="behavior"):
        a = draw(data, batch_size)
        t, eps = torch.empty(*a.shape[:2], 1).uniform_(0.001, 1), torch.randn_like(a)
        alpha, sigma = alpha_sigma(t)
        loss = (eps_psi(alpha * a + sigma * eps, t) - eps).square().sum(-1).mean(-1).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return eps_psi.requires_grad_(False)


def log_density(eps_psi, a):
    """log mu(a) of the model at a [R, B, 2], by the probability-flow ODE (Song et al., 2021): [R, B].

    In y = a_t / alpha and rho = sigma / alpha the ODE is dy / drho = eps_psi(alpha y, t), and the log density of y
    falls along it by the divergence of the right side, here the exact trace of its Jacobian.
    """
    alpha, sigma = alpha_sigma(torch.tensor([0.001, 1], dtype=torch.float64))
    log_rho = torch.log(sigma / alpha)

    def slope(log_rho, y):  # of y and of the integral of the divergence, per log rho
        y = torch.from_numpy(y).to(a).view(3, *a.shape[:2])[:2].permute(1, 2, 0)
        log_alpha = -np.logaddexp(0, 2 * log_rho) / 2  # alpha^2 (1 + rho^2) = 1
        x = (BETA_1 - BETA_0) / 2  # x t^2 + BETA_0 t + 2 log_alpha = 0 has the solution
        t = (-BETA_0 + (BETA_0**2 - 8 * x * log_alpha) ** 0.5) / (2 * x)
        rho, alpha, t = np.exp(log_rho), np.exp(log_alpha), a.new_full((*a.shape[:2], 1), t)
        divergence = 0
        for i, direction in enumerate(torch.eye(2).to(a)):
            tangent = direction.expand_as(y).contiguous()
            eps, column = torch.func.jvp(lambda y: eps_psi(alpha * y, t), (y,), (tangent,))
            divergence = divergence + column[..., i]
        return rho * torch.cat([eps.permute(2, 0, 1), divergence[None]]).double().flatten().numpy()

    start = torch.cat([(a / alpha[0]).permute(2, 0, 1), torch.zeros(1, *a.shape[:2])])
    end = solve_ivp(slope, log_rho.tolist(), start.flatten().double().numpy(), rtol=1e-4, atol=1e-4).y[:, -1]
    end = torch.from_numpy(end).view(3, *a.shape[:2])
    a_1 = end[:2] * alpha[1]
    return -a_1.square().sum(0) / 2 - np.log(2 * np.pi) + 2 * torch.log(alpha[1] / alpha[0]) + end[2]


# ---- policies: one point per target and beta, [R, K, n, 2]


def extract(pull, targets, betas, steps=400, lr=0.1):
    """Adam on beta grad Q(a) - pull(a), the gradient of Eq. 10 or 15 times beta, from the targets [R, n, 2] on.

    pull(a [R, K n, 2]) is minus the score, scaled: descending along it leads to the data. Returns [R, K, n, 2].
    """
    shape = len(targets), len(betas), *targets.shape[1:]
    target = targets[:, None].expand(shape).flatten(1, 2)
    beta = torch.tensor(betas)[None, :, None, None].expand(*shape[:3], 1).flatten(1, 2)
    a = target.clone().requires_grad_()
    optimizer = torch.optim.Adam([a], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        a.grad = pull(a.detach()) - beta * 2 * (target - a.detach())  # grad Q = 2 (target - a)
        optimizer.step()
        schedule.step()
    return a.detach().view(shape)


def single_time(eps_psi, t=0.02):
    """Eq. 10: minus the score of mu, eps_psi / sigma at a time near 0."""

    def pull(a):
        time = torch.full((*a.shape[:2], 1), t)
        return eps_psi(a, time) / alpha_sigma(time)[1]

    return pull


def ensemble(eps_psi, omega, samples=4):
    """Eq. 15: omega(t) (eps_psi(a_t | t) - eps) over all times; omega(alpha, sigma)."""

    def pull(a):
        many = a.repeat(1, samples, 1)
        t, eps = torch.empty(*many.shape[:2], 1).uniform_(0.02, 0.98), torch.randn_like(many)
        alpha, sigma = alpha_sigma(t)
        bracket = omega(alpha, sigma) * (eps_psi(alpha * many + sigma * eps, t) - eps)
        return bracket.view(len(a), samples, *a.shape[1:]).mean(dim=1)

    return pull


# ---- the alternatives of Figures 2, 4 and 9


def forward_kl(data, targets, betas):
    """Weighted regression: actions of the Gaussian that is nearest to mu exp(beta Q) in forward KL, by its moments."""
    distance = torch.cdist(targets, data).square()  # [R, n, N]
    policies = []
    for beta in betas:
        weight = torch.softmax(-beta * distance, dim=-1)
        mean, square = weight @ data, torch.einsum("rnk,rki,rkj->rnij", weight, data, data)
        covariance = square - mean[..., None] * mean[..., None, :] + 1e-5 * torch.eye(2)
        std = torch.linalg.cholesky(covariance)
        policies.append(mean + (std @ torch.randn(*mean.shape, 1))[..., 0])
    return torch.stack(policies, dim=1)


def reverse_kl_gaussian(data, targets, betas):
    """The maximum of Q + log mu / beta with a Gaussian for mu."""
    mean, precision = data.mean(dim=1, keepdim=True), torch.linalg.inv(torch.stack([x.T.cov() for x in data]))
    policies = []
    for beta in betas:  # 2 beta (target - a) = precision (a - mean)
        right = 2 * beta * targets + mean @ precision
        policies.append(torch.linalg.solve(2 * beta * torch.eye(2) + precision, right, left=False))
    return torch.stack(policies, dim=1)


class VAE(nn.Module):
    """A variational autoencoder with two latent variables and a Gaussian decoder of learned variance."""

    def __init__(self, R):
        super().__init__()

        def net(n_out):
            hidden = Linear(2, 128, R), nn.SiLU(), Linear(128, 128, R), nn.SiLU()
            return nn.Sequential(*hidden, Linear(128, n_out, R))

        self.encoder, self.decoder = net(4), net(3)

    def elbo(self, a):
        """The evidence lower bound on log mu(a), with one sampled latent each: [R, B]."""
        mean, log_std = self.encoder(a).chunk(2, dim=-1)
        z = mean + log_std.exp() * torch.randn_like(mean)
        out = self.decoder(z)
        back, log_scale = out[..., :2], out[..., 2:].clamp(min=-4)
        reconstruction = -((a - back) ** 2 / (2 * torch.exp(2 * log_scale)) + log_scale).sum(-1) - np.log(2 * np.pi)
        return reconstruction - ((mean**2 + torch.exp(2 * log_std)) / 2 - log_std - 0.5).sum(-1)


def train_vae(data, steps, batch_size=256):
    vae = VAE(len(data))
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    for _ in trange(steps, desc="VAE"):
        optimizer.zero_grad()
        (-vae.elbo(draw(data, batch_size)).mean(dim=1).sum()).backward()
        optimizer.step()
    return vae.requires_grad_(False)


def sampled_divergence(vae, samples=4):
    """Minus the gradient of the VAE's bound on log mu, as support constraints sample it (SPOT, Wu et al., 2022)."""

    def pull(a):
        many = a.repeat(1, samples, 1).requires_grad_()
        (gradient,) = torch.autograd.grad(vae.elbo(many).sum(), many)
        return -gradient.view(len(a), samples, *a.shape[1:]).mean(dim=1)

    return pull


# ---- measures and pictures


COLORS = ["#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito's, colour-blind safe
EXTENT = 5  # half the side of every picture


class Support:
    """The model's densities on a grid, and their supports: the smallest regions that hold 90% of the mass."""

    def __init__(self, eps_psi, cells, replicas):
        self.side = 2 * EXTENT / cells
        centres = (torch.arange(cells) + 0.5) * self.side - EXTENT
        grid = torch.cartesian_prod(centres, centres).expand(replicas, -1, 2)
        self.density = log_density(eps_psi, grid).exp().view(-1, cells, cells)  # [R, x, y]
        self.mass = self.density.sum(dim=(1, 2)) * self.side**2
        ranked = self.density.flatten(1).sort(descending=True).values
        held = ranked.cumsum(dim=1) < 0.9 * ranked.sum(dim=1, keepdim=True)
        self.threshold = ranked.gather(1, held.sum(dim=1, keepdim=True))[:, 0]

    def share(self, a):
        """Of points a [R, K, n, 2], those within the support: [R, K]."""
        cell = ((a + EXTENT) / self.side).floor().long()
        inside = (cell >= 0).all(-1) & (cell < self.density.shape[1]).all(-1)
        x, y = cell.clamp(0, self.density.shape[1] - 1).unbind(-1)
        density = self.density[torch.arange(len(a)).view(-1, 1, 1), x, y]
        return (inside & (density >= self.threshold.view(-1, 1, 1))).double().mean(-1)


def mean_q(a, targets):
    return -(a - targets[:, None]).square().sum(-1).mean(-1)  # [R, K]


def show_density(ax, density):
    """Darker is likelier; the square root shows thin tails beside high peaks."""
    ax.imshow(density.sqrt().T, origin="lower", extent=[-EXTENT, EXTENT] * 2, cmap="Blues", vmin=0)
    ax.set(xticks=[], yticks=[], xlim=(-EXTENT, EXTENT), ylim=(-EXTENT, EXTENT), aspect="equal")


def show_policies(ax, density, targets, policies, share):
    """Lines from the targets to the policies."""
    show_density(ax, density)
    lines = torch.stack([targets, policies], dim=1)
    ax.add_collection(plt.matplotlib.collections.LineCollection(lines.numpy(), colors="0.35", linewidths=0.5))
    ax.plot(*policies.T, "o", color="#D55E00", markersize=2.8, markeredgewidth=0)
    ax.set_xlabel(f"{100 * share:.0f}% in support", fontsize=8, labelpad=2)


def picture(path, rows, columns, title, panel):
    """A file with a grid of square panels, named on its left and upper side: panel(ax, row, column) draws one."""
    size = 1.6 * len(columns) + 0.3, 1.8 * len(rows) + 0.4
    figure, axes = plt.subplots(len(rows), len(columns), figsize=size, squeeze=False)
    for i, row in enumerate(rows):
        for j, column in enumerate(columns):
            panel(axes[i, j], row, column)
            axes[i, j].set_title(column if i == 0 else "", fontsize=9)
            axes[i, j].set_ylabel(row if j == 0 else "", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
    print(f"saved {path}")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    plt.rcParams |= {"figure.constrained_layout.use": True, "savefig.dpi": 110}
    args.out_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    started, rng = time.time(), np.random.default_rng(args.seed)
    names = list(DISTRIBUTIONS)[: 1 if args.quick else None]
    steps, cells, side = (args.steps // 4, 32, 5) if args.quick else (args.steps, 64, 9)
    data = torch.stack([torch.from_numpy(DISTRIBUTIONS[name](20_000, rng)).float() for name in names])

    eps_psi = train_behavior(data, steps)
    support = Support(eps_psi, cells, len(names))
    for name, mass in zip(names, support.mass):
        print(f"{name}: the density integrates to {mass:.3f} over the picture")

    axis = torch.linspace(-4.4, 4.4, side)
    targets = torch.cartesian_prod(axis, axis).expand(len(names), -1, 2)
    vae = train_vae(data, steps // 2)
    betas = np.array([10, 5, 2, 1, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01])
    srpo, default, one_time = (
        "Eq. 15, alpha / sigma",
        "Eq. 15, sigma^2",
        "Eq. 10, t = 0.02",
    )  # sigma^2: the default of srpo_actor.py
    methods = {  # beta's scale in each, as the pulls differ in size
        srpo: (1, lambda betas: extract(ensemble(eps_psi, lambda alpha, sigma: alpha / sigma), targets, betas)),
        default: (0.1, lambda betas: extract(ensemble(eps_psi, lambda alpha, sigma: sigma**2), targets, betas)),
        one_time: (100, lambda betas: extract(single_time(eps_psi), targets, betas)),
        "forward KL": (3, lambda betas: forward_kl(data[:, :4000], targets, betas)),
        "reverse KL, Gaussian": (10, lambda betas: reverse_kl_gaussian(data, targets, betas)),
        "reverse KL, VAE": (10, lambda betas: extract(sampled_divergence(vae), targets, betas)),
    }
    policies = {name: method((scale * betas).tolist()) for name, (scale, method) in methods.items()}
    share = {name: support.share(a) for name, a in policies.items()}
    q = {name: mean_q(a, targets) for name, a in policies.items()}

    def like_srpo(name, r, k):
        """The beta of a method at which its mean Q is nearest to that of SRPO's k-th beta."""
        return (q[name][r] - q[srpo][r, k]).abs().argmin()

    def show(ax, name, r, k):
        show_policies(ax, support.density[r], targets[r], policies[name][r, k], share[name][r, k])

    def panel(ax, row, name):
        r = names.index(name)
        if row == "data":
            show_density(ax, torch.zeros(2, 2))
            ax.plot(*data[r, :2000].T, ".", color="#08519C", markersize=1, alpha=0.5)
        elif row == "model's density":
            show_density(ax, support.density[r])
        else:
            show(ax, srpo, r, shown[row])

    shown = {f"beta = {betas[k]:g}": k for k in (2, 4, 5, 8)}
    title = "SRPO: from the highest Q (ends of the lines) to the policies (dots), beta from greedy to conservative"
    picture(args.out_dir / "srpo.png", ["data", "model's density", *shown], names, title, panel)

    def panel(ax, row, name):
        method, _, beta = row.partition("\n")
        show(ax, method, names.index(name), like_srpo(method, names.index(name), shown[beta]))

    rows = [f"{method}\n{beta}" for beta in list(shown)[2:] for method in (one_time, default, srpo)]
    title = "One time near 0, and ensembles of times with two weights; the three rows of one beta have equal mean Q"
    picture(args.out_dir / "times.png", rows, names, title, panel)

    beta = list(shown)[3]
    rows = [f"{method}\n{beta}" for method in policies if method != one_time]
    title = "Ways to stay near the data, each at the mean Q of the first row"
    picture(args.out_dir / "methods.png", rows, names, title, panel)

    figure, axes = plt.subplots(1, 3, figsize=(10.5, 3.4))
    for color, marker, (name, (scale, _)) in zip(COLORS, "os^Dv*", methods.items()):
        label = {"color": color, "marker": marker, "markersize": 4, "linewidth": 1.2, "label": name}
        axes[2].plot(q[name].mean(0), 100 * share[name].mean(0), **label)
        if name in (srpo, default, one_time):
            axes[0].plot(scale * betas, 100 * share[name].mean(0), **label)
            axes[1].plot(scale * betas, q[name].mean(0), **label)
    axes[0].set(xscale="log", xlabel="beta", ylabel="policies in support (%)")
    axes[1].set(xscale="log", xlabel="beta", ylabel="mean Q")
    axes[2].set(xlabel="mean Q", ylabel="policies in support (%)")
    axes[2].legend(fontsize=7)
    figure.suptitle(f"Mean over {len(names)} distribution(s)", fontsize=10)
    figure.savefig(args.out_dir / "curves.png")
    print(f"saved {args.out_dir / 'curves.png'}")

    for beta in list(shown)[2:]:
        print(f"policies in support, in percent, at the mean Q of {srpo}, {beta}:")
        print(" " * 22 + " ".join(f"{name:>12}" for name in names))
        for method in policies:
            shares = [share[method][r, like_srpo(method, r, shown[beta])] for r in range(len(names))]
            print(f"{method:>22}" + " ".join(f"{100 * x:12.0f}" for x in shares))
    print(f"{time.time() - started:.0f} s")
