"""eval.py's diffusion policies, its latencies and its videos; plot.py's pictures and its table."""

import csv
import json
import shutil
import subprocess
import sys
import textwrap
import types
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, create, episode, random_episodes, run, run_here
from minari.serialization import serialize_space
from test_pipeline import wandb_records

import eval as srpo_eval
import plot


def schedule(t):
    """The VPSDE's alpha and sigma by its definition: alpha^2 = exp(-integral of 0.1 + 19.9 t from 0 to t)."""
    alpha = torch.exp(-(0.1 * t + 19.9 * t**2 / 2) / 2)
    return alpha, (1 - alpha**2).sqrt()


# ---- the sampler, against distributions whose score and whose ODE are known exactly


def gaussian_noise(mean, covariance):
    """eps(a_t, s, t) of N(mean, covariance): -sigma times the score of N(alpha mean, alpha^2 covariance + sigma^2)."""

    def eps(a_t, s, t):
        alpha, sigma = schedule(t[0, 0])
        total = alpha**2 * covariance + sigma**2 * torch.eye(len(mean))
        return sigma * (a_t - alpha * mean) @ torch.linalg.inv(total)

    return eps


def mixture_noise(means, weights, std):
    """The same of a mixture of Gaussians of one standard deviation: means [K, A], weights [K]."""

    def eps(a_t, s, t):
        alpha, sigma = schedule(t[0, 0])
        way = a_t[..., None, :] - alpha * means  # [R, B, K, A]
        variance = alpha**2 * std**2 + sigma**2
        share = (weights.log() - (way**2).sum(-1) / (2 * variance)).softmax(-1)
        return sigma * (share[..., None] * way).sum(-2) / variance

    return eps


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def sample(eps, noise, steps):
    return srpo_eval.sample_actions(eps, torch.zeros(*noise.shape[:2], 1), noise, steps)


def test_the_sampler_is_of_second_order(float64):
    """For N(m, v^2) the ODE keeps (a_t - alpha m) / std_t constant."""
    m, v, noise = 0.3, 0.2, torch.randn(1, 500, 1)
    (alpha_1, sigma_1), (alpha_0, sigma_0) = schedule(torch.tensor(1.0)), schedule(torch.tensor(0.001))
    std_1, std_0 = ((alpha**2 * v**2 + sigma**2).sqrt() for alpha, sigma in ((alpha_1, sigma_1), (alpha_0, sigma_0)))
    exact = alpha_0 * m + std_0 * (noise - alpha_1 * m) / std_1
    eps = gaussian_noise(torch.tensor([m]), torch.tensor([[v**2]]))
    error = [(sample(eps, noise, steps) - exact).abs().mean() for steps in (20, 40, 80, 160)]
    assert error[1] < 1e-3
    for coarse, fine in zip(error[1:], error[2:]):  # 4 in the limit of many steps; 2 for Euler, 8 for third order
        assert 3.5 < coarse / fine < 4.5


def test_sampled_gaussian_has_its_mean_and_covariance(float64):
    mean, covariance = torch.tensor([0.4, -0.2]), torch.tensor([[0.09, 0.05], [0.05, 0.04]])
    a = sample(gaussian_noise(mean, covariance), torch.randn(1, 20000, 2), 60)[0]
    assert a.mean(0).numpy() == pytest.approx(mean.numpy(), abs=0.01)  # 20,000 samples: 0.002 of noise
    assert a.T.cov().numpy() == pytest.approx(covariance.numpy(), abs=0.003)


def test_sampled_mixture_has_its_modes(float64):
    means, weights, std = torch.tensor([[-0.8, 0.5], [0.1, -0.6], [0.7, 0.4]]), torch.tensor([0.2, 0.5, 0.3]), 0.05
    a = sample(mixture_noise(means, weights, std), torch.randn(1, 20000, 2), 15)[0]
    mode = (a[:, None] - means).norm(dim=-1).argmin(-1)
    for k, weight in enumerate(weights):
        assert (mode == k).double().mean().item() == pytest.approx(weight.item(), abs=0.012)  # noise: 0.0035
        assert a[mode == k].mean(0).numpy() == pytest.approx(means[k].numpy(), abs=0.02)
        assert a[mode == k].std(0).numpy() == pytest.approx([std, std], rel=0.2)


def test_sample_against_the_transport_map_of_a_mixture(float64):
    """In one dimension the ODE's map is monotone, so it takes quantiles to quantiles."""
    means, weights, std = torch.tensor([[-0.7], [0.6]]), torch.tensor([0.35, 0.65]), 0.1

    def cdf(x, t):
        alpha, sigma = schedule(torch.tensor(t))
        total = (alpha**2 * std**2 + sigma**2).sqrt()
        return (weights * (1 + torch.erf((x - alpha * means[:, 0]) / total / 2**0.5)) / 2).sum(-1)

    noise = torch.linspace(-1.5, 1.5, 31).view(1, -1, 1)
    a = sample(mixture_noise(means, weights, std), noise, 200)
    assert cdf(a[0], 0.001).numpy() == pytest.approx(cdf(noise[0], 1.0).numpy(), abs=2e-3)


# ---- the policies


def both_heads(q):
    """q(s, a) -> [R, 2, B] in the place of the network that twin_q calls, for two actions."""
    return lambda x: q(x[::2, :, 2:], x[::2, :, :2]).flatten(0, 1).unsqueeze(-1)


