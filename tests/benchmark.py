"""What loading costs: seconds, and peak memory, for 1 M transitions of a synthetic Minari set like the locomotion ones.

python tests/benchmark.py
"""

import os
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

STATE_DIM, ACTION_DIM, EPISODES, LENGTH, INFOS = 17, 6, 1000, 1000, 6  # as mujoco/halfcheetah/medium-v0


def make_set(id):
    """Observations and rewards in float64, as Gymnasium's MuJoCo environments give them."""
    rng, zeros = np.random.default_rng(0), np.zeros(LENGTH, bool)
    buffers = []
    for _ in range(EPISODES):
        obs, rewards = rng.normal(size=(LENGTH + 1, STATE_DIM)), rng.normal(size=LENGTH)
        actions = rng.uniform(-1, 1, (LENGTH, ACTION_DIM)).astype(np.float32)
        infos = {f"info_{i}": rng.normal(size=LENGTH + 1) for i in range(INFOS)}
        truncations = np.arange(LENGTH) == LENGTH - 1
        steps = {"actions": actions, "rewards": rewards, "terminations": zeros, "truncations": truncations}
        buffers.append(EpisodeBuffer(observations=obs, **steps, infos=infos))
    action_space = gym.spaces.Box(-1, 1, (ACTION_DIM,), np.float32)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (STATE_DIM,), np.float64)
    minari.create_dataset_from_buffers(id, buffers, action_space=action_space, observation_space=observation_space)


def load_set(id):
    """Prints what load_dataset takes; the peak is the whole process's, so this one does nothing else."""
    sys.path.insert(0, str(Path(__file__).parent.parent))
    import srpo_critic

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    data, _ = srpo_critic.load_dataset(id, None, "cpu")
    seconds = time.perf_counter() - start
    peak = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    size = sum(x.nbytes for x in data.values())
    print(f"loading: {seconds:.1f} s, peak memory {peak / size:.2f} times the tensors' {size / 1e6:.0f} MB")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        load_set(sys.argv[1])
        sys.exit()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MINARI_DATASETS_PATH"] = folder
        make_set("benchmark/locomotion-v0")
        subprocess.run([sys.executable, __file__, "benchmark/locomotion-v0"], check=True)
