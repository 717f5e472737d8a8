"""Stage 3 of SRPO: a small deterministic policy, from the critic of stage 1 and the behaviour model of stage 2.

Score Regularized Policy Optimization (Chen et al., ICLR 2024): the policy maximises Q, and the frozen behaviour model
gives the score of the diffused behaviour (the gradient of its log density), which keeps actions near the data (Eq. 15).
All seeds and betas train at once: replica i K + k, on the leading axis R of every tensor, has seed i and beta k of K.

    python srpo_actor.py --env hopper-medium --beta 0.01 0.05    # writes runs/hopper-medium/actor.pt
"""

import json
import os
import re
import sys
import tempfile
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
import wandb
from gymnasium.vector.utils import batch_space, iterate
from joblib import Parallel, delayed, parallel_config
from minari.serialization import deserialize_space, serialize_space
from minari.storage import get_dataset_path, hosting
from tqdm import tqdm


@dataclass
class Args:
    env: str
    """D4RL task name (hopper-medium, antmaze-umaze, ...) or id of a Minari data set"""
    dataset: str | None = None
    """train on these data instead: Minari ids joined with +"""
    run_name: str | None = None
    """files are written to <out-dir>/<run-name> (default: the task's name)"""
    out_dir: str = "runs"
    """folder of all runs"""
    seed: int | None = None
    """first seed (default: all that both artifacts hold, or 0 if --num-seeds is given)"""
    num_seeds: int | None = None
    """number of seeds: seed, seed + 1, ...; one replica per seed and beta (default: 1 if --seed is given)"""
    critic: str | None = None
    """artifact of stage 1 (default: critic.pt in the run's folder)"""
    behavior: str | None = None
    """artifact of stage 2 (default: behavior.pt in the run's folder)"""
    beta: tuple[float, ...] = ()
    """weight of Q in Eq. 15; several values train one policy each (default: Table 2 of the paper, else 0.05)"""
    weight: Literal["sigma2", "one", "alpha_over_sigma"] = "sigma2"
    """omega(t) of Eq. 15"""
    t_range: tuple[float, float] = (0.02, 0.98)
    """diffusion times of Eq. 15 are uniform between these; equal ones give a single time, as in Eq. 10"""
    baseline: bool = True
    """subtract eps in Eq. 15, which reduces the variance of its gradient"""
    q_grad_norm: Literal["none", "rms", "l2"] | None = None
    """divide Q's gradient by its norm (default: none, and in mazes rms, as in the released code)"""
    hidden_layers: int | None = None
    """hidden layers of the policy (default: the paper's, 2, and 4 in mazes)"""
    steps: int = 1_000_000
    """gradient steps"""
    batch_size: int = 256
    """states per step and replica"""
    lr: float = 3e-4
    """learning rate of Adam, with cosine decay to 0 at the last step"""
    eval_every: int = 50_000
    """steps between evaluations (0: never)"""
    eval_episodes: int = 20
    """episodes per evaluation and replica"""
    eval_workers: int = os.cpu_count()
    """number of processes that evaluate"""
    eval_env: Literal["fixed", "data"] = "fixed"
    """in mazes: start and goal of the data set's evaluation environment (if it has one), or those of the data"""
    normalize_obs: tyro.conf.DisallowNone[bool | None] = None
    """standardise observations (default: off for D4RL's task names, as in the paper, and on for other data)"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto uses CUDA if there is a GPU"""
    graph: bool = True
    """on CUDA, record the update as one CUDA graph"""
    compile: bool = False
    """compile the update with torch.compile"""
    resume: bool = False
    """continue from the last checkpoint, if there is one"""
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
FILES = ("actor.*", "eval.json", "latency.json", "trajectories.json")  # of a run, moved aside by the next
MAY_CHANGE = """args out_dir run_name graph resume checkpoint_every track wandb_project_name wandb_entity
critic behavior eval_workers""".split()  # on --resume; sources stands for critic and behavior
BETAS = {  # Table 2
    "walker2d": {"medium-expert": 0.1, "medium": 0.05, "medium-replay": 0.5},
    "halfcheetah": {"medium-expert": 0.01, "medium": 0.2, "medium-replay": 0.2},
    "hopper": {"medium-expert": 0.01, "medium": 0.05, "medium-replay": 0.2},
    "antmaze": {"umaze": 0.02, "medium-play": 0.08, "large-play": 0.06}
    | {"umaze-diverse": 0.04, "medium-diverse": 0.05, "large-diverse": 0.05},
}
D4RL_SCORES = {"Hopper": (-20.272305, 3234.3), "HalfCheetah": (-280.178953, 12135.0), "Walker2d": (1.629008, 4592.3)}
UMAZE = [[1, 1, 1, 1, 1], [1, "g", 0, 0, 1], [1, 1, 1, 0, 1], [1, "r", 0, 0, 1], [1, 1, 1, 1, 1]]  # r: start, g: goal
BETA_0, BETA_1 = 0.1, 20.0  # of the noise schedule


