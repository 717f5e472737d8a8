"""D4RL's AntMaze: its environments against recorded steps, and its files from the import to a score."""

import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from conftest import ROOT, columns, prepared, run, run_here
from gymnasium.utils.env_checker import check_env
from minari.dataset._storages.hdf5_storage import HDF5Storage
from minari.storage import get_dataset_path

import d4rl_antmaze
import srpo_actor
import srpo_critic

IMPORT = "examples/import_d4rl.py"
TASKS = [
    f"antmaze-{name}-v2" for name in "umaze umaze-diverse medium-play medium-diverse large-play large-diverse".split()
]
UMAZE_FILE = "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5"
STEPS = json.loads((ROOT / "tests" / "d4rl_antmaze.json").read_text())


# ---- the environments


def largest_errors(env):
    """Of position, pose and velocities, over steps that start at recorded states."""
    errors = []
    for state, action, expected in zip(STEPS["state"], STEPS["action"], STEPS["next_state"]):
        env.reset(seed=0)
        env.ant.set_state(np.array(state[:15]), np.array(state[15:]))
        error = np.abs(env.step(np.array(action))[0] - expected)
        errors.append([error[:2].max(), error[2:15].max(), error[15:].max()])
    return np.max(errors, axis=0)


def test_recorded_steps_of_d4rl_are_reproduced():
    """And are not, if one of the four constants is gymnasium's."""
    env = gym.make("antmaze-large-diverse-v2").unwrapped
    limits = 0.001, 0.004, 0.07
    assert (largest_errors(env) < limits).all()
    model = env.ant.model
    plain = gym.make("Ant-v5").unwrapped.model
    d4rl = model.opt.timestep, model.actuator_gear.copy(), model.geom_solimp.copy(), model.geom_margin.copy()
    for i in range(4):
        if i == 0:
            model.opt.timestep = plain.opt.timestep
        elif i == 1:
            model.actuator_gear[:] = plain.actuator_gear
        elif i == 2:
            model.geom_solimp[:] = plain.geom_solimp[0]
        else:
            model.geom_margin[:] = plain.geom_margin[0]
        assert (largest_errors(env) > limits).all(), i
        model.opt.timestep, model.actuator_gear[:], model.geom_solimp[:], model.geom_margin[:] = d4rl
    assert (largest_errors(env) < limits).all()


@pytest.mark.filterwarnings("ignore:.*A Box observation space")  # as of every MuJoCo environment, it has no bounds
@pytest.mark.parametrize("task", TASKS)
def test_an_environment_is_as_gymnasium_wants_it(task):
    env = gym.make(task)
    check_env(env.unwrapped, skip_render_check=True)
    assert env.spec.max_episode_steps == (700 if "umaze" in task else 1000)
    assert env.observation_space.shape == (29,) and env.action_space.shape == (8,)
    assert env.spec.entry_point == "d4rl_antmaze:D4RLAntMaze"  # words, which Minari can store
    assert gym.envs.registration.EnvSpec.from_json(env.spec.to_json()).id == task


@pytest.mark.parametrize("task, goal", [(TASKS[0], (0, 8)), (TASKS[3], (20, 20)), (TASKS[5], (32, 24))])
def test_starts_and_goals_are_those_of_d4rl(task, goal):
    """By D4RL's maps: U(-0.1, 0.1) around the start's pose, and the far goal with the noise of two uniforms."""
    env = gym.make(task).unwrapped
    starts, goals = [], []
    for seed in range(200):
        obs, info = env.reset(seed=seed)
        starts.append(obs)
        goals.append(env.goal)
        assert info == {"success": False}
    starts, noise = np.array(starts), np.array(goals) - goal
    pose = np.zeros(15)
    pose[2:4] = 0.75, 1
    near = np.abs(starts[:, :15] - pose)
    near[:, 4:7] *= 0.9  # a unit quaternion: its noise is divided by its norm
    assert (near <= 0.1 + 1e-6).all() and (np.delete(near, 3, axis=1).max(axis=0) > 0.08).all()
    assert starts[:, 15:].std() == pytest.approx(0.1, rel=0.1) and abs(starts[:, 15:].mean()) < 0.01
    np.testing.assert_allclose(np.linalg.norm(starts[:, 3:7], axis=1), 1, rtol=1e-5)
    assert (noise >= 0).all() and (noise <= 1.5).all() and (noise.min(axis=0) < 0.15).all()
    np.testing.assert_allclose(noise.mean(axis=0), 0.75, atol=0.08)
    assert (noise.max(axis=0) > 1.3).all()


