"""How one model's width becomes the other's.

A match with parameters learns: `let_plugin.guidance.projectors` keeps its weights.

Shape legend: B batch, L sequence, E width in, D width out, H hidden width.
"""

from abc import ABC, abstractmethod
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import nn

from let_plugin.alignment.registry import Registry


class DimensionMatch(Protocol):
    """Makes the module that maps [B, L, `in_width`] to [B, L, `out_width`], in the dtype of its input.

    Options are further keyword-only arguments with defaults. ValueError for a bad one; the message begins with its
    name. Parameters and buffers are made on the CPU; random ones are drawn from a generator of their own: they are the
    same on every rank, and the run's own random numbers do not change. Those that require a gradient are trained.
    """

    def __call__(self, in_width: int, out_width: int) -> nn.Module: ...


DIMENSION_MATCHES: Registry[DimensionMatch] = Registry("dimension match", "let_plugin.dimension_matches")


def register_dimension_match(name: str, factory: DimensionMatch) -> None:
    """Makes `let.dimension_match = name` mean the modules that `factory` makes (see DimensionMatch)."""
    DIMENSION_MATCHES.register(name, factory)


def interpolate(hidden_BLE: torch.Tensor, width: int, *, align_corners: bool = False) -> torch.Tensor:
    """1-D linear interpolation along the channels (LET); the identity when the widths are equal."""
    if hidden_BLE.shape[-1] == width:
        return hidden_BLE
    # F.interpolate reads [N, C, W]: the sequence stands where it expects channels, each token is resampled alone.
    return F.interpolate(hidden_BLE, size=width, mode="linear", align_corners=align_corners)


class Interpolate(nn.Module):
    """`interpolate` as a dimension match (the paper's).

    Compiled, or not on the CPU, each channel's place is read from a table: torch.compile would work it out for each
    token, and CUDA's kernel has one thread for all tokens of a channel, and gradients that are not deterministic.
    """

    _lower_D: torch.Tensor
    _upper_D: torch.Tensor
    _share_D: torch.Tensor

    def __init__(self, in_width: int, out_width: int, *, align_corners: bool = False) -> None:
        super().__init__()
        self._width = out_width
        self._align_corners = align_corners
        # Where each output channel lies among those of the input.
        channel_11E = torch.arange(in_width, dtype=torch.float32, device="cpu")[None, None]
        place_D = interpolate(channel_11E, out_width, align_corners=align_corners)[0, 0].clamp(0, in_width - 1)
        self.register_buffer("_lower_D", place_D.long(), persistent=False)
        self.register_buffer("_upper_D", place_D.ceil().long(), persistent=False)
        self.register_buffer("_share_D", place_D.frac(), persistent=False)

    def forward(self, hidden_BLE: torch.Tensor) -> torch.Tensor:
        by_table = torch.compiler.is_compiling() or hidden_BLE.device.type != "cpu"
        if not by_table or hidden_BLE.shape[-1] == self._width:
            return interpolate(hidden_BLE, self._width, align_corners=self._align_corners)
        lower_BLD, upper_BLD = hidden_BLE[..., self._lower_D], hidden_BLE[..., self._upper_D]
        return (lower_BLD + self._share_D * (upper_BLD - lower_BLD)).to(hidden_BLE.dtype)


class TruncateOrPad(nn.Module):
    """The first D channels, or all of them and zeros after them: a control that neither mixes nor learns."""

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self._missing = out_width - in_width

    def forward(self, hidden_BLE: torch.Tensor) -> torch.Tensor:
        return F.pad(hidden_BLE, (0, self._missing))  # a negative number cuts


class RandomOrthonormal(nn.Module):
    """A fixed random map with orthonormal columns (rows, if it narrows)."""

    weight: torch.Tensor

    def __init__(self, in_width: int, out_width: int, *, seed: int = 0) -> None:
        super().__init__()
        weight_DE = nn.init.orthogonal_(torch.empty(out_width, in_width, device="cpu"), generator=_generator(seed))
        self.register_buffer("weight", weight_DE, persistent=False)

    def forward(self, hidden_BLE: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_BLE, self.weight.to(hidden_BLE.dtype))


