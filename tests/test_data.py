"""load_dataset against plain loops over what was recorded."""

import dataclasses
import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, columns, create, episode, random_episodes, run, run_here
from minari.serialization import deserialize_space
from minari.storage import get_dataset_path, hosting

import eval as srpo_eval
import srpo_actor
import srpo_behavior
import srpo_critic
from srpo_critic import minari_ids


def load_dataset(*args):
    return columns(*srpo_critic.load_dataset(*args))


BOX = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
ACTION = gym.spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
ENDS = (True, False, True, False)  # how each episode of the set below ends
LENGTHS = (5, 1, 7, 30)


@pytest.fixture
def own_root(tmp_path_factory, monkeypatch):
    """An empty Minari folder of the test's own, for sets that others must not find."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root := tmp_path_factory.mktemp("own")))
    return root


def random_recording(lengths=LENGTHS, ends=ENDS, seed=0):
    rng, episodes = np.random.default_rng(seed), []
    for n, end in zip(lengths, ends):
        actions = rng.uniform(ACTION.low, ACTION.high, (n, 2)).astype(np.float32)
        episodes.append(episode(rng.normal(size=(n + 1, 3)), actions, rng.normal(size=n), end))
    return episodes


@pytest.fixture(scope="module")
def recorded(data_root):
    episodes = random_recording()
    create("test/plain-v0", episodes, observation_space=BOX, action_space=ACTION)
    return episodes


def test_transitions_are_those_recorded(recorded):
    data, info = load_dataset("test/plain-v0", None, False, "cpu")
    returns = [e.rewards.sum() for e in recorded]
    scale, n = 1000 / (max(returns) - min(returns)), 0
    for e, end in zip(recorded, ENDS):
        for t in range(len(e.rewards)):
            np.testing.assert_allclose(data["obs"][n], e.observations[t], rtol=1e-6)
            following = e.observations[t + 1]  # never the next episode's
            np.testing.assert_allclose(data["next_obs"][n], following, rtol=1e-6)
            np.testing.assert_allclose(data["action"][n], [e.actions[t, 0] / 2, 2 * e.actions[t, 1] - 1], atol=1e-6)
            np.testing.assert_allclose(data["reward"][n], e.rewards[t] * scale, rtol=1e-5)
            assert data["terminal"][n] == (end and t == len(e.rewards) - 1)  # 0 at a time-out
            n += 1
    assert n == len(data["obs"]) == info["fingerprint"][0] == sum(LENGTHS)
    assert all(x.dtype == torch.float32 for x in data.values())
    assert (info["state_dim"], info["action_dim"], info["longest_episode"]) == (3, 2, 30) and not info["maze"]
    assert info["action_low"] == [-2, 0] and info["action_high"] == [2, 1]
    assert info["data_outcome"] == pytest.approx(np.mean(returns))
    assert info["minari"] == {}  # no environment was recorded


def test_only_equal_spaces_are_joined(recorded, data_root):
    wider = gym.spaces.Box(-10, 10, (2,), np.float32)
    create("test/other-bounds-v0", recorded[:1], observation_space=BOX, action_space=wider)
    with pytest.raises(SystemExit, match="only data of one environment can be joined"):
        load_dataset("x", "test/plain-v0+test/other-bounds-v0", None, "cpu")
    for robot in ("HalfCheetah", "Walker2d"):  # of equal spaces
        steps = episode(np.zeros((2, 17)), np.zeros((1, 6), np.float32), [0.0])
        create(f"test/{robot.lower()}-v0", [steps], env=gym.make(f"{robot}-v5"))
    with pytest.raises(SystemExit, match="only data of one environment can be joined"):
        load_dataset("x", "test/halfcheetah-v0+test/walker2d-v0", None, "cpu")


def test_fingerprint_tells_data_sets_apart(recorded, data_root):
    fingerprint = load_dataset("test/plain-v0", None, None, "cpu")[1]["fingerprint"]
    assert fingerprint == load_dataset("other name", "test/plain-v0", None, "cpu")[1]["fingerprint"]
    last = recorded[3]
    changed = [*recorded[:3], episode(last.observations, last.actions, last.rewards + 1e-3)]
    create("test/changed-v0", changed, observation_space=BOX, action_space=ACTION)
    assert fingerprint != load_dataset("test/changed-v0", None, None, "cpu")[1]["fingerprint"]


def test_joined_sets_follow_one_another(recorded):
    one, _ = load_dataset("test/plain-v0", None, None, "cpu")
    two, info = load_dataset("x", "test/plain-v0+test/plain-v0", None, "cpu")
    assert info["fingerprint"][0] == 2 * sum(LENGTHS)
    for name in one:
        assert torch.equal(two[name], torch.cat([one[name], one[name]]))


def test_equal_returns_leave_the_rewards_alone(data_root):
    obs, actions = np.zeros((4, 3)), np.zeros((3, 2), np.float32)
    create("test/equal-v0", [episode(obs, actions, [1.0, 2.0, 3.0])] * 2, observation_space=BOX, action_space=ACTION)
    assert load_dataset("test/equal-v0", None, None, "cpu")[0]["reward"].tolist() == [1, 2, 3, 1, 2, 3]


def test_returns_that_differ_by_rounding_alone_leave_the_rewards_alone(data_root):
    obs, actions = np.zeros((4, 3)), np.zeros((3, 2), np.float32)
    episodes = [episode(obs, actions, rewards) for rewards in ([0.1, 0.2, 0.3], [0.3, 0.2, 0.1])]
    assert episodes[0].rewards.sum() != episodes[1].rewards.sum()
    create("test/rounding-return-v0", episodes, observation_space=BOX, action_space=ACTION)
    assert load_dataset("test/rounding-return-v0", None, None, "cpu")[0]["reward"].tolist() == [
        pytest.approx(x) for x in (0.1, 0.2, 0.3, 0.3, 0.2, 0.1)
    ]


def test_actions_outside_the_bounds_are_clipped_and_counted(data_root, capsys):
    actions = np.float32([[0, 0.5], [2, 1], [2.5, 0.5], [-3, 1.5], [1, -1e-3]])  # inside, on, and outside in three rows
    steps = episode(np.zeros((6, 3)), actions, np.zeros(5))
    create("test/too-large-v0", [steps], observation_space=BOX, action_space=ACTION)
    data, _ = load_dataset("test/too-large-v0", None, None, "cpu")
    expected = [[0, 0], [1, 1], [1, 0], [-1, 1], [0.5, -1]]
    np.testing.assert_allclose(data["action"], expected, atol=1e-6)
    assert (
        "1 episodes, mean return 0.00, 5 transitions, 3 actions clipped, 0 steps without next state cut"
        in capsys.readouterr().out
    )


def test_an_episode_without_its_last_observation_loses_its_last_transition(data_root, capsys):
    """As some public sets have it, unless it terminates: then nothing depends on what follows."""
    episodes = random_recording()
    for i in (0, 3):  # of five steps, of which the last terminates, and of thirty
        episodes[i] = dataclasses.replace(episodes[i], observations=episodes[i].observations[:-1])
    create("test/short-v0", episodes, observation_space=BOX, action_space=ACTION)
    data, info = load_dataset("test/short-v0", None, False, "cpu")
    assert "42 transitions, 0 actions clipped, 1 steps without next state cut" in capsys.readouterr().out
    obs = [episodes[0].observations, *(e.observations[:-1] for e in episodes[1:])]
    np.testing.assert_allclose(data["obs"], np.concatenate(obs), rtol=1e-6)
    following = [e.observations[1:] for e in episodes]
    following[0] = np.concatenate([following[0], episodes[0].observations[-1:]])  # some state, which is not used
    np.testing.assert_allclose(data["next_obs"], np.concatenate(following), rtol=1e-6)
    assert info["fingerprint"][0] == 5 + 1 + 7 + 29 and data["terminal"].nonzero().flatten().tolist() == [4, 12]


def test_actions_of_integers_are_scaled_without_overflow(data_root):
    bounds = gym.spaces.Box(-100, 100, (2,), np.int8)
    actions = np.array([[-100, 50], [0, 100], [100, -25]], np.int8)
    create(
        "test/int8-v0", [episode(np.zeros((4, 3)), actions, np.zeros(3))], observation_space=BOX, action_space=bounds
    )
    data, info = load_dataset("test/int8-v0", None, None, "cpu")
    assert data["action"].tolist() == [[-1, 0.5], [0, 1], [1, -0.25]] and info["action_high"] == [100, 100]


def test_an_action_with_equal_bounds_is_constant(data_root):
    """A gripper that is held: 0.3 in the data and when the policy acts, whatever else it learns."""
    bounds = gym.spaces.Box(np.float32([-2, 0.3]), np.float32([2, 0.3]))
    rng = np.random.default_rng(0)
    actions = np.stack([rng.uniform(-2, 2, 9), np.full(9, 0.3)], axis=1).astype(np.float32)
    create(
        "test/held-v0",
        [episode(np.zeros((10, 3)), actions, rng.normal(size=9))],
        observation_space=BOX,
        action_space=bounds,
    )
    data, _ = load_dataset("test/held-v0", None, None, "cpu")
    np.testing.assert_allclose(data["action"][:, 0], actions[:, 0] / 2, atol=1e-6)
    assert (data["action"][:, 1] == -1).all()
    for stage in ("critic", "behavior", "actor"):
        run_here(f"srpo_{stage}.py", "--env", "test/held-v0", *TINY[2:], "--steps", 5)
    act = srpo_eval.load_policy("runs/test-held-v0/actor.pt")
    action = act(rng.normal(size=(20, 3)))
    assert (action[:, 1] == np.float32(0.3)).all() and np.abs(action[:, 0]).max() < 2


def test_the_remedy_of_a_missing_library_is_its_own(data_root, recorded):
    """Minari's arrow format without pyarrow: a download would not help."""
    if importlib.util.find_spec("pyarrow"):
        pytest.skip("pyarrow is installed")
    create("test/arrow-v0", recorded, observation_space=BOX, action_space=ACTION)
    path = get_dataset_path("test/arrow-v0") / "data" / "metadata.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"data_format": "arrow"}))
    found = refusal("test/arrow-v0")
    assert 'pip install "minari[arrow]"' in found and "minari download" not in found


