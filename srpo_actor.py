"""Stage 3 of SRPO: a small deterministic policy, from the critic of stage 1 and the behaviour model of stage 2.

Score Regularized Policy Optimization (Chen et al., ICLR 2024): the policy climbs Q, while the score of the diffused
behaviour, which the frozen behaviour model knows, pulls its actions back to the data (Eq. 15). No sampling anywhere.

    python srpo_actor.py --env hopper-medium --beta 0.01 0.05    # -> runs/hopper-medium/actor.pt

Every tensor of the networks has a leading replica axis R: all seeds and betas train at once,
replica s K + k being the policy of seed s and the k-th of K betas.
"""

import contextlib
import ctypes
import difflib
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import warnings
import zipfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import h5py
import minari
import mujoco
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from minari.storage import get_dataset_path
from tqdm import tqdm


@dataclass
class Args:
    env: str
    """task of the paper (hopper-medium, antmaze-umaze, ...) or id of a Minari data set"""
    dataset: str | None = None
    """train on this instead: Minari ids joined with +, or an original D4RL file (.hdf5)"""
    run_name: str | None = None
    """files go to <out-dir>/<run-name> (default: the task's name)"""
    out_dir: str = "runs"
    """where the runs are kept"""
    seed: int | None = None
    """first seed (default: all seeds that both artifacts hold); it names the initial weights, see srpo_critic.py"""
    num_seeds: int | None = None
    """seeds trained at once: seed, seed + 1, ..."""
    critic: str | None = None
    """artifact of stage 1 (default: critic.pt in the run's folder)"""
    behavior: str | None = None
    """artifact of stage 2 (default: behavior.pt in the run's folder)"""
    beta: tuple[float, ...] = ()
    """temperature of Eq. 15, or several: each trains its own policy (default: the paper's for the task)"""
    weight: str = "sigma2"
    """w(t) of Eq. 15: sigma2, one, alpha_over_sigma; or t=T: a single time T, weight alpha_T / sigma_T"""
    baseline: bool = True
    """subtract eps in Eq. 15, which leaves its mean alone"""
    q_grad_norm: Literal["none", "rms", "l2"] | None = None
    """divide Q's gradient by this norm of itself (default: the paper's for the task)"""
    hidden_layers: int | None = None
    """hidden layers of the policy (default: the paper's for the task)"""
    steps: int = 1_000_000
    """gradient steps"""
    batch_size: int = 256
    """states per step and replica"""
    lr: float = 3e-4
    """learning rate of Adam, on a cosine to 0 at the last step"""
    eval_every: int = 50_000
    """steps between evaluations (0: never)"""
    eval_episodes: int = 20
    """episodes per evaluation and replica"""
    eval_workers: int = os.cpu_count()
    """processes that evaluate"""
    eval_env: Literal["fixed", "data"] = "fixed"
    """mazes: from one start to one goal as in D4RL, or with starts and goals drawn as in the recording"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto takes CUDA when there is one"""
    graph: bool = True
    """on CUDA, record the update as one graph; --no-graph runs it eagerly"""
    tf32: bool = True
    """TF32 matrix products on CUDA"""
    resume: bool = False
    """go on from the last checkpoint, if there is one"""
    checkpoint_every: int = 50_000
    """steps between checkpoints"""
    log_every: int = 1_000
    """steps between log lines"""
    track: bool = False
    """log to Weights & Biases, one run per replica"""
    wandb_project_name: str = "srpo"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team"""


STAGE = "actor"
METRICS = ("losses/actor_loss", "values/q_mean", "values/q_grad_norm")
DIVERGED = "--q-grad-norm rms, as on AntMaze (Figure 13), or a lower --lr or --beta"
MAY_CHANGE = {
    "critic",
    "behavior",
    "out_dir",
    "run_name",
    "graph",
    "resume",
    "checkpoint_every",
    "eval_workers",
    "track",
}  # on resuming


class Task(NamedTuple):
    data: str  # Minari ids; it has no medium-replay sets
    beta: float
    expectile: float = 0.7
    hidden_layers: int = 2
    q_grad_norm: str = "none"


TASKS = {  # Appendix C and Table 2 of the paper
    "halfcheetah-medium-expert": Task("mujoco/halfcheetah/medium-v0+mujoco/halfcheetah/expert-v0", 0.01),
    "halfcheetah-medium": Task("mujoco/halfcheetah/medium-v0", 0.2),
    "halfcheetah-medium-replay": Task("", 0.2),
    "hopper-medium-expert": Task("mujoco/hopper/medium-v0+mujoco/hopper/expert-v0", 0.01),
    "hopper-medium": Task("mujoco/hopper/medium-v0", 0.05),
    "hopper-medium-replay": Task("", 0.2),
    "walker2d-medium-expert": Task("mujoco/walker2d/medium-v0+mujoco/walker2d/expert-v0", 0.1),
    "walker2d-medium": Task("mujoco/walker2d/medium-v0", 0.05),
    "walker2d-medium-replay": Task("", 0.5),
    "antmaze-umaze": Task("D4RL/antmaze/umaze-v1", 0.02, 0.9, 4, "rms"),
    "antmaze-umaze-diverse": Task("D4RL/antmaze/umaze-diverse-v1", 0.04, 0.9, 4, "rms"),
    "antmaze-medium-play": Task("D4RL/antmaze/medium-play-v1", 0.08, 0.9, 4, "rms"),
    "antmaze-medium-diverse": Task("D4RL/antmaze/medium-diverse-v1", 0.05, 0.9, 4, "rms"),
    "antmaze-large-play": Task("D4RL/antmaze/large-play-v1", 0.06, 0.9, 4, "rms"),
    "antmaze-large-diverse": Task("D4RL/antmaze/large-diverse-v1", 0.05, 0.9, 4, "rms"),
}
OTHER_TASK, OTHER_MAZE = Task("", 0.05), Task("", 0.05, 0.9, 4, "rms")  # ours, for any other data set
D4RL_SCORES = {  # returns that score 0 and 100: a random and an expert policy's
    "Hopper": (-20.272305, 3234.3),
    "HalfCheetah": (-280.178953, 12135.0),
    "Walker2d": (1.629008, 4592.3),
}
UMAZE = [[1, 1, 1, 1, 1], [1, "g", 0, 0, 1], [1, 1, 1, 0, 1], [1, "r", 0, 0, 1], [1, 1, 1, 1, 1]]  # r: start, g: goal


def flatten(obs):
    """One float32 vector per observation; a dictionary's parts are joined in the order of their sorted keys."""
    if isinstance(obs, dict):
        return np.concatenate([flatten(obs[key]) for key in sorted(obs)], axis=-1)
    return np.asarray(obs, np.float32)


