"""The losses against closed forms, in float64, through the functions that train."""

import math
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
    return SimpleNamespace(q=lambda x: q, q_target=lambda x: q_target, v=v)


@pytest.mark.parametrize("expectile", [0.5, 0.7, 0.9])
def test_v_loss_is_least_at_the_sample_expectile(expectile):
    x = torch.randn(1, 500) ** 3  # what V must summarise: the smaller of the two target Qs
    low, high = x.min(), x.max()
    for _ in range(200):  # the expectile m balances expectile * E(x - m)+ and (1 - expectile) * E(m - x)+
        m = (low + high) / 2
        balance = expectile * (x - m).clamp(min=0).sum() - (1 - expectile) * (m - x).clamp(min=0).sum()
        low, high = (m, high) if balance > 0 else (low, m)
    v = torch.zeros(1, requires_grad=True)
    s, zeros, none = torch.zeros(1, 500, 2), torch.zeros(1, 500), torch.zeros(1, 500, 1)
    critic = stub_critic(
        torch.stack([zeros, zeros], dim=1), torch.stack([x + 1, x], dim=1), lambda s: v.expand(1, 500, 1)
    )
    optimizer = torch.optim.LBFGS([v], lr=0.5, max_iter=500, tolerance_grad=1e-14, tolerance_change=0)

    def closure():
        optimizer.zero_grad()
        loss = srpo_critic.critic_loss(critic, s, s, none, s, none, 0.99, expectile)[0].sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert v.item() == pytest.approx(m.item(), abs=1e-8)


def test_time_outs_bootstrap_and_terminations_do_not():
    r, terminal = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[[0.0], [1.0]]])
    q = torch.tensor([[[3.0, 5.0], [4.0, 7.0]]])
    critic = stub_critic(q, q, lambda s: s[..., :1])
    s_next = torch.tensor([[[10.0], [20.0]]])
    q_loss = srpo_critic.critic_loss(critic, s_next, s_next, r, s_next, terminal, 0.9, 0.7)[1]
    backup = torch.tensor([1 + 0.9 * 10, 2.0])
    assert q_loss.item() == pytest.approx(((q[0] - backup) ** 2).mean().item(), rel=1e-14)


def test_polyak_step():
    critic = srpo_critic.Critic(3, 2, 1)
    critic.q_target.load_state_dict(srpo_critic.Critic(3, 2, 1).q.state_dict())
    before = [p.clone() for p in critic.q_target.parameters()]
    optimizer = torch.optim.Adam([p for p in critic.parameters() if p.requires_grad], lr=0.1)
    batch = [torch.randn(1, 8, n) for n in (3, 2, 1, 3)] + [torch.zeros(1, 8, 1)]
    args = srpo_critic.Args(env="", expectile=0.7)
    srpo_critic.make_update(args, critic, optimizer, lambda: batch, torch.zeros(5, 1), 0)()
    for old, new, online in zip(before, critic.q_target.parameters(), critic.q.parameters()):
        torch.testing.assert_close(new, old + 0.005 * (online - old), rtol=1e-12, atol=1e-14)


# ---- behaviour model


def posterior(a_t, t, m, std):
    """Given a_t, what to expect of the noise and of the action behind it, for actions N(m, std^2)."""
    alpha, sigma = srpo_behavior.alpha_sigma(t)
    way = (a_t - alpha * m) / (alpha**2 * std**2 + sigma**2)
    return sigma * way, m + alpha * std**2 * way


def best_output(predict, a_t, t, m, std):
    """What the best network of a kind puts out for actions N(m, std^2)."""
    alpha, sigma = srpo_behavior.alpha_sigma(t)
    noise, action = posterior(a_t, t, m, std)
    return noise if predict == "eps" else alpha * noise - sigma * action


def model_with(module, predict, output):
    """The real model, but for its last layer's output, which is output(a_t, t)."""
    model, seen = module.BehaviorModel(2, 1, 1, predict), []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))
    model.last.register_forward_hook(lambda *_: output(seen[-1][0], seen[-1][2]))
    return model


