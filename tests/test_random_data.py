"""load_dataset on random structures of episodes, against plain loops."""

from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import columns
from hypothesis import given, settings
from hypothesis import strategies as st

import eval as srpo_eval
import srpo_critic
from examples.import_d4rl import split

EPISODES = st.lists(st.tuples(st.integers(1, 6), st.booleans(), st.integers(-1, 5)), min_size=1, max_size=6)
SETTINGS = settings(max_examples=60, deadline=None, derandomize=True)
VECTOR = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
GOALS = gym.spaces.Dict({name: VECTOR for name in ("achieved_goal", "desired_goal", "observation")})


class Episode(SimpleNamespace):
    def __len__(self):
        return len(self.rewards)


class Recording(list):
    """Episodes in the place of a Minari data set."""

    observation_space, env_spec = VECTOR, None
    action_space = gym.spaces.Box(-2, 4, (1,), np.float32)
    storage = property(lambda self: SimpleNamespace(metadata={}, total_steps=sum(map(len, self))))
    episode_indices = property(lambda self: np.arange(len(self)))

    def iterate_episodes(self, indices):
        return (self[i] for i in indices)


def random_data(structure, seed):
    """Episodes of given lengths and ends; no two observations of all of them are equal; some actions are too large."""
    rng, episodes = np.random.default_rng(seed), Recording()
    for length, terminated, _ in structure:
        episodes.append(
            Episode(
                observations=rng.standard_normal((length + 1, 2)),
                actions=rng.uniform(-3, 5, (length, 1)),
                rewards=rng.standard_normal(length),
                terminations=(np.arange(length) == length - 1) & terminated,
            )
        )
    return episodes


def load(episodes, normalize_obs=False):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(srpo_critic, "open_dataset", lambda id: episodes)
        return columns(*srpo_critic.load_dataset("some/set-v0", None, normalize_obs, "cpu"))


@given(EPISODES, st.integers(0, 99))
@SETTINGS
def test_transitions_of_any_episodes(structure, seed):
    episodes = random_data(structure, seed)
    data, about = load(episodes)
    returns = [episode.rewards.sum() for episode in episodes]
    scale = 1000 / (max(returns) - min(returns)) if max(returns) > min(returns) else 1
    rows = [
        [
            *episode.observations[t],
            min(max(-1 + 2 * (episode.actions[t, 0] + 2) / 6, -1), 1),
            scale * episode.rewards[t],
            *episode.observations[t + 1],
            float(terminated and t == length - 1),
        ]
        for episode, (length, terminated, _) in zip(episodes, structure)
        for t in range(length)
    ]
    found = torch.cat([x.view(len(x), -1) for x in data.values()], dim=1).numpy()
    assert list(data) == ["obs", "action", "reward", "next_obs", "terminal"]
    assert found == pytest.approx(np.float32(rows), rel=1e-4, abs=1e-4)
    assert about["fingerprint"][0] == len(rows) == sum(length for length, *_ in structure)
    assert about["longest_episode"] == max(length for length, *_ in structure)
    assert about["data_outcome"] == pytest.approx(np.mean(returns))


LEAVES = st.sampled_from(
    [
        gym.spaces.Box(-3, 3, (2,), np.float64),
        gym.spaces.Box(-1, 1, (), np.float32),
        gym.spaces.Box(0, 255, (2, 3), np.uint8),
        gym.spaces.Discrete(4, start=-1),
        gym.spaces.MultiBinary([2, 2]),
        gym.spaces.MultiDiscrete([3, 2]),
        gym.spaces.Text(4, charset="abc"),
    ]
)
SPACES = st.recursive(
    LEAVES,
    lambda inner: (
        st.dictionaries(st.sampled_from("zyxab"), inner, min_size=1, max_size=3).map(gym.spaces.Dict)
        | st.lists(inner, min_size=1, max_size=3).map(gym.spaces.Tuple)
    ),
    max_leaves=5,
)


def as_stored(space, samples):
    """Observations of an episode as Minari gives them back: an array, or for Text a list, per part."""
    if isinstance(space, gym.spaces.Dict):
        return {key: as_stored(part, [x[key] for x in samples]) for key, part in space.items()}
    if isinstance(space, gym.spaces.Tuple):
        return tuple(as_stored(part, [x[i] for x in samples]) for i, part in enumerate(space))
    return samples if isinstance(space, gym.spaces.Text) else np.stack(samples)


