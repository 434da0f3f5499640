"""Fine-tuning: the body of a trained SmallResNet, frozen, under a new head for other classes.

python -m cnnmpi.train --model smallresnet --data data/cifar100.h5                      # or any checkpoint of it
mpirun -n 4 python examples/fine_tune.py --init runs/smallresnet-0/best.h5 --data data/cifar10.h5
"""

import sys

import cnnmpi


class Tuned(cnnmpi.SmallResNet):
    """What is frozen has no gradient, no optimizer state and nothing to send; its BatchNorms stay as they are."""

    def __init__(self, **options) -> None:
        super().__init__(**options)
        for body in (self.stem, self.stage1, self.stage2):
            body.freeze()


def report(run, metrics):
    """Say after each epoch how many weights learn: a hook, which runs on rank 0."""
    learning = sum(param.size for param, _ in run.model.parameters())
    run.report.line(f"epoch {metrics['epoch']}: {learning:,} weights learn, test accuracy {metrics['test_acc']:.1%}")


if __name__ == "__main__":
    sys.exit(cnnmpi.fit(Tuned, epochs=4, lr=0.02, label_smoothing=0.0, on_epoch=report))
