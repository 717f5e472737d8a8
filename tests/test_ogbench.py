"""OGBench's single tasks: from a file in its format to a score. Skipped where the package `ogbench` is missing."""

import json
import os
import shutil
from pathlib import Path

os.environ.setdefault("MUJOCO_GL", "egl")  # dm_control asks for a way to draw when it is imported

import gymnasium as gym
import numpy as np
import pytest
from conftest import TINY, columns, run_here
from minari.serialization import serialize_space
from test_pipeline import lines, load

import eval as srpo_eval
import srpo_actor
import srpo_critic

ogbench = pytest.importorskip("ogbench", reason="the package ogbench is not installed")
IMPORT = "examples/import_ogbench.py"


def record(file, env_id, trajectories, steps):
    """A file as OGBench writes them: a point mass steers to the goal and stays there; an ant is put there once."""
    env, rng, file_columns = gym.make(env_id, max_episode_steps=10_000), np.random.default_rng(0), []
    maze = env.unwrapped
    for i in range(trajectories):
        env.reset(seed=i)
        goal = np.array(maze.cur_goal_xy)
        maze.set_xy(goal - [2 * (i + 1), 0])
        obs = maze.get_ob()
        for t in range(steps + 1):
            xy = maze.get_xy()
            way = np.array(maze.get_oracle_subgoal(xy, goal)[0]) - xy
            action = rng.uniform(-1, 1, env.action_space.shape)
            if "point" in env_id:
                action = np.clip(way + 0.3 * action, -1, 1)
            elif t == steps // 2:
                maze.set_xy(goal)  # it cannot walk
                obs = maze.get_ob()
            qpos, qvel = maze.data.qpos.copy(), maze.data.qvel.copy()
            file_columns.append((obs, action, float(t == steps), qpos, qvel))
            obs = env.step(action)[0]
    names = ("observations", "actions", "terminals", "qpos", "qvel")
    np.savez(file, **{name: np.array(x, np.float32) for name, x in zip(names, zip(*file_columns))})
    shutil.copy(file, str(file).replace(".npz", "-val.npz"))  # OGBench's loader reads both


@pytest.fixture(scope="module")
def recorded(data_root, tmp_path_factory):
    """The file of each maze, and the set that the importer made of it."""
    folder, files = tmp_path_factory.mktemp("ogbench"), {}
    for maze, trajectories, steps in (("pointmaze", 3, 40), ("antmaze", 2, 6)):
        file = folder / f"{maze}-medium-navigate-v0.npz"
        record(file, f"{maze}-medium-singletask-v0", trajectories, steps)
        files[maze] = (f"{maze}-medium-navigate-singletask-v0", file)
        run_here(IMPORT, *files[maze])
    return files


@pytest.mark.parametrize("maze", ["pointmaze", "antmaze"])
def test_transitions_rewards_and_ends_are_those_of_ogbench_s_loader(maze, recorded):
    name, file = recorded[maze]
    expected = ogbench.make_env_and_datasets(name, dataset_path=str(file))[1]
    data, info = columns(*srpo_critic.load_dataset(f"ogbench/{name}", None, False, "cpu"))
    for ours, theirs in (("obs", "observations"), ("action", "actions"), ("next_obs", "next_observations")):
        np.testing.assert_allclose(data[ours], expected[theirs], rtol=1e-6, atol=1e-6)
    assert data["reward"].tolist() == expected["rewards"].tolist() and {-1, 0} == set(data["reward"].tolist())
    assert data["terminal"].tolist() == (1 - expected["masks"]).tolist()
    last = np.flatnonzero(expected["terminals"])
    in_the_middle = np.setdiff1d(np.flatnonzero(data["terminal"]), last)
    assert len(in_the_middle) > 0 and len(last) == (3 if maze == "pointmaze" else 2)
    assert info["by_success"] and info["maze"] and info["obs_mean"] == [0.0] * info["state_dim"]
    done = [x.any() for x in np.split(1 - expected["masks"], last[:-1] + 1)]
    assert info["data_outcome"] == np.mean(done)