def reached(obs):
    """Whether maze observations are at their goal, by the distance that the environments call success."""
    return np.linalg.norm(obs["achieved_goal"] - obs["desired_goal"], axis=-1) <= 0.45


def leaves(space):
    """The plain spaces inside a nested dictionary space."""
    return [leaf for part in space.values() for leaf in leaves(part)] if isinstance(space, gym.spaces.Dict) else [space]


def environments(data, fixed):
    """Where to evaluate: "data", where the data were recorded, or "fixed", there with one start and one goal.

    data, fixed: specifications from a data set's metadata, of which id, keyword arguments and step limit are taken.
    """
    no_goals = [[cell if cell == 1 else 0 for cell in row] for row in UMAZE]  # the map of umaze-diverse
    if data["kwargs"].get("maze_map") in (UMAZE, no_goals):
        fixed = data | {"kwargs": data["kwargs"] | {"maze_map": UMAZE}}  # Minari's fixed map has other walls
    limit = {"max_episode_steps": data["max_episode_steps"]}
    specs = {"data": data, "fixed": fixed or data}
    return {name: {"id": spec["id"], "kwargs": spec["kwargs"]} | limit for name, spec in specs.items()}


def open_minari(ids, env):
    """Episodes of Minari data sets, and what load_dataset's info takes from their metadata."""
    try:
        for path in (Path(get_dataset_path(id), "data", "metadata.json") for id in ids):
            # Minari would ask an environment for its spaces, whatever code its specification names
            if path.exists() and not {"observation_space", "action_space"} <= json.loads(path.read_text()).keys():
                sys.exit(f"error: {path} names no spaces: record the data anew")
        sets = [minari.load_dataset(id) for id in ids]
    except (OSError, ValueError) as e:
        near = " or ".join(difflib.get_close_matches(env, [*TASKS, *minari.list_local_datasets()]))
        hint = "" if env in TASKS else f", or did you mean {near or 'a task of the paper'}?"
        fetch = " && ".join(f"minari download {id}" for id in ids)
        sys.exit(f"error: {str(e).partition('. ')[0]}: run `{fetch}`, or copy it there{hint}")
    spaces = sets[0].action_space, sets[0].observation_space
    for space in [spaces[0], *leaves(spaces[1])]:
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            sys.exit(f"error: {env} has a space {space}: only vectors of real numbers are supported")
    robots = {json.loads(d.storage.metadata.get("env_spec", "{}")).get("id") for d in sets}
    if len(robots) > 1 or any((d.action_space, d.observation_space) != spaces for d in sets):
        sys.exit(f"error: {'+'.join(ids)} differ in spaces or robot: only data sets of one environment can be joined")
    low, high = spaces[0].low, spaces[0].high
    if not np.isfinite(high - low).all() or not (low < high).all():
        sys.exit(f"error: {env} has actions from {low} to {high}: give its data set the bounds that a policy must keep")
    meta = sets[0].storage.metadata
    spec, fixed = (json.loads(meta.get(key, "null")) for key in ("env_spec", "eval_env_spec"))
    goals = isinstance(spaces[1], gym.spaces.Dict) and {"achieved_goal", "desired_goal"} <= set(spaces[1])
    maze = spec is not None and "Maze" in spec["id"] and goals
    reference = (0.0, 1.0) if maze else (meta.get("ref_min_score"), meta.get("ref_max_score"))  # mazes: success rate
    if None in reference:
        reference = D4RL_SCORES.get(spec["id"].partition("-")[0] if spec else None, (0.0, 100.0))  # else the return
    episodes = (d[i] for d in sets for i in range(len(d)))  # iterating keeps 50 kB per episode in HDF5's cache
    return episodes, {
        "environments": spec and environments(spec, fixed),
        "maze": maze,
        "action_low": low.tolist(),
        "action_high": high.tolist(),
        "reference": reference,  # the outcomes that score 0 and 100
    }


