"""load_dataset against plain loops over what was recorded."""

import gymnasium as gym
import numpy as np
import pytest
from conftest import create, episode, random_episodes

import srpo_actor
import srpo_behavior
import srpo_critic
from srpo_critic import flatten, load_dataset

BOX = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)
ACTION = gym.spaces.Box(np.array([-2.0, 0.0], np.float32), np.array([2.0, 1.0], np.float32))
ENDS = (True, False, True, False)  # how each episode of the set below ends
LENGTHS = (5, 1, 7, 30)


@pytest.fixture(scope="module")
def recorded(data_root):
    rng = np.random.default_rng(0)
    episodes = [
        episode(
            rng.normal(size=(n + 1, 3)),
            rng.uniform(ACTION.low, ACTION.high, (n, 2)).astype(np.float32),
            rng.normal(size=n),
            end,
        )
        for n, end in zip(LENGTHS, ENDS)
    ]
    create("test/plain-v0", episodes, observation_space=BOX, action_space=ACTION)
    return episodes


def test_transitions_are_those_recorded(recorded):
    data, info = load_dataset("test/plain-v0", None, "cpu")
    returns = [e.rewards.sum() for e in recorded]
    scale, n = 1000 / (max(returns) - min(returns)), 0
    for e, end in zip(recorded, ENDS):
        for t in range(len(e.rewards)):
            np.testing.assert_allclose(data["obs"][n], e.observations[t], rtol=1e-6)
            np.testing.assert_allclose(
                data["next_obs"][n], e.observations[t + 1], rtol=1e-6
            )  # never the next episode's
            np.testing.assert_allclose(data["action"][n], [e.actions[t, 0] / 2, 2 * e.actions[t, 1] - 1], atol=1e-6)
            np.testing.assert_allclose(data["reward"][n], e.rewards[t] * scale, rtol=1e-5)
            assert data["terminal"][n] == (end and t == len(e.rewards) - 1)  # 0 at a time-out
            n += 1
    assert n == len(data["obs"]) == info["fingerprint"][0] == sum(LENGTHS)
    assert all(x.dtype == srpo_critic.torch.float32 and x.is_contiguous() for x in data.values())
    assert info["state_dim"] == 3 and info["action_low"] == [-2, 0] and info["action_high"] == [2, 1]
    assert info["environment"] is None and not info["maze"]
    assert info["data_score"] == pytest.approx(np.mean(returns))


def test_only_equal_spaces_are_joined(recorded, data_root):
    wider = gym.spaces.Box(-10, 10, (2,), np.float32)
    create("test/other-bounds-v0", recorded[:1], observation_space=BOX, action_space=wider)
    with pytest.raises(SystemExit, match="only data sets of one environment can be joined"):
        load_dataset("x", "test/plain-v0+test/other-bounds-v0", "cpu")


def test_fingerprint_tells_data_sets_apart(recorded, data_root):
    fingerprint = load_dataset("test/plain-v0", None, "cpu")[1]["fingerprint"]
    assert fingerprint == load_dataset("other name", "test/plain-v0", "cpu")[1]["fingerprint"]
    changed = [e for e in recorded[:3]] + [
        episode(recorded[3].observations, recorded[3].actions, recorded[3].rewards + 1e-3)
    ]
    create("test/changed-v0", changed, observation_space=BOX, action_space=ACTION)
    assert fingerprint != load_dataset("test/changed-v0", None, "cpu")[1]["fingerprint"]


def test_joined_sets_follow_one_another(recorded):
    one, _ = load_dataset("test/plain-v0", None, "cpu")
    two, info = load_dataset("x", "test/plain-v0+test/plain-v0", "cpu")
    assert info["fingerprint"][0] == 2 * sum(LENGTHS)
    for name in one:
        assert srpo_critic.torch.equal(two[name], srpo_critic.torch.cat([one[name], one[name]]))


