"""The scripts as a user runs them: hand-over, resume, evaluation, logging."""

import contextlib
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import warnings
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import TINY, command, create, episode, prepared, random_episodes, run, run_here
from gymnasium import spaces
from minari.serialization import serialize_space
from tqdm import tqdm

import eval as srpo_eval
import srpo_actor
import srpo_behavior
import srpo_critic

STAGES = ("critic", "behavior", "actor")
FOLDER = "test-pendulum-v0"
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


def paths(trained):
    """The flags with which the actor reads another run's artifacts."""
    return ("--critic", trained / "critic.pt", "--behavior", trained / "behavior.pt")


# ---- all stages


def test_end_to_end(tmp_path):
    """All stages and eval in processes of their own, nothing but --env and sizes given."""
    for stage in STAGES:
        extra = (
            ("--eval-every", 20, "--eval-episodes", 3, "--beta", 0.1, 0.5) if stage == "actor" else ("--num-seeds", 2)
        )
        out = run(f"srpo_{stage}.py", *TINY, "--steps", 40, *extra)
        assert "saved runs/test-pendulum-v0" in out.stdout
    done = run("eval.py", "--env", "test/pendulum-v0", "--episodes", 12)
    folder = tmp_path / "runs" / FOLDER

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


def test_the_actor_needs_no_data_set(tmp_path, tmp_path_factory):
    """Copied artifacts and an empty folder of data sets: it trains, is scored in training and by eval.py."""
    for stage in STAGES[:2]:
        run_here(f"srpo_{stage}.py", *TINY, "--steps", 20, "--num-seeds", 2, "--out-dir", "there")
    (tmp_path / "runs" / FOLDER).mkdir(parents=True)
    for stage in STAGES[:2]:
        shutil.copy(tmp_path / "there" / FOLDER / f"{stage}.pt", tmp_path / "runs" / FOLDER)
    nothing = {"MINARI_DATASETS_PATH": str(tmp_path_factory.mktemp("nothing"))}
    run("srpo_actor.py", *TINY, "--steps", 20, "--eval-episodes", 3, **nothing)
    run("eval.py", "--env", "test/pendulum-v0", "--episodes", 3, "--policy", "srpo", "behavior", **nothing)
    scores = json.loads((tmp_path / "runs" / FOLDER / "eval.json").read_text())["policies"]
    assert len(scores) == 4 and all(np.isfinite(row["score"]) for row in scores)
    assert not any(Path(nothing["MINARI_DATASETS_PATH"]).iterdir())


def test_the_finished_behavior_model_holds_its_states(tmp_path):
    """As it was trained on them, standardised; a checkpoint does not."""
    interrupted(15, "srpo_behavior.py", *TINY, "--steps", 20, "--checkpoint-every", 10)
    folder = tmp_path / "runs" / FOLDER
    assert "obs" not in load(folder / "behavior.ckpt")
    names = run_here("srpo_behavior.py", *TINY, "--steps", 20, "--checkpoint-every", 10, "--resume")
    obs = load(folder / "behavior.pt")["obs"]
    assert torch.equal(obs, names["data"][:, :3]) and obs.shape == (200, 3) and obs.dtype == torch.float32
    np.testing.assert_allclose(obs.std(dim=0, correction=0), 1, rtol=1e-4)
    assert (folder / "behavior.pt").stat().st_size < 8e6  # the model has 7 MB: no other column of the data is in it


def test_evaluations_come_at_the_first_log_line_after_each_interval_and_at_the_end(trained, tmp_path):
    flags = ("--steps", 45, "--eval-every", 15, "--eval-episodes", 1, "--eval-workers", 1, "--num-seeds", 1)
    run_here("srpo_actor.py", *TINY, *flags, *paths(trained))
    log = lines(tmp_path / "runs" / FOLDER / "actor.jsonl")
    assert [line["step"] for line in log] == [10, 20, 30, 40, 45]
    assert [line["step"] for line in log if "eval/score" in line] == [20, 30, 45]


def test_the_main_parts_set_up_what_the_paper_says(trained):
    """What stands outside of functions: initial weights, optimizers, times, and the actor's frozen networks."""
    tiny = (*TINY, "--steps", 1, "--lr", 1e-9, "--out-dir", "one")
    names = run_here("srpo_critic.py", *tiny, "--num-seeds", 3)
    assert type(names["optimizer"]) is torch.optim.Adam and names["about"]["seeds"] == [0, 1, 2]
    assert_initial(names["critic"], inputs={"q.0": 4, "q_target.0": 4, "v.0": 3})
    for name, x in names["critic"].q.state_dict().items():  # the targets begin as copies
        torch.testing.assert_close(names["critic"].q_target.state_dict()[name], x, rtol=1e-5, atol=1e-6)

    names = run_here("srpo_behavior.py", *tiny, "--batch-size", 5000)
    assert type(names["optimizer"]) is torch.optim.AdamW and names["optimizer"].defaults["weight_decay"] == 0.01
    assert names["model"].training and names["model"].predict == "eps" and names["model"].blocks[2][0].p == 0.1
    assert names["model"].W.std().item() == pytest.approx(30, rel=0.5)
    t = names["draw"]()[2]
    assert 0.001 <= t.min() < 0.005 and 0.995 < t.max() <= 1

    more = ("--eval-every", 0, "--batch-size", 5000, "--seed", 1, "--beta", 0.1, 0.2)
    names = run_here("srpo_actor.py", *tiny, *paths(trained), *more)
    assert type(names["optimizer"]) is torch.optim.Adam and not names["behavior"].training
    assert_initial(names["policy"], inputs={"0": 3})
    t = names["draw"]()[1]
    assert 0.02 <= t.min() < 0.03 and 0.97 < t.max() <= 0.98
    critic, behavior = weights(trained / "critic.pt"), weights(trained / "behavior.pt")
    for name, x in names["q_target"].state_dict().items():
        assert torch.equal(x, critic[f"q_target.{name}"][2:])  # seed 1's two heads
    for name, x in names["behavior"].state_dict().items():
        assert torch.equal(x, behavior[name][1:])