class LearnedLinear(nn.Module):
    """A learned linear map; starts as the interpolation, or normal with a deviation of in_width**-0.5."""

    Start = Literal["interpolate", "random"]

    def __init__(
        self, in_width: int, out_width: int, *, init: Start = "interpolate", align_corners: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        if init == "interpolate":
            weight_DE = _interpolation(in_width, out_width, align_corners=align_corners)
        else:
            weight_DE = torch.randn(out_width, in_width, generator=_generator(seed), device="cpu") * in_width**-0.5
        self.weight = nn.Parameter(weight_DE)

    def forward(self, hidden_BLE: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_BLE, self.weight)


class MLP(nn.Sequential):
    """E -> H -> H -> D with biases and SiLU between them, initialized as nn.Linear is (REPA, arXiv 2410.06940)."""

    def __init__(self, in_width: int, out_width: int, *, hidden_width: int = 2048, seed: int = 0) -> None:
        if hidden_width < 1:
            raise ValueError("hidden_width must be at least 1")
        # Drawn from a generator of its own all the same: torch's is put back.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            torch.default_generator.manual_seed(seed)
            first, middle = nn.Linear(in_width, hidden_width), nn.Linear(hidden_width, hidden_width)
            super().__init__(first, nn.SiLU(), middle, nn.SiLU(), nn.Linear(hidden_width, out_width))


class Orthogonal(nn.Module):
    """A learned linear map that preserves inner products (VkD, arXiv 2403.06213).

    The first E columns of Q = exp(A - A^T), with A [D, D] the parameter: the exponential of a skew-symmetric matrix is
    orthogonal. It starts as a random rotation; weight decay pulls Q towards the identity.
    (torch.nn.utils.parametrizations.orthogonal keeps its start in a buffer, which would have to be saved.)
    """

    def __init__(self, in_width: int, out_width: int, *, seed: int = 0) -> None:
        super().__init__()
        if in_width > out_width:
            raise ValueError(
                f"in_width is greater than out_width: an orthogonal map from {in_width} to {out_width} channels cannot "
                "keep inner products; the match on the other side can: set let.projector.side"
            )
        self._in_width = in_width
        # With this deviation, the angles that Q turns by reach +-3.8 and cos(angle) is 0 on average: Q starts far from
        # the identity, which would match channels by their order.
        deviation = 1.35 * out_width**-0.5
        angles_DD = torch.randn(out_width, out_width, generator=_generator(seed), device="cpu") * deviation
        self.weight = nn.Parameter(angles_DD)

    def forward(self, hidden_BLE: torch.Tensor) -> torch.Tensor:
        # In fp32, whatever the dtype of the maths: squarings would add up the errors of bf16.
        angles_DD = self.weight.float()
        weight_DE = torch.matrix_exp(angles_DD - angles_DD.mT)[:, : self._in_width]
        return F.linear(hidden_BLE, weight_DE.to(hidden_BLE.dtype))


class FittedMatch(nn.Module, ABC):
    """A linear match that is fitted in closed form to the tokens of some steps; one may be trained in the others.

    It starts as the interpolation. Its state_dict is what a resumed run needs.

    Attributes:
        weight: [D, E]. Written in place.
        wants_squares: Whether a fit needs the outer products given x given as well.
    """

    wants_squares = False

    def __init__(self, in_width: int, out_width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(_interpolation(in_width, out_width), requires_grad=False)

    def forward(self, hidden_BLE: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden_BLE, self.weight.to(hidden_BLE.dtype))

    @abstractmethod
    def is_fitted_in(self, step: int) -> bool:
        """Whether it is fitted at the end of a step (0-based), to that step's tokens."""

    @abstractmethod
    def fit(self, products: torch.Tensor) -> None:
        """Fits the weight, given the sum over tokens of the outer products wanted x given, [D, E], fp32.

        If it `wants_squares`, those of given x given are below them, [D + E, E].
        """


class Procrustes(FittedMatch):
    """The map with orthonormal columns (rows, if it narrows) whose results point most along the wanted states.

    Of W with W^T W = I (or W W^T = I) the one with the largest sum of y . W x is U V^T, with U S V^T = sum of y x^T the
    singular value decomposition (Schoenemann 1966). Where it does not narrow, the sum of |y - W x|^2 is also the least.
    Refitted on the tokens of step 0, `refit_every`, ... for the steps after these; in step 0 it is the interpolation.
    """

    def __init__(self, in_width: int, out_width: int, *, refit_every: int = 100) -> None:
        super().__init__(in_width, out_width)
        if refit_every < 1:
            raise ValueError("refit_every must be at least 1")
        self._refit_every = refit_every

    def is_fitted_in(self, step: int) -> bool:
        return step % self._refit_every == 0

    def fit(self, products: torch.Tensor) -> None:
        left, _, right = torch.linalg.svd(products, full_matrices=False)
        self.weight.copy_(left @ right)


class LeastSquares(FittedMatch):
    """The linear map with the least sum of |y - W x|^2 over the tokens of the first `fit_steps` steps.

    `then` it is "frozen", or "learned" from there.
    W = (sum of y x^T) (sum of x x^T + ridge * m I)^-1, with m the mean square of a channel of x times the number of
    tokens. It is fitted after each of these steps to all tokens so far.
    """

    wants_squares = True
    sums: torch.Tensor

    def __init__(
        self, in_width: int, out_width: int, *, fit_steps: int = 100, ridge: float = 1e-3, then: str = "frozen"
    ) -> None:
        super().__init__(in_width, out_width)
        if then not in ("frozen", "learned"):
            raise ValueError('then must be "frozen" or "learned"')
        self.weight.requires_grad_(then == "learned")
        if fit_steps < 1:
            raise ValueError("fit_steps must be at least 1")
        if not ridge > 0:
            raise ValueError("ridge must be more than 0")
        self._fit_steps, self._ridge = fit_steps, ridge
        self.register_buffer("sums", torch.zeros(out_width + in_width, in_width, device="cpu"))

    def is_fitted_in(self, step: int) -> bool:
        return step < self._fit_steps

    def fit(self, products: torch.Tensor) -> None:
        self.sums += products
        cross_DE, squares_EE = self.sums.split(self.weight.shape)
        mean_square = squares_EE.diagonal().mean()
        identity_EE = torch.eye(len(squares_EE), device=squares_EE.device)
        # Without a token that counts it stays as it is.
        regular_EE = squares_EE + torch.where(mean_square > 0, self._ridge * mean_square, 1.0) * identity_EE
        fitted_DE = torch.linalg.solve_ex(regular_EE, cross_DE.T)[0].T
        self.weight.copy_(torch.where(mean_square > 0, fitted_DE, self.weight))


def _interpolation(in_width: int, out_width: int, *, align_corners: bool = False) -> torch.Tensor:
    """The matrix, [D, E], of `interpolate`."""
    identity_1EE = torch.eye(in_width, device="cpu")[None]
    return interpolate(identity_1EE, out_width, align_corners=align_corners)[0].T.contiguous()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)


register_dimension_match("interpolate", Interpolate)
register_dimension_match("least_squares", LeastSquares)
register_dimension_match("linear", LearnedLinear)
register_dimension_match("mlp", MLP)
register_dimension_match("orthogonal", Orthogonal)
register_dimension_match("procrustes", Procrustes)
register_dimension_match("random", RandomOrthonormal)
register_dimension_match("truncate_or_pad", TruncateOrPad)
