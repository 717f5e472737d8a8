"""Pictures of a run, from the JSON files that the other scripts wrote into its folder.

    python plot.py --run runs/hopper-medium

learning.png   losses, Q and score during training: mean and range over seeds, a line per beta
beta.png       score against beta (Figure 15 of the paper), where several were trained
time.png       score against the time of an action (Figure 1), where eval.py scored several policies with --latency
maze.png       ways through a maze
"""

import itertools
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro

plt.rcParams |= {"figure.constrained_layout.use": True, "savefig.dpi": 150, "font.size": 9, "axes.grid": True}
plt.rcParams |= {"grid.alpha": 0.3, "axes.spines.top": False, "axes.spines.right": False}
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito's, told apart by all
MARKERS = {"srpo": "o", "idql": "s", "behavior": "^"}
NAMES = {"srpo": "SRPO", "idql": "IDQL", "behavior": "behavior model"}
PANELS = {  # title -> stage, metric
    "V loss (Eq. 11)": ("critic", "losses/v_loss"),
    "Q loss (Eq. 12)": ("critic", "losses/q_loss"),
    "behavior loss (Eq. 13)": ("behavior", "losses/behavior_loss"),
    "actor loss (Eq. 15)": ("actor", "losses/actor_loss"),
    "Q of the policy's actions": ("actor", "values/q_mean"),
    "score": ("actor", "eval/score"),
}


@dataclass
class Args:
    run: Path
    """folder of the run"""


def read(path):
    """What a JSON file holds, or None if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def curves(path, metric):
    """A metric of a .jsonl file: beta (or None) -> steps [T] and values [T, seeds]."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    lines = [line for line in lines if metric in line]
    if not lines:
        return {}
    betas = lines[0].get("beta", [None] * len(lines[0]["seed"]))
    steps, values = np.array([line["step"] for line in lines]), np.array([line[metric] for line in lines], float)
    return {beta: (steps, values[:, [b == beta for b in betas]]) for beta in dict.fromkeys(betas)}


