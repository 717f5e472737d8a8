"""The leading replica axis: R networks in one are R networks, each drawn and trained as if it were alone."""

import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, run_here
from torch import nn

import srpo_actor
import srpo_behavior
import srpo_critic

S, A, B = 4, 2, 8


def policy(R, hidden_layers=2):
    return srpo_actor.mlp([S] + [256] * hidden_layers + [A], R).append(nn.Tanh())


def twin_q(R):
    return srpo_actor.mlp([A + S, 256, 256, 1], 2 * R)


def behavior_model(R, module=srpo_behavior):
    return module.BehaviorModel(S, A, R, "eps")


@pytest.fixture
def double():
    """Float64: Adam's first step divides each gradient by its size, which enlarges the rounding of tiny ones."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


BUILD = {"critic": lambda R: srpo_critic.Critic(S, A, R), "behavior": behavior_model, "actor": policy}


def replica(state, r, of):
    """Replica r's part of a state dict; networks of two heads have two entries per replica."""
    return {name: x.unflatten(0, (of, -1))[r] for name, x in state.items()}


def test_replicas_are_drawn_apart_and_as_nn_linear_draws():
    """Uniform within 1 / sqrt(n_in): mean, variance and extremes of many draws, which nn.Linear's share."""
    torch.manual_seed(0)
    layer, bound = srpo_actor.Linear(16, 4096, 3), 16**-0.5
    plain = nn.Linear(16, 4096)
    for ours, theirs in ((layer.weight, plain.weight), (layer.bias, plain.bias)):
        for x in (*ours, theirs):
            assert 0.99 * bound < x.abs().max() <= bound and abs(x.mean()) < 0.03 * bound
            assert x.var().item() == pytest.approx(bound**2 / 3, rel=0.05)
        assert not torch.equal(ours[0], ours[1]) and not torch.equal(ours[1], ours[2])


@pytest.mark.parametrize("stage", BUILD)
def test_the_same_seed_draws_the_same_networks(stage):
    states = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        states.append(BUILD[stage](2).state_dict())
    first = next(iter(states[0]))
    assert all(torch.equal(x, states[1][name]) for name, x in states[0].items())
    assert not torch.equal(states[0][first], states[2][first])
    assert not torch.equal(replica(states[0], 0, 2)[first], replica(states[0], 1, 2)[first])


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
    critic, s, a = BUILD["critic"](3), torch.randn(3, B, S), torch.randn(3, B, A)
    q, v, state = srpo_critic.twin_q(critic.q, s, a), critic.v(s), critic.state_dict()
    for r in range(3):
        torch.testing.assert_close(v[r], plain_mlp(replica(part(state, "v."), r, 3))(s[r]))
        heads = replica(part(state, "q."), r, 3)
        for head in range(2):
            net = plain_mlp(heads, head)
            torch.testing.assert_close(q[r, head], net(torch.cat([a[r], s[r]], dim=-1))[:, 0])


def test_policy_equals_a_plain_network():
    net, s = policy(3, hidden_layers=4), torch.randn(3, B, S)
    for r in range(3):
        torch.testing.assert_close(net(s)[r], torch.tanh(plain_mlp(replica(net.state_dict(), r, 3))(s[r])))


@pytest.mark.parametrize("module", [srpo_behavior, srpo_actor])
def test_behavior_model_equals_a_plain_network(module):
    model = behavior_model(3, module).eval()
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


def test_the_mode_of_the_behavior_model_switches_its_dropout():
    model = behavior_model(1)
    x = torch.randn(1, B, A), torch.randn(1, B, S), torch.rand(1, B, 1)
    assert not torch.equal(model.train()(*x), model(*x))
    assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == [0.1] * 3
    assert torch.equal(model.eval()(*x), model(*x))


# ---- one update of R replicas, by each stage's own make_update


def critic_update(net, R, draw):
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=1e-3)
    args = SimpleNamespace(compile=False, gamma=0.99, expectile=0.7, tau=0.005, lr_decay=False)
    return srpo_critic.make_update(args, net, optimizer, draw, torch.zeros(5, R), 0)


def behavior_update(net, R, draw):
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.01)
    args = SimpleNamespace(compile=False, lr_decay=False, amp=False)
    return srpo_behavior.make_update(args, net.eval(), optimizer, draw, torch.zeros(1, R), 0)


