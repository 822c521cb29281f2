"""Writing down tensors as the layers that own them."""

from __future__ import annotations

from omnifp4.models.base import Component, FusedExperts, TensorSpec


class TensorList:
    """The tensors of a layout while it is being written, in the order of the forward pass."""

    def __init__(self) -> None:
        self.tensors: list[TensorSpec] = []
        self.fused: list[FusedExperts] = []

    def tensor(self, name: str, shape: tuple[int, ...], component: Component, *, optional: bool = False) -> None:
        """Any tensor that is not a linear layer's weight."""
        self.tensors.append(TensorSpec(name, shape, component, optional=optional))

    def linear(
        self,
        module: str,
        in_features: int,
        out_features: int,
        component: Component,
        *,
        bias: bool = False,
        scale_group: str = "",
        optional: bool = False,
    ) -> None:
        """A linear layer: ``[out_features, in_features]``, and its bias."""
        shape = (out_features, in_features)
        self.tensors.append(TensorSpec(f"{module}.weight", shape, component, True, scale_group, optional))
        if bias:
            self.tensor(f"{module}.bias", (out_features,), component, optional=optional)

    def norm(self, module: str, width: int, component: Component, *, bias: bool = False) -> None:
        """A normalization over `width` values: RMS without a bias, layer normalization with one."""
        self.tensor(f"{module}.weight", (width,), component)
        if bias:
            self.tensor(f"{module}.bias", (width,), component)

    def conv(self, module: str, shape: tuple[int, ...], bias_size: int, component: Component) -> None:
        """A convolution with its bias; `shape` is the weight's."""
        self.tensor(f"{module}.weight", shape, component)
        self.tensor(f"{module}.bias", (bias_size,), component)

    def gated_mlp(self, module: str, width: int, inner_width: int, component: Component, *, bias: bool = False) -> None:
        """``down(act(gate(x)) * up(x))``; gate and up share one tensor scale because kernels fuse them."""
        group = f"{module}.gate_up"
        self.linear(f"{module}.gate_proj", width, inner_width, component, bias=bias, scale_group=group)
        self.linear(f"{module}.up_proj", width, inner_width, component, bias=bias, scale_group=group)
        self.linear(f"{module}.down_proj", inner_width, width, component, bias=bias)

    def experts(
        self, module: str, count: int, width: int, inner_width: int, component: Component, *, transposed_first: bool
    ) -> None:
        """`count` gated MLPs, one tensor per expert and projection, and the 3-D forms that may replace them.

        With `transposed_first`, the released checkpoints store ``[experts, in, out]``: that form comes first and so
        decides where a square shape leaves the orientation open, and the other form is accepted after it.
        Without it, only ``[experts, out, in]`` occurs, the form of Transformers 5 in memory.
        """
        add = self.tensors.append
        inward, outward = (inner_width, width), (width, inner_width)
        for expert in range(count):
            prefix = f"{module}.{expert}."
            group = f"{prefix}gate_up"
            add(TensorSpec(f"{prefix}gate_proj.weight", inward, component, True, group))
            add(TensorSpec(f"{prefix}up_proj.weight", inward, component, True, group))
            add(TensorSpec(f"{prefix}down_proj.weight", outward, component, True))
        for transposed in (True, False) if transposed_first else (False,):
            for name, parts, out_size, in_size in (
                ("gate_up_proj", ("gate_proj", "up_proj"), 2 * inner_width, width),
                ("down_proj", ("down_proj",), width, inner_width),
            ):
                shape = (count, in_size, out_size) if transposed else (count, out_size, in_size)
                self.fused.append(FusedExperts(f"{module}.{name}", shape, parts, transposed, module))
