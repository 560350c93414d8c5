"""What autoq has to know about a family of models, as data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

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


class Arrangement(IntEnum):
    """How attention, MLP and residuals follow each other in a block."""

    SEQUENTIAL = 0  # x + attention(norm(x)), then the same with the MLP
    NORMED_RESIDUAL = 1  # as above, but the residual is the norm's output
    POST_NORM = 2  # norm(x + attention(x)), then the same with the MLP
    PARALLEL = 3  # x + attention(norm(x)) + MLP(norm(x)), with one norm or two


class NormKind(IntEnum):
    LAYER = 0
    RMS = 1


class RotaryKind(IntEnum):
    """Which columns of a head turn together: i and i + n/2 of the first n, or 2i and 2i + 1."""

    NONE = 0
    HALVES = 1
    PAIRS = 2


class HeadLayout(NamedTuple):
    """Where the heads are in a row of the q/k/v projection; of separate projections, one after the other.

    Each group of `queries_per_group` query heads starts `group_stride` behind the one before; the key heads start at
    `key_offset`, the value heads at `value_offset`, each `kv_stride` behind the one before.
    """

    heads: int
    kv_heads: int
    head_dim: int
    queries_per_group: int
    group_stride: int
    key_offset: int
    value_offset: int
    kv_stride: int

    @classmethod
    def consecutive(cls, heads: int, kv_heads: int, head_dim: int) -> HeadLayout:
        """All query heads, then all key heads, then all value heads."""
        keys = heads * head_dim
        return cls(heads, kv_heads, head_dim, heads, 0, keys, keys + kv_heads * head_dim, head_dim)

    @classmethod
    def interleaved(cls, heads: int, kv_heads: int, head_dim: int) -> HeadLayout:
        """For each key head its query heads, then it, then its value head."""
        queries = heads // kv_heads
        stride = (queries + 2) * head_dim
        key = queries * head_dim
        return cls(heads, kv_heads, head_dim, queries, stride, key, key + head_dim, stride)

    @property
    def row_size(self) -> int:
        """Rows of the projection."""
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def query(self, head: int) -> int:
        """The first row of a query head."""
        group, within = divmod(head, self.queries_per_group)
        return group * self.group_stride + within * self.head_dim

    def key(self, head: int) -> int:
        """The first row of a key head."""
        return self.key_offset + head * self.kv_stride

    def value(self, head: int) -> int:
        """The first row of a value head."""
        return self.value_offset + head * self.kv_stride

    def value_rows(self) -> Tensor:
        """The row behind each input channel of the output projection, int64 `[heads * head_dim]`: one value head for
        each query head, or for several."""
        shared = self.heads // self.kv_heads
        starts = torch.tensor([self.value(head // shared) for head in range(self.heads)])
        return (starts[:, None] + torch.arange(self.head_dim)).flatten()


@dataclass(frozen=True)
class BlockParts:
    """What the fused runtime has to know of a block: its parts, by name within it, and how they are put together.

    qkv: the projections that make queries, keys and values, in the order of `heads`.
    mlp_norm: None where the MLP reads the attention norm's output.
    up: the projection into the MLP, or the gate and then it.
    query_norm, key_norm: RMS norms of each head before the rotary positions.
    position_bias: the keyword under which the block is given what is added to the scores (alibi).
    inverted_mask: boolean masks are true where a query must not look.
    returns_tuple: the block returns `(hidden states, attention weights)`, not the hidden states alone.
    scale: of the scores; None is `1 / sqrt(head_dim)`. clip: q, k and v are cut to [-clip, clip]; 0: they are not.
    """

    heads: HeadLayout
    arrangement: Arrangement
    norm: NormKind
    rotary: RotaryKind
    attention: str
    attention_norm: str
    qkv: tuple[str, ...]
    attention_output: str
    mlp_norm: str | None
    up: tuple[str, ...]
    activation: str
    down: str
    query_norm: str | None = None
    key_norm: str | None = None
    position_bias: str | None = None
    inverted_mask: bool = False
    returns_tuple: bool = True
    scale: float | None = None
    clip: float = 0.0


@dataclass(frozen=True)
class Architecture:
    """One family of models.

    model_types: `config.model_type` of every model this description fits.
    blocks: path of the list of decoder blocks within the `*ForCausalLM` model.
    scale_groups: the groups of a block in the order they are searched. A linear that is in no group that holds for
        the config is quantized as it is.
    unclipped: leaf names of the linears whose weights are never clipped: those that make queries and keys, since an
        error in their output says little about the error after the softmax (as in the original AWQ).
    block: what the fused runtime has to know of a block under a config.
    final_norm: path of the RMS norm behind the blocks; None where it is a layer norm, for which torch has an operator.
    rotary: path of the module that makes the tables of rotary positions for all blocks; None where there is none.
    """

    model_types: tuple[str, ...]
    blocks: str
    scale_groups: tuple[ScaleGroup, ...]
    unclipped: tuple[str, ...]
    block: Callable[[PretrainedConfig], BlockParts]
    final_norm: str | None = None
    rotary: str | None = None

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
