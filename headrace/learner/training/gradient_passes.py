"""The gradient of a micro-batch, also of one whose activations are too large to be kept at once.

A rollout of several segments may be larger than the budget of a micro-batch, and its loss needs all of its
log-probabilities together. They are then computed without a gradient, pass by pass. The loss gives the gradient of each
log-probability, and a second forward pass of each part takes it on to the weights: the same gradient as in one, for
every loss, with the activations of one pass and one more forward pass.
"""

import torch
from torch import Tensor

from headrace.learner.model.logprobs import TokenScores
from headrace.learner.model.packing import MicroBatch
from headrace.learner.model.policy import Policy


def score_for_gradient(policy: Policy, micro_batch: MicroBatch) -> TokenScores:
    """The scores of a micro-batch, for a loss that `backward` is called with."""
    if len(micro_batch.passes) == 1:
        return policy.score(micro_batch)
    with torch.no_grad():
        scores = policy.score(micro_batch)
    return scores._replace(logprobs=scores.logprobs.requires_grad_())


def backward(policy: Policy, micro_batch: MicroBatch, loss: Tensor, scores: TokenScores) -> None:
    """Adds the gradient of `loss`, which is a function of the log-probabilities of `score_for_gradient`."""
    loss.backward()
    if len(micro_batch.passes) == 1:
        return
    assert scores.logprobs.grad is not None
    gradients = scores.logprobs.grad.split([len(one.targets) for one in micro_batch.passes])
    for one, gradient in zip(micro_batch.passes, gradients, strict=True):
        policy.score_pass(one).logprobs.backward(gradient)
