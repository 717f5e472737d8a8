"""Score saved policies: the last policy of every seed and beta, over episodes that training never saw.

    python eval.py --env hopper-medium       # reads runs/hopper-medium/actor.pt, writes runs/hopper-medium/eval.json
    python eval.py --env hopper-medium --policy srpo idql behavior --latency --video

Beside SRPO's policy, the diffusion policies that it replaces, from the same artifacts: behavior, one action sampled
from the behaviour model, and idql (Hansen-Estruch et al., 2023), of several such actions the one of highest Q.

In your own code, from eval import load_policy; act = load_policy("runs/hopper-medium/actor.pt"); action = act(obs).
"""

import contextlib
import csv
import io
import json
import multiprocessing
import os
import signal
import sys
import threading
import warnings
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import FlopCounterMode


@dataclass
class Args:
    env: str | None = None
    """task that was trained"""
    run_name: str | None = None
    """read <out-dir>/<run-name>/actor.pt (default: the task's name)"""
    out_dir: str = "runs"
    """where the runs are kept"""
    policy: tuple[Literal["srpo", "idql", "behavior"], ...] = ("srpo",)
    """which to score: SRPO's, IDQL on its critic and behaviour model, that behaviour model"""
    candidates: int = 32
    """actions that IDQL chooses from"""
    sampler_steps: int = 15
    """evaluations of the behaviour model per sampled action"""
    episodes: int = 100
    """episodes per replica (0: none)"""
    workers: int = os.cpu_count()
    """processes that evaluate"""
    eval_env: Literal["fixed", "data"] | None = None
    """mazes: from one start to one goal, or drawn as in the recording (default: as in the actor's training)"""
    latency: bool = False
    """time an action of SRPO and of diffusion policies"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where --latency measures; episodes are always played on the CPU"""
    video: bool = False
    """record an episode of every policy as <run>/video/*.mp4"""
    table: tuple[Path, ...] = ()
    """instead of all this, gather these scored runs (runs/*) in <out-dir>/table.md and table.csv"""


def flatten(obs):
    """One float32 vector per observation; a dictionary's parts are joined in the order of their sorted keys."""
    if isinstance(obs, dict):
        return np.concatenate([flatten(obs[key]) for key in sorted(obs)], axis=-1)
    return np.asarray(obs, np.float32)


def reached(obs):
    """Whether maze observations are at their goal, by the distance that the environments call success."""
    return np.linalg.norm(obs["achieved_goal"] - obs["desired_goal"], axis=-1) <= 0.45


class Linear(nn.Module):
    """R independent nn.Linear layers, x [R, B, n_in] -> [R, B, n_out], drawn as nn.Linear is, by own generators."""

    def __init__(self, n_in, n_out, generators):
        super().__init__()
        weight, bias = torch.empty(len(generators), n_out, n_in), torch.empty(len(generators), 1, n_out)
        for r, generator in enumerate(generators):
            weight[r].uniform_(-(n_in**-0.5), n_in**-0.5, generator=generator)
            bias[r].uniform_(-(n_in**-0.5), n_in**-0.5, generator=generator)
        self.weight, self.bias = nn.Parameter(weight.mT.contiguous()), nn.Parameter(bias)

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


def mlp(sizes, generators):
    """R multilayer perceptrons with ReLU between their layers."""
    layers = []
    for n_in, n_out in zip(sizes, sizes[1:]):
        layers += [Linear(n_in, n_out, generators), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


class TwinQ(nn.Module):
    """Q1 and Q2 of R replicas, one network of 2R: s [R, B, S], a [R, B, A] -> [R, 2, B]."""

    def __init__(self, state_dim, action_dim, generators):
        super().__init__()
        self.net = mlp([action_dim + state_dim, 256, 256, 1], [g for g in generators for _ in range(2)])

    def forward(self, s, a):
        x = torch.cat([a, s], dim=-1).repeat_interleave(2, dim=0)  # [2R, B, A + S]
        return self.net(x).view(-1, 2, x.shape[1])


class LayerNorm(nn.Module):
    """R independent nn.LayerNorm layers: x [R, B, n] -> [R, B, n]."""

    def __init__(self, n, replicas):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(replicas, 1, n)), nn.Parameter(torch.zeros(replicas, 1, n))

    def forward(self, x):
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:]), self.weight)


