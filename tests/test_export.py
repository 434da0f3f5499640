"""Models in other programs' files: the same logits there, and the same weights back."""

import copy
import json
import os
import pickle
import re
from pathlib import Path

import numpy as np
import pytest

from cnnmpi import Model, checkpoint, load_checkpoint
from cnnmpi import layers as L
from cnnmpi.checkpoint.__main__ import main as checkpoint_main
from cnnmpi.data import normalize
from cnnmpi.distributed import UserError
from cnnmpi.export import compared, main, onnx_bytes, run_onnx
from cnnmpi.functional_onnx import Graph
from cnnmpi.models import MODELS
from cnnmpi.predict import predictions
from cnnmpi.train.state import model_attributes, pack
from tests.every_layer import LAYERS
from tests.twins import Wrapped, rng

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
save_file = pytest.importorskip("safetensors.numpy").save_file
pytestmark = pytest.mark.mpi_skip

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
OPTIONS = {"in_channels": 3, "num_classes": 5, "image_size": [20, 16]}
RUN = {
    "classes": list("abcde"),
    "mean": MEAN,
    "std": STD,
    "config": '{"validation": 0.1}',
    "sources": '{"augment": "123"}',
    "data_source": "somewhere",
    "data_sha256": "456",
    "data_archive_sha256": "789",
    "data_fit": "pad",
}


def drawn(model: Model) -> Model:
    """The model in evaluation, its biases, factors and statistics drawn: none has the value of one that is missing."""
    draws = rng(3)
    for array in model.named_arrays().values():
        if array.ndim == 1:
            array[...] = draws.uniform(0.5, 1.5, array.shape)
    model.eval()
    return model


def trained(name: str) -> Model:
    return drawn(MODELS[name](**OPTIONS, seed=1))


def saved(path: Path, name: str, model: Model, **more) -> Path:
    """Save a model with the attributes of a run; ``more`` replaces some, None leaves one out."""
    told = model_attributes(name, OPTIONS, model) | RUN | more
    checkpoint.save(path, pack(model), {key: value for key, value in told.items() if value is not None})
    return path


def imported(path: Path, *options: str | Path) -> tuple[int, Path]:
    """Import a file of weights; return the exit code, and where the checkpoint would be."""
    out = path.parent / "imported.h5"
    return checkpoint_main(["import", str(path), "--out", str(out), *map(str, options)]), out


def tells(path: Path, told: dict, arrays: dict[str, np.ndarray] | None = None) -> Path:
    """Write a safetensors file whose metadata say this."""
    save_file(arrays or {"w": np.ones(3, np.float32)}, path, {"cnnmpi": json.dumps(told)})
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
    model = drawn(Wrapped(copy.deepcopy(layer)))
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
        y = self.F.avg_pool2d(self.norm.forward(1 - y / 2 + 0.25), 2)[0]
        first, second = self.F.split(y, [3, 5])
        return self.head.forward(self.pool.forward(-self.F.concat([second, first])))


class Indexed(Wired):
    def forward(self, x):
        return super().forward(x[:, ::-1])


class Reshaped(Wired):
    def forward(self, x):
        return super().forward(x.reshape(x.shape))


class Asserting(Wired):
    def forward(self, x):
        assert isinstance(x, np.ndarray), "it wants arrays"


class Training(Wired):
    def __init__(self, in_channels=3, num_classes=5):
        super().__init__(in_channels, num_classes)
        self.batch_norm = L.BatchNorm(num_classes)

    def forward(self, x):
        self.batch_norm.train_mode()
        return self.batch_norm.forward(super().forward(x))


class Named(Wired):
    """Arrays that are called as others in a graph, and one of integers."""

    def __init__(self, in_channels=3, num_classes=5):
        super().__init__(in_channels, num_classes)
        self.add_parameter("images", np.full(num_classes, 2.0))
        self.add_parameter("logits", np.full(num_classes, 3.0))
        self.add_parameter("conv_3", np.full(num_classes, 4.0))
        self.add_parameter("constant_0", np.full(num_classes, 5.0))
        self.add_buffer("count", np.arange(num_classes), np.int64)

    def forward(self, x):
        logits = super().forward(x) * self.params["images"] + self.params["logits"]
        return logits - self.params["conv_3"] * logits + self.params["constant_0"] + self.buffers["count"]


