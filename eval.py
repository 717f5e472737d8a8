"""Score the final policies of all seeds and betas: D4RL's normalised return, or percent of success in mazes.

    python eval.py --env hopper-medium       # reads runs/hopper-medium/actor.pt, writes runs/hopper-medium/eval.json
    python eval.py --env hopper-medium --policy srpo idql behavior --video

--policy adds the diffusion policies of the same artifacts: behavior, one action sampled from the behaviour model, and
idql (Hansen-Estruch et al., 2023), the action of highest Q among several samples.

In your own code: from eval import load_policy; act = load_policy("runs/hopper-medium/actor.pt"); action = act(obs).
"""

import importlib.util
import json
import os
import sys
import tempfile
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from joblib import Parallel, cpu_count, delayed, parallel_config
from minari.serialization import deserialize_space


@dataclass
class Args:
    env: str
    """task that was trained"""
    run_name: str | None = None
    """read <out-dir>/<run-name>/actor.pt (default: the task's name)"""
    out_dir: str = "runs"
    """folder of all runs"""
    policy: tuple[Literal["srpo", "idql", "behavior"], ...] = ("srpo",)
    """policies to score: srpo, idql (on the same critic and behaviour model), behavior (that model alone)"""
    candidates: tuple[int, ...] = (32,)
    """actions that IDQL chooses from; several numbers score several policies"""
    sampler_steps: int = 15
    """denoising steps, each one evaluation of the behaviour model"""
    episodes: int = 100
    """episodes per replica (0: none)"""
    first_episode: int = 1_000_000
    """environment seed of the first episode; training uses 0, 1, ..., which the default avoids"""
    workers: int = cpu_count()
    """number of processes that evaluate"""
    eval_env: Literal["fixed", "data"] | None = None
    """in mazes, start and goal: fixed or data, as in srpo_actor.py (default: the actor's)"""
    video: bool = False
    """record an episode of every policy as <run>/video/*.mp4"""
    track: bool = False
    """log to Weights & Biases, one run per row of the table"""
    wandb_project_name: str = "srpo"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B team"""


COLUMNS = "policy candidates sampler_steps seed beta eval_env first_episode episodes".split()  # what a score is of
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


def sample_actions(eps_psi, s, noise, steps):
    """Actions from noise [R, B, A] and states s [R, B, S], one for each; steps: evaluations of eps_psi.

    DPM-Solver++(2M) (Lu et al., 2022, Algorithm 2): solves the diffusion ODE from t = 1 to 0.001 in steps of equal
    length h in lambda = log(alpha / sigma), to second order in h.
    """
    alpha, sigma = alpha_sigma(torch.tensor([1, 0.001], dtype=torch.float64))
    lam = torch.linspace(*torch.log(alpha / sigma), steps + 1, dtype=torch.float64)
    h, log_alpha = lam[1] - lam[0], -F.softplus(-2 * lam) / 2
    b = (BETA_1 - BETA_0) / 2  # b t^2 + BETA_0 t + 2 log_alpha = 0, solved for t
    t = (-BETA_0 + (BETA_0**2 - 8 * b * log_alpha).sqrt()) / (2 * b)
    alpha, sigma, t = (x.to(noise) for x in (*alpha_sigma(t), t))
    a_t, previous = noise, None
    for i in range(steps):
        a = (a_t - sigma[i] * eps_psi(a_t, s, t[i].expand(*s.shape[:2], 1))) / alpha[i]  # the predicted clean action
        middle = a if i == 0 else 1.5 * a - 0.5 * previous  # extrapolated to the middle of the step
        a_t = sigma[i + 1] / sigma[i] * a_t - alpha[i + 1] * torch.expm1(-h).item() * middle
        previous = a
    return a_t


def sample_best(behavior, q_target, s, candidates, steps):
    """For each of the states s [1, B, S] the action of highest Q (the smaller head) among so many samples: [B, A]."""
    A = behavior.last.bias.shape[-1]
    s = s.repeat_interleave(candidates, dim=1)
    a = sample_actions(behavior, s, torch.randn(*s.shape[:2], A, device=s.device), steps).clamp(-1, 1)
    if candidates == 1:
        return a[0]
    best = twin_q(q_target, s, a).amin(dim=1).view(-1, candidates).argmax(dim=1)
    return a.view(-1, candidates, A)[torch.arange(len(best)), best]


def make_act(weights, info):
    """The policy in NumPy: act(obs [..., S]) -> action [..., A]; weights: weight and bias of layer after layer."""
    mean, std, low, high = (np.float32(info[name]) for name in ("obs_mean", "obs_std", "action_low", "action_high"))

    def act(obs):
        x = (np.asarray(obs, np.float32) - mean) / std
        for weight, bias in zip(weights[:-2:2], weights[1:-2:2]):
            x = np.maximum(x @ weight + bias[0], 0)
        return (low + (high - low) * (np.tanh(x @ weights[-2] + weights[-1][0]) + 1) / 2).clip(low, high)

    return act


def make_networks(weights, info):
    """One seed's behaviour model and target Qs, from their state dictionaries of arrays."""
    sizes = info["state_dim"], info["action_dim"], 1
    networks = BehaviorModel(*sizes, info["predict"]), mlp([sum(sizes[:2]), 256, 256, 1], 2)
    for network, arrays in zip(networks, weights):
        network.load_state_dict({name: torch.from_numpy(x) for name, x in arrays.items()})
        network.requires_grad_(False).eval()  # no dropout
    return networks


