"""Runs that are stopped, killed, damaged or diverge; files and names that would run code."""

import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, command, create, prepared, random_episodes, run, run_here
from test_pipeline import STAGES, assert_same_run, lines, load, same, slowed, stage_flags

import eval as srpo_eval
import srpo_actor
import srpo_critic

FOLDER = "test-pendulum-v0"


IN_A_SAVE = """
import os, signal, sys, torch
real, calls = torch.save, []
def save(content, path):
    calls.append(path)
    real(content, path)
    if len(calls) == 3:
        os.truncate(path, os.path.getsize(path) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
torch.save = save
"""


@pytest.mark.parametrize("stage", STAGES)
def test_killed_while_it_writes_a_checkpoint(stage, trained, tmp_path):
    script, flags = f"srpo_{stage}.py", stage_flags(stage, trained)
    run_here(script, *flags, "--out-dir", "whole")
    done = subprocess.run(prepared(IN_A_SAVE, script, *flags, "--out-dir", "killed"), stderr=subprocess.DEVNULL)
    assert done.returncode == -signal.SIGKILL
    folder = tmp_path / "killed" / FOLDER
    assert load(folder / f"{stage}.ckpt")["step"] == 14  # the second of them is whole
    with open(folder / f"{stage}.jsonl", "a") as file:
        file.write('{"step": 15, "los')  # as a kill may leave it
    run_here(script, *flags, "--out-dir", "killed", "--resume")
    assert_same_run(tmp_path / "whole" / FOLDER, folder, stage)
    assert not list(folder.glob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_twenty_times(stage, trained, tmp_path):
    """At any moment between two steps or in a write."""
    script, flags, rng = f"srpo_{stage}.py", [str(flag) for flag in stage_flags(stage, trained)], random.Random(0)
    for name, value in {"--steps": "300", "--checkpoint-every": "1"}.items():
        flags[flags.index(name) + 1] = value
    run_here(script, *flags, "--out-dir", "whole")
    folder = tmp_path / "killed" / FOLDER
    checkpoint = folder / f"{stage}.ckpt"
    for _ in range(20):
        process = subprocess.Popen(slowed(script, *flags, "--out-dir", "killed", "--resume"), stderr=subprocess.DEVNULL)
        before = load(checkpoint)["step"] if checkpoint.exists() else 0
        while not (checkpoint.exists() and load(checkpoint)["step"] > before):  # until it got on by a step or two
            assert process.poll() is None
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        assert process.poll() is None
        process.kill()
        process.wait()
    run_here(script, *flags, "--out-dir", "killed", "--resume")
    assert_same_run(tmp_path / "whole" / FOLDER, folder, stage, steps=300)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_last_checkpoint(number, trained, tmp_path):
    flags = (*TINY, "--steps", 60, "--num-seeds", 2)
    run_here("srpo_critic.py", *flags, "--out-dir", "whole")
    process = subprocess.Popen(
        slowed("srpo_critic.py", *flags, "--out-dir", "stopped"),
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    folder = tmp_path / "stopped" / FOLDER
    while not ((folder / "critic.jsonl").exists() and lines(folder / "critic.jsonl")):
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate()
    step = load(folder / "critic.ckpt")["step"]
    assert process.returncode == 1 and "Traceback" not in err
    assert err.endswith(f"stopped by {number.name} at step {step}: the same command with --resume goes on\n")
    assert 10 <= step < 60
    run_here("srpo_critic.py", *flags, "--out-dir", "stopped", "--resume")
    assert_same_run(tmp_path / "whole" / FOLDER, folder, "critic")


def test_actor_refuses_other_steps_on_resume(trained, tmp_path):
    """They set its learning rates."""
    flags = [str(flag) for flag in stage_flags("actor", trained)]
    subprocess.run(prepared(IN_A_SAVE, "srpo_actor.py", *flags), stderr=subprocess.DEVNULL)
    flags[flags.index("--steps") + 1] = "70"
    with pytest.raises(SystemExit, match="steps = 60, not 70"):
        run_here("srpo_actor.py", *flags, "--resume")


# ---- damage


def test_every_flipped_bit_of_a_file_is_noticed_or_harmless(trained, tmp_path):
    whole, rng = (trained / "actor.pt").read_bytes(), random.Random(0)
    before, noticed = load(trained / "actor.pt"), 0
    for _ in range(60):
        place = rng.randrange(len(whole))
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        (tmp_path / "actor.pt").write_bytes(flipped)
        try:
            after = srpo_eval.load_artifact(tmp_path / "actor.pt", "actor", "train")
        except SystemExit as e:
            assert "cannot be read" in e.code and "\n" not in e.code
            noticed += 1
        else:  # between the entries of the zip
            assert same(before["weights"], after["weights"])
            assert {k: v for k, v in before.items() if k != "weights"} == {
                k: v for k, v in after.items() if k != "weights"
            }
    assert noticed > 50


class Marker:
    """Unpickled, it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("code-has-run",)


def damaged_files(whole):
    """Truncated, with a flipped bit among the weights, empty, text, another zip, a pickle that runs code."""
    middle = len(whole) // 2
    yield whole[:middle]
    yield whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    yield b""
    yield b"no checkpoint\n"
    with zipfile.ZipFile("other.zip", "w") as file:
        file.writestr("a", "b")
    yield Path("other.zip").read_bytes()
    torch.save({"args": Marker(), "stage": Marker()}, "malicious")
    yield Path("malicious").read_bytes()


def test_bad_input_damaged_checkpoints_and_artifacts(trained, tmp_path):
    folder = tmp_path / "runs" / FOLDER
    folder.mkdir(parents=True)
    resume = ("srpo_critic.py", *TINY, "--steps", 20, "--num-seeds", 2, "--resume")
    attempts = {
        "critic.ckpt": resume,
        "critic.pt": resume,  # is it finished?
        "actor.pt": ("eval.py", "--env", "test/pendulum-v0"),
        "behavior.pt": ("srpo_actor.py", *TINY, "--critic", trained / "critic.pt"),
    }
    for path, attempt in attempts.items():
        for content in damaged_files((trained / path.replace("ckpt", "pt")).read_bytes()):
            (folder / path).write_bytes(content)
            with pytest.raises(SystemExit) as e:
                run_here(*attempt)
            assert "cannot be read" in str(e.value.code) and "\n" not in e.value.code
            assert (folder / path).read_bytes() == content and not Path("code-has-run").exists()
        (folder / path).unlink()


def limited(size, script, *flags):
    """Run with no file allowed to grow beyond size, as on a full disk."""

    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    done = subprocess.run(command(script, *flags), capture_output=True, text=True, preexec_fn=limit)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


def test_bad_input_a_full_disk_keeps_the_previous_file(trained, tmp_path):
    folder = tmp_path / "runs" / FOLDER
    flags = [str(flag) for flag in stage_flags("critic", trained)]
    subprocess.run(prepared(IN_A_SAVE, "srpo_critic.py", *flags), stderr=subprocess.DEVNULL)
    before = (folder / "critic.ckpt").read_bytes()
    (line,) = limited(200_000, "srpo_critic.py", *flags, "--resume")
    assert "cannot write runs/test-pendulum-v0/critic.ckpt" in line and "--resume" in line
    assert (folder / "critic.ckpt").read_bytes() == before and not list(folder.glob("*.ckpt.tmp"))
    (line,) = limited(300, "srpo_critic.py", *flags, "--checkpoint-every", 1000, "--run-name", "log")
    assert "critic.jsonl" in line
    run_here("srpo_critic.py", *flags, "--resume")


# ---- divergence


def test_divergence_names_stage_step_and_replica():
    replicas = [{"seed": 3, "beta": 0.1}, {"seed": 3, "beta": 0.5}, {"seed": 4, "beta": 0.1}]
    policy = srpo_actor.mlp([2, 8, 1], [torch.Generator() for _ in replicas])
    good = {"losses/actor_loss": [1.0, 2.0, 3.0]}
    srpo_actor.check_finite(7000, good, policy, replicas)
    with pytest.raises(SystemExit) as e:
        srpo_actor.check_finite(7000, {"losses/actor_loss": [1.0, 2.0, float("nan")]}, policy, replicas)
    assert "actor diverged by step 7,000 in [{'seed': 4, 'beta': 0.1}]" in e.value.code and "rms" in e.value.code
    with torch.no_grad():
        policy[2].bias[1] = float("inf")
    with pytest.raises(SystemExit, match="'beta': 0.5}]"):
        srpo_actor.check_finite(7000, good, policy, replicas)
    critic = srpo_critic.Critic(2, 1, [torch.Generator() for _ in range(3)])  # both heads of a seed count as one
    with torch.no_grad():
        critic.q.net[0].bias[3] = float("nan")
    with pytest.raises(SystemExit, match=r"\[{'seed': 1}\].*expectile"):
        srpo_critic.check_finite(1, {}, critic, [{"seed": seed} for seed in range(3)])


@pytest.mark.parametrize("stage", STAGES)
def test_a_diverged_run_stops_within_a_log_interval(stage, trained, tmp_path):
    flags = [str(flag) for flag in stage_flags(stage, trained)]
    flags[flags.index("--checkpoint-every") + 1] = "1"
    with pytest.raises(SystemExit) as e:
        run_here(f"srpo_{stage}.py", *flags, "--lr", 1e38)
    assert f"error: {stage} diverged by step " in e.value.code and "'seed': 1" in e.value.code
    folder = tmp_path / "runs" / FOLDER
    assert not (folder / f"{stage}.pt").exists()
    for path in folder.glob("*.ckpt"):
        assert all(x.isfinite().all() for x in load(path)["model"].values())
    assert all(np.isfinite(x).all() for line in lines(folder / f"{stage}.jsonl") for x in line.values())


@pytest.mark.parametrize("whole_group", [False, True], ids=["as W&B's agent", "as Slurm"])
def test_run_sh_hands_sigterm_to_its_stage(whole_group, tmp_path):
    (tmp_path / "bin").mkdir()
    slow = slowed("srpo_critic.py", *TINY, "--steps", 60, "--out-dir", tmp_path / "runs")
    (tmp_path / "bin" / "python").write_text(f"#!/bin/sh\nexec {shlex.join(slow)}\n")
    (tmp_path / "bin" / "python").chmod(0o755)
    process = subprocess.Popen(
        ["bash", ROOT / "run.sh", "test/pendulum-v0"],
        env=os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    folder = tmp_path / "runs" / FOLDER
    while not ((folder / "critic.jsonl").exists() and lines(folder / "critic.jsonl")):
        assert process.poll() is None
        time.sleep(0.02)
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143 and "the same command with --resume goes on" in err
    assert 10 <= load(folder / "critic.ckpt")["step"] < 60


# ---- processes that die


def die(weights, info):
    os._exit(1)


def test_bad_input_a_worker_that_dies_ends_the_run():
    info = {"environment": {"id": "Pendulum-v1", "kwargs": {}, "max_episode_steps": 5}, "maze": False}
    with srpo_eval.start_workers(2, signal.SIG_DFL) as pool, pytest.raises(SystemExit) as e:
        srpo_eval.evaluate(pool, die, [None], info, info["environment"], range(3))
    assert "has died" in e.value.code and "--resume" in e.value.code and "\n" not in e.value.code


def test_bad_input_a_worker_that_died_before_ends_the_run():
    info = {"environment": {"id": "Pendulum-v1", "kwargs": {}, "max_episode_steps": 5}, "maze": False}
    with srpo_eval.start_workers(1, signal.SIG_DFL) as pool:
        with pytest.raises(BrokenProcessPool):
            pool.submit(os._exit, 1).result()
        with pytest.raises(SystemExit, match="has died"):
            srpo_eval.evaluate(pool, die, [None], info, info["environment"], range(3))


def worker_of(process):
    """The process id of its first worker, once it has one."""
    while process.poll() is None:
        listing = ["ps", "-A", "-ww", "-o", "ppid=", "-o", "pid=", "-o", "args="]
        processes = subprocess.run(listing, capture_output=True, text=True).stdout.splitlines()
        for parent, pid, args in (line.split(maxsplit=2) for line in processes):
            if int(parent) == process.pid and "spawn_main" in args:
                return int(pid)
        time.sleep(0.02)
    raise AssertionError("it ended without a worker")


@pytest.mark.skipif(not shutil.which("ps"), reason="ps names the worker")
def test_a_worker_killed_in_training_ends_it_and_resume_goes_on(trained, tmp_path):
    flags = [str(flag) for flag in stage_flags("actor", trained)]
    flags[flags.index("--eval-every") + 1] = "30"
    flags += ["--eval-episodes", "30", "--eval-workers", "1"]
    run_here("srpo_actor.py", *flags, "--out-dir", "whole")
    process = subprocess.Popen(
        command("srpo_actor.py", *flags, "--out-dir", "killed"), stderr=subprocess.PIPE, text=True
    )
    os.kill(worker_of(process), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in err
    assert "a process that evaluates has died" in err.splitlines()[-1]
    folder = tmp_path / "killed" / FOLDER
    assert load(folder / "actor.ckpt")["step"] == 28
    run_here("srpo_actor.py", *flags, "--out-dir", "killed", "--resume")
    assert_same_run(tmp_path / "whole" / FOLDER, folder, "actor")


def test_workers_of_a_killed_process_end():
    code = "import os, signal, time, eval; pool = eval.start_workers(1, signal.SIG_DFL)"
    code += "; print(pool.submit(os.getpid).result(), flush=True); pool.submit(time.sleep, 1000).result()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert int(process.stdout.readline()) != process.pid
    process.kill()
    process.communicate(timeout=30)  # returns when nobody can write any more: the worker has inherited the pipe


def test_ctrl_c_ends_an_evaluation(trained):
    """It reaches the whole process group, as from a terminal."""
    flags = ("--env", "test/pendulum-v0", "--out-dir", trained.parent, "--episodes", 3000, "--workers", 2)
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    options["env"] = os.environ | {"PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command("eval.py", *flags, "--policy", "idql"), **options)
    assert "episodes per policy" in process.stdout.readline()
    time.sleep(5)
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 1 and [line for line in err.splitlines() if line.startswith("error: ")], err


# ---- no way in


MODULE = "import os\nos.mkdir(os.environ['MARKER'])\n"


@pytest.fixture
def marker(tmp_path, monkeypatch):
    """A folder that the module `intruder` makes when it is imported, or its function when called."""
    (tmp_path / "intruder.py").write_text(MODULE)
    monkeypatch.setenv("MARKER", str(tmp_path / "code-has-run"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "code-has-run"
    sys.modules.pop("intruder", None)


def test_the_marker_marks(marker):
    with pytest.raises(gym.error.Error):
        gym.make("intruder:Env-v0")
    assert marker.exists()


def test_bad_input_an_artifact_whose_environment_is_code(marker, trained, tmp_path):
    artifact = load(trained / "actor.pt")
    for spec in artifact["environments"].values():
        spec["id"] = "intruder:Env-v0"
    (tmp_path / "runs" / FOLDER).mkdir(parents=True)
    torch.save(artifact, tmp_path / "runs" / FOLDER / "actor.pt")
    with pytest.raises(SystemExit, match="intruder:Env-v0 is not registered"):
        run_here("eval.py", "--env", "test/pendulum-v0")
    assert not marker.exists() and "intruder" not in sys.modules


def crafted(data_root, id, spaces):
    """A data set whose specification names the module, with or without its own spaces."""
    create(id, random_episodes(gym.make("Pendulum-v1", max_episode_steps=9), 2, 9), env=gym.make("Pendulum-v1"))
    path = data_root / id / "data" / "metadata.json"
    meta = json.loads(path.read_text())
    spec = json.loads(meta["env_spec"]) | {"entry_point": "intruder:make", "id": "intruder:Env-v0"}
    meta |= {"env_spec": json.dumps(spec)}
    if not spaces:
        del meta["observation_space"]
    path.write_text(json.dumps(meta))


def test_bad_input_a_data_set_whose_environment_is_code(marker, data_root):
    """It trains on the numbers and evaluates nowhere."""
    crafted(data_root, "crafted/spaces-v0", spaces=True)
    flags = (*TINY[2:], "--steps", 5, "--env", "crafted/spaces-v0")
    run_here("srpo_critic.py", *flags)
    run_here("srpo_behavior.py", *flags)
    with pytest.raises(SystemExit, match="is not registered"):
        run_here("srpo_actor.py", *flags, "--eval-workers", 1)
    assert not marker.exists() and "intruder" not in sys.modules


def test_bad_input_a_data_set_that_leaves_its_spaces_to_code(marker, data_root):
    crafted(data_root, "crafted/no-spaces-v0", spaces=False)
    with pytest.raises(SystemExit, match="names no spaces"):
        run_here("srpo_critic.py", *TINY[2:], "--env", "crafted/no-spaces-v0")
    assert not marker.exists() and "intruder" not in sys.modules
    with pytest.raises((TypeError, AttributeError, gym.error.Error)):
        minari.load_dataset("crafted/no-spaces-v0")
    assert marker.exists()  # this is what Minari does by itself


def test_no_secret_reaches_a_file(trained, tmp_path):
    secret = "0123456789abcdef" * 2 + "01234567"
    run(
        "srpo_critic.py", *TINY, "--steps", 5, "--track", WANDB_API_KEY=secret, WANDB_MODE="offline", OTHER=secret[::-1]
    )
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 2
    for path in files:
        content = path.read_bytes()
        assert secret.encode() not in content and secret[::-1].encode() not in content, path