def test_idql_takes_the_candidate_of_highest_q(float64):
    """Every state has its own candidates and its own best one; the lesser head decides."""
    means = torch.tensor([[-0.5, 0.0], [0.5, 0.0]])  # of the actions in each of two states
    seen = []

    def behavior(a_t, s, t):
        alpha, sigma = schedule(t)
        centre = means[s[0, :, 0].long()]
        return sigma * (a_t - alpha * centre) / (alpha**2 * 0.01 + sigma**2)

    behavior.last = types.SimpleNamespace(bias=torch.zeros(1, 1, 2))

    def q(s, a):
        seen.append((s, a))
        return torch.stack([a[..., 1], a[..., 1] + a[..., 0].abs()], dim=1)  # the first head is the lesser

    best = srpo_eval.sample_best(behavior, both_heads(q), torch.tensor([[[0.0], [1.0]]]), 50, 15)
    ((s, a),) = seen
    assert s.shape == (1, 100, 1) and a.shape == (1, 100, 2) and a.abs().max() <= 1
    for i in range(2):
        own = a[0][s[0, :, 0] == i]
        assert len(own) == 50 and own[:, 0].mean().item() == pytest.approx(means[i, 0].item(), abs=0.1)
        assert best[i].tolist() == max(own.tolist(), key=lambda action: action[1])
    assert best[:, 1].min() > 0.1  # of 50 from N(0, 0.1)


def arrays(network):
    return {name: x.numpy() for name, x in network.state_dict().items()}


def test_a_model_of_v_is_sampled_through_its_noise():
    """v = 0 everywhere belongs to actions of N(0, 1), whose ODE moves nothing: the noise is the action."""
    torch.manual_seed(0)
    behavior, q = srpo_eval.BehaviorModel(3, 2, 1, "v"), srpo_eval.mlp([5, 256, 256, 1], 2)
    for x in behavior.last.parameters():
        x.requires_grad_(False).zero_()
    info = {"state_dim": 3, "action_dim": 2, "obs_mean": [5.0] * 3, "obs_std": [2.0] * 3}
    info |= {"action_low": [-2.0, 0.0], "action_high": [2.0, 10.0]}
    action = {}
    for predict in ("v", "eps"):
        act = srpo_eval.make_sampling_act([arrays(behavior), arrays(q)], info | {"predict": predict}, 1, 100)
        torch.manual_seed(1)
        action[predict] = act(np.zeros((50, 3)))
    torch.manual_seed(1)
    noise = torch.randn(1, 50, 2)[0].clamp(-1, 1).numpy()
    assert action["v"] == pytest.approx(noise * [2, 5] + [0, 5], abs=0.01)
    assert np.abs(action["eps"] - action["v"]).max() > 1  # eps = 0 is another model


def test_policy_distance_of_a_known_policy(float64):
    """Samples of N(s, 0.1), a dimension around each of the state's; a policy beside it; Q's heads a_0 and 7 - a_1."""
    from examples.policy_distance import compare

    def behavior(a_t, s, t):
        alpha, sigma = schedule(t)
        return sigma * (a_t - alpha * s) / (alpha**2 * 0.01 + sigma**2)

    behavior.last = types.SimpleNamespace(bias=torch.zeros(1, 1, 2))
    s = torch.tensor([[0.1, -0.3], [-0.5, 0.3]]).repeat(1000, 1)
    step = torch.tensor([0.5, 0.0])
    q_target = both_heads(lambda s, a: torch.stack([a[..., 0], 7 - a[..., 1]], 1))
    row = compare(lambda s: s + step, behavior, q_target, s, 32, 30)
    largest = 2.0697  # expected maximum of 32 standard normals; the first head, always the lesser, chooses
    expected = 0.125, 0.01 * 31 / 32, 3.5 + 0.25 - 0.1, 3.5 - 0.1, 3.5 - 0.1 + 0.1 * largest / 2
    assert [float(x) for x in row] == pytest.approx(expected, abs=8e-3)


def test_score_term_of_a_known_model(float64):
    """N(s, 0.1) again, in actions 0.3 beside its mean: both by hand, where the noise has averaged out."""
    from examples.policy_distance import score_term

    def behavior(a_t, s, t):
        alpha, sigma = schedule(t)
        return sigma * (a_t - alpha * s) / (alpha**2 * 0.01 + sigma**2)

    s = torch.rand(50, 2) - 0.5
    for t in (0.1, 0.8):
        alpha, sigma = (float(x) for x in schedule(torch.tensor(t)))
        slope = sigma * alpha / (alpha**2 * 0.01 + sigma**2)
        size, measured = score_term(behavior, s, s + torch.tensor([0.3, -0.3]), t, draws=2000)
        assert (float(size), float(measured)) == pytest.approx((0.3 * slope, slope), rel=0.02)


@pytest.fixture(scope="module")
def scored(trained):
    """What eval.py wrote of all policies."""
    flags = ("--env", "test/pendulum-v0", "--out-dir", trained.parent, "--episodes", 3, "--workers", 1)
    run_here("eval.py", *flags, "--policy", "srpo", "idql", "behavior", "--candidates", 4, 1, "--sampler-steps", 3)
    return json.loads((trained / "eval.json").read_text())