class BehaviorModel(nn.Module):
    """eps_psi(a_t | s, t), the noise in a_t: a_t [R, B, A], s [R, B, S], t [R, B, 1] -> [R, B, A]."""

    def __init__(self, state_dim, action_dim, generators):
        super().__init__()
        W = torch.stack([torch.randn(1, 32, generator=generator) for generator in generators])
        self.register_buffer("W", 30 * W)  # frequencies of time, never trained
        self.time = nn.Sequential(Linear(64, 128, generators), nn.Mish(), Linear(128, 128, generators))
        self.first = Linear(action_dim + state_dim + 128, 256, generators)
        self.blocks = nn.ModuleList()
        for _ in range(3):
            wide, back = Linear(256, 1024, generators), Linear(1024, 256, generators)
            block = nn.Sequential(nn.Dropout(0.1), LayerNorm(256, len(generators)), wide, nn.Mish(), back)
            self.blocks.append(block)  # x + block(x)
        self.last = Linear(256, action_dim, generators)

    def forward(self, a_t, s, t):
        phase = 2 * torch.pi * self.W * t  # [R, B, 32]
        time = self.time(torch.cat([phase.sin(), phase.cos()], dim=-1))
        x = self.first(torch.cat([a_t, s, time], dim=-1))
        for block in self.blocks:
            x = x + block(x)
        return self.last(F.mish(x))


BETA_0, BETA_1 = 0.1, 20.0


def alpha_sigma(t):
    """The VPSDE's noise schedule: a_t = alpha a + sigma eps."""
    log_alpha = -(BETA_1 - BETA_0) / 4 * t**2 - BETA_0 / 2 * t
    return log_alpha.exp(), (1 - torch.exp(2 * log_alpha)).sqrt()


def sample_actions(eps_psi, s, noise, steps):
    """Actions from noise [R, B, A] and states s [R, B, S], one for each; steps: evaluations of eps_psi.

    DPM-Solver++(2M) (Lu et al., 2022, Algorithm 2): solves the diffusion ODE from t = 1 to 0.001 in steps of equal
    length h in lambda = log(alpha / sigma), to second order in h.
    """
    alpha, sigma = alpha_sigma(torch.tensor([1, 0.001], dtype=torch.float64))
    lam = torch.linspace(*torch.log(alpha / sigma), steps + 1, dtype=torch.float64)
    h, log_alpha = lam[1] - lam[0], -F.softplus(-2 * lam) / 2
    x = (BETA_1 - BETA_0) / 2  # x t^2 + BETA_0 t + 2 log_alpha = 0 has the solution
    t = (-BETA_0 + (BETA_0**2 - 8 * x * log_alpha).sqrt()) / (2 * x)
    alpha, sigma, t = (x.to(noise) for x in (*alpha_sigma(t), t))
    a_t, previous = noise, None
    for i in range(steps):
        a = (a_t - sigma[i] * eps_psi(a_t, s, t[i].expand(*s.shape[:2], 1))) / alpha[i]  # the action behind a_t
        slope = a if i == 0 else 1.5 * a - 0.5 * previous  # extrapolated to the middle of the step
        a_t = sigma[i + 1] / sigma[i] * a_t - alpha[i + 1] * torch.expm1(-h).item() * slope
        previous = a
    return a_t


def make_act(weights, info):
    """The policy in NumPy: act(obs) -> action in the environment's units, for one observation or a batch of them."""
    low, high = np.float32(info["action_low"]), np.float32(info["action_high"])

    def act(obs):
        x = flatten(obs)
        for weight, bias in weights[:-1]:
            x = np.maximum(x @ weight + bias, 0)
        weight, bias = weights[-1]
        return low + (high - low) * (np.tanh(x @ weight + bias) + 1) / 2

    return act


