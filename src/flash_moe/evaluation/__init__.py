"""Measures the quality of a checkpoint: perplexity, divergence from a reference, tool calls.

from flash_moe.evaluation import LayerwiseModel, divergence, perplexity, read_sequences, token_scores

model = LayerwiseModel.open("./qwen-4bit", experts_per_token=4)
reference = LayerwiseModel.open("./qwen-4bit", experts_per_token=None)
scores = token_scores(model, read_sequences("held-out.jsonl", model.tokenizer), reference)
print(perplexity(scores), divergence(scores), sep="\\n")
"""

from .decoded import DecodedModel
from .estimates import Estimate
from .layerwise_model import LayerwiseModel
from .network_model import NetworkModel, open_scored
from .quality import Divergence, Perplexity, divergence, perplexity
from .replies import greedy
from .sequences import TokenSequence, calibration_tokens, conversation, read_sequences, windows
from .token_scores import Comparison, TokenScores, token_scores
from .tool_call_score import ToolCallCase, ToolCallScore, read_tool_call_cases, tool_call_score

__all__ = [
    "Comparison",
    "DecodedModel",
    "Divergence",
    "Estimate",
    "LayerwiseModel",
    "NetworkModel",
    "Perplexity",
    "TokenScores",
    "TokenSequence",
    "ToolCallCase",
    "ToolCallScore",
    "calibration_tokens",
    "conversation",
    "divergence",
    "greedy",
    "open_scored",
    "perplexity",
    "read_sequences",
    "read_tool_call_cases",
    "token_scores",
    "tool_call_score",
    "windows",
]
