"""Stage 3 of SRPO: a small deterministic policy, from the critic of stage 1 and the behaviour model of stage 2.

Score Regularized Policy Optimization (Chen et al., ICLR 2024): the policy maximises Q, and the frozen behaviour model
gives the score of the diffused behaviour (the gradient of its log density), which keeps actions near the data (Eq. 15).
All seeds and betas train at once: on the leading axis R of every tensor, replica i*K + k has seed i and beta k of K.

    python srpo_actor.py --env hopper-medium --beta 0.01 0.05    # writes runs/hopper-medium/actor.pt
"""

import importlib.util
import json
import os
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
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
import wandb
from filelock import FileLock, Timeout
from joblib import Parallel, cpu_count, delayed, parallel_config
from minari.serialization import deserialize_space
from tqdm import tqdm


@dataclass
class Args:
    env: str
    """D4RL task name (hopper-medium, antmaze-umaze, ...) or id of a Minari data set"""
    run_name: str | None = None
    """files are written to <out-dir>/<run-name> (default: the task's name)"""
    out_dir: str = "runs"
    """folder of all runs"""
    seed: int | None = None
    """first seed (default: every seed that critic and behaviour model share, or 0 if --num-seeds is given)"""
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
    """diffusion times of Eq. 15 are drawn uniformly between these; two equal ones give a single time, as in Eq. 10"""
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
    eval_workers: int = cpu_count()
    """number of processes that evaluate"""
    eval_env: Literal["fixed", "data"] = "fixed"
    """in mazes, start and goal: fixed, as in the set's evaluation environment (if it has one), or as in the data"""
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


STAGE = "actor"
METRICS = ("losses/actor_loss", "values/q_mean", "values/q_grad_norm")
FILES = ("actor.*", "eval.json", "latency.json", "trajectories.json")  # of a run, moved aside by the next
MAY_CHANGE = """out_dir run_name graph resume checkpoint_every track wandb_project_name wandb_entity
critic behavior eval_every eval_episodes eval_workers""".split()  # on --resume; sources stands for critic and behavior
BETAS = {  # Table 2
    "walker2d": {"medium-expert": 0.1, "medium": 0.05, "medium-replay": 0.5},
    "halfcheetah": {"medium-expert": 0.01, "medium": 0.2, "medium-replay": 0.2},
    "hopper": {"medium-expert": 0.01, "medium": 0.05, "medium-replay": 0.2},
    "antmaze": {"umaze": 0.02, "medium-play": 0.08, "large-play": 0.06}
    | {"umaze-diverse": 0.04, "medium-diverse": 0.05, "large-diverse": 0.05},
}
D4RL_SCORES = {"Hopper": (-20.272305, 3234.3), "HalfCheetah": (-280.178953, 12135.0), "Walker2d": (1.629008, 4592.3)}
UMAZE = [[1, 1, 1, 1, 1], [1, "g", 0, 0, 1], [1, 1, 1, 0, 1], [1, "r", 0, 0, 1], [1, 1, 1, 1, 1]]  # r: start, g: goal
WRAPPERS = set(gym.wrappers.__all__) - set(dir(gym.wrappers.rendering)) - {"NormalizeObservation", "NormalizeReward"}
BETA_0, BETA_1 = 0.1, 20.0  # of the noise schedule


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
    layers = []
    for n_in, n_out in zip(sizes, sizes[1:]):
        layers += [Linear(n_in, n_out, R), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers[:-1])


def twin_q(net, s, a):
    """Q1 and Q2 of R replicas, by one network of 2R: s [R, B, S], a [R, B, A] -> [R, 2, B]."""
    x = torch.cat([a, s], dim=-1).repeat_interleave(2, dim=0)  # [2R, B, A + S]
    return net(x).view(-1, 2, x.shape[1])


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