def test_policy_distance_of_a_run(trained, tmp_path):
    """The mean of one sample is the behaviour model, here one of v: it scores what eval.py says."""
    run_here("srpo_behavior.py", *TINY, "--steps", 20, "--num-seeds", 2, "--predict", "v")
    paths = ("--critic", trained / "critic.pt", "--eval-every", 0)
    run_here("srpo_actor.py", *TINY, "--steps", 20, "--beta", 0.1, 0.5, *paths)
    sampler = ("--episodes", 12, "--sampler-steps", 3)
    run_here("eval.py", "--env", "test/pendulum-v0", "--policy", "behavior", "--workers", 1, *sampler)
    folder = tmp_path / "runs/test-pendulum-v0"
    flags = ("--run", folder, "--states", 4, "--samples", 1, *sampler, "--times", 0.2, 0.9)
    out = run("examples/policy_distance.py", *flags).stdout
    rows = [[float(x) for x in line.split()] for line in out.splitlines() if line.split()[0] in ("0", "1")]
    assert [row[:2] for row in rows[:4]] == [[0, 0.1], [0, 0.5], [1, 0.1], [1, 0.5]]
    assert all(row[3] == 0 and row[5] == row[6] for row in rows[:4])  # one sample: no spread, no choice
    assert [row[:2] for row in rows[4:]] == [[0, 0.2], [0, 0.9], [1, 0.2], [1, 0.9]]
    scores = json.loads((folder / "eval.json").read_text())["policies"]
    assert [row["seed"] for row in scores] == [0, 1]
    for row in scores:
        assert f"seed {row['seed']}: the mean of 1 samples as a policy has score {row['score']:.1f}\n" in out


def test_behavior_cloning_finds_a_linear_controller(capsys):
    """The recorded torque is a linear function of the observation, with noise: the policy recovers it."""
    env, gain, rng = gym.make("Pendulum-v1", max_episode_steps=40), np.array([0.3, -0.6, 0.1]), np.random.default_rng(0)
    episodes = []
    for x in random_episodes(env, 10, 40):
        torque = x.observations[:-1] @ gain + rng.normal(0, 0.1, 40)
        episodes.append(episode(x.observations, np.float32(torque[:, None]), x.rewards))
    create("test/linear-v0", episodes, env=env)
    task = ("--env", "test/linear-v0")
    for stage in ("critic", "behavior", "actor"):
        flags = ("--num-seeds", 2) if stage != "actor" else ("--lr", 1e-3, "--beta", 0.1, 0.5, "--eval-every", 0)
        run_here(f"srpo_{stage}.py", *task, "--steps", 2, "--batch-size", 64, *flags)
    run_here("examples/behavior_cloning.py", "--run", "runs/test-linear-v0", "--steps", 1000)
    test = np.concatenate([x.observations for x in episodes])
    for replica in (0, 1):
        action = srpo_eval.load_policy("bc/test-linear-v0/actor.pt", replica)(test)
        assert np.abs(action[:, 0] - test @ gain).mean() < 0.1 * (test @ gain).std()
    run_here("eval.py", *task, "--out-dir", "bc", "--episodes", 2, "--workers", 1)
    assert "srpo, beta 0: score" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="actor.pt exists"):
        run_here("examples/behavior_cloning.py", "--run", "runs/test-linear-v0")
    run_here("srpo_behavior.py", *task, "--steps", 2, "--batch-size", 64, "--num-seeds", 2, "--no-normalize-obs")
    with pytest.raises(SystemExit, match="changed since its actor was trained"):
        run_here("examples/behavior_cloning.py", "--run", "runs/test-linear-v0", "--out-dir", "other")


def test_all_policies_in_one_table(scored):
    rows = [(row["policy"], row["candidates"], row["seed"], row["beta"]) for row in scored["policies"]]
    srpo = [("srpo", None, 0, 0.1), ("srpo", None, 0, 0.5), ("srpo", None, 1, 0.1), ("srpo", None, 1, 0.5)]
    sampled = [("idql", 4), ("idql", 1), ("behavior", 1)]
    assert rows == srpo + [(*policy, seed, None) for policy in sampled for seed in (0, 1)]
    summary = {(row["policy"], row["candidates"], row["beta"]): row for row in scored["summary"]}
    assert list(summary) == [("srpo", None, 0.1), ("srpo", None, 0.5), *((*policy, None) for policy in sampled)]
    scores = {
        policy: [row["score"] for row in scored["policies"] if row["policy"] == policy]
        for policy in ("srpo", "idql", "behavior")
    }
    of_4, of_1 = scores["idql"][:2], scores["idql"][2:]
    assert summary["idql", 4, None]["score_mean"] == pytest.approx(np.mean(of_4))
    assert summary["idql", 4, None]["score_std"] == pytest.approx(np.std(of_4)) and np.std(of_4) > 0
    assert of_1 == scores["behavior"] and not set(of_1) & set(of_4)  # of one candidate, none is chosen


@pytest.fixture
def run_of_one(trained, tmp_path):
    """A run folder of the test's own, with the trained artifacts; and eval.py on it."""
    folder = tmp_path / "runs" / "test-pendulum-v0"
    folder.mkdir(parents=True)
    for stage in ("critic", "behavior", "actor"):
        shutil.copy(trained / f"{stage}.pt", folder)

    def score(*flags):
        run_here("eval.py", "--env", "test/pendulum-v0", "--workers", 1, "--sampler-steps", 2, *flags)
        return json.loads((folder / "eval.json").read_text())

    return folder, score


def settings(content):
    return [(row["policy"], row["episodes"], row["first_episode"], row["seed"]) for row in content["policies"]]


