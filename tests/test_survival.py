"""Runs that are stopped, killed, damaged or diverge; files and names that would run code."""

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, command, create, ending_processes, prepared, random_episodes, run, run_here
from test_pipeline import STAGES, assert_same_run, interrupted, killed, lines, load, same, slowed, stage_flags

import eval as srpo_eval

FOLDER = "test-pendulum-v0"
linux = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="/proc names the workers")


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
    assert load(folder / f"{stage}.ckpt")["step"] == 20  # the second of them is whole
    with open(folder / f"{stage}.jsonl", "a") as file:
        file.write('{"step": 40, "los')  # as a kill may leave it
    run_here(script, *flags, "--out-dir", "killed", "--resume")
    assert_same_run(tmp_path / "whole" / FOLDER, folder, stage)
    assert not list(folder.glob("*.ckpt"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_killed_twenty_times(stage, trained, tmp_path):
    """At any moment between two steps or in a write."""
    script, flags, rng = f"srpo_{stage}.py", [str(flag) for flag in stage_flags(stage, trained)], random.Random(0)
    for name, value in {"--steps": "300", "--checkpoint-every": "1", "--log-every": "1"}.items():
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


@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_signal_ends_the_process_and_resume_goes_on(number, trained, tmp_path):
    flags = stage_flags("critic", trained)
    run_here("srpo_critic.py", *flags, "--out-dir", "whole")
    killed(38, "srpo_critic.py", *flags, "--out-dir", "killed", number=number)
    run_here("srpo_critic.py", *flags, "--out-dir", "killed", "--resume")
    assert_same_run(tmp_path / "whole" / FOLDER, tmp_path / "killed" / FOLDER, "critic")


def test_a_full_disk_keeps_the_last_checkpoint(trained, tmp_path):
    flags = stage_flags("critic", trained)
    run_here("srpo_critic.py", *flags, "--out-dir", "whole")
    killed(38, "srpo_critic.py", *flags)
    path = tmp_path / "runs" / FOLDER / "critic.ckpt"
    before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, old[1]))  # no file may grow beyond this
    try:
        with pytest.raises(SystemExit) as e:
            run_here("srpo_critic.py", *flags, "--resume")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert str(e.value.code).startswith(f"error: cannot write to runs/{FOLDER} (") and "\n" not in e.value.code
    assert path.read_bytes() == before
    run_here("srpo_critic.py", *flags, "--resume")
    assert_same_run(tmp_path / "whole" / FOLDER, tmp_path / "runs" / FOLDER, "critic")


