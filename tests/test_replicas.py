"""The leading replica axis: R networks in one are R networks, each drawn and trained as if it were alone."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import srpo_actor
import srpo_behavior
import srpo_critic

S, A, B = 4, 2, 8


def generators(seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def policy(seeds, hidden_layers=2):
    return srpo_actor.mlp([S] + [256] * hidden_layers + [A], generators(seeds)).append(nn.Tanh())


BUILD = {
    "critic": lambda seeds: srpo_critic.Critic(S, A, generators(seeds)),
    "behavior": lambda seeds: srpo_behavior.BehaviorModel(S, A, generators(seeds)),
    "actor": policy,
}


def replica(state, r, of):
    """Replica r's part of a state dict; networks of two heads have two entries per replica."""
    return {name: x.unflatten(0, (of, -1))[r] for name, x in state.items()}


@pytest.mark.parametrize("stage", BUILD)
def test_seed_k_starts_alike_alone_and_among_six(stage):
    together = BUILD[stage](range(6)).state_dict()
    for k in range(6):
        alone = BUILD[stage]([k]).state_dict()
        assert all(torch.equal(x, replica(together, k, 6)[name]) for name, x in alone.items())
    first = next(iter(together))
    assert not torch.equal(replica(together, 0, 6)[first], replica(together, 1, 6)[first])


def test_linear_draws_as_nn_linear_draws():
    torch.manual_seed(3)
    plain = nn.Sequential(nn.Linear(S, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, A))
    for ours, theirs in zip(policy([3]).parameters(), plain.parameters()):
        torch.testing.assert_close(ours[0].T if ours.shape[1] > 1 else ours[0, 0], theirs, rtol=1e-6, atol=1e-7)


def to_plain(weight, bias):
    """One replica's weight [in, out] and bias [1, out] as an nn.Linear."""
    layer = nn.Linear(*weight.shape, dtype=weight.dtype)
    layer.load_state_dict({"weight": weight.T, "bias": bias[0]})
    return layer


def plain_mlp(state, head=0):
    """One replica's network, or one of its heads, of plain layers."""
    tensors = [x[head] for x in state.values()]
    layers = [module for w, b in zip(tensors[::2], tensors[1::2]) for module in (to_plain(w, b), nn.ReLU())]
    return nn.Sequential(*layers[:-1])


def part(state, prefix):
    return {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}


def test_critic_equals_plain_networks():
    critic, s, a = BUILD["critic"](range(3)), torch.randn(3, B, S), torch.randn(3, B, A)
    q, v, state = critic.q(s, a), critic.v(s), critic.state_dict()
    for r in range(3):
        torch.testing.assert_close(v[r], plain_mlp(replica(part(state, "v."), r, 3))(s[r]))
        heads = replica(part(state, "q.net."), r, 3)
        for head in range(2):
            net = plain_mlp(heads, head)
            torch.testing.assert_close(q[r, head], net(torch.cat([a[r], s[r]], dim=-1))[:, 0])


def test_policy_equals_a_plain_network():
    net, s = policy(range(3), hidden_layers=4), torch.randn(3, B, S)
    for r in range(3):
        torch.testing.assert_close(net(s)[r], torch.tanh(plain_mlp(replica(net.state_dict(), r, 3))(s[r])))


@pytest.mark.parametrize("module", [srpo_behavior, srpo_actor])
def test_behavior_model_equals_a_plain_network(module):
    model = module.BehaviorModel(S, A, generators(range(3))).eval()
    for parameter in model.parameters():  # also LayerNorm's scales and shifts, which start as ones and zeros
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model = model.double()  # the frequencies amplify float32's rounding of t
    a_t, s, t = torch.randn(3, B, A).double(), torch.randn(3, B, S).double(), torch.rand(3, B, 1).double()
    out = model(a_t, s, t)
    for r in range(3):
        w = {name: x[r] for name, x in model.state_dict().items()}

        def linear(name, w=w):
            return to_plain(w[f"{name}.weight"], w[f"{name}.bias"])

        phase = 2 * torch.pi * t[r] @ w["W"]
        time = linear("time.2")(F.mish(linear("time.0")(torch.cat([phase.sin(), phase.cos()], dim=-1))))
        x = linear("first")(torch.cat([a_t[r], s[r], time], dim=-1))
        for i in range(3):
            norm = nn.LayerNorm(256).double()
            norm.load_state_dict({"weight": w[f"blocks.{i}.1.weight"][0], "bias": w[f"blocks.{i}.1.bias"][0]})
            block = nn.Sequential(
                nn.Dropout(0.1).eval(), norm, linear(f"blocks.{i}.2"), nn.Mish(), linear(f"blocks.{i}.4")
            )
            x = x + block(x)
        torch.testing.assert_close(out[r], linear("last")(F.mish(x)), rtol=1e-10, atol=1e-10)


def test_dropout_is_on_while_the_behavior_model_trains():
    model = srpo_behavior.BehaviorModel(S, A, generators([0]))
    x = torch.randn(1, B, A), torch.randn(1, B, S), torch.rand(1, B, 1)
    assert not torch.equal(model(*x), model(*x))
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.1] * 3


# ---- one update of R replicas, by each stage's own make_update


def critic_update(net, R, draw):
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    args = SimpleNamespace(gamma=0.99, expectile=0.7, tau=0.005)
    return srpo_critic.make_update(args, net, optimizer, draw, torch.zeros(5, R))


def behavior_update(net, R, draw):
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
    return srpo_behavior.make_update(None, net.eval(), optimizer, draw, torch.zeros(1, R))