def assert_initial(network, inputs):
    """Every replica is different and fills the range of nn.Linear's initial weights; inputs: widths that are no 256."""
    for name, x in network.state_dict().items():
        bound = inputs.get(name.rpartition(".")[0], 256) ** -0.5
        assert x.abs().max() <= bound + 1e-6 and (x.numel() < 500 or x.abs().max() > 0.95 * bound), name
        assert len({tuple(replica.flatten().tolist()) for replica in x}) == len(x), name


def test_the_updates_bring_nothing_to_the_host(monkeypatch):
    """With every way from a tensor to a Python value blocked, which on CUDA would be a synchronisation."""
    nets = srpo_critic.Critic(3, 1, 1), srpo_behavior.BehaviorModel(3, 1, 1, "v"), srpo_actor.mlp([3, 8, 1], 1)
    frozen = srpo_actor.mlp([4, 8, 1], 2), srpo_actor.BehaviorModel(3, 1, 1, "v").eval()
    args = SimpleNamespace(
        compile=False, gamma=0.9, expectile=0.7, tau=0.1, weight="one", baseline=True, q_grad_norm="rms"
    )
    args.lr, args.steps, args.beta, args.lr_decay, args.amp = 0.1, 10, [0.1], True, False
    beta, rates = torch.ones(1, 1, 1), [torch.tensor(0.1) for _ in nets]
    adams = [
        torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=lr, fused=True)
        for net, lr in zip(nets, rates)
    ]
    s, a, r, t, eps = torch.zeros(1, 8, 3), torch.zeros(1, 8, 1), *torch.rand(3, 1, 8, 1)
    columns = s, a, r, s, r
    updates = [
        srpo_critic.make_update(args, nets[0], adams[0], lambda: columns, torch.zeros(5, 1), 0),
        srpo_behavior.make_update(args, nets[1], adams[1], lambda: (s, a, t, eps), torch.zeros(1, 1), 0),
        srpo_actor.make_update(args, nets[2], *frozen, adams[2], beta, lambda: (s, t, eps), torch.zeros(3, 1), 0),
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
    for adam in adams:  # the rate of the second step
        assert adam.param_groups[0]["lr"].item() == pytest.approx(0.1 * (1 + np.cos(np.pi / 10)) / 2)


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_bfloat16_changes_the_losses_by_little(predict, trained, tmp_path):
    """Within 2% of float32's in the first steps; what is saved is float32, and either kind serves the other stages."""
    folders, losses, kinds = tmp_path / "runs", {}, {"float32": "--no-amp", "bfloat16": "--amp"}
    few = (*TINY, "--log-every", 1, "--batch-size", 500)
    for kind, flag in kinds.items():
        run_here(
            "srpo_behavior.py", *few, "--steps", 6, "--num-seeds", 2, "--predict", predict, "--run-name", kind, flag
        )
        assert {x.dtype for x in weights(folders / kind / "behavior.pt").values()} == {torch.float32}
        losses[kind] = [line["losses/behavior_loss"] for line in lines(folders / kind / "behavior.jsonl")]
    assert losses["float32"] != losses["bfloat16"]
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.02)
    for model in kinds:
        paths, losses = ("--critic", trained / "critic.pt", "--behavior", folders / model / "behavior.pt"), {}
        for kind, flag in kinds.items():
            run_here(
                "srpo_actor.py", *few, "--steps", 4, "--eval-every", 0, "--run-name", f"{model}-{kind}", flag, *paths
            )
            folder = folders / f"{model}-{kind}"
            assert {x.dtype for x in weights(folder / "actor.pt").values()} == {torch.float32}
            losses[kind] = np.array([line["losses/actor_loss"] for line in lines(folder / "actor.jsonl")])
        assert not np.array_equal(losses["float32"], losses["bfloat16"])
        scale = np.abs(losses["float32"]).mean()  # the loss is near 0 at first
        np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.02, atol=0.02 * scale)


@pytest.mark.parametrize("predict", ["eps", "v"])
def test_weights_rounded_once_or_at_every_step_are_the_same(predict, trained, tmp_path, monkeypatch):
    """The actor's frozen behaviour model in bfloat16: its outputs, and all that the actor saves, bit for bit."""
    run_here("srpo_behavior.py", *TINY, "--steps", 5, "--num-seeds", 2, "--predict", predict, "--run-name", "b")
    source = tmp_path / "runs" / "b" / "behavior.pt"
    flags = (*TINY, "--log-every", 1, "--steps", 5, "--beta", 0.1, 0.5, "--eval-every", 0, "--amp")
    flags, outputs = (*flags, "--critic", trained / "critic.pt", "--behavior", source), []
    for name in ("once", "every"):
        if name == "every":
            monkeypatch.setattr(torch.nn.Module, "bfloat16", lambda self: self)  # leaves it to autocast
        model = run_here("srpo_actor.py", *flags, "--run-name", name)["behavior"]
        linear = [layer for layer in model.modules() if type(layer).__name__ == "Linear"]
        rounded = {id(x) for x in model.state_dict(keep_vars=True).values() if x.dtype == torch.bfloat16}
        assert len(linear) == 10
        assert rounded == ({id(x) for layer in linear for x in layer.parameters()} if name == "once" else set())
        torch.manual_seed(0)
        inputs = torch.randn(2, 64, 1), torch.randn(2, 64, 3), torch.rand(2, 64, 1)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            outputs.append(model(*inputs))
    assert torch.equal(*outputs)
    once, every = tmp_path / "runs" / "once", tmp_path / "runs" / "every"
    assert_same_run(once, every, "actor", steps=5)
    assert load(once / "actor.pt")["info"] == load(every / "actor.pt")["info"]  # with the checksums of its sources


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES[1:])
def test_a_compiled_run_in_bfloat16_is_trained_and_resumed(stage, trained, tmp_path):
    script, flags = f"srpo_{stage}.py", (*stage_flags(stage, trained), "--compile", "--amp")
    run_here(script, *flags, "--out-dir", "whole")
    killed(38, script, *flags, "--out-dir", "killed")
    run_here(script, *flags, "--out-dir", "killed", "--resume")
    assert_same_run(tmp_path / "whole" / FOLDER, tmp_path / "killed" / FOLDER, stage)


