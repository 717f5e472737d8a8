"""Make a Minari data set from an original D4RL file, for example of medium-replay, which Minari does not have.

    python examples/import_d4rl.py hopper_medium_replay-v2.hdf5      # makes D4RL/hopper/medium-replay-v2

The set has the transitions of D4RL's own qlearning_dataset: the next row is the next observation, so a step that ends
in a time-out is dropped, and so is the last row of the file. Returns are therefore those of the steps that are kept.
"""

import itertools
import re
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import h5py
import minari
import numpy as np
import tyro
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.storage import get_dataset_path

sys.path.insert(0, str(Path(__file__).parent.parent))
from srpo_actor import D4RL_SCORES
from srpo_critic import minari_ids


@dataclass
class Args:
    file: tyro.conf.Positional[Path]
    """original file of D4RL, such as hopper_medium_replay-v2.hdf5"""
    id: str | None = None
    """Minari id of the new set (default: by the file's name, D4RL/hopper/medium-replay-v2)"""


COLUMNS = ("observations", "actions", "rewards", "terminals", "timeouts")


def read(path):
    """The file's columns: observations [N, S], actions [N, A]; rewards, terminals and timeouts [N]."""
    try:
        with h5py.File(path) as file:
            if "infos/goal" in file:
                sys.exit(f"error: {path} has no goals in its observations: use Minari's set of the maze")
            if missing := [name for name in COLUMNS if name not in file]:
                sys.exit(f"error: {path} has no {', '.join(missing)}: give a file with {', '.join(COLUMNS)}")
            obs, action, *rest = (np.asarray(file[name][:], np.float32) for name in COLUMNS)
    except Exception as e:  # h5py raises several types
        sys.exit(f"error: {path} cannot be read as HDF5 ({type(e).__name__}): give a file of D4RL")
    if not obs.ndim == action.ndim == 2 or any(len(x) != len(obs) or x.size != len(x) for x in (action[:, :1], *rest)):
        sys.exit(f"error: {path} has columns of other shapes than D4RL's: give one row per step in each")
    reward, terminal, timeout = (x.ravel() for x in rest)  # [N, 1] in older files
    return obs, action, reward, terminal > 0, timeout > 0


def split(obs, action, reward, terminal, timeout):
    """The steps that have a next row, as one EpisodeBuffer of T steps and T + 1 observations per episode."""
    timeout, buffers = np.append(timeout[:-1], True)[: len(obs)], []  # the last row has no next one
    for start, end in itertools.pairwise([0, *(np.flatnonzero(terminal | timeout) + 1)]):
        T = end - start - timeout[end - 1]
        last, stop = np.arange(1, T + 1) == T, start + T
        ended = {"terminations": terminal[start:stop], "truncations": last & ~terminal[start:stop]}
        columns = {"observations": obs[start : stop + 1], "actions": action[start:stop], "rewards": reward[start:stop]}
        buffers += [EpisodeBuffer(**columns, **ended, infos={})] if T else []
    return buffers


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    obs, action, *rest = read(args.file)
    buffers = split(obs, action, *rest)
    if not buffers:
        sys.exit(f"error: {args.file} is empty: give a file with transitions in it")
    name = re.fullmatch(r"(halfcheetah|hopper|walker2d)[-_]([\w-]+?)(-v\d+)?", args.file.stem)
    if not name and not args.id:
        sys.exit(f"error: {args.file} names no task of halfcheetah, hopper or walker2d: name the new set with --id")
    id = args.id or f"D4RL/{name[1]}/{name[2].replace('_', '-')}{name[3] or '-v0'}"
    robots = [robot for robot in D4RL_SCORES if robot.lower() in f"{args.file.name} {id}".lower()]
    if len(robots) > 1:
        sys.exit(f"error: {args.file} and the id {id} name different robots: give another --id")
    try:
        parse_dataset_id(id)
    except (TypeError, ValueError):
        sys.exit(f"error: --id {id}: must be like D4RL/hopper/medium-v2")
    if get_dataset_path(id).exists():
        sys.exit(f"error: data set {id} exists already: run `minari delete {id}`, or give another --id")

    about = {"observation_space": gym.spaces.Box(-np.inf, np.inf, obs.shape[1:])}
    about |= {"action_space": gym.spaces.Box(-1, 1, action.shape[1:])}
    for robot in robots:
        env = gym.make(f"{robot}-v5", max_episode_steps=1000)  # the successor of D4RL's
        if (env.observation_space.shape, env.action_space.shape) != (obs.shape[1:], action.shape[1:]):
            sys.exit(f"error: {args.file} has columns of other shapes than {robot}'s: give a file of D4RL")
        low, high = D4RL_SCORES[robot]
        about |= {"env": env, "ref_min_score": low, "ref_max_score": high}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Minari would like an author and a link to the code
        minari.create_dataset_from_buffers(id, buffers, description=f"made from D4RL's {args.file.name}", **about)
    task = re.sub(r"D4RL/(\w+)/([\w-]+)-v\d+", r"\1-\2", id) if robots else id
    flags = task if minari_ids(task) == [id] else f"{task} --dataset {id}"
    steps = sum(len(buffer.rewards) for buffer in buffers)
    print(
        f"{id}: {len(buffers):,} episodes, {steps:,} transitions; `python srpo_critic.py --env {flags}` trains on them"
    )