def test_seeds_reproduce():
    """Also after an episode in the same environment."""
    env, rng = gym.make(TASKS[5]), np.random.default_rng(0)
    actions, episodes = rng.uniform(-1, 1, (30, 8)).astype(np.float32), []
    for seed in (3, 4, 3):
        episodes.append([env.reset(seed=seed)[0]] + [env.step(action)[0] for action in actions])
    assert np.array_equal(episodes[0], episodes[2]) and not np.array_equal(episodes[0], episodes[1])


def test_success_is_half_a_metre_and_ends_the_episode():
    env = gym.make(TASKS[0])
    env.reset(seed=0)
    ant = env.unwrapped
    for distance, success in ((0.6, False), (0.4, True)):
        qpos, qvel = ant.ant.init_qpos.copy(), np.zeros(14)
        qpos[:2] = ant.goal + [distance, 0]
        ant.ant.set_state(qpos, qvel)
        _, reward, terminated, truncated, info = env.step(np.zeros(8))
        assert (reward, terminated, truncated, info) == (float(success), success, False, {"success": success})


@pytest.mark.parametrize("task", (TASKS[0], TASKS[3], TASKS[5]))
def test_walls_are_those_of_d4rl_s_map(task):
    """An ant that is thrown from the centre of a free cell reaches the neighbouring cell if and only if it is free."""
    env = gym.make(task).unwrapped
    rows = d4rl_antmaze.MAZES[task.split("-")[1]]
    free = [(i, j) for i, row in enumerate(rows) for j, cell in enumerate(row) if cell != "#"]
    assert {"umaze": 7, "medium": 26, "large": 46}[task.split("-")[1]] == len(free)
    env.reset(seed=0)
    for i, j in free[:: 1 if "umaze" in task else 4]:
        for down, right in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            qpos = env.ant.init_qpos.copy()
            qpos[:2] = 4 * (j - 1), 4 * (i - 1)
            centre = qpos[:2].copy()
            for _ in range(9):  # at 5 m/s
                qvel = np.zeros(14)
                qvel[:2] = 5 * right, 5 * down
                env.ant.set_state(qpos, qvel)
                env.step(np.zeros(8))
                qpos = np.concatenate([env.ant.data.qpos[:2], env.ant.init_qpos[2:]])
            way = (qpos[:2] - centre) @ [right, down]
            assert (way > 2) == (rows[i + down][j + right] != "#"), (i, j, down, right, way)


def test_an_environment_is_drawn(tmp_path):
    code = (
        "import gymnasium as gym, d4rl_antmaze; e = gym.make('antmaze-umaze-v2', render_mode='rgb_array'); e.reset();"
    )
    code += "x = e.render(); assert x.shape[2] == 3 and x.std() > 5; e.close()"
    environ = {"PYTHONPATH": str(ROOT), "MUJOCO_GL": "egl"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environ)
    if "EGL" in done.stderr:
        pytest.skip("rendering needs EGL")
    assert done.returncode == 0, done.stderr


# ---- the files