def policy_weights(state_dict, replica):
    """One replica's layers as NumPy arrays: list of (weight [n_in, n_out], bias [n_out])."""
    tensors = [tensor[replica].cpu().numpy() for tensor in state_dict.values()]
    return [(weight, bias[0]) for weight, bias in zip(tensors[::2], tensors[1::2])]


def sample_best(behavior, q_target, s, candidates, steps):
    """For each of the states s [1, B, S] the action of highest Q (the lesser head's) among so many samples: [B, A]."""
    A = behavior.last.bias.shape[-1]
    s = s.repeat_interleave(candidates, dim=1)
    a = sample_actions(behavior, s, torch.randn(*s.shape[:2], A, device=s.device), steps).clamp(-1, 1)
    if candidates == 1:
        return a[0]
    best = q_target(s, a).amin(dim=1).view(-1, candidates).argmax(dim=1)
    return a.view(-1, candidates, A)[torch.arange(len(best)), best]


def make_networks(weights, info):
    """One seed's behaviour model and target Qs, from their state dictionaries of arrays."""
    networks = [
        network(info["state_dim"], info["action_dim"], [torch.Generator()]) for network in (BehaviorModel, TwinQ)
    ]
    for network, arrays in zip(networks, weights):
        network.load_state_dict({name: torch.from_numpy(x) for name, x in arrays.items()})
        network.requires_grad_(False).eval()  # no dropout
    return networks


def make_sampling_act(weights, info, candidates, steps):
    """A diffusion policy, act(obs) -> action as in make_act: IDQL, or with one candidate the behaviour model."""
    torch.set_num_threads(1)  # in a worker
    behavior, q_target = make_networks(weights, info)
    low, high = np.float32(info["action_low"]), np.float32(info["action_high"])

    def act(obs):
        a = sample_best(behavior, q_target, torch.from_numpy(flatten(obs))[None], candidates, steps)
        return low + (high - low) * (a.numpy() + 1) / 2

    return act


def make_env(environment):
    """One of info's environments: its id with its own keyword arguments, never the bare id."""
    mujoco.set_mju_user_warning(lambda message: None)  # silences "newer versions exist": the data need theirs
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings(action="ignore"):
        if environment["id"] not in gym.registry:
            import gymnasium_robotics

            gym.register_envs(gymnasium_robotics)
        limit = {"max_episode_steps": environment["max_episode_steps"]}
        if environment["id"] not in gym.registry:  # gym.make would import what stands before a colon
            raise gym.error.UnregisteredEnv(f"{environment['id']} is not registered")
        env = gym.make(environment["id"], disable_env_checker=True, **limit, **environment["kwargs"])
    mujoco.set_mju_user_warning(None)
    return env


def check_env(environment, info):
    """Exit with one line now, rather than with an error in the middle of things, if there is no such environment."""
    try:
        env = make_env(environment)
    except (gym.error.Error, ImportError, TypeError) as e:
        reason = str(e).splitlines()[0]
        sys.exit(f"error: cannot make {environment['id']} ({reason}): install its package; to train, --eval-every 0")
    there = gym.spaces.flatdim(env.observation_space), gym.spaces.flatdim(env.action_space)
    if there != (info["state_dim"], info["action_dim"]):
        here = f"{there} state and action dimensions, the data {info['state_dim'], info['action_dim']}"
        sys.exit(f"error: {environment['id']} has {here}: record them with their environment; to train, --eval-every 0")
    env.close()


def rollout(act, make_env, seeds, maze=False):
    """One episode per seed, in lockstep: act(obs [n, S]) -> [n, A]. In mazes success ends an episode.

    Returns [n, 3]: return, success, length.
    """
    envs = [make_env() for _ in seeds]
    obs = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)]
    result, running = np.zeros((len(seeds), 3)), list(range(len(seeds)))
    while running:
        for i, action in zip(list(running), act(np.stack([flatten(obs[i]) for i in running]))):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            success = maze and reached(obs[i])
            result[i] += reward, success, 1
            if terminated or truncated or success:
                running.remove(i)
    for env in envs:
        env.close()
    return result


def run_chunk(make_act, weights, info, seeds):
    """A worker's job: one policy's episodes of a few seeds."""
    torch.manual_seed(seeds[0])  # for policies that sample
    return rollout(make_act(weights, info), lambda: make_env(info["environment"]), seeds, info["maze"])


