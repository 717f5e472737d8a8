"""Speed and memory: the updates of the three stages, beside a plain loop and the hardware's floor; loading; evaluation.

    python tests/benchmark.py              # a table; --quick: a rougher one in less than a minute; --json: for programs

Each stage's own make_update at the paper's sizes, for 1 and 6 seeds and the actor's grid of 6 seeds x 6 betas, against
(a) plain: one seed, eager, the way the released code works: a module per network, an optimizer per loss, Python loops
    over parameters, and in the behaviour stage a loss read back at every step;
(b) floor: counted multiply-adds over the rate of a large matrix product, or the bytes of parameters, gradients and
    optimizer state over the bandwidth of a large copy, whichever takes longer; both are measured in the same run.
"""

import copy
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from minari.data_collector import EpisodeBuffer
from minari.serialization import serialize_space
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))
import srpo_actor
import srpo_behavior
import srpo_critic

STATE_DIM, ACTION_DIM, N = 17, 6, 1_000_000  # of halfcheetah-medium
COLUMNS, SIZES = ("obs", "action", "reward", "next_obs", "terminal"), (STATE_DIM, ACTION_DIM, 1, STATE_DIM, 1)


@dataclass
class Args:
    quick: bool = False
    """rougher numbers, in less than a minute on 2 cores"""
    compile: bool = False
    """also measure the updates passed through torch.compile, which takes minutes to compile"""
    json: bool = False
    """print numbers for another program instead of a table"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA when there is one"""


def random_data(device, N=N):
    """Transitions as load_dataset returns them."""
    data = torch.randn(N, sum(SIZES), device=device)
    data[:, STATE_DIM : STATE_DIM + ACTION_DIM].tanh_()
    data[:, -1] = (data[:, -1] > 3).float()
    return data


# (a) the plain loop


def plain_mlp(n_in, n_out, hidden=2):
    sizes = [n_in] + [256] * hidden
    layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(256, n_out))


class PlainTwinQ(nn.Module):
    def __init__(self):
        super().__init__()
        self.q1, self.q2 = plain_mlp(ACTION_DIM + STATE_DIM, 1), plain_mlp(ACTION_DIM + STATE_DIM, 1)

    def forward(self, s, a):
        x = torch.cat([a, s], dim=-1)
        return self.q1(x), self.q2(x)


class PlainBehavior(nn.Module):
    def __init__(self):
        super().__init__()
        self.W = nn.Parameter(30 * torch.randn(32), requires_grad=False)
        self.time = nn.Sequential(nn.Linear(64, 128), nn.Mish(), nn.Linear(128, 128))
        self.first, self.last = nn.Linear(ACTION_DIM + STATE_DIM + 128, 256), nn.Linear(256, ACTION_DIM)
        block = (nn.Dropout(0.1), nn.LayerNorm(256), nn.Linear(256, 1024), nn.Mish(), nn.Linear(1024, 256))
        self.blocks = nn.ModuleList(copy.deepcopy(nn.Sequential(*block)) for _ in range(3))

    def forward(self, a_t, s, t):
        phase = 2 * torch.pi * self.W * t[:, None]
        x = self.first(torch.cat([a_t, s, self.time(torch.cat([phase.sin(), phase.cos()], dim=-1))], dim=-1))
        for block in self.blocks:
            x = x + block(x)
        return self.last(F.mish(x))


def plain_minibatches(data, batch_size, names=COLUMNS):
    """Walks through a shuffled data set, a tensor for each column as in the released code."""
    data = {name: x.contiguous() for name, x in zip(COLUMNS, data.split(SIZES, dim=1)) if name in names}
    while True:
        for index in torch.randperm(N, device=data["obs"].device).split(batch_size)[:-1]:
            yield {name: x[index] for name, x in data.items()}


def plain_critic(data, args, device):
    q, v = PlainTwinQ().to(device), plain_mlp(STATE_DIM, 1).to(device)
    q_target = copy.deepcopy(q)
    q_optimizer, v_optimizer = torch.optim.Adam(q.parameters(), lr=3e-4), torch.optim.Adam(v.parameters(), lr=3e-4)
    batches = plain_minibatches(data, args.batch_size)

    def update():
        b = next(batches)
        with torch.no_grad():
            q_min, next_v = torch.min(*q_target(b["obs"], b["action"])), v(b["next_obs"])
        u = q_min - v(b["obs"])
        v_loss = (torch.abs(0.7 - (u < 0).float()) * u**2).mean()
        v_optimizer.zero_grad(set_to_none=True)
        v_loss.backward()
        v_optimizer.step()
        backup = b["reward"] + 0.99 * (1 - b["terminal"]) * next_v
        q_loss = sum(F.mse_loss(x, backup) for x in q(b["obs"], b["action"])) / 2
        q_optimizer.zero_grad(set_to_none=True)
        q_loss.backward()
        q_optimizer.step()
        for x, target in zip(q.parameters(), q_target.parameters()):
            target.data.copy_(0.005 * x.data + 0.995 * target.data)

    return update


