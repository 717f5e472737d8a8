"""Make a Minari data set of one task of OGBench (Park et al., ICLR 2025) from an original file.

    python examples/import_ogbench.py antmaze-large-navigate-singletask-v0            # downloads the file
    python examples/import_ogbench.py antmaze-large-navigate-singletask-v0 FILE.npz   # antmaze-large-navigate-v0.npz

Makes ogbench/antmaze-large-navigate-singletask-v0. All tasks of a maze or scene (...-singletask-task1-v0 to -task5-v0)
share one file. Rewards and ends are those of OGBench's own loader: -1, or minus the number of parts that are not done;
a step from a state in which the task is done terminates, also in the middle of a recorded trajectory. The set is scored
by the success rate, and its rewards are used as they are.
"""

import itertools
import os
import shutil
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")  # some network file systems have no locks

import gymnasium as gym
import minari
import numpy as np
import tyro
from minari.data_collector import EpisodeBuffer
from minari.storage import get_dataset_path


@dataclass
class Args:
    name: tyro.conf.Positional[str]
    """name of a single-task data set, such as antmaze-large-navigate-singletask-v0"""
    file: tyro.conf.Positional[Path | None] = None
    """OGBench's file, antmaze-large-navigate-v0.npz (default: downloaded to ~/.ogbench/data)"""


def split(obs, action, next_obs, reward, mask, last):
    """One EpisodeBuffer of T steps and T + 1 observations per trajectory; last [N] is 1 at the end of each."""
    buffers = []
    for start, end in itertools.pairwise([0, *(np.flatnonzero(last) + 1)]):
        observations = np.concatenate([obs[start:end], next_obs[end - 1 : end]])
        ends = {"terminations": mask[start:end] == 0, "truncations": np.arange(start + 1, end + 1) == end}
        steps = {"actions": action[start:end], "rewards": reward[start:end]}
        buffers.append(EpisodeBuffer(observations=observations, **steps, **ends, infos={}))
    return buffers


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C
    try:
        import ogbench
        from ogbench.relabel_utils import relabel_dataset
    except ImportError as e:
        sys.exit(f"error: OGBench is missing ({e}): run `pip install -r requirements.txt ogbench`, both together")
    parts, id = args.name.split("-"), f"ogbench/{args.name}"
    if "singletask" not in parts or {"visual", "powderworld"} & set(parts):
        sys.exit(
            f"error: {args.name} is no single task with vector observations, as antmaze-large-navigate-singletask-v0"
        )
    if get_dataset_path(id).exists():
        sys.exit(f"error: data set {id} exists already: run `minari delete {id}`")
    try:
        env = ogbench.make_env_and_datasets(args.name, env_only=True)
    except gym.error.Error as e:
        sys.exit(f"error: OGBench has no environment for {args.name} ({e})")
    if args.file is None:  # the file has the name without the task
        original = "-".join([*parts[: parts.index("singletask")], parts[-1]])
        try:
            ogbench.download_datasets([original])
        except OSError as e:  # of network or disk
            sys.exit(f"error: {original} cannot be downloaded ({e!r:.200}): give its file as a second argument")
        args.file = Path("~/.ogbench/data").expanduser() / f"{original}.npz"
    try:
        data = ogbench.load_dataset(args.file, add_info=True)
        relabel_dataset(env.spec.id, env, data)  # rewards, and masks: 0 where the task is done
        columns = [data[x] for x in ("observations", "actions", "next_observations", "rewards", "masks", "terminals")]
    except (OSError, KeyError, IndexError, ValueError) as e:
        sys.exit(f"error: {args.file} is not OGBench's file of {args.name} ({e!r:.200})")
    buffers = split(*columns)
    spaces = {
        "observation_space": gym.spaces.Box(-np.inf, np.inf, columns[0].shape[1:]),
        "action_space": env.action_space,
    }
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Minari would like an author and a link to the code
            dataset = minari.create_dataset_from_buffers(id, buffers, env=env, **spaces)
        dataset.storage.update_metadata({"success_score": True})  # and so the stages leave the rewards as they are
    except BaseException as e:  # also Ctrl-C
        shutil.rmtree(get_dataset_path(id), ignore_errors=True)  # half a set must not look like a whole one
        sys.exit(f"error: {id} was not written ({e!r:.200}): start again")
    steps, reached = len(columns[0]), sum(buffer.terminations.any() for buffer in buffers)
    print(f"{id}: {len(buffers):,} trajectories, {steps:,} transitions, the task is done in {reached:,} trajectories;")
    print(f"`python srpo_critic.py --env {id}` trains on them")