@pytest.fixture
def own_root(tmp_path_factory, monkeypatch):
    """An empty Minari folder of the test's own."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root := tmp_path_factory.mktemp("own")))
    return root


EPISODES = [  # steps whose next row is at the goal, of ten rows each
    (),
    (3, 4, 5, 7),  # the ant leaves the goal and comes back
    (8,),
    (0, 1, 2, 3, 4, 5, 6, 7, 8),
]


def write_antmaze(path):
    """A file as D4RL wrote them: the tenth row of each episode is a time-out, whose next row is another episode's."""
    rng, n = np.random.default_rng(0), 10 * len(EPISODES)
    obs = rng.normal(size=(n, 29)).astype(np.float32)
    obs[5::10, :2] = obs[6::10, :2] + (0.3, 0.9)  # 0.51 m from the goal below, the next row 0.492 m
    reward = np.zeros(n, np.float32)
    reward[[10 * i + t for i, steps in enumerate(EPISODES) for t in steps]] = 1
    with h5py.File(path, "w") as f:
        f["observations"] = obs
        f["actions"] = rng.uniform(-1, 1, (n, 8)).astype(np.float32)
        f["rewards"] = f["terminals"] = reward
        f["timeouts"] = np.arange(1, n + 1) % 10 == 0
        f["infos/goal"] = np.repeat(obs[6::10, :2] + (0.3, 0.39), 10, axis=0)
    return path


@pytest.mark.parametrize("name", [UMAZE_FILE, "antmaze-umaze-v2.hdf5"])
def test_states_actions_and_rewards_are_what_the_released_code_trains_on(name, own_root, capsys):
    """Written by hand: r - 1, the file's terminals, the next row; no transition from one episode to another."""
    path = write_antmaze(name)
    run_here(IMPORT, path)
    said = "D4RL/antmaze/umaze-v2: 4 episodes, 36 transitions; `python srpo_critic.py --env antmaze-umaze-v2` trains"
    assert capsys.readouterr().out.startswith(said)
    with h5py.File(path) as file:
        obs, action, reward = (file[key][:] for key in ("observations", "actions", "rewards"))
    kept = [i for i in range(40) if i % 10 != 9]
    data, info = columns(*srpo_critic.load_dataset("antmaze-umaze-v2", None, None, "cpu"))
    for key, expected in ("obs", obs[kept]), ("action", action[kept]), ("next_obs", obs[[i + 1 for i in kept]]):
        np.testing.assert_allclose(data[key], expected, atol=1e-6)
    assert data["reward"].tolist() == (reward[kept] - 1).tolist()
    assert data["terminal"].tolist() == reward[kept].tolist() and data["terminal"].sum() == 14
    assert info["maze"] and info["by_success"] and info["data_outcome"] == 0.75 and set(info["obs_std"]) == {1}
    facts = srpo_actor.evaluation_info(info)
    assert facts["reference"] == (0, 1)
    for environment in facts["environments"].values():
        assert (environment["id"], environment["max_episode_steps"]) == ("antmaze-umaze-v2", 700)


def test_until_success_leaves_out_what_follows_it(own_root, capsys):
    """The first episode arrives only where its recorder sent the ant, the others at the rewarded goal, too."""
    path = write_antmaze(UMAZE_FILE)
    with h5py.File("no-goals.hdf5", "w") as file, h5py.File(path) as source:
        for key in ("observations", "actions", "rewards", "terminals", "timeouts"):
            source.copy(key, file)
    run_here(IMPORT, "no-goals.hdf5", "--id", "D4RL/antmaze/umaze-v0", "--until-success")
    assert "D4RL/antmaze/umaze-v0: 4 episodes, 23 transitions;" in capsys.readouterr().out
    run_here(IMPORT, path, "--until-success")
    assert capsys.readouterr().out.startswith("D4RL/antmaze/umaze-v2: 4 episodes, 20 transitions;")
    kept = [*range(6), *range(10, 14), *range(20, 29), 30]
    with h5py.File(path) as file:
        obs, action, reward = (file[key][:] for key in ("observations", "actions", "rewards"))
    data, _ = columns(*srpo_critic.load_dataset("antmaze-umaze-v2", None, None, "cpu"))
    for key, expected in ("obs", obs[kept]), ("action", action[kept]), ("next_obs", obs[[i + 1 for i in kept]]):
        np.testing.assert_allclose(data[key], expected, atol=1e-6)
    assert data["terminal"].nonzero().flatten().tolist() == [9, 18, 19]
    assert data["reward"].flatten().tolist() == (data["terminal"].flatten() - 1).tolist()
    with h5py.File(path, "r+") as file:
        del file["infos/goal"]
        file["infos/goal"] = np.zeros((len(obs), 3))
    with pytest.raises(SystemExit, match="infos/goal of another shape"):
        run_here(IMPORT, path, "--id", "mine/umaze-v0", "--until-success")