def plot_learning(folder, name):
    """One panel per metric; None if there is no log."""
    panels = {title: curves(folder / f"{stage}.jsonl", metric) for title, (stage, metric) in PANELS.items()}
    panels = {title: found for title, found in panels.items() if found}
    if not panels:
        return None
    columns = min(3, len(panels))
    figure, axes = plt.subplots(-(-len(panels) // columns), columns, figsize=(3.4 * columns, 4.8), squeeze=False)
    for ax, (title, found) in zip(axes.flat, panels.items()):
        for color, (beta, (steps, values)) in zip(itertools.cycle(COLORS), found.items()):
            label = None if beta is None else f"beta {beta:g}"
            dot = "." if len(steps) < 30 else None
            ax.plot(steps, values.mean(axis=1), color=color, label=label, marker=dot, linewidth=1.2)
            ax.fill_between(steps, values.min(axis=1), values.max(axis=1), color=color, alpha=0.2, linewidth=0)
        ax.set(title=title, xlabel="gradient steps", xlim=(0, None))
        ax.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if x else "0")
    for ax in list(axes.flat)[len(panels) :]:
        ax.remove()
    if any(beta is not None for found in panels.values() for beta in found):
        labels = axes.flat[len(panels) - 1].get_legend_handles_labels()
        figure.legend(*labels, loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"{name}: mean and range over seeds")
    return figure


def plot_beta(scores):
    """Score against beta, beside the other policies and the data; None for a single beta."""
    srpo = [row for row in scores["summary"] if row["policy"] == "srpo"]
    if len(srpo) < 2:
        return None
    figure, ax = plt.subplots(figsize=(4.8, 3.6))
    beta, mean, std = np.array(sorted((row["beta"], row["score_mean"], row["score_std"]) for row in srpo)).T
    ax.errorbar(beta, mean, std, color=COLORS[0], marker="o", capsize=3, label="SRPO")
    for color, row in zip(COLORS[1:], [row for row in scores["summary"] if row["policy"] != "srpo"]):
        ax.axhline(row["score_mean"], color=color, linestyle="--", label=NAMES[row["policy"]])
        ax.axhspan(*(row["score_mean"] + row["score_std"] * np.array([-1, 1])), color=color, alpha=0.15)
    ax.axhline(scores["data_score"], color="black", linestyle=":", label="data")
    ax.set(
        xscale="log", xlabel="beta (larger: follows Q more)", ylabel=f"score, {scores['episodes']} episodes per seed"
    )
    ax.set_xticks(beta, [f"{x:g}" for x in beta])
    ax.minorticks_off()
    ax.set_title(f"{scores['env']}: mean and std over {srpo[0]['seeds']} seed(s)")
    ax.legend(fontsize=8)
    return figure


def plot_time(scores, latency):
    """Score against time per action of every policy that was both scored and timed; None if there are not two."""
    rows = {row["policy"]: row for row in latency["rows"]}
    known = [row for row in scores["summary"] if row["policy"] in rows]
    if (rows["idql"]["steps"], rows["idql"]["candidates"]) != (scores["sampler_steps"], scores["candidates"]):
        return None  # the sampler that was timed is not the one that was scored
    if len({row["policy"] for row in known}) < 2:
        return None
    figure, ax = plt.subplots(figsize=(4.8, 3.6))
    for color, policy in zip(COLORS, dict.fromkeys(row["policy"] for row in known)):
        points = [row for row in known if row["policy"] == policy]
        time, score = [rows[policy]["us_batch_1"]] * len(points), [row["score_mean"] for row in points]
        std = [row["score_std"] for row in points]
        ax.errorbar(time, score, std, color=color, marker=MARKERS[policy], linestyle="", capsize=3, label=NAMES[policy])
        for row, x, y in zip(points, time, score):
            if row["beta"] is not None:
                ax.annotate(
                    f" beta {row['beta']:g}", (x, y), (6, 0), textcoords="offset points", va="center", fontsize=8
                )
    ax.margins(0.15)
    ax.set(xscale="log", xlabel=f"microseconds per action, one at a time ({latency['device']})", ylabel="score")
    ax.set_title(f"{scores['env']}, {scores['episodes']} episodes per seed")
    ax.legend(fontsize=8)
    return figure


def plot_maze(content, name):
    """The ways of the first seed and beta of each policy."""
    first = {}
    for way in content["ways"]:
        first.setdefault((way["policy"], way["seed"], way["beta"]), []).append(way)
    kinds = {policy: ways for (policy, *_), ways in reversed(first.items())}
    figure, axes = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 4.3), squeeze=False)
    half = content["cell"] / 2
    for ax, policy in zip(axes.flat, [policy for policy in MARKERS if policy in kinds]):
        for x, y in content["walls"]:
            ax.add_patch(plt.Rectangle((x - half, y - half), 2 * half, 2 * half, color="0.75", linewidth=0))
        for way in kinds[policy]:
            x, y = np.array(way["way"]).T
            ax.plot(x, y, color=COLORS[0] if way["success"] else COLORS[1], linewidth=1, alpha=0.8)
            ax.plot(x[0], y[0], "o", color="black", markersize=5)
            ax.plot(*way["goal"], "*", color=COLORS[4], markersize=14, markeredgecolor="black")
        labels = (
            {"label": "start", "marker": "o", "color": "black"},
            {"label": "goal", "marker": "*", "color": COLORS[4]},
        )
        for label in (*labels, {"label": "arrives", "color": COLORS[0]}, {"label": "does not", "color": COLORS[1]}):
            ax.plot([], [], **({"linestyle": ""} if "marker" in label else {}) | label)
        ax.set(title=NAMES[policy], xlabel="x (m)", ylabel="y (m)", aspect="equal")
        ax.grid(False)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{name}: the first episodes of seed {content['ways'][0]['seed']}")
    return figure


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    scores, latency, maze = (read(args.run / f"{name}.json") for name in ("eval", "latency", "trajectories"))
    figures = {"learning": plot_learning(args.run, args.run.name)}
    if scores:
        figures["beta"] = plot_beta(scores)
    if scores and latency:
        figures["time"] = plot_time(scores, latency)
    if maze:
        figures["maze"] = plot_maze(maze, args.run.name)
    drawn = {name: figure for name, figure in figures.items() if figure}
    if not drawn:
        sys.exit(f"error: {args.run} holds no .jsonl or .json of a run: train one, and score it with eval.py")
    for name, figure in drawn.items():
        figure.savefig(args.run / f"{name}.png")
        print(f"saved {args.run / name}.png")