@pytest.mark.slow
def test_a_compiled_run_computes_the_same(tmp_path):
    for name, flag in ("eager", "--no-compile"), ("compiled", "--compile"):
        flags = (*TINY, "--log-every", 1, "--steps", 20, "--num-seeds", 2, "--run-name", name, flag)
        subprocess.run(
            prepared("import torch._inductor.config as c; c.fallback_random = True", "srpo_critic.py", *flags),
            check=True,
            capture_output=True,
        )
    eager, compiled = (lines(tmp_path / "runs" / name / "critic.jsonl") for name in ("eager", "compiled"))
    assert len(eager) == len(compiled) == 20
    for one, two in zip(eager, compiled):
        for name in EXPECTED["critic"] - {"charts/SPS"}:
            assert two[name] == pytest.approx(one[name], rel=1e-3, abs=1e-3), (one["step"], name)


# ---- interrupted runs


def stage_flags(stage, trained):
    """60 steps, log lines at each fifth, checkpoints at each tenth; the actor reads another run's artifacts."""
    flags = (*TINY, "--steps", 60, "--log-every", 5, "--checkpoint-every", 10)
    return (
        (*flags, *paths(trained), "--beta", 0.1, 0.5, "--eval-every", 0)
        if stage == "actor"
        else (
            *flags,
            "--num-seeds",
            2,
        )
    )


AT_STEP = """
import os, signal, tqdm
old = tqdm.tqdm.__iter__
def steps(self):
    for step in old(self):
        if step == {step}:
            os.kill(os.getpid(), signal.{signal})
        yield step
tqdm.tqdm.__iter__ = steps
"""


def killed(step, script, *flags, number="SIGKILL"):
    """The script in a process of its own that gets a signal before this step."""
    code = AT_STEP.format(step=step, signal=number)
    done = subprocess.run(prepared(code, script, *flags), capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.Signals[number], done.stderr


def interrupted(step, script, *flags):
    """The script within this process, as if Ctrl-C were pressed before this step."""
    old = tqdm.__iter__

    def steps(self):
        for i in old(self):
            if i == step:
                raise KeyboardInterrupt
            yield i

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tqdm, "__iter__", steps)
        run_here(script, *flags)


PAUSE = """
import time, tqdm
old = tqdm.tqdm.__iter__
def steps(self):
    for step in old(self):
        time.sleep({pause})
        yield step
tqdm.tqdm.__iter__ = steps
"""


def slowed(script, *flags, pause=0.1):
    """The script's command with pauses between steps, so that it is killed before its end."""
    return prepared(PAUSE.format(pause=pause), script, *flags)


def assert_same_run(one, two, stage, steps=60):
    """The same artifact bit for bit, and the same log but for times."""
    assert same(weights(one / f"{stage}.pt"), weights(two / f"{stage}.pt"))
    logs = [
        [{k: v for k, v in line.items() if k != "charts/SPS"} for line in lines(f / f"{stage}.jsonl")]
        for f in (one, two)
    ]
    assert logs[0] == logs[1] and logs[0][-1]["step"] == steps
    assert not list(two.glob("*.ckpt*"))


@pytest.mark.parametrize("stage, amp", [*((stage, False) for stage in STAGES), ("behavior", True), ("actor", True)])
def test_killed_and_resumed_ends_as_uninterrupted(stage, amp, trained, tmp_path):
    script, flags = f"srpo_{stage}.py", (*stage_flags(stage, trained), *(("--amp",) if amp else ()))
    flags += ("--lr-decay",) if stage != "actor" else ()  # the actor's always decreases
    run_here(script, *flags, "--out-dir", "whole")
    whole, folder = tmp_path / "whole" / FOLDER, tmp_path / "killed" / FOLDER
    rates = [line["charts/learning_rate"] for line in lines(whole / f"{stage}.jsonl")]
    np.testing.assert_allclose(rates, [3e-4 * np.cos(np.pi * (step - 1) / 120) ** 2 for step in range(5, 65, 5)], 1e-4)

    killed(38, script, *flags, "--out-dir", "killed")
    assert load(folder / f"{stage}.ckpt")["step"] == 30 and not (folder / f"{stage}.pt").exists()
    assert [line["step"] for line in lines(folder / f"{stage}.jsonl")] == list(range(5, 36, 5))
    run_here(script, *flags, "--out-dir", "killed", "--resume")
    assert_same_run(whole, folder, stage)


def test_checkpoints_are_written_after_log_lines(trained, tmp_path):
    """At the first one in each interval; a kill between them costs the steps since the last."""
    flags = (*TINY, "--steps", 60, "--log-every", 7, "--checkpoint-every", 20)
    for step, last in (21, None), (22, 21), (41, 21), (43, 42):
        shutil.rmtree(tmp_path / "runs", ignore_errors=True)
        interrupted(step, "srpo_behavior.py", *flags)
        path = tmp_path / "runs" / FOLDER / "behavior.ckpt"
        assert (load(path)["step"] if path.exists() else None) == last


def test_resume_of_a_finished_run_does_nothing(trained, capsys):
    before = (trained / "critic.pt").stat().st_mtime_ns
    flags = (*TINY, "--steps", 20, "--num-seeds", 2, "--out-dir", trained.parent, "--resume")
    with pytest.raises(SystemExit) as e:
        run_here("srpo_critic.py", *flags)
    assert not e.value.code and "finished" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="gamma = 0.99, not 0.5"):  # that would be another run
        run_here("srpo_critic.py", *flags, "--gamma", 0.5)
    assert (trained / "critic.pt").stat().st_mtime_ns == before


