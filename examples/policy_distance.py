"""What holds a policy to the data? Where it stands between the behaviour model's actions, and what Q thinks of it.

    python examples/policy_distance.py --run runs/hopper-medium      # reads its artifacts and the data

For each policy, over recorded states: its mean squared distance per action dimension (of [-1, 1]) from the mean of 32
of the behaviour model's samples, and the samples' own; then the mean Q of the policy's actions, of the samples, and of
the best sample of each state, which IDQL would take.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import srpo_actor
from eval import BehaviorModel, TwinQ, load_artifact, mlp, sample_actions, select


@dataclass
class Args:
    run: Path
    """folder of the run"""
    states: int = 300
    """number of recorded states"""
    sampler_steps: int = 10
    """evaluations of the behaviour model per sample"""


@torch.no_grad()
def compare(policy, behavior, q_target, s, samples, steps):
    """Two distances and three Qs as above, for networks of one replica and states s [B, S]."""
    A = behavior.last.bias.shape[-1]
    many = s.repeat_interleave(samples, dim=0)[None]
    a = sample_actions(behavior, many, torch.randn(1, len(s) * samples, A), steps).clamp(-1, 1)
    q = q_target(many, a).mean(dim=1).view(-1, samples)
    a, pi = a.view(-1, samples, A), policy(s[None])
    center = a.mean(dim=1)
    distances = (pi[0] - center).square().mean(), (a - center[:, None]).square().mean()
    return *distances, q_target(s[None], pi).mean(), q.mean(), q.amax(dim=1).mean()


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    remedy = "run `python srpo_actor.py`"
    artifact = load_artifact(args.run / "actor.pt", "actor", remedy)
    frozen = [
        load_artifact(artifact["args"][stage] or args.run / f"{stage}.pt", stage, remedy)
        for stage in ("behavior", "critic")
    ]
    data, info = srpo_actor.load_dataset(artifact["env"], artifact["args"]["dataset"], "cpu")
    S, A = info["state_dim"], info["action_dim"]
    print("  seed   beta  distance  samples'  Q: policy  samples     best")
    for r, (seed, beta) in enumerate(zip(artifact["seeds"], artifact["betas"])):
        torch.manual_seed(0)  # the same states and noise for all
        one = [torch.Generator()]
        policy = mlp([S] + [256] * artifact["hidden_layers"] + [A], one).append(nn.Tanh())
        policy.load_state_dict({name: x[r : r + 1] for name, x in artifact["weights"].items()})
        behavior, q_target = BehaviorModel(S, A, one).eval(), TwinQ(S, A, one)  # no dropout
        for network, there, prefix in zip((behavior, q_target), frozen, ("", "q_target.")):
            network.load_state_dict(select(there["weights"], there["seeds"], [seed], prefix))
        s = data["obs"][torch.randint(len(data["obs"]), (args.states,))]
        row = compare(policy, behavior, q_target, s, 32, args.sampler_steps)
        print(f"{seed:6d} {beta:6g} {row[0]:9.3f} {row[1]:9.3f}" + "".join(f" {q:9.2f}" for q in row[2:]))