def actor_loss(policy, q, eps_psi, s, t, eps, beta, weight, baseline, q_grad_norm):
    """The loss whose gradient is Eq. 15 times -beta, with Q's gradient normalised as q_grad_norm says.

    s [R, B, S], t [R, B, 1], eps [R, B, A], beta [R, 1, 1]; q(s, a) -> [R, B] and eps_psi(a_t, s, t) -> [R, B, A] are
    frozen. Returns the loss [R], Q [R, B] and the norm of Q's gradient [R, B, 1].
    """
    a = policy(s)
    alpha, sigma = alpha_sigma(t)
    with torch.no_grad():
        score_term = eps_psi(alpha * a + sigma * eps, s, t) - (eps if baseline else 0)  # on average -sigma score
    leaf = a.detach().requires_grad_()
    value = q(s, leaf)
    g = torch.autograd.grad(value.sum(), leaf)[0]  # grad_a Q(s, a) at a = policy(s)
    norm = g.norm(dim=-1, keepdim=True)
    if q_grad_norm == "l2":
        g = g / (norm + 1e-8)
    elif q_grad_norm == "rms":
        g = g / (norm / a.shape[-1] ** 0.5 + 1e-8)
    w = {"sigma2": sigma**2, "one": 1, "alpha_over_sigma": alpha / sigma}[weight]
    bracket = w * score_term - beta * g
    return (bracket.detach() * a).sum(dim=-1).mean(dim=-1), value.detach(), norm