def test_a_later_call_adds_or_replaces_rows(run_of_one):
    """Nothing else is erased; tables and pictures take per policy the rows of most episodes, and say which."""
    folder, score = run_of_one
    first = score("--episodes", 3)
    both = score("--episodes", 2, "--policy", "behavior")
    assert both["policies"][:4] == first["policies"] and settings(both)[4:] == [
        ("behavior", 2, 1_000_000, seed) for seed in (0, 1)
    ]
    again = score("--episodes", 3)
    assert sorted(map(str, again["policies"])) == sorted(map(str, both["policies"]))  # replaced by equal ones
    more = score("--episodes", 4, "--first-episode", 7, "--policy", "behavior", "srpo")
    assert len(more["policies"]) == 12 and len(more["summary"]) == 6
    for row in more["summary"]:
        one = [x["score"] for x in more["policies"] if all(x[k] == row[k] for k in ("policy", "beta", "episodes"))]
        assert len(one) == row["seeds"] == 2 and row["score_mean"] == pytest.approx(np.mean(one))
    (content,) = plot.read_scores(folder / "eval.json").values()
    assert {(row["policy"], row["episodes"], row["note"]) for row in content["summary"]} == {
        ("srpo", 4, ""),
        ("behavior", 4, ""),
    }
    (folder / "eval.json").write_text(json.dumps(both))
    (content,) = plot.read_scores(folder / "eval.json").values()
    assert content["episodes"] == "2 or 3"
    assert [plot.name_of(row) for row in content["summary"]] == ["SRPO, 3 episodes"] * 2 + [
        "behavior model, 2 episodes"
    ]
    with pytest.raises(SystemExit):
        run_here("plot.py", "--table", folder)
    assert (
        ", 2 episodes |" in Path("runs/table.md").read_text() and ", 3 episodes |" in Path("runs/table.md").read_text()
    )


def test_scores_of_another_actor_or_version_are_not_mixed(run_of_one):
    folder, score = run_of_one
    content = score("--episodes", 1)
    path = folder / "eval.json"
    for other in (content | {"actor": content["actor"] + 1}, {k: x for k, x in content.items() if k != "actor"}):
        path.write_text(json.dumps(other))
        with pytest.raises(SystemExit) as e:
            score("--episodes", 1)
        assert e.value.code == (
            "error: runs/test-pendulum-v0/eval.json is of another actor, or of an earlier version: move it away"
        )
        assert json.loads(path.read_text()) == other
    with pytest.raises(SystemExit, match="eval.json is of an earlier version: move it away and run eval.py again"):
        run_here("plot.py", "--run", folder)
    path.write_text(json.dumps(content)[:-9])  # as a full disk may leave it
    with pytest.raises(SystemExit, match="is of another actor, or of an earlier version: move it away"):
        score("--episodes", 1)
    path.unlink()
    assert score("--episodes", 1)["policies"] == content["policies"]


def test_rows_that_another_call_writes_meanwhile_are_kept(run_of_one, monkeypatch):
    folder, score = run_of_one
    score("--episodes", 1)
    meanwhile = json.loads((folder / "eval.json").read_text())
    meanwhile["policies"] += [row | {"episodes": 99} for row in meanwhile["policies"]]

    def write(*args, **kwargs):
        (folder / "eval.json").write_text(json.dumps(meanwhile))
        return evaluate(*args, **kwargs)

    code = (ROOT / "eval.py").read_text()
    evaluate = srpo_eval.evaluate
    monkeypatch.setattr(sys, "argv", ["eval.py", "--env", "test/pendulum-v0", "--workers", "1", "--episodes", "2"])
    main = code.partition('if __name__ == "__main__":\n')[2]
    exec(compile(textwrap.dedent(main), "eval.py", "exec"), vars(srpo_eval) | {"evaluate": write})
    episodes = [row["episodes"] for row in json.loads((folder / "eval.json").read_text())["policies"]]
    assert sorted(episodes) == [1] * 4 + [2] * 4 + [99] * 4


def test_one_of_several_scores_with_the_same_episodes_is_drawn():
    """The last: of 5 and 15 denoising steps, of other first episodes."""
    rows = [row | {"first_episode": 0} for row in SUMMARY] + [SUMMARY[-1] | {"sampler_steps": 5, "score_mean": 9.0}]
    rows.append(SUMMARY[0] | {"first_episode": 7, "score_mean": 8.0})
    Path("eval.json").write_text(json.dumps(SCORES | {"summary": rows}))
    (content,) = plot.read_scores(Path("eval.json")).values()
    found = {(row["policy"], row["candidates"], row["beta"]): row["score_mean"] for row in content["summary"]}
    assert len(found) == len(content["summary"]) == 5
    assert found["behavior", 1, None] == 9 and found["srpo", None, 0.5] == 8 and found["srpo", None, 0.1] == 50


def test_ways_in_a_maze_are_added_or_replaced(data_root):
    """Those of the same actor, environment and episodes."""
    import gymnasium_robotics

    gym.register_envs(gymnasium_robotics)
    env = gym.make("PointMaze_UMaze-v3", max_episode_steps=5, continuing_task=True, reset_target=False)
    create("test/ways-v0", random_episodes(env, 2, 5), env=env)
    flags = ("--env", "test/ways-v0", "--steps", 1, "--batch-size", 4)

    def ways(*more):
        run_here("eval.py", *flags[:2], "--episodes", 2, "--workers", 1, "--sampler-steps", 2, *more)
        content = json.loads(Path("runs/test-ways-v0/trajectories.json").read_text())
        return [(way["policy"], way["eval_env"], way["first_episode"]) for way in content["ways"]]

    for stage in ("critic", "behavior"):
        run_here(f"srpo_{stage}.py", *flags)
    run_here("srpo_actor.py", *flags, "--eval-every", 0)
    srpo, behavior = ("srpo", "fixed", 1_000_000), ("behavior", "fixed", 1_000_000)
    assert ways() == [srpo] * 2 and ways("--policy", "behavior") == [srpo] * 2 + [behavior] * 2
    assert ways() == [behavior] * 2 + [srpo] * 2
    assert ways("--first-episode", 0) == [("srpo", "fixed", 0)] * 2
    assert ways("--eval-env", "data", "--first-episode", 0) == [("srpo", "data", 0)] * 2


