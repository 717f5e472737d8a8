"""Pictures of a run and the table of many runs, from the JSON files that the other scripts wrote into their folders.

    python plot.py --run runs/hopper-medium      # writes pictures into this folder
    python plot.py --table runs/*                # writes runs/table.md and runs/table.csv

learning.png   losses, Q and score during training: mean and range over seeds, a line per beta
beta.png       score against beta (Figure 15 of the paper), where several were trained
time.png       score against the time of an action (Figure 1), where examples/latency.py measured it
maze.png       trajectories in a maze
"""

import csv
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
COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"]  # Okabe and Ito's, colour-blind safe
MARKERS = {"srpo": "o", "idql": "s", "behavior": "^"}
NAMES = {"behavior": "behavior model", "idql": "IDQL", "srpo": "SRPO"}  # in the order of the table
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
    run: Path | None = None
    """folder of the run to draw"""
    table: tuple[Path, ...] = ()
    """gather these scored runs (runs/*) in <out-dir>/table.md and table.csv"""
    out_dir: Path = Path("runs")
    """folder of the table"""


def read(path):
    """What a JSON file holds, or None if there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def read_scores(path):
    """An eval.json by environment, eval_env -> content. Its summary has of each policy the rows of most episodes.

    Of rows that differ in nothing but their episodes or denoising steps, the last one counts. A row's note is empty, or
    says how many episodes it has if other policies have another number.
    """
    content, found = read(path), {}
    if "actor" not in content:
        sys.exit(f"error: {path} is of an earlier version: move it away and run eval.py again")
    for where in dict.fromkeys(row["eval_env"] for row in content["summary"]):
        rows, most = [row for row in content["summary"] if row["eval_env"] == where], {}
        for row in rows:
            most[row["policy"]] = max(row["episodes"], most.get(row["policy"], 0))
        rows = [row for row in rows if row["episodes"] == most[row["policy"]]]
        rows = {(row["policy"], row["candidates"], row["beta"]): row for row in rows}.values()
        note = ", {} episodes" if len(set(most.values())) > 1 else ""
        rows = [row | {"note": note.format(row["episodes"])} for row in rows]
        episodes = " or ".join(str(n) for n in sorted(set(most.values())))
        found[where] = content | {"summary": rows, "episodes": episodes, "eval_env": where}
    return found


def name_of(row):
    """A policy's name in a picture."""
    candidates = f", {row['candidates']} candidates" if row["policy"] == "idql" else ""
    return NAMES[row["policy"]] + candidates + row.get("note", "")


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
    others = [row for row in scores["summary"] if row["policy"] != "srpo"]
    for color, row in zip(itertools.cycle(COLORS[1:]), others):
        ax.axhline(row["score_mean"], color=color, linestyle="--", label=name_of(row))
        ax.axhspan(*(row["score_mean"] + row["score_std"] * np.array([-1, 1])), color=color, alpha=0.15)
    ax.axhline(scores["data_score"], color="black", linestyle=":", label="data")
    ax.set(xscale="log", xlabel="beta (larger: follows Q more)")
    ax.set_ylabel(f"score, {scores['episodes']} episodes per seed")
    ax.set_xticks(beta, [f"{x:g}" for x in beta])
    ax.minorticks_off()
    ax.set_title(f"{scores['env']}: mean and std over {srpo[0]['seeds']} seed(s)")
    ax.legend(fontsize=8)
    return figure


def plot_time(scores, latency):
    """Score against time per action of every policy that was both scored and timed; None if there are not two."""
    times = {(row["policy"], row["candidates"], row["steps"]): row["us_batch_1"] for row in latency["rows"]}
    points, betas = {}, [row["beta"] for row in scores["summary"] if row["policy"] == "srpo"]
    for row in sorted(scores["summary"], key=lambda row: row["score_mean"]):
        key = row["policy"], row["candidates"], row["sampler_steps"]
        if key in times:
            points[key] = times[key], row  # of several betas, which all take the same time, the best
    if len(points) < 2:
        return None
    figure, ax = plt.subplots(figsize=(4.8, 3.6))
    for color, (time, row) in zip(itertools.cycle(COLORS), sorted(points.values(), key=lambda point: point[0])):
        name = name_of(row) + (f", beta {row['beta']:g}" if row["beta"] else "")
        name += f" (best of {len(betas)})" if row["beta"] and len(betas) > 1 else ""
        style = {"color": color, "marker": MARKERS[row["policy"]], "linestyle": "", "capsize": 3}
        ax.errorbar(time, row["score_mean"], row["score_std"], label=name, **style)
    ax.margins(0.15)
    ax.set(xscale="log", xlabel=f"microseconds per action, one at a time ({latency['device']})", ylabel="score")
    ax.set_title(f"{scores['env']}, {scores['episodes']} episodes per seed")
    ax.legend(fontsize=8)
    return figure


