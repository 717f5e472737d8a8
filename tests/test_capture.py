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
    """What the stage's main part has before the loop, new or put back in place: update and all that it changes."""
    script, _, build, _ = STAGES[stage]
    torch.manual_seed(0)
    args = script.Args(env="")
    args.batch_size, args.steps = BATCH, 2 * STEPS
    data, betas = random_data(device, 500), 2 if stage == "actor" else 1
    update, model, optimizer, tensors = build(data, args, device, seeds, betas)
    if checkpoint:
        checkpoint = copy.deepcopy(checkpoint)  # load_state_dict keeps the optimizer's tensors
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        for x, value in zip(tensors, checkpoint["tensors"]):
            x.copy_(value)
        (torch.cuda if CUDA else torch).set_rng_state(checkpoint["rng"])
    return SimpleNamespace(update=update, model=model, optimizer=optimizer, tensors=tensors, script=script)


def snapshot(run):
    state = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "tensors": list(run.tensors)}
    return copy.deepcopy(state) | {"rng": (torch.cuda if CUDA else torch).get_rng_state()}


@pytest.fixture
def recorder(monkeypatch):
    """Without CUDA, a graph that runs the update again: the warm-up and what is put back after it are capture's own."""
    calls = []
    if CUDA:
        yield calls
        return

    class Graph:
        def replay(self):
            calls[-1]()

    stream = SimpleNamespace(wait_stream=lambda other: None)
    for name, stand_in in {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "CUDAGraph": Graph,
        "graph": lambda g: contextlib.nullcontext(),
        "get_rng_state": torch.get_rng_state,
        "set_rng_state": torch.set_rng_state,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    yield calls


@pytest.mark.parametrize("resumed", [False, True])
@pytest.mark.parametrize("seeds", [1, 6])
@pytest.mark.parametrize("stage", STAGES)
def test_captured_and_eager_runs_agree(stage, seeds, resumed, recorder):
    device = torch.device("cuda" if CUDA else "cpu")
    checkpoint = None
    if resumed:
        before = start(stage, seeds, device)
        for _ in range(20):
            before.update()
        checkpoint = snapshot(before)
    ends = []
    for captured in (False, True):
        run = start(stage, seeds, device, checkpoint)
        update = run.update
        if captured:
            recorder.append(run.update)
            update = run.script.capture(update, run.optimizer, *run.tensors, *run.model.state_dict().values())
        for _ in range(STEPS if CUDA else 10):
            update()
        ends.append(snapshot(run))
    eager, graph = ends
    if not CUDA:  # the same kernels in the same order
        torch.testing.assert_close(graph, eager, rtol=0, atol=0)
    else:
        torch.testing.assert_close(graph["tensors"], eager["tensors"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(graph["model"], eager["model"], rtol=1e-3, atol=1e-4)


def test_a_run_without_the_repair_would_differ(recorder):
    """The warm-up of capture does change weights: leaving a tensor out is noticed."""
    run = start("critic", 1, torch.device("cuda" if CUDA else "cpu"))
    recorder.append(run.update)
    before = snapshot(run)
    run.script.capture(run.update, run.optimizer)
    assert any(not torch.equal(x, before["model"][name]) for name, x in run.model.state_dict().items())


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
        run.tensors[0].sum().item()
    assert waits & set(seen.names)