@pytest.mark.parametrize("module", [srpo_critic, srpo_eval])
@given(SPACES, st.integers(1, 4), st.integers(0, 99))
@SETTINGS
def test_episodes_are_flattened_as_gymnasium_flattens_each_observation(module, space, T, seed):
    space.seed(seed)
    samples = [space.sample() for _ in range(T)]
    found = module.flatten(space, as_stored(space, samples))
    assert found.tolist() == [gym.spaces.flatten(space, x).tolist() for x in samples]


@given(EPISODES, st.integers(0, 99))
@SETTINGS
def test_any_observations_are_standardised(structure, seed):
    episodes = random_data(structure, seed)
    data, about = load(episodes, normalize_obs=True)
    for name, first in ("obs", 0), ("next_obs", 1):  # both by the mean and deviation of obs
        rows = [o for episode in episodes for o in episode.observations[first : first + len(episode)]]
        assert data[name].numpy() * about["obs_std"] + about["obs_mean"] == pytest.approx(np.array(rows), abs=1e-5)
    if len(data["obs"]) > 1:
        assert data["obs"].mean(dim=0).numpy() == pytest.approx(np.zeros(2), abs=1e-4)
        assert data["obs"].square().mean(dim=0).numpy() == pytest.approx(np.ones(2), rel=1e-3)
    else:
        assert about["obs_std"] == [1, 1] and not data["obs"].any()  # one row has no deviation


@given(EPISODES, st.integers(0, 99))
@SETTINGS
def test_mazes_end_at_the_first_success(structure, seed):
    """The third number says at which observation, if any, the goal is met, and that it is met from then on."""
    episodes, expected = random_data(structure, seed), []
    episodes.observation_space, episodes.env_spec = GOALS, SimpleNamespace(id="PointMaze_UMaze-v3")
    for episode, (length, _, success) in zip(episodes, structure):
        goal = np.full((length + 1, 2), 50.0)
        position = episode.observations
        if success >= 0:
            position[success + 1 :] = goal[success + 1 :] + 0.3  # at a distance of 0.42
        episode.observations = {"achieved_goal": position, "desired_goal": goal, "observation": position.copy()}
        last = min(success, length - 1) if success >= 0 else length - 1
        expected += [(position[t], success >= 0 and t == success) for t in range(last + 1)]
    data, about = load(episodes)
    assert data["obs"][:, :2].numpy() == pytest.approx(np.float32([position for position, _ in expected]))
    assert data["terminal"].bool().tolist() == [terminal for _, terminal in expected]
    rewards = [
        episode.rewards[t] - 1
        for episode, (length, _, success) in zip(episodes, structure)
        for t in range(length if success < 0 else min(success + 1, length))
    ]
    assert data["reward"].numpy() == pytest.approx(np.float32(rewards), abs=1e-5)
    assert about["data_outcome"] == pytest.approx(np.mean([0 <= success < length for length, _, success in structure]))


@given(st.lists(st.sampled_from(["step", "terminal", "timeout", "both"]), min_size=1, max_size=30))
@SETTINGS
def test_d4rl_files_of_any_structure(flags):
    """The rows that D4RL's rules take: the next row is the next state, and time-outs and the last row are left out."""
    N = len(flags)
    terminal = np.array([flag in ("terminal", "both") for flag in flags])
    timeout = np.array([flag in ("timeout", "both") for flag in flags])
    obs = np.arange(2.0 * N).reshape(N, 2)
    buffers = split(obs, obs[:, :1] / N, np.arange(N), terminal, timeout)
    taken = [i for i in range(N - 1) if not timeout[i]]
    if not taken:
        assert buffers == []
        return
    names = ("observations", "actions", "rewards", "terminations")
    data, about = load(Recording(Episode(**{name: getattr(b, name) for name in names}) for b in buffers))
    assert data["obs"].tolist() == obs[taken].tolist()
    assert data["next_obs"].tolist() == obs[[i + 1 for i in taken]].tolist()
    assert data["terminal"].bool().tolist() == terminal[taken].tolist()
    episode = np.cumsum([0, *(terminal | timeout)[:-1]])[taken]  # to which episode of the file each row belongs
    assert [len(b.rewards) for b in buffers] == [(episode == i).sum() for i in np.unique(episode)]
    for b in buffers:  # each ends by termination or by time-out, at its last step alone
        ends = b.terminations | b.truncations
        assert not (b.terminations & b.truncations).any() and ends.nonzero()[0].tolist() == [len(b.rewards) - 1]
