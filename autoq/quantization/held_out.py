"""A gate: how far the quantized model's predictions are from the full-precision one's, on text it was not fitted to.

Samples that took no part in the calibration went through every block twice, as it was and quantized, while the blocks
were walked; so it needs neither both models at once nor another pass over the weights.
"""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from autoq.config import LM_HEAD
from autoq.evaluation.divergence import divergence_of_logits
from autoq.evaluation.perplexity import negative_log_likelihood, perplexity_of_mean
from autoq.nn.linear import replaced
from autoq.quantization.activations import after_blocks
from autoq.quantization.plan import Plan
from autoq.quantization.ranks import Ranks
from autoq.quantization.report import HeldOutReport
from autoq.quantization.streams import Streams


def compare_held_out(
    model: PreTrainedModel, plan: Plan, streams: Streams, head: nn.Module | None, ranks: Ranks, source: str
) -> HeldOutReport:
    """What the last block's outputs say, through the head; `head` is the quantized one, if there is one.

    Raises nothing where predictions are NaN: then the figures are.
    """
    tokens = predictions = agreeing = 0
    full = quantized = divergence = 0.0
    for number, batch in enumerate(streams.held_out.batches):
        expected = after_blocks(model, plan, streams.held_out.states.read(number), batch)
        with replaced(model, LM_HEAD, head):
            found = after_blocks(model, plan, streams.held_out_quantized.states.read(number), batch).to(expected.device)
        full += negative_log_likelihood(expected, batch)
        quantized += negative_log_likelihood(found, batch)
        batch_divergence, batch_agreeing = divergence_of_logits(expected.flatten(0, 1), found.flatten(0, 1))
        divergence += batch_divergence
        agreeing += batch_agreeing
        tokens += batch.numel()
        predictions += batch.numel() - len(batch)
    full, quantized, divergence, all_agreeing, all_tokens, all_predictions = ranks.sum(
        [full, quantized, divergence, agreeing, tokens, predictions]
    )
    return HeldOutReport(
        source=source,
        tokens=int(all_tokens),
        perplexity_before=perplexity_of_mean(full / max(all_predictions, 1)),
        perplexity_after=perplexity_of_mean(quantized / max(all_predictions, 1)),
        kl_divergence=divergence / all_tokens,
        top1_agreement=all_agreeing / all_tokens,
    )
