"""Stage 2 of SRPO: a diffusion model of the behaviour policy.

As in Score Regularized Policy Optimization (Chen et al., ICLR 2024), eps_psi(a_t | s, t) predicts the noise eps in
a_t = alpha a + sigma eps (Eq. 13). Then -eps_psi / sigma is the score of the diffused behaviour, which stage 3 uses.
All seeds train at once, each on its own minibatches: every tensor of the networks has a leading replica axis R.

    python srpo_behavior.py --env hopper-medium --num-seeds 6    # writes runs/hopper-medium/behavior.pt
"""

import json
import os
import re
import sys
import time
import zipfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")  # some network file systems have no locks

import gymnasium as gym
import minari
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
import wandb
from filelock import FileLock, Timeout
from minari.serialization import serialize_space
from minari.storage import get_dataset_path, hosting
from tqdm import tqdm


@dataclass
class Args:
    env: str
    """D4RL task name (hopper-medium, antmaze-umaze, ...) or id of a Minari data set"""
    dataset: str | None = None
    """train on other data than the task's: Minari ids joined with +"""
    run_name: str | None = None
    """files are written to <out-dir>/<run-name> (default: the task's name)"""
    out_dir: str = "runs"
    """folder of all runs"""
    seed: int = 0
    """first seed; seeds that train at once share one random generator: seed 1 beside seed 0 is not seed 1 alone"""
    num_seeds: int = 1
    """number of seeds that train at once: seed, seed + 1, ...; one replica each"""
    steps: int = 2_000_000
    """gradient steps"""
    batch_size: int = 2048
    """transitions per step and replica"""
    lr: float = 3e-4
    """learning rate of AdamW"""
    lr_decay: bool = False
    """cosine decay of the learning rate to 0 at the last step, as in run.sh --small"""
    predict: Literal["eps", "v"] = "eps"
    """what the network predicts: eps (the paper), or v = alpha eps - sigma a, trained on the error in a"""
    dropout: bool = True
    """dropout of 0.1 in the network, as in the paper; run.sh --small turns it off"""
    normalize_obs: tyro.conf.DisallowNone[bool | None] = None
    """standardise observations (default: off for D4RL's task names, as in the paper, and on for other data)"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto uses CUDA if there is a GPU"""
    graph: bool = True
    """on CUDA, record the update as one CUDA graph, which is faster"""
    compile: bool = False
    """compile the update with torch.compile"""
    amp: bool = False
    """run the behaviour model in bfloat16, by torch.autocast"""
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


STAGE = "behavior"
METRICS = ("losses/behavior_loss",)
BETA_0, BETA_1 = 0.1, 20.0  # of the noise schedule
FILES = ("behavior.*",)  # of a run, moved aside by the next
MAY_CHANGE = "out_dir run_name graph resume checkpoint_every track wandb_project_name wandb_entity".split()


def minari_ids(env):
    """The Minari ids of a task in D4RL's naming; any other name is an id itself."""
    domain, _, level = env.removesuffix("-v2").partition("-")
    if domain not in ("halfcheetah", "hopper", "walker2d", "antmaze"):
        return [env]
    if env.endswith("-v2") or level == "medium-replay":  # D4RL's own data
        return [f"D4RL/{domain}/{level}-v2"]
    if domain == "antmaze":
        return [f"D4RL/antmaze/{level}-v1"]
    return [f"mujoco/{domain}/{x}-v0" for x in level.split("-")]  # medium-expert: both


def open_dataset(id):
    """A Minari data set, downloaded if it is missing. Exits with one line if it cannot be had."""
    path, d4rl = get_dataset_path(id), re.match("D4RL/((halfcheetah|hopper|walker2d|antmaze)/.*-v2)", id)
    command = f"python examples/import_d4rl.py {d4rl[1].replace('/', '-')}" if d4rl else f"minari download {id} --force"
    try:
        if not Path(path, "data").exists() and not d4rl:  # Minari's server has none of D4RL's
            hosting.download_dataset(id)
        if not {"observation_space", "action_space"} <= json.loads(Path(path, "data/metadata.json").read_text()).keys():
            raise ValueError("it names no spaces")  # Minari would make the environment that it names: foreign code
        dataset = minari.load_dataset(id)
        assert dataset.storage.total_steps and dataset[0], "half of a set"  # reads the file
        return dataset
    except Exception as e:
        remedy = f": run `{command}`, or do so elsewhere and copy it to {path}"
        sys.exit(f"error: no complete data set {id} ({e!r}){'' if isinstance(e, ImportError) else remedy}")