@pytest.mark.parametrize("stage", STAGES)
def test_resume_takes_no_shorter_run_for_finished(stage, trained, tmp_path):
    flags, path = (*stage_flags(stage, trained), "--steps", 10), tmp_path / "runs" / FOLDER / f"{stage}.pt"
    run_here(f"srpo_{stage}.py", *flags)
    before = path.read_bytes()
    with pytest.raises(SystemExit) as e:
        run_here(f"srpo_{stage}.py", *flags, "--steps", 1000, "--resume")
    assert e.value.code.startswith("error: ") and "steps = 10, not 1000" in e.value.code
    assert path.read_bytes() == before


def test_resume_refuses_other_arguments_and_data(data_root, tmp_path):
    env = gym.make("Pendulum-v1", max_episode_steps=40)
    create("test/grows-v0", random_episodes(env, 2, 40), env=env)
    flags = ("--env", "test/grows-v0", *TINY[2:], "--steps", 20, "--checkpoint-every", 5)
    interrupted(15, "srpo_critic.py", *flags)
    before = (tmp_path / "runs" / "test-grows-v0" / "critic.ckpt").read_bytes()
    for other, message in (
        (("--batch-size", 9), "batch_size = 8, not 9"),
        (("--seed", 3), "seed = 0, not 3"),
        (("--lr-decay",), "lr_decay = False, not True"),
        (("--no-normalize-obs",), "normalize_obs = None, not False"),
        (("--dataset", "test/grows-v0+test/grows-v0"), "dataset = None"),
        (("--steps", 30), "steps = 20, not 30"),
    ):
        with pytest.raises(SystemExit, match=message) as e:
            run_here("srpo_critic.py", *flags, *other, "--resume")
        assert e.value.code.startswith("error: ") and "\n" not in e.value.code
    shutil.rmtree(data_root / "test" / "grows-v0")
    create("test/grows-v0", random_episodes(env, 2, 40, seed=1), env=env)  # as many transitions, others
    with pytest.raises(SystemExit, match="--resume needs the same"):
        run_here("srpo_critic.py", *flags, "--resume")
    shutil.rmtree(data_root / "test" / "grows-v0")
    create("test/grows-v0", random_episodes(env, 2, 40), env=env)
    assert (tmp_path / "runs" / "test-grows-v0" / "critic.ckpt").read_bytes() == before
    run_here("srpo_critic.py", *flags, "--wandb-entity", "team", "--checkpoint-every", 3, "--resume")  # these may


def test_resume_refuses_other_frozen_networks(trained, tmp_path):
    flags = (*TINY, "--steps", 20, "--checkpoint-every", 5, "--eval-every", 0, "--behavior", trained / "behavior.pt")
    run_here("srpo_critic.py", *TINY, "--steps", 21, "--num-seeds", 2, "--run-name", "another")
    interrupted(15, "srpo_actor.py", *flags, "--critic", trained / "critic.pt")
    for finished in (False, True):
        with pytest.raises(SystemExit, match="sources = .*--resume needs the same"):
            run_here("srpo_actor.py", *flags, "--critic", "runs/another/critic.pt", "--resume")
        if not finished:  # the same networks under another path are fine
            shutil.copy(trained / "critic.pt", tmp_path / "copy.pt")
            run_here("srpo_actor.py", *flags, "--critic", "copy.pt", "--resume")
    assert (tmp_path / "runs" / FOLDER / "actor.pt").exists()


def test_new_policies_take_over_no_scores(trained, tmp_path, capsys):
    """Nor times nor ways; all are kept under names with their date."""
    folder = shutil.copytree(trained, tmp_path / "runs" / trained.name)
    old, results = weights(folder / "actor.pt"), ("eval.json", "latency.json", "trajectories.json")
    for name in results:
        (folder / name).write_text(f"{name} of the old")
    run_here("srpo_actor.py", *TINY, "--steps", 2, "--eval-every", 0, "--beta", 0.1)
    out = capsys.readouterr().out
    for name in results:
        (kept,) = folder.glob(f"{name[:-5]}*.json")
        assert kept.name != name and kept.read_text() == f"{name} of the old" and kept.name in out
    (kept,) = folder.glob("actor-*.pt")
    assert same(weights(kept), old) and kept.name in out and len(load(folder / "actor.pt")["betas"]) == 2
    assert same(weights(folder / "critic.pt"), weights(trained / "critic.pt"))  # the other stages' stay


def test_resume_takes_no_earlier_run_for_its_own(tmp_path):
    """A new run that is killed before its first checkpoint, into a folder that holds a finished one."""
    folder = tmp_path / "runs" / FOLDER
    run_here("srpo_critic.py", *TINY, "--steps", 20)
    before = weights(folder / "critic.pt")
    interrupted(5, "srpo_critic.py", *TINY, "--steps", 20, "--seed", 1)
    assert not (folder / "critic.pt").exists()
    run_here("srpo_critic.py", *TINY, "--steps", 20, "--seed", 1, "--resume")
    (kept,) = folder.glob("critic-*.pt")
    assert same(weights(kept), before) and not same(weights(folder / "critic.pt"), before)


def test_nothing_finished_or_unfinished_is_overwritten(tmp_path, capsys):
    folder = tmp_path / "runs" / FOLDER
    run_here("srpo_critic.py", *TINY, "--steps", 10)
    first, log = weights(folder / "critic.pt"), (folder / "critic.jsonl").read_text()
    (folder / "critic.ckpt").write_text("of a run that was killed")
    run_here("srpo_critic.py", *TINY, "--steps", 10, "--seed", 1)
    (kept,), (kept_log,), (kept_checkpoint,) = (list(folder.glob(f"critic-*.{s}")) for s in ("pt", "jsonl", "ckpt"))
    assert same(weights(kept), first) and not same(weights(folder / "critic.pt"), first)
    assert kept_log.read_text() == log and kept_checkpoint.read_text() == "of a run that was killed"
    out = capsys.readouterr().out
    assert all(path.name in out for path in (kept, kept_log, kept_checkpoint))