def plain_behavior(data, args, device):
    model = PlainBehavior().to(device)
    optimizer = torch.optim.AdamW(filter(lambda p: p.requires_grad, model.parameters()), lr=3e-4)
    batches, losses = plain_minibatches(data, args.batch_size), []

    def update():
        b = next(batches)
        t, eps = torch.rand(len(b["obs"]), device=device) * 0.999 + 0.001, torch.randn_like(b["action"])
        alpha, sigma = srpo_behavior.alpha_sigma(t[:, None])
        loss = ((model(alpha * b["action"] + sigma * eps, b["obs"], t) - eps) ** 2).sum(dim=-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    return update


def plain_actor(data, args, device):
    policy = plain_mlp(STATE_DIM, ACTION_DIM).append(nn.Tanh()).to(device)
    q_target, model = PlainTwinQ().to(device), PlainBehavior().to(device).eval()
    optimizer = torch.optim.Adam(policy.parameters(), lr=3e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.steps)
    batches = plain_minibatches(data, args.batch_size, ["obs"])

    def update():
        s = next(batches)["obs"]
        a = policy(s)
        t, eps = torch.rand(len(s), device=device) * 0.96 + 0.02, torch.randn_like(a)
        alpha, sigma = srpo_actor.alpha_sigma(t[:, None])
        with torch.no_grad():
            eps_hat = model(alpha * a + sigma * eps, s, t)
        leaf = a.detach().requires_grad_(True)
        g = torch.autograd.grad(sum(q_target(s, leaf)).sum() / 2, leaf)[0]
        loss = ((sigma**2 * (eps_hat - eps) - 0.05 * g) * a).sum(dim=-1).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()

    return update


# ours: put together as the scripts' main parts do


def our_critic(data, args, device, seeds, betas):
    args.expectile = 0.7
    critic = srpo_critic.Critic(STATE_DIM, ACTION_DIM, seeds).to(device)
    lr, fast = torch.tensor(args.lr, device=device), {"fused": True, "capturable": device.type == "cuda"}
    optimizer = torch.optim.Adam([p for p in critic.parameters() if p.requires_grad], lr=lr, **fast)
    window = torch.zeros(len(srpo_critic.METRICS), seeds, device=device)

    def draw():
        index = torch.randint(len(data), (seeds, args.batch_size), device=device)
        return data[index].split(SIZES, dim=-1)

    return srpo_critic.make_update(args, critic, optimizer, draw, window, 0), critic, optimizer, window


def our_behavior(data, args, device, seeds, betas):
    model = srpo_behavior.BehaviorModel(STATE_DIM, ACTION_DIM, seeds, "eps").to(device)
    lr, fast = torch.tensor(args.lr, device=device), {"fused": True, "capturable": device.type == "cuda"}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, **fast)
    window = torch.zeros(len(srpo_behavior.METRICS), seeds, device=device)

    def draw():
        index = torch.randint(len(data), (seeds, args.batch_size), device=device)
        s, a, *_ = data[index].split(SIZES, dim=-1)
        t = torch.empty(seeds, args.batch_size, 1, device=device).uniform_(0.001, 1)
        return s, a, t, torch.randn_like(a)

    return srpo_behavior.make_update(args, model, optimizer, draw, window, 0), model, optimizer, window


def our_actor(data, args, device, seeds, betas):
    R, args.beta, args.q_grad_norm = seeds * betas, tuple(0.01 * (k + 1) for k in range(betas)), "none"
    policy = srpo_actor.mlp([STATE_DIM, 256, 256, ACTION_DIM], R).append(nn.Tanh()).to(device)
    q_target = srpo_actor.mlp([ACTION_DIM + STATE_DIM, 256, 256, 1], 2 * seeds).to(device).requires_grad_(False)
    behavior = srpo_actor.BehaviorModel(STATE_DIM, ACTION_DIM, seeds, "eps").to(device).requires_grad_(False).eval()
    beta = torch.tensor(args.beta, device=device).repeat(seeds).view(-1, 1, 1)
    lr, fast = torch.tensor(args.lr, device=device), {"fused": True, "capturable": device.type == "cuda"}
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, **fast)
    window, obs = torch.zeros(len(srpo_actor.METRICS), R, device=device), data[:, :STATE_DIM].clone()

    def draw():
        index = torch.randint(len(obs), (R, args.batch_size), device=device)
        t = torch.empty(R, args.batch_size, 1, device=device).uniform_(0.02, 0.98)
        return obs[index], t, torch.randn(R, args.batch_size, ACTION_DIM, device=device)

    update = srpo_actor.make_update(args, policy, q_target, behavior, optimizer, beta, draw, window, 0)
    return update, policy, optimizer, window


