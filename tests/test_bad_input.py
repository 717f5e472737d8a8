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
from minari.storage import get_dataset_path

VECTOR = gym.spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTION = gym.spaces.Box(-1, 1, (2,), np.float32)
IMAGE = gym.spaces.Box(0, 255, (64, 64, 3), np.uint8)


@pytest.fixture(scope="module", autouse=True)
def bad_data(data_root):
    obs, actions, rewards = np.zeros((4, 3), np.float32), np.zeros((3, 2), np.float32), np.zeros(3)
    images, nan, nan_action = np.zeros((4, *IMAGE.shape), np.uint8), obs.copy(), actions.copy()
    nan[1, 1] = nan_action[2, 0] = np.nan

    def save(name, episodes, observation_space=VECTOR, action_space=ACTION):
        create(f"bad/{name}-v0", episodes, observation_space=observation_space, action_space=action_space)

    def save_obs(name, space, obs):
        save(name, [episode(obs, actions, rewards)], observation_space=space)

    save("nan", [episode(nan, actions, rewards)])
    save("nan-action", [episode(obs, nan_action, rewards)])
    save("inf-reward", [episode(obs, actions, [0, np.inf, 0])])
    save("one-observation-too-few", [episode(obs[:2], actions, rewards)])
    save("one-step-without-its-end", [episode(obs[:1], actions[:1], rewards[:1])])
    save("two-rewards", [episode(obs, actions, np.zeros((3, 2)))])
    save("no-last-action", [episode(obs, actions[:2], rewards)])
    save("empty", [])
    save_obs("image", IMAGE, images)
    save_obs(
        "image-in-dict",
        gym.spaces.Dict({"x": gym.spaces.Dict({"y": IMAGE}), "z": VECTOR}),
        {"x": {"y": images}, "z": obs},
    )
    save_obs("image-in-tuple", gym.spaces.Tuple((VECTOR, IMAGE)), (obs, images))
    save_obs("large", gym.spaces.Box(0, 1, (4097,)), np.zeros((4, 4097), np.float32))
    save_obs("large-in-all", gym.spaces.Tuple((VECTOR, gym.spaces.Discrete(4094))), (obs, np.zeros(4, int)))
    for name, space, x in (
        ("discrete", gym.spaces.Discrete(3), np.zeros(3, int)),
        ("matrix", gym.spaces.Box(-1, 1, (2, 2)), np.zeros((3, 2, 2))),
        ("in-dict", gym.spaces.Dict({"x": ACTION}), {"x": actions}),
        ("unbounded", gym.spaces.Box(-np.inf, np.inf, (2,)), actions),
        ("almost-unbounded", gym.spaces.Box(-3e38, 3e38, (2,)), actions),
        ("of-a-million", gym.spaces.Box(-2e6, 1, (2,)), actions),
        ("half-bounded", gym.spaces.Box(np.float32([-1, 0]), np.float32([1, np.inf])), actions),
    ):
        buffer = episode(obs, np.zeros(3), rewards)
        save(f"actions-{name}", [buffer.__class__(**vars(buffer) | {"actions": x})], action_space=space)
    other, wider = gym.spaces.Box(-2, 2, (1,)), gym.spaces.Box(-9, 9, (4,))
    save("other", [episode(np.ones((4, 3)), np.zeros((3, 1)), rewards)], action_space=other)
    save("wider", [episode(np.ones((4, 4)), np.zeros((3, 1)), rewards)], wider, other)