def test_scores_are_saved_before_weights_and_biases_fails(run_of_one):
    folder, _ = run_of_one
    env = {"HOME": str(folder), "NETRC": str(folder / "none"), "WANDB_API_KEY": "", "WANDB_MODE": "online"}
    flags = ("--env", "test/pendulum-v0", "--episodes", 2, "--workers", 1, "--track")
    done = run("eval.py", *flags, check=False, **env)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: W&B cannot log: ")]
    assert len(json.loads((folder / "eval.json").read_text())["policies"]) == 4


def test_final_scores_in_weights_and_biases(run_of_one, tmp_path):
    """One run per row: group, job type, the row's columns as configuration, its scores as summary."""
    folder, _ = run_of_one
    flags = ("--env", "test/pendulum-v0", "--episodes", 2, "--workers", 1, "--policy", "srpo", "behavior", "--track")
    run("eval.py", *flags, "--sampler-steps", 2, WANDB_MODE="offline")
    rows = json.loads((folder / "eval.json").read_text())["policies"]
    found = []
    for path in folder.glob("wandb/offline-run-*/*.wandb"):
        records, summary = wandb_records(path), {}
        (about,) = [record["run"] for record in records if record["type"] == "run"]
        assert (about["run_group"], about["job_type"], about["project"]) == ("test-pendulum-v0", "eval", "srpo")
        config = about["config"]["update"]
        for record in records:
            if record["type"] == "summary":
                summary |= record["summary"]["update"]
        found.append({name: config[name] for name in srpo_eval.COLUMNS} | {"score": summary["eval/score"]})
        assert config["env"] == "test/pendulum-v0" and summary["eval/episode_length"] == 40
    wanted = [{name: row[name] for name in (*srpo_eval.COLUMNS, "score")} for row in rows]
    assert sorted(map(str, found)) == sorted(map(str, wanted)) and len(found) == 6


def test_a_policy_plays_the_same_beside_others_and_with_other_workers(scored, trained, tmp_path):
    """Sampled actions too depend on nothing but the episodes' seeds."""
    flags = ("--env", "test/pendulum-v0", "--out-dir", trained.parent, "--episodes", 3, "--workers", 2)
    run_here("eval.py", *flags, "--policy", "behavior", "srpo", "--candidates", 1, "--sampler-steps", 3)
    again = json.loads((trained / "eval.json").read_text())
    for policy in ("srpo", "behavior"):
        rows = [[row for row in content["policies"] if row["policy"] == policy] for content in (scored, again)]
        assert rows[0] == rows[1] and rows[0]


def test_the_policies_act_in_the_units_of_the_environment(trained):
    """Within the bounds [-2, 2], and beyond [-1, 1] at times; from the environment's observations."""
    critic, behavior = (torch.load(trained / f"{stage}.pt", weights_only=True) for stage in ("critic", "behavior"))
    pairs = (behavior, ""), (critic, "q_target.")
    weights = [srpo_eval.select(artifact, [1], prefix) for artifact, prefix in pairs]
    weights = [{name: x.numpy() for name, x in network.items()} for network in weights]
    mean, std, obs = [1.0, -2.0, 3.0], [0.5, 2.0, 4.0], np.random.default_rng(0).standard_normal((200, 3))
    action = []
    for normal, states in ([[0.0] * 3, [1.0] * 3], obs), ([mean, std], mean + std * obs):
        info = behavior["info"] | dict(zip(("obs_mean", "obs_std"), normal)) | {"predict": "eps"}
        torch.manual_seed(0)
        action.append(srpo_eval.make_sampling_act(weights, info, candidates=4, steps=5)(states))
    assert action[0].shape == (200, 1) and 1.5 < np.abs(action[0]).max() <= 2
    assert action[1] == pytest.approx(action[0], abs=1e-3)


def test_bad_input_networks_of_another_training(trained, tmp_path, capsys):
    """IDQL beside SRPO is a comparison only on the very networks that SRPO's policy was trained on."""
    for stage in ("critic", "behavior", "actor"):
        artifact = torch.load(trained / f"{stage}.pt", weights_only=True)
        (tmp_path / "runs" / "other").mkdir(parents=True, exist_ok=True)
        if stage == "behavior":
            artifact["weights"]["first.weight"][1, 0, 0] += 1e-6
        torch.save(artifact, tmp_path / "runs" / "other" / f"{stage}.pt")
    with pytest.raises(SystemExit) as e:
        run_here("eval.py", "--env", "test/pendulum-v0", "--run-name", "other", "--policy", "idql")
    assert "behavior.pt changed since the actor was trained" in e.value.code and "\n" not in e.value.code


# ---- latency, ways, video


def test_latency(scored, trained, capsys):
    flags = ("--run", trained, "--candidates", 4, 2, "--sampler-steps", 3, "--device", "cpu")
    run_here("examples/latency.py", *flags)
    content = json.loads((trained / "latency.json").read_text())
    rows = {(row["policy"], row["candidates"]): row for row in content["rows"]}
    assert all(row["us_batch_1"] > 0 and row["us_batch_20"] > 0 for row in rows.values())
    S, A = 3, 1
    srpo = 2 * (S * 256 + 256 * 256 + 256 * A)
    network = 2 * (64 * 128 + 128 * 128 + (A + S + 128) * 256 + 3 * 2 * 256 * 1024 + 256 * A)
    q = 2 * 2 * ((A + S) * 256 + 256 * 256 + 256)  # both heads
    assert rows["srpo", None]["flops"] == rows["srpo, act(obs) in NumPy", None]["flops"] == srpo
    assert rows["behavior", 1]["flops"] == 3 * network
    assert rows["idql", 4]["flops"] == 4 * (3 * network + q) and rows["idql", 2]["flops"] == 2 * (3 * network + q)
    assert rows["Diffusion-QL", 50]["flops"] == 50 * (5 * network + q)
    printed = capsys.readouterr().out
    assert all(name in printed for name, _ in rows) and "CPU" in content["device"]