def minari_ids(env):
    """The Minari ids of a task in D4RL's naming; any other name is an id itself."""
    domain, _, level = env.removesuffix("-v2").partition("-")
    if domain == "antmaze":
        return [f"D4RL/antmaze/{level}-v1"]
    if domain not in ("halfcheetah", "hopper", "walker2d"):
        return [env]
    levels = level.split("-")  # medium-expert: both
    return [f"mujoco/{domain}/{x}-v0" for x in levels] if "replay" not in levels else [f"D4RL/{domain}/{level}-v2"]


def open_dataset(id):
    """A Minari data set, downloaded if it is missing. Exits with one line if it cannot be had."""
    path, download = get_dataset_path(id), f"minari download {id} --force"
    command = "python examples/import_d4rl.py FILE.hdf5" if "-replay-v" in id else download  # from D4RL's file
    try:
        if not Path(path, "data").exists():
            hosting.download_dataset(id)
        if not {"observation_space", "action_space"} <= json.loads(Path(path, "data/metadata.json").read_text()).keys():
            raise ValueError("it names no spaces")  # Minari would make its environment, and so run code that it names
        dataset = minari.load_dataset(id)
        dataset[0]  # reads the file
        return dataset
    except Exception as e:
        sys.exit(f"error: no complete data set {id} ({e!r}): run `{command}`, or do so elsewhere and copy it to {path}")


