"""Behaviour cloning, a baseline without critic and diffusion: SRPO's policy, fitted to the recorded actions.

    python examples/behavior_cloning.py --run runs/hopper-medium    # a finished run; writes bc/hopper-medium/actor.pt
    python eval.py --env hopper-medium --out-dir bc                 # lists it as srpo with beta 0

It minimises the squared error of the action, on the CPU. The run's actor.pt says layers, steps, batch size, learning
rate (which decays to 0 as the actor's) and seeds, its behavior.pt the data.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")  # some network file systems have no locks

import torch
import tyro
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
from eval import load_artifact, mlp
from srpo_behavior import load_dataset


@dataclass
class Args:
    run: Path
    """folder of the run"""
    out_dir: Path = Path("bc")
    """the policy is written to <out-dir>/<name of the run>"""
    steps: int | None = None
    """gradient steps (default: the actor's)"""


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    artifact = load_artifact(args.run / "actor.pt", "actor")
    info, flags, seeds = artifact["info"], artifact["args"], list(dict.fromkeys(artifact["seeds"]))
    source = load_artifact(flags["behavior"] or args.run / "behavior.pt", "behavior")["args"]
    path = args.out_dir / args.run.resolve().name / "actor.pt"
    if path.exists():
        sys.exit(f"error: {path} exists: move it away")
    data, found = load_dataset(source["env"], source["dataset"], source["normalize_obs"], "cpu")
    if any(found[key] != info[key] for key in ("fingerprint", "obs_mean", "obs_std")):
        sys.exit(f"error: the data of {args.run} changed since its actor was trained: train the run again")
    torch.manual_seed(seeds[0])
    R, S, A, steps = len(seeds), info["state_dim"], info["action_dim"], args.steps or flags["steps"]
    policy = mlp([S] + [256] * flags["hidden_layers"] + [A], R).append(nn.Tanh())
    optimizer = torch.optim.Adam(policy.parameters(), flags["lr"], fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in tqdm(range(steps), disable=None):  # no bar into a file
        s, a, *_ = data[torch.randint(len(data), (R, flags["batch_size"]))].split([S, A, 1, S, 1], dim=-1)
        loss = (policy(s) - a).square().sum(dim=-1).mean(dim=-1)  # [R]
        optimizer.zero_grad()
        loss.sum().backward()  # replicas share no parameters
        optimizer.step()
        decay.step()
    artifact |= {"weights": policy.state_dict(), "seeds": seeds, "betas": [0.0] * R, "args": flags | {"steps": steps}}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(artifact, path)
    print(f"saved {path}; squared error in the last minibatch: {loss.mean().item():.4f}")