IMAGES = "has observations of variable size or over 4096 numbers (images): not supported"
VALUES = "has missing or not finite values, or several rewards per step"
ACTIONS = "has actions that are not in a bounded one-dimensional Box: only these are supported"
DATA = {
    "nan": VALUES,
    "nan-action": VALUES,
    "inf-reward": VALUES,
    "one-observation-too-few": VALUES,
    "no-last-action": VALUES,
    "two-rewards": VALUES,
    "one-step-without-its-end": VALUES,
    "image": IMAGES,
    "image-in-dict": IMAGES,
    "image-in-tuple": IMAGES,
    "large": IMAGES,
    "large-in-all": IMAGES,
    "actions-discrete": ACTIONS,
    "actions-matrix": ACTIONS,
    "actions-in-dict": ACTIONS,
    "actions-unbounded": ACTIONS,
    "actions-half-bounded": ACTIONS,
    "actions-almost-unbounded": ACTIONS,
    "actions-of-a-million": ACTIONS,
    "empty": "no complete data set bad/empty-v0 (",
}
FLAGS = {
    "critic": [
        ("--steps 0", "--steps 0: must be positive"),
        ("--batch-size -1", "--batch-size -1: must be positive"),
        ("--num-seeds 0", "--num-seeds 0: must be positive"),
        ("--seed -1", "--seed -1: must be 0 or more"),
        ("--lr nan", "--lr nan: must be positive"),
        ("--log-every 0", "--log-every 0: must be positive"),
        ("--checkpoint-every 0", "--checkpoint-every 0: must be positive"),
        ("--expectile 0", "--expectile 0.0: must be positive"),
        ("--expectile 1.5", "must be at most 1"),
        ("--gamma 1.01", "must be at most 1"),
        ("--device cuda", "finds no CUDA device: use --device cpu"),
    ],
    "behavior": [("--steps -5", "--steps -5: must be positive"), ("--device cuda", "finds no CUDA device")],
    "actor": [
        ("--beta 0", "--beta 0.0: must be positive"),
        ("--beta 0.1 -0.5", "--beta -0.5: must be positive"),
        ("--t-range 0 1", "--t-range 0.0: must be positive"),
        ("--t-range 0.0001 0.5", "must be two times from 0.001 to 1"),
        ("--t-range 0.5 1.1", "must be two times from 0.001 to 1"),
        ("--t-range 0.5 0.4", "the smaller first"),
        ("--eval-every -1", "--eval-every -1: must be 0 or more"),
        ("--seed -1", "--seed -1: must be 0 or more"),
        ("--eval-workers 0", "--eval-workers 0: must be positive"),
        ("--eval-episodes 0", "--eval-episodes 0: must be positive"),
        ("--hidden-layers 0", "--hidden-layers 0: must be positive"),
        ("--device cuda", "finds no CUDA device"),
    ],
}


def on_disk():
    return [sorted(folder.rglob("*")) for folder in (Path(), get_dataset_path())]


def refused(message, script, *flags):
    before = on_disk()
    with pytest.raises(SystemExit) as e:
        run_here(script, *flags)
    assert isinstance(e.value.code, str) and "\n" not in e.value.code  # Python prints it and exits with status 1
    assert e.value.code.startswith("error: ") and message in e.value.code
    assert on_disk() == before


@pytest.mark.parametrize("name, message", DATA.items())
def test_bad_input_data(name, message):
    refused(message, "srpo_critic.py", "--env", f"bad/{name}-v0", *TINY[2:], "--steps", 1)


def test_bad_input_missing_data_names_the_command_and_the_folder(tmp_path_factory, monkeypatch):
    empty = tmp_path_factory.mktemp("empty")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(empty))
    for script in ("srpo_critic.py", "srpo_behavior.py"):
        id = "D4RL/antmaze/umaze-v1"
        message = f"run `minari download {id} --force`, or do so elsewhere and copy it to {empty / id}"
        refused(message, script, "--env", "antmaze-umaze")
        for task in ("hopper-medium-replay-v2", "walker2d-medium-v2", "antmaze-large-diverse-v2"):
            refused(f"run `python examples/import_d4rl.py {task}`", script, "--env", task)
    names = [
        "no/version",
        "no version",
        "hopper",
        "../elsewhere-v0",
        "hopper_medium",
        "ant-medium",
        "mujoco/hopper",
        "",
    ]
    for name in (*names, "hopper-medium-v0", "antmaze-umaze-v0", "v0", "a/-v0"):
        message = f"error: no task {name!r}: README lists D4RL's names, and Minari ids end in -v and a number"
        refused(message, "srpo_critic.py", "--env", name)
    refused("error: no task 'a-v0+b'", "srpo_behavior.py", "--env", "x", "--dataset", "a-v0+b")
    assert not list(empty.iterdir())


IMPORT, D4RL_KEYS = "examples/import_d4rl.py", ("observations", "actions", "rewards", "terminals", "timeouts")


