"""The demo's model: a byte-level mixture of experts with hand-written forward and backward passes.

One token is one place of the text, seen through the `context` bytes before it::

    bytes [T, C] -> embeddings [T, C * embed] -> linear -> x [T, H]
    every layer:    x = x + MoE(rms_norm(x))
    logits [T, 256] = rms_norm(x) @ out + out_bias, the guess at the byte that follows

The model does not know where its experts live. It hands its rows to an `Exchange`, which moves them
between ranks with epcomm or leaves them where they are. All arrays belong to one array namespace
`xp` (NumPy, or CuPy, which has the same functions) and have one float dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from epcomm.cli.exchange import Array, Exchange, Routed

Params = dict[str, Array]

NUM_BYTES = 256
NORM_EPSILON = 1e-6
BALANCE_RATE = 0.01


@dataclass(frozen=True)
class ModelShape:
    """The sizes of the model; all positive."""

    context: int = 16
    embed: int = 24
    hidden: int = 128
    expert_hidden: int = 256
    num_experts: int = 16
    topk: int = 2
    num_layers: int = 2


@dataclass
class LayerTape:
    """What one layer's forward pass leaves for its backward pass."""

    normed: Array
    scaled: Array
    inverse_rms: Array
    topk_idx: Array
    topk_weights: Array
    routed: Routed
    pairs: ExpertTape


@dataclass
class ExpertTape:
    """What the experts' forward pass leaves: (row, choice) pairs sorted by local expert."""

    order: Array
    row_idx: Array
    inputs: Array
    weights: Array
    active: Array
    outputs: Array
    spans: list[tuple[int, int]]


@dataclass
class Pass:
    """One forward and backward pass.

    Attributes:
        loss_sum: sum of the tokens' losses, in nats.
        dense_grads, expert_grads: gradients by parameter name.
        choices: topk_idx [T, topk] of every layer.
        num_pairs_per_expert: for every layer, the pairs of each of this rank's experts.
        routing_slack: how far the worst imposed choice lies below the model's own; 0 without any.
    """

    loss_sum: float
    dense_grads: Params = field(default_factory=dict)
    expert_grads: Params = field(default_factory=dict)
    choices: list[Array] = field(default_factory=list)
    num_pairs_per_expert: list[list[int]] = field(default_factory=list)
    routing_slack: float = 0.0


def init_params(xp: Any, shape: ModelShape, seed: int, dtype: Any) -> tuple[Params, Params]:
    """Draw the parameters: the same numbers whatever the namespace and the number of ranks.

    Returns:
        Dense parameters, which every rank holds, and expert parameters, whose first axis is the
        expert: rank `r` keeps its own slice.
    """
    rng = np.random.default_rng(seed)

    def normal(fan_in: int, *dims: int) -> Array:
        return xp.asarray((rng.standard_normal(dims) / np.sqrt(fan_in)).astype(dtype))

    h, f, mix = shape.hidden, shape.expert_hidden, shape.context * shape.embed
    dense = {
        "embed": normal(1, NUM_BYTES, shape.embed),
        "mix": normal(mix, mix, h),
        "mix_bias": xp.zeros(h, dtype),
        "out_norm": xp.ones(h, dtype),
        "out": normal(4 * h, h, NUM_BYTES),
        "out_bias": xp.zeros(NUM_BYTES, dtype),
    }
    experts = {}
    for layer in range(shape.num_layers):
        dense[f"norm{layer}"] = xp.ones(h, dtype)
        dense[f"gate{layer}"] = normal(h, h, shape.num_experts)
        experts[f"up{layer}"] = normal(h, shape.num_experts, h, f)
        experts[f"down{layer}"] = normal(4 * f, shape.num_experts, f, h)
    return dense, experts


def rms_norm(xp: Any, x: Array, gain: Array) -> tuple[Array, Array, Array]:
    """Return gain * x / rms(x), with x / rms(x) and 1 / rms(x) for the backward pass."""
    inverse_rms = 1 / xp.sqrt(xp.mean(x * x, axis=1, keepdims=True) + NORM_EPSILON)
    scaled = x * inverse_rms
    return scaled * gain, scaled, inverse_rms


