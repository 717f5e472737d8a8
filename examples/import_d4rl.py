"""Make Minari data sets from D4RL's own files, which are the data of the paper's Table 1.

    python examples/import_d4rl.py hopper-medium-v2 antmaze-large-diverse-v2   # downloads the files
    python examples/import_d4rl.py hopper_medium-v2.hdf5                       # makes D4RL/hopper/medium-v2

A set has the transitions of D4RL's own qlearning_dataset: the next row is the next observation, so a step that ends in
a time-out is dropped, and so is the last row of the file. Returns are therefore those of the steps that are kept.
AntMaze's rewards and terminals are the file's; an episode goes on after a terminal step, so it has several of them.
--until-success leaves out what follows the first terminal step. In an episode without one, it leaves out what follows
the arrival at the goal to which the recorder sent the ant (infos/goal), where it then stays. The set has the same id.
"""

import contextlib
import importlib
import io
import itertools
import json
import os
import re
import shutil
import signal
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")  # some network file systems have no locks

import gymnasium as gym
import h5py
import minari
import numpy as np
import torch
import tyro
from minari.data_collector import EpisodeBuffer
from minari.dataset.minari_dataset import parse_dataset_id
from minari.storage import get_dataset_path

sys.path.insert(0, str(Path(__file__).parent.parent))
from srpo_actor import D4RL_SCORES
from srpo_critic import minari_ids


@dataclass
class Args:
    sources: tyro.conf.Positional[tuple[str, ...]]
    """tasks to download (hopper-medium-v2, antmaze-umaze-v2, ...), files of D4RL, or all: the paper's fifteen tasks"""
    id: str | None = None
    """Minari id of the new set (default: by the file's name, D4RL/hopper/medium-v2)"""
    folder: Path = Path("~/.d4rl/datasets").expanduser()
    """where downloaded files are kept, as by D4RL; what is there is not downloaded again"""
    until_success: bool = False
    """in AntMaze, cut each episode at its first success or, if it has none, at the goal of its recorder"""
    url: str = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
    """where D4RL's files are"""


COLUMNS = ("observations", "actions", "rewards", "terminals", "timeouts")
UNTIL_SUCCESS = ", each episode up to its goal"  # in a set's description
LEVELS = ("medium", "medium-expert", "medium-replay", "expert")
FILES = {  # task -> D4RL's file
    f"{robot}-{level}-v2": f"gym_mujoco_v2/{robot}_{level.replace('-', '_')}-v2.hdf5"
    for robot in ("halfcheetah", "hopper", "walker2d")
    for level in LEVELS
}
MAZES = {  # AntMaze -> maze, and whether the episodes of the data start at random, and have random goals
    "umaze": ("u-maze", False, False),
    "umaze-diverse": ("u-maze", True, True),
    "medium-play": ("big-maze", True, False),
    "medium-diverse": ("big-maze", True, True),
    "large-play": ("hardest-maze", True, False),
    "large-diverse": ("hardest-maze", True, True),
}
FILES |= {
    f"antmaze-{name}-v2": f"ant_maze_v2/Ant_maze_{maze}_noisy_multistart_{start}_multigoal_{goal}_sparse_fixed.hdf5"
    for name, (maze, start, goal) in MAZES.items()
}


def download(task, folder, url):
    """The path of a task's file, which is downloaded if it is not in the folder."""
    address, path = f"{url}/{FILES[task]}", folder / Path(FILES[task]).name
    if not path.exists():
        part = path.with_suffix(".part")
        print(f"downloading {address} to {path}")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(address, str(part))
            h5py.File(part).close()  # refuses half a file
            part.rename(path)
        except Exception as e:  # of network, HTTP, disk or HDF5
            remedy = f"download it elsewhere, and run this command with the file {path.name} in place of {task}"
            sys.exit(f"error: {address} cannot be downloaded ({e!r:.200}): {remedy}")
        finally:
            part.unlink(missing_ok=True)
    return path


