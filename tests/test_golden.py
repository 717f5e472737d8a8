"""One update of each stage against golden.json: numbers that the authors' released code computed on networks and inputs
that a formula fills. Another file of the same form can be named in the environment variable GOLDEN."""

import copy
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import srpo_actor
import srpo_behavior
import srpo_critic

GOLDEN = json.loads(Path(os.environ.get("GOLDEN", Path(__file__).parent / "golden.json")).read_text())
C = GOLDEN["constants"]
S, A, B = C["state_dim"], C["action_dim"], C["batch"]


@pytest.fixture(autouse=True)
def constants(monkeypatch):
    for module in (srpo_behavior, srpo_actor):
        monkeypatch.setattr(module, "BETA_0", C["beta_0"])
        monkeypatch.setattr(module, "BETA_1", C["beta_1"])


def wave(shape, offset):
    """Computed in float64, then cast; what is made of it is computed in float32."""
    i = torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)
    return torch.sin(C["frequency"] * i * i.sqrt() + offset).float().reshape(shape)


def fill(shape, offset, name=""):
    """A tensor in nn.Linear's layout, by the rules of the golden numbers."""
    if len(shape) == 2:
        return C["gain"] / math.sqrt(shape[1]) * wave(shape, offset)
    if name.endswith(".W"):
        return C["fourier_scale"] * wave(shape, offset)
    if name.endswith("layer_norm.weight"):
        return 1 + 0.1 * wave(shape, offset)
    return 0.1 * wave(shape, offset)


def inputs():
    o = C["in"]
    d = {"s": wave((B, S), o["s"]), "a": 0.9 * wave((B, A), o["a"]), "r": wave((B, 1), o["r"])}
    d |= {"next_s": wave((B, S), o["s_"]), "done": (wave((B, 1), o["d"]) > 0.5).float()}
    d |= {"t": 0.5 + 0.48 * wave((B, 1), o["t"]), "z": 1.4 * wave((B, A), o["z"])}
    return {name: x[None] for name, x in d.items()}  # a replica axis of one


def put(parameter, values):
    """values: one tensor per replica in nn.Linear's layout."""
    values = torch.stack([v.T if v.ndim == 2 else v[None] for v in values])
    assert parameter.shape == values.shape
    parameter.data.copy_(values)


def signature(tensors):
    flat = torch.cat([x.reshape(-1) for x in tensors]).double()
    return flat.norm().item(), (flat @ wave(flat.shape, C["probe_offset"]).double()).item()


def linear_layout(tensors):
    """[R, ...] tensors of one network, as the golden tensors are: replica after replica, weights [out, in]."""
    weight = [t.shape[1] > 1 for t in tensors]
    return [t[r].T.contiguous() if w else t[r] for r in range(len(tensors[0])) for t, w in zip(tensors, weight)]


def check(tensors, want, norm_tolerance, projection_tolerance):
    norm, projection = signature(linear_layout([t.detach() for t in tensors]))
    assert norm == pytest.approx(want["norm"], rel=norm_tolerance)
    assert projection == pytest.approx(want["projection"], abs=projection_tolerance * want["norm"])


def check_grad(tensors, want):
    check([t.grad for t in tensors], want, 1e-4, 1e-4)


def check_step(tensors, before, want):
    check([t - b for t, b in zip(tensors, before)], want, 1e-3, 1e-2)


def clones(tensors):
    return [t.detach().clone() for t in tensors]


def golden_critic():
    """The critic with the golden weights."""
    critic = srpo_critic.Critic(S, A, 1)
    for net, name in ((critic.q, "q."), (critic.q_target, "q_target."), (critic.v, "v.")):
        values = [fill(t["shape"], t["offset"]) for t in GOLDEN["critic"]["tensors"] if t["tensor"].startswith(name)]
        parameters = list(net.parameters())
        for i, parameter in enumerate(parameters):
            put(parameter, values[i :: len(parameters)])  # both heads' i-th tensor
    return critic


def golden_behavior(module):
    """The behaviour model of one of the scripts with the golden weights."""
    model = module.BehaviorModel(S, A, 1, "eps").eval()
    tensors = {t["tensor"].removeprefix("behavior."): t for t in GOLDEN["behavior"]["tensors"]}
    values = {name: fill(t["shape"], t["offset"], name) for name, t in tensors.items()}
    put(model.W, [values["embed.0.W"]])
    ordered = [values[n] for part in ("cond_model", "main") for n in values if n.startswith(part)]
    first = [p for n, p in model.named_parameters() if n.startswith("time.")]
    rest = [p for n, p in model.named_parameters() if not n.startswith("time.")]
    for parameter, value in zip(first + rest, ordered, strict=True):
        put(parameter, [value])
    return model, rest + first  # the golden order: main, then cond_model


