"""Wrong input: exit status not 0, one line that names cause and remedy, no traceback, nothing new on disk."""

import pickle
import zipfile
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import TINY, create, episode, run, run_here

VECTOR = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTION = gym.spaces.Box(-1, 1, (2,), np.float32)
IMAGE = gym.spaces.Box(0, 255, (8, 8, 3), np.uint8)


@pytest.fixture(scope="module", autouse=True)
def bad_data(data_root):
    obs, actions, rewards = np.zeros((4, 3), np.float32), np.zeros((3, 2), np.float32), np.zeros(3)
    nan = obs.copy()
    nan[1, 1] = np.nan

    def save(name, episodes, observation_space=VECTOR, action_space=ACTION):
        create(f"bad/{name}-v0", episodes, observation_space=observation_space, action_space=action_space)

    save("nan", [episode(nan, actions, rewards)])
    save("inf-reward", [episode(obs, actions, [0, np.inf, 0])])
    save("image", [episode(np.zeros((4, 8, 8, 3), np.uint8), actions, rewards)], IMAGE)
    save(
        "image-in-dict",
        [episode({"x": np.zeros((4, 8, 8, 3), np.uint8)}, actions, rewards)],
        gym.spaces.Dict({"x": IMAGE}),
    )
    save("discrete", [episode(obs, np.zeros(3, int), rewards)], action_space=gym.spaces.Discrete(3))
    save("unbounded", [episode(obs, actions, rewards)], action_space=gym.spaces.Box(-np.inf, np.inf, (2,), np.float32))
    save("empty", [])
    save(
        "other",
        [episode(np.ones((4, 3)), np.zeros((3, 1)), rewards)],
        action_space=gym.spaces.Box(-2, 2, (1,), np.float32),
    )
    save(
        "wider",
        [episode(np.ones((4, 4)), np.zeros((3, 1)), rewards)],
        gym.spaces.Box(-9, 9, (4,)),
        gym.spaces.Box(-2, 2, (1,)),
    )


DATA = {
    "hoper-medium": "did you mean hopper-medium",
    "bad/nam-v0": "run `minari download bad/nam-v0`, or copy it there, or did you mean bad/nan-v0",
    "zzz": "or did you mean a task of the paper?",
    "hopper-medium": "run `minari download mujoco/hopper/medium-v0`, or copy it there",  # there is none on this machine
    "hopper-expert": "run `minari download mujoco/hopper/expert-v0`, or copy it there",
    "walker2d-simple-v2": "run `minari download mujoco/walker2d/simple-v0`",
    "hopper-medium-expert": "run `minari download mujoco/hopper/medium-v0 && minari download mujoco/hopper/expert-v0`",
    "antmaze-large-play-v1": "or did you mean antmaze-large-play",
    "antmaze-large-play-v2": "run `minari download D4RL/antmaze/large-play-v1`",
    "hopper-medium-replay": "get D4RL's and name it in every stage, --dataset hopper_medium_replay-v2.hdf5",
    "no/such-set-v0": "minari download no/such-set-v0",
    "bad/nan-v0": "values in obs that are not finite",
    "bad/inf-reward-v0": "values in reward that are not finite",
    "bad/image-v0": "only vectors of real numbers",
    "bad/image-in-dict-v0": "only vectors of real numbers",
    "bad/discrete-v0": "only vectors of real numbers",
    "bad/unbounded-v0": "give its data set the bounds that a policy must keep",
    "bad/empty-v0": "is empty",
}
FLAGS = {
    "critic": [
        ("--steps 0", "--steps 0: must be positive"),
        ("--batch-size -1", "--batch-size -1: must be positive"),
        ("--num-seeds 0", "--num-seeds 0: must be positive"),
        ("--seed -1", "--seed -1: must be 0 or more"),
        ("--lr nan", "--lr nan: must be positive"),
        ("--log-every 0", "--log-every 0: must be positive"),
        ("--expectile 1.0", "--expectile must be below 1"),
        ("--expectile 0", "--expectile 0.0: must be positive"),
        ("--gamma 1.5", "--gamma at most 1"),
        ("--device cuda", "finds no CUDA device: use --device cpu"),
        ("--out-dir file/runs", "name another place with --out-dir"),
        ("--out-dir /proc", "name another place with --out-dir"),
    ],
    "behavior": [("--steps -5", "--steps -5: must be positive"), ("--device cuda", "finds no CUDA device")],
    "actor": [
        ("--beta 0", "--beta 0.0: must be positive"),
        ("--beta 0.1 -0.5", "--beta -0.5: must be positive"),
        ("--weight sigma", "must be sigma2, one, alpha_over_sigma or t=T"),
        ("--weight t=2", "must be sigma2, one, alpha_over_sigma or t=T"),
        ("--weight 0.5", "must be sigma2, one, alpha_over_sigma or t=T"),
        ("--weight t=", "must be sigma2, one, alpha_over_sigma or t=T"),
        ("--weight t=1e-9", "must be sigma2, one, alpha_over_sigma or t=T"),
        ("--weight t=0", "must be sigma2, one, alpha_over_sigma or t=T"),
        ("--eval-every -1", "--eval-every -1: must be 0 or more"),
        ("--eval-workers 0", "--eval-workers 0: must be positive"),
        ("--hidden-layers 0", "--hidden-layers 0: must be positive"),
    ],
}