class Corridor(gym.Env):
    """A maze of one dimension, ten steps from start to goal."""

    goal = np.array([9.0, 1.0])

    observation_space = gym.spaces.Dict({k: gym.spaces.Box(-9, 9, (2,)) for k in ("achieved_goal", "desired_goal")})
    action_space = gym.spaces.Box(-1, 1, (1,))

    def reset(self, seed=None, options=None):
        self.x = 0.0
        return self.obs(), {}

    def step(self, action):
        self.x += float(action[0])
        return self.obs(), 0.0, False, False, {"success": abs(self.x - 9) < 0.5}

    def obs(self):
        return {"achieved_goal": np.array([self.x, 1.0]), "desired_goal": np.array([9.0, 1.0])}


def test_ways_are_the_positions_of_an_episode():
    gym.register("Corridor-v0", entry_point=Corridor)
    info = {"by_success": True, "observation_space": serialize_space(Corridor.observation_space)}
    info |= {"state_dim": 4, "action_low": [-1.0], "action_high": [1.0]}
    environment = {"id": "Corridor-v0", "kwargs": {}, "max_episode_steps": 20, "wrappers": []}
    for speed, steps, success in ((1, 9, True), (0.1, 20, False)):
        way = srpo_eval.trace(lambda weights, info, v=speed: lambda obs: [[v]], None, info, environment, 0)
        assert way["goal"] == [9, 1] and way["success"] == success
        assert way["way"] == [[pytest.approx(i * speed, abs=0.006), 1] for i in range(steps)]
    del gym.registry["Corridor-v0"]


def test_an_environment_whose_maze_is_of_another_kind_is_scored(data_root, monkeypatch):
    """Only gymnasium-robotics' mazes can be drawn."""
    monkeypatch.setattr(Corridor, "maze", np.zeros((2, 9)), raising=False)
    gym.register("Corridor-v0", f"{__name__}:Corridor", max_episode_steps=5)
    env = gym.make("Corridor-v0")
    create("test/corridor-v0", random_episodes(env, 2, 5), env=env)
    flags = ("--env", "test/corridor-v0")
    for stage in ("critic", "behavior"):
        run_here(f"srpo_{stage}.py", *flags, "--steps", 1, "--batch-size", 4)
    run_here("srpo_actor.py", *flags, "--steps", 1, "--batch-size", 4, "--eval-every", 0)
    run_here("eval.py", *flags, "--episodes", 2, "--workers", 1)
    folder = Path("runs/test-corridor-v0")
    assert len(json.loads((folder / "eval.json").read_text())["policies"]) == 1
    assert not (folder / "trajectories.json").exists()
    del gym.registry["Corridor-v0"]


@pytest.fixture(scope="module")
def pendulum_run(data_root, tmp_path_factory):
    """All stages on an environment that MuJoCo renders."""
    env = gym.make("InvertedPendulum-v5", max_episode_steps=20)
    create("test/inverted-v0", random_episodes(env, 3, 20), env=env)
    out = tmp_path_factory.mktemp("runs")
    flags = (*TINY[2:], "--env", "test/inverted-v0", "--steps", 5, "--out-dir", out)
    for script in ("srpo_critic.py", "srpo_behavior.py"):
        run_here(script, *flags)
    run_here("srpo_actor.py", *flags, "--eval-every", 0)
    return out


def test_video(pendulum_run):
    """One film per replica, with as many frames as the episode has states; needs EGL, which a machine may lack."""
    flags = ("--env", "test/inverted-v0", "--out-dir", pendulum_run, "--episodes", 1, "--workers", 1)
    done = run("eval.py", *flags, "--policy", "srpo", "behavior", "--sampler-steps", 2, "--video", check=False)
    if done.returncode and "cannot render" in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    rows = json.loads((pendulum_run / "test-inverted-v0" / "eval.json").read_text())["policies"]
    films = sorted((pendulum_run / "test-inverted-v0" / "video").glob("*.mp4"))
    assert [film.name for film in films] == [
        "behavior-seed0-1-candidates-episode-0.mp4",
        "srpo-seed0-beta0.05-episode-0.mp4",
    ]
    from moviepy import VideoFileClip

    for film, row in zip(films, sorted(rows, key=lambda row: row["policy"])):
        with VideoFileClip(str(film)) as clip:
            assert clip.n_frames == pytest.approx(row["episode_length"] + 1, abs=1)
            assert clip.get_frame(0).std() > 5  # something is to be seen


