"""What must be seen on CUDA, in one run of at most four minutes: printed as it goes, with all tables last.

    python tests/cuda.py                  # --minutes 3 for less; without a GPU it says what it leaves out
    python tests/cuda.py --part profile   # one part alone

Parts, each in a process of its own with a time limit, so that none takes the others along:
- capture: tests/test_capture.py, recorded updates against eager ones;
- forms: milliseconds per step of each stage at the paper's sizes, recorded, with --amp, with --compile, and with both;
- resume: a critic's training that is killed and resumed, against an uninterrupted one, bit for bit;
- latency: the table of examples/latency.py, what an action costs, on artifacts that this script trains;
and two that run only if --part names them, in up to three and eight minutes:
- profile: the ten kernels that take most time in each form of the largest updates;
- autotune: their milliseconds per step with torch.compile's mode max-autotune-no-cudagraphs, beside the default mode.
It needs what README installs, no network and no data.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import gymnasium as gym
import minari
import numpy as np
import torch
import tyro
from minari.data_collector import EpisodeBuffer

ROOT = Path(__file__).parent.parent
LIMITS = {"capture": 45, "forms": 100, "resume": 40, "latency": 40, "profile": 180, "autotune": 480}  # seconds
ALL = ("capture", "forms", "resume", "latency")  # four minutes
STARTS = {"forms": 25, "profile": 25, "autotune": 60}  # seconds that torch.compile may need for one update
FORMS = {"graph": (), "amp": ("amp",), "compile": ("compile",), "both": ("amp", "compile")}
AUTOTUNE = {
    "compile": ("compile",),
    "autotune": ("compile", "autotune"),
    "both": ("amp", "compile"),
    "both, autotune": ("amp", "compile", "autotune"),
}
GRIDS = [("behavior", 6, 1), ("actor", 6, 6), ("critic", 6, 1), ("behavior", 1, 1), ("actor", 1, 1), ("critic", 1, 1)]


@dataclass
class Args:
    minutes: float = 4
    """time for all parts together; scales the limit of each"""
    part: Literal["all", "capture", "forms", "resume", "latency", "profile", "autotune"] = "all"
    """what is run; all leaves out profile and autotune"""
    inside: bool = False
    """this process is the part; the script itself sets it"""


def recorded(script, build, data, seeds, betas, flags):
    """One form of a script's update, past compiling and recording."""
    torch._dynamo.reset()
    args = script.Args(env="", **({"amp": True} if "amp" in flags else {}))
    update = build(data, args, data.device, seeds, betas)[0]
    if "compile" in flags:
        update = torch.compile(update, mode="max-autotune-no-cudagraphs" if "autotune" in flags else None)
    step = script.capture(update).__next__
    for _ in range(6):
        step()
    torch.cuda.synchronize()
    return step


def profiled(step, steps, kind="CUDA"):
    """Name, count and microseconds of each kernel; kind CPU: of each operation."""
    with torch.profiler.profile(activities=[getattr(torch.profiler.ProfilerActivity, kind)]) as profiler:
        for _ in range(steps):
            step()
        if kind == "CUDA":
            torch.cuda.synchronize()
    events = [x for x in profiler.key_averages() if x.device_type.name == kind]
    return [(x.key, x.count, x.self_device_time_total if kind == "CUDA" else x.self_cpu_time_total) for x in events]


def kernel_table(rows, steps):
    """A line for all rows of profiled, and one for each of the ten that take most time."""
    total, count = sum(us for _, _, us in rows), sum(n for _, n, _ in rows)
    lines = [f"{count / steps:.0f} kernels and {total / steps / 1000:.4f} ms in them per step; the most time:"]
    for name, n, us in sorted(rows, key=lambda row: -row[2])[:10]:
        name = name.removeprefix("void ").replace("at::native::", "")
        lines.append(f"  {us / total:6.1%} {n / steps:6.1f} x {us / n:8.2f} us  {name:.64}")
    return "\n".join(lines)


def measure(part, seconds):
    """A line per stage, size and form, for profile a table. What takes long to start, torch.compile, comes last."""
    if not torch.cuda.is_available():
        print(f"{part}: left out, PyTorch finds no CUDA device")
        return
    import benchmark

    end, device = time.time() + seconds, torch.device("cuda")
    torch.backends.cuda.matmul.allow_tf32 = True
    data = benchmark.random_data(device)
    if part == "profile":
        profiled(data.sum, 1)  # the profiler starts before any graph is recorded
    print("| stage | replicas | form | ms per step | s to start |\n|---|---|---|---|---|")
    for compiled in (False, True):
        for stage, seeds, betas in GRIDS if part == "forms" else GRIDS[:3]:
            for form, flags in (AUTOTUNE if part == "autotune" else FORMS).items():
                if ("compile" in flags) != compiled or "amp" in flags and stage == "critic":
                    continue
                row = f"| {stage} | {seeds * betas} | {form}"
                if time.time() > end - (STARTS[part] if compiled else 2):
                    print(f"{row} | no time left | |")
                    continue
                (script, _, build, _), start = benchmark.STAGES[stage], time.time()
                try:
                    step = recorded(script, build, data, seeds, betas, flags)
                    start = time.time() - start
                    ms = benchmark.milliseconds({form: step}, device, 0.2, 3)[form]
                    print(f"{row} | {ms:.4f} | {start:.1f} |")
                    if part == "profile":
                        print(kernel_table(profiled(step, 50), 50))
                except Exception as e:
                    print(f"{row} | {e!r:.100} | |")