def d4rl_file(name, rows=5, keys=D4RL_KEYS, **shapes):
    """A file with these keys, in their shapes or others; no shape is a group."""
    with h5py.File(name, "w") as f:
        for key in keys:
            shape = shapes.get(key, (rows, 2) if key in D4RL_KEYS[:2] else (rows,))
            f.create_group(key) if shape is None else f.create_dataset(key, data=np.zeros(shape))


@pytest.mark.parametrize(
    "keys, message",
    [
        (D4RL_KEYS[:-1], "x.hdf5 has no timeouts: give a file with observations, actions"),
        (D4RL_KEYS[:2], "x.hdf5 has no rewards, terminals, timeouts"),
        ((), "x.hdf5 has no observations"),
    ],
)
def test_bad_input_d4rl_file_without_its_keys(keys, message):
    d4rl_file("x.hdf5", keys=("other", *keys))
    refused(message, IMPORT, "x.hdf5", "--id", "mine/x-v0")


@pytest.mark.parametrize("rows", [0, 1])
def test_bad_input_d4rl_file_without_transitions(rows):
    d4rl_file("x.hdf5", rows)
    refused("x.hdf5 is empty", IMPORT, "x.hdf5", "--id", "mine/x-v0")


@pytest.mark.parametrize("key", D4RL_KEYS)
@pytest.mark.parametrize("shape", [(4, 2), (8, 2), (6, 2), (3, 2), (6, 2, 2), (6,), (4,), (8,), (), None])
def test_bad_input_d4rl_columns_of_other_shapes(key, shape):
    if shape == ((6, 2) if key in D4RL_KEYS[:2] else (6,)):
        pytest.skip("the right shape")
    d4rl_file("x.hdf5", 6, **{key: shape})
    message = "has columns of other shapes than D4RL's" if shape else "cannot be read as HDF5 ("
    refused(f"x.hdf5 {message}", IMPORT, "x.hdf5", "--id", "mine/x-v0")


def test_bad_input_d4rl_file_of_no_robot_or_another():
    for name in ("pen_human-v1", "hopper", "my_hopper_medium"):  # of which task?
        d4rl_file(f"{name}.hdf5")
        refused(f"{name}.hdf5 names no task of halfcheetah, hopper, walker2d or antmaze", IMPORT, f"{name}.hdf5")
    d4rl_file("hopper_medium.hdf5")
    other = ("--id", "D4RL/walker2d/medium-v2")
    refused("and the id D4RL/walker2d/medium-v2 name different robots", IMPORT, "hopper_medium.hdf5", *other)
    refused("has columns of other shapes than Hopper's", IMPORT, "hopper_medium.hdf5")
    refused("has columns of other shapes than Walker2d's", IMPORT, "pen_human-v1.hdf5", *other)


@pytest.mark.parametrize("id", ["x", "D4RL/pen/human", "../x-v0", "/x-v0", "a b-v0"])
def test_bad_input_d4rl_id_that_is_none(id):
    d4rl_file("x.hdf5")
    refused(f"--id {id}: must be like D4RL/hopper/medium-v2", IMPORT, "x.hdf5", "--id", id)


@pytest.mark.parametrize("name", ["file", "nothing", "folder", "half"])
def test_bad_input_d4rl_file_that_is_none(name):
    if name == "file":
        Path("x.hdf5").write_text("not HDF5")
    elif name == "folder":
        Path("x.hdf5").mkdir()
    elif name == "half":
        d4rl_file("x.hdf5")
        Path("x.hdf5").write_bytes(Path("x.hdf5").read_bytes()[:2000])
    message = "x.hdf5 is neither a file nor a task" if name == "nothing" else "x.hdf5 cannot be read as HDF5 ("
    refused(message, IMPORT, "x.hdf5")


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
    done = run("srpo_critic.py", "--env", "bad/nan-v0", check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and done.stderr.startswith("error: episode 0 of bad/nan-v0 has")


def test_bad_input_actor_before_the_other_stages(trained):
    missing = "is missing or unusable (FileNotFoundError(2, 'No such file or directory')): run the stage that writes it"
    refused(f"runs/test-pendulum-v0/critic.pt {missing}", "srpo_actor.py", *TINY)
    refused(f"runs/test-pendulum-v0/behavior.pt {missing}", "srpo_actor.py", *TINY, "--critic", trained / "critic.pt")


def test_bad_input_eval_before_actor():
    refused("runs/test-pendulum-v0/actor.pt is missing", "eval.py", "--env", "test/pendulum-v0")


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--workers 0", "--workers 0: must be 1 or more"),
        ("--episodes -1", "--episodes -1: must be 0 or more"),
        ("--first-episode -1", "--first-episode -1: must be 0 or more"),
        ("--sampler-steps 0", "--sampler-steps 0: must be 1 or more"),
        ("--candidates 8 0", "--candidates (8, 0): must be 1 or more"),
    ],
)
def test_bad_input_eval_flags(flags, message):
    refused(message, "eval.py", "--env", "test/pendulum-v0", *flags.split())