def load_dataset(env, dataset, normalize_obs, device):
    """Logged transitions of a task, or of the Minari ids in dataset. Exits with one line if they are not supported.

    Returns data, float32 tensors on the device: obs [N, S], action [N, A] in [-1, 1], reward [N] (scaled as in the
    paper), next_obs [N, S], terminal [N] (0 at a truncation); and info, what the other stages must know of the task.
    """
    ids = dataset.split("+") if dataset else minari_ids(env)
    sets, source = [open_dataset(id) for id in ids], "+".join(ids)
    space, bounds, spec = sets[0].observation_space, sets[0].action_space, sets[0].env_spec
    if len({str((d.observation_space, d.action_space, d.env_spec and d.env_spec.id)) for d in sets}) > 1:
        sys.exit(f"error: {source} have different spaces or environments: only data of one environment can be joined")
    image = re.search(r'"uint8", "shape": \[\d+, \d+, \d+\]', serialize_space(space))
    if image or not space.is_np_flattenable or gym.spaces.flatdim(space) > 4096:
        sys.exit(f"error: {source} has images, or observations of variable size or over 4096 numbers: not supported")
    if not isinstance(bounds, gym.spaces.Box) or len(bounds.shape) != 1 or not bounds.is_bounded():
        sys.exit(f"error: {source} has actions that are not in a bounded one-dimensional Box: only these are supported")
    low, high = bounds.low, bounds.high
    maze = spec is not None and "Maze" in spec.id and "achieved_goal" in getattr(space, "spaces", ())

    columns, episodes, clipped = [], [], 0
    for episode in (d[i] for d in sets for i in range(len(d))):  # iterating over d would cache 50 kB per episode
        obs, terminal, T = episode.observations, episode.terminations, len(episode)
        rows = [gym.spaces.flatten(space, x) for x in iterate(batch_space(space, T + 1), obs)]
        rows = np.stack(rows, dtype=np.float32)
        if maze:  # the recording continues after success, which here terminates
            terminal = np.linalg.norm(obs["achieved_goal"] - obs["desired_goal"], axis=-1)[1:] <= 0.45
            T = terminal.argmax() + 1 if terminal.any() else T
        action = np.clip(episode.actions[:T], low, high)  # as simulators do
        clipped += (action != episode.actions[:T]).any(axis=1).sum()
        action = 2 * (action - low) / (high - low) - 1
        columns.append((rows[:T], action, episode.rewards[:T].ravel(), rows[1 : T + 1], terminal[:T]))
        episodes.append((episode.rewards.sum(), terminal.any(), len(episode)))
    columns = [np.concatenate(column, dtype=np.float32) for column in zip(*columns)]
    data = dict(zip(("obs", "action", "reward", "next_obs", "terminal"), columns))
    returns, success, lengths = np.transpose(episodes)
    (N, S), checksum = data["obs"].shape, 0
    for name, column in data.items():
        checksum = zlib.crc32(column, checksum)
        if len(column) != N or not np.isfinite(column).all():
            sys.exit(f"error: {source} has missing or not finite values in {name}: repair or leave out their episodes")

    if maze:
        data["reward"] -= 1
    elif np.ptp(returns):
        data["reward"] *= 1000 / np.ptp(returns)
    mean, std = np.zeros(S, np.float32), np.ones(S, np.float32)
    if normalize_obs or normalize_obs is None and minari_ids(env) == [env]:
        mean, std = (f(data["obs"], axis=0, dtype=np.float64).astype(np.float32) for f in (np.mean, np.std))
        std[std <= 1e-6 * np.abs(mean)] = 1  # constant but for rounding
    for name in ("obs", "next_obs"):
        data[name] -= mean
        data[name] /= std
    info = {"env": env, "fingerprint": [N, checksum], "maze": maze, "state_dim": S, "action_dim": len(low)}
    info |= {"observation_space": serialize_space(space), "obs_mean": mean.tolist(), "obs_std": std.tolist()}
    info |= {"action_low": low.tolist(), "action_high": high.tolist(), "longest_episode": int(lengths.max())}
    info |= {"data_outcome": float((success if maze else returns).mean())}  # what an evaluation measures
    print(f"{source}: {len(returns):,} episodes, mean return {returns.mean():.2f}, {N:,} transitions,", end=" ")
    print(f"{clipped:,} actions clipped, observations {'standardised' if (std != 1).any() else 'not standardised'}")
    return {name: torch.from_numpy(column).to(device) for name, column in data.items()}, info