@pytest.mark.parametrize("lost", ["all", "half"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_without_its_log(stage, lost, trained, tmp_path, capsys):
    """With a line that says so; the log holds what came later, and the artifact is the same."""
    script, flags = f"srpo_{stage}.py", stage_flags(stage, trained)
    run_here(script, *flags, "--out-dir", "whole")
    interrupted(38, script, *flags, "--out-dir", "killed")
    log = tmp_path / "killed" / FOLDER / f"{stage}.jsonl"
    log.unlink() if lost == "all" else log.write_text("\n".join(log.read_text().splitlines()[:2])[:-9])
    capsys.readouterr()
    run_here(script, *flags, "--out-dir", "killed", "--resume")
    said = f"killed/{FOLDER}/{stage}.jsonl lacks lines of steps up to 30: it goes on without them"
    assert said in capsys.readouterr().out.splitlines()
    steps = [line["step"] for line in lines(log)]
    assert steps == [*([5] if lost == "half" else []), 35, 40, 45, 50, 55, 60]
    folders = [tmp_path / name / FOLDER for name in ("whole", "killed")]
    assert same(*(load(folder / f"{stage}.pt")["weights"] for folder in folders))


LOCKS = """
#include <errno.h>
#include <stdlib.h>
int flock(int file, int operation) { errno = atoi(getenv("FLOCK_ERRNO")); return -1; }
"""


@pytest.fixture(scope="module")
def no_locks(tmp_path_factory):
    """A library that makes every lock of a file fail, as on some network file systems."""
    path = tmp_path_factory.mktemp("locks")
    (path / "locks.c").write_text(LOCKS)
    if not shutil.which("gcc"):
        pytest.skip("no C compiler")
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", path / "locks.so", path / "locks.c"], check=True)
    return path / "locks.so"


@linux
@pytest.mark.parametrize("error", ["ENOLCK", "ENOTSUP", "ENOSYS"])
def test_a_file_system_without_locks(error, no_locks, tmp_path):
    """Minari's set is read, a killed run is resumed, and a line says what is missing."""
    env = {"LD_PRELOAD": str(no_locks), "FLOCK_ERRNO": str(getattr(errno, error))}
    flags = (*TINY, "--steps", 60, "--checkpoint-every", 10)
    process = subprocess.Popen(slowed("srpo_critic.py", *flags, pause=0.1), env=os.environ | env)
    folder = tmp_path / "runs" / FOLDER
    while not (folder / "critic.ckpt").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = run("srpo_critic.py", *flags, "--resume", **env)
    if error == "ENOLCK":  # the demo's data are made there, too
        env |= {"MINARI_DATASETS_PATH": str(tmp_path / "data")}
        run("examples/collect_pointmaze.py", "--episodes", 2, **env)
        run("srpo_critic.py", "--env", "local/pointmaze-demo-v0", "--steps", 1, **env)
    said = [line for line in done.stdout.splitlines() if "cannot be locked" in line]
    assert len(said) == 1 and said[0].startswith(f"runs/{FOLDER} cannot be locked ([Errno {env['FLOCK_ERRNO']}]")
    assert load(folder / "critic.pt")["args"]["steps"] == 60 and "Traceback" not in done.stderr


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
            after = srpo_eval.load_artifact(tmp_path / "actor.pt", "actor")
        except SystemExit as e:
            assert "missing or unusable" in e.code and "\n" not in e.code
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
            assert "missing or unusable" in str(e.value.code) and "\n" not in e.value.code
            assert (folder / path).read_bytes() == content and not Path("code-has-run").exists()
        (folder / path).unlink()


# ---- divergence


def poisoned(stage, trained, tmp_path, replica):
    """A checkpoint of step 10 in which one weight of one replica is not a number."""
    flags = [str(flag) for flag in stage_flags(stage, trained)]
    subprocess.run(prepared(IN_A_SAVE, f"srpo_{stage}.py", *flags), stderr=subprocess.DEVNULL)
    path = tmp_path / "runs" / FOLDER / f"{stage}.ckpt"
    state = load(path)
    for x in state["weights"].values():
        of = x.unflatten(0, (4 if stage == "actor" else 2, -1))  # seeds x betas, or two seeds
        of[replica].flatten()[-1] = float("nan")
        break
    torch.save(state, path)
    return flags


@pytest.mark.parametrize(
    "stage, replica, name", [("critic", 1, "{'seed': 1}"), ("actor", 2, "{'seed': 1, 'beta': 0.1}")]
)
def test_divergence_names_the_replica(stage, replica, name, trained, tmp_path):
    """Both heads of a critic's seed count as one replica, and the others have not diverged."""
    flags = poisoned(stage, trained, tmp_path, replica)
    with pytest.raises(SystemExit) as e:
        run_here(f"srpo_{stage}.py", *flags, "--resume")
    assert f"error: {stage} diverged by step 25 in [{name}]: start again with a lower --lr" in e.value.code
    assert not (tmp_path / "runs" / FOLDER / f"{stage}.pt").exists()


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
        assert all(x.isfinite().all() for x in load(path)["weights"].values())
    for path in folder.glob("*.jsonl"):
        assert all(np.isfinite(x).all() for line in lines(path) for x in line.values())


# ---- processes that die


def processes_of(mark):
    """Ids of the workers whose environment has this mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if (
                mark.encode() in (folder / "environ").read_bytes()
                and b"popen_loky" in (folder / "cmdline").read_bytes()
            ):
                found.append(int(folder.name))
        except OSError:  # it has ended
            continue
    return found


def evaluating(trained, *flags, mark):
    """A training whose workers have begun to play episodes: process and ids of workers."""
    command_line = command("srpo_actor.py", *flags)
    process = subprocess.Popen(
        command_line, env=os.environ | {"MARK": mark}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while not (workers := processes_of(f"MARK={mark}")):
        assert process.poll() is None
        time.sleep(0.05)
    return process, workers


@linux
def test_training_goes_on_when_a_worker_is_killed(trained, tmp_path):
    """One line says so, the policies are those of an undisturbed run, and the exit status is 1."""
    flags = [str(flag) for flag in stage_flags("actor", trained)]
    flags[flags.index("--eval-every") + 1] = "30"
    flags += ["--eval-episodes", "40", "--eval-workers", "2"]
    run_here("srpo_actor.py", *flags, "--out-dir", "whole")
    process, workers = evaluating(trained, *flags, "--out-dir", "killed", mark=str(tmp_path))
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    said = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert process.returncode == 1 and "Traceback" not in err and len(said) == 2
    assert said[0].startswith("error: evaluation failed at step 30, training goes on (TerminatedWorkerError(")
    assert said[1].startswith("error: evaluations failed at steps [30]: ")
    folders = [tmp_path / name / FOLDER for name in ("whole", "killed")]
    assert same(*(load(folder / "actor.pt")["weights"] for folder in folders))
    logs = [{line["step"]: line for line in lines(folder / "actor.jsonl")} for folder in folders]
    assert "eval/score" in logs[0][30] and "eval/score" not in logs[1][30]
    assert logs[0][60]["eval/score"] == logs[1][60]["eval/score"]  # by new workers


class Fails(gym.Env):
    """Pendulum, but a counter in a file decides which episode raises."""

    def __init__(self, last=None):
        self.env, self.last, self.leave = gym.make("Pendulum-v1"), last, Path("leave").exists()
        self.observation_space, self.action_space = self.env.observation_space, self.env.action_space

    def reset(self, seed=None, options=None):
        count = Path("episodes")
        n = int(count.read_text()) + 1 if count.exists() else 1
        count.write_text(str(n))
        if self.last and n > self.last:
            raise (SystemExit if self.leave else RuntimeError)("a joint\nbroke")
        return self.env.reset(seed=seed)

    def step(self, action):
        return self.env.step(action)


@pytest.fixture
def failing(data_root, request):
    """Critic and behaviour model of an environment that raises after some episodes."""
    gym.register("Fails-v0", entry_point="test_survival:Fails", max_episode_steps=10)
    create("test/fails-v0", random_episodes(gym.make("Fails-v0"), 3, 10), env=gym.make("Fails-v0", last=5))
    Path("episodes").unlink()
    flags = ("--env", "test/fails-v0", *TINY[2:], "--steps", 40)
    for stage in ("critic", "behavior"):
        run_here(f"srpo_{stage}.py", *flags)
    yield Path("runs/test-fails-v0"), (*flags, "--eval-episodes", 2, "--eval-workers", 1)
    del gym.registry["Fails-v0"]
    shutil.rmtree(data_root / "test" / "fails-v0")


def test_training_goes_on_when_an_environment_raises(failing, capsys):
    """The trial and the first two evaluations take five episodes; the third one, at the last step, raises."""
    folder, flags = failing
    with pytest.raises(SystemExit) as e:
        run_here("srpo_actor.py", *flags, "--eval-every", 15)
    assert e.value.code.startswith("error: evaluations failed at steps [40]")
    said = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if "error: " in line]
    assert len(said) == 1 and "step 40, training goes on (RuntimeError('a joint\\nbroke'))" in said[0]
    assert load(folder / "actor.pt")["format"] == 5 and not list(folder.glob("*.ckpt"))
    assert [line["step"] for line in lines(folder / "actor.jsonl") if "eval/score" in line] == [20, 30]

    with pytest.raises(SystemExit) as e:  # eval.py: its own first step raises
        run_here("eval.py", "--env", "test/fails-v0", "--workers", 1)
    assert e.value.code.startswith("error: cannot play in Fails-v0 (RuntimeError(") and "\n" not in e.value.code

    Path("episodes").unlink()  # one episode of the trial, two of the first policy, and the second raises
    with pytest.raises(SystemExit) as e:
        policies = ("--policy", "srpo", "behavior", "--sampler-steps", 2)
        run_here("eval.py", "--env", "test/fails-v0", "--workers", 1, "--episodes", 3, *policies)
    assert e.value.code == "error: no scores of behavior with 1 candidate(s): the evaluation failed"
    assert [row["policy"] for row in json.loads((folder / "eval.json").read_text())["policies"]] == ["srpo"]


def test_resume_does_not_forget_which_evaluations_failed(failing):
    """The third one, at step 30, raises; the run is interrupted after it, and goes on with a sound environment."""
    folder, flags = failing
    flags = (*flags, "--eval-every", 10, "--checkpoint-every", 10)
    interrupted(38, "srpo_actor.py", *flags)
    Path("episodes").unlink()  # it raises after five episodes
    with pytest.raises(SystemExit) as e:
        run_here("srpo_actor.py", *flags, "--resume")
    assert e.value.code.startswith("error: evaluations failed at steps [30]: run eval.py")
    assert [line["step"] for line in lines(folder / "actor.jsonl") if "eval/score" in line] == [10, 20, 40]


def test_training_goes_on_when_an_environment_leaves_python(failing, capsys):
    folder, flags = failing
    Path("leave").touch()
    with pytest.raises(SystemExit) as e:
        run_here("srpo_actor.py", *flags, "--eval-every", 15)
    assert e.value.code.startswith("error: evaluations failed at steps [40]") and (folder / "actor.pt").exists()
    assert "training goes on (SystemExit('a joint\\nbroke'))" in capsys.readouterr().err


def test_a_run_whose_environment_fails_at_once_is_refused(failing):
    """Before anything is written, with the way out; with it, the run is trained."""
    folder, flags = failing
    Path("episodes").write_text("5")
    with pytest.raises(SystemExit) as e:
        run_here("srpo_actor.py", *flags)
    assert "cannot play in Fails-v0 (RuntimeError('a joint\\nbroke'))" in e.value.code and "\n" not in e.value.code
    assert e.value.code.endswith("or train with --eval-every 0") and not list(folder.glob("actor*"))
    run_here("srpo_actor.py", *flags, "--eval-every", 0)
    assert (folder / "actor.pt").exists()


def test_how_often_a_run_is_evaluated_may_change_when_it_goes_on(trained, tmp_path):
    flags = [str(flag) for flag in stage_flags("actor", trained)]
    run_here("srpo_actor.py", *flags, "--out-dir", "whole")
    killed(38, "srpo_actor.py", *flags, "--out-dir", "killed")
    more = ("--out-dir", "killed", "--resume", "--eval-every", 60, "--eval-episodes", 1, "--eval-workers", 1)
    run_here("srpo_actor.py", *flags, *more)
    folders = [tmp_path / name / FOLDER for name in ("whole", "killed")]
    assert same(*(load(folder / "actor.pt")["weights"] for folder in folders))
    assert ["eval/score" in line for line in lines(folders[1] / "actor.jsonl")] == [False] * 11 + [True]


@pytest.mark.parametrize("stage", STAGES)
def test_the_same_command_twice_at_once_is_refused(stage, trained, tmp_path):
    """While the first process lives; after it was killed, the run goes on."""
    script, flags = f"srpo_{stage}.py", stage_flags(stage, trained)
    slow = slowed(script, *flags, pause=1)
    process = subprocess.Popen(slow, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "runs" / FOLDER / f"{stage}.jsonl"
    while not log.exists():
        assert process.poll() is None
        time.sleep(0.05)
    before = log.read_text()
    done = run(script, *flags, check=False)
    said = f"error: another srpo_{stage}.py writes to runs/{FOLDER}: wait until it ends, or give another --run-name\n"
    assert (done.returncode, done.stderr) == (1, said) and log.read_text().startswith(before)
    process.kill()
    process.wait()
    run_here(script, *flags, "--resume")
    assert (log.parent / f"{stage}.pt").exists()


@linux
@pytest.mark.slow
def test_workers_of_a_process_killed_in_an_evaluation_end_within_two_minutes(trained, tmp_path):
    """Their jobs' messages fit into a pipe, of which a kill would else leave a half that they wait for."""
    flags = [str(flag) for flag in stage_flags("actor", trained)]
    flags[flags.index("--eval-every") + 1] = "30"
    flags += ["--eval-episodes", "60000", "--eval-workers", "2"]
    process, _ = evaluating(trained, *flags, mark=str(tmp_path))
    while len(processes_of(f"MARK={tmp_path}")) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(5)
    assert process.poll() is None
    process.kill()
    process.wait()
    deadline = time.time() + 120
    while processes_of(f"MARK={tmp_path}"):
        assert time.time() < deadline
        time.sleep(1)


@linux
def test_what_a_test_starts_ends_with_it(tmp_path):
    """Also if it fails, and also the processes that it started itself."""
    code = "import subprocess, time; subprocess.Popen(['sleep', '77']); print(1, flush=True); time.sleep(77)"
    code += f"  # {ROOT}"
    with pytest.raises(AssertionError, match="as a test fails"), ending_processes():
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"1\n"
        group = os.getpgid(process.pid)
        raise AssertionError("as a test fails")
    assert process.returncode == -signal.SIGKILL
    deadline = time.time() + 10
    while alive(group):
        assert time.time() < deadline
        time.sleep(0.05)


def alive(group):
    """Whether a process of this group runs; ended ones that nobody has waited for do not count."""
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state, _, its_group = (folder / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(its_group) == group and state != "Z":
            return True
    return False


@linux
def test_ctrl_c_ends_an_evaluation(trained, tmp_path):
    flags = ("--env", "test/pendulum-v0", "--out-dir", trained.parent, "--episodes", 100_000, "--workers", 2)
    options = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    process = subprocess.Popen(command("eval.py", *flags), env=os.environ | {"MARK": str(tmp_path)}, **options)
    while len(processes_of(f"MARK={tmp_path}")) < 2:
        assert process.poll() is None
        time.sleep(0.05)
    time.sleep(4)
    os.killpg(process.pid, signal.SIGINT)  # as from a terminal
    assert process.wait(timeout=20) != 0
    deadline = time.time() + 20
    while processes_of(f"MARK={tmp_path}"):
        assert time.time() < deadline
        time.sleep(0.2)


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
    for spec in artifact["info"]["environments"].values():
        spec["id"] = "intruder:Env-v0"
    (tmp_path / "runs" / FOLDER).mkdir(parents=True)
    torch.save(artifact, tmp_path / "runs" / FOLDER / "actor.pt")
    with pytest.raises(SystemExit, match=r"cannot play in intruder:Env-v0 \(NameNotFound"):
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
    with pytest.raises(SystemExit, match=r"cannot play in intruder:Env-v0 \(NameNotFound"):
        run_here("srpo_actor.py", *flags, "--eval-workers", 1)
    assert not marker.exists() and "intruder" not in sys.modules


def test_bad_input_a_data_set_that_leaves_its_spaces_to_code(marker, data_root):
    crafted(data_root, "crafted/no-spaces-v0", spaces=False)
    with pytest.raises(SystemExit, match="it names no spaces"):
        run_here("srpo_critic.py", *TINY[2:], "--env", "crafted/no-spaces-v0")
    assert not marker.exists() and "intruder" not in sys.modules
    with pytest.raises((TypeError, AttributeError, gym.error.Error)):
        minari.load_dataset("crafted/no-spaces-v0")
    assert marker.exists()  # this is what Minari does by itself


def test_weights_and_biases_says_in_one_line_that_nobody_is_logged_in(trained, tmp_path):
    env = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "WANDB_API_KEY": "", "WANDB_MODE": "online"}
    done = run("srpo_critic.py", *TINY, "--steps", 5, "--track", check=False, **env)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: W&B cannot log: ")]


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