@pytest.mark.parametrize("task", TASKS)
def test_every_file_has_its_task(task, own_root, capsys):
    from examples.import_d4rl import FILES, name_of

    file = Path(FILES[task]).name
    level = name_of(file)[1]
    assert f"antmaze-{level}-v2" == task and FILES[task].startswith("ant_maze_v2/Ant_maze_")
    size, many = {"umaze": "u-maze", "medium": "big-maze", "large": "hardest-maze"}, level.endswith("diverse")
    start = many or not level.startswith("umaze")
    assert file == f"Ant_maze_{size[level.split('-')[0]]}_noisy_multistart_{start}_multigoal_{many}_sparse_fixed.hdf5"
    run_here(IMPORT, write_antmaze(file))
    assert f"--env {task}`" in capsys.readouterr().out
    info = srpo_critic.load_dataset(task, None, None, "cpu")[1]
    assert json.loads(info["minari"]["env_spec"])["id"] == task


def test_all_fifteen_tasks_and_their_addresses():
    from examples.import_d4rl import FILES

    table_1 = [
        f"{robot}-{level}-v2" for robot in ("halfcheetah", "hopper", "walker2d") for level in srpo_actor.BETAS[robot]
    ]
    table_1 += [f"antmaze-{level}-v2" for level in srpo_actor.BETAS["antmaze"]]
    assert len(table_1) == 15 and set(table_1) <= set(FILES)
    assert FILES["walker2d-medium-expert-v2"] == "gym_mujoco_v2/walker2d_medium_expert-v2.hdf5"
    for task in table_1:
        domain, level = task.removesuffix("-v2").split("-", 1)
        assert srpo_critic.minari_ids(task) == [f"D4RL/{domain}/{level}-v2"]


def test_an_imported_maze_is_trained_on_and_scored(own_root, tmp_path, capsys):
    """From another folder, in worker processes; and the ways are in D4RL's coordinates."""
    run_here(IMPORT, write_antmaze("antmaze-umaze-v2.hdf5"))
    flags = ("--env", "antmaze-umaze-v2", "--steps", 4, "--batch-size", 8, "--log-every", 2)
    assert run_here("srpo_critic.py", *flags)["args"].expectile == 0.9
    run_here("srpo_behavior.py", *flags)
    done = run("srpo_actor.py", *flags, "--eval-episodes", 2, "--eval-workers", 2)
    assert done.stdout.startswith("beta 0.02, q-grad-norm rms, hidden-layers 4\nevaluation in antmaze-umaze-v2,")
    last = json.loads(Path("runs/antmaze-umaze-v2/actor.jsonl").read_text().splitlines()[-1])
    assert last["eval/success"] == [0.0] and last["eval/episode_length"] == [700.0]
    run("eval.py", "--env", "antmaze-umaze-v2", "--episodes", 2, "--workers", 2)
    content = json.loads(Path("runs/antmaze-umaze-v2/trajectories.json").read_text())
    assert np.abs([way["way"][0] for way in content["ways"]]).max() < 0.11
    for way in content["ways"]:
        assert (np.array(way["goal"]) >= (0, 8)).all() and (np.array(way["goal"]) <= (1.5, 9.5)).all()
    walls = {
        (4 * (j - 1), 4 * (i - 1))
        for i, row in enumerate(d4rl_antmaze.MAZES["umaze"])
        for j, c in enumerate(row)
        if c == "#"
    }
    assert {tuple(wall) for wall in content["walls"]} == walls

    for script in ("srpo_actor.py", "eval.py"):  # of a fork without d4rl_antmaze.py
        shutil.copy(ROOT / script, tmp_path / script)
    for command in (["srpo_actor.py", *map(str, flags)], ["eval.py", "--env", "antmaze-umaze-v2"]):
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
        said = done.stderr.splitlines()
        assert done.returncode == 1 and len(said) == 1, done.stderr
        assert said[0].startswith("error: cannot play in antmaze-umaze-v2 (NameNotFound(")