def actor_update(net, R, draw, seeds=None, betas=None):
    seeds, betas = seeds or [0] * R, betas or [0.05]
    q = srpo_actor.TwinQ(S, A, generators(seeds)).requires_grad_(False)
    behavior = srpo_actor.BehaviorModel(S, A, generators(seeds)).requires_grad_(False).eval()
    optimizer = torch.optim.Adam(net.parameters(), lr=torch.tensor(1e-3))
    args = SimpleNamespace(weight="sigma2", baseline=True, q_grad_norm="rms", lr=1e-3, steps=10, beta=betas)
    beta = torch.tensor([b for _ in seeds for b in betas]).view(-1, 1, 1)
    return srpo_actor.make_update(args, net, q, behavior, optimizer, beta, draw, torch.zeros(3, R), torch.zeros(()))


UPDATE = {"critic": critic_update, "behavior": behavior_update, "actor": actor_update}


def batch(stage, R):
    s, a, t = torch.randn(R, B, S), torch.randn(R, B, A), torch.rand(R, B, 1)
    if stage == "critic":
        return s, a, torch.randn(R, B), torch.randn(R, B, S), (torch.rand(R, B) > 0.5).float()
    return (s, a, t, torch.randn(R, B, A)) if stage == "behavior" else (s, t, torch.randn(R, B, A))


@pytest.mark.parametrize("stage", BUILD)
def test_two_replicas_alike_take_the_same_step(stage):
    net = BUILD[stage]([7, 7])
    data = tuple(x.repeat(2, *[1] * (x.ndim - 1)) for x in batch(stage, 1))
    before = {name: x.clone() for name, x in net.state_dict().items()}
    update = UPDATE[stage](net, 2, lambda: data)
    for _ in range(3):
        update()
    state = net.state_dict()
    for name in state:
        torch.testing.assert_close(replica(state, 0, 2)[name], replica(state, 1, 2)[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(x, before[name]) for name, x in state.items())


@pytest.mark.parametrize("stage", BUILD)
def test_a_replica_steps_as_it_would_alone(stage):
    """What one replica sees does not touch the others: replica 1 of three against a run of its own."""
    together, alone, data = BUILD[stage]([0, 1, 2]), BUILD[stage]([1]), batch(stage, 3)
    kwargs = [{"seeds": [0, 1, 2]}, {"seeds": [1]}] if stage == "actor" else [{}, {}]
    UPDATE[stage](together, 3, lambda: data, **kwargs[0])()
    UPDATE[stage](alone, 1, lambda: [x[1:2] for x in data], **kwargs[1])()
    for name, x in alone.state_dict().items():
        torch.testing.assert_close(
            replica(together.state_dict(), 1, 3)[name], x.unflatten(0, (1, -1))[0], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("stage", BUILD)
def test_one_replica_s_loss_has_no_gradient_on_another_s_parameters(stage):
    net, data = BUILD[stage]([0, 1]), batch(stage, 2)
    if stage == "critic":
        v_loss, q_loss, _, _ = srpo_critic.critic_loss(net, *data, 0.99, 0.7)
        loss = v_loss + q_loss
    elif stage == "behavior":
        loss = srpo_behavior.behavior_loss(net, *data)
    else:
        q, w = (lambda s, a: a.sum(dim=-1)), srpo_actor.WEIGHTS["one"]
        loss = srpo_actor.actor_loss(net, q, lambda a, s, t: a, *data, 0.1, w, True, "none")[0]
    loss[0].backward()
    grads = {name: p.grad.unflatten(0, (2, -1)) for name, p in net.named_parameters() if p.requires_grad}
    assert all((grad[1] == 0).all() for grad in grads.values())
    assert all((grad[0] != 0).any() for grad in grads.values())


def test_the_grid_of_seeds_and_betas_equals_separate_runs():
    """Replica s K + k is the policy of seed s and beta k, on seed s's frozen networks."""
    seeds, betas = [0, 1, 2], [0.01, 0.5]
    grid, data = policy([seed for seed in seeds for _ in betas]), batch("actor", 6)
    actor_update(grid, 6, lambda: data, seeds, betas)()
    for i, seed in enumerate(seeds):
        for k, beta in enumerate(betas):
            r, alone = i * 2 + k, policy([seed])
            actor_update(alone, 1, lambda r=r: [x[r : r + 1] for x in data], [seed], [beta])()
            for name, x in alone.state_dict().items():
                torch.testing.assert_close(grid.state_dict()[name][r], x[0], rtol=1e-4, atol=1e-6)


def test_select_picks_seeds_in_the_order_asked():
    for build, prefix in ((BUILD["critic"], "q_target."), (BUILD["behavior"], "")):
        part_of = srpo_actor.select(build([3, 5, 8]).state_dict(), [3, 5, 8], [8, 3], prefix)
        want = part(build([8, 3]).state_dict(), prefix)
        assert part_of.keys() == want.keys()
        assert all(torch.equal(part_of[name], x) for name, x in want.items())


def test_minibatches_are_rows_of_the_data_and_differ_between_replicas():
    rows = torch.arange(1000.0)
    torch.manual_seed(0)
    x, y = srpo_critic.sample({"x": rows, "y": torch.stack([rows, -rows], dim=1)}, 3, 256)
    assert x.shape == (3, 256) and torch.equal(y, torch.stack([x, -x], dim=-1))
    assert not torch.equal(x[0], x[1]) and x.min() < 20 and x.max() > 980


def test_times_are_uniform_in_their_range():
    torch.manual_seed(0)
    t, eps = srpo_behavior.sample_noise((2, 50_000, 3), 0.02, 0.98, "cpu")
    assert t.shape == (2, 50_000, 1) and eps.shape == (2, 50_000, 3)
    assert 0.02 <= t.min() < 0.021 and 0.979 < t.max() <= 0.98
    assert abs(t.mean() - 0.5) < 0.005 and abs(eps.mean()) < 0.01 and abs(eps.std() - 1) < 0.01
