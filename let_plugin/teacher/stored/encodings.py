"""How the teacher's states are stored: a few numbers per token from which they are made again.

Pure functions of tensors, on any device. A token without a state, all zeros, is stored as zeros and decodes to zeros.

Shape legend: B batch, L sequence, E width of one layer's states, W channels kept of it, C channels of a stored column.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
import torch.nn.functional as F

_INT8_MAX = 127


class Column(NamedTuple):
    """What is stored of each token under one name: `width` numbers of `dtype`."""

    dtype: torch.dtype
    width: int


class Encoding(ABC):
    """Stores the states of one layer.

    Args:
        width: E.
    """

    def __init__(self, width: int) -> None:
        self.width = width

    @property
    @abstractmethod
    def columns(self) -> dict[str, Column]:
        """What is stored, by name."""

    @abstractmethod
    def encode(self, states_BLE: torch.Tensor) -> dict[str, torch.Tensor]:
        """The columns of states of any floating dtype: name -> [B, L, C]."""

    @abstractmethod
    def decode(self, columns: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        """The states in `dtype`, [B, L, E], from their columns."""

    @property
    def bytes_per_token(self) -> int:
        return sum(column.dtype.itemsize * column.width for column in self.columns.values())


class Plain(Encoding):
    """The states themselves, rounded to `dtype`: bit for bit what a teacher of that dtype returns."""

    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__(width)
        self._dtype = dtype

    @property
    def columns(self) -> dict[str, Column]:
        return {"values": Column(self._dtype, self.width)}

    def encode(self, states_BLE: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"values": states_BLE.to(self._dtype)}

    def decode(self, columns: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return columns["values"].to(dtype)


class Int8(Encoding):
    """Integers from -127 to 127 times a scale of each token's own, in fp32: its largest channel / 127.

    The error of a channel is at most half of the scale.
    """

    @property
    def columns(self) -> dict[str, Column]:
        return {"values": Column(torch.int8, self.width), "scales": Column(torch.float32, 1)}

    def encode(self, states_BLE: torch.Tensor) -> dict[str, torch.Tensor]:
        states_BLE = states_BLE.float()
        scales_BL1 = states_BLE.abs().amax(dim=-1, keepdim=True) / _INT8_MAX
        # A scale of 0 is that of a state of zeros: 0 / 1. The clamp is for a scale that was rounded down.
        values_BLE = (states_BLE / scales_BL1.masked_fill(scales_BL1 == 0, 1)).round().clamp(-_INT8_MAX, _INT8_MAX)
        return {"values": values_BLE.to(torch.int8), "scales": scales_BL1}

    def decode(self, columns: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return (columns["values"].float() * columns["scales"]).to(dtype)


class Projection(Encoding):
    """The states' coordinates, in bf16, in a subspace of W dimensions.

    The cosine between a state and what is left of it is the share of its length that lies in the subspace.

    Args:
        basis_EW: An orthonormal basis of the subspace, fp32: `Moment.basis` or `random_basis`.
    """

    def __init__(self, basis_EW: torch.Tensor) -> None:
        super().__init__(basis_EW.shape[0])
        self.basis_EW = basis_EW

    @property
    def columns(self) -> dict[str, Column]:
        return {"values": Column(torch.bfloat16, self.basis_EW.shape[1])}

    def encode(self, states_BLE: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"values": (states_BLE.float() @ self.basis_EW).bfloat16()}

    def decode(self, columns: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
        return (columns["values"].float() @ self.basis_EW.T).to(dtype)


class Moment:
    """The uncentred second moment of states of length 1, summed over tokens: fp64, on the states' device.

    Of length 1, since the loss looks at directions: of all subspaces of W dimensions, that of the W largest eigenvalues
    has the largest mean squared cosine between a state and its projection.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        self.sum_EE = torch.zeros(width, width, dtype=torch.float64, device=device)

    def add(self, states_BLE: torch.Tensor) -> None:
        units_NE = F.normalize(states_BLE.flatten(0, -2).float(), dim=-1)
        self.sum_EE += units_NE.T @ units_NE

    def basis(self, num_channels: int) -> torch.Tensor:
        """Orthonormal basis of the W main directions, [E, W], fp32, on the CPU."""
        _, vectors_EE = torch.linalg.eigh(self.sum_EE.cpu())
        return _signed(vectors_EE[:, -num_channels:].flip(1))


def random_basis(width: int, num_channels: int, seed: int) -> torch.Tensor:
    """Orthonormal basis of a random subspace, uniformly distributed, [E, W], fp32, on the CPU."""
    generator = torch.Generator().manual_seed(seed)
    gaussian_EW = torch.randn(width, num_channels, generator=generator, dtype=torch.float64)
    return _signed(torch.linalg.qr(gaussian_EW).Q)


def cosines(states_BLE: torch.Tensor, decoded_BLE: torch.Tensor) -> torch.Tensor:
    """Cosine between each state and what was made of it, fp32, of the tokens that have a state: [tokens]."""
    has_state_BL = states_BLE.ne(0).any(dim=-1)
    return F.cosine_similarity(states_BLE[has_state_BL].float(), decoded_BLE[has_state_BL].float(), dim=-1).clamp(-1, 1)


def _signed(basis_EW: torch.Tensor) -> torch.Tensor:
    """The basis with the largest entry of each column positive: one of the many that span the same subspace."""
    largest_1W = basis_EW.gather(0, basis_EW.abs().argmax(dim=0, keepdim=True))
    return (basis_EW * largest_1W.sign()).float().contiguous()