class Doubles(Model):
    def __init__(self, in_channels=3, num_classes=5):
        super().__init__()
        self.conv, self.pool = L.Conv2d(in_channels, num_classes, 3, dtype=np.float64), L.GlobalAvgPool2d()


def of_a_persons(network, path: Path) -> Model:
    saved(path, "nets.py:Wired", drawn(network()))
    return load_checkpoint(path, network)


def test_a_wiring_of_ones_own_is_written_too(tmp_path):
    model = of_a_persons(Wired, tmp_path / "a.h5")
    logits = model.forward(normalize(images("uint8"), MEAN, STD))
    np.testing.assert_allclose(run_onnx(onnx_bytes(model), images("uint8")), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "network, said",
    [
        (Indexed, "ValueError: its forward indexes an array"),
        (Reshaped, "ValueError: its forward uses .reshape of an array"),
        (Asserting, "AssertionError: it wants arrays"),
        (Training, ".*a graph is of a model in evaluation"),
    ],
)
def test_what_a_graph_cannot_hold_is_named(tmp_path, network, said):
    with pytest.raises(UserError, match=rf"{network.__name__} cannot be written as ONNX: {said}.*test_export.py, line"):
        onnx_bytes(of_a_persons(network, tmp_path / "a.h5"))


def test_no_name_of_an_array_is_in_the_way_of_another_and_weights_keep_theirs(tmp_path):
    import onnx

    model = of_a_persons(Named, tmp_path / "a.h5")
    blob = onnx_bytes(model)
    logits = model.forward(normalize(images("uint8"), MEAN, STD))
    np.testing.assert_allclose(run_onnx(blob, images("uint8")), logits, rtol=0, atol=1e-4)
    names = {"images": "/images", "logits": "/logits"}
    expected = {names.get(key, key): array.astype(np.float32) for key, array in model.state_dict().items()}
    graph = onnx.load_from_string(blob).graph
    assert "/conv_3" in [node.name for node in graph.node]
    held = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    assert "/constant_0" in held
    assert all(np.array_equal(held[key], array) for key, array in expected.items())
    assert all(key.startswith("/constant_") for key in held.keys() - expected.keys())


def test_networks_in_float64_are_compared_too_and_predict(tmp_path):
    model = load_checkpoint(saved(tmp_path / "a.h5", "nets.py:Doubles", drawn(Doubles())), Doubles)
    assert "within" in compared(onnx_bytes(model), model, "uint8")
    for backend in ("numpy", "torch"):
        model = model.to_torch() if backend == "torch" else model
        assert predictions(model, [np.zeros((20, 16, 3), np.uint8)]).dtype == np.float64


@pytest.mark.fault
def test_a_wrong_onnx_model_does_not_replace_a_good_one(tmp_path, capsys, monkeypatch):
    path, to = saved(tmp_path / "a.h5", "simplecnn", trained("simplecnn")), tmp_path / "m.onnx"
    to.write_bytes(b"a good one")
    monkeypatch.setattr("cnnmpi.export.run_onnx", lambda blob, images: run_onnx(blob, images) + np.float32(0.1))
    assert main([str(path), "--to", str(to)]) == 2
    assert "onnxruntime gives other logits, off by" in capsys.readouterr().err
    assert to.read_bytes() == b"a good one"