def flatten(space, x):
    """T observations at once, in arrays as Minari stores them -> [T, S]; each row is what gym.spaces.flatten gives."""
    if isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple)):
        parts = space.items() if isinstance(space, gym.spaces.Dict) else enumerate(space)
        return np.concatenate([flatten(part, x[key]) for key, part in parts], axis=1)
    if isinstance(space, gym.spaces.Box):
        return np.reshape(x, (len(x), gym.spaces.flatdim(space)))
    return np.stack([gym.spaces.flatten(space, row) for row in x])


def load_dataset(env, dataset, normalize_obs, device):
    """Logged transitions of a task, or of the Minari ids in dataset. Exits with one line if they are not supported.

    Returns float32 transitions on the device, one per row: obs [S], action [A] in [-1, 1], reward [1] as the paper
    scales it, next_obs [S], terminal [1] (0 at a truncation); and info, all that later stages must know of the data.
    """
    ids = dataset.split("+") if dataset else minari_ids(env)
    if not all(re.fullmatch(r"(?!.*\bv\d+-v)([\w-]+/)*\w[\w-]*-v\d+", id) for id in ids):
        sys.exit(f"error: no task {dataset or env!r}: README lists D4RL's names, and Minari ids end in -v and a number")
    sets, source = [open_dataset(id) for id in ids], "+".join(ids)
    space, bounds, spec = sets[0].observation_space, sets[0].action_space, sets[0].env_spec
    if len({str((d.observation_space, d.action_space, d.env_spec and d.env_spec.id)) for d in sets}) > 1:
        sys.exit(f"error: {source} have different spaces or environments: only data of one environment can be joined")
    if not space.is_np_flattenable or gym.spaces.flatdim(space) > 4096:
        sys.exit(f"error: {source} has observations of variable size or over 4096 numbers (images): not supported")
    if not isinstance(bounds, gym.spaces.Box) or bounds.low.ndim != 1 or np.abs([bounds.low, bounds.high]).max() > 1e6:
        sys.exit(f"error: {source} has actions that are not in a bounded one-dimensional Box: only these are supported")
    low, high, S, A = np.float64(bounds.low), np.float64(bounds.high), gym.spaces.flatdim(space), len(bounds.low)
    maze = spec is not None and "maze" in spec.id.lower()
    data = np.empty((sum(d.storage.total_steps for d in sets), 2 * S + A + 2), np.float32)
    episodes, N, clipped, cut = [], 0, 0, 0
    recorded = (ep for d in sets for part in np.array_split(d.episode_indices, 50) for ep in d.iterate_episodes(part))
    for i, ep in enumerate(recorded):  # in 50 parts: HDF5 would cache the whole set
        obs, rows, terminal, T = ep.observations, flatten(space, ep.observations), ep.terminations, len(ep)
        if len(rows) == T and not terminal[-1]:  # the last action has no next observation, and needs one
            T, cut = T - 1, cut + 1
        if maze and isinstance(obs, dict) and "achieved_goal" in obs:  # recorded beyond success, which here terminates
            terminal = np.linalg.norm(obs["achieved_goal"] - obs["desired_goal"], axis=-1)[1:] <= 0.45
            T = int(terminal.argmax()) + 1 if terminal.any() else T
        action = np.clip(ep.actions[:T], low, high)  # as simulators do
        clipped += (action != ep.actions[:T]).any(axis=1).sum()
        action = 2 * (action - low) / np.maximum(high - low, 1e-9) - 1  # -1 if the bounds are equal
        columns = rows[:T], action, ep.rewards[:T], np.append(rows[1:], rows[-1:], axis=0)[:T], terminal[:T]
        fits = {len(x) for x in columns} == {T} and ep.rewards.size == len(ep) and T > 0
        block = np.column_stack([np.float32(x) for x in columns]) if fits else np.nan
        if not np.isfinite(block).all():
            sys.exit(f"error: episode {i} of {source} has missing or not finite values, or several rewards per step")
        data[N : N + T], N = block, N + T
        episodes.append((ep.rewards.sum(), terminal.any() or maze and (ep.rewards == 1).any(), len(ep)))
    data, (returns, success, lengths) = data[:N], np.transpose(episodes)
    info = {"env": env, "fingerprint": [N, zlib.crc32(data)], "maze": maze, "state_dim": S, "action_dim": A}
    info["minari"] = {k: x for k, x in sets[0].storage.metadata.items() if k.endswith(("env_spec", "_score"))}
    info["by_success"] = maze or "success_score" in info["minari"]  # what an evaluation measures
    if maze and "success_score" not in info["minari"]:  # the rewards of sets that have it are used as they are
        data[:, S + A] -= 1
    elif not info["by_success"] and np.ptp(returns) > 1e-6 * np.abs(returns).max():
        data[:, S + A] *= 1000 / np.ptp(returns)
    mean, std = np.zeros(S, np.float32), np.ones(S, np.float32)
    if normalize_obs or normalize_obs is None and minari_ids(env) == [env]:
        mean, std = (f(data[:, :S], axis=0, dtype=np.float64).astype(np.float32) for f in (np.mean, np.std))
        std[std <= 1e-6 * np.abs(mean)] = 1  # constant but for rounding
    for obs in (data[:, :S], data[:, S + A + 1 : -1]):
        obs -= mean
        obs /= std
    info |= {"observation_space": serialize_space(space), "obs_mean": mean.tolist(), "obs_std": std.tolist()}
    info |= {"action_low": low.tolist(), "action_high": high.tolist(), "longest_episode": int(lengths.max())}
    info["data_outcome"] = float((success if info["by_success"] else returns).mean())
    print(f"{source}: {len(returns):,} episodes, mean return {returns.mean():.2f}, {N:,} transitions,", end=" ")
    print(f"{clipped:,} actions clipped, {cut:,} steps without next state cut, standardised: {(std != 1).any()}")
    return torch.from_numpy(data).to(device), info


