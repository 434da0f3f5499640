"""The profile: what is charged to whom, by a clock of the tests; operations, bytes, advice, tables and the page."""

import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from cnnmpi import SGD, Conv2d, Flatten, GlobalAvgPool2d, Linear, Model, ReLU, Residual, Sequential, SimpleCNN, machine
from cnnmpi import layers as L
from cnnmpi.__main__ import main as cnnmpi
from cnnmpi.functional import cross_entropy_loss
from cnnmpi.profile import Calls, LayerCost, Profile, Step, count_flops, measure, timed
from cnnmpi.profile import advice as advice_module
from cnnmpi.profile.__main__ import main
from cnnmpi.profile.advice import advice
from cnnmpi.profile.pages import profile_page
from cnnmpi.profile.show import by_kind, cells, head, rows_of

MIB = 1 << 20


class Clock:
    """A clock that stands still but for what a layer adds to it."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(L.Layer):
    """y = x, in so many seconds of the test's clock."""

    def __init__(self, clock: Clock, forward: float, backward: float) -> None:
        super().__init__()
        self.clock, self.took = clock, (forward, backward)

    def forward(self, x):
        self.clock.now += self.took[0]
        return self._keep((x, ()))

    def backward(self, dout):
        self.clock.now += self.took[1]
        self._taken(dout)
        return dout