STAGES = {  # stage -> its script, the plain loop, ours, seeds x betas
    "critic": (srpo_critic, plain_critic, our_critic, [(1, 1), (6, 1)]),
    "behavior": (srpo_behavior, plain_behavior, our_behavior, [(1, 1), (6, 1)]),
    "actor": (srpo_actor, plain_actor, our_actor, [(1, 1), (6, 1), (6, 6)]),
}


# measuring


def sync(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(updates, device, seconds, turns):
    """Milliseconds per call of each update: the median of several turns of some seconds, in which they alternate."""

    def run(update, calls):
        sync(device)
        start = time.perf_counter()
        for _ in range(calls):
            update()
        sync(device)
        return 1000 * (time.perf_counter() - start) / calls

    calls = {name: max(1, round(1000 * seconds / run(update, 1))) for name, update in updates.items()}  # warms up
    times = [{name: run(update, calls[name]) for name, update in updates.items()} for _ in range(turns)]
    return {name: statistics.median(turn[name] for turn in times) for name in updates}


def hardware(device):
    """Multiply-adds per second of a large product, and bytes per second of a large copy, the best of five each."""
    x, y, z = (torch.randn(shape, device=device) for shape in ((2048, 2048), 64_000_000, 64_000_000))
    rates = []
    for work, amount in ((lambda: x @ x, len(x) ** 3), (lambda: y.copy_(z), 2 * 4 * len(y))):
        times = []
        for _ in range(6):
            sync(device)
            start = time.perf_counter()
            work()
            sync(device)
            times.append(time.perf_counter() - start)
        rates.append(amount / min(times[1:]))
    return rates


def floor_milliseconds(update, model, rates):
    """The larger of arithmetic and memory traffic, in milliseconds per step."""
    with FlopCounterMode(display=False) as counter:
        update()
    trained = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)
    fixed = sum(4 * p.numel() for p in model.parameters() if not p.requires_grad)
    traffic = 8 * trained + 2 * fixed  # Adam reads weight, gradient, two moments, writes three; the gradient is written
    return 1000 * max(counter.get_total_flops() / 2 / rates[0], traffic / rates[1])