class Linear(nn.Module):
    """R independent nn.Linear layers with nn.Linear's initial distribution: x [R, B, n_in] -> [R, B, n_out]."""

    def __init__(self, n_in, n_out, R):
        super().__init__()
        bound = n_in**-0.5
        self.weight = nn.Parameter(torch.empty(R, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(R, 1, n_out).uniform_(-bound, bound))

    def forward(self, x):
        return torch.baddbmm(self.bias, x, self.weight)


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
        embedding = self.time(torch.cat([phase.sin(), phase.cos()], dim=-1))
        x = self.first(torch.cat([a_t, s, embedding], dim=-1))
        for block in self.blocks:
            x = x + block(x)
        output = self.last(F.mish(x))
        if self.predict == "eps":
            return output
        alpha, sigma = alpha_sigma(t)
        return sigma * a_t + alpha * output  # eps = sigma a_t + alpha v


def behavior_loss(model, s, a, t, eps):
    """Eq. 13, and the loss that is minimised, each [R]. s [R, B, S], a and eps [R, B, A], t [R, B, 1]."""
    alpha, sigma = alpha_sigma(t)
    error = ((model(alpha * a + sigma * eps, s, t) - eps) ** 2).sum(dim=-1, keepdim=True)  # [R, B, 1]
    eq_13 = error.mean(dim=(1, 2))
    if model.predict == "eps":
        return eq_13, eq_13
    return eq_13, ((sigma / alpha) ** 2 * error).mean(dim=(1, 2))  # |a_psi - a|^2, a_t = alpha a_psi + sigma eps_psi


def make_update(args, model, optimizer, draw, window, start):
    """The training step, a function without arguments; draw() gives minibatch and noise, window sums up the metrics."""
    steps_done = torch.full((), float(start), device=window.device)  # before this one

    def update():
        optimizer.zero_grad(set_to_none=True)
        if args.lr_decay:  # cosine to 0
            optimizer.param_groups[0]["lr"].copy_(args.lr / 2 * (1 + torch.cos(torch.pi / args.steps * steps_done)))
            steps_done.add_(1)
        with torch.autocast(window.device.type, torch.bfloat16, enabled=args.amp):
            loss, minimised = behavior_loss(model, *draw())
        minimised.sum().backward()  # replicas share no parameters
        optimizer.step()
        window.add_(loss.detach())

    return torch.compile(update) if args.compile else update


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


def load(path, device="cpu"):
    """An artifact or checkpoint. Runs no code in it, and exits with one line if it is missing or unusable."""
    try:
        if zipfile.ZipFile(path).testzip():
            raise ValueError("checksum")  # torch.load compares none
        return dict(torch.load(path, map_location=device, weights_only=True))
    except Exception as e:
        sys.exit(f"error: {path} is missing or unusable ({e!r:.200}): run the stage that writes it (without --resume)")


def open_run(folder, about, model, optimizer, device):
    """Locks the run. Returns the step to start from: with --resume the last checkpoint's; else old files move aside."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / f".{STAGE}.lock", is_singleton=True, fallback_to_soft=False)
    try:
        open_run.lock = lock.acquire(timeout=0)  # until the process ends, however it does
    except Timeout:
        sys.exit(f"error: another srpo_{STAGE}.py writes to {folder}: wait until it ends, or give another --run-name")
    except OSError as e:  # some network file systems have no locks
        print(f"{folder} cannot be locked ({e}): do not start this command twice at once")
    saved = [path for path in (folder / f"{STAGE}.ckpt", folder / f"{STAGE}.pt") if path.exists()]
    if not saved or not about["args"]["resume"]:
        for old in [path for pattern in FILES for path in folder.glob(pattern) if path.suffix != ".tmp"]:
            date = time.strftime(f"%Y%m%d-%H%M%S-{old.stat().st_mtime_ns % 10**9}", time.localtime(old.stat().st_mtime))
            print(f"{old} of an earlier run is renamed to {old.rename(old.with_stem(f'{old.stem}-{date}'))}")
        return 0
    state = load(saved[0], device)
    then, now = state.get("args", {}) | state.get("info", {}), about["args"] | about["info"]
    for name, new in now.items():
        if name not in MAY_CHANGE and then.get(name) != new:
            sys.exit(f"error: {saved[0]} has {name} = {then.get(name)!s:.99}, not {new!s:.99}: --resume needs the same")
    if "optimizer" not in state:
        print(f"{saved[0]} is finished, nothing to resume")
        sys.exit()
    model.load_state_dict(state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    (torch.cuda if device == "cuda" else torch).set_rng_state(state["rng"].cpu())
    log = folder / f"{STAGE}.jsonl"
    logged = log.read_bytes()[: state["log"]] if log.exists() else b""  # without what came after the checkpoint
    if len(logged) < state["log"]:
        print(f"{log} lacks lines of steps up to {state['step']:,}: it goes on without them")
    log.write_bytes(logged[: logged.rfind(b"\n") + 1])  # whole lines
    return state["step"]


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for name, x in vars(args).items():
        if type(x) in (int, float) and not (0 < x < np.inf or x == 0 and name == "seed"):
            sys.exit(f"error: --{name.replace('_', '-')} {x}: must be {'0 or more' if name == 'seed' else 'positive'}")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but PyTorch finds no CUDA device: use --device cpu or install a CUDA build")
    device = args.device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True  # faster products, of 10 bits' precision
    data, info = load_dataset(args.env, args.dataset, args.normalize_obs, device)
    folder = Path(args.out_dir, args.run_name or args.env.replace("/", "-"))
    torch.manual_seed(args.seed)
    R, S, A = args.num_seeds, info["state_dim"], info["action_dim"]
    replicas = [{"seed": args.seed + r} for r in range(R)]
    model = BehaviorModel(S, A, R, args.predict).to(device).train(args.dropout)  # the mode only affects dropout
    adam = {"lr": torch.tensor(args.lr, device=device), "fused": True, "capturable": device == "cuda"}
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, **adam)
    window = torch.zeros(len(METRICS), R, device=device)  # sums of the metrics since the last log line
    about = {"stage": STAGE, "format": 5, "info": info, "seeds": [x["seed"] for x in replicas], "args": asdict(args)}
    start = open_run(folder, about, model, optimizer, device)
    runs, log = [], folder / f"{STAGE}.jsonl"
    try:
        for replica in replicas if args.track else ():
            name = "-".join([folder.name, STAGE, *(f"{key}{value}" for key, value in replica.items())])
            where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "dir": folder, "name": name}
            config = asdict(args) | replica
            runs.append(wandb.init(**where, group=folder.name, job_type=STAGE, config=config, reinit="create_new"))
    except wandb.Error as e:
        sys.exit(f"error: W&B cannot log: {e}")

    def draw():
        index = torch.randint(len(data), (R, args.batch_size), device=device)  # with replacement
        s, a, *_ = data[index].split([S, A, 1, S, 1], dim=-1)
        return s, a, torch.empty_like(s[..., :1]).uniform_(0.001, 1), torch.randn_like(a)  # s, a, t, eps

    update = make_update(args, model, optimizer, draw, window, start)
    update = capture(update).__next__ if args.graph and device == "cuda" else update
    title, clock = f"{STAGE} on {device}", time.time()
    bar = tqdm(range(start + 1, args.steps + 1), title, args.steps, initial=start, disable=None)
    for step in bar:
        update()
        if step % args.log_every and step < args.steps:
            continue
        n = step % args.log_every or args.log_every  # steps since the last log line
        metrics = dict(zip(METRICS, (window / n).tolist()))
        window.zero_()
        finite = torch.stack([x.reshape(R, -1).isfinite().all(dim=1) for x in model.state_dict().values()]).all(dim=0)
        if bad := [replica for replica, ok in zip(replicas, finite.tolist()) if not ok]:
            sys.exit(f"error: behavior diverged by step {step:,} in {bad}: start again with a lower --lr")
        bar.set_postfix({name.split("/")[1]: f"{np.mean(x):.3g}" for name, x in metrics.items()}, refresh=False)
        metrics["charts/SPS"] = n / (time.time() - clock)
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"].item()
        if bar.disable and time.time() // 30 > clock // 30:  # no terminal: a plain line per half minute
            print(f"{title}: step {step:,} of {args.steps:,}, {bar.postfix}", flush=True)
        clock = time.time()
        for i, run in enumerate(runs):
            run.log({name: x[i] if isinstance(x, list) else x for name, x in metrics.items()}, step=step)
        try:
            with open(log, "a") as file:
                file.write(json.dumps({"step": step, "seed": about["seeds"], **metrics}) + "\n")
            if step % args.checkpoint_every < args.log_every or step == args.steps:
                state, path = about | {"weights": model.state_dict()}, folder / f"{STAGE}.pt"
                if step < args.steps:  # a checkpoint holds all that the next step depends on
                    rng, path = (torch.cuda if device == "cuda" else torch).get_rng_state(), path.with_suffix(".ckpt")
                    state |= {"step": step, "rng": rng, "optimizer": optimizer.state_dict(), "log": log.stat().st_size}
                else:
                    state["obs"] = data[:, :S].clone()  # the states that stage 3 trains on
                torch.save(state, f"{path}.tmp")
                os.replace(f"{path}.tmp", path)  # a crash leaves the previous file whole
        except (OSError, RuntimeError) as e:  # PyTorch raises the second, for example on a full disk
            sys.exit(f"error: cannot write to {folder} ({e!r:.200}): is the disk full? Continue with --resume")
    (folder / f"{STAGE}.ckpt").unlink(missing_ok=True)
    print(f"saved {folder / STAGE}.pt")
