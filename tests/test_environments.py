"""One environment of each family that Minari has data of: recorded, trained on and scored."""

import json
import os
import tempfile
import warnings
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from conftest import TINY, create, random_episodes, run, run_here
from minari.storage import get_dataset_path
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


# ---- environments that were recorded with wrappers


def recorded_through(name, env, change=lambda metadata: None):
    """Flags of a set recorded in env, with changed metadata, on which critic and behaviour model are trained."""
    create(f"test/{name}-v0", random_episodes(env, 3, 20), env=env)
    path = get_dataset_path(f"test/{name}-v0") / "data" / "metadata.json"
    metadata = json.loads(path.read_text())
    change(metadata)
    path.write_text(json.dumps(metadata))
    flags = ("--env", f"test/{name}-v0", *TINY[2:], "--steps", 20)
    for stage in ("critic", "behavior"):
        run_here(f"srpo_{stage}.py", *flags)
    return flags


def by_hand(env, act, seed):
    obs, total, done = env.reset(seed=seed)[0], 0.0, False
    while not done:
        obs, reward, terminated, truncated, _ = env.step(act(obs))
        total, done = total + reward, terminated or truncated
    return total


@pytest.mark.parametrize(
    "name, wrap",
    [
        ("rescaled", lambda env: gym.wrappers.RescaleAction(env, -1, 1)),
        ("aware", gym.wrappers.TimeAwareObservation),
        ("both", lambda env: gym.wrappers.TimeAwareObservation(gym.wrappers.RescaleAction(env, -0.5, 0.5))),
    ],
)
def test_policies_are_scored_in_the_wrapped_environment(name, wrap, data_root, capsys):
    """By actor and eval.py, against a loop written by hand in what was recorded."""
    env = wrap(gym.make("Pendulum-v1", max_episode_steps=20))
    flags = recorded_through(name, env)
    run_here("srpo_actor.py", *flags, "--eval-episodes", 2, "--eval-workers", 1)
    assert "evaluation in Pendulum-v1, wrappers left out: none" in capsys.readouterr().out
    run_here("eval.py", *flags[:2], "--episodes", 2, "--workers", 1)
    folder = Path(f"runs/test-{name}-v0")
    act = srpo_eval.load_policy(folder / "actor.pt")
    assert lines(folder / "actor.jsonl")[-1]["eval/return"] == [
        pytest.approx(np.mean([by_hand(env, act, s) for s in (0, 1)]))
    ]
    (row,) = json.loads((folder / "eval.json").read_text())["policies"]
    assert row["return"] == pytest.approx(np.mean([by_hand(env, act, s) for s in (1_000_000, 1_000_001)]))
    bare = gym.make("Pendulum-v1", max_episode_steps=20)
    if name == "rescaled":  # half the torque is another score
        assert by_hand(bare, act, 0) != pytest.approx(by_hand(env, act, 0))


def test_other_wrappers_are_named_and_nothing_that_they_name_is_imported(data_root, capsys, tmp_path, monkeypatch):
    (tmp_path / "intruder.py").write_text("import os\nos.mkdir('code-has-run')\n")
    monkeypatch.syspath_prepend(tmp_path)

    def change(metadata):
        spec = json.loads(metadata["env_spec"])
        ours = {
            "kwargs": {"max_episode_steps": 7},
            "name": "TimeLimit",
            "entry_point": "gymnasium.wrappers.common:TimeLimit",
        }
        others = [ours | {"entry_point": "intruder:TimeLimit"}, ours | {"name": "Monitor", "kwargs": None}]
        films = {"kwargs": {"video_folder": "films"}, "name": "RecordVideo"}
        others.append(films | {"entry_point": "gymnasium.wrappers.rendering:RecordVideo"})
        running = {"kwargs": {}, "name": "NormalizeObservation"}  # the statistics of the recording are lost
        others.append(running | {"entry_point": "gymnasium.wrappers.stateful_observation:NormalizeObservation"})
        spec["kwargs"]["render_mode"] = "human"  # would open a window
        metadata["env_spec"] = json.dumps(spec | {"additional_wrappers": [*others, ours]})

    flags = recorded_through("strange", gym.make("Pendulum-v1", max_episode_steps=20), change)
    run_here("srpo_actor.py", *flags, "--eval-episodes", 2, "--eval-workers", 1)
    run_here("eval.py", *flags[:2], "--episodes", 2, "--workers", 1)
    said = "wrappers left out: TimeLimit, Monitor, RecordVideo, NormalizeObservation"
    assert capsys.readouterr().out.count(said) == 2 and not Path("code-has-run").exists() and not Path("films").exists()
    assert lines(Path("runs/test-strange-v0/actor.jsonl"))[-1]["eval/episode_length"] == [7.0]  # gymnasium's is applied


def test_an_environment_of_other_spaces_is_refused_with_both(data_root):
    """The wrapper is not gymnasium's, and without it the actions are others than in the data."""

    def change(metadata):
        metadata["env_spec"] = metadata["env_spec"].replace("gymnasium.wrappers.transform_action:", "mine:")

    env = gym.wrappers.RescaleAction(gym.make("Pendulum-v1", max_episode_steps=20), -1, 1)
    flags = recorded_through("other-spaces", env, change)
    with pytest.raises(SystemExit) as e:
        run_here("srpo_actor.py", *flags)
    assert "Box(-2.0, 2.0, (1,), float32)" in e.value.code and "(3, -1.0, 1.0)" in e.value.code
    assert e.value.code.startswith("error: cannot play in Pendulum-v1 (") and e.value.code.endswith("--eval-every 0")
    assert not list(Path("runs/test-other-spaces-v0").glob("actor*"))
    run_here("srpo_actor.py", *flags, "--eval-every", 0)


class Broken(gym.Env):
    def __init__(self):
        raise AssertionError("a joint\nhas no position")


def test_whatever_an_environment_raises_is_one_line_that_names_it(data_root, tmp_path):
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