@pytest.mark.fault
def test_what_cannot_be_exported_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    model = trained("simplecnn")
    path, to = saved(tmp_path / "a.h5", "simplecnn", model), tmp_path / "m.onnx"
    (tmp_path / "a.onnx").write_bytes(path.read_bytes())
    model.named_arrays()["features.0.weight"][0] = np.inf
    saved(tmp_path / "inf.h5", "simplecnn", model)
    monkeypatch.setattr("cnnmpi.export.LARGEST", 4 * sum(a.size for a in model.state_dict().values()))
    for source, there, said in (
        (tmp_path / "inf.h5", to, "SimpleCNN gives logits that are not finite"),
        (tmp_path / "a.onnx", tmp_path / "a.onnx", "is the checkpoint"),
    ):
        assert main([str(source), "--to", str(there)]) == 2
        err = capsys.readouterr().err
        assert said in err and err.count("\n") == 1
    monkeypatch.setattr("cnnmpi.export.LARGEST", 1000)
    assert main([str(path), "--to", str(to)]) == 2
    assert "an ONNX file has at most 2 GiB" in capsys.readouterr().err
    assert not to.exists()


def test_a_checkpoint_without_a_digest_is_exported_with_that_of_its_weights(tmp_path):
    model = trained("simplecnn")
    path = saved(tmp_path / "a.h5", "simplecnn", model, weights_sha256=None)
    assert checkpoint.weights_digest(model.state_dict()).encode() in onnx_bytes(load_checkpoint(path))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("name", ["simplecnn", "smallresnet"])