def rms_norm_backward(
    xp: Any, grad: Array, scaled: Array, inverse_rms: Array, gain: Array
) -> tuple[Array, Array]:
    """Return the gradients of `rms_norm` by x and by gain."""
    grad_scaled = grad * gain
    along = xp.mean(grad_scaled * scaled, axis=1, keepdims=True)
    return inverse_rms * (grad_scaled - scaled * along), (grad * scaled).sum(axis=0)


def softmax(xp: Any, scores: Array) -> Array:
    """Return the softmax over the last axis."""
    exps = xp.exp(scores - scores.max(axis=-1, keepdims=True))
    return exps / exps.sum(axis=-1, keepdims=True)


def experts_forward(xp: Any, routed: Routed, up: Array, down: Array) -> tuple[Array, ExpertTape]:
    """Apply each row's experts here and sum their weighted results: [num_rows, hidden].

    An expert is relu(x @ up)**2 @ down. NOTE: the gate's weight is applied here, because combine
    is a plain sum.
    """
    num_rows, topk = routed.expert_idx.shape
    chosen = routed.expert_idx.reshape(-1)
    spans = list(pairwise(accumulate(routed.num_pairs_per_expert, initial=0)))
    # Sort pairs by expert. The keys are distinct, so the order does not hang on the sort's kind.
    expert = xp.where(chosen < 0, len(spans), chosen)
    order = xp.argsort(expert * chosen.size + xp.arange(chosen.size))[: spans[-1][1]]
    row_idx = order // topk
    inputs = routed.rows[row_idx]
    active = xp.empty((len(order), up.shape[2]), up.dtype)
    outputs = xp.empty_like(inputs)
    for e, (begin, end) in enumerate(spans):
        active[begin:end] = xp.maximum(inputs[begin:end] @ up[e], 0)
        outputs[begin:end] = active[begin:end] ** 2 @ down[e]
    weights = routed.weights.reshape(-1)[order][:, None]
    tape = ExpertTape(order, row_idx, inputs, weights, active, outputs, spans)
    return _sum_pairs(xp, outputs * weights, order, num_rows, topk), tape


def experts_backward(
    xp: Any, grad: Array, tape: ExpertTape, topk: int, up: Array, down: Array
) -> tuple[Array, Array, Array, Array]:
    """Return the gradients of `experts_forward` by rows, weights, up and down."""
    num_rows = len(grad)
    grad_pairs = grad[tape.row_idx]
    grad_weights = xp.zeros(num_rows * topk, grad.dtype)
    grad_weights[tape.order] = (grad_pairs * tape.outputs).sum(axis=1)
    grad_outputs = grad_pairs * tape.weights
    grad_inputs = xp.empty_like(tape.inputs)
    grad_up, grad_down = xp.empty_like(up), xp.empty_like(down)
    for e, (begin, end) in enumerate(tape.spans):
        active, out = tape.active[begin:end], grad_outputs[begin:end]
        grad_down[e] = (active**2).T @ out
        grad_active = 2 * active * (out @ down[e].T)
        grad_up[e] = tape.inputs[begin:end].T @ grad_active
        grad_inputs[begin:end] = grad_active @ up[e].T
    grad_rows = _sum_pairs(xp, grad_inputs, tape.order, num_rows, topk)
    return grad_rows, grad_weights.reshape(num_rows, topk), grad_up, grad_down


def _sum_pairs(xp: Any, pairs: Array, order: Array, num_rows: int, topk: int) -> Array:
    """Add the pairs of each row, in the order of its choices, so that sums repeat bit by bit."""
    slots = xp.zeros((num_rows * topk, pairs.shape[1]), pairs.dtype)
    slots[order] = pairs
    return slots.reshape(num_rows, topk, pairs.shape[1]).sum(axis=1)


