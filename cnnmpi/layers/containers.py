"""Layers made of layers: a chain, a skip connection, and the skip itself."""

from collections.abc import Iterator

from cnnmpi.layers.base import Array, Layer


class Identity(Layer):
    """y = x."""

    def forward(self, x: Array) -> Array:
        """Return x itself."""
        return x

    def backward(self, dout: Array) -> Array:
        """Return dout itself."""
        return dout


class Sequential(Layer):
    """y = last(... second(first(x))); its layers are named "0", "1", ... as in torch."""

    def __init__(self, *layers: Layer) -> None:
        super().__init__()
        self.layers = list(layers)

    def children(self) -> Iterator[tuple[str, Layer]]:
        """Yield ("0", first), ("1", second), ..."""
        for index, layer in enumerate(self.layers):
            yield str(index), layer

    def forward(self, x: Array) -> Array:
        """Apply the layers first to last."""
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dout: Array) -> Array:
        """Apply the chain rule last to first."""
        for layer in reversed(self.layers):
            dout = layer.backward(dout)
        return dout

    def skip_input_grad(self) -> None:
        """Spare what the first layer can spare."""
        if self.layers:
            self.layers[0].skip_input_grad()

    def _options(self) -> str:
        return ", ".join(map(repr, self.layers))


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
        return y + skip

    def backward(self, dout: Array) -> Array:
        """Both paths receive dout; their gradients add up."""
        return self.body.backward(dout) + self.shortcut.backward(dout)

    def _options(self) -> str:
        return f"{self.body!r}, {self.shortcut!r}"