def evaluate(pool, make_act, policies, info, environment, seeds):
    """Metrics of policies, each the weights for make_act, over one episode per seed: name -> array [policies, seeds].

    Every worker gets ten episodes at a time, so that the number of workers changes nothing.
    """
    chunks = [seeds[i : i + 10] for i in range(0, len(seeds), 10)]
    info = info | {"environment": environment}
    try:
        jobs = [pool.submit(run_chunk, make_act, policy, info, chunk) for policy in policies for chunk in chunks]
        result = np.concatenate([job.result() for job in jobs]).reshape(len(policies), len(seeds), 3)
    except (BrokenProcessPool, KeyboardInterrupt):
        sys.exit("error: interrupted, or a process that evaluates has died (too many workers?): training has --resume")
    returns, success, length = np.moveaxis(result, -1, 0)
    low, high = info["reference"]
    score = 100 * ((success if info["maze"] else returns) - low) / (high - low)
    metrics = {"eval/score": score, "eval/return": returns, "eval/episode_length": length}
    return metrics | ({"eval/success": success} if info["maze"] else {})


def start_worker(on_interrupt):
    """In a worker: what Ctrl-C does, and it ends with the process that started it, even if that is killed."""

    def follow():
        multiprocessing.parent_process().join()
        os._exit(1)

    signal.signal(signal.SIGINT, on_interrupt)
    threading.Thread(target=follow, daemon=True).start()


def start_workers(workers, on_interrupt):
    """Processes of one thread each, started when first used; on_interrupt: what they do at Ctrl-C."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for their NumPy; this process has read it already
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, spawn, start_worker, (on_interrupt,))


def read(path, remedy, device="cpu"):
    """The dictionary that save wrote; exits with one line if the file is damaged or foreign, and runs no code of it."""
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("checksum")  # torch.load itself compares none
        content = torch.load(path, map_location=device, weights_only=True)
        return dict(content)
    except Exception as e:  # whatever such a file makes of them
        sys.exit(f"error: {path} cannot be read, damaged or foreign ({type(e).__name__}): {remedy}")


def load_artifact(path, stage, remedy):
    """A stage's artifact as a dictionary; exits with one line that names the remedy if path is not one."""
    if not Path(path).exists():
        sys.exit(f"error: {path} does not exist: {remedy} first")
    artifact = read(path, f"{remedy} again")
    found = artifact.get("stage"), artifact.get("format")
    if found != (stage, 3):
        sys.exit(f"error: {path} holds stage {found[0]}, format {found[1]}, not {stage}, format 3: {remedy}")
    return artifact


def select(weights, have, want, prefix=""):
    """The wanted seeds' part of an artifact's weights, whose leading axis holds one network per seed, or two."""
    index = [have.index(seed) for seed in want]
    weights = {name.removeprefix(prefix): x for name, x in weights.items() if name.startswith(prefix)}
    return {name: x.view(len(have), -1, *x.shape[1:])[index].flatten(0, 1) for name, x in weights.items()}


def checksum(weights):
    """Of an artifact's weights, the same on every machine."""
    crc = 0
    for x in weights.values():
        crc = zlib.crc32(x.numpy(), crc)
    return crc


def load_policy(path, replica=0):
    """A saved policy as act(obs) -> action on NumPy arrays, for one observation or a batch of them.

    replica: which of the artifact's seeds and betas, in the order of eval.py's table.
    Raises ValueError if there is no such artifact.
    """
    try:
        artifact = load_artifact(path, "actor", "run srpo_actor.py")
    except SystemExit as e:
        raise ValueError(e.code) from None  # here it is the caller who decides
    return make_act(policy_weights(artifact["weights"], replica), artifact)


