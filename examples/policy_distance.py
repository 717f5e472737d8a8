"""Diagnose a policy: its distance from the behaviour model's actions, and the critic's Q of both.

    python examples/policy_distance.py --run runs/hopper-medium      # reads its artifacts

For each policy, over recorded states: its mean squared distance per action dimension (actions lie in [-1, 1]) from the
mean of 32 samples of the behaviour model, and the samples' own distance from it; then the mean Q of the policy's
actions, of the samples, and of the sample that IDQL would take. --episodes N also scores the mean of the samples as a
policy. --times T ... also prints the score term of Eq. 15 at that mean for each time: near 0 if the model is exact.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from joblib import cpu_count
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from eval import alpha_sigma, evaluate, load_artifact, load_frozen, make_networks, mlp, sample_actions, twin_q


@dataclass
class Args:
    run: Path
    """folder of the run"""
    states: int = 300
    """number of recorded states"""
    samples: int = 32
    """actions per state"""
    sampler_steps: int = 10
    """evaluations of the behaviour model per action"""
    episodes: int = 0
    """episodes in which the mean of the samples acts"""
    times: tuple[float, ...] = ()
    """diffusion times of the score term"""


def sample(behavior, s, samples, steps):
    """Several of the behaviour model's actions in each of the states s [B, S]: [B, samples, A]."""
    A = behavior.last.bias.shape[-1]
    s = s.repeat_interleave(samples, dim=0)[None]
    return sample_actions(behavior, s, torch.randn(1, s.shape[1], A), steps).clamp(-1, 1).view(-1, samples, A)


def compare(policy, behavior, q_target, s, samples, steps):
    """Two distances and three Qs as above, for networks of one replica and states s [B, S]."""
    a, pi = sample(behavior, s, samples, steps), policy(s[None])[0]
    q = twin_q(q_target, s.repeat_interleave(samples, dim=0)[None], a.flatten(0, 1)[None])[0].view(2, -1, samples)
    taken = q.amin(dim=0).argmax(dim=1, keepdim=True)  # as IDQL does, by the smaller of both heads
    mean = a.mean(dim=1)
    distances = (pi - mean).square().mean(), (a - mean[:, None]).square().mean()
    return *distances, twin_q(q_target, s[None], pi[None]).mean(), q.mean(), q.mean(dim=0).gather(1, taken).mean()


def score_term(behavior, s, a, t, draws=256):
    """E_eps[eps_psi(a_t | s, t) - eps] of Eq. 15 in actions a [B, A] of states s [B, S]: its rms, and by how much it
    grows per unit of distance from a. If a is the mean of the data's actions, an exact model has rms 0, and rms / slope
    is how far from them a policy would settle that is trained at this time alone."""
    B, A = a.shape
    s, eps = s.repeat_interleave(draws, dim=0)[None], torch.randn(1, B * draws, A)
    t = torch.full((1, B * draws, 1), t)
    alpha, sigma = alpha_sigma(t)

    def term(a):
        a_t = alpha * a.repeat_interleave(draws, dim=0) + sigma * eps
        return (behavior(a_t, s, t) - eps).view(B, draws, A).mean(dim=1)

    direction = F.normalize(torch.randn(B, A), dim=-1)
    here, beside = term(a), term(a + 0.1 * direction)
    return here.square().mean().sqrt(), ((beside - here) * direction).sum(dim=-1).mean() / 0.1


def make_mean_act(weights, info, samples, steps):
    """The mean of the samples as a policy, act(obs [B, S]) -> [B, A] in the environment's units."""
    behavior, _ = make_networks(weights, info)
    mean, std, low, high = (np.float32(info[name]) for name in ("obs_mean", "obs_std", "action_low", "action_high"))

    def act(obs):
        s = torch.from_numpy((np.asarray(obs, np.float32) - mean) / std)
        return low + (high - low) * (sample(behavior, s, samples, steps).mean(dim=1).numpy() + 1) / 2

    return act


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    torch.set_grad_enabled(False)
    artifact = load_artifact(args.run / "actor.pt", "actor")
    info, flags, seeds = artifact["info"], artifact["args"], list(dict.fromkeys(artifact["seeds"]))
    weights = dict(zip(seeds, load_frozen(artifact, args.run, seeds)))
    networks = {seed: make_networks(one, info) for seed, one in weights.items()}
    obs = load_artifact(flags["behavior"] or args.run / "behavior.pt", "behavior")["obs"]
    if args.episodes and not info["environments"]:
        sys.exit(f"error: the data set of {info['env']} has no environment: leave out --episodes")
    policy = mlp([info["state_dim"]] + [256] * flags["hidden_layers"] + [info["action_dim"]], 1).append(nn.Tanh())

    print("  seed   beta  distance  samples'  Q: policy  samples   IDQL's")
    for r, (seed, beta) in enumerate(zip(artifact["seeds"], artifact["betas"])):
        torch.manual_seed(0)  # the same states and noise for all
        policy.load_state_dict({name: x[r : r + 1] for name, x in artifact["weights"].items()})
        s = obs[torch.randint(len(obs), (args.states,))]
        row = compare(policy, *networks[seed], s, args.samples, args.sampler_steps)
        print(f"{seed:6d} {beta:6g} {row[0]:9.3f} {row[1]:9.3f}" + "".join(f" {q:9.2f}" for q in row[2:]))
    for seed, (behavior, _) in networks.items() if args.times else ():
        torch.manual_seed(0)
        print("  seed      t     error     slope  error / slope")
        s = obs[torch.randint(len(obs), (args.states,))]
        a = sample(behavior, s, args.samples, args.sampler_steps).mean(dim=1)
        for t in args.times:
            error, slope = score_term(behavior, s, a, t)
            print(f"{seed:6d} {t:6g} {error:9.3f} {slope:9.3f} {error / slope:14.3f}", flush=True)
    if args.episodes:
        environment = info["environments"][flags["eval_env"]]
        make = partial(make_mean_act, samples=args.samples, steps=args.sampler_steps)
        test = range(1_000_000, 1_000_000 + args.episodes)  # eval.py's
        result = evaluate(make, list(weights.values()), info, environment, test, cpu_count())
        for seed, score in zip(networks, result["eval/score"]):
            print(f"seed {seed}: the mean of {args.samples} samples as a policy has score {score:.1f}")