@pytest.mark.parametrize("flags", ["--candidates 8 0", "--sampler-steps 0", "--device cuda"])
def test_bad_input_latency_flags(flags, trained):
    if "cuda" in flags and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    message = "finds no CUDA device" if "cuda" in flags else "must be 1 or more"
    refused(message, "examples/latency.py", "--run", trained, *flags.split())


def test_bad_input_environment_that_cannot_be_made(trained):
    artifact = torch.load(trained / "actor.pt", weights_only=True)
    Path("runs/cart").mkdir(parents=True)
    for id, reason in (
        ("CartPole-v1", "TypeError("),
        ("NoSuchEnv-v1", 'NameNotFound("Environment `NoSuchEnv`'),
    ):
        environment = {"id": id, "kwargs": {"no": 1}, "max_episode_steps": 5, "wrappers": []}
        artifact["info"]["environments"] = {"data": environment, "fixed": environment}
        torch.save(artifact, "runs/cart/actor.pt")
        refused(f"cannot play in {id} ({reason}", "eval.py", "--env", "cart")


def test_bad_input_data_without_an_environment(trained):
    artifact = torch.load(trained / "actor.pt", weights_only=True)
    Path("runs/none").mkdir(parents=True)
    artifact["info"] |= {"environments": None}
    torch.save(artifact, "runs/none/actor.pt")
    refused("the data set of none has no environment to evaluate in", "eval.py", "--env", "none")


def actor(trained, *flags):
    return ("srpo_actor.py", *TINY, "--critic", trained / "critic.pt", "--behavior", trained / "behavior.pt", *flags)


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--env", "bad/other-v0"), "critic.pt has env = test/pendulum-v0, not bad/other-v0: run srpo_critic.py"),
        (("--num-seeds", 3), "share seeds [0, 1], not [0, 1, 2]: train both on those"),
        (("--seed", 7), "share seeds [0, 1], not [7]: train both on those"),
    ],
)
def test_bad_input_artifacts_of_something_else(flags, message, trained):
    refused(message, *actor(trained, *flags))


def test_bad_input_critic_in_the_place_of_the_behavior_model(trained):
    twice = ("--critic", trained / "critic.pt", "--behavior", trained / "critic.pt")
    refused("critic.pt has stage = critic, not behavior: run srpo_behavior.py", "srpo_actor.py", *TINY, *twice)


def test_bad_input_checkpoint_in_the_place_of_an_artifact(trained):
    """It would be an unfinished network."""
    for stage in ("critic", "behavior"):
        artifact = torch.load(trained / f"{stage}.pt", weights_only=True)
        torch.save(artifact | {"optimizer": {}, "step": 10}, f"{stage}.ckpt")
        message = f"{stage}.ckpt has optimizer = {{}}, not None: run srpo_{stage}.py again"
        refused(message, *actor(trained, f"--{stage}", f"{stage}.ckpt"))


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
    refused(f"{name} is missing or unusable (", script, *flags)


@pytest.mark.parametrize(
    "content, message",
    [
        ({"stage": "critic", "format": 4}, "has format = 4, not 5: run srpo_critic.py"),
        ({"weights": {}}, "has stage = None, not critic: run srpo_critic.py"),
    ],
)
def test_bad_input_artifact_of_another_format(content, message):
    Path("runs/test-pendulum-v0").mkdir(parents=True)
    torch.save(content, "runs/test-pendulum-v0/critic.pt")
    refused(message, "srpo_actor.py", *TINY)
    torch.save(content, "runs/test-pendulum-v0/actor.pt")
    refused("is no actor artifact of this version: run srpo_actor.py", "eval.py", "--env", "test/pendulum-v0")