def plot_maze(content, name):
    """The trajectories of the first seed and beta of each policy."""
    kinds = {}
    for way in content["ways"]:
        ways = kinds.setdefault((way["policy"], way["candidates"]), [])
        if not ways or (way["seed"], way["beta"]) == (ways[0]["seed"], ways[0]["beta"]):
            ways.append(way)
    figure, axes = plt.subplots(1, len(kinds), figsize=(4 * len(kinds), 4.3), squeeze=False)
    half = content["cell"] / 2
    for ax, ways in zip(axes.flat, kinds.values()):
        for x, y in content["walls"]:
            ax.add_patch(plt.Rectangle((x - half, y - half), 2 * half, 2 * half, color="0.75", linewidth=0))
        for way in ways:
            x, y = np.array(way["way"]).T
            ax.plot(x, y, color=COLORS[0] if way["success"] else COLORS[1], linewidth=1, alpha=0.8)
            ax.plot(x[0], y[0], "o", color="black", markersize=5)
            ax.plot(*way["goal"], "*", color=COLORS[4], markersize=14, markeredgecolor="black")
        for mark, color, meaning in ("o", "black", "start"), ("*", COLORS[4], "goal"):
            ax.plot([], [], mark, color=color, label=meaning)
        for color, meaning in (COLORS[0], "arrives"), (COLORS[1], "does not"):
            ax.plot([], [], color=color, label=meaning)
        ax.set(title=name_of(ways[0]), xlabel="x (m)", ylabel="y (m)", aspect="equal")
        ax.grid(False)
    figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(f"{name}\nseed {content['ways'][0]['seed']}, episodes from the same starts", fontsize=9)
    return figure


def make_table(folders):
    """Rows like those of the paper's Table 1: one per scored run, then the mean per domain.

    Of several betas, or numbers of candidates, the one of highest mean score stands for its policy, as in the paper.
    A run that was scored in two environments (--eval-env) has two rows.
    """
    rows, domains = [], {}
    for folder in sorted(folders, key=lambda folder: folder.name):
        for where, content in read_scores(folder / "eval.json").items():
            row = {"run": folder.name, "eval_env": where, "episodes": content["episodes"]}
            row |= {"data": content["data_score"], "steps": content["steps"]}
            for best in sorted(content["summary"], key=lambda found: found["score_mean"]):
                row |= {best["policy"]: best["score_mean"], f"{best['policy']}_std": best["score_std"]}
                row |= {f"{best['policy']}_note": best["note"]}
                row |= {name: best[name] for name in ("beta", "seeds") if best["policy"] == "srpo"}
            rows.append(row)
            domains.setdefault((content["env"].partition("-")[0], where), []).append(row)
    for (domain, where), members in domains.items():
        names = [name for name in ("data", *NAMES) if all(name in row for row in members)]
        means = {name: float(np.mean([row[name] for row in members])) for name in names}
        rows.append({"run": f"{domain}: mean of {len(members)}", "eval_env": where, **means})
    return rows


def write_table(rows, path):
    """The rows as path.csv and, like a paper's, path.md, which is printed."""
    names = ["run", "eval_env", "episodes", "data", *NAMES, "beta", "seeds", "steps"]

    def cell(row, name):
        std = f" ± {row[f'{name}_std']:.1f}" if f"{name}_std" in row else ""
        value = f"{row[name]:.1f}{std}" if name in ("data", *NAMES) and name in row else str(row.get(name, ""))
        return value + row.get(f"{name}_note", "")

    lines = ["| " + " | ".join(line) + " |" for line in [names, ["---"] * len(names)]]
    lines += ["| " + " | ".join(cell(row, name) for name in names) + " |" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    with open(path.with_suffix(".csv"), "w", newline="") as file:
        writer = csv.DictWriter(file, names + [f"{name}_std" for name in NAMES], extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    print(*lines, f"saved {path}.md and {path}.csv", sep="\n")


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    if args.table:
        folders = [folder for folder in args.table if folder.is_dir()]  # runs/* may hold the last table
        scored = [folder for folder in folders if (folder / "eval.json").exists()]
        if missing := [str(folder) for folder in folders if folder not in scored]:
            print(f"left out, not scored by eval.py yet: {', '.join(missing)}")
        if not scored:
            sys.exit("error: --table found no eval.json: name folders of runs that eval.py has scored, such as runs/*")
        write_table(make_table(scored), args.out_dir / "table")
        sys.exit()
    if args.run is None:
        sys.exit("error: name the folder of a run, --run runs/NAME, or of several, --table runs/*")
    latency, maze = (read(args.run / f"{name}.json") for name in ("latency", "trajectories"))
    scores = list(read_scores(args.run / "eval.json").values()) if (args.run / "eval.json").exists() else []
    scores = max(scores, key=lambda one: max(row["episodes"] for row in one["summary"]), default=None)
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