class Linear(nn.Module):
    """R independent nn.Linear layers with nn.Linear's initial distribution: x [R, B, n_in] -> [R, B, n_out]."""

    def __init__(self, n_in, n_out, R):
        super().__init__()
        bound = n_in**-0.5
        self.weight = nn.Parameter(torch.empty(R, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(R, 1, n_out).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


def mlp(sizes, R):
    """R multilayer perceptrons with ReLU between their layers."""
    layers = [layer for m, n in zip(sizes, sizes[1:]) for layer in (Linear(m, n, R), nn.ReLU(inplace=True))]
    return nn.Sequential(*layers[:-1])


class TwinQ(nn.Module):
    """Q1 and Q2 of R replicas, one network of 2R: s [R, B, S], a [R, B, A] -> [R, 2, B]."""

    def __init__(self, state_dim, action_dim, R):
        super().__init__()
        self.net = mlp([action_dim + state_dim, 256, 256, 1], 2 * R)

    def forward(self, s, a):
        x = torch.cat([a, s], dim=-1).repeat_interleave(2, dim=0)  # [2R, B, A + S]
        return self.net(x).view(-1, 2, x.shape[1])


class LayerNorm(nn.Module):
    """R independent nn.LayerNorm layers: x [R, B, n] -> [R, B, n]."""

    def __init__(self, n, R):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(R, 1, n)), nn.Parameter(torch.zeros(R, 1, n))

    def forward(self, x):
        return torch.addcmul(self.bias, F.layer_norm(x, x.shape[-1:]), self.weight)


def alpha_sigma(t):
    """The VPSDE's noise schedule: a_t = alpha a + sigma eps."""
    log_alpha = -(BETA_1 - BETA_0) / 4 * t**2 - BETA_0 / 2 * t
    return log_alpha.exp(), (1 - torch.exp(2 * log_alpha)).sqrt()


class BehaviorModel(nn.Module):
    """eps_psi(a_t | s, t), the noise in a_t: a_t [R, B, A], s [R, B, S], t [R, B, 1] -> [R, B, A]."""

    def __init__(self, state_dim, action_dim, R, predict):
        super().__init__()
        self.predict = predict
        self.register_buffer("W", 30 * torch.randn(R, 1, 32))  # frequencies of time, never trained
        self.time = nn.Sequential(Linear(64, 128, R), nn.Mish(), Linear(128, 128, R))
        self.first = Linear(action_dim + state_dim + 128, 256, R)
        self.blocks = nn.ModuleList()
        for _ in range(3):
            layers = nn.Dropout(0.1), LayerNorm(256, R), Linear(256, 1024, R), nn.Mish(), Linear(1024, 256, R)
            self.blocks.append(nn.Sequential(*layers))
        self.last = Linear(256, action_dim, R)

    def forward(self, a_t, s, t):
        phase = 2 * torch.pi * self.W * t  # [R, B, 32]
        time = self.time(torch.cat([phase.sin(), phase.cos()], dim=-1))
        x = self.first(torch.cat([a_t, s, time], dim=-1))
        for block in self.blocks:
            x = x + block(x)
        out = self.last(F.mish(x))
        alpha, sigma = alpha_sigma(t)
        return out if self.predict == "eps" else sigma * a_t + alpha * out  # eps = sigma a_t + alpha v


def actor_loss(policy, q, eps_psi, s, t, eps, beta, weight, baseline, q_grad_norm):
    """The loss whose gradient is Eq. 15 times -beta, with Q's gradient normalised as q_grad_norm says.

    s [R, B, S], t [R, B, 1], eps [R, B, A], beta [R, 1, 1]; q(s, a) -> [R, B] and eps_psi(a_t, s, t) -> [R, B, A] are
    frozen. Returns the loss [R], Q [R, B] and the norm of Q's gradient [R, B, 1].
    """
    a = policy(s)
    alpha, sigma = alpha_sigma(t)
    with torch.no_grad():
        score_term = eps_psi(alpha * a + sigma * eps, s, t) - (eps if baseline else 0)  # -sigma times the score
    leaf = a.detach().requires_grad_()
    value = q(s, leaf)
    g = torch.autograd.grad(value.sum(), leaf)[0]  # grad_a Q(s, a) at a = policy(s)
    norm = g.norm(dim=-1, keepdim=True)
    g = g / {"none": 1, "l2": norm + 1e-8, "rms": norm / a.shape[-1] ** 0.5 + 1e-8}[q_grad_norm]
    w = {"sigma2": sigma**2, "one": torch.ones_like(sigma), "alpha_over_sigma": alpha / sigma}[weight]
    bracket = w * score_term - beta * g
    return (bracket.detach() * a).sum(dim=-1).mean(dim=-1), value.detach(), norm


def make_update(args, policy, q_target, behavior, optimizer, beta, draw, window, start):
    """The training step, a function without arguments; draw() gives states, times and noise."""
    steps_done = torch.full((), float(start), device=window.device)  # so far
    n_seeds = len(beta) // len(args.beta)

    def fold(x):  # [R, B, n] -> [n_seeds, K B, n]: the K betas of a seed share its frozen networks
        return x.reshape(n_seeds, -1, x.shape[-1])

    def q(s, a):
        return q_target(fold(s), fold(a)).mean(dim=1).view(a.shape[:-1])  # the mean of both target heads

    def eps_psi(a_t, s, t):
        return behavior(fold(a_t), fold(s), fold(t)).view_as(a_t)

    def update():
        optimizer.zero_grad(set_to_none=True)
        optimizer.param_groups[0]["lr"].copy_(args.lr * (1 + torch.cos(torch.pi * steps_done / args.steps)) / 2)
        steps_done.add_(1)
        loss, value, norm = actor_loss(policy, q, eps_psi, *draw(), beta, args.weight, args.baseline, args.q_grad_norm)
        loss.sum().backward()  # replicas share no parameters
        optimizer.step()
        with torch.no_grad():
            window.add_(torch.stack([loss, value.mean(dim=-1), norm.mean(dim=(1, 2))]))

    return update


def capture(update):
    """update as one CUDA graph, whose replay is one launch. A generator: each next() is one training step."""
    stream = torch.cuda.Stream()
    for _ in range(3):  # eager training steps: kernels are chosen, and the optimizer makes its state
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            update()
        torch.cuda.current_stream().wait_stream(stream)
        yield
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # records without running
        update()
    while True:
        graph.replay()
        yield


def make_act(weights, info):
    """The policy in NumPy: act(obs [..., S]) -> action [..., A]; weights: weight and bias of layer after layer."""
    mean, std, low, high = (np.float32(info[name]) for name in ("obs_mean", "obs_std", "action_low", "action_high"))

    def act(obs):
        x = (np.asarray(obs, np.float32) - mean) / std
        for weight, bias in zip(weights[:-2:2], weights[1:-2:2]):
            x = np.maximum(x @ weight + bias[0], 0)
        return low + (high - low) * (np.tanh(x @ weights[-2] + weights[-1][0]) + 1) / 2

    return act


def evaluation_info(id, info):
    """What evaluations need of a data set's metadata: its environments, and the outcomes that score 0 and 100."""
    metadata = json.loads(Path(get_dataset_path(id), "data/metadata.json").read_text())
    data, fixed = (json.loads(metadata.get(key, "null")) for key in ("env_spec", "eval_env_spec"))
    if data is None:
        return {"environments": None, "reference": None}
    walls = [[cell if cell == 1 else 0 for cell in row] for row in UMAZE]
    if data["kwargs"].get("maze_map") in (UMAZE, walls):  # Minari's evaluation maze of umaze has other walls
        fixed = data | {"kwargs": data["kwargs"] | {"maze_map": UMAZE}}
    limit = min(x["max_episode_steps"] or info["longest_episode"] for x in (data, fixed or data))
    specs = {"data": data, "fixed": fixed or data}.items()
    environments = {k: {"id": x["id"], "kwargs": x["kwargs"], "max_episode_steps": limit} for k, x in specs}
    low, high = D4RL_SCORES.get(data["id"].partition("-")[0], (0, 100))  # if unknown, the return is the score
    reference = (0, 1) if info["maze"] else (metadata.get("ref_min_score", low), metadata.get("ref_max_score", high))
    return {"environments": environments, "reference": reference}


def make_env(environment):
    """An environment by its id and keyword arguments alone, so that no code is run that a data set names."""
    gym.logger.min_level = gym.logger.ERROR  # no advice of newer versions: the data's own is needed
    if environment["id"] not in gym.registry:
        sys.modules["farama_notifications"] = None  # silences a notice about other environments
        import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
    if environment["id"] not in gym.registry:  # gym.make would import a module that stands before a colon
        raise gym.error.UnregisteredEnv(f"{environment['id']} is not registered")
    limit = {"max_episode_steps": environment["max_episode_steps"]}
    with tempfile.TemporaryDirectory() as folder, mock.patch("tempfile.tempdir", folder):  # mazes leave files there
        return gym.make(environment["id"], disable_env_checker=True, **limit, **environment["kwargs"])


def rollout(make_act, weights, info, environment, seeds):
    """A worker's job: one policy's episodes, one per seed, in lockstep. Returns [n, 3]: return, success, length."""
    act, space = make_act(weights, info), deserialize_space(info["observation_space"])
    torch.default_generator.manual_seed(seeds[0])  # for policies that sample
    envs = [make_env(environment) for _ in seeds]
    obs = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)]
    result, running = np.zeros((len(seeds), 3)), list(range(len(seeds)))
    while running:
        actions = act(np.stack([gym.spaces.flatten(space, obs[i]) for i in running]))
        for i, action in zip(list(running), actions):
            obs[i], reward, terminated, truncated, outcome = envs[i].step(action)
            success = info["maze"] and outcome["success"]  # ends the task
            result[i] += reward, success, 1
            if terminated or truncated or success:
                running.remove(i)
    return result


