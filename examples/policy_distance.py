"""What holds a policy to the data? Where it stands between the behaviour model's actions, and what Q thinks of it.

    python examples/policy_distance.py --run runs/hopper-medium      # reads its artifacts and the data

For each policy, over recorded states: its mean squared distance per action dimension (of [-1, 1]) from the mean of 32
of the behaviour model's samples, and the samples' own; then the mean Q of the policy's actions, of the samples, and of
the sample that IDQL would take. With --episodes N, also what that mean scores as a policy. With
--times T ..., what the score term of Eq. 15 is in that mean at each of these times: about 0, were the model exact.
"""

import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import srpo_actor
from eval import (
    BehaviorModel,
    TwinQ,
    alpha_sigma,
    checksum,
    flatten,
    load_artifact,
    make_env,
    mlp,
    rollout,
    sample_actions,
    select,
)


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
    q = q_target(s.repeat_interleave(samples, dim=0)[None], a.flatten(0, 1)[None])[0].view(2, -1, samples)
    taken = q.amin(dim=0).argmax(dim=1, keepdim=True)  # as IDQL does, by the lesser of both heads
    mean = a.mean(dim=1)
    distances = (pi - mean).square().mean(), (a - mean[:, None]).square().mean()
    return *distances, q_target(s[None], pi[None]).mean(), q.mean(), q.mean(dim=0).gather(1, taken).mean()


def score_term(behavior, s, a, t, draws=256):
    """E_eps[eps_psi(a_t | s, t) - eps] of Eq. 15 in actions a [B, A] of states s [B, S]: its rms, and by how much it
    grows per unit of distance from a. If a is the mean of the data's actions, the first is an error, and error / slope
    how far from them a policy comes to rest that this time alone holds."""
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


def make_mean_act(behavior, info, samples, steps):
    """The mean of the samples as a policy, act(obs [n, S]) -> [n, A] in the environment's units."""
    low, high = torch.tensor(info["action_low"]), torch.tensor(info["action_high"])

    def act(obs):
        a = sample(behavior, torch.from_numpy(flatten(obs)), samples, steps).mean(dim=1)
        return (low + (high - low) * (a + 1) / 2).numpy()

    return act


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    torch.set_grad_enabled(False)
    remedy = "run `python srpo_actor.py`"
    artifact, frozen = load_artifact(args.run / "actor.pt", "actor", remedy), []
    for stage in ("behavior", "critic"):
        path = artifact["args"][stage] or args.run / f"{stage}.pt"
        frozen.append(load_artifact(path, stage, remedy))
        if checksum(frozen[-1]["weights"]) != artifact["sources"][stage]:
            sys.exit(f"error: {path} is not what the policy was trained on: {remedy} again")
    data, info = srpo_actor.load_dataset(artifact["env"], artifact["args"]["dataset"], "cpu")
    if info["fingerprint"] != artifact["fingerprint"]:
        sys.exit(f"error: {args.run / 'actor.pt'} was trained on other data: {remedy} again")
    if args.episodes and not info["environments"]:
        sys.exit(f"error: the data of {artifact['env']} name no environment: leave out --episodes")
    S, A = info["state_dim"], info["action_dim"]
    print("  seed   beta  distance  samples'  Q: policy  samples   IDQL's")
    behaviors = {}
    for r, (seed, beta) in enumerate(zip(artifact["seeds"], artifact["betas"])):
        torch.manual_seed(0)  # the same states and noise for all
        one = [torch.Generator()]
        policy = mlp([S] + [256] * artifact["hidden_layers"] + [A], one).append(nn.Tanh())
        policy.load_state_dict({name: x[r : r + 1] for name, x in artifact["weights"].items()})
        behavior, q_target = BehaviorModel(S, A, one).eval(), TwinQ(S, A, one)  # no dropout
        for network, there, prefix in zip((behavior, q_target), frozen, ("", "q_target.")):
            network.load_state_dict(select(there["weights"], there["seeds"], [seed], prefix))
        s = data["obs"][torch.randint(len(data["obs"]), (args.states,))]
        row = compare(policy, behavior, q_target, s, args.samples, args.sampler_steps)
        print(f"{seed:6d} {beta:6g} {row[0]:9.3f} {row[1]:9.3f}" + "".join(f" {q:9.2f}" for q in row[2:]))
        behaviors[seed] = behavior
    for seed, behavior in behaviors.items() if args.times else ():
        torch.manual_seed(0)
        print("  seed      t     error     slope  error / slope")
        s = data["obs"][torch.randint(len(data["obs"]), (args.states,))]
        a = sample(behavior, s, args.samples, args.sampler_steps).mean(dim=1)
        for t in args.times:
            error, slope = score_term(behavior, s, a, t)
            print(f"{seed:6d} {t:6g} {error:9.3f} {slope:9.3f} {error / slope:14.3f}", flush=True)
    for seed, behavior in behaviors.items() if args.episodes else ():
        act = make_mean_act(behavior, info, args.samples, args.sampler_steps)
        make = partial(make_env, info["environments"][artifact["args"]["eval_env"]])
        test = range(1_000_000, 1_000_000 + args.episodes)  # eval.py's
        torch.manual_seed(test.start)
        returns, success, _ = rollout(act, make, test, info["maze"]).T
        worst, best = info["reference"]
        score = 100 * ((success if info["maze"] else returns).mean() - worst) / (best - worst)
        print(f"seed {seed}: the mean of {args.samples} samples as a policy has score {score:.1f}", flush=True)