class Wired(Model):
    """Wiring of its own, which takes time itself, and calls a layer past the container that holds it."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.body = Residual(Sequential(Slow(clock, 1, 2), Slow(clock, 4, 8)), Slow(clock, 16, 32))
        self.box = Sequential(Slow(clock, 64, 128))
        self.flatten, self.head = Flatten(), Linear(12, 3)

    def forward(self, x):
        self.clock.now += 256
        return self.head.forward(self.flatten.forward(self.box[0].forward(self.body.forward(x))))

    def backward(self, dout):
        self.clock.now += 512
        return self.body.backward(self.box[0].backward(self.flatten.backward(self.head.backward(dout))))


def a_step(model: Model, shape=(4, 3, 2, 2), shards: int = 1, loss=cross_entropy_loss) -> Step:
    images = np.random.default_rng(0).standard_normal(shape, np.float32)
    return Step(model, images, np.arange(len(images)) % 3, loss, SGD(model.parameters(), lr=0.1), shards)


def small_net() -> Model:
    class Net(Model):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = Conv2d(3, 8, 3, padding=1), ReLU()
            self.body = Residual(Sequential(Conv2d(8, 8, 3, padding=1), L.BatchNorm(8, relu=True)))
            self.pool, self.head = GlobalAvgPool2d(), Linear(8, 3)

    return Net()


# -- time --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shards", [1, 2])
def test_every_second_is_charged_to_who_takes_it(shards):
    clock = Clock()
    model = Wired(clock)

    def loss(logits, targets, reduction):
        clock.now += 1024
        return cross_entropy_loss(logits, targets, reduction=reduction)

    step = a_step(model, shards=shards, loss=loss)
    update, zero = step.optimizer.step, step.optimizer.zero_grad

    def slow_update() -> None:
        clock.now += 2048
        update()

    def slow_zero() -> None:
        clock.now += 4096
        zero()

    step.optimizer.step, step.optimizer.zero_grad = slow_update, slow_zero
    started = clock.now
    step()
    whole = clock.now - started
    profile = measure(step, seconds=1, clock=clock)
    took = {layer.name: (layer.forward, layer.backward) for layer in profile.layers if layer.seconds}
    assert took == {
        "": (256 * shards, 512 * shards),
        "body.body.0": (1 * shards, 2 * shards),
        "body.body.1": (4 * shards, 8 * shards),
        "body.shortcut": (16 * shards, 32 * shards),
        "box.0": (64 * shards, 128 * shards),
    }
    assert (profile.loss, profile.optimizer, profile.rest) == (1024 * shards, 2048, 4096 * shards)
    assert profile.seconds == whole
    assert step.optimizer.step is slow_update  # what an instance had of its own is there again


def test_the_parts_of_a_real_step_add_up_to_it():
    ticks = iter(range(10**9))  # each look at the clock takes a second: the step takes as many as there were looks
    step = a_step(small_net(), (8, 3, 8, 8), shards=2)
    profile = measure(step, seconds=0.1, clock=lambda: float(next(ticks)))
    calls = 2 * 2 * len(profile.layers) + 2 + 1  # two passes of two shards, two losses, one update
    assert profile.seconds == 2 * calls + 1  # each begins and ends, and so does the step
    parts = [layer.seconds for layer in profile.layers] + [profile.loss, profile.optimizer, profile.rest]
    assert math.isclose(math.fsum(parts), profile.seconds, rel_tol=1e-12)
    for costs in (by_kind(profile), rows_of(profile)):
        column = head(profile, "layer").index("ms")
        *rows, whole = [float(row[column]) for row in cells(costs, profile, 1e9)]
        assert sum(rows) == pytest.approx(whole, abs=0.01 * len(rows))


def test_the_steps_are_added_up_once(monkeypatch):
    clock, sums = Clock(), []
    real = sys.modules["cnnmpi.profile.measure"]._sum
    monkeypatch.setattr(sys.modules["cnnmpi.profile.measure"], "_sum", lambda spent: sums.append(spent) or real(spent))
    model = Wired(clock)
    a_step(model)()
    whole, clock.now = clock.now, 0.0
    _, steps = timed(a_step(model), seconds=50 * whole, clock=clock)
    assert steps == 50 and len(sums) == 2 * steps  # as each ends, and to sort them


def test_the_slower_half_does_not_count():
    clock, took = Clock(), iter([1, 10, 7, 100, 5, 3])

    class Uneven(Model):
        def __init__(self) -> None:
            super().__init__()
            self.flatten, self.head = Flatten(), Linear(12, 3)

        def forward(self, x):
            clock.now += next(took)
            return super().forward(x)

        def backward(self, dout):
            return self.flatten.backward(self.head.backward(dout))

    step = a_step(Uneven())
    step()  # the first, of 1 s
    times, steps = timed(step, seconds=124, clock=clock)
    assert steps == 5 and times["", "forward"] == (3 + 5 + 7) / 3 and sum(times.values()) == 5


def test_nothing_is_left_on_the_layers_also_after_an_error():
    model = small_net()
    step = a_step(model, (4, 3, 8, 8))
    weights = {name: array.copy() for name, array in model.named_parameters().items() for array in array[:1]}
    measure(step, seconds=0.01)
    assert all(np.array_equal(weights[name], param) for name, (param, _) in model.named_parameters().items())

    def broken(dout):
        raise ArithmeticError

    model.relu.backward = broken
    with pytest.raises(ArithmeticError):
        measure(step, seconds=0.01)
    assert model.relu.backward is broken
    del model.relu.backward
    assert not any({"forward", "backward"} & set(vars(layer)) for _, layer in model.walk())
    assert "loss" in vars(step) and "step" not in vars(step.optimizer)


@pytest.mark.parametrize("shards", [0, 5])
def test_shards_without_images_are_refused(shards):
    with pytest.raises(ValueError, match=f"4 images cannot be cut into {shards} shards"):
        a_step(small_net(), (4, 3, 8, 8), shards=shards)


# -- operations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "shape", "products"),
    [  # multiplications of the forward pass: outputs, and what each is a sum of
        (L.Conv2d(4, 6, 3, padding=1), (2, 4, 5, 7), 2 * 6 * 5 * 7 * 4 * 9),
        (L.Conv2d(4, 6, (3, 2), stride=2), (2, 4, 7, 6), 2 * 6 * 3 * 3 * 4 * 6),
        (L.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 5, 7), 2 * 4 * 5 * 7 * 9),
        (L.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 7), 2 * 6 * 3 * 5 * 2 * 9),
        (L.ConvTranspose2d(3, 2, 3, 2, 1, 1), (2, 3, 4, 5), 2 * 3 * 4 * 5 * 2 * 9),  # each input goes to 9 places
        (L.Whitening(3, 6), (2, 3, 5, 7), 2 * 6 * 5 * 7 * 3 * 9),
        (L.Linear(12, 5), (2, 12), 2 * 5 * 12),
        (L.ReLU(), (2, 3, 2, 2), 0),
    ],
    ids=repr,
)
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_operations_are_those_of_direct_convolution(layer, shape, products, frozen, first):
    class Net(Model):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.flatten = layer, Flatten()
            size = math.prod(layer.forward(np.zeros(shape, np.float32)).shape[1:])
            self.head = Linear(size, 3)

    net = Net()
    layer.unfreeze()
    layer.input_grad = not first
    if frozen:
        layer.freeze()
    flops = count_flops(a_step(net, shape))
    backward = int(not first) + int(not layer.frozen)
    expected = {("layer", "forward"): 2.0 * products, ("layer", "backward"): 2.0 * products * backward}
    assert {place: flops.get(place, 0.0) for place in expected} == expected
    assert count_flops(a_step(net, shape, shards=2)) == flops


def test_simplecnn_has_the_multiply_adds_that_the_readme_says():
    flops = count_flops(a_step(SimpleCNN(), (2, 3, 32, 32)))
    forward = sum(count for (_, direction), count in flops.items() if direction == "forward")
    assert forward / 2 / 2 == pytest.approx(5.6e6, rel=0.01)


def test_a_layer_that_is_called_by_keywords_is_counted():
    class Net(Model):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.flatten, self.head = L.ConvTranspose2d(3, 4, 2, 2), Flatten(), Linear(64, 3)

        def forward(self, x):
            return self.head.forward(x=self.flatten.forward(self.up.forward(x=x)))

        def backward(self, dout):
            return self.up.backward(dout=self.flatten.backward(dout=self.head.backward(dout=dout)))

    flops = count_flops(a_step(Net()))
    assert flops["up", "forward"] == 2 * 4 * 3 * 2 * 2 * 4 * 4  # of its input
    assert flops["head", "forward"] == 2 * 4 * 64 * 3
    seen = []
    layer = L.Identity()

    def forward(mask, x):
        return x

    layer.forward = forward
    with Calls(lambda place: None) as calls:
        calls.watch(layer, "forward", ("", "forward"), lambda argument, result: seen.append((argument, result)))
        layer.forward(x=2, mask=1)
    assert seen == [(1, 2)]


# -- memory ------------------------------------------------------------------------------------------------------------


class Hoarder(L.Layer):
    """y = x; keeps so many bytes until backward, takes ``more`` meanwhile, and may keep another's, too."""

    def __init__(self, size: int, more: int = 0, other: "Hoarder | None" = None) -> None:
        super().__init__()
        self.size, self.more = size, more
        object.__setattr__(self, "other", (other,) if other else ())
        self.lists = ("other",)

    def forward(self, x):
        np.ones(self.more, np.uint8)
        self.held = [np.ones(self.size, np.uint8), *(each.held[0][1:] for each in self.other)]
        return x

    def backward(self, dout):
        self.held = []
        return dout


