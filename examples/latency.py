"""Time and FLOPs of an action: SRPO's policy beside diffusion policies on the same behaviour model and critic.

    python examples/latency.py --run runs/hopper-medium      # a finished run; writes latency.json into its folder

Prints microseconds per action, for 1 and for 20 states at once. Methods that the released policies do not include are
this project's networks with that method's number of denoising steps and candidates.
"""

import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import tyro
from torch import nn
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
from eval import load_artifact, load_frozen, make_act, make_networks, mlp, sample_best


@dataclass
class Args:
    run: Path
    """folder of the run"""
    candidates: tuple[int, ...] = (32,)
    """actions that IDQL chooses from; several numbers measure several policies"""
    sampler_steps: int = 15
    """denoising steps, each one evaluation of the behaviour model"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto uses CUDA if there is a GPU"""


CHAINS = {  # method: denoising steps and candidates, as in the papers or released code
    "Diffusion-QL": (5, 50),
    "IDQL, as released": (5, 64),
    "SfBC": (15, 32),
    "QGPO, guidance left out": (15, 1),
}


def measure_latency(policy, act, behavior, q_target, candidates, steps):
    """Microseconds per action for 1 and for 20 states at once, and FLOPs per action: one dictionary per policy.

    policy(s [1, B, S]), behavior and q_target lie on the device to measure; act(obs) is the policy in NumPy.
    """
    weight = policy[0].weight
    states = [torch.randn(1, batch, weight.shape[1], device=weight.device) for batch in (1, 20)]
    rows = [("srpo", None, None, policy)]
    rows += [("srpo, act(obs) in NumPy", None, None, lambda s: act(s[0].numpy(force=True)))]
    chains = [("idql", (steps, n)) for n in candidates] + [("behavior", (steps, 1)), *CHAINS.items()]
    rows += [(name, k, n, partial(sample_best, behavior, q_target, candidates=n, steps=k)) for name, (k, n) in chains]
    result = []
    for name, k, n, call in rows:
        row = {"policy": name, "steps": k, "candidates": n}
        for s in states:
            statement = "call(s); torch.cuda.synchronize()" if s.is_cuda else "call(s)"
            timer = Timer(statement, globals={"call": call, "s": s}, num_threads=torch.get_num_threads())
            row[f"us_batch_{s.shape[1]}"] = timer.blocked_autorange(min_run_time=0.3).median * 1e6 / s.shape[1]
        with FlopCounterMode(display=False) as counter:
            (policy if k is None else call)(states[0])
        result.append(row | {"flops": counter.get_total_flops()})
    return result


def print_latency(rows, device):
    """The same as a table."""
    print(f"{device}: microseconds per action, for 1 and for 20 states at once, and FLOPs; also as multiples of SRPO's")
    print(f"{'policy':>24} {'steps':>5} {'candidates':>10} {'us, 1':>15} {'us, 20':>15} {'FLOPs':>20}")
    for row in rows:
        line = f"{row['policy']:>24} {row['steps'] or '-':>5} {row['candidates'] or '-':>10}"
        for name, form in ("us_batch_1", "8.1f"), ("us_batch_20", "8.1f"), ("flops", "13,d"):
            line += f" {row[name]:{form}} {row[name] / rows[0][name]:6.3g}"
        print(line)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if min(args.sampler_steps, *args.candidates) < 1:
        sys.exit("error: --sampler-steps and --candidates must be 1 or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but PyTorch finds no CUDA device: use --device cpu or install a CUDA build")
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    artifact = load_artifact(args.run / "actor.pt", "actor")
    info = artifact["info"]
    frozen = load_frozen(artifact, args.run, artifact["seeds"][:1])[0]
    behavior, q_target = (network.to(device) for network in make_networks(frozen, info))
    weights = [x[0].numpy() for x in artifact["weights"].values()]
    policy = mlp([info["state_dim"], *(len(bias[0]) for bias in weights[1::2])], 1).append(nn.Tanh())
    policy = policy.to(device).requires_grad_(False)  # its weights do not matter here
    act, n, steps = make_act(weights, info), dict.fromkeys(args.candidates), args.sampler_steps
    table = measure_latency(policy, act, behavior, q_target, n, steps)
    where = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print_latency(table, where)
    content = {"env": info["env"], "device": where, "torch": torch.__version__, "rows": table}
    (args.run / "latency.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"saved {args.run / 'latency.json'}")
