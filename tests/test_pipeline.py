"""The scripts as a user runs them: hand-over, resume, evaluation, logging."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, create, prepared, random_episodes, run, run_here

import eval as srpo_eval
import srpo_actor
import srpo_behavior
import srpo_critic

STAGES = ("critic", "behavior", "actor")
EXPECTED = {  # metric names
    "critic": {"losses/v_loss", "losses/q_loss", "values/v_mean", "values/q_mean", "values/q_max"},
    "behavior": {"losses/behavior_loss"},
    "actor": {"losses/actor_loss", "values/q_mean", "values/q_grad_norm"}
    | {"eval/score", "eval/return", "eval/episode_length"},  # and eval/success in mazes
}
EXPECTED = {stage: names | {"charts/SPS", "charts/learning_rate"} for stage, names in EXPECTED.items()}


def load(path):
    return torch.load(path, weights_only=True)


def weights(path):
    return load(path)["weights"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_end_to_end(tmp_path):
    """All stages and eval in processes of their own, nothing but --env and sizes given."""
    for stage in STAGES:
        extra = (
            ("--eval-every", 20, "--eval-episodes", 3, "--beta", 0.1, 0.5) if stage == "actor" else ("--num-seeds", 2)
        )
        out = run(f"srpo_{stage}.py", *TINY, "--steps", 40, *extra)
        assert "saved runs/test-pendulum-v0" in out.stdout
    done = run("eval.py", "--env", "test/pendulum-v0", "--episodes", 12)
    folder = tmp_path / "runs" / "test-pendulum-v0"

    result = json.loads((folder / "eval.json").read_text())
    assert [(p["seed"], p["beta"]) for p in result["policies"]] == [(0, 0.1), (0, 0.5), (1, 0.1), (1, 0.5)]
    assert all(p["score"] == pytest.approx(p["return"]) and p["episode_length"] == 40 for p in result["policies"])
    for row, beta in zip(result["summary"], (0.1, 0.5)):
        scores = [p["score"] for p in result["policies"] if p["beta"] == beta]
        assert (row["score_mean"], row["score_std"]) == (pytest.approx(np.mean(scores)), pytest.approx(np.std(scores)))
        assert f"beta {beta}: score {np.mean(scores):.1f} +- {np.std(scores):.1f}" in done.stdout

    logs = {stage: lines(folder / f"{stage}.jsonl") for stage in STAGES}
    assert all([line["step"] for line in log] == [10, 20, 30, 40] for log in logs.values())
    assert logs["critic"][0]["seed"] == [0, 1] and len(logs["critic"][0]["losses/v_loss"]) == 2
    assert logs["actor"][0]["beta"] == [0.1, 0.5, 0.1, 0.5]
    assert ["eval/score" in line for line in logs["actor"]] == [False, True, False, True]
    assert not list(folder.glob("*.ckpt*")) and not list(folder.glob("*.tmp"))


def test_the_main_parts_set_up_what_the_paper_says(trained):
    """What stands outside of functions: initial weights, optimizers, times, and the actor's frozen networks."""
    tiny = (*TINY, "--steps", 1, "--lr", 1e-9, "--out-dir")
    six = run_here("srpo_critic.py", *tiny, "six", "--num-seeds", 6)
    alone = run_here("srpo_critic.py", *tiny, "one", "--seed", 4)
    for name, x in alone["critic"].state_dict().items():
        torch.testing.assert_close(six["critic"].state_dict()[name].unflatten(0, (6, -1))[4], x, rtol=1e-5, atol=1e-6)
    assert type(six["optimizer"]) is torch.optim.Adam and len(six["seeds"]) == 6

    names = run_here("srpo_behavior.py", *tiny, "one", "--batch-size", 5000)
    assert type(names["optimizer"]) is torch.optim.AdamW and names["optimizer"].defaults["weight_decay"] == 0.01
    assert names["model"].training
    t = names["draw"]()[2]
    assert 0.001 <= t.min() < 0.005 and 0.995 < t.max() <= 1

    paths = ("--critic", trained / "critic.pt", "--behavior", trained / "behavior.pt", "--eval-every", 0)
    names = run_here("srpo_actor.py", *tiny, "one", *paths, "--batch-size", 5000, "--seed", 1, "--beta", 0.1, 0.2)
    assert type(names["optimizer"]) is torch.optim.Adam and not names["behavior"].training
    t = names["draw"]()[1]
    assert 0.02 <= t.min() < 0.03 and 0.97 < t.max() <= 0.98
    critic, behavior = weights(trained / "critic.pt"), weights(trained / "behavior.pt")
    for name, x in names["q_target"].state_dict().items():
        assert torch.equal(x, critic[f"q_target.{name}"][2:])  # seed 1's two heads
    for name, x in names["behavior"].state_dict().items():
        assert torch.equal(x, behavior[name][1:])
    initial = srpo_actor.mlp([3, 256, 256, 1], [torch.Generator().manual_seed(1)] * 1).state_dict()
    for name, x in initial.items():
        torch.testing.assert_close(names["policy"].state_dict()[name], x.repeat(2, 1, 1), rtol=1e-5, atol=1e-6)