def test_normalisation_is_by_mean_and_deviation_of_the_states(recorded):
    rows = np.concatenate([e.observations[:-1] for e in recorded])
    following = np.concatenate([e.observations[1:] for e in recorded])
    mean, std = rows.sum(axis=0) / len(rows), np.sqrt(((rows - rows.mean(axis=0)) ** 2).sum(axis=0) / len(rows))
    data, info = load_dataset("test/plain-v0", None, True, "cpu")
    np.testing.assert_allclose(info["obs_mean"], mean, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(info["obs_std"], std, rtol=1e-5)
    np.testing.assert_allclose(data["obs"], (rows - mean) / std, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(data["next_obs"], (following - mean) / std, rtol=1e-4, atol=1e-5)  # of the same numbers


def test_a_dimension_constant_but_for_rounding_is_not_divided(data_root):
    obs = np.ones((11, 3), np.float32)
    obs[5, 0], obs[:, 1] = np.nextafter(np.float32(1), np.float32(2)), np.arange(11)
    spaces = {"observation_space": BOX, "action_space": ACTION}
    actions = np.zeros((10, *ACTION.shape), np.float32)
    create("test/rounding-v0", [episode(obs, actions, np.arange(10.0))], **spaces)
    info = load_dataset("test/rounding-v0", None, True, "cpu")[1]
    assert info["obs_std"] == [1, pytest.approx(np.arange(10).std()), 1]


@pytest.mark.parametrize(
    "env, flag, on",
    [
        ("test/plain-v0", None, True),
        ("some-task", None, True),
        ("hopper-medium", None, False),
        ("walker2d-medium-replay-v2", None, False),
        ("antmaze-umaze", None, False),
        ("test/plain-v0", False, False),
        ("hopper-medium", True, True),
    ],
)
def test_normalisation_is_off_for_d4rl_s_task_names(env, flag, on, recorded, capsys):
    for stage in (srpo_critic, srpo_behavior):
        data, info = columns(*stage.load_dataset(env, "test/plain-v0", flag, "cpu"))
        assert (info["obs_mean"] != [0, 0, 0], info["obs_std"] != [1, 1, 1]) == (on, on)
        assert np.allclose(data["obs"][0], recorded[0].observations[0], atol=1e-6) == (not on)
        assert f"standardised: {on}" in capsys.readouterr().out


def losses(folder):
    lines = [json.loads(line) for line in Path("runs", folder, "critic.jsonl").read_text().splitlines()]
    return np.array([[line[name] for name in srpo_critic.METRICS] for line in lines])


def test_normalised_training_does_not_depend_on_units(recorded, data_root):
    unit, zero = np.array([1000.0, 0.01, 3.0]), np.array([5.0, 7.0, -2.0])
    other = [episode(unit * e.observations + zero, e.actions, e.rewards, end) for e, end in zip(recorded, ENDS)]
    create("test/units-v0", other, observation_space=BOX, action_space=ACTION)
    (one, about), (two, info) = (load_dataset(f"test/{name}-v0", None, True, "cpu") for name in ("plain", "units"))
    for name in one:
        np.testing.assert_allclose(one[name], two[name], rtol=1e-3, atol=1e-3)  # 7 + 0.01 x loses three digits of x
    np.testing.assert_allclose(info["obs_std"], unit * about["obs_std"], rtol=1e-4)
    for name in ("plain", "units"):
        flags = ("--env", f"test/{name}-v0", "--steps", 20, "--batch-size", 8, "--log-every", 5)
        run_here("srpo_critic.py", *flags)
        run_here("srpo_critic.py", *flags, "--no-normalize-obs", "--run-name", f"{name}-as-it-is")
    assert losses("test-plain-v0").shape == (4, 5, 1)
    np.testing.assert_allclose(losses("test-plain-v0"), losses("test-units-v0"), rtol=1e-3, atol=1e-3)
    assert np.abs(losses("plain-as-it-is") / losses("units-as-it-is") - 1).max() > 0.5


def test_a_constant_dimension_is_only_moved_to_0(recorded, data_root):
    constant = [e.observations.copy() for e in recorded]
    for obs in constant:
        obs[:, 1] = 0.3  # whose mean is not exactly 0.3 in float32
    episodes = [episode(obs, e.actions, e.rewards) for obs, e in zip(constant, recorded)]
    create("test/constant-v0", episodes, observation_space=BOX, action_space=ACTION)
    data, info = load_dataset("test/constant-v0", None, None, "cpu")
    assert info["obs_std"][1] == 1 and info["obs_mean"][1] == pytest.approx(0.3)
    assert all(x.isfinite().all() for x in data.values())
    assert data["obs"][:, 1].abs().max() < 1e-6 and data["next_obs"][:, 1].abs().max() < 1e-6
    np.testing.assert_allclose(data["obs"].std(dim=0, correction=0)[[0, 2]], 1, rtol=1e-4)


def test_stages_must_agree_on_the_normalisation(trained):
    run_here("srpo_behavior.py", *TINY, "--steps", 1, "--no-normalize-obs")
    paths = ("--critic", trained / "critic.pt", "--behavior", "runs/test-pendulum-v0/behavior.pt")
    with pytest.raises(SystemExit, match=r"behavior.pt has obs_mean = .*: run srpo_behavior.py again"):
        run_here("srpo_actor.py", *TINY, "--steps", 1, "--eval-every", 0, *paths)


def stacked(samples):
    """One array per leaf, as Minari stores observations."""
    if isinstance(samples[0], dict):
        return {key: stacked([x[key] for x in samples]) for key in samples[0]}
    if isinstance(samples[0], tuple):
        return tuple(stacked([x[i] for x in samples]) for i in range(len(samples[0])))
    return np.stack(samples)


MATRIX = gym.spaces.Box(-1, 1, (2, 3), np.float64)
SPACES = {
    "matrix": (MATRIX, 6),
    "many-bits": (gym.spaces.MultiBinary([2, 4]), 8),
    "discrete": (gym.spaces.Discrete(5), 5),
    "discrete-from-3": (gym.spaces.Discrete(4, start=3), 4),
    "many-discrete": (gym.spaces.MultiDiscrete([3, 2, 4]), 9),
    "bytes": (gym.spaces.Box(0, 255, (2, 5), np.uint8), 10),
    "integers": (gym.spaces.Box(-9, 9, (4,), np.int64), 4),
    "tuple": (gym.spaces.Tuple((MATRIX, gym.spaces.Discrete(3), gym.spaces.MultiBinary(2))), 11),
    "nested": (
        gym.spaces.Dict(
            {
                "z": gym.spaces.Discrete(3),
                "a": gym.spaces.Dict({"y": MATRIX, "b": gym.spaces.Tuple((gym.spaces.MultiBinary(2), BOX))}),
            }
        ),
        14,
    ),
    "largest": (gym.spaces.Box(0, 1, (64, 64), np.float32), 4096),
}


@pytest.mark.parametrize("name", SPACES)
def test_observations_are_those_of_gymnasium_s_flatten(name, data_root):
    space, size = SPACES[name]
    space.seed(0)
    samples = [[space.sample() for _ in range(n + 1)] for n in (4, 1)]
    episodes = [episode(stacked(x), np.zeros((len(x) - 1, 2), np.float32), np.zeros(len(x) - 1)) for x in samples]
    create(f"spaces/{name}-v0", episodes, observation_space=space, action_space=ACTION)
    data, info = load_dataset(f"spaces/{name}-v0", None, False, "cpu")
    rows = [[gym.spaces.flatten(space, x) for x in part] for part in samples]
    for key, expected in ("obs", rows[0][:-1] + rows[1][:-1]), ("next_obs", rows[0][1:] + rows[1][1:]):
        assert data[key].dtype == torch.float32 and data[key].shape == (5, size)
        for row, x in zip(data[key].numpy(), expected):
            np.testing.assert_allclose(row, x, rtol=1e-6)
    assert info["state_dim"] == size and deserialize_space(info["observation_space"]) == space
    assert all(x.isfinite().all() for x in load_dataset(f"spaces/{name}-v0", None, True, "cpu")[0].values())


@pytest.fixture(scope="module")
def maze(data_root):
    """A recording of three episodes, two of which are put on their goal at step 3 (and later) and at the last step."""
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    env = gym.make("PointMaze_UMaze-v3", max_episode_steps=10, continuing_task=True, reset_target=False)
    episodes = random_episodes(env, 3, 10)
    for e, success in zip(episodes, ([3, 4, 7], [10], [])):
        e.observations["achieved_goal"][:] = e.observations["desired_goal"] + 1
        e.observations["achieved_goal"][success] = e.observations["desired_goal"][success] + 0.3
    create("test/maze-v0", episodes, env=env)
    return episodes


def test_success_ends_the_task_in_mazes(maze):
    data, info = load_dataset("test/maze-v0", None, False, "cpu")
    assert info["maze"] and info["data_outcome"] == pytest.approx(2 / 3)
    assert len(data["obs"]) == 3 + 10 + 10
    assert data["terminal"].nonzero().flatten().tolist() == [2, 12]  # the second success is in the last step
    facts = srpo_actor.evaluation_info(info)
    assert [e["id"] for e in facts["environments"].values()] == ["PointMaze_UMaze-v3"] * 2
    assert [e["max_episode_steps"] for e in facts["environments"].values()] == [10, 10]
    assert facts["reference"] == (0, 1)
    reward = np.concatenate([maze[0].rewards[:3], maze[1].rewards, maze[2].rewards])
    np.testing.assert_allclose(data["reward"], reward - 1)
    o = maze[1].observations
    rows = np.concatenate([o["achieved_goal"], o["desired_goal"], o["observation"]], axis=1)  # the written order
    np.testing.assert_allclose(data["obs"][3:13], rows[:-1], rtol=1e-6)
    np.testing.assert_allclose(data["next_obs"][3:13], rows[1:], rtol=1e-6)


def test_a_maze_without_goals_in_its_observations_is_a_maze(maze):
    """Recorded through a wrapper: rewards r - 1 and the recorded terminations; a reward of 1 counts as a success."""
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    kwargs = {"continuing_task": True, "reset_target": False}
    env = gym.wrappers.FlattenObservation(gym.make("PointMaze_UMaze-v3", max_episode_steps=10, **kwargs))
    episodes = random_episodes(env, 3, 10)
    episodes[1].rewards[4:6] = 1  # as if it had passed the goal
    episodes[2] = dataclasses.replace(episodes[2], terminations=np.arange(10) == 9)
    create("test/flat-maze-v0", episodes, env=env)
    data, info = load_dataset("test/flat-maze-v0", None, False, "cpu")
    rewards = np.concatenate([e.rewards for e in episodes])
    assert data["reward"].tolist() == (rewards - 1).tolist() and data["terminal"].nonzero().tolist() == [[29]]
    assert info["maze"] and info["by_success"] and info["data_outcome"] == pytest.approx(2 / 3)
    flags = ("--env", "test/flat-maze-v0", "--steps", 2, "--batch-size", 4)
    assert run_here("srpo_critic.py", *flags)["args"].expectile == 0.9
    run_here("srpo_behavior.py", *flags)
    args = run_here("srpo_actor.py", *flags, "--eval-episodes", 2, "--eval-workers", 1)["args"]
    assert (args.hidden_layers, args.q_grad_norm) == (4, "rms")
    line = json.loads(Path("runs/test-flat-maze-v0/actor.jsonl").read_text().splitlines()[-1])
    assert line["eval/success"] == [0.0] == line["eval/score"]


def test_value_order_compares_each_success_with_its_countdown(maze, capsys):
    from examples.value_order import spearman, successes

    for normalize_obs in (False, True):
        data = load_dataset("test/maze-v0", None, normalize_obs, "cpu")[0]
        found = successes(data["obs"], data["next_obs"], data["terminal"])
        assert list(found) == [slice(0, 3), slice(3, 13)]  # and not the third episode, which fails
    x = np.array([0.1, 5.0, 0.3, 40.0])
    assert spearman(x, x**3) == pytest.approx(1) and spearman(x, -x) == pytest.approx(-1)
    assert spearman(np.zeros(9), np.arange(9)) == 0  # ties are no order
    assert spearman(np.array([0.0, 0.0, 1.0]), np.arange(3)) == pytest.approx(np.sqrt(3) / 2)
    ranks = np.array([0, 2, 1, 3])
    assert spearman(x, np.arange(4)) == pytest.approx(1 - 6 * ((ranks - np.arange(4)) ** 2).sum() / (4 * 15))

    flags = ("--batch-size", 8, "--steps", 3, "--num-seeds", 2)
    run_here("srpo_critic.py", "--env", "test/maze-v0", *flags)
    artifact = torch.load("runs/test-maze-v0/critic.pt")
    net = [artifact["weights"][f"v.{i}.{x}"][1] for i in (0, 2, 4) for x in ("weight", "bias")]  # of seed 1
    s = data["obs"].clone()
    for weight, bias in zip(net[::2], net[1::2]):
        s = s @ weight + bias
        s = s.relu() if weight.shape[1] > 1 else s[:, 0]
    expected = [spearman(s[part].numpy(), np.arange(part.stop - part.start)) for part in (slice(0, 3), slice(3, 13))]
    capsys.readouterr()
    run_here("examples/value_order.py", "--env", "test/maze-v0")
    assert f"seed 1: Spearman {np.mean(expected):.4f}" in capsys.readouterr().out


def test_value_order_is_for_mazes(trained):
    with pytest.raises(SystemExit, match="error: test/pendulum-v0 is no maze"):
        run_here("examples/value_order.py", "--env", "test/pendulum-v0", "--out-dir", trained.parent)


def test_reference_scores(data_root):
    env, obs = gym.make("Hopper-v5"), np.zeros((2, 11))
    create("test/hopper-v0", [episode(obs, np.zeros((1, 3), np.float32), [1616.50])], env=env)
    info = load_dataset("test/hopper-v0", None, None, "cpu")[1]
    assert info["data_outcome"] == pytest.approx(1616.50)
    assert srpo_actor.evaluation_info(info)["reference"] == (-20.272305, 3234.3)
    assert srpo_actor.D4RL_SCORES["HalfCheetah"] == (-280.178953, 12135.0)
    assert srpo_actor.D4RL_SCORES["Walker2d"] == (1.629008, 4592.3)
    scores = {"ref_min_score": -1.0, "ref_max_score": 3.0}  # the data's own come first
    create("test/scored-v0", [episode(obs, np.zeros((1, 3), np.float32), [1.0])], env=env, **scores)
    info = load_dataset("test/scored-v0", None, None, "cpu")[1]
    assert srpo_actor.evaluation_info(info)["reference"] == (-1, 3)
    info = load_dataset("test/pendulum-v0", None, None, "cpu")[1]
    assert srpo_actor.evaluation_info(info)["reference"] == (0, 100)  # the return is the score


TABLE_2 = """
medium-expert  walker2d 0.1   halfcheetah 0.01  hopper 0.01
medium         walker2d 0.05  halfcheetah 0.2   hopper 0.05
medium-replay  walker2d 0.5   halfcheetah 0.2   hopper 0.2
umaze 0.02  umaze-diverse 0.04  medium-play 0.08  medium-diverse 0.05  large-play 0.06  large-diverse 0.05
"""


def test_every_task_of_the_paper_has_its_numbers():
    betas, ids, rows = {}, {}, [line.split() for line in TABLE_2.strip().splitlines()]
    for level, *cells in rows[:3]:
        for domain, beta in zip(cells[::2], cells[1::2]):
            betas.setdefault(domain, {})[level] = float(beta)
            parts = {"medium-expert": ["medium", "expert"]}.get(level, [level])
            ids[f"{domain}-{level}"] = [f"mujoco/{domain}/{part}-v0" for part in parts]
            if level == "medium-replay":
                ids[f"{domain}-{level}"] = [f"D4RL/{domain}/medium-replay-v2"]
    betas["antmaze"] = {level: float(beta) for level, beta in zip(rows[3][::2], rows[3][1::2])}
    ids |= {f"antmaze-{level}": [f"D4RL/antmaze/{level}-v1"] for level in betas["antmaze"]}
    assert srpo_actor.BETAS == betas and len(ids) == 15
    for env, expected in ids.items():
        domain, level = env.split("-", 1)
        assert minari_ids(env) == expected and minari_ids(f"{env}-v2") == [f"D4RL/{domain}/{level}-v2"]
    assert minari_ids("walker2d-medium-expert") == ["mujoco/walker2d/medium-v0", "mujoco/walker2d/expert-v0"]
    assert minari_ids("antmaze-large-play") == ["D4RL/antmaze/large-play-v1"]
    assert minari_ids("hopper-simple") == ["mujoco/hopper/simple-v0"]  # a set that only Minari has
    for other in ("D4RL/pen/human-v2", "D4RL/hopper/medium-replay-v2", "local/pointmaze-demo-v0", "mine"):
        assert minari_ids(other) == [other]


def test_defaults_are_the_papers(trained):
    critic, behavior, actor = srpo_critic.Args(env=""), srpo_behavior.Args(env=""), srpo_actor.Args(env="")
    assert (critic.steps, critic.batch_size, critic.lr, critic.lr_decay) == (1_500_000, 256, 3e-4, False)
    assert (critic.gamma, critic.tau) == (0.99, 0.005)
    assert (behavior.steps, behavior.batch_size, behavior.lr) == (2_000_000, 2048, 3e-4)
    assert (behavior.lr_decay, behavior.predict) == (False, "eps")
    assert (actor.steps, actor.batch_size, actor.lr) == (1_000_000, 256, 3e-4)
    assert (actor.weight, actor.baseline, actor.eval_env) == ("sigma2", True, "fixed")
    paths = ("--critic", trained / "critic.pt", "--behavior", trained / "behavior.pt")
    args = run_here("srpo_actor.py", *TINY, "--steps", 1, "--eval-every", 0, *paths)["args"]
    assert (args.beta, args.hidden_layers, args.q_grad_norm) == ((0.05,), 2, "none")  # ours, for other data


def test_a_task_s_numbers_do_not_depend_on_the_data(maze):
    """Named by --dataset, in the paper's units; the rules of mazes hold for all mazes."""
    flags, data = ("--env", "antmaze-large-play-v2", "--steps", 1, "--batch-size", 4), ("--dataset", "test/maze-v0")
    args = run_here("srpo_critic.py", *flags, *data)["args"]
    assert args.expectile == 0.9
    run_here("srpo_behavior.py", *flags, *data)
    args = run_here("srpo_actor.py", *flags, "--eval-every", 0)["args"]
    assert (args.beta, args.hidden_layers, args.q_grad_norm) == ((0.06,), 4, "rms")
    artifact = torch.load("runs/antmaze-large-play-v2/actor.pt")  # the name is as it was given
    assert (artifact["info"]["env"], artifact["betas"]) == ("antmaze-large-play-v2", [0.06])
    assert artifact["info"]["obs_std"] == [1] * 8 and len(artifact["weights"]) == 2 * 5


def qlearning_dataset(path):
    """D4RL's rules as a plain loop: rows of obs, action, reward, next_obs, terminal; and the returns of their steps."""
    with h5py.File(path) as file:
        columns = {name: column[:] for name, column in file.items() if isinstance(column, h5py.Dataset)}
    rows, returns, episode = [], [], []
    for i in range(len(columns["rewards"])):
        obs, action, reward = columns["observations"][i], columns["actions"][i], float(columns["rewards"][i].squeeze())
        terminal, timeout = bool(columns["terminals"][i]), bool(columns["timeouts"][i])
        last = i == len(columns["rewards"]) - 1
        if not timeout and not last:
            rows.append((obs, action, reward, columns["observations"][i + 1], terminal))
            episode.append(reward)
        if terminal or timeout or last:
            returns += [sum(episode)] if episode else []
            episode = []
    return rows, returns


def imported(path, id, capsys, *flags):
    """The flags of the command that the import prints; its line is checked against the loop."""
    rows, returns = qlearning_dataset(path)
    capsys.readouterr()
    run_here("examples/import_d4rl.py", path, *flags)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{id}: {len(returns):,} episodes, {len(rows):,} transitions; ")
    return re.search("`python srpo_critic.py (.*)`", line)[1].split()


def same_as_loop(path, env, dataset=None):
    rows, returns = qlearning_dataset(path)
    data, info = load_dataset(env, dataset, False, "cpu")
    assert info["fingerprint"][0] == len(rows) == len(data["obs"])
    scale = 1000 / (max(returns) - min(returns)) if len(set(returns)) > 1 else 1
    for name, column in zip(("obs", "action", "reward", "next_obs", "terminal"), zip(*rows)):
        expected = np.stack(column) * (scale if name == "reward" else 1)
        np.testing.assert_allclose(data[name], expected, rtol=1e-4, atol=1e-6)
    assert info["data_outcome"] == pytest.approx(np.mean(returns), rel=1e-4)
    assert info["action_low"] == [-1] * info["action_dim"] and info["action_high"] == [1] * info["action_dim"]
    return data, info


def write_d4rl(path, lengths, ends, dtype=np.float32, shape=(), **other):
    """A file as D4RL wrote them: ends holds terminal, timeout, both or nothing per episode."""
    rng, n = np.random.default_rng(1), sum(lengths)
    last = np.zeros((2, n), dtype if shape else bool)
    for i, end in zip(np.cumsum(lengths) - 1, ends):
        last[0, i], last[1, i] = "terminal" in end, "timeout" in end
    with h5py.File(path, "w") as f:
        f["observations"], f["actions"] = rng.normal(size=(n, 11)).astype(dtype), rng.uniform(-1, 1, (n, 3))
        f["rewards"], f["terminals"], f["timeouts"] = rng.normal(size=(n, *shape)).astype(dtype), *last
        for name, value in other.items():
            f[name] = value
    return path


@pytest.mark.parametrize(
    "ends",
    [
        ("terminal", "timeout", "terminal timeout", "timeout", "terminal"),
        ("timeout", "terminal", "timeout", "terminal", ""),  # the last episode was cut
        ("timeout", "", "terminal", "timeout", "timeout"),
        ("", "", "", "", ""),  # one long episode
    ],
)
@pytest.mark.parametrize("dtype, shape", [(np.float32, ()), (np.float64, (1,))])  # v2; and as the oldest files are
def test_d4rl_files_become_sets_with_d4rl_s_transitions(ends, dtype, shape, tmp_path, own_root, capsys):
    lengths, path = (4, 6, 1, 5, 3), tmp_path / "hopper_medium_replay-v2.hdf5"
    write_d4rl(path, lengths, ends, dtype, shape, next_observations=np.zeros((19, 11)))
    flags = imported(path, "D4RL/hopper/medium-replay-v2", capsys)
    assert flags == ["--env", "hopper-medium-replay-v2"]  # which finds it
    data, info = same_as_loop(path, "hopper-medium-replay-v2")
    assert load_dataset("hopper-medium-replay", None, False, "cpu")[1]["fingerprint"] == info["fingerprint"]
    lost = sum("timeout" in end for end in ends) + ("timeout" not in ends[-1])
    assert len(data["obs"]) == sum(lengths) - lost and info["state_dim"] == 11
    hopper = {"id": "Hopper-v5", "kwargs": {}, "max_episode_steps": 1000}
    facts = srpo_actor.evaluation_info(info)
    assert [three(environment) for environment in facts["environments"].values()] == [hopper, hopper]
    assert facts["reference"] == (-20.272305, 3234.3)
    with pytest.raises(SystemExit, match="error: .* already: run `minari delete D4RL/hopper/medium-replay-v2`"):
        run_here("examples/import_d4rl.py", path)


def test_ids_of_imported_sets(tmp_path, own_root, capsys):
    """By the file's name, or as told; and the task that each is for."""
    path = write_d4rl(tmp_path / "x.hdf5", (3, 2), ("timeout", "terminal"))
    for name, id, task in (
        ("hopper_medium-v2", "D4RL/hopper/medium-v2", "hopper-medium-v2"),
        ("hopper_medium", "D4RL/hopper/medium-v0", "hopper-medium"),
        ("hopper_medium_expert-v2", "D4RL/hopper/medium-expert-v2", "hopper-medium-expert-v2"),
        ("hopper-medium-replay-v1", "D4RL/hopper/medium-replay-v1", "hopper-medium-replay"),
    ):
        shutil.copy(path, f"{name}.hdf5")
        other = [] if task.endswith("-v2") else ["--dataset", id]
        assert imported(f"{name}.hdf5", id, capsys) == ["--env", task, *other]
        same_as_loop(path, task, *other[1:])
    for name, id in ("x", "mine/robot-v0"), ("hopper_medium", "mine/hops-v3"):
        assert imported(f"{name}.hdf5", id, capsys, "--id", id) == ["--env", id]
        _, info = same_as_loop(path, id)
        assert ("env_spec" in info["minari"]) == (name != "x")
        if name != "x":
            assert srpo_actor.evaluation_info(info)["environments"]["data"]["id"] == "Hopper-v5"
    id = "D4RL/hopper/medium-replay-v2"
    assert imported("x.hdf5", id, capsys, "--id", id) == ["--env", "hopper-medium-replay-v2"]


EXCERPTS = Path(os.environ.get("D4RL_FILES", ROOT.parent / "shared" / "data" / "d4rl_excerpts"))


@pytest.mark.skipif(not EXCERPTS.exists(), reason="no original files in the folder that D4RL_FILES names")
@pytest.mark.parametrize(
    "file, id, robot, size",
    [
        ("hopper_medium-v2", "D4RL/hopper/medium-v2", "Hopper", 910),
        ("halfcheetah_medium-v2", "D4RL/halfcheetah/medium-v2", "HalfCheetah", 1998),
        ("walker2d_medium-v2", "D4RL/walker2d/medium-v2", "Walker2d", 1998),
        ("hopper_medium", "D4RL/hopper/medium-v0", "Hopper", 523),
        ("hopper_medium_replay-v1", "D4RL/hopper/medium-replay-v1", "Hopper", 48),
    ],
)
def test_excerpts_of_original_files(file, id, robot, size, own_root, capsys):
    flags = imported(EXCERPTS / f"{file}.hdf5", id, capsys)
    data, info = same_as_loop(EXCERPTS / f"{file}.hdf5", *flags[1::2])
    facts = srpo_actor.evaluation_info(info)
    assert len(data["obs"]) == size and facts["environments"]["fixed"]["id"] == f"{robot}-v5"
    assert facts["reference"] == srpo_actor.D4RL_SCORES[robot]
    run_here("srpo_critic.py", *flags, "--steps", 4, "--batch-size", 8, "--log-every", 2)  # the command that it prints
    assert np.isfinite(losses(flags[1])).all() and len(losses(flags[1])) == 2


@pytest.fixture
def server(own_root, tmp_path_factory, monkeypatch):
    """A folder whose sets a download copies, and the ids that were downloaded."""
    folder, ids = tmp_path_factory.mktemp("server"), []

    def download_dataset(id, force_download=False):
        ids.append(id)
        shutil.copytree(folder / id, own_root / id)

    monkeypatch.setattr(hosting, "download_dataset", download_dataset)
    return folder, ids


def test_missing_sets_are_downloaded_once(server, own_root, recorded):
    folder, ids = server
    for level, part in ("medium", recorded[:3]), ("expert", recorded[3:]):
        create(f"mujoco/hopper/{level}-v0", part, observation_space=BOX, action_space=ACTION)
    shutil.move(own_root / "mujoco", folder / "mujoco")
    for _ in range(2):  # the second time they are there
        data, _ = load_dataset("hopper-medium-expert", None, None, "cpu")
        rows = np.concatenate([e.observations[:-1] for e in recorded])
        np.testing.assert_allclose(data["obs"], rows, rtol=1e-6)
        assert ids == ["mujoco/hopper/medium-v0", "mujoco/hopper/expert-v0"]


def refusal(env):
    with pytest.raises(SystemExit) as e:
        load_dataset(env, None, None, "cpu")
    assert "\n" not in e.value.code
    return e.value.code


@pytest.mark.parametrize(
    "env, id",
    [
        ("hopper-medium-expert", "mujoco/hopper/medium-v0"),
        ("antmaze-umaze", "D4RL/antmaze/umaze-v1"),
        ("no/such-set-v0", "no/such-set-v0"),
    ],
)
def test_a_set_that_cannot_be_downloaded_is_named(env, id, own_root):
    reason = "ConnectionError('[Errno -2] Name or service not known')"
    remedy = f"run `minari download {id} --force`, or do so elsewhere and copy it to {own_root / id}"
    assert refusal(env) == f"error: no complete data set {id} ({reason}): {remedy}"


def test_missing_medium_replay_names_the_import(own_root):
    found = refusal("walker2d-medium-replay")
    assert found.startswith("error: no complete data set D4RL/walker2d/medium-replay-v2 (")
    assert "run `python examples/import_d4rl.py walker2d-medium-replay-v2`, or" in found
    assert "minari download" not in found


@pytest.mark.slow
def test_what_minari_itself_raises_is_one_line(own_root):
    """Half a minute of attempts where there is no network; else its answer that there is no such set."""
    done = run("srpo_critic.py", "--env", "no/such-set-v0", check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(
        "error: no complete data set no/such-set-v0"
    )
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("half", ["nothing", "no metadata", "no data", "half of the data", "no spaces", "no JSON"])
def test_half_a_download_is_refused(half, own_root, recorded):
    create("test/half-v0", recorded, observation_space=BOX, action_space=ACTION)
    load_dataset("test/half-v0", None, None, "cpu")
    path = get_dataset_path("test/half-v0") / "data"
    metadata, main = path / "metadata.json", path / "main_data.hdf5"
    if half == "nothing":
        metadata.unlink()
        main.unlink()
    elif half == "no metadata":
        metadata.unlink()
    elif half == "no data":
        main.unlink()
    elif half == "half of the data":
        os.truncate(main, main.stat().st_size // 2)
    elif half == "no JSON":
        metadata.write_text(metadata.read_text()[:-20])
    else:
        content = json.loads(metadata.read_text())
        metadata.write_text(json.dumps({key: x for key, x in content.items() if key != "action_space"}))
    found = refusal("test/half-v0")
    assert found.startswith("error: no complete data set test/half-v0 (")
    assert found.endswith(
        f": run `minari download test/half-v0 --force`, or do so elsewhere and copy it to {path.parent}"
    )


def test_unusual_recordings(data_root):
    """A set that stops in the middle of an episode, strided and float64 arrays, nested dictionaries, one step."""
    rng = np.random.default_rng(0)
    space = gym.spaces.Dict({"b": BOX, "a": gym.spaces.Dict({"d": ACTION, "c": BOX})})
    episodes = []
    for n in (6, 1, 4):
        wide = rng.normal(size=(n + 1, 16))[:, ::2]
        obs = {"b": wide[:, :3], "a": {"c": wide[:, 3:6], "d": wide[:, 6:]}}
        actions = np.asfortranarray(rng.uniform(ACTION.low, ACTION.high, (n, 2)))
        episodes.append(episode(obs, actions, rng.normal(size=2 * n)[::2], terminated=True))
    episodes[-1].terminations[-1] = False  # and no truncation either
    create("test/unusual-v0", episodes, observation_space=space, action_space=ACTION)
    data, info = load_dataset("test/unusual-v0", None, False, "cpu")
    assert data["terminal"].tolist() == [0] * 5 + [1, 1, 0, 0, 0, 0] and info["state_dim"] == 8
    n = 0
    for e in episodes:
        o = e.observations
        rows = np.concatenate([o["a"]["c"], o["a"]["d"], o["b"]], axis=1)
        T = len(e.rewards)
        np.testing.assert_allclose(data["obs"][n : n + T], rows[:-1], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(data["next_obs"][n : n + T], rows[1:], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(data["action"][n : n + T], e.actions * [0.5, 2] - [0, 1], rtol=1e-5, atol=1e-6)
        n += T
    assert all(x.dtype == torch.float32 for x in data.values())


def recorded_in(id, **kwargs):
    """What a data set's metadata say of an environment; the id's own keyword arguments are among them."""
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    kwargs = {"max_episode_steps": 70} | kwargs
    env = gym.make(id, continuing_task=True, reset_target=False, **kwargs)
    return json.loads(env.spec.to_json())


def three(spec):
    return {name: spec[name] for name in ("id", "kwargs", "max_episode_steps")}


def environments(data, fixed):
    """Where a maze's policy is evaluated, given what a data set's metadata say."""
    metadata = {"env_spec": json.dumps(data)} | ({"eval_env_spec": json.dumps(fixed)} if fixed else {})
    info = {"minari": metadata, "by_success": True, "longest_episode": 33}
    return {name: three(env) for name, env in srpo_actor.evaluation_info(info)["environments"].items()}


MINARIS_UMAZE = [[1, 1, 1, 1, 1], [1, 0, 0, "r", 1], [1, 0, 1, 1, 1], [1, 0, 0, "g", 1], [1, 1, 1, 1, 1]]
ONE_WAY = [[1, 1, 1, 1], [1, "r", "g", 1], [1, 1, 1, 1]]


def test_evaluation_is_from_one_corner_to_the_other():
    umaze, minaris = srpo_actor.UMAZE, recorded_in("AntMaze_UMaze-v4", maze_map=MINARIS_UMAZE)
    for recorded in (recorded_in("AntMaze_UMaze-v4", maze_map=umaze), recorded_in("AntMaze_UMaze-v4")):  # and -diverse
        both = environments(recorded, minaris)
        assert both["data"] == three(recorded)
        assert both["fixed"] == three(recorded_in("AntMaze_UMaze-v4", maze_map=umaze))
        assert environments(recorded, None) == {"data": three(recorded), "fixed": three(recorded)}
        same_walls = [[1, 1, 1, 1, 1], [1, 0, "r", 0, 1], [1, 1, 1, 0, 1], [1, 0, "g", 0, 1], [1, 1, 1, 1, 1]]
        own = recorded_in("AntMaze_UMaze-v4", maze_map=same_walls)  # another start and goal: the data's own choice
        assert environments(recorded, own) == {"data": three(recorded), "fixed": three(own)}
    recorded = recorded_in("PointMaze_Medium-v3")
    fixed = recorded_in("PointMaze_Medium-v3", maze_map=ONE_WAY)
    longer = environments(recorded, fixed | {"max_episode_steps": 700})  # never longer than the recording
    assert longer == {"data": three(recorded), "fixed": three(fixed)}
    recorded_long = recorded | {"max_episode_steps": 1_000_000}  # as in Minari's point mazes
    assert [x["max_episode_steps"] for x in environments(recorded_long, fixed).values()] == [70, 70]
    assert environments(recorded, None) == {"data": three(recorded), "fixed": three(recorded)}
    own = recorded_in("PointMaze_UMaze-v3", maze_map=ONE_WAY)  # the usual way to name a maze of one's own
    assert environments(own, None) == {"data": three(own), "fixed": three(own)}
    endless = environments(own | {"max_episode_steps": None}, None)  # is left after the longest episode of the data
    assert [x["max_episode_steps"] for x in endless.values()] == [33, 33]


def test_the_fixed_umaze_has_the_walls_of_the_data():
    """Start and goal of its environments, and that only they differ from the default map of the recording."""
    minaris = recorded_in("PointMaze_UMaze-v3", maze_map=MINARIS_UMAZE)
    both = environments(recorded_in("PointMaze_UMaze-v3"), minaris)
    info = {"state_dim": 8, "action_low": [-1.0, -1.0], "action_high": [1.0, 1.0]}
    envs = {name: srpo_actor.make_env(env | {"wrappers": []}, info).unwrapped for name, env in both.items()}
    walls = [[[cell == 1 for cell in row] for row in env.maze.maze_map] for env in envs.values()]
    assert walls[0] == walls[1]
    cells = {}
    for name, env in envs.items():
        obs = [env.reset(seed=seed)[0] for seed in range(20)]
        for key in ("achieved_goal", "desired_goal"):
            cells[name, key] = {tuple(env.maze.cell_xy_to_rowcol(o[key]).tolist()) for o in obs}
    assert cells["fixed", "achieved_goal"] == {(3, 1)} and cells["fixed", "desired_goal"] == {(1, 1)}
    assert len(cells["data", "achieved_goal"]) > 2 and len(cells["data", "desired_goal"]) > 2


def test_a_u_maze_without_an_evaluation_environment_is_scored_where_it_was_recorded(data_root):
    """Random starts and goals, against a loop written by hand."""
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    kwargs = {"continuing_task": True, "reset_target": False, "reward_type": "dense"}  # returns depend on the goal
    env = gym.make("PointMaze_UMaze-v3", max_episode_steps=30, **kwargs)
    create("test/u-maze-v0", random_episodes(env, 3, 30), env=env)
    flags = ("--env", "test/u-maze-v0", "--steps", 2, "--batch-size", 4)
    for stage in ("critic", "behavior"):
        run_here(f"srpo_{stage}.py", *flags)
    run_here("srpo_actor.py", *flags, "--eval-every", 0)
    run_here("eval.py", "--env", "test/u-maze-v0", "--episodes", 40, "--workers", 1)
    folder = Path("runs/test-u-maze-v0")
    (row,) = json.loads((folder / "eval.json").read_text())["policies"]
    act, found = srpo_eval.load_policy(folder / "actor.pt"), []
    for seed in range(1_000_000, 1_000_040):
        (obs, _), total, length, done = env.reset(seed=seed), 0.0, 0, False
        while not done:
            obs, reward, _, truncated, outcome = env.step(act(obs))
            total, length, done = total + reward, length + 1, truncated or outcome["success"]
        found.append((total, length))
    assert (row["return"], row["episode_length"]) == pytest.approx(tuple(np.mean(found, axis=0))) and row["return"] > 0