def test_runs_that_end_within_a_second_are_all_kept(tmp_path):
    folder, contents = tmp_path / "runs" / FOLDER, []
    for seed in range(4):
        run_here("srpo_critic.py", *TINY, "--steps", 1, "--seed", seed)
        contents.append((folder / "critic.pt").read_bytes())
    assert sorted(path.read_bytes() for path in folder.glob("critic*.pt")) == sorted(contents)


# ---- evaluation


@pytest.mark.parametrize("workers", [1, 2])
def test_evaluating_changes_no_bit_of_the_weights(workers, trained, tmp_path):
    for every in (0, 5):
        flags = ("--log-every", 5, "--steps", 20, "--eval-every", every, "--eval-episodes", 2, "--out-dir", every)
        run_here("srpo_actor.py", *TINY, *flags, *paths(trained), "--eval-workers", workers)
    assert same(*(weights(tmp_path / str(every) / FOLDER / "actor.pt") for every in (0, 5)))


def torch_policy(artifact, replica):
    """act(raw observations [B, S]) -> actions, by PyTorch alone."""
    state = list(artifact["weights"].values())
    layers = [(weight[replica].double(), bias[replica].double()) for weight, bias in zip(state[::2], state[1::2])]
    names = ("obs_mean", "obs_std", "action_low", "action_high")
    mean, std, low, high = (torch.tensor(artifact["info"][name]).double() for name in names)

    def act(obs):
        x = (torch.as_tensor(np.asarray(obs)).double() - mean) / std
        for weight, bias in layers[:-1]:
            x = torch.relu(x @ weight + bias)
        x = torch.tanh(x @ layers[-1][0] + layers[-1][1])
        return (low + (x + 1) / 2 * (high - low)).numpy()

    return act


def play(act, seeds, id="Pendulum-v1", steps=40):
    """Mean return of an episode per seed, in a plain loop."""
    returns = []
    for seed in seeds:
        env = gym.make(id, max_episode_steps=steps)
        obs, total, done = env.reset(seed=seed)[0], 0.0, False
        while not done:
            obs, reward, terminated, truncated, _ = env.step(act(obs[None])[0].astype(np.float32))
            total, done = total + reward, terminated or truncated
        returns.append(total)
    return np.mean(returns)