def open_d4rl(path, env):
    """The same two of an original D4RL file, the episodes with the transitions that D4RL's qlearning_dataset takes.

    The next row is the next observation; a time-out and the file's last row have none, so these steps will be lost.
    """
    robot = next((robot for robot in D4RL_SCORES if env.startswith(f"{robot.lower()}-")), None)
    named = [robot for robot in D4RL_SCORES if Path(path).name.startswith(robot.lower())]
    if named and named != [robot] and (robot or env in TASKS):
        sys.exit(f"error: {path} holds no data of {env}: give the file of the task")
    names = ("observations", "actions", "rewards", "terminals", "timeouts")
    try:
        with h5py.File(path) as file:
            if "infos/goal" in file:
                sys.exit(f"error: {path} has no goals in its observations: use Minari's set of the maze, no --dataset")
            if missing := [name for name in names if name not in file]:
                sys.exit(f"error: {path} has no {', '.join(missing)}: give a file like D4RL's, with {', '.join(names)}")
            obs, action, reward, terminal, timeout = (file[name][:] for name in names)
    except (OSError, TypeError, ValueError) as e:
        sys.exit(f"error: {path} cannot be read as HDF5 ({type(e).__name__}): give a file of D4RL")
    reward, terminal, timeout = reward.ravel(), terminal.ravel() > 0, timeout.ravel() > 0  # older files vary
    if (obs.ndim, action.ndim) != (2, 2) or len({len(x) for x in (obs, action, reward, terminal, timeout)}) > 1:
        sys.exit(f"error: {path} has columns of other shapes than D4RL's: give one row per step in {', '.join(names)}")
    timeout[-1:] = True
    episodes = []
    for start, end in itertools.pairwise([0, *np.flatnonzero(terminal | timeout) + 1]):
        columns = action[start:end], reward[start:end], terminal[start:end], timeout[start:end]
        episodes.append(minari.EpisodeData(start, obs[start : end + 1 - timeout[end - 1]], *columns, infos={}))
    spec = robot and {"id": f"{robot}-v5", "kwargs": {}, "max_episode_steps": 1000}  # D4RL's own is gone
    return episodes, {
        "environments": spec and {"data": spec, "fixed": spec},
        "maze": False,
        "action_low": [-1.0] * action.shape[1],
        "action_high": [1.0] * action.shape[1],
        "reference": D4RL_SCORES.get(robot, (0.0, 100.0)),
    }


