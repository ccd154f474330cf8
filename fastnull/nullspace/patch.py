"""The exact nullspace of a ViT's patch embedding: image noise that no token ever shows.

A patch embedding cuts the image into patches x ∈ R^(C·ph·pw) and maps each to W x + b. Whatever lies in the kernel of
W, per patch, leaves every token, hence every logit, as it was (the paper's N_θ, which is not trivial whenever
C·ph·pw > D). The kernel is that of the joint matrix over all channels: taking it channel by channel, as the published
code does, finds up to D·(C − 1) dimensions less. Everything here is decided by a float64 SVD W = U S Rᵀ of the stored
weights.
"""

from __future__ import annotations

import functools
import math
import warnings

import torch
from torch import Tensor, nn

from fastnull.checks import RANGE_TOLERANCE, check_finite, check_number
from fastnull.nullspace.box_least_squares import box_least_squares
from fastnull.nullspace.box_projection import box_projection
from fastnull.ops.common import NATIVE_DTYPES, no_autocast, switched_off, triton_problem
from fastnull.ops.patch_project import patch_project
from fastnull.selftest import prove
from fastnull.selftest.problems import Problem
from fastnull.vit.base import NormalizedModel, SplitViT, under_adapters, unwrap
from fastnull.vit.split import split

_NOTICED = 1e-3  # a part of the token noise, against all of it, whose loss is worth a warning