def evaluate(make_act, policies, info, environment, seeds, workers):
    """Means over one episode per seed: metric -> list of one value per policy, each the weights for make_act."""
    chunks = [seeds[i : i + 10] for i in range(0, len(seeds), 10)]  # of a size that does not depend on the workers
    jobs = [delayed(rollout)(make_act, weights, info, environment, chunk) for weights in policies for chunk in chunks]
    with parallel_config("loky", inner_max_num_threads=1, idle_worker_timeout=20), torch.random.fork_rng(devices=[]):
        played = Parallel(workers, max_nbytes=1000, mmap_mode="c", pre_dispatch="n_jobs")(jobs)  # small messages
    returns, success, length = np.concatenate(played).reshape(len(policies), len(seeds), 3).mean(axis=1).T
    low, high = info["reference"]
    score = 100 * ((success if info["maze"] else returns) - low) / (high - low)
    metrics = {"eval/score": score, "eval/return": returns, "eval/episode_length": length}
    return {name: x.tolist() for name, x in (metrics | ({"eval/success": success} if info["maze"] else {})).items()}


def load(path, device="cpu"):
    """An artifact or checkpoint. Runs no code in it, and exits with one line if it is missing or unusable."""
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("checksum")  # torch.load compares none
        return dict(torch.load(path, map_location=device, weights_only=True))
    except Exception as e:
        sys.exit(f"error: {path} is missing or unusable ({e!r:.200}): run the stage that writes it")