def trace(make_act, weights, info, seeds):
    """A worker's job: one policy's ways through a maze, one per seed: the goal, the positions, and whether they met.

    Starts and goals are those of the scored episodes; a policy that samples draws other noise.
    """
    torch.manual_seed(seeds[0])
    act, ways = make_act(weights, info), []
    for seed in seeds:
        seen = []

        def watched(obs, seen=seen):
            seen.append(obs[0, :4].round(2).tolist())  # achieved and desired goal come first in the state
            return act(obs)

        ((_, success, _),) = rollout(watched, lambda: make_env(info["environment"]), [seed], maze=True)
        ways.append({"goal": seen[0][2:], "way": [position[:2] for position in seen], "success": bool(success)})
    return ways


def record_video(make_act, weights, info, seed, folder, name):
    """A worker's job: one episode as folder/name-episode-0.mp4."""
    os.environ.setdefault("MUJOCO_GL", "egl")  # needs no screen
    sys.stderr = io.StringIO()  # libraries complain at length; what matters is raised
    torch.manual_seed(seed)
    environment = info["environment"] | {"kwargs": info["environment"]["kwargs"] | {"render_mode": "rgb_array"}}
    filmed = partial(gym.wrappers.RecordVideo, video_folder=folder, name_prefix=name, disable_logger=True)
    rollout(make_act(weights, info), lambda: filmed(make_env(environment)), [seed], info["maze"])


