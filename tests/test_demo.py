"""The demo: its data, and run.sh from end to end."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import tyro
import yaml
from conftest import ROOT, run
from filelock import FileLock

import eval as srpo_eval
import srpo_actor
import srpo_behavior
import srpo_critic
from examples.collect_pointmaze import make_env, record_episode
from srpo_critic import load_dataset

LEVELS, MAZES = (
    ("medium-expert", "medium", "medium-replay"),
    ("umaze", "umaze-diverse", "medium-play", "medium-diverse"),
)
MAZES += ("large-play", "large-diverse")
TASKS = [f"{robot}-{level}-v2" for robot in ("halfcheetah", "hopper", "walker2d") for level in LEVELS]
TASKS += [f"antmaze-{maze}-v2" for maze in MAZES]


def environ(data):
    """Where python is this test's, and data sets are the demo's own."""
    threads = {"OMP_NUM_THREADS": str(os.cpu_count())}  # not the tests' one
    return (
        os.environ
        | threads
        | {
            "MINARI_DATASETS_PATH": str(data),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
    )


def test_the_demo_s_data_have_the_layout_of_minaris_mazes(data_root):
    done = run("examples/collect_pointmaze.py", "--dataset", "test/collected-v0", "--episodes", 60)
    assert "60 episodes, 12,000 steps" in done.stdout
    data = minari.load_dataset("test/collected-v0")
    assert data.env_spec.id == "PointMaze_Medium-v3" and data.env_spec.max_episode_steps == 200
    assert data.env_spec.kwargs["continuing_task"] and not data.env_spec.kwargs["reset_target"]
    successes = []
    for episode in data:
        assert set(episode.observations) == {"achieved_goal", "desired_goal", "observation"}
        assert len(episode.actions) == len(episode.rewards) == 200 and len(episode.observations["observation"]) == 201
        assert not episode.terminations.any() and episode.truncations.nonzero()[0].tolist() == [199]
        distance = np.linalg.norm(episode.observations["achieved_goal"] - episode.observations["desired_goal"], axis=1)
        np.testing.assert_array_equal(episode.rewards, distance[1:] <= 0.45)
        successes.append(episode.rewards.any())
    assert 0.25 < np.mean(successes) < 0.7
    _, info = load_dataset("test/collected-v0", None, None, "cpu")
    assert info["maze"] and info["data_outcome"] == pytest.approx(np.mean(successes))
    assert "is there already" in run("examples/collect_pointmaze.py", "--dataset", "test/collected-v0").stdout


def test_the_demo_s_controller_ignores_the_goal():
    env = make_env()
    moved = gym.wrappers.TransformObservation(env, lambda obs: obs | {"desired_goal": -obs["desired_goal"]}, None)
    one, two = record_episode(env, 0), record_episode(moved, 0)
    assert (one.observations["desired_goal"] == -two.observations["desired_goal"]).all()
    np.testing.assert_array_equal(one.actions, two.actions)


def called(tmp_path, *command, **env):
    """The calls of python that a command makes, by a python that only writes them down; srun runs what it is given."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    calls = tmp_path / "calls"
    python = f'[ "$1" = -c ] && exec {sys.executable} "$@"\necho "$WANDB_RUN_ID$@" >> {calls}'
    for name, line in {"python": python, "srun": 'shift; exec "$@"'}.items():
        (folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (folder / name).chmod(0o755)
    calls.write_text("")
    env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"} | env
    project = tmp_path / "project"
    project.mkdir(exist_ok=True)
    for name in ("run.sh", "slurm.sh"):
        shutil.copy(ROOT / name, project)
    subprocess.run(command, env=env, check=True, cwd=project)
    return calls.read_text().splitlines()


def stage_calls(env, *flags):
    return [f"srpo_{stage}.py " + " ".join(("--env", env, *flags)) for stage in ("critic", "behavior", "actor")]


def test_run_sh_hands_the_flags_on(tmp_path):
    for out in ("--out-dir x", "--out_dir=x"):
        flags = ("--num-seeds", "6", *out.split())
        calls = called(tmp_path, "bash", "run.sh", "hopper-medium", *flags, ACTOR="--beta 0.01 0.05")
        expected = stage_calls("hopper-medium", *flags)
        assert calls == [*expected[:2], f"{expected[2]} --beta 0.01 0.05", f"eval.py --env hopper-medium {out}"]
    some = ("--normalize-obs", "--amp", "--lr=9", "--dataset", "a-v0+b-v0", "--run-name", "x")  # not all have all
    calls = called(tmp_path, "bash", "run.sh", "hopper-medium", *some)
    for call, stage in zip(calls, (srpo_critic, srpo_behavior, srpo_actor, srpo_eval), strict=True):
        args = vars(tyro.cli(stage.Args, args=call.split()[1:]))  # which each script understands
        assert args["run_name"] == "x" and args.get("lr", 9) == 9 and args.get("amp", True)
        assert args.get("dataset", "a-v0+b-v0") == "a-v0+b-v0" and args.get("normalize_obs", True)
    demo = called(tmp_path, "bash", "run.sh", ACTOR="--beta 0.3")
    assert demo[3].startswith("srpo_actor.py --env local/pointmaze-demo-v0") and demo[3].endswith("--beta 0.3")
    small = called(
        tmp_path, "bash", "run.sh", "--small", "hopper-medium", "--lr", "9", BEHAVIOR="--steps 5", EVAL="--video"
    )
    for call in small[:3]:  # flags come after the recipe's, of which tyro takes the last
        assert call.index("--env hopper-medium ") < call.index("--lr 1e-3") < call.index("--lr 9")
    assert "--num-seeds 3" in small[0] and "--num-seeds 3" in small[1]
    assert "--lr-decay" in small[0] and "--predict v --no-dropout" in small[1] and small[1].endswith("--lr 9 --steps 5")
    assert small[3].startswith("eval.py --env hopper-medium --policy srpo") and small[3].endswith("--video")
    for flags, expected in ([], True), (["--no-normalize-obs"], False):  # the recipe standardises unless told otherwise
        calls = called(tmp_path, "bash", "run.sh", "--small", "hopper-medium", *flags)
        for call, stage in zip(calls, (srpo_critic, srpo_behavior, srpo_actor, srpo_eval), strict=True):
            assert vars(tyro.cli(stage.Args, args=call.split()[1:])).get("normalize_obs", expected) is expected
    maze = called(tmp_path, "bash", "run.sh", "--small", "antmaze-umaze")
    assert "--steps 30000 " in maze[1] and "--steps 15000 " in maze[2] and "--env antmaze-umaze" in maze[1]
    assert "--steps 20000 " in small[1] and "--steps 20000 " in small[2]
    assert "--steps 60000 --tau 0.02" in maze[0] and "--steps 60000 --tau 0.005" in small[0]
    assert "--steps 120000 " in called(tmp_path, "bash", "run.sh", "--small", "antmaze-large-diverse-v2")[0]
    assert "--beta 0.05 0.1 0.25 --q-grad-norm none " in maze[2]
    assert "--beta 0.002 0.01 0.05 0.2 --q-grad-norm none " in small[2]
    calls = called(tmp_path, "bash", "run.sh", "hopper-medium", "--track", "--wandb-entity", "us", "--steps", "9")
    assert calls[0] == "srpo_critic.py --env hopper-medium --track --wandb-entity us --steps 9"
    assert calls[3] == "eval.py --env hopper-medium --track --wandb-entity us"  # the final scores, too
    for flags in (["--num-seeds", "6"], ["--small"]):
        done = subprocess.run(["bash", ROOT / "run.sh", *flags], capture_output=True, text=True)
        assert done.returncode != 0 and "the task comes first" in done.stderr


@pytest.fixture
def staged(tmp_path):
    """run.sh in a folder of its own, whose python does for each script what the fixture's user writes into a file."""
    project, folder = tmp_path / "project", tmp_path / "bin"
    project.mkdir()
    folder.mkdir()
    shutil.copy(ROOT / "run.sh", project)
    lines = f'[ "$1" = -c ] && exec {sys.executable} "$@"', 'echo "$@" >> calls', '. "./$1.does"'
    (folder / "python").write_text("\n".join(["#!/bin/bash", *lines]) + "\n")
    (folder / "python").chmod(0o755)
    for script in ("srpo_critic.py", "srpo_behavior.py", "srpo_actor.py", "eval.py"):
        name = script.removesuffix(".py").removeprefix("srpo_")
        (project / f"{script}.does").write_text(f"sleep 0.01; mkdir -p runs/x; touch runs/x/{name}.pt")

    def start(*flags):
        env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        return subprocess.Popen(["bash", "run.sh", *flags], cwd=project, env=env, **pipes)

    return project, start


@pytest.mark.parametrize("stage", ["srpo_critic", "srpo_behavior", "srpo_actor", "eval"])
def test_a_second_run_sh_is_refused_while_the_first_one_lives(stage, staged):
    """In whichever stage it is; when it has ended, also by a kill of all of it, the next one runs."""
    project, start = staged
    (project / f"{stage}.py.does").write_text('echo "$@" >> lasts; exec sleep 60')

    def reached(process, flags=""):
        while f"{stage}.py --env x{flags}\n" not in (project / "lasts").read_text().splitlines(keepends=True):
            assert process.poll() is None
            time.sleep(0.02)

    for number in (signal.SIGTERM, signal.SIGKILL):
        (project / "lasts").write_text("")
        first = start("x")
        reached(first)
        before = (project / "calls").read_text()
        second = start("x", "--steps", "3")
        said = "error: runs/x is being trained or scored: wait until that ends, or give another --run-name\n"
        assert second.communicate(timeout=20) == ("", said) and second.returncode == 1
        assert (project / "calls").read_text() == before
        other = start("x", "--run-name", "y")
        reached(other, " --run-name y")
        os.killpg(other.pid, signal.SIGKILL)
        os.killpg(first.pid, number)
        first.wait()
    (project / f"{stage}.py.does").write_text("")
    assert start("x").wait(timeout=20) == 0


def called_scripts(project):
    """Since the last call."""
    calls = [line.split()[0] for line in (project / "calls").read_text().splitlines()]
    (project / "calls").unlink()
    return calls


@pytest.mark.parametrize("name", ["x", "x[1]", "ablation/x"])
def test_run_sh_is_refused_while_a_stage_of_the_run_lives(name, staged):
    """A stage that was started by hand."""
    project, start = staged
    (project / "runs" / name).mkdir(parents=True)
    with FileLock(project / "runs" / name / ".behavior.lock"):
        assert start("x", "--run-name", name).wait(timeout=20) == 1
    assert not (project / "calls").exists() and start("x", "--run-name", name).wait(timeout=20) == 0


def test_run_sh_scores_the_policies_of_a_run_whose_evaluations_failed(staged):
    """And ends with status 1. If there are no policies of this run, it ends at once."""
    project, start = staged
    scripts = ["srpo_critic.py", "srpo_behavior.py", "srpo_actor.py", "eval.py"]
    (project / "srpo_actor.py.does").write_text("sleep 0.01; touch runs/x/actor.pt; exit 1")
    assert start("x").wait(timeout=20) == 1 and called_scripts(project) == scripts
    for script in scripts[:3]:
        (project / f"{script}.does").write_text("")  # --resume, say: nothing is written anew
    (project / "srpo_actor.py.does").write_text("exit 1")  # actor.pt is of the run before
    assert start("x").wait(timeout=20) == 1 and called_scripts(project) == scripts[:3]
    (project / "srpo_actor.py.does").write_text("sleep 0.01; touch runs/x/actor.pt")
    (project / "eval.py.does").write_text("exit 3")
    assert start("x").wait(timeout=20) == 3


def test_the_sweep_is_table_1(tmp_path):
    sweep = yaml.safe_load((ROOT / "sweep.yaml").read_text())
    assert sweep["method"] == "grid" and sweep["parameters"] == {"env": {"values": TASKS}}
    for env in ("hopper-medium-v2", "antmaze-large-diverse-v2"):
        macros = {"${program}": [sweep["program"]], "${args}": [f"--env={env}"]}  # as W&B fills them in
        command = [word for part in sweep["command"] for word in macros.get(part, [part])]
        calls = called(tmp_path, *command, WANDB_RUN_ID="the-agent-s")
        assert calls[:3] == stage_calls(env, "--num-seeds", "6", "--resume", "--track")
        assert calls[3:] == [f"eval.py --env {env} --track"]
    for stage in (srpo_critic, srpo_behavior, srpo_actor):
        args = tyro.cli(stage.Args, args=calls[0].split()[1:])
        assert (args.num_seeds, args.resume, args.track) == (6, True, True)


def test_the_slurm_array_is_table_1(tmp_path):
    text = (ROOT / "slurm.sh").read_text()
    assert "--array=0-14" in text
    for i, env in enumerate(TASKS):
        calls = called(tmp_path, "bash", "slurm.sh", "--track", SLURM_ARRAY_TASK_ID=str(i))
        expected = stage_calls(env, "--num-seeds", "6", "--resume", "--track")
        assert calls == [*expected[:2], f"{expected[2]} --eval-workers 8", f"eval.py --env {env} --track --workers 8"]


def test_readme_s_commands_know_their_flags():
    """Every flag that README and docs show is one of the script's."""
    blocks, prose = [], []
    text = "\n".join(path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")))
    for i, part in enumerate(text.split("```")):
        (blocks if i % 2 else prose).append(part)
    spans = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans += [" ".join(span.split()) for part in prose for span in part.split("`")[1::2]]
    calls = [match.groups() for span in spans for match in re.finditer(r"python (\S+\.py)([^#&]*)", span)]
    for span in spans:
        for stage, flags in re.findall(r'(CRITIC|BEHAVIOR|ACTOR|EVAL)="(.*?)"', span):
            calls.append(("eval.py" if stage == "EVAL" else f"srpo_{stage.lower()}.py", flags))
    assert {"plot.py", "eval.py", "srpo_behavior.py", "examples/value_order.py"} <= {script for script, _ in calls}
    for script, flags in calls:
        fields = re.findall(r"^    (\w+):", (ROOT / script).read_text(), flags=re.MULTILINE)
        for flag in re.findall(r"--([\w-]+)", flags):
            assert flag.removeprefix("no-").replace("-", "_") in fields, f"{script} has no --{flag}"


@pytest.mark.slow
def test_the_demo_beats_its_data(tmp_path):
    """bash run.sh in a copy of the project: at least 90% success, where the data have about 47%."""
    copy = tmp_path / "project"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "data"))
    subprocess.run(["bash", "run.sh"], cwd=copy, env=environ(tmp_path / "data"), check=True)
    result = json.loads((copy / "runs" / "local-pointmaze-demo-v0" / "eval.json").read_text())
    assert result["summary"][0]["episodes"] == 100
    assert result["data_score"] < 70 and result["summary"][0]["score_mean"] >= 90
