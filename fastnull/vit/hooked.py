"""Any model, run by its own forward and entered or left in the middle through hooks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fastnull.vit.base import SplitViT, under_adapters


class HookedViT(SplitViT):
    """A model of which only the modules at the sites are known.

    Every step runs the model's own forward. A hook takes the tokens out and stops the forward, or it replaces the
    tokens of a blank image. Results are the model's own, bit for bit. The overhead is one patch embedding (0.7 % of the
    products of a ViT-B/16). Without a module that outputs the first block's input there is no `block0` site.

    Args:
        model: takes images [B, C, H, W], returns logits [B, K] or an output with `.logits`; may be a NormalizedModel.
        patch: dotted name, in the network, of the module that outputs the patch tokens: [B, N, D], [B, h, w, D], a
            convolution's [B, D, h, w] (its tokens are then [B, N, D]), or a tuple that starts with one of them.
        block0: dotted name of the module whose output enters the first block, or None.
        image_size: (H, W); None takes it from the model's configuration.
        num_prefix_tokens: class, register and distillation tokens before the image tokens.

    Raises:
        ValueError: no such module, no convolution in the patch embedding, or an unknown image size.
    """

    batch_may_grow = False  # most forwards expand the class token to the batch of the images

    def __init__(
        self,
        model: nn.Module,
        patch: str,
        block0: str | None = None,
        *,
        image_size: tuple[int, int] | None = None,
        num_prefix_tokens: int = 0,
    ) -> None:
        super().__init__(model)
        self.patch_module = self._named(patch)
        self._block0 = None if block0 is None else self._named(block0)
        self.projection = self._projection()
        self.channels = self._first_convolution().in_channels
        self.image_size = image_size or self._image_size()
        labels = getattr(getattr(self.network, "config", None), "num_labels", 0)
        self.num_classes = int(getattr(self.network, "num_classes", 0) or labels)
        self.num_prefix_tokens = num_prefix_tokens

    def site_module(self, site: str) -> nn.Module:
        if site == "patch":
            return self.patch_module
        if self._block0 is None:
            raise ValueError(
                f"{type(self.network).__name__} has no site 'block0' here: none of its modules outputs the input of "
                "the first block; use 'patch' or 'pixels'"
            )
        return self._block0

    def tokens_of(self, output: Any) -> Tensor:
        tokens = output[0] if isinstance(output, tuple) else output
        return tokens.flatten(2).transpose(1, 2) if self._is_map(tokens) else tokens

    def with_tokens(self, output: Any, tokens: Tensor) -> Any:
        old = output[0] if isinstance(output, tuple) else output
        if self._is_map(old):
            tokens = tokens.transpose(1, 2).unflatten(2, old.shape[2:])  # [B, D, h, w]
        return (tokens, *output[1:]) if isinstance(output, tuple) else tokens

    def patch(self, images: Tensor) -> Tensor:
        return self._run(images, leave=self.patch_module)

    def prepare(self, patches: Tensor) -> Tensor:
        """Patch tokens → input of the first block; unchanged if there is no such site."""
        if self._block0 is None:
            return patches
        return self._run(self._blank(patches), enter=self.patch_module, tokens=patches, leave=self._block0)

    def encode(self, tokens: Tensor) -> Tensor:
        """Output of `prepare` → logits [B, K]; `head` does nothing."""
        return self._run(self._blank(tokens), enter=self._block0 or self.patch_module, tokens=tokens)

    def head(self, features: Tensor) -> Tensor:
        return features

    def embed(self, images: Tensor, site: str) -> Tensor:
        return images if site == "pixels" else self._run(images, leave=self.site_module(site))

    def logits(self, tokens: Tensor, site: str) -> Tensor:
        if site == "pixels":
            return self._run(tokens)
        return self._run(self._blank(tokens), enter=self.site_module(site), tokens=tokens)

    def _run(
        self,
        images: Tensor,
        *,
        enter: nn.Module | None = None,
        tokens: Tensor | None = None,
        leave: nn.Module | None = None,
    ) -> Tensor:
        """The model's forward with `tokens` as the output of `enter`, up to the output of `leave` or the logits."""
        entered = enter is None

        def put(module: nn.Module, args: Any, output: Any) -> Any:
            nonlocal entered
            entered = True
            return self.with_tokens(output, tokens)

        def take(module: nn.Module, args: Any, output: Any) -> None:
            raise _Reached(self.tokens_of(output))

        handles = [module.register_forward_hook(hook) for module, hook in ((enter, put), (leave, take)) if module]
        try:
            logits = self.whole(images)
        except _Reached as reached:
            return reached.tokens
        finally:
            for handle in handles:
                handle.remove()
        if not entered or leave is not None:
            raise RuntimeError(f"the forward of {type(self.network).__name__} does not call the module of a site")
        return logits

    def _blank(self, tokens: Tensor) -> Tensor:
        assert self.image_size is not None
        return self.projection.weight.new_zeros(1, self.channels, *self.image_size).expand(len(tokens), -1, -1, -1)

    def _is_map(self, tokens: Tensor) -> bool:
        return tokens.ndim == 4 and isinstance(under_adapters(self.patch_module), (nn.Conv2d, nn.Sequential))

    def _named(self, name: str) -> nn.Module:
        try:
            return self.network.get_submodule(name)
        except AttributeError:
            raise ValueError(f"{type(self.network).__name__} has no module named {name!r}") from None

    def _projection(self) -> nn.Conv2d:
        for name in ("proj", "projection"):
            if isinstance(getattr(self.patch_module, name, None), nn.Conv2d):
                return getattr(self.patch_module, name)
        return self._first_convolution()

    def _first_convolution(self) -> nn.Conv2d:
        found = next((module for module in self.patch_module.modules() if isinstance(module, nn.Conv2d)), None)
        if found is None:
            kind = type(self.patch_module).__name__
            raise ValueError(f"the patch embedding of {type(self.network).__name__}, a {kind}, has no convolution")
        return found

    def _image_size(self) -> tuple[int, int]:
        config = getattr(self.network, "config", None)
        cfg = getattr(self.network, "pretrained_cfg", None) or {}
        for found in (
            getattr(self.patch_module, "img_size", None),
            getattr(self.patch_module, "image_size", None),
            getattr(self.network, "image_size", None),
            getattr(getattr(config, "vision_config", config), "image_size", None),
            tuple(cfg.get("input_size", ()))[1:],
        ):
            if found:
                return (found, found) if isinstance(found, int) else (found[0], found[1])
        raise ValueError(f"{type(self.network).__name__} has no known image size: pass image_size=(height, width)")


class _Reached(Exception):  # noqa: N818 (not an error: it ends a forward)
    def __init__(self, tokens: Tensor) -> None:
        super().__init__()
        self.tokens = tokens