def actor_update(net, R, draw, betas=(0.05,), frozen=None):
    """frozen: the state dictionaries of target Qs and behaviour model, for R / len(betas) seeds."""
    nets = twin_q(R // len(betas)), behavior_model(R // len(betas), srpo_actor).eval()
    for network, state in zip(nets, frozen or [n.state_dict() for n in nets]):
        network.requires_grad_(False).load_state_dict(state)
    optimizer = torch.optim.Adam(net.parameters(), lr=torch.tensor(1e-3))
    args = SimpleNamespace(
        compile=False, weight="sigma2", baseline=True, q_grad_norm="rms", lr=1e-3, steps=10, beta=betas, amp=False
    )
    beta = torch.tensor(betas).repeat(R // len(betas)).view(-1, 1, 1)
    return srpo_actor.make_update(args, net, *nets, optimizer, beta, draw, torch.zeros(3, R), 0)


def frozen_networks(seeds):
    torch.manual_seed(5)
    return twin_q(seeds).state_dict(), behavior_model(seeds, srpo_actor).state_dict()


def pick(state, r, of):
    """replica(), with the leading axis kept."""
    return {name: x.unflatten(0, (of, -1))[r] for name, x in state.items()}


UPDATE = {"critic": critic_update, "behavior": behavior_update, "actor": actor_update}


def batch(stage, R):
    s, a, t = torch.randn(R, B, S), torch.randn(R, B, A), torch.rand(R, B, 1)
    if stage == "critic":
        return s, a, torch.randn(R, B, 1), torch.randn(R, B, S), (torch.rand(R, B, 1) > 0.5).float()
    return (s, a, t, torch.randn(R, B, A)) if stage == "behavior" else (s, t, torch.randn(R, B, A))


@pytest.mark.parametrize("stage", BUILD)
def test_two_replicas_alike_take_the_same_step(stage):
    net = BUILD[stage](2)
    alike = {name: x.unflatten(0, (2, -1))[[0, 0]].flatten(0, 1) for name, x in net.state_dict().items()}
    net.load_state_dict(alike)
    before = {name: x.clone() for name, x in net.state_dict().items()}
    data = tuple(x.repeat(2, *[1] * (x.ndim - 1)) for x in batch(stage, 1))
    frozen = [{n: x.repeat(2, *[1] * (x.ndim - 1)) for n, x in state.items()} for state in frozen_networks(1)]
    update = UPDATE[stage](net, 2, lambda: data, **({"frozen": frozen} if stage == "actor" else {}))
    for _ in range(3):
        update()
    state = net.state_dict()
    for name in state:
        torch.testing.assert_close(replica(state, 0, 2)[name], replica(state, 1, 2)[name], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(x, before[name]) for name, x in state.items())


@pytest.mark.parametrize("stage", BUILD)
def test_a_replica_steps_as_it_would_alone(stage, double):
    """What one replica sees does not touch the others: replica 1 of three against a run of its own."""
    together, alone, data = BUILD[stage](3), BUILD[stage](1), batch(stage, 3)
    alone.load_state_dict(pick(together.state_dict(), 1, 3))
    three, one = {}, {}
    if stage == "actor":
        three = {"frozen": frozen_networks(3)}
        one = {"frozen": [pick(state, 1, 3) for state in three["frozen"]]}
    UPDATE[stage](together, 3, lambda: data, **three)()
    UPDATE[stage](alone, 1, lambda: [x[1:2] for x in data], **one)()
    for name, x in alone.state_dict().items():
        torch.testing.assert_close(pick(together.state_dict(), 1, 3)[name], x, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("stage", BUILD)
def test_one_replica_s_loss_has_no_gradient_on_another_s_parameters(stage):
    net, data = BUILD[stage](2), batch(stage, 2)
    if stage == "critic":
        v_loss, q_loss, _, _ = srpo_critic.critic_loss(net, *data, 0.99, 0.7)
        loss = v_loss + q_loss
    elif stage == "behavior":
        loss = srpo_behavior.behavior_loss(net, *data)[1]
    else:
        q = lambda s, a: a.sum(dim=-1)  # noqa: E731
        loss = srpo_actor.actor_loss(net, q, lambda a, s, t: a, *data, 0.1, "one", True, "none")[0]
    loss[0].backward()
    grads = {name: p.grad.unflatten(0, (2, -1)) for name, p in net.named_parameters() if p.requires_grad}
    assert all((grad[1] == 0).all() for grad in grads.values())
    assert all((grad[0] != 0).any() for grad in grads.values())


def test_the_grid_of_seeds_and_betas_equals_separate_runs(double):
    """Replica s K + k is the policy of seed s and beta k, on seed s's frozen networks."""
    betas, frozen = (0.01, 0.5), frozen_networks(3)
    grid, data = policy(6), batch("actor", 6)
    start = {name: x.clone() for name, x in grid.state_dict().items()}
    actor_update(grid, 6, lambda: data, betas, frozen)()
    for s in range(3):
        for k, beta in enumerate(betas):
            r, alone = s * 2 + k, policy(1)
            alone.load_state_dict({name: x[r : r + 1] for name, x in start.items()})
            own = [pick(state, s, 3) for state in frozen]
            actor_update(alone, 1, lambda r=r: [x[r : r + 1] for x in data], (beta,), own)()
            for name, x in alone.state_dict().items():
                torch.testing.assert_close(grid.state_dict()[name][r], x[0], rtol=1e-4, atol=1e-8)


def test_select_picks_seeds_in_the_order_asked():
    for net, prefix in ((BUILD["critic"](3), "q_target."), (BUILD["behavior"](3), "")):
        state = net.state_dict()
        chosen = srpo_actor.select({"seeds": [3, 5, 8], "weights": state}, [8, 3], prefix)
        assert set(chosen) == {name.removeprefix(prefix) for name in state if name.startswith(prefix)}
        for name, x in chosen.items():
            both = [pick(state, r, 3)[prefix + name] for r in (2, 0)]
            assert torch.equal(x, torch.cat(both))


# ---- what the main parts draw


def drawn(stage, *flags):
    """A draw of 256 of 200 transitions for 3 replicas, after a short run of the script, and its rows' numbers."""
    names = run_here(f"srpo_{stage}.py", *TINY, "--batch-size", 256, "--steps", 1, *flags)
    data, batch = names.get("data"), names["draw"]()
    obs = names["obs"] if stage == "actor" else data[:, :3]
    same = (obs == batch[0].flatten(0, 1)[:, None]).all(dim=-1)
    assert len(obs) == 200 and (same.sum(dim=1) == 1).all()  # each state is one of the data
    index = same.int().argmax(dim=1).view(3, 256)
    for one in index:  # from all of the data, with replacement: 144 different rows are expected
        assert 110 < len(one.unique()) < 170 and one.min() < 10 and one.max() > 189
    assert all(not torch.equal(x, y) for x, y in itertools.combinations(index, 2))
    return data, batch, index


def check_noise(t, eps):
    """Each transition has a time and a noise of its own."""
    assert t.shape == eps.shape == (3, 256, 1) and len(t.unique()) > 700 and len(eps.unique()) > 700
    assert abs(t.mean() - 0.5) < 0.05 and abs(t.std() - 12**-0.5) < 0.03
    assert abs(eps.mean()) < 0.15 and abs(eps.std() - 1) < 0.1


def test_minibatches_are_rows_of_the_data_and_differ_between_replicas(trained):
    data, batch, index = drawn("critic", "--num-seeds", 3)
    assert [x.shape for x in batch] == [(3, 256, n) for n in (3, 1, 1, 3, 1)]  # s, a, r, s_next, terminal
    assert torch.equal(torch.cat(batch, dim=-1), data[index])

    data, (s, a, t, eps), index = drawn("behavior", "--num-seeds", 3)
    assert torch.equal(torch.cat([s, a], dim=-1), data[index, :4])
    check_noise(t, eps)

    flags = "--eval-every", 0, "--critic", trained / "critic.pt", "--behavior", trained / "behavior.pt"
    flags += "--seed", 1, "--beta", 0.1, 0.2, 0.3
    check_noise(*drawn("actor", *flags)[1][1:])
    assert (drawn("actor", *flags, "--t-range", 0.3, 0.3)[1][1] == 0.3).all()
