"""autoq and transformers, through transformers' forward, as `generate` calls it."""

from __future__ import annotations

import abc
import platform
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache

from autoq import AutoQForCausalLM, __version__
from autoq.evaluation.speed import greedy_step, model_bytes
from autoq.extension import extension_missing
from peers.model import ModelWorker, random_tokens


class _TorchModel(ModelWorker):
    def __init__(self) -> None:
        torch.set_grad_enabled(False)
        self._cache: Any = None

    def versions(self) -> dict[str, str]:
        return {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    @abc.abstractmethod
    def _load_model(self, path: str, **options: Any) -> Any:
        """The model in a directory."""

    def _open(self, path: str, **options: Any) -> int:
        self._model = self._load_model(path, **options).eval()
        self.release()
        config = self._model.config
        # Of the embeddings a token reads one row, unless they are the head as well.
        embeddings = self._model.get_input_embeddings() if not config.tie_word_embeddings else None
        return model_bytes(self._model) - (0 if embeddings is None else embeddings.weight.nbytes)

    def _logits(self, tokens: list[int]) -> np.ndarray:
        return self._model(torch.tensor([tokens])).logits[0].float().numpy()

    def _fill(self, batch: int, depth: int, room: int, threads: int) -> None:
        torch.set_num_threads(threads)
        self._depth, self._cache = depth, None
        self._ids = torch.zeros(batch, 1, dtype=torch.long)
        if depth:
            prompt = torch.tensor([random_tokens(depth, self._model.config.vocab_size)])
            _, self._cache = greedy_step(self._model, prompt, DynamicCache(config=self._model.config))
            self._cache.batch_repeat_interleave(batch)

    def _step(self) -> None:
        self._ids, self._cache = greedy_step(self._model, self._ids, self._cache)

    def _rewind(self) -> None:
        if self._depth:
            self._cache.crop(self._depth - self._cache.get_seq_length())
        else:
            self._cache = None

    def _read(self, tokens: int, threads: int) -> None:
        torch.set_num_threads(threads)
        greedy_step(self._model, torch.tensor([random_tokens(tokens, self._model.config.vocab_size)]), None)

    def release(self) -> None:
        self._cache = None


class AutoQ(_TorchModel):
    """A quantized checkpoint; the options are those of `from_quantized`."""

    def versions(self) -> dict[str, str]:
        native = extension_missing()
        return {"autoq": __version__ if native is None else f"{__version__} (extension {native})"} | super().versions()

    def _load_model(self, path: str, **options: Any) -> Any:
        return AutoQForCausalLM.from_quantized(path, device_map="cpu", torch_dtype=torch.bfloat16, **options)


class Transformers(_TorchModel):
    """A full-precision checkpoint in bf16."""

    def _load_model(self, path: str, **options: Any) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, **options)