def test_bytes_are_counted_once_and_the_peak_where_it_is():
    class Net(Model):
        def __init__(self) -> None:
            super().__init__()
            self.first = Hoarder(MIB, more=5 * MIB)
            self.second = Hoarder(2 * MIB, other=self.first)
            self.flatten, self.head = Flatten(), Linear(12, 3)

    profile = measure(a_step(Net()), seconds=0.01)
    costs = {layer.name: layer for layer in profile.layers}
    assert (costs["first"].kept, costs["second"].kept) == (MIB, 2 * MIB)
    assert costs["head"].kept < 1000 and 3 * MIB <= profile.kept < 3.1 * MIB
    assert 5 * MIB <= costs["first"].peak < 5.1 * MIB and 3 * MIB <= costs["second"].peak < 3.1 * MIB
    assert profile.peak == costs["first"].peak


def test_what_layers_keep_is_what_numpy_says_is_kept():
    profile = measure(a_step(small_net(), (16, 3, 32, 32)), seconds=0.01)
    named = sum(layer.kept for layer in profile.layers)
    assert 0.95 * profile.kept < named <= profile.kept < profile.peak


# -- advice ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch) -> dict[str, float]:
    """No variable that forces BLAS, two cores, and comparisons that come out as the test says."""
    seconds = {"one": 1.0, "many": 0.5, "larger": 1.0, "given": 1.0}

    def compare(step, ways, seconds_each=1.0):
        for prepare in ways.values():
            prepare()
            step()
        return {name: seconds[name] for name in ways}

    for name in machine.FORCING_BLAS:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("cnnmpi.profile.__main__.matrix_peak", lambda *arguments: 1e9)
    monkeypatch.setattr(advice_module, "compare", compare)
    monkeypatch.setattr(advice_module, "usable_cores", lambda: 2)
    return seconds