@pytest.mark.parametrize("maze", ["pointmaze", "antmaze"])
def test_all_stages_and_eval_score_the_success_rate(maze, recorded, tmp_path, capsys):
    """Of actor and eval.py; eval.py's against a loop written by hand."""
    id = f"ogbench/{recorded[maze][0]}"
    flags = ("--env", id, *TINY[2:], "--steps", 10)
    assert run_here("srpo_critic.py", *flags)["args"].expectile == 0.9  # a maze
    run_here("srpo_behavior.py", *flags)
    args = run_here("srpo_actor.py", *flags, "--eval-episodes", 1, "--eval-workers", 1)["args"]
    assert (args.beta, args.hidden_layers, args.q_grad_norm) == ((0.05,), 4, "rms")
    folder = tmp_path / "runs" / id.replace("/", "-")
    last = lines(folder / "actor.jsonl")[-1]
    assert last["eval/score"] == [100 * x for x in last["eval/success"]] and last["eval/episode_length"] == [1000.0]
    run_here("eval.py", "--env", id, "--episodes", 2, "--workers", 1)
    (row,) = json.loads((folder / "eval.json").read_text())["policies"]
    act, env, found = srpo_eval.load_policy(folder / "actor.pt"), gym.make(f"{maze}-medium-singletask-v0"), []
    for seed in (1_000_000, 1_000_001):
        (obs, _), total, success, done = env.reset(seed=seed), 0.0, False, False
        while not done:
            obs, reward, terminated, truncated, outcome = env.step(act(obs))
            total, success = total + reward, success or outcome["success"]
            done = terminated or truncated
        found.append((100 * success, total))
    assert (row["score"], row["return"]) == tuple(np.mean(found, axis=0).tolist())


def test_success_at_any_step_counts_and_ends_the_episode(recorded):
    """A policy that walks into the goal, by the point mass's own controller."""
    info = {"by_success": True, "reference": (0, 1), "state_dim": 2, "obs_mean": [0.0, 0.0], "obs_std": [1.0, 1.0]}
    info |= {"action_low": [-1.0, -1.0], "action_high": [1.0, 1.0]}
    environment = {"id": "pointmaze-medium-singletask-v0", "kwargs": {}, "max_episode_steps": 1000, "wrappers": []}
    env = srpo_actor.make_env(environment, info).unwrapped
    info["observation_space"] = serialize_space(env.observation_space)
    env.reset(seed=0)
    goal = np.array(env.cur_goal_xy)

    def make_act(weights, info):
        return lambda obs: np.clip([5 * (env.get_oracle_subgoal(xy, goal)[0] - xy) for xy in obs], -1, 1)

    result = srpo_eval.rollout(make_act, None, info, environment, [0, 1])
    assert result[:, 1].tolist() == [1, 1] and (result[:, 2] < 1000).all()
    assert result[:, 0].tolist() == (1 - result[:, 2]).tolist()  # -1 in each step but the last


@pytest.mark.parametrize(
    "name, message",
    [
        ("antmaze-large-navigate-v0", "is no single task with vector observations"),
        ("visual-antmaze-large-navigate-singletask-v0", "is no single task with vector observations"),
        ("powderworld-easy-play-singletask-v0", "is no single task with vector observations"),
        ("nomaze-large-navigate-singletask-v0", "error: OGBench has no environment for nomaze-"),
    ],
)
def test_bad_input_ogbench_names(name, message, recorded):
    with pytest.raises(SystemExit) as e:
        run_here(IMPORT, name, recorded["antmaze"][1])
    assert e.value.code.startswith("error: ") and message in e.value.code and "\n" not in e.value.code


def test_bad_input_ogbench_files(recorded, data_root):
    name, file = recorded["pointmaze"]
    with pytest.raises(SystemExit, match=f"error: data set ogbench/{name} exists already: run `minari delete"):
        run_here(IMPORT, name, file)
    Path("text.npz").write_text("no arrays")
    np.savez("half.npz", observations=np.zeros((3, 2)), actions=np.zeros((3, 2)))
    other = "pointmaze-medium-navigate-singletask-task3-v0"
    for bad in ("text.npz", "half.npz", "nothing.npz"):
        with pytest.raises(SystemExit) as e:
            run_here(IMPORT, other, bad)
        assert e.value.code.startswith(f"error: {bad} is not OGBench's file of {other} (") and "\n" not in e.value.code
    assert not (data_root / "ogbench" / other).exists()
    run_here(IMPORT, other, file)  # another task of the same file
    info = srpo_critic.load_dataset(f"ogbench/{other}", None, None, "cpu")[1]
    assert json.loads(info["minari"]["env_spec"])["id"] == "pointmaze-medium-singletask-task3-v0"


def test_artifacts_of_ogbench_hold_what_evaluation_needs(recorded, tmp_path):
    id = f"ogbench/{recorded['pointmaze'][0]}"
    run_here("srpo_critic.py", "--env", id, *TINY[2:], "--steps", 1)
    info = load(tmp_path / "runs" / id.replace("/", "-") / "critic.pt")["info"]
    facts = srpo_actor.evaluation_info(info)
    assert facts["reference"] == (0, 1) and facts["environments"]["fixed"]["id"] == "pointmaze-medium-singletask-v0"
