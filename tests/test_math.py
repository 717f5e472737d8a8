"""The losses against closed forms, in float64, through the functions that train."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import srpo_actor
import srpo_behavior
import srpo_critic


@pytest.fixture(autouse=True)
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


# ---- critic


def stub_critic(q, q_target, v):
    """A critic of given values: q [R, 2, B], q_target [R, 2, B], v: function of the states."""
    return SimpleNamespace(q=lambda s, a: q, q_target=lambda s, a: q_target, v=v)


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_v_loss_is_least_at_the_sample_expectile(expectile):
    x = torch.randn(1, 500) ** 3  # what V must summarise: the smaller of the two target Qs
    low, high = x.min(), x.max()
    for _ in range(200):  # the expectile m balances expectile * E(x - m)+ and (1 - expectile) * E(m - x)+
        m = (low + high) / 2
        balance = expectile * (x - m).clamp(min=0).sum() - (1 - expectile) * (m - x).clamp(min=0).sum()
        low, high = (m, high) if balance > 0 else (low, m)
    v = torch.zeros(1, requires_grad=True)
    s, zeros = torch.zeros(1, 500, 2), torch.zeros(1, 500)
    critic = stub_critic(zeros[:, None], torch.stack([x + 1, x], dim=1), lambda s: v.expand(1, 500, 1))
    optimizer = torch.optim.LBFGS([v], lr=0.5, max_iter=500, tolerance_grad=1e-14, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = srpo_critic.critic_loss(critic, s, s, zeros, s, zeros, 0.99, expectile)[0].sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert v.item() == pytest.approx(m.item(), abs=1e-8)


def test_time_outs_bootstrap_and_terminations_do_not():
    r, terminal = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 1.0]])
    q = torch.tensor([[[3.0, 5.0], [4.0, 7.0]]])
    critic = stub_critic(q, q, lambda s: s[..., :1])
    s_next = torch.tensor([[[10.0], [20.0]]])
    q_loss = srpo_critic.critic_loss(critic, s_next, s_next, r, s_next, terminal, 0.9, 0.7)[1]
    backup = torch.tensor([1 + 0.9 * 10, 2.0])
    assert q_loss.item() == pytest.approx(((q[0] - backup) ** 2).mean().item(), rel=1e-14)


def test_polyak_step():
    critic = srpo_critic.Critic(3, 2, [torch.Generator()])
    critic.q_target.load_state_dict(srpo_critic.TwinQ(3, 2, [torch.Generator().manual_seed(5)]).state_dict())
    before = [p.clone() for p in critic.q_target.parameters()]
    optimizer = torch.optim.Adam([p for p in critic.parameters() if p.requires_grad], lr=0.1)
    batch = [torch.randn(1, 8, 3), torch.randn(1, 8, 2), torch.randn(1, 8), torch.randn(1, 8, 3), torch.zeros(1, 8)]
    args = SimpleNamespace(gamma=0.99, expectile=0.7, tau=srpo_critic.Args.tau)
    srpo_critic.make_update(args, critic, optimizer, lambda: batch, torch.zeros(5, 1))()
    for old, new, online in zip(before, critic.q_target.parameters(), critic.q.parameters()):
        torch.testing.assert_close(new, old + 0.005 * (online - old), rtol=1e-12, atol=1e-14)


# ---- behaviour model


def test_behavior_loss_is_least_at_the_true_noise_predictor():
    """For actions N(m, s^2) the best eps_psi is E[eps | a_t]: its gradient vanishes, its loss is the closed form."""
    m, std, t = 0.3, 0.5, torch.full((1, 200_000, 1), 0.4)
    alpha, sigma = srpo_behavior.alpha_sigma(t)
    variance = alpha**2 * std**2 + sigma**2
    shift = torch.zeros(1, requires_grad=True)

    def model(a_t, s, t):
        return sigma * (a_t - alpha * m) / variance + shift

    eps = torch.randn_like(t)
    a = m + std * torch.randn_like(t)
    loss = srpo_behavior.behavior_loss(model, None, a, t, eps).sum()
    loss.backward()
    expected = (alpha**2 * std**2 / variance).mean().item()  # the variance of eps given a_t
    assert loss.item() == pytest.approx(expected, rel=0.02)
    assert abs(shift.grad.item()) < 0.02


def test_the_two_copies_of_the_noise_schedule_preserve_variance():
    t = torch.linspace(0.001, 1, 50)
    for module in (srpo_behavior, srpo_actor):
        alpha, sigma = module.alpha_sigma(t)
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(t), rtol=1e-12, atol=0)
        # d log alpha / dt = -beta(t) / 2 with beta(t) from 0.1 to 20
        t_ = t.clone().requires_grad_()
        slope = torch.autograd.grad(module.alpha_sigma(t_)[0].log().sum(), t_)[0]
        torch.testing.assert_close(slope, -(0.1 + (20 - 0.1) * t) / 2, rtol=1e-10, atol=0)


# ---- actor: Gaussian behaviour N(m, std^2), whose diffused score is known


def gaussian(m, std):
    """Exact eps_psi of N(m, std^2): at time t the diffused behaviour is N(alpha m, alpha^2 std^2 + sigma^2)."""

    def eps_psi(a_t, s, t):
        alpha, sigma = srpo_actor.alpha_sigma(t)
        return sigma * (a_t - alpha * m) / (alpha**2 * std**2 + sigma**2)

    return eps_psi


@pytest.mark.parametrize("weight", ["sigma2", "one", "alpha_over_sigma"])
@pytest.mark.parametrize("baseline", [True, False])
@pytest.mark.parametrize("t", [0.02, 0.3, 0.9])
def test_eq15_is_the_gradient_of_eq14(weight, baseline, t):
    m, std, beta = 0.2, 0.4, 0.05
    policy = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2), nn.Tanh())
    net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 1)).requires_grad_(False)

    def q(s, a):
        return net(torch.cat([s, a], dim=-1)).squeeze(-1)

    s, eps, t = torch.randn(1, 10, 3), torch.randn(1, 10, 2), torch.full((1, 20, 1), t)
    s, eps = s.repeat(1, 2, 1), torch.cat([eps, -eps], dim=1)  # antithetic noise: sample means are exact
    w = srpo_actor.WEIGHTS[weight]
    loss, _, _ = srpo_actor.actor_loss(policy, q, gaussian(m, std), s, t, eps, beta, w, baseline, "none")
    ours = torch.autograd.grad(loss.sum(), list(policy.parameters()))

    alpha, sigma = srpo_actor.alpha_sigma(t)
    a = policy(s)
    variance = alpha**2 * std**2 + sigma**2
    kl = 0.5 * (sigma**2 / variance + alpha**2 * (a - m) ** 2 / variance - 1 + (variance / sigma**2).log())
    eq14 = q(s, a).mean() - (w(alpha, sigma) * sigma / alpha * kl).sum(dim=-1).mean() / beta
    for x, y in zip(ours, torch.autograd.grad(-beta * eq14, list(policy.parameters()))):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t, helps", [(0.02, False), (0.6, True)])
def test_baseline_changes_the_noise_of_the_gradient_and_not_its_mean(t, helps):
    m, std, n = 0.2, 0.4, 1000
    alpha, sigma = (x.item() for x in srpo_actor.alpha_sigma(torch.tensor(t)))
    variance = alpha**2 * std**2 + sigma**2
    a = torch.full((1, n, 1), 0.5, requires_grad=True)  # a policy of free parameters: its gradient is Eq. 15 per sample
    eps, grad = torch.randn(1, n, 1), {}
    for baseline in (True, False):
        loss = srpo_actor.actor_loss(
            lambda s: a, lambda s, a: 0 * a[..., 0], gaussian(m, std), None, torch.full((1, n, 1), t), eps, 0.05,
            srpo_actor.WEIGHTS["one"], baseline, "none",
        )[0]  # fmt: skip
        grad[baseline] = n * torch.autograd.grad(loss.sum(), a)[0]
    mean = sigma * alpha * (0.5 - m) / variance
    with_baseline, without = -(alpha**2) * std**2 / variance, sigma**2 / variance  # coefficients of eps
    torch.testing.assert_close(grad[True], mean + with_baseline * eps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad[False], mean + without * eps, rtol=1e-12, atol=1e-12)
    assert (grad[True].std() < grad[False].std()) == helps


@pytest.mark.parametrize("baseline, tolerance", [(True, 0.02), (False, 0.002)])
def test_training_reaches_the_optimum_of_eq14(baseline, tolerance):
    """Q = -k/2 (a - a_best)^2, behaviour N(m, std^2): the optimum weighs a_best by beta k and m by alpha^2 / v."""
    m, std, k, a_best, beta, t = -0.3, 0.5, 40.0, 0.6, 0.05, 0.02
    args = SimpleNamespace(weight=f"t={t}", baseline=baseline, q_grad_norm="none", lr=0.01, steps=600, beta=[beta])
    policy = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1), nn.Tanh())
    optimizer = torch.optim.Adam(policy.parameters(), lr=torch.tensor(args.lr))

    def q(s, a):
        return (-k / 2 * (a - a_best) ** 2).squeeze(-1)[:, None].expand(-1, 2, -1)

    def draw():
        s = torch.randn(1, 256, 2)
        return s, *srpo_actor.sample_noise((1, 256, 1), t, t, "cpu")

    rest = torch.full((1, 1, 1), beta), draw, torch.zeros(3, 1), torch.zeros(())
    update = srpo_actor.make_update(args, policy, q, gaussian(m, std), optimizer, *rest)
    for _ in range(args.steps):
        update()
    alpha, sigma = (x.item() for x in srpo_actor.alpha_sigma(torch.tensor(t)))
    c = alpha**2 / (alpha**2 * std**2 + sigma**2)
    optimum = (beta * k * a_best + c * m) / (beta * k + c)
    assert policy(torch.randn(1, 1000, 2)).mean().item() == pytest.approx(optimum, abs=tolerance)


def actor_gradient(q, beta, q_grad_norm, dims=3):
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(1, 7, dims, generator=generator).requires_grad_()
    eps, t = torch.randn(1, 7, dims, generator=generator), torch.rand(1, 7, 1, generator=generator)
    loss, _, norm = srpo_actor.actor_loss(
        lambda s: a, q, gaussian(0.1, 0.5), None, t, eps, beta, srpo_actor.WEIGHTS["sigma2"], True, q_grad_norm
    )
    return torch.autograd.grad(loss.sum(), a)[0], norm


def test_l2_equals_rms_with_beta_times_sqrt_of_the_action_dimensions():
    def q(s, a):
        return (3 * a**2).sum(dim=-1)

    rms, norm = actor_gradient(q, 0.05, "rms")
    l2, _ = actor_gradient(q, 0.05 * 3**0.5, "l2")
    torch.testing.assert_close(l2, rms, rtol=1e-6, atol=0)
    assert not torch.allclose(rms, actor_gradient(q, 0.05, "none")[0], rtol=1e-3)
    a = torch.rand(1, 7, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm, 6 * (a**2).sum(dim=-1, keepdim=True).sqrt())


@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_a_flat_q_gives_a_finite_gradient(norm):
    gradient, _ = actor_gradient(lambda s, a: 0 * a.sum(dim=-1), 0.05, norm)
    torch.testing.assert_close(gradient, actor_gradient(lambda s, a: 0 * a.sum(dim=-1), 0.05, "none")[0])


def test_learning_rate_follows_torch_cosine_schedule():
    policy, args = nn.Linear(2, 1), SimpleNamespace(weight="one", baseline=True, q_grad_norm="none", lr=0.3, steps=20)
    args.beta = [0.1]
    reference = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(reference, T_max=args.steps)

    def q(s, a):
        return 0 * a.squeeze(-1)[:, None].expand(-1, 2, -1)

    noise = torch.randn(1, 4, 2), torch.full((1, 4, 1), 0.5), torch.randn(1, 4, 1)
    rest = torch.full((1, 1, 1), 0.1), lambda: noise, torch.zeros(3, 1)
    for start in (0, 10):  # from the beginning, and resumed at step 10
        optimizer = torch.optim.Adam(policy.parameters(), lr=torch.tensor(args.lr))
        update = srpo_actor.make_update(args, policy, q, gaussian(0, 1), optimizer, *rest, torch.tensor(float(start)))
        for _ in range(10):
            update()
            assert optimizer.param_groups[0]["lr"].item() == pytest.approx(reference.param_groups[0]["lr"], abs=1e-12)
            reference.step()
            schedule.step()
