"""Models in other programs' files: the same logits there, and the same weights back."""

import copy
import json
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from cnnmpi import Model, checkpoint, load_checkpoint
from cnnmpi import layers as L
from cnnmpi.checkpoint.__main__ import main as checkpoint_main
from cnnmpi.data import normalize
from cnnmpi.export import main, onnx_bytes, run_onnx
from cnnmpi.functional_onnx import Graph
from cnnmpi.models import MODELS
from cnnmpi.train.state import model_attributes, pack
from tests.every_layer import LAYERS
from tests.twins import Wrapped, rng

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytestmark = pytest.mark.mpi_skip

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
OPTIONS = {"in_channels": 3, "num_classes": 5, "image_size": [20, 16]}


def trained(name: str) -> Model:
    """A reference network whose BatchNorm has seen something."""
    model = MODELS[name](**OPTIONS, seed=1)
    for _ in range(3):
        model.forward(rng(0).standard_normal((4, 3, 20, 16)).astype(np.float32))
    model.eval()
    return model


def saved(path: Path, name: str, model: Model, **more) -> Path:
    told = {"classes": list("abcde"), "mean": MEAN, "std": STD, "config": "{}", **more}
    checkpoint.save(path, pack(model), model_attributes(name, OPTIONS, model) | told)
    return path


def images(kind: str, count: int = 7) -> np.ndarray:
    pixels = rng(1).integers(0, 256, (count, 3, 20, 16), np.uint8)
    return pixels if kind == "uint8" else (pixels / np.float32(255)).astype(np.float32)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("name", MODELS)
def test_reference_networks_give_the_same_logits_of_any_number_of_images(tmp_path, name, kind):
    model = load_checkpoint(saved(tmp_path / "a.h5", name, trained(name)))
    before = model.state_dict()
    blob = onnx_bytes(model, kind)
    for count in (1, 7):
        x = images(kind, count)
        logits = model.forward(normalize(x, MEAN, STD))
        np.testing.assert_allclose(run_onnx(blob, x), logits, rtol=0, atol=1e-5 * max(1, np.abs(logits).max()))
    assert all(np.array_equal(array, before[key]) for key, array in model.state_dict().items())
    assert not model.use_torch


@pytest.mark.parametrize("layer, shape", LAYERS)
def test_every_layer_is_written_as_what_it_computes(layer, shape):
    model = Wrapped(copy.deepcopy(layer))
    model.eval()
    x = rng(2).standard_normal((3, *shape[1:])).astype(np.float32)
    expected = model.forward(x)
    graph = Graph()
    for _, each in model.walk():
        vars(each)["F"] = graph
    blob = graph.model(model.forward(graph.input("images", shape[1:], "float32")), "logits", {})
    np.testing.assert_allclose(run_onnx(blob, x), expected, rtol=0, atol=2e-5)


class Wired(Model):
    """Branches, a skip, arithmetic with a parameter and with numbers: no chain."""

    def __init__(self, in_channels=3, num_classes=5):
        super().__init__()
        self.a, self.b = L.Conv2d(in_channels, 4, 3, padding=1), L.Conv2d(in_channels, 4, 1)
        self.norm, self.pool, self.head = L.GroupNorm(2, 8), L.GlobalAvgPool2d(), L.Linear(8, num_classes)
        self.add_parameter("scale", np.full((8, 1, 1), 1.5))

    def forward(self, x):
        y = self.F.concat([self.a.forward(x), self.b.forward(x)]) * self.params["scale"]
        y = self.norm.forward(1 - y / 2 + 0.25)
        first, second = self.F.split(y, [3, 5])
        return self.head.forward(self.pool.forward(-self.F.concat([second, first])))


class Indexed(Wired):
    def forward(self, x):
        return super().forward(x[:, ::-1])


class Reshaped(Wired):
    def forward(self, x):
        return super().forward(x.reshape(x.shape))


def of_a_persons(network, path: Path) -> Model:
    saved(path, "nets.py:Wired", network())
    return load_checkpoint(path, network)