def make_sampling_act(weights, info, candidates, steps):
    """A diffusion policy, act(obs [B, S]) as in make_act: IDQL, or with one candidate the behaviour model."""
    behavior, q_target = make_networks(weights, info)
    mean, std, low, high = (np.float32(info[name]) for name in ("obs_mean", "obs_std", "action_low", "action_high"))

    def act(obs):
        s = torch.from_numpy((np.asarray(obs, np.float32) - mean) / std)[None]
        a = sample_best(behavior, q_target, s, candidates, steps).numpy()
        return (low + (high - low) * (a + 1) / 2).clip(low, high)

    return act


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


def rollout(make_act, weights, info, environment, seeds):
    """A worker's job: one policy's episodes, one per seed, in lockstep. Returns [n, 3]: return, success, length."""
    act, space = make_act(weights, info), deserialize_space(info["observation_space"])
    torch.default_generator.manual_seed(seeds[0])  # for policies that sample
    envs = [make_env(environment, info) for _ in seeds]
    obs = [env.reset(seed=seed)[0] for env, seed in zip(envs, seeds)]
    result, running = np.zeros((len(seeds), 3)), list(range(len(seeds)))
    while running:
        actions = act(np.stack([gym.spaces.flatten(space, obs[i]) for i in running]))
        for i, action in zip(list(running), actions):
            obs[i], reward, terminated, truncated, outcome = envs[i].step(action)
            success = info["by_success"] and outcome["success"]  # ends the task
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


def checksum(artifact):
    """A number that tells the networks of artifacts apart."""
    return zlib.crc32(b"".join(x.numpy().tobytes() for x in artifact["weights"].values()))


def select(artifact, seeds, prefix=""):
    """The networks of these seeds: the leading axis of an artifact's weights holds one per seed, or two."""
    index = [artifact["seeds"].index(seed) for seed in seeds]
    weights = {name.removeprefix(prefix): x for name, x in artifact["weights"].items() if name.startswith(prefix)}
    return {name: x.unflatten(0, (len(artifact["seeds"]), -1))[index].flatten(0, 1) for name, x in weights.items()}


def load_artifact(path, stage):
    """A stage's artifact. Exits with one line if the file is of another stage or version."""
    artifact = load(path)
    if (artifact.get("stage"), artifact.get("format")) != (stage, 5):
        sys.exit(f"error: {path} is no {stage} artifact of this version: run srpo_{stage}.py again")
    return artifact