def test_inputs_are_rebuilt():
    ours = inputs()
    for name, values in GOLDEN["inputs"].items():
        x = ours[name][0]
        np.testing.assert_allclose(x.flatten()[: len(values)], values, rtol=1e-6)


@pytest.mark.parametrize("module", [srpo_behavior, srpo_actor])
def test_schedule(module):
    alpha, sigma = module.alpha_sigma(torch.tensor(GOLDEN["schedule"]["t"], dtype=torch.float64))
    np.testing.assert_allclose(alpha, GOLDEN["schedule"]["alpha"], rtol=1e-7)
    np.testing.assert_allclose(sigma, GOLDEN["schedule"]["sigma"], rtol=1e-7)


@pytest.mark.parametrize("domain", ["locomotion", "antmaze"])
def test_critic(domain):
    want, x, critic = GOLDEN["critic"][domain], inputs(), golden_critic()
    q, v, target = (list(net.parameters()) for net in (critic.q, critic.v, critic.q_target))
    before = clones(q), clones(v), clones(target)
    v_next = critic.v(x["next_s"]).mean().item()
    args = srpo_critic.Args(env="", expectile=want["expectile"])
    optimizer = torch.optim.Adam(q + v, lr=torch.tensor(args.lr), fused=True)
    window = torch.zeros(len(srpo_critic.METRICS), 1)
    batch = x["s"], x["a"], x["r"], x["next_s"], x["done"]
    srpo_critic.make_update(args, critic, optimizer, lambda: batch, window, 0)()

    metrics = dict(zip(srpo_critic.METRICS, window[:, 0].tolist()))
    assert metrics["losses/v_loss"] == pytest.approx(want["v_loss"], rel=1e-5)
    assert metrics["losses/q_loss"] == pytest.approx(want["q_loss"], rel=1e-5)
    assert metrics["values/q_mean"] == pytest.approx(want["q_target_min_mean"], rel=1e-5)
    assert v_next == pytest.approx(want["v_next_mean"], rel=1e-5)
    check_grad(q, want["grad_q"])
    check_grad(v, want["grad_v"])
    check_step(q, before[0], want["step_q"])
    check_step(v, before[1], want["step_v"])
    check_step(target, before[2], want["step_q_target"])


def test_behavior():
    want, x = GOLDEN["behavior"], inputs()
    model, parameters = golden_behavior(srpo_behavior)
    before = clones(parameters)
    args = srpo_behavior.Args(env="")
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(args.lr), weight_decay=0.01, fused=True)
    window = torch.zeros(1, 1)
    batch = x["s"], x["a"], x["t"], x["z"]
    srpo_behavior.make_update(args, model, optimizer, lambda: batch, window, 0)()
    assert window.item() == pytest.approx(want["loss"], rel=1e-5)
    check_grad(parameters, want["grad"])
    check_step(parameters, before, want["step"])


@pytest.mark.parametrize("want", GOLDEN["actor"]["variants"], ids=lambda v: "-".join(map(str, list(v.values())[:4])))
def test_actor(want):
    x = inputs()
    q_target = srpo_actor.mlp([A + S, 256, 256, 1], 2)
    q_target.load_state_dict(golden_critic().q_target.state_dict())
    behavior, _ = golden_behavior(srpo_actor)
    policy = srpo_actor.mlp([S] + [256] * want["hidden_layers"] + [A], 1).append(nn.Tanh())
    parameters = list(policy.parameters())
    for i, p in enumerate(parameters):
        shape = (p.shape[2], p.shape[1]) if i % 2 == 0 else p.shape[2:]
        put(p, [fill(shape, 101 + i)])
    before, action = clones(parameters), policy(x["s"])[0, 0].tolist()

    variant = {key: want[key] for key in ("weight", "baseline", "q_grad_norm")}
    args = srpo_actor.Args(env="", beta=(want["beta"],), **variant)
    optimizer = torch.optim.Adam(parameters, lr=torch.tensor(args.lr), fused=True)
    window = torch.zeros(len(srpo_actor.METRICS), 1)
    batch, beta = (x["s"], x["t"], x["z"]), torch.tensor(want["beta"]).view(1, 1, 1)
    frozen = copy.deepcopy([q_target.state_dict(), behavior.state_dict()])
    srpo_actor.make_update(args, policy, q_target, behavior, optimizer, beta, lambda: batch, window, 0)()

    metrics = dict(zip(srpo_actor.METRICS, window[:, 0].tolist()))
    assert metrics["losses/actor_loss"] == pytest.approx(want["loss_times_beta"], rel=1e-5)
    assert metrics["values/q_mean"] == pytest.approx(want["q_mean"], rel=1e-5)
    assert action == pytest.approx(want["action0"], rel=1e-5)
    check_grad(parameters, want["grad_times_beta"])
    check_step(parameters, before, want["step"])
    for net, state in zip((q_target, behavior), frozen):  # frozen networks stay as they are
        assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