def load_dataset(env, dataset, device):
    """Logged transitions of one or several Minari data sets, or of an original D4RL file.

    Returns data, float32 tensors on the device: obs [N, S], action [N, A] in [-1, 1], reward [N] (scaled as in the
    paper), next_obs [N, S], terminal [N] (0 at a time-out); and info, what the other stages must know of the task.
    Exits with one line if there are no such data or they do not suit.
    """
    other = re.sub(r"^(halfcheetah|hopper|walker2d)-(\w+?)(-v2)?$", r"mujoco/\1/\2-v0", env)  # such as hopper-expert
    source = dataset or (TASKS[env].data if env in TASKS else other)
    if not source:
        file = f"{env.replace('-', '_')}-v2.hdf5"
        sys.exit(f"error: Minari has no data set for {env}: get D4RL's and name it in every stage, --dataset {file}")
    episodes, about = open_d4rl(source, env) if source.endswith(".hdf5") else open_minari(source.split("+"), env)
    low, high = np.float32(about["action_low"]), np.float32(about["action_high"])
    columns, recorded = [], []
    for episode in episodes:
        obs, terminal = flatten(episode.observations), episode.terminations
        T = len(obs) - 1
        if about["maze"]:  # the recording goes on after success, the task ends there
            terminal = reached(episode.observations)[1:]
            T = terminal.argmax() + 1 if terminal.any() else T
        action = 2 * (episode.actions[:T] - low) / (high - low) - 1
        columns.append((obs[:T], action, episode.rewards[:T], obs[1 : T + 1], terminal[:T]))
        recorded.append((len(episode), episode.rewards.sum(), episode.terminations.sum(), terminal.any()))
    if not sum(len(action) for _, action, *_ in columns):
        sys.exit(f"error: {source} is empty: give a data set with transitions in it")
    columns = [np.concatenate(column, dtype=np.float32) for column in zip(*columns)]
    data = dict(zip(("obs", "action", "reward", "next_obs", "terminal"), columns))
    for name, column in data.items():
        if len(column) != len(data["obs"]):
            sys.exit(f"error: {source} lacks some of its {name}: an episode has T of them, and T + 1 observations")
        if not np.isfinite(column).all():
            sys.exit(f"error: {source} has values in {name} that are not finite: repair or leave out their episodes")
    steps, returns, terminations, success = np.transpose(recorded)
    for environment in (about["environments"] or {}).values():  # one without a limit is left after the longest episode
        environment["max_episode_steps"] = environment["max_episode_steps"] or int(steps.max())
    if about["maze"]:
        data["reward"] -= 1
    elif returns.max() > returns.min():
        data["reward"] *= 1000 / (returns.max() - returns.min())

    N, checksum = len(data["obs"]), 0
    for column in columns:
        checksum = zlib.crc32(column, checksum)
    outcome, (worst, best) = success if about["maze"] else returns, about["reference"]
    info = {
        "env": env,
        **about,
        "state_dim": data["obs"].shape[1],
        "action_dim": len(low),
        "data_score": 100 * (float(outcome.mean()) - worst) / (best - worst),
        "fingerprint": [N, checksum],
    }
    print(f"{env}: {len(steps):,} episodes, {steps.sum():,.0f} steps, {terminations.sum():,.0f} terminations,", end=" ")
    print(f"mean return {returns.mean():.2f} ({returns.min():.1f} to {returns.max():.1f}),", end=" ")
    print(f"score {info['data_score']:.1f}; {N:,} usable transitions.", end=" ")
    print("Defaults:", "the paper's" if env in TASKS else "ours, the paper has none for this name")
    return {name: torch.from_numpy(column).to(device) for name, column in data.items()}, info


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


WEIGHTS = {
    "sigma2": lambda alpha, sigma: sigma**2,
    "one": lambda alpha, sigma: torch.ones_like(sigma),
    "alpha_over_sigma": lambda alpha, sigma: alpha / sigma,
}


def actor_loss(policy, q, eps_psi, s, t, eps, beta, w, baseline, q_grad_norm):
    """Its gradient is Eq. 15 times -beta, the gradient of Eq. 14's surrogate.

    s [R, B, S], t [R, B, 1], eps [R, B, A], beta [R, 1, 1]; q(s, a) -> [R, B] and eps_psi(a_t, s, t) -> [R, B, A] are
    frozen. Returns the loss [R], Q [R, B] and the norm of its gradient [R, B, 1].
    """
    a = policy(s)
    alpha, sigma = alpha_sigma(t)
    with torch.no_grad():
        eps_hat = eps_psi(alpha * a + sigma * eps, s, t)
    leaf = a.detach().requires_grad_()
    value = q(s, leaf)
    g = torch.autograd.grad(value.sum(), leaf)[0]  # grad_a Q(s, a) at a = policy(s)
    norm = g.norm(dim=-1, keepdim=True)
    if q_grad_norm == "l2":
        g = g / (norm + 1e-8)
    elif q_grad_norm == "rms":
        g = g / (norm / a.shape[-1] ** 0.5 + 1e-8)
    bracket = w(alpha, sigma) * (eps_hat - eps if baseline else eps_hat) - beta * g
    return (bracket.detach() * a).sum(dim=-1).mean(dim=-1), value.detach(), norm