def name_of(text):
    """Domain, data and version in the name of a file or set: hopper, medium, v2. None if it names no task."""
    for task, file in FILES.items():
        if text == Path(file).name:
            return *task.removesuffix("-v2").split("-", 1), "v2"
        if text == Path(file).name.replace("_fixed", ""):  # AntMaze's first version
            return *task.removesuffix("-v2").split("-", 1), "v0"
    text = text.removeprefix("D4RL/").removesuffix(".hdf5").replace("/", "-")
    found = re.fullmatch(r"(halfcheetah|hopper|walker2d|antmaze)[-_]([\w-]+?)(?:-(v\d+))?", text)
    return found and (found[1], found[2].replace("_", "-"), found[3] or "v0")


def read_metadata(id):
    """What Minari says of a set; empty if there is none."""
    path = get_dataset_path(id) / "data" / "metadata.json"
    return json.loads(path.read_text()) if path.exists() else {}


def is_there(id):
    """Whether a set is there. What a killed import left, whose steps Minari has not counted yet, is removed."""
    path = get_dataset_path(id)
    if path.exists() and not read_metadata(id).get("total_steps"):
        shutil.rmtree(path)
    return path.exists()


def read(path):
    """The file's columns: observations [N, S], actions [N, A]; rewards, terminals, timeouts [N]; goals [N, 2] or None.

    A goal is where AntMaze's recorder sent the ant. In the diverse files it is seldom the rewarded one.
    """
    if not path.exists():
        sys.exit(f"error: {path} is neither a file nor a task that can be downloaded, such as hopper-medium-v2")
    try:
        with h5py.File(path) as file:
            if missing := [name for name in COLUMNS if name not in file]:
                sys.exit(f"error: {path} has no {', '.join(missing)}: give a file with {', '.join(COLUMNS)}")
            obs, action, *rest = (np.asarray(file[name][:], np.float32) for name in COLUMNS)
            goal = file["infos/goal"][:] if "infos/goal" in file else None
    except Exception as e:  # h5py raises several types
        sys.exit(f"error: {path} cannot be read as HDF5 ({type(e).__name__}): give a file of D4RL, or a task's name")
    if not obs.ndim == action.ndim == 2 or any(len(x) != len(obs) or x.size != len(x) for x in (action[:, :1], *rest)):
        sys.exit(f"error: {path} has columns of other shapes than D4RL's: give one row per step in each")
    reward, terminal, timeout = (x.ravel() for x in rest)  # [N, 1] in older files
    return obs, action, reward, terminal > 0, timeout > 0, goal


def split(obs, action, reward, terminal, timeout, goal=None, goes_on=False, until_success=False):
    """The steps that have a next row, as one EpisodeBuffer of T steps and T + 1 observations per episode.

    goes_on: whether the file's episodes go on after a terminal step, up to their time-out.
    until_success: whether what follows the first terminal step is left out; without one, what follows the first step
    that ends within 0.5 m of the recorder's goal.
    """
    timeout, buffers = np.append(timeout[:-1], True)[: len(obs)], []  # the last row has no next one
    last_rows = timeout if goes_on else terminal | timeout
    for start, end in itertools.pairwise([0, *(np.flatnonzero(last_rows) + 1)]):
        T = end - start - timeout[end - 1]
        if until_success:
            reached = terminal[start : start + T]
            if goal is not None and not reached.any():
                way = goal[start : start + T] - obs[start + 1 : start + T + 1, :2]
                reached = np.linalg.norm(way, axis=1) <= 0.5
            if reached.any():
                T = reached.argmax() + 1
        last, stop = np.arange(1, T + 1) == T, start + T
        ended = {"terminations": terminal[start:stop], "truncations": last & ~terminal[start:stop]}
        columns = {"observations": obs[start : stop + 1], "actions": action[start:stop], "rewards": reward[start:stop]}
        buffers += [EpisodeBuffer(**columns, **ended, infos={})] if T else []
    return buffers


def describe(domain, level, obs, action):
    """Arguments for Minari: spaces, and for a task of D4RL (domain is not None) environment and reference scores."""
    about = {"observation_space": gym.spaces.Box(-np.inf, np.inf, obs.shape[1:])}
    about |= {"action_space": gym.spaces.Box(-1, 1, action.shape[1:])}
    if domain == "antmaze":
        with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice about other environments
            importlib.import_module("d4rl_antmaze")  # registers its environments
        if f"antmaze-{level}-v2" not in gym.registry:
            sys.exit(f"error: AntMaze has no task {level}: name one of {', '.join(MAZES)}")
        about["env"] = gym.make(f"antmaze-{level}-v2", disable_env_checker=True)
    elif domain:
        robot = next(robot for robot in D4RL_SCORES if robot.lower() == domain)
        about["env"] = gym.make(f"{robot}-v5", max_episode_steps=1000)  # the successor of D4RL's
        about["ref_min_score"], about["ref_max_score"] = D4RL_SCORES[robot]
    return about