def make_update(args, policy, q_target, behavior, optimizer, beta, draw, window, start):
    """The training step, a function without arguments; draw() gives states, times and noise."""
    steps_done = torch.full((), float(start), device=window.device)  # before this one
    for layer in behavior.modules() if args.amp else ():
        if isinstance(layer, Linear):
            layer.bfloat16()  # frozen: autocast would round the same weights at every step

    def fold(x):  # [R, B, n] -> [seeds, K B, n]: the K betas of a seed share its frozen networks
        return x.reshape(len(x) // len(args.beta), -1, x.shape[-1])

    def q(s, a):
        return twin_q(q_target, fold(s), fold(a)).mean(dim=1).view(a.shape[:-1])  # the mean of both target heads

    def eps_psi(a_t, s, t):
        with torch.autocast(a_t.device.type, torch.bfloat16, enabled=args.amp):
            return behavior(fold(a_t), fold(s), fold(t)).float().view_as(a_t)

    def update():
        optimizer.zero_grad(set_to_none=True)
        optimizer.param_groups[0]["lr"].copy_(args.lr / 2 * (1 + torch.cos(torch.pi / args.steps * steps_done)))
        steps_done.add_(1)
        loss, value, norm = actor_loss(policy, q, eps_psi, *draw(), beta, args.weight, args.baseline, args.q_grad_norm)
        loss.sum().backward()  # replicas share no parameters
        optimizer.step()
        window.add_(torch.stack([loss.detach(), value.mean(dim=-1), norm.mean(dim=(1, 2))]))

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


def evaluation_info(info):
    """From Minari's entries for the data: the environments, and the outcomes that score 0 and 100."""
    data, fixed = (json.loads(info["minari"].get(name, "null")) for name in ("env_spec", "eval_env_spec"))
    fixed = fixed or data
    maps = data["kwargs"].get("maze_map", ()), fixed["kwargs"].get("maze_map", ()), UMAZE
    walls, fixed_walls, u_walls = ([[cell == 1 for cell in row] for row in maze_map] for maze_map in maps)
    if walls == u_walls and fixed_walls != u_walls:  # Minari's evaluation maze has other walls than its data
        fixed = data | {"kwargs": data["kwargs"] | {"maze_map": UMAZE}}
    limit = min(spec["max_episode_steps"] or info["longest_episode"] for spec in (data, fixed))
    environments = {}
    for where, spec in (("data", data), ("fixed", fixed)):
        spec["kwargs"].pop("render_mode", None)
        wrappers = spec.get("additional_wrappers", [])
        ours = [x for x in wrappers if x["name"] in WRAPPERS and x["kwargs"] is not None]
        ours = [x for x in ours if x["entry_point"].startswith("gymnasium.wrappers.")]
        other = ", ".join(x["name"] for x in wrappers if x not in ours) or "none"
        environments[where] = spec | {"max_episode_steps": limit, "wrappers": ours, "left_out": other}
    low, high = D4RL_SCORES.get(data["id"].partition("-")[0], (0, 100))  # if unknown, the return is the score
    low, high = info["minari"].get("ref_min_score", low), info["minari"].get("ref_max_score", high)
    return {"environments": environments, "reference": (0, 1) if info["by_success"] else (low, high)}


def make_env(spec, info):
    """An environment with gymnasium's own wrappers, so that no code is run that a data set names."""
    gym.logger.min_level = gym.logger.ERROR  # no advice of newer versions: the data's own is needed
    sys.modules["farama_notifications"] = None  # silences a notice about other environments
    for package in ("gymnasium_robotics", "d4rl_antmaze", "ogbench"):  # they register environments: add your own
        if spec["id"] not in gym.registry and importlib.util.find_spec(package):
            importlib.import_module(package)
    entry = gym.spec(spec["id"])  # gym.make itself would import a module that an id "module:name" names
    with tempfile.TemporaryDirectory() as folder, mock.patch("tempfile.tempdir", folder):  # mazes leave files there
        env = gym.make(entry, spec["max_episode_steps"], disable_env_checker=True, **spec["kwargs"])
    for wrapper in spec["wrappers"]:
        env = getattr(gym.wrappers, wrapper["name"])(env, **wrapper["kwargs"])
    found = gym.spaces.flatdim(env.observation_space), *env.action_space.low, *env.action_space.high
    wanted = info["state_dim"], *info["action_low"], *info["action_high"]
    if len(found) != len(wanted) or not np.allclose(found, wanted):
        raise ValueError(f"{env.observation_space}, {env.action_space}; the data have size and bounds {wanted}")
    return env


def play(weights, info, environment, seed):
    """A worker's job: one episode of a policy, given by weight and bias of its layers: return, success, length."""
    mean, std, low, high = (np.float32(info[name]) for name in ("obs_mean", "obs_std", "action_low", "action_high"))
    env, space = make_env(environment, info), deserialize_space(info["observation_space"])
    (obs, _), result, done = env.reset(seed=seed), np.zeros(3), False
    while not done:
        x = (np.float32(gym.spaces.flatten(space, obs)) - mean) / std
        for weight, bias in zip(weights[:-2:2], weights[1:-2:2]):
            x = np.maximum(x @ weight + bias[0], 0)
        action = low + (high - low) * (np.tanh(x @ weights[-2] + weights[-1][0]) + 1) / 2
        obs, reward, terminated, truncated, outcome = env.step(action.clip(low, high))  # rounding may exceed the bounds
        success = info["by_success"] and outcome["success"]
        result += reward, success, 1
        done = terminated or truncated or success  # a task that is scored by success ends with it
    return result


def evaluate(policies, info, environment, seeds, workers):
    """Means over one episode per seed: metric -> list of one value per policy."""
    jobs = [delayed(play)(weights, info, environment, seed) for weights in policies for seed in seeds]
    with parallel_config("loky", inner_max_num_threads=1, idle_worker_timeout=20):
        played = Parallel(workers, max_nbytes=1000, mmap_mode="c", pre_dispatch="n_jobs")(jobs)  # small messages
    returns, success, length = np.reshape(played, (len(policies), len(seeds), 3)).mean(axis=1).T
    low, high = info["reference"]
    score = 100 * ((success if info["by_success"] else returns) - low) / (high - low)
    metrics = {"eval/score": score, "eval/return": returns, "eval/episode_length": length}
    metrics |= {"eval/success": success} if info["by_success"] else {}
    return {name: x.tolist() for name, x in metrics.items()}


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


def select(artifact, seeds, prefix=""):
    """The networks of these seeds: the leading axis of an artifact's weights holds one per seed, or two."""
    index = [artifact["seeds"].index(seed) for seed in seeds]
    weights = {name.removeprefix(prefix): x for name, x in artifact["weights"].items() if name.startswith(prefix)}
    return {name: x.unflatten(0, (len(artifact["seeds"]), -1))[index].flatten(0, 1) for name, x in weights.items()}


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for name, value in vars(args).items():
        wanted = "0 or more" if name in ("seed", "eval_every") else "positive"
        for x in np.atleast_1d(value).tolist():  # some flags take several values
            if type(x) in (int, float) and not (0 < x < np.inf or x == 0 and wanted == "0 or more"):
                sys.exit(f"error: --{name.replace('_', '-')} {x}: must be {wanted}")
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("error: --device cuda, but PyTorch finds no CUDA device: use --device cpu or install a CUDA build")
    device = args.device = "cuda" if torch.cuda.is_available() and args.device != "cpu" else "cpu"
    torch.backends.cuda.matmul.allow_tf32 = True  # faster products, of 10 bits' precision
    if not 0.001 <= args.t_range[0] <= args.t_range[1] <= 1:
        sys.exit(f"error: --t-range {args.t_range}: must be two times from 0.001 to 1, the smaller first")
    folder = Path(args.out_dir, args.run_name or args.env.replace("/", "-"))
    artifacts, sources, wanted = {}, {}, {"stage": "", "optimizer": None, "format": 5, "env": args.env}
    for stage in ("critic", "behavior"):
        path = getattr(args, stage) or folder / f"{stage}.pt"
        artifacts[stage] = load(path)
        found = artifacts[stage] | artifacts[stage].get("info", {})
        wanted["stage"] = stage  # and no optimizer, which a checkpoint has
        for name, value in wanted.items():
            if (was := found.get(name)) != value:
                sys.exit(f"error: {path} has {name} = {was!s:.99}, not {value!s:.99}: run srpo_{stage}.py again")
        wanted |= artifacts[stage]["info"]  # both stages must have had the same data
        sources[stage] = zlib.crc32(b"".join(x.numpy().tobytes() for x in artifacts[stage]["weights"].values()))
    seeds = shared = [seed for seed in artifacts["critic"]["seeds"] if seed in artifacts["behavior"]["seeds"]]
    if args.seed is not None or args.num_seeds is not None:
        seeds = list(range(args.seed or 0, (args.seed or 0) + (args.num_seeds or 1)))
    if not seeds or not set(seeds) <= set(shared):
        sys.exit(f"error: critic and behaviour model share seeds {shared}, not {seeds or 'any'}: train both on those")
    info = artifacts["critic"]["info"] | {"sources": sources, "environments": None}
    if "env_spec" in info["minari"]:
        info |= evaluation_info(info)
    obs, S, A = artifacts["behavior"].pop("obs").to(device), info["state_dim"], info["action_dim"]
    domain, _, level = args.env.removesuffix("-v2").partition("-")
    args.beta = tuple(dict.fromkeys(args.beta)) or (BETAS.get(domain, {}).get(level, 0.05),)
    args.q_grad_norm = args.q_grad_norm or ("rms" if info["maze"] else "none")
    args.hidden_layers = args.hidden_layers or (4 if info["maze"] else 2)
    print(f"beta {' '.join(map(str, args.beta))}, q-grad-norm {args.q_grad_norm}, hidden-layers {args.hidden_layers}")
    spec = info["environments"][args.eval_env] if info["environments"] and args.eval_every else None
    torch.manual_seed(seeds[0])
    replicas = [{"seed": seed, "beta": beta} for seed in seeds for beta in args.beta]
    R, sizes = len(replicas), [S] + [256] * args.hidden_layers + [A]
    beta = torch.tensor([replica["beta"] for replica in replicas], device=device).view(-1, 1, 1)  # [R, 1, 1]
    policy = mlp(sizes, R).append(nn.Tanh()).to(device)
    q_target = mlp([A + S, 256, 256, 1], 2 * len(seeds)).to(device).requires_grad_(False)
    q_target.load_state_dict(select(artifacts["critic"], seeds, "q_target."))
    behavior = BehaviorModel(S, A, len(seeds), artifacts["behavior"]["args"]["predict"]).to(device).eval()  # no dropout
    behavior.load_state_dict(select(artifacts["behavior"], seeds))
    adam = {"lr": torch.tensor(args.lr, device=device), "fused": True, "capturable": device == "cuda"}
    optimizer = torch.optim.Adam(policy.parameters(), **adam)
    print(f"evaluation in {spec['id']}, wrappers left out: {spec['left_out']}" if spec else "no evaluation")
    if spec:
        try:  # one step of one episode, so that what is wrong shows before the training
            play([x[0].numpy(force=True) for x in policy.parameters()], info, spec | {"max_episode_steps": 1}, seed=0)
        except (Exception, SystemExit) as e:
            sys.exit(f"error: cannot play in {spec['id']} ({e!r:.500}): repair it, or train with --eval-every 0")
    window = torch.zeros(len(METRICS), R, device=device)  # sums of the metrics since the last log line
    about = {"stage": STAGE, "format": 5, "info": info, "seeds": [x["seed"] for x in replicas], "args": asdict(args)}
    about |= {"betas": [x["beta"] for x in replicas]}
    start = open_run(folder, about, policy, optimizer, device)
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
        index = torch.randint(len(obs), (R, args.batch_size), device=device)  # with replacement
        t = torch.empty(R, args.batch_size, 1, device=device).uniform_(*args.t_range)
        return obs[index], t, torch.randn(R, args.batch_size, A, device=device)

    update = make_update(args, policy, q_target, behavior, optimizer, beta, draw, window, start)
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
        finite = torch.stack([x.reshape(R, -1).isfinite().all(dim=1) for x in policy.state_dict().values()]).all(dim=0)
        if bad := [replica for replica, ok in zip(replicas, finite.tolist()) if not ok]:
            sys.exit(f"error: actor diverged by step {step:,} in {bad}: start again with a lower --lr or --beta")
        bar.set_postfix({name.split("/")[1]: f"{np.mean(x):.3g}" for name, x in metrics.items()}, refresh=False)
        metrics["charts/SPS"] = n / (time.time() - clock)
        metrics["charts/learning_rate"] = optimizer.param_groups[0]["lr"].item()
        if spec and (step % args.eval_every < args.log_every or step == args.steps):
            try:
                policies = list(zip(*(x.numpy(force=True) for x in policy.parameters())))  # of R replicas
                metrics |= evaluate(policies, info, spec, range(args.eval_episodes), args.eval_workers)
                title = f"{STAGE} on {device}, mean score {np.mean(metrics['eval/score']):.1f}"
                bar.set_description(title)
            except (Exception, SystemExit) as e:
                metrics["eval/failed"] = True
                tqdm.write(f"error: evaluation failed at step {step:,}, training goes on ({e!r:.500})", file=sys.stderr)
        if bar.disable and time.time() // 30 > clock // 30:  # no terminal: a plain line per half minute
            print(f"{title}: step {step:,} of {args.steps:,}, {bar.postfix}", flush=True)
        clock = time.time()
        for i, run in enumerate(runs):
            run.log({name: x[i] if isinstance(x, list) else x for name, x in metrics.items()}, step=step)
        try:
            with open(log, "a") as file:
                file.write(json.dumps({"step": step, "seed": about["seeds"], "beta": about["betas"], **metrics}) + "\n")
            if step % args.checkpoint_every < args.log_every or step == args.steps:
                state, path = about | {"weights": policy.state_dict()}, folder / f"{STAGE}.pt"
                if step < args.steps:  # a checkpoint holds all that the next step depends on
                    rng, path = (torch.cuda if device == "cuda" else torch).get_rng_state(), path.with_suffix(".ckpt")
                    state |= {"step": step, "rng": rng, "optimizer": optimizer.state_dict(), "log": log.stat().st_size}
                torch.save(state, f"{path}.tmp")
                os.replace(f"{path}.tmp", path)  # a crash leaves the previous file whole
        except (OSError, RuntimeError) as e:  # PyTorch raises the second, for example on a full disk
            sys.exit(f"error: cannot write to {folder} ({e!r:.200}): is the disk full? Continue with --resume")
    (folder / f"{STAGE}.ckpt").unlink(missing_ok=True)
    print(f"saved {folder / STAGE}.pt")
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    if failed := [line["step"] for line in logged if "eval/failed" in line]:
        sys.exit(f"error: evaluations failed at steps {failed}: run eval.py, which scores the saved policies")