def make_update(args, policy, q_target, behavior, optimizer, beta, draw, window, done):
    """The training step, a closure without arguments that stays on the device; draw() gives states, times and noise.

    done, a tensor like window, counts the steps: the learning rate depends on it.
    """
    w = WEIGHTS.get(args.weight, WEIGHTS["alpha_over_sigma"])  # t=T: Section 4.2
    S = len(beta) // len(args.beta)  # seeds

    def fold(x):  # [R, B, n] -> [S, K B, n]: the K betas of a seed share its frozen networks
        return x.reshape(S, -1, x.shape[-1])

    def q(s, a):
        return q_target(fold(s), fold(a)).mean(dim=1).view(a.shape[:-1])  # the mean of both target heads

    def eps_psi(a_t, s, t):
        return behavior(fold(a_t), fold(s), fold(t)).view_as(a_t)

    def update():
        optimizer.zero_grad(set_to_none=True)
        optimizer.param_groups[0]["lr"].copy_(args.lr * (1 + torch.cos(torch.pi * done / args.steps)) / 2)
        done.add_(1)
        loss, value, norm = actor_loss(policy, q, eps_psi, *draw(), beta, w, args.baseline, args.q_grad_norm)
        loss.sum().backward()  # replicas share no parameters
        optimizer.step()
        with torch.no_grad():
            window.add_(torch.stack([loss, value.mean(dim=-1), norm.mean(dim=(1, 2))]))

    return update


def capture(update, optimizer, *tensors):
    """update recorded as one CUDA graph: a replay is one launch, where eager PyTorch pays for hundreds of small ones.

    tensors: all that update changes, besides the optimizer's state. The graph keeps to them: load a checkpoint before.
    """

    def state():
        return [*tensors, *(x for moments in optimizer.state.values() for x in moments.values())]

    before, rng, stream = [x.clone() for x in state()], torch.cuda.get_rng_state(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):  # the first calls choose kernels and make the optimizer's state, which must not be recorded
            update()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        update()
    with torch.no_grad():  # none of these steps was training
        for x, value in itertools.zip_longest(state(), before):
            x.zero_() if value is None else x.copy_(value)  # a new optimizer's state begins at zero
    torch.cuda.set_rng_state(rng)
    return graph.replay


def sample(data, replicas, batch_size):
    """Rows of data drawn with replacement, for each replica its own: list of [R, B, ...]."""
    x = next(iter(data.values()))
    index = torch.randint(len(x), (replicas, batch_size), device=x.device)
    return [x[index] for x in data.values()]


def sample_noise(shape, t_min, t_max, device):
    """Times, uniform [R, B, 1], and standard normal noise [R, B, A], the given shape."""
    return torch.empty(*shape[:2], 1, device=device).uniform_(t_min, t_max), torch.randn(shape, device=device)


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


def setup(args):
    """Refuse numbers that make no sense, fill in the run's name and the device; returns the device."""
    for name, value in vars(args).items():
        for x in value if isinstance(value, tuple) else (value,):
            least = 0 if name in ("seed", "eval_every") else 1e-12
            if type(x) in (int, float) and not least <= x < float("inf"):
                sys.exit(f"error: --{name.replace('_', '-')} {x}: must be {'positive' if least else '0 or more'}")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but PyTorch finds no CUDA device: use --device cpu or install a CUDA build")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and args.tf32:
        torch.set_float32_matmul_precision("high")
    libc = ctypes.CDLL(None) if args.device == "cpu" and sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # glibc gives large tensors' memory back to the system; page faults bring it again
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    if args.env.removesuffix("-v2") in TASKS:
        args.env = args.env.removesuffix("-v2")
    args.run_name = args.run_name or args.env.replace("/", "-")
    return torch.device(args.device)