def told(step: Step, threads: int = 1, peak: float = 1e9, **seconds: float) -> list[str]:
    """Advice on a profile in which the layers of these names take so many of 1 s."""
    layers = [
        LayerCost(name, type(layer).__name__, repr(layer), True, seconds.get(name, 0.0), 0.0, forward_flops=flops)
        for name, layer in step.model.walk()
        for flops in [1e7 if name in ("conv", "head") else 0.0]
    ]
    rest = 1.0 - sum(layer.seconds for layer in layers)
    return advice(step, Profile(tuple(layers), 0.0, 0.0, rest, 4, 1, 4), threads, peak)


def test_a_healthy_network_gets_no_advice(quiet):
    step = a_step(small_net(), (8, 3, 8, 8), shards=8)
    assert told(step, threads=2, conv=0.2, relu=0.3) == []
    assert len(step.shards) == 8


def test_each_advice_is_given_where_it_is_due(quiet, monkeypatch):
    step = a_step(small_net(), (16, 3, 8, 8), shards=8)
    assert told(step, conv=0.3, peak=1e8) == []  # 33 % of the peak
    assert re.match(r"conv Conv2d\(.*\) takes 30% of the step at 3% of a matrix", *told(step, conv=0.3))
    assert re.match(r"relu ReLU\(\) takes 50% of the step, and no matrix product is in it", *told(step, relu=0.5))
    assert re.match("--threads 3 are more than the 2 cores", *told(step, threads=3))
    quiet |= {"many": 1.0}
    assert re.match("--threads 2 do not help here: a step takes 1000.0 ms", *told(step, threads=2))
    quiet |= {"larger": 0.5}
    assert re.match("shards of 2 images are slow: 16 images/s, those of 8 32 images/s", *told(step))
    assert len(step.shards) == 8
    step.cut(1)
    assert told(step) == []  # nothing larger


def test_only_layers_whose_operations_are_known_are_spoken_of(quiet):
    class Product(Linear):  # computes more than is counted
        pass

    class Own(L.Layer):
        def forward(self, x):
            return self._keep((x @ np.eye(x.shape[1], dtype=x.dtype), ()))

        def backward(self, dout):
            self._taken(dout)
            return dout

    class Net(Model):
        def __init__(self) -> None:
            super().__init__()
            self.flatten, self.own, self.relu, self.head = Flatten(), Own(), ReLU(), Product(12, 3)

    step = a_step(Net())
    assert told(step, own=0.9) == [] and told(step, head=0.9) == []
    assert len(told(step, relu=0.9)) == 1


def test_a_forced_blas_is_named_only_where_other_kernels_run(quiet, monkeypatch):
    step = a_step(small_net(), (4, 3, 8, 8))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]) + os.pathsep + os.environ.get("PYTHONPATH", ""))
    monkeypatch.setattr(advice_module, "blas_kernels", lambda: "openblas Prescott")
    assert told(step) == []  # nothing forces it
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Prescott")
    assert re.match("OPENBLAS_CORETYPE=Prescott lets matrix products run by the kernels openblas Prescott", *told(step))
    code = "from cnnmpi.machine import blas_kernels; print(blas_kernels())"
    free = {name: value for name, value in os.environ.items() if name not in machine.FORCING_BLAS}
    own = subprocess.run([sys.executable, "-c", code], env=free, capture_output=True, text=True, check=True).stdout
    monkeypatch.setattr(advice_module, "blas_kernels", lambda: own.strip())
    assert told(step) == []


def test_float64_is_named(quiet):
    class Doubling(L.Layer):
        def forward(self, x):
            return x * np.float64(2)

        def backward(self, dout):
            return np.float32(2) * dout

    net = small_net()
    net.pool = Sequential(GlobalAvgPool2d(), L.Identity())
    step = a_step(net, (4, 3, 8, 8))
    assert told(step) == []

    class Tail(Model):
        def __init__(self) -> None:
            super().__init__()
            self.flatten, self.head, self.tail = Flatten(), Linear(12, 3), Doubling()

    assert re.match(r"tail Doubling\(\) makes float64 of float32", *told(a_step(Tail())))


# -- the command -------------------------------------------------------------------------------------------------------

