"""What needs a GPU: the same numbers there, the same bits each time and on any number of ranks."""

import numpy as np
import pytest

from cnnmpi import optim
from cnnmpi.data import synthetic
from cnnmpi.distributed import Ranks
from cnnmpi.functional import cross_entropy_loss
from cnnmpi.models import MODELS, Model
from cnnmpi.train import Config, set_up

torch = pytest.importorskip("torch")

DEVICE = "cuda"
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")]

# of SimpleCNN's gradients; on a CPU bfloat16, which rounds to 8 bits, gives 0.013 and float32 6e-7. In networks with
# BatchNorm such errors carry values over the kinks of ReLUs, so these are compared with themselves only
BOUNDS = {"float32": 1e-4, "tf32": 2.0**-8, "bfloat16": 2.0**-5, "float16": 2.0**-8}


def batch(size: int = 32) -> tuple[np.ndarray, np.ndarray]:
    draw = np.random.default_rng(0)
    images = draw.standard_normal((16, size, size, 3), dtype=np.float32)
    return images.transpose(0, 3, 1, 2), draw.integers(0, 10, 16)


def gradients(model: Model) -> np.ndarray:
    return np.concatenate([model.F.to_numpy(grad).ravel() for _, grad in model.parameters()])


@pytest.mark.mpi_skip
@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_float64_within_the_rounding_of_the_type_and_the_same_bits_each_time(name, precision):
    x, y = batch()
    model = MODELS[name](seed=3)
    stale = optim.SGD(model.parameters(), lr=0.1)
    model.to_torch(DEVICE, precision=precision)
    seen = []
    for _ in range(3):
        model.zero_grad()
        _, dlogits = model.F.cross_entropy_loss(model.forward(model.as_array(x)), model.as_array(y))
        model.backward(dlogits)
        seen.append(gradients(model))
    assert seen[0].tobytes() == seen[1].tobytes() == seen[2].tobytes()
    if name == "simplecnn":
        exact = MODELS[name](seed=3).astype(np.float64)
        _, dlogits = cross_entropy_loss(exact.forward(x.astype(np.float64)), y)
        exact.backward(dlogits)
        expected = gradients(exact)
        assert np.linalg.norm(seen[0] - expected) < BOUNDS[precision] * np.linalg.norm(expected)
    with pytest.raises(RuntimeError, match="no longer the model's"):
        stale.step()


@pytest.mark.mpi(min_size=1)
@pytest.mark.parametrize("precision", BOUNDS)
def test_twenty_steps_end_in_the_same_bits_on_any_number_of_ranks(ranks, shared_tmp, tmp_path, precision):
    options = {"model": "smallresnet", "backend": "torch", "device": DEVICE, "precision": precision, "max_steps": 20}
    states = []
    for who, out in ((ranks, shared_tmp / "together"), (Ranks(), tmp_path / "alone")):
        trainer = set_up(Config(out=out, **options), who, data=synthetic(train=1000, test=100))
        assert trainer.run() == 0
        states.append({name: array.tobytes() for name, array in trainer.model.state_dict().items()})
    assert states[0] == states[1]