def refused(message, script, *flags):
    Path("file").write_text("")
    before = sorted(Path().rglob("*"))
    with pytest.raises(SystemExit) as e:
        run_here(script, *flags)
    assert isinstance(e.value.code, str) and "\n" not in e.value.code  # Python prints it and exits with status 1
    assert e.value.code.startswith("error: ") and message in e.value.code
    assert sorted(Path().rglob("*")) == before


@pytest.mark.parametrize("env, message", DATA.items())
def test_bad_input_data(env, message):
    refused(message, "srpo_critic.py", "--env", env)


def test_bad_input_missing_data_says_where_to_put_them(data_root):
    refused(f"not found locally at {data_root / 'D4RL/antmaze/umaze-v1'}", "srpo_critic.py", "--env", "antmaze-umaze")


D4RL_KEYS = ("observations", "actions", "rewards", "terminals", "timeouts")


@pytest.mark.parametrize(
    "keys, message",
    [
        (D4RL_KEYS[:-1], "x.hdf5 has no timeouts: give a file like D4RL's, with observations, actions"),
        (D4RL_KEYS[:2], "x.hdf5 has no rewards, terminals, timeouts"),
        (
            (*D4RL_KEYS, "infos/goal"),
            "x.hdf5 has no goals in its observations: use Minari's set of the maze, no --dataset",
        ),
        ((), "x.hdf5 has no observations"),
    ],
)
def test_bad_input_d4rl_file_without_its_keys(keys, message):
    with h5py.File("x.hdf5", "w") as f:
        f["other"] = np.zeros(5)
        for key in keys:
            f[key] = np.zeros((5, 2)) if key in D4RL_KEYS[:2] else np.zeros(5)
    refused(message, "srpo_critic.py", "--env", "hopper-medium-replay", "--dataset", "x.hdf5")


@pytest.mark.parametrize("rows", [0, 1])
def test_bad_input_d4rl_file_without_transitions(rows):
    with h5py.File("x.hdf5", "w") as f:
        for key in D4RL_KEYS:
            f[key] = np.zeros((rows, 2)) if key in D4RL_KEYS[:2] else np.zeros(rows)
    refused("x.hdf5 is empty", "srpo_critic.py", "--env", "hopper-medium-replay", "--dataset", "x.hdf5")


@pytest.mark.parametrize("key", D4RL_KEYS)
@pytest.mark.parametrize("shape", [(4, 2), (8, 2), (6, 2), (6, 2, 2), (6,), (4,), (8,), None])
def test_bad_input_d4rl_columns_of_other_shapes(key, shape):
    if shape == ((6, 2) if key in D4RL_KEYS[:2] else (6,)):
        pytest.skip("the right shape")
    with h5py.File("x.hdf5", "w") as f:
        for name in D4RL_KEYS:
            f[name] = np.zeros((6, 2)) if name in D4RL_KEYS[:2] else np.zeros(6)
        del f[key]
        if shape:
            f[key] = np.zeros(shape)
        else:
            f.create_group(key)
    message = "has columns of other shapes than D4RL's" if shape else "cannot be read as HDF5 (TypeError)"
    refused(f"x.hdf5 {message}", "srpo_critic.py", "--env", "any", "--dataset", "x.hdf5")


@pytest.mark.parametrize(
    "env, file",
    [("halfcheetah-medium", "walker2d_x.hdf5"), ("antmaze-umaze", "hopper_x.hdf5"), ("hopper-mine", "walker2d.hdf5")],
)
def test_bad_input_d4rl_file_of_another_task(env, file):
    refused(f"{file} holds no data of {env}", "srpo_critic.py", "--env", env, "--dataset", file)


@pytest.mark.parametrize("name", ["file", "nothing", "folder"])
def test_bad_input_d4rl_file_that_is_none(name):
    if name == "file":
        Path("x.hdf5").write_text("not HDF5")
    elif name == "folder":
        Path("x.hdf5").mkdir()
    refused("x.hdf5 cannot be read as HDF5 (", "srpo_critic.py", "--env", "hopper-medium-replay", "--dataset", "x.hdf5")