def test_equal_returns_leave_the_rewards_alone(data_root):
    obs, actions = np.zeros((4, 3)), np.zeros((3, 2), np.float32)
    create("test/equal-v0", [episode(obs, actions, [1.0, 2.0, 3.0])] * 2, observation_space=BOX, action_space=ACTION)
    assert load_dataset("test/equal-v0", None, "cpu")[0]["reward"].tolist() == [1, 2, 3, 1, 2, 3]


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
    data, info = load_dataset("test/maze-v0", None, "cpu")
    assert info["maze"] and info["data_score"] == pytest.approx(200 / 3) and info["reference"] == (0, 1)
    assert len(data["obs"]) == 3 + 10 + 10
    assert data["terminal"].nonzero().flatten().tolist() == [2, 12]  # the second success is in the last step
    assert info["environment"]["id"] == "PointMaze_UMaze-v3" and info["environment"]["max_episode_steps"] == 10
    reward = np.concatenate([maze[0].rewards[:3], maze[1].rewards, maze[2].rewards])
    np.testing.assert_allclose(data["reward"], reward - 1)
    o = maze[1].observations
    rows = np.concatenate([o["achieved_goal"], o["desired_goal"], o["observation"]], axis=1)  # the written order
    np.testing.assert_allclose(data["obs"][3:13], rows[:-1], rtol=1e-6)
    np.testing.assert_allclose(data["next_obs"][3:13], rows[1:], rtol=1e-6)


def test_flatten_is_gymnasiums_order():
    space = gym.spaces.Dict({"b": BOX, "a": gym.spaces.Dict({"d": ACTION, "c": BOX})})
    obs = space.sample()
    np.testing.assert_allclose(flatten(obs), gym.spaces.flatten(space, obs), rtol=1e-6)
    batch = {"b": np.ones((5, 3)), "a": {"d": np.ones((5, 2)), "c": np.zeros((5, 3))}}
    assert flatten(batch).shape == (5, 8) and flatten(batch).dtype == np.float32


def test_reference_scores(recorded, data_root):
    env, obs = gym.make("Hopper-v5"), np.zeros((2, 11))
    create("test/hopper-v0", [episode(obs, np.zeros((1, 3), np.float32), [1616.50])], env=env)
    info = load_dataset("test/hopper-v0", None, "cpu")[1]
    assert info["reference"] == (-20.272305, 3234.3)
    assert info["data_score"] == pytest.approx(100 * (1616.50 + 20.272305) / (3234.3 + 20.272305))
    scores = {"ref_min_score": -1.0, "ref_max_score": 3.0}  # the data's own come first
    create("test/scored-v0", [episode(obs, np.zeros((1, 3), np.float32), [1.0])], env=env, **scores)
    assert load_dataset("test/scored-v0", None, "cpu")[1]["reference"] == (-1, 3)


TABLE_2 = """
medium-expert  walker2d 0.1   halfcheetah 0.01  hopper 0.01
medium         walker2d 0.05  halfcheetah 0.2   hopper 0.05
medium-replay  walker2d 0.5   halfcheetah 0.2   hopper 0.2
umaze 0.02  umaze-diverse 0.04  medium-play 0.08  medium-diverse 0.05  large-play 0.06  large-diverse 0.05
"""


def test_every_task_of_the_paper_has_its_numbers():
    beta, rows = {}, [line.split() for line in TABLE_2.strip().splitlines()]
    for level, *cells in rows[:3]:
        beta |= {f"{domain}-{level}": float(x) for domain, x in zip(cells[::2], cells[1::2])}
    beta |= {f"antmaze-{maze}": float(x) for maze, x in zip(rows[3][::2], rows[3][1::2])}
    assert {name: task.beta for name, task in srpo_critic.TASKS.items()} == beta and len(beta) == 15
    for name, task in srpo_critic.TASKS.items():
        maze = name.startswith("antmaze")
        assert (task.expectile, task.hidden_layers, task.q_grad_norm) == ((0.9, 4, "rms") if maze else (0.7, 2, "none"))
    assert srpo_critic.TASKS["walker2d-medium-expert"].data == "mujoco/walker2d/medium-v0+mujoco/walker2d/expert-v0"
    assert srpo_critic.TASKS["antmaze-large-play"].data == "D4RL/antmaze/large-play-v1"


def test_defaults_are_the_papers():
    critic, behavior, actor = srpo_critic.Args(env=""), srpo_behavior.Args(env=""), srpo_actor.Args(env="")
    assert (critic.steps, critic.batch_size, critic.lr) == (1_500_000, 256, 3e-4)
    assert (critic.gamma, critic.tau) == (0.99, 0.005)
    assert (behavior.steps, behavior.batch_size, behavior.lr) == (2_000_000, 2048, 3e-4)
    assert (actor.steps, actor.batch_size, actor.lr) == (1_000_000, 256, 3e-4)
    assert (actor.weight, actor.baseline) == ("sigma2", True)