def measure_stage(stage, data, device, rates, quick, compiled):
    """For one stage, replicas -> {"ms", "plain_ms", "floor_ms"}, on CUDA also "eager_ms" and "peak_mb".

    compiled: also "compiled_ms", the same update by torch.compile.
    """
    script, plain, ours, grids = STAGES[stage]
    updates, result = {"plain": plain(data, script.Args(env=""), device)}, {}
    for seeds, betas in grids:
        R = str(seeds * betas)
        update, model, _, _ = ours(data, script.Args(env=""), device, seeds, betas)
        result[R] = {"floor_ms": floor_milliseconds(update, model, rates)}
        if device.type == "cuda":
            updates[f"{R} eager"] = update
            torch.cuda.reset_peak_memory_stats()
            update = script.capture(update).__next__
            for _ in range(5):  # past the recording
                update()
            result[R]["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
        updates[R] = update
        if compiled:
            other = torch.compile(ours(data, script.Args(env=""), device, seeds, betas)[0])
            other = script.capture(other).__next__ if device.type == "cuda" else other
            for _ in range(5):  # past compiling and recording
                other()
            updates[f"{R} compiled"] = other
    ms = milliseconds(updates, device, *((0.3, 3) if quick else (2, 7)))
    for R, row in result.items():
        row |= {"ms": ms[R], "plain_ms": ms["plain"]}
        if device.type == "cuda":
            row["eager_ms"] = ms[f"{R} eager"]
        if compiled:
            row["compiled_ms"] = ms[f"{R} compiled"]
    return result


def make_set(id):
    """A Minari set of N transitions, float64 as Gymnasium's MuJoCo environments give them."""
    rng, T, buffers = np.random.default_rng(0), 1000, []
    for _ in range(N // T):
        infos = {f"info_{i}": rng.normal(size=T + 1) for i in range(6)}  # Minari's own sets hold as many
        steps = {"rewards": rng.normal(size=T), "terminations": np.zeros(T, bool), "truncations": np.arange(T) == T - 1}
        actions = rng.uniform(-1, 1, (T, ACTION_DIM)).astype(np.float32)
        obs = rng.normal(size=(T + 1, STATE_DIM))
        buffers.append(EpisodeBuffer(observations=obs, actions=actions, **steps, infos=infos))
    action_space = gym.spaces.Box(-1, 1, (ACTION_DIM,), np.float32)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float64)
    minari.create_dataset_from_buffers(id, buffers, action_space=action_space, observation_space=observation_space)


def load_set(id):
    """Seconds and peak memory of load_dataset; the peak is a process's, so this is called in one of its own."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    data, _ = srpo_critic.load_dataset(id, None, False, "cpu")
    seconds = time.perf_counter() - start
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    return {"seconds": seconds, "peak_over_tensors": peak / data.nbytes}


def measure_loading():
    """The same, from a set that is made and deleted here."""
    code = "import benchmark; print(benchmark.json.dumps(benchmark.{}('benchmark/locomotion-v0')))"
    with tempfile.TemporaryDirectory() as folder:
        where = os.environ | {"MINARI_DATASETS_PATH": folder, "PYTHONPATH": str(Path(__file__).parent)}
        for step in ("make_set", "load_set"):  # a process each: memory's high-water mark is a process's
            command = [sys.executable, "-W", "ignore", "-c", code.format(step)]
            done = subprocess.run(command, env=where, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure_evaluation(quick):
    """Environment steps per second of evaluate(), for one and two workers: workers -> steps/s."""
    environment = {"id": "HalfCheetah-v5", "kwargs": {}, "max_episode_steps": 200 if quick else 1000, "wrappers": []}
    space = gym.spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float64)
    info = {
        "by_success": False,
        "reference": (0, 1),
        "observation_space": serialize_space(space),
        "state_dim": STATE_DIM,
    }
    info |= {"obs_mean": [0.0] * STATE_DIM, "obs_std": [1.0] * STATE_DIM}
    info |= {"action_low": [-1.0] * ACTION_DIM, "action_high": [1.0] * ACTION_DIM}
    policy = [x[0].numpy() for x in srpo_actor.mlp([STATE_DIM, 256, 256, ACTION_DIM], 1).state_dict().values()]
    result = {}
    for workers in (1, 2):

        def run(seeds, workers=workers):
            metrics = srpo_actor.evaluate([policy], info, environment, seeds, workers)
            return metrics["eval/episode_length"][0] * len(seeds)

        run(range(10 * workers))  # starts them
        start = time.perf_counter()
        result[str(workers)] = run(range(40)) / (time.perf_counter() - start)
    return result


def table(result, device):
    """The rows of the three stages, as docs/speed.md has them."""
    lines = [
        f"| {device} | ms/step | plain | ours / (replicas x plain) | floor | ours / floor | `--compile` |",
        "|---|---|---|---|---|---|---|",
    ]
    for stage in STAGES:
        for R, row in result[stage].items():
            ms, plain, floor = row["ms"], row["plain_ms"], row["floor_ms"]
            cells = (f"{ms:.4g}", f"{plain:.4g}", f"{ms / plain / int(R):.2f}", f"{floor:.3g}", f"{ms / floor:.1f}")
            cells += (f"{row['compiled_ms']:.4g}" if "compiled_ms" in row else "",)
            lines.append(f"| {stage}, {R} replica{'s' * (R != '1')} | " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    allocator = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "2147483647"}  # as run.sh sets it
    if not allocator.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | allocator)
    result = {"loading": measure_loading(), "evaluation": measure_evaluation(args.quick)}
    device = torch.device("cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True  # for ours and plain alike
    torch.manual_seed(0)
    data, rates = random_data(device), hardware(device)
    for stage in STAGES:
        result[stage] = measure_stage(stage, data, device, rates, args.quick, args.compile)
    result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    if args.json:
        print(json.dumps(result))
        sys.exit()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print("\n".join(table(result, name)))
    print(f"rates: {rates[0] / 1e9:.0f} G multiply-adds/s, {rates[1] / 1e9:.0f} GB/s")
    load, evaluation = result["loading"], result["evaluation"]
    print(f"loading {N:,} transitions: {load['seconds']:.1f} s, peak {load['peak_over_tensors']:.2f} times the tensors")
    print(f"evaluation, environment steps/s: {evaluation['1']:.0f} with one worker, {evaluation['2']:.0f} with two")
    print(f"peak memory of this process: {result['peak_mb']:.0f} MB")
