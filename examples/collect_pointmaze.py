"""Make the demo's data set, local/pointmaze-demo-v0, without any download: a point mass that has a goal in a maze.

    python examples/collect_pointmaze.py

The recipe for data of your own: one EpisodeBuffer per episode, then minari.create_dataset_from_buffers. The layout is
that of Minari's own mazes: dictionary observations that hold the goal, a task that goes on after success and never
terminates. The recorded controller ignores the goal: it steers to one random cell after another, and reaches the goal
only by chance. To do better than these data, a policy must prefer the actions that lead to the goal.
"""

import collections
import contextlib
import io
import multiprocessing
import os
import shutil
import signal
import sys
import time
import warnings
from dataclasses import dataclass

os.environ.setdefault("HDF5_USE_FILE_LOCKING", "FALSE")  # some network file systems have no locks

import gymnasium as gym
import minari
import numpy as np
import tyro
from minari.data_collector import EpisodeBuffer
from minari.storage import get_dataset_path


@dataclass
class Args:
    dataset: str = "local/pointmaze-demo-v0"
    """Minari id of the new data set"""
    episodes: int = 1500
    """episodes to record"""
    seed: int = 0
    """first episode's seed"""


MAZE = [  # walls (1); an episode starts near an r and has its goal near the g
    [1, 1, 1, 1, 1, 1, 1, 1],
    [1, "r", "r", 1, 1, "r", "r", 1],
    [1, "r", "r", 1, "r", "r", "r", 1],
    [1, 1, "r", "r", "g", 1, 1, 1],
    [1, "r", "r", "r", "r", "r", "r", 1],
    [1, "r", 1, "r", "r", 1, "r", 1],
    [1, "r", "r", "r", 1, 1, "r", 1],
    [1, 1, 1, 1, 1, 1, 1, 1],
]


def make_env():
    with contextlib.redirect_stderr(io.StringIO()):  # it prints a notice about other environments
        import gymnasium_robotics
    gym.register_envs(gymnasium_robotics)
    kwargs = {"maze_map": MAZE, "continuing_task": True, "reset_target": False}
    return gym.make("PointMaze_Medium-v3", max_episode_steps=200, **kwargs)


def next_cells(maze_map, target):
    """Breadth-first search from the target: cell -> the neighbour one step nearer to it."""
    nearer, queue = {target: target}, collections.deque([target])
    while queue:
        row, col = queue.popleft()
        for cell in ((row + 1, col), (row - 1, col), (row, col + 1), (row, col - 1)):
            if cell not in nearer and maze_map[cell[0]][cell[1]] != 1:
                nearer[cell] = (row, col)
                queue.append(cell)
    return nearer


def record_episode(env, seed):
    """One episode of 200 steps."""
    maze = env.unwrapped.maze
    free = [(i, j) for i, row in enumerate(maze.maze_map) for j, wall in enumerate(row) if wall != 1]
    obs, _ = env.reset(seed=seed)
    rng = env.np_random  # default_rng(seed) would repeat the draws that placed the goal
    observations, actions, rewards, truncated = [obs], [], [], False
    target = None  # the cell that the controller steers to
    while not truncated:
        here = tuple(maze.cell_xy_to_rowcol(obs["achieved_goal"]).tolist())
        if target in (None, here):
            target = free[rng.integers(len(free))]
            nearer = next_cells(maze.maze_map, target)
        if len(actions) % 10 == 0:  # held for ten steps: shorter noise would not reach the walls
            noise = 3 * rng.standard_normal(2)
        way = maze.cell_rowcol_to_xy(np.array(nearer[here])) - obs["achieved_goal"]
        action = 10 * way - 3 * obs["observation"][2:] + noise
        actions.append(np.clip(action, -1, 1).astype(np.float32))
        obs, reward, _, truncated, _ = env.step(actions[-1])
        observations.append(obs)
        rewards.append(reward)
    steps = len(rewards)
    return EpisodeBuffer(
        seed=seed,
        observations={key: np.stack([o[key] for o in observations]) for key in obs},
        actions=np.stack(actions),
        rewards=np.array(rewards),
        terminations=np.zeros(steps, bool),
        truncations=np.arange(1, steps + 1) == steps,
        infos={},
    )


def record_episodes(seeds):
    env = make_env()
    episodes = [record_episode(env, seed) for seed in seeds]
    env.close()
    return episodes


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C
    if args.dataset in minari.list_local_datasets():
        print(f"{args.dataset} is there already; `minari delete {args.dataset}` removes it")
        sys.exit(0)
    start = time.time()
    seeds = range(args.seed, args.seed + args.episodes)
    with multiprocessing.get_context("spawn").Pool() as pool:
        chunks = pool.map(record_episodes, [seeds[i : i + 50] for i in range(0, len(seeds), 50)], chunksize=1)
    buffers = [buffer for chunk in chunks for buffer in chunk]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Minari would like an e-mail address and a link to the code
            minari.create_dataset_from_buffers(
                args.dataset,
                buffers,
                env=make_env(),
                algorithm_name="noisy waypoint controller with random targets",
                description="A point mass that wanders in a maze, and reaches the goal only by chance.",
            )
    except BaseException as e:  # also Ctrl-C
        shutil.rmtree(get_dataset_path(args.dataset), ignore_errors=True)  # half a set must not look like a whole one
        sys.exit(f"error: {args.dataset} was not written ({e!r:.200}): start again")
    steps = sum(len(buffer.rewards) for buffer in buffers)
    print(f"{args.dataset}: {len(buffers):,} episodes, {steps:,} steps, {time.time() - start:.0f} s")
    successes = [buffer.rewards.any() for buffer in buffers]
    print(f"{100 * np.mean(successes):.0f}% of the episodes reach the goal, by chance")