def open_run(args, about, model, optimizer, device):
    """The run's folder and the step to start from: with --resume the last checkpoint's, else old files move aside."""
    folder = Path(args.out_dir, args.run_name or args.env.replace("/", "-"))
    folder.mkdir(parents=True, exist_ok=True)
    path = next((p for p in (folder / f"{STAGE}.ckpt", folder / f"{STAGE}.pt") if p.exists() and args.resume), None)
    if path is None:
        for old in [old for pattern in FILES for old in folder.glob(pattern)]:
            date = time.strftime(f"%Y%m%d-%H%M%S-{old.stat().st_mtime_ns % 10**9}", time.localtime(old.stat().st_mtime))
            print(f"{old} of an earlier run is renamed to {old.rename(old.with_stem(f'{old.stem}-{date}'))}")
        return folder, 0
    state = load(path, device)
    for name, value in (about["args"] | about).items():
        then = (state.get("args", {}) | state).get(name)
        if name not in MAY_CHANGE and then != value:
            sys.exit(f"error: {path} was written with {name} = {then}, not {value}: --resume needs the same")
    if "optimizer" not in state:
        print(f"{path} is finished, nothing to resume")
        sys.exit()
    model.load_state_dict(state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["rng"][0].cpu())
    torch.cuda.set_rng_state_all([x.cpu() for x in state["rng"][1]])
    os.truncate(folder / f"{STAGE}.jsonl", state["log_size"])  # drops what was logged after the checkpoint
    return folder, state["step"]


