"""The exact nullspace of a ViT's patch embedding: image noise that changes no token.

A patch embedding cuts the image into patches x ∈ R^(C·ph·pw) and maps each to W x + b. Noise in the kernel of W changes
no token and therefore no logit (the paper's N_θ, not trivial if C·ph·pw > D). The kernel is that of the joint matrix
over all channels; the published code takes it per channel, which gives up to D·(C − 1) dimensions less. It is computed
by a float64 SVD W = U S Rᵀ of the stored weights.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastnull.checks import RANGE_TOLERANCE, check_finite, check_number
from fastnull.nullspace.box_least_squares import box_least_squares
from fastnull.nullspace.box_projection import box_projection
from fastnull.ops.common import NATIVE_DTYPES, gpu_problem, no_autocast, switched_off
from fastnull.ops.patch_project import patch_project
from fastnull.selftest import prove
from fastnull.selftest.problems import Problem
from fastnull.vit.base import NormalizedModel, SplitViT, under_adapters, unwrap
from fastnull.vit.split import split

_NOTICED = 1e-3  # relative residual of token noise that is worth a warning


Bounds = tuple[float | Tensor, float | Tensor]
"""Lowest and highest value: numbers, or tensors that broadcast to the images."""


def check_bounds(bounds: Sequence[Tensor], size: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Expand (low, high) to `size`; raise ValueError unless both are finite, broadcast, and low <= high."""
    for bound in bounds:
        check_finite("bounds", bound)
        try:
            bound.expand(*size)
        except RuntimeError:
            raise ValueError(f"bounds must broadcast to {list(size)}; got {list(bound.shape)}") from None
    low, high = (bound.expand(*size) for bound in bounds)
    if bool((low > high).any()):
        raise ValueError("bounds must be (low, high) with low <= high everywhere")
    return low, high


def _check_floating(name: str, value: object, shape: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        kind = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name} must be a floating tensor {shape}; got {kind}")


