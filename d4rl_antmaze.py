"""D4RL's six AntMaze tasks as Gymnasium environments, in the physics in which D4RL's data were recorded.

    import d4rl_antmaze; env = gymnasium.make("antmaze-large-diverse-v2")

The simulator is gymnasium-robotics' AntMaze with the mazes, coordinates, starts and goals of D4RL (Fu et al., 2020).
Four constants turn its ant into D4RL's: a recorded step is then reproduced to 0.2% (docs/differences.md).
"""

import gymnasium as gym
import numpy as np
from gymnasium_robotics.envs.maze.ant_maze_v5 import AntMazeEnv

MAZES = {  # x grows with the column and y with the row, 4 m per cell; #: wall, r: start, g: goal
    "umaze": ["#####", "#r..#", "###.#", "#g..#", "#####"],
    "medium": ["########", "#r.##..#", "#..#...#", "##...###", "#..#...#", "#.#..#.#", "#...#.g#", "########"],
    "large": [
        "############",
        "#r...#.....#",
        "#.##.#.#.#.#",
        "#......#...#",
        "#.####.###.#",
        "#..#.#.....#",
        "##.#.#.#.###",
        "#..#...#.g.#",
        "############",
    ],
}


class D4RLAntMaze(gym.Env):
    """An ant walks from one corner of a maze to another: observation [29], action [8] in [-1, 1], reward 0 or 1.

    An observation is qpos and qvel: position x, y in m (the centre of the start's cell is 0, 0), height, orientation
    and joint angles, then their velocities. It lacks the goal, which is nearly the same in all episodes.
    Within 0.5 m of the goal the reward is 1, info["success"] is true, and the episode ends.
    """

    metadata = AntMazeEnv.metadata | {"render_fps": 10}

    def __init__(self, maze, render_mode=None):
        rows = [[{"#": 1, ".": 0}.get(cell, cell) for cell in row] for row in MAZES[maze]]
        width, height = len(rows[0]), len(rows)
        # In gymnasium-robotics' maps y falls with the row, and the centre of the map is 0, 0. So the rows are turned
        # round, and free cells to the left and below, which nothing reaches, make the start's cell the centre.
        walls = [[0] * (width - 3) + row for row in rows[::-1]]
        walls += [[0] * (2 * width - 3)] * (height - 3)
        self.maze_env = AntMazeEnv(render_mode, walls, include_cfrc_ext_in_observation=False)
        self.maze, self.ant, model = self.maze_env.maze, self.maze_env.ant_env, self.maze_env.model
        model.opt.timestep = 0.02  # s; an environment step has 5
        model.actuator_gear[:, 0] = 30  # largest torque
        model.geom_solimp[:, :3] = 0.8, 0.8, 0.01  # softness of contacts
        model.geom_margin[:] = 0.005  # MuJoCo now adds the margins of two geoms; D4RL's took one of 0.01
        self.render_mode = render_mode
        self.action_space = self.ant.action_space
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (model.nq + model.nv,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        noise = self.np_random.uniform(0, 1, 2) + self.np_random.uniform(0, 0.5, 2)
        self.goal = self.maze_env.goal = self.maze.unique_goal_locations[0] + noise
        self.maze_env.update_target_site_pos()  # for rendering
        self.ant.reset()
        qpos = self.ant.init_qpos + self.np_random.uniform(-0.1, 0.1, self.ant.model.nq)
        qpos[3:7] /= np.linalg.norm(qpos[3:7])  # the orientation is a unit quaternion
        self.ant.set_state(qpos, 0.1 * self.np_random.standard_normal(self.ant.model.nv))
        return self._observation(), {"success": self._success()}

    def step(self, action):
        self.ant.step(action)
        success = self._success()
        return self._observation(), float(success), success, False, {"success": success}

    def _observation(self):
        return self.ant.state_vector().astype(np.float32)

    def _success(self):
        return bool(np.linalg.norm(self.ant.data.qpos[:2] - self.goal) <= 0.5)

    def render(self):
        return self.ant.render()

    def close(self):
        self.ant.close()


for task in ("umaze", "umaze-diverse", "medium-play", "medium-diverse", "large-play", "large-diverse"):
    size = task.partition("-")[0]
    limit = 700 if size == "umaze" else 1000
    gym.register(f"antmaze-{task}-v2", "d4rl_antmaze:D4RLAntMaze", max_episode_steps=limit, kwargs={"maze": size})