def select(artifact, seeds, prefix=""):
    """The networks of these seeds: the leading axis of an artifact's weights holds one per seed, or two."""
    have = artifact["seeds"]
    index = [have.index(seed) for seed in seeds]
    weights = {name.removeprefix(prefix): x for name, x in artifact["weights"].items() if name.startswith(prefix)}
    return {name: x.view(len(have), -1, *x.shape[1:])[index].flatten(0, 1) for name, x in weights.items()}


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for name, value in vars(args).items():
        numbers = [x for x in np.atleast_1d(value).tolist() if type(x) in (int, float)]
        if not all(0 < x < np.inf or x == 0 and name in ("seed", "eval_every") for x in numbers):
            sys.exit(f"error: --{name.replace('_', '-')} {value}: must be positive")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but PyTorch finds no CUDA device: use --device cpu or install a CUDA build")
    device = args.device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True
    if not 0.001 <= args.t_range[0] <= args.t_range[1] <= 1:
        sys.exit(f"error: --t-range {args.t_range}: must be two times from 0.001 to 1, the smaller first")
    data, info = load_dataset(args.env, args.dataset, args.normalize_obs, device)
    obs, S, A = data["obs"], info["state_dim"], info["action_dim"]
    domain, _, level = args.env.removesuffix("-v2").partition("-")
    args.beta = tuple(dict.fromkeys(args.beta)) or (BETAS.get(domain, {}).get(level, 0.05),)
    args.q_grad_norm = args.q_grad_norm or ("rms" if info["maze"] else "none")
    args.hidden_layers = args.hidden_layers or (4 if info["maze"] else 2)
    print(f"{args.steps:,} x {args.batch_size} on {device}: {args.beta=}, {args.q_grad_norm=}, {args.hidden_layers=}")
    artifacts, sources = {}, {}
    for stage in ("critic", "behavior"):
        path = getattr(args, stage) or Path(args.out_dir, args.run_name or args.env.replace("/", "-"), f"{stage}.pt")
        artifacts[stage] = load(path)
        for name, here in ({"stage": stage, "format": 4} | info).items():
            if (there := artifacts[stage].get(name)) != here:
                sys.exit(f"error: {path} has {name} = {there!s:.99}, not {here!s:.99}: run srpo_{stage}.py again")
        sources[stage] = zlib.crc32(b"".join(x.numpy().tobytes() for x in artifacts[stage]["weights"].values()))
    seeds = both = [seed for seed in artifacts["critic"]["seeds"] if seed in artifacts["behavior"]["seeds"]]
    if args.seed is not None or args.num_seeds is not None:
        seeds = list(range(args.seed or 0, (args.seed or 0) + (args.num_seeds or 1)))
    if not seeds or not set(seeds) <= set(both):
        sys.exit(f"error: critic and behaviour model share seeds {both}, not {seeds or 'any'}: train both on the same")
    info |= evaluation_info((args.dataset or minari_ids(args.env)[0]).split("+")[0], info) | {"sources": sources}
    environment = info["environments"] and args.eval_every and info["environments"][args.eval_env]
    print(f"evaluation in {environment['id']}" if environment else "no evaluation")
    if environment:
        try:
            make_env(environment)
        except Exception as e:
            sys.exit(f"error: cannot make {environment['id']} ({e!r:.300}): install its package, or --eval-every 0")
    torch.manual_seed(seeds[0])
    replicas = [{"seed": seed, "beta": beta} for seed in seeds for beta in args.beta]
    R, sizes = len(replicas), [S] + [256] * args.hidden_layers + [A]
    beta = torch.tensor([replica["beta"] for replica in replicas], device=device).view(-1, 1, 1)  # [R, 1, 1]
    policy = mlp(sizes, R).append(nn.Tanh()).to(device)
    q_target = TwinQ(S, A, len(seeds)).to(device).requires_grad_(False)
    q_target.load_state_dict(select(artifacts["critic"], seeds, "q_target."))
    behavior = BehaviorModel(S, A, len(seeds), artifacts["behavior"]["args"]["predict"]).to(device)
    behavior.load_state_dict(select(artifacts["behavior"], seeds))
    behavior.requires_grad_(False).eval()  # no dropout
    adam = {"lr": torch.tensor(args.lr, device=device), "fused": True, "capturable": device == "cuda"}
    optimizer = torch.optim.Adam(policy.parameters(), **adam)
    window = torch.zeros(len(METRICS), R, device=device)  # sums of the metrics since the last log line
    about = {"stage": STAGE, "format": 4, **info, "seeds": [x["seed"] for x in replicas], "args": asdict(args)}
    about |= {"betas": [x["beta"] for x in replicas], "hidden_layers": args.hidden_layers}
    folder, start = open_run(args, about, policy, optimizer, device)
    runs, log = [], folder / f"{STAGE}.jsonl"
    for replica in replicas if args.track else ():
        name = "-".join([folder.name, STAGE, *(f"{key}{value}" for key, value in replica.items())])
        where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "dir": folder, "name": name}
        labels = {"group": folder.name, "job_type": STAGE, "config": asdict(args) | replica}
        runs.append(wandb.init(**where, **labels, reinit="create_new"))

    def draw():
        index = torch.randint(len(obs), (R, args.batch_size), device=device)  # with replacement
        t = torch.empty(R, args.batch_size, 1, device=device).uniform_(*args.t_range)
        return obs[index], t, torch.randn(R, args.batch_size, A, device=device)

    update = make_update(args, policy, q_target, behavior, optimizer, beta, draw, window, start)
    update = torch.compile(update) if args.compile else update
    update = capture(update).__next__ if args.graph and device == "cuda" else update
    bar, clock = tqdm(range(start + 1, args.steps + 1), STAGE, initial=start, total=args.steps), time.time()
    for step in bar:
        update()
        if step % args.log_every and step < args.steps:
            continue
        n = step % args.log_every or args.log_every
        metrics = dict(zip(METRICS, (window / n).tolist()))
        window.zero_()
        finite = torch.stack([x.reshape(R, -1).isfinite().all(dim=1) for x in policy.state_dict().values()]).all(dim=0)
        if bad := [replica for replica, ok in zip(replicas, finite.tolist()) if not ok]:
            sys.exit(f"error: actor diverged by step {step:,} in {bad}: start again with a lower --lr or --beta")
        bar.set_postfix({name.split("/")[1]: f"{np.mean(x):.3g}" for name, x in metrics.items()}, refresh=False)
        rate = optimizer.param_groups[0]["lr"].item()
        metrics |= {"charts/SPS": n / (time.time() - clock), "charts/learning_rate": rate}
        if environment and (step % args.eval_every < args.log_every or step == args.steps):
            policies = [[x[r].numpy(force=True) for x in policy.state_dict().values()] for r in range(R)]
            metrics |= evaluate(make_act, policies, info, environment, range(args.eval_episodes), args.eval_workers)
            bar.set_description(f"{STAGE}, score {np.mean(metrics['eval/score']):.1f}")
        clock = time.time()
        with open(log, "a") as file:
            file.write(json.dumps({"step": step, "seed": about["seeds"], "beta": about["betas"], **metrics}) + "\n")
        for i, run in enumerate(runs):
            run.log({name: x[i] if isinstance(x, list) else x for name, x in metrics.items()}, step=step)
        if step % args.checkpoint_every < args.log_every or step == args.steps:
            state, path = about | {"weights": policy.state_dict()}, folder / f"{STAGE}.pt"
            if step < args.steps:  # a checkpoint holds all that the next step depends on
                rng = [torch.get_rng_state(), [torch.cuda.get_rng_state()] if device == "cuda" else []]
                state |= {"step": step, "optimizer": optimizer.state_dict(), "rng": rng, "log_size": log.stat().st_size}
                path = folder / f"{STAGE}.ckpt"
            torch.save(state, f"{path}.tmp")
            os.replace(f"{path}.tmp", path)  # a crash leaves the previous file whole
    (folder / f"{STAGE}.ckpt").unlink(missing_ok=True)
    print(f"saved {folder / STAGE}.pt")
