"""How far values have propagated in a maze: does V order an episode's states by the steps left to the goal?

    python examples/value_order.py --env antmaze-umaze       # reads runs/antmaze-umaze/critic.pt and the data

Prints, for each seed, the Spearman correlation of V(s_t) with minus the steps left to the first success, averaged over
the episodes that succeed. 1 is a perfect order; where values have not propagated, V is nearly constant.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
import srpo_critic
from eval import load_artifact


@dataclass
class Args:
    env: str
    """task whose critic was trained"""
    run_name: str | None = None
    """read <out-dir>/<run-name>/critic.pt (default: the task's name)"""
    out_dir: str = "runs"
    """folder of all runs"""


def successes(obs, next_obs, terminal):
    """Slices of the transitions, each an episode up to its first success."""
    new = (obs[1:] != next_obs[:-1]).any(dim=-1).nonzero().flatten() + 1  # where an episode begins
    bounds = [0, *new.tolist(), len(obs)]
    for start, end in zip(bounds, bounds[1:]):
        reached = terminal[start:end].flatten().nonzero().flatten().tolist()
        if reached:
            yield slice(start, start + reached[0] + 1)


def ranks(x):
    """The mean rank among equal values, so that ties are in no order."""
    _, index, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[index]


def spearman(x, y):
    """Rank correlation of two arrays; 0 if one is constant."""
    x, y = ranks(x) - ranks(x).mean(), ranks(y) - ranks(y).mean()
    return (x * y).sum() / max(np.sqrt((x**2).sum() * (y**2).sum()), 1e-12)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    path = Path(args.out_dir, args.run_name or args.env.replace("/", "-"), "critic.pt")
    artifact = load_artifact(path, "critic")
    if not artifact["info"]["maze"]:
        sys.exit(f"error: {args.env} is no maze: name one")
    flags = artifact["args"]
    data, info = srpo_critic.load_dataset(flags["env"], flags["dataset"], flags["normalize_obs"], "cpu")
    if artifact["info"] != info:
        sys.exit(f"error: {path} was trained on other data: run `python srpo_critic.py --env {args.env}` again")
    S, A = info["state_dim"], info["action_dim"]
    critic = srpo_critic.Critic(S, A, len(artifact["seeds"]))
    critic.load_state_dict(artifact["weights"])
    obs, _, _, next_obs, terminal = data.split([S, A, 1, S, 1], dim=1)
    episodes = [e for e in successes(obs, next_obs, terminal) if e.stop - e.start > 2]
    if not episodes:
        sys.exit(f"error: no episode of {args.env} succeeds after 3 or more steps: there is no order to measure")
    with torch.no_grad():
        v = torch.cat([critic.v(s.expand(len(artifact["seeds"]), -1, -1)) for s in obs.split(10_000)], dim=1)
    v = v.squeeze(-1).numpy()
    for seed, value in zip(artifact["seeds"], v):
        order = [spearman(value[e], np.arange(e.stop - e.start)) for e in episodes]
        print(f"seed {seed}: Spearman {np.mean(order):.4f} (std {np.std(order):.4f}) over {len(order)} episodes")