def test_scores_against_episodes_played_by_hand(trained, tmp_path):
    """In training and in eval.py, with observations that are standardised."""
    flags = ("--steps", 20, "--eval-every", 20, "--eval-episodes", 3, "--eval-workers", 1, "--beta", 0.1, 0.5)
    run_here("srpo_actor.py", *TINY, *flags, *paths(trained))
    run_here("eval.py", "--env", "test/pendulum-v0", "--episodes", 2, "--workers", 1)
    folder = tmp_path / "runs" / FOLDER
    artifact = load(folder / "actor.pt")
    episodes = [gym.spaces.flatten(e.observation_space, 0) for e in ()] or random_episodes(
        gym.make("Pendulum-v1", max_episode_steps=40), 5, 40
    )
    rows = np.concatenate([e.observations[:-1] for e in episodes])  # the data, made anew
    np.testing.assert_allclose(artifact["info"]["obs_mean"], rows.mean(axis=0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(artifact["info"]["obs_std"], rows.std(axis=0), rtol=1e-4)

    last, table = lines(folder / "actor.jsonl")[-1], json.loads((folder / "eval.json").read_text())["policies"]
    for r in range(4):
        act = torch_policy(artifact, r)
        assert last["eval/return"][r] == pytest.approx(play(act, range(3)), rel=1e-4)
        assert table[r]["return"] == pytest.approx(play(act, range(1_000_000, 1_000_002)), rel=1e-4)
        raw = torch_policy(artifact | {"info": artifact["info"] | {"obs_mean": [0.0] * 3, "obs_std": [1.0] * 3}}, r)
        assert table[r]["return"] != pytest.approx(play(raw, range(1_000_000, 1_000_002)), rel=1e-4)


def test_a_policy_acts_the_same_on_data_in_other_units(data_root, tmp_path):
    """Two sets of the same episodes, whose observations differ by a factor and an offset each."""
    scale, offset = np.array([1000, 0.01, 7]), np.array([5e3, -1, 0])
    episodes = random_episodes(gym.make("Pendulum-v1", max_episode_steps=40), 5, 40)
    actions = spaces.Box(-2, 2, (1,))
    for id, a, b in ("test/first-units-v0", 1, 0), ("test/other-units-v0", scale, offset):
        some = [episode(e.observations * a + b, e.actions, e.rewards) for e in episodes]
        space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
        create(id, some, observation_space=space, action_space=actions)
        for stage in STAGES:
            flags = ("--beta", 0.5) if stage == "actor" else ()
            run_here(f"srpo_{stage}.py", "--env", id, *TINY[2:], "--steps", 20, "--lr", 1e-3, *flags)
    one, two = (
        srpo_eval.load_policy(tmp_path / "runs" / name / "actor.pt")
        for name in ("test-first-units-v0", "test-other-units-v0")
    )
    obs = np.concatenate([e.observations for e in episodes]).astype(np.float64)
    assert one(obs).std() > 0.01  # the policy depends on them
    np.testing.assert_allclose(two(obs * scale + offset), one(obs), atol=0.02 * one(obs).std())
    np.testing.assert_allclose(two(obs[0] * scale + offset), one(obs)[0], atol=0.02 * one(obs).std())


def test_load_policy_names_what_is_missing(trained):
    for replica in (-1, 4):
        with pytest.raises(ValueError, match=f"actor.pt has 4 replicas: there is no replica {replica}"):
            srpo_eval.load_policy(trained / "actor.pt", replica)
    with pytest.raises(ValueError, match="^nothing.pt is missing or unusable"):
        srpo_eval.load_policy("nothing.pt")


def test_load_policy_takes_raw_observations_one_or_a_batch(data_root, tmp_path):
    """Of nested dictionaries with a discrete part too; against a forward pass on numbers put together by hand."""
    space = spaces.Dict(
        {
            "b": spaces.Dict({"y": spaces.Box(-9, 9, (2, 2)), "x": spaces.Discrete(3)}),
            "a": spaces.Box(-9, 9, (2,), np.float64),
        }
    )
    rng, episodes = np.random.default_rng(0), []
    for _ in range(3):
        b = {"y": rng.normal(3, 2, (11, 2, 2)).astype(np.float32), "x": rng.integers(3, size=11)}
        some = {"b": b, "a": rng.normal(-4, 1, (11, 2))}
        episodes.append(episode(some, rng.uniform(0, 10, (10, 2)).astype(np.float32), rng.normal(size=10)))
    create("test/nested-v0", episodes, observation_space=space, action_space=spaces.Box(0, 10, (2,)))
    for stage in STAGES:
        run_here(f"srpo_{stage}.py", "--env", "test/nested-v0", *TINY[2:], "--steps", 10)
    path = tmp_path / "runs" / "test-nested-v0" / "actor.pt"

    batch = {k: x[:7] if k == "a" else {n: y[:7] for n, y in x.items()} for k, x in some.items()}
    rows = np.concatenate([batch["a"], np.eye(3)[batch["b"]["x"]], batch["b"]["y"].reshape(7, 4)], axis=1)
    act, expected = srpo_eval.load_policy(path), torch_policy(load(path), 0)(rows)
    assert expected.std(axis=0).min() > 0 and np.abs(load(path)["info"]["obs_mean"]).max() > 2
    np.testing.assert_allclose(act(batch), expected, rtol=1e-4)
    one = {"a": batch["a"][3], "b": {"x": batch["b"]["x"][3], "y": batch["b"]["y"][3]}}
    np.testing.assert_allclose(act(one), expected[3], rtol=1e-4)
    assert act(one).shape == (2,) and act(batch).shape == (7, 2) and act(one).dtype == np.float32


def test_load_policy_in_three_lines_equals_the_trained_network(trained):
    from eval import load_policy

    act = load_policy(trained / "actor.pt")
    action = act(np.array([1.0, 0.0, 0.5]))

    artifact, obs = load(trained / "actor.pt"), np.random.default_rng(0).normal(size=(4, 6, 3))
    np.testing.assert_allclose(action, torch_policy(artifact, 0)([[1.0, 0.0, 0.5]])[0], rtol=1e-4, atol=1e-6)
    for r in range(4):
        ours = load_policy(trained / "actor.pt", replica=r)(obs[r])
        np.testing.assert_allclose(ours, torch_policy(artifact, r)(obs[r]), rtol=1e-4, atol=1e-6)
    assert action.shape == (1,) and action.dtype == np.float32


def test_no_rounding_carries_an_action_beyond_its_bounds():
    """Of a policy that is saturated, in bounds whose difference is not exact in float32."""
    rng = np.random.default_rng(0)
    low = rng.uniform(-1, 0, 200).astype(np.float32)
    high = rng.uniform(0, 1, 200).astype(np.float32)
    info = {"obs_mean": [0.0], "obs_std": [1.0], "action_low": low.tolist(), "action_high": high.tolist()}
    act = srpo_eval.make_act([np.full((1, 200), 99.0, np.float32), np.zeros((1, 200), np.float32)], info)
    for obs, bound in ([1.0], high), ([-1.0], low):
        np.testing.assert_allclose(act(obs), bound, atol=1e-6)
        assert (act(obs) <= high).all() and (act(obs) >= low).all()
    assert (low + (high - low) > high).any()  # what the formula alone would give


def ant_set(id):
    """Ten random steps twice, with an evaluation environment as Minari's sets name one; told apart by its rewards."""
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    goals = {"continuing_task": True, "reset_target": False, "max_episode_steps": 10}
    env = gym.make("AntMaze_Medium-v4", **goals)
    corridor = [[1, 1, 1, 1, 1], [1, "r", 0, "g", 1], [1, 1, 1, 1, 1]]
    eval_env = gym.make("AntMaze_Medium-v4", maze_map=corridor, reward_type="dense", **goals)
    create(id, random_episodes(env, 2, 10), env=env, eval_env=eval_env)


@pytest.mark.parametrize("kind", ["locomotion", "AntMaze"])
def test_tasks_of_the_paper_go_through_all_stages(kind, data_root, tmp_path):
    """By their names: the paper's numbers, observations as they are, D4RL's scores."""
    small = ("--batch-size", 4, "--log-every", 5, "--steps", 5)
    if kind == "AntMaze":
        ant_set("D4RL/antmaze/medium-play-v1")
        env, state_dim, size = "antmaze-medium-play", 31, 20
        expected = {"score": 0.0, "success": 0.0, "episode_length": 10.0}
        numbers = {"expectile": 0.9}, {}, {"beta": (0.08,), "hidden_layers": 4, "q_grad_norm": "rms"}
    else:
        hopper = gym.make("Hopper-v5", terminate_when_unhealthy=False, max_episode_steps=12)
        create("D4RL/hopper/medium-v2", random_episodes(hopper, 2, 12), env=hopper)
        env, state_dim, size = "hopper-medium-v2", 11, 24
        expected = {"episode_length": 12.0}
        numbers = {"expectile": 0.7}, {}, {"beta": (0.05,), "hidden_layers": 2, "q_grad_norm": "none"}
    folder = tmp_path / "runs" / env
    for stage, found in zip(STAGES, numbers):
        extra = ("--eval-every", 5, "--eval-episodes", 2, "--eval-env", "data", "--eval-workers", 1)
        run_here(f"srpo_{stage}.py", "--env", env, *small, *(extra if stage == "actor" else ()))
        artifact = load(folder / f"{stage}.pt")
        info = artifact["info"]
        assert (info["state_dim"], info["fingerprint"][0], artifact["format"]) == (state_dim, size, 5)
        assert found.items() <= artifact["args"].items()
        assert set(info["obs_mean"]) == {0} and set(info["obs_std"]) == {1}
    returns = {}
    for where, flag in (("fixed", ("--eval-env", "fixed")), ("data", ())):  # as the actor had it
        run_here("eval.py", "--env", env, "--episodes", 3, "--workers", 1, *flag)
        result = json.loads((folder / "eval.json").read_text())
        assert result["policies"][-1]["eval_env"] == where and expected.items() <= result["policies"][-1].items()
        returns[where] = result["policies"][-1]["return"]
    assert len(result["policies"]) == 2  # one for each environment
    if kind == "AntMaze":
        assert returns["fixed"] > returns["data"] == 0  # dense rewards, and sparse ones
        assert len(json.loads((folder / "trajectories.json").read_text())["ways"]) == 3
    else:
        assert returns["fixed"] == returns["data"] != 0
        assert result["policies"][-1]["score"] == pytest.approx(100 * (returns["data"] + 20.272305) / 3254.572305)


def test_normalize_obs_is_a_flag(tmp_path):
    run_here("srpo_critic.py", *TINY, "--steps", 1, "--no-normalize-obs")
    info = load(tmp_path / "runs" / FOLDER / "critic.pt")["info"]
    assert info["obs_mean"] == [0, 0, 0] and info["obs_std"] == [1, 1, 1]


def test_scores_do_not_depend_on_the_number_of_workers(trained):
    artifact = load(trained / "actor.pt")
    policies = [[x[r].numpy() for x in artifact.pop("weights").values()] for r in range(1)]
    policies.append([-x for x in policies[0]])
    info, environment = artifact["info"], artifact["info"]["environments"]["fixed"]
    one, two = (
        srpo_eval.evaluate(srpo_eval.make_act, policies, info, environment, range(25), n) for n in (1, 2)
    )  # three chunks
    assert one == two and one["eval/return"][0] != one["eval/return"][1]
    alone = srpo_eval.rollout(srpo_eval.make_act, policies[1], info, environment, range(25))  # as one chunk
    assert one["eval/return"][1] == pytest.approx(alone[:, 0].mean()) and len(set(alone[:, 0])) == 25


def test_environments_are_made_without_a_word(capfd, tmp_path):
    """Not even AntMaze's about its newer version, and MuJoCo leaves no file."""
    with warnings.catch_warnings(action="error"):
        for id, S, A in (("HalfCheetah-v5", 17, 6), ("AntMaze_UMaze-v4", 31, 8)):
            info = {"state_dim": S, "action_low": [-1.0] * A, "action_high": [1.0] * A}
            srpo_eval.make_env({"id": id, "kwargs": {}, "max_episode_steps": 5, "wrappers": []}, info)
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())


def test_eval_and_training_play_different_episodes(trained, monkeypatch, tmp_path):
    played, old = [], gym.make

    def make(*args, **kwargs):
        env = old(*args, **kwargs)
        reset = env.reset
        env.reset = lambda seed: played[-1].add(seed) or reset(seed=seed)
        return env

    monkeypatch.setattr(gym, "make", make)
    flags = ("--steps", 2, "--eval-every", 2, "--num-seeds", 1, "--eval-workers", 1, *paths(trained))
    for script, extra in (
        ("srpo_actor.py", (*TINY, *flags)),
        ("eval.py", ("--env", "test/pendulum-v0", "--workers", 1)),
    ):
        played.append(set())
        run_here(script, *extra)
    assert (len(played[0]), len(played[1])) == (20, 100) and not played[0] & played[1]


def test_dictionaries_that_are_no_mazes(data_root):
    """Vectors in a dictionary, in an environment that has no goal."""
    gym.register("Dictionary-v0", entry_point=Dictionary, max_episode_steps=5)
    environment = {"id": "Dictionary-v0", "kwargs": {}, "max_episode_steps": 5, "wrappers": []}
    info = {"observation_space": serialize_space(Dictionary.observation_space), "by_success": False}
    info |= {"state_dim": 2, "action_low": [0.0], "action_high": [9.0]}
    result = srpo_eval.rollout(lambda weights, info: lambda obs: obs[:, :1], None, info, environment, [0, 1])
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
    """A policy of constant force, in a corridor that leads to the goal or away from it."""
    maze = [[1, 1, 1, 1, 1], [1, "r", 0, "g", 1], [1, 1, 1, 1, 1]]
    kwargs = {"maze_map": maze, "continuing_task": True, "reset_target": False}
    environment = {"id": "PointMaze_UMaze-v3", "kwargs": kwargs, "max_episode_steps": 100, "wrappers": []}
    info = {"by_success": True, "reference": (0.0, 1.0), "action_low": [-1.0, -1.0], "action_high": [1.0, 1.0]}
    info |= {"obs_mean": [0.0] * 8, "obs_std": [1.0] * 8, "state_dim": 8}
    info |= {"observation_space": serialize_space(srpo_eval.make_env(environment, info).observation_space)}
    policies = [[np.zeros((8, 2), np.float32), np.float32([[x, 0]])] for x in (9, -9)]
    result = srpo_eval.evaluate(srpo_eval.make_act, policies, info, environment, range(3), 1)
    assert result["eval/score"] == [100, 0] and result["eval/success"] == [1, 0]
    assert result["eval/episode_length"][0] < 100 == result["eval/episode_length"][1]
    assert result["eval/return"] == [1, 0]  # the episode ended at the first reward


# ---- variants


def test_actor_and_eval_follow_what_the_behavior_model_predicts(trained, tmp_path):
    """Without a flag: a model of v = alpha eps - sigma a gives eps = sigma a_t + alpha v."""
    names = run_here("srpo_behavior.py", *TINY, "--steps", 5, "--predict", "v", "--lr-decay", "--no-dropout")
    assert not names["model"].training  # no dropout
    behavior = tmp_path / "runs" / FOLDER / "behavior.pt"
    assert load(behavior)["args"]["predict"] == "v"
    flags = ("--steps", 2, "--eval-every", 0, "--critic", trained / "critic.pt", "--seed", 0)
    names = run_here("srpo_actor.py", *TINY, *flags)
    raw = srpo_behavior.BehaviorModel(3, 1, 1, "eps").eval()
    raw.load_state_dict(weights(behavior))
    a_t, s, t = torch.randn(1, 9, 1), torch.randn(1, 9, 3), torch.rand(1, 9, 1)
    sigma2 = 1 - torch.exp(-(19.9 * t**2 / 2 + 0.1 * t))
    eps = sigma2.sqrt() * a_t + (1 - sigma2).sqrt() * raw(a_t, s, t)
    torch.testing.assert_close(names["behavior"](a_t, s, t), eps, rtol=1e-4, atol=1e-4)

    run_here("eval.py", "--env", "test/pendulum-v0", "--policy", "behavior", "--episodes", 2, "--workers", 1)
    (row,) = json.loads((tmp_path / "runs" / FOLDER / "eval.json").read_text())["policies"]
    info = load(tmp_path / "runs" / FOLDER / "actor.pt")["info"]
    mean, std = (np.float32(info[name]) for name in ("obs_mean", "obs_std"))

    def act(predict, obs, noise):
        def eps_psi(a_t, s, t):
            alpha, sigma = srpo_eval.alpha_sigma(t)
            return raw(a_t, s, t) if predict == "eps" else sigma * a_t + alpha * raw(a_t, s, t)

        s = torch.from_numpy((obs - mean) / std)[None]
        with torch.no_grad():
            return 2 * srpo_eval.sample_actions(eps_psi, s, noise, 15).clamp(-1, 1)[0].numpy()

    returns = {}
    for predict in ("v", "eps"):
        torch.manual_seed(1_000_000)
        envs = [gym.make("Pendulum-v1", max_episode_steps=40) for _ in range(2)]
        obs, total = [env.reset(seed=1_000_000 + i)[0] for i, env in enumerate(envs)], 0
        for _ in range(40):
            steps = [env.step(a) for env, a in zip(envs, act(predict, np.stack(obs), torch.randn(1, 2, 1)))]
            obs, total = [step[0] for step in steps], total + np.mean([step[1] for step in steps])
        returns[predict] = total
    assert row["return"] == pytest.approx(returns["v"], rel=1e-3)
    assert row["return"] != pytest.approx(returns["eps"], rel=1e-3)


@pytest.mark.parametrize("weight", ["one", "alpha_over_sigma"])
def test_actor_variants_run(weight, trained, tmp_path):
    flags = ("--weight", weight, "--no-baseline", "--q-grad-norm", "l2", "--hidden-layers", 3)
    run_here("srpo_actor.py", *TINY, "--steps", 3, *paths(trained), "--eval-every", 0, "--num-seeds", 1, *flags)
    artifact = load(tmp_path / "runs" / FOLDER / "actor.pt")
    assert artifact["seeds"] == [0] and len(artifact["weights"]) == 8 and artifact["args"]["weight"] == weight


# ---- what is printed

FAST_CLOCK = """
import time
real, begin = time.time, time.time()
time.time = lambda: begin + 60 * (real() - begin)  # a minute in a second
"""


@pytest.mark.parametrize("stage", STAGES)
def test_into_a_file_a_plain_line_per_half_minute(stage, trained, tmp_path):
    """And none per step: no carriage return, few lines, with the values of the log."""
    code = FAST_CLOCK + PAUSE.format(pause=0.02)
    flags = (*TINY, "--steps", 100, *(paths(trained) if stage == "actor" else ()))
    flags += ("--eval-every", 50, "--eval-episodes", 1, "--eval-workers", 1) if stage == "actor" else ()
    done = subprocess.run(prepared(code, f"srpo_{stage}.py", *flags), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "\r" not in done.stdout + done.stderr, done.stderr
    plain = [line for line in done.stdout.splitlines() if line.startswith(f"{stage} on cpu")]
    assert 2 <= len(plain) <= 10 and not done.stderr
    log = {line["step"]: line for line in lines(tmp_path / "runs" / FOLDER / f"{stage}.jsonl")}
    for line in plain:
        step = int(re.search(r": step (\d+) of 100, ", line)[1])
        name = sorted(EXPECTED[stage] & {"losses/q_loss", "losses/behavior_loss", "losses/actor_loss"})[0]
        assert f"{name.split('/')[1]}={np.mean(log[step][name]):.3g}" in line
    if stage == "actor":
        assert ", mean score " in plain[-1]


def test_a_run_of_seconds_prints_no_bar_into_a_file(tmp_path):
    done = run("srpo_critic.py", *TINY, "--steps", 200)
    assert len(done.stdout.splitlines()) <= 4 and not done.stderr


def test_into_a_terminal_a_bar(tmp_path):
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    done = subprocess.run(
        command("srpo_critic.py", *TINY, "--steps", 20), stderr=terminal, stdout=subprocess.PIPE, text=True
    )
    os.close(terminal)
    said = b""
    with contextlib.suppress(OSError):  # its end
        while part := os.read(main, 100_000):
            said += part
    said = said.decode()
    assert done.returncode == 0 and "\rcritic on cpu: 100%" in said and "critic on cpu: step" not in done.stdout


# ---- W&B


def wandb_records(path):
    wandb = Path(sys.executable).with_name("wandb")
    done = subprocess.run([wandb, "leet", "inspect", "--json", path], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("stage", STAGES)
def test_track_makes_one_wandb_run_per_replica(stage, trained, tmp_path):
    flags = [*TINY, "--steps", 20, "--num-seeds", 2]
    if stage == "actor":
        flags += [*paths(trained), "--eval-every", 10, "--eval-episodes", 2, "--eval-workers", 1]
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
