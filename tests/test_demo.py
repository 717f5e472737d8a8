"""The demo: its data, and run.sh from end to end."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import minari
import numpy as np
import pytest
from conftest import ROOT, run

from srpo_critic import load_dataset


def environ(data):
    """Where python is this test's, and data sets are the demo's own."""
    return os.environ | {
        "MINARI_DATASETS_PATH": str(data),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }


def test_the_demo_s_data_have_the_layout_of_minaris_mazes(data_root):
    done = run("examples/collect_pointmaze.py", "--dataset", "test/collected-v0", "--episodes", 60)
    assert "60 episodes, 18,000 steps" in done.stdout
    data = minari.load_dataset("test/collected-v0")
    assert data.env_spec.id == "PointMaze_Medium-v3" and data.env_spec.max_episode_steps == 300
    assert data.env_spec.kwargs["continuing_task"] and not data.env_spec.kwargs["reset_target"]
    successes = []
    for episode in data:
        assert set(episode.observations) == {"achieved_goal", "desired_goal", "observation"}
        assert len(episode.actions) == len(episode.rewards) == 300 and len(episode.observations["observation"]) == 301
        assert not episode.terminations.any() and episode.truncations.nonzero()[0].tolist() == [299]
        distance = np.linalg.norm(episode.observations["achieved_goal"] - episode.observations["desired_goal"], axis=1)
        np.testing.assert_array_equal(episode.rewards, distance[1:] <= 0.45)
        successes.append(episode.rewards.any())
    assert 0.2 < np.mean(successes) < 0.7
    _, info = load_dataset("test/collected-v0", None, "cpu")
    assert info["data_score"] == pytest.approx(100 * np.mean(successes))
    assert "is there already" in run("examples/collect_pointmaze.py", "--dataset", "test/collected-v0").stdout


def test_run_sh_hands_the_flags_on(tmp_path):
    """run.sh with a python that only writes down how it is called."""
    fake = tmp_path / "bin" / "python"
    fake.parent.mkdir()
    fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    fake.chmod(0o755)
    env = os.environ | {"PATH": f"{fake.parent}:{os.environ['PATH']}", "ACTOR": "--beta 0.01 0.05"}
    subprocess.run(
        ["bash", ROOT / "run.sh", "hopper-medium", "--num-seeds", "6", "--out-dir", "x"], env=env, check=True
    )
    flags = "--env hopper-medium --num-seeds 6 --out-dir x"
    assert (tmp_path / "calls").read_text().splitlines() == [
        f"srpo_critic.py {flags}",
        f"srpo_behavior.py {flags}",
        f"srpo_actor.py {flags} --beta 0.01 0.05",
        "eval.py --env hopper-medium --out-dir x",
    ]
    done = subprocess.run(["bash", ROOT / "run.sh", "--num-seeds", "6"], env=env, capture_output=True, text=True)
    assert done.returncode != 0 and "first comes the task" in done.stderr


def test_readme_s_commands_know_their_flags():
    """Every flag that README shows is one of the script's."""
    text = (ROOT / "README.md").read_text()
    calls = re.findall(r"python (srpo_\w+\.py|eval\.py)([^#`\n]*)", text)
    assert len(calls) >= 4
    for script, flags in calls:
        fields = re.findall(r"^    (\w+):", (ROOT / script).read_text(), flags=re.MULTILINE)
        for flag in re.findall(r"--([\w-]+)", flags):
            assert flag.removeprefix("no-").replace("-", "_") in fields, f"{script} has no --{flag}"


@pytest.mark.slow
def test_the_demo_beats_its_data(tmp_path):
    """bash run.sh in a copy of the project, about 6 minutes: at least 85% success, 20 points above the data."""
    copy = tmp_path / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "data"))
    subprocess.run(["bash", "run.sh"], cwd=copy, env=environ(tmp_path / "data"), check=True)
    result = json.loads((copy / "runs" / "local-pointmaze-demo-v0" / "eval.json").read_text())
    assert result["episodes"] == 100
    assert result["summary"][0]["score_mean"] >= max(85, result["data_score"] + 20)
