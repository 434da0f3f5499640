"""Layers made of layers: a chain, branches side by side, a skip connection, and the skip itself."""

import functools
from collections.abc import Iterator, Sequence

from cnnmpi.common.arguments import joined_shape
from cnnmpi.layers.base import Array, Layer


def chain_backward(layers: Sequence[Layer], dout: Array) -> Array:
    """Apply the chain rule last to first; no further than to a layer that leaves its dx out."""
    for layer in reversed(layers):
        dout = layer.backward(dout)
        if dout is None or not layer.input_grad:
            return None
    return dout


def chain_skip_input_grad(layers: Sequence[Layer]) -> None:
    """Let the layers leave out the gradients that nobody needs: those before the first parameters."""
    for layer in layers:
        layer.skip_input_grad()
        if layer.parameters():
            break


class Identity(Layer):
    """y = x."""

    def forward(self, x: Array) -> Array:
        """Return x itself."""
        return self._keep((x, ()))

    def backward(self, dout: Array) -> Array:
        """Return dout itself."""
        self._taken(dout)
        return dout


class _Several(Layer):
    """Layers named "0", "1", ... as in torch, in the tuple ``layers``.

    ``container[i] = layer`` puts another layer in the place of the i-th.
    """

    lists = ("layers",)

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        self._take(layers)

    def __getitem__(self, index: int) -> Layer:
        return self.layers[index]

    def __setitem__(self, index: int, layer: Layer) -> None:
        layers = list(self.layers)
        layers[index] = layer
        self._take(layers)

    def __len__(self) -> int:
        return len(self.layers)

    def children(self) -> Iterator[tuple[str, Layer]]:
        """Yield ("0", first), ("1", second), ..., then what a subclass has besides."""
        for index, layer in enumerate(self.layers):
            yield str(index), layer
        yield from super().children()

    def _take(self, layers: Sequence[Layer]) -> None:
        for layer in layers:
            if not isinstance(layer, Layer):
                kind = type(layer).__name__
                raise TypeError(f"{type(self).__name__}: expected layers, one after another, got a {kind}")
        self.layers = tuple(layers)
        self._rename(self.name)

    def _options(self) -> str:
        return ", ".join(map(repr, self.layers))


class Sequential(_Several):
    """y = last(... second(first(x))); its layers are named "0", "1", ... as in torch.

    ``layers`` is a tuple; ``chain[i] = layer`` puts another layer in the place of the i-th.
    """

    def forward(self, x: Array) -> Array:
        """Apply the layers first to last."""
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dout: Array) -> Array:
        """Apply the chain rule last to first."""
        return chain_backward(self.layers, dout)

    def skip_input_grad(self) -> None:
        """Spare what the layers up to the first that learns can spare."""
        if type(self).backward is Sequential.backward:
            chain_skip_input_grad(self.layers)


class Concat(_Several):
    """y = (first(x), second(x), ...), the branches' outputs side by side along the channels, axis 1.

    Hence dx is the sum of the branches' gradients, each for its part of dout. The branches are named "0", "1", ...;
    ``Concat(Identity(), body)`` keeps x and adds the channels of the body, as DenseNet does. (N, C) or (N, C, H, W).
    """

    def __init__(self, *branches: Layer) -> None:
        super().__init__(*branches)
        if not branches:
            raise ValueError("Concat: expected branches, one after another, got none")

    def forward(self, x: Array) -> Array:
        """Return the branches' outputs for ``x`` (N, C_i, ...), joined: (N, sum of C_i, ...)."""
        outputs = [branch.forward(x) for branch in self.layers]
        joined_shape(f"{self.name} Concat".strip(), [tuple(y.shape) for y in outputs])
        return self._keep((self.F.concat(outputs), tuple(y.shape[1] for y in outputs)))

    def backward(self, dout: Array) -> Array:
        """Return dx, the sum of the branches' gradients by the input; None where one leaves its own out."""
        parts = self.F.split(dout, self._taken(dout))
        gradients = [branch.backward(part) for branch, part in zip(self.layers, parts, strict=True)]
        if any(gradient is None for gradient in gradients):
            return None
        return functools.reduce(self.F.add, gradients)

    def skip_input_grad(self) -> None:
        """Spare what each branch can spare."""
        if type(self).backward is Concat.backward:
            for branch in self.layers:
                branch.skip_input_grad()


class Residual(Layer):
    """y = body(x) + shortcut(x), hence dx = body'(dout) + shortcut'(dout)."""

    def __init__(self, body: Layer, shortcut: Layer | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut or Identity()

    def forward(self, x: Array) -> Array:
        """Shape as the body gives it; the shortcut must give the same."""
        y, skip = self.body.forward(x), self.shortcut.forward(x)
        if y.shape != skip.shape:
            shapes = f"{tuple(y.shape)}, its shortcut {tuple(skip.shape)}"
            raise ValueError(f"{self.name} Residual: the body gives {shapes}: they must be equal".strip())
        return self.F.add(y, skip)

    def backward(self, dout: Array) -> Array:
        """Both paths receive dout; their gradients add up."""
        return self.F.add(self.body.backward(dout), self.shortcut.backward(dout))

    def _options(self) -> str:
        return f"{self.body!r}, {self.shortcut!r}"