def test_older_files_are_imported_with_a_line_that_says_how_they_differ(own_root, capsys):
    for name in (UMAZE_FILE.replace("_fixed", ""), "antmaze-umaze-v0.hdf5"):
        run_here(IMPORT, write_antmaze(name))
        out = capsys.readouterr().out
        assert f"{name} is an older version: its rewards and terminals are those of the recording" in out
        assert "--env antmaze-umaze --dataset D4RL/antmaze/umaze-v0`" in out
        shutil.rmtree(get_dataset_path("D4RL/antmaze/umaze-v0"))
    with pytest.raises(SystemExit, match="umaze-v1 is the name of Minari's own set: name the new set with --id"):
        run_here(IMPORT, write_antmaze("antmaze-umaze-v1.hdf5"))
    with pytest.raises(SystemExit, match="AntMaze has no task huge: name one of umaze, "):
        run_here(IMPORT, write_antmaze("antmaze-huge-v2.hdf5"))
    assert not list(own_root.glob("D4RL/antmaze/*/"))


EXCERPT = ROOT.parent / "shared" / "data" / "d4rl_excerpts" / "antmaze-large-diverse-v0.hdf5"


@pytest.mark.skipif(not EXCERPT.exists(), reason="no original file of AntMaze")
def test_an_original_file_is_imported_and_trained_on(own_root, capsys):
    run_here(IMPORT, EXCERPT)
    flags = ("--env", "antmaze-large-diverse", "--dataset", "D4RL/antmaze/large-diverse-v0")
    assert f"1,996 transitions; `python srpo_critic.py {' '.join(flags)}`" in capsys.readouterr().out
    run_here("srpo_critic.py", *flags, "--steps", 4, "--batch-size", 8)
    data, info = columns(*srpo_critic.load_dataset(*flags[1::2], None, "cpu"))
    with h5py.File(EXCERPT) as file:
        obs, timeout = file["observations"][:], file["timeouts"][:]
    assert torch.equal(data["obs"], torch.from_numpy(obs[:-1][~timeout[:-1]]))
    assert torch.equal(data["next_obs"], torch.from_numpy(obs[1:][~timeout[:-1]]))
    env = gym.make("antmaze-large-diverse-v2").unwrapped  # whose walls the recorded ants do not cross
    cells = [env.maze.cell_xy_to_rowcol(x).tolist() for x in obs[:, :2].astype(float)]
    assert all(env.maze.maze_map[i][j] != 1 for i, j in cells) and info["maze"]


# ---- downloads


@pytest.fixture
def server(tmp_path_factory):
    """A server on the loopback: its folder, its address, and the paths that were asked for."""
    folder, asked = tmp_path_factory.mktemp("server"), []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            if "hopper" in self.path:  # the connection breaks half-way
                content = (folder / self.path[1:]).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
            else:
                super().do_GET()

        def log_message(self, *args):
            pass

    (folder / "ant_maze_v2").mkdir()
    (folder / "gym_mujoco_v2").mkdir()
    write_antmaze(folder / "ant_maze_v2" / UMAZE_FILE)
    shutil.copy(folder / "ant_maze_v2" / UMAZE_FILE, folder / "gym_mujoco_v2" / "hopper_medium-v2.hdf5")
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", asked
    running.shutdown()
    running.server_close()