class PatchNullspace:
    """The kernel of a patch embedding, as a space of image noise.

    Args:
        weight: of the projection [D, C, ph, pw], in any floating dtype.
        tolerance: a direction counts as kernel where its singular value is at most `tolerance` times the largest.
            None takes 2⁻²³ ≈ 1.2e-7, the spacing of float32: such a direction moves a token by less than float32
            rounds it, and a W of lower rank that was stored in float32 has its zeros up to about there. For float64
            weights None takes max(D, C·ph·pw) · 2⁻⁵², the error of the SVD. The much larger rule of thumb
            max(D, C·ph·pw) · 2⁻²³ finds a kernel in trained square embeddings (ViT-B/16) that the logits can see.

    Attributes:
        weight: the matrix [D, C·ph·pw] in float64, columns in the order channel, row, column.
        dim: dimension of the kernel, a patch.
        rank: dimensions that the tokens see; dim + rank = C·ph·pw.
        patch_size: (ph, pw) in pixels.
        channels, width: C and D.
        singular_values: all min(D, C·ph·pw) of them, largest first, in float64.
        tolerance: as decided, relative to the largest singular value.

    Raises:
        TypeError: weight is not a floating tensor.
        ValueError: another shape than [D, C, ph, pw], an empty one, NaN or Inf, or a tolerance outside [0, 1).
    """

    def __init__(self, weight: Tensor, *, tolerance: float | None = None) -> None:
        if not isinstance(weight, Tensor) or not weight.is_floating_point():
            kind = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
            raise TypeError(f"weight must be a floating tensor [D, C, ph, pw]; got {kind}")
        if weight.ndim != 4 or weight.numel() == 0:
            raise ValueError(f"weight must have shape [D, C, ph, pw], none of them 0; got {list(weight.shape)}")
        if weight.is_meta:
            raise ValueError("weight lies on the meta device and holds no values; load the model's weights first")
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

        # Where the kernel may turn out smaller than the row space its own basis is wanted, which the thin SVD lacks.
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
        """The nullspace of a projection weight [D, C, ph, pw], for images as the projection takes them."""
        return cls(weight, tolerance=tolerance)

    @classmethod
    def from_model(cls, model: nn.Module | SplitViT, *, tolerance: float | None = None) -> PatchNullspace:
        """The nullspace of a model's patch embedding, for images as the model takes them.

        Args:
            model: a timm model (ViT, DeiT, BEiT, EVA, Swin, CaiT, Mixer, ...), a model or adapter of fastnull.vit, or
                a NormalizedModel around one; torch.compile and DDP wrappers are looked through. For a NormalizedModel
                the noise is in pixels of [0, 1]: it sees (x − mean) / std, so the kernel is that of W / std.
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
        """The part of `images` that the patch embedding cannot see; the orthogonal projection, patch by patch.

        Linear, self-adjoint, idempotent and differentiable. In float32 ‖W·project(v)‖ ≤ 1e-6·‖W‖·‖v‖; 16-bit images
        are projected in float32 and rounded on return, which lets their own rounding leak.

        Args:
            images: images or noise [B, C, H, W], H and W multiples of the patch.

        Returns:
            [B, C, H, W] in the dtype of `images`; zeros where `dim` is 0.

        Raises:
            TypeError: not a floating tensor.
            ValueError: another shape, or H or W no multiple of the patch.
        """
        grid = self._grid_of(images)
        dtype = torch.promote_types(images.dtype, torch.float32)
        basis = self._cast(images.device, dtype)
        with no_autocast(images.device):  # 16-bit products would leak
            if self.patch_size[0] == self.patch_size[1]:
                if images.is_cuda:
                    _prove(images.device, dtype, self.patch_size[0], len(basis), self._complement)
                noise = patch_project(images.to(dtype), basis, self.patch_size[0], self._complement)
            else:
                patches = self._to_patches(images.to(dtype))  # [B, h, w, K]
                part = (patches @ basis) @ basis.T
                noise = self._to_images(patches - part if self._complement else part, grid)
        return noise.to(images.dtype)

    def sample(self, like: Tensor, scale: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Random noise that the patch embedding cannot see: white Gaussian noise, projected and scaled.

        Args:
            like: a tensor [B, C, H, W] that gives shape, dtype and device; its values are not read.
            scale: root mean square over the values of each image, in units of the images (pixels of [0, 1], or
                normalised values for a model that normalises nothing itself).
            generator: makes the noise repeatable; a CPU generator gives the same noise on every device.

        Returns:
            [B, C, H, W], without gradient.

        Raises:
            TypeError: `like` is not a floating tensor.
            ValueError: another shape, a negative scale, or an embedding without kernel (`dim` 0).
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
        bounds: tuple[float | Tensor, float | Tensor] | None = None,
        *,
        grid: tuple[int, int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The image noise whose tokens come closest to `token_noise`: v that minimises ‖W v − t‖, patch by patch.

        Without bounds it is the one of least norm, W⁺ t by the SVD. Where D > C·ph·pw most token noise has no image
        behind it: a warning says so, and the residual how much is missed. With bounds it is a box-constrained
        least-squares solution by accelerated projected gradient steps, stopped by a duality gap
        (fastnull.nullspace.box_least_squares).

        Args:
            token_noise: [..., N, D] at the output of the projection (where a norm follows inside the patch embedding,
                as in Swin, before that norm); N patches in row order.
            bounds: (lowest, highest) noise, finite; numbers or tensors that broadcast to [..., C, H, W]. For images x
                in [0, 1] that must stay there: (−x, 1 − x).
            grid: (rows, columns) of patches; None takes a square one.

        Returns:
            Image noise [..., C, H, W] and the relative residual ‖W v − t‖ / ‖t‖ over all patches of a noise [...]
            (0 where t is 0), computed in float64 and returned in the dtype of `token_noise`.

        Raises:
            TypeError: token_noise is not a floating tensor.
            ValueError: another width than D, N that does not fill the grid, NaN or Inf, or bounds that are not finite,
                cross, or do not broadcast.
        """
        rows, columns = self._check_tokens(token_noise, grid)
        lead = token_noise.shape[:-2]
        tokens = token_noise.to(torch.float64).reshape(-1, self.width)  # [M, D], M noises times patches
        left, right = self._left.to(tokens.device), self._rows.to(tokens.device)
        scales = self.singular_values[: self.rank].to(tokens.device)
        seen = tokens @ left  # [M, r]
        patches = (seen / scales) @ right.T  # [M, K]
        self._warn_of_unreachable(tokens, seen)
        if bounds is not None:
            size = (*lead, self.channels, rows * self.patch_size[0], columns * self.patch_size[1])
            low, high = (self._bound(bound, size, tokens.device) for bound in bounds)
            if bool((low > high).any()):
                raise ValueError("bounds must be (low, high) with low <= high everywhere")
            patches = box_least_squares(right * scales, seen, low, high, patches)

        missed = (patches @ self.weight.T.to(tokens.device) - tokens).view(token_noise.shape)
        length = torch.linalg.vector_norm(token_noise.to(torch.float64), dim=(-2, -1))
        residual = torch.linalg.vector_norm(missed, dim=(-2, -1)) / torch.where(length == 0, 1, length)
        noise = self._to_images(patches.unflatten(0, (-1, rows, columns)), (rows, columns))
        noise = noise.view(*lead, *noise.shape[1:])
        return noise.to(token_noise.dtype), torch.where(length == 0, 0, residual).to(token_noise.dtype)

    @torch.no_grad()
    def maximize(
        self,
        images: Tensor,
        target: Tensor | None = None,
        bounds: tuple[float | Tensor, float | Tensor] = (0.0, 1.0),
    ) -> Tensor:
        """The pictures that look most unlike `images`, or most like `target`, and give the same tokens.

        Convex towards a target: of all pictures within the bounds whose patch embedding is that of `images` the one
        nearest to it, to 0.25 % of its distance, all patches at once (fastnull.nullspace.box_projection). Without one
        the target of every pixel is the bound that is further away, which stands in for the largest change: that
        problem itself is not convex, and what is found is a large change, not provably the largest. Computed in
        float64. Ours.

        Args:
            images: [B, C, H, W] within the bounds, H and W multiples of the patch.
            target: [B, C, H, W] or [C, H, W], in the units of the images; may lie outside the bounds.
            bounds: (lowest, highest) values of the pictures, finite; numbers or tensors that broadcast to [B, C, H, W].
                (0, 1) is that of pixels, for a model that normalises them itself (NormalizedModel).

        Returns:
            The changed pictures [B, C, H, W] in the dtype of `images`, within the bounds. ‖W·change‖ is at most 1e-7 of
            ‖W‖·‖target − images‖ before rounding to that dtype.

        Raises:
            TypeError: images or target are not floating tensors.
            ValueError: another shape or size, NaN or Inf, images outside the bounds, bounds that are not finite, cross,
                or do not broadcast, or an embedding without kernel (`dim` 0).
        """
        grid = self._grid_of(images)
        check_finite("images", images)
        self._check_kernel()
        low, high = (self._bound(bound, images.shape, images.device) for bound in bounds)
        if bool((low > high).any()):
            raise ValueError("bounds must be (low, high) with low <= high everywhere")
        patches = self._to_patches(images.to(torch.float64)).flatten(0, 2)  # [M, K], M = B·h·w
        outside = float(torch.maximum(low - patches, patches - high).max()) if len(patches) else 0.0
        if outside > RANGE_TOLERANCE:
            raise ValueError(f"images must lie within bounds; they leave them by up to {outside:.4g}")
        if target is None:
            wanted = torch.where(patches - low > high - patches, low, high)
        else:
            wanted = self._to_patches(self._like(target, images)).flatten(0, 2)
        # a pixel that is outside by a rounding error stays where it is
        room = ((low - patches).clamp(max=0), (high - patches).clamp(min=0))
        weights = (self.singular_values[: self.rank] / self._largest).to(images.device)
        change = box_projection(wanted - patches, self._rows.to(images.device), *room, weights)
        changed = self._to_images((patches + change).clamp(low, high).unflatten(0, (-1, *grid)), grid)
        return changed.to(images.dtype)

    def __repr__(self) -> str:
        height, width = self.patch_size
        return (
            f"PatchNullspace(dim={self.dim}, rank={self.rank}, patch={height}x{width}, channels={self.channels}, "
            f"width={self.width}, tolerance={self.tolerance:.2g})"
        )

    @property
    def _largest(self) -> float:
        return float(self.singular_values[0])

    def _cast(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        key = (device, dtype)
        if key not in self._casts:
            self._casts[key] = self._basis.to(device=device, dtype=dtype).contiguous()
        return self._casts[key]

    def _grid_of(self, images: Tensor) -> tuple[int, int]:
        """Check a batch of images and return its (rows, columns) of patches. Values are not read: no host sync."""
        if not isinstance(images, Tensor) or not images.is_floating_point():
            kind = images.dtype if isinstance(images, Tensor) else type(images).__name__
            raise TypeError(f"images must be a floating tensor [B, C, H, W]; got {kind}")
        if images.ndim != 4 or images.shape[1] != self.channels:
            raise ValueError(f"images must have shape [B, {self.channels}, H, W]; got {list(images.shape)}")
        (height, width), (ph, pw) = images.shape[2:], self.patch_size
        if height % ph or width % pw:
            raise ValueError(
                f"images must be whole patches of {ph}x{pw} pixels high and wide; got {height}x{width}. "
                "Resize, crop or pad them first"
            )
        return height // ph, width // pw

    def _warn_of_unreachable(self, tokens: Tensor, seen: Tensor) -> None:
        """Warn where tokens have more values than patches and `tokens` [M, D] more than their part `seen` [M, r]."""
        values = self.weight.shape[1]
        whole, part = float(tokens.square().sum()), float(seen.square().sum())
        if self.width > values and part < (1 - _NOTICED**2) * whole:
            warnings.warn(
                f"tokens of width {self.width} hold more than the {values} values of a patch: no image, whatever its "
                f"pixels, comes nearer to this token noise than {100 * math.sqrt(1 - part / whole):.2g} % of its norm. "
                f"The nearest is returned, with its residual; a width up to {values} reaches all of it",
                RuntimeWarning,
                stacklevel=4,  # past no_grad's wrapper
            )

    def _check_kernel(self) -> None:
        if self.dim == 0:
            values = self.weight.shape[1]
            raise ValueError(
                f"this patch embedding has no nullspace: its {self.width}x{values} matrix has rank {self.rank} = all "
                f"{values} values of a patch (smallest singular value {self.singular_values[-1] / self._largest:.2g} "
                f"of the largest, tolerance {self.tolerance:.2g}). Use token noise (fastnull.synthesis, site 'patch'), "
                f"or a model whose width is below {values}, such as vit_small_patch16_224 or vit_base_patch32_224"
            )

    def _like(self, target: Tensor, images: Tensor) -> Tensor:
        """The target in float64, shaped as the images."""
        if not isinstance(target, Tensor) or not target.is_floating_point():
            kind = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(f"target must be a floating tensor shaped as the images; got {kind}")
        if target.shape not in (images.shape, images.shape[1:]):
            raise ValueError(
                f"target must have the images' shape {list(images.shape)} or {list(images.shape[1:])}; got "
                f"{list(target.shape)}: resize it first"
            )
        check_finite("target", target)
        return target.to(images.device, torch.float64).expand(images.shape)

    def _check_tokens(self, token_noise: Tensor, grid: tuple[int, int] | None) -> tuple[int, int]:
        if not isinstance(token_noise, Tensor) or not token_noise.is_floating_point():
            kind = token_noise.dtype if isinstance(token_noise, Tensor) else type(token_noise).__name__
            raise TypeError(f"token_noise must be a floating tensor [..., N, D]; got {kind}")
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

    def _bound(self, bound: float | Tensor, size: tuple[int, ...], device: torch.device) -> Tensor:
        """One end of the bounds → [M, K] in float64, in the order of the patches."""
        value = torch.as_tensor(bound, dtype=torch.float64, device=device)
        check_finite("bounds", value)
        try:
            value = value.expand(size)
        except RuntimeError:
            raise ValueError(f"bounds must broadcast to {list(size)}; got {list(value.shape)}") from None
        return self._to_patches(value.reshape(-1, *size[-3:])).reshape(-1, self.weight.shape[1])

    def _to_patches(self, images: Tensor) -> Tensor:
        """[B, C, H, W] → [B, h, w, C·ph·pw], a copy."""
        batch, (ph, pw) = images.shape[0], self.patch_size
        rows, columns = images.shape[2] // ph, images.shape[3] // pw
        cut = images.reshape(batch, self.channels, rows, ph, columns, pw)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows, columns, self.weight.shape[1])

    def _to_images(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, h, w, C·ph·pw] → [B, C, H, W], a copy."""
        (rows, columns), (ph, pw) = grid, self.patch_size
        cut = patches.view(-1, rows, columns, self.channels, ph, pw).permute(0, 3, 1, 4, 2, 5)
        return cut.reshape(-1, self.channels, rows * ph, columns * pw)


@functools.cache
def _prove(device: torch.device, dtype: torch.dtype, patch_size: int, pixels: int, complement: bool) -> None:
    """Have the kernels of the projection checked, unless this machine knows them."""
    if dtype in NATIVE_DTYPES["cuda"] and not switched_off() and not triton_problem(device):
        prove([Problem("patch_project_out", (dtype, (patch_size, pixels, int(complement))))], device)


def patch_projection(model: nn.Module | SplitViT) -> nn.Conv2d:
    """The convolution that cuts a model's images into patches; the only thing in the model that sees the image.

    Raises:
        TypeError: not a model.
        ValueError: there is none, an adapter is around it, or its patches overlap, are padded, dilated or grouped.
    """
    if not isinstance(model, (nn.Module, SplitViT)):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}")
    network = unwrap(model.network if isinstance(model, (NormalizedModel, SplitViT)) else unwrap(model))
    if isinstance(network, NormalizedModel):
        network = unwrap(network.network)
    name = type(network).__name__
    # timm names the layer that takes the image, also where another convolution than patch_embed.proj comes first
    first = (getattr(network, "pretrained_cfg", None) or {}).get("first_conv")
    layer: object = None
    if isinstance(first, str):
        layer = _submodule(network, first)
    if not isinstance(layer, nn.Module):
        layer = _projection_without_config(model, network)
    # a subclass with a forward of its own (weight standardisation, padding) does not apply the weight it stores
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
            "groups them, so its kernel is no product of one kernel a patch. Needed is stride = kernel size without "
            "padding, dilation or groups"
        )
    return layer


def _projection_without_config(model: nn.Module | SplitViT, network: nn.Module) -> object:
    try:
        return (model if isinstance(model, SplitViT) else split(network)).projection
    except ValueError:
        embed = getattr(network, "patch_embed", None)
        return getattr(embed, "proj", None)


def _submodule(network: nn.Module, path: str) -> nn.Module | None:
    try:
        return network.get_submodule(path)
    except AttributeError:
        return None
