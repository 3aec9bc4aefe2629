"""Noise in ComfyUI's place and in fastdiff's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.integrations._brownian_tree import BrownianTree
from fastdiff.integrations._walk_denoiser import Draw, NoiseSource
from fastdiff.ops.noise import Stream, as_seeds, randn

_SEEDS = 1 << 64

# solvers to which ComfyUI gives a Brownian tree, where others get a generator's normals
ON_A_TREE = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde")


class ImageSeed(int):
    """A seed that also says which images of its batch are meant, of which ComfyUI's samplers pass
    on only the number.

    Attributes:
        images: index in the batch of each image.
    """

    images: tuple[int, ...]

    def __new__(cls, seed: int, images: tuple[int, ...] = ()) -> ImageSeed:
        made = super().__new__(cls, seed)
        made.images = images
        return made


def seeds_of(seed: int | None, count: int) -> Tensor:
    """(count,) int64: image k has the seed s + k, or s + its index that an `ImageSeed` tells."""
    images = tuple(range(count))
    if isinstance(seed, ImageSeed) and len(seed.images) == count:
        images = seed.images
    return as_seeds([(int(seed or 0) + k) % _SEEDS for k in images], count, where="fastdiff")


class CounterNoise:
    """A NOISE object: image k of a batch has the initial noise of seed + k, whatever else is in the
    batch and on whatever device.

    Attributes:
        seed: what ComfyUI gives to the sampler; after `generate_noise` it knows the images, too.
    """

    def __init__(self, seed: int) -> None:
        self.seed: int = seed

    def generate_noise(self, input_latent: dict[str, Any]) -> Tensor:
        """(N, *S) float32 on the CPU, for the "samples" of a latent; its "batch_index" counts."""
        samples = input_latent["samples"]
        count = samples.shape[0]
        index = input_latent.get("batch_index")
        images = tuple(range(count)) if index is None else tuple(int(k) for k in index)
        self.seed = ImageSeed(int(self.seed), images)
        seeds = seeds_of(self.seed, count)
        return randn(seeds, tuple(samples.shape[1:]), stream=Stream.INITIAL)


class _Path:
    """The one path of a tree, called as torchsde's is."""

    def __init__(self, tree: BrownianTree) -> None:
        self._tree = tree

    def __call__(self, ta: Any, tb: Any) -> Tensor:
        return self._tree(float(ta), float(tb))[0]


def quicken(sampler: Any, low: float, high: float, seed: int | None) -> None:
    """Put our tree in the place of torchsde's in ComfyUI's noise sampler: the same values.

    Whose device, dtype and sign stay ComfyUI's own matter. A sampler that somebody has put in the
    place of ComfyUI's stays as it is, unless its tree is that of this seed all the same.
    """
    trees = getattr(getattr(sampler, "tree", None), "trees", None)
    if not isinstance(seed, int) or not isinstance(trees, (list, tuple)) or len(trees) != 1:
        return
    (theirs,) = trees
    if type(theirs).__module__.partition(".")[0] != "torchsde":
        return
    ours = _Path(BrownianTree(low, high, [seed], theirs.shape, theirs.dtype, theirs.device))
    ends = round(low, 6), round(high, 6)  # as torchsde keeps them
    if torch.equal(ours(*ends), theirs(*ends)):
        sampler.tree.trees = (ours,)


def comfyui_noise(solver: str, x: Tensor, sigmas: Tensor, seed: int | None) -> NoiseSource:
    """Draws as ComfyUI's own sampler of this name makes them, by its own functions.

    Args:
        sigmas: (steps + 1,) float32 levels; a Brownian tree spans those above 0.
    """
    from comfy.k_diffusion import sampling  # type: ignore[import-not-found]

    sampler: Any = None

    def draw(wanted: Draw) -> Tensor:
        nonlocal sampler
        if wanted.stream == Stream.CHURN:
            return torch.randn_like(x)
        if sampler is None and solver in ON_A_TREE:
            low, high = sigmas[sigmas > 0].min(), sigmas.max()
            sampler = sampling.BrownianTreeNoiseSampler(x, low, high, seed=seed, cpu=True)
            quicken(sampler, float(low), float(high), seed)
        elif sampler is None:
            sampler = sampling.default_noise_sampler(x, seed=seed)
        given: Tensor = sampler(
            sigmas.new_tensor(wanted.sigma), sigmas.new_tensor(wanted.sigma_next)
        )
        return given

    return draw
