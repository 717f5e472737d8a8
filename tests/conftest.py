"""Small data sets made on the spot, and the scripts run as a user runs them."""

import contextlib
import os
import runpy
import signal
import subprocess
import sys
import warnings
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side, on one thread each
    os.environ["OMP_NUM_THREADS"] = "1"

import gymnasium as gym
import minari
import numpy as np
import pytest
from minari.data_collector import EpisodeBuffer
from minari.storage import hosting

ROOT = Path(__file__).parent.parent
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores it, which processes inherit


def episode(observations, actions, rewards, terminated=False):
    """T actions and rewards between T + 1 observations; ends by termination or by time-out."""
    last = np.arange(1, len(rewards) + 1) == len(rewards)
    return EpisodeBuffer(
        observations=observations,
        actions=np.asarray(actions),
        rewards=np.asarray(rewards),
        terminations=last & terminated,
        truncations=last & (not terminated),
        infos={},
    )


def create(id, episodes, **kwargs):
    """A Minari data set; env=..., or observation_space=... and action_space=... without an environment."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return minari.create_dataset_from_buffers(id, episodes, **kwargs)


def stacked(obs):
    """A list of observations as arrays, in the same dictionaries."""
    return {key: stacked([o[key] for o in obs]) for key in obs[0]} if isinstance(obs[0], dict) else np.stack(obs)


def columns(data, info):
    """load_dataset's transitions by name: obs, next_obs [N, S], action [N, A], reward, terminal [N]."""
    S, A = info["state_dim"], info["action_dim"]
    obs, action, reward, next_obs, terminal = data.split([S, A, 1, S, 1], dim=1)
    both = {"obs": obs, "action": action, "reward": reward[:, 0], "next_obs": next_obs, "terminal": terminal[:, 0]}
    return both, info


def random_episodes(env, n, steps, seed=0):
    rng, episodes = np.random.default_rng(seed), []
    low, high = env.action_space.low, env.action_space.high
    for i in range(n):
        obs = [env.reset(seed=seed + i)[0]]
        actions = rng.uniform(low, high, (steps, len(low))).astype(np.float32)
        rewards = []
        for action in actions:
            o, reward, *_ = env.step(action)
            obs.append(o)
            rewards.append(reward)
        episodes.append(episode(stacked(obs), actions, rewards))
    return episodes


@pytest.fixture(scope="session")
def data_root(tmp_path_factory):
    """An empty Minari folder, with test/pendulum-v0: 5 episodes of 40 random steps, actions in [-2, 2]."""
    root = tmp_path_factory.mktemp("minari")
    old = os.environ.get("MINARI_DATASETS_PATH")
    os.environ["MINARI_DATASETS_PATH"] = str(root)
    env = gym.make("Pendulum-v1", max_episode_steps=40)
    create("test/pendulum-v0", random_episodes(env, 5, 40), env=env)
    yield root
    os.environ.pop("MINARI_DATASETS_PATH") if old is None else os.environ.update(MINARI_DATASETS_PATH=old)


@pytest.fixture(autouse=True)
def in_empty_folder(data_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@contextlib.contextmanager
def ending_processes():
    """Processes that are started within, of the project's scripts, end with it, and so do those that they start."""
    started, Popen = [], subprocess.Popen

    class Recorded(Popen):
        def __init__(self, args, **options):
            ours = str(ROOT) in str(args)
            super().__init__(args, **({"start_new_session": True} if ours else {}) | options)
            if ours:
                started.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "Popen", Recorded)
        try:
            yield
        finally:
            for process in started:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(autouse=True)
def no_process_remains():
    with ending_processes():
        yield


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """A download ends as where there is no network, but at once instead of after half a minute of attempts."""

    def download_dataset(id, force_download=False):
        raise ConnectionError("[Errno -2] Name or service not known")

    monkeypatch.setattr(hosting, "download_dataset", download_dataset)


def command(script, *flags):
    return [sys.executable, str(ROOT / script), *map(str, flags)]


def prepared(code, script, *flags):
    """The script's command with code before it, which sets a trap."""
    python, path, *rest = command(script, *flags)
    code += f"\nimport runpy, sys; sys.argv = {[path, *rest]!r}; runpy.run_path({path!r}, run_name='__main__')"
    return [python, "-c", code]


def run(script, *flags, check=True, **env):
    """A script in a process of its own, as a user runs it."""
    done = subprocess.run(command(script, *flags), capture_output=True, text=True, env=os.environ | env, timeout=120)
    assert not check or done.returncode == 0, done.stderr
    return done


def run_here(script, *flags):
    """The same within this process, which saves the imports; a script that exits raises SystemExit."""
    old = sys.argv
    sys.argv = [script, *map(str, flags)]
    try:
        return runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = old


TINY = ("--env", "test/pendulum-v0", "--batch-size", 8, "--log-every", 10)


@pytest.fixture(scope="session")
def trained(data_root, tmp_path_factory):
    """A run folder with all artifacts on test/pendulum-v0: seeds 0 and 1, betas 0.1 and 0.5."""
    out = tmp_path_factory.mktemp("runs")
    for stage in ("critic", "behavior"):
        run_here(f"srpo_{stage}.py", *TINY, "--steps", 20, "--num-seeds", 2, "--out-dir", out)
    run_here("srpo_actor.py", *TINY, "--steps", 20, "--eval-every", 0, "--beta", 0.1, 0.5, "--out-dir", out)
    return out / "test-pendulum-v0"
