"""Score saved policies: the last policy of every seed and beta, over episodes that training never saw.

    python eval.py --env hopper-medium       # reads runs/hopper-medium/actor.pt, writes runs/hopper-medium/eval.json

In your own code, from eval import load_policy; act = load_policy("runs/hopper-medium/actor.pt"); action = act(obs).
"""

import contextlib
import io
import json
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import mujoco
import numpy as np
import torch
import tyro


@dataclass
class Args:
    env: str
    """task that was trained"""
    run_name: str | None = None
    """read <out-dir>/<run-name>/actor.pt (default: the task's name)"""
    out_dir: str = "runs"
    """where the runs are kept"""
    episodes: int = 100
    """episodes per replica"""
    workers: int = os.cpu_count()
    """processes that evaluate"""
    eval_env: Literal["fixed", "data"] | None = None
    """mazes: from one start to one goal, or drawn as in the recording (default: as in the actor's training)"""


def flatten(obs):
    """One float32 vector per observation; a dictionary's parts are joined in the order of their sorted keys."""
    if isinstance(obs, dict):
        return np.concatenate([flatten(obs[key]) for key in sorted(obs)], axis=-1)
    return np.asarray(obs, np.float32)


def reached(obs):
    """Whether maze observations are at their goal, by the distance that the environments call success."""
    return np.linalg.norm(obs["achieved_goal"] - obs["desired_goal"], axis=-1) <= 0.45


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


def run_chunk(weights, info, seeds):
    """A worker's job: one policy's episodes of a few seeds."""
    return rollout(make_act(weights, info), lambda: make_env(info["environment"]), seeds, info["maze"])


def evaluate(pool, policies, info, environment, seeds):
    """Metrics of policies over one episode per seed: name -> array [policies, seeds].

    Every worker gets ten episodes at a time, so that the number of workers changes nothing.
    """
    chunks = [seeds[i : i + 10] for i in range(0, len(seeds), 10)]
    plain = {name: info[name] for name in ("maze", "action_low", "action_high")} | {"environment": environment}
    # (an artifact's tensors must not go between processes)
    jobs = [pool.submit(run_chunk, policy, plain, chunk) for policy in policies for chunk in chunks]
    result = np.concatenate([job.result() for job in jobs]).reshape(len(policies), len(seeds), 3)
    returns, success, length = np.moveaxis(result, -1, 0)
    low, high = info["reference"]
    score = 100 * ((success if info["maze"] else returns) - low) / (high - low)
    metrics = {"eval/score": score, "eval/return": returns, "eval/episode_length": length}
    return metrics | ({"eval/success": success} if info["maze"] else {})


def start_workers(workers):
    """Processes of one thread each, started when first used."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for their NumPy; this process has read it already
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))


def load_artifact(path, stage, remedy):
    """A stage's artifact as a dictionary; exits with one line that names the remedy if path is not one."""
    if not Path(path).exists():
        sys.exit(f"error: {path} does not exist: {remedy} first")
    try:
        artifact = torch.load(path, map_location="cpu", weights_only=True)
        found = (artifact["stage"], artifact["format"])
    except Exception as e:  # whatever a damaged or foreign file makes of torch.load
        sys.exit(f"error: {path} cannot be read as an artifact ({type(e).__name__}): {remedy} again")
    if found != (stage, 2):
        sys.exit(f"error: {path} holds stage {found[0]}, format {found[1]}, not {stage}, format 2: {remedy}")
    return artifact


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


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.episodes < 1 or args.workers < 1:
        sys.exit("error: --episodes and --workers must be positive")
    name = args.run_name or args.env.replace("/", "-")
    folders = [
        Path(args.out_dir, name),
        Path(args.out_dir, name.removesuffix("-v2")),
    ]  # tasks of the paper drop their -v2
    folder = next((folder for folder in folders if folder.exists()), folders[0])
    artifact = load_artifact(folder / "actor.pt", "actor", f"run `python srpo_actor.py --env {args.env}`")
    if not artifact["environments"]:
        sys.exit(f"error: the data of {args.env} name no environment to evaluate in: record them with one")
    args.eval_env = args.eval_env or artifact["args"]["eval_env"]
    environment = artifact["environments"][args.eval_env]
    check_env(environment, artifact)

    seeds, betas = artifact["seeds"], artifact["betas"]
    policies = [policy_weights(artifact["weights"], r) for r in range(len(seeds))]
    with start_workers(args.workers) as pool:  # seeds far from those watched in training
        result = evaluate(pool, policies, artifact, environment, range(1_000_000, 1_000_000 + args.episodes))

    table = {name.split("/")[1]: x.mean(axis=-1) for name, x in result.items()}
    where = environment["id"] + (f" ({args.eval_env})" if artifact["maze"] else "")
    where += f"; the data's own score: {artifact['data_score']:.1f}"
    print(f"{artifact['env']}, {args.episodes} episodes per policy in {where}")
    print(" ".join(f"{name:>14}" for name in ("seed", "beta", *table)))
    for r, (seed, beta) in enumerate(zip(seeds, betas)):
        print(f"{seed:14d} {beta:14g} " + " ".join(f"{column[r]:14.2f}" for column in table.values()))
    summary = []
    for beta in dict.fromkeys(betas):
        score = table["score"][[b == beta for b in betas]]
        summary.append({"beta": beta, "score_mean": score.mean(), "score_std": score.std(), "seeds": len(score)})
        print(f"beta {beta:g}: score {score.mean():.1f} +- {score.std():.1f} (mean +- std over {len(score)} seed(s))")

    rows = [
        {"seed": seed, "beta": beta, **{name: float(column[r]) for name, column in table.items()}}
        for r, (seed, beta) in enumerate(zip(seeds, betas))
    ]
    content = {"env": artifact["env"], "steps": artifact["args"]["steps"], "data_score": artifact["data_score"]}
    content |= {"episodes": args.episodes, "eval_env": args.eval_env, "policies": rows, "summary": summary}
    (folder / "eval.json").write_text(json.dumps(content, indent=1) + "\n")
    print(f"saved {folder / 'eval.json'}")
