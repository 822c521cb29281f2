"""What is known of the inputs of a linear while it is quantized, wherever it comes from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from omnifp4.errors import OmniFP4Error

if TYPE_CHECKING:
    from torch import Tensor, device

    from omnifp4.algorithms.grid import Codes
    from omnifp4.calibration.hessians import LayerInputs
    from omnifp4.calibration.statistics import InputStatistics, Source, Statistics


class KnownInputs(Protocol):
    """Inputs of weights, by checkpoint name."""

    def source(self, weight_name: str) -> Source:
        """Where it comes from; ``none`` if nothing is known."""
        ...

    def tokens(self, weight_name: str) -> int:
        """Tokens that were sent to a weight, however few."""
        ...

    def bank(self, weight_name: str) -> str:
        """The same for weights that read the same inputs."""
        ...

    def statistics(self, weight_name: str) -> InputStatistics:
        """Raises OmniFP4Error where nothing is known."""
        ...

    def hessian(self, weight_name: str) -> Tensor | None:
        """Full Hessian, float32 ``[in, in]``; None where only a file is at hand."""
        ...

    def learned(self, weight_name: str) -> Codes | None:
        """Codes that were learned with the rest of its layer; None where there are none."""
        ...

    @property
    def device(self) -> device:
        """Where the arithmetic is done."""
        ...


class FileInputs:
    """What a statistics file holds."""

    def __init__(self, statistics: Statistics) -> None:
        import torch

        self._file = statistics
        self.device = torch.device("cpu")

    def source(self, weight_name: str) -> Source:
        """See `KnownInputs.source`."""
        return self._file.source(weight_name)

    def tokens(self, weight_name: str) -> int:
        """See `KnownInputs.tokens`."""
        return self._file.tokens(weight_name)

    def bank(self, weight_name: str) -> str:
        """See `KnownInputs.bank`; the means of a file are small, so that nothing is gained by sharing them."""
        return weight_name

    def statistics(self, weight_name: str) -> InputStatistics:
        """See `KnownInputs.statistics`."""
        return self._file.of(weight_name)

    def hessian(self, weight_name: str) -> Tensor | None:
        """A file has none."""
        return None

    def learned(self, weight_name: str) -> Codes | None:
        """A file shows no layer."""
        return None


class VisitedInputs:
    """What one layer shows while a calibration set runs through it.

    Attributes:
        codes: learned with the whole layer, by weight name.
    """

    def __init__(self, layer: LayerInputs) -> None:
        self._layer = layer
        self._names = frozenset(layer.names)
        self.device = layer.device
        self.codes: dict[str, Codes] = {}

    def source(self, weight_name: str) -> Source:
        """See `KnownInputs.source`."""
        return self._layer.source(weight_name) if weight_name in self._names else "none"

    def tokens(self, weight_name: str) -> int:
        """See `KnownInputs.tokens`; tokens of all experts do not count as sent."""
        return self._layer.tokens(weight_name) if self.source(weight_name) == "routed" else 0

    def bank(self, weight_name: str) -> str:
        """See `KnownInputs.bank`."""
        return self._layer.bank(weight_name)

    def statistics(self, weight_name: str) -> InputStatistics:
        """See `KnownInputs.statistics`."""
        return self._layer.statistics(weight_name)

    def hessian(self, weight_name: str) -> Tensor | None:
        """See `KnownInputs.hessian`."""
        return self._layer.hessian(weight_name)

    def learned(self, weight_name: str) -> Codes | None:
        """See `KnownInputs.learned`."""
        return self.codes.get(weight_name)


def need_hessian(inputs: KnownInputs, weight_name: str) -> Tensor:
    """The full Hessian.

    Raises:
        OmniFP4Error: there is only a file.
    """
    hessian = inputs.hessian(weight_name)
    if hessian is None:
        raise OmniFP4Error(f"{weight_name}: a full Hessian is needed", hint="add --data SET")
    return hessian