@pytest.mark.parametrize("predict", ["eps", "v"])
@pytest.mark.parametrize("module", [srpo_behavior, srpo_actor])
def test_the_best_network_of_either_kind_gives_the_expected_noise(module, predict):
    m, std, t = 0.3, 0.5, torch.linspace(0.001, 1, 50).view(1, -1, 1)
    a_t = 2 * torch.randn_like(t)
    model = model_with(module, predict, lambda a_t, t: best_output(predict, a_t, t, m, std))
    expected = posterior(a_t, t, m, std)[0]
    torch.testing.assert_close(model(a_t, torch.randn(1, 50, 2), t), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("predict", ["eps", "v"])
@pytest.mark.parametrize("t", [0.02, 0.4, 1.0])
def test_behavior_loss_is_least_at_the_best_network(t, predict):
    """There its gradient vanishes, and its value is the variance of what is predicted, given a_t."""
    m, std, t = 0.3, 0.5, torch.full((1, 400, 1), t)
    x = torch.randn(2, 20)
    x = (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, correction=0, keepdim=True)
    a, eps = torch.cartesian_prod(*x)[None].split(1, dim=-1)  # all pairs: means 0, covariance I, exactly
    change = torch.zeros(2, requires_grad=True)

    def output(a_t, t):
        return best_output(predict, a_t, t, m, std) + change[0] + change[1] * a_t

    model = model_with(srpo_behavior, predict, output)
    loss, minimised = srpo_behavior.behavior_loss(model, torch.randn(1, 400, 2), m + std * a, t, eps)
    minimised.sum().backward()
    alpha, sigma = (x[0, 0].item() for x in srpo_behavior.alpha_sigma(t))
    variance = std**2 / (alpha**2 * std**2 + sigma**2)  # of v given a_t
    assert loss.item() == pytest.approx(alpha**2 * variance, rel=1e-9)
    assert minimised.item() == pytest.approx(variance * (alpha if predict == "eps" else sigma) ** 2, rel=1e-9)
    assert change.grad.abs().max() < 1e-9


def test_what_is_minimised_is_the_error_of_eps_or_of_the_action():
    """For v |a_psi - a|^2, where a_psi is the action that v_psi stands for; for eps Eq. 13 itself."""
    for t in torch.linspace(0.001, 1, 30).tolist():
        s, a, eps, t = torch.randn(2, 5, 3), torch.randn(2, 5, 2), torch.randn(2, 5, 2), torch.full((2, 5, 1), t)
        alpha, sigma = srpo_behavior.alpha_sigma(t)
        for predict, true in {"eps": eps, "v": a}.items():
            model, outputs = srpo_behavior.BehaviorModel(3, 2, 2, predict), []
            model.last.register_forward_hook(lambda *args, outputs=outputs: outputs.append(args[2].detach()))
            loss, minimised = srpo_behavior.behavior_loss(model, s, a, t, eps)
            if predict == "eps":
                assert torch.equal(loss, minimised)
                predicted = outputs[0]
            else:  # the rotation (a, eps) -> (a_t, v) turned back
                predicted = alpha * (alpha * a + sigma * eps) - sigma * outputs[0]
            direct = ((predicted - true) ** 2).sum(dim=-1).mean(dim=-1)
            torch.testing.assert_close(minimised, direct, rtol=1e-10, atol=0)
            snr = (alpha[0, 0] / sigma[0, 0]) ** 2 if predict == "v" else 1
            torch.testing.assert_close(loss, snr * direct, rtol=1e-8, atol=0)


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
    loss, _, _ = srpo_actor.actor_loss(policy, q, gaussian(m, std), s, t, eps, beta, weight, baseline, "none")
    ours = torch.autograd.grad(loss.sum(), list(policy.parameters()))

    alpha, sigma = srpo_actor.alpha_sigma(t)
    a = policy(s)
    variance = alpha**2 * std**2 + sigma**2
    kl = 0.5 * (sigma**2 / variance + alpha**2 * (a - m) ** 2 / variance - 1 + (variance / sigma**2).log())
    w = {"sigma2": sigma**2, "one": 1, "alpha_over_sigma": alpha / sigma}[weight]
    eq14 = q(s, a).mean() - (w * sigma / alpha * kl).sum(dim=-1).mean() / beta
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
            "one", baseline, "none",
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
    args = SimpleNamespace(compile=False, lr=0.01, steps=600, beta=[beta], baseline=baseline, q_grad_norm="none")
    args.weight, args.amp = "alpha_over_sigma", False
    policy = nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1), nn.Tanh())
    optimizer = torch.optim.Adam(policy.parameters(), lr=torch.tensor(args.lr))

    def q(x):  # [2R, B, A + S], both heads alike
        return -k / 2 * (x[..., :1] - a_best) ** 2

    def draw():
        return torch.randn(1, 256, 2), torch.full((1, 256, 1), t), torch.randn(1, 256, 1)

    rest = torch.full((1, 1, 1), beta), draw, torch.zeros(3, 1), 0
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
        lambda s: a, q, gaussian(0.1, 0.5), None, t, eps, beta, "sigma2", True, q_grad_norm
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


# ---- all stages


@pytest.mark.parametrize("start", [0, 14])
@pytest.mark.parametrize("decay", [True, False])
@pytest.mark.parametrize("stage", ["critic", "behavior", "actor"])
def test_steps_follow_the_cosine(stage, decay, start):
    """Each step takes the rate of its number, also where a run goes on; the actor's rate decays always."""
    args = SimpleNamespace(
        compile=False, lr=0.01, steps=20, lr_decay=decay, gamma=0.99, expectile=0.7, tau=0.005, beta=[0.1]
    )
    args.weight, args.baseline, args.q_grad_norm, args.amp = "sigma2", True, "none", False
    s, a, t, r = torch.randn(1, 4, 3), torch.randn(1, 4, 2), torch.rand(1, 4, 1), torch.randn(1, 4, 1)
    if stage == "critic":
        module, net = srpo_critic, srpo_critic.Critic(3, 2, 1)
        between, batch = (), (s, a, r, s, 0 * r)
    elif stage == "behavior":
        module, net = srpo_behavior, srpo_behavior.BehaviorModel(3, 2, 1, "eps")
        between, batch = (), (s, a, t, torch.randn_like(a))
    else:
        module, net = srpo_actor, srpo_actor.mlp([3, 8, 2], 1)
        between, batch = (srpo_actor.mlp([5, 8, 1], 2), gaussian(0, 1)), (s, t, torch.randn_like(a))
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=torch.tensor(args.lr))  # its steps show the rate
    beta = (torch.full((1, 1, 1), 0.1),) if stage == "actor" else ()
    window = torch.zeros(len(module.METRICS), 1)
    update = module.make_update(args, net, *between, optimizer, *beta, lambda: batch, window, start)
    for step in range(start, start + 6):
        before = [p.detach().clone() for p in trained]
        update()
        constant = stage != "actor" and not decay
        rate = 0.01 if constant else 0.01 * (1 + math.cos(math.pi * step / 20)) / 2
        assert optimizer.param_groups[0]["lr"].item() == pytest.approx(rate, rel=1e-12)
        for old, p in zip(before, trained):
            torch.testing.assert_close(p.detach(), old - rate * p.grad, rtol=1e-12, atol=1e-14)