POLICIES = ("behavior", "idql", "srpo")
CHAINS = {  # evaluations of the network per action and candidates, as in the papers or released code
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
    calls = {
        "srpo": (None, None, policy),
        "srpo, act(obs) in NumPy": (None, None, lambda s: act(s[0].numpy(force=True))),
    }
    for name, (k, n) in ({"idql": (steps, candidates), "behavior": (steps, 1)} | CHAINS).items():
        calls[name] = k, n, partial(sample_best, behavior, q_target, candidates=n, steps=k)
    rows = []
    for name, (k, n, call) in calls.items():
        row = {"policy": name, "steps": k, "candidates": n}
        for s in states:
            timer = Timer("call(s)", globals={"call": call, "s": s}, num_threads=torch.get_num_threads())
            row[f"us_batch_{s.shape[1]}"] = timer.blocked_autorange(min_run_time=0.3).median * 1e6 / s.shape[1]
        with FlopCounterMode(display=False) as counter:
            (policy if k is None else call)(states[0])
        rows.append(row | {"flops": counter.get_total_flops()})
    return rows


def print_latency(rows, device):
    """The same as a table."""
    print(f"{device}: microseconds per action, for 1 and for 20 states at once, and FLOPs; also as multiples of SRPO's")
    print(f"{'policy':>24} {'steps':>5} {'candidates':>10} {'us, 1':>15} {'us, 20':>15} {'FLOPs':>20}")
    for row in rows:
        line = f"{row['policy']:>24} {row['steps'] or '-':>5} {row['candidates'] or '-':>10}"
        for name, form in ("us_batch_1", "8.1f"), ("us_batch_20", "8.1f"), ("flops", "13,d"):
            line += f" {row[name]:{form}} {row[name] / rows[0][name]:6.3g}"
        print(line)


def make_table(folders):
    """Rows like those of the paper's Table 1: one per scored run, then the mean per domain.

    Of several betas, the one of highest mean score stands for SRPO, as in the paper.
    """
    rows, domains = [], {}
    for folder in sorted(folders, key=lambda folder: folder.name):
        content = json.loads((folder / "eval.json").read_text())
        row = {"run": folder.name, "data": content["data_score"], "steps": content["steps"]}
        for best in sorted(content["summary"], key=lambda found: found["score_mean"]):
            row |= {best["policy"]: best["score_mean"], f"{best['policy']}_std": best["score_std"]}
            row |= {name: best[name] for name in ("beta", "seeds") if best["policy"] == "srpo"}
        rows.append(row)
        domains.setdefault(content["env"].partition("-")[0], []).append(row)
    for domain, members in domains.items():
        names = [name for name in ("data", *POLICIES) if all(name in row for row in members)]
        means = {name: float(np.mean([row[name] for row in members])) for name in names}
        rows.append({"run": f"{domain}: mean of {len(members)}", **means})
    return rows


def write_table(rows, path):
    """The rows as path.csv and, like a paper's, path.md, which is printed."""
    names = ["run", "data", *POLICIES, "beta", "seeds", "steps"]

    def cell(row, name):
        std = f" ± {row[f'{name}_std']:.1f}" if f"{name}_std" in row else ""
        return f"{row[name]:.1f}{std}" if name in ("data", *POLICIES) and name in row else str(row.get(name, ""))

    lines = ["| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names)]]
    lines += ["| " + " | ".join(cell(row, name) for name in names) + " |" for row in rows]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, names + [f"{name}_std" for name in POLICIES])
        writer.writeheader()
        writer.writerows(rows)
    print(*lines, f"saved {path}.md and {path}.csv", sep="\n")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.table:
        folders = [folder for folder in args.table if folder.is_dir()]  # runs/* may hold the last table
        scored = [folder for folder in folders if (folder / "eval.json").exists()]
        if missing := [str(folder) for folder in folders if folder not in scored]:
            print(f"left out, not scored by eval.py yet: {', '.join(missing)}")
        if not scored:
            sys.exit("error: --table found no eval.json: name folders of runs that eval.py has scored, such as runs/*")
        Path(args.out_dir).mkdir(parents=True, exist_ok=True)
        write_table(make_table(scored), Path(args.out_dir, "table"))
        sys.exit(0)
    if args.env is None:
        sys.exit("error: --env is missing: name the task that was trained")
    for name, least in {"episodes": 0, "workers": 1, "candidates": 1, "sampler_steps": 1}.items():
        if getattr(args, name) < least:
            sys.exit(f"error: --{name.replace('_', '-')} {getattr(args, name)}: must be {least} or more")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but PyTorch finds no CUDA device: use --device cpu or install a CUDA build")
    name = args.run_name or args.env.replace("/", "-")
    folders = [Path(args.out_dir, name), Path(args.out_dir, name.removesuffix("-v2"))]  # as the stages name it
    folder = next((folder for folder in folders if folder.exists()), folders[0])
    artifact = load_artifact(folder / "actor.pt", "actor", f"run `python srpo_actor.py --env {args.env}`")
    if not artifact["environments"]:
        sys.exit(f"error: the data of {args.env} name no environment to evaluate in: record them with one")
    args.eval_env = args.eval_env or artifact["args"]["eval_env"]
    environment = artifact["environments"][args.eval_env]
    check_env(environment, artifact)

    seeds, betas = artifact["seeds"], artifact["betas"]
    weights = [policy_weights(artifact["weights"], r) for r in range(len(seeds))]
    policies = {"srpo": (make_act, list(zip(seeds, betas, weights)))}
    if args.latency or set(args.policy) != {"srpo"}:
        frozen, unique = [], list(dict.fromkeys(seeds))  # one behaviour model and one pair of target Qs per seed
        for stage, prefix in ("behavior", ""), ("critic", "q_target."):
            path = artifact["args"][stage] or folder / f"{stage}.pt"
            there = load_artifact(path, stage, f"run `python srpo_{stage}.py --env {args.env}`")
            if checksum(there["weights"]) != artifact["sources"][stage]:
                sys.exit(f"error: {path} is not what the policy was trained on: run `python srpo_actor.py` again")
            networks = [select(there["weights"], there["seeds"], [seed], prefix) for seed in unique]
            frozen.append([{name: x.numpy() for name, x in network.items()} for network in networks])
        replicas = [(seed, None, networks) for seed, networks in zip(unique, zip(*frozen))]
        for name, candidates in ("idql", args.candidates), ("behavior", 1):
            make = partial(make_sampling_act, candidates=candidates, steps=args.sampler_steps)
            policies[name] = make, replicas

    info = {name: x for name, x in artifact.items() if name != "weights"}  # tensors must not go between processes
    info |= {"environment": environment}
    device = "cuda" if args.device == "auto" and torch.cuda.is_available() else args.device.replace("auto", "cpu")

    where = environment["id"] + (f" ({args.eval_env})" if info["maze"] else "")
    where += f"; the data's own score: {info['data_score']:.1f}"
    if args.episodes:
        print(f"{info['env']}, {args.episodes} episodes per policy in {where}")
    test = range(1_000_000, 1_000_000 + args.episodes)  # seeds far from those watched in training
    rows, ways = [], []
    with start_workers(args.workers, signal.SIG_DFL) as pool:
        for name in args.policy if test else ():
            make, replicas = policies[name]
            result = evaluate(pool, make, [one for *_, one in replicas], info, environment, test)
            table = {metric.split("/")[1]: x.mean(axis=-1) for metric, x in result.items()}
            if not rows:
                print(" ".join(f"{column:>14}" for column in ("policy", "seed", "beta", *table)))
            traces = [pool.submit(trace, make, one, info, test[:5]) for *_, one in replicas if info["maze"]]
            for r, (seed, beta, _) in enumerate(replicas):
                row = {metric: float(column[r]) for metric, column in table.items()}
                print(f"{name:>14} {seed:14d} {beta or '-':>14} " + " ".join(f"{x:14.2f}" for x in row.values()))
                rows.append({"policy": name, "seed": seed, "beta": beta, **row})
            for (seed, beta, _), job in zip(replicas, traces):
                ways += [{"policy": name, "seed": seed, "beta": beta, **episode} for episode in job.result()]
    summary = []
    for name, beta in dict.fromkeys((row["policy"], row["beta"]) for row in rows):
        score = [row["score"] for row in rows if (row["policy"], row["beta"]) == (name, beta)]
        summary.append({"policy": name, "beta": beta, "score_mean": np.mean(score), "score_std": np.std(score)})
        summary[-1]["seeds"] = len(score)
        label = name if beta is None else f"{name}, beta {beta:g}"
        print(f"{label}: score {np.mean(score):.1f} +- {np.std(score):.1f} (mean +- std over {len(score)} seed(s))")

    if rows:
        content = {name: info[name] for name in ("env", "data_score")} | {"steps": info["args"]["steps"]}
        content |= {name: getattr(args, name) for name in ("episodes", "eval_env", "candidates", "sampler_steps")}
        (folder / "eval.json").write_text(json.dumps(content | {"policies": rows, "summary": summary}, indent=1) + "\n")
        print(f"saved {folder / 'eval.json'}")
    if ways:
        maze = make_env(environment).unwrapped.maze
        cells = np.argwhere([[cell == 1 for cell in row] for row in maze.maze_map])
        walls = [maze.cell_rowcol_to_xy(cell).tolist() for cell in cells]
        content = {"cell": maze.maze_size_scaling, "walls": walls, "ways": ways}
        (folder / "trajectories.json").write_text(json.dumps(content) + "\n")
        print(f"saved {folder / 'trajectories.json'}")

    if args.latency:
        behavior, q_target = (network.to(device) for network in make_networks(policies["behavior"][1][0][-1], info))
        policy = mlp([info["state_dim"]] + [256] * info["hidden_layers"] + [info["action_dim"]], [torch.Generator()])
        policy.append(nn.Tanh()).to(device).requires_grad_(False)  # its weights do not matter here
        act = make_act(weights[0], info)
        table = measure_latency(policy, act, behavior, q_target, args.candidates, args.sampler_steps)
        where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        print_latency(table, where)
        content = {"env": info["env"], "device": where, "torch": torch.__version__, "rows": table}
        (folder / "latency.json").write_text(json.dumps(content, indent=1) + "\n")
        print(f"saved {folder / 'latency.json'}")

    if args.video:
        jobs, path = [], str(folder / "video")
        try:
            with start_workers(args.workers, signal.SIG_DFL) as pool:
                for name in args.policy:
                    make, replicas = policies[name]
                    for seed, beta, one in replicas:
                        label = f"{name}-seed{seed}" + ("" if beta is None else f"-beta{beta:g}")
                        jobs.append(pool.submit(record_video, make, one, info, test.start, path, label))
                for job in jobs:
                    job.result()
        except Exception as e:  # whatever a missing library makes of rendering
            reason = f"{type(e).__name__}: {e}".splitlines()[0]
            sys.exit(f"error: cannot render ({reason}): install EGL, on Debian `apt install libegl1 libgl1-mesa-dri`")
        print(f"saved {path}/*.mp4")
