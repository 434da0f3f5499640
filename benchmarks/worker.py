"""One competitor in a process of its own: obeys lines on standard input, answers each by a line of JSON.

    python -m benchmarks.worker KIND MODEL BATCH THREADS DEVICE

``check FILE`` writes logits and gradients of the first step, ``steps N`` answers the seconds that N steps took,
``memory`` the peak resident memory in MiB since the imports. Under mpirun, rank 0 listens for all: "ranks" train
together, of those "apart" each trains a model of its own on a whole batch.
"""

import datetime
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from cnnmpi.distributed import Ranks, start
from cnnmpi.machine import keep_freed_memory
from cnnmpi.models import MODELS, Model
from cnnmpi.optim import SGD

LR, MOMENTUM, DECAY = 0.01, 0.9, 5e-4


def inputs(batch: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return images (batch, 3, 32, 32) in channels-last memory, and labels."""
    draw = np.random.default_rng(0)
    images = draw.standard_normal((batch, 32, 32, 3), dtype=np.float32)
    return images.transpose(0, 3, 1, 2), draw.integers(0, 10, batch)


def resident(what: str) -> float:
    """Return this process's resident memory now (VmRSS) or at its peak (VmHWM), in MiB. Linux only."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith(what))


class Ours:
    """cnnmpi's layers and optimizer, on NumPy or on torch; the kind's last word may be a precision."""

    def __init__(self, kind: str, model: str, batch: int, threads: int, device: str = "cpu") -> None:
        self.model: Model = MODELS[model](seed=0)
        if kind.startswith("torch engine"):
            self.model.to_torch(device, precision=kind.removeprefix("torch engine").strip() or "float32")
            keep_freed_memory()
        self.model.F.set_threads(threads)
        self.model.skip_input_grad()
        self.optimizer = SGD(self.model.parameters(), lr=LR, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY)
        x, y = inputs(batch)
        self.x, self.y = self.model.as_array(x), self.model.as_array(y)

    def gradients(self) -> Any:
        self.model.zero_grad()
        logits = self.model.forward(self.x)
        _, dlogits = self.model.F.cross_entropy_loss(logits, self.y)
        self.model.backward(dlogits)
        return logits

    def step(self) -> None:
        self.gradients()
        self.optimizer.step()

    def check(self) -> dict[str, np.ndarray[Any, Any]]:
        logits = self.model.F.to_numpy(self.gradients()).copy()
        grads = {name: self.model.F.to_numpy(grad) for name, (_, grad) in self.model.named_parameters().items()}
        return {"logits": logits, **grads}


class Torch:
    """torch.nn with autograd: eager, eager channels_last, that with autocast to bfloat16, or compiled."""

    def __init__(self, kind: str, model: str, batch: int, threads: int, device: str = "cpu") -> None:
        import torch

        from benchmarks.torch_twin import torch_twin

        torch.set_num_threads(threads)
        layout = torch.contiguous_format if kind == "torch eager" else torch.channels_last
        twin = torch_twin(MODELS[model](seed=0)).to(device, memory_format=layout)
        x, y = inputs(batch)
        self.x, self.y = torch.from_numpy(x).to(device, memory_format=layout), torch.from_numpy(y).to(device)
        self.twin, self.forward = twin, torch.compile(twin) if kind == "torch compile" else twin
        decayed = [p for p in twin.parameters() if p.ndim > 1]
        others = [p for p in twin.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": DECAY}, {"params": others}]
        self.optimizer = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, nesterov=True)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled="autocast" in kind)

    def gradients(self) -> Any:
        from torch.nn.functional import cross_entropy

        self.optimizer.zero_grad()
        with self.autocast:
            logits = self.forward(self.x)
            loss = cross_entropy(logits, self.y)
        loss.backward()
        return logits

    def step(self) -> None:
        self.gradients()
        self.optimizer.step()

    def check(self) -> dict[str, np.ndarray[Any, Any]]:
        logits = self.gradients().detach().float().cpu().numpy()
        grads = {n: p.grad.cpu().numpy() for n, p in self.twin.named_parameters() if p.grad is not None}
        return {"logits": logits, **grads}