def test_bad_input_rendering_that_is_impossible(pendulum_run):
    flags = ("--env", "test/inverted-v0", "--out-dir", pendulum_run, "--episodes", 0, "--workers", 1)
    done = run("eval.py", *flags, "--video", check=False, MUJOCO_GL="glfw", DISPLAY="")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: cannot record (") and "libegl1" in done.stderr


# ---- the table of many runs


def write_scores(folder, env, data, **scores):
    """An eval.json with (beta, mean, std) of policies: several betas of srpo, or numbers of candidates of idql."""
    summary = [
        {"policy": name.partition("_")[0], "beta": beta, "score_mean": mean, "score_std": std, "seeds": 3}
        | {"eval_env": "data" if name.endswith("_data") else "fixed", "episodes": 100}
        | {"candidates": name if name.startswith("idql") else None}
        for name, (beta, mean, std) in scores.items()
    ]
    folder.mkdir(parents=True)
    content = {"env": env, "data_score": data, "steps": 9, "actor": 0, "summary": summary}
    (folder / "eval.json").write_text(json.dumps(content))


def test_table_of_runs(tmp_path, capsys):
    write_scores(
        tmp_path / "runs/hopper-medium", "hopper-medium", 39.0, srpo_a=(0.05, 44.0, 2.0), srpo_b=(0.2, 50.0, 4.0)
    )
    write_scores(
        tmp_path / "runs/antmaze-umaze",
        "antmaze-umaze",
        71.7,
        idql_a=(None, 80.0, 1.0),
        idql_b=(None, 70.0, 4.0),
        srpo=(0.02, 90.25, 3.0),
        behavior=(None, 60.0, 0.5),
        srpo_data=(0.04, 95.0, 2.0),
    )
    write_scores(tmp_path / "runs/another-name", "hopper-expert", 97.0, srpo=(0.01, 90.0, 1.0))
    (tmp_path / "runs/unfinished").mkdir()
    for out_dir in ("elsewhere", "runs", "runs"):  # the second table in runs finds the first one there
        with pytest.raises(SystemExit) as e:
            run_here("plot.py", "--out-dir", out_dir, "--table", *sorted((tmp_path / "runs").iterdir()))
        assert not e.value.code
    assert (tmp_path / "elsewhere/table.md").read_text() == (tmp_path / "runs/table.md").read_text()
    out = capsys.readouterr().out
    assert all("table.md" not in line for line in out.splitlines() if "left out" in line)
    lines = (tmp_path / "runs/table.md").read_text().splitlines()
    assert all(line in out for line in lines) and "left out" in out and "unfinished" in out
    assert lines == [
        "| run | eval_env | episodes | data | behavior | idql | srpo | beta | seeds | steps |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| another-name | fixed | 100 | 97.0 |  |  | 90.0 ± 1.0 | 0.01 | 3 | 9 |",
        "| antmaze-umaze | fixed | 100 | 71.7 | 60.0 ± 0.5 | 80.0 ± 1.0 | 90.2 ± 3.0 | 0.02 | 3 | 9 |",
        "| antmaze-umaze | data | 100 | 71.7 |  |  | 95.0 ± 2.0 | 0.04 | 3 | 9 |",
        "| hopper-medium | fixed | 100 | 39.0 |  |  | 50.0 ± 4.0 | 0.2 | 3 | 9 |",
        "| hopper: mean of 2 | fixed |  | 68.0 |  |  | 70.0 |  |  |  |",
        "| antmaze: mean of 1 | fixed |  | 71.7 | 60.0 | 80.0 | 90.2 |  |  |  |",
        "| antmaze: mean of 1 | data |  | 71.7 |  |  | 95.0 |  |  |  |",
    ]
    with open(tmp_path / "runs/table.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["srpo"] for row in rows] == ["90.0", "90.25", "95.0", "50.0", "70.0", "90.25", "95.0"]
    assert rows[3]["srpo_std"] == "4.0" and rows[3]["beta"] == "0.2" and rows[0]["idql"] == ""


def test_bad_input_table_of_nothing(tmp_path):
    for flags in (("--table", tmp_path), ()):
        with pytest.raises(SystemExit) as e:
            run_here("plot.py", *flags)
        assert e.value.code.startswith("error: ") and "--table" in e.value.code and "\n" not in e.value.code


# ---- pictures


def test_plot_draws_what_a_run_has(scored, trained):
    (trained / "eval.json").write_text(json.dumps(scored))
    run_here("plot.py", "--run", trained)
    assert {path.name for path in trained.glob("*.png")} >= {"learning.png", "beta.png"}
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in trained.glob("*.png"))


def test_learning_curves_show_the_log(tmp_path):
    lines = [
        {"step": step, "seed": [0, 0, 1, 1], "beta": [0.1, 0.5, 0.1, 0.5], "losses/actor_loss": [step, 2, step + 4, 6]}
        for step in (10, 20)
    ]
    lines.append({"step": 30, "seed": [0, 0, 1, 1], "beta": [0.1, 0.5, 0.1, 0.5], "eval/score": [1, 2, 3, 4]})
    (tmp_path / "actor.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
    figure = plot.plot_learning(tmp_path, "x")
    axes = {ax.get_title(): ax for ax in figure.axes}
    assert set(axes) == {"actor loss (Eq. 15)", "score"}
    one, two = axes["actor loss (Eq. 15)"].get_lines()
    assert one.get_xydata().tolist() == [[10, 12], [20, 22]] and two.get_xydata().tolist() == [[10, 4], [20, 4]]
    band = axes["actor loss (Eq. 15)"].collections[0].get_paths()[0].vertices
    assert {(10, 10), (10, 14), (20, 20), (20, 24)} <= {tuple(point) for point in band.tolist()}
    assert [line.get_xydata().tolist() for line in axes["score"].get_lines()] == [[[30, 2]], [[30, 3]]]


SUMMARY = [("srpo", None, 0.5, 60.0, 3.0), ("srpo", None, 0.1, 50.0, 1.0), ("idql", 32, None, 55.0, 2.0)]
SUMMARY += [("idql", 4, None, 54.0, 2.0), ("behavior", 1, None, 30.0, 2.0)]
NAMES = ("policy", "candidates", "beta", "score_mean", "score_std")
SUMMARY = [dict(zip(NAMES, row), seeds=2, episodes=7, eval_env="fixed") for row in SUMMARY]
SUMMARY = [row | {"sampler_steps": row["candidates"] and 15} for row in SUMMARY]
SCORES = {"env": "x", "data_score": 5.0, "episodes": 7, "actor": 0, "summary": SUMMARY}


def test_beta_picture_is_in_the_order_of_beta():
    ax = plot.plot_beta(SCORES).axes[0]
    assert ax.get_lines()[0].get_xydata().tolist() == [[0.1, 50], [0.5, 60]]
    level = {line.get_label(): line.get_ydata()[0] for line in ax.get_lines()}
    assert [level[f"IDQL, {n} candidates"] for n in (32, 4)] == [55, 54]
    assert (level["behavior model"], level["data"]) == (30, 5)
    assert plot.plot_beta(SCORES | {"summary": SUMMARY[1:]}) is None  # one beta makes no curve


def test_time_picture_puts_scores_against_measured_times():
    rows = [("srpo", 20.0, None, None), ("idql", 9000.0, 15, 32), ("idql", 2000.0, 15, 4), ("behavior", 700.0, 15, 1)]
    rows.append(("SfBC", 9000.0, 15, 32))
    rows = [dict(zip(("policy", "us_batch_1", "steps", "candidates"), row)) for row in rows]

    def points(scores, rows):
        lines = plot.plot_time(scores, {"device": "CPU", "rows": rows}).axes[0].get_lines()
        return {tuple(point) for line in lines if line.get_marker() in "os^" for point in line.get_xydata().tolist()}

    assert points(SCORES, rows) == {(20, 60), (9000, 55), (2000, 54), (700, 30)}  # the better beta
    assert points(SCORES, rows[:2]) == {(20, 60), (9000, 55)}  # the others were not timed
    other = [row | {"sampler_steps": row["candidates"] and 10} for row in SUMMARY]
    assert plot.plot_time(SCORES | {"summary": other}, {"device": "CPU", "rows": rows}) is None  # nor was this


def test_samples_picture_has_a_line_per_prediction(tmp_path):
    from examples.plot_samples import draw, gather

    for predict, steps, score in ("eps", 20, 10.0), ("v", 20, 30.0), ("v", 5, 20.0):
        folder = tmp_path / f"{predict}-{steps}"
        folder.mkdir()
        flags = {"predict": predict, "steps": steps, "batch_size": 100_000}
        torch.save({"stage": "behavior", "format": 5, "args": flags}, folder / "behavior.pt")
        torch.save({"stage": "actor", "format": 5, "args": {"behavior": None}}, folder / "actor.pt")
        rows = [SUMMARY[0] | {"score_mean": score, "score_std": 1.0}, SUMMARY[-1]]
        (folder / "eval.json").write_text(json.dumps(SCORES | {"summary": rows}))
    ax = draw(*gather(sorted(tmp_path.iterdir()))).axes[0]
    drawn = {line.get_label(): line[0].get_xydata().tolist() for line in ax.containers}
    assert drawn == {"--predict eps": [[2, 10]], "--predict v": [[0.5, 20], [2, 30]]}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0.5", "2"]
    (folder / "eval.json").write_text(json.dumps(SCORES))
    with pytest.raises(SystemExit, match="2 betas of SRPO"):
        gather([folder])


def test_maze_picture_has_a_panel_per_policy():
    """Of each the first seed and beta, and only what was found in it."""
    kinds = [("srpo", None, 0, 0.1), ("srpo", None, 1, 0.1), ("srpo", None, 0, 0.5), ("idql", 32, 0, None)]
    kinds += [("idql", 4, 1, None), ("idql", 4, 2, None)]
    ways = [dict(zip(("policy", "candidates", "seed", "beta"), kind), goal=[9, 9], success=True) for kind in kinds]
    ways = [way | {"way": [[i, 0], [i, episode]]} for i, way in enumerate(ways) for episode in (1, 2)]
    figure = plot.plot_maze({"cell": 4, "walls": [[0, 8], [4, 8]], "ways": ways}, "x")
    drawn = {}
    for ax in figure.axes:
        lines = [line.get_xydata().tolist() for line in ax.get_lines()]
        drawn[ax.get_title()] = [line for line in lines if len(line) == 2]
        assert [patch.get_bbox().bounds for patch in ax.patches] == [(-2, 6, 4, 4), (2, 6, 4, 4)]
    first = {"SRPO": 0, "IDQL, 32 candidates": 3, "IDQL, 4 candidates": 4}
    assert drawn == {name: [[[i, 0], [i, 1]], [[i, 0], [i, 2]]] for name, i in first.items()}


@pytest.mark.parametrize("policies", [1, 3])
def test_titles_fit_into_the_maze_picture(policies):
    way = {"seed": 0, "beta": None, "goal": [9, 9], "success": True, "way": [[0, 0], [4, 4]]}
    ways = [way | {"policy": "idql", "candidates": n} for n in range(policies)]
    name = "ogbench-antmaze-medium-navigate-singletask-task1-v0"
    figure = plot.plot_maze({"cell": 4, "walls": [[0, 8], [4, 8]], "ways": ways}, name)
    figure.canvas.draw()
    for text in (figure._suptitle, *(ax.title for ax in figure.axes)):
        box = text.get_window_extent()
        assert 0 <= box.x0 and box.x1 <= figure.bbox.width and box.y1 <= figure.bbox.height


def test_bad_input_plot_of_no_run(tmp_path):
    done = run("plot.py", "--run", tmp_path, check=False)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "holds no .jsonl or .json" in done.stderr


def test_plot_needs_no_torch():
    code = "import sys, plot; assert not {'torch', 'gymnasium', 'minari'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
