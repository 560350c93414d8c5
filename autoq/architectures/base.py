"""What autoq has to know about a family of models, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from autoq.errors import ArchitectureError


@dataclass(frozen=True)
class ScaleGroup:
    """Linears that read one activation `X`, and the operation that produces it.

    `W X = (W s) (X / s)` for any positive scale per channel: the linears absorb `s`, the previous operation absorbs
    `1 / s`. Folding is exact only if nothing else reads `X`; `when` says for which configs that holds.

    prev: the operation that absorbs `1 / s`, by its name within the block: a norm, a linear or an activation.
    linears: the linears that absorb `s`, by name within the block.
    rows: for a previous linear, the output row that produces each input channel of the linears (int64 `[channels]`),
        from the config. A row may feed several channels, as one KV head serves several query heads; they then share
        one scale. None: row i produces channel i.
    activation: the previous operation is a nonlinearity, which cannot absorb a scale. It is replaced by a scaled
        activation, `act(x) / s`; engines do not know it, so these groups are used on request only.
    when: whether the group is exact under this config; None: always.
    """

    prev: str
    linears: tuple[str, ...]
    rows: Callable[[PretrainedConfig], Tensor] | None = None
    activation: bool = False
    when: Callable[[PretrainedConfig], bool] | None = None


@dataclass(frozen=True)
class Architecture:
    """One family of models.

    model_types: `config.model_type` of every model this description fits.
    blocks: path of the list of decoder blocks within the `*ForCausalLM` model.
    scale_groups: the groups of a block in the order they are searched. A linear that is in no group that holds for
        the config is quantized as it is.
    unclipped: leaf names of the linears whose weights are never clipped: those that make queries and keys, since an
        error in their output says little about the error after the softmax (as in the original AWQ).
    """

    model_types: tuple[str, ...]
    blocks: str
    scale_groups: tuple[ScaleGroup, ...]
    unclipped: tuple[str, ...]

    def groups(self, config: PretrainedConfig, scale_activations: bool = False) -> list[ScaleGroup]:
        """The groups that are exact for this config."""
        return [
            group
            for group in self.scale_groups
            if (group.when is None or group.when(config)) and (scale_activations or not group.activation)
        ]

    def decoder_blocks(self, model: nn.Module) -> nn.ModuleList:
        """The decoder blocks of a `*ForCausalLM` model."""
        try:
            blocks = model.get_submodule(self.blocks)
        except AttributeError:
            blocks = None
        if not isinstance(blocks, nn.ModuleList):
            raise ArchitectureError(
                f"{type(model).__name__} has no list of decoder blocks at {self.blocks!r}, where the "
                f"{self.model_types[0]!r} family keeps them; load the model with AutoQForCausalLM.from_pretrained"
            )
        return blocks

    def check_block(self, block: nn.Module, name: str) -> None:
        """Raises ArchitectureError when a block holds a linear this description does not name.

        A linear nobody declared would be quantized on the wrong statistics or not at all, so a new layout of a known
        family stops here instead of losing quality silently.
        """
        declared = {linear for group in self.scale_groups for linear in group.linears}
        unknown = [leaf for leaf, _ in named_linears(block) if leaf not in declared]
        if unknown:
            raise ArchitectureError(
                f"{name} ({type(block).__name__}) holds the linear {unknown[0]!r}, which the {self.model_types[0]!r} "
                "architecture does not describe; this variant of the family is not supported"
            )


def named_linears(block: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linears of a block with their names (subclasses such as FalconLinear included)."""
    for name, module in block.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def grouped_value_rows(config: PretrainedConfig) -> Tensor:
    """Row of a separate V projection behind each input channel of the output projection, one KV head for several
    query heads (grouped-query attention) or one each."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rows = torch.arange(kv_heads * head_dim).view(kv_heads, 1, head_dim)
    return rows.expand(kv_heads, heads // kv_heads, head_dim).reshape(-1)


def interleaved_value_rows(heads: int, head_dim: int) -> Tensor:
    """V rows of a fused projection laid out `[heads, (q, k, v), head_dim]`."""
    return torch.arange(heads * 3 * head_dim).view(heads, 3, head_dim)[:, 2].reshape(-1)
