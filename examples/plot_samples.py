"""Draw score against the number of samples that trained the behaviour model, a line for each value of --predict.

    python examples/plot_samples.py --run runs/walker2d-eps-* runs/walker2d-v-*    # writes runs/samples.png

It reads each run's artifacts and eval.json. A sample is one transition of one minibatch: a run has steps x batch size.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import tyro

sys.path.insert(0, str(Path(__file__).parent.parent))
from eval import load_artifact
from plot import COLORS, read_scores


@dataclass
class Args:
    run: tuple[Path, ...]
    """folders of scored runs of one task, which differ in their behaviour models"""
    out_dir: Path = Path("runs")
    """folder of the picture"""


def gather(folders):
    """What the network predicts -> rows of (samples, SRPO's mean score, its standard deviation); the last eval.json."""
    lines, scores = {}, {}
    for folder in folders:
        path = load_artifact(folder / "actor.pt", "actor")["args"]["behavior"] or folder / "behavior.pt"
        flags = load_artifact(path, "behavior")["args"]
        scores = list(read_scores(folder / "eval.json").values())[0]
        rows = [row for row in scores["summary"] if row["policy"] == "srpo"]
        if len(rows) != 1:
            sys.exit(f"error: {folder}/eval.json has {len(rows)} betas of SRPO, not 1: train and score one beta")
        point = flags["steps"] * flags["batch_size"], rows[0]["score_mean"], rows[0]["score_std"]
        lines.setdefault(flags["predict"], []).append(point)
    return {predict: sorted(lines[predict]) for predict in sorted(lines)}, scores


def draw(lines, scores):
    figure, ax = plt.subplots(figsize=(4.8, 3.6))
    for color, (predict, points) in zip(COLORS, lines.items()):
        samples, mean, std = np.array(points).T
        ax.errorbar(samples / 1e6, mean, std, color=color, marker="o", capsize=3, label=f"--predict {predict}")
    ax.axhline(scores["data_score"], color="black", linestyle=":", label="data")
    ticks = sorted({point[0] / 1e6 for points in lines.values() for point in points})
    ax.set(xscale="log", xlabel="samples that trained the behaviour model (millions)", title=f"SRPO, {scores['env']}")
    ax.set_xticks(ticks, [f"{round(x, 2):g}" for x in ticks])
    ax.minorticks_off()
    ax.set_ylabel(f"score, {scores['episodes']} episodes per seed")
    ax.legend()
    return figure


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    draw(*gather(args.run)).savefig(args.out_dir / "samples.png")
    print(f"saved {args.out_dir / 'samples.png'}")
