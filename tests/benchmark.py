"""What loading costs: seconds and peak memory for 1 M transitions of a synthetic Minari locomotion set.

    python tests/benchmark.py
"""

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
from minari.data_collector import EpisodeBuffer

ROOT = Path(__file__).parent.parent
STATE_DIM, ACTION_DIM, EPISODES, LENGTH = 17, 6, 1000, 1000  # as mujoco/halfcheetah/medium-v0
INFOS = 6  # columns that Minari's sets hold beside the transitions


def make_set():
    """Float64 observations and rewards, as Gymnasium's MuJoCo environments give them."""
    rng = np.random.default_rng(0)
    last = np.arange(LENGTH) == LENGTH - 1
    buffers = (
        EpisodeBuffer(
            observations=rng.normal(size=(LENGTH + 1, STATE_DIM)),
            actions=rng.uniform(-1, 1, (LENGTH, ACTION_DIM)).astype(np.float32),
            rewards=rng.normal(size=LENGTH),
            terminations=np.zeros(LENGTH, bool),
            truncations=last,
            infos={f"info_{i}": rng.normal(size=LENGTH + 1) for i in range(INFOS)},
        )
        for _ in range(EPISODES)
    )
    spaces = {
        "observation_space": gym.spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float64),
        "action_space": gym.spaces.Box(-1, 1, (ACTION_DIM,), np.float32),
    }
    minari.create_dataset_from_buffers("benchmark/locomotion-v0", list(buffers), **spaces)


def measure_loading():
    """In a process of its own, since the peak is the process's: seconds, and peak memory over the tensors' size."""
    sys.path.insert(0, str(ROOT))
    import srpo_critic

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    data, _ = srpo_critic.load_dataset("benchmark/locomotion-v0", None, "cpu")
    seconds = time.perf_counter() - start
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    size = sum(x.nbytes for x in data.values())
    print(f"{len(data['obs']):,} transitions in {seconds:.1f} s, {size / 1e6:.0f} MB of tensors, peak {peak / size:.2f} x")


if __name__ == "__main__":
    if sys.argv[1:] == ["loading"]:
        measure_loading()
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        import os

        os.environ["MINARI_DATASETS_PATH"] = folder
        make_set()
        subprocess.run([sys.executable, __file__, "loading"], check=True)