def test_the_updates_bring_nothing_to_the_host(monkeypatch):
    """With every way from a tensor to a Python value blocked, which on CUDA would be a synchronisation."""
    generators = [torch.Generator()]
    nets = (
        srpo_critic.Critic(3, 1, generators),
        srpo_behavior.BehaviorModel(3, 1, generators),
        srpo_actor.mlp([3, 8, 1], generators),
    )
    frozen = srpo_actor.TwinQ(3, 1, generators), srpo_actor.BehaviorModel(3, 1, generators).eval()
    args = SimpleNamespace(gamma=0.9, expectile=0.7, tau=0.1, weight="one", baseline=True, q_grad_norm="rms")
    args.lr, args.steps, args.beta = 0.1, 10, [0.1]
    lr, beta, done = torch.tensor(0.1), torch.ones(1, 1, 1), torch.zeros(())
    adams = [torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr, fused=True) for net in nets]
    data = {"s": torch.zeros(9, 3), "a": torch.zeros(9, 1), "r": torch.zeros(9)}

    def draw(stage):
        s, a, r = srpo_critic.sample(data, 1, 8)
        t, eps = srpo_behavior.sample_noise(a.shape, 0.1, 0.9, "cpu")
        return {"critic": (s, a, r, s, r), "behavior": (s, a, t, eps), "actor": (s, t, eps)}[stage]

    updates = [
        srpo_critic.make_update(args, nets[0], adams[0], lambda: draw("critic"), torch.zeros(5, 1)),
        srpo_behavior.make_update(args, nets[1], adams[1], lambda: draw("behavior"), torch.zeros(1, 1)),
        srpo_actor.make_update(args, nets[2], *frozen, adams[2], beta, lambda: draw("actor"), torch.zeros(3, 1), done),
    ]

    def blocked(*args, **kwargs):
        raise AssertionError("a value was brought to the host")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"):
            patch.setattr(torch.Tensor, name, blocked)
        with pytest.raises(AssertionError, match="brought to the host"):
            torch.ones(1).item()
        for update in updates:
            update()
            update()
    assert done.item() == 2


def stage_flags(stage, trained):
    """Flags that train one stage for 60 steps with checkpoints; the actor reads the artifacts of another run."""
    flags = (*TINY, "--steps", 60, "--checkpoint-every", 7)
    if stage != "actor":
        return (*flags, "--num-seeds", 2)
    return (
        *flags,
        "--critic",
        trained / "critic.pt",
        "--behavior",
        trained / "behavior.pt",
        "--beta",
        0.1,
        0.5,
        "--eval-every",
        0,
    )


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_ends_as_uninterrupted(stage, trained, tmp_path):
    script, flags = f"srpo_{stage}.py", stage_flags(stage, trained)
    run_here(script, *flags, "--out-dir", "whole")
    whole, folder = tmp_path / "whole" / "test-pendulum-v0", tmp_path / "killed" / "test-pendulum-v0"

    process = subprocess.Popen(slowed(script, *flags, "--out-dir", "killed"), stderr=subprocess.DEVNULL)
    checkpoint = folder / f"{stage}.ckpt"
    while not (checkpoint.exists() and load(checkpoint)["step"] >= 14):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (folder / f"{stage}.pt").exists()

    run_here(script, *flags, "--out-dir", "killed", "--resume")
    assert_same_run(whole, folder, stage)
    assert len(lines(folder / f"{stage}.jsonl")) == 6
    assert not checkpoint.exists()


def assert_same_run(one, two, stage, steps=60):
    """The same artifact bit for bit, and the same log but for times."""
    assert same(weights(one / f"{stage}.pt"), weights(two / f"{stage}.pt"))
    logs = [
        [{k: v for k, v in line.items() if k not in ("seconds", "charts/SPS")} for line in lines(f / f"{stage}.jsonl")]
        for f in (one, two)
    ]
    assert logs[0] == logs[1] and logs[0][-1]["step"] == steps