class PatchNullspace:
    """The kernel of a patch embedding, as a space of image noise.

    Images need not be whole patches: pixels right of and below the last whole patch get no noise. A convolution drops
    them, so any change there would be invisible too, but a model that pads its images (Swin) reads them.

    Args:
        weight: of the projection [D, C, ph, pw], in any floating dtype.
        tolerance: a direction is in the kernel if its singular value is at most `tolerance` times the largest. None is
            2⁻²³ ≈ 1.2e-7, the spacing of float32: such a direction changes a token by less than its rounding, and the
            zeros of a low-rank W stored in float32 are about that large. For float64 weights None is
            max(D, C·ph·pw) · 2⁻⁵², the error of the SVD. The larger rule of thumb max(D, C·ph·pw) · 2⁻²³ finds a kernel
            in trained square embeddings (ViT-B/16) that does change the logits.

    Attributes:
        weight: the matrix [D, C·ph·pw] in float64, columns in the order channel, row, column.
        dim: dimension of the kernel per patch.
        rank: of the matrix; dim + rank = C·ph·pw.
        patch_size: (ph, pw) in pixels.
        channels, width: C and D.
        singular_values: all min(D, C·ph·pw) of them, largest first, in float64.
        tolerance: the one used, relative to the largest singular value.

    Raises:
        TypeError: weight is not a floating tensor.
        ValueError: another shape than [D, C, ph, pw], an empty one, NaN or Inf, or a tolerance outside [0, 1).
    """

    def __init__(self, weight: Tensor, *, tolerance: float | None = None) -> None:
        _check_floating("weight", weight, "[D, C, ph, pw]")
        if weight.ndim != 4 or weight.numel() == 0:
            raise ValueError(f"weight must have shape [D, C, ph, pw], none of them 0; got {list(weight.shape)}")
        if weight.is_meta:
            raise ValueError("weight is on the meta device and has no values; load the model's weights first")
        check_finite("weight", weight)
        self.width, self.channels, *patch = weight.shape
        self.patch_size = (patch[0], patch[1])
        self.weight = weight.detach().to(torch.float64).flatten(1)  # [D, K], K = C·ph·pw
        values = self.weight.shape[1]
        if tolerance is None:
            svd_error = max(self.width, values) * torch.finfo(torch.float64).eps
            tolerance = svd_error if weight.dtype == torch.float64 else torch.finfo(torch.float32).eps
        check_number("tolerance", tolerance, 0)
        if tolerance >= 1:
            raise ValueError(f"tolerance must be < 1: it is relative to the largest singular value; got {tolerance!r}")
        self.tolerance = tolerance

        # A kernel smaller than the row space needs its own basis, which the thin SVD does not give.
        wide = self.width < values < 2 * self.width
        left, self.singular_values, rows = torch.linalg.svd(self.weight, full_matrices=wide)
        self.rank = int((self.singular_values > tolerance * self.singular_values[0]).sum())
        self.dim = values - self.rank
        self._left = left[:, : self.rank]  # [D, r]
        self._rows = rows[: self.rank].T  # [K, r] orthonormal: the row space
        self._complement = self.dim >= self.rank  # v − R Rᵀ v is then the cheaper projection
        self._basis = self._rows if self._complement else rows[self.rank :].T  # [K, min(rank, dim)]
        self._casts: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @classmethod
    def from_weight(cls, weight: Tensor, *, tolerance: float | None = None) -> PatchNullspace:
        """The nullspace of a projection weight [D, C, ph, pw], in the units of the projection's input."""
        return cls(weight, tolerance=tolerance)

    @classmethod
    def from_model(cls, model: nn.Module | SplitViT, *, tolerance: float | None = None) -> PatchNullspace:
        """The nullspace of a model's patch embedding, in the units of the model's input.

        Args:
            model: a timm model (ViT, DeiT, BEiT, EVA, Swin, CaiT, Mixer, ...), a model or adapter of fastnull.vit, or
                a NormalizedModel around one, compiled or in DDP or not. For a NormalizedModel the noise is in pixels of
                [0, 1] and the kernel is that of W / std.
            tolerance: see PatchNullspace.

        Raises:
            TypeError: not a model.
            ValueError: no patch embedding, or one whose patches overlap, are padded, dilated or grouped.
        """
        weight = patch_projection(model).weight.detach()
        whole = unwrap(model.model if isinstance(model, SplitViT) else model)
        if isinstance(whole, NormalizedModel):
            weight = weight.to(torch.float64 if weight.dtype == torch.float64 else torch.float32)
            weight = weight / whole.std.to(weight.dtype)  # [D, C, ph, pw] / [1, C, 1, 1]
        return cls(weight, tolerance=tolerance)

    def project(self, images: Tensor) -> Tensor:
        """The orthogonal projection of `images` onto the nullspace, patch by patch.

        Linear, self-adjoint, idempotent and differentiable. In float32 ‖W·project(v)‖ ≤ 1e-6·‖W‖·‖v‖. 16-bit images are
        projected in float32 and rounded on return, and this rounding is not in the nullspace.

        Args:
            images: images or noise [B, C, H, W] of at least one patch.

        Returns:
            [B, C, H, W] in the dtype of `images`; zeros where `dim` is 0 and outside the whole patches.

        Raises:
            TypeError: not a floating tensor.
            ValueError: another shape, or smaller than a patch.
        """
        grid = self._grid_of(images)
        whole = self.whole_patches(images)
        dtype = torch.promote_types(images.dtype, torch.float32)
        basis = self._cast(images.device, dtype)
        with no_autocast(images.device):  # 16-bit products would leak
            if self.patch_size[0] == self.patch_size[1]:
                if images.is_cuda:
                    _prove(images.device, dtype, self.patch_size[0], len(basis), self._complement)
                noise = patch_project(whole.to(dtype), basis, self.patch_size[0], self._complement)
            else:
                patches = self._to_patches(whole.to(dtype))  # [B, h, w, K]
                part = (patches @ basis) @ basis.T
                noise = self._to_images(patches - part if self._complement else part, grid)
        return bordered(noise.to(images.dtype), images.shape)

    def whole_patches(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] without the pixels right of and below the last whole patch, as a view.

        Raises:
            TypeError, ValueError: as `project`.
        """
        (rows, columns), (ph, pw) = self._grid_of(images), self.patch_size
        return images[..., : rows * ph, : columns * pw]

    def sample(self, like: Tensor, scale: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Random noise in the nullspace: white Gaussian noise, projected and scaled.

        Args:
            like: a tensor [B, C, H, W] that gives shape, dtype and device; its values are not read.
            scale: root mean square over the values of each image, in the units of the model's input.
            generator: a CPU generator gives the same noise on every device.

        Returns:
            [B, C, H, W], without gradient.

        Raises:
            TypeError: `like` is not a floating tensor.
            ValueError: another shape, a negative scale, or no kernel (`dim` 0).
        """
        self._grid_of(like)
        check_number("scale", scale, 0)
        self._check_kernel()
        device = like.device if generator is None else generator.device
        dtype = torch.promote_types(like.dtype, torch.float32)
        white = torch.randn(like.shape, generator=generator, device=device, dtype=dtype)
        with torch.no_grad():
            noise = self.project(white.to(like.device))
            rms = noise.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()  # [B, 1, 1, 1]
            return (noise * (scale / rms)).to(like.dtype)

    @torch.no_grad()
    def preimage(
        self,
        token_noise: Tensor,
        bounds: Bounds | None = None,
        *,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The image noise whose tokens are closest to `token_noise`: v that minimises ‖W v − t‖, patch by patch.

        Without bounds it is the solution of least norm, W⁺ t by the SVD. If D > C·ph·pw most token noise has no exact
        image: a warning is given, and the residual shows the error. With bounds it is a box-constrained least-squares
        solution (fastnull.nullspace.box_least_squares).

        Args:
            token_noise: [..., N, D] at the output of the projection (before a norm inside the patch embedding, as in
                Swin); N patches in row order.
            bounds: (lowest, highest) noise, finite; numbers or tensors that broadcast to [..., C, H, W]. (−x, 1 − x)
                keeps images x within [0, 1].
            grid: (rows, columns) of patches; None means a square grid.

        Returns:
            Image noise [..., C, H, W] in whole patches and the relative residual ‖W v − t‖ / ‖t‖ over all patches of a
            noise [...] (0 if t is 0), computed in float64 and returned in the dtype of `token_noise`.

        Raises:
            TypeError: token_noise is not a floating tensor.
            ValueError: a width other than D, N that does not fill the grid, NaN or Inf, or invalid bounds.
        """
        rows, columns = self._check_tokens(token_noise, grid)
        lead = token_noise.shape[:-2]
        tokens = token_noise.to(torch.float64).reshape(-1, self.width)  # [M, D], M noises times patches
        left, right = self._left.to(tokens.device), self._rows.to(tokens.device)
        scales = self.singular_values[: self.rank].to(tokens.device)
        reachable = tokens @ left  # [M, r]
        patches = (reachable / scales) @ right.T  # [M, K]
        self._warn_of_unreachable(tokens, reachable)
        if bounds is not None:
            size = (*lead, self.channels, rows * self.patch_size[0], columns * self.patch_size[1])
            low, high = (self._rows_of(x.reshape(-1, *size[-3:])) for x in self._bounds(bounds, size, tokens.device))
            patches = box_least_squares(right * scales, reachable, low, high, patches)

        missed = (patches @ self.weight.T.to(tokens.device) - tokens).view(token_noise.shape)
        length = torch.linalg.vector_norm(token_noise.to(torch.float64), dim=(-2, -1))
        residual = torch.linalg.vector_norm(missed, dim=(-2, -1)) / torch.where(length == 0, 1, length)
        noise = self._to_images(patches.unflatten(0, (-1, rows, columns)), (rows, columns))
        noise = noise.view(*lead, *noise.shape[1:])
        return noise.to(token_noise.dtype), torch.where(length == 0, 0, residual).to(token_noise.dtype)

    @torch.no_grad()
    def maximize(self, images: Tensor, target: Tensor | None = None, bounds: Bounds = (0.0, 1.0)) -> Tensor:
        """Change `images` as much as possible, or towards `target`, without changing their tokens.

        With a target the problem is convex: the result is the nearest picture to it within the bounds that has the
        tokens of `images`, up to 0.25 % of the distance (fastnull.nullspace.box_projection). Without one, the target of
        every pixel is its farther bound. This gives a large change, not provably the largest, because that problem is
        not convex. Computed in float64. Ours.

        Args:
            images: [B, C, H, W] within the bounds. Pixels outside the whole patches do not change.
            target: [B, C, H, W] or [C, H, W], in the units of the images; may lie outside the bounds.
            bounds: (lowest, highest) values of the pictures, finite; numbers or tensors that broadcast to [B, C, H, W].
                The default is for pixels and a NormalizedModel.

        Returns:
            The changed pictures [B, C, H, W] in the dtype of `images`, within the bounds. Before rounding to that dtype
            ‖W·change‖ is at most 1e-7 of ‖W‖·‖target − images‖.

        Raises:
            TypeError: images or target are not floating tensors.
            ValueError: another shape, NaN or Inf, images outside the bounds, invalid bounds, or no kernel (`dim` 0).
        """
        grid = self._grid_of(images)
        check_finite("images", images)
        self._check_kernel()
        wide = images.to(torch.float64)
        within = self._bounds(bounds, images.shape, images.device)
        outside = float(torch.maximum(within[0] - wide, wide - within[1]).max()) if wide.numel() else 0.0
        if outside > RANGE_TOLERANCE:
            raise ValueError(f"images must lie within bounds; they leave them by up to {outside:.4g}")
        patches, low, high = (self._rows_of(x) for x in (wide, *within))  # [M, K], M = B·h·w
        if target is None:
            wanted = torch.where(patches - low > high - patches, low, high)
        else:
            wanted = self._rows_of(self._like(target, images))
        # a pixel outside by a rounding error keeps its value
        room = ((low - patches).clamp(max=0), (high - patches).clamp(min=0))
        weights = (self.singular_values[: self.rank] / self.singular_values[0]).to(images.device)
        change = box_projection(wanted - patches, self._rows.to(images.device), *room, weights)
        changed = self._to_images((patches + change).clamp(low, high).unflatten(0, (-1, *grid)), grid)
        result = wide.clamp(*within)
        self.whole_patches(result).copy_(changed)
        return result.to(images.dtype)

    def __repr__(self) -> str:
        height, width = self.patch_size
        return (
            f"PatchNullspace(dim={self.dim}, rank={self.rank}, patch={height}x{width}, channels={self.channels}, "
            f"width={self.width}, tolerance={self.tolerance:.2g})"
        )

    def _cast(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (device, dtype)
        if key not in self._casts:
            self._casts[key] = self._basis.to(device=device, dtype=dtype).contiguous()
        return self._casts[key]

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        """Check a batch of images and return its (rows, columns) of whole patches, without a host sync."""
        _check_floating("images", images, "[B, C, H, W]")
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images must have shape [B, {self.channels}, H, W]; got {list(images.shape)}")
        (height, width), (ph, pw) = images.shape[2:], self.patch_size
        if height < ph or width < pw:
            raise ValueError(f"images must hold at least one patch of {ph}x{pw} pixels; got {height}x{width}")
        return height // ph, width // pw

    def _warn_of_unreachable(self, tokens: Tensor, reachable: Tensor) -> None:
        """Warn if tokens are wider than patches and `tokens` [M, D] exceed their reachable part [M, r]."""
        values = self.weight.shape[1]
        whole, part = float(tokens.square().sum()), float(reachable.square().sum())
        if self.width > values and part < (1 - _NOTICED**2) * whole:
            warnings.warn(
                f"tokens of width {self.width} hold more than the {values} values of a patch: no image comes "
                f"nearer to this token noise than {100 * math.sqrt(1 - part / whole):.2g} % of its norm. The nearest "
                "is returned with its residual",
                RuntimeWarning,
                stacklevel=4,  # past no_grad's wrapper
            )

    def _check_kernel(self) -> None:
        if self.dim == 0:
            values, smallest = self.weight.shape[1], self.singular_values[-1] / self.singular_values[0]
            raise ValueError(
                f"this patch embedding has no nullspace: its {self.width}x{values} matrix has rank {self.rank} = all "
                f"{values} values of a patch (smallest singular value {smallest:.2g} "
                f"of the largest, tolerance {self.tolerance:.2g}). Use token noise (fastnull.synthesis, site 'patch'), "
                f"or a model whose width is below {values}, such as vit_small_patch16_224 or vit_base_patch32_224"
            )

    def _like(self, target: Tensor, images: Tensor) -> Tensor:
        """The target in float64, shaped as the images."""
        _check_floating("target", target, "shaped as the images")
        if target.shape not in (images.shape, images.shape[1:]):
            raise ValueError(
                f"target must have the images' shape {list(images.shape)} or {list(images.shape[1:])}; got "
                f"{list(target.shape)}: resize it first"
            )
        check_finite("target", target)
        return target.to(images.device, torch.float64).expand(images.shape)

    def _check_tokens(self, token_noise: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
        _check_floating("token_noise", token_noise, "[..., N, D]")
        if token_noise.ndim < 2 or token_noise.shape[-1] != self.width or token_noise.shape[-2] == 0:
            raise ValueError(f"token_noise must have shape [..., N, {self.width}]; got {list(token_noise.shape)}")
        check_finite("token_noise", token_noise)
        count = token_noise.shape[-2]
        rows, columns = grid or (math.isqrt(count),) * 2
        if rows * columns != count or rows < 1:
            given = f"grid {rows}x{columns} does not hold them" if grid else "they fill no square"
            raise ValueError(
                f"token_noise holds {count} patch tokens and {given}; give grid=(rows, columns), and leave class and "
                "register tokens out"
            )
        return rows, columns

    def _bounds(self, bounds: Bounds, size: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Checked bounds → two tensors of `size` in float64."""
        wide = tuple(torch.as_tensor(bound, dtype=torch.float64, device=device) for bound in bounds)
        return check_bounds(wide, size)

    def _rows_of(self, images: Tensor) -> Tensor:
        """[B, C, H, W] → the whole patches [M, K], a copy."""
        return self._to_patches(self.whole_patches(images)).flatten(0, 2)

    def _to_patches(self, images: Tensor) -> Tensor:
        """[B, C, h·ph, w·pw] → [B, h, w, C·ph·pw], a copy."""
        batch, (ph, pw) = images.shape[0], self.patch_size
        rows, columns = images.shape[2] // ph, images.shape[3] // pw
        cut = images.reshape(batch, self.channels, rows, ph, columns, pw)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows, columns, self.weight.shape[1])

    def _to_images(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, h, w, C·ph·pw] → [B, C, h·ph, w·pw], a copy."""
        (rows, columns), (ph, pw) = grid, self.patch_size
        cut = patches.view(-1, rows, columns, self.channels, ph, pw).permute(0, 3, 1, 4, 2, 5)
        return cut.reshape(-1, self.channels, rows * ph, columns * pw)


def bordered(images: Tensor, size: Sequence[int]) -> Tensor:
    """Images [..., C, h·ph, w·pw] with zeros right and below, up to the last two sides of `size`."""
    right, below = size[-1] - images.shape[-1], size[-2] - images.shape[-2]
    return F.pad(images, (0, right, 0, below)) if right or below else images


@functools.cache
def _prove(device: torch.device, dtype: torch.dtype, patch_size: int, pixels: int, complement: bool) -> None:
    """Have the kernels of the projection checked, unless this machine knows them."""
    if dtype in NATIVE_DTYPES["cuda"] and not switched_off() and not gpu_problem(device):
        prove([Problem("patch_project_out", (dtype, (patch_size, pixels, int(complement))))], device)


def patch_projection(model: nn.Module | SplitViT) -> nn.Conv2d:
    """The convolution that cuts a model's images into patches.

    Raises:
        TypeError: not a model.
        ValueError: there is none, it is inside an adapter, or its patches overlap, are padded, dilated or grouped.
    """
    if not isinstance(model, (nn.Module, SplitViT)):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    network = unwrap(model.network if isinstance(model, (NormalizedModel, SplitViT)) else unwrap(model))
    if isinstance(network, NormalizedModel):
        network = unwrap(network.network)
    name = type(network).__name__
    # timm names the layer that takes the image, even if it is not patch_embed.proj
    first = (getattr(network, "pretrained_cfg", None) or {}).get("first_conv")
    layer: object = dict(network.named_modules()).get(first) if isinstance(first, str) else None
    if layer is None:
        layer = _projection_without_config(model, network)
    # a subclass with its own forward (weight standardisation, padding) does not apply the stored weight
    if not isinstance(layer, nn.Conv2d) or type(layer).forward is not nn.Conv2d.forward:
        what = f"its images go through {type(layer).__name__}" if layer is not None else "it has no patch_embed.proj"
        raise ValueError(
            f"{name} has no patch embedding to take the nullspace of: {what}. Needed is one nn.Conv2d whose stride is "
            "its kernel size, applied to the image itself, as in ViT, DeiT, BEiT, EVA, DINO, Swin and CaiT"
        )
    around = next((x for x in network.modules() if x is not layer and under_adapters(x) is layer), None)
    if around is not None:
        raise ValueError(
            f"{name} has an adapter around its patch embedding ({type(around).__name__} of {type(around).__module__}), "
            "so the weight there is not the one that images go through: merge the adapter into it first (PEFT's "
            "merge_and_unload)"
        )
    plain = (
        tuple(layer.stride) == tuple(layer.kernel_size)
        and layer.padding in ("valid", (0, 0), 0)
        and tuple(layer.dilation) == (1, 1)
        and layer.groups == 1
    )
    if not plain:
        raise ValueError(
            f"{name} has no exact patch nullspace here: its first layer {layer} lets patches overlap, pads, dilates or "
            "groups them, so its kernel is not a product of kernels per patch. Needed is stride = kernel size without "
            "padding, dilation or groups"
        )
    return layer


def _projection_without_config(model: nn.Module | SplitViT, network: nn.Module) -> object:
    try:
        return (model if isinstance(model, SplitViT) else split(network)).projection
    except ValueError:
        embed = getattr(network, "patch_embed", None)
        return getattr(embed, "proj", None)