def save(content, path):
    """Written beside and renamed, so that a crash leaves the previous file whole."""
    try:
        torch.save(content, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)
    except (OSError, RuntimeError) as e:
        Path(f"{path}.tmp").unlink(missing_ok=True)
        reason = f"{type(e).__name__}: {e}".splitlines()[0]
        sys.exit(f"error: cannot write {path} ({reason}): make room, then go on from the last checkpoint with --resume")


def read(path, remedy, device="cpu"):
    """The dictionary that save wrote; exits with one line if the file is damaged or foreign, and runs no code of it."""
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("checksum")  # torch.load itself compares none
        content = torch.load(path, map_location=device, weights_only=True)
        return dict(content)
    except Exception as e:  # whatever such a file makes of them
        sys.exit(f"error: {path} cannot be read, damaged or foreign ({type(e).__name__}): {remedy}")


def set_aside(path):
    """A file of an earlier run gets its date into its name; it is never overwritten."""
    if path.exists():
        date = time.strftime("%Y%m%d-%H%M%S", time.localtime(path.stat().st_mtime))
        print(f"{path} of an earlier run is kept as {path.rename(path.with_stem(f'{path.stem}-{date}')).name}")


def refuse_changes(path, then, args):
    """Exit with one line if an argument that matters is not what it was in the run that --resume goes on with."""
    for name, value in asdict(args).items():
        if name not in MAY_CHANGE and not name.startswith("wandb_") and then.get(name) != value:
            was = f"{name} = {then.get(name)}, not {value}"
            sys.exit(f"error: {path} was written with {was}: give the same to resume it")


def open_run(args, info):
    """The run's folder, made ready for a new run; with --resume what is there stays, and a finished run ends here."""
    folder = Path(args.out_dir, args.run_name)
    artifact, checkpoint, log = (folder / f"{STAGE}.{suffix}" for suffix in ("pt", "ckpt", "jsonl"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        sys.exit(f"error: cannot write to {folder}: name another place with --out-dir")
    if not args.resume:
        for path in (artifact, checkpoint, log):
            set_aside(path)
    elif artifact.exists() and not checkpoint.exists():
        finished = read(artifact, "train again without --resume")
        refuse_changes(artifact, finished.get("args", {}), args)
        if (steps := finished.get("args", {}).get("steps")) != args.steps:
            sys.exit(f"error: {artifact} was trained for {steps} steps, not {args.steps}: train again without --resume")
        if any(finished.get(name) != value for name, value in info.items()):
            sys.exit(f"error: {artifact} was made with other data or artifacts: train again without --resume")
        print(f"{artifact} is finished, nothing to resume")
        sys.exit(0)
    return folder


def save_checkpoint(path, args, info, step, model, optimizer, window):
    """All that the next step depends on."""
    rng = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if window.is_cuda else [])
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "window": window, "rng": rng}
    save({"args": asdict(args), "info": info, "step": step, **state}, path)


def load_checkpoint(path, args, info, model, optimizer, window):
    """Put everything back in place; returns the step to go on from."""
    state = read(path, "train again without --resume", window.device)
    refuse_changes(path, state.get("args", {}), args)
    if state.get("info") != info:
        sys.exit(f"error: {path} was written with other data or artifacts: resume with the same, or without --resume")
    if state["step"] > args.steps:
        sys.exit(f"error: {path} is at step {state['step']}, past --steps {args.steps}: give more steps to resume it")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    window.copy_(state["window"])
    torch.set_rng_state(state["rng"][0].cpu())
    if window.is_cuda:
        torch.cuda.set_rng_state(state["rng"][1].cpu())
    return state["step"]


def check_finite(step, metrics, model, replicas):
    """Exit with one line that names the replicas which have diverged, before a checkpoint or an artifact keeps them."""
    finite = [x.reshape(len(replicas), -1).isfinite().all(dim=1) for x in model.state_dict().values()]
    finite = torch.stack(finite).all(dim=0).tolist()
    finite = [all(values) for values in zip(finite, *np.isfinite(list(metrics.values())).tolist())]
    if not all(finite):
        which = [replica for replica, good in zip(replicas, finite) if not good]
        sys.exit(f"error: {STAGE} diverged by step {step:,} in {which}: start again with {DIVERGED}")


def catch_signals():
    """A list that Ctrl-C goes into, and SIGTERM, a cluster's last warning; the second one of them kills."""
    caught = []

    def note(number, frame):
        caught.append(signal.Signals(number).name)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return caught