def slowed(script, *flags):
    """The script's command with pauses between steps, so that it is killed before its end."""
    code = "import time, tqdm; old = tqdm.tqdm.update\n"
    code += "def update(self, n=1): time.sleep(0.5); return old(self, n)\ntqdm.tqdm.update = update"
    return prepared(code, script, *flags)


def test_resume_of_a_finished_run_does_nothing(trained, capsys):
    before = (trained / "critic.pt").stat().st_mtime_ns
    flags = (*TINY, "--steps", 20, "--num-seeds", 2, "--out-dir", trained.parent, "--resume")
    with pytest.raises(SystemExit) as e:
        run_here("srpo_critic.py", *flags)
    assert e.value.code == 0 and "finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="gamma = 0.99, not 0.5"):  # that would be another run
        run_here("srpo_critic.py", *flags, "--gamma", 0.5)
    assert (trained / "critic.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize("stage", STAGES)
def test_resume_takes_no_shorter_run_for_finished(stage, trained):
    flags = stage_flags(stage, trained)
    run_here(f"srpo_{stage}.py", *flags)
    with pytest.raises(SystemExit) as e:
        run_here(f"srpo_{stage}.py", *flags, "--steps", 1000, "--resume")
    assert e.value.code.startswith("error: ") and "not 1000" in e.value.code


def test_new_policies_take_over_no_scores(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "runs" / trained.name)
    (folder / "eval.json").write_text("of the old")
    run_here("srpo_actor.py", *TINY, "--steps", 2, "--eval-every", 0, "--beta", 0.1)
    (kept,) = folder.glob("eval*.json")
    assert kept.name != "eval.json" and kept.read_text() == "of the old"


def test_resume_takes_no_earlier_run_for_its_own(trained, tmp_path):
    """A new run that is killed before its first checkpoint, into a folder that holds a finished one."""
    folder = tmp_path / "runs" / "test-pendulum-v0"
    run_here("srpo_critic.py", *TINY, "--steps", 20)
    code = "import os, tqdm; tqdm.tqdm.update = lambda self, n: os._exit(9)"
    killed = prepared(code, "srpo_critic.py", *TINY, "--steps", 20)
    assert subprocess.run(killed, stderr=subprocess.DEVNULL).returncode == 9
    run_here("srpo_critic.py", *TINY, "--steps", 20, "--resume")
    assert len(list(folder.glob("critic*.pt"))) == 2

    paths = ("--behavior", trained / "behavior.pt", "--eval-every", 0, "--steps", 10)
    run_here("srpo_critic.py", *TINY, "--steps", 21, "--num-seeds", 2, "--run-name", "another")
    run_here("srpo_actor.py", *TINY, "--critic", trained / "critic.pt", *paths)
    with pytest.raises(SystemExit, match="other data or artifacts"):
        run_here("srpo_actor.py", *TINY, "--critic", "runs/another/critic.pt", *paths, "--resume")


def unfinished(script, *flags):
    """Train, and put a checkpoint of step 5 into the place of the artifact."""
    names = run_here(script, *flags)
    (names["folder"] / f"{names['STAGE']}.pt").unlink()
    net = names["policy"] if "policy" in names else names["critic"]
    names["save_checkpoint"](
        names["checkpoint"], names["args"], names["info"], 5, net, names["optimizer"], names["window"]
    )


def test_resume_refuses_other_arguments_and_data(tmp_path):
    unfinished("srpo_critic.py", *TINY, "--steps", 10)
    for flags, message in (
        (("--batch-size", 9), "batch_size = 8, not 9"),
        (("--seed", 3), "seed = 0, not 3"),
        (("--dataset", "test/pendulum-v0+test/pendulum-v0"), "dataset = None, not test/pendulum-v0"),
        (("--steps", 4), "is at step 5, past --steps 4"),
    ):
        with pytest.raises(SystemExit, match=message):
            run_here("srpo_critic.py", *TINY, "--steps", 10, *flags, "--resume")
    run_here("srpo_critic.py", *TINY, "--steps", 12, "--wandb-entity", "team", "--resume")  # more steps are fine


def test_resume_refuses_other_frozen_networks(trained, tmp_path):
    paths = ("--behavior", trained / "behavior.pt", "--eval-every", 0, "--steps", 10)
    run_here("srpo_critic.py", *TINY, "--steps", 21, "--num-seeds", 2, "--run-name", "another")
    unfinished("srpo_actor.py", *TINY, "--critic", trained / "critic.pt", *paths)
    with pytest.raises(SystemExit, match="other data or artifacts"):
        run_here("srpo_actor.py", *TINY, "--critic", "runs/another/critic.pt", *paths, "--resume")
    run_here("srpo_actor.py", *TINY, "--critic", trained / "critic.pt", *paths, "--resume")


def test_nothing_finished_or_unfinished_is_overwritten(tmp_path, capsys):
    folder = tmp_path / "runs" / "test-pendulum-v0"
    run_here("srpo_critic.py", *TINY, "--steps", 10)
    first, log = weights(folder / "critic.pt"), (folder / "critic.jsonl").read_text()
    (folder / "critic.ckpt").write_text("of a run that was killed")
    run_here("srpo_critic.py", *TINY, "--steps", 10, "--seed", 1)
    (kept,), (kept_log,), (kept_checkpoint,) = (list(folder.glob(f"critic-*.{s}")) for s in ("pt", "jsonl", "ckpt"))
    assert same(weights(kept), first) and not same(weights(folder / "critic.pt"), first)
    assert kept_log.read_text() == log and kept_checkpoint.read_text() == "of a run that was killed"
    out = capsys.readouterr().out
    assert all(path.name in out for path in (kept, kept_log, kept_checkpoint))


def test_evaluating_changes_no_bit_of_the_weights(trained, tmp_path):
    paths = ("--critic", trained / "critic.pt", "--behavior", trained / "behavior.pt")
    for every in (0, 5):
        run(
            "srpo_actor.py",
            *TINY,
            "--steps",
            20,
            *paths,
            "--eval-every",
            every,
            "--eval-episodes",
            2,
            "--out-dir",
            str(every),
        )
    assert same(*(weights(tmp_path / str(every) / "test-pendulum-v0" / "actor.pt") for every in (0, 5)))


def hopper_file(path):
    """A D4RL file: 30 random steps of Hopper-v5, six time-outs."""
    (e,) = random_episodes(gym.make("Hopper-v5", terminate_when_unhealthy=False), 1, 30)
    with h5py.File(path, "w") as f:
        f["observations"], f["actions"], f["rewards"] = e.observations[:-1], e.actions, e.rewards
        f["terminals"], f["timeouts"] = np.zeros(30, bool), np.arange(30) % 5 == 4
    return path


def ant_set(id):
    """Ten random steps twice, with an evaluation environment as Minari's sets name one; told apart by its rewards."""
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    goals = {"continuing_task": True, "reset_target": False, "max_episode_steps": 10}
    env = gym.make("AntMaze_Medium-v4", **goals)
    corridor = [[1, 1, 1, 1, 1], [1, "r", 0, "g", 1], [1, 1, 1, 1, 1]]
    eval_env = gym.make("AntMaze_Medium-v4", maze_map=corridor, reward_type="dense", **goals)
    create(id, random_episodes(env, 2, 10), env=env, eval_env=eval_env)


@pytest.mark.parametrize("kind", ["locomotion by D4RL's file", "AntMaze by a task's name"])
def test_every_kind_of_data_goes_through_all_stages(kind, tmp_path):
    small = ("--batch-size", 4, "--log-every", 5, "--steps", 5)
    if kind.startswith("AntMaze"):
        ant_set("D4RL/antmaze/medium-play-v1")
        env, data, state_dim, size = "antmaze-medium-play", (), 31, 20
        expected = {"score": 0.0, "success": 0.0, "episode_length": 10.0}
        numbers = {"expectile": 0.9}, {}, {"beta": (0.08,), "hidden_layers": 4, "q_grad_norm": "rms"}
    else:
        env, data, state_dim, size = "hopper-medium-replay", ("--dataset", hopper_file(tmp_path / "x.hdf5")), 11, 24
        expected, numbers = {}, ({"expectile": 0.7}, {}, {"beta": (0.2,), "hidden_layers": 2, "q_grad_norm": "none"})
    for stage, found in zip(STAGES, numbers):
        extra = ("--eval-every", 5, "--eval-episodes", 2, "--eval-env", "data") if stage == "actor" else ()
        start = run if extra else run_here  # evaluation needs a process that its workers can import
        start(f"srpo_{stage}.py", "--env", f"{env}-v2", *data, *small, *extra)  # -v2: as D4RL calls them
        artifact = load(tmp_path / "runs" / env / f"{stage}.pt")
        assert (artifact["state_dim"], artifact["fingerprint"][0]) == (state_dim, size)
        assert found.items() <= artifact["args"].items()
    returns = {}
    for where, flag in (("fixed", ("--eval-env", "fixed")), ("data", ())):  # as the actor had it
        done = run("eval.py", "--env", f"{env}-v2", "--episodes", 3, "--workers", 1, *flag)
        assert done.stderr == ""
        result = json.loads((tmp_path / "runs" / env / "eval.json").read_text())
        assert result["eval_env"] == where and expected.items() <= result["policies"][0].items()
        returns[where] = result["policies"][0]["return"]
    if kind.startswith("AntMaze"):
        assert returns["fixed"] > returns["data"] == 0  # dense rewards, and sparse ones
    else:
        assert returns["fixed"] == returns["data"] != 0


def test_scores_do_not_depend_on_the_number_of_workers(trained):
    artifact = load(trained / "actor.pt")
    weights, results = artifact.pop("weights"), []
    policies = [srpo_eval.policy_weights(weights, r) for r in range(2)]
    for workers in (1, 2):
        with srpo_eval.start_workers(workers, signal.SIG_DFL) as pool:
            environment = artifact["environments"]["fixed"]
            evaluate = partial(srpo_eval.evaluate, pool, srpo_eval.make_act, policies, artifact, environment)
            results.append(evaluate(range(25)))  # three chunks
    assert all(np.array_equal(results[0][name], results[1][name]) for name in results[0])
    assert results[0]["eval/return"].shape == (2, 25) and results[0]["eval/return"].std() > 0


def test_environments_are_made_without_a_word(capfd, tmp_path):
    """MuJoCo's notices come from C, and leave a file; AntMaze's from Gymnasium. Later warnings are heard again."""
    with warnings.catch_warnings(action="error"):
        for id in ("HalfCheetah-v5", "AntMaze_UMaze-v4"):
            env = srpo_eval.make_env({"id": id, "kwargs": {}, "max_episode_steps": 5})
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    env.reset()
    env.unwrapped.data.qpos[:] = 1e30
    env.step(env.action_space.sample())
    assert "WARNING" in capfd.readouterr().err


def test_rollout_against_a_plain_loop(trained):
    artifact, act = load(trained / "actor.pt"), srpo_eval.load_policy(trained / "actor.pt", replica=1)
    result = srpo_eval.rollout(act, lambda: srpo_eval.make_env(artifact["environments"]["fixed"]), [3, 4])
    for row, seed in zip(result, (3, 4)):
        env = gym.make("Pendulum-v1", max_episode_steps=40)
        obs, total, length, done = env.reset(seed=seed)[0], 0.0, 0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(act(obs))
            total, length, done = total + reward, length + 1, terminated or truncated
        assert row.tolist() == [pytest.approx(total, rel=1e-4), 0, length]


def test_eval_and_training_play_different_episodes(trained, monkeypatch):
    played = []
    for script in ("eval.py", "srpo_actor.py"):
        (seeds,) = re.findall(r"range\([^()]*episodes\)", (ROOT / script).read_text())
        played.append(set(eval(seeds, {"args": Everything(100)})))
    assert len(played[0]) == len(played[1]) == 100 and not played[0] & played[1]


class Everything:
    """Arguments that all have one value."""

    def __init__(self, value):
        self.value = value

    def __getattr__(self, name):
        return self.value


def test_dictionaries_that_are_no_mazes(data_root):
    """Vectors in a dictionary, in an environment that has no goal."""
    gym.register("Dictionary-v0", entry_point=Dictionary, max_episode_steps=5)
    environment = {"id": "Dictionary-v0", "kwargs": {}, "max_episode_steps": 5}
    result = srpo_eval.rollout(lambda obs: obs[:, :1], lambda: srpo_eval.make_env(environment), [0, 1])
    assert result.tolist() == [[15.0, 0, 5]] * 2  # the sum of 1, ..., 5


class Dictionary(gym.Env):
    observation_space = gym.spaces.Dict({"b": gym.spaces.Box(0, 9, (1,)), "a": gym.spaces.Box(0, 9, (1,))})
    action_space = gym.spaces.Box(0, 9, (1,))

    def reset(self, seed=None, options=None):
        self.t = 1
        return {"b": np.zeros(1), "a": np.array([self.t])}, {}

    def step(self, action):
        self.t += 1
        return {"b": np.zeros(1), "a": np.array([self.t])}, float(action[0]), False, False, {}


def test_maze_episodes_end_at_success_and_score_it():
    """A policy of constant torque, in a corridor that leads to the goal or away from it."""
    maze = [[1, 1, 1, 1, 1], [1, "r", 0, "g", 1], [1, 1, 1, 1, 1]]
    environment = {
        "id": "PointMaze_UMaze-v3",
        "kwargs": {"maze_map": maze, "continuing_task": True, "reset_target": False},
        "max_episode_steps": 100,
    }
    info = {"maze": True, "reference": (0.0, 1.0), "action_low": [-1.0, -1.0], "action_high": [1.0, 1.0]}
    policies = [[(np.zeros((8, 2), np.float32), np.float32([x, 0]))] for x in (9, -9)]
    with srpo_eval.start_workers(1, signal.SIG_DFL) as pool:
        result = srpo_eval.evaluate(pool, srpo_eval.make_act, policies, info, environment, range(3))
    assert result["eval/score"].tolist() == [[100] * 3, [0] * 3]
    assert (result["eval/episode_length"][0] < 100).all() and (result["eval/episode_length"][1] == 100).all()
    assert (result["eval/return"][0] == 1).all()  # the episode ended at the first reward


def test_load_policy_in_three_lines_equals_the_trained_network(trained):
    from eval import load_policy

    act = load_policy(trained / "actor.pt")
    action = act(np.array([1.0, 0.0, 0.5]))

    artifact = load(trained / "actor.pt")
    generators = [torch.Generator() for _ in artifact["seeds"]]
    policy = srpo_actor.mlp([3, 256, 256, 1], generators).append(torch.nn.Tanh())
    policy.load_state_dict(artifact["weights"])
    obs = torch.randn(4, 6, 3)
    ours = policy(obs)
    np.testing.assert_allclose(action, 2 * policy(torch.tensor([1, 0, 0.5]).expand(4, 1, 3))[0, 0].detach(), rtol=1e-5)
    for r in range(4):
        act = load_policy(trained / "actor.pt", replica=r)
        np.testing.assert_allclose(
            act(obs[r].numpy()), 2 * ours[r].detach(), rtol=1e-4, atol=1e-6
        )  # the bounds are -2, 2
    assert action.shape == (1,) and action.dtype == np.float32


@pytest.mark.parametrize("weight", ["t=0.02", "one", "alpha_over_sigma"])
def test_actor_variants_run(weight, trained, tmp_path):
    paths = (
        "--critic",
        trained / "critic.pt",
        "--behavior",
        trained / "behavior.pt",
        "--eval-every",
        0,
        "--num-seeds",
        1,
    )
    flags = ("--weight", weight, "--no-baseline", "--q-grad-norm", "l2", "--hidden-layers", 3)
    run_here("srpo_actor.py", *TINY, "--steps", 3, *paths, *flags)
    artifact = load(tmp_path / "runs" / "test-pendulum-v0" / "actor.pt")
    assert artifact["seeds"] == [0] and len(artifact["weights"]) == 8 and artifact["args"]["weight"] == weight


def wandb_records(path):
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run([wandb, "leet", "inspect", "--json", path], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_track_makes_one_wandb_run_per_replica(stage, trained, tmp_path):
    flags = [*TINY, "--steps", 20, "--num-seeds", 2]
    if stage == "actor":
        flags += ["--critic", trained / "critic.pt", "--behavior", trained / "behavior.pt"]
        flags += ["--eval-every", 10, "--eval-episodes", 2]
    run(f"srpo_{stage}.py", *flags, "--track", "--run-name", "tracked", WANDB_MODE="offline")
    log = lines(tmp_path / "runs" / "tracked" / f"{stage}.jsonl")
    metrics = {name for name in log[0] if "/" in name}
    assert metrics == EXPECTED[stage]

    seeds = set()
    for path in (tmp_path / "runs" / "tracked" / "wandb").glob("offline-run-*/*.wandb"):
        records = wandb_records(path)
        (about,) = [record["run"] for record in records if record["type"] == "run"]
        assert (about["run_group"], about["job_type"], about["project"]) == ("tracked", stage, "srpo")
        config = about["config"]["update"]
        assert config["batch_size"] == 8 and (stage != "actor" or config["beta"] == 0.05)
        seeds.add(config["seed"])
        history = [record["history"]["item"] for record in records if record["type"] == "history"]
        assert [item["_step"] for item in history] == [10, 20]
        for item, line in zip(history, log):
            for name in metrics:
                value = line[name][config["seed"]] if isinstance(line[name], list) else line[name]
                assert item[name] == pytest.approx(value)
    assert seeds == {0, 1}