def test_weights_come_back_with_the_same_digest(tmp_path, capsys, name, suffix):
    path, there, back = saved(tmp_path / "a.h5", name, trained(name)), tmp_path / f"m{suffix}", tmp_path / "b.h5"
    assert main([str(path), "--to", str(there)]) == 0
    like = ["--like", str(path)] if suffix == ".pt" else []
    assert checkpoint_main(["import", str(there), "--out", str(back), *like]) == 0
    (arrays, attributes), (arrays_back, attributes_back) = checkpoint.load(path), checkpoint.load(back)
    assert attributes_back == attributes
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
    torch.save({"epoch": 3, "model_state_dict": {"w": torch.ones(3)}}, tmp_path / "nested.pt")
    torch.save({"w": torch.ones(3, dtype=torch.complex64)}, tmp_path / "complex.pt")
    save_file({"w": np.ones(3, np.complex64)}, tmp_path / "complex.safetensors")
    (tmp_path / "text.pt").write_text("hello\n" * 9)
    (tmp_path / "torn.safetensors").write_bytes(b"\xff" * 20)
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe.safetensors", "pipe.pt", "pipe.h5"):
        os.mkfifo(tmp_path / name)
    tells(tmp_path / "huge.safetensors", {"classes": [], "mean": [10**400] * 3})
    main([str(path), "--to", str(tmp_path / "m.pt")])
    capfd.readouterr()
    for arguments, said in (
        ([tmp_path / "text.pt"], "cannot be read: it is damaged, or holds more than tensors: save module.state_dict()"),
        ([tmp_path / "bomb.pt"], "cannot be read: it is damaged, or holds more than tensors"),
        ([tmp_path / "zipped.pt"], "cannot be read: it is damaged, or holds more than tensors"),
        ([tmp_path / "list.pt", "--like", path], "it holds a list, no state_dict: save module.state_dict()"),
        ([tmp_path / "nested.pt", "--like", path], "it holds epoch, model_state_dict, which are no tensors"),
        ([tmp_path / "complex.pt", "--like", path], "w is complex64; layers compute with real numbers"),
        ([tmp_path / "complex.safetensors", "--like", path], "w is C64; what is read are"),
        ([tmp_path / "folder.safetensors"], "cannot be read: not a file"),
        ([tmp_path / "pipe.safetensors"], "cannot be read: not a file"),
        ([tmp_path / "pipe.pt"], "cannot be read: not a file"),
        ([tmp_path / "m.pt", "--like", tmp_path / "pipe.h5"], "cannot be read: not a file"),
        ([tmp_path / "huge.safetensors"], "is no number in JSON"),
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


@pytest.mark.fault
def test_no_code_is_imported_because_a_file_names_it(tmp_path, capsys):
    options = OPTIONS | {"command": f"touch {tmp_path / 'ran'}"}
    told = RUN | {"model": "os:system", "model_options": json.dumps(options)}
    like = tmp_path / "like.h5"
    checkpoint.save(like, {"model/w": np.ones(3, np.float32)}, told)
    torch.save({"w": torch.ones(3)}, tmp_path / "w.pt")
    for path, more in ((tells(tmp_path / "w.safetensors", told), ()), (tmp_path / "w.pt", ("--like", like))):
        code, out = imported(path, *more)
        assert code == 2 and not out.exists() and not (tmp_path / "ran").exists()
        err = capsys.readouterr().err
        assert "holds the model os:system" in err and "--model FILE.py:" in err


@pytest.mark.fault
def test_options_of_a_reference_network_are_sizes_also_where_it_is_named(tmp_path, capsys):
    told = RUN | {"model_options": json.dumps(OPTIONS | {"dtype": "object"})}
    assert imported(tells(tmp_path / "w.safetensors", told), "--model", "simplecnn")[0] == 2
    assert "expected sizes: in_channels" in capsys.readouterr().err


@pytest.mark.fault
def test_what_is_read_is_not_written_over(tmp_path, capsys):
    path, there = saved(tmp_path / "a.h5", "simplecnn", trained("simplecnn")), tmp_path / "imported.h5"
    assert main([str(path), "--to", str(tmp_path / "m.safetensors")]) == 0
    (tmp_path / "a.safetensors").symlink_to(there)
    before = path.rename(there).read_bytes()
    capsys.readouterr()
    for arguments, said in (
        ([tmp_path / "a.safetensors"], "is the file that is imported: name another file"),
        ([tmp_path / "m.safetensors", "--like", there], "is what --like names: name another file"),
    ):
        assert imported(*arguments)[0] == 2
        assert said in capsys.readouterr().err
        assert there.read_bytes() == before


def test_what_a_file_says_of_itself_counts_more_than_what_like_says(tmp_path):
    model = trained("simplecnn")
    like = saved(tmp_path / "like.h5", "simplecnn", model, classes=list("vwxyz"))
    path = saved(tmp_path / "a.h5", "simplecnn", model)
    assert main([str(path), "--to", str(tmp_path / "m.safetensors")]) == 0
    code, out = imported(tmp_path / "m.safetensors", "--like", like)
    assert code == 0 and load_checkpoint(out).info.classes == list("abcde")


@pytest.mark.fault
def test_weights_that_are_not_those_of_the_digest_beside_them_are_told(tmp_path, capsys):
    model = trained("simplecnn")
    told = RUN | model_attributes("simplecnn", OPTIONS, model)
    state = {key: np.ascontiguousarray(array) for key, array in model.state_dict().items()}
    assert imported(tells(tmp_path / "w.safetensors", told, state))[0] == 0
    assert capsys.readouterr().err == ""
    state["classifier.bias"][0] += 1
    code, out = imported(tells(tmp_path / "w.safetensors", told, state))
    assert code == 0 and load_checkpoint(out).state_dict()["classifier.bias"][0] == state["classifier.bias"][0]
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {tmp_path / 'w.safetensors'}: its weights are not those") and err.count("\n") == 1


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_types_of_numbers_become_float32(tmp_path, suffix, dtype):
    from safetensors.torch import save_file as save_tensors

    model = trained("simplecnn")
    state = {key: torch.from_numpy(array).to(dtype) for key, array in model.state_dict().items()}
    (save_tensors if suffix == ".safetensors" else torch.save)(state, tmp_path / f"w{suffix}")
    like = saved(tmp_path / "a.h5", "simplecnn", model)
    code, out = imported(tmp_path / f"w{suffix}", "--like", like)
    assert code == 0
    for key, array in load_checkpoint(out).state_dict().items():
        assert array.dtype == np.float32 and np.array_equal(array, state[key].float().numpy())


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


def test_numbers_that_become_infinite_are_told_once(tmp_path, capsys):
    model = trained("simplecnn")
    state = {key: torch.from_numpy(array).double() * 1e300 for key, array in model.state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    assert imported(tmp_path / "w.pt", "--like", saved(tmp_path / "a.h5", "simplecnn", model))[0] == 0
    assert capsys.readouterr().err == "warning: overflow encountered in cast\n"
