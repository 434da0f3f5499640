"""A depthwise 3x3 convolution, forward and backward, beside torch.nn's: 64 channels, 32x32 pixels, one thread.

python -m benchmarks.depthwise [--batch 128]
"""

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.rounds import hardware, refuse_slow_blas
from cnnmpi.layers import Conv2d

CHANNELS, SIZE, ROUNDS = 64, 32, 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=128)
    batch = parser.parse_args().batch
    refuse_slow_blas()
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    x = draw.standard_normal((batch, SIZE, SIZE, CHANNELS), dtype=np.float32).transpose(0, 3, 1, 2)
    dout = draw.standard_normal((batch, SIZE, SIZE, CHANNELS), dtype=np.float32).transpose(0, 3, 1, 2)
    layer = Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)
    twin = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS).to(memory_format=torch.channels_last)
    x_torch, dout_torch = (torch.from_numpy(a).contiguous(memory_format=torch.channels_last) for a in (x, dout))
    x_torch.requires_grad_()

    def ours() -> None:
        layer.zero_grad()
        layer.forward(x)
        layer.backward(dout)

    def torchs() -> None:
        x_torch.grad = twin.weight.grad = twin.bias.grad = None
        twin(x_torch).backward(dout_torch)

    def seconds(body: Callable[[], None]) -> float:
        started = time.perf_counter()
        body()
        return time.perf_counter() - started

    for body in (ours, torchs):  # memory and kernels settle
        body()
    rounds = [(seconds(ours), seconds(torchs)) for _ in range(ROUNDS)]
    numpy_ms, torch_ms = (1000 * statistics.median(column) for column in zip(*rounds, strict=True))
    ratio = statistics.median(one / other for one, other in rounds)
    print(hardware())
    print(f"batch {batch}: NumPy {numpy_ms:.1f} ms, torch channels_last {torch_ms:.1f} ms, {ratio:.2f} times its time")


if __name__ == "__main__":
    main()