def test_a_wiring_of_ones_own_is_written_too(tmp_path):
    model = of_a_persons(Wired, tmp_path / "a.h5")
    logits = model.forward(normalize(images("uint8"), MEAN, STD))
    np.testing.assert_allclose(run_onnx(onnx_bytes(model), images("uint8")), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("network, said", [(Indexed, "indexes an array"), (Reshaped, "uses .reshape of an array")])
def test_what_a_graph_cannot_hold_is_named(tmp_path, network, said):
    with pytest.raises(Exception, match=f"{network.__name__} cannot be written as ONNX: its forward {said}"):
        onnx_bytes(of_a_persons(network, tmp_path / "a.h5"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("name", ["simplecnn", "smallresnet"])
def test_weights_come_back_with_the_same_digest(tmp_path, capsys, name, suffix):
    path, there, back = saved(tmp_path / "a.h5", name, trained(name)), tmp_path / f"m{suffix}", tmp_path / "b.h5"
    assert main([str(path), "--to", str(there)]) == 0
    like = ["--like", str(path)] if suffix == ".pt" else []
    assert checkpoint_main(["import", str(there), "--out", str(back), *like]) == 0
    (arrays, attributes), (arrays_back, attributes_back) = checkpoint.load(path), checkpoint.load(back)
    assert attributes_back == {key: attributes[key] for key in attributes_back}
    assert {key: array.tobytes() for key, array in arrays.items()} == {k: a.tobytes() for k, a in arrays_back.items()}
    assert f"weights_sha256={attributes['weights_sha256']}" in capsys.readouterr().out
    x = normalize(images("uint8"), MEAN, STD)
    assert np.array_equal(load_checkpoint(back).forward(x), load_checkpoint(path).forward(x))


def test_a_torch_module_takes_the_exported_weights_and_gives_its_own(tmp_path):
    from benchmarks.torch_twin import torch_twin

    model = trained("smallresnet")
    path, there = saved(tmp_path / "a.h5", "smallresnet", model), tmp_path / "m.pt"
    assert main([str(path), "--to", str(there)]) == 0
    twin = torch_twin(MODELS["smallresnet"](**OPTIONS))
    missing, unexpected = twin.load_state_dict(torch.load(there, weights_only=True), strict=False)
    assert not unexpected and all(key.endswith("num_batches_tracked") for key in missing)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    torch.save(twin.state_dict(), tmp_path / "theirs.pt")
    back = tmp_path / "b.h5"
    assert checkpoint_main(["import", str(tmp_path / "theirs.pt"), "--out", str(back), "--like", str(path)]) == 0
    halved = load_checkpoint(back).state_dict()
    assert np.array_equal(halved["classifier.weight"], model.state_dict()["classifier.weight"] / 2)


class Bomb:
    def __reduce__(self):
        return print, ("a pickle ran code",)


@pytest.mark.parametrize("name", ["simplecnn", "smallresnet"])
def test_the_modules_in_the_docs_give_the_same_logits(tmp_path, name):
    text = (Path(__file__).parent.parent / "docs" / "checkpoint-format.md").read_text()
    (source,) = re.findall(r"^```python\n(from torch import nn\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    modules: dict = {}
    exec(source, modules)
    model = MODELS[name](seed=1)
    for _ in range(3):
        model.forward(rng(0).standard_normal((8, 3, 32, 32)).astype(np.float32))
    model.eval()
    told = {"classes": list("0123456789"), "mean": MEAN, "std": STD, "config": "{}"}
    options = {"in_channels": 3, "num_classes": 10, "image_size": 32}
    checkpoint.save(tmp_path / "a.h5", pack(model), model_attributes(name, options, model) | told)
    assert main([str(tmp_path / "a.h5"), "--to", str(tmp_path / "a.pt")]) == 0
    module = modules[type(model).__name__]()
    module.load_state_dict(torch.load(tmp_path / "a.pt", weights_only=True))
    x = rng(2).standard_normal((5, 3, 32, 32)).astype(np.float32)
    with torch.no_grad():
        theirs = module.eval()(torch.from_numpy(x)).numpy()
    # float32 sums in another order, through seven layers
    np.testing.assert_allclose(theirs, model.forward(x), rtol=1e-3, atol=1e-4)


@pytest.mark.fault
def test_files_that_cannot_be_read_are_refused_in_one_line(tmp_path, capfd):
    path = saved(tmp_path / "a.h5", "simplecnn", trained("simplecnn"))
    (tmp_path / "bomb.pt").write_bytes(pickle.dumps({"w": Bomb()}))
    torch.save({"w": Bomb()}, tmp_path / "zipped.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"other.weight": torch.ones(3)}, tmp_path / "other.pt")
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 20)
    main([str(path), "--to", str(tmp_path / "m.pt")])
    capfd.readouterr()
    for arguments, said in (
        ([tmp_path / "bomb.pt", "--like", path], "cannot be read"),
        ([tmp_path / "zipped.pt", "--like", path], "cannot be read"),
        ([tmp_path / "list.pt", "--like", path], "it holds no state_dict"),
        ([tmp_path / "other.pt", "--like", path], "does not fit SimpleCNN"),
        ([tmp_path / "torn.safetensors"], "cannot be read"),
        ([tmp_path / "none.safetensors"], "cannot be read"),
        (
            [tmp_path / "m.pt"],
            "does not say model_options, classes, mean, std: name a checkpoint that does with",
        ),
        ([path], "expected a file that ends in .safetensors or .pt, got one that ends in .h5"),
    ):
        assert checkpoint_main(["import", *map(str, arguments), "--out", str(tmp_path / "b.h5")]) == 2, said
        out, err = capfd.readouterr()
        assert said in err and err.count("\n") == 1 and "a pickle ran code" not in out
        assert not (tmp_path / "b.h5").exists()


def test_the_command_says_what_it_wrote_and_compared(tmp_path, capsys):
    path, to = saved(tmp_path / "a.h5", "simplecnn", trained("simplecnn")), tmp_path / "m.onnx"
    assert main([str(path), "--to", str(to)]) == 0
    said = f"{to}: uint8 images to logits, {to.stat().st_size:,} bytes; logits in onnxruntime within"
    assert said in capsys.readouterr().out
    import onnx

    told = {entry.key: json.loads(entry.value) for entry in onnx.load(to).metadata_props}
    assert told == {"classes": list("abcde"), "weights_sha256": checkpoint.load(path)[1]["weights_sha256"]}
    assert main([str(path), "--to", str(tmp_path / "m.txt")]) == 2
    assert "expected a name that ends in .onnx, .safetensors, .pt" in capsys.readouterr().err
    assert main([str(path), "--to", str(tmp_path / "none" / "m.onnx")]) == 2
    assert "cannot be written" in capsys.readouterr().err