@pytest.mark.parametrize("stage, flags, message", [(stage, *row) for stage, rows in FLAGS.items() for row in rows])
def test_bad_input_flags(stage, flags, message):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    refused(message, f"srpo_{stage}.py", *TINY, "--steps", 5, *flags.split())


@pytest.mark.parametrize("script", ["srpo_critic.py", "srpo_behavior.py", "srpo_actor.py", "eval.py"])
def test_bad_input_unknown_flag_gets_tyros_message(script, capsys, tmp_path):
    with pytest.raises(SystemExit) as e:
        run_here(script, "--env", "test/pendulum-v0", "--no-such-flag")
    assert e.value.code == 2 and "no-such-flag" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_bad_input_is_one_line_for_the_shell():
    done = run("srpo_critic.py", "--env", "hoper-medium", check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: ")


def test_bad_input_actor_before_critic():
    refused("run `python srpo_critic.py --env test/pendulum-v0` first", "srpo_actor.py", *TINY)


def test_bad_input_actor_before_behavior(trained):
    message = "run `python srpo_behavior.py --env test/pendulum-v0` first"
    refused(message, "srpo_actor.py", *TINY, "--critic", trained / "critic.pt")


def test_bad_input_eval_before_actor():
    refused("run `python srpo_actor.py --env test/pendulum-v0` first", "eval.py", "--env", "test/pendulum-v0")


def test_bad_input_eval_flags():
    refused("--workers 0: must be 1 or more", "eval.py", "--env", "test/pendulum-v0", "--workers", 0)


def test_bad_input_environment_of_another_robot(trained):
    artifact = torch.load(trained / "actor.pt", weights_only=True)
    for kwargs, message in (
        ({}, "has (4, 2) state and action dimensions, the data (3, 1)"),
        ({"no": 1}, "cannot make CartPole-v1"),
    ):
        environment = {"id": "CartPole-v1", "kwargs": kwargs, "max_episode_steps": 5}
        Path("runs/cart").mkdir(parents=True, exist_ok=True)
        torch.save(artifact | {"environments": {"data": environment, "fixed": environment}}, "runs/cart/actor.pt")
        refused(message, "eval.py", "--env", "cart")


def actor(trained, *flags):
    return ("srpo_actor.py", *TINY, "--critic", trained / "critic.pt", "--behavior", trained / "behavior.pt", *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--env", "bad/other-v0"), "trained with env = test/pendulum-v0"),
        (("--dataset", "bad/wider-v0"), "trained with state_dim = 3, the data now have 4"),
        (("--dataset", "bad/other-v0"), "trained with fingerprint"),
        (("--num-seeds", 3), "wanted are [0, 1, 2]"),
        (
            ("--seed", 7),
            "hold seeds {'critic': [0, 1], 'behavior': [0, 1]}, wanted are [7]: run `python srpo_critic.py",
        ),
    ],
)
def test_bad_input_artifacts_of_something_else(flags, message, trained):
    refused(message, *actor(trained, *flags))


def test_bad_input_critic_in_the_place_of_the_behavior_model(trained):
    refused(
        "holds stage critic",
        "srpo_actor.py",
        *TINY,
        "--critic",
        trained / "critic.pt",
        "--behavior",
        trained / "critic.pt",
    )


def damaged(kind, whole):
    """What may lie where an artifact should."""
    if kind == "truncated":
        return whole[: len(whole) // 2]
    if kind == "empty":
        return b""
    if kind == "text":
        return b"not an artifact\n"
    if kind == "pickle of something else":
        return pickle.dumps([1, 2, 3], protocol=2)
    with zipfile.ZipFile("other.zip", "w") as f:
        f.writestr("a", "b")
    return Path("other.zip").read_bytes()


@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "pickle of something else", "zip of something else"])
@pytest.mark.parametrize("script", ["srpo_actor.py", "eval.py"])
def test_bad_input_damaged_artifact(kind, script, trained):
    name = "critic.pt" if script == "srpo_actor.py" else "actor.pt"
    path = Path("runs/test-pendulum-v0", name)
    path.parent.mkdir(parents=True)
    path.write_bytes(damaged(kind, (trained / name).read_bytes()))
    flags = TINY if script == "srpo_actor.py" else ("--env", "test/pendulum-v0")
    refused("cannot be read, damaged or foreign", script, *flags)


def test_bad_input_artifact_of_another_format(trained):
    Path("runs/test-pendulum-v0").mkdir(parents=True)
    for content, message in (({"stage": "critic", "format": 1}, "format 1"), ({"weights": {}}, "format None")):
        torch.save(content, "runs/test-pendulum-v0/critic.pt")
        refused(message, "srpo_actor.py", *TINY)