NETWORK = """
import numpy as np
from cnnmpi import Conv2d, Flatten, Layer, Linear, Model, Residual, Sequential


class Odd(Layer):
    def forward(self, x):
        return self._keep((x, ()))

    def backward(self, dout):
        self._taken(dout)
        return dout

    def __repr__(self):
        return "Odd(<script>)"


class Net(Model):
    recipe = {"batch_size": 12, "shards": 3}

    def __init__(self, in_channels=3, num_classes=10, image_size=32, width=4):
        super().__init__()
        self.body = Residual(Sequential(Conv2d(in_channels, in_channels, 3, padding=1), Odd()))
        self.flatten, self.head = Flatten(), Linear(in_channels * image_size**2, num_classes)
        self.width = width

    def forward(self, x):
        return self.head.forward(self.flatten.forward(self.body.forward(x)))

    def backward(self, dout):
        return self.body.backward(self.flatten.backward(self.head.backward(dout)))


class Numbers(Net):
    recipe = {"loss": "mse", "batch_size": 12, "shards": 3}


class Labels(Net):
    recipe = {"loss": "binary_cross_entropy", "batch_size": 12, "shards": 3}


class Fails(Net):
    def forward(self, x):
        if abs(x).max() > 1:  # not yet where a few even images are tried
            raise RuntimeError("too bright")
        return super().forward(x)
"""


@pytest.fixture
def network(tmp_path) -> str:
    (tmp_path / "net_to_profile.py").write_text(NETWORK)
    return str(tmp_path / "net_to_profile.py")