def import_file(path, id, until_success):
    """Makes the Minari set of a file (id None: named by the file), and prints how to train on it."""
    obs, action, reward, terminal, timeout, goal = read(path)
    names = [name for name in (name_of(path.name), name_of(id or "")) if name]
    if not names and not id:
        sys.exit(f"error: {path} names no task of halfcheetah, hopper, walker2d or antmaze: name the new set with --id")
    if len({domain for domain, *_ in names}) > 1:
        sys.exit(f"error: {path} and the id {id} name different robots: give another --id")
    domain, level, version = names[0] if names else (None, None, None)
    id = id or f"D4RL/{domain}/{level}-{version}"
    try:
        parse_dataset_id(id)
    except (TypeError, ValueError):
        sys.exit(f"error: --id {id}: must be like D4RL/hopper/medium-v2")
    if id.startswith("D4RL/antmaze/") and id.endswith("-v1"):
        sys.exit(f"error: {id} is the name of Minari's own set: name the new set with --id")
    if is_there(id):
        sys.exit(f"error: data set {id} exists already: run `minari delete {id}`, or give another --id")

    until_success = until_success and domain == "antmaze"
    if until_success and goal is not None and goal.shape != (len(obs), 2):
        sys.exit(f"error: {path} has infos/goal of another shape than D4RL's: give two coordinates per step")
    buffers = split(obs, action, reward, terminal, timeout, goal, domain == "antmaze", until_success)
    if not buffers:
        sys.exit(f"error: {path} is empty: give a file with transitions in it")
    about = describe(domain, level, obs, action)
    if domain:
        env = about["env"]
        if (env.observation_space.shape, env.action_space.shape) != (obs.shape[1:], action.shape[1:]):
            robot = env.spec.id.partition("-")[0]
            sys.exit(f"error: {path} has columns of other shapes than {robot}'s: give a file of D4RL")
    if domain == "antmaze" and version != "v2":
        print(f"{path.name} is an older version: its rewards and terminals are those of the recording, where v2's were")
        print("computed anew for the one goal that is evaluated; a file without any reward cannot be learned from")
    description = f"made from D4RL's {path.name}" + UNTIL_SUCCESS * until_success
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Minari would like an author and a link to the code
            minari.create_dataset_from_buffers(id, buffers, description=description, **about)
    except BaseException as e:  # also Ctrl-C
        shutil.rmtree(get_dataset_path(id), ignore_errors=True)  # half a set must not look like a whole one
        sys.exit(f"error: {id} was not written ({e!r:.200}): start again")
    flags = id
    if named := name_of(id):
        task = "-".join(named if named[2] == "v2" else named[:2])
        flags = task if minari_ids(task) == [id] else f"{task} --dataset {id}"
    steps = sum(len(buffer.rewards) for buffer in buffers)
    print(
        f"{id}: {len(buffers):,} episodes, {steps:,} transitions; `python srpo_critic.py --env {flags}` trains on them"
    )


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C
    if not args.sources:
        sys.exit("error: name tasks, files, or all: --help lists them")
    if args.id and (len(args.sources) > 1 or args.sources == ("all",)):
        sys.exit("error: --id names one set: give one file")
    table_1 = [task for task in FILES if not re.fullmatch(r"\w+-expert-v2", task)]
    for source in table_1 if args.sources == ("all",) else args.sources:
        if source not in FILES:
            import_file(Path(source), args.id, args.until_success)
        elif is_there(id := args.id or minari_ids(source)[0]):
            until_success = read_metadata(id).get("description", "").endswith(UNTIL_SUCCESS)
            if source.startswith("antmaze") and until_success != args.until_success:
                kind = "cut at success" if until_success else "with the steps after success"
                sys.exit(f"error: {id} is there already, {kind}: run `minari delete {id}` to import it otherwise")
            print(f"{source} is there already; `minari delete {id}` removes it")
        else:
            import_file(download(source, args.folder, args.url), args.id, args.until_success)