class Trained:
    """cnnmpi's whole trainer, with its data path, augmentation and exact reduction, on all ranks."""

    def __init__(
        self, ranks: Ranks, model: str, batch: int, threads: int, precision: str = "", shards: int | None = None
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        from cnnmpi.train import set_up
        from cnnmpi.train.config import Config

        out = Path(ranks.on_rank0(lambda: self.folder.name)) / "run"
        engine: dict[str, Any] = {"backend": "torch", "precision": precision} if precision else {}
        config = Config(
            model=model, batch_size=batch, shards=shards, threads=threads, data="synthetic", out=out, **engine
        )
        self.trainer = set_up(config, ranks)

    def step(self) -> None:
        if (self.trainer.step + 1) % self.trainer.steps_per_epoch == 0:  # an epoch's last batch may be a small one
            self.trainer.step += 1
        self.trainer.train_step()


def ddp(rank: int, kind: str, model: str, batch: int, port: int) -> None:
    """Run one of two PyTorch DDP processes (gloo), one thread each, half of the batch each; rank 0 listens."""
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=120))
    side = Torch("torch eager" if kind == "ddp" else kind, model, batch // 2, 1)
    side.forward = DistributedDataParallel(side.twin)

    def agree(count: int) -> int:
        asked = torch.tensor([count])
        dist.broadcast(asked, 0)
        return int(asked)

    if rank == 0:
        serve({"steps": lambda count: timed(side.step, agree(int(count)))})
        agree(-1)
    else:
        while (count := agree(0)) >= 0:
            timed(side.step, count)


def timed(step: Callable[[], Any], count: int, device: str = "cpu") -> float:
    """Return the seconds of ``count`` steps, after one that brings this competitor's data back into the caches."""
    step()
    wait_for(device)
    started = time.perf_counter()
    for _ in range(count):
        step()
    wait_for(device)
    return time.perf_counter() - started


def wait_for(device: str) -> None:
    """Return when the device has done all that it was told."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize(device)


def serve(answers: dict[str, Callable[[str], Any]]) -> None:
    """Answer requests until standard input ends."""
    print("answer", json.dumps("ready"), flush=True)
    for line in sys.stdin:
        word, _, argument = line.strip().partition(" ")
        print("answer", json.dumps(answers[word](argument)), flush=True)


def serve_ranks(ranks: Ranks, step: Callable[[], Any]) -> None:
    """Let all ranks do the steps that rank 0 is asked for, and answer the slowest one's time.

    Between requests nobody keeps a core busy.
    """
    asked = np.zeros(1, np.int64)

    def agree(count: int) -> int:
        asked[0] = count
        if ranks.comm is not None:
            request = ranks.comm.Ibcast(asked, root=0)
            while not request.Test():
                time.sleep(0.005)
        return int(asked[0])

    if ranks.rank == 0:
        serve({"steps": lambda count: max(ranks.gather(timed(step, agree(int(count)))))})
        agree(-1)
    else:
        while (count := agree(0)) >= 0:
            ranks.gather(timed(step, count))


def main() -> None:
    kind, model, batch, threads, device = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5]
    if kind.startswith(("ranks", "apart")):
        ranks = start()
        what, precision, shards, *_ = [*kind.split(), "", ""]
        together = ranks if what == "ranks" else Ranks()
        trained = Trained(together, model, batch, threads, precision, int(shards) if shards else None)
        serve_ranks(ranks, trained.step)
        return
    if kind.startswith("ddp"):
        import torch.multiprocessing as mp

        port = 20000 + os.getpid() % 20000
        other = mp.get_context("spawn").Process(target=ddp, args=(1, kind, model, batch, port), daemon=True)
        other.start()
        ddp(0, kind, model, batch, port)
        return
    if kind != "numpy":
        import torch  # noqa: F401 - before the memory is measured
    before = resident("VmRSS")
    side = (Ours if kind.startswith(("numpy", "torch engine")) else Torch)(kind, model, batch, threads, device)
    serve(
        {
            "check": lambda file: np.savez(file, **side.check()),
            "steps": lambda count: timed(side.step, int(count), device),
            "memory": lambda _: resident("VmHWM") - before,
        }
    )


if __name__ == "__main__":
    main()
