"""One environment of each family that Minari has data of: recorded, trained on and scored."""

import os
import tempfile
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from conftest import TINY, create, random_episodes, run, run_here
from test_pipeline import lines, load

import eval as srpo_eval
import srpo_actor

FAMILIES = {
    "MuJoCo": "Hopper-v5",
    "AntMaze": "AntMaze_UMaze-v4",
    "PointMaze": "PointMaze_UMaze-v3",
    "Kitchen": "FrankaKitchen-v1",
    "Adroit": "AdroitHandPen-v1",
    "Fetch": "FetchReach-v4",
}


def recorded(name, id, **kwargs):
    """The Minari id of two episodes of five random steps."""
    with warnings.catch_warnings(action="ignore"):
        import gymnasium_robotics

        gym.register_envs(gymnasium_robotics)
        env = gym.make(id, max_episode_steps=5, **kwargs)
        create(f"test/{name.lower()}-v0", random_episodes(env, 2, 5), env=env)
    return f"test/{name.lower()}-v0", env


@pytest.mark.parametrize("family, id", FAMILIES.items())
def test_every_family_is_trained_on_and_scored(family, id, data_root, tmp_path):
    """Also nested dictionaries: the state is what gymnasium makes of an observation."""
    name, env = recorded(family, id)
    flags = (*TINY[2:], "--env", name, "--steps", 2)
    for stage in ("critic", "behavior"):
        run_here(f"srpo_{stage}.py", *flags)
    run_here("srpo_actor.py", *flags, "--eval-every", 2, "--eval-episodes", 2, "--eval-workers", 1)
    folder = tmp_path / "runs" / name.replace("/", "-")
    last = lines(folder / "actor.jsonl")[-1]
    assert all(np.isfinite(last[metric]).all() for metric in ("eval/score", "eval/return"))
    assert last["eval/episode_length"] == [5.0] or family == "MuJoCo"  # a hopper may fall
    artifact = load(folder / "actor.pt")
    obs, _ = env.reset(seed=0)
    state = gym.spaces.flatten(env.observation_space, obs)
    assert artifact["info"]["state_dim"] == len(state)
    act = srpo_eval.load_policy(folder / "actor.pt")
    policy = srpo_eval.make_act([x[0].numpy() for x in artifact["weights"].values()], artifact["info"])
    np.testing.assert_allclose(act(obs), policy(state), rtol=1e-5, atol=1e-6)
    assert act(obs).shape == env.action_space.shape and env.action_space.contains(act(obs).astype(np.float32))


class Broken(gym.Env):
    def __init__(self):
        raise AssertionError("a joint\nhas no position")


def test_whatever_an_environment_raises_is_one_line_that_names_it(trained, tmp_path):
    gym.register("Broken-v0", entry_point=Broken)
    name, _ = recorded("pendulum2", "Pendulum-v1")
    flags = (*TINY[2:], "--env", name, "--steps", 2)
    for stage in ("critic", "behavior"):
        run_here(f"srpo_{stage}.py", *flags)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(srpo_actor.gym, "make", lambda *args, **kwargs: Broken())
        with pytest.raises(SystemExit) as e:
            run_here("srpo_actor.py", *flags)
    message = e.value.code
    assert message.startswith("error: cannot play in Pendulum-v1 (") and "\n" not in message and "joint" in message
    assert not (tmp_path / "runs" / "test-pendulum2-v0" / "actor.jsonl").exists()


@pytest.mark.parametrize("id", ["AntMaze_UMaze-v4", "PointMaze_UMaze-v3"])
def test_no_temporary_file_remains(id, tmp_path, monkeypatch):
    """The mazes write their model into the folder of temporary files."""
    before = tempfile.gettempdir()
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    space = gym.make(id).action_space
    for path in folder.iterdir():
        path.unlink()
    info = {"state_dim": 31 if "Ant" in id else 8, "action_low": space.low.tolist(), "action_high": space.high.tolist()}
    env = srpo_eval.make_env({"id": id, "kwargs": {}, "max_episode_steps": 5, "wrappers": []}, info)
    env.reset(seed=0)
    env.step(env.action_space.sample())
    assert not list(folder.iterdir()) and tempfile.gettempdir() == str(folder)
    gym.make(id)  # what the environments do by themselves
    assert [path.suffix for path in folder.iterdir()] == [".xml"]
    monkeypatch.setattr(tempfile, "tempdir", before)


def test_no_temporary_file_remains_of_an_evaluation(data_root, tmp_path):
    """By processes of their own."""
    name, _ = recorded("antmaze2", "AntMaze_UMaze-v4")
    flags = (*TINY[2:], "--env", name, "--steps", 2)
    for stage in ("critic", "behavior"):
        run_here(f"srpo_{stage}.py", *flags)
    folder = tmp_path / "temporary"
    folder.mkdir()
    run("srpo_actor.py", *flags, "--eval-episodes", 11, "--eval-workers", 2, TMPDIR=str(folder))
    assert lines(Path("runs/test-antmaze2-v0/actor.jsonl"))[-1]["eval/episode_length"] == [5.0]
    assert not list(folder.glob("**/*.xml")), os.listdir(folder)
