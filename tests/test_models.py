"""Models: against torch.nn with autograd over several steps, on both engines; custom wiring; state and its errors."""

import copy
import pickle

import numpy as np
import pytest

import cnnmpi
from cnnmpi import layers as L
from cnnmpi import optim
from cnnmpi.functional import cross_entropy_loss
from cnnmpi.models import MODELS, FlatArrays, Model, SimpleCNN, SmallResNet

torch = pytest.importorskip("torch")
nn = torch.nn
from benchmarks.torch_twin import torch_twin  # noqa: E402 - it imports torch


class TorchSimpleCNN(nn.Module):
    def __init__(self, size=32, classes=10):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(),
        )  # fmt: skip
        self.classifier = nn.Linear(64 * (size // 4) ** 2, classes)

    def forward(self, x):
        return self.classifier(self.features(x).flatten(1))


def gradients(model: Model) -> np.ndarray:
    """All gradients in one NumPy array."""
    return np.concatenate([model.F.to_numpy(grad).ravel() for _, grad in model.parameters()])


def bits(model: Model) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in model.state_dict().items()}


def small(name, **options):
    """A reference model; the large ones with fewer channels, which take less time to the same end."""
    return MODELS[name](**options, **({"width": 8} if name in ("resnet18", "mobilenet") else {}))


def batch(n=6, size=32, seed=0):
    draw = np.random.default_rng(seed)
    return draw.standard_normal((n, 3, size, size)).astype(np.float32), draw.integers(0, 10, n)


@pytest.mark.mpi_skip  # slow, and the same on each rank
@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize("name", MODELS)
def test_five_steps_equal_torch_autograd(name, engine):
    """In float64, where nothing but a wrong formula can make a difference of 1e-9."""
    model = small(name, seed=3).astype(np.float64)
    twin = torch_twin(model).double().train()
    if engine == "torch":
        model.to_torch()
    mine = optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, decay_all=True, weight_decay=1e-3)
    reference = torch.optim.SGD(twin.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3)
    for step in range(5):
        x, y = batch(seed=step)
        x = x.astype(np.float64)
        mine.zero_grad()
        inputs, targets = (x, y) if engine == "numpy" else (torch.from_numpy(x), torch.from_numpy(y))
        loss, dlogits = model.F.cross_entropy_loss(model.forward(inputs), targets)
        model.backward(dlogits)
        mine.step()
        reference.zero_grad()
        expected = nn.functional.cross_entropy(twin(torch.from_numpy(x)), torch.from_numpy(y))
        expected.backward()
        reference.step()
        assert abs(loss - expected.item()) < 1e-9
    state = twin.state_dict()
    for key, array in model.state_dict().items():
        np.testing.assert_allclose(array, state[key].numpy(), rtol=0, atol=1e-9, err_msg=key)
    model.eval()
    with torch.no_grad():
        logits = model.F.to_numpy(model.forward(inputs))
        np.testing.assert_allclose(logits, twin.eval()(torch.from_numpy(x)).numpy(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("name", MODELS)
def test_the_engines_agree_in_float32(name):
    """One step. Besides rounding, a value at the kink of a ReLU or pool may fall on its other side: 1 % of the norm."""
    grads = []
    for engine in ("numpy", "torch"):
        model = small(name, seed=3)
        x, y = batch(n=16)
        if engine == "torch":
            model.to_torch()
            x, y = torch.from_numpy(x), torch.from_numpy(y)
        _, dlogits = model.F.cross_entropy_loss(model.forward(x), y)
        model.backward(dlogits)
        grads.append(gradients(model))
    assert np.linalg.norm(grads[0] - grads[1]) < 1e-2 * np.linalg.norm(grads[0])


def test_simple_cnn_is_the_documented_network():
    model, twin = SimpleCNN(seed=1), TorchSimpleCNN()
    twin.load_state_dict({name: torch.from_numpy(a) for name, a in model.state_dict().items()}, strict=True)
    x, _ = batch()
    np.testing.assert_allclose(model.forward(x), twin(torch.from_numpy(x)).detach().numpy(), atol=1e-5)
    assert sum(param.size for param, _ in model.parameters()) == 60_362


def test_switching_engines_keeps_every_bit_and_a_living_optimizer():
    model, pure = SmallResNet(seed=2, widths=(4, 4, 8, 8)), SmallResNet(seed=2, widths=(4, 4, 8, 8))
    before = model.state_dict()
    optimizer = optim.Adam(model.parameters(), lr=0.01)
    reference = optim.Adam(pure.parameters(), lr=0.01)
    for step in range(6):
        if step == 2:
            assert model.to_torch().use_torch and model.stem.use_torch
        if step == 4:
            assert not model.to_numpy().use_torch
        x, y = batch(size=16, seed=step)
        for net, opt in ((model, optimizer), (pure, reference)):
            convert = torch.from_numpy if net.use_torch else np.asarray
            opt.zero_grad()
            _, d = net.F.cross_entropy_loss(net.forward(convert(x)), convert(y))
            net.backward(d)
            opt.step()
    for key, array in model.state_dict().items():
        assert not np.array_equal(array, before[key]) or "running" in key or key == "stem.0.weight"
        # Adam divides by the root of the squared gradient: where that is tiny, rounding moves a whole step of 0.01
        np.testing.assert_allclose(array, pure.state_dict()[key], atol=5e-3, err_msg=key)
    frozen = model.state_dict()
    model.to_torch().to_numpy()
    for key, array in model.state_dict().items():
        assert array.tobytes() == frozen[key].tobytes()


class Fork(Model):
    """A custom model, wired by hand: two branches over one trunk, concatenated."""

    def __init__(self):
        super().__init__()
        draw = np.random.default_rng(0)
        self.trunk = L.Conv2d(3, 4, 3, padding=1, rng=draw)
        self.left = L.Sequential(L.ReLU(), L.GlobalAvgPool2d())
        self.right = L.Sequential(L.MaxPool2d(4), L.Flatten())
        self.head = L.Linear(4 + 16, 10, rng=draw)

    def forward(self, x):
        h = self.trunk.forward(x)
        return self.head.forward(np.concatenate([self.left.forward(h), self.right.forward(h)], axis=1))

    def backward(self, dout):
        d = self.head.backward(dout)
        return self.trunk.backward(self.left.backward(d[:, :4]) + self.right.backward(np.ascontiguousarray(d[:, 4:])))


def test_a_custom_model_with_hand_wired_backward():
    model = Fork()
    x, y = batch(size=8)
    parameters = {name: torch.from_numpy(a.copy()).requires_grad_() for name, a in model.state_dict().items()}
    tx = torch.from_numpy(x).requires_grad_()
    h = nn.functional.conv2d(tx, parameters["trunk.weight"], parameters["trunk.bias"], padding=1)
    both = torch.cat([h.relu().mean((2, 3)), nn.functional.max_pool2d(h, 4).flatten(1)], dim=1)
    logits = both @ parameters["head.weight"].T + parameters["head.bias"]
    nn.functional.cross_entropy(logits, torch.from_numpy(y)).backward()
    model.skip_input_grad()  # must not touch a model that is not a plain chain
    _, dlogits = cross_entropy_loss(model.forward(x), y)
    np.testing.assert_allclose(model.backward(dlogits), tx.grad.numpy(), atol=1e-6)
    for name, (_, grad) in model.named_parameters().items():
        np.testing.assert_allclose(grad, parameters[name].grad.numpy(), atol=1e-5, err_msg=name)
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    first, _ = cross_entropy_loss(model.forward(x), y)
    for _ in range(20):
        model.zero_grad()
        loss, dlogits = cross_entropy_loss(model.forward(x), y)
        model.backward(dlogits)
        optimizer.step()
    assert loss < first


def test_the_flat_arrays_are_the_parameters():
    model = SimpleCNN(in_channels=1, num_classes=3, image_size=8)
    names = list(model.named_parameters())
    assert names[:2] == ["features.0.weight", "features.0.bias"] and names[-1] == "classifier.bias"
    before, flat = bits(model), FlatArrays(model)
    assert bits(model) == before
    flat.params[...] = np.arange(flat.params.size)
    assert model.features[0].params["bias"][0] == 32 * 9
    for param, grad in model.parameters():
        assert np.shares_memory(param, flat.params) and np.shares_memory(grad, flat.grads)
    model.parameters()[0][1][...] = 1
    assert flat.grads.sum() == 32 * 9
    model.zero_grad()
    assert not flat.grads.any()
    other = SimpleCNN(in_channels=1, num_classes=3, image_size=8, seed=1)
    shared = FlatArrays(other, flat)
    assert bits(other) == bits(model) and not np.shares_memory(shared.grads, flat.grads)


@pytest.mark.parametrize("name", MODELS)
def test_skip_input_grad_changes_only_dx(name):
    one, two = small(name, image_size=16), small(name, image_size=16)
    two.skip_input_grad()
    x, y = batch(size=16)
    outputs = []
    for model in (one, two):
        _, dlogits = cross_entropy_loss(model.forward(x), y)
        outputs.append(model.backward(dlogits))
    assert outputs[0].shape == x.shape and outputs[1] is None
    np.testing.assert_array_equal(gradients(one), gradients(two))


def test_what_nothing_learns_before_is_not_computed():
    """The chain ends at the first layer that learns: neither its dx nor any backward before it."""
    model = SmallResNet()
    model.skip_input_grad()
    x, y = batch()
    _, dlogits = cross_entropy_loss(model.forward(x), y)
    model.stem.backward = model.stem.layers[0].backward = None  # would raise
    assert model.backward(dlogits) is None
    assert model.stage1.layers[1].body.layers[0].input_grad and not model.stage1.layers[0].layers[0].input_grad


def test_seeds_choose_the_weights():
    assert bits(SimpleCNN(seed=1)) == bits(SimpleCNN(seed=1))
    assert bits(SimpleCNN(seed=1)) != bits(SimpleCNN(seed=2))


@pytest.mark.fault
def test_load_state_dict_lists_all_that_does_not_fit_and_changes_nothing():
    model = SimpleCNN()
    state = model.state_dict()
    before = bits(model)
    state["extra.weight"] = np.zeros(3)
    del state["features.0.bias"]
    state["classifier.weight"] = np.zeros((7, 7), np.float32)
    state["features.3.bias"] += 1
    with pytest.raises(ValueError) as error:
        model.load_state_dict(state)
    for part in ("missing features.0.bias (32,)", "unexpected extra.weight (3,)", "(7, 7), expected (10, 4096)"):
        assert part in str(error.value)
    assert bits(model) == before


def test_wiring_that_would_train_wrongly_is_refused():
    class ForwardOnly(Fork):
        backward = Model.backward

    class Listed(Model):
        def __init__(self):
            super().__init__()
            self.parts = [L.ReLU()]

    class Twice(Model):
        def __init__(self):
            super().__init__()
            self.one = self.two = L.Linear(2, 2)

    x, _ = batch(size=8)
    model = ForwardOnly()
    with pytest.raises(TypeError, match="must define the backward"):
        model.backward(model.forward(x))
    with pytest.raises(ValueError, match="parts is a list of layers"):
        Listed().parameters()
    with pytest.raises(ValueError, match="one layer stands at 'one' and 'two'"):
        Twice().parameters()


# -- who owns the arrays ----------------------------------------------------------------------------------------------


def train_step(model: Model, optimizer: optim.Optimizer, classes: int = 10, size: int = 8) -> float:
    x, y = batch(size=size)
    optimizer.zero_grad()
    loss, dlogits = model.F.cross_entropy_loss(model.forward(model.as_array(x)), model.as_array(y % classes))
    model.backward(dlogits)
    optimizer.step()
    return loss


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_an_optimizer_over_a_part_made_before_the_first_forward_trains_that_part(engine):
    model = SimpleCNN(image_size=8)
    before = model.state_dict()
    optimizer = optim.SGD(model.classifier.parameters(), lr=0.002)
    if engine == "torch":
        model.to_torch()
    losses = [train_step(model, optimizer) for _ in range(5)]
    after = model.state_dict()
    changed = {name for name in before if not np.array_equal(before[name], after[name])}
    assert changed == {"classifier.weight", "classifier.bias"} and losses[-1] < losses[0]


def test_a_new_head_on_a_trained_model_learns():
    model = SimpleCNN(image_size=8)
    train_step(model, optim.SGD(model.parameters(), lr=0.002))
    trunk = model.state_dict()
    model.classifier = L.Linear(64 * 4, 3, rng=np.random.default_rng(0))
    model.features[2] = L.ReLU()
    assert model.parameters()[-1][0].shape == (3,) and model.classifier.name == "classifier"
    assert [name for name, _ in model.walk()][1:] == [*(n for n, _ in SimpleCNN(image_size=8).walk())][1:]
    head = model.classifier.params["weight"].copy()
    losses = [train_step(model, optim.SGD(model.parameters(), lr=0.002), classes=3) for _ in range(5)]
    assert losses[-1] < losses[0] and not np.array_equal(model.classifier.params["weight"], head)
    assert not np.array_equal(model.state_dict()["features.0.weight"], trunk["features.0.weight"])
    assert model.state_dict()["classifier.weight"].shape == (3, 256)
    model.zero_grad()
    assert not gradients(model).any()


@pytest.mark.parametrize("engine", ["numpy", "torch"])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
def test_copies_are_whole_and_their_own(way, flat, engine):
    model = SmallResNet(image_size=16, widths=(4, 4, 8, 8))
    if engine == "torch":
        model.to_torch()
    if flat:
        FlatArrays(model)
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train_step(model, optimizer, size=16)
    original = bits(model)
    both = (model, optimizer)
    twin, its_optimizer = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert bits(twin) == original and twin.use_torch == model.use_torch
    train_step(twin, its_optimizer, size=16)
    assert bits(model) == original and bits(twin) != original
    train_step(model, optimizer, size=16)
    assert bits(model) == bits(twin)
    twin.zero_grad()
    assert not gradients(twin).any() and gradients(model).any()
    learned = bits(twin)
    assert bits(twin.to_torch().to_numpy()) == learned


@pytest.mark.parametrize("move", ["flat", "float64", "flat torch"])
def test_an_optimizer_whose_arrays_were_replaced_raises(move):
    model = SimpleCNN(image_size=8)
    if move == "flat torch":
        model.to_torch()
    stale = optim.SGD(model.parameters(), lr=0.1)
    model.astype(np.float64) if move == "float64" else FlatArrays(model)
    with pytest.raises(RuntimeError, match="no longer the model's"):
        stale.step()
    optim.SGD(model.parameters(), lr=0.1).step()


def test_a_model_inside_a_model_is_a_layer():
    class Ensemble(Model):
        def __init__(self):
            super().__init__()
            self.trunk = SimpleCNN(image_size=8, num_classes=6)
            self.head = L.Linear(6, 10, rng=np.random.default_rng(0))  # without a seed it is another one each time

    model = Ensemble()
    optimizer = optim.SGD(model.parameters(), lr=0.002)
    losses = [train_step(model, optimizer) for _ in range(5)]
    assert losses[-1] < losses[0] and "trunk.features.0.weight" in model.state_dict()
    FlatArrays(model)
    model.to_torch().to_numpy()


@pytest.mark.parametrize("attribute", ["layers", "filters"])
@pytest.mark.parametrize(
    "hidden", [[L.ReLU()], (L.ReLU(),), {"a": L.Linear(2, 2)}, [[L.ReLU()]], {L.Identity()}], ids=str
)
def test_layers_that_nobody_would_find_are_an_error_at_every_door(hidden, attribute):
    class Net(Model):
        def __init__(self):
            super().__init__()
            self.first = L.Linear(2, 2)
            setattr(self, attribute, hidden)

    class Grown(L.Sequential):
        pass

    for call in ("parameters", "train", "eval", "state_dict", "to_numpy"):
        with pytest.raises(ValueError, match=rf"{attribute} is a .* of layers, which would not learn: make it a"):
            getattr(Net(), call)()
    with pytest.raises(ValueError, match="make it a Sequential"):
        Net().forward(np.zeros((1, 2), np.float32))
    grown = Grown(L.ReLU())
    grown.more = hidden
    with pytest.raises(ValueError, match="more is a"):
        grown.parameters()


def test_what_makes_no_tree_is_refused():
    class Early(Model):
        def __init__(self):
            self.fc = L.Linear(2, 2)

    with pytest.raises(TypeError, match=r"Early: call super\(\).__init__\(\) before fc is assigned"):
        Early()
    with pytest.raises(ValueError, match="one layer stands at '0' and '2'"):
        L.Sequential(relu := L.ReLU(), L.Linear(2, 2), relu)
    with pytest.raises(TypeError, match="Sequential: expected layers, one after another, got a list"):
        L.Sequential([L.ReLU()])
    loop = SimpleCNN(image_size=8)
    loop.features.owner = loop
    with pytest.raises(ValueError, match=r"one layer stands at '' and 'features\.owner'"):
        loop.parameters()


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_evaluation_keeps_nothing_for_a_backward_pass(engine):
    model = SmallResNet(image_size=16)
    if engine == "torch":
        model.to_torch()
    x = model.as_array(batch(size=16)[0])
    model.forward(x)
    assert any(layer._cache is not None for _, layer in model.walk())
    model.eval()
    assert all(layer._cache is None for _, layer in model.walk()), "after training, too"
    y = model.forward(x)
    assert all(layer._cache is None for _, layer in model.walk())
    with pytest.raises(RuntimeError, match=r"eval\(\) keeps nothing for it, train_mode\(False\) does"):
        model.backward(y)
    model.train()
    model.train_mode(False)  # running statistics, and a backward pass
    np.testing.assert_array_equal(model.F.to_numpy(model.forward(x)), model.F.to_numpy(y))
    model.backward(y)
    model.train()
    model.stage1.train_mode(False)
    with model.evaluating():
        assert not any(layer.training or layer.caching for _, layer in model.walk())
    frozen = {name for name, layer in model.walk() if not layer.training}
    assert frozen == {name for name, _ in model.walk() if name.startswith("stage1")}


def test_errors_name_the_layer_in_the_model():
    model = SimpleCNN()
    with pytest.raises(ValueError, match=r"features\.0 Conv2d\(3, 32, 3.*got \(1, 1, 32, 32\)"):
        model.forward(np.zeros((1, 1, 32, 32), np.float32))
    with pytest.raises(ValueError, match="4x4 pixels"):
        SimpleCNN(image_size=3)


def test_a_missing_gpu_is_said_plainly():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match="cuda"):
        SimpleCNN().to_torch("cuda")


# -- freezing ----------------------------------------------------------------------------------------------------------


def frozen_body() -> SmallResNet:
    model = SmallResNet(image_size=16, seed=3)
    for body in (model.stem, model.stage1, model.stage2):
        body.freeze()
    return model


@pytest.mark.parametrize("engine", ["numpy", "torch"])
def test_what_is_frozen_stays_and_the_rest_learns_as_if_nothing_were(engine):
    """The gradients of the layers behind are those of the whole model, with the frozen BatchNorms in evaluation."""
    x = np.random.default_rng(0).standard_normal((4, 3, 16, 16)).astype(np.float32)
    whole, part = SmallResNet(image_size=16, seed=3), frozen_body()
    for model in (whole, part):
        if engine == "torch":
            model.to_torch()
        model.skip_input_grad()
    for body in (whole.stem, whole.stage1, whole.stage2):
        body.train_mode(False)
    before = part.state_dict()
    gradients = []
    for model in (whole, part):
        logits = model.forward(model.as_array(x))
        model.backward(model.as_array(np.ones((4, 10), np.float32)))
        gradients.append(
            {name: np.array(model.F.to_numpy(grad)) for name, (_, grad) in model.named_parameters().items()}
        )
    assert set(gradients[1]) == {name for name in gradients[0] if name.startswith(("stage3", "classifier"))}
    for name, gradient in gradients[1].items():
        assert np.array_equal(gradient, gradients[0][name]), name
    optimizer = optim.SGD(part.parameters(), lr=0.1, momentum=0.9)
    optimizer.step()
    changed = {name for name, array in part.state_dict().items() if not np.array_equal(array, before[name])}
    assert changed and all(name.startswith(("stage3", "classifier")) for name in changed)
    assert logits.shape == (4, 10) and len(optimizer.state["momentum"]) == len(gradients[1])


def test_a_frozen_body_has_no_gradient_no_buffer_to_reduce_and_needs_no_backward():
    model = frozen_body()
    model.skip_input_grad()
    flat, all_of_it = FlatArrays(model), sum(array.size for array in model.named_arrays().values())
    learning = sum(param.size for param, _ in model.parameters())
    assert flat.params.size == flat.grads.size == learning < all_of_it / 1.2
    assert flat.buffers.size == sum(a.size for n, a in model.named_buffers().items() if n.startswith("stage3"))
    assert flat.params.size + flat.buffers.size + flat.frozen.size == all_of_it
    model.forward(np.zeros((2, 3, 16, 16), np.float32))
    assert model.backward(np.zeros((2, 10), np.float32)) is None
    waiting = {name.split(".")[0] for name, layer in model.walk() if layer._cache is not None}
    assert waiting == {"stem", "stage1", "stage2"}, "what lies before the first layer that learns is never asked"


def test_an_optimizer_from_before_a_freeze_raises_and_unfreeze_gives_the_gradients_back():
    model = SimpleCNN(image_size=8)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    model.features.freeze()
    with pytest.raises(RuntimeError, match="it was frozen"):
        optimizer.step()
    assert list(model.named_parameters()) == ["classifier.weight", "classifier.bias"]
    model.unfreeze()
    assert len(model.parameters()) == 6 and all((grad == 0).all() for _, grad in model.parameters())
    model.forward(np.ones((2, 3, 8, 8), np.float32))
    model.backward(np.ones((2, 10), np.float32))
    assert all(np.abs(grad).max() > 0 for _, grad in model.parameters())


def test_unfreeze_leaves_what_was_not_frozen_to_its_optimizer():
    model = SimpleCNN(image_size=8)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    model.unfreeze()
    before = model.state_dict()
    model.forward(np.ones((2, 3, 8, 8), np.float32))
    model.backward(np.ones((2, 10), np.float32))
    optimizer.step()
    assert all((array != before[name]).any() for name, array in model.state_dict().items())


def test_a_body_that_is_unfrozen_after_training_learns():
    model = frozen_body()
    model.skip_input_grad()  # as the trainer does
    model.unfreeze()
    model.forward(np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32))
    model.backward(np.ones((2, 10), np.float32))
    assert all(np.abs(grad).max() > 0 for _, grad in model.parameters())


class Doubled(Model):
    """y = f(2 x), hence dx = 2 f'(dout): by the chain's own forward and backward."""

    def __init__(self):
        super().__init__()
        self.body = L.Linear(3, 2)

    def forward(self, x):
        return super().forward(2 * x)

    def backward(self, dout):
        return 2 * super().backward(dout)


class Skip(L.Sequential):
    """A Residual of a person's own."""

    def forward(self, x):
        return super().forward(x) + x

    def backward(self, dout):
        return super().backward(dout) + dout


def test_containers_and_models_can_be_extended_in_both_directions():
    cnnmpi.check_gradients(Doubled(), (4, 3))
    cnnmpi.check_gradients(Skip(L.Linear(3, 3)), (4, 3))
    chain = L.Sequential(Skip(L.Linear(3, 3)), L.Linear(3, 2))
    chain.skip_input_grad()
    chain.backward(chain.forward(np.ones((4, 3), np.float32)))
    with pytest.raises(TypeError, match="expected layers, one after another, got a int"):
        chain[0] = 5
