"""Put a personal adapter and the shared one that it extends into one LoRA.

With the factors of both stacked, [B_s B_o] · [A_s; A_o] = B_s A_s + B_o A_o, so one adapter of the summed rank computes the
sum of both. Nothing is decomposed: the numbers of both lie in the stacked tensors as they were, but for B_s where the two
have other scales. Without torch, so that clients can do it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load, save

from perennial.storage.objects.keys import digest_of
from perennial.storage.objects.safetensors_check import check_safetensors
from perennial.storage.registry.manifest import BlobRef, Manifest
from perennial.streams.client.backend import UnfitVersionError

_A: Final = ".lora_A."
_B: Final = ".lora_B."
MOST_ALPHA: Final = 1e6
_REMEDY: Final = "let both adapters learn on one base; see `perennial adapters rebase`"


@dataclass(frozen=True)
class Part:
    """A version and its weights, as they are stored.

    Attributes:
        version: Digest of its manifest, `sha256:<64 hex>`.
        manifest: Its manifest.
        weights: Content of its safetensors file.
    """

    version: str
    manifest: Manifest
    weights: bytes

    @property
    def scale(self) -> Fraction:
        """Alpha / rank, by which LoRA's output is multiplied.

        Raises:
            UnfitVersionError: The manifest names no alpha that servers take.
        """
        alpha = self.manifest.config.get("alpha")
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 1 / MOST_ALPHA <= alpha <= MOST_ALPHA:
            raise UnfitVersionError(
                f"{self.version} names no alpha that can be composed", got=str(alpha)[:80],
                allowed=f"a number from {1 / MOST_ALPHA:g} to {MOST_ALPHA:g}", remedy="see PERENNIAL_ALPHA of the learner",
            )  # fmt: skip
        return Fraction(alpha) / self.manifest.rank


def composed_digest(own: str, shared: str) -> str:
    """Return the digest that names two versions which are served as one, `sha256:<64 hex>`.

    Args:
        own: Version of the personal adapter, a digest.
        shared: Version of the shared adapter, a digest.
    """
    return digest_of(f"composed\n{own}\n{shared}".encode())


def compose(own: Part, shared: Part) -> Part:
    """Return one version that computes what both compute together.

    Its manifest is that of the personal adapter with the rank, alpha and weights of the composed LoRA, and without probes:
    nobody measured what both predict together. It is never in the object store. The rank is the sum of both. Servers ask for
    a whole alpha: where the sum gives none, the rank is filled up with zeros, to twice the sum at most.

    Args:
        own: The personal adapter's version.
        shared: The shared adapter's version.

    Raises:
        UnfitVersionError: They belong to different bases or layers, one names no alpha that servers take or has other tensors
            than float32 factors of its rank, or the shared one's numbers are not finite at the own one's scale.
        IntegrityError: The weights are no safetensors.
    """
    if own.manifest.base_sha256 != shared.manifest.base_sha256:
        raise UnfitVersionError(
            f"{own.manifest.adapter} and {shared.manifest.adapter} belong to different bases",
            got=f"{own.manifest.base_model} and {shared.manifest.base_model}", allowed="one base", remedy=_REMEDY,
        )  # fmt: skip
    scale = own.scale
    least = own.manifest.rank + shared.manifest.rank
    filled_up = math.ceil(least / scale.denominator) * scale.denominator
    rank = filled_up if filled_up <= 2 * least else least
    alpha = scale * rank
    of_own, of_shared = _tensors(own), _tensors(shared)
    if of_own.keys() != of_shared.keys():
        raise UnfitVersionError(
            f"{own.manifest.adapter} and {shared.manifest.adapter} have other layers",
            got=sorted(of_own.keys() ^ of_shared.keys())[:4], allowed="the same layers", remedy=_REMEDY,
        )  # fmt: skip
    ratio = np.float32(float(shared.scale / scale))
    stacked = {name: _stacked(name, of_own[name], of_shared[name], ratio, rank) for name in of_own}
    weights = save(stacked)
    manifest = own.manifest.model_copy(
        update={
            "rank": rank, "config": {**own.manifest.config, "rank": rank, "alpha": int(alpha) if alpha.denominator == 1 else float(alpha)}, "probes": {},
            "weights": BlobRef(digest=digest_of(weights), size_bytes=len(weights)),
        }
    )  # fmt: skip
    return Part(composed_digest(own.version, shared.version), manifest, weights)


def _tensors(part: Part) -> dict[str, NDArray[Any]]:
    """Return the tensors of a version; raise UnfitVersionError unless they are the factors of a LoRA of its rank."""
    check_safetensors(part.weights)
    try:
        found: dict[str, NDArray[Any]] = load(part.weights)
    except (KeyError, ValueError, TypeError) as error:
        raise UnfitVersionError(f"{part.version} holds numbers of an unknown kind", got=str(error)[:200]) from error
    for name, tensor in found.items():
        axis = _rank_axis(name)
        if axis is None or tensor.ndim != 2 or tensor.shape[axis] != part.manifest.rank or tensor.dtype != np.float32:
            raise UnfitVersionError(
                f"{part.version} cannot be served together with another adapter",
                got=f"{name}: {tensor.dtype} {tensor.shape}", allowed=f"float32 factors of rank {part.manifest.rank}",
            )  # fmt: skip
    return found


def _rank_axis(name: str) -> int | None:
    """Return the axis of the rank: A is (rank, inputs), B is (outputs, rank); None for another tensor."""
    if _A in name:
        return 0
    return 1 if _B in name else None


def _stacked(name: str, own: NDArray[Any], shared: NDArray[Any], ratio: np.float32, rank: int) -> NDArray[np.float32]:
    """Return a factor of both, the shared one in front, filled up with zeros."""
    axis = _rank_axis(name) or 0
    if own.shape[1 - axis] != shared.shape[1 - axis]:
        raise UnfitVersionError(
            "a personal and a shared adapter have layers of other sizes", got=f"{name}: {own.shape} and {shared.shape}",
            allowed="the same sizes but for the rank", remedy=_REMEDY,
        )  # fmt: skip
    filler = np.zeros_like(own, shape=_of_rank(own, axis, rank - own.shape[axis] - shared.shape[axis]))
    # A product with a ratio of 1 or of a power of two is exact.
    with np.errstate(over="ignore"):
        of_shared = shared * ratio if axis else shared
    if not np.isfinite(of_shared).all():
        raise UnfitVersionError(
            "a shared adapter's numbers are not finite at the scale of the personal one", got=f"{name} times {ratio}",
            allowed="finite numbers", remedy="see PERENNIAL_ALPHA of the learner",
        )  # fmt: skip
    return np.ascontiguousarray(np.concatenate([of_shared, own, filler], axis), dtype=np.float32)


def _of_rank(tensor: NDArray[Any], axis: int, rank: int) -> tuple[int, ...]:
    return (rank, tensor.shape[1]) if axis == 0 else (tensor.shape[0], rank)