def load_frozen(artifact, folder, seeds):
    """What an actor was trained on: per seed the weights of behaviour model and target Qs, as make_networks takes them.

    Exits with one line if they have changed since then. Adds what the behaviour model predicts to the actor's info.
    """
    frozen = []
    for stage, prefix in ("behavior", ""), ("critic", "q_target."):
        path = artifact["args"][stage] or folder / f"{stage}.pt"
        there, env = load_artifact(path, stage), artifact["info"]["env"]
        if checksum(there) != artifact["info"]["sources"][stage]:
            sys.exit(f"error: {path} changed since the actor was trained: run srpo_actor.py --env {env} again")
        if stage == "behavior":
            artifact["info"]["predict"] = there["args"]["predict"]
        frozen.append([{k: x.numpy() for k, x in select(there, [seed], prefix).items()} for seed in seeds])
    return list(zip(*frozen))


def flatten(space, x):
    """T observations at once, in arrays as Minari stores them -> [T, S]; each row is what gym.spaces.flatten gives."""
    if isinstance(space, (gym.spaces.Dict, gym.spaces.Tuple)):
        parts = space.items() if isinstance(space, gym.spaces.Dict) else enumerate(space)
        return np.concatenate([flatten(part, x[key]) for key, part in parts], axis=1)
    if isinstance(space, gym.spaces.Box):
        return np.reshape(x, (len(x), gym.spaces.flatdim(space)))
    return np.stack([gym.spaces.flatten(space, row) for row in x])


def load_policy(path, replica=0):
    """A saved policy as act(obs) -> action, for one raw observation of the environment or a batch of them.

    replica: which of the artifact's seeds and betas, in the order of eval.py's table.
    Raises ValueError if there is no such artifact or replica.
    """
    try:
        artifact = load_artifact(path, "actor")
    except SystemExit as e:
        raise ValueError(e.code.removeprefix("error: ")) from None  # here the caller decides
    if not 0 <= replica < len(artifact["seeds"]):
        raise ValueError(f"{path} has {len(artifact['seeds'])} replicas: there is no replica {replica}")
    policy = make_act([x[replica].numpy() for x in artifact["weights"].values()], artifact["info"])
    space = deserialize_space(artifact["info"]["observation_space"])

    def act(obs):
        part, leaf = space, obs
        while isinstance(part, (gym.spaces.Dict, gym.spaces.Tuple)):  # down to its first array
            key = next(iter(part.keys())) if isinstance(part, gym.spaces.Dict) else 0
            part, leaf = part[key], leaf[key]
        return policy((gym.spaces.flatten if np.ndim(leaf) == len(part.shape) else flatten)(space, obs))

    return act


def episode(env, make_act, weights, info, seed):
    """One episode: its states [T, S], and whether it succeeded."""
    act, space, states, done = make_act(weights, info), deserialize_space(info["observation_space"]), [], False
    torch.default_generator.manual_seed(seed)  # for policies that sample
    obs, _ = env.reset(seed=seed)
    while not done:
        states.append(gym.spaces.flatten(space, obs))
        obs, _, terminated, truncated, outcome = env.step(act(states[-1][None])[0])
        success = info["by_success"] and outcome["success"]
        done = terminated or truncated or success
    return np.array(states), bool(success)


def trace(make_act, weights, info, environment, seed):
    """A worker's job: one policy's trajectory in a maze: its goal and positions, and whether it succeeds."""
    env = make_env(environment, info)
    env.reset(seed=seed)  # as episode does
    goal = env.unwrapped.goal.round(2).tolist()
    states, success = episode(env, make_act, weights, info, seed)
    return {"goal": goal, "way": states[:, :2].round(2).tolist(), "success": success}  # the state begins with x, y


def record_video(make_act, weights, info, environment, seed, folder, name):
    """A worker's job: one episode as folder/name-episode-0.mp4."""
    os.environ.setdefault("MUJOCO_GL", "egl")  # needs no screen
    warnings.simplefilter("ignore")  # where rendering is impossible, the error is enough
    env = make_env(environment | {"kwargs": environment["kwargs"] | {"render_mode": "rgb_array"}}, info)
    env = gym.wrappers.RecordVideo(env, folder, name_prefix=name, disable_logger=True)
    episode(env, make_act, weights, info, seed)
    env.close()