def test_a_task_is_downloaded_once(server, own_root, capsys):
    url, asked = server
    flags, cut = ("antmaze-umaze-v2", "--folder", "kept", "--url", url), "--until-success"
    for more, other, steps, kind in ([], [cut], 36, "with the steps after success"), ([cut], [], 20, "cut at success"):
        run_here(IMPORT, *flags, *more)
        assert srpo_critic.load_dataset("antmaze-umaze-v2", None, None, "cpu")[1]["fingerprint"][0] == steps
        run_here(IMPORT, *flags, *more)  # is there already
        with pytest.raises(SystemExit, match=f"is there already, {kind}"):
            run_here(IMPORT, *flags, *other)
        shutil.rmtree(get_dataset_path("D4RL/antmaze/umaze-v2"))
    assert asked == [f"/ant_maze_v2/{UMAZE_FILE}"]
    out = capsys.readouterr().out
    assert out.count(f"downloading {url}/ant_maze_v2/{UMAZE_FILE} to kept/{UMAZE_FILE}\n") == 1


def test_all_are_the_fifteen_tasks_and_those_that_are_there_are_left(own_root, capsys, monkeypatch):
    asked = []

    def download(address, path):
        asked.append(address)
        write_antmaze(path) if "Ant_maze" in path else write_hopper(path)

    def write_hopper(path):
        S, A = {"halfcheetah": (17, 6), "hopper": (11, 3), "walker2d": (17, 6)}[Path(path).name.split("_")[0]]
        with h5py.File(path, "w") as f:
            f["observations"], f["actions"] = np.zeros((5, S)), np.zeros((5, A))
            f["rewards"] = f["terminals"] = f["timeouts"] = np.zeros(5)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    run_here(IMPORT, "hopper-medium-v2", "--folder", "kept")
    for sets in (14, 0):
        asked.clear()
        run_here(IMPORT, "all", "--folder", "kept")
        assert len(asked) == len(set(asked)) == sets
        shutil.rmtree("kept", ignore_errors=True)
        said = capsys.readouterr().out
        assert "hopper-medium-v2 is there already; `minari delete D4RL/hopper/medium-v2` removes it" in said
    sets = {path.parent.name for path in own_root.glob("D4RL/*/*/data")}
    assert len(list(own_root.glob("D4RL/*/*/data"))) == 15 and "expert-v2" not in sets


def test_half_a_download_is_never_taken_for_a_whole_one(server, own_root):
    url, asked = server
    for _ in range(2):
        with pytest.raises(SystemExit) as e:
            run_here(IMPORT, "hopper-medium-v2", "--folder", "kept", "--url", url)
        address = f"{url}/gym_mujoco_v2/hopper_medium-v2.hdf5"
        assert (
            e.value.code.startswith(f"error: {address} cannot be downloaded (OSError(") and "truncated" in e.value.code
        )
        remedy = "run this command with the file hopper_medium-v2.hdf5 in place of hopper-medium-v2"
        assert e.value.code.endswith(f"download it elsewhere, and {remedy}")
        assert not list(Path("kept").iterdir()) and not list(own_root.iterdir())
    assert len(asked) == 2  # begun anew


@pytest.mark.parametrize("where", ["no such file", "no server"])
def test_a_file_that_cannot_be_had_is_named(where, server, own_root):
    url = server[0] if where == "no such file" else "http://127.0.0.1:9"
    with pytest.raises(SystemExit) as e:
        run_here(IMPORT, "walker2d-expert-v2", "--folder", "kept", "--url", url)
    assert e.value.code.startswith(f"error: {url}/gym_mujoco_v2/walker2d_expert-v2.hdf5 cannot be downloaded (")
    remedy = "run this command with the file walker2d_expert-v2.hdf5 in place of walker2d-expert-v2"
    assert e.value.code.endswith(f"download it elsewhere, and {remedy}")
    assert "\n" not in e.value.code
    assert not list(Path("kept").iterdir())