def make_set(id):
    """100 episodes of 1,000 random steps in hopper's dimensions, which nobody has played."""
    rng, T, buffers = np.random.default_rng(0), 1000, []
    for _ in range(100):
        steps = {"rewards": rng.normal(size=T), "terminations": np.zeros(T, bool), "truncations": np.arange(T) == T - 1}
        actions, obs = rng.uniform(-1, 1, (T, 3)).astype(np.float32), rng.normal(size=(T + 1, 11))
        buffers.append(EpisodeBuffer(observations=obs, actions=actions, **steps, infos={}))
    with warnings.catch_warnings(action="ignore"):
        minari.create_dataset_from_buffers(id, buffers, env=gym.make("Hopper-v5"))


def start(stage, *flags):
    command = [sys.executable, str(ROOT / f"srpo_{stage}.py"), "--env", "cuda/hopper-v0", *map(str, flags)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def finish(process):
    """Waits for a stage; if it failed, says how it ended."""
    said = process.communicate()[1]
    if process.returncode:
        print(f"{process.args[1]} ended with status {process.returncode}: {said[-2000:]}")
        sys.exit(1)


def check_resume(folder):
    """Weights and log lines of a training that is killed and resumed, beside those of one that is left alone."""
    flags = ("--num-seeds", 2, "--steps", 4000, "--log-every", 200, "--checkpoint-every", 400, "--lr-decay")
    if not torch.cuda.is_available():
        print("resume: on the CPU, PyTorch finds no CUDA device; 400 steps")
        flags = (*flags[:3], 400, "--log-every", 20, "--checkpoint-every", 40, "--batch-size", 32, "--lr-decay")
    whole, killed = (start("critic", *flags, "--run-name", name) for name in ("whole", "killed"))
    while not (folder / "killed" / "critic.ckpt").exists() and killed.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    was_killed = killed.wait() == -signal.SIGKILL
    finish(start("critic", *flags, "--run-name", "killed", "--resume"))
    finish(whole)
    one, two = (torch.load(folder / name / "critic.pt", weights_only=True)["weights"] for name in ("whole", "killed"))
    same = all(torch.equal(x, two[name]) for name, x in one.items())
    logs = [(folder / name / "critic.jsonl").read_text().splitlines() for name in ("whole", "killed")]
    one, two = ([json.loads(line) | {"charts/SPS": None} for line in log] for log in logs)  # but for the speed
    same = same and one == two
    print(f"resume: killed before its end: {was_killed}; weights and log lines equal bit for bit: {same}")
    if not (was_killed and same):
        sys.exit(1)


def show_latency():
    for stage in ("critic", "behavior"):
        finish(start(stage, "--steps", 10, "--batch-size", 32))
    finish(start("actor", "--steps", 10, "--batch-size", 32, "--eval-every", 0))
    subprocess.run([sys.executable, ROOT / "examples" / "latency.py", "--run", "runs/cuda-hopper-v0"], check=True)


if __name__ == "__main__":
    args = tyro.cli(Args, description=__doc__)
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.stdout.reconfigure(line_buffering=True)
    scale = args.minutes / 4
    if args.inside:
        if args.part == "resume":
            check_resume(Path("runs"))
        elif args.part == "latency":
            show_latency()
        else:
            measure(args.part, scale * LIMITS[args.part] - 5)  # its imports come first
        sys.exit()

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device"
    print(f"{name}, {os.cpu_count()} CPU cores, torch {torch.__version__}")
    inside = [sys.executable, __file__, "--inside", "--minutes", str(args.minutes), "--part"]
    commands = {part: [*inside, part] for part in LIMITS}
    pytest = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-rs"]
    commands["capture"] = [*pytest, "--rootdir", str(ROOT), str(ROOT / "tests" / "test_capture.py")]
    tables, failed = [], []
    with tempfile.TemporaryDirectory() as folder:  # data and runs of this script alone
        Path(folder, "data").mkdir()
        os.environ["MINARI_DATASETS_PATH"] = f"{folder}/data"
        make_set("cuda/hopper-v0")
        path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        environ = os.environ | {"PYTHONPATH": path, "TQDM_MININTERVAL": "30"}  # few lines into the pipes
        for part in ALL if args.part == "all" else [args.part]:
            begin, said = time.time(), []
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
            process = subprocess.Popen(commands[part], cwd=folder, env=environ, **options)
            timer = threading.Timer(LIMITS[part] * scale, os.killpg, (process.pid, signal.SIGKILL))  # with its children
            timer.start()
            for line in process.stdout:
                print(line, end="")
                said.append(line)
            timer.cancel()
            if process.wait():
                failed.append(part)
            state = "failed or out of time" if part in failed else "done"
            tables.append(f"### {part}: {state} after {time.time() - begin:.0f} s\n")
            tables += said[-30:] if args.part == "all" else []
    print("\n" + "".join(tables))
    sys.exit(f"error: {', '.join(failed)} failed or had too little time" if failed else None)