class Boxes(HTMLParser):
    """Checks, of an icicle, that the boxes of a row are together as wide as the box above; collects their titles."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[list[float]] = []  # for each open div: its width, and those of the boxes below it
        self.titles: list[str] = []
        self.checked, self.scripts = 0, 0

    def handle_starttag(self, tag: str, attributes: list) -> None:
        given = dict(attributes)
        self.scripts += tag == "script" or any(name.startswith("on") for name in given)
        if tag == "b" and "title" in given:
            self.titles.append(given["title"])
        if tag == "div":
            width = re.match(r"flex: (\d+) 1 0", given.get("style", ""))
            self.inside.append([float(width[1]) if width else math.nan, 0.0, 0])

    def handle_endtag(self, tag: str) -> None:
        if tag != "div":
            return
        width, below, count = self.inside.pop()
        if not self.inside:
            return
        if math.isnan(width):  # a row hands on what is in it
            self.inside[-1][1] += below
            self.inside[-1][2] += count
        else:
            if count:
                assert abs(width - below) <= count  # whole nanoseconds
                self.checked += 1
            self.inside[-1][1] += width
            self.inside[-1][2] += 1


def test_the_command_profiles_a_network_of_ones_own_and_writes_a_page(network, tmp_path, capsys):
    arrays, page = tmp_path / "mine.npz", tmp_path / "page.html"
    x, y = np.random.default_rng(0).random((40, 8, 8, 1), np.float32), np.arange(40, dtype=np.float32)[:, None]
    np.savez(arrays, x=x.transpose(0, 3, 1, 2), y=y)
    arguments = ["--model", f"{network}:Net", "--data", str(arrays), "--seconds", "0.05", "--out", str(page)]
    assert cnnmpi(["profile", *arguments, "--model-options", '{"width": 5}']) == 0
    printed = capsys.readouterr().out
    assert re.search("a step of 12 images of 1x8x8 in 3 shards, 1 thread, numpy float32", printed)
    names = [line.split()[0] for line in printed.split("\n\n")[1].splitlines()]
    assert {"body.body.0", "body.body.1", "flatten", "head", "loss", "optimizer", "rest", "step"} <= set(names)
    text = page.read_text()
    boxes = Boxes()
    boxes.feed(text)
    assert boxes.checked > 4 and boxes.scripts == 0 and "<script" not in text
    assert any(title.startswith("body.body.1 Odd(<script>) backward: ") for title in boxes.titles)


@pytest.mark.parametrize("name", ["Numbers", "Labels"])
def test_targets_are_of_the_kind_that_the_loss_takes(quiet, network, capsys, name):
    assert main(["--model", f"{network}:{name}", "--shape", "3", "8", "8", "--seconds", "0.01"]) == 0
    assert "a step of 12 images of 3x8x8" in capsys.readouterr().out


def test_winograd_is_named_only_where_it_computes(quiet, network, capsys):
    small = ["--batch-size", "8", "--shards", "2", "--seconds", "0.01", "--shape", "3", "8", "8"]
    for arguments, named in (([], True), (["--model", f"{network}:Net"], False), (["--backend", "torch"], False)):
        if "torch" in arguments:
            pytest.importorskip("torch")
        assert main([*small, *arguments]) == 0
        assert ("Winograd's convolutions exceed that" in capsys.readouterr().out) == named


@pytest.mark.parametrize("name", ["net_to_profile.py", "link.py", "data.npz", "gone/page.html", "-", "."])
def test_a_page_that_cannot_be_written_is_known_before_anything_is_measured(
    network, tmp_path, capsys, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    Path("link.py").symlink_to("net_to_profile.py")
    np.savez("data.npz", x=np.zeros((20, 3, 8, 8), np.float32), y=np.arange(20) % 2)
    before = {path: path.read_bytes() for path in Path().iterdir()}
    monkeypatch.setattr("cnnmpi.profile.__main__.measure", lambda *arguments: pytest.fail("too late"))
    assert main(["--model", "net_to_profile.py:Net", "--data", "data.npz", "--out", name]) == 2
    out, err = capsys.readouterr()
    assert out.startswith("converting data.npz") and out.count("\n") == 1
    assert err.startswith(f"cnnmpi.profile: error: --out {name}: ") and err.count("\n") == 1
    kept = {path: path.read_bytes() for path in Path().iterdir() if path in before}
    assert kept == before and not list(Path().glob(".*.tmp"))


def test_a_page_with_advice_shows_it_escaped():
    net = small_net()
    net.pool = Sequential(Sequential(), GlobalAvgPool2d())  # a class of which one is a leaf, and one is not
    profile = measure(a_step(net, (4, 3, 8, 8)), seconds=0.01)
    assert "<li>a &lt;b&gt;</li>" in profile_page("t", "told", profile, 1e9, ["a <b>"])
    assert "Advice" not in profile_page("t", "told", profile, 1e9, [])


def test_torch_is_profiled_without_bytes(capsys):
    pytest.importorskip("torch")
    small = ["--batch-size", "8", "--shards", "2", "--seconds", "0.05", "--shape", "3", "16", "24", "--classes", "7"]
    assert main([*small, "--backend", "torch", "--precision", "bfloat16"]) == 0
    printed = capsys.readouterr().out
    assert "8 images of 3x16x24 in 2 shards, 1 thread, torch bfloat16" in printed
    assert "Linear" in printed and "peak MiB" not in printed
    assert main(small) == 0
    assert "peak MiB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--model", "nonet"], "--model must be one of"),
        (["--threads", "0"], "--threads"),
        (["--seconds", "nan"], "--seconds"),
        (["--seconds", "0"], "--seconds"),
        (["--batch-size", "0"], "--batch-size must be a number of at least 1"),
        (["--batch-size", "4", "--shards", "5"], "--shards 5 are more than the 4 images"),
        (["--shape", "3", "0", "32"], "--shape and --classes"),
        (["--classes", "0"], "--shape and --classes"),
        (["--shape", "3", "2", "2"], "--model simplecnn cannot be built"),
        (["--shape", "3", "2000000", "2000000"], "MiB are free: choose fewer, or smaller ones"),
        (["--batch-size", "1000000000"], "1000000000 images of 3x32x32 and 10 outputs each take 11,"),
        (["--classes", "100000000000"], "MiB are free: choose fewer, or smaller ones"),
        (["--data", "nothing.h5"], "nothing.h5"),
        (["--precision", "bfloat16"], "--precision bfloat16 needs --backend torch"),
        (["--model", "FILE:Fails"], "--model FILE:Fails fails in a step: RuntimeError: too bright ("),
        (["--model", "FILE:Net", "--out", "/dev/null/page.html"], "/dev/null/page.html"),
    ],
)
def test_a_mistake_is_one_line_and_code_2(arguments, line, network, capsys):
    arguments = [argument.replace("FILE", network) for argument in arguments]
    assert main(["--seconds", "0.01", *arguments] if "--seconds" not in arguments else arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("cnnmpi.profile: error: ") and error.count("\n") == 1
    assert line.replace("FILE", network) in error
