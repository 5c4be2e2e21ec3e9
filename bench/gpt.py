"""A small GPT, as people train them: what the demo and the benches save while it trains.

Pre-norm blocks, causal attention through ``scaled_dot_product_attention``, learned positions, dropout,
and one matrix for both the embedding and the head (so a checkpoint of it holds a tied weight).
Legend: B batch, T tokens of context, D width, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional

if TYPE_CHECKING:
    from corpus import Batch

__all__ = ["SIZES", "Config", "Gpt", "Training", "config_for"]

VOCABULARY = 256
"""Tokens are bytes."""


@dataclass(frozen=True, slots=True)
class Config:
    """What one GPT is.

    Attributes:
        layers: Number of blocks.
        heads: Attention heads per block.
        width: D, a multiple of ``heads``.
        context: T, tokens one prediction can look back on.
        batch: B, sequences per step.
        dropout: Share of activations dropped, so that training draws random numbers.
    """

    layers: int
    heads: int
    width: int
    context: int
    batch: int
    dropout: float = 0.1

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one training step learns from."""
        return self.batch * self.context


SIZES = {
    "tiny": Config(layers=2, heads=2, width=64, context=64, batch=4),
    "10m": Config(layers=6, heads=6, width=384, context=128, batch=4),
}


def config_for(parameters: int, *, context: int, batch: int) -> Config:
    """Return a GPT of about ``parameters`` parameters, with 64 of width per layer and 64 per head."""
    layers = max(1, round((parameters / (12 * 64**2)) ** (1 / 3)))
    return Config(layers=layers, heads=layers, width=64 * layers, context=context, batch=batch)


class Attention(nn.Module):
    """Every position looks at itself and at those before it."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to (B, T, D)."""
        batch, tokens, width = x.shape
        query, key, value = (
            part.view(batch, tokens, self.heads, -1).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)
        )
        y = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class Block(nn.Module):
    """Attention, then a two-layer perceptron, each added to what came in."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.norm2 = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, T, D) to (B, T, D)."""
        x = x + self.drop(self.attention(self.norm1(x)))
        return x + self.drop(self.down(functional.gelu(self.up(self.norm2(x)))))


class Gpt(nn.Module):
    """Bytes in, for each position the loss of predicting the next byte out."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(VOCABULARY, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        self.head.weight = self.token.weight
        self.apply(_initialise)
        for block in self.blocks:
            # Each block adds to the residual stream twice: keep its variance from growing with depth.
            for last in (block.attention.out, block.down):
                nn.init.normal_(last.weight, std=0.02 / math.sqrt(2 * config.layers))

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Return the mean cross entropy of (B, T) ``targets`` given (B, T) ``inputs``."""
        places = torch.arange(inputs.shape[1], device=inputs.device)
        x = self.drop(self.token(inputs) + self.position(places))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


class Training:
    """Model, optimizer and schedule, and one step of training: all the usual parts, all of them state.

    Dropout draws random numbers, gradients are clipped, the learning rate changes every step and two
    parameter groups decay differently: a resumed run that restored any of these wrongly drifts.

    Attributes:
        model: The GPT.
        optimizer: AdamW, by torch's fused kernel unless asked otherwise.
        schedule: A short warm-up, then a cosine.
    """

    def __init__(
        self,
        config: Config,
        *,
        steps: int,
        seed: int,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
        fused: bool = True,
    ) -> None:
        torch.manual_seed(seed)
        with torch.device(device):
            self.model = Gpt(config).to(dtype)
        matrices = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
            lr=1e-3,
            betas=(0.9, 0.95),
            fused=fused,
        )
        warm_up = max(1, steps // 10)

        def factor(step: int) -> float:
            if step < warm_up:
                return (step + 1) / warm_up
            done = min(1.0, (step - warm_up) / max(1, steps - warm_up))
            return 0.1 + 0.45 * (1 + math.cos(math.pi * done))

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, factor)

    @property
    def parameters(self) -> int:
        """Number of distinct parameters."""
        return sum(p.numel() for p in self.model.parameters())

    def step(self, batch: Batch) -> torch.Tensor:
        """Train on one batch and return its loss, detached."""
        loss = self.model(batch.inputs, batch.targets)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.schedule.step()
        return loss.detach()