class MoeModel:
    """The model with its parameters; `experts` holds the experts that `exchange` delivers to.

    Args:
        xp: array namespace.
        shape: sizes of the whole model.
        dense, experts: parameters, as `init_params` makes them.
        exchange: how rows reach the experts.
    """

    def __init__(
        self, xp: Any, shape: ModelShape, dense: Params, experts: Params, exchange: Exchange
    ) -> None:
        self.xp = xp
        self.shape = shape
        self.dense = dense
        self.experts = experts
        self.exchange = exchange
        # Added to the gate's scores when experts are chosen, never to their weights: it needs no
        # gradient, and keeps the load even (Wang et al., arXiv:2408.15664).
        self.balance = xp.zeros((shape.num_layers, shape.num_experts), dense["mix"].dtype)

    def balance_load(self, num_pairs_per_expert: Array) -> None:
        """Make busy experts a little less likely to be chosen: counts [num_layers, num_experts]."""
        counts = self.xp.asarray(num_pairs_per_expert)
        excess = self.xp.sign(counts - counts.mean(axis=1, keepdims=True))
        self.balance -= BALANCE_RATE * excess.astype(self.balance.dtype)

    def logits(self, contexts: Array) -> Array:
        """Return the scores [T, 256] of the next byte; contexts [T, context] integers."""
        x, _ = self._embed(contexts)
        for layer in range(self.shape.num_layers):
            x, _, _ = self._layer(x, layer, None)
        normed, _, _ = rms_norm(self.xp, x, self.dense["out_norm"])
        return normed @ self.dense["out"] + self.dense["out_bias"]

    def loss_sum(self, contexts: Array, targets: Array) -> float:
        """Return the summed loss of the tokens, in nats, without gradients."""
        return self._loss(self.logits(contexts), targets)[0]

    def run(
        self, contexts: Array, targets: Array, num_tokens: int, choices: list[Array] | None = None
    ) -> Pass:
        """Forward and backward; gradients are of the loss summed here, over `num_tokens`.

        Args:
            contexts: [T, context] integers.
            targets: [T] integers, the bytes that follow.
            num_tokens: tokens of all ranks, so that the ranks' gradients add up to the mean's.
            choices: experts to take instead of the model's own, [T, topk] for every layer.
        """
        xp = self.xp
        x, embedded = self._embed(contexts)
        tapes, slack = [], 0.0
        for layer in range(self.shape.num_layers):
            x, tape, layer_slack = self._layer(x, layer, choices[layer] if choices else None)
            tapes.append(tape)
            slack = max(slack, layer_slack)
        normed, scaled, inverse_rms = rms_norm(xp, x, self.dense["out_norm"])
        loss, grad = self._loss(normed @ self.dense["out"] + self.dense["out_bias"], targets)
        grad /= num_tokens
        result = Pass(loss, routing_slack=slack, choices=[tape.topk_idx for tape in tapes])
        result.num_pairs_per_expert = [tape.routed.num_pairs_per_expert for tape in tapes]
        grads = result.dense_grads
        grads["out_bias"] = grad.sum(axis=0)
        grads["out"] = normed.T @ grad
        grad, grads["out_norm"] = rms_norm_backward(
            xp, grad @ self.dense["out"].T, scaled, inverse_rms, self.dense["out_norm"]
        )
        for layer in reversed(range(self.shape.num_layers)):
            grad = self._layer_backward(grad, layer, tapes[layer], result)
        self._embed_backward(grad, contexts, embedded, grads)
        return result

    def _embed(self, contexts: Array) -> tuple[Array, Array]:
        # NOTE: no -1 in a shape here or below: a rank may have no tokens or receive no rows.
        embedded = self.dense["embed"][contexts].reshape(len(contexts), len(self.dense["mix"]))
        return embedded @ self.dense["mix"] + self.dense["mix_bias"], embedded

    def _embed_backward(self, grad: Array, contexts: Array, embedded: Array, grads: Params) -> None:
        xp, embed = self.xp, self.shape.embed
        grads["mix_bias"] = grad.sum(axis=0)
        grads["mix"] = embedded.T @ grad
        # bincount is the scatter-add that both namespaces have.
        cells = contexts[:, :, None] * embed + xp.arange(embed)
        weights = (grad @ self.dense["mix"].T).reshape(-1)
        flat = xp.bincount(cells.reshape(-1), weights=weights, minlength=NUM_BYTES * embed)
        grads["embed"] = flat.reshape(NUM_BYTES, embed).astype(grad.dtype)

    def _loss(self, logits: Array, targets: Array) -> tuple[float, Array]:
        """Return the summed cross entropy and its gradient by the logits."""
        xp, tokens = self.xp, self.xp.arange(len(targets))
        grad = softmax(xp, logits)
        tiny = xp.finfo(logits.dtype).tiny
        loss = -float(xp.log(xp.maximum(grad[tokens, targets], tiny)).sum())
        grad[tokens, targets] -= 1
        return loss, grad

    def _choose(self, scores: Array, imposed: Array | None) -> tuple[Array, float]:
        """Return the experts [T, topk] of the best scores, or the imposed ones and their slack."""
        xp, topk = self.xp, self.shape.topk
        own = xp.ascontiguousarray(xp.argsort(-scores, axis=1)[:, :topk])
        if imposed is None:
            return own, 0.0
        best = xp.take_along_axis(scores, own, axis=1).min(axis=1)
        worst = xp.take_along_axis(scores, imposed, axis=1).min(axis=1)
        return imposed, float((best - worst).max())

    def _layer(self, x: Array, layer: int, imposed: Array | None) -> tuple[Array, LayerTape, float]:
        xp = self.xp
        normed, scaled, inverse_rms = rms_norm(xp, x, self.dense[f"norm{layer}"])
        scores = normed @ self.dense[f"gate{layer}"]
        topk_idx, slack = self._choose(scores + self.balance[layer], imposed)
        weights = softmax(xp, xp.take_along_axis(scores, topk_idx, axis=1))
        routed = self.exchange.dispatch(normed, topk_idx, weights)
        rows, pairs = experts_forward(
            xp, routed, self.experts[f"up{layer}"], self.experts[f"down{layer}"]
        )
        x = x + self.exchange.combine(rows, routed)
        tape = LayerTape(normed, scaled, inverse_rms, topk_idx, weights, routed, pairs)
        return x, tape, slack

    def _layer_backward(self, grad: Array, layer: int, tape: LayerTape, result: Pass) -> Array:
        xp, up, down = self.xp, f"up{layer}", f"down{layer}"
        grad_rows, grad_weights, result.expert_grads[up], result.expert_grads[down] = (
            experts_backward(
                xp,
                self.exchange.combine_backward(grad, tape.routed),
                tape.pairs,
                self.shape.topk,
                self.experts[up],
                self.experts[down],
            )
        )
        grad_normed, grad_weights = self.exchange.dispatch_backward(
            grad_rows, grad_weights, tape.routed
        )
        # Softmax over the chosen scores; a score that was not chosen has no gradient.
        weights = tape.topk_weights
        grad_chosen = weights * (grad_weights - (grad_weights * weights).sum(axis=1, keepdims=True))
        grad_scores = xp.zeros((len(grad), self.shape.num_experts), grad.dtype)
        grad_scores[xp.arange(len(grad))[:, None], tape.topk_idx] = grad_chosen
        result.dense_grads[f"gate{layer}"] = tape.normed.T @ grad_scores
        grad_normed = grad_normed + grad_scores @ self.dense[f"gate{layer}"].T
        grad_x, result.dense_grads[f"norm{layer}"] = rms_norm_backward(
            xp, grad_normed, tape.scaled, tape.inverse_rms, self.dense[f"norm{layer}"]
        )
        return grad + grad_x


class Adam:
    """Adam with bias correction; updates parameters in place (Kingma & Ba, arXiv:1412.6980)."""

    def __init__(self, xp: Any, params: Params) -> None:
        self._xp = xp
        self._params = params
        self._means = {name: xp.zeros_like(param) for name, param in params.items()}
        self._squares = {name: xp.zeros_like(param) for name, param in params.items()}
        self._num_steps = 0

    def step(self, grads: Params, learning_rate: float) -> None:
        """Move every parameter against its gradient."""
        self._num_steps += 1
        beta1, beta2, epsilon = 0.9, 0.98, 1e-8
        rate = learning_rate / (1 - beta1**self._num_steps)
        correction = 1 / (1 - beta2**self._num_steps)
        for name, param in self._params.items():
            grad, mean, square = grads[name], self._means[name], self._squares[name]
            mean += (1 - beta1) * (grad - mean)
            square += (1 - beta2) * (grad * grad - square)
            param -= rate * mean / (self._xp.sqrt(square * correction) + epsilon)