def test_ctrl_c_leaves_nothing_of_a_download(server, own_root, monkeypatch):
    def half(address, path):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.hub, "download_url_to_file", half)
    with pytest.raises(KeyboardInterrupt):
        run_here(IMPORT, "hopper-medium-v2", "--folder", "kept")
    assert not list(Path("kept").iterdir())


def test_what_is_neither_a_file_nor_a_task(own_root):
    for source in ("hopper-medium", "nothing.hdf5"):
        with pytest.raises(
            SystemExit, match=f"error: {source} is neither a file nor a task .* such as hopper-medium-v2"
        ):
            run_here(IMPORT, source)
    with pytest.raises(SystemExit, match="error: name tasks, files, or all"):
        run_here(IMPORT)
    for sources in (("all",), ("hopper-medium-v2", "walker2d-medium-v2")):
        with pytest.raises(SystemExit, match="error: --id names one set: give one file"):
            run_here(IMPORT, *sources, "--id", "mine/x-v0")


# ---- half a set


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_import_is_begun_anew(number, own_root):
    """It removes its half set, or, if it cannot, the next import does."""
    path = write_antmaze("antmaze-umaze-v2.hdf5")
    code = f"""
import h5py, os
whole, calls = h5py.Group.create_group, []
def create_group(self, *args, **options):
    calls.append(args)
    if len(calls) == 3:  # the third of four episodes
        os.kill(os.getpid(), {int(number)})
    return whole(self, *args, **options)
h5py.Group.create_group = create_group
"""
    done = subprocess.run(prepared(code, IMPORT, path), capture_output=True, text=True)
    assert done.returncode != 0
    set_path = get_dataset_path("D4RL/antmaze/umaze-v2")
    assert set_path.exists() == (number == signal.SIGKILL)
    with pytest.raises(SystemExit, match="error: no complete data set D4RL/antmaze/umaze-v2"):
        srpo_critic.load_dataset("antmaze-umaze-v2", None, None, "cpu")
    run_here(IMPORT, path)
    assert srpo_critic.load_dataset("antmaze-umaze-v2", None, None, "cpu")[1]["fingerprint"][0] == 36
    with pytest.raises(SystemExit, match="exists already"):
        run_here(IMPORT, path)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
@pytest.mark.parametrize("importer", ["import_d4rl", "import_ogbench", "collect_pointmaze"])
def test_half_a_set_never_remains(importer, error, own_root, monkeypatch, tmp_path_factory):
    """An interrupted import names its error, and the next try makes the whole set."""
    if importer == "import_d4rl":
        flags, id = [write_antmaze("antmaze-umaze-v2.hdf5")], "D4RL/antmaze/umaze-v2"
    elif importer == "import_ogbench":
        pytest.importorskip("ogbench")
        from test_ogbench import record

        record("pointmaze-medium-navigate-v0.npz", "pointmaze-medium-singletask-v0", 2, 10)
        flags = ["pointmaze-medium-navigate-singletask-v0", "pointmaze-medium-navigate-v0.npz"]
        id = f"ogbench/{flags[0]}"
    else:
        flags, id = ["--dataset", "test/half-collected-v0", "--episodes", 2], "test/half-collected-v0"
    with monkeypatch.context() as patch:
        whole = HDF5Storage.update_episodes

        def fails(self, episodes):
            whole(self, episodes[:1])
            raise error

        patch.setattr(HDF5Storage, "update_episodes", fails)
        with pytest.raises(SystemExit, match=f"error: {id} was not written \\({type(error).__name__}"):
            run_here(f"examples/{importer}.py", *flags)
    assert not get_dataset_path(id).exists()
    run_here(f"examples/{importer}.py", *flags)
    assert srpo_critic.load_dataset(id, None, None, "cpu")[1]["fingerprint"][0] > 0