class Logger:
    """<stage>.jsonl, one line per call, with one value per replica; with --track also one W&B run per replica."""

    def __init__(self, args, folder, replicas, step):
        path = folder / f"{STAGE}.jsonl"
        lines = path.read_text().splitlines(keepends=True) if step and path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # a killed run may have left half a line
        path.with_suffix(".tmp").write_text("".join(line for line in whole if json.loads(line)["step"] <= step))
        self.file = open(path.with_suffix(".tmp").replace(path), "a")
        self.replicas, self.start, self.runs = replicas, time.time(), []
        if args.track:
            import wandb

            where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "dir": folder}
            for replica in replicas:
                name = "-".join([args.run_name, STAGE] + [f"{key}{value}" for key, value in replica.items()])
                run = {"group": args.run_name, "job_type": STAGE, "name": name, "config": asdict(args) | replica}
                self.runs.append(wandb.init(**where, **run, reinit="create_new"))

    def log(self, step, metrics):
        """metrics: name -> list of one value per replica, or one value for all."""
        columns = {key: [replica[key] for replica in self.replicas] for key in self.replicas[0]}
        line = {"step": step, "seconds": round(time.time() - self.start, 2), **columns, **metrics}
        try:
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
        except OSError as e:
            sys.exit(f"error: cannot write {self.file.name} ({e}): make room, then go on with --resume")
        for i, run in enumerate(self.runs):
            row = {name: value[i] if isinstance(value, list) else value for name, value in metrics.items()}
            run.log(row, step=step)

    def close(self):
        self.file.close()
        for run in self.runs:
            run.finish()


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


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    device = setup(args)
    try:
        fixed_t = float(args.weight[2:]) if args.weight.startswith("t=") else 0
    except ValueError:
        fixed_t = 0
    t_range = (0.02, 0.98) if args.weight in WEIGHTS else (fixed_t, fixed_t)
    if not 0.001 <= t_range[0] < 1:
        sys.exit(f"error: --weight {args.weight}: must be {', '.join(WEIGHTS)} or t=T with 0.001 <= T < 1")
    data, info = load_dataset(args.env, args.dataset, device)
    data = {"obs": data["obs"]}
    S, A = info["state_dim"], info["action_dim"]
    task = TASKS.get(args.env, OTHER_MAZE if info["maze"] else OTHER_TASK)
    args.beta = args.beta or (task.beta,)
    args.q_grad_norm = args.q_grad_norm or task.q_grad_norm
    args.hidden_layers = args.hidden_layers or task.hidden_layers
    print(f"{args.steps:,} steps of {args.batch_size} on {device}, beta {args.beta}, weight {args.weight},", end=" ")
    print(f"norm of Q's gradient {args.q_grad_norm}, {args.hidden_layers} hidden layers")

    artifacts = {}
    for stage in ("critic", "behavior"):
        path = getattr(args, stage) or Path(args.out_dir, args.run_name, f"{stage}.pt")
        remedy = f"run `python srpo_{stage}.py --env {args.env}`"
        artifacts[stage] = load_artifact(path, stage, remedy)
        for name in ("env", "state_dim", "action_dim", "action_low", "action_high", "fingerprint"):
            there, here = artifacts[stage][name], info[name]
            if there != here:
                sys.exit(f"error: {path} was trained with {name} = {there}, the data now have {here}: {remedy}")
    have = {stage: artifact["seeds"] for stage, artifact in artifacts.items()}
    seeds = [seed for seed in have["critic"] if seed in have["behavior"]]
    if args.seed is not None or args.num_seeds is not None:
        seeds = list(range(args.seed or 0, (args.seed or 0) + (args.num_seeds or 1)))
    if not seeds or not set(seeds) <= set(have["critic"]) & set(have["behavior"]):
        remedy = f"run `python srpo_critic.py --env {args.env}` and srpo_behavior.py with --seed and --num-seeds"
        sys.exit(f"error: the artifacts hold seeds {have}, wanted are {seeds or 'some in both'}: {remedy}")
    sums = {stage: checksum(artifact["weights"]) for stage, artifact in artifacts.items()}
    info["sources"] = {"seeds": seeds} | sums  # a checkpoint goes with these networks alone

    if args.eval_every and not info["environments"]:
        print("the data set names no environment: no evaluation")
        args.eval_every = 0
    if args.eval_every:
        environment = info["environments"][args.eval_env]
        check_env(environment, info)

    torch.manual_seed(seeds[0])
    replicas = [{"seed": seed, "beta": beta} for seed in seeds for beta in args.beta]
    beta = torch.tensor([replica["beta"] for replica in replicas], device=device).view(-1, 1, 1)  # [R, 1, 1]
    generators = [torch.Generator().manual_seed(replica["seed"]) for replica in replicas]
    policy = mlp([S] + [256] * args.hidden_layers + [A], generators).append(nn.Tanh()).to(device)
    unused = [torch.Generator()] * len(seeds)  # the frozen networks' weights come from the artifacts
    q_target = TwinQ(S, A, unused).to(device).requires_grad_(False)
    q_target.load_state_dict(select(artifacts["critic"]["weights"], have["critic"], seeds, "q_target."))
    behavior = BehaviorModel(S, A, unused).to(device).requires_grad_(False).eval()  # no dropout
    behavior.load_state_dict(select(artifacts["behavior"]["weights"], have["behavior"], seeds))
    lr = torch.tensor(args.lr, device=device)  # on the device, where the update sets it
    fast = {"fused": True, "capturable": device.type == "cuda"}
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, **fast)
    window = torch.zeros(len(METRICS), len(replicas), device=device)  # sums over the steps since the last log line

    folder = open_run(args, info)
    for name in () if args.resume else ("eval.json", "latency.json", "trajectories.json"):
        set_aside(folder / name)  # they tell of an earlier run's policies
    checkpoint = folder / f"{STAGE}.ckpt"
    start = 0
    if args.resume and checkpoint.exists():
        start = load_checkpoint(checkpoint, args, info, policy, optimizer, window)
        print(f"resumed at step {start:,}")
    logger = Logger(args, folder, replicas, start)
    pool = start_workers(args.eval_workers, signal.SIG_IGN)  # the last checkpoint comes first
    done = torch.full((), float(start), device=device)

    def draw():
        (s,) = sample(data, len(replicas), args.batch_size)
        return s, *sample_noise((*s.shape[:2], A), *t_range, device)

    update = make_update(args, policy, q_target, behavior, optimizer, beta, draw, window, done)
    if args.graph and device.type == "cuda":
        update = capture(update, optimizer, window, done, *policy.state_dict().values())

    stop, clock = catch_signals(), time.time()
    with tqdm(total=args.steps, initial=start, desc=STAGE) as bar:
        for step in range(start + 1, args.steps + 1):
            update()
            metrics = {}
            if step % args.log_every == 0 or step == args.steps:
                metrics = dict(zip(METRICS, (window / (step % args.log_every or args.log_every)).tolist()))
                check_finite(step, metrics, policy, replicas)
                window.zero_()
                speed, clock = (step - bar.n) / (time.time() - clock), time.time()
                bar.set_postfix({name.split("/")[1]: f"{np.mean(x):.3g}" for name, x in metrics.items()}, refresh=False)
                bar.update(step - bar.n)
                metrics |= {"charts/SPS": speed, "charts/learning_rate": optimizer.param_groups[0]["lr"].item()}
            if args.eval_every and (step % args.eval_every == 0 or step == args.steps):
                began = time.time()
                policies = [policy_weights(policy.state_dict(), r) for r in range(len(replicas))]
                result = evaluate(pool, make_act, policies, info, environment, range(args.eval_episodes))
                metrics |= {name: x.mean(axis=-1).tolist() for name, x in result.items()}
                bar.set_description(f"{STAGE}, score {np.mean(metrics['eval/score']):.1f}")
                clock += time.time() - began  # charts/SPS is the training's speed
            if metrics:
                logger.log(step, metrics)
            if step < args.steps and (step % args.checkpoint_every == 0 or stop):
                check_finite(step, {}, policy, replicas)
                save_checkpoint(checkpoint, args, info, step, policy, optimizer, window)
            if stop and step < args.steps:
                sys.exit(f"stopped by {stop[0]} at step {step:,}: the same command with --resume goes on")
    pool.shutdown()

    labels = {f"{key}s": [replica[key] for replica in replicas] for key in ("seed", "beta")}
    labels |= {"hidden_layers": args.hidden_layers, "args": asdict(args)}
    artifact = {"stage": STAGE, "format": 3, **info, **labels, "weights": policy.state_dict()}
    set_aside(folder / f"{STAGE}.pt")
    save(artifact, folder / f"{STAGE}.pt")
    checkpoint.unlink(missing_ok=True)
    print(f"saved {folder / STAGE}.pt")
    logger.close()
