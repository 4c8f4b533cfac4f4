"""Operands of einsums: tensors with a letter for each axis. One-hot vectors are held by the places of their ones."""

from collections.abc import Hashable
from typing import NamedTuple

import torch
from torch import Size, Tensor

from ggn_ntk.process.torch_internals import storage_id


class OneHot(NamedTuple):
    """One-hot vectors as an operand of :class:`ggn_ntk.Factored`, given by the places of their ones.

    They are compared and looked up, and only formed where that is cheaper.

    Attributes:
        places: Integers ``[...]``; negative for a vector of zeros.
        size: The length V of the vectors: as an operand it has the axes ``[..., V]``.
    """

    places: Tensor
    size: int

    @property
    def shape(self) -> Size:
        """Shape of the vectors, ``[..., V]``."""
        return Size([*self.places.shape, self.size])

    @property
    def ndim(self) -> int:
        """Number of axes of the vectors."""
        return self.places.ndim + 1


class Operand(NamedTuple):
    """A tensor with a letter for each axis, or one-hot vectors."""

    letters: str  # the letters of the tensor
    tensor: Tensor  # the entries; of one-hot vectors, the places of their ones
    key: Hashable = None  # what it was computed from: operands of equal keys hold equal numbers
    hot: str = ""  # of one-hot vectors, the letter of their own axis, which the tensor lacks; else empty
    size: int = 0  # the length of these vectors

    @classmethod
    def of(cls, term: str, given: Tensor | OneHot) -> "Operand":
        """Label what a rule wrote."""
        if isinstance(given, OneHot):
            return cls(term[:-1], given.places, hot=term[-1], size=given.size)
        return cls(term, given)

    @property
    def term(self) -> str:
        """All letters, as an equation has them."""
        return self.letters + self.hot

    @property
    def unlabelled(self) -> Tensor | OneHot:
        """What a rule would write."""
        return OneHot(self.tensor, self.size) if self.hot else self.tensor

    @property
    def sizes(self) -> dict[str, int]:
        """The size of each letter."""
        sizes = dict(zip(self.letters, self.tensor.shape, strict=True))
        return sizes | {self.hot: self.size} if self.hot else sizes

    def ready(self, samples: str = "n") -> "Operand":
        """Give it a key, and drop the axes of samples along which it has one value (of stride 0)."""
        tensor, letters, key = self.tensor, self.letters, memory_of(self.tensor)
        for axis in reversed(range(tensor.ndim)):
            if letters[axis] in samples and tensor.stride(axis) == 0 and tensor.shape[axis] > 1:
                tensor, letters = tensor.select(axis, 0), letters[:axis] + letters[axis + 1 :]
        return self._replace(letters=letters, tensor=tensor, key=key)

    def narrow(self, letter: str, block: slice) -> "Operand":
        """Restrict it to a block along an axis, if it has its letter."""
        axis = self.letters.find(letter)
        if axis < 0:
            return self
        tensor = self.tensor.narrow(axis, block.start, block.stop - block.start)
        return self._replace(tensor=tensor, key=(self.key, axis, block.start, block.stop))

    def aligned(self, letters: str) -> Tensor:
        """Order the axes of its tensor, with an axis of length one for each letter it lacks."""
        tensor = self.tensor.permute([self.letters.index(letter) for letter in letters if letter in self.letters])
        for axis, letter in enumerate(letters):
            if letter not in self.letters:
                tensor = tensor.unsqueeze(axis)
        return tensor

    def by_stride(self) -> list[str]:
        """List the letters of its tensor as they lie in memory, the outermost first."""
        strides = dict(zip(self.letters, self.tensor.stride(), strict=True))
        return sorted(self.letters, key=lambda letter: -strides[letter])

    def without_data(self) -> "Operand":
        """Keep shape and strides alone, for what is computed from these."""
        tensor = self.tensor
        empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return self._replace(tensor=empty)


def memory_of(tensor: Tensor) -> Hashable:
    """Tell which entries of which memory a tensor holds."""
    # Tensors without data have no address, but storages of their own.
    place = (storage_id(tensor), tensor.storage_offset()) if tensor.is_meta else tensor.data_ptr()
    return (place, tensor.shape, tensor.stride())
