"""The update as one CUDA graph: on CUDA the real thing against eager runs; elsewhere what surrounds the recording."""

import contextlib
import copy
from types import SimpleNamespace

import pytest
import torch
from benchmark import STAGES, random_data
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA = torch.cuda.is_available()
STEPS, BATCH = 200, 16


def start(stage, seeds, device, checkpoint=None):
    """What the stage's main part has before the loop, new or put back in place."""
    script, _, build, _ = STAGES[stage]
    torch.manual_seed(0)
    args = script.Args(env="")
    args.batch_size, args.steps = BATCH, 2 * STEPS
    data, betas = random_data(device, 500), 2 if stage == "actor" else 1
    update, model, optimizer, window = build(data, args, device, seeds, betas)
    if checkpoint:
        checkpoint = copy.deepcopy(checkpoint)  # load_state_dict keeps the optimizer's tensors
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        (torch.cuda if CUDA else torch).set_rng_state(checkpoint["rng"])
    return SimpleNamespace(update=update, model=model, optimizer=optimizer, window=window, script=script)


def snapshot(run):
    state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "window": run.window}
    return copy.deepcopy(state) | {"rng": (torch.cuda if CUDA else torch).get_rng_state()}


@pytest.mark.skipif(not CUDA, reason="needs a GPU")
@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("seeds", [1, 6])
@pytest.mark.parametrize("stage", STAGES)
def test_captured_and_eager_runs_agree(stage, seeds, resumed):
    device, checkpoint = torch.device("cuda"), None
    if resumed:
        before = start(stage, seeds, device)
        for _ in range(20):
            before.update()
        checkpoint = snapshot(before)
    ends = []
    for captured in (False, True):
        run = start(stage, seeds, device, checkpoint)
        update = run.script.capture(run.update).__next__ if captured else run.update
        for _ in range(STEPS):
            update()
        ends.append(snapshot(run))
    eager, graph = ends
    torch.testing.assert_close(graph["window"], eager["window"], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(graph["model"], eager["model"], rtol=1e-3, atol=1e-4)


class Device:
    """Stands in for CUDA: what is called while a graph records is kept, and runs when the graph is replayed."""

    def __init__(self, monkeypatch):
        self.ran, self.recorded, self.on_side_stream, self.recording = 0, 0, [], False
        self.current = "main"
        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, stand_in in {
            "Stream": lambda: stream,
            "current_stream": lambda: stream,
            "stream": self.side,
            "CUDAGraph": lambda: SimpleNamespace(replay=self.replay),
            "graph": self.record,
        }.items():
            monkeypatch.setattr(torch.cuda, name, stand_in)

    @contextlib.contextmanager
    def side(self, stream):
        self.current = "side"
        yield
        self.current = "main"

    @contextlib.contextmanager
    def record(self, graph):
        self.recording = True
        yield
        self.recording = False

    def update(self):
        if self.recording:
            self.recorded += 1
        else:
            self.ran += 1
            self.on_side_stream.append(self.current == "side")

    def replay(self):
        assert self.recorded == 1 and not self.recording
        self.ran += 1


@pytest.mark.parametrize("stage", STAGES)
def test_every_call_of_a_captured_update_is_one_step(stage, monkeypatch):
    device = Device(monkeypatch)
    step = STAGES[stage][0].capture(device.update).__next__
    for n in range(1, 9):
        step()
        assert device.ran == n and device.recorded == (n > 3)
    assert device.on_side_stream == [True] * 3  # eager calls come before the recording, beside the main stream


class Operations(TorchDispatchMode):
    """The names of all operations, as they reach the device."""

    def __init__(self):
        super().__init__()
        self.names, self.devices = [], set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.overloadpacket.__name__)
        out = function(*args, **(kwargs or {}))
        self.devices |= {x.device.type for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor)}
        return out


VIEWS = """view _unsafe_view expand t transpose permute slice select unsqueeze squeeze as_strided detach split
split_with_sizes unbind alias""".split()
NO_WORK = {*VIEWS, "empty", "empty_like", "_record_function_enter_new", "_record_function_exit"}


@pytest.mark.parametrize(
    "stage, seeds, betas, most", [("critic", 6, 1, 83), ("behavior", 6, 1, 129), ("actor", 6, 6, 107)]
)
def test_an_update_has_few_operations(stage, seeds, betas, most):
    """On CUDA each is a kernel of some microseconds, and small kernels one after the other are what an update costs."""
    script, _, build, _ = STAGES[stage]
    args = script.Args(env="")
    args.batch_size = BATCH
    update = build(random_data(torch.device("cpu"), 500), args, torch.device("cpu"), seeds, betas)[0]
    update()  # the optimizer has made its state
    with Operations() as seen:
        update()
    assert len([name for name in seen.names if name not in NO_WORK]) <= most


@pytest.mark.parametrize("stage", STAGES)
def test_an_update_neither_waits_for_the_device_nor_copies_to_it(stage):
    """What would break a recording: a value read back, a size that depends on values, a tensor of the host."""
    device = torch.device("cuda" if CUDA else "cpu")
    run = start(stage, 2, device)
    run.update()
    with Operations() as seen:
        assert run.update() is None
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "item"}
    assert not waits & set(seen.names) and {"bmm", "baddbmm"} <= set(seen.names)
    assert seen.devices == {device.type}
    with Operations() as seen:  # it would notice
        run.window.sum().item()
    assert waits & set(seen.names)