def read_rows(path, actor, name):
    """The rows that a JSON file of this actor holds under a name. Exits with one line if it is another actor's."""
    try:
        content = json.loads(path.read_text()) if path.exists() else {"actor": actor, name: []}
        if content["actor"] == actor:
            return content[name]
    except (ValueError, KeyError):  # no JSON, or of an earlier version
        pass
    sys.exit(f"error: {path} is of another actor, or of an earlier version: move it away")


def summarize(rows):
    """Mean and standard deviation of the score over seeds, for each value of the other columns."""
    groups = {}
    for row in rows:
        setting = tuple((name, row[name]) for name in COLUMNS if name != "seed")
        groups.setdefault(setting, []).append(row["score"])
    statistics = [{"score_mean": np.mean(x), "score_std": np.std(x), "seeds": len(x)} for x in groups.values()]
    return [dict(setting) | x for setting, x in zip(groups, statistics)]


def track(args, folder, rows):
    """One W&B run per row of the table: its scores are the summary, its other columns the configuration."""
    import wandb  # not at the top: a policy in use does not need it

    try:
        for row in rows:
            config = {"env": args.env} | {name: row[name] for name in COLUMNS}
            name = "-".join([folder.name, "eval", *(str(row[x]) for x in COLUMNS[:5] if row[x] is not None)])
            where = {"project": args.wandb_project_name, "entity": args.wandb_entity, "dir": folder, "name": name}
            run = wandb.init(**where, group=folder.name, job_type="eval", config=config, reinit="create_new")
            run.summary.update({f"eval/{name}": x for name, x in row.items() if name not in COLUMNS})
            run.finish()
    except wandb.Error as e:
        sys.exit(f"error: W&B cannot log: {e}")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    for name, least in {"episodes": 0, "first_episode": 0, "workers": 1, "sampler_steps": 1, "candidates": 1}.items():
        if not all(x >= least for x in np.atleast_1d(getattr(args, name))):
            sys.exit(f"error: --{name.replace('_', '-')} {getattr(args, name)}: must be {least} or more")
    folder = Path(args.out_dir, args.run_name or args.env.replace("/", "-"))
    artifact = load_artifact(folder / "actor.pt", "actor")
    info, seeds, betas = artifact["info"], artifact["seeds"], artifact["betas"]
    actor = checksum(artifact)
    read_rows(folder / "eval.json", actor, "policies")  # refuses another actor's before it plays
    if info["environments"] is None:
        sys.exit(f"error: the data set of {args.env} has no environment to evaluate in")
    args.eval_env = args.eval_env or artifact["args"]["eval_env"]
    environment = info["environments"][args.eval_env]
    weights = list(zip(*(x.numpy() for x in artifact["weights"].values())))  # of each replica
    try:
        rollout(make_act, weights[0], info, environment | {"max_episode_steps": 1}, [args.first_episode])
    except (Exception, SystemExit) as e:
        sys.exit(f"error: cannot play in {environment['id']} ({e!r:.500}): install or repair it")

    policies = [("srpo", None, make_act, list(zip(seeds, betas, weights)))]  # name, candidates, make_act, replicas
    if set(args.policy) != {"srpo"}:
        unique = list(dict.fromkeys(seeds))  # one behaviour model and one pair of target Qs per seed
        replicas = [(seed, None, networks) for seed, networks in zip(unique, load_frozen(artifact, folder, unique))]
        for name, n in [("idql", n) for n in dict.fromkeys(args.candidates)] + [("behavior", 1)]:
            make = partial(make_sampling_act, candidates=n, steps=args.sampler_steps)
            policies.append((name, n, make, replicas))
    policies = [row for name in dict.fromkeys(args.policy) for row in policies if row[0] == name]

    low, high = info["reference"]
    print(f"{info['env']}, {args.episodes} episodes each in {environment['id']}, --eval-env {args.eval_env},", end=" ")
    print(f"wrappers left out: {environment['left_out']};", end=" ")
    print(f"the score of the data is {100 * (info['data_outcome'] - low) / (high - low):.1f}")
    test = range(args.first_episode, args.first_episode + args.episodes)
    maze = getattr(make_env(environment, info).unwrapped, "maze", None)
    maze = maze if hasattr(maze, "cell_rowcol_to_xy") else None  # only those of gymnasium-robotics can be drawn
    rows, ways, failed = [], [], []
    for name, candidates, make, replicas in policies if test else ():
        try:
            result = evaluate(make, [one for *_, one in replicas], info, environment, test, args.workers)
        except (Exception, SystemExit) as e:
            failed.append(name if candidates is None else f"{name} with {candidates} candidate(s)")
            print(f"error: evaluation of {failed[-1]} failed ({e!r:.500})", file=sys.stderr)
            continue
        if not rows:
            print(*(f"{x:>14}" for x in ("policy", "candidates", "seed", "beta", *(metric[5:] for metric in result))))
        for r, (seed, beta, one) in enumerate(replicas):
            row = {"policy": name, "candidates": candidates, "seed": seed, "beta": beta}
            labels = [f"{'-' if x is None else x:>14}" for x in row.values()]
            print(*labels, *(f"{x[r]:14.2f}" for x in result.values()))
            row |= {"sampler_steps": None if candidates is None else args.sampler_steps, "eval_env": args.eval_env}
            row |= {"first_episode": args.first_episode, "episodes": args.episodes}
            rows.append(row | {metric.split("/")[1]: x[r] for metric, x in result.items()})
            ways += [(row, delayed(trace)(make, one, info, environment, seed)) for seed in test[:5] if maze]
    for row in summarize(rows):
        setting = f"{row['candidates']} candidate(s)" if row["beta"] is None else f"beta {row['beta']:g}"
        score = f"score {row['score_mean']:.1f} +- {row['score_std']:.1f}"
        print(f"{row['policy']}, {setting}: {score} (mean +- std over {row['seeds']} seed(s))")

    def save(name, content):
        (folder / f"{name}.json.tmp").write_text(json.dumps(content, indent=1) + "\n")
        os.replace(folder / f"{name}.json.tmp", folder / f"{name}.json")  # a crash leaves the previous file whole
        print(f"saved {folder / name}.json")

    if rows:
        content = {"env": info["env"], "data_score": 100 * (info["data_outcome"] - low) / (high - low)}
        content |= {"steps": artifact["args"]["steps"], "actor": actor}
        scored = {tuple(row[name] for name in COLUMNS) for row in rows}
        earlier = read_rows(folder / "eval.json", actor, "policies")  # as it is now
        table = [row for row in earlier if tuple(row[name] for name in COLUMNS) not in scored] + rows
        save("eval", content | {"policies": table, "summary": summarize(table)})
    if ways:
        traces = Parallel(args.workers, max_nbytes=1000, mmap_mode="c")(job for _, job in ways)
        walls = np.argwhere([[cell == 1 for cell in row] for row in maze.maze_map])
        content = {"cell": maze.maze_size_scaling, "walls": [maze.cell_rowcol_to_xy(cell).tolist() for cell in walls]}
        new = [row | way for (row, _), way in zip(ways, traces)]
        drawn = {(way["policy"], way["candidates"]) for way in new}
        old = read_rows(folder / "trajectories.json", actor, "ways")
        old = [way for way in old if (way["policy"], way["candidates"]) not in drawn]
        same = [way for way in old if all(way[x] == new[0][x] for x in ("eval_env", "first_episode"))]
        save("trajectories", content | {"actor": actor, "ways": same + new})
    if args.video:
        jobs = []
        for name, candidates, make, replicas in policies:
            for seed, beta, one in replicas:
                label = f"{name}-seed{seed}-" + (f"{candidates}-candidates" if beta is None else f"beta{beta:g}")
                jobs.append(delayed(record_video)(make, one, info, environment, test.start, folder / "video", label))
        try:
            Parallel(args.workers, max_nbytes=1000, mmap_mode="c")(jobs)
        except Exception as e:
            reason = f"{type(e).__name__}: {e}".splitlines()[0]
            sys.exit(f"error: cannot record ({reason}): rendering may need `apt install libegl1 libgl1-mesa-dri`")
        print(f"saved {folder / 'video'}/*.mp4")
    if args.track:
        track(args, folder, rows)
    if failed:
        sys.exit(f"error: no scores of {', '.join(failed)}: the evaluation failed")
