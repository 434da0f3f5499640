"""The factor of a float16 run's loss; what ranks and resumes make of it is in test_train.py."""

import pytest

from cnnmpi.train import scaling
from cnnmpi.train.scaling import LossScale

pytestmark = pytest.mark.mpi_skip


def test_the_factor_is_halved_by_an_overflow_and_doubled_by_so_many_good_steps_in_a_row(monkeypatch):
    monkeypatch.setattr(scaling, "GROWTH", 3)
    monkeypatch.setattr(scaling, "LARGEST", 2.0**13)
    scale = LossScale.of("float16")
    assert scale.factor == 2.0**12
    seen = []
    for good in (1, 1, 0, 1, 1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1):
        if good:
            scale.succeeded()
        else:
            assert scale.failed()
        seen.append(scale.factor / 2.0**12)
    expected = [1, 1, 0.5, 0.5, 0.5, 1, 1, 0.5, 0.25, 0.25, 0.25, 0.125, 0.125, 0.125]
    expected += [0.25] * 3 + [0.5] * 3 + [1] * 3 + [2]
    assert seen == expected
    for _ in range(9):
        scale.succeeded()
    assert scale.factor == 2.0**13, "the largest"


def test_a_factor_of_one_cannot_help_and_others_than_float16_have_no_other():
    scale = LossScale(2.0, moves=True)
    assert scale.failed() and scale.factor == 1 and not scale.failed()
    for precision in ("float32", "tf32", "bfloat16"):
        scale = LossScale.of(precision)
        for _ in range(scaling.GROWTH + 1):
            scale.succeeded()
        assert scale.factor == 1 and not scale.failed()
